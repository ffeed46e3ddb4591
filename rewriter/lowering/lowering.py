"""Lowering: after all passes, the eval graph with fused ops in the place of patterns.

Passes change what a model computes, rules only how. Every application is checked on the example
inputs: the fused op must give what its nodes give, in type and up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.capture import Capture, Region
from rewriter.cost import Cost, Fakes, GraphCost, model_cost
from rewriter.errors import VerifyError
from rewriter.lowering.lowered import Lowered, Verdicts, derived, is_plain_tensor
from rewriter.lowering.planning import (
    Application,
    Key,
    Refusal,
    failure,
    inputs_of,
    lowered_graph,
    places,
    spoken,
)
from rewriter.lowering.rules import Place, Rule
from rewriter.modules.comparing import relative_error, type_of
from rewriter.modules.patterns import Chain, Fan
from rewriter.modules.running import own_copy, quiet_run
from rewriter.modules.tree import join
from rewriter.modules.versions import Stamp
from rewriter.report import Decision, Step
from rewriter.report import format as fmt
from rewriter.spellings import spelled, user_line

__all__ = ["Lowering", "PricedGraph", "lower", "lowered_again"]

_HELD = "_rewriter_lowered"
_HALF = 1e-4  # dtypes with a larger eps have 16 bits
_STEPS = 64, 4
"""Units in the last place by which ‖lowered − plain‖ may differ from ‖plain‖: of a wide dtype,
whose sums round at every term, and of one of 16 bits, whose sums are kept wide."""


@dataclass
class PricedGraph:
    """A lowered graph on a module tree that holds its derived tensors too, for the cost model.

    Args:
        root: the tree.
        graph: the lowered graph.
        fused: the node of each application.
        replaced: names of the nodes of the eval graph that each application replaces.
    """

    root: nn.Module
    graph: fx.Graph
    fused: dict[Key, fx.Node] = field(default_factory=dict)
    replaced: dict[Key, list[str]] = field(default_factory=dict)


@dataclass
class Lowering:
    """What `lower` found.

    Args:
        lowered: per region (dotted name) what runs in its eval graph's place.
        verdicts: per such region what was decided about each place.
        step: of the report; None where no rule has a place.
        cost: of the lowered model.
        graph: the lowered graph of a model captured whole, to be priced at other sizes.
        held: bytes of the tensors that each application derives.
    """

    lowered: dict[str, Lowered] = field(default_factory=dict)
    verdicts: dict[str, Verdicts] = field(default_factory=dict)
    step: Step | None = None
    cost: GraphCost | None = None
    graph: PricedGraph | None = None
    held: dict[tuple[str, Key], int] = field(default_factory=dict)


def lower(
    capture: Capture, rules: Sequence[Rule], cost: GraphCost, fakes: Fakes | None = None
) -> Lowering:
    """Applies the rules to every eval graph of a model; nothing of the model changes.

    Args:
        capture: the model after all passes, hosted. Without example inputs, or on meta, nothing
            could be checked, and nothing is done.
        rules: in the order in which they are tried.
        cost: what the model costs as it is.
        fakes: fake tensors of its weights.

    Raises:
        VerifyError: a rule gives a value of another type than what it replaces, or fails itself.
    """
    start = time.perf_counter()
    result = Lowering()
    regions = _regions(capture)
    if not rules or not regions or capture.on_meta:
        return result
    priced: dict[str, PricedGraph] = {}
    decisions: dict[str, dict[Key, Decision]] = {}
    for region in regions:
        root, graph = capture.root.get_submodule(region.prefix), region.graphs[False]
        decided: dict[str, bool] = {}
        if why := _switches_modes(graph):
            applications, refusals = places(graph, root, rules)
            refusals += [Refusal(a.rule, a.place, why) for a in applications]
            applications, checker = [], _Checker(root, graph, [])
        else:
            applications, refusals, checker = _decided(region, root, graph, rules, decided)
        decided.update((r.label, False) for r in refusals)
        refusals += checker.declined
        decisions[region.prefix] = _decisions(region.prefix, graph, applications, refusals, checker)
        if applications:
            result.lowered[region.prefix] = Lowered(rules, {a.key for a in applications})
            result.verdicts[region.prefix] = Verdicts(rules, decided)
            priced[region.prefix] = _priced(root, graph, applications)
            result.held.update({(region.prefix, a.key): checker.held[a.key] for a in applications})
    if any(decisions.values()):
        result.step = _account(result, decisions, capture, priced, cost, fakes)
        result.step.seconds = time.perf_counter() - start
    if [r.prefix for r in regions] == [""]:
        result.graph = priced.get("")
    return result


def lowered_again(capture: Capture, region: Region, verdicts: Verdicts) -> Lowered | None:
    """What runs in the place of another eval graph of a module that was lowered: of a further form
    of its calls, or of the module loaded. Places that the verdicts do not know yet are decided by a
    run on the region's example, and noted there.

    Raises:
        VerifyError: a rule gives a value of another type than what it replaces, or fails itself.
    """
    if region not in _regions(capture) or capture.on_meta:
        return None
    root, graph = capture.root.get_submodule(region.prefix), region.graphs[False]
    if _switches_modes(graph):
        return None
    applications, _, _ = _decided(region, root, graph, verdicts.rules, verdicts.places)
    chosen = {a.key for a in applications}
    return Lowered(verdicts.rules, chosen) if chosen else None


def _regions(capture: Capture) -> list[Region]:
    """The regions whose eval graph runs, and whose example inputs are known."""
    return [r for r in capture.regions if r.hosted and False in r.graphs and r.leaves is not None]


def _switches_modes(graph: fx.Graph) -> str | None:
    """Why a graph cannot be lowered as a whole."""
    names = {getattr(n.target, "__name__", "") for n in graph.nodes if n.op == "call_function"}
    return "the model switches autocast inside" if "_enter_autocast" in names else None


# checking


class _Checker(fx.Interpreter):
    """Runs the plain graph, and beside each place what shall run there."""

    def __init__(
        self, root: nn.Module, graph: fx.Graph, applications: Sequence[Application]
    ) -> None:
        super().__init__(root, graph=graph)
        self.extra_traceback = False  # an error speaks of the rule and the place, not of this run
        self.root = root
        self.first = {a.place.match.nodes[0]: a for a in applications}
        self.last = {a.place.match.nodes[-1]: a for a in applications}
        self.owner = {n: a for a in applications for n in a.place.match.results}
        self.values: dict[fx.Node, Any] = {}
        self.held: dict[Key, int] = {}
        self.given: dict[Application, list[Any]] = {}
        self.declined: list[Refusal] = []
        self.errors: dict[Key, float] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.root.get_submodule(target)(*args, **kwargs)  # which has all names of a layer

    def run_node(self, n: fx.Node) -> Any:
        if n in self.first:
            self._fuse(self.first[n])
        value = super().run_node(n)
        if self.owner.get(n) in self.given:
            self.values[n] = value.clone()
        if n in self.last and self.last[n] in self.given:
            self._compare(self.last[n])
        return value

    def _fuse(self, found: Application) -> None:
        place = found.place
        args, kwargs = inputs_of(place.match, self._value)
        if (why := spoken("slower", found.rule, place, *args, **kwargs)) is not None:
            self.declined.append(Refusal(found.rule, place, why, "declined"))
            return
        sources = _sources(place, *args, *kwargs.values())
        stamp = Stamp(sources)
        tensors = derived(found)
        try:
            results = found.ready(tensors)(*args, **kwargs)
        except Exception as error:
            raise failure(found.rule, place, error) from error
        if not stamp.holds(sources) or not torch.equal(Stamp(sources).sums, stamp.sums):
            wrong = "derive or run writes into the model's weights or the input; make new tensors"
            raise failure(found.rule, place, RuntimeError(wrong))
        self.held[found.key] = _held_bytes(place, tensors)
        self.given[found] = [t.clone() for t in _tensors(found, results)]

    def _value(self, node: fx.Node) -> Any:
        """Of a node that stands before, or of a tensor of the model wherever it stands."""
        return self.env[node] if node in self.env else super().run_node(node)

    def _compare(self, found: Application) -> None:
        expected = [self.values.pop(n) for n in found.place.match.results]
        given = self.given.pop(found)
        types = [", ".join(map(type_of, found_)) for found_ in (given, expected)]
        if types[0] != types[1]:
            raise VerifyError(
                f"rule {found.rule} contradicts itself at {found.place.name}: the fused op gives "
                f"{types[0]}, the pattern {types[1]}"
            )
        error = relative_error(given, expected) or 0.0
        if error > max(_rounding(expected), found.rule.fused.error(found.place)):
            why = f"the outputs differ by {error:.1e}, more than rounding explains"
            self.declined.append(Refusal(found.rule, found.place, why, "declined"))
        else:
            self.errors[found.key] = error


def _sources(place: Place, *inputs: Any) -> list[Tensor]:
    """What a rule may read at a place, and must not write: its inputs, and the layers' tensors."""
    found = {id(x): x for x in inputs if isinstance(x, Tensor)}
    for module in place.modules:
        if module is not None:
            found.update((id(t), t) for t in (*module.parameters(), *module.buffers()))
    return [t for t in found.values() if is_plain_tensor(t) and not t.is_inference()]


def _tensors(found: Application, results: Any) -> list[Tensor]:
    """What `run` gave, as a list.

    Raises:
        VerifyError: it gave something else than a tensor, or than tensors.
    """
    given = list(results) if isinstance(results, tuple | list) else [results]
    for value in given:
        if not isinstance(value, Tensor):
            error = TypeError(f"run gave a {type(value).__name__}, not a tensor")
            raise failure(found.rule, found.place, error)
    return given


def _held_bytes(place: Place, tensors: Sequence[Tensor | None]) -> int:
    """Bytes of the derived tensors, without those that are a layer's own."""
    own = {
        t.data_ptr()
        for m in place.modules
        if m is not None
        for t in (*m.parameters(), *m.buffers())
    }
    return sum(
        t.numel() * t.element_size()
        for t in tensors
        if t is not None and (t.layout is not torch.strided or t.data_ptr() not in own)
    )


def _rounding(results: Sequence[Tensor]) -> float:
    eps = max(torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0 for t in results)
    return _STEPS[eps > _HALF] * eps


def _decided(
    region: Region, root: nn.Module, graph: fx.Graph, rules: Sequence[Rule], known: dict[str, bool]
) -> tuple[list[Application], list[Refusal], _Checker]:
    """Where rules run: what a run on the example inputs declines at a place leaves its nodes to the
    later rules.

    Args:
        known: by label, what was decided before; what is decided now is entered.
    """
    whole = _Checker(root, graph, [])
    while True:
        declined = {label for label, runs in known.items() if not runs}
        found, refusals = places(graph, root, rules, declined=declined)
        new = [a for a in found if a.label not in known]
        if not new:
            return found, refusals, whole
        checker = _Checker(root, graph, new)
        with quiet_run(root, training=False):
            checker.run(*own_copy(tuple(region.leaves or ()), {})[0])
        known.update((a.label, a.key in checker.errors) for a in new)
        whole.errors |= checker.errors
        whole.held |= checker.held
        whole.declined += checker.declined


# the report


def _decisions(
    prefix: str,
    graph: fx.Graph,
    applications: Sequence[Application],
    refusals: Sequence[Refusal],
    checker: _Checker,
) -> dict[Key, Decision]:
    """One decision per place, in the graph's order. A place that one rule refuses and another
    takes is no refusal, and what several rules say alike is said once."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    wider = {r.place.match.nodes[0]: r.reason for r in reversed(refusals) if len(r.place.names) > 1}
    rows = {}
    for a in applications:
        first, *more = a.place.match.nodes
        made = _done(prefix, a, checker)
        if not more and first in wider:
            made = replace(made, reason=f"{made.reason}; by itself, as {wider[first]}")
        rows[a.key] = order[first], made
    taken = {n for a in applications for n in a.place.match.nodes}
    said: set[tuple[fx.Node, str]] = set()
    for r in refusals:
        first = r.place.match.nodes[0]
        if first not in taken and (first, r.reason) not in said:
            said.add((first, r.reason))
            key = str(r.rule.pattern), first.name
            reason = r.reason
            if isinstance(r.rule.pattern, Fan):  # the row has the name of the first alone
                reason += f" ({_sites(prefix, r.place)})"
            rows[key] = order[first], _decision(prefix, r.rule, r.place, r.action, reason)
    return {key: d for key, (_, d) in sorted(rows.items(), key=lambda row: row[1][0])}


def _done(prefix: str, found: Application, checker: _Checker) -> Decision:
    held = checker.held[found.key]
    name = found.rule.fused.name
    reason = f"differs by {fmt.error(checker.errors[found.key])}"
    reason += f", keeps {fmt.size(held)} of derived weights" if held else ""
    made = _decision(prefix, found.rule, found.place, "lowered", reason)
    sites = _sites(prefix, found.place)
    return replace(made, kernel=name, reason=f"{made.kind} of {sites} → {name}, {reason}")


def _sites(prefix: str, place: Place) -> str:
    return ", ".join(join(prefix, name) for name in place.names)


def _decision(prefix: str, rule: Rule, place: Place, action: str, reason: str) -> Decision:
    where = next((w for w in map(user_line, place.match.nodes) if w), "")
    site = join(prefix, place.names[0])
    kind = str(rule.pattern)
    if isinstance(rule.pattern, Chain):  # which of its alternatives
        kind = " >> ".join(spelled(n, place.root) for n in place.match.nodes)
    return Decision(site, kind, action, reason, where=where)


# the cost model


def _priced(root: nn.Module, graph: fx.Graph, applications: Sequence[Application]) -> PricedGraph:
    """The lowered graph over a twin of the module tree that has the derived tensors as buffers."""
    held = nn.Module()

    def bring(found: Application, new: fx.Graph) -> list[fx.Node | None]:
        nodes: list[fx.Node | None] = []
        for tensor in derived(found):
            if tensor is None:
                nodes.append(None)
                continue
            opaque = tensor.layout is not torch.strided
            name = f"t{len(held._buffers)}"
            held.register_buffer(name, torch.empty(0) if opaque else tensor)
            nodes.append(new.create_node("get_attr", f"{_HELD}.{name}"))
        return nodes

    with torch.no_grad():
        new, fused = lowered_graph(graph, applications, bring)
    replaced = {a.key: [n.name for n in a.place.match.nodes] for a in applications}
    twin: nn.Module = object.__new__(type(root))
    twin.__dict__.update({**vars(root), "_modules": {**root._modules, _HELD: held}})
    return PricedGraph(twin, new, fused, replaced)


def _account(
    result: Lowering,
    decisions: Mapping[str, dict[Key, Decision]],
    capture: Capture,
    priced: Mapping[str, PricedGraph],
    cost: GraphCost,
    fakes: Fakes | None,
) -> Step:
    """The costs of the lowered model and of each application. What is derived is no parameter."""
    runs: list[tuple[nn.Module, fx.Graph, Sequence[Any]]] = []
    for r in _regions(capture):
        root = capture.root.get_submodule(r.prefix)
        own = priced.get(r.prefix) or PricedGraph(root, r.graphs[False])
        runs += [(own.root, own.graph, r.leaves or [])] * r.calls
    new = result.cost = model_cost(capture.root, runs, training=False, fakes=fakes)
    before, held = cost.total, sum(result.held.values())
    new.total = replace(
        new.total,
        params=before.params,
        param_bytes=before.param_bytes,
        peak_bytes=before.param_bytes + held + new.total.activation_bytes,
        training=before.training,
    )
    rows: list[Decision] = []
    for region in _regions(capture):
        graph, own_priced = region.graphs[False], priced.get(region.prefix)
        names = {n.name: n for n in graph.nodes}
        for key, decision in decisions[region.prefix].items():
            if own_priced is not None and key in own_priced.fused:
                node = own_priced.fused[key]
                old = [cost.nodes[names[n]] for n in own_priced.replaced[key]]
                saved = _saved(sum(old[1:], old[0]), new.nodes[node])
                decision = replace(decision, reason=f"{decision.reason}; {saved}")
            rows.append(decision)
    notes = [f"{fmt.size(held)} of derived weights are kept beside the model"] if held else []
    notes.append(_saved(before, new.total))
    if priced:
        notes.append("fused ops run where no gradient is wanted, as under torch.no_grad()")
    return Step("lowering", before, new.total, rows, None, True, 0.0, notes)


def _saved(before: Cost, after: Cost) -> str:
    """Launches and traffic as text: a layer's formulas over open sizes are not a whole place's."""
    return (
        f"launches {before.launches} → {after.launches}, "
        f"traffic {fmt.size(before.bytes_moved)} → {fmt.size(after.bytes_moved)} on the example"
    )
