"""`load`: a recipe checked in whole, then built on a copy of the original model."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewriter import lowering
from rewriter.capture import Capture
from rewriter.engine import Engine, Options
from rewriter.engine.pipeline import prepare
from rewriter.errors import PATH, StoreError, of_type, warn
from rewriter.lowering import Verdicts
from rewriter.modules.paths import path_of
from rewriter.modules.tensors import named_tensors, tell_replaced
from rewriter.planner import MemoryBudget
from rewriter.recipe.edits import replayed
from rewriter.recipe.likeness import differences
from rewriter.recipe.names import check_extra, class_name
from rewriter.recipe.recipe import Recipe, example_from_json
from rewriter.store.document import Entry, Saved, check_config, read
from rewriter.store.files import version_of
from rewriter.store.filling import Filler, Weights, opened_weights, room_for

if TYPE_CHECKING:
    from rewriter.planner.apply.training import PlannedTraining

__all__ = [
    "load",
]


def load(
    directory: str | os.PathLike[str],
    model: nn.Module,
    *,
    example_inputs: Any = None,
    layers: Sequence[type] = (),
    capture_seconds: float = 60.0,
) -> nn.Module:
    """Rebuilds a saved rewrite on a copy of the original model.

    Every tensor, its dtype, ties and `requires_grad` are as they were saved; devices, hooks and
    train or eval mode are the given model's (the CPU where that is on `meta`).

    Args:
        directory: what `save` wrote; it may come from anybody. Only classes on the allow-list are
            built, from figures that the weights file bears out, and nothing is unpickled. Others
            may be saving there meanwhile: an old or a new save is loaded, whole.
        model: the original architecture; its weights do not matter, `meta` is fine.
        example_inputs: captures the loaded model again at once. Without, it is captured at its
            first call, or by the recorded example call where a rewritten place is reached by a
            graph only. Fused ops (lowering) run where they ran in the saved model, so that results
            are the same bits on the same machine; places that the saved model never came to are
            decided anew. A call that cannot be captured runs Python, and lowering rules of one's
            own are not saved: there results are equal up to rounding.
        layers: further `Layer` and `Pass` classes that the recipe may name, beside those that ship
            and those that installed packages list as entry points.
        capture_seconds: as of `rewrite`, where the model is captured at once.

    Returns:
        The rewritten model, with the saved report. A warning says where its classes, or a `forward`
        of your own, are not those of the model that was saved.

    Raises:
        OptionError: `directory` is no path, or `model` no module; `layers` holds something else, or
            two classes of one name; `capture_seconds` is no number above 0.
        StoreError: not a saved rewrite, truncated, from a newer version, for another model, or it
            names a class that is not on the allow-list.
    """
    call = "load(directory, model)"
    of_type(call, "directory", directory, PATH, "the path of a saved rewrite")
    of_type(call, "model", model, nn.Module, "the original model, an nn.Module")
    if getattr(vars(model).get("_rewriter"), "recipe", None) is not None:
        raise StoreError(
            f"load needs the original {type(model).__name__}, and this one is rewritten already: "
            "build the original again, with any weights"
        )
    check_extra(layers)
    options = Options(capture_seconds=capture_seconds)
    with _opened(path_of(directory, "directory"), layers, room_for(model)) as (saved, weights):
        try:
            root = copy.deepcopy(model)
        except Exception as error:
            raise StoreError(f"{type(model).__name__} cannot be copied: {error}") from error
        filler = Filler(saved, weights)
        old = replayed(named_tensors(root), saved.edits)
        built = {e.name: _build(e, root, old, filler) for e in saved.layers if e.same_as == e.name}
        for entry in saved.layers:
            built[entry.name] = built[entry.same_as]
        engine = _engine(saved, root, example_inputs, filler, options)
        try:
            engine.replay(saved.edits)
            engine.place(built)
            for name in engine.capture.pending:
                root.get_submodule(name)
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise StoreError(
                f"the recipe does not fit {type(model).__name__}: {type(error).__name__}: {error}; "
                "pass the model that was rewritten"
            ) from error
        filler.fill(root)
        tell_replaced(root)
        filler.give_extra_states(root)
        if saved.memory is not None:
            engine.memory = _planned(saved.memory, engine.capture)
        if saved.refuses is None and saved.in_graph and engine.capture.regions:
            engine.outputs = engine.capture.outputs()  # to find out
        engine.lower_again(_verdicts(saved, engine.capture))
        recipe = _recipe(saved, model)
        engine.finish(saved.report, recipe)
    if other := differences(saved.likeness, recipe.likeness):
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        warn(
            f"{directory} was saved of another model than the {type(model).__name__} it is loaded "
            f"into, though the tensors fit ({'; '.join(other[:3])}{more}): what it computes may "
            "be something else. Pass the model that was rewritten"
        )
    return root


def _verdicts(saved: Saved, capture: Capture) -> dict[str, Verdicts]:
    """Where fused ops ran, per module that is captured or will be."""
    rules = lowering.DEFAULT_RULES
    known = {str(rule.pattern) for rule in rules}
    every = [p for places in saved.lowering.values() for p, on in (places or {}).items() if on]
    own = sorted({p.partition(" at ")[0] for p in every} - known)
    if own:
        warn(
            f"the model was saved with lowering rules of its own ({'; '.join(own)}), which a save "
            "does not hold: its plain graph runs there, equal up to rounding"
        )
    # a module that had no graph of its own is lowered if others are
    unlowered = all(p is None for p in saved.lowering.values())
    default: dict[str, bool] | None = None if unlowered else {}
    captured = {r.prefix: default for r in capture.regions if r.hosted}
    if capture.regions:  # what else the saved model captured is a part of these, or Python now
        wanted = {name: saved.lowering.get(name, default) for name in captured}
    else:
        wanted = saved.lowering
    return {n: Verdicts(rules, dict(p)) for n, p in wanted.items() if p is not None}


@contextlib.contextmanager
def _opened(
    path: pathlib.Path, extra: Sequence[type], room: int
) -> Iterator[tuple[Saved, Weights]]:
    """Recipe and weights of one save, though others may be saving there."""
    with contextlib.ExitStack() as stack:
        for tries_left in reversed(range(_TRIES)):
            version = version_of(path)
            saved = read(path, extra)
            try:
                weights = stack.enter_context(opened_weights(path, saved, room))
                break
            except StoreError:
                # another save may have taken this one's place, and its weights with it
                if version_of(path) == version or not tries_left:
                    raise
        yield saved, weights


_TRIES = 100


def _engine(
    saved: Saved, root: nn.Module, example_inputs: Any, filler: Filler, options: Options
) -> Engine:
    """The engine for the loaded model, captured on the example inputs or the recorded ones."""
    if example_inputs is not None:
        filler.prepare(root)
        tell_replaced(root)
        return prepare(root, example_inputs, options)
    if not saved.in_graph:
        return Engine(Capture(root, "loaded", [], pending=tuple(saved.lowering)), options)
    example = example_from_json(saved.example)
    filler.prepare(root)
    tell_replaced(root)
    try:
        return prepare(root, example, options)
    except Exception as error:
        raise StoreError(
            f"{type(root).__name__} cannot be captured on the call that the recipe recorded; pass "
            f"example_inputs to load it ({type(error).__name__}: {error})"
        ) from error


def _recipe(saved: Saved, model: nn.Module) -> Recipe:
    """What a save of the loaded model will say."""
    recipe = Recipe.of(model)
    recipe.edits, recipe.edits_in_graph = list(saved.edits), saved.edits_in_graph
    recipe.example, recipe.refuses = saved.example, saved.refuses
    recipe.lower = any(places is not None for places in saved.lowering.values())
    for entry in saved.layers:
        recipe.installed[entry.name] = entry.installed
        if entry.origin is not None and entry.name not in recipe.origins:
            raise StoreError(
                f"the recipe says that {entry.name} was a {entry.origin[0]}, and "
                f"{type(model).__name__} has none there: pass the model that was rewritten"
            )
        for ref in (entry.installed.weight_ref, entry.installed.bias_ref):
            if ref is not None and entry.dtype is not None:
                recipe.dtypes[ref] = entry.dtype
    return recipe


def _planned(budget: MemoryBudget, capture: Capture) -> PlannedTraining:
    """Trains by a plan again, which is made at the first step."""
    from rewriter.planner.apply.training import PlannedTraining  # SciPy: only where it plans

    if not capture.regions:
        warn(
            f"the model was saved with memory_budget ({budget}): pass example_inputs to load, so "
            "that it trains by a plan again"
        )
    return PlannedTraining(budget)


def _build(entry: Entry, root: nn.Module, old: dict[str, Tensor], filler: Filler) -> nn.Module:
    prefix, channels = f"{entry.name}.", entry.installed.channels
    within = prefix if channels is None else f"{prefix}linear."
    shapes = {n: filler.shape(n) for n in filler.names if n.startswith(within)}
    check_config(entry, {n.removeprefix(within): s for n, s in shapes.items()})
    try:
        layer = entry.cls(**entry.config, device="meta")
    except Exception as error:
        raise StoreError(f"{entry.name}: cannot build {class_name(entry.cls)}: {error}") from error
    ref, transposed = entry.installed.weight_ref, entry.installed.transposed
    if ref is not None and ref not in old:
        raise StoreError(
            f"the recipe rewrites {entry.name}, which {type(root).__name__} does not have: there "
            f"is no {ref}; pass the model that was rewritten"
        )
    features = [getattr(layer, n, None) for n in ("out_features", "in_features")]
    whole = [] if ref is None else list(old[ref].shape)
    if channels is not None and ref is not None:
        if len(whole) != (2 if ref == f"{within}weight" else channels.spatial + 2):
            raise StoreError(f"{entry.name} of the recipe is no 1×1 convolution here")
        whole = [whole[0], math.prod(whole[1:])]
    shape = whole[:: -1 if transposed else 1]
    if ref is not None and None not in features and shape != features:
        raise StoreError(
            f"the recipe rewrites {entry.name} of {features[1]} -> {features[0]} features, and "
            f"{type(root).__name__} has {' -> '.join(map(str, shape[::-1]))} there: pass the model "
            "that was rewritten"
        )
    site = [] if ref is None else [old[ref]]
    site += [t for k, t in old.items() if k.startswith(prefix)]
    layer = entry.installed.fitted(layer)
    device = site[0].device if site and not site[0].is_meta else torch.device("cpu")
    filler.fill(layer, prefix, device)
    return layer
