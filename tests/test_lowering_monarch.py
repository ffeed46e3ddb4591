"""Lowering of Monarch layers with int8 factors: one call, what follows it, and several as one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from torch import Tensor, nn
from unlowered import unlowered

from rewriter import load, rewrite
from rewriter.kernels import int8_cpu
from rewriter.kernels import int8_monarch as monarch
from rewriter.lowering import int8_monarchs
from rewriter.passes import Monarch, Quantize

X = torch.linspace(-2, 2, 2 * 5 * 16).view(2, 5, 16).sin()
pytestmark = pytest.mark.skipif(int8_cpu.refusal() is not None, reason="no compiled kernel")


@pytest.fixture(autouse=True)
def _always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test goes by a time: the fused op counts as the faster one."""
    monkeypatch.setattr(monarch, "pick_kernel", lambda *_: "native")
    monkeypatch.setattr("rewriter.kernels.int8_linear.pick_kernel", lambda *_: "native")
    monkeypatch.setattr("rewriter.kernels.int8_choice.pick_kernel", lambda *_: "native")
    monkeypatch.setattr(int8_monarchs, "fastest", lambda key, version, make, *_: list(make())[-1])
    monkeypatch.setattr("rewriter.engine.engine.Engine._lowering_pays", lambda _: True)


class Block(nn.Module):
    """As in BERT: three products of one input, an MLP, sums and LayerNorms."""

    def __init__(self, odd: int = 0) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16 + odd, bias=b) for b in (True, False, True))
        self.out, self.norm = nn.Linear(16 + odd, 16), nn.LayerNorm(16)
        self.up, self.act, self.down = nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        x = self.norm(self.out(mixed) + x)
        return self.head(self.last(self.down(self.act(self.up(x))) + x).flatten(1)[:, -16:])


def both(model: nn.Module, **options: Any) -> tuple[Any, Any]:
    passes = [Monarch(nblocks=4, where=options.pop("where", None)), Quantize(**options)]
    lowered = rewrite(model, passes, X)
    return lowered, unlowered(lowered)


def fused(model: Any) -> dict[str, str]:
    (step,) = [s for s in model.report.steps if s.name == "lowering"]
    return {d.site: d.kernel or d.reason for d in step.decisions}


def block(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Block(**options).eval()


def test_a_block_of_monarch_layers_runs_in_fused_ops_of_equal_results(tmp_path: Any) -> None:
    lowered, plain = both(block())
    assert fused(lowered) == {
        "q": "joined_int8_monarch", "out": "int8_linear_norm", "up": "int8_mlp_norm",
        "head": "int8_monarch",
    }  # fmt: skip
    with torch.no_grad():
        want = plain(X)
        assert_reordered(lowered(X), want)
        assert_reordered(copy.deepcopy(lowered)(X), want)
        lowered.save(tmp_path)
        assert_reordered(load(tmp_path, block())(X), want)
    assert lowered.state_dict().keys() == plain.state_dict().keys()


def test_layers_that_are_joined_give_the_bits_of_the_single_ones() -> None:
    model = nn.ModuleDict({n: nn.Linear(16, 16, bias=n != "k") for n in "qkv"}).eval()

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([part(x).exp() for part in self.parts.values()])

    lowered, plain = both(Fork().eval())
    assert fused(lowered) == {"parts.q": "joined_int8_monarch"}
    with torch.no_grad():
        assert_equal(lowered(X), plain(X))
        for model in (lowered, plain):
            model.parts["k"].qleft[:, 1] = 3
        assert_equal(lowered(X), plain(X))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        # one range for all that right makes
        pytest.param(block(), {"activation": "per_tensor"}, marks=pytest.mark.slow),
        # 17 outputs do not fill 4 blocks
        pytest.param(block(odd=1), {}, marks=pytest.mark.slow),
        (block(), {"where": "[qkoud]*"}),  # one of the three is no Monarch layer
    ],
)
def test_layers_that_cannot_be_joined_run_one_by_one(model: nn.Module, options: Any) -> None:
    lowered, plain = both(model, **options)
    assert fused(lowered)["q"] == "int8_monarch" or "where" in options
    with torch.no_grad():
        assert_reordered(lowered(X), plain(X))


def test_an_mlp_of_a_monarch_and_a_plain_layer_is_fused_too() -> None:
    for where in ("up", "down"):
        lowered, plain = both(block(), where=where)
        assert fused(lowered)["up"] == "int8_mlp_norm"
        with torch.no_grad():
            assert_reordered(lowered(X), plain(X))


def test_where_gradients_are_wanted_the_layers_run() -> None:
    lowered, plain = both(block())
    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(lowered(x).square().sum(), x)
    (want,) = torch.autograd.grad(plain(x).square().sum(), x)
    assert_equal(found, want)


def test_without_the_compiled_kernel_the_layers_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monarch, "pick_kernel", lambda *_: "torch")
    assert "has no epilogue" in fused(both(block())[0])["out"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_row_without_a_range_is_as_the_op_has_it(bad: float) -> None:
    lowered, plain = both(nn.Sequential(nn.Linear(16, 16), nn.GELU()).eval())
    x = X.clone()
    x[1, 2, 3], x[1, 2, 4] = bad, -1e38
    with torch.no_grad():
        found, want = lowered(x), plain(x)
    assert_equal(found.isnan(), want.isnan())
    assert_reordered(found.nan_to_num(), want.nan_to_num())
