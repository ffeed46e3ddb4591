"""How long a rewrite takes: `rewrite` with no pass, over one static `torch.export.export`.

Both in one process, in turns, after one run of each (imports, tables that are built when first
needed), in CPU seconds of the process, so that a busy machine counts less. The static export is
that of the model in eval mode at the example's sizes. A rewrite copies the model, captures it in
eval and in train mode with open batch and sequence, checks both against the model, and prices an
inference and a training step.

Random weights from transformers' configs: 12 layers (T5: 12 and 12) of width 64, batch 2, sequence
16, so that what is timed is Python and not matrix products; Swin-T as its config has it, at 224².

    python benchmarks/rewrite_time.py
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from _harness import arguments, command, load_script, parse, write_results
from _models import minilm
from torch import Tensor, nn
from transformers.utils import logging

from rewriter import rewrite

VOCABULARY, WIDTH, HEADS, HIDDEN = 128, 64, 4, 128
ROUNDS = 3
Call = dict[str, Tensor]


def tokens(*names: str) -> Call:
    return {name: torch.randint(1, VOCABULARY, (2, 16)) for name in names}


def bert(layers: int) -> tuple[nn.Module, Call]:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers,
        num_attention_heads=HEADS, intermediate_size=HIDDEN,
    )  # fmt: skip
    return transformers.BertModel(config), tokens("input_ids")


def gpt2(layers: int) -> tuple[nn.Module, Call]:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=layers, n_head=HEADS, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), tokens("input_ids")


def gemma2(layers: int) -> tuple[nn.Module, Call]:
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers, use_cache=False,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=16, intermediate_size=HIDDEN,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config), tokens("input_ids")


def t5(layers: int) -> tuple[nn.Module, Call]:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=HIDDEN, num_layers=layers,
        num_heads=HEADS, use_cache=False, decoder_start_token_id=0,
    )  # fmt: skip
    inputs = tokens("input_ids", "decoder_input_ids")
    return transformers.T5ForConditionalGeneration(config), inputs


def vit(layers: int) -> tuple[nn.Module, Call]:
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS,
        intermediate_size=HIDDEN, image_size=32, patch_size=8,
    )  # fmt: skip
    return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def swin(layers: int) -> tuple[nn.Module, Call]:
    depths = [2, 2, 6, 2] if layers == 12 else [1, 1, layers, 1]
    model = transformers.SwinModel(transformers.SwinConfig(depths=depths))
    return model, {"pixel_values": torch.randn(2, 3, 224, 224)}


MODELS: dict[str, Callable[[int], tuple[nn.Module, Call]]] = {
    "BERT": bert, "GPT-2": gpt2, "Gemma-2": gemma2, "T5": t5, "ViT": vit, "Swin-T": swin,
}  # fmt: skip


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of one call, and its result."""
    gc.collect()
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def open_sizes(inputs: Call) -> dict[str, Any]:
    """Batch, and of tokens the sequence, may vary: what a rewrite captures."""
    auto = torch.export.Dim.AUTO
    dims = {n: (0,) if t.is_floating_point() else (0, 1) for n, t in inputs.items()}
    return {name: dict.fromkeys(own, auto) for name, own in dims.items()}


def row(name: str, layers: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = MODELS[name](layers)
    model.eval()

    def export() -> Any:
        return torch.export.export(model, (), inputs, strict=False)

    def rewritten() -> nn.Module:
        return rewrite(model, [], inputs)

    def open_export() -> Any:
        return torch.export.export(
            model, (), inputs, dynamic_shapes=open_sizes(inputs), strict=False
        )

    if rounds > 1:  # what runs for the first time also imports
        export(), rewritten()
    exports, opens, rewrites = [], [], []
    for _ in range(rounds):
        exports.append(seconds(export)[0])
        opens.append(seconds(open_export)[0])
        taken, result = seconds(rewritten)
        rewrites.append(taken)
    with torch.no_grad():
        difference = (result(**inputs)[0] - model(**inputs)[0]).abs().max()
    info = result.report.capture
    static, whole = statistics.median(exports), statistics.median(rewrites)
    return {
        "model": name,
        "layers": layers,
        "captured": {"export": "whole", "parts": "by parts"}[info.rung],
        "export s": round(static, 2),
        "open export s": round(statistics.median(opens), 2),
        "rewrite s": round(whole, 2),
        "times": round(whole / static, 2),
        "largest difference": float(difference),
    }


def real(rounds: int, layers: int | None) -> dict[str, Any]:
    """The real MiniLM, or its first layers, in seconds of the clock."""
    model, tokenizer = minilm(layers), load_script("examples/_data.py").load_minilm()[1]
    batch = dict(tokenizer(["a sentence", "another one"], padding=True, return_tensors="pt"))
    if rounds > 1:
        rewrite(model, [], batch)
    times = []
    for _ in range(rounds):
        gc.collect()
        start = time.perf_counter()
        rewrite(model, [], batch)
        times.append(time.perf_counter() - start)
    return {
        "model": "all-MiniLM-L6-v2",
        "fastest s": min(times),
        "median s": statistics.median(times),
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parse(parser)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    layers, rounds = (1, 1) if args.quick else (12, args.rounds)
    rows = []
    for name in args.only:
        rows.append(row(name, layers, rounds))
        print(rows[-1], flush=True)
    clock = real(rounds, layers if args.quick else None)
    mean = statistics.geometric_mean(r["times"] for r in rows)
    summary = [
        {"what": "geometric mean of times", "figure": round(mean, 2)},
        {"what": "largest of times", "figure": max(r["times"] for r in rows)},
    ]
    write_results(
        "rewrite_time",
        "How long a rewrite takes",
        {"Summary": summary, "CPU seconds": rows, "Seconds": [clock]},
        command=command(),
        notes="`rewrite` with no pass over one static `torch.export.export` of the same model, in "
        "CPU seconds of one process, each the median of "
        f"{rounds} runs in turns after one run of each. Random weights, width {WIDTH}, batch 2, "
        "sequence 16; Swin-T at its config's width. MiniLM with its real weights, by the clock. "
        "The open export, one trace with the sizes open that a rewrite leaves open, is the least "
        "that one costs. That trace serves both modes, but for Swin-T: its stochastic depth makes "
        "other calls in train mode, so that it takes two. Aimed at: a geometric mean of 4, and "
        "none above 6.",
        out=args.out,
        by_isa=True,
    )


if __name__ == "__main__":
    main()
