"""Sites: the places in a graph that a pass may look at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from rewriter.modules.moments import Moments, Sample, Sensitivity
from rewriter.modules.patterns import Match, Pattern, find
from rewriter.modules.pointwise import Channels, Pointwise, inner
from rewriter.modules.tree import attribute, join, submodule
from rewriter.spellings import (
    ACTIVATION,
    CONV,
    EMBEDDING,
    LINEAR,
    MLP,
    Kind,
    added_to,
    channels_of,
    convolution,
    is_activation,
    is_added,
    is_leaf,
    is_transparent,
    keeps_places,
    kind_name,
    kind_of,
    op_name,
    operands,
    operation_of,
    settled_activation,
    source_of,
    spelled,
    swaps,
    user_line,
)

__all__ = [
    "ACTIVATION",
    "CONV",
    "EMBEDDING",
    "LINEAR",
    "MLP",
    "HostedGraph",
    "Kind",
    "Site",
    "find_matches",
    "find_places",
    "find_sites",
    "is_leaf",
    "kind_name",
    "kind_of",
    "is_conv",
    "op_name",
    "tensor_refs",
    "user_line",
]

Graphs = Iterable[tuple[str, Graph]]
"""Pairs (dotted name of the module the graph lives on, graph)."""


@dataclass(frozen=True, eq=False)
class HostedGraph:
    """A graph and where it lives: of which module (dotted name), in which mode."""

    prefix: str
    training: bool
    graph: Graph


@dataclass(frozen=True, eq=False)
class Site:
    """One place in the model that computes `kind`, however many graphs or calls share it.

    Nothing is cached: every property is read from the module tree when it is asked for.

    Args:
        kind: LINEAR, CONV, EMBEDDING, ACTIVATION, MLP, or the class of one of our layers.
        fqn: the module's dotted name; for a functional call, the name of its weight.
        root: the module tree.
        nodes: the calls, over all graphs.
        weight_ref, bias_ref: dotted names of the tensors (LINEAR, CONV, EMBEDDING).
        transposed: the weight is stored [in, out] (transformers' Conv1D, `x @ W`).
        parts: the sites an MLP is made of: `up`, `down`, and where they exist `gate` and
            `activation`. The MLP's own tensors are those of `down`.
        calls: how many of the nodes, from the first on, one forward runs; the rest are the same
            calls in the other mode's graphs.
        moments: of its inputs over the calibration batches, for a pass that calibrates.
        sample: of its inputs over the calibration batches, for a pass that needs calibration.
        sensitivity: of the loss to its inputs over these, for a pass that asks for it.
        readers: of an activation: the linear layers that sum over what it gives, in the order of
            its last dimension; empty where anything else reads it.
        channels: of a 1×1 convolution, which is a linear layer over channels: how it reads them.
            What a pass proposes is a layer over rows, as everywhere.
    """

    kind: Kind
    fqn: str
    root: nn.Module
    nodes: tuple[Node, ...] = ()
    weight_ref: str | None = None
    bias_ref: str | None = None
    transposed: bool = False
    parts: Mapping[str, Site] = field(default_factory=dict)
    calls: int = 0
    moments: Moments | None = None
    sample: Sample | None = None
    sensitivity: Sensitivity | None = None
    readers: tuple[Site, ...] = ()
    channels: Channels | None = None

    @classmethod
    def of(cls, module: nn.Module, fqn: str = "layer", kind: Kind | None = None) -> Site:
        """A site around one free-standing module; for tests and for trying a pass by hand."""
        root = nn.Module()
        root.add_module(fqn, module)
        channels = channels_of(module)
        if kind is None:
            kind = kind_of(module) if is_leaf(module) and channels is None else None
        weight, bias = tensor_refs(module, fqn)
        kind = kind or LINEAR
        channels = channels if kind == LINEAR else None
        return cls(kind, fqn, root, weight_ref=weight, bias_ref=bias, channels=channels)

    @property
    def module(self) -> nn.Module | None:
        """The module that computes `kind`: the one at `fqn`, or in the place of a 1×1 convolution
        the layer over rows; None where the user's code calls a function."""
        place = self.place
        return None if place is None else inner(place)

    @property
    def place(self) -> nn.Module | None:
        """The module at `fqn`, which is what the model calls."""
        return submodule(self.root, self.fqn)

    @property
    def operation(self) -> str:
        """What the site computes, under the one name of it: `gelu` of a module and of a
        function."""
        module = self.module
        return spelled(self.nodes[0]) if module is None else operation_of(module)

    @property
    def activation(self) -> str | None:
        """Of an activation, its name with its options settled: `gelu` (exact), `gelu_tanh`; None of
        one with other options."""
        node = self.nodes[0] if self.nodes else None
        return settled_activation(self.operation, self.module, node)

    def activated(self, x: Tensor) -> Tensor:
        """What an activation makes of x, with the options that the model gives it;
        x itself, where the model works in place."""
        module = self.module
        if module is not None:
            found: Tensor = module.forward(x)
            return found
        node = self.nodes[0]
        function: Any = node.target
        if node.op == "call_method":
            function = getattr(Tensor, str(node.target))
        made: Tensor = function(x, *node.args[1:], **node.kwargs)
        return made

    def fitted(self, layer: nn.Module) -> nn.Module:
        """A layer as the model calls it in this place."""
        return layer if self.channels is None else Pointwise(layer, self.channels)

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], a view of the stored weight (the Parameter itself where
        it is stored that way round). Of a convolution that is no linear layer, and of an embedding,
        as it is stored."""
        if self.weight_ref is None:
            raise AttributeError(f"site {self.fqn!r} ({kind_name(self.kind)}) has no weight")
        weight = _tensor(self.root, self.weight_ref)
        if self.channels is not None:
            return weight.flatten(1) if weight.dim() > 2 else weight
        return weight.t() if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """[out_features] or None."""
        return None if self.bias_ref is None else _tensor(self.root, self.bias_ref)

    @property
    def in_features(self) -> int:
        """Size of the input's last dimension; of a convolution, its input channels; of an
        embedding, its rows.

        Raises:
            AttributeError: the site has none (an activation takes any size).
        """
        return self._features(1, "in_features", "in_channels", "num_embeddings")

    @property
    def out_features(self) -> int:
        """As `in_features`, of the output."""
        return self._features(0, "out_features", "out_channels", "embedding_dim")

    @property
    def tokens(self) -> int | None:
        """Rows that the example inputs put through all calls of the site in one forward (of a
        convolution: output positions); None without shapes."""
        rows = 0
        for node in self.nodes[: self.calls]:
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or not value.dim():
                return None
            by_channel = self.kind == CONV or self.channels is not None
            width = self.out_features if by_channel else int(value.shape[-1])
            rows += int(value.numel()) // max(width, 1)
        return rows if self.calls else None

    @property
    def where(self) -> str:
        """`file:line` of the user's code that calls the site; "" where unknown."""
        return next((w for w in map(user_line, self.nodes) if w), "")

    def _features(self, dim: int, linear: str, conv: str, table: str) -> int:
        own = {CONV: conv, EMBEDDING: table}.get(str(self.kind))
        if self.weight_ref is not None and own is None:
            return self.weight.shape[dim]
        size = getattr(self.module, own or linear, None)
        if not isinstance(size, int):
            raise AttributeError(f"site {self.fqn!r} ({kind_name(self.kind)}) has no {linear}")
        return size


def tensor_refs(module: nn.Module, fqn: str) -> tuple[str | None, str | None]:
    """Dotted names of weight and bias of the layer that computes the linear map of a module; None
    for those that are no parameters of it."""
    within = f"{fqn}.linear" if isinstance(module, Pointwise) else fqn
    named = dict(inner(module).named_parameters(recurse=False))
    weight, bias = (f"{within}.{n}" if n in named else None for n in ("weight", "bias"))
    return weight, bias


def _tensor(root: nn.Module, fqn: str) -> Tensor:
    tensor = attribute(root, fqn)
    assert isinstance(tensor, Tensor), fqn
    return tensor


def find_sites(root: nn.Module, graphs: Graphs, other_mode: Graphs = ()) -> list[Site]:
    """All sites of a module tree, each once, in the order of their first call.

    Args:
        root: the module tree.
        graphs: that one forward runs.
        other_mode: that it runs in the other mode (train instead of eval).
    """
    found: dict[tuple[Any, ...], Site] = {}
    nodes: dict[tuple[Any, ...], list[Node]] = {}
    calls: dict[tuple[Any, ...], int] = {}
    readers: dict[tuple[Any, ...], list[tuple[Site, ...]]] = {}
    names = {id(module): name for name, module in root.named_modules()}
    for first, some in ((True, graphs), (False, other_mode)):
        for prefix, graph in some:
            for node, site in _Finder(root, prefix, graph, names).sites():
                key = (site.kind, site.fqn, site.transposed, site.bias_ref, site.channels)
                found.setdefault(key, site)
                nodes.setdefault(key, []).append(node)
                readers.setdefault(key, []).append(site.readers)
                calls[key] = calls.get(key, 0) + first
    return [
        replace(
            site,
            nodes=tuple(nodes[key]),
            calls=calls[key] or len(nodes[key]),
            readers=_of_all_calls(readers[key]),
        )
        for key, site in found.items()
    ]


def _of_all_calls(readers: Iterable[tuple[Site, ...]]) -> tuple[Site, ...]:
    """Each reader once; none where one of the calls has none."""
    found = list(readers)
    return tuple({s.fqn: s for own in found for s in own}.values()) if all(found) else ()


def find_matches(root: nn.Module, graph: Graph, pattern: Pattern) -> list[Match]:
    """Where a graph on `root` has a pattern of several operations, in the graph's order."""

    def source(node: Node) -> Node | None:
        value = source_of(node) if node.op.startswith("call_") else None
        return value if isinstance(value, Node) else None

    def added(node: Node, value: Node) -> Node | None:
        return added_to(node, value, root)

    return list(find(pattern, graph, lambda node: spelled(node, root), source, added))


def find_places(root: nn.Module, graphs: Iterable[HostedGraph], pattern: Pattern) -> list[Site]:
    """Where a model has a chain of operations, each place once however many graphs have it.

    The place is named like the last step that is a site, and its tensors are that step's; `parts`
    has the sites of all steps under their positions ("0", "1", …), a fan's in the graph's order.
    """
    names = {id(module): name for name, module in root.named_modules()}
    found: dict[tuple[str, ...], Site] = {}
    for hosted in graphs:
        at = _Finder(root, hosted.prefix, hosted.graph, names).at
        for match in find_matches(root.get_submodule(hosted.prefix), hosted.graph, pattern):
            parts = {str(i): at[n] for i, n in enumerate(match.nodes) if n in at}
            if parts:
                last, key = list(parts.values())[-1], tuple(s.fqn for s in parts.values())
                known = found.get(key)
                nodes = match.nodes[-1:] if known is None else known.nodes + match.nodes[-1:]
                calls = (0 if known is None else known.calls) + (not hosted.training)
                found[key] = replace(last, kind=str(pattern), nodes=nodes, parts=parts, calls=calls)
    return list(found.values())


class _Finder:
    """The sites of one graph.

    Args:
        root: the module tree.
        prefix: dotted name of the module the graph lives on.
        graph: the graph.
        names: the one name of each module that sites use, by identity.
    """

    def __init__(
        self, root: nn.Module, prefix: str, graph: Graph, names: Mapping[int, str]
    ) -> None:
        self.root, self.prefix, self.names = root, prefix, names
        self.owner = root.get_submodule(prefix)
        self.counts: dict[tuple[str, str], int] = {}
        self.at: dict[Node, Site] = {}
        for node in graph.nodes:
            site = self._site(node)
            if site is not None:
                self.at[node] = site

    def sites(self) -> Iterable[tuple[Node, Site]]:
        for node, site in self.at.items():
            yield node, replace(site, readers=self._readers(node, site))
            if site.channels is not None and site.kind == LINEAR and is_conv(site.place):
                yield node, replace(site, kind=CONV, channels=None)  # which it is as well
            if _is_linear(site):
                parts = self._mlp_parts(node)
                if parts:
                    yield node, replace(site, kind=MLP, parts={**parts, "down": site})

    def _site(self, node: Node) -> Site | None:
        if node.op == "call_module":
            return self._module(node)
        if is_activation(node):
            return Site(ACTIVATION, self._activation_name(node), self.root, (node,))
        return self._functional_linear(node) or self._functional_conv(node)

    def _module(self, node: Node) -> Site | None:
        module = self.owner.get_submodule(str(node.target))
        kind = kind_of(module) if is_leaf(module) else None
        if kind is None:
            return None
        fqn, channels = self.names[id(module)], channels_of(module)
        if kind == CONV and channels is not None:
            kind = LINEAR
        refs = tensor_refs(module, fqn) if kind in (LINEAR, CONV, EMBEDDING) else (None, None)
        plain = channels is not None or type(module).forward is nn.Linear.forward
        transposed = kind == LINEAR and not plain
        return Site(kind, fqn, self.root, (node,), *refs, transposed, channels=channels)

    def _activation_name(self, node: Node) -> str:
        """A free name in the module that calls the function, e.g. `mlp.relu_0`."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        inside = join(self.prefix, re.sub(r"@\d+", "", stack[-1][0]) if stack else "")
        while submodule(self.root, inside) is None:
            inside = inside.rpartition(".")[0]
        holder, name = self.root.get_submodule(inside), op_name(node).rstrip("_")
        count = self.counts.get((inside, name), 0)
        while hasattr(holder, f"{name}_{count}"):
            count += 1
        self.counts[inside, name] = count + 1
        return join(inside, f"{name}_{count}")

    def _functional_linear(self, node: Node) -> Site | None:
        """A linear map written as a function: weight and bias must be parameters, the weight read
        as it is or transposed."""
        given = operands(node)
        if given is None:
            return None
        _, weight, bias = given
        transposed = op_name(node) != "linear"
        while isinstance(weight, Node) and weight.op != "get_attr":
            swapped = swaps(weight)
            if swapped is None:
                return None
            transposed ^= swapped
            weight = weight.args[0]
        if not isinstance(weight, Node) or not self._is_parameter(weight, 2):
            return None
        fqn = join(self.prefix, str(weight.target))
        bias_ref = None
        if isinstance(bias, Node) and not self._is_parameter(bias, 1):
            if not is_added(bias):
                return None  # else it is made on the fly, and stays an addition
        elif bias is not None:
            if not isinstance(bias, Node):
                return None
            bias_ref = join(self.prefix, str(bias.target))
            if _tensor(self.root, bias_ref).numel() != _tensor(self.root, fqn).shape[transposed]:
                return None
        site = Site(LINEAR, fqn, self.root, (node,), fqn, bias_ref, transposed)
        holder, _, last = fqn.rpartition(".")
        module = self.root.get_submodule(holder)
        if last == "weight" and is_leaf(module) and kind_of(module) == LINEAR:
            # an nn.Linear whose weight the user's code reads by hand (nn.MultiheadAttention)
            if site.bias is not module.bias:
                return None
            name = self.names[id(module)]
            bias_ref = None if bias_ref is None else f"{name}.bias"
            return replace(site, fqn=name, weight_ref=f"{name}.weight", bias_ref=bias_ref)
        return site

    def _functional_conv(self, node: Node) -> Site | None:
        """A 1×1 convolution written as a function, of parameters read as they are."""
        given = convolution(node)
        if given is None:
            return None
        _, weight, bias, options = given
        tensor = self._read(weight)
        if not isinstance(tensor, nn.Parameter) or not (
            bias is None or self._is_parameter(bias, 1)
        ):
            return None
        channels = Channels.of(tensor, *options)
        if channels is None:
            return None
        fqn = join(self.prefix, str(weight.target))
        bias_ref = None if bias is None else join(self.prefix, str(bias.target))
        holder, _, last = fqn.rpartition(".")
        if last == "weight" and is_leaf(self.root.get_submodule(holder)):
            return None  # the module's own convolution may be another one
        return Site(LINEAR, fqn, self.root, (node,), fqn, bias_ref, channels=channels)

    def _read(self, node: Any) -> Any:
        """What a node reads of the module tree; None where it computes."""
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        return _tensor(self.root, join(self.prefix, str(node.target)))

    def _is_parameter(self, node: Any, dims: int) -> bool:
        tensor = self._read(node)
        return isinstance(tensor, nn.Parameter) and tensor.dim() == dims

    def _readers(self, node: Node, site: Site) -> tuple[Site, ...]:
        """The linear layers that an activation's entries reach, multiplied by other values at most;
        empty where anything else reads them, or they change places."""
        found: dict[str, Site] = {}
        waiting = [node] if site.kind == ACTIVATION else []
        while waiting:
            value = waiting.pop()
            for user in value.users:
                reader = self.at.get(user)
                if reader is not None and _is_linear(reader) and source_of(user) is value:
                    if reader.channels is not None:
                        return ()
                    found[reader.fqn] = reader
                elif keeps_places(user, self.owner):
                    waiting.append(user)
                elif op_name(user, self.owner) not in ("size", "sym_size"):
                    return ()
        return tuple(found.values())

    def _mlp_parts(self, down: Node) -> dict[str, Site]:
        """The sites that feed `down`: linear → activation, or activation(gate) · up."""
        source = self._through(source_of(down))
        if source is None:
            return {}
        if op_name(source, self.owner) in ("mul", "mul_"):
            sides = [self._branch(a) for a in source.args[:2]]
            gate = next((s for s in sides if len(s) == 2), None)
            other = next((s for s in sides if s is not gate), None)
            if gate is None or other is None or "up" not in other:
                return {}
            parts = {"gate": gate["up"], "activation": gate["activation"], "up": other["up"]}
        else:
            parts = self._branch(source)
        rows = [s for s in (self.at[down], *parts.values()) if s.kind != ACTIVATION]
        alike = len({s.channels and s.channels.spatial for s in rows}) == 1
        return parts if len(parts) > 1 and alike else {}

    def _branch(self, value: Any) -> dict[str, Site]:
        """`up` and, where there is one, the `activation` after it."""
        parts: dict[str, Site] = {}
        node = self._through(value)
        site = None if node is None else self.at.get(node)
        if node is not None and site is not None and site.kind == ACTIVATION:
            parts["activation"] = site
            node = self._through(source_of(node))
            site = None if node is None else self.at.get(node)
        if site is not None and _is_linear(site):
            parts["up"] = site
        return parts

    def _through(self, value: Any) -> Node | None:
        """Back over ops that only move values (views, casts, dropout) to the one that made them."""
        while isinstance(value, Node) and is_transparent(value, self.owner):
            value = source_of(value)
        return value if isinstance(value, Node) else None


def is_conv(module: nn.Module | None) -> bool:
    """Whether a module is a convolution."""
    return module is not None and is_leaf(module) and kind_of(module) == CONV


def _is_linear(site: Site) -> bool:
    return site.kind == LINEAR or isinstance(site.kind, type)
