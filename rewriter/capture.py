"""Capture: a model becomes graphs on its own module tree, whole where it can, by parts where not.

The ladder (tried in order, recorded in the report): `torch.export` of the whole model in eval and
in train mode; else of its largest submodules that can be, what stays Python being an island with
its reason; without example inputs `torch.fx.symbolic_trace`.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from rewriter.cost import model_cost
from rewriter.errors import CaptureError, RewriteError, VerifyError
from rewriter.hosted import Program, State, host, unhost
from rewriter.rehost import rehost, size_rules
from rewriter.report import Island
from rewriter.signature import Call, Dims, Signature, Structure, Unflattenable, flatten
from rewriter.sites import is_leaf

__all__ = ["Capture", "Region", "capture", "modes", "run_flat"]

_TRAIN_IN_PYTHON = "train mode runs the original Python forward over the rewritten layers"


@dataclass
class Region:
    """A part of the model that lives in graphs.

    Args:
        prefix: dotted name of the module the graphs live on; "" for the root.
        graphs: per mode (False: eval, True: train).
        outputs: per mode, how flat results become the original output.
        signature: of the captured call; None for symbolic tracing.
        leaves: the flat example inputs; None without them.
        hosted: whether the module runs the graph; a lone leaf inside an island is only described
            by its graph, and is called by Python.
        train_reason: why there is no graph for train mode.
    """

    prefix: str
    graphs: dict[bool, fx.Graph]
    outputs: dict[bool, Structure | None]
    signature: Signature | None
    leaves: list[Tensor] | None
    hosted: bool = True
    train_reason: str = ""


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

    def host(self, graph_only: tuple[str, ...] = ()) -> None:
        """Lets every region's module run its graphs, as they are now.

        Args:
            graph_only: rewritten places that the Python forward does not go through.
        """
        for region in self.regions:
            if region.hosted:
                programs = {
                    mode: Program(graph, region.outputs[mode])
                    for mode, graph in region.graphs.items()
                }
                own = tuple(n for n in graph_only if n.startswith(region.prefix))
                state = State(region.signature, programs, self.strict, own)
                host(self.root.get_submodule(region.prefix), state, root=not region.prefix)
        if not any(r.hosted and not r.prefix for r in self.regions):
            host(self.root, State(strict=False), root=True)

    def graphs(self) -> Iterator[tuple[Region, bool, fx.Graph]]:
        for region in self.regions:
            for mode, graph in region.graphs.items():
                yield region, mode, graph


def capture(
    root: nn.Module, example_inputs: Any, *, seconds: float = 60.0, strict: bool = False
) -> Capture:
    """Captures `root` in place: its modules run graphs afterwards (`Capture.host`).

    Args:
        root: the engine's own copy of the model.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; None
            traces symbolically.
        seconds: time limit of one rung; past it the next one is tried.
        strict: raise on calls with another signature.

    Raises:
        CaptureError: no example inputs and the model cannot be traced; the example inputs are
            empty, on another device than the model, or the model itself fails on them.
    """
    start = time.perf_counter()
    if example_inputs is None:
        result = _symbolic(root)
    else:
        args, kwargs = _arguments(example_inputs)
        _check_inputs(root, args, kwargs)
        args, kwargs, moved = _to_meta(root, args, kwargs)
        call = _bind(root, args, kwargs)
        expected = _expected(root, args, kwargs)
        reason = _hooked(root)
        region: Region | str = reason or _export_region(root, "", call, seconds)
        if isinstance(region, Region):
            result = Capture(root, "export", [region], call)
            if region.train_reason:
                result.notes.append(region.train_reason)
        else:
            result = _parts(root, args, kwargs, call, region, seconds)
        if moved:
            result.notes.append("the model is on meta: example inputs were moved there")
        result.strict = strict
        result.example = (args, kwargs)
        result.host()
        _check_outputs(result, args, kwargs, expected)
    result.seconds = time.perf_counter() - start
    return result


# example inputs


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def _check_inputs(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    leaves: list[Any] = []
    flatten([list(args), dict(kwargs)], leaves, objects=True)
    if not leaves:
        raise CaptureError("example_inputs holds no tensor: pass one real batch of the model")
    parameter = next((p for p in root.parameters()), None)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
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
            raise CaptureError(
                f"example_inputs are on {leaf.device}, the model is on {parameter.device}: move "
                f"one of them, e.g. batch.to({str(parameter.device)!r})"
            )


def _to_meta(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    if not any(p.is_meta for p in root.parameters()):
        return args, kwargs, False
    leaves: list[Any] = []
    structure = flatten([list(args), dict(kwargs)], leaves, objects=True)
    on_meta, named = structure.build([t.to("meta") for t in leaves])
    return tuple(on_meta), named, any(not t.is_meta for t in leaves)


def _bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    try:
        return Call.of(type(module).forward.__get__(module), args, kwargs)
    except TypeError as error:
        raise CaptureError(
            f"example_inputs do not fit {type(module).__name__}.forward: {error}"
        ) from None


def _expected(root: nn.Module, args: Any, kwargs: Any) -> list[Any]:
    try:
        return run_flat(root, args, kwargs)
    except Exception as error:
        raise CaptureError(
            f"{type(root).__name__} itself fails on example_inputs, before any rewrite: "
            f"{type(error).__name__}: {_first_line(error)}. Check their names, dtypes, shapes and "
            "device"
        ) from error


# running, with nothing left behind


@contextlib.contextmanager
def modes(root: nn.Module, training: bool) -> Iterator[None]:
    """Every module of the tree in one mode; restores each one's own mode."""
    flags = [(m, m.training) for m in root.modules()]
    try:
        root.train(training)
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def _without_hooks(root: nn.Module) -> Iterator[None]:
    """No user hook runs inside: tracing would bake what hooks do into the graph, and checks would
    repeat their side effects."""
    names = [n for n in vars(nn.Module()) if n.endswith("_hooks") and "state_dict" not in n]
    saved = [(m, n, getattr(m, n)) for m in root.modules() for n in names if hasattr(m, n)]
    saved = [(m, n, hooks) for m, n, hooks in saved if hooks]
    kept = [(hooks, dict(hooks)) for m, _, hooks in saved if not _weight_hooks(m)]
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


@contextlib.contextmanager
def _buffers_kept(root: nn.Module) -> Iterator[None]:
    saved = [(b, b.detach().clone()) for b in root.buffers() if not b.is_meta]
    try:
        yield
    finally:
        for buffer, value in saved:
            with torch.no_grad():
                buffer.copy_(value)


def run_flat(root: nn.Module, args: Any, kwargs: Any, *, training: bool = False) -> list[Any]:
    """The flat outputs of one call; same random numbers every time, no state left behind."""
    leaves: list[Any] = []
    with (
        modes(root, training),
        _without_hooks(root),
        _buffers_kept(root),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        inputs: list[Any] = []
        structure = flatten([list(args), dict(kwargs)], inputs, objects=True)
        own = [t.clone() if isinstance(t, Tensor) and not t.is_meta else t for t in inputs]
        own_args, own_kwargs = structure.build(own)
        flatten(root(*own_args, **own_kwargs), leaves, objects=True)
    return leaves


def _check_outputs(result: Capture, args: Any, kwargs: Any, expected: list[Any]) -> None:
    """The captured model must compute what the model computes, or its graphs are dropped."""
    try:
        actual = run_flat(result.root, args, kwargs)
        difference = _difference(actual, expected)
    except Exception as error:
        difference = f"{type(error).__name__}: {_first_line(error)}"
    if not difference:
        for region in result.regions:
            if region.hosted and not region.prefix and True in region.graphs:
                _check_train(result, region, args, kwargs)
        return
    reason = f"the captured graph does not reproduce the model's outputs: {difference}"
    for region in result.regions:
        unhost(result.root.get_submodule(region.prefix))
    unhost(result.root)
    again = _parts(
        result.root, args, kwargs, result.call, reason, 0.0 if result.rung == "parts" else 60.0
    )
    result.rung, result.regions, result.islands = again.rung, again.regions, again.islands
    result.notes += again.notes
    result.host()


def _check_train(result: Capture, region: Region, args: Any, kwargs: Any) -> None:
    program = region.graphs[True]
    try:
        actual = run_flat(result.root, args, kwargs, training=True)
        del region.graphs[True]
        result.host()
        expected = run_flat(result.root, args, kwargs, training=True)
        difference = _difference(actual, expected)
    except Exception as error:
        difference = f"{type(error).__name__}: {_first_line(error)}"
    if difference:
        region.graphs.pop(True, None)
        result.notes.append(
            f"{_TRAIN_IN_PYTHON}: its graph does not reproduce the model's outputs ({difference})"
        )
    else:
        region.graphs[True] = program
    result.host()


def _difference(actual: Sequence[Any], expected: Sequence[Any]) -> str | None:
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
                return f"result {i}: {_first_line(error)}"
        elif not isinstance(e, Tensor) and a != e:
            return f"result {i} is {a!r}, not {e!r}"
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


# rung 1: torch.export


class _Result:
    """Where the traced forward leaves its output's structure (export undoes attribute writes)."""

    structure: Structure | None = None


class _Flat(nn.Module):
    """Takes and returns flat tensors, so that no class of the model's needs to be a pytree."""

    def __init__(self, module: nn.Module, signature: Signature, deadline: float) -> None:
        super().__init__()
        self.module = module
        self.signature = signature
        self.deadline = deadline
        self.result = _Result()

    def forward(self, *leaves: Tensor) -> list[Any]:
        args, kwargs = self.signature.arguments(leaves)
        results: list[Any] = []
        with _Deadline(self.deadline):
            self.result.structure = flatten(self.module(*args, **kwargs), results, objects=True)
        return results


class _Deadline(TorchFunctionMode):
    """Stops a trace that takes too long, at the next torch call of the model's Python code."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self.deadline = deadline

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.perf_counter() > self.deadline:
            raise CaptureError("tracing took longer than its time limit")
        return func(*args, **(kwargs or {}))


def _export_region(module: nn.Module, prefix: str, call: Call, seconds: float) -> Region | str:
    """The region of `module`, or why it cannot be captured whole."""
    try:
        signature, leaves = Signature.of(type(module).forward.__get__(module), call)
    except Unflattenable as error:
        return str(error)
    if not leaves:
        return "it is called without tensors"
    deadline = time.perf_counter() + seconds
    exported = _export(module, signature, leaves, False, deadline)
    if isinstance(exported, str):
        return exported
    graph, output, dims = exported
    signature.dims = dims
    region = Region(prefix, {False: graph}, {False: output}, signature, leaves)
    _widen(module, region)
    trained = _export(module, signature, leaves, True, deadline)
    if isinstance(trained, str):
        region.train_reason = f"{_TRAIN_IN_PYTHON}: {trained}"
        return region
    graph, output, dims = trained
    region.graphs[True], region.outputs[True] = graph, output
    signature.dims = _narrower(signature.dims, dims)
    return region


def _export(
    module: nn.Module, signature: Signature, leaves: list[Tensor], training: bool, deadline: float
) -> tuple[fx.Graph, Structure, Dims] | str:
    flat = _Flat(module, signature, deadline)
    examples = _two_rows(leaves)
    state = random.getstate(), np.random.get_state()[1]
    try:
        with modes(module, training), _without_hooks(module), _quietly(), torch.enable_grad():
            program = torch.export.export(
                flat, tuple(examples), dynamic_shapes=(_dynamic(examples),), strict=False
            )
        graph, constants = rehost(program, module, signature.names, "module")
        dims = size_rules(program, leaves)
    except RewriteError as error:
        return _first_line(error)
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    if state[0] != random.getstate() or (state[1] != np.random.get_state()[1]).any():
        return "its forward draws from Python's or NumPy's random numbers, which a graph would fix"
    for name, constant in constants.items():
        module.register_buffer(name, constant, persistent=False)
    try:
        model_cost(module, [("", graph, leaves)], training=training)
    except VerifyError as error:
        return _first_line(error)
    assert flat.result.structure is not None
    return graph, flat.result.structure, dims


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """A failed trace logs its whole graph; here it is one rung that did not hold, and the reason
    goes into the report."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _two_rows(leaves: list[Tensor]) -> list[Tensor]:
    """Export fixes sizes of 1, so a batch of one is traced as a batch of two (and checked as a
    batch of one)."""
    batched = [t for t in leaves if t.dim()]
    if not batched or any(t.shape[0] != 1 for t in batched):
        return leaves
    return [torch.cat([t, t]) if t.dim() else t for t in leaves]


def _dynamic(leaves: list[Tensor]) -> tuple[Any, ...]:
    """Which dimensions may vary: the batch, and the length of sequences. Image sizes and feature
    widths stay fixed: as symbols they make tracing of a vision model many times slower."""
    auto = torch.export.Dim.AUTO
    dims = []
    for leaf in leaves:
        count = 1 if leaf.is_floating_point() and leaf.dim() > 3 else 2
        dims.append({d: auto for d in range(min(count, leaf.dim()))})
    return tuple(dims)


def _widen(module: nn.Module, region: Region) -> None:
    """Export assumes that a varying size is at least 2. Where the graph is found to agree with the
    model on size 1 as well, it may serve it."""
    assert region.signature is not None
    assert region.leaves is not None
    dims = region.signature.dims
    program = Program(region.graphs[False], region.outputs[False])
    for dim in (0, 1):
        symbols = {s[dim] for s in dims.shapes if len(s) > dim and isinstance(s[dim], str)}
        narrow = {s for s in symbols if isinstance(s, str) and dims.ranges[s][0] == 2}
        if not narrow:
            continue
        leaves = list(region.leaves)
        for i, sizes in enumerate(dims.shapes):
            for d, size in enumerate(sizes):
                if size in narrow:
                    leaves[i] = leaves[i].narrow(d, 0, 1)
        for s in narrow:
            dims.ranges[str(s)] = (1, dims.ranges[str(s)][1])
        try:
            if dims.difference(leaves, region.signature.names) is not None:
                raise CaptureError("a guard excludes size 1")
            args, kwargs = region.signature.arguments(leaves)
            expected = run_flat(module, args, kwargs)
            actual: list[Any] = []
            with modes(module, False), _without_hooks(module), _buffers_kept(module):
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    flatten(program(module, leaves, ""), actual, objects=True)
            agrees = _difference(actual, expected) is None
        except Exception:  # either side refuses size 1: the graph keeps to 2 and above
            agrees = False
        if not agrees:
            for s in narrow:
                dims.ranges[str(s)] = (2, dims.ranges[str(s)][1])


def _narrower(a: Dims, b: Dims) -> Dims:
    """Sizes that both modes' graphs accept. Symbols are named per trace; those of `a` stay."""
    names: dict[str, str] = {}
    shapes: list[list[int | str]] = []
    for left, right in zip(a.shapes, b.shapes, strict=True):
        row: list[int | str] = []
        for x, y in zip(left, right, strict=True):
            if isinstance(x, str) and isinstance(y, str):
                names.setdefault(y, x)
                row.append(names[y])
            else:
                row.append(x if isinstance(x, int) else y)
        shapes.append(row)
    ranges = dict(a.ranges)
    guards = [g for g in a.guards]
    for theirs, ours in names.items():
        low, high = ranges[ours]
        other_high = b.ranges[theirs][1]
        highs = [h for h in (high, other_high) if h is not None]
        ranges[ours] = (low, min(highs) if highs else None)
    for guard in b.guards:
        renamed = re.sub(r"\bs\d+\b", lambda m: names.get(m[0], "?"), guard)
        if "?" not in renamed and renamed not in guards:
            guards.append(renamed)
    used = {s for row in shapes for s in row if isinstance(s, str)}
    guards = [g for g in guards if set(re.findall(r"\bs\d+\b", g)) <= used]
    return Dims(shapes, {s: ranges[s] for s in used}, guards)


# rung 2: by parts


def _hooked(root: nn.Module) -> str | None:
    """Why hooks keep a module from being captured whole: a graph would run past a container."""
    for fqn, module in root.named_modules():
        if fqn and not is_leaf(module) and _has_hooks(module):
            return f"{fqn} has hooks, which a graph of the whole would bypass"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return any(
        bool(getattr(module, n, None))
        for n in vars(module)
        if n.endswith("_hooks") and "state_dict" not in n
    )


def _parts(
    root: nn.Module, args: Any, kwargs: Any, call: Call | None, reason: str, seconds: float
) -> Capture:
    result = Capture(root, "parts", [], call)
    calls = _record(root, args, kwargs)
    deadline = time.perf_counter() + seconds
    done: set[int] = set()

    def visit(fqn: str, module: nn.Module, reason: str | None) -> None:
        if id(module) in done:
            return
        done.add(id(module))
        recorded = calls.get(id(module), [])
        if is_leaf(module):
            if recorded:
                result.regions.append(_leaf_region(fqn, recorded))
            return
        if reason is None and recorded:
            region = _part(fqn, module, recorded, deadline)
            if isinstance(region, Region):
                result.regions.append(region)
                if region.train_reason:
                    result.notes.append(f"{fqn}: {region.train_reason}")
                for child in module.modules():
                    done.add(id(child))
                return
            reason = region
        if recorded and reason is not None:
            layers = [f"{fqn}.{n}" if fqn else n for n, m in module.named_children() if is_leaf(m)]
            result.islands.append(Island(fqn, type(module).__name__, reason, layers))
        for name, child in module.named_children():
            visit(f"{fqn}.{name}" if fqn else name, child, None)

    visit("", root, reason)
    return result


def _record(root: nn.Module, args: Any, kwargs: Any) -> dict[int, list[tuple[Any, Any]]]:
    """What each module was called with, for modules that one forward calls."""
    calls: dict[int, list[tuple[Any, Any]]] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        own = calls.setdefault(id(module), [])
        if is_leaf(module):  # only the shape matters: one element stands for all
            args = tuple(
                a.detach().new_zeros(()).expand(a.shape) if isinstance(a, Tensor) else a
                for a in args
            )
        own.append((args, kwargs))

    handles = []
    with _without_hooks(root), modes(root, False), torch.no_grad(), _buffers_kept(root):
        try:
            for module in root.modules():
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                root(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return calls


def _part(
    fqn: str, module: nn.Module, recorded: list[tuple[Any, Any]], deadline: float
) -> Region | str:
    hooked = _hooked(module)
    if hooked:
        return hooked
    if not any(is_leaf(m) for m in module.modules()):
        return "no layer inside"
    remaining = deadline - time.perf_counter()
    if remaining <= 0:
        return "the time limit of capture was reached"
    try:
        bound = [Call.of(type(module).forward.__get__(module), a, k) for a, k in recorded]
        keys = {str(_shape_of(c)) for c in bound}
    except (TypeError, Unflattenable) as error:
        return _first_line(error)
    if len(keys) > 1:
        return f"it is called in {len(keys)} different ways"
    return _export_region(module, fqn, bound[0], remaining)


def _shape_of(call: Call) -> tuple[Any, ...]:
    leaves: list[Any] = []
    structure = flatten(dict(call.arguments), leaves, objects=False)
    return structure, [(t.dtype, t.dim()) for t in leaves if isinstance(t, Tensor)]


def _leaf_region(fqn: str, recorded: list[tuple[Any, Any]]) -> Region:
    """A graph that only describes the calls of one layer that Python makes."""
    owner, _, name = fqn.rpartition(".")
    graph = fx.Graph()
    leaves: list[Tensor] = []
    results = []
    for args, kwargs in recorded:
        tensors = [a for a in [*args, *kwargs.values()] if isinstance(a, Tensor)]
        leaves.append(tensors[0])
        results.append(graph.call_module(name, (graph.placeholder(f"x{len(leaves)}"),)))
    graph.output(tuple(results))
    return Region(owner, {False: graph}, {False: None}, None, leaves, hosted=False)


# rung 3: symbolic tracing


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def _symbolic(root: nn.Module) -> Capture:
    reason = _hooked(root)
    graphs: dict[bool, fx.Graph] = {}
    try:
        if reason:
            raise CaptureError(reason)
        for training in (False, True):
            with modes(root, training):
                graphs[training] = _Tracer().trace(root)
    except Exception as error:
        raise CaptureError(
            f"{type(root).__name__} cannot be traced without running it "
            f"({type(error).__name__}: {_first_line(error)}): pass example_inputs, one real batch"
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
