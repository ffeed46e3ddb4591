"""`QuantizedMonarch`: what int8-dynamic puts in the place of a Monarch layer."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.base import Layer, LinearLayer
from rewriter.errors import one_of
from rewriter.kernels.int8_linear import (
    ACTIVATIONS,
    PACKED,
    dequantize_weight,
    quantize_weight,
)
from rewriter.kernels.int8_monarch import int8_monarch_linear
from rewriter.kernels.int8_monarch import kernel_name as monarch_kernel_name
from rewriter.kernels.monarch import monarch_dense
from rewriter.passes.monarch import Blocks, MonarchLinear
from rewriter.passes.quantize import Activation, Quantize
from rewriter.sites import Site

__all__ = ["QuantizedMonarch", "int8_monarch"]


class QuantizedMonarch(LinearLayer):
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

    def forward(self, input: Tensor) -> Tensor:
        return int8_monarch_linear(
            input,
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
        k, l = len(self.qright), len(self.qleft)
        name = monarch_kernel_name(
            tokens,
            self.in_features,
            self.out_features,
            (k, l),
            self.rank,
            self.activation,
            self.interleaved,
            self.qright.device,
            self.right_scale.dtype,
        )
        return name if name == "native" else f"{name}, block by block"

    def held_bytes(self, tokens: int) -> int:
        packed = self.kernel(tokens).partition(",")[0] in PACKED
        return self.qright.numel() + self.qleft.numel() if packed else 0

    def dense_weight(self) -> Tensor:
        """The product of the dequantized factors, [out_features, in_features]."""
        return monarch_dense(
            dequantize_weight(self.qright, self.right_scale),
            dequantize_weight(self.qleft, self.left_scale),
            self.out_features,
            self.in_features,
            self.interleaved,
        )


def int8_monarch(site: Site, quantize: Quantize) -> Layer:
    """What schemes of int8 weights and activations put in a Monarch layer's place."""
    monarch = site.module
    assert isinstance(monarch, MonarchLinear)
    return QuantizedMonarch.from_monarch(monarch, quantize.activation)
