"""Attention behind the int8 products that make queries, keys and values, as one fused op."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import attention, int8_cpu
from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_static as static
from rewriter.kernels.int8_attention import Attend
from rewriter.kernels.native_ops import InGraph
from rewriter.lowering.integers import INT8_JOINED
from rewriter.lowering.rules import Fused, Place
from rewriter.modules.patterns import Match, attended, view_shape
from rewriter.spellings import spelled

__all__ = ["FLOAT32_INT8_ATTENTION", "INT8_ATTENTION"]

_OPTIONS = set("query key value attn_mask dropout_p is_causal scale enable_gqa".split())
_TENSORS = 6
"""How many `INT8_JOINED` derives."""
_BF16_ERROR = 0.02


def _call(place: Place) -> Any:
    """The node of attention itself."""
    nodes = place.match.nodes
    return next(n for n in nodes if spelled(n, place.root) == "scaled_dot_product_attention")


def _products(place: Place) -> Place:
    """The layers that make queries, keys and values, in this order."""
    given = attended(_call(place))
    calls = tuple(given[name].args[0].args[0] for name in ("query", "key", "value"))
    return Place.of(Match(place.match.pattern, calls, place.match.source), place.root)


def _heads(place: Place) -> tuple[int, int, int] | None:
    """How many heads queries have, and keys; how wide one is. None where values differ in that."""
    given = attended(_call(place))
    found = []
    for name, layer in zip(("query", "key", "value"), _products(place).modules, strict=True):
        heads, depth = view_shape(given[name].args[0])[2:]  # one of them may be -1
        wide = len(layer.scale)
        if not (isinstance(heads, int) and isinstance(depth, int)) or not max(heads, depth) > 0:
            return None
        heads, depth = (
            (wide // depth if heads < 0 else heads),
            (wide // heads if depth < 0 else depth),
        )
        if heads * depth != wide:
            return None
        found.append((heads, depth))
    (heads, depth), keys, values = found
    return (heads, keys[0], depth) if keys == values and keys[1] == depth else None


def _tensors(place: Place) -> Sequence[Tensor | None]:
    return INT8_JOINED.derive(_products(place))


def _constants(place: Place) -> tuple[Any, ...]:
    activation, sizes = INT8_JOINED.constants(_products(place))
    given, heads = attended(_call(place)), _heads(place)
    return activation, sizes, heads, given.get("scale"), bool(given.get("is_causal")), True


def _float32_constants(place: Place) -> tuple[Any, ...]:
    return *_constants(place)[:-1], False


def _unless(place: Place) -> str | None:
    x, given = place.input, attended(_call(place))
    if set(given) - _OPTIONS or given.get("dropout_p"):
        return "attention is called with options that one op for all of it does not have"
    if isinstance(x, Tensor) and (x.ndim != 3 or not int8.has_kernels(x)):
        return "the compiled kernels take [batch, sequence, features] in float32 on a CPU"
    if (why := attention.unavailable()) is not None:
        return f"no compiled kernel: {why}"
    if "native" not in int8.available_kernels():
        return "no compiled kernel multiplies int8 numbers here"
    if _heads(place) is None:
        return "queries, keys and values differ in how they are cut into heads"
    return INT8_JOINED.unless(_products(place))


def _error(place: Place) -> float:
    return _BF16_ERROR if attention.bf16_unavailable() is None else 0.0


def int8_attention(x: Tensor, batch: int, rows: int, *given: Any) -> Tensor:
    """attention(q, k, v, mask) with [q k v] = x·[W₁ W₂ W₃]ᵀ + …: [batch, rows, in] → [batch, rows,
    heads·depth]; `given` is a mask where there is one, what `INT8_JOINED` derives, its constants,
    heads of queries and keys and their width, scale, whether it is causal, and bf16."""
    *mask, activation, sizes, cut, scale, causal, bf16 = given
    masks, tensors = mask[:-_TENSORS], mask[-_TENSORS:]
    pieces = INT8_JOINED.run(x, *tensors, activation, sizes)
    return _attention(pieces, batch, rows, masks, cut, scale, causal, bf16)


def _attention(
    pieces: Sequence[Tensor],
    batch: int,
    rows: int,
    masks: Sequence[Tensor],
    cut: tuple[int, int, int],
    scale: float | None,
    causal: bool,
    bf16: bool,
    compute: Callable[..., Tensor] = attention.attention,
) -> Tensor:
    heads, shared, depth = cut
    q, k, v = (
        t.reshape(batch, rows, n, depth).transpose(1, 2)
        for t, n in zip(pieces, (heads, shared, shared), strict=True)
    )
    options: dict[str, Any] = {"is_causal": causal, "scale": scale, "enable_gqa": heads != shared}
    options |= {"bf16": True} if bf16 and compute is attention.attention else {}
    y = compute(q, k, v, *masks, **options)
    return y.transpose(1, 2).reshape(batch, rows, heads * depth)


def _bound(*given: Any) -> Callable[..., Tensor]:
    """`int8_attention` of these operands, ready to run."""
    *tensors, activation, sizes, cut, scale, causal, bf16 = given
    options = cut, scale, causal
    bf16 = bf16 and attention.bf16_unavailable() is None
    compute, product = attention.bound(bf16), _product(*tensors, activation)
    joined = _joined(*tensors, activation, sizes)
    kernel = None if product is None else product.kernel
    attend = None
    if isinstance(kernel, int8_cpu.Linear):
        heads, shared, depth = cut
        attend = Attend(kernel, heads, shared, depth, scale, causal, bf16)
    known: dict[Any, bool] = {}

    def run(x: Tensor, batch: int, rows: int, *masks: Tensor) -> Tensor:
        fits = product is not None and x.shape[:2] == (batch, rows) and product.takes(x)
        if attend is not None and fits:
            look = x.shape, *((m.shape, m.dtype, m.is_cpu) for m in masks), torch.get_num_threads()
            native = known.get(look)
            if native is None:
                native = known[look] = _is_native(x, masks, cut, causal, bf16)
            if native:
                y, wide = attend(x, *masks)
                if not wide:
                    return y
        return _attention(joined(x), batch, rows, masks, *options, bf16, compute)

    def in_graph() -> InGraph | None:
        """One op, where the kernels take the mask; else the product, and attention behind it."""
        form = getattr(joined, "in_graph", None)  # none of layers with ranges of their own
        one, two = None if form is None else form(), compute.in_graph()
        if one is None or two is None:
            return None
        times, whole = cut[2] ** -0.5 if scale is None else scale, attend is not None

        def call(
            held: Sequence[Tensor], x: Tensor, batch: int, rows: int, *masks: Tensor
        ) -> Tensor:
            mask = masks[0] if masks else None
            fits = mask is None or (not causal and mask.dtype in (torch.bool, torch.float32))
            if whole and fits and cut[2] % lanes == 0 and x.dtype == torch.float32:
                own = x.contiguous(), held[0], mask, *cut, int(causal), times, int(bf16)
                y: Tensor = torch.ops.rewriter.native_int8_attention.default(*own)
                return y
            pieces, attended = one.call(held, x), functools.partial(two.call, ())
            return _attention(pieces, batch, rows, masks, *options, bf16, attended)

        lanes = attention._library()[2]
        return InGraph(one.tensors, call)

    return _Ready(run, in_graph)


@dataclass(frozen=True)
class _Ready:
    """What runs at a place, and its form in graphs."""

    run: Callable[..., Tensor]
    in_graph: Callable[[], InGraph | None]

    def __call__(self, *inputs: Any) -> Tensor:
        return self.run(*inputs)


def _joined(*given: Any) -> Any:
    assert INT8_JOINED.bind is not None
    return INT8_JOINED.bind(*given)


def _product(*operands: Any) -> int8.Bound | None:
    """All three as one; None where their inputs are quantized by different ranges, or by one of all
    of x."""
    *own, activation = operands
    qweight, scale, bias, step, zero, multiplier = own
    if step is None:
        return None if activation == "per_tensor" else int8.bound(qweight, scale, bias, activation)
    return static.bound(*own) if len(step) == 1 else None


def _is_native(
    x: Tensor, masks: Sequence[Tensor], cut: tuple[int, int, int], causal: bool, bf16: bool
) -> bool:
    """Whether the compiled kernel takes such operands of attention, and is the fastest."""
    heads, shared, depth = cut
    q, k = (x.new_empty(*x.shape[:2], n, depth).transpose(1, 2) for n in (heads, shared))
    mask = masks[0] if masks else None
    if attention.refusal(q, k, k, mask, causal, 0.0) is not None:
        return False
    return attention.pick(q, k, mask, causal, bf16) == "native"


INT8_ATTENTION = Fused(
    "int8_attention", int8_attention, _tensors, _constants, _unless, bind=_bound, error=_error
)
FLOAT32_INT8_ATTENTION = replace(INT8_ATTENTION, constants=_float32_constants)
