"""Int8 linear with one range of the activations that is fixed beforehand, by calibration.

    q[t,k] = clamp(⌊x[t,k]·multiplier[k]/step + zero + ½⌋, 0, 255)                       uint8
    y[t,n] = step·scale[n]·Σ_k (q[t,k] − zero)·qweight[n,k] + bias[n]

so that W[n,k] = scale[n]·qweight[n,k]·multiplier[k]. No pass over x looks for a range; what lies
outside is clipped. The multiplier, where there is one, takes difficulty from the activations to the
weights (SmoothQuant) without touching the layer before. The sum is exact in int32, and the kernels
are those of `int8_linear` behind another quantizer: all of them give the same bits, on any number
of threads. Other devices, and float64, run the formula in plain torch, in x's range.

Sources: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", eq. 4 and 7; Xiao et al. 2023, "SmoothQuant", eq. 3.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import int8_cpu, ops, quantized_gpu
from rewriter.kernels import int8_linear as int8
from rewriter.kernels.common import (
    owned,
    register_autocast,
    register_gradient,
    register_vmap,
    widened,
)

__all__ = [
    "bound",
    "int8_static_linear",
    "int8_static_linear_then",
    "int8_static_linear_reference",
    "kernel_name",
    "pick_kernel",
]

_VERSION = "int8-static-1"
"""Of the kernels: choices that another version of them measured do not count."""

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "int8_static_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? bias, Tensor step, "
    "Tensor zero, Tensor? multiplier=None) -> Tensor"
)
_LIB.define(
    "int8_static_linear_then(Tensor x, Tensor qweight, Tensor scale, Tensor? bias, Tensor step, "
    "Tensor zero, Tensor? multiplier, str then, Tensor? add, Tensor? norm_weight, "
    "Tensor? norm_bias, float? eps) -> Tensor"
)


def int8_static_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None = None,
) -> Tensor:
    """y = (q(x) − zero)·step @ (qweight·scale[:, None])ᵀ + bias; see the module for q.

    Costs 2·rows·in·out FLOPs. Accumulated in int32 and float32 (float64 for x in float64). The
    gradient of x is straight-through, g @ W, and zero where x is clipped, as that of torch's own
    fake quantization is; bias has its gradient, the others have none. NaN or inf in a row makes
    that row NaN.

    Args:
        x: [*, in_features], any real floating dtype and leading shape.
        qweight: [out_features, in_features] int8.
        scale: [out_features].
        bias: [out_features] or None.
        step: [1], above 0: by how much x·multiplier differs between two levels.
        zero: [1] uint8: the level that stands for 0.
        multiplier: [in_features] or None.

    Returns:
        [*, out_features], contiguous, in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: shapes or dtypes do not fit, or the step is not above 0.
    """
    y: Tensor = torch.ops.rewriter.int8_static_linear.default(
        x, qweight, scale, bias, step, zero, multiplier
    )
    return y


def int8_static_linear_then(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None,
    then: str = "",
    add: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """layer_norm(then(int8_static_linear(x, …)) + add), for inference: it has no gradient.

    Args:
        x, qweight, scale, bias, step, zero, multiplier: as of `int8_static_linear`.
        then, add, norm_weight, norm_bias, eps: as of `int8_linear.int8_linear_then`.
    """
    y: Tensor = torch.ops.rewriter.int8_static_linear_then.default(
        x, qweight, scale, bias, step, zero, multiplier, then, add, norm_weight, norm_bias, eps
    )
    return y


def bound(
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None,
    then: str = "",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
) -> int8.Bound:
    """`int8_static_linear_then` of these operands, as `int8_linear.bound` says it."""
    own = qweight, scale, bias, step, zero, multiplier

    def run(x: Tensor, add: Tensor | None = None) -> Tensor:
        return int8_static_linear_then(x, *own, then, add, norm_weight, norm_bias, eps)

    after = int8.After.of(then, None, norm_weight, norm_bias, eps)
    times = None if multiplier is None else multiplier.to(torch.float32).contiguous()
    given = float(step), int(zero)
    kernel = None
    if given[0] > 0:  # what else it is, `run` says
        kernel = int8.native_linear(qweight, scale, bias, after, given=given, multiplier=times)
    return int8.Bound.of(qweight, run, kernel, lambda *sizes: pick_kernel(*sizes))


def int8_static_linear_reference(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None = None,
) -> Tensor:
    """The same function as `int8_static_linear`, written as the formula (float64 inside)."""
    wide = x.to(torch.float64)
    return _plain(wide, qweight, scale, bias, step, zero, multiplier).to(x.dtype)


def _levels(x: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """x/step + zero + ½ in x's dtype: before what is behind the point goes, and before clipping."""
    return x * (1 / step.to(x.dtype)) + (zero.to(x.dtype) + 0.5)


def _plain(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None,
) -> Tensor:
    """x [*, k] → [*, n], computed in x's dtype, on any device."""
    x = x if multiplier is None else x * multiplier.to(x.dtype)
    q = _levels(x, step, zero).floor().clamp(0, 255) + x * 0  # NaN where x is not finite
    exact = (q - zero.to(x.dtype)) @ qweight.to(x.dtype).t()
    y = exact * (step.to(x.dtype) * scale.to(x.dtype))
    return y if bias is None else y + bias.to(x.dtype)


def _inside(x: Tensor, step: Tensor, zero: Tensor, multiplier: Tensor | None) -> Tensor:
    """[*, k] bool: which of x are not clipped."""
    x = x.to(widened(x.dtype))
    x = x if multiplier is None else x * multiplier.to(x.dtype)
    levels = _levels(x, step, zero)
    return (levels >= 0) & (levels < 256)


def _dense(dtype: torch.dtype, qweight: Tensor, scale: Tensor, multiplier: Tensor | None) -> Tensor:
    weight = qweight.to(dtype) * scale.to(dtype).unsqueeze(-1)
    return weight if multiplier is None else weight * multiplier.to(dtype)


def _formula(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None = None,
) -> Tensor:
    """The reference, with derivatives: rounding counts as the identity where nothing is clipped."""
    own, step, zero = scale.detach(), step.detach(), zero.detach()
    times = None if multiplier is None else multiplier.detach()
    y = int8_static_linear_reference(x.detach(), qweight, own, bias, step, zero, times)
    moved = (x - x.detach()) * _inside(x.detach(), step, zero, times)
    return y + moved @ _dense(x.dtype, qweight, own, times).t()


# Choice of the kernel ----------------------------------------------------------------------------


def pick_kernel(tokens: int, in_features: int, out_features: int) -> str:
    """The fastest available CPU kernel for a shape, as `int8_linear.pick_kernel` finds it."""
    run = functools.partial(_run, step=2 / 255, zero=128, multiplier=None)
    sizes = tokens, in_features, out_features
    return int8.fastest_of("int8_static_linear", _VERSION, run, *sizes)


def kernel_name(
    tokens: int,
    in_features: int,
    out_features: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> str:
    """The kernel that `int8_static_linear` runs for such a call, for the report."""
    sizes, on = (tokens, in_features, out_features), torch.device(device)
    if on.type not in ("cpu", "meta"):
        return quantized_gpu.kernel_name("int8", on, dtype, in_features)
    return pick_kernel(*sizes) if int8.runs_kernels(*sizes, device, dtype) else "torch"


# Forward -----------------------------------------------------------------------------------------


def _quantize(
    x: Tensor, step: float, zero: int, multiplier: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x [rows, k] float32 contiguous, on a CPU, not empty → q [rows, k] uint8, and which rows hold
    something that is not finite, whose levels mean nothing."""
    x = x if multiplier is None else x * multiplier
    # a row, with which the addition vectorizes
    half = torch.full((x.shape[1],), zero + 0.5, dtype=x.dtype)
    q = torch.add(half, x, alpha=1 / step).clamp_(0, 255.5).to(torch.uint8)
    return q, ~x.abs().amax(-1).isfinite()


def _run(
    kernel: str,
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: float,
    zero: int,
    multiplier: Tensor | None,
    after: int8.After = int8.NOTHING,
) -> Tensor:
    """x [rows, k] float32 contiguous, on a CPU, rows·k·n > 0 → [rows, n] float32."""
    packed = int8.packed_weight(qweight)
    if kernel == "native":
        own, sums = int8.native_weight(packed, 0, qweight), packed.row_sums
        given = bias.contiguous() if bias is not None else None
        times = multiplier.contiguous() if multiplier is not None else None
        run = int8_cpu.Linear(
            own, x.shape[1], scale.contiguous(), sums, given, after.then, after.norm,
            given=(step, zero), multiplier=times,
        )  # fmt: skip
        return run(x, after.add)[0]
    q, spoiled = _quantize(x, step, zero, multiplier)
    y = int8.multiply(kernel, (q, step, zero), qweight, packed, None, scale, bias)
    return after(y.masked_fill_(spoiled[:, None], math.nan))


def _check(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None = None,
) -> None:
    int8.check("int8_static_linear", x, qweight, scale, bias)
    for name, t in (("step", step), ("zero", zero)):
        if t.shape != (1,):
            raise ValueError(f"int8_static_linear: {name} must be [1], got {list(t.shape)}")
    if zero.dtype != torch.uint8:
        raise ValueError(f"int8_static_linear: zero must be uint8, got {zero.dtype}")
    if multiplier is not None and multiplier.shape != qweight.shape[1:]:
        raise ValueError(
            f"int8_static_linear: multiplier must be [{qweight.shape[1]}], got "
            f"{list(multiplier.shape)}"
        )


def _forward(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None = None,
    *then: Any,
) -> Tensor:
    _check(x, qweight, scale, bias, step, zero, multiplier)
    (n, k), dtype, after = qweight.shape, x.dtype, int8.After.of(*then)
    shape, wide = (*x.shape[:-1], n), widened(dtype)
    rows = math.prod(shape[:-1])
    if rows * n * k and quantized_gpu.takes(x):
        fixed = {"step": step, "point": zero, "multiplier": multiplier}
        y = int8.on_gpu(x, qweight, scale, bias, "", after, **fixed)
        if y is not None:
            return y
    x = x.reshape(rows, k).to(wide).contiguous()
    scale, bias = scale.to(wide), None if bias is None else bias.to(wide)
    times = None if multiplier is None else multiplier.to(wide)
    within = bool(rows * n * k) and int8.has_kernels(x) and after.fits(shape, dtype)
    if rows * n * k and int8.has_kernels(x):
        known = float(step), int(zero)
        if not known[0] > 0:
            raise ValueError(f"int8_static_linear: step must be above 0, got {known[0]}")
        inside = after.of_rows(rows) if within else int8.NOTHING
        y = _run(pick_kernel(rows, k, n), x, qweight, scale, bias, *known, times, inside)
    else:
        y = _plain(x, qweight, scale, bias, step, zero, times)
    y = owned(y.to(dtype), shape)
    return y if within else after(y)


def _fake(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None = None,
    then: str = "",
    add: Tensor | None = None,
    *norm: Any,
) -> Tensor:
    _check(x, qweight, scale, bias, step, zero, multiplier)
    y = x.new_empty(*x.shape[:-1], qweight.shape[0])
    return y if add is None else torch.empty_like(y + add)


# Backward and registration -----------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, bias, step, zero, multiplier = inputs
    inside = _inside(x, step, zero, multiplier) if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(inside, qweight, scale, multiplier)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = (g @ W)·[x is not clipped]; dbias = Σ_rows g. Rounding counts as the identity.

    Source: `torch.fake_quantize_per_tensor_affine`, whose gradient is this.
    """
    inside, qweight, scale, multiplier = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = ((grad * scale.to(grad.dtype)) @ qweight.to(grad.dtype)) * inside
        dx = dx if multiplier is None else dx * multiplier.to(grad.dtype)
    if ctx.needs_input_grad[3]:
        dbias = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return dx, None, None, dbias, None, None, None


_LIB.impl("int8_static_linear", _forward, "CompositeExplicitAutograd")
register_autocast(_LIB, "int8_static_linear", casts=1)
register_gradient(_LIB, "int8_static_linear", _formula, _setup_context, _backward)
register_vmap(_LIB, "int8_static_linear", _formula, casts=1)
torch.library.register_fake("rewriter::int8_static_linear", _fake, lib=_LIB)
_LIB.impl("int8_static_linear_then", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("rewriter::int8_static_linear_then", _fake, lib=_LIB)


# ONNX and record ---------------------------------------------------------------------------------


def _onnx(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None = None,
) -> Tensor:
    """ONNX's QuantizeLinear and MatMulInteger; halves are rounded to even there."""
    from torch.onnx.ops import symbolic

    wide = x.to(torch.float32)
    wide = wide if multiplier is None else wide * multiplier.to(torch.float32)
    s, point = step.to(torch.float32).reshape(()), zero.reshape(())
    q = symbolic("::QuantizeLinear", (wide, s, point), dtype=torch.uint8, shape=x.shape)
    shape = (*x.shape[:-1], qweight.shape[0])
    y = symbolic("::MatMulInteger", (q, qweight.mT, point), dtype=torch.int32, shape=shape)
    y = y.to(torch.float32) * (s * scale.to(torch.float32))
    return (y if bias is None else y + bias).to(x.dtype)


def _parts(run: ops.Run) -> list[ops.Part]:
    """As `int8_linear`, whose pass over x for a range is a small share of it."""
    (rows, out, width), own = run.sizes, int8.RECORD
    size = ops.element_size(run.dtype)
    figures = 2 * rows * out * width, rows * width * size, rows * out * size, run.weight_bytes
    return [ops.Part(own.name, own.kind, own.dtype, *figures, run.sizes)]


def _sample(rows: int, width: int) -> tuple[Any, ...]:
    qweight, one = torch.ones(width, width, dtype=torch.int8), torch.ones(width)
    x, step = torch.rand(rows, width), torch.full((1,), 1 / 255)
    return x, qweight, one, one, step, torch.zeros(1, dtype=torch.uint8)


ops.register(
    ops.Record(
        "rewriter::int8_static_linear",
        kind="int8_static",
        reference=int8_static_linear_reference,
        onnx=_onnx,
        size_names=int8.RECORD.size_names,
        sizes=int8.RECORD.sizes,
        flops=int8.RECORD.flops,
        dtype="int8",
        parts=_parts,
        samples=ops.Samples(
            axes=((16, 800), (192, 800)),
            arguments=_sample,
            place=lambda rows, out, width: (rows, math.sqrt(out * width)),
        ),
        kernels=int8.RECORD.kernels,
        companions=(ops.Companion("rewriter::int8_static_linear_then"),),
    )
)
