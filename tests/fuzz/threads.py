"""Rewriting in several threads, and a thread that minds its own business beside them."""

from __future__ import annotations

import contextlib
import io
import logging
import pathlib
import random
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from rewriter import rewrite
from rewriter.passes import Monarch, Quantize

__all__ = ["Bystander", "model", "rewritten", "threads", "training"]

X = torch.arange(32.0).view(4, 8) / 16 - 1


class Model(nn.Module):
    """Drops, branches on data where told to, and warns."""

    def __init__(self, hard: bool) -> None:
        super().__init__()
        self.first, self.second, self.hard = nn.Linear(8, 8), nn.Linear(8, 8), hard

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("the forward warns", stacklevel=1)
        if self.hard and x.sum() > 1e6:
            return x
        return self.second(nn.functional.dropout(self.first(x), 0.5, self.training))


def model(i: int) -> nn.Module:
    generator = torch.Generator().manual_seed(i)
    made = Model(hard=bool(i % 2))
    for p in made.parameters():
        p.data = torch.rand(p.shape, generator=generator)
    return made.eval()


def rewritten(original: nn.Module) -> tuple[str, Tensor, str]:
    result = rewrite(original, [Monarch(nblocks=1), Quantize("int8-dynamic")], X)
    decisions = [str((d.site, d.action, d.reason)) for d in result.report.steps[-1].decisions]
    with torch.no_grad():
        return result.report.capture.rung, result(X), "".join(decisions)


class Bystander(threading.Thread):
    """Prints, logs, warns, draws and calls modules, and counts what comes of it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop, self.rounds = threading.Event(), 0
        self.failure: BaseException | None = None
        self.draws: list[tuple[float, float, float]] = []
        self.records: list[logging.LogRecord] = []
        self.logger = logging.getLogger("tests.bystander")
        self.logger.propagate = False
        handler = logging.Handler()
        handler.emit = self.records.append  # type: ignore[method-assign]
        self.logger.handlers = [handler]
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))

    @staticmethod
    def seed(number: int) -> None:
        """Seeds all that it draws from."""
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number)

    def disturbed(self, output: str, seed: int) -> list[str]:
        """What was not as it is alone: of what it printed among this output, and drew."""
        found = [f"it failed: {self.failure!r}"] if self.failure is not None else []
        printed = output.count("bystander")
        if printed != self.rounds or len(self.records) != self.rounds:
            found.append(f"{self.rounds} rounds, {printed} lines, {len(self.records)} records")
        self.seed(seed)
        alone = [(float(torch.rand(())), random.random(), np.random.rand()) for _ in self.draws]
        return found if self.draws == alone else [*found, "other random numbers"]

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                print("bystander", self.rounds, file=sys.stdout)
                self.logger.error("bystander")
                self.draws.append((float(torch.rand(())), random.random(), np.random.rand()))
                self.layers(torch.ones(2, 2))
                self.rounds += 1
                self.stop.wait(0.001)
        except BaseException as failure:
            self.failure = failure


def threads(count: int, seed: int, folder: pathlib.Path) -> int:
    """Two threads that rewrite so many models each, beside a bystander; how many results were not
    those of one thread, and what else went wrong."""
    models = [model(seed + i) for i in range(2 * count)]
    streams, output, thread = (sys.stdout, sys.stderr), io.StringIO(), Bystander()
    with warnings.catch_warnings(), contextlib.redirect_stdout(output):
        warnings.filterwarnings("ignore", "the forward warns|Model is slower")
        expected = [rewritten(m) for m in models]
        thread.seed(seed)
        thread.start()
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(rewritten, models))
        thread.stop.set()
        thread.join()
    other = [i for i, (a, b) in enumerate(zip(expected, found, strict=True))
             if a[::2] != b[::2] or not torch.equal(a[1], b[1])]  # fmt: skip
    said = [f"model {seed + i}: other results than in one thread" for i in other]
    said += [f"the bystander: {what}" for what in thread.disturbed(output.getvalue(), seed)]
    said += ["a stream was replaced"] * ((sys.stdout, sys.stderr) != streams)
    said += training(4, 40)
    for text in said:
        print(f"threads {seed}: {text}", flush=True)
    print(
        f"2 threads x {count} rewrites: {len(other)} other results than in one thread; a third "
        f"thread's {thread.rounds:,} rounds of output, logs and random numbers beside them; 4 "
        f"threads x 40 planned training steps; {len(said)} wrong"
    )
    return len(said)


def training(workers: int, steps: int) -> list[str]:
    """Threads that train one planned model at the same time, each on rows of its own; what went
    wrong."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))
    planned = rewrite(layers, [], torch.randn(64, 8), memory_budget=1.0).train()
    wrong: list[str] = []

    def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x).square().sum(), list(module.parameters()))

    def work(rows: int) -> None:
        generator = torch.Generator().manual_seed(rows)
        for step in range(steps):
            x = torch.randn(rows, 8, generator=generator)
            try:
                pairs = zip(gradients(planned, x), gradients(layers, x), strict=True)
                if not all(torch.equal(a, b) for a, b in pairs):
                    wrong.append(f"planned step {step} with {rows} rows: other gradients")
            except Exception as error:
                wrong.append(f"planned step {step} with {rows} rows: {type(error).__name__}")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, [64, 64, 32, 2, 16, 8][:workers]))
    return wrong
