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
runs over x with zeros in it: of int8 weights that of `weight_only`, over a copy by rows. On a GPU
nobody waits to see what is active, and the share that is expected decides (`sparse_gpu.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from rewriter.kernels import sparse_bound, sparse_cpu, sparse_gpu
from rewriter.kernels.choice import paying_share, rows_bucket
from rewriter.kernels.quantized_gpu import capturing
from rewriter.kernels.settings import own_settings
from rewriter.kernels.sparse_active import (
    MOST_ROWS,
    active_for_onnx,
    active_reference,
    check_selection,
)
from rewriter.kernels.sparse_cpu import Select
from rewriter.kernels.weight_only import int8_weight_linear

__all__ = [
    "MOST_ROWS",
    "Select",
    "active",
    "active_for_onnx",
    "active_reference",
    "bound",
    "by_columns",
    "by_rows",
    "check_selection",
    "dense",
    "held_bytes",
    "importance_of",
    "kernel_name",
    "kept_beside",
    "largest_share",
    "masked",
    "multiplied",
    "refusal",
    "regime",
    "straight_through",
    "why_dense",
]

_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.int8),
    "cuda": (torch.float32, torch.float16, torch.bfloat16, torch.int8),
}
_GROUP = 8
"""Rows of x that the kernel on a CPU takes at once; on a GPU it takes all."""
_VERSION = "sparse 4"


# Selection ---------------------------------------------------------------------------------------


def active(x: Tensor, select: Select) -> Tensor:
    """`active_reference`, by the compiled kernel where that runs."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or refusal() is not None:
        return active_reference(x, select)
    return sparse_cpu.chosen(sparse_cpu.floats(x), select)


def masked(x: Tensor, select: Select) -> Tensor:
    """x [*, width] with zeros where it is not active."""
    if sparse_gpu.takes(x) and (y := sparse_gpu.masked(x, select)) is not None:
        return y
    if x.device.type != "cpu" or x.dtype == torch.float64 or refusal() is not None:
        return x.where(active_reference(x, select), 0.0)
    return sparse_cpu.masked(sparse_cpu.floats(x), select).to(x.dtype)


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
    return _contiguous(weight, columns=True)


def by_rows(weight: Tensor) -> Tensor:
    """The weight [out, in], contiguous, as `by_columns`: for dense products of int8 weights, which
    are stored by columns."""
    return _contiguous(weight, columns=False)


def _contiguous(weight: Tensor, columns: bool) -> Tensor:
    own = weight.detach().t() if columns else weight.detach()
    return own if own.is_contiguous() else kept_beside(weight, lambda: own.contiguous(), columns)


def kept_beside(weight: Tensor, make: Callable[[], Tensor], name: object) -> Tensor:
    """What `make` gives of a weight, kept under a name as long as the weight is and stays as it
    is; one such tensor a weight."""
    if (found := _kept(weight, name)) is not None:
        return found
    # an inference tensor counts no versions, and what a CUDA graph computes is there once it runs
    if weight.is_inference() or capturing(weight):
        return make()
    with torch.inference_mode(False), torch.no_grad():
        found = make()
    if found.is_cuda:  # other streams may read it from now on
        torch.cuda.current_stream(found.device).synchronize()
    _CACHE[weight] = _stamp(weight, name), found, StorageWeakRef(weight.untyped_storage())
    return found


def _stamp(weight: Tensor, name: object) -> tuple[Any, ...]:
    """What other values of a weight have another one of: its memory is known by the storage, whose
    number no other one has as long as there is a reference to it."""
    place = weight.untyped_storage()._cdata, weight.storage_offset()
    return weight._version, weight.device, *place, weight.shape, weight.stride(), name


def _kept(weight: Tensor, name: object) -> Tensor | None:
    """What was made of a weight as it is now, under a name."""
    if weight.is_inference():
        return None
    kept = _CACHE.get(weight)  # type: ignore[no-untyped-call,unused-ignore]
    return kept[1] if kept is not None and kept[0] == _stamp(weight, name) else None


def _may_keep(weight: Tensor) -> bool:
    """Whether its columns are at hand, or a copy of them will be there at the next call."""
    if weight.t().is_contiguous() or _kept(weight, True) is not None:
        return True
    return not weight.is_inference() and not capturing(weight)


def held_bytes(weight: Tensor, rows: int) -> int:
    """Bytes of the copy that a product of so many rows keeps of a weight; 0 without one: a weight
    of floats is copied for the sparse product, one of integers for the dense one."""
    if not _has_kernels(weight) or not weight.numel():
        return 0
    few = bool(largest_share(weight, rows))
    stored = weight.t() if few else weight
    needed = few or weight.dtype == torch.int8
    return weight.numel() * weight.element_size() if needed and not stored.is_contiguous() else 0


# Products ----------------------------------------------------------------------------------------


def multiplied(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    select: Select,
    share: float = 1.0,
) -> Tensor | None:
    """x_S @ weightᵀ (·scale) + bias, x_S being x with zeros where it is not active; None where
    a dense product is to run.

    Args:
        x: [*, in].
        weight: [out, in]; of x's dtype (on a CPU float32 or bfloat16), or int8.
        scale: [out] of int8 weights, else None.
        bias: [out] or None.
        select: which entries are active.
        share: of a row that is active by a threshold, as far as it is known: by it a GPU decides.

    Returns:
        [*, out] of x's dtype, or None.
    """
    if sparse_gpu.takes(x):
        return _on_gpu(x, weight, scale, bias, select, share)
    (out, width), rows = weight.shape, x.numel() // max(x.shape[-1], 1)
    if not _fits(x, weight) or not 0 < rows <= MOST_ROWS or not out * width:
        return None
    most = largest_share(weight, rows)
    if not most:
        return None
    y, _ = sparse_cpu.linear(
        sparse_cpu.floats(x),
        by_columns(weight),
        sparse_cpu.floats(scale),
        sparse_cpu.floats(bias),
        select,
        int(most * width),
    )
    return y if y is None else y.to(x.dtype)


def _on_gpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    select: Select,
    share: float,
) -> Tensor | None:
    width = weight.shape[1]
    rows, known = x.numel() // max(width, 1), select.k / max(width, 1) if select.k else share
    found = sparse_gpu.choice(_gpu_size(weight, rows, x.dtype))
    few = 0 < sparse_gpu.union(known, rows) <= found.most
    if not few or not sparse_gpu.fits(x, select) or not _may_keep(weight):
        return None
    return sparse_gpu.product(x, by_columns(weight), scale, bias, select, found.tile)


def _gpu_size(weight: Tensor, rows: int, dtype: torch.dtype) -> sparse_gpu.Size:
    out, width = weight.shape
    return sparse_gpu.Size(rows, out, width, weight.dtype, dtype, weight.device)


def bound(x: Tensor, own: sparse_bound.Operands, check: Callable[[], None]) -> Tensor | None:
    """x_S @ weightᵀ (·scale) + bias past the dispatcher; None where the op is to be called.

    Args:
        x: [*, in].
        own: the rest.
        check: raises where they do not fit each other.
    """
    call = sparse_bound.ready(x, own, check, by_columns)
    if call is None:
        return None
    y = call(x, largest_share(own.weight, call.rows(x)))
    return dense(call.masked(x), own.weight, own.scale, own.bias) if y is None else y


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled kernel multiplies these."""
    of_floats = weight.dtype == x.dtype and x.dtype in (torch.float32, torch.bfloat16)
    of_levels = weight.dtype == torch.int8 and x.dtype in (torch.float32, torch.bfloat16)
    return (of_floats or of_levels) and x.device.type == "cpu" and refusal() is None


def _has_kernels(weight: Tensor) -> bool:
    """Whether there are sparse kernels for weights of its dtype on its device."""
    return weight.dtype in _DTYPES.get(weight.device.type, ())


def largest_share(weight: Tensor, rows: int) -> float:
    """The share of a weight's [out, in] active columns, of 1 at most, up to which the sparse
    product is faster than the dense one here; 0 where it never is. An int8 weight on a GPU is
    multiplied by an x of torch's default dtype."""
    if weight.is_cuda:
        return sparse_gpu.choice(_gpu_size(weight, rows, _dtype_of_x(weight))).most
    if rows > MOST_ROWS or not _has_kernels(weight) or refusal() is not None:
        return 0.0
    own = weight.dtype, rows_bucket(rows), *weight.shape
    return _measured(*own, torch.get_num_threads())


def _dtype_of_x(weight: Tensor) -> torch.dtype:
    return torch.get_default_dtype() if weight.dtype == torch.int8 else weight.dtype


@functools.lru_cache(1024)
def _measured(dtype: torch.dtype, rows: int, out: int, width: int, threads: int) -> float:
    made = functools.cache(lambda: _made(dtype, rows, out, width))
    key = f"sparse_linear {dtype} {rows} {width} {out}"

    def evict() -> None:
        sparse_cpu.evict(*made()[1:3])

    return paying_share(key, _VERSION, lambda share: _pair(made, share), threads, before=evict)


def _made(dtype: torch.dtype, rows: int, out: int, width: int) -> tuple[Tensor, ...]:
    """x, weight, its columns, and scales of an int8 weight."""
    x = torch.linspace(1, 2, width).roll(width // 3).expand(rows, width).contiguous()
    scale = (torch.ones(out),) if dtype == torch.int8 else ()
    return x, torch.ones(out, width, dtype=dtype), torch.ones(width, out, dtype=dtype), *scale


def _pair(made: Callable[[], tuple[Tensor, ...]], share: float) -> dict[str, Callable[[], object]]:
    """Both ways, over rows with the same active entries: the union counts. A dense product, too, is
    one over zeros in the place of what is not active."""
    x, weight, columns, *scales = made()
    scale, width = scales[0] if scales else None, x.shape[1]
    select = Select(max(int(share * width), 1))
    given = x if scales else x.to(weight.dtype)
    return {
        "dense": lambda: dense(masked(given, select), weight, scale, None),
        "sparse": lambda: sparse_cpu.linear(x, columns, scale, None, select, width),
    }


def dense(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x @ (weight·scale[:, None])ᵀ + bias; arguments as of `multiplied`."""
    if scale is None:
        return F.linear(x, weight, bias)
    return int8_weight_linear(x, by_rows(weight), scale, bias)


def kernel_name(weight: Tensor, rows: int, share: float | None) -> str:
    """What runs over a weight [out, in], for the report.

    Args:
        weight: says dtype and device.
        rows: of x.
        share: of a row that is active, where it is known.
    """
    if not _has_kernels(weight):
        return "torch, dense"
    gpu = weight.is_cuda
    reason = sparse_gpu.refusal(weight.device, _dtype_of_x(weight)) if gpu else refusal()
    if reason is not None:
        return f"torch, dense: {reason}"
    return regime(rows, share, lambda n: largest_share(weight, n), gpu)


def regime(
    rows: int, share: float | None, largest: Callable[[int], float], gpu: bool = False
) -> str:
    """Whether a sparse kernel runs, and up to how many rows.

    Args:
        rows, share: as of `kernel_name`.
        largest: the share up to which it is the faster one, at a number of rows.
        gpu: whether it runs on one.
    """
    if (reason := why_dense(rows, share, largest, gpu)) is not None:
        return reason
    unit, taken = ("Triton", MOST_ROWS) if gpu else (sparse_cpu.isa(), _GROUP)
    if share is None:
        return f"sparse ({unit}) up to {largest(rows):.0%} active, else dense"
    union = sparse_gpu.union(share, min(rows, taken))
    until = rows_bucket(rows)
    while (more := 2 * until) <= MOST_ROWS:
        if sparse_gpu.union(share, min(more, taken)) > largest(more):
            break
        until = more
    return f"sparse ({unit}), {union:.0%} of the weight's rows; dense above {until} rows of input"


def why_dense(
    rows: int, share: float | None, largest: Callable[[int], float], gpu: bool = False
) -> str | None:
    """Why a dense kernel runs, as far as that is known before what is active is; None where a
    sparse one does, at least where few are active. Arguments as of `regime`."""
    if rows > MOST_ROWS:
        return f"dense at {rows} rows; sparse kernels take up to {MOST_ROWS}"
    most = largest(rows)
    if not most:
        return f"dense at {rows} rows, where it is faster"
    if share is None:
        if gpu and most < 1:
            return "dense: which share is active is not known, and a GPU does not wait to see it"
        return None
    union = sparse_gpu.union(share, min(rows, MOST_ROWS if gpu else _GROUP))
    if union > most:
        return f"dense: {union:.0%} of the weight's rows are active at {rows} rows of input"
    return None


@functools.cache
def refusal() -> str | None:
    """Why the compiled kernels are not used; runs them against the formula."""
    if (reason := sparse_cpu.refusal()) is not None:
        return reason
    with own_settings():
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
