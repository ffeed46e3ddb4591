"""`rewriter::sparse_linear`: y = x_S Wᵀ + bias, where x_S has zeros in the place of small entries.

Entries are chosen by a threshold or by rank, and W may have 8 bits. `rewriter::topk_linear` is the
same by rank over a float weight, and saves less for its backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels import native_ops, ops, sparse_bound
from rewriter.kernels.common import (
    outer,
    owned,
    register_autocast,
    register_gradient,
    register_vmap,
)
from rewriter.kernels.sparse import (
    MOST_ROWS,
    Select,
    active_reference,
    bound,
    check_selection,
    dense,
    masked,
    multiplied,
)
from rewriter.kernels.weight_only import int8_weight_reference

__all__ = ["sparse_linear", "sparse_linear_reference"]

_library: Any = torch.library  # untyped in torch
_lib = _library.Library("rewriter", "FRAGMENT")
_lib.define(
    "sparse_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? threshold=None, "
    "Tensor? importance=None, int k=0, int block=1, float share=1.0) -> Tensor"
)


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    importance: Tensor | None = None,
    k: int = 0,
    block: int = 1,
    share: float = 1.0,
) -> Tensor:
    """y = x_S Wᵀ + bias, W = weight or weight·scale[:, None]; x_S[i] = x[i] where i is active.

    With a threshold t those with |x[i]|·importance[i] ≥ t are active; else the k of largest score,
    ties by the lower index. NaN is active. The gradient is that of this function, of the active
    entries: dx = mask ∘ (g W), dW = gᵀ x_S, db = Σ g.

    Args:
        x: [*, in_features].
        weight: [out_features, in_features] of x's dtype, or int8.
        scale: [out_features] of an int8 weight; else None.
        bias: [out_features] or None.
        threshold: [1], or None.
        importance: [in_features] float32, not negative; None: all 1. It has no gradient.
        k: how many entries a row, without a threshold.
        block: as many neighbours are active together, by the largest score among them; divides
            in_features.
        share: of a row that is active by the threshold, as far as it is known: by it a GPU, which
            waits for no count, decides which kernel runs. No part of the formula.

    Returns:
        [*, out_features] in x's dtype. Costs up to 2·rows·in·out FLOPs.

    Raises:
        RuntimeError: shapes, or options, that do not fit.

    Source: Liu et al. 2024, "Training-Free Activation Sparsity in Large Language Models" (TEAL);
    importance: Chen et al. 2025, "WINA: Weight Informed Neuron Activation".
    """
    own = sparse_bound.Operands(weight, scale, None, bias, threshold, importance, k, block)

    def check() -> None:
        _check(x, weight, scale, bias, threshold, importance, k, block)

    if (y := bound(x, own, check)) is not None:
        return y
    found: Tensor = torch.ops.rewriter.sparse_linear(
        x, weight, scale, bias, threshold, importance, k, block, share
    )
    return found


def sparse_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    importance: Tensor | None = None,
    k: int = 0,
    block: int = 1,
    share: float = 1.0,
) -> Tensor:
    """The same, written as the formula; autograd does the rest."""
    mask = active_reference(x, Select.of(threshold, importance, k, block))
    kept = x.where(mask, 0.0)
    if scale is None:
        return F.linear(kept, weight, bias)
    return int8_weight_reference(kept, weight, scale, bias)


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    importance: Tensor | None,
    k: int,
    block: int,
) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"sparse_linear: x must be [*, in] and weight [out, in], not {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if (weight.dtype == torch.int8) != (scale is not None):
        raise RuntimeError("sparse_linear: a scale belongs to an int8 weight, and to no other")
    out, width = weight.shape
    check_selection("sparse_linear", width, threshold, importance, k, block)
    for name, t in (("scale", scale), ("bias", bias)):
        if t is not None and t.shape != (out,):
            raise RuntimeError(
                f"sparse_linear: {name} must have shape [{out}], not {tuple(t.shape)}"
            )


def _forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None = None,
    importance: Tensor | None = None,
    k: int = 0,
    block: int = 1,
    share: float = 1.0,
) -> Tensor:
    _check(x, weight, scale, bias, threshold, importance, k, block)
    select = Select.of(threshold, importance, k, block)
    y = multiplied(x, weight, scale, bias, select, share)
    if y is None:
        y = dense(masked(x, select), weight, scale, bias)
    return owned(y.contiguous(), (*x.shape[:-1], weight.shape[0]))


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None = None,
    importance: Tensor | None = None,
    k: int = 0,
    block: int = 1,
    share: float = 1.0,
) -> Tensor:
    _check(x, weight, scale, bias, threshold, importance, k, block)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, bias, threshold, importance, k, block, _ = inputs
    ctx.save_for_backward(x, weight, scale, threshold, importance)
    ctx.sizes = k, block
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, threshold, importance = ctx.saved_tensors
    mask = active_reference(x, Select.of(threshold, importance, *ctx.sizes))
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        own = weight if scale is None else weight.to(grad.dtype) * scale.to(grad.dtype)[:, None]
        dx = (grad @ own).where(mask, 0.0)
    if ctx.needs_input_grad[1]:
        dw = outer(grad, x.where(mask, 0.0))
    if ctx.needs_input_grad[3]:
        db = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return dx, dw, None, db, None, None, None, None, None


_lib.impl("sparse_linear", _forward, "CompositeExplicitAutograd")
register_autocast(_lib, "sparse_linear", casts=4)
register_gradient(_lib, "sparse_linear", sparse_linear_reference, _save, _backward, _forward)
register_vmap(_lib, "sparse_linear", sparse_linear_reference, casts=4)
torch.library.register_fake("rewriter::sparse_linear", _fake, lib=_lib)


def _flops(
    x: torch.Size,
    weight: torch.Size,
    scale: Any,
    bias: Any,
    threshold: Any = None,
    importance: Any = None,
    k: int = 0,
    block: int = 1,
    share: float = 1.0,
    *,
    out_shape: Any = None,
) -> int:
    """Of few rows by rank what is active; else one dense GEMM, with a threshold an upper bound: how
    many entries are above it is known at run time."""
    rows, by_rank = x[:-1].numel(), threshold is None
    return 2 * rows * weight[0] * (k if by_rank and rows <= MOST_ROWS else weight[1])


ops.register(
    ops.Record(
        "rewriter::sparse_linear",
        kind="matmul",
        reference=sparse_linear_reference,
        flops=_flops,
        companions=(native_ops.SPARSE,),
    )
)
