"""Under real clients a model with a memory budget trains by its plan: the measured peak is the
plan's, the parameters are those of eager training, and where there is no plan the user is told."""

from __future__ import annotations

import pytest
from budget_clients import CASES, TARGET, Size, row

pytestmark = pytest.mark.clients

SMALL = Size(1, 32, 16, 32)
NAMED = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    "name",
    [
        "Trainer",
        "Trainer, saving every step",
        "Trainer, a short last batch",
        "Lightning, whole module",
        "accelerate, bf16, 2 batches an update",
    ],
)
def test_every_step_runs_by_the_plan_with_its_peak(name: str) -> None:
    for library in ("transformers", "accelerate", "lightning"):
        pytest.importorskip(library)
    steps = 3
    found = row(NAMED[name], SMALL, steps)
    forwards = steps * (2 if NAMED[name].accumulated else 1)
    assert found["steps by plan"] == f"{forwards} of {forwards}"
    assert found["parameters"] == "equal"
    assert abs(found["off %"]) <= TARGET
    assert found["measured MB"] < found["eager MB"]
    assert not found["said"]


def test_a_client_that_checkpoints_by_itself_is_told_that_the_plan_is_off() -> None:
    pytest.importorskip("accelerate")
    found = row(NAMED["Trainer, gradient checkpointing"], SMALL, 2)
    assert found["steps by plan"] == "0 of 2"
    assert found["parameters"] == "equal"
    assert "it checkpoints or hooks saved tensors" in found["said"]
