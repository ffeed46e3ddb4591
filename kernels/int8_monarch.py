"""Monarch with int8 factors: `kernels/monarch.py` with every product an `int8_linear`.

    mid[b,k,:]  = int8_linear(x[b,k,:],  qright[k], right_scale[k])      for every input block k
    z[b,l,:]    = int8_linear(mid[b,l,:], qleft[l], left_scale[l])       for every output block l
    y[b,l·ob+s] = z[b,l,s] + bias[l·ob+s]                interleaved: y[b,s·L+l] = z[b,l,s] + …

Activations have a range per token and block, or one per factor over the whole tensor. torch has
no batched int8 product on the CPU: the blocks run one after the other.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import int8_linear as int8
from rewriter.kernels import monarch, ops, quantized_gpu
from rewriter.kernels.common import (
    owned,
    register_autocast,
    register_gradient,
    register_vmap,
    widened,
)

__all__ = ["Operands", "int8_monarch_linear", "int8_monarch_linear_reference"]

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "int8_monarch_linear(Tensor x, Tensor qright, Tensor right_scale, Tensor qleft, "
    "Tensor left_scale, Tensor? bias, int out_features, str activation='per_token', "
    "bool interleaved=False) -> Tensor"
)


class Operands(NamedTuple):
    """The arguments of `int8_monarch_linear`, in its order."""

    x: Tensor
    qright: Tensor
    right_scale: Tensor
    qleft: Tensor
    left_scale: Tensor
    bias: Tensor | None
    out_features: int
    activation: str = "per_token"
    interleaved: bool = False


def int8_monarch_linear(
    x: Tensor,
    qright: Tensor,
    right_scale: Tensor,
    qleft: Tensor,
    left_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "per_token",
    interleaved: bool = False,
) -> Tensor:
    """y[…, l·ob+s] = Σ_(k,r) left[l,s,(k,r)]·q(Σ_i right[k,(r,l),i]·q(x[…, k·ib+i])) + bias[l·ob+s]

    with right = qright·right_scale[…, None], left = qleft·left_scale[…, None], and q as in
    `int8_linear`. Costs 2·rows·K·L·rank·(ib+ob) FLOPs. Gradients are straight-through, to x and
    bias.

    Args:
        x: [*, in_features], zero-padded to K·ib.
        qright: [K, rank·L, ib] int8.
        right_scale: [K, rank·L].
        qleft: [L, ob, K·rank] int8.
        left_scale: [L, ob].
        bias: [out_features] or None.
        out_features: at most L·ob; y is cropped to it.
        activation: "per_token" or "per_tensor".
        interleaved: y[…, s·L+l] in place of y[…, l·ob+s].

    Returns:
        [*, out_features], contiguous, in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    y: Tensor = torch.ops.rewriter.int8_monarch_linear.default(
        x, qright, right_scale, qleft, left_scale, bias, out_features, activation, interleaved
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
    interleaved: bool = False,
) -> Tensor:
    """The same function block by block, float64 inside."""
    (k, rl, ib), l = qright.shape, qleft.shape[0]
    xb = F.pad(x.double(), (0, k * ib - x.shape[-1])).unflatten(-1, (k, ib))

    def blocks(v: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        n = q.shape[0]
        if activation == "per_token":
            parts = [int8.int8_linear_reference(v[..., i, :], q[i], scale[i]) for i in range(n)]
            return torch.stack(parts, -2)
        # one range for all blocks: as one wide layer, of which each block keeps its own part
        w = q.flatten(0, 1), scale.flatten()
        wide = int8.int8_linear_reference(v, *w, None, activation)
        return torch.stack([wide.unflatten(-1, (n, -1))[..., i, i, :] for i in range(n)], -2)

    mid = blocks(xb, qright, right_scale)  # [*, k, (r, l)]
    mid = mid.unflatten(-1, (rl // l, l)).flatten(-3, -2).transpose(-2, -1)  # [*, l, (k, r)]
    z = blocks(mid, qleft, left_scale)  # [*, l, s]
    y = (z.transpose(-2, -1) if interleaved else z).flatten(-2)[..., :out_features]
    return (y if bias is None else y + bias).to(x.dtype)


def _check(operands: Operands) -> None:
    x, qright, right_scale, qleft, left_scale, bias, out_features, activation, _ = operands
    if activation not in int8.ACTIVATIONS:
        raise ValueError(
            f"int8_monarch_linear: activation must be one of {int8.ACTIVATIONS}: {activation!r}"
        )
    if qright.dtype != torch.int8 or qleft.dtype != torch.int8:
        raise ValueError(
            f"int8_monarch_linear: factors must be int8, got {qright.dtype} and {qleft.dtype}"
        )
    right, left = list(qright.shape), list(qleft.shape)
    fits = (
        qright.ndim == qleft.ndim == 3
        and right[1] % left[0] == 0
        and right[0] * (right[1] // left[0]) == left[2]
    )
    if not fits or -(-out_features // left[0]) != left[1]:
        raise ValueError(
            f"int8_monarch_linear: qright {right} and qleft {left} must be [K, rank*L, ib] and "
            f"[L, ob, K*rank] with L*ob just above out_features {out_features}"
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


def _formula(*args: Any) -> Tensor:
    """The reference, with derivatives: rounding counts as the identity."""
    given = Operands(*args)
    x, out, options = given.x, given.out_features, (given.activation, given.interleaved)
    scales = given.right_scale.detach(), given.left_scale.detach()
    right, left = (
        int8.dequantize_weight(q, scale).to(x.dtype)
        for q, scale in zip((given.qright, given.qleft), scales, strict=True)
    )
    factors = given.qright, scales[0], given.qleft, scales[1]
    y = int8_monarch_linear_reference(x.detach(), *factors, given.bias, out, *options)
    moved = monarch.monarch_linear_reference(
        x - x.detach(), right, left, None, out, given.interleaved
    )
    return y + moved


def _blocks(x: Tensor, qweight: Tensor, scale: Tensor, activation: str) -> tuple[Tensor, ...]:
    """x [N, rows, k] contiguous; qweight [N, n, k]; scale [N, n] of x's dtype → N × [rows, n]."""
    blocks, rows, k = x.shape
    n = qweight.shape[1]
    flat = x.reshape(blocks * rows, k)
    if quantized_gpu.takes(x):
        sums = int8.packed_weight(qweight).row_sums
        found = quantized_gpu.run_blocks(x, qweight, scale, sums, activation)
        if found is not None:
            return tuple(found)
    if not int8.has_kernels(x):
        return _plain_blocks(flat, qweight, scale, activation)
    kernel = int8.pick_kernel(rows, k, n, activation)
    packed = int8.packed_weight(qweight)
    if kernel == "native" and activation == "per_token":
        each = enumerate(zip(x, qweight, scale, strict=True))
        return tuple(int8.native(a, q, packed, i, s, None, activation) for i, (a, q, s) in each)
    if kernel == "native":  # its range would be that of one block
        kernel = next(k for k in int8.available_kernels() if k != "native")
    q, s, lo = quantized = int8.quantize(flat, activation)
    parts = []
    if kernel == "torch":  # one product for all blocks
        parts = list(int8.multiply_blocks(quantized, qweight, packed, scale))
    for b in range(len(parts), blocks):
        own = slice(b * rows, (b + 1) * rows)
        part: int8.Quantized
        if isinstance(s, Tensor):
            assert isinstance(lo, Tensor)
            part = q[own], s[own], lo[own]
        else:
            assert isinstance(lo, int)
            part = q[own], s, lo
        parts.append(int8.multiply(kernel, part, qweight[b], packed, b, scale[b], None))
    if isinstance(s, Tensor) and not math.isfinite(s.sum().item()):
        wide = ~s.isfinite().view(blocks, rows)
        plain = _plain_blocks(flat, qweight, scale, activation)
        parts = [
            torch.where(own[:, None], other, y)
            for own, other, y in zip(wide, plain, parts, strict=True)
        ]
    return tuple(parts)


def _plain_blocks(
    flat: Tensor, qweight: Tensor, scale: Tensor, activation: str
) -> tuple[Tensor, ...]:
    """The same in plain torch, on any device: flat [N·rows, k]."""
    levels, step, low = int8.quantize_torch(flat, activation)
    x = (levels * step + low).view(qweight.shape[0], -1, flat.shape[1])
    weight = int8.dequantize_weight(qweight, scale)
    return torch.bmm(x, weight.transpose(1, 2)).unbind()


def _forward(*args: Any) -> Tensor:
    operands = Operands(*args)
    _check(operands)
    x, qright, right_scale, qleft, left_scale, bias, out_features, activation, interleaved = (
        operands
    )
    (k, rl, ib), l = qright.shape, qleft.shape[0]
    shape = *x.shape[:-1], out_features
    rows, wide = math.prod(shape[:-1]), widened(x.dtype)
    if rows == 0:
        return x.new_zeros(shape)
    xb = x.reshape(rows, x.shape[-1]).to(wide)
    xb = F.pad(xb, (0, k * ib - xb.shape[1])).view(rows, k, ib).transpose(0, 1).contiguous()
    mid = torch.cat(_blocks(xb, qright, right_scale.to(wide), activation), 1)  # [rows, (k, r, l)]
    mid = mid.view(rows, k * rl // l, l).permute(2, 0, 1).contiguous()  # [l, rows, (k, r)]
    z = _blocks(mid, qleft, left_scale.to(wide), activation)  # l times [rows, s]
    y = torch.stack(z, 2).flatten(1) if interleaved else torch.cat(z, 1)
    y = y[:, :out_features].contiguous()
    y = y if bias is None else y.add_(bias)
    return owned(y.to(x.dtype), shape)


def _fake(*args: Any) -> Tensor:
    operands = Operands(*args)
    _check(operands)
    return operands.x.new_empty(*operands.x.shape[:-1], operands.out_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = Operands(*inputs)
    ctx.save_for_backward(given.qright, given.right_scale, given.qleft, given.left_scale)
    ctx.in_features, ctx.interleaved = given.x.shape[-1], given.interleaved
    ctx.bias_dtype = None if given.bias is None else given.bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = g through leftᵀ, then rightᵀ; rounding of activations counts as the identity."""
    qright, right_scale, qleft, left_scale = ctx.saved_tensors
    rank, (l, ob, _) = qright.shape[1] // qleft.shape[0], qleft.shape
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        right = int8.dequantize_weight(qright, right_scale).to(grad.dtype)
        left = int8.dequantize_weight(qleft, left_scale).to(grad.dtype)
        rows, width = math.prod(grad.shape[:-1]), l * ob
        g = F.pad(grad, (0, width - grad.shape[-1])).reshape(rows, width)
        g = g.reshape(rows, ob, l).mT if ctx.interleaved else g.reshape(rows, l, ob)
        dmid = torch.bmm(g.transpose(0, 1), left).permute(1, 2, 0)  # [rows, (k, r), l]
        dmid = dmid.reshape(rows, len(right), rank * l).transpose(0, 1)  # [k, rows, (r, l)]
        dx = torch.bmm(dmid, right).transpose(0, 1).reshape(rows, len(right) * right.shape[2])
        dx = dx.narrow(1, 0, ctx.in_features).reshape(*grad.shape[:-1], ctx.in_features)
    if ctx.needs_input_grad[5]:
        dbias = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return dx, None, None, None, None, dbias, None, None, None


_LIB.impl("int8_monarch_linear", _forward, "CompositeExplicitAutograd")
register_autocast(_LIB, "int8_monarch_linear", casts=1)
register_gradient(_LIB, "int8_monarch_linear", _formula, _setup_context, _backward)
register_vmap(_LIB, "int8_monarch_linear", _formula, casts=1)
torch.library.register_fake("rewriter::int8_monarch_linear", _fake, lib=_LIB)


def _sizes(
    x: Tensor,
    qright: Tensor,
    right_scale: Tensor,
    qleft: Tensor,
    left_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "per_token",
    interleaved: bool = False,
) -> tuple[Any, ...]:
    return monarch.sizes(x, qright, qleft, bias, out_features, interleaved)


def _flops(
    x: torch.Size,
    qright: torch.Size,
    right_scale: torch.Size,
    qleft: torch.Size,
    *args: Any,
    **kwargs: Any,
) -> int:
    """2·rows·K·L·rank·(ib+ob) integer operations, from shapes."""
    k, rl, ib = qright
    return 2 * math.prod(x[:-1]) * k * rl * (ib + qleft[1])


def _parts(run: ops.Run) -> list[ops.Part]:
    """The blocks of both factors, one after the other; in front, between and behind they are
    gathered and joined."""
    rows, out, width, k, l, rank, interleaved = run.sizes
    ib, ob = -(-width // k), -(-out // l)
    share = run.weight_bytes * ib // max(ib + ob, 1)
    middle = rows * k * l * rank
    found = [
        _block(k, rows, rank * l, ib, share),
        _block(l, rows, ob, k * rank, run.weight_bytes - share),
        ops.moved(run, "pointwise", "aten::add_", rows * out, 2 * ops.element_size(run.dtype)),
        *(ops.moved(run, "copy", "aten::clone", n, 8) for n in (rows * width, middle)),
        *(ops.moved(run, "copy", "aten::cat", n, 8) for n in (middle, rows * out)),
    ]
    return found + monarch.interleaving(run) if interleaved else found


def _block(count: int, m: int, n: int, k: int, weight_bytes: int) -> ops.Part:
    sizes, own = (m, n, k), int8.RECORD
    read = (m + n) * k
    figures = 2 * m * n * k, read, 4 * m * n, weight_bytes // count
    return ops.Part(own.name, own.kind, own.dtype, *figures, sizes, count)


def _sample(rows: int, width: int, blocks: int) -> tuple[Any, ...]:
    x, right, left, bias, out = monarch.sample(rows, width, blocks)
    scales = torch.ones(right.shape[:2]), torch.ones(left.shape[:2])
    return x, right.to(torch.int8), scales[0], left.to(torch.int8), scales[1], bias, out


def _onnx(*args: Any) -> Tensor:
    """Both factors as batches of ONNX's integer products."""
    x, qright, right_scale, qleft, left_scale, bias, out_features, activation, interleaved = (
        Operands(*args)
    )
    (k, rl, ib), l = qright.shape, qleft.shape[0]
    rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
    xb = F.pad(rows, (0, k * ib - x.shape[-1])).unflatten(-1, (k, ib)).transpose(0, 1)
    scales = [s.to(torch.float32).unsqueeze(1) for s in (right_scale, left_scale)]
    mid = int8.onnx_product(xb, qright, scales[0], activation)  # [k, rows, (r, l)]
    mid = mid.unflatten(-1, (rl // l, l)).permute(3, 1, 0, 2).flatten(2)  # [l, rows, (k, r)]
    z = int8.onnx_product(mid, qleft, scales[1], activation)  # [l, rows, s]
    y = z.permute((1, 2, 0) if interleaved else (1, 0, 2)).flatten(1)[:, :out_features]
    y = y.reshape(*x.shape[:-1], out_features)
    return (y if bias is None else y + bias).to(x.dtype)


ops.register(
    ops.Record(
        "rewriter::int8_monarch_linear",
        kind="int8_monarch",
        reference=int8_monarch_linear_reference,
        onnx=_onnx,
        size_names=monarch.RECORD.size_names,
        sizes=_sizes,
        flops=_flops,
        dtype="int8",
        parts=_parts,
        samples=ops.Samples(monarch.AXES, _sample, monarch.place),
        kernels=int8.RECORD.kernels,
    )
)
