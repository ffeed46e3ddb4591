"""What a report says, before it is drawn: sentences and tables, the same for every medium."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rewriter.cost import Cost, Device, Work
from rewriter.cost.machine.datasheets import DATASHEETS
from rewriter.report import format as fmt
from rewriter.report.data import Ledger
from rewriter.report.entries import CallForm, Decision, Step

__all__ = [
    "STEP_ERROR",
    "Grid",
    "Group",
    "Layer",
    "Outcome",
    "bound",
    "calibrated",
    "change",
    "device_of",
    "done",
    "errors_note",
    "every_decision",
    "freezing",
    "is_priced",
    "layers",
    "lower_bounds",
    "outcome",
    "plural",
    "rank",
    "refusals",
    "replaced",
    "roofs",
    "roofs_summary",
    "simulated",
    "slower",
    "slowest",
    "steps",
    "summary",
    "tail",
    "times",
    "times_note",
    "totals",
    "training",
    "untaken",
    "without_empty",
]

OPTIMIZERS = {
    "sgd": "SGD",
    "sgd-momentum": "SGD with momentum",
    "adam": "Adam",
    "adam-8bit": "8-bit Adam",
}
_ROWS = 20  # of a decision table, before sites are grouped
_SLOWEST = 10
_DONE = {"removed": "removed", "resized": "resized"}  # all else is a layer in place of another
_FIGURE = r"\d+(\.\d+)?(e[+-]?\d+)?"


@dataclass(frozen=True)
class Grid:
    """A table before it is drawn; columns from `left` on hold figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    """How many leading columns are words, not figures."""


@dataclass(frozen=True)
class Group:
    """Sites of which one thing is said, whatever its figures: why they were left alone, or what was
    found when they were not."""

    action: str
    reason: str
    members: Sequence[Decision]

    @property
    def varies(self) -> bool:
        return any(d.reason != self.reason for d in self.members)


@dataclass(frozen=True)
class Outcome:
    """The decisions of a step: sites that changed, places that rules fused, what stayed."""

    changed: Sequence[Decision]
    lowered: Sequence[Decision]
    kept: Sequence[Decision]


@dataclass(frozen=True)
class Layer:
    """One site over all steps: its cost before the first and after the last of them."""

    site: str
    kind: str
    changed: bool
    before: Cost | None
    after: Cost | None


# in short


def summary(report: Ledger) -> list[str]:
    """What was done, in sentences."""
    capture = report.capture
    how = f"captured by {capture.rung}"
    if capture.seconds:
        how += f" in {fmt.seconds(capture.seconds)}"
    if capture.islands:
        how += f"; {plural(len(capture.islands), 'part')} left in Python"
    lines = [how]
    if capture.signature:
        lines.append(f"called as {capture.signature}")
    if report.sizes:
        sizes = ", ".join(f"{name} = {size}" for name, size in report.sizes.items())
        lines.append(f"priced at {sizes}")
    rewritten, total = report.coverage()
    if total:
        lines.append(f"{rewritten} of {total} linear layers rewritten")
    elif report.decisions:
        lines.append(f"{plural(len({d.site for d in report.replaced}), 'site')} rewritten")
    if said := slower(report):
        lines.insert(0, said)
    of_steps = [item for step in report.steps for item in simulated(step).items()]
    lines[:0] = [f"{said} ({plural(n, 'layer')})" for said, n in of_steps]
    if said := untaken(report):
        lines.append(said)
    if said := freezing(report):
        lines.append(said)
    errors = [s for s in report.steps if s.output_error is not None]
    if errors:
        worst = max(errors, key=lambda s: rank(s.output_error))
        said = "outputs on the example inputs: "
        if not worst.output_error:
            lines.append(said + "bit for bit as before")
        elif all(s.exact for s in errors):
            lines.append(said + f"as before up to rounding ({fmt.error(worst.output_error)})")
        else:
            lines.append(
                said + f"relative error at most {fmt.error(worst.output_error)} per step "
                f"(largest in {worst.name})"
            )
    return lines


def simulated(step: Step) -> dict[str, int]:
    """What a step computes in floats, as no kernel multiplies its numbers, by the reason that the
    kernels' names give; and of how many layers."""
    found = Counter(d.kernel for d in step.decisions if d.changed and SIMULATED in d.kernel)
    return {f"{step.name} is {k[k.index(SIMULATED) :]}": n for k, n in found.items()}


SIMULATED = "simulated, slower"


def slower(report: Ledger) -> str:
    """That the rewritten model takes longer, and who says so; "" where nobody clearly does."""
    before, after = report.before, report.after
    speed, who = report.speed, "estimated from its layers, timed here"
    if report.untimed:
        who += f"; {plural(report.untimed, 'layer')} not timed, taken as no slower"
    for old, new, how in (
        (before.measured_s, after.measured_s, "measured here"),
        (before.latency_s, after.latency_s, f"predicted for {report.device}"),
    ):
        if speed is None and old is not None and new and old >= SHORTEST:
            speed, who = old / new, how
    if speed is None or speed > CLEARLY:
        return ""
    return f"slower than the original at these sizes: {speed:.2f}× as fast ({who})"


CLEARLY, SHORTEST = 0.95, 1e-3
"""Of the original's speed, above which it may be noise, and seconds of a forward, below which
nobody minds."""
LEAST_LOST = (1 - CLEARLY) * SHORTEST
"""Seconds of a forward that are worth a word where they are lost."""


def freezing(report: Ledger) -> str:
    """Which steps leave fewer parameters to train and more weights that do not, as int8 does, and
    how many still train; "" where none does."""
    known = not any("training cost not known" in line for line in report.errors)
    names = [s.name for s in report.steps if _freezes(s.before, s.after, known)]
    if not names:
        return ""
    left, all_ = _trained(report.after), _trained(report.before)
    return (
        f"weights frozen by {' and '.join(names)}: {left} parameters still train, {all_} before; "
        "figures of training do not compare like with like"
    )


def _freezes(before: Cost, after: Cost, known: bool) -> bool:
    """Whether fewer parameters train, and more do not; where a step has no cost of training and
    that is `known`, nothing trains."""
    old, new = _training(before), _training(after)
    if after.training is None and not known or new >= old:
        return False
    return after.params - new > before.params - old


def _training(cost: Cost) -> int:
    return 0 if cost.training is None else cost.training.trained


def _trained(cost: Cost) -> str:
    return f"{fmt.count(_training(cost))} of {fmt.count(cost.params)}"


def untaken(report: Ledger) -> str:
    """Which layers that multiply no pass takes, and their share of the work; "" without any."""
    priced = is_priced(report.before)
    counted = [d for d in report.untaken if d.kind not in _IDLE]
    if priced:
        counted = [d for d in counted if d.before is not None and d.before.macs]
    if not counted:
        return ""
    sites: dict[str, set[str]] = {}
    for d in report.untaken:
        if d.kind in {c.kind for c in counted}:
            sites.setdefault(d.kind, set()).add(_WEIGHT.sub("", d.site))
    names = ", ".join(
        f"{len(own)} {kind}" if kind != "linear" else plural(len(own), "other product")
        for kind, own in sites.items()
    )
    if not priced or not report.before.macs:
        return f"no pass here takes: {names} (their share of the multiply-adds is not known)"
    share = sum(d.before.macs for d in counted if d.before is not None) / report.before.macs
    part = f"{fmt.percent(share)} of the multiply-adds are in layers"
    return f"{part} that no pass here takes: {names}"


_IDLE = frozenset({"Embedding", "EmbeddingBag", "parameter"})
_WEIGHT = re.compile(r"\.weight\w*$")


def is_priced(cost: Cost) -> bool:
    """Whether more than the weights is known: without example inputs there are no sizes."""
    return bool(cost.launches or cost.bytes_moved)


def lower_bounds(report: Ledger) -> str:
    """Why the totals are lower bounds; "" where they are not."""
    why = []
    if n := sum("lower bound" in line for line in report.errors):
        why.append(f"{plural(n, 'operation')} without a cost formula")
    if report.islands:
        why.append(f"{plural(len(report.islands), 'part')} left in Python")
    return f"totals are lower bounds: {' and '.join(why)}" if why else ""


def totals(report: Ledger) -> Grid:
    """The whole model before and after; a row for every figure that is known on both sides."""
    before, after = report.before, report.after
    priced = is_priced(before) or is_priced(after)
    rows = [
        (name, show(a), show(b), fmt.ratio(a, b))
        if priced or name.startswith("parameter")
        else (name, "–", "–", "–")
        for name, a, b, show in (
            ("parameters", before.params, after.params, fmt.count),
            ("parameter memory", before.param_bytes, after.param_bytes, fmt.size),
            ("multiply-adds per forward", before.macs, after.macs, fmt.count),
            ("memory traffic per forward", before.bytes_moved, after.bytes_moved, fmt.size),
            ("peak memory in inference", before.peak_bytes, after.peak_bytes, fmt.size),
            ("operations launched", before.launches, after.launches, fmt.count),
        )
    ]
    old, new = before.train_peak_bytes, after.train_peak_bytes
    if old is not None and new is not None:
        name = "peak memory in training" + (", weights frozen" if freezing(report) else "")
        rows.append((name, fmt.size(old), fmt.size(new), fmt.ratio(old, new)))
    device = report.device or "no device named"
    for name, a, b, show, compared in (
        (f"predicted time ({device})", before.latency_s, after.latency_s, fmt.seconds, fmt.speed),
        ("measured time (here)", before.measured_s, after.measured_s, fmt.seconds, fmt.speed),
        (f"energy ({device})", before.energy_j, after.energy_j, fmt.joules, fmt.ratio),
    ):
        if a is not None and b is not None:
            rows.append((name, show(a), show(b), compared(a, b)))
    return Grid(("", "before", "after", "change"), rows)


# per step


def _states(report: Ledger) -> list[tuple[str, Cost, Step | None]]:
    """(name, cost, step) of the model as it came and after every step."""
    found: list[tuple[str, Cost, Step | None]] = [(s.name, s.after, s) for s in report.steps]
    if report.steps and report.steps[0].name != "original":
        found.insert(0, ("original", report.before, None))
    return found


def steps(report: Ledger) -> Grid:
    """The model's cost after every step."""
    rows = [
        (
            name,
            fmt.count(cost.params),
            fmt.size(cost.param_bytes),
            *(
                (
                    fmt.count(cost.macs),
                    fmt.size(cost.bytes_moved),
                    fmt.size(cost.peak_bytes),
                    str(cost.launches),
                )
                if is_priced(cost)
                else ("–",) * 4
            ),
            "" if step is None else fmt.error(step.output_error),
            "" if step is None else fmt.seconds(step.seconds),
        )
        for name, cost, step in _states(report)
    ]
    header = "after", "params", "weights", "MACs", "traffic", "peak", "ops", "error", "took"
    return Grid(header, rows)


def calibrated(report: Ledger) -> bool:
    """Whether the times were predicted for the machine that also measured them."""
    return report.device == "this machine"


def times(report: Ledger) -> Grid | None:
    """Predicted and measured time, energy and a training step, after every step."""
    states = _states(report)
    if all(c.latency_s is None and c.measured_s is None for _, c, _ in states):
        return None
    first = report.before
    rows = []
    for name, cost, _ in states:
        predicted, measured, step = cost.latency_s, cost.measured_s, cost.training
        comparable = calibrated(report) and predicted is not None and measured is not None
        rows.append(
            (
                name,
                _shown(predicted, fmt.seconds),
                _against(first.latency_s, predicted),
                _shown(measured, fmt.seconds),
                _against(first.measured_s, measured),
                fmt.off(predicted or 0.0, measured or 0.0) if comparable else "",
                _shown(cost.energy_j, fmt.joules),
                _shown(None if step is None else step.latency_s, fmt.seconds),
            )
        )
    header = "after", "predicted", "speed", "measured", "speed", "off by", "energy", "train"
    return without_empty(Grid(header, rows))


def times_note(report: Ledger) -> str:
    """Whose times they are."""
    predicted = any(c.latency_s is not None for _, c, _ in _states(report))
    measured = any(c.measured_s is not None for _, c, _ in _states(report))
    parts = []
    if predicted:
        parts.append(f"predicted and energy: a roofline model of {report.device or 'a device'}")
        if not calibrated(report):
            parts[-1] += ", not a measurement"
    if measured:
        parts.append("measured: medians on the machine that ran the rewrite")
        if predicted and not calibrated(report):
            parts[-1] += ", which is not the device of the predictions"
    if predicted and any(c.training is not None for _, c, _ in _states(report)):
        parts.append("train: a step with Adam, predicted")
    return "; ".join(parts)


def _shown(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)


def _against(first: float | None, value: float | None) -> str:
    return "" if not first or not value else f"{first / value:.2f}×"


def training(report: Ledger) -> Grid | None:
    """Where the memory of a training step goes, at its worst moment, and per optimizer."""
    old, new = report.before.training, report.after.training
    if old is None or new is None:
        return None
    rows = [("weights and buffers", old.weight_bytes, new.weight_bytes)]
    for key, name in (
        ("gradients", "gradients"),
        ("saved", "saved activations"),
        ("workspace", "workspace"),
    ):
        rows.append((f"{name}, at the worst moment", old.worst.get(key, 0), new.worst.get(key, 0)))
    rows.append(("gradients, all together", old.gradient_bytes, new.gradient_bytes))
    rows.append(("saved activations, all together", old.saved_bytes, new.saved_bytes))
    for title, a, b in (
        ("state of {}", old.optimizers, new.optimizers),
        ("peak with {}", old.peaks, new.peaks),
    ):
        for key in a:
            if key in b:
                rows.append((title.format(OPTIMIZERS.get(key, key)), a[key], b[key]))
    shown = [(n, fmt.size(a), fmt.size(b), fmt.ratio(a, b)) for n, a, b in rows if a or b]
    if old.trained and new.trained:
        many, left = old.trained, new.trained
        row = "parameters that train", fmt.count(many), fmt.count(left), fmt.ratio(many, left)
        shown.insert(0, row)
    return Grid(("training step", "before", "after", "change"), shown)


# which roof binds


def device_of(report: Ledger) -> Device | None:
    """The device that predicted the times, where its figures are at hand.

    A stored report has its name only: the datasheets are looked up, a calibrated machine is not
    (this one may be another).
    """
    if report.predictor is not None or not report.device or calibrated(report):
        return report.predictor
    return DATASHEETS.get(report.device)


def bound(device: Device, cost: Cost, resident: int) -> str:
    """Which roof binds most of the cost's time; "" where nothing runs."""
    shares = _bounds(device, cost.work, resident)
    return max(shares, key=lambda k: shares[k]) if shares else ""


def _bounds(device: Device, work: Iterable[Work], resident: int) -> dict[str, float]:
    """Seconds by the roof that binds."""
    found: dict[str, float] = {}
    for one in work:
        roof = device.bound(one)
        found[roof] = found.get(roof, 0.0) + device.time(one, resident=resident)
    return found


def roofs_summary(report: Ledger) -> str:
    """Shares of the predicted time after the last step by the roof that binds."""
    device, after = device_of(report), report.after
    if device is None or not after.work:
        return ""
    found = _bounds(device, after.work, after.param_bytes)
    whole = math.fsum(found.values())
    if not whole:
        return ""
    ordered = sorted(found.items(), key=lambda f: -f[1])
    return "bound by " + ", ".join(f"{k} {fmt.percent(v / whole)}" for k, v in ordered)


def roofs(report: Ledger) -> Grid | None:
    """Where the predicted time goes, per kind of operation, slowest first."""
    device, before, after = device_of(report), report.before, report.after
    if device is None or not after.work:
        return None
    old: dict[str, float] = {}
    for one in before.work:
        time = device.time(one, resident=before.param_bytes)
        old[one.kind] = old.get(one.kind, 0.0) + time
    new: dict[str, list[Work]] = {}
    for one in after.work:
        new.setdefault(one.kind, []).append(one)
    seconds = {
        kind: math.fsum(device.time(w, resident=after.param_bytes) for w in works)
        for kind, works in new.items()
    }
    whole = math.fsum(seconds.values()) or 1.0
    rows = []
    for kind in sorted({*old, *new}, key=lambda k: (-seconds.get(k, 0.0), -old.get(k, 0.0))):
        works = new.get(kind, [])
        flops = sum(w.count * w.flops for w in works)
        moved = sum(w.count * w.bytes_moved for w in works)
        shares = _bounds(device, works, after.param_bytes)
        rows.append(
            (
                kind.replace("_", " "),
                max(shares, key=lambda k: shares[k]) if shares else "",
                str(sum(w.count for w in works)) if works else "–",
                fmt.count(flops) if flops else "–",
                fmt.size(moved) if works else "–",
                f"{flops / moved:.3g}" if flops and moved else "–",
                fmt.seconds(old[kind]) if kind in old else "–",
                fmt.seconds(seconds[kind]) if works else "–",
                fmt.percent(seconds.get(kind, 0.0) / whole),
            )
        )
    header = (
        "operations", "bound by", "runs", "FLOPs", "traffic", "FLOP/B", "before", "after",
        "share",
    )  # fmt: skip
    return Grid(header, rows, left=2)


# per layer


def layers(report: Ledger) -> list[Layer]:
    """Every site that a step looked at, in order of first sight."""
    found: dict[str, list[Decision]] = {}
    for d in report.decisions:
        found.setdefault(d.site, []).append(d)
    return [
        Layer(
            site,
            f"{members[0].kind} {members[0].shape}".strip(),
            any(d.changed for d in members),
            next((d.before for d in members if d.before is not None), None),
            next((c for d in reversed(members) if (c := d.after or d.before) is not None), None),
        )
        for site, members in found.items()
    ]


def slowest(report: Ledger) -> Grid | None:
    """The layers that take longest after the last step, families of names together."""
    device = device_of(report)
    groups: dict[tuple[str, str], list[Layer]] = {}
    own = [x for x in layers(report) if x.after is not None and x.after.latency_s is not None]
    for layer in own:
        name = re.sub(r"\d+", "*", layer.site) if len(own) > _SLOWEST else layer.site
        groups.setdefault((name, layer.kind), []).append(layer)
    if not groups:
        return None
    rows = []
    ordered = sorted(groups.items(), key=lambda g: -_sum(x.after for x in g[1]))
    for (name, kind), members in ordered[:_SLOWEST]:
        old, new = _sum(x.before for x in members), _sum(x.after for x in members)
        site = members[0].site if len(members) == 1 else f"{name} (×{len(members)})"
        after = members[0].after
        roof = (
            ""
            if device is None or after is None
            else bound(device, after, report.after.param_bytes)
        )
        speed = f"{old / new:.2f}×" if old and new else ""
        rows.append((site, kind, roof, fmt.seconds(old), fmt.seconds(new), speed))
    header = "slowest layers", "was", "bound by", "before", "after", "speed"
    return without_empty(Grid(header, rows, left=3))


def _sum(costs: Iterable[Cost | None]) -> float:
    return math.fsum(c.latency_s or 0.0 for c in costs if c is not None)


def outcome(step: Step) -> Outcome:
    """The decisions of a step by what became of the sites."""
    unchanged = [d for d in step.decisions if not d.changed]
    return Outcome(
        [d for d in step.decisions if d.changed],
        [d for d in unchanged if d.action == "lowered"],
        [d for d in unchanged if d.action != "lowered"],
    )


def done(decisions: Sequence[Decision]) -> str:
    """`2 sites resized`: how many sites changed and how; `changed` where that differs."""
    actions = {_DONE.get(d.action, "replaced") for d in decisions}
    return f"{plural(len(decisions), 'site')} {actions.pop() if len(actions) == 1 else 'changed'}"


def replaced(decisions: Sequence[Decision]) -> Grid:
    """One row per site, worst error first; per family of sites where there are many."""
    groups: dict[tuple[str, ...], list[Decision]] = {}
    many = len(decisions) > _ROWS
    for d in decisions:
        name = re.sub(r"\d+", "*", d.site) if many else d.site
        groups.setdefault((name, d.kind, d.shape, d.action, d.kernel), []).append(d)
    ordered = sorted(groups.items(), key=lambda g: -max(rank(d.error) for d in g[1]))
    rows = []
    for (name, kind, shape, _, kernel), members in ordered[:_ROWS]:
        worst = max(members, key=lambda d: rank(d.error))
        site = members[0].site if len(members) == 1 else f"{name} (×{len(members)})"
        weights = change(members)
        outputs = max((d.output_error for d in members), key=rank)
        errors = fmt.error(worst.error), fmt.error(outputs)
        rows.append((site, f"{kind} {shape}".strip(), kernel, *errors, weights))
    if len(ordered) > _ROWS:
        left = sum(len(members) for _, members in ordered[_ROWS:])
        rows.append((f"… and {left} more, with smaller errors", "", "", "", "", ""))
    error = "worst error" if many else "error"
    header = "site", "was", "kernel", error, "of outputs", "weights"
    return without_empty(Grid(header, rows, left=3))


STEP_ERROR = (
    "error: how far the step moved the outputs on the example inputs, relative to their size"
)


def errors_note(header: Sequence[str]) -> str:
    """What the errors of a table of sites are; "" where no column has any."""
    known = (
        ("error", "error: relative Frobenius error ‖W − W′‖/‖W‖ of the layer's weights"),
        ("of outputs", "of outputs: ‖y − y′‖/‖y‖ of its outputs on calibration rows held out"),
    )
    return "; ".join(said for name, said in known if any(h.endswith(name) for h in header))


def change(decisions: Iterable[Decision]) -> str:
    """Bytes of weights before → after."""
    pairs = [(d.before, d.after) for d in decisions]
    old = sum(a.param_bytes for a, b in pairs if a is not None and b is not None)
    new = sum(b.param_bytes for a, b in pairs if a is not None and b is not None)
    return f"{fmt.size(old)} → {fmt.size(new)}" if old else ""


def refusals(decisions: Iterable[Decision]) -> Iterator[Group]:
    """One group per reason, whatever its figures; the largest first."""
    groups: dict[tuple[str, str], list[Decision]] = {}
    for d in decisions:
        groups.setdefault((d.action, re.sub(_FIGURE, "#", d.reason)), []).append(d)
    for (action, _), members in sorted(groups.items(), key=lambda g: -len(g[1])):
        yield Group(action, members[0].reason, members)


def every_decision(step: Step) -> Grid:
    """All decisions of a step: what changed first, worst error first."""
    rows = [
        (
            d.site,
            f"{d.kind} {d.shape}".strip(),
            d.action,
            d.reason,
            d.kernel,
            d.where,
            fmt.error(d.error) if d.changed else "",
            fmt.error(d.output_error) if d.changed else "",
            change([d]),
            _times_change(d),
        )
        for d in sorted(step.decisions, key=lambda d: (not d.changed, -rank(d.error)))
    ]
    header = "site", "was", "action", "reason", "kernel", "where"
    figures = "error", "of outputs", "weights", "time"
    return without_empty(Grid((*header, *figures), rows, left=6))


def _times_change(d: Decision) -> str:
    old = None if d.before is None else d.before.latency_s
    new = None if d.after is None else d.after.latency_s
    if old is None:
        return ""
    return fmt.seconds(old) if new is None else f"{fmt.seconds(old)} → {fmt.seconds(new)}"


def tail(report: Ledger) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of what the user should know beside the figures."""
    if report.islands:
        lines = []
        for island in report.islands:
            inside = f"; {plural(len(island.layers), 'layer')} inside rewritten"
            name = f"{island.fqn or 'the whole model'} ({island.class_name})"
            lines.append(f"{name}: {island.reason}{inside if island.layers else ''}")
        yield "Left in Python", lines
    if report.capture.notes:
        yield "Capture notes", list(report.capture.notes)
    if len(report.forms) > 1 or any(form.calls for form in report.forms):
        yield "Calls so far", [_form(form) for form in report.forms]
    if report.errors:
        yield "Cost not known", list(report.errors)


def _form(form: CallForm) -> str:
    """One way in which the model was called: what ran how often, and why Python did."""
    planned = f"as planned step with a peak of {fmt.size(form.planned_peak)}"
    ways = (
        (form.planned, planned), (form.lowered, "as graph with fused ops"),
        (form.graph, "as graph"), (form.python, "in Python"),
    )  # fmt: skip
    runs = [f"{n}× {way}" for n, way in ways if n] or ["not yet called"]
    call = f"{form.module}({form.call})" if form.module else form.call
    new = f"; captured when it came, in {fmt.seconds(form.seconds)}" if form.seconds else ""
    if form.reason:
        new = f" ({form.reason})"
    return f"{call or 'any call'}: {', '.join(runs)}{new}"


def rank(error: float | None) -> float:
    """Orders errors: unknown first from below, NaN worst."""
    return -1.0 if error is None else math.inf if math.isnan(error) else error


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def without_empty(grid: Grid) -> Grid:
    """Drops the columns that no row fills."""
    keep = [i for i in range(len(grid.header)) if any(row[i] not in ("", "–") for row in grid.rows)]
    return Grid(
        [grid.header[i] for i in keep],
        [[row[i] for i in keep] for row in grid.rows],
        left=sum(i < grid.left for i in keep),
    )
