"""One rewrite from end to end: capture, the passes in turn, the memory plan, the report."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from rewriter.base import Pass
from rewriter.capture import capture
from rewriter.capture.hosted import original_class
from rewriter.engine.engine import Engine, Options
from rewriter.errors import RewriteError
from rewriter.recipe.recipe import Recipe
from rewriter.report import Report

__all__ = ["copied", "prepare", "restored_on_error", "run"]

M = TypeVar("M", bound=nn.Module)


def run(
    root: nn.Module,
    passes: Sequence[Pass],
    example_inputs: Any,
    options: Options,
    strict: bool,
    model: nn.Module | None,
) -> Report:
    state = vars(root).get("_rewriter")
    done = None if state is None else state.recipe
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


def copied(model: M) -> M:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RewriteError(
            f"{original_class(model).__name__} cannot be copied ({type(error).__name__}: {error}): "
            "pass inplace=True to rewrite the model itself"
        ) from error


@contextlib.contextmanager
def restored_on_error(root: nn.Module) -> Iterator[None]:
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
