"""Which cases of a test run always, and which only where there is time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["slow_but"]


def slow_but(values: Iterable[Any], *fast: int) -> list[Any]:
    """The values as parameters of a test, all but those at the positions `fast` marked slow."""
    return [
        value if i in fast else pytest.param(value, marks=pytest.mark.slow)
        for i, value in enumerate(values)
    ]
