"""`Layer`: a module that a pass installs, and that can be saved without pickle."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rewriter.errors import OptionError

__all__ = ["Layer"]


class Layer(nn.Module):
    """A module that a pass installs, and that can be saved without pickle.

    A subclass takes `device` and `dtype` among its constructor's keyword arguments, keeps every
    other argument as the attribute of its name (JSON values), and every tensor as a parameter or a
    buffer: `type(layer)(**layer.config(), device=…, dtype=…)` builds a layer with the same
    state_dict.
    """

    op: ClassVar[str] = ""
    """The name that printed graphs show, e.g. `low_rank`."""

    packed: ClassVar[Mapping[str, int]] = {}
    """Of each buffer that holds more than one weight an element, how many: of 4-bit weights 2."""

    stands_for_transposed = False
    """Where the layer replaces a bare parameter: whether that was stored [in, out]."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Python code that hands the layer to `F.linear`, `@` or `addmm`, as the weight that it
        was, calls the layer.

        Raises:
            TypeError: the code asks for anything but this layer's own linear map.
        """
        name, named = getattr(func, "__name__", str(func)), dict(kwargs or {})
        x, weight, bias, rows = None, None, None, False
        if name == "linear":
            x, weight, bias = (*args, *[named.pop(k, None) for k in _LINEAR[len(args) :]])[:3]
            rows = True
        elif name in ("matmul", "__matmul__", "mm") and len(args) == 2:
            x, weight = args
        elif name == "addmm" and len(args) == 3:
            bias, x, weight = args
        flipped = isinstance(weight, _Transposed)
        layer = weight.layer if isinstance(weight, _Transposed) else weight
        if named or not isinstance(layer, Layer) or not isinstance(x, Tensor):
            raise TypeError(f"{name} cannot take a {cls.__name__} in the place of a weight here")
        if layer.stands_for_transposed != (flipped if rows else not flipped):
            raise TypeError(f"{name} reads the weight that {type(layer).__name__} stands for askew")
        return _as_called(layer, x, bias)

    @property
    def T(self) -> _Transposed:  # noqa: N802 (the tensor's name)
        return _Transposed(self)

    mT = T  # noqa: N815

    def t(self) -> _Transposed:
        return _Transposed(self)

    def register_bias(self, size: int | None, device: Any = None, dtype: Any = None) -> None:
        """Gives the layer a `bias` [size] without values; None where size is None."""
        bias = None if size is None else torch.empty(size, device=device, dtype=dtype)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def config(self) -> Mapping[str, Any]:
        """The constructor's arguments but `device` and `dtype`, each from the attribute of its
        name; `bias` is whether there is one.

        Raises:
            OptionError: the layer keeps an argument under no attribute: override `config` then.
        """
        names = [n for n in inspect.signature(type(self)).parameters if n not in _OF_TENSORS]
        if missing := [n for n in names if not hasattr(self, n)]:
            cls = type(self).__name__
            raise OptionError(
                f"{cls} does not say what it was built with: keep {', '.join(missing)} of its "
                f"constructor as attributes of that name, or write {cls}.config()"
            )
        return {n: self.bias is not None if n == "bias" else getattr(self, n) for n in names}

    def dense_weight(self) -> Tensor:
        """The [out_features, in_features] matrix this layer multiplies by.

        Raises:
            OptionError: the layer is not linear in its input.
        """
        raise OptionError(f"{type(self).__name__} has no dense weight: it is not linear")

    def lr_scales(self) -> Mapping[str, float]:
        """Of each parameter whose learning rate differs from a dense layer's: by which factor; see
        `rewriter.param_groups`."""
        return {}

    def from_dense_gradient(self, gradient: Tensor, square: bool) -> Mapping[str, Tensor]:
        """Averages of gradients of the parameters, given those of the dense weight that they stand
        for; empty where there is no chain rule.

        Args:
            gradient: [out_features, in_features].
            square: they are averages of squares.
        """
        return {}

    def to_dense_gradient(self, gradients: Mapping[str, Tensor], square: bool) -> Tensor | None:
        """The inverse, as far as it goes: of the dense weight; None where there is none."""
        return None

    def kernel(self, tokens: int) -> str:
        """The name of the implementation that runs at this number of rows on this machine."""
        return "torch"

    def held_bytes(self, tokens: int) -> int:
        """Bytes that the layer's kernel keeps beside its parameters and buffers: packed weights."""
        return 0

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config().items())


_LINEAR = ("input", "weight", "bias")
_OF_TENSORS = ("device", "dtype")


class _Transposed:
    """`layer.T` in code that knew a weight: the right-hand side of `x @ weight.T`."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    __torch_function__ = Layer.__torch_function__


def _as_called(layer: Layer, x: Tensor, bias: Tensor | None) -> Tensor:
    own = getattr(layer, "bias", None)
    if own is None and bias is not None:  # made on the fly: it was no part of the layer
        result = layer(x)
        assert isinstance(result, Tensor)
        return result + bias
    if bias is not None and bias is not own:
        raise TypeError(f"{type(layer).__name__} has another bias than the one it is called with")
    if bias is None and own is not None:
        raise TypeError(f"{type(layer).__name__} has a bias, which this call leaves out")
    result = layer(x)
    assert isinstance(result, Tensor)
    return result
