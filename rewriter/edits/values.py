"""Edits as values: what a plan wants changed, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from rewriter.errors import OptionError, PassError
from rewriter.modules.refusal import Skip
from rewriter.sites import Site

__all__ = [
    "BLOCK",
    "Cut",
    "Edit",
    "Keep",
    "Remove",
    "Replace",
    "Resize",
    "Subgraph",
    "Width",
    "named",
    "places",
    "site_of",
]

BLOCK = "block"
"""The kind of a site that is a module with modules inside."""


@dataclass(frozen=True, eq=False)
class Cut:
    """One call of a subgraph: what reads `result` shall read `source` instead."""

    source: Node
    result: Node


@dataclass(frozen=True, eq=False)
class Subgraph:
    """A module and all of its calls, over all graphs; `View.block` makes it.

    Args:
        site: of kind BLOCK.
        names: all names of the module.
        cuts: one per call.
        through: operations that the path from a source to its result runs through, beside the
            additions: of a post-norm block its norm, which goes with it.
    """

    site: Site
    names: tuple[str, ...]
    cuts: tuple[Cut, ...]
    through: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Width:
    """The layers that have one entry per hidden neuron; `View.width` finds them.

    Args:
        size: how many neurons there are.
        rows: the linear layers that make them (up, and gate).
        columns: the linear layers that read them.
        norms: names of the batch norms between.
    """

    size: int
    rows: tuple[Site, ...]
    columns: tuple[Site, ...]
    norms: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Replace:
    """Another layer at a site; its errors (weights, outputs) are those of a `Replacement`."""

    site: Site
    layer: nn.Module
    reason: str
    error: float | None = 0.0
    output_error: float | None = None

    def __post_init__(self) -> None:
        _check_reason(self)


@dataclass(frozen=True, eq=False)
class Remove:
    """A subgraph goes, with its modules: its readers read what went into it.

    Raises:
        PassError: `subgraph` is none: `View.block` may answer with a Skip.
    """

    subgraph: Subgraph
    reason: str

    def __post_init__(self) -> None:
        given: object = self.subgraph
        if isinstance(given, Skip):
            raise PassError(
                f"Remove of no block: {given.reason}: where view.block answers with a Skip, hand "
                "its reason on with Keep(site, skip.reason)"
            )
        if not isinstance(given, Subgraph):
            raise PassError(f"Remove of a {type(given).__name__}: take view.block(name)")
        _check_reason(self)


@dataclass(frozen=True, eq=False)
class Resize:
    """Of the outputs of a linear site only those at `kept` (ascending) stay, in all layers that
    make or read them.

    Raises:
        OptionError: `kept` is empty, or not ascending whole numbers.
    """

    site: Site
    kept: Sequence[int]
    reason: str

    def __post_init__(self) -> None:
        _check_reason(self)
        kept: tuple[Any, ...] = tuple(self.kept)
        whole = all(isinstance(k, int) and not isinstance(k, bool) and k >= 0 for k in kept)
        if not kept or not whole or list(kept) != sorted(set(kept)):
            raise OptionError(
                f"Resize of {self.site.fqn}: kept must be ascending whole numbers, at least one; "
                f"got {str(kept)[:60]}"
            )
        object.__setattr__(self, "kept", kept)


@dataclass(frozen=True, eq=False)
class Keep:
    """Nothing changes here, and the report says why."""

    site: Site
    reason: str

    def __post_init__(self) -> None:
        _check_reason(self)


Edit = Replace | Remove | Resize | Keep


def _check_reason(edit: Edit) -> None:
    reason: object = edit.reason
    if not isinstance(reason, str) or not reason.strip():
        raise OptionError(
            f"{named(edit)}: reason={reason!r}: say in words why, for the report lists each edit "
            "with its reason"
        )


def named(edit: Edit) -> str:
    """The edit as messages name it: `Remove(encoder.layer.3)`."""
    return f"{type(edit).__name__}({site_of(edit).fqn})"


def site_of(edit: Edit) -> Site:
    """Where an edit is."""
    return edit.subgraph.site if isinstance(edit, Remove) else edit.site


def places(edit: Edit, width: Width | None = None) -> set[tuple[str, str]]:
    """Pairs (name of a module, its rows or its columns) that an edit changes.

    Args:
        edit: any.
        width: what a `Resize` concerns.
    """
    if isinstance(edit, Keep):
        return set()
    if isinstance(edit, Resize):
        assert width is not None
        rows = {(s.fqn, "rows") for s in width.rows} | {(n, "rows") for n in width.norms}
        return rows | {(s.fqn, "columns") for s in width.columns}
    names = edit.subgraph.names if isinstance(edit, Remove) else (edit.site.fqn,)
    return {(name, side) for name in names for side in ("rows", "columns")}
