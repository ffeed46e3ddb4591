"""Monarch layers with int8 factors on a CPU, by the compiled kernels: both products in one call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rewriter.kernels import int8_cpu
from rewriter.kernels.native import fields, threads_for

__all__ = ["Monarch", "Pair", "by_outputs", "pack"]

_POINTERS = (
    "x right right_scale right_sums left left_scale left_sums bias add norm_weight norm_bias y "
    "parallel"
)
_SIZES = "rows in_features out_features inputs outputs rank interleaved then one_range norm threads"


class _Call(ctypes.Structure):
    _fields_ = [
        *fields(_POINTERS, _SIZES),
        ("eps", ctypes.c_double),
    ]


def by_outputs(rows: Tensor, l: int) -> Tensor:
    """[K, (r, l), …] → [K, (l, r), …]: what one block of the outputs reads side by side."""
    k, rl, *rest = rows.shape
    return rows.view(k, rl // l, l, *rest).transpose(1, 2).reshape(k, rl, *rest)


def pack(factor: Tensor) -> Tensor:
    """factor [N, out, in] int8, block by block in the panels that the kernels multiply by."""
    return torch.cat([int8_cpu.pack(block) for block in factor.contiguous()])


class Monarch:
    """y = norm(then(left·q(right·q(x)) + bias) + add), each block of each row quantized by itself:
    for one layer, any number of times, also at the same time.

    Args:
        right, left: `pack` of qright [K, (l, r), ib] and qleft [L, ob, (k, r)].
        right_sums, left_sums: int32, contiguous: Σ of each row of qright and qleft.
        right_scale: [K, (l, r)] float32, contiguous.
        left_scale: [L, ob] float32, contiguous.
        bias: [L, ob] float32, contiguous, or None.
        width: of x.
        out: of y.
        interleaved: y[…, s·L+l] in place of y[…, l·ob+s].
        then: one of `int8_cpu.THEN`.
        norm: over each row of the result, or None.
        one_range: for all of x, and all that right makes of it, with 0 in it.
    """

    def __init__(
        self,
        right: Tensor,
        right_scale: Tensor,
        right_sums: Tensor,
        left: Tensor,
        left_scale: Tensor,
        left_sums: Tensor,
        bias: Tensor | None,
        width: int,
        out: int,
        interleaved: bool = False,
        then: str = "",
        norm: int8_cpu.Norm | None = None,
        one_range: bool = False,
    ) -> None:
        self._made, start = int8_cpu.compiled()
        self.width, self.out = width, out
        k, middle = right_scale.shape
        l, ob = left_scale.shape
        self.products = k * middle * -(-width // k) + k * middle * ob
        weight, shift, eps = norm or (None, None, 0.0)
        own = (
            right, right_scale, right_sums, left, left_scale, left_sums, bias, None, weight, shift,
        )  # fmt: skip
        self._held = own  # C++ knows their addresses alone
        given = zip(_POINTERS.split()[1:], own, strict=False)
        self._call = _Call(
            **{name: None if t is None else t.data_ptr() for name, t in given},
            parallel=start,
            in_features=width,
            out_features=out,
            inputs=k,
            outputs=l,
            rank=middle // l,
            interleaved=interleaved,
            then=int8_cpu.THEN.index(then),
            one_range=one_range,
            norm=norm is not None,
            eps=eps,
        )

    def call(self, rows: int, threads: int) -> _Call:
        """Its arguments but for the tensors of the call: another thread may be in one, too."""
        call = _Call.from_buffer_copy(self._call)
        call.rows, call.threads = rows, threads
        return call

    def __call__(self, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, bool]:
        """As `int8_cpu.Linear`, with x and y contiguous; where a row has no finite range, y is
        nothing."""
        rows = x.numel() // self.width
        y = torch.empty(*x.shape[:-1], self.out, dtype=torch.float32)
        call = self.call(rows, threads_for(rows * self.products))
        call.x, call.y = x.data_ptr(), y.data_ptr()
        if add is not None:
            call.add = add.data_ptr()
        return y, bool(self._made.int8_monarch(ctypes.byref(call), 1))

    def before(self, second: int8_cpu.Product) -> int8_cpu.Product | None:
        return Pair(self, second) if isinstance(second, Monarch) else None

    def in_graph(self) -> None:
        """No compiled code can call it yet."""


class Pair:
    """`second(first(x), add)`, where what lies between is in the cache alone.

    Args:
        first, second: of as many columns as the second's rows are wide.
    """

    def __init__(self, first: Monarch, second: Monarch) -> None:
        self.first, self.second = first, second
        self.width, self.out = first.width, second.out

    def __call__(self, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, bool]:
        """As of a `Monarch`."""
        rows = x.numel() // self.width
        y = torch.empty(*x.shape[:-1], self.out, dtype=torch.float32)
        both = self.first, self.second
        threads = threads_for(rows * sum(layer.products for layer in both))
        calls = (_Call * 2)(*(layer.call(rows, threads) for layer in both))
        calls[0].x, calls[1].y = x.data_ptr(), y.data_ptr()
        if add is not None:
            calls[1].add = add.data_ptr()
        return y, bool(self.first._made.int8_monarch(ctypes.byref(calls), 2))

    def before(self, second: int8_cpu.Product) -> int8_cpu.Product | None:
        return None

    def in_graph(self) -> None:
        """No compiled code can call it yet."""
