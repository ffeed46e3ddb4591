"""Triton kernels of `kernels/monarch.py`, for CUDA and ROCm; its letters and layouts.

Forward and the gradient of x are one kernel each for both factors: a program computes the rank-R
middle of its tile and multiplies it on at once, so that what lies between the factors is written
only where training keeps it. Sums are float32 whatever the dtype; float32 products are exact
(IEEE), not TF32, unless `torch.backends.cuda.matmul.allow_tf32`.

    forward   program (rows, l, s):  y[m,l,s] = Σ_kr (Σ_i x[m,k,i] right[k,r,l,i]) left[l,s,k,r]
    of x      program (rows, k, i): dx[m,k,i] = Σ_lr (Σ_s g[m,l,s] left[l,s,k,r]) right[k,r,l,i]
    weights   dright = Σ_m dmid x, dleft = Σ_m g mid: a product a block, summed in order of m

Tiles come from `tiles`, by dtype and block size, and `refusal` tells where two of torch's products
serve better: where a tile would repeat too much of the first product, or not fit. Both follow from
arithmetic and from what compilers report; no GPU speed is claimed for them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewriter.kernels.common import owned

__all__ = ["KERNELS", "monarch_backward", "monarch_forward", "refusal", "shared_bytes", "tiles"]


@triton.jit  # type: ignore[untyped-decorator]
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    x, right, left, bias, y, mid, rows, in_features, out_features, stride_x,
    K: tl.constexpr, L: tl.constexpr, R: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, STORE_MID: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    l, tile = tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    s, r = tile * BN + tl.arange(0, BN), tl.arange(0, RP)
    inside = m < rows
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(K):
        part = tl.zeros([BM, RP], tl.float32)
        for start in range(0, IB, BK):
            i = start + tl.arange(0, BK)
            column = k * IB + i
            xt = tl.load(
                x + m[:, None].to(tl.int64) * stride_x + column[None, :],
                mask=inside[:, None] & ((i < IB) & (column < in_features))[None, :], other=0.0,
            )  # fmt: skip
            rt = tl.load(
                right + (k * R * L + r[None, :] * L + l) * IB + i[:, None],
                mask=(r < R)[None, :] & (i < IB)[:, None], other=0.0,
            )  # fmt: skip
            part = _dot(xt, rt, part, PRECISION)
        middle = part.to(y.dtype.element_ty)
        if STORE_MID:
            if tile == 0:
                tl.store(
                    mid + (k * R * L + r[None, :] * L + l).to(tl.int64) * rows + m[:, None],
                    middle, mask=(r < R)[None, :] & inside[:, None],
                )  # fmt: skip
        lt = tl.load(
            left + (l * OB + s[None, :]) * (K * R) + k * R + r[:, None],
            mask=(s < OB)[None, :] & (r < R)[:, None], other=0.0,
        )  # fmt: skip
        acc = _dot(middle, lt, acc, PRECISION)
    column = s * L + l if INTERLEAVED else l * OB + s
    wanted = (s < OB) & (column < out_features)
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + m[:, None].to(tl.int64) * out_features + column[None, :],
        acc.to(y.dtype.element_ty), mask=inside[:, None] & wanted[None, :],
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _backward_x(
    g, right, left, dx, dmid, rows, in_features, out_features, stride_g,
    K: tl.constexpr, L: tl.constexpr, R: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr,
    INTERLEAVED: tl.constexpr, NEED_X: tl.constexpr, STORE_MID: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    k, tile = tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    i, r = tile * BN + tl.arange(0, BN), tl.arange(0, RP)
    inside = m < rows
    acc = tl.zeros([BM, BN], tl.float32)
    for l in range(L):
        part = tl.zeros([BM, RP], tl.float32)
        for start in range(0, OB, BK):
            s = start + tl.arange(0, BK)
            column = s * L + l if INTERLEAVED else l * OB + s
            gt = tl.load(
                g + m[:, None].to(tl.int64) * stride_g + column[None, :],
                mask=inside[:, None] & ((s < OB) & (column < out_features))[None, :], other=0.0,
            )  # fmt: skip
            lt = tl.load(
                left + (l * OB + s[:, None]) * (K * R) + k * R + r[None, :],
                mask=(s < OB)[:, None] & (r < R)[None, :], other=0.0,
            )  # fmt: skip
            part = _dot(gt, lt, part, PRECISION)
        middle = part.to(dx.dtype.element_ty)
        if STORE_MID:
            if tile == 0:
                tl.store(
                    dmid + (k * R * L + r[None, :] * L + l).to(tl.int64) * rows + m[:, None],
                    middle, mask=(r < R)[None, :] & inside[:, None],
                )  # fmt: skip
        if NEED_X:
            rt = tl.load(
                right + (k * R * L + r[:, None] * L + l) * IB + i[None, :],
                mask=(r < R)[:, None] & (i < IB)[None, :], other=0.0,
            )  # fmt: skip
            acc = _dot(middle, rt, acc, PRECISION)
    if NEED_X:
        column = k * IB + i
        tl.store(
            dx + m[:, None].to(tl.int64) * in_features + column[None, :],
            acc.to(dx.dtype.element_ty),
            mask=inside[:, None] & ((i < IB) & (column < in_features))[None, :],
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _backward_weight(
    a, b, out, rows, features, stride_b,
    A_BLOCK: tl.constexpr, A_ROW: tl.constexpr, J: tl.constexpr, W: tl.constexpr,
    B_BLOCK: tl.constexpr, B_COLUMN: tl.constexpr,
    OUT_BLOCK: tl.constexpr, OUT_A: tl.constexpr, OUT_B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[n, j, w] = Σ_m a[n, j, m] b[m, n, w]; a has rows of m, b is a matrix of features."""
    n = tl.program_id(0)
    j = tl.program_id(1) * BM + tl.arange(0, BM)
    w = tl.program_id(2) * BN + tl.arange(0, BN)
    column = n * B_BLOCK + w * B_COLUMN
    wanted = (w < W) & (column < features)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, rows, BK):
        m = start + tl.arange(0, BK)
        at = tl.load(
            a + (n * A_BLOCK + j[:, None] * A_ROW).to(tl.int64) * rows + m[None, :],
            mask=(j < J)[:, None] & (m < rows)[None, :], other=0.0,
        )  # fmt: skip
        bt = tl.load(
            b + m[:, None].to(tl.int64) * stride_b + column[None, :],
            mask=(m < rows)[:, None] & wanted[None, :], other=0.0,
        )  # fmt: skip
        acc = _dot(at, bt, acc, PRECISION)
    tl.store(
        out + n * OUT_BLOCK + j[:, None] * OUT_A + w[None, :] * OUT_B,
        acc.to(out.dtype.element_ty), mask=(j < J)[:, None] & (w < W)[None, :],
    )  # fmt: skip


KERNELS: Mapping[str, Any] = {
    "forward": _forward,
    "backward_x": _backward_x,
    "backward_weight": _backward_weight,
}


_RANKS = {2: 128, 4: 32}
"""The largest padded rank by the dtype's bytes at which no register spills, found by compiling.
Exact float32 products run without matrix units and hold their operands in registers."""

SHARED = 64 * 1024
"""Bytes of shared memory that a program may take: what gfx942 has. Of an sm_90's, three fit."""

_REPEATED = 1.4
"""Multiplications of the fused kernel over those that are needed, at most: with more, two products
one after the other are faster by construction, as they repeat nothing."""


def tiles(dtype: torch.dtype, contraction: int, width: int, rank: int) -> dict[str, int]:
    """Sizes of a program's tile: rows BM, columns BN, depth BK, padded rank RP, warps, stages.

    Args:
        dtype: of the operands.
        contraction: values that are summed in the first product (ib in the forward).
        width: columns of the second product (ob in the forward).
        rank: R.
    """
    half = dtype.itemsize <= 2
    rank_padded = max(triton.next_power_of_2(rank), 16)
    columns = min(max(triton.next_power_of_2(width), 16), 256 if half else 128)
    # The middle of a program is [BM, RP]: a large rank takes the room of rows.
    rows = 128 if half and rank_padded * columns <= 64 * 128 else 64 if rank_padded <= 128 else 32
    depth = min(max(triton.next_power_of_2(contraction), 16), 64 if half else 32)
    return {
        "BM": rows,
        "BN": columns,
        "BK": depth,
        "RP": rank_padded,
        "num_warps": 8 if rows * columns >= 128 * 128 else 4,
        "num_stages": 3 if half else 2,
    }


def shared_bytes(dtype: torch.dtype, size: Mapping[str, int]) -> int:
    """max(stages·BK·(BM+RP), RP·(BM+BN)) values: the loads ahead of the first product, or the
    operands of the second."""
    rows, rank = size["BM"], size["RP"]
    first = size["num_stages"] * size["BK"] * (rows + rank)
    return dtype.itemsize * max(first, rank * (rows + size["BN"]))


def refusal(dtype: torch.dtype, contraction: int, width: int, rank: int) -> str | None:
    """Why a fused kernel does not pay for such blocks, as for `tiles`; None where it does.

    A program multiplies RP·(ib+BN) times a row, and ⌈ob/BN⌉ of them repeat the first product, where
    R·(ib+ob) are needed.
    """
    size = tiles(dtype, contraction, width, rank)
    if size["RP"] > _RANKS[dtype.itemsize]:
        return f"rank {rank} spills registers"
    if (needed := shared_bytes(dtype, size)) > SHARED:
        return f"{needed} bytes of shared memory"
    programs = triton.cdiv(width, size["BN"])
    repeated = size["RP"] * (programs * contraction + width) / (rank * (contraction + width))
    return f"multiplies {repeated:.2g} times as often" if repeated > _REPEATED else None


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "wide"  # the interpreter multiplies the bits of bfloat16 as if they were integers
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _matrix(x: Tensor) -> Tensor:
    """[*, features] → [rows, features] with neighbouring features."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def monarch_forward(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    out_features: int,
    interleaved: bool,
    store_mid: bool,
) -> tuple[Tensor, Tensor]:
    """As `monarch_linear_train` of `kernels/monarch.py`; mid is empty without `store_mid`."""
    right, left = right.contiguous(), left.contiguous()
    (k, rl, ib), (l, ob, _) = right.shape, left.shape
    matrix = _matrix(x)
    rows = matrix.shape[0]
    y = x.new_empty(rows, out_features)
    mid = x.new_empty((k, rl, rows) if store_mid else 0)
    size = tiles(x.dtype, ib, ob, rl // l)
    if rows:
        grid = (triton.cdiv(rows, size["BM"]), l, triton.cdiv(ob, size["BN"]))
        _forward[grid](
            matrix, right, left, y if bias is None else bias, y, mid,
            rows, x.shape[-1], out_features, matrix.stride(0),
            K=k, L=l, R=rl // l, IB=ib, OB=ob, INTERLEAVED=interleaved,
            HAS_BIAS=bias is not None, STORE_MID=store_mid, PRECISION=_precision(x.dtype), **size,
        )  # fmt: skip
    return owned(y, (*x.shape[:-1], out_features)), mid


def monarch_backward(
    grad: Tensor,
    x: Tensor,
    mid: Tensor,
    right: Tensor,
    left: Tensor,
    interleaved: bool,
    need_x: bool,
    need_right: bool,
    need_left: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `monarch_linear_backward` of `kernels/monarch.py`: what is not needed is empty."""
    right, left, mid = right.contiguous(), left.contiguous(), mid.contiguous()
    (k, rl, ib), (l, ob, kr) = right.shape, left.shape
    g, matrix, rank = _matrix(grad), _matrix(x), rl // l
    rows, precision = g.shape[0], _precision(x.dtype)
    dx = x.new_empty(x.shape if need_x else 0)
    dright = torch.zeros_like(right) if need_right else x.new_empty(0)
    dleft = torch.zeros_like(left) if need_left else x.new_empty(0)
    if not rows:
        return dx, dright, dleft
    dmid = x.new_empty((k, rl, rows) if need_right else 0)
    if need_x or need_right:
        size = tiles(x.dtype, ob, ib, rank)
        columns = triton.cdiv(ib, size["BN"]) if need_x else 1
        _backward_x[(triton.cdiv(rows, size["BM"]), k, columns)](
            g, right, left, dx, dmid, rows, x.shape[-1], grad.shape[-1], g.stride(0),
            K=k, L=l, R=rank, IB=ib, OB=ob, INTERLEAVED=interleaved,
            NEED_X=need_x, STORE_MID=need_right, PRECISION=precision, **size,
        )  # fmt: skip
    size = tiles(x.dtype, rows, 128, 64)
    size = {**size, "BM": 64, "BN": 64}
    del size["RP"]
    if need_right:  # a = dmid [k, (r, l), m], b = x [m, k, i]
        _backward_weight[(k, triton.cdiv(rl, 64), triton.cdiv(ib, 64))](
            dmid, matrix, dright, rows, x.shape[-1], matrix.stride(0),
            A_BLOCK=rl, A_ROW=1, J=rl, W=ib, B_BLOCK=ib, B_COLUMN=1,
            OUT_BLOCK=rl * ib, OUT_A=ib, OUT_B=1, PRECISION=precision, **size,
        )  # fmt: skip
    if need_left:  # a = mid [(k, r), l, m], b = g [m, l, s]
        _backward_weight[(l, triton.cdiv(kr, 64), triton.cdiv(ob, 64))](
            mid, g, dleft, rows, grad.shape[-1], g.stride(0),
            A_BLOCK=1, A_ROW=l, J=kr, W=ob,
            B_BLOCK=1 if interleaved else ob, B_COLUMN=l if interleaved else 1,
            OUT_BLOCK=ob * kr, OUT_A=1, OUT_B=kr, PRECISION=precision, **size,
        )  # fmt: skip
    return dx, dright, dleft
