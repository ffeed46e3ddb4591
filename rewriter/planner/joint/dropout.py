"""Dropout as eager mode rounds it."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

__all__ = ["as_eager_rounds", "rounded"]


def rounded(scale: float, like: Tensor) -> float:
    """1/(1 − p) in the dtype of a tensor on the CPU, where eager mode multiplies by a mask that
    holds it; PyTorch's trace multiplies by the unrounded number, which bfloat16 shows."""
    if like.device.type != "cpu":
        return scale
    with unset_fake_temporarily():
        return float(torch.tensor(scale, dtype=like.dtype))


def as_eager_rounds(module: fx.GraphModule) -> None:
    """Gives the backward of every dropout of a joint graph the number that eager mode has."""
    target = torch.ops.aten.native_dropout_backward.default
    for node in module.graph.find_nodes(op="call_function", target=target):
        grad, mask, scale = node.args
        node.args = grad, mask, rounded(scale, node.meta["val"])
