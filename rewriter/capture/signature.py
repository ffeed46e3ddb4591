"""How a call is turned into the flat tensors that a graph takes.

`Signature` remembers the captured call: its arguments by name, their types and sizes. It turns
another call's arguments into the graph's inputs, or says in words why this is not the same call.
"""

from __future__ import annotations

import inspect
import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rewriter.modules.structure import Structure, Unflattenable, flatten, is_constant, same

__all__ = ["Call", "Dims", "OpenSizes", "Signature", "shown"]


_SEEN = 4096
"""So many combinations of sizes are remembered as served."""


def shown(value: Any) -> str:
    """A value in a message: short, and the same in every run (no address, no whole config)."""
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, list | tuple | set | frozenset | dict):
        return _short(repr(value), value) if _plain(value) else f"a {type(value).__name__}"
    if not is_constant(value):
        return f"a {type(value).__name__}"
    if isinstance(value, type) or callable(value):
        return str(getattr(value, "__qualname__", type(value).__name__))
    return _short(repr(value), value)


def _short(text: str, value: Any) -> str:
    return text if len(text) <= _SHOWN else f"a {type(value).__name__}"


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_plain, value))
    return is_constant(value) and not callable(value)


_SHOWN = 80
"""So many characters of a value are shown."""


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments by name, in the order of its signature; `grad` says
    whether gradients are on."""

    arguments: Mapping[str, Any]
    grad: bool = True

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
    _served: set[Any] = field(default_factory=set, repr=False, compare=False)

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

    def serves(self, leaves: Sequence[Tensor], names: Sequence[str]) -> str | None:
        """As `difference`, and quick for sizes that were seen to fit."""
        shapes = tuple([leaf.shape for leaf in leaves])
        if shapes in self._served:
            return None
        found = self.difference(leaves, names)
        if found is None and len(self._served) < _SEEN:
            self._served.add(shapes)
        return found

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


def _role(dtype: torch.dtype, dims: int, dim: int) -> str:
    """What a dimension of an input is called, by the usual layouts: [batch, sequence, …] of text
    and [batch, channels, height, width] of images."""
    if dim == 0:
        return "batch"
    image = dtype.is_floating_point and dims == 4
    if image:
        return ("channels", "height", "width")[dim - 1]
    return "sequence" if dim == 1 and (dims > 2 or not dtype.is_floating_point) else ""


_Plan = tuple[list[tuple[str, int | str, Structure]], list[tuple[str, int | str, Any]]]
"""Of a call: the captured arguments with where they are given (position or name) and their
structure, and further arguments with their defaults."""


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
        default: torch's default dtype then, which new tensors get.
        grad: whether gradients were on; None where the forward does not ask.
        contiguous: the forward asks how tensors lie in memory, so inputs must be contiguous.
        shared: where tensors of the call were one object, which a forward may ask and writes tell:
            per tensor the place of the first that is the same; () where all were apart, None where
            it makes no difference.
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
    default: torch.dtype = field(default_factory=torch.get_default_dtype)
    grad: bool | None = None
    contiguous: bool = False
    shared: tuple[int, ...] | None = ()
    _plans: dict[Any, _Plan | str] = field(default_factory=dict, repr=False, compare=False)

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
            own = _identifier(name)
            names += [own] if count == 1 else [f"{own}_{i}" for i in range(count)]
        leaves = []
        structure = flatten(dict(call.arguments), leaves, objects=False)
        device = next((t.device.type for t in leaves), "cpu")
        signature = cls(
            positional=tuple(p.name for p in parameters if p.kind in by_position),
            rest=next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), ""),
            only=frozenset(p.name for p in parameters if p.kind is p.POSITIONAL_ONLY),
            defaults={p.name: p.default for p in parameters if p.default is not p.empty},
            structure=structure,
            names=_distinct(names),
            dtypes=tuple(t.dtype for t in leaves),
            device=device,
            autocast=_autocast(device),
            shared=_shared(leaves),
        )
        return signature, leaves

    def merged(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves, with one object for those that were one in the captured call."""
        return [leaves[i] for i in self.shared] if self.shared else list(leaves)

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
        key = (len(args), *kwargs)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(len(args), tuple(kwargs))
            if len(self._plans) < _SEEN:
                self._plans[key] = plan
        if isinstance(plan, str):
            return plan
        taken, extra = plan
        parts = [
            f"argument {name!r} was not in the captured call"
            for name, where, default in extra
            if not same(kwargs[where] if isinstance(where, str) else args[where], default)
        ]
        if parts:
            return "; ".join(parts)
        leaves: list[Tensor] = []
        for name, where, structure in taken:
            value = kwargs[where] if isinstance(where, str) else args[where]
            if structure.kind == "leaf" and isinstance(value, Tensor):
                leaves.append(value)
                continue
            difference = _match(value, structure, leaves, name)
            if difference:
                return difference
        for leaf, dtype, name in zip(leaves, self.dtypes, self.names, strict=True):
            if leaf.dtype is not dtype:
                return f"{name!r} is {leaf.dtype}, captured as {dtype}"
            if self.contiguous and not leaf.is_contiguous():
                return f"{name!r} is not contiguous, captured contiguous"
        autocast = _autocast(leaves[0].device.type)
        if autocast is not self.autocast:
            return f"autocast is {autocast}, captured as {self.autocast}"
        if torch.get_default_dtype() is not self.default:
            return (
                f"torch's default dtype is {torch.get_default_dtype()}, captured as {self.default}"
            )
        if self.grad is not None and torch.is_grad_enabled() is not self.grad:
            now, then = ("off", "on") if self.grad else ("on", "off")
            return f"gradients are {now}, which its forward asks, captured with them {then}"
        return self._other_sizes(leaves, training) or self._otherwise_shared(leaves) or leaves

    def _other_sizes(self, leaves: list[Tensor], training: bool) -> str | None:
        dims = self.dims.get(training)
        if dims is None:  # no graph of this mode
            return None
        if torch.compiler.is_compiling():  # its sizes may be symbols, which cannot be looked up
            return dims.difference(leaves, self.names)
        try:
            return dims.serves(leaves, self.names)
        except TypeError:  # so may those of another tracer
            return dims.difference(leaves, self.names)

    def _otherwise_shared(self, leaves: list[Tensor]) -> str | None:
        if self.shared is None or torch.compiler.is_compiling():
            return None
        shared = _shared(leaves)
        if shared == self.shared:
            return None
        now = "one tensor, captured as several" if shared else "several, captured as one"
        return f"arguments are {now}"

    def _plan(self, count: int, keywords: tuple[str, ...]) -> _Plan | str:
        """Where a call with so many positional and these keyword arguments has the arguments of
        the captured one; or how it differs from it whatever their values."""
        where: dict[str, int | str] = {}
        for i in range(count):
            own = i - len(self.positional)
            where[self.positional[i] if own < 0 else f"{self.rest}[{own}]"] = i
        for name in keywords:
            if name in where or name in self.only:
                return f"argument {name!r} is given twice"
            where[name] = name
        captured: list[str] = self.structure.value
        extra = [
            (n, w, self.defaults[n])
            for n, w in where.items()
            if n not in captured and n in self.defaults
        ]
        unknown = [n for n in where if n not in captured and n not in self.defaults]
        missing = [n for n in captured if n not in where]
        if unknown or missing:
            parts = [f"argument {n!r} was not in the captured call" for n in unknown]
            parts += [f"argument {n!r} of the captured call is missing" for n in missing]
            return "; ".join(parts)
        children = zip(captured, self.structure.children, strict=True)
        return [(n, where[n], structure) for n, structure in children], extra

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        new = {"default": torch.get_default_dtype(), "grad": None}
        self.__dict__.update({**new, **state, "_plans": {}})  # 0.1.0 has none

    def open_sizes(self, training: bool, leaves: Sequence[Tensor]) -> OpenSizes:
        """The sizes that the captured graph leaves open, under the names people know them by."""
        result = OpenSizes([], {}, {})
        dims = self.dims[training]
        names = self._size_names(dims.shapes, [leaf.shape for leaf in leaves])
        for leaf, sizes in zip(leaves, dims.shapes, strict=True):
            for size, symbol in zip(leaf.shape, sizes, strict=True):
                if isinstance(symbol, str):
                    name = names[symbol]
                    low, high = dims.ranges.get(symbol, (0, None))
                    old_low, old_high = result.ranges.get(name, (low, high))
                    highs = [h for h in (high, old_high) if h is not None]
                    result.values[name] = size
                    result.ranges[name] = (max(low, old_low), min(highs, default=None))
            result.rows.append(_renamed(sizes, names))
        return result

    def _size_names(
        self, shapes: Sequence[Sequence[int | str]], example: Sequence[Sequence[int]] | None = None
    ) -> dict[str, str]:
        """Symbol → what people know the size by: its role ("batch", "sequence", …), else argument
        and dimension ("mask_1"). Sizes of one role share it where they are equal in the example.
        """
        names: dict[str, str] = {}
        taken: dict[str, int | None] = {}
        for i, row in enumerate(shapes):
            for d, symbol in enumerate(row):
                if isinstance(symbol, str) and symbol not in names:
                    size = None if example is None else example[i][d]
                    name = _role(self.dtypes[i], len(row), d)
                    if not name or (name in taken and (size is None or taken[name] != size)):
                        name = f"{self.names[i]}_{d}"
                    names[symbol] = name
                    taken.setdefault(name, size)
        return names

    def described(self) -> str:
        """As `str`, and the arguments that are no tensors."""
        given = zip(self.structure.value, self.structure.children, strict=True)
        options = [f"{name}={shown(s.value)}" for name, s in given if s.kind == "const"]
        return ", ".join([str(self), *options])

    def __str__(self) -> str:
        """The tensors with their dtypes and sizes; a name stands for a size that may vary."""
        shapes = self.dims[False].shapes if self.dims else [[] for _ in self.names]
        names = self._size_names(shapes)
        return self._listed([_renamed(row, names) for row in shapes])

    def named(self, leaves: Sequence[Tensor] | None) -> str:
        """As `str`, with the names that `open_sizes` gives to the sizes that may vary."""
        return str(self) if leaves is None else self._listed(self.open_sizes(False, leaves).rows)

    def _listed(self, rows: Sequence[Sequence[int | str]]) -> str:
        parts = []
        for name, dtype, sizes in zip(self.names, self.dtypes, rows, strict=True):
            shown = ", ".join(map(str, sizes))
            parts.append(f"{name}: {str(dtype).removeprefix('torch.')}[{shown}]")
        return ", ".join(parts)


def _renamed(sizes: Sequence[int | str], names: Mapping[str, str]) -> list[int | str]:
    return [names[s] if isinstance(s, str) else s for s in sizes]


def _shared(leaves: Sequence[Any]) -> tuple[int, ...]:
    """Per leaf the place of the first that is the same object; () where all are apart."""
    if len(set(map(id, leaves))) == len(leaves):
        return ()
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(leaf), i) for i, leaf in enumerate(leaves))


def _identifier(name: str) -> str:
    """The name of an argument, which `**kwargs` may take from anywhere, as one for a graph's input:
    `rest[0]` is `rest_0`."""
    plain = re.sub(r"\W+", "_", name, flags=re.ASCII).rstrip("_") or "x"
    return f"x_{plain}" if keyword.iskeyword(plain) or not plain.isidentifier() else plain


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for name in names:
        count, own = 0, name
        while own in found:
            count += 1
            own = f"{name}_{count}"
        found[own] = None
    return tuple(found)


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
        return f"{name!r} is {shown(value)}, captured as {shown(structure.value)}"
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
