"""`rewriter::topk_linear`: y = topk_k(h) Wᵀ + bias, with the gradient of exactly that.

Per row of h the k entries of largest score are kept and the others count as zero. With few rows
only the weights of kept entries are read (`rewriter.kernels.sparse`); else, and where a gradient is
wanted, a dense GEMM runs over the masked h. The FLOP formula counts the dense GEMM.

Saved for the backward are the kept values and their indices (int16 up to 32768 features, else
int32), never the dense h: k·(2 + 2) bytes a row in bfloat16, k·(4 + 2) in float32, against 2 and 4
times in_features. With a frozen weight, the indices alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels import ops, sparse_bound
from rewriter.kernels.common import (
    is_transformed,
    outer,
    owned,
    register_autocast,
    register_formula,
    register_gradient,
    register_vmap,
)
from rewriter.kernels.sparse import (
    MOST_ROWS,
    Select,
    active,
    active_for_onnx,
    active_reference,
    bound,
    masked,
    multiplied,
)

__all__ = ["topk_linear", "topk_linear_reference"]

_library: Any = torch.library  # untyped in torch
_lib = _library.Library("rewriter", "FRAGMENT")
_lib.define(
    "topk_linear(Tensor h, Tensor weight, Tensor? bias, int k, Tensor? importance=None, "
    "int block=1) -> Tensor"
)
_lib.define(
    "topk_linear_train(Tensor h, Tensor weight, Tensor? bias, int k, Tensor? importance=None, "
    "int block=1) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "topk_linear_backward(Tensor grad, Tensor? values, Tensor indices, Tensor weight, "
    "bool[2] needs) -> (Tensor, Tensor)"
)


def topk_linear(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    importance: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    """y = topk_k(h) weightᵀ + bias, where topk_k keeps the k entries of largest score in each row.

    The score is |h|·importance. Exactly k entries are kept: among entries tied at the k-th score,
    those of lower index. A NaN counts as the largest. Kept entries have the gradient of a dense
    layer, the others zero: dh = mask ∘ (g W), dW = gᵀ topk_k(h), db = Σ g.

    Args:
        h: [*, in_features].
        weight: [out_features, in_features], of h's dtype (under autocast, of any).
        bias: [out_features] or None.
        k: kept entries a row, 1 ≤ k ≤ in_features.
        importance: [in_features] float32, not negative; None: all 1. It has no gradient.
        block: as many neighbours are kept or dropped together, by the largest score among them;
            divides k and in_features.

    Returns:
        [*, out_features].

    Raises:
        RuntimeError: a shape, a dtype or k does not fit.

    Source: magnitude top-k as in TEAL (Liu et al. 2024), with a count in place of a threshold;
    importance as in WINA (Chen et al. 2025). Differentiable twice.
    """
    own = sparse_bound.Operands(weight, None, None, bias, None, importance, k, block)

    def check() -> None:
        _check(h, weight, bias, k, importance, block)

    if (y := bound(h, own, check)) is not None:
        return y
    found: Tensor = torch.ops.rewriter.topk_linear(h, weight, bias, k, importance, block)
    return found


def topk_linear_reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    importance: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    """y = (mask ∘ h) weightᵀ + bias with a dense mask; autograd does the rest."""
    mask = active_reference(h, Select(k, 0.0, importance, block))
    y = h.where(mask, 0.0) @ weight.t()
    return y if bias is None else y + bias


def _for_onnx(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    importance: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    mask = active_for_onnx(h, Select(k, 0.0, importance, block))
    y = h.where(mask, 0.0) @ weight.t()
    return y if bias is None else y + bias


def _kept(h: Tensor, k: int, importance: Tensor | None, block: int) -> Tensor:
    """Indices [*, k] of the entries that stay, ascending."""
    mask = active(h, Select(k, 0.0, importance, block))
    return mask.nonzero()[:, -1].view(*h.shape[:-1], k)


def _index_dtype(features: int) -> torch.dtype:
    return torch.int16 if features <= 2**15 else torch.int32


def _check(
    h: Tensor, weight: Tensor, bias: Tensor | None, k: int, importance: Tensor | None, block: int
) -> None:
    if weight.dim() != 2 or h.dim() == 0 or h.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"topk_linear: h must be [*, in] and weight [out, in], not {tuple(h.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if not 1 <= k <= h.shape[-1]:
        raise RuntimeError(
            f"topk_linear: k must be from 1 to the {h.shape[-1]} entries of a row, not {k}"
        )
    if block < 1 or k % block or h.shape[-1] % block:
        raise RuntimeError(
            f"topk_linear: block must divide k={k} and the {h.shape[-1]} entries of a row, and "
            f"{block} does not"
        )
    if importance is not None and importance.shape != h.shape[-1:]:
        raise RuntimeError(
            f"topk_linear: importance must have shape [{h.shape[-1]}], not "
            f"{tuple(importance.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"topk_linear: bias must have shape [{weight.shape[0]}], not {tuple(bias.shape)}"
        )


def _scatter(values: Tensor, indices: Tensor, features: int) -> Tensor:
    """[*, k] values at [*, k] indices -> [*, features], zero elsewhere."""
    return values.new_zeros((*values.shape[:-1], features)).scatter_(-1, indices.long(), values)


def _train(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    importance: Tensor | None = None,
    block: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Also returns what the backward needs: values and indices of the kept entries, [*, k]."""
    _check(h, weight, bias, k, importance, block)
    kept = _kept(h, k, importance, block)
    values = h.gather(-1, kept)
    y = F.linear(_scatter(values, kept, h.shape[-1]), weight, bias)
    return owned(y.contiguous(), y.shape), values, kept.to(_index_dtype(h.shape[-1]))


def _train_reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    importance: Tensor | None = None,
    block: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    y = topk_linear_reference(h, weight, bias, k, importance, block)
    mask = active_reference(h, Select(k, 0.0, importance, block))
    kept = mask.to(torch.int8).sort(stable=True, dim=-1, descending=True).indices[..., :k]
    return y, h.gather(-1, kept), kept.to(_index_dtype(h.shape[-1]))


def _train_fake(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    importance: Tensor | None = None,
    block: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(h, weight, bias, k, importance, block)
    y, values = (h.new_empty((*h.shape[:-1], n)) for n in (weight.shape[0], k))
    return y, values, h.new_empty(values.shape, dtype=_index_dtype(h.shape[-1]))


def _forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    importance: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    _check(h, weight, bias, k, importance, block)
    select = Select(k, 0.0, importance, block)
    if h.dtype == weight.dtype and (y := multiplied(h, weight, None, bias, select)) is not None:
        return y
    y = F.linear(masked(h, select), weight, bias)
    return owned(y.contiguous(), y.shape)


def _forward_fake(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    importance: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    return _train_fake(h, weight, bias, k, importance, block)[0]


def _forward_autograd(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    importance: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    """One node in a captured graph; where a gradient is wanted it becomes `topk_linear_train`."""
    if is_transformed((h, weight, bias)):
        return topk_linear_reference(h, weight, bias, k, importance, block)
    wanted = any(t is not None and t.requires_grad for t in (h, weight, bias))
    y: Tensor
    if wanted and torch.is_grad_enabled():
        y = torch.ops.rewriter.topk_linear_train(h, weight, bias, k, importance, block)[0]
    else:
        with torch._C._AutoDispatchBelowAutograd():
            y = torch.ops.rewriter.topk_linear(h, weight, bias, k, importance, block)
    return y


def _backward(
    grad: Tensor, values: Tensor | None, indices: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """dh = scatter(gather(G W)); dW = Gᵀ scatter(values). What is not needed is empty."""
    need_h, need_weight = needs
    dh, dw = grad.new_empty(0), grad.new_empty(0)
    if need_h:
        kept = (grad @ weight).gather(-1, indices.long())  # [*, k]
        dh = _scatter(kept, indices, weight.shape[1])
    if need_weight:
        assert values is not None
        h = _scatter(values, indices, weight.shape[1])  # [*, in]
        dw = outer(grad, h)
    return dh, dw


def _backward_reference(
    grad: Tensor, values: Tensor | None, indices: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """The same without writing in place: for gradient penalties, whose derivative it has."""

    def spread(kept: Tensor) -> Tensor:
        whole = kept.new_zeros((*indices.shape[:-1], weight.shape[1]))
        return whole.scatter(-1, indices.long(), kept)

    dh, dw = grad.new_empty(0), grad.new_empty(0)
    if needs[0]:
        dh = spread((grad @ weight).gather(-1, indices.long()))
    if needs[1]:
        assert values is not None
        dw = outer(grad, spread(values))
    return dh, dw


def _backward_fake(
    grad: Tensor, values: Tensor | None, indices: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    dh = (*grad.shape[:-1], weight.shape[1]) if needs[0] else (0,)
    return grad.new_empty(dh), grad.new_empty(weight.shape if needs[1] else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight = inputs[1]
    _, values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(values if ctx.needs_input_grad[1] else None, indices, weight)
    ctx.set_materialize_grads(False)


def _grad(
    ctx: Any, grad: Tensor | None, grad_values: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    need_h, need_weight, need_bias = ctx.needs_input_grad[:3]
    values, indices, weight = ctx.saved_tensors
    dh = dw = db = None
    if grad is not None and (need_h or need_weight):
        needs = [need_h, need_weight]
        found = torch.ops.rewriter.topk_linear_backward(grad, values, indices, weight, needs)
        dh, dw = (g if need else None for g, need in zip(found, needs, strict=True))
    if grad is not None and need_bias:
        db = grad.reshape(-1, grad.shape[-1]).sum(0)
    if grad_values is not None and need_h:  # only in a second derivative: dW depends on values
        through = _scatter(grad_values, indices, weight.shape[1])
        dh = through if dh is None else dh + through
    return dh, dw, db, None, None, None


for _device in ("CPU", "CUDA"):
    _lib.impl("topk_linear", _forward, _device)
    _lib.impl("topk_linear_train", _train, _device)
    _lib.impl("topk_linear_backward", _backward, _device)
_lib.impl("topk_linear", _forward_autograd, "Autograd")
register_autocast(_lib, "topk_linear", casts=3)
torch.library.register_fake("rewriter::topk_linear", _forward_fake, lib=_lib)
torch.library.register_fake("rewriter::topk_linear_train", _train_fake, lib=_lib)
torch.library.register_fake("rewriter::topk_linear_backward", _backward_fake, lib=_lib)
register_gradient(_lib, "topk_linear_train", _train_reference, _save, _grad)
register_formula(_lib, "topk_linear_backward", _backward_reference)
register_vmap(_lib, "topk_linear", topk_linear_reference, casts=3)
register_vmap(_lib, "topk_linear_train", _train_reference)


def _forward_flops(
    h: torch.Size,
    weight: torch.Size,
    bias: Any,
    k: int,
    *rest: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Of few rows what is kept; else one dense GEMM: the zeros are multiplied too."""
    rows = h[:-1].numel()
    return 2 * rows * weight[0] * (k if rows <= MOST_ROWS else weight[1])


def _train_flops(
    h: torch.Size, weight: torch.Size, *rest: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """One dense GEMM."""
    return 2 * h[:-1].numel() * weight[0] * weight[1]


def _backward_flops(
    grad: torch.Size,
    values: torch.Size | None,
    indices: torch.Size,
    weight: torch.Size,
    needs: Sequence[bool],
    *,
    out_shape: Any = None,
) -> int:
    """One dense GEMM for each of dh and dW."""
    return sum(needs) * 2 * grad[:-1].numel() * weight[0] * weight[1]


def _sizes(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    importance: Tensor | None = None,
    block: int = 1,
) -> tuple[Any, ...]:
    return (math.prod(h.shape[:-1]), *weight.shape, k)


def _backward_sizes(
    grad: Tensor, values: Tensor | None, indices: Tensor, weight: Tensor, *rest: Any
) -> tuple[Any, ...]:
    return (math.prod(grad.shape[:-1]), *weight.shape, indices.shape[-1])


def _parts(run: ops.Run) -> list[ops.Part]:
    """A selection, a scatter and a product, of few rows over what is kept."""
    rows, out, width, k = run.sizes
    size = ops.element_size(run.dtype)
    read, shape = rows * width * size, (rows, width, k)
    inner = k if rows <= MOST_ROWS else width
    return [
        ops.Part("aten::topk", "sort", run.dtype, bytes_read=read, shape=shape),
        ops.moved(run, "gather", "aten::scatter_", rows * width, 2 * size),
        ops.product(run, 1, rows, out, inner, run.weight_bytes * inner // width),
    ]


def _sample(rows: int, width: int, _: int) -> tuple[Any, ...]:
    return torch.rand(rows, width), torch.rand(width, width), torch.rand(width), width // 4


ops.register(
    ops.Record(
        "rewriter::topk_linear",
        kind="topk",
        reference=topk_linear_reference,
        onnx=_for_onnx,
        size_names=("rows", "out", "in", "k"),
        sizes=_sizes,
        flops=_forward_flops,
        parts=_parts,
        samples=ops.Samples(
            axes=((1, 16, 120, 1000), (192, 480, 1056), (1,)),
            arguments=_sample,
            place=lambda rows, out, width, k: (rows, math.sqrt(out * width), 1),
        ),
        companions=(
            ops.Companion("rewriter::topk_linear_train", flops=_train_flops),
            ops.Companion("rewriter::topk_linear_backward", _backward_sizes, _backward_flops),
        ),
    )
)
