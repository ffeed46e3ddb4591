"""Linear layers with packed weights on a CPU, by the compiled kernels of `weight_only_cpu.cpp`.

`refusal()` says why they are not used on this machine, or None; `isa()` by which instructions they
multiply.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.native import fields, library, parallel, why_not

__all__ = ["Linear", "dense", "isa", "linear", "refusal"]

_SOURCE = Path(__file__).with_name("weight_only_cpu.cpp")
_POINTERS = "x weight scale zero bias y parallel"
_SIZES = "rows in_features out_features apart group floats dynamic threads"


class _Call(ctypes.Structure):
    _fields_ = fields(_POINTERS, _SIZES)


@functools.cache
def _library() -> tuple[Any, int]:
    made = library(_SOURCE)
    made.weight_isa.restype = ctypes.c_char_p
    for function in (made.weight_linear, made.weight_dense):
        function.argtypes, function.restype = [ctypes.c_void_p], None
    made.weight_run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2
    made.weight_run.restype = None
    return made, parallel()


@functools.cache
def refusal() -> str | None:
    """Why the compiled kernels do not run on this machine; None where they do. What they compute is
    looked at by `weight_only`, as that of all kernels is."""
    return why_not(_library)


def isa() -> str:
    """The instructions that multiply, e.g. "AVX-512 and AVX-512-VNNI".

    Raises:
        Unavailable: the kernels do not run here.
    """
    name: bytes = _library()[0].weight_isa()
    return name.decode()


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    dynamic: bool = False,
) -> Tensor:
    """y = x @ Wᵀ + bias, W unpacked in registers.

    Args:
        x: [*, in] float32, contiguous, on a CPU, of one row at least; in·out > 0.
        weight: [out, in] int8, or [out, groups·size/2] uint8 as `weight_only.pack` gives it;
            contiguous.
        scale: [out] float32; or [out, groups] bfloat16 or float32; contiguous.
        zero: as scale, or None; of 4-bit weights alone.
        bias: [out] float32, contiguous, or None.
        dynamic: x in 8 bits, with a scale for each row and group; of 4-bit weights alone.

    Returns:
        [*, out].
    """
    made, start = _library()
    *rows, width = x.shape
    out = weight.shape[0]
    y = x.new_empty(*rows, out)
    count = y.numel() // out
    call = _call(x.data_ptr(), weight, scale, zero, bias, y, start, count, width, dynamic)
    made.weight_linear(ctypes.byref(call))
    return y


class Linear:
    """`linear` of one weight, any number of times, also at the same time.

    Args:
        width: of a row of x.
        weight, scale, zero, bias, dynamic: as of `linear`; they must outlive it.
    """

    def __init__(
        self,
        width: int,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        dynamic: bool,
    ) -> None:
        made, start = _library()
        self.width, self.out = width, weight.shape[0]
        self._call = _call(None, weight, scale, zero, bias, None, start, 0, width, dynamic)
        self._run, self._address = made.weight_run, ctypes.addressof(self._call)

    def __call__(self, x: Tensor, rows: int, threads: int) -> Tensor:
        """
        Args:
            x: [*, width] float32, contiguous, on a CPU, of so many rows, one at least.
            threads: torch's number of them.

        Returns:
            [*, out].
        """
        y = x.new_empty((*x.shape[:-1], self.out))
        self._run(self._address, x.data_ptr(), y.data_ptr(), rows, threads)
        return y


def dense(weight: Tensor, scale: Tensor, zero: Tensor | None, width: int) -> Tensor:
    """W [out, width] float32, of operands as `linear` takes them; width·out > 0."""
    made, start = _library()
    y = torch.empty(weight.shape[0], width, dtype=torch.float32)
    call = _call(None, weight, scale, zero, None, y, start, 0, width, False)
    made.weight_dense(ctypes.byref(call))
    return y


def _call(
    x: int | None,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    start: int,
    rows: int,
    width: int,
    dynamic: bool,
) -> _Call:
    out, stored = weight.shape
    return _Call(
        x,
        weight.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if y is None else y.data_ptr(),
        start,
        rows,
        width,
        out,
        out,
        2 * stored // scale.shape[1] if scale.ndim == 2 else 0,
        scale.dtype == torch.float32,
        dynamic,
        torch.get_num_threads(),
    )
