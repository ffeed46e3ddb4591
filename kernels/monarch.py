"""Monarch: y = x Wᵀ + b where every slice of W, cut into L×K of them, has rank `rank`.

Shapes, used throughout (K input blocks, L output blocks, R = rank; K = L = nblocks mostly):

    ib = ⌈in_features / K⌉, ob = ⌈out_features / L⌉     x padded to K·ib, y cropped from L·ob
    right [K, R·L, ib]   input block k;  its rows are (r, l), l fastest
    left  [L, ob, K·R]   output block l; its columns are (k, r), r fastest
    mid[b,k,r,l] = Σ_i right[k,(r,l),i] x[b,k,i]
    z[b,l,s]     = Σ_k Σ_r left[l,s,(k,r)] mid[b,k,r,l]
    y[b,l·ob+s]  = z[b,l,s] + bias[l·ob+s]              interleaved: y[b,s·L+l] = z[b,l,s] + …

so the slice (l, k) of W is a product of an [ob, R] and an [R, ib] matrix, and no pair of blocks is
left unconnected whatever the sizes. By default the rows of a slice are neighbours, W[l·ob+s,
k·ib+i] = Σ_r left[l,s,(k,r)] right[k,(r,l),i], and no permutation is left to carry out: with l
fastest, mid as [(k, r), l, rows] has one stride per index, and both products read and write in
place. The paper's order, `interleaved`, takes every L-th row, and costs a permuting copy of y. A
trained weight is approximated equally well by both.

Sources: Dao et al. 2022, "Monarch: Expressive Structured Matrices for Efficient and Accurate
Training" (PLPᵀR), with the rank of a slice made explicit as in Block Tensor-Train (Qiu et al.
2024).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import monarch_cpu, monarch_gpu, ops
from rewriter.kernels.common import (
    is_transformed,
    owned,
    register_autocast,
    register_formula,
    register_gradient,
    register_vmap,
)
from rewriter.kernels.monarch_onnx import monarch_linear_onnx

__all__ = [
    "BackwardOperands",
    "Operands",
    "kernel_name",
    "monarch_dense",
    "monarch_linear",
    "monarch_linear_reference",
]

_LIB: Any = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "monarch_linear(Tensor x, Tensor right, Tensor left, Tensor? bias, int out_features,"
    " bool interleaved=False) -> Tensor"
)
_LIB.define(
    "monarch_linear_train(Tensor x, Tensor right, Tensor left, Tensor? bias, int out_features,"
    " bool interleaved=False) -> (Tensor, Tensor)"
)
_LIB.define(
    "monarch_linear_backward(Tensor grad, Tensor x, Tensor mid, Tensor right, Tensor left,"
    " bool interleaved, bool need_x, bool need_right, bool need_left, bool need_bias=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


class Operands(NamedTuple):
    """The arguments of `monarch_linear`, in its order."""

    x: Tensor
    right: Tensor
    left: Tensor
    bias: Tensor | None
    out_features: int
    interleaved: bool = False

    @property
    def rows(self) -> int:
        """Of x, all leading dimensions together."""
        return math.prod(self.x.shape[:-1])


class BackwardOperands(NamedTuple):
    """The arguments of `monarch_linear_backward`, in its order."""

    grad: Tensor
    x: Tensor
    mid: Tensor
    right: Tensor
    left: Tensor
    interleaved: bool
    need_x: bool
    need_right: bool
    need_left: bool
    need_bias: bool = False


T = TypeVar("T")


def _dispatched(kind: Callable[..., Any], function: Callable[[Any], T]) -> Callable[..., T]:
    """`function` of one tuple, taking its operands one by one, as torch's dispatcher hands them in
    (which leaves out what has its default)."""
    return lambda *args: function(kind(*args))


def monarch_linear(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    out_features: int,
    interleaved: bool = False,
) -> Tensor:
    """y[…, l·ob+s] = Σ_k Σ_r left[l,s,(k,r)] Σ_i right[k,(r,l),i] x[…, k·ib+i] + bias[l·ob+s].

    Costs 2·rows·K·L·rank·(ib+ob) FLOPs.

    Args:
        x: [*, in_features], any leading shape.
        right: [K, rank·L, ib] with ib = ⌈in_features / K⌉.
        left: [L, ob, K·rank] with ob = ⌈out_features / L⌉.
        bias: [out_features] or None.
        out_features: at most L·ob; y is cropped to it.
        interleaved: y[…, s·L+l] in place of y[…, l·ob+s].

    Returns:
        [*, out_features], contiguous, in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: the shapes do not fit each other.

    Source: the module's docstring.
    """
    y: Tensor = torch.ops.rewriter.monarch_linear(x, right, left, bias, out_features, interleaved)
    return y


def monarch_linear_reference(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    out_features: int,
    interleaved: bool = False,
) -> Tensor:
    """The same function as `monarch_linear`, written as the formula; differentiable any number
    of times."""
    k, l, rank = _blocks(right, left)
    xb = torch.unflatten(F.pad(x, (0, k * right.shape[2] - x.shape[-1])), -1, (k, right.shape[2]))
    mid = torch.einsum("krli,...ki->...krl", torch.unflatten(right, 1, (rank, l)), xb)
    z = torch.einsum("lskr,...krl->...ls", torch.unflatten(left, 2, (k, rank)), mid)
    y = (z.transpose(-2, -1) if interleaved else z).flatten(-2)[..., :out_features]
    return y if bias is None else y + bias


def monarch_dense(
    right: Tensor, left: Tensor, out_features: int, in_features: int, interleaved: bool = False
) -> Tensor:
    """W[l·ob+s, k·ib+i] = Σ_r left[l,s,(k,r)] right[k,(r,l),i].

    Args:
        right: [K, rank·L, ib].
        left: [L, ob, K·rank].
        out_features, in_features: what the [L·ob, K·ib] product is cropped to.
        interleaved: W[s·L+l, k·ib+i] in place of W[l·ob+s, k·ib+i].

    Returns:
        [out_features, in_features], differentiable in both factors.
    """
    k, l, rank = _blocks(right, left)
    slices = torch.einsum(
        "lskr,krli->slki" if interleaved else "lskr,krli->lski",
        torch.unflatten(left, 2, (k, rank)),
        torch.unflatten(right, 1, (rank, l)),
    )
    return slices.reshape(l * left.shape[1], k * right.shape[2])[:out_features, :in_features]


def _blocks(right: Tensor, left: Tensor) -> tuple[int, int, int]:
    """(K, L, rank)."""
    return right.shape[0], left.shape[0], right.shape[1] // left.shape[0]


# Forward -----------------------------------------------------------------------------------------

_CHUNK = 1024
"""Rows at a time on a CPU. Fewer keep mid in a nearer cache, and read the factors more often: over
layers of 768 to 4096 features, 1024 measures best, 4 % better than no cut."""


def _check(operands: Operands) -> None:
    x, right, left, bias, out_features, _ = operands
    if right.ndim != 3 or left.ndim != 3:
        raise ValueError(
            f"monarch_linear: right and left must be 3-D, got {list(right.shape)} and "
            f"{list(left.shape)}"
        )
    k, l, rank = _blocks(right, left)
    if right.shape[1] != rank * l or left.shape[2] != k * rank or rank == 0:
        raise ValueError(
            f"monarch_linear: right {list(right.shape)} and left {list(left.shape)} must be "
            "[K, rank*L, ib] and [L, ob, K*rank]"
        )
    if x.ndim == 0 or -(-x.shape[-1] // k) != right.shape[2]:
        raise ValueError(
            f"monarch_linear: x of shape {list(x.shape)} does not fit right {list(right.shape)}: "
            f"its last dimension must be in ({k * (right.shape[2] - 1)}, {k * right.shape[2]}]"
        )
    if -(-out_features // l) != left.shape[1]:
        raise ValueError(
            f"monarch_linear: out_features {out_features} does not fit left {list(left.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"monarch_linear: bias must be [{out_features}], got {list(bias.shape)}")


def _rows(x: Tensor, width: int) -> Tensor:
    """[*, features] → [rows, width], zero-padded."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.shape[1] == width else F.pad(x, (0, width - x.shape[1]))


def _mid(xb: Tensor, right: Tensor, into: Tensor | None = None) -> Tensor:
    """[rows, K·ib] → [K, (r, l), rows]."""
    k, _, ib = right.shape
    blocks = xb.view(xb.shape[0], k, ib).permute(1, 2, 0)
    return torch.bmm(right, blocks) if into is None else torch.bmm(right, blocks, out=into)


def _mid_by_output(mid: Tensor, l: int) -> Tensor:
    """[K, (r, l), rows] → [L, rows, (k, r)], a view."""
    k, rl, rows = mid.shape
    return mid.view(k * rl // l, l, rows).permute(1, 2, 0)


def _finish(mid: Tensor, left: Tensor, bias: Tensor | None, y: Tensor, interleaved: bool) -> Tensor:
    """mid [L, rows, (k, r)] → y [rows, out_features], into the memory given."""
    (l, ob, _), (rows, out) = left.shape, y.shape
    if interleaved:
        z = torch.bmm(mid, left.transpose(1, 2))  # [l, rows, s]
        if out == l * ob:
            y.view(rows, ob, l).copy_(z.permute(1, 2, 0))
        else:
            y.copy_(z.permute(1, 2, 0).reshape(rows, ob * l)[:, :out])
    else:
        whole = y if out == l * ob else y.new_empty(rows, l * ob)
        z = whole.view(rows, l, ob).transpose(0, 1)
        if bias is not None and out == l * ob:
            # The product adds to what it finds: no second pass over y.
            own = bias.view(l, 1, ob).expand(l, rows, ob)
            torch.baddbmm(own, mid, left.transpose(1, 2), out=z)
            return y
        torch.bmm(mid, left.transpose(1, 2), out=z)
        if whole is not y:
            y.copy_(whole[:, :out])
    # Permuting first and adding in place measures faster than one strided add that does both.
    return y if bias is None else y.add_(bias)


def _forward(operands: Operands) -> Tensor:
    _check(operands)
    (x, right, left, bias, out_features, interleaved), rows = operands, operands.rows
    if interleaved or rows < 2 * _CHUNK or x.device.type != "cpu":
        return _forward_train(operands)[0]
    # So few rows at a time that mid is still in the cache when it is read; one memory for all.
    right, left = right.contiguous(), left.contiguous()
    xb = _rows(x, right.shape[0] * right.shape[2])
    y = x.new_empty(rows, out_features)
    mid = x.new_empty(right.shape[0], right.shape[1], _CHUNK)
    for start in range(0, rows, _CHUNK):
        part = xb[start : start + _CHUNK]
        mid = _mid(part, right, mid if len(part) == _CHUNK else None)
        own = y[start : start + _CHUNK]
        _finish(_mid_by_output(mid, left.shape[0]), left, bias, own, False)
    return owned(y, (*x.shape[:-1], out_features))


def _forward_train(operands: Operands) -> tuple[Tensor, Tensor]:
    _check(operands)
    x, right, left, bias, out_features, interleaved = operands
    right, left = right.contiguous(), left.contiguous()
    xb = _rows(x, right.shape[0] * right.shape[2])
    # y first, as a dense layer would get it: what is freed before it would else leave a hole under
    # it, and a C heap that is given back and fetched again, page by page, call for call.
    y = x.new_empty(xb.shape[0], out_features)
    mid = _mid(xb, right)
    _finish(_mid_by_output(mid, left.shape[0]), left, bias, y, interleaved)
    return owned(y, (*x.shape[:-1], out_features)), mid


def _forward_fake(operands: Operands) -> Tensor:
    _check(operands)
    return operands.x.new_empty(*operands.x.shape[:-1], operands.out_features)


def _forward_train_fake(operands: Operands) -> tuple[Tensor, Tensor]:
    k, rl, _ = operands.right.shape
    return _forward_fake(operands), operands.x.new_empty(k, rl, operands.rows)


# Backward ----------------------------------------------------------------------------------------


def _backward(operands: BackwardOperands) -> tuple[Tensor, Tensor, Tensor]:
    """dleft_l = g_lᵀ mid_l;  dmid_l = g_l left_l;  dright_k = dmid_kᵀ x_k;  dx_k = dmid_k right_k.

    A gradient that is not needed comes back as an empty tensor.
    """
    grad, x, mid, right, left, interleaved, need_x, need_right, need_left, _ = operands
    right, left, mid = right.contiguous(), left.contiguous(), mid.contiguous()
    k, ib, (l, ob, kr) = right.shape[0], right.shape[2], left.shape
    in_features = x.shape[-1]
    g = _rows(grad, l * ob)
    rows = g.shape[0]
    if interleaved:
        g = g.view(rows, ob, l).permute(2, 0, 1).contiguous()  # [l, rows, s]
    else:
        g = g.view(rows, l, ob).transpose(0, 1)
    dx, dright, dleft = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if need_left:
        dleft = torch.bmm(g.transpose(1, 2), _mid_by_output(mid, l))  # [l, s, (k, r)]
    if need_x or need_right:
        dmid = torch.empty_like(mid)  # [k, (r, l), rows], filled as [l, (k, r), rows]
        torch.bmm(
            left.transpose(1, 2), g.transpose(1, 2), out=dmid.view(kr, l, rows).transpose(0, 1)
        )
        if need_right:
            xb = _rows(x, k * ib).view(rows, k, ib).transpose(0, 1)  # [k, rows, i]
            dright = torch.bmm(dmid, xb)
        if need_x:
            dx = x.new_empty(rows, k, ib)
            torch.bmm(dmid.transpose(1, 2), right, out=dx.transpose(0, 1))
            dx = dx.view(rows, k * ib)
            if in_features != k * ib:
                dx = dx[:, :in_features].contiguous()
            dx = owned(dx, x.shape)
    return dx, dright, dleft


def _backward_all(operands: BackwardOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op: `_backward`, and the bias's gradient."""
    return *_backward(operands), _bias_gradient(operands)


def _bias_gradient(operands: BackwardOperands) -> Tensor:
    grad = operands.grad
    return grad.sum_to_size(grad.shape[-1]) if operands.need_bias else grad.new_empty(0)


def _backward_fake(operands: BackwardOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, right, left, grad = operands.x, operands.right, operands.left, operands.grad
    return (
        x.new_empty(x.shape if operands.need_x else 0),
        right.new_empty(right.shape if operands.need_right else 0),
        left.new_empty(left.shape if operands.need_left else 0),
        grad.new_empty(grad.shape[-1] if operands.need_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, right, left, bias, _, interleaved = inputs
    ctx.save_for_backward(x, right, left, output[1])
    ctx.interleaved, ctx.needs_bias = interleaved, bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """Keeps `mid` (one activation of K·L·rank values per row, as many as the smaller side of a
    classic layer) rather than computing it again, which would add a sixth to the FLOPs of a
    square layer's training step. As an output of an op of its own it stays visible in the joint
    graph, where a memory planner may choose otherwise."""
    if grad is None:
        return None, None, None, None, None, None
    x, right, left, mid = ctx.saved_tensors
    need_x, need_right, need_left, need_bias, *_ = ctx.needs_input_grad
    need_bias = need_bias and ctx.needs_bias
    found = _run_backward(
        grad, x, mid, right, left, ctx.interleaved, need_x, need_right, need_left, need_bias
    )
    needs = need_x, need_right, need_left, need_bias
    return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


def _backward_reference(operands: BackwardOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op as formulas, differentiable in all but mid, which counts as made of x and right."""
    grad, x, _, right, left, interleaved = operands[:6]
    (k, l, rank), ib, ob = _blocks(right, left), right.shape[2], left.shape[1]
    g = F.pad(grad, (0, l * ob - grad.shape[-1])).reshape(-1, l * ob)
    g = g.unflatten(1, (ob, l)).transpose(1, 2) if interleaved else g.unflatten(1, (l, ob))
    xb = F.pad(x, (0, k * ib - x.shape[-1])).reshape(-1, k * ib).unflatten(1, (k, ib))
    r, lf = torch.unflatten(right, 1, (rank, l)), torch.unflatten(left, 2, (k, rank))
    dmid, mid = torch.einsum("lskr,bls->bkrl", lf, g), torch.einsum("krli,bki->bkrl", r, xb)
    dx = torch.einsum("krli,bkrl->bki", r, dmid).flatten(1)[:, : x.shape[-1]].reshape(x.shape)
    dright = torch.einsum("bkrl,bki->krli", dmid, xb).reshape(right.shape)
    dleft = torch.einsum("bls,bkrl->lskr", g, mid).reshape(left.shape)
    found = dx, dright, dleft, grad.sum_to_size(grad.shape[-1])
    needs = operands[6:]
    first, *rest = (d if need else x.new_empty(0) for d, need in zip(found, needs, strict=True))
    return first, rest[0], rest[1], rest[2]


def _train_reference(operands: Operands) -> tuple[Tensor, Tensor]:
    x, right, left, *_ = operands
    k, _, ib = right.shape
    xb = F.pad(x, (0, k * ib - x.shape[-1])).reshape(-1, k * ib).unflatten(1, (k, ib))
    return monarch_linear_reference(*operands), torch.einsum("kmi,bki->kmb", right, xb)


# Registration ------------------------------------------------------------------------------------


def _autograd(operands: Operands) -> Tensor:
    """With gradients the op becomes `monarch_linear_train`, which hands out `mid` as well."""
    if is_transformed(operands[:4]):
        return monarch_linear_reference(*operands)
    plain = _plain(operands[:4])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands[:4]):
        y: Tensor = (
            _Training.apply(*operands)  # type: ignore[no-untyped-call]
            if plain
            else torch.ops.rewriter.monarch_linear_train(*operands)[0]
        )
        return y
    with torch._C._AutoDispatchBelowAutograd():  # what torch.library does in the same place
        if plain:
            return _FORWARD[operands.x.device.type](operands)
        return monarch_linear(*operands)


_KEYS = torch._C.DispatchKey
_DENSE = 0
for _key in ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"):
    _DENSE |= torch._C.DispatchKeySet(getattr(_KEYS, _key)).raw_repr()
_DENSE |= torch._C.DispatchKeySet(_KEYS.ADInplaceOrView).raw_repr()


def _plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing but the arithmetic can happen to an op of these: all are dense tensors of a
    CPU or a GPU, no subclass, fake or batched one, and no mode watches. Such a call spares itself
    the ways through the dispatcher, which in Python cost more than small products."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and all(t is None or not torch._C._dispatch_keys(t).raw_repr() & ~_DENSE for t in tensors)
    )


class _Training(torch.autograd.Function):
    """`monarch_linear_train` and its backward, of plain tensors."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        operands = Operands(*args)
        with torch._C._AutoDispatchBelowAutograd():
            y, mid = _TRAIN[operands.x.device.type](operands)
        ctx.save_for_backward(operands.x, operands.right, operands.left, mid)
        ctx.interleaved, ctx.needs_bias = operands.interleaved, operands.bias is not None
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        return _autograd_backward(ctx, grad, None)


def _run_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = BackwardOperands(*args)
    if torch.is_grad_enabled() or is_transformed(operands[:5]) or not _plain(operands[:5]):
        found: tuple[Tensor, Tensor, Tensor, Tensor]
        found = torch.ops.rewriter.monarch_linear_backward(*operands)
        return found
    with torch._C._AutoDispatchBelowAutograd():
        return _BACKWARD[operands.x.device.type](operands)


# On a GPU ----------------------------------------------------------------------------------------


@functools.cache
def _fused(dtype: torch.dtype, contraction: int, width: int, rank: int) -> Any:
    """The Triton kernels where they may pay for blocks of this size (as `monarch_triton.tiles`
    counts them); None where torch's products serve better, which read and write in place."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    try:
        from rewriter.kernels import monarch_triton
    except ImportError:  # no triton on this system
        return None
    return (
        monarch_triton if monarch_triton.refusal(dtype, contraction, width, rank) is None else None
    )


def _faster(which: str, rows: int, features: int, right: Tensor, left: Tensor, out: int) -> Any:
    """The Triton kernels where they are the faster of the two on this device; None else."""
    sides = right.shape[2], left.shape[1]
    kernels = _fused(
        right.dtype, *(sides if which == "forward" else sides[::-1]), _blocks(right, left)[2]
    )
    if kernels is None:
        return None
    found = monarch_gpu.pick_kernel(which, rows, features, out, right, left, kernels, _TORCH)
    return kernels if found == "triton" else None


def _faster_forward(operands: Operands) -> Any:
    x, right, left, _, out_features, _ = operands
    return _faster("forward", operands.rows, x.shape[-1], right, left, out_features)


def _forward_gpu(operands: Operands) -> Tensor:
    _check(operands)
    kernels = _faster_forward(operands)
    if kernels is None:
        return _forward(operands)
    y: Tensor = kernels.monarch_forward(*operands, store_mid=False)[0]
    return y


def _forward_train_gpu(operands: Operands) -> tuple[Tensor, Tensor]:
    _check(operands)
    kernels = _faster_forward(operands)
    if kernels is None:
        return _forward_train(operands)
    y, mid = kernels.monarch_forward(*operands, store_mid=True)
    return y, mid


def _backward_gpu(operands: BackwardOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, x, mid, right, left, *_ = operands
    kernels = _faster("backward", mid.shape[2], x.shape[-1], right, left, grad.shape[-1])
    if kernels is None:
        return _backward_all(operands)
    return *kernels.monarch_backward(*operands[:-1]), _bias_gradient(operands)


# On a CPU ----------------------------------------------------------------------------------------


def kernel_name(
    tokens: int,
    in_features: int,
    right: Tensor,
    left: Tensor,
    out_features: int,
    interleaved: bool = False,
) -> str:
    """What `monarch_linear` runs on such operands at this number of rows, for the report; where
    the compiled kernels cannot run, with the reason."""
    if right.is_cuda:
        found = _faster("forward", tokens, in_features, right, left, out_features)
        return "torch.bmm" if found is None else "triton"
    if right.device.type != "cpu" or interleaved or not tokens:
        return "torch.bmm"
    shapes = tuple(right.shape), tuple(left.shape)
    if not monarch_cpu.worth_compiling(tokens, *shapes, right.dtype):
        return "torch.bmm"
    if reason := monarch_cpu.refusal():
        return f"torch.bmm ({reason})"
    sizes = tokens, in_features, out_features, *shapes
    found = monarch_cpu.pick_kernel("forward", *sizes, right.dtype, _TORCH)
    return "fused C++" if found == "fused" else "torch.bmm"


def _compiled(
    which: str, x: Tensor, right: Tensor, left: Tensor, out: int, *others: Tensor | None
) -> bool:
    """Whether the kernels of `monarch_cpu` run these operands."""
    if not monarch_cpu.serves(x, right, left, *others):
        return False
    rows, shapes = math.prod(x.shape[:-1]), (tuple(right.shape), tuple(left.shape))
    found = monarch_cpu.pick_kernel(which, rows, x.shape[-1], out, *shapes, x.dtype, _TORCH)
    return found == "fused"


def _compiled_forward(operands: Operands) -> bool:
    x, right, left, bias, out_features, interleaved = operands
    return not interleaved and _compiled("forward", x, right, left, out_features, bias)


def _forward_cpu(operands: Operands) -> Tensor:
    _check(operands)
    if _compiled_forward(operands):
        return monarch_cpu.forward(*operands[:-1], store_mid=False)[0]
    return _forward(operands)


def _forward_train_cpu(operands: Operands) -> tuple[Tensor, Tensor]:
    _check(operands)
    if _compiled_forward(operands):
        y, mid = monarch_cpu.forward(*operands[:-1], store_mid=True)
        assert mid is not None
        return y, mid
    return _forward_train(operands)


def _backward_cpu(operands: BackwardOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, x, mid, right, left, interleaved, *needs = operands
    if not interleaved and _compiled("backward", x, right, left, grad.shape[-1], grad, mid):
        return monarch_cpu.backward(grad, x, mid, right, left, *needs)
    return _backward_all(operands)


_TORCH: dict[str, Callable[..., object]] = {
    "forward": _dispatched(Operands, _forward),
    "backward": _dispatched(BackwardOperands, _backward_all),
}
_FORWARD: Mapping[str, Callable[[Operands], Tensor]] = {"cpu": _forward_cpu, "cuda": _forward_gpu}
_TRAIN: Mapping[str, Callable[[Operands], tuple[Tensor, Tensor]]] = {
    "cpu": _forward_train_cpu,
    "cuda": _forward_train_gpu,
}
_BACKWARD: Mapping[str, Callable[[BackwardOperands], tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "cpu": _backward_cpu,
    "cuda": _backward_gpu,
}


def _register(name: str, kind: Any, fake: Any, **by_key: Any) -> None:
    """The functions of one operation, by dispatch key."""
    for key, function in by_key.items():
        _LIB.impl(name, _dispatched(kind, function), key)
    torch.library.register_fake(f"rewriter::{name}", _dispatched(kind, fake), lib=_LIB)


_register(
    "monarch_linear",
    Operands,
    _forward_fake,
    CPU=_forward_cpu,
    CUDA=_forward_gpu,
    CompositeExplicitAutograd=_forward,
    Autograd=_autograd,
)
_register(
    "monarch_linear_train",
    Operands,
    _forward_train_fake,
    CPU=_forward_train_cpu,
    CUDA=_forward_train_gpu,
    CompositeExplicitAutograd=_forward_train,
)
_register(
    "monarch_linear_backward",
    BackwardOperands,
    _backward_fake,
    CPU=_backward_cpu,
    CUDA=_backward_gpu,
    CompositeExplicitAutograd=_backward_all,
)
register_autocast(_LIB, "monarch_linear", casts=4)
register_vmap(_LIB, "monarch_linear", monarch_linear_reference, casts=4)
_train_formula = _dispatched(Operands, _train_reference)
register_gradient(_LIB, "monarch_linear_train", _train_formula, _setup_context, _autograd_backward)
register_vmap(_LIB, "monarch_linear_train", _train_formula)
register_formula(
    _LIB, "monarch_linear_backward", _dispatched(BackwardOperands, _backward_reference)
)


# Record ------------------------------------------------------------------------------------------


def sizes(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    out_features: Any,
    interleaved: bool = False,
) -> tuple[Any, ...]:
    """(rows, out, in, input blocks, output blocks, rank, interleaved)."""
    rows, blocks = math.prod(x.shape[:-1]), _blocks(right, left)
    return (rows, out_features, x.shape[-1], *blocks, int(interleaved))


def _backward_sizes(
    grad: Tensor, x: Tensor, mid: Tensor, right: Tensor, left: Tensor, interleaved: bool, *_: Any
) -> tuple[Any, ...]:
    return sizes(x, right, left, None, grad.shape[-1], interleaved)


def _flops(x: torch.Size, right: torch.Size, left: torch.Size, *args: Any, **kwargs: Any) -> int:
    """2·rows·K·L·rank·(ib+ob), from shapes."""
    (k, rl, ib), ob = right, left[1]
    return 2 * math.prod(x[:-1]) * k * rl * (ib + ob)


def _backward_flops(
    grad: torch.Size,
    x: torch.Size,
    mid: torch.Size,
    right: torch.Size,
    left: torch.Size,
    interleaved: bool,
    need_x: bool,
    need_right: bool,
    need_left: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    """2·rows·K·L·rank·(ib·[dx]+ib·[dright]+ob·[dleft]+ob·[dmid]), from shapes."""
    (k, rl, ib), ob = right, left[1]
    width = ib * (need_x + need_right) + ob * (need_left + (need_x or need_right))
    return 2 * math.prod(x[:-1]) * k * rl * width


def _parts(run: ops.Run) -> list[ops.Part]:
    """Two batch products over the blocks and the bias; interleaved also a permuting copy of y."""
    rows, out, width, k, l, rank, interleaved = run.sizes
    ib, ob = -(-width // k), -(-out // l)
    share = run.weight_bytes * ib // max(ib + ob, 1)
    found = [
        ops.product(run, k, rows, rank * l, ib, share),
        ops.product(run, l, rows, ob, k * rank, run.weight_bytes - share),
        ops.moved(run, "pointwise", "aten::add_", rows * out, 2 * ops.element_size(run.dtype)),
    ]
    return found + interleaving(run) if interleaved else found


def interleaving(run: ops.Run) -> list[ops.Part]:
    """The permuting copy of y."""
    elements = run.sizes[0] * run.sizes[1]
    return [ops.moved(run, "copy", "aten::clone", elements, 2 * ops.element_size(run.dtype))]


def sample(rows: int, width: int, blocks: int) -> tuple[Any, ...]:
    """A square layer with as many parameters as two dense ones of a block's width."""
    block = width // blocks
    rank = -(-block // blocks)
    right, left = torch.rand(blocks, blocks * rank, block), torch.rand(blocks, block, blocks * rank)
    return torch.rand(rows, width), right, left, torch.rand(width), width


def place(rows: int, out: int, width: int, blocks: int, *rest: int) -> tuple[float, ...]:
    """Where a layer lies on `AXES`: as the square one with as large a weight."""
    return rows, math.sqrt(out * width), blocks


AXES = ((1, 16, 120, 1000), (192, 480, 1056), (4, 12))
"""(rows, width, blocks)."""


def _mid_parts(x: Tensor, right: Tensor, **rest: Any) -> list[ops.Part]:
    (k, rank, ib), dtype = right.shape, str(x.dtype).removeprefix("torch.")
    rows = math.prod(x.shape[:-1])
    own = k, rank, rows, ib
    read, written = (x.dtype.itemsize * k * s for s in (ib * (rank + rows), rank * rows))
    return [ops.Part("aten::bmm", "matmul", dtype, 2 * math.prod(own), read, written, shape=own)]


def _emit_mid(build: Any, x: Any, right: Any, **rest: Any) -> Any:
    """mid[k,(r,l),b] = Σ_i right[k,(r,l),i] x[b,k,i]: the first of two products."""
    aten = torch.ops.aten
    k, _, ib = right.meta["val"].shape
    features = x.meta["val"].shape[-1]
    if k * ib != features:
        x = build(aten.constant_pad_nd.default, x, [0, k * ib - features])
    x = build(aten.reshape.default, x, [-1, k, ib])
    x = build(aten.permute.default, x, [1, 2, 0])
    return build(aten.bmm.default, right, x)


RECORD = ops.register(
    ops.Record(
        "rewriter::monarch_linear",
        kind="monarch",
        reference=monarch_linear_reference,
        onnx=monarch_linear_onnx,
        size_names=("rows", "out", "in", "input blocks", "output blocks", "rank", "interleaved"),
        sizes=sizes,
        flops=_flops,
        parts=_parts,
        samples=ops.Samples(AXES, sample, place),
        kernels=lambda: {"fused C++": monarch_cpu.refusal(), "torch.bmm": None},
        companions=(
            ops.Companion(
                "rewriter::monarch_linear_train",
                derives=(ops.Derived("mid", 1, ("x", "right"), _mid_parts, _emit_mid),),
            ),
            ops.Companion("rewriter::monarch_linear_backward", _backward_sizes, _backward_flops),
        ),
    )
)
