"""The recipe of a save as values: every type, name and figure in it is checked before it counts."""

from __future__ import annotations

import json
import math
import pathlib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewriter.base import Layer
from rewriter.errors import StoreError
from rewriter.kernels.ops import RecordError
from rewriter.modules.pointwise import Channels
from rewriter.modules.typed import depth_above, fits
from rewriter.planner import MemoryBudget
from rewriter.recipe.edits import Record, edit_from_json
from rewriter.recipe.names import (
    FORMAT,
    RECIPE,
    allowed_class,
    class_name,
    dtype_of,
    known_class,
    pass_of,
)
from rewriter.recipe.recipe import Installed
from rewriter.report import Report
from rewriter.store.files import is_weights, recipe_text

__all__ = ["Entry", "Saved", "check_config", "read"]


@dataclass(frozen=True)
class Entry:
    """One rewritten place.

    Args:
        name: of the place.
        cls, config: of the layer there: its class and its constructor's arguments.
        same_as: the first name of a layer that stands at several places.
        installed: where it came from.
        dtype: of the original weight.
        origin: class (or its name, where it is not known here) and constructor's arguments of the
            `Layer` that the original had there.
    """

    name: str
    cls: type[nn.Module]
    config: dict[str, Any]
    same_as: str
    installed: Installed
    dtype: torch.dtype | None
    origin: tuple[Any, dict[str, Any]] | None


@dataclass(frozen=True)
class Saved:
    """A recipe that was read and checked.

    Args:
        model: class of the model.
        layers: the rewritten places.
        ties: further name of a tensor → its first one.
        frozen: names of the parameters that do not train.
        non_persistent: names of the buffers that a state_dict leaves out.
        extra_state: names of the tensors that are modules' extra state.
        complexes: tensors that the file holds as pairs of real numbers → their dtype.
        example: the example call as JSON.
        report: the ledger.
        weights, sha256: name and checksum of the weights file.
        memory: the budget of training steps.
        lowering: per module that ran graphs, where fused ops ran there; None where none did.
        edits: what was removed and cut.
        edits_in_graph: the Python forward does not go through the edited places.
        refuses, likeness: as in `Recipe`; of saves that do not say, the model's class alone.
    """

    model: str
    layers: list[Entry]
    ties: dict[str, str]
    frozen: frozenset[str]
    non_persistent: frozenset[str]
    extra_state: frozenset[str]
    complexes: dict[str, torch.dtype]
    example: Any
    report: Report
    weights: str
    sha256: str
    memory: MemoryBudget | None
    lowering: dict[str, dict[str, bool] | None]
    edits: tuple[Record, ...]
    edits_in_graph: bool
    refuses: str | None
    likeness: dict[str, str]

    @property
    def in_graph(self) -> bool:
        """Whether a rewritten place is found by a graph only."""
        return self.edits_in_graph or any(e.installed.graph_only for e in self.layers)


_REQUIRED: Mapping[str, Any] = {
    "model": str,
    "layers": list[dict[str, Any]],
    "ties": dict[str, str],
    "frozen": list[str],
    "non_persistent": list[str],
    "example": dict[str, Any] | None,
    "report": dict[str, Any],
    "weights": str,
    "sha256": str,
}
_OPTIONAL: Mapping[str, tuple[Any, Any]] = {
    "memory": (dict[str, Any] | None, None),
    "lower": (bool, True),
    "lowering": (dict[str, dict[str, bool] | None] | None, None),
    "edits": (list[dict[str, Any]], []),
    "edits_in_graph": (bool, False),
    "extra_state": (list[str], []),
    "complex": (dict[str, str], {}),
    "refuses": (str | None, None),
    "likeness": (dict[str, str], {}),
}
"""Type, and what stands for it in saves of versions that did not write it."""
_ENTRY: Mapping[str, Any] = {
    "name": str,
    "class": str,
    "config": dict[str, Any],
    "same_as": str,
    "weight": str | None,
    "bias": str | None,
    "transposed": bool,
    "graph_only": bool,
    "dtype": str | None,
    "origin": tuple[str, dict[str, Any]] | None,
    "chain": list[tuple[str, Any]],
}
_MOST_PASSES = 100  # over one layer, which each replaced
_DEEPEST = 64  # of tables in tables; a report's go nine deep, an example's as deep as the call


def read(directory: pathlib.Path, extra: Sequence[type]) -> Saved:
    """The recipe of a save.

    Args:
        directory: of the save.
        extra: further classes that the recipe may name.

    Raises:
        StoreError: there is none, it is damaged, from another version, or names a class that is not
            on the allow-list.
    """
    path = directory / RECIPE
    try:
        document = json.loads(recipe_text(directory))
    except FileNotFoundError:
        raise StoreError(
            f"{directory} has no {RECIPE}: it was not written by rewriter.save"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not readable: {error}") from error
    if not isinstance(document, dict) or "format" not in document:
        raise StoreError(f"{path} is not a recipe of this package")
    if document["format"] != FORMAT:
        raise StoreError(
            f"{directory} has format {str(document['format'])[:40]}, this version reads {FORMAT}: "
            "use the version of rewriter that wrote it"
        )
    try:
        if depth_above(document, _DEEPEST):
            raise ValueError(f"tables are nested deeper than {_DEEPEST}")
        return _saved(document, extra)
    except RecordError:  # of an op in a file that a layer's class needed: not the recipe's
        raise
    except StoreError as error:  # says what, and not where
        raise StoreError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise StoreError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _saved(document: Mapping[str, Any], extra: Sequence[type]) -> Saved:
    _check(document, _REQUIRED, "the recipe")
    given = {key: document.get(key, default) for key, (_, default) in _OPTIONAL.items()}
    _check(given, {key: hint for key, (hint, _) in _OPTIONAL.items()}, "the recipe")
    if not is_weights(document["weights"]):
        raise ValueError(f"weights is no name that save gives: {document['weights'][:80]!r}")
    layers = [_entry(e, extra) for e in document["layers"]]
    names = {e.name for e in layers if e.same_as == e.name}
    if len({e.name for e in layers}) < len(layers):
        raise ValueError("a layer is listed twice")
    if any(e.same_as not in names for e in layers):
        raise ValueError("a layer is the same as one that is not listed")
    return Saved(
        document["model"],
        layers,
        document["ties"],
        frozenset(document["frozen"]),
        frozenset(document["non_persistent"]),
        frozenset(given["extra_state"]),
        {name: dtype_of(dtype) for name, dtype in given["complex"].items()},
        document["example"],
        Report.from_dict(document["report"]),
        document["weights"],
        document["sha256"],
        None if given["memory"] is None else _budget(given["memory"]),
        {"": {} if given["lower"] else None} if given["lowering"] is None else given["lowering"],
        tuple(edit_from_json(e) for e in given["edits"]),
        given["edits_in_graph"],
        given["refuses"],
        given["likeness"] or {"": document["model"].rpartition(".")[2]},
    )


def _check(data: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    for key, hint in wanted.items():
        if not fits(data[key], hint):
            shown = repr(data[key])[:80]
            raise TypeError(f"{key} of {what} is {shown}")


def _entry(entry: Mapping[str, Any], extra: Sequence[type]) -> Entry:
    _check(entry, _ENTRY, "a layer")
    if len(entry["chain"]) > _MOST_PASSES:
        raise ValueError(f"a layer that {len(entry['chain']):,} passes installed")
    chain = [(known_class(k, extra, (Layer,)), pass_of(p, extra)) for k, p in entry["chain"]]
    if not chain:
        raise ValueError("a layer that no pass installed")
    installed = Installed(
        entry["weight"] or None,
        entry["bias"] or None,
        entry["transposed"],
        chain,
        entry["graph_only"],
        Channels.from_json(entry.get("channels")),
    )
    dtype, origin = entry["dtype"], entry["origin"]
    return Entry(
        entry["name"],
        allowed_class(entry["class"], extra, (Layer, nn.Linear)),
        entry["config"],
        entry["same_as"],
        installed,
        None if dtype is None else dtype_of(dtype),
        None if origin is None else (known_class(origin[0], extra, (Layer,)), origin[1]),
    )


def _budget(data: Mapping[str, Any]) -> MemoryBudget:
    hints = typing.get_type_hints(MemoryBudget)
    if unknown := sorted(set(data) - set(hints)):
        raise ValueError(f"a memory budget has no {unknown[0]!r}")
    _check(data, {key: hints[key] for key in data}, "the memory budget")
    return MemoryBudget(**data)


# the constructor of a layer


def check_config(entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
    """Checks what a layer is built from, before it is.

    A layer has a weight for each of its features at least, and what it counts are parts of its
    weights: no figure is above the number of weights that the file holds for it, but for one of a
    few that its constructor names (`Literal`). The constructor of a class that the caller hands in
    may count other things (a seed): there that goes for its features.

    Args:
        entry: the layer.
        shapes: of the tensors that the file holds for it, by name in the layer.

    Raises:
        StoreError: a figure, or a type, is none that the layer can have been saved with.
    """
    ours = entry.cls.__module__.partition(".")[0] in ("rewriter", "torch")
    packed = getattr(entry.cls, "packed", {})
    held = [math.prod(s) * packed.get(n, 1) for n, s in shapes.items()]
    sides = [side for shape in shapes.values() for side in shape]
    most = max([sum(held), *sides], default=0)
    hints = _hints(entry.cls)
    named = {n for n, hint in hints.items() if typing.get_origin(hint) is typing.Literal}
    figures = entry.config if ours else {n: entry.config.get(n) for n in _FEATURES}
    for name, value in figures.items():
        if name in named or hints.get(name) is float:  # no size
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not isinstance(value, bool) and number > most:
                raise StoreError(
                    f"{entry.name}: cannot build {class_name(entry.cls)}: {name}={_short(value)} "
                    f"is more than the {most} weights that the file holds for it"
                )
    for name, value in entry.config.items():
        if not fits(value, hints.get(name, Any)):
            raise StoreError(
                f"{entry.name}: cannot build {class_name(entry.cls)}: {name}={_short(value)} is of "
                "another type than its constructor takes"
            )


_FEATURES = ("in_features", "out_features")


def _short(value: Any) -> str:
    return re.sub(r"(?s)^(.{60}).*", r"\1…", repr(value))


def _hints(cls: type[nn.Module]) -> dict[str, Any]:
    """Types of the constructor's arguments, as far as they can be had."""
    try:
        return typing.get_type_hints(cls.__init__)
    except (NameError, TypeError):  # annotations for type checkers only
        return {}
