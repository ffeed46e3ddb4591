"""One figure of every family, of this version beside another: do the measured figures still hold?

    python benchmarks/spot_checks.py --before ../checkout-of-the-version-before

Each version has a process of its own (`_spot_side.py`). Speeds are ratios of two functions timed in
turn in one process, and the processes take turns, a round each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from _harness import ROOT, arguments, parse, quartiles, write_results

SIDES = ("before", "after")
FAMILIES = {
    "int8": ("MiniLM in int8, 8 × 128 tokens: times faster than eager", 1.0, 30),
    "monarch": (
        "Monarch, 768 → 3072, N = 4, 512 rows, forward: share of the arithmetic's gain",
        3072 * 768 / (4 * 192 * 192 + 4 * 768 * 192),
        60,
    ),
    "backend": ("MiniLM under the backend without passes: times faster than Inductor", 1.0, 30),
    "rewrite": ("MiniLM, a rewrite without passes: speed over torch.export's", 1.0, 5),
}
"""What is timed → (its name, what the ratio is a share of, rounds)."""


class Side:
    """A process with the package of one source checkout.

    Args:
        source: the root of a checkout.
        folder: where the package is put together from links into it.
    """

    def __init__(self, source: Path, folder: Path, quick: bool, threads: int) -> None:
        package = folder / "rewriter"
        package.mkdir()
        for path in (source / "rewriter").iterdir():
            (package / path.name).symlink_to(path)
        for name in ("passes", "kernels"):
            (package / name).symlink_to(source / name)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("_spot_side.py")), str(int(quick)),
             str(threads)],
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, request: str) -> Any:
        """Answers when the process has done it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{request}: the process ended with {self.process.wait()}")
        return json.loads(line)


@contextmanager
def started(source: Path, quick: bool, threads: int) -> Iterator[Side]:
    with tempfile.TemporaryDirectory() as folder:
        side = Side(source.resolve(), Path(folder), quick, threads)
        try:
            yield side
        finally:
            side.process.kill()
            side.process.wait()


def ratios(sides: Mapping[str, Side], name: str, rounds: int) -> dict[str, list[float]]:
    """Of every round, by side; the first round of each is not counted, the sides take turns."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side in list(sides) if turn % 2 else reversed(sides):
            seconds = sides[side].ask(name)
            if turn:
                found[side].append(seconds["over"] / seconds["own"])
    return found


def speeds(sides: Mapping[str, Side], quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, (figure, unit, rounds) in FAMILIES.items():
        found = ratios(sides, name, 2 if quick else rounds)
        row: dict[str, Any] = {"figure": figure}
        for side in SIDES:
            low, median, high = quartiles([ratio / unit for ratio in found[side]])
            row |= {side: median, f"quartiles {side}": f"{low:.3f} – {high:.3f}"}
        pairs = zip(found["after"], found["before"], strict=True)
        low, median, high = quartiles([after / before for after, before in pairs])
        rows.append(row | {"after / before": median, "its quartiles": f"{low:.3f} – {high:.3f}"})
    return rows


def facts(sides: Mapping[str, Side]) -> list[dict[str, Any]]:
    found = {side: sides[side].ask("facts") for side in SIDES}
    return [
        {
            "family": family,
            "figure": figure,
            **{side: found[side][family].get(figure, "–") for side in SIDES},
            "equal": "yes" if found["before"][family].get(figure) == value else "no",
        }
        for family, figures in found["after"].items()
        for figure, value in figures.items()
    ]


def commit(source: Path) -> str:
    """Of a checkout, shortened."""
    done = subprocess.run(
        ["git", "-C", str(source), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "no commit"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--before", type=Path, help="source checkout of the other version (--quick: this one)"
    )
    args = parse(parser)
    if args.before is None and not args.quick:
        parser.error("--before is missing: name a source checkout of the version to compare with")
    before: Path = args.before or ROOT
    if not (before / "rewriter" / "__init__.py").exists():
        parser.error(f"--before {before}: this is no source checkout, it has no rewriter/")
    with ExitStack() as stack:
        places = {"before": before, "after": ROOT}
        sides = {
            name: stack.enter_context(started(place, args.quick, torch.get_num_threads()))
            for name, place in places.items()
        }
        counted, timed = facts(sides), speeds(sides, args.quick)
    write_results(
        "spot_checks",
        "One figure of every family, before and after",
        {"Speeds": timed, "Figures without a clock": counted},
        command="python benchmarks/spot_checks.py --before CHECKOUT",
        notes=f"Before: commit {commit(before)}; after: commit {commit(ROOT)}. Every speed is a "
        "ratio of two functions timed in turn in one process; the two versions' processes take "
        "turns, a round each. Medians and quartiles over the rounds.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
