"""Int8 linear: int8 weights with a scale per output channel, activations quantized at run time.

    per token    lo_t = min_k x[t,k],  s_t = (max_k x[t,k] − lo_t + ε)/255
    per tensor   the same over all of x with 0 in the range, and lo a multiple of s
    q[t,k] = round((x[t,k] − lo_t)/s_t)                                  uint8
    y[t,n] = s_t·scale[n]·Σ_k q[t,k]·qweight[n,k] + lo_t·scale[n]·Σ_k qweight[n,k] + bias[n]

The sum over q·qweight is exact in int32. Affine activations use all 256 levels whatever the sign
of x, and a constant row (zeros, padding) is exact. ε = 1e-8 is fbgemm's.

Kernels on the CPU, chosen by measurement per shape and refused where a probe with extreme values
finds them wrong (u8·s8 instructions without VNNI saturate their int16 pair sums):

    native   of int8_cpu.cpp: quantizer, product of bytes and all that follows in one call
    onednn   fbgemm's row-wise quantizer, oneDNN's packed u8·s8 GEMM with the weight scale fused
    int_mm   the same quantizer, `torch._int_mm` on the weight as it lies: no packed copy
    torch    the same quantizer, products of whole numbers in float32, which are exact

All of them give the same bits, so that a result depends neither on the choice nor on the number of
threads. A GPU has kernels of its own (`quantized_gpu.py`), which multiply the same integers. Other
devices, and float64, run the formula in plain torch, in x's range.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", eq. 4 and 7, with dynamic ranges.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import int8_choice as choice
from rewriter.kernels import int8_product as product
from rewriter.kernels import native_ops, ops, quantized_gpu
from rewriter.kernels.common import (
    owned,
    register_autocast,
    register_gradient,
    register_vmap,
    widened,
)
from rewriter.kernels.int8_bound import Bound, bound_pair, native_linear
from rewriter.kernels.int8_choice import (
    FAST,
    PACKED,
    available_kernels,
    fastest_of,
    has_kernels,
    kernel_name,
    pick_kernel,
    refusal,
    refused_kernels,
    runs_kernels,
)
from rewriter.kernels.int8_product import (
    ACTIVATIONS,
    EPS,
    NOTHING,
    After,
    Quantized,
    dequantize_weight,
    int8_linear_reference,
    multiply,
    multiply_blocks,
    native,
    native_weight,
    packed_weight,
    quantize,
    quantize_torch,
    quantize_weight,
)

__all__ = [
    "ACTIVATIONS",
    "After",
    "Bound",
    "NOTHING",
    "PACKED",
    "Quantized",
    "available_kernels",
    "bound",
    "bound_pair",
    "check",
    "dequantize_weight",
    "fastest_of",
    "has_kernels",
    "int8_linear",
    "int8_linear_reference",
    "int8_linear_then",
    "kernel_name",
    "multiply",
    "multiply_blocks",
    "native",
    "native_linear",
    "native_weight",
    "onnx_product",
    "packed_weight",
    "pick_kernel",
    "quantize",
    "quantize_torch",
    "quantize_weight",
    "refused_kernels",
    "runs_kernels",
]

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "int8_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? bias=None, "
    "str activation='per_token') -> Tensor"
)
_LIB.define(
    "int8_linear_then(Tensor x, Tensor qweight, Tensor scale, Tensor? bias, str activation, "
    "str then, Tensor? add, Tensor? norm_weight, Tensor? norm_bias, float? eps) -> Tensor"
)


def int8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "per_token",
) -> Tensor:
    """y = (s·q(x) + lo) @ (qweight·scale[:, None])ᵀ + bias; see the module for q, s and lo.

    Costs 2·rows·in·out FLOPs. Accumulated in int32 and float32 (float64 for x in float64). The
    gradient of x is straight-through, g @ (qweight·scale[:, None]), in forward mode alike; bias
    has its gradient; qweight and scale have none. NaN or inf in a row makes that row NaN (per
    tensor: all of y).

    A packed copy of the weight is kept for as long as `qweight` lives, and made anew when
    `qweight` was written in place or its data replaced. Writes through `qweight.data` or NumPy
    are not counted by torch and cannot be noticed.

    Args:
        x: [*, in_features], any real floating dtype and leading shape.
        qweight: [out_features, in_features] int8.
        scale: [out_features].
        bias: [out_features] or None.
        activation: "per_token" or "per_tensor".

    Returns:
        [*, out_features], contiguous, in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    y: Tensor = torch.ops.rewriter.int8_linear.default(x, qweight, scale, bias, activation)
    return y


def int8_linear_then(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    then: str = "",
    add: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """layer_norm(then(int8_linear(x, …)) + add), for inference: it has no gradient.

    Where the kernel "native" is the fastest, all of it happens while a row is in the cache.

    Args:
        x, qweight, scale, bias, activation: as of `int8_linear`.
        then: "relu", "gelu" (exact), "silu", or "" for none.
        add: what is added, of a shape that spreads with the result's; None for nothing.
        norm_weight, norm_bias: [out_features] or None, of the LayerNorm.
        eps: its ε; None where there is no LayerNorm.
    """
    y: Tensor = torch.ops.rewriter.int8_linear_then.default(
        x, qweight, scale, bias, activation, then, add, norm_weight, norm_bias, eps
    )
    return y


def _formula(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "per_token",
) -> Tensor:
    """The reference, with derivatives: rounding counts as the identity."""
    y = int8_linear_reference(x.detach(), qweight, scale.detach(), bias, activation)
    weight = dequantize_weight(qweight, scale.detach()).to(x.dtype)
    return y + (x - x.detach()) @ weight.t()


# Forward -----------------------------------------------------------------------------------------


def bound(
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    then: str = "",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
) -> Bound:
    """`int8_linear_then` of these operands as a function of x and what is added, for plain tensors
    and without gradient: of few rows it takes half the time, as all that does not change from call
    to call is made ready here. It reads them where they are now."""

    def run(x: Tensor, add: Tensor | None = None) -> Tensor:
        options = then, add, norm_weight, norm_bias, eps
        return int8_linear_then(x, qweight, scale, bias, activation, *options)

    after = After.of(then, None, norm_weight, norm_bias, eps)
    kernel = native_linear(qweight, scale, bias, after, activation)
    return Bound.of(
        qweight, run, kernel, lambda rows, k, n: choice.pick_kernel(rows, k, n, activation)
    )


def _check(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"int8_linear: activation must be one of {ACTIVATIONS}: {activation!r}")
    check("int8_linear", x, qweight, scale, bias)


def check(
    op: str,
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.int8,
) -> None:
    """What the operands of every op of weights in 8 bits have to be.

    Args:
        op: whose they are.
        dtype: of the weights, as they are stored.

    Raises:
        ValueError: shapes or dtypes do not fit; names the op.
    """
    if qweight.dtype != dtype or qweight.ndim != 2:
        wanted = f"a 2-D {str(dtype).removeprefix('torch.')} tensor"
        raise ValueError(
            f"{op}: qweight must be {wanted}, got {qweight.dtype} {list(qweight.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"{op}: x must be real floating point, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != qweight.shape[1]:
        raise ValueError(
            f"{op}: x of shape {list(x.shape)} does not fit qweight {list(qweight.shape)}: "
            f"its last dimension must be {qweight.shape[1]}"
        )
    for name, t in (("scale", scale), ("bias", bias)):
        if t is not None and (t.ndim != 1 or t.shape[0] != qweight.shape[0]):
            raise ValueError(f"{op}: {name} must be [{qweight.shape[0]}], got {list(t.shape)}")


def _forward(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "per_token",
    *then: Any,
) -> Tensor:
    _check(x, qweight, scale, bias, activation)
    after = After.of(*then)
    n, k = qweight.shape
    shape, dtype = (*x.shape[:-1], n), x.dtype
    rows = math.prod(shape[:-1])
    if rows * n * k == 0:
        y = x.new_zeros(shape)
        return after(y if bias is None else y.add_(bias))
    if quantized_gpu.takes(x):
        found = on_gpu(x, qweight, scale, bias, activation, after)
        if found is not None:
            return found
    wide = widened(dtype)
    x = x.reshape(rows, k).to(wide).contiguous()
    scale, bias = scale.to(wide), None if bias is None else bias.to(wide)
    if not has_kernels(x):
        y, within = product.plain(x, qweight, scale, bias, activation), False
    else:
        kernel, within = choice.pick_kernel(rows, k, n, activation), after.fits(shape, dtype)
        inside = after.of_rows(rows) if within else NOTHING
        y = product.run(kernel, x, qweight, scale, bias, activation, inside)
    y = owned(y.to(dtype), shape)
    return y if within else after(y)


def on_gpu(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    after: After,
    **fixed: Tensor | None,
) -> Tensor | None:
    """The product and all that follows it by a GPU's kernels; None where none computes it.

    Args:
        fixed: step, point, multiplier of `quantized_gpu.Call`, where the range is fixed.
    """
    shape, add = (*x.shape[:-1], qweight.shape[0]), after.add
    same = add is None or (add.shape == shape and add.dtype == x.dtype)
    inside, rest = (after, After(norm=after.norm)) if same else (NOTHING, after)
    y = quantized_gpu.run(
        quantized_gpu.Call(
            "int8", x.reshape(-1, x.shape[-1]), qweight, scale, bias=bias, activation=activation,
            sums=packed_weight(qweight).row_sums, then=inside.then,
            add=None if inside.add is None else inside.add.reshape(-1, shape[-1]), **fixed,
        )
    )  # fmt: skip
    return None if y is None else rest(owned(y, shape))


quantized_gpu.formulas["int8"] = lambda call: int8_linear_reference(
    call.x.double(), call.weight, call.scale, call.bias, call.activation
)


def _fake(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "per_token",
    then: str = "",
    add: Tensor | None = None,
    *norm: Any,
) -> Tensor:
    _check(x, qweight, scale, bias, activation)
    y = x.new_empty(*x.shape[:-1], qweight.shape[0])
    return y if add is None else torch.empty_like(y + add)


# Backward and registration -----------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, scale, bias, _ = inputs
    ctx.save_for_backward(qweight, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    """dx = g @ (qweight·scale[:, None]); dbias = Σ_rows g. Rounding counts as the identity."""
    qweight, scale = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = (grad * scale.to(grad.dtype)) @ qweight.to(grad.dtype)
    if ctx.needs_input_grad[3]:
        dbias = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return dx, None, None, dbias, None


_LIB.impl("int8_linear", _forward, "CompositeExplicitAutograd")
register_autocast(_LIB, "int8_linear", casts=1)
register_gradient(_LIB, "int8_linear", _formula, _setup_context, _backward)
register_vmap(_LIB, "int8_linear", _formula, casts=1)
torch.library.register_fake("rewriter::int8_linear", _fake, lib=_LIB)
_LIB.impl("int8_linear_then", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("rewriter::int8_linear_then", _fake, lib=_LIB)


# ONNX --------------------------------------------------------------------------------------------


def onnx_product(x: Tensor, qweight: Tensor, scale: Tensor, activation: str) -> Tensor:
    """q(x) @ (qweight·scale[…, None])ᵀ by ONNX's MatMulInteger, for `torch.onnx.export`.

    Args:
        x: [*, rows, k] float32.
        qweight: [*, n, k] int8.
        scale: [*, n] float32, that spreads over the result.
        activation: as of `int8_linear`; "per_tensor" is ONNX's DynamicQuantizeLinear.

    Returns:
        [*, rows, n] float32.
    """
    from torch.onnx.ops import symbolic, symbolic_multi_out

    weight, shape = qweight.mT, (*x.shape[:-1], qweight.shape[-2])
    if activation == "per_tensor":
        q, s, zero = symbolic_multi_out(
            "::DynamicQuantizeLinear", (x,), shapes=(x.shape, (), ()),
            dtypes=(torch.uint8, torch.float32, torch.uint8),
        )  # fmt: skip
        y = symbolic("::MatMulInteger", (q, weight, zero), dtype=torch.int32, shape=shape)
        return y.to(torch.float32) * (s * scale)
    lo = x.amin(-1, keepdim=True)
    s = (x.amax(-1, keepdim=True) - lo + EPS) / 255
    q = ((x - lo) / s).round().clamp(0, 255).to(torch.uint8)
    # ONNX Runtime takes one zero point for all rows: lo comes in by the sums of the weights
    y = symbolic("::MatMulInteger", (q, weight), dtype=torch.int32, shape=shape)
    sums = qweight.to(torch.float32).sum(-1).view(scale.shape)
    return y.to(torch.float32) * s * scale + lo * (sums * scale)


def _onnx(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "per_token",
) -> Tensor:
    y = onnx_product(x.to(torch.float32), qweight, scale.to(torch.float32), activation)
    return (y if bias is None else y + bias).to(x.dtype)


# Record ------------------------------------------------------------------------------------------


def _sizes(x: Tensor, qweight: Tensor, *rest: Any, **options: Any) -> tuple[Any, ...]:
    return math.prod(x.shape[:-1]), qweight.shape[0], x.shape[-1]


def _flops(x: torch.Size, qweight: torch.Size, *args: Any, **kwargs: Any) -> int:
    """2·rows·in·out integer operations, from shapes."""
    return 2 * math.prod(x) * qweight[0]


def _sample(rows: int, out: int, width: int) -> tuple[Tensor, ...]:
    qweight = torch.ones(out, width, dtype=torch.int8)
    return torch.rand(rows, width), qweight, torch.ones(out), torch.rand(out)


_SIDES = (64, 192, 800, 3200)

RECORD = ops.register(
    ops.Record(
        "rewriter::int8_linear",
        kind="int8_linear",
        reference=int8_linear_reference,
        onnx=_onnx,
        size_names=("rows", "out", "in"),
        sizes=_sizes,
        flops=_flops,
        dtype="int8",
        gemm=lambda *sizes: (1, *sizes),
        samples=ops.Samples(
            axes=((1, 16, 160, 800, 3200), _SIDES, _SIDES),
            arguments=_sample,
            place=lambda *sizes: sizes,
        ),
        kernels=lambda: {
            **{k: refusal(k) for k in FAST},
            "torch": None,
            **quantized_gpu.refused_kernels("int8"),
        },
        companions=(ops.Companion("rewriter::int8_linear_then"), *native_ops.INT8),
        module=__name__,
    )
)
