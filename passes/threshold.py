"""`Threshold`: entries of a linear layer's input below a calibrated threshold count as zeros."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rewriter.base import Pass, Phase, unusable
from rewriter.edits import Edit, Keep, Replace, View
from rewriter.errors import CalibrationError, OptionError, given, of_type, one_of
from rewriter.kernels.rotation import basis, fold, matrix, rotated
from rewriter.kernels.sparse import importance_of
from rewriter.modules.budgets import FEWEST, between, cost_of_steps, doubt, quantile, shared_out
from rewriter.modules.moments import Sample
from rewriter.passes.threshold_linear import ThresholdLinear
from rewriter.passes.topk import SCORES, Score
from rewriter.sites import EMBEDDING, LINEAR, MLP, Kind, Site

__all__ = ["Threshold", "tied"]

_COMPARED = 256
"""So many rows tell what each sparsity costs a layer."""
Budget = Literal["uniform", "greedy", "loss"]
BUDGETS = ("uniform", "greedy", "loss")


@dataclass(frozen=True)
class Threshold(Pass):
    """y = W x + b becomes y = W x_S + b: entries of x with a score below t count as zeros; rotated,
    y = W R⁻¹ (R x)_S + b.

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
        rotate: the entries are those of R x, where R has the principal axes of x over the
            calibration batches: few of them have most of x, so zeros cost less. W R⁻¹ is the new
            weight of the layer, which makes up for R exactly, and R x is one more product, by
            numbers of 8 bits. With no gradient wanted it is made once on a CPU for all layers that
            read x, also in code of `backend="rewriter"`. Layers are rotated where R has at most
            half as many entries as their weights together (gate and up of an MLP; q, k and v where
            each has as many heads), where the batches give x no fewer rows than it has entries, and
            where zeros do cost less. R does not train.
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
    "wina": Chen et al. 2025, "WINA: Weight Informed Neuron Activation"; rotate: Liu et al. 2025,
    "LaRoSA: Enhancing LLM Efficiency via Layerwise Rotated Sparse Activation"; budget="loss": the
    second order of LeCun et al. 1989, "Optimal Brain Damage", with the Fisher matrix for the
    Hessian (Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning").
    """

    matches: ClassVar[tuple[Kind, ...]] = (MLP, LINEAR)
    phase: ClassVar[Phase] = Phase.SPARSITY
    once: ClassVar[tuple[str, ...]] = ("where", "loss")

    sparsity: float = 0.5
    score: Score = "magnitude"
    budget: Budget = "uniform"
    inputs: Literal["mlp", "all"] = "mlp"
    rotate: bool = False
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
        for name in ("rotate", "straight_through"):
            of_type("Threshold", name, getattr(self, name), bool, "True or False")
        if self.rotate and self.inputs == "mlp":
            raise OptionError(
                'Threshold: rotate=True is for inputs="all": the inputs of down projections are '
                "wider than what these make of them, and a product with their axes takes more than "
                "zeros save"
            )
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
    def calibrates(self) -> bool:
        return self.rotate

    def sums_up(self, readers: Sequence[Site]) -> bool:
        return self.rotate and _pays(readers)

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
        taken: list[Site] = []
        shared = tied(view)
        for site in view.chosen:
            reason = _against(site, view) or shared.get(site.fqn)
            if not reason and self.needs_loss and site.sensitivity is None:
                reason = "the calibration batches show no loss that depends on it"
            if reason:
                edits.append(Keep(site, reason))
            else:
                taken.append(site)
        blocks: dict[str, list[_Entries]] = {}
        for own in self._entries(taken):
            whole = "" if self.needs_loss else _block(own.site.fqn)
            blocks.setdefault(whole, []).append(own)
        for some in blocks.values():
            shares = [self.sparsity] * len(some)
            if self.budget != "uniform":
                sizes = [e.weight.numel() for e in some]
                shares = shared_out([e.costs for e in some], sizes, self.sparsity)
            edits += map(self._edit, some, shares)
        return edits

    def _entries(self, sites: Sequence[Site]) -> list[_Entries]:
        """What each layer chooses from: entries of its inputs, or of R x where that costs less."""
        groups: dict[int, list[Site]] = {}
        for site in sites:
            groups.setdefault(id(site.sample), []).append(site)
        found: dict[str, _Entries] = {}
        for group in groups.values():
            own = [_Entries.of(s, self.score) for s in group]
            if self.rotate:
                own = _rotations(own, self.score, self.sparsity)
            found.update((e.site.fqn, e) for e in own)
        return [found[s.fqn] for s in sites]

    def _edit(self, own: _Entries, sparsity: float) -> Edit:
        site, sample, weight = own.site, own.site.sample, own.weight
        assert sample is not None
        if not isinstance(weight, nn.Parameter):  # a view: it gets storage of its own
            weight = weight.clone(memory_format=torch.contiguous_format)
        fitted, others = own.rows
        scores = own.scores(fitted)
        # above 0: entries that are 0 already (behind a ReLU) count among those that are not read
        threshold = max(quantile(scores.flatten(), sparsity), torch.finfo(torch.float32).tiny)
        below = scores[scores < threshold]
        if own.rotation is not None and len(below):  # R x is rounded: none of its scores is at t
            threshold = (threshold + float(below.max())) / 2
        held = own.scores(others)
        reached = float((held < threshold).float().mean())
        layer = ThresholdLinear.from_weights(
            weight,
            site.bias,
            threshold,
            importance=own.importance,
            rotation=own.rotation,
            share=round(1 - reached, 3),
            straight_through=self.straight_through,
        )
        error = sample.output_error(site.weight, site.bias, layer)
        where = "that chose it" if others is fitted else "held out"
        reason = (
            f"{reached:.1%} of its inputs are below {threshold:.3g} on {len(others)} rows {where} "
            f"(asked: {sparsity:.0%}, known within {doubt(scores < threshold):.1%})"
        )
        if self.needs_loss:
            reason += f"; by itself it raises the loss by {own.cost(sparsity):.2g}"
        return Replace(site, layer, reason + own.note, error=None, output_error=error)


@dataclass(eq=False)
class _Entries:
    """What a layer chooses from.

    Args:
        site: the layer.
        weight: of the entries, [out_features, in_features].
        importance: of each of them, or None.
        rotation: levels and scale of R, where they are the entries of R x; else None.
        note: what the report says of the rotation.
    """

    site: Site
    weight: Tensor
    importance: Tensor | None
    rotation: tuple[Tensor, Tensor] | None = None
    note: str = ""

    @classmethod
    def of(cls, site: Site, score: str, rotation: tuple[Tensor, Tensor] | None = None) -> _Entries:
        weight = site.weight if rotation is None else fold(site.weight, *rotation)
        return cls(site, weight, importance_of(weight) if score == "wina" else None, rotation)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Rows of the input that a threshold is a quantile of, and rows to judge it by. Rows that
        axes were fitted to lie closer to few of them than others do: they tell no threshold."""
        sample = self.site.sample
        assert sample is not None
        few = sample.held is sample.rows or len(sample.held) < FEWEST
        if self.rotation is None or few:
            return sample.rows, sample.held
        half = sample.held[::2], sample.held[1::2]
        return half if len(half[1]) >= FEWEST else (sample.held, sample.held)

    def scores(self, rows: Tensor) -> Tensor:
        """Of the entries of rows [n, in_features] of the layer's input."""
        return self._scores(self._entries(rows))

    def cost(self, sparsity: float) -> float:
        return between(self.costs, sparsity)

    def _entries(self, rows: Tensor) -> Tensor:
        return rows if self.rotation is None else rotated(rows, *self.rotation)

    def _scores(self, entries: Tensor) -> Tensor:
        return entries.abs() if self.importance is None else entries.abs() * self.importance

    @cached_property
    def costs(self) -> list[float]:
        """What sparsities of 0, 0.05, … cost: of the loss, or ‖W (x − x_S)‖² / ‖W x‖²."""
        found = self.site.sensitivity
        if found is not None:
            if self.rotation is not None:
                found = found.rotated(matrix(*self.rotation))
            scores = self._scores(found.rows)
            return cost_of_steps(scores, partial(found.costs, scores))
        rows = self._entries(self.rows[0][:_COMPARED])
        weight, scores = self.weight.detach().to(rows.dtype), self._scores(rows)
        return cost_of_steps(scores, partial(_of_outputs, rows, weight, scores))


def _of_outputs(rows: Tensor, weight: Tensor, scores: Tensor, limits: Tensor) -> list[float]:
    """‖W lost‖² / ‖W x‖² over rows x, where lost is what x has below each limit."""

    def squared(x: Tensor) -> float:
        return float((x @ weight.t()).square().sum())

    total = squared(rows) or 1.0
    return [squared(rows.where(scores < limit, 0.0)) / total for limit in limits]


def _pays(readers: Sequence[Site]) -> bool:
    """Whether a product with the axes of what layers read is small beside their own."""
    return 2 * readers[0].in_features ** 2 <= sum(s.weight.numel() for s in readers)


def _rotations(plain: Sequence[_Entries], score: str, sparsity: float) -> list[_Entries]:
    """Layers that read one value, by its principal axes; as they are where that does not pay, with
    the reason.

    Args:
        plain: what they choose from without.
        score: how.
        sparsity: at which both are compared.
    """
    sites = [e.site for e in plain]
    moments, width = sites[0].moments, sites[0].in_features
    share = width**2 / max(sum(s.weight.numel() for s in sites), 1)
    if moments is None or not _pays(sites):
        why = f"its {width} axes would have {share:.0%} of the entries of what reads it"
    elif moments.rows < width:
        why = f"the calibration batches give it {moments.rows} rows to fit {width} axes to"
    else:
        axes = basis(moments.axes)
        made = [_Entries.of(s, score, axes) for s in sites]
        lost, without = (sum(e.cost(sparsity) for e in some) for some in (made, plain))
        if lost < without:
            names = ", ".join(s.fqn for s in sites)
            note = (
                f"; rotated: zeros cost {lost / without:.2g} of what they would without, for a "
                f"product by 8-bit axes, {share:.0%} of the entries of {names}"
            )
            return _noted(made, note)
        why = "zeros would cost no less"
    return _noted(plain, f"; not rotated: {why}")


def _noted(entries: Sequence[_Entries], note: str) -> list[_Entries]:
    for own in entries:
        own.note = note
    return list(entries)


def _item(given: Any, name: str) -> Any:
    """What outputs or a batch have under a name; None where they have nothing."""
    return given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)


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
