"""The hands of the engine: a layer put at a site, in the graphs and in the module tree."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import fx, nn

from rewriter.capture import Capture
from rewriter.errors import PassError
from rewriter.layer import Layer
from rewriter.modules.tree import is_hook_dict
from rewriter.sites import Site
from rewriter.spellings import source_of

__all__ = ["names_of", "put"]


def names_of(root: nn.Module) -> dict[int, list[str]]:
    """id of a module → all the names it has."""
    names: dict[int, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def put(capture: Capture, site: Site, layer: nn.Module, names: Mapping[int, list[str]]) -> None:
    """Puts a layer at a site; `names` are those that each module had before the pass."""
    root = capture.root
    prefixes = {id(g): r.prefix for r, _, g in capture.graphs()}
    layer.train(root.training if site.module is None else site.module.training)
    old = site.module
    for node in site.nodes:
        if node.op != "call_module":
            prefix = prefixes[id(node.graph)]
            _call_instead(node, site.fqn.removeprefix(f"{prefix}.") if prefix else site.fqn)
    if isinstance(layer, Layer):
        # what Python code that reads the weight by hand sees in its place
        stood = getattr(old, "stands_for_transposed", False)
        layer.stands_for_transposed = stood if old is not None else site.transposed
    if old is not None:
        _take_hooks(old, layer)
        for name in names[id(old)]:
            root.set_submodule(name, layer)
        return
    owner, _, name = site.fqn.rpartition(".")
    holder = root.get_submodule(owner)
    if site.weight_ref == site.fqn:
        # The layer takes the weight's place, also for the Python code that reads it; a bias
        # stays where that code finds it, tied to the layer's.
        del holder._parameters[name]
    if hasattr(holder, name):
        raise PassError(f"{site.fqn} exists already: cannot install a layer there")
    holder.add_module(name, layer)


def _take_hooks(old: nn.Module, new: nn.Module) -> None:
    """The hooks of a layer go to the one in its place, in the dicts that their handles know."""
    if old is new:
        return
    for name, hooks in vars(old).items():
        if not is_hook_dict(name) or not hooks:
            continue
        own = getattr(new, name, None)
        if own:
            own.update(hooks)
        else:
            setattr(new, name, hooks)
    if old._backward_hooks:
        new._is_full_backward_hook = old._is_full_backward_hook


def _call_instead(node: fx.Node, target: str) -> None:
    """Calls the module at `target` where `node` called a function; drops what fed its weight."""
    graph, source = node.graph, source_of(node)
    feeding = [a for a in node.all_input_nodes if a is not source]
    with graph.inserting_before(node):
        new = graph.create_node("call_module", target, (source,))
    new.meta = copy.copy(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    while feeding:
        dead = feeding.pop()
        if not dead.users:
            feeding += [a for a in dead.all_input_nodes if a not in feeding]
            graph.erase_node(dead)
