"""Formulas over open sizes, and reports at other sizes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter import OptionError, Report, StoreError, explain, rewrite
from rewriter.cost import Cost, Device
from rewriter.cost.symbolic import Formula, frontier, largest, least
from rewriter.passes import Monarch, Quantize, TopK

SIZES = {"batch": 7, "sequence": 12}
B, S = Formula.of("batch"), Formula.of("sequence")


def formulas() -> st.SearchStrategy[Formula]:
    leaf = st.sampled_from([B, S]) | st.integers(0, 9).map(lambda n: Formula({(): n}))
    return st.recursive(
        leaf,
        lambda inner: (
            st.tuples(inner, inner).map(lambda p: p[0] + p[1])
            | st.tuples(inner, inner).map(lambda p: p[0] * p[1])
            | inner.map(lambda f: f // 3)
            | st.tuples(inner, inner).map(lambda p: Formula({}) + largest(p))
            | st.tuples(inner, inner).map(lambda p: Formula({}) + least(*p))
        ),
        max_leaves=6,
    )


@given(formulas(), formulas(), st.integers(-4, 9))
def test_arithmetic_is_that_of_numbers(f: Formula, g: Formula, n: int) -> None:
    a, b = f.at(SIZES), g.at(SIZES)
    assert (f + g).at(SIZES) == a + b
    assert (f - g).at(SIZES) == a - b
    assert (f * g).at(SIZES) == a * b
    assert (f + n).at(SIZES) == (n + f).at(SIZES) == a + n
    assert (f * n).at(SIZES) == (n * f).at(SIZES) == a * n
    assert (n - f).at(SIZES) == n - a
    assert (f // 2).at(SIZES) == a // 2
    assert (Formula({}) + largest((f, g, n))).at(SIZES) == max(a, b, n)
    assert (Formula({}) + least(f, g)).at(SIZES) == min(a, b)


@given(formulas())
def test_text_there_and_back(f: Formula) -> None:
    again = Formula.parse(str(f))
    assert again.at(SIZES) == f.at(SIZES)
    assert str(again) == str(f)


def test_equal_polynomials_are_equal() -> None:
    assert (B + 1) * (B - 1) == B * B - 1
    assert hash(B * S) == hash(S * B)
    assert B - B == 0
    assert str(3 * B * S + 64) == "3*batch*sequence + 64"
    assert largest([B, 2 * B, B + S]) != largest([B, 2 * B])
    assert largest([B, 2 * B]) == 2 * B


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "batch.real", "lambda: 1", "2**batch", "f(1)", "'a'", "batch if 1 else 2",
     "max(x for x in y)", "1 +", "[1]"],
)  # fmt: skip
def test_text_that_is_no_formula(text: str) -> None:
    with pytest.raises(StoreError, match="is no formula"):
        Formula.parse(text).at(SIZES)


def test_a_missing_size_is_named() -> None:
    with pytest.raises(OptionError, match="'sequence' is not given"):
        (B * S).at({"batch": 2})


# reports


class Net(nn.Module):
    """Embedding, attention, an MLP: figures linear in the batch, quadratic in the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.qkv, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (t.unsqueeze(1) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.down(nn.functional.gelu(self.up(x)))


def ids(batch: int, sequence: int) -> Tensor:
    return torch.zeros(batch, sequence, dtype=torch.int64)


PASSES = [Monarch(nblocks=2), TopK(k=8), Quantize("int8-dynamic")]


@pytest.fixture(scope="module")
def report() -> Report:
    return explain(Net(), PASSES, ids(4, 6))


def figures(cost: Cost) -> dict[str, object]:
    data = cost.to_dict()
    return {k: v for k, v in data.items() if k not in ("formulas", "measured_s")}


@pytest.mark.slow
def test_at_equals_a_report_made_at_these_sizes(report: Report) -> None:
    assert report.sizes == {"batch": 4, "sequence": 6}
    moved, made = report.at(batch=16, sequence=40), explain(Net(), PASSES, ids(16, 40))
    for a, b in zip(moved.steps, made.steps, strict=True):
        assert figures(a.before) == figures(b.before)
        assert figures(a.after) == figures(b.after)
        for d, e in zip(a.decisions, b.decisions, strict=True):
            assert (d.before and figures(d.before)) == (e.before and figures(e.before))
            assert (d.after and figures(d.after)) == (e.after and figures(e.after))
    flops = report.at(sequence=1000).after.flops
    assert report.at(sequence=1000, batch=8).after.flops == 2 * flops


class Tied(Net):
    """An output that shares the embedding's weight, and inputs that the backward does not need."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        logits = super().forward(input_ids) @ self.embed.weight.t()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)


def conv_net() -> nn.Module:
    body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (Net, (ids(4, 6),)),
        pytest.param(encoder_layer, (torch.zeros(4, 6, 32),), marks=pytest.mark.slow),
        pytest.param(Tied, (ids(4, 6), ids(4, 6)), marks=pytest.mark.slow),
        pytest.param(Tied, (ids(4, 6),) * 2, marks=pytest.mark.slow),
        pytest.param(
            lambda: nn.Sequential(*[nn.Linear(8, 8) for _ in range(30)]),
            (torch.zeros(4, 8),),
            marks=pytest.mark.slow,
        ),
        (conv_net, (torch.zeros(4, 3, 9, 9),)),
    ],
    ids=["net", "encoder", "tied", "one tensor twice", "deep", "conv"],
)
def test_at_its_own_sizes_is_the_report_itself(make: Any, inputs: Any) -> None:
    """The formulas are found in a run of their own: it must see what the first one saw."""
    report = explain(make(), [Monarch(nblocks=2)], inputs)
    again = report.at()
    assert figures(again.before) == figures(report.before)
    assert figures(again.after) == figures(report.after)


def test_a_report_keeps_no_weights_alive() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    weights = [weakref.ref(model[i].weight.untyped_storage()) for i in (0, 2)]
    optimized = rewrite(model, [Quantize("int8-dynamic")], torch.zeros(4, 64), inplace=True)
    assert optimized is model
    gc.collect()
    assert [w() for w in weights] == [None, None]
    assert optimized.report.at(batch=8).after.flops == 2 * optimized.report.after.flops


def test_predicted_times_see_autocast() -> None:
    """The new layer computes in the dtype that the old one did."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(512, 512)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.fc(x)

    x = torch.zeros(4096, 512)
    plain = rewrite(Cast(), [Monarch(nblocks=8)], x, device="h100").report
    picked = rewrite(Cast(), [Monarch(nblocks=8)], x, device="h100", objective="latency").report
    faster = plain.after.latency_s < plain.before.latency_s
    assert [d.changed for d in picked.decisions] == [faster]


def test_many_alternatives_keep_what_matters() -> None:
    values = [Formula({("batch",): n, (): 200_000 - 50 * n**2}) for n in range(60)]
    kept = frontier(values, {"batch": 37})
    assert 2 < len(kept) < 60
    for batch in (1, 37, 100, 1000, 10**6):
        true = max(v.at({"batch": batch}) for v in values)
        found = max(values[i].at({"batch": batch}) for i in kept)
        assert found <= true <= found * 1.01
    assert max(v.at({"batch": 37}) for v in values) == max(
        values[i].at({"batch": 37}) for i in kept
    )


def test_at_predicts_times_of_the_device(report: Report) -> None:
    assert report.at(batch=64).after.latency_s is None
    slow, fast = (
        report.at(batch=4096, device=Device.get("L4")),
        report.at(batch=4096, device="H100"),
    )
    assert slow.device != fast.device
    assert slow.after.latency_s > fast.after.latency_s > 0
    assert fast.after.energy_j > 0
    assert fast.at(batch=8192).after.latency_s > fast.after.latency_s
    assert all(d.after.latency_s > 0 for d in fast.replaced if d.after)


def test_formulas_survive_storage_and_copies(report: Report) -> None:
    stored = Report.from_json(report.with_formulas().to_json())
    assert stored.at(batch=9).after == report.at(batch=9).after
    assert copy.deepcopy(report).at(batch=9).after == report.at(batch=9).after
    without = Report.from_json(report.to_json())
    assert without.after == report.after
    for lost in (without, pickle.loads(pickle.dumps(report))):
        with pytest.raises(OptionError, match="cannot be priced at other sizes"):
            lost.at(batch=2)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"bacth": 2}, "no open size is called 'bacth'; did you mean batch"),
        ({"batch": 0}, "at least 1"),
        ({"batch": 2.5}, "whole number"),
        ({"batch": True}, "whole number"),
    ],
)
def test_impossible_sizes(report: Report, sizes: dict[str, int], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        report.at(**sizes)


def test_a_size_that_the_graph_does_not_serve() -> None:
    class Limited(Net):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.zeros(16, 32))

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.places[: ids.shape[1]]

    limited = explain(Limited(), [], ids(2, 6))
    assert limited.at(sequence=16).after.flops > limited.after.flops
    with pytest.raises(OptionError, match="serves at most 16"):
        limited.at(sequence=17)


def test_an_example_of_one_row_prices_more() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    one, many = (explain(model, [], torch.zeros(n, 8)) for n in (1, 64))
    assert figures(one.at(batch=64).after) == figures(many.after)


def test_models_by_parts_have_no_formulas() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() > 0 else self.net(-x)

    report = explain(Branches(), [], torch.ones(2, 8))
    assert report.capture.rung == "parts"
    with pytest.raises(OptionError, match="no open size|cannot be priced"):
        report.at(batch=4)


def test_measured_times_of_every_step() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.zeros(4, 8)
    measured = rewrite(model, [Monarch(nblocks=2)], x, measure=True).report
    assert all(s.after.measured_s > 0 for s in measured.steps)
    assert measured.steps[1].before.measured_s == measured.steps[0].after.measured_s
    assert rewrite(model, [], x).report.after.measured_s is None
    assert explain(model.to("meta"), [], x.to("meta"), measure=True).after.measured_s is None


def test_predicted_times_decide_where_a_device_is_named() -> None:
    model, x = nn.Sequential(nn.Linear(512, 512)), torch.zeros(1, 512)
    report = rewrite(model, [Monarch(nblocks=4)], x, device="h100", objective="latency").report
    assert report.device == "H100-SXM"
    for decision in report.decisions:
        old, new = (c and c.latency_s for c in (decision.before, decision.after))
        assert (new < old) if decision.changed else "predicted" in decision.reason
    assert report.before.latency_s > 0
    assert report.before.training is not None
    assert report.before.training.latency_s > report.before.latency_s


@pytest.mark.parametrize("device", [3, object(), ["h100"]])
def test_a_device_that_is_none(device: object) -> None:
    with pytest.raises(OptionError, match="the name of a device"):
        rewrite(nn.Sequential(nn.Linear(4, 4)), [], torch.zeros(1, 4), device=device)


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="H100"):
        rewrite(nn.Sequential(nn.Linear(4, 4)), [], torch.zeros(1, 4), device="h10")
