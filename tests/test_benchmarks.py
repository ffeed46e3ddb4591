"""Every benchmark's short form runs, and what it says about correctness (not about time) holds."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        env=environment, capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def tables(folder: pathlib.Path, name: str) -> dict[str, list[dict[str, Any]]]:
    record: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    found: dict[str, list[dict[str, Any]]] = record["tables"]
    return found


@pytest.mark.timeout(600)
def test_coverage(tmp_path: pathlib.Path) -> None:
    """One architecture of every family: no exception, every linear layer accounted for."""
    run("benchmarks/coverage.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "coverage")
    figures = {row["what"]: row["figure"] for row in found["Summary"]}
    assert figures["exceptions out of rewrite"] == 0
    assert figures["rewritten or skipped with a reason"] == "100.00 %"
    equal = next(v for k, v in figures.items() if k.startswith("outputs equal"))
    assert equal == figures["architectures"] == 8


@pytest.mark.timeout(600)
def test_main_job(tmp_path: pathlib.Path) -> None:
    """Exactness on the real weights, and FLOPs as torch counts them."""
    run("benchmarks/main_job.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "main_job")
    exact = {row["what"]: row["figure"] for row in found["A rewrite without passes"]}
    assert exact["largest difference of an output, eval"] == 0
    assert exact["largest difference of a gradient, train, dropout 0"] == 0
    for row in found["FLOPs of one forward"]:
        assert row["FlopCounterMode"] == row["ledger, what torch counts"] > 0
        assert row["attention on CPU"] > 0


@pytest.mark.timeout(600)
def test_demo() -> None:
    """The demo tells a newcomer what happened, with the model's real scores."""
    printed = run("examples/minilm.py")
    assert "0.7289" in printed
    assert "37 of 37 linear layers" in printed
    assert "bit for bit" in printed
