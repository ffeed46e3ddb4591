"""Constants that a forward sets once, where it finds them missing, and then only reads.

transformers' `config.problem_type` is one: the first call with labels sets it. Such a model can be
captured as it is after that call; one that writes in every call cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rewriter.capture.reads import Reads, owners
from rewriter.modules.structure import is_constant

__all__ = ["Setting", "settings", "settled"]

_MISSING: Any = object()


@dataclass(frozen=True)
class Setting:
    """An attribute that a call gave another constant.

    Args:
        owner: a module, or an object that one holds.
        name: of the attribute.
        before, after: its values; there may have been none before.
    """

    owner: Any
    name: str
    before: Any
    after: Any

    def apply(self, owner: Any = None) -> None:
        """Sets it, of the same object or of the one that stands for it."""
        vars(self.owner if owner is None else owner)[self.name] = self.after

    def undo(self) -> None:
        """Takes it back."""
        if self.before is _MISSING:
            del vars(self.owner)[self.name]
        else:
            vars(self.owner)[self.name] = self.before


def settings(root: nn.Module) -> Callable[[], list[Setting]]:
    """Starts watching; the function it returns gives the constants that were set since."""
    before = [(owner, dict(vars(owner))) for owner in owners(root)]

    def found() -> list[Setting]:
        return [
            Setting(owner, name, old, value)
            for owner, then in before
            for name, value in vars(owner).items()
            if name != "training" and is_constant(value)
            if (old := then.get(name, _MISSING)) is _MISSING or is_constant(old)
            if old is _MISSING or old is not value and old != value
        ]

    return found


def settled(found: list[Setting], reads: Reads) -> bool:
    """Whether a call that was recorded wrote none of them again, not even the same value."""
    return bool(found) and not any(reads.may_have_set(s.owner, s.name) for s in found)
