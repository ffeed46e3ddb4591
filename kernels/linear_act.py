"""Linear with its activation: y = act(x·Wᵀ + b), for inference.

Kernels, chosen by measurement per size (`rewriter.kernels.choice`):

    onednn   oneDNN's product over a packed weight, bias and activation applied to the tile that is
             still in the cache: float32 on the CPU
    torch    torch's own product, then the activation in place; every device and dtype

The packed weight is the caller's to make and to keep as new as the weight (`pack`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rewriter.kernels.choice import fastest, rows_bucket

__all__ = ["EPILOGUES", "act_", "linear_act", "linear_act_reference", "pack", "pick", "refusal"]

_VERSION = "linear_act 1"
_LEAD = 0.05

EPILOGUES: dict[str, tuple[str, str]] = {
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
    "hardswish": ("hardswish", ""),
    "tanh": ("tanh", ""),
    "sigmoid": ("sigmoid", ""),
}
"""Activation → what oneDNN calls it."""

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": lambda x: F.hardtanh_(x, 0.0, 6.0),
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_.default(x, approximate="tanh"),
    "silu": lambda x: F.silu(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
}


def act_(x: Tensor, activation: str) -> Tensor:
    """The activation of this name, written into x."""
    return _IN_PLACE[activation](x)


def refusal(x: Tensor, activation: str) -> str | None:
    """Why no kernel here has this activation as its epilogue for such an input; None where one has.

    Args:
        x: shows dtype and device.
        activation: by name.
    """
    if activation not in EPILOGUES:
        return f"no kernel has {activation} as its epilogue"
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return f"no kernel with an epilogue takes {x.dtype} on {x.device.type}"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    return None


def pack(weight: Tensor) -> Tensor:
    """W [out, in] as oneDNN reads it fastest, opaque; on other devices W itself."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return packed


def pick(rows: int, in_features: int, out_features: int, activation: str) -> str:
    """The fastest kernel on the CPU for this size; measured when first asked for.

    Args:
        rows: rounded up to a power of two.
    """
    rows = rows_bucket(rows)
    key = f"{activation} {rows}x{in_features}x{out_features} threads {torch.get_num_threads()}"

    def candidates() -> dict[str, Callable[[], object]]:
        x = torch.linspace(-1, 1, rows * in_features).view(rows, in_features)
        weight = torch.linspace(-1, 1, out_features * in_features).view(out_features, in_features)
        bias, packed = torch.zeros(out_features), pack(weight)
        return {
            "torch": lambda: _torch(x, weight, bias, activation),
            "onednn": lambda: _onednn(x, packed, bias, activation),
        }

    return fastest(key, _VERSION, candidates, _LEAD)


def linear_act(
    x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """y = act(x·Wᵀ + b). Costs 2·rows·in·out FLOPs; has no gradient.

    Args:
        x: [*, in].
        weight: W [out, in].
        packed: `pack(weight)`.
        bias: b [out] or None.
        activation: one of `EPILOGUES`.

    Returns:
        [*, out], in x's dtype.
    """
    if isinstance(x, FakeTensor):  # priced: as the kernel that it was lowered for
        return _onednn(x, weight, bias, activation)
    rows = math.prod(x.shape[:-1])
    own = refusal(x, activation) is None and rows * weight.numel() > 0
    if own and pick(rows, weight.shape[1], weight.shape[0], activation) == "onednn":
        return _onednn(x, packed, bias, activation)
    return _torch(x, weight, bias, activation)


def linear_act_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The same, written as the formula (float64 inside)."""
    y = x.double() @ weight.double().t()
    return act_(y if bias is None else y + bias.double(), activation).to(x.dtype)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return act_(F.linear(x, weight, bias), activation)


def _onednn(x: Tensor, packed: Any, bias: Tensor | None, activation: str) -> Tensor:
    name, algorithm = EPILOGUES[activation]
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, name, [], algorithm)
    return y
