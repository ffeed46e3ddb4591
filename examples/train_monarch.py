"""Trains a small GPT on real text with Monarch layers, and ends it dense.

    python examples/train_monarch.py            # minutes
    python examples/train_monarch.py --quick    # seconds

Three ways to spend the same number of steps: a dense model; the same model with Monarch layers
(fewer multiply-adds a step); Monarch for the first nine tenths, then `Densify` and dense to the
end (reverse sparsification, Dao et al. 2022, section 4). Text: the Wikipedia excerpt that gensim
ships, by bytes.
"""

from __future__ import annotations

import argparse
import bz2
import html
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from _data import gensim_file
from torch import Tensor, nn

from rewriter import param_groups, remap_optimizer, rewrite
from rewriter.passes import Densify, Monarch

BLOCKS = "blocks.*"  # the head stays dense: it is small, and all quality goes through it


@dataclass(frozen=True)
class Plan:
    """Sizes of the model and of its training."""

    width: int = 512
    depth: int = 1
    context: int = 128
    batch: int = 4
    steps: int = 600
    lr: float = 1.4e-3
    hold: float = 0.3
    evaluate: int = 75


QUICK = Plan(width=64, depth=1, context=32, batch=4, steps=20, evaluate=10)


def shifted(x: Tensor) -> Tensor:
    """Half of the channels of each place come from the place before: a small model learns in tens
    of steps to look one byte back, where attention alone takes hundreds to find it."""
    now, before = x.chunk(2, -1)
    return torch.cat((now, F.pad(before[:, :-1], (0, 0, 1, 0))), -1)


class Block(nn.Module):
    """Attention with rotary positions, and an MLP, each after a norm."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = max(width // 64, 1)
        half = width // self.heads // 2
        turns = torch.arange(context)[:, None] * 1000.0 ** -(torch.arange(half) / half)
        self.register_buffer("cos", turns.cos(), persistent=False)
        self.register_buffer("sin", turns.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(shifted(self.norm1(x))).view(
            rows, length, 3, self.heads, width // self.heads
        )
        qk, v = qkv.permute(2, 0, 3, 1, 4).split((2, 1))
        a, b = qk.chunk(2, -1)
        cos, sin = self.cos[:length], self.sin[:length]
        q, k = torch.cat((a * cos - b * sin, a * sin + b * cos), -1).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v[0], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(shifted(self.norm2(x)))))


class GPT(nn.Module):
    """A decoder over bytes."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, plan.width)
        blocks = (Block(plan.width, plan.context) for _ in range(plan.depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(plan.width), nn.Linear(plan.width, 256, bias=False)
        nn.init.normal_(self.bytes.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.bytes(tokens))))


MARKUP = (
    (r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<(math|gallery|table).*?</\1>|<[^>]*>", ""),
    *[(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "")] * 3,  # templates and tables, and those around them
    (r"\[\[(?:[^\[\]|]*\|)*([^\[\]|]*)\]\]", r"\1"),
    (r"\[https?:\S*|''+|^[*#:;|!=][^\n]*|[\[\]{}|]", ""),
    (r"\s+", " "),
)


def corpus() -> Tensor:
    """Bytes of the articles, without their markup."""
    name = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    xml = bz2.decompress(gensim_file(name).read_bytes()).decode("utf-8", "ignore")
    text = html.unescape("\n".join(re.findall(r"<text[^>]*>(.*?)</text>", xml, re.S)))
    for pattern, by in MARKUP:
        text = re.sub(pattern, by, text, flags=re.S | re.M)
    return torch.frombuffer(bytearray(text.encode("ascii", "ignore")), dtype=torch.uint8).long()


def split(data: Tensor) -> tuple[Tensor, Tensor]:
    """(training, validation): every twentieth stretch of 10,000 bytes is for validation."""
    pieces = data[: len(data) // 10_000 * 10_000].view(-1, 10_000)
    held = torch.arange(len(pieces)) % 20 == 19
    return pieces[~held].flatten(), pieces[held].flatten()


def batches(data: Tensor, plan: Plan, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        at = torch.randint(0, len(data) - plan.context - 1, (plan.batch,), generator=generator)
        rows = torch.stack([data[i : i + plan.context + 1] for i in at.tolist()])
        yield rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def validation_loss(model: nn.Module, data: Tensor, plan: Plan, number: int = 40) -> float:
    """Nats per byte, on the same batches at every call."""
    model.eval()
    source = batches(data, plan, seed=1)
    losses = []
    for _ in range(number):
        x, y = next(source)
        losses.append(float(F.cross_entropy(model(x).flatten(0, 1), y.flatten())))
    model.train()
    return sum(losses) / len(losses)


class Training:
    """A model, its optimizer (AdamW) and one step of both."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model = model.train()
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            param_groups(model, plan.lr, weight_decay=0.1), betas=(0.9, 0.95), fused=True
        )
        self.lr = plan.lr

    def step(self, x: Tensor, y: Tensor, share: float) -> None:
        """One step at this share of the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["lr_scale"] * share
        F.cross_entropy(self.model(x).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def densify(self, example: Tensor) -> None:
        """Makes Monarch layers dense, and carries the optimizer's state over."""
        before = self.model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = rewrite(before, [Densify()], example).train()
        self.optimizer = remap_optimizer(self.optimizer, before, self.model)


def schedule(step: int, plan: Plan, switch: int | None) -> float:
    """Share of the learning rate: a short warm-up, then a cosine down to a fiftieth.

    A run that ends dense (from step `switch` on) keeps a share of `plan.hold` until there: the
    cosine alone would leave the dense layers a rate too small to learn what the structure could
    not hold. They get it, and decay linearly.
    """
    warm, done = max(plan.steps // 20, 1), step / plan.steps
    cosine = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * done))
    if switch is not None:
        left = (plan.steps - step) / (plan.steps - switch)
        cosine = plan.hold * left if step >= switch else max(cosine, min(plan.hold, step / warm))
    return max(cosine, 0.02)


@dataclass
class Run:
    """A training: (seconds of training, step, validation loss) at each evaluation."""

    curve: list[tuple[float, int, float]] = field(default_factory=list)
    seconds: float = 0.0
    parameters: int = 0

    @property
    def loss(self) -> float:
        return self.curve[-1][2]


def train(
    model: nn.Module,
    text: tuple[Tensor, Tensor],
    plan: Plan,
    seed: int,
    *,
    densify_at: float | None = None,
    say: Callable[[str], object] = print,
) -> Run:
    """Trains for `plan.steps`; the time of evaluations does not count.

    Args:
        model: dense, or rewritten.
        text: (training, validation) bytes.
        plan: sizes.
        seed: of the batches.
        densify_at: after which share of the steps Monarch layers become dense.
        say: where progress goes.
    """
    training, source, run = Training(model, plan), batches(text[0], plan, seed), Run()
    switch = None if densify_at is None else round(densify_at * plan.steps)
    for step in range(plan.steps + 1):
        if step % plan.evaluate == 0 or step == plan.steps:
            loss = validation_loss(training.model, text[1], plan)
            run.curve.append((run.seconds, step, loss))
            say(f"  step {step:5d}  {run.seconds:7.1f} s  validation loss {loss:.4f}")
        if step == plan.steps:
            break
        x, y = next(source)
        start = time.perf_counter()
        if step == switch:
            training.densify(x)
        training.step(x, y, schedule(step, plan, switch))
        run.seconds += time.perf_counter() - start
    run.parameters = sum(p.numel() for p in training.model.parameters())
    return run


def monarch(model: nn.Module, plan: Plan, nblocks: int = 4) -> nn.Module:
    """The model with fresh Monarch layers in its blocks."""
    example = torch.zeros(plan.batch, plan.context, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rewrite(model, [Monarch(nblocks, init="random", where=BLOCKS)], example)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--nblocks", type=int, default=4)
    args = parser.parse_args()
    plan, text = QUICK if args.quick else Plan(), split(corpus())
    print(f"{len(text[0]) / 1e6:.1f} MB of text to train on, {len(text[1]) / 1e6:.2f} MB held out")
    runs = {}
    for name in ("dense", "Monarch", "Monarch, then dense"):
        torch.manual_seed(0)
        model: nn.Module = GPT(plan)
        if name != "dense":
            model = monarch(model, plan, args.nblocks)
        print(name)
        runs[name] = train(model, text, plan, 0, densify_at=0.9 if "then" in name else None)
    print(f"\n{'':22}validation loss   seconds   speed   parameters at the end")
    for name, run in runs.items():
        print(
            f"{name:22}{run.loss:15.4f}{run.seconds:10.1f}"
            f"{runs['dense'].seconds / run.seconds:7.2f}×{run.parameters / 1e6:12.2f} M"
        )


if __name__ == "__main__":
    main()
