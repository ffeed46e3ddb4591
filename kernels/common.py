"""What the operations here share: gradients under every transform, autocast, gradients of weights.

A kernel computes where autograd cannot look. `register_gradient` gives an op its backward;
derivatives in forward mode and the transforms of `torch.func` run the op's formula instead, the
same function in plain torch operations, which know all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "is_transformed",
    "outer",
    "owned",
    "register_autocast",
    "register_formula",
    "register_gradient",
    "register_vmap",
    "widened",
]


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_DEVICES = ("cpu", "cuda")
_PLAIN = (Tensor, torch.nn.Parameter)


def owned(y: Tensor, shape: Sequence[int]) -> Tensor:
    """y in another shape that needs no copy: no view, which autograd would let nobody write to.

    Args:
        y: made by the caller, who keeps no other reference.
        shape: of as many elements.
    """
    if not torch.compiler.is_compiling() and y.shape == shape and not y._is_view():
        return y
    found: Tensor = _unsafe_view(y, shape)
    return found


_unsafe_view = torch.ops.aten._unsafe_view.default


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Σ over rows of left ⊗ right: [*, out], [*, in] → [out, in]."""
    return left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])


# Autocast ----------------------------------------------------------------------------------------


def register_autocast(library: Any, name: str, casts: int) -> None:
    """What aten does for `linear`: below float64, floating tensors go to the autocast dtype.

    `torch.library.register_autocast` knows one fixed dtype only, not the one the user chose.

    Args:
        library: that defines `rewriter::name`.
        name: of the operation.
        casts: how many of its leading arguments are cast.
    """
    for device in _DEVICES:
        library.impl(name, _casting(name, casts, device), f"Autocast{device.upper()}")


def _casting(name: str, casts: int, device: str) -> Any:
    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):  # as torch.library: no casts below
            return getattr(torch.ops.rewriter, name)(*_cast(args, casts, device))

    return kernel


def _cast(args: Sequence[Any], casts: int, device: str) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype(device)

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype in (dtype, torch.float64):
            return value
        return value.to(dtype) if value.is_floating_point() else value

    return (*map(cast, args[:casts]), *args[casts:])


# Gradients ---------------------------------------------------------------------------------------


def is_transformed(args: Sequence[Any]) -> bool:
    """Whether a transform of `torch.func` is active, or one of these tensors has a tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
    )


def register_gradient(
    library: Any,
    name: str,
    formula: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    run: Callable[..., Any] | None = None,
) -> None:
    """Gradients of an op: `backward` where they are propagated from its outputs, else `formula`'s.

    Args:
        library: that defines `rewriter::name`, without arguments by keyword only.
        name: of the operation.
        formula: the op in plain torch operations, differentiable any number of times.
        setup_context, backward: as of `torch.autograd.Function`; they meet all arguments, also
            those that torch's dispatcher leaves out, as they have their default.
        run: what runs the op on every device: called without going through the dispatcher again,
            which takes as long as a small product, where nobody else would see the call there.
    """
    op = getattr(torch.ops.rewriter, name).default
    defaults = tuple(a.default_value for a in op._schema.arguments)
    below = _below_autograd(op)

    def forward(ctx: Any, *args: Any) -> Any:
        y = below(*args)
        setup_context(ctx, args, y)
        return y

    # a graph shows the op, and with it this backward: it may be traced
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward), "of_op": name}
    function: Any = type(f"Backward_{name}", (torch.autograd.Function,), methods)

    def kernel(*args: Any) -> Any:
        if is_transformed(args):
            return formula(*args)
        if _wants_gradient(args):
            return function.apply(*args, *defaults[len(args) :])
        if run is not None and not _is_watched(args):
            return run(*args)
        return below(*args)

    library.impl(name, kernel, "Autograd")


def _is_watched(args: Sequence[Any]) -> bool:
    """Whether a mode or a class of tensors has a say in what is called below autograd."""
    if torch._C._len_torch_dispatch_stack():
        return True
    return any(isinstance(a, Tensor) and type(a) not in _PLAIN for a in args)


def register_formula(library: Any, name: str, formula: Callable[..., Any]) -> None:
    """All derivatives of an op are those of its formula: of one that computes a gradient, whose
    own gradients are seldom asked for."""
    below = _below_autograd(getattr(torch.ops.rewriter, name).default)

    def kernel(*args: Any) -> Any:
        run = formula if is_transformed(args) or _wants_gradient(args) else below
        return run(*args)

    library.impl(name, kernel, "Autograd")
    register_vmap(library, name, formula)


def register_vmap(library: Any, name: str, formula: Callable[..., Any], casts: int = 0) -> None:
    """`torch.vmap` over an op runs over its formula; `casts` as in `register_autocast`."""

    def kernel(*args: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for device in _DEVICES:  # autocast comes later in the dispatcher's order
                if casts and torch.is_autocast_enabled(device):
                    args = _cast(args, casts, device)
                    stack.enter_context(torch.autocast(device, enabled=False))
            return formula(*args)

    library.impl(name, kernel, "FuncTorchBatched")


def _wants_gradient(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _below_autograd(op: Any) -> Callable[..., Any]:
    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # what torch.library does in the same place
            return op(*args)

    return below


def widened(dtype: torch.dtype) -> torch.dtype:
    """float32, or dtype where that is wider: what kernels compute in."""
    return torch.promote_types(dtype, torch.float32)
