"""Monarch with int8 factors: `kernels/monarch.py` with every product an `int8_linear`.

    mid[b,k,:]  = int8_linear(x[b,k,:],  qright[k], right_scale[k])      for every input block k
    z[b,l,:]    = int8_linear(mid[b,l,:], qleft[l], left_scale[l])       for every output block l
    y[b,l·ob+s] = z[b,l,s] + bias[l·ob+s]                interleaved: y[b,s·L+l] = z[b,l,s] + …

Activations have a range per token and block, or one per factor over the whole tensor.

Kernels on the CPU, chosen by measurement per size:

    native                    of int8_monarch.h: both products, and what lies between and follows
                              them, in one call, rows at a time while they are in the cache
    onednn, int_mm, torch     those of `int8_linear`, block by block

All of them give the same bits, on any number of threads. Other devices, and float64, run the
formula in plain torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rewriter.kernels import (
    int8_cpu,
    int8_monarch_cpu,
    int8_product,
    monarch,
    ops,
    quantized_gpu,
)
from rewriter.kernels import int8_linear as int8
from rewriter.kernels.choice import fastest, rows_bucket
from rewriter.kernels.common import (
    owned,
    register_autocast,
    register_gradient,
    register_vmap,
    widened,
)
from rewriter.kernels.settings import own_settings

__all__ = [
    "Operands",
    "available_kernels",
    "bound",
    "int8_monarch_linear",
    "int8_monarch_linear_reference",
    "int8_monarch_linear_then",
    "kernel_name",
    "pick_kernel",
]

_VERSION = "int8-monarch-1"
"""Of the kernels: choices that another version of them measured do not count."""

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "int8_monarch_linear(Tensor x, Tensor qright, Tensor right_scale, Tensor qleft, "
    "Tensor left_scale, Tensor? bias, int out_features, str activation='per_token', "
    "bool interleaved=False) -> Tensor"
)
_LIB.define(
    "int8_monarch_linear_then(Tensor x, Tensor qright, Tensor right_scale, Tensor qleft, "
    "Tensor left_scale, Tensor? bias, int out_features, str activation, bool interleaved, "
    "str then, Tensor? add, Tensor? norm_weight, Tensor? norm_bias, float? eps) -> Tensor"
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


def int8_monarch_linear_then(
    x: Tensor,
    qright: Tensor,
    right_scale: Tensor,
    qleft: Tensor,
    left_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    interleaved: bool,
    then: str = "",
    add: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """layer_norm(then(int8_monarch_linear(x, …)) + add), for inference: it has no gradient.

    Args:
        x … interleaved: as of `int8_monarch_linear`.
        then, add, norm_weight, norm_bias, eps: as of `int8_linear.int8_linear_then`.
    """
    y: Tensor = torch.ops.rewriter.int8_monarch_linear_then.default(
        x, qright, right_scale, qleft, left_scale, bias, out_features, activation, interleaved,
        then, add, norm_weight, norm_bias, eps,
    )  # fmt: skip
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


# Choice of the kernel ----------------------------------------------------------------------------


def available_kernels() -> tuple[str, ...]:
    """The CPU kernels that gave the right answers on this machine; "torch" is always one."""
    return tuple(name for name, refused in _kernels().items() if refused is None)


def _kernels() -> dict[str, str | None]:
    found = dict(int8.RECORD.kernels())
    return {**found, "native": found["native"] or _refusal()}


@functools.cache
def _refusal() -> str | None:
    """Runs the kernel "native" beside "torch", on blocks that fill its panels and such that do
    not."""
    with own_settings():
        for rows, width, out, k, l in ((1, 64, 128, 2, 4), (5, 23, 17, 3, 2)):
            ib, ob = -(-width // k), -(-out // l)
            right = torch.full((k, 2 * l, ib), 127, dtype=torch.int8)
            left = torch.full((l, ob, 2 * k), -128, dtype=torch.int8)
            right[:, ::3], left[:, ::3] = -128, 1
            x = torch.linspace(-1, 1, rows * width).view(rows, width)
            right_scale = torch.linspace(0.5, 2, k * 2 * l).view(k, 2 * l)
            left_scale = torch.linspace(-1, 1, l * ob).view(l, ob)
            given = x, right, right_scale, left, left_scale, left_scale.flatten()[:out], out
            for activation in int8.ACTIVATIONS:
                operands = Operands(*given, activation)
                got, want = (_run(kernel, operands) for kernel in ("native", "torch"))
                if not torch.equal(got, want):
                    worst = (got - want).abs().max().item()
                    return f"wrong by {worst:.3g} at {rows}x{width}x{out} {activation}"
    return None


def pick_kernel(
    tokens: int,
    in_features: int,
    out_features: int,
    blocks: tuple[int, int],
    rank: int,
    activation: str = "per_token",
    interleaved: bool = False,
) -> str:
    """The fastest available CPU kernel for a layer, measured as `int8_linear.pick_kernel` does.

    Args:
        tokens: rows of x.
        in_features, out_features: of the layer.
        blocks: (K, L).
        rank, activation, interleaved: of the layer.
    """
    kernels = available_kernels()
    if len(kernels) < 2:
        return kernels[0]
    rows, (k, l) = rows_bucket(tokens), blocks
    sizes = f"{rows} {in_features} {out_features} {k} {l} {rank} {interleaved}"
    key = f"{sizes} {activation} {kernels} {torch.get_num_threads()}"

    def candidates() -> dict[str, Callable[[], object]]:
        ib, ob = -(-in_features // k), -(-out_features // l)
        right = torch.ones(k, rank * l, ib, dtype=torch.int8)
        left = torch.ones(l, ob, k * rank, dtype=torch.int8)
        x = torch.linspace(-1, 1, rows * in_features).view(rows, in_features)
        scales = torch.ones(k, rank * l), torch.ones(l, ob)
        given = right, scales[0], left, scales[1], None, out_features, activation, interleaved
        return {name: functools.partial(_run, name, Operands(x, *given)) for name in kernels}

    found = fastest(key, _VERSION, candidates)
    return found if found in kernels else "torch"  # of a file that others may write


def kernel_name(
    tokens: int,
    in_features: int,
    out_features: int,
    blocks: tuple[int, int],
    rank: int,
    activation: str = "per_token",
    interleaved: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> str:
    """The kernel that `int8_monarch_linear` runs for such a call, for the report."""
    on = torch.device(device)
    if on.type not in ("cpu", "meta"):
        return quantized_gpu.kernel_name("int8", on, dtype, -(-in_features // blocks[0]))
    if not int8.runs_kernels(tokens, in_features, out_features, device, dtype):
        return "torch"
    return pick_kernel(tokens, in_features, out_features, blocks, rank, activation, interleaved)


# Forward -----------------------------------------------------------------------------------------


def _run(kernel: str, operands: Operands, after: int8.After = int8.NOTHING) -> Tensor:
    """x [rows, in] float32 contiguous, on a CPU, not empty → [rows, out] float32."""
    if kernel == "native":
        y, wide = _made(operands, after)(operands.x, after.add)
        if not wide:
            return y
        kernel = "torch"  # rows whose range is beyond float32, or with NaN or inf
    return after(_blockwise(kernel, operands))


def _blockwise(kernel: str | None, operands: Operands) -> Tensor:
    """`_run` by a kernel of `int8_linear`, or with None in plain torch, on any device."""
    x, qright, right_scale, qleft, left_scale, bias, out, activation, interleaved = operands
    (k, rl, ib), l, rows = qright.shape, qleft.shape[0], len(x)
    xb = F.pad(x, (0, k * ib - x.shape[1])).view(rows, k, ib).transpose(0, 1).contiguous()
    mid = torch.cat(_blocks(kernel, xb, qright, right_scale, None, activation), 1)
    mid = mid.view(rows, k * rl // l, l).permute(2, 0, 1).contiguous()  # [l, rows, (k, r)]
    own = None if bias is None else _by_blocks(bias, left_scale, interleaved)
    z = _blocks(kernel, mid, qleft, left_scale, own, activation)  # l times [rows, s]
    y = torch.stack(z, 2).flatten(1) if interleaved else torch.cat(z, 1)
    return y[:, :out].contiguous()


def _by_blocks(bias: Tensor, left_scale: Tensor, interleaved: bool) -> Tensor:
    """[out] → [L, ob], with zeros behind what y is cropped to."""
    l, ob = left_scale.shape
    bias = F.pad(bias, (0, l * ob - len(bias)))
    return (bias.view(ob, l).t() if interleaved else bias.view(l, ob)).contiguous()


def _blocks(
    kernel: str | None,
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, ...]:
    """x [N, rows, k] contiguous; qweight [N, n, k]; scale and bias [N, n] → N × [rows, n]."""
    blocks, rows, k = x.shape
    flat = x.reshape(blocks * rows, k)
    if kernel is None and quantized_gpu.takes(x):
        sums = int8.packed_weight(qweight).row_sums
        found = quantized_gpu.run_blocks(x, qweight, scale, sums, activation)
        if found is not None:
            return tuple(found if bias is None else map(torch.add, found, bias))
    if kernel is None:
        return _plain_blocks(flat, qweight, scale, bias, activation)
    packed = int8.packed_weight(qweight)
    q, s, lo = quantized = int8.quantize(flat, activation)
    parts = []
    if kernel == "torch":  # one product for all blocks
        parts = list(int8.multiply_blocks(quantized, qweight, packed, scale, bias))
    for b in range(len(parts), blocks):
        own = slice(b * rows, (b + 1) * rows)
        part: int8.Quantized
        if isinstance(s, Tensor):
            assert isinstance(lo, Tensor)
            part = q[own], s[own], lo[own]
        else:
            assert isinstance(lo, int)
            part = q[own], s, lo
        added = None if bias is None else bias[b]
        parts.append(int8.multiply(kernel, part, qweight[b], packed, b, scale[b], added))
    if isinstance(s, Tensor) and not math.isfinite(s.sum().item()):
        wide = ~s.isfinite().view(blocks, rows)
        plain = _plain_blocks(flat, qweight, scale, bias, activation)
        parts = [
            torch.where(own[:, None], other, y)
            for own, other, y in zip(wide, plain, parts, strict=True)
        ]
    return tuple(parts)


def _plain_blocks(
    flat: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, ...]:
    """The same in plain torch, on any device: flat [N·rows, k]."""
    levels, step, low = int8.quantize_torch(flat, activation)
    x = (levels * step + low).view(qweight.shape[0], -1, flat.shape[1])
    y = torch.bmm(x, int8.dequantize_weight(qweight, scale).transpose(1, 2))
    return (y if bias is None else y + bias[:, None]).unbind()


def _forward(*args: Any) -> Tensor:
    given, after = Operands(*args[:9]), int8.After.of(*args[9:])
    _check(given)
    x, dtype, wide = given.x, given.x.dtype, widened(given.x.dtype)
    shape = *x.shape[:-1], given.out_features
    rows = math.prod(shape[:-1])
    if rows == 0:
        return after(x.new_zeros(shape))
    operands = given._replace(
        x=x.reshape(rows, x.shape[-1]).to(wide).contiguous(),
        right_scale=given.right_scale.to(wide),
        left_scale=given.left_scale.to(wide),
        bias=None if given.bias is None else given.bias.to(wide),
    )
    if not int8.has_kernels(operands.x):
        y, within = _blockwise(None, operands), False
    else:
        within = after.fits(shape, dtype)
        y = _run(_kernel_of(operands), operands, after.of_rows(rows) if within else int8.NOTHING)
    y = owned(y.to(dtype), shape)
    return y if within else after(y)


def _kernel_of(given: Operands) -> str:
    (k, rl, _), l, (rows, width) = given.qright.shape, given.qleft.shape[0], given.x.shape
    options = (k, l), rl // l, given.activation, given.interleaved
    return pick_kernel(rows, width, given.out_features, *options)


# The kernel "native" -----------------------------------------------------------------------------


_CACHE = WeakTensorKeyDictionary()


def _made(given: Operands, after: int8.After) -> int8_monarch_cpu.Monarch:
    """Of operands in float32, kept for as long as `qright` lives, and made anew when one of them
    was written in place or replaced, or something else follows."""
    held = [*given[1:6], *(after.norm or ())[:2]]
    tensors = [t for t in held if isinstance(t, Tensor)]
    if any(t.is_inference() for t in tensors):  # they count no versions
        return _new(given, after)
    options = given.x.shape[1], *given[6:], after.then, after.norm and after.norm.eps
    stamp = options, [(t._version, t.data_ptr(), t.shape, t.stride()) for t in tensors]
    kept = _CACHE.get(given.qright)  # type: ignore[no-untyped-call,unused-ignore]
    if kept is None or kept[0] != stamp:
        kept = _CACHE[given.qright] = stamp, _new(given, after)
    run: int8_monarch_cpu.Monarch = kept[1]
    return run


def _new(given: Operands, after: int8.After) -> int8_monarch_cpu.Monarch:
    x, qright, right_scale, qleft, left_scale, bias, out, activation, interleaved = given
    l = len(qleft)
    right, left = int8.packed_weight(qright), int8.packed_weight(qleft)
    ordered = int8_monarch_cpu.by_outputs
    if l not in right.blocks:
        right.blocks[l] = int8_monarch_cpu.pack(ordered(qright.contiguous(), l))
    if 0 not in left.blocks:
        left.blocks[0] = int8_monarch_cpu.pack(qleft)
    norm = after.norm
    if norm is not None:
        whole = [None if t is None else t.contiguous() for t in norm[:2]]
        norm = int8_cpu.Norm(whole[0], whole[1], norm.eps)
    return int8_monarch_cpu.Monarch(
        right.blocks[l],
        ordered(right_scale.contiguous(), l).contiguous(),
        ordered(right.row_sums, l).contiguous(),
        left.blocks[0],
        left_scale.contiguous(),
        left.row_sums,
        None if bias is None else _by_blocks(bias, left_scale, interleaved),
        x.shape[1],
        out,
        interleaved,
        after.then,
        norm,
        activation == "per_tensor",
    )


def bound(
    qright: Tensor,
    right_scale: Tensor,
    qleft: Tensor,
    left_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    activation: str,
    interleaved: bool,
    then: str = "",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
) -> int8.Bound:
    """`int8_monarch_linear_then` of these operands, as `int8_linear.bound` says it."""
    own = qright, right_scale, qleft, left_scale, bias, out_features, activation, interleaved
    (k, rl, _), l = qright.shape, len(qleft)

    def run(x: Tensor, add: Tensor | None = None) -> Tensor:
        return int8_monarch_linear_then(x, *own, then, add, norm_weight, norm_bias, eps)

    def native(rows: int) -> bool:
        sizes = rows, in_features, out_features, (k, l), rl // l
        return pick_kernel(*sizes, activation, interleaved) == "native"

    floats = [t for t in (right_scale, left_scale, bias, norm_weight, norm_bias) if t is not None]
    kernel = None
    if all(t.is_cpu for t in (qright, qleft)) and "native" in available_kernels():
        if all(t.is_cpu and t.dtype == torch.float32 for t in floats):
            for q in (qright, qleft):
                if not torch.equal(int8.packed_weight(q).row_sums, q.sum(-1, dtype=torch.int32)):
                    int8_product.forget(q)  # it was written in a way that torch does not count
            row = right_scale.new_empty(0, in_features)
            after = int8.After.of(then, None, norm_weight, norm_bias, eps)
            kernel = _new(Operands(row, *own), after)
    return int8.Bound(run, kernel, native)


def _fake(*args: Any) -> Tensor:
    operands = Operands(*args[:9])
    _check(operands)
    y = operands.x.new_empty(*operands.x.shape[:-1], operands.out_features)
    add = args[10] if len(args) > 10 else None
    return y if add is None else torch.empty_like(y + add)


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
_LIB.impl("int8_monarch_linear_then", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("rewriter::int8_monarch_linear_then", _fake, lib=_LIB)


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
    *then: Any,
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
    """The blocks of a factor have the arithmetic of one product with as many times the rows; what
    lies between the factors stays in the cache."""
    rows, out, width, k, l, rank, interleaved = run.sizes
    ib, ob = -(-width // k), -(-out // l)
    share = run.weight_bytes * ib // max(ib + ob, 1)
    found = [
        _factor(k, rows, rank * l, ib, share),
        _factor(l, rows, ob, k * rank, run.weight_bytes - share),
    ]
    return found + monarch.interleaving(run) if interleaved else found


def _factor(blocks: int, m: int, n: int, k: int, weight_bytes: int) -> ops.Part:
    own, all_rows = int8.RECORD, blocks * m
    figures = 2 * all_rows * n * k, (all_rows + blocks * n) * k, 4 * all_rows * n, weight_bytes
    return ops.Part(own.name, own.kind, own.dtype, *figures, (all_rows, n, k))


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
        kernels=_kernels,
        companions=(ops.Companion("rewriter::int8_monarch_linear_then"),),
    )
)
