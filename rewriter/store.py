"""Saving and loading: one safetensors file and one JSON recipe, no pickle.

The recipe names the layers a rewrite installed, by class and constructor arguments; only classes
on the allow-list (`rewriter.passes`, `nn.Linear`, and what the caller hands in) are built. The
recipe is replaced last and names its weights file by content, so a crash leaves the old save whole.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rewriter.base import Layer, Pass, Replacement
from rewriter.errors import StoreError
from rewriter.hosted import RewrittenModule, original_class
from rewriter.rehost import CONSTANT
from rewriter.report import Report
from rewriter.sites import LINEAR, MLP, Site

__all__ = ["Installed", "Recipe", "example_to_json", "load", "load_original", "save"]

FORMAT = 1
RECIPE = "recipe.json"


@dataclass
class Installed:
    """One rewritten place: where its original tensors were, and the passes it went through.

    Args:
        weight_ref, bias_ref: names of the original tensors; None where the site had none.
        transposed: the original weight is stored [in, out].
        chain: pairs (kind of site, pass), in order. From a loaded recipe, what is not on the
            allow-list stays JSON: the name of a class, the class and options of a pass.
        graph_only: the Python forward does not go through the new layer.
    """

    weight_ref: str | None
    bias_ref: str | None
    transposed: bool
    chain: list[tuple[Any, Any]] = field(default_factory=list)
    graph_only: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # `where` is often a lambda, which does not pickle, and has done its work
        chain = [
            (k, replace(p, where=None) if getattr(p, "where", None) is not None else p)
            for k, p in self.chain
        ]
        return {**vars(self), "chain": chain}


@dataclass
class Recipe:
    """What it takes to build the rewritten model again from the original one.

    Args:
        installed: the rewritten places by name.
        example: the example call as JSON (shapes and constants); None where it has no JSON form.
        dtypes: of the original's tensors.
        origins: class and constructor arguments of the `Layer`s that the original had.
    """

    installed: dict[str, Installed] = field(default_factory=dict)
    example: Any = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    origins: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, root: nn.Module) -> Recipe:
        """The recipe that rewrites nothing of this model yet."""
        dtypes = {k: t.dtype for k, t in _state(root).items()}
        named = root.named_modules(remove_duplicate=False)
        origins = {n: (type(m), dict(m.config())) for n, m in named if isinstance(m, Layer)}
        return cls(dtypes=dtypes, origins=origins)


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes a rewritten model to `directory`: `weights-….safetensors` and `recipe.json`.

    Holds every parameter and buffer (also those that a state_dict leaves out), which parameters
    are tied or frozen, and the report. An earlier save in the directory is replaced as a whole or,
    if anything fails, not at all.

    Raises:
        StoreError: the model was not made by `rewrite`, an installed layer cannot be rebuilt from
            JSON, or the directory cannot be written.
    """
    recipe, report = _recipe_of(model)
    tensors, ties = _unique(model)
    document: dict[str, Any] = {
        "format": FORMAT,
        "model": _class_name(original_class(model)),
        "layers": _entries(model, recipe),
        "ties": ties,
        "frozen": sorted(n for n, p in model.named_parameters() if not p.requires_grad),
        "non_persistent": sorted(_non_persistent(model)),
        "example": recipe.example,
        "report": report.to_dict(),
    }
    path = pathlib.Path(directory)
    temporary = path / f".{uuid.uuid4().hex}"
    stray: pathlib.Path | None = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        old = _weights_of_save(path)
        save_file(tensors, temporary, metadata={"format": "pt"})
        _flush(temporary)
        digest = _digest(temporary)
        weights = path / f"weights-{digest[:16]}.safetensors"
        document["weights"], document["sha256"] = weights.name, digest
        stray = None if weights.exists() else weights
        os.replace(temporary, weights)
        temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, path / RECIPE)
        stray = old if old != weights else None
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise StoreError(f"cannot write {path}: {error}") from error
    finally:
        for file in (temporary, stray):
            if file is not None:
                with contextlib.suppress(OSError):  # left over, and harmless
                    file.unlink(missing_ok=True)


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
        layers: further `Layer` and `Pass` classes that the recipe may name.

    Returns:
        The rewritten model, with the saved report.

    Raises:
        StoreError: not a saved rewrite, truncated, from a newer version, for another model, or it
            names a class that is not on the allow-list.
    """
    from rewriter.capture import Capture
    from rewriter.engine import Engine, Options

    if isinstance(model, RewrittenModule):
        raise StoreError(
            f"load needs the original {type(model).__name__}, and this one is rewritten already: "
            "build the original again, with any weights"
        )
    path = pathlib.Path(directory)
    saved = _read(path, layers)
    try:
        root = copy.deepcopy(model)
    except Exception as error:
        raise StoreError(f"{type(model).__name__} cannot be copied: {error}") from error
    with _opened(path / saved.weights) as file:
        filler = _Filler(saved, file)
        built = {e.name: _build(e, root, filler) for e in saved.layers if e.same_as == e.name}
        for entry in saved.layers:
            built[entry.name] = built[entry.same_as]
        if example_inputs is None and any(e.installed.graph_only for e in saved.layers):
            example_inputs = _example(saved.example)
        if example_inputs is None:
            engine = Engine(Capture(root, "loaded", []), Options())
        else:
            from rewriter.api import prepare

            filler.prepare(root)
            engine = prepare(root, example_inputs)
        engine.place(built)
        recipe = Recipe.of(model)
        recipe.example = saved.example
        for entry in saved.layers:
            recipe.installed[entry.name] = entry.installed
            if entry.origin is not None:
                recipe.origins[entry.name] = entry.origin
            for ref in (entry.installed.weight_ref, entry.installed.bias_ref):
                if ref is not None and entry.dtype is not None:
                    recipe.dtypes[ref] = entry.dtype
        engine.finish(saved.report, recipe)
        filler.fill(root)
    return root


def load_original(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Puts a checkpoint of the original model through the same rewrite, in place.

    The result is what rewriting the original with these weights gives. A tied tensor may be left
    out under all but one of its names. A model that was rewritten on `meta` gets its data here.

    Args:
        model: a rewritten model.
        state_dict: of the original, un-rewritten model; any dtype and device.

    Raises:
        StoreError: keys are missing, left over or of another shape, or a pass now refuses a weight
            it took before; the model is as it was.
    """
    recipe, _ = _recipe_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    own, loose = _state(model), _non_persistent(model)
    bare = [k for k in loose if own[k].is_meta]
    bare += [k for k, b in model.named_buffers() if b.is_meta and _is_constant(k)]
    if bare:
        raise StoreError(
            f"the model is on meta, and a checkpoint does not hold its {sorted(bare)}: rewrite "
            "the model with data instead"
        )
    given = dict(state_dict)
    strange = sorted(str(k) for k, t in given.items() if not isinstance(t, Tensor))
    if strange:
        raise StoreError(f"the state_dict has entries that are not tensors: {strange}")
    # Under which keys the original has the tensors of each rewritten layer …
    layers: dict[int, list[tuple[str, dict[str, str]]]] = {}
    for fqn in recipe.installed:
        for spelling in _spellings(fqn, recipe, modules):
            layers.setdefault(id(modules[fqn]), []).append((fqn, spelling))
    # … and all others: one name of a tied tensor is enough.
    rewritten = {id(modules[fqn]) for fqn in recipe.installed}
    inside = tuple(f"{n}." for n, m in modules.items() if id(m) in rewritten)
    plain = {k: t for k, t in own.items() if k not in loose and not k.startswith(inside)}
    tied: dict[int, set[str]] = {}
    for key, tensor in plain.items():
        tied.setdefault(id(tensor), set()).add(key)
    missing = {min(group) for group in tied.values() if not group & set(given)}
    chosen: list[tuple[str, dict[str, str]]] = []
    for options in layers.values():
        complete = [o for o in options if set(o[1].values()) <= set(given)]
        chosen += complete[:1]
        if not complete:
            missing |= set(options[0][1].values()) - set(given)
    left = set(given) - set(plain)
    left -= {key for options in layers.values() for _, o in options for key in o.values()}
    if missing or left:
        raise StoreError(
            f"the state_dict does not fit the original {type(model).__name__}: missing "
            f"{sorted(missing)}, unexpected {sorted(left)}"
        )
    values = {k: given[k] for k in plain if k in given}
    wrong = [k for k, t in values.items() if t.shape != own[k].shape]
    if wrong:
        raise StoreError(f"the state_dict has tensors of other shapes: {sorted(wrong)}")
    for fqn, spelling in chosen:
        originals = {role: given[key] for role, key in spelling.items()}
        new = _again(fqn, recipe, originals, modules[fqn])
        values.update({f"{fqn}.{k}": t for k, t in new.items()})
    # Nothing was changed so far, and nothing can be refused any more.
    renewed: dict[int, Tensor] = {}
    for key, value in values.items():
        old = own[key]
        if old.is_meta:
            renewed.setdefault(id(old), _like(value, old, old.dtype))
        else:
            with torch.no_grad():
                old.copy_(value)
    for key, old in own.items():
        if id(old) in renewed:
            _put(model, key, renewed[id(old)])


def _spellings(
    fqn: str, recipe: Recipe, modules: Mapping[str, nn.Module]
) -> Iterator[dict[str, str]]:
    """Where an original state_dict may hold the tensors of a rewritten place: role → key."""
    if fqn in recipe.origins:
        roles = {k: f"{fqn}.{k}" for k in _original(fqn, recipe).state_dict()}
    else:
        installed = recipe.installed[fqn]
        refs = {"weight": installed.weight_ref, "bias": installed.bias_ref}
        roles = {role: key for role, key in refs.items() if key is not None}
    if not roles:
        return
    yield roles
    split = {role: key.rpartition(".") for role, key in roles.items()}
    if all(modules.get(owner) is modules[fqn] for owner, _, _ in split.values()):
        for alias, module in modules.items():
            if module is modules[fqn]:
                yield {role: f"{alias}.{name}" for role, (_, _, name) in split.items()}


def _original(fqn: str, recipe: Recipe) -> nn.Module:
    cls, config = recipe.origins[fqn]
    if isinstance(cls, str):
        raise StoreError(f"{fqn} was a {cls}: name that class in rewriter.load(..., layers=[...])")
    layer: nn.Module = cls(**config, device="meta")
    return layer


def _again(
    fqn: str, recipe: Recipe, originals: Mapping[str, Tensor], target: nn.Module
) -> dict[str, Tensor]:
    """The tensors of the rewritten layer `target` for these original ones, by name in it."""
    old = next(iter(_state(target).values()), None)
    device = None if old is None or old.is_meta else old.device
    installed = recipe.installed[fqn]
    refs = {"weight": installed.weight_ref, "bias": installed.bias_ref}
    given = {}
    for role, tensor in originals.items():
        dtype = recipe.dtypes.get(refs.get(role) or f"{fqn}.{role}", tensor.dtype)
        given[role] = tensor.detach().to(device=device, dtype=dtype)
    layer = _layer_before(fqn, recipe, given)
    transposed = installed.transposed
    for kind, rewrite in installed.chain:
        if not isinstance(rewrite, Pass) or (isinstance(kind, str) and "." in kind):
            unknown = rewrite["class"] if isinstance(rewrite, dict) else kind
            raise StoreError(
                f"{fqn}: its recipe needs {unknown}, which is not known here: name that class in "
                "rewriter.load(..., layers=[...]), or rewrite again"
            )
        site = _site_around(layer, fqn, kind, transposed)
        try:
            with torch.enable_grad():
                answer = rewrite.propose(site)
        except Exception as error:
            raise StoreError(
                f"{fqn}: {rewrite} fails on the new weights: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(answer, Replacement):
            raise StoreError(f"{fqn}: {rewrite} refuses the new weights: {answer.reason}")
        layer, transposed = answer.layer, False
    state = _state(layer)
    if {k: t.shape for k, t in state.items()} != {k: t.shape for k, t in _state(target).items()}:
        shapes = {k: list(t.shape) for k, t in originals.items()}
        raise StoreError(f"{fqn}: weights of shape {shapes} do not give the layer that is there")
    return state


def _layer_before(fqn: str, recipe: Recipe, given: dict[str, Tensor]) -> nn.Module:
    """The original layer at a rewritten place, around these tensors."""
    shapes = {k: list(t.shape) for k, t in given.items()}
    if fqn in recipe.origins:
        layer = _original(fqn, recipe)
        expected = {k: list(t.shape) for k, t in layer.state_dict().items()}
        if shapes != expected:
            raise StoreError(f"{fqn}: the state_dict has {shapes}, the layer had {expected}")
        layer.load_state_dict(given, assign=True)
        return layer
    installed = recipe.installed[fqn]
    kind = installed.chain[0][0]
    weight, bias = given["weight"], given.get("bias")
    if kind not in (LINEAR, MLP):
        raise StoreError(f"{fqn} was of kind {kind}, which load_original cannot rebuild")
    features = shapes["weight"][:: -1 if installed.transposed else 1]
    if len(features) != 2 or (bias is not None and shapes["bias"] != features[:1]):
        raise StoreError(f"{fqn}: {shapes} are not the shapes of a linear layer")
    layer = nn.Module() if installed.transposed else nn.Linear(1, 1, device="meta")
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = features
    for name, tensor in (("weight", weight), ("bias", bias)):
        floating = tensor is not None and tensor.is_floating_point()
        layer._parameters[name] = None if tensor is None else nn.Parameter(tensor, floating)
    return layer


def _site_around(layer: nn.Module, fqn: str, kind: Any, transposed: bool) -> Site:
    """A site as the engine shows it to a pass: under its full name, which a pass may use."""
    holder = root = nn.Module()
    *owners, last = fqn.split(".")
    for owner in owners:
        child = nn.Module()
        holder.add_module(owner, child)
        holder = child
    holder.add_module(last, layer)
    own = type(layer) if isinstance(layer, Layer) else LINEAR
    named = {} if isinstance(layer, Layer) else dict(layer.named_parameters(recurse=False))
    refs = [f"{fqn}.{n}" if n in named else None for n in ("weight", "bias")]
    site = Site(own, fqn, root, weight_ref=refs[0], bias_ref=refs[1], transposed=transposed)
    return replace(site, kind=MLP, parts={"down": site}) if kind == MLP else site


# tensors of a model, by name


def _state(root: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under all of its names, but for those that capture made."""
    named: dict[str, Tensor] = dict(root.named_parameters(remove_duplicate=False))
    named.update(root.named_buffers(remove_duplicate=False))
    return {k: t for k, t in named.items() if not _is_constant(k)}


def _is_constant(key: str) -> bool:
    return key.rpartition(".")[2].startswith(CONSTANT)


def _non_persistent(root: nn.Module) -> set[str]:
    """Names of the buffers that a state_dict leaves out."""
    return {
        f"{fqn}.{name}" if fqn else name
        for fqn, module in root.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None and not _is_constant(name)
    }


def _put(root: nn.Module, key: str, tensor: Tensor) -> None:
    owner, _, name = key.rpartition(".")
    holder = root.get_submodule(owner)
    if isinstance(tensor, nn.Parameter):
        holder._parameters[name] = tensor
    else:
        holder._buffers[name] = tensor


def _like(value: Tensor, old: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in memory of its own, a Parameter where `old` is one, and where `old` lives."""
    device = value.device if old.is_meta else old.device
    new = value.detach().to(device=device, dtype=dtype, copy=True)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, old.requires_grad)
    return new


def _unique(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, each once, and the further names of those that have several."""
    for fqn, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise StoreError(
                f"{fqn or 'the model'} ({type(module).__name__}) has extra state that is no tensor "
                "(get_extra_state), which cannot be saved without pickle"
            )
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    storages: set[int] = set()
    for name, tensor in _state(model).items():
        if tensor.is_meta:
            raise StoreError(f"{name} is on meta: there is nothing to save; load weights first")
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
            continue
        try:
            plain = tensor.detach().cpu().contiguous()
            storage = plain.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError) as error:
            raise StoreError(
                f"{name} is a {tensor.layout} tensor: only dense ones can be saved"
            ) from error
        # a view of another tensor is written out; all else goes to disk without a copy in memory
        tensors[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return tensors, ties


# writing


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
            "class": _class_name(type(layer)),
            "config": _config(layer, fqn),
            "same_as": next(n for n in recipe.installed if modules.get(n) is layer),
            "weight": installed.weight_ref,
            "bias": installed.bias_ref,
            "transposed": installed.transposed,
            "graph_only": installed.graph_only,
            "dtype": None if dtype is None else _dtype_name(dtype),
            "origin": None if origin is None else [_kind_name(origin[0]), origin[1]],
            "chain": [[_kind_name(k), _pass_spec(p)] for k, p in installed.chain],
        })  # fmt: skip
    return entries


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
    except (TypeError, ValueError) as error:
        raise StoreError(f"{fqn}: {type(layer).__name__}.config() is not JSON: {error}") from None
    return config


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _kind_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else _class_name(kind)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pass_spec(rewrite: Any) -> Any:
    if not isinstance(rewrite, Pass):
        return rewrite  # as it was read from a recipe
    options = {
        f.name: getattr(rewrite, f.name) for f in fields(rewrite) if f.init and f.name != "where"
    }
    spec: dict[str, Any] = {"class": _class_name(type(rewrite)), "options": options}
    try:
        json.dumps(spec)
    except (TypeError, ValueError):  # only load_original needs it, and says so
        spec["options"] = None
    return spec


def _weights_of_save(path: pathlib.Path) -> pathlib.Path | None:
    """The weights file of the save that is here already.

    Raises:
        StoreError: something else is here.
    """
    try:
        document = json.loads((path / RECIPE).read_text(encoding="utf-8"))
        return path / pathlib.PurePath(document["weights"]).name
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StoreError(
            f"{path / RECIPE} is not a save of this package: choose another directory or remove it"
        ) from None


def _flush(file: pathlib.Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def _digest(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# reading


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
        )
        names = {e.name for e in saved.layers if e.same_as == e.name}
        if len({e.name for e in saved.layers}) < len(saved.layers):
            raise ValueError("a layer is listed twice")
        if any(e.same_as not in names for e in saved.layers):
            raise ValueError("a layer is the same as one that is not listed")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path / RECIPE} is damaged: {type(error).__name__}: {error}") from error
    try:
        if _digest(weights) != document["sha256"]:
            raise StoreError(f"{weights} is truncated or changed: its checksum differs")
    except OSError as error:
        raise StoreError(f"{weights} is not readable: {error}") from error
    return saved


def _entry(entry: Any, extra: Sequence[type]) -> _Entry:
    chain = [(_known(k, extra, (Layer,)), _pass_of(p, extra)) for k, p in entry["chain"]]
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
    )
    dtype, origin = entry["dtype"], entry["origin"]
    return _Entry(
        entry["name"],
        _allowed(entry["class"], extra, (Layer, nn.Linear)),
        dict(entry["config"]),
        entry["same_as"],
        installed,
        None if dtype is None else _dtype(dtype),
        None if origin is None else (_known(origin[0], extra, (Layer,)), dict(origin[1])),
    )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is not a dtype")
    return dtype


def _allowed(name: str, extra: Sequence[type], bases: tuple[type, ...]) -> Any:
    """The class of this name, if it may be built; nothing else is ever imported."""
    for cls in extra:
        if _class_name(cls) == name:
            return cls
    module, _, attribute = name.rpartition(".")
    if name == _class_name(nn.Linear):
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


def _known(name: str, extra: Sequence[type], bases: tuple[type, ...]) -> Any:
    """A class where it may be used; else its name, which only `load_original` stumbles on."""
    try:
        return _allowed(name, extra, bases) if "." in name else name
    except StoreError:
        return name


def _pass_of(spec: Any, extra: Sequence[type]) -> Any:
    """The pass again; its JSON where it cannot be had, which only `load_original` stumbles on."""
    cls: Any = _known(spec["class"], extra, (Pass,))
    if isinstance(cls, str) or spec["options"] is None:
        return spec
    try:
        return cls(**spec["options"])
    except (ValueError, TypeError):  # options of another version
        return spec


def _build(entry: _Entry, root: nn.Module, filler: _Filler) -> nn.Module:
    try:
        layer = entry.cls(**entry.config, device="meta")
    except Exception as error:
        raise StoreError(f"{entry.name}: cannot build {_class_name(entry.cls)}: {error}") from error
    old = _state(root)
    site = [old[r] for r in (entry.installed.weight_ref,) if r in old]
    site += [t for k, t in old.items() if k.startswith(f"{entry.name}.")]
    features = [getattr(layer, n, None) for n in ("out_features", "in_features")]
    if entry.installed.weight_ref in old and None not in features:
        shape = list(site[0].shape)[:: -1 if entry.installed.transposed else 1]
        if shape != features:
            raise StoreError(
                f"the recipe rewrites {entry.name} of {features[1]} -> {features[0]} features, "
                f"and {type(root).__name__} has {shape[1]} -> {shape[0]} there: pass the model "
                "that was rewritten"
            )
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
        own = {prefix + k: t for k, t in _state(root).items()}
        loose = {prefix + k for k in _non_persistent(root)}
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
        own = {prefix + k: t for k, t in _state(root).items()}
        for key in [k for k in own if k in self.names]:
            self._one(root, key, key.removeprefix(prefix), own[key], device, key in loose)
        for key, tensor in _state(root).items():
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
            _put(root, name, made)

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
        return _like(value.to(device) if device is not None else value, old, value.dtype)

    def _register(self, root: nn.Module, key: str, prefix: str) -> bool:
        """Makes room for a buffer outside the state_dict that the model only gets in use."""
        owner, _, name = key.removeprefix(prefix).rpartition(".")
        if key not in self.saved.non_persistent:
            return False
        try:
            holder = root.get_submodule(owner)
        except AttributeError:
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
        for key, old in _state(root).items():
            if id(old) not in made:
                first = self.saved.ties.get(key, key)
                value = old
                if first in self.file.keys():  # noqa: SIM118 (not a mapping)
                    value = self.file.get_tensor(first)
                if value.is_meta or value.shape != old.shape:
                    value = torch.zeros(old.shape, dtype=old.dtype) if old.is_meta else old
                made[id(old)] = _like(value, old, dtypes.get(key) or value.dtype)
            _put(root, key, made[id(old)])


# the example call


def example_to_json(arguments: Mapping[str, Any]) -> Any:
    """The example call as JSON: tensors by shape, dtype and, for whole numbers, the largest value
    (a valid index, an open mask); None where something has no form."""
    if any("[" in name for name in arguments):  # `*args` cannot be given back by name
        return None
    try:
        return {name: _to_json(value) for name, value in arguments.items()}
    except TypeError:
        return None


def _to_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        whole = not (value.is_floating_point() or value.is_complex() or value.is_meta)
        fill = int(value.max()) if whole and value.numel() else 0
        return {"tensor": list(value.shape), "dtype": _dtype_name(value.dtype), "fill": fill}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_to_json(v) for v in value]}
    if type(value) is dict and all(isinstance(k, str) for k in value):
        return {"dict": {k: _to_json(v) for k, v in value.items()}}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise TypeError(type(value).__name__)


def _example(data: Any) -> dict[str, Any]:
    if data is None:
        raise StoreError("this rewrite lives in a graph: pass example_inputs to load it")

    def build(item: Any) -> Any:
        if "tensor" in item:
            return torch.full(item["tensor"], item["fill"], dtype=_dtype(item["dtype"]))
        if "list" in item:
            return [build(v) for v in item["list"]]
        if "tuple" in item:
            return tuple(build(v) for v in item["tuple"])
        if "dict" in item:
            return {k: build(v) for k, v in item["dict"].items()}
        return item["value"]

    try:
        return {k: build(v) for k, v in data.items()}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise StoreError(f"the recipe's example call is damaged: {error}") from error


def _recipe_of(model: nn.Module) -> tuple[Recipe, Report]:
    state = vars(model).get("_rewriter") if isinstance(model, nn.Module) else None
    if not isinstance(model, RewrittenModule) or state is None or state.recipe is None:
        raise StoreError(
            f"{type(model).__name__} was not made by rewriter.rewrite or rewriter.load"
        )
    return state.recipe, state.report
