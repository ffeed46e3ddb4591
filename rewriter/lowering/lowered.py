"""`Lowered`: the fused form of an eval graph, beside it, made anew whenever its sources change.

The module tree and the state_dict know nothing of it. What was derived is compared at every call
with what it was derived from: the layers in the tree, their classes, plain attributes and hooks,
and their tensors (`rewriter.modules.versions`). It is neither copied nor pickled with the model,
but made again at the first call.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from rewriter.capture.hosted import Program
from rewriter.lowering.following import follow
from rewriter.lowering.planning import Application, Key, failure, lowered_graph, pays, places
from rewriter.lowering.rules import Rule
from rewriter.modules.structure import is_constant
from rewriter.modules.tree import is_hook_dict
from rewriter.modules.versions import Stamp, watch_steps

if TYPE_CHECKING:
    from rewriter.kernels.native_ops import InGraph

__all__ = ["Bound", "Lowered", "Traced", "Verdicts", "derived", "is_plain_tensor"]


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
        self._bound: Bound | None = None
        self.following: Any = None
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
                    bound = self._bound = Bound(root, program, self.rules, self.chosen)
        made = bound.fresh(self._lock)
        if made is None:
            return None
        return made.program.results(root, [*leaves, *made.ready], device)

    def in_graph(self, root: nn.Module, program: Program) -> Traced | None:
        """What a compiler traces in place of the program, with the weights as they are now; None
        where no place has a form for graphs."""
        return self.bound_in_graphs(root, program).in_graph()

    def bound_in_graphs(self, root: nn.Module, program: Program) -> Bound:
        """The places as a compiler is to trace them."""
        from rewriter.lowering.table import IN_GRAPHS

        return Bound(root, program, self.rules, self.chosen, IN_GRAPHS)

    def follow(self, root: nn.Module, program: Program, leaves: Sequence[Any]) -> Any:
        """What Dynamo traces in place of the program, and what keeps up with the weights; None
        where that is the program itself."""
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            return None
        if any(isinstance(t, Tensor) and not (is_plain_tensor(t) and t.is_cpu) for t in leaves):
            return None
        return follow(self, root, program)

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


class Bound:
    """The rules bound to one module tree: their places, its layers, and the fused program.

    Args:
        root, program, rules, chosen: as of `Lowered`; None for wherever a rule applies, and is not
            slower at the sizes that the graph was captured with.
        further: rules for what the others leave.
    """

    def __init__(
        self,
        root: nn.Module,
        program: Program,
        rules: Sequence[Rule],
        chosen: Collection[Key] | None,
        further: Sequence[Rule] = (),
    ) -> None:
        self.root, self.plain = root, program
        self.applications, refused = places(program.graph, root, rules, chosen)
        if chosen is None:
            self.applications = [a for a in self.applications if pays(a)]
        taken = {n for a in self.applications for n in a.place.match.nodes}
        found, _ = places(program.graph, root, further)
        self.applications += [a for a in found if taken.isdisjoint(a.place.match.nodes)]
        named: dict[str, None] = {}
        for place in [*(a.place for a in self.applications), *(r.place for r in refused)]:
            named.update(dict.fromkeys(place.owners))
        self.layers = _Layers(root, named)
        self.made: _Made | None = None

    def stands(self, root: nn.Module, program: Program) -> bool:
        return self.root is root and self.plain is program and self.layers.same()

    def fresh(self, lock: threading.Lock) -> _Made | None:
        """The program and what runs in its places, as the weights are now; None where there are no
        places, or nothing can be derived."""
        if not self.applications:
            return None
        sources, made = self.layers.tensors(), self.made
        if made is not None and made.holds(sources):
            return made
        self.made = None
        if not all(is_plain_tensor(t) and not t.is_inference() for t in sources):
            return None
        with lock, torch.inference_mode(False), torch.no_grad():
            tensors = [derived(a) for a in self.applications]
            copied = self._copied(tensors)
            stamp = Stamp(sources, keep=True, sampled=[id(t) in copied for t in sources])
            ready = [a.ready(own) for a, own in zip(self.applications, tensors, strict=True)]
            program = self._program() if made is None else made.program
            made = self.made = _Made(program, ready, stamp)
        return made

    def in_graph(self) -> Traced | None:
        """The program with those of the places that have a form for graphs."""
        with torch.inference_mode(False), torch.no_grad():
            bound = [a for a in self.applications if a.rule.fused.bind is not None]
            formed = [(a, _in_graph(a.ready(derived(a)))) for a in bound]
        self.applications = [a for a, form in formed if form is not None]
        ready = [form for _, form in formed if form is not None]
        return Traced(self._program(), ready) if ready else None

    def _copied(self, tensors: Sequence[Sequence[Tensor | None]]) -> set[int]:
        """Ids of the sources of places that derive tensors of other memory than theirs; of what is
        bound, those that are packed or read once: levels, and single numbers."""
        found: set[int] = set()
        for application, own in zip(self.applications, tensors, strict=True):
            layers = [self.root.get_submodule(name) for name in application.place.owners]
            read = [t for m in layers for t in (*m.parameters(), *m.buffers())]
            memory = {t.untyped_storage().data_ptr() for t in read}
            if any(t is not None and not _lies_in(t, memory) for t in own):
                found.update(map(id, read))
            elif application.rule.fused.bind is not None:
                found.update(id(t) for t in read if not t.is_floating_point() or t.numel() == 1)
        return found

    def _program(self) -> Program:
        """The lowered graph, whose last inputs are what runs in each place."""
        names = (f"rewriter_place_{i}" for i in itertools.count())

        def bring(found: Application, new: fx.Graph) -> fx.Node:
            return new.placeholder(next(names))

        new = lowered_graph(self.plain.graph, self.applications, bring)[0]
        return Program(new, self.plain.output)


@dataclass(frozen=True)
class Traced:
    """A program as a compiler traces it: what runs in its places, which it takes after its inputs,
    is made of torch's operations over tensors that do not follow the weights any more."""

    program: Program
    ready: Sequence[InGraph]

    @property
    def places(self) -> list[fx.Node]:
        """The inputs of the graph that stand for `ready`."""
        inputs = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        return inputs[len(inputs) - len(self.ready) :]

    def __call__(self, root: nn.Module, leaves: Sequence[Any], device: str) -> Any:
        """As of `Program`."""
        places = [functools.partial(form.call, form.tensors) for form in self.ready]
        return self.program(root, [*leaves, *places], device)


def _in_graph(ready: Callable[..., Any]) -> InGraph | None:
    """What runs at a place as a graph has it."""
    form = getattr(ready, "in_graph", None)
    return None if form is None else cast("InGraph | None", form())


@dataclass(frozen=True)
class _Made:
    """A fused program, what runs in its places, which it takes after its inputs, and the stamp of
    the tensors that this was made of."""

    program: Program
    ready: Sequence[Callable[..., Any]]
    stamp: Stamp

    def holds(self, sources: Sequence[Tensor]) -> bool:
        return self.stamp.holds(sources)


def _lies_in(tensor: Tensor, memory: Collection[int]) -> bool:
    return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in memory


class _Layers:
    """Layers by name: whether they are the same, with the same attributes, and their tensors."""

    def __init__(self, root: nn.Module, names: Collection[str]) -> None:
        self.held: list[tuple[dict[str, Any], str, nn.Module]] = []
        for name in names:
            owner, _, last = name.rpartition(".")
            siblings: Any = root.get_submodule(owner)._modules
            self.held.append((siblings, last, siblings[last]))
        self.modules = list(
            {id(m): m for _, _, layer in self.held for m in layer.modules()}.values()
        )
        self.stores = [s for m in self.modules for s in (m._parameters, m._buffers)]

        self.same = self._compiled()

    def _compiled(self) -> Callable[[], bool]:
        """Whether all are as they are now, as one function that compares identities."""
        names: dict[str, Any] = {}

        def known(value: Any) -> str:
            names[name := f"v{len(names)}"] = value
            return name

        tests = [f"{known(among)}[{last!r}] is {known(m)}" for among, last, m in self.held]
        for module in self.modules:
            own = known(vars(module))
            tests.append(f"{known(module)}.__class__ is {known(type(module))}")
            tests.append(f"len({own}) == {len(vars(module))}")
            for key, value in vars(module).items():
                if key == "_modules" or is_hook_dict(key):
                    tests += _same_items(f"{own}[{key!r}]", value, known)
                elif _is_plain(value):
                    tests.append(f"{own}[{key!r}] is {known(value)}")
        lines = [f"  if not ({test}): return False" for test in tests]
        body = "\n".join(["def same():", " try:", *lines, "  return True"])
        body += "\n except KeyError: return False\n"
        exec(compile(body, "<rewriter layers>", "exec"), names)  # noqa: S102 (names in quotes)
        return cast("Callable[[], bool]", names["same"])

    def tensors(self) -> list[Tensor]:
        return [t for store in self.stores for t in store.values() if t is not None]


def _same_items(found: str, now: Mapping[Any, Any], known: Callable[[Any], str]) -> list[str]:
    """That a dict has the entries that it has now."""
    if not now:
        return [f"not {found}"]
    of_each = [f"{found}[{known(key)}] is {known(value)}" for key, value in now.items()]
    return [f"len({found}) == {len(now)}", *of_each]


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
    return [t.detach() if t is not None and t.requires_grad else t for t in tensors]
