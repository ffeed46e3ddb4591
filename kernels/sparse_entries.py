"""Rows with zeros in the place of entries that are not active, as an op of its own.

    y[i] = x[i] where |act(x[i])|·importance[i] is at least the threshold, or among the k largest of
    its row, else 0

For what no product reads right away. In front of an activation with act(0) = 0 it is chosen by what
that makes of x, as in the gate of an MLP; behind one by x itself, and a layer of `Threshold` reads
no weights of the zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels import ops
from rewriter.kernels.common import owned, register_gradient, register_vmap
from rewriter.kernels.sparse import Select, active, active_for_onnx, active_reference

__all__ = ["THEN", "kept_entries"]

THEN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
"""Activations that are 0 at 0."""

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "kept_entries(Tensor x, Tensor? threshold, Tensor? importance, str then, int k, int block) "
    "-> Tensor"
)


def kept_entries(
    x: Tensor,
    *,
    threshold: Tensor | None = None,
    importance: Tensor | None = None,
    then: str = "",
    k: int = 0,
    block: int = 1,
) -> Tensor:
    """x with zeros where it is not active; the gradient is that of the active entries.

    Args:
        x: [*, width].
        threshold: [1]: scores ≥ it are active; None: by k.
        importance: [width] float32; None: 1.
        then: the activation that scores are taken behind, one of `THEN`; "": none.
        k: without a threshold, how many of the largest scores of a row; ties by the lower index.
        block: as many neighbours are active together, by the largest score among them.

    Returns:
        As x. NaN counts as the largest score.
    """
    found: Tensor = torch.ops.rewriter.kept_entries(x, threshold, importance, then, k, block)
    return found


def _by(mask: Callable[[Tensor, Select], Tensor]) -> Callable[..., Tensor]:
    """What of an x is active, as a function of all that the op is given."""

    def masked(
        x: Tensor,
        threshold: Tensor | None,
        importance: Tensor | None,
        then: str,
        k: int,
        block: int,
    ) -> Tensor:
        entries = THEN[then](x.detach()) if then else x.detach()
        return mask(entries, Select.of(threshold, importance, k, block))

    return masked


def _reference(x: Tensor, *chosen: Any) -> Tensor:
    return x.where(_by(active_reference)(x, *chosen), 0.0)


def _for_onnx(x: Tensor, *chosen: Any) -> Tensor:
    return x.where(_by(active_for_onnx)(x, *chosen), 0.0)


def _forward(x: Tensor, *chosen: Any) -> Tensor:
    return owned(x.where(_by(active)(x, *chosen), 0.0).contiguous(), x.shape)


def _fake(x: Tensor, *chosen: Any) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(_by(active_reference)(*inputs))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    return grad.where(mask, 0.0), None, None, None, None, None


_LIB.impl("kept_entries", _forward, "CompositeExplicitAutograd")
register_gradient(_LIB, "kept_entries", _reference, _save, _backward, _forward)
register_vmap(_LIB, "kept_entries", _reference)
torch.library.register_fake("rewriter::kept_entries", _fake, lib=_LIB)
RECORD = ops.register(
    ops.Record(
        "rewriter::kept_entries",
        kind="pointwise",
        flops=lambda *_, **__: 0,
        reference=_reference,
        onnx=_for_onnx,
    )
)
