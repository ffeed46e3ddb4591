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
threads. Other devices, and float64, run the formula in plain torch, in x's range.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", eq. 4 and 7, with dynamic ranges.
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

from rewriter.kernels import int8_cpu, native_ops, ops
from rewriter.kernels.choice import fastest, rows_bucket
from rewriter.kernels.common import (
    owned,
    register_autocast,
    register_gradient,
    register_vmap,
    widened,
)
from rewriter.kernels.linear_act import act_

__all__ = [
    "ACTIVATIONS",
    "After",
    "Bound",
    "NOTHING",
    "Quantized",
    "available_kernels",
    "bound",
    "bound_pair",
    "dequantize_weight",
    "fastest_of",
    "int8_linear",
    "int8_linear_reference",
    "int8_linear_then",
    "kernel_name",
    "PACKED",
    "check",
    "has_kernels",
    "multiply",
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

ACTIVATIONS = ("per_token", "per_tensor")
_EPS = 1e-8
_FAST = ("native", "onednn", "int_mm")
PACKED = ("native", "onednn")
"""Kernels that hold a copy of the weight in a layout of their own."""

_VERSION = "int8-3"
"""Of the kernels: choices that another version of them measured do not count."""

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


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """scale[…,n] = max_k |w[…,n,k]|/127, q = round(w/scale): symmetric, per row.

    Args:
        weight: [*, out_features, in_features].

    Returns:
        q int8 of weight's shape in [-127, 127], and scale [*, out_features], float32 or wider.
        A row of zeros has scale 1.
    """
    if weight.is_meta:  # a dozen ops that would compute nothing
        q = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
        return q.detach(), weight.new_empty(weight.shape[:-1], dtype=widened(weight.dtype))
    weight = weight.detach().to(widened(weight.dtype))
    if weight.shape[-1] == 0:
        return weight.to(torch.int8), weight.new_ones(weight.shape[:-1])
    scale = weight.abs().amax(-1) / 127
    # amax/127 may round to zero for subnormal rows, which then count as zeros
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    q = (weight / scale.unsqueeze(-1)).round_().clamp_(-127, 127)
    return q.to(torch.int8, memory_format=torch.contiguous_format), scale


def dequantize_weight(qweight: Tensor, scale: Tensor) -> Tensor:
    """w[…,n,k] = qweight[…,n,k]·scale[…,n], in scale's dtype."""
    return qweight.to(scale.dtype) * scale.unsqueeze(-1)


def int8_linear_reference(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "per_token",
) -> Tensor:
    """The same function as `int8_linear`, written as the formula (float64 inside)."""
    wide, w = x.to(torch.float64), dequantize_weight(qweight, scale.to(torch.float64))
    if x.numel() == 0:  # nothing has no range
        lo, s = wide.new_zeros(()), wide.new_ones(())
    elif activation == "per_token":
        lo, hi = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
        s = (hi - lo + _EPS) / 255
    else:
        low, hi = wide.amin().clamp(max=0), wide.amax().clamp(min=0)
        s = (hi - low + _EPS) / 255
        lo = -s * (-low / s).round()
    q = ((wide - lo) / s).round().clamp(0, 255)
    y = (s * q + lo) @ w.t()
    return (y if bias is None else y + bias).to(x.dtype)


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


# Choice of the kernel ----------------------------------------------------------------------------


def available_kernels() -> tuple[str, ...]:
    """The CPU kernels that gave the right answers on this machine; "torch" is always one."""
    return (*(k for k in _FAST if _refusal(k) is None), "torch")


def refused_kernels() -> dict[str, str]:
    """Why the other kernels are not used on this machine: {name: reason}."""
    return {k: reason for k in _FAST if (reason := _refusal(k)) is not None}


def pick_kernel(
    tokens: int, in_features: int, out_features: int, activation: str = "per_token"
) -> str:
    """The fastest available CPU kernel for a shape.

    Measured the first time a shape is asked for, on made-up data of that shape, with `tokens`
    rounded up to a power of two (at most 2048); remembered per number of threads, for later
    processes too.
    """
    return fastest_of("int8_linear", _VERSION, _run, tokens, in_features, out_features, activation)


def fastest_of(
    op: str,
    version: str,
    run: Callable[..., object],
    tokens: int,
    in_features: int,
    out_features: int,
    *options: object,
) -> str:
    """The kernel by which `run` is the fastest, as `pick_kernel` says it.

    Args:
        op, version: of what is measured; choices of another version do not count.
        run: (kernel, x, qweight, scale, bias, *options).
    """
    kernels = available_kernels()  # "torch" too: without int8 instructions it is the fastest
    if len(kernels) < 2:
        return kernels[0]
    rows, threads = rows_bucket(tokens), torch.get_num_threads()
    sizes = f"{rows} {in_features} {out_features}"
    key = f"{op} {sizes} {' '.join(map(str, options))} {kernels} {threads}"

    def candidates() -> dict[str, Callable[[], object]]:
        x = torch.linspace(-1, 1, rows * in_features).view(rows, in_features)
        qweight = torch.ones(out_features, in_features, dtype=torch.int8)
        operands = x, qweight, torch.ones(out_features), None, *options
        return {name: functools.partial(run, name, *operands) for name in kernels}

    found = fastest(key, version, candidates)
    return found if found in kernels else "torch"  # of a file that others may write


def kernel_name(
    tokens: int,
    in_features: int,
    out_features: int,
    activation: str = "per_token",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> str:
    """The kernel that `int8_linear` runs for such a call, for the report."""
    sizes = tokens, in_features, out_features
    return pick_kernel(*sizes, activation) if runs_kernels(*sizes, device, dtype) else "torch"


def runs_kernels(
    tokens: int,
    in_features: int,
    out_features: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Whether a call of such sizes is one of the CPU's kernels, and not the plain formula."""
    plain = torch.device(device).type != "cpu" or dtype == torch.float64
    return not plain and bool(tokens and in_features and out_features)


@functools.cache
def _refusal(kernel: str) -> str | None:
    """Runs the kernel on sums that saturate int16 arithmetic, against exact results."""
    if kernel == "native" and (reason := int8_cpu.refusal()) is not None:
        return f"not available: {reason}"
    with torch.inference_mode(False), torch.no_grad():
        for rows, k, n in ((1, 64, 16), (3, 67, 5), (9, 256, 33)):
            x = torch.full((rows, k), 255.0)
            x[:, ::7] = 0.0
            x[rows // 2, 1::2] = 100.0  # q = x, as the range is 255
            qweight = torch.full((n, k), 127, dtype=torch.int8)
            qweight[1::3], qweight[2::3, ::2] = -128, -1
            scale, bias = torch.linspace(0.5, 2.0, n), torch.linspace(-1.0, 1.0, n)
            for activation in ACTIVATIONS:
                want = int8_linear_reference(x, qweight, scale, bias, activation)
                try:
                    got = _run(kernel, x, qweight, scale, bias, activation)
                except (RuntimeError, AttributeError) as error:  # not built in, or not this CPU
                    return f"not available: {str(error).splitlines()[0]}"
                # float32 rounding alone: half an integer step would already be 50 times more
                if not torch.allclose(got, want, rtol=1e-5, atol=0.5):
                    worst = (got - want).abs().max().item()
                    return f"wrong by {worst:.3g} at {rows}x{k}x{n} {activation}"
    return None


# Packed weights ----------------------------------------------------------------------------------


class _Packed:
    """What kernels derive from one weight, made when first asked for."""

    def __init__(self, qweight: Tensor, stamp: tuple[Any, ...] | None) -> None:
        self.stamp = stamp
        self.row_sums = qweight.sum(-1, dtype=torch.int32)
        self.onednn: dict[tuple[int, int], Tensor] = {}
        self.native: dict[int, Tensor] = {}


_CACHE = WeakTensorKeyDictionary()


def packed_weight(qweight: Tensor) -> _Packed:
    # A tensor made under inference_mode counts no versions: nothing derived from it is kept.
    if qweight.is_inference():
        return _Packed(qweight, None)
    stamp = (qweight._version, qweight.data_ptr(), qweight.shape, qweight.stride())
    packed: _Packed | None = _CACHE.get(qweight)  # type: ignore[no-untyped-call,unused-ignore]
    if packed is None or packed.stamp != stamp:
        packed = _CACHE[qweight] = _Packed(qweight, stamp)
    return packed


def forget(qweight: Tensor) -> None:
    """Packs a weight anew when it is asked for next."""
    _CACHE.pop(qweight, None)  # type: ignore[no-untyped-call,unused-ignore]


def _onednn_weight(packed: _Packed, index: int, qweight: Tensor, width: int) -> Tensor:
    """qweight [n, k] in oneDNN's layout, zero-padded to `width` columns."""
    weight = packed.onednn.get((index, width))
    if weight is None:
        padded = F.pad(qweight, (0, width - qweight.shape[1])).contiguous()
        weight = torch.ops.onednn.qlinear_prepack(padded, None)
        packed.onednn[index, width] = weight
    return weight


def native_weight(packed: _Packed, index: int, qweight: Tensor) -> Tensor:
    """qweight [n, k], number `index` of the packed stack, as the kernel "native" has it."""
    own = packed.native.get(index)
    if own is None:
        own = packed.native[index] = int8_cpu.pack(qweight.contiguous())
    return own


# Forward -----------------------------------------------------------------------------------------

Quantized = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, float, int]
"""q [rows, ≥ k] uint8, whose columns from k on are noise; and per token s and lo [rows, 1], per
tensor s and the zero point −lo/s."""


def quantize(x: Tensor, activation: str) -> Quantized:
    """x [rows, k] float32 contiguous, on a CPU, not empty."""
    if activation == "per_tensor":
        low, high = (float(v) for v in torch.aminmax(x))
        s = (max(high, 0.0) - min(low, 0.0) + _EPS) / 255
        if not math.isfinite(s):
            return torch.zeros_like(x, dtype=torch.uint8), math.nan, 0
        zero = round(-min(low, 0.0) / s)
        # floor(x/s + zero + 1/2): three passes; the row makes the first one vectorize
        half = torch.full((x.shape[1],), zero + 0.5)
        q = torch.add(half, x, alpha=1 / s).clamp_(0, 255.5).to(torch.uint8)
        return q, s, zero
    # NaN-propagating, which the quantizer's own minimum is not
    lo = x.amin(-1, keepdim=True)
    if rest := -x.shape[1] % 4:  # the scale behind each row is to be aligned as a float
        x = torch.cat([x, x[:, :1].expand(-1, rest)], 1)
    # One pass; each row is followed by 8 bytes, its scale and its minimum as float32. They stay
    # where they are and meet zero columns of the weight, which is cheaper than cutting them off.
    q = torch.ops.quantized.embedding_bag_byte_prepack(x)
    return q, q.view(torch.float32)[:, -2:-1] + _EPS / 255, lo


def quantize_torch(x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in plain torch, in x's range: q [rows, k] as floats, s and lo."""
    if activation == "per_token":
        lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:
        lo, hi = x.amin().clamp(max=0), x.amax().clamp(min=0)
    # a range beyond the largest number: all of such a row by a quarter
    part = torch.where((hi - lo).isfinite(), 1.0, 0.25)
    step = (hi * part - lo * part + _EPS * part) / 255
    s = step / part
    if activation == "per_tensor":
        lo = -s * (-lo / s).round()
    return ((x * part - lo * part) / step).round_().clamp_(0, 255), s, lo


_EXACT = 514
"""Products of a number from 0 to 255 and one from −128 to 127 whose sum is at most 2²⁴: exact in
float32."""


def _whole_product(q: Tensor, qweight: Tensor) -> Tensor:
    """Σ_k q·qweight, q [*, rows, k] uint8, qweight [*, n, k] int8 → [*, rows, n], whole numbers in
    float32, or in int32 where one float32 product would round."""
    if q.shape[-1] <= _EXACT:
        return torch.matmul(q.float(), qweight.float().mT)
    parts = zip(q.split(_EXACT, -1), qweight.split(_EXACT, -1), strict=True)
    first, *more = (torch.matmul(a.float(), b.float().mT).to(torch.int32) for a, b in parts)
    for part in more:
        first.add_(part)
    return first


def multiply(
    kernel: str,
    quantized: Quantized,
    qweight: Tensor,
    packed: _Packed,
    index: int | None,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """quantized activations × qweight [n, k] (number `index` of the packed stack) → [rows, n]."""
    q, s, lo = quantized
    sums = packed.row_sums if index is None else packed.row_sums[index]
    k = qweight.shape[1]
    if kernel == "onednn":
        weight = _onednn_weight(packed, index or 0, qweight, q.shape[1])
        zeros, zero = torch.zeros(scale.shape, dtype=torch.int32), lo if isinstance(lo, int) else 0
        # u8 activations: s8 ones would fall into a reference loop, 1000 times slower
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            q, 1.0, zero, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return _scaled(y, s, lo, sums, scale, bias)
    if kernel == "torch":
        return _from_products(_whole_product(q[:, :k], qweight), s, lo, sums, scale, bias)
    assert kernel == "int_mm", kernel
    signed = (q[:, :k] ^ 128).view(torch.int8)  # q − 128
    if k == 1:  # torch 2.13 reads past an [1, n] operand that is a transpose
        signed, qweight = F.pad(signed, (0, 1)), F.pad(qweight, (0, 1))
    found = torch._int_mm(signed, qweight.t()).add_(128 * sums)
    return _from_products(found, s, lo, sums, scale, bias)


def multiply_blocks(
    quantized: Quantized, qweight: Tensor, packed: _Packed, scale: Tensor
) -> Tensor:
    """`multiply` of the kernel "torch" for a stack: q [N·rows, ≥ k], qweight [N, n, k] →
    [N, rows, n]."""
    (q, s, lo), (blocks, _, k) = quantized, qweight.shape
    found = _whole_product(q.unflatten(0, (blocks, -1))[..., :k], qweight)
    s = s.unflatten(0, (blocks, -1)) if isinstance(s, Tensor) else s
    lo = lo.unflatten(0, (blocks, -1)) if isinstance(lo, Tensor) else lo
    return _from_products(found, s, lo, packed.row_sums[:, None], scale[:, None], None)


def _from_products(
    found: Tensor,
    s: Tensor | float,
    lo: Tensor | int,
    sums: Tensor,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Σ_k q·qweight [*, rows, n] → y, from what `quantize` and the weight give beside."""
    if isinstance(lo, int) and lo:  # whole numbers still: nothing is lost to cancellation
        found.sub_(lo * sums)
    return _scaled(found.float().mul_(scale), s, lo, sums, scale, bias)


def _scaled(
    y: Tensor,
    s: Tensor | float,
    lo: Tensor | int,
    sums: Tensor,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """y·s + lo·scale·row sum + bias, in place."""
    if not isinstance(s, Tensor):
        return y.mul_(s) if bias is None else torch.add(bias, y, alpha=s, out=y)
    assert isinstance(lo, Tensor)
    y = y.mul_(s) if bias is None else torch.addcmul(bias, y, s, out=y)
    return y.addcmul_(lo, sums * scale)


class After(NamedTuple):
    """What happens to a product: an activation, a sum, a LayerNorm, in this order."""

    then: str = ""
    add: Tensor | None = None
    norm: int8_cpu.Norm | None = None

    @classmethod
    def of(
        cls,
        then: str = "",
        add: Tensor | None = None,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        eps: float | None = None,
    ) -> After:
        """Of an op's arguments; without `eps` there is no norm."""
        norm = None if eps is None else int8_cpu.Norm(norm_weight, norm_bias, eps)
        return cls(then, add, norm)

    def fits(self, y: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether the compiled kernel can do it to a result of this shape and dtype."""
        add, norm = self.add, self.norm
        given = [t for t in (add, *(norm or ())) if isinstance(t, Tensor)]
        same = add is None or tuple(add.shape) == y
        return same and dtype == torch.float32 and all(t.dtype == dtype for t in given)

    def of_rows(self, rows: Tensor | int) -> After:
        """The same where the result is [rows, n]: all rows, or those that a mask has."""
        if self.add is None:
            return self
        add = self.add.reshape(-1, self.add.shape[-1])
        return self._replace(add=add.contiguous() if isinstance(rows, int) else add[rows])

    def __call__(self, y: Tensor) -> Tensor:
        y = act_(y, self.then) if self.then else y
        y = y if self.add is None else y + self.add
        if self.norm is None:
            return y
        return F.layer_norm(y, y.shape[-1:], self.norm.weight, self.norm.bias, self.norm.eps)


NOTHING = After()


def _run(
    kernel: str,
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    after: After = NOTHING,
) -> Tensor:
    """x [rows, k] float32 contiguous, on a CPU, rows·k·n > 0 → [rows, n] float32."""
    packed = packed_weight(qweight)
    if kernel == "native":
        return native(x, qweight, packed, None, scale, bias, activation, after)
    q, s, lo = quantized = quantize(x, activation)
    y = multiply(kernel, quantized, qweight, packed, None, scale, bias)
    if isinstance(s, Tensor) and not math.isfinite(s.sum().item()):
        wide = ~s.isfinite().squeeze(1)  # rows whose range is beyond float32, or with NaN or inf
        y[wide] = _plain(x[wide], qweight, scale, bias, activation)
    return after(y)


def native(
    x: Tensor,
    qweight: Tensor,
    packed: _Packed,
    index: int | None,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    after: After = NOTHING,
) -> Tensor:
    """The kernel "native": x [rows, k] whose rows are dense × qweight [n, k] (number
    `index` of the packed stack) → [rows, n]."""
    own = native_weight(packed, index or 0, qweight)
    sums = packed.row_sums if index is None else packed.row_sums[index]
    bias = None if bias is None else bias.contiguous()
    run = int8_cpu.Linear(
        own, x.shape[1], scale.contiguous(), sums, bias, after.then, after.norm,
        one_range=activation == "per_tensor",
    )  # fmt: skip
    y, wide = run(x, after.add)
    if wide:
        rows = ~(x.amax(-1) - x.amin(-1)).isfinite()
        y[rows] = after.of_rows(rows)(_plain(x[rows], qweight, scale, bias, "per_token"))
    return y


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

    def native(rows: int) -> bool:
        out, width = qweight.shape
        return pick_kernel(rows, width, out, activation) == "native"

    after = After.of(then, None, norm_weight, norm_bias, eps)
    return Bound(run, native_linear(qweight, scale, bias, after, activation), native)


def native_linear(
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    after: After,
    activation: str = "",
    **options: Any,
) -> int8_cpu.Linear | None:
    """The product by the kernel "native"; None where that does not take these operands.

    Args:
        after: what follows it, without what is added.
        options: further ones of `int8_cpu.Linear`.
    """
    floats = [t for t in (scale, bias, *(after.norm or ())) if isinstance(t, Tensor)]
    fits = all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in floats)
    if not (fits and qweight.is_cpu and qweight.numel() and "native" in available_kernels()):
        return None
    packed = packed_weight(qweight)
    if not torch.equal(packed.row_sums, qweight.sum(-1, dtype=torch.int32)):
        forget(qweight)  # it was written in a way that torch does not count
        packed = packed_weight(qweight)
    own, width = native_weight(packed, 0, qweight), qweight.shape[1]
    one = activation == "per_tensor"
    given = bias, after.then, after.norm, one
    return int8_cpu.Linear(own, width, scale, packed.row_sums, *given, **options)


class Bound:
    """A product and what follows it, or two in a row, by the kernel "native" where that is the
    fastest and takes the operands; else as `run` has it.

    Args:
        run: (x, add) → y.
        kernel: the same; None where the operands are none that it takes.
        native: (rows) → whether it is the fastest.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        kernel: int8_cpu.Linear | int8_cpu.Two | None,
        native: Callable[[int], bool],
    ) -> None:
        self.run, self.kernel, self.native = run, kernel, native
        self._known: dict[tuple[int, int], bool] = {}

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        if self.kernel is not None and self._takes(self.kernel, x, add):
            y, wide = self.kernel(x, add)
            if not wide:
                return y
        return self.run(x, add)

    def in_graph(self) -> native_ops.InGraph | None:
        """The kernel as it stands in a graph; None where there is none."""
        return None if self.kernel is None else self.kernel.in_graph()

    def _takes(self, kernel: int8_cpu.Linear | int8_cpu.Two, x: Tensor, add: Tensor | None) -> bool:
        if x.dtype is not torch.float32 or not (x.is_cpu and x.is_contiguous()):
            return False
        shape = x.shape
        if add is not None:
            same = add.shape == (*shape[:-1], kernel.out) and add.dtype is torch.float32
            if not (same and add.is_contiguous()):
                return False
        if not shape or shape[-1] != kernel.width or not (rows := x.numel() // kernel.width):
            return False
        key = rows, torch.get_num_threads()
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self.native(rows)
        return found


def bound_pair(first: Bound, second: Bound) -> Bound:
    """`second(first(x), add)`."""
    kernel = None
    if isinstance(first.kernel, int8_cpu.Linear) and isinstance(second.kernel, int8_cpu.Linear):
        kernel = int8_cpu.Two(first.kernel, second.kernel)

    def run(x: Tensor, add: Tensor | None = None) -> Tensor:
        return second.run(first.run(x), add)

    return Bound(run, kernel, lambda rows: first.native(rows) and second.native(rows))


def _plain(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x [rows, k], all floating operands of its dtype → [rows, n], on any device."""
    q, s, lo = quantize_torch(x, activation)
    weight = qweight.to(x.dtype)
    if activation == "per_token":
        y = torch.addcmul((q @ weight.t()) * (s * scale), lo, weight.sum(-1) * scale)
    else:  # integers first, so that a zero stays one beside an outlier
        y = ((q + (lo / s).round()) @ weight.t()) * (s * scale)
    return y if bias is None else y.add_(bias)


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
    wide = widened(dtype)
    x = x.reshape(rows, k).to(wide).contiguous()
    scale, bias = scale.to(wide), None if bias is None else bias.to(wide)
    if not has_kernels(x):
        y, within = _plain(x, qweight, scale, bias, activation), False
    else:
        kernel, within = pick_kernel(rows, k, n, activation), after.fits(shape, dtype)
        inside = after.of_rows(rows) if within else NOTHING
        y = _run(kernel, x, qweight, scale, bias, activation, inside)
    y = owned(y.to(dtype), shape)
    return y if within else after(y)


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


def has_kernels(x: Tensor) -> bool:
    """Whether the CPU's kernels take such activations."""
    return x.device.type == "cpu" and x.dtype == torch.float32


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
    s = (x.amax(-1, keepdim=True) - lo + _EPS) / 255
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
        kernels=lambda: {**{k: _refusal(k) for k in _FAST}, "torch": None},
        companions=(ops.Companion("rewriter::int8_linear_then"), *native_ops.INT8),
    )
)
