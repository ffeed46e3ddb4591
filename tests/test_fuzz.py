"""Random models × random recipes (tests/fuzz/graphs.py); `make fuzz N=10000` runs more of them.

A model that has failed stays in `FAILED`, as small as it can be: a seed draws another model once
the generator knows more.
"""

from __future__ import annotations

from typing import Any

import pytest
from fuzz.graphs import check, check_written, describe
from fuzz.models import Source
from marks import slow_but

from rewriter.passes import Densify, Monarch, MonarchChain, Quantize

CASES, PART = 120, 10
FAILED: dict[str, tuple[Source, list[Any]]] = {
    "a weight of a function before an LSTM: load by the recorded example found another model": (
        Source(
            init=[
                "self.w = nn.Parameter(torch.randn(8, 8) * 0.3)",
                "self.first = nn.Linear(8, 8)",
                "self.second = nn.LSTM(8, 8, batch_first=True)",
            ],
            body=["x = torch.matmul(x, self.w.t())", "x = self.second(self.first(x))[0]"],
        ),
        [Monarch(nblocks=2)],
    ),
    "the same of an attention's weight before an RNN": (
        Source(
            kind="tokens",
            init=[
                "self.embed = nn.Embedding(20, 8)",
                "self.first = nn.MultiheadAttention(8, 2, batch_first=True)",
                "self.second = nn.RNN(8, 6, batch_first=True)",
            ],
            body=[
                "x = self.embed(x)",
                "x = self.first(x, x, x, need_weights=False)[0]",
                "x = self.second(x)[0]",
            ],
        ),
        [Monarch(nblocks=2)],
    ),
    "layers named as methods of a rewritten model are": (
        Source(
            init=["self.save = nn.Linear(8, 8)", "self.report = nn.ReLU(inplace=True)"],
            body=["x = self.report(self.save(x))"],
        ),
        [Monarch(nblocks=2)],
    ),
    "a layer that Python gives its input by name, as that of nn.Linear is": (
        Source(
            form="args",
            init=["self.first = nn.Linear(8, 8)"],
            body=["x = self.first(input=x)", "x = x if x.sum() > 0 else -x"],
        ),
        [MonarchChain(order=2), Quantize("int8-dynamic")],
    ),
    "a weight that Python reads by hand, of a layer that is dense again": (
        Source(
            init=["self.first = Scaled(8, 8)", "self.second = Own(8, 8)"],
            body=["x = self.second(self.first(x))", "x = x if x.sum() > 0 else -x"],
        ),
        [Monarch(nblocks=2), Densify()],
    ),
}


@pytest.mark.parametrize("first", slow_but(range(0, CASES, PART), *range(2)))
def test_random_models_under_random_recipes_are_right(first: int) -> None:
    for seed in range(first, first + PART):
        wrong = check(seed, quick=True).wrong
        assert not wrong, "\n".join([f"seed {seed}:", *wrong, describe(seed)])


@pytest.mark.parametrize("name", slow_but(FAILED, 0, 2, 3, 4))
def test_what_once_failed_is_right(name: str) -> None:
    source, passes = FAILED[name]
    found = check_written(source, passes, lower=True)
    assert found.runs, source.text
    assert not found.wrong, "\n".join([name, *found.wrong, source.text])
