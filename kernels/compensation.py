"""Weights in few bits that give a layer's outputs back, not each weight its nearest level.

The loss of a layer is E‖(W − Ŵ) x‖² = tr((W − Ŵ) H (W − Ŵ)ᵀ) with H = E[x xᵀ], and rounding each
weight alone minimizes it only where the inputs do not correlate. On the grid of
`weight_only.quantize_groups`, ŵ = q·scale + zero for each group of a row, two things do better:

    searched_groups      scale and zero of a group by search on the group's own part of the loss
    compensated_groups   that grid; and column by column, what rounding one column loses is made
                         good by the columns not rounded yet

Both are stored as rounded weights are, and cost a call nothing.

Sources: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (algorithm 1, with groups fixed before and columns in descending order of their
inputs); Lin et al. 2024, "AWQ: Activation-aware Weight Quantization" (its search for ranges. Its
scales of input channels are not used: they would need a vector in each layer, or a layer before
to fold it into, and with groups the search on H loses less).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.common import widened
from rewriter.kernels.weight_only import dequantize_groups, quantize_groups

__all__ = ["METHODS", "Groups", "compensate", "compensated_groups", "searched_groups"]

Groups = tuple[Tensor, Tensor, Tensor | None]
"""q, scale and zero, as `quantize_groups` gives them."""

_SHARES = 16
"""Candidates for the range of a group: from all of it down to half."""
_BLOCK = 32
"""Columns whose losses reach the columns behind them together, by one product."""


def searched_groups(
    weight: Tensor, second: Tensor, bits: int, group_size: int, symmetric: bool
) -> Groups:
    """Rounds to the nearest level of the grid with the least (w − ŵ)ᵀ H_g (w − ŵ), for each group.

    H_g is the group's own block of H. The candidates are the range of the group and parts of it,
    down to half: what lies outside is cut off, and all else gets finer steps. For symmetric groups,
    whose levels reach one step further on one side, both sides.

    Args:
        weight: [out, in], finite.
        second: H = E[x xᵀ], [in, in].
        bits, group_size, symmetric: as of `quantize_groups`.

    Returns:
        As `quantize_groups`, whose loss is never less.

    Raises:
        ValueError: H is of another size or not finite.
    """
    best = quantize_groups(weight, bits, group_size, symmetric)
    wide = widened(weight.dtype)
    blocks = _blocks(_inputs(weight, second), group_size).to(wide)
    padded = F.pad(weight.detach().to(wide), (0, best[0].shape[1] - weight.shape[1]))

    def loss(groups: Groups) -> Tensor:
        lost = (padded - dequantize_groups(*groups)).unflatten(1, (-1, group_size)).transpose(0, 1)
        found: Tensor = ((lost @ blocks) * lost).sum(-1).t()
        return found

    least = loss(best)
    for scale, zero in _grids(best, bits):
        found = _nearest(weight, scale, zero, bits, group_size), scale, zero
        new = loss(found)
        better = new < least
        least = torch.where(better, new, least)
        best = _either(better, found, best)
    return best


def compensated_groups(
    weight: Tensor,
    second: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    *,
    damping: float = 0.01,
    descending: bool = True,
) -> Groups:
    """`compensate` on the grid of `searched_groups`, whose arguments it has.

    Raises:
        ValueError: H is of another size or not finite.
    """
    _, scale, zero = searched_groups(weight, second, bits, group_size, symmetric)
    q = compensate(
        weight, second, scale, zero, bits, group_size, damping=damping, descending=descending
    )
    return q, scale, zero


def compensate(
    weight: Tensor,
    second: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    *,
    damping: float = 0.01,
    descending: bool = True,
) -> Tensor:
    """q of a low tr((W − Ŵ) H (W − Ŵ)ᵀ), one column of W after the other.

    Let H⁻¹ = Uᵀ U with U upper triangular. Column j is rounded to its nearest level, and the
    columns k > j, not rounded yet, take w_k ← w_k − (w_j − ŵ_j)·U_jk/U_jj: the least-squares answer
    to what column j has lost.

    Args:
        weight: [out, in], finite.
        second: H = E[x xᵀ], [in, in].
        scale, zero: the grid, [out, groups], as `quantize_groups` gives it; group of column k is
            k // group_size.
        bits, group_size: as of `quantize_groups`.
        damping: H gets this share of its mean diagonal on top: inputs that were rare while
            calibrating must not go free.
        descending: columns in descending order of H_jj, so that what matters most is rounded while
            all others can still make up for it. The grid is fixed, so the order is not stored.

    Returns:
        q [out, groups·group_size] int8.

    Raises:
        ValueError: H is of another size or not finite.
    """
    own, width = _inputs(weight, second), weight.shape[1]
    diagonal = own.diagonal()
    damping *= float(diagonal.mean()) if width else 0.0
    damped = own + (damping or 1.0) * torch.eye(width).to(own)
    order = (-diagonal).argsort(stable=True) if descending else torch.arange(width)
    order = order.to(own.device)
    upper = _inverse_root(damped[order][:, order])
    columns = weight.detach().to(own).t()[order]  # [in, out]: each column of W lies in one piece
    group = order // group_size
    steps, offsets = (None if t is None else t.to(own).t()[group] for t in (scale, zero))
    assert steps is not None
    offsets = torch.zeros_like(steps) if offsets is None else offsets
    levels = torch.empty_like(columns)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        rows, part = upper[start:stop, start:stop], columns[start:stop]
        losses = torch.empty_like(part)
        for i, w in enumerate(part):
            j = start + i
            levels[j] = _level(w, steps[j], offsets[j], bits)
            losses[i] = (w - (levels[j] * steps[j] + offsets[j])) / rows[i, i]
            part[i + 1 :].addr_(rows[i, i + 1 :], losses[i], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].t(), losses, alpha=-1)
    q = torch.empty_like(levels)
    q[order] = levels
    return _filled(q.t(), scale.shape[1] * group_size)


def _rounded(
    weight: Tensor, second: Tensor | None, bits: int, group_size: int, symmetric: bool
) -> Groups:
    return quantize_groups(weight, bits, group_size, symmetric)


METHODS: Mapping[str, Callable[..., Groups]] = {
    "round": _rounded,
    "awq": searched_groups,
    "gptq": compensated_groups,
}
"""Ways to choose levels, of the arguments of `searched_groups`."""


def _inputs(weight: Tensor, second: Tensor) -> Tensor:
    """H in float64, on the weight's device, by a power of two that leaves its largest number below
    1: nothing depends on that, and losses stay within float32's range."""
    width = weight.shape[1]
    if second.shape != (width, width) or not bool(torch.isfinite(second).all()):
        raise ValueError(
            f"second must be a finite [{width}, {width}] matrix, got {list(second.shape)}"
        )
    own = second.to(weight.device, torch.float64)
    largest = float(own.abs().amax()) if width else 0.0
    return own * 2.0 ** min(-math.frexp(largest)[1], 1000)


def _blocks(second: Tensor, size: int) -> Tensor:
    """H_g, [groups, size, size]; inputs that fill up the last group are zeros."""
    missing = -len(second) % size
    padded = F.pad(second, (0, missing, 0, missing))
    return torch.stack([padded[i : i + size, i : i + size] for i in range(0, len(padded), size)])


def _grids(groups: Groups, bits: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(scale, zero) of smaller ranges than all of each group, and of the other side."""
    _, scale, zero = groups
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    wide = scale.to(widened(scale.dtype))
    for i in range(_SHARES + 1):
        share = 1 - i / (2 * _SHARES)
        if zero is None:
            yield (wide * share).to(scale.dtype), None
            yield (wide * (share * low / high)).to(scale.dtype), None
        else:  # the middle of the range stays
            middle = zero.to(wide) + wide * ((low + high) / 2)
            new = (wide * share).to(scale.dtype)
            yield new, (middle - new.to(wide) * ((low + high) / 2)).to(zero.dtype)


def _level(w: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    return ((w - zero) / scale).round_().clamp_(-(1 << bits - 1), (1 << bits - 1) - 1)


def _nearest(
    weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """q [out, groups·group_size] int8: of each weight the nearest level of its group."""
    wide = widened(weight.dtype)
    step, offset = (
        None if t is None else t.to(wide).repeat_interleave(group_size, 1)[:, : weight.shape[1]]
        for t in (scale, zero)
    )
    assert step is not None
    q = _level(weight.detach().to(wide), step, 0.0 if offset is None else offset, bits)
    return _filled(q, scale.shape[1] * group_size)


def _filled(q: Tensor, width: int) -> Tensor:
    """q int8, as wide as its groups: the last one is filled up with the last column."""
    rest = q[:, -1:].expand(-1, width - q.shape[1])
    return torch.cat([q, rest], 1).to(torch.int8)


def _either(first: Tensor, found: Groups, other: Groups) -> Groups:
    """Group by group, `found` where `first` says so."""
    (q, scale, zero), (old_q, old_scale, old_zero) = found, other
    size = q.shape[1] // max(first.shape[1], 1)
    return (
        torch.where(first.repeat_interleave(size, 1), q, old_q),
        torch.where(first, scale, old_scale),
        None if zero is None or old_zero is None else torch.where(first, zero, old_zero),
    )


def _inverse_root(matrix: Tensor) -> Tensor:
    """U upper triangular with Uᵀ U = matrix⁻¹."""
    root = torch.linalg.cholesky(matrix)
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    return upper
