"""A `Report` as text for people: rich blocks (plain text, colour, HTML) and Markdown."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rewriter.cost import Cost
from rewriter.report import format as fmt

if TYPE_CHECKING:
    from rewriter.report.ledger import Decision, Report, Step

__all__ = ["blocks", "html", "markdown", "text"]

WIDTH = 100
_ROWS = 20  # of a decision table, before sites are grouped
_NAMES = 6  # of sites that a group names
_FIGURE = r"\d+(\.\d+)?(e[+-]?\d+)?"
_CAPTION = "error: how far the step moved the outputs on the example inputs, relative to their size"


@dataclass(frozen=True)
class _Grid:
    """A table before it is drawn; columns from the second on hold figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    """How many leading columns are words, not figures."""


def blocks(report: Report) -> Iterator[RenderableType]:
    """The report as rich renderables, most important first."""
    yield Text.assemble(("Rewrite of ", "bold"), (report.model, "bold cyan"))
    for line in _summary(report):
        yield Padding(Text(line), (0, 0, 0, 2))
    if report.lower_bounds:
        yield Padding(Text(_lower_bounds(report), style="bold yellow"), (0, 0, 0, 2))
    yield Text()
    yield _draw(_totals(report))
    yield Text()
    if len(report.steps) > 1 or (report.steps and report.steps[0].name != "original"):
        yield Text("Step by step", style="bold")
        yield _draw(_steps(report))
        yield Text(_CAPTION, style="dim")
        yield Text()
    for step in report.steps:
        yield from _step_blocks(step)
    for title, lines in _tail(report):
        yield Text(title, style="bold")
        for line in lines:
            yield _bullet(line)


def _console(file: io.StringIO, record: bool = False) -> Console:
    """Writes the same wherever it runs: terminal, notebook, pipe, `FORCE_COLOR` or not."""
    return Console(
        width=WIDTH,
        file=file,
        record=record,
        color_system="truecolor" if record else None,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
        emoji=False,
    )


def text(report: Report) -> str:
    """The report as plain text of 100 columns."""
    console = _console(out := io.StringIO())
    for block in blocks(report):
        console.print(block, markup=False, highlight=False)
    lines = (line.rstrip() for line in out.getvalue().splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n")


def html(report: Report) -> str:
    """The report as one HTML element, for a notebook."""
    console = _console(io.StringIO(), record=True)
    for block in blocks(report):
        console.print(block, markup=False, highlight=False)
    pre = '<pre style="line-height:1.2;font-family:monospace">{code}</pre>'
    return console.export_html(inline_styles=True, code_format=pre)


def markdown(report: Report) -> str:
    """The report as Markdown, with every decision listed."""
    parts = [f"# Rewrite of {_md(report.model)}", "\n".join(f"- {s}" for s in _summary(report))]
    if report.lower_bounds:
        parts.append(f"**{_md(_lower_bounds(report))}**")
    parts += ["## Cost", _md_table(_totals(report)), "## Steps", _md_table(_steps(report))]
    for step in report.steps:
        if step.decisions or step.notes:
            parts.append(f"## {_md(step.name)}")
        parts += [f"- {_md(note)}" for note in step.notes]
        if step.decisions:
            parts.append(_md_table(_every_decision(step)))
    for title, lines in _tail(report):
        parts += [f"## {title}", "\n".join(f"- {_md(line)}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _summary(report: Report) -> list[str]:
    capture = report.capture
    how = f"captured by {capture.rung} in {fmt.seconds(capture.seconds)}"
    if capture.islands:
        how += f"; {_plural(len(capture.islands), 'part')} left in Python"
    lines = [how]
    if capture.signature:
        lines.append(f"called as {capture.signature}")
    rewritten, total = report.coverage()
    if total:
        lines.append(f"{rewritten} of {total} linear layers rewritten")
    elif report.decisions:
        lines.append(f"{_plural(len({d.site for d in report.replaced}), 'site')} rewritten")
    errors = [s for s in report.steps if s.output_error is not None]
    if errors:
        worst = max(errors, key=lambda s: _rank(s.output_error))
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


def _lower_bounds(report: Report) -> str:
    why = []
    if n := sum("lower bound" in line for line in report.errors):
        why.append(f"{_plural(n, 'operation')} without a cost formula")
    if report.islands:
        why.append(f"{_plural(len(report.islands), 'part')} left in Python")
    return f"totals are lower bounds: {' and '.join(why)} (below)"


def _totals(report: Report) -> _Grid:
    before, after = report.before, report.after
    rows = [
        (name, show(a), show(b), fmt.ratio(a, b))
        for name, a, b, show in (
            ("parameters", before.params, after.params, fmt.count),
            ("parameter memory", before.param_bytes, after.param_bytes, fmt.size),
            ("multiply-adds per forward", before.macs, after.macs, fmt.count),
            ("memory traffic per forward", before.bytes_moved, after.bytes_moved, fmt.size),
            ("peak memory in inference", before.peak_bytes, after.peak_bytes, fmt.size),
            ("operations launched", before.launches, after.launches, fmt.count),
        )
    ]
    for name, pick, show in _OPTIONAL:
        old, new = getattr(before, pick), getattr(after, pick)
        if old is not None and new is not None:
            rows.append((name, show(old), show(new), fmt.ratio(old, new)))
    return _Grid(("", "before", "after", "change"), rows)


_OPTIONAL: tuple[tuple[str, str, Any], ...] = (
    ("peak memory in training", "train_peak_bytes", fmt.size),
    ("saved activations", "saved_bytes", fmt.size),
    ("predicted time", "latency_s", fmt.seconds),
    ("measured time", "measured_s", fmt.seconds),
)


def _steps(report: Report) -> _Grid:
    rows = []
    if report.steps and report.steps[0].name != "original":
        rows.append(_step_row("original", report.before, "", ""))
    for step in report.steps:
        took = fmt.seconds(step.seconds)
        rows.append(_step_row(step.name, step.after, fmt.error(step.output_error), took))
    header = "after", "params", "weights", "MACs", "traffic", "peak", "ops", "error", "took"
    return _Grid(header, rows)


def _step_row(name: str, cost: Cost, error: str, took: str) -> tuple[str, ...]:
    return (
        name,
        fmt.count(cost.params),
        fmt.size(cost.param_bytes),
        fmt.count(cost.macs),
        fmt.size(cost.bytes_moved),
        fmt.size(cost.peak_bytes),
        str(cost.launches),
        error,
        took,
    )


def _step_blocks(step: Step) -> Iterator[RenderableType]:
    changed = [d for d in step.decisions if d.changed]
    kept = [d for d in step.decisions if not d.changed]
    if changed:
        yield Text(f"{step.name}: {_plural(len(changed), 'site')} replaced", style="bold green")
        yield _draw(_replaced(changed))
        yield Text()
    if kept:
        yield Text(f"{step.name}: {_plural(len(kept), 'site')} left as is", style="bold yellow")
        for line in _refusals(kept):
            yield _bullet(line)
        yield Text()
    if step.notes:
        yield Text(f"{step.name}: notes", style="bold")
        for note in step.notes:
            yield _bullet(note)
        yield Text()


def _replaced(decisions: Sequence[Decision]) -> _Grid:
    """One row per site, worst error first; per family of sites where there are many."""
    groups: dict[tuple[str, ...], list[Decision]] = {}
    many = len(decisions) > _ROWS
    for d in decisions:
        name = re.sub(r"\d+", "*", d.site) if many else d.site
        groups.setdefault((name, d.kind, d.shape, d.action, d.kernel), []).append(d)
    ordered = sorted(groups.items(), key=lambda g: -max(_rank(d.error) for d in g[1]))
    rows = []
    for (name, kind, shape, _, kernel), members in ordered[:_ROWS]:
        worst = max(members, key=lambda d: _rank(d.error))
        site = members[0].site if len(members) == 1 else f"{name} (×{len(members)})"
        bytes_ = _bytes_change(members)
        rows.append((site, f"{kind} {shape}".strip(), kernel, fmt.error(worst.error), bytes_))
    if len(ordered) > _ROWS:
        left = sum(len(members) for _, members in ordered[_ROWS:])
        rows.append((f"… and {left} more, with smaller errors", "", "", "", ""))
    error = "worst error" if many else "error"
    return _without_empty(_Grid(("site", "was", "kernel", error, "weights"), rows, left=3))


def _bytes_change(decisions: Iterable[Decision]) -> str:
    pairs = [(d.before, d.after) for d in decisions]
    old = sum(a.param_bytes for a, b in pairs if a is not None and b is not None)
    new = sum(b.param_bytes for a, b in pairs if a is not None and b is not None)
    return f"{fmt.size(old)} → {fmt.size(new)}" if old else ""


def _refusals(decisions: Iterable[Decision]) -> Iterator[str]:
    """One line per reason, whatever its figures: how many sites, their names, the user's line."""
    groups: dict[tuple[str, str], list[Decision]] = {}
    for d in decisions:
        groups.setdefault((d.action, re.sub(_FIGURE, "#", d.reason)), []).append(d)
    for (action, _), members in sorted(groups.items(), key=lambda g: -len(g[1])):
        reason = members[0].reason
        if any(d.reason != reason for d in members):
            reason += " (the first; figures vary)"
        names = [f"{d.site} ({d.where})" if d.where else d.site for d in members[:_NAMES]]
        if len(members) > _NAMES:
            names.append(f"and {len(members) - _NAMES} more")
        yield f"{action}, {reason or 'no reason given'}: {', '.join(names)}"


def _every_decision(step: Step) -> _Grid:
    rows = [
        (
            d.site,
            f"{d.kind} {d.shape}".strip(),
            d.action,
            d.reason,
            d.kernel,
            d.where,
            fmt.error(d.error) if d.changed else "",
            _bytes_change([d]),
        )
        for d in sorted(step.decisions, key=lambda d: (not d.changed, -_rank(d.error)))
    ]
    header = "site", "was", "action", "reason", "kernel", "where", "error", "weights"
    return _without_empty(_Grid(header, rows, left=6))


def _tail(report: Report) -> Iterator[tuple[str, list[str]]]:
    if report.islands:
        lines = []
        for island in report.islands:
            inside = f"; {_plural(len(island.layers), 'layer')} inside rewritten"
            name = f"{island.fqn or 'the whole model'} ({island.class_name})"
            lines.append(f"{name}: {island.reason}{inside if island.layers else ''}")
        yield "Left in Python", lines
    if report.capture.notes:
        yield "Capture notes", list(report.capture.notes)
    if report.errors:
        yield "Cost not known", list(report.errors)


def _rank(error: float | None) -> float:
    """Orders errors: unknown first from below, NaN worst."""
    return -1.0 if error is None else math.inf if math.isnan(error) else error


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _without_empty(grid: _Grid) -> _Grid:
    """Drops the columns that no row fills."""
    keep = [i for i in range(len(grid.header)) if any(row[i] not in ("", "–") for row in grid.rows)]
    return _Grid(
        [grid.header[i] for i in keep],
        [[row[i] for i in keep] for row in grid.rows],
        left=sum(i < grid.left for i in keep),
    )


def _draw(grid: _Grid) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for i, name in enumerate(grid.header):
        words = i < grid.left
        table.add_column(
            Text(name),
            justify="left" if words else "right",
            no_wrap=not words,
            overflow="fold",
            style="cyan" if i == 0 else None,
        )
    for row in grid.rows:
        table.add_row(*map(Text, row))
    table.add_section()
    return table


def _bullet(line: str) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text("•"), Text(line))
    return Padding(table, (0, 0, 0, 2))


def _md(value: str) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    special = r"[\\`*|<>\[\]]|(?<!\w)_|_(?!\w)"
    return re.sub(special, lambda match: "\\" + match[0], " ".join(value.split()))


def _md_table(grid: _Grid) -> str:
    rule = ["---" if i < grid.left else "---:" for i in range(len(grid.header))]
    rows = [[_md(cell) for cell in row] for row in (grid.header, *grid.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])
