"""`rewriter::sparse_int4_linear`: y = x_S Wᵀ + bias, where x_S has zeros in the place of small
entries, with W in 4 bits and a scale for each output and group of neighbouring inputs.

    w[n,i] = q[i,n]·scale[g,n] + zero[g,n]      g = i // group size, q in −8 … 7
    y[n] = Σ_g scale[g,n]·Σ_{i ∈ S ∩ g} x[i] q[i,n] + zero[g,n]·Σ_{i ∈ S ∩ g} x[i] + bias[n]

The levels of one input lie together, two in a byte (`nibbles`), so a product with few rows of x
reads half a byte for each output of an active input, and the scales. Where more is active than
pays, and with more rows than `MOST_ROWS`, the dense product of `weight_only` runs over x with
zeros in it; it reads the levels of an output together, from a copy that is kept from its first
call on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import native_ops, nibbles, ops, sparse, sparse_bound, sparse_cpu
from rewriter.kernels.choice import paying_share, rows_bucket
from rewriter.kernels.common import (
    owned,
    register_autocast,
    register_gradient,
    register_vmap,
    widened,
)
from rewriter.kernels.settings import own_settings
from rewriter.kernels.sparse import (
    MOST_ROWS,
    Select,
    active_for_onnx,
    active_reference,
    by_columns,
    kept_beside,
    masked,
)
from rewriter.kernels.weight_only import int4_linear, pack

__all__ = [
    "dequantize_inputs",
    "held_bytes",
    "kernel_name",
    "largest_share",
    "pack_inputs",
    "refusal",
    "sparse_int4_linear",
    "sparse_int4_reference",
]

_VERSION = "sparse int4 3"

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "sparse_int4_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, "
    "Tensor? threshold, Tensor? importance, int k, int block, int group_size, float share=1.0) "
    "-> Tensor"
)


def pack_inputs(q: Tensor, in_features: int) -> Tensor:
    """q [out, groups·size] in −8 … 7 → [in_features, ⌈out/2⌉] uint8, the levels of each input."""
    return nibbles.pack_rows(q[:, :in_features].t()).contiguous()


def dequantize_inputs(
    packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int
) -> Tensor:
    """W [out, in], in float32 or wider; arguments as of `sparse_int4_linear`."""
    wide, width = widened(scale.dtype), packed.shape[0]

    def rows(of: Tensor) -> Tensor:
        return of.to(wide).repeat_interleave(group_size, 0)[:width]

    w = nibbles.unpack_rows(packed, (scale.shape[1],)).to(wide) * rows(scale)
    return (w if zero is None else w + rows(zero)).t()


def sparse_int4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    importance: Tensor | None = None,
    k: int = 0,
    block: int = 1,
    group_size: int = 64,
    share: float = 1.0,
) -> Tensor:
    """y = x_S Wᵀ + bias with w[n,i] = q[i,n]·scale[g,n] + zero[g,n]; x_S[i] = x[i] where i is
    active.

    Which entries are active, and x's gradient: as of `sparse_linear`. bias has its gradient;
    packed, scale and zero have none.

    Args:
        x: [*, in_features].
        packed: [in_features, ⌈out_features/2⌉] uint8, of `pack_inputs`.
        scale: [groups, out_features].
        zero: as scale, or None.
        bias: [out_features] or None.
        threshold, importance, k, block: as of `sparse_linear`.
        group_size: inputs that share a scale; the last group may have fewer.
        share: as of `sparse_linear`; code that is compiled goes by it.

    Returns:
        [*, out_features] in x's dtype. Costs up to 2·rows·in·out FLOPs.

    Raises:
        RuntimeError: shapes, dtypes or options that do not fit.
    """
    own = packed, scale, zero, bias, threshold, importance, k, block, group_size

    def check() -> None:
        _check(x, *own)

    call = sparse_bound.ready(x, sparse_bound.Operands(*own), check, _same)
    if call is not None:
        y = call(x, largest_share(call.rows(x), scale.shape[1], packed.shape[0], group_size))
        if y is None:
            y = _dense(call.masked(x), packed, scale, zero, bias, group_size)
        return y
    found: Tensor = torch.ops.rewriter.sparse_int4_linear(x, *own, share)
    return found


def _same(packed: Tensor) -> Tensor:
    return packed.detach()  # the weight itself lives no longer for it


def _formula(
    active: Callable[[Tensor, Select], Tensor],
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    importance: Tensor | None,
    k: int,
    block: int,
    group_size: int,
) -> Tensor:
    kept = x.where(active(x, Select.of(threshold, importance, k, block)), 0.0)
    wide = widened(x.dtype)
    weight = dequantize_inputs(packed, scale, zero, group_size).to(wide)
    return F.linear(kept.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


def sparse_int4_reference(x: Tensor, *operands: Any) -> Tensor:
    """The same, written as the formula (float32 or wider); autograd does the rest."""
    return _formula(active_reference, x, *operands[:9])


def _for_onnx(x: Tensor, *operands: Any) -> Tensor:
    return _formula(active_for_onnx, x, *operands[:9])


def _check(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    importance: Tensor | None,
    k: int,
    block: int,
    group_size: int,
) -> None:
    if packed.dim() != 2 or packed.dtype != torch.uint8 or x.shape[-1:] != packed.shape[:1]:
        raise RuntimeError(
            "sparse_int4_linear: x must be [*, in] and packed [in, ⌈out/2⌉] uint8, not "
            f"{tuple(x.shape)} and {tuple(packed.shape)} {packed.dtype}"
        )
    width, stored = packed.shape
    groups = -(-width // max(group_size, 1))
    if not 1 <= group_size <= sparse_cpu.MOST_GROUP:
        raise RuntimeError(
            f"sparse_int4_linear: group_size must be from 1 to {sparse_cpu.MOST_GROUP}, not "
            f"{group_size}"
        )
    fits = scale.dim() == 2 and scale.shape[0] == groups
    if not fits or stored != nibbles.row_bytes(scale.shape[1]):
        raise RuntimeError(
            f"sparse_int4_linear: scale must be [{groups}, out] with ⌈out/2⌉ = {stored}, not "
            f"{tuple(scale.shape)}"
        )
    sparse.check_selection("sparse_int4_linear", width, threshold, importance, k, block)
    for name, t, want in (("zero", zero, scale.shape), ("bias", bias, scale.shape[1:])):
        if t is not None and t.shape != want:
            raise RuntimeError(
                f"sparse_int4_linear: {name} must have shape {list(want)}, not {tuple(t.shape)}"
            )


def _forward(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    importance: Tensor | None,
    k: int,
    block: int,
    group_size: int,
    share: float = 1.0,
) -> Tensor:
    _check(x, packed, scale, zero, bias, threshold, importance, k, block, group_size)
    select = Select.of(threshold, importance, k, block)
    y = _multiplied(x, packed, scale, zero, bias, select, group_size)
    if y is None:
        y = _dense(masked(x, select), packed, scale, zero, bias, group_size)
    return owned(y.contiguous(), (*x.shape[:-1], scale.shape[1]))


def _multiplied(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    select: Select,
    group_size: int,
) -> Tensor | None:
    """By the compiled kernel; None where a dense product is to run."""
    (width, out), rows = (packed.shape[0], scale.shape[1]), x.numel() // max(x.shape[-1], 1)
    if not 0 < rows <= MOST_ROWS or not width * out or x.device.type != "cpu":
        return None
    if x.dtype not in (torch.float32, torch.bfloat16) or scale.dtype == torch.float64:
        return None
    share = largest_share(rows, out, width, group_size)
    if not share:
        return None
    alike = scale.dtype == torch.bfloat16 and (zero is None or zero.dtype == torch.bfloat16)
    stored = torch.bfloat16 if alike else torch.float32
    y, _ = sparse_cpu.linear(
        sparse_cpu.floats(x),
        packed.contiguous(),
        scale.to(stored).contiguous(),
        sparse_cpu.floats(bias),
        select,
        int(share * width),
        zero=None if zero is None else zero.to(stored).contiguous(),
        group=group_size,
    )
    return y if y is None else y.to(x.dtype)


def _dense(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """x Wᵀ + bias, by the product of layers that select nothing."""
    if group_size % 32 or not packed.numel():  # the op has blocks of 32
        weight = dequantize_inputs(packed, scale, zero, group_size).to(widened(x.dtype))
        return F.linear(x.to(weight), weight, None if bias is None else bias.to(weight)).to(x.dtype)
    own = _by_outputs(packed, scale.shape[1], group_size)
    return int4_linear(x, own, by_columns(scale), None if zero is None else by_columns(zero), bias)


def _by_outputs(packed: Tensor, out: int, group_size: int) -> Tensor:
    """The levels as `int4_linear` reads them, kept beside these."""

    def made() -> Tensor:
        q = nibbles.unpack_rows(packed.detach(), (out,)).t()
        return pack(F.pad(q, (0, -packed.shape[0] % group_size)))

    return kept_beside(packed, made, group_size)


def _fake(x: Tensor, packed: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    _check(x, packed, scale, *rest[:7])
    return x.new_empty((*x.shape[:-1], scale.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, zero, bias, threshold, importance, *sizes, _ = inputs
    ctx.save_for_backward(x, packed, scale, zero, threshold, importance)
    ctx.sizes = sizes
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, scale, zero, threshold, importance = ctx.saved_tensors
    *sizes, group_size = ctx.sizes
    dx = db = None
    if ctx.needs_input_grad[0]:
        mask = active_reference(x, Select.of(threshold, importance, *sizes))
        weight = dequantize_inputs(packed, scale, zero, group_size).to(grad.dtype)
        dx = (grad @ weight).where(mask, 0.0)
    if ctx.needs_input_grad[4]:
        db = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return dx, None, None, None, db, *[None] * 6


# Choice of the kernel ----------------------------------------------------------------------------


def largest_share(rows: int, out: int, width: int, group_size: int) -> float:
    """The share of active inputs up to which the sparse product is faster than the dense one here;
    0 where it never is."""
    if rows > MOST_ROWS or refusal() is not None:
        return 0.0
    return _measured(rows_bucket(rows), out, width, group_size, torch.get_num_threads())


@functools.lru_cache(1024)
def _measured(rows: int, out: int, width: int, group_size: int, threads: int) -> float:
    @functools.cache
    def made() -> tuple[Tensor, Tensor, Tensor]:
        x = torch.linspace(1, 2, width).roll(width // 3).expand(rows, width).contiguous()
        packed = torch.full((width, nibbles.row_bytes(out)), 0x9A, dtype=torch.uint8)
        return x, packed, torch.ones(-(-width // group_size), out, dtype=torch.bfloat16)

    def pair(share: float) -> dict[str, Callable[[], object]]:
        """Both, over rows with the same active entries: the union counts."""
        x, packed, scale = made()
        select = Select(max(int(share * width), 1))
        return {
            "dense": lambda: _dense(masked(x, select), packed, scale, None, None, group_size),
            "sparse": lambda: sparse_cpu.linear(
                x, packed, scale, None, select, width, group=group_size
            ),
        }

    def evict() -> None:
        _, packed, scale = made()
        own = by_columns(scale), _by_outputs(packed, out, group_size)
        sparse_cpu.evict(packed, scale, *own)

    key = f"sparse_int4_linear {rows} {width} {out} {group_size}"
    return paying_share(key, _VERSION, pair, threads, before=evict)


def held_bytes(packed: Tensor, scale: Tensor, group_size: int, rows: int) -> int:
    """Bytes of the copy by outputs that a product of so many rows keeps on a CPU; 0 where it is
    sparse."""
    width, out = packed.shape[0], scale.shape[1]
    if packed.device.type != "cpu" or not width * out or scale.dtype == torch.float64:
        return 0
    if largest_share(rows, out, width, group_size):
        return 0
    return int(-(-width // group_size) * group_size // 2 * out) + scale.numel() * scale.itemsize


def kernel_name(
    packed: Tensor, scale: Tensor, group_size: int, rows: int, share: float | None
) -> str:
    """What runs, for the report; see `sparse.kernel_name`."""
    if packed.device.type != "cpu" or scale.dtype == torch.float64:
        return "torch, dense"
    if (reason := refusal()) is not None:
        return f"torch, dense: {reason}"
    sizes = scale.shape[1], packed.shape[0], group_size
    return sparse.regime(rows, share, lambda n: largest_share(n, *sizes))


@functools.cache
def refusal() -> str | None:
    """Why the compiled kernel is not used; runs it against the formula, on all levels."""
    if (reason := sparse.refusal()) is not None:
        return reason
    with own_settings():
        for rows, out, width, group in ((1, 5, 7, 32), (3, 131, 70, 32), (9, 64, 200, 64)):
            x = torch.linspace(-3, 5, rows * width).view(rows, width).cos_()
            levels = torch.arange(out * width).view(width, out) * 7 % 16 - 8
            packed = nibbles.pack_rows(levels.to(torch.int8))
            scale = torch.linspace(0.5, -2, out * -(-width // group)).view(-1, out)
            scale = scale.to(torch.bfloat16)
            select = Select(max(width // 3, 1))
            own = packed, scale, scale.flip(1).contiguous()
            want = x.where(active_reference(x, select), 0.0).double()
            want = want @ dequantize_inputs(*own, group).t().double()
            got, _ = sparse_cpu.linear(
                x, packed, scale, None, select, width, zero=own[2], group=group
            )
            if got is None or not (got - want).abs().max() <= 1e-4 * want.abs().max():
                return "the compiled kernel computes something else on this CPU"
    return None


# Registration ------------------------------------------------------------------------------------


def _flops(
    x: torch.Size,
    packed: torch.Size,
    scale: torch.Size,
    zero: Any,
    bias: Any,
    threshold: Any,
    importance: Any,
    k: int,
    block: int,
    group_size: int,
    share: float = 1.0,
    *,
    out_shape: Any = None,
) -> int:
    """Of few rows by rank what is active; else one dense GEMM, as of `sparse_linear`."""
    rows, by_rank = x[:-1].numel(), threshold is None
    return 2 * rows * scale[1] * (k if by_rank and rows <= MOST_ROWS else packed[0])


_LIB.impl("sparse_int4_linear", _forward, "CompositeExplicitAutograd")
register_autocast(_LIB, "sparse_int4_linear", casts=1)
register_gradient(_LIB, "sparse_int4_linear", sparse_int4_reference, _save, _backward, _forward)
register_vmap(_LIB, "sparse_int4_linear", sparse_int4_reference, casts=1)
torch.library.register_fake("rewriter::sparse_int4_linear", _fake, lib=_LIB)

RECORD = ops.register(
    ops.Record(
        "rewriter::sparse_int4_linear",
        kind="matmul",
        reference=sparse_int4_reference,
        onnx=_for_onnx,
        flops=_flops,
        companions=(native_ops.SPARSE_INT4,),
    )
)
