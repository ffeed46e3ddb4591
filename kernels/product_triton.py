"""Triton kernels that multiply by weights of 8 and 4 bits, for CUDA and ROCm.

    product   a [rows, k] × b [n, k]ᵀ: int8 by int8 into int32, float8 by float8 into float32, and
              floats by weights of 8 bits that become floats in registers
    grouped   the same by weights of 4 bits in groups, two in a byte, unpacked in registers by bit
              operations; a is floats, or int8 with a scale for each row and group
    vector    one row of floats by weights of 8 or 4 bits: no matrix unit, the weight read once
    dense     the weight as floats, for torch's product, where many rows pay for it
    finish    what follows where the sum was cut in pieces, or where torch's own product ran

What follows a product happens in the registers that hold it: correction of zero points by the sums
of the weights' rows, scales per row and column, bias, activation, and what is added. Sums are int32
or float32; where few rows leave multiprocessors idle the sum is cut in SPLIT pieces, which `finish`
adds up in order, so that the result does not depend on who was first. Programs go through the tiles
in groups of rows of tiles, so that those that run together read the same weights from the L2.

Sizes of tiles come from `tiles`, by shape; which of them is the fastest is measured (`choice.py`).
Layout and formulas are those of `int8_linear`, `float8_linear` and `weight_only`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "E4M3",
    "KERNELS",
    "Behind",
    "Tile",
    "dense",
    "dot",
    "finish",
    "grouped",
    "precision",
    "product",
    "tiles",
    "vector",
]

E4M3 = 256.0
"""How much larger the numbers of e4m3 are than the halves of the same bits, moved to their place:
their exponent is biased by 7 and not by 15."""


# What follows a product


@triton.jit  # type: ignore[untyped-decorator]
def _then(y, THEN: tl.constexpr):
    if THEN == "relu":
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays
    elif THEN == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif THEN == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _store(
    acc, y, m, n, steps, scale, sums, bias, add, rows, columns, stride_add,
    LEVELS: tl.constexpr, STEPS: tl.constexpr, SCALED: tl.constexpr, FACTOR: tl.constexpr,
    BIAS: tl.constexpr, THEN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """then(FACTOR·s[m]·scale[n]·acc + bias[n]) + add[m,n]; LEVELS: acc is of levels less 128, so
    (128 − zero[m])·sums[n] is added to it, and lo[m]·scale[n]·sums[n] to the result."""
    in_rows, in_columns = m < rows, n < columns
    if LEVELS:
        total = tl.load(sums + n, mask=in_columns, other=0)
        point = tl.load(steps + 2 * rows + m, mask=in_rows, other=0.0).to(tl.int32)
        acc += (128 - point)[:, None] * total[None, :]
    value = acc.to(tl.float32)
    if SCALED:
        each = tl.load(scale + n, mask=in_columns, other=0.0).to(tl.float32) * FACTOR
        value = value * each[None, :]
    if STEPS:
        value = value * tl.load(steps + m, mask=in_rows, other=0.0)[:, None]
    if LEVELS:
        low = tl.load(steps + rows + m, mask=in_rows, other=0.0)
        value += low[:, None] * (total.to(tl.float32) * each)[None, :]
    if BIAS:
        value += tl.load(bias + n, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    value = _then(value, THEN)
    inside = in_rows[:, None] & in_columns[None, :]
    row = m[:, None].to(tl.int64)
    if ADD:
        value += tl.load(add + row * stride_add + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + n[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _tile_of(program, rows, columns, BM: tl.constexpr, BN: tl.constexpr, TALL: tl.constexpr):
    """(row of tiles, column of tiles): TALL rows of tiles are gone through column by column."""
    across, down = tl.cdiv(columns, BN), tl.cdiv(rows, BM)
    first = program // (TALL * across) * TALL
    tall = tl.minimum(down - first, TALL)
    place = program % (TALL * across)
    return first + place % tall, place // tall


@triton.jit  # type: ignore[untyped-decorator]
def dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "wide":  # Triton's interpreter, which takes the bits of bfloat16 for integers
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:  # float8 of an sm_90 adds up in 14 bits: not over more than one step
        acc = tl.dot(
            a, b, acc, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1],
            out_dtype=acc.dtype,
        )  # fmt: skip
    return acc


# Weights in registers


@triton.jit
def _half_of_e4m3(bits):
    """The half of which the number is 256 times as large; subnormal ones too."""
    wide = bits.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _of_byte(b, KIND: tl.constexpr, dtype: tl.constexpr):
    """A weight of 8 bits as a number of a dtype; of float8 the half of `_half_of_e4m3`."""
    if KIND == "float8 weight":
        number = _half_of_e4m3(b).to(dtype)
    else:
        number = b.to(dtype)
    return number


@triton.jit  # type: ignore[untyped-decorator]
def _of_nibble(bits, HALF: tl.constexpr):
    """bits − 8 of 0 … 15: the bits become the mantissa of 1024 or 2²³, which is taken off again."""
    if HALF:
        level = (bits.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    else:
        level = (bits.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    return level


# Products


@triton.jit  # type: ignore[untyped-decorator]
def _product(
    a, b, y, steps, scale, sums, bias, add, rows, columns, width, stride_a, stride_b, stride_add,
    KIND: tl.constexpr, LEVELS: tl.constexpr, STEPS: tl.constexpr, FACTOR: tl.constexpr,
    BIAS: tl.constexpr, THEN: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """KIND "int8", "float8": both operands are such; "int8 weight", "float8 weight": b alone."""
    down, across = _tile_of(tl.program_id(0), rows, columns, BM, BN, TALL)
    m, n = down * BM + tl.arange(0, BM), across * BN + tl.arange(0, BN)
    # rows and columns outside are read as the first ones again, and not written
    from_a = a + (m % rows)[:, None].to(tl.int64) * stride_a
    from_b = b + (n % columns)[None, :].to(tl.int64) * stride_b
    each = tl.cdiv(tl.cdiv(width, BK), SPLIT) * BK
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, width)
    acc = tl.zeros([BM, BN], tl.int32 if KIND == "int8" else tl.float32)
    for start in range(first, last, BK):
        k = start + tl.arange(0, BK)
        if EVEN:
            at, bt = tl.load(from_a + k[None, :]), tl.load(from_b + k[:, None])
        else:
            at = tl.load(from_a + k[None, :], mask=(k < width)[None, :], other=0.0)
            bt = tl.load(from_b + k[:, None], mask=(k < width)[:, None], other=0.0)
        if KIND == "int8 weight" or KIND == "float8 weight":
            bt = _of_byte(bt, KIND, tl.float32 if PRECISION == "wide" else at.dtype)
        acc = dot(at, bt, acc, PRECISION)
    if SPLIT > 1:
        piece = y + tl.program_id(1).to(tl.int64) * rows * columns
        to = piece + m[:, None].to(tl.int64) * columns + n[None, :]
        tl.store(to, acc, mask=(m < rows)[:, None] & (n < columns)[None, :])
    else:
        _store(
            acc, y, m, n, steps, scale, sums, bias, add, rows, columns, stride_add,
            LEVELS, STEPS, True, FACTOR, BIAS, THEN, ADD,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _grouped(
    a, b, y, steps, scale, zero, bias, add, rows, columns, width, groups, stride_a, stride_add,
    SIZE: tl.constexpr, DYNAMIC: tl.constexpr, ZERO: tl.constexpr,
    BIAS: tl.constexpr, THEN: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """One product a group of SIZE = BK: levels are exact in every type, and scaled afterwards."""
    down, across = _tile_of(tl.program_id(0), rows, columns, BM, BN, TALL)
    m, n = down * BM + tl.arange(0, BM), across * BN + tl.arange(0, BN)
    own = (n % columns).to(tl.int64)
    row = (m % rows).to(tl.int64)
    j = tl.arange(0, SIZE // 2)
    each = tl.cdiv(groups, SPLIT)
    first = tl.program_id(1) * each
    acc = tl.zeros([BM, BN], tl.float32)
    for g in range(first, tl.minimum(first + each, groups)):
        k = g * SIZE + tl.arange(0, SIZE)
        if EVEN:
            at = tl.load(a + row[:, None] * stride_a + k[None, :])
        else:
            at = tl.load(
                a + row[:, None] * stride_a + k[None, :], mask=(k < width)[None, :], other=0
            )
        packed = tl.load(b + own[None, :] * (groups * (SIZE // 2)) + (g * (SIZE // 2) + j)[:, None])
        if DYNAMIC:
            part = tl.dot(at, _unpacked(packed, "int8", SIZE, BN)).to(tl.float32)
            total = tl.sum(at.to(tl.int32), 1).to(tl.float32)
        else:
            levels = _unpacked(packed, "half" if at.dtype == tl.float16 else "", SIZE, BN)
            part = dot(at, levels.to(at.dtype), tl.zeros([BM, BN], tl.float32), PRECISION)
            total = tl.sum(at.to(tl.float32), 1)
        part = part * tl.load(scale + own * groups + g).to(tl.float32)[None, :]
        if ZERO:
            part += total[:, None] * tl.load(zero + own * groups + g).to(tl.float32)[None, :]
        if DYNAMIC:
            part = part * tl.load(steps + row * groups + g)[:, None]
        acc += part
    if SPLIT > 1:
        piece = y + tl.program_id(1).to(tl.int64) * rows * columns
        to = piece + m[:, None].to(tl.int64) * columns + n[None, :]
        tl.store(to, acc, mask=(m < rows)[:, None] & (n < columns)[None, :])
    else:
        _store(
            acc, y, m, n, steps, scale, scale, bias, add, rows, columns, stride_add,
            False, False, False, 1.0, BIAS, THEN, ADD,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _unpacked(packed, TYPE: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr):
    """Bytes [SIZE/2, BN], of which 16 hold 16 levels in their low halves and the next 16 in their
    high ones → levels [SIZE, BN] in order."""
    blocks = tl.reshape(packed, [SIZE // 32, 16, BN])
    low, high = blocks & 15, blocks >> 4
    if TYPE == "int8":
        both = tl.join(low.to(tl.int8) - 8, high.to(tl.int8) - 8)
    else:
        both = tl.join(_of_nibble(low, TYPE == "half"), _of_nibble(high, TYPE == "half"))
    return tl.reshape(tl.permute(both, (0, 3, 1, 2)), [SIZE, BN])


@triton.jit  # type: ignore[untyped-decorator]
def _vector(
    a, b, y, scale, zero, bias, add, columns, width, groups, stride_b,
    KIND: tl.constexpr, SIZE: tl.constexpr, ZERO: tl.constexpr, FACTOR: tl.constexpr,
    BIAS: tl.constexpr, THEN: tl.constexpr, ADD: tl.constexpr,
    BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """One row. SIZE: of a group of 4-bit weights; of weights of 8 bits how many of a row are one
    step, of BG side by side."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < columns
    own = (n % columns).to(tl.int64)
    acc = tl.zeros([BN, BG], tl.float32)
    for start in range(0, groups, BG):
        g = start + tl.arange(0, BG)
        if KIND == "int4":
            j = tl.arange(0, SIZE // 2)
            k = g[:, None] * SIZE + (j // 16 * 32 + j % 16)[None, :]
            here = (g < groups)[:, None]
            first = tl.load(a + k, mask=k < width, other=0.0).to(tl.float32)
            second = tl.load(a + k + 16, mask=k + 16 < width, other=0.0).to(tl.float32)
            at = own[:, None, None] * stride_b + (g[:, None] * (SIZE // 2) + j[None, :])[None, :, :]
            packed = tl.load(b + at, mask=here[None, :, :], other=0)
            low, high = _of_nibble(packed & 15, False), _of_nibble(packed >> 4, False)
            part = tl.sum(low * first[None, :, :] + high * second[None, :, :], 2)
            place, known = own[:, None] * groups + g[None, :], (g < groups)[None, :]
            part = part * tl.load(scale + place, mask=known, other=0.0).to(tl.float32)
            if ZERO:
                total = tl.sum(first + second, 1)
                each = tl.load(zero + place, mask=known, other=0.0).to(tl.float32)
                part += total[None, :] * each
            acc += part
        else:
            k = g[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
            x = tl.load(a + k, mask=k < width, other=0.0).to(tl.float32)
            at = own[:, None, None] * stride_b + k[None, :, :]
            w = tl.load(b + at, mask=(k < width)[None, :, :], other=0)
            acc += tl.sum(_of_byte(w, KIND, tl.float32) * x[None, :, :], 2)
    value = tl.sum(acc, 1)
    if KIND != "int4":
        value = value * (tl.load(scale + n, mask=inside, other=0.0).to(tl.float32) * FACTOR)
    if BIAS:
        value += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    value = _then(value, THEN)
    if ADD:
        value += tl.load(add + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + n, value.to(y.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _finish(
    pieces, y, steps, scale, sums, bias, add, rows, columns, stride_add,
    WHOLE: tl.constexpr, LEVELS: tl.constexpr, STEPS: tl.constexpr, SCALED: tl.constexpr,
    FACTOR: tl.constexpr, BIAS: tl.constexpr, THEN: tl.constexpr, ADD: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Σ of SPLIT pieces [rows, columns], int32 where WHOLE and float32 else, and what follows."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    at = pieces + m[:, None].to(tl.int64) * columns + n[None, :]
    acc = tl.zeros([BM, BN], tl.int32 if WHOLE else tl.float32)
    for piece in range(SPLIT):
        acc += tl.load(at + (piece * rows).to(tl.int64) * columns, mask=inside, other=0)
    _store(
        acc, y, m, n, steps, scale, sums, bias, add, rows, columns, stride_add,
        LEVELS, STEPS, SCALED, FACTOR, BIAS, THEN, ADD,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _dense(
    b, y, scale, zero, columns, width, groups, stride_b,
    KIND: tl.constexpr, SIZE: tl.constexpr, ZERO: tl.constexpr, FACTOR: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The weight as floats, y[n, k]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (n < columns)[:, None] & (k < width)[None, :]
    row = n[:, None].to(tl.int64)
    if KIND == "int4":
        at = b + row * stride_b + (k // 32 * 16 + k % 16)[None, :]
        bits = tl.load(at, mask=inside, other=0) >> (k % 32 // 16 * 4)[None, :].to(tl.uint8)
        place = row * groups + (k // SIZE)[None, :]
        w = _of_nibble(bits & 15, False)
        w = w * tl.load(scale + place, mask=inside, other=0.0).to(tl.float32)
        if ZERO:
            w += tl.load(zero + place, mask=inside, other=0.0).to(tl.float32)
    else:
        w = _of_byte(
            tl.load(b + row * stride_b + k[None, :], mask=inside, other=0), KIND, tl.float32
        )
        each = tl.load(scale + n, mask=n < columns, other=0.0).to(tl.float32) * FACTOR
        w = w * each[:, None]
    tl.store(y + row * width + k[None, :], w.to(y.dtype.element_ty), mask=inside)


KERNELS: Mapping[str, Any] = {
    "dense": _dense,
    "product": _product,
    "grouped": _grouped,
    "vector": _vector,
    "finish": _finish,
}


# Sizes -------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """What one program computes, and how many share a sum."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    split: int = 1

    def __str__(self) -> str:
        text = f"{self.rows}x{self.columns}x{self.depth}"
        return text if self.split == 1 else f"{text}/{self.split}"

    @property
    def arguments(self) -> dict[str, int]:
        return {
            "BM": self.rows, "BN": self.columns, "BK": self.depth, "SPLIT": self.split,
            "TALL": _TALL, "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


_TALL = 8
"""Rows of tiles that are gone through together."""
_STAGES = 4
SHARED = 64 * 1024
"""Bytes of shared memory that a program may take where a device does not say: what gfx942 has."""
_FEW, _MOST_PIECES = 4, 16
"""Steps that a piece of a cut sum has at least; and pieces."""
_LARGEST = {"float8": 128 * 128, "int4": 64 * 128, "int4 dynamic": 64 * 128}
"""Sums of a program above which registers spill on some target, found by compiling: those kinds
add up twice, within a step or a group and over all."""

_SIZES = {
    16: ((16, 64, 4), (16, 128, 4)),
    32: ((32, 64, 4), (32, 128, 4)),
    64: ((64, 64, 4), (64, 128, 4)),
    128: ((128, 128, 8), (64, 128, 4), (128, 64, 4)),
    1024: ((128, 128, 8), (128, 256, 8), (64, 128, 4)),
}
"""Up to so many rows: (rows, columns, warps) of tiles that may be the best."""


def tiles(
    kind: str,
    rows: int,
    columns: int,
    width: int,
    item: int,
    group: int = 0,
    units: int = 132,
    shared: int = SHARED,
    wide: bool = False,
    apart: bool = False,
) -> list[Tile]:
    """The tiles that may be the fastest at a size, the likeliest first; at least one.

    Args:
        kind: as of `product`, "int4" or "int4 dynamic".
        rows, columns, width: of the product.
        item: bytes of an activation as it is multiplied.
        group: of weights in 4 bits, which is the depth of a step; 0 for weights in 8.
        units: multiprocessors of the device.
        shared: bytes of shared memory that a program may take.
        wide: whether matrix units read operands from there (sm_90 and later), which leaves
            registers to a sum twice as large.
        apart: whether they write sums to a memory of their own (sm_100), from which the sum of each
            group has to be read back.
    """
    largest = _LARGEST.get(kind, 128 * 256 if wide else 128 * 128)
    if (group and apart) or (item == 4 and not wide):
        largest = 64 * 64
    if group and item == 4:
        largest = 32 * 64
    depth = group or min(max(128 // item, 32), max(triton.next_power_of_2(width), 32))
    bound = next((most for most in _SIZES if rows <= most), max(_SIZES))
    for most in sorted((m for m in _SIZES if m <= bound), reverse=True):
        found = []
        for m, n, warps in _SIZES[most]:
            stages = min(_STAGES, _stages(kind, m, n, depth, item, shared))
            if m * n > largest or stages < 2:
                continue
            if group and m * n >= 64 * 64:  # beside two sums the levels that are being unpacked
                warps = 8
            programs = -(-rows // m) * -(-columns // n)
            split = _pieces(programs, -(-width // depth), units)
            found.append(Tile(m, n, depth, warps, stages, split))
        if found:
            return found
    raise ValueError(f"no tile fits in {shared} bytes of shared memory")


def _stages(kind: str, m: int, n: int, depth: int, item: int, shared: int) -> int:
    """How many steps' operands fit, beside the weights of one as they are multiplied."""
    if kind in ("int8", "float8"):
        return shared // ((m + n) * depth * item)
    weights = n * depth // (2 if kind.startswith("int4") else 1)
    return (shared - n * depth * item) // (m * depth * item + weights)


def _pieces(programs: int, steps: int, units: int) -> int:
    """How many programs share a sum: so many that each multiprocessor has one or two, where fewer
    than half of them had one."""
    if 2 * programs > units:
        return 1
    split = 1
    while split < _MOST_PIECES and programs * split <= units and steps >= 2 * split * _FEW:
        split *= 2
    return split


def _vector_tile(kind: str, columns: int, size: int, groups: int) -> dict[str, int]:
    """Columns and groups of a program of one row: 4 kB of weights a step, more programs than
    multiprocessors."""
    own = 4 if columns < 8192 else 8
    bytes_ = size // 2 if kind == "int4" else size
    side = min(max(4096 // (own * bytes_), 1), triton.next_power_of_2(groups))
    return {"BN": own, "BG": side, "num_warps": 4}


# Calls -------------------------------------------------------------------------------------------


class Behind(NamedTuple):
    """What follows a product.

    Args:
        scale: [n] or None.
        steps: [1 or 3, rows], as `rows_triton` gives them, or None.
        sums: [n] int32, of the weights' rows, where a was levels less 128.
        bias: [n] or None.
        then: an activation or "".
        add: [rows, n] whose columns are neighbours, or None.
        factor: of all.
    """

    scale: Tensor | None
    steps: Tensor | None = None
    sums: Tensor | None = None
    bias: Tensor | None = None
    then: str = ""
    add: Tensor | None = None
    factor: float = 1.0

    def tensors(self, other: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """steps, scale, sums, bias, add; `other` in the place of what there is not."""
        given = self.steps, self.scale, self.sums, self.bias, self.add
        first, *rest = (other if t is None else t for t in given)
        return first, rest[0], rest[1], rest[2], rest[3]

    @property
    def stride(self) -> int:
        return 0 if self.add is None else self.add.stride(0)

    @property
    def flags(self) -> dict[str, Any]:
        return {"BIAS": self.bias is not None, "THEN": self.then, "ADD": self.add is not None}

    @property
    def scaling(self) -> dict[str, Any]:
        return {
            "LEVELS": self.sums is not None,
            "STEPS": self.steps is not None,
            "FACTOR": self.factor,
        }


def precision(dtype: torch.dtype) -> str:
    """Of a product of floats. float32 on an NVIDIA card: x in three parts of tf32, which leaves out
    less than float32's own rounding, by weights that tf32 holds exactly."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if dtype == torch.bfloat16 and interpreted:
        return "wide"
    if dtype != torch.float32 or interpreted or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _kept(like: Tensor, rows: int, columns: int, tile: Tile, whole: bool) -> Tensor:
    """Room for the pieces of a sum."""
    dtype = torch.int32 if whole else torch.float32
    return torch.empty(tile.split, rows, columns, dtype=dtype, device=like.device)


def product(kind: str, a: Tensor, b: Tensor, behind: Behind, dtype: torch.dtype, tile: Tile,
            ) -> Tensor:  # fmt: skip
    """a [rows, k] × b [n, k]ᵀ and what follows → [rows, n] of a dtype; `kind` as of `_product`.

    Args:
        a: int8, float8_e4m3fn or floats, whose columns are neighbours.
        b: int8, float8_e4m3fn, or the bits of that as uint8, contiguous.
    """
    (rows, width), columns = a.shape, b.shape[0]
    y = torch.empty(rows, columns, dtype=dtype, device=a.device)
    to = y if tile.split == 1 else _kept(a, rows, columns, tile, kind == "int8")
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), tile.split)
    _product[grid](
        a, b, to, *behind.tensors(y), rows, columns, width, a.stride(0), b.stride(0),
        behind.stride, KIND=kind, EVEN=width % tile.depth == 0, PRECISION=precision(a.dtype),
        **behind.flags, **behind.scaling, **tile.arguments,
    )  # fmt: skip
    return y if tile.split == 1 else finish(to, behind, y)


def grouped(
    a: Tensor,
    steps: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    behind: Behind,
    dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    """a [rows, k] × 4-bit weights and what follows → [rows, n] of a dtype.

    Args:
        a: floats; int8 with `steps` [rows, groups].
        packed, scale, zero: contiguous, as of `int4_linear`.
        behind: without scale, steps and sums.
    """
    (rows, width), (columns, groups) = a.shape, scale.shape
    y = torch.empty(rows, columns, dtype=dtype, device=a.device)
    to = y if tile.split == 1 else _kept(a, rows, columns, tile, False)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), tile.split)
    *_, bias, add = behind.tensors(y)
    size = 2 * packed.shape[1] // groups
    _grouped[grid](
        a, packed, to, y if steps is None else steps, scale, y if zero is None else zero, bias, add,
        rows, columns, width, groups, a.stride(0), behind.stride,
        SIZE=size, DYNAMIC=steps is not None, ZERO=zero is not None, EVEN=width % size == 0,
        PRECISION=precision(a.dtype), **behind.flags, **tile.arguments,
    )  # fmt: skip
    return y if tile.split == 1 else finish(to, behind, y)


_STEP = 32
"""Weights of 8 bits that a thread of `vector` reads at once, twice."""


def vector(
    kind: str, a: Tensor, b: Tensor, scale: Tensor, zero: Tensor | None, behind: Behind,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """One row by weights → [1, n]: kind "int4", "int8 weight" or "float8 weight"."""
    width, columns = a.shape[1], b.shape[0]
    y = torch.empty(1, columns, dtype=dtype, device=a.device)
    four = kind == "int4"
    groups = scale.shape[1] if four else -(-width // _STEP)
    size = 2 * b.shape[1] // groups if four else _STEP
    tile = _vector_tile(kind, columns, size, groups)
    *_, bias, add = behind.tensors(y)
    _vector[(triton.cdiv(columns, tile["BN"]),)](
        a, b, y, scale, y if zero is None else zero, bias, add, columns, width, groups, b.stride(0),
        KIND=kind, SIZE=size, ZERO=zero is not None, FACTOR=behind.factor, **behind.flags, **tile,
    )  # fmt: skip
    return y


def dense(
    kind: str,
    b: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of kind "int4", "int8 weight" or "float8 weight" as floats, [n, width]."""
    columns = b.shape[0]
    y = torch.empty(columns, width, dtype=dtype, device=b.device)
    groups = scale.shape[1] if kind == "int4" else 1
    factor = E4M3 if kind == "float8 weight" else 1.0
    _dense[(triton.cdiv(columns, 8), triton.cdiv(width, 512))](
        b, y, scale, y if zero is None else zero, columns, width, groups, b.stride(0),
        KIND=kind, SIZE=2 * b.shape[1] // groups, ZERO=zero is not None, FACTOR=factor, BN=8, BK=512
    )  # fmt: skip
    return y


def finish(pieces: Tensor, behind: Behind, y: Tensor) -> Tensor:
    """What follows the sum of pieces [*, rows, n] int32 or float32, written to y [rows, n]."""
    rows, columns = y.shape
    tile = {"BM": 1, "BN": 1024} if rows < 8 else {"BM": 8, "BN": 256}
    grid = (triton.cdiv(rows, tile["BM"]), triton.cdiv(columns, tile["BN"]))
    _finish[grid](
        pieces, y, *behind.tensors(y), rows, columns, behind.stride,
        WHOLE=pieces.dtype == torch.int32, SCALED=behind.scale is not None,
        SPLIT=pieces.numel() // y.numel(), **behind.flags, **behind.scaling, **tile,
    )  # fmt: skip
    return y
