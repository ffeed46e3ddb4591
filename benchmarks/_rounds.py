"""One model through all that its user does with it: rewrite, forward, backward, save, load.

What the rewritten model gives is compared with the same layers in Python: a copy of the model whose
own forward runs over the layers that the rewrite put in, at one seed, so that dropout is the same.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewriter import load, rewrite
from rewriter.base import Pass
from rewriter.errors import RewriteError
from rewriter.modules.tensors import is_constant

__all__ = ["Round", "go"]

SEEDS = (1, 2)
"""Of the training steps: two, for a branch that a random number decides may go either way."""


@dataclass
class Round:
    """What became of one model under one recipe.

    Args:
        captured: "whole", "by parts", or "" where `rewrite` raised.
        rewritten, skipped: linear layers, by what the report says of them.
        difference: largest relative difference of what a call in eval mode gives, ‖a − b‖/‖b‖.
        step: the same of outputs, gradients and buffers of training steps; None: nothing to train.
        loaded: whether what was saved and loaded gives the same bit for bit.
        refused: the message of an error of this package.
        wrong: everything that must not be: a foreign error, another structure, a missing gradient.
        compared: False where the model's own forward cannot run over the new layers.
    """

    captured: str = ""
    rewritten: int = 0
    skipped: int = 0
    difference: float | None = None
    step: float | None = None
    loaded: bool = False
    refused: str = ""
    wrong: list[str] = field(default_factory=list)
    compared: bool = True
    seconds: float = 0.0


def go(entry: Any, passes: Sequence[Pass]) -> Round:
    """The whole way of one model; nothing is raised, everything is in the result."""
    found = Round()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _go(entry, passes, found)
        except RewriteError as error:
            found.refused = f"{type(error).__name__}: {error}"
        except Exception as error:  # a survey: the row says so
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
            text = " ".join(str(error).split())[:160]
            found.wrong.append(f"{type(error).__name__}: {text} ({place})")
    found.seconds = round(time.perf_counter() - start, 1)
    return found


def _go(entry: Any, passes: Sequence[Pass], found: Round) -> None:
    model, inputs = entry.build(), entry.inputs()
    _record_states(model, inputs)
    optimized: Any = rewrite(model, passes, inputs)
    report = optimized.report
    found.captured = "whole" if report.capture.rung == "export" else "by parts"
    linear = [d for d in report.decisions if d.kind == "linear"]
    found.rewritten = sum(d.changed for d in linear)
    found.skipped = len(linear) - found.rewritten
    reference = _in_python(model, optimized, inputs)
    found.compared = reference is not None
    got = _leaves(_call(optimized, inputs))
    if reference is not None:
        found.difference = _apart(got, _leaves(_call(reference, inputs)), "eval", found)
    steps = [(_step(optimized, inputs, s), reference and _step(reference, inputs, s))
             for s in SEEDS]  # fmt: skip
    for mine, theirs in steps:
        if mine is not None and theirs is not None:
            off = _apart(mine, theirs, "training step", found)
            found.step = max(found.step or 0.0, off)
    with tempfile.TemporaryDirectory() as folder:
        optimized.save(folder)
        again = load(folder, entry.build())
    found.loaded = _apart(_leaves(_call(again, inputs)), got, "after load", found) == 0
    if not found.loaded:
        found.wrong.append("another output after load")


def _record_states(model: nn.Module, inputs: dict[str, Any]) -> None:
    """A call as users make it before a rewrite: transformers then keeps its recording hooks."""
    with torch.no_grad():
        if hasattr(getattr(model, "config", None), "output_hidden_states"):
            try:
                model(**copy.deepcopy(inputs), output_hidden_states=True)
                return
            except TypeError:  # a model without that argument
                pass
        model(**copy.deepcopy(inputs))


def _in_python(model: nn.Module, optimized: Any, inputs: dict[str, Any]) -> nn.Module | None:
    """The original with the new layers at their places; None where its own forward cannot run over
    them: it computes with a weight in a way that only a graph can give to a layer."""
    reference = copy.deepcopy(model)
    names = dict(reference.named_modules(remove_duplicate=False))
    changed = {d.site for step in optimized.report.steps for d in step.decisions
               if d.action in ("replaced", "installed")}  # fmt: skip
    shared = {names[site] for site in changed if site in names}
    memo: dict[int, Any] = {}
    try:
        for name in (n for n, module in names.items() if module in shared):
            reference.set_submodule(name, copy.deepcopy(optimized.get_submodule(name), memo))
        for name in changed - set(names):  # a weight: the layer takes its place
            parent, _, leaf = name.rpartition(".")
            owner = reference.get_submodule(parent)
            delattr(owner, leaf)
            owner.add_module(leaf, copy.deepcopy(optimized.get_submodule(name), memo))
            for key, own in optimized.get_submodule(parent)._parameters.items():
                if id(own) in memo:  # the layer's bias, which its owner passes to it
                    owner._parameters[key] = memo[id(own)]
        _call(reference, inputs)
    except (AttributeError, TypeError, RuntimeError):
        return None
    return reference


def _seed(seed: int) -> None:
    """Of every source that a model may draw from: masks of speech models are NumPy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    _seed(1)
    with torch.no_grad():
        return model.eval()(**copy.deepcopy(inputs))


def _step(model: nn.Module, inputs: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """Outputs, gradients and buffers of a training step; None where nothing can be trained."""
    model = copy.deepcopy(model).train()
    _seed(seed)
    outputs = _leaves(model(**copy.deepcopy(inputs)))
    trained = [t for t in outputs.values() if isinstance(t, Tensor) and t.requires_grad]
    if not trained:
        return None
    sum(t.float().square().mean() for t in trained).backward()  # type: ignore[union-attr]
    grads = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    buffers = {f"buffer {n}": b for n, b in model.named_buffers() if not is_constant(n)}
    return outputs | grads | buffers


def _leaves(output: Any) -> dict[str, Any]:
    """Every leaf of what a model returned, those in the attributes of objects (a cache) too."""
    return {f"output {i}": leaf for i, leaf in enumerate(_opened(output, set()))}


def _opened(value: Any, seen: set[int]) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor | type) or not hasattr(leaf, "__dict__"):
            yield leaf
        elif id(leaf) not in seen:
            seen.add(id(leaf))
            yield from _opened(dict(vars(leaf)), seen)


def _apart(got: dict[str, Any], want: dict[str, Any], what: str, found: Round) -> float:
    """Largest ‖a − b‖/‖b‖ over the tensors; infinite, with the reason, where they do not pair."""
    if got.keys() != want.keys():
        found.wrong.append(f"{what}: another structure")
        return float("inf")
    largest = 0.0
    for name, y in want.items():
        if problem := _unlike(got[name], y):
            found.wrong.append(f"{what}: {name}: {problem}")
            return float("inf")
        if isinstance(y, Tensor) and not torch.equal(got[name], y):
            a, b = (t.detach().double().nan_to_num() for t in (got[name], y))
            largest = max(largest, float((a - b).norm() / b.norm().clamp(min=1e-30)))
    return largest


def _unlike(x: Any, y: Any) -> str:
    """In what two leaves differ that no rounding explains."""
    if type(x) is not type(y):
        return f"{type(x).__name__} for {type(y).__name__}"
    if not isinstance(x, Tensor):
        return ""
    if x.dtype != y.dtype or x.shape != y.shape:
        return f"{x.dtype}{list(x.shape)} for {y.dtype}{list(y.shape)}"
    return "" if torch.equal(x.isfinite(), y.isfinite()) else "not finite in other places"
