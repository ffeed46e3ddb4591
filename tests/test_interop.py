"""The interop table: docs/interop.md is what the run gives."""

from __future__ import annotations

import difflib
import os
import pathlib
import subprocess
import sys

import pytest
from interop.outcomes import FAILS, REFUSED, WORKS, outcome
from interop.recipes import RECIPES, Recipe
from interop.table import markdown

import rewriter.passes
from rewriter import OptionError, Pass
from rewriter.errors import warn

ROOT = pathlib.Path(__file__).parents[1]


def working(recipe: Recipe) -> None:
    warn("that it is slow")


def refusing(recipe: Recipe) -> None:
    raise OptionError("give another k\nas the traceback shows")


def failing(recipe: Recipe) -> None:
    raise KeyError(f"at {hex(id(recipe))}")


def test_a_cell_is_what_its_client_came_to() -> None:
    cells = [outcome(client, RECIPES[0]) for client in (working, refusing, failing)]
    assert [c.status for c in cells] == [WORKS, REFUSED, FAILS]
    assert [c.reason for c in cells] == [
        "that it is slow", "give another k", "KeyError: 'at 0x…'"
    ]  # fmt: skip
    page = markdown({"one": cells[:2], "two": [cells[1], cells[2]]}, RECIPES[:2])
    assert "| one | works[^1] | refused[^2] |" in page
    assert "| two | refused[^2] | fails[^3] |" in page
    assert "\n[^2]: give another k\n[^3]: KeyError" in page


def test_every_pass_has_a_column() -> None:
    shipped = [getattr(rewriter.passes, name) for name in rewriter.passes.__all__]
    used = {type(p) for recipe in RECIPES for p in recipe.passes}
    assert used == {cls for cls in shipped if issubclass(cls, Pass)}


@pytest.mark.clients
@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_the_table_is_what_the_run_gives(tmp_path: pathlib.Path) -> None:
    """`make interop` writes it anew."""
    path = os.pathsep.join(str(ROOT / p) for p in ("benchmarks", "tests", "tests/helpers"))
    subprocess.run(
        [sys.executable, "-m", "interop", "--out", str(tmp_path / "interop.md")],
        env={**os.environ, "PYTHONPATH": path}, cwd="/", check=True,
    )  # fmt: skip
    want = (ROOT / "docs/interop.md").read_text().splitlines()
    got = (tmp_path / "interop.md").read_text().splitlines()
    cells = [c.strip() for line in got if line.startswith("|") for c in line.split("|")]
    assert WORKS in cells
    assert not [c for c in cells if c.startswith(FAILS)]
    assert not [*difflib.unified_diff(want, got, "docs/interop.md", "the run", n=0)]
