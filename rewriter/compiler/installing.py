"""New trainable layers on the user's own module, between two calls of compiled code.

Dynamo's guards hold while a graph is compiled, so the module must not change under them: the first
call of the graph runs it uncompiled, and then installs. The next call finds a changed module, and
Dynamo compiles that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.capture.hosted import Program
from rewriter.compiler.dynamo import Lifted
from rewriter.compiler.user_code import Frame, source_name
from rewriter.errors import RewriteError, warn
from rewriter.modules.tree import has_hooks, submodule
from rewriter.recipe.recipe import Recipe

__all__ = ["Installation", "put_layers"]

Rewritten = tuple[Lifted, Recipe]


class Installation:
    """Runs a graph uncompiled, and installs its new layers on the module that the call is of.

    Dynamo gives the code of one model to others of the same structure, which have weights of their
    own: each is rewritten and given layers when it comes.

    Args:
        lifted, recipe: of the first model.
        frame: whose code it is.
        again: (lifted, recipe) for other inputs.

    Raises:
        RewriteError: a layer stands where there is no module of the user's, or one with hooks.
    """

    def __init__(
        self, lifted: Lifted, recipe: Recipe, frame: Frame, again: Callable[[Any], Rewritten]
    ) -> None:
        self.frame, self.again = replace(frame, asked=None, scope={}, root=None), again
        self.ready: list[_Ready] = [_Ready(lifted, recipe, frame)]
        self.run = torch._dynamo.disable(self._run, reason="installs layers")
        self._lock = threading.Lock()

    def _run(self, *inputs: Any) -> Any:
        with self._lock:
            ready = self.ready.pop() if self.ready else None
        if ready is None or not ready.serves(inputs):
            lifted, recipe = self.again(inputs)
            ready = _Ready(lifted, recipe, self.frame.running())
        ready.install()
        program = Program(ready.lifted.graph, None)
        return program(ready.lifted.root, ready.lifted.user_inputs(inputs), "")


def put_layers(root: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Puts layers into a tree of lifted parameters, by their names."""
    for fqn, layer in layers.items():
        root.set_submodule(fqn, layer)


_REPLACED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Ready:
    """The new layers of one model, and where they go."""

    def __init__(self, lifted: Lifted, recipe: Recipe, frame: Frame) -> None:
        self.lifted = lifted
        self.weights: dict[int, Tensor] = {}
        self.places: list[tuple[nn.Module, nn.Module, nn.Module]] = []
        for fqn, installed in recipe.installed.items():
            if installed.weight_ref is None or installed.weight_ref not in lifted.paths:
                raise RewriteError(f"{fqn} has no weight to install a layer for: rewrite first")
            position = lifted.paths[installed.weight_ref]
            source = source_name(lifted.placeholders[position])
            old = frame.module(source)
            root = frame.base(source)
            if old is None or root is None or old is root or type(old) not in _REPLACED:
                kind = "a plain function" if old is None else f"a {type(old).__name__}"
                raise RewriteError(
                    f"install=True replaces nn.Linear modules and 1×1 convolutions, and {fqn} is "
                    f"{kind}: call rewriter.rewrite first and compile its result"
                )
            if has_hooks(old):
                raise RewriteError(
                    f"{fqn} has hooks, which install=True would lose: call rewriter.rewrite first"
                )
            layer = submodule(lifted.root, fqn)
            assert layer is not None
            assert isinstance(old.weight, Tensor)
            self.weights[position] = old.weight
            self.places.append((root, old, layer))

    def serves(self, inputs: Sequence[Any]) -> bool:
        return all(inputs[i] is weight for i, weight in self.weights.items())

    def install(self) -> None:
        for root, old, layer in self.places:
            for module in list(root.modules()):
                for name, child in module._modules.items():
                    if child is old:
                        module._modules[name] = layer
        warn(
            f"{len(self.places)} layers with new parameters were installed on "
            f"{type(self.places[0][0]).__name__}: build the optimizer now, or remap one that "
            "exists with rewriter.remap_optimizer"
        )
