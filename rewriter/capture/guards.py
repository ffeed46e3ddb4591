"""What a graph took for granted about the Python objects it came from, checked at every call.

A trace turns `self.scale`, `self.config.output_attentions` or `self.training` into constants, and
opens containers up, so that their hooks would not run. `Watch` remembers those values and says in
words which of them has changed since; the caller then runs the model's Python instead.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from torch import Tensor, fx, nn

from rewriter.capture.reads import Reads, objects_in
from rewriter.capture.signature import shown
from rewriter.modules.structure import is_constant
from rewriter.modules.tree import RECORDED, is_hook_dict, is_recorder, join, recorded_inside

__all__ = ["Watch"]

_TENSORS = ("_parameters", "_buffers")
_IGNORED = {"training", "_rewriter", *_TENSORS, "_non_persistent_buffers_set"}
_IGNORED |= {"_is_full_backward_hook", "_state_dict_hooks", "_state_dict_pre_hooks"}
_IGNORED |= {"_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
_IGNORED |= {"_forward_hooks_with_kwargs", "_forward_hooks_always_called"}
_IGNORED |= {"_forward_pre_hooks_with_kwargs", RECORDED}
"""State that a graph reads live, that has a check of its own, or that no call reads."""


class Watch:
    """The plain state of a module tree, as its graphs took it.

    The usual case, that nothing has changed, is one generated function that compares identities.

    Args:
        module: that the graphs live on.
        graphs: the layers that they call are not watched: a call reads them as they are, and
            another layer in their place takes effect.
        reads: what the forward read while it was traced; None takes everything for read.

    Attributes:
        version: counts the changes that turned out not to matter, as another layer in the place of
            one that the graphs call.
    """

    def __init__(
        self, module: nn.Module, graphs: Iterable[fx.Graph], reads: Reads | None = None
    ) -> None:
        called = [{str(n.target) for n in g.nodes if n.op == "call_module"} for g in graphs]
        self._root = module
        self._layers: set[str] = set.intersection(*called) if called else set()
        self._called: set[str] = set().union(*called)
        self._held: list[tuple[str, Any, dict[str, Any]]] = []
        self._absent: list[list[str]] = []
        self._modal: list[bool] = []
        seen: set[int] = set()
        skipped: set[int] = set()
        for name, inner in module.named_modules():
            if name in self._layers:
                skipped.update(id(m) for m in inner.modules())
            if id(inner) not in skipped:
                self._hold(name, inner, seen, reads)
        self._tensors = [t for t in [*module.parameters(), *module.buffers()] if _is_float(t)]
        self._dtypes = [t.dtype for t in self._tensors]
        self._check: Callable[[bool], bool] | None = None
        self.version = 0

    def _hold(self, name: str, owner: Any, seen: set[int], reads: Reads | None) -> None:
        if id(owner) in seen:
            return
        seen.add(id(owner))
        is_module = isinstance(owner, nn.Module)
        read = None if reads is None else reads.of(owner)
        state: dict[str, Any] = {}
        for key, value in vars(owner).items():
            if key in _TENSORS and is_module:
                state[key] = _Given(value)
                continue
            if key in _IGNORED and is_module:
                continue
            if is_module and is_hook_dict(key):
                if name:  # those of the root run around its graphs
                    state[key] = dict(value)
                continue
            if is_module and key == "_modules":
                state[key] = dict(value)
                continue
            if read is not None and key not in read:
                continue
            if _is_plain(value):
                state[key] = copy.deepcopy(value)
                continue
            for i, inner in enumerate(objects_in(value)):
                label = join(name, key)
                self._hold(f"{label}[{i}]" if inner is not value else label, inner, seen, reads)
            if objects_in(value) or isinstance(value, Tensor):
                state[key] = _Same(value)
        self._held.append((name, owner, state))
        self._absent.append(_absent(name, owner, read))
        self._modal.append(is_module and (read is None or "training" in read))

    def difference(self, training: bool) -> str | None:
        """What has changed since, or None."""
        if recorded_inside(self._root):
            return "outputs of layers inside are recorded, which a graph would bypass"
        check = self._check
        if check is not None and check(training):
            return None
        changed = self._explain(training)
        if changed is None:
            self._check = self._compiled()
            self.version += 1
        return changed

    def _compiled(self) -> Callable[[bool], bool]:
        """Whether everything is as it is now, as one function."""
        names: dict[str, Any] = {}

        def known(value: Any) -> str:
            names[name := f"v{len(names)}"] = value
            return name

        tests: list[str] = []
        for (_, owner, then), modal in zip(self._held, self._modal, strict=True):
            now = vars(owner)
            own = known(now)
            tests.append(f"len({own}) == {len(now)}")
            if modal:
                tests.append(f"{own}['training'] is training")
            for key, value in then.items():
                found = now[key]
                if key == "_modules" and isinstance(owner, nn.Module):
                    tests += _children(found, known)
                elif isinstance(value, _Given):
                    tests += value.tests(known(found))
                elif is_hook_dict(key) and isinstance(owner, nn.Module) and not found:
                    tests.append(f"{own}[{key!r}] is {(inner := known(found))} and not {inner}")
                elif isinstance(value, list | dict | set):
                    tests.append(f"{own}[{key!r}] == {known(value)}")
                else:
                    tests.append(f"{own}[{key!r}] is {known(found)}")
        held = {id(owner) for _, owner, _ in self._held}
        owners = [self._root.get_submodule(n.rpartition(".")[0]) for n in sorted(self._called)]
        for inside in {id(m): m for m in owners if id(m) not in held}.values():
            tests += _children(inside._modules, known)
        lines = [f"  if not ({test}): return False" for test in tests]
        body = "\n".join(["def check(training):", " try:", *lines, "  return True"])
        body += "\n except (KeyError, RuntimeError, ValueError): return False\n"
        exec(compile(body, "<rewriter watch>", "exec"), names)  # noqa: S102 (names in quotes)
        return cast("Callable[[bool], bool]", names["check"])

    def _explain(self, training: bool) -> str | None:
        """The first change in words; None where it turns out not to matter."""
        for (name, owner, then), absent, modal in zip(
            self._held, self._absent, self._modal, strict=True
        ):
            label = name or "the model"
            now = vars(owner)
            if modal and owner.training is not training:
                modes = ("eval", "train")
                return (
                    f"{label} is in {modes[owner.training]} mode inside a module in "
                    f"{modes[training]} mode"
                )
            for key in absent:
                if key in now:
                    own = "a forward of its own" if key == "forward" else f"an attribute {key!r}"
                    return f"{label} has got {own}"
            for key, value in then.items():
                if key in now and _equal(now[key], value):
                    continue
                if key == "_modules" and key in now and isinstance(owner, nn.Module):
                    changed = self._replaced(name, value, now[key])
                    if changed:
                        return f"{changed} was replaced after the rewrite"
                    then[key] = dict(now[key])
                elif isinstance(value, _Given) and key in now:
                    return f"{label} {value.difference(now[key])}"
                elif (
                    is_hook_dict(key)
                    and isinstance(owner, nn.Module)
                    and _users(now.get(key) or {}) == _users(value)
                ):
                    then[key] = dict(now[key])
                elif is_hook_dict(key) and isinstance(owner, nn.Module):
                    return f"hooks of {label} were changed after the rewrite"
                else:
                    found = shown(now[key]) if key in now else "missing"
                    if isinstance(value, _Same):
                        return f"{key!r} of {label} is another one ({found}) than was captured"
                    return f"{key!r} of {label} is {found}, captured as {shown(value)}"
        return self.recast()

    def recast(self) -> str | None:
        """Whether the model has another dtype than its graphs were captured in, in words."""
        if [t.dtype for t in self._tensors] == self._dtypes:
            return None
        for tensor, dtype in zip(self._tensors, self._dtypes, strict=True):
            if tensor.dtype != dtype:
                return f"parameters are {tensor.dtype} now, captured as {dtype}"
        return None

    def _replaced(self, name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        for key in [*then, *now]:
            inner, was, found = join(name, key), then.get(key), now.get(key)
            if found is was:
                continue
            if inner not in self._layers or found is None or was is None:  # code asks for None
                return inner
        return ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_check": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_modal" not in state:  # of 0.1.0 or 0.2.0
            modal = [isinstance(owner, nn.Module) for _, owner, _ in state["_held"]]
            absent = [["forward"] if name and m else []
                      for (name, _, _), m in zip(state["_held"], modal, strict=True)]  # fmt: skip
            state = {**state, "_modal": modal, "_absent": absent, "_called": state["_layers"]}
            state = {k: v for k, v in state.items() if k not in ("_sizes", "_fast")}
        self.__dict__.update({"_check": None, "version": 0, **state})


class _Same:
    """A value that must be the very same object: its content is watched elsewhere, or not at
    all."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Given:
    """Which tensors a module has, and which are None: code asks for that, and a graph, which reads
    their values at every call, took the answer."""

    def __init__(self, tensors: Mapping[str, Tensor | None]) -> None:
        self.given = {name: tensor is not None for name, tensor in tensors.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Given) and self.given == other.given

    __hash__ = None  # type: ignore[assignment]

    def tests(self, tensors: str) -> list[str]:
        """That they are the same ones, as code; `tensors` is the name of their dict there."""
        tests = [f"len({tensors}) == {len(self.given)}"] if self.given else [f"not {tensors}"]
        for name, there in self.given.items():
            tests.append(f"{tensors}[{name!r}] is {'not ' if there else ''}None")
        return tests

    def difference(self, tensors: Mapping[str, Tensor | None]) -> str:
        """What is no more as it was, in words."""
        now = _Given(tensors).given
        name = next(n for n in [*self.given, *now] if self.given.get(n) != now.get(n))
        if name not in now:
            return f"has no tensor {name!r} any more"
        if now[name]:
            return f"has got a tensor {name!r}"
        return f"has None in place of the tensor {name!r}"


def _children(children: Mapping[str, Any], known: Callable[[Any], str]) -> list[str]:
    """That submodules are the same ones: also layers, which callers do not look up every time."""
    own = known(children)
    tests = [f"len({own}) == {len(children)}"]
    return tests + [f"{own}[{key!r}] is {known(child)}" for key, child in children.items()]


def _absent(name: str, owner: Any, read: set[str] | None) -> list[str]:
    """Attributes that were looked up, and found not on the object but on its class or nowhere."""
    read = {key for key in read or () if not key.startswith("__")}
    if not isinstance(owner, nn.Module):
        return sorted(read - vars(owner).keys())
    inner = {*owner._modules, *owner._parameters, *owner._buffers}
    keys = read | {"forward"} if name else read - {"forward"}
    return sorted(k for k in keys - inner if k not in vars(owner) and k not in _IGNORED)


def _users(hooks: Mapping[Any, Any]) -> dict[Any, Any]:
    """Hooks without those that a framework records outputs with."""
    return {k: hook for k, hook in hooks.items() if not is_recorder(hook)}


def _equal(now: Any, then: Any) -> bool:
    if isinstance(then, _Same):
        return now is then.value
    if isinstance(then, _Given):
        return _Given(now) == then
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
