"""`Lowered`: the fused form of an eval graph, beside it, made anew whenever its sources change.

The module tree and the state_dict know nothing of it. What was derived is compared at every call
with what it was derived from: the layers in the tree, their classes, plain attributes and hooks,
and their tensors (`rewriter.modules.versions`). It is neither copied nor pickled with the model,
but made again at the first call.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from rewriter.capture.hosted import Program
from rewriter.lowering.planning import Application, Key, failure, lowered_graph, places
from rewriter.lowering.rules import Rule
from rewriter.modules.structure import is_constant
from rewriter.modules.tree import is_hook_dict
from rewriter.modules.versions import Stamp, watch_steps

__all__ = ["Lowered", "Verdicts", "derived", "is_plain_tensor", "with_inputs"]

Tensors = Sequence["Tensor | None"]


@dataclass
class Verdicts:
    """Where rules run in the eval graphs of a module: decided once, by measurement, and then the
    same in each form of its calls and in the saved model again, which so compute the same bits.

    Args:
        rules: the table of rules, in the order in which they are tried.
        places: labels of places (`Application.label`), and whether the rule runs there.
    """

    rules: Sequence[Rule]
    places: dict[str, bool]

    def __deepcopy__(self, memo: dict[int, Any]) -> Verdicts:
        return Verdicts(self.rules, dict(self.places))


class Lowered:
    """What runs instead of an eval graph where no gradient is wanted.

    Args:
        rules: the table of rules, in the order in which they are tried.
        chosen: keys of the applications that passed their check.
    """

    def __init__(self, rules: Sequence[Rule], chosen: Collection[Key]) -> None:
        self.rules, self.chosen = tuple(rules), frozenset(chosen)
        self._forget()
        watch_steps()

    def _forget(self) -> None:
        self._bound: _Bound | None = None
        self._lock = threading.Lock()

    def results(self, root: nn.Module, program: Program, leaves: Sequence[Any], device: str) -> Any:
        """The flat results of the program, by its fused form; None where that cannot serve.

        Args:
            root: the module that the program runs on.
            program: the plain one.
            leaves: the flat inputs.
            device: where the program's device literals go, or "".
        """
        if not _plain_call(root, leaves):
            return None
        bound = self._bound
        if bound is None or not bound.stands(root, program):
            with self._lock:
                bound = self._bound
                if bound is None or not bound.stands(root, program):
                    bound = self._bound = _Bound(root, program, self.rules, self.chosen)
        made = bound.fresh(self._lock)
        if made is None:
            return None
        return made.program.results(root, [*leaves, *made.tensors], device)

    def drop(self) -> None:
        """Lets go of the derived tensors; the next call makes them again."""
        self._bound = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Lowered:
        return Lowered(self.rules, self.chosen)

    def __getstate__(self) -> dict[str, Any]:
        return {"rules": self.rules, "chosen": self.chosen}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["rules"], state["chosen"])  # type: ignore[misc]


def _plain_call(root: nn.Module, leaves: Sequence[Any]) -> bool:
    """Whether a call wants no gradient, is not traced, and runs in no mode that sees layers."""
    if torch.is_grad_enabled() and (
        any(p.requires_grad for p in root.parameters())
        or any(isinstance(t, Tensor) and t.requires_grad for t in leaves)
    ):
        return False
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0  # tangents that fused ops would drop
        and not torch_module._has_any_global_hook()
        and all(not isinstance(t, Tensor) or is_plain_tensor(t) for t in leaves)
        and not any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    )


def is_plain_tensor(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


class _Bound:
    """The rules bound to one module tree: their places, its layers, and the fused program."""

    def __init__(
        self, root: nn.Module, program: Program, rules: Sequence[Rule], chosen: Collection[Key]
    ) -> None:
        self.root, self.plain = root, program
        self.applications, refused = places(program.graph, root, rules, chosen)
        named: dict[str, None] = {}
        for place in [*(a.place for a in self.applications), *(r.place for r in refused)]:
            named.update(dict.fromkeys(place.owners))
        self.layers = _Layers(root, named)
        self.made: _Made | None = None

    def stands(self, root: nn.Module, program: Program) -> bool:
        return self.root is root and self.plain is program and self.layers.same()

    def fresh(self, lock: threading.Lock) -> _Made | None:
        """The program and the derived tensors, as the weights are now; None where there is nothing
        to derive, or it cannot be."""
        if not self.applications:
            return None
        sources, made = self.layers.tensors(), self.made
        if made is not None and made.holds(sources):
            return made
        self.made = None
        if not all(is_plain_tensor(t) and not t.is_inference() for t in sources):
            return None
        with lock, torch.inference_mode(False), torch.no_grad():
            stamp = Stamp(sources, keep=True)
            tensors = [derived(a) for a in self.applications]
            if made is None:
                counts = [len(own) for own in tensors]
                graph, _ = with_inputs(self.plain.graph, self.applications, counts)
                program = Program(graph, None)
            else:
                program = made.program
            made = self.made = _Made(program, [t for own in tensors for t in own], stamp)
        return made


@dataclass(frozen=True)
class _Made:
    """A fused program, the derived tensors that it takes after its inputs, and their stamp."""

    program: Program
    tensors: Tensors
    stamp: Stamp

    def holds(self, sources: Sequence[Tensor]) -> bool:
        return self.stamp.holds(sources)


class _Layers:
    """Layers by name: whether they are the same, with the same attributes, and their tensors."""

    def __init__(self, root: nn.Module, names: Collection[str]) -> None:
        self.held: list[tuple[dict[str, Any], str, nn.Module]] = []
        for name in names:
            owner, _, last = name.rpartition(".")
            siblings: Any = root.get_submodule(owner)._modules
            self.held.append((siblings, last, siblings[last]))
        modules = {id(m): m for _, _, layer in self.held for m in layer.modules()}
        self.shapes = [(m, type(m), list(m._modules.items())) for m in modules.values()]
        self.states = [(vars(m), len(vars(m)), _state(m).items()) for m in modules.values()]
        self.stores = [s for m in modules.values() for s in (m._parameters, m._buffers)]

    def same(self) -> bool:
        for siblings, last, layer in self.held:
            if siblings.get(last) is not layer:
                return False
        for module, kind, below in self.shapes:
            if type(module) is not kind or list(module._modules.items()) != below:
                return False
        return all(len(now) == size and then <= now.items() for now, size, then in self.states)

    def tensors(self) -> list[Tensor]:
        return [t for store in self.stores for t in store.values() if t is not None]


def _state(module: nn.Module) -> dict[str, Any]:
    """A module's hooks and plain attributes, by name."""
    return {
        k: dict(v) if is_hook_dict(k) else v
        for k, v in vars(module).items()
        if is_hook_dict(k) or _is_plain(v)
    }


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else is_constant(value)


def derived(found: Application) -> list[Tensor | None]:
    """What a rule derives at a place.

    Raises:
        VerifyError: the rule's own function fails, or gives something else than tensors.
    """
    try:
        tensors = list(found.rule.fused.derive(found.place))
    except Exception as error:
        raise failure(found.rule, found.place, error) from error
    wrong = next((t for t in tensors if not (t is None or isinstance(t, Tensor))), None)
    if wrong is not None:
        given = TypeError(f"derive gave a {type(wrong).__name__}, not a tensor")
        raise failure(found.rule, found.place, given)
    return [t if t is None else t.detach() for t in tensors]


def with_inputs(
    graph: fx.Graph, applications: Sequence[Application], counts: Sequence[int]
) -> tuple[fx.Graph, dict[Key, fx.Node]]:
    """The lowered graph whose last inputs are the derived tensors, so many of each application."""
    names = (f"rewriter_derived_{i}" for i in itertools.count())
    wanted = {a.key: n for a, n in zip(applications, counts, strict=True)}

    def bring(found: Application, new: fx.Graph) -> list[fx.Node | None]:
        return [new.placeholder(next(names)) for _ in range(wanted[found.key])]

    return lowered_graph(graph, applications, bring)
