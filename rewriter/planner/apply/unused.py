"""Results that a loss does not use: what only they depend on gets no gradient, as in eager mode.

AOTAutograd's backward takes a zero for a result without a gradient, and would hand zeros on: an
optimizer with momentum or weight decay would then move a head that is not in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    GradAOTOutput,
    IntermediateBaseAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)

from rewriter.planner.apply.backward import edge

__all__ = ["Uses", "uses"]


@dataclass(frozen=True)
class Uses:
    """Which results' gradients each gradient is computed from.

    Args:
        of: results by number, for every parameter by name, and for every input by number; only
            of what some result does without.
    """

    of: Mapping[str | int, frozenset[int]]

    def attach(
        self, results: Sequence[Any], weights: Mapping[str, Tensor], leaves: Sequence[Any]
    ) -> None:
        """Has the backward of these results drop the gradients that eager mode would not make."""
        if not self.of:
            return
        numbers = frozenset().union(*self.of.values())
        found = {n: place for n in numbers if (place := edge(results[n])) is not None}
        node = next((node for node, _ in found.values()), None)
        if node is None:
            return
        places = {n: number for n, (_, number) in found.items()}
        inputs = {source: i for i, source in enumerate(node.next_functions)}
        needs = {}
        for name, own in self.of.items():
            tensor = weights[name] if isinstance(name, str) else leaves[name]
            source = torch.autograd.graph.get_gradient_edge(tensor)[:2]
            if source in inputs and own <= places.keys():
                needs[inputs[source]] = [places[n] for n in own]
        unused: list[int] = []

        def before(grads: Sequence[Tensor | None]) -> None:
            unused[:] = [i for i, g in enumerate(grads) if g is None]

        def after(grads: Sequence[Tensor | None], _: object) -> tuple[Tensor | None, ...]:
            gone = {i for i, own in needs.items() if all(p in unused for p in own)}
            return tuple(None if i in gone else g for i, g in enumerate(grads))

        node.register_prehook(before)
        node.register_hook(after)


def uses(module: fx.GraphModule) -> Uses:
    """Of a joint graph."""
    reached: dict[fx.Node, frozenset[int]] = {}
    results: set[int] = set()
    for node in module.graph.nodes:
        if node.op == "output":
            break
        found = [reached[n] for n in node.all_input_nodes]
        reached[node] = frozenset().union(*found)
        if isinstance(node.meta.get("desc"), TangentAOTInput):
            reached[node] = frozenset({_number(node.meta["desc"].output)})
            results |= reached[node]
    return Uses({
        name: reached[node]
        for node, desc in zip(node.args[0], node.meta["desc"], strict=True)
        if isinstance(node, fx.Node) and (name := _name(desc)) is not None
        if reached[node] and reached[node] < results and -1 not in reached[node]
    })  # fmt: skip


def _number(output: object) -> int:
    """Of the result that an output of the graph stands for; -1 where it stands for none."""
    if isinstance(output, IntermediateBaseAOTOutput):
        output = output.base_of
    return output.idx if isinstance(output, PlainAOTOutput) else -1


def _name(output: object) -> str | int | None:
    """What a gradient is of: a parameter's name, an input's number."""
    of = output.grad_of if isinstance(output, GradAOTOutput) else None
    if isinstance(of, ParamAOTInput | BufferAOTInput):
        return of.target.removeprefix("root.")
    return of.idx if isinstance(of, PlainAOTInput) else None
