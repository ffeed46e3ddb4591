"""The backward of a planned step, as autograd runs it: where it is, and in what ways it may be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from rewriter.errors import PlanError, warn

__all__ = ["edge", "watch"]


def edge(result: Any) -> tuple[Any, int] | None:
    """(node, place) of a result in the planned backward; it may be a view of what that gives."""
    if not isinstance(result, Tensor) or result.grad_fn is None:
        return None
    found: tuple[Any, int] = torch.autograd.graph.get_gradient_edge(result)[:2]
    while not isinstance(found[0], BackwardCFunction):
        if not found[0].next_functions or found[0].next_functions[0][0] is None:
            return None
        found = found[0].next_functions[0]
    return found


def watch(results: Iterable[Any]) -> None:
    """Has the backward of these results say what its plan does not hold for."""
    found = next((own for result in results if (own := edge(result)) is not None), None)
    if found is not None:
        found[0].register_prehook(_before)


def _before(_: object) -> None:
    """What autograd runs ahead of the backward.

    Raises:
        PlanError: it shall be differentiated itself.
    """
    if torch.is_grad_enabled():
        raise PlanError(
            "memory_budget: backward(create_graph=True), for a second derivative, is not possible "
            "in a training step that runs by a memory plan, whose backward has no derivative: "
            "leave create_graph out, or rewrite without memory_budget"
        )
    if torch._C._autograd._get_current_graph_task_keep_graph():
        warn(
            "memory_budget: with backward(retain_graph=True) all that the step saved stays alive "
            "until the last backward of it, so its peak may be above that of the memory plan. Add "
            "the losses up and call backward once, or leave retain_graph out"
        )
