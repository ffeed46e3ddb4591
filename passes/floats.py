"""Linear layers whose weights are shorter floats: bfloat16, and float8 with a scale per channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.base import Layer, Skip
from rewriter.errors import one_of
from rewriter.kernels.float8_linear import (
    ACTIVATIONS,
    dequantize_float8,
    float8_linear,
    kernel_name,
    quantize_float8,
)
from rewriter.layer import RoundedLinear
from rewriter.passes.quantize import Quantize, Scheme, register
from rewriter.sites import LINEAR, Site

__all__ = ["BFloat16Linear", "Float8Linear"]


class BFloat16Linear(RoundedLinear):
    """y = x Wᵀ + bias with W in bfloat16.

    Where the device multiplies bfloat16 (a CPU with AVX512_BF16, a GPU of compute capability 8), x
    is rounded to it and the sums are made in float32, each rounded once; elsewhere W is made
    float32 for the product, as slow as a dense layer or slower, and x is not rounded.

    The weight is a buffer: it does not train, and stays bfloat16 whatever dtype the model is cast
    to. Gradients reach x and bias.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether there is a bias.
        device: of all tensors.
        dtype: of bias, and of the weight before it is rounded.

    Attributes:
        qweight: [out_features, in_features] bfloat16.
        bias: [out_features] or None.
    """

    op = "bfloat16_linear"
    levels = ("qweight",)
    keeps_dtype = ("qweight",)
    qweight: Tensor

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
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> BFloat16Linear:
        """The layer closest to weight [out, in]; a bias that is a Parameter is kept, not copied."""
        layer: BFloat16Linear = cls.closest(weight, bias)
        return layer

    def rounded(self, weight: Tensor) -> Mapping[str, Tensor | None]:
        return {"qweight": weight.to(torch.bfloat16, memory_format=torch.contiguous_format)}

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == torch.float32 and _multiplies_bfloat16(input.device):
            y = F.linear(input.to(torch.bfloat16), self.qweight).to(input.dtype)
            return y if self.bias is None else y + self.bias
        return F.linear(input, self.qweight.to(input.dtype), self.bias)

    def dense_weight(self) -> Tensor:
        """W, [out_features, in_features], in float32."""
        return self.qweight.to(torch.float32)

    def kernel(self, tokens: int) -> str:
        multiplies = _multiplies_bfloat16(self.qweight.device)
        return f"torch, product in {'bfloat16' if multiplies else 'float32'}"


class Float8Linear(RoundedLinear):
    """y = x @ (qweight·scale[:, None])ᵀ + bias with weights in float8_e4m3fn.

    The weights are buffers: they do not train. Gradients reach x (straight-through) and bias.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether there is a bias.
        activation: "none" leaves x as it is; "per_token" rounds it to float8 with a scale for each
            row, "per_tensor" with one for all of x.
        device: of all tensors.
        dtype: of bias, and of the weights before quantization; scale is float32 or wider.

    Attributes:
        qweight: [out_features, in_features] uint8, the bits of float8_e4m3fn.
        scale: [out_features].
        bias: [out_features] or None.

    Raises:
        OptionError: unknown `activation`.
    """

    op = "float8_linear"
    qweight: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: Literal["none", "per_token", "per_tensor"] = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("Float8Linear: activation", activation, ACTIVATIONS)
        self.in_features, self.out_features = in_features, out_features
        self.activation = activation
        self.register_bias(out_features if bias else None, device, dtype)
        self.hold(self.drawn_weight(device, dtype))

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None, activation: Any = "none"
    ) -> Float8Linear:
        """The layer closest to weight [out, in]; a bias that is a Parameter is kept, not copied."""
        layer: Float8Linear = cls.closest(weight, bias, activation=activation)
        return layer

    def rounded(self, weight: Tensor) -> Mapping[str, Tensor | None]:
        return dict(zip(self.levels, quantize_float8(weight), strict=True))

    def forward(self, input: Tensor) -> Tensor:
        return float8_linear(input, self.qweight, self.scale, self.bias, self.activation)

    def dense_weight(self) -> Tensor:
        """W = qweight·scale[:, None], [out_features, in_features]."""
        return dequantize_float8(self.qweight, self.scale)

    def kernel(self, tokens: int) -> str:
        return kernel_name(self.activation, self.qweight.device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]
def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16."""
    if torch.onnx.is_in_onnx_export():  # whose runtime has none
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def _bfloat16(site: Site, quantize: Quantize) -> Layer | Skip:
    if site.weight.dtype.itemsize <= 2:
        return Skip("its weight is {} already", site.weight.dtype)
    return BFloat16Linear.from_weight(site.weight, site.bias)


def _float8_weight(site: Site, quantize: Quantize) -> Layer:
    return Float8Linear.from_weight(site.weight, site.bias)


def _float8_dynamic(site: Site, quantize: Quantize) -> Layer:
    return Float8Linear.from_weight(site.weight, site.bias, quantize.activation)


register(
    Scheme(
        "bf16",
        bits=16,
        dtype=torch.bfloat16,
        storage=torch.bfloat16,
        layers={LINEAR: _bfloat16},
    )
)
register(
    Scheme(
        "fp8-weight",
        bits=8,
        dtype=torch.float8_e4m3fn,
        storage=torch.uint8,
        layers={LINEAR: _float8_weight},
    )
)
register(
    Scheme(
        "fp8-dynamic",
        bits=8,
        dtype=torch.float8_e4m3fn,
        storage=torch.uint8,
        layers={LINEAR: _float8_dynamic},
        options=("activation",),
    )
)
