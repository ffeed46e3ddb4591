"""Smaller forms of tensors that a backward waits for: bits, and integers per group of values.

    pack_bits(x)      bit i of byte j = (x[8j+i] > 0)                    n/8 bytes, exact for masks
    pack_groups(x)    q = ⌊(x − lo)/s + u⌋, s = (hi − lo)/(2^bits − 1)   per group of `group` values

with u uniform in [0, 1): stochastic rounding, E[s·q + lo] = x, so that the errors of many layers
average out instead of adding up. Values are taken in memory order; the shape is given back when
unpacking. The noise comes from a generator of its own and leaves the global one alone.

Sources: masks as bits as in Gist (Jain et al. 2018); groups with stochastic rounding as in ActNN
(Chen et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import ops, pack_cpu
from rewriter.kernels.common import owned

__all__ = ["GROUP", "pack_bits", "pack_groups", "packed_bytes", "unpack_bits", "unpack_groups"]

GROUP = 128
"""Values that share a scale and an offset: 8 bytes on top of 128."""

_lib: Any = torch.library.Library("rewriter", "FRAGMENT")
_lib.define("pack_bits(Tensor x) -> Tensor")
_lib.define("unpack_bits(Tensor bits, SymInt[] size, ScalarType dtype) -> Tensor")
_lib.define("pack_groups(Tensor x, int bits) -> Tensor")
_lib.define("unpack_groups(Tensor q, SymInt[] size, ScalarType dtype, int bits) -> Tensor")


def pack_bits(x: Tensor) -> Tensor:
    """bits[j] = Σ_i 2^i (x[8j+i] > 0).

    Args:
        x: any shape and dtype, of one device.

    Returns:
        [⌈n/8⌉] uint8.
    """
    bits: Tensor = torch.ops.rewriter.pack_bits(x)
    return bits


def unpack_bits(bits: Tensor, size: Sequence[int], dtype: torch.dtype = torch.bool) -> Tensor:
    """x[8j+i] = bit i of bits[j], as 0 and 1 of `dtype`, in the shape `size`, contiguous."""
    x: Tensor = torch.ops.rewriter.unpack_bits(bits, size, dtype)
    return x


def pack_groups(x: Tensor, bits: int = 8) -> Tensor:
    """q = ⌊(x − lo)/s + u⌋ with s = (hi − lo)/(2^bits − 1) per group of 128 values.

    Args:
        x: floats of any shape; NaN and inf spoil their group.
        bits: 8, or 4 (two values a byte).

    Returns:
        uint8 [⌈n/128⌉, 128·bits/8 + 8 or, with 4 bits, + 4]: a group's integers, then s and lo in
        float32 or, with 4 bits, float16. FBGEMM's format of quantized rows, whose kernels do the
        work on a CPU.
    """
    q: Tensor = torch.ops.rewriter.pack_groups(x, bits)
    return q


def unpack_groups(q: Tensor, size: Sequence[int], dtype: torch.dtype, bits: int = 8) -> Tensor:
    """x = s·q + lo, in the shape `size`, contiguous."""
    x: Tensor = torch.ops.rewriter.unpack_groups(q, size, dtype, bits)
    return x


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes of the packed form: of masks with 1 bit, of groups with 4 or 8."""
    if bits == 1:
        return -(-numel // 8)
    return -(-numel // GROUP) * _width(bits)


def _width(bits: int) -> int:
    return GROUP * bits // 8 + (8 if bits == 8 else 4)


_GATHER = 0x0102040810204080  # eight bytes of 0 or 1, times this: their bits in the top byte
_SPREAD = 0x0101010101010101  # a byte, times this: in all eight
_PICK = 0x8040201008040201 - (1 << 64)  # bit i of byte i


def _padded(x: Tensor, multiple: int) -> Tensor:
    """The values in memory order, filled up to a multiple."""
    flat = x.reshape(-1)
    missing = -flat.numel() % multiple
    if not missing:
        return flat
    # the last value once more: it widens no group's range
    return torch.cat([flat, flat[-1:].expand(missing)]) if flat.numel() else flat


def _pack_bits(x: Tensor) -> Tensor:
    mask = x if x.dtype == torch.bool else x > 0
    eight = _padded(mask.contiguous(), 8).view(torch.int64)
    return (eight * _GATHER >> 56).to(torch.uint8)


def _unpack_bits(bits: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    spread = (bits.to(torch.int64) * _SPREAD).bitwise_and_(_PICK)
    mask = spread.view(torch.uint8)[: math.prod(size)].ne(0)
    return owned(mask.to(dtype), size)


_noise = torch.Generator()
_noise.manual_seed(0)
_ROWS = 512
"""Rows of noise, shared by all stretches of as many groups: to draw a number for every value takes
longer than all the rest."""


def _pack_groups(x: Tensor, bits: int) -> Tensor:
    if bits not in (4, 8):
        raise ValueError(f"pack_groups: bits must be 4 or 8, not {bits}")
    if bits == 8 and x.numel() and _compiled(x.device):
        q = x.new_empty(-(-x.numel() // GROUP), _width(bits), dtype=torch.uint8)
        seed = torch.randint(1 << 31, (1,), generator=_noise)
        pack_cpu.pack(x.detach().contiguous().float(), q, int(seed))
        return q
    groups = _padded(x.detach().contiguous(), GROUP).float().view(-1, GROUP)
    count = len(groups)
    if not count:
        return x.new_empty(0, _width(bits), dtype=torch.uint8)
    quantize = _quantize_cpu if x.device.type == "cpu" else _quantize
    # Rounding to the nearest of x + (u − ½)s is stochastic rounding of x.
    rough = quantize(groups, bits)
    # a group of equal values has no levels, whatever scale it is given
    some = rough[:, : GROUP * bits // 8].amax(1, keepdim=True) > 0
    scale = _scales(rough, bits)[:, :1] * some
    noise = (torch.rand(min(_ROWS, count), GROUP, generator=_noise) - 0.5).to(x.device)
    dithered, whole = torch.empty_like(groups), count // _ROWS * _ROWS
    if whole:
        shape = -1, _ROWS, GROUP
        torch.addcmul(
            groups[:whole].view(shape),
            noise,
            scale[:whole].view(-1, _ROWS, 1),
            out=dithered[:whole].view(shape),
        )
    if whole < count:
        rest = noise[: count - whole]
        torch.addcmul(groups[whole:], rest, scale[whole:], out=dithered[whole:])
    return quantize(dithered, bits)


def _compiled(device: torch.device) -> bool:
    """Whether the kernels of `pack_cpu.cpp` run there."""
    return device.type == "cpu" and pack_cpu.refusal() is None


def _scales(q: Tensor, bits: int) -> Tensor:
    """[groups, 2] float32: s and lo."""
    tail = q[:, GROUP * bits // 8 :].contiguous()
    return tail.view(torch.float32 if bits == 8 else torch.float16).float()


def _quantize_cpu(groups: Tensor, bits: int) -> Tensor:
    name = "embedding_bag_byte_prepack" if bits == 8 else "embedding_bag_4bit_prepack"
    q: Tensor = getattr(torch.ops.quantized, name)(groups)
    lo, hi = torch.aminmax(groups, dim=1)
    # FBGEMM passes over NaN; an offset that is none says so
    q.view(torch.float32 if bits == 8 else torch.float16)[:, -1] += lo * 0 + hi * 0
    return q


def _quantize(groups: Tensor, bits: int) -> Tensor:
    """The same in plain operations."""
    lo, hi = torch.aminmax(groups, dim=1, keepdim=True)
    own = torch.float32 if bits == 8 else torch.float16
    lo = lo.to(own).float()
    scale = ((hi - lo) / ((1 << bits) - 1)).to(own).float()
    levels = torch.round((groups - lo) / scale.where(scale > 0, 1.0))
    q = levels.clamp_(0, (1 << bits) - 1).to(torch.uint8)
    if bits == 4:
        q = q[:, ::2].bitwise_or(q[:, 1::2] << 4)
    return torch.cat([q, torch.cat([scale, lo], 1).to(own).view(torch.uint8)], 1)


def _unpack_groups(q: Tensor, size: Sequence[int], dtype: torch.dtype, bits: int) -> Tensor:
    if not len(q):
        return q.new_empty(size, dtype=dtype)
    want = -(-math.prod(size) // GROUP), _width(bits)
    if q.shape != want or q.dtype != torch.uint8:
        raise ValueError(f"unpack_groups: {list(size)} needs uint8 {list(want)}, not {q.shape}")
    if bits == 8 and _compiled(q.device):
        x = q.new_empty(size, dtype=torch.float32)
        pack_cpu.unpack(q.contiguous(), x)
        return x.to(dtype)
    if q.device.type == "cpu":
        name = "embedding_bag_byte_unpack" if bits == 8 else "embedding_bag_4bit_unpack"
        x = getattr(torch.ops.quantized, name)(q)
    else:
        x = _dequantize(q, bits)
    whole: Tensor = x.view(-1)[: math.prod(size)].to(dtype)
    return owned(whole, size)


def _dequantize(q: Tensor, bits: int) -> Tensor:
    scales, levels = _scales(q, bits), q[:, : GROUP * bits // 8]
    if bits == 4:
        levels = torch.stack([levels & 15, levels >> 4], 2).flatten(1)
    return torch.addcmul(scales[:, 1:], levels.float(), scales[:, :1])


def _pack_bits_fake(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def _unpack_bits_fake(bits: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return bits.new_empty(size, dtype=dtype)


def _pack_groups_fake(x: Tensor, bits: int) -> Tensor:
    return x.new_empty((x.numel() + GROUP - 1) // GROUP, _width(bits), dtype=torch.uint8)


def _unpack_groups_fake(q: Tensor, size: Sequence[int], dtype: torch.dtype, bits: int) -> Tensor:
    return q.new_empty(size, dtype=dtype)


for _name, _run, _fake in (
    ("pack_bits", _pack_bits, _pack_bits_fake),
    ("unpack_bits", _unpack_bits, _unpack_bits_fake),
    ("pack_groups", _pack_groups, _pack_groups_fake),
    ("unpack_groups", _unpack_groups, _unpack_groups_fake),
):
    _lib.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rewriter::{_name}", _fake, lib=_lib)


# Records -----------------------------------------------------------------------------------------


def _unpack_bits_of(build: Any, bits: Any, size: Any, dtype: torch.dtype) -> Any:
    return build(torch.ops.rewriter.unpack_bits.default, bits, size, dtype)


def _groups_form(bits: int, at_once: Callable[[str, torch.dtype], bool]) -> ops.Form:
    own = torch.ops.rewriter

    def pack(build: Any, x: Any) -> Any:
        return build(own.pack_groups.default, x, bits)

    def unpack(build: Any, q: Any, size: Any, dtype: torch.dtype) -> Any:
        return build(own.unpack_groups.default, q, size, dtype, bits)

    return ops.Form(f"int{bits}", lambda numel: packed_bytes(numel, bits), pack, unpack, at_once)


def _at_once(device: str, dtype: torch.dtype) -> bool:
    return device == "cpu" and dtype == torch.float32 and pack_cpu.refusal() is None


ops.register(
    ops.Record(
        "rewriter::pack_bits",
        kind="other",
        unit="vector",
        reference=_pack_bits,
        forms=(
            ops.Form(
                "bits",
                lambda numel: packed_bytes(numel, 1),
                lambda build, x: build(torch.ops.rewriter.pack_bits.default, x),
                _unpack_bits_of,
            ),
        ),
        companions=(ops.Companion("rewriter::unpack_bits"),),
    )
)
ops.register(
    ops.Record(
        "rewriter::pack_groups",
        kind="other",
        unit="vector",
        reference=_pack_groups,
        kernels=lambda: {"C++": pack_cpu.refusal(), "torch": None},
        forms=(_groups_form(8, _at_once), _groups_form(4, lambda device, dtype: False)),
        companions=(ops.Companion("rewriter::unpack_groups"),),
    )
)
