"""What the trace of a training step took for granted, so that a step with anything else gets a
trace of its own.

A joint graph holds the options of the layers that it went through (`p`, `eps`, `momentum`), and the
code of their forward, as they were; it takes their parameters and buffers as inputs of fixed sizes.
What the layers do not hold is not here: whoever calls a program has checked what that program
itself was made from.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from rewriter.capture.hosted import Program
from rewriter.modules.structure import is_constant
from rewriter.modules.tree import attribute, hooked, is_hook_dict

__all__ = ["assumed", "changed", "foreign_hooks", "transformed", "weights"]

_LIVE = {"_parameters", "_buffers", "_modules", "_rewriter", "_non_persistent_buffers_set"}
_LIVE |= {"_is_full_backward_hook", "_state_dict_hooks", "_state_dict_pre_hooks"}
_LIVE |= {"_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
"""Attributes of a layer that are looked at in another way, or that no call reads."""


def assumed(root: nn.Module, program: Program, leaves: Sequence[Tensor]) -> dict[str, Any]:
    """Everything but the sizes of the inputs, by what it is called; compared with `==`."""
    found: dict[str, Any] = {"the settings of torch": _settings()}
    first: dict[int, str] = {}
    for name, tensor in weights(root, program).items():
        shared = first.setdefault(id(tensor), name)
        found[name] = (*_kind(tensor), tuple(tensor.shape), tensor.stride(), shared)
    for number, leaf in enumerate(leaves):
        found[f"input {number}"] = (*_kind(leaf), _layout(leaf))
    seen: set[int] = set()
    for fqn in layers(program):
        for name, layer in root.get_submodule(fqn).named_modules(prefix=fqn):
            if id(layer) not in seen:
                seen.add(id(layer))
                found[f"the class of {name}"] = type(layer)
                found.update(_options(name, layer))
    return found


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first thing that is not as it was; None where all is."""
    if then == now:
        return None
    for name in [*then, *now]:
        if name not in then or name not in now or then[name] != now[name]:
            return name
    return None


def layers(program: Program) -> list[str]:
    """The modules that a program calls, by name."""
    nodes = program.graph.nodes
    return list(dict.fromkeys(str(n.target) for n in nodes if n.op == "call_module"))


def weights(root: nn.Module, program: Program) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names, and what else a program reads as a tensor:
    the inputs of a trace."""
    found: dict[str, Tensor] = dict(root.named_parameters(remove_duplicate=False))
    found.update(root.named_buffers(remove_duplicate=False))
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target not in found:
            value = attribute(root, node.target)
            if isinstance(value, Tensor):
                found[node.target] = value
    return found


def foreign_hooks(root: nn.Module) -> str | None:
    """Whose hooks would not run in a planned step; None where nobody's."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "torch.nn has global forward hooks"
    if nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks:
        return "torch.nn has global backward hooks"
    own = hooked(root)
    return f"{own} has hooks" if own else None


def transformed() -> str | None:
    """What looks into every operation of the call that is being made; None where nothing does."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "torch.autograd.forward_ad"
    return "torch.jit.trace" if torch._C._is_tracing() else None


def _settings() -> tuple[Any, ...]:
    """Process- and thread-wide switches by which operations are chosen or made."""
    kinds = ("cpu", "cuda")
    return (
        tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds),
        torch.is_autocast_cache_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.dtype, tensor.device, tensor.requires_grad


def _layout(tensor: Tensor) -> Any:
    """How a tensor lies in memory, at any size where it has no gaps."""
    if tensor.is_contiguous():
        return "contiguous"
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    if tensor.permute(order).is_contiguous():
        return tuple(order)
    return tuple(tensor.shape), strides


def _options(name: str, owner: Any) -> dict[str, Any]:
    """The plain attributes of a layer."""
    return {
        f"{key!r} of {name}": _frozen(value, ())
        for key, value in vars(owner).items()
        if key not in _LIVE and not is_hook_dict(key)
    }


class _Same:
    """A value that is equal to itself alone; a tensor also while nothing writes into it."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.version = value._version if isinstance(value, Tensor) else 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return NotImplemented
        return other.value is self.value and other.version == self.version

    __hash__ = None  # type: ignore[assignment]


def _frozen(value: Any, parents: tuple[int, ...]) -> Any:
    """A copy of a nested value that stays as it is, to compare with `==`; 1 and 1.0 differ."""
    if isinstance(value, types.MethodType) or callable(value) and not isinstance(value, type):
        return _Same(getattr(value, "__func__", value))
    if is_constant(value):
        return type(value), value
    if id(value) in parents:
        return "itself"
    parents = (*parents, id(value))
    if isinstance(value, list | tuple):
        return type(value), [_frozen(v, parents) for v in value]
    if isinstance(value, set | frozenset):
        return type(value), set(value)
    if isinstance(value, dict):
        return type(value), {k: _frozen(v, parents) for k, v in value.items()}
    if isinstance(value, Tensor) or not hasattr(value, "__dict__"):
        return _Same(value)
    return type(value), {k: _frozen(v, parents) for k, v in vars(value).items()}
