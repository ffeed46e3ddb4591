"""The main job on a real model: all-MiniLM-L6-v2 with its real weights, smaller and faster.

Quantizes it to int8, prints the ledger and writes it as a page with plots; then makes every linear
layer of its encoder Monarch, fitted to calibration text and healed against the original for two
minutes; measures speed and quality (WordSim-353) of both, and what Monarch costs without healing;
saves, loads, and checks that nothing changed.

Run it with `make demo` or `python examples/minilm.py`; `--quick` heals little, in seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _data import load_minilm, wordsim
from heal_minilm import QUICK, heal
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rewriter import load, rewrite
from rewriter.passes import Quantize

console = Console(width=None if sys.stdout.isatty() else 100)


def interleaved(models: dict[str, nn.Module], batch: dict[str, Tensor]) -> dict[str, float]:
    """Median seconds of a forward of each model, taken in turns after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for round_ in range(13):
            for name, model in models.items():
                start = time.perf_counter()
                model(**batch)
                if round_ >= 3:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def step(title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}")


def timed(what: str, call: Callable[[], nn.Module]) -> nn.Module:
    start = time.perf_counter()
    result = call()
    console.print(f"{what} took {time.perf_counter() - start:.1f} s")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", type=Path, default=Path("minilm-report.html"), metavar="PATH")
    parser.add_argument("--minutes", type=float, default=2.0, help="of healing")
    parser.add_argument("--quick", action="store_true", help="heal one layer, for seconds")
    args = parser.parse_args()
    page: Path = args.report
    torch.manual_seed(0)
    model, tokenizer = load_minilm()
    text = "the quick brown fox jumps over the lazy dog and runs into the forest " * 12
    batch = dict(
        tokenizer([text] * 8, max_length=128, truncation=True, return_tensors="pt")
    )  # 8 texts of 128 tokens

    step("1. int8: every linear layer quantized, nothing trained")
    int8 = timed(
        "the rewrite, with a calibration of this machine the first time,",
        lambda: rewrite(model, [Quantize("int8-dynamic")], batch, device="this", measure=True),
    )
    console.print(int8.report)
    int8.report.save(page)
    console.print(f"the same with plots, for a browser: {page}")

    step(f"2. Monarch: fitted to text, then healed against the original for {args.minutes:g} min")
    start = time.perf_counter()
    short: dict[str, Any] = {"steps": 3, **QUICK} if args.quick else {}
    monarch, healing, _ = heal(model, tokenizer, nblocks=4, seconds=60 * args.minutes, **short)
    console.print(f"fitting, healing and scoring took {time.perf_counter() - start:.0f} s")
    console.print(
        f"{len(monarch.report.replaced)} linear layers of the encoder are now two block-diagonal "
        "factors; print(monarch.report) lists each with its error"
    )

    step("3. speed and quality, measured here")
    models: dict[str, Any] = {"original": model, "int8": int8, "Monarch, healed": monarch}
    seconds = interleaved(models, batch)
    scores = {"original": wordsim(model, tokenizer), "int8": wordsim(int8, tokenizer)}
    scores["Monarch, healed"] = healing["healed"]
    # of the same batch, so that the multiply-adds compare
    costs = {"original": int8.report.before, "int8": int8.report.after}
    costs["Monarch, healed"] = rewrite(monarch, [], batch).report.after
    table = Table("model", "WordSim-353", "weights", "multiply-adds", "ms per batch", "speed")
    for name in models:
        table.add_row(
            name,
            f"{scores[name]:.4f}",
            f"{costs[name].param_bytes / 1e6:.1f} MB",
            f"{costs[name].macs / 1e9:.2f} G",
            f"{seconds[name] * 1e3:.1f}",
            f"{seconds['original'] / seconds[name]:.2f}×",
        )
    console.print(table)
    console.print(
        f"without healing, Monarch scores {healing['fitted']:.4f} where it is fitted to text "
        f"(calibration=), and {healing['projected']:.4f} where it is projected from the weights "
        "alone"
    )

    step("4. saved, loaded, compared")
    for name in ("int8", "Monarch, healed"):
        with tempfile.TemporaryDirectory() as directory:
            models[name].save(directory)
            loaded = load(directory, model)
        with torch.inference_mode():
            outputs = [m(**batch).last_hidden_state for m in (loaded, models[name])]
        if not torch.equal(*outputs):
            raise SystemExit(f"the loaded model ({name}) differs from the saved one")
    console.print("the loaded models' outputs equal the saved ones', bit for bit")

    step("In short")
    rewritten, total = int8.report.coverage()
    console.print(
        f"int8 rewrote {rewritten} of {total} linear layers: "
        f"{costs['original'].param_bytes / costs['int8'].param_bytes:.1f}× smaller in memory, "
        f"{seconds['original'] / seconds['int8']:.1f}× the speed on this machine, and the word "
        f"similarity score went from {scores['original']:.3f} to {scores['int8']:.3f}.\n"
        f"Monarch, healed for {args.minutes:g} minutes: "
        f"{seconds['original'] / seconds['Monarch, healed']:.1f}× the speed, and "
        f"{scores['Monarch, healed']:.3f}; longer healing brings it closer."
    )


if __name__ == "__main__":
    main()
