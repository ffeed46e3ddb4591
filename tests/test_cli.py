"""The command line, and passes from text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rewriter import OptionError, Pass, Report
from rewriter.cli import main
from rewriter.passes import (
    Densify,
    Monarch,
    MonarchChain,
    MonarchResidual,
    Quadratic,
    Quantize,
    TopK,
)
from rewriter.recipe.parse import parse_pass

FACTORY = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), torch.zeros(8, 64)

def alone():
    return nn.Sequential(nn.Linear(64, 64))

def broken():
    raise ValueError("no weights")

def number():
    return 3

def colourful():
    raise ValueError("\\x1b[2Jgone")

class Speechless(Exception):
    def __str__(self):
        raise KeyError

def speechless():
    raise Speechless

class Touchy:
    @property
    def make(self):
        raise RuntimeError("no")

touchy = Touchy()

value = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models_of_mine.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "models_of_mine", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("monarch", Monarch()),
        ("Monarch:nblocks=2", Monarch(nblocks=2)),
        ("monarch:2,rank=3", Monarch(2, rank=3)),
        ("quantize:int8-dynamic", Quantize("int8-dynamic")),
        ("topk:k=64,where=encoder.*", TopK(k=64, where="encoder.*")),
        ('monarch:init="random"', Monarch(init="random")),
        ("rewriter.passes.Densify", Densify()),
        ("monarch:nblocks=(2, 4),rank=none", Monarch((2, 4))),
        ("Monarch(nblocks='sqrt', cap=True)", Monarch("sqrt", cap=True)),
    ],
)
def test_passes_from_text(text: str, expected: object) -> None:
    assert parse_pass(text) == expected


@pytest.mark.parametrize(
    "rewrite",
    [
        Densify(),
        Monarch((2, 4), rank=3, init="random"),
        Monarch(where="layers.{0,1}, or not"),
        MonarchChain(stars=1, expansion=2),
        MonarchResidual(residual="block-sparse", share=0.25),
        Quadratic(init="random"),
        Quantize("int8-dynamic", "per_tensor", where="it's"),
        TopK(0.25),
        TopK(8),
    ],
    ids=str,
)
def test_a_pass_is_what_its_text_and_its_stored_options_say(rewrite: Pass) -> None:
    assert parse_pass(str(rewrite)) == rewrite
    spec = rewrite.spec()
    assert spec is not None
    assert type(rewrite)(**spec, where=rewrite.where) == rewrite
    assert "where" not in spec


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("monarch:nblocks=(2,", "must be a tuple"),
        ("monarch:nblocks=(2,x)", "must be a tuple"),
        ("monarhc", "no pass is called 'monarhc'; did you mean 'monarch'"),
        ("monarch:nblock=4", "no option 'nblock'; did you mean 'nblocks'"),
        ("monarch:nblocks=0", "at least 1"),
        ("monarch:nblocks=-1" + "0" * 400, "at least 1"),
        ("resizemlp:keep=1" + "0" * 400 + ".5", "must be an integer or a number"),
        ("monarch:nblocks=four", "must be an integer"),
        ("monarch:4,2", "write '2' as option=value"),
        ("monarch:4,nblocks=2", "gives nblocks twice"),
        ("topk", "TopK needs k"),
        ("", "a pass as text"),
        ("os.path", "is no pass"),
        ("nowhere.Pass", "no pass 'nowhere.Pass'"),
        ("..:1", "no pass '..'"),
        (".os:1", "no pass '.os'"),
    ],
)
def test_text_that_is_no_pass(text: str, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        parse_pass(text)


def test_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pass", "monarch:nblocks=4", "--device", "h100", "--at", "batch=64"]
    files = ["--json", "out.json", "--markdown", "out.md"]
    assert main(["report", "models_of_mine:make", *arguments, *files]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 linear layers rewritten" in printed
    assert "wrote out.json" in printed
    report = Report.from_json((here / "out.json").read_text())
    assert report.sizes == {"batch": 64}
    assert report.device == "H100-SXM"
    assert report.after.latency_s is not None
    assert "Monarch" in (here / "out.md").read_text()


def test_a_file_and_no_inputs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["report", "models_of_mine.py:alone", "--pass", "monarch:4", "--quiet"]
    assert main([*command, "--json", "o.json"]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((here / "o.json").read_text())["capture"]["rung"] == "symbolic"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["models_of_mine"], "write module:factory"),
        (["models_of_mine:missing"], "models_of_mine has no missing"),
        (["models_of_mine:value"], "cannot be called: it is of type int"),
        (["models_of_mine:touchy.make"], r"touchy.make cannot be read: RuntimeError: no \(.*.py:"),
        (["models_of_mine:colourful"], r"failed: ValueError: \\x1b\[2Jgone"),
        (["models_of_mine:speechless"], r"failed: Speechless"),
        (["models_of_mine:make", "--pass", "..:1"], "no pass '..'"),
        (["..:make"], "cannot import ..:"),
        (["models_of_mine:number"], "returned an object of type int"),
        (["models_of_mine:broken"], r"failed: ValueError: no weights \(.*models_of_mine.py:12\)"),
        (["nothing_of_mine:make"], "cannot import nothing_of_mine"),
        (["nothing.py:make"], "there is no file nothing.py"),
        (["models_of_mine:make", "--pass", "quantise"], "did you mean 'quantize'"),
        (["models_of_mine:make", "--device", "h10"], "unknown device 'h10': did you mean 'H100"),
        (["models_of_mine:make", "--html", "no/where.html"], "there is no directory no"),
        (["models_of_mine:make", "--json", "."], "it is a directory"),
        (["models_of_mine:make", "--at", "batch"], "write size=number"),
        (["models_of_mine:make", "--at", "bach=3"], "did you mean batch"),
        (["models_of_mine:make", "--at", "self=4"], "no open size is called 'self'"),
        (["models_of_mine:make", "--at", "device=4"], "device is named by text"),
        (["models_of_mine:make", "--html", "-"], "the suffix must be .html"),
        (["models_of_mine:make", "--html", "a\0.html"], "no file can be called so"),
        (["models_of_mine:make", "--json", "\ud800.json"], "no file can be called so"),
        (["models_of_mine:make", "--json", "x" * 300 + ".json"], "name too long"),
        (["models_of_mine:make", "--pass", "monarch:" + "a" * 10**6], "at least 1, got 'aaa"),
        (["x" * 10**6], "e.g. mymodels:resnet or path.py:resnet"),
    ],
)
def test_errors_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], match: str
) -> None:
    assert main(["report", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rewriter: ")
    assert len(line) < 1100
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(line)


def test_names_cannot_give_the_terminal_orders(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "loud.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    model = nn.Sequential()\n"
        "    model.add_module('\\x1b[31mred\\x9b', nn.Linear(8, 8))\n"
        "    return model\n"
    )
    for form in ([], ["--json"], ["--markdown"]):
        assert main(["report", "loud.py:make", "--pass", "monarch", *form]) == 0
        shown = capsys.readouterr().out
        assert "[31mred" in shown.replace("\\", "")
        assert not {"\x1b", "\x9b"} & set(shown)
        if form == ["--json"]:
            assert json.loads(shown)["steps"][1]["decisions"][0]["site"] == "\x1b[31mred\x9b"


@pytest.mark.parametrize("given", ["x" * 10**6, "\x1b[2J\u202e"], ids=["long", "orders"])
def test_an_argument_that_is_none_cannot_flood_the_terminal_or_give_it_orders(
    capsys: pytest.CaptureFixture[str], given: str
) -> None:
    for arguments in ([given], ["report", "m:f", "--batch", given], ["devices", given]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        shown = capsys.readouterr().err
        assert len(shown) < 2000
        assert not {"\x1b", "\u202e"} & set(shown)


def test_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    printed = capsys.readouterr().out
    assert "H100-SXM" in printed
    assert "MI300X" in printed
