"""int8 linear layers on a CPU with the compiled kernels of `int8_cpu.cpp`: quantize, multiply and
finish in one call.

`refusal()` says why they are not used on this machine, or None; `isa()` by which instructions they
multiply.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rewriter.kernels import native_ops
from rewriter.kernels.native import fields, library, parallel, threads_for, why_not

__all__ = [
    "THEN",
    "Linear",
    "Norm",
    "Product",
    "compiled",
    "isa",
    "pack",
    "refusal",
    "rows_of",
    "use_amx",
]

THEN = ("", "relu", "gelu", "silu", "relu6", "hardswish")
"""What may follow the product, by the number that C++ knows it as."""

_SOURCE = Path(__file__).with_name("int8_cpu.cpp")
_POINTERS = "x weight scale sums bias add norm_weight norm_bias y q parallel"
_HELD = "weight scale sums bias norm_weight norm_bias multiplier".split()
"""The pointers to what a product is made of."""
_LAYOUT = 64
"""Bytes before the call in a layer of one tensor, with its layout."""
_SIZES = "rows in_features out_features stride then one_range norm threads"


class _Call(ctypes.Structure):
    _fields_ = [
        *fields(_POINTERS, _SIZES),
        ("eps", ctypes.c_double),
        ("multiplier", ctypes.c_void_p),
        ("step", ctypes.c_double),
        ("zero", ctypes.c_int64),
    ]


class Norm(NamedTuple):
    """LayerNorm over a row: `weight` and `bias` [out] float32, contiguous, or None; its ε."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Product(Protocol):
    """x → y in one call: a `Linear`, a `Two`, or another of the compiled kernels.

    Args:
        width: of a row of x.
        out: of a row of y.
    """

    width: int
    out: int

    def __call__(self, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, bool]:
        """As of a `Linear`, with x and y contiguous."""

    def before(self, second: Product) -> Product | None:
        """`second(self(x), add)` in one call; None where no kernel has both."""

    def in_graph(self) -> native_ops.InGraph | None:
        """The call as it stands in a graph; None where compiled code cannot make it."""


@functools.cache
def _library() -> tuple[Any, int]:
    made = library(_SOURCE)
    sizes = [ctypes.c_int64, ctypes.c_int64]
    made.int8_isa.restype = ctypes.c_char_p
    made.int8_packed_size.argtypes, made.int8_packed_size.restype = sizes, ctypes.c_int64
    made.int8_scratch.argtypes, made.int8_scratch.restype = sizes, ctypes.c_int64
    made.int8_pack.argtypes = [ctypes.c_void_p, *sizes, ctypes.c_void_p]
    made.int8_pack.restype = None
    made.int8_linear.argtypes, made.int8_linear.restype = [ctypes.c_void_p], ctypes.c_int64
    made.int8_layout.restype = ctypes.c_int64
    made.int8_use_amx.argtypes = [ctypes.c_int64]
    made.int8_use_amx.restype = ctypes.c_int64
    made.int8_two.argtypes, made.int8_two.restype = [ctypes.c_void_p] * 2, ctypes.c_int64
    made.int8_monarch.restype = ctypes.c_int64
    made.int8_monarch.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    made.int8_units.argtypes, made.int8_units.restype = [pointer, size, pointer, pointer], size
    return made, parallel()


def compiled() -> tuple[Any, int]:
    """The library, and the address of what starts its threads.

    Raises:
        Unavailable: the kernels do not run here.
    """
    return _library()


@functools.cache
def refusal() -> str | None:
    """Why the compiled kernels do not run on this machine; None where they do. What they compute is
    looked at by `int8_linear`, as that of all kernels is."""
    return why_not(_library)


def isa() -> str:
    """The instructions that multiply, e.g. "AVX-512-VNNI"; "AMX-int8" where a few rows or more are
    multiplied by that, and fewer by AVX-512-VNNI.

    Raises:
        Unavailable: the kernels do not run here.
    """
    name: bytes = _library()[0].int8_isa()
    return name.decode()


def use_amx(wanted: bool) -> bool:
    """Multiplies by AMX from now on, or no more, in this process: the results are the same.

    Returns:
        Whether it does: the CPU has AMX and the system lets the process use it.

    Raises:
        Unavailable: the kernels do not run here.
    """
    return bool(_library()[0].int8_use_amx(wanted))


def rows_of() -> int:
    """The address of `int8_rows`, by which other kernels call a `Linear`.

    Raises:
        Unavailable: the kernels do not run here.
    """
    return ctypes.cast(_library()[0].int8_rows, ctypes.c_void_p).value or 0


def pack(qweight: Tensor) -> Tensor:
    """qweight [out, in] int8, contiguous, in the panels that `linear` multiplies by."""
    made, (out, width) = _library()[0], qweight.shape
    packed = torch.empty(made.int8_packed_size(out, width), dtype=torch.int8)
    made.int8_pack(qweight.data_ptr(), out, width, packed.data_ptr())
    return packed


class Linear:
    """y = norm(then(q(x) @ (qweight·scale[:, None])ᵀ + bias) + add), each row of x quantized by
    itself: for one weight, and what follows it, any number of times, also at the same time.

    Args:
        packed: `pack` of qweight [out, in].
        width: in.
        scale: [out] float32, contiguous.
        sums: [out] int32, contiguous: Σ_k qweight[n, k].
        bias: [out] float32, contiguous, or None.
        then: one of `THEN`.
        norm: over each row of the result, or None.
        one_range: for all of x, with 0 in it, in place of one for each row.
        given: s > 0 and the zero point of that one range, where they are known.
        multiplier: [in] float32, contiguous, by which x is multiplied before, where they are.
    """

    def __init__(
        self,
        packed: Tensor,
        width: int,
        scale: Tensor,
        sums: Tensor,
        bias: Tensor | None,
        then: str = "",
        norm: Norm | None = None,
        one_range: bool = False,
        given: tuple[float, int] | None = None,
        multiplier: Tensor | None = None,
    ) -> None:
        self._made, start = _library()
        self.width, self.out = width, scale.shape[0]
        own = norm or Norm(None, None, 0.0)
        tensors = packed, scale, sums, bias, own.weight, own.bias, multiplier
        self._held = dict(zip(_HELD, tensors, strict=True))  # C++ knows their addresses alone
        step, zero = given or (0.0, 0)
        self._call = _Call(
            weight=packed.data_ptr(),
            scale=scale.data_ptr(),
            sums=sums.data_ptr(),
            bias=_address(bias),
            norm_weight=None if norm is None else _address(norm.weight),
            norm_bias=None if norm is None else _address(norm.bias),
            parallel=start,
            in_features=width,
            out_features=self.out,
            then=THEN.index(then),
            one_range=one_range or given is not None,
            norm=norm is not None,
            eps=0.0 if norm is None else norm.eps,
            multiplier=_address(multiplier),
            step=step,
            zero=zero,
        )

    @property
    def address(self) -> int:
        """What `rows_of` takes for this product, for as long as it lives."""
        return ctypes.addressof(self._call)

    def __call__(self, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, bool]:
        """
        Args:
            x: [*, in] float32, contiguous, or [rows, in] whose rows are dense; on a CPU, not empty.
            add: [*, out] float32, contiguous, or None.

        Returns:
            y [*, out]; and whether a row of x has no finite range of its own: its y is NaN, as it
            is with a given range where a row of x is not finite.
        """
        y = torch.empty(*x.shape[:-1], self.out, dtype=torch.float32)
        call = self._with(x)
        call.y = y.data_ptr()
        call.q = _scratch(self._made.int8_scratch(call.rows, self.width)).data_ptr()
        if add is not None:
            call.add = add.data_ptr()
        return y, bool(self._made.int8_linear(ctypes.byref(call)))

    def before(self, second: Product) -> Product | None:
        return Two(self, second) if isinstance(second, Linear) else None

    def layer(self) -> Tensor:
        """[bytes] uint8: all that the product is made of, as `int8_shim.h` reads it."""
        call = _Call.from_buffer_copy(self._call)
        call.parallel = None
        end = _up(_LAYOUT + ctypes.sizeof(_Call))
        parts = []
        for name, tensor in self._held.items():
            if tensor is not None:
                setattr(call, name, end)
                parts.append((end, tensor.detach().reshape(-1).view(torch.uint8)))
                end = _up(end + tensor.nbytes)
        made = torch.zeros(end, dtype=torch.uint8)
        head = self._made.int8_layout().to_bytes(8, sys.byteorder).ljust(_LAYOUT, b"\0")
        head += bytes(call)
        for start, own in [(0, torch.frombuffer(bytearray(head), dtype=torch.uint8)), *parts]:
            made[start : start + len(own)] = own
        return made

    def in_graph(self) -> native_ops.InGraph:
        """The product as it stands in a graph."""
        out = self.out
        return native_ops.InGraph(
            (self.layer(),), lambda layer, x, add=None: native_ops.int8(layer, x, add, out)
        )

    def _with(self, x: Tensor) -> _Call:
        call = _Call.from_buffer_copy(self._call)  # another thread may be in one, too
        call.x, call.rows = x.data_ptr(), (rows := x.numel() // self.width)
        call.threads = threads_for(rows * self.width * self.out)
        call.stride = x.stride(0) if x.ndim == 2 else self.width
        return call

    def hand_on(self, x: Tensor, unit: int, to: int, given: ctypes.Structure) -> bool:
        """Makes y of `unit` rows of x at a time, and has C++ read it while it is in the cache.

        Args:
            x: [*, in] float32, contiguous, on a CPU; its rows are whole units.
            unit: rows of y that are read together.
            to: the address of a function (given, number of the unit, y of the unit).
            given: what it is given.

        Returns:
            As of a call, whether a row has no finite range.
        """
        call = self._with(x)
        return bool(self._made.int8_units(ctypes.byref(call), unit, to, ctypes.addressof(given)))


class Two:
    """`second(first(x), add)`, where what lies between is in the cache alone.

    Args:
        first, second: of as many columns as the second's rows are wide.
    """

    def __init__(self, first: Linear, second: Linear) -> None:
        self.first, self.second = first, second
        self.out, self.width = second.out, first.width
        self._made = first._made

    def __call__(self, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, bool]:
        """As of a `Linear`, with x and y contiguous."""
        rows = x.numel() // self.width
        y = torch.empty(*x.shape[:-1], self.out, dtype=torch.float32)
        one = _Call.from_buffer_copy(self.first._call)
        two = _Call.from_buffer_copy(self.second._call)
        one.x, one.stride, two.y = x.data_ptr(), self.width, y.data_ptr()
        one.rows = two.rows = rows
        one.threads = two.threads = threads_for(rows * self.width * self.first.out)
        if add is not None:
            two.add = add.data_ptr()
        return y, bool(self._made.int8_two(ctypes.byref(one), ctypes.byref(two)))

    def before(self, second: Product) -> Product | None:
        return None

    def in_graph(self) -> native_ops.InGraph:
        """Both products as they stand in a graph."""
        mid, out = self.first.out, self.out
        return native_ops.InGraph(
            (self.first.layer(), self.second.layer()),
            lambda layers, x, add=None: native_ops.int8_two(layers, x, add, mid, out),
        )


def _up(size: int) -> int:
    """To where a line of the cache begins."""
    return -(-size // 64) * 64


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_KEPT = 1 << 24
_kept = threading.local()


def _scratch(size: int) -> Tensor:
    """Bytes for one call, kept by its thread up to 16 MB."""
    if size > _KEPT:
        return torch.empty(size, dtype=torch.uint8)
    held: Tensor | None = getattr(_kept, "q", None)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):
            held = _kept.q = torch.empty(size, dtype=torch.uint8)
    return held
