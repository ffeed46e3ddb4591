"""Weights of few bits: rounding in groups."""

from __future__ import annotations

import pytest
import torch

from rewriter.kernels.weight_only import GROUP_SIZES, dequantize_groups, quantize_groups

BOTH = pytest.mark.parametrize("symmetric", [True, False])


@BOTH
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_levels_are_as_near_as_half_a_step(group_size: int, bits: int, symmetric: bool) -> None:
    weight = torch.randn(20, 200, generator=torch.Generator().manual_seed(0))
    q, scale, zero = quantize_groups(weight, bits, group_size, symmetric)
    assert q.shape == (20, -(-200 // group_size) * group_size)
    assert q.dtype == torch.int8
    assert -(2 ** (bits - 1)) <= q.min() < q.max() <= 2 ** (bits - 1) - 1
    assert (zero is None) == symmetric
    error = (dequantize_groups(q, scale, zero)[:, :200] - weight).abs()
    step = scale.float().abs().repeat_interleave(group_size, 1)[:, :200]
    inside = q[:, :200] < 2 ** (bits - 1) - 1  # symmetric levels end one step early on one side
    assert (error / step)[inside].max() <= 0.51 + 2**-9 * 2**bits
    assert (error / step).max() <= 1.01 + 2**-9 * 2**bits


@BOTH
@pytest.mark.parametrize("value", [0.0, 0.3, -7.7, 1e-30, 1e-45, 1e30])
def test_a_constant_group_is_met(value: float, symmetric: bool) -> None:
    weight = torch.full((2, 40), value)
    made = dequantize_groups(*quantize_groups(weight, 4, 32, symmetric))
    assert (made[:, :40] - weight).abs().max() <= 2**-8 * abs(value) + 1e-44


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_largest_weights_stay_finite(dtype: torch.dtype, symmetric: bool) -> None:
    weight = torch.full((2, 64), torch.finfo(dtype).max, dtype=dtype)
    weight[:, ::3] *= -1
    for bits in (2, 4, 8):
        q, scale, zero = quantize_groups(weight, bits, 32, symmetric)
        assert scale.isfinite().all()
        assert dequantize_groups(q, scale, zero).isfinite().all()


@BOTH
def test_a_group_has_a_scale_of_its_own(symmetric: bool) -> None:
    weight = torch.cat([torch.rand(4, 32), 1000 * torch.rand(4, 32), torch.zeros(4, 32)], 1)
    q, scale, zero = quantize_groups(weight, 4, 32, symmetric)
    error = (dequantize_groups(q, scale, zero) - weight).abs()
    assert error[:, :32].max() < 0.13
    assert error[:, 64:].max() == 0
    again = quantize_groups(dequantize_groups(q, scale, zero), 4, 32, symmetric)
    assert torch.equal(again[0], q)


@BOTH
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
def test_there_may_be_no_weights(shape: tuple[int, int], symmetric: bool) -> None:
    made = dequantize_groups(*quantize_groups(torch.empty(shape), 4, 32, symmetric))
    assert made.shape == shape
