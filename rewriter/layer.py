"""`Layer`: a module that a pass installs, and that can be saved without pickle."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rewriter.errors import OptionError

__all__ = ["ComputedWeight", "Layer"]


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

    def __prepare_scriptable__(self) -> Layer:
        """What `torch.jit.script` asks first.

        Raises:
            OptionError: always.
        """
        raise OptionError(
            f"{type(self).__name__} cannot be scripted, and torch.jit.script is deprecated: use "
            "torch.export.export, torch.compile or torch.jit.trace, or script the model before it "
            "is rewritten"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A parameter under the name of a property is that property's to take or to refuse."""
        own = getattr(type(self), name, None)
        if isinstance(own, property):
            own.__set__(self, param)
        else:
            super().register_parameter(name, param)

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


class ComputedWeight(Layer):
    """A `Layer` whose weight is no tensor that it holds, but `dense_weight()`, made when read."""

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`, for code that reads a linear layer's weight (its dtype, mostly).

        Writing to it, and assigning it, raises OptionError: nothing would hold what is written.
        """
        found = self.dense_weight()
        if torch.compiler.is_compiling():  # a graph reads it, and no more
            return found
        return _Computed.of(found, self._computed_from())

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise OptionError(_LOST.format(self._computed_from()))

    def _computed_from(self) -> str:
        held = [n for n, t in self.state_dict(keep_vars=True).items() if n != "bias"]
        return f"the weight of {type(self).__name__}, which is computed from {', '.join(held)}"


_LOST = (
    "{} when it is read, cannot be written: nothing would hold the change. Change the original "
    "model's weight and rewrite again, or hand its state_dict to load_original of the rewritten "
    "model; rewrite(model, [Densify()]) gives structured layers a weight of their own; freeze the "
    "layer's own parameters. To change a copy, take layer.weight.clone()"
)
_WRITING = {
    *(f"__i{name}__" for name in "add sub mul matmul truediv floordiv mod pow".split()),
    *(f"__i{name}__" for name in "and or xor lshift rshift".split()),
    "__setitem__",
    "__set__",
}


class _Computed(Tensor):
    """What nobody holds: to be read. Writing to it, or to what shares its memory, raises."""

    _source: str

    @classmethod
    def of(cls, tensor: Tensor, source: str) -> _Computed:
        found = tensor.as_subclass(cls)
        found._source = source
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        in_place = name in _WRITING or (name.endswith("_") and not name.endswith("__"))
        for target in (args[0] if in_place and args else None, kwargs.get("out")):
            if isinstance(target, _Computed):
                raise OptionError(_LOST.format(target._source))
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if not args or not isinstance(args[0], _Computed):
            return found
        source = args[0]._source
        aliased = name in ("__get__", "detach")

        def kept(value: Any) -> Any:
            shares = type(value) is Tensor and (aliased or value._is_view())
            return _Computed.of(value, source) if shares else value

        return type(found)(map(kept, found)) if type(found) in (tuple, list) else kept(found)


_LINEAR = ("input", "weight", "bias")
_OF_TENSORS = ("device", "dtype")


class _Transposed:
    """`layer.T` in code that knew a weight: the right-hand side of `x @ weight.T`."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    __torch_function__ = Layer.__torch_function__


def _as_called(layer: Layer, x: Tensor, bias: Tensor | None) -> Tensor:
    own = getattr(layer, "bias", None)
    if bias is not None and bias is not own:
        raise TypeError(f"{type(layer).__name__} has another bias than the one it is called with")
    if bias is None and own is not None:
        raise TypeError(f"{type(layer).__name__} has a bias, which this call leaves out")
    result = layer(x)
    assert isinstance(result, Tensor)
    return result
