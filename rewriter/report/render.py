"""A `Report` as text for people: rich blocks (plain text, colour), Markdown, and notebook HTML."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rewriter.report import content
from rewriter.report.content import Grid, Group, plural
from rewriter.report.data import Ledger
from rewriter.report.entries import Step

__all__ = ["blocks", "html", "markdown", "text"]

WIDTH = 100
_UNBROKEN = 12  # letters of a column of words that stay on one line
_NAMES = 6  # of sites that a group names
_JOINTS = re.compile(r"(?<=[(=,])|(?<=\D\.)|(?<=\.)(?!\d)")
_HYPHENS = re.compile(r"(?<=[-_])|(?<=[a-z])(?=[A-Z])")


def blocks(report: Ledger) -> Iterator[RenderableType]:
    """The report as rich renderables, most important first."""
    report = report.printable()
    yield Text.assemble(("Rewrite of ", "bold"), (report.model, "bold cyan"))
    for line in content.summary(report):
        yield Padding(Text(line), (0, 0, 0, 2))
    if said := content.lower_bounds(report):
        yield Padding(Text(f"{said} (below)", style="bold yellow"), (0, 0, 0, 2))
    yield Text()
    yield _Drawn(content.totals(report))
    yield Text()
    if len(report.steps) > 1 or (report.steps and report.steps[0].name != "original"):
        yield Text("Step by step", style="bold")
        yield _Drawn(content.steps(report))
        yield Text(content.STEP_ERROR, style="dim")
        yield Text()
    for title, grid, note in _more(report):
        yield Text(title, style="bold")
        yield _Drawn(grid)
        if note:
            yield Text(note, style="dim")
        yield Text()
    for step in report.steps:
        yield from _step_blocks(step)
    for title, lines in content.tail(report):
        yield Text(title, style="bold yellow" if title == "Cost not known" else "bold")
        for line in lines:
            yield _bullet(line)


def _more(report: Ledger) -> Iterator[tuple[str, Grid, str]]:
    """(title, table, note) of what only some reports know."""
    if (grid := content.times(report)) is not None:
        yield "Time and energy", grid, content.times_note(report)
    if (grid := content.training(report)) is not None:
        yield "Memory in training", grid, ""
    if (grid := content.roofs(report)) is not None:
        title = f"Where the predicted time goes on {report.device}"
        yield title, grid, content.roofs_summary(report)
    if (grid := content.slowest(report)) is not None:
        yield "Layer by layer", grid, ""


def _console(file: io.StringIO) -> Console:
    """Writes the same wherever it runs: terminal, notebook, pipe, `FORCE_COLOR` or not."""
    return Console(
        width=WIDTH,
        file=file,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
        emoji=False,
    )


def text(report: Ledger) -> str:
    """The report as plain text of 100 columns."""
    console = _console(out := io.StringIO())
    for block in blocks(report):
        console.print(block, markup=False, highlight=False)
    lines = (line.rstrip() for line in out.getvalue().splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n")


def html(report: Ledger) -> str:
    """The report as one HTML element, for a notebook."""
    from rewriter.report.html import fragment  # Jinja2: only where it is drawn

    return fragment(report)


def markdown(report: Ledger) -> str:
    """The report as Markdown, with every decision listed."""
    report = report.printable()
    lines = "\n".join(f"- {_md(s)}" for s in content.summary(report))
    parts = [f"# Rewrite of {_md(report.model)}", lines]
    if said := content.lower_bounds(report):
        parts.append(f"**{_md(said)} (below)**")
    parts += ["## Cost", _md_table(content.totals(report))]
    parts += ["## Steps", _md_table(content.steps(report)), _md(content.STEP_ERROR)]
    for title, grid, note in _more(report):
        parts += [f"## {_md(title)}", _md_table(grid)]
        parts += [_md(note)] if note else []
    for step in report.steps:
        if step.decisions or step.notes:
            parts.append(f"## {_md(step.name)}")
        parts += [f"- {_md(note)}" for note in step.notes]
        if step.decisions:
            parts.append(_md_table(grid := content.every_decision(step)))
            parts += [_md(note)] if (note := content.errors_note(grid.header)) else []
    for title, lines_ in content.tail(report):
        parts += [f"## {title}", "\n".join(f"- {_md(line)}" for line in lines_)]
    return "\n\n".join(parts) + "\n"


def _step_blocks(step: Step) -> Iterator[RenderableType]:
    of = content.outcome(step)
    if of.changed:
        yield Text(f"{step.name}: {content.done(of.changed)}", style="bold green")
        yield _Drawn(grid := content.replaced(of.changed))
        if note := content.errors_note(grid.header):
            yield Text(note, style="dim")
        for group in content.refusals(d for d in of.changed if d.reason):
            yield _bullet(_refusal(group))
        yield Text()
    if of.lowered:
        yield Text(f"{step.name}: {plural(len(of.lowered), 'place')} fused", style="bold green")
        for group in content.refusals(of.lowered):
            yield _bullet(_refusal(group))
        yield Text()
    if of.kept:
        untaken = step.name == "original"
        said = f"{plural(len(of.kept), 'site')} left as is"
        if untaken:
            said = f"{plural(len(of.kept), 'place')} with weights that no pass here takes"
        yield Text(f"{step.name}: {said}", style="bold yellow")
        for group in content.refusals(of.kept):
            yield _bullet(_refusal(group))
        yield Text()
    if step.notes:
        yield Text(f"{step.name}: notes", style="bold")
        for note in step.notes:
            yield _bullet(note)
        yield Text()


def _refusal(group: Group) -> str:
    """How many sites, their names, the user's line."""
    reason = group.reason + (" (the first; figures vary)" if group.varies else "")
    names = [f"{d.site} ({d.where})" if d.where else d.site for d in group.members[:_NAMES]]
    if len(group.members) > _NAMES:
        names.append(f"and {len(group.members) - _NAMES} more")
    if group.action == "lowered":  # the reason ends with figures
        return f"{', '.join(names)}: {reason}"
    return f"{group.action}, {reason or 'no reason given'}: {', '.join(names)}"


@dataclass(frozen=True)
class _Drawn:
    """A grid as a table that takes less room where there is less; no column is ever cut off."""

    grid: Grid

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide, narrow = options.max_width >= WIDTH, options.max_width < 80
        padding = (0, 1) if wide else (0, 1, 0, 0)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=padding)
        for i, name in enumerate(self.grid.header):
            words = i < self.grid.left
            longest = max(len(row[i]) for row in (self.grid.header, *self.grid.rows))
            table.add_column(
                Text(name),
                justify="left" if words else "right",
                no_wrap=not narrow and (not words or longest <= _UNBROKEN),
                overflow="fold",
                style="cyan" if i == 0 else None,
            )
        for row in self.grid.rows:
            table.add_row(*map(_Cell, row))
        yield table


@dataclass(frozen=True)
class _Cell:
    """Text of a table; a word wider than its column is broken where names have their joints."""

    text: str

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, Text(self.text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(" ".join(_broken(word, options.max_width) for word in self.text.split(" ")))


def _broken(word: str, width: int) -> str:
    """A word as lines of `width`: broken behind `(`, `=`, `,` and a dot that is no decimal point,
    else behind `-` and `_` and before a capital letter."""
    lines = [""]
    for part in _pieces(_JOINTS, word, width):
        for piece in _pieces(_HYPHENS, part, width):
            if lines[-1] and len(lines[-1]) + len(piece) > width:
                lines.append("")
            lines[-1] += piece
    return "\n".join(lines)


def _pieces(joint: re.Pattern[str], word: str, width: int) -> list[str]:
    return [word] if len(word) <= width else joint.split(word)


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


def _md_table(grid: Grid) -> str:
    rule = ["---" if i < grid.left else "---:" for i in range(len(grid.header))]
    rows = [[_md(cell) for cell in row] for row in (grid.header, *grid.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])
