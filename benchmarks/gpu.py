"""Everything that is to be known of a CUDA card, in one command: right, how fast, as predicted?

    python benchmarks/gpu.py                          # within six minutes, all parts
    python benchmarks/gpu.py --part correctness       # one of them; may be given again
    python benchmarks/gpu.py --quick                  # no card: Triton's interpreter and the CPU

Runs from a source checkout on torch 2.11 or newer; nothing of ours need be installed. What fails
is a row of a table, and the exit status is 1 then, as where the time reached nothing of a part.
Results are kept after every part, one pair of files a card: `benchmarks/results/gpu_<card>.md` and
`.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import _checkout

MISSING = _checkout.missing()
if MISSING:
    raise SystemExit(
        f"packages are missing here: {', '.join(MISSING)}. Install them, or where nothing can be "
        f"fetched carry their wheels: pip download --no-deps -d DIR {' '.join(MISSING)}, then pip "
        "install --no-index --no-deps --target SITE DIR/*.whl and PYTHONPATH=SITE"
    )

import torch  # noqa: E402
from _gpu_crew import Case, Outcome, Row, run_cases, serve  # noqa: E402
from _harness import (  # noqa: E402
    arguments,
    command,
    cores,
    markdown_table,
    parse,
    write_results,
)

PARTS = (
    "correctness", "memory", "compiling", "times", "quantized", "sparse", "training", "predicted"
)  # fmt: skip
STAGES: Sequence[tuple[tuple[str, ...], float]] = (
    (("correctness", "memory", "compiling"), 0.36),
    (("times",), 0.56),
    (("quantized",), 0.7),
    (("sparse",), 0.78),
    (("training",), 0.9),
    (("predicted",), 1.0),
)
"""Which parts run together, and at which share of the time the next ones' turn comes. The first
ones take no times: they share the card, and the processor with the compilers."""


def part_cases(part: str, quick: bool) -> list[Case]:
    import _gpu_checks
    import _gpu_models
    import _gpu_quantized
    import _gpu_sparse
    import _gpu_times

    made: Mapping[str, Callable[[bool], list[Case]]] = {
        "correctness": lambda quick: [
            *_gpu_checks.cases(quick), *_gpu_quantized.checks(quick), *_gpu_sparse.checks(quick)
        ],
        "memory": _gpu_models.memory_cases,
        "compiling": lambda quick: [
            *_gpu_models.compile_cases(quick), *_gpu_times.compile_cases(quick)
        ],
        "times": _gpu_times.cases,
        "quantized": _gpu_quantized.timings,
        "sparse": _gpu_sparse.timings,
        "training": _gpu_models.training_cases,
        "predicted": _gpu_models.predicted_cases,
    }  # fmt: skip
    return made[part](quick)


def of_parts(parts: Sequence[str], quick: bool) -> list[tuple[str, Case]]:
    """The cases of several parts in turn, so that none waits for all of another."""
    each = [[(part, case) for case in part_cases(part, quick)] for part in parts]
    found: list[tuple[str, Case]] = []
    while any(each):
        for cases in each:
            found += cases[:1]
            del cases[:1]
    return found


# Running -----------------------------------------------------------------------------------------


class Record:
    """What all parts found so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.monotonic()
        self.tables: dict[str, list[Row]] = {}
        self.failures: list[Row] = []
        self.unreached: list[Row] = []
        self.parts: list[Row] = []

    def run(self, parts: Sequence[str], share: float) -> None:
        """One stage, and what it found to disk."""
        args = self.args
        began = time.monotonic()
        cases = of_parts(parts, args.quick)
        outcome = run_cases(
            [
                sys.executable,
                *_flags(),
                str(Path(__file__).resolve()),
                "--serve",
                *_options(parts, args),
            ],
            [case for _, case in cases],
            1 if args.quick or parts[0] not in STAGES[0][0] else max(cores() - 3, 2),
            self.start + share * args.seconds,
            _environment(parts),
        )
        self.add(cases, outcome)
        seconds = time.monotonic() - began
        for part in parts:
            own = [i for i, (of, _) in enumerate(cases) if of == part]
            self.parts.append({
                "part": part, "cases": len(own),
                "failed": sum(i in outcome.failed for i in own),
                "not reached": sum(i not in outcome.reached for i in own),
                "s, with those beside it": seconds,
            })  # fmt: skip
        self.write()

    def add(self, cases: Sequence[tuple[str, Case]], outcome: Outcome) -> None:
        for heading, rows in outcome.tables().items():
            self.tables.setdefault(heading, []).extend(map(_finite, rows))
        for number, (part, case) in enumerate(cases):
            if number in outcome.failed:
                reason = outcome.failed[number]
                self.failures.append({"part": part, "case": case.name, "reason": reason})
            elif number not in outcome.reached:
                self.unreached.append({"part": part, "case": case.name})

    def wrong(self) -> list[Row]:
        """Comparisons that failed."""
        return [r for r in self.tables.get("Correctness", ()) if r["verdict"] != "ok"]

    def summary(self) -> dict[str, list[Row]]:
        """What is to be read first."""
        import _gpu_models
        import _gpu_quantized
        import _gpu_sparse
        import _gpu_times

        compared = len(self.tables.get("Correctness", ()))
        what = f"comparisons with a reference that failed, of {compared}"
        figures: list[Row] = [{"figure": what, "found": len(self.wrong()), "wanted": "0"}]
        for of in (_gpu_times, _gpu_models, _gpu_quantized, _gpu_sparse):
            figures += of.targets(self.tables)
        found = {"Figures": figures, "Parts": self.parts, "Failures": self.failures}
        found |= {"Comparisons that failed": self.wrong(), "Not reached": self.unreached}
        return {heading: rows for heading, rows in found.items() if rows}

    def write(self) -> None:
        import _gpu_models
        from _gpu_clock import card

        last = {h: rows for h, rows in self.tables.items() if h == "Correctness"}
        with contextlib.redirect_stdout(io.StringIO()):  # hundreds of rows
            write_results(
                file_name(card(), self.args.part),
                f"On a card: {card()}",
                self.summary() | {h: t for h, t in self.tables.items() if h not in last} | last,
                command=_typed(),
                notes=f"{circumstances()} {TIMED} {_gpu_models.notes(self.args.quick)}",
                out=self.args.out,
            )


TIMED = (
    "Times are medians of CUDA events, both sides in turn in one process after warming up, with "
    "256 MB overwritten before each call (a cold L2) and the card kept busy until the call is "
    "queued, so that they are the card's alone; a call's time is that of calls that follow each "
    "other, Python and launches included. float32 products are exact, without tf32. Shares of peak "
    'and bandwidth are of the datasheet. "monarch" is what the operation chooses, "bmm" the '
    "same by torch's batched products."
)


def _finite(row: Row) -> Row:
    """JSON has no infinity: such a figure becomes text."""
    strange = {k: str(v) for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return row | strange


def circumstances() -> str:
    """Card, driver and versions."""
    import triton

    text = f"Triton {triton.__version__}."
    if not torch.cuda.is_available():
        return f"No CUDA card: Triton's interpreter and the CPU's operations. {text}"
    own = torch.cuda.get_device_properties(0)
    return (
        f"{own.name}, {own.total_memory / 2**30:.0f} GiB, {own.multi_processor_count} "
        f"multiprocessors, compute capability {own.major}.{own.minor}, CUDA {torch.version.cuda}, "
        f"{text}"
    )


def file_name(card: str, parts: Sequence[str] | None) -> str:
    """One a card, and one more for a run of single parts."""
    plain = re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_")
    return "_".join(["gpu", plain, *sorted(parts or ())])


def _typed() -> str:
    """The command without the folder of the results, which says nothing about them."""
    return re.sub(r" --out[ =]\S+", "", command())


def _flags() -> list[str]:
    return [f"-W{option}" for option in sys.warnoptions]


def _options(parts: Sequence[str], args: argparse.Namespace) -> list[str]:
    options = [f"--part={part}" for part in parts]
    return [*options, "--quick"] if args.quick else options


def _environment(parts: Sequence[str]) -> dict[str, str]:
    found = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    if parts[0] in STAGES[0][0]:  # many processes share the cores
        found |= {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "1"}
    return found


def _give_back() -> None:
    """Memory of the card that other processes need."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", action="append", choices=PARTS, help="this part alone")
    parser.add_argument(
        "--seconds", type=float, default=330, help="no case is begun after so long (default: 330)"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parse(parser)
    if args.serve:
        torch.backends.cuda.matmul.allow_tf32 = False  # some images switch it on
        serve([case for _, case in of_parts(args.part, args.quick)], _give_back)
        return 0
    if not torch.cuda.is_available() and not args.quick:
        raise SystemExit("no CUDA card here: --quick checks what needs none")
    record = Record(args)
    wanted = args.part or PARTS
    stages = [(tuple(p for p in parts if p in wanted), share) for parts, share in STAGES]
    stages = [(parts, 1.0 if args.part else share) for parts, share in stages if parts]
    for parts, share in [(tuple(wanted), 1.0)] if args.quick else stages:
        record.run(parts, share)
    for heading, rows in record.summary().items():
        print(f"## {heading}\n\n{markdown_table(rows)}\n")
    idle = any(row["cases"] == row["not reached"] > 0 for row in record.parts)
    print(
        f"{time.monotonic() - record.start:.0f} s; {len(record.failures)} cases failed, "
        f"{len(record.wrong())} comparisons wrong, {len(record.unreached)} not reached"
    )
    return 1 if record.failures or record.wrong() or idle else 0


if __name__ == "__main__":
    sys.exit(main())
