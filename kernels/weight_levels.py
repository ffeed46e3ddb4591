"""Weights rounded while they train: the levels that a scheme's layer will hold, as one op.

    rows      q[n,k] = round(w[n,k]/scale[n]) in −127 … 127, or in −8 … 7
    groups    q[n,k] = round((w[n,k] − zero[n,g])/scale[n,g]) in −8 … 7       g = k // group size

It is an op so that every compiler gives the same integers as eager torch. A compiler that fuses the
formula keeps scales in float32 where they are rounded to bfloat16, and then many weights lie on
another side of a level. And kernels of 8 bits keep what they packed of a tensor for as long as that
lives: memory that a compiler uses twice is one tensor with two contents; the result of an op never
is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from rewriter.kernels import ops
from rewriter.kernels.common import register_formula, widened
from rewriter.kernels.int8_linear import quantize_weight
from rewriter.kernels.weight_only import quantize_groups

__all__ = [
    "LEVELS",
    "first_step",
    "grouped",
    "quantize_rows",
    "stepped",
    "weight_levels",
]

LEVELS: Mapping[int, tuple[int, int]] = {8: (-127, 127), 4: (-8, 7)}
"""Bits → the lowest and the highest level."""

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "weight_levels(Tensor weight, Tensor? step=None, int group_size=0, bool symmetric=True, "
    "int bits=8) -> (Tensor, Tensor, Tensor)"
)


def weight_levels(
    weight: Tensor,
    step: Tensor | None = None,
    group_size: int = 0,
    symmetric: bool = True,
    bits: int = 8,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, scale and zero of a weight, as `quantize_rows` and `quantize_groups` choose them, or for
    steps that are given. No gradient passes.

    Args:
        weight: [out, in], finite; of rows also [out, *].
        step: the distance of two levels: [out], or [out, groups]; its sign does not count. None:
            that of the largest weights.
        group_size: weights of a row that share a scale; 0: all of them.
        symmetric: whether groups have no zero.
        bits: of a level, one of `LEVELS`; groups have 4.

    Returns:
        q int8: of rows of weight's shape and memory format, of groups [out, groups·group_size];
        scale, [out] float32 or wider, or [out, groups] bfloat16 (float64 for a weight in float64),
        above zero for steps that are given; and zero, as scale, or None.
    """
    given = None if step is None else step.detach()
    q, scale, zero = torch.ops.rewriter.weight_levels.default(
        weight.detach(), given, group_size, symmetric, bits
    )
    return q, scale, zero if group_size and not symmetric else None


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """q = round(w/scale), a scale for each row: of 8 bits as `quantize_weight`, of 4 as
    `quantize_groups` with the row as its group.

    Args:
        weight: [out, in], finite.
        bits: one of `LEVELS`.

    Returns:
        q [out, in] int8, contiguous, and scale [out], float32 or wider, never 0.
    """
    if bits == 8:
        return quantize_weight(weight)
    wide = widened(weight.dtype)
    if not weight.numel():
        return weight.detach().to(torch.int8), weight.new_ones(len(weight), dtype=wide)
    q, scale, _ = quantize_groups(weight, bits, weight.shape[1], True)
    return q, scale.squeeze(1).to(wide)


def grouped(w: Tensor, group_size: int) -> Tensor:
    """[out, in] → [out, groups, group_size], the last group filled up with the last weight; of
    group_size 0 as it is."""
    if not group_size:
        return w
    if missing := -w.shape[1] % group_size:
        w = torch.cat([w, w[:, -1:].expand(-1, missing)], 1)
    found: Tensor = w.unflatten(1, (-1, group_size))
    return found


def first_step(weight: Tensor, bits: int, group_size: int = 0) -> Tensor:
    """max|w|/(highest level), of each row or group: no weight lies beyond the levels. (The paper's
    2·mean|w|/√(highest level) leaves a row of 8 bits 40 levels of 255.)"""
    w = grouped(weight.detach().abs().flatten(1), group_size)
    first = w.amax(-1) / LEVELS[bits][1]
    return torch.where(first > 0, first, torch.ones_like(first)).to(w.dtype)


def stepped(
    weight: Tensor, step: Tensor, q: Tensor, scale: Tensor, bits: int, group_size: int = 0
) -> Tensor:
    """Ŵ = q·scale, with derivatives in the weight and the step; see `TrainedLinear`.

    Args:
        weight: [out, *].
        step: as `weight_levels` takes it.
        q, scale: as it gives them.
        bits, group_size: as it takes them.

    Source: Esser et al. 2020, "Learned Step Size Quantization".
    """
    low, high = LEVELS[bits]
    rows = weight.flatten(1)
    w = grouped(rows, group_size)
    gentle = 1 / math.sqrt(w.shape[-1] * high)
    used = step.abs() * gentle
    used = (scale.to(used.dtype) + (used - used.detach()))[..., None]
    inside = (w / used).clamp(low, high)
    rounded = q.reshape(w.shape).to(w.dtype)
    found: Tensor = ((inside + (rounded - inside).detach()) * used).flatten(1)
    return found[:, : rows.shape[1]].reshape(weight.shape)


def _reference(
    weight: Tensor,
    step: Tensor | None = None,
    group_size: int = 0,
    symmetric: bool = True,
    bits: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    weight, zero = weight.detach(), None
    rows = weight.flatten(1)
    if step is not None:
        q, scale = _nearest(rows, step.detach(), group_size, bits)
    elif group_size:
        q, scale, zero = quantize_groups(rows, bits, group_size, symmetric)
    else:
        q, scale = quantize_rows(rows, bits)
    if not group_size:
        q = q.view(weight.shape).contiguous(memory_format=suggest_memory_format(weight))
    return q, scale, scale.new_empty(0) if zero is None else zero


def _nearest(rows: Tensor, step: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    low, high = LEVELS[bits]
    wide = widened(step.dtype)
    scale = step.to(wide).abs().clamp_min(torch.finfo(torch.float32).tiny)
    if group_size and wide != torch.float64:
        scale = scale.to(torch.bfloat16)
    w = grouped(rows.to(wide), group_size)
    q = (w / scale.to(wide)[..., None]).round().clamp(low, high)
    return q.flatten(1).to(torch.int8), scale


_LIB.impl("weight_levels", _reference, "CompositeExplicitAutograd")
register_formula(_LIB, "weight_levels", _reference)
torch.library.register_fake("rewriter::weight_levels", _reference, lib=_LIB)

RECORD = ops.register(
    ops.Record("rewriter::weight_levels", kind="pointwise", unit="vector", reference=_reference)
)
