"""Fused ops of int8 convolutions: the batch norm in their scale, the activation in the product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rewriter.kernels import int8_linear as int8
from rewriter.kernels.int8_conv import convolve
from rewriter.kernels.int8_cpu import THEN
from rewriter.kernels.linear_act import act_
from rewriter.lowering.fused import norm_of
from rewriter.lowering.rules import Fused, Place
from rewriter.modules.pointwise import Channels, inner
from rewriter.spellings import activation_name

__all__ = ["INT8_CONV", "INT8_CONV_ACT", "INT8_POINTWISE"]


def lowered_int8_conv(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, spatial: int,
    around: Sequence[tuple[int, int]], stride: Sequence[int], dilation: Sequence[int], groups: int,
    activation: str, then: str,
) -> Tensor:  # fmt: skip
    """then(s·scale·conv(q(x) − z, qweight) + bias)."""
    own = qweight, scale, bias
    return convolve(x, *own, spatial, around, stride, dilation, groups, activation, then)


def _normed(place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """q; scale·γ/√(σ²+ε); (b − μ)·γ/√(σ²+ε) + β."""
    layer, norm = inner(place.modules[0]), place.modules[1]
    held: Any = layer
    factor, shift = norm_of(norm, held.bias)
    dtype = held.scale.dtype
    return _integers(held), (held.scale.double() * factor).to(dtype), shift.to(dtype)


def _own(place: Place) -> tuple[Tensor | None, ...]:
    layer = place.modules[0]
    return _integers(layer), layer.scale, layer.bias


def _integers(layer: Any) -> Tensor:
    """int8, also of weights that are stored in fewer bits."""
    found: Tensor = layer.integers() if hasattr(layer, "integers") else layer.qweight
    return found


def _then(place: Place) -> str:
    """The activation at the end, by its name; "" without one."""
    return activation_name(place.match.nodes[-1], place.root) or ""


def _constants(place: Place) -> tuple[Any, ...]:
    layer = place.modules[0]
    return (*layer.geometry(), layer.activation, _then(place))


def _refused(place: Place, at: int) -> str | None:
    nodes = place.match.nodes
    if len(nodes) > at and activation_name(nodes[at], place.root) is None:
        return f"the options of the activation {nodes[at].name} are none that a fused op has"
    return None


def _no_norm(place: Place) -> str | None:
    x = place.input
    layer = place.modules[0]
    spatial = len(layer.kernel_size)
    if isinstance(x, Tensor) and x.dim() != spatial + 2:
        return "the input is one sample without a batch, which batch norm reads otherwise"
    return _refused(place, 2)


def _no_activation(place: Place) -> str | None:
    return _refused(place, 1)


INT8_CONV = Fused("int8_conv_norm", lowered_int8_conv, _normed, _constants, _no_norm)
INT8_CONV_ACT = Fused("int8_conv_act", lowered_int8_conv, _own, _constants, _no_activation)


# 1×1 convolutions --------------------------------------------------------------------------------


def lowered_int8_pointwise(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, spatial: int,
    stride: Sequence[int], last: bool, activation: str, then: str,
) -> Tensor:  # fmt: skip
    """then(int8_linear(…)) over channels, at every position."""
    channels = Channels(spatial, tuple(stride), last)
    rows = channels.rows(x)
    if then in THEN and then:
        y = int8.int8_linear_then(rows, qweight, scale, bias, activation, then)
    else:
        y = int8.int8_linear(rows, qweight, scale, bias, activation)
        y = act_(y, then) if then else y
    return channels.back(y, x)


def _pointwise_constants(place: Place) -> tuple[Any, ...]:
    outer = place.modules[0]
    channels: Channels = outer.channels
    given = channels.spatial, channels.stride, channels.last
    return (*given, outer.linear.activation, _then(place))


def _bound_pointwise(
    qweight: Tensor, scale: Tensor, bias: Tensor | None, spatial: int, stride: Sequence[int],
    last: bool, activation: str, then: str,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """The same, ready to run."""
    channels, behind = Channels(spatial, tuple(stride), last), "" if then in THEN else then
    product = int8.bound(qweight, scale, bias, activation, "" if behind else then)

    def run(x: Tensor) -> Tensor:
        y = product(channels.rows(x))
        return channels.back(act_(y, behind) if behind else y, x)

    return run


INT8_POINTWISE = Fused(
    "int8_pointwise_norm",
    lowered_int8_pointwise,
    _normed,
    _pointwise_constants,
    _no_norm,
    bind=_bound_pointwise,
)
