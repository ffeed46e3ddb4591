"""A memory plan at work: what a hosted model's training forward runs in place of its graph."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from rewriter.capture.hosted import Program
from rewriter.cost import Device
from rewriter.errors import OptionError, warn
from rewriter.modules.quiet import TRACING
from rewriter.planner.apply.assumed import assumed, changed, foreign_hooks, transformed
from rewriter.planner.apply.partition import partitioner
from rewriter.planner.apply.trace import Traced, trace
from rewriter.planner.budget import MemoryBudget, parse_budget
from rewriter.planner.search.plan import MemoryPlan

__all__ = ["PlannedTraining"]

_log = logging.getLogger(__name__)
_clock = itertools.count()

MOST = 16
"""Traces that are kept; the one that was not used for longest goes first."""


@dataclass
class _Known:
    """A trace, and when it may be used again."""

    graph: fx.Graph
    assumed: dict[str, Any]
    traced: Traced
    plan: MemoryPlan | None
    shapes: list[tuple[int, ...]]
    used: int = 0

    def holds(self, leaves: Sequence[Tensor]) -> bool:
        """Whether no input is larger than what the plan was made for."""
        return all(
            n <= own
            for leaf, row in zip(leaves, self.shapes, strict=True)
            for n, own in zip(leaf.shape, row, strict=True)
        )


class PlannedTraining:
    """Runs forward and backward by a memory plan.

    A trace holds for what it took for granted about the model (`assumed`); where that changes, the
    step is planned anew, under the same budget. Threads may train at the same time: one of them
    plans, and each step's state is its own.

    Args:
        budget: what the user asked for.
        device: whose times the plan goes by; by default a datasheet's.

    Attributes:
        plan: of the example inputs.
        without: why the last step that ran without the plan did.
        peak: bytes that the plan of the last planned step comes to, at the sizes that it was made
            for.
    """

    def __init__(self, budget: MemoryBudget, device: Device | None = None) -> None:
        self.budget, self.device = budget, device
        self.plan: MemoryPlan | None = None
        self._known: list[_Known] = []
        self._refused: list[tuple[fx.Graph, dict[str, Any], OptionError]] = []
        self._made = 0
        self._said: set[str] = set()
        self.without = ""
        self.peak = 0

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
        """The flat results of one training forward; None where it runs without the plan, which
        it says, or where there is no backward.

        Raises:
            OptionError: the first step of all cannot be planned.
        """
        self.without = ""
        hooks, around = foreign_hooks(root), transformed()
        if hooks:
            return self._without(
                f"{hooks}, which a memory plan would not run",
                "Remove the hooks, or rewrite without memory_budget",
            )
        if around:
            return self._without(
                f"the model is called inside {around}, which has no rule for a planned step",
                "Call it outside, or rewrite without memory_budget",
            )
        try:
            known = self._found(root, program, leaves, rows)
        except OptionError as error:
            if self.plan is None:
                raise
            return self._without(str(error), "Or rewrite with example_inputs like this call")
        if known.traced.unused is None:
            return None
        self.peak = known.plan.peak if known.plan is not None else 0
        return known.traced(root, leaves)

    def traced(
        self,
        root: nn.Module,
        program: Program,
        leaves: Sequence[Tensor],
        rows: Sequence[Sequence[int | str]],
    ) -> Traced:
        """The trace that serves a call; made where there is none yet.

        Raises:
            OptionError: no plan meets the budget on the first inputs, or there is no trace.
        """
        return self._found(root, program, leaves, rows).traced

    def _found(
        self,
        root: nn.Module,
        program: Program,
        leaves: Sequence[Tensor],
        rows: Sequence[Sequence[int | str]],
    ) -> _Known:
        """The trace that serves a call, with its plan; made where there is none yet.

        Raises:
            OptionError: no plan meets the budget on the first inputs, or there is no trace.
        """
        now = assumed(root, program, leaves)
        found = self._serving(program, now, leaves)
        if found is None:
            with TRACING:  # another thread may have been faster
                found = self._serving(program, now, leaves)
                if found is None:
                    found = self._planned_anew(root, program, leaves, rows, now)
        found.used = next(_clock)
        return found

    @property
    def traces(self) -> int:
        """How many traces are kept."""
        return len(self._known)

    def _serving(
        self, program: Program, now: dict[str, Any], leaves: Sequence[Tensor]
    ) -> _Known | None:
        own = [known for known in self._known if known.graph is program.graph]
        if isinstance(parse_budget(self.budget.peak), int):  # a larger batch has to fit it too
            own = [known for known in own if known.holds(leaves)]
        return next((k for k in own if k.traced.serves(leaves) and k.assumed == now), None)

    def _planned_anew(
        self,
        root: nn.Module,
        program: Program,
        leaves: Sequence[Tensor],
        rows: Sequence[Sequence[int | str]],
        now: dict[str, Any],
    ) -> _Known:
        for graph, then, refusal in self._refused:
            if graph is program.graph and then == now:
                raise refusal.with_traceback(None)
        plans: list[MemoryPlan] = []
        part = partitioner(
            self.budget, on_plan=plans.append, granted=self._granted(), device=self.device
        )
        self._say_again(program, now)
        try:
            traced = trace(root, program, leaves, rows, part)
        except OptionError as error:
            if self.plan is not None:  # each step would try again
                kept_refusals = self._refused[-MOST + 1 :]
                self._refused = [*kept_refusals, (program.graph, now, error)]
            raise
        plan = plans[0] if plans else None
        if plan is not None:
            self._say_above(plan)
            self.plan = self.plan or plan
        shapes = [tuple(leaf.shape) for leaf in leaves]
        found = _Known(program.graph, now, traced, plan, shapes, next(_clock))
        # a new list, as other threads go through the old one
        kept = sorted(self._known, key=lambda known: known.used)[-MOST + 1 :]
        self._known = [*kept, found]
        self._made += 1
        return found

    def _say_again(self, program: Program, now: dict[str, Any]) -> None:
        """To the log, and once as a warning where a step is planned over and over."""
        last = next((k for k in reversed(self._known) if k.graph is program.graph), None)
        if last is None:
            return
        reason = changed(last.assumed, now)
        what = f"{reason} is another" if reason else "the sizes of the inputs are others"
        _log.info("memory_budget: the training step is planned again, as %s", what)
        if self._made == MOST:
            self._warn(
                f"memory_budget: the training step was planned {self._made} times and is planned "
                f"again, now as {what}: each time takes as long as the first. Change it less often"
            )

    def _granted(self) -> int | None:
        """Bytes that the budget came to on the example inputs: a shorter last batch, or a pattern
        of frozen parameters, is not refused in the middle of a training."""
        if self.plan is None:
            return None
        amount = parse_budget(self.budget.peak)
        return int(amount * self.plan.default_peak) if isinstance(amount, float) else amount or 0

    def _say_above(self, plan: MemoryPlan) -> None:
        """Warns, once, of a step that no plan brings within what the budget came to."""
        amount, granted = parse_budget(self.budget.peak), self._granted()
        if amount is None or granted is None:
            return
        share = amount * plan.default_peak if isinstance(amount, float) else 0
        if plan.peak > max(share, granted):
            self._warn(
                f"memory_budget ({self.budget}): a training step with inputs of other sizes, or "
                f"with another set of trained parameters, takes {plan.peak:,} bytes at the least "
                f"({granted:,} were granted by the example inputs), and runs with that. Use a "
                "smaller batch, or a larger budget"
            )

    def _without(self, why: str, remedy: str) -> None:
        """Says, once for each reason, that a step runs without the plan."""
        text = f"{why}: the training step runs without the memory plan, and may take more than "
        text += f"memory_budget ({self.budget}) allows. {remedy}"
        self.without = why
        self._warn(text)

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warn(text)
