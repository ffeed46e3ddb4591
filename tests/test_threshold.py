"""Threshold: the layer, calibration by quantile, budgets, refusals; weights of few bits behind."""

from __future__ import annotations

import copy
import pathlib
import pickle
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from rewriter import rewrite
from rewriter.errors import CalibrationError, OptionError
from rewriter.kernels import sparse, sparse_int4
from rewriter.modules.budgets import quantile, shared_out
from rewriter.passes import (
    Int4Linear,
    Int8WeightLinear,
    Quantize,
    SparseInt4Linear,
    SparseInt8Linear,
    Threshold,
    ThresholdLinear,
    TopK,
)
from rewriter.passes.threshold import _block


class Gated(nn.Module):
    def __init__(self, width: int = 16, hidden: int = 48) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Gated(), Gated()])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batches(count: int = 4, rows: int = 64) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 16, generator=g) for _ in range(count)]


def thresholded(model: nn.Module, *passes: Any, **options: Any) -> Any:
    if any(p.needs_calibration or p.calibrates for p in passes):
        options.setdefault("calibration", batches())
    return rewrite(model.eval(), list(passes), torch.randn(3, 16), **options)


def layers(model: nn.Module) -> dict[str, ThresholdLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, ThresholdLinear)}


def reached(model: nn.Module, x: Tensor) -> dict[str, float]:
    """The share of each layer's inputs that count as zeros."""
    found: dict[str, float] = {}

    def look(name: str) -> Any:
        def hook(layer: Any, inputs: tuple[Tensor]) -> None:
            score = inputs[0].abs()
            score = score if layer.importance is None else score * layer.importance
            found[name] = float((score < layer.threshold).float().mean())

        return hook

    handles = [m.register_forward_pre_hook(look(n)) for n, m in layers(model).items()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("score", ["magnitude", "wina"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_the_sparsity_asked_for_is_that_of_new_inputs(sparsity: float, score: Any) -> None:
    out = thresholded(Blocks(), Threshold(sparsity, score=score, inputs="all"))
    assert len(layers(out)) == 7
    for name, share in reached(out, torch.randn(2000, 16)).items():
        assert share == pytest.approx(sparsity, abs=0.1), name


def test_mlp_takes_what_enters_down_projections_alone() -> None:
    model = Blocks()
    out = thresholded(model, Threshold(0.5))
    assert list(layers(out)) == ["layers.0.down", "layers.1.down"]
    layer = out.get_submodule("layers.0.down")
    x = torch.randn(1, 48)
    mask = x.abs() >= layer.threshold
    assert_reordered(layer(x), F.linear(x * mask, layer.weight, layer.bias))
    (step,) = [s for s in out.report.steps if s.name.startswith("Threshold")]
    reasons = [d.reason for d in step.decisions]
    assert all("rows held out (asked: 50%, known within" in r for r in reasons), reasons
    assert all(0 < d.output_error < 1 for d in step.decisions)
    assert "of outputs" in str(out.report)


def test_a_tied_head_stays_and_the_others_do_not() -> None:
    model = nn.Sequential(nn.Embedding(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False))
    model[2].weight = model[0].weight
    ids = torch.randint(16, (8, 16))
    out = rewrite(model.eval(), [Threshold(0.5, inputs="all")], ids, calibration=[ids])
    assert list(layers(out)) == ["1"]
    assert out[2].weight is out[0].weight
    assert {d.reason for d in out.report.skipped if d.site == "2"} == {"its weight is tied to 0"}


@pytest.mark.parametrize("passes", [
    (Threshold(0.5, score="wina"),), (TopK(12, score="wina"),),
    (Threshold(0.5, score="wina"), Quantize("int8-weight")),
    (Threshold(0.5, score="wina"), Quantize("int4-weight")),
])  # fmt: skip
def test_what_selects_keeps_its_dtype_when_the_model_is_cast(passes: Any) -> None:
    out = thresholded(Blocks(), *passes)
    before = {n: b.clone() for n, b in out.named_buffers() if "threshold" in n or "importance" in n}
    after = dict(out.to(torch.bfloat16).named_buffers())
    assert before
    for name, buffer in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], buffer)


def test_zeros_behind_a_relu_count_among_what_is_not_read() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 8)).eval()
    out = thresholded(model, Threshold(0.2, inputs="all", where="2"))
    x = torch.randn(500, 16)
    assert 0.4 < reached(out, x)["2"] < 0.6
    assert_reordered(out(x), model(x))  # zeros alone went
    (reason,) = (d.reason for d in out.report.decisions if d.site == "2" and d.changed)
    assert float(reason.split("%")[0]) > 40


def test_wina_counts_an_entry_by_what_it_adds() -> None:
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    with torch.no_grad():
        model[0].weight[:, :8] *= 1e-3
    out = thresholded(model, Threshold(0.5, score="wina", inputs="all"))
    torch.testing.assert_close(out[0].importance, model[0].weight.norm(dim=0))
    x = torch.randn(500, 16)
    plain = thresholded(model, Threshold(0.5, inputs="all"))
    with torch.no_grad():
        error, other = ((f(x) - model(x)).norm() for f in (out, plain))
    assert error < 0.1 * other


def test_a_greedy_budget_is_met_and_costs_less() -> None:
    model = Blocks()
    with torch.no_grad():  # down projections whose inputs hardly matter
        for layer in model.layers:
            layer.up.weight[24:] *= 1e-3
            layer.up.bias[24:] *= 1e-3
    greedy = thresholded(model, Threshold(0.5, budget="greedy", inputs="all", where="layers.*"))
    uniform = thresholded(model, Threshold(0.5, inputs="all", where="layers.*"))
    x = torch.randn(500, 16)
    for block in ("layers.0", "layers.1"):
        own = {n: m for n, m in layers(greedy).items() if n.startswith(block)}
        shares = reached(greedy, x)
        spent = sum(shares[n] * m.weight.numel() for n, m in own.items())
        assert spent / sum(m.weight.numel() for m in own.values()) == pytest.approx(0.5, abs=0.06)
        assert shares[f"{block}.down"] > 0.55
    with torch.no_grad():
        errors = [float((m(x) - model(x)).norm()) for m in (greedy, uniform)]
    assert errors[0] < errors[1]


def test_greedy_steps_go_where_a_weight_costs_least() -> None:
    steps = [i / 20 for i in range(20)]
    cheap, dear = [0.1 * s for s in steps], [10 * s for s in steps]
    assert shared_out([cheap, dear], [100, 100], 0.475) == pytest.approx([0.95, 0.0])
    assert shared_out([cheap, dear], [100, 300], 0.5) == pytest.approx([0.95, 0.35])
    assert sum(shared_out([dear, cheap], [10, 10], 0.51)) == pytest.approx(1.02)
    assert shared_out([cheap], [10], 0.99) == pytest.approx([0.95])


def test_quantiles_and_blocks() -> None:
    scores = torch.arange(10.0)
    assert [quantile(scores, s) for s in (0.0, 0.5, 0.99)] == [0.0, 5.0, 9.0]
    assert (scores < quantile(scores, 0.3)).sum() == 3
    names = ("model.layers.3.mlp.down", "0.fc", "encoder.fc", "head")
    assert [_block(n) for n in names] == ["model.layers.3", "0", "", ""]


# Saving, training, composing ---------------------------------------------------------------------


def test_is_saved_copied_and_loaded(tmp_path: pathlib.Path) -> None:
    model = Blocks()
    out = thresholded(model, Threshold(0.5, score="wina", inputs="all"))
    x = torch.randn(1, 16)
    out.save(tmp_path)
    fresh = Blocks().eval()
    for again in (
        rewriter.load(tmp_path, fresh),
        pickle.loads(pickle.dumps(out)),
        copy.deepcopy(out),
    ):
        assert_equal(again(x), out(x))
    keys = set(out.state_dict()) - set(model.state_dict())
    assert {k.rpartition(".")[2] for k in keys} == {"threshold", "importance"}
    with pytest.raises(rewriter.RewriteError, match="rewrite the other model instead"):
        out.load_original(fresh.state_dict())


def test_trains_through_the_mask() -> None:
    out = thresholded(Gated(), Threshold(0.5)).train()
    layer, x = out.down, torch.randn(32, 16)
    out(x).square().sum().backward()
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    out(x)
    mask = seen[0].abs() >= layer.threshold
    h = seen[0].clone().requires_grad_()
    layer(h).sum().backward()
    want = layer.weight.detach().sum(0).expand(32, -1) * mask
    assert_reordered(h.grad, want)


@pytest.mark.parametrize(
    "passed", [Threshold(0.5, straight_through=True), TopK(12, straight_through=True)]
)
def test_straight_through_has_the_gradient_of_a_dense_layer_at_every_input(passed: Any) -> None:
    model = Gated()
    sparse = thresholded(model, passed).down
    plain = thresholded(model, type(passed)(passed.k if isinstance(passed, TopK) else 0.5)).down
    h = torch.randn(7, 48, requires_grad=True)
    sparse.train(), plain.train()
    assert_reordered(sparse(h), plain(h))
    given = torch.randn(7, 16)
    own = torch.autograd.grad(sparse(h), (h, sparse.weight, sparse.bias), given)
    other = torch.autograd.grad(plain(h), (plain.weight, plain.bias), given)
    assert_reordered(own[0], given @ sparse.weight.detach())
    assert_reordered(own[1], other[0])
    assert_reordered(own[2], other[1])


BITS = {
    "int8-weight": (SparseInt8Linear, Int8WeightLinear, 0.02),
    "int4-weight": (SparseInt4Linear, Int4Linear, 0.2),
}
"""Scheme → the layer behind a selection, the one without, and an error that is too large."""


@pytest.mark.parametrize("quantize", [
    Quantize("int8-weight"),
    Quantize("int4-weight"),
    Quantize("int4-weight", group_size=32, symmetric=False),
    Quantize("int4-weight", method="gptq"),
    Quantize("int4-weight", method="awq"),
])  # fmt: skip
@pytest.mark.parametrize(
    "passed", [Threshold(0.5), Threshold(0.5, score="wina"), TopK(0.25), TopK(0.25, "wina", 8)]
)
def test_few_bits_keep_the_selection(
    passed: Any, quantize: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel in (sparse, sparse_int4):
        monkeypatch.setattr(kernel, "_measured", lambda *_: 1.0)  # whatever pays on this machine
    model = Gated()
    out = thresholded(model, passed, quantize)
    floats = thresholded(model, passed)
    layer, own = out.down, floats.down
    selecting, plain, most = BITS[quantize.scheme]
    assert isinstance(layer, selecting)
    assert not [n for n, _ in layer.named_parameters() if n != "bias"]
    for rows in (1, 5, 40):
        h = torch.randn(rows, 48)
        exact = copy.deepcopy(own)
        exact.weight = nn.Parameter(layer.stored_weight())
        assert_reordered(layer(h), exact(h))
        assert_equal(layer.kept(h), own.kept(h))
    alone = thresholded(model, quantize)  # the very levels of the scheme by itself
    assert isinstance(alone.down, plain)
    assert_equal(layer.stored_weight(), alone.down.dense_weight())
    out.save(tmp_path)
    x = torch.randn(2, 16)
    for again in (rewriter.load(tmp_path, Gated().eval()), copy.deepcopy(out)):
        assert_reordered(again(x), out(x))
    (step,) = [s for s in out.report.steps if s.name.startswith("Quantize")]
    row = next(d for d in step.decisions if d.site == "down")
    assert 0 < row.error < most
    assert "of the weight's rows" in row.kernel


def test_other_schemes_leave_such_a_layer_and_say_so() -> None:
    out = thresholded(Gated(), Threshold(0.5), Quantize("int8-dynamic"))
    assert isinstance(out.down, ThresholdLinear)
    (step,) = [s for s in out.report.steps if s.name.startswith("Quantize")]
    reason = next(d.reason for d in step.decisions if d.site == "down")
    assert reason == (
        "scheme int8-dynamic has no layer for a threshold_linear; taken by int4-weight, int8-weight"
    )


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0, 0.0, 1.0, 1, -0.5, 1.5, True, "0.5", float("nan")])
def test_an_impossible_sparsity(sparsity: Any) -> None:
    with pytest.raises(OptionError, match="sparsity must be a fraction between 0 and 1"):
        Threshold(sparsity)


@pytest.mark.parametrize(
    "option", [{"score": "size"}, {"budget": "even"}, {"inputs": "some"}, {"straight_through": 1}]
)
def test_an_impossible_option(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"Threshold: {next(iter(option))}|{next(iter(option))}="):
        Threshold(0.5, **option)


def left(model: nn.Module, **options: Any) -> str:
    out = thresholded(model, Threshold(0.5, inputs="all"), **options)
    (step,) = [s for s in out.report.steps if s.name.startswith("Threshold")]
    assert not layers(out)
    return step.decisions[0].reason


def test_without_calibration() -> None:
    with pytest.raises(CalibrationError, match="calibration"):
        thresholded(Gated(), Threshold(0.5), calibration=None)


def test_too_little_calibration() -> None:
    reason = left(nn.Sequential(nn.Linear(16, 4)), calibration=[torch.randn(63, 16)])
    assert (
        reason == "the calibration batches give it 63 rows, and a quantile takes 64: pass more text"
    )


def test_calibration_with_nan() -> None:
    spoiled = torch.randn(70, 16).index_fill(1, torch.tensor([3]), float("nan"))
    with pytest.raises(CalibrationError, match="holds NaN"):
        left(nn.Sequential(nn.Linear(16, 4)), calibration=[spoiled])


def test_activations_that_overflow_in_calibration() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1e38)
    large = [1e3 * batch for batch in batches()]
    with pytest.warns(rewriter.RewriteWarning, match="inputs with NaN or inf"):
        out = thresholded(model, Threshold(0.5, inputs="all"), calibration=large)
    assert list(layers(out)) == ["0"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = nn.Sequential(nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = value
    assert left(model) == "the weights hold NaN or inf"


def test_a_down_projection_that_was_rewritten_before() -> None:
    out = thresholded(Gated(), TopK(12), Threshold(0.5))
    (step,) = [s for s in out.report.steps if s.name.startswith("Threshold")]
    assert step.decisions[0].reason == "the down projection down was rewritten before"


@pytest.mark.parametrize(
    "pass_", [Threshold(0.5), Threshold(0.5, inputs="all"), TopK(0.25)], ids=str
)
def test_half_precision_has_no_sparse_kernel_on_a_cpu(pass_: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval().half()
    calibration = [torch.randn(80, 64).half() for _ in range(2)]
    given = calibration if pass_.needs_calibration else None
    out = rewrite(model, [pass_], calibration[0][:2], calibration=given)
    assert out[2].kernel(1) == "torch, dense"
    assert out[2].held_bytes(1) == 0
    assert out(calibration[0][:2]).isfinite().all()


def test_another_weight_at_the_same_address_is_another_weight() -> None:
    """As offloading does it: `.data` is let go and comes back, and no version says so."""
    torch.manual_seed(0)
    layer = ThresholdLinear.from_weights(nn.Parameter(torch.randn(512, 512)), None, 1.5)
    x = torch.randn(1, 512)
    for _ in range(6):
        with torch.no_grad():
            got = layer(x)
        assert_reordered(got, x.where(layer.kept(x), 0.0) @ layer.weight.detach().t())
        layer.weight.data = torch.empty(0)
        layer.weight.data = torch.randn(512, 512)
