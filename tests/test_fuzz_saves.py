"""Damaged saves by the hundred: each loads as its files say, or is refused in words of ours."""

from __future__ import annotations

import pathlib

import pytest
from fuzz import saves, stress
from marks import slow_but


@pytest.mark.parametrize("first", slow_but(range(0, 200, 50), 0))
def test_two_hundred_damaged_saves(tmp_path: pathlib.Path, first: int) -> None:
    known = saves.saves(tmp_path / "known", saves.FEW)
    found = [saves.run(seed, known, tmp_path) for seed in range(first, first + 50)]
    assert [(o.seed, o.base, o.changes, o.wrong) for o in found if o.wrong] == []
    said = [o.said.partition(":")[0] for o in found]
    assert "loaded" in said
    assert said.count("refused") >= 20


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    plain = (f for f in folder.iterdir() if f.is_file() and not f.is_symlink())
    return {f.name: f.read_bytes() for f in plain if f.stat().st_size < 1 << 20}


def test_a_number_makes_the_same_case_again(tmp_path: pathlib.Path) -> None:
    known = saves.saves(tmp_path / "known", saves.FEW[:1])
    for number in range(20):
        made = [tmp_path / f"{number} {twin}" for twin in "ab"]
        for folder in made:
            saves.make(number, known, folder)
        assert contents(made[0]) == contents(made[1])


def test_killed_writers_leave_an_old_or_a_new_save(tmp_path: pathlib.Path) -> None:
    assert stress.kills(12, 0, tmp_path) == 0


def test_two_writers_and_a_reader(tmp_path: pathlib.Path) -> None:
    assert stress.turns(12, 0, tmp_path) == 0
