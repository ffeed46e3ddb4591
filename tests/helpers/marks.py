"""Which cases of a test run always, and which only where there is time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

__all__ = ["slow_but", "slow_but_named"]


def slow_but_named(axes: Sequence[Mapping[str, Any]], fast: Iterable[tuple[str, ...]]) -> list[Any]:
    """Every combination of the axes' values, all but those of the names `fast` marked slow: one of
    each value suffices where they take turns on the same path."""
    fast = set(fast)
    names = list(itertools.product(*axes))
    assert fast <= set(names)
    return [
        pytest.param(
            *(axis[n] for axis, n in zip(axes, each, strict=True)),
            id="-".join(each),
            marks=[] if each in fast else [pytest.mark.slow],
        )
        for each in names
    ]


def slow_but(values: Iterable[Any], *fast: int) -> list[Any]:
    """The values as parameters of a test, all but those at the positions `fast` marked slow."""
    return [
        value if i in fast else pytest.param(value, marks=pytest.mark.slow)
        for i, value in enumerate(values)
    ]
