"""Schemes of `Quantize` that leave activations alone: weights of 8 bits with a scale per output
channel, of 4 bits with one per group; and of 4 bits on activations of 8, convolutions too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rewriter.base import Layer
from rewriter.errors import OptionError, one_of, warn
from rewriter.kernels.compensation import METHODS, Groups
from rewriter.kernels.int8_linear import dequantize_weight, quantize_weight
from rewriter.kernels.rotation import matrix
from rewriter.kernels.weight_only import (
    GROUP_SIZES,
    check_width,
    dequantize_packed,
    int4_dynamic_linear,
    int4_linear,
    int8_weight_linear,
    kernel_name,
)
from rewriter.layer import RoundedLinear
from rewriter.passes.quantize import Maker, Method, Quantize, Scheme, register
from rewriter.passes.quantized_conv import conv_of_trained, int4_conv
from rewriter.passes.quantized_embedding import (
    FOUR_BITS,
    NEAREST,
    four_bits,
    int4_embedding,
    int8_embedding,
)
from rewriter.passes.sparse_weight_only import Int8GateLinear, SparseInt4Linear, SparseInt8Linear
from rewriter.passes.sparsegate import GateLinear
from rewriter.passes.threshold_linear import ThresholdLinear
from rewriter.passes.topk import TopKLinear
from rewriter.passes.trained import TrainedLinear, trained
from rewriter.passes.trained_conv import TrainedConv1d, TrainedConv2d
from rewriter.sites import CONV, EMBEDDING, LINEAR, Kind, Site

__all__ = ["Int4Linear", "Int8WeightLinear"]


class Int8WeightLinear(RoundedLinear):
    """y = x @ (qweight·scale[:, None])ᵀ + bias, with x as it is.

    The weights are buffers: they do not train. Gradients reach x and bias.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether there is a bias.
        device: of all tensors.
        dtype: of bias, and of the weights before quantization; scale is float32 or wider.

    Attributes:
        qweight: [out_features, in_features] int8.
        scale: [out_features].
        bias: [out_features] or None.
    """

    op = "int8_weight_linear"
    qweight: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_bias(out_features if bias else None, device, dtype)
        self.hold(self.drawn_weight(device, dtype))

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> Int8WeightLinear:
        """The layer closest to weight [out, in]; a bias that is a Parameter is kept, not copied."""
        layer: Int8WeightLinear = cls.closest(weight, bias)
        return layer

    @classmethod
    def from_quantized(
        cls, qweight: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Int8WeightLinear:
        """The layer of levels that are chosen already: qweight [out, in] int8, scale [out]."""
        levels = {"qweight": qweight, "scale": scale}
        layer: Int8WeightLinear = cls.of_levels(levels, qweight.shape, bias)
        return layer

    def rounded(self, weight: Tensor) -> Mapping[str, Tensor | None]:
        return dict(zip(self.levels, quantize_weight(weight), strict=True))

    def forward(self, input: Tensor) -> Tensor:
        return int8_weight_linear(input, self.qweight, self.scale, self.bias)

    def dense_weight(self) -> Tensor:
        """W = qweight·scale[:, None], [out_features, in_features]."""
        return dequantize_weight(self.qweight, self.scale)

    def kernel(self, tokens: int) -> str:
        return kernel_name(self.op, tokens, self.out_features, self.in_features, 0, self.qweight)


class Int4Linear(RoundedLinear):
    """y = x @ Wᵀ + bias with w[n,k] = q[n,k]·scale[n,g] + zero[n,g], q in −8 … 7, two in a byte.

    The weights are buffers: they do not train. Gradients reach x (straight-through) and bias.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether there is a bias.
        group_size: weights of a row that share a scale: 32, 64 or 128. Where it does not divide
            `in_features`, the last group is stored filled up.
        symmetric: whether there is no zero.
        dynamic: x is rounded to 8 bits at run time, with a scale for each row and group, and the
            products are of integers.
        device: of all tensors.
        dtype: of bias, and of the weights before quantization.

    Attributes:
        packed: [out_features, groups·group_size/2] uint8, as `rewriter.kernels.weight_only` says.
        scale: [out_features, groups] bfloat16, or float64 for weights in float64.
        zero: as scale, or None.
        bias: [out_features] or None.

    Raises:
        OptionError: unknown `group_size`.
    """

    op = "int4_linear"
    packed = {"qweight": 2}
    levels = FOUR_BITS
    fits = True
    remark = NEAREST
    qweight: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int = 64,
        symmetric: bool = True,
        dynamic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("Int4Linear: group_size", group_size, GROUP_SIZES)
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.symmetric, self.dynamic = group_size, symmetric, dynamic
        self.register_bias(out_features if bias else None, device, dtype)
        self.hold(self.drawn_weight(device, dtype))

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        group_size: int = 64,
        symmetric: bool = True,
        dynamic: bool = False,
    ) -> Int4Linear:
        """The layer closest to weight [out, in], level by level; a bias that is a Parameter is
        kept, not copied."""
        one_of("Int4Linear: group_size", group_size, GROUP_SIZES)
        options = {"group_size": group_size, "symmetric": symmetric, "dynamic": dynamic}
        layer: Int4Linear = cls.closest(weight, bias, **options)
        return layer

    @classmethod
    def from_quantized(
        cls,
        q: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        dynamic: bool = False,
    ) -> Int4Linear:
        """The layer of levels that are chosen already, as `quantize_groups` gives them.

        Args:
            q: [out, groups·group_size] integers in −8 … 7.
            scale, zero: [out, groups]; zero None: symmetric.
            bias: [out] or None; a Parameter is kept, not copied.
            in_features: at most groups·group_size; what is beyond is never multiplied.
            dynamic: as of the layer.

        Raises:
            OptionError: the sizes do not fit, or are no group size.
        """
        groups = -(
            -in_features // (size := q.shape[1] // max(scale.shape[-1], 1) or GROUP_SIZES[0])
        )
        want, fits = (len(q), groups), q.shape[1] == groups * size
        if not fits or scale.shape != want or (zero is not None and zero.shape != want):
            raise OptionError(
                f"Int4Linear: levels {list(q.shape)}, scales {list(scale.shape)} and zeros "
                f"{None if zero is None else list(zero.shape)} do not fit {in_features} features"
            )
        options = {"group_size": size, "symmetric": zero is None, "dynamic": dynamic}
        levels, sizes = four_bits(q, scale, zero), (len(q), in_features)
        layer: Int4Linear = cls.of_levels(levels, sizes, bias, **options)
        return layer

    def rounded(
        self, weight: Tensor, second: Tensor | None = None, method: Method = "gptq"
    ) -> Mapping[str, Tensor | None]:
        """As of any; with second = E[x xᵀ] of the layer's inputs, by one of `METHODS`."""
        choose = METHODS["round" if second is None else method]
        return four_bits(*choose(weight, second, 4, self.group_size, self.symmetric))

    def forward(self, input: Tensor) -> Tensor:
        check_width(input, self.in_features)
        run = int4_dynamic_linear if self.dynamic else int4_linear
        return run(input, self.qweight, self.scale, self.zero, self.bias)

    def dense_weight(self) -> Tensor:
        """W, [out_features, in_features], in float32 or wider."""
        return dequantize_packed(self.qweight, self.scale, self.zero, self.in_features)

    def kernel(self, tokens: int) -> str:
        op = "int4_dynamic_linear" if self.dynamic else "int4_linear"
        sizes = tokens, self.out_features, self.in_features, self.group_size
        return kernel_name(op, *sizes, self.qweight)


def _int8(site: Site, quantize: Quantize) -> Layer:
    return Int8WeightLinear.from_weight(site.weight, site.bias)


def _chosen(site: Site, weight: Tensor, quantize: Quantize, axes: Tensor | None = None) -> Groups:
    """Levels of 4 bits, scales and zeros of a site's weight, as the method has them; with axes R
    [in, in] of a weight of R x."""
    moments = site.moments
    if quantize.method != "round" and moments is None:
        warn(
            f"{quantize}: without the inputs of a layer its weights are rounded to the nearest "
            "level: pass rewrite(…, calibration=batches) that reach it"
        )
    method = "round" if moments is None else quantize.method
    second = None if moments is None else moments.second
    if second is not None and axes is not None:  # E[R x (R x)ᵀ]
        second = axes @ second @ axes.t()
    return METHODS[method](weight, second, 4, quantize.group_size, quantize.symmetric)


def _int4(site: Site, quantize: Quantize) -> Layer:
    dynamic = quantize.scheme == "int4-dynamic"
    levels = _chosen(site, site.weight, quantize)
    return Int4Linear.from_quantized(*levels, site.bias, site.in_features, dynamic)


def _int8_of_sparse(site: Site, quantize: Quantize) -> Layer:
    layer = site.module
    assert isinstance(layer, TopKLinear | ThresholdLinear)
    return SparseInt8Linear.of(layer)


def _int8_of_gate(site: Site, quantize: Quantize) -> Layer:
    layer = site.module
    assert isinstance(layer, GateLinear)
    return Int8GateLinear.of(layer)


def _int4_of_sparse(site: Site, quantize: Quantize) -> Layer:
    layer = site.module
    assert isinstance(layer, TopKLinear | ThresholdLinear)
    axes = None
    if isinstance(layer, ThresholdLinear) and layer.rotated:
        assert layer.rotation is not None
        assert layer.rotation_scale is not None
        axes = matrix(layer.rotation, layer.rotation_scale)
    levels = _chosen(site, layer.weight.detach(), quantize, axes)
    return SparseInt4Linear.of(layer, *levels, quantize.group_size)


def _int8_of_trained(layer: TrainedLinear) -> Layer:
    qweight, scale, _ = layer.levels()
    return Int8WeightLinear.from_quantized(qweight, scale, layer.bias)


def _int4_of_trained(layer: TrainedLinear) -> Layer:
    dynamic = layer.scheme == "int4-dynamic"
    return Int4Linear.from_quantized(*layer.levels(), layer.bias, layer.in_features, dynamic)


def _always(quantize: Quantize) -> bool:
    """Methods fit to moments, and the errors of outputs are measured by them."""
    return True


register(
    Scheme(
        "int8-weight",
        bits=8,
        dtype=torch.float32,
        storage=torch.int8,
        layers={
            LINEAR: _int8,
            TopKLinear: _int8_of_sparse,
            ThresholdLinear: _int8_of_sparse,
            GateLinear: _int8_of_gate,
            TrainedLinear: trained(_int8_of_trained),
            EMBEDDING: int8_embedding,
        },
        options=("embeddings",),
    )
)

_LAYERS: dict[Kind, Maker] = {
    LINEAR: _int4,
    TrainedLinear: trained(_int4_of_trained),
    EMBEDDING: int4_embedding,
}
_SPARSE: dict[Kind, Maker] = {TopKLinear: _int4_of_sparse, ThresholdLinear: _int4_of_sparse}
_OF_IMAGES: dict[Kind, Maker] = {
    CONV: int4_conv,
    TrainedConv1d: trained(conv_of_trained),
    TrainedConv2d: trained(conv_of_trained),
}
_OPTIONS = ("group_size", "symmetric", "method", "embeddings")

_weight = Scheme(
    "int4-weight",
    bits=4,
    dtype=torch.float32,
    storage=torch.uint8,
    layers=_LAYERS | _SPARSE,
    per_element=2,
    options=_OPTIONS,
    calibrates=_always,
)
register(_weight)
register(
    replace(
        _weight,
        name="int4-dynamic",
        dtype=torch.int8,
        layers=_LAYERS | _OF_IMAGES,
        options=(*_OPTIONS, "convolutions"),
    )
)
