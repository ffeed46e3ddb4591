"""The ledgers of compiled graphs: which `torch.compile` they belong to, and what was found.

A model whose code breaks is several graphs, and one that is called with new types or sizes is
compiled again: each graph has a ledger of its own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from rewriter.compiler.user_code import Frame, backend_of, whose
from rewriter.cost import Cost
from rewriter.errors import RewriteError
from rewriter.report import Report, Step

__all__ = ["Graph", "Sketch", "last_reports", "record", "report_of"]


@dataclass
class Graph:
    """One compiled graph.

    Args:
        frame: whose code it is.
        price: makes the ledger of what was compiled, when it is first asked for.
        notes: what the ledger is to say beside that; it may grow.
        steps: that come after the passes (memory plans, the inner compiler's run), given the cost
            before.
        beside: the same code, for weights that the passes took in another way.
    """

    frame: Frame
    price: Callable[[], Report]
    notes: list[str] = field(default_factory=list)
    steps: list[Callable[[Cost], Step]] = field(default_factory=list)
    beside: list[Graph] = field(default_factory=list)
    _report: Report | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def report(self) -> Report:
        """The ledger, as complete as it is by now."""
        with self._lock:
            if self._report is None:
                self._report = self.price()
            report = self._report
        report.capture.notes += [n for n in self.notes if n not in report.capture.notes]
        with self._lock:
            while self.steps:
                report.steps.append(self.steps.pop(0)(report.after))
        return report


@dataclass
class _Compiled:
    """What was compiled for one `torch.compile` call.

    Args:
        asked: its backend object, weakly.
        graphs: in the order of their compilation.
    """

    asked: weakref.ref[Any]
    graphs: list[Graph] = field(default_factory=list)


_lock = threading.Lock()
_compiled: dict[int, _Compiled] = {}
_last: list[Graph] = []


def record(graph: Graph, asked: Any) -> None:
    """Files a graph under the backend object of the `torch.compile` call that it belongs to."""
    with _lock:
        global _last
        own: list[Graph] = []
        if asked is not None:
            if id(asked) not in _compiled:
                _compiled[id(asked)] = _Compiled(weakref.ref(asked))
                weakref.finalize(asked, _compiled.pop, id(asked), None)
            own = _compiled[id(asked)].graphs
        if graph.frame.compilation:
            graph.notes.append(
                f"compilation {graph.frame.compilation + 1} of this code: it was called with other "
                "types, sizes or modes before"
            )
        if graph.frame.broke:
            graph.notes.append(f"the graph ends where Python goes on: {graph.frame.broke}")
        own.append(graph)
        _last = own


def last_reports() -> list[Report]:
    """The ledgers of the graphs of what was compiled last, in the order of their compilation.

    Those of one `torch.compile` call; of a `backend` that was called by hand, its last graph.
    """
    return _reports(_last)


def report_of(compiled: Callable[..., Any]) -> list[Report]:
    """The ledgers of the graphs behind what `torch.compile(..., backend="rewriter")` returned.

    One for each graph that was compiled so far: several where the code breaks, or was compiled
    again for other sizes; `report.capture.notes` says which. None before the first call.

    Args:
        compiled: a module or function from `torch.compile`, or a module after `module.compile()`.

    Raises:
        RewriteError: it was not compiled, or by another backend.
    """
    asked = backend_of(compiled)
    if asked is None:
        raise RewriteError("report_of needs what torch.compile(..., backend='rewriter') returned")
    name = getattr(asked, "compiler_name", "")
    if name != "rewriter":
        raise RewriteError(f"report_of: this was compiled by {name or asked!r}, not by rewriter")
    with _lock:
        own = _compiled.get(id(asked))
        # Dynamo gives code to every call of torch.compile with equal options that it fits
        others = [c for c in _compiled.values() if c is not own and c.asked() == asked]
    shared = [g for c in others for g in c.graphs if g.frame.of == whose(compiled)]
    return _reports([*(own.graphs if own else ()), *shared])


def _reports(graphs: Sequence[Graph]) -> list[Report]:
    return [g.report() for graph in list(graphs) for g in (graph, *graph.beside)]


class Sketch:
    """A graph and the look of its inputs, without holding them: what pricing needs later."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> None:
        graph = fx.Graph()
        environment: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(module.graph, environment)
        graph.output(output)
        for node, copied in environment.items():
            if hasattr(node, "_dynamo_source"):
                copied._dynamo_source = node._dynamo_source
        self.module = fx.GraphModule(module, graph)
        self.inputs = [_look(x) for x in inputs]

    def examples(self) -> list[Any]:
        """Inputs of the same look; parameters have their memory, as long as they live."""
        return [x() for x in self.inputs]


def _look(value: Any) -> Callable[[], Any]:
    if isinstance(value, torch.SymInt):
        size = value.node.hint
        return lambda: size
    if not isinstance(value, Tensor):
        return lambda: value
    shape = [_hint(n) for n in value.shape]
    stride = [_hint(n) for n in value.stride()]
    dtype, device = value.dtype, value.device
    trains, offset = value.requires_grad, _hint(value.storage_offset())
    # no weakref: torch.utils.swap_tensors refuses a tensor that has one
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
    held = isinstance(value, nn.Parameter) and not wrapped
    memory = StorageWeakRef(value.untyped_storage()) if held else None

    def made() -> Tensor:
        live = None if memory is None else UntypedStorage._new_with_weak_ptr(memory.cdata)
        if live is None:
            new = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        else:
            new = torch.empty(0, dtype=dtype, device=device).set_(live, offset, shape, stride)
        return nn.Parameter(new, trains) if held else new

    return made


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
