"""Monarch of order p, MM* and (MM*)²: products of mixes along the axes of a grid.

x of n values is read as a grid [i_0, …, i_{p-1}], the last axis fastest, zero-padded where n is
smaller. One mix multiplies along one axis, with a matrix of its own for every place on the others:

    v′[…, o at axis a, …] = Σ_i F[others, o, i] v[…, i at axis a, …]

Order p mixes every axis once, the last one first: W[o; i] = Π_a F_a, with p·n^(1+1/p) weights of
n²; p = 2 is Monarch itself (interleaved, rank 1: F_1 is right, F_0 left). Outer, inner, outer
(axes 0, 1, 0) is MM*, as the adjacent inner mixes of M and M* are one; (0, 1, 0, 1, 0) is (MM*)².

Sources: Dao et al. 2022 (M, MM*, theorems 1 and 2); Fu et al. 2023, "Monarch Mixer" (order p).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.common import owned

__all__ = [
    "chain_dense",
    "chain_grid",
    "chain_linear",
    "chain_project",
    "chain_shapes",
    "star_axes",
]

Grid = tuple[int, ...]


def chain_grid(size: int, order: int) -> Grid:
    """`order` near-equal sizes whose product is at least `size`: exact roots where there are."""
    sizes, rest = [], size
    for left in range(order, 0, -1):
        side = round(rest ** (1 / left))
        while side**left < rest:
            side += 1
        sizes.append(max(side, 1))
        rest = -(-rest // sizes[-1])
    return tuple(sizes)


def chain_shapes(axes: Sequence[int], before: Grid, after: Grid) -> list[Grid]:
    """Shape [others, o, i] of each factor: an axis gets its size in `after` at its last mix."""
    now, shapes = list(before), []
    for t, axis in enumerate(axes):
        target = now[axis] if axis in axes[t + 1 :] else after[axis]
        others = [n for a, n in enumerate(now) if a != axis]
        shapes.append((*others, target, now[axis]))
        now[axis] = target
    return shapes


def chain_linear(
    x: Tensor,
    factors: Sequence[Tensor],
    axes: Sequence[int],
    grid: Grid,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """y = crop(F_t ⋯ F_1 pad(x)) + bias. Costs 2·rows·Σ numel(F) FLOPs.

    Args:
        x: [*, in_features], real or complex.
        factors: one [others, o, i] per mix, in the order in which they are applied.
        axes: along which axis of the grid each one mixes.
        grid: sizes of the axes of x; their product is at least in_features.
        bias: [out_features] or None.
        out_features: the first so many values of the result's grid.

    Returns:
        [*, out_features], contiguous.

    Raises:
        ValueError: the factors do not fit the grid.
    """
    rows = math.prod(x.shape[:-1])
    v = F.pad(x.reshape(rows, x.shape[-1]), (0, math.prod(grid) - x.shape[-1]))
    v = v.view(rows, *grid)
    for factor, axis in zip(factors, axes, strict=True):
        last = v.movedim(axis + 1, -1)
        if factor.shape[:-2] != last.shape[1:-1] or factor.shape[-1] != last.shape[-1]:
            raise ValueError(
                f"chain_linear: a factor {list(factor.shape)} does not mix axis {axis} of the grid "
                f"{list(v.shape[1:])}"
            )
        out, inner = factor.shape[-2:]
        others = math.prod(factor.shape[:-2])
        blocks = last.reshape(rows, others, inner).transpose(0, 1)  # [others, rows, i]
        mixed = torch.bmm(blocks, factor.reshape(others, out, inner).transpose(1, 2))
        v = mixed.transpose(0, 1).reshape(*last.shape[:-1], out).movedim(-1, axis + 1)
    y = v.reshape(rows, math.prod(v.shape[1:]))[:, :out_features]
    y = y.contiguous() if bias is None else y + bias
    return owned(y, (*x.shape[:-1], out_features))


def chain_dense(
    factors: Sequence[Tensor], axes: Sequence[int], grid: Grid, out_features: int, in_features: int
) -> Tensor:
    """The [out_features, in_features] matrix of `chain_linear`, differentiable in the factors."""
    eye = torch.eye(in_features, dtype=factors[0].dtype, device=factors[0].device)
    return chain_linear(eye, factors, axes, grid, None, out_features).t()


def chain_project(weight: Tensor, before: Grid, after: Grid) -> tuple[list[Tensor], float | None]:
    """W ≈ F_0 ⋯ F_{p-1}: for every (i_0; o_1 … o_{p-1}) the slice of W over o_0 and the other
    inputs is cut to rank one, a column of F_0 times what the same is done to again.

    The optimum for p = 2 (Eckart-Young, as `monarch_project`); for p > 2 exact for every W of the
    class, and no better than greedy for others.

    Args:
        weight: [out_features, in_features]. Computed in float64.
        before, after: grids of the inputs and of the outputs, of one length p.

    Returns:
        Factors in the order in which they are applied (axes p-1 … 0) in the weight's dtype, and
        ‖W − W′‖/‖W‖; None on `meta`.
    """
    axes = range(len(before) - 1, -1, -1)
    shapes = chain_shapes(axes, before, after)
    if weight.is_meta:
        return [weight.new_empty(shape) for shape in shapes], None
    out_features, in_features = weight.shape
    weight = weight.detach()
    w = weight.double()
    w = F.pad(w, (0, math.prod(before) - in_features, 0, math.prod(after) - out_features))
    found: list[Tensor] = []
    lead: Grid = ()  # i_0 … of the axes that are done: one chain for each
    rest = w.reshape(1, *after, *before)
    for axis in range(len(before) - 1):
        depth = len(before) - axis
        outs, ins = rest.shape[1 : depth + 1], rest.shape[depth + 1 :]
        # [lead, o_0, o_rest, i_0, i_rest] → [lead, i_0, o_rest, o_0, i_rest]
        cut = rest.reshape(rest.shape[0], outs[0], math.prod(outs[1:]), ins[0], -1)
        column, row = _rank_one(cut.permute(0, 3, 2, 1, 4))
        # F_axis [lead, o_rest, o, i]
        found.append(column.permute(0, 2, 3, 1).reshape(*lead, *outs[1:], outs[0], ins[0]))
        lead = (*lead, ins[0])
        rest = row.reshape(math.prod(lead), *outs[1:], *ins[1:])
    found.append(rest.reshape(*lead, after[-1], before[-1]))
    factors = [f.contiguous() for f in reversed(found)]
    lost = chain_dense(factors, list(axes), before, out_features, in_features) - weight.double()
    norm = float(weight.double().norm())
    return [f.to(weight.dtype) for f in factors], float(lost.norm()) / norm if norm else 0.0


def _rank_one(slices: Tensor) -> tuple[Tensor, Tensor]:
    """[…, m, n] → (√σ u […, m], √σ v […, n]) of the largest singular value."""
    tall = slices.shape[-2] > slices.shape[-1]
    a = slices.transpose(-2, -1) if tall else slices
    _, vectors = torch.linalg.eigh(a @ a.transpose(-2, -1))
    u = vectors[..., -1]
    v = (u[..., None, :] @ a).squeeze(-2)
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    root = norm.sqrt()
    u, v = u * root, torch.where(norm > 0, v / root, 0.0)
    return (v, u) if tall else (u, v)


def star_axes(power: int) -> list[int]:
    """Axes of (MM*)^power: outer, inner, outer, and so on."""
    return [0, *[1, 0] * power]
