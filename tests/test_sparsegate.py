"""SparseGate: zeros by the gate, calibration, the lowered form, refusals."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from rewriter import rewrite
from rewriter.errors import CalibrationError, OptionError
from rewriter.kernels import choice, sparse
from rewriter.kernels import sparse_gated as kernel
from rewriter.kernels.int8_linear import quantize_weight
from rewriter.kernels.sparse import Select, active_reference
from rewriter.kernels.sparse_entries import kept_entries
from rewriter.lowering.table import DEFAULT_RULES
from rewriter.passes import (
    GateLinear,
    Int8GateLinear,
    Int8WeightLinear,
    Monarch,
    Quantize,
    SparseGate,
)

ACTS: dict[str, Any] = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
}


class Gated(nn.Module):
    def __init__(self, act: nn.Module, bias: bool = True, first: str = "gate") -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(64, 96, bias=bias), nn.Linear(64, 96, bias=bias)
        self.down, self.act, self.first = nn.Linear(96, 40, bias=bias), act, first

    def forward(self, x: Tensor) -> Tensor:
        if self.first == "up":
            up = self.up(x)
            return self.down(up * self.act(self.gate(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(kernel, "_measured", lambda *_: 0.5)  # whatever pays on this machine


def rewritten(model: nn.Module, own: Any = None, **options: Any) -> Any:
    own = own or SparseGate(k=0.25)
    if own.needs_calibration:
        options.setdefault("calibration", [torch.randn(64, 64) for _ in range(4)])
    return rewrite(model.eval(), [own], torch.randn(1, 64), **options)


def places(out: Any) -> list[Any]:
    """What was decided about rules."""
    steps = [s for s in out.report.steps if s.name == "lowering"]
    return [d for s in steps for d in s.decisions if "gated" in d.kind]


def formula(out: Any, model: Any, x: Tensor) -> Tensor:
    """The MLP over the neurons that the layer at `gate` selects."""
    gate = out.gate
    a = model.act(model.gate(x))
    select = Select(gate.k) if gate.threshold is None else Select(0, gate.threshold)
    return model.down(a * active_reference(a, select) * model.up(x))


@pytest.mark.parametrize("own", [SparseGate(k=24), SparseGate(0.75)])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("bias", "first"), [(True, "gate"), (False, "up")])
def test_neurons_of_a_small_gate_count_as_zero(own: Any, act: str, bias: bool, first: str) -> None:
    model = Gated(ACTS[act], bias, first)
    out = rewritten(model, own)
    assert isinstance(out.gate, GateLinear)
    assert out.gate.weight is not model.gate.weight
    assert out.gate.then == act
    (fused,) = places(out)
    assert (fused.action, fused.kernel) == ("lowered", "sparse_gated")
    with torch.no_grad():
        for rows in (1, 2, 5, 40):  # in the kernel, by its union and beyond it
            x = torch.randn(rows, 64)
            assert_reordered(out(x), formula(out, model, x))
    y = out.gate(torch.randn(500, 64))
    assert float((y == 0).float().mean()) == pytest.approx(0.75, abs=0.08)


def test_bfloat16_and_what_writes_into_weights() -> None:
    model = Gated(nn.SiLU()).to(torch.bfloat16)
    out = rewrite(model.eval(), [SparseGate(k=0.25)], torch.randn(1, 64).bfloat16())
    x = torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        assert_reordered(out(x), plain(out, x))
        out.down.weight.mul_(2)
        assert_reordered(out(x), plain(out, x))


def plain(out: Any, x: Tensor) -> Tensor:
    return out.down(F.silu(out.gate(x)) * out.up(x))


def test_only_what_is_active_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gated(nn.SiLU())
    out, x = rewritten(model), torch.randn(1, 64)
    with torch.no_grad():
        a = F.silu(model.gate(x))[0]
        idle = ~active_reference(a, Select(24))
        want = out(x)
        out.up.weight[idle] = float("nan")
        assert_equal(out(x), want)
        monkeypatch.setattr(kernel, "_measured", lambda *_: 0.2)
        assert out(x).isnan().all()  # a dense product


def test_it_costs_its_active_share() -> None:
    report = rewritten(Gated(nn.SiLU())).report
    assert report.before.macs == 2 * 64 * 96 + 96 * 40
    assert report.after.macs == 64 * 96 + (64 * 96 + 96 * 40) // 4


def test_gradients_are_those_of_the_active_entries() -> None:
    y = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    for threshold, k in ((torch.tensor([0.2]), 0), (None, 4)):

        def op(y: Tensor, threshold: Any = threshold, k: int = k) -> Tensor:
            return kept_entries(y, threshold=threshold, then="silu", k=k)

        assert torch.autograd.gradcheck(op, (y,), eps=1e-7)
        mask = active_reference(F.silu(y.detach()), Select(k, 0.0) if k else Select(0, threshold))
        assert_equal(op(y), y.where(mask, 0.0))
        given = (y.detach(), threshold, None, "silu", k, 1)
        torch.library.opcheck(torch.ops.rewriter.kept_entries, given)
    gate, up, down = (torch.randn(s) for s in ((12, 6), (12, 6), (5, 12)))
    x, columns = torch.randn(2, 6), down.t().contiguous()
    floats = gate, None, None, None, up, None, None, down, None, columns, None
    torch.library.opcheck(torch.ops.rewriter.sparse_gated, (x, *floats, "silu", 3, 0.25))
    (gate, s), (up, t), (down, u) = map(quantize_weight, (gate, up, down))
    levels = gate, s, None, None, up, t, None, down, u, down.t().contiguous(), None
    torch.library.opcheck(torch.ops.rewriter.sparse_gated, (x, *levels, "silu", 3, 0.25))


def test_trains_without_the_fused_form() -> None:
    out = rewritten(Gated(nn.SiLU()))
    out(torch.randn(3, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in out.parameters())


def test_is_saved_copied_and_loaded(tmp_path: pathlib.Path) -> None:
    model = Gated(nn.SiLU())
    out, x = rewritten(model, SparseGate(0.75)), torch.randn(1, 64)
    out.save(tmp_path)
    with torch.no_grad():
        for again in (rewriter.load(tmp_path, Gated(nn.SiLU()).eval()), copy.deepcopy(out)):
            assert_reordered(again(x), out(x))


def test_calibration_is_met_on_rows_held_out() -> None:
    report = rewritten(Gated(nn.SiLU()), SparseGate(0.9)).report
    (row,) = [d for d in report.decisions if d.changed and d.site == "gate"]
    assert "rows held out (asked: 90%, known within" in row.reason
    assert float(row.reason.split("%")[0]) == pytest.approx(90, abs=4)
    assert row.kernel.startswith("torch, keeps 1")


# int8 weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [SparseGate(k=24), SparseGate(0.75)])
@pytest.mark.parametrize(("act", "bias", "first"), [("silu", True, "gate"), ("relu", False, "up")])
def test_int8_weights_are_read_where_neurons_are_active(
    own: Any, act: str, bias: bool, first: str, tmp_path: pathlib.Path
) -> None:
    model = Gated(ACTS[act], bias, first)
    out = eights(model, own)
    assert isinstance(out.gate, Int8GateLinear)
    assert type(out.up) is type(out.down) is Int8WeightLinear
    assert not [n for n, _ in out.named_parameters() if not n.endswith("bias")]
    (fused,) = places(out)
    assert (fused.action, fused.kernel) == ("lowered", "sparse_gated")
    (step,) = [s for s in out.report.steps if s.name.startswith("Quantize")]
    row = next(d for d in step.decisions if d.site == "gate")
    assert 0 < row.error < 0.02
    assert "of its neurons" in row.kernel
    exact = copy.deepcopy(model)
    for name in ("gate", "up", "down"):
        weight = out.get_submodule(name).stored_weight()
        exact.get_submodule(name).weight = nn.Parameter(weight)
    with torch.no_grad():
        for rows in (1, 2, 5, 40):  # in the kernel, by its union and beyond it
            x = torch.randn(rows, 64)
            assert_reordered(out(x), formula(out, exact, x))
        out.save(tmp_path)
        for again in (
            rewriter.load(tmp_path, Gated(ACTS[act], bias, first).eval()),
            copy.deepcopy(out),
        ):
            assert_reordered(again(x), out(x))


def eights(model: nn.Module, own: Any, **options: Any) -> Any:
    if own.needs_calibration:
        options.setdefault("calibration", [torch.randn(64, 64) for _ in range(4)])
    return rewrite(model.eval(), [own, Quantize("int8-weight")], torch.randn(1, 64), **options)


def test_int8_weights_of_neurons_that_are_not_active_are_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, x = eights(Gated(nn.SiLU()), SparseGate(k=0.25)), torch.randn(1, 64)
    with torch.no_grad():
        idle = ~active_reference(F.silu(out.gate(x))[0], Select(24))
        want = out(x)
        out.up.scale[idle] = float("nan")
        assert_equal(out(x), want)
        monkeypatch.setattr(kernel, "_measured", lambda *_: 0.2)
        assert out(x).isnan().all()  # a dense product


def test_gradients_of_int8_weights_are_those_of_kept_neurons() -> None:
    out = eights(Gated(nn.SiLU()), SparseGate(k=0.25))
    x, same = (torch.randn(3, 64).requires_grad_() for _ in range(2))
    same.data.copy_(x.data)
    out(x).square().sum().backward()
    a = F.silu(F.linear(same, out.gate.stored_weight(), out.gate.bias))
    a = a * active_reference(a, Select(24))
    h = a * F.linear(same, out.up.stored_weight(), out.up.bias)
    F.linear(h, out.down.stored_weight(), out.down.bias).square().sum().backward()
    assert_reordered(x.grad, same.grad)


def test_other_schemes_leave_such_a_gate_and_say_so() -> None:
    model = Gated(nn.SiLU()).eval()
    out = rewrite(model, [SparseGate(k=0.25), Quantize("int8-dynamic")], torch.randn(1, 64))
    assert isinstance(out.gate, GateLinear)
    (step,) = [s for s in out.report.steps if s.name.startswith("Quantize")]
    reason = next(d.reason for d in step.decisions if d.site == "gate")
    assert reason == "scheme int8-dynamic has no layer for a gate_linear; taken by int8-weight"


# Refusals ----------------------------------------------------------------------------------------


def left(model: nn.Module, own: Any = None, **options: Any) -> str:
    out = rewritten(model, own, **options)
    (row,) = [d for d in out.report.skipped if d.site == "gate"]
    return row.reason


def test_an_activation_that_is_not_0_at_0() -> None:
    assert left(Gated(nn.Sigmoid())) == "its activation is none of relu, gelu, gelu_tanh, silu"


def test_a_k_that_keeps_all() -> None:
    assert left(Gated(nn.SiLU()), SparseGate(k=96)) == "k=96 keeps all 96 neurons"


def test_weights_that_are_not_finite_or_tied() -> None:
    model = Gated(nn.SiLU())
    with torch.no_grad():
        model.gate.weight[0, 0] = float("nan")
    assert left(model) == "the weights hold NaN or inf"
    model = Gated(nn.SiLU())
    model.up.weight = model.gate.weight
    assert "up" in left(model)


def test_too_little_calibration() -> None:
    reason = left(Gated(nn.SiLU()), SparseGate(0.5), calibration=[torch.randn(63, 64)])
    assert "give it 63 rows, and a quantile takes 64: pass more text" in reason
    with pytest.raises(CalibrationError, match="calibration"):
        rewritten(Gated(nn.SiLU()), SparseGate(0.5), calibration=None)


def test_a_gate_that_was_rewritten_before() -> None:
    model = Gated(nn.SiLU()).eval()
    passes = [Monarch(nblocks=4, where="gate"), SparseGate(k=0.5)]
    out = rewrite(model, passes, torch.randn(1, 64))
    assert not isinstance(out.gate, GateLinear)


@pytest.mark.parametrize(
    "options",
    [{}, {"sparsity": 0.5, "k": 3}, {"sparsity": 1.0}, {"sparsity": 0}, {"k": 0}, {"k": 1.5}],
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        SparseGate(**options)


def test_the_layer_refuses_what_it_cannot_be() -> None:
    with pytest.raises(OptionError, match="then must be one of relu"):
        GateLinear(4, 8, "tanh")
    with pytest.raises(OptionError, match="k"):
        GateLinear(4, 8, "silu", k=9)
    with pytest.raises(OptionError, match="Int8GateLinear: then"):
        Int8GateLinear(4, 8, "tanh")


def test_without_a_compiled_kernel_the_plain_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "refusal", lambda: "no compiler")
    model = Gated(nn.SiLU())
    out, x = rewritten(model), torch.randn(2, 64)
    assert [d.reason for d in places(out)] == ["no compiler"]
    assert_reordered(out(x), formula(out, model, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_form_runs_where_it_was_measured_to_pay(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(kernel, "_measured", lambda *_: 0.2)
    (row,) = places(rewritten(Gated(nn.SiLU()), lower=[*DEFAULT_RULES]))
    assert row.reason == "dense products are faster here where 25% of the neurons are active"
    monkeypatch.undo()
    asked: list[str] = []

    def fastest(key: str, version: str, candidates: Any, *_: Any) -> str:
        asked.append(key)
        pair = candidates()
        got, want = pair["sparse"]()[0], pair["dense"]()
        if asked[-1].split()[6] == "1.0":
            assert_reordered(got.to(want.dtype), want)
        assert got.shape == want.shape == (2, 16)
        return "sparse"

    monkeypatch.setattr(choice, "fastest", fastest)
    assert kernel._measured.__wrapped__(dtype, 2, 8, 32, 16, 1) == 1.0
    assert asked[0].startswith(f"sparse_gated {dtype} 2 8 32 16")
