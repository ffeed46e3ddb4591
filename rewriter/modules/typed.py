"""Whether values out of a JSON file are of the types that code declares."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["depth_above", "fits"]


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type: a list may stand for a tuple and a whole number
    for a float; True and False are no numbers. Of a type that JSON has no form of, anything is."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(fits(value, h) for h in inner)
    if kind is Literal:
        return any(type(value) is type(v) and value == v for v in inner)
    if kind in (None, type(None)):
        return value is None
    if kind in (int, str, bool):
        return type(value) is kind
    if kind is float:
        return type(value) in (int, float)
    if kind in (dict, Mapping):
        key, item = inner or (Any, Any)
        if not isinstance(value, Mapping):
            return False
        return all(fits(k, key) and fits(v, item) for k, v in value.items())
    if kind in (list, tuple, Sequence):
        return isinstance(value, (list, tuple)) and _items_fit(value, kind, inner)
    return True


def _items_fit(value: Sequence[Any], kind: Any, inner: tuple[Any, ...]) -> bool:
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(fits, value, inner))
    return all(fits(v, inner[0]) for v in value) if inner else True


def depth_above(value: Any, most: int) -> bool:
    """Whether tables and lists are nested deeper than `most`: code that walks them calls itself."""
    level = [value]
    for _ in range(most + 1):
        tables = [v for v in level if isinstance(v, (dict, list))]
        level = [v for t in tables for v in (t.values() if isinstance(t, dict) else t)]
        if not tables:
            return False
    return True
