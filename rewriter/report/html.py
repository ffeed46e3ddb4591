"""A `Report` as HTML: one page that needs nothing else, and one element for a notebook.

Everything that comes from the model (names, reasons, paths) is escaped: by Jinja2's autoescape in
the templates and by the XML writer in the plots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from rewriter.cost import Cost
from rewriter.report import content
from rewriter.report import format as fmt
from rewriter.report.content import Grid, Group
from rewriter.report.data import Ledger
from rewriter.report.entries import Decision, Step

__all__ = ["fragment", "page"]


@dataclass(frozen=True)
class Tile:
    """One figure of the page's head."""

    name: str
    after: str
    before: str
    change: str
    better: bool | None


@dataclass(frozen=True)
class Plot:
    """An SVG and the sentence below it."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of the layer table: what is shown and what it is sorted by."""

    text: str
    key: str = ""
    number: bool = False
    title: str = ""


@dataclass(frozen=True)
class Row:
    step: str
    action: str
    changed: bool
    cells: Sequence[Cell]


def page(report: Ledger) -> str:
    """The report as one HTML file: no network, no fonts, light and dark, printable."""
    columns, rows = _rows(report)
    values = {
        "report": report,
        "css": Markup(_file("page.css")),
        "js": Markup(_file("page.js")),
        "summary": content.summary(report),
        "lower_bounds": content.lower_bounds(report),
        "errors": report.errors,
        "tiles": _tiles(report),
        "totals": content.totals(report),
        "bars": list(_bars(report)),
        "steps": content.steps(report) if report.steps else None,
        "step_error": content.STEP_ERROR,
        "times": content.times(report),
        "times_note": content.times_note(report),
        "training": content.training(report),
        "timelines": list(_timelines(report)),
        "roofline": _roofline(report),
        "no_roofline": _no_roofline(report),
        "roofs": content.roofs(report),
        "roofs_summary": content.roofs_summary(report),
        "predictions": _predictions(report),
        "columns": columns,
        "errors_note": content.errors_note([name for name, _ in columns]),
        "rows": rows,
        "names": list(dict.fromkeys(r.step for r in rows)),
        "actions": sorted({r.action for r in rows}),
        "lowered": list(_groups(report, lambda of: of.lowered)),
        "kept": list(_groups(report, lambda of: of.kept)),
        "notes": [(s.name, s.notes) for s in report.steps if s.notes],
        "tail": [(t, lines) for t, lines in content.tail(report) if t != "Cost not known"],
        "version": _version(),
    }
    return _template("page.html").render(values)


def fragment(report: Ledger) -> str:
    """The report as one element, for a notebook: it inherits the notebook's colours."""
    return _template("fragment.html").render(
        report=report,
        css=Markup(_file("fragment.css")),
        summary=content.summary(report),
        lower_bounds=content.lower_bounds(report),
        tables=list(_fragment_tables(report)),
        steps=[
            (
                step,
                ", ".join(_counts(of)),
                replaced,
                content.errors_note(replaced.header) if replaced else "",
                [*content.refusals(of.lowered), *content.refusals(of.kept)],
            )
            for step in report.steps
            if step.decisions or step.notes
            for of in [content.outcome(step)]
            for replaced in [content.replaced(of.changed) if of.changed else None]
        ],
        tail=list(content.tail(report)),
    )


def _counts(of: content.Outcome) -> Iterator[str]:
    """`2 sites replaced`, `3 places fused`, `1 site left as is`, as far as there are any."""
    if of.changed:
        yield content.done(of.changed)
    if of.lowered:
        yield f"{content.plural(len(of.lowered), 'place')} fused"
    if of.kept:
        yield f"{content.plural(len(of.kept), 'site')} left as is"


def _fragment_tables(report: Ledger) -> Iterator[tuple[str, Grid, bool, str]]:
    """(title, table, whether it is open at first, note)."""
    yield "Cost", content.totals(report), True, ""
    if len(report.steps) > 1 or (report.steps and report.steps[0].name != "original"):
        yield "Step by step", content.steps(report), True, content.STEP_ERROR
    for title, grid in (
        ("Time and energy", content.times(report)),
        ("Memory in training", content.training(report)),
        ("Where the predicted time goes", content.roofs(report)),
        ("Layer by layer", content.slowest(report)),
    ):
        if grid is not None:
            yield title, grid, False, ""


# the head


def _tiles(report: Ledger) -> list[Tile]:
    a, b = report.before, report.after
    device = report.device or "a device"
    priced = content.is_priced(a) or content.is_priced(b)
    frozen = ", weights frozen" if content.freezing(report) else ""
    found = [
        _tile("Parameters", a.params, b.params, fmt.count),
        _tile("Parameter memory", a.param_bytes, b.param_bytes, fmt.size),
        _tile("Multiply-adds", a.macs, b.macs, fmt.count) if priced else None,
        _tile("Peak, inference", a.peak_bytes, b.peak_bytes, fmt.size) if priced else None,
        _tile(f"Peak, training (Adam{frozen})", a.train_peak_bytes, b.train_peak_bytes, fmt.size),
        _tile(f"Predicted time, {device}", a.latency_s, b.latency_s, fmt.seconds, fmt.speed),
        _tile("Measured time, here", a.measured_s, b.measured_s, fmt.seconds, fmt.speed),
        _tile(f"Energy, {device}", a.energy_j, b.energy_j, fmt.joules),
    ]
    return [tile for tile in found if tile is not None]


def _tile(
    name: str,
    before: float | None,
    after: float | None,
    show: Callable[[float], str],
    change: Callable[[float, float], str] = fmt.ratio,
) -> Tile | None:
    if before is None or after is None:
        return None
    better = None if before == after else after < before
    return Tile(name, show(after), show(before), change(before, after), better)


# plots


def _svg(text: str) -> Markup:
    return Markup(text)  # made by our own writer, which escapes


def _bars(report: Ledger) -> Iterator[Plot]:
    from rewriter.report import plots

    states = [(s.name, s.after) for s in report.steps]
    if report.steps and report.steps[0].name != "original":
        states.insert(0, ("original", report.before))
    if not states:
        return
    metrics: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("Parameters", "params", fmt.count),
        ("Parameter memory", "param_bytes", fmt.size),
        ("Multiply-adds per forward", "macs", fmt.count),
        ("Memory traffic per forward", "bytes_moved", fmt.size),
        ("Peak memory in inference", "peak_bytes", fmt.size),
        ("Peak memory in training (Adam)", "train_peak_bytes", fmt.size),
        (f"Predicted time on {report.device or 'a device'}", "latency_s", fmt.seconds),
        ("Measured time, here", "measured_s", fmt.seconds),
        (f"Energy on {report.device or 'a device'}", "energy_j", fmt.joules),
    )
    for title, field, show in metrics:
        values = [getattr(cost, field) for _, cost in states]
        if all(v is not None and math.isfinite(v) for v in values) and any(values):
            svg = plots.bars(title, [n for n, _ in states], values, show)
            yield Plot(title, _svg(svg))


def _timelines(report: Ledger) -> Iterator[Plot]:
    from rewriter.report import plots

    known = [s.timeline for s in report.steps if s.timeline is not None]
    if not known:
        return
    first, last = known[0], known[-1]
    for mode, title in (
        ("inference", "Inference"),
        ("training", "One training step, with Adam's state"),
    ):
        old, new = getattr(first, mode), getattr(last, mode)
        if not new:
            continue
        said = [
            f"{name} {fmt.size(size)} at {label or 'an unnamed operation'}"
            for name, points in (("before", old), ("after", new))
            if points
            for label, size in [max(points, key=lambda p: p[1])]
        ]
        note = f"Peak {'; '.join(said)}."
        yield Plot(title, _svg(plots.timeline(old, new, f"Memory over {title}. {note}")), note)


def _roofline(report: Ledger) -> Plot | None:
    from rewriter.report import plots

    device = content.device_of(report)
    if device is None:
        return None
    svg = plots.roofline(device, content.layers(report), (report.before, report.after))
    levels = ", ".join(f"{v.name} {fmt.rate(v.bandwidth, 'B/s')}" for v in reversed(device.levels))
    note = (
        "Each circle is a layer (a larger one stands for several alike), hollow before and full "
        f"after. Slanted roofs, lowest first: {levels}; level roofs: arithmetic. "
        f"Times are the model's predictions. Source of the roofs: {device.source or 'given'}."
    )
    return Plot(f"Roofline of {device.name}", _svg(svg), note) if svg else None


def _no_roofline(report: Ledger) -> str:
    """Why there is no roofline."""
    if not report.device:
        return 'No device was named, so there is no time to predict: pass device="h100", or "this".'
    if content.device_of(report) is None:
        return (
            f"The report was loaded from a file, which keeps the name of its device "
            f"({report.device}) but not its roofs."
        )
    return "No layer of this report has both arithmetic and a predicted time."


def _predictions(report: Ledger) -> Plot | None:
    from rewriter.report import plots

    states = [(s.name, s.after) for s in report.steps]
    if report.steps and report.steps[0].name != "original":
        states.insert(0, ("original", report.before))
    times = [
        plots.Timed(name, cost.latency_s, cost.measured_s)
        for name, cost in states
        if cost.latency_s is not None and cost.measured_s is not None
    ]
    if not times or not content.calibrated(report):
        return None
    note = (
        "On the dashed line the prediction is right; above it, the model is faster than predicted."
    )
    return Plot("Predicted against measured", _svg(plots.predictions(times)), note)


# the layer table


_COLUMNS = (
    ("step", False),
    ("site", False),
    ("was", False),
    ("action", False),
    ("reason", False),
    ("kernel", False),
    ("where", False),
    ("error", True),
    ("of outputs", True),
    ("weights", True),
    ("MACs", True),
    ("time", True),
)


def _rows(report: Ledger) -> tuple[list[tuple[str, bool]], list[Row]]:
    """Columns (name, whether of figures) that some row fills, and one row per decision."""
    short = _short_names(report.steps)
    rows = [
        Row(short[i], d.action, d.changed, _cells(short[i], d))
        for i, step in enumerate(report.steps)
        for d in sorted(step.decisions, key=lambda d: (not d.changed, -content.rank(d.error)))
    ]
    keep = [i for i in range(len(_COLUMNS)) if any(r.cells[i].text for r in rows)]
    rows = [Row(r.step, r.action, r.changed, [r.cells[i] for i in keep]) for r in rows]
    return [_COLUMNS[i] for i in keep], rows


def _short_names(steps: Sequence[Step]) -> list[str]:
    """`Monarch`, `Quantize`, …: a step's class, and its number where that stands twice."""
    names = [s.name.partition("(")[0] or s.name for s in steps]
    return [f"{n} {i}" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _cells(step: str, d: Decision) -> list[Cell]:
    old, new = d.before, d.after
    return [
        Cell(step),
        Cell(d.site.replace(".", ".\u200b")),  # a line may break behind a dot
        Cell(f"{d.kind} {d.shape}".strip()),
        Cell(d.action),
        Cell(d.reason),
        Cell(d.kernel),
        Cell(d.where.replace("\\", "/").rpartition("/")[2], title=d.where),
        *(
            Cell(
                fmt.error(e) if d.changed and e is not None else "",
                _key(e if d.changed else None),
                True,
            )
            for e in (d.error, d.output_error)
        ),
        _change(old, new, "param_bytes", fmt.size),
        _change(old, new, "macs", fmt.count),
        _change(old, new, "latency_s", fmt.seconds),
    ]


def _change(old: Cost | None, new: Cost | None, field: str, show: Callable[[float], str]) -> Cell:
    """before → after, sorted by what it is after."""
    a = None if old is None else getattr(old, field)
    b = None if new is None else getattr(new, field)
    if a is None:
        return Cell("", "", True)
    if b is None or a == b:
        return Cell(show(a), _key(a), True)
    return Cell(f"{show(a)} → {show(b)}", _key(b), True)


def _key(value: float | None) -> str:
    """A number that JavaScript reads; "" where there is none."""
    if value is None:
        return ""
    return f"{value:.6g}" if math.isfinite(value) else "1e308"


def _groups(
    report: Ledger, which: Callable[[content.Outcome], Sequence[Decision]]
) -> Iterator[tuple[str, list[Group]]]:
    """(step, its decisions of one outcome by reason)."""
    for step in report.steps:
        if groups := list(content.refusals(which(content.outcome(step)))):
            yield step.name, groups


# templates


def _file(name: str) -> str:
    return files("rewriter.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template(name: str) -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_file(name))


def _version() -> str:
    from importlib.metadata import version

    return version("rewriter")
