"""Running a model to look at it, with nothing left behind: no random state, no statistics, no
attribute, no hook's side effect, no input changed in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from rewriter.modules.isolation import isolated, kept_numbers
from rewriter.modules.keeping import kept, tensors_of
from rewriter.modules.quiet import quietly
from rewriter.modules.structure import flatten
from rewriter.modules.tree import is_hook_dict, is_recorder

__all__ = [
    "difference",
    "first_line",
    "modes",
    "own_copy",
    "quiet_run",
    "run_flat",
    "without_hooks",
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
    repeat their side effects. What a framework records outputs with belongs to the model."""
    found = [
        (hooks, dict(hooks))
        for module in root.modules()
        if not _weight_hooks(module)
        for name, hooks in vars(module).items()
        if is_hook_dict(name)
    ]
    try:
        for hooks, contents in found:
            for key in [k for k, hook in contents.items() if not is_recorder(hook)]:
                del hooks[key]
        yield
    finally:
        for hooks, contents in found:  # recorders come when they are first asked for
            new = {k: hook for k, hook in hooks.items() if k not in contents and is_recorder(hook)}
            hooks.clear()
            hooks.update(contents | new)


def _weight_hooks(module: nn.Module) -> bool:
    """torch.nn.utils' old weight_norm and spectral_norm compute the weight in a pre-hook."""
    return any(
        type(hook).__module__.startswith("torch.nn.utils")
        for hook in module._forward_pre_hooks.values()
    )


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


@contextlib.contextmanager
def quiet_run(
    root: nn.Module, training: bool, *, timed: bool = False, grad: bool = False
) -> Iterator[None]:
    """One mode, no hooks, no gradients unless asked for, no warnings; the same random numbers every
    time; nothing that the run writes into the model stays.

    Args:
        root: the model.
        training: its mode.
        timed: nothing looks at the operations, which would take time: torch's random numbers are
            those of the process, and values of tensors stay as they are written.
        grad: gradients are on, which a forward that asks is captured with.
    """
    on_meta = any(p.is_meta for p in root.parameters())
    alone = timed or on_meta
    with (
        modes(root, training),
        without_hooks(root),
        kept(root),
        torch.set_grad_enabled(grad),
        kept_numbers(),
        without_values(root),
        quietly(),
        contextlib.nullcontext() if alone else isolated(root, training, lambda: tensors_of(root)),
    ):
        yield


def run_flat(
    root: nn.Module, args: Any, kwargs: Any, *, training: bool = False, grad: bool = False
) -> list[Any]:
    """The flat outputs of one call; same random numbers every time, no state left behind."""
    leaves: list[Any] = []
    with quiet_run(root, training, grad=grad):
        own_args, own_kwargs = own_copy(args, kwargs)
        flatten(root(*own_args, **own_kwargs), leaves, objects=True, opaque=True)
        # buffers that are results are about to be restored
        return [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]


def difference(actual: Sequence[Any], expected: Sequence[Any]) -> str | None:
    """How two flat results differ by more than rounding, or None."""
    if len(actual) != len(expected):
        return f"{len(actual)} results instead of {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(e, Tensor) and isinstance(a, Tensor):
            if a.is_nested and e.is_nested:
                inner = difference(a.unbind(), e.unbind())
                if inner is not None:
                    return f"result {i}: {inner}"
                continue
            if a.is_nested or e.is_nested:
                return f"result {i} is nested only in one of them"
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
