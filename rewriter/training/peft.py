"""LoRA on rewritten layers: `merge` into few bits, and `config = register(LoraConfig(…))`, which
adapts layers that are not linear (TopK, Quadratic).

Layers with a matrix (Monarch, int8 and the like) are `nn.Linear` and need no `register`: every
method of PEFT takes them as they are. Its `merge_and_unload()` and `merge_adapter()` round what
they write to layers of few bits, which stay so (`RoundedWeight`), and `unmerge_adapter()` gives
their levels back; `merge` rounds once for all adapters, may fit levels to calibration batches, and
enters what was lost into the report. Other layers that were adapted are dense once merged: the same
passes on the merged model put them into their form again.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rewriter.capture import arguments
from rewriter.engine.batches import Calibration
from rewriter.errors import OptionError, RewriteWarning, of_type, one_of, warn
from rewriter.layer import Layer, RoundedWeight
from rewriter.modules.moments import Moments, products
from rewriter.report import Decision, Report, Step

__all__ = ["merge", "register"]

C = TypeVar("C")
_METHODS = ("gptq", "awq")
_BYTES = 4e9
"""Of moments held at once."""


# merging into few bits ---------------------------------------------------------------------------


def merge(
    model: Any,
    calibration: Any = None,
    *,
    method: str = "gptq",
    adapter_names: list[str] | None = None,
) -> nn.Module:
    """Ŵ = round(W + Σ ΔW): `model.merge_and_unload()`, rounded once for all adapters together.

    Layers of few bits keep bits, groups, zeros and what they do to activations. Levels are the
    nearest ones, also where GPTQ or AWQ had chosen those of the base, unless batches are given.

    All other layers are merged as PEFT does, and are dense then: those of int8-static, too, whose
    range was that of inputs without adapters. The same passes put them into their form again.

    Args:
        model: a `peft.PeftModel`, with adapters of any method of PEFT that can be merged.
        calibration: batches as of `rewrite`, with which levels of 4 bits are chosen anew.
        method: how: "gptq" or "awq", as of `Quantize`.
        adapter_names: which adapters; None for those that are active.

    Returns:
        The model below the adapters. Its report has a step "merge", with the error of each layer;
        where it has no report, a warning says the largest.

    Raises:
        OptionError: an adapter cannot be merged, or there are batches and no 4-bit layers. Nothing
            is changed then.
        CalibrationError: the batches are none.
    """
    of_type("merge", "model", model, PeftModel, "what peft.get_peft_model gives")
    one_of("merge: method", method, _METHODS)
    places = _places(model.get_base_model())
    batches = None if calibration is None else Calibration.of(calibration)
    if batches and not any(p.layer.fits for p in places):
        raise OptionError(
            "merge: calibration fits levels of 4 bits, and no such layer is adapted: leave it out"
        )
    with torch.no_grad():
        for place in places:
            place.release()
        decisions = [
            place.merge(method, adapter_names)
            for some in _groups(places)
            for place in _watched(model.eval(), some, batches)
        ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged: nn.Module = model.merge_and_unload(adapter_names=adapter_names)
    _report(merged, decisions)
    return merged


@dataclass
class _Place:
    """A layer of few bits, and the adapters over it: several where a tied layer has two names."""

    name: str
    layer: RoundedWeight
    tuners: list[Any]
    moments: Moments | None = None

    def release(self) -> None:
        """Takes out what was merged before, which was rounded on its own."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RewriteWarning)  # that one of several is taken out
            for tuner in self.tuners:
                if tuner.merged:
                    tuner.unmerge()

    def merge(self, method: str, adapter_names: list[str] | None) -> Decision:
        weight, bias = self._sum(adapter_names)
        fit = {} if self.moments is None else {"second": self.moments.second, "method": method}
        error = self.layer.requantize(weight, **fit)
        self.layer.settle()
        own: Any = getattr(self.layer, "bias", None)
        if own is not None:  # adapters may have one, too
            own.copy_(bias)
        output_error = None
        if self.moments is not None:
            output_error = self.moments.output_error(weight, self.layer.dense_weight())
        how = f"levels by {method}" if fit else f"nearest levels{self.layer.remark}"
        reason = f"adapters merged, and rounded: {how}"
        cls = type(self.layer).__name__
        return Decision(self.name, cls, "replaced", reason, error=error, output_error=output_error)

    def _sum(self, adapter_names: list[str] | None) -> tuple[Tensor, Any]:
        """Weight and bias of the layer with its adapters, as PEFT merges them into a dense one."""
        twin: Any = copy.deepcopy(self.layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RewriteWarning)  # that the twin is dense now
            twin.weight = nn.Parameter(self.layer.dense_weight(), requires_grad=False)
        for tuner in self.tuners:
            tuner.base_layer = twin
            try:
                tuner.merge(adapter_names=adapter_names)
            finally:
                tuner.base_layer = self.layer
        return twin.weight.detach(), getattr(twin, "bias", None)


def _places(base: nn.Module) -> list[_Place]:
    """The layers of few bits that adapters lie over.

    Raises:
        OptionError: there are no adapters, one holds NaN or inf, or lies over a layer that is not
            linear.
    """
    found: dict[int, _Place] = {}
    tuners = {n: m for n, m in base.named_modules() if isinstance(m, BaseTunerLayer)}
    if not tuners:
        raise OptionError("merge: no layer of the model has an adapter")
    for name, tuner in tuners.items():
        layer: Any = tuner.get_base_layer()
        own = [p for n, p in tuner.named_parameters() if not n.startswith("base_layer.")]
        if not all(bool(p.isfinite().all()) for p in own):
            raise OptionError(f"merge: the adapters of {name!r} hold NaN or inf")
        if isinstance(tuner, _Added):
            raise _not_linear(layer)
        if isinstance(layer, RoundedWeight):
            found.setdefault(id(layer), _Place(name, layer, [])).tuners.append(tuner)
    return list(found.values())


def _groups(places: Sequence[_Place]) -> Iterator[list[_Place]]:
    """The places, as many at a time as may hold moments together."""
    group: list[_Place] = []
    held = 0.0
    for place in places:
        width = place.layer.dense_shape()[-1]
        size = 16.0 * width * width if place.layer.fits else 0.0
        if group and held + size > _BYTES:
            yield group
            group, held = [], 0.0
        group.append(place)
        held += size
    yield group


def _watched(model: nn.Module, places: list[_Place], given: Calibration | None) -> list[_Place]:
    """The places, with the moments of their inputs where their levels are fitted to batches."""
    if given is None:
        return places
    fitted = [p for p in places if p.layer.fits]
    sums = [(_Sum(), _Sum()) for _ in fitted]
    for i, batch in enumerate(given.batches if fitted else ()):
        held = given.held_out(i)
        hooks = [
            tuner.register_forward_pre_hook(both[held].note)
            for place, both in zip(fitted, sums, strict=True)
            for tuner in place.tuners
        ]
        try:
            args, kwargs = arguments(batch)
            model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    for place, (seen, held_out) in zip(fitted, sums, strict=True):
        other = held_out if held_out.rows else seen
        if seen.rows:
            place.moments = Moments(seen.rows, *seen.means(), held_out.rows, *other.means())
        else:
            warn(f"merge: no batch reaches {place.name!r}: it takes the nearest levels")
    return places


@dataclass
class _Sum:
    """Σ x and Σ x xᵀ over the rows that go into a layer."""

    rows: int = 0
    total: Any = 0.0
    products: Any = 0.0

    def note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args[0].is_floating_point():
            return  # an embedding's, whose head alone multiplies
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.rows += len(x)
        self.total = self.total + x.sum(0, dtype=torch.float64)
        self.products = self.products + products(x)

    def means(self) -> tuple[Tensor, Tensor]:
        return self.total / self.rows, self.products / self.rows


def _report(merged: nn.Module, decisions: list[Decision]) -> None:
    """Enters what the merge has lost."""
    if not decisions:
        return
    report = getattr(merged, "report", None)
    if isinstance(report, Report) and report.steps:
        cost = report.steps[-1].after
        report.steps.append(Step("merge", cost, cost, decisions))
        report.snapshots.extend(report.snapshots[-1:])
        return
    worst = max(decisions, key=lambda d: d.error or 0.0)
    warn(
        f"merge: adapters went into {len(decisions)} layers of few bits; the largest error of "
        f"rounding is {worst.error:.3g} of the norm of the weight of {worst.site!r}"
    )


# layers that are not linear ----------------------------------------------------------------------


def register(config: C) -> C:
    """Lets a `peft.LoraConfig` adapt rewritten layers that are not linear: y = layer(x) + B A x.

    Such an adapter trains, saves and loads (register the config that `PeftModel.from_pretrained`
    is given, too), and cannot be merged, as the layer has no weight that stands for all of it.

    Returns:
        The same config.

    Raises:
        OptionError: it is of another method, or asks for a weight (DoRA).
    """
    mapping = getattr(config, "_register_custom_module", None)
    if mapping is None:
        raise OptionError(
            f"{type(config).__name__} takes linear layers only: a rewritten layer that is not "
            "linear (TopK, Quadratic) takes a LoraConfig"
        )
    mapping({Layer: _layer})
    return config


def _layer(target: Any, adapter_name: str, config: Any, **options: Any) -> nn.Module:
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if isinstance(base, nn.Linear):
        usual: nn.Module = Linear(target, adapter_name, config=config, **options)
        return usual
    if config.use_dora:
        raise OptionError(
            f"DoRA scales the rows of a weight, and a {type(base).__name__} is not linear: use LoRA"
        )
    return _Added(target, adapter_name, config=config, **options)


class _Added(Linear):
    """y = layer(x) + scaling · B A x."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses: see `register`.

        Raises:
            OptionError: always.
        """
        raise _not_linear(self.get_base_layer())


def _not_linear(layer: nn.Module) -> OptionError:
    return OptionError(
        f"an adapter cannot be merged into a {type(layer).__name__}, which is not linear: keep the "
        "adapter, or adapt and merge before the rewrite"
    )
