"""The façade: `rewrite`, its dry run `explain`, `plan_memory` and `export`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from rewriter import lowering
from rewriter.base import Pass, Where
from rewriter.capture import capture
from rewriter.compiler.packaging import FORMATS, Exported, exported
from rewriter.cost import Device
from rewriter.engine import Options, check_calibrated, check_passes
from rewriter.engine.batches import Calibration
from rewriter.engine.decide import device_of
from rewriter.engine.pipeline import copied, run
from rewriter.engine.undo import restored_on_error
from rewriter.errors import (
    PATH,
    CaptureError,
    OptionError,
    RewriteError,
    given,
    of_type,
    one_of,
    warn,
)
from rewriter.lowering import Rule, checked
from rewriter.modules.garbage import rare_collections
from rewriter.modules.paths import path_of
from rewriter.planner import MemoryBudget
from rewriter.recipe.parse import parse_pass
from rewriter.report import Report

if TYPE_CHECKING:
    from rewriter.planner import MemoryPlan

__all__ = ["explain", "export", "plan_memory", "rewrite"]

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
    capture_seconds: float = 60.0,
) -> M:
    """model → capture → each pass in turn → an ordinary module of the model's own class.

    The result has the model's class, attributes, hooks, ties and state_dict keys (but for the
    rewritten layers), switches between `train()` and `eval()`, and carries its ledger as
    `result.report`.

    Several threads may rewrite at once, also copies of one model. A model that is rewritten
    `inplace` must not run in another thread meanwhile: its layers change under the call.

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
            report's output errors are measured. `Quantize("int8-static")` cannot do without: its
            ranges are those of the batches. Padding by a 2-D `attention_mask` is left out.
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
        capture_seconds: of CPU time, for tracing the model; what is not traced then stays Python,
            with a warning.

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
        example_inputs, lower, capture_seconds,
    )  # fmt: skip
    with torch.inference_mode(False), rare_collections():  # or the result could never train
        root = model if inplace else copied(model)
        with restored_on_error(root) if inplace else contextlib.nullcontext():
            run(
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
    capture_seconds: float = 60.0,
) -> Report:
    """The dry run: the report that `rewrite` with the same arguments would give, and no model.

    Raises:
        RewriteError: as `rewrite`.
    """
    _check_model(model, "explain")
    settings = _settings(
        passes, objective, max_error, where, calibration, memory_budget, device, measure, kernels,
        example_inputs, lower, capture_seconds,
    )  # fmt: skip
    with torch.inference_mode(False), rare_collections():
        return run(copied(model), passes, example_inputs, settings, False, model)


def plan_memory(
    model: nn.Module,
    example_inputs: Any,
    budget: Any = 1.0,
    device: Any = None,
    *,
    capture_seconds: float = 60.0,
) -> MemoryPlan:
    """min seconds(plan) over all plans with peak(plan) ≤ budget, and the whole curve of them.

    Plans a training step of any model that can be captured as one graph, also on `meta`: traced on
    fake tensors, nothing runs. `print` shows what becomes of the values that the backward needs, by
    layer and line of code, the largest first; `plan.values` has every decision, `plan.curve` all
    plans worth having, `plan.save("curve.png")` plots them.

    Args:
        model: any `nn.Module`, rewritten or not; not changed.
        example_inputs: as of `rewrite`.
        budget: as `rewrite(memory_budget=…)`; by default nothing but what costs no time.
        device: as of `rewrite`: whose times the plan goes by.
        capture_seconds: as of `rewrite`.

    Raises:
        CaptureError: the example inputs do not run.
        OptionError: no plan is within the budget, or the model is not one train graph.
    """
    from rewriter.planner.apply.install import plan_of

    _check_model(model, "plan_memory")
    wanted = MemoryBudget.of(budget)
    options = Options(device=device_of(device), capture_seconds=capture_seconds)
    if wanted.lossy:
        raise OptionError("plan_memory runs nothing, so it cannot check a lossy plan: use rewrite")
    with torch.inference_mode(False), rare_collections():
        captured = capture(copied(model), example_inputs, seconds=options.capture_seconds)
        captured.host()
        plan = plan_of(captured, wanted, options.device).plan
    assert plan is not None
    return plan


def export(
    model: nn.Module,
    passes: Sequence[Pass | str] = (),
    example_inputs: Any = None,
    *,
    package: str | os.PathLike[str] | None = None,
    dynamic_shapes: Any = None,
    inductor: Mapping[str, Any] | None = None,
    standalone: bool = False,
    format: str = "pt2",
    **options: Any,
) -> Exported:
    """model → rewrite → `torch.export` program → AOTInductor package or ONNX file: eval mode,
    weights inside.

    Args:
        model: any module that `torch.export` takes whole; never changed.
        passes: as in `rewrite`, also as text.
        example_inputs: one real batch, as in `rewrite`; it is needed.
        package: where to write compiled code (`.pt2`), for `torch._inductor.aoti_load_package`, or
            with format="onnx" the model (`.onnx`). On a CPU the code has the fused ops of the
            lowered model, and holds the compiled kernels of its int8 layers and of attention: it
            is for CPUs like this one, and its weights are those of now. Inputs of any strides
            are copied to those of the example; other sizes or dtypes are an error.
        dynamic_shapes: as `torch.export.export` takes it; where left out, the sizes are those of
            the example, and in ONNX batch and length vary as far as the model lets them.
        inductor: options of Inductor's for the package.
        standalone: writes ops with a record out by their references in torch's own, so that
            program and package load and run where only torch is installed. Their tuned kernels
            are lost; 8-bit ops compute in float64 then: small files, but slow code.
        format: "pt2", or "onnx" for ONNX Runtime, where 8-bit ops are integer products
            (MatMulInteger). On an x86 CPU without VNNI these saturate in ONNX Runtime, unless its
            session option "session.x64quantprecision" is "1".
        options: further ones of `rewrite`.

    Returns:
        The program, its ledger, and what it needs to run.

    Raises:
        CaptureError: there is no example, or the rewritten model cannot be exported.
        OptionError: an option is impossible.
    """
    _check_model(model, "export")
    if example_inputs is None:
        raise CaptureError("export needs example_inputs: one real batch of the model")
    wanted = "where to write, a path, or None"
    of_type("export", "package", package, (*PATH, type(None)), wanted)
    path = None if package is None else path_of(package, "package")
    one_of("format", format, FORMATS)
    if path is not None and path.suffix != f".{format}":
        raise OptionError(f"package={str(path)!r}: the suffix must be .{format}")
    if format == "onnx" and (path is None or standalone or inductor):
        raise OptionError("format='onnx' needs package='model.onnx', no standalone= or inductor=")
    if path is not None and not path.parent.is_dir():
        raise OptionError(f"package={str(path)!r}: there is no directory {path.parent}")
    if isinstance(passes, str | Pass) or not isinstance(passes, Sequence):
        raise OptionError(f"passes must be a list of passes or of their texts, not {given(passes)}")
    if inductor and path is None:
        raise OptionError("inductor= is for the package: give package='model.pt2' too")
    chosen = [parse_pass(p) if isinstance(p, str) else p for p in passes]
    ready = rewrite(model, chosen, example_inputs, **options).eval()
    return exported(ready, example_inputs, path, dynamic_shapes, inductor, standalone, format)


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
    capture_seconds: Any,
) -> Options:
    """The engine's options, or what is impossible about the arguments."""
    if not isinstance(passes, list | tuple | Pass):
        raise OptionError(f"passes must be a list of passes, not {given(passes)}")
    check_passes(passes)
    memory = None if memory_budget is None else MemoryBudget.of(memory_budget)
    if memory is not None and example_inputs is None:
        raise OptionError("memory_budget needs example_inputs: a plan is made for their sizes")
    if kernels != "auto":
        raise OptionError(f"kernels={kernels!r}: this version supports 'auto' only")
    rules = checked(lowering.DEFAULT_RULES if lower is True else lower or ())
    found = device_of(device)
    batches = None if calibration is None else Calibration.of(calibration, like=example_inputs)
    if batches is None:
        check_calibrated(passes, "pass calibration=[batch, …] like example_inputs, better ten")
    if batches is not None and not any(p.calibrates or p.samples for p in passes):
        warn("calibration is given, but none of the passes makes use of it")
    return Options(
        objective, max_error, where, found, bool(measure), batches, memory, rules, capture_seconds
    )


def _check_model(model: Any, call: str = "rewrite") -> None:
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise RewriteError(f"{call} needs a model, not the class {model.__name__}: build it first")
    if not isinstance(model, nn.Module):
        raise RewriteError(f"{call} needs an nn.Module, not a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise RewriteError(f"{call} needs the Python model, not a TorchScript module")
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
