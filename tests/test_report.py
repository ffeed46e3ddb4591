"""The ledger: what people read, what machines read, and what is refused."""

from __future__ import annotations

import io
import json
import math
import os
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from rewriter import explain, rewrite
from rewriter.capture import capture
from rewriter.cost import Cost, Device, Training, Work
from rewriter.engine import Engine, slower
from rewriter.engine.slower import Lost
from rewriter.engine.trials import goes_past
from rewriter.errors import OptionError, RewriteWarning, StoreError
from rewriter.passes import Monarch, Quantize
from rewriter.report import CaptureInfo, Decision, Island, Report, Step
from rewriter.report import format as fmt
from rewriter.report.render import _broken
from rewriter.sites import Site

DENSE = Cost(
    22_713_216,
    90_852_864,
    11_476_795_392,
    22_953_590_784,
    444_685_546,
    peak_bytes=105_164_288,
    launches=8,
)
SMALL = replace(DENSE, params=12_713_216, param_bytes=50_852_864, peak_bytes=65_164_288)
INT8 = replace(SMALL, param_bytes=15_852_864, macs=5_476_795_392, launches=10)
NAMES = [f"layer.{i}.{n}" for i in range(6) for n in ("query", "key", "value", "out")]


def report() -> Report:
    monarch = [
        Decision("layer.0.query", "linear", "replaced", error=0.02, shape="384→384"),
        Decision(
            "layer.1.query",
            "linear",
            "replaced",
            error=0.3,
            before=DENSE,
            after=SMALL,
            kernel="bmm",
            tokens=1024,
        ),
        Decision("head", "linear", "skipped", "out_features 10 % nblocks 4", where="model.py:12"),
        Decision("conv", "conv", "skipped", "not a linear layer"),
    ]
    int8 = [
        Decision("layer.0.query", "MonarchLinear", "declined", "error 0.31 > max_error=0.1"),
        Decision("layer.1.query", "MonarchLinear", "declined", "error 0.47 > max_error=0.1"),
        Decision("head", "linear", "installed", error=0.004),
    ]
    return Report(
        "BertModel",
        CaptureInfo("torch.export", 1.234, signature="(ids: int64[8, 128])"),
        [
            Step("Monarch(nblocks=4)", DENSE, SMALL, monarch, 0.31, seconds=2.2, notes=["by SVD"]),
            Step("Quantize('int8-dynamic')", SMALL, INT8, int8, 0.012, seconds=0.4),
        ],
    )


def test_whole_of_the_steps() -> None:
    r = report()
    assert (r.before, r.after) == (DENSE, INT8)
    assert [d.site for d in r.replaced] == ["layer.0.query", "layer.1.query", "head"]
    assert len(r.skipped) == 4
    assert len(r.decisions) == 7
    assert r.coverage() == (3, 3)  # a site counts once, as what it was at first
    assert r.coverage("conv") == (0, 1)
    assert not r.lower_bounds
    empty = Report("M", CaptureInfo("torch.export"))
    assert (empty.before, empty.after, empty.coverage()) == (Cost(), Cost(), (0, 0))
    assert "M" in str(empty)


def test_text() -> None:
    assert str(report()) == TEXT.strip("\n")


TEXT = """
Rewrite of BertModel
  captured by torch.export in 1.23 s
  called as (ids: int64[8, 128])
  3 of 3 linear layers rewritten
  outputs on the example inputs: relative error at most 0.3100 per step (largest in
  Monarch(nblocks=4))

                              before     after       change
───────────────────────────────────────────────────────────
parameters                    22.7 M    12.7 M   1.79× less
parameter memory             90.9 MB   15.9 MB   5.73× less
multiply-adds per forward     11.5 G    5.48 G   2.10× less
memory traffic per forward    445 MB    445 MB         same
peak memory in inference      105 MB   65.2 MB   1.61× less
operations launched                8        10   1.25× more

Step by step
after                      params   weights     MACs   traffic      peak   ops    error     took
────────────────────────────────────────────────────────────────────────────────────────────────
original                   22.7 M   90.9 MB   11.5 G    445 MB    105 MB     8
Monarch(nblocks=4)         12.7 M   50.9 MB   11.5 G    445 MB   65.2 MB     8   0.3100   2.20 s
Quantize('int8-dynamic')   12.7 M   15.9 MB   5.48 G    445 MB   65.2 MB    10   0.0120   400 ms
error: how far the step moved the outputs on the example inputs, relative to their size

Monarch(nblocks=4): 2 sites replaced
site            was              kernel    error             weights
────────────────────────────────────────────────────────────────────
layer.1.query   linear           bmm      0.3000   90.9 MB → 50.9 MB
layer.0.query   linear 384→384            0.0200
error: relative Frobenius error ‖W − W′‖/‖W‖ of the layer's weights

Monarch(nblocks=4): 2 sites left as is
  • skipped, out_features 10 % nblocks 4: head (model.py:12)
  • skipped, not a linear layer: conv

Monarch(nblocks=4): notes
  • by SVD

Quantize('int8-dynamic'): 1 site replaced
site   was       error
──────────────────────
head   linear   0.0040
error: relative Frobenius error ‖W − W′‖/‖W‖ of the layer's weights

Quantize('int8-dynamic'): 2 sites left as is
  • declined, error 0.31 > max_error=0.1 (the first; figures vary): layer.0.query, layer.1.query
"""


def test_what_is_missing_is_said() -> None:
    r = report()
    r.capture.islands.append(Island("moe", "Router", "loops over [data]", ["moe.a", "moe.b"]))
    r.capture.notes.append("the train graph timed out")
    r.errors.append("no cost formula for linalg_svd (model.py:3): totals are lower bounds")
    assert r.lower_bounds
    for shown in (str(r), r.to_markdown()):
        assert "1 part left in Python" in shown
        assert "1 operation without a cost formula" in shown
        assert "2 layers inside rewritten" in shown
        assert "the train graph timed out" in shown
        assert "model.py:3" in shown
    assert "loops over [data]" in str(r)  # not taken for rich markup
    r = replace(report(), errors=["the size of nonzero depends on the data: priced at its largest"])
    assert not r.lower_bounds
    assert "priced at its largest" in str(r)


@pytest.mark.parametrize(
    ("error", "exact", "says"),
    [
        (0.0, True, "bit for bit as before"),
        (1e-6, True, "as before up to rounding (1.0e-06)"),
        (0.5, False, "relative error at most 0.5000"),
        (math.nan, False, "relative error at most nan"),
    ],
)
def test_summary_of_the_outputs(error: float, exact: bool, says: str) -> None:
    step = Step("Pass()", DENSE, DENSE, output_error=error, exact=exact)
    shown = str(Report("M", CaptureInfo("torch.export"), [step]))
    assert says in shown
    original = Step("original", DENSE, DENSE)
    shown = str(Report("M", CaptureInfo("torch.export"), [original, step]))
    assert len(re.findall("(?m)^original ", shown)) == 1


def test_many_sites_are_grouped_worst_first() -> None:
    decisions = [
        Decision(name, "linear", "replaced", error=0.01 * (i + 1)) for i, name in enumerate(NAMES)
    ]
    step = Step("Monarch()", DENSE, SMALL, decisions)
    shown = str(Report("M", CaptureInfo("torch.export"), [step]))
    rows = [line.split() for line in shown.splitlines() if line.startswith("layer.")]
    assert [row[:2] + row[3:] for row in rows] == [
        ["layer.*.out", "(×6)", "0.2400"],
        ["layer.*.value", "(×6)", "0.2300"],
        ["layer.*.key", "(×6)", "0.2200"],
        ["layer.*.query", "(×6)", "0.2100"],
    ]
    step.decisions = [replace(d, kernel=f"k{i}") for i, d in enumerate(decisions)]
    shown = str(Report("M", CaptureInfo("torch.export"), [step]))
    assert "… and 4 more, with smaller errors" in shown
    step.decisions = [replace(d, action="skipped", reason="frozen") for d in decisions]
    shown = " ".join(str(Report("M", CaptureInfo("torch.export"), [step])).split())
    assert "skipped, frozen: layer.0.query, layer.0.key" in shown
    assert "and 18 more" in shown


def test_markdown_lists_every_decision() -> None:
    shown = report().to_markdown()
    for decision in report().decisions:
        assert f"| {decision.site} |" in shown
    assert "| head | linear | skipped | out_features 10 % nblocks 4 |" in shown
    widths = [
        {line.count("|") for line in table.splitlines()}
        for table in shown.split("\n\n")
        if table.startswith("|")
    ]
    assert len(widths) == 4
    assert all(len(w) == 1 for w in widths)
    odd = Decision("a|b", "linear", "skipped", "uses\n`_x_` <b>")
    r = Report("M", CaptureInfo("torch.export"), [Step("P()", DENSE, DENSE, [odd])])
    assert r"a\|b | linear | skipped | uses \`\_x\_\` \<b\>" in r.to_markdown()


def test_rich_and_html() -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=100, color_system="standard").print(report())
    assert "\x1b[" in out.getvalue()
    assert "layer.1.query" in out.getvalue()
    html = report()._repr_html_()
    assert html.startswith('<div class="rewriter-report">')
    assert "layer.1.query" in html
    assert "\x1b[" not in str(report())


def priced() -> Report:
    """A report with times on a device and a training step."""
    h100 = Device.get("h100")

    def cost(scale: int) -> Cost:
        work = Work("aten::addmm", "matmul", "float32", 10**9 * scale, 10**7, 10**6, 10**6)
        training = Training(
            gradient_bytes=10**6, saved_bytes=4 * 10**6 * scale, weight_bytes=10**6 * scale,
            worst={"saved": 3 * 10**6, "gradients": 0, "workspace": 2 * 10**6},
            optimizers={"sgd": 0, "adam": 2 * 10**6, "adam-8bit": 10**6},
            peaks={"sgd": 6 * 10**6 * scale, "adam": 8 * 10**6 * scale}, work=(work,),
        )  # fmt: skip
        plain = Cost(10**6, 4 * 10**6, 5 * 10**8 * scale, 10**9 * scale, 11 * 10**6, launches=1)
        return h100.priced(replace(plain, work=(work,), training=training))

    before, after = replace(cost(8), measured_s=0.5), cost(1)
    layer = Decision("fc", "linear", "replaced", error=0.1, before=before, after=after)
    steps = [
        Step("original", before, before),
        Step("Monarch(nblocks=4)", before, replace(after, measured_s=0.2), [layer], 0.1),
    ]
    return Report("Net", CaptureInfo("export"), steps, device="H100-SXM", predictor=h100)


def test_times_training_and_roofs() -> None:
    r = priced()
    shown = " ".join(str(r).split())
    for said in (
        "predicted time (H100-SXM)",
        "state of 8-bit Adam",
        "saved activations, at the worst moment",
        "peak with Adam 64.0 MB 8.00 MB 8.00× less",
        "Where the predicted time goes on H100-SXM",
        "bound by compute 100 %",
        "not a measurement",
        "2.50×",  # as measured
    ):
        assert said in shown, said
    order = ["Rewrite of", "Step by step", "Time and energy", "Layer by layer", "1 site replaced"]
    assert sorted(order, key=str(r).index) == order
    markdown = r.to_markdown()
    assert "## Memory in training" in markdown
    assert "| matmul | compute | 1 |" in markdown
    assert "off by" not in shown  # another device measured
    assert "off by" in str(replace(r, device="this machine"))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_no_column_is_cut_off(width: int) -> None:
    Console(file=(out := io.StringIO()), width=width).print(priced())
    letters = re.sub(r"\s", "", out.getvalue())
    if width >= 80:
        for header in ("traffic", "took", "train", "share", "FLOP/B"):
            assert re.search(rf"\b{header}\b", out.getvalue()), header
    assert all(len(line) <= width for line in out.getvalue().splitlines())
    assert "…" not in letters


def test_round_trip() -> None:
    r = report()
    r.capture.islands.append(Island("moe", "Router", "data", ["moe.a"]))
    assert Report.from_json(r.to_json()) == r
    assert Report.from_dict(r.to_dict()) == r
    assert Report.from_dict(json.loads(json.dumps(r.to_dict()))) == r
    r.steps[0].output_error = math.inf
    r.steps[0].decisions[0] = replace(r.steps[0].decisions[0], error=-math.inf)
    assert "Infinity" not in r.to_json()
    assert Report.from_json(r.to_json()) == r


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a report"),
        ("[]", "format 2"),
        ('{"format": 99}', "save it again"),
        ('{"format": 2, "model": "M"}', "CaptureInfo is NoneType"),
        ('{"format": 2, "model": "M", "capture": {"rung": "x"}, "colour": 1}', "colour"),
        ('{"format": 2, "capture": {"rung": "x"}}', "model"),
        (
            '{"format": 2, "model": "M", "capture": {"rung": "x"}, '
            '"steps": [{"name": "a", "before": 3, "after": 4}]}',
            "a cost is int",
        ),
    ],
)
def test_foreign_json_is_refused(text: str, says: str) -> None:
    with pytest.raises(StoreError, match=says):
        Report.from_json(text)


def test_save(tmp_path: Path) -> None:
    r = report()
    r.save(tmp_path / "r.json")
    r.save(str(tmp_path / "r.md"))
    r.save(tmp_path / "r.TXT")
    r.save(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert Report.from_json((tmp_path / "r.json").read_text(encoding="utf-8")) == r
    assert (tmp_path / "r.md").read_text(encoding="utf-8") == r.to_markdown()
    assert (tmp_path / "r.TXT").read_text(encoding="utf-8") == str(r) + "\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.TXT", "r.html", "r.json", "r.md"]


def test_half_a_character_is_written_out(tmp_path: Path) -> None:
    """As Python has them in names of files that are not UTF-8."""
    r = report()
    r.model = "a\udc80b"
    for suffix in ("json", "md", "txt", "html"):
        r.save(tmp_path / f"r.{suffix}")
        assert "udc80b" in (tmp_path / f"r.{suffix}").read_text(encoding="utf-8")
    str(r).encode()
    assert Report.from_json((tmp_path / "r.json").read_text(encoding="utf-8")) == r


def test_save_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"'r.pdf': the suffix must be one of .html, .json, .md"):
        report().save(tmp_path / "r.pdf")
    with pytest.raises(StoreError, match="cannot write the report to .*absent.*directory"):
        report().save(tmp_path / "absent" / "r.json")
    (tmp_path / "r.json").mkdir()
    with pytest.raises(StoreError, match=re.escape(str(tmp_path / "r.json"))):
        report().save(tmp_path / "r.json")
    old = tmp_path / "old.txt"
    old.write_text("kept", encoding="utf-8")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StoreError, match="No space left on device"):
        report().save(old)
    assert old.read_text(encoding="utf-8") == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.txt", "r.json"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (fmt.count(0), "0"),
        (fmt.count(999), "999"),
        (fmt.count(1234567), "1.23 M"),
        (fmt.count(999_999), "1.00 M"),
        (fmt.count(0.5), "0.50"),
        (fmt.size(0), "0 B"),
        (fmt.size(45_100_000), "45.1 MB"),
        (fmt.size(1_000), "1.00 kB"),
        (fmt.flops(1.2e9), "1.20 GFLOP"),
        (fmt.macs(5e18), "5.00 EMAC"),
        (fmt.macs(5e22), "50000 EMAC"),
        (fmt.seconds(0.00123), "1.23 ms"),
        (fmt.seconds(75), "75.0 s"),
        (fmt.seconds(0.9999), "1.00 s"),
        (fmt.seconds(2e-6), "2.00 µs"),
        (fmt.seconds(0), "0 µs"),
        (fmt.joules(0.00256), "2.56 mJ"),
        (fmt.rate(989.4e12), "989 TFLOP/s"),
        (fmt.percent(0.314), "31 %"),
        (fmt.percent(0.001), "< 1 %"),
        (fmt.percent(0), "0 %"),
        (fmt.speed(2.74, 1), "2.74× as fast"),
        (fmt.speed(1, 2), "0.50× as fast"),
        (fmt.speed(1, 1.001), "same"),
        (fmt.speed(1, 0), "–"),
        (fmt.off(1.12, 1), "+12 %"),
        (fmt.off(0.9, 1), "-10 %"),
        (fmt.error(None), "–"),
        (fmt.error(0.0), "0"),
        (fmt.error(2e-7), "2.0e-07"),
        (fmt.error(math.inf), "inf"),
        (fmt.ratio(4, 1), "4.00× less"),
        (fmt.ratio(1, 1.2), "1.20× more"),
        (fmt.ratio(1000, 999), "0.10% less"),
        (fmt.ratio(3, 3), "same"),
        (fmt.ratio(0, 3), "all new"),
        (fmt.ratio(3, 0), "all gone"),
    ],
)
def test_format(shown: str, expected: str) -> None:
    assert shown == expected


@settings(max_examples=200)
@given(st.integers(1, 10**18))
def test_count_is_right_to_three_digits(n: int) -> None:
    number, _, unit = fmt.count(n).partition(" ")
    value = float(number) * 1000.0 ** ["", "k", "M", "G", "T", "P", "E"].index(unit)
    assert abs(value - n) <= 0.005 * n
    assert len(number) <= 4


def test_a_heading_says_what_was_done_and_splits_fused_from_kept() -> None:
    def step(*actions: str) -> Step:
        own = [Decision(f"l{i}", "linear", a, "said") for i, a in enumerate(actions)]
        return Step("Own", DENSE, DENSE, own, None, True, 0.0, [])

    said = {
        ("removed",): "Own: 1 site removed",
        ("resized", "resized"): "Own: 2 sites resized",
        ("replaced", "installed", "replaced"): "Own: 3 sites replaced",
        ("removed", "resized", "replaced", "replaced"): "Own: 4 sites changed",
        ("lowered", "lowered"): "Own: 2 places fused",
        ("skipped",): "Own: 1 site left as is",
    }
    for actions, heading in said.items():
        assert heading in str(replace(report(), steps=[step(*actions)])).splitlines()


@pytest.mark.parametrize(
    ("word", "width", "lines"),
    [
        ("Quantize(scheme='int8-dynamic')", 27, ["Quantize(scheme=", "'int8-dynamic')"]),
        ("layer.0.EncDecAttention.k", 16, ["layer.0.", "EncDecAttention.", "k"]),
        ("EncDecAttention.k", 10, ["EncDec", "Attention.", "k"]),
        ("ResizeMLP(keep=0.25)", 16, ["ResizeMLP(keep=", "0.25)"]),
        ("short", 5, ["short"]),
    ],
)
def test_a_word_breaks_where_names_have_their_joints(
    word: str, width: int, lines: list[str]
) -> None:
    assert _broken(word, width).split("\n") == lines


def test_a_capture_note_of_a_forward_that_was_not_run_is_a_whole_sentence() -> None:
    captured = capture(nn.Sequential(nn.Linear(2, 2)), None)
    assert goes_past(captured, [], None) == ""
    assert goes_past(captured, ["0"], None) == (
        "calls that no graph serves are refused: the Python forward of Sequential was not run"
    )


# slower than the original

ADD = Lost.add


def timed(
    monkeypatch: pytest.MonkeyPatch, old: float, new: float, whole: float, spread: float = 0.0
) -> list[str]:
    """Every layer takes `old` seconds, what replaces it `new`, the whole rewritten model `whole`; a
    second time `spread` more, the model three times that. Gives the names of the layers timed."""
    names: list[str] = []

    def of(site: Site, *_: object, **__: object) -> tuple[list[float], list[float]]:
        names.append(site.fqn)
        return [old, old + spread], [new, new + spread]

    monkeypatch.setattr(Lost, "add", ADD)
    monkeypatch.setattr(slower, "sampled", of)
    monkeypatch.setattr(Engine, "_seconds", lambda _: [whole, whole + 3 * spread])
    return names


def layers(n: int = 2) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(n))), torch.randn(4, 8)


@pytest.mark.parametrize("pass_", [Quantize(), Monarch(nblocks=2, rank=1)], ids=lambda p: p.name)
def test_a_rewrite_that_is_slower_says_so_first(
    pass_: Quantize | Monarch, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = timed(monkeypatch, 1e-3, 2e-3, 10e-3)
    model, x = layers(4)
    with pytest.warns(
        RewriteWarning, match=r'Sequential is slower .*: 0.60× .*objective="latency"'
    ):
        r = rewrite(model, [pass_], x).report
    assert names == ["0"]  # layers alike are timed once
    assert r.speed == pytest.approx(0.6)
    said = "slower than the original at these sizes: 0.60× as fast (estimated from its layers"
    for text in (str(r), r.to_markdown(), r.to_html()):
        assert said in text
    assert str(r).splitlines()[1].strip().startswith(said)
    assert Report.from_json(r.to_json()).speed == r.speed
    assert "slower" not in str(r.at(batch=64))


def test_a_slower_rewrite_says_what_was_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the first kind of layer has used up the time for it: 2 of 3 layers count as equal."""
    timed(monkeypatch, 1e-3, 2e-3, 10e-3)
    monkeypatch.setattr(Lost, "_used_up", lambda self: bool(self.known))
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(8, 8))
    with pytest.warns(RewriteWarning, match="slower"):
        r = rewrite(model, [Quantize()], torch.randn(4, 8)).report
    assert r.speed == pytest.approx(0.9)
    assert r.untimed == 2
    for text in (str(r), r.to_markdown(), r.to_html()):
        assert "2 layers not timed, taken as no slower" in " ".join(text.split())
    assert Report.from_json(r.to_json()).untimed == 2
    assert r.at(batch=64).untimed == 0


@pytest.mark.parametrize(
    ("old", "new", "whole", "spread"),
    [
        (2e-3, 1e-3, 10e-3, 0.0),  # faster
        (1e-3, 1.2e-3, 10e-3, 0.0),  # by little
        (1e-5, 2e-5, 2e-4, 0.0),  # a call that is short
        (1e-3, 2e-3, 1e-3, 0.0),  # the figures do not agree
        (1e-3, 2e-3, 10e-3, 2.1e-3),  # by less than two timings of one layer differ
        (1e-3, 2e-3, 10e-3, 1.5e-3),  # or of the model
    ],
)
def test_what_is_not_clearly_slower_says_nothing(
    old: float, new: float, whole: float, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, old, new, whole, spread)
    model, x = layers()
    assert "slower" not in str(rewrite(model, [Quantize()], x).report)


def test_nothing_is_timed_where_it_would_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    names = timed(monkeypatch, 1e-3, 2e-3, 10e-3)
    model, x = layers()
    rewrite(model, [Quantize()], x, device="h100")  # another machine
    rewrite(model, [Quantize()])  # no sizes
    assert names == []
    monkeypatch.setattr(slower, "_LEAST", -1.0)  # no time left
    monkeypatch.setattr(slower, "_SHARE", -1.0)
    rewrite(model, [Quantize()], x)
    assert names == []


def test_predicted_and_measured_times_say_who_is_slower() -> None:
    old, new = replace(DENSE, latency_s=8e-3), replace(SMALL, latency_s=10e-3)
    info, step = CaptureInfo("export"), Step("Monarch()", old, new)
    predicted = Report("M", info, [step], device="H100-SXM")
    said = "slower than the original at these sizes: 0.80× as fast"
    assert f"{said} (predicted for H100-SXM)" in str(predicted)
    step.before, step.after = replace(old, measured_s=2.0), replace(new, measured_s=4.0)
    assert "0.50× as fast (measured here)" in str(predicted)
    step.before, step.after = replace(old, latency_s=8e-5), replace(new, latency_s=1e-4)
    assert "slower" not in str(predicted)


def test_what_is_not_known_is_no_zero() -> None:
    r = rewrite(nn.Sequential(nn.Linear(8, 8)), [Quantize()]).report
    rows = {line[:28].strip(): line[28:].split() for line in str(r).splitlines() if line}
    for name in ("multiply-adds per forward", "memory traffic per forward", "operations launched"):
        assert rows[name] == ["–", "–", "–"]
    assert rows["parameters"][0] == "72"
    assert "in 0" not in str(Report("M", CaptureInfo("dynamo")))


def test_sizes_have_one_name() -> None:
    r = rewrite(nn.Sequential(nn.Linear(8, 8)), [], torch.randn(4, 3, 8)).report
    assert r.capture.signature == "input: float32[batch, sequence, 8]"
    assert set(r.sizes) == {"batch", "sequence"}


@pytest.mark.parametrize(("bias", "left"), [(True, "42"), (False, "0")])
def test_weights_that_a_pass_freezes_are_no_saving_in_training(bias: bool, left: str) -> None:
    model = nn.Sequential(nn.Linear(16, 32, bias=bias), nn.ReLU(), nn.Linear(32, 10, bias=bias))
    x, own = torch.zeros(4, 16), sum(p.numel() for p in model.parameters())
    int8 = explain(model, [Quantize("int8-dynamic")], x)
    said = f"weights frozen by Quantize(scheme='int8-dynamic'): {left} of "
    for shown in (str(int8), int8.to_markdown(), int8.to_html(), int8._repr_html_()):
        plain = " ".join(unescape(shown).replace("\\_", "_").split())
        assert said in plain
        assert f"parameters still train, {own} of {own} before" in plain
        assert ("peak memory in training, weights frozen" in plain.lower()) is bias
    assert "weights frozen" not in str(explain(model, [Monarch(nblocks=2)], x))
    for p in model.parameters():
        p.requires_grad_(False)
    assert "weights frozen" not in str(explain(model, [Quantize("int8-dynamic")], x))


def test_the_errors_of_layers_say_what_they_are() -> None:
    weights = "error: relative Frobenius error ‖W − W′‖/‖W‖ of the layer's weights"
    outputs = "of outputs: ‖y − y′‖/‖y‖ of its outputs on calibration rows held out"
    r = report()
    for shown in (r.to_markdown(), r.to_html(), r._repr_html_()):
        assert "error: how far the step moved the outputs on the example inputs" in shown
        assert weights in unescape(shown)
        assert outputs not in unescape(shown)
    step = r.steps[0]
    step.decisions = [replace(d, output_error=0.1) if d.error else d for d in step.decisions]
    for shown in (str(r), r.to_markdown(), r.to_html(), r._repr_html_()):
        assert f"{weights}; {outputs}" in unescape(" ".join(shown.split()))
