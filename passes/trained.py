"""`TrainedLinear`: the linear layer of a scheme of `Quantize` while its weights still train."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewriter.base import Layer, Pass, Skip, as_parameter
from rewriter.errors import OptionError, one_of
from rewriter.kernels.int8_linear import (
    ACTIVATIONS,
    dequantize_weight,
    int8_linear,
)
from rewriter.kernels.straight_through import straight_through
from rewriter.kernels.weight_levels import LEVELS, first_step, stepped, weight_levels
from rewriter.kernels.weight_only import (
    GROUP_SIZES,
    check_width,
    dequantize_groups,
    int4_dynamic_linear,
    int4_linear,
    int8_weight_linear,
    pack,
)
from rewriter.sites import Site

__all__ = ["TRAINED", "TrainedLinear", "check_options", "trained"]

Levels = tuple[Tensor, Tensor, Tensor | None]
"""Integers, scale and zero, as a scheme's layer holds them."""


class TrainedLinear(Layer, nn.Linear):
    """y = q(x) Ŵᵀ + bias with Ŵ = W rounded as a scheme of `Quantize` rounds it; W trains.

    The forward is the scheme's own kernel on weights rounded anew, so `Quantize` gives a layer of
    equal outputs. Gradients pass rounding as if it were the identity (straight-through): W gets
    gᵀ x. It is an `nn.Linear` with its parameters, so checkpoints of one fit, and adapters.

    With `learned_step` the steps between levels are parameters too, after Esser et al. 2020,
    "Learned Step Size Quantization": step gets Σ gᵀx·(q − w/step) (q where w lies beyond the
    levels), times 1/√(weights of a step · highest level); W gets nothing there.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether there is a bias.
        scheme: one of `TRAINED`.
        activation, group_size, symmetric: as of `Quantize`, where the scheme reads them.
        learned_step: whether steps are parameters, and not those of the largest weights; groups
            must be symmetric then.
        device, dtype: of the parameters.

    Attributes:
        weight: W, [out_features, in_features].
        step: [out_features] or, of groups, [out_features, groups]; None without `learned_step`.
        bias: [out_features] or None.

    Raises:
        OptionError: unknown or contradictory options.

    Source: Jacob et al. 2018, section 3 (rounding is simulated in training).
    """

    op = "trained_linear"
    step: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str = "int8-dynamic",
        activation: Literal["per_token", "per_tensor"] = "per_token",
        group_size: Literal[32, 64, 128] = 64,
        symmetric: bool = True,
        learned_step: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options("TrainedLinear", scheme, activation, group_size, symmetric, learned_step)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.scheme, self.activation = scheme, activation
        self.group_size, self.symmetric = group_size, symmetric
        self.learned_step = learned_step
        self.register_parameter("step", self._first_step() if learned_step else None)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, **options: Any) -> TrainedLinear:
        """The layer that trains weight [out, in]; Parameters are kept, not copied."""
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, bias is not None, **options, device="meta")
        layer.weight = as_parameter(weight if isinstance(weight, nn.Parameter) else _own(weight))
        layer.bias = None if bias is None else as_parameter(bias)  # type: ignore[assignment]
        layer.step = layer._first_step() if layer.learned_step else None
        return layer

    def levels(self) -> Levels:
        """What the scheme's layer will hold: W rounded. No gradient passes."""
        with torch.no_grad():
            own = self._group_size(), self.symmetric, TRAINED[self.scheme].bits
            return weight_levels(self.weight, self.step, *own)

    def forward(self, input: Tensor) -> Tensor:
        levels = self.levels()
        y = TRAINED[self.scheme].multiply(self, input, levels, self.bias)
        slope = self.weight if self.step is None else self._slope(levels)
        return straight_through(y, input, slope)

    def dense_weight(self) -> Tensor:
        """Ŵ, [out_features, in_features], without gradient."""
        levels, scale, zero = self.levels()
        if scale.dim() == 1:
            return dequantize_weight(levels, scale)
        return dequantize_groups(levels, scale, zero)[:, : self.in_features]

    def trained_for(self) -> Mapping[str, Any]:
        """The options of the `Quantize` that gives a layer of equal outputs."""
        return {n: getattr(self, n) for n in ("scheme", *TRAINED[self.scheme].options)}

    # steps that are learned

    def _first_step(self) -> nn.Parameter:
        bits = TRAINED[self.scheme].bits
        return nn.Parameter(first_step(self.weight, bits, self._group_size()))

    def _slope(self, levels: Levels) -> Tensor:
        """Ŵ, with derivatives in W and step."""
        assert self.step is not None
        bits = TRAINED[self.scheme].bits
        return stepped(self.weight, self.step, *levels[:2], bits, self._group_size())

    def _group_size(self) -> int:
        return self.group_size if TRAINED[self.scheme].groups else 0


@dataclass(frozen=True)
class _Way:
    """How a scheme multiplies by weights that are rounded as `weight_levels` says.

    Args:
        options: of `Quantize`, that it reads.
        multiply: (layer, x, levels, bias) → y.
        groups: whether a row has several scales.
    """

    options: tuple[str, ...]
    multiply: Callable[[TrainedLinear, Tensor, Levels, Tensor | None], Tensor]
    groups: bool = False

    @property
    def bits(self) -> int:
        """Of a level."""
        return 4 if self.groups else 8

    @property
    def range(self) -> tuple[int, int]:
        """Lowest and highest level."""
        return LEVELS[self.bits]


def _own(weight: Tensor) -> Tensor:
    return weight.clone(memory_format=torch.contiguous_format)


def _int8_dynamic(layer: TrainedLinear, x: Tensor, made: Levels, bias: Tensor | None) -> Tensor:
    return int8_linear(x, made[0], made[1], bias, layer.activation)


def _int8_weight(layer: TrainedLinear, x: Tensor, made: Levels, bias: Tensor | None) -> Tensor:
    return int8_weight_linear(x, made[0], made[1], bias)


def _int4(
    run: Callable[..., Tensor], layer: TrainedLinear, x: Tensor, made: Levels, bias: Tensor | None
) -> Tensor:
    levels, scale, zero = made
    check_width(x, layer.in_features)
    return run(x, pack(levels), scale, zero, bias)


def _four(run: Callable[..., Tensor]) -> _Way:
    return _Way(("group_size", "symmetric"), functools.partial(_int4, run), groups=True)


TRAINED: dict[str, _Way] = {
    "int8-dynamic": _Way(("activation",), _int8_dynamic),
    "int8-weight": _Way((), _int8_weight),
    "int4-weight": _four(int4_linear),
    "int4-dynamic": _four(int4_dynamic_linear),
}
"""The schemes of `Quantize` that weights can be trained for."""


def check_options(
    who: str, scheme: str, activation: str, group_size: int, symmetric: bool, learned_step: bool
) -> None:
    """Raises OptionError where they are unknown or contradict each other."""
    one_of(f"{who}: scheme", scheme, TRAINED)
    one_of(f"{who}: activation", activation, ACTIVATIONS)
    one_of(f"{who}: group_size", group_size, GROUP_SIZES)
    if learned_step and not symmetric:
        raise OptionError(
            f"{who}: learned_step=True trains steps, and no zeros: leave symmetric at True"
        )


def trained(make: Callable[[Any], Layer]) -> Callable[[Site, Pass], Layer | Skip]:
    """What a scheme puts in the place of a layer that trained for it, given how it makes that."""

    def maker(site: Site, quantize: Pass) -> Layer | Skip:
        layer: Any = site.module
        own, given = layer.trained_for(), quantize.spec() or {}
        if own == {name: given[name] for name in own}:
            return make(layer)
        wanted = ", ".join(f"{name}={value!r}" for name, value in own.items())
        return Skip("it was trained for Quantize({}), and other options give other outputs", wanted)

    return maker
