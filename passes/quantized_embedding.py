"""An embedding whose rows are stored in int8, and the head that is tied to one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.errors import OptionError, one_of
from rewriter.kernels.int8_linear import ACTIVATIONS, int8_linear, quantize_weight
from rewriter.layer import ComputedWeight
from rewriter.sites import LINEAR

__all__ = ["QuantizedEmbedding"]


class QuantizedEmbedding(ComputedWeight, nn.Embedding):
    """y[t] = qweight[x[t]]·amax[x[t]]/127: an embedding stored in one byte a number.

    The rows are buffers: they do not train. What an `nn.Embedding` does to the gradient of its
    weight (`padding_idx`, `scale_grad_by_freq`, `sparse`) is kept for the day that a write to
    `weight` makes it an `nn.Embedding` again.

    Where the weight is tied to a head, the layer is that head too: called with floating point
    numbers, it computes y = q(x) @ (qweight·amax[:, None]/127)ᵀ as `QuantizedLinear` does.

    Args:
        num_embeddings: rows.
        embedding_dim: numbers in a row.
        padding_idx, scale_grad_by_freq, sparse: as of `nn.Embedding`.
        activation: of the head; as of `QuantizedLinear`.
        device: of all tensors.
        dtype: of the rows before quantization, and of the result.

    Attributes:
        qweight: [num_embeddings, embedding_dim] int8.
        amax: [num_embeddings], the largest magnitude in each row: exact in the dtype of the weight,
            which a step of 1/127 of it would not be.

    Raises:
        OptionError: unknown `activation`.
    """

    op = "int8_embedding"
    plain = nn.Embedding
    serves = (LINEAR,)
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
        super().__init__()
        one_of("QuantizedEmbedding: activation", activation, ACTIVATIONS)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise OptionError(
                f"QuantizedEmbedding: padding_idx={padding_idx} is none of {num_embeddings} rows"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self.activation = activation
        self._hold(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype).normal_())

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, activation: str = "per_token"
    ) -> QuantizedEmbedding:
        """The layer closest to an embedding without a `max_norm`."""
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            embedding.scale_grad_by_freq,
            embedding.sparse,
            activation,
            device="meta",
        )
        layer._hold(embedding.weight.detach())
        return layer

    def _hold(self, weight: Tensor) -> None:
        self.register_buffer("qweight", quantize_weight(weight)[0])
        empty = weight.shape[1] == 0
        amax = weight.new_zeros(len(weight)) if empty else weight.abs().amax(1)
        self.register_buffer("amax", amax)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_floating_point():
            return int8_linear(input, self.qweight, _step(self.amax), None, self.activation)
        step = _step(F.embedding(input, self.amax.unsqueeze(1)))
        return (F.embedding(input, self.qweight).to(step.dtype) * step).to(self.amax.dtype)

    def dense_weight(self) -> Tensor:
        """W = qweight·amax[:, None]/127, [num_embeddings, embedding_dim]."""
        step = _step(self.amax.unsqueeze(1))
        return (self.qweight.to(step.dtype) * step).to(self.amax.dtype)

    def dense_shape(self) -> tuple[int, ...]:
        return self.num_embeddings, self.embedding_dim


def _step(amax: Tensor) -> Tensor:
    """In float32 or wider, as `quantize_weight` has it."""
    return amax.to(torch.promote_types(amax.dtype, torch.float32)) / 127
