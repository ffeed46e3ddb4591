"""Learning rates per factor, and optimizers carried over a rewrite."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rewriter import OptionError, RewriteWarning, param_groups, remap_optimizer, rewrite
from rewriter.passes import Densify, Monarch, MonarchLinear

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
SIZES = [(16, 12, 4), (10, 7, 3), (9, 14, (3, 2))]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> list[float]:
    target, losses = torch.sin(2 * X), []
    for _ in range(number):
        loss = (model(X) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_factors_get_the_rates_of_the_rule() -> None:
    """N = 4 of 32 → 64: right sums 8 inputs of 32, left K·rank = 8; two factors."""
    model = rewrite(net(), [Monarch(4, where="0")], X)
    groups = param_groups(model, 1e-3, weight_decay=0.1)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(list(model.parameters()))
    assert found[id(model[0].right)] == (pytest.approx(2e-3), 0.1)
    assert found[id(model[0].left)] == (pytest.approx(2e-3), 0.1)
    assert found[id(model[0].bias)] == (1e-3, 0.0)
    assert found[id(model[2].weight)] == (1e-3, 0.1)
    torch.optim.AdamW(groups).step()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_factors_follow_from_the_dense_gradient(sizes: Any, interleaved: bool) -> None:
    layer = MonarchLinear(*sizes, bias=False, interleaved=interleaved, dtype=torch.float64)
    gradient = torch.randn(sizes[1], sizes[0], dtype=torch.float64)
    want = torch.autograd.grad((layer.dense_weight() * gradient).sum(), [layer.right, layer.left])
    found = layer.from_dense_gradient(gradient, square=False)
    assert_close((found["right"], found["left"]), want)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_dense_gradient_agrees_with_both_factors(sizes: Any, interleaved: bool) -> None:
    """Consistent averages come back: of the smallest g, the chain rule gives what was put in."""
    layer = MonarchLinear(*sizes, bias=False, interleaved=interleaved, dtype=torch.float64)
    gradient = layer._whole(layer._cut(torch.randn(sizes[1], sizes[0], dtype=torch.float64)))
    given = layer.from_dense_gradient(gradient, square=False)
    dense = layer.to_dense_gradient(given, square=False)
    assert dense is not None
    if sizes[0] % 2 == 0 and sizes[1] % 4 == 0:  # padding has no gradient to agree with
        again = layer.from_dense_gradient(dense, square=False)
        assert_close(dict(again), dict(given))
        assert dense.norm() <= gradient.norm() * (1 + 1e-9)


def test_second_moments_of_a_constant_come_back() -> None:
    layer = MonarchLinear(16, 16, 4, bias=False, dtype=torch.float64)
    constant = torch.full((16, 16), 0.25, dtype=torch.float64)
    given = layer.from_dense_gradient(constant, square=True)
    assert_close(layer.to_dense_gradient(given, square=True), constant)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam])
def test_densify_in_the_middle_goes_on_without_a_spike(make: Any) -> None:
    model = rewrite(net(), [Monarch(4, init="random")], X)
    optimizer = make(param_groups(model, 3e-3))
    before = steps(model, optimizer, 150)
    dense = rewrite(model, [Densify()], X)
    mapped = remap_optimizer(optimizer, model, dense)
    assert type(mapped) is make
    found = mapped.remapped
    assert sorted(found.converted) == ["0.weight", "2.weight"]
    assert sorted(found.carried) == ["0.bias", "2.bias"]
    assert not found.reset
    assert all(g["lr"] == pytest.approx(3e-3) for g in mapped.param_groups)
    assert all(s["step"] == 150 for s in mapped.state.values())
    after = steps(dense, mapped, 100)
    assert max(after[:10]) < 1.1 * before[-1]
    assert after[-1] < before[-1]
    assert len(optimizer.state) == 6  # the old one is as it was


def test_monarch_in_the_middle_takes_the_state_along() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps(model, optimizer, 20)
    optimized = rewrite(model, [Monarch(2, where="0")], X)
    mapped = remap_optimizer(optimizer, model, optimized)
    assert sorted(mapped.remapped.converted) == ["0.left", "0.right"]
    layer, momentum = optimized[0], optimizer.state[model[0].weight]["momentum_buffer"]
    want = layer.from_dense_gradient(momentum, square=False)["right"]
    assert_close(mapped.state[layer.right]["momentum_buffer"], want)
    assert mapped.param_groups[0]["lr"] == 0.1
    steps(optimized, mapped, 5)


def test_what_has_no_rule_begins_anew_and_is_named() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    model = Functional()
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimized = rewrite(model, [Monarch(4)], X)
    with pytest.warns(RewriteWarning, match="begins anew for 2 parameters: weight.right"):
        mapped = remap_optimizer(optimizer, model, optimized)
    steps(optimized, mapped, 2)


def test_schedulers_and_frozen_parameters() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    steps(model, optimizer, 1)
    scheduler.step()
    optimized = rewrite(model, [Monarch(4)], X)
    mapped = remap_optimizer(optimizer, model, optimized)
    rates = {id(p): g["lr"] for g in mapped.param_groups for p in g["params"]}
    assert id(optimized[0].right) not in rates
    scale = optimized[2].lr_scales()["right"]
    assert rates[id(optimized[2].right)] == pytest.approx(5e-3 * scale)
    old = model[2].weight.clone()
    steps(optimized, mapped, 1)
    assert torch.equal(model[2].weight, old)


@pytest.mark.parametrize(
    ("options", "message"), [({"lr": -1.0}, "lr=-1.0"), ({"lr": float("nan")}, "lr=nan")]
)
def test_impossible_rates(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        param_groups(net(), **options)


def test_optimizers_of_other_models_are_refused() -> None:
    with pytest.raises(OptionError, match="nothing to optimize"):
        param_groups(net().requires_grad_(False), 1e-3)
    optimizer = torch.optim.AdamW(net().parameters())
    with pytest.raises(OptionError, match="holds no parameter of the model"):
        remap_optimizer(optimizer, net(), net())
