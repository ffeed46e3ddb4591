"""`ThresholdLinear`, which `Threshold` installs: small entries of its input count as zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.base import StoredLinear
from rewriter.kernels.rotation import matrix, rotated, unrotated
from rewriter.kernels.sparse import (
    Select,
    active_reference,
    held_bytes,
    kernel_name,
    straight_through,
)
from rewriter.kernels.sparse_linear import sparse_linear

__all__ = ["ThresholdLinear"]


class ThresholdLinear(StoredLinear):
    """y = z_S Wᵀ + bias, with z_S[i] = z[i] where |z[i]|·importance[i] ≥ t, else 0; z is the input
    x, or R x, its entries by other axes.

    The gradient is that of this function: zero for entries below the threshold. With few rows
    only the weights of entries above it are read.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: whether there is an additive bias.
        weighted: whether there is an importance; else it is 1.
        rotated: whether there is a rotation R; else it is 1.
        share: of the entries that are active, as calibration saw it; None where nobody knows.
        straight_through: in training entries below the threshold have the gradient of a dense
            layer too.
        device, dtype: of the parameters.

    Shapes:
        input [*, in_features], output [*, out_features]; weight [out_features, in_features];
        bias [out_features]; buffers: threshold [1] and importance [in_features], float32; R as
        rotation [in_features, in_features], int8, times rotation_scale [in_features], float32.
    """

    op: ClassVar[str] = "threshold_linear"
    keeps_dtype: ClassVar[tuple[str, ...]] = ("threshold", "importance", "rotation_scale")
    threshold: Tensor
    importance: Tensor | None
    rotation: Tensor | None
    rotation_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        weighted: bool = False,
        rotated: bool = False,
        share: float | None = None,
        straight_through: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weighted, self.rotated = weighted, rotated
        self.share, self.straight_through = share, straight_through
        self.register_buffer("threshold", torch.zeros(1, device=device))
        self.register_buffer(
            "importance", torch.ones(in_features, device=device) if weighted else None
        )
        levels, scale = unrotated(in_features, device) if rotated else (None, None)
        self.register_buffer("rotation", levels)
        self.register_buffer("rotation_scale", scale)
        self.reset_parameters()

    @classmethod
    def from_weights(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        threshold: float,
        *,
        importance: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        share: float | None = None,
        straight_through: bool = False,
    ) -> ThresholdLinear:
        """The layer around a [out, in] weight, which is that of R x where there is a rotation;
        tensors that are Parameters stay the same."""
        out_features, in_features = weight.shape
        layer = cls(
            in_features,
            out_features,
            bias=bias is not None,
            weighted=importance is not None,
            rotated=rotation is not None,
            share=share,
            straight_through=straight_through,
            device="meta",
        )
        layer.threshold = torch.full((1,), threshold, device=weight.device)
        layer.importance = importance
        if rotation is not None:
            layer.rotation, layer.rotation_scale = rotation
        return layer.around(weight, bias)

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, uniform within ±1/√in_features; nothing is below 0."""
        super().reset_parameters()
        nn.init.zeros_(self.threshold)

    def forward(self, input: Tensor) -> Tensor:
        z = rotated(input, self.rotation, self.rotation_scale, self)
        if self.straight_through and self.training:
            return F.linear(straight_through(z, self._above(z)), self.weight, self.bias)
        return sparse_linear(
            z,
            self.weight,
            None,
            self.bias,
            threshold=self.threshold,
            importance=self.importance,
            share=1.0 if self.share is None else self.share,
        )

    def kept(self, input: Tensor) -> Tensor:
        """Which entries of an input [*, in_features], or of R x, are not below the threshold."""
        return self._above(rotated(input, self.rotation, self.rotation_scale))

    def _above(self, z: Tensor) -> Tensor:
        return active_reference(z, Select(0, self.threshold, self.importance))

    def from_dense_gradient(self, gradient: Tensor, square: bool) -> Mapping[str, Tensor]:
        """G Rᵀ of a gradient G, as the weight is that of R x; of squares by those of R. Without R
        the weight is the dense one."""
        if self.rotation is None or self.rotation_scale is None:
            return {}
        axes = matrix(self.rotation, self.rotation_scale)
        axes = axes.square() if square else axes
        return {"weight": (gradient.double() @ axes.t()).to(gradient.dtype)}

    def kernel(self, tokens: int) -> str:
        return kernel_name(self.weight, tokens, self.share)

    def held_bytes(self, tokens: int) -> int:
        return held_bytes(self.weight, tokens)
