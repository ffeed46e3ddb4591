"""`Computed`: a weight that a layer computes when it is asked for it; a write to it is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import OptionError

__all__ = ["computed"]


def computed(weight: Tensor, written: Callable[[Tensor], Tensor]) -> Tensor:
    """`weight`, which was computed just now, such that no write to it is lost.

    Reads, also those of autograd, see an ordinary tensor.

    Args:
        weight: of no one else.
        written: is called with all of the new weight after `w += d`, `w.data = v`,
            `w.data[:2].copy_(v)`, `nn.init.zeros_(w)` and the like; gives the tensor that holds it
            from then on.

    Changing whether it requires a gradient raises an OptionError: that belongs to the parameters
    it is computed from.
    """
    if torch.compiler.is_compiling() or type(weight) is not Tensor:
        return weight  # a tracer's
    if weight.is_inference():  # counts no versions
        with torch.inference_mode(False):
            weight = weight.clone()
    return _alias(weight, weight.detach(), written)


def _alias(tensor: Tensor, whole: Tensor, written: Callable[[Tensor], Tensor]) -> Tensor:
    found = tensor.as_subclass(_Computed)
    found._whole, found._written = whole, written
    return found


class _Computed(Tensor):
    """A computed weight, or a view of one.

    Attributes:
        _whole: all of the weight, in the same memory.
        _written: called with it after a write.
    """

    _whole: Tensor
    _written: Callable[[Tensor], Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        own = [t for t in (*args, *kwargs.values()) if isinstance(t, _Computed)]
        with torch._C.DisableTorchFunctionSubclass():
            if func == _SET_DATA and isinstance(args[0], _Computed):
                _set(args[0], args[1].detach().as_subclass(Tensor))
                return None
            if func in (_SET_GRAD, Tensor.requires_grad_) and isinstance(args[0], _Computed):
                if args[0].requires_grad != (args[1:] or (True,))[0]:
                    raise OptionError(
                        "a computed weight cannot be frozen or made to train: set requires_grad "
                        "of the layer's own parameters"
                    )
                return args[0]
            before = [t._version for t in own]
            result = func(*args, **kwargs)
            for tensor, version in zip(own, before, strict=True):
                if tensor._version != version:
                    held = tensor._written(tensor._whole)
                    if result is tensor and tensor.shape == held.shape:  # w += 1 assigns it
                        return held
            return _aliases(result, own[0]) if own else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self.detach()).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(_plain(self), memo)


def _set(tensor: _Computed, value: Tensor) -> None:
    """`tensor.data = value`; a view, such as the weight of a 1×1 convolution, is a part of it all,
    or has another shape."""
    whole = tensor._whole
    if value.shape == tensor.shape and (tensor.shape, tensor.stride()) != (
        whole.shape,
        whole.stride(),
    ):
        tensor.detach().copy_(value)
        value = whole
    tensor._written(value)


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_SET_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]


def _aliases(result: Any, tensor: _Computed) -> Any:
    """The result, with what is a view of `tensor` as one whose writes are noticed."""
    if type(result) in (tuple, list):
        return type(result)(_aliases(r, tensor) for r in result)
    if type(result) is Tensor and _shares(result, tensor):
        return _alias(result, tensor._whole, tensor._written)
    return result


def _plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def _shares(view: Tensor, tensor: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
