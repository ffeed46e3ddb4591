"""What models cost: `Cost`, and `propagate` and `model_cost` that read it off a graph."""

from rewriter.cost.cost import Cost, Training, storage_cost
from rewriter.cost.interpret import Fakes, Region, model_cost, propagate
from rewriter.cost.machine import Device, Level
from rewriter.cost.meter import GraphCost
from rewriter.cost.scaling import (
    LAWS,
    Roof,
    RunCost,
    ScalingLaw,
    roofs,
    training_cost,
    training_line,
)
from rewriter.cost.snapshot import Snapshot
from rewriter.cost.training import StepCost, step_cost
from rewriter.cost.work import Work

__all__ = [
    "LAWS",
    "Cost",
    "Device",
    "Fakes",
    "GraphCost",
    "Level",
    "Region",
    "Roof",
    "RunCost",
    "ScalingLaw",
    "Snapshot",
    "StepCost",
    "Training",
    "Work",
    "model_cost",
    "propagate",
    "roofs",
    "step_cost",
    "storage_cost",
    "training_cost",
    "training_line",
]
