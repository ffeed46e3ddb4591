"""What a package is given, checked by the package itself: `package_input` at each of its inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from rewriter.kernels import package_inputs
from rewriter.kernels.package_inputs import DTYPES

__all__ = ["inputs_checked"]


@contextlib.contextmanager
def inputs_checked(program: ExportedProgram) -> Iterator[None]:
    """The graph reads its user's inputs through `package_input`, for the time being.

    An input that the graph writes to stays as it is (a copy would keep what was written), and so do
    inputs on other devices, which no kernel of C++ reads.
    """
    graph = program.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    wanted = program.graph_signature.user_inputs if package_inputs.refusal() is None else ()
    behind = inputs[-1].next if inputs else graph.output_node()
    known: dict[str, tuple[Node, int]] = {}  # a size that varies → where it is read first
    made: list[tuple[Node, list[Node]]] = []
    try:
        for node in inputs:
            if node.name in wanted and _is_on_cpu(node) and not _is_written(node):
                with graph.inserting_before(behind):
                    made.append((node, _read_through_a_check(program, node, known)))
        yield
    finally:
        for node, added in reversed(made):
            added[-1].replace_all_uses_with(node)
            for one in reversed(added):
                graph.erase_node(one)


def _is_on_cpu(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu"


def _is_written(node: Node) -> bool:
    """Whether a node of the graph writes to the memory of this one's value."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is None:
            continue
        own = [a.alias_info for a, given in zip(schema.arguments, user.args, strict=False)
               if given is node and a.alias_info is not None]  # fmt: skip
        if any(alias.is_write for alias in own) or (own and _is_written(user)):
            return True
    return False


def _read_through_a_check(
    program: ExportedProgram, node: Node, known: dict[str, tuple[Node, int]]
) -> list[Node]:
    """What was added: sizes that other inputs have, then the copy that all users read now."""
    graph, value, added = program.graph, node.meta["val"], []
    sizes: list[Any] = []
    for d, size in enumerate(value.shape):
        if isinstance(size, int):
            sizes.append(size)
            continue
        source = known.setdefault(str(size), (node, d))
        if source[0] is node or not size.node.expr.is_symbol:
            # nothing that the program knows of its sizes keeps it from reading what is not there
            known_range = program.range_constraints.get(size.node.expr)
            sizes.append(-2 if known_range is not None and known_range.lower <= 0 else -1)
            continue
        added.append(graph.call_function(torch.ops.aten.sym_size.int, source))
        added[-1].meta["val"] = size
        sizes.append(added[-1])
    dtype = DTYPES.index(value.dtype) if value.dtype in DTYPES else -1
    arguments = node, node.name, sizes, dtype, int(_is_channels_last(value))
    copied = graph.call_function(torch.ops.rewriter.package_input.default, arguments)
    copied.meta["val"] = torch.ops.rewriter.package_input.default(
        value, node.name, list(value.shape), *arguments[3:]
    )
    node.replace_all_uses_with(copied, lambda user: user not in (*added, copied))
    return [*added, copied]


def _is_channels_last(value: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if value.is_contiguous() or value.dim() not in formats:
        return False
    return value.is_contiguous(memory_format=formats[value.dim()])
