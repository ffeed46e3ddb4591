"""Weights of few bits that give a layer's outputs back: the search for ranges, the compensation."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_equal
from torch import Tensor, nn

from rewriter import rewrite
from rewriter.errors import OptionError, RewriteWarning
from rewriter.kernels.compensation import compensate, compensated_groups, searched_groups
from rewriter.kernels.weight_only import dequantize_groups, quantize_groups
from rewriter.passes import Quantize

SEARCHES = pytest.mark.parametrize("search", [searched_groups, compensated_groups])
BOTH = pytest.mark.parametrize("symmetric", [True, False])


def case(out: int = 24, width: int = 80, rows: int = 400) -> tuple[Tensor, Tensor]:
    """Weights, and H of inputs that correlate and differ in size."""
    g = torch.Generator().manual_seed(0)
    mix = (
        torch.randn(width, width, generator=g)
        * torch.logspace(0, -1.5, width)[torch.randperm(width, generator=g)]
    )
    x = (torch.randn(rows, width, generator=g) @ mix + 0.3).double()
    return torch.randn(out, width, generator=g) / 8, x.t() @ x / rows


def loss(weight: Tensor, groups: tuple, second: Tensor) -> float:
    lost = weight.double() - dequantize_groups(*groups)[:, : weight.shape[1]].double()
    return float(((lost @ second) * lost).sum())


@BOTH
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_step_lowers_the_error_of_outputs(bits: int, symmetric: bool) -> None:
    weight, second = case()
    options = bits, 32, symmetric  # 80 = 2 · 32 + 16: the last group is filled up
    rounded = quantize_groups(weight, *options)
    searched = searched_groups(weight, second, *options)
    made = compensated_groups(weight, second, *options)
    for found in (searched, made):
        for one, other in zip(found, rounded, strict=True):
            assert (one is None) == (other is None)
            assert one is None or (one.shape, one.dtype) == (other.shape, other.dtype)
        assert -(1 << bits - 1) <= found[0].min() < found[0].max() <= (1 << bits - 1) - 1
    assert loss(weight, searched, second) < 0.9**2 * loss(weight, rounded, second)
    assert loss(weight, made, second) < 0.8**2 * loss(weight, searched, second)


def textbook(w: Tensor, h: Tensor, scale: Tensor, size: int, order: list[int]) -> Tensor:
    """Algorithm 1 of the paper as it derives it: the inverse anew for the columns that are left."""
    w, q, left = w.double().clone(), torch.empty(w.shape), list(order)
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        step = scale[:, left[0] // size].double()
        q[:, left[0]] = (w[:, left[0]] / step).round().clamp(-8, 7)
        lost = (w[:, left[0]] - q[:, left[0]] * step) / inverse[0, 0]
        w[:, left] -= torch.outer(lost, inverse[0])
        left = left[1:]
    return q.to(torch.int8)


@pytest.mark.parametrize("descending", [True, False])
def test_it_is_the_algorithm_of_the_paper(descending: bool) -> None:
    weight, second = case(out=5)
    scale = torch.full((5, 3), 0.05)
    order = (-second.diagonal()).argsort().tolist() if descending else list(range(80))
    damped = second + 0.02 * second.diagonal().mean() * torch.eye(80)
    want = textbook(weight, damped, scale, 32, order)
    got = compensate(weight, second, scale, None, 4, 32, damping=0.02, descending=descending)
    assert_equal(got[:, :80], want)
    assert_equal(got[:, 80:], want[:, -1:].expand(5, 16))


@BOTH
def test_inputs_that_do_not_correlate_leave_rounding(symmetric: bool) -> None:
    weight = case()[0]
    q, scale, zero = quantize_groups(weight, 4, 32, symmetric)
    for second in (torch.eye(80), torch.zeros(80, 80), torch.rand(80).diag()):
        assert_equal(compensate(weight, second, scale, zero, 4, 32), q)


@SEARCHES
@BOTH
def test_weights_on_the_grid_stay(search, symmetric: bool) -> None:
    groups = quantize_groups(case()[0], 4, 32, symmetric)
    weight = dequantize_groups(*groups)
    assert_equal(dequantize_groups(*search(weight, case(width=96)[1], 4, 32, symmetric)), weight)


@SEARCHES
@BOTH
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1e37])
def test_extremes_are_not_worse_than_rounded(search, symmetric: bool, scale: float) -> None:
    weight, second = case(out=4)
    weight, second = weight * scale, torch.outer(second[0], second[0])  # of one row
    made = dequantize_groups(*search(weight, second, 4, 32, symmetric))[:, :80]
    rounded = dequantize_groups(*quantize_groups(weight, 4, 32, symmetric))[:, :80]
    assert made.isfinite().all()
    total = (weight.double() @ second.double()).norm()
    assert ((weight - made).double() @ second.double()).norm() <= 1.1 * (
        (weight - rounded).double() @ second.double()
    ).norm() + 1e-6 * total


@SEARCHES
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_weights(search, dtype: torch.dtype) -> None:
    weight, second = case(out=4)
    _, scale, zero = search(weight.to(dtype), second, 4, 32, False)
    kept = torch.float64 if dtype == torch.float64 else torch.bfloat16
    assert scale.dtype == zero.dtype == kept


@SEARCHES
def test_moments_of_another_layer_are_refused(search) -> None:
    weight, second = case()
    with pytest.raises(ValueError, match=r"finite \[80, 80\] matrix, got \[79, 79\]"):
        search(weight, second[1:, 1:], 4, 32, True)
    second[3, 3] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        search(weight, second, 4, 32, True)


# as the option of a scheme


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(80, 96), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


def net() -> tuple[nn.Module, list[Tensor]]:
    """A model, and batches whose features correlate."""
    torch.manual_seed(0)
    mix = torch.randn(80, 80) * torch.logspace(0, -1.5, 80)
    return Net().eval(), [torch.randn(64, 80) @ mix for _ in range(8)]


@pytest.mark.parametrize("scheme", ["int4-weight", "int4-dynamic"])
def test_the_ledger_shows_what_each_method_leaves(scheme: str) -> None:
    model, batches = net()
    decisions = {}
    for method in ("round", "awq", "gptq"):
        quantize = Quantize(scheme, group_size=32, method=method, where="one")
        made = rewrite(model, [quantize], batches[0], calibration=batches)
        (found,) = (d for d in made.report.steps[1].decisions if d.site == "one")
        decisions[method] = found
        # what is not contiguous is copied at each call: decoding was at half its speed
        assert all(b.is_contiguous() for b in made.one.buffers())
        held = torch.cat(batches[3::4])  # every fourth batch is held out
        want = held @ model.one.weight.detach().t()
        lost = want - held @ made.one.dense_weight().t()
        assert found.output_error == pytest.approx(float(lost.norm() / want.norm()), rel=1e-4)
    rounded, awq, gptq = decisions.values()
    assert rounded.error < gptq.error
    assert awq.output_error < 0.95 * rounded.output_error
    assert gptq.output_error < 0.7 * rounded.output_error


def test_layers_whose_inputs_are_not_known_are_rounded_aloud() -> None:
    model, batches = net()
    with pytest.warns(RewriteWarning, match="method='gptq'.*rounded to the nearest.*calibration="):
        made = rewrite(model, [Quantize("int4-weight", method="gptq", where="one")], batches[0])
    rounded = rewrite(model, [Quantize("int4-weight", where="one")], batches[0])
    assert_equal(made.state_dict(), rounded.state_dict())


def test_option_errors() -> None:
    with pytest.raises(OptionError, match="method='gtpq' is unknown; did you mean 'gptq'"):
        Quantize("int4-weight", method="gtpq")
    with pytest.raises(OptionError, match="'int8-weight' does not read method"):
        Quantize("int8-weight", method="gptq")
