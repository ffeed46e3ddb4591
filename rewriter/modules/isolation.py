"""One run of a model by itself: with random numbers of its own, and what it writes undone.

torch's, Python's and NumPy's global random numbers belong to every thread of the process, so that
they are neither seeded nor put back while other threads may draw from them.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "forget",
    "is_plain",
    "isolated",
    "kept_numbers",
    "own_numbers",
    "random_state",
    "set_random_state",
]

_lock = threading.Lock()


class _Isolated(TorchDispatchMode):
    """Gives every op that draws a generator of this run, and keeps the value of a tensor of the
    model's before the first write to it.

    Args:
        held: the tensors of the model by the identity of their memory.
    """

    supports_higher_order_operators = True

    def __init__(self, held: Mapping[int, Sequence[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = held
        self.values: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.generators: dict[torch.device, torch.Generator] = {}
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._keep(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            if not _drops_nothing(func, args, kwargs):
                return self._draw(func, args, kwargs)
        return func(*args, **kwargs)

    def _keep(self, func: torch._ops.OpOverload, args: Any, kwargs: Any) -> None:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in given if isinstance(given, list | tuple) else [given]:
                key = storage_of(tensor) if isinstance(tensor, Tensor) else None
                if key is not None and key in self.held and key not in self.values:
                    own = [t.detach() for t in self.held[key]]
                    self.values[key] = [(t, t.clone()) for t in own]

    def _draw(self, func: torch._ops.OpOverload, args: Any, kwargs: Any) -> Any:
        device = _device(args, kwargs)
        if device.type == "meta":
            return func(*args, **kwargs)
        self.drew = True
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(0)
        own, taking = self.generators[device], _taking_generator(func)
        if taking is not None:
            given = _positional(func, args, kwargs)
            return taking(**given, generator=own)
        whole = torch.default_generator if device.type == "cpu" else _default(device)
        with _lock:  # the op has no generator: the global one stands in for this one call
            before = whole.get_state()
            whole.set_state(own.get_state())
            try:
                return func(*args, **kwargs)
            finally:
                own.set_state(whole.get_state())
                whole.set_state(before)

    def undo(self) -> None:
        """Gives the tensors of the model the values that they had."""
        with torch.no_grad():
            for tensor, value in (pair for own in self.values.values() for pair in own):
                tensor.copy_(value)


def storage_of(tensor: Tensor) -> int | None:
    """The identity of a tensor's memory; None of one that has no storage."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a subclass around other tensors
        return None


def _drops_nothing(func: torch._ops.OpOverload, args: Any, kwargs: Any) -> bool:
    """Whether an op that can draw, as attention can, is called without dropout, as in eval mode."""
    given = _positional(func, args, kwargs)
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return {**defaults, **given}.get("dropout_p") == 0.0


def _positional(func: torch._ops.OpOverload, args: Any, kwargs: Any) -> dict[str, Any]:
    names = [a.name for a in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    given.pop("generator", None)
    return given


@functools.cache
def _taking_generator(func: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The overload of an op that takes a generator besides; None where there is none."""
    own = [a.name for a in func._schema.arguments if a.name != "generator"]
    packet = func.overloadpacket
    for overload in (func, *(getattr(packet, name) for name in packet.overloads())):
        names = [a.name for a in overload._schema.arguments]
        if "generator" in names and [n for n in names if n != "generator"] == own:
            return overload  # type: ignore[no-any-return]
    return None


def _device(args: Any, kwargs: Any) -> torch.device:
    for value in args:
        if isinstance(value, Tensor):
            return value.device
    device = kwargs.get("device")
    return torch.get_default_device() if device is None else torch.device(device)


def _default(device: torch.device) -> torch.Generator:
    generators: Any = torch.get_device_module(device).default_generators
    found: torch.Generator = generators[device.index or 0]
    return found


_plain: weakref.WeakKeyDictionary[nn.Module, set[bool]] = weakref.WeakKeyDictionary()
"""Of a model, the modes in which a run was seen to draw nothing and to write nothing."""


def forget(root: nn.Module) -> None:
    """The model may be another one than when it ran before."""
    _plain.pop(root, None)


def is_plain(root: nn.Module, training: bool) -> bool:
    """Whether a run in this mode drew and wrote nothing, so that the next runs fused code, too."""
    return training in _plain.get(root, ())


@contextlib.contextmanager
def isolated(
    root: nn.Module, training: bool, held: Callable[[], Mapping[int, Sequence[Tensor]]]
) -> Iterator[None]:
    """The same random numbers of torch's in every run, of its own, and no write to the tensors of
    `held` stays.

    The ops of a run are only looked at where an earlier one, in the same mode, was not seen to do
    neither: a dispatch mode takes time, and keeps fused code from running.
    """
    known = _plain.setdefault(root, set())
    if training in known:
        yield
        return
    mode = _Isolated(held())
    try:
        with mode:
            yield
        if not mode.drew and not mode.values:
            known.add(training)
    finally:
        mode.undo()


@contextlib.contextmanager
def own_numbers() -> Iterator[None]:
    """torch's random numbers, the same in every run, without the global ones."""
    with _Isolated({}):
        yield


# Python's and NumPy's global random numbers

State = tuple[Any, tuple[Any, ...]]


def random_state() -> State:
    """The states of Python's and NumPy's global random numbers, comparable."""
    state: Any = np.random.get_state()
    return random.getstate(), (state[0], state[1].tobytes(), *state[2:])


def set_random_state(state: State) -> None:
    """The inverse of `random_state`."""
    python, (name, keys, *rest) = state
    random.setstate(python)
    np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))


@contextlib.contextmanager
def kept_numbers() -> Iterator[Callable[[], bool]]:
    """Python's and NumPy's random numbers are put back where this thread drew any. What it gives
    tells, during and after, whether it did."""
    before = random_state()
    with _noting_draws(before) as noted:

        def drew() -> bool:
            return random_state() != before and noted()

        try:
            yield drew
        finally:
            if drew():
                set_random_state(before)


_CALM = 50  # runs: one rewrite or two


class _Noted(threading.local):
    looking = False
    draws = 0
    calm = _CALM  # runs in a row in which no number moved on


_noted = _Noted()


@contextlib.contextmanager
def _noting_draws(before: State) -> Iterator[Callable[[], bool]]:
    """Whether this thread may have drawn, asked where the numbers have moved on from `before`: it
    has, if it is the only one, or no other has run since. Otherwise its calls are looked at: of
    Python's generator itself, and of code that names NumPy's. That takes two thirds of the time, so
    it begins once numbers have moved on, which are left as they are if nobody looked and another
    ran, and ends with `_CALM` runs in which none did."""
    start, outer = _noted.draws, _noted.looking
    if not outer and (threading.active_count() == 1 or sys.getprofile() is not None):
        yield lambda: True
        return
    if not outer and _noted.calm >= _CALM:
        others = _times_of_others()
        yield lambda: _doubted(others)
        return
    naming: dict[Any, bool] = {}  # by code

    def look(frame: Any, event: str, argument: Any) -> None:
        if event == "c_call":
            own = getattr(argument, "__self__", None) is _PYTHON
            _noted.draws += own and argument.__name__ in _DRAWING
        elif event == "call":
            code = frame.f_code
            if code not in naming:
                naming[code] = _names_numpy_random(code, frame.f_globals)
            _noted.draws += naming[code]

    if not outer:
        _noted.looking = True
        sys.setprofile(look)
    try:
        yield lambda: _noted.draws > start
    finally:
        if not outer:
            sys.setprofile(None)
            _noted.looking = False
            moved = _noted.draws > start or random_state() != before
            _noted.calm = 0 if moved else _noted.calm + 1


def _doubted(others: dict[int | None, int | None]) -> bool:
    """That the others slept; whoever drew may do so again, and beside one that is awake."""
    _noted.calm = 0
    return None not in others.values() and _times_of_others() == others


def _times_of_others() -> dict[int | None, int | None]:
    """Of the threads of Python beside this one, the CPU time in ns, or None where none is told: the
    thread of a progress bar, which lives for the whole process, sleeps nearly all of it."""
    own, all_ = threading.get_native_id(), [t.native_id for t in threading.enumerate()]
    return {number: _cpu_time(number) for number in all_ if number != own}


def _cpu_time(thread: int | None) -> int | None:
    if thread is None or not sys.platform.startswith("linux"):
        return None
    try:  # the clock that pthread_getcpuclockid names, of a thread that may have ended meanwhile
        return time.clock_gettime_ns(~thread << 3 | 6)
    except OSError:
        return None


_DRAWING = ("random", "getrandbits", "seed")
_PYTHON: Any = random.random.__self__  # type: ignore[attr-defined]


def _names_numpy_random(code: Any, names: Mapping[str, Any]) -> bool:
    if str(names.get("__name__", "")).startswith(("rewriter.", "numpy.")):
        return False
    for name in code.co_names:
        value = names.get(name)
        if value is np and "random" in code.co_names:
            return True
        if type(value) is types.MethodType:  # not asked of others: a lazy module would be imported
            value = np.random if value.__self__ is np.random.mtrand._rand else value
        if value is np.random:
            return True
    return False
