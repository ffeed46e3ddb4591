"""What a structured matrix leaves over, kept as a low-rank or a block-sparse matrix.

Shapes, with b = SIDE and rows and columns zero-padded to multiples of it (O = ⌈out/b⌉, I = ⌈in/b⌉):

    low rank      up [out, r], down [r, in]:            y = x downᵀ upᵀ
    block-sparse  blocks [O, b, q·b], index [O, q]:     y[…, o·b+s] = Σ_(q,i) blocks[o,s,(q,i)]
                                                                      x[…, index[o,q]·b+i]

Sources: Dao et al. 2022 ("Pixelated Butterfly": structured plus low-rank, block-sparse); the
whitening of data-aware SVD (Wang et al. 2024, "SVD-LLM").
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.common import owned

__all__ = [
    "SIDE",
    "block_sparse_dense",
    "block_sparse_fit",
    "block_sparse_linear",
    "low_rank_fit",
]

SIDE = 32
"""Rows and columns of a block: enough for a GPU's matrix unit and a CPU's vector registers."""


def low_rank_fit(weight: Tensor, rank: int, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """argmin over up, down of ‖(W − up·down) S‖_F, from the SVD of W S (Eckart-Young).

    Args:
        weight: [out_features, in_features] float64.
        rank: of the product.
        root: S, [in_features, in_features], invertible, lower triangular; None for the identity.

    Returns:
        up [out_features, rank] and down [rank, in_features], with √σ in each.
    """
    whitened = weight if root is None else weight @ root
    u, sigma, v = torch.linalg.svd(whitened, full_matrices=False)
    half = sigma[:rank].sqrt()
    down = half[:, None] * v[:rank]
    if root is not None:
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    return u[:, :rank] * half, down


def block_sparse_fit(
    weight: Tensor, count: int, second: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` blocks of each row of blocks with the most of W, and the best values in them.

    Args:
        weight: [out_features, in_features] float64.
        count: q, at most I.
        second: C = E[x xᵀ]: the values minimise tr((W − B) C (W − B)ᵀ), and a block counts with
            what it does to inputs of these variances; None for the identity.

    Returns:
        blocks [O, b, q·b], and index [O, q] int64, ascending in each row.
    """
    out_features, in_features = weight.shape
    rows, columns = -(-out_features // SIDE), -(-in_features // SIDE)
    w = F.pad(weight, (0, columns * SIDE - in_features, 0, rows * SIDE - out_features))
    w = w.view(rows, SIDE, columns, SIDE)
    strength = w.square()
    if second is not None:
        variances = F.pad(second.diagonal(), (0, columns * SIDE - in_features))
        strength = strength * variances.view(columns, SIDE)
    index = strength.sum((1, 3)).topk(count).indices.sort().values
    if second is None:
        picked = w.gather(2, index[:, None, :, None].expand(-1, SIDE, -1, SIDE))
        return picked.reshape(rows, SIDE, count * SIDE), index
    c = F.pad(second, (0, columns * SIDE - in_features) * 2)
    c = c + torch.diag((c.diagonal() == 0).to(c))  # of the padding
    places = (index[..., None] * SIDE + torch.arange(SIDE, device=index.device)).flatten(1)
    flat = w.reshape(rows, SIDE, columns * SIDE)
    blocks = torch.stack(
        [
            torch.linalg.solve(c[at][:, at], (own @ c[:, at]).t()).t()
            for own, at in zip(flat, places, strict=True)
        ]
    )
    return blocks, index


def block_sparse_linear(x: Tensor, blocks: Tensor, index: Tensor, out_features: int) -> Tensor:
    """[*, in_features] → [*, out_features]; 2·rows·numel(blocks) FLOPs."""
    columns = -(-x.shape[-1] // SIDE)
    rows = math.prod(x.shape[:-1])
    padded = F.pad(x.reshape(rows, x.shape[-1]), (0, columns * SIDE - x.shape[-1]))
    # [O·q, rows, b], blocks first: the product below reads them in place
    picked = padded.view(rows, columns, SIDE).transpose(0, 1)[index.flatten()]
    picked = picked.view(*index.shape, rows, SIDE).permute(0, 2, 1, 3).flatten(2)  # [O, rows, q·b]
    y = torch.bmm(picked, blocks.transpose(1, 2)).transpose(0, 1)
    y = y.reshape(rows, SIDE * len(blocks))[:, :out_features].contiguous()
    return owned(y, (*x.shape[:-1], out_features))


def block_sparse_dense(
    blocks: Tensor, index: Tensor, out_features: int, in_features: int
) -> Tensor:
    """[out_features, in_features], differentiable in the blocks."""
    rows, count = index.shape
    columns = -(-in_features // SIDE)
    whole = blocks.new_zeros(rows, SIDE, columns, SIDE)
    where = index[:, None, :, None].expand(-1, SIDE, -1, SIDE)
    whole = whole.scatter(2, where, blocks.view(rows, SIDE, count, SIDE))
    return whole.reshape(rows * SIDE, columns * SIDE)[:out_features, :in_features]
