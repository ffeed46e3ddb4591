"""Healing: losses fall, the best weights stay, and an interrupted run ends where it would have."""

from __future__ import annotations

import logging
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import CalibrationError, OptionError, RewriteError, recover, rewrite
from rewriter.passes import Monarch
from rewriter.training.recovery import _outputs_distance


class Net(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm = nn.LayerNorm(64) if norm else nn.Identity()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.down(self.drop(self.norm(self.up(x).relu())))}


MIX = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -1.5, 32)
BATCHES = [torch.randn(48, 32, generator=torch.Generator().manual_seed(i)) @ MIX for i in range(12)]
FRESH = torch.randn(200, 32, generator=torch.Generator().manual_seed(99)) @ MIX


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = Net().eval()
    return rewrite(teacher, [Monarch(4)], BATCHES[0]), teacher


def error(optimized: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        got, want = (m(FRESH)["logits"] for m in (optimized, teacher))
    return float((got - want).norm() / want.norm())


def heal(optimized: nn.Module, teacher: nn.Module, **options: Any) -> Any:
    given = {"steps": 60, "layer_steps": 40, "lr": 3e-3, "every": 20, "progress": False}
    return recover(optimized, teacher, BATCHES, **{**given, **options})


def test_it_heals_on_data_not_seen(pair: tuple[nn.Module, nn.Module]) -> None:
    optimized, teacher = pair
    before, theirs = error(*pair), {k: v.clone() for k, v in teacher.state_dict().items()}
    result = heal(*pair)
    assert error(*pair) < 0.7 * before
    assert [r["phase"] for r in result.curve[:2]] == ["layers", "layers"]
    held = [r["held-out loss"] for r in result.curve if r["phase"] == "distillation"]
    assert held[-1] < held[0]
    assert result.stopped == "all 60 steps done"
    assert not optimized.training
    assert not teacher.training
    assert all(torch.equal(theirs[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("phase", ["layers", "hidden", "outputs"])
def test_every_part_heals_by_itself(pair: tuple[nn.Module, nn.Module], phase: str) -> None:
    before = error(*pair)
    options: dict[str, Any] = {
        "layers": {"steps": 0},
        "hidden": {"layer_steps": 0, "loss": lambda a, b, c: torch.zeros(())},
        "outputs": {"layer_steps": 0, "hidden": 0.0},
    }[phase]
    heal(*pair, **options)
    assert error(*pair) < before


def test_only_the_replaced_layers_train(pair: tuple[nn.Module, nn.Module]) -> None:
    optimized, _ = pair
    norm, right = optimized.norm.weight.clone(), optimized.up.right.clone()
    heal(*pair, train="replaced")
    assert torch.equal(optimized.norm.weight, norm)
    assert not torch.equal(optimized.up.right, right)
    assert all(p.requires_grad for p in optimized.parameters())


def test_an_interrupted_run_ends_where_it_would_have(tmp_path: pathlib.Path) -> None:
    def fresh() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        teacher = Net().eval()
        return rewrite(teacher, [Monarch(4)], BATCHES[0]), teacher

    class Interrupted(Exception):
        pass

    def stop_at(number: int) -> Callable[[nn.Module], float]:
        seen: list[int] = []

        def evaluate(model: nn.Module) -> float:
            seen.append(1)
            if len(seen) == number:
                raise Interrupted
            with torch.no_grad():
                return -float(model(FRESH)["logits"].square().mean())

        return evaluate

    whole, broken = fresh(), fresh()
    want = heal(*whole, evaluate=stop_at(99), checkpoint=tmp_path / "a")
    with pytest.raises(Interrupted):
        heal(*broken, evaluate=stop_at(3), checkpoint=tmp_path / "b")
    assert not broken[0].training
    again = fresh()
    got = heal(*again, evaluate=stop_at(99), checkpoint=tmp_path / "b")
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, again[0].state_dict()[key]), key
    assert [(r["step"], r["score"]) for r in got.curve] == [
        (r["step"], r["score"]) for r in want.curve
    ]
    with pytest.raises(OptionError, match="another"):
        heal(*fresh(), checkpoint=tmp_path / "b", lr=1e-4)


def test_it_stops_early_and_keeps_the_best(pair: tuple[nn.Module, nn.Module]) -> None:
    scores = iter([1.0, 3.0, 2.0, 2.0, 0.0])
    optimized, states = pair[0], []

    def evaluate(model: nn.Module) -> float:
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(scores)

    result = heal(*pair, evaluate=evaluate, every=5, patience=2, layer_steps=0)
    assert result.stopped == "no better for 2 evaluations"
    assert result.best == 5
    assert all(torch.equal(states[1][k], v) for k, v in optimized.state_dict().items())


def test_it_says_where_training_did_not_help(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, lines = iter([3.0, 1.0, 2.0, 9.0, 9.5]), []
    monkeypatch.setattr(
        logging.getLogger("rewriter"), "handle", lambda record: lines.append(record.getMessage())
    )
    before = {k: v.clone() for k, v in pair[0].state_dict().items()}
    options: dict[str, Any] = {"evaluate": lambda _: next(scores), "every": 5, "layer_steps": 0}
    result = heal(*pair, patience=2, **options)
    (note,) = result.notes
    assert note.startswith("the distillation did not help")
    assert str(result) == f"no better for 2 evaluations; score 3 at step 0\n{note}"
    assert lines == [f"recover: {note}"]
    assert all(torch.equal(before[k], v) for k, v in pair[0].state_dict().items())
    result = heal(*pair, steps=5, **options)
    assert str(result) == "all 5 steps done; score 9 at step 0 → 9.5 at step 5"
    assert not heal(*pair, steps=0, layer_steps=0).notes  # nothing was tried
    assert len(lines) == 1


def test_arguments_in_the_wrong_place_are_told(pair: tuple[nn.Module, nn.Module]) -> None:
    optimized, teacher = pair
    for arguments, message in (
        ((teacher, optimized, BATCHES), "teacher is rewritten and optimized is not"),
        ((optimized, optimized, BATCHES), "both are the same model"),
        ((optimized, BATCHES, teacher), "teacher must be the original model, not a list"),
        ((BATCHES, optimized, teacher), "optimized must be the rewritten model, not a list"),
        ((optimized, Net, BATCHES), "teacher must be the original model, not the class Net"),
    ):
        with pytest.raises(OptionError, match=message):
            recover(*arguments)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="batches is a int: pass a list of batches"):
        recover(optimized, teacher, 3)


def test_mixed_precision_and_other_outputs() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)).eval()
    optimized = rewrite(teacher, [Monarch(4)], BATCHES[0])
    with torch.no_grad():
        before = float((optimized(FRESH) - teacher(FRESH)).norm())
    with warnings.catch_warnings():  # under autocast it is not the call that was captured
        warnings.simplefilter("ignore")
        heal(optimized, teacher, amp=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in optimized.parameters())
    with torch.no_grad():
        assert float((optimized(FRESH) - teacher(FRESH)).norm()) < before


def test_soft_targets_are_the_formula() -> None:
    ours, theirs = torch.randn(5, 7), torch.randn(5, 7)
    want = 4.0 * torch.nn.functional.kl_div(
        (ours / 2).log_softmax(-1), (theirs / 2).softmax(-1), reduction="batchmean"
    )
    found = _outputs_distance({"logits": ours}, {"logits": theirs}, None, 2.0)
    torch.testing.assert_close(found, want)


def test_bare_parameters_are_left_out_of_the_first_phase_and_named() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    teacher = Functional().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimized = rewrite(teacher, [Monarch(4)], BATCHES[0])
    result = heal(optimized, teacher, steps=20)
    assert result.notes == ["weight stands for a bare parameter: not trained by itself"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "impossible lr=-1.0"),
        ({"train": "some"}, "impossible train='some'"),
        (
            {"every": 0, "patience": 0},
            r"impossible every=0 \(a whole number of at least 1\), patience=0",
        ),
        ({"temperature": 0.0}, "impossible temperature"),
        (
            {"steps": "3", "layer_steps": 1.5, "lr": "1e-3"},
            "impossible steps='3' .*, layer_steps=1.5 .*, lr='1e-3' .a number above 0",
        ),
        (
            {"loss": "mse", "evaluate": 3, "checkpoint": 7, "amp": "bf16"},
            "impossible amp='bf16' .a torch.dtype., loss='mse' .a function., evaluate=3.*check",
        ),
        ({"hidden": -1, "seconds": "9", "seed": 0.5}, "impossible hidden=-1.*seconds='9'.*seed"),
    ],
)
def test_impossible_options(
    pair: tuple[nn.Module, nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        heal(*pair, **options)


def test_a_loss_that_is_not_finite_leaves_the_best_weights(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    calls: list[int] = []

    def loss(ours: Any, theirs: Any, batch: Any) -> Tensor:
        calls.append(1)
        scale = float("nan") if len(calls) == 30 else 1.0
        return scale * (ours["logits"] - theirs["logits"]).square().mean()

    with pytest.raises(RewriteError, match="lower lr"):
        heal(*pair, loss=loss, layer_steps=0, every=5)
    assert all(torch.isfinite(p).all() for p in pair[0].parameters())
    with pytest.raises(OptionError, match="nothing to recover"):
        heal(pair[0].requires_grad_(False), pair[1])
