"""How close two results have to be, by what they are: the one place of the tests with tolerances.

An exact operation is held to `torch.testing.assert_close` as it is. What follows is for results
that are equal bit for bit, summed in another order, or lossy, which have an SQNR floor or the error
that they report of themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

ROUNDING = {
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}
"""What sums of a few hundred terms lose to rounding, as a share of the largest value."""


def assert_equal(got: Any, want: Any, *, equal_nan: bool = False) -> None:
    """got = want bit for bit: tensors, and containers of them."""
    assert_close(got, want, rtol=0, atol=0, equal_nan=equal_nan)


def assert_reordered(
    got: Tensor, want: Tensor, dtype: torch.dtype | None = None, *, equal_nan: bool = False
) -> None:
    """|got − want| ≤ ε·max|want|: the same arithmetic in another order, or by another kernel.

    Args:
        dtype: that of the arithmetic, where it is not that of the results; gives ε.
    """
    tolerance = ROUNDING[dtype or want.dtype]
    finite = want.detach()[want.detach().isfinite()].abs()
    scale = float(finite.max()) if len(finite) else 0.0
    assert_close(got, want, rtol=0, atol=tolerance * scale, equal_nan=equal_nan)


def sqnr(got: Tensor, want: Tensor) -> float:
    """10·log10(‖want‖² / ‖got − want‖²), in decibels: signal over noise of quantization."""
    got, want = got.detach().double(), want.detach().double()
    return float(10 * torch.log10(want.square().sum() / (got - want).square().sum()))
