"""The form of MLPs of which only some experts are computed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import sparse
from rewriter.kernels.sparse_experts import ExpertMlp, largest_share, sparse_experts
from rewriter.lowering.rules import Fused, Place
from rewriter.lowering.sparse_gated import layers_of

__all__ = ["SPARSE_EXPERTS"]


def _layers(place: Place) -> tuple[Any, Any, Any]:
    return layers_of(place, ("routed_linear",))


def _tensors(place: Place) -> list[Tensor | None]:
    gate, up, down = _layers(place)
    own = gate.router, gate.router_bias, gate.expert_of, gate.weight, gate.bias
    other = (None, None) if up is None else (up.weight, up.bias)
    return [*own, *other, down.weight, down.weight.detach().t().contiguous(), down.bias]


def _options(place: Place) -> tuple[Any, ...]:
    gate = _layers(place)[0]
    return gate.then, gate.active


def _unlike(place: Place) -> str | None:
    if (reason := sparse.refusal()) is not None:
        return reason
    layers = [m for m in _layers(place) if m is not None]
    kinds = {(m.weight.dtype, m.weight.device.type) for m in layers}
    if len(kinds) > 1 or not kinds <= {(torch.float32, "cpu"), (torch.bfloat16, "cpu")}:
        return "the compiled kernel takes weights of float32 or bfloat16 on a CPU"
    return None


def _slow(place: Place, x: Tensor) -> str | None:
    gate, up, down = _layers(place)
    rows = math.prod(x.shape[:-1]) or 1
    sizes = gate.in_features, gate.out_features, down.out_features
    some = {1, min(rows, sparse.MOST_ROWS)}
    most = max(largest_share(x.dtype, n, *sizes, gated=up is not None) for n in some)
    if most >= gate.share:
        return None
    return f"dense products are faster here where {gate.share:.0%} of the neurons are active"


def _one_expert(place: Place) -> float:
    """A layer in front that rounds another way may bring another expert before a token."""
    return 1e-2


def _sparse_experts(x: Tensor, *own: Any) -> Tensor:
    return sparse_experts(x, ExpertMlp(*own))


SPARSE_EXPERTS = Fused(
    "sparse_experts", _sparse_experts, _tensors, _options, _unlike, _slow, error=_one_expert
)
