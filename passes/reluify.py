"""`Reluify`: smooth activations become ReLUs, whose outputs are zeros for most inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.base import Layer, Pass, Phase, Replacement, Skip
from rewriter.errors import OptionError, finite_number, given, one_of
from rewriter.modules.budgets import FEWEST, doubt, quantile
from rewriter.modules.moments import Sample
from rewriter.sites import ACTIVATION, Kind, Site

__all__ = ["FORMS", "Form", "Reluify", "SparseReLU"]

Form = Literal["shifted", "fatrelu"]
FORMS = ("shifted", "fatrelu")
_SMOOTH = frozenset({
    "gelu", "gelu_tanh", "new_gelu_activation", "fast_gelu_activation", "quick_gelu_activation",
    "accurate_gelu_activation", "silu", "mish", "hardswish", "relu",
})  # fmt: skip
"""Activations that are about 0 far below 0 and about x far above it."""


class SparseReLU(Layer):
    """y = max(x − t, 0) ("shifted"), or x where x ≥ t, else 0 ("fatrelu"); at t = 0 both are ReLU.

    NaN stays NaN. The gradient is that of the function: that of y where y is not 0, else 0.

    Args:
        form: which of the two.
        threshold: t.
        device, dtype: of no meaning, as there are no tensors.

    Shapes:
        input and output [*].

    Raises:
        OptionError: there is no such form, or t is no finite number.
    """

    op: ClassVar[str] = "sparse_relu"
    acts: ClassVar[bool] = True

    def __init__(
        self,
        form: Form,
        threshold: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("SparseReLU: form", form, FORMS)
        self.form, self.threshold = form, finite_number("SparseReLU: threshold", threshold)

    @property
    def operation(self) -> str:
        return "sparse_relu" if self.threshold else "relu"

    def forward(self, input: Tensor) -> Tensor:
        if not self.threshold:
            return F.relu(input)
        if self.form == "shifted":
            return F.relu(input - self.threshold)
        return input.masked_fill(input < self.threshold, 0.0)

    def extra_repr(self) -> str:
        return f"{self.form}, threshold={self.threshold:.4g}"


@dataclass(frozen=True)
class Reluify(Pass):
    """act(x) becomes max(x − t, 0), or x where x ≥ t, else 0: most outputs are then exact zeros.

    Takes activations that are about 0 far below zero and about x far above: GELU in its forms,
    SiLU, Mish, Hardswish, as modules and as functions, in plain and in gated MLPs; and ReLU, where
    t is not 0. A `Threshold` behind it skips the weights of the zeros. The model is another one
    without a recovery: `rewriter.recover(optimized, model, batches)`.

    Args:
        form: "shifted": max(x − t, 0). "fatrelu": x where x ≥ t, else 0.
        threshold: t, or "fit": the t at which the squared distance to the activation that is
            replaced is least, over `rewrite(…, calibration=batches)`, of each site by itself.
        sparsity: which share of each site's outputs is to be zero, between 0 and 1, in the place
            of a threshold: t is that quantile of the inputs over the calibration batches.
        where: which sites; a name pattern, a predicate, or None for all.

    Where batches are given the report states the share of zeros on those held out, and the error of
    the outputs. Leaves other activations, and with "fit" or a sparsity sites that calibration does
    not reach or gives fewer than 64 rows.

    Raises:
        OptionError: an option is impossible, or both `threshold` and `sparsity` are given.

    Source: Mirzadeh et al. 2023, "ReLU Strikes Back" (ReLU, shifted); Kurtz et al. 2020, "Inducing
    and Exploiting Activation Sparsity for Fast Inference on Neural Networks" (FATReLU).
    """

    matches: ClassVar[tuple[Kind, ...]] = (ACTIVATION,)
    phase: ClassVar[Phase] = Phase.SPARSITY

    form: Form = "shifted"
    threshold: float | Literal["fit"] = 0.0
    sparsity: float | None = None

    def __post_init__(self) -> None:
        one_of("Reluify: form", self.form, FORMS)
        if self.threshold != "fit":
            finite_number("Reluify: threshold", self.threshold)
        share: object = self.sparsity
        if share is None:
            return
        if not isinstance(share, float) or not 0 < share < 1:
            raise OptionError(
                f"Reluify: sparsity must be a fraction between 0 and 1, not {given(share)}"
            )
        if self.threshold:
            raise OptionError("Reluify: give a threshold or a sparsity, which sets it, not both")

    @property
    def needs_calibration(self) -> bool:
        return self.sparsity is not None or self.threshold == "fit"

    @property
    def samples(self) -> bool:
        return True

    def propose(self, site: Site) -> Replacement | Skip:
        old, sample = site.operation, site.sample
        if old not in _SMOOTH:
            return Skip("a {} is not like a ReLU: 0 far below zero, and x far above", old)
        if self.needs_calibration and (sample is None or len(sample.rows) < FEWEST):
            rows = 0 if sample is None else len(sample.rows)
            return Skip(
                "the calibration batches give it {} rows, and t takes {}: pass more", rows, FEWEST
            )
        threshold = self._threshold(site, sample)
        if old == "relu" and not threshold:
            return Skip("it is a ReLU already")
        layer = SparseReLU(self.form, threshold)
        if sample is None:
            return Replacement(layer, error=None, note=_said(old, layer))
        reached = sample.held < threshold
        error = _error(layer(sample.held), site.activated(sample.held.clone()))
        asked = "" if self.sparsity is None else f"asked: {self.sparsity:.0%}, "
        note = (
            f"{_said(old, layer)}; {float(reached.float().mean()):.1%} of its outputs are 0 on "
            f"{len(reached)} rows held out ({asked}known within {doubt(reached):.1%})"
        )
        return Replacement(layer, error=None, output_error=error, note=note)

    def _threshold(self, site: Site, sample: Sample | None) -> float:
        if sample is None or not self.needs_calibration:
            assert self.threshold != "fit"
            return float(self.threshold)
        x = sample.rows.flatten()
        if self.sparsity is not None:
            return quantile(x, self.sparsity)
        return _FITS[self.form](x, site.activated(sample.rows.clone()).flatten())


def _said(old: str, layer: SparseReLU) -> str:
    t = layer.threshold
    if not t:
        return f"{old} became ReLU"
    form = f"max(x − {t:.3g}, 0)" if layer.form == "shifted" else f"x where x ≥ {t:.3g}, else 0"
    return f"{old} became {form}"


def _error(got: Tensor, want: Tensor) -> float | None:
    total = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / total if total > 0 else None


def _fit_fatrelu(x: Tensor, y: Tensor) -> float:
    """argmin over t of Σ_{x<t} y² + Σ_{x≥t} (x − y)²: t is one of the x.

    Args:
        x: [n], inputs.
        y: [n], what the activation makes of them.
    """
    x, y = _ordered(x, y)
    lost = F.pad(y.square().cumsum(0), (1, 0)) + F.pad(_onwards((x - y).square()), (0, 1))
    at = int(lost.argmin())
    return float(x[at]) if at < len(x) else float(x[-1]) + 1e-6 * max(abs(float(x[-1])), 1.0)


def _fit_shifted(x: Tensor, y: Tensor) -> float:
    """argmin over t of Σ_{x≤t} y² + Σ_{x>t} (x − t − y)², which between two neighbours of the
    sorted x is a parabola in t. Arguments as of `_fit_fatrelu`."""
    x, y = _ordered(x, y)
    gap = x - y
    count = torch.arange(len(x), 0, -1, dtype=x.dtype, device=x.device)
    first, second = _onwards(gap), _onwards(gap.square())
    # t between x[i − 1] and x[i]: the inputs from i on are above it
    low = torch.cat([x.new_tensor([-torch.inf]), x[:-1]])
    t = torch.minimum(torch.maximum(first / count, low), x)
    below = F.pad(y.square().cumsum(0), (1, 0))[:-1]
    lost = below + second - 2 * t * first + count * t.square()
    return float(t[lost.argmin()])


def _ordered(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, order = x.double().sort()
    return x, y.double()[order]


def _onwards(values: Tensor) -> Tensor:
    """The sum of each value and those behind it."""
    return values.flip(0).cumsum(0).flip(0)


_FITS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "shifted": _fit_shifted,
    "fatrelu": _fit_fatrelu,
}
