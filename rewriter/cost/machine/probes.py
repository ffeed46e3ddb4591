"""What a calibration runs: for each table its grid of sizes and the call that is timed there.

No size here is taken from a model. A `Call` names the tensor that its caller would just have
written: between two timings other weights pass through the cache, then that tensor is written, so
that the call finds what it would find in the middle of a model. In a tight loop an op finds its
code, its weights and its results in the nearest cache, and is up to three times faster.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels import ops
from rewriter.kernels.ops import Record

__all__ = ["Call", "Probe", "composites", "grid", "more_probes", "probes", "sample_sizes"]

Call = tuple[Callable[[], object], Tensor]
"""(what is timed, what its caller has just written)."""
Axes = tuple[tuple[int, ...], ...]
aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Probe:
    """One table to fill.

    Args:
        name: of the table in `Measured.tables`.
        axes: grid of sizes; of ops that only move data, of bytes read and written.
        make: sizes → the call to time.
        flops: sizes → its work. Points of more than `most` are not run: they get the time of the
            largest that is, in proportion.
        most: see `flops`.
    """

    name: str
    axes: Axes
    make: Callable[..., Call]
    flops: Callable[..., float]
    most: float


def probes(speed: float) -> Iterator[Probe]:
    """The tables that the ops with records are made of, and attention.

    Args:
        speed: FLOP/s of a large float32 product: no single call shall take much over 10 ms.
    """
    heavy = speed * 0.008
    rows, sides, small = (1, 4, 16, 60, 250, 1000, 4000), (64, 192, 800, 3200), (16, 64, 240)
    yield Probe("addmm/float32", (rows, sides, sides), _addmm, _plain, heavy)
    yield Probe("bmm/float32", ((2, 8, 32), (1, *small, 1000), small, small), _bmm, _product, heavy)
    for name, make in _MOVING.items():
        each = _BYTES.get(name, 8)
        sizes = _SIZES[::2] + _SIZES[-1:] if name in _RARE else _SIZES
        axis = tuple(each * size for size in sizes)
        yield Probe(name, (axis,), lambda b, make=make, each=each: make(b // each), float, math.inf)
    for record in _recorded(composite=False):
        assert record.samples is not None
        most = heavy * 2 if record.dtype else heavy  # narrower numbers are multiplied faster
        yield Probe(record.kind, record.samples.axes, _call(record), _flops(record), most)
    lengths, batches = (15, 60, 250, 500), (1, 4, 16, 64)
    yield Probe("attention", (batches, lengths, (32, 64, 128)), _attention, _scores, heavy)


def more_probes(speed: float) -> Iterator[Probe]:
    """The tables that fewer models need: convolutions, bfloat16."""
    heavy = speed * 0.008
    pixels, channels = (49, 196, 784, 3136, 12544), (32, 120, 480)
    for name, kernel, inputs in (("conv/1", 1, channels), ("conv/3", 3, channels)):
        axes = pixels, channels, tuple(c * kernel**2 for c in inputs)
        yield Probe(name, axes, _conv(kernel, 1), _plain, heavy)
    stem = (pixels, channels[:2], (3 * 49, 16 * 49))
    yield Probe("conv/other", stem, _conv(7, 1), _plain, heavy)
    patches = ((16, 100, 400), channels[1:], (3 * 14**2,))
    yield Probe("conv/patch", patches, _conv(14, 14), _plain, heavy)
    yield Probe("conv/depthwise", ((49, 784, 12544), (1,), (9,)), _depthwise, _plain, heavy)
    sides = (64, 400, 2400)
    yield Probe("addmm/bfloat16", ((1, 16, 128, 1000), sides, sides), _half, _plain, 2 * heavy)


def _recorded(composite: bool) -> Iterator[Record]:
    """Ops with a kind of their own, made of several parts or of one product."""
    ops.load()
    for record in ops.records():
        if record.own_kind and (record.parts is not None) == composite:
            yield record


def _call(record: Record) -> Callable[..., Call]:
    """A point of the record's samples → the call of its op there."""
    op, samples = record.op, record.samples
    assert samples is not None

    def make(*point: int) -> Call:
        args = samples.arguments(*point)
        return (lambda: op(*args)), args[0]

    return make


def _flops(record: Record) -> Callable[..., float]:
    """A point of the record's samples → the FLOPs there, with nothing computed."""

    def count(*point: int) -> float:
        assert record.gemm is not None
        return _product(*record.gemm(*sample_sizes(record, *point)))

    return count


def sample_sizes(record: Record, *point: int) -> tuple[int, ...]:
    """The sizes of the record's op at a point of its samples."""
    assert record.samples is not None
    assert record.sizes is not None
    with torch.device("meta"):
        return tuple(record.sizes(*record.samples.arguments(*point)))


def _product(batch: int, m: int, n: int, k: int) -> float:
    return 2.0 * batch * m * n * k


def _plain(m: int, n: int, k: int) -> float:
    return _product(1, m, n, k)


def _scores(batch: int, length: int, size: int) -> float:
    return 4.0 * batch * length**2 * size


def composites() -> Iterator[tuple[Record, Axes, Callable[..., Call]]]:
    """(record, grid, point → the call) of the ops that are made of several parts."""
    for record in _recorded(composite=True):
        assert record.samples is not None
        yield record, record.samples.axes, _call(record)


def _addmm(m: int, n: int, k: int) -> Call:
    x, weight, bias = torch.rand(m, k), torch.rand(n, k), torch.rand(n)
    return (lambda: F.linear(x, weight, bias)), x


def _half(m: int, n: int, k: int) -> Call:
    x, weight, bias = (torch.rand(s).bfloat16() for s in ((m, k), (n, k), (n,)))
    return (lambda: F.linear(x, weight, bias)), x


def _bmm(batch: int, m: int, n: int, k: int) -> Call:
    a, b = torch.rand(batch, m, k), torch.rand(batch, k, n)
    return (lambda: aten.bmm.default(a, b)), a


def _attention(batch: int, length: int, size: int) -> Call:
    q, k, v = (torch.rand(1, length, batch, size).transpose(1, 2) for _ in range(3))
    return (lambda: aten.scaled_dot_product_attention.default(q, k, v)), q


def _conv(kernel: int, stride: int) -> Callable[..., Call]:
    def make(pixels: int, out: int, k: int) -> Call:
        side, channels = math.isqrt(pixels) * stride, k // kernel**2
        x, weight = torch.rand(1, channels, side, side), torch.rand(out, channels, kernel, kernel)
        padding = kernel // 2 if stride == 1 else 0
        return (lambda: F.conv2d(x, weight, None, stride, padding)), x

    return make


def _depthwise(pixels: int, _: int, __: int) -> Call:
    side, channels = math.isqrt(pixels), 64
    x, weight = torch.rand(1, channels, side, side), torch.rand(channels, 1, 3, 3)
    return (lambda: F.conv2d(x, weight, None, 1, 1, 1, channels)), x


def _unary(op: Any, *rest: Any) -> Callable[[int], Call]:
    def make(size: int) -> Call:
        x = torch.rand(size)
        return (lambda: op(x, *rest)), x

    return make


def _binary(op: Any) -> Callable[[int], Call]:
    def make(size: int) -> Call:
        x, y = torch.rand(size), torch.rand(size)
        return (lambda: op(x, y)), x

    return make


def _rows(size: int) -> tuple[int, int]:
    width = min(size, 256)
    return size // width, width


def _by_row(op: Callable[[Tensor], object]) -> Callable[[int], Call]:
    def make(size: int) -> Call:
        x = torch.rand(_rows(size))
        return (lambda: op(x)), x

    return make


def _layer_norm(size: int) -> Call:
    x = torch.rand(_rows(size))
    weight = torch.rand(x.shape[1])
    return (lambda: F.layer_norm(x, weight.shape, weight, weight)), x


def _batch_norm(size: int) -> Call:
    side = min(math.isqrt(size), 16)
    x = torch.rand(1, max(size // side**2, 1), side, side)
    own = torch.rand(x.shape[1])
    return (lambda: F.batch_norm(x, own, own, own, own)), x


def _where(size: int) -> Call:
    x, y, chosen = torch.rand(size), torch.rand(size), torch.rand(size) > 0.5
    return (lambda: aten.where.self(chosen, x, y)), x


def _permute(size: int) -> Call:
    """[rows, heads, 32] → [heads, rows, 32], as around attention."""
    x = torch.rand(max(size // 128, 1), 2 if size < 128 else 4, 32).transpose(0, 1)
    return (lambda: aten.clone.default(x, memory_format=torch.contiguous_format)), x


def _cat(size: int) -> Call:
    x, y = torch.rand(_rows(size // 2)), torch.rand(_rows(size // 2))
    return (lambda: aten.cat.default([x, y], -1)), x


def _embedding(size: int) -> Call:
    rows, width = _rows(size)
    table, index = torch.rand(1024, width), torch.randint(0, 1024, (rows,))
    return (lambda: aten.embedding.default(table, index)), index


def _pool(size: int) -> Call:
    side = min(math.isqrt(size), 64)
    x = torch.rand(1, max(size // side**2, 1), side, side)
    return (lambda: aten.max_pool2d_with_indices.default(x, [3, 3], [2, 2], [1, 1])), x


def _average(size: int) -> Call:
    side = min(math.isqrt(size), 8)
    x = torch.rand(1, max(size // side**2, 1), side, side)
    return (lambda: aten._adaptive_avg_pool2d.default(x, [1, 1])), x


_MOVING: dict[str, Callable[[int], Call]] = {
    "add": _binary(aten.add.Tensor),
    "gelu": _unary(aten.gelu.default),
    "tanh": _unary(aten.tanh.default),
    "exp": _unary(aten.exp.default),
    "erf": _unary(aten.erf.default),
    "silu": _unary(aten.silu.default),
    "cos": _unary(aten.cos.default),
    "pow": _unary(aten.pow.Tensor_Scalar, 3.0),
    "div": _binary(aten.div.Tensor),
    "where": _where,
    "_softmax": _by_row(lambda x: aten._softmax.default(x, -1, False)),
    "native_layer_norm": _layer_norm,
    "native_batch_norm": _batch_norm,
    "mean": _by_row(lambda x: aten.mean.dim(x, [-1], True)),
    "clone": _permute,
    "cat": _cat,
    "embedding": _embedding,
    "max_pool2d_with_indices": _pool,
    "avg_pool2d": _average,
    "topk": _by_row(lambda x: aten.topk.default(x, max(x.shape[1] // 4, 1), -1, True, False)),
    "fill": _unary(aten.full_like.default, 1.0),
}


# Bytes read and written for each element of the main input, where not one float each.
_BYTES = {
    **dict.fromkeys(("add", "div"), 12),
    **dict.fromkeys(("mean", "avg_pool2d", "fill"), 4),
    **dict.fromkeys(("max_pool2d_with_indices", "topk"), 7),
    "where": 13,
}
_SIZES = tuple(4**i for i in range(4, 12))
_RARE = frozenset("erf cos pow where max_pool2d_with_indices avg_pool2d topk fill".split())


def grid(probe: Probe) -> Iterator[tuple[int, ...]]:
    """The points of a probe's table, row-major."""
    return itertools.product(*probe.axes)
