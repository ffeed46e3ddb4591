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

from rewriter.kernels.native import Unavailable, library, parallel

__all__ = ["dense", "isa", "linear", "refusal"]

_SOURCE = Path(__file__).with_name("weight_only_cpu.cpp")
_POINTERS = "x weight scale zero bias y scratch parallel"
_SIZES = "rows in_features out_features stride bits group floats dynamic threads"


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in _SIZES.split()),
    ]


@functools.cache
def _library() -> tuple[Any, int]:
    made = library(_SOURCE)
    made.weight_isa.restype = ctypes.c_char_p
    made.weight_scratch.argtypes, made.weight_scratch.restype = [ctypes.c_void_p], ctypes.c_int64
    for function in (made.weight_linear, made.weight_dense):
        function.argtypes, function.restype = [ctypes.c_void_p], None
    return made, parallel()


@functools.cache
def refusal() -> str | None:
    """Why the compiled kernels do not run on this machine; None where they do. What they compute is
    looked at by `weight_only`, as that of all kernels is."""
    try:
        _library()
    except Unavailable as error:
        return str(error)
    return None


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
        x: [rows, in] float32, rows dense, on a CPU, rows·in·out > 0.
        weight: [out, in] int8, or [out, groups·size/2] uint8 as `weight_only.pack` gives it;
            contiguous.
        scale: [out] float32; or [out, groups] bfloat16 or float32; contiguous.
        zero: as scale, or None; of 4-bit weights alone.
        bias: [out] float32, contiguous, or None.
        dynamic: x in 8 bits, with a scale for each row and group; of 4-bit weights alone.

    Returns:
        [rows, out].
    """
    made, start = _library()
    y = torch.empty(x.shape[0], weight.shape[0])
    call = _call(x, weight, scale, zero, bias, y, x.shape[1], start, dynamic)
    scratch = None
    if needed := made.weight_scratch(ctypes.byref(call)):
        scratch = torch.empty(needed, dtype=torch.uint8)
        call.scratch = scratch.data_ptr()
    made.weight_linear(ctypes.byref(call))
    return y


def dense(weight: Tensor, scale: Tensor, zero: Tensor | None, width: int) -> Tensor:
    """W [out, width] float32, of operands as `linear` takes them; width·out > 0."""
    made, start = _library()
    y = torch.empty(weight.shape[0], width)
    made.weight_dense(
        ctypes.byref(_call(None, weight, scale, zero, None, y, width, start, dynamic=False))
    )
    return y


def _call(
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    width: int,
    start: int,
    dynamic: bool,
) -> _Call:
    grouped = weight.dtype == torch.uint8
    return _Call(
        None if x is None else x.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        None,
        start,
        0 if x is None else x.shape[0],
        width,
        weight.shape[0],
        0 if x is None else x.stride(0),
        4 if grouped else 8,
        2 * weight.shape[1] // scale.shape[1] if grouped else 0,
        scale.dtype == torch.float32,
        dynamic,
        torch.get_num_threads(),
    )
