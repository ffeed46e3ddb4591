"""Layers that read only the weights of active inputs, on a CPU, by the compiled kernels of
`sparse_cpu.cpp`.

`refusal()` says why they are not used on this machine, or None; `isa()` by which instructions they
multiply.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from rewriter.kernels.native import fields, library, parallel, why_not

__all__ = [
    "MOST_GROUP",
    "THEN",
    "Gate",
    "Select",
    "chosen",
    "evict",
    "floats",
    "gated",
    "isa",
    "keep_experts",
    "linear",
    "masked",
    "refusal",
    "routed",
]

THEN = ("", "relu", "gelu", "silu", "gelu_tanh")
"""Activations of a gate, by the number that C++ knows them as."""

MOST_GROUP = 128
"""Inputs that share a scale of 4-bit weights, at most."""

_SOURCE = Path(__file__).with_name("sparse_cpu.cpp")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}


class _Select(ctypes.Structure):
    _fields_ = [
        ("importance", ctypes.c_void_p),
        ("threshold", ctypes.c_double),
        ("k", ctypes.c_int64),
        ("block", ctypes.c_int64),
    ]


class _Linear(ctypes.Structure):
    _fields_ = [
        *fields(
            "x weight scale zero bias y active parallel",
            "rows in_features out type group floats limit threads",
        ),
        ("select", _Select),
    ]


class _Gated(ctypes.Structure):
    _fields_ = [
        *fields(
            "x gate up down gate_scale up_scale down_scale gate_bias up_bias bias screen "
            "screen_scale given scores expert_of y active parallel",
            "rows in_features hidden out type then limit threads experts best",
        ),
        ("select", _Select),
    ]


class Select(NamedTuple):
    """Which entries of a row are active.

    Args:
        k: how many of the largest score, ties by the lower index; 0: by the threshold.
        threshold: scores that are not below it are active; a number, or [1].
        importance: [width] float32 ≥ 0, contiguous: scores are |x|·importance; None: |x|.
        block: as many neighbours are active together, by the largest score among them.
    """

    k: int = 0
    threshold: float | Tensor = 0.0
    importance: Tensor | None = None
    block: int = 1

    @classmethod
    def of(
        cls, threshold: Tensor | None, importance: Tensor | None = None, k: int = 0, block: int = 1
    ) -> Select:
        """As ops are given it: without a threshold by k."""
        if threshold is None:
            return cls(k, 0.0, importance, block)
        return cls(0, threshold, importance, block)

    def made(self) -> _Select:
        return _Select(_address(self.importance), float(self.threshold), self.k, self.block)


class Gate(NamedTuple):
    """One of the three matrices of a gated MLP.

    Args:
        weight: float32, bfloat16 or int8, contiguous: [hidden, in], of the last one [hidden, out].
        scale: of int8 weights, [hidden] float32 of the first two, [out] of the last one.
        bias: as scale, or None.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None


@functools.cache
def _library() -> tuple[Any, int]:
    made = library(_SOURCE)
    made.sparse_isa.restype = ctypes.c_char_p
    for function in (made.sparse_linear, made.sparse_gated):
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
    pointer, number = ctypes.c_void_p, ctypes.c_long
    made.sparse_run.argtypes = [pointer] * 3 + [number, ctypes.c_double, number, number]
    made.sparse_run.restype = ctypes.c_int
    made.sparse_run_masked.argtypes = [pointer] * 3 + [number, ctypes.c_double, number]
    made.sparse_run_masked.restype = None
    for function in (made.sparse_choose, made.sparse_masked):
        function.argtypes = [pointer, pointer, number, number, pointer, pointer, number]
        function.restype = None
    made.sparse_evict.argtypes, made.sparse_evict.restype = [pointer, number], None
    keep = made.sparse_keep_experts
    keep.argtypes = [pointer, number, number, pointer, number, number, pointer, pointer, number]
    keep.restype = None
    return made, parallel()


@functools.cache
def refusal() -> str | None:
    """Why the compiled kernels do not run on this machine; None where they do."""
    return why_not(_library)


def evict(*tensors: Tensor) -> None:
    """No cache holds these contiguous tensors of a CPU afterwards: so it is with a layer's weights
    when its turn comes in a model that is larger than the caches."""
    made, _ = _library()
    for tensor in tensors:
        made.sparse_evict(tensor.data_ptr(), tensor.numel() * tensor.element_size())


@overload
def floats(tensor: Tensor) -> Tensor: ...


@overload
def floats(tensor: None) -> None: ...


@overload
def floats(tensor: Tensor | None) -> Tensor | None: ...


def floats(tensor: Tensor | None) -> Tensor | None:
    """A tensor as the kernels read it: float32, contiguous, without gradient."""
    return None if tensor is None else tensor.detach().float().contiguous()


def isa() -> str:
    """The instructions that multiply, e.g. "AVX-512".

    Raises:
        Unavailable: the kernels do not run here.
    """
    name: bytes = _library()[0].sparse_isa()
    return name.decode()


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    select: Select,
    limit: int,
    *,
    zero: Tensor | None = None,
    group: int = 0,
) -> tuple[Tensor | None, int]:
    """y = x_S @ weight (·scale) + bias, where x_S is x with its inactive entries as zeros.

    Args:
        x: [*, in] float32, contiguous, on a CPU, of one row at least; in·out > 0.
        weight: [in, out] float32, bfloat16 or int8, contiguous; or of 4 bits, [in, ⌈out/2⌉] uint8
            as `nibbles.pack_rows` gives it.
        scale: [out] float32, of int8 weights; of 4 bits [groups, out] bfloat16 or float32,
            contiguous; else None.
        bias: [out] float32, contiguous, or None.
        select: which entries are active.
        limit: rows of the weight that may be active for eight rows of x together.
        zero: as scale, of weights of 4 bits, or None.
        group: of 4 bits, how many inputs share a scale: 128 at most.

    Returns:
        y [*, out], or None where more are active, or with weights of 4 bits an entry is 2⁹⁹ or
        more; how many rows of the weight were read, over all groups of eight rows of x.
    """
    made, start = _library()
    *rows, width = x.shape
    out = scale.shape[1] if group and scale is not None else weight.shape[1]
    y = torch.empty(*rows, out, dtype=torch.float32)
    active = ctypes.c_int64()
    call = _Linear(
        x.data_ptr(),
        weight.data_ptr(),
        _address(scale),
        _address(zero),
        _address(bias),
        y.data_ptr(),
        ctypes.addressof(active),
        start,
        y.numel() // out,
        width,
        out,
        _TYPES[weight.dtype],
        group,
        scale is not None and scale.dtype == torch.float32,
        limit,
        torch.get_num_threads(),
        select.made(),
    )
    done = made.sparse_linear(ctypes.byref(call))
    return (y if done else None), active.value


class Linear:
    """`linear` of one weight, any number of times, also at the same time.

    Args:
        weight, scale, bias, zero, group: as of `linear`; they must outlive it.
        importance, k, block: as of `Select`.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        importance: Tensor | None,
        k: int,
        block: int,
        zero: Tensor | None,
        group: int,
    ) -> None:
        made, start = _library()
        self.out = scale.shape[1] if group and scale is not None else weight.shape[1]
        self._held = weight, scale, bias, importance, zero
        self._call = _Linear(
            None,
            weight.data_ptr(),
            _address(scale),
            _address(zero),
            _address(bias),
            None,
            None,
            start,
            0,
            weight.shape[0],
            self.out,
            _TYPES[weight.dtype],
            group,
            scale is not None and scale.dtype == torch.float32,
            0,
            0,
            Select(k, 0.0, importance, block).made(),
        )
        self._run, self._own = made.sparse_run, ctypes.addressof(self._call)
        self._masked = made.sparse_run_masked

    def __call__(
        self, x: Tensor, rows: int, threshold: float, limit: int, threads: int
    ) -> Tensor | None:
        """
        Args:
            x: [*, in] float32, contiguous, on a CPU, of so many rows, one at least.
            threshold: of scores, where k is 0.
            limit: as of `linear`.
            threads: torch's number of them.

        Returns:
            [*, out], or None as `linear` does.
        """
        y = x.new_empty((*x.shape[:-1], self.out))
        own = x.data_ptr(), y.data_ptr(), rows, threshold, limit, threads
        return y if self._run(self._own, *own) else None

    def masked(self, x: Tensor, rows: int, threshold: float, threads: int) -> Tensor:
        """x with zeros where it is not active; arguments as of a call."""
        y = torch.empty_like(x)
        self._masked(self._own, x.data_ptr(), y.data_ptr(), rows, threshold, threads)
        return y


def gated(
    x: Tensor,
    gate: Gate | Tensor,
    up: Gate,
    down: Gate,
    then: str,
    select: Select,
    limit: int,
    screen: Gate | None = None,
) -> tuple[Tensor | None, int]:
    """y = (a_S ∘ (x upᵀ)) down with a = then(x gateᵀ); only active rows of `up` and `down` are
    read.

    Args:
        x: [*, in] float32, contiguous, on a CPU, of one row at least; no size is 0.
        gate, up, down: see `Gate`; all three of one dtype. In the place of gate also a itself,
            [*, hidden] float32, contiguous.
        then: one of `THEN`.
        select: which entries of a are active.
        limit: as of `linear`.
        screen: `gate` in int8: entries are chosen by it, and of `gate` active rows alone are read.

    Returns:
        As `linear` does.
    """
    given, own = (gate, None) if isinstance(gate, Tensor) else (None, gate)
    return _gated(x, (own, up, down), then, limit, select, screen=screen, given=given)


def routed(
    x: Tensor,
    gate: Gate,
    up: Gate | None,
    down: Gate,
    then: str,
    scores: Tensor,
    expert_of: Tensor,
    best: int,
    limit: int,
) -> tuple[Tensor | None, int]:
    """y = (a_S ∘ (x upᵀ)) down with a = then(x gateᵀ); of all three only rows in S are read.

    Args:
        x, down, then, limit: as of `gated`.
        gate, up: as of `gated`; without `up` y = a_S down.
        scores: [*, experts] float32, contiguous.
        expert_of: [hidden] int32, contiguous: S are the neurons of the `best` experts with the
            largest score, ties by the lower index; NaN counts as the largest.
        best: from 1 to the number of experts.

    Returns:
        As `linear` does.
    """
    return _gated(x, (gate, up, down), then, limit, Select(), scores, expert_of, best)


def _gated(
    x: Tensor,
    three: tuple[Gate | None, Gate | None, Gate],
    then: str,
    limit: int,
    select: Select,
    scores: Tensor | None = None,
    expert_of: Tensor | None = None,
    best: int = 0,
    *,
    screen: Gate | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor | None, int]:
    made, start = _library()
    *rows, width = x.shape
    hidden, out = three[2].weight.shape
    y = torch.empty(*rows, out, dtype=torch.float32)
    active = ctypes.c_int64()
    call = _Gated(
        x.data_ptr(),
        *(_address(g and g.weight) for g in three),
        *(_address(g and g.scale) for g in three),
        *(_address(g and g.bias) for g in three),
        None if screen is None else screen.weight.data_ptr(),
        None if screen is None else _address(screen.scale),
        _address(given),
        _address(scores),
        _address(expert_of),
        y.data_ptr(),
        ctypes.addressof(active),
        start,
        y.numel() // out,
        width,
        hidden,
        out,
        _TYPES[three[2].weight.dtype],
        THEN.index(then),
        limit,
        torch.get_num_threads(),
        0 if scores is None else scores.shape[-1],
        best,
        select.made(),
    )
    done = made.sparse_gated(ctypes.byref(call))
    return (y if done else None), active.value


def chosen(x: Tensor, select: Select) -> Tensor:
    """Whether each entry of x [*, width] float32, contiguous, is active: [*, width] bool."""
    return _by_entry("sparse_choose", x, torch.empty(x.shape, dtype=torch.bool), select)


def masked(x: Tensor, select: Select) -> Tensor:
    """x [*, width] float32, contiguous, with zeros where it is not active."""
    return _by_entry("sparse_masked", x, torch.empty_like(x), select)


def keep_experts(y: Tensor, scores: Tensor, expert_of: Tensor, best: int) -> Tensor:
    """y [*, hidden] float32, contiguous, into which zeros are written where a neuron's expert is
    not among the best; the rest as of `routed`."""
    made, start = _library()
    if y.numel():
        width, at, count = y.shape[-1], scores.data_ptr(), scores.shape[-1]
        own = at, count, best, expert_of.data_ptr(), start, torch.get_num_threads()
        made.sparse_keep_experts(y.data_ptr(), y.numel() // width, width, *own)
    return y


def _by_entry(name: str, x: Tensor, to: Tensor, select: Select) -> Tensor:
    made, start = _library()
    if x.numel():
        own, width = ctypes.byref(select.made()), x.shape[-1]
        rows, threads = x.numel() // width, torch.get_num_threads()
        getattr(made, name)(x.data_ptr(), to.data_ptr(), rows, width, own, start, threads)
    return to


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
