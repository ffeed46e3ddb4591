"""`Threshold`: entries of a linear layer's input below a calibrated threshold count as zeros."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.base import Pass, Phase, StoredLinear, unusable
from rewriter.edits import Edit, Keep, Replace, View
from rewriter.errors import CalibrationError, OptionError, given, of_type, one_of
from rewriter.kernels.sparse import (
    Select,
    active_reference,
    held_bytes,
    importance_of,
    kernel_name,
    straight_through,
)
from rewriter.kernels.sparse_linear import sparse_linear
from rewriter.modules.budgets import FEWEST, between, cost_of_steps, doubt, quantile, shared_out
from rewriter.modules.moments import Sample
from rewriter.passes.topk import SCORES, Score
from rewriter.sites import EMBEDDING, LINEAR, MLP, Kind, Site

__all__ = ["Threshold", "ThresholdLinear", "tied"]

_COMPARED = 256
"""So many rows tell what each sparsity costs a layer."""
Budget = Literal["uniform", "greedy", "loss"]
BUDGETS = ("uniform", "greedy", "loss")


class ThresholdLinear(StoredLinear):
    """y = x_S Wᵀ + bias, with x_S[i] = x[i] where |x[i]|·importance[i] ≥ t, else 0.

    The gradient is that of this function: zero for entries below the threshold. With few rows
    only the weights of entries above it are read.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: whether there is an additive bias.
        weighted: whether there is an importance; else it is 1.
        share: of the entries that are active, as calibration saw it; None where nobody knows.
        straight_through: in training entries below the threshold have the gradient of a dense
            layer too.
        device, dtype: of the parameters.

    Shapes:
        input [*, in_features], output [*, out_features]; weight [out_features, in_features];
        bias [out_features]; threshold [1] and importance [in_features], float32 buffers.
    """

    op: ClassVar[str] = "threshold_linear"
    keeps_dtype: ClassVar[tuple[str, ...]] = ("threshold", "importance")
    threshold: Tensor
    importance: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        weighted: bool = False,
        share: float | None = None,
        straight_through: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weighted, self.share, self.straight_through = weighted, share, straight_through
        self.register_buffer("threshold", torch.zeros(1, device=device))
        self.register_buffer(
            "importance", torch.ones(in_features, device=device) if weighted else None
        )
        self.reset_parameters()

    @classmethod
    def from_weights(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        threshold: float,
        *,
        importance: Tensor | None = None,
        share: float | None = None,
        straight_through: bool = False,
    ) -> ThresholdLinear:
        """The layer around a [out, in] weight; tensors that are Parameters stay the same."""
        out_features, in_features = weight.shape
        layer = cls(
            in_features,
            out_features,
            bias=bias is not None,
            weighted=importance is not None,
            share=share,
            straight_through=straight_through,
            device="meta",
        )
        layer.threshold = torch.full((1,), threshold, device=weight.device)
        layer.importance = importance
        return layer.around(weight, bias)

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, uniform within ±1/√in_features; nothing is below 0."""
        super().reset_parameters()
        nn.init.zeros_(self.threshold)

    def forward(self, input: Tensor) -> Tensor:
        if self.straight_through and self.training:
            return F.linear(straight_through(input, self.kept(input)), self.weight, self.bias)
        return sparse_linear(
            input,
            self.weight,
            None,
            self.bias,
            threshold=self.threshold,
            importance=self.importance,
            share=1.0 if self.share is None else self.share,
        )

    def kept(self, input: Tensor) -> Tensor:
        """Which entries of an input [*, in_features] are not below the threshold, bool."""
        return active_reference(input, Select(0, self.threshold, self.importance))

    def kernel(self, tokens: int) -> str:
        return kernel_name(self.weight, tokens, self.share)

    def held_bytes(self, tokens: int) -> int:
        return held_bytes(self.weight, tokens)


@dataclass(frozen=True)
class Threshold(Pass):
    """y = W x + b becomes y = W x_S + b: entries of x with a score below t count as zeros.

    t is a quantile of the scores of the layer's inputs over `rewrite(…, calibration=batches)`: it
    leaves the share 1 − sparsity of them, so each token keeps as many as it needs. Weight and bias
    stay the very Parameters they were. With up to 16 tokens only the weights of entries above t
    are read, of a copy of the weight by columns that is kept beside it.

    Args:
        sparsity: which share of the entries is to be zero, between 0 and 1.
        score: "magnitude": |x|; "wina": |x[i]|·‖W[:, i]‖, what the entry adds to the output at
            most.
        budget: "uniform": every layer has this sparsity. "greedy": the layers of one block (all
            below `layers.3`) have it on average, weighted by their sizes; it is given out in steps
            of 0.05, each to the layer whose output it disturbs least for the weights that it saves.
            "loss": all layers of the model have it on average, weighted by their sizes; the steps
            go to where zeros raise the loss least for the weights that they save: x_S at a layer
            raises it by ½ E[(∂loss/∂x · (x − x_S))²], the mean being over rows of the calibration
            batches, in the unit of the loss (nats a token for a cross-entropy). Blocks that the
            loss hardly depends on become sparser than others. It takes one backward pass a batch.
        inputs: "mlp": of the down projections of MLPs alone; "all": of every linear layer, which is
            where the time goes.
        straight_through: in training entries below t have the gradient of a dense layer, too.
        loss: of budget="loss": a function (outputs of the model, calibration batch) → single
            losses [*], one for each token or row of the batch, as `F.cross_entropy(…,
            reduction="none")` gives. None: the model's own output `loss`, for which the
            calibration batches have `labels` (it counts as the mean over those ≥ 0).
        where: which sites; a name pattern, a predicate, or None for all.

    Leaves a site whose calibration has fewer than 64 rows or does not reach it, and one whose
    weights hold NaN or inf or are not real floating point numbers of 16 bits or more. Calibrate on
    text like that to come: the report states the sparsity on batches that were held out, and within
    how many points the number of rows lets it be known.

    Raises:
        OptionError: an option is impossible.
        CalibrationError: budget="loss", and there is no loss, or it has no gradient.

    Source: Liu et al. 2024, "Training-Free Activation Sparsity in Large Language Models" (TEAL);
    Lee et al. 2024, "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models";
    "wina": Chen et al. 2025, "WINA: Weight Informed Neuron Activation"; budget="loss": the second
    order of LeCun et al. 1989, "Optimal Brain Damage", with the Fisher matrix for the Hessian
    (Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning").
    """

    matches: ClassVar[tuple[Kind, ...]] = (MLP, LINEAR)
    phase: ClassVar[Phase] = Phase.SPARSITY
    once: ClassVar[tuple[str, ...]] = ("where", "loss")

    sparsity: float = 0.5
    score: Score = "magnitude"
    budget: Budget = "uniform"
    inputs: Literal["mlp", "all"] = "mlp"
    straight_through: bool = False
    loss: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        share: object = self.sparsity
        if not isinstance(share, float) or not 0 < share < 1:
            raise OptionError(
                f"Threshold: sparsity must be a fraction between 0 and 1, not {given(share)}"
            )
        one_of("Threshold: score", self.score, SCORES)
        one_of("Threshold: budget", self.budget, BUDGETS)
        one_of("Threshold: inputs", self.inputs, ("mlp", "all"))
        of_type("Threshold", "straight_through", self.straight_through, bool, "True or False")
        if self.loss is None:
            return
        if not callable(self.loss):
            raise OptionError(
                "Threshold: loss must be a function (outputs, batch) → single losses, not "
                f"{given(self.loss)}"
            )
        if self.budget != "loss":
            raise OptionError(f'Threshold: loss is for budget="loss", not {self.budget!r}')

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return (MLP,) if self.inputs == "mlp" else (LINEAR,)

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def needs_loss(self) -> bool:
        return self.budget == "loss"

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        if self.loss is not None:
            return self.loss(outputs, batch)
        own, labels = _item(outputs, "loss"), _item(batch, "labels")
        if not isinstance(own, Tensor) or not isinstance(labels, Tensor):
            lacking = "the model gives no loss" if own is None else "the batches have no labels"
            raise CalibrationError(
                f'Threshold(budget="loss"): {lacking}: pass loss=(outputs, batch) → single losses, '
                "or calibration batches with labels, of a model that then returns its loss"
            )
        return own.reshape(1).expand(int((labels >= 0).sum()))  # the mean of so many

    def plan(self, view: View) -> list[Edit]:
        edits: list[Edit] = []
        blocks: dict[str, list[Site]] = {}
        shared = tied(view)
        for site in view.chosen:
            reason = _against(site, view) or shared.get(site.fqn)
            if not reason and self.needs_loss and site.sensitivity is None:
                reason = "the calibration batches show no loss that depends on it"
            if reason:
                edits.append(Keep(site, reason))
            else:
                whole = "" if self.needs_loss else _block(site.fqn)
                blocks.setdefault(whole, []).append(site)
        for sites in blocks.values():
            costs = [self._costs(s) for s in sites]
            shares = [self.sparsity] * len(sites)
            if self.budget != "uniform":
                shares = shared_out(costs, [s.weight.numel() for s in sites], self.sparsity)
            edits += map(self._edit, sites, shares, costs)
        return edits

    def _edit(self, site: Site, sparsity: float, costs: Sequence[float]) -> Edit:
        sample, weight = site.sample, site.weight
        assert sample is not None
        importance = importance_of(weight) if self.score == "wina" else None
        if not isinstance(weight, nn.Parameter):  # a view: it gets storage of its own
            weight = weight.clone(memory_format=torch.contiguous_format)
        scores = _scores(sample.rows, importance)
        # above 0: entries that are 0 already (behind a ReLU) count among those that are not read
        threshold = max(quantile(scores.flatten(), sparsity), torch.finfo(torch.float32).tiny)
        held = _scores(sample.held, importance)
        reached = float((held < threshold).float().mean())
        layer = ThresholdLinear.from_weights(
            weight,
            site.bias,
            threshold,
            importance=importance,
            share=round(1 - reached, 3),
            straight_through=self.straight_through,
        )
        error = sample.output_error(weight, site.bias, layer)
        reason = (
            f"{reached:.1%} of its inputs are below {threshold:.3g} on {len(sample.held)} rows "
            f"held out (asked: {sparsity:.0%}, known within {doubt(scores < threshold):.1%})"
        )
        if self.needs_loss:
            reason += f"; by itself it raises the loss by {between(costs, sparsity):.2g}"
        return Replace(site, layer, reason, error=None, output_error=error)

    def _costs(self, site: Site) -> list[float]:
        """What sparsities of 0, 0.05, … cost: of the loss, or ‖W (x − x_S)‖² / ‖W x‖²; nothing
        where nobody asks."""
        sample, weight = site.sample, site.weight.detach()
        assert sample is not None
        if self.budget == "uniform":
            return []
        importance = importance_of(weight) if self.score == "wina" else None
        if (found := site.sensitivity) is not None:
            scores = _scores(found.rows, importance)
            return cost_of_steps(scores, partial(found.costs, scores))
        rows = sample.rows[:_COMPARED]
        scores = _scores(rows, importance)
        return cost_of_steps(scores, partial(_of_outputs, rows, weight.to(rows.dtype), scores))


def _of_outputs(rows: Tensor, weight: Tensor, scores: Tensor, limits: Tensor) -> list[float]:
    """‖W lost‖² / ‖W x‖² over rows x, where lost is what x has below each limit."""

    def squared(x: Tensor) -> float:
        return float((x @ weight.t()).square().sum())

    total = squared(rows) or 1.0
    return [squared(rows.where(scores < limit, 0.0)) / total for limit in limits]


def _item(given: Any, name: str) -> Any:
    """What outputs or a batch have under a name; None where they have nothing."""
    return given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)


def _scores(rows: Tensor, importance: Tensor | None) -> Tensor:
    return rows.abs() if importance is None else rows.abs() * importance


def _against(site: Site, view: View) -> str:
    """Why a site stays as it is; "" where nothing speaks against it."""
    if site.kind == MLP and site.parts["down"].kind != LINEAR:
        return f"the down projection {site.fqn} was rewritten before"
    refused = unusable(site.weight, site.bias) or view.unsafe(site)
    if refused:
        return refused.reason
    sample: Sample | None = site.sample
    if sample is None:
        return "the calibration batches do not reach it"
    if len(sample.rows) < FEWEST:
        return (
            f"the calibration batches give it {len(sample.rows)} rows, and a quantile takes "
            f"{FEWEST}: pass more text"
        )
    return ""


def tied(view: View) -> dict[str, str]:
    """Why sites stay that share their weight, by name; a plan is done whole or not at all."""
    users: dict[int, dict[str, None]] = {}
    weights = [(s.fqn, s.weight) for s in view.sites if s.kind in (LINEAR, EMBEDDING)]
    for name, weight in weights:  # all alive: no id is given twice
        users.setdefault(id(weight), {})[name] = None
    found: dict[str, str] = {}
    for names in users.values():
        for name in names:
            if others := sorted(n for n in names if n != name):
                found[name] = f"its weight is tied to {', '.join(others)}"
    return found


def _block(fqn: str) -> str:
    """The block that a layer belongs to: its name up to the first number."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", fqn)
    return found[0] if found else ""
