"""The memory planner against what PyTorch offers: memory, recomputed FLOPs, time, and a training.

Parts, each kept under `--work` when it is done, model by model, so that a run may be cut off:

- `memory`: one training step watched by a dispatch mode, for the planner's budgets from 100 to
  10 %, PyTorch's default min-cut, its `activation_memory_budget`, and `torch.utils.checkpoint`
  around every block; with the gradients of each against those of the model as its user wrote it.
- `times`: seconds of a step of a few of these, in turn in one process; where `memory` is done.
- `compiled`: the same inside Inductor, whose own partitioner is the base: what is saved, the peak
  as the profiler records it, the time.
- `planning`: seconds and memory that planning takes, in a process of its own; the trace of forward
  and backward, which is PyTorch's work, apart.
- `training`: 1,000 steps on real text, exact and with 8-bit activations.

A run makes the tables of all that is there.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import (
    KEPT_HEAP,
    ROOT,
    arguments,
    command,
    interleaved,
    keep_the_heap,
    load_script,
    parse,
    quartiles,
    write_results,
)
from _planned import CASES, LOSSY, Measured, Partition, Rig, difference, min_cut, quickest
from _planner_compiled import UNDER, compiled
from _planner_tables import curves_plot, pareto_plots, tables

from rewriter import MemoryBudget, rewrite
from rewriter.planner.apply.trace import Traced
from rewriter.planner.search.frontier import Frontier, Point

BUDGETS = tuple(x / 10 for x in range(10, 0, -1))
TORCH_BUDGETS = tuple(x / 10 for x in range(9, 0, -1))
LAYERS = (12, 96)
COMPILED = ("minilm", "gpt", "quadratic")
BOUND = MemoryBudget(1.0).gradient_error
Record = dict[str, Any]

# ---- memory ----------------------------------------------------------------------------------


class Steps:
    """One watched step of each variant; a graph that was run already is not run again."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.eager = rig.measure()
        self.known: dict[str, Record] = {}
        self.kept = rig.measure(rig.trace(rig.planned(rig.frontier().default))).flops

    def row(self, measured: Measured, eager: bool = False) -> Record:
        """Args: eager: it ran the user's own Python, whose backward may do more than a graph's."""
        largest, relative, cosine = difference(self.eager.grads, measured.grads)
        return {
            "peak": measured.peak,
            "saved": measured.saved,
            "flops": measured.flops - (self.eager.flops if eager else self.kept),
            "difference": largest,
            "relative": relative,
            "cosine": cosine,
            "loss": abs(measured.loss - self.eager.loss),
        }

    def of(self, partition: Partition) -> Record:
        traced = self.rig.trace(partition)
        code = self.rig.code
        if code not in self.known:
            self.known[code] = self.row(self.rig.measure(traced))
        return dict(self.known[code])

    def peer(self, partition: Partition) -> Record:
        """The same of a partition that is not ours, and may fail."""
        try:
            return self.of(partition)
        except RuntimeError as error:
            return {"error": str(error).partition(":")[0].splitlines()[0]}

    def planned(self, point: Point, lossy: tuple[str, ...] = ()) -> Record:
        row = self.of(self.rig.planned(point, lossy))
        step = sum(s.seconds for s in self.rig.frontier().joint.steps)
        return row | {"predicted": point.peak, "added": point.seconds / step}


def chosen(frontier: Frontier, share: float) -> tuple[Point, bool]:
    """(the plan for this share of the default peak or else the smallest, whether it is within)."""
    point = frontier.choose(share * frontier.default.peak)
    return (frontier.smallest, False) if point is None else (point, True)


def least_saved(frontier: Frontier, seconds: float) -> Point:
    """The plan that saves least among those that add no more than so many seconds."""
    found = [p for p in frontier.found.values() if p.seconds <= seconds * 1.0001]
    return min(found or frontier.points[:1], key=lambda p: (p.simulation.saved, p.seconds))


def lossy_plan(frontier: Frontier) -> Point:
    """What `MemoryBudget(step_time=1.1, lossy=True)` asks for, before the gradients are checked."""
    return frontier.within(0.1 * sum(s.seconds for s in frontier.joint.steps))


def lossy_row(steps: Steps) -> Record:
    """What it gets: where the gradients are too far off, the form that loses most is left out."""
    forms, declined = LOSSY, []
    while True:
        point = lossy_plan(steps.rig.frontier(forms))
        row = steps.planned(point, forms)
        packed = [p.kind for p in point.decisions.packed.values()]
        row["packed"] = {kind: packed.count(kind) for kind in sorted(set(packed))}
        row["forms"], row["declined"] = list(forms), declined
        row["refused"] = row["relative"] > BOUND  # as `rewrite` then does
        if not row["refused"] or len(forms) == 1:
            return row
        declined = [row]
        forms = forms[:1]


def memory(key: str, quick: bool) -> Record:
    """Everything about a model that can be counted."""
    rig = Rig(CASES[key], quick)
    start = time.perf_counter()
    frontier = rig.frontier()
    seconds = time.perf_counter() - start
    steps = Steps(rig)
    total = sum(s.seconds for s in frontier.joint.steps)
    found: Record = {
        "model": rig.case.name,
        "gradients": rig.gradients(),
        "eager": steps.row(steps.eager, eager=True),
        "kept": steps.planned(frontier.default),
        "seconds": seconds,
        "gap": frontier.gap,
        "curve": [(p.seconds / total, p.peak, p.simulation.flops) for p in frontier.points],
    }
    found["budgets"] = []
    for share in BUDGETS[::3] if quick else BUDGETS:
        point, feasible = chosen(frontier, share)
        budget = share * frontier.default.peak
        row = {"budget": share, "bytes": budget, "feasible": feasible}
        found["budgets"].append(row | steps.planned(point))
    added = rig.added(min_cut(None))
    found["min-cut"] = steps.of(min_cut(None)) | {"added": added / total}
    found["at min-cut's time"] = steps.planned(least_saved(frontier, added))
    under = quickest(frontier, UNDER * found["min-cut"]["saved"])
    found["under min-cut"] = None if under is None else steps.planned(under)
    found["torch"] = []
    for share in TORCH_BUDGETS[::4] if quick else TORCH_BUDGETS:
        row = {"budget": share} | steps.peer(min_cut(share))
        twin = frontier.choose(row.get("peak", 0))
        row["ours"] = None if twin is None else steps.planned(twin)
        found["torch"].append(row)
    with rig.checkpointed():
        found["checkpoint"] = steps.row(rig.measure(), eager=True)
    twin = frontier.choose(found["checkpoint"]["peak"])
    found["at checkpoint's peak"] = None if twin is None else steps.planned(twin)
    found["lossy"] = lossy_row(steps)
    return found


# ---- times -----------------------------------------------------------------------------------


def times(key: str, quick: bool, seconds: float, counted: Record) -> Record:
    """Milliseconds of a step of a few variants, and their ratios to the user's model, by round.

    Args:
        counted: what `memory` found of this model.
    """
    rig = Rig(CASES[key], quick)
    forms = tuple(counted["lossy"]["forms"])
    frontier, lossy = rig.frontier(), rig.frontier(forms)
    checkpoint = counted["checkpoint"]["peak"]
    cut = counted["min-cut"]["saved"]
    picks: dict[str, tuple[Point | None, tuple[str, ...]]] = {
        "ours at 60 %": (chosen(frontier, 0.6)[0], ()),
        "ours at 35 %": (chosen(frontier, 0.35)[0], ()),
        "ours, 25 % under min-cut": (quickest(frontier, UNDER * cut), ()),
        "ours at checkpoint's peak": (frontier.choose(checkpoint), ()),
        "ours, lossy": (None if counted["lossy"]["refused"] else lossy_plan(lossy), forms),
    }
    traced = {
        name: rig.trace(rig.planned(point, lossy_forms))
        for name, (point, lossy_forms) in picks.items()
        if point is not None
    }
    traced["min-cut"] = rig.trace(min_cut(None))
    # where PyTorch recomputes fewer FLOPs than the planner, which goes by seconds
    dearer = [r for r in counted["torch"] if r.get("ours") and r["ours"]["flops"] > r["flops"]]
    for row in dearer[:1]:
        traced["torch with fewer FLOPs"] = rig.trace(min_cut(row["budget"]))
        twin = frontier.choose(row["peak"])
        assert twin is not None
        traced["ours with more FLOPs"] = rig.trace(rig.planned(twin))

    def checkpointed() -> None:
        with rig.checkpointed():
            rig.step(rig.plain)

    def runner(one: Traced) -> Callable[[], object]:
        return lambda: rig.run(one)

    calls: dict[str, Callable[[], object]] = {
        "eager": lambda: rig.step(rig.plain),
        "checkpoint": checkpointed,
        **{name: runner(one) for name, one in traced.items()},
    }
    for _ in range(2):  # the second time nothing is new
        start = time.perf_counter()
        for call in calls.values():
            call()
        once = time.perf_counter() - start
    found = interleaved(calls, 2 if quick else max(5, min(15, round(seconds / once))), 0)
    ratios = {
        name: quartiles([a / b for a, b in zip(values, found["eager"], strict=True)])
        for name, values in found.items()
    }
    return {
        "model": rig.case.name,
        "rounds": len(found["eager"]),
        "ms": {name: quartiles(values)[1] * 1e3 for name, values in found.items()},
        "ratio": ratios,
    }


def inside_inductor(key: str, quick: bool, seconds: float) -> Record:
    return compiled(Rig(CASES[key], quick), quick, seconds)


# ---- planning --------------------------------------------------------------------------------


def planning(layers: int, quick: bool) -> Record:
    """Seconds that planning takes, and the memory of a process that does nothing else."""
    own = {name: value for name, value in os.environ.items() if name not in KEPT_HEAP}
    environment = {**own, "PLANNER_BENCH_LAYERS": str(layers)}
    arguments = [sys.executable, __file__, "--part", "plan-here", *(["--quick"] if quick else [])]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    record: Record = json.loads(done.stdout.splitlines()[-1])
    return record


def plan_here(layers: int) -> Record:
    example = load_script("examples/train_in_budget.py")
    torch.manual_seed(0)
    model = example.GPT(width=64, depth=layers, context=64)
    tokens = torch.randint(0, 256, (4, 65))
    start = time.perf_counter()
    made = rewrite(model, [], tokens)
    captured = time.perf_counter() - start
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    rewrite(model, [], tokens)
    again = time.perf_counter() - start
    start = time.perf_counter()
    made = rewrite(model, [], tokens, memory_budget=MemoryBudget(step_time=1.3))
    whole = time.perf_counter() - start
    plan = vars(made)["_rewriter"].memory.plan
    return {
        "layers": layers,
        "seconds": plan.solving,
        "with the trace": plan.seconds,
        "rewrite": whole,
        "rewrite without": min(captured, again),
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes before": before * 1024,
        "gap": plan.gap,
        "plans": len(plan.curve),
        "values": len(plan.values),
    }


# ---- training --------------------------------------------------------------------------------


def training(kind: str, quick: bool) -> Record:
    """A training on real text: the model of `examples/train_monarch.py`, dense."""
    example = load_script("examples/train_monarch.py")
    if quick:
        # as deep as the long form: of one layer the logits are most of the peak
        plan = dataclasses.replace(example.QUICK, depth=3)
    else:
        plan = dataclasses.replace(
            example.Plan(), width=256, depth=3, context=128, batch=4, steps=1000, evaluate=50
        )
    torch.manual_seed(0)
    model = example.GPT(plan)
    batch = torch.zeros(plan.batch, plan.context, dtype=torch.long)
    text = example.split(example.corpus())
    batch = next(example.batches(text[0], plan, 0))[0]
    record: Record = {"kind": kind}
    if kind != "exact":
        budget = MemoryBudget(step_time=1.5, lossy=True, forms=("int8",))
        model = rewrite(model, [], batch, memory_budget=budget)
        decided = vars(model)["_rewriter"].memory.plan
        record |= {
            "counts": decided.counts(),
            "saved": decided.saved,
            "default": decided.default_saved,
            "gradient error": decided.gradient_error,
        }
    run = example.train(model, text, plan, 0)
    return record | {
        "plan": dataclasses.asdict(plan),
        "steps": [step for _, step, _ in run.curve],
        "losses": [round(loss, 6) for *_, loss in run.curve],
    }


# ---- all -------------------------------------------------------------------------------------


Kept = dict[str, dict[str, Record]]


def jobs(args: Any, kept: Kept) -> Iterator[tuple[str, str, Callable[[], Record]]]:
    """(part, name, work) of all that was asked for."""
    keys = (args.only or ["gpt", "quadratic"]) if args.quick else list(CASES)
    for key in keys:
        yield "memory", key, partial(memory, key, args.quick)
    for key in keys:
        if key in kept["memory"]:
            counted = kept["memory"][key]
            yield "times", key, partial(times, key, args.quick, args.seconds, counted)
    for key in ("gpt",) if args.quick else COMPILED:
        yield "compiled", key, partial(inside_inductor, key, args.quick, args.seconds)
    for layers in (2,) if args.quick else LAYERS:
        yield "planning", str(layers), partial(planning, layers, args.quick)
    for kind in ("exact", "lossy"):
        yield "training", kind, partial(training, kind, args.quick)


def main() -> None:
    parser = arguments(__doc__ or "")
    parts = ("memory", "times", "compiled", "planning", "training", "plan-here")
    parser.add_argument("--part", nargs="*", choices=parts, help="default: all")
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="models; default: all")
    parser.add_argument("--work", type=Path, help="where finished parts are kept (build/planner)")
    parser.add_argument("--fresh", action="store_true", help="runs again what is kept")
    parser.add_argument("--seconds", type=float, default=80.0, help="of timed steps, per model")
    parser.add_argument("--default-heap", action="store_true", help="leave malloc as it is")
    args = parse(parser)
    if not args.default_heap and not args.quick and args.part != ["plan-here"]:
        keep_the_heap()
    if args.part == ["plan-here"]:
        print(json.dumps(plan_here(int(os.environ["PLANNER_BENCH_LAYERS"]))))
        return
    work = args.work or (None if args.quick else ROOT / "build" / "planner")
    kept: Kept = {p: {} for p in parts[:-1]}
    for part, name, run in jobs(args, kept):
        path = None if work is None else work / f"{part}-{name}.json"
        wanted = not args.part or part in args.part
        wanted &= not args.only or name not in CASES or name in args.only
        if path is not None and path.exists() and not (args.fresh and wanted):
            kept[part][name] = json.loads(path.read_text())
        elif wanted:
            start = time.perf_counter()
            record = json.loads(json.dumps(run()))
            gc.collect()
            kept[part][name] = record
            print(f"{part} {name}: {time.perf_counter() - start:.0f} s", flush=True)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record))
    found, notes = tables(kept)
    write_results(
        "planner",
        "The memory planner against PyTorch's own options",
        found,
        command=command(),
        notes=notes,
        out=args.out,
    )
    if args.out is not None:
        pareto_plots(kept, args.out / "planner.png")
        curves_plot(kept, args.out / "planner_training.png")


if __name__ == "__main__":
    main()
