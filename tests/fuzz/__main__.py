"""`python -m fuzz graphs|saves|kills|turns|threads N [SEED]`: long runs; what fails is written as
its number."""

from __future__ import annotations

import collections
import contextlib
import pathlib
import shutil
import sys
import tempfile
import time

from fuzz import graphs, saves, stress, threads


def damaged(count: int, seed: int, folder: pathlib.Path) -> int:
    """Damaged saves from this number on; how many went wrong."""
    known = saves.saves(folder / "known")
    said: collections.Counter[str] = collections.Counter()
    wrong, slowest, largest = 0, 0.0, 0
    for number in range(seed, seed + count):
        found = saves.run(number, known, folder)
        said[found.said.partition(":")[0] or "failed"] += 1
        slowest, largest = max(slowest, found.seconds), max(largest, found.grown)
        if found.wrong:
            wrong += 1
            print(f"saves {found.seed} ({found.base}, {found.changes}): {found.wrong}", flush=True)
        for left in (folder / str(number), folder / f"{number} again"):
            shutil.rmtree(left, ignore_errors=True)
        if number % 500 == 0:
            print(f"# {number}: {dict(said)}, {wrong} wrong", flush=True)
    print(
        f"{count:,} damaged saves from {seed}: {said['loaded']:,} loaded, {said['refused']:,} "
        f"refused, {wrong} wrong; the slowest {slowest:.2f} s of the processor, the largest "
        f"{largest >> 20} MiB more memory than before"
    )
    return wrong


def rewritten(count: int, seed: int, folder: pathlib.Path) -> int:
    """Random models under random recipes; how many went wrong. An interrupt ends it early."""
    refused: collections.Counter[str] = collections.Counter()
    wrong, checks, cases, done = 0, 0, 0, 0
    with contextlib.suppress(KeyboardInterrupt):
        for number in range(seed, seed + count):
            found = graphs.check(number)
            done += 1
            checks += found.checks
            cases += found.runs
            refused.update(t.partition(": ")[0] + ": " + graphs.kind(t) for t in found.refused)
            if found.wrong:
                wrong += 1
                print(f"graphs {number}: {'; '.join(found.wrong)}", flush=True)
            if number % 100 == 99:
                print(f"# {number + 1}: {wrong} wrong", flush=True)
    for text, times in refused.most_common():
        print(f"refused {times}: {text}")
    print(
        f"{done:,} models and recipes from {seed}: {cases:,} ran, {checks:,} comparisons, "
        f"{refused.total():,} refusals, {wrong} wrong"
    )
    return wrong


def main() -> int:
    kinds = {"graphs": rewritten, "saves": damaged, "kills": stress.kills, "turns": stress.turns}
    kinds["threads"] = threads.threads
    if len(sys.argv) < 3 or sys.argv[1] not in kinds:
        print(f"python -m fuzz {'|'.join(kinds)} N [SEED]", file=sys.stderr)
        return 2
    count, seed = int(sys.argv[2]), int((sys.argv[3:] or ["0"])[0])
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        wrong = kinds[sys.argv[1]](count, seed, pathlib.Path(folder))
    print(f"{time.monotonic() - start:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
