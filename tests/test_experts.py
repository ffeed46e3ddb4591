"""Experts: neurons put together, the router, what is read, refusals."""

from __future__ import annotations

import copy
import pathlib
import warnings
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from rewriter import recover, rewrite
from rewriter.errors import CalibrationError, OptionError, RewriteWarning, StoreError
from rewriter.kernels import choice, sparse, sparse_cpu
from rewriter.kernels import sparse_experts as kernel
from rewriter.kernels.sparse_cpu import Gate
from rewriter.kernels.sparse_experts import best_experts, expert_entries, neurons_of
from rewriter.lowering.table import DEFAULT_RULES
from rewriter.modules.routing import clustered, fit_router, recall
from rewriter.passes import Experts, Quantize, RoutedLinear, Threshold

ACTS: dict[str, Any] = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
}


class Gated(nn.Module):
    """down(act(gate(x)) ∘ up(x))."""

    def __init__(self, act: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.first, self.up = nn.Linear(64, 96, bias=bias), nn.Linear(64, 96, bias=bias)
        self.down, self.act = nn.Linear(96, 40, bias=bias), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.first(x)) * self.up(x))


class Plain(nn.Module):
    """down(act(first(x)))."""

    def __init__(self, act: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.first, self.down = nn.Linear(64, 96, bias=bias), nn.Linear(96, 40, bias=bias)
        self.act, self.dropout = act, nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.act(self.first(x))))


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(kernel, "_measured", lambda *_: 0.6)  # whatever pays on this machine


def rewritten(model: nn.Module, *own: Any, **options: Any) -> Any:
    options.setdefault("calibration", [torch.randn(64, 64) for _ in range(4)])
    return rewrite(model.eval(), list(own) or [Experts(8, 2)], torch.randn(1, 64), **options)


def places(out: Any) -> list[Any]:
    """What was decided about rules."""
    steps = [s for s in out.report.steps if s.name == "lowering"]
    return [d for s in steps for d in s.decisions if "routed" in d.kind]


def formula(out: Any, model: Any, x: Tensor) -> Tensor:
    """The MLP over the neurons of the experts that are picked."""
    h = model.act(model.first(x))
    if isinstance(model, Gated):
        h = h * model.up(x)
    return model.down(h * out.first.kept(x))


# What it computes --------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("cls", "bias"), [(Gated, True), (Gated, False), (Plain, True)])
def test_neurons_of_other_experts_count_as_zero(cls: Any, act: str, bias: bool) -> None:
    model = cls(ACTS[act], bias)
    out = rewritten(model)
    layer = out.first
    assert isinstance(layer, RoutedLinear)
    assert (layer.then, layer.count, layer.active) == (act, 8, 2)
    assert torch.bincount(layer.expert_of).tolist() == [12] * 8
    assert_equal(layer.weight, model.first.weight)
    (fused,) = places(out)
    assert (fused.action, fused.kernel) == ("lowered", "sparse_experts")
    with torch.no_grad():
        for rows in (1, 2, 5, 40):  # in the kernel, by its union and beyond it
            x = torch.randn(rows, 64)
            assert layer.kept(x).sum(-1).tolist() == [24] * rows
            assert_reordered(out(x), formula(out, model, x))


@pytest.mark.parametrize("cls", [Gated, Plain])
def test_all_experts_are_the_dense_layer(cls: Any) -> None:
    model = cls(nn.SiLU())
    out = rewritten(model, Experts(8, 8))
    x = torch.randn(5, 64)
    assert_equal(out.first(x), model.first(x))
    assert places(out) == []  # nothing would be saved
    assert_equal(out(x), model(x))
    (row,) = [d for d in out.report.decisions if d.changed and d.site == "first"]
    assert row.reason.startswith("8 of 8 experts a token; the router finds 100.0% of the best")
    assert row.output_error == 0


def test_sizes_that_experts_do_not_divide_differ_by_one() -> None:
    out = rewritten(Gated(nn.SiLU()), Experts(7, 0.3))
    assert out.first.active == 3
    assert sorted(torch.bincount(out.first.expert_of).tolist()) == [13, 13, 14, 14, 14, 14, 14]


def test_bfloat16_and_what_writes_into_weights() -> None:
    calibration = [torch.randn(64, 64).bfloat16() for _ in range(2)]
    model = Gated(nn.SiLU()).to(torch.bfloat16).eval()
    out = rewrite(model, [Experts(8, 2)], calibration[0][:1], calibration=calibration)
    assert out.first.router.dtype == torch.float32
    x = torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        for _ in range(2):
            want = out.down(F.silu(out.first(x)) * out.up(x))
            assert_reordered(out(x), want)
            out.down.weight.mul_(2)


def test_only_the_active_experts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    out, x = rewritten(Gated(nn.SiLU())), torch.randn(1, 64)
    with torch.no_grad():
        idle = ~out.first.kept(x)[0]
        want = out(x)
        out.first.weight[idle] = float("nan")
        out.up.weight[idle] = float("nan")
        assert_equal(out(x), want)
        monkeypatch.setattr(kernel, "_measured", lambda *_: 0.2)
        assert out(x).isnan().all()  # a dense product


def test_it_costs_the_router_and_its_active_share() -> None:
    report = rewritten(Gated(nn.SiLU())).report
    assert report.before.macs == 2 * 64 * 96 + 96 * 40
    assert report.after.macs == 8 * 64 + (2 * 64 * 96 + 96 * 40) // 4
    report = rewritten(Plain(nn.SiLU())).report
    assert report.after.macs == 8 * 64 + (64 * 96 + 96 * 40) // 4


def test_the_report_says_how_good_the_router_is() -> None:
    out = rewritten(Gated(nn.SiLU()))
    (row,) = [d for d in out.report.decisions if d.changed and d.site == "first"]
    said = "2 of 8 experts a token; the router finds "
    assert row.reason.startswith(said)
    assert row.reason.endswith("% of the best on 64 rows held out")
    assert float(row.reason[len(said) :].split("%")[0]) > 25  # of chance
    assert 0 < row.output_error < 1
    assert row.kernel == "torch, 2 of 8 experts"


def test_nan_inputs_give_nan() -> None:
    out, x = rewritten(Gated(nn.SiLU())), torch.randn(2, 64)
    x[1, 3] = float("nan")
    with torch.no_grad():
        y = out(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


# Neurons and router ------------------------------------------------------------------------------


def test_neurons_that_are_active_together_are_one_expert() -> None:
    topic = torch.randint(4, (300,))
    own = torch.arange(40).roll(7) % 4
    sizes = (topic[:, None] == own).float() + 0.1 * torch.rand(300, 40)
    found = clustered(sizes, 4)
    groups = {frozenset((found == i).nonzero()[:, 0].tolist()) for i in range(4)}
    assert groups == {frozenset((own == i).nonzero()[:, 0].tolist()) for i in range(4)}


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 60), st.data())
def test_clusters_are_of_equal_sizes_whatever_is_active(hidden: int, data: Any) -> None:
    count = data.draw(st.integers(1, hidden))
    sizes = torch.rand(70, hidden) * data.draw(st.sampled_from([0.0, 1.0]))
    found = torch.bincount(clustered(sizes, count), minlength=count)
    assert int(found.max() - found.min()) <= 1
    assert int(found.min()) == hidden // count


def test_the_router_learns_what_is_linear() -> None:
    x, w = torch.randn(400, 12), torch.randn(6, 12)
    sizes = x @ w.t() + 20
    router, bias = fit_router(x[:300], sizes[:300], 2)
    assert recall(F.linear(x[300:], router, bias), sizes[300:], 2) > 0.95
    wide = torch.randn(40, 200)  # fewer rows than inputs
    router, bias = fit_router(wide, wide[:, :6] + 9, 2)
    assert router.shape == (6, 200)
    assert router.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.data())
def test_the_kernel_picks_as_the_formula(rows: int, count: int, data: Any) -> None:
    if sparse_cpu.refusal() is not None:
        pytest.skip(f"no compiled kernel: {sparse_cpu.refusal()}")
    best = data.draw(st.integers(1, count))
    few = st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf"), float("nan")])
    drawn = data.draw(st.lists(few, min_size=rows * count, max_size=rows * count))
    scores, expert_of = torch.tensor(drawn).view(rows, count), torch.arange(24).int() % count
    x, gate, up, down = (torch.randn(s) for s in ((rows, 5), (24, 5), (24, 5), (24, 7)))
    kept = neurons_of(best_experts(scores, best), expert_of)
    for second in (up, None):
        own = Gate(gate), None if second is None else Gate(second), Gate(down)
        y, read = sparse_cpu.routed(x, *own, "silu", scores, expert_of, best, 24)
        h = F.silu(x @ gate.t()) * (1 if second is None else x @ second.t()) * kept
        assert y is not None
        assert_reordered(y, h @ down)
        assert read == sum(int(kept[r : r + 8].any(0).sum()) for r in range(0, rows, 8))
        a = sparse_cpu.keep_experts(x @ gate.t(), scores, expert_of, best)
        assert_equal(a, (x @ gate.t()).where(kept, 0.0))
        limited, _ = sparse_cpu.routed(x, *own, "silu", scores, expert_of, best, 0)
        assert limited is None


# What may be done with it ------------------------------------------------------------------------


def test_gradients_are_those_of_the_active_experts() -> None:
    y = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    scores, expert_of = torch.randn(5, 4), torch.arange(12).int() % 4

    def op(y: Tensor) -> Tensor:
        return expert_entries(y, scores, expert_of, 2)

    assert torch.autograd.gradcheck(op, (y,), eps=1e-7)
    assert_equal(op(y), y * neurons_of(best_experts(scores, 2), expert_of))
    assert_equal(torch.vmap(op)(y.detach()[None].expand(3, 5, 12))[2], op(y))
    torch.library.opcheck(torch.ops.rewriter.expert_entries, (y.detach(), scores, expert_of, 2))
    gate, up, down = (torch.randn(s) for s in ((12, 6), (12, 6), (5, 12)))
    router = torch.randn(4, 6), torch.randn(4), expert_of
    rest = down, down.t().contiguous(), None, "silu", 1
    for second in (up, None):
        own = (torch.randn(2, 6), *router, gate, None, second, None, *rest)
        torch.library.opcheck(torch.ops.rewriter.sparse_experts, own)


@pytest.mark.parametrize("cls", [Gated, Plain])
def test_trains_without_the_fused_form(cls: Any) -> None:
    model = cls(nn.SiLU()).eval()
    out = rewritten(model)
    batches = [torch.randn(16, 64) for _ in range(4)]
    before = F.mse_loss(out(batches[0]), model(batches[0])).item()
    out(batches[0]).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in out.parameters())
    assert not out.first.router.requires_grad
    recover(out, model, batches, steps=40, layer_steps=0, lr=3e-3, progress=False)
    assert F.mse_loss(out.eval()(batches[0]), model(batches[0])).item() < before


def test_is_saved_copied_and_loaded(tmp_path: pathlib.Path) -> None:
    out, x = rewritten(Gated(nn.SiLU())), torch.randn(1, 64)
    out.save(tmp_path)
    with torch.no_grad():
        for again in (rewriter.load(tmp_path, Gated(nn.SiLU()).eval()), copy.deepcopy(out)):
            assert_equal(again.first.expert_of, out.first.expert_of)
            assert_reordered(again(x), out(x))
    with pytest.raises(StoreError, match="calibration batches, which other weights lack"):
        out.load_original(Gated(nn.SiLU()).state_dict())


def test_is_exported_and_compiled() -> None:
    out, x = rewritten(Gated(nn.SiLU())), torch.randn(3, 64)
    with torch.no_grad():
        want = out.first(x)
        assert_reordered(torch.export.export(out.first, (x,)).module()(x), want)
        assert_reordered(torch.compile(out.first, backend="aot_eager", fullgraph=True)(x), want)
        assert_reordered(torch.compile(out, backend="aot_eager")(x), out(x))


def test_int8_weights_around_it() -> None:
    out = rewritten(Gated(nn.SiLU()), Experts(8, 2), Quantize("int8-weight"))
    x = torch.randn(2, 64)
    with torch.no_grad():
        assert isinstance(out.first, RoutedLinear)
        assert_reordered(out(x), out.down(F.silu(out.first(x)) * out.up(x)))


def test_as_text() -> None:
    assert Experts.parse("8, active=2") == Experts(8, 2)
    assert Experts.parse("count=32, active=0.5") == Experts(32, 0.5)
    assert str(Experts(8, 2)) == "Experts(count=8, active=2)"
    assert str(Experts()) == "Experts(count=16)"
    assert Experts(100, 0.07).chosen == 7


# Refusals ----------------------------------------------------------------------------------------


def left(model: nn.Module, *own: Any, **options: Any) -> str:
    out = rewritten(model, *own, **options)
    (row,) = [d for d in out.report.skipped if d.site == "first" and d.kind == "linear"]
    return row.reason


def test_an_activation_that_is_not_0_at_0() -> None:
    assert left(Plain(nn.Sigmoid())) == "its activation is none of relu, gelu, gelu_tanh, silu"


def test_fewer_neurons_than_experts() -> None:
    assert left(Gated(nn.SiLU()), Experts(97)) == "its 96 neurons do not make 97 experts"


def test_weights_that_are_not_finite_or_tied() -> None:
    for name in ("first", "up", "down"):
        model = Gated(nn.SiLU())
        with torch.no_grad():
            getattr(model, name).weight[0, 0] = float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RewriteWarning)  # that others are not calibrated
            assert left(model) == "the weights hold NaN or inf"
    model = Gated(nn.SiLU())
    model.up.weight = model.first.weight
    assert "up" in left(model)


def test_too_little_calibration() -> None:
    reason = left(Gated(nn.SiLU()), calibration=[torch.randn(63, 64)])
    assert reason == "the calibration batches give it 63 rows, and experts take 64: pass more"
    with pytest.raises(CalibrationError, match="calibration"):
        rewritten(Gated(nn.SiLU()), calibration=None)


def test_calibration_that_is_not_finite() -> None:
    class Rooted(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sqrt())

    rows = torch.rand(100, 64)
    rows[5, 5] = -1
    with pytest.warns(RewriteWarning, match="inputs with NaN or inf"):
        out = rewrite(Rooted(nn.SiLU()).eval(), [Experts(8, 2)], rows[:1], calibration=[rows])
    assert not isinstance(out.first, RoutedLinear)


def test_an_mlp_that_was_rewritten_before() -> None:
    reason = left(Gated(nn.SiLU()), Threshold(0.5), Experts(8, 2))
    assert reason == "down was rewritten before, to a threshold_linear"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "count must be an integer of at least 2"),
        ({"count": 2.0}, "count must be an integer"),
        ({"active": 0}, "active must be an int >= 1"),
        ({"active": 0.0}, "active must be an int >= 1"),
        ({"active": 1.5}, "active must be an int >= 1"),
        ({"active": True}, "active must be an int >= 1"),
        ({"active": 17}, "active=17 is more than count=16"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Experts(**options)


def test_the_layer_refuses_what_it_cannot_be() -> None:
    for message, own in (
        ("did you mean 'gelu_tanh'", ("tanh", 4, 2)),
        ("count must be", ("silu", 9, 2)),
        ("active must be", ("silu", 4, 5)),
    ):
        with pytest.raises(OptionError, match=message):
            RoutedLinear(4, 8, *own)


def test_without_a_compiled_kernel_the_plain_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "refusal", lambda: "no compiler")
    model = Gated(nn.SiLU())
    out, x = rewritten(model), torch.randn(2, 64)
    assert [d.reason for d in places(out)] == ["no compiler"]
    assert_reordered(out(x), formula(out, model, x))


def test_the_form_runs_where_it_was_measured_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_measured", lambda *_: 0.2)
    (row,) = places(rewritten(Gated(nn.SiLU()), lower=[*DEFAULT_RULES]))
    assert row.reason == "dense products are faster here where 25% of the neurons are active"
    monkeypatch.undo()
    asked: list[str] = []

    def fastest(key: str, version: str, candidates: Any, *_: Any) -> str:
        asked.append(key)
        pair = candidates()
        assert pair["sparse"]().shape == pair["dense"]().shape == (2, 16)
        return "sparse"

    monkeypatch.setattr(choice, "fastest", fastest)
    for gated, name in ((True, "gated"), (False, "plain")):
        assert kernel._measured.__wrapped__(torch.float32, 2, 8, 40, 16, gated, 1) == 1.0
        assert asked.pop().startswith(f"sparse_experts torch.float32 2 8 40 16 {name}")
