"""How a call is turned into the flat tensors that a graph takes.

`Signature` remembers the captured call: its arguments by name, their types and sizes. It turns
another call's arguments into the graph's inputs, or says in words why this is not the same call.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rewriter.modules.structure import Structure, Unflattenable, flatten, same

__all__ = ["Call", "Dims", "OpenSizes", "Signature"]


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
                if arguments.keys() & value.keys():  # f(x, /, **kw) called as f(1, x=2)
                    raise TypeError(f"{sorted(arguments.keys() & value.keys())} are given twice")
                arguments.update(value)
            elif parameter.kind is parameter.VAR_POSITIONAL:
                arguments.update({f"{name}[{i}]": v for i, v in enumerate(value)})
            elif not same(value, parameter.default):
                arguments[name] = value
        return cls(arguments)


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

    def __post_init__(self) -> None:
        if self.guards:
            symbols = sorted({s for row in self.shapes for s in row if isinstance(s, str)})
            code = " and ".join(f"({g})" for g in self.guards)
            self._check = eval(  # noqa: S307 (the expressions are torch's own guards)
                f"lambda {', '.join(symbols)}: {code}", {"math": math}
            )

    def __reduce__(self) -> Any:
        return Dims, (self.shapes, self.ranges, self.guards)

    def copy(self) -> Dims:
        """Equal rules whose ranges may be narrowed apart."""
        return Dims(self.shapes, dict(self.ranges), self.guards)

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
            if not self._check(**bound):
                return f"sizes {bound} break a condition of the captured graph: {self.guards}"
        return None


@dataclass
class OpenSizes:
    """Sizes of a captured call that may vary, by name ("batch", "sequence", …).

    Args:
        rows: per tensor, per dimension: a fixed size, or the name of an open one.
        values: name → size in the example.
        ranges: name → smallest and largest size that the graph serves (None: any).
    """

    rows: list[list[int | str]]
    values: dict[str, int]
    ranges: dict[str, tuple[int, int | None]]


def _role(leaf: Tensor, dim: int) -> str:
    """What a dimension of an input is called, by the usual layouts: [batch, sequence, …] of text
    and [batch, channels, height, width] of images."""
    if dim == 0:
        return "batch"
    image = leaf.is_floating_point() and leaf.dim() == 4
    if image:
        return ("channels", "height", "width")[dim - 1]
    return "sequence" if dim == 1 and (leaf.dim() > 2 or not leaf.is_floating_point()) else ""


@dataclass
class Signature:
    """The captured call, and the test whether another call is the same kind of call.

    Args:
        positional: names of the parameters that may be given by position.
        rest: name of the `*args` parameter, "" without one.
        only: names of the parameters that can be given by position only.
        defaults: default values by name.
        structure: of the captured arguments (a dict by name).
        names: one per tensor leaf, for messages.
        dtypes: of the tensor leaves.
        device: type of the device the graph was captured on.
        autocast: the autocast dtype there during capture, None for off.
        dims: sizes that the graphs accept, per mode.
        contiguous: the forward asks how tensors lie in memory, so inputs must be contiguous.
    """

    positional: tuple[str, ...]
    rest: str
    only: frozenset[str]
    defaults: dict[str, Any]
    structure: Structure
    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    device: str
    autocast: torch.dtype | None
    dims: dict[bool, Dims] = field(default_factory=dict)
    contiguous: bool = False

    @classmethod
    def of(cls, forward: Callable[..., Any], call: Call) -> tuple[Signature, list[Tensor]]:
        """The signature of `call`, and its tensors.

        Raises:
            Unflattenable: an argument holds an object that the call may change.
        """
        parameters = inspect.signature(forward).parameters.values()
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
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
        signature = cls(
            positional=tuple(p.name for p in parameters if p.kind in by_position),
            rest=next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), ""),
            only=frozenset(p.name for p in parameters if p.kind is p.POSITIONAL_ONLY),
            defaults={p.name: p.default for p in parameters if p.default is not p.empty},
            structure=structure,
            names=tuple(names),
            dtypes=tuple(t.dtype for t in leaves),
            device=device,
            autocast=_autocast(device),
        )
        return signature, leaves

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the captured call, with `leaves` for its tensors."""
        by_name = self.structure.build(leaves)
        needed = [i for i, n in enumerate(self.positional) if n in self.only and n in by_name]
        count = max(needed, default=-1) + 1  # up to here arguments go by position
        if f"{self.rest}[0]" in by_name:
            count = len(self.positional)
        args = []
        for i, name in enumerate(self.positional):
            if name in by_name:
                args.append(by_name.pop(name))
            elif i < count:
                args.append(self.defaults[name])
            else:
                break
        while f"{self.rest}[{len(args) - len(self.positional)}]" in by_name:
            args.append(by_name.pop(f"{self.rest}[{len(args) - len(self.positional)}]"))
        return tuple(args), by_name

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
    ) -> list[Tensor] | str:
        """The flat tensors of a call, or how the call differs from the captured one."""
        given: dict[str, Any] = dict(zip(self.positional, args, strict=False))
        for i, value in enumerate(args[len(self.positional) :]):
            given[f"{self.rest}[{i}]"] = value
        for name, value in kwargs.items():
            if name in given or name in self.only:
                return f"argument {name!r} is given twice"
            given[name] = value
        captured: list[str] = self.structure.value
        if given.keys() != set(captured):
            for name in list(given):
                if name not in captured and self._left_out(name, given[name]):
                    del given[name]
            parts = [f"argument {n!r} was not in the captured call" for n in given
                     if n not in captured]  # fmt: skip
            parts += [f"argument {n!r} of the captured call is missing" for n in captured
                      if n not in given]  # fmt: skip
            if parts:
                return "; ".join(parts)
        leaves: list[Tensor] = []
        for name, structure in zip(captured, self.structure.children, strict=True):
            difference = _match(given[name], structure, leaves, name)
            if difference:
                return difference
        for leaf, dtype, name in zip(leaves, self.dtypes, self.names, strict=True):
            if leaf.dtype is not dtype:
                return f"{name!r} is {leaf.dtype}, captured as {dtype}"
            if self.contiguous and not leaf.is_contiguous():
                return f"{name!r} is not contiguous, captured contiguous"
        if _autocast(leaves[0].device.type) is not self.autocast:
            return f"autocast is {_autocast(leaves[0].device.type)}, captured as {self.autocast}"
        return self.dims[training].difference(leaves, self.names) or leaves

    def open_sizes(self, training: bool, leaves: Sequence[Tensor]) -> OpenSizes:
        """The sizes that the captured graph leaves open, under the names people know them by."""
        names: dict[str, str] = {}
        result = OpenSizes([], {}, {})
        dims = self.dims[training]
        for leaf, sizes in zip(leaves, dims.shapes, strict=True):
            row: list[int | str] = []
            for d, symbol in enumerate(sizes):
                if isinstance(symbol, str):
                    size = leaf.shape[d]
                    if symbol not in names:
                        name = _role(leaf, d)
                        if not name or result.values.get(name, size) != size:
                            name = f"n{len(result.values)}"
                        names[symbol] = name
                    name = names[symbol]
                    low, high = dims.ranges.get(symbol, (0, None))
                    old_low, old_high = result.ranges.get(name, (low, high))
                    highs = [h for h in (high, old_high) if h is not None]
                    result.values[name] = size
                    result.ranges[name] = (max(low, old_low), min(highs, default=None))
                    row.append(name)
                else:
                    row.append(symbol)
            result.rows.append(row)
        return result

    def _left_out(self, name: str, value: Any) -> bool:
        """Whether giving this argument is the same as leaving it out."""
        return name in self.defaults and same(value, self.defaults[name])

    def __str__(self) -> str:
        """The tensors with their dtypes and sizes; a letter stands for a size that may vary."""
        letters: dict[str, str] = {}
        shapes = self.dims[False].shapes if self.dims else [[] for _ in self.names]
        return self._listed(
            [
                [
                    s if isinstance(s, int) else letters.setdefault(s, f"n{len(letters)}")
                    for s in row
                ]
                for row in shapes
            ]
        )

    def named(self, leaves: Sequence[Tensor] | None) -> str:
        """As `str`, with the names that `open_sizes` gives to the sizes that may vary."""
        return str(self) if leaves is None else self._listed(self.open_sizes(False, leaves).rows)

    def _listed(self, rows: Sequence[Sequence[int | str]]) -> str:
        parts = []
        for name, dtype, sizes in zip(self.names, self.dtypes, rows, strict=True):
            shown = ", ".join(map(str, sizes))
            parts.append(f"{name}: {str(dtype).removeprefix('torch.')}[{shown}]")
        return ", ".join(parts)


def _autocast(device: str) -> torch.dtype | None:
    """The dtype that autocast is on with; None where it is off."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _match(value: Any, structure: Structure, leaves: list[Tensor], name: str) -> str | None:
    if structure.kind == "leaf":
        if not isinstance(value, Tensor):
            return f"{name!r} is a {type(value).__name__}, captured as a tensor"
        leaves.append(value)
        return None
    if structure.kind == "const":
        if same(value, structure.value):
            return None
        shown = "a tensor" if isinstance(value, Tensor) else repr(value)
        return f"{name!r} is {shown}, captured as {structure.value!r}"
    if type(value) is not structure.type:
        return f"{name!r} is a {type(value).__name__}, captured as a {structure.type.__name__}"
    if structure.kind == "object":
        items, equal = list(value), True
    elif structure.type is dict:  # in whatever order
        equal = value.keys() == set(structure.value)
        items = [value[k] for k in structure.value] if equal else []
    else:
        items, context = pytree.SUPPORTED_NODES[structure.type].flatten_fn(value)
        equal = context == structure.value
    if not equal or len(items) != len(structure.children):
        return f"{name!r} has another structure than in the captured call"
    for item, child in zip(items, structure.children, strict=True):
        difference = _match(item, child, leaves, name)
        if difference:
            return difference
    return None
