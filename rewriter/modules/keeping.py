"""What a forward may write into its own model: attributes, containers and objects in attributes,
and values of tensors."""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rewriter.modules.isolation import storage_of
from rewriter.modules.structure import is_constant, same
from rewriter.modules.tree import RECORDED, is_hook_dict

__all__ = ["kept", "kept_values", "tensors_of", "written"]

_CONTAINERS = ("_parameters", "_buffers", "_modules")
_MUTABLE = (dict, list, set, collections.deque)
_MANY = 10_000
"""A container with more entries is data, not state of a model: only itself is kept."""


def _inner(value: Any) -> list[Any]:
    """What a value holds: entries of a container, or the attributes of an object."""
    if isinstance(value, dict):
        return list(value.values()) if len(value) <= _MANY else []
    if isinstance(value, list | tuple | set | frozenset | collections.deque):
        return list(value) if len(value) <= _MANY else []
    if isinstance(value, nn.Module):
        return [vars(value)]
    if isinstance(value, Tensor) or callable(value) or is_constant(value):
        return []
    room = type(value).__module__.partition(".")[0]
    if room == "rewriter" or (room in sys.stdlib_module_names and room not in _PLAIN):
        return []  # a logger, a lock, a thread: no state of a model
    own = getattr(value, "__dict__", None)
    return [own] if type(own) is dict else []


_PLAIN = ("argparse", "types")
"""Where the standard library has classes for plain attributes."""


def _reachable(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """A value and all that it holds, each once."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if is_constant(value) or id(value) in seen:
            continue
        seen[id(value)] = value  # which keeps its identity from being another's
        yield value
        waiting += _inner(value)


def tensors_of(root: nn.Module) -> dict[int, list[Tensor]]:
    """The tensors that a model holds, in whatever way, by the identity of their memory."""
    seen: dict[int, Any] = {}
    found: dict[int, list[Tensor]] = {}
    for value in _reachable(root, seen):
        if isinstance(value, Tensor) and not value.is_meta:
            key = storage_of(value)
            if key is not None:
                found.setdefault(key, []).append(value)
    return found


@contextlib.contextmanager
def kept_values(root: nn.Module) -> Iterator[None]:
    """Restores the values of tensors that are neither parameter nor buffer: a trace may write
    into those."""
    own = {id(t) for t in (*root.parameters(), *root.buffers())}
    plain = [t for held in tensors_of(root).values() for t in held if id(t) not in own]
    values = [(t, t._version, t.detach().clone()) for t in plain if not t.is_inference()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, version, value in values:
                if tensor._version != version:
                    tensor.copy_(value)


@contextlib.contextmanager
def kept(root: nn.Module, *, data: bool = True) -> Iterator[None]:
    """Restores every attribute of all modules, with what containers and objects in attributes
    hold, and with `data` the values of buffers."""
    values = [(b, b.detach().clone()) for b in root.buffers() if data and not b.is_meta]
    seen: dict[int, Any] = {}
    reached = list(_reachable(root, seen))
    contents = [(v, _entries(v), v.copy()) for v in reached if isinstance(v, _MUTABLE)]
    arrays = [(v, v.copy()) for v in reached if isinstance(v, np.ndarray) and v.flags.writeable]
    try:
        yield
    finally:
        for container, entries, copy in contents:
            if _entries(container) != entries:
                _refill(container, copy)
        for array, values_then in arrays:
            array[...] = values_then
        # without data nothing is called: under a tracer that would be traced
        with torch.no_grad() if values else contextlib.nullcontext():
            for buffer, tensor in values:  # batch norm does not count as a version
                if not _equal(buffer, tensor):
                    buffer.copy_(tensor)


def _equal(now: Tensor, then: Tensor) -> bool:
    """Whether the values are the same; False of kinds that torch cannot compare (sparse ones, half
    complex numbers)."""
    try:
        return torch.equal(now, then)
    except (NotImplementedError, RuntimeError):
        return False


def _entries(container: Any) -> list[Any]:
    """What a container holds, by identity."""
    if isinstance(container, dict):
        return [(key, id(v)) for key, v in dict.items(container)]
    return [id(v) for v in container]


def _refill(container: Any, copy: Any) -> None:
    if isinstance(container, dict):
        container.clear()
        container.update(copy)
    elif isinstance(container, list):
        container[:] = copy
    else:
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(copy)


def written(root: nn.Module) -> Callable[[], dict[str, str]]:
    """Starts watching; the function it returns tells which modules, by dotted name, have got an
    attribute (or another tensor as a buffer) since."""
    before = [(name, module, _state_of(module)) for name, module in root.named_modules()]

    def changes() -> dict[str, str]:
        found: dict[str, str] = {}
        for name, module, then in before:
            now = _state_of(module)
            for key in {**then, **now}:
                if key == RECORDED:  # recorders are put in place once, and change nothing
                    continue
                if key not in now or key not in then or not _unchanged(now[key], then[key]):
                    found[name] = key
        return found

    return changes


def _state_of(module: nn.Module) -> dict[str, Any]:
    own = {k: _content(v, ()) for k, v in vars(module).items() if _own_state(k)}
    return {**own, **module._buffers}


def _own_state(name: str) -> bool:
    return name not in (*_CONTAINERS, "training", "_rewriter") and not is_hook_dict(name)


class _Held:
    """An object and the attributes that it had."""

    def __init__(self, owner: Any, own: dict[str, Any]) -> None:
        self.owner, self.own = owner, own


def _content(value: Any, parents: tuple[int, ...]) -> Any:
    """A copy of the containers and objects in a value, around the same tensors and modules."""
    if isinstance(value, nn.Module) or id(value) in parents or len(parents) > _DEPTH:
        return value
    parents = (*parents, id(value))
    if type(value) is list and len(value) <= _MANY:
        return [_content(v, parents) for v in value]
    if type(value) is dict and len(value) <= _MANY:
        return {k: _content(v, parents) for k, v in value.items()}
    if isinstance(value, list | dict | tuple | set | frozenset | collections.deque):
        return value.copy() if isinstance(value, _MUTABLE) else value
    if isinstance(value, np.ndarray):
        return value.copy()
    if own := _inner(value):
        return _Held(value, _content(own[0], parents))
    return value


_DEPTH = 4


def _unchanged(now: Any, then: Any) -> bool:
    if isinstance(then, _Held):
        return isinstance(now, _Held) and now.owner is then.owner and _unchanged(now.own, then.own)
    if type(now) in (list, dict) and type(now) is type(then) and len(now) == len(then):
        if isinstance(now, list):
            return all(map(_unchanged, now, then))
        return all(k in then and _unchanged(v, then[k]) for k, v in now.items())
    if isinstance(now, _MUTABLE) and type(now) is type(then):
        return _entries(now) == _entries(then)
    if isinstance(now, np.ndarray) and isinstance(then, np.ndarray):
        return (
            now.dtype == then.dtype and now.shape == then.shape and now.tobytes() == then.tobytes()
        )
    return same(now, then)
