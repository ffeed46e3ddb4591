"""The type and shape of every value of a graph, at all sizes that its inputs leave open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from rewriter.cost.interpret import Run, run_graphs
from rewriter.cost.meter import Meter

__all__ = ["open_shapes"]

Shape = tuple[str, str, tuple[int | str, ...]]


class _Seen(Run):
    """Notes the value of each node."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.shapes: dict[Node, Shape] = {}

    def evaluated(
        self, root: nn.Module, node: Node, feed: Iterator[Any], env: dict[Node, Any], meter: Meter
    ) -> Any:
        value = super().evaluated(root, node, feed, env, meter)
        if isinstance(value, Tensor):
            sizes = tuple(self.plain(s) for s in value.shape)
            self.shapes[node] = (str(value.dtype).removeprefix("torch."), str(value.device), sizes)
        return value

    def plain(self, size: Any) -> int | str:
        known = self.number(size)
        return known if isinstance(known, int) else str(known)


def open_shapes(
    root: nn.Module,
    graph: Graph,
    inputs: Sequence[Any],
    sizes: Sequence[Sequence[int | str]],
    around: Mapping[str, int],
    training: bool,
) -> dict[Node, Shape]:
    """(dtype, device, sizes) of each tensor; an open size is a formula over names, as text.

    Args:
        root: the module that the graph lives on.
        graph: priced before; not changed.
        inputs: the flat example inputs.
        sizes: of each input; a name where the size is open.
        around: the sizes of the example, by name.
        training: the mode of the graph.

    Raises:
        VerifyError: a node cannot run with open sizes.
    """
    run = _Seen(training, sizes, around)
    run_graphs(run, root, [(root, graph, inputs)])
    return run.shapes
