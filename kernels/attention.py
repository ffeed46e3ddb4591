"""Attention: y = softmax(q kᵀ·scale + mask) v, for inference.

Kernels, chosen by measurement per size (`rewriter.kernels.choice`):

    native   of attention_cpu.cpp: both products and the softmax in one pass, a mask of truths read
             as it is, operands where they lie, the result as the next linear layer reads it;
             float32 on the CPU; where a call allows it and the CPU has AVX512-BF16, its products
             are of bfloat16 numbers, summed in float32, by AMX where it has that too
             (attention_bf16.h)
    torch    torch's own `scaled_dot_product_attention`; every device and dtype

Both give zeros for a query that may look at nothing.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rewriter.kernels import native_ops
from rewriter.kernels.choice import fastest, rows_bucket
from rewriter.kernels.native import fields, library, parallel, why_not
from rewriter.kernels.settings import own_settings

__all__ = [
    "Bound",
    "attention",
    "attention_reference",
    "bf16_unavailable",
    "bound",
    "native",
    "pick",
    "refusal",
    "unavailable",
    "use_amx",
]

_SOURCE = Path(__file__).with_name("attention_cpu.cpp")
_VERSION = "attention 3"
_LEAD = 0.05
_MOST = 512, 128
"""Longer sequences, and more heads in all of a batch, are taken to run as these do: to measure them
takes long."""

_POINTERS = "q k v mask y parallel"
_SIZES = (
    "batch heads shared queries keys depth "
    "q_batch q_head q_row k_batch k_head k_row v_batch v_head v_row "
    "mask_batch mask_head mask_row mask_column truths causal threads"
)


class _Call(ctypes.Structure):
    _fields_ = [
        *fields(_POINTERS, _SIZES),
        ("scale", ctypes.c_double),
        ("bf16", ctypes.c_int64),
    ]


@functools.cache
def _library() -> tuple[Any, int, int]:
    made = library(_SOURCE)
    made.attention.argtypes, made.attention.restype = [ctypes.c_void_p], None
    made.attention_lanes.restype = made.attention_bf16.restype = ctypes.c_int64
    made.attention_use_amx.argtypes = [ctypes.c_int64]
    made.attention_use_amx.restype = ctypes.c_int64
    return made, parallel(), int(made.attention_lanes())


@functools.cache
def unavailable() -> str | None:
    """Why the compiled kernel does not run on this machine; None where it does: looked at on sizes
    with tails and on a mask, against the formula."""
    if (reason := why_not(_library)) is not None:
        return reason
    return _wrong(False, 1e-5)


@functools.cache
def bf16_unavailable() -> str | None:
    """Why it does not compute with bfloat16 numbers on this machine; None where it does."""
    if (reason := unavailable()) is not None:
        return reason
    if not _library()[0].attention_bf16():
        return "this CPU, or the compiler, has no AVX512-BF16"
    return _wrong(True, 0.02)


def use_amx(wanted: bool) -> bool:
    """Multiplies bfloat16 numbers by AMX from now on, or no more, in this process; whether it does.

    Raises:
        Unavailable: the kernels do not run here.
    """
    return bool(_library()[0].attention_use_amx(wanted))


def _wrong(bf16: bool, atol: float) -> str | None:
    lanes = _library()[2]
    draw = torch.Generator().manual_seed(0)
    with own_settings():
        for queries, keys in ((1, 1), (7, 19), (37, 70)):
            q, k, v = (
                torch.randn(1, 2, n, 3 * lanes, generator=draw) for n in (queries, keys, keys)
            )
            mask = torch.rand(queries, keys, generator=draw) > 0.3
            for own in (None, mask):
                want = attention_reference(q, k, v, own)
                found = native(q, k, v, own, bf16=bf16)
                if not torch.allclose(found, want, rtol=1e-4, atol=atol):
                    return f"wrong at {queries} queries and {keys} keys"
    return None


def refusal(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: float
) -> str | None:
    """Why the compiled kernel does not take such operands; None where it does."""
    operands = [query, key, value, *([] if mask is None else [mask])]
    if any(t.device.type != "cpu" for t in operands) or query.dtype != torch.float32:
        return f"no kernel takes {query.dtype} on {query.device.type}"
    if (why := unavailable()) is not None:
        return f"no compiled kernel: {why}"
    return _unfit(query, key, value, mask, causal, dropout, _library()[2])


def _unfit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    lanes: int,
) -> str | None:
    """What of float32 operands on a CPU the compiled kernel does not take; its registers have so
    many lanes."""
    if any(t.dtype != query.dtype for t in (key, value)):
        return "its operands differ in dtype"
    if mask is not None and (causal or mask.dtype not in (torch.bool, query.dtype)):
        return "its mask is neither of truths nor of float32, or there are two"
    if dropout:
        return "it drops values"
    if any(t.ndim != 4 for t in (query, key, value)):
        return "its operands are not [batch, heads, rows, depth]"
    (b, h, _, d), (kb, shared, t, kd) = query.shape, key.shape
    if (b, t) != (value.shape[0], value.shape[2]) or b != kb or shared != value.shape[1]:
        return "its operands differ in batch, or heads"
    if d != kd or d != value.shape[3] or d % lanes or h % shared:
        return f"a head is {d} wide, which is no multiple of {lanes}, or its operands differ"
    return None if query.numel() and key.numel() else "it is empty"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bf16: bool = False,
) -> Tensor:
    """y = softmax(q kᵀ·scale + mask) v: arguments and result of
    `torch.nn.functional.scaled_dot_product_attention`. Costs 4·batch·heads·S·T·D FLOPs; has no
    gradient.

    Args:
        query: [batch, heads, S, D].
        key, value: [batch, heads, T, D], or with `enable_gqa` of fewer heads.
        attn_mask: that spreads to [batch, heads, S, T], truths or numbers that are added.
        bf16: allows products of bfloat16 numbers, where the kernel "native" has them.

    Returns:
        [batch, heads, S, D], which lies as [batch, S, heads, D].
    """
    mask, causal, gqa = attn_mask, is_causal, enable_gqa
    ours = not isinstance(query, FakeTensor)  # priced: as torch's
    bf16 = ours and bf16 and bf16_unavailable() is None
    ours = ours and _is_native(query, key, value, mask, dropout_p, causal, gqa, bf16)
    return _computed(ours, query, key, value, mask, dropout_p, causal, scale, gqa, bf16)


def bound(bf16: bool = False) -> Bound:
    """`attention` that remembers of which operands it has found out who computes them: for plain
    tensors."""
    return Bound(bf16 and bf16_unavailable() is None)


class Bound:
    """`attention` for one place of a model; with `bf16`, which `bf16_unavailable` has nothing
    against, by products of bfloat16 numbers."""

    def __init__(self, bf16: bool = False) -> None:
        self.bf16 = bf16
        self._known: dict[Any, bool] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        operands, options = (query, key, value, attn_mask), (dropout_p, is_causal)
        looks = [None if t is None else (t.shape, t.dtype, t.is_cpu) for t in operands]
        call = *looks, *options, enable_gqa, torch.get_num_threads()
        ours = self._known.get(call)
        if ours is None:
            ours = self._known[call] = _is_native(*operands, *options, enable_gqa, self.bf16)
        return _computed(ours, *operands, *options, scale, enable_gqa, self.bf16)

    def in_graph(self) -> native_ops.InGraph | None:
        """The compiled kernel as it stands in a graph, at every size, where it takes the operands;
        None where there is none."""
        if unavailable() is not None:
            return None
        lanes = _library()[2]
        return native_ops.InGraph((), functools.partial(_in_graph, bf16=self.bf16, lanes=lanes))


def _in_graph(
    _: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    bf16: bool,
    lanes: int,
) -> Tensor:
    plain = query.dtype == torch.float32 and query.device.type == "cpu"
    fits = plain and _unfit(query, key, value, attn_mask, is_causal, dropout_p, lanes) is None
    ours = fits and (enable_gqa or query.shape[1] == key.shape[1])
    if not ours:
        options = dropout_p, is_causal, scale, enable_gqa, bf16
        return _computed(False, query, key, value, attn_mask, *options)
    times = query.shape[-1] ** -0.5 if scale is None else scale
    y: Tensor = torch.ops.rewriter.native_attention.default(
        query, key, value, attn_mask, int(is_causal), times, int(bf16)
    )
    return y


def _is_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    gqa: bool,
    bf16: bool,
) -> bool:
    """Whether the compiled kernel takes such operands, and is the fastest."""
    if refusal(query, key, value, mask, causal, dropout) is not None:
        return False
    same = gqa or query.shape[1:2] == key.shape[1:2]
    return same and pick(query, key, mask, causal, bf16) == "native"


def _computed(
    ours: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
    bf16: bool,
) -> Tensor:
    if ours:
        return native(query, key, value, mask, causal, scale, bf16)
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scale=scale, enable_gqa=gqa
    )


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same, written as the formula (float64 inside), for as many heads of k as of q."""
    s = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    return (torch.softmax(s, -1).nan_to_num(0.0) @ v.double()).to(q.dtype)


def native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    bf16: bool = False,
) -> Tensor:
    """The kernel "native", of operands that `refusal` has nothing against; with `bf16` where
    `bf16_unavailable` has nothing against that."""
    made, start, _ = _library()
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    (b, h, rows, depth), (_, shared, keys, _) = query.shape, key.shape
    y = torch.empty_strided((b, h, rows, depth), (rows * h * depth, depth, h * depth, 1))
    spread = None if mask is None else mask.expand(b, h, rows, keys)
    call = _Call(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if spread is None else spread.data_ptr(),
        y.data_ptr(),
        start,
        b,
        h,
        h // shared,
        rows,
        keys,
        depth,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *((0, 0, 0, 0) if spread is None else spread.stride()),
        spread is not None and spread.dtype == torch.bool,
        causal,
        torch.get_num_threads(),
        depth**-0.5 if scale is None else scale,
        bf16,
    )
    made.attention(ctypes.byref(call))
    return y


def pick(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, bf16: bool = False) -> str:
    """The fastest kernel on the CPU for such operands; measured when first asked for, with batch
    and sequences rounded up to powers of two."""
    (b, h, rows, depth), (_, shared, keys, _) = query.shape, key.shape
    longest, most = _MOST
    rows, keys = rows_bucket(rows, longest), rows_bucket(keys, longest)
    b = min(rows_bucket(b), max(most // h, 1))
    kind = "causal" if causal else "" if mask is None else str(mask.dtype)
    kind += " bf16" if bf16 else ""
    key_ = f"{b}x{h}x{shared} {rows}x{keys}x{depth} {kind} {torch.get_num_threads()}"

    def candidates() -> dict[str, Callable[[], object]]:
        # as a joined product of queries, keys and values leaves them: how far rows lie apart
        # decides which of them meet in one line of the cache
        q, k, v = (
            torch.linspace(-1, 1, b * n * 3 * h * depth).view(b, n, 3 * h, depth)[:, :, :heads]
            for n, heads in ((rows, h), (keys, shared), (keys, shared))
        )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        own = None if mask is None else torch.ones(1, 1, rows, keys).to(mask.dtype)
        options = {"is_causal": causal, "enable_gqa": shared != h}

        def of_torch() -> Tensor:
            y = F.scaled_dot_product_attention(q, k, v, own, **options)
            return y.transpose(1, 2).contiguous()

        return {
            "torch": of_torch,
            "native": lambda: native(q, k, v, own, causal, bf16=bf16).transpose(1, 2).contiguous(),
        }

    return fastest(key_, _VERSION, candidates, _LEAD)
