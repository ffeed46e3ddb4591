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

from rewriter.kernels.native import Unavailable, library, parallel

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
    try:
        _library()
    except Unavailable as error:
        return str(error)
    # whatever the default dtype and device are by now
    x = torch.arange(300, dtype=torch.float32, device="cpu") % 256
    q = torch.empty(3, 136, dtype=torch.uint8, device="cpu")
    back = torch.empty(300, dtype=torch.float32, device="cpu")
    x[:128], x[0], x[1] = 2.0, 0.0, 255.0
    pack(x, q, 1)
    unpack(q, back)
    good = (back - x).abs().le(1.001).all()
    return None if good else "the compiled kernel computes wrong integers on this CPU"


def pack(x: Tensor, q: Tensor, seed: int) -> None:
    """Fills the rows of q, uint8 [⌈n/128⌉, 136], from the n > 0 float32 values of x, dense."""
    _run("pack_groups", x, q, x.numel(), seed)


def unpack(q: Tensor, x: Tensor) -> None:
    """The inverse of `pack`, into x."""
    _run("unpack_groups", q, x, x.numel(), 0)


def _run(name: str, source: Tensor, target: Tensor, values: int, seed: int) -> None:
    made, threads = _library()
    call = _Call(
        source.data_ptr(), target.data_ptr(), threads, values, torch.get_num_threads(), seed
    )
    getattr(made, name)(ctypes.byref(call))
