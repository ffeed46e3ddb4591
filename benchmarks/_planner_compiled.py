"""The planner inside Inductor, beside Inductor's own partitioner: what a step saves, its peak, its
time. There elementwise operations are fused into their readers, so that repeating them is nearly
free, for PyTorch's partitioner as for the planner."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _harness import interleaved, quartiles
from _planned import Partition, Rig, difference, min_cut, quickest
from _tracker import allocator_peak
from torch import Tensor, fx
from torch._functorch import config as functorch
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from rewriter.planner.apply.transform import split
from rewriter.planner.joint.reading import read_joint
from rewriter.planner.search.frontier import Frontier, Point

Record = dict[str, Any]
Pick = Callable[[Frontier], Point | None]
UNDER = 0.75
"""Share of what min-cut saves that a plan is to be within."""


class Noted(CustomPartitionerFn):
    """A partitioner of whose forward it is noted what it saves.

    Attributes:
        saved: bytes, of what the forward makes and returns for the backward alone.
    """

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.saved = 0

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = self.partition(gm, joint_inputs, **kwargs)
        nodes = list(forward.graph.nodes)
        number = kwargs["num_fwd_outputs"]
        given = [n for n in nodes if n.op == "placeholder"] + list(nodes[-1].args[0][:number])
        known = {s._cdata for n in given for s in _storage(n)}
        saved = {s._cdata: s.nbytes() for n in nodes[-1].args[0][number:] for s in _storage(n)}
        self.saved += sum(size for key, size in saved.items() if key not in known)
        return forward, backward

    def uuid(self) -> None:
        """Nothing of this comes from a cache."""


def _storage(node: object) -> list[torch.UntypedStorage]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return [value.untyped_storage()] if isinstance(value, Tensor) else []


def planned(pick: Pick, notes: Record) -> Partition:
    """A partition by a plan that `pick` takes; what was predicted of it goes into `notes`."""

    def partition(
        module: fx.GraphModule, inputs: object, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        joint = read_joint(module, num_fwd_outputs, fused=True)
        frontier = Frontier(joint)
        point = pick(frontier) or frontier.smallest
        step = sum(s.seconds for s in joint.steps)
        notes["predicted peak"], notes["added"] = point.peak, point.seconds / step
        return split(module, joint, point.decisions, num_fwd_outputs)

    return partition


def compiled(rig: Rig, quick: bool, seconds: float) -> Record:
    """A step of a model compiled with several partitioners, in turn in one process."""
    cut = 0
    picks: dict[str, Pick | float | None] = {
        "min-cut": None,
        "torch 0.5": 0.5,
        "ours, no added time": lambda frontier: frontier.within(0),
        "ours, 25 % under min-cut": lambda frontier: quickest(frontier, UNDER * cut),
        "ours at 60 %": lambda frontier: frontier.choose(0.6 * frontier.default.peak),
    }
    if quick:
        picks = {name: picks[name] for name in ("min-cut", "ours, 25 % under min-cut")}
    exact: dict[str, Tensor] = {}
    rows: dict[str, Record] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    torch._dynamo.reset()
    for name, pick in picks.items():
        notes: Record = {}
        noted = Noted(planned(pick, notes) if callable(pick) else min_cut(pick))
        # each has a backend of its own, by which Dynamo tells their code apart; nothing of them is
        # kept on disk, where they could not be told apart
        options: Record = {"custom_partitioner_fn": noted, "fx_graph_cache": False}
        calls[name] = partial(rig.step, torch.compile(rig.plain, options=options))
        start = time.perf_counter()
        with functorch.patch(enable_autograd_cache=False):
            calls[name]()
        taken = time.perf_counter() - start
        grads = {n: p.grad for n, p in rig.plain.named_parameters() if p.grad is not None}
        exact = exact or grads
        cut = cut or noted.saved
        rig.plain.zero_grad(set_to_none=True)
        rows[name] = notes | {
            "saved": noted.saved,
            "peak": allocator_peak(calls[name]),
            "compile s": taken,
            "relative": difference(exact, grads)[1],
        }
    start = time.perf_counter()
    for call in calls.values():
        call()
    once = time.perf_counter() - start
    found = interleaved(calls, 2 if quick else max(5, min(20, round(seconds / once))), 0)
    for name, values in found.items():
        ratios = [a / b for a, b in zip(values, found["min-cut"], strict=True)]
        rows[name] |= {"ms": quartiles(values)[1] * 1e3, "ratio": quartiles(ratios)}
    return {"model": rig.case.name, "rounds": len(found["min-cut"]), "rows": rows}
