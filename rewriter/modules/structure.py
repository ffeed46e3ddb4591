"""How a nested value is taken apart into tensors, and put together again.

A captured graph takes and returns flat lists of tensors. `flatten` takes a value apart; its
`Structure` builds an equal value around other tensors: containers, registered pytrees (such as
transformers' ModelOutput), named tuples, dataclasses, subclasses of dict and list, and any object
whose state is its attributes (cache objects).
"""

from __future__ import annotations

import collections
import copy
import enum
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewriter.errors import CaptureError

__all__ = ["SYMBOLS", "Structure", "Unflattenable", "flatten", "same"]


class Unflattenable(CaptureError):
    """A value holds something that is neither a tensor, a constant, nor a container of them."""


SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""The types of sizes, and of what is computed from them, in a trace that leaves them open."""
_LEAVES = (Tensor, *SYMBOLS)
_COMPARABLE = (
    bool, int, float, complex, str, bytes, range, enum.Enum, type, types.FunctionType,
    types.BuiltinFunctionType, types.MethodType, torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip
"""Types that nobody changes in place and that `==` compares."""


def is_constant(value: Any) -> bool:
    return value is None or value is Ellipsis or isinstance(value, _COMPARABLE)


def same(a: Any, b: Any) -> bool:
    """Equality that never asks a tensor for its truth value; 1, 1.0 and True all differ."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return is_constant(a) and bool(a == b)


@dataclass(frozen=True)
class Structure:
    """The shape of a nested value.

    Args:
        kind: "leaf" (`value` is its index), "const" (`value` itself), "copy" (an object without
            tensors, new in every call), "node" (a registered pytree), or "object".
        value: for "node" pytree's context, for "object" the names: keys or indices of the items,
            then the attributes.
        type: of a "node" or an "object".
        children: of a "node" or an "object".
        items: how many of an "object"'s children are items of a dict, list or tuple.
    """

    kind: str
    value: Any = None
    type: Any = None
    children: tuple[Structure, ...] = ()
    items: int = 0

    def build(self, leaves: Sequence[Any]) -> Any:
        """The nested value, with the flat `leaves` in their places."""
        if self.kind == "leaf":
            return leaves[self.value]
        if self.kind == "const":
            return self.value
        if self.kind == "copy":
            return copy.deepcopy(self.value)
        values = [child.build(leaves) for child in self.children]
        if self.kind == "node":
            if self.type is list:
                return values
            if self.type is tuple:
                return tuple(values)
            return pytree.SUPPORTED_NODES[self.type].unflatten_fn(values, self.value)
        items, names = values[: self.items], self.value[self.items :]
        if issubclass(self.type, tuple):
            result = tuple.__new__(self.type, items)
        else:
            result = self.type.__new__(self.type)
        if issubclass(self.type, collections.OrderedDict):
            for key, item in zip(self.value, items, strict=False):
                collections.OrderedDict.__setitem__(result, key, item)
        elif issubclass(self.type, dict):
            dict.update(result, zip(self.value, items, strict=False))
        elif issubclass(self.type, list):
            list.extend(result, items)
        for name, attribute in zip(names, values[self.items :], strict=True):
            object.__setattr__(result, name, attribute)  # a frozen dataclass refuses its own
        return result


def flatten(value: Any, leaves: list[Any], *, objects: bool, opaque: bool = False) -> Structure:
    """Appends the tensors of `value` to `leaves` and returns the structure around them.

    Args:
        value: any nested value.
        leaves: receives tensors and symbolic numbers, in order.
        objects: take apart foreign objects (outputs); else they are refused (inputs: a graph could
            not write back what the call changes in them, nor notice what changed in them since).
        opaque: keep what cannot be taken apart as it is, for running Python code and no graph.

    Raises:
        Unflattenable: the value holds something that cannot be taken apart.
    """
    return _flatten(value, leaves, objects, opaque, ())


def _flatten(
    value: Any, leaves: list[Any], objects: bool, opaque: bool, parents: tuple[int, ...]
) -> Structure:
    if isinstance(value, _LEAVES):
        leaves.append(value)
        return Structure("leaf", len(leaves) - 1)
    if is_constant(value):
        return Structure("const", value)
    if id(value) in parents:
        raise Unflattenable(f"a {type(value).__name__} that contains itself")
    parents = (*parents, id(value))
    node = pytree.SUPPORTED_NODES.get(type(value))
    if node is not None:
        items, context = node.flatten_fn(value)
        children = tuple(_flatten(item, leaves, objects, opaque, parents) for item in items)
        return Structure("node", context, type(value), children)
    inside: list[Any] = []
    names: list[Any] = []
    if isinstance(value, dict):
        names, inside = list(value.keys()), list(dict.values(value))
    elif isinstance(value, list | tuple):
        names, inside = list(range(len(value))), list(value)
    if isinstance(value, tuple) and not hasattr(value, "__dict__"):  # torch.Size, named tuples
        children = tuple(_flatten(v, leaves, objects, opaque, parents) for v in inside)
        return Structure("object", tuple(names), type(value), children, len(names))
    if not objects:
        raise Unflattenable(f"a {type(value).__name__}, which the call may change in place")
    if isinstance(value, nn.Module):
        return Structure("const", value)
    try:
        attributes = _attributes(value)
    except Unflattenable:
        if opaque or callable(value):
            return Structure("const", value)
        raise
    start = len(leaves)
    children = tuple(
        _flatten(v, leaves, True, opaque, parents) for v in [*inside, *attributes.values()]
    )
    if len(leaves) == start:
        return Structure("const" if callable(value) else "copy", value)
    kept = (*names, *attributes)
    return Structure("object", kept, type(value), children, len(names))


def _attributes(value: Any) -> dict[str, Any]:
    """The state of an object that is all in its attributes.

    Raises:
        Unflattenable: it is not.
    """
    slots = [
        name
        for cls in type(value).__mro__
        for name in _slots(cls)
        if name not in ("__dict__", "__weakref__") and hasattr(value, name)
    ]
    if not slots and not hasattr(value, "__dict__") and not isinstance(value, set | frozenset):
        raise Unflattenable(f"a {type(value).__name__}, whose content cannot be taken apart")
    if isinstance(value, set | frozenset) and not all(map(is_constant, value)):
        raise Unflattenable(f"a {type(value).__name__} of tensors or objects, which has no order")
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}}


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
