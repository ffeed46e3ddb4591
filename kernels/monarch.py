"""Monarch: y = x Wᵀ + b where every N×N-block slice of W has rank `rank`.

Shapes, used throughout (N = nblocks, R = rank):

    ib = ⌈in_features / N⌉, ob = ⌈out_features / N⌉     x padded to N·ib, y cropped from N·ob
    right [N, N·R, ib]   input block k;  its rows are (l, r), r fastest
    left  [N, ob, N·R]   output block l; its columns are (k, r), r fastest
    mid[b,k,l,r] = Σ_i right[k,(l,r),i] x[b,k,i]
    z[b,l,s]     = Σ_k Σ_r left[l,s,(k,r)] mid[b,k,l,r]
    y[b,s·N+l]   = z[b,l,s] + bias[s·N+l]

so W[s·N+l, k·ib+i] = Σ_r left[l,s,(k,r)] right[k,(l,r),i]: the slice (l, k) is a product of an
[ob, R] and an [R, ib] matrix, and no pair of blocks is left unconnected whatever the sizes.

Sources: Dao et al. 2022, "Monarch: Expressive Structured Matrices for Efficient and Accurate
Training" (PLPᵀR, output order and projection as in the released code), with the rank of a slice
made explicit as in Block Tensor-Train (Qiu et al. 2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from rewriter.kernels.common import register_autocast

__all__ = [
    "monarch_dense",
    "monarch_linear",
    "monarch_linear_reference",
]

_LIB: Any = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "monarch_linear(Tensor x, Tensor right, Tensor left, Tensor? bias, int out_features) -> Tensor"
)
_LIB.define(
    "monarch_linear_train(Tensor x, Tensor right, Tensor left, Tensor? bias, int out_features)"
    " -> (Tensor, Tensor)"
)
_LIB.define(
    "monarch_linear_backward(Tensor grad, Tensor x, Tensor mid, Tensor right, Tensor left,"
    " bool need_x, bool need_right, bool need_left) -> (Tensor, Tensor, Tensor)"
)


def monarch_linear(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """y[…, s·N+l] = Σ_k Σ_r left[l,s,(k,r)] Σ_i right[k,(l,r),i] x[…, k·ib+i] + bias[s·N+l].

    Costs 2·rows·N²·rank·(ib+ob) FLOPs.

    Args:
        x: [*, in_features], any leading shape.
        right: [N, N·rank, ib] with ib = ⌈in_features / N⌉.
        left: [N, ob, N·rank] with ob = ⌈out_features / N⌉.
        bias: [out_features] or None.
        out_features: at most N·ob; y is cropped to it.

    Returns:
        [*, out_features], contiguous, in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: the shapes do not fit each other.

    Source: the module's docstring.
    """
    y: Tensor = torch.ops.rewriter.monarch_linear(x, right, left, bias, out_features)
    return y


def monarch_linear_reference(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """The same function as `monarch_linear`, written as the formula; differentiable any number
    of times."""
    n, rank = right.shape[0], right.shape[1] // right.shape[0]
    ib, ob = right.shape[2], left.shape[1]
    xb = torch.unflatten(F.pad(x, (0, n * ib - x.shape[-1])), -1, (n, ib))
    mid = torch.einsum("klri,...ki->...klr", torch.unflatten(right, 1, (n, rank)), xb)
    z = torch.einsum("lskr,...klr->...sl", torch.unflatten(left, 2, (n, rank)), mid)
    y = z.reshape(*x.shape[:-1], ob * n)[..., :out_features]
    return y if bias is None else y + bias


def monarch_dense(right: Tensor, left: Tensor, out_features: int, in_features: int) -> Tensor:
    """W[s·N+l, k·ib+i] = Σ_r left[l,s,(k,r)] right[k,(l,r),i].

    Args:
        right: [N, N·rank, ib].
        left: [N, ob, N·rank].
        out_features, in_features: what the [N·ob, N·ib] product is cropped to.

    Returns:
        [out_features, in_features], differentiable in both factors.
    """
    n, rank = right.shape[0], right.shape[1] // right.shape[0]
    slices = torch.einsum(
        "lskr,klri->slki", torch.unflatten(left, 2, (n, rank)), torch.unflatten(right, 1, (n, rank))
    )
    return slices.reshape(left.shape[1] * n, n * right.shape[2])[:out_features, :in_features]


# Forward -----------------------------------------------------------------------------------------


def _check(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int) -> None:
    if right.ndim != 3 or left.ndim != 3:
        raise ValueError(
            f"monarch_linear: right and left must be 3-D, got {list(right.shape)} and "
            f"{list(left.shape)}"
        )
    n = right.shape[0]
    if left.shape[0] != n or left.shape[2] != right.shape[1] or right.shape[1] % n:
        raise ValueError(
            f"monarch_linear: right {list(right.shape)} and left {list(left.shape)} must be "
            "[N, N*rank, ib] and [N, ob, N*rank]"
        )
    if x.ndim == 0 or -(-x.shape[-1] // n) != right.shape[2]:
        raise ValueError(
            f"monarch_linear: x of shape {list(x.shape)} does not fit right {list(right.shape)}: "
            f"its last dimension must be in ({n * (right.shape[2] - 1)}, {n * right.shape[2]}]"
        )
    if -(-out_features // n) != left.shape[1]:
        raise ValueError(
            f"monarch_linear: out_features {out_features} does not fit left {list(left.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"monarch_linear: bias must be [{out_features}], got {list(bias.shape)}")


def _rows(x: Tensor, width: int) -> Tensor:
    """[*, features] → [rows, width], zero-padded."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.shape[1] == width else F.pad(x, (0, width - x.shape[1]))


def _rank_major(right: Tensor) -> Tensor:
    """Rows (l, r) → (r, l). With l fastest, the rows (r, l) of all blocks k, read as ((k, r), l),
    have one stride per index, so that a bmm reads the middle permutation without a copy."""
    n, nr, ib = right.shape
    return right.view(n, n, nr // n, ib).transpose(1, 2).reshape(n, nr, ib)


def _mid(xb: Tensor, right: Tensor) -> Tensor:
    """[rows, N·ib] → [N(k), (r, l), rows]."""
    n, _, ib = right.shape
    return torch.bmm(_rank_major(right), xb.view(xb.shape[0], n, ib).permute(1, 2, 0))


def _finish(z: Tensor, bias: Tensor | None, shape: torch.Size, out: int) -> Tensor:
    """z [N(l), rows, s] → y [*shape[:-1], out]."""
    n, rows, ob = z.shape
    # Permuting first and adding in place measures faster than one strided add that does both.
    y = z.new_empty(rows, ob, n).copy_(z.permute(1, 2, 0)).view(rows, ob * n)
    y = y[:, :out].contiguous()
    if bias is not None:
        y.add_(bias)
    return y.view(*shape[:-1], out)


def _mid_by_output(mid: Tensor) -> Tensor:
    """[N(k), (r, l), rows] → [N(l), rows, (k, r)], a view."""
    n, nr, rows = mid.shape
    return mid.view(nr, n, rows).permute(1, 2, 0)


def _forward(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    _check(x, right, left, bias, out_features)
    right, left = right.contiguous(), left.contiguous()
    n, nr, ib = right.shape
    xb = _rows(x, n * ib)
    rows, rank = xb.shape[0], nr // n
    # One of two things has to be permuted: the activations in the middle, or `right`. Measured
    # (x86, 4 blocks, ib 192): below about ib / 8 rows the activations are the cheaper ones.
    if rows * 8 < ib:
        mid = torch.bmm(xb.view(rows, n, ib).transpose(0, 1), right.transpose(1, 2))
        mid = mid.view(n, rows, n, rank).permute(2, 1, 0, 3).reshape(n, rows, nr)
    else:
        mid = _mid_by_output(_mid(xb, right))
    z = torch.bmm(mid, left.transpose(1, 2))
    del mid  # y may take its memory
    return _finish(z, bias, x.shape, out_features)


def _forward_train(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int
) -> tuple[Tensor, Tensor]:
    _check(x, right, left, bias, out_features)
    right, left = right.contiguous(), left.contiguous()
    mid = _mid(_rows(x, right.shape[0] * right.shape[2]), right)
    z = torch.bmm(_mid_by_output(mid), left.transpose(1, 2))
    return _finish(z, bias, x.shape, out_features), mid


def _forward_fake(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    _check(x, right, left, bias, out_features)
    return x.new_empty(*x.shape[:-1], out_features)


def _forward_train_fake(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int
) -> tuple[Tensor, Tensor]:
    y = _forward_fake(x, right, left, bias, out_features)
    return y, x.new_empty(right.shape[0], right.shape[1], math.prod(x.shape[:-1]))


# Backward ----------------------------------------------------------------------------------------


def _backward(
    grad: Tensor,
    x: Tensor,
    mid: Tensor,
    right: Tensor,
    left: Tensor,
    need_x: bool,
    need_right: bool,
    need_left: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dleft_l = g_lᵀ mid_l;  dmid_l = g_l left_l;  dright_k = dmid_kᵀ x_k;  dx_k = dmid_k right_k.

    A gradient that is not needed comes back as an empty tensor.
    """
    right, left, mid = right.contiguous(), left.contiguous(), mid.contiguous()
    (n, nr, ib), ob = right.shape, left.shape[1]
    rank, in_features = nr // n, x.shape[-1]
    g = _rows(grad, n * ob)
    rows = g.shape[0]
    g = g.view(rows, ob, n).permute(2, 0, 1).contiguous()  # [l, rows, s]
    dx, dright, dleft = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if need_left:
        dleft = torch.bmm(g.transpose(1, 2), _mid_by_output(mid))  # [l, s, (k, r)]
    if need_x or need_right:
        dmid = torch.empty_like(mid)  # [k, (r, l), rows], filled as [l, (k, r), rows]
        torch.bmm(
            left.transpose(1, 2), g.transpose(1, 2), out=dmid.view(nr, n, rows).transpose(0, 1)
        )
        if need_right:
            xb = _rows(x, n * ib).view(rows, n, ib).transpose(0, 1)  # [k, rows, i]
            dright = torch.bmm(dmid, xb).view(n, rank, n, ib)
            dright = dright.transpose(1, 2).reshape(n, nr, ib)
        if need_x:
            dx = x.new_empty(rows, n, ib)
            torch.bmm(dmid.transpose(1, 2), _rank_major(right), out=dx.transpose(0, 1))
            dx = dx.view(rows, n * ib)[:, :in_features].contiguous().view(x.shape)
    return dx, dright, dleft


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    mid: Tensor,
    right: Tensor,
    left: Tensor,
    need_x: bool,
    need_right: bool,
    need_left: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        right.new_empty(right.shape if need_right else 0),
        left.new_empty(left.shape if need_left else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, right, left, bias, out_features = inputs
    ctx.save_for_backward(x, right, left, output[1])
    ctx.out_features, ctx.needs_bias = out_features, bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """Keeps `mid` (one activation of N·N·rank values per row, in_features where that is the
    smaller side) rather than computing it again, which would add a sixth to the FLOPs of a
    square layer's training step. As an output of an op of its own it stays visible in the joint
    graph, where a memory planner may choose otherwise."""
    if grad is None:
        return None, None, None, None, None
    x, right, left, mid = ctx.saved_tensors
    need_x, need_right, need_left, need_bias, _ = ctx.needs_input_grad
    dbias = grad.sum_to_size(grad.shape[-1]) if ctx.needs_bias and need_bias else None
    if torch.is_grad_enabled():  # create_graph=True: gradients that are differentiable themselves
        dx, dright, dleft = _backward_reference(grad, x, right, left)
    else:
        dx, dright, dleft = torch.ops.rewriter.monarch_linear_backward(
            grad, x, mid, right, left, need_x, need_right, need_left
        )
    return (
        dx if need_x else None,
        dright if need_right else None,
        dleft if need_left else None,
        dbias,
        None,
    )


def _backward_reference(
    grad: Tensor, x: Tensor, right: Tensor, left: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward as formulas over [rows, …] tensors, differentiable in all four arguments."""
    (n, nr, ib), ob = right.shape, left.shape[1]
    rank = nr // n
    g = torch.unflatten(_rows(grad, n * ob), 1, (ob, n))
    xb = torch.unflatten(_rows(x, n * ib), 1, (n, ib))
    r, lf = torch.unflatten(right, 1, (n, rank)), torch.unflatten(left, 2, (n, rank))
    mid = torch.einsum("klri,bki->bklr", r, xb)
    dmid = torch.einsum("lskr,bsl->bklr", lf, g)
    dx = torch.einsum("klri,bklr->bki", r, dmid).flatten(1)[:, : x.shape[-1]].reshape(x.shape)
    dright = torch.einsum("bklr,bki->klri", dmid, xb).reshape(right.shape)
    dleft = torch.einsum("bsl,bklr->lskr", g, mid).reshape(left.shape)
    return dx, dright, dleft


# Registration ------------------------------------------------------------------------------------


def _autograd(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """With gradients the op becomes `monarch_linear_train`, which hands out `mid` as well."""
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, right, left, bias)
    ):
        y: Tensor = torch.ops.rewriter.monarch_linear_train(x, right, left, bias, out_features)[0]
        return y
    with torch._C._AutoDispatchBelowAutograd():  # what torch.library does in the same place
        return monarch_linear(x, right, left, bias, out_features)


_LIB.impl("monarch_linear", _forward, "CompositeExplicitAutograd")
_LIB.impl("monarch_linear", _autograd, "Autograd")
register_autocast(_LIB, "monarch_linear", casts=4)
_LIB.impl("monarch_linear_train", _forward_train, "CompositeExplicitAutograd")
_LIB.impl("monarch_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("rewriter::monarch_linear", _forward_fake, lib=_LIB)
torch.library.register_fake("rewriter::monarch_linear_train", _forward_train_fake, lib=_LIB)
torch.library.register_fake("rewriter::monarch_linear_backward", _backward_fake, lib=_LIB)
torch.library.register_autograd(
    "rewriter::monarch_linear_train",
    _autograd_backward,
    setup_context=_setup_context,
    lib=_LIB,
)


@register_flop_formula([torch.ops.rewriter.monarch_linear, torch.ops.rewriter.monarch_linear_train])
def monarch_linear_flops(
    x: torch.Size, right: torch.Size, left: torch.Size, *args: Any, **kwargs: Any
) -> int:
    """2·rows·N²·rank·(ib+ob), from shapes."""
    (n, nr, ib), ob = right, left[1]
    return 2 * math.prod(x[:-1]) * n * nr * (ib + ob)


@register_flop_formula(torch.ops.rewriter.monarch_linear_backward)
def monarch_linear_backward_flops(
    grad: torch.Size,
    x: torch.Size,
    mid: torch.Size,
    right: torch.Size,
    left: torch.Size,
    need_x: bool,
    need_right: bool,
    need_left: bool,
    **kwargs: Any,
) -> int:
    """2·rows·N²·rank·(ib·[dx]+ib·[dright]+ob·[dleft]+ob·[dmid]), from shapes."""
    (n, nr, ib), ob = right, left[1]
    width = ib * (need_x + need_right) + ob * (need_left + (need_x or need_right))
    return 2 * math.prod(x[:-1]) * n * nr * width
