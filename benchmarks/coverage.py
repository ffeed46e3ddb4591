"""Coverage: every architecture of the zoo through `rewrite`, whole or by parts, never an exception.

Each model is built from a config at tiny size with random weights and rewritten with
`[Quadratic()]`, which starts exactly at the trained layer: outputs must stay equal. A linear layer
is an `nn.Linear`, a transformers `Conv1D`, or a weight that the model multiplies by in a function.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from _harness import arguments, command, parse, write_results
from torch import nn
from zoo import Entry, entries

from rewriter import rewrite
from rewriter.passes import Quadratic

LIMIT = 1e-4
"""Largest relative difference of the outputs that rounding explains in fp32."""


def linear_layers(model: nn.Module) -> set[str]:
    """Names of the modules that are linear layers, each module once."""
    return {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}


def run(entry: Entry) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    model, inputs = entry.build(), entry.inputs()
    expected = linear_layers(model)
    row: dict[str, Any] = {"model": entry.name, "family": entry.family}
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimized = rewrite(model, [Quadratic()], inputs)
    except Exception as error:
        return row | {
            "captured": f"{type(error).__name__}: {str(error).splitlines()[0][:80]}",
            "seconds": round(time.perf_counter() - start, 1),
            "linear": len(expected), "rewritten": 0, "skipped": 0, "missed": len(expected),
            "islands": 0, "train graph": "no", "difference": float("inf"), "exception": 1,
        }  # fmt: skip
    seconds = time.perf_counter() - start
    report = optimized.report
    decisions = {d.site: d for d in report.decisions}
    unexplained = [d for d in decisions.values() if not d.changed and not d.reason]
    missed = len(expected - set(decisions)) + len(unexplained)
    in_python = any("train mode" in note for note in report.capture.notes)
    return row | {
        "captured": "whole" if report.capture.rung == "export" else "by parts",
        "seconds": round(seconds, 1),
        "linear": len(expected | set(decisions)),
        "rewritten": sum(d.changed for d in decisions.values()),
        "skipped": sum(not d.changed for d in decisions.values()),
        "missed": missed,
        "islands": len(report.capture.islands),
        "train graph": "no" if in_python else "yes",
        "difference": report.steps[1].output_error,
        "exception": 0,
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="*", help="names of the zoo")
    args = parse(parser)
    rows = []
    for entry in entries(args.only, quick=args.quick):
        rows.append(run(entry))
        print(" ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    total = sum(r["linear"] for r in rows)
    covered = sum(r["rewritten"] + r["skipped"] for r in rows)
    summary = [
        {"what": "architectures", "figure": len(rows)},
        {"what": "exceptions out of rewrite", "figure": sum(r["exception"] for r in rows)},
        {"what": "captured whole", "figure": sum(r["captured"] == "whole" for r in rows)},
        {"what": "captured by parts", "figure": sum(r["captured"] == "by parts" for r in rows)},
        {"what": "linear layers", "figure": total},
        {"what": "rewritten", "figure": sum(r["rewritten"] for r in rows)},
        {"what": "skipped with a reason", "figure": sum(r["skipped"] for r in rows)},
        {"what": "rewritten or skipped with a reason", "figure": f"{100 * covered / total:.2f} %"},
        {
            "what": f"outputs equal (relative difference ≤ {LIMIT:g})",
            "figure": sum((r["difference"] or 0.0) <= LIMIT for r in rows),
        },
        {"what": "median seconds", "figure": sorted(r["seconds"] for r in rows)[len(rows) // 2]},
    ]
    for row in rows:
        del row["exception"]
        found = row["difference"]
        row["difference"] = "no floats" if found is None else f"{found:.1e}"
    write_results(
        "coverage",
        "Coverage over transformers architectures",
        {"Summary": summary, "Every architecture": rows},
        command=command(),
        notes="Tiny random models from configs; seconds include capture in eval and train mode, "
        "pricing, the pass, and its checks.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
