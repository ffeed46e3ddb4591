"""The form for graphs of layers whose weights alone are integers, of 8 bits or of 4."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rewriter.kernels import native_ops, weight_bound, weight_only
from rewriter.kernels.native_ops import InGraph
from rewriter.lowering.rules import Fused, Place

__all__ = ["WEIGHT_ALONE"]


def weight_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, op: str
) -> Tensor:
    """x @ wᵀ + bias by the op of this name."""
    if op == "int8_weight_linear":
        return weight_only.int8_weight_linear(x, weight, scale, bias)
    run = weight_only.int4_linear if op == "int4_linear" else weight_only.int4_dynamic_linear
    return run(x, weight, scale, zero, bias)


def _operands(place: Place) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    layer = place.modules[0]
    bias = None if layer.bias is None else layer.bias.detach()
    return layer.qweight, layer.scale, getattr(layer, "zero", None), bias


def _op(place: Place) -> tuple[str]:
    layer = place.modules[0]
    return ("int4_dynamic_linear" if getattr(layer, "dynamic", False) else layer.op,)


def _unlike(place: Place) -> str | None:
    if weight_bound.fits(*_operands(place)):
        return None
    return "the compiled kernel does not take tensors of this dtype, device or layout"


def _slow(place: Place, x: Tensor) -> str | None:
    rows = math.prod(x.shape[:-1])
    if rows and x.is_cpu and place.modules[0].kernel(rows) == "native":
        return None
    return "the kernel that is the fastest here is none that compiled code calls"


@dataclass(frozen=True)
class _Bound:
    """The product as a graph has it."""

    operands: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    op: str

    def __call__(self, x: Tensor) -> Tensor:
        return weight_linear(x, *self.operands, self.op)

    def in_graph(self) -> InGraph | None:
        if native_ops.refusal() is not None:
            return None
        there = [t is not None for t in self.operands]

        def call(held: Any, x: Tensor) -> Tensor:
            each = iter(held)
            weight, scale, zero, bias = (next(each) if given else None for given in there)
            return native_ops.weight_only(self.op, x, weight, scale, zero, bias)  # type: ignore[arg-type]

        return InGraph(tuple(t for t in self.operands if t is not None), call, borrowed=True)


def _bound(
    weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, op: str
) -> _Bound:
    return _Bound((weight, scale, zero, bias), op)


WEIGHT_ALONE = Fused("weight_linear_alone", weight_linear, _operands, _op, _unlike, _slow, _bound)
