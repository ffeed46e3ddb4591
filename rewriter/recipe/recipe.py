"""What a rewrite installed, and the example call as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.base import Layer
from rewriter.errors import StoreError
from rewriter.modules.tensors import named_tensors
from rewriter.planner.budget import MemoryBudget
from rewriter.recipe.edits import Record, Removed
from rewriter.recipe.names import dtype_name, dtype_of
from rewriter.report import Report

__all__ = [
    "Installed",
    "Recipe",
    "example_from_json",
    "example_to_json",
    "recipe_of",
]


@dataclass
class Installed:
    """One rewritten place: where its original tensors were, and the passes it went through.

    Args:
        weight_ref, bias_ref: names of the original tensors; None where the site had none.
        transposed: the original weight is stored [in, out].
        chain: pairs (kind of site, pass), in order. From a loaded recipe, what is not on the
            allow-list stays JSON: the name of a class, the class and options of a pass.
        graph_only: the Python forward does not go through the new layer.
    """

    weight_ref: str | None
    bias_ref: str | None
    transposed: bool
    chain: list[tuple[Any, Any]] = field(default_factory=list)
    graph_only: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # `where` is often a lambda, which does not pickle, and has done its work
        chain = [
            (k, replace(p, where=None) if getattr(p, "where", None) is not None else p)
            for k, p in self.chain
        ]
        return {**vars(self), "chain": chain}


@dataclass
class Recipe:
    """What it takes to build the rewritten model again from the original one.

    Args:
        installed: the rewritten places by name.
        example: the example call as JSON (shapes and constants); None where it has no JSON form.
        dtypes: of the original's tensors.
        origins: class and constructor arguments of the `Layer`s that the original had.
        memory: the budget that its training steps are planned for.
        lower: whether the eval graph is lowered again where it is loaded.
        edits: blocks that were removed and widths that were cut, in order; they come before the
            passes of `installed`.
        edits_in_graph: the Python forward does not go through the edited places.
    """

    installed: dict[str, Installed] = field(default_factory=dict)
    example: Any = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    origins: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    memory: MemoryBudget | None = None
    lower: bool = True
    edits: list[Record] = field(default_factory=list)
    edits_in_graph: bool = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"edits": [], "edits_in_graph": False, **state})  # 0.1.0 has none

    def note(self, edit: Record) -> None:
        """Notes an edit; layers that were installed inside of a removed block go with it."""
        self.edits = [*self.edits, edit]
        gone = tuple(f"{n}." for n in edit.names) if isinstance(edit, Removed) else ()
        self.installed = {
            k: v for k, v in self.installed.items() if not gone or not f"{k}.".startswith(gone)
        }

    def edited_places(self) -> tuple[str, ...]:
        """Names of the modules that edits left at their places."""
        found: dict[str, None] = {}
        for edit in self.edits:
            own = edit.names if isinstance(edit, Removed) else (*edit.rows, *edit.columns)
            gone = tuple(f"{n}." for n in own)
            found = {n: None for n in found if not n.startswith(gone)} | dict.fromkeys(own)
        return tuple(found)

    @classmethod
    def of(cls, root: nn.Module) -> Recipe:
        """The recipe that rewrites nothing of this model yet."""
        dtypes = {k: t.dtype for k, t in named_tensors(root).items()}
        named = root.named_modules(remove_duplicate=False)
        origins = {n: (type(m), dict(m.config())) for n, m in named if isinstance(m, Layer)}
        return cls(dtypes=dtypes, origins=origins)


def example_to_json(arguments: Mapping[str, Any]) -> Any:
    """The example call as JSON: tensors by shape, dtype and, for whole numbers, the largest value
    (a valid index, an open mask); None where something has no form."""
    if any("[" in name for name in arguments):  # `*args` cannot be given back by name
        return None
    try:
        return {name: _to_json(value) for name, value in arguments.items()}
    except TypeError:
        return None


def _to_json(value: Any) -> Any:
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested:
        whole = not (value.is_floating_point() or value.is_complex() or value.is_meta)
        fill = int(value.max()) if whole and value.numel() else 0
        return {"tensor": list(value.shape), "dtype": dtype_name(value.dtype), "fill": fill}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_to_json(v) for v in value]}
    if type(value) is dict and all(isinstance(k, str) for k in value):
        return {"dict": {k: _to_json(v) for k, v in value.items()}}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise TypeError(type(value).__name__)


def example_from_json(data: Any) -> dict[str, Any]:
    if data is None:
        raise StoreError("this rewrite lives in a graph: pass example_inputs to load it")

    def build(item: Any) -> Any:
        if "tensor" in item:
            return torch.full(item["tensor"], item["fill"], dtype=dtype_of(item["dtype"]))
        if "list" in item:
            return [build(v) for v in item["list"]]
        if "tuple" in item:
            return tuple(build(v) for v in item["tuple"])
        if "dict" in item:
            return {k: build(v) for k, v in item["dict"].items()}
        return item["value"]

    try:
        return {k: build(v) for k, v in data.items()}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise StoreError(f"the recipe's example call is damaged: {error}") from error


def recipe_of(model: nn.Module) -> tuple[Recipe, Report]:
    state = vars(model).get("_rewriter") if isinstance(model, nn.Module) else None
    if state is None or state.recipe is None:
        raise StoreError(
            f"{type(model).__name__} was not made by rewriter.rewrite or rewriter.load"
        )
    return state.recipe, state.report
