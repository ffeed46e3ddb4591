"""`load_original`: a checkpoint of the original model through the same rewrite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.base import Layer, Pass, Replacement
from rewriter.errors import StoreError
from rewriter.modules.tensors import (
    is_constant,
    named_tensors,
    non_persistent,
    put_tensor,
    tensor_like,
)
from rewriter.recipe.recipe import Recipe, recipe_of
from rewriter.sites import LINEAR, MLP, Site

__all__ = [
    "layer_before",
    "load_original",
    "site_around",
]


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
    recipe, _ = recipe_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    own, loose = named_tensors(model), non_persistent(model)
    bare = [k for k in loose if own[k].is_meta]
    bare += [k for k, b in model.named_buffers() if b.is_meta and is_constant(k)]
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
            renewed.setdefault(id(old), tensor_like(value, old, old.dtype))
        else:
            with torch.no_grad():
                old.copy_(value)
    for key, old in own.items():
        if id(old) in renewed:
            put_tensor(model, key, renewed[id(old)])


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
    old = next(iter(named_tensors(target).values()), None)
    device = None if old is None or old.is_meta else old.device
    installed = recipe.installed[fqn]
    refs = {"weight": installed.weight_ref, "bias": installed.bias_ref}
    given = {}
    for role, tensor in originals.items():
        dtype = recipe.dtypes.get(refs.get(role) or f"{fqn}.{role}", tensor.dtype)
        given[role] = tensor.detach().to(device=device, dtype=dtype)
    layer = layer_before(fqn, recipe, given)
    transposed = installed.transposed
    for kind, rewrite in installed.chain:
        if not isinstance(rewrite, Pass) or (isinstance(kind, str) and "." in kind):
            unknown = rewrite["class"] if isinstance(rewrite, dict) else kind
            raise StoreError(
                f"{fqn}: its recipe needs {unknown}, which is not known here: name that class in "
                "rewriter.load(..., layers=[...]), or rewrite again"
            )
        site = site_around(layer, fqn, kind, transposed)
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
    state = named_tensors(layer)
    if {k: t.shape for k, t in state.items()} != {
        k: t.shape for k, t in named_tensors(target).items()
    }:
        shapes = {k: list(t.shape) for k, t in originals.items()}
        raise StoreError(f"{fqn}: weights of shape {shapes} do not give the layer that is there")
    return state


def layer_before(fqn: str, recipe: Recipe, given: dict[str, Tensor]) -> nn.Module:
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


def site_around(layer: nn.Module, fqn: str, kind: Any, transposed: bool) -> Site:
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
