"""What a rewrite installed, and the example call as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.base import Layer, Pass
from rewriter.errors import StoreError
from rewriter.modules.pointwise import Channels, Pointwise, inner
from rewriter.modules.tensors import named_tensors
from rewriter.modules.typed import fits
from rewriter.planner.budget import MemoryBudget
from rewriter.recipe.edits import Record, Removed
from rewriter.recipe.likeness import likeness
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
        graph_only: the user's code calls a function there: only a graph, or Python code that the
            layer stands in as a weight for, goes through it.
        channels: of a 1×1 convolution: how it reads its input.
    """

    weight_ref: str | None
    bias_ref: str | None
    transposed: bool
    chain: list[tuple[Any, Any]] = field(default_factory=list)
    graph_only: bool = False
    channels: Channels | None = None

    def fitted(self, layer: nn.Module) -> nn.Module:
        """A layer as the model calls it in this place."""
        return layer if self.channels is None else Pointwise(layer, self.channels)

    def __getstate__(self) -> dict[str, Any]:
        # `where` is often a lambda, which does not pickle, and has done its work
        chain = [(k, p.kept() if isinstance(p, Pass) else p) for k, p in self.chain]
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
        lower: whether the eval graph is lowered.
        edits: blocks that were removed and widths that were cut, in order; they come before the
            passes of `installed`.
        edits_in_graph: the Python forward does not go through the edited places.
        refuses: why calls unlike the captured one are refused, found by running the Python forward
            over the rewritten layers; "" where they are not; None where nobody has looked.
        likeness: the classes of the original's modules, by which a save knows it again; {} where
            they are not known.
    """

    installed: dict[str, Installed] = field(default_factory=dict)
    example: Any = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    origins: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    memory: MemoryBudget | None = None
    lower: bool = True
    edits: list[Record] = field(default_factory=list)
    edits_in_graph: bool = False
    refuses: str | None = None
    likeness: dict[str, str] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # version 0.1.0 has no edits, 0.2.0 no reason to refuse, and 0.5.0 no likeness
        new = {"edits": [], "edits_in_graph": False, "refuses": None, "likeness": {}}
        vars(self).update({**new, **state})

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
        layers = [(n, inner(m)) for n, m in named]
        origins = {n: (type(m), dict(m.config())) for n, m in layers if isinstance(m, Layer)}
        return cls(dtypes=dtypes, origins=origins, likeness=likeness(root))


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


_LARGEST_EXAMPLE = 64 << 20
"""Bytes of a recorded example call that a recipe may ask for."""


def example_from_json(data: Any) -> dict[str, Any]:
    """The inverse of `example_to_json`.

    Raises:
        StoreError: there is none, it is damaged, or larger than 64 MiB.
    """
    if data is None:
        raise StoreError("this rewrite lives in a graph: pass example_inputs to load it")
    room = _LARGEST_EXAMPLE

    def tensor(shape: Any, fill: Any, dtype: torch.dtype) -> Tensor:
        nonlocal room
        if not fits(shape, list[int]) or any(side < 0 for side in shape):
            raise TypeError(f"a tensor of shape {str(shape)[:80]}")
        room -= math.prod(shape) * dtype.itemsize
        if room < 0:
            raise StoreError(
                f"the recipe's example call takes more than {_LARGEST_EXAMPLE >> 20} MiB: pass "
                "example_inputs to load it"
            )
        return torch.full(shape, fill, dtype=dtype)

    def build(item: Any) -> Any:
        if "tensor" in item:
            return tensor(item["tensor"], item["fill"], dtype_of(item["dtype"]))
        if "list" in item:
            return [build(v) for v in item["list"]]
        if "tuple" in item:
            return tuple(build(v) for v in item["tuple"])
        if "dict" in item:
            return {k: build(v) for k, v in item["dict"].items()}
        return item["value"]

    try:
        return {k: build(v) for k, v in data.items()}
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise StoreError(f"the recipe's example call is damaged: {error}") from error


def recipe_of(model: nn.Module) -> tuple[Recipe, Report]:
    """What was done to a rewritten model, and its ledger.

    Raises:
        StoreError: it is none; where one is inside (a wrapper's), the message says where.
    """
    if not _is_rewritten(model):
        said = f"{type(model).__name__} was not made by rewriter.rewrite or rewriter.load"
        inside = model.named_modules() if isinstance(model, nn.Module) else ()
        if found := next((name for name, m in inside if _is_rewritten(m)), ""):
            said += f"; the model inside it that was, is its {found!r}: give that one"
        raise StoreError(said)
    state = vars(model)["_rewriter"]
    return state.recipe, state.report


def _is_rewritten(model: object) -> bool:
    state = vars(model).get("_rewriter") if isinstance(model, nn.Module) else None
    return getattr(state, "recipe", None) is not None
