"""Graphs as Python functions, whatever their names: a name is never code.

fx writes the names of modules, tensors, arguments and methods into the code that it generates, as
they are. Here whatever would read as something else (a keyword, a quote, a newline, letters that
Python folds into others) is reached by a lookup, whose name is a value.
"""

from __future__ import annotations

import itertools
import keyword
import linecache
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import fx, nn

__all__ = ["defined", "function_of", "is_word", "odd", "unwritable"]

_counter = itertools.count()
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def function_of(graph: fx.Graph) -> Callable[..., Any]:
    """f(module, *inputs) of a graph that lives on `module`."""
    code = _written(graph).python_code("self")
    return defined(code.src, code.globals)


def defined(source: str, names: Mapping[str, Any]) -> Callable[..., Any]:
    """The function `forward` of this source; tracebacks and debuggers show its lines.

    Args:
        source: as fx generates it.
        names: what it reads besides.
    """
    filename = f"<rewriter graph {next(_counter)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace = dict(names)
    exec(compile(source, filename, "exec"), namespace)  # noqa: S102 (fx's own codegen)
    return cast("Callable[..., Any]", namespace["forward"])


def odd(graph: fx.Graph) -> bool:
    """Whether a name in the graph besides those of modules and tensors would not read the same as
    code: of an argument, a method, an attribute."""
    return not all(
        node.name != "self" and all(map(is_word, node.kwargs))
        if node.op in ("get_attr", "call_module")
        else _plain(node)
        for node in graph.nodes
    )


def unwritable(root: nn.Module) -> str | None:
    """The first name of a module, parameter or buffer that fx and `torch.export` cannot write
    into code as it is; None where there is none."""
    names = itertools.chain(
        (n for n, _ in root.named_modules()),
        (n for n, _ in root.named_parameters()),
        (n for n, _ in root.named_buffers()),
    )
    parts = (part for name in names for part in name.split(".") if name)
    return next((p for p in parts if not (p.isdigit() or is_word(p))), None)


def is_word(name: str) -> bool:
    """Whether a name reads the same as Python code; Python folds letters beyond ASCII."""
    return _WORD.fullmatch(name) is not None and not keyword.iskeyword(name)


def _reads(target: str) -> bool:
    return all(p.isdigit() or is_word(p) for p in target.split("."))


def _plain(node: fx.Node) -> bool:
    """Whether fx's code for a node names what the node names."""
    if node.name == "self" or not all(map(is_word, node.kwargs)):
        return False
    if node.op == "placeholder":
        name = str(node.target).lstrip("*")
        return name != "self" and is_word(name)
    if node.op in ("get_attr", "call_module", "call_method"):
        return _reads(str(node.target))
    if node.target is getattr:
        return not isinstance(node.args[1], str) or is_word(node.args[1])
    return True


def _written(graph: fx.Graph) -> fx.Graph:
    """The graph itself, or one that does the same and holds no name that is not a word."""
    if all(map(_plain, graph.nodes)):
        return graph
    new = fx.Graph()
    root = new.placeholder("self")  # fx takes the first argument of that name for the module
    twins: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = (fx.node.map_arg(a, twins.__getitem__) for a in (node.args, node.kwargs))
        if node.op == "output":
            new.output(args[0])
        elif node.op == "placeholder":
            twins[node] = twin = new.create_node("placeholder", "x", args, {}, node.name)
            stars = re.match(r"\**", str(node.target))
            twin.target = f"{stars.group() if stars else ''}{twin.name}"
        elif _plain(node) and node.op not in ("get_attr", "call_module"):
            # fx's code lets go of `self` after its last use as a node
            twins[node] = new.node_copy(node, twins.__getitem__)
        else:
            values = (root, *args, *kwargs.values())
            twins[node] = new.call_function(_looking_up(node, tuple(kwargs)), values)
    return new


def _looking_up(node: fx.Node, keywords: tuple[str, ...]) -> Callable[..., Any]:
    """What a node does, as a function of the module, its arguments and those under `keywords`."""
    op, target = node.op, cast(Any, node.target)

    def looked_up(root: nn.Module, *values: Any) -> Any:
        count = len(values) - len(keywords)
        given, named = values[:count], dict(zip(keywords, values[count:], strict=True))
        if op == "get_attr":
            return _attribute(root, target)
        if op == "call_module":
            return _module(root, target)(*given, **named)
        if op == "call_method":
            return getattr(given[0], target)(*given[1:], **named)
        return target(*given, **named)

    return looked_up


# past getattr: Dynamo would write guards on it, with the name as code


def _module(root: Any, name: str) -> Any:
    for part in name.split("."):
        root = root._modules[part]
    return root


def _attribute(root: Any, name: str) -> Any:
    path, _, last = name.rpartition(".")
    owner = _module(root, path) if path else root
    for held in (owner._parameters, owner._buffers, owner._modules):
        if last in held:
            return held[last]
    return owner.__dict__[last]
