"""What speaks against a replacement that a pass proposes: ties, `max_error`, `objective`."""

from __future__ import annotations

import fnmatch
import math
import numbers
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from rewriter.base import Layer, Pass, Phase, Replacement, Skip, Where
from rewriter.capture import Capture
from rewriter.cost import Cost, Device, propagate, storage_cost
from rewriter.engine.batches import Calibration
from rewriter.errors import CalibrationError, OptionError, PassError
from rewriter.layer import ComputedWeight
from rewriter.lowering import Rule, alone
from rewriter.modules.patterns import Pattern
from rewriter.modules.pointwise import inner
from rewriter.modules.running import modes
from rewriter.modules.timing import samples
from rewriter.modules.tree import attribute, has_hooks, submodule
from rewriter.planner.budget import MemoryBudget
from rewriter.sites import CONV, EMBEDDING, LINEAR, MLP, Kind, Site, is_leaf
from rewriter.spellings import (
    adapter_part,
    autocast_at,
    changes_input,
    is_adapter,
    kind_name,
    op_name,
    source_of,
    swaps,
    weight_handler,
)

__all__ = [
    "OBJECTIVES",
    "Ahead",
    "Declined",
    "Options",
    "Proposal",
    "ahead",
    "check_calibrated",
    "check_passes",
    "check_patterns",
    "device_of",
    "objections",
    "ties",
    "sampled",
    "timed",
    "unsafe",
    "unselected",
    "worth",
]

OBJECTIVES = ("latency", "memory", "params")


@dataclass(frozen=True)
class Options:
    """How the engine decides; see `rewriter.rewrite`."""

    objective: str | None = None
    max_error: float | None = None
    where: Where = None
    device: Device | None = None
    measure: bool = False
    calibration: Calibration | None = None
    memory: MemoryBudget | None = None
    lower: tuple[Rule, ...] = ()
    capture_seconds: float = 60.0

    def __post_init__(self) -> None:
        limit, where = self.max_error, self.where
        if self.objective not in (None, *OBJECTIVES):
            raise OptionError(f"objective={self.objective!r}: use None or one of {OBJECTIVES}")
        number = isinstance(limit, numbers.Real) and not isinstance(limit, bool)
        if limit is not None and not (number and limit >= 0):
            raise OptionError(f"max_error={limit!r}: use a number of at least 0, or None")
        most = self.capture_seconds
        number = isinstance(most, numbers.Real) and not isinstance(most, bool)
        if not (number and (0 < most <= sys.maxsize or most == math.inf)):
            raise OptionError(f"capture_seconds={most!r}: use a number of seconds above 0")
        if not (where is None or isinstance(where, str) or callable(where)):
            raise OptionError(
                f"where={where!r}: use a name pattern, a predicate over sites, or None"
            )


def device_of(device: Any) -> Device | None:
    """The device of this name, or the device itself.

    Raises:
        OptionError: it is neither.
    """
    if not (device is None or isinstance(device, str | Device)):
        raise OptionError(f"device={device!r}: use the name of a device, a Device, or None")
    return None if device is None else Device.get(device)


@dataclass
class Proposal:
    """A replacement for a site; `group` names the proposals that stand or fall together, `cut` the
    weight, by identity, that the site no longer shares with what keeps it, `made_at` the kind of
    the site that the layer was proposed for, where that is another one of the group."""

    site: Site
    replacement: Replacement
    group: int = -1
    cut: int | None = None
    made_at: Kind | None = None

    @property
    def kind(self) -> Kind:
        """Of the site that the layer was proposed for."""
        return self.site.kind if self.made_at is None else self.made_at


def check_passes(passes: Sequence[Pass]) -> None:
    """Raises one error that lists everything wrong with a recipe.

    Raises:
        OptionError: something is not a pass, or a pass comes before one of an earlier phase.
    """
    if isinstance(passes, Pass):
        raise OptionError(f"passes must be a list: write [{passes}]")
    if isinstance(passes, torch.Tensor | str | nn.Module) or not isinstance(passes, Sequence):
        raise OptionError(
            f"passes must be a list of passes, not a {type(passes).__name__}: "
            "rewrite(model, passes, example_inputs)"
        )
    problems, disorder = [], ""
    for i, p in enumerate(passes):
        if isinstance(p, type) and issubclass(p, Pass):
            problems.append(f"passes[{i}] is the class {p.__name__}: write {p.__name__}()")
        elif not isinstance(p, Pass):
            problems.append(
                f"passes[{i}] is a {type(p).__name__}, not a pass as Quantize('int8-dynamic') of "
                "rewriter.passes is one"
            )
    valid = [p for p in passes if isinstance(p, Pass)]
    problems += [why for p in valid if (why := _method(p))]
    for p in valid:
        if not (p.where is None or isinstance(p.where, str) or callable(p.where)):
            problems.append(
                f"{p.name}: where={p.where!r} is no name pattern (as 'encoder.*') and no "
                "predicate over sites (as lambda site: site.in_features > 512)"
            )
    for i, later in enumerate(valid):
        for earlier in valid[:i]:
            if earlier.phase > later.phase:
                problems.append(
                    f"{later} ({later.phase.name}) comes after {earlier} ({earlier.phase.name})"
                )
                disorder = f". Phases run {' < '.join(p.name for p in Phase)}"
                break
    if problems:
        raise OptionError(f"impossible passes: {'; '.join(problems)}{disorder}")


def check_calibrated(passes: Sequence[Pass], remedy: str) -> None:
    """Raises where a pass cannot do without calibration, and there is none.

    Raises:
        CalibrationError: names the passes, and the remedy.
    """
    if needing := [str(p) for p in passes if p.needs_calibration]:
        raise CalibrationError(f"{', '.join(needing)} needs calibration: {remedy}")


def _method(rewrite: Pass) -> str:
    """Why a pass does not have exactly one method: `propose` or `plan`."""
    cls = type(rewrite)
    owners = {
        name: next(c.__name__ for c in cls.__mro__ if name in vars(c))
        for name in ("propose", "plan")
    }
    own = [name for name, owner in owners.items() if owner != Pass.__name__]
    if not own:
        return f"{cls.__name__} has neither propose(site) nor plan(view): give it one of them"
    if len(own) == 2:
        return (
            f"{cls.__name__} has both propose(site), of {owners['propose']}, and plan(view), of "
            f"{owners['plan']}: keep one of them"
        )
    patterns = [str(k) for k in rewrite.matches if isinstance(k, Pattern)]
    if patterns and own == ["propose"]:
        return f"{cls.__name__} matches {patterns[0]}, which only a pass with plan(view) may"
    return ""


# selection


def unselected(site: Site, *wheres: Where) -> Skip | None:
    """Why a site is not among the selected ones."""
    for where in wheres:
        if isinstance(where, str) and not fnmatch.fnmatchcase(site.fqn, where):
            return Skip("not selected by where={!r}", where)
        if callable(where) and not where(site):
            return Skip("not selected by where")
    part = adapter_part(site.root, site.fqn)
    if part and not any(isinstance(where, str) and part in where for where in wheres):
        return Skip("an adapter's own weights: to rewrite them, name {} in where=", part)
    return None


def check_patterns(rewrite: Pass, sites: Sequence[Site], *wheres: Where) -> None:
    """Raises OptionError for a name pattern that matches none of the sites there are."""
    names = [s.fqn for s in sites]
    for where in wheres:
        if isinstance(where, str) and names:
            if not any(fnmatch.fnmatchcase(n, where) for n in names):
                shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
                raise OptionError(
                    f"{rewrite}: where={where!r} matches none of its {len(names)} sites: {shown}"
                )


# what keeps the engine itself from replacing a site, whatever the pass


def unsafe(capture: Capture, site: Site, sites: Sequence[Site]) -> Skip | None:
    """Why the engine cannot replace a site.

    Args:
        capture: the model.
        site: in question.
        sites: all that there are.
    """
    module, graphs = site.place, {id(g): r for r, _, g in capture.graphs()}
    if module is capture.root:
        return Skip("the model itself is this layer: wrap it, e.g. in nn.Sequential")
    if module is not None and parametrize.is_parametrized(module):
        return Skip("its parameters are parametrized; remove_parametrizations first")
    if module is not None and any(
        hooks for name, hooks in vars(module).items() if "state_dict" in name and "hooks" in name
    ):
        return Skip("it has state_dict hooks, which the new layer's tensors would not fit")
    for ref in filter(None, (site.weight_ref, site.bias_ref)):
        owner, _, name = ref.rpartition(".")
        if method := weight_handler(capture.root.get_submodule(owner), name):
            return Skip("{} handles its {}, which the new layer does not have", method, name)
    kind = site.parts["down"].kind if site.kind == MLP else site.kind
    plain = kind in (LINEAR, CONV, EMBEDDING)
    if site.weight_ref is None and plain:
        return Skip("its weight is computed in a hook (torch.nn.utils); remove it first")
    if not site.nodes:
        for island in capture.islands:
            if site.fqn in island.layers and capture.rung == "symbolic":
                return Skip("inside {}: {}", island.fqn, island.reason)
            if site.fqn == island.fqn:
                return Skip("{}", island.reason)
        readers = _readers(capture)
        own = [] if module is None else module.parameters(recurse=False)
        used = sorted({op_name(n) for p in own for n in readers.get(id(p), ())})
        if used:
            return Skip("its weight goes into {}, not through the layer", ", ".join(used))
        return Skip("not called with these example_inputs")
    for node in site.nodes:
        region = graphs[id(node.graph)]
        if node.op != "call_module" and region.signature is not None and True not in region.graphs:
            return Skip("called as a function, and train mode is not captured")
        if changes_input(node, capture.root.get_submodule(region.prefix)):
            return Skip("it works in place on a tensor that other code reads")
    if site.kind == MLP:
        called = {n for s in sites if s.fqn == site.fqn and s.kind != MLP for n in s.nodes}
        if called - set(site.nodes):
            return Skip("its down projection {} is also called outside of an MLP", site.fqn)
    return None


# one weight under several names


def ties(
    capture: Capture, proposals: Sequence[Proposal]
) -> tuple[list[Proposal], list[tuple[Proposal, str]]]:
    """Groups the proposals that share a weight: all of its users get one layer, or none does.

    Returns:
        The proposals that stand, those of one weight with one layer and one group; and those that
        do not, each with the reason.
    """
    root = capture.root
    names: dict[int, set[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    readers = _readers(capture)
    shared: dict[tuple[int, int], list[Proposal]] = {}
    for p in proposals:
        if p.site.weight_ref is not None:
            key = id(attribute(root, p.site.weight_ref)), id(p.site.bias)
            shared.setdefault(key, []).append(p)
    refused: list[tuple[Proposal, str]] = []
    for i, ((weight, _), group) in enumerate(shared.items()):
        others = _others(root, group, names.get(weight, set()))
        apart = _may_be_apart(root, group, others)
        cut = sorted(others) if apart and all(p.replacement.cuts_ties for p in group) else []
        reason = _untouched(group, set() if cut else others, readers.get(weight, set()))
        if apart and reason and (remedy := group[0].replacement.tie_remedy):
            reason += f" ({remedy})"
        leader = _leader(group)
        if leader is None and not reason:
            kinds = ", ".join(f"{p.site.fqn} ({kind_name(p.site.kind)})" for p in group)
            reason = f"its weight is shared by {kinds}, and no layer for one serves the others"
        refused += [(p, reason) for p in group if reason]
        for p in group:
            p.group = i
            if leader is not None and p is not leader:  # one layer for all: the tie survives
                layer, note = leader.replacement.layer, f"tied to {leader.site.fqn}"
                p.replacement = Replacement(layer, p.replacement.error, note)
                p.made_at = leader.site.kind
            if cut:
                p.cut = weight
                said = f"{', '.join(cut)} keeps the weight that it was tied to: the tie is cut"
                note = "; ".join(filter(None, (p.replacement.note, said)))
                p.replacement = replace(p.replacement, note=note)
    gone = {id(p) for p, _ in refused}
    return [p for p in proposals if id(p) not in gone], refused


def _leader(group: Sequence[Proposal]) -> Proposal | None:
    """Whose layer takes the places of all that share a weight; None where no layer can."""
    for p in group:
        layer = inner(p.replacement.layer)
        served = {p.site.kind, *(layer.serves if isinstance(layer, Layer) else ())}
        if served >= {other.site.kind for other in group}:
            return p
    return None


def _others(root: nn.Module, group: Sequence[Proposal], names: set[str]) -> set[str]:
    """What has one weight beside the sites of a group, by name."""
    own: set[str] = set()
    others: set[str] = set()
    for site in (p.site for p in group):
        assert site.weight_ref is not None
        owner, _, last = site.weight_ref.rpartition(".")
        own |= {site.weight_ref}
        holder = root.get_submodule(owner)
        if site.module is None and is_leaf(holder):
            others.add(owner)  # the layer that owns it: an embedding, used as the head
        else:
            every = root.named_modules(remove_duplicate=False)
            own |= {f"{n}.{last}" for n, m in every if n and m is holder}
    return others | (names - own)


def _may_be_apart(root: nn.Module, group: Sequence[Proposal], others: set[str]) -> bool:
    """Whether others could keep a weight for which a group of sites gets layers of its own."""
    holders = [root.get_submodule(name.rpartition(".")[0]) for name in others]
    return (
        bool(others)
        and all(isinstance(m, nn.Embedding) for m in holders)
        and all(p.site.place is not None for p in group)
    )


def _untouched(group: Sequence[Proposal], others: set[str], readers: set[fx.Node]) -> str:
    """Why the users of one weight cannot all be rewritten; "" where they can."""
    reading = readers - {n for p in group for n in p.site.nodes}
    ways = {(p.site.transposed, p.site.channels) for p in group}
    if others or reading or len(ways) > 1:
        tied = ", ".join(sorted(others)) or "code that reads it"
        return f"its weight is tied to {tied}: rewritten together or not at all"
    modules = {id(m): m for p in group if (m := p.site.place) is not None}
    if len(modules) > 1 and any(has_hooks(m) for m in modules.values()):
        return "its weight is tied and there are hooks, which one layer for all would mix up"
    return ""


def _readers(capture: Capture) -> dict[int, set[fx.Node]]:
    """By identity of a parameter, the calls that read it by hand."""
    readers: dict[int, set[fx.Node]] = {}
    for region, _, graph in capture.graphs():
        owner = capture.root.get_submodule(region.prefix)
        for node in graph.nodes:
            if node.op == "get_attr":
                tensor = attribute(owner, str(node.target))
                readers.setdefault(id(tensor), set()).update(_end_uses(node))
    return readers


def _end_uses(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that use a parameter, past the transposes in between."""
    for user in node.users:
        if swaps(user) is None:
            yield user
        else:
            yield from _end_uses(user)


# is it better?


def _is_adapted(site: Site) -> bool:
    """Whether an adapter stands around the module at a site."""
    holder = submodule(site.root, site.fqn.rpartition(".")[0])
    return site.module is not None and holder is not None and is_adapter(holder)


def objections(
    p: Proposal, options: Options, old: Cost | None, resident: int, later: Sequence[Pass] = ()
) -> str:
    """Why `max_error`, the objective or a lost bias speaks against a replacement; "" where none
    does.

    Args:
        p: the replacement.
        options: how to decide.
        old: what the site costs now; None where that is not known.
        resident: bytes of all weights of the model.
        later: the passes that follow.
    """
    # of outputs on calibration rows, where there are some: that is what the layer was fitted to
    error = p.replacement.output_error
    error = p.replacement.error if error is None else error
    limit, bias, layer = options.max_error, p.site.bias, p.replacement.layer
    if bias is not None and p.site.module is None:
        if all(bias is not own for own in layer.parameters()):
            return f"its layer has another bias than {p.site.bias_ref}, which would be left over"
    if (
        _is_adapted(p.site)
        and isinstance(layer, Layer)
        and not isinstance(layer, ComputedWeight | nn.Linear)
    ):
        return (
            f"an adapter stands around it, and a {type(layer).__name__} is not linear: merged into "
            "its weight, the adapter would compute something else; merge it first"
        )
    if limit is not None and error is None:
        return f"its error is not known before it runs, so max_error {limit:.3g} cannot be held"
    if limit is not None and error is not None and not error <= limit:
        return f"error {error:.3g} is above max_error {limit:.3g}"
    if options.objective is None:
        return ""
    if options.objective == "latency":
        return _too_slow(p, options, old, resident, later)
    module = p.site.place
    tensors = [] if module is not None or p.site.weight_ref is None else [p.site.weight]
    tensors += [p.site.bias] if tensors and p.site.bias is not None else []
    before = storage_cost(*([module] if module is not None else tensors))
    after = storage_cost(p.replacement.layer)
    if options.objective == "params" and after.params >= before.params:
        return f"{after.params} parameters are no fewer than {before.params}"
    if options.objective == "memory" and after.param_bytes >= before.param_bytes:
        return f"{after.param_bytes} bytes are no fewer than {before.param_bytes}"
    return ""


def _too_slow(
    p: Proposal, options: Options, old: Cost | None, resident: int, later: Sequence[Pass]
) -> str:
    """Why the layer is no faster than the one that it replaces, as later passes will make both."""
    behind = ahead(p, later, options.where)
    before, layer, said = behind or Ahead(None, p.replacement.layer, "")
    if options.device is not None and not options.measure:
        name, latency = options.device.name, None if old is None else old.latency_s
        if latency is not None and before is not None:
            latency = predicted(p.site, before, options.device, resident)
        if latency is None:
            return f"its latency on {name} is not known: no shapes"
        new_us, old_us = predicted(p.site, layer, options.device, resident) * 1e6, latency * 1e6
        found = f"predicted {new_us:.3g} µs on {name}, the layer it replaces {old_us:.3g} µs"
    else:
        times = timed(p.site, layer, before, options.lower)
        if times is None:
            return "its latency cannot be measured here: no data, or no shapes"
        old_us, new_us = (t * 1e6 for t in times)
        found = f"measured {new_us:.0f} µs, the layer it replaces {old_us:.0f} µs"
    return "" if new_us < old_us else found + said


class Ahead(NamedTuple):
    """Two layers as later passes will make them.

    Args:
        old: what becomes of the layer at a site; None where it stays.
        new: what becomes of its replacement.
        said: by which passes, as the end of a sentence.
    """

    old: nn.Module | None
    new: nn.Module
    said: str


def ahead(p: Proposal, later: Sequence[Pass], where: Where) -> Ahead | None:
    """What later passes make of a replacement, and of the layer that stays in its absence, where
    they give other numbers to multiply: that decides which kernels run. None where they leave both
    as they are, or depend on calibration.

    Args:
        p: the replacement.
        later: the passes that follow.
        where: which sites all passes take.

    Raises:
        PassError: a pass failed on one of the layers.
    """
    old, new = p.site.module, inner(p.replacement.layer)
    asked = [
        q
        for q in later
        if q.phase == Phase.PRECISION
        and not (q.plans or q.simulates)
        and unselected(p.site, where, q.where) is None
    ]
    if old is None or not asked or any(q.calibrates or q.samples for q in asked):
        return None
    before, after = (_finished(layer, asked, p.site) for layer in (old, new))
    if before is old and after is new:
        return None
    return Ahead(
        p.site.place if before is old else p.site.fitted(before),
        p.site.fitted(after),
        f", both after {', '.join(map(str, asked))}",
    )


def _finished(layer: nn.Module, passes: Sequence[Pass], at: Site) -> nn.Module:
    for rewrite in passes:
        site = Site.of(layer)
        if site.kind not in rewrite.kinds:
            continue
        try:
            with torch.enable_grad():
                answer = rewrite.propose(site)
        except Exception as error:
            raise PassError(
                f"{rewrite} on the {type(layer).__name__} that an earlier pass leaves at "
                f"{at.fqn!r}: {type(error).__name__}: {error}"
            ) from error
        layer = answer.layer if isinstance(answer, Replacement) else layer
    return layer


class Declined(Exception):
    """A plan that was carried out is not what the user asked for, and is undone."""


def worth(options: Options, before: Cost, after: Cost, error: float | None) -> str:
    """Why `max_error` or the objective speaks against a plan as a whole; "" where none does.

    Args:
        options: how to decide.
        before, after: what the model costs.
        error: of its outputs on the example inputs; None where that is not known.
    """
    limit, objective = options.max_error, options.objective
    if limit is not None and error is None:
        return f"its error is not known before it runs, so max_error {limit:.3g} cannot be held"
    if limit is not None and error is not None and not error <= limit:
        return f"error {error:.3g} of the outputs is above max_error {limit:.3g}"
    if objective is None:
        return ""
    was, now, unit = before.params, after.params, "parameters"
    if objective == "memory":
        was, now, unit = before.param_bytes, after.param_bytes, "bytes"
    if objective == "latency":
        name = "measured_s" if options.measure else "latency_s"
        times = getattr(before, name), getattr(after, name)
        if None in times:
            return "its latency is not known: name a device, or pass measure=True"
        said = f"{'measured' if options.measure else 'predicted'} {times[1] * 1e6:.3g} µs"
        return "" if times[1] < times[0] else f"{said}, before it {times[0] * 1e6:.3g} µs"
    return "" if now < was else f"{now} {unit} are no fewer than {was}"


def predicted(site: Site, layer: nn.Module, device: Device, resident: int) -> float:
    """Seconds that the site's calls in one forward take with this layer, by the cost model.

    Args:
        site: with shapes.
        layer: in its place.
        device: that predicts.
        resident: bytes of the model's weights.
    """
    seconds = 0.0
    for node in site.nodes[: site.calls]:
        source = source_of(node)
        assert isinstance(source, fx.Node)
        graph, holder = fx.Graph(), nn.Module()
        holder.add_module("layer", layer)
        graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
        with autocast_at(node):
            cost = propagate(holder, graph, [source.meta["val"]], training=False).total
        latency = device.priced(cost, resident).latency_s
        assert latency is not None
        seconds += latency
    return seconds


def timed(
    site: Site, layer: nn.Module, old: nn.Module | None = None, rules: Sequence[Rule] = ()
) -> tuple[float, float] | None:
    """Median seconds of the site's calls in one forward, (the old layer, the new one); see
    `sampled`."""
    found = sampled(site, layer, old, rules)
    return None if found is None else (statistics.median(found[0]), statistics.median(found[1]))


def sampled(
    site: Site,
    layer: nn.Module,
    old: nn.Module | None = None,
    rules: Sequence[Rule] = (),
    *,
    only: str = "",
    **how: Any,
) -> tuple[list[float], list[float]] | None:
    """Seconds of the site's calls in one forward, (of the old layer, of the new one): eval mode,
    without gradients, interleaved, on random inputs of the sizes that the example has, and by the
    fused ops that the model would run for the layers: of layers that read the same value (the
    projections of an attention) the share of one, as one op may run for them all.

    None where there are no shapes, or no data on the device.

    Args:
        site: with the old layer.
        layer: the new one, as the model would call it.
        old: what counts as the old one; None for the site as it is.
        rules: by which the model will be lowered.
        only: the one type of device that is timed; "" for any.
        how: options of `samples`.

    Raises:
        VerifyError: a rule's own function fails.
    """
    inputs = []
    for node in site.nodes[: site.calls]:
        source = source_of(node)
        value = source.meta.get("val") if isinstance(source, fx.Node) else None
        if not isinstance(value, Tensor) or value.is_meta or value.is_complex():
            return None
        if not (value.is_floating_point() or site.kind == EMBEDDING):
            return None
        if only not in ("", value.device.type):
            return None
        most = 0 if value.is_floating_point() else site.in_features
        inputs.append((tuple(value.shape), value.dtype, value.device, most))
    tensors = [*layer.parameters(), *layer.buffers()]
    if not inputs or any(t.is_meta for t in tensors):
        return None
    xs = [_random(*kind) for kind in inputs]
    place = site.place if old is None else old
    old_modes = nullcontext() if place is None else modes(place, False)
    with torch.no_grad(), modes(layer, False), old_modes, autocast_at(site.nodes[0]):
        count = 1 if place is None else _alike(site)
        before = _function(site) if place is None else alone(place, xs[0], rules, count)
        after = alone(layer, xs[0], rules, count)
        calls = [partial(_on_each, function, xs) for function in (before, after)]
        found = samples(calls, xs[0].device, **how)
    old_times, new_times = ([t / count for t in own] for own in found)
    return old_times, new_times


def _alike(site: Site) -> int:
    """How many modules of a site's type, itself included, read the value that it reads first."""
    source = source_of(site.nodes[0])
    names = [str(n.target) for n in source.users if n.op == "call_module"]
    return max(1, sum(type(submodule(site.root, n)) is type(site.place) for n in names))


def _on_each(function: Callable[[Tensor], Any], xs: Sequence[Tensor]) -> None:
    for x in xs:
        function(x)


def _function(site: Site) -> Callable[[Tensor], Any]:
    """What runs at a site that has no module."""
    channels = site.channels
    if site.weight_ref is not None:
        weight, bias = site.weight, site.bias
        if channels is not None:
            return lambda x: channels.convolve(x, weight, bias)
        return lambda x: nn.functional.linear(x, weight, bias)
    return site.activated


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device, most: int) -> Tensor:
    """Numbers from 0 to 1; where `most` is given, indices below it."""
    generator = torch.Generator(device).manual_seed(0)
    if most:
        return torch.randint(most, shape, generator=generator, device=device, dtype=dtype)
    return torch.rand(shape, generator=generator, device=device).to(dtype)
