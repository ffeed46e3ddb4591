"""Which entries of a row are active, in torch's operations, and what may be asked for."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels.sparse_cpu import Select

__all__ = ["MOST_ROWS", "active_for_onnx", "active_reference", "check_selection"]

MOST_ROWS = 16
"""Rows of x beyond which a dense product runs without being timed."""


def active_reference(x: Tensor, select: Select) -> Tensor:
    """Whether each entry of x [*, width] is active, [*, width] bool, in torch's operations."""
    score = x.detach().abs()
    if select.importance is not None:
        score = score.float() * select.importance
    width, block = x.shape[-1], select.block
    if block > 1:
        padded = F.pad(score, (0, -width % block), value=-1.0)
        score = padded.unflatten(-1, (-1, block)).amax(-1)
    if select.k:
        count = min(math.ceil(select.k / block), score.shape[-1])
        best = score.sort(stable=True, dim=-1, descending=True).indices[..., :count]
        mask = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
    else:
        mask = ~(score < select.threshold)
    whole: Tensor = mask if block == 1 else mask.repeat_interleave(block, -1)[..., :width]
    return whole


def check_selection(
    op: str, width: int, threshold: Tensor | None, importance: Tensor | None, k: int, block: int
) -> None:
    """Whether what an op is given selects entries of a row of this width.

    Raises:
        RuntimeError: it does not.
    """
    if block < 1 or width % block:
        raise RuntimeError(f"{op}: block={block} does not divide the {width} entries of a row")
    if threshold is None and not (1 <= k <= width and k % block == 0):
        raise RuntimeError(
            f"{op}: without a threshold k must be from 1 to the {width} entries of a row, and a "
            f"multiple of block={block}, not {k}"
        )
    if threshold is not None and threshold.numel() != 1:
        raise RuntimeError(f"{op}: threshold must be [1], not {tuple(threshold.shape)}")
    if importance is not None and importance.shape != (width,):
        raise RuntimeError(
            f"{op}: importance must have shape [{width}], not {tuple(importance.shape)}"
        )


def active_for_onnx(x: Tensor, select: Select) -> Tensor:
    """`active_reference`, by ONNX's TopK, which takes the lower index of two that are tied."""
    if not select.k:
        return active_reference(x, select)
    score = x.detach().abs()
    if select.importance is not None:
        score = score.float() * select.importance
    groups = score.unflatten(-1, (-1, select.block)).amax(-1)
    kept = groups.topk(select.k // select.block, dim=-1).indices
    mask = torch.zeros_like(groups).scatter(-1, kept, 1.0).bool()
    return mask.repeat_interleave(select.block, -1)
