"""What a graph took for granted about the Python objects it came from, checked at every call.

A trace turns `self.scale`, `self.config.output_attentions` or `self.training` into constants, and
opens containers up, so that their hooks would not run. `Watch` remembers those values and says in
words which of them has changed since; the caller then runs the model's Python instead.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.modules.structure import is_constant
from rewriter.modules.tree import is_hook_dict, is_recorder, join, recorded_inside

__all__ = ["Watch"]

_IGNORED = {"training", "_rewriter", "_parameters", "_buffers", "_non_persistent_buffers_set"}
_IGNORED |= {"_is_full_backward_hook", "_state_dict_hooks", "_state_dict_pre_hooks"}
_IGNORED |= {"_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
"""State that a graph reads live, that has a check of its own, or that no call reads."""


class Watch:
    """The plain state of a module tree, as its graphs took it.

    Args:
        module: that the graphs live on.
        graphs: the layers that they call are not watched: a call reads them as they are, and
            another layer in their place takes effect.
    """

    def __init__(self, module: nn.Module, graphs: Iterable[fx.Graph]) -> None:
        called = [{str(n.target) for n in g.nodes if n.op == "call_module"} for g in graphs]
        self._root = module
        self._layers: set[str] = set.intersection(*called) if called else set()
        self._held: list[tuple[str, Any, dict[str, Any]]] = []
        self._sizes: list[int] = []
        seen: set[int] = set()
        skipped: set[int] = set()
        for name, inner in module.named_modules():
            if name in self._layers:
                skipped.update(id(m) for m in inner.modules())
            if id(inner) not in skipped:
                self._hold(name, inner, seen, own_hooks=bool(name))
        self._tensors = [t for t in [*module.parameters(), *module.buffers()] if _is_float(t)]
        self._dtypes = [t.dtype for t in self._tensors]
        self._fast: list[Any] | None = None

    def _hold(self, name: str, owner: Any, seen: set[int], *, own_hooks: bool = True) -> None:
        if id(owner) in seen:
            return
        seen.add(id(owner))
        state: dict[str, Any] = {}
        for key, value in vars(owner).items():
            if key in _IGNORED and isinstance(owner, nn.Module):
                continue
            if is_hook_dict(key):
                if own_hooks:
                    state[key] = dict(value)
            elif key == "_modules" and isinstance(owner, nn.Module):
                state[key] = dict(value)
            elif _is_plain(value):
                state[key] = copy.deepcopy(value)
            else:
                for i, inner in enumerate(_objects(value)):
                    label = join(name, key)
                    self._hold(f"{label}[{i}]" if inner is not value else label, inner, seen)
        self._held.append((name, owner, state))
        self._sizes.append(len(vars(owner)))

    def difference(self, training: bool) -> str | None:
        """What has changed since, or None."""
        if recorded_inside(self._root):
            return "outputs of layers inside are recorded, which a graph would bypass"
        fast = self._fast
        if fast is None:
            fast = self._fast = [
                (vars(o), size, s.items(), isinstance(o, nn.Module))
                for (_, o, s), size in zip(self._held, self._sizes, strict=True)
            ]
        try:
            for now, size, then, is_module in fast:
                if not then <= now.items() or len(now) != size:
                    return self._explain(training)
                if is_module and now["training"] is not training:
                    return self._explain(training)
        except (RuntimeError, ValueError):  # `==` with a tensor or an array that is there now
            return self._explain(training)
        if [t.dtype for t in self._tensors] != self._dtypes:
            return self._explain(training)
        return None

    def _explain(self, training: bool) -> str | None:
        """The first change in words; None where it turns out not to matter."""
        for name, owner, then in self._held:
            label = name or "the model"
            now = vars(owner)
            if isinstance(owner, nn.Module) and owner.training is not training:
                modes = ("eval", "train")
                return (
                    f"{label} is in {modes[owner.training]} mode inside a module in "
                    f"{modes[training]} mode"
                )
            if isinstance(owner, nn.Module) and "forward" in now and "forward" not in then:
                return f"{label} has got a forward of its own"
            for key, value in then.items():
                if key in now and _equal(now[key], value):
                    continue
                if key == "_modules" and key in now:
                    changed = self._replaced(name, value, now[key])
                    if changed:
                        return f"{changed} was replaced after the rewrite"
                    then[key] = dict(now[key])
                elif is_hook_dict(key) and key in now and _users(now[key]) == _users(value):
                    then[key] = dict(now[key])
                elif is_hook_dict(key):
                    return f"hooks of {label} were changed after the rewrite"
                else:
                    shown = repr(now[key]) if key in now else "missing"
                    return f"{key!r} of {label} is {shown}, captured as {value!r}"
        for tensor, dtype in zip(self._tensors, self._dtypes, strict=True):
            if tensor.dtype != dtype:
                return f"parameters are {tensor.dtype} now, captured as {dtype}"
        self._sizes = [len(vars(o)) for _, o, _ in self._held]
        self._fast = None
        return None

    def _replaced(self, name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        for key in [*then, *now]:
            inner = join(name, key)
            if then.get(key) is not now.get(key) and inner not in self._layers:
                return inner
        return ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fast": None}


def _users(hooks: Mapping[Any, Any]) -> dict[Any, Any]:
    """Hooks without those that a framework records outputs with."""
    return {k: hook for k, hook in hooks.items() if not is_recorder(hook)}


def _equal(now: Any, then: Any) -> bool:
    try:
        return bool(now == then) and not isinstance(now, Tensor)
    except (RuntimeError, ValueError):
        return False


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    return is_constant(value) and not isinstance(value, types.MethodType)


def _objects(value: Any) -> list[Any]:
    """Objects with attributes, in a value or in the containers that it is."""
    if isinstance(value, list | tuple):
        return [inner for v in value for inner in _objects(v)]
    if isinstance(value, dict):
        return [inner for v in value.values() for inner in _objects(v)]
    foreign = isinstance(value, nn.Module | Tensor | types.ModuleType | torch.Generator)
    if foreign or callable(value) or not hasattr(value, "__dict__"):
        return []
    return [value]
