"""Monarch of order p, MM* and (MM*)²: linear layers that mix along the axes of a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rewriter.base import (
    LinearLayer,
    Pass,
    Phase,
    Replacement,
    Skip,
    as_parameter,
    relative_error,
    unusable,
)
from rewriter.errors import OptionError, one_of, whole_number
from rewriter.kernels.monarch_chain import (
    chain_dense,
    chain_grid,
    chain_linear,
    chain_project,
    chain_shapes,
    star_axes,
)
from rewriter.kernels.monarch_star import star_project
from rewriter.passes.monarch import INITS
from rewriter.sites import LINEAR, Kind, Site

__all__ = ["MonarchChain", "MonarchChainLinear"]

torch.fx.wrap("chain_linear")  # one node of torch.fx.symbolic_trace: it compares sizes


def _check(order: object, stars: object, expansion: object) -> None:
    # 2^64 features have no more axes than 64; each is a factor of its own, as each star is two, and
    # an expansion makes every one of them so many times as large
    for name, value, least, most in (
        ("order", order, 2, 64),
        ("stars", stars, 0, 64),
        ("expansion", expansion, 1, 64),
    ):
        whole_number(name, value, least, most)
    if stars and order != 2:
        raise OptionError(f"stars={stars} mixes a grid of two axes: leave order={order} out")
    if expansion != 1 and not stars:
        raise OptionError(f"expansion={expansion} is for stars: order p has no use for it")


class MonarchChainLinear(LinearLayer):
    """y = crop(F_t ⋯ F_1 pad(x)) + bias, each F a mix along one axis of a grid of x.

    Order p mixes each of p axes once: p·n^(1+1/p) weights of n². (MM*)^w mixes outer, inner,
    outer, … of a square grid, 2w + 1 times in all: (2w + 1)·n^1.5 weights; it holds every
    permutation and the transforms of signal processing (tests/test_monarchchain.py builds them).

    Args:
        in_features, out_features: sizes of the last dimensions of x and y.
        order: p, with stars = 0.
        stars: w; 0 for order p.
        expansion: (MM*)^w acts at this many times the larger of the sizes.
        bias: whether there is a bias.
        device, dtype: of the parameters.

    Attributes:
        factor_0, factor_1, …: [others, o, i], in the order in which they are applied.
        bias: [out_features] or None.

    The random init is uniform and gives y the standard deviation that nn.Linear gives.

    Raises:
        OptionError: an option is impossible.

    Source: Dao et al. 2022, sections 3.1 and 3.2; Fu et al. 2023, "Monarch Mixer" (order p).
    """

    op = "monarch_chain"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        order: int = 2,
        stars: int = 0,
        expansion: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(order, stars, expansion)
        if min(in_features, out_features) < 1:
            raise OptionError(f"sizes must be at least 1, got {in_features} -> {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.order, self.stars, self.expansion = order, stars, expansion
        if stars:
            self.axes = star_axes(stars)
            self.grid = after = chain_grid(expansion * max(in_features, out_features), 2)
        else:
            self.axes = list(range(order - 1, -1, -1))
            self.grid, after = chain_grid(in_features, order), chain_grid(out_features, order)
        for i, shape in enumerate(chain_shapes(self.axes, self.grid, after)):
            self.register_parameter(
                f"factor_{i}", nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            )
        self.register_bias(out_features if bias else None, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_factors(
        cls,
        factors: Sequence[Tensor],
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        order: int = 2,
        stars: int = 0,
        expansion: int = 1,
    ) -> MonarchChainLinear:
        """The layer around given factors; a Parameter becomes the layer's own, not a copy."""
        layer = cls(
            in_features, out_features, order, stars, expansion, bias is not None, device="meta"
        )
        for i, factor in enumerate(factors):
            layer.register_parameter(f"factor_{i}", as_parameter(factor))
        layer.bias = None if bias is None else as_parameter(bias)
        return layer

    @property
    def factors(self) -> list[Tensor]:
        return [getattr(self, f"factor_{i}") for i in range(len(self.axes))]

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the class docstring says."""
        # A mix keeps the variance; the last one brings it to nn.Linear's third, and makes up for
        # the zeros that pad the grid.
        for i, factor in enumerate(self.factors):
            variance = 1 / factor.shape[-1]
            if i + 1 == len(self.axes):
                variance *= math.prod(self.grid) / self.in_features / 3
            nn.init.uniform_(factor, -math.sqrt(3 * variance), math.sqrt(3 * variance))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return chain_linear(input, self.factors, self.axes, self.grid, self.bias, self.out_features)

    def kernel(self, tokens: int) -> str:
        return "torch.bmm"

    def lr_scales(self) -> Mapping[str, float]:
        """(in_features / fan-in of the factor) / number of factors."""
        count = len(self.axes)
        return {
            f"factor_{i}": self.in_features / f.shape[-1] / count
            for i, f in enumerate(self.factors)
        }

    def dense_weight(self) -> Tensor:
        """F_t ⋯ F_1, [out_features, in_features]."""
        return chain_dense(self.factors, self.axes, self.grid, self.out_features, self.in_features)


@dataclass(frozen=True)
class MonarchChain(Pass):
    """W → a product of mixes; see `MonarchChainLinear`.

    Args:
        order: p of a product that mixes every axis once.
        stars: w of (MM*)^w in place of it.
        expansion: of (MM*)^w.
        init: "project" starts at the projection of the trained weight: for p = 2 the optimum, for
            p > 2 greedy, for MM* exact where the weight is of the class, and else, as for
            (MM*)^w, a local optimum from the Monarch matrix on; "random" forgets the weight.
        where: which sites; a name pattern, a predicate, or None for all.

    Skips a site whose weights are not real floating point numbers of 16 bits or more or hold NaN or
    inf, or which would not get smaller.

    Raises:
        OptionError: an option is impossible.

    Source: Dao et al. 2022; Fu et al. 2023.
    """

    matches: ClassVar[tuple[Kind, ...]] = (LINEAR,)
    phase: ClassVar[Phase] = Phase.STRUCTURE

    order: int = 3
    stars: int = 0
    expansion: int = 1
    init: Literal["project", "random"] = "project"

    def __post_init__(self) -> None:
        _check(2 if self.stars else self.order, self.stars, self.expansion)
        one_of("MonarchChain: init", self.init, INITS)

    def propose(self, site: Site) -> Replacement | Skip:
        weight, bias = site.weight, site.bias
        out_features, in_features = weight.shape
        if refused := unusable(weight, bias):
            return refused
        order = 2 if self.stars else self.order
        shape = in_features, out_features, order, self.stars, self.expansion
        fresh = MonarchChainLinear(*shape, bias=False, device=weight.device, dtype=weight.dtype)
        held = sum(f.numel() for f in fresh.factors)
        if held >= weight.numel():
            return Skip(
                "the chain would hold {} parameters, the dense weight holds {}",
                held,
                weight.numel(),
            )
        note = ""
        error: float | None
        if self.init == "random":
            note = "random init: the trained weight is forgotten"
            factors = [f.detach() for f in fresh.factors]
            error = relative_error(weight, fresh.dense_weight())
        elif self.stars:
            factors, error = star_project(weight, fresh.axes, fresh.grid)
        else:
            factors, error = chain_project(weight, fresh.grid, chain_grid(out_features, order))
        own = [as_parameter(f, like=weight) for f in factors]
        layer = MonarchChainLinear.from_factors(own, bias, *shape)
        layer.train(site.module is None or site.module.training)
        return Replacement(layer, error, note)
