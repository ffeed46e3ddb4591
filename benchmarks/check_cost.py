"""What a rewritten model's own checks cost: a call of it beside one of the original, unchanged.

`rewrite(model, [], batch, lower=False)` runs the same operations as the model: what differs is that
every call is compared with the captured one and the module tree with what the graph took for
granted, and that the containers' own Python does not run. Both are called in turns in one process,
without gradients; "checks" times the comparison alone (binding the arguments, sizes, attributes,
hooks, dtypes), as a share of the original's call.

MiniLM has its real weights. The small MLP is there to show what the checks come to where nothing
else takes time.

    python benchmarks/check_cost.py
"""

from __future__ import annotations

from typing import Any

import torch
from _harness import arguments, command, interleaved, parse, quartiles, write_results
from _models import minilm
from torch import nn

from rewriter import rewrite

SIZES = ((1, 16), (1, 128), (8, 128))
CALLS = 400
"""Checks per timing: one alone is too short to time."""


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 2000, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def row(name: str, model: nn.Module, call: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One row: medians over the rounds."""
    hosted = rewrite(model, [], call, lower=False)
    form: Any = vars(hosted)["_rewriter"].forms[0]

    def checks() -> None:
        for _ in range(CALLS):
            form.fits(hosted, type(model).forward, (), call)

    with torch.no_grad():
        times = interleaved(
            {"original": lambda: model(**call), "rewritten": lambda: hosted(**call),
             "checks": checks},
            rounds=rounds,
        )  # fmt: skip
    original, rewritten, checked = (quartiles(times[k])[1] for k in times)
    ratios = [b / a for a, b in zip(times["original"], times["rewritten"], strict=True)]
    return {
        "call": name,
        "original, ms": round(original * 1e3, 3),
        "rewritten, ms": round(rewritten * 1e3, 3),
        "rewritten / original": round(quartiles(ratios)[1], 3),
        "checks, µs": round(checked / CALLS * 1e6, 1),
        "checks / original": f"{checked / CALLS / original:.2%}",
    }


def main() -> None:
    options = parse(arguments(__doc__ or ""))
    rounds = 20 if options.quick else 100
    model = minilm()
    rows = [
        row(f"MiniLM, {b} × {s} tokens", model, tokens(b, s), max(5, rounds * 16 // (b * s)))
        for b, s in SIZES
    ]
    mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    rows.append(row("MLP, 1 × 64", mlp, {"input": torch.randn(1, 64)}, rounds))
    write_results(
        "check_cost",
        "What a rewritten model's own checks cost",
        {"Median call": rows},
        command=command(),
        notes="A model rewritten with no pass and not lowered, beside the original, in turns in "
        'one process, without gradients. "checks" is the comparison of a call, and of the module '
        "tree, with what was captured. Aimed at: at most 2 % at every size of MiniLM.",
        out=options.out,
    )


if __name__ == "__main__":
    main()
