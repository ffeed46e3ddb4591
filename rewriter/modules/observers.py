"""Observers: the range of numbers that few levels are spread over, given what the numbers are.

A wide range clips nothing and has coarse steps; a narrow one has fine steps and clips. All ranges
have 0 in them, which padding and ReLU give often and which so stays exact.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["OBSERVERS", "Observer", "observed_range"]

Observer = Literal["minmax", "percentile", "mse", "entropy"]
OBSERVERS = ("minmax", "percentile", "mse", "entropy")
_BINS, _LEVELS = 2048, 256
_TAIL = 1e-5
"""The share of the numbers beyond each end of the range of "percentile"."""
_THRESHOLDS = 128
"""So many ranges "entropy" compares."""


def observed_range(
    observer: Observer, values: Tensor, low: float, high: float
) -> tuple[float, float]:
    """(lo, hi), with lo ≤ 0 ≤ hi.

    Args:
        observer: "minmax": nothing is clipped. "percentile": one number in 100,000 at either end.
            "mse": what rounding and clipping lose together, E[(x − q(x))²], is least, with s²/12
            for the rounding by steps s; Banner et al. 2019, "Post training 4-bit quantization of
            convolutional networks", with a histogram in the place of a Laplace distribution.
            "entropy": the histogram of the clipped and rounded numbers tells most of that of the
            numbers (least Kullback-Leibler divergence); Migacz 2017, "8-bit inference with
            TensorRT", for ranges that need not be symmetric.
        values: [n] float32, finite, not empty, in the range.
        low, high: of all the numbers that `values` are a sample of.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if observer == "minmax" or not low < high:
        return low, high
    if observer == "percentile":
        return _percentile(values, low, high)
    counts = torch.histc(values.double(), _BINS, low, high)
    # zeros are exact in every range, and say nothing of it
    at = min(int((0 - low) / (high - low) * _BINS), _BINS - 1)
    counts[at] -= (values == 0).sum()
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64, device=counts.device)
    return (_least_error if observer == "mse" else _least_divergence)(counts, edges)


def _percentile(values: Tensor, low: float, high: float) -> tuple[float, float]:
    ordered, beyond = values.sort().values, int(_TAIL * len(values))
    return min(float(ordered[beyond]), 0.0), max(float(ordered[-1 - beyond]), 0.0)


def _least_error(counts: Tensor, edges: Tensor) -> tuple[float, float]:
    """Over all pairs of edges with 0 between them."""
    middles = (edges[1:] + edges[:-1]) / 2

    def clipped(ends: Tensor) -> Tensor:
        """Σ of squared distances to each end, of what lies beyond it, seen from 0."""
        beyond = (middles.abs() - ends.abs()[:, None]).clamp_(min=0)
        beyond *= (middles.sign() == ends.sign()[:, None]) | (ends[:, None] == 0)
        return beyond.square() @ counts

    lows, highs = edges[edges < 0], edges[edges > 0]
    ends = [lows if len(lows) else edges[:1], highs if len(highs) else edges[-1:]]
    below, above = map(clipped, ends)
    step = (ends[1] - ends[0][:, None]) / (_LEVELS - 1)
    error = counts.sum() * step.square() / 12 + below[:, None] + above
    best = int(error.argmin())
    return float(ends[0][best // len(ends[1])]), float(ends[1][best % len(ends[1])])


def _least_divergence(counts: Tensor, edges: Tensor) -> tuple[float, float]:
    """Over ranges that are cut at ±t."""
    low, high = float(edges[0]), float(edges[-1])
    middles = (edges[1:] + edges[:-1]) / 2
    found, least = (low, high), float("inf")
    for i in range(1, _THRESHOLDS + 1):
        limit = max(-low, high) * i / _THRESHOLDS
        lo, hi = max(low, -limit), min(high, limit)
        divergence = _divergence(counts, middles, lo, hi)
        if divergence < least:
            found, least = (lo, hi), divergence
    return found


def _divergence(counts: Tensor, middles: Tensor, lo: float, hi: float) -> float:
    """KL(P ‖ Q): P has what is clipped at its ends; Q has the levels, each spread evenly over the
    bins of its own that are not empty."""
    inside = (middles >= lo) & (middles <= hi)
    own, at = counts[inside], middles[inside]
    if not len(own) or not float(own.sum()):
        return float("inf")
    p = own.clone()
    p[0] += counts[middles < lo].sum()
    p[-1] += counts[middles > hi].sum()
    level = ((at - lo) / (hi - lo) * (_LEVELS - 1)).round().long()
    sums, filled = own.new_zeros(_LEVELS), own.new_zeros(_LEVELS)
    sums.index_add_(0, level, own)
    filled.index_add_(0, level, (p > 0).to(own.dtype))
    q = torch.where(p > 0, (sums / filled.clamp(min=1))[level], 0)
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    # an end that only what was clipped fills has no share in Q: a small one, or all would be lost
    return float((p[some] * (p[some] / q[some].clamp(min=1e-9)).log()).sum())
