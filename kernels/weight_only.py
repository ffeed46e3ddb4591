"""Linear layers whose weights are integers of 8 or 4 bits: weight-only, activations stay floats.

    8 bits    w[n,k] = qweight[n,k]·scale[n]
    4 bits    w[n,k] = q[n,k]·scale[n,g] + zero[n,g]      g = k // group size, q in −8 … 7
    y = x @ wᵀ + bias

A row of 4-bit weights is stored as blocks of 32: byte i holds q[i] + 8 in its low half and
q[i + 16] + 8 in its high half. Symmetric groups have no zero. Scales and zeros are bfloat16, which
has float32's range in two bytes (float64 for a weight in float64); q is rounded against the rounded
ones. Where the group size does not divide the width, the last group is filled up.

With `int4_dynamic_linear` the activations are integers too, one scale for each row and group:

    s[t,g] = max |x[t,k]|/127 over the group,  a[t,k] = round(x[t,k]/s[t,g])
    y[t,n] = Σ_g s[t,g]·(scale[n,g]·Σ_k a[t,k]·q[n,k] + zero[n,g]·Σ_k a[t,k]) + bias[n]

Kernels on the CPU, chosen by measurement per shape, refused where a probe finds them wrong:

    native   of weight_only_cpu.cpp: the weight is read once, and unpacked in registers
    dense    the weight as floats, some rows at a time, and torch's product of floats

A GPU has kernels of its own (`quantized_gpu.py`). Other devices, and float64, compute w and
multiply by it. `torch._weight_int8pack_mm` is no candidate: in float32 it runs a plain loop, tens
of times slower than the product of floats.

Sources: group-wise scales as in Dettmers & Zettlemoyer 2023, "The case for 4-bit precision"; levels
that give the largest value the lowest level, and blocks of 32, as in llama.cpp's Q4_0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import int8_linear as int8
from rewriter.kernels import native_ops, ops, quantized_gpu, weight_bound, weight_only_cpu
from rewriter.kernels.choice import fastest, rows_bucket
from rewriter.kernels.common import (
    owned,
    register_autocast,
    register_gradient,
    register_vmap,
    widened,
)
from rewriter.kernels.int8_linear import dequantize_weight
from rewriter.kernels.settings import own_settings

__all__ = [
    "GROUP_SIZES",
    "check_width",
    "dequantize_groups",
    "dequantize_packed",
    "int4_dynamic_linear",
    "int4_linear",
    "int8_weight_linear",
    "kernel_name",
    "pack",
    "quantize_groups",
    "refused_kernels",
    "unpack",
]

_BLOCK, _HALF = 32, 16
_VERSION = "weights-2"
"""Of the kernels: choices that another version of them measured do not count."""

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "int8_weight_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? bias=None) -> Tensor"
)
_LIB.define(
    "int4_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero=None, Tensor? bias=None)"
    " -> Tensor"
)
_LIB.define(
    "int4_dynamic_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero=None, "
    "Tensor? bias=None) -> Tensor"
)

GROUP_SIZES = (32, 64, 128)


def quantize_groups(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q = round((w − zero)/scale) in −2^(bits−1) … 2^(bits−1) − 1, a scale for each group of a row.

    Symmetric: zero = 0, and the value of the largest magnitude has the level −2^(bits−1), so that
    all levels count; its scale is negative where that value is positive. Asymmetric: the least
    value of a group has the lowest level, the greatest the highest.

    The range is not narrowed for a smaller squared error of the weights. In 4 bits that takes 10 %
    off the error, and may cut off what matters most: SmolLM2's perplexity rose by 23 % in place of
    27 % in groups of 32, and by 47 % in place of 28 % in groups of 64.
    `compensation.searched_groups` weighs the error by the inputs, and helps in both.

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
    wide = widened(weight.dtype)
    kept = torch.float64 if wide == torch.float64 else torch.bfloat16
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    out, width = weight.shape
    # neither a scale rounded upward nor a level times it is to pass the largest number
    most = torch.finfo(wide).max * (1 - 2**-6 if symmetric else 0.5)
    w = weight.detach().to(wide).clamp(-most, most)
    if missing := -width % group_size:
        w = torch.cat([w, w[:, -1:].expand(-1, missing)], 1)
    w = w.reshape(out, -(-width // group_size), group_size)
    least, greatest = w.aminmax(dim=-1, keepdim=True)
    if symmetric:
        zero = None
        scale = torch.where(greatest > -least, greatest, least) / low
    else:
        levels = high - low
        zero = (least * (high / levels) - greatest * (low / levels)).to(kept).to(wide)
        scale = torch.maximum((greatest - zero) / high, (least - zero) / low)
    scale = scale.to(kept).to(wide)  # rounded, and computed with in float32: ONNX Runtime must
    scale = torch.where(scale != 0, scale, torch.ones_like(scale))
    q = ((w if zero is None else w - zero) / scale).round().clamp(low, high)
    q = q.to(torch.int8).flatten(1)
    scale = scale.to(kept).squeeze(-1)
    return q, scale, None if zero is None else zero.to(kept).squeeze(-1)


def dequantize_groups(q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """w[n,k] = q[n,k]·scale[n,g] + zero[n,g], in float32 or wider.

    Args:
        q: [out, groups·group_size] integers.
        scale: [out, groups].
        zero: [out, groups] or None.
    """
    wide = widened(scale.dtype)
    size = q.shape[1] // max(scale.shape[1], 1)
    w: Tensor = q.to(wide).unflatten(1, (scale.shape[1], size)) * scale.to(wide)[..., None]
    w = w if zero is None else w + zero.to(wide)[..., None]
    return w.flatten(1)


def pack(q: Tensor) -> Tensor:
    """q [out, width] in −8 … 7, width a multiple of 32 → [out, width/2] uint8; see the module."""
    # in int32: what is shifted of 8 bits has no sign in torch and one in what ONNX is given
    low, high = (q.to(torch.int32) + 8).unflatten(1, (-1, 2, _HALF)).unbind(2)
    packed: Tensor = (low | high << 4).flatten(1).to(torch.uint8)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The q int8 of which `pack` gives packed."""
    halves = packed.unflatten(1, (-1, 1, _HALF))
    # int8 each, not together: see `pack`
    both = [(halves & 15).to(torch.int8), (halves >> 4).to(torch.int8)]
    return torch.cat(both, 2).flatten(1) - 8


def dequantize_packed(packed: Tensor, scale: Tensor, zero: Tensor | None, width: int) -> Tensor:
    """w [out, width], in float32 or wider; arguments as of `int4_linear`."""
    return dequantize_groups(unpack(packed), scale, zero)[:, :width]


def check_width(x: Tensor, width: int) -> None:
    """Of rows in 4 bits a layer knows the width; an op does not, as the last group is filled up.

    Raises:
        ValueError: the last dimension of x is not `width`.
    """
    if isinstance(x, Tensor) and x.shape[-1:] != (width,):  # torch.fx traces with what has no shape
        raise ValueError(
            f"x of shape {list(x.shape)} does not fit a layer of {width} input features: its last "
            f"dimension must be {width}"
        )


# The functions -----------------------------------------------------------------------------------


def int8_weight_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x @ (qweight·scale[:, None])ᵀ + bias, x as it is.

    Costs 2·rows·in·out FLOPs, in float32 (float64 for x in float64). The gradient of x is
    g @ (qweight·scale[:, None]); bias has its gradient; qweight and scale have none.

    Args:
        x: [*, in_features], any real floating dtype and leading shape.
        qweight: [out_features, in_features] int8.
        scale: [out_features].
        bias: [out_features] or None.

    Returns:
        [*, out_features], contiguous, in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    return _called("int8_weight_linear", x, qweight, scale, None, bias)


def int4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x @ wᵀ + bias with w in groups of 4-bit integers; see the module.

    Costs and gradients as of `int8_weight_linear`.

    Args:
        x: [*, in_features], any real floating dtype and leading shape.
        packed: [out_features, groups·size/2] uint8, of `pack`.
        scale: [out_features, groups].
        zero: [out_features, groups] or None.
        bias: [out_features] or None.

    Returns:
        As `int8_weight_linear`.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    return _called("int4_linear", x, packed, scale, zero, bias)


def int4_dynamic_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`int4_linear` of x in 8 bits, rounded at run time; see the module.

    The gradient of x is straight-through. NaN or inf in a row makes that row NaN.
    """
    return _called("int4_dynamic_linear", x, packed, scale, zero, bias)


def _called(
    op: str, x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None
) -> Tensor:
    """By the shortest way that the call allows; see `weight_bound`."""
    if torch.compiler.is_compiling():
        if weight_bound.stands_in_graph(x, weight, scale, zero, bias):
            return native_ops.weight_only(op, x, weight, scale, zero, bias)
    else:
        y = weight_bound.direct(op, _check, _pick, x, weight, scale, zero, bias)
        if y is not None:
            return y
    if op == "int8_weight_linear":
        found: Tensor = torch.ops.rewriter.int8_weight_linear.default(x, weight, scale, bias)
    elif op == "int4_linear":
        found = torch.ops.rewriter.int4_linear.default(x, weight, scale, zero, bias)
    else:
        found = torch.ops.rewriter.int4_dynamic_linear.default(x, weight, scale, zero, bias)
    return found


def int8_weight_reference(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same function as `int8_weight_linear`, written as the formula (float32 or wider)."""
    return _multiplied(x, dequantize_weight(qweight, scale.to(widened(x.dtype))), bias)


def int4_reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same function as `int4_linear`, written as the formula (float32 or wider)."""
    return _multiplied(x, dequantize_packed(packed, scale, zero, x.shape[-1]), bias)


def int4_dynamic_reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same function as `int4_dynamic_linear`, written as the formula (float32 or wider)."""
    rounded = _rounded(x.to(widened(x.dtype)), 2 * packed.shape[1] // max(scale.shape[1], 1))
    return int4_reference(rounded, packed, scale, zero, bias).to(x.dtype)


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = widened(x.dtype)
    bias = None if bias is None else bias.to(wide)
    return F.linear(x.to(wide), weight.to(wide), bias).to(x.dtype)


_TINY = 1e-30
"""Groups of activations below it count as zeros."""


def _rounded(x: Tensor, group_size: int) -> Tensor:
    """s·round(x/s) with s = max|x|/127 over each group of a row; NaN in a row where x is not
    finite."""
    if x.numel() == 0:
        return x
    width = x.shape[-1]
    groups = F.pad(x, (0, -width % group_size)).unflatten(-1, (-1, group_size))
    most = groups.abs().amax(-1, keepdim=True)
    some = most >= _TINY
    inverse = 127 / torch.where(some, most, torch.ones_like(most))
    levels = (groups * inverse).round()
    made = torch.where(some, levels * (most / 127), levels * 0)
    return made.flatten(-2)[..., :width]


def _with_straight_through(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reference, with derivatives: rounding of x counts as the identity."""

    def formula(
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        y = reference(x.detach(), packed, scale, zero, bias)
        return y + int4_reference(x - x.detach(), packed, scale, zero)

    return formula


# Choice of the kernel ----------------------------------------------------------------------------

_Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""x [*, k] float32, weight, scale, zero, bias → [*, n]; all contiguous."""

_PANEL = 1 << 22
"""Bytes of weights as floats at a time."""


def _dense(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None
) -> Tensor:
    out, width = weight.shape[0], x.shape[-1]
    size = max(_PANEL // (4 * width), 64)
    if size >= out:
        return F.linear(x, _floats(weight, scale, zero, width), bias)
    y = x.new_empty(*x.shape[:-1], out)
    for n in range(0, out, size):
        own = slice(n, n + size)
        panel = _floats(weight[own], scale[own], None if zero is None else zero[own], width)
        y[..., own] = F.linear(x, panel, None if bias is None else bias[own])
    return y


def _floats(weight: Tensor, scale: Tensor, zero: Tensor | None, width: int) -> Tensor:
    if weight_only_cpu.refusal() is None:
        return weight_only_cpu.dense(weight, scale, zero, width)
    if weight.dtype == torch.int8:
        return dequantize_weight(weight, scale)
    return dequantize_packed(weight, scale, zero, width)


def _dense_dynamic(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None
) -> Tensor:
    return _dense(_rounded(x, 2 * weight.shape[1] // scale.shape[1]), weight, scale, zero, bias)


_KERNELS: dict[str, dict[str, _Run]] = {
    "int8_weight_linear": {
        "native": weight_only_cpu.linear,
        "dense": _dense,
    },
    "int4_linear": {"native": weight_only_cpu.linear, "dense": _dense},
    "int4_dynamic_linear": {
        "native": functools.partial(weight_only_cpu.linear, dynamic=True),
        "dense": _dense_dynamic,
    },
}
_REFERENCES = {
    "int8_weight_linear": lambda x, w, scale, zero, bias: int8_weight_reference(x, w, scale, bias),
    "int4_linear": int4_reference,
    "int4_dynamic_linear": int4_dynamic_reference,
}


_KINDS = {
    "int8_weight_linear": "int8 weight",
    "int4_linear": "int4",
    "int4_dynamic_linear": "int4 dynamic",
}
"""Of a GPU's kernels."""


def _enter(op: str, kind: str) -> None:
    def formula(call: quantized_gpu.Call) -> Tensor:
        own = call.weight, call.scale, call.zero, call.bias
        return _REFERENCES[op](call.x.double(), *own)

    quantized_gpu.formulas[kind] = formula


for _op, _kind in _KINDS.items():
    _enter(_op, _kind)


def refused_kernels(op: str) -> dict[str, str | None]:
    """Why kernels of an op are not used on this machine, None where one is: {name: reason}."""
    own = {name: _refusal(op, name) for name in _KERNELS[op]}
    return own | quantized_gpu.refused_kernels(_KINDS[op])


@functools.cache
def _refusal(op: str, kernel: str) -> str | None:
    """Runs the kernel on all levels and on widths that do not divide, against the formula."""
    if kernel == "dense":
        return None
    if kernel == "native" and (reason := weight_only_cpu.refusal()) is not None:
        return f"not available: {reason}"
    with own_settings():
        for rows, n, k in ((1, 5, 32), (3, 16, 100), (17, 33, 128)):
            x = torch.linspace(-3, 5, rows * k).view(rows, k).cos_()
            _, *operands = _made(op, rows, n, k)
            want = _REFERENCES[op](x.double(), *operands)
            got = _KERNELS[op][kernel](x, *operands)
            if not (got - want).abs().max() <= 1e-4 * want.abs().max():
                return "computes something else on this CPU"
    return None


def _made(op: str, rows: int, out: int, width: int, group_size: int = 32) -> tuple[Any, ...]:
    """Arguments of a kernel, that hold every level; zeros and bias too."""
    levels = torch.arange(out * width).view(out, width)
    x, bias = torch.ones(rows, width), torch.linspace(-1, 1, out)
    if op == "int8_weight_linear":
        qweight = (levels % 256 - 128).to(torch.int8)
        return x, qweight, torch.linspace(0.5, 2, out), None, bias
    q = F.pad(levels % 16 - 8, (0, -width % group_size)).to(torch.int8)
    scale = torch.linspace(0.5, -2, out * q.shape[1] // group_size).view(out, -1)
    return x, pack(q), scale.to(torch.bfloat16), scale.flip(0).to(torch.bfloat16), bias


def _pick(op: str, rows: int, out: int, width: int, group_size: int) -> str:
    return _picked(op, rows_bucket(rows), out, width, group_size, torch.get_num_threads())


@functools.lru_cache(4096)
def _picked(op: str, rows: int, out: int, width: int, group_size: int, threads: int) -> str:
    names = [name for name in _KERNELS[op] if _refusal(op, name) is None]
    key = f"{op} {rows} {width} {out} {group_size} {names} {threads}"

    def candidates() -> dict[str, Callable[[], object]]:
        operands = _made(op, rows, out, width, group_size or _BLOCK)
        return {name: functools.partial(_KERNELS[op][name], *operands) for name in names}

    found = names[0] if len(names) == 1 else fastest(key, _VERSION, candidates)
    return found if found in names else "dense"  # of a file that others may write


def kernel_name(op: str, rows: int, out: int, width: int, group_size: int, like: Tensor) -> str:
    """The kernel that an op runs for such a call, for the report.

    Args:
        op: its name, e.g. "int4_linear".
        rows, out, width: sizes.
        group_size: 0 for a scale per row.
        like: a weight of its own, which says the device.
    """
    if like.device.type not in ("cpu", "meta"):
        return quantized_gpu.kernel_name(_KINDS[op], like.device, torch.float32)
    if like.device.type != "cpu" or not rows * out * width:
        return "torch"
    return _pick(op, rows, out, width, group_size)


# Forward -----------------------------------------------------------------------------------------


def _check(
    op: str, x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None
) -> None:
    grouped = op != "int8_weight_linear"
    dtype, name = (torch.uint8, "packed") if grouped else (torch.int8, "qweight")
    if weight.dtype != dtype or weight.ndim != 2:
        raise ValueError(
            f"{op}: {name} must be a 2-D {dtype} tensor, got {weight.dtype} {list(weight.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"{op}: x must be real floating point, got {x.dtype}")
    (out, stored), width = weight.shape, x.shape[-1] if x.ndim else -1
    sizes: tuple[int, ...] = (out,)
    fits = grouped or width == stored
    if grouped:
        groups = scale.shape[1] if scale.ndim == 2 else 0
        size = 2 * stored // groups if groups else 0
        fits = size * groups == 2 * stored and size % _BLOCK == 0
        fits = fits and ((groups - 1) * size < width <= groups * size if groups else width == 0)
        sizes = out, groups
    if not fits:
        raise ValueError(
            f"{op}: x of shape {list(x.shape)} does not fit {name} {list(weight.shape)} with "
            f"scales {list(scale.shape)}"
        )
    for other, t, want in (("scale", scale, sizes), ("zero", zero, sizes), ("bias", bias, (out,))):
        if t is not None and t.shape != want:
            raise ValueError(f"{op}: {other} must be {list(want)}, got {list(t.shape)}")


def _forward(
    op: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    _check(op, x, weight, scale, zero, bias)
    *rows, width = x.shape
    out, count, dtype = weight.shape[0], math.prod(rows), x.dtype
    if count * out * width == 0:
        y = x.new_zeros(*rows, out)
        return y if bias is None else y.add_(bias)
    if quantized_gpu.takes(x) and scale.dtype != torch.float64:
        call = quantized_gpu.Call(_KINDS[op], x.reshape(count, width), weight, scale, zero, bias)
        if (found := quantized_gpu.run(call)) is not None:
            return owned(found, (*rows, out))
    if x.device.type != "cpu" or torch.float64 in (dtype, scale.dtype):
        return owned(_REFERENCES[op](x, weight, scale, zero, bias).contiguous(), (*rows, out))
    grouped = scale.ndim == 2
    if scale.dtype != torch.float32 and not (grouped and scale.dtype == torch.bfloat16):
        scale = scale.to(torch.float32)
    group_size = 2 * weight.shape[1] // scale.shape[1] if grouped else 0
    run = _KERNELS[op][_pick(op, count, out, width, group_size)]
    y = run(
        _as(x, torch.float32),
        weight.contiguous(),
        scale.contiguous(),
        None if zero is None else _as(zero, scale.dtype),
        None if bias is None else _as(bias, torch.float32),
    )
    return y if dtype == torch.float32 else y.to(dtype)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, of this dtype."""
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


# Backward and registration -----------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, *zero, bias = inputs
    ctx.save_for_backward(weight, scale, *(z for z in zero if z is not None))
    ctx.width, ctx.count = x.shape[-1], len(inputs)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = g @ w; dbias = Σ_rows g. Rounding of x counts as the identity."""
    weight, scale, *zero = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        if weight.dtype == torch.int8:
            dense = dequantize_weight(weight, scale)
        else:
            dense = dequantize_packed(weight, scale, zero[0] if zero else None, ctx.width)
        dx = grad @ dense.to(grad.dtype)
    if ctx.needs_input_grad[-1]:
        dbias = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return (dx, *[None] * (ctx.count - 2), dbias)


def _int8_forward(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return _forward("int8_weight_linear", x, qweight, scale, None, bias)


def _int8_fake(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    _check("int8_weight_linear", x, qweight, scale, None, bias)
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _int4_fake(
    op: str,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    _check(op, x, packed, scale, zero, bias)
    return x.new_empty(*x.shape[:-1], packed.shape[0])


_FORMULAS: dict[str, tuple[Any, Any, Any]] = {
    "int8_weight_linear": (_int8_forward, _int8_fake, int8_weight_reference),
    "int4_linear": (
        functools.partial(_forward, "int4_linear"),
        functools.partial(_int4_fake, "int4_linear"),
        int4_reference,
    ),
    "int4_dynamic_linear": (
        functools.partial(_forward, "int4_dynamic_linear"),
        functools.partial(_int4_fake, "int4_dynamic_linear"),
        _with_straight_through(int4_dynamic_reference),
    ),
}
for _name, (_run, _fake, _formula) in _FORMULAS.items():
    _LIB.impl(_name, _run, "CompositeExplicitAutograd")
    register_autocast(_LIB, _name, casts=1)
    register_gradient(_LIB, _name, _formula, _setup_context, _backward, _run)
    register_vmap(_LIB, _name, _formula, casts=1)
    torch.library.register_fake(f"rewriter::{_name}", _fake, lib=_LIB)


# Records -----------------------------------------------------------------------------------------


def _record(op: str, reference: Callable[..., Any], dtype: str) -> ops.Record:
    def sample(rows: int, out: int, width: int) -> tuple[Any, ...]:
        x, weight, scale, zero, bias = _made(op, rows, out, width)
        return (x, weight, scale, bias) if weight.dtype == torch.int8 else (x, weight, scale)

    together = (native_ops.TOGETHER,) if op == "int8_weight_linear" else ()
    sides = (96, 1600)  # few: a calibration fills three such tables, and has seconds for all
    return ops.register(
        ops.Record(
            f"rewriter::{op}",
            kind=op,
            reference=reference,
            size_names=int8.RECORD.size_names,
            sizes=int8.RECORD.sizes,
            flops=int8.RECORD.flops,
            dtype=dtype,
            gemm=lambda *sizes: (1, *sizes),
            samples=ops.Samples(
                axes=((1, 16, 256), sides, sides),
                arguments=sample,
                place=lambda *sizes: sizes,
            ),
            kernels=lambda: refused_kernels(op),
            companions=(native_ops.WEIGHT_ONLY[op], *together),
        )
    )


RECORDS = (
    _record("int8_weight_linear", int8_weight_reference, ""),
    _record("int4_linear", int4_reference, ""),
    _record("int4_dynamic_linear", int4_dynamic_reference, "int8"),
)
