"""`Experts`: of a trained MLP only the neurons of a few experts are computed, which a router picks
for each token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.base import Pass, Phase, StoredLinear, unusable
from rewriter.edits import Edit, Keep, Replace, View
from rewriter.errors import OptionError, given, one_of, whole_number
from rewriter.kernels.sparse_entries import THEN
from rewriter.kernels.sparse_experts import (
    best_experts,
    expert_entries,
    neurons_of,
    router_scores,
)
from rewriter.modules.budgets import FEWEST
from rewriter.modules.routing import clustered, contributions, fit_router, recall
from rewriter.passes.sparsegate import NO_MLP, choosing
from rewriter.passes.threshold import tied
from rewriter.sites import LINEAR, Kind, Site, kind_name

__all__ = ["Experts", "RoutedLinear"]


class RoutedLinear(StoredLinear):
    """y = W x + b with zeros for neurons of experts that are not picked: the first layer of an MLP
    (of a gated one its gate), in front of its activation.

        s = router x + router_bias;   picked: the `active` experts with the largest s

    Ties go to the lower index. The gradient is that of the picked entries of y; router and
    assignment are buffers, which do not train: they are those of the calibration. As act(0) = 0,
    the other neurons add nothing to the MLP, and its lowered form reads none of their weights.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        then: the activation that follows: "relu", "gelu", "gelu_tanh" or "silu".
        count: how many experts there are.
        active: how many a token has; `count` of them give W x + b.
        bias: whether there is an additive bias.
        device, dtype: of the parameters.

    Shapes:
        input [*, in_features], output [*, out_features]; weight [out_features, in_features];
        bias [out_features]; router [count, in_features] and router_bias [count], float32 buffers;
        expert_of [out_features] int32, the expert of each neuron.

    Raises:
        OptionError: the activation is another; count is not from 1 to out_features, or active not
            from 1 to count.
    """

    op: ClassVar[str] = "routed_linear"
    keeps_dtype: ClassVar[tuple[str, ...]] = ("router", "router_bias")
    router: Tensor
    router_bias: Tensor
    expert_of: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        then: str,
        count: int,
        active: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        one_of("RoutedLinear: then", then, tuple(THEN))
        whole_number("RoutedLinear: count", count, most=out_features)
        whole_number("RoutedLinear: active", active, most=count)
        self.then, self.count, self.active = then, count, active
        self.register_buffer("router", torch.zeros(count, in_features, device=device))
        self.register_buffer("router_bias", torch.zeros(count, device=device))
        neurons = torch.arange(out_features, dtype=torch.int32, device=device)
        self.register_buffer("expert_of", neurons % count)
        self.reset_parameters()

    @classmethod
    def from_weights(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        then: str,
        active: int,
        expert_of: Tensor,
        router: Tensor,
        router_bias: Tensor,
    ) -> RoutedLinear:
        """The layer around a [out, in] weight; tensors that are Parameters stay the same."""
        (out_features, in_features), count = weight.shape, len(router)
        sizes = in_features, out_features, then, count, active
        layer = cls(*sizes, bias=bias is not None, device="meta")
        layer.router, layer.router_bias = router.float(), router_bias.float()
        layer.expert_of = expert_of.to(torch.int32)
        return layer.around(weight, bias)

    @property
    def share(self) -> float:
        """Of the experts that are active."""
        return self.active / self.count

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)
        if self.active == self.count:
            return y
        scores = router_scores(input, self.router, self.router_bias)
        return expert_entries(y, scores, self.expert_of, self.active)

    def kept(self, input: Tensor) -> Tensor:
        """Which neurons belong to picked experts, [*, out_features] bool, for an input
        [*, in_features]."""
        scores = router_scores(input, self.router, self.router_bias)
        return neurons_of(best_experts(scores, self.active), self.expert_of)

    def kernel(self, tokens: int) -> str:
        return f"torch, {self.active} of {self.count} experts"


@dataclass(frozen=True)
class Experts(Pass):
    """down(act(gate(x)) ∘ up(x)), or down(act(up(x))), becomes the sum over a few experts: disjoint
    sets of its neurons, the best `active` of `count` for each token by a router.

    Neurons that are active for the same rows of `rewrite(…, calibration=batches)` form an expert,
    all of equal sizes (up to one neuron, where `count` does not divide them). The router is linear,
    a ridge regression of what each expert contributes, √Σ (h[n]·‖down[:, n]‖)² over its neurons, on
    the token that goes into the MLP. Weights and biases stay the very Parameters they were, in
    their order. What a router says is known before any matrix is read: with few tokens on a CPU a
    lowered MLP reads the active experts' share of all of them. With all experts active the MLP is
    exactly the dense one. Router and experts do not train; `recover` trains the weights around
    them. `Quantize` leaves the first layer as it is, and rounds the others: dense products then.

    Args:
        count: how many experts.
        active: an int ≥ 1: how many a token; a float in (0, 1]: which fraction, rounded up.
        where: which MLPs, by the name of their first layer (of a gated one the gate); a name
            pattern, a predicate, or None for all.

    The report has, for each MLP on rows that were held out, the router's recall: which share it
    finds of the experts that contribute most; and the error of the MLP's outputs.

    Leaves an MLP whose activation is not ReLU, GELU or SiLU, of which an earlier pass rewrote a
    layer, whose first layer's weights are tied, whose weights hold NaN or inf or are not real
    floating point numbers, with fewer neurons than experts, or which the calibration does not reach
    with 64 rows.

    Raises:
        OptionError: an option is impossible.

    Source: Zhang et al. 2022, "MoEfication: Transformer Feed-forward Layers are Mixtures of
    Experts"; Zhu et al. 2024, "LLaMA-MoE: Building Mixture-of-Experts from LLaMA with Continual
    Pre-training".
    """

    matches: ClassVar[tuple[Kind, ...]] = (LINEAR,)
    phase: ClassVar[Phase] = Phase.SPARSITY

    count: int = 16
    active: int | float = 0.25

    def __post_init__(self) -> None:
        whole_number("Experts: count", self.count, least=2)
        active: object = self.active
        number = isinstance(active, int) and not isinstance(active, bool) and active >= 1
        if not number and not (isinstance(active, float) and 0 < active <= 1):
            raise OptionError(
                "Experts: active must be an int >= 1 (how many) or a float in (0, 1] (a fraction), "
                f"not {given(active)}"
            )
        if self.chosen > self.count:
            raise OptionError(f"Experts: active={self.active} is more than count={self.count}")

    @property
    def chosen(self) -> int:
        """How many experts a token has."""
        if isinstance(self.active, int):
            return self.active
        # by the decimal that the user wrote: in binary, 0.07 of 100 would round up to 8
        return math.ceil(Fraction(repr(float(self.active))) * self.count)

    @property
    def needs_calibration(self) -> bool:
        return True

    def plan(self, view: View) -> list[Edit]:
        mlps, others = choosing(view)
        shared, edits = tied(view), list[Edit]()
        for site in view.chosen:
            if (mlp := mlps.get(site.fqn)) is not None:
                reasons = self._against(site, mlp, view)
                reason = next(reasons, None) or shared.get(site.fqn)
                edits.append(Keep(site, reason) if reason else self._edit(site, mlp))
            else:
                edits.append(Keep(site, others.get(site.fqn, NO_MLP)))
        return edits

    def _against(self, site: Site, mlp: Site, view: View) -> Iterator[str]:
        """Why an MLP stays as it is."""
        if mlp.parts["activation"].activation not in THEN:
            yield f"its activation is none of {', '.join(THEN)}"
        layers = [p for name, p in mlp.parts.items() if name != "activation"]
        for part in layers:
            if part.kind != LINEAR:
                yield f"{part.fqn} was rewritten before, to a {kind_name(part.kind)}"
                return  # its weight is none to look at
        refused = unusable(*(p.weight for p in layers), *(p.bias for p in layers))
        if refused := refused or view.unsafe(site):
            yield refused.reason
        if site.out_features < self.count:
            yield f"its {site.out_features} neurons do not make {self.count} experts"
        rows = 0 if site.sample is None else len(site.sample.rows)
        if rows < FEWEST:
            yield (
                f"the calibration batches give it {rows} rows, and experts take {FEWEST}: pass more"
            )

    def _edit(self, site: Site, mlp: Site) -> Edit:
        then = mlp.parts["activation"].activation or ""
        sample, weight, active = site.sample, site.weight, self.chosen
        assert sample is not None
        if not isinstance(weight, nn.Parameter):  # a view: it gets storage of its own
            weight = weight.clone(memory_format=torch.contiguous_format)
        with torch.no_grad():
            down = mlp.weight.detach().float()
            norms = torch.linalg.vector_norm(down, dim=0)
            rows, held = sample.rows.to(down.device), sample.held.to(down.device)
            sizes = _hidden(rows, mlp, then).abs() * norms
            expert_of = clustered(sizes, self.count)
            router, bias = fit_router(rows, contributions(sizes, expert_of, self.count), active)
            own = active, expert_of, router, bias
            layer = RoutedLinear.from_weights(weight, site.bias, then, *own)
            h = _hidden(held, mlp, then)
            best = contributions(h.abs() * norms, expert_of, self.count)
            found = recall(router_scores(held, router, bias), best, active)
            want = F.linear(h, down)
            lost = F.linear(h.masked_fill(layer.kept(held), 0.0), down)
        total = float(want.double().norm())
        return Replace(
            site,
            layer,
            f"{active} of {self.count} experts a token; the router finds {found:.1%} of the best "
            f"on {len(held)} rows held out",
            error=None,
            output_error=float(lost.double().norm()) / total if total > 0 else None,
        )


def _hidden(x: Tensor, mlp: Site, then: str) -> Tensor:
    """What the last layer of an MLP reads for rows x, [rows, hidden] float32."""

    def linear(part: Site) -> Tensor:
        bias = None if part.bias is None else part.bias.float()
        return F.linear(x.float(), part.weight.float(), bias)

    if (gate := mlp.parts.get("gate")) is None:
        return THEN[then](linear(mlp.parts["up"]))
    return THEN[then](linear(gate)) * linear(mlp.parts["up"])
