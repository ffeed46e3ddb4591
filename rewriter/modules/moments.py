"""Rows that go into a layer: samples and moments of them, from which follows what a change costs in
its outputs and in the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["Draw", "Moments", "Sample", "Sensitivity", "products"]


_COMPARED = 256
"""So many rows tell the error of a layer: two digits of it."""


def products(x: Tensor) -> Tensor:
    """xᵀx of rows x [n, width], in float64; multiplied in x's dtype where its range suffices."""
    found = (x.t() @ x).double()
    return found if bool(torch.isfinite(found).all()) else x.double().t() @ x.double()


@dataclass
class Draw:
    """An even choice of the rows that reach one place: those with the largest lots, one for each
    row.

    Args:
        most: rows of the choice.
    """

    most: int
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    lots: Tensor = field(default_factory=lambda: torch.empty(0))
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @classmethod
    def of(cls, numbers: int, width: int) -> Draw:
        """An empty one for so many numbers, and no fewer rows than tell something."""
        return cls(max(numbers // max(width, 1), _COMPARED))

    def add(self, x: Tensor) -> None:
        """Takes more rows [n, width], all of one width, dtype and device."""
        if not len(self.lots):
            self.rows, self.lots = x[:0], x.new_empty(0)
        lots = torch.cat([self.lots, torch.rand(len(x), generator=self.generator).to(x)])
        self.lots, chosen = lots.topk(min(self.most, len(lots)))
        self.rows = torch.cat([self.rows, x])[chosen]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How losses depend on the rows that go into a site.

    Args:
        rows: [n, in_features] float32: some of the rows, evenly drawn.
        gradients: [n, in_features] float32: ∂(sum of all losses)/∂row, through this site alone.
        per_loss: how many rows there were for one loss.
    """

    rows: Tensor
    gradients: Tensor
    per_loss: float

    def rotated(self, rotation: Tensor) -> Sensitivity:
        """The same of rows R x, by whose entries the loss has the gradients R⁻ᵀ ∂loss/∂x.

        Args:
            rotation: R [in_features, in_features].
        """
        rows = self.rows.to(rotation.dtype) @ rotation.t()
        gradients = torch.linalg.solve(rotation, self.gradients.to(rotation.dtype), left=False)
        return replace(self, rows=rows.float(), gradients=gradients.float())

    def costs(self, scores: Tensor, limits: Tensor) -> list[float]:
        """½ E[(∂loss/∂x · lost)²], by how much the mean loss rises where each row x is x − lost: at
        each limit lost is what x has below it.

        It is the second order of a Taylor series, with the Fisher matrix (the mean of outer
        products of gradients) in the place of the Hessian and rows taken one by one. The first
        order is left out: at a trained model its mean is about 0, and its sample is noise.

        Args:
            scores: [n, in_features] float32, of the rows' entries.
            limits: [steps] float32, ascending: entries of a smaller score are lost.

        Source: LeCun et al. 1989, "Optimal Brain Damage" (second order); Theis et al. 2018,
        "Faster gaze prediction with dense networks and Fisher pruning" (the Fisher matrix).
        """
        # how many limits an entry is not below: it is lost from there on
        first = torch.bucketize(scores, limits, right=True)
        parts = scores.new_zeros(len(scores), len(limits) + 1)
        parts.scatter_add_(1, first, self.gradients * self.rows)
        rises = parts[:, :-1].cumsum(1).square().mean(0) * (self.per_loss / 2)
        found: list[float] = rises.tolist()
        return found


@dataclass(frozen=True, eq=False)
class Sample:
    """Some of the rows that go into a site, and the range of all of them.

    Args:
        low, high: [in_features] float32: of each channel, over all rows that are fitted to.
        rows: [n, in_features] float32: some of those, evenly drawn.
        held: the same of batches that nothing is fitted to; `rows` where there is one batch only.
        readers: the weights [out_features, in_features] of all layers that read these rows.
    """

    low: Tensor
    high: Tensor
    rows: Tensor
    held: Tensor
    readers: tuple[Tensor, ...]

    def output_error(
        self, weight: Tensor, bias: Tensor | None, layer: Callable[[Tensor], Tensor]
    ) -> float | None:
        """‖W x + b − layer(x)‖ / ‖W x‖ over rows held out; None where W x is zero."""
        with torch.no_grad():
            x = self.held[:_COMPARED].to(weight.dtype)
            want = x.float() @ weight.float().t()
            lost = want - layer(x).float()
            lost = lost if bias is None else lost + bias.float()
        total = float(want.double().norm())
        return float(lost.double().norm()) / total if total > 0 else None


@dataclass(frozen=True)
class Moments:
    """E[x] and E[x xᵀ] of the rows that go into a site, over the calibration batches.

    Args:
        rows: how many rows were seen.
        mean: [in_features] float64.
        second: [in_features, in_features] float64.
        held_rows, held_mean, held_second: the same of batches that nothing is fitted to; those of
            all rows (and held_rows 0) where there is one batch only.
    """

    rows: int
    mean: Tensor
    second: Tensor
    held_rows: int
    held_mean: Tensor
    held_second: Tensor

    @property
    def axes(self) -> Tensor:
        """R [in_features, in_features] float64, orthogonal: its rows are the eigenvectors of
        E[x xᵀ], by ascending eigenvalues. Of all bases R x is the one whose entries' squares lie
        furthest apart in the mean."""
        axes: Tensor = torch.linalg.eigh(self.second).eigenvectors.t().contiguous()
        return axes

    @property
    def covariance(self) -> Tensor:
        """E[x xᵀ] − E[x] E[x]ᵀ, positive definite unless all rows are zero: its diagonal is raised
        by what products that were summed in float32 can be off by, or one row alone would give
        noise of either sign."""
        noise = 1e-6 * self.second.diagonal().mean()
        centred = self.second - torch.outer(self.mean, self.mean)
        return centred + noise * torch.eye(len(centred)).to(centred)

    def output_error(
        self, weight: Tensor, other: Tensor, shift: Tensor | None = None
    ) -> float | None:
        """‖W x − W′ x − shift‖ / ‖W x‖ over the rows held out; None where W x is zero.

        Args:
            weight, other: [out_features, in_features].
            shift: [out_features], by how much the bias has grown.
        """
        w, second, mean = weight.detach().double(), self.held_second, self.held_mean
        lost = w - other.detach().double()
        total = float(((w @ second) * w).sum())
        error = float(((lost @ second) * lost).sum())
        if shift is not None:
            moved = shift.detach().double()
            error += float(moved @ moved) - 2 * float(moved @ (lost @ mean))
        return (max(error, 0.0) / total) ** 0.5 if total > 0 else None
