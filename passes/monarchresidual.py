"""Monarch plus what it leaves over: a low-rank or block-sparse residual behind a learned gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.base import (
    LinearLayer,
    Pass,
    Phase,
    Replacement,
    Skip,
    as_parameter,
    relative_error,
    unusable,
)
from rewriter.errors import OptionError, one_of
from rewriter.kernels.monarch import monarch_dense, monarch_linear
from rewriter.kernels.monarch_project import monarch_fit, monarch_project
from rewriter.kernels.residual import (
    SIDE,
    block_sparse_dense,
    block_sparse_fit,
    block_sparse_linear,
    low_rank_fit,
)
from rewriter.passes.monarch import Blocks, MonarchLinear, check_blocks, too_many_blocks
from rewriter.sites import LINEAR, Kind, Site

__all__ = ["MonarchResidual", "MonarchResidualLinear"]

Residual = Literal["low-rank", "block-sparse"]
_KINDS = ("low-rank", "block-sparse")
_ROUNDS = 6
"""Of fitting one part to what the other leaves over; the error falls little after that."""


def _check(residual: object, share: object) -> None:
    one_of("residual", residual, _KINDS)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise OptionError(f"share must be a number between 0 and 1, got {share!r}")


class MonarchResidualLinear(LinearLayer):
    """y = (σ(gate)·M + (1 − σ(gate))·E) x + bias, M Monarch and E low-rank or block-sparse.

    Args:
        in_features, out_features: sizes of the last dimensions of x and y.
        nblocks, rank: of M; see `MonarchLinear`.
        residual: E = up·down ("low-rank"), or the same number of 32×32 blocks in each row of
            blocks, at fixed places ("block-sparse").
        share: parameters of E over those of a dense layer, about.
        bias: whether there is a bias.
        device, dtype: of the parameters.

    Attributes:
        right [K, rank·L, ib], left [L, ob, K·rank]: of M, as in `MonarchLinear`.
        up [out_features, r], down [r, in_features]; or blocks [O, 32, q·32] and the buffer
            index [O, q], as in kernels/residual.py.
        gate: [1], 0 at the start, which weighs both the same.
        bias: [out_features] or None.

    Raises:
        OptionError: an option is impossible.

    Source: Dao et al. 2022, the `SparseLR` layer of their code (structured and low-rank, gated).
    """

    op = "monarch_residual"
    once_scalars = ("gate",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: Blocks = 4,
        rank: int | None = None,
        residual: Residual = "low-rank",
        share: float = 0.1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(residual, share)
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        monarch = MonarchLinear(in_features, out_features, nblocks, rank, bias, **own)
        self.in_features, self.out_features = in_features, out_features
        self.nblocks, self.rank = monarch.nblocks, monarch.rank
        self.residual, self.share = residual, share
        self.right, self.left, self.bias = monarch.right, monarch.left, monarch.bias
        if residual == "low-rank":
            size = max(1, round(share * in_features * out_features / (in_features + out_features)))
            self.up = nn.Parameter(torch.empty(out_features, size, **own))
            self.down = nn.Parameter(torch.empty(size, in_features, **own))
        else:
            rows, columns = -(-out_features // SIDE), -(-in_features // SIDE)
            count = max(1, round(share * columns))
            self.blocks = nn.Parameter(torch.empty(rows, SIDE, count * SIDE, **own))
            # a diagonal of blocks, spread evenly; a fit chooses others
            first = torch.arange(rows, device=device)[:, None] * columns // rows
            step = torch.arange(count, device=device) * columns // count
            self.register_buffer("index", ((first + step) % columns).sort().values)
        self.gate = nn.Parameter(torch.zeros(1, **own))
        self.reset_residual()

    index: Tensor

    def reset_residual(self) -> None:
        """E with the standard deviation of nn.Linear's outputs, and M as it was drawn: at gate 0
        (σ = ½) their sum has 1/√2 of it, so both grow by √2."""
        with torch.no_grad():
            self.left.mul_(2**0.5)
        bound = (2 / self.in_features) ** 0.5
        if self.residual == "low-rank":
            nn.init.uniform_(self.down, -(3**0.5) * bound, 3**0.5 * bound)
            wide = (1 / self.up.shape[1]) ** 0.5
            nn.init.uniform_(self.up, -wide, wide)
        else:
            wide = (2 / self.blocks.shape[2]) ** 0.5
            nn.init.uniform_(self.blocks, -wide, wide)

    def forward(self, input: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate)
        # the gate goes on the smaller side: weights, or what is r wide
        y = monarch_linear(input, self.right, self.left * gate, self.bias, self.out_features)
        if self.residual == "low-rank":
            return y + F.linear(F.linear(input, self.down) * (1 - gate), self.up)
        return y + block_sparse_linear(
            input, self.blocks * (1 - gate), self.index, self.out_features
        )

    def lr_scales(self) -> Mapping[str, float]:
        """(in_features / fan-in of the factor) / number of factors in a row."""
        fans = {"right": self.right.shape[2] * 2, "left": self.left.shape[2] * 2}
        if self.residual == "low-rank":
            fans |= {"up": self.up.shape[1] * 2, "down": self.in_features * 2}
        else:
            fans |= {"blocks": self.blocks.shape[2]}
        return {name: self.in_features / fan for name, fan in fans.items()}

    def parts(self) -> tuple[Tensor, Tensor]:
        """M and E as dense matrices, without the gate."""
        sizes = self.out_features, self.in_features
        whole = monarch_dense(self.right, self.left, *sizes)
        if self.residual == "low-rank":
            return whole, self.up @ self.down
        return whole, block_sparse_dense(self.blocks, self.index, *sizes)

    def dense_weight(self) -> Tensor:
        """σ(gate)·M + (1 − σ(gate))·E, [out_features, in_features]."""
        gate, (whole, rest) = torch.sigmoid(self.gate), self.parts()
        return gate * whole + (1 - gate) * rest


@dataclass(frozen=True)
class MonarchResidual(Pass):
    """W ≈ M + E, a Monarch matrix and a low-rank or block-sparse one; see `MonarchResidualLinear`.

    Starts at M and E fitted in turns, each to what the other leaves over: every turn is the
    optimum (with `rewrite(…, calibration=batches)`: of the outputs on them) and lowers the error.

    Args:
        nblocks, rank: of M; see `Monarch`.
        residual: "low-rank" or "block-sparse".
        share: parameters of E over those of a dense layer, about.
        where: which sites; a name pattern, a predicate, or None for all.

    Skips a site whose weights are not real floating point numbers of 16 bits or more or hold NaN or
    inf, which has fewer features than nblocks, or which would not get smaller.

    Raises:
        OptionError: an option is impossible.

    Source: Dao et al. 2022; Zhou and Tao 2011, "GoDec" (fitting in turns).
    """

    matches: ClassVar[tuple[Kind, ...]] = (LINEAR,)
    phase: ClassVar[Phase] = Phase.STRUCTURE

    nblocks: Blocks = 4
    rank: int | None = None
    residual: Residual = "low-rank"
    share: float = 0.1

    def __post_init__(self) -> None:
        _check(self.residual, self.share)
        check_blocks("MonarchResidual", self.nblocks, self.rank)

    @property
    def calibrates(self) -> bool:
        return True

    def propose(self, site: Site) -> Replacement | Skip:
        weight, bias = site.weight, site.bias
        out_features, in_features = weight.shape
        if refused := unusable(weight, bias) or too_many_blocks(self.nblocks, weight):
            return refused
        layer = MonarchResidualLinear(
            in_features,
            out_features,
            self.nblocks,
            self.rank,
            self.residual,
            self.share,
            bias is not None,
            weight.device,
            weight.dtype,
        )
        held = sum(p.numel() for n, p in layer.named_parameters() if n != "bias")
        if held >= weight.numel():
            return Skip(
                "Monarch and residual would hold {} parameters, the dense weight holds {}",
                held,
                weight.numel(),
            )
        error: float | None = None
        output_error: float | None = None
        if not weight.is_meta:
            second = None if site.moments is None else site.moments.second
            self._fit(layer, weight.detach(), second)
            error = relative_error(weight, layer.dense_weight().detach())
            if site.moments is not None:
                output_error = site.moments.output_error(weight, layer.dense_weight())
        for parameter in layer.parameters():
            parameter.requires_grad_(weight.requires_grad)
        layer.bias = None if bias is None else as_parameter(bias)
        layer.train(site.module is None or site.module.training)
        return Replacement(layer, error, "", output_error)

    def _fit(self, layer: MonarchResidualLinear, weight: Tensor, second: Tensor | None) -> None:
        """M and E of the layer, in turns; at gate 0 both count by half."""
        w = weight.double()
        blocks = (layer.right.shape[0], layer.left.shape[0])
        root = None
        if second is not None:  # damped as in `monarch_fit`
            mean = float(second.diagonal().mean()) or 1.0
            second = second + 1e-3 * mean * torch.eye(len(second)).to(second)
            root = torch.linalg.cholesky(second)
        rest = torch.zeros_like(w)
        for _ in range(_ROUNDS):
            if second is None:
                right, left, _ = monarch_project(w - rest, blocks, layer.rank)
            else:
                right, left = monarch_fit(w - rest, second, blocks, layer.rank)
            lost = w - monarch_dense(right, left, *w.shape)
            if self.residual == "low-rank":
                kept = low_rank_fit(lost, layer.up.shape[1], root)
                rest = kept[0] @ kept[1]
            else:
                kept = block_sparse_fit(lost, layer.index.shape[1], second)
                rest = block_sparse_dense(*kept, *w.shape)
        with torch.no_grad():
            layer.right.copy_(right)
            layer.left.copy_(2 * left)
            if self.residual == "low-rank":
                layer.up.copy_(2 * kept[0])
                layer.down.copy_(kept[1])
            else:
                layer.blocks.copy_(2 * kept[0])
                layer.index.copy_(kept[1])
