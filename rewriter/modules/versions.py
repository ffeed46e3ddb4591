"""Whether tensors are as they were when something was derived from them.

At every call the tensors are compared with what they were then: by their memory, sizes and strides,
by torch's version counter, which every write in place raises, and by a few of their values. The
values (on the CPU) are for writes that torch does not count: by fused optimizers, through
`tensor.data`, through another tensor over the same memory, of batch norm into its statistics. After
a step of any optimizer all values are compared, by their sum. What remains unseen is a write that
torch does not count, that no optimizer made, and that leaves the sampled values alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Stamp", "watch_steps"]

_SAMPLES = 16
"""Values of a parameter that are compared at every call: of 100 parameters in some 0.2 ms, a
quarter of that where the stamp keeps its views of them."""


class _Steps:
    """How many optimizer steps this process has made, once somebody asks."""

    count = 0
    hooked = False

    @classmethod
    def step(cls, *_: Any) -> None:
        if not torch.compiler.is_compiling():  # a compiled step writes as torch counts it
            cls.count += 1


def watch_steps() -> None:
    """Counts the steps of optimizers from now on."""
    if not _Steps.hooked:
        _Steps.hooked = True
        register_optimizer_step_post_hook(_Steps.step)


class Stamp:
    """What a set of tensors looked like.

    Args:
        tensors: plain ones.
        keep: keeps their memory alive, which makes `holds` quicker; else none of them.
        sampled: of which of them values are compared, too; None for all. Where a tensor is read as
            it is, and nothing was copied out of it, its values may change.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        keep: bool = False,
        sampled: Sequence[bool] | None = None,
    ) -> None:
        self.memory = [StorageWeakRef(t.untyped_storage()) for t in tensors]
        self.addresses = [t.data_ptr() for t in tensors]
        self.versions = [t._version for t in tensors]
        self.looks = _looks(tensors)
        wanted = [True] * len(tensors) if sampled is None else sampled
        self.places = [_places(t, own) for t, own in zip(tensors, wanted, strict=True)]
        views = _views(tensors, self.places)
        self.values = _together(views)
        self.sums = _sums(tensors)
        self.steps = _Steps.count
        self._views = views if keep else None

    @property
    def dead(self) -> bool:
        """A tensor is gone, or has other memory."""
        return any(ref.expired() for ref in self.memory)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same, as they were."""
        if [t._version for t in tensors] != self.versions:
            return False
        if [t.data_ptr() for t in tensors] != self.addresses or _looks(tensors) != self.looks:
            return False
        # what is kept keeps its address; the weak reference keeps the storage's own from being used
        # again
        if self._views is None and any(
            ref.cdata != t.untyped_storage()._cdata
            for ref, t in zip(self.memory, tensors, strict=True)
        ):
            return False
        views = _views(tensors, self.places) if self._views is None else self._views
        if not all(torch.equal(a, b) for a, b in zip(_together(views), self.values, strict=True)):
            return False
        if self.steps != _Steps.count:
            steps = _Steps.count
            if not torch.equal(_sums(tensors), self.sums):
                return False
            self.steps = steps
        return True


def _looks(tensors: Sequence[Tensor]) -> list[Any]:
    """Sizes and strides; of a vector its size, as none is read backwards."""
    return [(t.shape, t.stride()) if t.ndim > 1 else t.numel() for t in tensors]


def _bits(tensor: Tensor) -> Tensor:
    """Its values as integers, of which NaN equals itself."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(kind[tensor.element_size()])


def _places(tensor: Tensor, sampled: bool = True) -> tuple[int, int, int]:
    """(how many values, steps from one to the next, of the first): of memory, from end to end."""
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    count = min(size, _SAMPLES) if tensor.numel() else 0
    if tensor.device.type != "cpu" or not sampled:
        count = 0  # to look at values would wait for all that the device has to do
    return count, max((size - 1) // max(count - 1, 1), 1), int(tensor.storage_offset())


def _views(tensors: Sequence[Tensor], places: Sequence[tuple[int, int, int]]) -> list[list[Tensor]]:
    """A few values of each, those of one dtype and device together."""
    found: dict[Any, list[Tensor]] = {}
    for tensor, (count, step, offset) in zip(tensors, places, strict=True):
        if not count:
            continue
        own = tensor.detach().as_strided((count,), (step,), offset)
        found.setdefault((tensor.dtype, tensor.device), []).append(own)
    return list(found.values())


def _together(views: Sequence[list[Tensor]]) -> list[Tensor]:
    """The values in one tensor for each dtype."""
    return [_bits(torch.cat(own)) for own in views]


def _sums(tensors: Sequence[Tensor]) -> Tensor:
    found = [_bits(t).sum(dtype=torch.int64).cpu() for t in tensors]
    return torch.stack(found) if found else torch.empty(0, dtype=torch.int64)
