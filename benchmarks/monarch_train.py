"""Training from scratch on real text: dense, Monarch, and Monarch that ends dense; with seeds.

The trainings are those of `examples/train_monarch.py`. They record the validation loss by step and
nothing about time, so they may share a busy machine, run in several processes (`--seeds`,
`--models`) and be cut off: with `--work` every finished one is kept and not run again. The seconds
of a step are measured apart, all kinds of models in turn in one process, and so is the switch to
dense layers; a time is a number of steps times those. `--retime` measures them anew and makes
tables and plot from the curves that are stored with the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _harness import (
    arguments,
    command,
    interleaved,
    load_script,
    parse,
    quartiles,
    speedup,
    write_results,
)

example = load_script("examples/train_monarch.py")

DENSE, MONARCH, ENDS = "dense", "Monarch", "Monarch, then dense"
LONGER, WIDE = "Monarch, equal time", "Monarch, equal parameters"
MORE = "Monarch, then dense, 1.2 × the steps"
MODELS = (DENSE, MONARCH, ENDS, MORE, LONGER, WIDE)
ENDING = (ENDS, MORE)
SWITCH = 0.9
"""Share of the steps after which those of `ENDING` become dense."""
WIDER = 1.75
"""Times the width at which Monarch with 4 blocks holds the dense model's parameters, about: its
linear layers hold a third of the dense ones'."""
RATES, RATE_SEED = (1e-3, 1.4e-3, 2e-3, 4e-3), 100
"""Learning rates to choose from, on a seed of their own."""
RATE_STEPS = 266
ROUNDS, IN_A_ROW = 15, 3
NOTES = """\
A byte-level GPT (depth {depth}, width {width}, {batch} × {context} bytes a step, {steps} steps, \
AdamW, warm-up and cosine) on the Wikipedia excerpt that gensim ships; validation loss in nats per \
byte on stretches held out, the same batches for all; means over {seeds} seeds, ratios against the \
dense training of the same seed. Monarch has 4 blocks and its rates from `rewriter.param_groups`. \
`Monarch, then dense` calls `Densify` after {dense:.0%} of the steps, carries the optimizer over \
by `remap_optimizer`, holds at least {hold:g} of the learning rate until there and lets it decay \
linearly from that. \
`Monarch, equal time` has as many more steps as a step was faster when it was planned, with a \
cosine of that length; `Monarch, equal parameters` is a wider model. Each model has the learning \
rate that was best for it among the same few in short trainings with a seed of their own.

Trainings record losses by step. A time is a number of steps times the seconds of a step, \
measured in turn in one process (dense's median, and the median of the ratios to it), plus the \
switch where there is one (capture, `Densify` and `remap_optimizer`, whatever the length of the \
training); evaluations are left out. A loss before the end of a training is that of an \
unfinished schedule, at a high rate: the fair comparison at equal time is `Monarch, equal time`, \
at its end. Curves: monarch_train.png."""
PLAN = tuple(f.name for f in dataclasses.fields(example.Plan))
Record = dict[str, Any]


def planned(model: str, plan: Any, faster: float = 1.0) -> Any:
    """The sizes of one kind of training. `faster`: dense seconds of a step over Monarch's."""
    if model == WIDE:
        return dataclasses.replace(plan, width=round(plan.width * WIDER / 64) * 64)
    if model in (LONGER, MORE):
        steps = round(plan.steps * (faster if model == LONGER else 1.2))
        each = max(round(steps * plan.evaluate / plan.steps), 1)
        return dataclasses.replace(plan, steps=steps, evaluate=each)
    return plan


def made(model: str, plan: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    dense = example.GPT(plan)
    return dense if model == DENSE else example.monarch(dense, plan)


def trained(model: str, plan: Any, seed: int, text: Any, work: Path | None) -> Record:
    """One training, or what an earlier one of the same sizes left in `work`."""
    sizes = dataclasses.asdict(plan)
    if model not in ENDING:
        del sizes["hold"]  # plays no part
    slug = re.sub(r"\W+", "-", f"{model} {seed} {plan.lr:g} {plan.steps}")
    path = None if work is None else work / f"{slug}.json"
    if path is not None and path.exists():
        record: Record = json.loads(path.read_text())
        if record["plan"] != sizes:
            raise SystemExit(f"{path} is of other sizes: {record['plan']}; use another --work")
        return record
    print(f"{model}, seed {seed}, rate {plan.lr:g}", flush=True)
    late = SWITCH if model in ENDING else None
    run = example.train(made(model, plan, seed), text, plan, seed, densify_at=late)
    record = {
        "model": model,
        "seed": seed,
        "plan": sizes,
        "parameters": run.parameters,
        "steps": [step for _, step, _ in run.curve],
        "losses": [round(loss, 5) for *_, loss in run.curve],
    }
    if path is not None:
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(record))
        os.replace(part, path)
    return record


# Time ---------------------------------------------------------------------------------------------


def timed(plan: Any, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of every kind of model, in turn, and of switches to dense layers."""
    x, y = next(example.batches(torch.arange(100_000) % 251, plan, seed=0))
    runs = {m: example.Training(made(m, p := planned(m, plan), 0), p) for m in (DENSE, MONARCH)}
    runs[WIDE] = example.Training(made(WIDE, p := planned(WIDE, plan), 0), p)
    runs[ENDS] = example.Training(made(MONARCH, plan, 0), plan)
    runs[ENDS].step(x, y, 1.0)
    before, switches = (runs[ENDS].model, runs[ENDS].optimizer), []
    for _ in range(min(rounds, 3)):
        runs[ENDS].model, runs[ENDS].optimizer = before
        start = time.perf_counter()
        runs[ENDS].densify(x)
        switches.append(time.perf_counter() - start)

    def several(run: Any) -> None:
        """In a training, steps follow their like: what fits a cache is still in it."""
        for _ in range(IN_A_ROW):
            run.step(x, y, 0.01)  # a rate that moves nothing far

    calls = {name: lambda run=run: several(run) for name, run in runs.items()}
    found = {n: [t / IN_A_ROW for t in ts] for n, ts in interleaved(calls, rounds).items()}
    return {**found, "switch": switches}


def seconds(times: dict[str, list[float]]) -> dict[str, float]:
    """The median of dense, and by the median of the ratios, turn by turn, that of all others."""
    dense = quartiles(times[DENSE])[1]
    found = {n: dense / speedup(times, n, DENSE)[1] for n in times if n != "switch"}
    return {**found, LONGER: found[MONARCH], "switch": quartiles(times["switch"])[1]}


def time_at(record: Record, step: int, each: dict[str, float]) -> float:
    """Seconds after so many steps of a training."""
    if record["model"] not in ENDING:
        return step * each[record["model"]]
    switch = round(SWITCH * record["plan"]["steps"])
    if step <= switch:
        return step * each[MONARCH]
    return switch * each[MONARCH] + each["switch"] + (step - switch) * each[ENDS]


def curve(record: Record, each: dict[str, float]) -> list[tuple[float, float]]:
    """(seconds, validation loss)."""
    return [
        (time_at(record, step, each), loss)
        for step, loss in zip(record["steps"], record["losses"], strict=True)
    ]


def loss_at(points: Sequence[tuple[float, float]], moment: float) -> float:
    """Validation loss at a time, between the evaluations around it; the last one beyond."""
    before = points[0]
    for point in points:
        if point[0] >= moment:
            span = point[0] - before[0]
            share = (moment - before[0]) / span if span else 1.0
            return before[1] + share * (point[1] - before[1])
        before = point
    return before[1]


def kept_times(plan: Any, rounds: int, work: Path | None) -> dict[str, list[float]]:
    """Measured, or as `work` has them: the steps of `LONGER` follow from them."""
    path = None if work is None else work / "times.json"
    if path is not None and path.exists():
        found: dict[str, list[float]] = json.loads(path.read_text())
        return found
    found = timed(plan, rounds)
    if path is not None:
        path.write_text(json.dumps(found))
    return found


# Tables -------------------------------------------------------------------------------------------


def paired(records: Sequence[Record], model: str) -> list[tuple[Record, Record]]:
    """(a training of the model, the dense one of its seed)."""
    dense = {r["seed"]: r for r in records if r["model"] == DENSE}
    return [(r, dense[r["seed"]]) for r in records if r["model"] == model and r["seed"] in dense]


def ended(record: Record) -> float:
    return float(record["losses"][-1])


def summary(records: Sequence[Record], model: str, each: dict[str, float]) -> Record:
    """What the trainings of one kind came to."""
    pairs = paired(records, model)
    losses = [ended(r) for r, _ in pairs]
    ratios = [ended(r) / ended(d) for r, d in pairs]
    own, dense = pairs[0]
    return {
        "model": model,
        "width": own["plan"]["width"],
        "M parameters": own["parameters"] / 1e6,
        "steps": own["steps"][-1],
        "loss": statistics.mean(losses),
        "spread": max(losses) - min(losses),
        "loss over dense's": statistics.mean(ratios),
        "of each seed": ", ".join(f"{r:.4f}" for r in ratios),
        "time over dense's": curve(own, each)[-1][0] / curve(dense, each)[-1][0],
    }


def equal_time(records: Sequence[Record], model: str, each: dict[str, float]) -> Record:
    """Both losses at the end of the model's training, and at the end of the dense one."""
    pairs = [(curve(r, each), curve(d, each)) for r, d in paired(records, model)]
    mean = statistics.mean
    return {
        "model": model,
        "its time over dense's": pairs[0][0][-1][0] / pairs[0][1][-1][0],
        "its loss at its end": mean(own[-1][1] for own, _ in pairs),
        "dense's loss then": mean(loss_at(dense, own[-1][0]) for own, dense in pairs),
        "its loss at dense's end": mean(loss_at(own, dense[-1][0]) for own, dense in pairs),
        "dense's loss at its end": mean(dense[-1][1] for _, dense in pairs),
    }


def figures(rows: Sequence[Record], each: dict[str, float]) -> list[Record]:
    by = {r["model"]: r for r in rows}
    found = []
    for model, name, column, wanted in (
        (ENDS, "loss over dense's, mean of the seeds", "loss over dense's", "≤ 1.01"),
        (ENDS, "time over dense's", "time over dense's", "≤ 0.65"),
        (MORE, "loss over dense's", "loss over dense's", "–"),
        (MORE, "time over dense's", "time over dense's", "–"),
        (MONARCH, "equal steps: loss over dense's", "loss over dense's", "–"),
        (LONGER, "loss over dense's", "loss over dense's", "–"),
        (WIDE, "loss over dense's", "loss over dense's", "–"),
    ):
        if model in by:
            found.append(
                {"figure": f"{model}: {name}", "found": by[model][column], "wanted": wanted}
            )
    speed = each[DENSE] / each[MONARCH]
    return [*found, {"figure": "a step of Monarch: times faster", "found": speed, "wanted": "–"}]


def tables(
    records: Sequence[Record], rates: Sequence[Record], times: dict[str, list[float]]
) -> dict[str, list[Record]]:
    each = seconds(times)
    rows = [summary(records, m, each) for m in MODELS if paired(records, m)]
    made: dict[str, list[Record]] = {
        "Figures": figures(rows, each),
        "Trainings": rows,
        "At equal time": [equal_time(records, r["model"], each) for r in rows[1:]],
        "Seconds": [
            {
                "what": {ENDS: "a step once dense", "switch": "the switch"}.get(n, f"a step, {n}"),
                "median ms": quartiles(values)[1] * 1e3,
                "quartiles ms": " – ".join(f"{quartiles(values)[i] * 1e3:.1f}" for i in (0, 2)),
                "dense's over it": "–" if n == "switch" else speedup(times, n, DENSE)[1],
            }
            for n, values in times.items()
        ],
    }
    made["Learning rates"] = list(rates)
    made["Curves"] = [
        {
            **{k: r[k] for k in ("model", "seed", "parameters")},
            **{k: r["plan"].get(k, "–") for k in PLAN},
            "losses": r["losses"],
        }
        for r in records
    ]
    return made


def restored(rows: Sequence[Record]) -> list[Record]:
    """The trainings of a table of curves."""
    return [
        {
            **{k: r[k] for k in ("model", "seed", "parameters", "losses")},
            "plan": {k: r[k] for k in PLAN if r[k] != "–"},
            "steps": [*range(0, r["steps"], r["evaluate"]), r["steps"]],
        }
        for r in rows
    ]


def plot(records: Sequence[Record], each: dict[str, float], path: Path) -> None:
    """Validation loss over seconds of training; one line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    models = [m for m in MODELS if any(r["model"] == m for r in records)]
    for i, name in enumerate(models):
        for j, record in enumerate(r for r in records if r["model"] == name):
            moments, losses = zip(*curve(record, each)[1:], strict=True)
            axes.plot(moments, losses, color=f"C{i}", lw=1.2, label=None if j else name)
    axes.set(xlabel="seconds of training", ylabel="validation loss, nats per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def rate_trials(models: Sequence[str], plan: Any, text: Any, work: Path | None) -> list[Record]:
    """What short trainings at each learning rate end with."""
    steps, rates = (plan.steps // 2, RATES[:2]) if plan == example.QUICK else (RATE_STEPS, RATES)
    short = dataclasses.replace(plan, steps=steps, evaluate=steps)
    trials = [
        trained(m, planned(m, dataclasses.replace(short, lr=lr)), RATE_SEED, text, work)
        for lr in rates
        for m in (DENSE, MONARCH, WIDE)
        if m in models
    ]
    return [
        {"model": r["model"], "rate": r["plan"]["lr"], "steps": r["steps"][-1], "loss": ended(r)}
        for r in trials
    ]


def chosen(rates: Sequence[Record], model: str) -> float:
    """The rate of the best of those trainings."""
    like = MONARCH if model in (*ENDING, LONGER) else model
    return float(min((r for r in rates if r["model"] == like), key=lambda r: r["loss"])["rate"])


def store(
    args: argparse.Namespace,
    records: Sequence[Record],
    rates: Sequence[Record],
    times: dict[str, list[float]],
) -> None:
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(records, seconds(times), args.out / "monarch_train.png")
    plan = records[0]["plan"]
    write_results(
        "monarch_train",
        "Training with Monarch layers from scratch",
        tables(records, rates, times),
        command=command(),
        notes=NOTES.format(
            **{"hold": example.Plan().hold, **plan},
            seeds=len({r["seed"] for r in records}),
            dense=SWITCH,
        )
        + (" This run measured the times; the trainings are stored ones." if args.retime else ""),
        out=args.out,
    )


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--work", type=Path, help="folder that keeps each finished training")
    parser.add_argument("--part", choices=("rates", "times", "trainings"), help="only this part")
    parser.add_argument(
        "--retime", action="store_true", help="times anew, trainings from the stored results"
    )
    args = parse(parser)
    if args.part and args.work is None:
        parser.error("--part leaves its results in the folder that --work names")
    if args.retime:
        if args.out is None:
            parser.error("--retime reads the results in --out; it has no quick form")
        stored = json.loads((args.out / "monarch_train.json").read_text())["tables"]
        records = restored(stored["Curves"])
        plan = dataclasses.replace(example.Plan(), **records[0]["plan"])
        store(args, records, stored["Learning rates"], timed(plan, ROUNDS))
        return
    plan = example.QUICK if args.quick else example.Plan()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    text = example.split(example.corpus())
    times = {} if args.part == "rates" else kept_times(plan, 1 if args.quick else ROUNDS, args.work)
    if args.part == "times":
        return
    rates = rate_trials(args.models if args.part == "rates" else MODELS, plan, text, args.work)
    if args.part == "rates":
        return
    # the short form times too little to plan a training by it
    faster = 1.2 if args.quick else seconds(times)[DENSE] / seconds(times)[MONARCH]
    plans = {m: dataclasses.replace(planned(m, plan, faster), lr=chosen(rates, m)) for m in MODELS}
    records = [
        trained(model, plans[model], seed, text, args.work)
        for seed in ([0] if args.quick else args.seeds)
        for model in args.models
    ]
    if args.part is None:
        store(args, records, rates, times)


if __name__ == "__main__":
    main()
