"""What kernels really return, where PyTorch's fake ones say something else about memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["fake_result"]

aten = torch.ops.aten


def fake_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an op on fake tensors, laid out and sized as the real kernel's."""
    own = _OWN.get(func)
    return func(*args, **kwargs) if own is None else own(func, args, kwargs)


def _padded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What `F.pad` makes. Its own kernel would fix the open sizes of a fake tensor."""
    x: Tensor = args[0]
    pad: Sequence[Any] = args[1]
    shape = list(x.shape)
    for i in range(len(pad) // 2):
        shape[-1 - i] = shape[-1 - i] + pad[2 * i] + pad[2 * i + 1]
    return x.new_empty(shape)


def _batch_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result is contiguous or channels-last, not strided as the input is: what comes after may
    have to copy it."""
    first, *rest = func(*args, **kwargs)
    return (_laid_out(first, args[0]), *rest)


def _batch_norm_backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The gradient of the input as `_batch_norm`; what is not asked for is not made."""
    first, *rest = func(*args, **kwargs)
    made = [_laid_out(first, args[1]), *rest]
    return tuple(t if asked else None for t, asked in zip(made, args[9], strict=True))


def _laid_out(result: Tensor, x: Tensor) -> Tensor:
    layout = torch.contiguous_format
    if x.dim() in (4, 5) and not x.is_contiguous():
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        layout = last if x.is_contiguous(memory_format=last) else layout
    return torch.empty_like(result, memory_format=layout)


_PAGE = 4096


def _rnn_layer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """oneDNN keeps what a backward needs in one workspace: the gates [T, B, 4·H] twice, the states
    of layer, iteration and cell [2, T + 1, B, max(in, H)], the hidden states [T, B, H] and the
    gates of one step; in float32, rows padded to 64 bytes and pieces to pages. PyTorch's fake
    kernel says 0 bytes. Of typical sizes exact, else within 1 % (sizes read off torch 2.13)."""
    *states, workspace = func(*args, **kwargs)
    x, hidden = args[0], args[10]
    if not torch.is_grad_enabled():  # then it stays inside the kernel
        return (*states, workspace)
    steps, batch, width = x.shape

    def pages(numbers: Any) -> Any:
        return -(-4 * numbers // _PAGE) * _PAGE

    def row(numbers: int) -> int:
        padded = -(-numbers // 16) * 16
        return padded if padded % 256 else padded + 16

    size = 2 * pages(steps * batch * row(4 * hidden))
    size += 3 * pages(2 * (steps + 1) * batch * row(max(width, hidden)))
    size += pages(steps * batch * hidden) + pages(batch * 4 * hidden)
    return (*states, x.new_empty((size,), dtype=torch.uint8))


def _rnn_layer_backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The gradients of the two biases are two tensors."""
    *first, bias, _, hidden, cell = func(*args, **kwargs)
    return (*first, bias, torch.empty_like(bias), hidden, cell)


_OWN: Mapping[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    aten.constant_pad_nd.default: _padded,
    aten.mkldnn_rnn_layer.default: _rnn_layer,
    aten.mkldnn_rnn_layer_backward.default: _rnn_layer_backward,
    aten.native_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten._batch_norm_with_update.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
}
