"""Calls of sparse products past torch's dispatcher: the same results, and who has a say in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rewriter.kernels import sparse, sparse_bound, sparse_cpu, sparse_int4
from rewriter.kernels.int8_linear import quantize_weight
from rewriter.kernels.sparse_int4 import pack_inputs, sparse_int4_linear
from rewriter.kernels.sparse_linear import sparse_linear
from rewriter.kernels.topk import topk_linear
from rewriter.kernels.weight_only import quantize_groups

with_kernel = pytest.mark.skipif(
    sparse_cpu.refusal() is not None, reason=f"no kernel: {sparse_cpu.refusal()}"
)
Op = Callable[..., Tensor]
BIAS = torch.linspace(-1, 1, 12)


@pytest.fixture(autouse=True)
def _sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for kernel in (sparse, sparse_int4):
        monkeypatch.setattr(kernel, "_measured", lambda *_: 1.0)  # whatever pays on this machine


def float32(x: Tensor, weight: Tensor, bias: Any = BIAS, **options: Any) -> Tensor:
    return sparse_linear(x, weight, None, bias, **(options or {"k": 20}))


def ranked(x: Tensor, weight: Tensor, bias: Any = BIAS, k: int = 20) -> Tensor:
    return topk_linear(x, weight, bias, k)


def int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Any = BIAS, **options: Any) -> Tensor:
    return sparse_linear(x, weight, scale, bias, **(options or {"k": 20}))


def int4(x: Tensor, weight: Tensor, scale: Tensor, bias: Any = BIAS, **options: Any) -> Tensor:
    own = options or {"k": 20}
    return sparse_int4_linear(x, weight, scale, None, bias, **own, group_size=32)


def weights(op: Op) -> list[Tensor]:
    weight = torch.randn(12, 72)
    if op is int8:
        q, scale = quantize_weight(weight)
        return [q.t().contiguous().t(), scale]
    if op is int4:
        q, scale, _ = quantize_groups(weight, 4, 32, True)
        return [pack_inputs(q, 72), scale.t().contiguous()]
    return [weight]


EVERY = pytest.mark.parametrize("op", [float32, ranked, int8, int4])


def skipped(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> bool:
    """Whether a call made none of the op."""
    made: list[object] = []
    run = sparse_bound.Ready.__call__
    with monkeypatch.context() as patch:
        patch.setattr(
            sparse_bound.Ready, "__call__", lambda *given: (made.append(1), run(*given))[1]
        )
        call()
    return bool(made)


@with_kernel
@EVERY
def test_a_plain_call_is_the_op_without_the_dispatcher(
    op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = weights(op)
    for x in (torch.randn(3, 72), torch.randn(72), torch.randn(2, 8, 72)):
        assert skipped(monkeypatch, lambda x=x: op(x, *own))
        with FlopCounterMode(display=False):
            want = op(x, *own)
        assert_equal(op(x, *own), want)
    x = torch.randn(17, 72)
    assert not skipped(monkeypatch, lambda: op(x, *own))


@with_kernel
@EVERY
def test_calls_that_others_have_a_say_in_go_through_the_op(
    op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, own = torch.randn(3, 72), weights(op)
    assert skipped(monkeypatch, lambda: op(x, *own))
    for other in (x[:0], x.t().contiguous().t()):
        assert not skipped(monkeypatch, lambda other=other: op(other, *own))
    wanting = x.clone().requires_grad_()
    assert not skipped(monkeypatch, lambda: op(wanting, *own).sum().backward())
    bias = BIAS.clone().requires_grad_()
    assert not skipped(monkeypatch, lambda: op(x, *own, bias).sum().backward())
    with torch.no_grad():
        assert skipped(monkeypatch, lambda: op(wanting, *own, bias))
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.autograd.forward_ad.dual_level()):
        with mode:
            assert not skipped(monkeypatch, lambda: op(x, *own))
    assert not skipped(monkeypatch, lambda: torch.vmap(lambda x: op(x, *own))(x))


@with_kernel
@EVERY
def test_a_plain_call_reads_the_tensors_of_now(op: Op) -> None:
    x, own = torch.randn(2, 72), weights(op)
    bias = nn.Parameter(BIAS.clone(), requires_grad=False)
    before = op(x, *own, bias)
    own[-1].mul_(-2)  # the weight, or its scale
    bias.data = -2 * bias.data  # other memory
    assert_reordered(op(x, *own, bias), -2 * before)
    key = id(own[0])
    assert key in sparse_bound._ready
    own.clear()
    assert key not in sparse_bound._ready


@with_kernel
@EVERY
def test_a_plain_call_refuses_what_the_op_refuses(op: Op) -> None:
    x, own = torch.randn(2, 72), weights(op)
    op(x, *own)
    for call in (
        lambda: op(x[:, :64].contiguous(), *own),
        lambda: op(x, *own, k=73),
        lambda: op(x, *own, BIAS[:5]),
    ):
        with pytest.raises(RuntimeError):
            call()


@with_kernel
@pytest.mark.parametrize("op", [float32, int8, int4])
def test_a_threshold_that_changes_in_place_is_that_of_now(op: Op) -> None:
    x, own, threshold = torch.randn(2, 72), weights(op), torch.tensor([0.5])
    for limit in (0.5, 1.0, 9.0):
        threshold.fill_(limit)
        want = op(x.where(x.abs() >= limit, 0.0), *own, k=72)
        assert_reordered(op(x, *own, threshold=threshold), want)


def test_without_a_compiled_kernel_the_op_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_cpu, "refusal", lambda: "no compiler")
    x, own = torch.randn(2, 72), weights(float32)
    assert not skipped(monkeypatch, lambda: float32(x, *own))
