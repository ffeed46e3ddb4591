"""Monarch: linear layers whose weight is a product of two block-diagonal matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from rewriter.errors import OptionError
from rewriter.kernels.monarch import monarch_dense, monarch_linear
from rewriter.kernels.monarch_project import monarch_project
from rewriter.sites import LINEAR, Kind, Site

__all__ = ["Monarch", "MonarchLinear"]


def _default_rank(in_features: int, out_features: int, nblocks: int) -> int:
    return math.ceil(math.ceil(min(in_features, out_features) / nblocks) / nblocks)


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} must be an integer of at least 1, got {value!r}")


class MonarchLinear(Layer):
    """y[…, s·N+l] = Σ_k Σ_r left[l,s,(k,r)] Σ_i right[k,(l,r),i] x[…, k·ib+i] + bias[s·N+l].

    With N = nblocks, ib = ⌈in_features/N⌉ and ob = ⌈out_features/N⌉: a linear layer whose weight,
    cut into N² slices, has rank `rank` in each of them. It holds N²·rank·(ib+ob) weights and as
    many multiply-adds per row; at the default rank that is (in·out + min(in, out)²)/N where N²
    divides both sizes: half of a square layer at N = 4.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        nblocks: N.
        rank: of each slice; None for ⌈min(ib, ob)/N⌉.
        bias: whether there is a bias.
        device, dtype: of the parameters.

    Attributes:
        right: [N, N·rank, ib], rows (l, r).
        left: [N, ob, N·rank], columns (k, r).
        bias: [out_features] or None.

    The random init is uniform, with factors scaled so that y without bias has the standard
    deviation that nn.Linear's has (0.577 times that of x); bias U(±1/√in_features).

    Raises:
        OptionError: nblocks is larger than a side of the layer, or a size is not positive.

    Source: Dao et al. 2022, "Monarch: Expressive Structured Matrices for Efficient and Accurate
    Training", sections 3 and 4.
    """

    op = "monarch_linear"
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int = 4,
        rank: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _positive("in_features", in_features)
        _positive("out_features", out_features)
        _positive("nblocks", nblocks)
        if nblocks > min(in_features, out_features):
            raise OptionError(
                f"nblocks {nblocks} is larger than a side of the layer, {in_features} -> "
                f"{out_features}: use at most {min(in_features, out_features)}"
            )
        if rank is None:
            rank = _default_rank(in_features, out_features, nblocks)
        _positive("rank", rank)
        self.in_features, self.out_features = in_features, out_features
        self.nblocks, self.rank = nblocks, rank
        ib, ob = -(-in_features // nblocks), -(-out_features // nblocks)
        self.right = nn.Parameter(
            torch.empty(nblocks, nblocks * rank, ib, device=device, dtype=dtype)
        )
        self.left = nn.Parameter(
            torch.empty(nblocks, ob, nblocks * rank, device=device, dtype=dtype)
        )
        self.register_bias(out_features if bias else None, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_factors(
        cls, right: Tensor, left: Tensor, bias: Tensor | None, in_features: int, out_features: int
    ) -> MonarchLinear:
        """The layer around given factors (kernels/monarch.py has their layout). A tensor that is
        a Parameter becomes the layer's own, not a copy."""
        n = right.shape[0]
        layer = cls(
            in_features, out_features, n, right.shape[1] // n, bias is not None, device="meta"
        )
        layer.right, layer.left = as_parameter(right), as_parameter(left)
        layer.bias = None if bias is None else as_parameter(bias)
        return layer

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the class docstring says."""
        # Var y = Var x · Σ_k n_k · rank · Var left · Var right with Σ_k n_k = in_features; right
        # keeps the variance of x, left brings it to the third of it that nn.Linear gives.
        var_right = 1 / self.right.shape[2]
        var_left = 1 / (3 * self.in_features * self.rank * var_right)
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.right, -math.sqrt(3 * var_right), math.sqrt(3 * var_right))
        nn.init.uniform_(self.left, -math.sqrt(3 * var_left), math.sqrt(3 * var_left))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return monarch_linear(x, self.right, self.left, self.bias, self.out_features)

    def config(self) -> Mapping[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "nblocks": self.nblocks,
            "rank": self.rank,
            "bias": self.bias is not None,
        }

    def kernel(self, tokens: int) -> str:
        return "torch.bmm"

    def dense_weight(self) -> Tensor:
        """W[s·N+l, k·ib+i] = Σ_r left[l,s,(k,r)] right[k,(l,r),i], [out_features, in_features]."""
        return monarch_dense(self.right, self.left, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`, for code that reads a linear layer's weight (its dtype, mostly)."""
        return self.dense_weight()


@dataclass(frozen=True)
class Monarch(Pass):
    """W ≈ P·L·Pᵀ·R with block-diagonal L and R; see `MonarchLinear`.

    Args:
        nblocks: blocks N of each factor; weights and multiply-adds shrink by about N/2 for square
            layers.
        rank: of each of the N² slices of W; None for ⌈min(ib, ob)/N⌉, the classic Monarch.
        init: "project" starts at the closest Monarch matrix to the trained weight (the optimum,
            from an SVD per slice), "random" forgets the weight and keeps only the bias.
        where: which sites; a name pattern, a predicate, or None for all.

    Skips a site whose weights are not real floating point numbers of 16 bits or more or hold NaN or
    inf, which has fewer features than nblocks, or which would not get smaller.

    Raises:
        OptionError: an option is impossible.

    Source: Dao et al. 2022.
    """

    matches: ClassVar[tuple[Kind, ...]] = (LINEAR,)
    phase: ClassVar[Phase] = Phase.STRUCTURE

    nblocks: int = 4
    rank: int | None = None
    init: Literal["project", "random"] = "project"

    def __post_init__(self) -> None:
        _positive("Monarch: nblocks", self.nblocks)
        if self.rank is not None:
            _positive("Monarch: rank", self.rank)
        if self.init not in ("project", "random"):
            raise OptionError(f'Monarch: init must be "project" or "random", got {self.init!r}')

    def propose(self, site: Site) -> Replacement | Skip:
        weight, bias = site.weight, site.bias
        out_features, in_features = weight.shape
        n = self.nblocks
        if refused := unusable(weight, bias):
            return refused
        if n > min(in_features, out_features):
            return Skip("nblocks {} is more than the {} -> {} features", n, *weight.shape[::-1])
        rank = self.rank or _default_rank(in_features, out_features, n)
        held = n * n * rank * (-(-in_features // n) - (-out_features // n))
        if held >= weight.numel():
            return Skip(
                "monarch would hold {} parameters, the dense weight holds {}", held, weight.numel()
            )

        note = ""
        error: float | None
        if self.init == "project":
            right, left, error = monarch_project(weight, n, rank)
        else:
            note = "random init: the trained weight is forgotten"
            fresh = MonarchLinear(
                in_features, out_features, n, rank, False, weight.device, weight.dtype
            )
            right, left = fresh.right.detach(), fresh.left.detach()
            error = relative_error(weight, fresh.dense_weight())
        layer = MonarchLinear.from_factors(
            as_parameter(right, like=weight),
            as_parameter(left, like=weight),
            bias,
            in_features,
            out_features,
        )
        layer.train(site.module is None or site.module.training)
        return Replacement(layer, error, note)
