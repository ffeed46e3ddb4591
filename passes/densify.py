"""Densify: a structured layer back to the nn.Linear that computes the same function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rewriter.base import Pass, Phase, Replacement, Skip, as_parameter
from rewriter.passes.monarch import MonarchLinear
from rewriter.passes.monarchchain import MonarchChainLinear
from rewriter.passes.monarchresidual import MonarchResidualLinear
from rewriter.sites import Kind, Site

__all__ = ["Densify"]


_STRUCTURED = (MonarchLinear, MonarchChainLinear, MonarchResidualLinear)


@dataclass(frozen=True)
class Densify(Pass):
    """W = L·Pᵀ·R (or the chain, or the sum) multiplied out: y = x Wᵀ + b. Exact up to rounding.

    For sparse-to-dense training (most steps as Monarch, the last ones dense), and to hand a model
    to a tool that knows nn.Linear only.

    Args:
        where: which sites; a name pattern, a predicate, or None for all.

    Source: Dao et al. 2022, section 3.3 (sparse-to-dense training).
    """

    matches: ClassVar[tuple[Kind, ...]] = _STRUCTURED
    phase: ClassVar[Phase] = Phase.STRUCTURE

    @property
    def exact(self) -> bool:
        return True

    def propose(self, site: Site) -> Replacement | Skip:
        layer = site.module
        assert isinstance(layer, _STRUCTURED), site.fqn
        dense = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        trainable = any(p.requires_grad for n, p in layer.named_parameters() if n != "bias")
        dense.weight = nn.Parameter(layer.dense_weight().detach(), requires_grad=trainable)
        if layer.bias is not None:
            dense.bias = as_parameter(layer.bias)
        dense.train(layer.training)
        return Replacement(dense)
