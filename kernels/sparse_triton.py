"""Triton kernels that multiply by the weights of active inputs alone, for CUDA and ROCm.

    kth       of each row the k-th largest score, and how many of those tied with it are active
    count     how many blocks of neighbours are active in any row, tile by tile
    compact   the list of active inputs, those of any row, in ascending order; beside it x [rows, ·]
              at these inputs, 0 where a row has them inactive; and how long the list is
    neurons   x at the list's places times what rows of another weight give there: of a gated MLP
              act(gate) ∘ up
    product   Σ over the list of x[r, i]·weight[i, n], cut in pieces, float32
    masked    x with zeros where it is not active, for a dense product

`product_triton.finish` adds up the pieces in order, scales, and adds the bias. No number reaches
the host: the list has room for all inputs, and `product` loads its length, of which every piece
takes an equal part. So nothing waits, launches may be recorded in a CUDA graph, any length is
right, and results do not depend on which program was first.

Scores are compared as keys: the bits of a float32 ≥ 0 as an integer, which is in the same order;
all NaN are one key, above infinity. A row's selection is a pair (cut, last): active are the blocks
g whose key is above the cut, or is the cut where g < last. Formulas are those of `sparse.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewriter.kernels.product_triton import Behind, dot, finish, precision
from rewriter.kernels.sparse_cpu import Select

__all__ = [
    "KERNELS",
    "MOST_BLOCK",
    "Tile",
    "compacted",
    "gated",
    "masked",
    "neuron_tile",
    "product",
    "tiles",
]


# Selection


@triton.jit  # type: ignore[untyped-decorator]
def _keys(
    x, importance, m, g, rows, groups, stride_x,
    WEIGHTED: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The largest key of each row and block [M, G], −1 outside; the inputs of a block [G, B], which
    of them there are, and x there [M, G, B]."""
    j = tl.arange(0, B)
    i = g[:, None] * SIZE + j[None, :]
    there = (g < groups)[:, None] & (j < SIZE)[None, :]
    inside = (m < rows)[:, None, None] & there[None, :, :]
    at = x + m.to(tl.int64)[:, None, None] * stride_x + i[None, :, :]
    v = tl.load(at, mask=inside, other=0.0)
    score = tl.abs(v.to(tl.float32))
    if WEIGHTED:
        score = score * tl.load(importance + i, mask=there, other=0.0)[None, :, :]
    key = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    key = tl.where(key > 0x7F800000, 0x7FC00000, key)
    return tl.max(tl.where(inside, key, -1), 2), i, there, v


@triton.jit  # type: ignore[untyped-decorator]
def _active(keys, cuts, threshold, m, g, rows, BY_RANK: tl.constexpr):
    """Which blocks of each row are active [M, G]; none whose key is −1."""
    if BY_RANK:
        cut = tl.load(cuts + m, mask=m < rows, other=0)[:, None]
        last = tl.load(cuts + rows + m, mask=m < rows, other=0)[:, None]
        found = (keys > cut) | ((keys == cut) & (g[None, :] < last))
    else:
        t = tl.load(threshold).to(tl.float32)
        least = tl.where(t > 0.0, t.to(tl.int32, bitcast=True), 0)  # below 0, and NaN: all
        found = keys >= least
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _kth(
    x, importance, cuts, rows, groups, stride_x, k,
    WEIGHTED: tl.constexpr, LOW: tl.constexpr, ONCE: tl.constexpr,
    SIZE: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """cuts [2, rows]: bit by bit from the highest on, the largest key that k blocks reach. LOW:
    lower bits are 0 in all keys. ONCE: a row is one tile, which stays in registers."""
    r = tl.program_id(0)
    m, places = r + tl.arange(0, 1), tl.arange(0, G)
    keys, _, _, _ = _keys(x, importance, m, places, rows, groups, stride_x, WEIGHTED, SIZE, B)
    cut = 0
    for step in range(31 - LOW):
        more = cut | (1 << (30 - step))
        reach = tl.sum((keys >= more).to(tl.int32))
        if not ONCE:
            for start in range(G, groups, G):
                others, _, _, _ = _keys(
                    x, importance, m, start + places, rows, groups, stride_x, WEIGHTED, SIZE, B
                )
                reach += tl.sum((others >= more).to(tl.int32))
        cut = tl.where(reach >= k, more, cut)
    above = tl.sum((keys > cut).to(tl.int32))
    if not ONCE:
        for start in range(G, groups, G):
            others, _, _, _ = _keys(
                x, importance, m, start + places, rows, groups, stride_x, WEIGHTED, SIZE, B
            )
            above += tl.sum((others > cut).to(tl.int32))
    # of the tied blocks the first k − above: those before the place where there are that many
    tied = tl.sum((keys == cut).to(tl.int32), 0)
    last = tl.sum((tl.cumsum(tied, 0) < k - above).to(tl.int32)) + 1
    if not ONCE:
        passed = tl.sum(tied, 0)
        for start in range(G, groups, G):
            others, _, _, _ = _keys(
                x, importance, m, start + places, rows, groups, stride_x, WEIGHTED, SIZE, B
            )
            tied = tl.sum((others == cut).to(tl.int32), 0)
            last += tl.sum((passed + tl.cumsum(tied, 0) < k - above).to(tl.int32))
            passed += tl.sum(tied, 0)
    tl.store(cuts + r, cut)
    tl.store(cuts + rows + r, last)


@triton.jit  # type: ignore[untyped-decorator]
def _count(
    x, importance, cuts, threshold, counts, rows, groups, stride_x,
    BY_RANK: tl.constexpr, WEIGHTED: tl.constexpr,
    M: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    m, g = tl.arange(0, M), tile * G + tl.arange(0, G)
    keys, _, _, _ = _keys(x, importance, m, g, rows, groups, stride_x, WEIGHTED, SIZE, B)
    found = _active(keys, cuts, threshold, m, g, rows, BY_RANK)
    tl.store(counts + tile, tl.sum(tl.max(found.to(tl.int32), 0), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _compact(
    x, importance, cuts, threshold, counts, inputs, values, length,
    rows, groups, stride_x,
    BY_RANK: tl.constexpr, WEIGHTED: tl.constexpr, ALONE: tl.constexpr, TILES: tl.constexpr,
    M: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """inputs [width] and values [rows, width], of which the first length[0] columns are written.
    ALONE: one tile holds all; else TILES ≥ the number of `counts`."""
    tile = tl.program_id(0)
    m, g = tl.arange(0, M), tile * G + tl.arange(0, G)
    keys, i, there, v = _keys(x, importance, m, g, rows, groups, stride_x, WEIGHTED, SIZE, B)
    found = _active(keys, cuts, threshold, m, g, rows, BY_RANK)
    chosen = tl.max(found.to(tl.int32), 0)
    before = 0
    if not ALONE:
        t = tl.arange(0, TILES)
        before = tl.sum(tl.load(counts + t, mask=t < tile, other=0), 0)
    rank = before + tl.cumsum(chosen, 0) - chosen
    to = rank[:, None] * SIZE + tl.arange(0, B)[None, :]
    own = there & (chosen > 0)[:, None]
    tl.store(inputs + to, i, mask=own)
    at = values + m.to(tl.int64)[:, None, None] * (groups * SIZE) + to[None, :, :]
    kept = tl.where(found[:, :, None], v, tl.zeros_like(v))
    tl.store(at, kept, mask=own[None, :, :] & (m < rows)[:, None, None])
    if tile == tl.num_programs(0) - 1:
        tl.store(length, (before + tl.sum(chosen, 0)) * SIZE)


@triton.jit  # type: ignore[untyped-decorator]
def _masked(
    x, importance, cuts, threshold, y, rows, groups, stride_x,
    BY_RANK: tl.constexpr, WEIGHTED: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    m, g = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1) * G + tl.arange(0, G)
    keys, i, there, v = _keys(x, importance, m, g, rows, groups, stride_x, WEIGHTED, SIZE, B)
    found = _active(keys, cuts, threshold, m, g, rows, BY_RANK)
    at = y + m.to(tl.int64)[:, None, None] * (groups * SIZE) + i[None, :, :]
    tl.store(at, tl.where(found[:, :, None], v, tl.zeros_like(v)), mask=there[None, :, :])


# Products


@triton.jit  # type: ignore[untyped-decorator]
def _neurons(
    inputs, values, length, x, weight, bias, rows, width, hidden, stride_x,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """values[r, e] ·= Σ_k x[r, k]·weight[i, k] + bias[i], i = inputs[e]. BM as of `_product`."""
    total = tl.load(length)
    first = tl.program_id(0) * BN
    e = first + tl.arange(0, BN)
    here = e < total
    i = tl.load(inputs + e, mask=here, other=0)
    m = tl.arange(0, BM)
    acc = tl.zeros([BN, BK] if BM == 1 else [BM, BN], tl.float32)
    for start in range(0, tl.where(first < total, width, 0), BK):
        k = start + tl.arange(0, BK)
        inside = here[:, None] & (k < width)[None, :]
        w = tl.load(weight + i.to(tl.int64)[:, None] * width + k[None, :], mask=inside, other=0.0)
        own = (m < rows)[:, None] & (k < width)[None, :]
        v = tl.load(x + m[:, None] * stride_x + k[None, :], mask=own, other=0.0)
        if BM == 1:
            acc += w.to(tl.float32) * v.to(tl.float32)
        else:
            acc = dot(v, tl.trans(w), acc, PRECISION)
    y = tl.sum(acc, 1)[None, :] if BM == 1 else acc
    if BIAS:
        y += tl.load(bias + i, mask=here, other=0.0).to(tl.float32)[None, :]
    at = values + m[:, None] * hidden + e[None, :]
    own = (m < rows)[:, None] & here[None, :]
    y = y * tl.load(at, mask=own, other=0.0).to(tl.float32)
    tl.store(at, y.to(values.dtype.element_ty), mask=own)


@triton.jit  # type: ignore[untyped-decorator]
def _product(
    inputs, values, length, weight, pieces, rows, width, columns,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """pieces [programs, rows, columns]. BM = 1: one row without a matrix unit, in BK sums that are
    added at the end; else 16 rows."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.load(length)
    each = tl.cdiv(tl.cdiv(total, BK), tl.num_programs(1)) * BK
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, total)
    m = tl.arange(0, BM)
    acc = tl.zeros([BK if BM == 1 else BM, BN], tl.float32)
    for start in range(first, last, BK):
        e = start + tl.arange(0, BK)
        i = tl.load(inputs + e, mask=e < last, other=0).to(tl.int64)
        inside = (e < last)[:, None] & (n < columns)[None, :]
        w = tl.load(weight + i[:, None] * columns + n[None, :], mask=inside, other=0)
        if BM == 1:
            v = tl.load(values + e, mask=e < last, other=0.0).to(tl.float32)
            acc += v[:, None] * w.to(tl.float32)
        else:
            own = (m < rows)[:, None] & (e < last)[None, :]
            v = tl.load(values + m[:, None] * width + e[None, :], mask=own, other=0.0)
            if w.dtype == tl.int8:
                w = w.to(tl.float32 if PRECISION == "wide" else v.dtype)
            acc = dot(v, w, acc, PRECISION)
    to = pieces + tl.program_id(1).to(tl.int64) * rows * columns
    if BM == 1:
        tl.store(to + n, tl.sum(acc, 0), mask=n < columns)
    else:
        own = (m < rows)[:, None] & (n < columns)[None, :]
        tl.store(to + m[:, None] * columns + n[None, :], acc, mask=own)


KERNELS: Mapping[str, Any] = {
    "kth": _kth,
    "count": _count,
    "compact": _compact,
    "masked": _masked,
    "neurons": _neurons,
    "product": _product,
}


# Sizes -------------------------------------------------------------------------------------------

MOST_BLOCK = 128
"""Neighbours that are active together, at most: a block lies within a program's registers."""
_ROW = 16384
"""Entries of a row among which one program finds the k-th."""
_ENTRIES = 4096
"""Entries of a program's tile, of all rows together, where the list is made."""
_SUMS = 8192
"""Of a program, in registers, at most."""
_MOST_PIECES, _PROGRAMS = 16, 3
"""Pieces of a sum; and programs per multiprocessor that it is cut for."""
_LOWEST_BIT = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Of the float32 that such a number becomes, the lowest bit that is not 0 always."""


class Tile(NamedTuple):
    """What a program of `product` computes, and how many share a sum."""

    columns: int
    depth: int
    warps: int = 4
    split: int = 1

    def __str__(self) -> str:
        return f"{self.columns}x{self.depth}/{self.split}"


def tiles(rows: int, columns: int, item: int, units: int = 132) -> list[Tile]:
    """The tiles that may be the fastest for a weight [*, columns] of items of so many bytes, the
    likeliest first.

    Of one row of the weight a program reads 512 bytes, or 256: a warp reads 16 bytes a thread.

    Args:
        units: multiprocessors of the device.
    """
    found = []
    for bytes_, depth in ((512, 32), (256, 64), (512, 16), (256, 32)):
        side = min(bytes_ // item, _SUMS // depth, max(triton.next_power_of_2(columns), 16))
        split = 1
        while split < _MOST_PIECES and -(-columns // side) * split < _PROGRAMS * units:
            split *= 2
        found.append(Tile(side, depth, 4, split))
    return list(dict.fromkeys(found))


def neuron_tile(rows: int, width: int, item: int) -> dict[str, int]:
    """Neurons and inputs of a program of `neurons`: few of the ones, as there are not many."""
    wide = max(triton.next_power_of_2(width), 16)
    if rows == 1:
        return {"BM": 1, "BN": 4, "BK": min(2048 // item, wide), "num_warps": 4}
    return {"BM": 16, "BN": 16, "BK": min(256 // item, wide), "num_warps": 4}


def _constants(select: Select) -> dict[str, Any]:
    """SIZE of a block, B entries that it takes of a tile, and whether scores are WEIGHTED."""
    return {
        "SIZE": select.block,
        "B": triton.next_power_of_2(select.block),
        "WEIGHTED": select.importance is not None,
    }


def _warps(entries: int) -> int:
    return min(max(entries // 512, 1), 16)


# Calls -------------------------------------------------------------------------------------------


def _cuts(x: Tensor, select: Select) -> tuple[Tensor, Tensor, Tensor]:
    """importance, cuts [2, rows] int32, and threshold; what there is not is another tensor."""
    rows, width = x.shape
    importance = x if select.importance is None else select.importance
    if not select.k:
        threshold = select.threshold
        if not isinstance(threshold, Tensor):
            threshold = torch.full((1,), threshold, device=x.device)
        return importance, x, threshold
    cuts = torch.empty(2, rows, dtype=torch.int32, device=x.device)
    own, groups = _constants(select), width // select.block
    places = min(triton.next_power_of_2(groups), max(_ROW // own["B"], 1))
    _kth[(rows,)](
        x, importance, cuts, rows, groups, x.stride(0), k=-(-select.k // select.block),
        LOW=0 if select.importance is not None else _LOWEST_BIT[x.dtype],
        ONCE=groups <= places, G=places, num_warps=_warps(places * own["B"]), **own,
    )  # fmt: skip
    return importance, cuts, cuts


class Compacted(NamedTuple):
    """inputs [width] int32 and values [rows, width], of which the first length [1] count."""

    inputs: Tensor
    values: Tensor
    length: Tensor


def compacted(x: Tensor, select: Select) -> Compacted:
    """The inputs that are active in any row, in ascending order, and x there.

    Args:
        x: [rows ≤ 16, width] floats of 16 or 32 bits, whose columns are neighbours; not empty.
        select: its block divides the width, and is `MOST_BLOCK` at most.
    """
    rows, width = x.shape
    inputs, length = (x.new_empty(n, dtype=torch.int32) for n in (width, 1))
    values = x.new_empty(rows, width)
    own, groups = _constants(select), width // select.block
    side = triton.next_power_of_2(rows)
    places = min(triton.next_power_of_2(groups), max(_ENTRIES // (side * own["B"]), 1))
    number = triton.cdiv(groups, places)
    importance, cuts, threshold = _cuts(x, select)
    given: dict[str, Any] = {
        **own, "BY_RANK": bool(select.k), "M": side, "G": places,
        "num_warps": _warps(side * places * own["B"]),
    }  # fmt: skip
    sizes = rows, groups, x.stride(0)
    counts = inputs
    if number > 1:
        counts = x.new_empty(number, dtype=torch.int32)
        _count[(number,)](x, importance, cuts, threshold, counts, *sizes, **given)
    _compact[(number,)](
        x, importance, cuts, threshold, counts, inputs, values, length, *sizes,
        ALONE=number == 1, TILES=triton.next_power_of_2(number), **given,
    )  # fmt: skip
    return Compacted(inputs, values, length)


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    select: Select,
    tile: Tile,
) -> Tensor:
    """x_S @ weight (·scale) + bias → [rows, out] in x's dtype; only rows of the weight that are
    active in some row of x are read.

    Args:
        x, select: as of `compacted`.
        weight: [in, out] of x's dtype or int8, contiguous.
        scale: [out] of an int8 weight, else None; bias: [out] or None; contiguous.
    """
    return _summed(compacted(x, select), weight, scale, bias, tile)


def _summed(
    found: Compacted, weight: Tensor, scale: Tensor | None, bias: Tensor | None, tile: Tile
) -> Tensor:
    x = found.values
    (rows, width), columns = x.shape, weight.shape[1]
    pieces = torch.empty(tile.split, rows, columns, dtype=torch.float32, device=x.device)
    _product[(triton.cdiv(columns, tile.columns), tile.split)](
        *found, weight, pieces, rows, width, columns,
        PRECISION=precision(x.dtype), BM=1 if rows == 1 else 16, BN=tile.columns, BK=tile.depth,
        num_warps=tile.warps,
    )  # fmt: skip
    return finish(pieces, Behind(scale, bias=bias), x.new_empty(rows, columns))


def gated(
    x: Tensor,
    a: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    bias: Tensor | None,
    select: Select,
    tile: Tile,
) -> Tensor:
    """(a_S ∘ (x upᵀ + up_bias)) down + bias → [rows, out]; of `up` and `down` only rows that are
    active in some row of a are read.

    Args:
        x: [rows ≤ 16, in], whose columns are neighbours.
        a, select: as of `compacted`, [rows, hidden].
        up: [hidden, in] and down [hidden, out], of x's dtype, contiguous; their biases or None.
    """
    found = compacted(a, select)
    (rows, width), hidden = x.shape, up.shape[0]
    own = neuron_tile(rows, width, x.itemsize)
    _neurons[(triton.cdiv(hidden, own["BN"]),)](
        *found, x, up, up if up_bias is None else up_bias, rows, width, hidden, x.stride(0),
        BIAS=up_bias is not None, PRECISION=precision(x.dtype), **own,
    )  # fmt: skip
    return _summed(found, down, None, bias, tile)


def masked(x: Tensor, select: Select) -> Tensor:
    """x [rows, width] with zeros where it is not active; any number of rows, else as of
    `compacted`."""
    rows, width = x.shape
    y = x.new_empty(rows, width)
    importance, cuts, threshold = _cuts(x, select)
    own, groups = _constants(select), width // select.block
    places = min(triton.next_power_of_2(groups), max(2048 // own["B"], 1))
    _masked[(rows, triton.cdiv(groups, places))](
        x, importance, cuts, threshold, y, rows, groups, x.stride(0), BY_RANK=bool(select.k),
        G=places, num_warps=_warps(places * own["B"]), **own,
    )  # fmt: skip
    return y
