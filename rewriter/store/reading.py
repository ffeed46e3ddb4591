"""`load`: a recipe checked in whole, then built on a copy of the original model."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rewriter import lowering
from rewriter.base import Layer
from rewriter.capture import Capture
from rewriter.engine import Engine, Options
from rewriter.engine.pipeline import prepare
from rewriter.errors import StoreError, warn
from rewriter.modules.pointwise import Channels
from rewriter.modules.tensors import named_tensors, non_persistent, put_tensor, tensor_like
from rewriter.modules.tree import submodule
from rewriter.planner import MemoryBudget
from rewriter.recipe.edits import Record, edit_from_json, replayed
from rewriter.recipe.names import (
    FORMAT,
    RECIPE,
    allowed_class,
    check_extra,
    class_name,
    digest_of,
    dtype_of,
    known_class,
    pass_of,
)
from rewriter.recipe.recipe import Installed, Recipe, example_from_json
from rewriter.report import Report

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
) -> nn.Module:
    """Rebuilds a saved rewrite on a copy of the original model.

    Every tensor, its dtype, ties and `requires_grad` are as they were saved; devices, hooks and
    train or eval mode are the given model's (the CPU where that is on `meta`).

    Args:
        directory: what `save` wrote.
        model: the original architecture; its weights do not matter, `meta` is fine.
        example_inputs: captures the loaded model again, so that it runs graphs. Without, it runs
            its own Python forward over the rewritten layers, unless a rewritten place is reached
            by a graph only: then the recorded example call is captured again.
        layers: further `Layer` and `Pass` classes that the recipe may name, beside those that ship
            and those that installed packages list as entry points.

    Returns:
        The rewritten model, with the saved report.

    Raises:
        OptionError: `layers` holds something else, or two classes of one name.
        StoreError: not a saved rewrite, truncated, from a newer version, for another model, or it
            names a class that is not on the allow-list.
    """
    if getattr(vars(model).get("_rewriter"), "recipe", None) is not None:
        raise StoreError(
            f"load needs the original {type(model).__name__}, and this one is rewritten already: "
            "build the original again, with any weights"
        )
    check_extra(layers)
    path = pathlib.Path(directory)
    saved = _read(path, layers)
    try:
        root = copy.deepcopy(model)
    except Exception as error:
        raise StoreError(f"{type(model).__name__} cannot be copied: {error}") from error
    with _opened(path / saved.weights) as file:
        filler = _Filler(saved, file)
        old = replayed(named_tensors(root), saved.edits)
        built = {e.name: _build(e, root, old, filler) for e in saved.layers if e.same_as == e.name}
        for entry in saved.layers:
            built[entry.name] = built[entry.same_as]
        in_graph = saved.edits_in_graph or any(e.installed.graph_only for e in saved.layers)
        if example_inputs is None and in_graph:
            example_inputs = example_from_json(saved.example)
        if example_inputs is None:
            engine = Engine(Capture(root, "loaded", []), Options())
        else:
            filler.prepare(root)
            engine = prepare(root, example_inputs)
        engine.replay(saved.edits)
        engine.place(built)
        recipe = Recipe.of(model)
        recipe.edits, recipe.edits_in_graph = list(saved.edits), saved.edits_in_graph
        recipe.example = saved.example
        if saved.memory is not None:
            engine.memory = _planned(saved.memory, engine.capture)
        for entry in saved.layers:
            recipe.installed[entry.name] = entry.installed
            if entry.origin is not None:
                recipe.origins[entry.name] = entry.origin
            for ref in (entry.installed.weight_ref, entry.installed.bias_ref):
                if ref is not None and entry.dtype is not None:
                    recipe.dtypes[ref] = entry.dtype
        engine.finish(saved.report, recipe)
        filler.fill(root)
        if saved.lower:
            engine.options = replace(engine.options, lower=lowering.DEFAULT_RULES)
            engine.lower()
    return root


@dataclass(frozen=True)
class _Entry:
    name: str
    cls: type[nn.Module]
    config: dict[str, Any]
    same_as: str
    installed: Installed
    dtype: torch.dtype | None
    origin: tuple[Any, dict[str, Any]] | None


@dataclass(frozen=True)
class _Saved:
    """A recipe that was read and checked."""

    model: str
    layers: list[_Entry]
    ties: dict[str, str]
    frozen: frozenset[str]
    non_persistent: frozenset[str]
    example: Any
    report: Report
    weights: str
    memory: MemoryBudget | None = None
    lower: bool = True
    edits: tuple[Record, ...] = ()
    edits_in_graph: bool = False


def _planned(budget: MemoryBudget, capture: Capture) -> PlannedTraining:
    """Trains by a plan again, which is made at the first step."""
    from rewriter.planner.apply.training import PlannedTraining  # SciPy: only where it plans

    if not capture.regions:
        warn(
            f"the model was saved with memory_budget ({budget}): pass example_inputs to load, so "
            "that it trains by a plan again"
        )
    return PlannedTraining(budget)


def _budget(data: Any) -> MemoryBudget | None:
    return None if data is None else MemoryBudget(**{str(k): v for k, v in data.items()})


def _read(path: pathlib.Path, extra: Sequence[type]) -> _Saved:
    try:
        document = json.loads((path / RECIPE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} has no {RECIPE}: it was not written by rewriter.save") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path / RECIPE} is not readable: {error}") from error
    if not isinstance(document, dict) or "format" not in document:
        raise StoreError(f"{path / RECIPE} is not a recipe of this package")
    if document["format"] != FORMAT:
        raise StoreError(
            f"{path} has format {document['format']}, this version reads {FORMAT}: use the "
            "version of rewriter that wrote it"
        )
    try:
        weights = path / pathlib.PurePath(document["weights"]).name
        saved = _Saved(
            str(document["model"]),
            [_entry(e, extra) for e in document["layers"]],
            {str(k): str(v) for k, v in document["ties"].items()},
            frozenset(document["frozen"]),
            frozenset(document["non_persistent"]),
            document["example"],
            Report.from_dict(document["report"]),
            weights.name,
            _budget(document.get("memory")),
            bool(document.get("lower", True)),
            tuple(edit_from_json(e) for e in document.get("edits", ())),
            bool(document.get("edits_in_graph")),
        )
        names = {e.name for e in saved.layers if e.same_as == e.name}
        if len({e.name for e in saved.layers}) < len(saved.layers):
            raise ValueError("a layer is listed twice")
        if any(e.same_as not in names for e in saved.layers):
            raise ValueError("a layer is the same as one that is not listed")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path / RECIPE} is damaged: {type(error).__name__}: {error}") from error
    try:
        if digest_of(weights) != document["sha256"]:
            raise StoreError(f"{weights} is truncated or changed: its checksum differs")
    except OSError as error:
        raise StoreError(f"{weights} is not readable: {error}") from error
    return saved


def _entry(entry: Any, extra: Sequence[type]) -> _Entry:
    chain = [(known_class(k, extra, (Layer,)), pass_of(p, extra)) for k, p in entry["chain"]]
    if not chain:
        raise ValueError("a layer that no pass installed")
    for key in ("name", "class", "same_as", "weight", "bias"):
        if not isinstance(entry[key], str) and not (key in ("weight", "bias") and not entry[key]):
            raise TypeError(f"{key} is not a name: {entry[key]!r}")
    installed = Installed(
        entry["weight"] or None,
        entry["bias"] or None,
        bool(entry["transposed"]),
        chain,
        bool(entry["graph_only"]),
        Channels.from_json(entry.get("channels")),
    )
    dtype, origin = entry["dtype"], entry["origin"]
    return _Entry(
        entry["name"],
        allowed_class(entry["class"], extra, (Layer, nn.Linear)),
        dict(entry["config"]),
        entry["same_as"],
        installed,
        None if dtype is None else dtype_of(dtype),
        None if origin is None else (known_class(origin[0], extra, (Layer,)), dict(origin[1])),
    )


def _build(entry: _Entry, root: nn.Module, old: dict[str, Tensor], filler: _Filler) -> nn.Module:
    try:
        layer = entry.cls(**entry.config, device="meta")
    except Exception as error:
        raise StoreError(f"{entry.name}: cannot build {class_name(entry.cls)}: {error}") from error
    site = [old[r] for r in (entry.installed.weight_ref,) if r in old]
    site += [t for k, t in old.items() if k.startswith(f"{entry.name}.")]
    features = [getattr(layer, n, None) for n in ("out_features", "in_features")]
    if entry.installed.weight_ref in old and None not in features:
        weight, channels = site[0], entry.installed.channels
        if channels is not None:
            inside = entry.installed.weight_ref == f"{entry.name}.linear.weight"
            if weight.dim() != (2 if inside else channels.spatial + 2):
                raise StoreError(f"{entry.name} of the recipe is no 1×1 convolution here")
            weight = weight.flatten(1)
        shape = list(weight.shape)[:: -1 if entry.installed.transposed else 1]
        if shape != features:
            raise StoreError(
                f"the recipe rewrites {entry.name} of {features[1]} -> {features[0]} features, "
                f"and {type(root).__name__} has {shape[1]} -> {shape[0]} there: pass the model "
                "that was rewritten"
            )
    layer = entry.installed.fitted(layer)
    device = site[0].device if site and not site[0].is_meta else torch.device("cpu")
    filler.fill(layer, f"{entry.name}.", device)
    return layer


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} is not readable: {error}") from error


class _Filler:
    """Puts saved tensors into modules, one at a time: the file is never in memory as a whole.

    A tensor that fits is overwritten in place, so that whoever else holds it sees the new values;
    another is replaced. Names that shared a tensor when saved share one again.
    """

    def __init__(self, saved: _Saved, file: Any) -> None:
        self.saved = saved
        self.file = file
        self.names = set(file.keys()) | set(saved.ties)
        self.made: dict[str, Tensor] = {}
        self.taken: dict[int, str] = {}

    def fill(self, root: nn.Module, prefix: str = "", device: torch.device | None = None) -> None:
        """Gives every tensor of `root` its saved value.

        Raises:
            StoreError: the tensors of `root` are not those of the file.
        """
        own = {prefix + k: t for k, t in named_tensors(root).items()}
        loose = {prefix + k for k in non_persistent(root)}
        missing = [k for k, t in own.items() if k not in self.names]
        missing = [k for k in missing if k not in loose or own[k].is_meta]
        wanted = {n for n in self.names if n.startswith(prefix)}
        unexpected = [k for k in wanted - set(own) if not self._register(root, k, prefix)]
        if missing or unexpected:
            raise StoreError(
                f"the saved weights, of {self.saved.model}, are not those of "
                f"{prefix.removesuffix('.') or type(root).__name__}: the file lacks "
                f"{sorted(missing)}, the model lacks {sorted(unexpected)}"
            )
        own = {prefix + k: t for k, t in named_tensors(root).items()}
        for key in [k for k in own if k in self.names]:
            self._one(root, key, key.removeprefix(prefix), own[key], device, key in loose)
        for key, tensor in named_tensors(root).items():
            first = self.saved.ties.get(prefix + key, prefix + key)
            if tensor is not self.made.get(first, tensor):
                raise StoreError(
                    f"{key} shares its layer with another one, and did not where it was saved"
                )

    def _one(
        self,
        root: nn.Module,
        key: str,
        name: str,
        old: Tensor,
        device: torch.device | None,
        loose: bool,
    ) -> None:
        first = self.saved.ties.get(key, key)
        made = self.made.get(first)
        if made is None:
            made = self._made(key, first, old, device, loose)
            if isinstance(made, nn.Parameter):
                made.requires_grad_(first not in self.saved.frozen)
            self.made[first] = made
            self.taken[id(made)] = first
        if made is not old:
            put_tensor(root, name, made)

    def _made(
        self, key: str, first: str, old: Tensor, device: torch.device | None, loose: bool
    ) -> Tensor:
        if first not in self.file.keys():  # noqa: SIM118 (not a mapping)
            raise StoreError(f"{key} is tied to {first}, which the file lacks")
        value = self.file.get_tensor(first)
        if value.shape != old.shape and not loose:
            raise StoreError(
                f"{key} has shape {list(value.shape)} where it was saved, {list(old.shape)} here"
            )
        fits = not old.is_meta and (old.dtype, old.shape) == (value.dtype, value.shape)
        if fits and self.taken.get(id(old), first) == first:
            with torch.no_grad():
                old.copy_(value)
            return old
        return tensor_like(value.to(device) if device is not None else value, old, value.dtype)

    def _register(self, root: nn.Module, key: str, prefix: str) -> bool:
        """Makes room for a buffer outside the state_dict that the model only gets in use."""
        owner, _, name = key.removeprefix(prefix).rpartition(".")
        if key not in self.saved.non_persistent:
            return False
        holder = submodule(root, owner)
        if holder is None:
            return False
        value = self.file.get_tensor(self.saved.ties.get(key, key))
        holder.register_buffer(name, torch.empty_like(value), persistent=False)
        return True

    def prepare(self, root: nn.Module) -> None:
        """Gives a model that will be captured again data everywhere: what was saved under the same
        name, else zeros where it has none, in the dtype it was rewritten in."""
        dtypes = {
            ref: e.dtype
            for e in self.saved.layers
            for ref in (e.installed.weight_ref, e.installed.bias_ref)
            if ref is not None
        }
        made: dict[int, Tensor] = {}
        for key, old in named_tensors(root).items():
            if id(old) not in made:
                first = self.saved.ties.get(key, key)
                value = old
                if first in self.file.keys():  # noqa: SIM118 (not a mapping)
                    value = self.file.get_tensor(first)
                if value.is_meta or value.shape != old.shape:
                    value = torch.zeros(old.shape, dtype=old.dtype) if old.is_meta else old
                made[id(old)] = tensor_like(value, old, dtypes.get(key) or value.dtype)
            put_tensor(root, key, made[id(old)])
