"""Hidden widths: which layers have one entry per output of a linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils import parametrize

from rewriter.edits.values import Width
from rewriter.modules.refusal import Skip
from rewriter.modules.tree import attribute, has_hooks, join
from rewriter.sites import LINEAR, HostedGraph, Site
from rewriter.spellings import (
    ELEMENTWISE,
    MIXING,
    PAIRWISE,
    called_activation,
    op_name,
    operands,
    spelled,
)

__all__ = ["width"]


class _Whole(Protocol):
    """The attributes of a `View` that this file reads."""

    @property
    def root(self) -> nn.Module: ...
    @property
    def graphs(self) -> tuple[HostedGraph, ...]: ...
    @property
    def sites(self) -> tuple[Site, ...]: ...
    def unsafe(self, site: Site) -> Skip | None: ...


def width(view: _Whole, site: Site) -> Width | Skip:
    """All layers with one entry per output of `site`, over all graphs, or why they cannot change.

    From the layer forward over operations that work on every neuron alone, to the linear layers
    that read them; where two such values meet (a gate), back to the layer that makes the other.
    """
    # with its calls in all graphs: a part of another site has only one
    known = next((s for s in view.sites if s.kind == LINEAR and s.fqn == site.fqn), None)
    if known is None or known.weight_ref is None:
        return Skip("{} is no linear layer", site.fqn)
    if known.channels is not None:
        return Skip(
            "{} is a {} convolution, whose channels other layers read", site.fqn, known.channels
        )
    search = _Search(view, known.out_features)
    reason = search.run(known)
    if reason is not None:
        return reason
    rows, columns = tuple(search.rows.values()), tuple(search.columns.values())
    if not columns:
        return Skip("no layer reads its neurons")
    both = {s.fqn for s in rows} & {s.fqn for s in columns}
    if both:
        return Skip("{} makes the neurons that it reads", ", ".join(sorted(both)))
    found = Width(site.out_features, rows, columns, tuple(search.norms))
    return _unsafe(view, found) or found


@dataclass
class _Search:
    """The layers found so far, and the values still to follow."""

    view: _Whole
    size: int
    rows: dict[str, Site] = field(default_factory=dict)
    columns: dict[str, Site] = field(default_factory=dict)
    norms: dict[str, None] = field(default_factory=dict)
    wide: dict[Node, None] = field(default_factory=dict)
    todo: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        plain = [s for s in self.view.sites if s.kind == LINEAR and s.channels is None]
        self.at: Mapping[Node, Site] = {n: s for s in plain for n in s.nodes}
        self.prefixes = {g.graph: g.prefix for g in self.view.graphs}

    def run(self, site: Site) -> Skip | None:
        reason = self.make(site)
        while self.todo and reason is None:
            node = self.todo.pop()
            for user in node.users:
                reason = reason or self.reader(node, user)
        return reason or self.unmet()

    def make(self, site: Site) -> Skip | None:
        """Notes a layer that makes the neurons, and follows all of its calls; why it cannot be."""
        if site.module is None or not isinstance(site.weight, Tensor):
            return Skip("{} is called as a function", site.fqn)
        if site.out_features != self.size:
            return Skip("{} makes {} values, not {}", site.fqn, site.out_features, self.size)
        if not site.nodes:
            return Skip("not called with these example_inputs")
        if site.fqn not in self.rows:
            self.rows[site.fqn] = site
            for node in site.nodes:
                self.follow(node)
        return None

    def follow(self, node: Node) -> None:
        if node not in self.wide:
            self.wide[node] = None
            self.todo.append(node)

    def owner(self, node: Node) -> nn.Module:
        return self.view.root.get_submodule(self.prefixes[node.graph])

    def reader(self, node: Node, user: Node) -> Skip | None:
        """Goes on from a value that has the neurons to one that reads it."""
        if user in self.at:
            return self.read_by(node, user)
        if user.op == "output":
            return Skip("its neurons are a result of the graph")
        owner = self.owner(user)
        name = spelled(user, owner)
        if called_activation(user, owner) or name in ELEMENTWISE or _drops(user, owner):
            self.follow(user)
            return None
        if user.op == "call_module" and name == "batch_norm" and self.dims(node) == 2:
            self.norms[join(self.prefixes[user.graph], str(user.target))] = None
            self.follow(user)
            return None
        if name in PAIRWISE and user.op != "call_module":
            return self.pair(user)
        if name in MIXING:
            return Skip("{} mixes its neurons", name)
        return Skip("its neurons go into {}, which fixes how many there are", name)

    def read_by(self, node: Node, user: Node) -> Skip | None:
        site = self.at[user]
        given = operands(user)
        if site.module is None or (given is not None and given[0] is not node):
            return Skip("{} is called as a function", site.fqn)
        if site.in_features != self.size:
            return Skip("{} reads {} values, not {}", site.fqn, site.in_features, self.size)
        self.columns[site.fqn] = site
        return None

    def pair(self, user: Node) -> Skip | None:
        """Two operands, neuron by neuron; another operand must be made by layers as well."""
        for other in (a for a in (*user.args, *user.kwargs.values()) if isinstance(a, Node)):
            reason = self.back(other)
            if reason is not None:
                return reason
        self.follow(user)
        return None

    def back(self, node: Node) -> Skip | None:
        """Back from an operand to the layer that makes it."""
        if node in self.wide:
            return None
        value = node.meta.get("val")
        if isinstance(value, Tensor) and (not value.dim() or value.shape[-1] == 1):
            return None
        site = self.at.get(node)
        if site is not None:
            return self.make(site)
        owner, source = self.owner(node), node.args[0] if node.args else None
        plain = called_activation(node, owner) or spelled(node, owner) in ELEMENTWISE
        if isinstance(source, Node) and (plain or _drops(node, owner)):
            return self.back(source)
        return Skip("its neurons meet {}, which no linear layer makes", node.name)

    def dims(self, node: Node) -> int:
        value = node.meta.get("val")
        return value.dim() if isinstance(value, Tensor) else 0

    def unmet(self) -> Skip | None:
        """Why layers that read the neurons cannot be cut: a call of one reads something else."""
        for site in self.columns.values():
            for node in site.nodes:
                if node.args[0] not in self.wide:
                    return Skip("{} reads other values as well", site.fqn)
        for graph, prefix in self.prefixes.items():
            for node in graph.nodes:
                called = node.op == "call_module" and join(prefix, str(node.target)) in self.norms
                if called and node.args[0] not in self.wide:
                    return Skip("{} reads other values as well", node.target)
        return None


def _drops(node: Node, owner: nn.Module) -> bool:
    return op_name(node, owner).rstrip("_") in ("dropout", "feature_alpha_dropout", "alpha_dropout")


def _unsafe(view: _Whole, found: Width) -> Skip | None:
    """Hooks, ties, and what else keeps the engine from a layer."""
    names: dict[int, list[str]] = {}
    for name, parameter in view.root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    layers = [s.fqn for s in (*found.rows, *found.columns)] + list(found.norms)
    read = {
        id(attribute(view.root.get_submodule(g.prefix), str(n.target)))
        for g in view.graphs
        for n in g.graph.nodes
        if n.op == "get_attr"
    }
    for site in (*found.rows, *found.columns):
        reason = view.unsafe(site)
        if reason is not None:
            return Skip("{}: {}", site.fqn, reason.reason)
    for fqn in layers:
        module: Any = view.root.get_submodule(fqn)
        if any(has_hooks(m) for m in module.modules()):
            return Skip("{} has hooks, which would see other sizes", fqn)
        if parametrize.is_parametrized(module):
            return Skip("{}: its parameters are parametrized", fqn)
        for parameter in module.parameters(recurse=False):
            tied = [n for n in names[id(parameter)] if not n.startswith(f"{fqn}.")]
            if tied or id(parameter) in read:
                other = tied[0] if tied else "code that reads it"
                return Skip("the weight of {} is tied to {}", fqn, other)
    return None
