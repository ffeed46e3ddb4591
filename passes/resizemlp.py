"""ResizeMLP: fewer hidden neurons in an MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rewriter.base import Pass, Phase, Skip, unusable
from rewriter.edits import Edit, Keep, Resize, View, Width
from rewriter.errors import OptionError
from rewriter.modules.patterns import Pattern, activation, batch_norm, linear, op
from rewriter.sites import MLP, Kind, Site

__all__ = ["ResizeMLP"]

_NORMED = linear >> (batch_norm | op("layer_norm")) >> activation >> linear
_NORMED_AFTER = linear >> activation >> (batch_norm | op("layer_norm")) >> linear


@dataclass(frozen=True)
class ResizeMLP(Pass):
    """y = D·a(U x + b) (gated: D·(a(G x) ∘ (U x))) on the `keep` neurons with the largest score.

    by="weight": score_j = ‖[U_j, b_j]‖ · ‖D_:j‖ (gated: · ‖G_j‖). by="activation", with
    calibration: score_j = E[h_j²]^½ · ‖D_:j‖, of h that D reads. Exact where the neurons that go
    are dead: a zero column of D, or zero rows of U (or G) where a(0) = 0. Batch norms between are
    cut along; what mixes neurons (a layer norm) keeps an MLP as it is.

    Args:
        keep: how many neurons stay: a number, or a fraction below 1.
        by: "weight" or "activation".
        where: which MLPs, by the name of the layer that reads the neurons; a name pattern, a
            predicate, or None for all.

    Source: Han et al. 2015, section 3 (by magnitude); Molchanov et al. 2017 (by activation).
    """

    matches: ClassVar[tuple[Kind | Pattern, ...]] = (MLP, _NORMED, _NORMED_AFTER)
    phase: ClassVar[Phase] = Phase.STRUCTURE

    keep: int | float = 0.5
    by: Literal["weight", "activation"] = "weight"

    def __post_init__(self) -> None:
        keep = self.keep
        number = isinstance(keep, int | float) and not isinstance(keep, bool)
        if not number or not (0 < keep < 1 or (1 <= keep < math.inf and keep == int(keep))):
            raise OptionError(f"keep={keep!r}: use a whole number, or a fraction between 0 and 1")
        if self.by not in ("weight", "activation"):
            raise OptionError(f"by={self.by!r}: use 'weight' or 'activation'")

    @property
    def calibrates(self) -> bool:
        return self.by == "activation"

    def plan(self, view: View) -> list[Edit]:
        edits: list[Edit] = []
        done: set[str] = set()
        for site in view.chosen:
            first = site.parts["up" if site.kind == MLP else "0"]
            width = view.width(first)
            if isinstance(width, Skip):
                edits.append(Keep(site, width.reason))
            elif not done & {s.fqn for s in width.rows}:
                done |= {s.fqn for s in width.rows}
                edits.append(self._resized(site, first, width))
        return edits

    def _resized(self, site: Site, first: Site, width: Width) -> Edit:
        layers = (*width.rows, *width.columns)
        skip = unusable(*(s.weight for s in layers), *(s.bias for s in width.rows))
        if skip is not None:
            return Keep(site, skip.reason)
        count = int(self.keep) if self.keep >= 1 else max(1, round(self.keep * width.size))
        if count >= width.size:
            return Keep(site, f"it has {width.size} neurons, no more than the {count} to keep")
        if first.weight.is_meta:
            return Keep(site, "on meta there is nothing to choose neurons by")
        if self.by == "activation" and site.moments is None:
            return Keep(site, "by='activation' needs calibration batches that reach it")
        scores = self._scores(site, width)
        kept = torch.topk(scores, count).indices.sort().values
        share = float(scores[kept].sum() / scores.sum().clamp_min(1e-300))
        reason = f"{count} of {width.size} neurons stay, with {share:.1%} of the score by {self.by}"
        return Resize(first, kept.tolist(), reason)

    def _scores(self, site: Site, width: Width) -> Tensor:
        read = sum(_squares(s.weight.t()) for s in width.columns)
        assert isinstance(read, Tensor)
        if site.moments is not None:
            return (site.moments.second.diagonal().to(read.device).double() * read).sqrt()
        scores = read.sqrt()
        for made in width.rows:
            squares = _squares(made.weight)
            if made.bias is not None:
                squares = squares + made.bias.detach().double().square()
            scores = scores * squares.sqrt()
        return scores


def _squares(rows: Tensor) -> Tensor:
    """‖row‖² of each row."""
    return rows.detach().double().square().sum(1)
