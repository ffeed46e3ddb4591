"""Monarch layers with int8 factors in fused ops: what such an op is given of one, and one layer in
the place of those that read one input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_monarch as monarch
from rewriter.kernels.choice import fastest, rows_bucket
from rewriter.lowering.fused import joined_bias, not_joined
from rewriter.lowering.rules import Fused, Place

__all__ = ["INT8_MONARCH_JOINED", "bound", "is_monarch", "options", "product", "tensors"]

_LEAD = 0.03
"""By which share one layer must beat the single ones."""
_NOTHING = "", None, None, None


def is_monarch(layer: Any) -> bool:
    return getattr(layer, "op", None) == "int8_monarch_linear"


def tensors(layer: Any) -> list[Tensor | None]:
    """Both factors and their scales, and the bias."""
    return [layer.qright, layer.right_scale, layer.qleft, layer.left_scale, layer.bias]


def options(layer: Any) -> tuple[Any, ...]:
    """What else the op is given: sizes, how activations are quantized, the order of outputs."""
    return layer.in_features, layer.out_features, layer.activation, layer.interleaved


def product(
    x: Tensor, operands: Sequence[Any], then: str, add: Tensor | None, *norm: Any
) -> Tensor:
    """norm(then(layer(x)) + add).

    Args:
        operands: `tensors` and `options` of a layer.
        norm: weight, bias and ε of the LayerNorm, or None.
    """
    *own, _, out, activation, interleaved = operands
    options: Any = out, activation, interleaved, then, add, *norm
    y: Tensor = monarch.int8_monarch_linear_then(x, *own, *options)
    return y


def bound(operands: Sequence[Any], then: str, *norm: Any) -> int8.Bound:
    """`product` of these operands, ready to run."""
    given: Any = (*operands, then, *norm)
    return monarch.bound(*given)


# layers that read one input ----------------------------------------------------------------------


def joined_int8_monarch(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """The blocks of the input quantized once, one layer of the blocks of all outputs, cut into the
    single results."""
    *operands, sizes = given
    return _pieces(product(x, operands, "", None, None, None, None), sizes)


def _bound_joined(*given: Any) -> Callable[..., tuple[Tensor, ...]]:
    *operands, sizes = given
    layer = bound(operands, *_NOTHING)
    return lambda x: _pieces(layer(x), sizes)


def _pieces(y: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    # no views to autograd: what follows may write them in place, with gradients too
    return tuple(torch.unsafe_split_with_sizes(y, list(sizes), -1))


def _joined(place: Place) -> list[Tensor | None]:
    """A Monarch of as many blocks of outputs as all have: right's rows (r, l) by l."""
    layers = place.modules
    count = len(layers[0].qleft)

    def rows(name: str) -> Tensor:
        own = [getattr(m, name) for m in layers]
        each = [t.unflatten(1, (-1, count)) for t in own]
        return torch.cat(each, 2).flatten(1, 2)

    left = [torch.cat([getattr(m, name) for m in layers]) for name in ("qleft", "left_scale")]
    bias = joined_bias(place, [m.left_scale.flatten() for m in layers])
    return [rows("qright"), rows("right_scale"), *left, bias]


def _joined_constants(place: Place) -> tuple[Any, ...]:
    first, sizes = place.modules[0], tuple(m.out_features for m in place.modules)
    width, _, *rest = options(first)
    return width, sum(sizes), *rest, sizes


def _not_joined(place: Place) -> str | None:
    layers = place.modules
    first = layers[0]
    if first.activation != "per_token" or first.interleaved:
        return "only blocks that are quantized by themselves, with outputs in order, can be joined"
    if len(first.qleft) * first.qleft.shape[1] != first.out_features:
        return f"{first.out_features} outputs do not fill {len(first.qleft)} blocks"
    kinds = {(options(m), m.qright.shape, m.qleft.shape) for m in layers}
    alike = {(m.right_scale.dtype, m.left_scale.dtype, m.qright.device) for m in layers}
    if len(kinds) > 1 or len(alike) > 1:
        return "the layers differ in their sizes, in how they quantize, in dtype or device"
    return not_joined(place)


def _slow_joined(place: Place, x: Tensor) -> str | None:
    layers, first = place.modules, place.modules[0]
    if not (x.numel() and int8.has_kernels(x)):
        return "what it would save is measured on a CPU alone, in float32"
    count, rows = len(layers), rows_bucket(x.numel() // first.in_features)

    def candidates() -> dict[str, Callable[[], object]]:
        given = torch.linspace(-1, 1, rows * first.in_features).view(rows, first.in_features)
        single = [bound([*tensors(m), *options(m)], *_NOTHING) for m in layers]
        joined = _bound_joined(*_joined(place), *_joined_constants(place))
        calls: dict[str, Callable[[], object]] = {
            "single": lambda: [layer(given) for layer in single],
            "joined": lambda: joined(given),
        }
        for call in calls.values():  # their own choices first: none is made inside of another
            call()
        return calls

    sizes = f"{options(first)} {first.nblocks} {first.rank}"
    key = f"{rows} {count} times {sizes} {torch.get_num_threads()}"
    if fastest(key, "joined_int8_monarch 1", candidates, _LEAD) == "joined":
        return None
    return f"one layer for {count} is no faster here on {rows} rows"


INT8_MONARCH_JOINED = Fused(
    "joined_int8_monarch",
    joined_int8_monarch,
    _joined,
    _joined_constants,
    _not_joined,
    _slow_joined,
    _bound_joined,
)
