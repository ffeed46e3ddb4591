"""From an exported program to the normal form: an fx graph that lives on the module tree.

The exported graph lifts every parameter to an input and opens every module up into aten ops. Here
parameters become `get_attr` again, and the ops of one call of a leaf module (Linear, LayerNorm,
Dropout, BatchNorm, transformers' Conv1D, …) become one `call_module` again, so that replacing the
module takes effect wherever it is called, in every graph.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter

from rewriter.capture.signature import Dims
from rewriter.errors import CaptureError
from rewriter.modules.tensors import CONSTANT
from rewriter.modules.tree import find, has_hooks, submodule
from rewriter.sites import is_leaf, user_line

__all__ = ["rehost", "size_rules"]

_Stack = dict[str, tuple[str, Any]]


def rehost(
    program: ExportedProgram, module: nn.Module, names: Sequence[str], wrapper: str
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The normal form of an exported program.

    Args:
        program: exported from a wrapper that holds `module` under the name `wrapper`.
        module: the module tree that the graph will live on.
        names: of the flat inputs.
        wrapper: attribute name of `module` in the exported module.

    Returns:
        The graph, and the constants it needs, by the buffer name that it reads.

    Raises:
        CaptureError: a size or a number in the graph depends on the data. Export fixes the branch
            that the model takes on it, and a call with other data would fail or be wrong.
    """
    for node in program.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            where = user_line(node) or str(node.target)
            raise CaptureError(f"a value computed at {where} depends on the data")
    flat = fx.Graph()
    constants: dict[str, Tensor] = {}
    environment: dict[fx.Node, Any] = {}
    prefix = wrapper + "."
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    remaining = list(names)
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            new = flat.placeholder(remaining.pop(0))
        else:
            assert spec.target is not None, spec
            target = spec.target.removeprefix(prefix)
            if spec.kind is InputKind.CONSTANT_TENSOR and not isinstance(
                find(module, target), Tensor
            ):
                constant = program.constants[spec.target]
                assert isinstance(constant, Tensor), spec
                taken = {*module._buffers, *constants}
                target = next(n for i in itertools.count() if (n := f"{CONSTANT}{i}") not in taken)
                constants[target] = constant
            new = flat.create_node("get_attr", target)
        new.meta = dict(node.meta)
        environment[node] = new
    for node in program.graph.nodes:
        if node.op == "output":
            flat.output(tuple(fx.node.map_arg(node.args[0], lambda n: environment[n])))
        elif node.op != "placeholder":
            environment[node] = _inline(flat, node, environment, program.graph_module, prefix)
    graph = _raise_leaves(flat, module)
    _sink_attributes(graph)
    return graph, constants


def _inline(
    flat: fx.Graph, node: fx.Node, environment: dict[fx.Node, Any], owner: nn.Module, prefix: str
) -> Any:
    """Copies one node; regions under no_grad or autocast, which export wraps into submodules, are
    laid open between the calls that switch the mode, so that their layers are sites too."""
    if node.op == "get_attr":
        return getattr(owner, str(node.target))
    # torch._C's and amp's own functions below: as calls, Dynamo and export know no public form
    if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        enabled, body, *rest = node.args
        assert isinstance(body, fx.Node)
        outside = flat.call_function(torch.is_grad_enabled)  # the caller's mode, at run time
        flat.call_function(torch._C._set_grad_enabled, (enabled,))
        results = _inline_body(flat, environment[body], rest, environment, prefix)
        flat.call_function(torch._C._set_grad_enabled, (outside,))
        return results
    if node.target is torch.ops.higher_order.wrap_with_autocast:
        device, dtype, enabled, cache, body, *rest = node.args
        assert isinstance(body, fx.Node)
        mode = flat.call_function(
            torch.amp.autocast_mode._enter_autocast, (device, dtype, enabled, cache)
        )
        results = _inline_body(flat, environment[body], rest, environment, prefix)
        flat.call_function(torch.amp.autocast_mode._exit_autocast, (mode,))
        return results
    argument = node.args[0] if node.args else None
    if isinstance(argument, fx.Node) and isinstance(environment[argument], tuple):
        _, index = node.args  # getitem on the results of an inlined region
        return environment[argument][index]
    new = flat.node_copy(node, lambda n: environment[n])
    stack: _Stack = {}
    for key, (fqn, cls) in node.meta.get("nn_module_stack", {}).items():
        if fqn.startswith(prefix):
            stack[key] = (fqn.removeprefix(prefix), cls)
    new.meta["nn_module_stack"] = stack
    return new


def _inline_body(
    flat: fx.Graph, body: fx.GraphModule, arguments: Any, outer: dict[fx.Node, Any], prefix: str
) -> tuple[Any, ...]:
    environment: dict[fx.Node, Any] = {}
    given = iter(arguments)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            value = next(given)
            environment[node] = outer[value] if isinstance(value, fx.Node) else value
        elif node.op == "output":
            results = node.args[0]
            return tuple(environment[r] if isinstance(r, fx.Node) else r for r in results)
        else:
            environment[node] = _inline(flat, node, environment, body, prefix)
    raise AssertionError("a graph without output")


def _raise_leaves(flat: fx.Graph, module: nn.Module) -> fx.Graph:
    calls: dict[str, list[fx.Node]] = {}
    targets: dict[str, str] = {}
    for node in flat.nodes:
        if node.op != "call_function":
            continue
        for key, (fqn, _) in node.meta.get("nn_module_stack", {}).items():
            if is_leaf(submodule(module, fqn)):
                calls.setdefault(key, []).append(node)
                targets[key] = fqn
                break
    raised: dict[fx.Node, tuple[str, fx.Node]] = {}  # output node → (target, input node)
    dropped: set[fx.Node] = set()
    for key, nodes in calls.items():
        call = _single_in_out(nodes, targets[key], module)
        if call is not None:
            source, result, shared = call
            raised[result] = (targets[key], source)
            dropped.update(set(nodes) - shared)
        elif has_hooks(module.get_submodule(targets[key])):
            raise CaptureError(
                f"{targets[key]} has hooks, and its call is no single node of the graph, which "
                "would run past them"
            )
    graph = fx.Graph()
    environment: dict[fx.Node, fx.Node] = {}
    for node in flat.nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], lambda n: environment[n]))
        elif node in raised:
            target, source = raised[node]
            new = graph.create_node("call_module", target, (environment[source],))
            new.meta = dict(node.meta)
            environment[node] = new
        elif node.target is torch.ops.aten._assert_tensor_metadata.default or node in dropped:
            continue
        else:
            environment[node] = graph.node_copy(node, lambda n: environment[n])
    return graph


def _single_in_out(
    nodes: list[fx.Node], target: str, module: nn.Module
) -> tuple[fx.Node, fx.Node, set[fx.Node]] | None:
    """The one tensor that goes into a call of a leaf module, the one that comes out, and the sizes
    computed on the way that others read too: a trace computes equal sizes once."""
    inside = set(nodes)
    leaf = module.get_submodule(target)
    tensors = {id(t) for t in (*leaf.parameters(), *leaf.buffers())}  # a tie has another's name
    sources: dict[fx.Node, None] = {}
    results: list[fx.Node] = []
    shared: set[fx.Node] = set()
    for node in nodes:
        for source in node.all_input_nodes:
            name = str(source.target)
            own = source.op == "get_attr" and (
                name.startswith(f"{target}.") or id(find(module, name)) in tensors
            )
            if source not in inside and not own and _is_tensor_value(source):
                sources[source] = None
        if any(user not in inside for user in node.users):
            (results.append if _is_tensor_value(node) else shared.add)(node)
    for node in reversed(nodes):  # and what those sizes are computed from
        if node in shared:
            shared.update(inside.intersection(node.all_input_nodes))
    if len(sources) != 1 or len(results) != 1 or any(map(_is_tensor_value, shared)):
        return None
    return next(iter(sources)), results[0], shared


def _is_tensor_value(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _sink_attributes(graph: fx.Graph) -> None:
    """Moves every get_attr to its first use and drops those that nothing uses: it keeps the
    generated code readable and lets a rewrite delete a parameter that only one place read."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        if not node.users:
            graph.erase_node(node)
            continue
        min(node.users, key=order.__getitem__).prepend(node)


def size_rules(program: ExportedProgram, leaves: Sequence[Tensor]) -> Dims:
    """Which sizes of the flat inputs the exported graph serves."""
    kinds = {s.arg.name: s.kind for s in program.graph_signature.input_specs}
    values = [
        n.meta["val"]
        for n in program.graph.nodes
        if n.op == "placeholder" and kinds[n.name] is InputKind.USER_INPUT
    ]
    shapes: list[list[int | str]] = []
    ranges: dict[str, tuple[int, int | None]] = {}
    guards: list[str] = []
    environment: Any = None
    for value, leaf in zip(values, leaves, strict=True):
        row: list[int | str] = []
        for dim, size in enumerate(value.shape):
            if isinstance(size, int) or size.node.expr.is_number:
                # a batch of one is traced as two rows; if that got fixed, it is fixed at one
                row.append(leaf.shape[dim])
                continue
            environment = size.node.shape_env
            expression = size.node.expr
            name = str(expression)
            if not expression.is_Symbol:
                name = f"d{len(ranges)}"
                guards.append(f"{name} == {_python(expression)}")
                ranges[name] = (0, None)
            else:
                bounds = program.range_constraints[expression]
                high = None if bounds.upper in (int_oo, sympy.oo) else int(bounds.upper)
                ranges[name] = (int(bounds.lower), high)
            row.append(name)
        shapes.append(row)
    for guard in environment.guards if environment is not None else []:
        expression = environment.replace(guard.expr)
        symbols = {str(s) for s in expression.free_symbols}
        if expression is not sympy.true and symbols:
            guards.append(_python(expression))
    free = {s for g in guards for s in re.findall(r"\b[a-z]+\d+\b", g)}
    if not free <= set(ranges):  # a condition that cannot be checked: only these sizes are known
        return Dims([list(leaf.shape) for leaf in leaves])
    return Dims(shapes, ranges, list(dict.fromkeys(guards)))


def _python(expression: Any) -> str:
    return str(PythonPrinter().doprint(expression))
