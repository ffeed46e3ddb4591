"""What a trace would lose or get wrong without a word: each is handled, or refused aloud."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewriter import OptionError, rewrite
from rewriter.passes import Monarch, Quadratic, Quantize, TopK

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class OwnBackward(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(Reversed.apply(self.a(x)))


class TensorHook(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda grad: grad * 5)
        return self.b(h)


class HookWhereGradientsAreOn(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if torch.is_grad_enabled():
            h.register_hook(lambda grad: grad * 5)
        return self.b(h)


class Reentrant(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(self.a, x, use_reentrant=True))


class Checkpointed(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(self.a, x, use_reentrant=False))


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (OwnBackward, "Reversed has a backward of its own"),
        (TensorHook, "asks which tensors have gradients"),
        (HookWhereGradientsAreOn, "hooks gradients"),
        (Reentrant, "checkpoints activations"),
        (Checkpointed, "checkpoints or hooks saved tensors"),
    ],
)
def test_what_a_backward_was_defined_to_do_is_kept(cls: type[Two], reason: str) -> None:
    model, x = cls(), X.clone().requires_grad_()
    optimized = rewrite(model, [Quadratic()], x)
    assert reason in optimized.report.capture.islands[0].reason
    assert optimized.report.coverage() == (2, 2)
    model(x).square().sum().backward()
    wanted = x.grad
    x.grad = None
    optimized(x).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted)
    torch.testing.assert_close(optimized.a.weight_c.grad, model.a.weight.grad)
    # nothing stays patched
    assert Reversed.apply(x).grad_fn is not None


def test_a_forward_patched_between_two_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Two()
    rewrite(model, [], X)
    monkeypatch.setattr(Two, "forward", lambda self, x: self.b(self.a(x)) * 10)
    torch.testing.assert_close(rewrite(model, [], X)(X), model(X))


@pytest.mark.parametrize("where", [["a"], 3])
def test_where_of_another_type(where: Any) -> None:
    with pytest.raises(OptionError, match="no name pattern"):
        rewrite(Two(), [Monarch(where=where)], X)


class InnerAutocast(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = super().forward(x)
        return h.float()


@pytest.mark.parametrize("rewriting", [Monarch(), Quantize(), Quadratic()], ids=str)
def test_autocast_inside_the_forward(rewriting: Any) -> None:
    optimized = rewrite(InnerAutocast(), [rewriting], X)
    assert optimized.report.coverage() == (2, 2)
    assert optimized(X).dtype == torch.float32


class OwnNames(nn.Module):
    """A submodule, a buffer and an attribute named as what `rewrite` adds."""

    def __init__(self) -> None:
        super().__init__()
        self.report = nn.Linear(16, 16)
        self.register_buffer("save", torch.ones(16))
        self.load_original = "mine"

    def forward(self, x: Tensor) -> Tensor:
        return self.report(x) + self.save


def test_a_model_keeps_its_own_names() -> None:
    model = OwnNames()
    optimized = rewrite(model, [Quadratic()], X)
    assert optimized.load_original == "mine"
    for same in (optimized, copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        torch.testing.assert_close(same(X), model(X))


def test_rewritten_inside_inference_mode_and_trained() -> None:
    with torch.inference_mode():
        optimized = rewrite(Two(), [Quadratic()], X + 1)
    optimized = rewrite(Two(), [Quadratic()], X)
    optimized(X).sum().backward()
    assert optimized.a.weight_c.grad is not None


class Strays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.experts = nn.Parameter(torch.randn(3, 16, 16) / 4)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.by_einsum = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.bmm(self.fc(x).expand(3, -1, -1), self.experts)
        h, _ = self.lstm(h)
        y = y.expand(3, -1, -1)
        h, _ = self.attention(h, y, y)
        return torch.einsum("bti,oi->bto", h, self.by_einsum.weight)


def test_products_that_are_no_linear_layer_are_listed() -> None:
    inputs = torch.randn(1, 5, 16), torch.randn(1, 7, 16)
    report = rewrite(Strays(), [Quadratic()], inputs).report
    reasons = {d.site: d.reason for d in report.skipped}
    assert "experts" in reasons
    assert "lstm" in reasons["lstm.weight_ih_l0"].lower()
    assert reasons["attention.in_proj_weight"].startswith("its weight goes into linear")
    assert "einsum" in reasons["by_einsum"]
    assert report.coverage() == (2, 5)  # an LSTM is no linear layer


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.experts = nn.Parameter(torch.randn(3, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.fc(x).expand(3, -1, -1), self.experts)


def test_stacked_experts_are_listed() -> None:
    report = rewrite(Experts(), [Quadratic()], torch.randn(1, 5, 16)).report
    (skipped,) = report.skipped
    assert skipped.site == "experts"
    assert skipped.reason == "its weight goes into bmm in a form that is no linear layer"
    assert skipped.where.startswith("test_pitfalls.py:")


def test_layers_that_a_later_pass_does_not_take_are_listed() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    report = rewrite(model, [TopK(8), Quantize()], X).report
    reasons = {d.site: d.reason for s in report.steps if "Quantize" in s.name for d in s.decisions}
    assert reasons["2"] == (
        "scheme int8-dynamic has no layer for a topk_linear; taken by int4-weight, int8-weight"
    )
    after = rewrite(model, [TopK(8), Quantize("int8-weight")], X)
    assert type(after[2]).__name__ == "SparseInt8Linear"
    twice = rewrite(model, [Monarch(), TopK(8)], X).report
    assert "MonarchLinear" in twice.skipped[0].reason


def test_max_error_declines_what_has_no_known_error() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    (decision,) = rewrite(model, [TopK(8)], X, max_error=0.1).report.decisions
    assert decision.action == "declined"
    assert "not known" in decision.reason


def test_state_dict_hooks_keep_a_layer_as_it_is() -> None:
    model = Two()
    model.a.register_state_dict_post_hook(lambda *_: None)
    (skipped,) = rewrite(model, [Quadratic()], X).report.skipped
    assert (skipped.site, "state_dict hooks" in skipped.reason) == ("a", True)
