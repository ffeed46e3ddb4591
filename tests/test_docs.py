"""What the documents show is what the package does."""

from __future__ import annotations

import pathlib
import re
import runpy

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_every_line_of_the_readme_runs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    (shown,) = blocks("README.md", "text")
    # but for times and what rounding moves, the ledger is the one the README shows
    for line in shown.splitlines():
        if "2 of 2" in line or "replaced" in line or line.startswith(("parameters", "peak")):
            assert line in printed, line


def test_the_pass_in_contributing_is_the_example() -> None:
    shown = next(b for b in blocks("CONTRIBUTING.md", "python") if "(Pass)" in b)
    example = (ROOT / "examples/write_a_pass.py").read_text()
    marked = example.split("# [pass]\n")[1].split("# [/pass]")[0]
    assert marked.strip() == shown.strip()
    body = shown[shown.index("@dataclass") :].strip().splitlines()
    assert len([line for line in body if line.strip()]) < 20


def test_the_example_pass_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/write_a_pass.py"), run_name="__main__")
    assert "2 of 2 linear layers rewritten" in capsys.readouterr().out
