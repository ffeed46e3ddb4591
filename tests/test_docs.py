"""What the documents show is what the package does."""

from __future__ import annotations

import json
import pathlib
import re
import runpy
from typing import Any

import pytest
import torch
from _harness import rendered
from marks import slow_but

from rewriter.passes import quantize

ROOT = pathlib.Path(__file__).parents[1]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@pytest.mark.parametrize("document", slow_but(["README.md", "docs/guide.md"], 0))
def test_every_line_of_the_documents_runs(
    document: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for block in blocks(document, "python"):
        exec(compile(block, document, "exec"), namespace)
    printed = capsys.readouterr().out
    assert "linear layers rewritten" in printed
    # but for times, what rounding moves and what lowering measures, a ledger that is shown is the
    # one that is printed
    (shown,) = blocks(document, "text") or [""]
    for line in shown.splitlines():
        if "2 of 2" in line or "replaced" in line or line.startswith("parameter"):
            assert line in printed, line


def test_tables_of_results_show_the_figures_beside_them() -> None:
    found = sorted((ROOT / "benchmarks/results").glob("*.json"))
    assert found
    for path in found:
        shown = path.with_suffix(".md").read_text(encoding="utf-8")
        assert shown == rendered(json.loads(path.read_text(encoding="utf-8"))), path.name


def test_the_pass_in_contributing_is_the_example() -> None:
    shown = next(b for b in blocks("CONTRIBUTING.md", "python") if "class LowRank" in b)
    example = (ROOT / "examples/write_a_pass.py").read_text()
    marked = example.split("# [pass]\n")[1].split("# [/pass]")[0]
    assert marked.strip() == shown.strip()
    body = shown[shown.index("@dataclass") :].strip().splitlines()
    assert len([line for line in body if line.strip()]) < 20


def test_the_record_in_contributing_is_the_example() -> None:
    example = (ROOT / "examples/write_an_op.py").read_text()
    marked = example.split("# [record]\n")[1].split("# [/record]")[0]
    assert marked.strip() in [block.strip() for block in blocks("CONTRIBUTING.md", "python")]


def test_the_scheme_in_contributing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "SCHEMES", dict(quantize.SCHEMES))
    (shown,) = (b for b in blocks("CONTRIBUTING.md", "python") if "Scheme(" in b)
    namespace: dict[str, Any] = {"__name__": "contributing"}
    torch.manual_seed(0)
    exec(compile(shown, "CONTRIBUTING.md", "exec"), namespace)
    layer = namespace["optimized"]
    (step,) = layer.report.steps[1:]
    (decision,) = step.decisions
    assert decision.action == "replaced"
    assert 0.02 < decision.error < 0.1  # a step of 1/7 of each row's largest: 4 bits, not 8


def test_the_example_pass_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/write_a_pass.py"), run_name="__main__")
    assert "2 of 2 linear layers rewritten" in capsys.readouterr().out


LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md",
                                      "docs/guide.md", "docs/figures.md"])  # fmt: skip
def test_every_link_leads_somewhere(document: str) -> None:
    page = ROOT / document
    for path, place in LINK.findall(page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        if place:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert place in anchors, (path, place)
