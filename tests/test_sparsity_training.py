"""Few active entries in training: the schedule of k, and penalties."""

from __future__ import annotations

import math
import pathlib
import warnings
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from torch import Tensor, nn

import rewriter
from rewriter import SparsityPenalty, TopKSchedule, rewrite
from rewriter.errors import OptionError
from rewriter.passes import Reluify, Threshold, TopK


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(*passes: Any, **options: Any) -> Any:
    return rewrite(Net().eval(), list(passes), torch.randn(3, 8), **options)


@pytest.mark.parametrize(("form", "kept"), [
    ("linear", [32, 32, 26, 26, 20, 20, 14, 14, 8, 8]),
    ("cubic", [32, 32, 18, 18, 11, 11, 8, 8, 8, 8]),
])  # fmt: skip
def test_k_goes_from_all_to_the_one_asked_for(form: Any, kept: list[int]) -> None:
    model = made(TopK(8))
    schedule = TopKSchedule(model, 8, form=form, changes=4)
    seen = []
    for _ in kept:
        seen.append(model.down.k)
        schedule.step()
    assert seen == kept
    x = torch.randn(5, 8)
    assert_equal(model(x), rewrite(model, [], x)(x))
    assert str(schedule) == "step 10 of 8: 1 layers keep 25.0% of their inputs"


def test_it_begins_with_the_dense_model_and_keeps_whole_blocks() -> None:
    dense = Net().eval()
    x = torch.randn(3, 8)
    model = rewrite(dense, [TopK(8, block=8)], x)
    schedule = TopKSchedule(model, 7, changes=7, form="linear")
    assert_reordered(model(x), dense(x))
    for _ in range(7):
        schedule.step()
        assert model.down.k % 8 == 0
        assert_reordered(model(x), model.down(model.act(model.up(x))))
    assert model.down.k == 8


def test_goes_on_after_a_save(tmp_path: pathlib.Path) -> None:
    model = made(TopK(8))
    schedule = TopKSchedule(model, 8, changes=4, form="linear")
    for _ in range(5):
        schedule.step()
    model.save(tmp_path)
    again = rewriter.load(tmp_path, Net().eval())
    assert again.down.k == model.down.k == 20
    x = torch.randn(3, 8)
    assert_equal(again(x), model(x))
    other = TopKSchedule(again, 8, changes=4, form="linear")
    other.load_state_dict(schedule.state_dict())
    for both in range(5):
        assert again.down.k == model.down.k, both
        schedule.step(), other.step()
    assert again.down.k == 8


@pytest.mark.slow
def test_compiled_code_follows() -> None:
    model = made(TopK(8)).train()
    schedule = TopKSchedule(model, 6, changes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        run = torch.compile(model, backend="aot_eager")
        for _ in range(7):
            x = torch.randn(4, 8)
            assert_reordered(run(x), model(x))
            schedule.step()


@pytest.mark.parametrize(("options", "said"), [
    ({"steps": 0}, "steps must be an integer of at least 1"),
    ({"steps": 5, "form": "square"}, "form='square' is unknown"),
    ({"steps": 5, "changes": 0}, "changes must be an integer of at least 1"),
])  # fmt: skip
def test_an_impossible_schedule(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        TopKSchedule(made(TopK(8)), **options)


def test_a_schedule_of_nothing_and_of_another_model() -> None:
    with pytest.raises(OptionError, match="no layer that keeps k entries: rewrite it with TopK"):
        TopKSchedule(Net(), 5)
    two = nn.Sequential(Net(), Net()).eval()
    other = TopKSchedule(rewrite(two, [TopK(8)], torch.randn(3, 8)), 5)
    with pytest.raises(OptionError, match=r"of layers 0.down, 1.down, the model has down"):
        TopKSchedule(made(TopK(8)), 5).load_state_dict(other.state_dict())


# Penalties ---------------------------------------------------------------------------------------


def test_the_formulas() -> None:
    model = made(TopK(8))
    x = torch.randn(6, 8)
    h = model.act(model.up(x))
    for form, want in (
        ("l1", 0.5 * h.abs().mean()),
        ("hoyer", 0.5 * (h.norm(p=1, dim=-1) / h.norm(dim=-1) / math.sqrt(32)).mean()),
    ):
        with SparsityPenalty(model, form, 0.5) as penalty:
            model(x)
            got = penalty.value()
        assert_reordered(got, want)
        got.backward()
        assert model.up.weight.grad.abs().sum() > 0
    assert penalty.sparsity == {"down": 0.75}
    assert str(penalty) == "75.0% of entries are zeros over 1 layers, from 75.0% to 75.0%"


def test_hoyer_is_of_no_scale_and_zeros_have_a_gradient() -> None:
    model = made(TopK(8))
    with SparsityPenalty(model, where="down") as penalty:
        h = torch.randn(4, 32)
        model.down(h)
        first = penalty.value()
        model.down(1e3 * h)
        assert_reordered(penalty.value(), first)
        zero = torch.zeros(4, 32, requires_grad=True)
        model.down(zero)
        penalty.value().backward()
    assert bool(torch.isfinite(zero.grad).all())


@pytest.mark.parametrize("form", ["hoyer", "l1"])
def test_training_with_it_makes_more_zeros(form: Any) -> None:
    def reached(weight: float) -> float:
        torch.manual_seed(0)
        model = made(Reluify()).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        with SparsityPenalty(model, form, weight) as penalty:
            for _ in range(60):
                x = torch.randn(64, 8)
                loss = (model(x) - x).square().mean() + penalty.value()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return penalty.sparsity["act"]

    assert reached(0.5) > reached(0.0) + 0.05


def test_thresholds_report_what_they_reach() -> None:
    model = made(Threshold(0.5), calibration=[torch.randn(200, 8)] * 2)
    with SparsityPenalty(model) as penalty:
        model(torch.randn(500, 8))
    assert penalty.sparsity["down"] == pytest.approx(0.5, abs=0.05)


def test_penalties_of_nothing() -> None:
    with pytest.raises(OptionError, match="no layer that selects entries"):
        SparsityPenalty(Net())
    with pytest.raises(OptionError, match="no layer that is called 'head'"):
        SparsityPenalty(made(TopK(8)), where="head")
    with pytest.raises(OptionError, match="weight must be a number of at least 0, not -1"):
        SparsityPenalty(made(TopK(8)), weight=-1)
    with pytest.raises(OptionError, match="form='l2' is unknown"):
        SparsityPenalty(made(TopK(8)), "l2")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="run the model first"):
        SparsityPenalty(made(TopK(8))).value()
