"""Calls of linear layers with packed weights that skip torch's dispatcher, which takes as long as a
small product: what does not change from call to call is made ready once per weight.

`direct` serves a call that nobody else has a say in: plain float32 tensors on a CPU, no gradient
wanted, no mode, transform or autocast around it. All others go through the op.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rewriter.kernels import native_ops, weight_only_cpu

__all__ = ["FEW_ROWS", "PLAIN", "direct", "fits", "is_plain_call", "stands_in_graph"]

FEW_ROWS = 16
"""So many rows of x a compiled program multiplies by the compiled kernel, which reads a weight once
for all of them; more of them go through the op, which knows the faster kernel."""

PLAIN = (Tensor, nn.Parameter)
"""Classes of tensors that have no say in what is called."""

Operands = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]
"""weight, scale, zero, bias."""


def fits(weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the compiled kernel takes tensors as they are; that their sizes fit is not asked."""
    given = [t for t in (weight, scale, zero, bias) if t is not None]
    allowed = (torch.float32, torch.bfloat16) if scale.ndim == 2 else (torch.float32,)
    return (
        all(type(t) in PLAIN and t.is_cpu and t.is_contiguous() and t.numel() for t in given)
        and scale.dtype in allowed
        and (zero is None or zero.dtype == scale.dtype)
        and (bias is None or bias.dtype == torch.float32)
    )


class _Bound:
    """One weight, ready for calls."""

    def __init__(
        self, op: str, width: int, pick: Callable[..., str], operands: Operands, forget: Any
    ) -> None:
        weight, scale, zero, bias = operands
        self.op, self.pick, self.width = op, pick, width
        self.weight = weakref.ref(weight, forget)
        self.others = scale, zero, bias
        self.at = _addresses(weight, scale, zero, bias)
        self.run: weight_only_cpu.Linear | None = None
        self.group = 0
        if weight_only_cpu.refusal() is None and fits(*operands):
            own = weight.detach(), scale, zero, None if bias is None else bias.detach()
            self.run = weight_only_cpu.Linear(width, *own, op == "int4_dynamic_linear")
            self.group = 2 * weight.shape[1] // scale.shape[1] if scale.ndim == 2 else 0
        self._known: dict[tuple[int, int], bool] = {}

    def holds(self, op: str, operands: Operands) -> bool:
        """Whether it was made of these tensors, and they lie where they lay."""
        weight, scale, zero, bias = operands
        others = self.others
        return (
            self.weight() is weight
            and scale is others[0]
            and zero is others[1]
            and bias is others[2]
            and op == self.op
            and self.at == _addresses(weight, scale, zero, bias)
        )

    def native(self, rows: int, threads: int) -> bool:
        """Whether the compiled kernel is the fastest."""
        found = self._known.get((rows, threads))
        if found is None:
            assert self.run is not None
            name = self.pick(self.op, rows, self.run.out, self.width, self.group)
            found = self._known[rows, threads] = name == "native"
        return found


def _addresses(weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Any:
    return (
        weight.data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    )


_bound: dict[int, _Bound] = {}
"""By the id of a weight, for as long as that lives."""


def direct(
    op: str, check: Callable[..., None], pick: Callable[..., str], x: Tensor, *operands: Any
) -> Tensor | None:
    """y = x @ wᵀ + bias without the dispatcher; None where the call must go through the op.

    Args:
        op: its name.
        check: (op, x, *operands), raises where they do not fit each other.
        pick: (op, rows, out, width, group size) → the name of the fastest kernel.
        x: [*, in].
        operands: weight, scale, zero, bias.
    """
    if (
        type(x) not in PLAIN
        or x.dtype is not torch.float32
        or not (x.is_cpu and x.is_contiguous())
        or not is_plain_call(x, operands[3])
    ):
        return None
    key = id(operands[0])
    found = _bound.get(key)
    if found is None or not found.holds(op, operands):
        if not all(t is None or type(t) in PLAIN for t in operands):
            return None  # which have no address
        check(op, x, *operands)

        def forget(gone: Any) -> None:
            if (own := _bound.get(key)) is not None and own.weight is gone:
                del _bound[key]

        found = _bound[key] = _Bound(op, x.shape[-1], pick, operands, forget)
    run = found.run
    if run is None or x.ndim == 0 or x.shape[-1] != run.width:
        return None
    rows, threads = x.numel() // run.width, torch.get_num_threads()
    if not rows or not found.native(rows, threads):
        return None
    return run(x, rows, threads)


def is_plain_call(*trained: Tensor | None) -> bool:
    """Whether nobody but the kernel has a say in a call of what may want a gradient: as
    `rewriter.lowering` asks it."""
    wanted = any(t is not None and t.requires_grad for t in trained)
    return (
        not (wanted and torch.is_grad_enabled())
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


# In graphs ---------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels() -> bool:
    return native_ops.refusal() is None


def stands_in_graph(x: Tensor, *operands: Any) -> bool:
    """Whether the compiled kernel's op stands in a graph that is traced to be run at once: few rows
    of plain float32, without gradient. A program that is exported keeps the op.

    Args:
        x: [*, in].
        operands: weight, scale, zero, bias.
    """
    bias = operands[3]
    wanted = x.requires_grad or (bias is not None and bias.requires_grad)
    if torch.compiler.is_exporting() or (wanted and torch.is_grad_enabled()):
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    width = x.shape[-1]
    return bool(width) and x.numel() <= FEW_ROWS * width and _in_form(*operands) and _has_kernels()


def _in_form(weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> bool:
    """`fits`, as it can be traced."""
    wide = scale.dtype == torch.float32 or (scale.dtype == torch.bfloat16 and scale.ndim == 2)
    if not wide or not weight.is_contiguous() or not scale.is_contiguous():
        return False
    if zero is not None and (zero.dtype != scale.dtype or not zero.is_contiguous()):
        return False
    return bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
