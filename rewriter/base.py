"""What a pass is: `Pass`, `Phase`, `Replacement`, `Skip`; the `Layer` it installs is in `layer`.

A pass is a frozen dataclass whose fields are its options and whose one method looks at one `Site`
and answers with a value: `Replacement(layer)` or `Skip("reason")`. It never touches the graph or
the model; the engine does. A pass that must see the whole looks at a `View` and answers with edits
(`rewriter.edits`).
"""

from __future__ import annotations

import ast
import enum
import json
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import torch
from torch import Tensor, nn

from rewriter.edits import Edit, View
from rewriter.errors import OptionError, nearest
from rewriter.layer import Layer, LinearLayer, StoredLinear, as_parameter
from rewriter.modules.moments import Moments
from rewriter.modules.patterns import Pattern
from rewriter.modules.refusal import Skip
from rewriter.sites import Site

__all__ = [
    "Layer",
    "LinearLayer",
    "Moments",
    "Pass",
    "Phase",
    "Replacement",
    "Skip",
    "StoredLinear",
    "Where",
    "as_parameter",
    "read_number",
    "relative_error",
    "unusable",
]

P = TypeVar("P", bound="Pass")
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
        cuts_ties: an embedding that shares the site's weight may keep it: the tie is cut. Else the
            site stays as it is, as both are rewritten together or not at all.
        tie_remedy: what the user may set to have it otherwise, for the reason of that skip.
    """

    layer: nn.Module
    error: float | None = 0.0
    note: str = ""
    output_error: float | None = None
    cuts_ties: bool = False
    tie_remedy: str = ""


@dataclass(frozen=True)
class Pass:
    """One rewrite: options in the fields, one method, no state.

    A subclass is a frozen dataclass that sets `matches` (kinds of `rewriter.sites`, or `Layer`
    classes) and `phase`, validates its options in `__post_init__` (raising `OptionError`), and
    implements `propose`, or `plan` where it must see the whole; only that may match patterns.
    """

    matches: ClassVar[tuple[str | type[Layer] | Pattern, ...]] = ()
    phase: ClassVar[Phase] = Phase.STRUCTURE
    once: ClassVar[tuple[str, ...]] = ("where",)
    """Options that may be functions, and have done their work when the model is rewritten: nothing
    keeps them. Their default is None."""

    where: Where = field(default=None, kw_only=True)
    """Which sites: a name pattern, a predicate, or None for all."""

    @property
    def kinds(self) -> tuple[str | type[Layer] | Pattern, ...]:
        """Those of `matches` that it takes with its options."""
        return self.matches

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

    def sums_up(self, readers: Sequence[Site]) -> bool:
        """Whether it makes use of the moments of a value that these sites read, of a pass that
        calibrates: those of wide rows take time and memory."""
        return self.calibrates

    @property
    def needs_calibration(self) -> bool:
        """True where `propose` cannot do without `site.sample`: no calibration is an error then,
        and a site that the batches do not reach is skipped."""
        return False

    @property
    def samples(self) -> bool:
        """True where `propose` makes use of `site.sample`, which is None without calibration."""
        return self.needs_calibration

    @property
    def needs_loss(self) -> bool:
        """True where it cannot do without `site.sensitivity`, to which `losses` leads; a pass that
        needs calibration, too."""
        return False

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        """The single losses [*] of what the model makes of a calibration batch, of a pass that
        needs a loss. What is not finite, has no gradient or no dimension is refused."""
        raise NotImplementedError(f"{type(self).__name__}.losses")

    @property
    def simulates(self) -> bool:
        """True where its layers stand for others while these train: nobody judges their speed."""
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

    @classmethod
    def parse(cls: type[P], text: str) -> P:
        """The pass of options as text: `value` (of the first option) or `option=value, …`.

        Values are read as the option's type says: numbers, `true` and `false`, `none`, tuples, else
        text, in quotes where it holds a comma. `__str__` writes what `parse` reads.

        Raises:
            OptionError: no such option (the nearest is named), or an impossible value.
        """
        return cls(**_read_options(cls, text))

    def spec(self) -> dict[str, Any] | None:
        """The options as JSON values, so that `cls(**spec)` is the pass again (but for `once`);
        None where one of them is no JSON."""
        given = [f.name for f in fields(self) if f.init and f.name not in self.once]
        options = {name: getattr(self, name) for name in given}
        try:
            json.dumps(options)
        except (TypeError, ValueError):
            return None
        return options

    def kept(self: P) -> P:
        """The pass as a rewritten model keeps it: without `once`."""
        given = [name for name in self.once if getattr(self, name) is not None]
        return replace(self, **dict.fromkeys(given)) if given else self

    def __str__(self) -> str:
        """The pass as one would write it: its first option, and what is not at its default."""
        own = [f for f in fields(self) if f.name != "where"]
        shown = own[:1] + [f for f in own[1:] if getattr(self, f.name) != f.default]
        shown += [f for f in fields(self) if f.name == "where" and self.where is not None]
        options = ", ".join(f"{f.name}={_shown(getattr(self, f.name))}" for f in shown)
        return f"{type(self).__name__}({options})"


def _shown(value: Any) -> str:
    """A function by its name: where it lies in memory tells nobody anything."""
    return getattr(value, "__name__", repr(value)) if callable(value) else repr(value)


def _read_options(cls: type[Pass], text: str) -> dict[str, Any]:
    who, own = cls.__name__, {f.name: f for f in fields(cls) if f.init}
    hints = typing.get_type_hints(cls, localns={"Site": Any})  # a name for type checkers only
    options: dict[str, Any] = {}
    for i, part in enumerate(p for p in _PARTS.findall(text) if p.strip()):
        key, equals, value = part.partition("=")
        key, value = _unquoted(key), _unquoted(value)
        if not equals:
            if i:
                raise OptionError(f"{who}: {text!r}: write {key!r} as option=value")
            key, value = next(iter(n for n in own if n != "where"), ""), key
            if not key:
                raise OptionError(f"{who} has no option but where: write where=…")
        if key not in own:
            raise OptionError(f"{who} has no option {key!r}{nearest(key, own)}")
        if key in options:
            raise OptionError(f"{who}: {text!r} gives {key} twice")
        options[key] = _read_value(f"{who}: {key}", value, hints[key])
    missing = [f.name for f in own.values() if _required(f) and f.name not in options]
    if missing:
        first = f"{who.lower()}:{missing[0]}=…"
        raise OptionError(f"{who} needs {', '.join(missing)}: write {first}")
    return options


_PARTS = re.compile(r"""(?:"[^"]*"|'[^']*'|\([^()]*\)|\[[^\[\]]*\]|[^,])+""")


def _unquoted(text: str) -> str:
    text = text.strip()
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def _required(option: Field[Any]) -> bool:
    return option.default is MISSING and option.default_factory is MISSING


def _read_value(what: str, text: str, hint: Any) -> Any:
    """`text` as the first of the option's types that it reads as."""
    union = get_origin(hint) in (typing.Union, types.UnionType)
    members = list(get_args(hint)) if union else [hint]
    origins = [get_origin(m) or m for m in members]
    if text.lower() in ("none", "null") and type(None) in members:
        return None
    if tuple in origins and text.startswith(("(", "[")):
        return _tuple(what, text)
    for kind in (bool, int, float):
        if kind in members and (value := read_number(text, kind)) is not None:
            return value
    for literal in (m for m in members if get_origin(m) is Literal):
        text = next((v for v in get_args(literal) if str(v) == text), text)
    if {str, Literal, Any} & set(origins):
        return text
    wanted = " or ".join(_WANTED.get(m, str(m)) for m in members if m is not type(None))
    raise OptionError(f"{what}={text!r} must be {wanted}")


_WANTED = {bool: "true or false", int: "an integer", float: "a number"}


def _tuple(what: str, text: str) -> tuple[Any, ...]:
    try:
        return tuple(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError) as error:
        raise OptionError(f"{what}={text!r} must be a tuple, such as (2, 4)") from error


def read_number(text: str, kind: type) -> Any:
    """`text` as a bool, an int or a finite float; None where it is none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    try:
        value = kind(text)
    except ValueError:
        return None
    return value if kind is int or math.isfinite(value) else None


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
