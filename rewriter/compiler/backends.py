"""`torch.compile(model, backend="rewriter")`: passes on Dynamo's graphs, then an inner compiler.

The module is not called `backend`, as the package's function of that name would hide it.

Inference: any pass; what it derives from parameters is derived again when they change
(`rewriter.compiler.derived`). Training: the backward is compiled like the forward, and a pass that
would replace trainable parameters is an error unless `install` puts the new ones on the user's
module.
Dynamo says nothing of use about `module.training`, so a graph counts as training where gradients
are on and some input requires one.
"""

from __future__ import annotations

import contextlib
import fnmatch
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor

from rewriter.base import Pass, Where
from rewriter.capture.hosted import Program
from rewriter.compiler.derived import Derived, Refused, Weights, again
from rewriter.compiler.dynamo import Lifted, capture_dynamo
from rewriter.compiler.inner import INNER, Flat, Inner, flattened, own_ops, place_tensors
from rewriter.compiler.installing import Installation, put_layers
from rewriter.compiler.ledgers import Graph, Sketch, record
from rewriter.compiler.refusing import refusing
from rewriter.compiler.user_code import Frame, guard_mode, source_name
from rewriter.cost import Device
from rewriter.engine import Engine, Options, check_calibrated, check_passes
from rewriter.engine.decide import device_of
from rewriter.engine.prices import Prices
from rewriter.errors import OptionError, RewriteError, nearest, warn
from rewriter.lowering.lowered import Bound, Traced
from rewriter.modules.quiet import quietly
from rewriter.planner import MemoryBudget
from rewriter.recipe.parse import parse_pass
from rewriter.recipe.recipe import Recipe
from rewriter.report import Report, Step

__all__ = ["Backend", "backend", "rewriter_backend"]


def rewriter_backend(
    module: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Any = None
) -> Callable[..., Any]:
    """What torch calls for `backend="rewriter"`; `options` are the arguments of `backend`.

    Raises:
        OptionError: an option is not known (the nearest is named) or impossible.
        RewriteError: a pass would replace trainable parameters.
    """
    given = dict(options or {})
    known = [f.name for f in fields(Backend)]
    unknown = [name for name in given if name not in known]
    with refusing():
        if unknown:
            said = "; ".join(f"there is no option {n!r}{nearest(str(n), known)}" for n in unknown)
            raise OptionError(f"torch.compile(..., backend='rewriter'): {said}")
        return Backend(**given)(module, inputs, mode=mode)


def backend(
    passes: Sequence[Pass | str] = (),
    *,
    memory_budget: int | float | str | MemoryBudget | None = None,
    objective: str | None = None,
    inner: str = "inductor",
    max_error: float | None = None,
    where: Where = None,
    device: str | Device | None = None,
    install: bool = False,
    lossy: bool = False,
    mode: str | None = None,
    inductor: Mapping[str, Any] | None = None,
) -> Backend:
    """A backend for torch.compile: `torch.compile(model, backend=rewriter.backend(passes=[…]))`.

    Args:
        passes: as in `rewrite`; also as text, `"quantize:int8-dynamic"`.
        memory_budget: of a training step, for the memory planner: bytes, "512MB", a fraction of
            the default, or a `MemoryBudget`.
        objective, max_error, where, device: as in `rewrite`.
        inner: who compiles the rewritten graph: "inductor"; "aot_eager" (forward and backward
            traced and split, torch's own kernels); "eager" (the rewritten graph as it is).
        install: let a pass replace trainable parameters, and put the new layers on the user's
            module: the first call runs uncompiled and installs them, and warns that an optimizer
            has to be built (or remapped) after it.
        lossy: let the memory planner compress.
        mode: Inductor's: "default", "reduce-overhead", "max-autotune".
        inductor: further options of Inductor's.

    Raises:
        OptionError: an option is impossible, or two exclude each other.
    """
    return Backend(
        passes, memory_budget, objective, inner, max_error, where, device, install, lossy, mode,
        inductor,
    )  # fmt: skip


@dataclass(eq=False)
class Backend:
    """A backend with its options, ready for `torch.compile(model, backend=…)`; see `backend`."""

    passes: Any = ()
    memory_budget: Any = None
    objective: str | None = None
    inner: Any = "inductor"
    max_error: float | None = None
    where: Where = None
    device: Any = None
    install: bool = False
    lossy: bool = False
    mode: str | None = None
    inductor: Mapping[str, Any] | None = None

    __name__ = "rewriter"

    def __post_init__(self) -> None:
        given = self.passes
        if isinstance(given, str | Pass) or not isinstance(given, Sequence):
            raise OptionError(f"passes must be a list of passes or of their texts, not {given!r}")
        self.passes = [parse_pass(p) if isinstance(p, str) else p for p in given]
        check_passes(self.passes)
        check_calibrated(
            self.passes,
            "inside torch.compile there are no batches: give the model and calibration=[batch, …] "
            "to rewriter.rewrite, and compile its result",
        )
        for planning in (p for p in self.passes if p.plans):
            raise OptionError(
                f"{planning} takes modules apart, and inside torch.compile there are only graphs: "
                "give the model to rewriter.rewrite, and compile its result"
            )
        if self.inner not in INNER:
            raise OptionError(
                f"inner={self.inner!r} is unknown{nearest(str(self.inner), [*INNER])}"
            )
        for name in ("install", "lossy"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r}: use True or False")
        if not (self.mode is None or isinstance(self.mode, str)):
            raise OptionError(f"mode={self.mode!r}: use the name of one of torch.compile's modes")
        if self.memory_budget is not None:
            budget = MemoryBudget.of(self.memory_budget)
            if budget.lossy and budget.gradient_error != MemoryBudget.gradient_error:
                raise OptionError(
                    f"memory_budget: gradient_error={budget.gradient_error:g} cannot be checked "
                    "inside torch.compile, where there are no numbers to measure it on: leave it "
                    "out, or call rewriter.rewrite(memory_budget=…), which measures it"
                )
        if self.inductor is not None and not isinstance(self.inductor, Mapping):
            raise OptionError(f"inductor={self.inductor!r}: use a dict of Inductor's options")
        strange = [name for name in self.inductor or {} if not isinstance(name, str)]
        if strange:
            raise OptionError(f"inductor: the names of Inductor's options are text, not {strange}")
        device = device_of(self.device)
        self._options = Options(self.objective, self.max_error, self.where, device)
        self._check_conflicts()
        self._inner = self._compiler(self.mode)

    def _check_conflicts(self) -> None:
        inductor = self.inner == "inductor"
        problems = {
            f"mode={self.mode!r} is Inductor's, and inner is {self.inner!r}": self.mode is not None
            and not inductor,
            f"inductor={self.inductor!r} is given, and inner is {self.inner!r}": bool(self.inductor)
            and not inductor,
            "memory_budget plans how forward and backward are split, and inner='eager' splits "
            "nothing: use 'aot_eager' or 'inductor'": self.memory_budget is not None
            and self.inner == "eager",
            "lossy=True is the memory planner's, and there is no memory_budget": self.lossy
            and self.memory_budget is None,
            "install=True installs what passes make, and there are none": self.install
            and not self.passes,
            "lossy=True, and memory_budget is a MemoryBudget, which says lossy itself": self.lossy
            and isinstance(self.memory_budget, MemoryBudget)
            and not self.memory_budget.lossy,
            "memory_budget and inductor={'custom_partitioner_fn': …} both split the graph":
            self.memory_budget is not None and "custom_partitioner_fn" in (self.inductor or {}),
            "where, objective and max_error choose what passes do, and there are none":
            not self.passes and (self.where, self.objective, self.max_error) != (None, None, None),
        }  # fmt: skip
        found = [text for text, holds in problems.items() if holds]
        if found:
            raise OptionError(f"conflicting options: {'; '.join(found)}")

    def _compiler(self, mode: str | None) -> Inner:
        config: dict[str, Any] = {}
        for name, value in (self.inductor or {}).items():
            plain = name.replace("-", "_")
            if config.setdefault(plain, value) != value:
                raise OptionError(f"conflicting options: inductor says {plain} twice")
        if config or mode not in (None, "default"):
            self._check_inductor(config, mode)
        device = self._options.device
        return Inner(self.inner, mode, config, self.memory_budget, self.lossy, device)

    def _check_inductor(self, config: Mapping[str, Any], mode: str | None) -> None:
        from torch._inductor import config as known
        from torch._inductor import list_mode_options

        modes = [*list_mode_options(), "default"]
        if mode is not None and mode not in modes:
            raise OptionError(f"mode={mode!r} is unknown{nearest(mode, modes)}")
        set_by_mode = {} if mode in (None, "default") else list_mode_options(mode)
        every = known.get_config_copy()
        for name, value in config.items():
            if name not in every:
                raise OptionError(f"Inductor has no option {name!r}{nearest(name, [*every])}")
            if isinstance(every[name], bool) and not isinstance(value, bool):
                raise OptionError(f"inductor={{{name!r}: {value!r}}}: use True or False")
            if set_by_mode.get(name, value) != value:
                raise OptionError(
                    f"conflicting options: mode={mode!r} sets {name} to {set_by_mode[name]!r}, and "
                    f"inductor to {value!r}"
                )

    def __call__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Any = None,
    ) -> Callable[..., Any]:
        """Compiles one graph of Dynamo's."""
        with refusing():
            return self._compiled(module, inputs, mode, options)

    def _compiled(
        self, module: fx.GraphModule, inputs: Sequence[Any], mode: str | None, options: Any
    ) -> Callable[..., Any]:
        if options:
            raise OptionError(
                "options of torch.compile belong into rewriter.backend(...), which is the backend "
                f"here: {sorted(options)}"
            )
        inner = self._inner
        if mode not in (None, "default"):
            if self.inner != "inductor" or self.mode not in (None, mode):
                raise OptionError(
                    f"conflicting options: torch.compile(mode={mode!r}) with inner={self.inner!r} "
                    f"and mode={self.mode!r}"
                )
            inner = self._compiler(mode)
        return _Compilation(self, inner, module, inputs).run()


class _Compilation:
    """One graph on its way through the passes and the inner compiler."""

    def __init__(
        self, asked: Backend, inner: Inner, module: fx.GraphModule, inputs: Sequence[Any]
    ) -> None:
        self.backend, self.inner = asked, inner
        self.module, self.inputs = module, inputs
        self.frame = Frame.current(module)
        self.name = self.frame.name
        self.partial = self.frame.partial
        self.names = self.frame.names(source_name(n) for n in module.graph.nodes)
        self.training = (torch.is_grad_enabled() or _switches_gradients_on(module)) and any(
            isinstance(t, Tensor) and t.requires_grad for t in inputs
        )
        self.sketch = Sketch(module, inputs)
        self.graph = Graph(self.frame, self._priced)

    def run(self) -> Callable[..., Any]:
        passes = self.backend.passes
        if any(isinstance(t, Tensor) and t.is_meta for t in self.inputs):
            raise OptionError("an input is on meta, where nothing can be computed: move it")
        if not passes:
            return self._done(self._unchanged())
        if any(isinstance(t, FakeTensor) for t in self.inputs):
            raise RewriteError(
                "the parameters are not at hand: DistributedDataParallel's optimizer has cut the "
                "graph into buckets. Call rewriter.rewrite before wrapping and compile without "
                "passes, or set torch._dynamo.config.optimize_ddp = False"
            )
        _refuse_transforms(self.module)
        lifted = capture_dynamo(self.module, self.inputs, self.names)
        for name, i in lifted.paths.items():
            if self.inputs[i].is_inference():
                raise RewriteError(
                    f"{name} was made under torch.inference_mode, where torch counts no changes: "
                    "what is derived from it could get stale unnoticed. Build or load the model "
                    "outside of inference_mode"
                )
        for i in lifted.paths.values():
            guard_mode(lifted.placeholders[i])
        self.modes = self._modes(lifted)
        self._set_modes(lifted)
        engine, report = self._rewritten(lifted, self.inputs)
        self.graph.price = lambda: report
        installed = engine.recipe.installed
        if not installed:
            return self._done(self._unchanged())
        fused = None if self.training else self._in_graph(lifted.root, lifted.graph)
        flat = flattened(self.module, lifted, self.inputs, fused)
        changed = self._trainable(lifted, flat)
        if self.training and changed:
            if not self.backend.install:
                raise RewriteError(_REPLACES.format(self._names(installed), ", ".join(changed[:4])))
            self.graph.notes.append("the first call runs uncompiled and installs the new layers")
            ready = Installation(lifted, engine.recipe, self.frame, self._rewritten_for)
            return self._done(ready.run)
        code = self._lowered(flat.module, flat.arguments(self.inputs))
        return self._done(self._fed(engine, lifted, flat, code))

    def _unchanged(self) -> Callable[..., Any]:
        """Code of the graph that no pass changed: what it calls of ours, without Python where that
        can be."""
        from rewriter.lowering.sparse_products import columns_of, direct_products

        known = not any(isinstance(t, FakeTensor) for t in self.inputs)
        casts = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
        if self.training or casts or not known:
            return self._lowered(self.module, self.inputs)
        with _plain(quiet=True):
            direct = direct_products(self.module, self.inputs)
        code = self._lowered(direct.module, [*self.inputs, *direct.fakes])
        self.graph.notes += direct.notes
        if not direct.copied:
            return code
        copied = direct.copied

        def derive(inputs: Sequence[Any]) -> Derived:
            return Derived(code, columns_of(inputs, copied))

        weights = Weights(copied, derive)
        with _plain(quiet=True):
            weights.put(self.inputs, derive(self.inputs))

        def run(*inputs: Any) -> Any:
            return code(*inputs, *weights.of(inputs).tensors)

        return _untraced(run)

    # the ledger

    def _priced(self) -> Report:
        """The ledger of a graph that no pass has seen."""
        _refuse_transforms(self.sketch.module)
        examples = self.sketch.examples()
        lifted = capture_dynamo(self.sketch.module, examples, self.names)
        return self._rewritten(lifted, examples, passes=())[1]

    def _done(self, code: Callable[..., Any]) -> Callable[..., Any]:
        limit = torch._dynamo.config.recompile_limit
        if self.frame.compilation + 1 >= limit:
            note = (
                f"compiled {self.frame.compilation + 1} times, which is Dynamo's limit "
                "(torch._dynamo.config.recompile_limit): for other types, sizes or modes this code "
                "runs as it was written, without passes. Compile with dynamic=True, or raise it"
            )
            self.graph.notes.append(note)
            warn(f"{self.name}: {note}")
        record(self.graph, self.frame.asked)
        # compiled code outlives the call: it must not keep the user's model and batch alive
        self.frame = self.graph.frame = replace(self.frame, asked=None, scope={}, root=None)
        self.module, self.inputs = self.sketch.module, ()
        return code

    def _lowered(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        ours = own_ops(module)
        start = time.perf_counter()
        plans = len(self.graph.steps)
        code = self.inner(module, inputs, lambda plan: self.graph.steps.append(plan.to_step))
        name = self.inner.name
        notes = [
            f"{'forward and backward' if self.training else 'forward'} by {name}"
            + (f", {len(ours)} calls of {', '.join(sorted(set(ours)))}" if ours else "")
        ]
        if self.inner.memory_budget is not None and len(self.graph.steps) == plans:
            notes.append(
                "no memory plan: " + (
                    "the code came from Inductor's cache, with the plan made for it then"
                    if self.training else "there is no backward"
                )
            )  # fmt: skip
        seconds = time.perf_counter() - start
        self.graph.steps.append(
            lambda c: Step(f"compiled by {name}", c, c, [], None, True, seconds, notes)
        )
        return code

    # the passes

    def _modes(self, lifted: Lifted) -> dict[str, bool]:
        """By the name of a lifted tensor, the mode of the user's module that owns it."""
        owners = {p: source_name(lifted.placeholders[i]) for p, i in lifted.paths.items()}
        found = {p: self.frame.module(source) for p, source in owners.items()}
        return {p: m.training for p, m in found.items() if m is not None}

    def _set_modes(self, lifted: Lifted) -> None:
        """Each module of the tree is in the mode of the user's own; Dynamo's is always train."""
        lifted.root.train(self.training)
        for path, mode in self.modes.items():
            lifted.root.get_submodule(path.rpartition(".")[0]).training = mode

    def _rewritten(
        self, lifted: Lifted, inputs: Sequence[Any], passes: Sequence[Pass] | None = None
    ) -> tuple[Engine, Report]:
        chosen = self.backend.passes if passes is None else passes
        options = self.backend._options
        if self.partial:  # a name may well be in another part of the code
            chosen = [replace(p, where=_predicate(p.where)) for p in chosen]
            options = replace(options, where=_predicate(options.where))
            self._check_names()
        engine = Engine(lifted.capture, options)
        engine.prices = _GraphPrices(lifted.capture, options.device)
        engine.prices.training = self.training
        with _plain(quiet=self.partial or (self.backend.install and self.frame.compilation > 0)):
            steps = [engine.original()]
            steps += engine.run_all(chosen)
        report = engine.report(steps)
        report.model = self.name or report.model
        return engine, report

    def _check_names(self) -> None:
        """A pattern that no part of the compiled module can match is a slip of the pen.

        Raises:
            OptionError: naming the nearest.
        """
        root = self.frame.root
        if root is None:
            return
        every = [name for name, module in root.named_modules() if name]
        every += [name for name, _ in root.named_parameters()]
        for where in (self.backend.where, *(p.where for p in self.backend.passes)):
            if isinstance(where, str) and not fnmatch.filter(every, where):
                raise OptionError(
                    f"where={where!r} matches no module of {type(root).__name__}"
                    f"{nearest(where, every)}"
                )

    def _trainable(self, lifted: Lifted, flat: Flat) -> list[str]:
        """The trainable parameters that the rewritten graph lost or made."""
        kept = set(flat.kept)
        lost = [p for p, i in lifted.paths.items() if i not in kept and self._trains(i)]
        return lost + [name for name, t in flat.derived.items() if t.requires_grad]

    def _trains(self, position: int) -> bool:
        return bool(self.inputs[position].requires_grad)

    def _names(self, installed: Mapping[str, Any]) -> str:
        return ", ".join(dict.fromkeys(str(p) for i in installed.values() for _, p in i.chain))

    # running

    def _fed(
        self, engine: Engine, lifted: Lifted, flat: Flat, code: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Code that takes what Dynamo passes."""
        kept = flat.kept
        if not flat.derived:

            def passed(*inputs: Any) -> Any:
                return code(*[inputs[i] for i in kept])

            return _untraced(passed)
        recipe, paths, graph = engine.recipe, lifted.paths, lifted.graph
        wanted = {name: t.detach() for name, t in flat.derived.items()}
        refs = [r for i in recipe.installed.values() for r in (i.weight_ref, i.bias_ref)]
        watched = [paths[r] for r in refs if r is not None]
        sees_more = any(kind == "mlp" for i in recipe.installed.values() for kind, _ in i.chain)
        fused = not wanted.keys() <= set(_tensor_names(lifted.root))
        if sees_more or fused:  # than weight and bias of the layers that are new
            watched = list(paths.values())
        limit = self.backend.max_error

        def derive(inputs: Sequence[Any]) -> Derived:
            def packed(layers: Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
                return self._packed(inputs, graph, layers) if fused else {}

            try:
                return Derived(code, again(recipe, paths, inputs, wanted, limit, packed))
            except Refused as error:
                return self._anew(inputs, str(error))

        weights = Weights(watched, derive)
        with torch.inference_mode(False):
            weights.put(self.inputs, Derived(code, list(wanted.values())))

        def run(*inputs: Any) -> Any:
            derived = weights.of(inputs)
            own = kept if derived.run is code else range(len(inputs))
            return derived.run(*[inputs[i] for i in own], *derived.tensors)

        self.graph.notes.append(
            f"{len(watched)} parameters are watched: what was derived from them is derived again "
            "when they change"
        )
        return _untraced(run)

    def _in_graph(self, root: nn.Module, graph: fx.Graph) -> Traced | None:
        """The rewritten graph with the fused ops of int8 layers, where they have a form for
        graphs."""
        from rewriter.lowering.table import DEFAULT_RULES, IN_GRAPHS

        return Bound(root, Program(graph, None), DEFAULT_RULES, None, IN_GRAPHS).in_graph()

    def _packed(
        self, inputs: Sequence[Any], graph: fx.Graph, layers: Mapping[str, nn.Module]
    ) -> Mapping[str, Tensor]:
        """What fused ops are packed of where these layers, made of other weights, stand."""
        root = capture_dynamo(self.sketch.module, inputs, self.names).root
        put_layers(root, layers)
        fused = self._in_graph(root, graph)
        return {} if fused is None else place_tensors(fused)

    def _rewritten_for(self, inputs: Sequence[Any]) -> tuple[Lifted, Recipe]:
        """The same graph for other parameters of the same shapes."""
        lifted = capture_dynamo(self.sketch.module, inputs, self.names)
        self._set_modes(lifted)
        return lifted, self._rewritten(lifted, inputs)[0].recipe

    def _anew(self, inputs: Sequence[Any], why: str) -> Derived:
        """For weights that the passes take in another way: the graph is rewritten from the start,
        and compiled by the inner compiler alone."""
        lifted = capture_dynamo(self.sketch.module, inputs, self.names)
        self._set_modes(lifted)
        _, report = self._rewritten(lifted, inputs)
        flat = flattened(self.sketch.module, lifted, inputs)
        why = f"rewritten anew for other weights: {why}"
        self.graph.beside.append(Graph(self.frame, lambda: report, [why]))

        def compile_it(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return self.inner(module, inputs, lambda plan: None)

        code = torch.compile(flat.module, backend=compile_it)
        tensors = [t.detach() for t in flat.derived.values()]
        kept = flat.kept

        def run(*everything: Any) -> Any:
            count = len(everything) - len(tensors)
            return code(*[everything[i] for i in kept], *everything[count:])

        return Derived(run, tensors)


def _tensor_names(root: nn.Module) -> list[str]:
    return [name for name, _ in (*root.named_parameters(), *root.named_buffers())]


def _refuse_transforms(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if "functorch" in str(getattr(node.target, "__module__", "")):
            raise RewriteError(
                "the compiled code uses torch.func.grad (or another of its derivatives), whose "
                "graphs no pass or ledger reads: call rewriter.rewrite on the model first, and "
                "compile without passes"
            )


def _switches_gradients_on(module: fx.GraphModule) -> bool:
    """The code says `torch.enable_grad` itself, whatever it is called under."""
    switch = torch._C._set_grad_enabled
    return any(n.target is switch and n.args[:1] == (True,) for n in module.graph.nodes)


class _GraphPrices(Prices):
    """Prices the one graph of Dynamo's in the mode that it runs in."""

    training = False

    def price(self) -> None:
        (region,) = self.capture.regions
        if self.training:
            region.graphs[True] = region.graphs[False]
        try:
            super().price()
        finally:
            region.graphs.pop(True, None)
        if not self.training:  # nobody asked what training would cost
            self.errors = [e for e in self.errors if not e.startswith("training cost not known")]


_REPLACES = (
    "{} would replace trainable parameters ({}, …), which an optimizer then trains in vain: call "
    "rewriter.rewrite first and compile its result, or compile with options={{'install': True}} to "
    "put the new ones on your module; for inference, call the model under torch.no_grad()"
)


def _untraced(run: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo is not to look into the code that it calls."""
    found: Callable[..., Any] = torch._dynamo.disable(run, reason="calls compiled code")
    return found


def _predicate(where: Where) -> Where:
    """A name pattern as a predicate, which may match nothing."""
    if not isinstance(where, str):
        return where
    return lambda site: fnmatch.fnmatchcase(site.fqn, where)


@contextlib.contextmanager
def _plain(quiet: bool) -> Iterator[None]:
    """Passes compute in full precision and with ordinary tensors, whatever the caller's modes."""
    with (
        temporarily_clear_interpreter_stack(),  # of torch.func, whose tensors have no storage
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        # that a part of the code has nothing for a pass says nothing
        quietly(about="nothing to do") if quiet else contextlib.nullcontext(),
    ):
        yield
