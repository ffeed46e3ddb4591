"""Which of two layers is the faster one is asked of what later passes make of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewriter import rewrite
from rewriter.engine import decide, slower
from rewriter.engine.slower import Lost
from rewriter.errors import PassError
from rewriter.passes import Monarch, MonarchLinear, Quantize, QuantizedLinear, QuantizedMonarch

ADD = Lost.add
PASSES = [Monarch(nblocks=2, rank=1), Quantize()]
X = torch.randn(4, 8)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[type, type]]:
    """The layers that were timed beside each other; dense ones in int8 are the fastest."""
    found: list[tuple[type, type]] = []
    seconds = {QuantizedLinear: 1e-6, QuantizedMonarch: 2e-6, MonarchLinear: 3e-6, nn.Linear: 4e-6}

    def timed(site: Any, layer: nn.Module, old: Any = None, *_: Any) -> tuple[float, float]:
        found.append((type(site.place if old is None else old), type(layer)))
        return seconds[found[-1][0]], seconds[found[-1][1]]

    def sampled(site: Any, layer: nn.Module, old: Any = None, *_: Any, **__: Any) -> Any:
        return [[1e3 * t] for t in timed(site, layer, old)]

    monkeypatch.setattr(decide, "timed", timed)
    monkeypatch.setattr(slower, "sampled", sampled)
    monkeypatch.setattr(Lost, "add", ADD)
    return found


def test_a_layer_that_is_the_slower_one_in_the_end_is_left(pairs: list[Any]) -> None:
    rewritten = rewrite(model(), PASSES, X, objective="latency", measure=True)
    assert type(rewritten[0]) is QuantizedLinear
    monarch = rewritten.report.steps[1].decisions
    assert {d.action for d in monarch} == {"declined"}
    assert monarch[0].reason == (
        "measured 2 µs, the layer it replaces 1 µs, both after Quantize(scheme='int8-dynamic')"
    )
    assert pairs[0] == (QuantizedLinear, QuantizedMonarch)


@pytest.mark.parametrize("passes", [PASSES[:1], [PASSES[0], Quantize(where="2")]])
def test_what_later_passes_leave_as_it_is_is_judged_alone(pairs: list[Any], passes: Any) -> None:
    rewritten = rewrite(model(), passes, X, objective="latency", measure=True)
    assert type(rewritten[0]) is MonarchLinear
    assert pairs[0] == (nn.Linear, MonarchLinear)


def test_without_an_objective_the_report_says_it(pairs: list[Any]) -> None:
    rewritten = rewrite(model(), PASSES, X)
    assert type(rewritten[0]) is QuantizedMonarch
    (reason, _) = (d.reason for d in rewritten.report.steps[1].decisions)
    assert reason == (
        "slower by itself than the layer it replaces, both after "
        "Quantize(scheme='int8-dynamic'): 2000 µs, 1000 µs"
    )


def test_what_nobody_minds_is_not_said(pairs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slower, "sampled", lambda *_, **__: ([10e-6], [30e-6]))
    report = rewrite(model(), PASSES, X).report  # 40 µs in all
    assert "slower" not in str(report)


def test_a_prediction_is_one_of_both_after_later_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted(site: Any, layer: nn.Module, *_: Any) -> float:
        return {QuantizedLinear: 1e-6, QuantizedMonarch: 2e-6}[type(layer)]

    monkeypatch.setattr(decide, "predicted", predicted)
    report = rewrite(model(), PASSES, X, objective="latency", device="H200").report
    assert {d.reason for d in report.steps[1].decisions} == {
        "predicted 2 µs on H200, the layer it replaces 1 µs, both after "
        "Quantize(scheme='int8-dynamic')"
    }


def test_a_later_pass_that_fails_is_named(
    pairs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, site: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(Quantize, "propose", fails)
    with pytest.raises(PassError, match=r"Quantize.* on the Linear .* at '0': .*no such thing"):
        rewrite(model(), PASSES, X, objective="latency", measure=True)
