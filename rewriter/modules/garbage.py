"""Python's garbage collector, told to look more rarely."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

__all__ = ["rare_collections"]

_RARE = 50_000, 20, 100
"""New objects before a look at these alone, such looks before one at those that outlived one, and
those before one at all objects of the process."""


class _Asked:
    """How many ask for it now, of all threads, and the thresholds of before the first."""

    lock = threading.Lock()
    count = 0
    before = 0, 0, 0


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """While many objects are made that stay, as nodes of graphs do, the collector rarely goes over
    all that there are, torch's own among them: that took a sixth of a capture's time."""
    with _Asked.lock:
        if not _Asked.count:
            _Asked.before = gc.get_threshold()
            if _Asked.before[0]:  # 0 is never
                gc.set_threshold(*map(max, _Asked.before, _RARE))
        _Asked.count += 1
    try:
        yield
    finally:
        with _Asked.lock:
            _Asked.count -= 1
            if not _Asked.count:
                gc.set_threshold(*_Asked.before)
