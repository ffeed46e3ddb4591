"""Passes and layers of another package: handed in, or listed among its entry points."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import rewriter
from rewriter import LINEAR, OptionError, Pass, Replacement, Site, StoreError, load, rewrite
from rewriter.cli import main
from rewriter.recipe import plugins
from rewriter.recipe.parse import parse_pass

THEIRS = """
    from dataclasses import dataclass
    import torch
    from torch import nn
    from rewriter import LINEAR, Layer, Pass, Replacement

    class LowRankLinear(Layer):
        op = "low_rank"

        def __init__(self, in_features, out_features, rank, bias=True, device=None, dtype=None):
            super().__init__()
            self.in_features, self.out_features, self.rank = in_features, out_features, rank
            self.up = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
            self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
            self.register_bias(out_features if bias else None, device, dtype)

        def forward(self, x):
            return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)

    @dataclass(frozen=True)
    class LowRank(Pass):
        matches = (LINEAR,)
        rank: int = 8

        def propose(self, site):
            u, s, v = torch.linalg.svd(site.weight.detach(), full_matrices=False)
            layer = LowRankLinear(*site.weight.shape[::-1], self.rank)
            layer.up = nn.Parameter(u[:, : self.rank] * s[: self.rank])
            layer.down = nn.Parameter(v[: self.rank].contiguous())
            layer.bias = site.bias
            return Replacement(layer, error=float(s[self.rank :].norm() / s.norm()))

    def model():
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    number = 3
"""
LISTED = """
    [rewriter.passes]
    lowrank = theirs.low_rank:LowRank
    [rewriter.layers]
    LowRankLinear = theirs.low_rank:LowRankLinear
"""
X = torch.linspace(-1, 1, 64).view(4, 16)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a package with these entry points where Python looks."""

    def distribution(entry_points: str, name: str = "theirs") -> None:
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        monkeypatch.syspath_prepend(str(tmp_path))

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/__init__.py").write_text("")
    (tmp_path / "theirs/low_rank.py").write_text(textwrap.dedent(THEIRS))
    (tmp_path / "theirs/broken.py").write_text("raise RuntimeError('half installed')")
    (tmp_path / "theirs/trap.py").write_text("raise SystemExit('a recipe had this imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("theirs", "theirs.low_rank", "theirs.broken", "theirs.trap"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return distribution


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval()


def test_contributing_names_the_groups_that_are_read() -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    for group in plugins.GROUPS.values():
        assert f'[project.entry-points."{group}"]' in text


def test_a_listed_pass_has_a_name_on_the_command_line(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(LISTED)
    assert main(["report", "theirs.low_rank:model", "--pass", "lowrank:rank=4"]) == 0
    printed = capsys.readouterr().out
    assert "LowRank(rank=4)" in printed
    assert "1 of 1 linear layers rewritten" in printed
    assert parse_pass("LowRank(rank=4)") == parse_pass("lowrank:4")


def test_a_listed_pass_has_a_name_in_options(install: Callable[..., None]) -> None:
    install(LISTED)
    options = {"passes": ["lowrank:rank=4"], "inner": "eager"}
    compiled = torch.compile(net(), backend="rewriter", options=options)
    want = rewrite(net(), [parse_pass("lowrank:rank=4")], X)
    with torch.no_grad():
        assert_close(compiled(X), want(X))


def test_what_is_listed_loads_and_takes_other_weights(
    install: Callable[..., None], tmp_path: Path
) -> None:
    install(LISTED)
    optimized = rewrite(net(), [parse_pass("lowrank:rank=4")], X)
    rewriter.save(optimized, tmp_path / "saved")
    loaded: Any = load(tmp_path / "saved", net())
    assert type(loaded[0]).__name__ == "LowRankLinear"
    assert_close(loaded(X), optimized(X))
    other = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval()
    rewriter.load_original(loaded, other.state_dict())
    assert_close(loaded(X), rewrite(other, [parse_pass("lowrank:rank=4")], X)(X))


def test_what_is_not_listed_is_handed_in(install: Callable[..., None], tmp_path: Path) -> None:
    from theirs.low_rank import LowRank, LowRankLinear

    optimized = rewrite(net(), [LowRank(4)], X)
    rewriter.save(optimized, tmp_path / "saved")
    with pytest.raises(StoreError, match=r"LowRankLinear.*allow-list: pass layers=\[LowRankLinear"):
        load(tmp_path / "saved", net())
    with pytest.raises(StoreError, match="allow-list"):
        load(tmp_path / "saved", net(), layers=[LowRank])
    loaded: Any = load(tmp_path / "saved", net(), layers=[LowRank, LowRankLinear])
    assert_close(loaded(X), optimized(X))
    with pytest.raises(OptionError, match="is no class derived from rewriter.Layer"):
        load(tmp_path / "saved", net(), layers=[nn.Sequential])
    with pytest.raises(OptionError, match="layers must be a list of classes"):
        load(tmp_path / "saved", net(), layers=LowRankLinear)
    again = type("LowRankLinear", (LowRankLinear,), {"__module__": LowRankLinear.__module__})
    with pytest.raises(OptionError, match=r"two classes are called theirs.low_rank.LowRankLinear"):
        load(tmp_path / "saved", net(), layers=[LowRankLinear, again])


@pytest.mark.parametrize("named", ["theirs.trap.Layer", "theirs.low_rank.Other", "theirs.LowRank"])
def test_nothing_is_imported_because_a_recipe_names_it(
    install: Callable[..., None], tmp_path: Path, named: str
) -> None:
    install(LISTED + "    Trap = theirs.trap:Listed\n")
    rewriter.save(rewrite(net(), [parse_pass("lowrank:4")], X), tmp_path / "saved")
    recipe = tmp_path / "saved/recipe.json"
    document = json.loads(recipe.read_text())
    document["layers"][0]["class"] = named
    recipe.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=f"names {named}, which is not on the allow-list"):
        load(tmp_path / "saved", net())
    assert "theirs.trap" not in sys.modules


@pytest.mark.parametrize(
    ("listed", "text", "match"),
    [
        (
            "monarch = theirs.low_rank:LowRank",
            "monarch:4",
            "two passes are called 'monarch': rewriter.passes.monarch.Monarch and the entry point "
            "monarch = 'theirs.low_rank:LowRank' of theirs",
        ),
        (
            "mine = theirs.low_rank:LowRank\n    Mine = theirs.low_rank:Other",
            "mine",
            "two passes are called 'mine': the entry point Mine = 'theirs.low_rank:Other' of "
            "theirs and the entry point mine = 'theirs.low_rank:LowRank' of theirs",
        ),
        (
            "mine = theirs.broken:Pass",
            "mine",
            "the entry point mine = 'theirs.broken:Pass' of theirs cannot be imported "
            r"\(RuntimeError: half installed\)",
        ),
        ("mine = theirs.low_rank:Gone", "mine", r"cannot be imported \(AttributeError: "),
        (
            "mine = theirs.low_rank:number",
            "mine",
            "theirs is no pass: it must derive from rewriter",
        ),
        ("mine = theirs.low_rank:LowRankLinear", "mine", "of theirs is no pass: it must derive"),
        ("mine = theirs.low_rank:LowRank", "mime", "no pass is called 'mime'; did you mean 'mine'"),
    ],
)
def test_entry_points_that_contradict(
    install: Callable[..., None], listed: str, text: str, match: str
) -> None:
    install(f"    [rewriter.passes]\n    {listed}\n")
    with pytest.raises(OptionError, match=match):
        parse_pass(text)
    assert parse_pass("quantize").name == "quantize"  # the others are as they were


def test_a_listed_class_that_is_broken_is_said_when_a_recipe_needs_it(
    install: Callable[..., None], tmp_path: Path
) -> None:
    install(LISTED)
    rewriter.save(rewrite(net(), [parse_pass("lowrank:4")], X), tmp_path / "saved")
    (tmp_path / "theirs/low_rank.py").write_text("raise RuntimeError('half installed')")
    del sys.modules["theirs.low_rank"]
    with pytest.raises(
        StoreError, match=r"names theirs.low_rank.LowRank.*and the entry point .* of"
    ):
        load(tmp_path / "saved", net())


@dataclass(frozen=True)
class Halved(Pass):
    """W x → (W/2) x + (W/2) x, by layers that know nothing of what was trained before."""

    matches = (LINEAR,)

    def propose(self, site: Site) -> Replacement:
        by_hand = site.module is None  # Python code calls a Layer or an nn.Linear alone
        layer = nn.Linear((1 if by_hand else 2) * site.in_features, site.out_features)
        weight = site.weight.detach().clone()
        layer.weight.data = weight if by_hand else torch.cat([weight / 2] * 2, 1)
        layer.bias = cast(nn.Parameter, site.bias)
        return Replacement(layer if by_hand else nn.Sequential(_Twice(), layer))


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("make", [net, ByHand])
@pytest.mark.parametrize("trains", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_what_replaces_frozen_weights_is_frozen(
    make: Callable[[], nn.Module], trains: tuple[str, ...]
) -> None:
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(trains))
    rewritten = rewrite(model, [Halved()], X)
    assert_close(rewritten(X), model(X))
    for name, parameter in rewritten.named_parameters():
        assert parameter.requires_grad == name.endswith(trains), name
