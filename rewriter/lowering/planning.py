"""Where rules apply in an eval graph, and the graph with the fused ops in their places."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from rewriter.errors import VerifyError
from rewriter.lowering.rules import Place, Rule
from rewriter.modules.patterns import Fan, Match, Op
from rewriter.modules.tree import has_hooks
from rewriter.sites import find_matches
from rewriter.spellings import autocast_at, spelled, works_in_place

__all__ = [
    "Application",
    "Key",
    "Refusal",
    "failure",
    "inputs_of",
    "lowered_graph",
    "pays",
    "places",
    "spoken",
]

Key = tuple[str, str]
"""Names an application by (pattern, name of its first node), which a pickled graph keeps."""
_WEIGHTED = frozenset({"conv", "conv_transpose", "batch_norm", "linear"})


@dataclass(frozen=True, eq=False)
class Application:
    """A rule at a place where nothing speaks against it."""

    rule: Rule
    place: Place
    label: str = ""
    """Names the place in every graph of the module, also one that is captured again."""

    @property
    def key(self) -> Key:
        return str(self.rule.pattern), self.place.match.nodes[0].name

    def ready(self, tensors: Sequence[Tensor | None]) -> Callable[..., Any]:
        """What runs at the place: a function of what goes in, given what the rule derives."""
        op, rest = self.rule.fused, (*tensors, *self.rule.fused.constants(self.place))
        options = op.options(self.place)
        if op.bind is not None:
            return op.bind(*rest, **options)
        return lambda *inputs, **named: op.run(*inputs, *rest, **named, **options)


@dataclass(frozen=True, eq=False)
class Refusal:
    """A rule at a place where it does not apply, and why."""

    rule: Rule
    place: Place
    reason: str
    action: str = "skipped"
    label: str = ""


def places(
    graph: fx.Graph,
    root: nn.Module,
    rules: Sequence[Rule],
    only: Collection[Key] | None = None,
    declined: Collection[str] = (),
) -> tuple[list[Application], list[Refusal]]:
    """Where rules apply: an earlier rule before a later one, and every node in one place at most.

    Args:
        graph: an eval graph.
        root: the module tree that it lives on.
        rules: in the order in which they are tried.
        only: keys of the applications to look for; None for all.
        declined: labels of applications to pass over: later rules may have their nodes.
    """
    taken: set[fx.Node] = set()
    applications: list[Application] = []
    refusals: list[Refusal] = []
    for rule in rules:
        seen: collections.Counter[str] = collections.Counter()
        for match in find_matches(root, graph, rule.pattern):
            place = Place.of(match, root)
            if not rule.where(place):
                continue
            found = _application(rule, place, seen)
            if not taken.isdisjoint(match.nodes) or (only is not None and found.key not in only):
                continue
            if found.label in declined:
                continue
            reason = _against(rule, place)
            if reason is None:
                applications.append(found)
                taken.update(match.nodes)
            else:
                refusals.append(Refusal(rule, place, reason, label=found.label))
    return applications, refusals


def _application(rule: Rule, place: Place, seen: collections.Counter[str]) -> Application:
    """With its label: the pattern, the layers and functions, and the how manieth of its like it is
    in the graph. Names of nodes differ from one capture to the next."""
    steps = [
        str(n.target) if n.op == "call_module" else spelled(n, place.root)
        for n in place.match.nodes
    ]
    label = f"{rule.pattern} at {', '.join(steps)}"
    seen[label] += 1
    return Application(rule, place, f"{label} ({seen[label]})")


def _against(rule: Rule, place: Place) -> str | None:
    """What speaks against a rule at a place."""
    for node, module in zip(place.match.nodes, place.modules, strict=True):
        inside = isinstance(autocast_at(node), torch.autocast)
        if inside or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            return f"{node.name} lies under autocast, which chooses its type"
        if module is None:
            if spelled(node, place.root) in _WEIGHTED:
                return f"{node.name} calls a function: its weights are not a layer's"
        elif any(has_hooks(m) for m in module.modules()):
            return f"{node.target} has hooks, which would not run"
        elif any("forward" in vars(m) for m in module.modules()):
            return f"{node.target} has a forward of its own, which would not run"
        elif isinstance(module, _BatchNorm) and module.running_mean is None:
            return f"{node.target} keeps no running statistics: it norms by the batch"
        elif isinstance(module, _BatchNorm) and module.training and not place.root.training:
            return f"{node.target} is in train mode: it norms by the batch"
    return _too_early(place) or spoken("unless", rule, place)


def _too_early(place: Place) -> str | None:
    """Why what a chain's sums add cannot be read where its first step stands; None where it can."""
    match = place.match
    if not match.added:
        return None
    order = {n: i for i, n in enumerate(match.nodes[0].graph.nodes)}
    first, last = order[match.nodes[0]], order[match.nodes[-1]]
    later = (n for n in match.added if order[n] > first and n.op != "get_attr")
    late = next((n for n in later if not _is_size(n) or order[n.all_input_nodes[0]] > first), None)
    if late is not None:
        return f"{late.name}, which is added, is computed after {match.nodes[0].name}"
    between = [n for n, i in order.items() if first < i < last and n not in match.nodes]
    writing = next((n for n in between if works_in_place(n, place.root)), None)
    return None if writing is None else f"{writing.name} writes in place before the sum"


def _is_size(node: fx.Node) -> bool:
    """Whether a node asks for one size of a tensor, which it can do as soon as that is there."""
    return node.target is torch.ops.aten.sym_size.int


def inputs_of(
    match: Match, value: Callable[[fx.Node], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What goes into a place: of a single function the arguments of its call, else the value that
    the first step works on and those that sums add.

    Args:
        value: what stands for a node.
    """
    node = match.nodes[0]
    if isinstance(match.pattern, Op) and node.op == "call_function":
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        return tuple(args), dict(kwargs)
    return tuple(value(n) for n in (match.source, *match.added)), {}


def spoken(name: str, rule: Rule, place: Place, *inputs: Any, **named: Any) -> str | None:
    """What a rule's `unless` or `slower` says at a place.

    Raises:
        VerifyError: it fails, or gives neither a reason nor None.
    """
    try:
        reason = getattr(rule.fused, name)(place, *inputs, **named)
    except Exception as error:
        raise failure(rule, place, error) from error
    if reason is None or isinstance(reason, str):
        return reason
    raise failure(rule, place, TypeError(f"{name} gave {reason!r}, neither a reason nor None"))


def pays(found: Application, value: Callable[[fx.Node], Any] | None = None) -> bool:
    """Whether a rule is not slower at its place.

    Args:
        found: the rule at the place.
        value: what a node gives; None where no values are at hand: the sizes that the graph was
            captured with then tell alone.
    """
    args, kwargs = inputs_of(found.place.match, value or _examples())
    return spoken("slower", found.rule, found.place, *args, **kwargs) is None


def _examples() -> Callable[[fx.Node], Any]:
    """Of a node a value of the sizes that its graph was captured with, without data."""
    known = FakeTensorMode()

    def example(node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        sizes, strides = (tuple(map(_hint, s)) for s in (value.shape, value.stride()))
        with known:
            return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)

    return example


def _hint(size: int | torch.SymInt) -> int:
    """A size as it was in the example; 0 where that is not known."""
    return int(size.node.hint or 0) if isinstance(size, torch.SymInt) else size


def failure(rule: Rule, place: Place, error: Exception) -> VerifyError:
    """What a rule's own function raised, with the rule and the place."""
    return VerifyError(
        f"rule {rule} fails at {place.name}: {type(error).__name__}: {error}. Correct the rule, or "
        "rewrite without it (lower=)"
    )


Bring = Callable[[Application, fx.Graph], "Sequence[fx.Node | None] | fx.Node"]
"""Makes the nodes that hold an application's derived tensors, or the one that holds what it runs
(`Application.ready`)."""


def lowered_graph(
    graph: fx.Graph, applications: Sequence[Application], bring: Bring
) -> tuple[fx.Graph, dict[Key, fx.Node]]:
    """A copy of the graph with the fused ops, and the node of each. The graph itself stays.

    A fused op stands where the first of its nodes stood: what goes into it may be overwritten
    later.
    """
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for node in inputs:
        env[node] = new.node_copy(node)
    first = {a.place.match.nodes[0]: a for a in applications}
    inside = {n for a in applications for n in a.place.match.nodes}
    brought = {id(a): bring(a, new) for a in applications}
    for node in graph.nodes:
        if node.op == "get_attr":  # a fused op may read one before the sum does
            env[node] = new.node_copy(node)
    fused: dict[Key, fx.Node] = {}
    for node in graph.nodes:
        if node in env:
            continue
        if node in first:
            found = first[node]
            fused[found.key] = _call(new, found, brought[id(found)], env)
        elif node not in inside:
            env[node] = new.node_copy(node, env.__getitem__)
    return new, fused


def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of a function that is an input of the graph."""
    return function(*args, **kwargs)


def _call(
    graph: fx.Graph,
    found: Application,
    given: Sequence[fx.Node | None] | fx.Node,
    env: dict[fx.Node, fx.Node],
) -> fx.Node:
    match, op = found.place.match, found.rule.fused

    def value(node: fx.Node) -> fx.Node:
        if node not in env and _is_size(node):
            env[node] = graph.node_copy(node, env.__getitem__)
        return env[node]

    args, kwargs = inputs_of(match, value)
    if isinstance(given, fx.Node):
        call = graph.call_function(called, (given, *args), kwargs)
    else:
        arguments = (*args, *given, *op.constants(found.place))
        call = graph.call_function(op.run, arguments, {**kwargs, **op.options(found.place)})
    call.meta = dict(match.nodes[-1].meta)
    if not isinstance(match.pattern, Fan):
        env[match.nodes[-1]] = call
        return call
    for i, node in enumerate(match.nodes):
        env[node] = graph.call_function(operator.getitem, (call, i))
        env[node].meta = dict(node.meta)
    return call
