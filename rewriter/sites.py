"""Sites: the places in a graph that a pass may look at, and the one table of their spellings."""

from __future__ import annotations

import operator
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from rewriter.base import Layer

__all__ = [
    "ACTIVATION",
    "CONV",
    "LINEAR",
    "MLP",
    "Kind",
    "Site",
    "find_sites",
    "is_leaf",
    "op_name",
    "user_line",
]

LINEAR = "linear"
CONV = "conv"
ACTIVATION = "activation"
MLP = "mlp"

Kind = str | type[Layer]
"""One of the four names above, or the class of a layer of ours."""

# The table of spellings. Modules are told by their forward: a subclass with a forward of its own
# is not the layer it descends from. Classes of other packages are told by name, so that they need
# not be imported.

_ACTIVATION_CLASSES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.LogSigmoid,
)  # fmt: skip
_CONV_CLASSES: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_OTHER_LEAVES: tuple[type[nn.Module], ...] = (
    nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d,
    nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.Dropout,
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_KIND_OF_FORWARD: dict[Any, str | None] = {
    **{cls.forward: None for cls in _OTHER_LEAVES},
    **{cls.forward: ACTIVATION for cls in _ACTIVATION_CLASSES},
    **{cls.forward: CONV for cls in _CONV_CLASSES},
    nn.Linear.forward: LINEAR,
}
_TRANSPOSED_LINEAR = "transformers.pytorch_utils.Conv1D"
_FOREIGN_ACTIVATIONS = "transformers.activations."

_LINEAR_OPS = frozenset({"linear", "addmm", "mm", "matmul"})
_ACTIVATION_OPS = frozenset({
    "relu", "relu_", "relu6", "gelu", "silu", "silu_", "mish", "elu", "celu", "selu", "leaky_relu",
    "hardswish", "hardsigmoid", "hardtanh", "softplus", "tanh", "sigmoid",
})  # fmt: skip
_TRANSPOSES = frozenset({"t", "permute", "transpose", "numpy_T", "T", "mT"})
_TRANSPARENT = frozenset({
    "view", "reshape", "_unsafe_view", "contiguous", "to", "type_as", "clone", "dropout", "float",
    "_to_copy", "getitem", "chunk", "split", "split_with_sizes", "slice", "flatten", "unflatten",
})  # fmt: skip
"""Ops between the two linears of an MLP that only move or select values."""
_SAME_OP = {"truediv": "div", "__and__": "and", "and_": "and", "neg_": "neg", "numpy_T": "t"}


@dataclass(frozen=True, eq=False)
class Site:
    """One place in the model that computes `kind`, however many graphs or calls share it.

    Nothing is cached: every property is read from the module tree when it is asked for.

    Args:
        kind: LINEAR, CONV, ACTIVATION, MLP, or the class of one of our layers.
        fqn: the module's dotted name; for a functional call, the name of its weight.
        root: the module tree.
        nodes: the calls, over all graphs.
        weight_ref, bias_ref: dotted names of the tensors (LINEAR).
        transposed: the weight is stored [in, out] (transformers' Conv1D, `x @ W`).
        parts: the sites an MLP is made of: `up`, `down`, and where they exist `gate` and
            `activation`. The MLP's own tensors are those of `down`.
    """

    kind: Kind
    fqn: str
    root: nn.Module
    nodes: tuple[Node, ...] = ()
    weight_ref: str | None = None
    bias_ref: str | None = None
    transposed: bool = False
    parts: Mapping[str, Site] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, fqn: str = "layer", kind: Kind | None = None) -> Site:
        """A site around one free-standing module; for tests and for trying a pass by hand."""
        root = nn.Module()
        root.add_module(fqn, module)
        if kind is None:
            kind = type(module) if isinstance(module, Layer) else LINEAR
        named = dict(module.named_parameters(recurse=False))
        return cls(
            kind,
            fqn,
            root,
            weight_ref=f"{fqn}.weight" if "weight" in named else None,
            bias_ref=f"{fqn}.bias" if "bias" in named else None,
        )

    @property
    def module(self) -> nn.Module | None:
        """The module at the site; None where the user's code calls a function."""
        try:
            return self.root.get_submodule(self.fqn)
        except AttributeError:
            return None

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], a view of the stored weight (the Parameter itself where
        it is stored that way round)."""
        if self.weight_ref is None:
            raise AttributeError(f"site {self.fqn!r} ({self.kind}) has no weight")
        weight = _tensor(self.root, self.weight_ref)
        return weight.t() if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """[out_features] or None."""
        return None if self.bias_ref is None else _tensor(self.root, self.bias_ref)

    @property
    def in_features(self) -> int:
        return self._features("in_features", 1)

    @property
    def out_features(self) -> int:
        return self._features("out_features", 0)

    @property
    def tokens(self) -> int | None:
        """Rows that the example inputs put through all calls of the site in one forward; None
        without shapes."""
        rows = 0
        for node in self.nodes:
            if node.graph is not self.nodes[0].graph:
                continue  # the same calls, in the other mode's graph
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or not value.dim():
                return None
            rows += int(value.numel()) // max(int(value.shape[-1]), 1)
        return rows if self.nodes else None

    @property
    def where(self) -> str:
        """`file:line` of the user's code that calls the site; "" where unknown."""
        return next((w for w in map(user_line, self.nodes) if w), "")

    def _features(self, name: str, dim: int) -> int:
        if self.weight_ref is not None:
            return self.weight.shape[dim]
        return int(getattr(self.module, name))


def _tensor(root: nn.Module, fqn: str) -> Tensor:
    owner, _, name = fqn.rpartition(".")
    tensor = getattr(root.get_submodule(owner), name)
    assert isinstance(tensor, Tensor), fqn
    return tensor


def user_line(node: Node) -> str:
    """`file:line` of the innermost frame outside torch that made this node, or ""."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    for file, line in reversed(frames):
        path = pathlib.PurePath(file).parts
        if "torch" in path and "site-packages" in path:
            continue
        if "site-packages" in path:
            return f"{'/'.join(path[path.index('site-packages') + 1 :])}:{line}"
        return f"{path[-1]}:{line}"
    return ""


def is_leaf(module: nn.Module | None) -> bool:
    """Whether one call of `module` is one node of a graph: a layer with one tensor in, one out."""
    if module is None or "forward" in vars(module):
        return False
    if isinstance(module, Layer) or type(module).forward in _KIND_OF_FORWARD:
        return True
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return name == _TRANSPOSED_LINEAR or name.startswith(_FOREIGN_ACTIVATIONS)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of site a leaf module is; None for those that no pass looks at."""
    if isinstance(module, Layer):
        return type(module)
    if type(module).forward in _KIND_OF_FORWARD:
        return _KIND_OF_FORWARD[type(module).forward]
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return LINEAR if name == _TRANSPOSED_LINEAR else ACTIVATION


def op_name(node: Node, root: nn.Module | None = None) -> str:
    """One name for an operation, whichever front end spelled it."""
    target: Any = node.target
    if node.op == "call_module":
        module = None if root is None else root.get_submodule(target)
        if isinstance(module, Layer):
            return module.op
        name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(module).__name__)
        return "linear" if name == "Conv1D" else name.lower()
    if node.op == "call_method":
        name = target
    elif isinstance(target, torch._ops.OpOverload):
        name = target._opname
    elif target is getattr:
        name = str(node.args[1])
    else:
        name = getattr(target, "__name__", str(target))
    return _SAME_OP.get(name, name)


def find_sites(root: nn.Module, graphs: Iterable[tuple[str, Graph]]) -> list[Site]:
    """All sites of a module tree, each once, in the order of their first call.

    Args:
        root: the module tree.
        graphs: pairs (dotted name of the module the graph lives on, graph).
    """
    found: dict[tuple[Any, ...], list[Any]] = {}
    for prefix, graph in graphs:
        owner = root.get_submodule(prefix)
        ordinals: dict[tuple[str, str], int] = {}
        for node in graph.nodes:
            for key, site in _sites_at(root, owner, prefix, node, ordinals):
                if key in found:
                    found[key][1].append(node)
                else:
                    found[key] = [site, [node]]
    sites: list[Site] = []
    for site, nodes in found.values():
        sites.append(
            Site(
                site.kind, site.fqn, root, tuple(nodes), site.weight_ref, site.bias_ref,
                site.transposed, site.parts,
            )
        )  # fmt: skip
    return sites


def _sites_at(
    root: nn.Module,
    owner: nn.Module,
    prefix: str,
    node: Node,
    ordinals: dict[tuple[str, str], int],
) -> Iterator[tuple[tuple[Any, ...], Site]]:
    site = _site(root, owner, prefix, node, ordinals)
    if site is None:
        return
    key = (site.fqn, site.transposed, site.bias_ref)
    yield (site.kind, *key), site
    if site.kind == LINEAR or isinstance(site.kind, type):
        parts = _mlp_parts(root, owner, prefix, node)
        if parts:
            parts["down"] = site
            yield (
                (MLP, *key),
                Site(
                    MLP, site.fqn, root, (node,), site.weight_ref, site.bias_ref,
                    site.transposed, parts,
                ),
            )  # fmt: skip


def _site(
    root: nn.Module,
    owner: nn.Module,
    prefix: str,
    node: Node,
    ordinals: dict[tuple[str, str], int] | None = None,
) -> Site | None:
    if node.op == "call_module":
        fqn = _join(prefix, str(node.target))
        module = root.get_submodule(fqn)
        kind = kind_of(module) if is_leaf(module) else None
        if kind is None:
            return None
        plain = kind in (LINEAR, CONV)
        named = dict(module.named_parameters(recurse=False)) if plain else {}
        transposed = kind == LINEAR and type(module).forward is not nn.Linear.forward
        return Site(
            kind, fqn, root, (node,),
            f"{fqn}.weight" if "weight" in named else None,
            f"{fqn}.bias" if "bias" in named else None,
            transposed,
        )  # fmt: skip
    if node.op not in ("call_function", "call_method"):
        return None
    name = op_name(node)
    if name in _LINEAR_OPS:
        return _functional_linear(root, owner, prefix, node, name)
    if name in _ACTIVATION_OPS:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        inside = _join(prefix, stack[-1][0] if stack else "")
        ordinal = 0
        if ordinals is not None:
            ordinal = ordinals[inside, name] = ordinals.get((inside, name), -1) + 1
        fqn = _join(inside, f"{name.rstrip('_')}_{ordinal}")
        return Site(ACTIVATION, fqn, root, (node,))
    return None


def _functional_linear(
    root: nn.Module, owner: nn.Module, prefix: str, node: Node, name: str
) -> Site | None:
    """A linear map written as a function: its weight must be a parameter, read as it is or
    transposed once."""
    args = [*node.args, *node.kwargs.values()]
    bias: Any = None
    if name == "linear":
        weight, bias = args[1], args[2] if len(args) > 2 else None
        transposed = False
    elif name == "addmm":
        if node.kwargs:  # alpha, beta: a scaled sum is not a linear layer
            return None
        bias, _, weight = args[:3]
        transposed = True
    else:
        weight, transposed = args[1], True
    if not isinstance(weight, Node):
        return None
    while weight.op != "get_attr":
        if op_name(weight) not in _TRANSPOSES or not isinstance(weight.args[0], Node):
            return None
        transposed = not transposed
        weight = weight.args[0]
    references = [_join(prefix, str(weight.target))]
    if bias is not None:
        if not isinstance(bias, Node) or bias.op != "get_attr":
            return None
        references.append(_join(prefix, str(bias.target)))
    tensors = [_tensor(root, r) for r in references]
    if not isinstance(tensors[0], nn.Parameter) or tensors[0].dim() != 2:
        return None
    holder, _, last = references[0].rpartition(".")
    whole = root.get_submodule(holder)
    # the weight of an nn.Linear that the user's code reads by hand (nn.MultiheadAttention)
    by_hand = is_leaf(whole) and kind_of(whole) == LINEAR and last == "weight"
    fqn = holder if by_hand else None
    if by_hand and references[1:] != [f"{holder}.bias"] * (whole.bias is not None):
        return None
    return Site(
        LINEAR, fqn or references[0], root, (node,), references[0],
        references[1] if bias is not None else None, transposed,
    )  # fmt: skip


def _mlp_parts(root: nn.Module, owner: nn.Module, prefix: str, down: Node) -> dict[str, Site]:
    """The sites that feed `down`: linear → activation, or activation(gate) · up."""
    source = _through(owner, down.args[0] if down.op == "call_module" else _input(down))
    if source is None:
        return {}
    if op_name_safe(source, owner) in ("mul", "mul_"):
        sides = [_branch(root, owner, prefix, a) for a in source.args[:2]]
        gate = next((s for s in sides if "activation" in s and "up" in s), None)
        other = next((s for s in sides if s is not gate), None)
        if gate is None or other is None or "up" not in other:
            return {}
        return {"gate": gate["up"], "activation": gate["activation"], "up": other["up"]}
    parts = _branch(root, owner, prefix, source)
    return parts if "activation" in parts and "up" in parts else {}


def _branch(root: nn.Module, owner: nn.Module, prefix: str, value: Any) -> dict[str, Site]:
    parts: dict[str, Site] = {}
    node = _through(owner, value)
    site = None if node is None else _site(root, owner, prefix, node)
    if site is not None and site.kind == ACTIVATION and node is not None:
        parts["activation"] = site
        node = _through(owner, _input(node))
        site = None if node is None else _site(root, owner, prefix, node)
    if site is not None and (site.kind == LINEAR or isinstance(site.kind, type)):
        parts["up"] = site
    return parts


def _input(node: Node) -> Any:
    """The activations that go into a node: for addmm(bias, x, W) the second argument."""
    index = 1 if node.op == "call_function" and op_name(node) == "addmm" else 0
    return node.args[index] if len(node.args) > index else None


def _through(owner: nn.Module, value: Any) -> Node | None:
    """Back over ops that only move values (views, casts, dropout) to the one that made them."""
    while isinstance(value, Node) and op_name_safe(value, owner) in _TRANSPARENT:
        value = value.args[0]
    return value if isinstance(value, Node) else None


def op_name_safe(node: Node, owner: nn.Module) -> str:
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    if node.target is operator.getitem:
        return "getitem"
    return op_name(node, owner)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
