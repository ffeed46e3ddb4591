"""Calibration batches: what is gathered of them, and layers fitted to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from rewriter import LINEAR, Site, explain, rewrite
from rewriter.base import Moments
from rewriter.engine import Engine
from rewriter.engine.batches import Calibration
from rewriter.engine.calibration import gather
from rewriter.engine.looking import sites_of
from rewriter.engine.pipeline import prepare
from rewriter.errors import CalibrationError, RewriteWarning
from rewriter.kernels.monarch import monarch_dense
from rewriter.kernels.monarch_project import monarch_fit, monarch_project
from rewriter.modules.moments import products
from rewriter.passes import Monarch, TopK


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """A module, a functional linear, a layer that is never called, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 64)
        self.weight = nn.Parameter(torch.randn(32, 64) / 8)
        self.unused = nn.Linear(32, 32)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(self.fc(x).relu(), self.weight)


MIX = torch.randn(32, 32) * torch.logspace(0, -2, 32)


def batch(rows: int = 24) -> Tensor:
    return torch.randn(2, rows, 32) @ MIX + 0.3


def linear(engine: Engine) -> list[Site]:
    return [s for s in sites_of(engine.capture) if s.kind == LINEAR]


def moments_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.double()
    return rows.mean(0), rows.t() @ rows / len(rows)


# what is gathered


def test_moments_are_those_of_the_inputs() -> None:
    model, batches = Net().eval(), tuple(batch() for _ in range(5))
    engine = prepare(model, batches[0])
    code = [str(g) for _, _, g in engine.capture.graphs()]
    found, missing = gather(engine.capture, linear(engine), Calibration(batches))
    assert missing == {"unused": "the calibration batches never reach it"}
    fitted = torch.cat([b.flatten(0, 1) for i, b in enumerate(batches) if i != 3])
    with torch.no_grad():
        hidden = model.fc(fitted).relu(), model.fc(batches[3].flatten(0, 1)).relu()
    for name, own, held in (("fc", fitted, batches[3].flatten(0, 1)), ("weight", *hidden)):
        got = found[name].moments
        assert got is not None
        assert (got.rows, got.held_rows) == (4 * 48, 48)
        pairs = (got.mean, got.second), moments_of(own)
        held_pairs = (got.held_mean, got.held_second), moments_of(held)
        for one, other in (*zip(*pairs, strict=True), *zip(*held_pairs, strict=True)):
            assert_reordered(one, other, torch.float32)
    assert [str(g) for _, _, g in engine.capture.graphs()] == code
    assert "forward" not in vars(engine.capture.root.fc)


def test_a_pass_says_of_which_values_it_needs_moments() -> None:
    model, batches = Net().eval(), tuple(batch() for _ in range(2))
    engine = prepare(model, batches[0])
    asked: list[list[str]] = []

    def first(readers: Any) -> bool:
        asked.append([s.fqn for s in readers])
        return "fc" in asked[-1]

    found, _ = gather(engine.capture, linear(engine), Calibration(batches), first, sample=True)
    assert sorted(asked) == [["fc"], ["unused"], ["weight"]]
    assert found["fc"].moments is not None
    assert found["weight"].moments is None
    assert found["weight"].sample is not None


def test_padding_does_not_count() -> None:
    model, x = Net().eval(), batch(6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    spoilt = torch.where(mask.bool()[..., None], x, torch.full_like(x, 1e6))
    engine = prepare(model, {"x": x, "attention_mask": mask})
    sites = [s for s in linear(engine) if s.fqn != "unused"]
    found, _ = gather(engine.capture, sites, Calibration(({"x": spoilt, "attention_mask": mask},)))
    got: Any = found["fc"].moments
    assert got.rows == 6
    assert got.held_rows == 0  # one batch only: errors are those of the fit
    assert_reordered(got.second, moments_of(x[mask.bool()])[1], torch.float32)


def test_calls_of_other_sizes_and_shared_layers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x).relu())

    model, batches = Twice().eval(), (torch.randn(5, 8), torch.randn(3, 8))
    engine = prepare(model, batches[0])
    found, _ = gather(engine.capture, linear(engine), Calibration(batches))
    got: Any = found["fc"].moments
    assert (got.rows, got.held_rows) == (10, 6)
    assert found["fc"].sample is None


def test_a_sample_has_the_range_of_all_rows_and_some_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batches = Net().eval(), tuple(batch(100) for _ in range(5))
    engine = prepare(model, batches[0])
    monkeypatch.setattr("rewriter.engine.calibration._SAMPLE", 32 * 300)
    given_ = (engine.capture, linear(engine), Calibration(batches))
    (found, _), state = gather(*given_, moments=False, sample=True), torch.get_rng_state()
    rows = torch.cat([b.flatten(0, 1) for i, b in enumerate(batches) if i != 3])
    got: Any = found["fc"].sample
    assert found["fc"].moments is None
    assert_equal((got.low, got.high), (rows.amin(0), rows.amax(0)))
    assert got.rows.shape == (300, 32)
    assert len({tuple(r.tolist()) for r in got.rows} - {tuple(r.tolist()) for r in rows}) == 0
    assert len(got.rows.unique(dim=0)) == 300
    assert_equal(got.held.sort(0).values, batches[3].flatten(0, 1).sort(0).values)
    (reader,) = got.readers
    assert reader.data_ptr() == engine.capture.root.fc.weight.data_ptr()
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(gather(*given_, moments=False, sample=True)[0]["fc"].sample.rows, got.rows)
    monkeypatch.setattr("rewriter.engine.calibration._SAMPLE", 1)  # of rows as wide as that
    (found, _) = gather(*given_, moments=False, sample=True)
    assert len(found["fc"].sample.rows) == 256  # type: ignore[union-attr]


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16))
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(12, 16)
    model(x)
    calls.clear()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    made = rewrite(model, [Monarch(2)], x, calibration=[x, x])
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls
    assert_equal(dict(model.state_dict()), before)
    assert_equal(made[1].running_mean, model[1].running_mean)


# what is made of it


@settings(max_examples=20)
@given(st.integers(4, 20), st.integers(4, 20), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_a_fit_is_never_worse_than_the_projection(inputs, outputs, k, l, interleaved):
    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    rows = torch.randn(64, inputs, dtype=torch.float64) @ torch.randn(inputs, inputs).double()
    second = rows.t() @ rows / 64

    def error(right: Tensor, left: Tensor) -> float:
        lost = weight - monarch_dense(right, left, outputs, inputs, interleaved)
        return float(((lost @ second) * lost).sum())

    fitted = monarch_fit(weight, second, (k, l), 1, interleaved, damping=1e-9, sweeps=60)
    plain = monarch_project(weight, (k, l), 1, interleaved)[:2]
    assert error(*fitted) <= error(*plain) * 1.001 + 1e-9


def test_a_fit_with_white_inputs_is_the_projection_and_exact_in_class() -> None:
    weight = torch.randn(24, 16, dtype=torch.float64)
    eye = torch.eye(16, dtype=torch.float64)
    fitted = monarch_dense(*monarch_fit(weight, eye, 4, 1), 24, 16)
    right, left, _ = monarch_project(weight, 4, 1)
    projected = monarch_dense(right, left, 24, 16)
    assert_close(fitted, projected)
    rows = torch.randn(99, 16, dtype=torch.float64) @ torch.randn(16, 16).double()
    again = monarch_fit(projected, rows.t() @ rows, 4, 1)
    assert_close(monarch_dense(*again, 24, 16), projected)


def test_one_block_is_the_whitened_svd() -> None:
    """K = L = 1: min ‖(W − M) S‖ over rank r is the truncated SVD of W S."""
    weight, mix = torch.randn(9, 7).double(), torch.randn(7, 7).double()
    second = mix @ mix.t()
    right, left = monarch_fit(weight, second, 1, 3, damping=0.0)
    lost = (weight - monarch_dense(right, left, 9, 7)) @ mix
    sigma = torch.linalg.svdvals(weight @ mix)
    assert_close(lost.square().sum(), sigma[3:].square().sum())


def test_fitted_layers_are_closer_on_data_they_have_not_seen() -> None:
    model, batches = Net().eval(), [batch() for _ in range(16)]
    x = batch(200)
    plain = rewrite(model, [Monarch(4)], batches[0], where="fc")
    fitted = rewrite(model, [Monarch(4)], batches[0], where="fc", calibration=batches)
    with torch.inference_mode():
        want = model.fc(x) - model.fc.bias
        errors = [float((m.fc(x) - model.fc(x)).norm() / want.norm()) for m in (plain, fitted)]
    assert errors[1] < 0.7 * errors[0]
    decision = fitted.report.replaced[0]
    assert decision.output_error == pytest.approx(errors[1], rel=0.1)
    assert plain.report.replaced[0].output_error is None
    assert "of outputs" in fitted.report.to_markdown()
    assert "of outputs" not in plain.report.to_markdown()


def test_the_bias_takes_the_mean_where_it_may() -> None:
    """x = a constant, nearly: what the factors cannot do the bias does; a functional call's bias
    is the user's own and stays."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.w, self.b)

    batches = [torch.randn(16) + 1e-3 * torch.randn(8, 16) for _ in range(1)] * 2
    linear = nn.Sequential(nn.Linear(16, 16))
    made = rewrite(linear, [Monarch(4)], batches[0], calibration=batches)
    assert sqnr(made(batches[0]), linear(batches[0])) > 60
    assert not torch.equal(made[0].bias, linear[0].bias)
    assert made[0].bias.requires_grad
    functional = Functional()
    kept = rewrite(functional, [Monarch(4)], batches[0], calibration=batches)
    assert torch.equal(kept.b, functional.b)


def test_too_few_rows_fall_back_to_the_weights() -> None:
    """Five rows say nothing of 32 directions: what is closer on the rows held out is taken."""
    model, rows = nn.Sequential(nn.Linear(32, 32)).eval(), [torch.randn(5, 32) for _ in range(40)]
    report = explain(model, [Monarch(4)], rows[0], calibration=[*rows[:1], torch.cat(rows)])
    (done,) = report.replaced
    assert done.reason == "5 calibration rows are too few: projected by weights alone"
    assert done.error == explain(model, [Monarch(4)], rows[0]).replaced[0].error


def test_max_error_is_of_the_outputs() -> None:
    model, batches = Net().eval(), [batch() for _ in range(8)]
    report = explain(model, [Monarch(4)], batches[0], where="fc", calibration=batches)
    done = report.replaced[0]
    assert done.output_error < done.error
    limit = (done.output_error + done.error) / 2
    again = explain(
        model, [Monarch(4)], batches[0], where="fc", calibration=batches, max_error=limit
    )
    assert again.replaced


# refusals


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (3, "calibration is a int: pass a list of batches"),
        ([], "calibration has no batch"),
        ([torch.ones(2, 32), "x"], r"calibration\[1\] is a str"),
        ([torch.ones(2, 31)], r"the model fails on calibration\[0\]"),
    ],
)
def test_impossible_calibration(given_: Any, message: str) -> None:
    model = Net().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=message):
        rewrite(model, [Monarch(4)], batch(), calibration=given_, inplace=True)
    assert_equal(dict(model.state_dict()), before)
    assert type(model) is Net


def test_what_cannot_be_calibrated_is_said() -> None:
    model = Net().eval()
    # another call than the captured one runs the Python forward, where F.linear is not seen
    unlike = [{"x": batch(), "attention_mask": torch.ones(2, 24)}]
    with pytest.warns(RewriteWarning, match=r"not calibrated: weight \(the calibration batches"):
        report = explain(model, [Monarch(4)], batch(), calibration=unlike)
    assert any("never reach it" in note for note in report.steps[-1].notes)
    bad = batch()
    bad[0, 0, 0] = float("inf")
    with pytest.warns(RewriteWarning, match="inputs with NaN or inf"):
        made = rewrite(model, [Monarch(4, where="fc")], batch(), calibration=[bad])
    assert all(torch.isfinite(p).all() for p in made.parameters())
    with pytest.warns(RewriteWarning, match="none of the passes makes use of it"):
        explain(model, [TopK(8)], batch(), calibration=[batch()])
    with pytest.raises(CalibrationError, match="on meta"):
        explain(Net().to("meta"), [Monarch(4)], batch(), calibration=[batch()])


def test_the_fit_refuses_what_does_not_fit() -> None:
    weight = torch.randn(8, 8)
    with pytest.raises(ValueError, match=r"finite \[8, 8\] matrix"):
        monarch_fit(weight, torch.eye(7), 2, 1)
    with pytest.raises(ValueError, match="finite"):
        monarch_fit(weight, torch.full((8, 8), float("nan")), 2, 1)
    with pytest.raises(ValueError, match="must be in"):
        monarch_fit(weight, torch.eye(8), 9, 1)


def test_moments_give_the_error_of_outputs() -> None:
    rows, weight, other = torch.randn(50, 6).double(), torch.randn(4, 6), torch.randn(4, 6)
    mean, second = moments_of(rows)
    shift = torch.randn(4).double()
    error = Moments(50, mean, second, 0, mean, second).output_error(weight, other, shift)
    want, got = rows @ weight.double().t(), rows @ other.double().t() + shift
    assert error == pytest.approx(float((want - got).norm() / want.norm()))
    assert Moments(50, mean, second, 0, mean, second).output_error(0 * weight, other) is None


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
def test_one_row_or_equal_rows_fit_like_the_weights_alone(offset: float) -> None:
    layer: Any = nn.Linear(16, 16).eval()
    row = torch.rand(1, 16) + offset
    model = nn.Sequential(layer)
    made: Any = rewrite(model, [Monarch(nblocks=4)], row, calibration=[row, row.repeat(3, 1)])[0]
    right, left, _ = monarch_project(layer.weight.detach(), 4, made.rank)
    dense = monarch_dense(right, left, 16, 16)
    # the bias takes the mean, so what is left of the rows is nothing to fit to
    error = torch.dist(made.dense_weight().detach(), layer.weight.detach())
    assert error < 1.5 * torch.dist(dense, layer.weight.detach())


def test_products_of_rows_beyond_the_range_of_float32_are_exact() -> None:
    x = torch.tensor([[1.0, -3.0], [2.0, 5.0]])
    for by in (1.0, 2.0**80):
        assert_equal(products(x * by), (x.double().t() @ x.double()) * by**2)
