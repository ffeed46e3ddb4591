"""What a cell of the table comes to: works, refused with a reason, or fails."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from interop.recipes import Recipe, Refused
from rewriter import RewriteError, RewriteWarning

WORKS, REFUSED, FAILS = STATUSES = "works", "refused", "fails"


@dataclass(frozen=True)
class Outcome:
    """One cell.

    Args:
        status: `WORKS`, `REFUSED` or `FAILS`.
        reason: of a refusal; of a failure the class of the error and its first line; of what works
            the warnings of the rewriter, if any.
    """

    status: str
    reason: str = ""


def outcome(client: Callable[[Recipe], None], recipe: Recipe) -> Outcome:
    """Runs one cell, quietly."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as heard, contextlib.ExitStack() as quiet:
        warnings.simplefilter("always")
        logging.disable(logging.WARNING)
        quiet.callback(logging.disable, logging.NOTSET)
        for stream in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            quiet.enter_context(stream(io.StringIO()))
        try:
            client(recipe)
        except Exception as error:
            return _of_error(error)
    ours = [str(w.message) for w in heard if isinstance(w.message, RewriteWarning)]
    # what a timing says at such sizes is another thing in every run
    said = {_line(text) for text in ours if "is slower than the original" not in text}
    return Outcome(WORKS, "; ".join(sorted(said)))


def _of_error(error: BaseException) -> Outcome:
    """An error of ours is a refusal, be it as it is or in the hands of torch.compile."""
    error = getattr(error, "inner_exception", None) or error
    if isinstance(error, RewriteError | Refused):
        return Outcome(REFUSED, _line(error))
    return Outcome(FAILS, f"{type(error).__name__}: {_line(error)}".rstrip(": "))


def _line(error: object) -> str:
    """The first line of a message, without what differs from run to run."""
    text = (str(error).strip().splitlines() or [""])[0].strip()
    text = re.sub(r"\x1b\[\d+m", "", text)
    text = re.sub(r"0x[0-9a-f]{6,}", "0x…", text)
    text = re.sub(r"an error of [\d.e-]+", "an error of …", text)  # of each layer another
    text = re.sub(r"/[\w./-]*/(?=[\w.-]+)", "…/", text)
    return text if len(text) <= 200 else f"{text[:200]} …"
