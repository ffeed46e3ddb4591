"""The entries of the ledger, and how they are read from tables: steps, decisions, islands."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from rewriter.cost import Cost
from rewriter.errors import StoreError, printable
from rewriter.modules.typed import fits

__all__ = [
    "ERRORS",
    "CaptureInfo",
    "Decision",
    "Island",
    "Step",
    "Timeline",
    "build",
    "finite",
    "shown",
    "step_of",
    "tables",
    "thinned",
]

_DONE = frozenset({"replaced", "installed", "removed", "resized"})


@dataclass(frozen=True)
class Decision:
    """What a step did at one site, and why.

    Args:
        site: dotted name of the module (or of the weight, for a functional call).
        kind: what was there: `linear`, `conv`, …, or the class of one of our layers.
        action: `replaced`, `installed`, `removed` or `resized` where the site changed; `lowered`
            where another op runs it in eval mode; `skipped` where the pass or rule refused,
            `declined` where the engine did (`objective`, `max_error`, no gain).
        reason: one sentence; may be empty for a replacement.
        error: relative error ‖W − W′‖/‖W‖ of the weights; None where not known.
        output_error: relative error of the site's own outputs on calibration rows that nothing was
            fitted to; None without calibration.
        kernel: which implementation runs it.
        before, after: cost of the site alone.
        where: `file:line` of the user's code.
        tokens: rows the example inputs put through the site.
        shape: `in→out` of a linear site, or the like; sites of one shape are listed together.
    """

    site: str
    kind: str
    action: str
    reason: str = ""
    error: float | None = None
    kernel: str = ""
    before: Cost | None = None
    after: Cost | None = None
    where: str = ""
    tokens: int | None = None
    shape: str = ""
    output_error: float | None = None

    @property
    def changed(self) -> bool:
        return self.action in _DONE


@dataclass
class Timeline:
    """Memory over one run: (what runs, bytes alive at its worst moment, weights included).

    Args:
        inference: of a forward.
        training: of forward, backward and update with Adam; empty where that is not known.
    """

    inference: list[tuple[str, int]] = field(default_factory=list)
    training: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class Step:
    """One pass (or `original`, `memory plan`, `lowering`).

    Args:
        name: as the user wrote it.
        before, after: cost of the whole model.
        decisions: one per site that the pass looked at.
        output_error: relative error of the outputs on the example inputs, against the outputs
            before the step; None without example inputs.
        exact: whether the step keeps the function up to rounding.
        seconds: how long the step took.
        notes: sentences the user should read.
        timeline: memory over time after the step; None where it is not known.
    """

    name: str
    before: Cost
    after: Cost
    decisions: list[Decision] = field(default_factory=list)
    output_error: float | None = None
    exact: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    timeline: Timeline | None = None


@dataclass(frozen=True)
class Island:
    """A module that stays Python: `reason` why, and `layers` below it that were still rewritten."""

    fqn: str
    class_name: str
    reason: str
    layers: list[str] = field(default_factory=list)


@dataclass
class CaptureInfo:
    """How the model became graphs: the ladder's `rung`, what stayed Python, for which call."""

    rung: str
    seconds: float = 0.0
    islands: list[Island] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    signature: str = ""


@dataclass
class CallForm:
    """One way in which a model was called, what runs it, and how often it was called.

    Args:
        call: the tensors with their dtypes and sizes; a name (`batch`, `sequence`, or argument and
            dimension, `mask_1`) stands for a size that may vary.
        module: dotted name of the module that is called; "" for the model.
        reason: why Python runs it, where it does.
        seconds: how long the capture took, where it was captured when it first came.
        graph, lowered, planned, python: how many calls ran as the graph, as the graph with fused
            ops, as a training step by the memory plan, and as the original Python; without those
            that `torch.compile` traced.
        planned_peak: bytes of activations, gradients and temporaries at the worst moment of the
            planned steps, by their plans.
    """

    call: str = ""
    module: str = ""
    reason: str = ""
    seconds: float = 0.0
    graph: int = 0
    lowered: int = 0
    planned: int = 0
    python: int = 0
    planned_peak: int = 0

    def reset(self) -> None:
        """Starts to count anew: what ran so far were no calls of the user's."""
        self.graph = self.lowered = self.planned = self.python = self.planned_peak = 0

    @property
    def calls(self) -> int:
        """How often the model was called in this form."""
        return self.graph + self.lowered + self.planned + self.python


T = TypeVar("T")


def build(cls: type[T], data: Any, ignore: Collection[str] = ()) -> T:
    """`cls(**data)`, or a StoreError that says what does not fit.

    Args:
        cls: a dataclass.
        data: its fields, as JSON holds them.
        ignore: keys of `data` that are no fields.
    """
    if not isinstance(data, Mapping):
        raise StoreError(f"not a report: {cls.__name__} is {type(data).__name__}, not a table")
    values = {k: v for k, v in data.items() if k not in ignore}
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise StoreError(f"not a report: {cls.__name__} has no field {', '.join(unknown)[:80]}")
    for name, value in values.items():
        if not fits(value, hints[name]):
            raise StoreError(f"not a report: {name} of {cls.__name__} is {str(value)[:80]!r}")
    try:
        return cls(**values)
    except TypeError as error:
        raise StoreError(f"not a report: {error}") from error


def step_of(data: Any) -> Step:
    step = build(Step, _with_numbers(data))
    step.before, step.after = _cost(step.before), _cost(step.after)
    step.decisions = [_decision(d) for d in step.decisions]
    if step.timeline is not None:
        step.timeline = build(Timeline, step.timeline)
        line = step.timeline
        line.inference = [(label, size) for label, size in line.inference]
        line.training = [(label, size) for label, size in line.training]
    return step


def _decision(data: Any) -> Decision:
    built = build(Decision, _with_numbers(data))
    return replace(
        built,
        before=None if built.before is None else _cost(built.before),
        after=None if built.after is None else _cost(built.after),
    )


ERRORS = ("error", "output_error")
"""Fields whose numbers need not be finite; JSON has them as text then."""


def _with_numbers(data: Any) -> Any:
    """A table whose errors are numbers again."""
    if not isinstance(data, Mapping):
        return data
    texts = {k: v for k, v in data.items() if k in ERRORS and v in ("nan", "inf", "-inf")}
    return {**data, **{k: float(v) for k, v in texts.items()}}


def tables(value: Any) -> Any:
    """Dataclasses as tables, all the way down."""
    if isinstance(value, Cost):
        return value.to_dict()
    if is_dataclass(value):
        return {f.name: tables(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {k: tables(v) for k, v in value.items()}
    return [tables(v) for v in value] if isinstance(value, (list, tuple)) else value


def _cost(data: Any) -> Cost:
    if not isinstance(data, Mapping):
        raise StoreError(f"not a report: a cost is {type(data).__name__}, not a table")
    return Cost.from_dict(data)


def finite(value: Any) -> Any:
    """NaN and ±inf as text, for JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def shown(value: Any) -> Any:
    """Entries as they may be printed: without what a terminal would obey; costs as they are."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, (CaptureInfo, Decision, Island, Step)):
        return replace(value, **{f.name: shown(getattr(value, f.name)) for f in fields(value)})
    return [shown(v) for v in value] if isinstance(value, list) else value


_POINTS = 600  # of a timeline: what a plot can show


def thinned(timeline: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """At most `_POINTS` points of a timeline, the highest of each stretch."""
    step = max(-(-len(timeline) // _POINTS), 1)
    return [max(timeline[i : i + step], key=lambda p: p[1]) for i in range(0, len(timeline), step)]
