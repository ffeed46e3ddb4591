"""Whether one graph serves both modes: does train mode make the torch calls that eval mode makes?

The trace of eval mode keeps a record of the model's torch calls. The forward then runs once more,
in train mode, and no call is executed: each must be the next one of the record, on the very same
tensors and equal other arguments, and is answered with the recorded result. A forward that comes to
the same results this way computes the same, whatever the sizes and values.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode

from rewriter.modules.running import kept, modes, random_state, set_random_state, written
from rewriter.modules.structure import Structure, flatten, is_constant, same

__all__ = ["Record", "Replayed", "replayed"]

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Record:
    """The torch calls of a forward, in order: (function, args, kwargs, result)."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Makes one call and keeps it."""
        given = _copied((args, kwargs))  # containers that the model may change afterwards
        result = func(*args, **kwargs)
        self.calls.append((func, *given, _copied(result)))
        return result


class Replayed:
    """What a replay found.

    Args:
        alike: train mode makes the same calls and gives the same results.
        clean: the replay left no trace in the graph that is being traced; else that is useless.
    """

    def __init__(self, alike: bool, clean: bool) -> None:
        self.alike, self.clean = alike, clean


class _Differs(Exception):
    """The replayed forward leaves the record."""


class _Replay(TorchFunctionMode):
    """Answers every torch call from a record."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.left = iter(record.calls)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorded = next(self.left, None)
        if recorded is None:
            raise _Differs
        then, then_args, then_kwargs, result = recorded
        if func != then or not _alike(args, then_args) or not _alike(kwargs or {}, then_kwargs):
            raise _Differs
        if func is torch._C._set_grad_enabled:  # Python code may ask for the mode
            _set_grad(*args)
        return _copied(result)


def replayed(
    module: nn.Module,
    call: Callable[[], Any],
    record: Record,
    results: list[Any],
    structure: Structure,
) -> Replayed:
    """Runs a forward in train mode against the record of its eval mode; to be called while that
    is traced.

    Args:
        module: whose mode is switched.
        call: runs it.
        record: of the same call in eval mode.
        results, structure: the flat results of that call and what they were taken from.
    """
    proxy = get_proxy_mode()
    if proxy is None:
        return Replayed(alike=False, clean=True)
    nodes = proxy.tracer.graph.nodes
    before, grad, random = len(nodes), torch.is_grad_enabled(), random_state()
    changes = written(module)
    replay = _Replay(record)
    again: list[Any] = []
    try:
        with kept(module, data=False), modes(module, True), _unseen_modules(), replay:
            own = flatten(call(), again, objects=True)
            alike = not changes() and random_state() == random
        alike = (
            alike
            and next(replay.left, None) is None
            and _alike(again, results)
            and _same_structure(own, structure)
        )
    except Exception:  # whatever it is, a trace of train mode itself meets it again
        alike = False
    finally:
        _set_grad(grad)
        set_random_state(random)
    # comparisons of sizes are traced too: nothing uses them, so that they fall away
    new = itertools.islice(nodes, before, None)
    return Replayed(alike, clean=all(isinstance(n.meta.get("val"), _SYMBOLIC) for n in new))


@contextlib.contextmanager
def _unseen_modules() -> Iterator[None]:
    """The tracer counts calls of modules, and keeps a stack of them that an exception would leave
    as it is: inside, modules are called past it."""
    call: Any = vars(nn.Module)["__call__"]
    nn.Module.__call__ = nn.Module._wrapped_call_impl  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]


def _set_grad(enabled: bool) -> None:
    with torch._C.DisableTorchFunction():  # or it would be traced
        torch._C._set_grad_enabled(enabled)


def _copied(value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {k: _copied(v) for k, v in value.items()}
    return value


def _alike(a: Any, b: Any) -> bool:
    """The same tensors, equal constants, symbolic numbers of equal expressions."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(v, b[k]) for k, v in a.items())
    if isinstance(a, slice):
        return _alike((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if isinstance(a, _SYMBOLIC):
        return bool(a.node.expr == b.node.expr)
    return is_constant(a) and bool(a == b)


def _same_structure(a: Structure, b: Structure) -> bool:
    if a.kind == "copy":  # an object without tensors
        equal = b.kind == "copy" and type(a.value) is type(b.value)
        return equal and (a.value is b.value or _same_state(a.value, b.value))
    return (
        a.kind == b.kind
        and a.type is b.type
        and a.items == b.items
        and same(a.value, b.value)
        and len(a.children) == len(b.children)
        and all(map(_same_structure, a.children, b.children))
    )


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, dict | list | set | frozenset) or not hasattr(a, "__dict__"):
        return type(a) in (dict, list) and same(a, b)
    return not hasattr(type(a), "__slots__") and same(vars(a), vars(b))
