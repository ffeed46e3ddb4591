"""Threshold(rotate=True): zeros among the entries by other axes; exact, shared, saved, trained."""

from __future__ import annotations

import copy
import pathlib
import pickle
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from hypothesis import given, settings
from hypothesis import strategies as st
from test_threshold import Gated
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from rewriter import remap_optimizer, rewrite
from rewriter.errors import OptionError
from rewriter.kernels import rotation
from rewriter.kernels.rotation import basis, fold, matrix, rotated
from rewriter.lowering.inductor_passes import InductorPasses
from rewriter.modules.moments import Sensitivity
from rewriter.passes import (
    Quantize,
    SparseInt4Linear,
    SparseInt8Linear,
    Threshold,
    ThresholdLinear,
)

WIDTH = 16
ROTATE = Threshold(0.5, score="wina", inputs="all", rotate=True)


def inputs(rows: int, seed: int = 2) -> Tensor:
    """[rows, 16], most of each row along few directions that are no axes."""
    g = torch.Generator().manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g)).Q
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=draw) @ (mixed * torch.logspace(0.5, -1.5, WIDTH)).t()


def gated(dtype: torch.dtype = torch.float32) -> Gated:
    torch.manual_seed(0)
    return Gated(WIDTH, 48).eval().to(dtype)


def thresholded(model: nn.Module, *passes: Any, **options: Any) -> Any:
    options.setdefault("calibration", [inputs(200, seed) for seed in range(10, 14)])
    return rewrite(model, list(passes or (ROTATE,)), options["calibration"][0][:3], **options)


def reasons(model: Any) -> dict[str, str]:
    (step,) = [s for s in model.report.steps if s.name.startswith("Threshold")]
    return {d.site: d.reason for d in step.decisions}


def rotated_layers(model: nn.Module) -> list[str]:
    layers = model.named_modules()
    return [n for n, m in layers if isinstance(m, ThresholdLinear) and m.rotation is not None]


def axes_of(width: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q


# The layer ---------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_without_zeros_it_is_the_dense_layer(width: int, out: int, rows: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight, bias, x = (
        torch.randn(*size, generator=g, dtype=torch.float64)
        for size in ((out, width), (out,), (rows, width))
    )
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        own, add, given_ = weight.to(dtype), bias.to(dtype), x.to(dtype)
        axes = basis(axes_of(width, seed))
        layer = ThresholdLinear.from_weights(fold(own, *axes), add, 0.0, rotation=axes)
        want = F.linear(given_.double(), own.double(), add.double())
        # as many roundings as two products and a weight take, each of the size of a row's norm
        size = 1 + float(own.double().norm()) * float(given_.double().norm())
        most = 4 * torch.finfo(dtype).eps * size
        assert layer(given_).dtype == dtype
        assert ((layer(given_).double() - want).abs() <= most).all()


def test_axes_of_8_bits_are_near_those_given_and_undone_exactly() -> None:
    axes = axes_of(64)
    levels, scale = basis(axes)
    own = matrix(levels, scale)
    assert levels.dtype == torch.int8
    assert torch.linalg.matrix_norm(own - axes, 2) < 0.03
    weight = torch.randn(5, 64, dtype=torch.float64)
    torch.testing.assert_close(fold(weight, levels, scale) @ own, weight)


def test_a_product_is_made_once_for_all_that_read_a_value(monkeypatch: Any) -> None:
    out = thresholded(gated())
    calls: list[int] = []

    def counted(*args: Any) -> Tensor:
        calls.append(len(args[0]))
        return F.linear(args[0], matrix(*args[1:]).to(args[0]))

    monkeypatch.setattr(rotation, "int8_weight_linear", counted)
    x = inputs(5)
    with torch.no_grad():
        first = out(x)
        assert calls == [5]
        x.mul_(2)  # another value, of the same tensor
        second = out(x)
        assert calls == [5, 5]
    assert not torch.equal(first, second)
    assert_reordered(out(x.clone().requires_grad_()), second)
    assert len(calls) == 4  # with gradients, each by itself
    with torch.inference_mode():
        assert_reordered(out(x), second)


def test_what_is_kept_goes_with_the_value() -> None:
    levels, scale = basis(axes_of(8))
    one, two, three = nn.Identity(), nn.Identity(), nn.Identity()
    with torch.no_grad():
        x = torch.randn(2, 8)
        before = len(rotation._MADE)
        z = rotated(x, levels, scale, one)
        assert rotated(x, levels, scale, two) is z
        assert rotated(x, levels, scale) is not z
        other = basis(axes_of(8, seed=1))
        assert_reordered(rotated(x, *other, three), x @ matrix(*other).float().t())
        assert len(rotation._MADE) == before + 1
        del x
        assert len(rotation._MADE) == before


def test_nothing_that_changes_unseen_is_taken_for_what_it_was() -> None:
    out = thresholded(gated(), lower=False)
    memory = inputs(3).numpy()
    x = torch.from_numpy(memory)
    with torch.no_grad():
        first = out(x)
        memory[:] = inputs(3, seed=5).numpy()  # no version of x
        assert_reordered(out(x), out(inputs(3, seed=5)))
        gate = out.gate(x)
        memory[:] = inputs(3).numpy()
        assert_reordered(out.up(x), out.up(inputs(3)))
        assert not torch.equal(out.gate(x), gate)
        assert_reordered(out(x), first)
        out.gate.rotation.data.neg_()  # nor of the axes: both layers', as they share them
        assert_reordered(out(x), out(inputs(3)))
        assert not torch.equal(out(x), first)


@pytest.mark.parametrize("rows", [1, 20])
def test_a_compiler_makes_it_once_as_well(rows: int, tmp_path: pathlib.Path) -> None:
    from torch._dynamo.backends.common import aot_autograd

    calls: list[int] = []

    def compiled(module: Any, _: Any) -> Any:
        InductorPasses()(module.graph)
        module.recompile()
        names = [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
        calls.append(sum("int8_weight" in n for n in names))
        return module

    made = thresholded(gated(), lower=False)
    made.save(tmp_path)
    x = inputs(rows)
    for out in (made, rewriter.load(tmp_path, gated())):
        torch._dynamo.reset()
        with torch.no_grad():
            assert_reordered(
                torch.compile(out, backend=aot_autograd(fw_compiler=compiled))(x), out(x)
            )
    assert calls == [1, 1]


# The pass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["magnitude", "wina"])
@pytest.mark.parametrize("budget", ["uniform", "greedy"])
def test_zeros_cost_less_at_the_same_sparsity(budget: Any, score: Any) -> None:
    model, x = gated(), inputs(2000)
    own: dict[str, Any] = {"score": score, "budget": budget, "inputs": "all"}
    own["where"] = lambda site: site.fqn != "down"
    found = []
    for rotate in (False, True):
        out = thresholded(model, Threshold(0.5, rotate=rotate, **own))
        share = float((~out.gate.kept(x)).float().mean() + (~out.up.kept(x)).float().mean()) / 2
        assert share == pytest.approx(0.5, abs=0.05)
        assert rotated_layers(out) == (["gate", "up"] if rotate else [])
        with torch.no_grad():
            found.append(float((out(x) - model(x)).norm() / model(x).norm()))
    assert found[1] < 0.5 * found[0]


def test_the_report_says_what_is_rotated_for_what_and_what_is_not_and_why() -> None:
    out = thresholded(gated())
    found = reasons(out)
    for name in ("gate", "up"):
        assert "; rotated: zeros cost 0.0" in found[name]
        assert found[name].endswith(
            " of what they would without, for a product by 8-bit axes, 17% of the entries of "
            "gate, up"
        )
    assert found["down"].endswith(
        "; not rotated: its 48 axes would have 300% of the entries of what reads it"
    )
    assert "rotate=True" in str(out.report)
    (step,) = [s for s in out.report.steps if s.name.startswith("Threshold")]
    rows = 3
    assert step.after.macs - step.before.macs == 2 * rows * WIDTH**2  # by each layer
    assert step.after.param_bytes - step.before.param_bytes >= WIDTH**2 + 4 * WIDTH
    assert all(0 < d.output_error < 0.1 for d in step.decisions if d.site != "down")


@pytest.mark.parametrize(
    ("held", "where"),
    [(0, "70 rows that chose it"), (80, "80 rows that chose it"), (200, "100 rows held out")],
)
def test_thresholds_are_those_of_rows_that_axes_were_not_fitted_to(held: int, where: str) -> None:
    batches = [inputs(70, 10), inputs(held, 11)] if held else [inputs(70, 10)]
    out = thresholded(gated(), calibration=batches)
    assert rotated_layers(out) == ["gate", "up"]
    assert f" on {where} (asked: 50%, known within" in reasons(out)["gate"]
    if held:
        share = float((~out.gate.kept(inputs(4000))).float().mean())
        assert share == pytest.approx(0.5, abs=0.04)


def test_queries_keys_and_values_share_one_basis_where_they_are_as_many() -> None:
    class Heads(nn.Module):
        def __init__(self, keys: int) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, keys)
            self.v = nn.Linear(WIDTH, keys)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q(x), self.k(x), self.v(x)], -1)

    out = thresholded(Heads(WIDTH).eval())
    assert rotated_layers(out) == ["q", "k", "v"]
    assert out.q.rotation is out.k.rotation is out.v.rotation
    few = thresholded(Heads(4).eval())
    assert not rotated_layers(few)
    assert "would have 67% of the entries" in reasons(few)["q"]


def test_each_layer_is_right_by_itself_where_its_neighbour_is_left() -> None:
    model = gated()
    model.up.weight = nn.Parameter(model.up.weight.detach().clone())
    one = thresholded(model, Threshold(0.5, inputs="all", rotate=True, where="gate"))
    assert rotated_layers(one) == ["gate"]
    assert "33% of the entries of gate" in reasons(one)["gate"]
    x = inputs(500)
    with torch.no_grad():
        assert float((one(x) - model(x)).norm() / model(x).norm()) < 0.1
    tied = nn.ModuleDict({"a": nn.Linear(WIDTH, 48, bias=False), "b": nn.Linear(WIDTH, 48)})

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.other = tied, nn.Linear(WIDTH, 48, bias=False)
            self.other.weight = tied["a"].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.layers["a"](x) + self.layers["b"](x) + self.other(x * 2)

    kept = thresholded(Tied().eval())
    assert rotated_layers(kept) == ["layers.b"]
    assert reasons(kept)["other"] == "its weight is tied to layers.a"


def test_a_1x1_convolution_is_rotated_over_its_channels() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(WIDTH, 48, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    def image(seed: int) -> Tensor:
        return inputs(200, seed).t().reshape(1, WIDTH, 10, 20).contiguous()

    model = Mixes().eval()
    out = thresholded(model, calibration=[image(seed) for seed in range(4)])
    assert "; rotated: " in reasons(out)["conv"]
    x = image(9)
    with torch.no_grad():
        assert float((out(x) - model(x)).norm() / model(x).norm()) < 0.1


def test_bfloat16_models_keep_axes_and_are_as_close() -> None:
    model = gated(torch.bfloat16)
    batches = [inputs(200, seed).bfloat16() for seed in range(10, 14)]
    out = thresholded(model, Threshold(1e-6, inputs="all", rotate=True), calibration=batches)
    assert out.gate.weight.dtype == torch.bfloat16
    assert rotated_layers(out) == ["gate", "up"]
    x = inputs(300).bfloat16()
    with torch.no_grad():
        want = copy.deepcopy(model).double()(x.double())
        errors = [float((f(x).double() - want).norm() / want.norm()) for f in (out, model)]
    assert errors[0] < 2.5 * errors[1]  # W and z are rounded as W and x were
    before = out.gate.rotation_scale.clone()
    assert_equal(out.to(torch.float16).gate.rotation_scale, before)


# Saving, training, composing ---------------------------------------------------------------------


def test_is_saved_copied_and_loaded_with_one_basis_a_group(tmp_path: pathlib.Path) -> None:
    model = gated()
    out = thresholded(model)
    x = inputs(3)
    out.save(tmp_path)
    for again in (
        rewriter.load(tmp_path, gated()),
        pickle.loads(pickle.dumps(out)),
        copy.deepcopy(out),
    ):
        assert_equal(again(x), out(x))
        assert again.gate.rotation.data_ptr() == again.up.rotation.data_ptr()
        again.load_state_dict(out.state_dict())
        assert_equal(again(x), out(x))
    added = {k for k in out.state_dict() if "rotation" in k}
    assert added == {
        f"{name}.{key}" for name in ("gate", "up") for key in ("rotation", "rotation_scale")
    }
    with pytest.raises(rewriter.RewriteError, match="rewrite the other model instead"):
        out.load_original(model.state_dict())


@pytest.mark.parametrize("straight_through", [False, True])
def test_trains_through_axes_that_stay(straight_through: bool) -> None:
    model = gated()
    model.up.requires_grad_(False)
    passed = Threshold(0.5, inputs="all", rotate=True, straight_through=straight_through)
    out = thresholded(model, passed).train()
    layer = out.gate
    assert not out.up.weight.requires_grad
    assert {n for n, _ in layer.named_parameters()} == {"weight", "bias"}
    x = inputs(30).requires_grad_()
    given_ = torch.randn(30, 48)
    dx, dw = torch.autograd.grad(layer(x), (x, layer.weight), given_)
    axes = matrix(layer.rotation, layer.rotation_scale).float()
    mask, z = layer.kept(x), x.detach() @ axes.t()
    passing = torch.ones_like(mask) if straight_through else mask
    assert_reordered(dx, ((given_ @ layer.weight.detach()) * passing) @ axes)
    assert_reordered(dw, given_.t() @ (z * mask))
    before = layer.rotation.clone()
    optimizer = torch.optim.SGD(out.parameters(), 0.1)
    out(inputs(30)).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.rotation, before)


@pytest.mark.parametrize("adam", [False, True])
def test_an_optimizers_averages_go_along_with_the_axes(adam: bool) -> None:
    model = gated()
    optimizer: Any = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
    if adam:
        optimizer = torch.optim.Adam(model.parameters(), 0.0)
    model(inputs(50)).square().sum().backward()
    optimizer.step()
    out = thresholded(model)
    new: Any = remap_optimizer(optimizer, model, out)
    assert set(new.remapped.converted) == {"gate.weight", "up.weight"}
    assert "down.weight" in new.remapped.carried
    axes = matrix(out.gate.rotation, out.gate.rotation_scale).float()
    state = new.state[out.gate.weight]
    old = optimizer.state[model.gate.weight]
    key = "exp_avg" if adam else "momentum_buffer"
    assert_reordered(state[key], old[key] @ axes.t())
    if adam:
        assert_reordered(state["exp_avg_sq"], old["exp_avg_sq"] @ axes.square().t())


@pytest.mark.parametrize(
    ("scheme", "kind", "most"),
    [("int8-weight", SparseInt8Linear, 0.02), ("int4-weight", SparseInt4Linear, 0.2)],
)
def test_few_bits_keep_axes_and_selection(
    scheme: str, kind: Any, most: float, tmp_path: pathlib.Path
) -> None:
    out = thresholded(gated(), ROTATE, Quantize(scheme))
    floats, layer = thresholded(gated()), out.gate
    assert isinstance(layer, kind)
    assert layer.rotation is out.up.rotation
    for rows in (1, 5, 40):
        x = inputs(rows)
        exact = copy.deepcopy(floats.gate)
        exact.weight = nn.Parameter(layer.stored_weight())
        assert_reordered(layer(x), exact(x))
        assert_equal(layer.kept(x), floats.gate.kept(x))
    out.save(tmp_path)
    x = inputs(2)
    assert_reordered(rewriter.load(tmp_path, gated())(x), out(x))
    (step,) = [s for s in out.report.steps if s.name.startswith("Quantize")]
    assert all(0 < d.error < most for d in step.decisions)


def test_gptq_goes_by_the_rotated_inputs() -> None:
    """Its levels are those of the weight of R x and of the moments of R x."""
    out = thresholded(gated(), ROTATE, Quantize("int4-weight", method="gptq"))
    plain = thresholded(gated(), ROTATE, Quantize("int4-weight"))
    x, want = inputs(400, 77), gated()
    lost = [
        float((z @ (m.gate.stored_weight() - folded.detach()).t()).norm())
        for m in (out, plain)
        for z in [rotated(x, m.gate.rotation, m.gate.rotation_scale)]
        for folded in [fold(want.gate.weight, m.gate.rotation, m.gate.rotation_scale)]
    ]
    assert lost[0] < 0.9 * lost[1]


def test_gradients_of_the_loss_go_by_the_same_axes() -> None:
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(7, 5, generator=g).requires_grad_()
    weight = torch.randn(5, generator=g)
    own = matrix(*basis(axes_of(5)))

    def loss(x: Tensor) -> Tensor:
        return (x @ weight).tanh().sum()

    (gradients,) = torch.autograd.grad(loss(rows), rows)
    found = Sensitivity(rows.detach(), gradients, 1.0).rotated(own)
    z = (rows.detach().double() @ own.t()).float().requires_grad_()
    (want,) = torch.autograd.grad(loss((z.double() @ torch.linalg.inv(own).t()).float()), z)
    assert_reordered(found.rows, z.detach())
    assert_reordered(found.gradients, want)


# Refusals ----------------------------------------------------------------------------------------


def test_options_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="rotate must be True or False, not 1"):
        Threshold(0.5, inputs="all", rotate=1)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match='rotate=True is for inputs="all"'):
        Threshold(0.5, rotate=True)


def test_fewer_rows_than_axes() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(96, 400)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    out = thresholded(Wide().eval(), calibration=[torch.randn(95, 96)])
    assert isinstance(out.fc, ThresholdLinear)
    assert reasons(out)["fc"].endswith(
        "; not rotated: the calibration batches give it 95 rows to fit 96 axes to"
    )


def test_inputs_whose_entries_are_apart_already() -> None:
    def apart(seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(400, WIDTH, generator=g) ** 5  # independent, few of them large

    out = thresholded(gated(), calibration=[apart(seed) for seed in range(4)])
    assert not rotated_layers(out)
    assert reasons(out)["gate"].endswith("; not rotated: zeros would cost no less")
    x = apart(9)
    want = thresholded(
        gated(),
        Threshold(0.5, score="wina", inputs="all"),
        calibration=[apart(s) for s in range(4)],
    )
    assert_equal(out(x), want(x))
