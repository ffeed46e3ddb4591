"""Monarch with int8 factors: `kernels/monarch.py` with every product an `int8_linear`.

    mid[b,k,:] = int8_linear(x[b,k,:],  qright[k], right_scale[k])      for every input block k
    z[b,l,:]   = int8_linear(mid[b,l,:], qleft[l], left_scale[l])       for every output block l
    y[b,s·N+l] = z[b,l,s] + bias[s·N+l]

Activations have a range per token and block, or one per factor over the whole tensor. torch has
no batched int8 product on the CPU: the blocks run one after the other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from rewriter.kernels import int8_linear as int8
from rewriter.kernels.common import register_autocast

__all__ = ["int8_monarch_linear", "int8_monarch_linear_reference"]

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "int8_monarch_linear(Tensor x, Tensor qright, Tensor right_scale, Tensor qleft, "
    "Tensor left_scale, Tensor? bias, int out_features, str activation='per_token') -> Tensor"
)


def int8_monarch_linear(
    x: Tensor,
    qright: Tensor,
    right_scale: Tensor,
    qleft: Tensor,
    left_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "per_token",
) -> Tensor:
    """y[…, s·N+l] = Σ_(k,r) left[l,s,(k,r)]·q(Σ_i right[k,(l,r),i]·q(x[…, k·ib+i])) + bias[s·N+l]

    with right = qright·right_scale[…, None], left = qleft·left_scale[…, None], and q as in
    `int8_linear`. Costs 2·rows·N²·rank·(ib+ob) FLOPs. Gradients are straight-through, to x and
    bias.

    Args:
        x: [*, in_features], zero-padded to N·ib.
        qright: [N, N·rank, ib] int8.
        right_scale: [N, N·rank].
        qleft: [N, ob, N·rank] int8.
        left_scale: [N, ob].
        bias: [out_features] or None.
        out_features: at most N·ob; y is cropped to it.
        activation: "per_token" or "per_tensor".

    Returns:
        [*, out_features], contiguous, in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    y: Tensor = torch.ops.rewriter.int8_monarch_linear.default(
        x, qright, right_scale, qleft, left_scale, bias, out_features, activation
    )
    return y


def int8_monarch_linear_reference(
    x: Tensor,
    qright: Tensor,
    right_scale: Tensor,
    qleft: Tensor,
    left_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "per_token",
) -> Tensor:
    """The same function block by block, float64 inside."""
    n, nr, ib = qright.shape
    xb = F.pad(x.double(), (0, n * ib - x.shape[-1])).unflatten(-1, (n, ib))

    def blocks(v: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        if activation == "per_token":
            parts = [int8.int8_linear_reference(v[..., i, :], q[i], scale[i]) for i in range(n)]
            return torch.stack(parts, -2)
        # one range for all blocks: as one wide layer, of which each block keeps its own part
        w = q.flatten(0, 1), scale.flatten()
        wide = int8.int8_linear_reference(v, *w, None, activation)
        return torch.stack([wide.unflatten(-1, (n, -1))[..., i, i, :] for i in range(n)], -2)

    mid = blocks(xb, qright, right_scale)  # [*, k, (l, r)]
    mid = mid.unflatten(-1, (n, nr // n)).transpose(-3, -2).flatten(-2)  # [*, l, (k, r)]
    z = blocks(mid, qleft, left_scale)  # [*, l, s]
    y = z.transpose(-2, -1).flatten(-2)[..., :out_features]
    return (y if bias is None else y + bias).to(x.dtype)


def _check(
    x: Tensor,
    qright: Tensor,
    right_scale: Tensor,
    qleft: Tensor,
    left_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
) -> None:
    if activation not in int8.ACTIVATIONS:
        raise ValueError(
            f"int8_monarch_linear: activation must be one of {int8.ACTIVATIONS}: {activation!r}"
        )
    if qright.dtype != torch.int8 or qleft.dtype != torch.int8:
        raise ValueError(
            f"int8_monarch_linear: factors must be int8, got {qright.dtype} and {qleft.dtype}"
        )
    right, left = list(qright.shape), list(qleft.shape)
    fits = qright.ndim == qleft.ndim == 3 and right[0] == left[0] and right[1] == left[2]
    if not fits or right[1] % right[0] or -(-out_features // right[0]) != left[1]:
        raise ValueError(
            f"int8_monarch_linear: qright {right} and qleft {left} must be [N, N*rank, ib] and "
            f"[N, ob, N*rank] with N*ob just above out_features {out_features}"
        )
    if not x.is_floating_point() or x.ndim == 0 or -(-x.shape[-1] // right[0]) != right[2]:
        raise ValueError(
            f"int8_monarch_linear: x {x.dtype} {list(x.shape)} does not fit qright {right}"
        )
    if list(right_scale.shape) != right[:2] or list(left_scale.shape) != left[:2]:
        raise ValueError(
            f"int8_monarch_linear: scales must be {right[:2]} and {left[:2]}, got "
            f"{list(right_scale.shape)} and {list(left_scale.shape)}"
        )
    if bias is not None and list(bias.shape) != [out_features]:
        raise ValueError(
            f"int8_monarch_linear: bias must be [{out_features}], got {list(bias.shape)}"
        )


def _blocks(x: Tensor, qweight: Tensor, scale: Tensor, activation: str) -> Tensor:
    """x [N, rows, k] float32, contiguous; qweight [N, n, k] → [N, rows, n]."""
    blocks, rows, k = x.shape
    n = qweight.shape[1]
    kernel = int8.pick_kernel(rows, k, n, activation) if x.device.type == "cpu" else "torch"
    flat = x.reshape(blocks * rows, k)
    if kernel == "torch":
        levels, step, low = int8.quantize_torch(flat, activation)
        weight = int8.dequantize_weight(qweight, scale)
        return torch.bmm((levels * step + low).view(blocks, rows, k), weight.transpose(1, 2))
    packed = int8.packed_weight(qweight)
    q, s, lo = int8.quantize(flat, activation)
    parts = []
    for b in range(blocks):
        own = slice(b * rows, (b + 1) * rows)
        part: int8.Quantized
        if isinstance(s, Tensor):
            assert isinstance(lo, Tensor)
            part = q[own], s[own], lo[own]
        else:
            assert isinstance(lo, int)
            part = q[own], s, lo
        parts.append(int8.multiply(kernel, part, qweight[b], packed, b, scale[b], None))
    return torch.stack(parts)


def _forward(
    x: Tensor,
    qright: Tensor,
    right_scale: Tensor,
    qleft: Tensor,
    left_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "per_token",
) -> Tensor:
    _check(x, qright, right_scale, qleft, left_scale, bias, out_features, activation)
    n, nr, ib = qright.shape
    rows = math.prod(x.shape[:-1])
    if rows == 0:
        return x.new_zeros(*x.shape[:-1], out_features)
    xb = x.reshape(rows, x.shape[-1]).float()
    xb = F.pad(xb, (0, n * ib - xb.shape[1])).view(rows, n, ib).transpose(0, 1).contiguous()
    mid = _blocks(xb, qright, right_scale.float(), activation)  # [k, rows, (l, r)]
    mid = mid.view(n, rows, n, nr // n).permute(2, 1, 0, 3).reshape(n, rows, nr)
    z = _blocks(mid, qleft, left_scale.float(), activation)  # [l, rows, s]
    y = z.permute(1, 2, 0).reshape(rows, -1)[:, :out_features]
    y = y.contiguous() if bias is None else y + bias
    return y.view(*x.shape[:-1], out_features).to(x.dtype)


def _fake(
    x: Tensor,
    qright: Tensor,
    right_scale: Tensor,
    qleft: Tensor,
    left_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "per_token",
) -> Tensor:
    _check(x, qright, right_scale, qleft, left_scale, bias, out_features, activation)
    return x.new_empty(*x.shape[:-1], out_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qright, right_scale, qleft, left_scale, bias, _, _ = inputs
    ctx.save_for_backward(qright, right_scale, qleft, left_scale)
    ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = g through leftᵀ, then rightᵀ; rounding of activations counts as the identity."""
    qright, right_scale, qleft, left_scale = ctx.saved_tensors
    n, nr, ob = qright.shape[0], qright.shape[1], qleft.shape[1]
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        right = int8.dequantize_weight(qright, right_scale).to(grad.dtype)
        left = int8.dequantize_weight(qleft, left_scale).to(grad.dtype)
        g = F.pad(grad, (0, n * ob - grad.shape[-1])).unflatten(-1, (ob, n))  # [*, s, l]
        dmid = torch.einsum("...sl,lsm->...lm", g, left)  # [*, l, (k, r)]
        dmid = dmid.unflatten(-1, (n, nr // n)).transpose(-3, -2).flatten(-2)  # [*, k, (l, r)]
        dx = torch.einsum("...km,kmi->...ki", dmid, right).flatten(-2)[..., : ctx.in_features]
    if ctx.needs_input_grad[5]:
        dbias = grad.sum(tuple(range(grad.ndim - 1))).to(ctx.bias_dtype)
    return dx, None, None, None, None, dbias, None, None


_LIB.impl("int8_monarch_linear", _forward, "CompositeExplicitAutograd")
register_autocast(_LIB, "int8_monarch_linear", casts=1)
torch.library.register_fake("rewriter::int8_monarch_linear", _fake, lib=_LIB)
torch.library.register_autograd(
    "rewriter::int8_monarch_linear", _backward, setup_context=_setup_context, lib=_LIB
)


@register_flop_formula(torch.ops.rewriter.int8_monarch_linear)
def int8_monarch_linear_flops(
    x: torch.Size,
    qright: torch.Size,
    right_scale: torch.Size,
    qleft: torch.Size,
    *args: Any,
    **kwargs: Any,
) -> int:
    """2·rows·N²·rank·(ib+ob) integer operations, from shapes."""
    n, nr, ib = qright
    return 2 * math.prod(x[:-1]) * n * nr * (ib + qleft[1])
