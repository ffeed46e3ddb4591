"""`load_original`: a checkpoint of the original model through the same rewrite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rewriter.errors import StoreError, of_type
from rewriter.modules.tensors import (
    EXTRA_STATE,
    extra_states,
    is_constant,
    named_tensors,
    non_persistent,
    overlaps,
    put_extra_states,
    put_tensor,
    tensor_like,
)
from rewriter.recipe.edits import replayed
from rewriter.recipe.recipe import Recipe, recipe_of
from rewriter.recipe.replaying import original_layer, replay

__all__ = ["load_original"]


def load_original(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Puts a checkpoint of the original model through the same rewrite, in place.

    The result is what rewriting the original with these weights gives. A tied tensor may be left
    out under all but one of its names. A model that was rewritten on `meta` gets its data here.

    Args:
        model: a rewritten model.
        state_dict: of the original, un-rewritten model; any dtype and device.

    Raises:
        OptionError: an argument is of another type.
        StoreError: keys are missing, left over or of another shape, or a pass now refuses a weight
            it took before; the model is as it was.
    """
    call = "load_original(model, state_dict)"
    of_type(call, "model", model, nn.Module, "a rewritten model")
    of_type(call, "state_dict", state_dict, Mapping, "tensors by name (original.state_dict())")
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
    states = extra_states(model)
    extra = {k: given.pop(k) for k in states if k in given}
    odd = (k for k, t in given.items() if not isinstance(t, Tensor) and not _is_extra(k))
    strange = sorted(map(str, odd))
    if strange:
        raise StoreError(f"the state_dict has entries that are not tensors: {strange}")
    given = replayed(given, recipe.edits)  # without what was removed, as narrow as what was cut
    # Under which keys the original has the tensors of each rewritten layer …
    layers: dict[int, list[tuple[str, dict[str, str]]]] = {}
    for fqn in recipe.installed:
        for spelling in _spellings(fqn, recipe, modules):
            layers.setdefault(id(modules[fqn]), []).append((fqn, spelling))
    # … and all others: one name of a tied tensor is enough.
    rewritten = {id(modules[fqn]) for fqn in recipe.installed}
    inside = tuple(f"{n}." for n, m in modules.items() if id(m) in rewritten)
    plain = {k: t for k, t in own.items() if k not in loose and not k.startswith(inside)}
    # what a layer had beside its tensors went with it
    given = {k: t for k, t in given.items() if not (_is_extra(k) and k.startswith(inside))}
    tied: dict[int, set[str]] = {}
    for key, tensor in plain.items():
        tied.setdefault(id(tensor), set()).add(key)
    missing = {min(group) for group in tied.values() if not group & set(given)}
    missing |= set(states) - set(extra)
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
        if not spelling:
            continue  # an activation: nothing of it follows from weights
        originals = {role: given[key] for role, key in spelling.items()}
        new = _again(fqn, recipe, originals, modules[fqn])
        values.update({f"{fqn}.{k}": t for k, t in new.items()})
    put_extra_states(states, extra)
    # Nothing but that was changed so far, and nothing can be refused any more.
    renewed: dict[int, Tensor] = {}
    for key, value in values.items():
        old = own[key]
        if old.is_meta or overlaps(old):
            renewed.setdefault(id(old), tensor_like(value, old, old.dtype))
        else:
            with torch.no_grad():
                old.copy_(value)
    for key, old in own.items():
        if id(old) in renewed:
            put_tensor(model, key, renewed[id(old)])


def _is_extra(key: object) -> bool:
    return str(key).rpartition(".")[2] == EXTRA_STATE


def _spellings(
    fqn: str, recipe: Recipe, modules: Mapping[str, nn.Module]
) -> Iterator[dict[str, str]]:
    """Where an original state_dict may hold the tensors of a rewritten place: role → key."""
    if fqn in recipe.origins:
        within = fqn if recipe.installed[fqn].channels is None else f"{fqn}.linear"
        roles = {k: f"{within}.{k}" for k in original_layer(fqn, recipe).state_dict()}
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
    with torch.enable_grad():  # views of parameters must keep their requires_grad
        layer = replay(fqn, recipe, given, StoreError)
    state = named_tensors(layer)
    if {k: t.shape for k, t in state.items()} != {
        k: t.shape for k, t in named_tensors(target).items()
    }:
        shapes = {k: list(t.shape) for k, t in originals.items()}
        raise StoreError(f"{fqn}: weights of shape {shapes} do not give the layer that is there")
    return state
