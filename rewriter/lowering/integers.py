"""Fused ops of int8 layers: what follows the product, two products in a row, and products that read
one input.

Ranges of the input may be found at run time (`rewriter::int8_linear`) or be fixed beforehand
(`rewriter::int8_static_linear`). Every function here takes the operands of both: qweight, scale,
bias, step, zero, multiplier and activation, where step is None at run time, and activation is ""
beside a range that is fixed. Of a Monarch layer (`rewriter::int8_monarch_linear`) they are its
five tensors, a None, and its options in the place of activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_static as static
from rewriter.kernels import quantized_gpu
from rewriter.kernels.choice import device_name, fastest, rows_bucket
from rewriter.kernels.int8_cpu import THEN
from rewriter.kernels.native_ops import InGraph
from rewriter.lowering import int8_monarchs as monarchs
from rewriter.lowering.fused import joined_bias, not_joined
from rewriter.lowering.rules import Fused, Place, next_level
from rewriter.spellings import activation_name, spelled

__all__ = [
    "INT8_ACT",
    "INT8_ADD",
    "INT8_ALONE",
    "INT8_JOINED",
    "INT8_MLP",
    "INT8_MLP_ADD",
    "INT8_MLP_NORM",
    "INT8_MONARCH",
    "INT8_NORM",
]

_LEAD = 0.03
"""By which share one product must beat the single ones."""
_OPERANDS = "qweight scale bias step zero multiplier".split()

Operands = Sequence[Any]
"""qweight, scale, bias, step, zero, multiplier, activation; or those of a Monarch layer."""
After = Sequence[Any]
"""The name of the activation behind a product or "", and weight, bias and ε of the LayerNorm or
None."""


def _tensors(layer: Any) -> list[Tensor | None]:
    if monarchs.is_monarch(layer):
        return [*monarchs.tensors(layer), None]
    return [getattr(layer, name, None) for name in _OPERANDS]


def _activation(layer: Any) -> str:
    return str(getattr(layer, "activation", ""))


def _options(layer: Any) -> str | tuple[Any, ...]:
    """What of the operands is no tensor."""
    return monarchs.options(layer) if monarchs.is_monarch(layer) else _activation(layer)


def _is_product(layer: Any) -> bool:
    return hasattr(layer, "qweight") or monarchs.is_monarch(layer)


def _product(x: Tensor, operands: Operands, after: After, add: Tensor | None = None) -> Tensor:
    """norm(then(product) + add), by the op of the operands' kind."""
    then, *norm = after
    if not isinstance(operands[-1], str):
        return monarchs.product(x, (*operands[:5], *operands[-1]), then, add, *norm)
    qweight, scale, bias, step, zero, multiplier, activation = operands
    behind: Any = then, add, *norm
    if step is None:
        return int8.int8_linear_then(x, qweight, scale, bias, activation, *behind)
    return static.int8_static_linear_then(x, qweight, scale, bias, step, zero, multiplier, *behind)


def _bound(operands: Operands, after: After) -> int8.Bound:
    """`_product` of these operands, ready to run."""
    if not isinstance(operands[-1], str):
        return monarchs.bound((*operands[:5], *operands[-1]), *after)
    qweight, scale, bias, step, zero, multiplier, activation = operands
    behind: Any = tuple(after)
    if step is None:
        return int8.bound(qweight, scale, bias, activation, *behind)
    return static.bound(qweight, scale, bias, step, zero, multiplier, *behind)


# what follows one product ------------------------------------------------------------------------


def _epilogue(place: Place, first: int) -> tuple[str, Any]:
    """The activation that follows a product behind which the node number `first` stands, by its
    name or "", and the LayerNorm at the end or None."""
    rest = place.match.nodes[first:]
    then = activation_name(rest[0], place.root) if rest else None
    normed = bool(rest) and spelled(rest[-1], place.root) == "layer_norm"
    return then if then in THEN else "", place.modules[-1] if normed else None


def _then_tensors(place: Place) -> list[Tensor | None]:
    """Of the product, and weight and bias of the LayerNorm."""
    norm = _epilogue(place, 1)[1]
    return [*_tensors(place.modules[0]), *_norm_tensors(norm)]


def _norm_tensors(norm: Any) -> list[Tensor | None]:
    return [None, None] if norm is None else [norm.weight, norm.bias]


def _then_constants(place: Place) -> tuple[Any, ...]:
    then, norm = _epilogue(place, 1)
    return _options(place.modules[0]), then, None if norm is None else norm.eps


def int8_linear_act(x: Tensor, *given: Any) -> Tensor:
    """then(product)."""
    return _product(x, *_split(given))


def int8_linear_add(x: Tensor, added: Tensor, *given: Any) -> Tensor:
    """then(product) + added, or the LayerNorm of it."""
    return _product(x, *_split(given), added)


def _split(given: Sequence[Any]) -> tuple[Operands, After]:
    """What `_then_tensors` and `_then_constants` gave, as operands and what follows."""
    *own, weight, bias, activation, then, eps = given
    return (*own, activation), (then, weight, bias, eps)


def _bound_then(*given: Any) -> int8.Bound:
    return _bound(*_split(given))


def _unlike(place: Place) -> str | None:
    """What of the nodes behind the first product no int8 kernel has as its epilogue."""
    for node, module in zip(place.match.nodes[1:], place.modules[1:], strict=True):
        kind, name = spelled(node, place.root), activation_name(node, place.root)
        if kind == "dropout" and (module is None or module.training):
            return f"{node.name} may drop values"
        if kind == "layer_norm" and (why := _no_row_norm(place, module)):
            return why
        if kind not in _NO_ACTIVATION and name not in THEN:
            kind = name or "this activation with its options"
            return f"no int8 kernel has {kind} as its epilogue"
    return None


_NO_ACTIVATION = {
    "add", "dropout", "layer_norm", "int8_linear", "int8_static_linear", "int8_monarch_linear",
}  # fmt: skip


def _no_row_norm(place: Place, norm: Any) -> str | None:
    width = [m.out_features for m in place.modules if _is_product(m)][-1]
    if norm is None:
        return "the LayerNorm is a function: its weights are not a layer's"
    if tuple(norm.normalized_shape) != (width,):
        return f"the LayerNorm is over {list(norm.normalized_shape)}, not over a row"
    return None


def _slow(place: Place, x: Tensor, *added: Tensor) -> str | None:
    rows, products = math.prod(x.shape[:-1]), [m for m in place.modules if _is_product(m)]
    if rows and int8.has_kernels(x) and all(p.kernel(rows) == "native" for p in products):
        return None
    if rows and _has_gpu_kernels(x):  # all of which have it
        return None
    return "the int8 kernel that is the fastest here has no epilogue"


def _has_gpu_kernels(x: Tensor) -> bool:
    return quantized_gpu.takes(x) and not quantized_gpu.simulated("int8", x.device, x.dtype)


def _then(name: str, run: Callable[..., Tensor]) -> Fused:
    return Fused(name, run, _then_tensors, _then_constants, _unlike, _slow, _bound_then)


INT8_ACT = _then("int8_linear_act", int8_linear_act)
INT8_MONARCH = _then("int8_monarch", int8_linear_act)
INT8_ADD = _then("int8_linear_add", int8_linear_add)
INT8_NORM = _then("int8_linear_norm", int8_linear_add)
INT8_ALONE = _then("int8_linear_alone", int8_linear_act)


# two products in a row ---------------------------------------------------------------------------


def _mlp_tensors(place: Place) -> list[Tensor | None]:
    first, _, second = place.modules[:3]
    return [*_tensors(first), *_tensors(second), *_norm_tensors(_epilogue(place, 3)[1])]


def _mlp_constants(place: Place) -> tuple[Any, ...]:
    first, _, second = place.modules[:3]
    norm = _epilogue(place, 3)[1]
    eps = None if norm is None else norm.eps
    return _options(first), _options(second), _epilogue(place, 1)[0], eps


def _split_mlp(given: Sequence[Any]) -> tuple[Operands, After, Operands, After]:
    *tensors, one, two, then, eps = given
    first, second, (weight, bias) = tensors[:6], tensors[6:12], tensors[12:]
    return (*first, one), (then, None, None, None), (*second, two), ("", weight, bias, eps)


def int8_mlp(x: Tensor, *given: Any) -> Tensor:
    """second(then(first(x)))."""
    first, then, second, after = _split_mlp(given)
    return _product(_product(x, first, then), second, after)


def int8_mlp_add(x: Tensor, added: Tensor, *given: Any) -> Tensor:
    """second(then(first(x))) + added, or the LayerNorm of it."""
    first, then, second, after = _split_mlp(given)
    return _product(_product(x, first, then), second, after, added)


def _bound_mlp(*given: Any) -> int8.Bound:
    first, then, second, after = _split_mlp(given)
    return int8.bound_pair(_bound(first, then), _bound(second, after))


def _mlp(name: str, run: Callable[..., Tensor]) -> Fused:
    own = _mlp_tensors, _mlp_constants, _unlike, _slow, _bound_mlp
    return Fused(name, run, *own, error=next_level)


INT8_MLP = _mlp("int8_mlp", int8_mlp)
INT8_MLP_ADD = _mlp("int8_mlp_add", int8_mlp_add)
INT8_MLP_NORM = _mlp("int8_mlp_norm", int8_mlp_add)


# products that read one input --------------------------------------------------------------------


def joined_int8_linear(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """The input quantized once, one product with [W₁ W₂ …], cut into the single results. Where
    somebody has written other ranges into the layers since, step and zero are [layers], multiplier
    [layers, in]: each by itself then."""
    qweight, scale, bias, step, zero, multiplier, activation, sizes = given
    if step is None:
        return _pieces(int8.int8_linear(x, qweight, scale, bias, activation), sizes)
    if len(step) == 1:
        own = qweight, scale, bias, step, zero, multiplier
        return _pieces(static.int8_static_linear(x, *own), sizes)
    biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))
    times = [None] * len(sizes) if multiplier is None else multiplier.unbind()
    weights = qweight.split(list(sizes)), scale.split(list(sizes)), biases
    each = zip(*weights, step.split(1), zero.split(1), times, strict=True)
    return tuple(static.int8_static_linear(x, *one) for one in each)


def _bound_joined(*given: Any) -> Callable[[Tensor], tuple[Tensor, ...]]:
    *own, activation, sizes = given
    if own[3] is not None and len(own[3]) > 1:
        return lambda x: joined_int8_linear(x, *given)
    return _BoundJoined(_bound((*own, activation), ("", None, None, None)), sizes)


@dataclass(frozen=True)
class _BoundJoined:
    """One product, cut into pieces of these sizes."""

    product: int8.Bound
    sizes: tuple[int, ...]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return _pieces(self.product(x), self.sizes)

    def in_graph(self) -> InGraph | None:
        """The product and its pieces as they stand in a graph."""
        found, sizes = self.product.in_graph(), self.sizes
        if found is None:
            return None
        call = found.call
        return InGraph(found.tensors, lambda held, x: call(held, x).split(list(sizes), -1))


def _pieces(y: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    # no views to autograd: what follows may write them in place, with gradients too
    return tuple(torch.unsafe_split_with_sizes(y, list(sizes), -1))


def _joined(place: Place) -> list[Tensor | None]:
    layers = place.modules
    found: list[Tensor | None] = []
    scales = [m.scale for m in layers]
    alike = _quantize_alike(place)
    for name in _OPERANDS[3:]:  # those of all layers, or where they differ those of each
        own: list[Any] = [getattr(layer, name, None) for layer in layers]
        if alike or all(t is None for t in own):
            found.append(own[0])
        elif name == "multiplier":
            one = layers[0].scale.new_ones(layers[0].in_features)
            found.append(torch.stack([one if t is None else t for t in own]))
        else:
            found.append(torch.cat(own))
    qweight = torch.cat([m.qweight for m in layers])
    return [qweight, torch.cat(scales), joined_bias(place, scales), *found]


def _joined_constants(place: Place) -> tuple[Any, ...]:
    return _activation(place.modules[0]), tuple(len(m.scale) for m in place.modules)


def _range(layer: Any) -> tuple[Any, ...]:
    return *_tensors(layer)[3:], _activation(layer)


def _quantize_alike(place: Place) -> bool:
    first, *others = map(_range, place.modules)
    return all(_same(a, b) for other in others for a, b in zip(first, other, strict=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _not_joined(place: Place) -> str | None:
    layers = place.modules
    alike = len({(m.scale.dtype, m.qweight.device) for m in layers}) == 1
    if not alike or not _quantize_alike(place):
        return "the layers differ in how they quantize their input, in dtype or device"
    return not_joined(place)


def _slow_joined(place: Place, x: Tensor) -> str | None:
    layers, (activation, sizes) = place.modules, _joined_constants(place)
    width = layers[0].qweight.shape[1]
    rows = rows_bucket(x.numel() // max(width, 1))
    if not x.numel() or not (x.device.type == "cpu" or _has_gpu_kernels(x)):
        return "what it would save is not measured on this device"
    ranges = _tensors(layers[0])[3:]

    def candidates() -> dict[str, Callable[[], object]]:
        given = torch.linspace(-1, 1, rows * width, device=x.device).view(rows, width).to(x.dtype)
        parts = [torch.ones(n, width, dtype=torch.int8, device=x.device) for n in sizes]
        scales = [torch.ones(n, device=x.device) for n in sizes]
        nothing: After = ("", None, None, None)
        single = [
            _bound((w, s, None, *ranges, activation), nothing)
            for w, s in zip(parts, scales, strict=True)
        ]
        one = torch.cat(parts), torch.cat(scales), None
        joined = _bound_joined(*one, *ranges, activation, sizes)
        calls: dict[str, Callable[[], object]] = {
            "single": lambda: [product(given) for product in single],
            "joined": lambda: joined(given),
        }
        for call in calls.values():  # their own choices first: none is made inside of another
            call()
        return calls

    said = " ".join([activation, *(str(t is not None) for t in ranges)])
    on = x.device if x.is_cuda else None
    where = torch.get_num_threads() if on is None else device_name(on.index or 0)
    key = f"{x.dtype} {rows}x{width}x{sizes} {said} {where}"
    if fastest(key, "joined_int8_linear 2", candidates, _LEAD, on) == "joined":
        return None
    return f"one product for {len(sizes)} is no faster here on {rows} rows"


INT8_JOINED = Fused(
    "joined_int8_linear",
    joined_int8_linear,
    _joined,
    _joined_constants,
    _not_joined,
    _slow_joined,
    _bound_joined,
)
