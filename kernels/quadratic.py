"""`rewriter::quadratic_linear`: y = (x W_aᵀ) ∘ (x W_bᵀ) + x W_cᵀ + bias, backward in closed form.

Plain autograd keeps x and the two products A = x W_aᵀ and B = x W_bᵀ for the backward. Here only x
and the weights are kept, and A and B are computed again (hybrid backpropagation, QuadraLib,
Xu et al. 2022): two output-sized tensors less for two GEMMs more.

The backward is an op of its own rather than a composition. A and B depend on the forward's inputs
only, so a partitioner that could see them would move them into the forward and save them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels import ops
from rewriter.kernels.common import (
    outer,
    owned,
    register_autocast,
    register_formula,
    register_gradient,
    register_vmap,
)

__all__ = ["quadratic_linear", "quadratic_linear_reference"]

_library: Any = torch.library  # untyped in torch
_lib = _library.Library("rewriter", "FRAGMENT")
_lib.define(
    "quadratic_linear(Tensor x, Tensor w_a, Tensor w_b, Tensor w_c, Tensor? bias) -> Tensor"
)
_lib.define(
    "quadratic_linear_backward(Tensor grad, Tensor x, Tensor w_a, Tensor w_b, Tensor w_c, "
    "bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)


def quadratic_linear(
    x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = (x w_aᵀ) ∘ (x w_bᵀ) + x w_cᵀ + bias, with x and the weights saved for the backward.

    Args:
        x: [*, in_features].
        w_a, w_b, w_c: [out_features, in_features], of x's dtype (under autocast, of any).
        bias: [out_features] or None.

    Returns:
        [*, out_features].

    Raises:
        RuntimeError: a shape or a dtype does not fit.

    Source: QuadraLib (Xu et al., MLSys 2022), neuron "new". Differentiable twice.
    """
    y: Tensor = torch.ops.rewriter.quadratic_linear(x, w_a, w_b, w_c, bias)
    return y


def quadratic_linear_reference(
    x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = (x w_aᵀ) ∘ (x w_bᵀ) + x w_cᵀ + bias, as it is written; autograd does the rest."""
    y = (x @ w_a.t()) * (x @ w_b.t()) + x @ w_c.t()
    return y if bias is None else y + bias


def _check(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None) -> None:
    if not (w_a.dim() == 2 and w_a.shape == w_b.shape and w_a.shape == w_c.shape):
        raise RuntimeError(
            "quadratic_linear: the three weights must have one shape [out, in], not "
            f"{tuple(w_a.shape)}, {tuple(w_b.shape)} and {tuple(w_c.shape)}"
        )
    if x.dim() == 0 or x.shape[-1] != w_a.shape[1]:
        raise RuntimeError(
            f"quadratic_linear: weights of shape {tuple(w_a.shape)} take x of shape "
            f"[*, {w_a.shape[1]}], not {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != w_a.shape[:1]:
        raise RuntimeError(
            f"quadratic_linear: bias must have shape [{w_a.shape[0]}], not {tuple(bias.shape)}"
        )


def _forward(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, w_a, w_b, w_c, bias)
    # The first-order part is the very call an nn.Linear makes: with w_b = 0 the result is
    # bit-equal to it.
    y = F.linear(x, w_c, bias)
    # addcmul_ writes the product into y: three output-sized tensors at the peak, not five.
    y = y.addcmul_(F.linear(x, w_a), F.linear(x, w_b)).contiguous()
    return owned(y, y.shape)


def _forward_fake(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, w_a, w_b, w_c, bias)
    return x.new_empty((*x.shape[:-1], w_a.shape[0]))


def _backward(
    grad: Tensor, x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """dx = (G∘A) w_b + (G∘B) w_a + G w_c; dw_a = (G∘B)ᵀx; dw_b = (G∘A)ᵀx; dw_c = Gᵀx.

    A gradient that `needs` does not ask for is an empty tensor.
    """
    need_x, need_a, need_b, need_c = needs
    g = grad.reshape(-1, grad.shape[-1])  # [T, out]
    rows = x.reshape(-1, x.shape[-1])  # [T, in]
    dx, dw_a, dw_b, dw_c = (x.new_empty(0) for _ in range(4))
    if need_c:
        dw_c = g.t() @ rows
    if need_x:
        dx = g @ w_c
    if need_x or need_b:
        ga = (rows @ w_a.t()).mul_(g)  # [T, out]
        if need_x:
            dx.addmm_(ga, w_b)
        if need_b:
            dw_b = ga.t() @ rows
    if need_x or need_a:
        gb = (rows @ w_b.t()).mul_(g)
        if need_x:
            dx.addmm_(gb, w_a)
        if need_a:
            dw_a = gb.t() @ rows
    return (owned(dx, x.shape) if need_x else dx), dw_a, dw_b, dw_c


def _backward_reference(
    grad: Tensor, x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The same, as it is written: for gradient penalties, whose derivative it has."""
    ga, gb = grad * (x @ w_a.t()), grad * (x @ w_b.t())
    found = ga @ w_b + gb @ w_a + grad @ w_c, *(outer(left, x) for left in (gb, ga, grad))
    return tuple(g if need else x.new_empty(0) for g, need in zip(found, needs, strict=True))


def _backward_fake(
    grad: Tensor, x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    shapes = (x.shape, w_a.shape, w_b.shape, w_c.shape)
    return tuple(x.new_empty(s if n else (0,)) for s, n in zip(shapes, needs, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w_a, w_b, w_c, _ = inputs
    ctx.save_for_backward(x, w_a, w_b, w_c)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *needs, need_bias = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * 4
    if any(needs):
        found = torch.ops.rewriter.quadratic_linear_backward(grad, *ctx.saved_tensors, needs)
        grads = [g if need else None for g, need in zip(found, needs, strict=True)]
    return *grads, grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None


for _device in ("CPU", "CUDA"):
    _lib.impl("quadratic_linear", _forward, _device)
    _lib.impl("quadratic_linear_backward", _backward, _device)
register_autocast(_lib, "quadratic_linear", casts=5)
torch.library.register_fake("rewriter::quadratic_linear", _forward_fake, lib=_lib)
torch.library.register_fake("rewriter::quadratic_linear_backward", _backward_fake, lib=_lib)
register_gradient(_lib, "quadratic_linear", quadratic_linear_reference, _save, _grad)
register_vmap(_lib, "quadratic_linear", quadratic_linear_reference, casts=5)
register_formula(_lib, "quadratic_linear_backward", _backward_reference)


def _forward_flops(
    x: torch.Size, w_a: torch.Size, *rest: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Three GEMMs."""
    return 3 * 2 * x[:-1].numel() * w_a[0] * w_a[1]


def _backward_flops(
    grad: torch.Size,
    x: torch.Size,
    w_a: torch.Size,
    w_b: torch.Size,
    w_c: torch.Size,
    needs: Sequence[bool],
    *,
    out_shape: Any = None,
) -> int:
    """One GEMM per weight gradient, three for dx, and A and B where something needs them."""
    need_x, need_a, need_b, need_c = needs
    gemms = 3 * need_x + need_a + need_b + need_c + (need_x or need_b) + (need_x or need_a)
    return gemms * 2 * x[:-1].numel() * w_a[0] * w_a[1]


def _sizes(x: Tensor, w_a: Tensor, *rest: Any) -> tuple[Any, ...]:
    return math.prod(x.shape[:-1]), w_a.shape[0], x.shape[-1]


def _backward_sizes(grad: Tensor, x: Tensor, w_a: Tensor, *rest: Any) -> tuple[Any, ...]:
    return _sizes(x, w_a)


def _parts(run: ops.Run) -> list[ops.Part]:
    """Three products and an addcmul."""
    rows, out, width = run.sizes
    each = ops.product(run, 1, rows, out, width, run.weight_bytes // 3)
    return [replace(each, count=3), ops.moved(run, "pointwise", "aten::addcmul", rows * out, 16)]


def _sample(rows: int, width: int, _: int) -> tuple[Tensor, ...]:
    w = torch.rand(3, width, width)
    return torch.rand(rows, width), w[0], w[1], w[2], torch.rand(width)


ops.register(
    ops.Record(
        "rewriter::quadratic_linear",
        kind="quadratic",
        reference=quadratic_linear_reference,
        size_names=("rows", "out", "in"),
        sizes=_sizes,
        flops=_forward_flops,
        parts=_parts,
        samples=ops.Samples(
            axes=((1, 16, 120, 1000), (192, 480, 1056), (1,)),
            arguments=_sample,
            place=lambda rows, out, width: (rows, math.sqrt(out * width), 1),
        ),
        companions=(
            ops.Companion("rewriter::quadratic_linear_backward", _backward_sizes, _backward_flops),
        ),
    )
)
