"""`Calibration`: batches that a user hands over beside the example inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import CalibrationError

__all__ = ["Calibration"]

_HELD_OUT = 4
"""Every so many-th batch is not fitted on, but measures the error of the result."""


@dataclass(frozen=True)
class Calibration:
    """Batches like `example_inputs`, kept as they are.

    Args:
        batches: at least one; each a tensor, a tuple of positional or a mapping of keyword
            arguments of the model.
    """

    batches: tuple[Any, ...]

    @classmethod
    def of(cls, given: Any, name: str = "calibration", like: Any = None) -> Calibration:
        """One batch, or an iterable of batches, which the user gave as the argument `name`.

        Args:
            like: example inputs, whose dtypes the batches have; None where there are none.

        Raises:
            CalibrationError: there is none, or one is nothing a model can be called with, is
                empty, holds NaN, or is of another dtype than the example inputs.
        """
        one = isinstance(given, Tensor | Mapping)
        if not one and not isinstance(given, Iterable):
            raise CalibrationError(
                f"{name} is a {type(given).__name__}: pass a list of batches like "
                "example_inputs, or a DataLoader"
            )
        batches = (given,) if one else tuple(given)
        if not batches:
            raise CalibrationError(f"{name} has no batch: pass at least one, better ten")
        for i, batch in enumerate(batches):
            if not isinstance(batch, Tensor | Mapping | tuple | list):
                raise CalibrationError(
                    f"{name}[{i}] is a {type(batch).__name__}: each batch must be a tensor, a "
                    "tuple of positional or a mapping of keyword arguments"
                )
        wanted: dict[str, set[torch.dtype]] = {}
        for call in _calls(like):
            for key, tensor in _tensors(call):
                wanted.setdefault(key, set()).add(tensor.dtype)
        for i, batch in enumerate(batches):
            _check(f"{name}[{i}]", dict(_tensors(batch)), wanted)
        return cls(batches)

    def held_out(self, i: int) -> bool:
        """Whether the i-th batch is not fitted on: every fourth, of two or three the last."""
        every = min(_HELD_OUT, len(self.batches))
        return len(self.batches) > 1 and i % every == every - 1


def _calls(like: Any) -> Iterator[Any]:
    """The calls that example inputs stand for: one, or those of a list of several."""
    several = isinstance(like, list) and not any(isinstance(c, Tensor) for c in like)
    yield from like if several else (like,)


def _tensors(call: Any) -> Iterator[tuple[str, Tensor]]:
    """The arguments of a call that are tensors, as a message names them."""
    if isinstance(call, Tensor):
        call = (call,)
    if isinstance(call, Mapping):
        named: Iterable[tuple[str, Any]] = ((repr(k), v) for k, v in call.items())
    elif isinstance(call, tuple | list):
        named = ((f"argument {i}", v) for i, v in enumerate(call))
    else:
        named = ()
    yield from ((k, v) for k, v in named if isinstance(v, Tensor))


def _check(
    name: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, set[torch.dtype]]
) -> None:
    if tensors and not any(t.numel() for t in tensors.values()):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors.values())
        raise CalibrationError(f"{name} is empty, of shape {shapes}: leave it out")
    for key, tensor in tensors.items():
        others = wanted.get(key, {tensor.dtype})
        floats = tensor.is_floating_point() or any(d.is_floating_point for d in others)
        if floats and tensor.dtype not in others:
            dtype = next(iter(others))
            raise CalibrationError(
                f"{name}: {key} is {tensor.dtype}, and in example_inputs {dtype}: pass it "
                f"as .to({dtype})"
            )
        dense = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta
        if dense and tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise CalibrationError(f"{name}: {key} holds NaN: leave the batch out, or mend it")
