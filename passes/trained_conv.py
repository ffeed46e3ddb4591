"""`TrainedConv1d` and `TrainedConv2d`: the convolutions of `Quantize` while their weights train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rewriter.base import Layer
from rewriter.errors import of_type, one_of
from rewriter.kernels.int8_conv import RANGES, as_images, int8_conv
from rewriter.kernels.straight_through import straight_through_conv
from rewriter.kernels.weight_levels import first_step, stepped, weight_levels
from rewriter.modules.conv_options import ConvOptions, Sizes

__all__ = ["CONVOLUTIONS_TRAIN_FOR", "TRAINED_CONVOLUTIONS", "TrainedConv1d", "TrainedConv2d"]

CONVOLUTIONS_TRAIN_FOR: Mapping[str, int] = {"int8-dynamic": 8, "int4-dynamic": 4}
"""The schemes whose rounding they train with, and the bits of a weight."""


class _TrainedConv(ConvOptions, Layer):
    """What convolutions of one and of two dimensions have in common."""

    op = "trained_conv"
    plain: ClassVar[Any]
    weight: Any
    bias: Any
    step: nn.Parameter | None
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
        scheme: str = "int8-dynamic",
        learned_step: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        one_of(f"{name}: activation", activation, RANGES)
        one_of(f"{name}: scheme", scheme, CONVOLUTIONS_TRAIN_FOR)
        of_type(name, "learned_step", learned_step, bool, "True or False")
        with self._checked():
            self.plain.__init__(
                self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                bias, "zeros", device, dtype,
            )  # fmt: skip
        self.activation, self.scheme, self.learned_step = activation, scheme, learned_step
        self.register_parameter("step", self._first_step() if learned_step else None)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv1d | nn.Conv2d, activation: str = "per_sample", **options: Any
    ) -> Any:
        """The layer that trains a convolution that pads with zeros; Parameters are kept.

        Args:
            options: `scheme`, `learned_step`.
        """
        layer = cls._of(conv, activation, **options)
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.step = layer._first_step() if layer.learned_step else None
        return layer

    @property
    def bits(self) -> int:
        """Of a weight."""
        return CONVOLUTIONS_TRAIN_FOR[self.scheme]

    def levels(self) -> tuple[Tensor, Tensor]:
        """q, of W's shape and memory format, and scale [out_channels], of the layer of integers. No
        gradient passes."""
        with torch.no_grad():
            return weight_levels(self.weight, self.step, bits=self.bits)[:2]

    def forward(self, input: Tensor) -> Tensor:
        q, scale = self.levels()
        slope = self.weight
        if self.step is not None:
            slope = stepped(self.weight, self.step, q, scale, self.bits)
        if self.weight.dim() == 3:  # a row is an image of height 1
            q, slope = q.unsqueeze(-2), slope.unsqueeze(-2)
        spatial = self.weight.dim() - 2
        x, geometry, back = as_images(
            input, spatial, self._around(), self.stride, self.dilation, self.groups
        )
        y = int8_conv(x, q, scale, self.bias, *geometry, self.activation)
        return back(straight_through_conv(y, x, slope, *geometry))

    def trained_for(self) -> Mapping[str, Any]:
        """The options of the `Quantize` that gives a layer of equal outputs."""
        if self.bits == 4:  # which has no other range
            return {"scheme": self.scheme}
        activation = "per_token" if self.activation == "per_sample" else self.activation
        return {"scheme": self.scheme, "activation": activation}

    def dense_weight(self) -> Tensor:
        """W rounded, of W's shape, without gradient."""
        q, scale = self.levels()
        return q * scale.view(-1, *[1] * (q.dim() - 1))

    def _first_step(self) -> nn.Parameter:
        return nn.Parameter(first_step(self.weight, self.bits))


class TrainedConv1d(_TrainedConv, nn.Conv1d):
    """y = conv(q(x), Ŵ) + bias over one dimension; see `TrainedConv2d`."""

    plain = nn.Conv1d


class TrainedConv2d(_TrainedConv, nn.Conv2d):
    """y = conv(q(x), Ŵ) + bias with Ŵ = W rounded to 8 or 4 bits; W trains; see `TrainedLinear`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of
            `nn.Conv2d`; what is padded are zeros.
        activation: as of `QuantizedConv2d`.
        scheme: "int8-dynamic" or "int4-dynamic".
        learned_step: whether steps are parameters, and not those of the largest weights.
        device, dtype: of the parameters.

    Attributes:
        weight: W, [out_channels, in_channels/groups, kH, kW].
        step: [out_channels]; None without `learned_step`.
        bias: [out_channels] or None.

    Raises:
        OptionError: unknown `activation`, `scheme` or `padding`, or groups that do not divide the
            channels.
    """

    plain = nn.Conv2d


TRAINED_CONVOLUTIONS: Mapping[int, Any] = {1: TrainedConv1d, 2: TrainedConv2d}
"""Dimensions → the layer."""
