"""The ledger as plain data (`to_dict`, `from_dict`), also at other sizes of the inputs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from typing_extensions import Self

from rewriter.cost import Cost, Device, Snapshot
from rewriter.cost.snapshot import Formulas
from rewriter.cost.symbolic import holds
from rewriter.errors import OptionError, StoreError
from rewriter.report.entries import (
    ERRORS,
    CallForm,
    CaptureInfo,
    Decision,
    Island,
    Step,
    build,
    finite,
    shown,
    step_of,
    tables,
)

__all__ = ["Ledger"]

_FORMAT = 2


@dataclass
class Ledger:
    """The whole ledger as data: what `rewriter.report.Report` prints.

    Args:
        model: class of the model.
        capture: how it became graphs.
        steps: the original, then one per pass.
        errors: one line for each thing that has no known cost.
        device: name of the device that predicted the times; "" without.
        sizes: the sizes of the inputs that may vary, as they were priced.
        ranges: the smallest and largest that the captured graph serves (None: any).
        conditions: of the sizes, under which the costs' formulas hold; empty without formulas.
        speed: of the model as a multiple of the original's, estimated from layers that were timed
            on the machine of the rewrite; None where they are no slower, or were not timed.
        untimed: new layers that were not timed for it: they count as no slower.
        forms: the ways in which the model was called so far, and what runs each.
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
    speed: float | None = None
    untimed: int = 0
    forms: list[CallForm] = field(default_factory=list, compare=False)
    snapshots: list[Snapshot | None] = field(default_factory=list, repr=False, compare=False)
    predictor: Device | None = field(default=None, repr=False, compare=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"forms": [], **state})  # 0.2.0 has none

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
        """Every decision of every pass, in order. Those of the lowering rules, which change how
        the model computes and not what, are in the step "lowering"."""
        return [d for step in self.steps if step.name != "lowering" for d in step.decisions]

    @property
    def replaced(self) -> list[Decision]:
        """The decisions that changed the model."""
        return [d for d in self.decisions if d.changed]

    @property
    def skipped(self) -> list[Decision]:
        """The decisions that left a site as it was, each with its reason."""
        return [d for d in self.decisions if not d.changed]

    @property
    def untaken(self) -> list[Decision]:
        """Weights that no pass of the rewrite takes, each with its reason."""
        return [d for s in self.steps[:1] if s.name == "original" for d in s.decisions]

    @property
    def islands(self) -> list[Island]:
        """The modules that stay Python."""
        return self.capture.islands

    @property
    def lower_bounds(self) -> bool:
        """Whether some part of the model has no known cost, so the totals miss it."""
        return bool(self.islands) or any("lower bound" in line for line in self.errors)

    def at(self, /, device: Device | str | None = None, **sizes: int) -> Self:
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
        return replace(
            own, steps=steps, sizes=new, device=name, predictor=device, speed=None, untimed=0
        )

    def with_formulas(self, around: Mapping[str, int] | None = None) -> Self:
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

    def printable(self) -> Self:
        """The same ledger without what a terminal would obey in place of showing it."""
        return replace(
            self,
            model=shown(self.model),
            capture=shown(self.capture),
            steps=shown(self.steps),
            errors=shown(self.errors),
            device=shown(self.device),
            sizes={shown(k): v for k, v in self.sizes.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, but for errors that are not finite."""
        data: dict[str, Any] = tables(replace(self, snapshots=[], predictor=None))
        del data["snapshots"], data["predictor"]
        return {"format": _FORMAT, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            StoreError: `data` is no report, or of another format.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise StoreError(f"not a report of format {_FORMAT}: save it again with this version")
        if made_here := _NOT_STORED & set(data):
            raise StoreError(f"not a report: {', '.join(sorted(made_here))} cannot be stored")
        _check_figures(data)
        capture = build(CaptureInfo, data.get("capture"))
        capture.islands = [build(Island, island) for island in capture.islands]
        report = build(cls, {**data, "capture": capture}, ignore={"format"})
        report.forms = [build(CallForm, form) for form in report.forms]
        report.steps = [step_of(step) for step in report.steps]
        report.ranges = {k: (v[0], v[1]) for k, v in report.ranges.items()}
        return report

    def to_json(self) -> str:
        return json.dumps(finite(self.to_dict()), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            StoreError: the text is no report.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"not a report: {error}") from error
        return cls.from_dict(data)


_NOT_STORED = frozenset({"snapshots", "predictor"})
_MOST, _FORMULAS = 10**30, 2 << 20
"""The largest figure that a report may hold, and characters of its different formulas."""


def _check_figures(data: Any) -> None:
    """That all numbers are such that arithmetic on them ends, and soon.

    Raises:
        StoreError: one is not finite, negative or too large; or there are too many formulas.
    """
    formulas: set[str] = set()
    level = [("", data, False)]
    while level:
        key, value, inside = level.pop()
        if isinstance(value, dict):
            level += [(k, v, inside or k == "formulas") for k, v in value.items()]
        elif isinstance(value, list):
            level += [(key, v, inside) for v in value]
        elif isinstance(value, str) and inside:
            formulas.add(value)
        elif isinstance(value, int) and not 0 <= value <= _MOST:
            raise StoreError(f"not a report: {key} is {_shown(value)}, which nothing is counted in")
        elif isinstance(value, float) and key not in ERRORS and not abs(value) <= _MOST:
            raise StoreError(f"not a report: {key} is {value}")
    if sum(map(len, formulas)) > _FORMULAS:
        raise StoreError(f"not a report: its formulas take more than {_FORMULAS >> 20} MiB")


def _shown(number: int) -> str:
    return str(number) if abs(number) < 10**40 else f"a number of {number.bit_length()} bits"


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
