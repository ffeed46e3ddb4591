"""A memory plan at work: what a hosted model's training forward runs in place of its graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.capture.hosted import Program
from rewriter.cost import Device
from rewriter.errors import warn
from rewriter.modules.tree import hooked
from rewriter.planner.apply.partition import partitioner
from rewriter.planner.apply.trace import Traced, trace
from rewriter.planner.budget import MemoryBudget, parse_budget
from rewriter.planner.search.plan import MemoryPlan

__all__ = ["PlannedTraining"]


class PlannedTraining:
    """Runs forward and backward by a memory plan.

    A trace holds for one pattern of `requires_grad` and of training flags; others get one of their
    own, under the same budget.

    Args:
        budget: what the user asked for.
        device: whose times the plan goes by; by default a datasheet's.

    Attributes:
        plan: of the example inputs.
    """

    def __init__(self, budget: MemoryBudget, device: Device | None = None) -> None:
        self.budget, self.device = budget, device
        self.plan: MemoryPlan | None = None
        self._traces: dict[Any, list[Traced]] = {}
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {"budget": self.budget, "device": self.device, "plan": self.plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["budget"], state.get("device"))  # type: ignore[misc]
        self.plan = state["plan"]

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedTraining:
        own = PlannedTraining(self.budget, self.device)
        own.plan = self.plan
        return own

    def __call__(
        self,
        root: nn.Module,
        program: Program,
        leaves: Sequence[Tensor],
        rows: Sequence[Sequence[int | str]],
    ) -> Any:
        """The flat results of one training forward; None where the plan cannot serve the call."""
        own = hooked(root)
        if own:
            self._warn(
                f"{own} has hooks, which a memory plan would not run: the training step runs "
                "without the plan. Remove the hooks, or rewrite without memory_budget"
            )
            return None
        return self.traced(root, program, leaves, rows)(root, leaves)

    def traced(
        self,
        root: nn.Module,
        program: Program,
        leaves: Sequence[Tensor],
        rows: Sequence[Sequence[int | str]],
    ) -> Traced:
        """The trace that serves a call; made where there is none yet.

        Raises:
            OptionError: no plan meets the budget on the first inputs.
        """
        key = (
            tuple(p.requires_grad for p in root.parameters()),
            tuple(t.requires_grad for t in leaves),
            tuple(m.training for m in root.modules()),
            str(leaves[0].device) if leaves else "",
            tuple((p.dtype, p.device) for p in root.parameters()),
        )
        known = self._traces.setdefault(key, [])
        for traced in known:
            if traced.serves(leaves):
                return traced
        part = partitioner(
            self.budget, on_plan=self._planned, granted=self._granted(), device=self.device
        )
        known.append(trace(root, program, leaves, rows, part))
        return known[-1]

    def _granted(self) -> int | None:
        """Bytes that the budget came to on the example inputs: a shorter last batch, or a pattern
        of frozen parameters, is not refused in the middle of a training."""
        if self.plan is None:
            return None
        amount = parse_budget(self.budget.peak)
        return int(amount * self.plan.default_peak) if isinstance(amount, float) else amount or 0

    def _planned(self, plan: MemoryPlan) -> None:
        if self.plan is None:
            self.plan = plan

    def _warn(self, text: str) -> None:
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warn(text)
