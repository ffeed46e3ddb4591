"""`MemoryPlan`: what was decided of every value, why, and what else there would have been."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rewriter.errors import OptionError, StoreError
from rewriter.modules.paths import path_of
from rewriter.planner.budget import MemoryBudget, parse_budget
from rewriter.planner.joint.joint import Joint
from rewriter.planner.search.frontier import Frontier, Point
from rewriter.planner.search.simulate import Decisions, simulate
from rewriter.report.entries import thinned

if TYPE_CHECKING:
    from rewriter.cost import Cost, Training
    from rewriter.report import Step

__all__ = ["CurvePoint", "MemoryPlan", "ValueDecision", "decide"]

_ACTIONS = ("kept", "packed", "closed form", "recomputed")
_NAME = 40  # letters of a layer's name, in print
_SHOWN = 20  # layers and values in print, before the rest is summed


@dataclass(frozen=True)
class ValueDecision:
    """What becomes of one value that the backward needs.

    Args:
        value: name of its node.
        op: the operation that makes it.
        action: "kept", "recomputed", "closed form" or "packed".
        reason: why, or how.
        nbytes: of the value.
        saved: bytes kept for the backward.
        line: the user's line, "" where it is not known.
        layer: dotted name of the module whose forward makes it, "" where it is not known.
    """

    value: str
    op: str
    action: str
    reason: str
    nbytes: int
    saved: int
    line: str = ""
    layer: str = ""


@dataclass(frozen=True)
class CurvePoint:
    """One plan of the Pareto curve.

    Args:
        peak, saved: bytes.
        added: predicted seconds added, over the predicted seconds of a step.
        flops: added.
    """

    peak: int
    saved: int
    added: float
    flops: int


@dataclass
class MemoryPlan:
    """A memory plan of a training step, in plain numbers.

    Args:
        budget: what was asked for, in words.
        peak, saved: bytes alive at the worst moment, and kept for the backward.
        at: the operation of that moment.
        default_peak, default_saved: the same where everything is kept, as autograd does.
        added: predicted seconds added, over the predicted seconds of a step.
        flops: added.
        gap: how far from the best the solver's answers may be (relative, largest of all).
        seconds: that planning took, with the trace of forward and backward.
        values: the decisions.
        curve: all plans worth having, from the fastest to the smallest.
        timeline: (operation, bytes alive), in order.
        gradient_error: measured, of a lossy plan.
        opaque: operations that are taken as they are: custom ones without a derivative to look at.
        solving: of the seconds, those after the trace.
        device: whose times were predicted.
    """

    budget: str
    peak: int
    saved: int
    at: str
    default_peak: int
    default_saved: int
    added: float
    flops: int
    gap: float
    seconds: float
    values: list[ValueDecision] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    timeline: list[tuple[str, int]] = field(default_factory=list)
    gradient_error: float | None = None
    opaque: list[str] = field(default_factory=list)
    solving: float = 0.0
    device: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryPlan:
        """The inverse of `to_dict`."""
        own = dict(data)
        own["values"] = [ValueDecision(**v) for v in own["values"]]
        own["curve"] = [CurvePoint(**c) for c in own["curve"]]
        own["timeline"] = [(n, b) for n, b in own["timeline"]]
        return cls(**own)

    @property
    def lossy(self) -> bool:
        """Some value loses digits."""
        forms = ("as bf16", "as int8", "as int4")
        return any(v.reason in forms or "norm" in v.reason for v in self.values)

    def counts(self) -> dict[str, int]:
        """How many values were kept, recomputed, …"""
        found: dict[str, int] = {}
        for value in self.values:
            found[value.action] = found.get(value.action, 0) + 1
        return found

    def summary(self) -> str:
        """One sentence."""
        counts = ", ".join(f"{n} {action}" for action, n in sorted(self.counts().items()))
        on = f" for {self.device}" if self.device else ""
        return (
            f"peak {_mb(self.peak)} of {_mb(self.default_peak)} "
            f"({self.peak / max(self.default_peak, 1):.0%}), "
            f"saved {_mb(self.saved)} of {_mb(self.default_saved)}, "
            f"{self.added:.1%} more time predicted{on}; values: {counts or 'none'}"
        )

    def __str__(self) -> str:
        return self._text(_SHOWN)

    def _text(self, most: int | None) -> str:
        """The plan by layer and by value: of each the `most` largest, and the rest together."""
        head = f"Memory plan for {self.budget}: {self.summary()}"
        return "\n".join([head, "", *self._by_layer(most), "", *self._by_value(most)])

    def _by_layer(self, most: int | None) -> Iterator[str]:
        """Bytes of the values of every layer, by what becomes of them."""
        layers: dict[str, list[ValueDecision]] = {}
        for value in self.values:
            layers.setdefault(value.layer, []).append(value)
        ordered = sorted(layers.items(), key=lambda row: -sum(v.nbytes for v in row[1]))
        rows = [(name or "(no layer known)", own) for name, own in ordered[:most]]
        if rest := ordered[len(rows) :]:
            rows.append((f"… {len(rest)} more", [v for _, own in rest for v in own]))
        actions = [a for a in _ACTIONS if a in self.counts()]
        figures = "".join(f"{a:>13}" for a in (*actions, "saved"))
        width = min(max(len(name) for name, _ in rows), _NAME) + 2 if rows else _NAME
        yield f"{'layer':{width}}{figures}  where"
        for name, own in [*rows, ("all", self.values)]:
            sizes = [sum(v.nbytes for v in own if v.action == a) for a in actions]
            shown = [f"{_mb(n) if n else '–':>13}" for n in (*sizes, sum(v.saved for v in own))]
            lines = [] if name == "all" else list(dict.fromkeys(v.line for v in own if v.line))
            where = "" if not lines else lines[0] + (f" +{len(lines) - 1}" if lines[1:] else "")
            yield f"{_fitting(name):{width}}{''.join(shown)}  {where}".rstrip()

    def _by_value(self, most: int | None) -> Iterator[str]:
        """What becomes of every value, in the order of the graph."""
        largest = {id(v) for v in sorted(self.values, key=lambda v: -v.nbytes)[:most]}
        rest = [v for v in self.values if id(v) not in largest]
        yield f"{'value':34}{'op':34}{'bytes':>12}{'saved':>12}  decision"
        for v in self.values:
            if id(v) in largest:
                where = f"  {v.line}" if v.line else ""
                yield (
                    f"{v.value[:33]:34}{v.op[:33]:34}{_mb(v.nbytes):>12}{_mb(v.saved):>12}  "
                    f"{v.action}: {v.reason}{where}"
                )
        if rest:
            size = _mb(sum(v.nbytes for v in rest))
            yield f"… {len(rest)} more, together {size}: plan.values has all"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON (.json), the whole tables (.txt) or the curve (.png, .svg, .pdf), by suffix.

        Raises:
            OptionError: another suffix.
            StoreError: the file cannot be written.
        """
        target = path_of(path, "path")
        try:
            if target.suffix == ".json":
                target.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            elif target.suffix == ".txt":
                target.write_text(f"{self._text(None)}\n", encoding="utf-8")
            elif target.suffix in (".png", ".svg", ".pdf"):
                self.plot(target)
            else:
                raise OptionError(f"{target.name}: use .json, .txt, .png, .svg or .pdf")
        except OSError as error:
            raise StoreError(f"cannot write the plan to {target}: {error.strerror}") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """The curve of memory over time, with the chosen plan."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(6, 4))
        axes.step(
            [100 * c.added for c in self.curve],
            [c.peak / 1e6 for c in self.curve],
            where="post",
            marker="o",
            ms=3,
            lw=1,
        )
        axes.plot(
            100 * self.added, self.peak / 1e6, "s", color="C3", label=f"chosen: {self.budget}"
        )
        axes.axhline(self.default_peak / 1e6, color="grey", lw=0.8, ls=":", label="all kept")
        axes.set(xlabel="time added to a step, % (predicted)", ylabel="peak, MB", ylim=(0, None))
        axes.legend()
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    def to_step(self, before: Cost | None = None, inputs: int = 0) -> Step:
        """The plan as a step of a report's ledger.

        Args:
            before: cost of the model.
            inputs: bytes of the example inputs, which a ledger's peaks hold and the plan's do not.
        """
        from rewriter.cost import Cost
        from rewriter.report import Decision, Step

        cost = Cost() if before is None else before
        decisions = [
            Decision(
                site=v.value,
                kind=v.op,
                action=v.action,
                reason=f"{v.reason}; {v.saved:,} of {v.nbytes:,} bytes kept",
                where=v.line,
            )
            for v in self.values
        ]
        notes = [self.summary()]
        if self.gradient_error is not None:
            notes.append(
                f"relative error of the gradients on the example: {self.gradient_error:.2e}"
            )
        elif self.lossy:
            notes.append(
                "the error of the gradients is not known: inside torch.compile there are no "
                "numbers to measure it on, as rewrite(memory_budget=…) does"
            )
        after = replace(cost, training=self._priced(cost.training, inputs))
        exact = not self.lossy
        return Step("memory plan", cost, after, decisions, None, exact, self.seconds, notes)

    def _priced(self, training: Training | None, inputs: int) -> Training | None:
        """What a training step costs by this plan."""
        if training is None:
            return None
        held, latency = training.weight_bytes + inputs + self.peak, training.latency_s
        return replace(
            training,
            flops=training.flops + self.flops,
            macs=training.macs + self.flops // 2,
            saved_bytes=self.saved,
            worst={"saved": self.saved, "workspace": max(self.peak + inputs - self.saved, 0)},
            peaks={name: held + size for name, size in training.optimizers.items()},
            latency_s=None if latency is None else latency * (1 + self.added),
        )


def decide(
    joint: Joint,
    frontier: Frontier,
    budget: MemoryBudget,
    seconds: float,
    granted: int | None = None,
) -> tuple[Decisions, MemoryPlan]:
    """The plan of a frontier that a budget asks for.

    Args:
        joint: the graph.
        frontier: its plans.
        budget: what is asked for.
        seconds: that finding them took.
        granted: bytes that the budget came to on the example inputs, where this is a graph of other
            sizes: these it may take too, and where nothing fits it gets the smallest plan.

    Raises:
        OptionError: no plan is within the budget; says which peak the smallest has.
    """
    step = sum(s.seconds for s in joint.steps)
    amount = parse_budget(budget.peak)
    if budget.step_time is not None:
        point: Point | None = frontier.within((budget.step_time - 1) * step)
    else:
        assert amount is not None
        bound = amount * frontier.default.peak if isinstance(amount, float) else amount
        point = frontier.choose(max(bound, granted or 0))
        if point is None and granted is not None:
            point = frontier.smallest
        if point is None:
            least = frontier.smallest.peak
            share = least / max(frontier.default.peak, 1)
            raise OptionError(
                f"memory_budget: {budget} is not enough for a training step at this batch: the "
                f"smallest peak found is {least:,} bytes ({share:.0%} of {frontier.default.peak:,} "
                f"with everything kept), during {frontier.smallest.simulation.at}. Use at least "
                f"that{'' if budget.lossy else ', lossy=True,'} or a smaller batch"
            )
    assert point is not None
    run = simulate(joint, point.decisions, detail=True)
    default = frontier.default.simulation
    plan = MemoryPlan(
        str(budget),
        point.peak,
        run.saved,
        run.at,
        default.peak,
        default.saved,
        point.seconds / step if step else 0.0,
        run.flops,
        frontier.gap,
        seconds,
        _values(joint, point.decisions, set(run.recomputed)),
        [
            CurvePoint(
                p.peak, p.simulation.saved, p.seconds / step if step else 0.0, p.simulation.flops
            )
            for p in frontier.points
        ],
        thinned([(m.name, m.nbytes) for m in run.timeline]),
        opaque=sorted({s.op for s in joint.steps if s.fixed.startswith("a higher-order")}),
        solving=seconds,
        device=joint.pricing.device.name,
    )
    return point.decisions, plan


def _values(joint: Joint, decisions: Decisions, again: set[int]) -> list[ValueDecision]:
    rows = []
    interesting = joint.needed | decisions.kept | set(decisions.packed) | set(decisions.routes)
    for number in sorted(interesting):
        value = joint.values[number]
        if value.maker is None:
            continue
        step = joint.steps[value.maker]
        saved = 0
        if number in decisions.kept:
            action, saved = "kept", value.nbytes
            reason = step.fixed if step.fixed else "cheaper to keep than to make again"
            if number not in joint.needed:
                reason = "others are made from it"
        elif number in decisions.packed:
            packing = decisions.packed[number]
            action, saved, reason = "packed", packing.nbytes, f"as {packing.kind}"
        elif number in decisions.routes:
            action, reason = "closed form", decisions.routes[number].name
        else:
            action, reason = "recomputed", f"{step.seconds * 1e6:.0f} µs predicted"
        several = len(step.outputs) > 1
        name = f"{value.name}[{step.outputs.index(number)}]" if several else value.name
        where = value.line, value.layer
        rows.append(ValueDecision(name, step.op, action, reason, value.nbytes, saved, *where))
    return rows


def _fitting(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g} MB"
