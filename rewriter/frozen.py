"""Weights that a compiled graph was given in another form, and that must not get stale.

An int8 weight is derived from the user's float parameter when a graph is compiled. At every call
the parameters that Dynamo passes are compared with those it was derived from: by identity, by
torch's version counter, which every write in place raises, and by address. Where one differs
(an optimizer stepped, a checkpoint was loaded, or another block of the same shape runs the same
code) the layers are derived again and kept beside the others; the code stays.

Not counted by torch, hence not seen: writes through `tensor.data` in place, or through NumPy.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.base import Replacement
from rewriter.errors import RewriteError
from rewriter.store import Recipe, layer_before, site_around
from rewriter.store.tensors import named_tensors

__all__ = ["Derived", "Refused", "Weights", "again"]

Stamp = tuple["weakref.ref[Tensor]", int, int]


class Refused(RewriteError):
    """A pass does not take the weights as they are now."""


@dataclass(frozen=True)
class Derived:
    """What one set of parameters gave: the code to run, and the tensors that it takes on top."""

    run: Callable[..., Any]
    tensors: list[Tensor]


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
        self._sets: dict[tuple[int, ...], tuple[list[Stamp], Derived]] = {}
        self._lock = threading.Lock()

    def put(self, inputs: Sequence[Any], derived: Derived) -> None:
        """Remembers what these inputs gave."""
        own = [inputs[i] for i in self.positions]
        stamps = [(weakref.ref(t), t._version, t.data_ptr()) for t in own]
        for key in [k for k, (old, _) in self._sets.items() if any(r() is None for r, _, _ in old)]:
            del self._sets[key]
        self._sets[tuple(map(id, own))] = stamps, derived

    def of(self, inputs: Sequence[Any]) -> Derived:
        """What these inputs give, derived again where that is not known or not true any more."""
        own = [inputs[i] for i in self.positions]
        found = self._sets.get(tuple(map(id, own)))
        if found is not None and _holds(found[0], own):
            return found[1]
        with self._lock:  # another thread may have been faster
            found = self._sets.get(tuple(map(id, own)))
            if found is None or not _holds(found[0], own):
                with torch.inference_mode(False), torch.no_grad():
                    derived = self.derive(inputs)
                self.times += 1
                self.put(inputs, derived)
                return derived
        return found[1]


def _holds(stamps: Sequence[Stamp], tensors: Sequence[Tensor]) -> bool:
    for (ref, version, address), tensor in zip(stamps, tensors, strict=True):
        if ref() is not tensor or tensor._version != version or tensor.data_ptr() != address:
            return False
    return True


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
        layer, transposed = layer_before(fqn, recipe, given), installed.transposed
        for kind, rewrite in installed.chain:
            site = site_around(layer, fqn, kind, transposed)
            try:
                answer = rewrite.propose(site)
            except Exception as error:
                raise Refused(f"{fqn}: {rewrite} fails on the new weights: {error}") from error
            if not isinstance(answer, Replacement):
                raise Refused(f"{fqn}: {rewrite} refuses the new weights: {answer.reason}")
            off = answer.error
            if max_error is not None and (off is None or not off <= max_error):
                raise Refused(f"{fqn}: error {off} of the new weights is above {max_error:.3g}")
            layer, transposed = answer.layer, False
        made.update({f"{fqn}.{k}": t for k, t in named_tensors(layer).items()})
    for name, old in wanted.items():
        new = made.get(name)
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            raise Refused(f"{name}: the new weights give a layer of another shape")
    return [made[name].detach() for name in wanted]
