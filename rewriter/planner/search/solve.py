"""Which values to keep: least added time under a bound on the peak.

Inside a segment, keeping, packing, closed forms and repeating are binaries: s_v (value v is kept),
c_p (packed in form p), a_t (made by route t), r_i (step i runs again). What the backward reads must
be there, and so must what is read to make something again:

    s_v + Σ c_p + Σ a_t + r_maker(v) ≥ 1      v read by the backward of this segment
    s_u + Σ c_p + Σ a_t + r_maker(u) ≥ r_i    u read by step i, of this segment
    s_u + Σ c_p                      ≥ a_t    u read by an inverse t (others: as for steps)
    s_v + Σ c_p                      = 1      v read by later segments

    minimise Σ seconds, given Σ bytes kept ≤ κ and Σ bytes that steps make again ≤ ω

for several κ and ω: a few plans for a segment, between all kept and nothing kept. What is unpacked
or derived is there for a moment; what steps make again may be there all at once. The simulation
says what each takes while the segment's backward runs, beyond what is kept. `chain.py` then takes
one plan for each segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from rewriter.planner.joint.joint import Joint, Route
from rewriter.planner.search.choices import Packing
from rewriter.planner.search.greedy import greedy_plans
from rewriter.planner.search.segments import Segment, Segments
from rewriter.planner.search.simulate import Decisions

__all__ = ["Choice", "assembled", "segment_plans"]

MB = float(1 << 20)
LIMIT = 10.0
"""Seconds for one programme. The limit on nodes comes first: plans must not depend on how busy the
machine is."""
BINARIES = 1500
"""Variables of one segment's programme above which a greedy search takes its place."""


@dataclass
class Choice:
    """One plan for a segment.

    Args:
        kept, packed, routes: what becomes of the segment's values; places in `Segment.values`,
            `Segment.packings`, `Segment.routes`, so that it serves segments alike.
        seconds: added.
        nbytes: kept.
        forward, backward: most bytes alive in the segment's forward and backward, beyond what the
            segments before (in the backward: and this one) keep; by segment, from the simulation.
    """

    kept: tuple[int, ...]
    packed: tuple[int, ...]
    routes: tuple[int, ...]
    seconds: float
    nbytes: int
    forward: dict[int, int] = field(default_factory=dict)
    backward: dict[int, int] = field(default_factory=dict)

    def decisions(self, segment: Segment) -> tuple[set[int], list[Packing], list[Route]]:
        return (
            {segment.values[i] for i in self.kept},
            [segment.packings[i] for i in self.packed],
            [segment.routes[i] for i in self.routes],
        )


class _Program:
    """The integer programme of one segment."""

    def __init__(self, joint: Joint, segments: Segments, segment: Segment) -> None:
        self.joint, self.segment = joint, segment
        steps = [s for s in segment.steps if set(joint.steps[s].outputs) & set(segment.values)]
        count = 0

        def columns(number: int) -> list[int]:
            nonlocal count
            count += number
            return list(range(count - number, count))

        self.s = dict(zip(segment.values, columns(len(segment.values)), strict=True))
        self.c = columns(len(segment.packings))
        self.a = columns(len(segment.routes))
        self.r = dict(zip(steps, columns(len(steps)), strict=True))
        self.count = count
        self.upper = np.ones(count)
        for step, column in self.r.items():
            if joint.steps[step].fixed:
                self.upper[column] = 0
        for value, column in self.s.items():
            if value in joint.dropped and value not in segment.exported:
                self.upper[column] = 0
            if joint.values[value].node is None:
                self.upper[column] = 0
        self.rows: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.gap = 0.0
        self._rules()
        self._prices()

    def _holds(self, value: int, *, indirect: bool = False) -> list[tuple[int, float]]:
        found = [(self.s[value], 1.0)]
        for packing, column in zip(self.segment.packings, self.c, strict=True):
            if packing.value == value and not (indirect and packing.direct):
                found.append((column, 1.0))
        return found

    def _there(self, value: int, *, indirect: bool = False) -> list[tuple[int, float]]:
        found = self._holds(value, indirect=indirect)
        for route, column in zip(self.segment.routes, self.a, strict=True):
            if route.value == value:
                found.append((column, 1.0))
        maker = self.joint.values[value].maker
        assert maker is not None
        found.append((self.r[maker], 1.0))
        return found

    def _at_least(self, bound: float, terms: list[tuple[int, float]]) -> None:
        self.rows += [(len(self.low), column, factor) for column, factor in terms]
        self.low.append(bound)

    def _rules(self) -> None:
        segment, joint = self.segment, self.joint
        for value in segment.needed:
            self._at_least(1, self._there(value))
        for value in segment.exported:
            self._at_least(1, self._holds(value, indirect=True))
        for step, column in self.r.items():
            for u in joint.steps[step].inputs:
                if u in self.s:
                    self._at_least(0, [(column, -1.0), *self._there(u, indirect=True)])
        for route, column in zip(segment.routes, self.a, strict=True):
            for u in route.inputs:
                if u in self.s:
                    held = self._holds(u) if route.inverse else self._there(u, indirect=True)
                    self._at_least(0, [(column, -1.0), *held])

    def _prices(self) -> None:
        joint, segment = self.joint, self.segment
        size = {v: 0 if v in joint.results else joint.values[v].nbytes / MB for v in segment.values}
        self.kept, self.again, self.seconds = (np.zeros(self.count) for _ in range(3))
        for value, column in self.s.items():
            self.kept[column] = size[value]
        for packing, column in zip(segment.packings, self.c, strict=True):
            self.kept[column] = packing.nbytes / MB
            self.seconds[column] = packing.seconds
        for route, column in zip(segment.routes, self.a, strict=True):
            self.seconds[column] = route.seconds
        for step, column in self.r.items():
            made = [v for v in joint.steps[step].outputs if v in size]
            self.again[column] = sum(size[v] for v in made)
            self.seconds[column] = joint.steps[step].seconds

    def solve(
        self, objective: np.ndarray, kept: float = np.inf, again: float = np.inf
    ) -> np.ndarray | None:
        rows = list(self.rows)
        low, high = list(self.low), [np.inf] * len(self.low)
        for bound, prices in ((kept, self.kept), (again, self.again)):
            if np.isfinite(bound):
                rows += [(len(low), c, p) for c, p in enumerate(prices) if p]
                low.append(-np.inf)
                high.append(bound)
        if not self.count:
            return np.zeros(0)
        constraints = []
        if rows:
            row, column, factor = (np.array(x) for x in zip(*rows, strict=True))
            matrix = coo_array((factor, (row, column)), shape=(len(low), self.count)).tocsr()
            constraints = [LinearConstraint(matrix, low, high)]
        found = milp(
            objective,
            constraints=constraints,
            bounds=Bounds(0, self.upper),
            integrality=np.ones(self.count),
            options={"node_limit": 200, "time_limit": LIMIT, "mip_rel_gap": 1e-3},
        )
        if found.x is None:
            return None
        self.gap = max(self.gap, float(found.mip_gap or 0.0))
        picked: np.ndarray = found.x > 0.5
        return picked

    def choice(self, x: np.ndarray) -> Choice:
        segment = self.segment
        kept = tuple(i for i, v in enumerate(segment.values) if x[self.s[v]])
        return Choice(
            kept,
            tuple(i for i, column in enumerate(self.c) if x[column]),
            tuple(i for i, column in enumerate(self.a) if x[column]),
            float(self.seconds @ x),
            int(round(float(self.kept @ x) * MB)),
        )


def segment_plans(
    joint: Joint, segments: Segments, segment: Segment, grid: int = 12
) -> tuple[list[Choice], float]:
    """(a few plans for a segment, from what takes no time to what keeps least; the largest relative
    gap of its programmes, proven by the solver).

    Raises:
        RuntimeError: there is none, which would be a flaw of this code.
    """
    if (
        len(segment.values) + len(segment.packings) + len(segment.routes) + len(segment.steps)
        > BINARIES
    ):
        return [
            Choice(tuple(p.kept), tuple(p.packed), (), p.seconds, p.nbytes)
            for p in greedy_plans(joint, segment)
        ], 0.0
    program = _Program(joint, segments, segment)
    # seconds and bytes on one scale, so that of equals the one that keeps less wins
    room = max(float(program.kept.sum() + program.again.sum()), 1e-9)
    time = program.seconds / max(float(program.seconds.max(initial=0)), 1e-9)
    memory = (program.kept + program.again) / room
    quick = program.solve(time + 1e-4 * memory)
    small = program.solve(program.kept / room + 1e-4 * memory + 1e-5 * time)
    if quick is None or small is None:
        raise RuntimeError(f"no plan for segment {segment.index} of a joint graph")
    most, least = float(program.kept @ quick), float(program.kept @ small)
    found = {tuple(x.tolist()): x for x in (quick, small)}
    widest = float(program.again @ small)
    bounds = (np.inf, grid), (0.5 * widest, grid // 2), (0.15 * widest, grid // 2)
    for again, number in bounds if widest > 0 else ():
        for share in np.linspace(0, 1, number + 1)[1 if again == np.inf else 0 : -1] ** 1.5:
            kept = least + share * (most - least) + 1e-6
            x = program.solve(time + 1e-4 * memory, kept, again)
            if x is not None:
                found.setdefault(tuple(x.tolist()), x)
    return [program.choice(x) for x in found.values()], program.gap


def assembled(segments: Segments, picks: Sequence[Choice]) -> Decisions:
    """The decisions of one plan for each segment."""
    kept: set[int] = set()
    packed: dict[int, Packing] = {}
    routes: dict[int, Route] = {}
    for segment, pick in zip(segments.segments, picks, strict=True):
        own, smaller, ways = pick.decisions(segment)
        kept |= own
        packed.update((p.value, p) for p in smaller if p.value not in own)
        routes.update((r.value, r) for r in ways if r.value not in own)
    return Decisions(frozenset(kept), packed, routes)
