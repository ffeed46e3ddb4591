"""A refusal inside torch.compile, as its user sees it: the message, last and alone.

Dynamo wraps what a backend raises, with its own frames and advice around the message, but for
errors that say themselves how much of their traceback is of use. So a refusal is raised there as
both: the class of `rewriter.errors` that it is, and the one that Dynamo would have made of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch._dynamo.exc import BackendCompilerFailed

from rewriter.errors import RewriteError

__all__ = ["refusing"]


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """What is refused inside is raised as a user of torch.compile should see it."""
    try:
        yield
    except BackendCompilerFailed:
        raise
    except RewriteError as error:
        refusal = error
    else:
        return
    raise _class(type(refusal))(refusal) from None


class _Refused(BackendCompilerFailed):
    """Passes through Dynamo as it is."""

    def __init__(self, refusal: RewriteError) -> None:
        Exception.__init__(self, *refusal.args)
        self.inner_exception = refusal
        self.backend_name = "rewriter"
        self.first_useful_frame = None

    def remove_dynamo_frames(self) -> Any:
        return self.with_traceback(None)

    def __str__(self) -> str:
        # Dynamo adds advice on its own logs to the arguments
        return str(self.inner_exception)


_classes: dict[type[RewriteError], Any] = {}


def _class(kind: type[RewriteError]) -> Any:
    if kind not in _classes:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        _classes[kind] = type(kind.__name__, (_Refused, kind), names)
    return _classes[kind]
