"""The closest Monarch matrix to a given one, by its entries or by what it does to given inputs;
shapes and names as in `kernels/monarch.py`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["monarch_fit", "monarch_project"]


def monarch_project(
    weight: Tensor, nblocks: int | tuple[int, int], rank: int, interleaved: bool = False
) -> tuple[Tensor, Tensor, float | None]:
    """argmin over factors of ‖W − monarch_dense(right, left)‖_F: the truncated SVD of each slice
    W[l·ob:(l+1)·ob, k·ib:(k+1)·ib] = U Σ Vᵀ, left ← U√Σ, right ← √Σ Vᵀ.

    The slices share no entry, so by Eckart-Young this is the global optimum, and the squared error
    is the sum of the discarded σ². Zero iff every slice has at most this rank already.

    Args:
        weight: [out_features, in_features], real floating point. Computed in float64.
        nblocks: (K, L), how many blocks the inputs and the outputs are cut into, or one number for
            both; at most in_features and out_features.
        rank: of each slice, at most min(ib, ob).
        interleaved: the rows of slice l are W[l::L].

    Returns:
        right [K, rank·L, ib] and left [L, ob, K·rank] in the weight's dtype and on its device, and
        ‖W − W′‖/‖W‖ (0.0 for a zero weight) before rounding to that dtype. On `meta`: meta
        factors and None.

    Raises:
        ValueError: nblocks or rank out of range.

    Source: Dao et al. 2022, algorithm 1 (rank 1, square, interleaved); any rank and shape here.
    """
    in_features = weight.shape[1]
    k, l, ib, ob = _sizes(weight, nblocks, rank)
    right, left = weight.new_empty(k, rank * l, ib), weight.new_empty(l, ob, k * rank)
    if weight.is_meta:
        return right, left, None
    weight = weight.detach()
    lost = total = 0.0
    for j in range(l):  # one output block at a time: float64 copies stay small
        block = (weight[j::l] if interleaved else weight[j * ob : (j + 1) * ob]).double()
        total += block.square().sum().item()
        block = F.pad(block, (0, k * ib - in_features, 0, ob - block.shape[0]))
        u, v, residual = _truncate(block.view(ob, k, ib).transpose(0, 1), rank, weight.dtype)
        left[j] = u.transpose(0, 1).reshape(ob, k * rank).to(weight.dtype)
        right.view(k, rank, l, ib)[:, :, j] = v.to(weight.dtype)
        lost += residual
    return right, left, math.sqrt(lost / total) if total else 0.0


def monarch_fit(
    weight: Tensor,
    second: Tensor,
    nblocks: int | tuple[int, int],
    rank: int,
    interleaved: bool = False,
    *,
    damping: float = 1e-3,
    sweeps: int = 20,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """argmin over factors of E‖(W − M) x‖² = tr((W − M) C (W − M)ᵀ) with M = monarch_dense(right,
    left) and C = E[x xᵀ], one column of blocks after the other.

    With the other blocks fixed, the best M_k is a truncated SVD in closed form: of T_k S with
    T_k = M_k + (W − M) C[:, k] C_kk⁻¹ and C_kk = S Sᵀ (Eckart-Young after whitening); so every step
    lowers the error. All output blocks l go at once, since their rows of W − M do not meet.

    Args:
        weight: [out_features, in_features], real floating point. Computed in float64.
        second: C, [in_features, in_features], symmetric, positive semidefinite.
        nblocks, rank, interleaved: as in `monarch_project`.
        damping: C gets this share of its mean diagonal on top: directions that the inputs did not
            take must not go free.
        sweeps: over all columns of blocks, at most.
        tolerance: stops where a sweep lowers the error by a smaller share than this.

    Returns:
        right [K, rank·L, ib] and left [L, ob, K·rank] in the weight's dtype.

    Raises:
        ValueError: nblocks or rank out of range, or C is of another size or not finite.

    Source: the whitening of data-aware SVD (Yuan et al. 2023, "ASVD"; Wang et al. 2024,
    "SVD-LLM"), block coordinate descent over the blocks here.
    """
    out_features, in_features = weight.shape
    k, l, ib, ob = _sizes(weight, nblocks, rank)
    if second.shape != (in_features, in_features) or not bool(torch.isfinite(second).all()):
        raise ValueError(
            f"second must be a finite [{in_features}, {in_features}] matrix, got "
            f"{list(second.shape)}"
        )
    w = F.pad(weight.detach().double(), (0, k * ib - in_features, 0, l * ob - out_features))
    w = w.view(ob, l, k * ib).transpose(0, 1) if interleaved else w.view(l, ob, k * ib)
    c = F.pad(second.to(w), (0, k * ib - in_features, 0, k * ib - in_features))
    mean = float(second.diagonal().mean()) or 1.0
    c = c + damping * mean * torch.eye(k * ib, dtype=w.dtype, device=w.device)
    columns = [slice(i * ib, (i + 1) * ib) for i in range(k)]
    roots = [torch.linalg.cholesky(c[own, own]) for own in columns]
    inverses = [torch.linalg.solve_triangular(r, torch.eye(ib).to(r), upper=False) for r in roots]
    right, left = weight.new_empty(k, rank * l, ib), weight.new_empty(l, ob, k * rank)
    m = torch.zeros_like(w)
    total = float(((w @ c) * w).sum())
    before = float("inf")
    for sweep in range(sweeps + 1):  # the first one fits every block alone
        for i, own in enumerate(columns):
            target = w[..., own]
            if sweep:
                target = m[..., own] + ((w - m) @ c[:, own]) @ (inverses[i].t() @ inverses[i])
            u, v, _ = _truncate(target @ roots[i], rank, weight.dtype)
            v = v @ inverses[i]
            m[..., own] = u @ v
            left.view(l, ob, k, rank)[:, :, i] = u.to(weight.dtype)
            right.view(k, rank, l, ib)[i] = v.transpose(0, 1).to(weight.dtype)
        lost = w - m
        error = float(((lost @ c) * lost).sum())
        if error <= 1e-14 * total or (sweep and error > before * (1 - tolerance) ** 2):
            break
        before = error
    return right, left


def _sizes(weight: Tensor, nblocks: int | tuple[int, int], rank: int) -> tuple[int, int, int, int]:
    """(K, L, ib, ob), checked."""
    out_features, in_features = weight.shape
    k, l = (nblocks, nblocks) if isinstance(nblocks, int) else nblocks
    if not (1 <= k <= in_features and 1 <= l <= out_features):
        raise ValueError(
            f"nblocks {nblocks} must be in [1, {in_features}] of the inputs and in "
            f"[1, {out_features}] of the outputs"
        )
    ib, ob = -(-in_features // k), -(-out_features // l)
    if not 1 <= rank <= min(ib, ob):
        raise ValueError(f"rank {rank} must be in [1, {min(ib, ob)}], the slices are {ob}x{ib}")
    return k, l, ib, ob


def _truncate(slices: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """[k, ob, ib] float64 → U√Σ [k, ob, rank], √ΣVᵀ [k, rank, ib], ‖slices − product‖².

    The Gram matrix of the smaller side gives the singular vectors several times faster than an
    SVD does, but squares the condition number: its result is kept where what it leaves over is
    within 0.1 % of the optimum (or below the rounding of `dtype`), else the SVD is computed.
    """
    if slices.shape[1] < slices.shape[2]:
        v, u, residual = _truncate(slices.transpose(1, 2), rank, dtype)
        return u.transpose(1, 2), v.transpose(1, 2), residual
    values, vectors = _eigh(slices.transpose(1, 2) @ slices)
    v = vectors[..., -rank:].transpose(1, 2).flip(1)
    u = slices @ v.transpose(1, 2)  # UΣ
    residual = (slices - u @ v).square().sum().item()
    optimum = values[..., :-rank].clamp(min=0).sum().item()
    total = slices.square().sum().item()
    if optimum < 1e3 * torch.finfo(torch.float64).eps * total:  # the eigenvalues' own rounding
        optimum = 0.0
    rounding = torch.finfo(dtype).eps ** 2 * total
    if residual > max(1.001**2 * optimum, rounding):
        full_u, sigma, full_v = torch.linalg.svd(slices, full_matrices=False)
        u, v = full_u[..., :rank] * sigma[:, None, :rank], full_v[:, :rank]
        residual = sigma[:, rank:].square().sum().item()
    root = torch.linalg.vector_norm(u, dim=1, keepdim=True).sqrt()  # √Σ
    u = torch.where(root > 0, u / root, 0.0)
    return u, v * root.transpose(1, 2), residual


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; on one thread where LAPACK's threads would mostly
    wait for each other (10 times slower at 192x192 on a busy 2-core machine)."""
    threads = torch.get_num_threads()
    alone = gram.device.type == "cpu" and gram.shape[-1] <= 512 and threads > 1
    if alone:
        torch.set_num_threads(1)
    try:
        values, vectors = torch.linalg.eigh(gram)
    finally:
        if alone:
            torch.set_num_threads(threads)
    return values, vectors
