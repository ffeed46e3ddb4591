"""How far two flat results are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["relative_error", "tolerance", "type_of"]


def type_of(value: Any) -> str:
    """`float32[2, 4] on cpu` of a tensor; the class of anything else."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)} on {value.device}"
    return type(value).__name__


def relative_error(actual: Sequence[Any], expected: Sequence[Any]) -> float | None:
    """‖actual − expected‖ / ‖expected‖ over all floating-point results together; None without
    any that hold data."""
    difference = norm = 0.0
    seen = False
    for a, e in zip(actual, expected, strict=True):
        if isinstance(e, Tensor) and e.is_floating_point() and not e.is_meta:
            seen = True
            a, e = a.double(), e.double()
            # masks hold −inf and caches may hold NaN: only where both are finite can they differ
            finite = torch.isfinite(e)
            if not bool(torch.isfinite(a[finite]).all()):
                return float("inf")
            difference += float((a[finite] - e[finite]).square().sum())
            norm += float(e[finite].square().sum())
    if not seen:
        return None
    return float((difference / norm) ** 0.5) if norm else float(difference > 0)


def tolerance(results: Sequence[Any]) -> float:
    """The relative error that rounding alone may cause in an exact rewrite of a deep model: a
    thousand units in the last place of the coarsest result."""
    floats = [t for t in results if isinstance(t, Tensor) and t.is_floating_point()]
    eps = [torch.finfo(t.dtype).eps for t in floats]
    return 1000 * max(eps, default=torch.finfo(torch.float32).eps)
