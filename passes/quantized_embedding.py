"""Embeddings whose rows are stored in 8 or in 4 bits, and the heads that are tied to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.base import Layer, Skip
from rewriter.errors import OptionError, one_of
from rewriter.kernels.int8_linear import ACTIVATIONS, int8_linear, quantize_weight
from rewriter.kernels.weight_only import (
    GROUP_SIZES,
    check_width,
    dequantize_packed,
    int4_dynamic_linear,
    int4_linear,
    int8_weight_linear,
    pack,
    quantize_groups,
)
from rewriter.layer import RoundedWeight
from rewriter.passes.quantize import SCHEMES, Quantize
from rewriter.sites import LINEAR, Site

__all__ = ["Int4Embedding", "QuantizedEmbedding", "int4_embedding", "int8_embedding"]

HEADS = ("none", *ACTIVATIONS)
"""What is done to the input of a tied head."""


FOUR_BITS = ("qweight", "scale", "zero")
NEAREST = "; `rewriter.training.peft.merge` can fit levels to calibration batches"


def four_bits(q: Tensor, scale: Tensor, zero: Tensor | None) -> Mapping[str, Tensor | None]:
    """The buffers of layers of 4 bits in groups, of levels as `quantize_groups` gives them: row by
    row, as kernels read them; others would be copied at each call."""
    offset = None if zero is None else zero.contiguous()
    return {"qweight": pack(q), "scale": scale.contiguous(), "zero": offset}


class _Rows(RoundedWeight, nn.Embedding):
    """An embedding whose rows are buffers, in fewer bits: they do not train.

    What an `nn.Embedding` does to the gradient of its weight (`padding_idx`, `scale_grad_by_freq`,
    `sparse`) is kept for the day that a write to `weight` makes it an `nn.Embedding` again.
    """

    plain = nn.Embedding
    serves = (LINEAR,)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        scale_grad_by_freq: bool,
        sparse: bool,
    ) -> None:
        super().__init__()
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise OptionError(
                f"{type(self).__name__}: padding_idx={padding_idx} is none of {num_embeddings} rows"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse

    def dense_shape(self) -> tuple[int, ...]:
        return self.num_embeddings, self.embedding_dim


def _options(embedding: nn.Embedding) -> dict[str, Any]:
    names = "num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq", "sparse"
    return {name: getattr(embedding, name) for name in names}


def _drawn(rows: int, width: int, device: Any, dtype: Any) -> Tensor:
    return torch.empty(rows, width, device=device, dtype=dtype).normal_()


class QuantizedEmbedding(_Rows):
    """y[t] = qweight[x[t]]·amax[x[t]]/127: an embedding stored in one byte a number.

    Where the weight is tied to a head, the layer is that head too: called with floating point
    numbers, it computes y = q(x) @ (qweight·amax[:, None]/127)ᵀ as `QuantizedLinear` does.

    Args:
        num_embeddings: rows.
        embedding_dim: numbers in a row.
        padding_idx, scale_grad_by_freq, sparse: as of `nn.Embedding`, where rows train.
        activation: of the head: "none" leaves its input as it is, the others are as of
            `QuantizedLinear`.
        device: of all tensors.
        dtype: of the rows before quantization, and of the result.

    Attributes:
        qweight: [num_embeddings, embedding_dim] int8.
        amax: [num_embeddings], the largest magnitude in each row: exact in the dtype of the weight,
            which a step of 1/127 of it would not be.

    Raises:
        OptionError: unknown `activation`, or a `padding_idx` beyond the rows.
    """

    op = "int8_embedding"
    levels = ("qweight", "amax")
    qweight: Tensor
    amax: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        activation: str = "per_token",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, sparse)
        one_of("QuantizedEmbedding: activation", activation, HEADS)
        self.activation = activation
        self.hold(_drawn(num_embeddings, embedding_dim, device, dtype))

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, activation: str = "per_token"
    ) -> QuantizedEmbedding:
        """The layer closest to an embedding without a `max_norm`."""
        layer = cls(**_options(embedding), activation=activation, device="meta")
        layer.hold(embedding.weight.detach())
        return layer

    def rounded(self, weight: Tensor) -> Mapping[str, Tensor | None]:
        empty = weight.shape[1] == 0
        amax = weight.new_zeros(len(weight)) if empty else weight.abs().amax(1)
        return {"qweight": quantize_weight(weight)[0], "amax": amax}

    def forward(self, input: Tensor) -> Tensor:
        if input.is_floating_point() and self.activation == "none":
            return int8_weight_linear(input, self.qweight, _step(self.amax))
        if input.is_floating_point():
            return int8_linear(input, self.qweight, _step(self.amax), None, self.activation)
        step = _step(F.embedding(input, self.amax.unsqueeze(1)))
        return (F.embedding(input, self.qweight).to(step.dtype) * step).to(self.amax.dtype)

    def dense_weight(self) -> Tensor:
        """W = qweight·amax[:, None]/127, [num_embeddings, embedding_dim]."""
        step = _step(self.amax.unsqueeze(1))
        return (self.qweight.to(step.dtype) * step).to(self.amax.dtype)


def _step(amax: Tensor) -> Tensor:
    """In float32 or wider, as `quantize_weight` has it."""
    return amax.to(torch.promote_types(amax.dtype, torch.float32)) / 127


class Int4Embedding(_Rows):
    """An embedding stored as groups of 4-bit integers, two in a byte, as `Int4Linear` has them.

    Where the weight is tied to a head, the layer is that head too: called with floating point
    numbers, it multiplies them as `Int4Linear` does.

    Args:
        num_embeddings: rows.
        embedding_dim: numbers in a row.
        padding_idx, scale_grad_by_freq, sparse: as of `nn.Embedding`, where rows train.
        group_size, symmetric, dynamic: as of `Int4Linear`; `dynamic` is of the head.
        device: of all tensors.
        dtype: of the rows before quantization, and of the result.

    Attributes:
        qweight: [num_embeddings, groups·group_size/2] uint8.
        scale: [num_embeddings, groups] bfloat16, or float64 for rows in float64.
        zero: as scale, or None.
        like: [0], of the result's dtype.

    Raises:
        OptionError: unknown `group_size`, or a `padding_idx` beyond the rows.
    """

    op = "int4_embedding"
    packed = {"qweight": 2}
    levels = FOUR_BITS
    remark = NEAREST
    qweight: Tensor
    scale: Tensor
    zero: Tensor | None
    like: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        group_size: int = 64,
        symmetric: bool = True,
        dynamic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, sparse)
        one_of("Int4Embedding: group_size", group_size, GROUP_SIZES)
        self.group_size, self.symmetric, self.dynamic = group_size, symmetric, dynamic
        self._hold(_drawn(num_embeddings, embedding_dim, device, dtype))

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        group_size: int = 64,
        symmetric: bool = True,
        dynamic: bool = False,
    ) -> Int4Embedding:
        """The layer closest to an embedding without a `max_norm`, level by level."""
        layer = cls(
            **_options(embedding),
            group_size=group_size,
            symmetric=symmetric,
            dynamic=dynamic,
            device="meta",
        )
        layer._hold(embedding.weight.detach())
        return layer

    def _hold(self, weight: Tensor) -> None:
        self.hold(weight)
        self.register_buffer("like", weight.new_empty(0))

    def rounded(self, weight: Tensor) -> Mapping[str, Tensor | None]:
        return four_bits(*quantize_groups(weight, 4, self.group_size, self.symmetric))

    def forward(self, input: Tensor) -> Tensor:
        if input.is_floating_point():
            check_width(input, self.embedding_dim)
            run = int4_dynamic_linear if self.dynamic else int4_linear
            return run(input, self.qweight, self.scale, self.zero)
        ids = input.reshape(-1)
        zero = None if self.zero is None else F.embedding(ids, self.zero)
        rows = self._numbers(F.embedding(ids, self.qweight), F.embedding(ids, self.scale), zero)
        return rows.reshape(*input.shape, self.embedding_dim)

    def _numbers(self, qweight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return dequantize_packed(qweight, scale, zero, self.embedding_dim).to(self.like.dtype)

    def dense_weight(self) -> Tensor:
        """W, [num_embeddings, embedding_dim]."""
        return self._numbers(self.qweight, self.scale, self.zero)


def int8_embedding(site: Site, quantize: Quantize) -> Layer | Skip:
    """What schemes of int8 weights put in an embedding's place."""
    table = _plain_table(site)
    if isinstance(table, Skip):
        return table
    floats = SCHEMES[quantize.scheme].dtype.is_floating_point
    return QuantizedEmbedding.from_embedding(table, "none" if floats else quantize.activation)


def int4_embedding(site: Site, quantize: Quantize) -> Layer | Skip:
    """What schemes of 4-bit weights in groups put in an embedding's place."""
    table = _plain_table(site)
    if isinstance(table, Skip):
        return table
    dynamic = not SCHEMES[quantize.scheme].dtype.is_floating_point
    return Int4Embedding.from_embedding(table, quantize.group_size, quantize.symmetric, dynamic)


def _plain_table(site: Site) -> nn.Embedding | Skip:
    table = site.module
    assert isinstance(table, nn.Embedding)
    if table.max_norm is not None:
        return Skip("max_norm={} rescales its rows while it looks them up", table.max_norm)
    return table
