"""Weights rounded while they train: the levels that a scheme's layer will hold, as one op.

    rows      q[n,k] = round(w[n,k]/scale[n]) in −127 … 127
    groups    q[n,k] = round((w[n,k] − zero[n,g])/scale[n,g]) in −8 … 7       g = k // group size

It is an op so that every compiler gives the same integers as eager torch. A compiler that fuses the
formula keeps scales in float32 where they are rounded to bfloat16, and then many weights lie on
another side of a level. And kernels of 8 bits keep what they packed of a tensor for as long as that
lives: memory that a compiler uses twice is one tensor with two contents; the result of an op never
is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from rewriter.kernels import ops
from rewriter.kernels.common import register_formula, widened
from rewriter.kernels.int8_linear import quantize_weight
from rewriter.kernels.weight_only import quantize_groups

__all__ = ["GROUPS", "ROWS", "grouped", "weight_levels"]

ROWS, GROUPS = (-127, 127), (-8, 7)
"""The lowest and the highest level: of 8 bits with a scale for each row, of 4 bits in groups."""

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "weight_levels(Tensor weight, Tensor? step=None, int group_size=0, bool symmetric=True)"
    " -> (Tensor, Tensor, Tensor)"
)


def weight_levels(
    weight: Tensor, step: Tensor | None = None, group_size: int = 0, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, scale and zero of a weight, as `quantize_weight` and `quantize_groups` choose them, or for
    steps that are given. No gradient passes.

    Args:
        weight: [out, in], finite; of rows also [out, *].
        step: the distance of two levels: [out], or [out, groups]; its sign does not count. None:
            that of the largest weights.
        group_size: weights of a row that share a scale; 0: all of them, in 8 bits.
        symmetric: whether groups have no zero.

    Returns:
        q int8: of rows of weight's shape and memory format, of groups [out, groups·group_size];
        scale, [out] float32 or wider, or [out, groups] bfloat16 (float64 for a weight in float64),
        above zero for steps that are given; and zero, as scale, or None.
    """
    given = None if step is None else step.detach()
    q, scale, zero = torch.ops.rewriter.weight_levels.default(
        weight.detach(), given, group_size, symmetric
    )
    return q, scale, zero if group_size and not symmetric else None


def grouped(w: Tensor, group_size: int) -> Tensor:
    """[out, in] → [out, groups, group_size], the last group filled up with the last weight; of
    group_size 0 as it is."""
    if not group_size:
        return w
    if missing := -w.shape[1] % group_size:
        w = torch.cat([w, w[:, -1:].expand(-1, missing)], 1)
    found: Tensor = w.unflatten(1, (-1, group_size))
    return found


def _reference(
    weight: Tensor, step: Tensor | None = None, group_size: int = 0, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    weight, zero = weight.detach(), None
    rows = weight.flatten(1)
    if step is not None:
        q, scale = _nearest(rows, step.detach(), group_size)
    elif group_size:
        q, scale, zero = quantize_groups(rows, 4, group_size, symmetric)
    else:
        q, scale = quantize_weight(rows)
    if not group_size:
        q = q.view(weight.shape).contiguous(memory_format=suggest_memory_format(weight))
    return q, scale, scale.new_empty(0) if zero is None else zero


def _nearest(rows: Tensor, step: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    low, high = GROUPS if group_size else ROWS
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
