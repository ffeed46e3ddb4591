"""Every error and warning this package raises, in one place.

An error names the pass, the site, the user's line and the remedy: whoever reads it should know
what to change without opening this package.
"""

from __future__ import annotations

import sys
import warnings


class RewriteError(Exception):
    """Base of every error that this package raises on purpose."""


class CaptureError(RewriteError):
    """The model, or its example inputs, could not be turned into graphs."""


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
    warnings.warn(message, RewriteWarning, stacklevel=level)


def _is_inside(module: str) -> bool:
    return module.partition(".")[0] in (*_INSIDE, "")  # generated code has no name
