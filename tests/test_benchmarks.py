"""Every benchmark's short form runs, and what it says about correctness (not about time) holds."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CACHE = tempfile.TemporaryDirectory()  # one calibration of this machine for all that run here


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "REWRITER_CACHE": CACHE.name}
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
def test_ledger_scale(tmp_path: pathlib.Path) -> None:
    """Two giants with few layers, on meta: MACs are those derived by hand, every weight that a
    pass leaves is listed, and both passes make the parameters smaller."""
    run("benchmarks/ledger_scale.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "ledger_scale")
    llama, moe = found["Models"]
    for row in (llama, moe):
        assert row["MACs"] == row["MACs by hand"]
        assert (row["captured"], row["errors"]) == ("whole", 0)
    assert (llama["rewritten"], llama["skipped"]) == (3 * 7 + 1, 0)
    assert (moe["rewritten"], moe["skipped"]) == (3 * 5 + 3 * 3 + 1, 2 * 3)
    for row in (llama, moe):
        sizes = [s["parameter GB"] for s in found["Ledger"] if s["model"] == row["model"]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 3


@pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "chromium-browser"))), reason="no Chromium"
)
@pytest.mark.timeout(600)
def test_report_open(tmp_path: pathlib.Path) -> None:
    """The page opens in a browser, with a row for every decision."""
    run("benchmarks/report_open.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "report_open")
    figures = {row["what"]: row["figure"] for row in found["Page"]}
    assert figures["rows of the layer table"] == 2 * figures["layers of the model"] == 100


@pytest.mark.timeout(600)
def test_report_example(tmp_path: pathlib.Path) -> None:
    """The example writes the report of the real model in three formats."""
    printed = run("examples/report.py", str(tmp_path))
    assert "37 of 37 linear layers rewritten" in printed
    for suffix in ("html", "json", "md"):
        assert (tmp_path / f"report.{suffix}").stat().st_size > 10_000


@pytest.mark.timeout(600)
def test_flops(tmp_path: pathlib.Path) -> None:
    """One architecture of every family: FLOPs of inference and training as torch counts them, and
    no op without a formula."""
    run("benchmarks/flops.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "flops")
    figures = {row["what"]: row["figure"] for row in found["Summary"]}
    assert figures["architectures"] == 8
    assert figures["that could not be priced"] == 0
    assert figures["with an op without formula"] == 0
    assert figures["inference: FLOPs differ from FlopCounterMode"] == 0
    assert figures["training: FLOPs differ from FlopCounterMode"] == 0
    assert figures["with a train graph, of the whole or of parts"] >= 6


@pytest.mark.timeout(600)
def test_memory(tmp_path: pathlib.Path) -> None:
    """Predicted peaks are what is really alive, in inference and in training."""
    run("benchmarks/memory.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "memory")
    assert len(found["Peaks"]) == 2 * 4
    for row in found["Peaks"]:
        assert abs(row["off %"]) <= (1.0 if "LSTM" in row["model"] else 0.0)
        assert row["MemTracker MB"] == pytest.approx(row["tracker MB"], rel=0.02)


@pytest.mark.timeout(600)
def test_latency(tmp_path: pathlib.Path) -> None:
    """Every case is predicted, and the largest batch of a model is not the fastest."""
    run("benchmarks/latency.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "latency")
    own = [r for r in found["Cases"] if r["passes"] == "none"]
    assert len(found["Cases"]) >= 18
    predicted = [r["predicted ms"] for r in own]
    assert predicted == sorted(predicted)
    assert all(p > 0 for p in predicted)


@pytest.mark.timeout(600)
def test_demo(tmp_path: pathlib.Path) -> None:
    """The demo tells a newcomer what happened, with the model's real scores, and draws it."""
    page = tmp_path / "report.html"
    printed = run("examples/minilm.py", "--report", str(page))
    assert "<svg" in page.read_text()
    assert "0.7289" in printed
    assert "37 of 37 linear layers" in printed
    assert "bit for bit" in printed


@pytest.mark.timeout(600)
def test_monarch_speed(tmp_path: pathlib.Path) -> None:
    """Both sides of every ratio run."""
    run("benchmarks/monarch_speed.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "monarch_speed")
    (layer,) = found["Layers"]
    assert layer["arithmetic ×"] == 2
    assert layer["forward, share"] == pytest.approx(layer["forward ×"] / 2)
    found = tables(tmp_path, "monarch_speed_training")
    steps = [row["step"] for row in found["Training steps"]]
    assert steps == ["dense eager", "Monarch N = 4", "Monarch N = 4, bf16"]


@pytest.mark.timeout(600)
def test_monarch_project(tmp_path: pathlib.Path) -> None:
    """On real weights, a fit to a few activations is closer on others than the projection."""
    run("benchmarks/monarch_project.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "monarch_project")
    weights, activations = found["MiniLM, every linear layer of the encoder"]
    assert activations["held-out output error"] < 0.9 * weights["held-out output error"] < 0.9
    assert weights["WordSim-353"] == pytest.approx(0.575, abs=0.01)
    assert 0 < found["One large matrix"][0]["error"] < 1


@pytest.mark.timeout(600)
def test_training_with_monarch(tmp_path: pathlib.Path) -> None:
    """All ways to train end with the same number of steps; the structured one ends dense."""
    run("benchmarks/monarch_train.py", "--quick", "--out", str(tmp_path))
    rows = {row["model"]: row for row in tables(tmp_path, "monarch_train")["After equal steps"]}
    assert rows["Monarch"]["M parameters"] < rows["dense"]["M parameters"]
    ended = rows["Monarch, then dense"]["M parameters"]
    assert ended == pytest.approx(rows["dense"]["M parameters"])
    assert all(1 < row["loss"] < 6 for row in rows.values())
    assert (tmp_path / "monarch_train.png").stat().st_size > 10_000


@pytest.mark.timeout(600)
def test_healing_runs() -> None:
    shown = run("examples/heal_minilm.py", "--quick")
    assert "all 3 steps done" in shown
    assert "SimLex-999: dense 0.4462, healed" in shown
