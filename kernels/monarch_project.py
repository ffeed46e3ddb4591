"""The closest Monarch matrix to a given one; shapes and names as in `kernels/monarch.py`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["monarch_project"]


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
