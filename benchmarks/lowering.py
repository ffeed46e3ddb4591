"""Lowering: what fused ops save in eval mode, eager against rewritten without and with lowering.

No pass is applied: all three compute the same. ResNet-50 and EfficientNet-Lite0 (from its package,
where that is installed) are where batch norm folds; the others are the models of the latency
benchmark, on which lowering may not cost anything.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from _harness import arguments, command, keep_the_heap, load_script, parse, write_results
from _models import mlp
from torch import Tensor, nn

from rewriter import rewrite
from rewriter.lowering import DEFAULT_RULES

latency = load_script("benchmarks/latency.py")

Row = dict[str, Any]
NAMES = ("eager", "unlowered", "lowered")


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig())  # its defaults are ResNet-50


def efficientnet() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    return model


class Block(nn.Sequential):
    """Pointwise, depthwise, pointwise: of EfficientNet-Lite's kind, for a short look."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for a, b, groups in ((3, 24, 1), (24, 24, 24), (24, 16, 1)):
            layers += [
                nn.Conv2d(a, b, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(b),
                nn.ReLU6(),
            ]  # fmt: skip
        super().__init__(*layers)


def image(rows: int, side: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(0))


FOLDING = (
    latency.Subject("ResNet-50", resnet50, {f"{b}x224²": latency.pixels(b, 224) for b in (1, 4)}),
    latency.Subject(
        "EfficientNet-Lite0", efficientnet, {f"{b}x224²": image(b, 224) for b in (1, 4)}
    ),
)
QUICK = (
    latency.Subject("conv block", Block, {"2x32²": image(2, 32)}),
    latency.Subject(
        "MLP", partial(mlp, 784, 1200, 1200, 10), {"12x784": latency.features(12, 784)}
    ),
)


def models_of(subject: Any, batch: Any, rules: Any) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    model = subject.build().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, lowered = (rewrite(model, [], batch, lower=on) for on in (False, rules))
    return dict(zip(NAMES, (model, plain, lowered), strict=True))


def first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found: Tensor = next(v for v in output.values() if isinstance(v, Tensor))
    return found


def difference(models: Mapping[str, nn.Module], batch: Any) -> float:
    """‖lowered − eager‖/‖eager‖ of the first output."""
    a, b = (first_tensor(latency.call(models[n], batch)).double() for n in ("eager", "lowered"))
    return float((a - b).norm() / a.norm())


def measure(
    subject: Any, seconds: float, rules: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(times, what was fused) of one model at each of its batches, each captured for itself."""
    times, ledger = [], []
    for name, make in subject.batches.items():
        batch = make()
        models = models_of(subject, batch, rules)
        with torch.inference_mode():
            error = difference(models, batch)
            runs = {n: partial(latency.call, m, batch) for n, m in models.items()}
            taken = {n: statistics.median(v) for n, v in latency.in_turns(runs, seconds).items()}
        times.append({
            "model": subject.name, "batch": name,
            **{f"{n} ms": taken[n] * 1e3 for n in NAMES},
            "lowered × over eager": taken["eager"] / taken["lowered"],
            "lowered × over unlowered": taken["unlowered"] / taken["lowered"],
            "relative difference": error,
        })  # fmt: skip
        ledger.append(fused(subject.name, name, models["lowered"]))
    return times, ledger


def fused(model: str, batch: str, lowered: Any) -> dict[str, Any]:
    """Launches and traffic before and after, and how many places took each action."""
    step = lowered.report.steps[-1]
    actions = [d.action for d in step.decisions]
    return {
        "model": model, "batch": batch,
        **{a: actions.count(a) for a in ("lowered", "declined", "skipped")},
        "launches before": step.before.launches, "launches after": step.after.launches,
        "traffic before MB": step.before.bytes_moved / 1e6,
        "traffic after MB": step.after.bytes_moved / 1e6,
    }  # fmt: skip


def main() -> None:
    args = parse(arguments(__doc__ or ""))
    if not args.quick:
        keep_the_heap()
    subjects: Sequence[Any] = QUICK if args.quick else (*FOLDING, *latency.SUBJECTS)
    # asked for by name, rules apply also where a call is too short to gain by them
    rules = [*DEFAULT_RULES] if args.quick else True
    times, ledger, missing = [], [], []
    for subject in subjects:
        try:
            own = measure(subject, 0.2 if args.quick else 4.0, rules)
        except ModuleNotFoundError as error:
            missing.append(f"{subject.name} is left out: {error}.")
            continue
        times += own[0]
        ledger += own[1]
    write_results(
        "lowering",
        "Lowering: eager, rewritten without and with it, in eval mode",
        {"Times": times, "What was fused, by the cost model": ledger},
        command=command(),
        notes="Forward under inference_mode, no passes; medians, the three in turns of four "
        "untimed and six timed runs, without calls in which a thread waited for a core. Each batch "
        "is captured for itself. The C heap keeps what is freed. " + " ".join(missing),
        out=args.out,
        by_isa=True,
    )


if __name__ == "__main__":
    main()
