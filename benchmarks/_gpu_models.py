"""Whole models on the card: training steps, peaks within a budget, predicted beside measured."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import _checkout  # noqa: F401 (our packages, from this checkout)
import torch
from _gpu_checks import HEADING, LIMITS, device, error, short, verdict
from _gpu_clock import card, datasheet, synchronize, times
from _gpu_crew import Case, Found, Row
from _tracker import Tracker
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter import rewrite
from rewriter.passes import Monarch, Quantize

STEPS, PEAKS, PREDICTED = "Training steps", "Peaks within a budget", "Predicted beside measured"
Call = Callable[[], object]


# The model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Of a GPT and of its batch."""

    width: int
    depth: int
    words: int
    rows: int
    length: int

    def __str__(self) -> str:
        return (
            f"{self.depth} layers of {self.width}, {self.words} words, batch {self.rows} × "
            f"{self.length}"
        )


class Block(nn.Module):
    """Attention and an MLP, each after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = max(width // 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return y


class GPT(nn.Module):
    """As GPT-2: a decoder with learned places and a tied head, which returns its loss."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.words = nn.Embedding(size.words, size.width)
        self.places = nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*[Block(size.width) for _ in range(size.depth)])
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.words, bias=False)
        self.head.weight = self.words.weight
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        logits = self.head(self.norm(self.blocks(hidden)))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def monarch() -> Monarch:
    """N = 4 in every linear layer but the head; the time is asked for, not the quality."""
    return Monarch(nblocks=4, init="random", where=lambda site: "head" not in site.fqn)


def gpt(size: Size) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    with torch.device(device()):
        return GPT(size), torch.randint(0, size.words, (size.rows, size.length))


# Training steps ----------------------------------------------------------------------------------

MEDIUM, SMALL = Size(1024, 24, 50304, 8, 1024), Size(64, 1, 128, 2, 32)


@functools.cache
def models(quick: bool) -> tuple[dict[str, nn.Module], Tensor]:
    dense, tokens = gpt(SMALL if quick else MEDIUM)
    with _no_warnings():
        made = rewrite(dense, [monarch()], tokens)
    return {"dense": dense.train(), "Monarch N = 4": made.train()}, tokens


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def loss_of(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    with torch.autocast(device().type, torch.bfloat16):
        return model(tokens)


def step_of(model: nn.Module, runs: Callable[[Tensor], Tensor], tokens: Tensor) -> Call:
    """Forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        loss = loss_of(runs, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def training(quick: bool, compile_too: bool) -> Found:
    made, tokens = models(quick)
    steps: dict[str, Call] = {}
    for name, model in made.items():
        runs: Callable[[Tensor], Tensor] = torch.compile(model) if compile_too else model
        steps[name] = step_of(model, runs, tokens)
    peaks = {name: _peak_of(step, made[name]) for name, step in steps.items()}
    found = times(steps, seconds=6, least=5, most=12)
    for name in steps:
        yield (
            STEPS,
            {
                "step": f"{name}, {'compiled' if compile_too else 'eager'}",
                "median ms": found.device[name] * 1e3,
                "wall ms": found.call[name] * 1e3,
                "× over dense": found.ratio(name, "dense"),
                "tokens a second": tokens.numel() / found.call[name],
                "peak MB": peaks[name],
                "million weights": sum(p.numel() for p in made[name].parameters()) / 1e6,
            },
        )


def _peak_of(step: Call, model: nn.Module) -> float:
    """MB of the model and of what its first step holds, optimizer state included; not what the
    other models beside it hold."""
    if not torch.cuda.is_available():
        step()
        return 0.0
    synchronize()
    others = torch.cuda.memory_allocated() - sum(p.nbytes for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronize()
    return (torch.cuda.max_memory_allocated() - others) / 1e6


def compiled_ahead(name: str) -> Found:
    """Fills the compiler's cache, beside other work."""
    made, tokens = models(False)
    loss_of(torch.compile(made[name]), tokens).backward()
    synchronize()
    yield from ()


# Peaks -------------------------------------------------------------------------------------------

LARGE, TINY = Size(1024, 6, 8192, 8, 512), Size(64, 2, 128, 4, 32)


def measured_peak(model: nn.Module, tokens: Tensor) -> tuple[int, Tensor, dict[str, Tensor]]:
    """(bytes of a forward and backward above what was held before, loss, gradients), after two
    steps that leave libraries their work spaces."""
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = None
        torch.manual_seed(1)
        with _Peak([*model.parameters(), *model.buffers(), tokens]) as peak:
            loss = model(tokens)
            loss.backward()
        found = loss.detach().clone()
        del loss
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return peak.bytes, found, gradients


class _Peak:
    """Most bytes above those held before: by the card's allocator, or by a tracker of tensors."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        self.tracker = None if torch.cuda.is_available() else Tracker(given=held)
        self.bytes = 0

    def __enter__(self) -> _Peak:
        if self.tracker is not None:
            self.tracker.__enter__()
        else:
            synchronize()
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self.tracker is not None:
            self.tracker.__exit__(*raised)
            self.bytes = self.tracker.peak
        else:
            synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before


def peaks(quick: bool, budget: float, half: bool) -> Found:
    """A budget's plan: its peak must be the one measured, its gradients the model's own."""
    size = TINY if quick else LARGE
    model, tokens = gpt(size)
    model = model.to(torch.bfloat16 if half else torch.float32).train()
    own, loss, wanted = measured_peak(model, tokens)
    wanted = {n: g.cpu() for n, g in wanted.items()}
    for parameter in model.parameters():
        parameter.grad = None
    with _no_warnings():
        start = time.perf_counter()
        planned = rewrite(model, [], tokens, memory_budget=budget).train()
        took = time.perf_counter() - start
    del model
    plan = planned.memory_plan
    most, same, gradients = measured_peak(planned, tokens)
    errors = {n: error(g.cpu(), wanted[n]) for n, g in gradients.items()}
    dtype = torch.bfloat16 if half else torch.float32
    text = f"within {budget:.0%}, of {len(wanted)} parameters"
    # attention's backward adds in any order on a card
    yield HEADING, verdict("gradients by a memory plan", text, dtype, errors, LIMITS[dtype])
    yield (
        PEAKS,
        {
            "dtype": "bfloat16" if half else "float32",
            "budget %": 100 * budget,
            "predicted MB": plan.peak / 1e6,
            "measured MB": most / 1e6,
            "off %": 100 * (most / plan.peak - 1),
            "unplanned: predicted MB": plan.default_peak / 1e6,
            "eager measured MB": own / 1e6,
            "eager off %": 100 * (own / plan.default_peak - 1),
            "largest gradient error": max(errors.values()),
            "loss off": abs(float(same - loss)),
            "planned in s": took,
        },
    )


# Predicted ---------------------------------------------------------------------------------------


def predicted(name: str, make: Callable[[], tuple[nn.Module, Tensor]], passes: Sequence[Any],
              trains: bool) -> Found:  # fmt: skip
    model, x = make()
    with _no_warnings():
        made = rewrite(model, passes, x, device=datasheet())
    cost = made.report.steps[-1].after
    eager: nn.Module = made.eval()
    with torch.no_grad():
        found = times({"forward": lambda: eager(x)})
    yield _predicted(f"{name}, inference", cost.latency_s, found.device["forward"],
                     found.call["forward"])  # fmt: skip
    if not trains or cost.training is None:
        return
    made.train()
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        made(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    trained = times({"step": step})
    yield _predicted(f"{name}, training step", cost.training.latency_s, trained.device["step"],
                     trained.call["step"])  # fmt: skip


def _predicted(what: str, seconds: float, alone: float, wall: float) -> tuple[str, Row]:
    return PREDICTED, {
        "what": what,
        f"predicted ms, {datasheet().name}": seconds * 1e3,
        "measured ms": wall * 1e3,
        "of the card alone, ms": alone * 1e3,
        "predicted / measured": seconds / wall,
        "predicted / of the card alone": seconds / alone,
    }


def makers(quick: bool) -> Mapping[str, tuple[Callable[[], tuple[nn.Module, Tensor]], Any, bool]]:
    def mlp(width: int, rows: int, dtype: torch.dtype) -> Callable[[], tuple[nn.Module, Tensor]]:
        def make() -> tuple[nn.Module, Tensor]:
            torch.manual_seed(0)
            own: dict[str, Any] = {"device": device(), "dtype": dtype}
            up, down = nn.Linear(width, 4 * width, **own), nn.Linear(4 * width, width, **own)
            return nn.Sequential(up, nn.GELU(), down), torch.randn(rows, width, **own)

        return make

    def decoder(size: Size, dtype: torch.dtype) -> Callable[[], tuple[nn.Module, Tensor]]:
        def make() -> tuple[nn.Module, Tensor]:
            model, tokens = gpt(size)
            return model.to(dtype), tokens

        return make

    half, whole = torch.bfloat16, torch.float32
    if quick:
        return {"MLP": (mlp(64, 16, whole), [Monarch(nblocks=4)], True)}
    small = Size(1024, 6, 16384, 8, 512)
    found: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], Any, bool]] = {}
    for dtype in (half, whole):
        for rows in (1, 512, 8192):
            name = f"MLP 2048 → 8192 → 2048, {rows} rows, {short(dtype)}"
            found[name] = (mlp(2048, rows, dtype), [], rows > 1)
        found[f"GPT, {small}, {short(dtype)}"] = (decoder(small, dtype), [], True)
    for rows in (1, 8192):
        name = f"MLP 2048 → 8192 → 2048, {rows} rows, bfloat16"
        found[f"{name}, Monarch N = 4"] = (mlp(2048, rows, half), [monarch()], rows > 1)
        found[f"{name}, int8"] = (mlp(2048, rows, half), [Quantize("int8-dynamic")], False)
    return found


# All of them -------------------------------------------------------------------------------------


def training_cases(quick: bool) -> list[Case]:
    found = [Case("eager", lambda: training(quick, False), 150)]
    return found if quick else [*found, Case("compiled", lambda: training(False, True), 200)]


def compile_cases(quick: bool) -> list[Case]:
    names = () if quick else ("dense", "Monarch N = 4")
    return [Case(f"GPT, {n}", lambda n=n: compiled_ahead(n), 150) for n in names]


def memory_cases(quick: bool) -> list[Case]:
    budgets = {False: (1.0, 0.7, 0.5), True: (1.0, 0.8, 0.65)}  # least possible: 0.37, 0.52

    def within(budget: float, half: bool) -> Case:
        name = f"{'bfloat16' if half else 'float32'} within {budget:.0%}"
        return Case(name, lambda: peaks(quick, budget, half), 120)

    if quick:
        return [within(0.7, False)]
    return [within(budget, half) for half in (False, True) for budget in budgets[half]]


def predicted_cases(quick: bool) -> list[Case]:
    return [
        Case(name, lambda n=name, m=make, p=passes, t=trains: predicted(n, m, p, t), 60)
        for name, (make, passes, trains) in makers(quick).items()
    ]


def targets(tables: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    """The training step and the peaks."""
    for kind in ("eager", "compiled"):
        found = [r["× over dense"] for r in tables.get(STEPS, ())
                 if r["step"] == f"Monarch N = 4, {kind}"]  # fmt: skip
        yield {
            "figure": f"training step, Monarch N = 4, {kind}: × over dense {kind}",
            "found": found[0] if found else "not timed",
            "wanted": "≥ 1.6",
        }
    off = [abs(r["off %"]) for r in tables.get(PEAKS, ())]
    yield {
        "figure": f"measured peak off the predicted, %, most of {len(off)}",
        "found": max(off) if off else "not measured",
        "wanted": "≤ 3",
    }


def notes(quick: bool) -> str:
    """What the tables of this file were measured on."""
    return (
        f"Training steps: a GPT as GPT-2 medium has it ({SMALL if quick else MEDIUM}, tied head), "
        "bfloat16 autocast, loss, backward and fused AdamW; Monarch N = 4 in all linear layers but "
        f"the head. Peaks: {TINY if quick else LARGE}, forward and backward, "
        "torch.cuda.max_memory_allocated above what was allocated before (weights, inputs, work "
        f"spaces of libraries). Predictions: the datasheet of the {datasheet().name}"
        + ("." if datasheet().name.split("-")[0] in card() else ", a stand-in for this device.")
    )
