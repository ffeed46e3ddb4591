"""Integer convolution: a scale for each output channel, activations quantized at run time.

    lo = min(0, min x),  hi = max(0, max x),  s = (hi − lo + ε)/255,  z = round(−lo/s)
    q = round(x/s) + z                                                       uint8
    y[n,o] = s·scale[o]·(conv(q − z, qweight))[n,o] + bias[o]

with a range for each sample of the batch, or one for all of it. A zero is z exactly, so that
padding is exact. The sum over taps is exact in int32. qweight is of 8 bits, or of 4, two in a byte:
those are unpacked when a kernel makes its own layout of them, and the products are the same.

On the CPU oneDNN multiplies, where a probe with extreme values finds it right (u8·s8 instructions
without VNNI saturate their int16 pair sums); it takes weights in a layout of its own, which is made
once and not saved. It is probed again for each size: with groups or on narrow images some of its
kernels are wrong, and outputs whose window lies in the padding may stay unwritten. Elsewhere, and
in float64, the formula runs in plain torch, slower than a dense convolution: `refused_kernels` says
why, and of sizes a warning.

Source: as of `int8_linear`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils.weak import WeakTensorKeyDictionary

from rewriter.errors import warn
from rewriter.kernels import conv_cpu, ops
from rewriter.kernels.common import register_autocast, register_gradient, register_vmap, widened
from rewriter.kernels.linear_act import act_
from rewriter.kernels.nibbles import row_bytes, unpack_rows
from rewriter.kernels.settings import own_settings

__all__ = [
    "RANGES",
    "as_images",
    "available_kernels",
    "convolve",
    "int8_conv",
    "int8_conv_act",
    "int8_conv_reference",
    "kernel_name",
    "padded",
    "refused_kernels",
]

RANGES = ("per_sample", "per_tensor")
_EPS = 1e-8
_EXACT = 514
"""Products of a number from −255 to 255 and one from −128 to 127 whose sum is at most 2²⁴: exact in
float32."""

_LARGE = 1e30
"""Steps above which oneDNN's s·Σ, without the scale of the weight, may be beyond float32."""

_THEN: dict[str, tuple[str, list[float]]] = {
    "": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "hardswish": ("hardswish", []),
    "silu": ("swish", []),
}
"""Activation → what oneDNN's int8 convolution calls it, with its numbers."""

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define(
    "int8_conv(Tensor x, Tensor qweight, Tensor scale, Tensor? bias, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, str activation='per_sample', "
    "SymInt[]? kernel_size=None) -> Tensor"
)
_LIB.define(
    "int8_conv_act(Tensor x, Tensor qweight, Tensor scale, Tensor? bias, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, str activation, str then) -> Tensor"
)


def int8_conv(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "per_sample",
    kernel_size: Sequence[int] | None = None,
) -> Tensor:
    """y = s·scale[:, None, None]·conv(q(x) − z, qweight) + bias; see the module for q, s and z.

    Costs 2·positions·out·taps FLOPs. The gradient of x is straight-through, that of a convolution
    by qweight·scale; bias has its gradient; qweight and scale have none. NaN or inf in a sample
    makes all of that sample NaN (per tensor: all of y).

    Args:
        x: [N, in_channels, H, W], any real floating dtype, contiguous or channels last.
        qweight: [out_channels, in_channels/groups, kH, kW] int8; or its rows in 4 bits, as
            `nibbles.pack_rows` gives them.
        scale: [out_channels].
        bias: [out_channels] or None.
        stride, padding, dilation: two numbers each; what is padded are zeros.
        groups: of channels.
        activation: "per_sample" or "per_tensor".
        kernel_size: kH and kW of a qweight in 4 bits; None beside one of 8.

    Returns:
        [N, out_channels, H', W'] in x's dtype (the autocast dtype under autocast), and in the
        memory format of x; channels last where the weight is.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    y: Tensor = torch.ops.rewriter.int8_conv.default(
        x, qweight, scale, bias, stride, padding, dilation, groups, activation, kernel_size
    )
    return y


def int8_conv_act(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    then: str,
) -> Tensor:
    """then(int8_conv(x, …)), for inference: it has no gradient.

    Args:
        then: the name of an activation as of `linear_act`, or "" for none.
    """
    y: Tensor = torch.ops.rewriter.int8_conv_act.default(
        x, qweight, scale, bias, stride, padding, dilation, groups, activation, then
    )
    return y


def convolve(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    spatial: int,
    around: Sequence[tuple[int, int]],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    then: str | None = None,
    kernel_size: Sequence[int] | None = None,
    last: bool = False,
) -> Tensor:
    """`int8_conv` of what a convolution of one or two dimensions takes, with a batch or without.

    Args:
        x: [*, in_channels, d₁ … dₙ].
        qweight: [out_channels, in_channels/groups, kH, kW] int8; of one dimension with kH = 1.
        scale, bias: as of `int8_conv`.
        spatial: n.
        around: zeros before and behind, of each dimension.
        stride, dilation: of each dimension.
        groups, activation: as of `int8_conv`.
        then: None for the result that has gradients; else as of `int8_conv_act`.
        kernel_size: None; or, beside a qweight in 4 bits and no `then`, of each dimension.
        last: whether the result is channels last, as where a weight of 8 bits is.

    Raises:
        RuntimeError: x has another number of dimensions.
    """
    given, geometry, back = as_images(x, spatial, around, stride, dilation, groups)
    if then is None:
        kernel = None if kernel_size is None else [*[1] * (2 - spatial), *kernel_size]
        y = int8_conv(given, qweight, scale, bias, *geometry, activation, kernel)
        return back(y.contiguous(memory_format=torch.channels_last) if last else y)
    return back(int8_conv_act(given, qweight, scale, bias, *geometry, activation, then))


Geometry = tuple[list[int], list[int], list[int], int]
"""stride, padding, dilation and groups of a convolution of two dimensions."""


def as_images(
    x: Tensor,
    spatial: int,
    around: Sequence[tuple[int, int]],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Geometry, Callable[[Tensor], Tensor]]:
    """x as a batch of images, padded where its two sides differ; the convolution of images; and
    what gives its result the form of x. Arguments as of `convolve`."""
    batched = x.dim() == spatial + 2
    if not batched and x.dim() != spatial + 1:
        dims = spatial + 1
        raise RuntimeError(
            f"an int8 convolution takes {dims} or {dims + 1} dimensions, not {x.dim()}"
        )
    given = x if batched else x.unsqueeze(0)
    given, both = padded(given, around)
    line = [1] * (2 - spatial)  # a row is an image of height 1
    given = given.unsqueeze(-2) if line else given
    geometry = [*line, *stride], [*[0] * len(line), *both], [*line, *dilation], groups

    def back(y: Tensor) -> Tensor:
        y = y.squeeze(-2) if line else y
        return y if batched else y.squeeze(0)

    return given, geometry, back


def padded(x: Tensor, around: Sequence[tuple[int, int]]) -> tuple[Tensor, list[int]]:
    """x with the zeros that one side of a dimension has more than the other; and those that both
    sides of it have, which are left to the convolution."""
    if any(before != behind for before, behind in around):
        x = F.pad(x, [n - min(pair) for pair in reversed(around) for n in pair])
    return x, [min(pair) for pair in around]


def int8_conv_reference(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "per_sample",
    kernel_size: Sequence[int] | None = None,
) -> Tensor:
    """The same function as `int8_conv`, written as the formula (float64 inside)."""
    qweight = _taps(x, qweight, groups, kernel_size)
    q, s = _quantized(x.to(torch.float64), activation)
    y = F.conv2d(
        q, qweight.to(torch.float64), None, tuple(stride), tuple(padding), tuple(dilation), groups
    )
    y = y * s * scale.to(torch.float64).view(-1, 1, 1)
    return (y if bias is None else y + bias.view(-1, 1, 1)).to(x.dtype)


def _quantized(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """q − z as floating point numbers of x's dtype, and s [N, 1, 1, 1] or [1, 1, 1, 1]."""
    if x.numel() == 0:  # nothing has no range
        return x, x.new_ones(1, 1, 1, 1)
    dims = (1, 2, 3) if activation == "per_sample" else (0, 1, 2, 3)
    lo = x.amin(dims, keepdim=True).clamp(max=0)
    hi = x.amax(dims, keepdim=True).clamp(min=0)
    s = hi / 255 - lo / 255 + _EPS / 255  # in parts: the range may be beyond the largest number
    zero = (-lo / s).round()
    return ((x / s).round() + zero).clamp(0, 255) - zero, s


def _taps(x: Tensor, qweight: Tensor, groups: int, kernel_size: Sequence[int] | None) -> Tensor:
    """[out_channels, in_channels/groups, kH, kW] int8."""
    if kernel_size is None:
        return qweight
    return unpack_rows(qweight, (x.shape[1] // groups, *kernel_size))


def _formula(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str = "per_sample",
    kernel_size: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """The reference, with derivatives: rounding counts as the identity."""
    taps = _taps(x, qweight, groups, kernel_size)
    given: Any = stride, padding, dilation, groups
    rest: Any = *given, activation
    y = int8_conv_reference(x.detach(), taps, scale.detach(), bias, *rest)
    weight = (taps.to(scale.dtype) * scale.detach().view(-1, 1, 1, 1)).to(x.dtype)
    return y + F.conv2d(x - x.detach(), weight, None, *given)


# Choice of the kernel ----------------------------------------------------------------------------


def available_kernels() -> tuple[str, ...]:
    """The CPU kernels that gave the right answers on this machine, the one that runs first."""
    return ("torch",) if _refusal() else ("onednn", "torch")


def refused_kernels() -> dict[str, str]:
    """Why the other kernels are not used on this machine: {name: reason}."""
    return {} if (reason := _refusal()) is None else {"onednn": reason}


def kernel_name(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The kernel that `int8_conv` runs for such a call, for the report."""
    if (on := torch.device(device).type) not in ("cpu", "meta"):
        return f"torch, simulated, slower: no kernel convolves int8 on {on}"
    own = on == "cpu" and dtype != torch.float64
    return available_kernels()[0] if own else "torch, simulated"


@functools.cache
def _refusal() -> str | None:
    """Runs oneDNN on sums that saturate int16 arithmetic, against exact results."""
    with own_settings():
        for channels, out, groups, size in ((16, 8, 1, 3), (67, 5, 1, 1), (16, 16, 16, 3)):
            x = torch.full((2, channels, 6, 5), 255.0)
            x[:, ::7], x[0, 1::3] = 0.0, 100.0
            x[1] -= 55.0  # another zero point, and s = 1 in both
            qweight = torch.full((out, channels // groups, size, size), 127, dtype=torch.int8)
            qweight[1::3], qweight[2::3, ::2] = -128, -1
            scale, bias = torch.linspace(0.5, 2.0, out), torch.linspace(-1.0, 1.0, out)
            options = [1, 2], [size // 2] * 2, [1, 1], groups
            want = int8_conv_reference(x, qweight, scale, bias, *options)
            try:
                got = _onednn(x, qweight, scale, bias, *options, "per_sample", "")
            except (RuntimeError, AttributeError) as error:  # not built in, or not this CPU
                return f"not available: {str(error).splitlines()[0]}"
            # float32 rounding alone: half an integer step would already be 50 times more
            if not torch.allclose(got, want, rtol=1e-5, atol=0.5):
                worst = (got - want).abs().max().item()
                return f"wrong by {worst:.3g} at {channels}→{out} channels, {groups} groups"
    return None


@functools.lru_cache(4096)
def _right(
    shape: tuple[int, ...], weight_shape: tuple[int, ...], last: bool, stride: tuple[int, ...],
    padding: tuple[int, ...], dilation: tuple[int, ...], groups: int,
) -> bool:  # fmt: skip
    """Whether oneDNN convolves whole numbers of these sizes exactly; if not, after a warning."""
    spread = zip(shape[2:], weight_shape[2:], stride, padding, dilation, strict=True)
    right = math.prod(weight_shape[2:]) == 1 or all(map(_all_read, *zip(*spread, strict=True)))
    if right:
        with own_settings(), torch.autocast("cpu", enabled=False):
            right = _probed(shape, weight_shape, last, stride, padding, dilation, groups)
    if not right:
        _say(
            f"int8_conv is simulated, slower, where oneDNN is wrong: a weight {list(weight_shape)} "
            f"in {groups} groups, stride {list(stride)}, padding {list(padding)}, dilation "
            f"{list(dilation)}, on some images, as of {list(shape[2:])}"
        )
    return right


def _all_read(size: int, taps: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether each window has a tap within the image, in one dimension."""
    starts = range(-padding, size + padding - dilation * (taps - 1), stride)
    return all(any(0 <= at + dilation * tap < size for tap in range(taps)) for at in starts)


def _probed(
    shape: Sequence[int], weight_shape: Sequence[int], last: bool, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> bool:  # fmt: skip
    """Compares sums of random levels and small weights, exact in float32."""
    random, zero = torch.Generator("cpu").manual_seed(0), 100
    given: Any = {"generator": random, "device": "cpu"}
    q = torch.randint(0, 256, tuple(shape), dtype=torch.uint8, **given)
    q = q.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    weight = torch.randint(-8, 8, tuple(weight_shape), dtype=torch.int8, **given)
    ones = torch.ones(weight_shape[0], device="cpu")
    geometry = list(stride), list(padding), list(dilation), groups
    packed = _prepacked(weight, ones, (tuple(shape), *geometry, None))
    got = _convolved((q, 1.0, zero), packed, ones, None, geometry, "")
    want = F.conv2d(q.float() - zero, weight.float(), None, *geometry)
    return torch.allclose(got, want, rtol=1e-5, atol=0.5)


@functools.cache
def _say(text: str) -> None:
    """Once per process."""
    warn(text)


# Packed weights ----------------------------------------------------------------------------------

_Key = tuple[Any, ...]
_CACHE = WeakTensorKeyDictionary()
_LAYOUTS = 8
"""How many sizes of input a weight is held packed for at once."""


def _packed(qweight: Tensor, scale: Tensor, key: _Key) -> Tensor:
    """qweight in oneDNN's layout for such a call; made anew when it was written since."""
    if qweight.is_inference():  # counts no versions: nothing derived from it is kept
        return _prepacked(qweight, scale, key)
    stamp = (qweight._version, qweight.data_ptr())
    held: Any = _CACHE.get(qweight)  # type: ignore[no-untyped-call,unused-ignore]
    if held is None or held[0] != stamp:
        held = _CACHE[qweight] = (stamp, {})
    kept: dict[_Key, Tensor] = held[1]
    if key not in kept:
        if len(kept) >= _LAYOUTS:
            kept.pop(next(iter(kept)))
        kept[key] = _prepacked(qweight, scale, key)
    return kept[key]


def _prepacked(qweight: Tensor, scale: Tensor, key: _Key) -> Tensor:
    shape, *options, kernel_size = key
    given = [list(o) if isinstance(o, tuple) else o for o in options]
    if kernel_size is not None:
        qweight = unpack_rows(qweight, (shape[1] // options[-1], *kernel_size))
    packed: Tensor = torch.ops.onednn.qconv_prepack(
        qweight.contiguous(), torch.ones_like(scale), 1.0, 0, *given, list(shape)
    )
    return packed


# Forward -----------------------------------------------------------------------------------------


def _onednn(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str, then: str,
    kernel_size: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """x float32 on a CPU, not empty; all other floating operands of its dtype."""
    parts = [x] if activation == "per_tensor" else list(x.split(1))
    done = []
    kernel = None if kernel_size is None else tuple(kernel_size)
    options = tuple(stride), tuple(padding), tuple(dilation), groups, kernel
    for part in parts:
        q, s, zero = _bytes(part)
        last = suggest_memory_format(part) == torch.channels_last
        inside = tuple(qweight.shape[1:]) if kernel is None else (part.shape[1] // groups, *kernel)
        weight_shape = (qweight.shape[0], *inside)
        if s > _LARGE or not _right(tuple(part.shape), weight_shape, last, *options[:4]):
            rest = stride, padding, dilation, groups, activation, then, kernel_size
            done.append(_plain(part, qweight, scale, bias, *rest))
            continue
        packed = _packed(qweight, scale, (tuple(part.shape), *options))
        geometry = list(stride), list(padding), list(dilation), groups
        y = _convolved((q, s, zero), packed, scale, bias, geometry, then)
        done.append(y if math.isfinite(s) else y.fill_(math.nan))
    return done[0] if len(done) == 1 else torch.cat(done)


def _convolved(
    x: tuple[Tensor, float, int], packed: Tensor, scale: Tensor, bias: Tensor | None,
    geometry: tuple[Any, ...], then: str,
) -> Tensor:  # fmt: skip
    """oneDNN's convolution of x, as `_bytes` gives it, with a weight in its layout."""
    name, numbers = _THEN[then]
    y: Tensor = torch.ops.onednn.qconv_pointwise(
        *x, packed, scale, torch.zeros_like(scale, dtype=torch.int32), bias, *geometry, 1.0, 0,
        torch.float32, name, numbers, "",
    )  # fmt: skip
    return y


def _bytes(x: Tensor) -> tuple[Tensor, float, int]:
    """q [N, C, H, W] uint8 in x's memory format, s and z of all of x."""
    if conv_cpu.refusal() is None:
        return conv_cpu.levels(x.contiguous(memory_format=suggest_memory_format(x)))
    rows = x.permute(0, 2, 3, 1) if suggest_memory_format(x) == torch.channels_last else x
    low, high = (float(v) for v in torch.aminmax(rows))
    s = (max(high, 0.0) - min(low, 0.0) + _EPS) / 255
    if not math.isfinite(s):
        return torch.zeros_like(x, dtype=torch.uint8), math.nan, 0
    zero = round(-min(low, 0.0) / s)
    # floor(x/s + zero + 1/2)
    return (x * (1 / s)).add_(zero + 0.5).clamp_(0, 255.5).to(torch.uint8), s, zero


def _plain(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str, then: str,
    kernel_size: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """The formula on any device, with sums of whole numbers that are exact."""
    q, s = _quantized(x, activation)
    qweight = _taps(x, qweight, groups, kernel_size)
    taps = qweight[0].numel()
    exact = x.dtype if taps <= _EXACT else torch.float64
    y = F.conv2d(
        q.to(exact), qweight.to(exact), None, tuple(stride), tuple(padding), tuple(dilation), groups
    ).to(x.dtype)
    y = y * (s * scale.view(-1, 1, 1))
    y = y if bias is None else y.add_(bias.view(-1, 1, 1))
    return act_(y, then) if then else y


def _forward(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str = "per_sample",
    kernel_size: Sequence[int] | None = None, then: str = "",
) -> Tensor:  # fmt: skip
    given = stride, padding, dilation, groups, activation
    shape = _check(x, qweight, scale, bias, *given, kernel_size)
    dtype, wide = x.dtype, widened(x.dtype)
    layout = _layout(x, qweight)
    if math.prod(shape) * qweight[0].numel() * x.numel() == 0:
        y = x.new_zeros(shape)
        y = y if bias is None else y.add_(bias.view(-1, 1, 1))
        return act_(y, then) if then else y
    x, scale = x.to(wide), scale.to(wide)
    bias = None if bias is None else bias.to(wide)
    own = x.device.type == "cpu" and wide == torch.float32 and _refusal() is None
    if own and then in _THEN:
        y = _onednn(x, qweight, scale, bias, *given, then, kernel_size)
    elif own:
        y = act_(_onednn(x, qweight, scale, bias, *given, "", kernel_size), then)
    else:
        y = _plain(x, qweight, scale, bias, *given, then, kernel_size)
    return y.to(dtype).contiguous(memory_format=layout)


def _forward_act(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str, then: str,
) -> Tensor:  # fmt: skip
    given = stride, padding, dilation, groups, activation
    return _forward(x, qweight, scale, bias, *given, None, then)


def _layout(x: Tensor, qweight: Tensor) -> torch.memory_format:
    """As a convolution by the weight would choose it."""
    last = torch.channels_last
    found = last in (suggest_memory_format(x), suggest_memory_format(qweight))
    return last if found else torch.contiguous_format


def _check(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str,
    kernel_size: Sequence[int] | None,
) -> list[int]:  # fmt: skip
    """The shape of the result.

    Raises:
        ValueError: an argument does not fit.
    """
    if activation not in RANGES:
        raise ValueError(f"int8_conv: activation must be one of {RANGES}: {activation!r}")
    whole = kernel_size is None
    if (qweight.dtype, qweight.ndim) != ((torch.int8, 4) if whole else (torch.uint8, 2)):
        wanted = "a 4-D int8 tensor" if whole else "2-D uint8, of 4 bits, beside a kernel_size"
        raise ValueError(
            f"int8_conv: qweight must be {wanted}, got {qweight.dtype} {list(qweight.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"int8_conv: x must be real floating point, got {x.dtype}")
    out = qweight.shape[0]
    kernel = qweight.shape[2:] if kernel_size is None else kernel_size
    if len(kernel) != 2 or not _fits(x, qweight, groups, kernel_size):
        of = "" if whole else f" of a {list(kernel)} kernel"
        raise ValueError(
            f"int8_conv: x of shape {list(x.shape)} does not fit qweight {list(qweight.shape)}{of} "
            f"in {groups} groups"
        )
    for name, t in (("scale", scale), ("bias", bias)):
        if t is not None and (t.ndim != 1 or t.shape[0] != out):
            raise ValueError(f"int8_conv: {name} must be [{out}], got {list(t.shape)}")
    if not len(stride) == len(padding) == len(dilation) == 2:
        raise ValueError("int8_conv: stride, padding and dilation are two numbers each")
    spread = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    sides = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in spread]
    if not torch.compiler.is_compiling() and any(isinstance(n, int) and n <= 0 for n in sides):
        raise ValueError(
            f"int8_conv: the kernel {list(kernel)} is larger than the padded {list(x.shape)}"
        )
    return [x.shape[0], out, *sides]


def _fits(x: Tensor, qweight: Tensor, groups: int, kernel_size: Sequence[int] | None) -> bool:
    """Whether x has the channels of a weight in so many groups."""
    if x.ndim != 4 or qweight.shape[0] % groups:
        return False
    if kernel_size is None:
        return bool(x.shape[1] == qweight.shape[1] * groups)
    numbers = x.shape[1] // groups * math.prod(kernel_size)
    return bool(x.shape[1] % groups == 0 and qweight.shape[1] == row_bytes(numbers))


def _fake(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str = "per_sample",
    kernel_size: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    given = stride, padding, dilation, groups, activation
    shape = _check(x, qweight, scale, bias, *given, kernel_size)
    return x.new_empty(shape).contiguous(memory_format=_layout(x, qweight))


def _fake_act(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str, then: str,
) -> Tensor:  # fmt: skip
    return _fake(x, qweight, scale, bias, stride, padding, dilation, groups, activation)


# Backward and registration -----------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, bias, *options, _, kernel_size = inputs
    ctx.save_for_backward(qweight, scale)
    ctx.shape, ctx.options, ctx.kernel_size = x.shape, options, kernel_size
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = convᵀ(g·scale, qweight); dbias = Σ g. Rounding counts as the identity."""
    qweight, scale = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        stride, padding, dilation, groups = ctx.options
        like = grad.new_empty(1).expand(ctx.shape)
        qweight = _taps(like, qweight, groups, ctx.kernel_size)
        dx = torch.ops.aten.convolution_backward.default(
            grad * scale.to(grad.dtype).view(-1, 1, 1), like, qweight.to(grad.dtype), None, stride,
            padding, dilation, False, [0, 0], groups, [True, False, False],
        )[0]  # fmt: skip
    if ctx.needs_input_grad[3]:
        dbias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
    return (dx, None, None, dbias, *[None] * 6)


_LIB.impl("int8_conv", _forward, "CompositeExplicitAutograd")
register_autocast(_LIB, "int8_conv", casts=1)
register_gradient(_LIB, "int8_conv", _formula, _setup_context, _backward)
register_vmap(_LIB, "int8_conv", _formula, casts=1)
torch.library.register_fake("rewriter::int8_conv", _fake, lib=_LIB)
_LIB.impl("int8_conv_act", _forward_act, "CompositeExplicitAutograd")
torch.library.register_fake("rewriter::int8_conv_act", _fake_act, lib=_LIB)


# Record ------------------------------------------------------------------------------------------


def _sizes(x: Tensor, qweight: Tensor, *rest: Any) -> tuple[Any, ...]:
    taps = _numbers(x.shape, qweight.shape, *rest)
    return math.prod(x.shape[:1] + x.shape[2:]), qweight.shape[0], taps


def _flops(x: Any, qweight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2·positions·out·taps integer operations, from shapes."""
    found: int = 2 * math.prod(out_shape) * _numbers(x, qweight, *args)
    return found


def _numbers(x: Any, qweight: Any, *args: Any) -> Any:
    """Taps of an output channel, from shapes and what else the op is given."""
    if len(qweight) == 4:
        return math.prod(qweight[1:])
    groups, kernel_size = args[5], args[7]
    return x[1] // groups * math.prod(kernel_size)


def _onnx(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str = "per_sample",
    kernel_size: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """The formula in float32: ONNX Runtime has no convolution in float64, and none of bytes whose
    zero is another for each sample. Sums over more than `_EXACT` taps are rounded."""
    given = tuple(stride), tuple(padding), tuple(dilation), groups
    q, s = _quantized(x.to(torch.float32), activation)
    qweight = _taps(x, qweight, groups, kernel_size)
    y = F.conv2d(q, qweight.to(torch.float32), None, *given)
    y = y * s * scale.to(torch.float32).view(-1, 1, 1)
    return (y if bias is None else y + bias.view(-1, 1, 1)).to(x.dtype)


RECORD = ops.register(
    ops.Record(
        "rewriter::int8_conv",
        kind="conv",
        reference=int8_conv_reference,
        size_names=("positions", "out", "taps"),
        sizes=_sizes,
        flops=_flops,
        dtype="int8",
        kernels=lambda: {"onednn": _refusal(), "torch": None},
        companions=(ops.Companion("rewriter::int8_conv_act"),),
        onnx=_onnx,
    )
)
