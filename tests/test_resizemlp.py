"""ResizeMLP: fewer hidden neurons; exact where those that go are dead."""

from __future__ import annotations

import copy
import pathlib
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewriter
from rewriter import OptionError, RewriteWarning, explain, rewrite
from rewriter.passes import Quadratic, Quantize, ResizeMLP


class Plain(nn.Module):
    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, hidden), nn.GELU(), nn.Linear(hidden, 6)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.act(self.up(x))))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 12, bias=False), nn.Linear(6, 12, bias=False)
        self.down = nn.Linear(12, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Normed(Plain):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.norm(self.up(x))))


DEAD = [1, 4, 5, 11]


def killed(model: Any) -> Any:
    """With dead neurons: by what reads them, and by what makes them."""
    with torch.no_grad():
        model.down.weight[:, DEAD[:2]] = 0
        (model.gate if hasattr(model, "gate") else model.up).weight[DEAD[2:]] = 0
        if model.up.bias is not None:
            model.up.bias[DEAD[2:]] = 0
    return model.eval()


@pytest.mark.parametrize("make", [Plain, Gated])
def test_dead_neurons_go_exactly(make: type[nn.Module]) -> None:
    model, x = killed(make()), torch.randn(5, 6)
    before = copy.deepcopy(model.state_dict())
    out: Any = rewrite(model, [ResizeMLP(keep=8)], x)
    kept = [i for i in range(12) if i not in DEAD]
    assert torch.equal(out.up.weight, model.up.weight[kept])
    assert torch.equal(out.down.weight, model.down.weight[:, kept])
    assert (out.up.out_features, out.down.in_features) == (8, 8)
    for size in (5, 2, 1):
        x = torch.randn(size, 6)
        torch.testing.assert_close(out(x), model(x))
    assert out.report.steps[1].output_error < 1e-6
    (decision,) = (d for d in out.report.steps[1].decisions if d.action == "resized")
    assert decision.reason == "8 of 12 neurons stay, with 100.0% of the score by weight"
    assert decision.before.params > decision.after.params
    out.train()(x).sum().backward()
    assert out.up.weight.grad.shape == (8, 6)
    for key, value in before.items():  # the caller's model
        assert torch.equal(model.state_dict()[key], value)


def test_a_second_time_there_is_nothing_to_do() -> None:
    x = torch.randn(5, 6)
    once = rewrite(Plain().eval(), [ResizeMLP(keep=8)], x)
    twice = rewrite(once, [ResizeMLP(keep=8)], x)
    torch.testing.assert_close(twice(x), once(x))
    (decision,) = twice.report.steps[1].decisions
    assert decision.reason == "it has 8 neurons, no more than the 8 to keep"


def test_every_hidden_layer_of_a_deeper_one() -> None:
    model = nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)
    ).eval()
    out: Any = rewrite(model, [ResizeMLP(keep=0.5)], torch.randn(5, 6))
    assert [tuple(m.weight.shape) for m in (out[0], out[2], out[4])] == [(6, 6), (5, 6), (4, 5)]


def test_by_activation_what_the_batches_never_switch_on_goes() -> None:
    model, x = Plain().eval(), torch.rand(64, 6)
    model.act = nn.ReLU()
    with torch.no_grad():
        model.up.bias[:6] = 0
        model.up.weight[:6] = -10 * model.up.weight[:6].abs()  # large, and off for positive inputs
    chosen = ResizeMLP(keep=6, by="activation")
    out = rewrite(model, [chosen], x, calibration=[x, x])  # one to choose by, one to measure
    torch.testing.assert_close(out(x), model(x))
    by_weight = rewrite(model, [ResizeMLP(keep=6)], x)
    assert by_weight.report.steps[1].output_error > 0.01
    (decision,) = explain(model, [chosen], x).steps[1].decisions
    assert decision.reason == "by='activation' needs calibration batches that reach it"


def test_a_batch_norm_between_is_cut_along() -> None:
    model, x = killed(Normed(nn.BatchNorm1d(12))), torch.randn(5, 6)
    with torch.no_grad():
        model.down.weight[:, DEAD] = 0
    out: Any = rewrite(model, [ResizeMLP(keep=8)], x)
    torch.testing.assert_close(out(x), model(x))
    assert (out.norm.num_features, len(out.norm.running_mean)) == (8, 8)
    state = out.norm.running_mean.clone()
    out.train()(x)
    assert not torch.equal(state, out.norm.running_mean)


class Viewed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)).view(-1, 3, 4).flatten(1))


class Shown(Plain):
    def forward(self, x: Tensor) -> Any:
        hidden = self.act(self.up(x))
        return self.down(hidden), hidden


def hooked() -> nn.Module:
    model = Plain()
    model.down.register_forward_pre_hook(lambda *a: None)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(Plain(), Plain())
    model[0].up.weight = model[1].up.weight  # type: ignore[union-attr]
    model[1].up.bias = None  # type: ignore[union-attr]
    return model


def broken() -> nn.Module:
    model = Plain()
    model.up.weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Normed(nn.LayerNorm(12)), "layer_norm mixes its neurons"),
        (Viewed, "its neurons go into view, which fixes how many there are"),
        (Shown, "its neurons are a result of the graph"),
        (hooked, "down has hooks, which would see other sizes"),
        (tied, "the weight of 0.up is tied to 1.up.weight"),
        (broken, "the weights hold NaN or inf"),
    ],
)  # fmt: skip
def test_what_cannot_shrink_stays_with_the_reason(make: Any, words: str) -> None:
    report = explain(make().eval(), [ResizeMLP(keep=8)], torch.randn(5, 6))
    assert words in [d.reason for d in report.steps[1].decisions]
    assert not report.replaced


def test_a_structured_layer_is_not_cut() -> None:
    model, x = Plain().eval(), torch.randn(5, 6)
    report = explain(model, [Quadratic(where="down"), ResizeMLP(keep=8)], x)
    assert [d.site for d in report.replaced] == ["down"]
    reason = "its neurons go into quadratic_linear, which fixes how many there are"
    assert reason in [d.reason for d in report.steps[2].decisions]


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1.5}, {"keep": -2}, {"keep": True},
                                     {"keep": float("inf")}, {"keep": float("nan")},
                                     {"by": "size"}])  # fmt: skip
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ResizeMLP(**options)


def test_where_and_nothing_to_do() -> None:
    model, x = nn.Sequential(Plain(), Plain()).eval(), torch.randn(5, 6)
    out: Any = rewrite(model, [ResizeMLP(keep=8, where="1.*")], x)
    assert (out[0].up.out_features, out[1].up.out_features) == (12, 8)
    with pytest.warns(RewriteWarning, match="no site of kind mlp"):
        rewrite(nn.Linear(6, 6), [ResizeMLP()], x)


def test_a_resize_survives_files_pickles_copies_and_original_checkpoints(
    tmp_path: pathlib.Path,
) -> None:
    model, x = killed(Plain()), torch.randn(5, 6)
    passes = [ResizeMLP(keep=8), Quantize("int8-dynamic", where="down")]
    out = rewrite(model, passes, x)
    out.save(tmp_path)
    loaded: list[Any] = [
        rewriter.load(tmp_path, Plain().eval()),
        rewriter.load(tmp_path, Plain().eval(), example_inputs=x),
        pickle.loads(pickle.dumps(out)),
        copy.deepcopy(out),
    ]
    for again in loaded:
        torch.testing.assert_close(again(x), out(x))
        again.load_original(model.state_dict())
        torch.testing.assert_close(again(x), out(x))
        assert again.up.out_features == 8
    with pytest.raises(rewriter.StoreError, match="keeps 8 of its 12 neurons"):
        out.load_original(Plain(hidden=10).state_dict())
    with pytest.raises(rewriter.StoreError, match="keeps 8 of its 12 neurons"):
        rewriter.load(tmp_path, Plain(hidden=10))
