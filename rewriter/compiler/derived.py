"""Weights that a compiled graph was given in another form, and that must not get stale.

An int8 weight is derived from the user's float parameter when a graph is compiled. At every call
the parameters that Dynamo passes are compared with those it was derived from (see
`rewriter.modules.versions` for how). Where one differs (an optimizer stepped, a checkpoint was
loaded, or another block of the same shape runs the same code) the layers are derived again and kept
beside the others; the code stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import RewriteError
from rewriter.modules.tensors import named_tensors
from rewriter.modules.versions import Stamp, watch_steps
from rewriter.recipe.recipe import Recipe
from rewriter.recipe.replaying import replay

__all__ = ["Derived", "Refused", "Weights", "again"]


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
        self._sets: dict[tuple[int, ...], tuple[Stamp, Derived]] = {}
        self._lock = threading.Lock()
        watch_steps()

    def put(self, inputs: Sequence[Any], derived: Derived) -> None:
        """Remembers what these inputs gave."""
        own = [inputs[i] for i in self.positions]
        for key in [k for k, (old, _) in self._sets.items() if old.dead]:
            del self._sets[key]
        self._sets[tuple(map(id, own))] = Stamp(own), derived

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
    packed: Callable[[Mapping[str, nn.Module]], Mapping[str, Tensor]],
) -> list[Tensor]:
    """The derived tensors for other values of the parameters.

    Args:
        recipe: what was installed where.
        paths: name of a parameter → its position among the inputs.
        inputs: as Dynamo passes them.
        wanted: the tensors to make, by name in the rewritten tree, as they are now.
        max_error: declines layers beyond it, as at the first time.
        packed: by name, what fused ops are packed of, given the layers that are new.

    Raises:
        Refused: a pass declines the new values, or gives a layer of another shape.
    """
    layers: dict[str, nn.Module] = {}
    for fqn, installed in recipe.installed.items():
        refs = {"weight": installed.weight_ref, "bias": installed.bias_ref}
        given = {role: inputs[paths[ref]].detach() for role, ref in refs.items() if ref is not None}
        layers[fqn] = replay(fqn, recipe, given, Refused, max_error)
    made = {
        f"{fqn}.{k}": t for fqn, layer in layers.items() for k, t in named_tensors(layer).items()
    }
    made.update(packed(layers))
    for name, old in wanted.items():
        new = made.get(name)
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            raise Refused(f"{name}: the new weights give a layer of another shape")
    return [made[name].detach() for name in wanted]
