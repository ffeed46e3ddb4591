"""Reluify: the layer, thresholds by quantile and by least squares, models of transformers."""

from __future__ import annotations

import copy
import pathlib
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers
from closeness import assert_equal, assert_reordered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from rewriter import recover, rewrite
from rewriter.errors import CalibrationError, OptionError
from rewriter.passes import Reluify, SparseReLU, Threshold, ThresholdLinear, TopK, TopKLinear
from rewriter.passes.reluify import _fit_fatrelu, _fit_shifted


class Plain(nn.Module):
    """down(gelu(up(x))), by a module or a function."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(16, 48), nn.Linear(48, 16), act or nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Functional(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 48), nn.Linear(16, 48)
        self.down, self.act = nn.Linear(48, 16), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batches(count: int = 4, rows: int = 64) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 16, generator=g) for _ in range(count)]


def relued(model: nn.Module, *passes: Any, **options: Any) -> Any:
    if any(p.needs_calibration for p in passes):
        options.setdefault("calibration", batches())
    return rewrite(model.eval(), list(passes), torch.randn(3, 16), **options)


def reason(model: nn.Module, at: str = "act") -> str:
    (found,) = (d.reason for d in model.report.decisions if d.site == at)
    return found


def zeros(model: nn.Module, name: str, x: Tensor) -> float:
    """The share of an activation's outputs that is zero."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, y: seen.append(y))
    with torch.no_grad():
        model(x)
    handle.remove()
    return float((seen[0] == 0).float().mean())


# What it computes --------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "want"), [
    ("shifted", [0.0, 0.0, 0.0, 0.0, 1.5, float("nan")]),
    ("fatrelu", [0.0, 0.0, 0.0, 0.5, 2.0, float("nan")]),
])  # fmt: skip
def test_the_formula(form: Any, want: list[float]) -> None:
    x = torch.tensor([-2.0, 0.0, 0.49, 0.5, 2.0, float("nan")], requires_grad=True)
    y = SparseReLU(form, 0.5)(x)
    assert_equal(y, torch.tensor(want), equal_nan=True)
    y.nansum().backward()
    assert x.grad[:5].tolist() == [float(v > 0) for v in want[:5]]


@pytest.mark.parametrize("form", ["shifted", "fatrelu"])
def test_without_a_threshold_both_are_a_relu(form: Any) -> None:
    x = torch.randn(5, 7)
    assert_equal(SparseReLU(form)(x), F.relu(x))
    assert SparseReLU(form, 0.1).operation == "sparse_relu"


def test_the_model_computes_that() -> None:
    model, x = Plain(), torch.randn(3, 16)
    h = model.up(x)
    got = relued(model, Reluify("fatrelu", 0.25))(x)
    assert_reordered(got, model.down(h * (h >= 0.25)))


@pytest.mark.parametrize("model", [
    Plain(), Plain(nn.GELU("tanh")), Functional(), Plain(nn.SiLU()), Plain(nn.Mish()),
    Plain(nn.Hardswish()), Gated(), Plain(transformers.activations.GELUActivation()),
    Plain(transformers.activations.NewGELUActivation()),
    Plain(transformers.activations.QuickGELUActivation()),
])  # fmt: skip
@pytest.mark.parametrize("form", ["shifted", "fatrelu"])
def test_takes_every_spelling(model: nn.Module, form: Any) -> None:
    out = relued(model, Reluify(form, sparsity=0.8))
    (name,) = (n for n, m in out.named_modules() if isinstance(m, SparseReLU))
    assert zeros(out, name, torch.randn(500, 16)) == pytest.approx(0.8, abs=0.03)
    said = reason(out, name)
    assert "of its outputs are 0 on 64 rows held out (asked: 80%, known within" in said
    assert abs(float(said.split("; ")[1].split("%")[0]) - 80) < 5
    (decision,) = out.report.replaced
    assert 0 < decision.output_error < 1


def test_calibration_states_what_a_given_threshold_reaches() -> None:
    out = relued(Plain(), Reluify(), calibration=batches())
    share = float(reason(out).split("; ")[1].split("%")[0])
    assert share == pytest.approx(100 * zeros(out, "act", torch.randn(500, 16)), abs=5)
    assert reason(relued(Plain(), Reluify())) == "gelu became ReLU"


# Least squares -----------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 5), st.sampled_from([F.gelu, F.silu, F.mish]))
@settings(max_examples=40, deadline=None)
def test_the_fit_is_the_best_of_all_thresholds(count: int, seed: int, act: Any) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    y = act(x)
    for form, fit in (("shifted", _fit_shifted), ("fatrelu", _fit_fatrelu)):

        def lost(t: float, form: Any = form) -> float:
            return float((SparseReLU(form, t)(x.double()) - y.double()).square().sum())

        best = min(lost(t) for t in torch.linspace(-4, 4, 801).tolist())
        assert lost(fit(x, y)) <= best + 1e-5


def test_a_fit_is_nearer_than_a_relu() -> None:
    for form in ("shifted", "fatrelu"):
        fit, plain = (relued(Plain(), Reluify(form, t), calibration=batches()) for t in ("fit", 0))
        assert fit.act.threshold != 0
        errors = [m.report.replaced[0].output_error for m in (fit, plain)]
        assert errors[0] < errors[1]


def test_padding_does_not_count() -> None:
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    ids = torch.randint(1, 48, (4, 40))
    ids[:, 20:] = 0
    mask = (ids > 0).long()
    calibration = [{"input_ids": ids, "attention_mask": mask}] * 4
    out = rewrite(
        model, [Reluify("fatrelu", sparsity=0.9)], calibration[0], calibration=calibration
    )
    name = "encoder.layer.0.intermediate.intermediate_act_fn"
    assert "on 80 rows held out" in reason(out, name)
    seen: list[Tensor] = []
    out.get_submodule(name).register_forward_hook(lambda m, i, y: seen.append(y))
    out(**calibration[0])
    share = float((seen[0][mask.bool()] == 0).float().mean())
    assert share == pytest.approx(0.9, abs=0.02)


# With other passes, saved, trained ---------------------------------------------------------------


@pytest.mark.parametrize("model", [Plain(), Gated()])
def test_an_mlp_is_still_one_behind_it(model: nn.Module) -> None:
    passes = [Reluify("fatrelu", sparsity=0.7), Threshold(0.2)]
    out = relued(model, *passes)
    assert isinstance(out.act, SparseReLU)
    assert isinstance(out.down, ThresholdLinear)
    assert float(reason(out, "down").split("%")[0]) > 60  # the zeros count
    x = torch.randn(20, 16)
    assert_reordered(out(x), relued(model, passes[0])(x))
    assert isinstance(relued(model, Reluify(), TopK(8)).down, TopKLinear)


def test_twice_is_once() -> None:
    once = relued(Plain(), Reluify("fatrelu", 0.25))
    again = relued(once, Reluify())
    assert reason(again) == "a sparse_relu is not like a ReLU: 0 far below zero, and x far above"
    plain = relued(relued(Plain(), Reluify()), Reluify())
    assert reason(plain) == "it is a ReLU already"


@pytest.mark.parametrize("model", [Plain(), Functional(), Gated()])
def test_is_saved_copied_and_loaded(model: nn.Module, tmp_path: pathlib.Path) -> None:
    out = relued(model, Reluify("shifted", sparsity=0.8))
    x = torch.randn(3, 16)
    out.save(tmp_path)
    for again in (
        rewriter.load(tmp_path, copy.deepcopy(model).eval()),
        pickle.loads(pickle.dumps(out)),
        copy.deepcopy(out),
    ):
        assert_equal(again(x), out(x))
    assert out.state_dict().keys() == model.state_dict().keys()
    torch.manual_seed(3)
    other = type(model)()
    out.load_original(other.state_dict())
    name = next(n for n, m in out.named_modules() if isinstance(m, SparseReLU))
    want = relued(other, Reluify("shifted", out.get_submodule(name).threshold))
    assert_equal(out(x), want(x))


@pytest.mark.slow
def test_under_a_compiler_and_exported(tmp_path: pathlib.Path) -> None:
    model, x = Plain(), torch.randn(3, 16)
    out = relued(model, Reluify("fatrelu", 0.2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        assert_reordered(torch.compile(out)(x), out(x))
    exported = torch.export.export(out, (x,)).module()
    assert_reordered(exported(x), out(x))


def test_a_function_is_replaced_in_calls_of_other_types_too() -> None:
    out = relued(Functional(), Reluify("fatrelu", 0.25)).to(torch.bfloat16)
    x = torch.randn(3, 16).bfloat16()
    h = out.up(x)
    assert_reordered(out(x), out.down(h.masked_fill(h < 0.25, 0.0)), torch.bfloat16)


def test_recovers_towards_the_original() -> None:
    model = Plain().eval()
    out = relued(model, Reluify("fatrelu", sparsity=0.8))
    g = torch.Generator().manual_seed(5)
    data = [torch.randn(32, 16, generator=g) for _ in range(20)]
    found = recover(out, model, data, steps=150, lr=5e-3, every=50, progress=False)
    losses = [r["held-out loss"] for r in found.curve if r["phase"] == "distillation"]
    assert min(losses) < 0.95 * losses[0]
    assert zeros(out.eval(), "act", torch.randn(200, 16)) > 0.5


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "said"), [
    ({"form": "leaky"}, "form='leaky' is unknown"),
    ({"threshold": float("nan")}, "threshold must be a finite number, got nan"),
    ({"threshold": True}, "threshold must be a finite number"),
    ({"threshold": "best"}, "threshold must be a finite number, got 'best'"),
    ({"sparsity": 1.0}, "sparsity must be a fraction between 0 and 1"),
    ({"sparsity": 0}, "sparsity must be a fraction between 0 and 1"),
    ({"sparsity": 0.5, "threshold": 0.1}, "not both"),
    ({"sparsity": 0.5, "threshold": "fit"}, "not both"),
])  # fmt: skip
def test_an_impossible_option(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Reluify(**options)


@pytest.mark.parametrize(("act", "said"), [
    (nn.Tanh(), "a tanh is not like a ReLU: 0 far below zero, and x far above"),
    (nn.Sigmoid(), "a sigmoid is not like a ReLU: 0 far below zero, and x far above"),
    (nn.LeakyReLU(), "a leaky_relu is not like a ReLU: 0 far below zero, and x far above"),
    (nn.ReLU(), "it is a ReLU already"),
])  # fmt: skip
def test_other_activations_stay(act: nn.Module, said: str) -> None:
    model = Plain(act)
    out = relued(model, Reluify())
    assert reason(out) == said
    x = torch.randn(2, 16)
    assert_equal(out(x), model(x))


def test_without_and_with_too_little_calibration() -> None:
    with pytest.raises(CalibrationError, match="calibration"):
        relued(Plain(), Reluify(sparsity=0.5), calibration=None)
    out = relued(Plain(), Reluify(threshold="fit"), calibration=[torch.randn(63, 16)])
    assert reason(out) == "the calibration batches give it 63 rows, and t takes 64: pass more"


def test_max_error_holds_where_calibration_tells_the_error() -> None:
    out = relued(Plain(), Reluify(), calibration=batches(), max_error=0.01)
    assert "above max_error" in reason(out)
    assert "not known" in reason(relued(Plain(), Reluify(), max_error=0.5))
