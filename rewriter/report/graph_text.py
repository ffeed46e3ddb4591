"""A graph as text: one line per operation, the same for every front end.

%0 = low_rank(%x, fc) : f32[2,64]           # was linear
%1 = relu(%0) : f32[2,64]
%2 = linear(%1, out) : f32[2,10]            # lowrank: rank 16 is larger than out_features=10
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.base import Layer
from rewriter.report import Decision
from rewriter.sites import find_sites, op_name

__all__ = ["graph_text"]

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "bool", torch.complex64: "c64",
}  # fmt: skip


def graph_text(root: nn.Module, graph: fx.Graph, decisions: Iterable[Decision] = ()) -> str:
    """The operations of `graph`, in order.

    Args:
        root: the module the graph lives on.
        graph: in normal form.
        decisions: shown behind the calls of their sites.
    """
    by_site: dict[str, Decision] = {d.site: d for d in decisions}
    sites = {n: s.fqn for s in find_sites(root, [("", graph)]) for n in s.nodes}
    names: dict[fx.Node, str] = {}
    rows: list[tuple[str, str]] = []
    count = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"%{node.name.removeprefix('l_').removesuffix('_')}"
        elif node.op == "get_attr":
            names[node] = str(node.target)
        elif node.op != "output":
            names[node] = f"%{count}"
            count += 1
            name, arguments = op_name(node, root).rstrip("_"), _arguments(node, root, names)
            call = f"{names[node]} = {name}({arguments})"
            rows.append((call + _type(node.meta.get("val")), _remark(sites.get(node), by_site)))
    width = max((len(row[0]) for row in rows if row[1]), default=0)
    return "\n".join(f"{call:{width}}  # {remark}" if remark else call for call, remark in rows)


def _arguments(node: fx.Node, root: nn.Module, names: dict[fx.Node, str]) -> str:
    args = list(node.args)
    if node.op == "call_module":
        shown = [_value(a, names) for a in args]
        module = root.get_submodule(str(node.target))
        if isinstance(module, Layer) or any(True for _ in module.parameters()):
            shown.append(str(node.target))
        return ", ".join(shown)
    defaults = _defaults(node)
    kwargs = {k: v for k, v in node.kwargs.items() if (k, v) not in defaults.items()}
    names_in_order = list(defaults)
    while args and len(args) <= len(names_in_order):
        name = names_in_order[len(args) - 1]
        if defaults[name] is _REQUIRED or args[-1] != defaults[name]:
            break
        args.pop()
    shown = [_value(a, names) for a in args]
    return ", ".join(shown + [f"{k}={_value(v, names)}" for k, v in kwargs.items()])


_REQUIRED = object()


def _defaults(node: fx.Node) -> dict[str, Any]:
    """Parameters and defaults by aten's schema of the operation, whatever the front end calls."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, op_name(node), None)
        found = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
        if not found:
            return {}
        target = next((o for o in found if o._overloadname in ("default", "Tensor")), found[0])
    defaults: dict[str, Any] = {}
    for argument in target._schema.arguments:
        known = argument.has_default_value()
        defaults[argument.name] = argument.default_value if known else _REQUIRED
    return {**defaults, "inplace": False} if node.kwargs.get("inplace") is False else defaults


def _value(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v, names) for v in value) + "]"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value)


def _type(value: Any) -> str:
    if not isinstance(value, Tensor):
        return ""
    return f" : {_DTYPES.get(value.dtype, str(value.dtype))}[{','.join(map(str, value.shape))}]"


def _remark(site: str | None, decisions: dict[str, Decision]) -> str:
    decision = decisions.get(site or "")
    if decision is None:
        return ""
    return f"was {decision.kind}" if decision.changed else decision.reason
