"""What a plan does: the forward and the backward, kernel by kernel, with every byte alive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from rewriter.planner.choices import Packing
from rewriter.planner.joint import Joint, Route

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


def trimmed(joint: Joint, decisions: Decisions) -> Decisions:
    """Without what nothing reads."""
    read: set[int] = set()
    for what, number, _ in schedule(joint, decisions):
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
    present = set(decisions.kept)
    present |= {i for i, v in enumerate(joint.values) if v.given}

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
                taken = set(decisions.packed) | set(decisions.routes)
                present.update(v for v in joint.steps[maker].outputs if v not in taken)
                present.add(value)
                order.append(Event("again", maker, reader))

    for number in joint.backward:
        need(joint.steps[number].inputs, number)
        present.update(joint.steps[number].outputs)
        order.append(Event("step", number, number))
    return order


def simulate(joint: Joint, decisions: Decisions, detail: bool = False) -> Simulation:
    """Runs the numbers: each value from the step that makes it to the last that reads it; saved
    values until the backward's last use; results, gradients and tangents to the end, as their
    holder has them."""
    run = _Run(joint, decisions, detail)
    run.forward()
    run.backward()
    return run.result


class _Run:
    def __init__(self, joint: Joint, decisions: Decisions, detail: bool) -> None:
        self.joint, self.decisions, self.detail = joint, decisions, detail
        self.sizes = [0 if v.given == "input" else v.nbytes for v in joint.values]
        # what a fusing compiler has to write to memory all the same
        self.written = decisions.kept | joint.results | joint.updates | joint.gradients
        self.written |= set(decisions.packed) | set(decisions.routes)
        self.result = Simulation(seconds=sum(p.seconds for p in decisions.packed.values()))
        self.live = 0

    def _sizes(self, inlined: frozenset[int]) -> list[int]:
        """Bytes of every value in memory."""
        gone = inlined - self.written
        return [0 if i in gone else n for i, n in enumerate(self.sizes)] if gone else self.sizes

    def note(self, name: str, step: int, backward: bool) -> None:
        if self.live > self.result.peak:
            self.result.peak, self.result.at = self.live, name
        if self.detail:
            self.result.timeline.append(Moment(name, step, backward, self.live))

    def forward(self) -> None:
        joint, packed = self.joint, self.decisions.packed
        sizes = self._sizes(joint.inlined[0])
        order = joint.forward
        last: dict[int, int] = {}
        for place, number in enumerate(order):
            for value in (*joint.steps[number].inputs, *joint.steps[number].outputs):
                last[value] = place
        held = self.decisions.kept | joint.results | joint.updates
        ends: dict[int, list[int]] = {}
        for value, place in last.items():
            if value not in held:
                ends.setdefault(place, []).append(value)
        for place, number in enumerate(order):
            step = joint.steps[number]
            self.live += sum(sizes[v] for v in step.outputs)
            self.note(step.name, number, False)
            # packed as soon as it is made; the original lives on to its last use
            small = [v for v in step.outputs if v in packed]
            gone = ends.get(place, ())
            self.live -= sum(sizes[v] for v in gone if v not in small)
            for value in small:
                self.live += packed[value].nbytes
                self.note(f"pack {joint.values[value].name}", number, False)
            self.live -= sum(sizes[v] for v in gone if v in small)
        self.result.forward_peak = self.result.peak
        saved = {v for v in self.decisions.kept if joint.values[v].given != "input"}
        self.result.saved = sum(sizes[v] for v in saved)
        self.result.saved += sum(p.nbytes for p in packed.values())

    def backward(self) -> None:
        joint, decisions = self.joint, self.decisions
        sizes = self._sizes(joint.inlined[1])
        order = schedule(joint, decisions)
        last: dict[int, int] = {}
        made: dict[int, int] = {}
        taken = set(decisions.packed) | set(decisions.routes)
        passing: dict[int, int] = {}  # made a second time along with another value, and not read
        for place, event in enumerate(order):
            if event.what in ("unpack", "route"):
                inputs: tuple[int, ...] = ()
                if event.what == "route":
                    inputs = decisions.routes[event.number].inputs
                outputs: tuple[int, ...] = (event.number,)
            else:
                inputs = joint.steps[event.number].inputs
                outputs = joint.steps[event.number].outputs
                if event.what == "again":
                    extra = [v for v in outputs if v in taken or v in decisions.kept]
                    passing[place] = sum(sizes[v] for v in extra)
                    outputs = tuple(v for v in outputs if v not in taken)
            for value in inputs:
                last[value] = place
            for value in outputs:
                if value not in decisions.kept:
                    made.setdefault(value, place)
                last[value] = max(last.get(value, 0), place)
        begins: dict[int, list[int]] = {}
        ends: dict[int, list[int]] = {}
        for value, place in made.items():
            begins.setdefault(place, []).append(value)
        # held through the whole backward, by the caller or by autograd
        held = joint.results | joint.gradients | joint.tangents
        for value, place in last.items():
            if value not in held:
                ends.setdefault(place, []).append(value)
        alive = (decisions.kept | joint.results | joint.tangents) - set(made)
        self.live = sum(sizes[v] for v in alive)
        self.live += sum(p.nbytes for p in decisions.packed.values())
        for place, (what, number, reader) in enumerate(order):
            self.live += sum(sizes[v] for v in begins.get(place, ())) + passing.get(place, 0)
            name = joint.values[number].name if what in ("unpack", "route") else ""
            self.note(f"{what} {name or joint.steps[number].name}", reader, True)
            self.live -= passing.get(place, 0)
            if what == "unpack":
                self.live -= decisions.packed[number].nbytes
            elif what == "route":
                self.result.seconds += decisions.routes[number].seconds
                self.result.flops += decisions.routes[number].flops
            elif what == "again":
                self.result.seconds += joint.steps[number].seconds
                self.result.flops += joint.steps[number].flops
                self.result.recomputed.append(number)
            self.live -= sum(sizes[v] for v in ends.get(place, ()))
