"""The planner as a partitioner: what AOTAutograd and Inductor call with a joint graph."""

from __future__ import annotations

import hashlib
import pathlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import fx
from torch._functorch.partitioners import cleanup_recompute_tags, has_recomputable_ops
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from rewriter.cost import Device
from rewriter.errors import OptionError
from rewriter.planner.apply.transform import split
from rewriter.planner.budget import MemoryBudget
from rewriter.planner.joint.reading import read_joint
from rewriter.planner.search.frontier import Frontier
from rewriter.planner.search.plan import MemoryPlan, decide

__all__ = ["InductorPartitioner", "inductor_partitioner", "partitioner"]

OnPlan = Callable[[MemoryPlan], object]


def partitioner(
    budget: Any,
    *,
    on_plan: OnPlan | None = None,
    lossy: bool = False,
    fused: bool = False,
    granted: int | None = None,
    device: Device | None = None,
) -> Callable[..., tuple[fx.GraphModule, fx.GraphModule]]:
    """A `partition_fn` for `aot_autograd`.

    Args:
        budget: as `rewrite(memory_budget=…)` takes it.
        on_plan: called with the plan of each graph.
        lossy: as of `MemoryBudget`, where `budget` is none.
        fused: the compiler fuses elementwise operations.
        granted: as of `decide`: bytes that any graph may take, and then none is refused.
        device: whose times a plan goes by; by default a datasheet's (`Pricing.of`).

    Raises:
        OptionError: an impossible budget; when it is called, one that no plan meets.
    """
    wanted = MemoryBudget.of(budget)
    if lossy and not isinstance(budget, MemoryBudget):
        wanted = MemoryBudget(peak=budget, lossy=True)

    def partition(
        module: fx.GraphModule, joint_inputs: Sequence[object], *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        start = time.perf_counter()
        refuse(module)
        if has_recomputable_ops(module):
            module = cleanup_recompute_tags(module, is_default_partition=False)
        joint = read_joint(module, num_fwd_outputs, device, fused)
        frontier = Frontier(joint, wanted.lossy_forms)
        decisions, plan = decide(joint, frontier, wanted, time.perf_counter() - start, granted)
        parts = split(module, joint, decisions, num_fwd_outputs)
        if on_plan is not None:
            on_plan(plan)
        return parts

    return partition


def refuse(module: fx.GraphModule) -> None:
    """What a plan cannot be made for.

    Raises:
        OptionError: random states are inputs of the graph, or sizes depend on data.
    """
    for node in module.graph.nodes:
        if node.op == "placeholder" and ("seed" in str(node.target) or "bwd_" in str(node.target)):
            raise OptionError(
                "memory_budget: the graph takes its random state as an input "
                "(torch._functorch.config.functionalize_rng_ops): switch that off"
            )
        value = node.meta.get("unbacked_bindings")
        if value:
            raise OptionError(
                f"memory_budget: a size depends on the data ({node.name}), so no plan can be made "
                "before it runs: leave memory_budget out for this model"
            )


def inductor_partitioner(
    budget: Any,
    *,
    on_plan: OnPlan | None = None,
    lossy: bool = False,
    device: Device | None = None,
) -> InductorPartitioner:
    """The planner for `torch.compile(…, options={"custom_partitioner_fn": …})`.

    Inductor fuses elementwise operations, so that repeating them is nearly free. It also orders
    operations itself: the peak is a prediction there, and not a promise as of
    `rewrite(memory_budget=…)`.
    """
    return InductorPartitioner(budget, on_plan=on_plan, lossy=lossy, device=device)


class InductorPartitioner(CustomPartitionerFn):
    """See `inductor_partitioner`."""

    def __init__(
        self,
        budget: Any,
        *,
        on_plan: OnPlan | None = None,
        lossy: bool = False,
        device: Device | None = None,
    ) -> None:
        self.partition = partitioner(
            budget, on_plan=on_plan, lossy=lossy, fused=True, device=device
        )
        self.budget, self.lossy, self.device = budget, lossy, device

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy has nobody to tell of its plan
        copied = partial(InductorPartitioner, lossy=self.lossy, device=self.device)
        return copied, (self.budget,)

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        return self.partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        """The budget, the device with all its figures, and the source of planner and cost model."""
        measured = None if self.device is None else self.device.measured
        given = (self.budget, self.lossy, self.device, measured)
        digest = hashlib.sha256(repr(given).encode())
        rooms = pathlib.Path(__file__).parents[2]
        for path in sorted((*rooms.glob("planner/**/*.py"), *rooms.glob("cost/**/*.py"))):
            digest.update(path.read_bytes())
        return digest.hexdigest()
