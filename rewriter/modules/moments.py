"""Moments of the rows that go into a layer, from which the error of its outputs follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "Sample"]


_COMPARED = 256
"""So many rows tell the error of a layer: two digits of it."""


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
