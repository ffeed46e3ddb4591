"""The first rung of capture: `torch.export` of a module, in eval and in train mode, in normal form.

What the trace takes for granted is either checked at every call (sizes here, by `Dims`; types and
arguments by `Signature`; attributes and hooks by `Watch`) or refused here, with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from rewriter.capture.hosted import Program
from rewriter.capture.reads import Reads, in_torch, recording
from rewriter.capture.rehost import rehost, size_rules
from rewriter.capture.replay import Record, Replayed, in_train_mode, replayed
from rewriter.capture.signature import Call, Dims, Signature
from rewriter.cost import Fakes, GraphCost, model_cost
from rewriter.errors import CaptureError, RewriteError, VerifyError
from rewriter.modules.isolation import kept_numbers
from rewriter.modules.keeping import kept_values
from rewriter.modules.quiet import TRACING, quietly, traced_here_alone
from rewriter.modules.running import (
    difference,
    first_line,
    modes,
    own_copy,
    quiet_run,
    run_flat,
    without_hooks,
)
from rewriter.modules.structure import Structure, Unflattenable, flatten

__all__ = ["TOO_LONG", "TRAIN_IN_PYTHON", "Region", "asked_for_modes", "export_region", "unusual"]

TOO_LONG = "tracing took longer than its time limit"
TRAIN_IN_PYTHON = "train mode runs the original Python forward over the rewritten layers"


@dataclass
class Region:
    """A part of the model that lives in graphs.

    Args:
        prefix: dotted name of the module the graphs live on; "" for the root.
        graphs: per mode (False: eval, True: train).
        outputs: per mode, how flat results become the original output.
        signature: of the captured call; None for symbolic tracing.
        leaves: the flat example inputs; None without them.
        hosted: whether the module runs the graph; a lone leaf inside an island is only described
            by its graph, and is called by Python.
        train_reason: why there is no graph for train mode.
        calls: how often one forward of the model runs it.
        alike: train mode was found to make the same torch calls as eval mode: its graph is a copy.
        priced: what the graph of eval mode costs, as long as it is as it was captured.
        reads: what the traced forward read of the modules and of the objects that they hold.
    """

    prefix: str
    graphs: dict[bool, fx.Graph]
    outputs: dict[bool, Structure | None]
    signature: Signature | None
    leaves: list[Tensor] | None
    hosted: bool = True
    train_reason: str = ""
    calls: int = 1
    alike: bool = False
    priced: GraphCost | None = None
    reads: Reads | None = None
    _made: dict[bool, tuple[Program, list[Any]]] = field(default_factory=dict, repr=False)

    def program(self, training: bool) -> Program:
        """What runs a mode's graph, as that is now: made once while the graph does not change."""
        graph, output = self.graphs[training], self.outputs[training]
        now = [x for n in graph.nodes for x in (n, n.op, n.target, n.args, n.kwargs)]
        made, then = self._made.get(training, (None, []))
        same = len(now) == len(then) and all(map(operator.is_, now, then))
        if made is None or made.graph is not graph or made.output is not output or not same:
            made = Program(graph, output)
            self._made[training] = made, now
        return made


def export_region(
    module: nn.Module, prefix: str, call: Call, seconds: float, fakes: Fakes
) -> Region | str:
    """The region of `module`, or why it cannot be captured whole; `fakes` are of its weights."""
    with recording(module) as reads:
        region = _export_region(module, prefix, call, seconds, fakes)
    if isinstance(region, str):
        return region
    if name := reads.carried:
        return f"its forward reads the attribute {name!r}, which it then sets for the next call"
    region.reads = reads
    return region


def _export_region(
    module: nn.Module, prefix: str, call: Call, seconds: float, fakes: Fakes
) -> Region | str:
    try:
        signature, leaves = Signature.of(type(module).forward.__get__(module), call)
    except Unflattenable as error:
        return str(error)
    if not leaves:
        return "it is called without tensors"
    if reason := next(filter(None, map(unusual, leaves)), ""):
        return reason
    if signature.shared and not _tells_apart(module, signature, leaves):
        signature.shared = None
    deadline = time.thread_time() + seconds
    region = Region(prefix, {}, {}, signature, leaves)
    reason = _export(module, region, False, deadline, fakes, call.grad)
    if reason:
        return reason
    if region.alike:
        _widen(module, region, (False, True))
        return _unseen(module, region, False) or region
    if True in region.graphs:
        signature.dims[True] = signature.dims[False].copy()
    _widen(module, region, (False,))
    if reason := _unseen(module, region, False):
        return reason
    reason = ""
    if True not in region.graphs:
        reason = _export(module, region, True, deadline, fakes, call.grad)
    if not reason:
        _widen(module, region, (True,))
        reason = _unseen(module, region, True)
    if reason:
        region.graphs.pop(True, None)
        region.train_reason = f"{TRAIN_IN_PYTHON}: {reason}"
    return region


def _unseen(module: nn.Module, region: Region, training: bool) -> str:
    """Why a graph that does not serve the example itself, a batch of one, is wrong for the sizes
    that it serves; "" where it is right, or where the example will show it."""
    assert region.signature is not None
    assert region.leaves is not None
    signature, dims = region.signature, region.signature.dims[training]
    if any(p.is_meta for p in module.parameters()):
        return ""  # there are no values to compare
    if dims.difference(region.leaves, signature.names) is None:
        return ""
    leaves = _two_rows(_distinct(region.leaves))
    if dims.difference(leaves, signature.names) is not None:
        return ""
    reason = _disagrees(module, region, leaves, (training,))
    return reason and f"the captured graph does not reproduce the model's outputs: {reason}"


def _disagrees(
    module: nn.Module, region: Region, leaves: list[Tensor], trainings: tuple[bool, ...]
) -> str:
    """How the results of the graph that `trainings` share differ from the model's in each of
    them, or why one of the two fails; "" where they agree."""
    assert region.signature is not None
    program = region.program(trainings[0])
    grad = bool(region.signature.grad)
    actual: list[Any] = []
    try:
        with quiet_run(module, trainings[0], grad=grad):
            own, _ = own_copy(leaves, {})
            flatten(program(module, own, ""), actual, objects=True)
        for training in trainings:
            arguments = region.signature.arguments(leaves)
            expected = run_flat(module, *arguments, training=training, grad=grad)
            if reason := difference(actual, expected):
                return reason
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def unusual(value: Any) -> str:
    """Why no graph here can be given a value; "" of plain tensors, and of what is no tensor."""
    if not isinstance(value, Tensor) or (value.layout is torch.strided and not value.is_nested):
        return ""
    kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
    return f"it is called with a {kind} tensor, which neither graphs nor passes take"


class _Result:
    """Where the traced forward leaves its output's structure, and what its replay in train mode
    found (export undoes attribute writes)."""

    structure: Structure | None = None
    replayed: Replayed | None = None


class _Untraceable(CaptureError):
    """Why a forward cannot be traced. torch prints the graph that an error holds, so that this one
    takes none."""

    @property
    def partial_fx_graph(self) -> Any:
        raise AttributeError("partial_fx_graph")

    @partial_fx_graph.setter
    def partial_fx_graph(self, graph: Any) -> None:
        pass


class _Flat(nn.Module):
    """Takes and returns flat tensors, so that no class of the model's needs to be a pytree."""

    def __init__(self, module: nn.Module, signature: Signature, observer: _Observer) -> None:
        super().__init__()
        self.module = module
        self.signature = signature
        self.observer = observer
        self.result = _Result()

    def forward(self, *leaves: Tensor) -> list[Any]:
        results: list[Any] = []

        def call() -> Any:
            args, kwargs = self.signature.arguments(self.signature.merged(leaves))
            return self.module(*args, **kwargs)

        try:
            with traced_here_alone(), self.observer:
                self.result.structure = flatten(call(), results, objects=True)
        except RewriteError as error:
            raise _Untraceable(first_line(error)) from error
        except Exception as error:
            raise _Untraceable(f"{type(error).__name__}: {first_line(error)}") from error
        if self.observer.record is not None:
            with traced_here_alone():
                self.result.replayed = replayed(
                    self.module, call, self.observer.record, results, self.result.structure
                )
        return results


_HOOKS = frozenset({
    torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook,
})  # fmt: skip
_tensor: Any = torch.Tensor
_GRADIENTS = frozenset({
    *(getattr(_tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad", "grad_fn")),
    torch.Tensor.is_inference,
})  # fmt: skip
_LAYOUT = frozenset({torch.Tensor.is_contiguous, torch.Tensor.stride, torch.Tensor.data_ptr})
_VALUES = frozenset({
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__int__,
    torch.Tensor.__float__, torch.Tensor.__index__, torch.Tensor.numpy,
})  # fmt: skip


class _Observer(TorchFunctionMode):
    """Sees every torch call of the model's Python code while it is traced.

    It stops a trace that takes too long, refuses one that turns the value of a plain tensor
    attribute into a number or asks whether a tensor needs a gradient, and notes whether the code
    asks how its tensors lie in memory. With a record, it keeps the calls.
    """

    def __init__(self, module: nn.Module, deadline: float, record: Record | None = None) -> None:
        super().__init__()
        self.deadline = deadline
        self.record = record
        self.layout = False
        self.attributes = {
            id(v): f"{name}.{k}".lstrip(".")
            for name, m in module.named_modules()
            for k, v in vars(m).items()
            if isinstance(v, Tensor)
        }

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.thread_time() > self.deadline:
            raise CaptureError(TOO_LONG)
        if func in _HOOKS:
            raise CaptureError("its forward hooks gradients, which a graph would lose")
        if func in _GRADIENTS and not in_torch(sys._getframe(1)):
            raise CaptureError(
                "its forward asks which tensors have gradients, which a graph would fix"
            )
        if func in _LAYOUT:
            self.layout = True
        elif func in _VALUES and args and id(args[0]) in self.attributes:
            name = self.attributes[id(args[0])]
            raise CaptureError(f"its forward reads the value of {name}, which a graph would fix")
        if self.record is None:
            return func(*args, **(kwargs or {}))
        return self.record.call(func, args, kwargs or {})


def _export(
    module: nn.Module, region: Region, training: bool, deadline: float, fakes: Fakes, grad: bool
) -> str:
    """Adds one mode's graph to the region; returns why there is none."""
    signature, leaves = region.signature, region.leaves
    assert signature is not None
    assert leaves is not None
    examples = _distinct(leaves)
    rows = _two_rows(examples)
    trace = functools.partial(
        _traced, module, signature, leaves=leaves, training=training, deadline=deadline, grad=grad
    )
    try:
        try:
            traced = trace(rows)
            # a size that the model fixes is fixed as it was given, not as the two rows
            again = rows is not examples and any(s and s[0] == 1 for s in traced.dims.shapes)
        except Exception:
            if rows is examples:
                raise
            again = True  # two rows may not be what the model takes
        if again:
            traced = trace(examples)
    except RewriteError as error:
        return first_line(error)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    if traced.layout and not all(t.is_contiguous() for t in leaves):
        return "its forward depends on how its tensors lie in memory, and the example is strided"
    for name, constant in traced.constants.items():
        module.register_buffer(name, constant, persistent=False)
    try:
        cost = model_cost(module, [("", traced.graph, leaves)], training=training, fakes=fakes)
    except VerifyError as error:
        return first_line(error)
    if not (training or any(isinstance(t, nn.Parameter) for t in leaves)):
        region.priced = cost
    signature.contiguous |= traced.layout
    signature.dims[training] = traced.dims
    region.graphs[training], region.outputs[training] = traced.graph, traced.output
    # what drops may lie in memory in another way than what it was given
    found = traced.found
    if found is not None and found.alike and not (found.dropout and traced.layout):
        train = in_train_mode(traced.graph)
        if train is not None:
            region.graphs[True], region.outputs[True] = train, traced.output
            region.alike = not found.dropout
    return ""


@dataclass(frozen=True)
class _Traced:
    """One mode's graph, the constants it reads, and what is known about it; of eval mode also what
    a replay in train mode found."""

    graph: fx.Graph
    constants: dict[str, Tensor]
    output: Structure
    layout: bool
    dims: Dims
    found: Replayed | None


def _traced(
    module: nn.Module,
    signature: Signature,
    examples: list[Tensor],
    leaves: list[Tensor],
    training: bool,
    deadline: float,
    grad: bool,
    replay: bool = True,
) -> _Traced:
    """The trace of one mode; that of eval mode tells whether train mode has the same. `grad` says
    whether the call wants gradients, where the forward asks; else one trace is for both."""
    again = functools.partial(
        _traced, module, signature, examples, leaves, training, deadline, grad
    )
    record = Record() if replay and not training else None
    observer = _Observer(module, deadline, record)
    flat = _Flat(module, signature, observer)
    with (
        TRACING,
        modes(module, training),
        without_hooks(module),
        quietly(logs=True),
        _own_backward_refused(),
        asked_for_modes(module) as asked,
        torch.set_grad_enabled(signature.grad is not False),
        kept_values(module),
        kept_numbers() as drew,
    ):
        program = torch.export.export(
            flat, tuple(examples), dynamic_shapes=(_dynamic(examples),), strict=False
        )
        if drew():
            raise CaptureError(
                "its forward draws from Python's or NumPy's random numbers, which a graph would fix"
            )
    if asked() and signature.grad is not grad:
        signature.grad = grad
        if not grad:
            return again(replay)
    found = flat.result.replayed
    if found is not None and not found.clean:
        return again(replay=False)
    graph, constants = rehost(program, module, signature.names, "module")
    structure = flat.result.structure
    assert structure is not None
    dims = size_rules(program, leaves)
    return _Traced(graph, constants, structure, observer.layout, dims, found)


@contextlib.contextmanager
def _own_backward_refused() -> Iterator[None]:
    """A trace sees what a forward computes, not how its backward was defined or what it keeps: a
    `torch.autograd.Function` or activation checkpointing would silently be replaced."""
    thread = threading.get_ident()
    apply: Any = vars(torch.autograd.Function)["apply"]
    hooks = torch.autograd.graph.saved_tensors_hooks
    enter = hooks.__enter__

    def refuse(reason: str) -> None:
        if threading.get_ident() == thread:
            raise CaptureError(reason)

    def own_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ == "torch.utils.checkpoint":
            refuse("it checkpoints activations, which a graph would keep")
        elif not (cls.__module__.startswith("torch.") or hasattr(cls, "of_op")):
            refuse(f"{cls.__name__} has a backward of its own, which a graph would lose")
        return apply.__get__(None, cls)(*args, **kwargs)

    def own_enter(self: Any) -> Any:
        refuse("it checkpoints or hooks saved tensors, which a graph would keep as they are")
        return enter(self)

    torch.autograd.Function.apply = classmethod(own_apply)  # type: ignore[method-assign, assignment]
    hooks.__enter__ = own_enter  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
        hooks.__enter__ = enter  # type: ignore[method-assign]


@contextlib.contextmanager
def asked_for_modes(module: nn.Module) -> Iterator[Callable[[], bool]]:
    """Whether the model's own code asks if gradients are on, in this thread: a trace takes the one
    way. One that asks for inference mode, which no trace is in, is refused."""
    thread, asked = threading.get_ident(), []

    def watched(plain: Callable[[], bool]) -> Callable[[], bool]:
        def answer() -> bool:
            if threading.get_ident() == thread and not in_torch(sys._getframe(1)):
                if plain is torch._C.is_inference_mode_enabled:
                    raise CaptureError(
                        "its forward asks for inference mode, which a graph would fix"
                    )
                asked.append(plain)
            return plain()

        return answer

    # the code of its classes may have the functions under names of its own
    files = {cls.__module__ for m in module.modules() for cls in type(m).__mro__}
    own = [vars(sys.modules[f]) for f in sorted(files)
           if f in sys.modules and not f.startswith("torch.")]  # fmt: skip
    plain = {id(f): f for f in (torch.is_grad_enabled, torch.is_inference_mode_enabled)}
    places = [(names, n, v) for names in (vars(torch), *own)
              for n, v in list(names.items()) if id(v) in plain]  # fmt: skip
    for names, name, value in places:
        names[name] = watched(value)
    try:
        yield lambda: bool(asked)
    finally:
        for names, name, value in places:
            names[name] = value


def _tells_apart(module: nn.Module, signature: Signature, leaves: list[Tensor]) -> bool:
    """Whether it makes a difference to a forward that some of its tensors are one object."""
    copies = [t.clone() for t in leaves]
    try:
        one, apart = (run_flat(module, *signature.arguments(given)) for given in (leaves, copies))
    except Exception:  # the one or the other is refused
        return True
    return difference(one, apart) is not None


# sizes


def _distinct(leaves: list[Tensor]) -> list[Tensor]:
    """A tensor given twice is traced as two, or the graph would read one for both."""
    seen: set[int] = set()
    distinct = []
    for leaf in leaves:
        distinct.append(leaf.clone() if id(leaf) in seen else leaf)
        seen.add(id(leaf))
    return distinct


def _two_rows(leaves: list[Tensor]) -> list[Tensor]:
    """Export fixes sizes of 1, so a batch of one is traced as a batch of two (and checked as a
    batch of one)."""
    batched = [t for t in leaves if t.dim()]
    if not batched or any(t.shape[0] != 1 for t in batched):
        return leaves
    return [torch.cat([t, t]).detach().requires_grad_(t.requires_grad) if t.dim() else t
            for t in leaves]  # fmt: skip


def _dynamic(leaves: list[Tensor]) -> tuple[Any, ...]:
    """Which dimensions may vary: the batch, and the length of sequences. Image sizes and feature
    widths stay fixed: as symbols they make tracing of a vision model many times slower."""
    auto = torch.export.Dim.AUTO
    dims = []
    for leaf in leaves:
        count = 1 if leaf.is_floating_point() and leaf.dim() > 3 else 2
        dims.append({d: auto for d in range(min(count, leaf.dim()))})
    return tuple(dims)


def _widen(module: nn.Module, region: Region, trainings: tuple[bool, ...]) -> None:
    """Export assumes that a varying size is at least 2. Where the graph is found to agree with the
    model on size 1 as well, it may serve it: alone, and together with the other sizes of 1.

    Args:
        module: the model.
        region: with the graphs and dims of `trainings`.
        trainings: the modes that share one graph.
    """
    assert region.signature is not None
    assert region.leaves is not None
    dims = region.signature.dims[trainings[0]]
    region.signature.dims.update(dict.fromkeys(trainings, dims))
    on_meta = any(p.is_meta for p in module.parameters())
    widened: set[str] = set()
    for dim in (0, 1):
        symbols = {(s[dim], leaf.shape[dim])
                   for s, leaf in zip(dims.shapes, region.leaves, strict=True)
                   if len(s) > dim}  # fmt: skip
        narrow = {str(s): n for s, n in symbols if isinstance(s, str) and dims.ranges[s][0] == 2}
        if not narrow:
            continue
        for s in narrow:
            dims.ranges[s] = (1, dims.ranges[s][1])
        if on_meta:  # no values to compare: of size 1 nothing is known but the example itself
            fits = dims.difference(region.leaves, region.signature.names) is None
            agrees = fits and set(narrow.values()) == {1}
        else:
            agrees = _agrees_on_one(module, region, set(narrow), trainings) and (
                not widened or _agrees_on_one(module, region, {*narrow, *widened}, trainings)
            )
        if agrees:
            widened |= set(narrow)
        else:
            for s in narrow:
                dims.ranges[s] = (2, dims.ranges[s][1])


def _agrees_on_one(
    module: nn.Module, region: Region, symbols: set[str], trainings: tuple[bool, ...]
) -> bool:
    signature = region.signature
    assert signature is not None
    assert region.leaves is not None
    dims = signature.dims[trainings[0]]
    leaves = list(region.leaves)
    for i, sizes in enumerate(dims.shapes):
        for d, size in enumerate(sizes):
            if size in symbols:
                leaves[i] = leaves[i].narrow(d, 0, 1)
    if dims.difference(leaves, signature.names) is not None:
        return False
    # where either side refuses size 1, the graph keeps to 2 and above
    return not _disagrees(module, region, leaves, trainings)
