"""Weights that a compiled graph was given in another form, and that must not get stale.

An int8 weight is derived from the user's float parameter when a graph is compiled. At every call
the parameters that Dynamo passes are compared with those it was derived from: by their memory, by
torch's version counter, which every write in place raises, and by a few of their values. Where one
differs (an optimizer stepped, a checkpoint was loaded, or another block of the same shape runs the
same code) the layers are derived again and kept beside the others; the code stays.

The values (on the CPU) are for writes that torch does not count: by fused optimizers, through
`tensor.data`, through another tensor over the same memory. After a step of any optimizer all values
are compared, by their sum. What remains unseen is a write that torch does not count, that no
optimizer made, and that leaves the sampled values alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from rewriter.errors import RewriteError
from rewriter.modules.tensors import named_tensors
from rewriter.recipe.recipe import Recipe
from rewriter.recipe.replaying import replay

__all__ = ["Derived", "Refused", "Weights", "again"]

_SAMPLES = 16
"""Values of a parameter that are compared at every call: of 100 parameters in some 0.2 ms."""


class Refused(RewriteError):
    """A pass does not take the weights as they are now."""


@dataclass(frozen=True)
class Derived:
    """What one set of parameters gave: the code to run, and the tensors that it takes on top."""

    run: Callable[..., Any]
    tensors: list[Tensor]


class _Steps:
    """How many optimizer steps this process has made, once somebody asks."""

    count = 0
    hooked = False

    @classmethod
    def watch(cls) -> None:
        if not cls.hooked:
            cls.hooked = True
            register_optimizer_step_post_hook(cls._step)

    @classmethod
    def _step(cls, *_: Any) -> None:
        if not torch.compiler.is_compiling():  # a compiled step writes as torch counts it
            cls.count += 1


class _Stamp:
    """What a set of parameters looked like. It keeps none of them alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.memory = [(StorageWeakRef(t.untyped_storage()), t.data_ptr()) for t in tensors]
        self.versions = [t._version for t in tensors]
        self.places = [_places(t) for t in tensors]
        self.values = _sampled(tensors, self.places)
        self.sums = _sums(tensors)
        self.steps = _Steps.count

    @property
    def dead(self) -> bool:
        """A parameter is gone, or has other memory."""
        return any(ref.expired() for ref, _ in self.memory)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same, as they were."""
        for (ref, address), version, tensor in zip(
            self.memory, self.versions, tensors, strict=True
        ):
            # the weak reference keeps the storage's own address from being used again
            same = ref.cdata == tensor.untyped_storage()._cdata and address == tensor.data_ptr()
            if not same or tensor._version != version:
                return False
        sampled = _sampled(tensors, self.places)
        if not all(torch.equal(a, b) for a, b in zip(sampled, self.values, strict=True)):
            return False
        if self.steps != _Steps.count:
            steps = _Steps.count
            if not torch.equal(_sums(tensors), self.sums):
                return False
            self.steps = steps
        return True


def _bits(tensor: Tensor) -> Tensor:
    """Its values as integers, of which NaN equals itself."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(kind[tensor.element_size()])


def _places(tensor: Tensor) -> tuple[int, int, int]:
    """(how many values, steps from one to the next, of the first): of memory, from end to end."""
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    count = min(size, _SAMPLES) if tensor.numel() else 0
    if tensor.device.type != "cpu":
        count = 0  # to look at values would wait for all that the device has to do
    return count, max((size - 1) // max(count - 1, 1), 1), int(tensor.storage_offset())


def _sampled(tensors: Sequence[Tensor], places: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """A few values of each, in one tensor for each dtype."""
    found: dict[Any, list[Tensor]] = {}
    for tensor, (count, step, offset) in zip(tensors, places, strict=True):
        own = tensor.as_strided((count,), (step,), offset)
        found.setdefault((tensor.dtype, tensor.device), []).append(own)
    return [_bits(torch.cat(own)) for own in found.values()]


def _sums(tensors: Sequence[Tensor]) -> Tensor:
    found = [_bits(t).sum(dtype=torch.int64).cpu() for t in tensors]
    return torch.stack(found) if found else torch.empty(0, dtype=torch.int64)


class Weights:
    """The derived tensors of one compiled graph, per set of parameters.

    Args:
        watched: positions of the parameters that something was derived from.
        derive: makes `Derived` of all that Dynamo passes.
    """

    def __init__(self, watched: Sequence[int], derive: Callable[[Sequence[Any]], Derived]) -> None:
        self.positions = list(watched)
        self.derive = derive
        self.times = 0
        self._sets: dict[tuple[int, ...], tuple[_Stamp, Derived]] = {}
        self._lock = threading.Lock()
        _Steps.watch()

    def put(self, inputs: Sequence[Any], derived: Derived) -> None:
        """Remembers what these inputs gave."""
        own = [inputs[i] for i in self.positions]
        for key in [k for k, (old, _) in self._sets.items() if old.dead]:
            del self._sets[key]
        self._sets[tuple(map(id, own))] = _Stamp(own), derived

    def of(self, inputs: Sequence[Any]) -> Derived:
        """What these inputs give, derived again where that is not known or not true any more."""
        own = [inputs[i] for i in self.positions]
        key = tuple(map(id, own))
        with torch.inference_mode(False), torch.no_grad():
            found = self._sets.get(key)
            if found is not None and found[0].holds(own):
                return found[1]
            with self._lock:  # another thread may have been faster
                found = self._sets.get(key)
                if found is not None and found[0].holds(own):
                    return found[1]
                derived = self.derive(inputs)
                self.times += 1
                self.put(inputs, derived)
                return derived


def again(
    recipe: Recipe,
    paths: Mapping[str, int],
    inputs: Sequence[Any],
    wanted: Mapping[str, Tensor],
    max_error: float | None,
) -> list[Tensor]:
    """The derived tensors for other values of the parameters.

    Args:
        recipe: what was installed where.
        paths: name of a parameter → its position among the inputs.
        inputs: as Dynamo passes them.
        wanted: the tensors to make, by name in the rewritten tree, as they are now.
        max_error: declines layers beyond it, as at the first time.

    Raises:
        Refused: a pass declines the new values, or gives a layer of another shape.
    """
    made: dict[str, Tensor] = {}
    for fqn, installed in recipe.installed.items():
        if not any(name.startswith(f"{fqn}.") for name in wanted):
            continue
        refs = {"weight": installed.weight_ref, "bias": installed.bias_ref}
        given = {role: inputs[paths[ref]].detach() for role, ref in refs.items() if ref is not None}
        layer = replay(fqn, recipe, given, Refused, max_error)
        made.update({f"{fqn}.{k}": t for k, t in named_tensors(layer).items()})
    for name, old in wanted.items():
        new = made.get(name)
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            raise Refused(f"{name}: the new weights give a layer of another shape")
    return [made[name].detach() for name in wanted]
