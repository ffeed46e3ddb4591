"""Trains an MLP and a CNN on Fashion-MNIST for weights and activations of few bits.

    python examples/qat.py            # minutes
    python examples/qat.py --quick    # seconds

One training in float32 up to three quarters of its steps. From there it goes on to the end with
the same batches, once as it is and once for each scheme with that scheme's rounding in the forward
(`QAT`). `Quantize` then gives the layers of integers, of the same outputs bit for bit. Beside it:
the float32 model rounded after its training, without any.
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _data import FASHION, fashion_mnist
from torch import Tensor, nn

from rewriter import remap_optimizer, rewrite
from rewriter.passes import QAT, Quantize

Data = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """Sizes of the models and of their training."""

    width: int = 512
    batch: int = 128
    steps: int = 2000
    lr: float = 1e-3
    rounded: float = 0.25
    """Share of the steps that a scheme's rounding takes part in, the last ones."""


QUICK = Plan(width=128, steps=200)


class MLP(nn.Module):
    """784 → width → width → 10."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(784, width), nn.Linear(width, width)
        self.out, self.drop = nn.Linear(width, 10), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.one(x).relu())
        return self.out(self.drop(self.two(x).relu()))


class CNN(nn.Module):
    """Two convolutions of 3×3, each halved by a maximum, then width/4 → 10."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, width // 32, 3, padding=1)
        self.two = nn.Conv2d(width // 32, width // 16, 3, padding=1)
        self.three, self.drop = nn.Linear(49 * width // 16, width // 4), nn.Dropout(0.2)
        self.out = nn.Linear(width // 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.one(x.unflatten(1, (1, 28, 28))).relu(), 2)
        x = F.max_pool2d(self.two(x).relu(), 2).flatten(1)
        return self.out(self.drop(self.three(self.drop(x)).relu()))


MODELS: Mapping[type[MLP | CNN], Mapping[str, QAT]] = {
    MLP: {
        "int8-dynamic": QAT("int8-dynamic"),
        "int4-weight": QAT("int4-weight"),
        "int4-weight, learned steps": QAT("int4-weight", learned_step=True),
        "int4-dynamic": QAT("int4-dynamic"),
    },
    CNN: {
        "int8-dynamic, convolutions": QAT("int8-dynamic", convolutions=True),
        "int4-dynamic, convolutions": QAT("int4-dynamic", convolutions=True),
        "int4-dynamic, learned steps": QAT("int4-dynamic", convolutions=True, learned_step=True),
    },
}
"""Model → what it is trained for."""


@torch.no_grad()
def outputs(model: nn.Module, data: Data) -> Tensor:
    """Of the test images, in eval mode."""
    model.eval()
    return torch.cat([model(images) for images in data[2].split(1000)])


def accuracy(model: nn.Module, data: Data) -> float:
    """Share of the test images in their class."""
    return float((outputs(model, data).argmax(1) == data[3]).float().mean())


class Training:
    """A model, its optimizer, and the steps from one to another of the plan."""

    def __init__(self, model: nn.Module, data: Data, plan: Plan, seed: int) -> None:
        self.model, self.data, self.plan, self.seed = model, data, plan, seed
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), plan.lr)

    def run(self, start: int, stop: int) -> None:
        self.model.train()
        for step in range(start, stop):
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            rows = torch.randint(len(self.data[0]), (self.plan.batch,), generator=g)
            torch.manual_seed(step)  # of the dropout
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.lr * (1 + math.cos(math.pi * step / self.plan.steps)) / 2
            loss = F.cross_entropy(self.model(self.data[0][rows]), self.data[1][rows])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def rounding(self, qat: QAT) -> Training:
        """The same, in the middle of training, with a scheme's rounding."""
        made = copy.copy(self)
        made.model = rewritten(self.model, qat, self.data)
        made.optimizer = remap_optimizer(self.optimizer, self.model, made.model)
        return made


def rewritten(model: nn.Module, rewrite_: QAT | Quantize, data: Data) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a model as small as this one gets no faster
        return rewrite(model, [rewrite_], data[2][:64])


def integers(qat: QAT) -> Quantize:
    """The scheme that was trained for."""
    options = {k: v for k, v in (qat.spec() or {}).items() if k != "learned_step"}
    return Quantize(**options)


def compare(
    data: Data,
    plan: Plan,
    seed: int,
    kind: type[MLP | CNN] = MLP,
    say: Callable[[str], object] = print,
) -> list[dict[str, object]]:
    """One row for float32 and for each scheme: accuracies on the test images."""
    torch.manual_seed(seed)
    common = Training(kind(plan.width), data, plan, seed)
    middle = round(plan.steps * (1 - plan.rounded))
    common.run(0, middle)
    dense = Training(copy.deepcopy(common.model), data, plan, seed)
    dense.optimizer = remap_optimizer(common.optimizer, common.model, dense.model)
    dense.run(middle, plan.steps)
    base = accuracy(dense.model, data)
    rows: list[dict[str, object]] = [
        {"scheme": "float32", "rounded after": base, "trained": base, "bits differ": 0.0}
    ]
    for name, qat in MODELS[kind].items():
        after = accuracy(rewritten(dense.model, integers(qat), data), data)
        training = common.rounding(qat)
        training.run(middle, plan.steps)
        trained = accuracy(training.model, data)
        final = rewritten(training.model, integers(qat), data).eval()
        differ = float((outputs(final, data) != outputs(training.model, data)).float().mean())
        rows.append(
            {"scheme": name, "rounded after": after, "trained": trained, "bits differ": differ}
        )
        say(f"  {name}: {trained:.4f} trained with rounding, float32 {base:.4f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path, default=FASHION)
    args = parser.parse_args()
    try:
        data = fashion_mnist(args.data)
    except FileNotFoundError as missing:
        print(f"skipped: {missing}")
        return
    for kind in MODELS:
        rows = compare(data, QUICK if args.quick else Plan(), seed=0, kind=kind)
        head = "rounded after training   trained with rounding   outputs that differ"
        print(f"\n{kind.__name__:28}{head}")
        for row in rows:
            print(
                f"{row['scheme']:28}{row['rounded after']:22.2%}{row['trained']:24.2%}"
                f"{row['bits differ']:22.2%}"
            )


if __name__ == "__main__":
    main()
