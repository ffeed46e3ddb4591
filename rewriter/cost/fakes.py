"""What ops return on fake tensors: as real kernels lay it out, where PyTorch's fake ones say
something else about memory, and derived once for each op and types of arguments, as models repeat
their layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rewriter.cost.memory import storage_key

__all__ = ["Results", "is_plain", "new_fake"]

aten = torch.ops.aten


class Results:
    """The results of ops on the fake tensors of one mode.

    Args:
        mode: that the tensors are of.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.known: dict[Any, Any] = {}  # (op, types of its arguments) → the types of its results

    def of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an op, laid out and sized as the real kernel's."""
        own = _OWN.get(func)
        if own is not None:
            return own(func, args, kwargs)
        if not _by_types(func):
            return func(*args, **kwargs)
        tensors: list[Tensor] = []
        try:
            key = func, torch.get_default_dtype(), self._type((args, kwargs), tensors)
            types = self.known.get(key)
        except (_Particular, TypeError):  # what has no hash
            return func(*args, **kwargs)
        if types is not None:
            return _map(types, lambda t: t.tensor(self.mode, tensors))
        result = func(*args, **kwargs)
        with suppress(_Particular):
            self.known[key] = self._made(result, tensors)
        return result

    def _type(self, value: Any, tensors: list[Tensor]) -> Any:
        """What of an argument decides about the result; the tensors in it are added to a list."""
        if isinstance(value, Tensor):
            self._check(value)
            tensors.append(value)
            return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device
        if isinstance(value, list | tuple):
            return tuple(self._type(v, tensors) for v in value)
        if isinstance(value, dict):
            return tuple((k, self._type(v, tensors)) for k, v in value.items())
        if not isinstance(value, _CONSTANTS):
            raise _Particular
        return type(value), value

    def _made(self, value: Any, sources: Sequence[Tensor]) -> Any:
        """The types of a result: of new tensors in storages of their own, or of a view."""
        storages = {storage_key(t): i for i, t in reversed([*enumerate(sources)])}
        if isinstance(value, Tensor) and storage_key(value) in storages:
            self._check(value)
            source = storages[storage_key(value)]
            if value is sources[source] or value.dtype != sources[source].dtype:
                raise _Particular
            return _Type(value, source)

        def type_of(tensor: Tensor) -> _Type:
            self._check(tensor)
            if (key := storage_key(tensor)) in storages or not _fills(tensor):
                raise _Particular
            storages[key] = -1
            return _Type(tensor)

        return _map(value, type_of)

    def _check(self, tensor: Tensor) -> None:
        """Leaves out what has more to it than its type: open sizes, a known value, and tensors
        without dimensions, which may stand for numbers."""
        if (
            type(tensor) is not FakeTensor
            or tensor.fake_mode is not self.mode
            or tensor._has_symbolic_sizes_strides
            or tensor.layout is not torch.strided
            or tensor.constant is not None
            or tensor.dtype.is_complex
            or not tensor.dim()
        ):
            raise _Particular


_CONSTANTS = (
    int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


class _Particular(Exception):
    """An op is run each time: what it returns may depend on more than types."""


class _Type:
    """Of a new tensor; or of a view, with the place of the argument whose memory it shares."""

    def __init__(self, tensor: Tensor, source: int | None = None) -> None:
        self.form = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        self.offset, self.source = int(tensor.storage_offset()), source

    def tensor(self, mode: FakeTensorMode, given: Sequence[Tensor]) -> Tensor:
        """A fake of this type, where `given` are the arguments."""
        if self.source is None:
            return new_fake(mode, *self.form)
        shape, stride, dtype, device = self.form
        storage = given[self.source].untyped_storage()
        with torch._C._DisableTorchDispatch():
            held = torch.empty(0, dtype=dtype, device="meta")
            held.set_(storage, self.offset, shape, stride)
            return FakeTensor(mode, held, device)


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """A nest with another value in the place of each tensor or type of one."""
    if isinstance(value, Tensor | _Type):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(_map(v, function) for v in value)
    if isinstance(value, int | float | None):
        return value
    raise _Particular


def _fills(tensor: Tensor) -> bool:
    """Whether a storage holds this tensor and no more."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    count = last + 1 if tensor.numel() else 0
    held = tensor.untyped_storage().nbytes()
    return not tensor.storage_offset() and held == count * tensor.element_size()


@cache
def _by_types(func: Any) -> bool:
    """Whether an op is PyTorch's own, writes nothing, and gives what the types of its arguments
    tell."""
    if not isinstance(func, OpOverload) or func.namespace not in ("aten", "prims"):
        return False
    by_data = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return not func._schema.is_mutable and by_data.isdisjoint(func.tags)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's type is all that its fake has to show of it."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.dtype.is_complex)
        and _fills(tensor)
    )


def new_fake(
    mode: FakeTensorMode,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A fake tensor in a new storage; without PyTorch's dispatcher, which takes five times as
    long."""
    with torch._C._DisableTorchDispatch():
        held = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(mode, held, device)


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
