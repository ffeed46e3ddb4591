"""What torch makes new tensors of is no part of what a rewritten model computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from closeness import assert_equal
from torch import nn

from rewriter import Pass, rewrite
from rewriter.kernels import sparse
from rewriter.kernels.settings import own_settings
from rewriter.kernels.weight_bound import is_plain_call
from rewriter.passes import Experts, Monarch, Quantize, Threshold, TopK

MEASURED, REFUSAL = sparse._measured, sparse.refusal  # what others put in their place aside
RECIPES: dict[str, list[Pass]] = {
    "topk": [TopK(0.1)],
    "threshold": [Threshold(0.9, inputs="all")],
    "threshold, int8": [Threshold(0.9, inputs="all"), Quantize("int8-weight")],
    "threshold, int4": [Threshold(0.9, inputs="all"), Quantize("int4-weight")],
    "experts": [Experts(8, 0.25)],
    "int8-dynamic": [Quantize()],
    "int8-static": [Quantize("int8-static")],
    "int8-weight": [Quantize("int8-weight")],
    "monarch, int8": [Monarch(nblocks=4), Quantize()],
}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_outputs_do_not_depend_on_it(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    calibration = [torch.randn(100, 512) for _ in range(2)]
    given = calibration if any(p.samples for p in RECIPES[name]) else None
    made = rewrite(model, RECIPES[name], calibration[0][:2], calibration=given)
    for x in (calibration[0][:2], calibration[1]):
        with torch.no_grad():
            want = made(x)
            torch.set_default_dtype(dtype)
            got = made(x)
            torch.set_default_dtype(torch.float32)
        assert got.dtype == torch.float32
        assert_equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_kernels_are_chosen_and_probed_under_any(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    assert REFUSAL.__wrapped__() == sparse.sparse_cpu.refusal()
    weight = torch.ones(24, 40, dtype=torch.float32)
    assert 0 <= MEASURED.__wrapped__(torch.float32, 1, *weight.shape, 1) <= 1
    assert torch.get_default_dtype() == dtype


def test_plain_calls_are_timed_as_plain_calls() -> None:
    """A mode around a call would send it through the dispatcher."""
    layer = nn.Linear(4, 4)
    with own_settings():
        assert is_plain_call(layer.weight)
