"""The interop table: docs/interop.md is what the run gives."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import interop.table
import pytest
from interop import group
from interop.clients import CLIENTS
from interop.outcomes import FAILS, REFUSED, WORKS, Outcome, outcome
from interop.recipes import RECIPES, Recipe
from interop.table import markdown, read

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


PAGE = ROOT / "docs/interop.md"


def test_the_page_is_as_it_is_written() -> None:
    """All but what the cells say: the text above, every client and column, notes in their order."""
    cells = read(PAGE.read_text())
    clients = dict.fromkeys(client for client, _ in cells)
    assert [*clients] == [*CLIENTS, *group.CLIENTS]
    table = {
        client: [Outcome(*cells[client, r.name]) for r in RECIPES] for client in clients
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interop.table, "_plain", lambda text: text)  # reasons are read as written
        assert markdown(table) == PAGE.read_text()


@pytest.mark.clients
@pytest.mark.slow
@pytest.mark.timeout(2700)
@pytest.mark.parametrize("part", dict.fromkeys(r.part for r in RECIPES))
def test_the_table_is_what_the_run_gives(part: str, tmp_path: pathlib.Path) -> None:
    """`make interop` writes it anew."""
    path = os.pathsep.join(str(ROOT / p) for p in ("benchmarks", "tests", "tests/helpers"))
    subprocess.run(
        [sys.executable, "-m", "interop", "--part", part, "--out", str(tmp_path / "interop.md")],
        env={**os.environ, "PYTHONPATH": path}, cwd="/", check=True,
    )  # fmt: skip
    columns = [r.name for r in RECIPES if r.part == part]
    want = {k: v for k, v in read(PAGE.read_text()).items() if k[1] in columns}
    got = read((tmp_path / "interop.md").read_text())
    assert WORKS in {status for status, _ in got.values()}
    assert not {k: v for k, v in got.items() if v[0].startswith(FAILS)}
    assert got == want
