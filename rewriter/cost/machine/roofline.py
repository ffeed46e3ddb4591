"""Efficiency: which share of a peak an operation of given sizes reaches, and tables of it.

`Table` holds measured rates; `gemm_efficiency` is the model for devices that nobody measured here.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rewriter.cost.work import Work
from rewriter.kernels import ops
from rewriter.kernels.ops import element_size

__all__ = ["Table", "gemm_efficiency", "gemms", "plain_works", "sized", "vector_operations"]

# What one element of a pointwise op costs in vector operations; others cost 1. Counted from the
# polynomials that vector libraries use (SLEEF at 1 ulp), divisions and roots as 4.
_VECTOR_OPS = {
    **dict.fromkeys(("exp", "log", "sigmoid", "silu", "erf", "tanh", "sin", "cos", "pow"), 16),
    **dict.fromkeys(("gelu", "mish", "softplus", "elu", "logsigmoid"), 24),
    **dict.fromkeys(("div", "sqrt", "rsqrt", "reciprocal", "remainder"), 4),
}


@dataclass(frozen=True)
class Table:
    """Values on a grid, interpolated linearly in the logarithms of sizes and values.

    Args:
        axes: increasing positive sizes of each dimension.
        values: positive, row-major: the last axis runs fastest.

    Beyond the grid the edge's value holds (`at`), or grows with the size (`seconds`).
    """

    axes: tuple[tuple[float, ...], ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        good = all(v > 0 and math.isfinite(v) for v in self.values)
        if not good or len(self.values) != math.prod(map(len, self.axes)):
            raise ValueError(f"{len(self.values)} values, or a bad one, on axes {self.axes}")

    def at(self, *sizes: float) -> float:
        corners = [_between(axis, size) for axis, size in zip(self.axes, sizes, strict=True)]
        total = 0.0
        for corner in itertools.product(*corners):
            place, weight = 0, 1.0
            for axis, (index, share) in zip(self.axes, corner, strict=True):
                place, weight = place * len(axis) + index, weight * share
            if weight:
                total += weight * math.log(self.values[place])
        return math.exp(total)

    def seconds(self, *sizes: float) -> float:
        """`at`, for values that are proportional to every size beyond the grid's upper edge."""
        beyond = (max(size / axis[-1], 1.0) for axis, size in zip(self.axes, sizes, strict=True))
        return self.at(*sizes) * math.prod(beyond)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Table:
        axes = tuple(tuple(float(v) for v in axis) for axis in data["axes"])
        return cls(axes, tuple(float(v) for v in data["values"]))


def _between(axis: Sequence[float], size: float) -> list[tuple[int, float]]:
    """(index, weight) of the neighbours of a size on an axis."""
    if size <= axis[0] or len(axis) == 1:
        return [(0, 1.0)]
    if size >= axis[-1]:
        return [(len(axis) - 1, 1.0)]
    i = bisect_right(axis, size) - 1
    share = math.log(size / axis[i]) / math.log(axis[i + 1] / axis[i])
    return [(i, 1 - share), (i + 1, share)]


def sized(work: Work) -> ops.Record | None:
    """The record of an op that has a kind of its own; None where its sizes are not known."""
    record = ops.of_kind(work.kind)
    return record if record is not None and len(work.shape) == len(record.size_names) else None


def plain_works(work: Work) -> list[Work]:
    """An op as the plain operations that it amounts to, by its record; else [work].

    Their flops add up to those of one run.
    """
    work = replace(work, count=1)
    record = sized(work)
    if record is None or record.parts is None or work.backward:
        return [work]
    pieces = record.parts(ops.Run(work.shape, work.dtype, work.weight_bytes))
    return [Work(**vars(piece)) for piece in pieces]


def gemms(work: Work) -> tuple[int, int, int, int] | None:
    """(batch, m, n, k) of the product that an op is computed as; None where it is no product."""
    record = sized(work)
    if record is not None:
        return None if record.gemm is None else record.gemm(*work.shape)
    if work.kind in ("matmul", "rnn") and len(work.shape) in (3, 4):
        batch, m, n, k = work.shape if len(work.shape) == 4 else (1, *work.shape)
        if "grouped_mm" in work.op:  # one product an expert, the rows shared out evenly
            experts = max(round(work.weight_bytes / (n * k * element_size(work.dtype))), 1)
            batch, m = experts, max(m // experts, 1)
        return batch, m, n, k
    if work.kind == "conv" and len(work.shape) == 6:
        batch, out, channels, pixels, kernel, groups = work.shape
        return groups, batch * pixels, max(out // groups, 1), channels * kernel
    return None


_TILES = (
    (256, 128, 1.0),
    (128, 128, 0.95),
    (128, 64, 0.85),
    (64, 64, 0.7),
    (64, 16, 0.4),
    (64, 4, 0.25),
    (64, 1, 0.12),
)
"""(rows, columns, share of the best tile's speed): a larger tile reuses what it loads more."""


def gemm_efficiency(batch: int, m: int, n: int, k: int, units: int) -> float:
    """max over tiles of  speed · useful/padded area · occupied/all units · k/(k + 64).

    The product is cut into tiles that go to `units` multiprocessors in waves: a last wave that is
    part empty, and tiles that reach over the edge, are lost; k is split while units stand idle.

    Returns:
        The share of the device's sustained peak, in (0, 1].

    Source: tile and wave quantization as in NVIDIA's "Matrix Multiplication Background User's
    Guide"; the tiles' speeds are typical, not measured.
    """
    best = 0.0
    if not batch * m * n:  # nothing to compute
        return 1.0
    for rows, columns, speed in _TILES:
        for high, wide in ((rows, columns), (columns, rows)):
            tiles = batch * -(-m // high) * -(-n // wide)
            useful = batch * m * n / (tiles * high * wide)
            split = min(max(units // tiles, 1), max(k // 256, 1))
            waves = -(-tiles * split // units)
            length = k / split
            share = speed * useful * tiles * split / (waves * units) * length / (length + 64)
            best = max(best, share)
    return max(best, 1e-6)


def vector_operations(work: Work) -> int:
    """Vector operations of an op without FLOPs: a few an element."""
    elements = math.prod(work.shape) if work.shape else work.bytes_written // 4
    name = work.op.rpartition("::")[2].removesuffix("_").removesuffix("_backward")
    if work.kind == "pointwise":
        return elements * _VECTOR_OPS.get(name, 1)
    if work.kind in ("softmax", "norm"):
        return elements * (24 if work.kind == "softmax" else 8)
    if work.kind == "sort":
        return elements * 32
    return elements
