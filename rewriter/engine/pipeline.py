"""One rewrite from end to end: capture, the passes in turn, the memory plan, the report."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from rewriter.base import Pass
from rewriter.capture import capture
from rewriter.capture.hosted import original_class
from rewriter.engine.engine import Engine, Options
from rewriter.errors import RewriteError, warn
from rewriter.recipe.recipe import Recipe
from rewriter.report import Report
from rewriter.report.content import slower

__all__ = ["copied", "prepare", "run"]

M = TypeVar("M", bound=nn.Module)


def run(
    root: nn.Module,
    passes: Sequence[Pass],
    example_inputs: Any,
    options: Options,
    strict: bool,
    model: nn.Module | None,
) -> Report:
    """The report of a model rewritten in place: captured, passed through the passes, planned,
    lowered, hosted.

    Args:
        root: the model that is changed.
        passes: in turn.
        example_inputs: one batch; None without.
        options: what is asked of the engine.
        strict: whether a part left in Python is an error.
        model: the user's own, where `root` is a copy of it.
    """
    state = vars(root).get("_rewriter")
    done = None if state is None else state.recipe
    # after an earlier rewrite, what is stored leads from the original to here
    recipe = Recipe.of(root) if done is None else copy.deepcopy(done)
    engine = prepare(root, example_inputs, options, strict=strict)
    engine.recipe, engine.model = recipe, model
    engine.time_losses()
    steps = [engine.original()]
    steps += engine.run_all(passes)
    if options.memory is not None:
        steps.append(engine.plan_memory(options.memory))
    steps += engine.lower()
    recipe.lower = bool(engine.lowering.lowered)
    report = engine.report(steps)
    engine.finish(report)
    report.speed, report.untimed = engine.speed()
    for form in report.forms:
        form.reset()
    if said := slower(report):
        warn(f'{report.model} is {said}. objective="latency" keeps the layers that are no faster')
    return report


def prepare(
    root: nn.Module, example_inputs: Any, options: Options | None = None, *, strict: bool = False
) -> Engine:
    """Captures a model, which the engine may change; the engine for it, ready to run passes."""
    options = options or Options()
    captured = capture(root, example_inputs, seconds=options.capture_seconds, strict=strict)
    return Engine(captured, options)


def copied(model: M) -> M:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RewriteError(
            f"{original_class(model).__name__} cannot be copied ({type(error).__name__}: {error}): "
            "pass inplace=True to rewrite the model itself"
        ) from error
