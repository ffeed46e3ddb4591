"""QAT: layers that train with the rounding of a scheme of `Quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rewriter.base import Layer, Pass, Phase, Replacement, Skip, relative_error, unusable
from rewriter.errors import OptionError, of_type
from rewriter.passes.quantize import Activation, Quantize
from rewriter.passes.quantized_conv import convolution, range_of_convolution
from rewriter.passes.trained import TrainedLinear, check_options
from rewriter.passes.trained_conv import CONVOLUTIONS_TRAIN_FOR, TRAINED_CONVOLUTIONS
from rewriter.sites import CONV, LINEAR, Kind, Site

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
        convolutions: whether convolutions train with rounding, too, as of `Quantize`.
        learned_step: whether the steps between the levels of weights train, too (Esser et al.
            2020).
        where: which sites; a name pattern, a predicate, or None for all.

    Skips a site whose weights are not floating point numbers of 16 bits or more, or hold NaN or
    inf, and convolutions that no int8 kernel computes.

    Raises:
        OptionError: a scheme or option that is unknown, that the scheme does not read, or that
            contradicts another.
    """

    matches: ClassVar[tuple[Kind, ...]] = (LINEAR, CONV)
    phase: ClassVar[Phase] = Phase.PRECISION

    scheme: str = "int8-dynamic"
    activation: Activation = "per_token"
    group_size: int = 64
    symmetric: bool = True
    convolutions: bool = False
    learned_step: bool = False

    def __post_init__(self) -> None:
        own = self._options()
        check_options("QAT", **own)
        del own["learned_step"]
        Quantize(**own)  # refuses what the scheme does not read
        of_type("QAT", "convolutions", self.convolutions, bool, "True or False")
        if self.convolutions and self.scheme not in CONVOLUTIONS_TRAIN_FOR:
            known = " and ".join(map(repr, CONVOLUTIONS_TRAIN_FOR))
            raise OptionError(
                f"QAT: convolutions train for {known} alone, not for {self.scheme!r}, which has no "
                "layer for them"
            )

    @property
    def simulates(self) -> bool:
        return True

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return self.matches if self.convolutions else (LINEAR,)

    def _options(self) -> dict[str, Any]:
        """Those of a `TrainedLinear`."""
        names = "scheme", "activation", "group_size", "symmetric", "learned_step"
        return {name: getattr(self, name) for name in names}

    def propose(self, site: Site) -> Replacement | Skip:
        weight, bias = site.weight, site.bias
        if refused := unusable(weight, bias):
            return refused
        layer = self._conv(site) if site.kind == CONV else self._linear(weight, bias)
        if isinstance(layer, Skip):
            return layer
        layer.train(site.module is None or site.module.training)
        return Replacement(layer, relative_error(weight, layer.dense_weight()))

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Layer:
        return TrainedLinear.from_weight(weight, bias, **self._options())

    def _conv(self, site: Site) -> Layer | Skip:
        conv = convolution(site)
        if isinstance(conv, Skip):
            return conv
        cls = TRAINED_CONVOLUTIONS[conv.weight.dim() - 2]
        options = {"scheme": self.scheme, "learned_step": self.learned_step}
        layer: Layer = cls.from_conv(conv, range_of_convolution(self.activation), **options)
        return layer
