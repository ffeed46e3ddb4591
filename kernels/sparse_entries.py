"""Rows with zeros in the place of all but the k entries of largest score, as an op of its own.

    y[i] = x[i] where |x[i]|·importance[i] is among the k largest of its row, else 0

For what no product reads right away (an activation in front of a gate): behind it zeros are zeros,
and a layer of `Threshold` reads no weights of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import ops
from rewriter.kernels.common import owned, register_gradient, register_vmap
from rewriter.kernels.sparse import Select, active_reference, masked

__all__ = ["topk_entries"]

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define("topk_entries(Tensor x, Tensor? importance, int k, int block=1) -> Tensor")


def topk_entries(x: Tensor, importance: Tensor | None, k: int, block: int = 1) -> Tensor:
    """x [*, width] with zeros for all but k entries of each row; the gradient is that of these.

    Args:
        x: [*, width].
        importance: [width] float32; None: 1.
        k: 1 to width; ties go to the lower index.
        block: as many neighbours are kept together, by the largest score among them.

    Returns:
        As x. NaN counts as the largest score.
    """
    found: Tensor = torch.ops.rewriter.topk_entries(x, importance, k, block)
    return found


def _mask(x: Tensor, importance: Tensor | None, k: int, block: int) -> Tensor:
    return active_reference(x, Select(k, 0.0, importance, block))


def _reference(x: Tensor, importance: Tensor | None, k: int, block: int = 1) -> Tensor:
    return x.where(_mask(x, importance, k, block), 0.0)


def _for_onnx(x: Tensor, importance: Tensor | None, k: int, block: int = 1) -> Tensor:
    """By ONNX's TopK, which takes the lower index of two that are tied."""
    if block > 1:
        return _reference(x, importance, k, block)
    score = x.abs() if importance is None else x.abs().float() * importance
    kept = torch.zeros_like(score).scatter(-1, score.topk(k, dim=-1).indices, 1.0)
    return x.where(kept.bool(), 0.0)


def _forward(x: Tensor, importance: Tensor | None, k: int, block: int = 1) -> Tensor:
    return owned(masked(x, Select(k, 0.0, importance, block)).contiguous(), x.shape)


def _fake(x: Tensor, importance: Tensor | None, k: int, block: int = 1) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(_mask(*inputs))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    return grad.where(mask, 0.0), None, None, None


_LIB.impl("topk_entries", _forward, "CompositeExplicitAutograd")
register_gradient(_LIB, "topk_entries", _reference, _save, _backward, _forward)
register_vmap(_LIB, "topk_entries", _reference)
torch.library.register_fake("rewriter::topk_entries", _fake, lib=_LIB)
RECORD = ops.register(
    ops.Record(
        "rewriter::topk_entries",
        kind="pointwise",
        flops=lambda *_, **__: 0,
        reference=_reference,
        onnx=_for_onnx,
    )
)
