"""Triton kernels that round activations to 8 bits, for CUDA and ROCm: one pass over x each.

    levels    q[m,k] − 128 in int8, q = round((x − lo_m)/s_m) as `int8_linear` has it, or
              ⌊x·multiplier/s + zero + ½⌋ as `int8_static`: matrix units multiply signed by signed
    float8    e4m3(x/s_m), s_m = max |x|/448, as `float8_linear` has it
    groups    round(x/s), s = max |x|/127 over each group of a row, as `weight_only` has it

What a product needs of the rows lies in `steps`, [3, rows] float32: s, lo, and the level that
stands for 0 where lo is not used. In a row that is not finite s is NaN, and so is what is
multiplied by it. Divisions are IEEE's and halves go to even, so that the levels are those of the
formulas in float32, each one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["KERNELS", "float8_of_rows", "groups_of_rows", "levels_of_rows", "range_of", "row_tile"]


@triton.jit
def _nearest(x):
    """Whole numbers, halves to even, of |x| < 2²²: there float32 has no bits behind the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _e4m3(x):
    """The bits of the float8 nearest to x, |x| ≤ 448, halves to even: a cast to that type is not to
    be had on every device, and not the same on all."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = _nearest(tl.abs(x) * 512.0).to(tl.int32)  # below 2⁻⁶ levels are 2⁻⁹ apart
    size = tl.where(tl.abs(x) < 0.015625, small, normal)
    return (size | tl.where(x < 0.0, 128, 0)).to(tl.uint8)


@triton.jit
def _loaded(x, m, k, rows, width, stride_x):
    """x[m, k] in float32, 0 outside; and what is inside."""
    inside = (m < rows)[:, None] & (k < width)[None, :]
    at = x + m[:, None].to(tl.int64) * stride_x + k[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def _step_between(low, high):
    """(hi − lo + ε)/255 times a part of 1, or of a quarter where the range is beyond float32; and
    the part."""
    part = tl.where(high - low <= 3.4028234663852886e38, 1.0, 0.25)
    return tl.div_rn(high * part - low * part + 1e-8 * part, 255.0), part


@triton.jit  # type: ignore[untyped-decorator]
def _range_of_tensor(low, high, given, FLOAT8: tl.constexpr):
    """given = (s, lo, zero, part) of one range for all of x, with 0 in it."""
    first, last = tl.load(low).to(tl.float32), tl.load(high).to(tl.float32)
    spoiled = first * 0.0 + last * 0.0  # NaN where something is not finite
    if FLOAT8:
        most = tl.maximum(tl.abs(first), tl.abs(last))
        s = tl.div_rn(most, 448.0)
        tl.store(given, tl.where(s == 0.0, 1.0, s) + spoiled)
    else:
        step, part = _step_between(tl.minimum(first, 0.0), tl.maximum(last, 0.0))
        s = tl.div_rn(step, part)
        zero = _nearest(tl.div_rn(-tl.minimum(first, 0.0), s))
        tl.store(given, s + spoiled)
        tl.store(given + 1, -s * zero)
        tl.store(given + 2, zero)
        tl.store(given + 3, part)


@triton.jit
def _extremes(v, own, least, most, spoiled):
    """Least and greatest values so far, column by column, and NaN where one is not finite."""
    least = tl.minimum(least, tl.where(own, v, float("inf")))
    most = tl.maximum(most, tl.where(own, v, float("-inf")))
    return least, most, spoiled + tl.sum(v * 0.0, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _store_levels(v, own, at, s, low, step, part, point, STATIC: tl.constexpr):
    if STATIC:
        level = tl.floor(v * tl.div_rn(1.0, s)[:, None] + (point + 0.5)[:, None])
    else:
        level = _nearest(tl.div_rn(v * part[:, None] - (low * part)[:, None], step[:, None]))
    level = tl.minimum(tl.maximum(level, 0.0), 255.0)
    tl.store(at, (level.to(tl.int32) - 128).to(tl.int8), mask=own)


@triton.jit  # type: ignore[untyped-decorator]
def _levels(
    x, q, steps, given, zero, multiplier, rows, width, stride_x,
    RANGE: tl.constexpr, HAS_MULTIPLIER: tl.constexpr, ONCE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RANGE "token": of each row; "tensor": `given` has it; "static": given is the step, `zero` the
    level of 0. ONCE: a row is one block, which stays in registers."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = m < rows
    nothing = tl.zeros([ROWS], tl.float32)
    spoiled, s, low, step, point = nothing, nothing, nothing, nothing, nothing
    part = nothing + 1.0
    v, own = _loaded(x, m, tl.arange(0, BLOCK), rows, width, stride_x)
    if RANGE == "token":
        least = tl.where(own, v, float("inf"))
        most = tl.where(own, v, float("-inf"))
        spoiled = tl.sum(v * 0.0, 1)
        if not ONCE:
            for start in range(BLOCK, width, BLOCK):
                w, other = _loaded(x, m, start + tl.arange(0, BLOCK), rows, width, stride_x)
                least, most, spoiled = _extremes(w, other, least, most, spoiled)
        low = tl.min(least, 1)
        step, part = _step_between(low, tl.max(most, 1))
        s = tl.div_rn(step, part)
    elif RANGE == "tensor":
        s += tl.load(given)
        low += tl.load(given + 1)
        point += tl.load(given + 2)
        part = part * tl.load(given + 3)
        step = s * part
    else:
        s += tl.load(given).to(tl.float32)
        point += tl.load(zero).to(tl.float32)
    to = q + m[:, None].to(tl.int64) * width
    for start in range(0, BLOCK if ONCE else width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        if not ONCE:
            v, own = _loaded(x, m, k, rows, width, stride_x)
        if HAS_MULTIPLIER:
            times = tl.load(multiplier + k, mask=k < width, other=0.0).to(tl.float32)
            v = v * times[None, :]
        if RANGE == "static":
            spoiled += tl.sum(v * 0.0, 1)
        _store_levels(v, own, to + k[None, :], s, low, step, part, point, RANGE == "static")
    tl.store(steps + m, s + spoiled, mask=inside)
    tl.store(steps + rows + m, low if RANGE == "token" else nothing, mask=inside)
    tl.store(steps + 2 * rows + m, point, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _float8(
    x, q, steps, given, rows, width, stride_x,
    RANGE: tl.constexpr, ONCE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s = tl.zeros([ROWS], tl.float32)
    v, own = _loaded(x, m, tl.arange(0, BLOCK), rows, width, stride_x)
    if RANGE == "token":
        most = tl.abs(v)
        spoiled = tl.sum(v * 0.0, 1)
        if not ONCE:
            for start in range(BLOCK, width, BLOCK):
                w, _ = _loaded(x, m, start + tl.arange(0, BLOCK), rows, width, stride_x)
                most = tl.maximum(most, tl.abs(w))
                spoiled += tl.sum(w * 0.0, 1)
        s = tl.div_rn(tl.max(most, 1), 448.0)
        s = tl.where(s == 0.0, 1.0, s) + spoiled
    else:
        s += tl.load(given)
    to = q + m[:, None].to(tl.int64) * width
    for start in range(0, BLOCK if ONCE else width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        if not ONCE:
            v, own = _loaded(x, m, k, rows, width, stride_x)
        level = tl.minimum(tl.maximum(tl.div_rn(v, s[:, None]), -448.0), 448.0)
        tl.store(to + k[None, :], _e4m3(level), mask=own)
    tl.store(steps + m, s, mask=m < rows)


@triton.jit  # type: ignore[untyped-decorator]
def _groups(
    x, q, steps, count, groups, width, stride_x,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`count` groups of all rows together."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = index // groups
    k = ((index % groups) * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
    own = (index < count)[:, None] & (k < width)
    v = tl.load(x + m[:, None] * stride_x + k, mask=own, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(v), 1)
    some = most >= 1e-30
    inverse = tl.div_rn(1.0, tl.where(some, most, 1.0)) * 127.0  # as torch has 127/most
    level = tl.where(some[:, None], _nearest(v * inverse[:, None]), 0.0)
    s = tl.where(some, tl.div_rn(most, 127.0), 0.0) + tl.sum(v * 0.0, 1)
    tl.store(q + m[:, None] * width + k, level.to(tl.int8), mask=own)
    tl.store(steps + index, s, mask=index < count)


KERNELS: Mapping[str, Any] = {
    "levels": _levels,
    "float8": _float8,
    "groups": _groups,
    "range": _range_of_tensor,
}

_TILE, _BLOCK = 2048, 8192
_AS_WRITTEN = {"enable_fp_fusion": False}
"""A product and a sum are rounded one after the other, as in the formulas."""


def row_tile(width: int) -> dict[str, int]:
    """Rows and columns of a program's tile: whole rows up to 8192 wide, several of narrow ones."""
    block = min(max(triton.next_power_of_2(width), 32), _BLOCK)
    warps = 8 if block > _TILE else 4
    return {"ROWS": max(_TILE // block, 1), "BLOCK": block, "num_warps": warps}


def levels_of_rows(
    x: Tensor,
    activation: str,
    step: Tensor | None = None,
    zero: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q − 128 int8 [rows, k], and steps [3, rows].

    Args:
        x: [rows, k], whose columns are neighbours; not empty.
        activation: "per_token", "per_tensor", or "" beside a range that is fixed.
        step, zero, multiplier: that range, as of `int8_static_linear`; "per_tensor", step may be
            what `range_of` found of more than x.
    """
    rows, width = x.shape
    q = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    steps = torch.empty(3, rows, dtype=torch.float32, device=x.device)
    size = row_tile(width)
    which = {"per_token": "token", "per_tensor": "tensor"}.get(activation, "static")
    given = steps if which == "token" else step
    if which == "tensor" and given is None:
        given = range_of(x)
    assert given is not None
    _levels[(triton.cdiv(rows, size["ROWS"]),)](
        x, q, steps, given, given if zero is None else zero,
        x if multiplier is None else multiplier, rows, width, x.stride(0), RANGE=which,
        HAS_MULTIPLIER=multiplier is not None, ONCE=width <= size["BLOCK"], **size, **_AS_WRITTEN,
    )  # fmt: skip
    return q, steps


def float8_of_rows(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """q [rows, k], the bits of float8_e4m3fn, and steps [1, rows]; x as of `levels_of_rows`."""
    rows, width = x.shape
    q = torch.empty(rows, width, dtype=torch.uint8, device=x.device)
    steps = torch.empty(1, rows, dtype=torch.float32, device=x.device)
    size, token = row_tile(width), activation == "per_token"
    _float8[(triton.cdiv(rows, size["ROWS"]),)](
        x, q, steps, steps if token else range_of(x, float8=True), rows, width, x.stride(0),
        RANGE="token" if token else "tensor", ONCE=width <= size["BLOCK"], **size, **_AS_WRITTEN,
    )  # fmt: skip
    return q, steps


def groups_of_rows(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """q int8 [rows, k], and the scale of each group [rows, groups] float32.

    Args:
        x: as of `levels_of_rows`.
        size: of a group, a power of two.
    """
    (rows, width), groups = x.shape, -(-x.shape[1] // size)
    q = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    steps = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    each = _TILE // size
    _groups[(triton.cdiv(rows * groups, each),)](
        x, q, steps, rows * groups, groups, width, x.stride(0), SIZE=size, ROWS=each, **_AS_WRITTEN
    )
    return q, steps


def range_of(x: Tensor, float8: bool = False) -> Tensor:
    """One range for all of x, as `_range_of_tensor` writes it; nothing of it reaches the host."""
    low, high = torch.aminmax(x)
    given = torch.empty(4, dtype=torch.float32, device=x.device)
    _range_of_tensor[(1,)](low, high, given, FLOAT8=float8, **_AS_WRITTEN)
    return given
