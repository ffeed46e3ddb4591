"""One plan for each part of a chain: least added time, at no moment more alive than a budget.

With K_j the bytes that part j's plan keeps, F_j and W_j what is alive in its forward and backward
beyond what is kept,

    Σ_{i<j} K_i + F_j ≤ B     in the forward of part j,
    Σ_{i≤j} K_i + W_j ≤ B     in its backward.

A sum over all that is saved, as elsewhere, says little of the peak: what is made again early and
needed late is alive all the time between.

Both only tighten as Σ K grows, so of two ways to come to part j the one that keeps no less and
takes no less time is never needed: the ways worth having are carried on from part to part, and the
best of the last is the best of all (Bellman 1957; labels as in Desrochers and Soumis 1988).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rewriter.planner.search.solve import Choice

__all__ = ["choose"]

_LABELS = 4096
"""Ways carried on from one part to the next; of more, those nearly alike are taken for one."""


def choose(
    choices: Sequence[Sequence[Choice]], budget: float | None
) -> tuple[list[int], float] | None:
    """(a plan for each part, the part of its cost by which it may miss the best): least time
    within a budget; None where nothing fits.

    Args:
        choices: of each part, in the order of the forward.
        budget: bytes; None for the least peak there is.
    """
    kept, cost = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    missed = 0.0
    for j, own in enumerate(choices):
        bytes_, forward, backward = (
            np.array(x, np.int64)
            for x in zip(*((o.nbytes, o.forward[j], o.backward[j]) for o in own), strict=True)
        )
        after = kept[:, None] + bytes_
        top = np.maximum(kept[:, None] + forward, after + backward)
        if budget is None:
            total = np.maximum(cost[:, None], top)
            label, pick = np.divmod(np.arange(total.size), len(own))
        else:
            total = cost[:, None] + np.array([o.seconds for o in own])
            label, pick = np.nonzero(top <= budget)
        after, total = after[label, pick], total[label, pick]
        if not len(total):
            return None
        best = _worth_having(after, total)
        if len(best) > _LABELS:
            width = (total[best[-1]] - total[best[0]]) / _LABELS
            # of each stretch of costs the last, which keeps least
            stretch = ((total[best] - total[best[0]]) / width).astype(np.int64)
            best = best[np.append(stretch[1:] != stretch[:-1], True)]
            missed += width
        kept, cost = after[best], total[best]
        trail.append((label[best], pick[best]))
    picks, place = [], 0
    for labels, plans in reversed(trail):
        picks.append(int(plans[place]))
        place = int(labels[place])
    return picks[::-1], min(missed / float(cost[0]), 1.0) if cost[0] else 0.0


def _worth_having(kept: NDArray[np.int64], cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of what no other undercuts in both, by rising cost."""
    order = np.lexsort((kept, cost))
    least = np.minimum.accumulate(kept[order])
    first = np.append(True, least[1:] < least[:-1])
    found: NDArray[np.int64] = order[first]
    return found
