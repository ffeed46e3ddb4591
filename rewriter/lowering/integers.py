"""Fused ops of int8 layers: what follows the product, and products that read one input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_static as static
from rewriter.kernels.choice import fastest, rows_bucket
from rewriter.kernels.int8_cpu import THEN
from rewriter.lowering.fused import joined_bias, not_joined
from rewriter.lowering.rules import Fused, Place
from rewriter.spellings import activation_name, spelled

__all__ = [
    "INT8_ACT",
    "INT8_ADD",
    "INT8_JOINED",
    "INT8_NORM",
    "INT8_STATIC_ACT",
    "INT8_STATIC_ADD",
    "INT8_STATIC_JOINED",
    "INT8_STATIC_NORM",
]

_LEAD = 0.03
"""By which share one product must beat the single ones."""


@dataclass(frozen=True)
class _Kind:
    """One kind of int8 layer, by what its op takes behind x, qweight, scale and bias: how the input
    is quantized.

    Args:
        op: of one layer.
        joined: of several that read one input.
        tensors, constants: attributes of the layer, in the order of the op's arguments.
    """

    op: Callable[..., Tensor]
    joined: Callable[..., tuple[Tensor, ...]]
    tensors: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()

    def range_of(self, layer: Any) -> tuple[Any, ...]:
        return tuple(getattr(layer, name) for name in (*self.tensors, *self.constants))


def _kind(place: Place) -> _Kind:
    return _KINDS[place.modules[0].op]


def _constants(place: Place) -> tuple[Any, ...]:
    return tuple(getattr(place.modules[0], name) for name in _kind(place).constants)


# the activation behind the product ---------------------------------------------------------------


def _tensors(place: Place) -> tuple[Tensor | None, ...]:
    layer = place.modules[0]
    own = tuple(getattr(layer, name) for name in _kind(place).tensors)
    return (layer.qweight, layer.scale, layer.bias, *own)


def _act_constants(place: Place) -> tuple[Any, ...]:
    return (*_constants(place), activation_name(place.match.nodes[1], place.root))


def _no_epilogue(place: Place) -> str | None:
    name = activation_name(place.match.nodes[1], place.root)
    if name in THEN:
        return None
    return f"no int8 kernel has {name or 'this activation with its options'} as its epilogue"


def _slow_epilogue(place: Place, x: Tensor, *added: Tensor) -> str | None:
    layer, rows = place.modules[0], math.prod(x.shape[:-1])
    if rows and int8.has_kernels(x) and layer.kernel(rows) == "native":
        return None
    return "the int8 kernel that is the fastest here has no epilogue"


def _act(name: str, run: Callable[..., Tensor], bind: Callable[..., Any]) -> Fused:
    return Fused(name, run, _tensors, _act_constants, _no_epilogue, _slow_epilogue, bind)


INT8_ACT = _act("int8_linear_act", int8.int8_linear_then, int8.bound)
INT8_STATIC_ACT = _act("int8_static_linear_act", static.int8_static_linear_then, static.bound)


# the sum and the LayerNorm behind the product ----------------------------------------------------


def int8_linear_add(
    x: Tensor, added: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """int8_linear(x) + added."""
    return int8.int8_linear_then(x, qweight, scale, bias, activation, add=added)


def int8_static_linear_add(
    x: Tensor,
    added: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None,
) -> Tensor:
    """int8_static_linear(x) + added."""
    return static.int8_static_linear_then(
        x, qweight, scale, bias, step, zero, multiplier, add=added
    )


def int8_linear_norm(
    x: Tensor,
    added: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    eps: float,
) -> Tensor:
    """layer_norm(int8_linear(x) + added)."""
    return int8.int8_linear_then(
        x, qweight, scale, bias, activation, "", added, norm_weight, norm_bias, eps
    )


def int8_static_linear_norm(
    x: Tensor,
    added: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """layer_norm(int8_static_linear(x) + added)."""
    own = qweight, scale, bias, step, zero, multiplier
    return static.int8_static_linear_then(x, *own, "", added, norm_weight, norm_bias, eps)


def _bound_norm(
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    eps: float,
) -> Callable[..., Tensor]:
    return int8.bound(qweight, scale, bias, activation, "", norm_weight, norm_bias, eps)


def _bound_static_norm(
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None,
    *norm: Any,
) -> Callable[..., Tensor]:
    return static.bound(qweight, scale, bias, step, zero, multiplier, "", *norm)


def _drops(place: Place) -> str | None:
    """Why what stands between a product and the sum does not only hand its value on."""
    for node, module in zip(place.match.nodes, place.modules, strict=True):
        if spelled(node, place.root) == "dropout" and (module is None or module.training):
            return f"{node.name} may drop values"
    return None


def _norm_tensors(place: Place) -> tuple[Tensor | None, ...]:
    norm = place.modules[-1]
    return *_tensors(place), norm.weight, norm.bias


def _norm_constants(place: Place) -> tuple[Any, ...]:
    return *_constants(place), place.modules[-1].eps


def _no_norm(place: Place) -> str | None:
    layer, norm = place.modules[0], place.modules[-1]
    if norm is None:
        return "the LayerNorm is a function: its weights are not a layer's"
    if tuple(norm.normalized_shape) != (len(layer.scale),):
        return f"the LayerNorm is over {list(norm.normalized_shape)}, not over a row"
    return _drops(place)


def _add(name: str, run: Callable[..., Tensor], bind: Callable[..., Any]) -> Fused:
    return Fused(name, run, _tensors, _constants, _drops, _slow_epilogue, bind)


def _norm(name: str, run: Callable[..., Tensor], bind: Callable[..., Any]) -> Fused:
    return Fused(name, run, _norm_tensors, _norm_constants, _no_norm, _slow_epilogue, bind)


INT8_ADD = _add("int8_linear_add", int8_linear_add, int8.bound)
INT8_NORM = _norm("int8_linear_norm", int8_linear_norm, _bound_norm)
INT8_STATIC_ADD = _add("int8_static_linear_add", int8_static_linear_add, static.bound)
INT8_STATIC_NORM = _norm("int8_static_linear_norm", int8_static_linear_norm, _bound_static_norm)


# products that read one input --------------------------------------------------------------------


def joined_int8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    sizes: Sequence[int],
) -> tuple[Tensor, ...]:
    """The input quantized once, one product with [W₁ W₂ …], cut into the single results."""
    return _pieces(int8.int8_linear(x, qweight, scale, bias, activation), sizes)


def joined_int8_static_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None,
    sizes: Sequence[int],
) -> tuple[Tensor, ...]:
    """As `joined_int8_linear`. Where somebody has written other ranges into the layers since, step
    and zero are [layers], multiplier [layers, in]: each by itself then."""
    if len(step) == 1:
        y = static.int8_static_linear(x, qweight, scale, bias, step, zero, multiplier)
        return _pieces(y, sizes)
    biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))
    times = [None] * len(sizes) if multiplier is None else multiplier.unbind()
    weights = qweight.split(list(sizes)), scale.split(list(sizes)), biases
    each = zip(*weights, step.split(1), zero.split(1), times, strict=True)
    return tuple(static.int8_static_linear(x, *own) for own in each)


def _bound_joined(
    qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str, sizes: Sequence[int]
) -> Callable[..., tuple[Tensor, ...]]:
    product = int8.bound(qweight, scale, bias, activation)
    return lambda x: _pieces(product(x), sizes)


def _bound_static_joined(
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero: Tensor,
    multiplier: Tensor | None,
    sizes: Sequence[int],
) -> Callable[..., tuple[Tensor, ...]]:
    own = qweight, scale, bias, step, zero, multiplier
    if len(step) > 1:
        return lambda x: joined_int8_static_linear(x, *own, sizes)
    product = static.bound(*own)
    return lambda x: _pieces(product(x), sizes)


def _pieces(y: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    # no views to autograd: what follows may write them in place, with gradients too
    return tuple(torch.unsafe_split_with_sizes(y, list(sizes), -1))


_KINDS = {
    "int8_linear": _Kind(int8.int8_linear, joined_int8_linear, constants=("activation",)),
    "int8_static_linear": _Kind(
        static.int8_static_linear, joined_int8_static_linear, ("step", "zero", "multiplier")
    ),
}
"""By the layer's name of its op."""


def _joined(place: Place) -> tuple[Tensor | None, ...]:
    scales = [m.scale for m in place.modules]
    qweight = torch.cat([m.qweight for m in place.modules])
    return qweight, torch.cat(scales), joined_bias(place, scales), *_ranges(place)


def _ranges(place: Place) -> list[Tensor | None]:
    """The tensors by which all layers quantize, or where they differ those of each."""
    layers, found = place.modules, []
    alike = _quantize_alike(place)
    for name in _kind(place).tensors:
        own = [getattr(layer, name) for layer in layers]
        if alike or all(t is None for t in own):
            found.append(own[0])
        elif name == "multiplier":
            one = layers[0].scale.new_ones(layers[0].in_features)
            found.append(torch.stack([one if t is None else t for t in own]))
        else:
            found.append(torch.cat(own))
    return found


def _quantize_alike(place: Place) -> bool:
    first, *others = [_kind(place).range_of(layer) for layer in place.modules]
    return all(_same(a, b) for other in others for a, b in zip(first, other, strict=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _joined_constants(place: Place) -> tuple[Any, ...]:
    return *_constants(place), tuple(len(m.scale) for m in place.modules)


def _not_joined(place: Place) -> str | None:
    layers = place.modules
    alike = len({(m.scale.dtype, m.qweight.device) for m in layers}) == 1
    if not alike or not _quantize_alike(place):
        return "the layers differ in how they quantize their input, in dtype or device"
    return not_joined(place)


def _slow_joined(place: Place, x: Tensor) -> str | None:
    layers, kind = place.modules, _kind(place)
    width, sizes = layers[0].qweight.shape[1], _joined_constants(place)[-1]
    rows = rows_bucket(x.numel() // max(width, 1))
    if x.device.type != "cpu" or not x.numel():
        return "what it would save is measured on a CPU alone"
    own = kind.range_of(layers[0])
    run: Callable[..., object] = kind.joined

    def candidates() -> dict[str, Callable[[], object]]:
        given = torch.linspace(-1, 1, rows * width).view(rows, width).to(x.dtype)
        parts = [torch.ones(n, width, dtype=torch.int8) for n in sizes]
        scales = [torch.ones(n) for n in sizes]
        single = list(zip(parts, scales, strict=True))
        one, scale = torch.cat(parts), torch.cat(scales)
        calls: dict[str, Callable[[], object]] = {
            "single": lambda: [kind.op(given, w, s, None, *own) for w, s in single],
            "joined": lambda: run(given, one, scale, None, *own, sizes),
        }
        for call in calls.values():  # their own choices first: none is made inside of another
            call()
        return calls

    said = " ".join(str(v is not None) if isinstance(v, Tensor | None) else str(v) for v in own)
    key = f"{x.dtype} {rows}x{width}x{sizes} {said} {torch.get_num_threads()}"
    if fastest(key, f"{run.__name__} 1", candidates, _LEAD) == "joined":
        return None
    return f"one product for {len(sizes)} is no faster here on {rows} rows"


def _join(run: Callable[..., tuple[Tensor, ...]], bind: Callable[..., Any]) -> Fused:
    name = run.__name__
    return Fused(name, run, _joined, _joined_constants, _not_joined, _slow_joined, bind)


INT8_JOINED = _join(joined_int8_linear, _bound_joined)
INT8_STATIC_JOINED = _join(joined_int8_static_linear, _bound_static_joined)
