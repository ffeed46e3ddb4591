"""How a call is taken apart into tensors, and how its result is put together again.

A captured graph takes a flat list of tensors. `Signature` turns a call's arguments into that list,
or says in words why this call is not the captured one; `Structure` rebuilds the original output
(ModelOutput, cache objects, nested containers) from the graph's flat results.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rewriter.errors import CaptureError

__all__ = ["Call", "Dims", "Signature", "Structure", "Unflattenable", "flatten"]


class Unflattenable(CaptureError):
    """A value holds something that is neither a tensor, a constant, nor a container of them."""


@dataclass(frozen=True)
class Structure:
    """The shape of a nested value: `kind` is "leaf", "const", "node" (a registered pytree) or
    "object" (any other object, rebuilt attribute by attribute)."""

    kind: str
    value: Any = None
    type: Any = None
    children: tuple[Structure, ...] = ()

    def build(self, leaves: Sequence[Any]) -> Any:
        """The nested value, with the flat `leaves` in their places."""
        if self.kind == "leaf":
            return leaves[self.value]
        if self.kind == "const":
            return self.value
        values = [child.build(leaves) for child in self.children]
        if self.kind == "node":
            if self.type is list:
                return values
            if self.type is tuple:
                return tuple(values)
            return pytree.SUPPORTED_NODES[self.type].unflatten_fn(values, self.value)
        result = self.type.__new__(self.type)
        result.__dict__.update(zip(self.value, values, strict=True))
        return result


def flatten(value: Any, leaves: list[Any], *, objects: bool) -> Structure:
    """Appends the tensors of `value` to `leaves` and returns the structure around them.

    Args:
        value: any nested value.
        leaves: receives tensors and symbolic numbers, in order.
        objects: take apart foreign objects that hold tensors (outputs); else they are refused
            (inputs: a graph could not write back what the call changes in them).

    Raises:
        Unflattenable: the value holds something that cannot be taken apart.
    """
    return _flatten(value, leaves, objects, ())


def _flatten(value: Any, leaves: list[Any], objects: bool, parents: tuple[int, ...]) -> Structure:
    if isinstance(value, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        leaves.append(value)
        return Structure("leaf", len(leaves) - 1)
    if id(value) in parents:
        raise Unflattenable(f"a {type(value).__name__} that contains itself")
    parents = (*parents, id(value))
    node = pytree.SUPPORTED_NODES.get(type(value))
    if node is not None:
        items, context = node.flatten_fn(value)
        children = tuple(_flatten(item, leaves, objects, parents) for item in items)
        return Structure("node", context, type(value), children)
    if isinstance(value, torch.nn.Module) or callable(value) or not hasattr(value, "__dict__"):
        return Structure("const", value)
    start = len(leaves)
    names = tuple(vars(value))
    children = tuple(_flatten(v, leaves, True, parents) for v in vars(value).values())
    if len(leaves) == start:  # no tensor inside: a constant like any other
        return Structure("const", value)
    if not objects:
        raise Unflattenable(f"a {type(value).__name__}, which the call may change in place")
    return Structure("object", names, type(value), children)


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments by name, in the order of its signature."""

    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Binds a call; arguments equal to their defaults are left out.

        Raises:
            TypeError: the arguments do not fit the signature.
        """
        signature = inspect.signature(forward)
        bound = signature.bind(*args, **kwargs)
        arguments: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            parameter = signature.parameters[name]
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(value)
            elif parameter.kind is parameter.VAR_POSITIONAL:
                arguments.update({f"{name}[{i}]": v for i, v in enumerate(value)})
            elif not _same(value, parameter.default):
                arguments[name] = value
        return cls(arguments)

    def tensors(self) -> list[Tensor]:
        leaves: list[Any] = []
        flatten(dict(self.arguments), leaves, objects=True)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


_COMPARABLE = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def _same(a: Any, b: Any) -> bool:
    """Equality that never asks a tensor for its truth value."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return isinstance(a, _COMPARABLE) and bool(a == b)


@dataclass
class Dims:
    """Which sizes a captured graph accepts.

    Args:
        shapes: per tensor, per dimension: a fixed size, or the name of a symbol.
        ranges: per symbol, the smallest and the largest size (None: any).
        guards: further conditions, Python expressions over the symbols.
    """

    shapes: list[list[int | str]]
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    guards: list[str] = field(default_factory=list)
    _check: Any = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_check": None}

    def difference(self, leaves: Sequence[Tensor], names: Sequence[str]) -> str | None:
        """Why these sizes do not fit, or None."""
        bound: dict[str, int] = {}
        for leaf, sizes, name in zip(leaves, self.shapes, names, strict=True):
            if leaf.dim() != len(sizes):
                return f"{name!r} has {leaf.dim()} dimensions, captured with {len(sizes)}"
            for dim, size in enumerate(sizes):
                actual = leaf.shape[dim]
                if isinstance(size, int):
                    if actual != size:
                        return f"{name!r} has size {actual} in dimension {dim}, captured as {size}"
                elif size in bound:
                    if actual != bound[size]:
                        return f"{name!r} has size {actual} in dimension {dim}, not {bound[size]}"
                else:
                    low, high = self.ranges.get(size, (0, None))
                    if actual < low or (high is not None and actual > high):
                        return (
                            f"{name!r} has size {actual} in dimension {dim}, the captured graph "
                            f"serves {low} to {'any' if high is None else high}"
                        )
                    bound[size] = actual
        if self.guards:
            if self._check is None:
                code = " and ".join(f"({g})" for g in self.guards)
                self._check = eval(  # noqa: S307 (the expressions are torch's own guards)
                    f"lambda {', '.join(sorted(bound))}: {code}", {"math": __import__("math")}
                )
            if not self._check(**bound):
                return f"sizes {bound} break a condition of the captured graph: {self.guards}"
        return None


@dataclass
class Signature:
    """The captured call, and the test whether another call is the same kind of call.

    Args:
        positional: names of the parameters that may be given by position.
        rest: name of the `*args` parameter, "" without one.
        defaults: default values by name.
        structure: of the captured arguments (a dict by name).
        names: one per tensor leaf, for messages.
        dtypes: of the tensor leaves.
        device: type of the device the graph was captured on.
        dims: sizes that the graph accepts.
    """

    positional: tuple[str, ...]
    rest: str
    defaults: dict[str, Any]
    structure: Structure
    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    device: str
    dims: Dims

    @classmethod
    def of(cls, forward: Callable[..., Any], call: Call) -> tuple[Signature, list[Tensor]]:
        """The signature of `call`, and its tensors.

        Raises:
            Unflattenable: an argument holds an object that the call may change.
        """
        positional: list[str] = []
        rest = ""
        defaults: dict[str, Any] = {}
        for name, p in inspect.signature(forward).parameters.items():
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
                positional.append(name)
            elif p.kind is p.VAR_POSITIONAL:
                rest = name
            if p.default is not p.empty:
                defaults[name] = p.default
        leaves: list[Any] = []
        names: list[str] = []
        for name, value in call.arguments.items():
            start = len(leaves)
            try:
                flatten(value, leaves, objects=False)
            except Unflattenable as error:
                raise Unflattenable(f"argument {name!r} holds {error}") from None
            count = len(leaves) - start
            names += [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
        leaves = []
        structure = flatten(dict(call.arguments), leaves, objects=False)
        device = next((t.device.type for t in leaves), "cpu")
        dims = Dims([list(t.shape) for t in leaves])
        dtypes = tuple(t.dtype for t in leaves)
        return cls(
            tuple(positional), rest, defaults, structure, tuple(names), dtypes, device, dims
        ), leaves

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the captured call, with `leaves` for its tensors."""
        by_name = self.structure.build(leaves)
        args = []
        for name in self.positional:
            if name not in by_name:
                break
            args.append(by_name.pop(name))
        while f"{self.rest}[{len(args) - len(self.positional)}]" in by_name:
            args.append(by_name.pop(f"{self.rest}[{len(args) - len(self.positional)}]"))
        return tuple(args), by_name

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | str:
        """The flat tensors of a call, or how the call differs from the captured one."""
        given: dict[str, Any] = {}
        for i, value in enumerate(args[len(self.positional) :]):
            given[f"{self.rest}[{i}]"] = value
        for name, value in zip(self.positional, args, strict=False):
            given[name] = value
        given.update(kwargs)
        captured: list[str] = list(self.structure.value)
        for name in list(given):
            default = self.defaults.get(name, inspect.Parameter.empty)
            if name not in captured and (given[name] is None or _same(given[name], default)):
                del given[name]
        extra = [name for name in given if name not in captured]
        missing = [name for name in captured if name not in given]
        if extra or missing:
            parts = [f"argument {n!r} was not in the captured call" for n in extra]
            parts += [f"argument {n!r} of the captured call is missing" for n in missing]
            return "; ".join(parts)
        leaves: list[Tensor] = []
        for name, structure in zip(captured, self.structure.children, strict=True):
            difference = _match(given[name], structure, leaves, name)
            if difference:
                return difference
        for leaf, dtype, name in zip(leaves, self.dtypes, self.names, strict=True):
            if leaf.dtype != dtype:
                return f"{name!r} is {leaf.dtype}, captured as {dtype}"
        return self.dims.difference(leaves, self.names) or leaves

    def __str__(self) -> str:
        parts = []
        for name, dtype, sizes in zip(self.names, self.dtypes, self.dims.shapes, strict=True):
            parts.append(f"{name}: {str(dtype).removeprefix('torch.')}{sizes}".replace("'", ""))
        return ", ".join(parts)


def _match(value: Any, structure: Structure, leaves: list[Tensor], name: str) -> str | None:
    if structure.kind == "leaf":
        if not isinstance(value, Tensor):
            return f"{name!r} is a {type(value).__name__}, captured as a tensor"
        leaves.append(value)
        return None
    if structure.kind == "const":
        if _same(value, structure.value):
            return None
        return f"{name!r} is {value!r}, captured as {structure.value!r}"
    if type(value) is not structure.type:
        return f"{name!r} is a {type(value).__name__}, captured as a {structure.type.__name__}"
    items, context = pytree.SUPPORTED_NODES[structure.type].flatten_fn(value)
    if len(items) != len(structure.children) or context != structure.value:
        return f"{name!r} has another structure than in the captured call"
    for item, child in zip(items, structure.children, strict=True):
        difference = _match(item, child, leaves, name)
        if difference:
            return difference
    return None
