"""`SparseInt8Linear`: int8 weights behind a selection of inputs, which `Quantize("int8-weight")`
makes of the layers of `TopK` and `Threshold`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from rewriter.base import Layer, as_parameter
from rewriter.errors import OptionError, whole_number
from rewriter.kernels.int8_linear import dequantize_weight, quantize_weight
from rewriter.kernels.rotation import rotated, unrotated
from rewriter.kernels.sparse import Select, active_reference, held_bytes, kernel_name
from rewriter.kernels.sparse_linear import sparse_linear
from rewriter.passes.threshold_linear import ThresholdLinear
from rewriter.passes.topk import TopKLinear

__all__ = ["SparseInt8Linear"]


class SparseInt8Linear(Layer):
    """y = z_S @ (qweight·scale[:, None])ᵀ + bias, z_S being z with zeros for what is not selected;
    z is the input x, or R x, its entries by other axes.

    The weights are buffers: they do not train. Gradients reach bias, and x where it is selected.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: whether there is an additive bias.
        k: selected entries a row, those of largest score |x|·importance; 0: those whose score is
            not below the threshold.
        weighted: whether there is an importance; else it is 1.
        block: as many neighbours are selected together.
        rotated: whether there is a rotation R; else it is 1.
        share: of the entries that are selected, where it is known.
        device, dtype: of bias, and of the weights before quantization.

    Attributes:
        qweight: [out_features, in_features] int8, stored by columns where it was made here.
        scale: [out_features] float32 or wider.
        threshold: [1] float32, or None; importance: [in_features] float32, or None.
        rotation, rotation_scale: R, [in_features, in_features] int8 times [in_features] float32, or
            None.
        bias: [out_features] or None.

    Raises:
        OptionError: k is negative or above in_features, or block does not divide both.
    """

    op: ClassVar[str] = "sparse_int8_linear"
    keeps_dtype: ClassVar[tuple[str, ...]] = ("threshold", "importance", "rotation_scale")
    qweight: Tensor
    scale: Tensor
    bias: nn.Parameter | None
    threshold: Tensor | None
    importance: Tensor | None
    rotation: Tensor | None
    rotation_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        k: int = 0,
        weighted: bool = False,
        block: int = 1,
        share: float | None = None,
        rotated: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        whole_number("SparseInt8Linear: k", k, least=0, most=in_features)
        whole_number("SparseInt8Linear: block", block)
        if k % block or in_features % block:
            raise OptionError(
                f"SparseInt8Linear: block={block} must divide k={k} and {in_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.k, self.weighted, self.block, self.share = k, weighted, block, share
        self.rotated = rotated
        self.register_bias(out_features if bias else None, device, dtype)
        levels = torch.zeros((out_features, in_features), dtype=torch.int8, device=device)
        self.register_buffer("qweight", levels)
        self.register_buffer("scale", torch.ones(out_features, device=device))
        self.register_buffer("threshold", None if k else torch.zeros(1, device=device))
        ones = torch.ones(in_features, device=device) if weighted else None
        self.register_buffer("importance", ones)
        axes = unrotated(in_features, device) if rotated else (None, None)
        self.register_buffer("rotation", axes[0])
        self.register_buffer("rotation_scale", axes[1])

    @classmethod
    def of(cls, sparse: TopKLinear | ThresholdLinear) -> SparseInt8Linear:
        """The layer closest to one with float weights; its selection, and a bias that is a
        Parameter, are kept."""
        k, block = 0, 1
        threshold: Tensor | None = None
        axes: tuple[Tensor | None, Tensor | None] = (None, None)
        if isinstance(sparse, TopKLinear):
            k, block = sparse.k, sparse.block
            share: float | None = k / sparse.in_features
        else:
            share, threshold = sparse.share, sparse.threshold
            axes = sparse.rotation, sparse.rotation_scale
        sizes = sparse.in_features, sparse.out_features
        bias, weighted = sparse.bias is not None, sparse.weighted
        layer = cls(*sizes, bias, k, weighted, block, share, axes[0] is not None, device="meta")
        qweight, scale = quantize_weight(sparse.weight.detach())
        layer.qweight, layer.scale = qweight.t().contiguous().t(), scale
        layer.importance = sparse.importance
        layer.bias = None if sparse.bias is None else as_parameter(sparse.bias)
        layer.threshold = threshold
        layer.rotation, layer.rotation_scale = axes
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return sparse_linear(
            rotated(input, self.rotation, self.rotation_scale, self),
            self.qweight,
            self.scale,
            self.bias,
            threshold=self.threshold,
            importance=self.importance,
            k=self.k,
            block=self.block,
        )

    def kept(self, input: Tensor) -> Tensor:
        """Which entries of an input [*, in_features], or of R x, are selected, bool."""
        threshold = 0.0 if self.threshold is None else self.threshold
        select = Select(self.k, threshold, self.importance, self.block)
        return active_reference(rotated(input, self.rotation, self.rotation_scale), select)

    def stored_weight(self) -> Tensor:
        """qweight·scale[:, None], [out_features, in_features]."""
        return dequantize_weight(self.qweight, self.scale)

    def kernel(self, tokens: int) -> str:
        return kernel_name(self.qweight, tokens, self.share)

    def held_bytes(self, tokens: int) -> int:
        return held_bytes(self.qweight, tokens)
