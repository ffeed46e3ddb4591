"""Capture: a model becomes graphs on its own module tree, whole where it can, by parts where not.

The ladder (tried in order, recorded in the report): `torch.export` of the whole model in eval and
in train mode; else of its largest submodules that can be, what stays Python being an island with
its reason; without example inputs `torch.fx.symbolic_trace`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from rewriter.capture.exporting import (
    TOO_LONG,
    TRAIN_IN_PYTHON,
    Region,
    asked_for_modes,
    export_region,
)
from rewriter.capture.guards import Watch
from rewriter.capture.hosted import Form, State, host, unhost
from rewriter.capture.reads import recording
from rewriter.capture.settling import Setting, set_again, settings, traced_alike
from rewriter.capture.signature import Call
from rewriter.capture.submodules import capture_submodules, refusal
from rewriter.cost import Fakes
from rewriter.errors import CallError, CaptureError, warn
from rewriter.modules.isolation import forget, random_state
from rewriter.modules.keeping import written
from rewriter.modules.quiet import TRACING
from rewriter.modules.running import (
    difference,
    first_line,
    modes,
    own_copy,
    quiet_run,
    run_flat,
)
from rewriter.modules.structure import flatten
from rewriter.modules.tensors import CONSTANT
from rewriter.report import Island
from rewriter.sites import is_leaf

__all__ = ["Arguments", "Capture", "Region", "arguments", "calls_of", "capture"]


@dataclass(frozen=True)
class Arguments:
    """One call, as Python makes it; `grad` says whether gradients are on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool = True


@dataclass
class Capture:
    """Everything known about the model under rewrite."""

    root: nn.Module
    rung: str
    regions: list[Region]
    call: Call | None = None
    example: tuple[Any, Any] | None = None
    """(args, kwargs) of the example call."""
    islands: list[Island] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    strict: bool = False
    fakes: Fakes = field(default_factory=Fakes)
    """Of the model's weights, for pricing."""
    found: list[Any] | None = None
    """The flat outputs that the check of the captured graphs computed."""
    others: list[Region] = field(default_factory=list)
    """The whole model again, as further calls of `example_inputs` run it: rewritten with the first
    one, and not priced."""
    settings: list[Setting] = field(default_factory=list)
    """Constants that the first call sets: the graphs are of the model that has them."""
    pending: tuple[str, ...] = ()
    """Modules of a model that is loaded that have no graph yet: each captures its first call."""

    def host(self, graph_only: tuple[str, ...] = ()) -> None:
        """Lets every region's module run its graphs, as they are now.

        Args:
            graph_only: rewritten places that the Python forward does not go through.
        """
        for region in self.regions:
            if region.hosted:
                own = tuple(n for n in graph_only if f"{n}.".startswith(_dotted(region.prefix)))
                module = self.root.get_submodule(region.prefix)
                forms = [form_of(module, region)]
                forms += [form_of(module, r) for r in self.others if r.prefix == region.prefix]
                state = State(forms, self.strict, own, fqn=region.prefix)
                host(module, state, root=not region.prefix)
        for prefix in filter(None, self.pending):
            host(self.root.get_submodule(prefix), State(fqn=prefix), root=False)
        if not any(r.hosted and not r.prefix for r in self.regions):
            host(self.root, State(), root=True)

    def take_parts(
        self, example: tuple[Any, Any], reason: str, writes: Mapping[str, str], seconds: float
    ) -> None:
        """Goes down to the second rung."""
        parts = capture_submodules(self.root, *example, reason, writes, seconds, self.fakes)
        self.rung, self.regions, self.islands = "parts", parts.regions, parts.islands
        self.notes += parts.notes

    @property
    def asks_for_grad(self) -> bool:
        """Whether a forward asks if gradients are on: its graphs hold where they are."""
        return any(r.signature is not None and r.signature.grad for r in self.regions)

    @property
    def on_meta(self) -> bool:
        """Whether the model has no values, so that a run of it shows no more than types."""
        return any(p.is_meta for p in self.root.parameters())

    def outputs(self) -> list[Any] | None:
        """The flat outputs on the example inputs; None without those. On meta they are read off
        the graph, as it was last propagated, and nothing runs."""
        if self.example is None:
            return None
        types = self._result_types() if self.on_meta else None
        if types is not None:
            return types
        return run_flat(self.root, *self.example, grad=self.asks_for_grad)

    def _result_types(self) -> list[Any] | None:
        """The values that the graph of the whole model gives its results."""
        graph = next((r.graphs[False] for r in self.regions if not r.prefix and r.hosted), None)
        if graph is None:
            return None
        results = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
        assert isinstance(results, tuple)
        return [r.meta["val"] if isinstance(r, fx.Node) else r for r in results]

    def graphs(self) -> Iterator[tuple[Region, bool, fx.Graph]]:
        for region in (*self.regions, *self.others):
            for mode, graph in region.graphs.items():
                yield region, mode, graph


def form_of(module: nn.Module, region: Region) -> Form:
    """A region as the form of a call of `module`, with its graphs as they are now."""
    programs = {mode: region.program(mode).ready() for mode in region.graphs}
    watch = Watch(module, region.graphs.values(), region.reads)
    return Form(region.signature, programs, watch)


def _dotted(prefix: str) -> str:
    return f"{prefix}." if prefix else ""


def capture(
    root: nn.Module,
    example_inputs: Any,
    *,
    seconds: float = 60.0,
    strict: bool = False,
    whole: bool = False,
) -> Capture:
    """Captures `root` in place: its modules run graphs afterwards (`Capture.host`).

    Args:
        root: the engine's own copy of the model.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; a list
            of such calls, of which the first one is priced; None traces symbolically.
        seconds: time limit of one rung, past which the next one is tried: CPU time of this
            thread, so that a busy machine captures the same.
        strict: raise on calls with another signature.
        whole: go down to no other rung.

    Raises:
        CaptureError: no example inputs and the model cannot be traced; the example inputs are
            empty, on another device than the model, or the model itself fails on them.
    """
    start = time.perf_counter()
    forget(root)
    for module in root.modules():  # a model that was rewritten before is captured anew
        state = vars(module).get("_rewriter")
        if isinstance(state, State) and not state.graph_only:
            unhost(module)
    if example_inputs is None:
        result = _symbolic(root)
    else:
        first, *further = calls_of(example_inputs)
        call, args, kwargs, moved = _prepared(root, first)
        observed = _expected(root, args, kwargs)
        fakes = Fakes()
        region = _whole(root, call, observed, seconds, fakes)
        expected, writes = observed.values, observed.writes
        if isinstance(region, Region):
            result = Capture(root, "export", [region], call, fakes=fakes)
            if region.train_reason:
                result.notes.append(region.train_reason)
        elif whole:
            raise CaptureError(region)
        else:
            result = Capture(root, "parts", [], call, fakes=fakes)
            result.take_parts((args, kwargs), region, writes, seconds)
        if moved:
            result.notes.append("the model is on meta: example inputs were moved there")
        result.strict, result.settings = strict, observed.settings
        if result.asks_for_grad:
            expected = _observed(root, args, kwargs, training=False, grad=True).values
        result.example = (args, kwargs)
        result.host()
        _check_outputs(result, expected, writes, seconds, whole)
        if not (result.on_meta and all(r.alike for r in result.regions if r.hosted)):
            _check_train(result)
        for number, more in enumerate(further, 2):
            _capture_further(result, more, number, seconds)
    _drop_constants(result)
    _warn_of_limit(result, seconds)
    result.seconds = time.perf_counter() - start
    return result


def _warn_of_limit(result: Capture, seconds: float) -> None:
    said = [*result.notes, *(f"{i.fqn or 'the model'}: {i.reason}" for i in result.islands)]
    cut = [text for text in said if TOO_LONG in text]
    if cut:
        warn(
            f"capture stopped at its limit of {seconds:g} s of CPU time ({'; '.join(cut[:3])}): "
            "give it more by capture_seconds"
        )


def _prepared(root: nn.Module, given: Any) -> tuple[Call, Any, Any, bool]:
    """(call, args, kwargs, whether they were moved to meta) of one of the example's calls."""
    args, kwargs = arguments(given)
    _check_inputs(root, args, kwargs, a_call=isinstance(given, Arguments))
    args, kwargs, moved = _usable(root, args, kwargs)
    call = _bind(root, args, kwargs)
    if isinstance(given, Arguments):
        call = replace(call, grad=given.grad)
    return call, args, kwargs, moved


def _capture_further(result: Capture, given: Any, number: int, seconds: float) -> None:
    """One more call of the example: graphs of its own over the same layers, or a note why not."""
    root = result.root
    call, args, kwargs, _ = _prepared(root, given)
    for module in root.modules():
        unhost(module)
    try:
        observed = _expected(root, args, kwargs)
        expected, writes = observed.values, observed.writes
        region: Region | str = "the first call is not captured whole"
        if result.rung == "export":
            region = _whole(root, call, observed, seconds, result.fakes)
        result.settings += observed.settings
        if isinstance(region, Region):
            alone = Capture(root, "export", [region], call, (args, kwargs), fakes=result.fakes)
            alone.host()
            if alone.asks_for_grad:
                for module in root.modules():
                    unhost(module)
                expected = _observed(root, args, kwargs, training=False, grad=True).values
                alone.host()
            try:
                _check_outputs(alone, expected, writes, seconds, whole=True)
                _check_train(alone)
            except CaptureError as error:
                region = first_line(error)
            result.notes += [f"call {number} of example_inputs: {n}" for n in alone.notes]
    finally:
        result.host()
    if isinstance(region, Region):
        result.others.append(region)
        result.host()
    else:
        result.notes.append(f"call {number} of example_inputs is not captured whole: {region}")


# example inputs


def calls_of(example_inputs: Any) -> list[Any]:
    """The calls of `example_inputs`: those of a list, or the one that it is.

    Raises:
        CaptureError: a list of no call.
    """
    if not isinstance(example_inputs, list):
        return [example_inputs]
    if not example_inputs:
        raise CaptureError("example_inputs is an empty list: pass one real batch of the model")
    return example_inputs


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments of a call with one batch."""
    if isinstance(example_inputs, Arguments):
        return example_inputs.args, example_inputs.kwargs
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise CaptureError(
        f"example_inputs is a {type(example_inputs).__name__}; pass a tensor, a tuple of "
        "positional arguments, or a mapping of keyword arguments"
    )


def _check_inputs(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], a_call: bool
) -> None:
    """Raises CaptureError for what is no batch to capture by; `a_call` of a rewritten model may be
    an empty one, which has graphs of its own."""
    leaves: list[Any] = []
    flatten([list(args), dict(kwargs)], leaves, objects=True, opaque=True)
    if not leaves and a_call:
        raise CaptureError("it is called without a tensor")
    if not leaves:
        raise CaptureError("example_inputs holds no tensor: pass one real batch of the model")
    parameter = next((p for p in root.parameters()), None)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.numel() == 0 and not a_call:
            raise CaptureError(
                f"example_inputs holds an empty tensor of shape {tuple(leaf.shape)}: pass a batch "
                "with at least one row"
            )
        if (
            isinstance(leaf, Tensor)
            and leaf.dim()
            and parameter is not None
            and parameter.device.type not in ("meta", leaf.device.type)
        ):
            given = "inputs" if a_call else "example_inputs"
            raise CaptureError(
                f"{given} are on {leaf.device}, the model is on {parameter.device}: move one of "
                f"them, e.g. batch.to({str(parameter.device)!r})"
            )


def _usable(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The example on meta where the model is there (and whether that moved it), and without
    inference tensors, which autograd cannot save."""
    leaves: list[Any] = []
    structure = flatten([list(args), dict(kwargs)], leaves, objects=True, opaque=True)
    on_meta = any(p.is_meta for p in root.parameters())
    inference = [isinstance(t, Tensor) and t.is_inference() for t in leaves]
    if not on_meta and not any(inference):
        return args, kwargs, False
    moved = [
        t.to("meta") if on_meta else t.clone() if was else t
        for t, was in zip(leaves, inference, strict=True)
    ]
    own_args, own_kwargs = structure.build(moved)
    return tuple(own_args), own_kwargs, on_meta and any(not t.is_meta for t in leaves)


def _bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    try:
        return Call.of(type(module).forward.__get__(module), args, kwargs)
    except TypeError as error:
        raise CaptureError(
            f"example_inputs do not fit {type(module).__name__}.forward: {error} (positional "
            "arguments go into a tuple; a list holds several calls)"
        ) from None


@dataclass
class _Expected:
    """What one call of the model does.

    Args:
        values: its results, flat, and its inputs as it leaves them.
        writes: which modules' forward writes an attribute, but for constants that it sets once.
        settings: the constants that it sets, which are set then.
        again: of those, what every call sets again.
    """

    values: list[Any]
    writes: dict[str, str]
    settings: list[Setting]
    again: list[Setting]


def _expected(root: nn.Module, args: Any, kwargs: Any) -> _Expected:
    try:
        numbers = random_state()
        found = _observed(root, args, kwargs, training=False)
        if random_state() != numbers:  # drawn by other threads, or while nobody looked: once more
            found = _observed(root, args, kwargs, training=False)
    except Exception as error:
        if name := _fetched(root):
            raise CaptureError(
                f"the weights of {name} are on meta, and its forward, set on the object, fetches "
                "them in each call, as accelerate's offload does: a rewrite sees no values. "
                "Rewrite before dispatch_model or cpu_offload, or take the hooks off first "
                "(accelerate.hooks.remove_hook_from_module(model, recurse=True))"
            ) from error
        raise CallError(
            f"{type(root).__name__} itself fails on example_inputs, before any rewrite: "
            f"{type(error).__name__}: {first_line(error)}. {_remedy(root, error)}"
        ) from error
    again = _settles(root, args, kwargs, found) if found.settings else None
    if again is None:
        return _Expected(found.values, found.writes, [], [])
    return _Expected(found.values, found.writes if again else {}, found.settings, again)


def _settles(root: nn.Module, args: Any, kwargs: Any, first: _Observed) -> list[Setting] | None:
    """Of the constants that a first call sets, those that every call sets; they all are set then.
    None where the model, with them, computes another thing or writes something else."""
    for setting in first.settings:
        setting.apply()
    again = None
    try:
        with recording(root) as reads:
            second = _observed(root, args, kwargs, training=False)
        if difference(second.values, first.values) is None and not second.writes:
            again = set_again(first.settings, reads)
    except Exception:  # then it is looked at without them
        again = None
    if again is None:
        for setting in first.settings:
            setting.undo()
    return again


def _whole(
    root: nn.Module, call: Call, observed: _Expected, seconds: float, fakes: Fakes
) -> Region | str:
    """The region of the whole model, or why there is none."""
    writes = {} if observed.settings else observed.writes
    region = refusal(root, writes) or export_region(root, "", call, seconds, fakes)
    if isinstance(region, str) or not observed.again:
        return region
    if region.reads is not None and traced_alike(observed.again, region.reads):
        return region
    return refusal(root, observed.writes) or "its forward writes attributes"


def _fetched(root: nn.Module) -> str:
    """A module without weights that seems to fetch them when it is called; "" where none does."""
    for name, module in root.named_modules():
        if "forward" in vars(module) and any(p.is_meta for p in module.parameters(recurse=False)):
            return name or "the model"
    return ""


def _remedy(root: nn.Module, error: Exception) -> str:
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return (
            "On meta tensors have no values: choose an implementation whose Python code does not "
            "ask for them (for experts of transformers: experts_implementation='grouped_mm'), or "
            "give the model data"
        )
    return "Check their names, dtypes, shapes and device"


# what was captured must compute what the model computes


@dataclass(frozen=True)
class _Observed:
    """One call.

    Args:
        results: flat.
        inputs: as it leaves them.
        writes: which modules' forward writes an attribute.
        settings: the constants that it sets.
    """

    results: list[Any]
    inputs: list[Any]
    writes: dict[str, str]
    settings: list[Setting]

    @property
    def values(self) -> list[Any]:
        return self.results + self.inputs


def _observed(
    root: nn.Module, args: Any, kwargs: Any, *, training: bool, grad: bool = False
) -> _Observed:
    results: list[Any] = []
    inputs: list[Any] = []
    with quiet_run(root, training, grad=grad):
        changes, given = written(root), settings(root)
        own = own_copy(args, kwargs)
        flatten(root(*own[0], **own[1]), results, objects=True, opaque=True)
        flatten([*own], inputs, objects=True, opaque=True)
        return _Observed(_cloned(results), _cloned(inputs), changes(), given())


def _cloned(leaves: list[Any]) -> list[Any]:
    """Buffers that are results are about to be restored."""
    return [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]


def _check_outputs(
    result: Capture,
    expected: list[Any],
    writes: Mapping[str, str],
    seconds: float,
    whole: bool = False,
) -> None:
    """The captured model must compute what the model computes, or its graphs are dropped."""
    assert result.example is not None
    types = result.outputs() if result.on_meta and result.rung == "export" else None
    found: list[Any] | None = None
    try:
        if types is None:
            grad = result.asks_for_grad
            seen = _observed(result.root, *result.example, training=False, grad=grad)
            found, actual = seen.results, seen.values
        else:  # no values: that the types agree is all that a run would show
            actual, expected = types, expected[: len(types)]
        reason = difference(actual, expected)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
    result.found = None if reason else found
    if not reason:
        return
    reason = f"the captured graph does not reproduce the model's outputs: {reason}"
    if whole:
        raise CaptureError(reason)
    for module in result.root.modules():
        unhost(module)
    again = result.rung == "parts"
    result.take_parts(result.example, reason, writes, 0.0 if again else seconds)
    result.host()
    if not again:
        _check_outputs(result, expected, writes, seconds)


def _check_train(result: Capture) -> None:
    """The same in train mode, where a graph that fails leaves train mode to Python."""
    assert result.example is not None
    trained = [r for r in result.regions if r.hosted and True in r.graphs]
    if not trained:
        return
    outcomes: list[Any] = []
    writes: dict[str, str] = {}
    graphs = [r.graphs[True] for r in trained]
    for python in (False, True):
        if python:
            for region in trained:
                del region.graphs[True]
            result.host()
        try:
            grad = result.asks_for_grad
            seen = _observed(result.root, *result.example, training=True, grad=grad)
            outcomes.append(seen.values)
            writes = seen.writes
        except Exception as error:  # one row in train mode, say: the graph must fail alike
            outcomes.append([f"{type(error).__name__}: {first_line(error)}"])
    reason = difference(*outcomes)
    for region, graph in zip(trained, graphs, strict=True):
        own = reason and f"its graph does not reproduce the model's outputs ({reason})"
        own = own or refusal(result.root.get_submodule(region.prefix), writes, region.prefix)
        if own:
            label = f"{region.prefix}: " if region.prefix else ""
            result.notes.append(f"{label}{TRAIN_IN_PYTHON}: {own}")
        else:
            region.graphs[True] = graph
    result.host()


def _drop_constants(result: Capture) -> None:
    """Takes away the tensors that only dropped graphs needed."""
    read = {
        (region.prefix, str(node.target))
        for region, _, graph in result.graphs()
        for node in graph.nodes
        if node.op == "get_attr"
    }
    for fqn, module in result.root.named_modules():
        for name in [n for n in module._buffers if n.startswith(CONSTANT)]:
            if (fqn, name) not in read:
                delattr(module, name)


# rung 3: symbolic tracing


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def _symbolic(root: nn.Module) -> Capture:
    reason = refusal(root, {})
    graphs: dict[bool, fx.Graph] = {}
    try:
        if reason:
            raise CaptureError(reason)
        for training in (False, True):
            with TRACING, modes(root, training), asked_for_modes(root) as asked:
                graphs[training] = _Tracer().trace(root)
            if asked():
                raise CaptureError("its forward asks whether gradients are on")
    except Exception as error:
        raise CaptureError(
            f"{type(root).__name__} cannot be traced without running it "
            f"({type(error).__name__}: {first_line(error)}): pass example_inputs, one real batch"
        ) from error
    region = Region("", graphs, {False: None, True: None}, None, None)
    result = Capture(root, "symbolic", [region])
    result.notes.append(
        "no example_inputs: shapes are unknown, so only parameters are priced and outputs are "
        "not compared"
    )
    for node in graphs[False].nodes:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            layers = [n for n, m in module.named_modules() if n and is_leaf(m)]
            if layers and not is_leaf(module):
                reason = "symbolic tracing takes it as one call"
                layers = [f"{node.target}.{n}" for n in layers]
                result.islands.append(
                    Island(str(node.target), type(module).__name__, reason, layers)
                )
    result.host()
    return result
