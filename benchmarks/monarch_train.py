"""Training from scratch on real text: dense, Monarch, and Monarch that ends dense; with seeds.

The trainings are those of `examples/train_monarch.py`. "Equal parameters" is a Monarch model so
much wider that it holds as many parameters as the dense one. Seconds are those of training steps,
without evaluations; the runs of one seed follow each other.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, command, load_script, parse, write_results

example = load_script("examples/train_monarch.py")
WIDER = 1.73
"""Times the width at which Monarch with 4 blocks holds the dense model's parameters, about."""


def trainings(plan: Any, seed: int, text: Any) -> dict[str, Any]:
    """One run of each kind."""
    runs = {}
    wide = dataclasses.replace(plan, width=round(plan.width * WIDER / 64) * 64)
    for name, own in (
        ("dense", plan),
        ("Monarch", plan),
        ("Monarch, then dense", plan),
        ("Monarch, equal parameters", wide),
    ):
        torch.manual_seed(seed)
        model = example.GPT(own)
        if name != "dense":
            model = example.monarch(model, own)
        late = 0.9 if "then" in name else None
        print(f"seed {seed}: {name}", flush=True)
        runs[name] = example.train(model, text, own, seed, densify_at=late)
    return runs


def loss_at(run: Any, seconds: float) -> float:
    """Validation loss at a time, between the evaluations around it; the last one beyond."""
    before = run.curve[0]
    for point in run.curve:
        if point[0] >= seconds:
            span = point[0] - before[0]
            share = (seconds - before[0]) / span if span else 1.0
            return before[2] + share * (point[2] - before[2])
        before = point
    return before[2]


def plot(runs: dict[str, list[Any]], path: Path) -> None:
    """Validation loss over seconds of training; one line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for i, (name, own) in enumerate(runs.items()):
        for j, run in enumerate(own):
            seconds, _, losses = zip(*run.curve, strict=True)
            axes.plot(seconds[1:], losses[1:], color=f"C{i}", lw=1.2, label=None if j else name)
    axes.set(xlabel="seconds of training", ylabel="validation loss, nats per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seeds", type=int, default=3)
    args = parse(parser)
    plan = example.QUICK if args.quick else example.Plan()
    text = example.split(example.corpus())
    runs: dict[str, list[Any]] = {}
    for seed in range(1 if args.quick else args.seeds):
        for name, run in trainings(plan, seed, text).items():
            runs.setdefault(name, []).append(run)
    dense = runs["dense"]
    rows = []
    for name, own in runs.items():
        losses = [r.loss for r in own]
        ratio = [r.loss / d.loss for r, d in zip(own, dense, strict=True)]
        at_end = [loss_at(d, r.seconds) for r, d in zip(own, dense, strict=True)]
        rows.append(
            {
                "model": name,
                "M parameters": max(r.parameters for r in own) / 1e6,
                "loss": statistics.mean(losses),
                "spread": max(losses) - min(losses),
                "loss over dense's": statistics.mean(ratio),
                "time over dense's": statistics.mean(
                    r.seconds / d.seconds for r, d in zip(own, dense, strict=True)
                ),
                "dense's loss at that time": statistics.mean(at_end),
            }
        )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(runs, args.out / "monarch_train.png")
    write_results(
        "monarch_train",
        "Training with Monarch layers from scratch",
        {"After equal steps": rows},
        command=command(),
        notes=f"A byte-level GPT ({plan.depth} layers of {plan.width}, {plan.batch} × "
        f"{plan.context} bytes a step, {plan.steps} steps, AdamW, cosine) on a Wikipedia excerpt "
        "and a novel; validation loss in nats per byte on stretches held out; means over "
        f"{len(dense)} seeds. `Monarch, then dense` calls `Densify` after nine tenths of the steps "
        "and carries the optimizer over. Curves: monarch_train.png.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
