"""Attention of one query of each head by the compiled kernel, in the code that Inductor generates.

A language model that decodes with a static cache asks one query of all the keys that it has room
for. Heads that share keys read them where they lie: torch's operation is given a copy of keys and
values for each head.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rewriter.kernels import attention, native_ops
from rewriter.lowering.joining import origin

__all__ = ["attend_single_rows"]

_aten = torch.ops.aten
_THEIRS = _aten._scaled_dot_product_flash_attention_for_cpu.default
# Inductor has made reshapes of all views by the time that its passes run.
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)


def attend_single_rows(graph: fx.Graph) -> None:
    """rewriter::native_attention in place of torch's, where one query of each head asks."""
    calls = graph.find_nodes(op="call_function", target=_THEIRS)
    with unset_fake_temporarily():  # the kernels are looked at when they are first asked for
        if not calls or native_ops.refusal() is not None or attention.unavailable() is not None:
            return
    for call in calls:
        _attend(graph, call)


def _attend(graph: fx.Graph, call: fx.Node) -> None:
    given: list[Any] = [*call.args, 0.0, False][:5]
    q, k, v, dropout, causal = given
    mask: Any = call.kwargs.get("attn_mask")
    scale: Any = call.kwargs.get("scale")
    values = list(call.users)
    if any(n.target is not operator.getitem or n.args[1] != 0 for n in values):
        return  # the backward wants more of it
    if (fewer := (_shared(k), _shared(v)))[0].meta["val"].shape == fewer[1].meta["val"].shape:
        k, v = fewer
    query, key, value = (n.meta["val"] for n in (q, k, v))
    added = None if mask is None else mask.meta["val"]
    if any(not isinstance(n, int) for t in (query, key, value) for n in t.shape):
        return  # not the same at every call
    if query.ndim != 4 or query.shape[2] != 1:
        return
    if attention.refusal(query, key, value, added, causal, dropout) is not None:
        return
    times = query.shape[-1] ** -0.5 if scale is None else scale
    ours = torch.ops.rewriter.native_attention.default
    with graph.inserting_before(call):
        made = graph.call_function(ours, (q, k, v, mask, int(causal), times, 0))
    b, h, rows, depth = query.shape
    strides = rows * h * depth, depth, h * depth, 1
    made.meta = {**origin(call), "val": query.new_empty_strided(query.shape, strides)}
    for node in values:
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    graph.erase_node(call)


def _shared(each: fx.Node) -> fx.Node:
    """Keys or values [b, heads, t, d] as they were before each was copied for several heads that
    lie beside each other; the same where they were not."""
    view = _uncopied(each)
    if view.target not in _VIEWS:
        return each
    spread = _uncopied(view.args[0])
    if spread.target is not _aten.expand.default:
        return each
    apart: Any = spread.args[0]
    if apart.target is not _aten.unsqueeze.default or apart.args[1] != 2:
        return each
    own: fx.Node = apart.args[0]
    b, h, *rest = own.meta["val"].shape
    times = spread.meta["val"].shape[2]
    given = [b, h, times, *rest], [b, h * times, *rest]
    return own if given == tuple(list(n.meta["val"].shape) for n in (spread, each)) else each


def _uncopied(node: Any) -> Any:
    while node.target is _aten.clone.default:
        node = node.args[0]
    return node
