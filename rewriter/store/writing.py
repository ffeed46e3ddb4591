"""`save`: one safetensors file and one JSON recipe, replaced atomically."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rewriter.base import Layer
from rewriter.capture.hosted import State, original_class
from rewriter.errors import PATH, StoreError, of_type
from rewriter.layer import DenseWeight
from rewriter.modules.paths import path_of
from rewriter.modules.pointwise import inner
from rewriter.modules.tensors import (
    extra_states,
    gathered,
    is_sharded,
    non_persistent,
    unique_tensors,
)
from rewriter.modules.tree import own_class
from rewriter.recipe.edits import edit_to_json
from rewriter.recipe.names import (
    FORMAT,
    RECIPE,
    class_name,
    digest_of,
    dtype_name,
    kind_path,
    pass_spec,
)
from rewriter.recipe.recipe import Recipe, recipe_of
from rewriter.store.files import LARGEST_RECIPE, collect, drafted, locked, named_weights, put_file

__all__ = [
    "save",
]


def _on_one_rank(writes: Callable[..., None]) -> Callable[..., None]:
    """Gathers the tensors of a sharded model on all processes, and writes on the first."""

    @functools.wraps(writes)
    def save(
        model: nn.Module,
        directory: str | os.PathLike[str],
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        call = "save(model, directory)"
        of_type(call, "model", model, nn.Module, "a rewritten model")
        of_type(call, "directory", directory, PATH, "a path")
        of_type(call, "state_dict", state_dict, (Mapping, type(None)), "tensors by name, or None")
        if state_dict is not None or not is_sharded(model):
            writes(model, directory, state_dict)
            return
        whole = gathered(model)
        try:
            if torch.distributed.get_rank() == 0:
                writes(model, directory, whole)
        finally:
            torch.distributed.barrier()

    return save


@_on_one_rank
def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a rewritten model to `directory`: `weights-….safetensors` and `recipe.json`.

    Holds every parameter and buffer (also those that a state_dict leaves out), which parameters
    are tied or frozen, and the report. An earlier save in the directory is replaced as a whole or,
    if anything fails, not at all; savers in several processes take turns. What is taken away there
    are weights that no recipe names any more and what killed savers left, by our own names alone.
    All processes that share a sharded model (FSDP2, tensor parallel) call it together, and the
    first one writes.

    Args:
        model: a rewritten model.
        directory: where to.
        state_dict: what to write in place of the model's own tensors of these names, such as one
            that was gathered from all processes.

    Raises:
        OptionError: an argument is of another type.
        StoreError: the model was not made by `rewrite`, an installed layer cannot be rebuilt from
            JSON, extra state is no tensor, or the directory cannot be written.
    """
    recipe, report = recipe_of(model)
    tensors, ties = unique_tensors(model, state_dict)
    # safetensors has no form for these but pairs of real numbers
    pairs = {k: t for k, t in tensors.items() if t.dtype in (torch.complex128, torch.complex32)}
    tensors |= {k: torch.view_as_real(t) for k, t in pairs.items()}
    document: dict[str, Any] = {
        "format": FORMAT,
        "model": class_name(original_class(own_class(model))),
        "likeness": recipe.likeness,
        "layers": _entries(model, recipe),
        "edits": [edit_to_json(e) for e in recipe.edits],
        "edits_in_graph": recipe.edits_in_graph,
        "ties": ties,
        "frozen": sorted(n for n, p in model.named_parameters() if not p.requires_grad),
        "non_persistent": sorted(non_persistent(model)),
        "extra_state": sorted(extra_states(model)),
        "complex": {k: dtype_name(t.dtype) for k, t in pairs.items()},
        "example": recipe.example,
        "memory": None if recipe.memory is None else dataclasses.asdict(recipe.memory),
        "lower": recipe.lower,
        "lowering": _lowering(model),
        "refuses": recipe.refuses,
        # the calls so far are those of this process
        "report": {k: v for k, v in report.to_dict().items() if k != "forms"},
    }
    path = path_of(directory, "directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with locked(path) as alone:
            _write(path, alone, tensors, document)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise StoreError(f"cannot write {path}: {error}") from error


def _write(
    path: pathlib.Path, alone: bool, tensors: dict[str, Tensor], document: dict[str, Any]
) -> None:
    """Weights first, then the recipe that names them, then what nothing names goes.

    Raises:
        StoreError: something else is here, or the recipe is larger than `load` reads.
        OSError, SafetensorError: it cannot be written; what was here is as it was.
    """
    named_weights(path)  # a save, or nothing
    fresh: pathlib.Path | None = None
    try:
        with drafted(path) as draft:
            try:
                save_file(tensors, draft, metadata={"format": "pt"})
            except KeyError as error:
                raise StoreError(f"safetensors files hold no tensors of {error}") from None
            with open(draft, "rb") as file:
                digest = digest_of(file)
            weights = path / f"weights-{digest[:16]}.safetensors"
            fresh = None if os.path.lexists(weights) else weights
            put_file(draft, weights)
        text = json.dumps({**document, "weights": weights.name, "sha256": digest}, indent=1)
        if len(text) > LARGEST_RECIPE:
            raise StoreError(
                f"cannot write {path}: the recipe takes {len(text) >> 20} MiB, and load reads "
                f"{LARGEST_RECIPE >> 20}: save without model.report's formulas"
            )
        with drafted(path) as draft:
            draft.write_text(text, encoding="utf-8")
            put_file(draft, path / RECIPE)
    except BaseException:
        # an interrupt may have come after all was done
        if fresh is not None and alone and named_weights(path) != fresh.name:
            with contextlib.suppress(OSError):  # left over, and harmless
                fresh.unlink(missing_ok=True)
        raise
    if alone:
        collect(path, weights.name)


def _lowering(model: nn.Module) -> dict[str, dict[str, bool] | None]:
    """Per module that runs graphs, where fused ops run there; None where none do."""
    states = {n: vars(m).get("_rewriter") for n, m in model.named_modules()}
    return {
        name: None if state.verdicts is None else state.verdicts.places
        for name, state in states.items()
        if isinstance(state, State) and (state.forms or state.capturer is not None)
    }


def _entries(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    entries = []
    for fqn, installed in recipe.installed.items():
        layer = modules.get(fqn)
        if layer is None:
            raise StoreError(f"{fqn} was rewritten and is gone: the model was changed since")
        dtype = recipe.dtypes.get(installed.weight_ref or "")
        origin = recipe.origins.get(fqn)
        entries.append({
            "name": fqn,
            "class": class_name(_class(inner(layer))),
            "config": _config(inner(layer), fqn),
            "channels": None if installed.channels is None else installed.channels.to_json(),
            "same_as": next(n for n in recipe.installed if modules.get(n) is layer),
            "weight": installed.weight_ref,
            "bias": installed.bias_ref,
            "transposed": installed.transposed,
            "graph_only": installed.graph_only,
            "dtype": None if dtype is None else dtype_name(dtype),
            "origin": None if origin is None else [kind_path(origin[0]), origin[1]],
            "chain": [[kind_path(k), pass_spec(p)] for k, p in installed.chain],
        })  # fmt: skip
    return entries


def _class(layer: nn.Module) -> type[nn.Module]:
    return nn.Linear if isinstance(layer, DenseWeight) else own_class(layer)


def _config(layer: nn.Module, fqn: str) -> dict[str, Any]:
    if isinstance(layer, Layer):
        config = dict(layer.config())
    elif isinstance(layer, nn.Linear) and _class(layer) is nn.Linear:
        config = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
        }
    else:
        raise StoreError(
            f"{fqn} is a {type(layer).__name__}: only a rewriter.base.Layer or an nn.Linear can be "
            "rebuilt without pickle"
        )
    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{fqn}: {type(layer).__name__}.config() is not JSON: {error}") from None
    return config
