"""The hands of the engine: a layer put at a site, a block removed, a width cut; in the graphs and
in the module tree."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from rewriter.capture import Capture
from rewriter.edits import Cut
from rewriter.edits.blocks import dead_nodes
from rewriter.errors import PassError
from rewriter.layer import DenseWeight, StandsForWeight
from rewriter.modules.bypass import Bypass
from rewriter.modules.pointwise import Pointwise
from rewriter.modules.tensors import named_tensors, put_tensor
from rewriter.modules.tree import is_hook_dict
from rewriter.recipe.edits import Removed, Resized, replayed
from rewriter.sites import HostedGraph, Site
from rewriter.spellings import is_adapter, operands, source_of

__all__ = ["cut_graphs", "names_of", "put", "remove", "resize"]


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
    old = site.place
    layer.train(root.training if old is None else old.training)
    for node in site.nodes:
        if node.op != "call_module":
            prefix = prefixes[id(node.graph)]
            name = site.fqn.removeprefix(f"{prefix}.") if prefix else site.fqn
            _call_instead(node, name, kept_bias=site.bias_ref is None)
    bare: bool | None = site.transposed if site.weight_ref == site.fqn else None
    if old is not None:
        bare = getattr(old, "stands_for_transposed", None)
    _stand_in(layer, bare, site.fqn)
    if old is not None:
        _take_hooks(old, layer)
        if isinstance(old, Pointwise) and isinstance(layer, Pointwise):
            _take_hooks(old.linear, layer.linear)
        for name in names[id(old)]:
            root.set_submodule(name, layer)
            adapter: Any = root.get_submodule(name.rpartition(".")[0])
            if site.transposed and is_adapter(adapter):
                adapter.fan_in_fan_out = False  # the new layer's weight is [out, in]
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


def _stand_in(layer: nn.Module, transposed: bool | None, fqn: str) -> None:
    """What Python code that reads a bare weight by hand sees in its place.

    Args:
        layer: the new one.
        transposed: how the weight was stored; None where a module is replaced.
        fqn: name of the place.

    Raises:
        PassError: Python code could not call the layer there.
    """
    if transposed is not None and type(layer) is nn.Linear:
        layer.__class__ = DenseWeight
    if isinstance(layer, StandsForWeight):
        layer.stands_for_transposed = transposed
    elif transposed is not None and not hasattr(layer, "__torch_function__"):
        raise PassError(
            f"{fqn} is a weight that Python code reads by hand: only a rewriter.base.Layer or an "
            f"nn.Linear can take its place, not a {type(layer).__name__}"
        )


def cut_graphs(capture: Capture, cuts: Sequence[Cut], names: Sequence[str]) -> None:
    """Takes subgraphs out of all graphs: readers of a result read the source, what is then of no
    use goes.

    Args:
        capture: whose graphs are cut.
        cuts: of these graphs.
        names: of the modules that go.
    """
    graphs = [HostedGraph(r.prefix, mode, g) for r, mode, g in capture.graphs()]
    dead = {hosted.graph: dead_nodes(hosted, cuts, names) for hosted in graphs}
    instead: dict[fx.Node, fx.Node] = {c.result: c.source for c in cuts}
    for result, source in instead.items():
        while source in instead:
            source = instead[source]
        result.replace_all_uses_with(source)
    for graph, nodes in dead.items():
        for node in reversed(nodes):
            graph.erase_node(node)


def remove(root: nn.Module, edit: Removed) -> nn.Module:
    """Takes a module out of the tree; its place, under all of its names, hands on its input."""
    bypass = Bypass().train(root.training)
    for name in edit.names:
        root.set_submodule(name, bypass)
    return bypass


_WIDTHS = {
    "rows": ("out_features", "nf", "num_features"),
    "columns": ("in_features", "nx"),
}
"""Under which names layers hold their widths: of nn.Linear, transformers' Conv1D, BatchNorm."""


def resize(root: nn.Module, edit: Resized) -> list[nn.Module]:
    """Cuts the tensors of layers to the neurons that stay; the modules are the same ones."""
    old = named_tensors(root)
    own = {key: old[key] for key in edit.cuts() if key in old}
    for key, tensor in replayed(own, [edit]).items():
        was = own[key]
        made: Any = tensor
        if isinstance(was, nn.Parameter):
            made = nn.Parameter(tensor, requires_grad=was.requires_grad)
        put_tensor(root, key, made)
    changed: list[nn.Module] = []
    for side, names in (("rows", (*edit.rows, *edit.norms)), ("columns", edit.columns)):
        for name in names:
            module = root.get_submodule(name)
            changed.append(module)
            for width in _WIDTHS[side]:
                if width in vars(module):
                    setattr(module, width, len(edit.kept))
    return changed


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


def _call_instead(node: fx.Node, target: str, kept_bias: bool) -> None:
    """Calls the module at `target` where `node` called a function; drops what fed its weight.

    Args:
        node: the call.
        target: dotted name of the module.
        kept_bias: a bias that the function was given is no part of the module: it is added.
    """
    graph, source = node.graph, source_of(node)
    given = operands(node)
    bias = given[2] if given is not None and kept_bias else None
    feeding = [a for a in node.all_input_nodes if a is not source and a is not bias]
    with graph.inserting_before(node):
        new = graph.create_node("call_module", target, (source,))
        new.meta = copy.copy(node.meta)
        if bias is not None:
            new = graph.call_function(torch.ops.aten.add.Tensor, (new, bias))
            new.meta = copy.copy(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    while feeding:
        dead = feeding.pop()
        if not dead.users:
            feeding += [a for a in dead.all_input_nodes if a not in feeding]
            graph.erase_node(dead)
