"""Linear layers with weights in float8 (e4m3), and activations in float8 where asked.

    w ≈ scale[:, None]·e4m3(w/scale[:, None]),  scale[n] = max_k |w[n,k]|/448
    "none"        y = x @ wᵀ + bias
    "per_token"   y[t,n] = s_t·scale[n]·Σ_k q[t,k]·qweight[n,k] + bias[n],
                  s_t = max_k |x[t,k]|/448,  q[t,k] = e4m3(x[t,k]/s_t)
    "per_tensor"  the same with one s

Weights are held by their bits, as uint8: what moves, sums up or casts floating point tensors
leaves them alone. A GPU of compute capability 8.9 or more multiplies float8 by float8
(`quantized_gpu.py`). Elsewhere the numbers that float8 would have are multiplied in float32, which
costs more than a dense layer: `refusal` says so.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", table 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import int8_linear as int8
from rewriter.kernels import ops, quantized_gpu
from rewriter.kernels.common import (
    owned,
    register_autocast,
    register_gradient,
    register_vmap,
    widened,
)

__all__ = [
    "ACTIVATIONS",
    "dequantize_float8",
    "float8_linear",
    "float8_linear_reference",
    "kernel_name",
    "quantize_float8",
    "refusal",
]

ACTIVATIONS = ("none", "per_token", "per_tensor")
_MOST = 448.0
_E4M3 = torch.float8_e4m3fn

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "float8_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? bias=None, "
    "str activation='none') -> Tensor"
)


def float8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """y = x @ (qweight·scale[:, None])ᵀ + bias, with x in float8, too, unless `activation` is none.

    Costs 2·rows·in·out FLOPs. The gradient of x is that of the product with the dequantized weight
    (straight-through where x is rounded); bias has its gradient; qweight and scale have none.

    Args:
        x: [*, in_features], any real floating dtype.
        qweight: [out_features, in_features] uint8, the bits of float8_e4m3fn.
        scale: [out_features].
        bias: [out_features] or None.
        activation: one of `ACTIVATIONS`.

    Returns:
        [*, out_features], contiguous, in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    y: Tensor = torch.ops.rewriter.float8_linear.default(x, qweight, scale, bias, activation)
    return y


def quantize_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """scale[…,n] = max_k |w[…,n,k]|/448, q = e4m3(w/scale) by its bits.

    Returns:
        q uint8 of weight's shape, and scale [*, out_features], float32 or wider. A row of zeros has
        scale 1.
    """
    wide = widened(weight.dtype)
    if weight.is_meta:
        q = torch.empty_like(weight, dtype=torch.uint8, memory_format=torch.contiguous_format)
        return q.detach(), weight.new_empty(weight.shape[:-1], dtype=wide)
    weight = weight.detach().to(wide)
    if weight.shape[-1] == 0:
        return weight.to(torch.uint8), weight.new_ones(weight.shape[:-1])
    scale = weight.abs().amax(-1) / _MOST
    # amax/448 may round to zero for subnormal rows, which then count as zeros
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return _round(weight / scale.unsqueeze(-1)).view(torch.uint8), scale


def dequantize_float8(qweight: Tensor, scale: Tensor) -> Tensor:
    """w[…,n,k] = e4m3(qweight[…,n,k])·scale[…,n], in scale's dtype."""
    return _numbers(qweight, scale.dtype) * scale.unsqueeze(-1)


def _round(x: Tensor) -> Tensor:
    return x.clamp(-_MOST, _MOST).to(_E4M3).contiguous()


def _numbers(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """What the bits of float8 stand for. On a CPU, whose cast goes number by number: they are those
    of a bfloat16 with the exponent 120 too low, exactly, subnormals too."""
    if bits.device.type != "cpu":
        return bits.view(_E4M3).to(dtype)
    wide = bits.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(_BITS)
    return wide.view(torch.bfloat16).to(dtype) * 2.0**120


_BITS = -0x7810
"""0x87F0: the sign, and the 4 + 3 bits behind the upper half of the exponent."""


def float8_linear_reference(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The same function as `float8_linear`, written as the formula (float64 inside)."""
    wide, weight = x.to(torch.float64), qweight.view(_E4M3).to(torch.float64)
    if activation != "none" and x.numel():
        s = _step(wide, activation)
        wide = _round(wide / s).to(torch.float64) * s
    y = wide @ (weight * scale.to(torch.float64).unsqueeze(-1)).t()
    return (y if bias is None else y + bias).to(x.dtype)


def _step(x: Tensor, activation: str) -> Tensor:
    most = x.abs().amax(-1, keepdim=True) if activation == "per_token" else x.abs().amax()
    s = most / _MOST
    return torch.where(s == 0, torch.ones_like(s), s)


def _formula(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The reference, with derivatives: rounding counts as the identity."""
    y = float8_linear_reference(x.detach(), qweight, scale.detach(), bias, activation)
    weight = dequantize_float8(qweight, scale.detach()).to(x.dtype)
    return y + (x - x.detach()) @ weight.t()


def _table(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """For ONNX, which views no bits as another type: the weight by arithmetic; x as it is rounded
    by its own powers of two."""
    weight = _by_arithmetic(qweight) * scale.to(torch.float32).unsqueeze(-1)
    wide = x.to(torch.float32)
    if activation != "none":
        s = _step(wide, activation)
        whole = wide / s
        unit = whole.abs().clamp(min=2.0**-6).log2().floor().exp2() / 8
        wide = (whole / unit).round() * unit * s
    y = wide @ weight.t()
    return (y if bias is None else y + bias).to(x.dtype)


def _by_arithmetic(bits: Tensor) -> Tensor:
    """The numbers of e4m3, in float32: a weight holds no NaN."""
    whole = bits.to(torch.float32)
    size = torch.where(whole > 127, whole - 128, whole)
    exponent = (size / 8).floor()
    mantissa = size / 8 - exponent
    value = (1 + mantissa) * (exponent - 7).exp2()
    value = torch.where(exponent == 0, mantissa * 2.0**-6, value)
    return torch.where(whole > 127, -value, value)


def refusal(device: torch.device) -> str | None:
    """Why nothing multiplies float8 by float8 on a device; None where something does."""
    if device.type == "cpu":
        return "simulated, slower: torch multiplies no float8 on cpu"
    return quantized_gpu.simulated("float8", device)


def kernel_name(activation: str, device: torch.device) -> str:
    """The kernel that `float8_linear` runs for such a call, for the report."""
    if device.type == "meta":
        return "torch"
    if device.type != "cpu":
        return quantized_gpu.kernel_name(_kind(activation), device, torch.float32)
    return "torch, dequantized" if activation == "none" else f"torch, {refusal(device)}"


def _kind(activation: str) -> str:
    """Of a GPU's kernels."""
    return "float8 weight" if activation == "none" else "float8"


for _activation in ("none", "per_token"):
    quantized_gpu.formulas[_kind(_activation)] = lambda call: float8_linear_reference(
        call.x.double(), call.weight, call.scale, call.bias, call.activation or "none"
    )


def _check(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"float8_linear: activation must be one of {ACTIVATIONS}: {activation!r}")
    int8.check("float8_linear", x, qweight, scale, bias, torch.uint8)


def _forward(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    _check(x, qweight, scale, bias, activation)
    shape, dtype = (*x.shape[:-1], qweight.shape[0]), x.dtype
    x, wide = x.reshape(math.prod(shape[:-1]), qweight.shape[1]), widened(dtype)
    if quantized_gpu.takes(x) and x.numel() and len(qweight):
        rounds = activation if activation != "none" else ""
        given = x, qweight, scale, None, bias, rounds
        found = quantized_gpu.run(quantized_gpu.Call(_kind(activation), *given))
        if found is not None:
            return owned(found, shape)
    x, scale = x.to(wide), scale.to(wide)
    bias = None if bias is None else bias.to(wide)
    if activation == "none" or x.numel() == 0:
        y = F.linear(x, dequantize_float8(qweight, scale), bias)
        return owned(y.to(dtype), shape)
    s = _step(x, activation)
    q = _round(x / s)
    y = _numbers(q.view(torch.uint8), wide) @ _numbers(qweight, wide).t()
    s = torch.where(s.isfinite(), s, math.nan)  # a row that is not finite is NaN
    y = y * (s * scale)
    return owned((y if bias is None else y.add_(bias)).to(dtype), shape)


def _fake(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    _check(x, qweight, scale, bias, activation)
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, scale, bias, _ = inputs
    ctx.save_for_backward(qweight, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = g @ (qweight·scale[:, None]); dbias = Σ_rows g. Rounding counts as the identity."""
    qweight, scale = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = grad @ dequantize_float8(qweight, scale).to(grad.dtype)
    if ctx.needs_input_grad[3]:
        dbias = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return dx, None, None, dbias, None


_LIB.impl("float8_linear", _forward, "CompositeExplicitAutograd")
register_autocast(_LIB, "float8_linear", casts=1)
register_gradient(_LIB, "float8_linear", _formula, _setup_context, _backward)
register_vmap(_LIB, "float8_linear", _formula, casts=1)
torch.library.register_fake("rewriter::float8_linear", _fake, lib=_LIB)


RECORD = ops.register(
    ops.Record(
        "rewriter::float8_linear",
        kind="matmul",
        reference=float8_linear_reference,
        onnx=_table,
        size_names=int8.RECORD.size_names,
        sizes=int8.RECORD.sizes,
        flops=int8.RECORD.flops,
        kernels=lambda: {"torch": None, **quantized_gpu.refused_kernels("float8")},
    )
)
