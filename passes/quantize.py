"""Quantize: int8 weights, activations quantized at run time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rewriter.base import (
    Layer,
    Pass,
    Phase,
    Replacement,
    Skip,
    as_parameter,
    relative_error,
    unusable,
)
from rewriter.errors import one_of
from rewriter.kernels.int8_linear import (
    ACTIVATIONS,
    dequantize_weight,
    int8_linear,
    kernel_name,
    quantize_weight,
)
from rewriter.kernels.int8_monarch import int8_monarch_linear
from rewriter.kernels.monarch import monarch_dense
from rewriter.passes.monarch import Blocks, MonarchLinear
from rewriter.sites import LINEAR, Kind, Site

__all__ = ["Quantize", "QuantizedLinear", "QuantizedMonarch"]

Activation = Literal["per_token", "per_tensor"]
_SCHEMES = ("int8-dynamic",)
_FROZEN = "weights are frozen by quantization; gradients still reach the input"


def _random(*shape: int, bound: float, device: Any, dtype: Any) -> tuple[Tensor, Tensor]:
    weight = torch.empty(*shape, device=device, dtype=dtype).uniform_(-bound, bound)
    return quantize_weight(weight)


class QuantizedLinear(Layer):
    """y = q(x) @ (qweight·scale[:, None])ᵀ + bias, with q rounding x to 256 levels at run time.

    The weights are buffers: they do not train. Gradients reach x (straight-through) and bias.
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
    bias: nn.Parameter | None

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
        qweight, scale = _random(out_features, in_features, bound=bound, device=device, dtype=dtype)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale", scale)
        self.register_bias(out_features if bias else None, device, dtype)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None, activation: Activation = "per_token"
    ) -> QuantizedLinear:
        """The layer closest to weight [out, in]; a bias that is a Parameter is kept, not copied."""
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, bias is not None, activation, device="meta")
        layer.qweight, layer.scale = quantize_weight(weight)
        layer.bias = None if bias is None else as_parameter(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.qweight, self.scale, self.bias, self.activation)

    def dense_weight(self) -> Tensor:
        """W = qweight·scale[:, None], [out_features, in_features]."""
        return dequantize_weight(self.qweight, self.scale)

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`, for code that reads a linear layer's weight (its dtype, mostly)."""
        return self.dense_weight()

    def kernel(self, tokens: int) -> str:
        return kernel_name(
            tokens, self.in_features, self.out_features, self.activation, self.qweight.device
        )

    def held_bytes(self, tokens: int) -> int:
        return self.qweight.numel() if self.kernel(tokens) == "onednn" else 0


class QuantizedMonarch(Layer):
    """`MonarchLinear` with both factors in int8 and both factors' inputs quantized at run time.

    Args:
        in_features, out_features, nblocks, rank, bias, interleaved: as in `MonarchLinear`.
        activation: as in `QuantizedLinear`; per token means per token and block.
        device, dtype: as in `QuantizedLinear`.

    Attributes:
        qright: [K, rank·L, ib] int8, and right_scale [K, rank·L].
        qleft: [L, ob, K·rank] int8, and left_scale [L, ob].
        bias: [out_features] or None.

    Raises:
        OptionError: unknown `activation`, or sizes that `MonarchLinear` refuses.
    """

    op = "int8_monarch_linear"
    qright: Tensor
    right_scale: Tensor
    qleft: Tensor
    left_scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: Blocks = 4,
        rank: int | None = None,
        bias: bool = True,
        interleaved: bool = False,
        activation: Activation = "per_token",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("QuantizedMonarch: activation", activation, ACTIVATIONS)
        dense = MonarchLinear(
            in_features,
            out_features,
            nblocks,
            rank,
            bias,
            interleaved,
            device=device,
            dtype=dtype,
        )
        self.in_features, self.out_features = in_features, out_features
        self.nblocks, self.rank = dense.nblocks, dense.rank
        self.interleaved = interleaved
        self.activation: Activation = activation
        for name, factor in (("right", dense.right), ("left", dense.left)):
            q, scale = quantize_weight(factor)
            self.register_buffer(f"q{name}", q)
            self.register_buffer(f"{name}_scale", scale)
        self.bias = dense.bias

    @classmethod
    def from_monarch(
        cls, monarch: MonarchLinear, activation: Activation = "per_token"
    ) -> QuantizedMonarch:
        """The layer closest to `monarch`, factor by factor; its bias is kept, not copied."""
        layer = cls(
            monarch.in_features,
            monarch.out_features,
            monarch.nblocks,
            monarch.rank,
            monarch.bias is not None,
            monarch.interleaved,
            activation,
            device="meta",
        )
        right, left = (f.detach() for f in monarch.factors())
        layer.qright, layer.right_scale = quantize_weight(right)
        layer.qleft, layer.left_scale = quantize_weight(left)
        layer.bias = monarch.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return int8_monarch_linear(
            x,
            self.qright,
            self.right_scale,
            self.qleft,
            self.left_scale,
            self.bias,
            self.out_features,
            self.activation,
            self.interleaved,
        )

    def kernel(self, tokens: int) -> str:
        return f"{self._factor_kernel(self.qright, tokens)}, block by block"

    def held_bytes(self, tokens: int) -> int:
        return sum(
            factor.numel()
            for factor in (self.qright, self.qleft)
            if self._factor_kernel(factor, tokens) == "onednn"
        )

    def _factor_kernel(self, factor: Tensor, tokens: int) -> str:
        _, rows, columns = factor.shape
        return kernel_name(tokens, columns, rows, self.activation, factor.device)

    def dense_weight(self) -> Tensor:
        """The product of the dequantized factors, [out_features, in_features]."""
        return monarch_dense(
            dequantize_weight(self.qright, self.right_scale),
            dequantize_weight(self.qleft, self.left_scale),
            self.out_features,
            self.in_features,
            self.interleaved,
        )

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`, for code that reads a linear layer's weight (its dtype, mostly)."""
        return self.dense_weight()


@dataclass(frozen=True)
class Quantize(Pass):
    """W ≈ q·scale with q in int8 and one scale per output channel; see `QuantizedLinear`.

    After `Monarch`, both factors of a `MonarchLinear` are quantized; see `QuantizedMonarch`.

    Args:
        scheme: "int8-dynamic": int8 weights, activations quantized to 8 bits at run time.
        activation: "per_token" (closer) or "per_tensor".
        where: which sites; a name pattern, a predicate, or None for all.

    Skips a site whose weights are not floating point numbers of 16 bits or more, or hold NaN or
    inf.

    Raises:
        OptionError: unknown scheme or activation.
    """

    matches: ClassVar[tuple[Kind, ...]] = (LINEAR, MonarchLinear)
    phase: ClassVar[Phase] = Phase.PRECISION

    scheme: str = "int8-dynamic"
    activation: Activation = "per_token"

    def __post_init__(self) -> None:
        one_of("Quantize: scheme", self.scheme, _SCHEMES)
        one_of("Quantize: activation", self.activation, ACTIVATIONS)

    def propose(self, site: Site) -> Replacement | Skip:
        monarch = site.module if site.kind is MonarchLinear else None
        weights: tuple[Tensor, ...]
        bias: Tensor | None
        if isinstance(monarch, MonarchLinear):
            weights, bias = (monarch.right, monarch.left), monarch.bias
        else:
            weights, bias = (site.weight,), site.bias
        if refused := unusable(*weights, bias):
            return refused

        layer: QuantizedLinear | QuantizedMonarch
        if isinstance(monarch, MonarchLinear):
            layer = QuantizedMonarch.from_monarch(monarch, self.activation)
            before = monarch.dense_weight()
        else:
            layer = QuantizedLinear.from_weight(weights[0], bias, self.activation)
            before = weights[0]
        layer.train(site.module is None or site.module.training)
        note = _FROZEN if any(w.requires_grad for w in weights) else ""
        return Replacement(layer, relative_error(before, layer.dense_weight()), note)
