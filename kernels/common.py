"""What the operations here share: casting under autocast, and gradients of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["outer", "register_autocast"]


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def register_autocast(library: Any, name: str, casts: int) -> None:
    """What aten does for `linear`: below float64, floating tensors go to the autocast dtype.

    `torch.library.register_autocast` knows one fixed dtype only, not the one the user chose.

    Args:
        library: that defines `rewriter::name`.
        name: of the operation.
        casts: how many of its leading arguments are cast.
    """
    for device in ("cpu", "cuda"):
        library.impl(name, _casting(name, casts, device), f"Autocast{device.upper()}")


def _casting(name: str, casts: int, device: str) -> Any:
    def cast(value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or value.dtype in (dtype, torch.float64):
            return value
        return value.to(dtype) if value.is_floating_point() else value

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):  # as torch.library: no casts below
            return getattr(torch.ops.rewriter, name)(
                *(cast(a, dtype) for a in args[:casts]), *args[casts:]
            )

    return kernel


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Σ over rows of left ⊗ right: [*, out], [*, in] → [out, in]."""
    return left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])
