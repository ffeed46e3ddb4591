"""MM* and (MM*)^w from a dense weight: exactly where it is of the class, else a local optimum.

Shapes and names as in `kernels/monarch_chain.py`. With the grid [k, i] of x and the mixes outer,
inner, outer, the block of W between the inner places j of y and i of x is

    W̃_ji = C_j · diag(D_ji) · A_i        (A, D, C: the three factors, first to last)

Source: Dao et al. 2022, "Monarch: Expressive Structured Matrices for Efficient and Accurate
Training", section 3.4 and appendix (factorisation of MM*).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.monarch_chain import Grid, chain_dense, chain_project

__all__ = ["star_factorise", "star_project"]


def star_factorise(weight: Tensor, grid: Grid, seed: int = 0) -> list[Tensor] | None:
    """The A, D, C of a W in MM*, by one eigenvalue decomposition.

    W̃_j0⁻¹ W̃_ji W̃_0i⁻¹ W̃_00 = A_0⁻¹ diag(…) A_0 for all j and i at once: the eigenvectors of one
    random combination of these give A_0, and all else follows by division. O(n³ / side).

    Args:
        weight: [n, n], n the product of the grid. Computed in float64 (complex128).
        grid: (outer, inner) sizes.
        seed: of the combination.

    Returns:
        Factors for axes (0, 1, 0) in the weight's dtype, or None where a block of W is singular
        (as of permutations), where the eigenvectors are, or, of a real W, where they are complex.
        For a W outside of MM* they are no approximation of it: compare `chain_dense`.

    Raises:
        ValueError: weight is not [n, n].
    """
    (outer, inner), n = grid, math.prod(grid)
    if weight.shape != (n, n):
        raise ValueError(f"the grid {grid} wants a weight [{n}, {n}], got {list(weight.shape)}")
    wide = torch.complex128 if weight.is_complex() else torch.float64
    w = weight.detach().to(wide).view(outer, inner, outer, inner).permute(1, 3, 0, 2)  # [j, i, …]
    generator = torch.Generator().manual_seed(seed)
    try:
        inverse = torch.linalg.inv(w)
        mixed = torch.rand(inner, inner, generator=generator).to(w)
        combined = inverse[:, 0, None] @ w @ inverse[0] @ w[0, 0]
        values, vectors = torch.linalg.eig((mixed[..., None, None] * combined).sum((0, 1)))
        if not weight.is_complex():
            if values.imag.abs().max() > 1e-8 * values.abs().max():
                return None
            vectors = vectors.real
        c = w[:, 0] @ vectors  # [j, l, k]
        a = torch.linalg.solve(c[0], w[0])  # [i, k, k of x]
        d = torch.linalg.solve(c[:, None], w) @ torch.linalg.inv(a)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    d = d.diagonal(dim1=-2, dim2=-1).permute(2, 0, 1)  # [k, j, i]
    factors = [a.contiguous(), d.contiguous(), c.contiguous()]
    if not all(bool(torch.isfinite(f).all()) for f in factors):
        return None
    return [f.to(weight.dtype) for f in factors]


def star_project(
    weight: Tensor,
    axes: Sequence[int],
    grid: Grid,
    *,
    sweeps: int = 8,
    tolerance: float = 1e-3,
) -> tuple[list[Tensor], float | None]:
    """W ≈ F_t ⋯ F_1: exact by `star_factorise` where W is in MM*; else from the closest Monarch
    matrix (the last two mixes, the others identities) by least squares for one factor, or one
    block of a middle factor, after the other. Every step lowers ‖W − W′‖, so the error is at most
    the Monarch matrix's; what is found is a local optimum.

    Args:
        weight: [out_features, in_features], real floating point. Computed in float64.
        axes: (0, 1, 0) or longer, as `star_axes` gives them.
        grid: sizes of the axes, of inputs and outputs alike.
        sweeps: over all factors, at most. One costs about (number of factors)·n³ multiply-adds.
        tolerance: stops where a sweep lowers the error by a smaller share than this.

    Returns:
        Factors in the weight's dtype, and ‖W − W′‖/‖W‖; on `meta`, meta factors and None.
    """
    out_features, in_features = weight.shape
    w = weight.detach()
    factors, error = chain_project(w if w.is_meta else w.double(), grid, grid)
    for axis in reversed(axes[:-2]):
        others, side = grid[1 - axis], grid[axis]
        eye = torch.eye(side, dtype=factors[0].dtype, device=w.device)
        factors.insert(0, eye.expand(others, side, side).contiguous())
    if error is None:
        return [f.to(weight.dtype) for f in factors], None
    w = w.double()
    norm = float(w.norm())
    if len(axes) == 3 and w.shape[0] == w.shape[1] == math.prod(grid):
        exact = star_factorise(w, grid)
        if exact is not None:
            lost = float((chain_dense(exact, axes, grid, *w.shape) - w).norm())
            if lost < 1e-6 * norm:
                return [f.to(weight.dtype) for f in exact], lost / norm
    for _ in range(sweeps):
        for t in range(len(axes) - 1, -1, -1):
            _refit(w, factors, axes, grid, t)
        lost = float((chain_dense(factors, axes, grid, out_features, in_features) - w).norm())
        before, error = error, lost / norm if norm else 0.0
        if error > (1 - tolerance) * before:
            break
    return [f.to(weight.dtype) for f in factors], error


def _refit(w: Tensor, factors: list[Tensor], axes: Sequence[int], grid: Grid, t: int) -> None:
    """The least squares solution for factor t, the others fixed; in place."""
    (out_features, in_features), n = w.shape, math.prod(grid)
    axis, others = axes[t], grid[1 - axes[t]]

    def cut(rows: Tensor) -> Tensor:
        """[n, …] → [others, side, …]."""
        rows = rows.view(*grid, *rows.shape[1:])
        return rows.transpose(0, 1) if axis == 0 else rows

    before = torch.eye(n, in_features).to(w)
    if t:
        before = chain_dense(factors[:t], axes[:t], grid, n, in_features)
    after = torch.eye(out_features, n).to(w)
    if t + 1 < len(axes):
        after = chain_dense(factors[t + 1 :], axes[t + 1 :], grid, out_features, n)
    left, right = (
        cut(after.t()).transpose(1, 2),
        cut(before),
    )  # [others, n, side], [others, side, n]
    if t + 1 == len(axes):  # every block has rows of W to itself
        rows = cut(F.pad(w, (0, 0, 0, n - out_features)))
        factors[t] = rows @ torch.linalg.pinv(right)
    elif t == 0:  # columns of W
        columns = cut(F.pad(w, (0, n - in_features)).t()).transpose(1, 2)
        factors[t] = torch.linalg.pinv(left) @ columns
    else:
        of_left, of_right = torch.linalg.pinv(left), torch.linalg.pinv(right)
        rest = w - torch.einsum("anp,apq,aqm->nm", left, factors[t], right)
        for j in range(others):
            step = of_left[j] @ rest @ of_right[j]
            factors[t][j] += step
            rest -= left[j] @ step @ right[j]
