"""One side of `spot_checks.py`: a process that has one version of the package, counts and times.

Reads a JSON line per request and answers with one: "facts" gives figures that no clock takes part
in; the name of a ratio, one round of its functions, in seconds. Uses what both versions have: the
public API.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import _models
import torch
import torch.nn.functional as F
from _tracker import Tracker
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rewriter
from rewriter import plan_memory, rewrite
from rewriter.passes import Monarch, MonarchLinear, Quantize

INT8 = "int8-dynamic"
BUDGET = 0.75
Functions = dict[str, Callable[[], object]]


class Rounds:
    """What is timed: `Rounds(quick)[name]` builds its functions at their first round.

    Attributes:
        makers: name → a function that gives two functions: whose time is looked at, over what.
    """

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.batch = _models.tokens(*((2, 16) if quick else (8, 128)), lowest=1000)
        self.made: dict[str, Functions] = {}
        self.makers: dict[str, Callable[[], Functions]] = {
            "int8": self.int8,
            "monarch": self.monarch,
            "backend": self.backend,
            "rewrite": self.rewrite,
        }

    def minilm(self) -> nn.Module:
        return _models.minilm(1 if self.quick else None)

    def __call__(self, name: str) -> dict[str, float]:
        """Seconds of each function, called in turn."""
        if name not in self.made:
            torch.manual_seed(0)
            self.made[name] = self.makers[name]()
        found = {}
        with torch.inference_mode(name != "rewrite"):
            for what, function in self.made[name].items():
                start = time.perf_counter()
                function()
                found[what] = time.perf_counter() - start
        return found

    def int8(self) -> Functions:
        model = self.minilm()
        made = rewrite(model, [Quantize(INT8)], self.batch)
        return {"over": lambda: model(**self.batch), "own": lambda: made(**self.batch)}

    def monarch(self) -> Functions:
        width, out, rows = (64, 64, 8) if self.quick else (768, 3072, 512)
        layer, dense, x = (
            MonarchLinear(width, out, 4),
            nn.Linear(width, out),
            torch.rand(rows, width),
        )
        return {"over": lambda: F.linear(x, dense.weight, dense.bias), "own": lambda: layer(x)}

    def backend(self) -> Functions:
        model, inner = self.minilm(), "aot_eager" if self.quick else "inductor"
        plain = torch.compile(model, backend=inner)
        own = torch.compile(model, backend=rewriter.backend(inner=inner))
        return {"over": lambda: plain(**self.batch), "own": lambda: own(**self.batch)}

    def rewrite(self) -> Functions:
        model = self.minilm()
        shapes = {name: dict.fromkeys(range(t.dim()), None) for name, t in self.batch.items()}

        def export() -> object:
            return torch.export.export(model, (), self.batch, dynamic_shapes=shapes)

        return {"over": export, "own": lambda: rewrite(model, [], self.batch)}


class Net(nn.Module):
    """Token ids → blocks of attention written out and an MLP → next token's loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def net(quick: bool) -> tuple[Net, Tensor]:
    """A GPT-2-like model whose attention torch's counter sees, and token ids."""
    torch.manual_seed(0)
    depth, width, vocabulary = (1, 64, 128) if quick else (4, 256, 2048)
    model = _models.gpt2(
        width, depth, vocabulary, head=True, n_positions=128, attn_implementation="eager",
        **_models.DRY,
    )  # fmt: skip
    ids = _models.tokens(2, 32 if quick else 128, vocabulary)["input_ids"]
    return Net(model).train(), ids


def flops(quick: bool) -> dict[str, Any]:
    model, ids = net(quick)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(ids)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model.train()(ids).backward()
    found = rewrite(model, [], ids).report
    cost = found.before
    if cost.training is None:
        raise RuntimeError(f"the ledger has no training step:\n{found}\n{found.capture.notes}")
    return {
        "FLOPs of a forward, of the ledger": cost.flops,
        "FLOPs of a forward, by FlopCounterMode": forward,
        "FLOPs of forward and backward, of the ledger": cost.training.flops,
        "FLOPs of forward and backward, by FlopCounterMode": counter.get_total_flops(),
    }


def planner(quick: bool) -> dict[str, Any]:
    model, ids = net(quick)
    plan = plan_memory(model, ids, BUDGET)
    planned = rewrite(model, [], ids, memory_budget=BUDGET).train()
    planned(ids).backward()
    planned.zero_grad()
    with Tracker(given=[*planned.parameters(), *planned.buffers(), ids]) as tracker:
        planned(ids).backward()
    return {
        f"peak of a step at a budget of {BUDGET:g}, predicted": plan.peak,
        "peak of a step, measured": tracker.peak,
        "bytes that the plan saves": plan.default_peak - plan.peak,
    }


def report(quick: bool) -> dict[str, Any]:
    passes = [Monarch(nblocks=4), Quantize(INT8)]
    batch = _models.tokens(2, 16, lowest=1000)
    found = rewrite(_models.minilm(1 if quick else None), passes, batch).report
    figures: dict[str, Any] = {"layers replaced": len(found.replaced), "errors": len(found.errors)}
    for when, cost in (("before", found.before), ("after", found.after)):
        for name in ("params", "param_bytes", "flops", "bytes_moved", "peak_bytes", "launches"):
            figures[f"{name} {when} Monarch and int8"] = getattr(cost, name)
    return figures


def facts(quick: bool) -> dict[str, dict[str, Any]]:
    """Figures by family."""
    return {"FLOPs": flops(quick), "planner": planner(quick), "report": report(quick)}


def answers(quick: bool, requests: Iterator[str]) -> Iterator[Any]:
    rounds = Rounds(quick)
    for line in requests:
        wanted = json.loads(line)
        yield facts(quick) if wanted == "facts" else rounds(wanted)


def main() -> None:
    quick, threads = bool(int(sys.argv[1])), int(sys.argv[2])
    out = os.fdopen(os.dup(1), "w")  # answers alone: what libraries print goes to stderr
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    for answer in answers(quick, iter(sys.stdin)):
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
