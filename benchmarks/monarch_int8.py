"""Monarch layers in int8 against int8 alone, Monarch alone and fp32: layers, and whole models.

All sides run interleaved in one process; a figure is the median over rounds of the ratio of their
times. A layer is what a lowered model runs in its place: bound to its weights, past the dispatcher.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from _harness import (
    arguments,
    command,
    interleaved,
    keep_the_heap,
    parse,
    speedup,
    write_results,
)
from _models import minilm, tokens, transformer
from torch import Tensor, nn

from rewriter import rewrite
from rewriter.kernels import int8_cpu, int8_linear, int8_monarch
from rewriter.passes import Monarch, MonarchLinear, Quantize, QuantizedLinear, QuantizedMonarch

BLOCKS = 4
SIZES = ((768, 768), (768, 3072), (3072, 768), (1024, 4096), (384, 384), (384, 1536), (1536, 384))
ROWS = (1024, 128, 16, 4, 1)
BATCHES = ((8, 128), (1, 16))
WIDE = 768
"""From which width on the combination is to be 1.25 times as fast as int8 alone."""

Timed = dict[str, Callable[[], object]]


def sides(width: int, out: int, x: Tensor) -> Timed:
    """The four layers of one size."""
    dense, monarch = nn.Linear(width, out), MonarchLinear(width, out, BLOCKS)
    plain = QuantizedLinear.from_weight(dense.weight, dense.bias)
    both = QuantizedMonarch.from_monarch(monarch)
    one = int8_linear.bound(plain.qweight, plain.scale, plain.bias, "per_token")
    factors = both.qright, both.right_scale, both.qleft, both.left_scale
    two = int8_monarch.bound(*factors, both.bias, width, out, "per_token", False)
    return {
        "fp32": lambda: F.linear(x, dense.weight, dense.bias),
        "Monarch": lambda: monarch(x),
        "int8": lambda: one(x),
        "Monarch + int8": lambda: two(x),
    }


def layers(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per size and number of rows."""
    for width, out in SIZES[-1:] if quick else SIZES:
        for rows in ROWS[-2:] if quick else ROWS:
            torch.manual_seed(0)
            runs = sides(width, out, torch.randn(rows, width))
            with torch.inference_mode():
                times = interleaved(runs, _rounds(rows, width, out), warmup=5)
            yield {"layer": f"{width} → {out}", "rows": rows, **figures(times, 1e6, "µs")}


def _rounds(rows: int, width: int, out: int) -> int:
    """So many that a case takes about half a second."""
    return max(9, min(300, round(0.15 / (2 * rows * width * out / 100e9))))


def figures(times: dict[str, list[float]], unit: float, name: str) -> dict[str, Any]:
    return {
        **{f"{side}, {name}": statistics.median(v) * unit for side, v in times.items()},
        **{f"{side} × over fp32": speedup(times, side, "fp32")[1] for side in list(times)[1:]},
        "Monarch + int8 × over int8": speedup(times, "Monarch + int8", "int8")[1],
    }


def base(quick: bool) -> nn.Module:
    """BERT-base's sizes with random weights."""
    sizes = {"num_hidden_layers": 1, "vocab_size": 1000} if quick else {}
    return transformer("BertModel", **sizes)


def models(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per model and batch. "measured" leaves the layers that are slower in the end."""
    named = {"BERT-base": base} if quick else {"BERT-base": base, "MiniLM": lambda _: minilm()}
    monarch, int8 = Monarch(BLOCKS), Quantize("int8-dynamic")
    for name, build in named.items():
        for rows, length in BATCHES[1:] if quick else BATCHES:
            torch.manual_seed(0)
            model, batch = build(quick).eval(), tokens(rows, length, 1000)
            found: dict[str, nn.Module] = {"fp32": model}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for side, passes in (
                    ("Monarch", [monarch]),
                    ("int8", [int8]),
                    ("Monarch + int8", [monarch, int8]),
                ):
                    found[side] = rewrite(model, passes, batch)
                both, judged = [monarch, int8], {"objective": "latency", "measure": True}
                found["measured"] = rewrite(model, both, batch, **judged)
            runs: Timed = {side: _call(m, batch) for side, m in found.items()}
            rounds = 3 if quick else max(12, min(150, 20000 // (rows * length)))
            with torch.inference_mode():
                times = interleaved(runs, rounds)
            kept = sum(isinstance(m, QuantizedMonarch) for m in found["measured"].modules())
            yield {
                "model": name,
                "batch": f"{rows} × {length}",
                **figures(times, 1e3, "ms"),
                "measured × over int8": speedup(times, "measured", "int8")[1],
                "Monarch layers kept": kept,
            }


def _call(model: Any, batch: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: model(**batch)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The least and the median ratio over int8 alone, of wide layers and of the others."""
    found = []
    for name, least, wanted in (("at least 768 wide", WIDE, "≥ 1.25"), ("narrower", 0, "-")):
        most = WIDE if not least else 1 << 30
        own = [r for r in rows if least <= min(map(int, r["layer"].split(" → "))) < most]
        ratios = [r["Monarch + int8 × over int8"] for r in own]
        if ratios:
            found.append({
                "layers": f"{name} ({len(own)} cases)",
                "least × over int8": min(ratios),
                "median × over int8": statistics.median(ratios),
                "wanted": wanted,
            })  # fmt: skip
    return found


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", choices=("layers", "models"), help="one of the two parts")
    args = parse(parser)
    if not args.quick:
        keep_the_heap()
    tables: dict[str, list[dict[str, Any]]] = {}
    if args.only != "models":
        rows = list(layers(args.quick))
        tables |= {"Over int8 alone": summary(rows), "Layers": rows}
    if args.only != "layers":
        tables["Models"] = list(models(args.quick))
    refused = int8_cpu.refusal()
    kernels = f"multiply by {int8_cpu.isa()}" if refused is None else f"are not used: {refused}"
    write_results(
        "monarch_int8",
        f"Monarch (N = {BLOCKS}) in int8",
        tables,
        command=command(),
        notes="Medians under inference_mode, all sides in turns. Layers are those that a lowered "
        'model runs; models are rewritten and lowered, BERT-base with random weights. "measured" '
        f'is the same recipe with objective="latency". The compiled kernels {kernels}.',
        out=args.out,
        by_isa=True,
    )


if __name__ == "__main__":
    main()
