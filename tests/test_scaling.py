"""Rooflines per layer, training runs and scaling laws, against published numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from rewriter import explain
from rewriter.cost import Cost, Device, Level, Training, Work, propagate
from rewriter.cost.scaling import LAWS, ScalingLaw, roofs, training_cost, training_line
from rewriter.errors import OptionError
from rewriter.passes import Monarch

DEVICE = Device(
    name="test",
    kind="gpu",
    matrix={"float32": 1e12, "bfloat16": 4e12},
    vector={"float32": 1e12},
    levels=(Level("L2", 1e6, 1e12, 1.0), Level("HBM", 1e12, 1e11, 10.0)),
    launch_s=1e-9,
    units=1,
    power_w=100.0,
)


def test_large_products_are_bound_by_arithmetic_and_vectors_by_memory() -> None:
    model = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048, bias=False))
    gm = fx.symbolic_trace(model.to("meta"))
    cost = propagate(gm, gm.graph, [torch.randn(4096, 2048, device="meta")])
    found = {r.layer: r for r in roofs(cost, DEVICE)}
    assert {name: r.bound for name, r in found.items()} == {
        "0": "compute", "1": "memory", "2": "compute"
    }  # fmt: skip
    rows, width = 4096, 2048
    flops, moved = 2 * rows * width**2, 4 * (2 * rows * width + width**2)
    assert found["2"].flops == flops
    assert found["2"].intensity == flops / moved
    assert found["1"].intensity == 0
    one = fx.symbolic_trace(nn.Sequential(nn.Linear(2048, 2048, bias=False, device="meta")))
    decode = propagate(one, one.graph, [torch.randn(1, 2048, device="meta")])
    (layer,) = roofs(decode, DEVICE)
    assert layer.bound == "memory"  # one row reads all weights for two FLOPs each
    assert layer.intensity == pytest.approx(0.5, rel=0.01)


def test_slowest_layer_first_and_small_ones_wait_for_the_launch() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4096), nn.Linear(4096, 4096))
    gm = fx.symbolic_trace(model.to("meta"))
    slow = Device(
        name="slow launch", kind="gpu", matrix={"float32": 1e12}, vector={"float32": 1e12},
        levels=(Level("HBM", 1e12, 1e11, 10.0),), launch_s=1e-5, units=1, power_w=100.0,
    )  # fmt: skip
    found = roofs(propagate(gm, gm.graph, [torch.randn(1024, 8, device="meta")]), slow)
    assert [r.layer for r in found] == ["2", "1", "0"]
    assert found[-1].bound == "launch"
    assert all(a.seconds >= b.seconds for a, b in zip(found, found[1:], strict=False))


def test_layers_of_a_report() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    report = explain(model, [Monarch(nblocks=4)], torch.randn(32, 64))
    found = {r.layer: r for r in roofs(report, DEVICE)}
    assert set(found) == {"0", "2"}
    assert found["0"].flops == next(d for d in report.decisions if d.site == "0").after.flops
    by_name = roofs({"whole": report.after}, DEVICE)
    assert [r.layer for r in by_name] == ["whole"]
    assert by_name[0].flops == report.after.flops


STEP = Training(
    flops=10**12,
    weight_bytes=4000,
    gradient_bytes=4000,
    optimizers={"adam": 8000},
    work=(
        Work("aten::mm", "matmul", "bfloat16", 6 * 10**11, 8, 8, 0, (1, 10, 10, 10)),
        Work("aten::mm", "matmul", "float32", 4 * 10**11, 8, 8, 0, (1, 10, 10, 10)),
    ),
)
COST = Cost(flops=1, training=STEP)


def test_a_run_is_its_steps() -> None:
    one, many = (training_cost(COST, n, DEVICE) for n in (1, 1000))
    assert one.seconds == DEVICE.time(COST, training=True)
    assert many.seconds == pytest.approx(1000 * one.seconds)
    assert many.device_hours == pytest.approx(many.seconds / 3600)
    assert many.joules == pytest.approx(1000 * DEVICE.energy(COST, training=True))
    assert many.rated_joules == pytest.approx(100 * many.seconds)
    assert many.mfu == pytest.approx(10**12 / (one.seconds * 4e12))
    assert training_cost(COST, 0, DEVICE).seconds == 0


def test_a_given_utilization_replaces_the_prediction() -> None:
    run = training_cost(COST, 100, DEVICE, mfu=0.5)
    assert run.seconds == pytest.approx(100 * 10**12 / (0.5 * 4e12))  # most FLOPs are bfloat16
    assert run.mfu == pytest.approx(0.5)


def test_gpt3_took_what_was_published() -> None:
    """Narayanan et al. 2021: GPT-3 (175 B, 300 B tokens) on 1024 A100 at 140 TFLOP/s each takes 34
    days, recomputation included (8·N·D; 6·N·D here is 3/4 of it)."""
    flops = 6 * 174_600_000_000 * 300_000_000_000
    step = Training(flops=flops, work=(Work("mm", "matmul", "bfloat16", flops, 1, 1),))
    run = training_cost(Cost(training=step), 1, Device.get("a100-80"), mfu=140 / 312)
    assert run.seconds / 1024 / 86400 == pytest.approx(34 * 3 / 4, rel=0.03)


@pytest.mark.parametrize(
    ("cost", "steps", "mfu", "says"),
    [
        (Cost(), 1, None, "no training step"),
        (COST, -1, None, "steps=-1"),
        (COST, 1.5, None, "steps=1.5"),
        (COST, True, None, "steps=True"),
        (COST, 1, 0.0, "mfu=0.0"),
        (COST, 1, 1.1, "mfu=1.1"),
        (Cost(training=Training()), 1, 0.5, "without FLOPs"),
    ],
)
def test_runs_that_cannot_be_priced(cost: Cost, steps: int, mfu: float | None, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        training_cost(cost, steps, DEVICE, mfu)


# scaling laws


def test_published_optima_of_hoffmann() -> None:
    """Hoffmann et al. 2022: exponents 0.46 and 0.54 (table 2, approach 3), about 40 B parameters
    for Gopher's budget (figure 4), and table A3."""
    law = LAWS["hoffmann"]
    total = law.alpha + law.beta
    assert round(law.beta / total, 2) == 0.46
    assert round(law.alpha / total, 2) == 0.54
    assert law.optimum(5.76e23)[0] == pytest.approx(40e9, rel=0.02)
    for parameters, tokens in ((400e6, 9.2e9), (1e9, 27.1e9), (10e9, 410.1e9), (67e9, 4.1e12)):
        assert law.tokens_for(parameters) == pytest.approx(tokens, rel=0.12)


def test_published_optima_of_the_refit() -> None:
    """Besiroglu et al. 2024: a = 0.513 (table 1), and about 20 tokens per parameter at Chinchilla's
    budget, which Chinchilla (70 B, 1.4 T tokens) was trained by."""
    law = LAWS["besiroglu"]
    assert round(law.beta / (law.alpha + law.beta), 3) == 0.513
    parameters, tokens = law.optimum(6 * 70e9 * 1.4e12)
    assert tokens / parameters == pytest.approx(20, rel=0.1)
    assert parameters == pytest.approx(70e9, rel=0.05)
    assert law.loss(70e9, 1.4e12) < law.loss(280e9, 300e9)  # Chinchilla beats Gopher


def test_loss_by_hand() -> None:
    law = ScalingLaw(1.5, 100.0, 1000.0, 0.5, 0.25)
    assert law.loss(10_000, 10_000) == 1.5 + 1 + 100


@given(st.sampled_from(sorted(LAWS)), st.floats(15, 28), st.floats(-0.5, 0.5))
def test_the_optimum_is_one(name: str, exponent: float, shift: float) -> None:
    law, budget = LAWS[name], 10**exponent
    parameters, tokens = law.optimum(budget)
    assert 6 * parameters * tokens == pytest.approx(budget)
    best = law.loss(parameters, tokens)
    assert law.loss(parameters * 10**shift, tokens / 10**shift) >= best * (1 - 1e-12)
    assert law.tokens_for(parameters) == pytest.approx(tokens, rel=1e-6)


def test_the_line_of_a_training_report() -> None:
    line = training_line(70_000_000_000, 1_400_000, 1_000_000)
    assert line.startswith("20 tokens per parameter: in 1,000,000 steps this run sees 1.4 T tokens")
    assert "1.09 × what is compute-optimal for 70 B parameters" in line
    assert "predicted loss 1.97 nats per token" in line
    short = training_line(100_000_000, 4096, 1000, law="hoffmann")
    assert short.startswith("0.041 tokens per parameter: in 1,000 steps this run sees 4.1 M tokens")


def test_impossible_questions() -> None:
    law = LAWS["besiroglu"]
    for ask, says in (
        (lambda: law.loss(0, 1), "parameters=0"),
        (lambda: law.loss(1, float("inf")), "tokens=inf"),
        (lambda: law.optimum(-1.0), "flops=-1.0"),
        (lambda: law.tokens_for(float("nan")), "parameters=nan"),
        (lambda: training_line(10, 0, 5), "tokens_per_step=0"),
        (lambda: ScalingLaw.get("hofman"), "did you mean 'hoffmann'"),
        (lambda: training_line(10, 1, 1, "chinchila"), "There are besiroglu, hoffmann"),
    ):
        with pytest.raises(OptionError, match=says):
            ask()
    assert ScalingLaw.get(law) is law
