"""The tensors of a save: looked at by shape first, then put into modules one at a time."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rewriter.errors import StoreError
from rewriter.modules.tensors import (
    extra_states,
    named_tensors,
    non_persistent,
    overlaps,
    put_extra_states,
    put_tensor,
    tensor_like,
)
from rewriter.modules.tree import submodule
from rewriter.recipe.names import digest_of
from rewriter.store.document import Saved
from rewriter.store.files import opened

__all__ = ["Filler", "Weights", "opened_weights", "room_for"]

_TIMES, _AT_LEAST = 64, 512 << 20
"""Bytes that a save may take: so many times those of the original model, at 8 a number, and so many
in any case."""


def room_for(model: nn.Module) -> int:
    """Bytes that a rewrite of a model can take; a larger file is not even read."""
    numbers = sum({id(t): t.numel() for t in named_tensors(model).values()}.values())
    return max(_AT_LEAST, _TIMES * 8 * numbers)


class Weights:
    """The weights file of a save; a tensor is read when it is asked for.

    Args:
        file: as safetensors opened it.
        saved: the recipe.

    Attributes:
        shapes: of the tensors, by name.

    Raises:
        StoreError: it does not hold what the recipe says that it holds.
    """

    def __init__(self, file: Any, saved: Saved) -> None:
        self.file = file
        self.complexes = saved.complexes
        self.shapes: dict[str, list[int]] = {n: file.get_slice(n).get_shape() for n in file.keys()}
        for name, dtype in saved.complexes.items():
            stored = self.shapes.get(name, [0])
            if stored[-1:] != [2] or _PAIRS.get(dtype) != file.get_slice(name).get_dtype():
                raise StoreError(f"the weights file has no pairs of numbers for {name}, of {dtype}")
            self.shapes[name] = stored[:-1]

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Tensor:
        try:
            value: Tensor = self.file.get_tensor(name)
        except Exception as error:
            raise StoreError(
                f"{name} cannot be read from the weights file: {type(error).__name__}: {error}"
            ) from error
        if not (name in self.complexes or value.is_complex()):
            return value
        # in memory complex numbers start at a multiple of their size, which in a file they need not
        pairs = torch.view_as_real(value) if value.is_complex() else value
        return torch.view_as_complex(pairs.clone())

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor; nothing of it is read into memory."""
        return self[name].dtype


_PAIRS = {torch.complex128: "F64", torch.complex32: "F16"}


@contextlib.contextmanager
def opened_weights(directory: pathlib.Path, saved: Saved, most: int) -> Iterator[Weights]:
    """The weights that a recipe names; once they are open, no later save takes them away.

    Args:
        directory: of the save.
        saved: its recipe.
        most: bytes that the file may have.

    Raises:
        StoreError: the file is missing, too large, truncated, changed, or no regular file.
    """
    path = directory / saved.weights
    with contextlib.ExitStack() as stack:
        try:
            plain = stack.enter_context(opened(path))
            size = plain.seek(0, os.SEEK_END)
            if size > most:
                raise StoreError(
                    f"{path} has {size:,} bytes, and a rewrite of this model takes at most "
                    f"{most:,}: pass the model that was rewritten"
                )
            file = stack.enter_context(safe_open(path, framework="pt"))
            plain.seek(0)
            if digest_of(plain) != saved.sha256:
                raise StoreError(f"{path} is truncated or changed: its checksum differs")
            weights = Weights(file, saved)
        except SafetensorError as error:
            raise StoreError(f"{path} is truncated or changed: {error}") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise StoreError(f"{path} is not readable: {error}") from error
        yield weights


class Filler:
    """Puts saved tensors into modules, one at a time: the file is never in memory as a whole.

    A tensor that fits is overwritten in place, so that whoever else holds it sees the new values;
    another is replaced. Names that shared a tensor when saved share one again.
    """

    def __init__(self, saved: Saved, weights: Weights) -> None:
        self.saved = saved
        self.weights = weights
        self.names = (set(weights.shapes) | set(saved.ties)) - saved.extra_state
        self.made: dict[str, Tensor] = {}
        self.taken: dict[int, str] = {}

    def shape(self, name: str) -> list[int]:
        """Of a saved tensor, under any of its names; empty where there is none."""
        return self.weights.shapes.get(self.saved.ties.get(name, name), [])

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
        self._check(key, first, old, loose)
        made = self.made.get(first)
        if made is None:
            made = self._made(first, old, device)
            if isinstance(made, nn.Parameter):
                made.requires_grad_(_is_inexact(made) and first not in self.saved.frozen)
            self.made[first] = made
            self.taken[id(made)] = first
        if made is not old:
            put_tensor(root, name, made)

    def _check(self, key: str, first: str, old: Tensor, loose: bool) -> None:
        """Raises StoreError where the saved tensor `first` cannot be what the model has as `key`.

        A buffer outside of the state_dict may have become another one in use.
        """
        shape = self.weights.shapes.get(first)
        if shape is None:
            raise StoreError(f"{key} is tied to {first}, which the file lacks")
        if loose:
            return
        if shape not in (list(old.shape), _scalar_as(old)):
            raise StoreError(f"{key} has shape {shape} where it was saved, {list(old.shape)} here")
        dtype = self.weights.dtype(first)
        if dtype != old.dtype and not (_is_inexact(old) and _holds_fractions(dtype)):
            raise StoreError(f"{key} is {dtype} where it was saved, {old.dtype} here")

    def _made(self, first: str, old: Tensor, device: torch.device | None) -> Tensor:
        value = self.weights[first]
        if list(value.shape) == _scalar_as(old):
            value = value[None]
        fits = not (old.is_meta or overlaps(old))
        fits = fits and (old.dtype, old.shape) == (value.dtype, value.shape)
        if fits and self.taken.get(id(old), first) == first:
            with torch.no_grad():
                old.copy_(value)
            return old
        return tensor_like(value.to(device) if device is not None else value, old, value.dtype)

    def _register(self, root: nn.Module, key: str, prefix: str) -> bool:
        """Makes room for a buffer outside the state_dict that the model only gets in use."""
        owner, _, name = key.removeprefix(prefix).rpartition(".")
        first, holder = self.saved.ties.get(key, key), submodule(root, owner)
        if key not in self.saved.non_persistent or first not in self.weights:
            return False
        if holder is None or not name.isidentifier() or hasattr(holder, name):
            return False
        value = self.weights[first]
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
                first, value = self.saved.ties.get(key, key), old
                if self.weights.shapes.get(first) == list(old.shape):
                    value = self.weights[first]
                if value.is_meta or _is_inexact(value) != _is_inexact(old):
                    value = torch.zeros(old.shape, dtype=old.dtype) if old.is_meta else old
                dtype = dtypes.get(key) or value.dtype
                if not _holds_fractions(dtype) and _is_inexact(old):
                    raise StoreError(f"the recipe says that {key} was {dtype}: it is damaged")
                made[id(old)] = tensor_like(value, old, dtype)
            put_tensor(root, key, made[id(old)])

    def give_extra_states(self, root: nn.Module) -> None:
        """Hands modules the extra state that they had.

        Raises:
            StoreError: other modules had some, or one does not take it.
        """
        own = extra_states(root)
        if set(own) != self.saved.extra_state or not self.saved.extra_state <= set(
            self.weights.shapes
        ):
            raise StoreError(
                f"the saved model has extra state {sorted(self.saved.extra_state)}, and this "
                f"{type(root).__name__} has {sorted(own)}: pass the model that was rewritten"
            )
        put_extra_states(own, {key: self.weights[key].clone() for key in own})


def _scalar_as(tensor: Tensor) -> list[int] | None:
    """The shape under which version 0.1.0 saved a parameter of one number; None for others."""
    return [] if tensor.shape == (1,) and isinstance(tensor, nn.Parameter) else None


def _is_inexact(tensor: Tensor) -> bool:
    return _holds_fractions(tensor.dtype)


def _holds_fractions(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
