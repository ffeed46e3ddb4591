"""Calls of a model over calibration batches, and what looks at its layers' inputs meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, fx, nn

from rewriter.capture import Capture, arguments
from rewriter.errors import CalibrationError
from rewriter.modules.running import first_line, own_copy
from rewriter.spellings import source_of

__all__ = ["Watch", "called", "mask_of", "watching"]


class Watch(Protocol):
    """What sees a value on its way into one or more layers: of a function called in a graph before
    `calls`, of a `module` in its forward. What it returns is what these layers get."""

    @property
    def calls(self) -> Sequence[fx.Node]: ...
    @property
    def module(self) -> nn.Module | None: ...
    def __call__(self, x: Any) -> Any: ...


@contextlib.contextmanager
def watching(capture: Capture, group: Sequence[Watch]) -> Iterator[None]:
    """The model calls the watches. Its graphs are changed while this runs, and then put back."""
    inserted: list[tuple[fx.Node, fx.Node]] = []
    forwards: list[tuple[nn.Module, Any]] = []
    try:
        for watch in group:
            if watch.module is not None:
                forwards.append((watch.module, vars(watch.module).get("forward")))
                vars(watch.module)["forward"] = _seeing(watch, watch.module.forward)
                continue
            for node in watch.calls:
                source = source_of(node)
                with node.graph.inserting_before(node):
                    seen = node.graph.call_function(_observing(watch), (source,))
                node.replace_input_with(source, seen)
                inserted.append((node, seen))
        if inserted:
            capture.host()
        yield
    finally:
        for module, forward in reversed(forwards):  # one that two watches see was wrapped twice
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
        for node, seen in inserted:
            node.replace_input_with(seen, seen.all_input_nodes[0])
            node.graph.erase_node(seen)
        if inserted:
            capture.host()


def _observing(watch: Watch) -> Callable[[Any], Any]:
    """A plain function, as a graph wants it."""

    def observe(x: Any) -> Any:
        return watch(x)

    return observe


def _seeing(watch: Watch, forward: Callable[..., Any]) -> Callable[..., Any]:
    def seen(*args: Any, **kwargs: Any) -> Any:
        if args:
            return forward(watch(args[0]), *args[1:], **kwargs)
        first = next(iter(kwargs))
        return forward(**{**kwargs, first: watch(kwargs[first])})

    return seen


def called(root: nn.Module, batch: Any, i: int) -> Any:
    """What the model makes of the i-th calibration batch.

    Raises:
        CalibrationError: it fails on it.
    """
    args, kwargs = own_copy(*arguments(batch))
    try:
        return root(*args, **kwargs)
    except Exception as error:
        raise CalibrationError(
            f"the model fails on calibration[{i}]: {type(error).__name__}: {first_line(error)}"
        ) from error


def mask_of(batch: Any) -> Tensor | None:
    """Which rows of a batch are no padding, bool; None where it does not say. A layer should be
    good at nothing that is padding."""
    mask = arguments(batch)[1].get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
