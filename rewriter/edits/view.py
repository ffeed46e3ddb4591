"""`View`: a read-only look at a captured model, for a pass that plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Graph, Node

from rewriter.edits.blocks import block
from rewriter.edits.values import Subgraph, Width
from rewriter.edits.widths import width
from rewriter.modules.patterns import Pattern
from rewriter.modules.refusal import Skip
from rewriter.sites import HostedGraph, Site, find_places

__all__ = ["Shape", "View"]

Shape = tuple[str, str, tuple[int | str, ...]]
"""(dtype, device, sizes); a size that may vary is a formula over the names of open sizes."""


@dataclass(frozen=True, eq=False)
class View:
    """The captured model as a plan may read it; nothing here may be changed.

    Args:
        root: the module tree.
        graphs: all that there are, of both modes.
        sites: all sites of the model.
        chosen: the sites of the pass's kinds (with moments, where calibrated) that it may edit.
        shapes: a graph → the shapes of its values at all open sizes; None where not known.
        unsafe: a site → why the engine cannot change it; None where it can.
        typed: whether example inputs gave the values types.
    """

    root: nn.Module
    graphs: tuple[HostedGraph, ...]
    sites: tuple[Site, ...]
    chosen: tuple[Site, ...]
    shapes: Callable[[Graph], Mapping[Node, Shape] | None] = field(repr=False)
    unsafe: Callable[[Site], Skip | None] = field(repr=False)
    typed: bool = True

    def places(self, pattern: Pattern) -> list[Site]:
        """Where the model has a pattern of several operations, each place once; `Site.parts` has
        the site of each step, by its position."""
        return find_places(self.root, self.graphs, pattern)

    def block(self, name: str) -> Subgraph | Skip:
        """The residual block x + f(x) that a module is, ready for `Remove`, or why it is none."""
        return block(self, name)

    def width(self, site: Site) -> Width | Skip:
        """The layers that a `Resize` of a linear site's outputs concerns, or why there is none."""
        return width(self, site)

    def shape(self, node: Node) -> Shape | None:
        """The type of a value at all open sizes; None where it is not known, or no tensor."""
        known = self.shapes(node.graph)
        return None if known is None else known.get(node)

    def producers(self, node: Node) -> list[Node]:
        """The values that a call reads."""
        return list(node.all_input_nodes)

    def consumers(self, node: Node) -> list[Node]:
        """The calls that read a value."""
        return list(node.users)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Every parameter, under all of its names."""
        return dict(self.root.named_parameters(remove_duplicate=False))
