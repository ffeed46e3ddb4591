"""Watches what a piece of work really has alive: the witness of predicted peaks, in benchmarks and
in tests."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tracker(TorchDispatchMode):
    """Bytes of the storages that are alive together.

    Args:
        held: counted from the start, until they are freed.
        given: the caller's own, never counted.
    """

    def __init__(self, held: Iterable[Tensor] = (), given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.given = {t.untyped_storage()._cdata for t in given}
        self.sizes: dict[int, int] = {}
        self.refs: dict[int, Any] = {}
        self.add(list(held))

    def add(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.sizes and key not in self.given:
                self.sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                self.refs[key] = weakref.ref(storage, lambda _, key=key: self.free(key))

    def free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)
        del self.refs[key]

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """From now on these are the caller's own."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self.sizes:
                self.free(key)
            self.given.add(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(out)
        return out


def allocator_peak(work: Callable[[], object], before: Callable[[], object] | None = None) -> int:
    """Most bytes that PyTorch's CPU allocator has out while `work` runs, above those at its start:
    the workspace inside kernels too, which no op returns.

    Args:
        before: is profiled too, as the profiler misses the end of what was there before it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if before is not None:
            before()
        start = time.time_ns()
        work()
    events = profiler.profiler.kineto_results.events()
    found = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for when, size in found:
        live += size
        peak = max(peak, live) if when >= start else max(live, 0)
    return peak
