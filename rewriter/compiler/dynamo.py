"""Capture inside torch.compile: the graph that Dynamo hands to a backend, on a module tree.

Dynamo lifts parameters to inputs and names them by where they came from; here they become a tree of
modules again (the live Parameters, not copies), with an `nn.Linear` where one was called, so that
every pass sees the normal form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from rewriter.capture import Capture, Region
from rewriter.compiler.user_code import owner_of, source_name, source_steps
from rewriter.errors import RewriteError
from rewriter.modules.tree import attribute, join
from rewriter.sites import op_name

__all__ = ["Lifted", "capture_dynamo"]


class LiftedModule(nn.Module):
    """The tree of modules that the lifted parameters come from."""


@dataclass
class Lifted:
    """A Dynamo graph in normal form.

    Args:
        capture: its region's leaves are the user's inputs.
        graph: of the only region.
        positions: of the user's inputs among all that Dynamo passes.
        placeholders: of the original graph, in order.
        paths: dotted name of a lifted tensor → its position among all that Dynamo passes.
    """

    capture: Capture
    graph: fx.Graph
    positions: list[int]
    placeholders: list[fx.Node]
    paths: dict[str, int]

    @property
    def root(self) -> nn.Module:
        """The tree of modules that the lifted parameters came from."""
        return self.capture.root

    def user_inputs(self, inputs: Sequence[Any]) -> list[Any]:
        """The user's inputs among all that Dynamo passes."""
        return [inputs[i] for i in self.positions]


def capture_dynamo(
    module: fx.GraphModule, inputs: Sequence[Any], names: Mapping[str, str] | None = None
) -> Lifted:
    """The normal form of a Dynamo graph.

    Args:
        module: as Dynamo passes it to a backend; not changed.
        inputs: as Dynamo passes them; lifted parameters are the live ones.
        names: of the modules that own parameters, by the parameter's source (`Frame.names`);
            others are named by where the code found them.

    Raises:
        RewriteError: the graph calls modules or holds parameters of its own, as none of Dynamo's.
    """
    root = LiftedModule()
    lifted: dict[fx.Node, str] = {}
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node in module.graph.nodes:
        held = attribute(module, str(node.target)) if node.op == "get_attr" else None
        if node.op == "call_module" or isinstance(held, nn.Parameter):
            raise RewriteError(
                f"{node.name} reads {node.target} of the graph's own module: this is no graph of "
                "Dynamo's. Give the module to rewriter.rewrite, or to torch.compile"
            )
    positions, paths = [], {}
    naming = _Naming(names or {})
    for i, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
        path = naming.path(source_name(node))
        if path and isinstance(value, Tensor):
            lifted[node], paths[path] = path, i
        else:
            positions.append(i)
    layers = _layers(module.graph, lifted)
    for node, value in zip(placeholders, inputs, strict=True):
        if node in lifted:
            _register(root, lifted[node], value, layers)
    for node in module.graph.nodes:  # constants and subgraphs that Dynamo keeps on its module
        if node.op == "get_attr":
            setattr(root, node.target, attribute(module, node.target))
    graph = fx.Graph()
    environment: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node in lifted:
            continue
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], lambda n: environment[n]))
            continue
        for source in node.all_input_nodes:
            if source in lifted and source not in environment:
                environment[source] = graph.create_node("get_attr", lifted[source])
        owner = _called(node, lifted, layers)
        if owner is None:
            environment[node] = graph.node_copy(node, lambda n: environment[n])
        else:
            new = graph.create_node("call_module", owner, (environment[node.args[0]],))
            new.meta = dict(node.meta)
            environment[node] = new
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
        if "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    leaves = [inputs[i] for i in positions]
    region = Region("", {False: graph}, {False: None}, None, leaves)
    return Lifted(Capture(root, "dynamo", [region]), graph, positions, placeholders, paths)


class _Naming:
    """Dotted names for lifted tensors, no two the same."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        self.owners: dict[str, str] = {}  # the expression of a module → its name
        self.taken: set[str] = set()

    def path(self, source: str) -> str:
        """`fc.weight` of `L['self']._modules['fc']._parameters['weight']`; "" of other sources."""
        owner, steps = owner_of(source), source_steps(source)
        if not owner:
            return ""
        if owner not in self.owners:
            name = self.names.get(source)
            name = _dotted(steps[:-2]) if name is None else name
            name = re.sub(r'["\\\n]', "_", name)  # which no generated code could say
            while name in self.taken:
                name = f"_{name}"
            self.taken.add(name)
            self.owners[owner] = name
        return join(self.owners[owner], str(steps[-1][1]))


def _dotted(steps: Sequence[tuple[str, Any]]) -> str:
    """`block.0.fc` of `L['self']._modules['block']._modules['0'].fc`."""
    found = []
    # A model called under another name than `self` keeps that name; `fn` is what Dynamo itself
    # calls a module of torch's own classes.
    inside = steps[1:]
    if steps[0][1] == "L" and inside and inside[0][1] in ("self", "fn"):
        inside = inside[1:]
    for kind, name in inside:
        if (kind, name) != ("attr", "_modules"):
            found.append(str(name).replace(".", "_") or "_")
    return ".".join(found)


_Made = Callable[[], nn.Module]
_ROLES = ("weight", "bias")


def _layers(graph: fx.Graph, names: dict[fx.Node, str]) -> dict[str, _Made]:
    """Owners of a weight (and bias) that is only ever used by calls of one linear layer, or of one
    LayerNorm; with what makes a layer without tensors."""
    owners: dict[str, _Made] = {}
    for node in graph.nodes:
        given = _tensors_of(node)
        paths = [names.get(a, "") for a in given]
        split = [p.rpartition(".") for p in paths]
        same = {owner for owner, _, _ in split}
        if len(same) == 1 and "" not in same and [s[2] for s in split] == [*_ROLES][: len(split)]:
            alike = op_name(node), node.args[1:], node.kwargs
            if all((op_name(u), u.args[1:], u.kwargs) == alike for a in given for u in a.users):
                owners[next(iter(same))] = _maker(node, bias=len(given) > 1)
    return owners


def _tensors_of(node: fx.Node) -> list[fx.Node]:
    """Weight and bias that a linear layer or a LayerNorm is called with, as a function; [] of
    anything else."""
    kind = op_name(node) if node.op == "call_function" else ""
    if kind not in ("linear", "layer_norm"):
        return []
    if kind == "layer_norm" and any(isinstance(v, fx.Node) for v in _norm_of(node)):
        return []  # an ε or a size that is an input of the graph
    first = 1 if kind == "linear" else 2
    given = dict(zip(_ROLES, node.args[first:], strict=False))
    given |= {k: v for k, v in node.kwargs.items() if k in _ROLES}
    return [a for role in _ROLES if isinstance(a := given.get(role), fx.Node)]


def _maker(node: fx.Node, bias: bool) -> _Made:
    if op_name(node) == "linear":
        return lambda: nn.Linear(1, 1, bias=bias, device="meta")
    eps, *sizes = _norm_of(node)
    return lambda: nn.LayerNorm(sizes, eps=eps, bias=bias, device="meta")


def _norm_of(node: fx.Node) -> list[Any]:
    """ε and the sizes of a LayerNorm."""
    eps: Any = node.args[4] if len(node.args) > 4 else node.kwargs.get("eps", 1e-5)
    shape: Any = node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"]
    return [eps, *shape]


def _called(node: fx.Node, names: dict[fx.Node, str], layers: dict[str, _Made]) -> str | None:
    given = _tensors_of(node)
    owner = names.get(given[0], "").rpartition(".")[0] if given else ""
    return owner if owner in layers else None


def _register(root: nn.Module, path: str, value: Tensor, layers: dict[str, _Made]) -> None:
    module = root
    *owners, name = path.split(".")
    for depth, part in enumerate(owners):
        if part not in module._modules:
            fqn = ".".join(owners[: depth + 1])
            module.add_module(part, layers[fqn]() if fqn in layers else nn.Module())
        module = module.get_submodule(part)
    if isinstance(value, nn.Parameter):
        module._parameters[name] = value
    else:
        module.register_buffer(name, value)
    if isinstance(module, nn.Linear) and name == "weight":
        module.out_features, module.in_features = value.shape
