"""New trainable layers on the user's own module, between two calls of compiled code.

Dynamo's guards hold while a graph is compiled, so the module must not change under them: the first
call of the graph runs it uncompiled, and then installs. The next call finds a changed module, and
Dynamo compiles that.
"""

from __future__ import annotations

import re
import threading
import warnings
from typing import Any

import torch
from torch import nn

from rewriter.dynamo import Lifted
from rewriter.errors import RewriteError, RewriteWarning
from rewriter.frame import Frame, source_name
from rewriter.hosted import Program
from rewriter.store import Recipe
from rewriter.tree import is_hook_dict, submodule

__all__ = ["Installation"]


class Installation:
    """What is to be put where, once.

    Raises:
        RewriteError: a layer stands where there is no module of the user's, or one with hooks.
    """

    def __init__(self, lifted: Lifted, recipe: Recipe, frame: Frame) -> None:
        self.lifted = lifted
        self.program = Program(lifted.graph, None)
        self.places: list[tuple[nn.Module, nn.Module, nn.Module]] = []
        self._lock = threading.Lock()
        for fqn, installed in recipe.installed.items():
            if installed.weight_ref is None or installed.weight_ref not in lifted.paths:
                raise RewriteError(f"{fqn} has no weight to install a layer for: rewrite first")
            source = source_name(lifted.placeholders[lifted.paths[installed.weight_ref]])
            old = frame.module(source)
            root = frame.module(re.sub(r"\._modules.*", "._parameters['x']", source))
            if old is None or root is None or old is root or type(old) is not nn.Linear:
                kind = "a plain function" if old is None else f"a {type(old).__name__}"
                raise RewriteError(
                    f"install=True replaces nn.Linear modules, and {fqn} is {kind}: call "
                    "rewriter.rewrite first and compile its result"
                )
            if any(is_hook_dict(name) and hooks for name, hooks in vars(old).items()):
                raise RewriteError(
                    f"{fqn} has hooks, which install=True would lose: call rewriter.rewrite first"
                )
            layer = submodule(lifted.root, fqn)
            assert layer is not None
            self.places.append((root, old, layer))
        self.run = torch._dynamo.disable(self._run, reason="installs layers")

    def _run(self, *inputs: Any) -> Any:
        with self._lock:
            places, self.places = self.places, []
        for root, old, layer in places:
            for module in list(root.modules()):
                for name, child in module._modules.items():
                    if child is old:
                        module._modules[name] = layer
        if places:
            warnings.warn(
                f"{len(places)} layers with new parameters were installed on "
                f"{type(places[0][0]).__name__}: build the optimizer now, or remap one that exists "
                "with rewriter.remap_optimizer",
                RewriteWarning,
                stacklevel=2,
            )
        return self.program(self.lifted.root, self.lifted.user_inputs(inputs), "")
