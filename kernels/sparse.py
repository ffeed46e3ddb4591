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
runs over x with zeros in it: of int8 weights that of `weight_only`, over a copy by rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from rewriter.kernels import sparse_bound, sparse_cpu
from rewriter.kernels.choice import fastest, rows_bucket
from rewriter.kernels.sparse_bound import MOST_ROWS
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
    "paying_share",
    "refusal",
    "regime",
    "straight_through",
]

_GROUP = 8
"""Rows of x that the kernel takes at once."""
_SHARES = (1.0, 0.85, 0.7, 0.5, 0.35, 0.2, 0.1)
_VERSION = "sparse 2"
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


def check_selection(
    op: str, width: int, threshold: Tensor | None, importance: Tensor | None, k: int, block: int
) -> None:
    """Whether what an op is given selects entries of a row of this width.

    Raises:
        RuntimeError: it does not.
    """
    if block < 1 or width % block:
        raise RuntimeError(f"{op}: block={block} does not divide the {width} entries of a row")
    if threshold is None and not (1 <= k <= width and k % block == 0):
        raise RuntimeError(
            f"{op}: without a threshold k must be from 1 to the {width} entries of a row, and a "
            f"multiple of block={block}, not {k}"
        )
    if threshold is not None and threshold.numel() != 1:
        raise RuntimeError(f"{op}: threshold must be [1], not {tuple(threshold.shape)}")
    if importance is not None and importance.shape != (width,):
        raise RuntimeError(
            f"{op}: importance must have shape [{width}], not {tuple(importance.shape)}"
        )


def active_for_onnx(x: Tensor, select: Select) -> Tensor:
    """`active_reference`, by ONNX's TopK, which takes the lower index of two that are tied."""
    if not select.k:
        return active_reference(x, select)
    score = x.detach().abs()
    if select.importance is not None:
        score = score.float() * select.importance
    groups = score.unflatten(-1, (-1, select.block)).amax(-1)
    kept = groups.topk(select.k // select.block, dim=-1).indices
    mask = torch.zeros_like(groups).scatter(-1, kept, 1.0).bool()
    return mask.repeat_interleave(select.block, -1)


def active(x: Tensor, select: Select) -> Tensor:
    """`active_reference`, by the compiled kernel where that runs."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or refusal() is not None:
        return active_reference(x, select)
    return sparse_cpu.chosen(x.detach().float().contiguous(), select)


def masked(x: Tensor, select: Select) -> Tensor:
    """x [*, width] with zeros where it is not active."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or refusal() is not None:
        return x.where(active_reference(x, select), 0.0)
    return sparse_cpu.masked(x.detach().float().contiguous(), select).to(x.dtype)


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
    if weight.is_inference():  # counts no versions: nothing derived from it is kept
        return make()
    stamp = weight._version, weight.data_ptr(), weight.shape, weight.stride(), name
    kept = _CACHE.get(weight)  # type: ignore[no-untyped-call,unused-ignore]
    if kept is None or kept[0] != stamp:
        with torch.inference_mode(False), torch.no_grad():
            kept = _CACHE[weight] = (stamp, make())
    found: Tensor = kept[1]
    return found


def held_bytes(weight: Tensor, rows: int) -> int:
    """Bytes of the copy that a product of so many rows keeps of a weight on a CPU; 0 without one:
    a weight of floats is copied for the sparse product, one of integers for the dense one."""
    if weight.device.type != "cpu" or weight.dtype == torch.float64 or not weight.numel():
        return 0
    few = bool(largest_share(weight.dtype, rows, *weight.shape))
    stored = weight.t() if few else weight
    needed = few or weight.dtype == torch.int8
    return weight.numel() * weight.element_size() if needed and not stored.is_contiguous() else 0


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
    weight = own.weight
    y = call(x, largest_share(weight.dtype, call.rows(x), *weight.shape))
    if y is None:
        select = Select.of(own.threshold, own.importance, own.k, own.block)
        y = dense(masked(x, select), weight, own.scale, own.bias)
    return y


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled kernel multiplies these."""
    of_floats = weight.dtype == x.dtype and x.dtype in (torch.float32, torch.bfloat16)
    of_levels = weight.dtype == torch.int8 and x.dtype in (torch.float32, torch.bfloat16)
    return (of_floats or of_levels) and x.device.type == "cpu" and refusal() is None


def largest_share(dtype: torch.dtype, rows: int, out: int, width: int) -> float:
    """The share of active rows of a weight [width, out], of 1 at most, up to which the sparse
    product is faster than the dense one here; 0 where it never is."""
    if rows > MOST_ROWS or refusal() is not None:
        return 0.0
    return _measured(dtype, rows_bucket(rows), out, width, torch.get_num_threads())


@functools.lru_cache(1024)
def _measured(dtype: torch.dtype, rows: int, out: int, width: int, threads: int) -> float:
    made = functools.cache(lambda: _made(dtype, rows, out, width))
    key = f"sparse_linear {dtype} {rows} {width} {out}"
    return paying_share(key, _VERSION, lambda share: _pair(made, share), threads)


def paying_share(
    key: str,
    version: str,
    pair: Callable[[float], dict[str, Callable[[], object]]],
    threads: int,
) -> float:
    """The largest share up to which "sparse" is faster than "dense"; 0 where it never is.

    Args:
        key, version: as of `choice.fastest`.
        pair: the two, where this share is active.
        threads: torch's number of them.
    """
    low, high = 0, len(_SHARES)  # those from the high-th on pay
    while low < high:
        middle = (low + high) // 2
        share = _SHARES[middle]
        own = functools.partial(pair, share)
        if fastest(f"{key} {share} {threads}", version, own, _LEAD) == "sparse":
            high = middle
        else:
            low = middle + 1
    return _SHARES[high] if high < len(_SHARES) else 0.0


def _made(dtype: torch.dtype, rows: int, out: int, width: int) -> tuple[Tensor, ...]:
    """x, weight, its columns, and scales of an int8 weight."""
    x = torch.linspace(1, 2, width).roll(width // 3).expand(rows, width).contiguous()
    scale = (torch.ones(out),) if dtype == torch.int8 else ()
    return x, torch.ones(out, width, dtype=dtype), torch.ones(width, out, dtype=dtype), *scale


def _pair(made: Callable[[], tuple[Tensor, ...]], share: float) -> dict[str, Callable[[], object]]:
    """Both products, over rows with the same active entries: the union counts."""
    x, weight, columns, *scales = made()
    scale, width = scales[0] if scales else None, x.shape[1]
    select = Select(max(int(share * width), 1))
    given = x if scales else x.to(weight.dtype)
    return {
        "dense": lambda: dense(given, weight, scale, None),
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
    if weight.device.type != "cpu" or weight.dtype == torch.float64:
        return "torch, dense"
    if (reason := refusal()) is not None:
        return f"torch, dense: {reason}"
    return regime(rows, share, lambda n: largest_share(weight.dtype, n, *weight.shape))


def regime(rows: int, share: float | None, largest: Callable[[int], float]) -> str:
    """Whether a sparse kernel runs, and up to how many rows.

    Args:
        rows, share: as of `kernel_name`.
        largest: the share up to which it is the faster one, at a number of rows.
    """
    if rows > MOST_ROWS:
        return f"dense at {rows} rows; sparse kernels take up to {MOST_ROWS}"
    most = largest(rows)
    if not most:
        return f"dense at {rows} rows, where it is faster"
    if share is None:
        return f"sparse ({sparse_cpu.isa()}) up to {most:.0%} active, else dense"
    union = _union(share, rows)
    if union > most:
        return f"dense: {union:.0%} of the weight's rows are active at {rows} rows of input"
    until = rows_bucket(rows)
    while (more := 2 * until) <= MOST_ROWS:
        if _union(share, more) > largest(more):
            break
        until = more
    return (
        f"sparse ({sparse_cpu.isa()}), {union:.0%} of the weight's rows; dense above {until} rows "
        "of input"
    )


def _union(share: float, rows: int) -> float:
    """What is active in at least one of the rows that a kernel takes at once, where each chooses by
    itself: rows that choose alike have less."""
    return 1 - (1 - share) ** min(rows, _GROUP)


@functools.cache
def refusal() -> str | None:
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
