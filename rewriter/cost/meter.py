"""`Meter`: prices every op that PyTorch dispatches while a node of a graph runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rewriter.cost.cost import Cost
from rewriter.cost.formulas import Traffic, flop_formula, is_free, traffic
from rewriter.cost.memory import Memory, storage_key, tensors_in, touched, traffic_bytes
from rewriter.cost.symbolic import Size, largest, least
from rewriter.cost.work import Work, dtype_of, grouped, kind_of, on_matrix_unit, work_of
from rewriter.kernels import ops
from rewriter.sites import user_line

__all__ = ["GraphCost", "Meter", "Tally"]

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
        counted_by_torch: what `FlopCounterMode` counts; the part of `total.flops` that it knows,
            but for backward passes of grouped convolutions, which it counts too high.
        timeline: (what runs, bytes of activations alive at its worst moment), in order.
    """

    nodes: dict[Node, Cost] = field(default_factory=dict)
    total: Cost = field(default_factory=Cost)
    errors: list[str] = field(default_factory=list)
    counted_by_torch: int = 0
    timeline: list[tuple[str, int]] = field(default_factory=list)

    def add(self, other: GraphCost) -> None:
        """What runs after this; the parameters of both are left to the caller to sum."""
        for node, cost in other.nodes.items():
            self.nodes[node] = self.nodes[node] + cost if node in self.nodes else cost
        self.total = self.total + other.total
        self.errors += other.errors
        self.counted_by_torch += other.counted_by_torch
        self.timeline += other.timeline


@dataclass
class Tally:
    """What has run so far, of one node or of one pass over a graph."""

    flops: Size = 0
    macs: Size = 0
    bytes_read: Size = 0
    bytes_written: Size = 0
    launches: int = 0
    by_torch: Size = 0
    work: list[Work] = field(default_factory=list)

    @property
    def bytes_moved(self) -> Size:
        return self.bytes_read + self.bytes_written

    def add(self, other: Tally) -> None:
        for name in ("flops", "macs", "bytes_read", "bytes_written", "launches", "by_torch"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.work += other.work

    def cost(self, activation_bytes: Size) -> Cost:
        numbers: dict[str, Any] = {
            "macs": self.macs,
            "flops": self.flops,
            "bytes_moved": self.bytes_moved,
            "bytes_written": self.bytes_written,
            "activation_bytes": activation_bytes,
        }
        return Cost(launches=self.launches, work=grouped(self.work), **numbers)


class Run(Protocol):
    """What a meter asks of whoever runs the graph.

    Args:
        paused: whether tensors are being made that the model itself does not make.
        weights: storages that are no activations.
    """

    paused: bool
    weights: set[int]

    def number(self, value: Any) -> Size:
        """A size as torch gives it, as a number or a formula."""
        ...

    def fake_result(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an op on fake tensors."""
        ...

    def weight(self, tensor: Tensor) -> Tensor:
        """The fake of a parameter, a buffer or a constant."""
        ...


class Meter(TorchDispatchMode):
    """Prices every op that PyTorch dispatches while a node runs."""

    supports_higher_order_operators = True

    def __init__(self, run: Run, result: GraphCost) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run, self.result = run, result
        self.memory = Memory(run.weights, run.number)
        self.node: Node | None = None
        self.now = Tally()
        self.backward = False

    def start(self, node: Node) -> None:
        self.node = node
        self.now = Tally()
        self.memory.start()

    @property
    def cost(self) -> Cost:
        """Of the current node so far."""
        return self.now.cost(self.memory.peak)

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
            out = self.run.fake_result(func, args, kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            out = self.data_dependent(func, args, kwargs)
        self.count(func, args, kwargs, out)
        return out

    def fake(self, leaf: object) -> Any:
        if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
            return self.run.weight(leaf)
        return leaf

    def count(self, func: OpOverload, args: Any, kwargs: Any, out: object) -> None:
        read, written = tensors_in((args, list(kwargs.values()))), tensors_in(out)
        mutates = func._schema.is_mutable
        if not mutates:
            sources = {storage_key(t) for t in read}
            if written and all(storage_key(t) in sources for t in written):
                return  # a view, or an op that returned its input
        for tensor in written:
            self.memory.allocate(tensor)
        if not written and not mutates and torch.Tag.data_dependent_output not in func.tags:
            return  # an assertion, a size
        flops = self.count_flops(func, args, kwargs, out)
        kind = traffic(func)
        if kind is Traffic.NONE:
            return
        number, now = self.run.number, self.now
        bytes_read, bytes_written = traffic_bytes(func, kind, read, written, args, kwargs, number)
        now.launches += 1
        now.bytes_read += bytes_read
        now.bytes_written += bytes_written
        weights = {id(t): t for t in read if storage_key(t) in self.run.weights}
        held: Any = least(sum((touched(t, number) for t in weights.values()), 0), bytes_read)
        figures = flops, bytes_read, bytes_written
        work = work_of(func, args, kwargs, read, written, figures, held, number, self.backward)
        now.work.append(work)

    def count_flops(self, func: OpOverload, args: Any, kwargs: Any, out: object) -> Size:
        formula, by_torch, multiplies = flop_formula(func)
        if formula is None:
            if not is_free(func):
                self.unpriced(func)
            return 0
        flops = self.run.number(formula(*args, **kwargs, out_val=out))
        if unrecorded(func, flops):
            name = func._schema.name
            self.error(f"{name} multiplies and has no record", f"timed as a vector op: {REMEDY}")
        self.now.flops += flops
        self.now.macs += flops // 2 if multiplies else 0
        if by_torch:
            theirs = flop_registry[func._overloadpacket]
            same = theirs is formula
            counted = flops if same else self.run.number(theirs(*args, **kwargs, out_val=out))
            self.now.by_torch += counted
        return flops

    def unpriced(self, func: OpOverload | HigherOrderOperator) -> None:
        name = func._schema.name if isinstance(func, OpOverload) else func._name
        what = f"no cost formula for {name.removeprefix('aten::')}"
        foreign = "::" in name and not name.startswith("aten::")
        self.error(what, f"{REMEDY}; totals are lower bounds" if foreign else _BOUND)

    def error(self, what: str, consequence: str) -> None:
        assert self.node is not None
        line = user_line(self.node) or f"node %{self.node.name}"
        self.result.errors.append(f"{what} ({line}): {consequence}")

    def higher_order(self, func: HigherOrderOperator, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Runs the function inside an operator that wraps one; of `cond`, the dearer branch."""
        name: str = func._name
        if func in flop_registry:
            out = func(*args, **kwargs)
            number, now = self.run.number, self.now
            flops = number(flop_registry[func](*args, **kwargs, out_val=out))
            read, written = tensors_in((args, list(kwargs.values()))), tensors_in(out)
            for tensor in written:
                self.memory.allocate(tensor)
            bytes_read: Any = sum((touched(t, number) for t in read), 0)
            bytes_written: Any = sum((touched(t, number) for t in written), 0)
            now.flops, now.macs = now.flops + flops, now.macs + flops // 2
            now.by_torch += flops
            now.launches += 1
            now.bytes_read += bytes_read
            now.bytes_written += bytes_written
            dtype = dtype_of(read, written)
            priced: Any = flops
            work = Work(name, "attention", dtype, priced, bytes_read, bytes_written)
            now.work.append(replace(work, backward=self.backward))
            return out
        if name == "cond":
            _, if_true, if_false, operands = args
            before, other, self.now = self.now, Tally(), Tally()
            with self:
                out = if_false(*operands)
            other, self.now = self.now, other
            with self:
                out = if_true(*operands)
            if largest((other.flops, self.now.flops)) == other.flops != self.now.flops:
                self.now = other
            before.add(self.now)
            self.now = before
            return out
        inner = [a for a in args if isinstance(a, nn.Module)]
        if name.startswith("wrap") and len(inner) == 1:
            at = next(i for i, a in enumerate(args) if a is inner[0])
            with self:
                return inner[0](*args[at + 1 :])
        self.unpriced(func)
        out = func(*args, **kwargs)
        for tensor in tensors_in(out):
            self.memory.allocate(tensor)
        return out

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


_BOUND = "totals are lower bounds"
REMEDY = "register its record with rewriter.kernels.ops.register"


def unrecorded(func: OpOverload, flops: Size) -> bool:
    """Whether an op multiplies, and nothing says on which unit: neither PyTorch nor a record."""
    if func.namespace == "aten" or (isinstance(flops, int) and not flops):
        return False
    return ops.find(func._schema.name) is None and not on_matrix_unit(kind_of(func))


@cache
def _decomposes(func: OpOverload) -> bool:
    """Whether PyTorch itself defines the op by other ops (seen undecomposed in inference mode), and
    no kernel of its own runs instead (`silu_backward` has both)."""
    implicit = torch._C.DispatchKey.CompositeImplicitAutograd
    name: str = func.name()
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, torch._C.DispatchKey.CPU):
        return False
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
