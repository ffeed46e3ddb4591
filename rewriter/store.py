"""Saving and loading: one safetensors file and one JSON recipe, no pickle.

The recipe names the layers a rewrite installed, by class and constructor arguments; only classes
on the allow-list (`rewriter.passes`, `nn.Linear`, and what the caller hands in) are built. The
recipe is replaced last and names its weights file by content, so a crash leaves the old save whole.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewriter.base import Layer, Pass, Replacement
from rewriter.errors import OptionError, StoreError
from rewriter.hosted import RewrittenModule, State, host, original_class
from rewriter.report import Report
from rewriter.sites import LINEAR, MLP, Site

__all__ = ["Installed", "Recipe", "example_to_json", "load", "load_original", "save"]

FORMAT = 1
RECIPE = "recipe.json"


@dataclass
class Installed:
    """One rewritten place: where its original tensors were, and the passes it went through."""

    weight_ref: str | None
    bias_ref: str | None
    transposed: bool
    chain: list[tuple[Any, Pass | None]] = field(default_factory=list)
    """Pairs (kind of site, pass); a pass is None where a loaded recipe could not rebuild it."""
    graph_only: bool = False


@dataclass
class Recipe:
    """What it takes to build the rewritten model again from the original one."""

    installed: dict[str, Installed] = field(default_factory=dict)
    example: Any = None
    """The example call as JSON (shapes and constants), or None where it has no JSON form."""


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes a rewritten model to `directory`: `weights-….safetensors` and `recipe.json`.

    Raises:
        StoreError: the model was not made by `rewrite`, an installed layer cannot be rebuilt from
            JSON, or the directory cannot be written.
    """
    recipe, report = _recipe_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = []
    for fqn, installed in recipe.installed.items():
        layer = modules[fqn]
        layers.append({
            "name": fqn,
            "class": _class_name(layer),
            "config": _config(layer, fqn),
            "same_as": next((n for n in recipe.installed if modules[n] is layer), fqn),
            "frozen": [n for n, p in layer.named_parameters() if not p.requires_grad],
            "weight": installed.weight_ref,
            "bias": installed.bias_ref,
            "transposed": installed.transposed,
            "graph_only": installed.graph_only,
            "chain": [[_kind_name(k), _pass_spec(p)] for k, p in installed.chain],
        })  # fmt: skip
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            raise StoreError(f"{name} is on meta: there is nothing to save; load weights first")
        first = seen.setdefault(id(tensor), name)
        if first != name:
            ties[name] = first
        else:
            tensors[name] = tensor.detach().contiguous().cpu().clone()
    document = {
        "format": FORMAT,
        "model": f"{original_class(model).__module__}.{original_class(model).__qualname__}",
        "layers": layers,
        "ties": ties,
        "example": recipe.example,
        "report": report.to_dict(),
    }
    path = pathlib.Path(directory)
    temporary = path / f".{uuid.uuid4().hex}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"format": "pt"})
        digest = _digest(temporary)
        weights = f"weights-{digest[:16]}.safetensors"
        document["weights"], document["sha256"] = weights, digest
        os.replace(temporary, path / weights)
        temporary.write_text(json.dumps(document, indent=1))
        os.replace(temporary, path / RECIPE)
        for stale in path.glob("weights-*.safetensors"):
            if stale.name != weights:
                stale.unlink()
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(
    directory: str | os.PathLike[str],
    model: nn.Module,
    *,
    example_inputs: Any = None,
    layers: Sequence[type] = (),
) -> nn.Module:
    """Rebuilds a saved rewrite on a copy of the original model.

    Args:
        directory: what `save` wrote.
        model: the original architecture; its weights do not matter, `meta` is fine.
        example_inputs: captures the loaded model again, so that it runs graphs. Without, it runs
            its own Python forward over the rewritten layers, unless a rewritten place is reached
            by a graph only: then the recorded example call is captured again.
        layers: further `Layer` and `Pass` classes that the recipe may name.

    Returns:
        The rewritten model, with the saved report.

    Raises:
        StoreError: not a saved rewrite, truncated, from a newer version, for another model, or it
            names a class that is not on the allow-list.
    """
    document, tensors = _read(pathlib.Path(directory))
    root = copy.deepcopy(model)
    built: dict[str, nn.Module] = {}
    recipe = Recipe(example=document["example"])
    for entry in document["layers"]:
        name = entry["name"]
        if entry["same_as"] == name:
            built[name] = _build(entry, tensors, layers)
        chain = [(_kind(k, layers), _pass_of(p, layers)) for k, p in entry["chain"]]
        recipe.installed[name] = Installed(
            entry["weight"], entry["bias"], entry["transposed"], chain, entry["graph_only"]
        )
    for entry in document["layers"]:
        built[entry["name"]] = built[entry["same_as"]]
    if example_inputs is None and any(i.graph_only for i in recipe.installed.values()):
        if recipe.example is None:
            raise StoreError("this rewrite lives in a graph: pass example_inputs to load it")
        example_inputs = _from_json(recipe.example)
    report = Report.from_dict(document["report"])
    if example_inputs is None:
        for name, layer in built.items():
            _place(root, name, layer)
        host(root, State(report=report, recipe=recipe), root=True)
    else:
        _capture_and_place(root, built, recipe, report, example_inputs)
    _fill(root, tensors, document["ties"], set(built))
    return root


def load_original(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Puts a checkpoint of the original model through the same rewrite, in place.

    Args:
        model: a rewritten model.
        state_dict: of the original, un-rewritten model; any dtype and device.

    Raises:
        StoreError: keys are missing or left over, or a pass now refuses a weight it took before.
    """
    recipe, _ = _recipe_of(model)
    given = dict(state_dict)
    used: set[str] = set()
    renewed: dict[str, dict[str, Tensor]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    missing: list[str] = []
    for fqn, installed in recipe.installed.items():
        references = [r for r in (installed.weight_ref, installed.bias_ref) if r is not None]
        absent = [r for r in references if r not in given]
        if absent or installed.weight_ref is None:
            missing += absent
            continue
        used.update(references)
        renewed[fqn] = _again(fqn, installed, given, modules[fqn])
    own = model.state_dict(keep_vars=True)
    plain = {k for k in own if not any(k.startswith(f"{f}.") for f in recipe.installed)}
    missing += [k for k in plain if k not in given and k not in _tied_names(own, given)]
    left = set(given) - used - plain
    if missing or left:
        raise StoreError(
            f"the state_dict does not fit the original model: missing {sorted(missing)}, "
            f"unexpected {sorted(left)}"
        )
    wrong = [k for k in plain if k in given and given[k].shape != own[k].shape]
    if wrong:
        raise StoreError(f"the state_dict has tensors of other shapes: {sorted(wrong)}")
    with torch.no_grad():
        for fqn, state in renewed.items():
            modules[fqn].load_state_dict(state)
        for key in plain:
            if key in given:
                own[key].copy_(given[key])


def _tied_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> set[str]:
    """Keys that a checkpoint may leave out because it has the same tensor under another name."""
    present = {id(own[k]) for k in given if k in own}
    return {k for k, t in own.items() if id(t) in present}


def _again(
    fqn: str, installed: Installed, given: Mapping[str, Tensor], target: nn.Module
) -> dict[str, Tensor]:
    assert installed.weight_ref is not None
    reference = next(iter(target.state_dict().values()))
    weight = given[installed.weight_ref].to(reference.device)
    if installed.transposed:
        weight = weight.t().contiguous()
    bias = None if installed.bias_ref is None else given[installed.bias_ref].to(weight.device)
    out_features, in_features = weight.shape
    layer: nn.Module = nn.Linear(in_features, out_features, bias is not None, device="meta")
    layer._parameters["weight"] = nn.Parameter(weight)
    if bias is not None:
        layer._parameters["bias"] = nn.Parameter(bias)
    for kind, rewrite in installed.chain:
        if rewrite is None:
            raise StoreError(f"{fqn}: a pass of its recipe cannot be rebuilt; rewrite again")
        own = kind if isinstance(kind, type) else LINEAR
        site = Site.of(layer, fqn.rpartition(".")[2], own)
        if kind == MLP:
            parts = {"down": site}
            site = Site(MLP, site.fqn, site.root, (), site.weight_ref, site.bias_ref, False, parts)
        answer = rewrite.propose(site)
        if not isinstance(answer, Replacement):
            raise StoreError(f"{fqn}: {rewrite} refuses the new weights: {answer.reason}")
        layer = answer.layer
    state = layer.state_dict()
    shapes = {k: t.shape for k, t in target.state_dict().items()}
    if {k: t.shape for k, t in state.items()} != shapes:
        raise StoreError(f"{fqn}: the new weights have another shape than the rewritten layer")
    return state


# reading


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        document = json.loads((path / RECIPE).read_text())
    except FileNotFoundError:
        raise StoreError(f"{path} has no {RECIPE}: it was not written by rewriter.save") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path / RECIPE} is not readable: {error}") from error
    keys = {"format", "layers", "ties", "example", "report", "weights", "sha256"}
    if not isinstance(document, dict) or not keys <= set(document):
        raise StoreError(f"{path / RECIPE} is not a recipe of this package")
    if document["format"] != FORMAT:
        raise StoreError(
            f"{path} has format {document['format']}, this version reads {FORMAT}: use the "
            "version of rewriter that wrote it"
        )
    weights = path / pathlib.PurePath(document["weights"]).name
    try:
        if _digest(weights) != document["sha256"]:
            raise StoreError(f"{weights} is truncated or changed: its checksum differs")
        return document, load_file(weights)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{weights} is not readable: {error}") from error


def _build(entry: Any, tensors: Mapping[str, Tensor], extra: Sequence[type]) -> nn.Module:
    cls = _allowed(entry["class"], extra, (Layer, nn.Linear))
    try:
        layer: nn.Module = cls(**entry["config"], device="meta")
    except Exception as error:
        raise StoreError(f"{entry['name']}: cannot build {entry['class']}: {error}") from error
    own = {k: tensors.get(f"{entry['name']}.{k}") for k in layer.state_dict()}
    absent = [k for k, t in own.items() if t is None]
    if absent:
        raise StoreError(f"{entry['name']}: the weights file lacks {absent}")
    layer.load_state_dict(own, assign=True)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in entry["frozen"])
    return layer


def _allowed(name: str, extra: Sequence[type], bases: tuple[type, ...]) -> Any:
    """The class of this name, if it may be built; nothing else is ever imported."""
    for cls in extra:
        if f"{cls.__module__}.{cls.__qualname__}" == name:
            return cls
    module, _, attribute = name.rpartition(".")
    if name == "torch.nn.modules.linear.Linear":
        return nn.Linear
    if module.startswith("rewriter.passes."):
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            found = None
        if isinstance(found, type) and issubclass(found, bases):
            return found
    raise StoreError(
        f"the recipe names {name}, which is not on the allow-list: pass layers=[{attribute}] to "
        "load it if you trust where the file comes from"
    )


def _place(root: nn.Module, name: str, layer: nn.Module) -> None:
    try:
        old = root.get_submodule(name)
    except AttributeError:
        raise StoreError(
            f"the recipe rewrites {name}, which {type(root).__name__} does not have: pass the "
            "model that was rewritten"
        ) from None
    layer.train(old.training)
    parameter = next(old.parameters(), None)
    if parameter is not None and not parameter.is_meta:
        layer.to(parameter.device)
    for alias, module in list(root.named_modules(remove_duplicate=False)):
        if module is old:
            root.set_submodule(alias, layer)


def _capture_and_place(
    root: nn.Module, built: dict[str, nn.Module], recipe: Recipe, report: Report, inputs: Any
) -> None:
    from rewriter.api import prepare

    engine = prepare(root, inputs)
    engine.place(built)
    engine.finish(report, recipe)


def _fill(
    root: nn.Module, tensors: Mapping[str, Tensor], ties: Mapping[str, str], built: set[str]
) -> None:
    """Copies the saved weights of everything that was not rewritten."""
    own = root.state_dict(keep_vars=True)
    expected = set(tensors) | set(ties)
    if set(own) != expected:
        raise StoreError(
            f"the saved weights are not those of {type(root).__name__}: missing "
            f"{sorted(set(own) - expected)}, unexpected {sorted(expected - set(own))}"
        )
    with torch.no_grad():
        renewed: dict[int, nn.Parameter | Tensor] = {}
        for key, tensor in own.items():
            saved = tensors[ties.get(key, key)]
            if any(key.startswith(f"{b}.") for b in built):
                continue
            if saved.shape != tensor.shape:
                raise StoreError(f"{key} has shape {list(saved.shape)}, not {list(tensor.shape)}")
            if not tensor.is_meta and tensor.dtype == saved.dtype:
                tensor.copy_(saved)
                continue
            owner, _, name = key.rpartition(".")
            holder = root.get_submodule(owner)
            if isinstance(tensor, nn.Parameter):
                saved = nn.Parameter(saved, requires_grad=tensor.requires_grad)
                holder._parameters[name] = renewed.setdefault(id(tensor), saved)  # type: ignore[assignment]
            else:
                holder._buffers[name] = renewed.setdefault(id(tensor), saved)


# JSON forms


def example_to_json(arguments: Mapping[str, Any]) -> Any:
    """The example call as JSON: tensors by shape and dtype; None where something has no form."""
    if any("[" in name for name in arguments):  # `*args` cannot be given back by name
        return None
    try:
        return {name: _to_json(value) for name, value in arguments.items()}
    except TypeError:
        return None


def _to_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_to_json(v) for v in value]}
    if type(value) is dict and all(isinstance(k, str) for k in value):
        return {"dict": {k: _to_json(v) for k, v in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(type(value).__name__)


def _from_json(data: Mapping[str, Any]) -> dict[str, Any]:
    def build(item: Any) -> Any:
        if "tensor" in item:
            return torch.zeros(item["tensor"], dtype=getattr(torch, item["dtype"]))
        if "list" in item:
            return [build(v) for v in item["list"]]
        if "tuple" in item:
            return tuple(build(v) for v in item["tuple"])
        if "dict" in item:
            return {k: build(v) for k, v in item["dict"].items()}
        return item["value"]

    return {k: build(v) for k, v in data.items()}


def _recipe_of(model: nn.Module) -> tuple[Recipe, Report]:
    state = vars(model).get("_rewriter")
    if not isinstance(model, RewrittenModule) or state is None or state.recipe is None:
        raise StoreError(
            f"{type(model).__name__} was not made by rewriter.rewrite or rewriter.load"
        )
    return state.recipe, state.report


def _class_name(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _config(layer: nn.Module, fqn: str) -> dict[str, Any]:
    if isinstance(layer, Layer):
        config = dict(layer.config())
    elif type(layer) is nn.Linear:
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
    except TypeError as error:
        raise StoreError(f"{fqn}: {type(layer).__name__}.config() is not JSON: {error}") from None
    return config


def _kind_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _kind(name: str, extra: Sequence[type]) -> Any:
    return name if "." not in name else _allowed(name, extra, (Layer,))


def _pass_spec(rewrite: Pass | None) -> Any:
    if rewrite is None:
        return None
    options = {f.name: getattr(rewrite, f.name) for f in fields(rewrite) if f.name != "where"}
    try:
        json.dumps(options)
    except TypeError:
        return None
    return {"class": f"{type(rewrite).__module__}.{type(rewrite).__qualname__}", "options": options}


def _pass_of(spec: Any, extra: Sequence[type]) -> Pass | None:
    """The pass again; None where its class is unknown here, which only `load_original` needs."""
    if spec is None:
        return None
    try:
        rewrite = _allowed(spec["class"], extra, (Pass,))(**spec["options"])
    except (StoreError, OptionError, TypeError):
        return None
    assert isinstance(rewrite, Pass)
    return rewrite


def _digest(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
