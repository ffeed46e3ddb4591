"""8-bit groups on a CPU with the compiled kernels of `pack_cpu.cpp`: one pass over memory each way.

`refusal()` says why they are not used on this machine, or None.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.native import library, parallel, why_not

__all__ = ["pack", "refusal", "unpack"]

_SOURCE = Path(__file__).with_name("pack_cpu.cpp")


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("source", "target", "parallel")),
        *((name, ctypes.c_int64) for name in ("values", "threads", "seed")),
    ]


@functools.cache
def _library() -> tuple[Any, int]:
    made = library(_SOURCE)
    for function in (made.pack_groups, made.unpack_groups):
        function.argtypes, function.restype = [ctypes.c_void_p], None
    return made, parallel()


@functools.cache
def refusal() -> str | None:
    """Why the compiled kernels do not run on this machine; None where they do."""
    if (reason := why_not(_library)) is not None:
        return reason
    # no tensors: the planner asks under a mode that would make them fakes
    x, back = (ctypes.c_float * 300)(), (ctypes.c_float * 300)()
    x[:] = [i % 256 for i in range(300)]  # in the second group levels are not whole numbers
    q = (ctypes.c_uint8 * (3 * 136))()
    _run("pack_groups", ctypes.addressof(x), ctypes.addressof(q), 300, 1, 1)
    _run("unpack_groups", ctypes.addressof(q), ctypes.addressof(back), 300, 1, 0)
    good = all(abs(a - b) <= 1.001 * 127 / 255 for a, b in zip(x, back, strict=True))
    return None if good else "the compiled kernel computes wrong integers on this CPU"


def pack(x: Tensor, q: Tensor, seed: int) -> None:
    """Fills the rows of q, uint8 [⌈n/128⌉, 136], from the n > 0 float32 values of x, dense."""
    _run("pack_groups", x.data_ptr(), q.data_ptr(), x.numel(), torch.get_num_threads(), seed)


def unpack(q: Tensor, x: Tensor) -> None:
    """The inverse of `pack`, into x."""
    _run("unpack_groups", q.data_ptr(), x.data_ptr(), x.numel(), torch.get_num_threads(), 0)


def _run(name: str, source: int, target: int, values: int, threads: int, seed: int) -> None:
    made, start = _library()
    call = _Call(source, target, start, values, threads, seed)
    getattr(made, name)(ctypes.byref(call))
