"""What a graph costs, read off one run with FakeTensors: shapes flow, nothing is computed.

`propagate` runs a graph node by node under a dispatch mode (`rewriter.cost.meter`) that sees every
op of PyTorch's dispatcher, composite functions and modules taken apart, and prices each: FLOPs by
`rewriter.cost.formulas`, bytes and lifetimes of storages by `rewriter.cost.memory`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
)
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_aggregate

from rewriter.cost.cost import Cost, storage_cost
from rewriter.cost.fakes import Results, is_plain, new_fake
from rewriter.cost.memory import storage_key
from rewriter.cost.meter import GraphCost, Meter, Tally
from rewriter.cost.symbolic import Size, condition, largest, number
from rewriter.cost.work import Work, grouped
from rewriter.errors import VerifyError
from rewriter.modules.structure import SYMBOLS
from rewriter.modules.tree import attribute, is_hook_dict
from rewriter.sites import user_line

__all__ = ["Fakes", "GraphCost", "Region", "Run", "model_cost", "propagate", "run_graphs"]

Region = tuple["nn.Module | str", Graph, Sequence[Any]]
"""(module or its dotted name, its graph, the inputs of the graph's placeholders in order)."""


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
    root: nn.Module,
    regions: Iterable[Region | GraphCost],
    *,
    training: bool | None = None,
    fakes: Fakes | None = None,
) -> GraphCost:
    """The cost of a model whose graphs run one after another, once for each region given.

    FLOPs, bytes and launches are Σ over the regions, the activation peak is the largest of theirs,
    and parameters are those of `root`, once. What no region covers (Python islands) costs 0 here.

    Args:
        root: the whole model.
        regions: (module or its dotted name, graph, inputs), or what one was found to cost before;
            repeat one that runs repeatedly.
        training: as in `propagate`.
        fakes: of the weights, to share with other runs over the same model.

    Raises:
        VerifyError: as `propagate`.
    """
    return run_graphs(Run(training, fakes=fakes), root, regions)


def run_graphs(run: Run, root: nn.Module, regions: Iterable[Region | GraphCost]) -> GraphCost:
    """`model_cost`, run by `run`."""
    result = GraphCost()
    lifted: list[Tensor] = []
    for region in regions:
        if isinstance(region, GraphCost):
            result.add(region)
            continue
        owner, graph, inputs = region
        module = root.get_submodule(owner) if isinstance(owner, str) else owner
        run.graph(module, graph, inputs, result)
        lifted += [t for t in inputs if isinstance(t, nn.Parameter)]
    stored = storage_cost(root, *lifted)
    result.total = replace(result.total, work=grouped(result.total.work))
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


class Fakes:
    """The fakes of a model's weights in one FakeTensorMode; making them is half of a short run."""

    def __init__(self, environment: ShapeEnv | None = None) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=environment)
        self.known: dict[int, tuple[Tensor, Tensor]] = {}
        self.results = Results(self.mode)

    def of(self, tensor: Tensor) -> Tensor:
        """The fake of a real tensor, the same one every time."""
        if id(tensor) in self.known:
            fake = self.known[id(tensor)][1]
            if fake.shape == tensor.shape and fake.dtype == tensor.dtype:
                return fake
        if is_plain(tensor):
            form = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
            fake = new_fake(self.mode, *form)
        else:
            fake = self.mode.from_tensor(tensor.detach(), static_shapes=True)
        self.known[id(tensor)] = tensor, fake  # holds the tensor, so that its id stays its own
        return fake


class Run:
    """One FakeTensorMode for all graphs of a model: each parameter becomes fake once.

    Args:
        training: None leaves each module's own flag; else the flag for all modules.
        sizes: per input tensor its sizes, a name for each that shall stay open; None prices at
            the numbers that the inputs have.
        around: sizes of the open ones that decide where the code does; the inputs' where left out.
        fakes: of weights, shared with other runs; not with open sizes.
    """

    def __init__(
        self,
        training: bool | None,
        sizes: Sequence[Sequence[int | str]] | None = None,
        around: Mapping[str, int] | None = None,
        fakes: Fakes | None = None,
    ) -> None:
        self.training, self.open, self.around = training, sizes, around or {}
        if sizes is not None:
            fakes = Fakes(
                ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
            )
        self.fakes = fakes or Fakes()
        self.mode = self.fakes.mode
        self.symbols: dict[str, Any] = {}
        self.example: dict[str, int] = {}
        self.names: dict[str, str] = {}
        self.parameters: dict[int, Cost] = {}
        self.shadows: dict[nn.Module, nn.Module] = {}
        self.copies: dict[int, Tensor] = {}
        self.paused = False
        self.kept: list[object] = []  # whose id is a key above: keeps the id from being reused
        self.weights: set[int] = set()  # storages that are no activations

    def graph(
        self, root: nn.Module, graph: Graph, inputs: Sequence[Any], result: GraphCost
    ) -> None:
        meter = Meter(self, result)
        feed = iter(inputs if self.open is None else self.opened(inputs))
        env: dict[Node, Any] = {}
        dying = last_uses(graph)
        total, before = Tally(), result.total
        peaks: dict[Size, None] = {}
        with torch.inference_mode(False), torch.no_grad(), self.mode, meter:
            for node in graph.nodes:
                meter.start(node)
                value = self.evaluated(root, node, feed, env, meter)
                if node.op.startswith("call_") and not meter.now.work:
                    meter.now.work.append(Work(node.op, "view", ""))  # still takes the host's time
                env[node] = value
                if self.open is None:
                    node.meta["val"] = value
                meter.memory.hold(node, value)
                peaks.update(dict.fromkeys(meter.memory.peaks))
                cost = meter.cost
                total.add(meter.now)
                result.timeline.append((label(node), cost.activation_bytes))
                if node.op == "call_module":
                    cost += self.stored(root.get_submodule(str(node.target)))
                result.nodes[node] = result.nodes[node] + cost if node in result.nodes else cost
                for dead in dying.get(node, ()):
                    meter.memory.let_go(dead)
                    del env[dead]
        by_torch: Any = total.by_torch
        result.counted_by_torch += by_torch
        result.total = before + total.cost(largest(peaks, self.example))

    def evaluated(
        self,
        root: nn.Module,
        node: Node,
        feed: Iterator[Any],
        env: dict[Node, Any],
        meter: Meter,
    ) -> Any:
        """`node`, or a VerifyError that names it."""
        try:
            return self.node(root, node, feed, env, meter)
        except VerifyError:
            raise
        except Exception as error:
            raise VerifyError(failure(node, env, error)) from error

    def node(
        self,
        root: nn.Module,
        node: Node,
        feed: Iterator[Any],
        env: dict[Node, Any],
        meter: Meter,
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

    def input(self, node: Node, feed: Iterator[Any], meter: Meter) -> Any:
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
            if isinstance(leaf, FakeTensor) and leaf.fake_mode is self.mode:
                meter.memory.pin(leaf)
                return leaf
            if isinstance(leaf, Tensor):
                copy = self.copy(leaf)
                meter.memory.pin(copy)
                return copy
            return _number(leaf)

        return map_aggregate(value, fake)

    def fake_result(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an op on fake tensors."""
        return self.fakes.results.of(func, args, kwargs)

    def number(self, value: Any) -> Size:
        """A size as torch gives it, as a number or a formula."""
        return number(value, self.names)

    def opened(self, inputs: Sequence[Any]) -> list[Any]:
        """The flat inputs with the open sizes as symbols."""
        assert self.open is not None
        result = []
        known: dict[int, Tensor] = {}  # a tensor may be given twice
        for value, sizes in zip(inputs, self.open, strict=True):
            assert isinstance(value, Tensor)
            if id(value) in known:
                result.append(known[id(value)])
                continue
            shape = [self.symbol(s, n) if isinstance(s, str) else n
                     for s, n in zip(sizes, value.shape, strict=True)]  # fmt: skip
            order = sorted(range(value.dim()), key=lambda d: (value.stride(d), -d))
            strides: list[Any] = [1] * value.dim()
            for inner, outer in zip(order, order[1:], strict=False):
                strides[outer] = strides[inner] * shape[inner]
            with self.mode:
                fake = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
            known[id(value)] = fake
            result.append(fake)
        self.kept += result  # the caller holds them to the end
        return result

    def symbol(self, name: str, size: int) -> Any:
        """A symbolic size. It stands for sizes of at least 2: what holds for 1 alone (a copy that
        is none) would not hold for the others."""
        if name not in self.symbols:
            environment = self.mode.shape_env
            assert environment is not None
            source = ConstantSource(name)
            example = self.example[name] = self.around.get(name, size)
            example = example if example > 1 else 3 + len(self.symbols)
            symbol = environment.create_symbol(example, source, DimDynamic.DYNAMIC)
            self.symbols[name] = environment.create_symintnode(symbol, hint=example, source=source)
            self.names[str(symbol)] = name
        return self.symbols[name]

    def conditions(self) -> tuple[str, ...]:
        """What the open sizes must fulfil for the same code to run, and the same formulas to
        hold."""
        environment = self.mode.shape_env
        found = () if environment is None else (g.expr for g in environment.guards)
        return tuple(dict.fromkeys(c for c in (condition(e, self.names) for e in found) if c))

    def attribute(self, root: nn.Module, target: str) -> Any:
        value = attribute(root, target)
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
        if (key := storage_key(fake)) is not None:
            self.weights.add(key)
            self.kept.append(fake)
        return fake

    def convert(self, tensor: Tensor) -> Tensor:
        with self.unmetered():
            return self.fakes.of(tensor)

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
                elif isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
                    state[name] = [self.weight(v) if isinstance(v, Tensor) else v for v in value]
            for name in ("_parameters", "_buffers"):
                tensors = module.__dict__[name]
                state[name] = {k: None if t is None else self.weight(t) for k, t in tensors.items()}
            children = module.__dict__["_modules"]
            state["_modules"] = {
                k: None if m is None else self.shadow(m) for k, m in children.items()
            }
            state.update({name: {} for name in state if is_hook_dict(name)})
            if self.training is not None:
                state["training"] = self.training
        return self.shadows[module]


def _number(value: Any) -> Any:
    """A symbolic number as the number it stood for when it was traced."""
    if not isinstance(value, SYMBOLS):
        return value
    hint = value.node.hint
    if hint is None:
        raise VerifyError(
            f"an input's size {value} is not known: give inputs whose sizes are numbers"
        )
    return hint


def last_uses(graph: Graph) -> dict[Node, list[Node]]:
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


def label(node: Node) -> str:
    """What a node is called in a timeline: its module and, where it is a function, its name."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    owner = next(reversed(stack.values()))[0] if stack else ""
    return f"{owner}: {node.name}" if owner else node.name


def failure(node: Node, env: dict[Node, Any], error: Exception) -> str:
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
