"""Every benchmark's short form runs, and what it says about correctness (not about time) holds.

All are slow: what they check has sharper tests of its own, which are not.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
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


@pytest.mark.slow
@pytest.mark.clients
@pytest.mark.timeout(600)
def test_coverage(tmp_path: pathlib.Path) -> None:
    """One architecture of every family: no exception, every linear layer accounted for; one
    further model of every library: as promised under both recipes."""
    run("benchmarks/coverage.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "coverage")
    figures = {row["what"]: row["figure"] for row in found["Summary"]}
    assert figures["exceptions out of rewrite"] == 0
    assert figures["rewritten or skipped with a reason"] == "100.00 %"
    equal = next(v for k, v in figures.items() if k.startswith("outputs equal"))
    assert equal == figures["architectures"] == 8
    rows = found["Every further model"]
    assert [row["found"] for row in rows] == [""] * 4
    assert all(row["int8 loads"] == row["Monarch loads"] == "yes" for row in rows)
    assert [row["section"] for row in found["Runs"]] == ["zoo", "further"]


@pytest.mark.slow
@pytest.mark.clients
def test_coverage_keeps_what_a_run_did_not_measure(tmp_path: pathlib.Path) -> None:
    """The tables of the other section, their circumstances, and rows that `--only` leaves out."""
    committed = json.loads((ROOT / "benchmarks/results/coverage.json").read_text())
    before = committed["tables"]
    (tmp_path / "coverage.json").write_text(json.dumps(committed))
    run("benchmarks/coverage.py", "--section", "further", "--only", "in-place",
        "--out", str(tmp_path))  # fmt: skip
    after = tables(tmp_path, "coverage")
    for heading in ("Summary", "Every architecture"):
        assert after[heading] == before[heading]
    rows = {row["model"]: row for row in after["Every further model"]}
    own = rows.pop("in-place")
    assert own["found"] == ""
    assert list(rows.values()) == [r for r in before["Every further model"]
                                   if r["model"] != "in-place"]  # fmt: skip
    *earlier, last = after["Runs"]
    assert earlier == before["Runs"]
    assert last["command"].endswith(f"--section further --only in-place --out {tmp_path}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rewrite_time(tmp_path: pathlib.Path) -> None:
    """Every model is captured whole, computes what it computed, and is in the mean."""
    run("benchmarks/rewrite_time.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "rewrite_time")
    rows = {row["model"]: row for row in found["CPU seconds"]}
    assert list(rows) == ["BERT", "GPT-2", "Gemma-2", "T5", "ViT", "Swin-T"]
    assert all(row["captured"] == "whole" for row in rows.values())
    assert all(row["largest difference"] < 1e-4 for row in rows.values())  # lowered
    mean, largest = (row["figure"] for row in found["Summary"])
    assert largest == max(row["times"] for row in rows.values()) >= mean > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_main_job(tmp_path: pathlib.Path) -> None:
    """Exactness on the real weights, and FLOPs as torch counts them."""
    run("benchmarks/main_job.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "main_job")
    exact = {row["what"]: row["figure"] for row in found["A rewrite without passes"]}
    assert exact["largest difference of an output, eval, not lowered"] == 0
    assert exact["the same, lowered"] < 1e-4
    assert exact["largest difference of a gradient, train, dropout 0"] == 0
    for row in found["FLOPs of one forward"]:
        assert row["FlopCounterMode"] == row["ledger, what torch counts"] > 0
        assert row["attention on CPU"] > 0


@pytest.mark.slow
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
    rewritten, skipped, none = "rewritten", "skipped", "taken by no pass"  # embedding, experts
    assert (llama[rewritten], llama[skipped], llama[none]) == (3 * 7 + 1, 0, 1)
    assert (moe[rewritten], moe[skipped], moe[none]) == (3 * 5 + 3 * 3 + 1, 0, 1 + 2 * 3)
    for row in (llama, moe):
        sizes = [s["parameter GB"] for s in found["Ledger"] if s["model"] == row["model"]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 3


@pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "chromium-browser"))), reason="no Chromium"
)
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_report_open(tmp_path: pathlib.Path) -> None:
    """The page opens in a browser, with a row for every decision."""
    run("benchmarks/report_open.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "report_open")
    figures = {row["what"]: row["figure"] for row in found["Page"]}
    assert figures["rows of the layer table"] == 2 * figures["layers of the model"] == 100


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_report_example(tmp_path: pathlib.Path) -> None:
    """The example writes the report of the real model in three formats."""
    printed = run("examples/report.py", str(tmp_path))
    assert "37 of 37 linear layers rewritten" in printed
    for suffix in ("html", "json", "md"):
        assert (tmp_path / f"report.{suffix}").stat().st_size > 10_000


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory(tmp_path: pathlib.Path) -> None:
    """Predicted peaks are what is really alive, in inference and in training."""
    run("benchmarks/memory.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "memory")
    assert len(found["Peaks"]) == 2 * 4
    for row in found["Peaks"]:
        assert abs(row["off %"]) <= (1.0 if "LSTM" in row["model"] else 0.0)
        assert row["MemTracker MB"] == pytest.approx(row["tracker MB"], rel=0.02)


@pytest.mark.slow
@pytest.mark.clients
@pytest.mark.timeout(600)
def test_budget_clients(tmp_path: pathlib.Path) -> None:
    """Every client trains by the plan, with its peak, to the parameters of eager training; but for
    one that checkpoints by itself, which is told so."""
    run("benchmarks/budget_clients.py", "--quick", "--out", str(tmp_path))
    rows = tables(tmp_path, "budget_clients")["Clients"]
    assert len(rows) == 14
    for row in rows:
        done, _, steps = row["steps by plan"].partition(" of ")
        assert row["parameters"] == "equal"
        if "checkpointing" in row["client"]:
            assert "checkpoints" in row["said"]
            continue
        assert done == steps
        assert abs(row["off %"]) <= 2
        assert not row["said"]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo(tmp_path: pathlib.Path) -> None:
    """The demo tells a newcomer what happened, with the model's real scores, and draws it."""
    page = tmp_path / "report.html"
    printed = run("examples/minilm.py", "--report", str(page), "--quick")
    assert "<svg" in page.read_text()
    assert "0.7289" in printed
    assert "37 of 37 linear layers" in printed
    assert "bit for bit" in printed
    assert "without healing, Monarch scores" in printed


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_monarch_int8(tmp_path: pathlib.Path) -> None:
    """All sides of every ratio run."""
    run("benchmarks/monarch_int8.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "monarch_int8")
    assert [row["rows"] for row in found["Layers"]] == [4, 1]
    ratios = [row["Monarch + int8 × over int8"] for row in found["Layers"]]
    (narrow,) = found["Over int8 alone"]
    assert narrow["least × over int8"] == min(ratios)
    (model,) = found["Models"]
    assert model["model"] == "BERT-base"
    assert 0 <= model["Monarch layers kept"] <= 6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_monarch_project(tmp_path: pathlib.Path) -> None:
    """On real weights, a fit to a few activations is closer on others than the projection."""
    run("benchmarks/monarch_project.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "monarch_project")
    weights, activations = found["MiniLM, every linear layer of the encoder"]
    assert activations["held-out output error"] < 0.9 * weights["held-out output error"] < 0.9
    assert weights["WordSim-353"] == pytest.approx(0.7002, abs=0.002)  # one layer of six
    assert 0 < found["One large matrix"][0]["error"] < 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_with_monarch(tmp_path: pathlib.Path) -> None:
    """All ways to train learn; the structured one ends dense; a finished training is not run
    again, and new times leave the losses as they are."""
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = ("benchmarks/monarch_train.py", "--quick", "--out", str(out), "--work", str(work))
    first = run(*arguments)
    found = tables(out, "monarch_train")
    rows = {row["model"]: row for row in found["Trainings"]}
    assert rows["Monarch"]["M parameters"] < rows["dense"]["M parameters"]
    ended = rows["Monarch, then dense"]["M parameters"]
    assert ended == pytest.approx(rows["dense"]["M parameters"])
    assert all(1 < row["loss"] < 5 for row in rows.values())
    assert all(c["losses"][-1] < c["losses"][0] for c in found["Curves"])
    assert rows["dense"]["time over dense's"] == rows["dense"]["loss over dense's"] == 1
    assert (out / "monarch_train.png").stat().st_size > 10_000

    assert first.count(", seed 0,") == len(rows) == 6
    assert ", seed 0," not in run(*arguments)
    retimed = run("benchmarks/monarch_train.py", "--retime", "--out", str(out))
    assert ", seed 0," not in retimed
    again = tables(out, "monarch_train")
    assert again["Curves"] == found["Curves"]
    assert again["Learning rates"] == found["Learning rates"]
    assert again["Seconds"] != found["Seconds"]
    for row in again["Trainings"]:
        assert row["loss"] == rows[row["model"]]["loss"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_healing_runs() -> None:
    shown = run("examples/heal_minilm.py", "--quick")
    assert "all 3 steps done" in shown
    assert "SimLex-999: dense 0.4462, healed" in shown


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_backend(tmp_path: pathlib.Path) -> None:
    """What the backend compiles is what `rewrite` and torch.compile give, over many shapes."""
    run("benchmarks/backend.py", "--quick", "--out", str(tmp_path), "--part", "equality",
        "--part", "speed", "--part", "training", "--part", "neighbours",
        "--part", "shapes")  # fmt: skip
    found = tables(tmp_path, "backend")
    for row in found["Elementwise neighbours"]:
        assert 0 < row["our operations %"] < 100
    (row,) = found["Equality"]
    assert row["no pass: off rewrite + compile"] < 1e-5
    assert row["int8: off rewrite + compile"] < 1e-5
    assert row["layers in int8"] == 13
    assert row["gradients: off float64"] < 2 * row["eager's: off float64"] + 1e-6
    for row in found["Twenty shapes"]:
        assert row["compilations"] <= 2
        # in int8 a level may be the next one, where fused operations round otherwise
        assert row["largest difference"] < (1e-2 if row["passes"] == "int8" else 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_backend_example() -> None:
    """The real model in int8, its weights changed, and a few steps of training."""
    shown = run("examples/compile_backend.py")
    assert "37 layers in int8" in shown
    assert ", 1 compilation" in shown
    losses = [float(line.split()[-1]) for line in shown.splitlines() if "loss" in line]
    assert losses[-1] < losses[0]
    assert "6 MLPs keep a quarter" in shown


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_planner(tmp_path: pathlib.Path) -> None:
    """Plans have eager's gradients bit for bit, the peaks that were predicted and budgets that are
    kept; they match PyTorch's options at their own peaks; every part runs."""
    run("benchmarks/planner.py", "--quick", "--only", "gpt", "--out", str(tmp_path))
    found = tables(tmp_path, "planner")
    rows = found["Budgets"]
    assert [row["budget %"] for row in rows] == [100, 70, 40, 10]
    assert all(row["largest gradient difference"] == 0 for row in rows)
    assert all(abs(row["off %"]) < 0.1 for row in rows)
    assert [row["within"] for row in rows[:2]] == ["yes", "yes"]
    assert all(row["% of kept"] <= row["budget %"] for row in rows if row["within"] == "yes")
    peaks = [row["measured MB"] for row in rows]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[-1]
    peers = {
        row["what"]: row for row in found["PyTorch's options, and the planner at the same peak"]
    }
    for name in ("torch 0.9", "torch 0.5", "checkpoint"):
        assert peers[name]["ours: peak MB"] <= peers[name]["peak MB"]
    assert peers["checkpoint"]["ours: added GFLOP"] < peers["checkpoint"]["added GFLOP"]
    (lossy,) = found["Lossy"]
    assert lossy["cosine"] > 0.999
    assert lossy["times less"] > 1
    timed = {row["what"]: row["time over eager"] for row in found["Step times over eager"]}
    assert timed["eager"] == 1
    assert {"checkpoint", "min-cut", "ours at 35 %", "ours, lossy"} < set(timed)
    cut, ours = found["Inside Inductor"]
    assert ours["over min-cut's"] <= 0.75
    assert ours["off min-cut's gradients"] < 1e-5
    assert ours["peak MB"] < cut["peak MB"]
    assert found["Planning"][0]["layers"] == 2
    exact, packed = found["Training"]
    assert packed["validation loss"] == pytest.approx(exact["validation loss"], rel=0.01)
    assert packed["saved, times less"] > 2
    for name in ("planner", "planner_training"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_spot_checks(tmp_path: pathlib.Path) -> None:
    """A version beside itself: all that is counted is equal, and as torch counts or measures it."""
    run("benchmarks/spot_checks.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "spot_checks")
    counted = found["Figures without a clock"]
    assert all(row["equal"] == "yes" for row in counted)
    figures = {row["figure"]: row["after"] for row in counted}
    forward = "FLOPs of a forward, "
    assert figures[forward + "of the ledger"] == figures[forward + "by FlopCounterMode"] > 0
    both = "FLOPs of forward and backward, "
    assert figures[both + "of the ledger"] == figures[both + "by FlopCounterMode"] > 0
    step = "peak of a step"
    predicted = next(v for k, v in figures.items() if k.startswith(step) and "predicted" in k)
    assert predicted == figures[f"{step}, measured"]
    assert figures["errors"] == 0
    assert [row["figure"].split(",")[0] for row in found["Speeds"]] == [
        "MiniLM in int8", "Monarch", "MiniLM under the backend without passes: times faster than "
        "Inductor", "MiniLM",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_in_a_budget() -> None:
    """The example keeps what the plan says: half of the peak, the same losses."""
    shown = run("examples/train_in_budget.py", "--quick")
    assert "equal bit for bit: yes" in shown
    whole, planned = (
        [float(x) for x in line.split()[-5:-3]]
        for line in shown.splitlines()
        if line.startswith(("everything kept", "by the plan"))
    )
    assert whole[0] == whole[1]
    assert planned[0] == planned[1] <= 0.5 * whole[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gpu(tmp_path: pathlib.Path) -> None:
    """Without a card: every comparison with a reference, the Triton kernels interpreted, and each
    part once; what was found is in a file of this device's own."""
    shown = run("benchmarks/gpu.py", "--quick", "--seconds", "500", "--out", str(tmp_path))
    assert "0 cases failed, 0 comparisons wrong, 0 not reached" in shown
    found = tables(tmp_path, "gpu_no_card")
    rows = found["Correctness"]
    assert {row["verdict"] for row in rows} == {"ok"}
    assert sum("in Triton" in row["what"] for row in rows) == 20
    assert sum("sparse product" in row["what"] for row in rows) == 24
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    (peak,) = found["Peaks within a budget"]
    assert abs(peak["off %"]) < 0.1
    assert abs(peak["eager off %"]) < 0.1
    assert peak["largest gradient error"] == 0
    assert all(row["cases"] or row["part"] == "compiling" for row in found["Parts"])
    assert all(row["failed"] == "" for row in found["Monarch beside cuBLAS, forward"])
    assert len(found["Training steps"]) == 2
    assert all(0 < row["predicted ms, H100-SXM"] for row in found["Predicted beside measured"])


WORKER = """
import os, sys, time
sys.path.insert(0, {folder!r})
from _gpu_crew import Case, run_cases, serve

def rows(number, then=lambda: None):
    def run():
        yield "table", {{"number": number}}
        then()
    return run

def broken():
    raise ValueError("no such tile")

def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

cases = [
    Case("good", rows(0)), Case("raises", rows(1, broken)),
    Case("dies", rows(2, lambda: os._exit(9))),
    Case("loses the card", rows(3, lost)), Case("hangs", rows(4, lambda: time.sleep(99)), 2),
    Case("prints", rows(5, lambda: print("not an answer"))), Case("late", rows(6)),
]
if sys.argv[1:]:
    serve(cases)
else:
    end = time.monotonic() + 60
    command = [sys.executable, __file__, "serve"]
    found = run_cases(command, cases[:6], 1, end, {{}})
    print([row["number"] for row in found.tables()["table"]])
    print(sorted(found.reached), found.failed)
    print(run_cases(command, cases[6:], 1, time.monotonic() - 1, {{}}).reached)
"""


def test_no_case_takes_the_others_with_it(tmp_path: pathlib.Path) -> None:
    """One that raises, ends its process, loses the card or never ends: what it had found stays, its
    reason is kept, the next ones run; and nothing begins once the time is over."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(ROOT / "benchmarks")))
    numbers, reached, late = run(str(script)).splitlines()
    assert numbers == "[0, 1, 2, 3, 4, 5]"
    assert reached.startswith("[0, 1, 2, 3, 4, 5] {1: 'ValueError: no such tile', 2: 'process died")
    assert "exit status 9" in reached
    assert "3: 'RuntimeError: CUDA error: an illegal memory access" in reached
    assert "4: 'ended after 2 s without a result" in reached
    assert late == "set()"


@pytest.mark.slow
def test_measures_this_checkout_where_nothing_is_installed(tmp_path: pathlib.Path) -> None:
    """`passes/` and `kernels/` are found as parts of the package, whatever else is on the path."""
    folder = tmp_path / "rewriter"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('another checkout')")
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import _checkout\n"
        "import rewriter.passes, rewriter.kernels.monarch as m; print(m.__file__)\n"
        "print(_checkout.missing())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    path, missing = done.stdout.splitlines()
    assert pathlib.Path(path) == ROOT / "kernels" / "monarch.py"
    assert missing == "[]"


@pytest.mark.slow
def test_rivals_are_built_and_timed(tmp_path: pathlib.Path) -> None:
    run("benchmarks/rivals.py", "--quick", "--out", str(tmp_path))
    found = json.loads((tmp_path / "rivals.json").read_text())["tables"]
    points = found.pop("This package, over eager fp32")
    assert list(found) == ["8 × 128 tokens", "1 × 16 tokens"]
    for rows in found.values():
        assert [row["what"] for row in rows][:2] == ["eager fp32", "this package, int8-dynamic"]
        assert all(row["ms"] > 0 for row in rows)
    assert points
    assert all(row["this package, int8-dynamic"] > 0 for row in points)


@pytest.mark.slow
def test_schemes_on_disk_and_on_narrower_instructions(tmp_path: pathlib.Path) -> None:
    run("benchmarks/schemes.py", "--quick", "--isa", "avx2", "--out", str(tmp_path))
    (rows,) = tables(tmp_path, "schemes_avx2").values()
    assert [row["scheme"] for row in rows][:2] == ["eager fp32", "int8-dynamic"]
    assert rows[2]["% of fp32"] < 27
    assert all(row["cosine"] > 0.99 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_lowering(tmp_path: pathlib.Path) -> None:
    """The same outputs up to rounding, with fewer launches and less traffic where it folds."""
    run("benchmarks/lowering.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "lowering")
    assert all(row["relative difference"] < 1e-5 for row in found["Times"])
    folded = found["What was fused, by the cost model"][0]
    assert folded["lowered"] == 3
    assert folded["launches after"] == folded["launches before"] - 3
    assert folded["traffic after MB"] < folded["traffic before MB"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_int8_convolutions(tmp_path: pathlib.Path) -> None:
    run("benchmarks/conv_int8.py", "--quick", "--out", str(tmp_path))
    (row,) = tables(tmp_path, "conv_int8")["Times"]
    assert row["cosine of the outputs"] > 0.99
    assert row["int8 ms"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_int4_error(tmp_path: pathlib.Path) -> None:
    run("benchmarks/int4_error.py", "--quick", "--out", str(tmp_path))
    ((_, rows),) = tables(tmp_path, "int4_error").items()
    errors = [row["error of outputs, held out"] for row in rows]
    assert [row["method"] for row in rows] == ["round", "awq", "gptq"]
    assert errors[0] > 1.1 * errors[1] > 1.1 * errors[2]


@pytest.mark.slow
def test_qat(tmp_path: pathlib.Path) -> None:
    """Where the images are; elsewhere the example says how to get them."""
    printed = run("examples/qat.py", "--quick")
    if printed.startswith("skipped"):
        assert "dataset-fashion-mnist" in printed
        pytest.skip(printed)
    run("benchmarks/qat.py", "--quick", "--out", str(tmp_path))
    mlp, cnn = tables(tmp_path, "qat").values()
    assert (len(mlp), len(cnn)) == (5, 4)
    for row in mlp + cnn:
        assert row["outputs that integers change"] == 0
        assert row["points below float32"] < 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_decode(tmp_path: pathlib.Path) -> None:
    """A rewritten Llama by generate() and by a plain loop, with a growing cache and with a static
    one, compiled: the same tokens each way, and a text as likely as it was."""
    run("benchmarks/decode.py", "--quick", "--only", "int4-weight", "--out", str(tmp_path))
    found = tables(tmp_path, "decode")
    speed = {row["what"]: row for row in found["Tokens per second"]}
    names = ("fp32", "int4-weight")
    ways = [f"{how}{loop}" for how in ("eager", "compiled") for loop in ("", ", plain loop")]
    assert set(speed) == {f"{name}, {way}" for name in names for way in ways}
    assert all(row["first tokens as eager"] == 8 for row in speed.values())
    assert all(row["tokens per s"] > 0 for row in speed.values())
    dense, four = found["Weights"]
    assert dense["MB"] > four["MB"]
    assert (dense["packed layers"], four["packed layers"]) == (0, 15)  # with the head
    assert abs(four["above fp32, %"]) < 4


@pytest.mark.slow
def test_quantize_llm() -> None:
    printed = run("examples/quantize_llm.py", "--quick", "--tokens", "8")
    assert "15 of 15 linear layers rewritten" in printed
    assert "model.embed_tokens.weight keeps the weight that it was tied to" in printed
    assert printed.count("tokens per second") == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_activation_sparsity(tmp_path: pathlib.Path) -> None:
    """Every variant beside the dense model of the same run."""
    run("benchmarks/activation_sparsity.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "activation_sparsity")
    assert len(found["Gated MLP 128 → 256 → 128, float32"]) == 2 * (1 + 4 * 3)
    levels = [row["what"] for row in found["Gated MLP 128 → 256 → 128, int8 and int4"]]
    assert len(levels) == 2 * (1 + 2 * 3 + 1 + 3)
    assert {what.partition(",")[0] for what in levels} == {"dense", "int8", "int4"}
    layers = {row["layer"] for row in found["Any number of tokens, 128 → 256, × over dense"]}
    assert {"Threshold, int8", "Threshold, int4", "SparseGate, int8"} < layers
    assert [row["what"] for row in found["One Llama block, 128 and 256, one token"]] == [
        "dense", "25% of inputs active", "dense", "50% of inputs active",
    ]  # fmt: skip
    (quality,) = found["Perplexity"]
    assert quality["random"] > 0 < quality["random, dense"]
    assert [(row["weights"], row["how"], row["what"]) for row in found["Decoding"]] == [
        (bits, how, what)
        for bits, hows in (("float32", 2), ("int8", 1), ("int4", 1))
        for how in ("generate", "compiled loop")[:hows]
        for what in ("dense", quality["what"])
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sparsity_quality(tmp_path: pathlib.Path) -> None:
    """Scores, budgets and kinds of layers, with what is reached on the text measured."""
    run("benchmarks/sparsity_quality.py", "--quick", "--out", str(tmp_path))
    found = tables(tmp_path, "sparsity_quality")
    assert [row["score"] for row in found["At equal sparsity"]] == ["magnitude", "wina", "rotation"]
    for row in found["At equal sparsity"]:
        assert abs(row["random, sparsity of these layers"] - 0.5) < 0.1
    assert {row["what"].rpartition("of ")[2] for row in found["By kind of layer"]} == {
        "q, k, v", "o", "gate, up", "down",
    }  # fmt: skip
    assert [(row["what"], row["rotate"]) for row in found["Budgets"]] == [
        (f"50%, {budget!r}", rotate)
        for rotate in (True, False)
        for budget in ("uniform", "greedy", "loss")
    ]
    for row in found["Budgets"]:
        read = 1 - row["random, sparsity of these layers"]
        assert (row["random, bytes read"] > read + 0.01) == row["rotate"]
    for row in found["Budgets"]:
        assert abs(row["random, sparsity of these layers"] - 0.5) < 0.1
    assert [row["layers"] for row in found["Where the loss gives out 50 %"]] == [
        f"model.layers.{i}" for i in range(2)
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_activation_recovery(tmp_path: pathlib.Path) -> None:
    """MiniLM as rewritten and recovered."""
    run("benchmarks/activation_recovery.py", "--quick", "--out", str(tmp_path))
    (row,) = tables(tmp_path, "activation_recovery")["Quality"]
    assert row["zeros before"] == row["zeros after"] == 0.75
    assert 0.6 < row["WordSim-353"] < 0.73
    assert 0.6 < row["recovered"]


@pytest.mark.slow
def test_lm_recovery(tmp_path: pathlib.Path) -> None:
    """A small language model as rewritten and recovered."""
    run("benchmarks/lm_recovery.py", "--quick", "--out", str(tmp_path))
    ((_, (row,)),) = tables(tmp_path, "lm_recovery").items()
    for when in ("rewritten", "recovered"):
        assert abs(row[f"random, {when}, %"]) < 5
        assert 0.4 < row[f"sparsity, {when}"] < 0.6
    assert row["steps"] == 3
