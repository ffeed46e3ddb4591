"""The second rung of capture: the largest parts of a model that can be captured; the rest stays
Python, as islands with their reason, and layers called from an island are still rewritten."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from rewriter.capture.exporting import TOO_LONG, Region, export_region, unusual
from rewriter.capture.signature import Call
from rewriter.cost import Fakes
from rewriter.modules.running import first_line, own_copy, quiet_run
from rewriter.modules.structure import Unflattenable, flatten
from rewriter.modules.tree import has_hooks, join, recorded_inside
from rewriter.report import Island
from rewriter.sites import is_leaf, kind_of

__all__ = ["CapturedSubmodules", "capture_submodules", "refusal"]

Writes = Mapping[str, str]
"""Dotted name of a module → an attribute that its forward writes."""


@dataclass
class CapturedSubmodules:
    """The regions that were captured, and what was not."""

    regions: list[Region] = field(default_factory=list)
    islands: list[Island] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def refusal(root: nn.Module, writes: Writes, prefix: str = "") -> str | None:
    """Why a module may not be captured whole, whatever its trace: a graph would run past what
    surrounds or happens in a container."""
    for name, module in root.named_modules():
        fqn = join(prefix, name)
        label = fqn or "the model"
        if is_leaf(module):
            continue
        if name and has_hooks(module):
            return f"{label} has hooks, which a graph of the whole would bypass"
        if "forward" in vars(module):
            return f"{label} has a forward of its own, set on the object"
        if fqn in writes:
            return f"the forward of {label} writes its attribute {writes[fqn]!r}"
    return None


def capture_submodules(
    root: nn.Module,
    args: Any,
    kwargs: Any,
    reason: str,
    writes: Writes,
    seconds: float,
    fakes: Fakes,
) -> CapturedSubmodules:
    """Captures what can be below the root.

    Args:
        root: the model.
        args, kwargs: one call of it.
        reason: why the root itself stays Python.
        writes: modules that cannot be captured, whatever their trace.
        seconds: of this thread's CPU time; what is left then stays Python.
        fakes: of the model's weights.
    """
    result = CapturedSubmodules()
    linears = _Linears(root)
    calls, seen_inside = _record(root, args, kwargs, contextlib.nullcontext())
    again, _ = _record(root, args, kwargs, linears)
    # some code takes another path where it is looked at: TransformerEncoder's nested one
    alike = [(k, len(v)) for k, v in calls.items()] == [(k, len(v)) for k, v in again.items()]
    called = linears.calls() if alike else {}
    deadline = time.thread_time() + seconds
    done: set[int] = set()
    graphed: set[int] = set()

    def visit(fqn: str, module: nn.Module, reason: str | None) -> None:
        if id(module) in done:
            return
        done.add(id(module))
        recorded = calls.get(id(module), [])
        if is_leaf(module):
            given = [a for args, kwargs in recorded for a in [*args, *kwargs.values()]]
            if reason := next(filter(None, map(unusual, given)), ""):
                if kind_of(module) is not None:
                    result.islands.append(Island(fqn, type(module).__name__, reason, [fqn]))
            elif recorded:
                result.regions.append(_leaf_region(fqn, recorded))
            return
        if id(module) in seen_inside:
            reason = reason or "outputs of layers inside are recorded, which a graph would bypass"
        if reason is None and recorded:
            region = _part(fqn, module, recorded, writes, deadline, fakes)
            if isinstance(region, Region):
                region.calls = len(recorded)
                result.regions.append(region)
                if region.train_reason:
                    result.notes.append(f"{fqn}: {region.train_reason}")
                done.update(id(m) for m in module.modules())
                graphed.update(id(m) for m in module.modules())
                return
            reason = region
        own = [n for n in called if n.rpartition(".")[0] == fqn]
        if own and reason == _NO_LAYER:
            return  # nothing but functions of its own weights, which are listed below
        if recorded and reason is not None:
            layers = [join(fqn, n) for n, m in module.named_children() if is_leaf(m)]
            result.islands.append(Island(fqn, type(module).__name__, reason, layers))
        for name, child in module.named_children():
            visit(join(fqn, name), child, None)

    visit("", root, reason)
    for name, made in called.items():
        owner, _, last = name.rpartition(".")
        module = root.get_submodule(owner)
        if id(module) not in graphed and not is_leaf(module):
            result.regions.append(_function_region(owner, last, made))
    return result


def _record(
    root: nn.Module, args: Any, kwargs: Any, looking: AbstractContextManager[object]
) -> tuple[dict[int, list[tuple[Any, Any]]], set[int]]:
    """What each module was called with, for modules that one forward calls; and the modules
    inside of which a framework recorded outputs meanwhile."""
    recorded: set[int] = set()
    calls: dict[int, list[tuple[Any, Any]]] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        own = calls.setdefault(id(module), [])
        if recorded_inside(module):
            recorded.add(id(module))
        if is_leaf(module):  # only the shape matters: one element stands for all
            args = tuple(_outline(a) for a in args)
            kwargs = {k: _outline(a) for k, a in kwargs.items()}
        own.append((args, kwargs))

    handles = []
    with quiet_run(root, training=False):
        try:
            for module in root.modules():
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            own_args, own_kwargs = own_copy(args, kwargs)
            with looking:
                root(*own_args, **own_kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return calls, recorded


_NO_LAYER = "no layer inside"


class _Linears(TorchFunctionMode):
    """Notes what `F.linear` is called with, where its weight is a parameter of the model: Python
    code that does no more with it may be given a layer in its place."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in root.named_parameters()}
        self.made: dict[str, list[tuple[Tensor, str]]] = {}
        self.read: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        if func is torch.nn.functional.linear and id(given["weight"]) in self.names:
            self._note(self.names[id(given["weight"])], given["input"], given.get("bias"))
        else:
            self.read |= {
                self.names[id(a)] for a in (*args, *kwargs.values()) if id(a) in self.names
            }
        return func(*args, **kwargs)

    def _note(self, name: str, x: Tensor, bias: Tensor | None) -> None:
        named = "" if bias is None else self.names.get(id(bias), "?")
        if (
            unusual(x)
            or named == "?"
            or named.rpartition(".")[0] not in ("", name.rpartition(".")[0])
        ):
            self.read.add(name)  # in a form that no layer stands for
        else:
            self.made.setdefault(name, []).append((_outline(x), named.rpartition(".")[2]))

    def calls(self) -> dict[str, list[tuple[Tensor, str]]]:
        """(input, name of the bias) of each call, by the weight's name."""
        return {n: m for n, m in self.made.items() if n not in self.read}


def _function_region(owner: str, weight: str, made: list[tuple[Tensor, str]]) -> Region:
    """A graph that only describes the calls of one linear function that Python makes."""
    graph = fx.Graph()
    results = []
    for i, (_, bias) in enumerate(made):
        x = graph.placeholder(f"x{i}")
        own = [graph.create_node("get_attr", name) for name in (weight, bias) if name]
        linear = torch.nn.functional.linear
        results.append(graph.call_function(linear, (x, *own)))
    graph.output(tuple(results))
    leaves = [x for x, _ in made]
    return Region(owner, {False: graph}, {False: None}, None, leaves, hosted=False)


def _outline(value: Any) -> Any:
    if not isinstance(value, Tensor) or unusual(value):
        return value
    return value.detach().new_zeros(()).expand(value.shape)


def _part(
    fqn: str,
    module: nn.Module,
    recorded: list[tuple[Any, Any]],
    writes: Writes,
    deadline: float,
    fakes: Fakes,
) -> Region | str:
    refused = refusal(module, writes, fqn)
    if refused:
        return refused
    if not any(is_leaf(m) for m in module.modules()):
        return _NO_LAYER
    remaining = deadline - time.thread_time()
    if remaining <= 0:
        return TOO_LONG
    try:
        bound = [Call.of(type(module).forward.__get__(module), a, k) for a, k in recorded]
        keys = {str(_shape_of(c)) for c in bound}
    except (TypeError, Unflattenable) as error:
        return first_line(error)
    if len(keys) > 1:
        return f"it is called in {len(keys)} different ways"
    return export_region(module, fqn, bound[0], remaining, fakes)


def _shape_of(call: Call) -> tuple[Any, ...]:
    leaves: list[Any] = []
    structure = flatten(dict(call.arguments), leaves, objects=False)
    return structure, [(t.dtype, t.dim()) for t in leaves if isinstance(t, Tensor)]


def _leaf_region(fqn: str, recorded: list[tuple[Any, Any]]) -> Region:
    """A graph that only describes the calls of one layer that Python makes."""
    owner, _, name = fqn.rpartition(".")
    graph = fx.Graph()
    leaves: list[Tensor] = []
    results = []
    for args, kwargs in recorded:
        tensors = [a for a in [*args, *kwargs.values()] if isinstance(a, Tensor)]
        leaves.append(tensors[0])
        results.append(graph.call_module(name, (graph.placeholder(f"x{len(leaves)}"),)))
    graph.output(tuple(results))
    return Region(owner, {False: graph}, {False: None}, None, leaves, hosted=False)
