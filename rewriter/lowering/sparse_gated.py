"""The form of gated MLPs of which only the neurons with a large gate are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import sparse, sparse_gpu
from rewriter.kernels.sparse_gated import GatedMlp, largest_share, sparse_gated
from rewriter.lowering.rules import Fused, Place

__all__ = ["GATES", "SPARSE_GATED", "layers_of"]

GATES = ("gate_linear", "int8_gate_linear")
"""What layers of gates are called, of floats and of int8."""


_DTYPES = torch.float32, torch.bfloat16, torch.int8


def layers_of(place: Place, gates: Sequence[str] = GATES) -> tuple[Any, Any, Any]:
    """gate, up (None in a plain MLP) and down, in whichever order they are called."""
    layers = [m for m in place.modules if hasattr(m, "in_features")]
    gate = next(m for m in layers if getattr(m, "op", "") in gates)
    return gate, next((m for m in layers[:-1] if m is not gate), None), layers[-1]


def _weight(layer: Any) -> tuple[Tensor, Tensor | None]:
    """What a layer multiplies by, and the scale of one of integers."""
    scale = getattr(layer, "scale", None)
    return (layer.weight, None) if scale is None else (layer.qweight, scale)


def _tensors(place: Place) -> list[Tensor | None]:
    gate, up, down = layers_of(place)
    last, scale = _weight(down)
    return [
        *_weight(gate),
        gate.bias,
        gate.threshold,
        *_weight(up),
        up.bias,
        last,
        scale,
        last.detach().t().contiguous(),
        down.bias,
    ]


def _options(place: Place) -> tuple[Any, ...]:
    gate = layers_of(place)[0]
    return gate.then, gate.k, 1.0 if gate.share is None else gate.share


def _unlike(place: Place) -> str | None:
    weights = [_weight(m)[0] for m in layers_of(place)]
    kinds = {(w.dtype, w.device) for w in weights}
    dtype, device = kinds.pop()
    if not kinds and device.type == "cuda":
        return sparse_gpu.refusal(device, dtype)
    if (reason := sparse.refusal()) is not None:
        return reason
    if kinds or device.type != "cpu" or dtype not in _DTYPES:
        return "the compiled kernel takes weights of float32, bfloat16 or int8 on a CPU"
    return None


def _slow(place: Place, x: Tensor) -> str | None:
    gate, _, down = layers_of(place)
    rows = math.prod(x.shape[:-1]) or 1
    sizes = gate.in_features, gate.out_features, down.out_features
    share, dtype = 1.0 if gate.share is None else gate.share, _weight(gate)[0].dtype

    def pays(n: int) -> bool:
        if not x.is_cuda:
            return largest_share(dtype, n, *sizes) >= share
        width, hidden, out = sizes
        size = sparse_gpu.GatedSize(n, out, hidden, width, x.dtype, x.device)
        return sparse_gpu.choice(size).most >= sparse_gpu.union(share, n)

    if any(map(pays, {1, min(rows, sparse.MOST_ROWS)})):
        return None
    return f"dense products are faster here where {share:.0%} of the neurons are active"


def _one_neuron(place: Place) -> float:
    """A product that rounds another way may put another neuron over the threshold."""
    return 1e-2


def _sparse_gated(x: Tensor, *own: Any) -> Tensor:
    return sparse_gated(x, GatedMlp(*own))


SPARSE_GATED = Fused(
    "sparse_gated", _sparse_gated, _tensors, _options, _unlike, _slow, error=_one_neuron
)
