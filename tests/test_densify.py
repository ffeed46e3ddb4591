"""Densify: a MonarchLinear back to the nn.Linear that computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rewriter.base import Phase, Replacement
from rewriter.passes import MonarchChainLinear, MonarchResidualLinear
from rewriter.passes.densify import Densify
from rewriter.passes.monarch import Monarch, MonarchLinear
from rewriter.sites import Site


def densify(layer: MonarchLinear) -> nn.Linear:
    answer = Densify().propose(Site.of(layer))
    assert isinstance(answer, Replacement)
    assert answer.error == 0.0
    assert type(answer.layer) is nn.Linear
    return answer.layer


def test_pass_declares_what_it_matches():
    assert Densify.matches == (MonarchLinear, MonarchChainLinear, MonarchResidualLinear)
    assert Densify.phase is Phase.STRUCTURE
    assert Densify().exact


@pytest.mark.parametrize("sizes", [(16, 16, 4), (12, 20, 2), (10, 7, 3), (9, 9, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dense_layer_computes_the_same(sizes, bias, dtype):
    layer = MonarchLinear(*sizes, bias=bias, dtype=dtype).eval()
    dense = densify(layer)
    x = torch.randn(3, 5, sizes[0], dtype=dtype)
    assert_close(dense(x), layer(x))
    assert dense.bias is layer.bias
    assert (dense.in_features, dense.out_features) == sizes[:2]
    assert not dense.training
    assert dense.weight.is_leaf


def test_dtype_device_and_requires_grad_are_kept():
    dense = densify(MonarchLinear(16, 16, dtype=torch.bfloat16).requires_grad_(False))
    assert dense.weight.dtype == torch.bfloat16
    assert not dense.weight.requires_grad
    dense = densify(MonarchLinear(16, 16, device="meta"))
    assert dense.weight.is_meta
    assert dense.weight.requires_grad
    assert dense.training


def test_monarch_after_densify_is_exact():
    layer = MonarchLinear(48, 32, 4)
    back = Monarch(nblocks=4).propose(Site.of(densify(layer)))
    assert isinstance(back, Replacement)
    assert back.error < 1e-6
    x = torch.randn(4, 48)
    assert_close(back.layer(x), layer(x))
    assert back.layer.bias is layer.bias
