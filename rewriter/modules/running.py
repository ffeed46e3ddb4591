"""Running a model to look at it, with nothing left behind: no random state, no statistics, no
attribute, no hook's side effect, no input changed in place."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from rewriter.modules.structure import flatten, same
from rewriter.modules.tree import is_hook_dict

__all__ = [
    "difference",
    "first_line",
    "kept",
    "modes",
    "own_copy",
    "quiet_run",
    "random_state",
    "run_flat",
    "set_random_state",
    "without_hooks",
    "written",
]


@contextlib.contextmanager
def modes(root: nn.Module, training: bool) -> Iterator[None]:
    """Every module of the tree in one mode; restores each one's own mode."""
    flags = [(m, m.training) for m in root.modules()]
    try:
        for module, _ in flags:  # not train(), which a model may override to refuse a mode
            module.training = training
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def without_hooks(root: nn.Module) -> Iterator[None]:
    """No user hook runs inside: tracing would bake what hooks do into the graph, and checks would
    repeat their side effects."""
    kept = [
        (hooks, dict(hooks))
        for module in root.modules()
        if not _weight_hooks(module)
        for name, hooks in vars(module).items()
        if is_hook_dict(name) and hooks
    ]
    try:
        for hooks, _ in kept:
            hooks.clear()
        yield
    finally:
        for hooks, contents in kept:
            hooks.update(contents)


def _weight_hooks(module: nn.Module) -> bool:
    """torch.nn.utils' old weight_norm and spectral_norm compute the weight in a pre-hook."""
    return any(
        type(hook).__module__.startswith("torch.nn.utils")
        for hook in module._forward_pre_hooks.values()
    )


_CONTAINERS = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def kept(root: nn.Module, *, data: bool = True) -> Iterator[None]:
    """Restores every attribute, and with `data` the values of buffers, of all modules."""
    values = [(b, b.detach().clone()) for b in root.buffers() if data and not b.is_meta]
    saved = [(m, dict(vars(m)), {c: dict(getattr(m, c)) for c in _CONTAINERS}) for m in
             root.modules()]  # fmt: skip
    lists = [(v, _content(v)) for _, own, _ in saved for v in own.values()
             if type(v) in (list, dict)]  # fmt: skip
    try:
        yield
    finally:
        for module, own, containers in saved:
            now = vars(module)
            if now.keys() != own.keys() or any(now[k] is not v for k, v in own.items()):
                now.clear()
                now.update(own)
            for name, content in containers.items():
                held = getattr(module, name)
                if list(map(id, held.values())) != list(map(id, content.values())):
                    held.clear()
                    held.update(content)
        for value, content in lists:
            if type(value) is list:
                value[:] = content
            else:
                value.clear()
                value.update(content)
        # without data nothing is called: under a tracer that would be traced
        with torch.no_grad() if values else contextlib.nullcontext():
            for buffer, tensor in values:  # batch norm does not count as a version
                if not torch.equal(buffer, tensor):
                    buffer.copy_(tensor)


def written(root: nn.Module) -> Callable[[], dict[str, str]]:
    """Starts watching; the function it returns tells which modules, by dotted name, have got an
    attribute (or another tensor as a buffer) since."""
    before = [(name, module, _state_of(module)) for name, module in root.named_modules()]

    def changes() -> dict[str, str]:
        found: dict[str, str] = {}
        for name, module, then in before:
            now = _state_of(module)
            for key in {**then, **now}:
                if key not in now or key not in then or not _unchanged(now[key], then[key]):
                    found[name] = key
        return found

    return changes


def _state_of(module: nn.Module) -> dict[str, Any]:
    own = {k: _content(v) for k, v in vars(module).items() if _own_state(k)}
    return {**own, **module._buffers}


def _own_state(name: str) -> bool:
    return name not in (*_CONTAINERS, "training", "_rewriter") and not is_hook_dict(name)


def _content(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict) else value


def _unchanged(now: Any, then: Any) -> bool:
    if type(now) in (list, dict) and type(now) is type(then) and len(now) == len(then):
        if isinstance(now, list):
            return all(map(_unchanged, now, then))
        return all(k in then and _unchanged(v, then[k]) for k, v in now.items())
    return same(now, then)


def own_copy(args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """The same arguments around clones of their tensors, so that a call may change them; around
    fakes of them inside `without_values`."""
    inputs: list[Any] = []
    structure = flatten([list(args), dict(kwargs)], inputs, objects=True, opaque=True)
    clones: dict[int, Any] = {}  # a tensor passed twice stays one tensor
    mode = active_fake_mode()
    for t in inputs:
        if not isinstance(t, Tensor) or id(t) in clones:
            continue
        if mode is not None:
            clones[id(t)] = mode.from_tensor(t, static_shapes=True)
        elif not t.is_meta:
            clones[id(t)] = t.detach().clone().requires_grad_(t.requires_grad)
    own_args, own_kwargs = structure.build([clones.get(id(t), t) for t in inputs])
    return own_args, own_kwargs


def without_values(root: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Where the model is on meta, its calls run on fake tensors: Python code that would ask a
    tensor for its values, and fail, takes the way that it takes while it is traced."""
    if any(p.is_meta for p in root.parameters()):
        return FakeTensorMode(allow_non_fake_inputs=True)
    return contextlib.nullcontext()


def random_state() -> tuple[Any, tuple[Any, ...]]:
    """The states of Python's and NumPy's global random numbers, comparable."""
    state: Any = np.random.get_state()
    return random.getstate(), (state[0], state[1].tobytes(), *state[2:])


def set_random_state(state: tuple[Any, tuple[Any, ...]]) -> None:
    """The inverse of `random_state`."""
    python, (name, keys, *rest) = state
    random.setstate(python)
    np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))


@contextlib.contextmanager
def quiet_run(root: nn.Module, training: bool) -> Iterator[None]:
    """One mode, no hooks, no gradients, no warnings; the same random numbers every time."""
    state = random_state()
    with (
        modes(root, training),
        without_hooks(root),
        kept(root),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        without_values(root),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            yield
        finally:
            set_random_state(state)


def run_flat(root: nn.Module, args: Any, kwargs: Any, *, training: bool = False) -> list[Any]:
    """The flat outputs of one call; same random numbers every time, no state left behind."""
    leaves: list[Any] = []
    with quiet_run(root, training):
        own_args, own_kwargs = own_copy(args, kwargs)
        flatten(root(*own_args, **own_kwargs), leaves, objects=True, opaque=True)
        # buffers that are results are about to be restored
        return [t.clone() if isinstance(t, Tensor) else t for t in leaves]


def difference(actual: Sequence[Any], expected: Sequence[Any]) -> str | None:
    """How two flat results differ by more than rounding, or None."""
    if len(actual) != len(expected):
        return f"{len(actual)} results instead of {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(e, Tensor) and isinstance(a, Tensor):
            if a.shape != e.shape or a.dtype != e.dtype or a.device != e.device:
                return f"result {i} is {a.dtype}{list(a.shape)}, not {e.dtype}{list(e.shape)}"
            if a.is_meta:
                continue
            try:
                torch.testing.assert_close(a, e, equal_nan=True)
            except AssertionError as error:
                return f"result {i}: {first_line(error)}"
        elif isinstance(e, Tensor) or isinstance(a, Tensor) or a != e:
            return f"result {i} is {a!r}, not {e!r}"
    return None


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
