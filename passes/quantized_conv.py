"""Convolutions with weights of 8 or 4 bits, and activations quantized at run time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from rewriter.base import Layer, Skip
from rewriter.errors import one_of, warn
from rewriter.kernels.int8_conv import RANGES, convolve, kernel_name
from rewriter.kernels.nibbles import pack_rows, unpack_rows
from rewriter.kernels.weight_levels import quantize_rows
from rewriter.layer import RoundedWeight
from rewriter.modules.conv_options import ConvOptions, Sizes
from rewriter.passes.quantize import Quantize
from rewriter.passes.trained_conv import TrainedConv1d, TrainedConv2d
from rewriter.sites import Site

__all__ = [
    "CONVOLUTIONS",
    "Int4Conv1d",
    "Int4Conv2d",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "conv_of_trained",
    "convolution",
    "int4_conv",
    "int8_conv",
    "range_of_convolution",
]

_OPTIONS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "transposed", "output_padding", "padding_mode", "_reversed_padding_repeated_twice",
)  # fmt: skip
"""What code asks a convolution of torch's for."""


class _QuantizedConv(ConvOptions, RoundedWeight):
    """What convolutions of one and of two dimensions, of 8 and of 4 bits, have in common.

    Attributes:
        qweight: [out_channels, in_channels/groups, kH, kW] int8, of one dimension with kH = 1; of
            4 bits what `pack_rows` makes of that.
        scale: [out_channels].
        bias: [out_channels] or None.
    """

    op = "int8_conv"
    bits: ClassVar[int] = 8
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
        return cls.of_levels(conv, *quantize_rows(conv.weight.flatten(1), cls.bits), activation)

    @classmethod
    def of_levels(
        cls, conv: nn.Conv1d | nn.Conv2d, q: Tensor, scale: Tensor, activation: str = "per_sample"
    ) -> Any:
        """The layer of levels that are chosen already.

        Args:
            conv: the convolution in whose place it is; its bias is kept, not copied.
            q: of the shape of conv's weight, or as rows, integers of so many bits.
            scale: [out_channels].
            activation: as of the layer.
        """
        last = suggest_memory_format(conv.weight) == torch.channels_last
        layer = cls._of(conv, activation, channels_last=last)
        layer._keep(layer._stored(q, scale))
        layer.bias = conv.bias
        return layer

    def rounded(self, weight: Tensor) -> Mapping[str, Tensor | None]:
        return self._stored(*quantize_rows(weight.flatten(1), self.bits))

    def integers(self) -> Tensor:
        """q, [out_channels, in_channels/groups, kH, kW] int8; of one dimension with kH = 1."""
        return self.qweight

    def _stored(self, q: Tensor, scale: Tensor) -> Mapping[str, Tensor | None]:
        """The buffers of levels."""
        return {"qweight": self._laid_out(q), "scale": scale}

    def _laid_out(self, q: Tensor) -> Tensor:
        """Levels of any shape as a convolution of images has them, in the memory format of ours."""
        last = torch.channels_last if self.channels_last else torch.contiguous_format
        return q.reshape(self._as_image()).contiguous(memory_format=last)

    def _as_image(self) -> tuple[int, ...]:
        """The shape of `integers`."""
        out, inside, *kernel = self.dense_shape()
        return out, inside, *[1] * (2 - self.spatial), *kernel

    def geometry(self) -> tuple[Any, ...]:
        """What `convolve` is to know beside the tensors: dimensions, padding, stride, dilation and
        groups."""
        return self.spatial, self._around(), [*self.stride], [*self.dilation], self.groups

    def forward(self, input: Tensor) -> Tensor:
        own: Any = (*self.geometry(), self.activation)
        return convolve(input, self.qweight, self.scale, self.bias, *own)

    def dense_weight(self) -> Tensor:
        """W = q·scale, [out_channels, in_channels/groups, *kernel_size]."""
        weight = self.integers().to(self.scale.dtype) * self.scale.view(-1, 1, 1, 1)
        return weight if self.spatial == 2 else weight.squeeze(2)

    def dense_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def kernel(self, tokens: int) -> str:
        return kernel_name(self.qweight.device, self.scale.dtype)

    def held_bytes(self, tokens: int) -> int:
        return math.prod(self.dense_shape()) if self.kernel(tokens) == "onednn" else 0


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


class _Int4Conv(_QuantizedConv):
    """What those of 4 bits have in common."""

    op = "int4_conv"
    bits = 4
    packed = {"qweight": 2}

    def _stored(self, q: Tensor, scale: Tensor) -> Mapping[str, Tensor | None]:
        return {"qweight": pack_rows(q), "scale": scale}

    def integers(self) -> Tensor:
        return self._laid_out(unpack_rows(self.qweight, self._as_image()[1:]))

    def forward(self, input: Tensor) -> Tensor:
        own: Any = (*self.geometry(), self.activation)
        more: Any = {"kernel_size": self.kernel_size, "last": self.channels_last}
        return convolve(input, self.qweight, self.scale, self.bias, *own, **more)


class Int4Conv1d(_Int4Conv, QuantizedConv1d):
    """y = s·scale[:, None]·(conv(q(x)) − z) + bias over one dimension; see `Int4Conv2d`."""


class Int4Conv2d(_Int4Conv, QuantizedConv2d):
    """y = s·scale[:, None, None]·conv(q(x) − z, q) + bias, as `QuantizedConv2d` with q in −8 … 7.

    Two weights are stored in a byte. The kernels are those of 8 bits: each makes a layout of its
    own of the weights, once, which is not saved. So these layers take half the bytes on disk, and
    the time of 8 bits.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of
            `nn.Conv2d`; what is padded are zeros.
        activation, channels_last: as of `QuantizedConv2d`.
        device: of all tensors.
        dtype: of bias, and of the weights before quantization; scale is float32 or wider.

    Attributes:
        qweight: [out_channels, ⌈in_channels/groups·kH·kW/2⌉] uint8, of
            `rewriter.kernels.nibbles.pack_rows`.
        scale: [out_channels].
        bias: [out_channels] or None.

    Raises:
        OptionError: as of `QuantizedConv2d`.
    """


CONVOLUTIONS: Mapping[int, Mapping[int, Any]] = {
    8: {1: QuantizedConv1d, 2: QuantizedConv2d},
    4: {1: Int4Conv1d, 2: Int4Conv2d},
}
"""Bits of a weight → dimensions → the layer."""

_TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d


def convolution(site: Site) -> nn.Conv1d | nn.Conv2d | Skip:
    """The convolution at a site, where an int8 kernel computes its kind."""
    conv = site.module
    if isinstance(conv, _TRANSPOSED):
        return Skip("it is transposed: no int8 kernel computes one")
    if site.weight.dim() - 2 not in CONVOLUTIONS[8]:
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
    return _of_bits(8, site, quantize)


def int4_conv(site: Site, quantize: Quantize) -> Layer | Skip:
    """What schemes of 4-bit weights and int8 activations put in a convolution's place."""
    if quantize.method != "round":
        warn(
            f"{quantize}: method={quantize.method!r} fits the weights of linear layers; those of "
            "convolutions are rounded to the nearest level"
        )
    return _of_bits(4, site, quantize)


def _of_bits(bits: int, site: Site, quantize: Quantize) -> Layer | Skip:
    conv = convolution(site)
    if isinstance(conv, Skip):
        return conv
    cls = CONVOLUTIONS[bits][conv.weight.dim() - 2]
    layer: Layer = cls.from_conv(conv, range_of_convolution(quantize.activation))
    return layer


def conv_of_trained(conv: TrainedConv1d | TrainedConv2d) -> Layer:
    """The convolution of integer weights whose outputs are equal."""
    cls = CONVOLUTIONS[conv.bits][conv.weight.dim() - 2]
    layer: Layer = cls.of_levels(conv, *conv.levels(), conv.activation)
    return layer
