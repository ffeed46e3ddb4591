"""Plans for a segment that is too large for an integer programme: greedy, with a look ahead.

From all kept, what gives most bytes per second is dropped first:

    argmax (bytes(v) + bytes(u) − bytes that must be kept instead) / Σ seconds of what runs again

over every kept value v alone, and together with the largest kept value u that it is made from:
where u is read by v's maker only, dropping either is dear and dropping both is not. Steps that have
to run again for one another form a chain, whose values may all be alive at once; a bound on the
bytes of a chain, from all of the segment down to 1/64 of it, gives plans with small peaks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from rewriter.planner.joint.joint import Joint
from rewriter.planner.search.choices import Packing
from rewriter.planner.search.segments import Segment

__all__ = ["Picked", "greedy_plans"]

_BOUNDS = (1.0, 0.25, 1 / 16, 1 / 64)
_POINTS = 8
"""Plans for each bound, evenly spaced in bytes."""
_TINY = 1e-9


@dataclass(frozen=True)
class Picked:
    """One plan: places in `Segment.values` and `Segment.packings`, seconds added, bytes kept."""

    kept: tuple[int, ...]
    packed: tuple[int, ...]
    seconds: float
    nbytes: int


def greedy_plans(joint: Joint, segment: Segment) -> list[Picked]:
    """Plans of a segment, for each bound on chains from the fastest to the smallest; always the
    same ones."""
    found: dict[tuple[object, ...], Picked] = {}
    for bound in _BOUNDS:
        for picked in _Search(joint, segment, bound).plans():
            found.setdefault((picked.kept, picked.packed), picked)
    return list(found.values())


@dataclass(frozen=True)
class _Move:
    """Values to drop or one to pack, and what follows."""

    values: tuple[int, ...]
    packing: int | None
    gain: int
    seconds: float
    steps: frozenset[int] = frozenset()
    instead: frozenset[int] = frozenset()

    @property
    def score(self) -> float:
        return self.gain / (self.seconds + _TINY)


class _Search:
    def __init__(self, joint: Joint, segment: Segment, bound: float) -> None:
        self.joint, self.segment = joint, segment
        self.place = {v: i for i, v in enumerate(segment.values)}
        self.size = {
            v: 0 if v in joint.results else joint.values[v].nbytes for v in segment.values
        }  # fmt: skip
        self.bound = bound * sum(self.size.values())
        self.packed: dict[int, int] = {}
        self.again: set[int] = set()
        self.chain: dict[int, int] = {}  # of steps that run again: union-find
        self.weight: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        for step in segment.steps:
            for value in joint.steps[step].inputs:
                self.readers.setdefault(value, []).append(step)
        self.forms: dict[int, list[int]] = {}
        for i, packing in enumerate(segment.packings):
            if not packing.direct:
                self.forms.setdefault(packing.value, []).append(i)
        wanted = segment.exported | segment.needed
        self.kept = {v for v in wanted if v in segment.exported or self._may_keep(v)}
        for value in sorted(wanted - self.kept):
            self._apply(self._dropping((value,)))

    def plans(self) -> Iterator[Picked]:
        """The first, then one for every so many bytes less, then the last."""
        most = now = self._bytes()
        yield self._picked()
        heap: list[tuple[float, int]] = []
        for value in sorted(self.kept):
            self._push(heap, value)
        noted = now
        while heap:
            score, value = heapq.heappop(heap)
            move = self._best(value)
            if move is None:
                continue
            if -move.score > score + _TINY and heap and -move.score > heap[0][0]:
                heapq.heappush(heap, (-move.score, value))
                continue
            self._apply(move)
            now -= move.gain
            # what is made again along with it costs nothing to drop
            for step in sorted(move.steps):
                for made in self.joint.steps[step].outputs:
                    if made in self.kept:
                        self._push(heap, made)
            if noted - now >= most / _POINTS:
                noted = now
                yield self._picked()
        if noted != now:
            yield self._picked()

    def _push(self, heap: list[tuple[float, int]], value: int) -> None:
        move = self._best(value)
        if move is not None:
            heapq.heappush(heap, (-move.score, value))

    def _best(self, value: int) -> _Move | None:
        """The best that can be done about a value that is kept."""
        if value not in self.kept:
            return None
        moves = [
            _Move((value,), i, self.size[value] - packing.nbytes, packing.seconds)
            for i in self.forms.get(value, ())
            if (packing := self._packing(i)).nbytes < self.size[value]
        ]
        maker = self.joint.values[value].maker
        assert maker is not None
        if value not in self.segment.exported and not self.joint.steps[maker].fixed:
            moves.append(self._dropping((value,)))
            before = [
                u for u in self.joint.steps[maker].inputs
                if u in self.kept and u not in self.segment.exported and self._repeatable(u)
            ]  # fmt: skip
            if before:
                largest = max(before, key=lambda u: (self.size[u], -u))
                moves.append(self._dropping((value, largest)))
        fitting = [m for m in moves if m.gain > 0 and self._fits(m)]
        return max(fitting, key=lambda m: (m.score, -len(m.values))) if fitting else None

    def _dropping(self, values: tuple[int, ...]) -> _Move:
        """What has to run again, and be kept, so that these need not be kept."""
        joint, gone = self.joint, set(values)
        steps: set[int] = set()
        instead: set[int] = set()
        stack = list(values)
        while stack:
            value = stack.pop()
            maker = joint.values[value].maker
            assert maker is not None
            if maker in self.again or maker in steps:
                continue
            steps.add(maker)
            for u in joint.steps[maker].inputs:
                if u not in self.place or u in self.packed or (u in self.kept and u not in gone):
                    continue
                if self._repeatable(u):
                    stack.append(u)
                else:
                    instead.add(u)
        gain = sum(self.size[v] for v in values if v in self.kept)
        gain -= sum(self.size[u] for u in instead)
        seconds = sum(joint.steps[s].seconds for s in steps)
        return _Move(values, None, gain, seconds, frozenset(steps), frozenset(instead))

    def _apply(self, move: _Move) -> None:
        self.kept -= set(move.values)
        self.kept |= move.instead
        if move.packing is not None:
            self.packed[move.values[0]] = move.packing
        for step in move.steps:
            self.again.add(step)
            self.chain[step] = step
            self.weight[step] = self._made(step)
        ends = [self._end(s) for s in self._joined(move)]
        for end in ends[1:]:
            a, b = self._end(ends[0]), self._end(end)
            if a != b:
                self.chain[b] = a
                self.weight[a] += self.weight[b]

    def _joined(self, move: _Move) -> list[int]:
        """Steps, run again already or by this move, that wait for one another because of it."""
        found = set(move.steps)
        for step in move.steps:
            for u in self.joint.steps[step].inputs:
                maker = self.joint.values[u].maker
                if maker in self.again and u not in self.kept and maker is not None:
                    found.add(maker)
        for value in move.values:
            found |= {r for r in self.readers.get(value, ()) if r in self.again}
            maker = self.joint.values[value].maker
            if maker in self.again and maker is not None:
                found.add(maker)
        return sorted(found)

    def _fits(self, move: _Move) -> bool:
        if move.packing is not None:
            return True
        ends = {self._end(s) for s in self._joined(move) if s in self.chain}
        new = sum(self._made(s) for s in move.steps)
        return new + sum(self.weight[e] for e in ends) <= self.bound

    def _end(self, step: int) -> int:
        while self.chain[step] != step:
            self.chain[step] = self.chain[self.chain[step]]
            step = self.chain[step]
        return step

    def _made(self, step: int) -> int:
        return sum(self.size.get(v, 0) for v in self.joint.steps[step].outputs)

    def _packing(self, place: int) -> Packing:
        return self.segment.packings[place]

    def _may_keep(self, value: int) -> bool:
        return value not in self.joint.dropped and self.joint.values[value].node is not None

    def _repeatable(self, value: int) -> bool:
        maker = self.joint.values[value].maker
        return maker is not None and not self.joint.steps[maker].fixed

    def _bytes(self) -> int:
        kept = sum(self.size[v] for v in self.kept)
        return kept + sum(self._packing(p).nbytes for p in self.packed.values())

    def _picked(self) -> Picked:
        seconds = sum(self.joint.steps[s].seconds for s in self.again)
        seconds += sum(self._packing(p).seconds for p in self.packed.values())
        return Picked(
            tuple(sorted(self.place[v] for v in self.kept)),
            tuple(sorted(self.packed.values())),
            seconds,
            self._bytes(),
        )
