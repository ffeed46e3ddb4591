"""Lets a benchmark run from a source checkout where nothing of ours is installed.

`passes/` and `kernels/` become `rewriter.passes` and `rewriter.kernels` by being installed: no
entry of PYTHONPATH does that, and the root on it would shadow the distribution `kernels`. Whoever
imports this module first imports this checkout's packages afterwards, installed or not.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["REQUIRED", "missing"]

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"rewriter": "rewriter", "rewriter.passes": "passes", "rewriter.kernels": "kernels"}
REQUIRED = (
    "torch", "numpy", "networkx", "scipy", "triton", "safetensors", "rich", "platformdirs",
    "jinja2", "matplotlib",
)  # fmt: skip


class _Folders(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in FOLDERS:
            return None
        folder = ROOT / FOLDERS[fullname]
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def missing() -> list[str]:
    """Packages that ours needs and this Python does not have."""
    return [name for name in REQUIRED if importlib.util.find_spec(name) is None]


sys.meta_path.insert(0, _Folders())
