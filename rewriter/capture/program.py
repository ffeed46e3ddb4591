"""`Program`: one graph, and the Python functions generated from it.

Names of modules are data: generated code holds them in quotes, or as indices, never as code.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from rewriter.modules.generated import defined, function_of, is_word, odd
from rewriter.modules.structure import Structure

__all__ = ["Program"]

_MODE_TARGETS = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")
_DEVICES = ("cpu", "cuda")
_SOURCE = ("nn_module_stack", "stack_trace")
"""What the nodes of a graph know of where they come from."""
_NAMED = "rewriter_target_"
_TARGET = re.compile(rf"\bself\.{_NAMED}(\d+)\b")


class Program:
    """One graph and the Python functions generated from it.

    Args:
        graph: placeholders are the flat inputs; the output is a tuple of flat results.
        output: puts the flat results together; None where the graph returns the original
            structure itself (symbolic tracing).

    Attributes:
        paths: dotted names of the modules that the graph calls, and of the owners of the tensors
            that it reads.
    """

    def __init__(self, graph: fx.Graph, output: Structure | None) -> None:
        self.graph = graph
        self.output = output
        self.changes_modes = any(
            n.op == "call_function" and getattr(n.target, "__name__", "") in _MODE_TARGETS
            for n in graph.nodes
        )
        owners = {
            str(n.target) if n.op == "call_module" else str(n.target).rpartition(".")[0]: None
            for n in graph.nodes
            if n.op in ("call_module", "get_attr")
        }
        self.paths = tuple(owners)
        self._functions: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {}

    def __call__(self, root: nn.Module, leaves: Sequence[Any], device: str) -> Any:
        return self.built(self.results(root, leaves, device))

    def built(self, results: Any) -> Any:
        """The model's own output, of the flat results."""
        return results if self.output is None else self.output.build(results)

    def bind(self, root: nn.Module) -> tuple[nn.Module, ...]:
        """The modules at `paths`, for `results`: looking names up costs more than calling them."""
        return tuple(root.get_submodule(path) for path in self.paths)

    def results(
        self,
        root: nn.Module,
        leaves: Sequence[Any],
        device: str,
        bound: tuple[nn.Module, ...] | None = None,
    ) -> Any:
        """Runs the graph: its flat results.

        Args:
            root: the module that it lives on.
            leaves: its inputs.
            device: where its device literals go, or "".
            bound: the modules at `paths`, where the caller knows that they still are.
        """
        live, quick = self.ready(device)._functions[device]
        function, owner = (live, root) if bound is None or quick is None else (quick, bound)
        if self.changes_modes:
            return _restoring_modes(function, owner, leaves)
        return function(owner, *leaves)

    def traced(self, root: nn.Module, leaves: Sequence[Any]) -> Any:
        """As `results`, node by node: a tracer gets the layer and the user's line of each."""
        graph = copy.deepcopy(self.graph)
        for node in graph.nodes:
            node.meta = {k: node.meta[k] for k in _SOURCE if node.meta.get(k)}
            if node.op == "call_module":
                stack = node.meta.get("nn_module_stack", {})
                own = {str(node.target): (str(node.target), "")}
                node.meta["nn_module_stack"] = {**stack, **own}

        def run(owner: nn.Module, *given: Any) -> Any:
            return fx.Interpreter(owner, graph=graph).run(*given)

        return (_restoring_modes if self.changes_modes else _called)(run, root, leaves)

    def ready(self, device: str = "") -> Program:
        """With the functions of this device, which torch.compile could not trace the making of."""
        if device not in self._functions:
            self._functions[device] = self._compile(device)
        return self

    def _compile(self, device: str) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
        """A function that looks modules up by name, and one that is given them."""
        by_lookup = odd(self.graph)
        graph, targets = (copy.deepcopy(self.graph), []) if by_lookup else _nameless(self.graph)
        if device:
            for node in graph.nodes:
                node.args = fx.node.map_aggregate(node.args, lambda a: _moved(a, device))
                node.kwargs = fx.node.map_aggregate(node.kwargs, lambda a: _moved(a, device))
        if by_lookup:
            return function_of(graph), None
        code = graph.python_code("self")
        index = {path: i for i, path in enumerate(self.paths)}

        def live(found: re.Match[str]) -> str:
            _, target = targets[int(found[1])]
            return functools.reduce(_member, target.split("."), "self")

        def quick(found: re.Match[str]) -> str:
            op, target = targets[int(found[1])]
            if op == "call_module":
                return f"self[{index[target]}]"
            owner, _, name = target.rpartition(".")
            return _member(f"self[{index[owner]}]", name)

        return (
            defined(_TARGET.sub(live, code.src), code.globals),
            defined(_TARGET.sub(quick, code.src), code.globals),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # a finished graph never changes again

    def __getstate__(self) -> dict[str, Any]:
        return {"nodes": _dump(self.graph), "output": self.output}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(_restore(state["nodes"]), state["output"])  # type: ignore[misc]
        self.ready()


def _nameless(graph: fx.Graph) -> tuple[fx.Graph, list[tuple[str, str]]]:
    """A copy whose names are all ours, and per number in them (operation, target)."""
    copied = copy.deepcopy(graph)
    targets: list[tuple[str, str]] = []
    for i, node in enumerate(copied.nodes):
        if node.op in ("call_module", "get_attr"):
            targets.append((node.op, str(node.target)))
            node.target = f"{_NAMED}{len(targets) - 1}"
        elif node.op == "placeholder" and "*" not in str(node.target):
            node.target = f"rewriter_input_{i}"
    return copied, targets


def _member(owner: str, name: str) -> str:
    return f"{owner}.{name}" if is_word(name) else f"getattr({owner}, {name!r})"


def _moved(argument: Any, device: str) -> Any:
    """Device literals follow the module: a graph captured on the CPU runs where its inputs are."""
    return torch.device(device) if isinstance(argument, torch.device) else argument


def _called(function: Callable[..., Any], root: Any, leaves: Sequence[Any]) -> Any:
    return function(root, *leaves)


def _restoring_modes(function: Callable[..., Any], root: Any, leaves: Sequence[Any]) -> Any:
    """Runs code that switches grad or autocast mode by calls, not by `with`: restores both when
    an exception leaves it half way. All of these modes belong to the calling thread."""
    if torch.compiler.is_compiling():
        return function(root, *leaves)
    grad = torch.is_grad_enabled()
    cache = torch.is_autocast_cache_enabled()
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    try:
        return function(root, *leaves)
    except BaseException:
        torch._C._set_grad_enabled(grad)
        torch.set_autocast_cache_enabled(cache)
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        while torch.autocast_increment_nesting() > depth:
            torch.autocast_decrement_nesting()
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        torch.autocast_decrement_nesting()
        raise


# Graphs are pickled as plain lists: OpOverloads and fx nodes do not pickle themselves.


@dataclass(frozen=True)
class _Ref:
    name: str


@dataclass(frozen=True)
class _Op:
    path: tuple[str, ...]


def _dump(graph: fx.Graph) -> list[tuple[Any, ...]]:
    def plain(argument: Any) -> Any:
        return _Ref(argument.name) if isinstance(argument, fx.Node) else argument

    rows = []
    for node in graph.nodes:
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload):
            target = _Op((target.namespace, target._opname, target._overloadname))
        elif isinstance(target, torch._ops.OpOverloadPacket):
            target = _Op(tuple(target._qualified_op_name.split("::")))
        args = tuple(_convert(a, plain) for a in node.args)
        kwargs = {k: _convert(a, plain) for k, a in node.kwargs.items()}
        rows.append((node.op, node.name, target, args, kwargs))
    return rows


def _restore(rows: list[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def node_of(argument: Any) -> Any:
        return nodes[argument.name] if isinstance(argument, _Ref) else argument

    for op, name, target, args, kwargs in rows:
        if isinstance(target, _Op):
            target = functools.reduce(getattr, target.path, torch.ops)
        args = tuple(_convert(a, node_of) for a in args)
        kwargs = {k: _convert(a, node_of) for k, a in kwargs.items()}
        nodes[name] = graph.create_node(op, target, args, kwargs, name=name)
    return graph


def _convert(argument: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(_convert(a, leaf) for a in argument)
    if isinstance(argument, dict):
        return {k: _convert(a, leaf) for k, a in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_convert(a, leaf) for a in (argument.start, argument.stop, argument.step)))
    return leaf(argument)
