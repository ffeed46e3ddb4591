"""Products of one input with packed weights, made by one call in the code that Inductor generates.

The projections of an attention block, and gate and up of an MLP, read one row each while a model
decodes. One call for two or three of them starts its threads once, quantizes its input once, and
leaves the weights where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from rewriter.kernels import native_ops

__all__ = ["join_products", "origin"]

_AT_ONCE = 3
_KINDS = {f"rewriter::{name}": kind for kind, name in enumerate(native_ops.KINDS)}
_REPEATED = {*_KINDS, "rewriter::int8_weight_linear"}


def join_products(graph: fx.Graph) -> None:
    """One call for products of one input, where there are several, and for those of the same weight
    in the first place; in place."""
    _drop_repeated(graph)
    for calls in list(_joinable(graph)):
        _join(graph, calls)


def _drop_repeated(graph: fx.Graph) -> None:
    """Layers that are rotated by one basis each make the same product with it."""
    made: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if _name(node) in _REPEATED:
            first = made.setdefault((node.target, node.args), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _name(node: fx.Node) -> str:
    found: Any = node.target
    return str(found._schema.name) if isinstance(found, torch._ops.OpOverload) else ""


def _kind(node: fx.Node) -> int | None:
    return _KINDS.get(_name(node))


def _operands(call: fx.Node) -> list[Any]:
    """weight, scale, zero, bias of a call."""
    weight, scale, *more = call.args[1:]
    more = [None, *more] if _kind(call) == 0 else more
    return [weight, scale, *more, *[None] * (2 - len(more))]  # of what is None, none is written


def _group(call: fx.Node) -> int:
    """How many numbers of the weight have one scale; 0: a row."""
    weight, scale = (a.meta["val"] for a in call.args[1:3])  # type: ignore[union-attr]
    return 2 * weight.shape[1] // scale.shape[1] if scale.ndim == 2 else 0


def _joinable(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Calls of one op on one input, whose operands are all there where the first of them stands."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if (kind := _kind(node)) is not None:
            found.setdefault((kind, node.args[0], _group(node)), []).append(node)
    for calls in found.values():
        first = place[calls[0]]
        there = [c for c in calls if all(place[n] < first for n in c.all_input_nodes)]
        for i in range(0, len(there), _AT_ONCE):
            if len(some := there[i : i + _AT_ONCE]) > 1:
                yield some


def _join(graph: fx.Graph, calls: Sequence[fx.Node]) -> None:
    operands = [o for call in calls for o in _operands(call)]
    operands += [None] * 4 * (_AT_ONCE - len(calls))
    op = torch.ops.rewriter.native_weight_linears.default
    values = [call.meta["val"] for call in calls]
    with graph.inserting_before(calls[0]):
        joined = graph.call_function(op, (calls[0].args[0], *operands, _kind(calls[0])))
        joined.meta = {**origin(calls[0]), "val": torch.cat(values, -1)}
        start = 0
        for call, value in zip(calls, values, strict=True):
            end = start + value.shape[-1]
            piece = graph.call_function(torch.ops.aten.slice.Tensor, (joined, -1, start, end))
            piece.meta = {**origin(call), "val": joined.meta["val"][..., start:end]}
            call.replace_all_uses_with(piece)
            start = end
    for call in calls:
        graph.erase_node(call)


def origin(call: fx.Node) -> dict[str, Any]:
    """Where a call comes from; what else is known of it, as of its arguments, is of it alone."""
    return {k: v for k, v in call.meta.items() if k in ("stack_trace", "nn_module_stack")}
