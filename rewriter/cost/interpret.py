"""What a graph costs, read off one run with FakeTensors: shapes flow, nothing is computed.

`propagate` runs a graph node by node under a dispatch mode that sees every op of PyTorch's
dispatcher, composite functions and modules taken apart, and prices each: FLOPs by
`rewriter.cost.formulas`, bytes by the tensors it touches, memory by the lifetimes of storages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rewriter.cost.cost import Cost, storage_cost
from rewriter.cost.formulas import Traffic, flop_formula, is_free, traffic
from rewriter.errors import VerifyError
from rewriter.sites import user_line

__all__ = ["GraphCost", "Region", "model_cost", "propagate"]

Region = tuple["nn.Module | str", Graph, Sequence[Any]]
"""(module or its dotted name, its graph, the inputs of the graph's placeholders in order)."""

aten = torch.ops.aten


@dataclass
class GraphCost:
    """What one graph, or the graphs of one model, cost.

    Args:
        nodes: what each node adds. `params` and `param_bytes` are those of the module it calls, so
            they do not add up where a module is called twice; `activation_bytes` is what is alive
            in the whole graph at the worst moment of that node.
        total: the whole, with the parameters of the whole root.
        errors: one line for each thing that has no known cost, or that depends on the data.
        counted_by_torch: the part of `total.flops` that `FlopCounterMode` counts too.
    """

    nodes: dict[Node, Cost] = field(default_factory=dict)
    total: Cost = field(default_factory=Cost)
    errors: list[str] = field(default_factory=list)
    counted_by_torch: int = 0


def propagate(
    root: nn.Module, graph: Graph, inputs: Sequence[Any], *, training: bool | None = None
) -> GraphCost:
    """Σ over the graph's ops, on FakeTensors: prices the graph and gives each node its value.

    Sets `node.meta["val"]` (FakeTensor, number, or nest of them) on every node. Neither `root` nor
    the inputs nor the random state change. Hooks on modules do not run. An op without a fake
    kernel is run by PyTorch on zeros of the right shape; every other op computes nothing.

    Args:
        root: the module tree that `call_module` and `get_attr` targets name.
        graph: the graph; gradients are not recorded, so this is the cost of its forward.
        inputs: one per placeholder. Of a tensor (real, meta or fake) only shape, strides, dtype
            and device are used. A placeholder with a default may be missing. An `nn.Parameter` is
            priced as a parameter.
        training: None leaves each module's own flag; else the flag for all modules.

    Raises:
        VerifyError: a node cannot run on these shapes; names the node and the user's line.
    """
    return model_cost(root, [(root, graph, inputs)], training=training)


def model_cost(
    root: nn.Module, regions: Iterable[Region], *, training: bool | None = None
) -> GraphCost:
    """The cost of a model whose graphs run one after another, once for each region given.

    FLOPs, bytes and launches are Σ over the regions, the activation peak is the largest of theirs,
    and parameters are those of `root`, once. What no region covers (Python islands) costs 0 here.

    Args:
        root: the whole model.
        regions: (module or its dotted name, graph, inputs); repeat one that runs repeatedly.
        training: as in `propagate`.

    Raises:
        VerifyError: as `propagate`.
    """
    run = _Run(training)
    result = GraphCost()
    lifted: list[Tensor] = []
    for owner, graph, inputs in regions:
        module = root.get_submodule(owner) if isinstance(owner, str) else owner
        run.graph(module, graph, inputs, result)
        lifted += [t for t in inputs if isinstance(t, nn.Parameter)]
    stored = storage_cost(root, *lifted)
    for node, cost in result.nodes.items():
        peak = cost.activation_bytes + stored.param_bytes
        result.nodes[node] = replace(cost, peak_bytes=peak)
    result.total = replace(
        result.total,
        params=stored.params,
        param_bytes=stored.param_bytes,
        peak_bytes=stored.param_bytes + result.total.activation_bytes,
    )
    result.errors = list(dict.fromkeys(result.errors))
    return result


class _Run:
    """One FakeTensorMode for all graphs of a model: each parameter becomes fake once."""

    def __init__(self, training: bool | None) -> None:
        self.training = training
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.parameters: dict[int, Cost] = {}
        self.shadows: dict[nn.Module, nn.Module] = {}
        self.copies: dict[int, Tensor] = {}
        self.paused = False
        self.kept: list[object] = []  # whose id is a key above: keeps the id from being reused
        self.weights: set[int] = set()  # storages that are no activations

    def graph(
        self, root: nn.Module, graph: Graph, inputs: Sequence[Any], result: GraphCost
    ) -> None:
        meter = _Meter(self, result)
        feed = iter(inputs)
        env: dict[Node, Any] = {}
        dying = _last_uses(graph)
        with torch.inference_mode(False), torch.no_grad(), self.mode, meter:
            for node in graph.nodes:
                meter.start(node)
                try:
                    value = self.node(root, node, feed, env, meter)
                except VerifyError:
                    raise
                except Exception as error:
                    raise VerifyError(_failure(node, env, error)) from error
                env[node] = node.meta["val"] = value
                meter.memory.hold(node, value)
                cost = meter.cost
                if node.op == "call_module":
                    cost += self.stored(root.get_submodule(str(node.target)))
                result.nodes[node] = result.nodes[node] + cost if node in result.nodes else cost
                result.total += cost
                for dead in dying.get(node, ()):
                    meter.memory.let_go(dead)
                    del env[dead]

    def node(
        self,
        root: nn.Module,
        node: Node,
        feed: Iterator[Any],
        env: dict[Node, Any],
        meter: _Meter,
    ) -> Any:
        if node.op == "placeholder":
            return self.input(node, feed, meter)
        if node.op == "get_attr":
            return self.attribute(root, str(node.target))

        def load(arg: object) -> Any:
            return env[arg] if isinstance(arg, Node) else arg

        args, kwargs = map_aggregate(node.args, load), map_aggregate(node.kwargs, load)
        assert isinstance(args, tuple)
        assert isinstance(kwargs, dict)
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            return self.shadow(root.get_submodule(str(node.target)))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def input(self, node: Node, feed: Iterator[Any], meter: _Meter) -> Any:
        try:
            value = next(feed)
        except StopIteration:
            if node.args:
                return node.args[0]
            raise VerifyError(
                f"the graph's input {str(node.target)!r} got no value: give one input for each "
                f"placeholder, in order"
            ) from None

        def fake(leaf: object) -> Any:
            if isinstance(leaf, nn.Parameter):
                return self.weight(leaf)
            if isinstance(leaf, Tensor):
                copy = self.copy(leaf)
                meter.memory.pin(copy)
                return copy
            return _number(leaf)

        return map_aggregate(value, fake)

    def attribute(self, root: nn.Module, target: str) -> Any:
        owner, _, name = target.rpartition(".")
        value = getattr(root.get_submodule(owner), name)
        if isinstance(value, Tensor):
            return self.weight(value)
        return self.shadow(value) if isinstance(value, nn.Module) else value

    def stored(self, module: nn.Module) -> Cost:
        if id(module) not in self.parameters:
            self.kept.append(module)
            self.parameters[id(module)] = storage_cost(module)
        return self.parameters[id(module)]

    def weight(self, tensor: Tensor) -> Tensor:
        """The fake of a parameter, a buffer or a constant; its storage is no activation."""
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.mode:
            return tensor
        if isinstance(tensor, FakeTensor):
            fake = self.copy(tensor)
        else:
            fake = self.convert(tensor)
        if (key := _storage_key(fake)) is not None:
            self.weights.add(key)
            self.kept.append(fake)
        return fake

    def convert(self, tensor: Tensor) -> Tensor:
        with self.unmetered():
            return self.mode.from_tensor(tensor.detach(), static_shapes=True)

    @contextmanager
    def unmetered(self) -> Iterator[None]:
        """While this object itself makes tensors, which the model does not."""
        paused, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = paused

    def copy(self, tensor: Tensor) -> Tensor:
        """A fake of the same shape, strides, dtype and device, in a storage of its own."""
        if id(tensor) not in self.copies:
            self.kept.append(tensor)
            if tensor.layout is torch.strided:
                shape = [_number(s) for s in tensor.shape]
                stride = [_number(s) for s in tensor.stride()]
                with self.unmetered():
                    self.copies[id(tensor)] = torch.empty_strided(
                        shape, stride, dtype=tensor.dtype, device=tensor.device
                    )
            else:
                self.copies[id(tensor)] = self.convert(tensor)
        return self.copies[id(tensor)]

    def shadow(self, module: nn.Module) -> nn.Module:
        """The module over fake tensors: what its forward assigns stays in the shadow."""
        if isinstance(module, torch.jit.ScriptModule):
            return module
        if module not in self.shadows:
            twin: nn.Module = object.__new__(type(module))
            self.shadows[module] = twin
            state = twin.__dict__
            state.update(module.__dict__)
            for name, value in module.__dict__.items():
                if isinstance(value, Tensor) and value.layout is torch.strided:
                    state[name] = self.weight(value)
            for name in ("_parameters", "_buffers"):
                tensors = module.__dict__[name]
                state[name] = {k: None if t is None else self.weight(t) for k, t in tensors.items()}
            children = module.__dict__["_modules"]
            state["_modules"] = {
                k: None if m is None else self.shadow(m) for k, m in children.items()
            }
            for name in _HOOKS:
                state[name] = {}
            if self.training is not None:
                state["training"] = self.training
        return self.shadows[module]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Memory:
    """Which storages are alive: a value of the graph until its last user, a temporary inside a
    node as long as anything holds it."""

    def __init__(self, weights: set[int]) -> None:
        self.weights = weights
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.refs: dict[int, ReferenceType[torch.UntypedStorage]] = {}
        self.holders: Counter[int] = Counter()
        self.held: dict[Node, set[int]] = {}

    def allocate(self, tensor: Tensor) -> None:
        key = _storage_key(tensor)
        if key is None or key in self.sizes or key in self.weights:
            return
        storage = tensor.untyped_storage()
        self.sizes[key] = storage.nbytes()
        self.live += self.sizes[key]
        self.peak = max(self.peak, self.live)
        self.refs[key] = ref(storage, lambda _: self.release(key))

    def release(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)
        self.refs.pop(key, None)

    def pin(self, tensor: Tensor) -> None:
        """Counts an input: its caller holds it to the end."""
        self.allocate(tensor)
        if (key := _storage_key(tensor)) is not None:
            self.holders[key] += 1

    def hold(self, node: Node, value: object) -> None:
        keys = {_storage_key(t) for t in _tensors(value)}
        self.held[node] = {k for k in keys if k is not None and k in self.sizes}
        self.holders.update(self.held[node])

    def let_go(self, node: Node) -> None:
        for key in self.held.pop(node):
            self.holders[key] -= 1
            if not self.holders[key]:
                self.release(key)


class _Meter(TorchDispatchMode):
    """Prices every op that PyTorch dispatches while a node runs."""

    supports_higher_order_operators = True

    def __init__(self, run: _Run, result: GraphCost) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run, self.result = run, result
        self.memory = _Memory(run.weights)
        self.node: Node | None = None
        self.flops = self.macs = self.bytes_moved = self.launches = 0

    def start(self, node: Node) -> None:
        self.node = node
        self.flops = self.macs = self.bytes_moved = self.launches = 0
        self.memory.peak = self.memory.live

    @property
    def cost(self) -> Cost:
        """Of the current node so far."""
        return Cost(
            macs=self.macs,
            flops=self.flops,
            bytes_moved=self.bytes_moved,
            activation_bytes=self.memory.peak,
            launches=self.launches,
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return NotImplemented
        if self.run.paused:
            return func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            return self.higher_order(func, args, kwargs)
        if _decomposes(func):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        args, kwargs = map_aggregate((args, kwargs), self.fake)
        try:
            out = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            out = self.data_dependent(func, args, kwargs)
        self.count(func, args, kwargs, out)
        return out

    def fake(self, leaf: object) -> Any:
        if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
            return self.run.weight(leaf)
        return leaf

    def count(self, func: OpOverload, args: Any, kwargs: Any, out: object) -> None:
        read, written = _tensors((args, list(kwargs.values()))), _tensors(out)
        mutates = func._schema.is_mutable
        if not mutates:
            sources = {_storage_key(t) for t in read}
            if written and all(_storage_key(t) in sources for t in written):
                return  # a view, or an op that returned its input
        for tensor in written:
            self.memory.allocate(tensor)
        if not written and not mutates and torch.Tag.data_dependent_output not in func.tags:
            return  # an assertion, a size
        self.count_flops(func, args, kwargs, out)
        kind = traffic(func)
        if kind is Traffic.NONE:
            return
        self.launches += 1
        self.bytes_moved += _traffic_bytes(func, kind, read, written, args, kwargs)

    def count_flops(self, func: OpOverload, args: Any, kwargs: Any, out: object) -> None:
        formula, by_torch, multiplies = flop_formula(func)
        if formula is None:
            if not is_free(func):
                self.unpriced(func)
            return
        flops = int(formula(*args, **kwargs, out_val=out))
        self.flops += flops
        self.macs += flops // 2 if multiplies else 0
        if by_torch:
            self.result.counted_by_torch += flops

    def unpriced(self, func: OpOverload | HigherOrderOperator) -> None:
        name = func._schema.name if isinstance(func, OpOverload) else func._name
        self.error(f"no cost formula for {name.removeprefix('aten::')}", "totals are lower bounds")

    def error(self, what: str, consequence: str) -> None:
        assert self.node is not None
        line = user_line(self.node) or f"node %{self.node.name}"
        self.result.errors.append(f"{what} ({line}): {consequence}")

    def higher_order(self, func: HigherOrderOperator, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Runs the function inside an operator that wraps one; of `cond`, the dearer branch."""
        name: str = func._name
        if func in flop_registry:
            out = func(*args, **kwargs)
            flops = int(flop_registry[func](*args, **kwargs, out_val=out))
            self.flops, self.macs = self.flops + flops, self.macs + flops // 2
            self.result.counted_by_torch += flops
            self.launches += 1
            tensors = _tensors((args, list(kwargs.values()), out))
            self.bytes_moved += sum(map(_touched, tensors))
            for tensor in _tensors(out):
                self.memory.allocate(tensor)
            return out
        if name == "cond":
            _, if_true, if_false, operands = args
            before = self.snapshot()
            with self:
                out = if_false(*operands)
            other = self.snapshot()
            self.restore(before)
            with self:
                out = if_true(*operands)
            if other > self.snapshot():
                self.restore(other)
            return out
        inner = [a for a in args if isinstance(a, nn.Module)]
        if name.startswith("wrap") and len(inner) == 1:
            at = next(i for i, a in enumerate(args) if a is inner[0])
            with self:
                return inner[0](*args[at + 1 :])
        self.unpriced(func)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self.memory.allocate(tensor)
        return out

    def snapshot(self) -> tuple[int, int, int, int, int]:
        by_torch = self.result.counted_by_torch
        return self.flops, self.macs, self.bytes_moved, self.launches, by_torch

    def restore(self, counts: tuple[int, int, int, int, int]) -> None:
        self.flops, self.macs, self.bytes_moved, self.launches, by_torch = counts
        self.result.counted_by_torch = by_torch

    def data_dependent(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """An op whose result's size or value only the data tells: its largest size, or 1."""
        name = func._schema.name.removeprefix("aten::")
        x = args[0]
        if name in {"_local_scalar_dense", "equal", "is_nonzero"}:
            self.error(f"the value of {name} depends on the data", "priced as if it were 1")
            dtype = x.dtype
            one = 1.0 if dtype.is_floating_point else True if dtype is torch.bool else 1
            return one if name == "_local_scalar_dense" else True
        self.error(f"the size of {name} depends on the data", "priced at its largest")
        if name == "nonzero":
            return x.new_empty((x.numel(), x.dim()), dtype=torch.int64)
        if name == "masked_select":
            return x.new_empty((torch.logical_or(x, args[1]).numel(),))
        if name == "index":
            indices: list[Tensor | None] = []
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    rows = index.new_empty((index.numel(),), dtype=torch.int64)
                    indices += [rows] * index.dim()
                else:
                    indices.append(index)
            return func(x, indices)
        raise


@cache
def _decomposes(func: OpOverload) -> bool:
    """Whether PyTorch itself defines the op by other ops (seen undecomposed in inference mode)."""
    implicit = torch._C.DispatchKey.CompositeImplicitAutograd
    name: str = func.name()
    return implicit in func.py_kernels or bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, implicit)
    )


# Questions about a tensor, which no kernel answers; `NotImplemented` leaves them to PyTorch.
_METADATA = frozenset(
    {
        aten.sym_is_contiguous.default,
        aten.is_contiguous.default,
        aten.is_contiguous.memory_format,
        aten.is_strides_like_format.default,
        aten.is_non_overlapping_and_dense.default,
        aten.size.default,
        aten.sym_size.default,
        aten.stride.default,
        aten.sym_stride.default,
        aten.storage_offset.default,
        aten.sym_storage_offset.default,
        aten.numel.default,
        aten.sym_numel.default,
        aten.dim.default,
        torch.ops.prim.layout.default,
        torch.ops.prim.device.default,
    }
)


def _traffic_bytes(
    func: OpOverload,
    kind: Traffic,
    read: list[Tensor],
    written: list[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> int:
    """Bytes read plus bytes written by one op; a tensor that appears twice moves once."""
    sources = {id(t): t for t in read}
    targets = {id(t): t for t in written}
    for i, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            targets |= {id(t): t for t in _tensors(value)}
            if kind is Traffic.WRITE or kind is Traffic.SCATTER or argument.is_out:
                for t in _tensors(value):
                    sources.pop(id(t), None)
    bytes_out = sum(map(_touched, targets.values()))
    if kind is Traffic.GATHER and read:
        table = sources.pop(id(read[0]))
        return sum(map(_touched, sources.values())) + min(_touched(table), bytes_out) + bytes_out
    bytes_in = sum(map(_touched, sources.values()))
    return bytes_in + (min(bytes_in, bytes_out) if kind is Traffic.SCATTER else bytes_out)


def _touched(tensor: Tensor) -> int:
    """Bytes behind a tensor: a broadcast dimension (stride 0) holds one element."""
    if tensor.layout is not torch.strided:
        return tensor.numel() * tensor.element_size()
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or not size:
            count *= size
    return count


def _tensors(value: object) -> list[Tensor]:
    """The tensors in a nest of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [t for item in value for t in _tensors(item)]


def _storage_key(tensor: Tensor) -> int | None:
    """The identity of a tensor's storage while that is alive; None where it has no single one."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _number(value: Any) -> Any:
    """A symbolic number as the number it stood for when it was traced."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    hint = value.node.hint
    if hint is None:
        raise VerifyError(
            f"an input's size {value} is not known: give inputs whose sizes are numbers"
        )
    return hint


def _last_uses(graph: Graph) -> dict[Node, list[Node]]:
    """node → the values that nothing after it reads."""
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    dying: dict[Node, list[Node]] = {}
    for node, end in last.items():
        dying.setdefault(end, []).append(node)
    return dying


def _failure(node: Node, env: dict[Node, Any], error: Exception) -> str:
    given = [_shape(env[n]) for n in node.all_input_nodes if n in env]
    line = user_line(node)
    return (
        f"node %{node.name} ({node.op} {node.target}) cannot run on ({', '.join(given)}): "
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        + (f"\n  at {line}" if line else "")
        + "\nThe graph, its modules and the inputs do not fit together: check the shape, dtype and "
        "device of the inputs, and of any layer that was put in by hand."
    )


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{','.join(map(str, value.shape))}] on {value.device}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_shape, value))})"
    return repr(value) if isinstance(value, (int, float, str)) else type(value).__name__
