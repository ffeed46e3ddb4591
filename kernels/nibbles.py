"""Rows of 4-bit numbers, two in a byte: byte i of a row holds q[2i] + 8 in its low half and
q[2i + 1] + 8 in its high half. A row of an odd number of them is filled up with a zero.

For rows that are unpacked as a whole; `weight_only.pack` has blocks that registers unpack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pack_rows", "row_bytes", "unpack_rows"]


def row_bytes(numbers: int) -> int:
    """Of so many numbers of 4 bits."""
    return (numbers + 1) // 2


def pack_rows(q: Tensor) -> Tensor:
    """q [rows, *] int8 in −8 … 7 → [rows, row_bytes(numbers of a row)] uint8."""
    flat = q.flatten(1).to(torch.int32) + 8
    low, high = F.pad(flat, (0, flat.shape[1] % 2), value=8).unflatten(1, (-1, 2)).unbind(2)
    packed: Tensor = (low | high << 4).to(torch.uint8)
    return packed


def unpack_rows(packed: Tensor, size: Sequence[int]) -> Tensor:
    """The q int8 of which `pack_rows` gives packed, [rows, *size], contiguous."""
    # int8 each, not together: what is shifted of 8 bits has a sign in what ONNX is given
    both = [(packed & 15).to(torch.int8), (packed >> 4).to(torch.int8)]
    numbers = 1
    for n in size:
        numbers *= n
    flat = torch.stack(both, 2).flatten(1)[:, :numbers] - 8
    return flat.reshape(packed.shape[0], *size)
