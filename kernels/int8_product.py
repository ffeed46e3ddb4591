"""Products of 8-bit integers on a CPU: how activations and weights are rounded to levels, what is
kept of a weight, and the product by each kernel. `int8_linear` has the formula; what is here takes
[rows, k] and has no gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rewriter.kernels import int8_cpu, quantized_gpu
from rewriter.kernels.common import widened
from rewriter.kernels.linear_act import act_

__all__ = [
    "ACTIVATIONS",
    "After",
    "EPS",
    "NOTHING",
    "Packed",
    "Quantized",
    "dequantize_weight",
    "forget",
    "int8_linear_reference",
    "multiply",
    "multiply_blocks",
    "native",
    "native_weight",
    "packed_weight",
    "plain",
    "quantize",
    "quantize_torch",
    "quantize_weight",
    "run",
]

ACTIVATIONS = ("per_token", "per_tensor")
EPS = 1e-8


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
    q = (weight / scale.unsqueeze(-1)).round().clamp(-127, 127)
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
        s = (hi - lo + EPS) / 255
    else:
        low, hi = wide.amin().clamp(max=0), wide.amax().clamp(min=0)
        s = (hi - low + EPS) / 255
        lo = -s * (-low / s).round()
    q = ((wide - lo) / s).round().clamp(0, 255)
    y = (s * q + lo) @ w.t()
    return (y if bias is None else y + bias).to(x.dtype)


# Packed weights ----------------------------------------------------------------------------------


class Packed:
    """What kernels derive from one weight, made when first asked for."""

    def __init__(self, qweight: Tensor, stamp: tuple[Any, ...] | None) -> None:
        self.stamp = stamp
        self.row_sums = qweight.sum(-1, dtype=torch.int32)
        self.onednn: dict[tuple[int, int], Tensor] = {}
        self.native: dict[int, Tensor] = {}
        self.blocks: dict[int, Tensor] = {}  # of a Monarch's factor, by how its rows are ordered


_CACHE = WeakTensorKeyDictionary()


def packed_weight(qweight: Tensor) -> Packed:
    # A tensor made under inference_mode counts no versions: nothing derived from it is kept.
    if qweight.is_inference():
        return Packed(qweight, None)
    stamp = (qweight._version, qweight.data_ptr(), qweight.shape, qweight.stride())
    packed: Packed | None = _CACHE.get(qweight)  # type: ignore[no-untyped-call,unused-ignore]
    if packed is None or packed.stamp != stamp:
        packed = Packed(qweight, stamp)
        if not quantized_gpu.capturing(qweight):
            _CACHE[qweight] = packed
    return packed


def forget(qweight: Tensor) -> None:
    """Packs a weight anew when it is asked for next."""
    _CACHE.pop(qweight, None)  # type: ignore[no-untyped-call,unused-ignore]


def _onednn_weight(packed: Packed, index: int, qweight: Tensor, width: int) -> Tensor:
    """qweight [n, k] in oneDNN's layout, zero-padded to `width` columns."""
    weight = packed.onednn.get((index, width))
    if weight is None:
        padded = F.pad(qweight, (0, width - qweight.shape[1])).contiguous()
        weight = torch.ops.onednn.qlinear_prepack(padded, None)
        packed.onednn[index, width] = weight
    return weight


def native_weight(packed: Packed, index: int, qweight: Tensor) -> Tensor:
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
        s = (max(high, 0.0) - min(low, 0.0) + EPS) / 255
        if not math.isfinite(s):
            return torch.zeros_like(x, dtype=torch.uint8), math.nan, 0
        zero = round(-min(low, 0.0) / s)
        # floor(x/s + zero + 1/2): three passes; the row makes the first one vectorize
        half = torch.full((x.shape[1],), zero + 0.5, dtype=x.dtype)
        q = torch.add(half, x, alpha=1 / s).clamp_(0, 255.5).to(torch.uint8)
        return q, s, zero
    # NaN-propagating, which the quantizer's own minimum is not
    lo = x.amin(-1, keepdim=True)
    if rest := -x.shape[1] % 4:  # the scale behind each row is to be aligned as a float
        x = torch.cat([x, x[:, :1].expand(-1, rest)], 1)
    # One pass; each row is followed by 8 bytes, its scale and its minimum as float32. They stay
    # where they are and meet zero columns of the weight, which is cheaper than cutting them off.
    q = torch.ops.quantized.embedding_bag_byte_prepack(x)
    return q, q.view(torch.float32)[:, -2:-1] + EPS / 255, lo


def quantize_torch(x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in plain torch, in x's range: q [rows, k] as floats, s and lo."""
    if activation == "per_token":
        lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:
        lo, hi = x.amin().clamp(max=0), x.amax().clamp(min=0)
    # a range beyond the largest number: all of such a row by a quarter
    part = torch.where((hi - lo).isfinite(), 1.0, 0.25)
    step = (hi * part - lo * part + EPS * part) / 255
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
    packed: Packed,
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
    quantized: Quantized, qweight: Tensor, packed: Packed, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """`multiply` of the kernel "torch" for a stack: q [N·rows, ≥ k], qweight [N, n, k], bias [N, n]
    → [N, rows, n]."""
    (q, s, lo), (blocks, _, k) = quantized, qweight.shape
    found = _whole_product(q.unflatten(0, (blocks, -1))[..., :k], qweight)
    s = s.unflatten(0, (blocks, -1)) if isinstance(s, Tensor) else s
    lo = lo.unflatten(0, (blocks, -1)) if isinstance(lo, Tensor) else lo
    bias = None if bias is None else bias[:, None]
    return _from_products(found, s, lo, packed.row_sums[:, None], scale[:, None], bias)


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


def run(
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
        y[wide] = plain(x[wide], qweight, scale, bias, activation)
    return after(y)


def native(
    x: Tensor,
    qweight: Tensor,
    packed: Packed,
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
    made = int8_cpu.Linear(
        own, x.shape[1], scale.contiguous(), sums, bias, after.then, after.norm,
        one_range=activation == "per_tensor",
    )  # fmt: skip
    y, wide = made(x, after.add)
    if wide:
        rows = ~(x.amax(-1) - x.amin(-1)).isfinite()
        y[rows] = after.of_rows(rows)(plain(x[rows], qweight, scale, bias, "per_token"))
    return y


def plain(
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
