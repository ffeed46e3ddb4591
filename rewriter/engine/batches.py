"""`Calibration`: batches that a user hands over beside the example inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rewriter.errors import CalibrationError

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """Batches like `example_inputs`, kept as they are.

    Args:
        batches: at least one; each a tensor, a tuple of positional or a mapping of keyword
            arguments of the model.
    """

    batches: tuple[Any, ...]

    @classmethod
    def of(cls, given: Any, name: str = "calibration") -> Calibration:
        """One batch, or an iterable of batches, which the user gave as the argument `name`.

        Raises:
            CalibrationError: there is none, or one is nothing a model can be called with.
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
        return cls(batches)
