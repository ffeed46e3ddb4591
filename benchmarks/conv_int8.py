"""Int8 convolutions: networks for images in int8 against fp32, in both memory formats.

Four models in turns: fp32 as it comes and in channels last, and `Quantize("int8-dynamic",
convolutions=True)` of both. EfficientNet-Lite0 has its real weights where its package is installed.
"""

from __future__ import annotations

import statistics
import warnings
from functools import partial
from typing import Any

import torch
from _harness import arguments, command, keep_the_heap, load_script, parse, write_results
from _models import basic_resnet, efficientnet_lite
from torch import nn

from rewriter import rewrite
from rewriter.passes import Quantize

latency = load_script("benchmarks/latency.py")
lowering = load_script("benchmarks/lowering.py")

RECIPE = Quantize("int8-dynamic", convolutions=True)
SUBJECTS = (
    latency.Subject(
        "EfficientNet-Lite0",
        efficientnet_lite,
        {f"{b}x224²": lowering.image(b, 224) for b in (1, 4)},
    ),
    latency.Subject(
        "ResNet-18",
        partial(basic_resnet, 2),
        {f"{b}x224²": latency.pixels(b, 224) for b in (1, 4)},
    ),
)
QUICK = (latency.Subject("conv block", lowering.Block, {"2x32²": lowering.image(2, 32)}),)


def last(batch: Any) -> Any:
    """The same images in channels last."""
    if isinstance(batch, torch.Tensor):
        return batch.contiguous(memory_format=torch.channels_last)
    return {name: last(value) for name, value in batch.items()}


def variants(subject: Any, batch: Any) -> dict[str, tuple[nn.Module, Any]]:
    """By name: a model, and the batch as it takes it."""
    torch.manual_seed(0)
    plain = subject.build().eval()
    torch.manual_seed(0)
    other = subject.build().eval().to(memory_format=torch.channels_last)
    found: dict[str, tuple[nn.Module, Any]] = {}
    for how, model, given in (("", plain, batch), (", channels last", other, last(batch))):
        found[f"fp32{how}"] = model, given
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[f"int8{how}"] = rewrite(model, [RECIPE], given), given
    return found


def measure(subject: Any, seconds: float) -> list[dict[str, Any]]:
    """A row for each batch: times, ratios, and how near the logits are."""
    rows = []
    for name, make in subject.batches.items():
        found = variants(subject, make())
        with torch.inference_mode():
            runs = {n: partial(latency.call, m, given) for n, (m, given) in found.items()}
            taken = {n: statistics.median(v) for n, v in latency.in_turns(runs, seconds).items()}
            dense, int8 = (
                lowering.first_tensor(runs[n]()).flatten(1).double() for n in ("fp32", "int8")
            )
        fastest = min(taken[n] for n in taken if n.startswith("fp32"))
        rows.append({
            "model": subject.name, "batch": name,
            **{f"{n} ms": taken[n] * 1e3 for n in found},
            "int8 × over fp32": taken["fp32"] / taken["int8"],
            "int8 × over fp32, channels last": taken["fp32, channels last"]
            / taken["int8, channels last"],
            "best int8 × over best fp32": fastest
            / min(taken[n] for n in taken if n.startswith("int8")),
            "cosine of the outputs": float(torch.cosine_similarity(dense, int8).mean()),
            "same class": float((dense.argmax(1) == int8.argmax(1)).double().mean()),
        })  # fmt: skip
    return rows


def main() -> None:
    args = parse(arguments(__doc__ or ""))
    if not args.quick:
        keep_the_heap()
    rows, missing = [], []
    for subject in QUICK if args.quick else SUBJECTS:
        try:
            rows += measure(subject, 0.2 if args.quick else 4.0)
        except ModuleNotFoundError as error:
            missing.append(f"{subject.name} is left out: {error}.")
    write_results(
        "conv_int8",
        "Int8 convolutions against fp32, in eval mode",
        {"Times": rows},
        command=command(),
        notes="Forward under inference_mode; medians, all in turns. " + " ".join(missing),
        out=args.out,
        by_isa=True,
    )


if __name__ == "__main__":
    main()
