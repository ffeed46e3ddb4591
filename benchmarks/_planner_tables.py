"""Tables, figures and plots of what `planner.py` measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Kept = Mapping[str, Mapping[str, Record]]

NOTES = (
    "A peak is the most that a training step (forward, loss, backward) has alive on top of "
    "weights, buffers and inputs, gradients included, as a dispatch mode sees it; saved is what "
    "is alive between forward and backward, the loss left out. Added GFLOP: of a step, over "
    "those with everything kept (of checkpoint: over eager's), attention on the CPU counted. "
    "Budgets are shares of the peak with everything kept; where none of the plans is within, "
    "the smallest stands there. 'torch b' is PyTorch's partitioner with "
    "`activation_memory_budget=b`, 'min-cut' the same with its default; all partitions run by "
    "the same runtime, with plain kernels and no fusion. 'checkpoint' is "
    "`torch.utils.checkpoint` around every block of the user's model, in eager. 'ours at X' is "
    "the plan whose budget is X's measured peak; Beside min-cut stands the plan that saves "
    "least among those whose predicted time is no more than that predicted for min-cut's "
    "choice; '25 % under min-cut' is the fastest plan that saves so much less. Times: medians "
    "over rounds of the ratio to eager, all in turn in one process, under a C heap that keeps "
    "what is freed, as jemalloc does (`--default-heap` leaves it). 'torch with fewer FLOPs' is "
    "the first of PyTorch's budgets whose peak the planner meets with more FLOPs. Inside "
    "Inductor the partitioners stand in its `custom_partitioner_fn`, elementwise operations are "
    "fused for both, saved is what the forward returns for the backward alone, and the peak is "
    "what the profiler sees allocated. Lossy is `MemoryBudget(step_time=1.1, lossy=True)`. "
    "Dropout is on where the model has it, with the same seed for all. Planning: reading the "
    "joint graph, plans and simulation, a GPT 64 wide; the trace of AOTAutograd, with open "
    "sizes, comes before; the memory is of the whole process with PyTorch in it. Training: a "
    "byte-level GPT on the Wikipedia excerpt that gensim ships, 1,000 steps, same seed and "
    "batches. Plots: planner.png, planner_training.png."
)


def tables(kept: Kept) -> tuple[dict[str, list[Record]], str]:
    """(rows by heading, notes)."""
    memory, times = kept["memory"], kept["times"]
    found = {
        "Figures": list(figures(kept)),
        "Budgets": [row for m in memory.values() for row in budget_rows(m)],
        "PyTorch's options, and the planner at the same peak": [
            row for m in memory.values() for row in peer_rows(m)
        ],
        "Lossy": [lossy_row(m, times.get(key)) for key, m in memory.items()],
        "Step times over eager": [row for t in times.values() for row in time_rows(t)],
        "Inside Inductor": [row for c in kept["compiled"].values() for row in compiled_rows(c)],
        "Planning": [planning_row(p) for p in kept["planning"].values()],
        "Training": [training_row(t) for t in kept["training"].values()],
        "Training curves": [
            {"kind": t["kind"], "steps": t["steps"], "losses": t["losses"]}
            for t in kept["training"].values()
        ],
        "Frontiers": [
            {
                "model": m["model"],
                "plans": len(m["curve"]),
                "gap %": 100 * m["gap"],
                "seconds": m["seconds"],
                "peaks MB": [round(p / 1e6, 2) for _, p, _ in m["curve"]],
                "added time %": [round(100 * a, 3) for a, *_ in m["curve"]],
            }
            for m in memory.values()
        ],
    }
    return {name: rows for name, rows in found.items() if rows}, NOTES


# ---- rows ------------------------------------------------------------------------------------


def megabytes(size: float) -> float:
    return round(size / 1e6, 3)


def giga(flops: float) -> float:
    return round(flops / 1e9, 3)


def off(row: Record) -> float:
    return 100 * (row["predicted"] / row["peak"] - 1)


def budget_rows(m: Record) -> Iterator[Record]:
    for row in m["budgets"]:
        yield {
            "model": m["model"],
            "budget %": round(100 * row["budget"]),
            "within": "yes" if row["feasible"] else "no, smallest",
            "predicted MB": megabytes(row["predicted"]),
            "measured MB": megabytes(row["peak"]),
            "off %": round(off(row), 4),
            "% of kept": round(100 * row["peak"] / m["kept"]["peak"], 1),
            "saved MB": megabytes(row["saved"]),
            "added GFLOP": giga(row["flops"]),
            "predicted time %": round(100 * row["added"], 2),
            "largest gradient difference": row["difference"],
        }


def peers(m: Record) -> Iterator[tuple[str, Record, Record | None]]:
    """(name, PyTorch's option, the plan to compare with)."""
    yield "eager", m["eager"], m["kept"]
    yield "min-cut", m["min-cut"], m["at min-cut's time"]
    for row in m["torch"]:
        yield f"torch {row['budget']:g}", row, row["ours"]
    yield "checkpoint", m["checkpoint"], m["at checkpoint's peak"]


def peer_rows(m: Record) -> Iterator[Record]:
    for name, row, ours in peers(m):
        failed = "error" in row
        none = "–" if failed else "none so small"
        yield {
            "model": m["model"],
            "what": name,
            "peak MB": "fails" if failed else megabytes(row["peak"]),
            "saved MB": "–" if failed else megabytes(row["saved"]),
            "added GFLOP": "–" if failed else giga(row["flops"]),
            "cosine of the gradients": row["error"] if failed else round(row["cosine"], 6),
            "ours: peak MB": none if ours is None else megabytes(ours["peak"]),
            "ours: saved MB": "–" if ours is None else megabytes(ours["saved"]),
            "ours: added GFLOP": "–" if ours is None else giga(ours["flops"]),
        }


def lossy_row(m: Record, t: Record | None) -> Record:
    row = m["lossy"]
    return {
        "model": m["model"],
        "saved MB": megabytes(row["saved"]),
        "eager saved MB": megabytes(m["eager"]["saved"]),
        "times less": m["eager"]["saved"] / row["saved"],
        "peak MB": megabytes(row["peak"]),
        "eager peak MB": megabytes(m["eager"]["peak"]),
        "off %": round(off(row), 4),
        "predicted time %": round(100 * row["added"], 2),
        "values packed": ", ".join(f"{n} {k}" for k, n in row["packed"].items()) or "none",
        "relative error of the gradients": row["relative"],
        "cosine": round(row["cosine"], 6),
        "declined": ", ".join(
            f"{'+'.join(d['forms'])}: {m['eager']['saved'] / d['saved']:.2f} times less, error "
            f"{d['relative']:.3f}"
            for d in row["declined"]
        )
        or "–",
        "rewrite": "refuses it" if row["refused"] else "takes it",
        "time over eager": t["ratio"]["ours, lossy"][1]
        if t is not None and "ours, lossy" in t["ratio"]
        else "–",
    }


def time_rows(t: Record) -> Iterator[Record]:
    for name, (low, ratio, high) in t["ratio"].items():
        yield {
            "model": t["model"],
            "what": name,
            "median ms": t["ms"][name],
            "time over eager": ratio,
            "quartiles": f"{low:.3f} – {high:.3f}",
            "rounds": t["rounds"],
        }


def compiled_rows(c: Record) -> Iterator[Record]:
    base = c["rows"]["min-cut"]
    for name, row in c["rows"].items():
        low, ratio, high = row["ratio"]
        yield {
            "model": c["model"],
            "partitioner": name,
            "saved MB": megabytes(row["saved"]),
            "over min-cut's": row["saved"] / base["saved"],
            "peak MB": megabytes(row["peak"]),
            "predicted MB": megabytes(row["predicted peak"]) if "predicted peak" in row else "–",
            "time over min-cut's": ratio,
            "quartiles": f"{low:.3f} – {high:.3f}",
            "off min-cut's gradients": row["relative"],
            "rounds": c["rounds"],
        }


def planning_row(p: Record) -> Record:
    return {
        "layers": p["layers"],
        "planning s": p["seconds"],
        "with the trace s": p["with the trace"],
        "whole rewrite s": p["rewrite"],
        "rewrite without a plan s": p["rewrite without"],
        "GB of the process": p["bytes"] / 1e9,
        "GB before planning": p["bytes before"] / 1e9,
        "values": p["values"],
        "plans": p["plans"],
        "gap %": 100 * p["gap"],
    }


def training_row(t: Record) -> Record:
    counts = t.get("counts")
    return {
        "kind": t["kind"],
        "steps": t["steps"][-1],
        "validation loss": t["losses"][-1],
        "values": "–" if counts is None else ", ".join(f"{n} {k}" for k, n in counts.items()),
        "saved, times less": "–" if counts is None else t["default"] / t["saved"],
        "gradient error": "–" if counts is None else t["gradient error"],
    }


# ---- figures ---------------------------------------------------------------------------------


def figures(kept: Kept) -> Iterator[Record]:
    def say(figure: str, found: object, wanted: str) -> Record:
        return {"figure": figure, "found": found, "wanted": wanted}

    memory, times = list(kept["memory"].values()), list(kept["times"].values())
    if memory:
        yield from (say(*row) for row in promises(memory))
        yield from (say(*row) for row in comparisons(memory))
        yield from (say(*row) for row in lossy_figures(memory))
    if times:
        yield from (say(*row) for row in time_figures(times))
    for c in kept["compiled"].values():
        base, ours = c["rows"]["min-cut"], c["rows"]["ours, 25 % under min-cut"]
        less = 100 * (1 - ours["saved"] / base["saved"])
        yield say(f"inside Inductor, saved less than min-cut, %: {c['model']}", less, "≥ 25")
        yield say(f"time of that over min-cut's: {c['model']}", ours["ratio"][1], "≤ 1")
    for p in kept["planning"].values():
        most = 60 if p["layers"] > 12 else 10
        yield say(f"seconds of planning, {p['layers']} layers", p["seconds"], f"≤ {most}")
        whole = p["with the trace"]
        yield say(f"the same with AOTAutograd's trace, {p['layers']} layers", whole, "–")
        yield say(f"GB of the process, {p['layers']} layers", p["bytes"] / 1e9, "≤ 2")
    trained = kept["training"]
    if {"exact", "lossy"} <= set(trained):
        exact, lossy = (trained[k]["losses"][-1] for k in ("exact", "lossy"))
        steps = trained["exact"]["steps"][-1]
        yield say(
            f"loss after {steps} steps with 8-bit activations, over the exact one, %",
            100 * (lossy / exact - 1),
            "within ± 0.5",
        )


Figure = tuple[str, object, str]


def promises(memory: list[Record]) -> Iterator[Figure]:
    """What the planner says of itself."""
    rows = [row for m in memory for row in m["budgets"]]
    yield "budgets tried, lossless", len(rows), f"{len(memory)} models"
    equal = sum(r["difference"] == 0 for r in rows)
    yield "gradients bit-equal to eager's", f"{equal} of {len(rows)}", "all, at tolerance"
    yield "largest difference of a gradient", max(r["difference"] for r in rows), "tolerance"
    planned = rows + [m["lossy"] for m in memory]
    planned += [r["ours"] for m in memory for r in m["torch"] if r["ours"] is not None]
    worst = max(abs(off(r)) for r in planned)
    yield f"largest error of {len(planned)} predicted peaks, %", worst, "≤ 1"
    within = [r for r in rows if r["feasible"]]
    kept = sum(r["peak"] <= r["bytes"] for r in within)
    yield "measured peak within the budget", f"{kept} of {len(within)} feasible", "all"
    rising = sum(
        b["peak"] > a["peak"]
        for m in memory
        for a, b in zip(m["budgets"], m["budgets"][1:], strict=False)
    )
    yield "smaller budgets with a higher peak", rising, "0"
    torchs = [(a, b) for m in memory for a, b in zip(m["torch"], m["torch"][1:], strict=False)]
    higher = sum(a.get("peak", math.inf) < b.get("peak", 0) for a, b in torchs)
    yield "the same, of PyTorch's budgets", f"{higher} of {len(torchs)}", "–"
    lowest = [f"{100 * min(p for _, p, _ in m['curve']) / m['kept']['peak']:.0f}" for m in memory]
    yield "smallest feasible budgets, %", ", ".join(lowest), "–"


def comparisons(memory: list[Record]) -> Iterator[Figure]:
    """Against PyTorch's options, in memory and FLOPs."""
    tried = [r for m in memory for r in m["torch"]]
    points = [(r, r["ours"]) for r in tried if "error" not in r]
    yield "PyTorch's budgets that fail", f"{len(tried) - len(points)} of {len(tried)}", "–"
    wrong = sum(r["cosine"] < 0.999 for r, _ in points)
    yield "PyTorch's budgets with wrong gradients (cosine below 0.999)", wrong, "–"
    yield "PyTorch's budgets compared at equal measured peak", len(points), "–"
    lost = [r for r, ours in points if ours is None]
    yield "of these, peaks that no plan of ours reaches", len(lost), "0"
    pairs = [(r["flops"], o["flops"]) for r, o in points if o is not None]
    idle = [1 for theirs, ours in pairs if theirs == ours == 0]
    yield "of these, neither recomputes a FLOP (left out below)", len(idle), "–"
    pairs = [(theirs, ours) for theirs, ours in pairs if theirs or ours]
    more = sum(ours > theirs for theirs, ours in pairs)
    yield "ours recomputes more FLOPs", f"{more} of {len(pairs)}", "0"
    none = sum(ours == 0 for _, ours in pairs)
    yield "ours recomputes none where PyTorch's does", f"{none} of {len(pairs)}", "–"
    both = [ours / theirs for theirs, ours in pairs if theirs and ours]
    if both:
        mean = math.exp(sum(map(math.log, both)) / len(both))
        yield (
            f"recomputed FLOPs, ours over PyTorch's, geometric mean of the {len(both)} with both",
            mean,
            "≤ 0.8",
        )
    if pairs:
        yield (
            f"recomputed FLOPs, ours over PyTorch's, summed over all {len(pairs)}",
            sum(o for _, o in pairs) / max(sum(t for t, _ in pairs), 1),
            "≤ 0.8",
        )
    right = [(r["flops"], o["flops"]) for r, o in points if o is not None and r["cosine"] > 0.999]
    right = [(theirs, ours) for theirs, ours in right if theirs or ours]
    more = sum(ours > theirs for theirs, ours in right)
    yield (
        "where PyTorch's gradients are right: ours recomputes more",
        f"{more} of {len(right)}",
        "0",
    )
    if right:
        yield (
            f"recomputed FLOPs, ours over PyTorch's, summed over these {len(right)}",
            sum(o for _, o in right) / max(sum(t for t, _ in right), 1),
            "≤ 0.8",
        )
    twins = [(m["checkpoint"], m["at checkpoint's peak"]) for m in memory]
    less = sum(o is not None and o["peak"] <= c["peak"] for c, o in twins)
    yield "models with a plan within per-block checkpoint's peak", f"{less} of {len(twins)}", "all"
    fewer = sum(o is not None and o["flops"] < c["flops"] for c, o in twins)
    yield "of these, with fewer FLOPs", f"{fewer} of {len(twins)}", "all"
    for m in memory:
        share = 100 * (1 - m["at min-cut's time"]["saved"] / m["min-cut"]["saved"])
        yield f"saved less than min-cut in no more predicted time, %: {m['model']}", share, "≥ 25"
        under = m["under min-cut"]
        more = "none" if under is None else 100 * (under["added"] - m["min-cut"]["added"])
        yield f"predicted time for 25 % less than min-cut, % of a step: {m['model']}", more, "0"


def lossy_figures(memory: list[Record]) -> Iterator[Figure]:
    for m in memory:
        if m["lossy"]["refused"]:
            yield f"lossy: refused, the gradients' error: {m['model']}", m["lossy"]["relative"], "–"
        else:
            less = m["eager"]["saved"] / m["lossy"]["saved"]
            yield f"lossy: times less saved: {m['model']}", less, "≥ 2.5"
    taken = [m["lossy"]["cosine"] for m in memory if not m["lossy"]["refused"]]
    if taken:
        yield "lossy: smallest cosine of the gradients with eager's", min(taken), "≥ 0.999"


def time_figures(times: list[Record]) -> Iterator[Figure]:
    def each(name: str, wanted: str) -> Iterator[Figure]:
        for t in times:
            if name in t["ratio"]:
                yield f"time over eager, {name}: {t['model']}", t["ratio"][name][1], wanted

    yield from each("ours at 60 %", "≤ 1.05")
    yield from each("ours at 35 %", "≤ 1.2")
    yield from each("ours, lossy", "≤ 1.1")
    for ours, theirs in (
        ("ours at checkpoint's peak", "checkpoint"),
        ("ours, 25 % under min-cut", "min-cut"),
        ("ours with more FLOPs", "torch with fewer FLOPs"),
    ):
        pairs = [
            (t["model"], t["ratio"][ours][1] / t["ratio"][theirs][1])
            for t in times
            if ours in t["ratio"]
        ]
        for model, ratio in pairs:
            yield f"time of {ours} over {theirs}: {model}", ratio, "≤ 1"


# ---- plots -----------------------------------------------------------------------------------


def pareto_plots(kept: Kept, path: Path) -> None:
    """Peak over added FLOPs, a panel for each model: all plans, and PyTorch's options."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(kept["memory"].values())
    if not models:
        return
    rows = -(-len(models) // 3)
    figure, grid = pyplot.subplots(rows, 3, figsize=(14, 4 * rows), squeeze=False)
    for axes in grid.flat[len(models) :]:
        axes.set_axis_off()
    for m, axes in zip(models, grid.flat, strict=False):
        points = sorted((flops / 1e9, peak / 1e6) for _, peak, flops in m["curve"])
        axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=1, label="plans of the planner")
        torchs = [(r["flops"] / 1e9, r["peak"] / 1e6) for r in m["torch"] if "peak" in r]
        xs, ys = [x for x, _ in torchs], [y for _, y in torchs]
        axes.plot(xs, ys, "x", color="C1", label="activation_memory_budget")
        marks = (("eager", "s", "C7"), ("min-cut", "^", "C3"), ("checkpoint", "D", "C2"))
        for name, mark, color in marks:
            row = m[name]
            axes.plot(row["flops"] / 1e9, row["peak"] / 1e6, mark, color=color, label=name)
        axes.axhline(m["gradients"] / 1e6, color="grey", lw=0.8, ls=":", label="gradients alone")
        axes.set(title=m["model"], xlabel="recomputed GFLOP", ylabel="peak, MB", ylim=(0, None))
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    grid.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def curves_plot(kept: Kept, path: Path) -> None:
    """Validation loss by step, exact and lossy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not kept["training"]:
        return
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for t in kept["training"].values():
        name = "everything exact" if t["kind"] == "exact" else "activations in 8 bits"
        axes.plot(t["steps"], t["losses"], label=name, lw=1)
    axes.set(xlabel="step", ylabel="validation loss, nats per byte")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
