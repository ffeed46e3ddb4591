"""Makes nodes of a joint graph, with what their tensors will look like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.node import map_arg

__all__ = ["Builder"]


class Builder:
    """Adds calls to the end of a graph.

    Args:
        graph: where to.
        values: of nodes, among which a fake tensor tells the mode to run operations under.
    """

    def __init__(self, graph: fx.Graph, values: list[Any]) -> None:
        self.graph = graph
        self.mode = detect_fake_mode(values)
        self.backward = False

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call, and the value that it would return."""
        node = self.graph.call_function(target, args, kwargs)
        inputs, named = map_arg((args, kwargs), lambda n: n.meta["val"])
        with torch.no_grad():
            if self.mode is None:
                node.meta["val"] = target(*inputs, **named)
            else:
                with self.mode:
                    node.meta["val"] = target(*inputs, **named)
        self.mark(node)
        return node

    def copy(self, node: fx.Node, arguments: Any) -> fx.Node:
        """A copy of a node of another graph, with other arguments."""
        copied = self.graph.node_copy(node, arguments)
        self.mark(copied)
        return copied

    def mark(self, node: fx.Node) -> None:
        if self.backward:
            node.meta["partitioner_tag"] = "is_backward"
            node.meta.pop("recompute", None)

    def sizes(self, node: fx.Node) -> list[int | fx.Node]:
        """The sizes of a node's tensor: numbers, or nodes where they are symbols."""
        tensor = node.meta["val"]
        assert isinstance(tensor, Tensor)
        return [
            s if isinstance(s, int) else self(torch.ops.aten.sym_size.int, node, i)
            for i, s in enumerate(tensor.shape)
        ]
