"""Products that read only the weights of active inputs, as compiled code calls them: in C++.

Their ops choose a kernel at each call, in Python, which takes as long as a small product. Where few
rows come in, and the share of them that is known to be active is one that pays, the graph calls the
sparse kernel itself. It reads a weight by columns; where one is stored by rows, the copy is a
further input of the graph, made again when the weight changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from rewriter.kernels import native_ops, ops, sparse, sparse_bound, sparse_int4
from rewriter.kernels.weight_bound import PLAIN

__all__ = ["Direct", "columns_of", "direct_products"]

_INT4 = "rewriter::sparse_int4_linear"
_OPS = ("rewriter::sparse_linear", "rewriter::topk_linear", _INT4)


@dataclass
class Direct:
    """What became of a graph's products.

    Args:
        module: the graph.
        copied: positions of the weights whose columns the graph takes after its inputs.
        fakes: examples of those columns.
        notes: for the report.
    """

    module: fx.GraphModule
    copied: list[int] = field(default_factory=list)
    fakes: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def direct_products(module: fx.GraphModule, inputs: Sequence[Any]) -> Direct:
    """Products of a graph of Dynamo's, of which no gradient is wanted, by the native ops;
    without autocast.

    Args:
        module: the graph; it stays as it is.
        inputs: what Dynamo passes with it.
    """
    found = Direct(module)
    if not any(ops.name_of(n.target) in _OPS for n in module.graph.nodes):
        return found
    graph = _copy(module)
    calls = [n for n in graph.nodes if ops.name_of(n.target) in _OPS]
    placeholders = graph.find_nodes(op="placeholder")
    real = dict(zip(placeholders, inputs, strict=True))
    why = _nowhere(graph)
    reasons: dict[str, int] = {}
    columns: dict[fx.Node, fx.Node] = {}
    for call in calls:
        given = _arguments(call)
        reason = why or _against(given, real)
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
            continue
        weight = given["weight"]
        if _is_copied(given, real):
            if weight not in columns:
                found.copied.append(placeholders.index(weight))
                fake, columns[weight] = _further(graph, weight, real[weight], len(columns))
                found.fakes.append(fake)
            weight = columns[weight]
        _replace(graph, call, given, weight)
    if reached := len(calls) - sum(reasons.values()):
        found.notes.append(f"{reached} products with active inputs are called in C++")
        found.module = fx.GraphModule(module, graph)
        found.module.meta = dict(module.meta)
        for name in ("_param_name_to_source", "compile_subgraph_reason"):
            if hasattr(module, name):
                setattr(found.module, name, getattr(module, name))
    for reason, count in reasons.items():
        found.notes.append(f"{count} products with active inputs are called by Python: {reason}")
    return found


def _copy(module: fx.GraphModule) -> fx.Graph:
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(module.graph, copied))
    for node, new in copied.items():
        if hasattr(node, "_dynamo_source"):  # AOTAutograd asks inputs where they come from
            new._dynamo_source = node._dynamo_source
    return graph


def columns_of(inputs: Sequence[Any], copied: Sequence[int]) -> list[Tensor]:
    """What the graph takes after these inputs."""
    return [sparse.by_columns(inputs[i]) for i in copied]


def _nowhere(graph: fx.Graph) -> str | None:
    """Why none of a graph's products is called directly."""
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if "functorch" in str(getattr(node.target, "__module__", "")) or "autocast" in name:
            return "the code switches autocast or derivatives"
    return native_ops.refusal()


def _arguments(call: fx.Node) -> dict[str, Any]:
    """Of any of the ops, by the names of `Operands`, x and share."""
    schema = ops.overload(ops.name_of(call.target))._schema
    given: dict[str, Any] = {"scale": None, "zero": None, "threshold": None, "group_size": 0}
    given["share"] = 1.0
    given |= {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in schema.arguments), call.args, strict=False)) | call.kwargs
    names = {"h": "x", "packed": "weight"}
    return {names.get(name, name): value for name, value in given.items()}


_TENSORS = ("weight", "scale", "zero", "bias", "threshold", "importance")


def _against(given: Mapping[str, Any], real: Mapping[fx.Node, Any]) -> str | None:
    """Why a call stays as it is; None where the native op takes its place."""
    x = given["x"].meta.get("example_value") if isinstance(given["x"], fx.Node) else None
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.device.type != "cpu":
        return "their input is not float32 on a CPU"
    if not all(isinstance(n, int) for n in x.shape):
        return "the sizes of their input change"
    tensors = [real.get(given[name]) if given[name] is not None else None for name in _TENSORS]
    there = [t for t, name in zip(tensors, _TENSORS, strict=True) if given[name] is not None]
    if any(type(t) not in PLAIN or t.is_inference() for t in there):  # type: ignore[union-attr]
        return "their weights are computed, or torch counts no changes of them"
    options = given["k"], given["block"], given["group_size"]
    own = sparse_bound.Operands._make([*tensors, *options])
    if not sparse_bound.takes(own):
        return "the compiled kernel does not take tensors of this dtype, device or layout"
    if _is_copied(given, real) and any(
        ops.name_of(user.target) not in _OPS for user in given["weight"].users
    ):
        return "the code does something else with their weight, too"
    return _dense(own, math.prod(x.shape[:-1]), given["share"])


def _is_copied(given: Mapping[str, Any], real: Mapping[fx.Node, Any]) -> bool:
    """Whether the weight is stored by rows, and the native op reads it by columns."""
    return not given["group_size"] and not real[given["weight"]].t().is_contiguous()


def _dense(own: sparse_bound.Operands, rows: int, share: float) -> str | None:
    """Why the dense product may well be the one that runs."""
    if not rows:
        return "there are no rows"
    if own.threshold is None:
        share = own.k / (own.weight.shape[0] if own.group else own.weight.shape[1])
    elif share >= 1:
        return "which share is active is not known"

    def largest(rows: int) -> float:
        if own.group:
            assert own.scale is not None
            sizes = own.scale.shape[1], own.weight.shape[0], own.group
            return sparse_int4.largest_share(rows, *sizes)
        return sparse.largest_share(own.weight, rows)

    return sparse.why_dense(rows, share, largest)


def _further(graph: fx.Graph, weight: fx.Node, real: Tensor, count: int) -> tuple[Tensor, fx.Node]:
    """Columns of a weight as one more input: an example for the compiler, and the node."""
    made = sparse.by_columns(real)
    value, context = weight.meta["example_value"], torch._guards.TracingContext.try_get()
    own: Any = value.fake_mode if isinstance(value, FakeTensor) else None
    mode = own if context is None or context.fake_mode is None else context.fake_mode
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        node = graph.placeholder(f"columns_{count}_{weight.name}")
    node._dynamo_source = None
    static = weight.meta.get("tensor_dict") or {}
    kept = {k: v for k, v in static.items() if k == "_dynamo_static_input_type"}
    node.meta = {"example_value": _fake(own or mode, made), "tensor_dict": kept}
    return _fake(mode, made), node


def _fake(mode: Any, tensor: Tensor) -> Tensor:
    with mode:
        found: Tensor = mode.from_tensor(tensor, static_shapes=True)
    return found


def _replace(graph: fx.Graph, call: fx.Node, given: Mapping[str, Any], weight: fx.Node) -> None:
    selection = [given[name] for name in ("threshold", "importance", "k", "block")]
    with graph.inserting_before(call):
        x = graph.call_method("contiguous", (given["x"],))
        x.meta = dict(given["x"].meta)
        if given["group_size"]:
            target: Any = torch.ops.rewriter.native_sparse_int4_linear.default
            levels = [given[name] for name in ("scale", "zero", "bias")]
            args = [weight, *levels, *selection, given["group_size"]]
        else:
            target = torch.ops.rewriter.native_sparse_linear.default
            own = weight
            if weight is given["weight"]:  # stored by columns
                own = graph.call_method("t", (weight,))
                own.meta = {"example_value": weight.meta["example_value"].t()}
            args = [own, given["scale"], given["bias"], *selection]
        new = graph.call_function(target, (x, *args))
        new.meta = dict(call.meta)
    call.replace_all_uses_with(new)
    graph.erase_node(call)
