"""The main job on a real model: all-MiniLM-L6-v2 with its real weights, smaller and faster.

Captures the model, quantizes it to int8, prints the ledger and writes it as a page with plots,
measures speed and quality (WordSim-353) before and after; then the same with Monarch layers in
front, whose quality without healing is what it is; saves, loads, and checks that nothing changed.

Run it with `make demo` or `python examples/minilm.py`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _data import load_minilm, wordsim
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rewriter import load, rewrite
from rewriter.passes import Monarch, Quantize

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
    page: Path = parser.parse_args().report
    torch.manual_seed(0)
    model, tokenizer = load_minilm()
    text = "the quick brown fox jumps over the lazy dog and runs into the forest " * 12
    batch = dict(
        tokenizer([text] * 8, max_length=128, truncation=True, return_tensors="pt")
    )  # 8 texts of 128 tokens

    step("1. int8: every linear layer quantized")
    int8 = timed(
        "the rewrite, with a calibration of this machine the first time,",
        lambda: rewrite(model, [Quantize("int8-dynamic")], batch, device="this", measure=True),
    )
    console.print(int8.report)
    int8.report.save(page)
    console.print(f"the same with plots, for a browser: {page}")

    step("2. Monarch, then int8: fewer weights, and each in a byte")
    passes = [Monarch(nblocks=4), Quantize("int8-dynamic")]
    both = timed("the rewrite", lambda: rewrite(model, passes, batch))
    console.print(both.report)

    step("3. speed and quality, measured here")
    models = {"original": model, "int8": int8, "Monarch + int8": both}
    seconds = interleaved(models, batch)
    scores = {name: wordsim(m, tokenizer) for name, m in models.items()}
    costs = {"original": int8.report.before, "int8": int8.report.after}
    costs["Monarch + int8"] = both.report.after
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

    step("4. saved, loaded, compared")
    with tempfile.TemporaryDirectory() as directory:
        int8.save(directory)
        loaded = load(directory, model)
    with torch.inference_mode():
        same = torch.equal(loaded(**batch).last_hidden_state, int8(**batch).last_hidden_state)
    if not same:
        raise SystemExit("the loaded model differs from the saved one")
    console.print("the loaded model's outputs equal the saved one's, bit for bit")

    step("In short")
    rewritten, total = int8.report.coverage()
    console.print(
        f"int8 rewrote {rewritten} of {total} linear layers: "
        f"{costs['original'].param_bytes / costs['int8'].param_bytes:.1f}× smaller in memory, "
        f"{seconds['original'] / seconds['int8']:.1f}× the speed on this machine, and the word "
        f"similarity score went from {scores['original']:.3f} to {scores['int8']:.3f}.\n"
        f"Monarch on top costs quality ({scores['Monarch + int8']:.3f}): its weights approximate "
        "the trained ones, and nothing was retrained. The ledger above shows the error of every "
        "layer; train the result before you use it."
    )


if __name__ == "__main__":
    main()
