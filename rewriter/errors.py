"""Every error and warning this package raises, in one place, and the checks of an option's value.

An error names the pass, the site, the user's line and the remedy: whoever reads it should know
what to change without opening this package.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What a terminal obeys in place of showing it, but for the line break and the tab; and halves of
characters (of file names that are not UTF-8), which cannot be written at all."""


def printable(text: str) -> str:
    """Text that may hold anything (a module's name, a user's exception), with control characters
    written out: they could clear a terminal, or write other text over it."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


class RewriteError(Exception):
    """Base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())


class CaptureError(RewriteError):
    """The model, or its example inputs, could not be turned into graphs."""


class CallError(CaptureError):
    """The call that was to be captured fails by itself, without any graph."""


class OptionError(RewriteError, ValueError):
    """An option of a pass or of an API call is impossible."""


class CalibrationError(RewriteError):
    """The calibration batches cannot be used, or the model fails on them."""


class PassError(RewriteError):
    """A pass failed on a site, or passes are out of order."""


class VerifyError(RewriteError):
    """Something that must hold after every pass does not."""


class SignatureError(RewriteError):
    """A rewritten model was called in a way that its captured graph cannot serve."""


class PlanError(RewriteError, RuntimeError):
    """A training step by a memory plan was used in a way that its plan rules out."""


class StoreError(RewriteError):
    """A saved model cannot be written or read."""


class RewriteWarning(UserWarning):
    """Something the user should know, which stops nothing."""


_INSIDE = ("rewriter", "torch", "contextlib")
"""Packages whose frames lie between a warning and the line of the user's that led to it."""


def warn(message: str) -> None:
    """A `RewriteWarning` at the first line outside this package and torch: the user's own."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(printable(message), RewriteWarning, stacklevel=level)


def _is_inside(module: str) -> bool:
    return module.partition(".")[0] in (*_INSIDE, "")  # generated code has no name


def nearest(name: str, known: Iterable[str]) -> str:
    """What may have been meant by `name`, to go on an error message."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def given(value: object) -> str:
    """What was given, in a message: as it is written where that is short, else its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    plain = value is None or isinstance(value, str | bytes | int | float)
    return repr(value) if plain and len(repr(value)) <= 80 else f"a {type(value).__name__}"


def of_type(
    call: str, name: str, value: object, kinds: type | tuple[type, ...], wanted: str
) -> None:
    """Checks an argument of a call such as `load(directory, model)`.

    Raises:
        OptionError: it is of none of these classes.
    """
    if not isinstance(value, kinds):
        raise OptionError(f"{call}: {name} must be {wanted}, not {given(value)}")


PATH = (str, os.PathLike)
"""What a path is given as."""


def one_of(name: str, value: object, valid: Iterable[object]) -> None:
    """Checks an option that is one of a few words or numbers.

    Raises:
        OptionError: it is none of them.
    """
    valid = list(valid)
    if value not in valid:
        raise OptionError(f"{name}={value!r} is unknown{nearest(str(value), map(str, valid))}")


def whole_number(name: str, value: object, least: int = 1, most: int | None = None) -> None:
    """Checks an option that counts something; True and False are no numbers.

    Raises:
        OptionError: it is no integer of at least `least` and at most `most`.
    """
    number = value if isinstance(value, int) and not isinstance(value, bool) else least - 1
    if number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise OptionError(f"{name} must be an integer {bounds}, got {value!r}")


def finite_number(name: str, value: object) -> float:
    """Checks an option that is a number; True and False are none.

    Raises:
        OptionError: it is no finite number.
    """
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value):  # type: ignore[arg-type]
        raise OptionError(f"{name} must be a finite number, got {value!r}")
    return float(value)  # type: ignore[arg-type]
