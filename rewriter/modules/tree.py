"""Dotted names in a tree of modules, and which attributes of a module hold hooks."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = [
    "RECORDED",
    "attribute",
    "find",
    "has_hooks",
    "hooked",
    "is_hook_dict",
    "is_recorder",
    "join",
    "own_class",
    "recorded_inside",
    "submodule",
]


def join(prefix: str, name: str) -> str:
    """`prefix.name`; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, also where `fully_shard` has put one of its own before it."""
    classes = type(module).__mro__
    for i, cls in enumerate(classes):
        if cls.__name__ == "FSDPModule" and cls.__module__.startswith("torch.distributed."):
            found: type[nn.Module] = classes[i + 1]
            return found
    return type(module)


def submodule(root: nn.Module, fqn: str) -> nn.Module | None:
    """The module of this name; None where there is none."""
    try:
        return root.get_submodule(fqn)
    except AttributeError:
        return None


def attribute(root: nn.Module, fqn: str) -> Any:
    """The value of this name: a parameter, a buffer, a plain attribute.

    Raises:
        AttributeError: there is none.
    """
    owner, _, name = fqn.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def find(root: nn.Module, fqn: str) -> Any:
    """As `attribute`; None where there is none."""
    owner, _, name = fqn.rpartition(".")
    return getattr(submodule(root, owner), name, None)


_HOOKS = frozenset({
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks",
})  # fmt: skip


def is_hook_dict(name: str) -> bool:
    """Whether an attribute of a module holds hooks around its forward or backward; by torch's own
    names, since a model may well have an `attention_hooks` of another kind."""
    return name in _HOOKS


_RECORDING = "transformers.utils.output_capturing"
RECORDED = "_output_capturing_hooks_installed"
"""Attribute by which transformers knows that its recorders are in place."""


def is_recorder(hook: Any) -> bool:
    """Whether a hook is not the user's, but what transformers records the outputs of layers with:
    it stays where it was put when it was first asked for, and changes nothing."""
    return getattr(hook, "__module__", None) == _RECORDING


def recorded_inside(root: nn.Module) -> bool:
    """Whether outputs of modules below the root are being recorded, in the call that is running."""
    library = sys.modules.get(_RECORDING)
    if library is None or not library._active_collector.get():
        return False
    below = (m for m in root.modules() if m is not root)
    return any(is_recorder(h) for m in below for h in m._forward_hooks.values())


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of the user's run around the module's own forward or backward."""
    hooks = (getattr(module, name, None) or {} for name in _HOOKS)
    return any(not is_recorder(hook) for own in hooks for hook in own.values())


def hooked(root: nn.Module) -> str | None:
    """The first module below the root that has hooks; None where none has."""
    name: str
    for name, module in root.named_modules():
        if name and has_hooks(module):
            return name
    return None
