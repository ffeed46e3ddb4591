"""Neurons of an MLP put into experts by co-activation, and the router that tells the best ones.

Nothing is iterated over batches: clusters take a few rounds of k-means with sizes that are fixed,
and the router is a ridge regression in closed form.

Source: Zhang et al. 2022, "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts"
(clusters by co-activation, a router for each expert's contribution).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["clustered", "contributions", "fit_router", "largest", "recall"]

_TOP = 0.1
"""The share of a row's neurons that count as active together."""
_ROUNDS = 10
_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the ridge regression, over the mean variance of an input."""


def largest(scores: Tensor, count: int) -> Tensor:
    """Which entries of each row [*, width] are its `count` largest, bool."""
    best = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def clustered(sizes: Tensor, count: int) -> Tensor:
    """The cluster of each neuron, [hidden] int64: clusters of equal sizes, up to one, of neurons
    that are active for the same rows.

    A neuron is active in a row where its contribution is among the tenth of the largest; neurons
    are compared by the cosine of these patterns. Balanced k-means: in each round neurons and
    clusters are matched stably, each neuron applying to the clusters in the order that it is like
    them, each cluster keeping those most like it.

    Args:
        sizes: [rows, hidden] ≥ 0: what each neuron contributes to the outputs.
        count: how many clusters, from 1 to hidden.
    """
    hidden = sizes.shape[1]
    together = largest(sizes, max(int(_TOP * hidden), 1)).float()
    patterns = F.normalize((together + 1e-6).t(), dim=1)  # a neuron that is never active, too
    room = hidden // count + (torch.arange(count) < hidden % count).long().to(patterns.device)
    centres = _spread(patterns, count)
    cluster = torch.empty(0)
    for _ in range(_ROUNDS):
        before, cluster = cluster, _matched(patterns @ centres.t(), room)
        if torch.equal(before, cluster):
            break
        sums = torch.zeros_like(centres).index_add_(0, cluster, patterns)
        centres = F.normalize(sums, dim=1)
    return cluster


def _spread(patterns: Tensor, count: int) -> Tensor:
    """Rows to begin with, drawn one after another with probabilities 1 − cosine to the nearest one
    so far (k-means++: half a squared distance)."""
    draw = torch.Generator().manual_seed(0)
    chosen, nearest = [0], torch.zeros(len(patterns))
    for _ in range(count - 1):
        nearest = torch.maximum(nearest, (patterns @ patterns[chosen[-1]]).cpu())
        odds = (1 - nearest).clamp_min(1e-9)
        odds[chosen] = 0
        chosen.append(int(odds.multinomial(1, generator=draw)))
    return patterns[chosen]


def _matched(likeness: Tensor, room: Tensor) -> Tensor:
    """A stable matching of neurons [hidden] with clusters [count] that have room for so many."""
    wanted, cluster = likeness.clone(), likeness.argmax(1)
    hidden = torch.arange(len(likeness), device=likeness.device)
    while True:
        mine = likeness[hidden, cluster]
        order = mine.argsort(descending=True, stable=True)
        order = order[cluster[order].argsort(stable=True)]  # by cluster, those most like it first
        filled = torch.bincount(cluster, minlength=len(room))
        rank = hidden - (filled.cumsum(0) - filled)[cluster[order]]
        most = room[cluster[order]]
        sent = order[rank >= most]  # they apply elsewhere, where there is none yet more like it
        if not len(sent):
            return cluster
        last = order[rank == most - 1]
        least = likeness.new_full((len(room),), -torch.inf)
        least[cluster[last]] = mine[last]
        wanted[sent, cluster[sent]] = -torch.inf
        cluster[sent] = wanted[sent].masked_fill(likeness[sent] < least, -torch.inf).argmax(1)


def contributions(sizes: Tensor, expert_of: Tensor, count: int) -> Tensor:
    """√Σ size² over the neurons of each expert, [rows, count].

    Args:
        sizes: [rows, hidden], |a[n]|·‖down[:, n]‖.
        expert_of: [hidden].
    """
    return F.linear(sizes.square(), F.one_hot(expert_of, count).t().to(sizes.dtype)).sqrt()


def recall(scores: Tensor, sizes: Tensor, active: int) -> float:
    """Of the `active` experts a row with the largest sizes, the share that are among those with the
    largest scores; both [rows, count]."""
    found = largest(scores, active) & largest(sizes, active)
    return float(found.sum()) / (active * len(scores))


def fit_router(rows: Tensor, sizes: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """argmin Σ ‖router x + bias − size‖² + λ‖router‖², of the λ with the best recall on every
    fourth row, which is left out for that choice.

    Args:
        rows: [n, in] float32, n ≥ 4.
        sizes: [n, count] float32.

    Returns:
        router [count, in] and bias [count].
    """
    apart = torch.arange(len(rows), device=rows.device) % 4 == 3
    tried = _Ridge(rows[~apart], sizes[~apart])

    def found(penalty: float) -> float:
        router, bias = tried.solved(penalty)
        return recall(F.linear(rows[apart], router, bias), sizes[apart], active)

    return _Ridge(rows, sizes).solved(max(_PENALTIES, key=found))


class _Ridge:
    """Ridge regressions of sizes [n, count] on rows [n, in], for any penalty: U S Vᵀ of the rows
    serves all."""

    def __init__(self, rows: Tensor, sizes: Tensor) -> None:
        self.mean, self.offset = rows.mean(0), sizes.mean(0)
        u, self.scale, self.basis = torch.linalg.svd(rows - self.mean, full_matrices=False)
        self.sums = u.t() @ (sizes - self.offset)
        self.variance = self.scale.square().sum() / rows.shape[1]

    def solved(self, penalty: float) -> tuple[Tensor, Tensor]:
        lowered = self.scale.square() + (penalty * self.variance).clamp_min(1e-30)
        router = ((self.scale / lowered)[:, None] * self.sums).t() @ self.basis
        return router, self.offset - router @ self.mean
