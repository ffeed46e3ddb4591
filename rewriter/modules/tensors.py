"""The tensors of a model by name: ties, constants, and how one takes another's place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import StoreError
from rewriter.modules.tree import join

__all__ = [
    "CONSTANT",
    "EXTRA_STATE",
    "extra_states",
    "extra_tensors",
    "gathered",
    "is_constant",
    "is_sharded",
    "named_tensors",
    "non_persistent",
    "overlaps",
    "put_extra_states",
    "put_tensor",
    "tell_replaced",
    "tensor_like",
    "unique_tensors",
]


CONSTANT = "_rewriter_constant_"
"""Prefix of the non-persistent buffers that hold tensors the forward creates from literals."""


EXTRA_STATE = "_extra_state"
"""What a state_dict calls the state of a module that is no parameter and no buffer."""


def named_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under all of its names, but for those that capture made."""
    named: dict[str, Tensor] = dict(root.named_parameters(remove_duplicate=False))
    named.update(root.named_buffers(remove_duplicate=False))
    return {k: t for k, t in named.items() if not is_constant(k)}


def is_constant(key: str) -> bool:
    return key.rpartition(".")[2].startswith(CONSTANT)


def non_persistent(root: nn.Module) -> set[str]:
    """Names of the buffers that a state_dict leaves out."""
    return {
        join(fqn, name)
        for fqn, module in root.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None and not is_constant(name)
    }


def overlaps(tensor: Tensor) -> bool:
    """Whether several elements are one place in memory (`expand`), so that none can be written."""
    return torch._debug_has_internal_overlap(tensor) == 1


def put_tensor(root: nn.Module, key: str, tensor: Tensor) -> None:
    owner, _, name = key.rpartition(".")
    holder = root.get_submodule(owner)
    if isinstance(tensor, nn.Parameter):
        holder._parameters[name] = tensor
    else:
        holder._buffers[name] = tensor


def tell_replaced(root: nn.Module) -> None:
    """Tells modules that keep references to their tensors (`nn.LSTM`) that those are new ones, by
    the method with which PyTorch does; else their next forward finds out, and writes them down."""
    for module in root.modules():
        if type(module)._apply is not nn.Module._apply:
            module._apply(lambda tensor: tensor, recurse=False)


def tensor_like(value: Tensor, old: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in memory of its own, a Parameter where `old` is one, and where `old` lives."""
    device = value.device if old.is_meta else old.device
    new = value.detach().to(device=device, dtype=dtype, copy=True)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, old.requires_grad)
    return new


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold the model's tensors together (FSDP2, tensor parallel)."""
    return any(hasattr(t, "full_tensor") for t in named_tensors(model).values())


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a sharded model as a whole, by name; all processes call it together."""
    whole: dict[int, Tensor] = {}
    for tensor in named_tensors(model).values():
        if id(tensor) not in whole:
            full: Any = tensor
            whole[id(tensor)] = full.full_tensor() if hasattr(full, "full_tensor") else full
    return {name: whole[id(tensor)] for name, tensor in named_tensors(model).items()}


def extra_states(root: nn.Module) -> dict[str, nn.Module]:
    """Name in a state_dict → module, of those that have state beside their tensors."""
    return {
        join(fqn, EXTRA_STATE): module
        for fqn, module in root.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def extra_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Extra states by name.

    Raises:
        StoreError: one is no tensor, and could only be pickled.
    """
    found: dict[str, Tensor] = {}
    for key, module in extra_states(root).items():
        state = module.get_extra_state()
        if not isinstance(state, Tensor):
            name = key.removesuffix(EXTRA_STATE).removesuffix(".")
            raise StoreError(
                f"{name or 'the model'} ({type(module).__name__}) has extra state that is no "
                f"tensor, but a {type(state).__name__} (get_extra_state): it cannot be saved "
                "without pickle"
            )
        found[key] = state
    return found


def put_extra_states(modules: Mapping[str, nn.Module], states: Mapping[str, object]) -> None:
    """Hands modules their extra state: all of them or, where one does not take it, none.

    Raises:
        StoreError: one does not.
    """
    before = {key: module.get_extra_state() for key, module in modules.items()}
    done: list[str] = []
    try:
        for key, module in modules.items():
            done.append(key)
            module.set_extra_state(states[key])
    except Exception as error:
        for key in done:
            modules[key].set_extra_state(before[key])
        raise StoreError(
            f"{key} ({type(module).__name__}) does not take its extra state: "
            f"{type(error).__name__}: {error}"
        ) from error


def unique_tensors(
    model: nn.Module, values: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, each once, and the further names of those that have several.

    Args:
        model: whose tensors.
        values: what to write in place of the tensors of these names.

    Raises:
        StoreError: one is on meta, or no dense tensor; or extra state is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    storages: set[int] = set()
    extra = extra_tensors(model)
    for name, tensor in {**named_tensors(model), **extra}.items():
        if tensor.is_meta:
            raise StoreError(f"{name} is on meta: there is nothing to save; load weights first")
        if name not in extra and first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
            continue
        try:
            value = (values or {}).get(name, tensor)
            # conjugated and negated lazily: what lies in memory is not the value
            plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            storage = plain.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError) as error:
            raise StoreError(
                f"{name} is a {tensor.layout} tensor: only dense ones can be saved"
            ) from error
        # a view of another tensor is written out; all else goes to disk without a copy in memory
        tensors[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return tensors, ties
