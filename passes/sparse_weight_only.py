"""Weights of 8 and 4 bits behind a selection of inputs, which `Quantize("int8-weight")` and
`Quantize("int4-weight")` make of the layers of `TopK`, `Threshold` and `SparseGate`."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from rewriter.base import Layer, as_parameter
from rewriter.errors import OptionError, one_of, whole_number
from rewriter.kernels import nibbles, sparse_int4
from rewriter.kernels.int8_linear import dequantize_weight, quantize_weight
from rewriter.kernels.rotation import rotated, unrotated
from rewriter.kernels.sparse import Select, active_reference, held_bytes, kernel_name
from rewriter.kernels.sparse_entries import THEN, kept_entries
from rewriter.kernels.sparse_linear import sparse_linear
from rewriter.kernels.weight_only import GROUP_SIZES, int8_weight_linear
from rewriter.kernels.weight_only import kernel_name as dense_kernel_name
from rewriter.passes.sparsegate import GateLinear
from rewriter.passes.threshold_linear import ThresholdLinear
from rewriter.passes.topk import TopKLinear

__all__ = ["Int8GateLinear", "SparseInt4Linear", "SparseInt8Linear"]

S = TypeVar("S", bound="_SparseLinear")


class _SparseLinear(Layer):
    """What layers have that select inputs, or their entries by other axes, of a weight in few
    bits."""

    keeps_dtype: ClassVar[tuple[str, ...]] = ("threshold", "importance", "rotation_scale")
    bias: nn.Parameter | None
    threshold: Tensor | None
    importance: Tensor | None
    rotation: Tensor | None
    rotation_scale: Tensor | None

    def _register(
        self,
        sizes: tuple[int, int],
        bias: bool,
        selection: tuple[int, bool, int, float | None, bool],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Takes (in, out), and k, weighted, block, share and rotated."""
        name, in_features = type(self).__name__, sizes[0]
        k, weighted, block, _, turned = selection
        whole_number(f"{name}: k", k, least=0, most=in_features)
        whole_number(f"{name}: block", block)
        if k % block or in_features % block:
            raise OptionError(f"{name}: block={block} must divide k={k} and {in_features}")
        self.in_features, self.out_features = sizes
        self.k, self.weighted, self.block, self.share, self.rotated = selection
        self.register_bias(sizes[1] if bias else None, device, dtype)
        self.register_buffer("threshold", None if k else torch.zeros(1, device=device))
        ones = torch.ones(in_features, device=device) if weighted else None
        self.register_buffer("importance", ones)
        levels, scale = unrotated(in_features, device) if turned else (None, None)
        self.register_buffer("rotation", levels)
        self.register_buffer("rotation_scale", scale)

    @classmethod
    def _selecting(cls: type[S], sparse: TopKLinear | ThresholdLinear, **options: Any) -> S:
        """A layer without levels, with the selection and the bias of one of float weights; a bias
        that is a Parameter is kept."""
        axes: tuple[Tensor | None, Tensor | None] = (None, None)
        k, block, threshold = 0, 1, None
        if isinstance(sparse, TopKLinear):
            k, block = sparse.k, sparse.block
            share: float | None = k / sparse.in_features
        else:
            share, threshold = sparse.share, sparse.threshold
            axes = sparse.rotation, sparse.rotation_scale
        own = {"k": k, "weighted": sparse.weighted, "block": block, "share": share}
        own["rotated"] = axes[0] is not None
        sizes, bias = (sparse.in_features, sparse.out_features), sparse.bias is not None
        layer = cls(*sizes, bias, **own, **options, device="meta")
        layer.importance, layer.threshold = sparse.importance, threshold
        layer.rotation, layer.rotation_scale = axes
        layer.bias = None if sparse.bias is None else as_parameter(sparse.bias)
        return layer

    def kept(self, input: Tensor) -> Tensor:
        """Which entries of an input [*, in_features], or of R x, are selected, bool."""
        threshold = 0.0 if self.threshold is None else self.threshold
        select = Select(self.k, threshold, self.importance, self.block)
        return active_reference(rotated(input, self.rotation, self.rotation_scale), select)

    def _entries(self, input: Tensor) -> Tensor:
        return rotated(input, self.rotation, self.rotation_scale, self)


class SparseInt8Linear(_SparseLinear):
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
        share: of the entries that are selected, where it is known.
        rotated: whether there is a rotation R; else it is 1.
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
    qweight: Tensor
    scale: Tensor

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
        selection = k, weighted, block, share, rotated
        self._register((in_features, out_features), bias, selection, device, dtype)
        levels = torch.zeros((out_features, in_features), dtype=torch.int8, device=device)
        self.register_buffer("qweight", levels)
        self.register_buffer("scale", torch.ones(out_features, device=device))

    @classmethod
    def of(cls, sparse: TopKLinear | ThresholdLinear) -> SparseInt8Linear:
        """The layer closest to one with float weights; its selection, and a bias that is a
        Parameter, are kept."""
        layer = cls._selecting(sparse)
        qweight, scale = quantize_weight(sparse.weight.detach())
        layer.qweight, layer.scale = qweight.t().contiguous().t(), scale
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return sparse_linear(
            self._entries(input),
            self.qweight,
            self.scale,
            self.bias,
            threshold=self.threshold,
            importance=self.importance,
            k=self.k,
            block=self.block,
            share=1.0 if self.share is None else self.share,
        )

    def stored_weight(self) -> Tensor:
        """qweight·scale[:, None], [out_features, in_features]."""
        return dequantize_weight(self.qweight, self.scale)

    def kernel(self, tokens: int) -> str:
        return kernel_name(self.qweight, tokens, self.share)

    def held_bytes(self, tokens: int) -> int:
        return held_bytes(self.qweight, tokens)


class SparseInt4Linear(_SparseLinear):
    """y = z_S @ Wᵀ + bias with w[n,i] = q[i,n]·scale[g,n] + zero[g,n], g = i // group_size and q in
    −8 … 7; z_S is z, as of `SparseInt8Linear`, with zeros for what is not selected.

    The weights are buffers: they do not train. Gradients reach bias, and x where it is selected.

    Args:
        in_features, out_features, bias, k, weighted, block, share, rotated: as of
            `SparseInt8Linear`.
        group_size: neighbouring inputs that share a scale of each output: 32, 64 or 128.
        symmetric: whether there is no zero.
        device, dtype: of bias, and of the weights before quantization.

    Attributes:
        qweight: [in_features, ⌈out_features/2⌉] uint8: of each input two levels in a byte, as
            `rewriter.kernels.nibbles` says.
        scale: [groups, out_features] bfloat16, or float64 for weights in float64.
        zero: as scale, or None.
        threshold, importance, rotation, rotation_scale: as of `SparseInt8Linear`.
        bias: [out_features] or None.

    Raises:
        OptionError: as of `SparseInt8Linear`, or unknown `group_size`.
    """

    op: ClassVar[str] = "sparse_int4_linear"
    packed = {"qweight": 2}
    qweight: Tensor
    scale: Tensor
    zero: Tensor | None

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
        group_size: int = 64,
        symmetric: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("SparseInt4Linear: group_size", group_size, GROUP_SIZES)
        selection = k, weighted, block, share, rotated
        self._register((in_features, out_features), bias, selection, device, dtype)
        self.group_size, self.symmetric = group_size, symmetric
        bytes_, groups = nibbles.row_bytes(out_features), -(-in_features // group_size)
        levels = torch.full((in_features, bytes_), 0x88, dtype=torch.uint8, device=device)
        kept = torch.float64 if dtype == torch.float64 else torch.bfloat16
        scale = torch.ones(groups, out_features, dtype=kept, device=device)
        self.register_buffer("qweight", levels)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", None if symmetric else torch.zeros_like(scale))

    @classmethod
    def of(
        cls,
        sparse: TopKLinear | ThresholdLinear,
        q: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        group_size: int,
    ) -> SparseInt4Linear:
        """A layer of levels that are chosen already, as `quantize_groups` gives them.

        Args:
            sparse: whose selection, and bias, it has.
            q: [out, groups·group_size] integers in −8 … 7.
            scale, zero: [out, groups]; zero None: symmetric.
            group_size: of 32, 64 and 128.
        """
        layer = cls._selecting(sparse, group_size=group_size, symmetric=zero is None)
        layer.qweight = sparse_int4.pack_inputs(q, sparse.in_features)
        layer.scale = scale.t().contiguous()
        layer.zero = None if zero is None else zero.t().contiguous()
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return sparse_int4.sparse_int4_linear(
            self._entries(input),
            self.qweight,
            self.scale,
            self.zero,
            self.bias,
            threshold=self.threshold,
            importance=self.importance,
            k=self.k,
            block=self.block,
            group_size=self.group_size,
            share=1.0 if self.share is None else self.share,
        )

    def stored_weight(self) -> Tensor:
        """W, [out_features, in_features], in float32 or wider."""
        own = self.qweight, self.scale, self.zero
        return sparse_int4.dequantize_inputs(*own, self.group_size)

    def kernel(self, tokens: int) -> str:
        own = self.qweight, self.scale, self.group_size
        return sparse_int4.kernel_name(*own, tokens, self.share)

    def held_bytes(self, tokens: int) -> int:
        return sparse_int4.held_bytes(self.qweight, self.scale, self.group_size, tokens)


class Int8GateLinear(Layer):
    """y = x @ (qweight·scale[:, None])ᵀ + bias with zeros where act(y) is small: a `GateLinear`
    with int8 weights.

    The weights are buffers: they do not train. Gradients reach bias, and x by what is kept.

    Args:
        in_features, out_features, then, bias, k, share: as of `GateLinear`.
        device, dtype: of bias, and of the weights before quantization.

    Attributes:
        qweight: [out_features, in_features] int8.
        scale: [out_features] float32 or wider.
        threshold: [1] float32, or None.
        bias: [out_features] or None.

    Raises:
        OptionError: as of `GateLinear`.
    """

    op: ClassVar[str] = "int8_gate_linear"
    keeps_dtype: ClassVar[tuple[str, ...]] = ("threshold",)
    bias: nn.Parameter | None
    qweight: Tensor
    scale: Tensor
    threshold: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        then: str,
        *,
        bias: bool = True,
        k: int = 0,
        share: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("Int8GateLinear: then", then, THEN)
        whole_number("Int8GateLinear: k", k, least=0, most=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.then, self.k, self.share = then, k, share
        self.register_bias(out_features if bias else None, device, dtype)
        levels = torch.zeros((out_features, in_features), dtype=torch.int8, device=device)
        self.register_buffer("qweight", levels)
        self.register_buffer("scale", torch.ones(out_features, device=device))
        self.register_buffer("threshold", None if k else torch.zeros(1, device=device))

    @classmethod
    def of(cls, gate: GateLinear) -> Int8GateLinear:
        """The layer closest to one with float weights; what it keeps, and a bias that is a
        Parameter, stay."""
        sizes, bias = (gate.in_features, gate.out_features), gate.bias is not None
        layer = cls(*sizes, gate.then, bias=bias, k=gate.k, share=gate.share, device="meta")
        layer.qweight, layer.scale = quantize_weight(gate.weight.detach())
        layer.threshold = gate.threshold
        layer.bias = None if gate.bias is None else as_parameter(gate.bias)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        y = int8_weight_linear(input, self.qweight, self.scale, self.bias)
        return kept_entries(y, threshold=self.threshold, then=self.then, k=self.k)

    def stored_weight(self) -> Tensor:
        """qweight·scale[:, None], [out_features, in_features]."""
        return dequantize_weight(self.qweight, self.scale)

    def kernel(self, tokens: int) -> str:
        sizes = tokens, self.out_features, self.in_features
        name = dense_kernel_name("int8_weight_linear", *sizes, 0, self.qweight)
        return name if self.share is None else f"{name}, keeps {self.share:.0%} of its neurons"
