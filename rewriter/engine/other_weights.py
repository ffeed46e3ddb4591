"""Weights that no pass of a rewrite takes: listed once, so that none is left out silently.

Convolutions that mix positions, embeddings, recurrent layers, stacked experts, slices of a packed
projection, einsums: whatever has two dimensions or more and is no weight of a site.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator

from rewriter.base import Layer
from rewriter.capture import Capture
from rewriter.modules.pointwise import inner
from rewriter.modules.tree import find, join
from rewriter.report import Decision
from rewriter.sites import CONV, EMBEDDING, LINEAR, Site, is_conv
from rewriter.spellings import CONVOLUTIONS, PRODUCTS, RECURRENT, is_leaf, op_name, user_line

__all__ = ["other_weights"]

_PATCHED = (
    "its layer has a forward of its own, set on the object, which calls no linear function with "
    "this weight; a copy of the model may still call the original's: try inplace=True"
)
_NONE = "no pass here takes one"
_OPTION = '; Quantize("int8-dynamic", {}=True) does'
_STEPS = 6
"""How many moves (slices, casts, transposes) may lie between a parameter and its product."""
_SELECTING = frozenset({"index", "index_select", "gather", "getitem", "embedding"})
_PARTS = frozenset({"chunk", "split", "split_with_sizes", "slice", "select", "narrow", "unbind"})


Refusal = tuple[Decision, tuple[fx.Node, ...]]
"""Why no pass takes a weight, and the calls that multiply by it."""


def other_weights(capture: Capture, sites: Iterable[Site]) -> list[Refusal]:
    """One refusal for every layer, and every bare parameter, with weights of two or more
    dimensions that are no site's. Of several weights of one call, the first has the call.

    Args:
        capture: the model.
        sites: all of its sites.
    """
    root, uses = capture.root, _uses(capture)
    linear = {s.fqn for s in sites if s.kind == LINEAR or isinstance(s.kind, type)}
    convs = {s.fqn: s for s in sites if s.kind == CONV and s.fqn not in linear}
    known = {
        id(find(root, s.weight_ref))
        for s in sites
        if s.weight_ref is not None
        and s.kind != EMBEDDING
        and (s.kind != CONV or not is_conv(s.place))
    }
    for module in root.modules():
        if isinstance(inner(module), Layer):
            known |= {id(p) for p in inner(module).parameters(recurse=False)}
    islands = {island.fqn for island in capture.islands}
    seen: set[object] = set()
    refusals: list[Refusal] = []
    for name, parameter in root.named_parameters():
        path = name.rpartition(".")[0]
        owner = root.get_submodule(path)
        conv = next((n for n in _owners(path) if n in convs), "")
        place = conv or (path if path and is_leaf(owner) else name)
        decided = id(parameter) in known or any(n in linear for n in _owners(path))
        if parameter.dim() < 2 or decided or place in seen:
            continue
        seen.add(place)
        if conv:
            refusals.append(_conv(convs[place]))
        elif place == path:
            reason = f"{_a(owner)} {_purpose(owner)}: {_NONE}"
            if isinstance(owner, nn.Embedding):
                reason += _OPTION.format("embeddings")
            if "forward" in vars(owner):
                reason = _PATCHED
            shape = "×".join(map(str, parameter.shape))
            refusals.append((Decision(place, _class(owner), "skipped", reason, shape=shape), ()))
        else:
            python = path in islands and id(parameter) not in uses
            use = f"the Python code of {_class(owner)}" if python else uses.get(id(parameter))
            refusals.append(_bare(name, parameter, owner, use, seen))
    return refusals


def _owners(path: str) -> Iterator[str]:
    """`a.b`, `a` of `a.b`: a parametrized weight lies below its layer."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _conv(site: Site) -> Refusal:
    conv: Any = site.place
    size = "×".join(map(str, conv.kernel_size))
    if any(k != 1 for k in conv.kernel_size):
        why = "mixes positions"
    elif conv.groups != 1:
        why = "works on groups of channels"
    else:
        why = "is transposed" if conv.transposed else "pads its input"
    quantized = len(conv.kernel_size) < 3 and conv.padding_mode == "zeros" and not conv.transposed
    option = _OPTION.format("convolutions") if quantized else ""
    decision = Decision(
        site.fqn,
        _class(conv),
        "skipped",
        f"{_a(conv)} that {why}: {_NONE}{option}",
        where=site.where,
        tokens=site.tokens,
        shape=f"{site.in_features}→{site.out_features}, {size}",
    )
    return decision, site.nodes


def _purpose(owner: nn.Module) -> str:
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "looks rows up and multiplies nothing"
    return "multiplies no rows by its weights"


def _bare(name: str, parameter: Tensor, owner: nn.Module, use: Any, seen: set[object]) -> Refusal:
    """A parameter that is read by hand, or by a layer that is no single call in the graphs."""
    own_class = type(owner).__module__.startswith("torch.nn.")
    kind, shape = "linear", "×".join(map(str, parameter.shape))
    if "forward" in vars(owner):
        reason = _PATCHED
    elif isinstance(owner, nn.RNNBase | nn.RNNCellBase):  # whether it is opened up or not
        kind = _class(owner)
        reason = f"its weight goes into {kind}, {_HOW['lstm']}"
    elif isinstance(use, str):
        reason = f"its weight goes into {use} in a form that is no linear layer"
    elif use is None:
        kind, reason = "parameter", "no call with these example_inputs reads it"
    elif not _is_product(use[0]):
        kind = _class(owner) if own_class else "parameter"
        reason = f"its values go into {op_name(use[0])}, which is no product: no pass takes them"
        if isinstance(owner, nn.EmbeddingBag):
            reason = f"{_a(owner)} {_purpose(owner)}: {_NONE}"
    else:
        op, parts = op_name(use[0]), use[1]
        how = _HOW.get(op, _HOW["parts"] if parts else "")
        if op in _HOW:
            kind = _class(owner) if own_class else "".join(w.capitalize() for w in op.split("_"))
        reason = f"its weight goes into {op}" + (f", {how}" if how else _NOT_LINEAR)
    node = use[0] if isinstance(use, tuple) else None
    counted = () if node is None or node in seen or not _is_product(node) else (node,)
    seen.update(counted)
    where = "" if node is None else user_line(node)
    return Decision(name, kind, "skipped", reason, where=where, shape=shape), counted


_NOT_LINEAR = " in a form that is no linear layer"
_HOW = {
    **dict.fromkeys(RECURRENT, "where each step needs the one before: no pass takes such a layer"),
    **dict.fromkeys(CONVOLUTIONS, "more than a linear layer over channels: no pass takes it"),
    "bilinear": "a product of two inputs: no pass takes one",
    "parts": "part by part: no pass takes weights that are packed into one",
}
"""In which way a product uses a weight, so that it is no linear layer."""


def _uses(capture: Capture) -> dict[int, tuple[fx.Node, bool]]:
    """By identity of a parameter that is read by hand: the product that it ends up in, else the
    first call that reads it; and whether it goes there in parts."""
    uses: dict[int, tuple[fx.Node, bool]] = {}
    for region, mode, graph in capture.graphs():
        if mode and False in region.graphs:
            continue
        alone: set[fx.Node] = set()  # what is computed from parameters only
        for node in graph.nodes:
            if node.op == "get_attr":
                alone.add(node)
            elif node.all_input_nodes and alone.issuperset(node.all_input_nodes):
                alone.add(node)
        for node in graph.nodes:
            if node.op == "get_attr" and node.users:
                tensor = find(capture.root, join(region.prefix, str(node.target)))
                found = _product(node, alone)
                if found is not None or id(tensor) not in uses:
                    uses[id(tensor)] = found or (next(iter(node.users)), False)
    return uses


def _product(node: fx.Node, alone: set[fx.Node]) -> tuple[fx.Node, bool] | None:
    """The product that a parameter ends up in, past operations on weights alone and such as select
    some of its values; and whether it was taken apart on the way."""
    front, seen, parts = [node], {node}, False
    for _ in range(_STEPS):
        following = [u for n in front for u in n.users if u not in seen and u.op != "output"]
        for user in following:
            if _is_product(user):
                return user, parts
        parts |= any(op_name(u) in _PARTS for u in following if u.op != "call_module")
        seen.update(following)
        front = [u for u in following if u in alone or op_name(u) in _SELECTING]
    return None


def _is_product(node: fx.Node) -> bool:
    if isinstance(node.target, HigherOrderOperator):  # which has a graph of its own
        return True
    return node.op != "call_module" and op_name(node) in PRODUCTS


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _a(module: nn.Module) -> str:
    name = _class(module)
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
