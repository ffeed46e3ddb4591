"""MiniLM with few active neurons: WordSim-353 as rewritten, and after a short recovery.

    python benchmarks/activation_recovery.py
    python benchmarks/activation_recovery.py --steps 100

`recover` imitates the original on sentences and words of news and of a novel, as
`examples/heal_minilm.py` does; nothing of the test sets is shown to a model. `--quick` takes a few
texts and three steps.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch
from _harness import arguments, command, load_script, parse, write_results
from _models import data
from torch import nn

from rewriter import Pass, recover, rewrite
from rewriter.passes import Experts, Reluify, TopK

example = load_script("examples/heal_minilm.py")
RECIPES: dict[str, tuple[Pass, ...]] = {
    "TopK(0.25)": (TopK(0.25),),
    "TopK(0.25, 'wina')": (TopK(0.25, score="wina"),),
    "TopK(0.1)": (TopK(0.1),),
    "Experts(16, 0.25)": (Experts(16, 0.25),),
    "Experts(64, 0.25)": (Experts(64, 0.25),),
    "Experts(64, 0.5)": (Experts(64, 0.5),),
    "ReLU": (Reluify(),),
    "FATReLU, 95 % zeros": (Reluify("fatrelu", sparsity=0.95),),
}


def zeros(model: nn.Module, batches: list[Any]) -> float:
    """The share of the inputs of second MLP layers that count as zeros."""
    found: list[float] = []

    def look(layer: nn.Module, inputs: Any) -> None:
        x = inputs[0]
        k = getattr(layer, "k", None)
        found.append(float((x == 0).float().mean()) if k is None else 1 - k / x.shape[-1])

    downs = [m.output.dense for m in model.encoder.layer]
    handles = [m.register_forward_pre_hook(look) for m in downs]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return sum(found) / len(found)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=300, help="of training, for each row")
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    args = parse(parser)
    model, tokenizer = data.load_minilm()
    model.eval()
    shuffle = random.Random(0)
    sentences, words = example.texts()
    shuffle.shuffle(sentences)
    shuffle.shuffle(words)
    limit = 64 if args.quick else 12000
    sentences, words = sentences[:limit], words[:limit]
    calibration = example.batches(tokenizer, sentences[:300] + words[:1000], 64, shuffle)
    mixed = example.batches(tokenizer, words, 96, shuffle)
    mixed += example.batches(tokenizer, sentences, 32, shuffle)
    shuffle.shuffle(mixed)
    rows: list[dict[str, Any]] = []
    for name in args.only[:1] if args.quick else args.only:
        passes = RECIPES[name]
        asked = any(p.samples for p in passes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = rewrite(
                model, list(passes), calibration[0], calibration=calibration if asked else None
            )
        row: dict[str, Any] = {"what": name, "zeros before": zeros(made, mixed[-3:])}
        row["WordSim-353"] = data.wordsim(made, tokenizer)
        run = recover(
            made, model, mixed, steps=3 if args.quick else args.steps, layer_steps=0, lr=1e-4,
            loss=example.distance, every=3 if args.quick else 50, patience=10, progress=False,
        )  # fmt: skip
        made.eval()
        row["recovered"] = data.wordsim(made, tokenizer)
        row["SimLex-999 recovered"] = data.simlex(made, tokenizer)
        row["zeros after"] = zeros(made, mixed[-3:])
        row["steps"] = run.curve[-1]["step"]
        rows.append(row)
        print(row, flush=True)
    write_results(
        "activation_recovery",
        "MiniLM with few active neurons",
        {"Quality": rows},
        command=command(),
        notes=f"All six MLPs, {args.steps} steps of 32 sentences or 96 words. Dense: WordSim-353 "
        f"{data.WORDSIM_DENSE}, SimLex-999 {data.SIMLEX_DENSE}. Zeros: the share of what enters "
        "second layers of MLPs, in the last batches of the training text, before and after the "
        "recovery.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
