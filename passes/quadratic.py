"""`Quadratic`: second-order neurons in the place of linear layers."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rewriter.base import Layer, Pass, Phase, Replacement, Skip, as_parameter, unusable
from rewriter.errors import one_of
from rewriter.kernels.quadratic import quadratic_linear
from rewriter.sites import LINEAR, Kind, Site

__all__ = ["Quadratic", "QuadraticLinear"]

NEURONS = ("new",)
INITS = ("preserve", "random")


class QuadraticLinear(Layer):
    """y = (x W_aᵀ) ∘ (x W_bᵀ) + x W_cᵀ + bias: three times the weights and MACs of a linear layer.

    Built from scratch, the weights are uniform and zero-mean such that, on inputs of unit
    variance, the output has the variance 1/3 of an `nn.Linear`, half of it from each order. The
    second-order part grows with the square of the input's scale: normalise what goes in.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: whether there is an additive bias.
        device, dtype: of the parameters.

    Shapes:
        input [*, in_features], output [*, out_features]; weight_a, weight_b, weight_c
        [out_features, in_features]; bias [out_features].

    Source: QuadraLib (Xu et al., MLSys 2022), neuron "new".
    """

    op: ClassVar[str] = "quadratic_linear"
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features)
        self.weight_a = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.weight_b = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.weight_c = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_bias(out_features if bias else None, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_weights(
        cls, weight_a: Tensor, weight_b: Tensor, weight_c: Tensor, bias: Tensor | None
    ) -> QuadraticLinear:
        """The layer around these [out, in] tensors; those that are Parameters stay the same."""
        out_features, in_features = weight_c.shape
        layer = cls(in_features, out_features, bias=bias is not None, device="meta")
        layer.weight_a, layer.weight_b, layer.weight_c = map(
            as_parameter, (weight_a, weight_b, weight_c)
        )
        layer.bias = None if bias is None else as_parameter(bias)
        return layer

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all parameters anew, as the class docstring says."""
        # Var[(x·a)(x·b)] = n² Var[a] Var[b] and Var[x·c] = n Var[c], both to be 1/6; a uniform
        # variable on ±r has variance r²/3.
        n = max(self.in_features, 1)
        second, first = math.sqrt(3 / math.sqrt(6) / n), math.sqrt(3 / 6 / n)
        nn.init.uniform_(self.weight_a, -second, second, generator)
        nn.init.uniform_(self.weight_b, -second, second, generator)
        nn.init.uniform_(self.weight_c, -first, first, generator)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(n), 1 / math.sqrt(n), generator)

    def forward(self, input: Tensor) -> Tensor:
        return quadratic_linear(input, self.weight_a, self.weight_b, self.weight_c, self.bias)

    @property
    def weight(self) -> Tensor:
        """W_c, the first-order part: what code that knows linear layers reads and changes."""
        return self.weight_c

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self.weight_c = value


@dataclass(frozen=True)
class Quadratic(Pass):
    """W x + b becomes (W_a x) ∘ (W_b x) + W_c x + b, for training on from there.

    With `init="preserve"`, W_c is the trained weight itself (the same Parameter where the site
    stores it as [out, in]), W_b is zero and W_a is random as in a new `nn.Linear`: the model
    computes exactly what it did. At that point the gradient of W_b is non-zero and that of W_a is
    zero, since it is multiplied by W_b; from the first step of W_b on, both train. W_a depends on
    `torch.initial_seed()` and the site's name only, so a dry run and the rewrite agree and the
    global random state is left alone. With `init="random"` every weight is new, as in a
    `QuadraticLinear` built from scratch.

    New weights are frozen where the site's weight is.

    Args:
        neuron: the kind of second-order neuron; "new" is the one above.
        init: "preserve" or "random".
        where: which sites; a name pattern, a predicate, or None for all.

    Skips a site whose weights are empty, hold NaN or inf, or are not real floating point numbers
    of 16 bits or more.

    Raises:
        OptionError: an unknown neuron or init.

    Sources: QuadraLib (Xu et al., MLSys 2022); starting at the first-order layer is ReLinear
    (Fan et al. 2021).
    """

    matches: ClassVar[tuple[Kind, ...]] = (LINEAR,)
    phase: ClassVar[Phase] = Phase.STRUCTURE

    neuron: str = "new"
    init: Literal["preserve", "random"] = "preserve"

    def __post_init__(self) -> None:
        one_of("Quadratic: neuron", self.neuron, NEURONS)
        one_of("Quadratic: init", self.init, INITS)

    @property
    def exact(self) -> bool:
        """The rewritten model computes the same function until it is trained."""
        return self.init == "preserve"

    def propose(self, site: Site) -> Replacement | Skip:
        weight, bias = site.weight, site.bias
        if refused := unusable(weight, bias):
            return refused
        if weight.numel() == 0:
            return Skip("the weight is empty: {}", tuple(weight.shape))
        generator = _generator(site.fqn, weight.device)
        if self.init == "random":
            layer = _untrained(weight, bias, generator)
            return Replacement(layer, error=None, note="random weights: to be trained")
        if not isinstance(weight, nn.Parameter):  # a view: W_c gets storage of its own
            weight = weight.clone(memory_format=torch.contiguous_format)
        bound = 1 / math.sqrt(site.in_features)
        weight_a = torch.empty_like(weight).uniform_(-bound, bound, generator=generator)
        layer = QuadraticLinear.from_weights(
            as_parameter(weight_a, like=weight),
            as_parameter(torch.zeros_like(weight), like=weight),
            weight,
            bias,
        )
        return Replacement(layer, error=0.0, note="starts as the linear layer that it was")


def _generator(fqn: str, device: torch.device) -> torch.Generator | None:
    if device.type == "meta":
        return None
    seed = (torch.initial_seed() + zlib.crc32(fqn.encode())) % 2**63
    return torch.Generator(device).manual_seed(seed)


def _untrained(
    weight: Tensor, bias: Tensor | None, generator: torch.Generator | None
) -> QuadraticLinear:
    out_features, in_features = weight.shape
    layer = QuadraticLinear(
        in_features, out_features, bias=bias is not None, device="meta", dtype=weight.dtype
    ).to_empty(device=weight.device)
    layer.reset_parameters(generator)
    layer.requires_grad_(weight.requires_grad)
    if layer.bias is not None and bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    return layer
