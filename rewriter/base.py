"""What a pass is: `Pass`, `Phase`, `Replacement`, `Skip`; the `Layer` it installs is in `layer`.

A pass is a frozen dataclass whose fields are its options and whose one method looks at one `Site`
and answers with a value: `Replacement(layer)` or `Skip("reason")`. It never touches the graph or
the model; the engine does. A pass that must see the whole looks at a `View` and answers with edits
(`rewriter.edits`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from rewriter.edits import Edit, View
from rewriter.layer import Layer
from rewriter.modules.moments import Moments
from rewriter.modules.patterns import Pattern
from rewriter.modules.refusal import Skip
from rewriter.sites import Site

__all__ = [
    "Layer",
    "Moments",
    "Pass",
    "Phase",
    "Replacement",
    "Skip",
    "Where",
    "as_parameter",
    "relative_error",
    "unusable",
]

Where = str | Callable[[Site], bool] | None
"""A name pattern (`"encoder.*"`), a predicate over sites, or None for every site."""


class Phase(enum.IntEnum):
    """When a pass may run; a recipe's phases must not descend."""

    STRUCTURE = 1
    SPARSITY = 2
    PRECISION = 3


@dataclass(frozen=True)
class Replacement:
    """The layer that takes a site's place.

    Args:
        layer: an `nn.Module` with the site's call signature. Only a `Layer` (or an `nn.Linear`)
            can be saved.
        error: relative Frobenius error ‖W − W′‖/‖W‖ of the layer's weights; 0.0 for an exact
            replacement, None where it is not known (weights on `meta`).
        output_error: ‖y − y′‖/‖y‖ of the layer's outputs (bias left out of y) on calibration rows
            that it was not fitted to; None without calibration.
        note: what else the user should know, one sentence.
    """

    layer: nn.Module
    error: float | None = 0.0
    note: str = ""
    output_error: float | None = None


@dataclass(frozen=True)
class Pass:
    """One rewrite: options in the fields, one method, no state.

    A subclass is a frozen dataclass that sets `matches` (kinds of `rewriter.sites`, or `Layer`
    classes) and `phase`, validates its options in `__post_init__` (raising `OptionError`), and
    implements `propose`, or `plan` where it must see the whole; only that may match patterns.
    """

    matches: ClassVar[tuple[str | type[Layer] | Pattern, ...]] = ()
    phase: ClassVar[Phase] = Phase.STRUCTURE

    where: Where = field(default=None, kw_only=True)
    """Which sites: a name pattern, a predicate, or None for all."""

    @property
    def exact(self) -> bool:
        """True where the rewritten model computes the same function, up to rounding."""
        return False

    @property
    def plans(self) -> bool:
        """True where it implements `plan`."""
        return type(self).plan is not Pass.plan

    @property
    def calibrates(self) -> bool:
        """True where `propose` makes use of `site.moments`."""
        return False

    def propose(self, site: Site) -> Replacement | Skip:
        """Returns the layer for this site, or why there is none. Must not change anything."""
        raise NotImplementedError(f"{type(self).__name__}.propose")

    def plan(self, view: View) -> list[Edit]:
        """Returns what to change, each edit with its reason: all of it is done or nothing."""
        raise NotImplementedError(f"{type(self).__name__}.plan")

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def __str__(self) -> str:
        """The pass as one would write it: its first option, and what is not at its default."""
        own = [f for f in fields(self) if f.name != "where"]
        shown = own[:1] + [f for f in own[1:] if getattr(self, f.name) != f.default]
        shown += [f for f in fields(self) if f.name == "where" and self.where is not None]
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in shown)
        return f"{type(self).__name__}({options})"


def as_parameter(tensor: Tensor, like: Tensor | None = None) -> nn.Parameter:
    """`tensor` itself where it is a Parameter already, so identity (and the optimizer) is kept;
    else a new Parameter whose `requires_grad` is that of `like` (default: of the tensor)."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    grad = (tensor if like is None else like).requires_grad
    return nn.Parameter(tensor.detach(), requires_grad=grad and tensor.is_floating_point())


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unusable(*tensors: Tensor | None) -> Skip | None:
    """Why a pass cannot compute with these weights; None where it can. Tensors without data
    (`meta`) count as finite."""
    given = [t for t in tensors if t is not None]
    for tensor in given:
        if tensor.dtype not in _FLOATS:
            return Skip("the weights are {}, not real floats of 16 bits or more", tensor.dtype)
    if any(not t.is_meta and not bool(torch.isfinite(t).all()) for t in given):
        return Skip("the weights hold NaN or inf")
    return None


def relative_error(weight: Tensor, other: Tensor) -> float | None:
    """‖W − W′‖/‖W‖ in float32 or wider; None on `meta`, and where only W is zero."""
    if weight.is_meta:
        return None
    wide = torch.promote_types(weight.dtype, torch.float32)
    norm = float(torch.linalg.vector_norm(weight.detach(), dtype=wide))
    lost = float(torch.linalg.vector_norm((weight.to(wide) - other.to(wide)).detach()))
    if not norm:
        return None if lost else 0.0
    return lost / norm
