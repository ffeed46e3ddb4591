"""What calibration batches show of the loss: its gradients at the inputs of each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.capture import Capture
from rewriter.engine.batches import Calibration
from rewriter.engine.watching import called, mask_of, watching
from rewriter.errors import CalibrationError, RewriteError
from rewriter.modules.moments import Draw, Sensitivity
from rewriter.modules.pointwise import Channels
from rewriter.modules.progress import bar
from rewriter.modules.running import first_line, quiet_run
from rewriter.sites import Site

__all__ = ["Losses", "differentiate"]

Losses = Callable[[Any, Any], Tensor]
"""(outputs of the model, calibration batch) → single losses."""
_SAMPLE = 1 << 19
"""Numbers of a sample of rows, and as many of gradients."""


@dataclass
class _Slope:
    """The inputs of one site, and the gradients there.

    Args:
        draw: rows and gradients, side by side.
        inputs: of the calls with the batch that runs.
    """

    calls: list[fx.Node]
    module: nn.Module | None
    channels: Channels | None
    draw: Draw | None = None
    count: int = 0
    inputs: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        # a tensor that nothing but this layer reads: its gradient is the one through this layer
        own = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        self.inputs.append(own)
        return own

    def add(self, x: Tensor, gradient: Tensor, mask: Tensor | None) -> None:
        pair = [self._rows(t, mask) for t in (x, gradient)]
        if self.draw is None:
            self.draw = Draw.of(_SAMPLE, pair[0].shape[1])
        self.count += len(pair[0])
        if len(pair[0]):
            self.draw.add(torch.cat(pair, 1))

    def _rows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x.detach() if self.channels is None else self.channels.rows(x.detach())
        if mask is not None and x.shape[:-1] == mask.shape:
            x = x[mask]
        return x.reshape(-1, x.shape[-1]).float()


def differentiate(
    capture: Capture, sites: Sequence[Site], calibration: Calibration, losses: Losses
) -> tuple[dict[str, Sensitivity], dict[str, str]]:
    """How the losses of a model depend on the inputs of sites, over all calls in eval mode.

    Args:
        capture: the model, as it is now. Its graphs are changed while this runs, and then put
            back; gradients of its parameters are not touched.
        sites: whose inputs to look at.
        calibration: what to run, but for what is held out.
        losses: what is differentiated.

    Returns:
        What was found by site name, and for the sites without any the reason.

    Raises:
        CalibrationError: the model or the loss fails on a batch, or the loss is no tensor of
            single, finite losses with a gradient.
    """
    evaluated = {id(g) for _, mode, g in capture.graphs() if not mode}
    slopes: dict[str, _Slope] = {}
    for site in sites:
        calls = [n for n in site.nodes if id(n.graph) in evaluated]
        slopes[site.fqn] = _Slope(calls, site.place, site.channels)
    with watching(capture, list(slopes.values())):
        terms = _run(capture.root, calibration, list(slopes.values()), losses)
    found: dict[str, Sensitivity] = {}
    missing: dict[str, str] = {}
    for name, slope in slopes.items():
        if slope.draw is None or not slope.count:
            missing[name] = "the loss does not depend on it"
            continue
        rows, gradients = slope.draw.rows.chunk(2, 1)
        if bool(torch.isfinite(gradients).all()):
            found[name] = Sensitivity(rows, gradients, slope.count / terms)
        else:
            missing[name] = "the gradients of the loss there are NaN or inf"
    return found, missing


def _run(
    root: nn.Module, calibration: Calibration, slopes: Sequence[_Slope], losses: Losses
) -> int:
    """Runs the batches; how many single losses there were."""
    terms = 0
    batches = [(i, b) for i, b in enumerate(calibration.batches) if not calibration.held_out(i)]
    with (
        bar("differentiating", len(batches)) as step,
        quiet_run(root, training=False, grad=True),
    ):
        for i, batch in batches:
            step()
            try:
                found = _checked(losses, called(root, batch, i), batch, i)
                reached = [(s, x) for s in slopes for x in s.inputs]
                inputs = [x for _, x in reached]
                gradients = torch.autograd.grad(found.sum(), inputs, allow_unused=True)
            finally:
                for slope in slopes:
                    slope.inputs = []
            terms += found.numel()
            mask = mask_of(batch)
            for (slope, x), gradient in zip(reached, gradients, strict=True):
                if gradient is not None:
                    slope.add(x, gradient, mask)
    return terms


def _checked(losses: Losses, outputs: Any, batch: Any, i: int) -> Tensor:
    try:
        found: object = losses(outputs, batch)
    except RewriteError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"the loss fails on calibration[{i}]: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise CalibrationError(
            f"the loss of calibration[{i}] is a {type(found).__name__}, not a floating tensor: "
            'give single losses, as of reduction="none"'
        )
    if not found.dim() or not found.numel():
        raise CalibrationError(
            f"the loss of calibration[{i}] has the shape {list(found.shape)}: give single losses, "
            'one for a token or a row of the batch, as of reduction="none"'
        )
    if not bool(torch.isfinite(found).all()):
        raise CalibrationError(f"the loss of calibration[{i}] holds NaN or inf: leave it out")
    if not found.requires_grad:
        raise CalibrationError(
            f"the loss of calibration[{i}] has no gradient: it must follow from the outputs by "
            "operations of torch that can be differentiated"
        )
    return found
