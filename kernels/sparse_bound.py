"""Calls of sparse products that skip torch's dispatcher, which takes as long as a small product:
what does not change from call to call is made ready once per weight.

`ready` serves a call that nobody else has a say in: a few rows of plain float32 on a CPU, no
gradient wanted, no mode, transform or autocast around it. All others go through the op.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rewriter.kernels import sparse_cpu
from rewriter.kernels.sparse_active import MOST_ROWS
from rewriter.kernels.weight_bound import PLAIN, is_plain_call

__all__ = ["Operands", "Ready", "ready", "takes"]


class Operands(NamedTuple):
    """What an op is given but x: as of `sparse_linear` and `sparse_int4_linear`.

    Args:
        weight: says for how long a call stays ready.
        group: of 4-bit weights, how many inputs share a scale; else 0.
    """

    weight: Tensor
    scale: Tensor | None
    zero: Tensor | None
    bias: Tensor | None
    threshold: Tensor | None
    importance: Tensor | None
    k: int
    block: int
    group: int = 0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:6]


class Ready:
    """One weight, ready for calls."""

    def __init__(self, own: Operands, columns: Tensor, forget: Any) -> None:
        self.weight = weakref.ref(own.weight, forget)
        self.others, self.at, self.options = own.tensors[1:], _addresses(own), own[6:]
        self.version = None if columns.data_ptr() == own.weight.data_ptr() else own.weight._version
        self.storage = StorageWeakRef(own.weight.untyped_storage())
        self.width = columns.shape[0]
        self.out = columns.shape[1] if own.scale is None else own.scale.shape[-1]
        self.run: sparse_cpu.Linear | None = None
        there = all(map(_fits, (columns, *self.others))) and bool(self.width * self.out)
        if there and _alike(own) and sparse_cpu.refusal() is None:
            self.run = sparse_cpu.Linear(
                columns,
                own.scale,
                None if own.bias is None else own.bias.detach(),
                own.importance,
                own.k if own.threshold is None else 0,
                own.block,
                own.zero,
                own.group,
            )

    def holds(self, own: Operands) -> bool:
        """Whether it was made of these tensors, and they lie where they lay."""
        return (
            self.weight() is own.weight
            and all(a is b for a, b in zip(self.others, own.tensors[1:], strict=True))
            and self.options == own[6:]
            and self.at == _addresses(own)
            and (self.version is None or self.version == own.weight._version)
            and self.storage.cdata == own.weight.untyped_storage()._cdata
        )

    def rows(self, x: Tensor) -> int:
        return x.numel() // self.width

    def __call__(self, x: Tensor, share: float) -> Tensor | None:
        """The product; None where more than this share is active, or nothing pays."""
        assert self.run is not None
        if not share:
            return None
        limit = int(share * self.width)
        return self.run(x, self.rows(x), self._threshold(), limit, torch.get_num_threads())

    def masked(self, x: Tensor) -> Tensor:
        """x with zeros where it is not active."""
        assert self.run is not None
        return self.run.masked(x, self.rows(x), self._threshold(), torch.get_num_threads())

    def _threshold(self) -> float:
        threshold = self.others[3]
        return 0.0 if threshold is None else float(threshold)


_ready: dict[int, Ready] = {}
"""By the id of a weight, for as long as that lives."""


def ready(
    x: Tensor,
    own: Operands,
    check: Callable[[], None],
    columns: Callable[[Tensor], Tensor],
) -> Ready | None:
    """What multiplies x without the dispatcher; None where the call must go through the op.

    Args:
        x: [*, in].
        own: the rest.
        check: raises where they do not fit each other.
        columns: weight → its rows by inputs, contiguous.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) not in PLAIN
        or x.dtype is not torch.float32
        or x.layout is not torch.strided
        or x.is_neg()  # its numbers are not what its memory says
        or x._is_zerotensor()
        or not (x.is_cpu and x.is_contiguous())
        or not all(t is None or type(t) in PLAIN for t in own.tensors)
        or not is_plain_call(x, own.weight, own.bias)
    ):
        return None
    key = id(own.weight)
    found = _ready.get(key)
    if found is None or not found.holds(own):
        if own.weight.is_inference():  # counts no versions: nothing derived from it is kept
            return None
        check()

        def forget(gone: Any) -> None:
            if (kept := _ready.get(key)) is not None and kept.weight is gone:
                del _ready[key]

        found = _ready[key] = Ready(own, columns(own.weight), forget)
    if found.run is None or not x.ndim or x.shape[-1] != found.width:
        return None
    return found if 0 < x.numel() <= MOST_ROWS * found.width else None


def takes(own: Operands) -> bool:
    """Whether the native ops take these tensors as they are, a weight of 4 bits contiguous, another
    one by columns."""
    by_inputs = own.weight.is_cpu and (own.weight.is_contiguous() or not own.group)
    few = own.threshold is None or (
        own.threshold.shape == (1,) and own.threshold.dtype == torch.float32
    )
    there = by_inputs and bool(own.weight.numel()) and all(map(_fits, own.tensors[1:]))
    return there and few and _alike(own) and sparse_cpu.refusal() is None


def _addresses(own: Operands) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in own.tensors)


def _fits(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.is_cpu and tensor.is_contiguous())


def _alike(own: Operands) -> bool:
    """Whether the compiled kernel takes tensors of these dtypes as they are."""
    if own.group:
        few = own.scale is not None and own.scale.dtype in (torch.float32, torch.bfloat16)
        same = own.zero is None or (own.scale is not None and own.zero.dtype == own.scale.dtype)
        fits = few and same and own.weight.dtype == torch.uint8
    elif own.scale is not None:
        fits = own.weight.dtype == torch.int8 and own.scale.dtype == torch.float32
    else:
        fits = own.weight.dtype == torch.float32
    floats = own.bias, own.importance
    return fits and all(t is None or t.dtype == torch.float32 for t in floats)
