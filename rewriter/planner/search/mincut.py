"""What may be dropped at (nearly) no cost: least bytes kept, by a minimum cut.

    minimise Σ_{v kept} bytes(v), where all that the backward reads is kept, or made again from
    what is kept by steps that take next to no time

In a graph with an edge v_in → v_out of capacity bytes(v) for every value, an infinite one from each
input of such a step to each of its outputs, and the values that nothing cheap can make at the
source, those that the backward reads at the sink: what is cut is kept. It is the cut nearest to the
sink, so that least is made again.

Source: Chen et al. 2016 drop what is cheap by hand; PyTorch's own partitioner was the first to do
it by a minimum cut (He and Yu 2023).
"""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx

from rewriter.planner.joint.joint import Joint, fusible
from rewriter.planner.search.simulate import Decisions

__all__ = ["SHARES", "cheap", "cut", "free_plans"]

SHARES = (4e-3, 1e-3, 2.5e-4)
"""Of the step's time: most that one cheap step takes."""
_SOURCE, _SINK = -1, -2
_LIMIT = 4000
"""Values in one connected piece above which no cut is sought: it would take minutes."""


def cheap(joint: Joint, share: float) -> frozenset[int]:
    """Steps of the forward that take no more than this share of the whole, or, where elementwise
    operations are fused into their readers, those."""
    bound = share * sum(s.seconds for s in joint.steps)
    return frozenset(
        i
        for i in joint.forward
        if not (s := joint.steps[i]).fixed
        and (s.seconds <= bound or (joint.pricing.fused and fusible(s)))
    )


def free_plans(joint: Joint) -> Iterator[Decisions]:
    """Plans that keep less than everything at next to no cost."""
    for share in SHARES:
        kept = cut(joint, cheap(joint, share))
        if kept is not None:
            yield Decisions(kept)


def cut(joint: Joint, steps: frozenset[int]) -> frozenset[int] | None:
    """The values to keep where only these steps may run again; None where there is no way.

    What the user's own checkpoint regions drop is made again at any price.
    """
    made = {i: set(joint.steps[i].outputs) for i in joint.forward}
    must = {i for i, values in made.items() if values and values <= joint.dropped}
    again = {i for i in steps | must if not joint.steps[i].fixed}
    graph = nx.DiGraph()
    seen: set[int] = set()
    stack = sorted(joint.needed)
    for value in stack:
        graph.add_edge(2 * value + 1, _SINK)
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        known = joint.values[value]
        if value in joint.dropped or known.node is None:
            graph.add_edge(2 * value, 2 * value + 1)  # no capacity: not to be cut
        else:
            size = 0 if value in joint.results else known.nbytes
            graph.add_edge(2 * value, 2 * value + 1, capacity=size)
        if known.maker not in again:
            graph.add_edge(_SOURCE, 2 * value)
            continue
        for source in joint.steps[known.maker].inputs:
            if joint.values[source].maker is not None:
                graph.add_edge(2 * source + 1, 2 * value)
                stack.append(source)
    kept: set[int] = set()
    for piece in _pieces(graph):
        if _SOURCE not in piece or _SINK not in piece:
            continue  # all of it comes from what is given
        found = _minimum(piece)
        if found is None:
            return None
        kept |= found
    return frozenset(kept)


def _pieces(graph: nx.DiGraph) -> Iterator[nx.DiGraph]:
    """Parts of the graph that meet at nothing but source and sink."""
    inner = graph.subgraph(n for n in graph if n >= 0)
    for nodes in nx.weakly_connected_components(inner):
        yield graph.subgraph({*nodes, _SOURCE, _SINK} & set(graph)).copy()


def _minimum(piece: nx.DiGraph) -> set[int] | None:
    if len(piece) > 2 * _LIMIT:
        return None
    try:
        _, (before, after) = nx.minimum_cut(
            piece, _SOURCE, _SINK, flow_func=nx.algorithms.flow.dinitz
        )
    except nx.NetworkXUnbounded:
        return None
    return {n // 2 for n in before if n >= 0 and n % 2 == 0 and n + 1 in after}
