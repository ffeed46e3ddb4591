"""Fashion-MNIST: what few bits cost an MLP and a CNN, rounded after their training or trained with
rounding."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from _harness import arguments, command, load_script, parse, write_results

example = load_script("examples/qat.py")
data = load_script("examples/_data.py")


def table(images: Any, plan: Any, seeds: tuple[int, ...], kind: Any) -> list[dict[str, Any]]:
    """A row for float32 and for each scheme: means over the seeds."""
    runs = [example.compare(images, plan, seed, kind=kind) for seed in seeds]
    rows: list[dict[str, Any]] = []
    for same in zip(*runs, strict=True):
        after, trained = ([100 * row[key] for row in same] for key in ("rounded after", "trained"))
        dense = [100 * run[0]["trained"] for run in runs]
        less = [d - t for d, t in zip(dense, trained, strict=True)]
        rows.append(
            {
                "scheme": same[0]["scheme"],
                "rounded after training %": round(statistics.mean(after), 2),
                "trained with rounding %": round(statistics.mean(trained), 2),
                "points below float32": round(statistics.mean(less), 2) + 0.0,  # no -0
                "of each seed": ", ".join(f"{v:.2f}" for v in less),
                "outputs that integers change": max(row["bits differ"] for row in same),
            }
        )
    return rows


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, default=data.FASHION)
    args = parse(parser)
    images = data.fashion_mnist(args.data)
    plan, seeds = (example.QUICK, (0,)) if args.quick else (example.Plan(), (0, 1, 2))
    write_results(
        "qat",
        "Training with rounding",
        {
            f"{kind.__name__}, width {plan.width}, {len(seeds)} seeds": table(
                images, plan, seeds, kind
            )
            for kind in example.MODELS
        },
        command=command(),
        notes=f"Accuracy on the 10,000 test images, mean of the seeds. {plan.steps} steps of "
        f"{plan.batch} images; the last {plan.rounded:.0%} of them with the scheme's rounding or, "
        "for float32 and what is rounded after training, without; all from one state and with "
        "the same batches. The last column: the share of outputs that are not the same bits after "
        "`Quantize`.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
