"""The façade: `rewrite` and its dry run `explain`."""

from __future__ import annotations

import contextlib
import copy
import numbers
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from rewriter import lowering
from rewriter.base import Pass, Where
from rewriter.capture import capture
from rewriter.capture.hosted import RewrittenModule, original_class
from rewriter.cost import Device
from rewriter.engine import Engine, Options, check_passes
from rewriter.engine.batches import Calibration
from rewriter.errors import OptionError, RewriteError, RewriteWarning
from rewriter.lowering import Rule, checked
from rewriter.planner import MemoryBudget
from rewriter.report import Report
from rewriter.store import Recipe

if TYPE_CHECKING:
    from rewriter.planner import MemoryPlan

__all__ = ["explain", "plan_memory", "prepare", "rewrite"]

M = TypeVar("M", bound=nn.Module)


def rewrite(
    model: M,
    passes: Sequence[Pass] = (),
    example_inputs: Any = None,
    *,
    objective: str | None = None,
    max_error: float | None = None,
    where: Where = None,
    calibration: Any = None,
    memory_budget: int | float | str | MemoryBudget | None = None,
    device: str | Device | None = None,
    measure: bool = False,
    kernels: str = "auto",
    lower: bool | Sequence[Rule] = True,
    inplace: bool = False,
    strict_signature: bool = False,
) -> M:
    """model → capture → each pass in turn → an ordinary module of the model's own class.

    The result has the model's class, attributes, hooks, ties and state_dict keys (but for the
    rewritten layers), switches between `train()` and `eval()`, and carries its ledger as
    `result.report`.

    Args:
        model: any `nn.Module`; never changed unless `inplace`.
        passes: what to do, in this order; phases must not descend.
        example_inputs: one real batch: a tensor, a tuple of positional or a mapping of keyword
            arguments. Without, the model is traced symbolically and nothing but parameters can be
            priced.
        objective: "params", "memory" or "latency": declines a replacement that is no better;
            latency is what `device` is predicted to take, or without one (or with `measure`) what
            this machine takes, on the example's sizes. None applies every replacement.
        max_error: declines a replacement whose relative error is larger: of its weights, or with
            `calibration` of its outputs.
        where: which sites: a name pattern, a predicate over sites, or None for all.
        calibration: batches like `example_inputs` (a list, a DataLoader, or one batch) whose
            activations passes may fit their layers to; Monarch then minimises the error of a
            layer's outputs instead of its weights'. Every fourth batch is held out: on it the
            report's output errors are measured. Padding by a 2-D `attention_mask` is left out.
        memory_budget: of a training step: bytes, "512MB", a fraction of what keeping everything
            takes, or a `rewriter.MemoryBudget`. The result then trains by a plan that keeps,
            recomputes, derives or packs what the backward needs, so that the peak of activations,
            gradients and temporaries stays within it at the example's sizes; the gradients are the
            same. The report has the plan as its step "memory plan".
        device: whose predicted seconds and joules the report shows: a `rewriter.Device`, the name
            of one ("h100"; `Device.names()` lists them), or "this" for this machine, which is
            measured for up to 20 seconds the first time. None predicts nothing.
        measure: adds wall times on this machine to the report, of the original and after each pass.
        kernels: "auto": the fastest implementation that works here.
        lower: fuses operations of the eval graph, for calls that want no gradient, without changing
            the model: batch norm into convolutions, activations into products, products of one
            input into one. False leaves that; a list gives the rules, e.g.
            `[*rewriter.lowering.DEFAULT_RULES, mine]`. Weights that change are noticed. The report
            has it as its step "lowering".
        inplace: rewrite `model` itself, to save memory; it stays as it was if anything fails.
        strict_signature: raise on calls that differ from the captured one, instead of running the
            original Python forward over the rewritten layers.

    Returns:
        The rewritten model, a `RewrittenModule` and still an instance of the model's class.

    Raises:
        CalibrationError: the calibration batches cannot be used, or the model fails on one.
        CaptureError: the example inputs do not run, or there are none and tracing fails.
        OptionError: an impossible option, or passes out of order.
        PassError: a pass failed on a site.
        VerifyError: a pass broke what must hold.
    """
    _check_model(model)
    settings = _settings(
        passes, objective, max_error, where, calibration, memory_budget, device, measure, kernels,
        example_inputs, lower,
    )  # fmt: skip
    with torch.inference_mode(False):  # or the result could never train
        root = model if inplace else _copied(model)
        with _restored_on_error(root) if inplace else contextlib.nullcontext():
            _run(
                root, passes, example_inputs, settings, strict_signature, None if inplace else model
            )
    return root


def explain(
    model: nn.Module,
    passes: Sequence[Pass] = (),
    example_inputs: Any = None,
    *,
    objective: str | None = None,
    max_error: float | None = None,
    where: Where = None,
    calibration: Any = None,
    memory_budget: int | float | str | MemoryBudget | None = None,
    device: str | Device | None = None,
    measure: bool = False,
    kernels: str = "auto",
    lower: bool | Sequence[Rule] = True,
) -> Report:
    """The dry run: the report that `rewrite` with the same arguments would give, and no model.

    Raises:
        RewriteError: as `rewrite`.
    """
    _check_model(model)
    settings = _settings(
        passes, objective, max_error, where, calibration, memory_budget, device, measure, kernels,
        example_inputs, lower,
    )  # fmt: skip
    with torch.inference_mode(False):
        return _run(_copied(model), passes, example_inputs, settings, False, model)


def plan_memory(
    model: nn.Module, example_inputs: Any, budget: Any = 1.0, device: Any = None
) -> MemoryPlan:
    """min seconds(plan) over all plans with peak(plan) ≤ budget, and the whole curve of them.

    Plans a training step of any model that can be captured as one graph, also on `meta`: traced on
    fake tensors, nothing runs. `print` shows the decision on every value that the backward needs,
    `plan.curve` all plans worth having, `plan.save("curve.png")` plots them.

    Args:
        model: any `nn.Module`, rewritten or not; not changed.
        example_inputs: as of `rewrite`.
        budget: as `rewrite(memory_budget=…)`; by default nothing but what costs no time.
        device: as of `rewrite`: whose times the plan goes by.

    Raises:
        CaptureError: the example inputs do not run.
        OptionError: no plan is within the budget, or the model is not one train graph.
    """
    from rewriter.planner.apply.install import plan_of

    _check_model(model)
    wanted = MemoryBudget.of(budget)
    found = None if device is None else Device.get(device)
    if wanted.lossy:
        raise OptionError("plan_memory runs nothing, so it cannot check a lossy plan: use rewrite")
    with torch.inference_mode(False):
        captured = capture(_copied(model), example_inputs)
        captured.host()
        plan = plan_of(captured, wanted, found).plan
    assert plan is not None
    return plan


def _run(
    root: nn.Module,
    passes: Sequence[Pass],
    example_inputs: Any,
    options: Options,
    strict: bool,
    model: nn.Module | None,
) -> Report:
    done = vars(root)["_rewriter"].recipe if isinstance(root, RewrittenModule) else None
    # after an earlier rewrite, what is stored leads from the original to here
    recipe = Recipe.of(root) if done is None else copy.deepcopy(done)
    engine = prepare(root, example_inputs, options, strict=strict)
    engine.recipe, engine.model = recipe, model
    recipe.lower = bool(options.lower)
    steps = [engine.original()]
    for rewrite in passes:  # no comprehension: warnings count the frames up to the user's line
        steps.append(engine.run(rewrite))
    if options.memory is not None:
        steps.append(engine.plan_memory(options.memory))
    steps += engine.lower()
    report = engine.report(steps)
    engine.finish(report)
    return report


def prepare(
    root: nn.Module, example_inputs: Any, options: Options | None = None, *, strict: bool = False
) -> Engine:
    """An engine around the engine's own copy of a model, captured and ready to run passes."""
    captured = capture(root, example_inputs, strict=strict)
    return Engine(captured, options or Options())


def _settings(
    passes: Sequence[Pass],
    objective: str | None,
    max_error: float | None,
    where: Where,
    calibration: Any,
    memory_budget: Any,
    device: Any,
    measure: Any,
    kernels: Any,
    example_inputs: Any,
    lower: Any,
) -> Options:
    """The engine's options, or what is impossible about the arguments."""
    if not isinstance(passes, list | tuple | Pass):
        raise OptionError(f"passes must be a list of passes, not {passes!r}")
    check_passes(passes)
    memory = None if memory_budget is None else MemoryBudget.of(memory_budget)
    if memory is not None and example_inputs is None:
        raise OptionError("memory_budget needs example_inputs: a plan is made for their sizes")
    if kernels != "auto":
        raise OptionError(f"kernels={kernels!r}: this version supports 'auto' only")
    rules = checked(lowering.DEFAULT_RULES if lower is True else lower or ())
    if max_error is not None and not isinstance(max_error, numbers.Real):
        raise OptionError(f"max_error={max_error!r}: use a number of at least 0, or None")
    if where is not None and not isinstance(where, str) and not callable(where):
        raise OptionError(f"where={where!r}: use a name pattern, a predicate over sites, or None")
    if not (device is None or isinstance(device, str | Device)):
        raise OptionError(f"device={device!r}: use the name of a device, a Device, or None")
    found = None if device is None else Device.get(device)
    batches = None if calibration is None else Calibration.of(calibration)
    if batches is not None and not any(p.calibrates for p in passes):
        warnings.warn(
            "calibration is given, but none of the passes makes use of it",
            RewriteWarning,
            stacklevel=3,
        )
    return Options(objective, max_error, where, found, bool(measure), batches, memory, rules)


def _check_model(model: Any) -> None:
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise RewriteError(f"rewrite needs a model, not the class {model.__name__}: build it first")
    if not isinstance(model, nn.Module):
        raise RewriteError(f"rewrite needs an nn.Module, not a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise RewriteError("rewrite needs the Python model, not a TorchScript module")
    if hasattr(model, "_orig_mod"):
        raise RewriteError("the model is compiled already: rewrite first (pass model._orig_mod)")
    if any(m._compiled_call_impl is not None for m in model.modules()):
        raise RewriteError("the model is compiled already (model.compile()): rewrite first")
    wrappers = {c.__name__ for c in type(model).__mro__ if c.__module__.startswith("torch.")}
    if wrappers & {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}:
        raise RewriteError("rewrite before wrapping for data parallelism (pass model.module)")
    if "FSDPModule" in wrappers:
        raise RewriteError("the model is sharded already: rewrite before fully_shard")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise RewriteError(f"{name} has no shape yet (a lazy module): run the model once first")


def _copied(model: M) -> M:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RewriteError(
            f"{original_class(model).__name__} cannot be copied ({type(error).__name__}: {error}): "
            "pass inplace=True to rewrite the model itself"
        ) from error


@contextlib.contextmanager
def _restored_on_error(root: nn.Module) -> Iterator[None]:
    """An in-place rewrite that fails leaves the model as it was."""
    saved = [(m, type(m), dict(vars(m))) for m in root.modules()]
    # hooks, parameters, submodules, …: what a module keeps in containers of its own
    inner = [
        (held, copy.copy(held))
        for _, _, own in saved
        for held in own.values()
        if isinstance(held, dict | set)
    ]
    grads = [(p, p.requires_grad) for p in root.parameters()]
    try:
        yield
    except BaseException:
        for module, cls, own in saved:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(own)
        for container, contents in inner:
            container.clear()
            container.update(contents)
        for parameter, flag in grads:
            parameter.requires_grad_(flag)
        raise
