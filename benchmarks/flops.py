"""FLOPs of an inference and of a training step, against `FlopCounterMode` on a real run.

Every architecture of the zoo, at tiny size with random weights: its graphs are priced, and really
run, forward and backward, under PyTorch's own counter. Where the model was captured whole, it is
the user's model that runs; where by parts, the parts. What PyTorch's counter leaves at 0 (attention
on a CPU, matrix-vector products, int8 and recurrent kernels) is listed by op.
"""

from __future__ import annotations

import gc
import re
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from _harness import arguments, command, parse, write_results
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from zoo import Entry, entries

from rewriter.capture import Capture, capture
from rewriter.cost import Work, model_cost, step_cost
from rewriter.errors import RewriteError


@dataclass
class Figures:
    """What one architecture costs, priced and counted; sums over its parts."""

    inference: int = 0
    inference_counted: int = 0
    inference_real: int = 0
    training: int = 0
    training_counted: int = 0
    training_real: int = 0
    unpriced: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    without: int = 0
    beyond: Counter[str] = field(default_factory=Counter)

    def note(self, errors: list[str], work: tuple[Work, ...], beyond: bool) -> None:
        for line in errors:
            if found := re.match(r"no cost formula for (\S+)", line):
                self.unpriced.add(found[1])
        for one in work if beyond else ():
            if one.flops:
                self.beyond[one.op] += one.flops * one.count


def ends(out: Any) -> list[Tensor]:
    """Where the backward starts: the loss if there is one, else all differentiable results."""
    values = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.grad_fn is not None]
    return [t for t in values if not t.dim()][:1] or list({id(t): t for t in values}.values())


def counted(model: Any, args: Any, kwargs: Any, *, backward: bool) -> int:
    """What `FlopCounterMode` counts of a real run."""
    try:
        return _counted(model, args, kwargs, backward=backward, gradients=backward)
    except AssertionError:  # its module tracker wants gradients where layers get views of weights
        return _counted(model, args, kwargs, backward=backward, gradients=True)


def _counted(model: Any, args: Any, kwargs: Any, *, backward: bool, gradients: bool) -> int:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
        out = model(*args, **kwargs)
        if isinstance(out, dict):
            out = dict(out)
        if backward and (found := ends(out)):
            torch.autograd.backward(found, [torch.ones_like(t) for t in found])
    return counter.get_total_flops()


def survey(model: nn.Module, inputs: dict[str, Tensor], captured: Capture) -> Figures:
    """Prices the graphs of a captured model, and runs the user's own `model`, or the parts; a part
    counts once, however often it runs."""
    found = Figures()
    whole = captured.rung == "export"
    for region in captured.regions:
        assert region.leaves is not None
        module = captured.root.get_submodule(region.prefix)
        for mode in (False, True):
            graph = region.graphs.get(mode)
            if graph is None:
                found.without += 1
                continue
            try:
                if whole:
                    model.train(mode)
                    real = counted(model, (), inputs, backward=mode)
                else:
                    module.train(mode)
                    run = fx.Interpreter(module, graph=graph).run
                    real = counted(run, region.leaves, {}, backward=mode)
            except RuntimeError as error:  # a part alone may return what only its model can use
                found.refused.append(f"{region.prefix}: {str(error).partition('.')[0]}")
                continue
            regions = [(region.prefix, graph, region.leaves)]
            if mode:
                step = step_cost(captured.root, regions)
                found.note(step.errors, () if step.training is None else step.training.work, True)
                found.training += 0 if step.training is None else step.training.flops
                found.training_counted += step.counted_by_torch
                found.training_real += real if step.training is not None else 0
            else:
                cost = model_cost(captured.root, regions, training=False)
                found.note(cost.errors, (), False)
                found.inference += cost.total.flops
                found.inference_counted += cost.counted_by_torch
                found.inference_real += real
    return found


def run(entry: Entry) -> tuple[dict[str, Any], Figures]:
    """One row of the table."""
    torch.manual_seed(0)
    model, inputs = entry.build(), entry.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captured = capture(model, inputs)
        try:
            found = survey(entry.build(), inputs, captured)
        except RewriteError as error:
            found = Figures(failures=[f"{type(error).__name__}: {str(error).splitlines()[0]}"])
    row = {
        "model": entry.name,
        "captured": "whole" if captured.rung == "export" else f"{len(captured.regions)} parts",
        "inference": found.inference,
        "what torch counts": found.inference_counted,
        "FlopCounterMode": found.inference_real,
        "training": found.training,
        "of it torch counts": found.training_counted,
        "FlopCounterMode, forward + backward": found.training_real,
        "unpriced": ", ".join(sorted(found.unpriced)) or "–",
        "no train graph": found.without,
        "failed": "; ".join(found.failures) or "–",
        "a part that PyTorch itself cannot train alone": "; ".join(found.refused) or "–",
    }
    return row, found


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="*", help="names of the zoo")
    args = parse(parser)
    rows: list[dict[str, Any]] = []
    beyond: Counter[str] = Counter()
    for entry in entries(args.only, quick=args.quick):
        start = time.perf_counter()
        row, found = run(entry)
        rows.append(row)
        beyond += found.beyond
        print(f"{entry.name}: {time.perf_counter() - start:.1f} s {row}", flush=True)
        gc.collect()
    trained = [r for r in rows if r["training"]]
    summary = [
        {"what": "architectures", "figure": len(rows)},
        {"what": "that could not be priced", "figure": sum(r["failed"] != "–" for r in rows)},
        {"what": "with an op without formula", "figure": sum(r["unpriced"] != "–" for r in rows)},
        {
            "what": "inference: FLOPs differ from FlopCounterMode",
            "figure": sum(r["what torch counts"] != r["FlopCounterMode"] for r in rows),
        },
        {"what": "with a train graph, of the whole or of parts", "figure": len(trained)},
        {
            "what": "training: FLOPs differ from FlopCounterMode",
            "figure": sum(
                r["of it torch counts"] != r["FlopCounterMode, forward + backward"] for r in rows
            ),
        },
    ]
    shares = [
        {"op": op, "GFLOP, forward + backward": round(flops / 1e9, 6)}
        for op, flops in beyond.most_common()
    ]
    write_results(
        "flops",
        "FLOPs: the ledger and FlopCounterMode",
        {
            "Summary": summary,
            "FLOPs of the training steps by op": shares,
            "Every architecture": rows,
        },
        command=command(),
        notes="FLOPs of one inference and of one training step (forward and backward) at tiny "
        "sizes. A model without a train graph draws random numbers in Python or branches on data "
        "in train mode; without one, nothing of its training is compared. Parts that one forward "
        "calls repeatedly are compared once, and train alone: without gradients of their inputs.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
