"""Carries a plan back to the joint graph, and cuts that into a forward and a backward."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.partitioners import _extract_fwd_bwd_modules, is_not_collective
from torch.fx.node import map_aggregate

from rewriter.errors import OptionError
from rewriter.kernels import ops
from rewriter.planner.joint.builder import Builder
from rewriter.planner.joint.joint import Joint
from rewriter.planner.search.choices import Packing
from rewriter.planner.search.simulate import Decisions, schedule

__all__ = ["split"]

aten = torch.ops.aten
_FORM = {"sign": "bits"}
_INT = {"bf16": torch.bfloat16, "int32": torch.int32}


def split(
    module: fx.GraphModule, joint: Joint, decisions: Decisions, num_fwd_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(forward, backward) in the calling convention of AOTAutograd.

    The joint graph is written anew: the forward as it was, with the packing; then the backward in
    the order of the simulation, where what runs again is a node of its own. PyTorch's own code
    then cuts that graph in two.
    """
    rebuilt = _Rebuilt(module, joint, decisions, num_fwd_outputs)
    graph, tensors, sizes = rebuilt.run()
    whole = fx.GraphModule(module, graph)
    forward, backward = _extract_fwd_bwd_modules(
        whole, saved_values=tensors, saved_sym_nodes=sizes, num_fwd_outputs=num_fwd_outputs
    )
    for part in (forward, backward):
        part.graph.eliminate_dead_code(is_impure_node=is_not_collective)
        part.recompile()
    return forward, backward


class _Rebuilt:
    def __init__(
        self, module: fx.GraphModule, joint: Joint, decisions: Decisions, num_fwd_outputs: int
    ) -> None:
        self.module, self.joint, self.decisions = module, joint, decisions
        self.num_fwd_outputs = num_fwd_outputs
        self.graph = fx.Graph()
        values = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
        self.build = Builder(self.graph, values)
        self.first: dict[fx.Node, fx.Node] = {}  # of the forward
        self.second: dict[fx.Node, fx.Node] = {}  # of the backward
        self.unpack: dict[int, Callable[[], fx.Node]] = {}
        self.steps = {s.name for s in joint.steps}
        self.kept = {joint.values[v].node for v in decisions.kept}

    def run(self) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
        self.forward()
        end = len(self.graph.nodes)
        self.backward()
        forward = set(list(self.graph.nodes)[:end])
        crossing: dict[fx.Node, None] = {}
        for node in list(self.graph.nodes)[end:]:
            if node.op != "output":
                crossing.update(dict.fromkeys(a for a in node.all_input_nodes if a in forward))
        output = next(iter(reversed(self.graph.nodes)))
        flat: list[Any] = []
        map_aggregate(output.args[0], flat.append)
        back = [n for n in flat[self.num_fwd_outputs :] if isinstance(n, fx.Node)]
        crossing.update(dict.fromkeys(n for n in back if n in forward))
        tangents = {n for n in crossing if n.op == "placeholder" and "tangents" in str(n.target)}
        saved = [n for n in crossing if n not in tangents and n.op != "get_attr"]
        tensors = [n for n in saved if isinstance(n.meta.get("val"), Tensor)]
        sizes = [n for n in saved if n not in set(tensors)]
        for node in sizes:
            if not isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
                kind = type(node.meta.get("val")).__name__
                raise OptionError(
                    f"memory_budget: the backward of this model reads a {kind} of its forward "
                    f"({node.name}), which no plan can hand on: leave memory_budget out for it"
                )
        return self.graph, tensors, sizes

    def forward(self) -> None:
        backward = set(self.joint.backward_nodes)
        packed = {self.joint.values[v].node: p for v, p in self.decisions.packed.items()}
        for node in self.module.graph.nodes:
            if node in backward or node.op == "output":
                continue
            copied = self.build.copy(node, lambda n: self.first[n])
            self.first[node] = copied
            if copied.op == "call_function" and copied.is_impure():
                # or it would run a second time where all that it reads is saved
                copied.meta["partitioner_tag"] = "must_be_in_forward"
            if node in packed:
                packing = packed[node]
                self.unpack[packing.value] = self.pack(packing, copied)

    def pack(self, packing: Packing, node: fx.Node) -> Callable[[], fx.Node]:
        """Emits the smaller form; returns what emits the way back."""
        build, value = self.build, self.joint.values[packing.value]
        dtype, last = value.dtype, value.order == "channels_last"
        if packing.kind in _INT:
            small = build(aten._to_copy.default, node, dtype=_INT[packing.kind])
            return lambda: build(aten._to_copy.default, small, dtype=dtype)
        if last:
            node = build(aten.permute.default, node, [0, 2, 3, 1])
        size, form = build.sizes(node), ops.forms()[_FORM.get(packing.kind, packing.kind)]
        packed = form.pack(build, node)

        def back() -> fx.Node:
            found: fx.Node = form.unpack(build, packed, size, dtype)
            return found

        if not last:
            return back
        return lambda: build(aten.permute.default, back(), [0, 3, 1, 2])

    def backward(self) -> None:
        joint, build = self.joint, self.build
        build.backward = True
        for event in schedule(joint, self.decisions):
            if event.what in ("unpack", "route"):
                node = joint.values[event.number].node
                assert node is not None
                if event.what == "unpack":
                    self.second[node] = self.unpack[event.number]()
                else:
                    route = self.decisions.routes[event.number]
                    self.second[node] = route.emit(build, self.get)
                continue
            step = joint.steps[event.number].node
            assert step is not None
            self.emit(step)
        output = next(iter(reversed(self.module.graph.nodes)))
        flat: list[Any] = []
        map_aggregate(output.args[0], flat.append)
        results = [
            (self.first[n] if i < self.num_fwd_outputs else self.get(n))
            if isinstance(n, fx.Node)
            else n
            for i, n in enumerate(flat)
        ]
        copied = self.graph.output(type(output.args[0])(results))
        copied.meta.update(output.meta)

    def emit(self, node: fx.Node) -> fx.Node:
        """Copies a node into the backward, and its results right after it: a tuple that waits for
        one of them would keep all of them alive."""
        for argument in node.all_input_nodes:
            self.get(argument)
        copied = self.second[node] = self.build.copy(node, self.get)
        for user in node.users:
            if user.target is operator.getitem and user not in self.kept:
                self.second.setdefault(user, self.build.copy(user, lambda _: copied))
        return copied

    def get(self, node: fx.Node) -> fx.Node:
        """The node of the new graph that stands for this one in the backward."""
        found = self.second.get(node)
        if found is None and (node.op == "placeholder" or self.saved(node)):
            found = self.first[node]
        if found is not None:
            return found
        assert node.name not in self.steps, f"{node.name} was not scheduled"
        return self.emit(node)

    def saved(self, node: fx.Node) -> bool:
        """Kept by the plan, or a size of the forward."""
        size = not self.joint.node_values.get(node.name) and node in self.first
        return node in self.kept or (size and node.op != "get_attr")
