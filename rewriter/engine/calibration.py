"""What calibration batches show of each layer's inputs: their mean and second moments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.base import Moments
from rewriter.capture import Capture, arguments
from rewriter.engine.batches import Calibration
from rewriter.errors import CalibrationError
from rewriter.modules.pointwise import Channels
from rewriter.modules.running import first_line, own_copy, quiet_run
from rewriter.sites import Site
from rewriter.spellings import source_of

__all__ = ["gather"]

_HELD_OUT = 4
"""Every so many-th batch is not fitted on, but measures the error of the result."""
_BYTES = 4e9
"""Of moments held at once: more layers than that take another run over the batches."""


@dataclass
class _Sum:
    """Running sums over the rows that reach one place; float32 products, float64 sums."""

    rows: int = 0
    total: Tensor | None = None
    products: Tensor | None = None

    def add(self, x: Tensor) -> None:
        total, products = x.sum(0, dtype=torch.float64), (x.t() @ x).double()
        first = self.total is None or self.products is None
        self.rows += len(x)
        self.total = total if first else self.total + total  # type: ignore[operator]
        self.products = products if first else self.products.add_(products)  # type: ignore[union-attr]


@dataclass
class _Watch:
    """What one value, the input of one or more sites, has shown."""

    width: int
    calls: list[fx.Node]
    module: nn.Module | None
    channels: Channels | None = None
    sites: list[str] = field(default_factory=list)
    fitted: _Sum = field(default_factory=_Sum)
    held: _Sum = field(default_factory=_Sum)
    current: _Sum | None = None
    mask: Tensor | None = None
    unfit: str = ""

    def __call__(self, x: Tensor) -> Tensor:
        own = x
        if self.channels is not None and isinstance(x, Tensor):
            own = self.channels.rows(x)
        if self.current is not None and isinstance(x, Tensor) and own.shape[-1:] == (self.width,):
            own = own.detach()
            if self.mask is not None and own.shape[:-1] == self.mask.shape:
                own = own[self.mask]  # padding is nothing that a layer should be good at
            own = own.reshape(-1, self.width).float()
            if not bool(torch.isfinite(own).all()):
                self.unfit = "the calibration batches give it inputs with NaN or inf"
            elif len(own):
                self.current.add(own)
        return x


def gather(
    capture: Capture, sites: Sequence[Site], calibration: Calibration
) -> tuple[dict[str, Moments], dict[str, str]]:
    """Mean and second moments of the inputs of sites, over all calls in eval mode.

    Args:
        capture: the model, as it is now. Its graphs are changed while this runs, and then put
            back.
        sites: whose inputs to look at.
        calibration: what to run. With two batches or more, every fourth (at least one) is held
            out of the moments that are fitted on.

    Returns:
        Moments by site name, and for the sites without any the reason.

    Raises:
        CalibrationError: the model fails on a batch.
    """
    found: dict[str, Moments] = {}
    missing: dict[str, str] = {}
    for group in _groups(_watches(capture, sites)):
        with _watching(capture, group):
            _run(capture.root, calibration, group)
        for watch in group:
            for name in watch.sites:
                if watch.unfit:
                    missing[name] = watch.unfit
                elif not watch.fitted.rows:
                    missing[name] = "the calibration batches never reach it"
                else:
                    found[name] = _moments(watch)
    for site in sites:
        if site.fqn not in found and site.fqn not in missing:
            missing[site.fqn] = "it runs in Python, where its inputs are not seen"
    return found, missing


def _moments(watch: _Watch) -> Moments:
    fitted, held = watch.fitted, watch.held
    assert fitted.total is not None
    assert fitted.products is not None
    if held.rows == 0:
        held = fitted
    assert held.total is not None
    assert held.products is not None
    return Moments(
        rows=fitted.rows,
        mean=fitted.total / fitted.rows,
        second=fitted.products / fitted.rows,
        held_rows=watch.held.rows,
        held_mean=held.total / held.rows,
        held_second=held.products / held.rows,
    )


def _watches(capture: Capture, sites: Sequence[Site]) -> list[_Watch]:
    """One watch per value that sites read: the query, key and value of attention share theirs."""
    evaluated = {id(g) for _, mode, g in capture.graphs() if not mode}
    watches: dict[object, _Watch] = {}
    for site in sites:
        calls = [n for n in site.nodes if id(n.graph) in evaluated]
        if calls or site.place is not None:
            sources: object = (tuple(source_of(n) for n in calls) or site.fqn, site.channels)
            new = _Watch(site.in_features, calls, site.place, site.channels)
            watch = watches.setdefault(sources, new)
            watch.sites.append(site.fqn)
    return list(watches.values())


def _groups(watches: Sequence[_Watch]) -> Iterator[list[_Watch]]:
    """As many at once as fit into memory."""
    group: list[_Watch] = []
    held = 0.0
    for watch in watches:
        size = 3 * 8.0 * watch.width**2  # fitted, held out, and one product on its way
        if group and held + size > _BYTES:
            yield group
            group, held = [], 0.0
        group.append(watch)
        held += size
    if group:
        yield group


@contextlib.contextmanager
def _watching(capture: Capture, group: Sequence[_Watch]) -> Iterator[None]:
    """The model calls the watches: of a layer in its forward, of a function in its graph."""
    inserted: list[fx.Node] = []
    forwards: list[tuple[nn.Module, Any]] = []
    try:
        for watch in group:
            if watch.module is not None:
                forwards.append((watch.module, vars(watch.module).get("forward")))
                vars(watch.module)["forward"] = _seeing(watch, watch.module.forward)
                continue
            for node in watch.calls:
                with node.graph.inserting_before(node):
                    called = node.graph.call_function(_observing(watch), (source_of(node),))
                inserted.append(called)
        if inserted:
            capture.host()
        yield
    finally:
        for module, forward in forwards:
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
        for node in inserted:
            node.graph.erase_node(node)
        if inserted:
            capture.host()


def _observing(watch: _Watch) -> Callable[[Any], Any]:
    """A plain function, as a graph wants it."""

    def observe(x: Any) -> Any:
        return watch(x)

    return observe


def _seeing(watch: _Watch, forward: Callable[..., Any]) -> Callable[..., Any]:
    def seen(*args: Any, **kwargs: Any) -> Any:
        watch(args[0] if args else next(iter(kwargs.values())))
        return forward(*args, **kwargs)

    return seen


def _run(root: nn.Module, calibration: Calibration, group: Sequence[_Watch]) -> None:
    batches = calibration.batches
    every = min(_HELD_OUT, len(batches))
    with quiet_run(root, training=False):
        for i, batch in enumerate(batches):
            args, kwargs = own_copy(*arguments(batch))
            held = len(batches) > 1 and i % every == every - 1
            mask = kwargs.get("attention_mask")
            plain = isinstance(mask, Tensor) and mask.dim() == 2
            for watch in group:
                watch.current = watch.held if held else watch.fitted
                watch.mask = mask.bool() if plain else None  # type: ignore[union-attr]
            try:
                root(*args, **kwargs)
            except Exception as error:
                raise CalibrationError(
                    f"the model fails on calibration[{i}]: {type(error).__name__}: "
                    f"{first_line(error)}"
                ) from error
            finally:
                for watch in group:
                    watch.current = watch.mask = None
