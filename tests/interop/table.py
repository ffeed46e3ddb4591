"""The run of the whole table, and its Markdown."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence

from interop import clients, group
from interop.outcomes import Outcome, outcome
from interop.recipes import RECIPES, Recipe

Table = Mapping[str, Sequence[Outcome]]
"""Client → one outcome per recipe."""

HEAD = """# What rewritten models work with

Every pass and every client, as `make interop` found them: each cell runs a small model rewritten by
the pass through the client, and compares outputs or gradients with the same rewritten model left
alone. *Works* means that they are equal; *refused* that an error says why, as the footnote does. A
footnote at *works* is what the rewriter warned of there. *Numbers* in it are the elements that a
layer's weights have, not bytes: 272 of int8 (scales included) take a third of the bytes of 256 in
float32. Gradient checkpointing and `memory_budget` must also take fewer bytes: of what is kept for
the backward, and at the peak of activations, gradients and temporaries. The models are tiny: speed
is no part of the checks. Passes, models and checks are in [tests/interop](../tests/interop).
"""


def run(names: Iterable[str], recipes: Sequence[Recipe] = RECIPES, said: bool = False) -> Table:
    """Runs the cells of the named clients.

    Args:
        said: prints each client with its seconds as it is done.
    """
    table: dict[str, Sequence[Outcome]] = {}
    wanted = list(names)
    for name in (n for n in wanted if n in clients.CLIENTS):
        began = time.perf_counter()
        table[name] = [outcome(clients.CLIENTS[name], recipe) for recipe in recipes]
        if said:
            print(f"{time.perf_counter() - began:6.1f} s  {name}", flush=True)
    together = {n: c for n, c in group.CLIENTS.items() if n in wanted}
    if together:
        began = time.perf_counter()
        table.update(group.outcomes(together, tuple(recipes)))
        if said:
            print(f"{time.perf_counter() - began:6.1f} s  {', '.join(together)}", flush=True)
    return {name: table[name] for name in wanted}


def markdown(table: Table, recipes: Sequence[Recipe] = RECIPES) -> str:
    """The page: for each part a table of one row per client, one column per recipe; the reasons
    below."""
    notes: dict[str, int] = {}

    def cell(found: Outcome) -> str:
        if not found.reason:
            return found.status
        return f"{found.status}[^{notes.setdefault(found.reason, len(notes) + 1)}]"

    lines = []
    for part in dict.fromkeys(r.part for r in recipes):
        columns = [i for i, r in enumerate(recipes) if r.part == part]
        rows = [
            ["", *(recipes[i].name for i in columns)],
            ["---"] * (len(columns) + 1),
            *([name, *(cell(cells[i]) for i in columns)] for name, cells in table.items()),
        ]
        lines += [f"## {part}", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    foot = [f"[^{number}]: {_plain(reason)}" for reason, number in notes.items()]
    return "\n".join([HEAD, *lines, *foot]).rstrip() + "\n"


def read(page: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(client, recipe) → (status, reason as the page has it) of a page that `markdown` gave."""
    notes = dict(re.findall(r"^\[\^(\d+)\]: (.*)$", page, re.MULTILINE))
    cells: dict[tuple[str, str], tuple[str, str]] = {}
    columns: list[str] = []
    for line in page.splitlines():
        if line.startswith("|"):
            client, *row = (text.strip() for text in line[1:-1].split("|"))
            if not client:
                columns = row
            elif client != "---":
                found = [re.fullmatch(r"(.*?)(?:\[\^(\d+)\])?", text) for text in row]
                cells |= {
                    (client, column): (match[1], notes.get(match[2], ""))
                    for column, match in zip(columns, found, strict=True) if match
                }  # fmt: skip
    return cells


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
