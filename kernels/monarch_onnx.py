"""A Monarch layer as `torch.onnx.export` writes it: two batched products.

ONNX's Einsum, which the formula would become, takes no bfloat16.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["monarch_linear_onnx"]


def monarch_linear_onnx(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    out_features: int,
    interleaved: bool = False,
) -> Tensor:
    """mid[k] = x[k] @ right[k]ᵀ, z[l] = mid[l] @ left[l]ᵀ, y = z laid out; the shapes are those of
    `monarch_linear`."""
    (k, _, ib), l = right.shape, left.shape[0]
    xb = F.pad(x, (0, k * ib - x.shape[-1])).reshape(-1, k, ib)
    mid = (xb.transpose(0, 1) @ right.mT).unflatten(-1, (-1, l))  # [K, rows, rank, L]
    z = mid.permute(3, 1, 0, 2).flatten(2) @ left.mT  # [L, rows, ob]
    z = z.permute(1, 2, 0) if interleaved else z.transpose(0, 1)
    y: Tensor = z.flatten(1)[:, :out_features].reshape(*x.shape[:-1], out_features)
    return y if bias is None else y + bias
