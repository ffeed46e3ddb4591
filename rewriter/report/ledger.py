"""The ledger of a rewrite: what it cost before and after each step, and why each site is as it is.

`Report` is plain data (`to_dict`, `from_dict`); `rewriter.report.render` writes it out.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rewriter.cost import Cost
from rewriter.errors import OptionError, StoreError
from rewriter.report import render

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["CaptureInfo", "Decision", "Island", "Report", "Step"]

_DONE = frozenset({"replaced", "installed"})
_FORMAT = 1


@dataclass(frozen=True)
class Decision:
    """What a step did at one site, and why.

    Args:
        site: dotted name of the module (or of the weight, for a functional call).
        kind: what was there: `linear`, `conv`, …, or the class of one of our layers.
        action: `replaced` or `installed` where the site changed; `skipped` where the pass refused,
            `declined` where the engine did (`objective`, `max_error`).
        reason: one sentence; may be empty for a replacement.
        error: relative error ‖W − W′‖/‖W‖ of the weights; None where not known.
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

    @property
    def changed(self) -> bool:
        return self.action in _DONE


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
    """

    name: str
    before: Cost
    after: Cost
    decisions: list[Decision] = field(default_factory=list)
    output_error: float | None = None
    exact: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


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
class Report:
    """The whole ledger. `print(report)` is readable at 100 columns; `rich.print` adds colour."""

    model: str
    capture: CaptureInfo
    steps: list[Step] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def before(self) -> Cost:
        """Cost of the model as it came."""
        return self.steps[0].before if self.steps else Cost()

    @property
    def after(self) -> Cost:
        """Cost of the model after the last step."""
        return self.steps[-1].after if self.steps else Cost()

    @property
    def decisions(self) -> list[Decision]:
        """Every decision of every step, in order."""
        return [d for step in self.steps for d in step.decisions]

    @property
    def replaced(self) -> list[Decision]:
        """The decisions that changed the model."""
        return [d for d in self.decisions if d.changed]

    @property
    def skipped(self) -> list[Decision]:
        """The decisions that left a site as it was, each with its reason."""
        return [d for d in self.decisions if not d.changed]

    @property
    def islands(self) -> list[Island]:
        """The modules that stay Python."""
        return self.capture.islands

    @property
    def lower_bounds(self) -> bool:
        """Whether some part of the model has no known cost, so the totals miss it."""
        return bool(self.islands) or any("lower bound" in line for line in self.errors)

    def coverage(self, kind: str = "linear") -> tuple[int, int]:
        """(rewritten, all) sites that were of `kind` when a pass first looked at them."""
        first: dict[str, str] = {}
        for decision in self.decisions:
            first.setdefault(decision.site, decision.kind)
        sites = {site for site, was in first.items() if was == kind}
        return len(sites & {d.site for d in self.replaced}), len(sites)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, but for errors that are not finite."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`.

        Raises:
            StoreError: `data` is no report, or of another format.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise StoreError(f"not a report of format {_FORMAT}: save it again with this version")
        capture = _build(CaptureInfo, data.get("capture"))
        capture.islands = [_build(Island, island) for island in capture.islands]
        report = _build(cls, {**data, "capture": capture}, ignore={"format"})
        report.steps = [_step(step) for step in report.steps]
        return report

    def to_json(self) -> str:
        return json.dumps(_finite(self.to_dict()), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`.

        Raises:
            StoreError: the text is no report.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise StoreError(f"not a report: {error}") from error
        return cls.from_dict(data)

    def to_markdown(self) -> str:
        return render.markdown(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as its suffix says: .json, .md or .txt. The file is there whole or
        not at all.

        Raises:
            OptionError: another suffix.
            StoreError: the file cannot be written.
        """
        path = Path(path)
        writers = {".json": self.to_json, ".md": self.to_markdown, ".txt": self.__str__}
        write = writers.get(path.suffix.lower())
        if write is None:
            raise OptionError(
                f"cannot save a report as {path.name!r}: the suffix must be one of "
                f"{', '.join(writers)}"
            )
        text = write().rstrip("\n") + "\n"
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            try:
                draft.write_text(text, encoding="utf-8")
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot write the report to {path}: {error.strerror or error}. Give a file in a "
                f"directory that exists and that you may write to"
            ) from error

    def __str__(self) -> str:
        return render.text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from render.blocks(self)

    def _repr_html_(self) -> str:
        return render.html(self)


T = TypeVar("T")


def _build(cls: type[T], data: Any, ignore: set[str] | None = None) -> T:
    """`cls(**data)`, or a StoreError that says what does not fit."""
    if not isinstance(data, Mapping):
        raise StoreError(f"not a report: {cls.__name__} is {type(data).__name__}, not a table")
    values = {k: v for k, v in data.items() if k not in (ignore or ())}
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise StoreError(f"not a report: {cls.__name__} has no field {', '.join(unknown)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise StoreError(f"not a report: {error}") from error


def _step(data: Any) -> Step:
    step = _build(Step, data)
    step.before, step.after = _cost(step.before), _cost(step.after)
    step.output_error = _number(step.output_error)
    step.decisions = [_decision(d) for d in step.decisions]
    return step


def _decision(data: Any) -> Decision:
    built = _build(Decision, data)
    return Decision(
        **{
            **data,
            "error": _number(built.error),
            "before": None if built.before is None else _cost(built.before),
            "after": None if built.after is None else _cost(built.after),
        }
    )


def _cost(data: Any) -> Cost:
    if not isinstance(data, Mapping):
        raise StoreError(f"not a report: a cost is {type(data).__name__}, not a table")
    return Cost.from_dict(data)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _finite(value: Any) -> Any:
    """NaN and ±inf as text, for JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
