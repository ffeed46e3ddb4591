"""Monarch plus a low-rank or block-sparse residual: the layer, the fit, and the pass."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
from closeness import assert_reordered
from torch import Tensor, nn
from torch.testing import assert_close

import rewriter
from rewriter import OptionError, Replacement, Site, Skip, rewrite
from rewriter.kernels.residual import (
    SIDE,
    block_sparse_dense,
    block_sparse_fit,
    block_sparse_linear,
    low_rank_fit,
)
from rewriter.passes import Densify, Monarch, MonarchResidual, MonarchResidualLinear

KINDS = ("low-rank", "block-sparse")
SIZES = [(96, 64), (64, 96), (70, 45)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def second_of(size: int) -> Tensor:
    """A covariance with a few strong directions."""
    x = torch.randn(4 * size, size).double() * torch.linspace(0.05, 3, size)
    return x.t() @ x / len(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_layer_computes_its_dense_weight(kind: Any, sizes: tuple[int, int]) -> None:
    layer = MonarchResidualLinear(*sizes, residual=kind, dtype=torch.float64)
    with torch.no_grad():
        layer.gate.fill_(0.7)
    x = torch.randn(3, 5, sizes[0], dtype=torch.float64, requires_grad=True)
    y, want = layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias)
    assert_close(y, want)
    inputs, g = [x, *layer.parameters()], torch.randn_like(y)
    assert_close(torch.autograd.grad(y, inputs, g), torch.autograd.grad(want, inputs, g))
    fresh = MonarchResidualLinear(**layer.config(), dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), y)
    assert torch.equal(copy.deepcopy(layer)(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_random_init_has_the_scale_of_nn_linear(kind: Any) -> None:
    layer = MonarchResidualLinear(512, 300, residual=kind, bias=False)
    with torch.no_grad():
        assert float(layer(torch.randn(2000, 512)).std()) == pytest.approx(3**-0.5, rel=0.08)


def test_low_rank_fit_is_the_optimum() -> None:
    w, second = torch.randn(20, 30).double(), second_of(30)
    up, down = low_rank_fit(w, 5)
    sigma = torch.linalg.svdvals(w)
    assert float((w - up @ down).norm()) == pytest.approx(float(sigma[5:].norm()))
    root = torch.linalg.cholesky(second)
    up, down = low_rank_fit(w, 5, root)
    sigma = torch.linalg.svdvals(w @ root)
    assert float(((w - up @ down) @ root).norm()) == pytest.approx(float(sigma[5:].norm()))


@pytest.mark.parametrize("sizes", [(70, 45), (64, 96)])
def test_block_sparse_fit_keeps_the_strongest_blocks_at_their_best(sizes: tuple[int, int]) -> None:
    inner, out = sizes
    w = torch.randn(out, inner).double()
    w[:SIDE, SIDE : 2 * SIDE] *= 10
    blocks, index = block_sparse_fit(w, 1)
    assert int(index[0, 0]) == 1
    dense = block_sparse_dense(blocks, index, out, inner)
    kept = dense != 0
    assert torch.equal(dense[kept], w[kept])
    x = torch.randn(7, inner).double()
    assert_close(block_sparse_linear(x, blocks, index, out), x @ dense.t())
    second = second_of(inner)
    best = block_sparse_dense(*block_sparse_fit(w, 1, second), out, inner)
    lost = w - best
    # at the least squares solution the gradient vanishes where values are kept
    assert float((lost @ second)[best != 0].abs().max()) < 1e-9 * float((w @ second).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_exact_for_what_it_can_hold(kind: Any, sizes: tuple[int, int]) -> None:
    """A Monarch matrix alone, and closer than Monarch alone for others."""
    inner, out = sizes
    options: dict[str, Any] = {"residual": kind, "share": 0.2, "nblocks": 8}
    linear = nn.Linear(inner, out, dtype=torch.float64)
    linear.weight = nn.Parameter(
        rewriter.passes.MonarchLinear(inner, out, 8, dtype=torch.float64).dense_weight().detach()
    )
    answer = MonarchResidual(**options).propose(Site.of(linear))
    assert isinstance(answer, Replacement)
    assert answer.error is not None
    assert answer.error < 1e-6
    other = nn.Linear(inner, out)
    alone = Monarch(nblocks=8).propose(Site.of(other))
    both = MonarchResidual(**options).propose(Site.of(other))
    assert isinstance(alone, Replacement)
    assert isinstance(both, Replacement)
    assert both.error is not None
    assert alone.error is not None
    assert both.error < 0.97 * alone.error
    assert both.layer.bias is other.bias


@pytest.mark.parametrize("kind", KINDS)
def test_end_to_end(kind: Any, tmp_path: pathlib.Path) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    data = [torch.randn(200, 64) * torch.linspace(0.05, 3, 64) for _ in range(10)]
    x = data[0][:6]
    passes = [MonarchResidual(8, residual=kind, share=0.2)]
    plain = rewrite(model, passes, x)
    fitted = rewrite(model, passes, x, calibration=data)
    assert len(plain.report.replaced) == len(fitted.report.replaced) == 2
    held = torch.randn(500, 64) * torch.linspace(0.05, 3, 64)
    want = model[0](held)
    with torch.no_grad():
        errors = [float((m.get_submodule("0")(held) - want).norm()) for m in (plain, fitted)]
    assert errors[1] < errors[0]
    assert fitted.report.replaced[0].output_error is not None
    rewriter.save(fitted, tmp_path / "saved")
    assert torch.equal(rewriter.load(tmp_path / "saved", model)(x), fitted(x))
    assert_reordered(rewrite(fitted, [Densify()], x)(x), fitted(x))
    optimizer = torch.optim.AdamW(rewriter.param_groups(fitted, 1e-3))
    before = float((fitted(held) - model(held).detach()).square().mean().detach())
    for _ in range(20):
        optimizer.zero_grad()
        loss = (fitted(held) - model(held).detach()).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < before
    gate = fitted.get_parameter("0.gate")
    assert float(gate.detach()) != 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "dense"}, "residual='dense' is unknown; there are low-rank"),
        ({"share": 0}, "share must be"),
        ({"share": 1.5}, "share must be"),
        ({"nblocks": 0}, "nblocks must be"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MonarchResidual(**options)


def test_what_is_left() -> None:
    for linear, options, reason in (
        (nn.Linear(64, 64), {"nblocks": 2, "share": 0.5}, "would hold"),
        (nn.Linear(2, 64), {"nblocks": 4}, "more than the 2 -> 64"),
    ):
        answer = MonarchResidual(**options).propose(Site.of(linear))
        assert isinstance(answer, Skip)
        assert reason in answer.reason
    bad = nn.Linear(64, 64)
    nn.init.constant_(bad.weight, float("nan"))
    assert isinstance(MonarchResidual().propose(Site.of(bad)), Skip)
    meta = MonarchResidual(8).propose(Site.of(nn.Linear(64, 64, device="meta")))
    assert isinstance(meta, Replacement)
    assert meta.error is None
