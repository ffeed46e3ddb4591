"""`TopK`: per token, only the k largest activations of an MLP reach its down projection."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from rewriter.base import Layer, Pass, Phase, Replacement, Skip, as_parameter, unusable
from rewriter.errors import OptionError, whole_number
from rewriter.kernels.topk import topk_linear
from rewriter.sites import LINEAR, MLP, Kind, Site

__all__ = ["TopK", "TopKLinear"]


class TopKLinear(Layer):
    """y = topk_k(h) Wᵀ + bias, where topk_k keeps the k entries of largest |h| in each row.

    Exactly k entries are kept (ties go as `torch.topk` picks), and the gradient is that of this
    function: zero for the entries that were dropped. The arithmetic is still a dense GEMM.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        k: kept entries a row.
        bias: whether there is an additive bias.
        device, dtype: of the parameters.

    Shapes:
        input [*, in_features], output [*, out_features]; weight [out_features, in_features];
        bias [out_features].

    Raises:
        OptionError: k is not an int from 1 to in_features.
    """

    op: ClassVar[str] = "topk_linear"
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        k: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        whole_number("TopKLinear: k", k, most=in_features)
        self.in_features, self.out_features, self.k = in_features, out_features, k
        self.weight = nn.Parameter(
            torch.empty((out_features, in_features), device=device, dtype=dtype)
        )
        self.register_bias(out_features if bias else None, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_weights(cls, weight: Tensor, bias: Tensor | None, k: int) -> TopKLinear:
        """The layer around a [out, in] weight; tensors that are Parameters stay the same."""
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, k, bias=bias is not None, device="meta")
        layer.weight = as_parameter(weight)
        layer.bias = None if bias is None else as_parameter(bias)
        return layer

    def reset_parameters(self) -> None:
        """Draws all parameters anew: uniform within ±1/√k."""
        # nn.Linear's bound is 1/√fan_in; here only k inputs of a row are summed.
        bound = 1 / math.sqrt(self.k)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return topk_linear(input, self.weight, self.bias, self.k)


@dataclass(frozen=True)
class TopK(Pass):
    """down(h) becomes down(topk_k(h)): the k largest |h| of every token, the rest zero.

    h is what enters an MLP's down projection: act(up(x)), or act(gate(x)) ∘ up(x) in a gated MLP.
    Weight and bias stay the very Parameters they were. The error depends on the activations, so
    the replacement states none.

    Args:
        k: an int ≥ 1 is a count; a float in (0, 1] is a fraction of the hidden width, rounded up.
        where: which sites; a name pattern, a predicate, or None for all.

    Skips an MLP whose down projection an earlier pass rewrote, whose hidden width is no larger
    than k, or whose weights hold NaN or inf or are not real floating point numbers of 16 bits or
    more.

    Raises:
        OptionError: k is neither.

    Source: magnitude sparsity per token, as in CATS (Lee et al. 2024) and TEAL (Liu et al. 2024),
    with a count in place of their thresholds.
    """

    matches: ClassVar[tuple[Kind, ...]] = (MLP,)
    phase: ClassVar[Phase] = Phase.SPARSITY

    k: int | float

    def __post_init__(self) -> None:
        k: object = self.k
        count = isinstance(k, int) and not isinstance(k, bool) and k >= 1
        fraction = isinstance(k, float) and 0 < k <= 1
        if not count and not fraction:
            raise OptionError(
                f"TopK: k={k!r} must be an int >= 1 (how many) or a float in (0, 1] (a fraction)"
            )

    def count(self, width: int) -> int:
        """How many of `width` activations are kept."""
        if isinstance(self.k, int):
            return self.k
        # By the decimal that the user wrote: in binary, 0.07 of 100 would round up to 8.
        return math.ceil(Fraction(repr(float(self.k))) * width)

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
        if not isinstance(weight, nn.Parameter):  # a view: it gets storage of its own
            weight = weight.clone(memory_format=torch.contiguous_format)
        layer = TopKLinear.from_weights(weight, bias, k)
        return Replacement(
            layer,
            error=None,
            note=f"keeps {k} of {site.in_features} activations a token; the weight is unchanged",
        )
