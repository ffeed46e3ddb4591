"""A model, its graphs and its recipe put back where an edit or a rewrite fails."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from torch import fx, nn

from rewriter.capture import Capture
from rewriter.recipe.recipe import Recipe

__all__ = ["fresh_graphs", "restored_on_error", "undone_on_error"]


def fresh_graphs(capture: Capture) -> dict[fx.Node, fx.Node]:
    """Puts a copy in the place of every graph, so that the copies may be changed while the
    originals stay; returns the copy of every node."""
    twins: dict[fx.Node, fx.Node] = {}
    for region in (*capture.regions, *capture.others):
        copies: dict[bool, fx.Graph] = {}
        for mode, graph in region.graphs.items():
            copies[mode] = made = fx.Graph()
            made.output(made.graph_copy(graph, twins))
            old, new = (
                next(n for n in reversed(g.nodes) if n.op == "output") for g in (graph, made)
            )
            new.meta, twins[old] = copy.copy(old.meta), new
        region.graphs = copies
    return twins


@contextlib.contextmanager
def undone_on_error(capture: Capture, recipe: Recipe) -> Iterator[None]:
    """Graphs, module tree and recipe are as they were where anything fails inside; `fresh_graphs`
    must have been called before a graph is changed."""
    graphs = [(region, region.graphs) for region in (*capture.regions, *capture.others)]
    noted = {k: copy.copy(v) for k, v in vars(recipe).items()}
    installed = {k: (v, copy.copy(vars(v)), list(v.chain)) for k, v in recipe.installed.items()}
    try:
        with restored_on_error(capture.root):
            yield
    except BaseException:
        for region, own in graphs:
            region.graphs = own
        vars(recipe).update(noted)
        for place, own_state, chain in installed.values():
            vars(place).update(own_state, chain=chain)
        raise


@contextlib.contextmanager
def restored_on_error(root: nn.Module) -> Iterator[None]:
    """An in-place rewrite that fails leaves the model as it was."""
    saved = [(m, type(m), dict(vars(m))) for m in root.modules()]
    # hooks, parameters, submodules, …: what a module keeps in containers of its own
    inner = [
        (held, copy.copy(held))
        for _, _, own in saved
        for held in own.values()
        if isinstance(held, dict | set)
    ]
    grads = [(p, p.requires_grad) for p in root.parameters()]
    try:
        yield
    except BaseException:
        for module, cls, own in saved:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(own)
        for container, contents in inner:
            container.clear()
            container.update(contents)
        for parameter, flag in grads:
            parameter.requires_grad_(flag)
        raise
