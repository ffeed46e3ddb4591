"""int8-dynamic: int8 weights with a scale per output channel, activations quantized at run time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.base import Layer
from rewriter.errors import one_of
from rewriter.kernels.int8_linear import (
    ACTIVATIONS,
    PACKED,
    dequantize_weight,
    int8_linear,
    kernel_name,
    quantize_weight,
)
from rewriter.layer import RoundedLinear
from rewriter.passes.monarch import MonarchLinear
from rewriter.passes.quantize import Activation, Quantize, Scheme, register
from rewriter.passes.quantized_conv import conv_of_trained, int8_conv
from rewriter.passes.quantized_embedding import int8_embedding
from rewriter.passes.quantized_monarch import int8_monarch
from rewriter.passes.trained import TrainedLinear, trained
from rewriter.passes.trained_conv import TrainedConv1d, TrainedConv2d
from rewriter.sites import CONV, EMBEDDING, LINEAR, Site

__all__ = ["QuantizedLinear"]


class QuantizedLinear(RoundedLinear):
    """y = q(x) @ (qweight·scale[:, None])ᵀ + bias, with q rounding x to 256 levels at run time.

    The weights are buffers: they do not train, and without a bias the layer has no parameters (take
    device and dtype from a buffer where `next(layer.parameters())` would have nothing to give).
    Gradients reach x (straight-through) and bias.
    `.to(bfloat16)` rounds `scale` as well; the GEMM stays int8.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether there is a bias.
        activation: "per_token" finds a range for each row of x, "per_tensor" one for all of x.
        device: of all tensors.
        dtype: of bias, and of the weights before quantization; scale is float32 or wider.

    Attributes:
        qweight: [out_features, in_features] int8.
        scale: [out_features].
        bias: [out_features] or None.

    Raises:
        OptionError: unknown `activation`.
    """

    op = "int8_linear"
    qweight: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: Activation = "per_token",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("QuantizedLinear: activation", activation, ACTIVATIONS)
        self.in_features, self.out_features = in_features, out_features
        self.activation: Activation = activation
        bound = 1 / math.sqrt(max(in_features, 1))
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.hold(weight.uniform_(-bound, bound))
        self.register_bias(out_features if bias else None, device, dtype)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None, activation: Activation = "per_token"
    ) -> QuantizedLinear:
        """The layer closest to weight [out, in]; a bias that is a Parameter is kept, not copied."""
        layer: QuantizedLinear = cls.closest(weight, bias, activation=activation)
        return layer

    @classmethod
    def from_quantized(
        cls,
        qweight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        activation: Activation = "per_token",
    ) -> QuantizedLinear:
        """The layer of levels that are chosen already: qweight [out, in] int8, scale [out]."""
        levels = {"qweight": qweight, "scale": scale}
        layer: QuantizedLinear = cls.of_levels(levels, qweight.shape, bias, activation=activation)
        return layer

    def rounded(self, weight: Tensor) -> Mapping[str, Tensor | None]:
        return dict(zip(self.levels, quantize_weight(weight), strict=True))

    def forward(self, input: Tensor) -> Tensor:
        return int8_linear(input, self.qweight, self.scale, self.bias, self.activation)

    def dense_weight(self) -> Tensor:
        """W = qweight·scale[:, None], [out_features, in_features]."""
        return dequantize_weight(self.qweight, self.scale)

    def kernel(self, tokens: int) -> str:
        return kernel_name(
            tokens,
            self.in_features,
            self.out_features,
            self.activation,
            self.qweight.device,
            self.scale.dtype,
        )

    def held_bytes(self, tokens: int) -> int:
        return self.qweight.numel() if self.kernel(tokens) in PACKED else 0


def _linear(site: Site, quantize: Quantize) -> Layer:
    return QuantizedLinear.from_weight(site.weight, site.bias, quantize.activation)


def _of_trained(layer: TrainedLinear) -> Layer:
    qweight, scale, _ = layer.levels()
    activation: Any = layer.activation
    return QuantizedLinear.from_quantized(qweight, scale, layer.bias, activation)


register(
    Scheme(
        "int8-dynamic",
        bits=8,
        dtype=torch.int8,
        storage=torch.int8,
        layers={
            LINEAR: _linear,
            MonarchLinear: int8_monarch,
            TrainedLinear: trained(_of_trained),
            TrainedConv1d: trained(conv_of_trained),
            TrainedConv2d: trained(conv_of_trained),
            EMBEDDING: int8_embedding,
            CONV: int8_conv,
        },
        options=("activation", "embeddings", "convolutions"),
    )
)
