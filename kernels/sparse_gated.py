"""Gated MLPs of which only the neurons with a large gate are computed.

    a = act(gate(x)),   S: where |a| is at least a threshold, or among the k largest
    y = down(a_S ∘ up(x))

The gate is read whole, of `up` and `down` only what belongs to S: at a share s of active neurons at
most 1/(1/3 + 2s/3) times faster than the dense MLP, 2.5 at 10 %.

`rewriter::kept_entries` is the gate's part of it: what is not in S becomes 0 in front of an
activation with act(0) = 0. `rewriter::sparse_gated` is the whole in one call. With few rows it
reads what belongs to S alone, up to the share that was measured to pay at these sizes (on a GPU by
the share that is expected: `sparse_gpu.py`); else dense products run over an a with zeros in it.

Source: Lee et al. 2024, "CATS: Contextually-Aware Thresholding for Sparsity in Large Language
Models".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels import ops, sparse, sparse_cpu, sparse_gpu
from rewriter.kernels.choice import paying_share, rows_bucket
from rewriter.kernels.common import owned, register_formula
from rewriter.kernels.sparse import MOST_ROWS, Select, active_reference, masked
from rewriter.kernels.sparse_cpu import Gate
from rewriter.kernels.sparse_entries import THEN
from rewriter.kernels.weight_only import int8_weight_linear, int8_weight_reference

__all__ = ["GatedMlp", "largest_share", "sparse_gated"]

_VERSION = "sparse gated 3"

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "sparse_gated(Tensor x, Tensor gate, Tensor? gate_scale, Tensor? gate_bias, "
    "Tensor? threshold, Tensor up, Tensor? up_scale, Tensor? up_bias, Tensor down, "
    "Tensor? down_scale, Tensor? columns, Tensor? bias, str then, int k=0, float share=1.0) "
    "-> Tensor"
)


class GatedMlp(NamedTuple):
    """The matrices of a gated MLP, and which of its neurons are computed.

    Args:
        gate, up: [hidden, in]; their biases [hidden] or None.
        gate_scale, up_scale, down_scale: [hidden], [hidden] and [out] where the matrices are int8;
            else None.
        threshold, k, then: which neurons are in S, as of `kept_entries`.
        down: [out, hidden]; bias: [out] or None.
        columns: downᵀ [hidden, out], contiguous, for the sparse kernel; None: dense products.
        share: of the neurons that is active, as far as it is known: for the count of FLOPs, and by
            it a GPU, which waits for no count, decides what runs.
    """

    gate: Tensor
    gate_scale: Tensor | None
    gate_bias: Tensor | None
    threshold: Tensor | None
    up: Tensor
    up_scale: Tensor | None
    up_bias: Tensor | None
    down: Tensor
    down_scale: Tensor | None
    columns: Tensor | None
    bias: Tensor | None
    then: str
    k: int = 0
    share: float = 1.0


def sparse_gated(x: Tensor, mlp: GatedMlp) -> Tensor:
    """y = down(a_S ∘ (up x + up_bias)) + bias, a = act(gate x + gate_bias).

    Args:
        x: [*, in].

    Returns:
        [*, out] of x's dtype. Costs 2·rows·hidden·(in + share·(in + out)) FLOPs with few rows.
    """
    y: Tensor = torch.ops.rewriter.sparse_gated(x, *mlp)
    return y


def _gated_reference(x: Tensor, *own: Any) -> Tensor:
    m = GatedMlp(*own)
    a = THEN[m.then](_formula(x, m.gate, m.gate_scale, m.gate_bias))
    kept = a.where(active_reference(a, Select.of(m.threshold, k=m.k)), 0.0)
    h = kept * _formula(x, m.up, m.up_scale, m.up_bias)
    return _formula(h, m.down, m.down_scale, m.bias)


def _formula(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if scale is None:
        return F.linear(x, weight, bias)
    return int8_weight_reference(x, weight, scale, bias)


def _linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if scale is None:
        return F.linear(x, weight, bias)
    return int8_weight_linear(x, weight, scale, bias)


def _gated(x: Tensor, *own: Any) -> Tensor:
    m = GatedMlp(*own)
    a = THEN[m.then](_linear(x, m.gate, m.gate_scale, m.gate_bias))
    select, (out, hidden), width = Select.of(m.threshold, k=m.k), m.down.shape, x.shape[-1]
    rows = x.numel() // max(width, 1)
    if sparse_gpu.takes(x) and (y := _on_gpu(x, a, m, select)) is not None:
        return y
    if m.columns is not None and 0 < rows <= MOST_ROWS and _fits(x, m.up, m.columns):
        most = largest_share(m.up.dtype, rows, width, hidden, out)
        if most:
            y, _ = sparse_cpu.gated(
                sparse_cpu.floats(x),
                sparse_cpu.floats(a),
                Gate(m.up.detach(), sparse_cpu.floats(m.up_scale), sparse_cpu.floats(m.up_bias)),
                Gate(m.columns, sparse_cpu.floats(m.down_scale), sparse_cpu.floats(m.bias)),
                "",
                select,
                int(most * hidden),
            )
            if y is not None:
                return y.to(x.dtype)
    h = masked(a, select) * _linear(x, m.up, m.up_scale, m.up_bias)
    y = _linear(h, m.down, m.down_scale, m.bias)
    return owned(y.contiguous(), (*x.shape[:-1], out))


def _on_gpu(x: Tensor, a: Tensor, m: GatedMlp, select: Select) -> Tensor | None:
    (out, hidden), width = m.down.shape, x.shape[-1]
    rows = x.numel() // max(width, 1)
    alike = m.columns is not None and x.dtype == a.dtype == m.up.dtype == m.columns.dtype
    if not alike:
        return None
    assert m.columns is not None
    found = sparse_gpu.choice(sparse_gpu.GatedSize(rows, out, hidden, width, x.dtype, x.device))
    share = m.k / hidden if m.k else m.share
    if not 0 < sparse_gpu.union(share, rows) <= found.most or not sparse_gpu.fits(a, select):
        return None
    own = m.up, m.up_bias, m.columns, m.bias
    return sparse_gpu.gated(x, a, *own, select, found.tile)


def _fits(x: Tensor, up: Tensor, columns: Tensor) -> bool:
    alike = up.dtype == columns.dtype and up.dtype in (x.dtype, torch.int8)
    there = x.device.type == "cpu" and up.is_contiguous() and columns.is_contiguous()
    few = alike and x.dtype in (torch.float32, torch.bfloat16)
    return few and there and bool(columns.numel()) and sparse.refusal() is None


def _gated_fake(x: Tensor, *own: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], GatedMlp(*own).down.shape[0]))


def largest_share(dtype: torch.dtype, rows: int, width: int, hidden: int, out: int) -> float:
    """The share of active neurons up to which the sparse kernel is faster than dense products
    here, of weights of this dtype; 0 where it never is."""
    if rows > MOST_ROWS or sparse.refusal() is not None:
        return 0.0
    return _measured(dtype, rows_bucket(rows), width, hidden, out, torch.get_num_threads())


@functools.lru_cache(1024)
def _measured(
    dtype: torch.dtype, rows: int, width: int, hidden: int, out: int, threads: int
) -> float:
    levels = dtype == torch.int8
    given = torch.float32 if levels else dtype

    @functools.cache
    def made() -> tuple[Tensor, ...]:
        x = torch.linspace(-1, 2, width).expand(rows, width).to(given)
        most = 127 if levels else 1
        each = torch.linspace(-most, most, hidden).to(dtype)
        up = each[:, None].expand(hidden, width).contiguous()
        columns = torch.ones(hidden, out, dtype=dtype)
        scales = (torch.ones(hidden), torch.ones(out)) if levels else ()
        return x.contiguous(), up, columns, columns.t().contiguous(), *scales

    def pair(share: float) -> dict[str, Callable[[], object]]:
        x, up, columns, down, *scales = made()
        first, last = scales or (None, None)
        a = torch.linspace(1, 2, hidden).roll(hidden // 3).expand(rows, hidden).contiguous()
        select = Select(max(int(share * hidden), 1))
        own = Gate(up, first), Gate(columns, last)
        narrow = a.to(given)
        return {  # both behind the same product with the gate
            "dense": lambda: _linear(
                masked(narrow, select) * _linear(x, up, first, None), down, last, None
            ),
            "sparse": lambda: sparse_cpu.gated(x.float(), a, *own, "", select, hidden),
        }

    key = f"sparse_gated {dtype} {rows} {width} {hidden} {out}"

    def evict() -> None:
        sparse_cpu.evict(*made()[1:4])

    return paying_share(key, _VERSION, pair, threads, before=evict)


def _flops(x: torch.Size, *own: Any, out_shape: Any = None) -> int:
    """The gate whole, the rest by its active share; dense where many rows come in."""
    m: Any = GatedMlp(*own)  # of sizes in the place of tensors
    rows: int = x[:-1].numel()
    hidden, width = m.gate
    active = m.k / hidden if m.k else m.share
    active = active if rows <= MOST_ROWS else 1.0
    return int(2 * rows * hidden * (width + active * (width + m.down[0])))


_LIB.impl("sparse_gated", _gated, "CompositeExplicitAutograd")
register_formula(_LIB, "sparse_gated", _gated_reference)
torch.library.register_fake("rewriter::sparse_gated", _gated_fake, lib=_LIB)

RECORD = ops.register(
    ops.Record("rewriter::sparse_gated", kind="matmul", reference=_gated_reference, flops=_flops)
)
