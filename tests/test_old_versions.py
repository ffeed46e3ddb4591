"""Models that earlier versions saved and pickled load, and compute what they computed there.

The files of `data/version_…` were written by that version: `Sequential(Linear(16, 64), GELU,
Linear(64, 16))` after one recipe each, and what the result gave for `X`.
"""

from __future__ import annotations

import copy
import importlib
import json
import pathlib
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from closeness import assert_reordered
from marks import slow_but_named
from torch import Tensor, nn

import rewriter
from rewriter.passes import MonarchLinear, MonarchResidualLinear
from rewriter.store.old_names import MOVED

DATA = pathlib.Path(__file__).parent / "data"
OUTPUTS = {
    f"{version}/{name}": values
    for version in ("version_0_1_0", "version_0_2_0")
    for name, values in json.loads((DATA / version / "outputs.json").read_text()).items()
}
X = torch.linspace(-1, 1, 64).reshape(4, 16)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).eval()


def expected(name: str) -> Tensor:
    return torch.tensor(OUTPUTS[name])


@pytest.mark.parametrize("name", OUTPUTS)
def test_pickles_load(name: str) -> None:
    model: Any = pickle.loads((DATA / f"{name}.pkl").read_bytes())
    with torch.no_grad():
        assert_reordered(model(X), expected(name))
    assert isinstance(model, rewriter.RewrittenModule)
    assert "2 of 2 linear layers" in str(model.report) or name.endswith(
        ("topk", "resized", "0_2_0/memory_budget")
    )
    model.train()(X).sum().backward()
    again = pickle.loads(pickle.dumps(model.eval()))
    with torch.no_grad():
        assert_reordered(again(X), expected(name))


SAVED = [n for n in OUTPUTS if (DATA / n).is_dir()]


@pytest.mark.parametrize(
    ("name", "captured"),
    slow_but_named(
        [{n: n for n in SAVED}, {"uncaptured": False, "captured": True}],
        [(n, "captured" if "0_2_0" in n else "uncaptured") for n in SAVED],
    ),
)
def test_saves_load(name: str, captured: bool, tmp_path: pathlib.Path) -> None:
    model: Any = rewriter.load(DATA / name, net(), example_inputs=X if captured else None)
    with torch.no_grad():
        assert_reordered(model(X), expected(name))
    model.save(tmp_path)  # and are the same to this version
    with torch.no_grad():
        assert torch.equal(rewriter.load(tmp_path, net())(X), rewriter.load(DATA / name, net())(X))


@pytest.mark.parametrize(
    "layer",
    [
        MonarchResidualLinear(16, 8),
        MonarchResidualLinear(16, 8, residual="block-sparse"),
        MonarchLinear(16, 8, cap=True),
    ],
    ids=["low-rank", "block-sparse", "cap"],
)
def test_what_was_a_scalar_is_a_row_of_one(layer: Any, tmp_path: pathlib.Path) -> None:
    """FSDP2 shards no scalars, so gates and gains have the shape [1] now."""
    x = torch.randn(3, 16)
    fresh, old = copy.deepcopy(layer), copy.deepcopy(layer)
    assert all(p.ndim for p in layer.parameters())
    for name in layer.once_scalars:
        if name in old._parameters:
            old._parameters[name] = nn.Parameter(layer.get_parameter(name).detach()[0])
    assert {p.ndim for p in old.parameters()} > {0}
    fresh.reset_parameters() if isinstance(layer, MonarchLinear) else fresh.gate.data.fill_(1.0)
    fresh.load_state_dict(old.state_dict())
    for again in (fresh, pickle.loads(pickle.dumps(old))):
        assert all(p.ndim for p in again.parameters())
        with torch.no_grad():
            assert torch.equal(again(x), layer(x))


def test_a_save_with_a_scalar_takes_checkpoints_of_the_original() -> None:
    model: Any = rewriter.load(DATA / "version_0_2_0/residual", net())
    assert all(p.ndim for p in model.parameters())
    model.load_original(net().state_dict())
    assert all(
        p.ndim
        for p in pickle.loads((DATA / "version_0_2_0/residual.pkl").read_bytes()).parameters()
    )


@pytest.mark.parametrize("old", MOVED)
def test_a_module_has_its_old_name_too(old: str) -> None:
    assert importlib.import_module(old) is importlib.import_module(MOVED[old])
    assert importlib.import_module(old).__spec__.name == MOVED[old]


def test_import_paths_of_before_stay() -> None:
    from rewriter.base import Layer, Moments, Pass, Replacement, Skip, as_parameter, unusable
    from rewriter.capture import Capture, arguments, capture
    from rewriter.compiler import rewriter_backend
    from rewriter.engine import Engine, Options, check_passes
    from rewriter.sites import LINEAR, Site, find_sites

    assert all(
        [Layer, Moments, Pass, Replacement, Skip, as_parameter, unusable, Capture, arguments]
        + [capture, rewriter_backend, Engine, Options, check_passes, LINEAR, Site, find_sites]
    )


# a model that was captured by parts


class Branching(nn.Module):
    """Branches on data, so that its two layers are captured by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out: Tensor = self.last(-h if h.sum() > 0 else h)
        return out


PARTS = DATA / "version_0_2_0/by_parts"


@pytest.mark.parametrize("name", ["plain", "monarch", "int8"])
def test_a_model_by_parts_loads(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    home: Any = types.ModuleType("by_parts")  # where its class was then
    home.Branching = Branching
    monkeypatch.setitem(sys.modules, "by_parts", home)
    expected = torch.tensor(json.loads((PARTS / "outputs.json").read_text())[name])
    pickled = pickle.loads((PARTS / f"{name}.pkl").read_bytes())
    stored: Any = rewriter.load(PARTS / name, Branching().eval())
    captured = rewriter.load(PARTS / name, Branching().eval(), example_inputs=X)
    stored.save(tmp_path)
    again = rewriter.load(tmp_path, Branching().eval())
    for model in (pickled, stored, captured, again):
        with torch.no_grad():
            assert_reordered(model(X), expected)
            assert_reordered(model(X[:3]), expected[:3])
        model.train()(X).sum().backward()
    with torch.no_grad():
        assert torch.equal(again.eval()(X), stored.eval()(X))
