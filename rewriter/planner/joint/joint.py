"""A joint forward and backward graph as numbers: kernels, the memory they make, what they cost.

Views are dissolved: a value is a piece of memory (a storage), a step is an operation that runs a
kernel. `reading.py` makes them of what AOTAutograd hands to a partitioner; all later work (solver,
simulation) is on these numbers; `transform.py` carries a plan back to the graph.

Sizes that are symbols count as what they were at capture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx
from torch._ops import OpOverload

from rewriter.planner.joint.pricing import Pricing

__all__ = ["Joint", "Route", "Step", "Value", "fusible"]


@dataclass(frozen=True)
class Value:
    """A piece of memory.

    Args:
        name: of the node that makes it.
        nbytes: of its storage.
        maker: index of the step that makes it; None where it is given.
        given: "input" (parameters, buffers, inputs: the caller's own), "tangent", or "".
        line: the user's line it comes from.
        layer: dotted name of the module whose forward makes it; "" where it is not known.
        dtype, shape: of the tensor.
        order: "contiguous" or "channels_last" where its memory is, else "".
        node: of the graph, whose tensor is the whole of it; None where there is none.
    """

    name: str
    nbytes: int
    maker: int | None
    given: str = ""
    line: str = ""
    layer: str = ""
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()
    order: str = ""
    node: fx.Node | None = None


@dataclass(frozen=True)
class Step:
    """An operation.

    Args:
        name: of its node.
        op: "aten.addmm".
        inputs: values it reads.
        outputs: values it makes.
        seconds: predicted.
        flops: counted.
        backward: whether it is part of the backward.
        fixed: why it must not run a second time; "" where it may.
        line: the user's line it comes from.
        node: of the graph.
    """

    name: str
    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: float
    flops: int
    backward: bool
    fixed: str = ""
    line: str = ""
    node: fx.Node | None = None


@dataclass(frozen=True)
class Route:
    """Another way to make a value in the backward than to run its maker again.

    Args:
        value: what it makes.
        inputs: what it reads.
        seconds, flops: predicted, counted.
        name: of the closed form.
        inverse: whether it reads what was made of the value: then all that it reads has to be
            kept, or two values could each wait for the other.
        emit: makes the nodes, given a `Builder` and a function from old nodes to new ones.
        workspace: bytes beside the value, while it is made.
    """

    value: int
    inputs: tuple[int, ...]
    seconds: float
    flops: int
    name: str
    inverse: bool
    emit: Callable[..., fx.Node]
    workspace: int = 0


@dataclass
class Joint:
    """See the module's docstring.

    Attributes:
        values, steps: in the order of the graph.
        results: values that the forward returns to the user.
        updates: new contents of buffers, which live until the forward has ended.
        gradients: values that the backward returns.
        node_values: of every tensor node (by name): its values; several for an op with several
            results.
        backward_nodes: what runs in the backward, in order, steps and views alike.
        pricing: what the seconds were computed with.
        dropped: values that the user's own checkpoint regions do not keep.
        tangents: values.
    """

    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    results: frozenset[int] = frozenset()
    updates: frozenset[int] = frozenset()
    gradients: frozenset[int] = frozenset()
    node_values: dict[str, tuple[int, ...]] = field(default_factory=dict)
    backward_nodes: list[fx.Node] = field(default_factory=list)
    pricing: Pricing = field(default_factory=lambda: Pricing.of(torch.device("cpu")))
    dropped: frozenset[int] = frozenset()

    @cached_property
    def tangents(self) -> frozenset[int]:
        return frozenset(i for i, v in enumerate(self.values) if v.given == "tangent")

    @cached_property
    def given(self) -> frozenset[int]:
        """Inputs and tangents."""
        return frozenset(i for i, v in enumerate(self.values) if v.given)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of every value; of what the caller holds, 0."""
        return tuple(0 if v.given == "input" else v.nbytes for v in self.values)

    @cached_property
    def needed(self) -> frozenset[int]:
        """What the backward reads of what the forward makes."""
        return frozenset(
            v
            for i in self.backward
            for v in self.steps[i].inputs
            if (maker := self.values[v].maker) is not None and not self.steps[maker].backward
        )

    @cached_property
    def inlined(self) -> tuple[frozenset[int], frozenset[int]]:
        """Values of elementwise operations that a fusing compiler computes inside of their readers:
        in the forward, and in the backward. They take memory only where they are saved."""
        if not self.pricing.fused:
            return frozenset(), frozenset()
        readers: dict[int, list[Step]] = {}
        for step in self.steps:
            for value in step.inputs:
                readers.setdefault(value, []).append(step)

        def through(value: int, steps: list[Step]) -> bool:
            maker = self.values[value].maker
            return (
                maker is not None
                and fusible(self.steps[maker])
                and bool(steps)
                and all(fusible(s, reductions=True) for s in steps)
            )

        values = range(len(self.values))
        return (
            frozenset(
                v for v in values
                if through(v, [s for s in readers.get(v, ()) if not s.backward])
            ),
            frozenset(v for v in values if through(v, readers.get(v, []))),
        )  # fmt: skip

    @cached_property
    def forward(self) -> list[int]:
        return [i for i, s in enumerate(self.steps) if not s.backward]

    @cached_property
    def forward_ends(self) -> list[tuple[int, int]]:
        """(value, index into `forward` of the last step that makes or reads it)."""
        last: dict[int, int] = {}
        for place, number in enumerate(self.forward):
            step = self.steps[number]
            last.update((v, place) for v in (*step.inputs, *step.outputs))
        return list(last.items())

    @cached_property
    def backward(self) -> list[int]:
        return [i for i, s in enumerate(self.steps) if s.backward]


def fusible(step: Step, reductions: bool = False) -> bool:
    """A fusing compiler computes it inside of its readers (and, with `reductions`, its inputs
    inside of it)."""
    target = step.node.target if step.node is not None else None
    if not isinstance(target, OpOverload):
        return False
    tags = target.tags
    return torch.Tag.pointwise in tags or (reductions and torch.Tag.reduction in tags)
