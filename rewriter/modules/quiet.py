"""Silence, and torch's tracers, for one thread: what other threads say and run is left alone.

`warnings.catch_warnings`, `logging.disable`, `contextlib.redirect_stdout` and torch's tracers work
on the whole process. Here a filter that is there for good asks which thread is speaking, and what a
tracer put on `nn.Module` is passed by in the other threads.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.fx import _symbolic_trace

__all__ = ["TRACING", "quietly", "traced_here_alone"]

TRACING = threading.RLock()
"""torch's tracers and AOTAutograd keep global state: one trace at a time, of a capture or of a
training step. Whoever holds it waits for no other lock of this package."""


class _Quiet(threading.local):
    def __init__(self) -> None:
        self.about: list[str] = []
        self.logs = 0


_quiet = _Quiet()


class _Filter(logging.Filter):
    """Drops what a quiet thread says: as a filter of a logger, and as the pattern of a filter of
    warnings, which takes anything with a `match`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _quiet.logs

    def match(self, text: str) -> bool:
        return any(about in text for about in _quiet.about)


_filter = _Filter()


@contextlib.contextmanager
def quietly(*, about: str = "", logs: bool = False) -> Iterator[None]:
    """No warnings of this thread that contain `about`, and with `logs` no log records either."""
    filters: Any = warnings.filters
    if not any(f[1] is _filter for f in filters):
        # past simplefilter(), which would have every warning of the process shown once more
        filters.insert(0, ("ignore", _filter, Warning, None, 0))
    if logs:
        loggers = [v for v in list(logging.root.manager.loggerDict.values())
                   if isinstance(v, logging.Logger)]  # fmt: skip
        for logger in (logging.root, *loggers):
            logger.addFilter(_filter)
    _quiet.about.append(about)
    _quiet.logs += logs
    try:
        yield
    finally:
        _quiet.about.pop()
        _quiet.logs -= logs


@contextlib.contextmanager
def traced_here_alone() -> Iterator[None]:
    """While a trace runs in this thread, other threads call modules and read their attributes as
    if there were none."""
    thread, changed = threading.get_ident(), {}
    for name, plain in (
        ("__call__", _symbolic_trace._orig_module_call),
        ("__getattr__", _symbolic_trace._orig_module_getattr),
    ):
        changed[name] = vars(nn.Module)[name]
        setattr(nn.Module, name, _in_thread(thread, changed[name], plain))
    try:
        yield
    finally:
        for name, traced in changed.items():
            setattr(nn.Module, name, traced)


def _in_thread(thread: int, here: Callable[..., Any], elsewhere: Callable[..., Any]) -> Any:
    def chosen(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (here if threading.get_ident() == thread else elsewhere)(self, *args, **kwargs)

    return chosen
