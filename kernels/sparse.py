"""Which entries of a row are active, and products that read the weights of those alone.

    score[i] = |x[i]|·importance[i]
    top k       the k largest scores; ties go to the lower index
    threshold   the scores that are not below it

With blocks of b neighbours, blocks are chosen by the largest score among their entries. NaN counts
as the largest score.

A product reads rows of the weight's transpose, which is kept beside the weight from the first such
product on (or is the weight's own memory, where that is stored by columns). It is faster than a
dense one where few rows of x come in and little of them is active: the largest share that pays is
measured once per size. Where more is active, and with more rows than `MOST_ROWS`, a dense product
runs over x with zeros in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from rewriter.kernels import sparse_cpu
from rewriter.kernels.choice import fastest, rows_bucket
from rewriter.kernels.sparse_cpu import Select

__all__ = [
    "MOST_ROWS",
    "Select",
    "active",
    "active_reference",
    "by_columns",
    "held_bytes",
    "importance_of",
    "kernel_name",
    "largest_share",
    "multiplied",
    "straight_through",
]

MOST_ROWS = 16
"""Rows of x from which on a dense product runs without being timed."""
_GROUP = 8
"""Rows of x that the kernel takes at once."""
_SHARES = (1.0, 0.85, 0.7, 0.5, 0.35, 0.2, 0.1)
_VERSION = "sparse 1"
_LEAD = 0.02
"""By which share of its time the dense product must be beaten."""


# Selection ---------------------------------------------------------------------------------------


def active_reference(x: Tensor, select: Select) -> Tensor:
    """Whether each entry of x [*, width] is active, [*, width] bool, in torch's operations."""
    score = x.detach().abs()
    if select.importance is not None:
        score = score.float() * select.importance
    width, block = x.shape[-1], select.block
    if block > 1:
        padded = F.pad(score, (0, -width % block), value=-1.0)
        score = padded.unflatten(-1, (-1, block)).amax(-1)
    if select.k:
        count = min(math.ceil(select.k / block), score.shape[-1])
        best = score.sort(stable=True, dim=-1, descending=True).indices[..., :count]
        mask = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
    else:
        mask = ~(score < select.threshold)
    whole: Tensor = mask if block == 1 else mask.repeat_interleave(block, -1)[..., :width]
    return whole


def active(x: Tensor, select: Select) -> Tensor:
    """`active_reference`, by the compiled kernel where that runs."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or _refusal() is not None:
        return active_reference(x, select)
    return sparse_cpu.chosen(x.detach().float().contiguous(), select)


def importance_of(weight: Tensor) -> Tensor:
    """‖W[:, i]‖ of each input, [in] float32: what an entry of x is worth at most in the output.

    Source: Chen et al. 2025, "WINA: Weight Informed Neuron Activation".
    """
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=0, dtype=torch.float32)
    return norms


def straight_through(x: Tensor, mask: Tensor) -> Tensor:
    """x with zeros where the mask [*, width] is False; the gradient passes as if it were x."""
    return x - x.where(~mask, 0.0).detach()


# Weights by columns ------------------------------------------------------------------------------


_CACHE = WeakTensorKeyDictionary()


def by_columns(weight: Tensor) -> Tensor:
    """weightᵀ [in, out], contiguous: the weight's own memory where it is stored by columns, else a
    copy that is kept as long as the weight is and stays as it is."""
    swapped = weight.detach().t()
    if swapped.is_contiguous():
        return swapped
    if weight.is_inference():  # counts no versions: nothing derived from it is kept
        return swapped.contiguous()
    stamp = weight._version, weight.data_ptr(), weight.shape, weight.stride()
    kept = _CACHE.get(weight)  # type: ignore[no-untyped-call,unused-ignore]
    if kept is None or kept[0] != stamp:
        with torch.inference_mode(False), torch.no_grad():
            kept = _CACHE[weight] = (stamp, swapped.contiguous())
    found: Tensor = kept[1]
    return found


def held_bytes(weight: Tensor) -> int:
    """Bytes of the copy that `by_columns` keeps of a weight on a CPU; 0 where it needs none."""
    if weight.device.type != "cpu" or weight.t().is_contiguous():
        return 0
    return weight.numel() * weight.element_size()


# Products ----------------------------------------------------------------------------------------


def multiplied(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, select: Select
) -> Tensor | None:
    """x_S @ weightᵀ (·scale) + bias, x_S being x with zeros where it is not active; None where
    a dense product is to run.

    Args:
        x: [*, in].
        weight: [out, in]; float32 or bfloat16 as x, or int8.
        scale: [out] of int8 weights, else None.
        bias: [out] or None.
        select: which entries are active.

    Returns:
        [*, out] of x's dtype, or None.
    """
    (out, width), rows = weight.shape, x.numel() // max(x.shape[-1], 1)
    if not _fits(x, weight) or not 0 < rows <= MOST_ROWS or not out * width:
        return None
    share = largest_share(weight.dtype, rows, out, width)
    if not share:
        return None
    y, _ = sparse_cpu.linear(
        x.detach().float().contiguous(),
        by_columns(weight),
        None if scale is None else scale.detach().float().contiguous(),
        None if bias is None else bias.detach().float().contiguous(),
        select,
        int(share * width),
    )
    return y if y is None else y.to(x.dtype)


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled kernel multiplies these."""
    of_floats = weight.dtype == x.dtype and x.dtype in (torch.float32, torch.bfloat16)
    of_levels = weight.dtype == torch.int8 and x.dtype in (torch.float32, torch.bfloat16)
    return (of_floats or of_levels) and x.device.type == "cpu" and _refusal() is None


def largest_share(dtype: torch.dtype, rows: int, out: int, width: int) -> float:
    """The share of active rows of a weight [width, out], of 1 at most, up to which the sparse
    product is faster than the dense one here; 0 where it never is."""
    if rows > MOST_ROWS or _refusal() is not None:
        return 0.0
    return _measured(dtype, rows_bucket(rows), out, width, torch.get_num_threads())


@functools.lru_cache(1024)
def _measured(dtype: torch.dtype, rows: int, out: int, width: int, threads: int) -> float:
    if dtype == torch.int8:  # whose dense product needs another copy of the weight
        return 1.0
    for share in _SHARES:
        key = f"sparse_linear {dtype} {rows} {width} {out} {share} {threads}"
        pair = functools.partial(_pair, dtype, rows, out, width, share)
        if fastest(key, _VERSION, pair, _LEAD) == "sparse":
            return share
    return 0.0


def _pair(
    dtype: torch.dtype, rows: int, out: int, width: int, share: float
) -> dict[str, Callable[[], object]]:
    """Both products, over rows with the same active entries: the union counts."""
    x = torch.linspace(1, 2, width).roll(width // 3).expand(rows, width).contiguous()
    weight = torch.ones(out, width, dtype=dtype)
    columns, select = torch.ones(width, out, dtype=dtype), Select(max(int(share * width), 1))
    given = x.to(dtype)
    return {
        "dense": lambda: F.linear(given, weight),
        "sparse": lambda: sparse_cpu.linear(x, columns, None, None, select, width),
    }


def kernel_name(weight: Tensor, rows: int, share: float | None) -> str:
    """What runs over a weight [out, in], for the report.

    Args:
        weight: says dtype and device.
        rows: of x.
        share: of a row that is active, where it is known.
    """
    if weight.device.type != "cpu" or weight.dtype == torch.float64:
        return "torch, dense"
    if (reason := _refusal()) is not None:
        return f"torch, dense: {reason}"
    if rows > MOST_ROWS:
        return f"dense at {rows} rows; sparse kernels take up to {MOST_ROWS}"
    most = largest_share(weight.dtype, rows, *weight.shape)
    if not most:
        return f"dense at {rows} rows, where it is faster"
    if share is None:
        return f"sparse ({sparse_cpu.isa()}) up to {most:.0%} active, else dense"
    union = 1 - (1 - share) ** min(rows, _GROUP)
    if union > most:
        return f"dense: {union:.0%} of the weight's rows are active at {rows} rows of input"
    return f"sparse ({sparse_cpu.isa()}), {union:.0%} of the weight's rows"


@functools.cache
def _refusal() -> str | None:
    """Why the compiled kernels are not used; runs them against the formula."""
    if (reason := sparse_cpu.refusal()) is not None:
        return reason
    with torch.inference_mode(False), torch.no_grad():
        for rows, out, width, block in ((1, 5, 7, 1), (3, 33, 70, 8), (9, 40, 64, 1)):
            x = torch.linspace(-3, 5, rows * width).view(rows, width).cos_()
            weight = torch.linspace(-1, 1, out * width).view(width, out).sin_()
            select = Select(max(width // 3, 1), importance=torch.ones(width), block=block)
            mask = active_reference(x, select)
            want = (x * mask).double() @ weight.double()
            got, _ = sparse_cpu.linear(x, weight, None, None, select, width)
            same = torch.equal(sparse_cpu.chosen(x, select), mask)
            if not same or got is None or not (got - want).abs().max() <= 1e-4:
                return "the compiled kernel computes something else on this CPU"
    return None
