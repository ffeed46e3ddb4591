"""The forward in segments, between places where little is alive; equal segments are found as such.

What a segment's backward reads from an earlier segment has to be there when it begins: it is kept.
So segments can be decided one by one, and segments that look the same are decided once. Larger
segments, of several of these, may drop what is kept at the borders inside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewriter.planner.joint.joint import Joint, Route
from rewriter.planner.search.choices import Packing, by_value

__all__ = ["Segment", "Segments", "cuts", "joined"]


def cuts(joint: Joint) -> list[int]:
    """Places in the forward (indices into `joint.forward`; a segment begins there) where less is
    alive for the rest of the forward than nearby."""
    order = joint.forward
    last: dict[int, int] = {}
    for i, number in enumerate(order):
        for value in joint.steps[number].inputs:
            if (maker := joint.values[value].maker) is not None and not joint.steps[maker].backward:
                last[value] = i
    ends: dict[int, int] = {}
    for value, i in last.items():
        ends[i] = ends.get(i, 0) + joint.values[value].nbytes
    alive, crossing = 0, []
    for i, number in enumerate(order):
        alive += sum(joint.values[v].nbytes for v in joint.steps[number].outputs if v in last)
        alive -= ends.get(i, 0)
        crossing.append(alive)
    found: list[int] = []
    reach = 5
    for i in range(1, len(order) - 2):
        near = crossing[max(0, i - reach) : i + reach + 1]
        if crossing[i] == min(near) and crossing[i] < max(near):
            if found and i - found[-1] <= reach and crossing[found[-1]] == crossing[i]:
                continue  # a plateau begins once
            found.append(i)
    return [i + 1 for i in found]


def joined(begins: Sequence[int], number: int) -> list[int]:
    """The borders of segments that are `number` of the given ones, counted from the end: there, a
    segment is alone when its backward begins."""
    return list(reversed(list(reversed(begins))[number - 1 :: number]))


@dataclass
class Segment:
    """Steps of the forward that are decided together.

    Args:
        index: its place.
        steps: numbers of its steps.
        values: what they make and what may be worth keeping, in order.
        exported: of these, what later segments read for their backward.
        needed: of these, what its own backward steps read.
        packings, routes: the choices there are for `values`.
        signature: equal where segments are alike, value by value and step by step.
    """

    index: int
    steps: list[int]
    values: list[int]
    exported: frozenset[int]
    needed: frozenset[int]
    packings: list[Packing]
    routes: list[Route]
    signature: tuple[object, ...] = ()


class Segments:
    """A joint graph in segments.

    Args:
        joint: the graph.
        begins: indices into `joint.forward`, ascending.
        packings, routes: all choices.

    Attributes:
        segments: in the order of the forward.
        of_backward: the segment that each backward step belongs to, descending.
    """

    def __init__(
        self,
        joint: Joint,
        begins: Sequence[int],
        packings: Sequence[Packing],
        routes: Sequence[Route],
    ) -> None:
        self.joint = joint
        order = joint.forward
        borders = [0, *(b for b in begins if 0 < b < len(order)), len(order)]
        groups = [order[a:b] for a, b in zip(borders, borders[1:], strict=False)]
        self.of_step = {s: i for i, group in enumerate(groups) for s in group}
        self.of_value = {v: self.of_step[s] for s in order for v in joint.steps[s].outputs}
        self.of_backward = self._backward()
        readers = self._readers()
        forms, routes_to = by_value(packings), by_value(routes)
        wanted = self._wanted(routes_to)
        self.segments = []
        for i, group in enumerate(groups):
            values = [v for s in group for v in joint.steps[s].outputs if v in wanted]
            exported = frozenset(v for v in values if self._exported(v, readers))
            own = [
                r
                for v in values
                for r in routes_to.get(v, ())
                if all(self.of_value.get(u, i) == i or self._exported(u, readers) for u in r.inputs)
            ]
            segment = Segment(
                i,
                group,
                values,
                exported,
                frozenset(v for v in values if v in joint.needed),
                [p for v in values for p in forms.get(v, ())],
                own,
            )
            segment.signature = self._signature(segment)
            self.segments.append(segment)

    def _exported(self, value: int, readers: dict[int, int]) -> bool:
        own = self.of_value[value]
        return readers.get(value, own) > own

    def _backward(self) -> dict[int, int]:
        """A backward step belongs to the last segment that it reads from, or that a later step
        did."""
        found: dict[int, int] = {}
        now = max(self.of_step.values(), default=0)
        for number in self.joint.backward:
            read = [self.of_value[v] for v in self.joint.steps[number].inputs if v in self.of_value]
            if read:
                now = min(now, max(read))
            found[number] = now
        return found

    def _readers(self) -> dict[int, int]:
        """The last segment in which a value is read, by its backward or to make something again."""
        joint = self.joint
        last: dict[int, int] = {}
        for number in joint.backward:
            for value in joint.steps[number].inputs:
                if value in self.of_value:
                    last[value] = max(last.get(value, 0), self.of_backward[number])
        # what no backward needs is never made again, whatever reads it
        useful = self._wanted({})
        for number in joint.forward:
            step = joint.steps[number]
            if step.fixed or not useful.intersection(step.outputs):
                continue
            for value in step.inputs:
                if value in self.of_value:
                    last[value] = max(last.get(value, 0), self.of_step[number])
        return last

    def _wanted(self, routes_to: dict[int, list[Route]]) -> set[int]:
        """All that the backward reads, and what these could be made from."""
        joint = self.joint
        wanted, stack = set(joint.needed), list(joint.needed)
        while stack:
            value = stack.pop()
            maker = joint.values[value].maker
            assert maker is not None
            sources = list(joint.steps[maker].inputs) if not joint.steps[maker].fixed else []
            sources += [u for r in routes_to.get(value, ()) for u in r.inputs]
            for u in sources:
                if u not in wanted and u in self.of_value:
                    wanted.add(u)
                    stack.append(u)
        return wanted

    def _signature(self, segment: Segment) -> tuple[object, ...]:
        joint = self.joint
        local: dict[int, int] = {}
        rows: list[object] = []
        for number in segment.steps:
            step = joint.steps[number]
            inputs = tuple(
                local.setdefault(v, len(local)) if v in self.of_value else -1 for v in step.inputs
            )
            outputs = []
            for v in step.outputs:
                local[v] = len(local)
                flags = (
                    v in segment.exported,
                    v in segment.needed,
                    v in joint.results,
                    v in joint.dropped,
                )
                outputs.append((joint.values[v].nbytes, v in set(segment.values), *flags))
            rows.append((step.op, step.flops, bool(step.fixed), inputs, tuple(outputs)))
        rows += [(p.kind, local[p.value], p.nbytes) for p in segment.packings]
        rows += [(r.name, local[r.value]) for r in segment.routes]
        return tuple(rows)
