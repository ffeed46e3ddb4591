"""TopK(at="activations"): the op, the layer, which activations it takes, and which it leaves."""

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
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from rewriter import SparsityPenalty, TopKSchedule, rewrite
from rewriter.errors import OptionError
from rewriter.kernels.sparse import Select, active_reference
from rewriter.kernels.sparse_entries import kept_entries
from rewriter.passes import Monarch, Threshold, ThresholdLinear, TopK, TopKActivation
from rewriter.passes.topk import ACTIVATIONS

OWN: Any = {"at": "activations"}


class Net(nn.Module):
    """A norm, an activation that two layers read, and a gated MLP with a functional activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(16), nn.GELU()
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 48), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(x))
        x = self.left(h) + self.right(h)
        return self.down(F.dropout(F.silu(self.gate(x)), 0.1, self.training) * self.up(x))

    def expected(self, x: Tensor, k: tuple[int, int], wina: bool = False, block: int = 1) -> Tensor:
        norms = [m.weight.float() for m in (self.left, self.right)]
        first = torch.cat(norms).norm(dim=0) if wina else None
        h = F.gelu(self.norm(x))
        h = h * active_reference(h, Select(k[0], 0.0, first, block))
        x = self.left(h) + self.right(h)
        a = F.silu(self.gate(x))
        second = self.down.weight.norm(dim=0) if wina else None
        return self.down(a * active_reference(a, Select(k[1], 0.0, second, block)) * self.up(x))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sparse(model: nn.Module, *passes: Any, x: Tensor | None = None, **options: Any) -> Any:
    x = torch.randn(3, 16) if x is None else x
    return rewrite(model.eval(), list(passes) or [TopK(0.25, **OWN)], x, **options)


# What it computes --------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "wina", "block"), [
    ({}, False, 1), ({"score": "wina"}, True, 1), ({"score": "wina", "block": 8}, True, 8),
])  # fmt: skip
def test_zeros_are_in_front_of_all_linear_layers_that_read_it(
    options: Any, wina: bool, block: int
) -> None:
    model = Net()
    out = sparse(model, TopK(0.5, **OWN, **options))
    assert [d.reason for d in out.report.replaced] == [
        "keeps 8 of 16 entries a token", "keeps 24 of 48 entries a token",
    ]  # fmt: skip
    assert {n for n, m in out.named_modules() if isinstance(m, TopKActivation)} == {
        "act", "silu_0",
    }  # fmt: skip
    for rows in (1, 5, 40):
        x = torch.randn(rows, 16)
        assert_reordered(out(x), model.expected(x, (8, 24), wina, block))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_every_activation(name: str) -> None:
    x = torch.randn(7, 24, requires_grad=True)
    layer = TopKActivation(name, 24, 6)
    y = layer(x)
    dense = ACTIVATIONS[name](x)
    mask = active_reference(dense, Select(6))
    assert_equal(y, dense * mask)
    given_ = torch.randn(7, 24)
    own, want = (torch.autograd.grad(t, x, given_, retain_graph=True)[0] for t in (y, dense * mask))
    assert_reordered(own, want)
    through = TopKActivation(name, 24, 6, straight_through=True).train()
    (own,) = torch.autograd.grad(through(x), x, given_)
    assert_reordered(own, torch.autograd.grad(dense, x, given_)[0])
    assert_reordered(through(x), y)


def test_as_modules_and_functions_of_all_spellings() -> None:
    class Spelled(nn.Module):
        def __init__(self, act: Any) -> None:
            super().__init__()
            self.act, self.fc = act, nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.act(x))

    spellings = (
        nn.GELU("tanh"), nn.ReLU6(), nn.Hardtanh(0, 6), torch.relu, torch.tanh, F.hardswish,
        lambda x: F.gelu(x, approximate="tanh"), lambda x: x.sigmoid(),
    )  # fmt: skip
    for act in spellings:
        model = Spelled(act)
        x = torch.randn(5, 16)
        dense = act(x)
        want = model.fc(dense * active_reference(dense, Select(4)))
        assert_reordered(sparse(model, x=x)(x), want)


def test_a_threshold_behind_it_reads_no_weights_of_the_zeros() -> None:
    plain = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 8))
    batches = [torch.randn(64, 16) for _ in range(4)]
    out = sparse(plain, TopK(0.25, **OWN), Threshold(0.5), calibration=batches)
    layer = out[2]
    assert isinstance(layer, ThresholdLinear)
    assert layer.share == pytest.approx(0.25, abs=0.002)
    x = torch.randn(1, 16)
    assert_reordered(out(x), sparse(plain)(x))  # zeros alone went


def test_a_reader_that_holds_no_dense_weight() -> None:
    model = nn.Sequential(nn.GELU(), nn.Linear(16, 16))
    out = sparse(model, Monarch(nblocks=4), TopK(0.25, **OWN))  # passes in the order of phases
    assert isinstance(out[0], TopKActivation)
    assert (out[0](torch.randn(5, 16)) != 0).sum(-1).eq(4).all()


def test_a_module_that_is_called_in_several_places() -> None:
    class Shared(nn.Module):
        def __init__(self, second: int) -> None:
            super().__init__()
            self.act, self.one, self.two = nn.ReLU(), nn.Linear(16, second), nn.Linear(second, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.act(self.one(self.act(x))))

    model, x = Shared(16), torch.randn(3, 16)
    out = sparse(model)
    h = F.relu(x)
    h = F.relu(model.one(h * active_reference(h, Select(4))))
    assert_reordered(out(x), model.two(h * active_reference(h, Select(4))))
    assert "reads 32 entries, another layer 16" in left(Shared(32))


# The op ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (3,), (2, 3), (0,)]),
    blocks=st.integers(1, 5),
    block=st.sampled_from([1, 2, 8]),
    weighted=st.booleans(),
    ties=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    data=st.data(),
)
def test_equals_its_reference(
    lead: Any, blocks: int, block: int, weighted: bool, ties: bool, dtype: Any, data: Any
) -> None:
    width = blocks * block
    k = block * data.draw(st.integers(1, blocks))
    x = torch.randn(*lead, width).to(dtype)
    x = x.round() if ties else x
    importance = torch.rand(width) if weighted else None
    own = x.clone().requires_grad_()
    y = kept_entries(own, importance=importance, k=k, block=block)
    mask = active_reference(x, Select(k, 0.0, importance, block))
    assert_equal(y, x.where(mask, 0.0))
    assert mask.sum(-1).eq(k).all()
    if x.numel():
        y.sum().backward()
        assert_equal(own.grad, mask.to(dtype))


def test_the_op_is_a_citizen_of_torch() -> None:
    x = torch.randn(4, 12)
    for importance in (None, torch.rand(12)):
        torch.library.opcheck(torch.ops.rewriter.kept_entries, (x, None, importance, "", 4, 2))
    assert_equal(torch.vmap(lambda r: kept_entries(r, k=4))(x), kept_entries(x, k=4))
    spoilt = x.index_fill(1, torch.tensor([5]), float("nan"))
    assert kept_entries(spoilt, k=1)[:, 5].isnan().all()


# As a part of a model ----------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["magnitude", "wina"])
def test_is_saved_copied_exported_and_cast(tmp_path: pathlib.Path, score: Any) -> None:
    out = sparse(Net(), TopK(0.25, score=score, **OWN))
    x = torch.randn(2, 16)
    out.save(tmp_path)
    again = rewriter.load(tmp_path, Net().eval())
    for other in (again, copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert_equal(other(x), out(x))
    exported = torch.export.export(out, (x,)).module()
    assert_reordered(exported(x), out(x))
    if score == "wina":
        assert out.to(torch.bfloat16).act.importance.dtype == torch.float32


def test_weights_of_another_checkpoint_go_through_the_same_rewrite() -> None:
    out, other = sparse(Net()), Net().eval()
    out.load_original(other.state_dict())
    x = torch.randn(2, 16)
    assert_reordered(out(x), other.expected(x, (4, 12)))


def test_a_schedule_and_a_penalty_take_it() -> None:
    out = sparse(Net())
    schedule = TopKSchedule(out, steps=2, changes=2)
    assert (out.act.k, out.silu_0.k) == (16, 48)
    schedule.step(), schedule.step()
    assert (out.act.k, out.silu_0.k) == (4, 12)
    with SparsityPenalty(out.train()) as penalty:
        out(torch.randn(5, 16)).sum()
        penalty.value().backward()
    assert penalty.sparsity == pytest.approx({"act": 0.75, "silu_0": 0.75})


# Refusals ----------------------------------------------------------------------------------------


def left(model: nn.Module, options: Any = None, x: Tensor | None = None) -> str:
    own: Any = {"k": 0.25, **OWN} | (options or {})
    out = sparse(model, TopK(**own), x=x)
    assert not [m for m in out.modules() if isinstance(m, TopKActivation)]
    (step,) = [s for s in out.report.steps if s.name.startswith("TopK")]
    (reason,) = {d.reason for d in step.decisions}
    return reason


class Read(nn.Module):
    """An activation that something else reads beside its linear layer."""

    def __init__(self, how: Any, width: int = 16) -> None:
        super().__init__()
        self.act, self.fc, self.how = nn.ReLU(), nn.Linear(width, 16), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.act(x), self.fc)


NOT_ALONE = "what it gives is not read by linear layers alone"


@pytest.mark.parametrize(("how", "width", "reason"), [
    (lambda h, fc: fc(h) + h, 16, NOT_ALONE),
    (lambda h, fc: h + 1, 16, NOT_ALONE),
    (lambda h, fc: h, 16, NOT_ALONE),
    (lambda h, fc: fc(h.softmax(-1)), 16, NOT_ALONE),
    (lambda h, fc: fc(torch.cat([h, h], -1)), 32, NOT_ALONE),
    (lambda h, fc: fc(h.transpose(-1, -2)), 16, NOT_ALONE),
    (lambda h, fc: fc(h.flatten(1)), 256, "its rows have 16 entries, and fc reads 256"),
    (lambda h, fc: fc(h[..., :8]), 8, "its rows have 16 entries, and fc reads 8"),
])  # fmt: skip
def test_an_output_that_linear_layers_do_not_read_as_it_is(
    how: Any, width: int, reason: str
) -> None:
    assert left(Read(how, width), x=torch.randn(3, 16, 16)) == reason


def test_convolutions_read_other_rows() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    assert left(model, x=torch.randn(2, 3, 8, 8)) == NOT_ALONE


@pytest.mark.parametrize(("options", "reason"), [
    ({"k": 16}, "k=16 keeps all 16 activations"),
    ({"k": 0.99}, "k=16 keeps all 16 activations"),
    ({"k": 2, "block": 32}, "k=32 keeps all 16 activations"),
])  # fmt: skip
def test_a_k_that_keeps_all(options: Any, reason: str) -> None:
    assert left(Read(lambda h, fc: fc(h)), options) == reason


def test_a_width_that_blocks_do_not_divide() -> None:
    model = Read(lambda h, fc: fc(h), 20)
    reason = left(model, {"k": 2, "block": 8}, torch.randn(3, 20))
    assert reason == "block=8 does not divide its 20 activations"


def test_an_activation_that_it_does_not_know() -> None:
    model = nn.Sequential(nn.ELU(), nn.Linear(16, 4))
    assert left(model).startswith("a elu with its options is none of relu, gelu, gelu_tanh, silu")


def test_without_shapes() -> None:
    out = rewrite(Read(lambda h, fc: fc(h)).eval(), [TopK(0.25, **OWN)])
    (reason,) = {d.reason for d in out.report.skipped if d.site == "act"}
    assert reason == "the width of what it gives is not known: pass example_inputs"


def test_wina_asks_weights() -> None:
    model = Read(lambda h, fc: fc(h))
    out = sparse(model, Threshold(0.5, inputs="all", where="fc"),
                 calibration=[torch.randn(80, 16)])  # fmt: skip
    reason = left(out, {"score": "wina"})
    assert reason == 'fc was rewritten before: score="magnitude" asks no weight'


@pytest.mark.parametrize("at", ["all", "mlps", 3])
def test_an_impossible_place(at: Any) -> None:
    with pytest.raises(OptionError, match="TopK: at"):
        TopK(0.25, at=at)


@pytest.mark.parametrize(("options", "message"), [
    ({"activation": "elu"}, "activation"), ({"k": 0}, "k"), ({"k": 17}, "k"),
    ({"k": 4, "block": 3}, "block=3 must divide k=4 and 16"),
])  # fmt: skip
def test_an_impossible_layer(options: Any, message: str) -> None:
    own: Any = {"activation": "relu", "width": 16, "k": 4} | options
    with pytest.raises(OptionError, match=message):
        TopKActivation(**own)


def test_a_row_of_another_size() -> None:
    with pytest.raises(OptionError, match="a row of 8 entries, where k=4 of 16 are kept"):
        TopKActivation("relu", 16, 4)(torch.randn(2, 8))
