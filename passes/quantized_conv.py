"""Convolutions with int8 weights, and activations quantized at run time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from rewriter.base import Layer, Skip
from rewriter.errors import one_of
from rewriter.kernels.int8_conv import RANGES, convolve, kernel_name
from rewriter.kernels.int8_linear import quantize_weight
from rewriter.layer import RoundedWeight
from rewriter.modules.conv_options import ConvOptions, Sizes
from rewriter.passes.quantize import Quantize
from rewriter.passes.trained_conv import TrainedConv1d, TrainedConv2d
from rewriter.sites import Site

__all__ = [
    "CONVOLUTIONS",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "conv_of_trained",
    "convolution",
    "int8_conv",
    "range_of_convolution",
]

_OPTIONS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "transposed", "output_padding", "padding_mode", "_reversed_padding_repeated_twice",
)  # fmt: skip
"""What code asks a convolution of torch's for."""


class _QuantizedConv(ConvOptions, RoundedWeight):
    """What convolutions of one and of two dimensions have in common.

    Attributes:
        qweight: [out_channels, in_channels/groups, kH, kW] int8, of one dimension with kH = 1.
        scale: [out_channels].
        bias: [out_channels] or None.
    """

    op = "int8_conv"
    spatial: ClassVar[int]
    in_channels: Any
    out_channels: Any
    groups: Any
    kernel_size: Any
    stride: Any
    dilation: Any
    bias: Any
    qweight: Tensor
    scale: Tensor

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
        channels_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        RoundedWeight.__init__(self)
        one_of(f"{type(self).__name__}: activation", activation, RANGES)
        with self._checked():
            like = self.plain(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False,
                "zeros", "meta",
            )  # fmt: skip
        vars(self).update({name: getattr(like, name) for name in _OPTIONS})
        self.activation, self.channels_last = activation, channels_last
        shape = self.dense_shape()
        bound = 1 / math.sqrt(max(math.prod(shape[1:]), 1))
        self.hold(torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound))
        self.register_bias(out_channels if bias else None, device, dtype)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_conv(cls, conv: nn.Conv1d | nn.Conv2d, activation: str = "per_sample") -> Any:
        """The layer closest to a convolution that pads with zeros; its bias is kept, not copied."""
        last = suggest_memory_format(conv.weight) == torch.channels_last
        layer = cls._of(conv, activation, channels_last=last)
        layer.hold(conv.weight.detach())
        layer.bias = conv.bias
        return layer

    def rounded(self, weight: Tensor) -> Mapping[str, Tensor | None]:
        q, scale = quantize_weight(weight.flatten(1))
        shape = (*weight.shape[:2], *[1] * (2 - self.spatial), *weight.shape[2:])
        last = torch.channels_last if self.channels_last else torch.contiguous_format
        return {"qweight": q.view(shape).contiguous(memory_format=last), "scale": scale}

    def geometry(self) -> tuple[Any, ...]:
        """What `convolve` is to know beside the tensors: dimensions, padding, stride, dilation and
        groups."""
        return self.spatial, self._around(), [*self.stride], [*self.dilation], self.groups

    def forward(self, input: Tensor) -> Tensor:
        own: Any = (*self.geometry(), self.activation)
        return convolve(input, self.qweight, self.scale, self.bias, *own)

    def dense_weight(self) -> Tensor:
        """W = qweight·scale, [out_channels, in_channels/groups, *kernel_size]."""
        weight = self.qweight.to(self.scale.dtype) * self.scale.view(-1, 1, 1, 1)
        return weight if self.spatial == 2 else weight.squeeze(2)

    def dense_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def kernel(self, tokens: int) -> str:
        return kernel_name(self.qweight.device, self.scale.dtype)

    def held_bytes(self, tokens: int) -> int:
        return self.qweight.numel() if self.kernel(tokens) == "onednn" else 0


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """y = s·scale[:, None]·(conv(q(x)) − z) + bias over one dimension; see `QuantizedConv2d`."""

    plain = nn.Conv1d
    spatial = 1


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """y = s·scale[:, None, None]·conv(q(x) − z, qweight) + bias, q rounding x to 256 levels.

    The weights are buffers: they do not train. Gradients reach x (straight-through) and bias. A
    zero is one of the levels, so that padding is exact.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of
            `nn.Conv2d`; what is padded are zeros.
        activation: "per_sample" finds a range for each sample, "per_tensor" one for the batch.
        channels_last: the result's memory is, whatever that of the input.
        device: of all tensors.
        dtype: of bias, and of the weights before quantization; scale is float32 or wider.

    Attributes:
        qweight: [out_channels, in_channels/groups, kH, kW] int8.
        scale: [out_channels].
        bias: [out_channels] or None.

    Raises:
        OptionError: unknown `activation` or `padding`, or groups that do not divide the channels.
    """

    plain = nn.Conv2d
    spatial = 2


CONVOLUTIONS: Mapping[int, Any] = {1: QuantizedConv1d, 2: QuantizedConv2d}
"""Dimensions → the layer."""

_TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d


def convolution(site: Site) -> nn.Conv1d | nn.Conv2d | Skip:
    """The convolution at a site, where an int8 kernel computes its kind."""
    conv = site.module
    if isinstance(conv, _TRANSPOSED):
        return Skip("it is transposed: no int8 kernel computes one")
    if site.weight.dim() - 2 not in CONVOLUTIONS:
        return Skip(
            "it has {} dimensions: no int8 kernel takes more than two", site.weight.dim() - 2
        )
    assert isinstance(conv, nn.Conv1d | nn.Conv2d)
    if conv.padding_mode != "zeros":
        return Skip("padding_mode={!r}: int8 kernels pad with zeros", conv.padding_mode)
    return conv


def range_of_convolution(activation: str) -> str:
    """What a convolution calls it: it has no tokens."""
    return "per_sample" if activation == "per_token" else activation


def int8_conv(site: Site, quantize: Quantize) -> Layer | Skip:
    """What schemes of int8 weights and activations put in a convolution's place."""
    conv = convolution(site)
    if isinstance(conv, Skip):
        return conv
    cls = CONVOLUTIONS[conv.weight.dim() - 2]
    layer: Layer = cls.from_conv(conv, range_of_convolution(quantize.activation))
    return layer


def conv_of_trained(conv: TrainedConv1d | TrainedConv2d) -> Layer:
    """The convolution of int8 weights whose outputs are equal."""
    layer: Layer = CONVOLUTIONS[conv.weight.dim() - 2].from_conv(conv, conv.activation)
    return layer
