"""Weights that are multiplied, but not by a linear site: listed, so that none is left out silently.

Stacked experts, slices of a packed projection, einsums, recurrent layers: no pass sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx, nn
from torch._ops import HigherOrderOperator

from rewriter.base import Layer
from rewriter.capture import Capture
from rewriter.modules.tree import find, join
from rewriter.report import Decision
from rewriter.sites import Site
from rewriter.spellings import PRODUCTS, is_leaf, op_name, user_line

__all__ = ["other_weights"]

_PATCHED = (
    "its layer has a forward of its own, set on the object, which calls no linear function with "
    "this weight; a copy of the model may still call the original's: try inplace=True"
)
_STEPS = 6
"""How many moves (slices, casts, transposes) may lie between a parameter and its product."""


def other_weights(capture: Capture, sites: Iterable[Site], listed: Sequence[str]) -> list[Decision]:
    """One refusal for every weight of two or more dimensions that only such products use.

    Args:
        capture: the model.
        sites: all of its sites.
        listed: names that have a decision already.
    """
    root = capture.root
    known = {id(find(root, s.weight_ref)) for s in sites if s.weight_ref is not None}
    for module in root.modules():
        if isinstance(module, Layer) or is_leaf(module):
            known |= {id(p) for p in module.parameters(recurse=False)}
    uses: dict[int, tuple[str, str]] = {}
    for region, mode, graph in capture.graphs():
        if mode and False in region.graphs:
            continue
        for node in graph.nodes:
            if node.op == "get_attr":
                tensor = find(root, join(region.prefix, str(node.target)))
                product = _product(node)
                if product is not None:
                    uses.setdefault(id(tensor), (op_name(product), user_line(product)))
    islands = {island.fqn for island in capture.islands}
    decisions = []
    for name, parameter in root.named_parameters():
        if parameter.dim() < 2 or id(parameter) in known or name in listed:
            continue
        path = name.rpartition(".")[0]
        owner = root.get_submodule(path)
        if isinstance(owner, nn.RNNBase):
            uses.setdefault(id(parameter), (type(owner).__name__, ""))
        if id(parameter) in uses or path in islands:
            op, where = uses.get(id(parameter), (f"the Python code of {type(owner).__name__}", ""))
            reason = f"its weight goes into {op} in a form that is no linear layer"
            if "forward" in vars(owner):
                reason = _PATCHED
            shape = "×".join(map(str, parameter.shape))
            decisions.append(Decision(name, "linear", "skipped", reason, where=where, shape=shape))
    return decisions


def _product(node: fx.Node) -> fx.Node | None:
    """The product that a parameter ends up in, past operations that move or select its values."""
    front, seen = [node], {node}
    for _ in range(_STEPS):
        following = [u for n in front for u in n.users if u not in seen and u.op != "output"]
        for user in following:
            if user.op != "call_module" and op_name(user) in PRODUCTS:
                return user
            if isinstance(user.target, HigherOrderOperator):  # which has a graph of its own
                return user
        seen.update(following)
        front = following
    return None
