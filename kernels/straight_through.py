"""A product, or a convolution, of rounded weights that trains the weights themselves.

    straight_through(y, x, weight) = y,   ∂/∂y = g,   ∂/∂weight = gᵀ x
    straight_through_conv: the same, ∂/∂weight that of conv(x, weight)

y is what a kernel gave for x and for integers that were rounded from `weight`; its own gradient
reaches x and bias, and ends at the integers. This op hands the rest on: rounding counts as the
identity, that of the weights and that of x.

Source: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for
Conditional Computation" (the straight-through estimator).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import ops
from rewriter.kernels.common import outer, register_gradient, register_vmap

__all__ = ["straight_through", "straight_through_conv"]

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define("straight_through(Tensor y, Tensor x, Tensor weight) -> Tensor")
_LIB.define(
    "straight_through_conv(Tensor y, Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups) -> Tensor"
)


def straight_through(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y as it is, whose gradient g also gives weight gᵀ x.

    Args:
        y: [*, out_features].
        x: [*, in_features], whose gradient is y's affair: it gets none here.
        weight: [out_features, in_features]; its values are not read.

    Returns:
        A copy of y.

    Raises:
        ValueError: the shapes are not those of a product.
    """
    found: Tensor = torch.ops.rewriter.straight_through.default(y, x, weight)
    return found


def straight_through_conv(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """y as it is, whose gradient also gives weight that of a convolution.

    Args:
        y: [N, out_channels, H', W'].
        x: [N, in_channels, H, W], which gets no gradient here.
        weight: [out_channels, in_channels/groups, kH, kW]; its values are not read.
        stride, padding, dilation, groups: of the convolution that gave y.

    Returns:
        A copy of y.
    """
    found: Tensor = torch.ops.rewriter.straight_through_conv.default(
        y, x, weight, stride, padding, dilation, groups
    )
    return found


def _check(y: Tensor, x: Tensor, weight: Tensor) -> None:
    if weight.shape != (*y.shape[-1:], *x.shape[-1:]) or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"straight_through: y {list(y.shape)}, x {list(x.shape)} and weight "
            f"{list(weight.shape)} are not of one product"
        )


def _forward(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    _check(y, x, weight)
    return y.clone(memory_format=torch.contiguous_format)


def _reference(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The same function in plain torch, with the derivative of x @ weightᵀ in weight."""
    slope = (weight - weight.detach()).to(y.dtype)  # zero
    return y + x.detach().to(y.dtype) @ slope.t()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, weight = inputs
    ctx.save_for_backward(x)
    ctx.dtype = weight.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
    (x,) = ctx.saved_tensors
    wanted = ctx.needs_input_grad[2]
    return grad, None, outer(grad, x.to(grad.dtype)).to(ctx.dtype) if wanted else None


def _conv_forward(y: Tensor, x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    return y.clone()


def _conv_reference(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The same function in plain torch, with the derivative of the convolution in weight."""
    slope = (weight - weight.detach()).to(y.dtype)  # zero
    given = x.detach().to(y.dtype)
    return y + F.conv2d(given, slope, None, stride, padding, dilation, groups)


def _conv_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, weight, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, weight), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.geometry
    found = None
    if ctx.needs_input_grad[2]:
        _, found, _ = torch.ops.aten.convolution_backward(
            grad, x.to(grad.dtype), weight.to(grad.dtype), None, stride, padding, dilation, False,
            [0, 0], groups, [False, True, False],
        )  # fmt: skip
        found = found.to(weight.dtype)
    return grad, None, found, None, None, None, None


_LIB.impl("straight_through_conv", _conv_forward, "CompositeExplicitAutograd")
register_gradient(
    _LIB, "straight_through_conv", _conv_reference, _conv_setup_context, _conv_backward
)
register_vmap(_LIB, "straight_through_conv", _conv_reference)
torch.library.register_fake("rewriter::straight_through_conv", _conv_forward, lib=_LIB)

_LIB.impl("straight_through", _forward, "CompositeExplicitAutograd")
register_gradient(_LIB, "straight_through", _reference, _setup_context, _backward)
register_vmap(_LIB, "straight_through", _reference)
torch.library.register_fake("rewriter::straight_through", _forward, lib=_LIB)


def _as_it_is(y: Tensor, *rest: Any) -> Tensor:
    """For ONNX, which trains nothing."""
    return y.clone()


RECORD, CONV_RECORD = (
    ops.register(
        ops.Record(
            f"rewriter::{name}", kind="pointwise", unit="vector", reference=plain, onnx=_as_it_is
        )
    )
    for name, plain in (
        ("straight_through", _reference),
        ("straight_through_conv", _conv_reference),
    )
)
