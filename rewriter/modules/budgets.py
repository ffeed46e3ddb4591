"""Quantiles of scores, and sparsity shared out among layers by what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["FEWEST", "between", "cost_of_steps", "doubt", "quantile", "shared_out"]

FEWEST = 64
"""Rows of calibration below which no quantile is taken."""
_STEP = 0.05
"""By which the sparsity of a layer grows while a budget is given out."""
_MOST = 0.95
"""No layer of such a budget is sparser."""


def quantile(scores: Tensor, share: float) -> float:
    """The score that the share of all scores lies below, up to ties.

    Args:
        scores: [n] float32, n > 0.
        share: from 0 to 1.
    """
    return float(scores.kthvalue(_rank(share, len(scores)) + 1).values)


def _rank(share: float, count: int) -> int:
    return min(int(share * count), count - 1)


def doubt(below: Tensor) -> float:
    """Twice the standard error of the share of inputs below, rows being drawn at random."""
    shares = below.float().mean(1)
    return 2 * float(shares.std()) / math.sqrt(len(shares))


def cost_of_steps(scores: Tensor, costs: Callable[[Tensor], list[float]]) -> list[float]:
    """What rows cost at sparsities of 0, 0.05, …, 0.95.

    Args:
        scores: [n, in_features] float32: at a sparsity the entries below that quantile are lost.
        costs: limits [19], ascending → what it costs to lose the entries below each.
    """
    # NumPy sorts without the indices that torch sorts along: many times faster
    ranked = torch.from_numpy(np.sort(scores.flatten().cpu().numpy())).to(scores.device)
    steps = range(1, round(_MOST / _STEP) + 1)
    return [0.0, *costs(ranked[[_rank(i * _STEP, len(ranked)) for i in steps]])]


def between(costs: Sequence[float], sparsity: float) -> float:
    """The cost at a sparsity, on a line between those of two steps."""
    step, part = divmod(sparsity / _STEP, 1)
    low, high = (costs[min(int(step) + i, len(costs) - 1)] for i in (0, 1))
    return low + part * (high - low)


def shared_out(
    costs: Sequence[Sequence[float]], sizes: Sequence[int], sparsity: float
) -> list[float]:
    """Sparsities whose mean over weights is the one asked for, given out step by step to where a
    step costs least for a weight; the last step is cut.

    Args:
        costs: of each layer, at sparsities 0, 0.05, …
        sizes: of each layer, in weights.
    """
    steps, left = [0] * len(costs), sparsity * sum(sizes)
    shares = [0.0] * len(costs)
    while left > 0:
        open_ = [i for i, step in enumerate(steps) if step + 1 < len(costs[i])]
        if not open_:
            break
        best = min(open_, key=lambda i: (costs[i][steps[i] + 1] - costs[i][steps[i]]) / sizes[i])
        steps[best] += 1
        taken = min(_STEP * sizes[best], left)
        shares[best] += taken / sizes[best]
        left -= taken
    return shares
