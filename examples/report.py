"""The report on a real model: what int8 does to all-MiniLM-L6-v2, predicted and measured here.

Calibrates this machine (up to 20 seconds, the first time), rewrites the model, prints the ledger
and writes it as one HTML page with plots, as JSON and as Markdown.

Run it with `python examples/report.py [folder]`; open `report.html` in any browser.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from _data import load_minilm, news
from rich.console import Console

from rewriter import rewrite
from rewriter.passes import Quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("report-of-minilm"))
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model, tokenizer = load_minilm()
    batch = dict(
        tokenizer(news()[:8], max_length=128, truncation=True, padding=True, return_tensors="pt")
    )  # 8 texts of 128 tokens
    optimized = rewrite(model, [Quantize("int8-dynamic")], batch, device="this", measure=True)

    report = optimized.report
    Console(width=None if sys.stdout.isatty() else 100).print(report)
    for suffix in ("html", "json", "md"):
        report.save(folder / f"report.{suffix}")
    print(f"written: {', '.join(str(p) for p in sorted(folder.iterdir()))}")

    # the same ledger at other sizes, from formulas: no further run of the model
    long = report.at(batch=1, sequence=512)
    before, after = long.before, long.after
    print(
        f"one text of 512 tokens: {before.macs / 1e9:.2f} G multiply-adds, peak memory "
        f"{before.peak_bytes / 1e6:.0f} MB before and {after.peak_bytes / 1e6:.0f} MB after"
    )


if __name__ == "__main__":
    main()
