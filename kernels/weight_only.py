"""Weights of 4 bits in groups along a row, and what is made of them.

    w[n,k] = q[n,k]·scale[n,g] + zero[n,g]      g = k // group_size, q in -8 … 7

Symmetric groups have no zero. Scales and zeros are bfloat16 (float64 for a weight in float64): they
have float32's range in two bytes, and q is rounded against their rounded values.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GROUP_SIZES", "dequantize_groups", "quantize_groups"]

GROUP_SIZES = (32, 64, 128)


def quantize_groups(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q = round((w − zero)/scale) in −2^(bits−1) … 2^(bits−1) − 1, a scale for each group of a row.

    Symmetric: zero = 0, and the value of the largest magnitude has the level −2^(bits−1), so that
    all levels count; its scale is negative where that value is positive. Asymmetric: the least
    value of a group has the lowest level, the greatest the highest.

    Args:
        weight: [out, in], finite.
        bits: of a level, 2 to 8.
        group_size: values of a row that share a scale. Where it does not divide `in`, the last
            group is filled up with the last value.
        symmetric: whether there is no zero.

    Returns:
        q [out, groups·group_size] int8, contiguous; scale [out, groups], never 0; and zero
        [out, groups] or None. Both are bfloat16, float64 for a weight in float64. A group that is
        too small for a scale of its dtype has the scale 1 and levels 0.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    kept = torch.float64 if wide == torch.float64 else torch.bfloat16
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    out, width = weight.shape
    # neither a scale rounded upward nor a level times it is to pass the largest number
    most = torch.finfo(wide).max * (1 - 2**-6 if symmetric else 0.5)
    w = weight.detach().to(wide).clamp(-most, most)
    if missing := -width % group_size:
        w = torch.cat([w, w[:, -1:].expand(-1, missing)], 1)
    w = w.reshape(out, -(-width // group_size), group_size)
    if symmetric:
        zero = None
        extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))
        scale = (extreme / low).to(kept)
    else:
        least, greatest = w.aminmax(dim=-1, keepdim=True)
        levels = high - low
        zero = (least * (high / levels) - greatest * (low / levels)).to(kept)
        scale = torch.maximum(greatest / high - zero / high, least / low - zero / low).to(kept)
    scale = torch.where(scale != 0, scale, torch.ones_like(scale))
    q = ((w if zero is None else w - zero) / scale).round_().clamp_(low, high)
    q = q.to(torch.int8).flatten(1)
    return q, scale.squeeze(-1), None if zero is None else zero.squeeze(-1)


def dequantize_groups(q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """w[n,k] = q[n,k]·scale[n,g] + zero[n,g], in float32 or wider.

    Args:
        q: [out, groups·group_size] integers.
        scale: [out, groups].
        zero: [out, groups] or None.
    """
    wide = torch.promote_types(scale.dtype, torch.float32)
    size = q.shape[1] // max(scale.shape[1], 1)
    w = q.to(wide).unflatten(1, (scale.shape[1], size)) * scale.to(wide)[..., None]
    return (w if zero is None else w + zero.to(wide)[..., None]).flatten(1)
