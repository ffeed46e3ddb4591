"""The page and the notebook element: whole, self-contained, escaped; also in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from rewriter import Report, explain
from rewriter.cost import Cost, Device, Training, Work
from rewriter.passes import Monarch, Quantize
from rewriter.report import CallForm, CaptureInfo, Decision, Island, Step, Timeline
from rewriter.report.html import fragment, page

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x_1$ & {{ 7 * 7 }} ]]>"
VOID = {"meta", "link", "input", "img", "br"}
H100 = Device.get("h100")


def cost(scale: int, dtype: str = "float32") -> Cost:
    shape = (1, 1024, 384 * scale, 384)
    flops, weight = 2 * 1024 * 384 * 384 * scale, 4 * 384 * 384 * scale
    work = Work("aten::addmm", "matmul", dtype, flops, weight + 1_500_000, 1_500_000, weight, shape)
    moved = work.bytes_moved
    step = Training(
        flops=3 * flops, weight_bytes=weight, gradient_bytes=weight, saved_bytes=1_500_000,
        worst={"saved": 1_500_000, "gradients": 0, "workspace": 500_000},
        optimizers={"sgd": 0, "adam": 2 * weight}, peaks={"sgd": 4 * weight, "adam": 6 * weight},
        work=(work, replace(work, backward=True, count=2)),
    )  # fmt: skip
    whole = Cost(weight // 4, weight, flops // 2, flops, moved, 1_500_000, 3_000_000, weight, 1)
    return H100.priced(replace(whole, work=(work,), training=step))


def made(name: str = "layer.{}.dense", evil: str = "", layers: int = 6) -> Report:
    big, small = cost(4), cost(1)
    timeline = Timeline(
        [("a", 40), (f"b{evil}", 90), ("c", 50)],
        [("a", 40), (f"backward b{evil}", 190), ("update", 50)],
    )
    done = [
        Decision(
            name.format(i), f"linear{evil}", "replaced", evil, 0.01 * i, f"bmm{evil}", big, small,
            f"models/deep{evil}.py:{i}", 1024, "384→1536",
        )
        for i in range(layers)
    ]  # fmt: skip
    kept = [Decision(f"head{evil}", "linear", "skipped", f"10 % 4 {evil}", where="m.py:3")]
    kept += [Decision(f"x.{i}", "linear", "declined", f"error 0.{i} > 0.1") for i in (2, 3)]
    steps = [
        Step("original", big, big, timeline=timeline),
        Step(f"Monarch(where='{evil}')", big, small, done + kept, 0.2, notes=[f"by {evil}"]),
    ]
    steps[1].timeline = timeline
    capture = CaptureInfo("export", 1.2, [Island(f"moe{evil}", "Moe", evil)], [evil], evil)
    report = Report(f"Bert{evil}", capture, steps, [f"no cost formula for f {evil}"], H100.name)
    report.predictor = H100
    return report


class Tags(HTMLParser):
    """Every tag with its attributes, all text by the innermost tag, and whether tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)


def test_the_page_is_whole() -> None:
    text = made().to_html()
    page = Tags(text)
    assert text.startswith("<!doctype html>")
    for said in (
        "layer.\u200b5.\u200bdense",
        "H100-SXM",
        "head",
        "10 % 4",
        "by ",
        "Left in Python",
    ):
        assert said in text, said
    assert page.count("svg") == 7 + 1 + 2 + 1  # bars (with energy), timelines, roofline
    assert page.count("h1") == 1
    rows = [a for t, a in page.tags if t == "tr" and "data-a" in a]
    assert [a["data-a"] for a in rows].count("replaced") == 6
    assert len(rows) == 9
    sortable = [a for t, a in page.tags if t == "th" and "aria-sort" in a]
    assert len(sortable) == 11
    assert all(a.get("scope") == "col" for a in sortable)


def test_nothing_is_fetched() -> None:
    page = Tags(made().to_html())
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith("#") or value == "data:,", (tag, attributes)
    styles = " ".join(text for tag, text in page.text if tag == "style")
    assert "@import" not in styles
    assert "url(" not in styles
    assert "default-src 'none'" in str(page.tags)


def test_ids_are_unique_and_references_resolve() -> None:
    page = Tags(made().to_html())
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = [a["href"] for t, a in page.tags if t in ("a", "use") and a.get("href")]
    wanted += [f"#{a['aria-labelledby']}" for _, a in page.tags if a.get("aria-labelledby")]
    clips = re.findall(r"url\(#([^)]+)\)", str(page.tags))
    for reference in [*wanted, *(f"#{c}" for c in clips)]:
        assert str(reference).removeprefix("#") in ids, reference


def test_plots_take_the_page_colours() -> None:
    page = Tags(made().to_html())
    inside = [a for t, a in page.tags if t in ("path", "use", "text", "rect")]
    colours = set(
        re.findall(r"(?:fill|stroke): *([^;]+)", ";".join(a.get("style") or "" for a in inside))
    )
    assert colours
    assert all(c == "none" or c.startswith("var(--") for c in colours), colours
    assert all(a.get("aria-label") for t, a in page.tags if t == "svg")


@pytest.mark.parametrize("draw", [Report.to_html, Report._repr_html_])
def test_everything_is_escaped(draw: object) -> None:
    clean, evil = (Tags(draw(made(evil=e))) for e in ("", EVIL))  # type: ignore[operator]
    # (an attribute that holds an evil name is fine, one more element is not)
    tags = [
        [(t, sorted(a)) for t, a in p.tags if t not in ("ul", "li", "p", "code")]
        for p in (clean, evil)
    ]
    for name in ("script", "img", "iframe"):
        assert clean.count(name) == evil.count(name)
    assert not [a for _, a in evil.tags if any(k.startswith("on") for k in a)]
    assert not any(
        "49" in text and "7 * 7" not in text and EVIL[:8] in text for _, text in evil.text
    )
    assert any(EVIL in text for _, text in evil.text)
    assert len(tags[1]) >= len(tags[0])


def test_names_that_break_plots() -> None:
    for name in ("$\\frac{1}", "\x00\x1b", "名前" * 40, "_hidden", "a" * 500, "%s {0}", "\ud800"):
        report = made()
        report.steps[1].name = name
        Tags(report.to_html())


def test_without_a_device_it_says_why() -> None:
    report = made()
    plain = replace(report, device="", predictor=None)
    assert "No device was named" in plain.to_html()
    loaded = Report.from_json(report.to_json())
    assert "Roofline of H100-SXM" in loaded.to_html()  # a datasheet is found again
    loaded.device = "this machine"
    assert "loaded from a file" in html.unescape(loaded.to_html())


def test_prediction_and_measurement_meet_on_one_machine_only() -> None:
    report = made()
    for step in report.steps:
        step.after = replace(step.after, measured_s=0.5)
        step.before = replace(step.before, measured_s=0.5)
    assert "Predicted against measured" not in report.to_html()
    assert "which is not the device of the predictions" in " ".join(str(report).split())
    report.device = "this machine"
    assert "Predicted against measured" in report.to_html()
    assert "off by" in str(report)


def test_reports_that_lack_things() -> None:
    empty = Report("M", CaptureInfo("export"))
    Tags(empty.to_html())
    Tags(empty._repr_html_())
    nothing = Step("Pass()", Cost(), Cost(), [Decision("a", "linear", "skipped")])
    page = Tags(Report("M", CaptureInfo("export"), [nothing]).to_html())
    assert page.count("svg") == 0
    odd = Decision("a", "linear", "replaced", error=float("nan"))
    step = Step("Pass()", cost(2), cost(1), [odd], output_error=float("inf"))
    text = Report("M", CaptureInfo("export"), [step], device=H100.name).to_html()
    assert "NaN" not in text
    Tags(text)


def test_the_notebook_element() -> None:
    report = made()
    element = Tags(text := report._repr_html_())
    assert element.tags[0] == ("div", {"class": "rewriter-report"})
    assert element.count("script") == 0
    assert "totals are lower bounds" in text
    assert "layer.5.dense" in text
    styles = " ".join(t for tag, t in element.text if tag == "style")
    for rule in re.findall(r"([^{}]+)\{", styles):  # nothing of the notebook is restyled
        assert all(s.strip().startswith(".rewriter-report") for s in rule.split(",")), rule


def test_a_real_report() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)).eval()
    passes = [Monarch(nblocks=4), Quantize("int8-dynamic")]
    report = explain(model, passes, torch.zeros(8, 64), device="h100")
    page = Tags(report.to_html())
    assert page.count("svg") >= 10
    assert "2 of 2 linear layers rewritten" in report.to_html()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROBE = """
<script>
addEventListener("load", () => {
  const say = (k, v) => document.documentElement.setAttribute("data-" + k, v);
  const heads = [...document.querySelectorAll("#decisions th")];
  const error = heads.findIndex((h) => h.textContent === "error");
  const cells = () => [...document.querySelectorAll("#decisions tbody tr")]
    .map((r) => r.cells[error].textContent);
  heads[error].querySelector("button").click();
  say("down", heads[error].getAttribute("aria-sort") + " " + cells().slice(0, 3).join(" "));
  heads[error].querySelector("button").click();
  say("up", heads[error].getAttribute("aria-sort") + " " + cells().slice(0, 3).join(" "));
  const search = document.getElementById("search");
  search.value = "LAYER.3 models/deep";
  search.dispatchEvent(new Event("input"));
  say("found", document.getElementById("count").textContent);
  const before = getComputedStyle(document.body).backgroundColor;
  document.getElementById("theme").click();
  say("toggled", String(before !== getComputedStyle(document.body).backgroundColor));
  say("wide", String(document.documentElement.scrollWidth > innerWidth));
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(made().to_html().replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = dict(Tags(done.stdout).tags)["html"]
    assert said["data-down"] == "descending 0.0500 0.0400 0.0300"
    assert said["data-up"] == "ascending 0 0.0100 0.0200"
    assert said["data-found"] == "1 of 9 decisions"
    assert said["data-toggled"] == "true"
    assert said["data-wide"] == "false"


def test_schema_covers_every_field() -> None:
    from dataclasses import fields

    import jsonschema

    from rewriter.kernels.ops import PLAIN
    from rewriter.report import schema

    form = schema()
    jsonschema.Draft202012Validator.check_schema(form)
    validator = jsonschema.Draft202012Validator(form)
    report = made()
    report.steps[1].output_error = float("nan")
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10)).eval()
    real = explain(model, [Monarch(nblocks=4)], torch.zeros(8, 64), device="h100", measure=True)
    for one in (report, real, real.with_formulas(), real.at(batch=3)):
        validator.validate(json.loads(one.to_json()))

    definitions = form["$defs"]
    own = {f.name for f in fields(Report)} - {"snapshots", "predictor"} | {"format"}
    assert set(form["properties"]) == own
    for name, cls in {
        "capture": CaptureInfo, "island": Island, "step": Step, "timeline": Timeline,
        "decision": Decision, "cost": Cost, "training": Training, "work": Work, "form": CallForm,
        "cost_formulas": Cost, "training_formulas": Training, "work_formulas": Work,
    }.items():  # fmt: skip
        assert set(definitions[name]["properties"]) == {f.name for f in fields(cls)}, name
    for name in ("work", "work_formulas"):
        kind = definitions[name]["properties"]["kind"]
        assert tuple(kind["examples"]) == PLAIN
        assert all(re.fullmatch(kind["pattern"], known) for known in PLAIN)

    def tables(node: object) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object":
                assert "additionalProperties" in node
            for value in node.values():
                tables(value)
        elif isinstance(node, list):
            for value in node:
                tables(value)

    tables(form)
    broken = json.loads(real.to_json())
    broken["steps"][0]["after"]["colour"] = 1
    assert not validator.is_valid(broken)


def test_fused_places_are_not_called_left_as_is() -> None:
    report = made()
    fused = Decision("conv", "conv", "lowered", "norm folded")
    stays = Decision("fc", "linear", "skipped", "too small")
    own = Step("lowering", cost(1), cost(1), [fused, stays], None, True, 0.0, [])
    found = replace(report, steps=[own])
    assert "lowering: 1 place fused, 1 site left as is" in fragment(found)
    whole = page(found)
    assert whole.index("Fused, by rule") < whole.index("norm folded", whole.index("Fused, by rule"))
    kept = whole[whole.index('<section id="kept"') :]
    assert "too small" in kept
    assert "norm folded" not in kept
