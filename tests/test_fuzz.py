"""Random models × random recipes (tests/fuzz/graphs.py); `make fuzz N=10000` runs more of them.

A seed that has failed stays in `FAILED`; what was wrong with it is said beside it.
"""

from __future__ import annotations

import pytest
from fuzz.graphs import check, describe

CASES, PART = 200, 20
FAILED = {
    54: "a weight of a function before an LSTM: load by the recorded example found another model",
    308: "the same of an attention's weight before an RNN",
}


@pytest.mark.parametrize("first", range(0, CASES, PART))
def test_random_models_under_random_recipes_are_right(first: int) -> None:
    for seed in range(first, first + PART):
        wrong = check(seed).wrong
        assert not wrong, "\n".join([f"seed {seed}:", *wrong, describe(seed)])


@pytest.mark.parametrize("seed", FAILED)
def test_what_once_failed_is_right(seed: int) -> None:
    wrong = check(seed).wrong
    assert not wrong, "\n".join([FAILED[seed], *wrong, describe(seed)])
