"""Reads a joint forward and backward graph, as AOTAutograd gives it to a partitioner: a `Joint`.

Sizes that are symbols count as what they were at capture.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental import symbolic_shapes
from torch.fx.node import map_aggregate

from rewriter.cost import Device
from rewriter.cost.formulas import flop_formula, traffic
from rewriter.cost.memory import tensors_in, traffic_bytes
from rewriter.cost.work import Work, work_of
from rewriter.planner.joint.joint import Joint, Step, Value
from rewriter.planner.joint.pricing import Pricing
from rewriter.sites import user_line
from rewriter.spellings import mutates

__all__ = ["hint", "read_joint"]


def read_joint(
    module: fx.GraphModule,
    num_fwd_outputs: int,
    device: Device | None = None,
    fused: bool = False,
) -> Joint:
    """Reads a joint graph with `meta["val"]` on its nodes.

    Args:
        module: the graph.
        num_fwd_outputs: how many of its results are the forward's.
        device, fused: as of `Pricing`.
    """
    joint = Joint()
    nodes = list(module.graph.nodes)
    joint.pricing = Pricing.of(_device_of(nodes), device, fused)
    reader = _Reader(joint)
    reader.overwritten = _overwritten(nodes)
    backward = _backward(nodes, num_fwd_outputs)
    joint.backward_nodes = [n for n in nodes if n in backward]
    for node in nodes:
        if node.op == "output":
            flat: list[Any] = []
            map_aggregate(node.args[0], flat.append)
            given = node.meta.get("desc") or ()
            news = [n for n, d in zip(flat, given, strict=False) if _is_update(d)]
            joint.results = reader.of_nodes(flat[:num_fwd_outputs])
            joint.updates = reader.of_nodes(news)
            joint.results -= joint.updates
            joint.gradients = reader.of_nodes(flat[num_fwd_outputs:])
        else:
            reader.read(node, node in backward)
    joint.dropped = frozenset(
        v
        for n in nodes
        if n not in backward and _recomputed(n)
        for v in joint.node_values.get(n.name, ())
    )
    return joint


def _backward(nodes: Sequence[fx.Node], num_fwd_outputs: int) -> set[fx.Node]:
    """All that is needed neither for what the forward returns nor for what it writes."""
    tangents: set[fx.Node] = set()
    for node in nodes:
        if _is_tangent(node) or any(a in tangents for a in node.all_input_nodes):
            tangents.add(node)
    flat: list[Any] = []
    map_aggregate(nodes[-1].args[0], flat.append)
    needed = {n for n in flat[:num_fwd_outputs] if isinstance(n, fx.Node)}
    needed |= {n for n in nodes if n not in tangents and _writes(n) and not _tagged_backward(n)}
    # a size is passed on as a number, so that no tensor has to wait for being asked its size
    needed |= {n for n in nodes if n not in tangents and _is_size(n)}
    stack = list(needed)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                stack.append(source)
    # what an operation of the forward returns, the forward can return
    needed |= {n for n in nodes if n.target is operator.getitem and n.args[0] in needed}
    given = ("placeholder", "output")
    return {n for n in nodes if n.op not in given and (n in tangents or n not in needed)}


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def _writes(node: fx.Node) -> bool:
    """It has an effect besides what it returns."""
    return node.op == "call_function" and node.is_impure(impure_random=False)


def _tagged_backward(node: fx.Node) -> bool:
    return bool(node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward"))


def _recomputed(node: fx.Node) -> bool:
    """A checkpoint region of the user's, or a policy of theirs, has it run again."""
    policy = getattr(node.meta.get("recompute"), "name", "")
    return policy in ("MUST_RECOMPUTE", "PREFER_RECOMPUTE")


def _is_update(description: object) -> bool:
    return hasattr(description, "mutated_input")


def _overwritten(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Inputs and buffers that the forward changes, such as running statistics, with their views:
    AOTAutograd returns their new contents and writes them after the forward."""
    outputs = nodes[-1].meta.get("desc") or ()
    changed = [d.mutated_input for d in outputs if _is_update(d)]
    found = {n for n in nodes if n.op == "placeholder" and n.meta.get("desc") in changed}
    for node in nodes:
        view = isinstance(node.target, OpOverload) and node.target.is_view
        if view and found & set(node.all_input_nodes):
            found.add(node)
    return found


def _device_of(nodes: Sequence[fx.Node]) -> torch.device:
    for node in nodes:
        for tensor in _storages(node.meta.get("val")):
            return tensor.device
    return torch.device("cpu")


def _is_tangent(node: fx.Node) -> bool:
    return node.op == "placeholder" and "tangents" in str(node.target)


def _storages(value: object) -> list[Tensor]:
    """The strided tensors of a node's `val`."""
    return [t for t in tensors_in(value) if t.layout is torch.strided]


def hint(value: Any) -> int:
    """A size as a number: of a symbol, what it was at capture."""
    # torch 2.11 knows it by its former name
    named = "optimization_hint" if hasattr(symbolic_shapes, "optimization_hint") else "size_hint"
    return int(getattr(symbolic_shapes, named)(value, fallback=4096))


class _Reader:
    """Fills a Joint, node by node."""

    def __init__(self, joint: Joint) -> None:
        self.joint = joint
        self.overwritten: set[fx.Node] = set()
        self.known: dict[int, int] = {}  # storage → value
        self.weights = 0  # bytes of all that the caller holds: weights, most of all
        self.alive: list[object] = []  # so that no storage's address is used again

    def of_nodes(self, nodes: Sequence[Any]) -> frozenset[int]:
        names = [n.name for n in nodes if isinstance(n, fx.Node)]
        return frozenset(v for n in names for v in self.joint.node_values.get(n, ()))

    def read(self, node: fx.Node, backward: bool) -> None:
        tensors = _storages(node.meta.get("val"))
        if not tensors and not mutates(node):
            return  # a size, a subgraph, a state
        keys = [t.untyped_storage()._cdata for t in tensors]
        self.alive.append(tensors)
        sources = [v for n in node.all_input_nodes for v in self.joint.node_values.get(n.name, ())]
        fresh = [(k, t) for k, t in zip(keys, tensors, strict=True) if k not in self.known]
        runs = node.op == "call_function" and node.target is not operator.getitem
        number = len(self.joint.steps) if runs else None
        for key, tensor in fresh:
            given = ""
            if not runs:
                given = "tangent" if _is_tangent(node) else "input"
            self.known[key] = len(self.joint.values)
            size = hint(tensor.untyped_storage().nbytes())
            self.weights += size if given == "input" else 0
            self.joint.values.append(
                Value(
                    node.name,
                    size,
                    number,
                    given,
                    user_line(node) or "",
                    _layer(node),
                    tensor.dtype,
                    tuple(map(hint, tensor.shape)),
                )
            )
        values = tuple(dict.fromkeys(self.known[k] for k in keys))
        if isinstance(node.meta.get("val"), Tensor):
            self._whole(node, values, node.meta["val"])
        self.joint.node_values[node.name] = values
        if not runs or (not fresh and not mutates(node)):
            return  # a view
        made = tuple(dict.fromkeys(self.known[k] for k, _ in fresh))
        work = self._work(node, tensors, backward)
        self.joint.steps.append(
            Step(
                node.name,
                str(node.target).removesuffix(".default"),
                tuple(dict.fromkeys(sources)),
                made,
                self.joint.pricing.seconds(work, self.weights),
                work.flops,
                backward,
                _fixed(node) or self._late(node),
                user_line(node) or "",
                node,
            )
        )

    def _late(self, node: fx.Node) -> str:
        if self.overwritten & set(node.all_input_nodes):
            return "it reads what the forward overwrites"
        return ""

    def _whole(self, node: fx.Node, values: tuple[int, ...], tensor: Tensor) -> None:
        """The first node with a tensor in a storage made the storage: it is what is kept."""
        (number,) = values
        value = self.joint.values[number]
        if value.node is None:
            order = ""
            if tensor.is_contiguous():
                order = "contiguous"
            elif tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
                order = "channels_last"
            shape = tuple(map(hint, tensor.shape))
            self.joint.values[number] = replace(
                value, node=node, order=order, dtype=tensor.dtype, shape=shape
            )

    def _work(self, node: fx.Node, made: list[Tensor], backward: bool) -> Work:
        func = node.target
        if not isinstance(func, OpOverload):
            size = sum(hint(t.numel()) * t.element_size() for t in made)
            return Work(str(func), "other", "float32", 0, size, size, backward=backward)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        kwargs = dict(kwargs)
        read = tensors_in((args, list(kwargs.values())))
        formula, _, _ = flop_formula(func)
        out = node.meta.get("val")
        flops = hint(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        moved = traffic_bytes(func, traffic(func), read, made, args, kwargs, hint)
        came, went = map(hint, moved)
        held = sum(hint(t.untyped_storage().nbytes()) for t in read if self._given(t))
        figures, weights = (flops, came, went), min(held, came)
        return work_of(func, args, kwargs, read, made, figures, weights, hint, backward)

    def _given(self, tensor: Tensor) -> bool:
        number = self.known.get(tensor.untyped_storage()._cdata)
        return number is not None and self.joint.values[number].given == "input"


def _layer(node: fx.Node) -> str:
    """The innermost module that a node comes from; Dynamo writes `L['model'].fc` for `fc`."""
    stack = node.meta.get("nn_module_stack")
    name = next(reversed(stack.values()))[0] if stack else ""
    return re.sub(r"^L\['\w+'\]\.?", "", str(name))


def _fixed(node: fx.Node) -> str:
    func = node.target
    if not isinstance(func, OpOverload):
        return "a higher-order operator"
    if func._schema.is_mutable:
        return "it changes what it is given"
    if torch.Tag.nondeterministic_seeded in func.tags and _random(node):
        return "it is random"
    if func.namespace in ("_c10d_functional", "c10d_functional", "_dtensor"):
        return "it talks to other processes"
    if node.meta.get("recompute") is not None:
        from torch.utils.checkpoint import CheckpointPolicy

        if node.meta["recompute"] == CheckpointPolicy.MUST_SAVE:
            return "the user's checkpoint policy keeps it"
    return ""


def _random(node: fx.Node) -> bool:
    """Attention is tagged as random, and is where it drops out something."""
    func: Any = node.target
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            value = node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p", 0.0)
            return bool(value != 0.0)
        if argument.name == "train" and i < len(node.args):
            return bool(node.args[i])
    return True
