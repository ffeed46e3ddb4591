"""The main job in figures: MiniLM with its real weights, before and after.

Exactness and overhead of a pass-free rewrite, seconds of capture, speed and quality of int8 and of
Monarch healed for two minutes (`examples/heal_minilm.py`), FLOPs against
`torch.utils.flop_counter`.
"""

from __future__ import annotations

import copy
import time
import warnings
from typing import Any

import torch
from _harness import (
    arguments,
    command,
    interleaved,
    load_script,
    parse,
    timing_rows,
    write_results,
)
from _models import Batch, data, minilm, tokens, transformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rewriter import rewrite
from rewriter.capture import capture
from rewriter.cost import propagate
from rewriter.passes import Monarch, Quadratic, Quantize, TopK

RECIPES: dict[str, list[Any]] = {
    "original": [],
    "Quadratic": [Quadratic()],
    "TopK": [TopK(k=0.25)],
    "Quantize": [Quantize("int8-dynamic")],
    "Monarch": [Monarch(nblocks=4)],
    "Monarch, Quantize": [Monarch(nblocks=4), Quantize("int8-dynamic")],
}
TIMED = {
    "rewritten without passes": "original",
    "int8": "Quantize",
    "Monarch 4 blocks, projected": "Monarch",
    "the same, int8": "Monarch, Quantize",
}
"""Recipes whose speed and quality are measured too, by what they are called there."""


HEALING = {
    "projected from the weights": "projected",
    "fitted to calibration text": "fitted",
    "fitted, then healed for 2 minutes": "healed",
}
"""Stages of `heal`, and what its scores call them."""

healing = load_script("examples/heal_minilm.py")


def batch_of(rows: int, length: int) -> Batch:
    return tokens(rows, length, lowest=1000)


def exactness(model: nn.Module, same: nn.Module, batch: Batch) -> list[dict[str, Any]]:
    """A rewrite without passes: outputs in eval, gradients in train with dropout 0."""
    plain = rewrite(model, [], batch, lower=False)
    with torch.no_grad():
        wanted, *found = (list(m(**batch).values()) for m in (model, plain, same))
    differences = [
        max((a - b).abs().max().item() for a, b in zip(wanted, own, strict=True)) for own in found
    ]
    dry = copy.deepcopy(model)
    for module in dry.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = []
    for m in (dry, rewrite(dry, [], batch)):
        m.train()
        m(**batch).last_hidden_state.square().mean().backward()
        gradients.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    worst = max((gradients[0][n] - gradients[1][n]).abs().max().item() for n in gradients[0])
    return [
        {"what": "largest difference of an output, eval, not lowered", "figure": differences[0]},
        {"what": "the same, lowered", "figure": differences[1]},
        {"what": "largest difference of a gradient, train, dropout 0", "figure": worst},
        {"what": "parameters with a gradient", "figure": len(gradients[0])},
        {"what": "the same ones in the rewrite", "figure": len(gradients[1])},
    ]


def captures(quick: bool) -> list[dict[str, Any]]:
    """Seconds of capture in both modes, checks included."""
    rows = []
    small: Any = minilm(2 if quick else None)
    name = f"MiniLM ({len(small.encoder.layer)} layers, 384 wide)"
    models: dict[str, nn.Module] = {name: small}
    if not quick:
        torch.manual_seed(0)
        models["BERT-base (12 layers, 768 wide, random weights)"] = transformer("BertModel").eval()
    for name, model in models.items():
        times = []
        for _ in range(1 if quick else 3):
            start = time.perf_counter()
            found = capture(model, batch_of(8, 128))
            times.append(time.perf_counter() - start)
        rows.append(
            {
                "model": name,
                "captured": found.rung,
                "seconds, median": round(sorted(times)[len(times) // 2], 2),
                "seconds, worst": round(max(times), 2),
            }
        )
    return rows


def flops(made: dict[str, nn.Module], batch: Batch) -> list[dict[str, Any]]:
    """FLOPs of the ledger against torch's counter, original and rewritten."""
    rows = []
    for name, optimized in made.items():
        # of a copy: what is captured again runs that graph, without what it was lowered to
        found = capture(copy.deepcopy(optimized), batch)
        (region,) = found.regions
        cost = propagate(found.root, region.graphs[False], region.leaves or [], training=False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            optimized(**batch)
        rows.append(
            {
                "model": name,
                "FlopCounterMode": counter.get_total_flops(),
                "ledger, what torch counts": cost.counted_by_torch,
                "ledger, in all": cost.total.flops,
                "attention on CPU": cost.total.flops - cost.counted_by_torch,
            }
        )
    return rows


def main() -> None:
    args = parse(arguments(__doc__ or ""))
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, tokenizer = minilm(2 if args.quick else None), data.load_minilm()[1]
    batch = batch_of(2, 16) if args.quick else batch_of(8, 128)
    rounds = 3 if args.quick else 40
    recipes = list(RECIPES)[:: 5 if args.quick else 1]
    made = {name: rewrite(model, RECIPES[name], batch) for name in recipes}
    tables: dict[str, list[dict[str, Any]]] = {}
    tables["A rewrite without passes"] = exactness(model, made["original"], batch)
    tables["Capture"] = captures(args.quick)
    tables["FLOPs of one forward"] = flops(made, batch)
    timed = {name: made[recipe] for name, recipe in TIMED.items() if recipe in made}
    small = {"steps": 3, **healing.QUICK} if args.quick else {}
    healed, stages, _ = healing.heal(model, tokenizer, seconds=120, progress=False, **small)
    models = {"original": model, **timed, "Monarch 4 blocks, healed 2 minutes": healed}
    with torch.inference_mode():
        times = interleaved({n: lambda m=m: m(**batch) for n, m in models.items()}, rounds)
    shape = "×".join(str(s) for s in batch["input_ids"].shape)
    tables[f"Speed of a forward, {shape} tokens"] = timing_rows(times, "original")
    if not args.quick:
        tables["Quality"] = [
            {
                "model": name,
                "WordSim-353": round(data.wordsim(m, tokenizer), 4),
                "SimLex-999": round(data.simlex(m, tokenizer), 4),
            }
            for name, m in models.items()
        ]
        tables["Monarch 4 blocks, encoder only: WordSim-353 by stage"] = [
            {"stage": stage, "WordSim-353": round(stages[key], 4)} for stage, key in HEALING.items()
        ]
    write_results(
        "main_job",
        "The main job: MiniLM with its real weights",
        tables,
        command=command(),
        notes="Both sides of every speed ratio run interleaved in one process, under "
        "inference_mode. WordSim-353 and SimLex-999: Spearman correlation of cosine similarities "
        "with human judgement. Healed: all 36 linear layers of the encoder, fitted to sentences "
        "and words of a news corpus and a novel, then trained against the original for 2 minutes; "
        "it never sees the pairs of the test sets.",
        out=args.out,
        by_isa=True,
    )


if __name__ == "__main__":
    main()
