"""Peak memory as the ledger predicts it, against what really is alive.

Each model is rewritten and run: an inference, and a training step (forward, backward, update of
the optimizer) after a first one, so that the optimizer's state exists. Three witnesses watch it:

- `tracker`: a dispatch mode that follows every storage an op makes until it is freed.
- `MemTracker`: `torch.distributed._tools.mem_tracker`, PyTorch's own, which rounds every storage up
  to 512 bytes.
- `allocator`: the high-water mark of PyTorch's CPU allocator (`torch.profiler`), which also sees
  the workspace inside kernels that no op returns.

Where no pass runs, the user's own Python forward is watched by the tracker too: it may hold values
in local variables for longer than the captured graph does.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import _models
import torch
from _harness import arguments, command, parse, write_results
from _models import data, resnet, transformer
from _tracker import Tracker, allocator_peak
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._pytree import tree_leaves

from rewriter import rewrite
from rewriter.base import Pass
from rewriter.passes import Monarch, Quadratic, Quantize

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-5),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-5, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-5),
}
TARGET = 2.0
"""Percent that a prediction may be off the tracker."""

Inputs = dict[str, Tensor] | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One model, its example inputs at a real size, and the passes that rewrite it."""

    name: str
    make: Callable[[bool], tuple[nn.Module, Inputs]]
    passes: tuple[Pass, ...] = ()


# ---- models ----------------------------------------------------------------------------------


def minilm(quick: bool) -> tuple[nn.Module, Inputs]:
    model, tokenizer = data.load_minilm()
    rows, length = (2, 32) if quick else (8, 128)
    texts = ["The quick brown fox jumps over the lazy dog, again and again."] * rows
    batch = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")
    return model, dict(batch)


def made(
    build: Callable[[], nn.Module], feed: Callable[[bool], Inputs]
) -> Callable[[bool], tuple[nn.Module, Inputs]]:
    return lambda quick: (build().eval(), feed(quick))


def ids(rows: int, length: int, *, labels: bool = False) -> Callable[[bool], Inputs]:
    def feed(quick: bool) -> Inputs:
        shape = (2, 32) if quick else (rows, length)
        tokens = torch.randint(3, 1000, shape)
        return {"input_ids": tokens} | ({"labels": tokens.clone()} if labels else {})

    return feed


def pixels(rows: int) -> Callable[[bool], Inputs]:
    return lambda quick: {"pixel_values": torch.randn(1 if quick else rows, 3, 224, 224)}


def mlp(quick: bool) -> tuple[nn.Module, Inputs]:
    return _models.mlp(784, 1024, 1024, 10).eval(), (torch.randn(32 if quick else 1024, 784),)


class Tagger(nn.Module):
    """Token ids → two LSTM layers → a class per token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10_000, 256)
        self.rnn = nn.LSTM(256, 512, num_layers=2, batch_first=True)
        self.head = nn.Linear(512, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(self.embed(tokens))[0])
        return logits


def lstm(quick: bool) -> tuple[nn.Module, Inputs]:
    return Tagger().eval(), (torch.randint(0, 10_000, (2, 16) if quick else (16, 128)),)


CASES = (
    Case("MiniLM (real weights), 8 × 128", minilm),
    Case("MiniLM, Monarch(nblocks=4), 8 × 128", minilm, (Monarch(nblocks=4),)),
    Case("MiniLM, int8-dynamic, 8 × 128", minilm, (Quantize("int8-dynamic"),)),
    Case("quadratic MLP 784-1024-1024-10, 1024 rows", mlp, (Quadratic(),)),
    Case(
        "GPT-2, 4 layers, 768 wide, with loss, 4 × 256",
        made(partial(transformer, "GPT2LMHeadModel", n_layer=4), ids(4, 256, labels=True)),
    ),
    Case("ViT-B/16, 8 × 224²", made(partial(transformer, "ViTModel"), pixels(8))),
    Case("ResNet-50, 8 × 224²", made(resnet, pixels(8))),
    Case(
        "Mixtral-like, 4 layers, 8 experts, 4 × 128",
        made(
            partial(
                transformer,
                "MixtralForCausalLM",
                vocab_size=8000,
                hidden_size=512,
                intermediate_size=1024,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=4,
                num_local_experts=8,
            ),
            ids(4, 128),
        ),
    ),
    Case("LSTM, 2 × 512, 16 × 128", lstm),
    Case(
        "EfficientNet, 8 × 224²",
        made(partial(transformer, "EfficientNetForImageClassification", image_size=224), pixels(8)),
    ),
)
QUICK = (CASES[3], CASES[8])


# ---- witnesses -------------------------------------------------------------------------------


def stored(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({(s := t.untyped_storage())._cdata: s.nbytes() for t in tensors}.values())


def run(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def results(out: Any) -> list[Tensor]:
    """Where the backward starts: the loss if there is one, else all differentiable results."""
    if isinstance(out, Tensor):
        out = [out]
    values = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.grad_fn is not None]
    return [t for t in values if not t.dim()][:1] or list({id(t): t for t in values}.values())


def inference(model: nn.Module, inputs: Inputs) -> None:
    with torch.no_grad():
        run(model, inputs)


def step(model: nn.Module, inputs: Inputs, optimizer: torch.optim.Optimizer) -> None:
    """One training step; afterwards the gradients are gone."""
    out = run(model, inputs)
    ends = results(out)
    torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
    optimizer.step()
    optimizer.zero_grad()


def tracked(work: Callable[[], None], held: Sequence[Tensor]) -> int:
    with Tracker(held) as tracker:
        work()
    return tracker.peak


def by_mem_tracker(
    work: Callable[[], None], model: nn.Module, inputs: Inputs, *optimizer: Any
) -> int:
    tracker = MemTracker()
    tracker.track_external(model, *optimizer, *tree_leaves(inputs))
    with tracker:
        work()
    snapshot = tracker.get_tracker_snapshot("peak")
    return sum(figures["Total"] for figures in snapshot.values())


# ---- tables ----------------------------------------------------------------------------------


def megabytes(size: int) -> float:
    return round(size / 1e6, 3)


def row(
    name: str, what: str, predicted: int, real: int, own: int | None, torchs: int, heap: int
) -> dict[str, Any]:
    return {
        "model": name,
        "what": what,
        "predicted MB": megabytes(predicted),
        "tracker MB": megabytes(real),
        "off %": round(100 * (predicted - real) / real, 3),
        "own forward MB": "–" if own is None else megabytes(own),
        "MemTracker MB": megabytes(torchs),
        "allocator MB": megabytes(heap),
    }


def own_forward(case: Case, quick: bool) -> dict[str, int]:
    """The tracker's peaks of the model as the user wrote it."""
    torch.manual_seed(0)
    model, inputs = case.make(quick)
    held = [*stored(model), *tree_leaves(inputs)]
    model.eval()
    peaks = {"inference": tracked(lambda: inference(model, inputs), held)}
    model.train()
    for name, make in OPTIMIZERS.items():
        optimizer = make(model.parameters())
        step(model, inputs, optimizer)
        work = partial(step, model, inputs, optimizer)
        peaks[name] = tracked(work, [*held, *states(optimizer)])
    return peaks


def rows(case: Case, quick: bool) -> list[dict[str, Any]]:
    """Predictions and measurements of one model."""
    own: dict[str, int] = {} if case.passes else own_forward(case, quick)
    torch.manual_seed(0)
    model, inputs = case.make(quick)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimized = rewrite(model, list(case.passes), inputs, inplace=True)
    cost = optimized.report.after
    held = [*stored(optimized), *tree_leaves(inputs)]
    base = nbytes(held)
    infer = partial(inference, optimized, inputs)
    optimized.eval()
    infer()  # what a first run builds (oneDNN's caches) is no part of a run
    found = [
        row(
            case.name,
            "inference",
            cost.peak_bytes,
            tracked(infer, held),
            own.get("inference"),
            by_mem_tracker(infer, optimized, inputs),
            base + allocator_peak(infer),
        )
    ]
    if cost.training is None:
        return found
    optimized.train()
    for name, make in OPTIMIZERS.items():
        optimizer = make([p for p in optimized.parameters() if p.requires_grad])
        train = partial(step, optimized, inputs, optimizer)
        heap = base + allocator_peak(train, before=train)
        found.append(
            row(
                case.name,
                f"training, {name}",
                cost.training.peaks[name],
                tracked(train, [*held, *states(optimizer)]),
                own.get(name),
                by_mem_tracker(train, optimized, inputs, optimizer),
                heap,
            )
        )
    return found


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="*", help="words of the models' names")
    args = parse(parser)
    cases = QUICK if args.quick else CASES
    if args.only:
        cases = tuple(c for c in cases if any(w in c.name for w in args.only))
    table: list[dict[str, Any]] = []
    for case in cases:
        start = time.perf_counter()
        table += rows(case, args.quick)
        print(f"{case.name}: {time.perf_counter() - start:.0f} s", flush=True)
    worst = {
        kind: max((abs(r["off %"]) for r in table if r["what"].startswith(kind)), default=0.0)
        for kind in ("inference", "training")
    }
    summary = [
        {"what": "models", "figure": len(cases)},
        {"what": "peaks compared", "figure": len(table)},
        {"what": "largest error of an inference peak, %", "figure": worst["inference"]},
        {"what": "largest error of a training peak, %", "figure": worst["training"]},
        {
            "what": f"peaks within {TARGET:g} %",
            "figure": sum(abs(r["off %"]) <= TARGET for r in table),
        },
    ]
    write_results(
        "memory",
        "Peak memory: predicted and measured",
        {"Summary": summary, "Peaks": table},
        command=command(),
        notes="Peaks include weights, inputs, results and, in training, gradients and the "
        "optimizer's state; the training step measured is the second one. 'off' compares with the "
        "tracker. The allocator's mark also holds workspace inside kernels, which is theirs and "
        "differs by machine; MemTracker rounds every storage up to 512 bytes.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
