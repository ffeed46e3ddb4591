"""Constants that a forward sets, and that are the same from its second call on.

transformers' `config.problem_type` is set once, by the first call with labels; Swin's `window_size`
in every call, to the same number as long as the image has that size. Such a model can be captured
as it is after the first call: where a trace sets what it set, the number hangs on nothing that the
graph leaves open, and where it also reads it, every call checks that it is still the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rewriter.capture.reads import Reads, owners
from rewriter.modules.structure import is_constant, same

__all__ = ["Setting", "set_again", "settings", "traced_alike"]

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

    def gives(self, value: Any) -> bool:
        """Whether the value is the one that it is set to."""
        return same(value, self.after)

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


def set_again(found: list[Setting], reads: Reads) -> list[Setting] | None:
    """Those that a further call set again, to the same; None where it set another value, or where
    that could not be observed."""
    again = []
    for setting in found:
        given = reads.given(setting.owner, setting.name)
        if given is None or not all(map(setting.gives, given)):
            return None
        again += [setting] if given else []
    return again


def traced_alike(again: list[Setting], reads: Reads) -> bool:
    """Whether traces that were recorded set the same constants too, and read them."""
    for setting in again:
        given = reads.given(setting.owner, setting.name)
        if not given or not all(map(setting.gives, given)):
            return False
        if setting.name not in (reads.of(setting.owner) or ()):
            return False
    return True
