"""What calibration batches show of each layer's inputs: their moments, ranges, and a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from rewriter.base import Moments
from rewriter.capture import Capture
from rewriter.engine.batches import Calibration
from rewriter.engine.watching import called, mask_of, watching
from rewriter.modules.moments import Draw, Sample, products
from rewriter.modules.pointwise import Channels
from rewriter.modules.progress import bar
from rewriter.modules.running import quiet_run
from rewriter.sites import ACTIVATION, Site
from rewriter.spellings import source_of

__all__ = ["Gathered", "gather"]

_BYTES = 4e9
"""Of moments held at once: more layers than that take another run over the batches."""

_SAMPLE = 1 << 19
"""Numbers of a sample of rows."""


@dataclass(frozen=True)
class Gathered:
    """What was asked for of the inputs of one site."""

    moments: Moments | None = None
    sample: Sample | None = None


@dataclass
class _Sum:
    """Running sums over the rows that reach one place, in float64."""

    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Sum:
        return cls(x.sum(0, dtype=torch.float64), products(x))

    def add(self, x: Tensor) -> None:
        more = _Sum.of(x)
        self.total, self.products = self.total + more.total, self.products.add_(more.products)


@dataclass
class _Seen:
    """What the batches of one kind, fitted to or held out, have shown at one place.

    Args:
        sampled, summed: whether a sample, and whether moments are asked for.
    """

    sampled: bool
    summed: bool = False
    rows: int = 0
    sums: _Sum | None = None
    draw: Draw | None = None
    low: Tensor | None = None
    high: Tensor | None = None

    def add(self, x: Tensor) -> None:
        self.rows += len(x)
        if self.summed:
            if self.sums is None:
                self.sums = _Sum.of(x)
            else:
                self.sums.add(x)
        if self.sampled:
            low, high = x.aminmax(dim=0)
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)
            if self.draw is None:
                self.draw = Draw.of(_SAMPLE, x.shape[1])
            self.draw.add(x)


@dataclass
class _Watch:
    """What one value, the input of one or more sites, has shown.

    Args:
        width: of its rows; None, of an activation, for that of the first ones.
    """

    width: int | None
    calls: list[fx.Node]
    module: nn.Module | None
    fitted: _Seen
    held: _Seen
    channels: Channels | None = None
    sites: list[Site] = field(default_factory=list)
    current: _Seen | None = None
    mask: Tensor | None = None
    unfit: str = ""

    def __call__(self, x: Tensor) -> Tensor:
        own = x
        if self.channels is not None and isinstance(x, Tensor):
            own = self.channels.rows(x)
        if self.width is None and isinstance(x, Tensor) and x.dim():
            self.width = x.shape[-1]
        if self.current is not None and isinstance(x, Tensor) and own.shape[-1:] == (self.width,):
            own = own.detach()
            if self.mask is not None and own.shape[:-1] == self.mask.shape:
                own = own[self.mask]  # padding is nothing that a layer should be good at
            own = own.reshape(-1, own.shape[-1]).float()
            if not bool(torch.isfinite(own).all()):
                self.unfit = "the calibration batches give it inputs with NaN or inf"
            elif len(own):
                self.current.add(own)
        return x


def gather(
    capture: Capture,
    sites: Sequence[Site],
    calibration: Calibration,
    moments: Callable[[Sequence[Site]], bool] | bool = True,
    sample: bool = False,
) -> tuple[dict[str, Gathered], dict[str, str]]:
    """What the inputs of sites are like, over all calls in eval mode.

    Args:
        capture: the model, as it is now. Its graphs are changed while this runs, and then put
            back.
        sites: whose inputs to look at.
        calibration: what to run. With two batches or more, every fourth (at least one) is held
            out of what is fitted on.
        moments: whether to sum up mean and second moments; a function says it of the sites that
            read one value.
        sample: whether to keep ranges and a sample of rows.

    Returns:
        What was gathered by site name, and for the sites without any the reason.

    Raises:
        CalibrationError: the model fails on a batch.
    """
    found: dict[str, Gathered] = {}
    missing: dict[str, str] = {}
    summed = moments if callable(moments) else lambda _: bool(moments)
    for group in _groups(_watches(capture, sites, summed, sample)):
        with watching(capture, group):
            _run(capture.root, calibration, group)
        for watch in group:
            gathered = _gathered(watch) if watch.fitted.rows and not watch.unfit else None
            for name in (site.fqn for site in watch.sites):
                if watch.unfit:
                    missing[name] = watch.unfit
                elif gathered is None:
                    missing[name] = "the calibration batches never reach it"
                else:
                    found[name] = gathered
    for site in sites:
        if site.fqn not in found and site.fqn not in missing:
            missing[site.fqn] = "it runs in Python, where its inputs are not seen"
    return found, missing


def _gathered(watch: _Watch) -> Gathered:
    fitted, held = watch.fitted, watch.held if watch.held.rows else watch.fitted
    moments = sample = None
    if fitted.sums is not None and held.sums is not None:
        moments = Moments(
            rows=fitted.rows,
            mean=fitted.sums.total / fitted.rows,
            second=fitted.sums.products / fitted.rows,
            held_rows=watch.held.rows,
            held_mean=held.sums.total / held.rows,
            held_second=held.sums.products / held.rows,
        )
    if fitted.draw is not None and held.draw is not None:
        readers = tuple(s.weight.detach() for s in watch.sites if s.weight_ref is not None)
        assert fitted.low is not None
        assert fitted.high is not None
        sample = Sample(fitted.low, fitted.high, fitted.draw.rows, held.draw.rows, readers)
    return Gathered(moments, sample)


def _watches(
    capture: Capture, sites: Sequence[Site], summed: Callable[[Sequence[Site]], bool], sample: bool
) -> list[_Watch]:
    """One watch per value that sites read: the query, key and value of attention share theirs."""
    evaluated = {id(g) for _, mode, g in capture.graphs() if not mode}
    watches: dict[object, _Watch] = {}
    for site in sites:
        calls = [n for n in site.nodes if id(n.graph) in evaluated]
        if calls or site.place is not None:
            sources: object = (tuple(source_of(n) for n in calls) or site.fqn, site.channels)
            seen = _Seen(sample), _Seen(sample)
            width = None if site.kind == ACTIVATION else site.in_features
            new = _Watch(width, calls, site.place, *seen, site.channels)
            watch = watches.setdefault(sources, new)
            watch.sites.append(site)
    for watch in watches.values():
        watch.fitted.summed = watch.held.summed = summed(watch.sites)
    return list(watches.values())


def _groups(watches: Sequence[_Watch]) -> Iterator[list[_Watch]]:
    """As many at once as fit into memory."""
    group: list[_Watch] = []
    held = 0.0
    for watch in watches:
        moments, sample = watch.fitted.summed, watch.fitted.sampled
        # fitted, held out, and one on its way
        size = 3 * (8.0 * moments * (watch.width or 0) ** 2 + 4.0 * sample * _SAMPLE)
        if group and held + size > _BYTES:
            yield group
            group, held = [], 0.0
        group.append(watch)
        held += size
    if group:
        yield group


def _run(root: nn.Module, calibration: Calibration, group: Sequence[_Watch]) -> None:
    with bar("calibrating", len(calibration.batches)) as step, quiet_run(root, training=False):
        for i, batch in enumerate(calibration.batches):
            step()
            mask, held = mask_of(batch), calibration.held_out(i)
            for watch in group:
                watch.current = watch.held if held else watch.fitted
                watch.mask = mask
            try:
                called(root, batch, i)
            finally:
                for watch in group:
                    watch.current = watch.mask = None
