"""`Bound`: an int8 product and what follows it, made ready for many calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import int8_cpu, native_ops
from rewriter.kernels.int8_choice import available_kernels
from rewriter.kernels.int8_product import After, forget, native_weight, packed_weight

__all__ = ["Bound", "bound_pair", "native_linear"]


def native_linear(
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    after: After,
    activation: str = "",
    **options: Any,
) -> int8_cpu.Linear | None:
    """The product by the kernel "native"; None where that does not take these operands.

    Args:
        after: what follows it, without what is added.
        options: further ones of `int8_cpu.Linear`.
    """
    floats = [t for t in (scale, bias, *(after.norm or ())) if isinstance(t, Tensor)]
    fits = all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in floats)
    if not (fits and qweight.is_cpu and qweight.numel() and "native" in available_kernels()):
        return None
    packed = packed_weight(qweight)
    if not torch.equal(packed.row_sums, qweight.sum(-1, dtype=torch.int32)):
        forget(qweight)  # it was written in a way that torch does not count
        packed = packed_weight(qweight)
    own, width = native_weight(packed, 0, qweight), qweight.shape[1]
    one = activation == "per_tensor"
    given = bias, after.then, after.norm, one
    return int8_cpu.Linear(own, width, scale, packed.row_sums, *given, **options)


class Bound:
    """A product and what follows it, or two in a row, by the kernel "native" where that is the
    fastest and takes the operands; else as `run` has it.

    Args:
        run: (x, add) → y.
        kernel: the same; None where the operands are none that it takes.
        native: (rows) → whether it is the fastest.
    """

    @classmethod
    def of(
        cls,
        qweight: Tensor,
        run: Callable[..., Tensor],
        kernel: int8_cpu.Linear | None,
        pick: Callable[[int, int, int], str],
    ) -> Bound:
        """Of one product.

        Args:
            qweight: [out, in].
            run, kernel: as above.
            pick: (rows, in, out) → the name of the fastest kernel.
        """
        out, width = qweight.shape
        return cls(run, kernel, lambda rows: pick(rows, width, out) == "native")

    def __init__(
        self,
        run: Callable[..., Tensor],
        kernel: int8_cpu.Linear | int8_cpu.Two | None,
        native: Callable[[int], bool],
    ) -> None:
        self.run, self.kernel, self.native = run, kernel, native
        self._known: dict[tuple[int, int], bool] = {}

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        if self.kernel is not None and self.takes(x, add):
            y, wide = self.kernel(x, add)
            if not wide:
                return y
        return self.run(x, add)

    def in_graph(self) -> native_ops.InGraph | None:
        """The kernel as it stands in a graph; None where there is none."""
        return None if self.kernel is None else self.kernel.in_graph()

    def takes(self, x: Tensor, add: Tensor | None = None) -> bool:
        """Whether the kernel takes such operands, and is the fastest."""
        kernel = self.kernel
        if kernel is None or x.dtype is not torch.float32 or not (x.is_cpu and x.is_contiguous()):
            return False
        shape = x.shape
        if add is not None:
            same = add.shape == (*shape[:-1], kernel.out) and add.dtype is torch.float32
            if not (same and add.is_contiguous()):
                return False
        if not shape or shape[-1] != kernel.width or not (rows := x.numel() // kernel.width):
            return False
        key = rows, torch.get_num_threads()
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self.native(rows)
        return found


def bound_pair(first: Bound, second: Bound) -> Bound:
    """`second(first(x), add)`."""
    kernel = None
    if isinstance(first.kernel, int8_cpu.Linear) and isinstance(second.kernel, int8_cpu.Linear):
        kernel = int8_cpu.Two(first.kernel, second.kernel)

    def run(x: Tensor, add: Tensor | None = None) -> Tensor:
        return second.run(first.run(x), add)

    return Bound(run, kernel, lambda rows: first.native(rows) and second.native(rows))
