"""Attention behind one int8 product that makes queries, keys and values, in one call.

    [q k v] = product(x)        y = softmax(q kᵀ·scale + mask) v, heads beside each other again

Where each thread has whole elements of the batch, q, k and v of one are in its cache alone, and
never written to memory.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rewriter.kernels import attention, int8_cpu

__all__ = ["Attend"]


class Attend:
    """y = attention(q, k, v, mask) with [q k v] = product(x), for operands that the compiled
    kernels take, any number of times, also at the same time.

    Args:
        product: of out = (heads + 2·shared)·depth columns, without anything behind it.
        heads: of the queries.
        shared: of keys and values.
        depth: of each.
        scale: of the scores; None for 1/√depth.
        causal: whether a query looks at what comes before it alone.
        bf16: whether the products are of bfloat16 numbers.
    """

    def __init__(
        self,
        product: int8_cpu.Linear,
        heads: int,
        shared: int,
        depth: int,
        scale: float | None,
        causal: bool,
        bf16: bool,
    ) -> None:
        self.product, self.width = product, heads * depth
        self._made, start, _ = attention._library()
        self._of_unit = ctypes.cast(self._made.attention_unit, ctypes.c_void_p).value or 0
        self._starts = 0, heads * depth, (heads + shared) * depth
        self._call = attention._Call(
            parallel=start,
            heads=heads,
            shared=heads // shared,
            depth=depth,
            causal=causal,
            scale=depth**-0.5 if scale is None else scale,
            bf16=bf16,
        )
        for name in "qkv":
            setattr(self._call, f"{name}_head", depth)
            setattr(self._call, f"{name}_row", product.out)

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, bool]:
        """
        Args:
            x: [batch, S, in] float32, contiguous, on a CPU, not empty.
            mask: that spreads to [batch, heads, S, S], truths or float32; None for none.

        Returns:
            y [batch, S, heads·depth]; and whether a row of x has no finite range of its own: y
            means nothing then.
        """
        batch, rows, _ = x.shape
        y = torch.empty(batch, rows, self.width, dtype=torch.float32)
        call = attention._Call.from_buffer_copy(self._call)
        call.y, call.batch, call.queries, call.keys = y.data_ptr(), batch, rows, rows
        call.threads = threads = torch.get_num_threads()
        if mask is not None:
            spread = mask.expand(batch, call.heads, rows, rows)
            call.mask, call.truths = spread.data_ptr(), spread.dtype == torch.bool
            call.mask_batch, call.mask_head, call.mask_row, call.mask_column = spread.stride()
        # as many for each thread, or so many that one more does not matter
        if batch >= threads and (batch % threads == 0 or batch >= 8 * threads):
            call.q, call.k, call.v = self._starts
            return y, self.product.hand_on(x, rows, self._of_unit, call)
        made, wide = self.product(x)
        first, size = made.data_ptr(), made.element_size()
        call.q, call.k, call.v = (first + size * at for at in self._starts)
        call.q_batch = call.k_batch = call.v_batch = rows * self.product.out
        self._made.attention(ctypes.byref(call))
        return y, wide
