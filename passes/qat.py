"""QAT: layers that train with the rounding of a scheme of `Quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.base import Pass, Phase, Replacement, Skip, relative_error, unusable
from rewriter.passes.quantize import Activation, Quantize
from rewriter.passes.trained import TrainedLinear, check_options
from rewriter.sites import LINEAR, Kind, Site

__all__ = ["QAT"]


@dataclass(frozen=True)
class QAT(Pass):
    """W ← W with a forward that rounds it, and x, as `Quantize` of these options would; see
    `TrainedLinear`. Train, then `rewrite(model, [Quantize(…)])` with the same options gives the
    layers of integers, whose outputs are equal.

    Args:
        scheme: which one to train for: "int8-dynamic", "int8-weight", "int4-weight" or
            "int4-dynamic".
        activation, group_size, symmetric: as of `Quantize`.
        learned_step: the steps between the levels of weights train too (Esser et al. 2020).
        where: which sites; a name pattern, a predicate, or None for all.

    Skips a site whose weights are not floating point numbers of 16 bits or more, or hold NaN or
    inf.

    Raises:
        OptionError: a scheme or option that is unknown, that the scheme does not read, or that
            contradicts another.
    """

    matches: ClassVar[tuple[Kind, ...]] = (LINEAR,)
    phase: ClassVar[Phase] = Phase.PRECISION

    scheme: str = "int8-dynamic"
    activation: Activation = "per_token"
    group_size: int = 64
    symmetric: bool = True
    learned_step: bool = False

    def __post_init__(self) -> None:
        own = self.scheme, self.activation, self.group_size, self.symmetric
        check_options("QAT", *own, self.learned_step)
        Quantize(  # refuses what the scheme does not read
            self.scheme,
            self.activation,
            group_size=self.group_size,
            symmetric=self.symmetric,
        )

    @property
    def simulates(self) -> bool:
        return True

    def propose(self, site: Site) -> Replacement | Skip:
        weight, bias = site.weight, site.bias
        if refused := unusable(weight, bias):
            return refused
        options = self.spec()
        assert options is not None
        layer = TrainedLinear.from_weight(weight, bias, **options)
        layer.train(site.module is None or site.module.training)
        return Replacement(layer, relative_error(weight, layer.dense_weight()))
