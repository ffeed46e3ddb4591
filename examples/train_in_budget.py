"""Trains a small GPT on real text within a memory budget, and checks what the planner promised.

    python examples/train_in_budget.py                    # a minute or two
    python examples/train_in_budget.py --quick            # seconds
    python examples/train_in_budget.py --budget 40MB      # bytes, or a share such as 0.5
    python examples/train_in_budget.py --lossy            # activations may lose digits

The same training runs twice from the same weights on the same batches: as it is, and by the plan.
Without `--lossy` their losses are equal bit for bit; the plan's peak is what a tracker of every
tensor sees. Text: 300 news documents that gensim ships, by bytes.
"""

from __future__ import annotations

import argparse
import copy
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from _data import news
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rewriter import MemoryBudget, RewriteError, rewrite


class Block(nn.Module):
    """Attention and an MLP, each after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = max(width // 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder over bytes, which returns its loss."""

    def __init__(self, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens[:, :-1]
        hidden = self.bytes(x) + self.places.weight[: x.shape[1]]
        logits = self.head(self.norm(self.blocks(hidden)))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Peak(TorchDispatchMode):
    """Most bytes alive together, of what is allocated while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is(t)}
        for tensor in filter(_is, tree_leaves(out)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.seen and key not in given:
                self.live += size
                self.peak = max(self.peak, self.live)
                self.seen[key] = weakref.ref(storage, lambda _, k=key, s=size: self.free(k, s))
        return out

    def free(self, key: int, size: int) -> None:
        del self.seen[key]
        self.live -= size


def _is(value: object) -> bool:
    return isinstance(value, Tensor)


def batches(rows: int, context: int) -> Iterator[Tensor]:
    """Random stretches of the text, [rows, context + 1], always the same ones."""
    data = "\n".join(news()).encode("ascii", "ignore")
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    while True:
        at = torch.randint(0, len(text) - context - 1, (rows,), generator=generator)
        yield torch.stack([text[i : i + context + 1] for i in at.tolist()]).long()


def train(model: nn.Module, steps: int, rows: int, context: int) -> tuple[list[float], float, int]:
    """(losses, seconds of a step, peak bytes of a forward and backward)."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3, fused=True)
    source, losses, seconds = batches(rows, context), [], []
    batch = next(source)
    with Peak() as tracker:
        model(batch).backward()
    optimizer.zero_grad()
    for _ in range(steps):
        batch, start = next(source), time.perf_counter()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    return losses, sorted(seconds)[len(seconds) // 2], tracker.peak


def amount(text: str) -> float | str:
    """A share such as 0.5, or a size such as 40MB."""
    try:
        return float(text)
    except ValueError:
        return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", type=amount, default=0.5, help="default: 0.5")
    parser.add_argument("--lossy", action="store_true", help="activations may lose digits")
    parser.add_argument("--plot", help="writes the Pareto curve to this .png, .svg or .pdf")
    args = parser.parse_args()
    width, depth, context, rows, steps = (64, 3, 64, 8, 4) if args.quick else (256, 6, 128, 16, 60)

    torch.manual_seed(0)
    model = GPT(width, depth, context)
    budget = MemoryBudget(args.budget, lossy=args.lossy)
    try:
        planned = rewrite(
            copy.deepcopy(model), [], next(batches(rows, context)), memory_budget=budget
        )
    except RewriteError as error:
        raise SystemExit(str(error)) from None
    plan = planned.memory_plan
    print(plan)
    if args.plot:
        plan.save(args.plot)

    found = {}
    for name, one in (("everything kept", model), ("by the plan", planned)):
        found[name] = train(one, steps, rows, context)
    base = found["everything kept"]
    print(
        f"\n{'':17}{'peak, MB':>10}{'predicted':>11}{'ms a step':>11}{'time':>8}{'last loss':>11}"
    )
    for (name, (losses, seconds, peak)), said in zip(
        found.items(), (plan.default_peak, plan.peak), strict=True
    ):
        print(
            f"{name:17}{peak / 1e6:10.2f}{said / 1e6:11.2f}{seconds * 1e3:11.1f}"
            f"{seconds / base[1]:7.2f}×{losses[-1]:11.4f}"
        )
    same = found["by the plan"][0] == base[0]
    print(f"\nlosses of all {steps} steps equal bit for bit: {'yes' if same else 'no'}")


if __name__ == "__main__":
    main()
