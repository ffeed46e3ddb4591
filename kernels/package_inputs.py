"""What a package is given: checked against what it was exported with, and laid out so.

    package_input(x, name, sizes, dtype, last) = a copy of x, contiguous or channels last

AOTInductor reads each input by the sizes, strides and dtype of the example, without a look at what
it is given: a slice, a transposed or an int32 tensor gives wrong numbers, or reads beyond its
memory. With this op at each input any strides are right, and other sizes and dtypes are an error.
It is linked into the package (inputs_cpu.cpp), which needs nothing of ours to run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import native, ops

__all__ = ["DTYPES", "archive", "package_input", "refusal"]

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
"""Those that are checked, in the order of C++."""

_NAME = "rewriter::package_input"
_SOURCE = Path(__file__).with_name("inputs_cpu.cpp")
_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "package_input(Tensor x, str name, SymInt[] sizes, int dtype, int last) -> Tensor",
)


@functools.cache
def archive() -> Path:
    """The op's object, for compiled code to be linked with.

    Raises:
        Unavailable: it cannot be compiled here.
    """
    include = Path(torch.__file__).parent / "include"
    return native.archive("rewriter_inputs", (_SOURCE,), "-DSHIM", f"-I{include}")


@functools.cache
def refusal() -> str | None:
    """Why packages cannot hold the op on this machine; None where they can."""
    return native.why_not(archive)


def package_input(x: Tensor, name: str, sizes: Sequence[int], dtype: int, last: int) -> Tensor:
    """A copy of x, laid out as the program reads it.

    Args:
        x: any.
        name: what errors call it.
        sizes: that it must have; −1 where any from 1 on will do, −2 where any will.
        dtype: that it must have, by its place in `DTYPES`; −1 where any will do.
        last: 1 for channels last, else contiguous.

    Raises:
        RuntimeError: it has other sizes, or another dtype.
    """
    if len(sizes) != x.dim() or not all(map(_fits, x.shape, sizes)):
        raise RuntimeError(f"rewriter: {name} has the sizes {list(x.shape)}, not {list(sizes)}")
    if dtype >= 0 and DTYPES[dtype] != x.dtype:
        raise RuntimeError(f"rewriter: {name} is {x.dtype}, not {DTYPES[dtype]}")
    return _laid_out(x, name, sizes, dtype, last)


def _fits(size: int, wanted: int) -> bool:
    return size > 0 if wanted == -1 else wanted in (-2, size)


def _laid_out(x: Tensor, name: str, sizes: Any, dtype: int, last: int) -> Tensor:
    layout = torch.contiguous_format
    if last:
        layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.clone(memory_format=layout)


_LIB.impl("package_input", package_input, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _laid_out, lib=_LIB)

ops.register(
    ops.Record(
        _NAME,
        kind="copy",
        reference=package_input,
        flops=lambda *_, **__: 0,
        shim=ops.Shim(
            "AOTITorchError aoti_torch_cpu_package_input(AtenTensorHandle, const char*, "
            "const int64_t*, int64_t, int64_t, int64_t, AtenTensorHandle*)",
            archive,
        ),
    )
)
