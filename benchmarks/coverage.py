"""Coverage: every model through `rewrite`, whole or by parts, never an exception.

Each model is built from a config at tiny size with random weights and rewritten with
`[Quadratic()]`, which starts exactly at the trained layer: outputs must stay equal. A linear layer
is an `nn.Linear`, a transformers `Conv1D`, or a weight that the model multiplies by in a function.

The further models (`_further`; with `--full` those of the zoo too) are called once with recorded
hidden states, rewritten with Monarch and with int8, and go the whole way of `_rounds`: forward,
training steps, save and load. `--section` runs one of the two and keeps the tables of the other.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import torch
import zoo
from _further import absent, further
from _harness import Rows, arguments, command, parse, versions, write_results
from _rounds import Round, go
from torch import nn

from rewriter import rewrite
from rewriter.passes import Monarch, Quadratic, Quantize

LIMIT = 1e-4
"""Largest relative difference of the outputs that rounding explains in fp32."""

RECIPES = {"Monarch": [Monarch(nblocks=4)], "int8": [Quantize("int8-dynamic")]}
LIMITS = {"Monarch": LIMIT, "int8": 2e-2}
"""As `LIMIT`; in int8 a difference in the last place may turn a rounding."""


def linear_layers(model: nn.Module) -> set[str]:
    """Names of the modules that are linear layers, each module once."""
    return {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}


def run(entry: zoo.Entry) -> dict[str, Any]:
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


def way(entry: Any) -> dict[str, Any]:
    """One row of the further models: both recipes."""
    row: dict[str, Any] = {"model": entry.name, "family": entry.family}
    notes = [absent(entry) or ""]
    for name, passes in RECIPES.items():
        found = Round(refused="not run") if notes[0] else go(entry, passes)
        row |= {
            name: found.captured or "–",
            f"{name} rewritten": found.rewritten,
            f"{name} skipped": found.skipped,
            f"{name} eval": _figure(found.difference),
            f"{name} train": _figure(found.step),
            f"{name} loads": "yes" if found.loaded else "no",
            f"{name} seconds": found.seconds,
        }
        notes += _findings(name, found) if not notes[0] else []
    return row | {"found": "; ".join(note for note in notes if note)}


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _findings(name: str, found: Round) -> list[str]:
    """What of a round is not as it must be, in words."""
    notes = [f"{name}: {text}" for text in (found.refused, *found.wrong) if text]
    for what, value in (("eval", found.difference), ("training step", found.step)):
        if value is not None and value > LIMITS[name]:
            notes.append(f"{name}: {what} unlike the same layers in Python")
    return notes


def architectures(args: argparse.Namespace) -> dict[str, Rows]:
    """The tables of the zoo under `[Quadratic()]`."""
    rows = []
    for entry in zoo.entries(args.only, quick=args.quick):
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
    return {"Summary": summary, "Every architecture": rows}


def whole_ways(args: argparse.Namespace) -> dict[str, Rows]:
    """The tables of the further models under Monarch and int8."""
    models: list[Any] = list(further(args.only, quick=args.quick))
    if args.full:
        models += zoo.entries(quick=args.quick)
    rows = []
    for entry in models:
        rows.append(way(entry))
        print(" ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    ran = [row for row in rows if row["Monarch"] != "–" or row["int8"] != "–"]
    summary = [
        {"what": "models", "figure": len(rows)},
        {"what": "of which could be built here", "figure": sum(not absent(e) for e in models)},
        {"what": "as promised under both recipes", "figure": sum(not r["found"] for r in rows)},
    ]
    for name in RECIPES:
        summary += [
            {"what": f"{name}: captured whole", "figure": sum(r[name] == "whole" for r in ran)},
            {"what": f"{name}: rewritten", "figure": sum(r[f"{name} rewritten"] for r in ran)},
            {"what": f"{name}: saved and loaded, bit for bit",
             "figure": sum(r[f"{name} loads"] == "yes" for r in ran)},
        ]  # fmt: skip
    return {FURTHER_SUMMARY: summary, "Every further model": rows}


FURTHER_SUMMARY = "Further models, with Monarch and with int8"
SECTIONS = {"zoo": architectures, "further": whole_ways}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="*", help="names of the section")
    parser.add_argument("--full", action="store_true", help="the whole way for the zoo too")
    parser.add_argument("--section", choices=list(SECTIONS), help="only this; the other is kept")
    args = parse(parser)
    if args.only and not args.section:
        parser.error("--only needs a --section")
    tables: dict[str, Rows] = {}
    if args.section and args.out and (args.out / "coverage.json").exists():
        tables = json.loads((args.out / "coverage.json").read_text(encoding="utf-8"))["tables"]
    for section in [args.section] if args.section else SECTIONS:
        tables |= SECTIONS[section](args)
    write_results(
        "coverage",
        "Coverage over models",
        tables,
        command=command(),
        notes="Tiny random models; seconds include capture in eval and train mode, pricing, the "
        "pass, and its checks; of the further models also forwards, two training steps, save and "
        "load. Their eval and train: largest ‖a − b‖/‖b‖ of outputs, gradients and buffers against "
        "a copy of the model whose own Python runs over the same new layers; – where that "
        "Python cannot run over them, or nothing can be trained. Libraries: "
        + ", ".join(f"{k} {v}" for k, v in versions("diffusers", "torch_geometric").items())
        + ".",
        out=args.out,
    )


if __name__ == "__main__":
    main()
