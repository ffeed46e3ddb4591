"""Layers by themselves, as a lowered model runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.lowering.lowered import derived
from rewriter.lowering.planning import pays, places
from rewriter.lowering.rules import Rule

__all__ = ["alone"]


def alone(
    layer: nn.Module, x: Tensor, rules: Sequence[Rule], count: int = 1
) -> Callable[[Tensor], Any]:
    """What an eval graph runs for layers that read one value, where no gradient is wanted and none
    of their other neighbours is fused with them: their fused op with what that derives of the
    weights as they are now, or else their forward, one after another.

    Args:
        layer: in eval mode.
        x: an input of the sizes, dtype and device that are asked about; the layer runs on it once
            where there are rules.
        rules: of the model; none for the forward.
        count: how many layers like this one read the value.

    Raises:
        VerifyError: a rule's own function fails.
    """
    if not rules:
        return _in_turn([layer.forward] * count)
    root, graph = nn.Module().eval(), fx.Graph()
    given = graph.placeholder("x")
    given.meta["val"] = x
    with torch.no_grad():
        result = layer.forward(x)
    for i in range(count):
        root.add_module(f"layer{i}", layer)
        graph.call_module(f"layer{i}", (given,)).meta["val"] = result
    read = [
        graph.call_function(torch.neg, (n,)) for n in given.users
    ]  # what a model returns is no piece of one
    graph.output(tuple(read))
    applications = places(graph, root, rules)[0]
    found = [a for a in applications if pays(a, lambda node: node.meta["val"])]
    taken = sum(len(a.place.match.nodes) for a in found)
    return _in_turn([*(a.ready(derived(a)) for a in found), *[layer.forward] * (count - taken)])


def _in_turn(functions: Sequence[Callable[[Tensor], Any]]) -> Callable[[Tensor], Any]:
    if len(functions) == 1:
        return functions[0]

    def run(x: Tensor) -> None:
        for function in functions:
            function(x)

    return run
