"""Heals MiniLM after every linear layer of its encoder has become Monarch.

    python examples/heal_minilm.py                 # 12 minutes on 2 cores
    python examples/heal_minilm.py --minutes 2
    python examples/heal_minilm.py --quick         # seconds

The layers start at the projection fitted to activations, then `rewriter.recover` lets the model
imitate the original: hidden states, and the embeddings' similarities within a batch. The text is
the Lee background corpus (300 news articles, of gensim), by sentences and by single words; nothing
of WordSim-353 or SimLex-999 is shown to the model.
"""

from __future__ import annotations

import argparse
import random
import re
import time
import warnings
from typing import Any

import torch.nn.functional as F
from _data import SIMLEX_DENSE, WORDSIM_DENSE, gensim_file, load_minilm, news, simlex, wordsim
from torch import Tensor, nn

from rewriter import Recovery, recover, rewrite
from rewriter.passes import Monarch

Batch = dict[str, Tensor]
QUICK: dict[str, Any] = {"limit": 32, "where": "encoder.layer.0.attention.*"}
"""What makes `heal` short: few texts, and the attention of one layer."""


def texts() -> tuple[list[str], list[str]]:
    """(sentences, single words), of news and of a novel."""
    novel = gensim_file("crime-and-punishment.txt").read_text("utf-8", "ignore")
    pages = [*news(), re.sub(r"\s+", " ", novel)]
    sentences = [s.strip() for p in pages for s in re.split(r"(?<=[.!?])\s+", p)]
    bare = (w.strip(".,;:!?\"'()").lower() for p in pages for w in p.split())
    words = sorted({w for w in bare if w.isalpha() and len(w) > 2})
    return [s for s in sentences if len(s.split()) > 3], words


def batches(tokenizer: Any, given: list[str], size: int, shuffle: random.Random) -> list[Batch]:
    """Texts of like length together: little padding."""
    ordered = sorted(given, key=len)
    chunks = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    shuffle.shuffle(chunks)
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 64}
    return [dict(tokenizer(c, return_tensors="pt", **options)) for c in chunks]


def embedded(output: Any, batch: Batch) -> Tensor:
    """Mean over the tokens, as the model is used."""
    mask = batch["attention_mask"][..., None].float()
    return F.normalize((output["last_hidden_state"] * mask).sum(1) / mask.sum(1), dim=-1)


def distance(ours: Any, theirs: Any, batch: Batch) -> Tensor:
    """1 − cosine to the teacher's embedding, and the similarities of all pairs in the batch."""
    a, b = embedded(ours, batch), embedded(theirs, batch).detach()
    pairs = (a @ a.t() - b @ b.t()).square().mean()
    return (1 - (a * b).sum(-1)).mean() + 10 * pairs


def heal(
    model: nn.Module,
    tokenizer: Any,
    nblocks: int = 4,
    seconds: float = 700.0,
    *,
    steps: int = 10**5,
    every: int = 100,
    progress: bool = True,
    limit: int | None = None,
    where: str = "encoder.*",
) -> tuple[nn.Module, dict[str, float], Recovery]:
    """(healed model, scores by stage, the curve)."""
    shuffle = random.Random(0)
    sentences, words = texts()
    shuffle.shuffle(sentences)
    shuffle.shuffle(words)
    sentences, words = sentences[: limit or 12000], words[: limit or 12000]
    calibration = batches(tokenizer, sentences[:300] + words[:4000], 64, shuffle)
    example = dict(tokenizer(["A text.", "Another one."], return_tensors="pt", padding=True))
    passes = [Monarch(nblocks, where=where)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = rewrite(model, passes, example)
        made = rewrite(model, passes, example, calibration=calibration)
    scores = {"projected": wordsim(plain, tokenizer), "fitted": wordsim(made, tokenizer)}
    mixed = batches(tokenizer, words, 96, shuffle) + batches(tokenizer, sentences, 32, shuffle)
    shuffle.shuffle(mixed)
    curve = recover(
        made,
        model,
        mixed,
        steps=steps,
        layer_steps=0,  # the fit to activations has done that, in closed form
        lr=4e-4,
        loss=distance,
        every=min(steps, every),
        patience=10,
        seconds=seconds,
        progress=progress,
    )
    made.eval()
    scores["healed"], scores["healed, SimLex-999"] = (
        wordsim(made, tokenizer),
        simlex(made, tokenizer),
    )
    return made, scores, curve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--nblocks", type=int, default=4)
    args = parser.parse_args()
    model, tokenizer = load_minilm()
    model.eval()
    start = time.process_time()
    small: dict[str, Any] = {"steps": 3, **QUICK} if args.quick else {}
    healed, scores, curve = heal(model, tokenizer, args.nblocks, 60 * args.minutes, **small)
    for row in curve.curve:
        print(f"  step {row['step']:5d}  {row['seconds']:6.0f} s  loss {row['held-out loss']:.4f}")
    print(f"stopped: {curve.stopped}; {(time.process_time() - start) / 60:.1f} CPU minutes in all")
    print(
        f"weights: {sum(p.numel() for p in healed.encoder.parameters()) / 1e6:.2f} M of "
        f"{sum(p.numel() for p in model.encoder.parameters()) / 1e6:.2f} M in the encoder"
    )
    print(
        f"WordSim-353: dense {WORDSIM_DENSE}, projected {scores['projected']:.4f}, fitted to "
        f"activations {scores['fitted']:.4f}, healed {scores['healed']:.4f}"
    )
    print(f"SimLex-999: dense {SIMLEX_DENSE}, healed {scores['healed, SimLex-999']:.4f}")


if __name__ == "__main__":
    main()
