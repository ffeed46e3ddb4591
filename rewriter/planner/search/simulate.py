"""What a plan does: the forward and the backward, kernel by kernel, with every byte alive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rewriter.planner.joint.joint import Joint, Route
from rewriter.planner.search.choices import Packing

__all__ = ["Decisions", "Event", "Moment", "Simulation", "schedule", "simulate", "trimmed"]


@dataclass(frozen=True)
class Decisions:
    """What becomes of the values that the backward needs.

    Args:
        kept: saved as they are.
        packed: saved in a smaller form.
        routes: made from what is saved by a closed form.

    All others are made again by their makers, at their first use.
    """

    kept: frozenset[int]
    packed: Mapping[int, Packing] = field(default_factory=dict)
    routes: Mapping[int, Route] = field(default_factory=dict)

    @classmethod
    def everything(cls, joint: Joint) -> Decisions:
        """What autograd does: all that the backward reads is kept."""
        return cls(joint.needed)


def trimmed(joint: Joint, decisions: Decisions, order: Sequence[Event] | None = None) -> Decisions:
    """Without what nothing reads; the backward's order stays the same.

    Args:
        joint: the graph.
        decisions: the plan.
        order: its `schedule`, where that is known.
    """
    read: set[int] = set()
    for what, number, _ in schedule(joint, decisions) if order is None else order:
        if what == "unpack":
            read.add(number)
        elif what == "route":
            read.add(number)
            read.update(decisions.routes[number].inputs)
        else:
            read.update(joint.steps[number].inputs)
    return Decisions(
        decisions.kept & read,
        {v: p for v, p in decisions.packed.items() if v in read},
        {v: r for v, r in decisions.routes.items() if v in read},
    )


class Event(NamedTuple):
    """Something that happens in the backward: a "step", a step "again", a value's "unpack" or
    "route".

    Args:
        what: which of these.
        number: of the step, or of the value.
        on_behalf: number of the backward step that it serves.
    """

    what: str
    number: int
    on_behalf: int


class Moment(NamedTuple):
    """Bytes alive during an operation."""

    name: str
    step: int
    backward: bool
    nbytes: int


@dataclass
class Simulation:
    """What it costs.

    Args:
        peak: most bytes alive at once, of activations, gradients and temporaries; what the caller
            holds (parameters, buffers, inputs) is not counted.
        at: during which operation that is.
        saved: bytes kept from the forward to the backward.
        seconds: added by recomputing and packing.
        flops: added.
        recomputed: steps that run a second time, in that order.
        timeline: what is alive, in order; of a backward step, with all that is made for it.
        forward_peak: the peak of the forward alone.
    """

    peak: int = 0
    at: str = ""
    saved: int = 0
    seconds: float = 0.0
    flops: int = 0
    recomputed: list[int] = field(default_factory=list)
    timeline: list[Moment] = field(default_factory=list)
    forward_peak: int = 0


def schedule(joint: Joint, decisions: Decisions) -> list[Event]:
    """The backward in order: what is missing is made right before its first reader."""
    order: list[Event] = []
    present = set(decisions.kept | joint.given)
    taken = set(decisions.packed) | set(decisions.routes)

    def need(values: tuple[int, ...], reader: int) -> None:
        stack = list(reversed(values))
        while stack:
            value = stack[-1]
            if value in present:
                stack.pop()
                continue
            packed, route = decisions.packed.get(value), decisions.routes.get(value)
            if packed is not None:
                present.add(value)
                order.append(Event("unpack", value, reader))
                continue
            maker = joint.values[value].maker
            assert maker is not None
            inputs = joint.steps[maker].inputs if route is None else route.inputs
            missing = [v for v in inputs if v not in present]
            if missing:
                stack += reversed(missing)
            elif route is not None:
                present.add(value)
                order.append(Event("route", value, reader))
            else:
                present.update(v for v in joint.steps[maker].outputs if v not in taken)
                present.add(value)
                order.append(Event("again", maker, reader))

    for number in joint.backward:
        if not present.issuperset(joint.steps[number].inputs):
            need(joint.steps[number].inputs, number)
        present.update(joint.steps[number].outputs)
        order.append(Event("step", number, number))
    return order


def simulate(
    joint: Joint,
    decisions: Decisions,
    detail: bool = False,
    order: Sequence[Event] | None = None,
) -> Simulation:
    """Runs the numbers: each value from the step that makes it to the last that reads it; saved
    values until the backward's last use; results, gradients and tangents to the end, as their
    holder has them.

    Args:
        joint: the graph.
        decisions: the plan.
        detail: with a timeline.
        order: the plan's `schedule`, where that is known.
    """
    run = _Run(joint, decisions, detail)
    run.forward()
    run.backward(schedule(joint, decisions) if order is None else order)
    return run.result


class _Run:
    """Thousands of plans are simulated for one answer: names are made only where one is wanted."""

    def __init__(self, joint: Joint, decisions: Decisions, detail: bool) -> None:
        self.joint, self.decisions, self.detail = joint, decisions, detail
        # what a fusing compiler has to write to memory all the same
        self.written = decisions.kept | joint.results | joint.updates | joint.gradients
        self.written |= set(decisions.packed) | set(decisions.routes)
        self.result = Simulation(seconds=sum(p.seconds for p in decisions.packed.values()))
        self.live = 0

    def _sizes(self, inlined: frozenset[int]) -> Sequence[int]:
        """Bytes of every value in memory."""
        gone, sizes = inlined - self.written, self.joint.sizes
        return [0 if i in gone else n for i, n in enumerate(sizes)] if gone else sizes

    def note(self, what: str, number: int, step: int, backward: bool) -> None:
        """A moment: something happens to a value ("pack", "unpack", "route") or a step runs."""
        joint, result = self.joint, self.result
        if self.live > result.peak or self.detail:
            of_value = what in ("pack", "unpack", "route")
            name = joint.values[number].name if of_value else joint.steps[number].name
            name = f"{what} {name}" if what else name
            if self.live > result.peak:
                result.peak, result.at = self.live, name
            if self.detail:
                result.timeline.append(Moment(name, step, backward, self.live))

    def forward(self) -> None:
        joint, packed = self.joint, self.decisions.packed
        sizes = self._sizes(joint.inlined[0])
        order = joint.forward
        held = self.decisions.kept | joint.results | joint.updates
        ends: dict[int, list[int]] = {}
        for value, place in joint.forward_ends:
            if value not in held:
                ends.setdefault(place, []).append(value)
        for place, number in enumerate(order):
            outputs = joint.steps[number].outputs
            for v in outputs:
                self.live += sizes[v]
            self.note("", number, number, False)
            # packed as soon as it is made; the original lives on to its last use
            small = [v for v in outputs if v in packed] if packed else ()
            gone = ends.get(place, ())
            for v in gone:
                self.live -= 0 if v in small else sizes[v]
            for value in small:
                self.live += packed[value].nbytes
                self.note("pack", value, number, False)
            for v in small:
                self.live -= sizes[v] if v in gone else 0
        self.result.forward_peak = self.result.peak
        self.result.saved = sum(sizes[v] for v in self.decisions.kept)
        self.result.saved += sum(p.nbytes for p in packed.values())

    def backward(self, order: Sequence[Event]) -> None:
        joint, decisions, result = self.joint, self.decisions, self.result
        sizes = self._sizes(joint.inlined[1])
        kept, packed, routes = decisions.kept, decisions.packed, decisions.routes
        taken = set(packed) | set(routes)
        last = [-1] * len(joint.values)
        made: set[int] = set()
        # bytes by place: what begins to live, what does for this moment only, what ends
        begins, passing, ends = ([0] * len(order) for _ in range(3))
        for place, (what, number, _) in enumerate(order):
            outputs: Sequence[int] = (number,)
            if what == "unpack":
                inputs: tuple[int, ...] = ()
                ends[place] += packed[number].nbytes
            elif what == "route":
                route = routes[number]
                inputs, passing[place] = route.inputs, route.workspace
                result.seconds += route.seconds
                result.flops += route.flops
            else:
                step = joint.steps[number]
                inputs, outputs = step.inputs, step.outputs
                if what == "again":
                    # made a second time along with another value, and not read
                    passing[place] = sum(sizes[v] for v in outputs if v in taken or v in kept)
                    outputs = [v for v in outputs if v not in taken]
                    result.seconds += step.seconds
                    result.flops += step.flops
                    result.recomputed.append(number)
            for value in inputs:
                last[value] = place
            for value in outputs:
                if value not in kept and value not in made:
                    made.add(value)
                    begins[place] += sizes[value]
                last[value] = place
        # held through the whole backward, by the caller or by autograd
        held = joint.results | joint.gradients | joint.tangents
        for value, place in enumerate(last):
            if place >= 0 and value not in held:
                ends[place] += sizes[value]
        self.live = sum(sizes[v] for v in (kept | joint.results | joint.tangents) - made)
        self.live += sum(p.nbytes for p in packed.values())
        for place, (what, number, reader) in enumerate(order):
            self.live += begins[place] + passing[place]
            self.note(what, number, reader, True)
            self.live -= passing[place] + ends[place]
