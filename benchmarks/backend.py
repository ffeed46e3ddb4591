"""`torch.compile(backend="rewriter")` beside plain Inductor: equality, speed, compile time, shapes.

Each part can be run alone (`--part speed`); its tables then take the place of the older ones in
the results, the others stay.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _models
import torch
from _harness import (
    arguments,
    command,
    interleaved,
    machine,
    parse,
    speedup,
    write_results,
)
from _models import DRY, LITE, Batch, efficientnet_lite, minilm
from torch import Tensor, nn

import rewriter
from rewriter import rewrite
from rewriter.passes import Monarch, Quantize

PARTS = ("equality", "speed", "training", "neighbours", "compile", "shapes")
Subject = tuple[Callable[[], nn.Module], Callable[[int, int], Batch]]


def tokens(vocabulary: int, mask: bool = False) -> Callable[[int, int], Batch]:
    def make(rows: int, length: int) -> Batch:
        return _models.tokens(rows, length, vocabulary, mask=mask, seed=rows * 1000 + length)

    return make


def pixels(side: int, name: str = "pixel_values") -> Callable[[int, int], Batch]:
    return lambda rows, length: _models.pixels(rows, side, seed=rows, name=name)


def gpt2(width: int = 512, depth: int = 4) -> nn.Module:
    return _models.gpt2(width, depth, 4000, heads=8, **DRY)


def bert() -> nn.Module:
    return _models.transformer(
        "BertModel", vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


SUBJECTS: dict[str, Subject] = {
    "MiniLM": (minilm, tokens(29000, True)),
    "GPT-2-like": (gpt2, tokens(4000)),
    "ViT": (partial(_models.vit, 384, 4), pixels(224)),
    "ResNet-like": (partial(_models.basic_resnet, 1), pixels(160)),
    ("EfficientNet-Lite0" if LITE else "MobileNetV2"): (
        efficientnet_lite,
        pixels(160, "inputs" if LITE else "pixel_values"),
    ),
}
SHAPE = {"MiniLM": (8, 128), "GPT-2-like": (4, 128), "ViT": (4, 0), "BERT tiny": (2, 8)}
QUICK: dict[str, Subject] = {"BERT tiny": (bert, tokens(500, True))}


def inputs_of(name: str, make: Callable[[int, int], Batch]) -> Batch:
    return make(*SHAPE.get(name, (4, 0)))


def tensors(output: Any) -> list[Tensor]:
    found = [output] if isinstance(output, Tensor) else list(output.values())
    return [t for t in found if isinstance(t, Tensor) and t.is_floating_point()]


def apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    pairs = zip(some, others, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def off(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients(run: Any, model: nn.Module, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    sum(t.square().mean() for t in tensors(run(**batch))).backward()  # type: ignore[union-attr]
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def equality(subjects: Mapping[str, Subject], inner: str) -> list[dict[str, Any]]:
    """Against `rewrite` then torch.compile; gradients against eager."""
    rows = []
    plain = "inductor" if inner == "inductor" else "aot_eager"
    for name, (build, make) in subjects.items():
        torch.manual_seed(0)
        model, batch = off(build()).eval(), inputs_of(name, make)
        found: dict[str, Any] = {"model": name}
        for label, passes in (("no pass", []), ("int8", [Quantize("int8-dynamic")])):
            torch._dynamo.reset()
            same = torch.compile(rewrite(model, passes, batch), backend=plain)
            fast = torch.compile(model, backend=rewriter.backend(passes, inner=inner))
            with torch.no_grad():
                found[f"{label}: off rewrite + compile"] = apart(
                    tensors(fast(**batch)), tensors(same(**batch))
                )
                if passes:
                    found["layers in int8"] = sum(len(r.replaced) for r in rewriter.report_of(fast))
        torch._dynamo.reset()
        double = copy.deepcopy(model).double()  # how far eager float32 itself is off
        wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        exact = gradients(double, double, wide)
        fast = torch.compile(model, backend=rewriter.backend(inner=inner))
        mine = gradients(fast, model, batch)
        eager = gradients(model, model, batch)
        norm = torch.cat([g.flatten() for g in exact]).norm()

        def distance(some: Sequence[Tensor]) -> float:
            parts = zip(some, exact, strict=True)  # noqa: B023
            return float(torch.cat([(a - b).flatten() for a, b in parts]).norm() / norm)  # noqa: B023

        found["gradients: off float64"] = distance(mine)
        found["eager's: off float64"] = distance(eager)
        rows.append(found)
    return rows


def speed(subjects: Mapping[str, Subject], inner: str, rounds: int) -> list[dict[str, Any]]:
    """A forward, beside plain Inductor."""
    rows = []
    for name, (build, make) in subjects.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, batch = build().eval(), inputs_of(name, make)
        runs = {
            "Inductor": torch.compile(model, backend=inner),
            "no pass": torch.compile(model, backend=rewriter.backend(inner=inner)),
            "int8": torch.compile(
                model, backend=rewriter.backend(["quantize:int8-dynamic"], inner=inner)
            ),
        }
        with torch.inference_mode():
            times = interleaved(
                {n: lambda run=run, own=batch: run(**own) for n, run in runs.items()}, rounds, 2
            )
        kernels = {d.kernel for r in rewriter.report_of(runs["int8"]) for d in r.replaced}
        rows.append(
            {
                "model": name,
                "Inductor ms": round(statistics.median(times["Inductor"]) * 1e3, 2),
                "no pass ×": round(speedup(times, "no pass", "Inductor")[1], 3),
                "int8 ×": round(speedup(times, "int8", "Inductor")[1], 3),
                "int8 kernels": ", ".join(sorted(kernels)) or "none",
            }
        )
    return rows


def training(quick: bool, inner: str, rounds: int) -> list[dict[str, Any]]:
    """A step (forward, backward, AdamW) of the GPT-2-like model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    width, depth, rows, length = (64, 1, 2, 8) if quick else (768, 3, 4, 256)
    dense, batch = gpt2(width, depth), tokens(4000)(rows, length)
    models = {
        "Inductor": dense,
        "no pass": copy.deepcopy(dense),
        **{
            f"Monarch, {n} blocks": rewrite(dense, [Monarch(nblocks=n, init="random")], batch)
            for n in (4, 8)
        },
    }
    steps: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        backend: Any = inner if name == "Inductor" else rewriter.backend(inner=inner)
        run = torch.compile(model.train(), backend=backend)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

        def step(run: Any = run, optimizer: Any = optimizer) -> None:
            run(**batch).last_hidden_state.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step
    times = interleaved(steps, rounds, 2)
    return [
        {
            "model": name,
            "M parameters": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
            "step ms": round(statistics.median(times[name]) * 1e3, 1),
            "× over Inductor": round(speedup(times, name, "Inductor")[1], 3),
        }
        for name, model in models.items()
    ]


REDUCTIONS = "norm mean sum softmax amax var".split()


def neighbours(quick: bool, inner: str) -> list[dict[str, Any]]:
    """What fusing elementwise neighbours (activation, residual) into our operations could save at
    most: the time of Inductor's kernels that hold nothing else."""
    from torch.profiler import ProfilerActivity, profile

    name = "BERT tiny" if quick else "MiniLM"
    build, make = (QUICK if quick else SUBJECTS)[name]
    width, depth, *sizes = (64, 1, 2, 8) if quick else (768, 3, 4, 256)
    options: dict[str, Any] = {"inner": inner}
    if inner == "inductor":
        options["inductor"] = {"cpp.enable_kernel_profile": True}
    cases: dict[str, tuple[nn.Module, Batch, list[Any], bool]] = {
        f"{name}, Monarch, 4 blocks, forward": (
            build(), inputs_of(name, make), [Monarch(nblocks=4)], False,
        ),
        "GPT-2-like, Monarch, 4 blocks, step": (
            gpt2(width, depth), tokens(4000)(*sizes), [Monarch(nblocks=4, init="random")], True,
        ),
    }  # fmt: skip
    rows = []
    for label, (model, batch, passes, trains) in cases.items():
        torch._dynamo.reset()
        made = rewrite(model, passes, batch).train(trains)
        run = torch.compile(made, backend=rewriter.backend(**options))

        def call(run: Any = run, batch: Batch = batch, trains: bool = trains) -> None:
            with torch.set_grad_enabled(trains):
                result = run(**batch).last_hidden_state
            if trains:
                result.square().mean().backward()

        call()
        call()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(5):
                call()
        events = found.key_averages()
        total = sum(e.self_cpu_time_total for e in events)
        ours = sum(e.cpu_time_total for e in events if e.key.startswith("rewriter::"))
        fused = {e.key: e.self_cpu_time_total for e in events if "cpp_fused" in e.key}
        alone = sum(t for k, t in fused.items() if not any(r in k for r in REDUCTIONS))
        rows.append(
            {
                "what": label,
                "ms": total / 5e3,
                "our operations %": 100 * ours / total,
                "elementwise kernels %": 100 * alone / total,
                "those with a reduction %": 100 * (sum(fused.values()) - alone) / total,
                "× at most, were they free": total / (total - alone),
            }
        )
    return rows


CHILD = "--compile-once"


def child(kind: str, quick: bool, threads: int) -> None:
    """One process: seconds until the first result."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    name = "BERT tiny" if quick else "MiniLM"
    build, make = (QUICK if quick else SUBJECTS)[name]
    model, batch = build().eval(), inputs_of(name, make)
    importlib.import_module("torch._inductor.compile_fx")  # is nobody's compile time

    backends: dict[str, Any] = {
        "Inductor": "inductor",
        "no pass": "rewriter",
        "int8": rewriter.backend(["quantize:int8-dynamic"]),
    }
    with torch.no_grad():
        torch.compile(nn.ReLU(), backend="eager")(torch.ones(1))
        run = torch.compile(model, backend=backends[kind])
        start = time.perf_counter()
        run(**batch)
    print(json.dumps({"seconds": time.perf_counter() - start}))


def compile_times(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Cold (an empty cache) and warm (a new process, the same cache)."""
    rows: list[dict[str, Any]] = []
    for kind in ("Inductor", "no pass", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
            seconds = []
            for _ in range(2):
                run = subprocess.run(
                    [sys.executable, __file__, CHILD, kind, str(int(quick)), str(threads)],
                    env=environment, capture_output=True, text=True, check=False,
                )  # fmt: skip
                if run.returncode:
                    raise RuntimeError(run.stderr[-3000:])
                seconds.append(json.loads(run.stdout.strip().splitlines()[-1])["seconds"])
        rows.append(
            {
                "compiled by": kind,
                "cold s": round(seconds[0], 2),
                "warm s": round(seconds[1], 2),
                "cold × of Inductor": 1.0,
                "warm / cold": round(seconds[1] / seconds[0], 3),
            }
        )
        rows[-1]["cold × of Inductor"] = round(rows[-1]["cold s"] / rows[0]["cold s"], 3)
    return rows


def shapes(quick: bool, inner: str) -> list[dict[str, Any]]:
    """Twenty batches of other sizes."""
    name = "BERT tiny" if quick else "MiniLM"
    build, make = (QUICK if quick else SUBJECTS)[name]
    torch.manual_seed(0)
    model, rows = off(build()).eval(), []
    for label, passes in (("no pass", []), ("int8", [Quantize("int8-dynamic")])):
        torch._dynamo.reset()
        run, worst = torch.compile(model, backend=rewriter.backend(passes, inner=inner)), 0.0
        same = rewrite(model, passes, make(3, 9))
        with torch.no_grad():
            for i in range(20):
                batch = make(2 + i % 7, 8 + (i * 5) % 23)
                worst = max(worst, apart(tensors(run(**batch)), tensors(same(**batch))))
        rows.append(
            {
                "passes": label,
                "shapes": 20,
                "compilations": len(rewriter.report_of(run)),
                "largest difference": worst,
            }
        )
    return rows


def main() -> None:
    if CHILD in sys.argv:
        kind, quick, threads = sys.argv[sys.argv.index(CHILD) + 1 :]
        warnings.simplefilter("ignore")
        child(kind, bool(int(quick)), int(threads))
        return
    parser = arguments(__doc__ or "")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this (repeatable)")
    parser.add_argument("--model", choices=list(SUBJECTS), action="append", help="only this")
    args = parse(parser)
    warnings.simplefilter("ignore")
    quick, parts = args.quick, args.part or PARTS
    subjects = QUICK if quick else {n: SUBJECTS[n] for n in args.model or SUBJECTS}
    inner, rounds = ("aot_eager", 2) if quick else ("inductor", 12)
    tables = {} if args.part is None else older(args.out)
    makers: dict[str, tuple[str, Callable[[], list[dict[str, Any]]]]] = {
        "equality": ("Equality", lambda: equality(subjects, inner)),
        "speed": ("Speed of a forward", lambda: speed(subjects, inner, rounds)),
        "training": ("A training step", lambda: training(quick, inner, rounds)),
        "neighbours": ("Elementwise neighbours", lambda: neighbours(quick, inner)),
        "compile": ("Seconds to the first result", lambda: compile_times(quick, args.threads)),
        "shapes": ("Twenty shapes", lambda: shapes(quick, inner)),
    }
    for part in parts:
        heading, make = makers[part]
        rows = make()
        if part in ("equality", "speed"):  # the other models' rows stay
            known = {row["model"]: row for row in [*tables.get(heading, []), *rows]}
            rows = [known[name] for name in [*SUBJECTS, *QUICK] if name in known]
        tables[heading] = rows
    order = [heading for heading, _ in makers.values()]
    write_results(
        "backend",
        'torch.compile(backend="rewriter")',
        {h: tables[h] for h in order if h in tables},
        command=command() if args.part is None else "python benchmarks/backend.py",
        notes="Both sides of every speed ratio run interleaved in one process, warmed up; forwards "
        "under inference_mode. Differences are relative to the largest value; gradients' to the "
        "norm of all. A cold compilation starts with an empty cache, a warm one is a new process "
        "with the same cache. Elementwise neighbours: shares of the profiler's time; kernels that "
        "hold elementwise operations alone are all that an epilogue of our operations could take "
        "over. Monarch starts from random factors: only its time is looked at.",
        out=args.out,
        by_isa=True,
    )


def older(folder: Path | None) -> dict[str, Any]:
    """The tables of an earlier run on this machine."""
    path = None if folder is None else folder / "backend.json"
    if path is None or not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return dict(record["tables"]) if record["machine"]["isa"] == machine()["isa"] else {}


if __name__ == "__main__":
    main()
