"""`TopK`: per token, only the k largest activations of an MLP reach its down projection."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.base import Layer, Pass, Phase, Replacement, Skip, as_parameter, unusable
from rewriter.errors import OptionError, of_type, one_of, whole_number
from rewriter.kernels.sparse import (
    Select,
    active_reference,
    held_bytes,
    importance_of,
    kernel_name,
    straight_through,
)
from rewriter.kernels.topk import topk_linear
from rewriter.sites import LINEAR, MLP, Kind, Site

__all__ = ["BLOCKS", "SCORES", "Score", "TopK", "TopKLinear"]


class TopKLinear(Layer):
    """y = topk_k(h) Wᵀ + bias, where topk_k keeps the k entries of largest score in each row.

    The score is |h|, times an importance where the layer has one. Exactly k entries are kept (ties
    go to the lower index), and the gradient is that of this function: zero for the entries that
    were dropped. With few rows on a CPU only the weights of kept entries are read.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        k: kept entries a row.
        bias: whether there is an additive bias.
        weighted: whether there is an importance.
        block: as many neighbours are kept together, by the largest score among them.
        straight_through: in training dropped entries have the gradient of a dense layer too.
        device, dtype: of the parameters.

    Shapes:
        input [*, in_features], output [*, out_features]; weight [out_features, in_features];
        bias [out_features]; importance, a buffer, [in_features] float32.

    Raises:
        OptionError: k is not an int from 1 to in_features, or block divides not both.
    """

    op: ClassVar[str] = "topk_linear"
    keeps_dtype: ClassVar[tuple[str, ...]] = ("importance",)
    bias: nn.Parameter | None
    importance: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        k: int,
        *,
        bias: bool = True,
        weighted: bool = False,
        block: int = 1,
        straight_through: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        whole_number("TopKLinear: k", k, most=in_features)
        whole_number("TopKLinear: block", block)
        if k % block or in_features % block:
            raise OptionError(f"TopKLinear: block={block} must divide k={k} and {in_features}")
        self.in_features, self.out_features, self.k = in_features, out_features, k
        self.weighted, self.block, self.straight_through = weighted, block, straight_through
        self.weight = nn.Parameter(
            torch.empty((out_features, in_features), device=device, dtype=dtype)
        )
        self.register_bias(out_features if bias else None, device, dtype)
        self.register_buffer(
            "importance",
            torch.empty(in_features, device=device, dtype=torch.float32) if weighted else None,
        )
        self.reset_parameters()

    @classmethod
    def from_weights(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        k: int,
        *,
        importance: Tensor | None = None,
        block: int = 1,
        straight_through: bool = False,
    ) -> TopKLinear:
        """The layer around a [out, in] weight; tensors that are Parameters stay the same."""
        out_features, in_features = weight.shape
        layer = cls(
            in_features,
            out_features,
            k,
            bias=bias is not None,
            weighted=importance is not None,
            block=block,
            straight_through=straight_through,
            device="meta",
        )
        layer.weight = as_parameter(weight)
        layer.bias = None if bias is None else as_parameter(bias)
        layer.importance = importance
        return layer

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As pickle calls it; layers up to version 0.5.0 have magnitudes and no blocks."""
        super().__setstate__(state)
        for name, value in {"weighted": False, "block": 1, "straight_through": False}.items():
            vars(self).setdefault(name, value)
        self._buffers.setdefault("importance", None)

    def reset_parameters(self) -> None:
        """Draws all parameters anew: uniform within ±1/√k; the importance follows the weight."""
        # nn.Linear's bound is 1/√fan_in; here only k inputs of a row are summed.
        bound = 1 / math.sqrt(self.k)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.importance is not None:
            self.importance = importance_of(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        if self.straight_through and self.training:
            return F.linear(straight_through(input, self.kept(input)), self.weight, self.bias)
        return topk_linear(input, self.weight, self.bias, self.k, self.importance, self.block)

    def kept(self, input: Tensor) -> Tensor:
        """Which entries of an input [*, in_features] are kept, bool."""
        return active_reference(input, Select(self.k, 0.0, self.importance, self.block))

    def stored_weight(self) -> Tensor:
        return self.weight

    def kernel(self, tokens: int) -> str:
        return kernel_name(self.weight, tokens, self.k / self.in_features)

    def held_bytes(self, tokens: int) -> int:
        return held_bytes(self.weight, tokens)


Score = Literal["magnitude", "wina"]
SCORES = ("magnitude", "wina")
BLOCKS = (1, 8, 16, 32)


@dataclass(frozen=True)
class TopK(Pass):
    """down(h) becomes down(topk_k(h)): per token the k entries of largest score, the rest zero.

    h is what enters an MLP's down projection: act(up(x)), or act(gate(x)) ∘ up(x) in a gated MLP.
    Weight and bias stay the very Parameters they were. The error depends on the activations, so
    the replacement states none. With up to 16 tokens on a CPU only the weights of
    kept entries are read, of a copy of the weight by columns that is kept beside it.

    Args:
        k: an int ≥ 1 is a count; a float in (0, 1] is a fraction of the hidden width. Both are
            rounded up to whole blocks.
        score: "magnitude": |h|; "wina": |h[i]|·‖W[:, i]‖, what the entry adds to the output at
            most. The norms are those of the weight when it was rewritten.
        block: as many neighbours are kept or dropped together, by the largest score among them: 1,
            8, 16 or 32.
        straight_through: in training dropped entries have the gradient of a dense layer, too.
        where: which sites; a name pattern, a predicate, or None for all.

    Skips an MLP whose down projection an earlier pass rewrote, whose hidden width is no larger
    than k or not divided by the block, or whose weights hold NaN or inf or are not real floating
    point numbers of 16 bits or more.

    Raises:
        OptionError: k is neither, or another option is impossible.

    Source: magnitude sparsity per token, as in CATS (Lee et al. 2024) and TEAL (Liu et al. 2024),
    with a count in place of their thresholds; "wina": Chen et al. 2025, "WINA: Weight Informed
    Neuron Activation for Accelerating Large Language Model Inference".
    """

    matches: ClassVar[tuple[Kind, ...]] = (MLP,)
    phase: ClassVar[Phase] = Phase.SPARSITY

    k: int | float
    score: Score = "magnitude"
    block: int = 1
    straight_through: bool = False

    def __post_init__(self) -> None:
        k: object = self.k
        count = isinstance(k, int) and not isinstance(k, bool) and k >= 1
        fraction = isinstance(k, float) and 0 < k <= 1
        if not count and not fraction:
            raise OptionError(
                f"TopK: k={k!r} must be an int >= 1 (how many) or a float in (0, 1] (a fraction)"
            )
        one_of("TopK: score", self.score, SCORES)
        one_of("TopK: block", self.block, BLOCKS)
        of_type("TopK", "straight_through", self.straight_through, bool, "True or False")

    def count(self, width: int) -> int:
        """How many of `width` activations are kept."""
        if isinstance(self.k, int):
            k = self.k
        else:
            # By the decimal that the user wrote: in binary, 0.07 of 100 would round up to 8.
            k = math.ceil(Fraction(repr(float(self.k))) * width)
        return -(-k // self.block) * self.block

    def propose(self, site: Site) -> Replacement | Skip:
        down = site.parts["down"]
        if down.kind != LINEAR:
            kind = down.kind if isinstance(down.kind, str) else down.kind.__name__
            return Skip(
                "the down projection {} is a {}, and TopK wraps a plain linear: leave it out of "
                "the earlier pass with where=",
                down.fqn,
                kind,
            )
        weight, bias = site.weight, site.bias
        if refused := unusable(weight, bias):
            return refused
        k = self.count(site.in_features)
        if k >= site.in_features:
            return Skip("k={} keeps all {} activations", k, site.in_features)
        if site.in_features % self.block:
            return Skip("block={} does not divide its {} activations", self.block, site.in_features)
        if not isinstance(weight, nn.Parameter):  # a view: it gets storage of its own
            weight = weight.clone(memory_format=torch.contiguous_format)
        layer = TopKLinear.from_weights(
            weight,
            bias,
            k,
            importance=importance_of(weight) if self.score == "wina" else None,
            block=self.block,
            straight_through=self.straight_through,
        )
        return Replacement(
            layer,
            error=None,
            note=f"keeps {k} of {site.in_features} activations a token; the weight is unchanged",
        )
