"""Depthwise convolutions on a CPU with the compiled kernel of `conv_cpu.cpp`, by themselves or with
a product over channels before and behind them, all in one call; and the levels of a tensor.

`refusal()` says why the kernel is not used on this machine, or None.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import int8_cpu
from rewriter.kernels.native import fields, library, parallel, threads_for, why_not

__all__ = ["THEN", "Chain", "fits", "levels", "refusal"]

THEN = {"": 0, "relu": 1, "silu": 3, "relu6": 4, "hardswish": 5}
"""What may follow the convolution, and the number that C++ knows it as."""

_ALONE = 1 << 17
"""Products of two numbers, below which one thread is done before a second one has woken up."""

_SOURCE = Path(__file__).with_name("conv_cpu.cpp")
_POINTERS = "x y add first last product weight scale bias parallel"
_SIZES = (
    "images height width in_channels channels out out_height out_width taps_high taps_wide "
    "stride_high stride_wide step_high step_wide top left then threads"
)
_LAST = torch.channels_last

Sides = Sequence[tuple[int, int]]
"""Zeros before and behind, of each dimension."""


class _Call(ctypes.Structure):
    _fields_ = fields(_POINTERS, _SIZES)


@functools.cache
def _library() -> tuple[Any, int]:
    made = library(_SOURCE)
    made.conv_chain.argtypes = [ctypes.c_void_p]
    made.conv_levels.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64,
    ]  # fmt: skip
    made.conv_levels.restype = ctypes.c_double
    for name in ("conv_chain", "conv_lanes", "conv_most_rows"):
        getattr(made, name).restype = ctypes.c_int64
    return made, parallel()


@functools.cache
def refusal() -> str | None:
    """Why the compiled kernel does not run on this machine; None where it does."""
    return why_not(_library)


def fits(weight: Tensor) -> bool:
    """Whether the kernel has room for the rows of a window, of a weight [channels, 1, kH, kW]."""
    return bool(weight.shape[2] <= _library()[0].conv_most_rows())


def levels(x: Tensor) -> tuple[Tensor, float, int]:
    """q uint8 in x's memory format, s and z of all of x; s is NaN where x is not finite.

    Args:
        x: float32 on a CPU, dense, not empty.
    """
    made, start = _library()
    q, zero = torch.empty_like(x, dtype=torch.uint8), ctypes.c_int64()
    threads = threads_for(x.numel(), _ALONE)
    step = made.conv_levels(
        x.data_ptr(), x.numel(), q.data_ptr(), ctypes.addressof(zero), start, threads
    )
    return q, step, zero.value


class Chain:
    """y = last(then(depthwise(first(x)) + bias)) + add, with `first`, `last` and `add` or without:
    for one weight, any number of times, also at the same time.

    Args:
        weight: [channels, 1, kH, kW] float32; with a scale whole numbers.
        bias: [channels] float32 or None.
        stride, dilation: of both dimensions.
        around: of both dimensions.
        then: of `THEN`.
        first, last: products over channels, of rows by themselves.
        scale: [channels] float32: then the input of the convolution is rounded to 256 levels by the
            range of its image, as `int8_conv` does it.

    Raises:
        Unavailable: the kernel does not run here.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        around: Sides,
        dilation: Sequence[int],
        then: str = "",
        first: int8_cpu.Linear | None = None,
        last: int8_cpu.Linear | None = None,
        scale: Tensor | None = None,
    ) -> None:
        self._made, start = _library()
        channels, _, high, wide = weight.shape
        lanes = self._made.conv_lanes()
        packed = _lanes(weight.reshape(channels, high * wide), lanes).transpose(1, 2).contiguous()
        bias = None if bias is None else _lanes(bias, lanes)
        scale = None if scale is None else _lanes(scale, lanes)
        self.into = channels if first is None else first.width
        self.out = channels if last is None else last.out
        self._held = packed, bias, scale, first, last  # C++ knows their addresses alone
        self._window = list(zip((high, wide), stride, around, dilation, strict=True))
        products = [p for p in (first, last) if p is not None]
        self._each = high * wide * channels + sum(p.width * p.out for p in products)
        self._call = _Call(
            first=None if first is None else first.address,
            last=None if last is None else last.address,
            product=int8_cpu.rows_of() if products else None,
            weight=packed.data_ptr(),
            scale=None if scale is None else scale.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            parallel=start,
            in_channels=self.into,
            channels=channels,
            out=self.out,
            taps_high=high,
            taps_wide=wide,
            stride_high=stride[0],
            stride_wide=stride[1],
            step_high=dilation[0],
            step_wide=dilation[1],
            top=around[0][0],
            left=around[1][0],
            then=THEN[then],
        )

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """Of the result."""
        spread = zip(x.shape[2:], self._window, strict=True)
        sides = [(n + sum(a) - d * (k - 1) - 1) // s + 1 for n, (k, s, a, d) in spread]
        return (x.shape[0], self.out, *sides)

    def takes(self, x: Tensor, add: Tensor | None = None) -> bool:
        """Whether x, and what is added, are of a kind and a size that the kernel has."""
        if x.dim() != 4 or x.shape[1] != self.into or not _is_own(x):
            return False
        shape = self.shape(x)
        return min(shape) > 0 and (add is None or (add.shape == shape and _is_own(add)))

    def __call__(self, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, bool]:
        """
        Args:
            x: [N, C, H, W] that it `takes`, best in channels last.
            add: of the result's shape, or None.

        Returns:
            [N, out, H', W'] in channels last; and whether a value has no finite range: it is not
            to be used then.
        """
        shape = self.shape(x)
        y, x = (
            torch.empty(shape, dtype=torch.float32, memory_format=_LAST),
            x.contiguous(memory_format=_LAST),
        )
        call = _Call.from_buffer_copy(self._call)  # another thread may be in one, too
        call.x, call.y = x.data_ptr(), y.data_ptr()
        if add is not None:
            add = add.contiguous(memory_format=_LAST)
            call.add = add.data_ptr()
        call.images, _, call.height, call.width = x.shape
        call.out_height, call.out_width = shape[2:]
        call.threads = threads_for(x.shape[0] * math.prod(shape[2:]) * self._each, _ALONE)
        return y, bool(self._made.conv_chain(ctypes.byref(call)))


def _lanes(rows: Tensor, lanes: int) -> Tensor:
    """[channels, …] as [⌈channels/lanes⌉, lanes, …], zeros at the end."""
    padded = F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, -rows.shape[0] % lanes])
    return padded.reshape(-1, lanes, *rows.shape[1:])


def _is_own(x: Tensor) -> bool:
    return x.is_cpu and x.dtype is torch.float32
