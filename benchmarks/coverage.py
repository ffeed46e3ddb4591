"""Coverage: every model through `rewrite`, whole or by parts, never an exception.

Each model is built from a config at tiny size with random weights and rewritten with
`[Quadratic()]`, which starts exactly at the trained layer: outputs must stay equal. A linear layer
is an `nn.Linear`, a transformers `Conv1D`, or a weight that the model multiplies by in a function.

The further models (`_further`; with `--full` those of the zoo too) are called once with recorded
hidden states, rewritten with Monarch and with int8, and go the whole way of `_rounds`: forward,
training steps, save and load. `--section` runs one of the two and keeps the tables of the other;
with `--only` the other rows of its table are kept too. The table of runs says when each was
measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import zoo
from _further import absent, further
from _harness import Rows, arguments, command, machine, parse, versions, write_results
from _rounds import Round, go
from torch import nn

from rewriter import rewrite
from rewriter.passes import Monarch, Quadratic, Quantize

LIMIT = 1e-4
"""Largest relative difference of the outputs that rounding explains in fp32."""

RECIPES = {"Monarch": [Monarch(nblocks=4)], "int8": [Quantize("int8-dynamic")]}
UNBUILT = "not built"
CAPTURED = ("whole", "by parts")
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
            "islands": 0, "train graph": "no", "difference": "inf",
        }  # fmt: skip
    seconds = time.perf_counter() - start
    report = optimized.report
    decisions = {d.site: d for d in report.decisions}
    unexplained = [d for d in decisions.values() if not d.changed and not d.reason]
    missed = len(expected - set(decisions)) + len(unexplained)
    in_python = any("train mode" in note for note in report.capture.notes)
    difference = report.steps[1].output_error
    return row | {
        "captured": "whole" if report.capture.rung == "export" else "by parts",
        "seconds": round(seconds, 1),
        "linear": len(expected | set(decisions)),
        "rewritten": sum(d.changed for d in decisions.values()),
        "skipped": sum(not d.changed for d in decisions.values()),
        "missed": missed,
        "islands": len(report.capture.islands),
        "train graph": "no" if in_python else "yes",
        "difference": "no floats" if difference is None else f"{difference:.1e}",
    }


def way(entry: Any) -> dict[str, Any]:
    """One row of the further models: both recipes."""
    row: dict[str, Any] = {"model": entry.name, "family": entry.family}
    notes = [absent(entry) or ""]
    for name, passes in RECIPES.items():
        found = Round(refused="not run") if notes[0] else go(entry, passes)
        row |= {
            name: found.captured or (UNBUILT if notes[0] else "–"),
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


def of_architectures(rows: Rows) -> Rows:
    """The figures over all rows of the zoo."""
    total = sum(r["linear"] for r in rows)
    covered = sum(r["rewritten"] + r["skipped"] for r in rows)
    return [
        {"what": "architectures", "figure": len(rows)},
        {
            "what": "exceptions out of rewrite",
            "figure": sum(r["captured"] not in CAPTURED for r in rows),
        },
        {"what": "captured whole", "figure": sum(r["captured"] == "whole" for r in rows)},
        {"what": "captured by parts", "figure": sum(r["captured"] == "by parts" for r in rows)},
        {"what": "linear layers", "figure": total},
        {"what": "rewritten", "figure": sum(r["rewritten"] for r in rows)},
        {"what": "skipped with a reason", "figure": sum(r["skipped"] for r in rows)},
        {"what": "rewritten or skipped with a reason", "figure": f"{100 * covered / total:.2f} %"},
        {
            "what": f"outputs equal (relative difference ≤ {LIMIT:g})",
            "figure": sum(r["difference"] == "no floats" or float(r["difference"]) <= LIMIT
                          for r in rows),
        },
        {"what": "median seconds", "figure": sorted(r["seconds"] for r in rows)[len(rows) // 2]},
    ]  # fmt: skip


def of_ways(rows: Rows) -> Rows:
    """The figures over all rows of the further models."""
    figures: list[dict[str, Any]] = [
        {"what": "models", "figure": len(rows)},
        {"what": "of which could be built here",
         "figure": sum(r["Monarch"] != UNBUILT for r in rows)},
        {"what": "as promised under both recipes", "figure": sum(not r["found"] for r in rows)},
    ]  # fmt: skip
    for name in RECIPES:
        figures += [
            {"what": f"{name}: captured whole", "figure": sum(r[name] == "whole" for r in rows)},
            {"what": f"{name}: captured by parts",
             "figure": sum(r[name] == "by parts" for r in rows)},
            {"what": f"{name}: rewritten", "figure": sum(r[f"{name} rewritten"] for r in rows)},
            {"what": f"{name}: compared with the same layers in Python",
             "figure": sum(r[f"{name} eval"] != "–" for r in rows)},
            {"what": f"{name}: saved and loaded, bit for bit",
             "figure": sum(r[f"{name} loads"] == "yes" for r in rows)},
        ]  # fmt: skip
    return figures


def further_entries(args: argparse.Namespace) -> list[Any]:
    """The further models, with `--full` those of the zoo too."""
    entries: list[Any] = list(further(args.only, quick=args.quick))
    return entries + (zoo.entries(quick=args.quick) if args.full else [])


@dataclass(frozen=True)
class Section:
    """What is measured together.

    Args:
        entries: the models that the arguments ask for.
        row: one model, measured.
        summary: figures over the rows.
        headings: of the summary and of the rows.
    """

    entries: Callable[[argparse.Namespace], Sequence[Any]]
    row: Callable[[Any], dict[str, Any]]
    summary: Callable[[Rows], Rows]
    headings: tuple[str, str]

    def tables(self, args: argparse.Namespace, before: Mapping[str, Rows]) -> dict[str, Rows]:
        """Both tables; of the rows before, those stay that `--only` leaves out."""
        summary, heading = self.headings
        rows = {row["model"]: row for row in before.get(heading, [])} if args.only else {}
        for entry in self.entries(args):
            rows[entry.name] = row = self.row(entry)
            print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        found = list(rows.values())
        return {summary: self.summary(found), heading: found}


SECTIONS = {
    "zoo": Section(
        lambda args: zoo.entries(args.only, quick=args.quick), run, of_architectures,
        ("Summary", "Every architecture"),
    ),
    "further": Section(
        further_entries, way, of_ways,
        ("Further models, with Monarch and with int8", "Every further model"),
    ),
}  # fmt: skip
RUNS = "Runs"


def circumstances(section: str) -> dict[str, Any]:
    """When, with what and where a section was measured: its row in the table of runs."""
    here = machine()
    return {
        "section": section,
        "command": command(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads",
        "versions": ", ".join(f"{k} {v}" for k, v in (versions() | versions(*CLIENTS)).items()),
    }


CLIENTS = ("diffusers", "torch_geometric")


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
    runs = list(tables.pop(RUNS, []))
    for section in [args.section] if args.section else SECTIONS:
        tables |= SECTIONS[section].tables(args, tables)
        own = circumstances(section)  # beside those of the rows that `--only` leaves out
        runs = [r for r in runs if r != own and (args.only or r["section"] != section)] + [own]
    write_results(
        "coverage",
        "Coverage over models",
        tables | {RUNS: runs},
        command=command(),
        notes=NOTES,
        out=args.out,
    )


NOTES = (
    "Tiny random models; seconds include capture in eval and train mode, pricing, the pass, and "
    "its checks; of the further models also forwards, two training steps, save and load. Their "
    "eval and train: largest ‖a − b‖/‖b‖ of outputs, gradients and buffers against a copy of the "
    "model whose own Python runs over the same new layers; – where that Python cannot run over "
    "them, or nothing can be trained. The last line is of the last run; every section's own is in "
    "the table of runs."
)


if __name__ == "__main__":
    main()
