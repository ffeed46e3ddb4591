"""A memory plan for a captured model: traced, decided, checked where it loses digits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.capture import Capture
from rewriter.cost import Device
from rewriter.errors import OptionError
from rewriter.modules.running import modes, own_copy, quiet_run
from rewriter.planner.apply.training import PlannedTraining
from rewriter.planner.budget import MemoryBudget

__all__ = ["plan_of"]


def plan_of(
    capture: Capture, budget: MemoryBudget, device: Device | None = None
) -> PlannedTraining:
    """Plans the training step of a hosted model on its example inputs.

    Raises:
        OptionError: the model was not captured as one train graph, nothing in it is trained, or no
            plan meets the budget.
    """
    root = capture.root
    state = vars(root)["_rewriter"]
    program = state.programs.get(True)
    if capture.islands or len(capture.regions) != 1 or program is None or state.signature is None:
        reasons = [f"{i.fqn or type(root).__name__}: {i.reason}" for i in capture.islands]
        raise OptionError(
            "memory_budget needs the whole model as one train graph, which the capture did not "
            f"give ({'; '.join([*reasons, *capture.notes]) or capture.rung}): leave memory_budget "
            "out, or use torch.compile(model, backend='rewriter', options={'memory_budget': …}), "
            "which plans each part"
        )
    if not any(p.requires_grad for p in root.parameters()):
        raise OptionError(
            "memory_budget: no parameter requires a gradient, so there is no backward to plan"
        )
    leaves = capture.regions[0].leaves or []
    rows = state.signature.dims[True].shapes
    planned = PlannedTraining(budget, device)
    while True:
        with modes(root, training=True):
            traced = planned.traced(root, program, leaves, rows)
        plan = planned.plan
        if traced.unused is None or plan is None:
            raise OptionError(
                "memory_budget: no result of the model depends on a parameter that requires a "
                "gradient, so there is no backward to plan: leave memory_budget out"
            )
        if not planned.budget.lossy or capture.on_meta or not plan.lossy:
            return planned
        plan.gradient_error = gradient_error(capture, planned)
        if plan.gradient_error <= budget.gradient_error:
            return planned
        planned = PlannedTraining(_milder(planned.budget, plan.gradient_error), device)


def _milder(budget: MemoryBudget, error: float) -> MemoryBudget:
    """Without the form that loses most."""
    for form in ("int4", "int8", "bf16"):
        if form in budget.forms and len(budget.forms) > 1:
            kept = tuple(f for f in budget.forms if f != form)
            return dataclasses.replace(budget, forms=kept)
    raise OptionError(
        f"memory_budget: with {', '.join(budget.forms)} the gradients on the example inputs are "
        f"off by {error:.2e}, more than gradient_error={budget.gradient_error:g}: allow more, or "
        "use lossy=False"
    )


def gradient_error(capture: Capture, planned: PlannedTraining) -> float:
    """‖g − g′‖/‖g‖ over the gradients of all parameters on the example inputs: of the sum of the
    scalar result, or else of the results with fixed random weights."""
    root = capture.root
    state = vars(root)["_rewriter"]
    state.memory = None
    exact = _gradients(capture)
    state.memory = planned
    try:
        rough = _gradients(capture)
    finally:
        state.memory = None
    lost = math.sqrt(sum(float((a - b).double().square().sum())
                         for a, b in zip(exact, rough, strict=True)))  # fmt: skip
    whole = math.sqrt(sum(float(a.double().square().sum()) for a in exact))
    return lost / whole if whole else lost


def _gradients(capture: Capture) -> list[Tensor]:
    assert capture.example is not None
    root = capture.root
    with quiet_run(root, training=True), torch.enable_grad():
        args, kwargs = own_copy(*capture.example)
        loss = _loss(root(*args, **kwargs))
        wanted = [p for p in root.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]


def _loss(output: Any) -> Tensor:
    from rewriter.cost.memory import tensors_in

    results: Sequence[Tensor] = [t for t in tensors_in(_plain(output)) if t.requires_grad]
    scalars = [t for t in results if not t.dim()]
    if scalars:
        return scalars[0]
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [(t * torch.randn(t.shape, generator=generator).to(t)).sum().float() for t in results]
    ).sum()


def _plain(output: Any) -> Any:
    if isinstance(output, nn.Module | Tensor):
        return output
    return dict(output) if hasattr(output, "keys") else output
