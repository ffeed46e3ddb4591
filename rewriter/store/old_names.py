"""Module names of version 0.1.0, which its pickles hold, lead to where the modules are now."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "find_moved"]

MOVED = {
    "rewriter.hosted": "rewriter.capture.hosted",
    "rewriter.signature": "rewriter.capture.signature",
    "rewriter.watch": "rewriter.capture.guards",
    "rewriter.structure": "rewriter.modules.structure",
    "rewriter.store.recipe": "rewriter.recipe.recipe",
    "rewriter.planner.plan": "rewriter.planner.search.plan",
    "rewriter.planner.training": "rewriter.planner.apply.training",
    "rewriter.cost.device": "rewriter.cost.machine.device",
    "rewriter.cost.measured": "rewriter.cost.machine.measured",
    "rewriter.cost.roofline": "rewriter.cost.machine.roofline",
}
"""Old name → new name, of the modules whose classes are pickled with a rewritten model."""


class _Moved(MetaPathFinder, Loader):
    """Imports the module of the new name and lists it under the old one as well."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        alias: Any = module.__spec__  # importlib has put the alias's own in its place
        module.__spec__ = alias.loader_state


def find_moved() -> None:
    """Lets `import` and pickle find the old names."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
