"""Fused ops of depthwise convolutions: with their batch norm and activation, and with the int8
products over channels before and behind them, as the blocks of MobileNets and EfficientNets have
them. What lies between two of them is in the cache alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._prims_common import suggest_memory_format

from rewriter.kernels import conv_cpu, int8_cpu
from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_static as static
from rewriter.kernels.choice import fastest
from rewriter.kernels.int8_conv import convolve, padded
from rewriter.kernels.linear_act import act_
from rewriter.lowering.fused import norm_of
from rewriter.lowering.rules import Fused, Place, next_level, rounding_alone
from rewriter.modules.pointwise import Channels, inner
from rewriter.spellings import activation_name, spelled

__all__ = [
    "CONVS",
    "DEPTHWISE",
    "INT8_CHAIN",
    "INT8_CHAIN_ADD",
    "INT8_DEPTHWISE",
    "INTEGER_CONVS",
    "POINTWISE",
    "is_depthwise",
]

POINTWISE = ("pointwise_int8_linear", "pointwise_int8_static_linear")
INTEGER_CONVS = ("int8_conv", "int4_conv")
CONVS = ("conv", *INTEGER_CONVS)
_VERSION = "conv_chain 1"
_LEAD = 0.03
"""By which share one call must beat the single ones."""
_OPERANDS = "qweight scale bias step zero multiplier".split()
_LAST = torch.channels_last


@dataclass
class _Step:
    """A product over channels or a convolution, and what of the place follows it."""

    node: fx.Node
    layer: Any
    norm: Any = None
    then: str | None = ""
    """The activation by its name; None for one that has other options than any name stands for."""
    pad: fx.Node | None = None
    """Before a convolution."""


@dataclass
class _Steps:
    """What a place is made of."""

    first: _Step | None
    conv: _Step
    last: _Step | None

    @classmethod
    def of(cls, place: Place) -> _Steps:
        before: list[_Step] = []
        pad: fx.Node | None = None
        for node, layer in zip(place.match.nodes, place.modules, strict=True):
            kind = spelled(node, place.root)
            if kind in (*POINTWISE, *CONVS):
                before.append(_Step(node, layer, pad=pad))
            elif kind == "pad":
                pad = node
            elif kind == "batch_norm":
                before[-1].norm = layer
            elif kind != "add":
                before[-1].then = activation_name(node, place.root)
        at = next(i for i, s in enumerate(before) if spelled(s.node, place.root) in CONVS)
        first, last = before[:at], before[at + 1 :]
        return cls(first[0] if first else None, before[at], last[0] if last else None)

    @property
    def products(self) -> tuple[_Step | None, _Step | None]:
        return self.first, self.last


# what a rule derives -----------------------------------------------------------------------------


def _product_tensors(step: _Step | None) -> list[Tensor | None]:
    """Those of an int8 linear layer with ranges found at run time or fixed, the norm in them."""
    if step is None:
        return [None] * len(_OPERANDS)
    layer: Any = inner(step.layer)
    found: list[Tensor | None] = [getattr(layer, name, None) for name in _OPERANDS]
    if step.norm is not None:
        found[1], found[2] = _normed(layer.scale, layer.bias, step.norm)
    return found


def _normed(scale: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """scale·γ/√(σ²+ε) and (b − μ)·γ/√(σ²+ε) + β."""
    factor, shift = norm_of(norm, bias)
    return (scale.double() * factor).to(scale.dtype), shift.to(scale.dtype)


def _conv_tensors(step: _Step) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The weight, a scale where that is of whole numbers, and the bias; the norm in them."""
    conv = step.layer
    if hasattr(conv, "integers"):
        scale, bias = conv.scale, conv.bias
        if step.norm is not None:
            scale, bias = _normed(scale, bias, step.norm)
        return conv.integers(), scale, bias
    weight, bias = conv.weight, conv.bias
    if step.norm is not None:
        factor, bias = _normed(weight.new_ones(weight.shape[0]), bias, step.norm)
        weight = weight * factor.view(-1, 1, 1, 1)
    return weight, None, bias


def _tensors(place: Place) -> list[Tensor | None]:
    steps = _Steps.of(place)
    own = _conv_tensors(steps.conv)
    return [*_product_tensors(steps.first), *own, *_product_tensors(steps.last)]


Sides = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class _Window:
    """How a convolution reads its input."""

    stride: tuple[int, int]
    around: Sides
    dilation: tuple[int, int]

    @classmethod
    def of(cls, step: _Step) -> _Window:
        conv = step.layer
        stride, dilation = _pair(conv.stride), _pair(conv.dilation)
        added = _sides(conv.padding, _kernel(conv), dilation)
        if step.pad is not None:
            left, right, *rest = _padding(step.pad)["pad"]
            above, below = rest or (0, 0)
            (a, b), (c, d) = added
            added = (a + above, b + below), (c + left, d + right)
        return cls(stride, added, dilation)


def _padding(pad: fx.Node) -> dict[str, Any]:
    """What a call that pads is given, by name."""
    return {**dict(zip(("input", "pad", "mode", "value"), pad.args, strict=False)), **pad.kwargs}


def _pair(option: Any) -> tuple[int, int]:
    first, second = (option, option) if isinstance(option, int) else option
    return int(first), int(second)


def _kernel(conv: Any) -> tuple[int, int]:
    high, wide = _weight(conv).shape[2:]
    return high, wide


def _sides(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]) -> Sides:
    """Zeros before and behind, of both dimensions."""
    if padding == "same":
        high, wide = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return (high // 2, high - high // 2), (wide // 2, wide - wide // 2)
    high, wide = (0, 0) if padding == "valid" else _pair(padding)
    return (high, high), (wide, wide)


def _constants(place: Place) -> tuple[Any, ...]:
    """Of each product whether it is there, how it finds ranges and what follows it; stride, padding
    and dilation of the convolution, and what follows that; whether the result is channels last,
    whatever the input is."""
    steps = _Steps.of(place)
    products = [
        None if p is None else (str(getattr(inner(p.layer), "activation", "")), p.then)
        for p in steps.products
    ]
    window = _Window.of(steps.conv)
    last = suggest_memory_format(_conv_tensors(steps.conv)[0]) == _LAST
    last |= any(p is not None and p.layer.channels.last for p in steps.products)
    given = window.stride, window.around, window.dilation, steps.conv.then
    return (*products, *given, last)


_DERIVED = 2 * len(_OPERANDS) + 3


# what runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """then(int8 product) over channels."""

    operands: Sequence[Tensor | None]
    activation: str
    then: str

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], given: Any) -> _Product | None:
        return None if given is None else cls(tensors, *given)

    def __call__(self, x: Tensor, last: bool, add: Tensor | None = None) -> Tensor:
        channels = Channels(2, (1, 1), last)
        rows, added = channels.rows(x), None if add is None else channels.rows(add)
        own: Any = *self.operands, self.then, added
        if self.operands[3] is None:
            own = *self.operands[:3], self.activation, self.then, added
            return channels.back(int8.int8_linear_then(rows, *own), x)
        return channels.back(static.int8_static_linear_then(rows, *own), x)

    def kernel(self) -> int8_cpu.Linear | None:
        """The compiled kernel of it; None where that does not take the operands."""
        own: Any = *self.operands, self.then
        if self.operands[3] is None:
            own = *self.operands[:3], self.activation, self.then
            found = int8.bound(*own).kernel
        else:
            found = static.bound(*own).kernel
        return found if isinstance(found, int8_cpu.Linear) else None


@dataclass(frozen=True)
class _Chain:
    """What `derive` and `constants` gave, by its meaning."""

    first: _Product | None
    conv: tuple[Tensor, Tensor | None, Tensor | None]
    last: _Product | None
    stride: Sequence[int]
    around: Sides
    dilation: Sequence[int]
    then: str
    in_channels_last: bool

    @classmethod
    def of(cls, given: Sequence[Any]) -> _Chain:
        tensors, (before, behind, *window) = given[:_DERIVED], given[_DERIVED:]
        n = len(_OPERANDS)
        conv: Any = tuple(tensors[n : n + 3])
        first, last = _Product.of(tensors[:n], before), _Product.of(tensors[n + 3 :], behind)
        return cls(first, conv, last, *window)

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """By one op after the other."""
        if self.first is not None:
            x = self.first(x, self.in_channels_last)
        weight, scale, bias = self.conv
        if scale is not None:
            options: Any = self.stride, self.dilation, weight.shape[0], "per_sample", self.then
            x = convolve(x, weight, scale, bias, 2, self.around, *options)
        else:
            x, within = padded(x, self.around)
            x = F.conv2d(x, weight, bias, self.stride, within, self.dilation, weight.shape[0])
            x = act_(x, self.then) if self.then else x
        if self.last is not None:
            return self.last(x, self.in_channels_last, add)
        return x if add is None else x + add

    def kernel(self) -> conv_cpu.Chain | None:
        """The compiled kernel of it; None where that does not take the operands."""
        weight, scale, bias = self.conv
        floats = [t for t in (weight.float(), scale, bias) if t is not None]
        if conv_cpu.refusal() or any(not t.is_cpu or t.dtype != torch.float32 for t in floats):
            return None
        first, last = (None if p is None else p.kernel() for p in (self.first, self.last))
        if (first is None) != (self.first is None) or (last is None) != (self.last is None):
            return None
        window = self.stride, self.around, self.dilation
        return conv_cpu.Chain(weight.float(), bias, *window, self.then, first, last, scale)


def int8_conv_chain(x: Tensor, *given: Any) -> Tensor:
    """last(then(depthwise(first(x)))), where each of the products may be missing."""
    return _Chain.of(given)(x)


def int8_conv_chain_add(x: Tensor, added: Tensor, *given: Any) -> Tensor:
    """last(then(depthwise(first(x)))) + added."""
    return _Chain.of(given)(x, added)


def depthwise_conv(x: Tensor, *given: Any) -> Tensor:
    """then(depthwise(x))."""
    return _Chain.of(given)(x)


def _bound(*given: Any) -> Callable[..., Tensor]:
    """The chain ready to run: by the compiled kernel, where that takes what comes."""
    chain = _Chain.of(given)
    kernel, last = chain.kernel(), chain.in_channels_last

    def run(x: Tensor, add: Tensor | None = None) -> Tensor:
        if kernel is not None and kernel.takes(x, add):
            y, spoiled = kernel(x, add)
            if not spoiled:
                stays = last or suggest_memory_format(x) == _LAST
                return y if stays else y.contiguous()
        return chain(x, add)

    return run


# where it runs -----------------------------------------------------------------------------------


def _unlike(place: Place) -> str | None:
    """What of a place the compiled kernel does not compute."""
    steps, x = _Steps.of(place), place.input
    if (why := conv_cpu.refusal()) is not None:
        return f"the compiled kernel is not available: {why}"
    if isinstance(x, Tensor) and (x.dim() != 4 or x.dtype != torch.float32 or not x.is_cpu):
        return "the kernel of depthwise convolutions takes images in float32 on a CPU"
    for step in steps.products:
        if step is not None and (why := _no_product(step)) is not None:
            return why
    return _no_depthwise(steps.conv)


def _no_product(step: _Step) -> str | None:
    channels: Channels = step.layer.channels
    name = step.node.name
    if set(channels.stride) != {1} or channels.spatial != 2:
        return f"{name} does not read every pixel of an image"
    if getattr(inner(step.layer), "activation", "") == "per_tensor":
        return f"{name} finds one range for all pixels"
    if step.then not in int8_cpu.THEN:
        return f"no int8 kernel has {step.then or 'the activation'} behind {name} as its epilogue"
    return None


def is_depthwise(place: Place) -> bool:
    """Whether the convolution of a place is one of images, each channel by itself."""
    conv = _Steps.of(place).conv.layer
    if conv is None or conv.transposed or getattr(conv, "spatial", 2) != 2:
        return False
    weight = _weight(conv)
    return weight.dim() == 4 and weight.shape[1] == 1 and conv.groups == weight.shape[0]


def _weight(conv: Any) -> Tensor:
    found: Tensor = conv.integers() if hasattr(conv, "integers") else conv.weight
    return found


def _no_depthwise(step: _Step) -> str | None:
    conv, name = step.layer, step.node.name
    if not conv_cpu.fits(_weight(conv)):
        return f"{name} has more rows of taps than the kernel of depthwise convolutions"
    if conv.padding_mode != "zeros":
        return f"{name} does not pad with zeros"
    if getattr(conv, "activation", "per_sample") != "per_sample":
        return f"{name} finds one range for all images"
    if step.then not in conv_cpu.THEN:
        return f"no kernel has {step.then or 'the activation'} behind {name} as its epilogue"
    return None if step.pad is None else _no_zeros(step.pad)


def _no_zeros(pad: fx.Node) -> str | None:
    """Why a node does not pad the two dimensions of images with zeros."""
    given = _padding(pad)
    sides: Any = given.get("pad")
    around = isinstance(sides, list | tuple) and len(sides) in (2, 4)
    if not (around and all(type(n) is int and n >= 0 for n in sides)):
        return f"{pad.name} pads by {sides}, not by so many zeros on each side of an image"
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0, 0.0):
        return f"{pad.name} pads with something else than zeros"
    return None


def _slow(place: Place, x: Tensor, *added: Tensor) -> str | None:
    given = [*_tensors(place), *_constants(place)]
    chain = _Chain.of(given)
    kernel = chain.kernel()
    if kernel is None or not kernel.takes(x, *added) or not x.numel():
        return "the compiled kernel does not take these operands"
    bound = _bound(*given)

    def candidates() -> dict[str, Callable[[], object]]:
        return {"single": lambda: chain(x, *added), "native": lambda: bound(x, *added)}

    layout = suggest_memory_format(x) == _LAST, chain.in_channels_last, len(added)
    products = [None if p is None else p.operands[0].shape for p in (chain.first, chain.last)]  # type: ignore[union-attr]
    window = chain.stride, chain.around, chain.dilation, chain.then, chain.conv[1] is not None
    sizes = list(x.shape), products, list(chain.conv[0].shape)
    key = f"{sizes} {window} {layout} {torch.get_num_threads()}"
    if fastest(key, _VERSION, candidates, _LEAD) == "native":
        return None
    return f"one call for all of it is no faster here on {math.prod(x.shape[2:])} pixels"


def _fused(
    name: str, run: Callable[..., Tensor], error: Callable[[Place], float] = next_level
) -> Fused:
    return Fused(name, run, _tensors, _constants, _unlike, _slow, _bound, error=error)


INT8_CHAIN = _fused("int8_conv_chain", int8_conv_chain)
INT8_CHAIN_ADD = _fused("int8_conv_chain_add", int8_conv_chain_add)
INT8_DEPTHWISE = _fused("int8_depthwise", int8_conv_chain)
DEPTHWISE = _fused("depthwise_conv", depthwise_conv, rounding_alone)
