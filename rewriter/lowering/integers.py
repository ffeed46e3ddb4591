"""Fused ops of int8 layers: what follows the product, and products that read one input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rewriter.kernels import int8_linear as int8
from rewriter.kernels.choice import fastest, rows_bucket
from rewriter.kernels.int8_cpu import THEN
from rewriter.lowering.fused import joined_bias, not_joined
from rewriter.lowering.rules import Fused, Place
from rewriter.spellings import activation_name, spelled

__all__ = ["INT8_ACT", "INT8_ADD", "INT8_JOINED", "INT8_NORM"]

_LEAD = 0.03
"""By which share one product must beat the single ones."""


def _native(x: Tensor, qweight: Tensor, activation: str) -> bool:
    """Whether the kernel that finishes what it multiplies is the fastest for this input."""
    rows = math.prod(x.shape[:-1])
    if not int8.has_kernels(x) or rows * qweight.numel() == 0:
        return False
    return int8.pick_kernel(rows, qweight.shape[1], qweight.shape[0], activation) == "native"


def _tensors(place: Place) -> tuple[Tensor | None, ...]:
    layer = place.modules[0]
    return layer.qweight, layer.scale, layer.bias


def _act_constants(place: Place) -> tuple[str, str | None]:
    return place.modules[0].activation, activation_name(place.match.nodes[1], place.root)


def _no_epilogue(place: Place) -> str | None:
    name = activation_name(place.match.nodes[1], place.root)
    if name in THEN:
        return None
    return f"no int8 kernel has {name or 'this activation with its options'} as its epilogue"


def _slow_epilogue(place: Place, x: Tensor) -> str | None:
    layer = place.modules[0]
    if _native(x, layer.qweight, layer.activation):
        return None
    return "the int8 kernel that is the fastest here has no epilogue"


INT8_ACT = Fused(
    "int8_linear_act", int8.int8_linear_then, _tensors, _act_constants, _no_epilogue, _slow_epilogue
)


def int8_linear_add(
    x: Tensor,
    added: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """int8_linear(x) + added."""
    return int8.int8_linear_then(x, qweight, scale, bias, activation, "", added)


def _add_constants(place: Place) -> tuple[str]:
    return (place.modules[0].activation,)


def _drops(place: Place) -> str | None:
    """Why what stands between a product and the sum does not only hand its value on."""
    for node, module in zip(place.match.nodes, place.modules, strict=True):
        if spelled(node, place.root) == "dropout" and (module is None or module.training):
            return f"{node.name} may drop values"
    return None


INT8_ADD = Fused(
    "int8_linear_add", int8_linear_add, _tensors, _add_constants, _drops, _slow_epilogue
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


def _norm_tensors(place: Place) -> tuple[Tensor | None, ...]:
    norm = place.modules[-1]
    return *_tensors(place), norm.weight, norm.bias


def _norm_constants(place: Place) -> tuple[str, float]:
    return place.modules[0].activation, place.modules[-1].eps


def _no_norm(place: Place) -> str | None:
    layer, norm = place.modules[0], place.modules[-1]
    if norm is None:
        return "the LayerNorm is a function: its weights are not a layer's"
    if tuple(norm.normalized_shape) != (len(layer.scale),):
        return f"the LayerNorm is over {list(norm.normalized_shape)}, not over a row"
    return _drops(place)


INT8_NORM = Fused(
    "int8_linear_norm", int8_linear_norm, _norm_tensors, _norm_constants, _no_norm, _slow_epilogue
)


def joined_int8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    sizes: Sequence[int],
) -> tuple[Tensor, ...]:
    """The input quantized once, one product with [W₁ W₂ …], cut into the single results."""
    y = int8.int8_linear(x, qweight, scale, bias, activation)
    # no views to autograd: what follows may write them in place, with gradients too
    return tuple(torch.unsafe_split_with_sizes(y, list(sizes), -1))


def _joined(place: Place) -> tuple[Tensor, Tensor, Tensor | None]:
    scales = [m.scale for m in place.modules]
    qweight = torch.cat([m.qweight for m in place.modules])
    return qweight, torch.cat(scales), joined_bias(place, scales)


def _joined_constants(place: Place) -> tuple[str, tuple[int, ...]]:
    return place.modules[0].activation, tuple(len(m.scale) for m in place.modules)


def _not_joined(place: Place) -> str | None:
    layers = place.modules
    if len({(m.activation, m.scale.dtype, m.qweight.device) for m in layers}) > 1:
        return "the layers differ in how they quantize their input, in dtype or device"
    return not_joined(place)


def _slow_joined(place: Place, x: Tensor) -> str | None:
    layers = place.modules
    width, (activation, sizes) = layers[0].qweight.shape[1], _joined_constants(place)
    rows = rows_bucket(x.numel() // max(width, 1))
    if x.device.type != "cpu" or not x.numel():
        return "what it would save is measured on a CPU alone"
    for size in (*sizes, sum(sizes)):  # these choices first: one is not measured inside of another
        int8.pick_kernel(rows, width, size, activation)
    key = f"{x.dtype} {rows}x{width}x{sizes} {activation} {torch.get_num_threads()}"

    def candidates() -> dict[str, Callable[[], object]]:
        given = torch.linspace(-1, 1, rows * width).view(rows, width).to(x.dtype)
        parts = [torch.ones(n, width, dtype=torch.int8) for n in sizes]
        scales = [torch.ones(n) for n in sizes]
        single = list(zip(parts, scales, strict=True))
        one, scale = torch.cat(parts), torch.cat(scales)
        return {
            "single": lambda: [int8.int8_linear(given, w, s, None, activation) for w, s in single],
            "joined": lambda: joined_int8_linear(given, one, scale, None, activation, sizes),
        }

    if fastest(key, "joined_int8_linear 1", candidates, _LEAD) == "joined":
        return None
    return f"one product for {len(sizes)} is no faster here on {rows} rows"


INT8_JOINED = Fused(
    "joined_int8_linear", joined_int8_linear, _joined, _joined_constants, _not_joined, _slow_joined
)
