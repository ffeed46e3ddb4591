"""MLPs split into experts, of which a router picks some for each token.

    s = router x + router_bias,   S: the neurons of the `active` experts with the largest s
    y = down(a_S ∘ up(x))         a = act(gate(x)); without `up`: y = down(a_S)

S is known before any of the MLP's matrices is read, so at a share s of active experts s of their
weights is read, and the small router. With all experts active y is that of the dense MLP.

`rewriter::expert_entries` is the gate's part of it: what is not in S becomes 0 in front of an
activation with act(0) = 0. `rewriter::sparse_experts` is the whole in one call. With few rows on a
CPU it reads what belongs to S alone, the union of it over rows, up to the share that was measured
to pay at these sizes; else dense products run over an a with zeros in it.

Source: Zhang et al. 2022, "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels import ops, sparse, sparse_cpu
from rewriter.kernels.choice import paying_share, rows_bucket
from rewriter.kernels.common import owned, register_formula, register_gradient, register_vmap
from rewriter.kernels.sparse import MOST_ROWS
from rewriter.kernels.sparse_cpu import Gate
from rewriter.kernels.sparse_entries import THEN

__all__ = [
    "ExpertMlp",
    "best_experts",
    "expert_entries",
    "largest_share",
    "neurons_of",
    "router_scores",
    "sparse_experts",
]

_VERSION = "sparse experts 3"
_EXPERTS = 20
"""As many experts there are where the share that pays is measured: it goes in steps of 5 %."""

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define("expert_entries(Tensor y, Tensor scores, Tensor expert_of, int active) -> Tensor")
_LIB.define(
    "sparse_experts(Tensor x, Tensor router, Tensor router_bias, Tensor expert_of, Tensor gate, "
    "Tensor? gate_bias, Tensor? up, Tensor? up_bias, Tensor down, Tensor? columns, Tensor? bias, "
    "str then, int active) -> Tensor"
)


# Selection ---------------------------------------------------------------------------------------


def router_scores(x: Tensor, router: Tensor, router_bias: Tensor) -> Tensor:
    """router x + router_bias, [*, count] in float32; no gradient goes through it.

    Args:
        x: [*, in].
        router: [count, in] float32; router_bias: [count] float32.
    """
    return F.linear(x.detach().float(), router, router_bias)


def best_experts(scores: Tensor, active: int) -> Tensor:
    """Which experts are among the `active` of largest score, [*, count] bool; ties go to the lower
    index, and NaN counts as the largest score.

    Args:
        scores: [*, count].
    """
    best = scores.sort(stable=True, dim=-1, descending=True).indices[..., :active]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def neurons_of(experts: Tensor, expert_of: Tensor) -> Tensor:
    """Which neurons belong to these experts: [*, count] bool → [*, hidden] bool."""
    return experts.index_select(-1, expert_of)


def expert_entries(y: Tensor, scores: Tensor, expert_of: Tensor, active: int) -> Tensor:
    """y with zeros where a neuron's expert is not among the best; the gradient is that of the
    others, and none goes into the scores.

    Args:
        y: [*, hidden].
        scores: [*, count].
        expert_of: [hidden] int32: the expert of each neuron.
        active: how many experts a row.

    Returns:
        As y.
    """
    found: Tensor = torch.ops.rewriter.expert_entries(y, scores, expert_of, active)
    return found


def _mask(y: Tensor, scores: Tensor, expert_of: Tensor, active: int) -> Tensor:
    return neurons_of(best_experts(scores.detach(), active), expert_of)


def _entries_reference(y: Tensor, *chosen: Any) -> Tensor:
    return y.where(_mask(y, *chosen), 0.0)


def _entries_for_onnx(y: Tensor, scores: Tensor, expert_of: Tensor, active: int) -> Tensor:
    """The same by ONNX's TopK, which takes the lower index of two that are tied."""
    best = scores.topk(active, dim=-1).indices
    experts = torch.zeros_like(scores).scatter(-1, best, 1.0)
    return y.where(experts.index_select(-1, expert_of).bool(), 0.0)


def _entries(y: Tensor, scores: Tensor, expert_of: Tensor, active: int) -> Tensor:
    return owned(_kept(y.clone(), scores, expert_of, active).contiguous(), y.shape)


def _kept(y: Tensor, scores: Tensor, expert_of: Tensor, active: int) -> Tensor:
    """`expert_entries`, which may write into y."""
    narrow = y.device.type == "cpu" and y.dtype != torch.float64 and expert_of.dtype == torch.int32
    if not narrow or sparse.refusal() is not None:
        return _entries_reference(y, scores, expert_of, active)
    own = sparse_cpu.floats(scores), expert_of.contiguous(), active
    return sparse_cpu.keep_experts(sparse_cpu.floats(y), *own).to(y.dtype)


def _entries_fake(y: Tensor, *chosen: Any) -> Tensor:
    return y.new_empty(y.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(_mask(*inputs))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    return grad.where(mask, 0.0), None, None, None


# The whole MLP -----------------------------------------------------------------------------------


class ExpertMlp(NamedTuple):
    """The matrices of an MLP, and which of its neurons are computed.

    Args:
        router, router_bias, expert_of: as of `router_scores` and `expert_entries`.
        gate: [hidden, in], in front of the activation; its bias [hidden] or None.
        up: [hidden, in] of a gated MLP, else None; its bias [hidden] or None.
        down: [out, hidden]; bias: [out] or None.
        columns: downᵀ [hidden, out], contiguous, for the sparse kernel; None: dense products.
        then: the activation, one of `THEN`.
        active: how many experts a token.
    """

    router: Tensor
    router_bias: Tensor
    expert_of: Tensor
    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None
    down: Tensor
    columns: Tensor | None
    bias: Tensor | None
    then: str
    active: int


def sparse_experts(x: Tensor, mlp: ExpertMlp) -> Tensor:
    """y = down(act(gate x + gate_bias)_S ∘ (up x + up_bias)) + bias, S by the router.

    Args:
        x: [*, in].

    Returns:
        [*, out] of x's dtype. With few rows costs 2·rows·(count·in + share·hidden·(2·in + out))
        FLOPs, of a plain MLP share·hidden·(in + out).
    """
    y: Tensor = torch.ops.rewriter.sparse_experts(x, *mlp)
    return y


def _dense(x: Tensor, m: ExpertMlp, entries: Callable[..., Tensor]) -> Tensor:
    scores = router_scores(x, m.router, m.router_bias)
    y = entries(F.linear(x, m.gate, m.gate_bias), scores, m.expert_of, m.active)
    a = THEN[m.then](y)
    h = a if m.up is None else a * F.linear(x, m.up, m.up_bias)
    return F.linear(h, m.down, m.bias)


def _experts_reference(x: Tensor, *own: Any) -> Tensor:
    return _dense(x, ExpertMlp(*own), _entries_reference)


def _experts(x: Tensor, *own: Any) -> Tensor:
    m = ExpertMlp(*own)
    (out, hidden), width = m.down.shape, x.shape[-1]
    rows = x.numel() // max(width, 1)
    if 0 < rows <= MOST_ROWS and _fits(x, m):
        most = largest_share(x.dtype, rows, width, hidden, out, gated=m.up is not None)
        y = _few(x, m, int(most * hidden)) if most * len(m.router) >= m.active else None
        if y is not None:
            return y.to(x.dtype)
    return owned(_dense(x, m, _kept).contiguous(), (*x.shape[:-1], out))


def _few(x: Tensor, m: ExpertMlp, limit: int) -> Tensor | None:
    """y [*, out] in float32, where no more than `limit` neurons are active over eight rows."""
    assert m.columns is not None
    gate = Gate(m.gate.detach(), bias=sparse_cpu.floats(m.gate_bias))
    up = None if m.up is None else Gate(m.up.detach(), bias=sparse_cpu.floats(m.up_bias))
    down = Gate(m.columns, bias=sparse_cpu.floats(m.bias))
    own = sparse_cpu.floats(x)
    scores = router_scores(own, m.router, m.router_bias).contiguous()
    chosen = scores, m.expert_of, m.active
    return sparse_cpu.routed(own, gate, up, down, m.then, *chosen, limit)[0]


def _fits(x: Tensor, m: ExpertMlp) -> bool:
    read = [t for t in (m.gate, m.up, m.columns) if t is not None]
    alike = all(t.dtype == x.dtype and t.is_contiguous() for t in read)
    there = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    held = m.columns is not None and bool(m.columns.numel()) and m.expert_of.dtype == torch.int32
    return held and alike and there and sparse.refusal() is None


def _experts_fake(x: Tensor, *own: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], ExpertMlp(*own).down.shape[0]))


def largest_share(
    dtype: torch.dtype, rows: int, width: int, hidden: int, out: int, *, gated: bool
) -> float:
    """The share of active neurons up to which the sparse kernel is faster than dense products
    here; 0 where it never is."""
    if rows > MOST_ROWS or sparse.refusal() is not None:
        return 0.0
    threads = torch.get_num_threads()
    return _measured(dtype, rows_bucket(rows), width, hidden, out, gated, threads)


@functools.lru_cache(1024)
def _measured(
    dtype: torch.dtype, rows: int, width: int, hidden: int, out: int, gated: bool, threads: int
) -> float:
    @functools.cache
    def made() -> tuple[Tensor, ExpertMlp]:
        x = torch.linspace(-1, 1, width).expand(rows, width).to(dtype).contiguous()
        gate = torch.linspace(-1, 1, hidden).to(dtype)[:, None].expand(hidden, width).contiguous()
        columns = torch.ones(hidden, out, dtype=dtype)
        router, falling = torch.zeros(_EXPERTS, width), torch.linspace(1, 0, _EXPERTS)
        expert_of = torch.arange(hidden, dtype=torch.int32) % _EXPERTS
        down, up = columns.t().contiguous(), gate.clone() if gated else None
        own = router, falling, expert_of, gate, None, up, None, down, columns, None, "relu", 1
        return x, ExpertMlp(*own)

    def pair(share: float) -> dict[str, Callable[[], object]]:
        x, m = made()
        some = m._replace(active=max(round(share * _EXPERTS), 1))
        return {
            "dense": lambda: _dense(x, some, _kept),
            "sparse": lambda: _few(x, some, hidden),
        }

    key = f"sparse_experts {dtype} {rows} {width} {hidden} {out} {'gated' if gated else 'plain'}"

    def evict() -> None:
        m = made()[1]
        read = m.gate, m.up, m.columns, m.down
        sparse_cpu.evict(*(t for t in read if t is not None))

    return paying_share(key, _VERSION, pair, threads, before=evict)


def _flops(x: torch.Size, *own: Any, out_shape: Any = None) -> int:
    """The router, and the MLP by its active share; dense where many rows come in."""
    m: Any = ExpertMlp(*own)  # of sizes in the place of tensors
    rows: int = x[:-1].numel()
    (hidden, width), count = m.gate, m.router[0]
    share = m.active / count if rows <= MOST_ROWS else 1.0
    first = width if m.up is None else 2 * width
    return int(2 * rows * (count * width + share * hidden * (first + m.down[0])))


_LIB.impl("expert_entries", _entries, "CompositeExplicitAutograd")
register_gradient(_LIB, "expert_entries", _entries_reference, _save, _backward, _entries)
register_vmap(_LIB, "expert_entries", _entries_reference)
torch.library.register_fake("rewriter::expert_entries", _entries_fake, lib=_LIB)
_LIB.impl("sparse_experts", _experts, "CompositeExplicitAutograd")
register_formula(_LIB, "sparse_experts", _experts_reference)
torch.library.register_fake("rewriter::sparse_experts", _experts_fake, lib=_LIB)

ENTRIES = ops.register(
    ops.Record(
        "rewriter::expert_entries",
        kind="pointwise",
        flops=lambda *_, **__: 0,
        reference=_entries_reference,
        onnx=_entries_for_onnx,
    )
)
RECORD = ops.register(
    ops.Record(
        "rewriter::sparse_experts", kind="matmul", reference=_experts_reference, flops=_flops
    )
)
