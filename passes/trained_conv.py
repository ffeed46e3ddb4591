"""`TrainedConv1d` and `TrainedConv2d`: the convolutions of `Quantize` while their weights train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rewriter.base import Layer
from rewriter.errors import one_of
from rewriter.kernels.int8_conv import RANGES, as_images, int8_conv
from rewriter.kernels.straight_through import straight_through_conv
from rewriter.kernels.weight_levels import weight_levels
from rewriter.modules.conv_options import ConvOptions, Sizes

__all__ = ["CONVOLUTIONS_TRAIN_FOR", "TRAINED_CONVOLUTIONS", "TrainedConv1d", "TrainedConv2d"]

CONVOLUTIONS_TRAIN_FOR = "int8-dynamic"
"""The scheme whose rounding they train with."""


class _TrainedConv(ConvOptions, Layer):
    """What convolutions of one and of two dimensions have in common."""

    op = "trained_conv"
    plain: ClassVar[Any]
    weight: Any
    bias: Any
    stride: Any
    dilation: Any
    groups: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str = "per_sample",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        one_of(f"{type(self).__name__}: activation", activation, RANGES)
        with self._checked():
            self.plain.__init__(
                self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                bias, "zeros", device, dtype,
            )  # fmt: skip
        self.activation = activation

    @classmethod
    def from_conv(cls, conv: nn.Conv1d | nn.Conv2d, activation: str = "per_sample") -> Any:
        """The layer that trains a convolution that pads with zeros; Parameters are kept."""
        layer = cls._of(conv, activation)
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight if self.weight.dim() == 4 else self.weight.unsqueeze(-2)
        with torch.no_grad():
            q, scale, _ = weight_levels(weight)
        spatial = self.weight.dim() - 2
        x, geometry, back = as_images(
            input, spatial, self._around(), self.stride, self.dilation, self.groups
        )
        y = int8_conv(x, q, scale, self.bias, *geometry, self.activation)
        return back(straight_through_conv(y, x, weight, *geometry))

    def trained_for(self) -> Mapping[str, Any]:
        """The options of the `Quantize` that gives a layer of equal outputs."""
        activation = "per_token" if self.activation == "per_sample" else self.activation
        return {"scheme": CONVOLUTIONS_TRAIN_FOR, "activation": activation}

    def dense_weight(self) -> Tensor:
        """W rounded, of W's shape, without gradient."""
        with torch.no_grad():
            q, scale, _ = weight_levels(self.weight)
        return q * scale.view(-1, *[1] * (q.dim() - 1))


class TrainedConv1d(_TrainedConv, nn.Conv1d):
    """y = conv(q(x), Ŵ) + bias over one dimension; see `TrainedConv2d`."""

    plain = nn.Conv1d


class TrainedConv2d(_TrainedConv, nn.Conv2d):
    """y = conv(q(x), Ŵ) + bias with Ŵ = W rounded to 8 bits; W trains; see `TrainedLinear`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of
            `nn.Conv2d`; what is padded are zeros.
        activation: as of `QuantizedConv2d`.
        device, dtype: of the parameters.

    Attributes:
        weight: W, [out_channels, in_channels/groups, kH, kW].
        bias: [out_channels] or None.

    Raises:
        OptionError: unknown `activation` or `padding`, or groups that do not divide the channels.
    """

    plain = nn.Conv2d


TRAINED_CONVOLUTIONS: Mapping[int, Any] = {1: TrainedConv1d, 2: TrainedConv2d}
"""Dimensions → the layer."""
