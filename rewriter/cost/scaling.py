"""What a whole training run costs, and how many parameters and tokens a budget is best spent on.

Three questions of the field's courses, answered from a `Cost` and a `Device`: which roof binds each
layer (`roofs`), what N steps take (`training_cost`), and what a scaling law says about the run
(`ScalingLaw`, `training_line`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rewriter.cost.cost import Cost
from rewriter.cost.interpret import label
from rewriter.cost.machine.device import Device
from rewriter.cost.meter import GraphCost
from rewriter.cost.work import Work
from rewriter.errors import OptionError

__all__ = ["LAWS", "Roof", "RunCost", "ScalingLaw", "roofs", "training_cost", "training_line"]


# which roof binds


class Decided(Protocol):
    """One decision of a report: a site and what it costs."""

    @property
    def site(self) -> str: ...
    @property
    def before(self) -> Cost | None: ...
    @property
    def after(self) -> Cost | None: ...


class Ledger(Protocol):
    """What `roofs` asks of a report."""

    @property
    def decisions(self) -> Sequence[Decided]: ...


@dataclass(frozen=True)
class Roof:
    """Where a layer stands under a device's roofline.

    Args:
        layer: dotted name of the module.
        intensity: FLOP per byte moved.
        bound: "compute", "memory" or "launch": which of them takes most of its predicted time.
        seconds: predicted time of the layer.
        flops: of the layer.
    """

    layer: str
    intensity: float
    bound: str
    seconds: float
    flops: int


def roofs(cost: GraphCost | Ledger | Mapping[str, Cost], device: Device) -> list[Roof]:
    """Arithmetic intensity I = FLOPs / bytes, and the roof that binds, per layer; slowest first.

    Attainable FLOP/s = min(peak, I · bandwidth): a layer left of the ridge peak / bandwidth is
    bound by memory, right of it by arithmetic; a small one by the launch of its ops alone. The
    bound of a layer is that of the ops that take the largest part of its time.

    Args:
        cost: of a graph (nodes of one module are one layer), a report (what each site that a pass
            looked at costs in the end), or costs by the layers' names.
        device: predicts the times.

    Source: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009.
    """
    layers = _layers(cost)
    resident = sum(
        w.count * min(w.weight_bytes, w.bytes_read) for c in layers.values() for w in c.work
    )
    if isinstance(cost, GraphCost):
        resident = min(resident, cost.total.param_bytes)
    found = []
    for name, own in layers.items():
        spent: dict[str, float] = {}
        for work in own.work:
            if work.kind != "view":
                bound = device.bound(work)
                seconds = device.time(work, resident=resident)
                spent[bound] = spent.get(bound, 0.0) + seconds
        if spent:
            bound = max(spent, key=lambda b: spent[b])
            found.append(Roof(name, own.intensity, bound, math.fsum(spent.values()), own.flops))
    return sorted(found, key=lambda r: -r.seconds)


def _layers(cost: GraphCost | Ledger | Mapping[str, Cost]) -> dict[str, Cost]:
    if isinstance(cost, Mapping):
        return dict(cost)
    layers: dict[str, Cost] = {}
    if isinstance(cost, GraphCost):
        for node, own in cost.nodes.items():
            if own.work:
                name = label(node).partition(": ")[0]
                layers[name] = layers[name] + own if name in layers else own
        return layers
    for decision in cost.decisions:
        final = decision.after or decision.before
        if final is not None:
            layers[decision.site] = final
    return layers


# a training run


@dataclass(frozen=True)
class RunCost:
    """What a training run costs on one kind of device.

    Args:
        steps: of the run.
        seconds: on one device; on n devices that scale perfectly, a n-th of it.
        device_hours: the same in hours.
        joules: dynamic energy of arithmetic and memory (`Device.energy`).
        rated_joules: rated power of the device over the whole time; an upper bound of its draw.
        mfu: model FLOPs utilization: FLOPs of the run / (seconds · peak FLOP/s).
    """

    steps: int
    seconds: float
    device_hours: float
    joules: float
    rated_joules: float
    mfu: float


def training_cost(cost: Cost, steps: int, device: Device, mfu: float | None = None) -> RunCost:
    """seconds = steps · time of a step; with `mfu`, steps · FLOPs / (mfu · peak).

    Args:
        cost: of a model, with its training step.
        steps: how many.
        device: predicts a step's time and energy.
        mfu: take this share of the peak as given instead of the prediction, in (0, 1]. The peak is
            that of the dtype that most of the step's FLOPs are in.

    Raises:
        OptionError: no training step is known; `steps` is negative; or `mfu` is not in (0, 1], or
            given for a step without FLOPs.

    Source: MFU as in Chowdhery et al., "PaLM", 2022, appendix B, but over all FLOPs of the step
    that the ledger counts instead of 6·N per token.
    """
    if cost.training is None:
        raise OptionError(
            "this cost has no training step: rewrite a model in train mode with example inputs"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise OptionError(f"steps={steps!r}: use a whole number of at least 0")
    if mfu is not None and not 0 < mfu <= 1:
        raise OptionError(f"mfu={mfu!r}: use a share of the peak above 0 and at most 1")
    peak, flops = device.peak(_main_dtype(cost.training.work)), cost.training.flops
    if mfu is not None and not flops:
        raise OptionError("mfu is given for a step without FLOPs: leave it out")
    step = device.time(cost, training=True) if mfu is None else flops / (mfu * peak)
    seconds = steps * step
    return RunCost(
        steps=steps,
        seconds=seconds,
        device_hours=seconds / 3600,
        joules=steps * device.energy(cost, training=True),
        rated_joules=seconds * device.power_w,
        mfu=flops / (step * peak) if step else 0.0,
    )


def _main_dtype(work: Iterable[Work]) -> str:
    flops: dict[str, int] = {}
    for one in work:
        flops[one.dtype] = flops.get(one.dtype, 0) + one.count * one.flops
    return max(flops, key=lambda d: flops[d], default="float32")


# scaling laws


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A / N^α + B / D^β: nats per token after D tokens with N parameters.

    Args:
        irreducible: E, the entropy of the text.
        a, alpha: of the parameters.
        b, beta: of the tokens.
        source: who fitted it.

    Fitted on dense decoder-only language models of 44 M to 16 B parameters on web text, one pass
    over the data: for other data, tokenizers and architectures it is a guide, no prediction.
    """

    irreducible: float
    a: float
    b: float
    alpha: float
    beta: float
    source: str = ""

    @classmethod
    def get(cls, name: str | ScalingLaw) -> ScalingLaw:
        """A published fit by name: one of `LAWS`.

        Raises:
            OptionError: there is none of that name.
        """
        if isinstance(name, ScalingLaw):
            return name
        if name in LAWS:
            return LAWS[name]
        near = difflib.get_close_matches(name.lower(), LAWS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(f"unknown scaling law {name!r}: {hint}There are {', '.join(LAWS)}")

    def loss(self, parameters: float, tokens: float) -> float:
        """E + A / N^α + B / D^β, in nats per token.

        Raises:
            OptionError: a number is not above 0.
        """
        _positive(parameters=parameters, tokens=tokens)
        reducible = self.a / parameters**self.alpha + self.b / tokens**self.beta
        return float(self.irreducible + reducible)

    def optimum(self, flops: float) -> tuple[float, float]:
        """(N, D) of least loss with 6·N·D = C:  N = G·(C/6)^(β/(α+β)),  D = (C/6) / N,
        G = (α·A / (β·B))^(1/(α+β)).

        C ≈ 6·N·D: each parameter is multiplied and added once per token forward (2 FLOPs) and
        twice backward (4); attention's products and embeddings are left out.

        Args:
            flops: C, the budget of the whole run.

        Returns:
            (parameters, tokens).

        Raises:
            OptionError: the budget is not above 0.

        Source: Hoffmann et al. 2022, equation 4.
        """
        _positive(flops=flops)
        total = self.alpha + self.beta
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / total)
        parameters = g * (flops / 6) ** (self.beta / total)
        return parameters, flops / 6 / parameters

    def tokens_for(self, parameters: float) -> float:
        """D at which N parameters are compute-optimal: the inverse of `optimum`,
        D = N^(α/β) · (β·B / (α·A))^(1/β).

        Raises:
            OptionError: the number is not above 0.
        """
        _positive(parameters=parameters)
        ratio = self.beta * self.b / (self.alpha * self.a)
        return float((ratio * parameters**self.alpha) ** (1 / self.beta))


LAWS: Mapping[str, ScalingLaw] = {
    "besiroglu": ScalingLaw(
        1.8172, 482.01, 2085.43, 0.3478, 0.3658,
        "Besiroglu, Erdil, Barnett and You, 'Chinchilla Scaling: A replication attempt', 2024",
    ),
    "hoffmann": ScalingLaw(
        1.6934, 406.4, 410.7, 0.3392, 0.2849,
        "Hoffmann et al., 'Training Compute-Optimal Large Language Models', 2022, approach 3, "
        "with the digits of the paper's source (printed: 1.69, 0.34, 0.28)",
    ),
}  # fmt: skip
"""Published fits. Besiroglu et al. refitted the data of Hoffmann et al.'s approach 3, whose optimum
contradicts approaches 1 and 2 (about 20 tokens per parameter); the refit agrees with them."""


def training_line(
    parameters: int, tokens_per_step: int, steps: int, law: str | ScalingLaw = "besiroglu"
) -> str:
    """One line for a training report: what a scaling law says about a language model's run.

    Args:
        parameters: of the model.
        tokens_per_step: e.g. batch · sequence.
        steps: of the run.
        law: one of `LAWS`, or an own one.

    Raises:
        OptionError: a number is not above 0, or the law is not known.
    """
    fit = ScalingLaw.get(law)
    _positive(parameters=parameters, tokens_per_step=tokens_per_step, steps=steps)
    tokens, best = tokens_per_step * steps, fit.tokens_for(parameters)
    n, d = fit.optimum(6 * parameters * tokens)
    return (
        f"{tokens / parameters:.3g} tokens per parameter: in {steps:,} steps this run sees "
        f"{_short(tokens)} tokens, {tokens / best:.3g} × what is compute-optimal for "
        f"{_short(parameters)} parameters ({best / parameters:.3g} per parameter); predicted loss "
        f"{fit.loss(parameters, tokens):.3g} nats per token, and {fit.loss(n, d):.3g} with "
        f"{_short(n)} parameters on {_short(d)} tokens for the same compute"
    )


def _positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not 0 < value < math.inf:
            raise OptionError(f"{name}={value!r}: use a number above 0")


def _short(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.3g}"
