"""Monarch layers on a CPU with the compiled kernels of `monarch_cpu.cpp`: float32 and bfloat16.

Blocks of about a hundred features are too small for a BLAS, which packs and writes what the next
product unpacks again. Here both products of a tile of rows follow each other in the nearest
caches; `monarch_cpu.cpp` says how. Sums are float32.

`refusal()` says why the kernels are not used on this machine, or None; `pick_kernel` which
implementation is the faster for a layer, measured once (`choice.py`).
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.choice import fastest, rows_bucket
from rewriter.kernels.native import fields, library, parallel, why_not
from rewriter.kernels.settings import own_settings

__all__ = ["backward", "forward", "pick_kernel", "refusal", "serves", "worth_compiling"]

_DTYPES = (torch.float32, torch.bfloat16)
_SOURCE = Path(__file__).with_name("monarch_cpu.cpp")
_POINTERS = "input first second bias output mid packed parallel"
_SIZES = (
    "rows input_stride features out output_stride threads tile blocks1 width1 blocks2 width2 rank "
    "transposed first_block first_m first_p second_block second_q second_n"
)
_TILE = 64
"""Rows whose mid is to stay in the second-level cache; fewer where that leaves a thread without."""


class _Call(ctypes.Structure):
    _fields_ = fields(_POINTERS, _SIZES)


class _Gradient(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in "a input output sums".split()),
        *(
            (name, ctypes.c_int64)
            for name in (
                "a_block a_m input_stride features blocks m width out_block out_m out_n wide_a"
            ).split()
        ),
    ]


@functools.cache
def _library() -> Any:
    made = library(_SOURCE)
    made.monarch_packed_size.restype = ctypes.c_int64
    made.monarch_packed_size.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    made.monarch_products.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    made.monarch_gradients.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
    ]
    made.monarch_products.restype = made.monarch_gradients.restype = None
    return made


@functools.cache
def _parallel() -> int:
    return parallel()


@functools.cache
def refusal() -> str | None:
    """Why the compiled kernels do not run on this machine; None where they do."""
    if (reason := why_not(_library) or why_not(_parallel)) is not None:
        return reason
    with own_settings():
        return _wrong()


def _wrong() -> str | None:
    """What a small layer's numbers say: blocks that are padded and cropped, in whole numbers that
    float32 adds without rounding."""
    k, l, rank, ib, ob, rows = 3, 2, 5, 9, 30, 37
    right = (torch.arange(k * rank * l * ib) % 5 - 2.0).view(k, rank * l, ib)
    left = (torch.arange(l * ob * k * rank) % 7 - 3.0).view(l, ob, k * rank)
    x = (torch.arange(rows * (k * ib - 1)) % 11 - 5.0).view(rows, -1)
    bias = torch.arange(l * ob - 1.0)
    got, mid = forward(x, right, left, bias, len(bias), True)
    xb = torch.nn.functional.pad(x, (0, 1)).view(rows, k, ib)
    want_mid = torch.einsum("kmi,bki->kmb", right, xb)
    by_output = want_mid.view(k * rank, l, rows)
    want = torch.einsum("lsq,qlb->bls", left, by_output).flatten(1)[:, :-1] + bias
    for name, found, wanted in (("mid", mid, want_mid), ("y", got, want)):
        if not torch.equal(found, wanted):  # type: ignore[arg-type]
            return f"the compiled kernel computes a wrong {name} on this CPU"
    return None


def serves(*tensors: Tensor | None) -> bool:
    """Whether the kernels take such operands: of one dtype, plain and dense, and not empty."""
    dtype = tensors[0].dtype if tensors[0] is not None else None
    return dtype in _DTYPES and all(
        t is None or (t.dtype == dtype and t.device.type == "cpu" and t.numel() > 0)
        for t in tensors
    )


_KEPT = 1 << 22
_kept = threading.local()


def _scratch(name: str, floats: int) -> Tensor:
    """Memory for one call, kept by its thread up to 16 MB: a C heap gives such blocks back to the
    system and fetches them again page by page, which can take longer than the arithmetic."""
    if floats > _KEPT:
        return torch.empty(floats, dtype=torch.float32)
    held: Tensor | None = getattr(_kept, name, None)
    if held is None or held.numel() < floats:
        held = torch.empty(floats, dtype=torch.float32)
        setattr(_kept, name, held)
    return held


def _matrix(x: Tensor) -> Tensor:
    """[*, features] → [rows, features] whose rows are dense, without a copy where it can be."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _products(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    y: Tensor,
    mid: Tensor | None,  # or dmid, in float32
    blocks: tuple[int, int, int],
    transposed: bool,
) -> None:
    """Both products, forward (right, left) or transposed (left, right); x a `_matrix`."""
    (k, l, rank), threads = blocks, torch.get_num_threads()
    of1, of2 = (l, k) if transposed else (k, l)
    (_, _, ib), (_, ob, kr) = (
        (second.shape, first.shape)
        if transposed
        else (
            first.shape,
            second.shape,
        )
    )
    rows, features = x.shape
    lanes = _library().monarch_rows()
    share = -(-rows // threads)
    call = _Call(
        x.data_ptr(),
        first.data_ptr(),
        second.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr() if y.numel() else None,
        None if mid is None else mid.data_ptr(),
        None,
        _parallel(),
        rows,
        x.stride(0),
        features,
        y.shape[-1],
        y.shape[-1],
        threads,
        min(_TILE, -(-share // lanes) * lanes),
        of1,
        ob if transposed else ib,
        of2,
        ib if transposed else ob,
        rank,
        transposed,
        # right is [k, (r, l), i], left [l, s, (k, r)]; the sum of a product runs over i or s first
        *((ob * kr, 1, kr) if transposed else (rank * l * ib, ib, 1)),
        *((rank * l * ib, ib, 1) if transposed else (ob * kr, 1, kr)),
    )
    size = _library().monarch_packed_size(ctypes.byref(call), x.element_size())
    packed = _scratch("packed", size)
    call.packed = packed.data_ptr()
    _library().monarch_products(ctypes.byref(call), x.element_size())


def forward(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    out_features: int,
    store_mid: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `monarch_linear_train` of `kernels/monarch.py`, not interleaved; no mid without
    `store_mid`. Operands as `serves` has them, factors of shapes that fit."""
    (k, rl, _), l = right.shape, left.shape[0]
    flat = _matrix(x)
    y = x.new_empty(*x.shape[:-1], out_features)
    mid = x.new_empty(k, rl, len(flat)) if store_mid else None
    bias = None if bias is None else bias.contiguous()
    right, left = right.contiguous(), left.contiguous()
    _products(flat, right, left, bias, y, mid, (k, l, rl // l), False)
    return y, mid


def backward(
    grad: Tensor,
    x: Tensor,
    mid: Tensor,
    right: Tensor,
    left: Tensor,
    need_x: bool,
    need_right: bool,
    need_left: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `monarch_linear_backward` of `kernels/monarch.py`, not interleaved."""
    right, left, mid = right.contiguous(), left.contiguous(), mid.contiguous()
    (k, rl, ib), (l, ob, kr) = right.shape, left.shape
    g, flat = _matrix(grad), _matrix(x)
    rows, out, bytes_each = len(flat), g.shape[1], x.element_size()
    dx = x.new_empty(x.shape if need_x else 0)
    dright = torch.empty_like(right) if need_right else x.new_empty(0)
    dleft = torch.empty_like(left) if need_left else x.new_empty(0)
    dbias = x.new_empty(out if need_bias else 0)
    dmid = _scratch("dmid", k * rl * rows) if need_right else None
    if need_x or need_right:
        _products(g, left, right, None, dx, dmid, (k, l, rl // l), True)
    jobs = []
    if dmid is not None:
        jobs.append(
            _Gradient(
                *(dmid.data_ptr(), flat.data_ptr(), dright.data_ptr(), None),
                *(rl * rows, rows, flat.stride(0), flat.shape[1], k, rl, ib),
                *(rl * ib, ib, 1, True),
            )
        )
    if need_left:
        # mid as [(k, r), l, rows]: block l starts at row l, and a step in (k, r) skips l rows
        jobs.append(
            _Gradient(
                *(mid.data_ptr(), g.data_ptr(), dleft.data_ptr()),
                dbias.data_ptr() if need_bias else None,
                *(rows, l * rows, g.stride(0), out, l, kr, ob),
                *(ob * kr, 1, kr, False),
            )
        )
    elif need_bias:
        torch.sum(g, 0, out=dbias)
    if jobs:
        _library().monarch_gradients(
            (_Gradient * len(jobs))(*jobs),
            *(len(jobs), rows, _parallel(), torch.get_num_threads(), bytes_each),
        )
    return dx, dright, dleft, dbias


# Choice of the kernel ----------------------------------------------------------------------------

_LEAST_WORK = 1 << 20
"""Multiply-adds of a product below which calling costs more than computing: torch's, unmeasured."""

Paths = Mapping[str, Callable[..., object]]
"""Torch's own "forward" and "backward", to be measured against; `monarch.py` has them."""


def worth_compiling(
    rows: int, right: tuple[int, ...], left: tuple[int, ...], dtype: torch.dtype
) -> bool:
    """Whether there is a kernel for such a layer, and enough for it to do."""
    work = rows * (math.prod(right) + math.prod(left))
    return dtype in _DTYPES and work >= _LEAST_WORK


def pick_kernel(
    which: str,
    rows: int,
    in_features: int,
    out_features: int,
    right: tuple[int, ...],
    left: tuple[int, ...],
    dtype: torch.dtype,
    torch_paths: Paths,
) -> str:
    """ "fused" or "torch", whichever is the faster at this size.

    Measured the first time that a size is asked for, on made-up data, with `rows` rounded up to a
    power of two (at most 2048); remembered per number of threads, for later processes too.

    Args:
        which: "forward" or "backward".
        rows: of x, all leading dimensions together.
        in_features, out_features: of the layer.
        right, left: shapes of its factors.
        dtype: of all operands.
        torch_paths: what else could run.
    """
    if not worth_compiling(rows, right, left, dtype) or refusal() is not None:
        return "torch"
    rows, threads = rows_bucket(rows), torch.get_num_threads()
    key = f"monarch {which} {rows} {in_features} {out_features} {right} {left} {dtype} {threads}"

    def candidates() -> dict[str, Callable[[], object]]:
        x = torch.linspace(-1, 1, rows * in_features).view(rows, in_features).to(dtype)
        r = torch.linspace(-1, 1, math.prod(right)).view(right).to(dtype)
        f = torch.linspace(-1, 1, math.prod(left)).view(left).to(dtype)
        bias = torch.ones(out_features, dtype=dtype)
        plain = torch_paths[which]
        if which == "forward":
            return {
                "fused": lambda: forward(x, r, f, bias, out_features, False),
                "torch": lambda: plain(x, r, f, bias, out_features),
            }
        grad, mid = forward(x, r, f, bias, out_features, True)
        needs = (True, True, True, True)
        return {
            "fused": lambda: backward(grad, x, mid, r, f, *needs),  # type: ignore[arg-type]
            "torch": lambda: plain(grad, x, mid, r, f, False, *needs),
        }

    return fastest(key, Path(_library()._name).stem, candidates)
