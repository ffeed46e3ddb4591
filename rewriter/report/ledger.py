"""The ledger of a rewrite: what it cost before and after each step, and why each site is as it is.

`Report` is plain data (`to_dict`, `from_dict`); `rewriter.report.render` writes it out.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rewriter.cost import Cost, Device, Snapshot
from rewriter.cost.snapshot import Formulas
from rewriter.cost.symbolic import holds
from rewriter.errors import OptionError, StoreError
from rewriter.report import render

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["CaptureInfo", "Decision", "Island", "Report", "Step", "Timeline"]

_DONE = frozenset({"replaced", "installed"})
_FORMAT = 2


@dataclass(frozen=True)
class Decision:
    """What a step did at one site, and why.

    Args:
        site: dotted name of the module (or of the weight, for a functional call).
        kind: what was there: `linear`, `conv`, …, or the class of one of our layers.
        action: `replaced` or `installed` where the site changed; `lowered` where another op runs
            it in eval mode; `skipped` where the pass or rule refused, `declined` where the engine
            did (`objective`, `max_error`, no gain).
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
class Report:
    """The whole ledger. `print(report)` is readable at 100 columns; `rich.print` adds colour.

    Args:
        model: class of the model.
        capture: how it became graphs.
        steps: the original, then one per pass.
        errors: one line for each thing that has no known cost.
        device: name of the device that predicted the times; "" without.
        sizes: the sizes of the inputs that may vary, as they were priced.
        ranges: the smallest and largest that the captured graph serves (None: any).
        conditions: of the sizes, under which the costs' formulas hold; empty without formulas.
        snapshots, predictor: the model at each step and the device, for `at`; not stored.
    """

    model: str
    capture: CaptureInfo
    steps: list[Step] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    device: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    conditions: list[str] = field(default_factory=list)
    snapshots: list[Snapshot | None] = field(default_factory=list, repr=False, compare=False)
    predictor: Device | None = field(default=None, repr=False, compare=False)

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

    def at(self, device: Device | str | None = None, **sizes: int) -> Report:
        """The same ledger at other sizes of the inputs, e.g. `report.at(batch=32, sequence=512)`.

        Figures come from formulas over the sizes, found on the first call (`with_formulas`). What
        depends on data (errors, measured times) and the timelines are left out. At a size of 1
        what is no copy there is priced as the copy that it is at larger sizes.

        Args:
            device: predicts the times, by name or as a `Device`; the report's own where left out.
            sizes: new sizes by name; the others keep their value. `report.sizes` lists them.

        Raises:
            OptionError: a size that the report does not have or the graph does not serve; or the
                report has no formulas and is not attached to a model any more.
        """
        for name, size in sizes.items():
            if name not in self.sizes:
                known = ", ".join(self.sizes) or "none, as all are fixed"
                near = difflib.get_close_matches(name, self.sizes, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise OptionError(f"no open size is called {name!r}{hint} (open: {known})")
            low, high = self.ranges.get(name, (1, None))
            low = 1 if low <= 2 else low  # export assumes two rows where it was given more than one
            if isinstance(size, bool) or not isinstance(size, int) or size < low:
                raise OptionError(f"{name}={size!r}: use a whole number of at least {low}")
            if high is not None and size > high:
                raise OptionError(f"{name}={size}: the captured graph serves at most {high}")
        new = {**self.sizes, **sizes}
        own = self.with_formulas(new)
        device = self.predictor if device is None else Device.get(device)

        def moved(cost: Cost, model: Cost) -> Cost:
            cost = cost.at(new)
            return cost if device is None else device.priced(cost, model.param_bytes)

        steps = []
        for step in own.steps:
            before, after = step.before, step.after
            decisions = [
                replace(
                    d,
                    before=None if d.before is None else moved(d.before, before),
                    after=None if d.after is None else moved(d.after, after),
                    tokens=None,
                )
                for d in step.decisions
            ]
            steps.append(
                replace(
                    step,
                    before=moved(before, before),
                    after=moved(after, after),
                    decisions=decisions,
                    output_error=None,
                    timeline=None,
                )
            )
        name = "" if device is None else device.name
        return replace(own, steps=steps, sizes=new, device=name, predictor=device)

    def with_formulas(self, around: Mapping[str, int] | None = None) -> Report:
        """The report whose costs hold formulas over the open sizes, as `to_json` then stores them.

        Where the code does one thing for small sizes and another for large ones, so do the
        formulas; `conditions` says when those of this report hold.

        Args:
            around: sizes at which the formulas shall hold; the report's own where left out.

        Raises:
            OptionError: no formulas can be given: the model was captured by parts, its cost depends
                on data, or the report was loaded without formulas for these sizes.
        """
        around = self.sizes if around is None else around
        broken = [c for c in self.conditions if not holds(c, around)]
        if not broken and all(s.after.formulas is not None for s in self.steps):
            return self
        if not self.snapshots or None in self.snapshots:
            raise OptionError(
                f"the stored formulas hold while {broken[0]}"
                if broken
                else "this report cannot be priced at other sizes: it was stored without formulas "
                "(store report.with_formulas() instead), or the model was captured by parts or "
                "with fixed sizes only"
            )
        steps, conditions = [], dict[str, None]()
        first: Formulas | None = None
        for step, snapshot in zip(self.steps, self.snapshots, strict=True):
            assert snapshot is not None
            last = snapshot.formulas(around)
            conditions.update(dict.fromkeys(last.conditions))
            first = first or last
            decisions = [
                replace(
                    d,
                    before=d.before and _with(d.before, first.sites.get(d.site)),
                    after=d.after and _with(d.after, last.sites.get(d.site)),
                )
                for d in step.decisions
            ]
            before, after = _with(step.before, first.total), _with(step.after, last.total)
            steps.append(replace(step, before=before, after=after, decisions=decisions))
            first = last
        return replace(self, steps=steps, conditions=list(conditions))

    def coverage(self, kind: str = "linear") -> tuple[int, int]:
        """(rewritten, all) sites that were of `kind` when a pass first looked at them."""
        first: dict[str, str] = {}
        for decision in self.decisions:
            first.setdefault(decision.site, decision.kind)
        sites = {site for site, was in first.items() if was == kind}
        return len(sites & {d.site for d in self.replaced}), len(sites)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, but for errors that are not finite."""
        data: dict[str, Any] = _tables(replace(self, snapshots=[], predictor=None))
        del data["snapshots"], data["predictor"]
        return {"format": _FORMAT, **data}

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
        report.ranges = {k: (v[0], v[1]) for k, v in report.ranges.items()}
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

    def to_html(self) -> str:
        """One page that needs nothing else: tables, plots, no network."""
        from rewriter.report.html import page  # matplotlib takes a second to import

        return page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as its suffix says: .html, .json, .md or .txt. The file is there whole
        or not at all.

        Raises:
            OptionError: another suffix.
            StoreError: the file cannot be written.
        """
        path = Path(path)
        writers = {
            ".html": self.to_html,
            ".json": self.to_json,
            ".md": self.to_markdown,
            ".txt": self.__str__,
        }
        write = writers.get(path.suffix.lower())
        if write is None:
            raise OptionError(
                f"cannot save a report as {path.name!r}: the suffix must be one of "
                f"{', '.join(writers)}"
            )
        self.write(path, write())

    @staticmethod
    def write(path: Path, text: str) -> None:
        """Writes one text: the file is there whole or not at all.

        Raises:
            StoreError: the file cannot be written.
        """
        text = text.rstrip("\n") + "\n"
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
    if step.timeline is not None:
        step.timeline = _build(Timeline, step.timeline)
        for name in ("inference", "training"):
            points = getattr(step.timeline, name)
            setattr(step.timeline, name, [(label, size) for label, size in points])
    return step


def _decision(data: Any) -> Decision:
    built = _build(Decision, data)
    return Decision(
        **{
            **data,
            "error": _number(built.error),
            "output_error": _number(built.output_error),
            "before": None if built.before is None else _cost(built.before),
            "after": None if built.after is None else _cost(built.after),
        }
    )


def _with(cost: Cost, formulas: Cost | None) -> Cost:
    """A cost with its formulas; what does not depend on sizes (parameters) comes from the cost."""
    if formulas is None:
        return cost
    whole = replace(
        formulas,
        params=cost.params,
        param_bytes=cost.param_bytes,
        peak_bytes=formulas.activation_bytes + (cost.peak_bytes - cost.activation_bytes),
    )
    return replace(cost, formulas=whole)


def _tables(value: Any) -> Any:
    """Dataclasses as tables, all the way down."""
    if isinstance(value, Cost):
        return value.to_dict()
    if is_dataclass(value):
        return {f.name: _tables(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {k: _tables(v) for k, v in value.items()}
    return [_tables(v) for v in value] if isinstance(value, (list, tuple)) else value


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
