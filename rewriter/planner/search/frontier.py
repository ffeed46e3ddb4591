"""The plans worth having: none of them takes less memory and less time than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewriter.planner.joint.joint import Joint
from rewriter.planner.search.chain import choose
from rewriter.planner.search.choices import packings, routes
from rewriter.planner.search.mincut import free_plans
from rewriter.planner.search.neighbours import neighbours
from rewriter.planner.search.segments import Segments, cuts, joined
from rewriter.planner.search.simulate import (
    Decisions,
    Event,
    Simulation,
    schedule,
    simulate,
    trimmed,
)
from rewriter.planner.search.solve import Choice, assembled, segment_plans

__all__ = ["Frontier", "Point"]

_LARGE = 2500
"""Steps of a forward above which fewer sizes of segments and fewer budgets are tried."""
_WORK = 300_000
"""Steps simulated by the local search."""


@dataclass(frozen=True)
class Point:
    """A plan and what it costs."""

    decisions: Decisions
    simulation: Simulation

    @property
    def peak(self) -> int:
        return self.simulation.peak

    @property
    def seconds(self) -> float:
        return self.simulation.seconds


class Frontier:
    """All plans of a joint graph that are worth having, from the fastest to the smallest.

    Which plans there are does not depend on any budget. So a smaller budget, which fewer of them
    meet, can only give a plan with a smaller peak.

    Args:
        joint: the graph.
        lossy: forms that lose digits, of "bf16", "int8", "int4".
        points: budgets to solve for, between the least and the most.
    """

    def __init__(self, joint: Joint, lossy: tuple[str, ...] = (), points: int = 48) -> None:
        self.joint = joint
        self.gap = 0.0
        self.packings = list(packings(joint, lossy))
        self.routes = list(routes(joint, bool(lossy)))
        self.default = Point(
            Decisions.everything(joint), simulate(joint, Decisions.everything(joint))
        )
        self.found: dict[tuple[int, float], Point] = {}
        if not joint.dropped:
            self._add(self.default.decisions)
        for decisions in free_plans(joint):
            self._add(decisions)
        borders = cuts(joint)
        large = len(joint.forward) > _LARGE
        points, number = points // 2 if large else points, 1
        # checkpoints √n segments apart are best where all segments are alike (Chen et al. 2016)
        while number == 1 or number <= min(len(borders), 1.5 * len(borders) ** 0.5):
            self._solve(joined(borders, number) if number > 1 else borders, points)
            number *= 4 if large else 2
        self._improve()
        self.points = self._pareto()

    def choose(self, budget: float) -> Point | None:
        """The fastest plan whose peak is within the budget; None where none is."""
        return next((p for p in self.points if p.peak <= budget), None)

    @property
    def smallest(self) -> Point:
        """The plan with the least peak."""
        return self.points[-1]

    def within(self, seconds: float) -> Point:
        """The smallest plan that adds no more than so many seconds."""
        return [p for p in self.points if p.seconds <= seconds or p is self.points[0]][-1]

    def _add(self, decisions: Decisions, order: Sequence[Event] | None = None) -> Point:
        joint = self.joint
        order = schedule(joint, decisions) if order is None else order
        decisions = trimmed(joint, decisions, order)
        point = Point(decisions, simulate(joint, decisions, order=order))
        self.found.setdefault((point.peak, point.seconds), point)
        return point

    def _improve(self) -> None:
        """Tries what is next to each plan worth having, until nothing new is worth having."""
        left, seen = _WORK, set()
        while True:
            new = [p for p in self._pareto() if id(p) not in seen]
            if not new:
                return
            # the smallest first: the programmes see peaks least where most is made again
            for point in reversed(new):
                seen.add(id(point))
                near = neighbours(self.joint, point.decisions, self.packings, self.routes)
                for found in near:
                    left -= len(self.joint.steps)
                    if left <= 0:
                        return
                    if found is not None:
                        self._add(*found)

    def _pareto(self) -> list[Point]:
        best: list[Point] = []
        for point in sorted(self.found.values(), key=lambda p: (p.seconds, p.peak)):
            if not best or point.peak < best[-1].peak:
                best.append(point)
        return best

    def _solve(self, begins: Sequence[int], points: int) -> None:
        joint = self.joint
        segments = Segments(joint, begins, self.packings, self.routes)
        known: dict[tuple[object, ...], list[Choice]] = {}
        choices: list[list[Choice]] = []
        for segment in segments.segments:
            if segment.signature not in known:
                known[segment.signature], gap = segment_plans(joint, segments, segment)
                self.gap = max(self.gap, gap)
            choices.append(
                [
                    Choice(c.kept, c.packed, c.routes, c.seconds, c.nbytes)
                    for c in known[segment.signature]
                ]
            )
        for turn in range(max(map(len, choices))):
            self._measure(segments, [own[turn % len(own)] for own in choices])
        least = choose(choices, None)
        if least is None:
            return
        smallest = self._add(
            assembled(segments, [own[i] for own, i in zip(choices, least[0], strict=True)])
        )
        most = max(self.default.peak, smallest.peak)
        for budget in np.linspace(smallest.peak, most, points + 1)[:-1]:
            picks = choose(choices, float(budget))
            if picks is None:
                continue
            self.gap = max(self.gap, picks[1])
            self._add(
                assembled(segments, [own[i] for own, i in zip(choices, picks[0], strict=True)])
            )

    def _measure(self, segments: Segments, picks: Sequence[Choice]) -> None:
        """Notes of each segment's choice what is alive during the segment, beyond what is kept."""
        point = self._add(assembled(segments, picks))
        run = simulate(self.joint, point.decisions, detail=True)
        kept = np.cumsum([0, *(p.nbytes for p in picks)])
        for pick, segment in zip(picks, segments.segments, strict=True):
            pick.forward.setdefault(segment.index, 0)
            pick.backward.setdefault(segment.index, 0)
        for _, step, backward, nbytes in run.timeline:
            if backward:
                j = segments.of_backward[step]
                beyond, into = nbytes - int(kept[j + 1]), picks[j].backward
            else:
                j = segments.of_step[step]
                beyond, into = nbytes - int(kept[j]), picks[j].forward
            into[j] = max(into[j], beyond)
