"""Edits in a recipe: what was removed and resized, and the same over other weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import StoreError

__all__ = ["Removed", "Resized", "edit_from_json", "edit_to_json", "replayed"]


@dataclass(frozen=True)
class Removed:
    """A block went: under all of its names, with all that is inside."""

    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Resized:
    """Of `size` hidden neurons those at `kept` stay.

    Args:
        rows, columns: names of the linear layers that make and that read them.
        transposed: of these, those that store their weight as [in, out].
        norms: names of the batch norms between.
        size, kept, reason: of the edit.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    transposed: tuple[str, ...]
    norms: tuple[str, ...]
    size: int
    kept: tuple[int, ...]
    reason: str

    def cuts(self) -> dict[str, int]:
        """Name of a tensor → its dimension of neurons."""
        cuts: dict[str, int] = {}
        for name in self.rows:
            cuts[f"{name}.weight"] = int(name in self.transposed)
            cuts[f"{name}.bias"] = 0
        for name in self.columns:
            cuts[f"{name}.weight"] = 1 - int(name in self.transposed)
        for name in self.norms:
            keys = ("weight", "bias", "running_mean", "running_var")
            cuts |= {f"{name}.{key}": 0 for key in keys}
        return cuts


Record = Removed | Resized
_KINDS = {"remove": Removed, "resize": Resized}


def edit_to_json(edit: Record) -> dict[str, Any]:
    """The edit as JSON values."""
    kind = next(k for k, cls in _KINDS.items() if isinstance(edit, cls))
    return {"edit": kind, **{f.name: getattr(edit, f.name) for f in fields(edit)}}


def edit_from_json(data: Mapping[str, Any]) -> Record:
    """The inverse of `edit_to_json`.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    cls = _KINDS[data["edit"]]
    made: dict[str, Any] = {}
    for field in fields(cls):
        value = data[field.name]
        kind: type = {"reason": str, "size": int}.get(field.name, list)
        if not isinstance(value, kind):
            raise TypeError(f"{field.name} of an edit is {value!r}")
        if isinstance(value, list):
            inner = int if field.name == "kept" else str
            if not all(type(v) is inner for v in value):
                raise TypeError(f"{field.name} of an edit is {value!r}")
        made[field.name] = tuple(value) if isinstance(value, list) else value
    if cls is Resized:
        kept = made["kept"]
        if not kept or not all(0 <= k < made["size"] for k in kept):
            raise ValueError("an edit keeps neurons that there are not")
        if list(kept) != sorted(set(kept)):
            raise ValueError("an edit keeps a neuron twice, or out of order")
    edit: Record = cls(**made)
    return edit


def replayed(tensors: Mapping[str, Tensor], edits: Sequence[Record]) -> dict[str, Tensor]:
    """Tensors of the original model by name, as the edits leave them.

    Raises:
        StoreError: a tensor is not as wide as the one that was cut.
    """
    found = dict(tensors)
    for edit in edits:
        if isinstance(edit, Removed):
            gone = tuple(f"{name}." for name in edit.names)
            found = {k: t for k, t in found.items() if not k.startswith(gone)}
            continue
        for key, dim in edit.cuts().items():
            if key in found:
                found[key] = _cut(key, found[key], dim, edit)
    return found


def _cut(key: str, tensor: Tensor, dim: int, edit: Resized) -> Tensor:
    if tensor.dim() <= dim or tensor.shape[dim] != edit.size:
        raise StoreError(
            f"{key} has shape {list(tensor.shape)}, and the recipe keeps {len(edit.kept)} of its "
            f"{edit.size} neurons: these are not weights of the model that was rewritten"
        )
    index = torch.tensor(edit.kept, device=tensor.device)
    return tensor.detach().index_select(dim, index)
