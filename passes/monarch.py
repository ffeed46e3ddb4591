"""Monarch: linear layers whose weight is a product of two block-diagonal matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

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
from rewriter.errors import OptionError, one_of, whole_number
from rewriter.kernels.monarch import kernel_name, monarch_dense, monarch_linear
from rewriter.kernels.monarch_project import monarch_fit, monarch_project
from rewriter.sites import LINEAR, Kind, Site

__all__ = ["INITS", "Blocks", "Monarch", "MonarchLinear", "check_blocks", "too_many_blocks"]

INITS = ("project", "random")


Blocks = int | tuple[int, int] | Literal["sqrt"]


def _default_rank(in_features: int, out_features: int, blocks: tuple[int, int]) -> int:
    return -(-min(in_features, out_features) // math.prod(blocks))


def _sides(nblocks: Blocks, in_features: int, out_features: int) -> tuple[int, int]:
    """(input blocks, output blocks) of a layer."""
    if nblocks == "sqrt":
        return _near_root(in_features), _near_root(out_features)
    return _pair("nblocks", nblocks)


def check_blocks(who: str, nblocks: object, rank: object) -> None:
    """The options that every Monarch has.

    Raises:
        OptionError: one is impossible for a layer of any size.
    """
    if nblocks != "sqrt":
        _pair(f"{who}: nblocks", nblocks)
    if rank is not None:
        whole_number(f"{who}: rank", rank)


def too_many_blocks(nblocks: Blocks, weight: Tensor) -> Skip | None:
    """Why a weight [out_features, in_features] cannot be cut so; None where it can."""
    out_features, in_features = weight.shape
    k, l = _sides(nblocks, in_features, out_features)
    if k <= in_features and l <= out_features:
        return None
    return Skip("nblocks {} is more than the {} -> {} features", nblocks, in_features, out_features)


def _near_root(size: int) -> int:
    """The largest divisor up to √size, or ⌈√size⌉ (with padding) where that is under half of it,
    as of a prime."""
    root = math.isqrt(size)
    divisor = next(d for d in range(root, 0, -1) if size % d == 0)
    return divisor if 2 * divisor > root else root + (root * root < size)


def _pair(name: str, nblocks: object) -> tuple[int, int]:
    """(input blocks, output blocks) as they are given."""
    both = nblocks if isinstance(nblocks, (tuple, list)) else (nblocks, nblocks)
    if len(both) != 2:
        raise OptionError(
            f"{name} must be a number, (input blocks, output blocks) or 'sqrt': {nblocks!r}"
        )
    for n in both:
        whole_number(name, n)
    return both[0], both[1]


def _over_cap(factor: Tensor) -> Tensor:
    """max(1, RMS(F)/σ), a scalar in float32 or wider."""
    _, d_out, d_in = factor.shape
    wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
    sigma = math.sqrt(min(d_in, d_out)) / d_in
    least = torch.finfo(wide.dtype).tiny  # whose root has a gradient
    return (wide.square().mean().clamp(min=least).sqrt() / sigma).clamp(min=1.0)


class MonarchLinear(LinearLayer):
    """y[…, l·ob+s] = Σ_k Σ_r left[l,s,(k,r)] Σ_i right[k,(r,l),i] x[…, k·ib+i] + bias[l·ob+s].

    With (K, L) = nblocks, ib = ⌈in_features/K⌉ and ob = ⌈out_features/L⌉: a linear layer whose
    weight, cut into L×K slices, has rank `rank` in each of them. It holds K·L·rank·(ib+ob) weights
    and as many multiply-adds per row; with N blocks on both sides and the default rank that is
    (in·out + min(in, out)²)/N where N² divides both sizes: half of a square layer at N = 4.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        nblocks: N = K = L, or (K, L); "sqrt" for divisors near the roots of both sizes, where
            rank 1 is the classic Monarch of the theory (2 n^1.5 weights of n²) and higher ranks
            are Block Tensor-Train.
        rank: of each slice; None for ⌈min(in_features, out_features)/(K·L)⌉.
        bias: whether there is a bias.
        interleaved: the paper's order of outputs, y[…, s·L+l], in place of y[…, l·ob+s]. Some
            transforms are exact only in it (Hadamard, Kronecker products); a trained weight is
            approximated equally well without, and faster.
        cap: each factor F counts as gain·F / max(1, RMS(F)/σ) with σ = √min(d_in, d_out)/d_in of
            its blocks and a learned gain, which keeps long trainings at high rates from growing
            them. Costs a pass over the weights per call.
        device, dtype: of the parameters.

    Attributes:
        right: [K, rank·L, ib], rows (r, l), l fastest.
        left: [L, ob, K·rank], columns (k, r), r fastest.
        bias: [out_features] or None.
        right_gain, left_gain: [1], with `cap`.

    The random init is uniform, with factors scaled so that y without bias has the standard
    deviation that nn.Linear's has (0.577 times that of x); bias U(±1/√in_features).

    Raises:
        OptionError: nblocks is larger than a side of the layer, or a size is not positive.

    Source: Dao et al. 2022, "Monarch: Expressive Structured Matrices for Efficient and Accurate
    Training", sections 3 and 4; the cap from Qiu et al. 2024, "Compute Better Spent", section 4.
    """

    op = "monarch_linear"
    once_scalars = ("right_gain", "left_gain")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: Blocks = 4,
        rank: int | None = None,
        bias: bool = True,
        interleaved: bool = False,
        cap: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        whole_number("in_features", in_features)
        whole_number("out_features", out_features)
        blocks = k, l = _sides(nblocks, in_features, out_features)
        if k > in_features or l > out_features:
            raise OptionError(
                f"nblocks {nblocks} is larger than a side of the layer, {in_features} -> "
                f"{out_features}: use at most {min(in_features, out_features)}"
            )
        if rank is None:
            rank = _default_rank(in_features, out_features, blocks)
        whole_number("rank", rank)
        self.in_features, self.out_features = in_features, out_features
        self.nblocks: int | tuple[int, int] = k if k == l else blocks
        self.rank, self.interleaved, self.cap = rank, interleaved, cap
        ib, ob = -(-in_features // k), -(-out_features // l)
        self.right = nn.Parameter(torch.empty(k, rank * l, ib, device=device, dtype=dtype))
        self.left = nn.Parameter(torch.empty(l, ob, k * rank, device=device, dtype=dtype))
        if cap:
            self.right_gain = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
            self.left_gain = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.register_bias(out_features if bias else None, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_factors(
        cls,
        right: Tensor,
        left: Tensor,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        interleaved: bool = False,
        cap: bool = False,
    ) -> MonarchLinear:
        """The layer around given factors (kernels/monarch.py has their layout). A tensor that is
        a Parameter becomes the layer's own, not a copy. With `cap` the gains are such that the
        layer computes with the factors as they are given."""
        k, l = right.shape[0], left.shape[0]
        layer = cls(
            in_features,
            out_features,
            (k, l),
            right.shape[1] // l,
            bias is not None,
            interleaved,
            cap,
            device="meta",
        )
        layer.right, layer.left = as_parameter(right), as_parameter(left)
        if cap:
            layer.right_gain, layer.left_gain = (
                nn.Parameter(f.new_empty(1), f.requires_grad) for f in (layer.right, layer.left)
            )
            layer._start_gains()
        layer.bias = None if bias is None else as_parameter(bias)
        return layer

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the class docstring says."""
        # Var y = Var x · Σ_k n_k · rank · Var left · Var right with Σ_k n_k = in_features; right
        # keeps the variance of x, left brings it to the third of it that nn.Linear gives.
        var_right = 1 / self.right.shape[2]
        var_left = 1 / (3 * self.in_features * self.rank * var_right)
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.right, -math.sqrt(3 * var_right), math.sqrt(3 * var_right))
        nn.init.uniform_(self.left, -math.sqrt(3 * var_left), math.sqrt(3 * var_left))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.cap:
            self._start_gains()

    def _start_gains(self) -> None:
        """So that the factors count as they are."""
        with torch.no_grad():
            self.right_gain.copy_(_over_cap(self.right))
            self.left_gain.copy_(_over_cap(self.left))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(right, left) as x is multiplied by them."""
        if not self.cap:
            return self.right, self.left
        return (
            self.right * (self.right_gain / _over_cap(self.right)).to(self.right.dtype),
            self.left * (self.left_gain / _over_cap(self.left)).to(self.left.dtype),
        )

    def forward(self, input: Tensor) -> Tensor:
        return monarch_linear(
            input, *self.factors(), self.bias, self.out_features, self.interleaved
        )

    def kernel(self, tokens: int) -> str:
        sizes = tokens, self.in_features, self.right, self.left, self.out_features
        return kernel_name(*sizes, self.interleaved)

    def lr_scales(self) -> Mapping[str, float]:
        """(in_features / fan-in of the factor) / 2."""
        fans = {"right": self.right.shape[2], "left": self.left.shape[2]}
        return {name: self.in_features / fan / 2 for name, fan in fans.items()}

    def from_dense_gradient(self, gradient: Tensor, square: bool) -> Mapping[str, Tensor]:
        """Of right: leftᵀ g, of left: g rightᵀ, slice by slice; of squares with squared factors.
        None with `cap`, where the rate is the gain's to choose."""
        if self.cap:
            return {}
        right, left = self._slices(square)
        g = self._cut(gradient.to(right))
        made = {"right": left.transpose(-2, -1) @ g, "left": g @ right.transpose(-2, -1)}
        return {name: self._joined(name, value) for name, value in made.items()}

    def to_dense_gradient(self, gradients: Mapping[str, Tensor], square: bool) -> Tensor | None:
        """The smallest g with leftᵀ g and g rightᵀ as given. Of squares: the outer product of what
        right's say of each column and left's of each row, at their common mean."""
        if self.cap or not {"right", "left"} <= set(gradients):
            return None
        right, left = self._slices(square)
        of_right, of_left = self._slices(False, gradients["right"], gradients["left"])
        if square:
            tiny = torch.finfo(right.dtype).tiny
            columns = (of_right / left.sum(-2)[..., None].clamp(min=tiny)).mean(-2, keepdim=True)
            rows = (of_left / right.sum(-1)[..., None, :].clamp(min=tiny)).mean(-1, keepdim=True)
            mean = (rows.mean((-2, -1), keepdim=True) * columns.mean((-2, -1), keepdim=True)).sqrt()
            return self._whole(rows * columns / mean.clamp(min=tiny))
        of_rows = torch.linalg.pinv(left).transpose(-2, -1) @ of_right
        of_columns = of_left @ torch.linalg.pinv(right).transpose(-2, -1)
        seen = left @ (torch.linalg.pinv(left) @ of_columns)
        return self._whole(of_rows + of_columns - seen)

    def _slices(
        self, square: bool, right: Tensor | None = None, left: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """right as [L, K, rank, ib] and left as [L, K, ob, rank], float32 or wider."""
        right = (self.right if right is None else right).detach()
        left = (self.left if left is None else left).detach()
        wide = torch.promote_types(right.dtype, torch.float32)
        (k, _, ib), (l, ob, _) = right.shape, left.shape
        r = right.to(wide).view(k, self.rank, l, ib).permute(2, 0, 1, 3)
        f = left.to(wide).view(l, ob, k, self.rank).transpose(1, 2)
        return (r.square(), f.square()) if square else (r, f)

    def _joined(self, name: str, value: Tensor) -> Tensor:
        """The inverse of `_slices`, of one factor."""
        own = self.right if name == "right" else self.left
        value = value.permute(1, 2, 0, 3) if name == "right" else value.transpose(1, 2)
        return value.reshape(own.shape).to(own.dtype)

    def _cut(self, weight: Tensor) -> Tensor:
        """[out_features, in_features] → [L, K, ob, ib]."""
        (k, _, ib), (l, ob, _) = self.right.shape, self.left.shape
        weight = F.pad(weight, (0, k * ib - weight.shape[1], 0, l * ob - weight.shape[0]))
        weight = weight.view(ob, l, k, ib).transpose(0, 1) if self.interleaved else weight
        return weight.reshape(l, ob, k, ib).transpose(1, 2)

    def _whole(self, slices: Tensor) -> Tensor:
        """The inverse of `_cut`."""
        l, k, ob, ib = slices.shape
        weight = slices.transpose(1, 2)
        weight = weight.transpose(0, 1) if self.interleaved else weight
        return weight.reshape(l * ob, k * ib)[: self.out_features, : self.in_features].to(
            self.right.dtype
        )

    def dense_weight(self) -> Tensor:
        """W[l·ob+s, k·ib+i] = Σ_r left[l,s,(k,r)] right[k,(r,l),i], [out_features, in_features]."""
        sizes = self.out_features, self.in_features
        return monarch_dense(*self.factors(), *sizes, self.interleaved)


@dataclass(frozen=True)
class Monarch(Pass):
    """W ≈ L·Pᵀ·R with block-diagonal L and R; see `MonarchLinear`.

    Args:
        nblocks: blocks N of each factor, or (blocks of the inputs, blocks of the outputs), or
            "sqrt"; weights and multiply-adds shrink by about N/2 for square layers.
        rank: of each of the slices of W; None for ⌈min(in, out)/(K·L)⌉, the classic Monarch.
        init: "project" starts at the closest Monarch matrix to the trained weight (the optimum,
            from an SVD per slice), or with `rewrite(…, calibration=batches)` at the one whose
            outputs on them are closest (the bias moves along with what it loses on average);
            "random" forgets the weight and keeps only the bias.
        interleaved: W ≈ P·L·Pᵀ·R, the paper's order of outputs; slower, and no more accurate on
            trained weights.
        cap: of the factors' root mean square; see `MonarchLinear`.
        where: which sites; a name pattern, a predicate, or None for all.

    Skips a site whose weights are not real floating point numbers of 16 bits or more or hold NaN or
    inf, which has fewer features than nblocks, or which would not get smaller.

    Raises:
        OptionError: an option is impossible.

    Source: Dao et al. 2022.
    """

    matches: ClassVar[tuple[Kind, ...]] = (LINEAR,)
    phase: ClassVar[Phase] = Phase.STRUCTURE

    nblocks: Blocks = 4
    rank: int | None = None
    init: Literal["project", "random"] = "project"
    interleaved: bool = False
    cap: bool = False

    def __post_init__(self) -> None:
        check_blocks("Monarch", self.nblocks, self.rank)
        one_of("Monarch: init", self.init, INITS)

    @property
    def calibrates(self) -> bool:
        return self.init == "project"

    def propose(self, site: Site) -> Replacement | Skip:
        weight, bias = site.weight, site.bias
        out_features, in_features = weight.shape
        blocks = k, l = _sides(self.nblocks, in_features, out_features)
        if refused := unusable(weight, bias) or too_many_blocks(self.nblocks, weight):
            return refused
        rank = self.rank or _default_rank(in_features, out_features, blocks)
        held = k * l * rank * (-(-in_features // k) - (-out_features // l))
        if held >= weight.numel():
            return Skip(
                "monarch would hold {} parameters, the dense weight holds {}", held, weight.numel()
            )

        note = ""
        error: float | None
        output_error: float | None = None
        moments = site.moments
        if self.calibrates and moments is not None:
            # A bias takes care of the mean, and the factors need not. (Where the user's code calls
            # a function, the bias is that code's own and stays.)
            movable = bias is not None and site.module is not None
            second = moments.covariance if movable else moments.second
            right, left = monarch_fit(weight, second, blocks, rank, self.interleaved)
            dense = monarch_dense(right, left, out_features, in_features, self.interleaved)
            error = relative_error(weight, dense)
            shift = None
            if bias is not None and movable:
                shift = (weight.detach() - dense).double() @ moments.mean
            output_error = moments.output_error(weight, dense, shift)
            plain = monarch_project(weight, blocks, rank, self.interleaved)
            dense = monarch_dense(*plain[:2], out_features, in_features, self.interleaved)
            without = moments.output_error(weight, dense)
            if without is not None and output_error is not None and without < output_error:
                (right, left, error), shift, output_error = plain, None, without
                note = f"{moments.rows} calibration rows are too few: projected by weights alone"
            if bias is not None and shift is not None:
                moved = (bias.detach().double() + shift).to(bias.dtype)
                bias = nn.Parameter(moved, requires_grad=bias.requires_grad)
        elif self.init == "project":
            right, left, error = monarch_project(weight, blocks, rank, self.interleaved)
        else:
            note = "random init: the trained weight is forgotten"
            fresh = MonarchLinear(
                in_features,
                out_features,
                blocks,
                rank,
                False,
                self.interleaved,
                device=weight.device,
                dtype=weight.dtype,
            )
            right, left = fresh.right.detach(), fresh.left.detach()
            error = relative_error(weight, fresh.dense_weight())
        layer = MonarchLinear.from_factors(
            as_parameter(right, like=weight),
            as_parameter(left, like=weight),
            bias,
            in_features,
            out_features,
            self.interleaved,
            self.cap,
        )
        layer.train(site.module is None or site.module.training)
        return Replacement(layer, error, note, output_error)
