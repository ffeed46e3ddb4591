"""`Layer`: a module that a pass installs, and that can be saved without pickle; `LinearLayer`; what
stands in the place of a bare weight."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from rewriter.errors import OptionError, warn
from rewriter.modules.computed import computed
from rewriter.modules.tree import own_class

__all__ = [
    "ComputedWeight",
    "DenseWeight",
    "Layer",
    "LinearLayer",
    "RoundedLinear",
    "RoundedWeight",
    "StandsForWeight",
    "StoredLinear",
    "as_parameter",
    "unscriptable",
]


S = TypeVar("S", bound="StoredLinear")


class StandsForWeight(nn.Module):
    """A layer that may take the place of a bare weight: Python code that hands it to `F.linear`,
    `@` or `addmm`, as the weight that it was, calls it."""

    stands_for_transposed: bool | None = None
    """Where the layer replaces a bare weight: whether that was stored [in, out]; else None."""

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
        if named or not isinstance(layer, StandsForWeight) or not isinstance(x, Tensor):
            raise TypeError(f"{name} cannot take a {cls.__name__} in the place of a weight here")
        if bool(layer.stands_for_transposed) != (flipped if rows else not flipped):
            raise TypeError(f"{name} reads the weight that {type(layer).__name__} stands for askew")
        return _as_called(layer, x, bias)

    @property
    def T(self) -> _Transposed:  # noqa: N802 (the tensor's name)
        return _Transposed(self)

    mT = T  # noqa: N815

    def t(self) -> _Transposed:
        return _Transposed(self)


class Layer(StandsForWeight):
    """A module that a pass installs, and that can be saved without pickle.

    A subclass takes `device` and `dtype` among its constructor's keyword arguments, keeps every
    other argument as the attribute of its name (JSON values), and every tensor as a parameter or a
    buffer: `type(layer)(**layer.config(), device=…, dtype=…)` builds a layer with the same
    state_dict.
    """

    op: ClassVar[str] = ""
    """The name that printed graphs show, e.g. `low_rank`."""

    acts: ClassVar[bool] = False
    """Whether it is an activation: its sites are of that kind, and MLPs are found around it."""

    serves: ClassVar[tuple[str, ...]] = ()
    """Kinds of sites that a layer serves as well where they share the weight that it stands for:
    that in an embedding's place the head that is tied to it."""

    packed: ClassVar[Mapping[str, int]] = {}
    """Of each buffer that holds more than one weight an element, how many: of 4-bit weights 2."""

    keeps_dtype: ClassVar[tuple[str, ...]] = ()
    """Buffers that go along to devices, but stay in their dtype when the module is cast."""

    once_scalars: ClassVar[tuple[str, ...]] = ()
    """Parameters [1] that version 0.1.0 had as scalars: `fully_shard` takes none."""

    @property
    def operation(self) -> str:
        """`op`, or the name of the operation of torch that it is with its options."""
        return self.op

    def __prepare_scriptable__(self) -> Layer:
        """What `torch.jit.script` asks first.

        Raises:
            OptionError: always.
        """
        raise unscriptable(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As of any module, but for `keeps_dtype`."""
        kept = [t for name in self.keeps_dtype if (t := getattr(self, name)) is not None]

        def moved(tensor: Tensor) -> Tensor:
            if all(tensor is not own for own in kept):
                return fn(tensor)
            bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)
            made = fn(bits)  # what stays is the very tensor, which layers may share
            return tensor if made is bits else made.view(tensor.dtype)

        return super()._apply(moved if kept else fn, recurse)  # type: ignore[no-untyped-call]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A parameter under the name of a property is that property's to take or to refuse.

        Raises:
            OptionError: it is a part of a parameter (`ColwiseParallel`, `RowwiseParallel`).
        """
        if hasattr(param, "full_tensor"):
            raise _in_one_piece(self)
        own = getattr(type(self), name, None)
        if isinstance(own, property):
            own.__set__(self, param)
        else:
            super().register_parameter(name, param)

    @property
    def _distribute_module_applied(self) -> _InOnePiece:
        """What `torch.distributed.tensor.distribute_module` asks of a module before it cuts it."""
        return _InOnePiece(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As pickle calls it."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in self.once_scalars:
            parameter = self._parameters.get(name)
            if parameter is not None and not parameter.ndim:
                parameter.data = parameter.data[None]  # the same one: an optimizer may hold it

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self.once_scalars:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and not value.ndim:
                state_dict[prefix + name] = value[None]
        super()._load_from_state_dict(state_dict, prefix, *rest)

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
        names = [n for n in inspect.signature(own_class(self)).parameters if n not in _OF_TENSORS]
        if missing := [n for n in names if not hasattr(self, n)]:
            cls = own_class(self).__name__
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

    def stored_weight(self) -> Tensor:
        """The [out_features, in_features] matrix that the layer keeps; of a layer that is linear
        in its input, what it multiplies by.

        Raises:
            OptionError: it keeps none of this shape.
        """
        return self.dense_weight()

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
        """The name of the implementation that runs at this number of rows on this machine. One that
        says "simulated, slower: …" is in the report's first lines, and in a warning."""
        return "torch"

    def held_bytes(self, tokens: int) -> int:
        """Bytes that the layer's kernel keeps beside its parameters and buffers: packed weights."""
        return 0

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config().items())


class ComputedWeight(Layer):
    """A layer that stands for one of torch's, and computes that one's weight: `dense_weight()`.

    For code that asks, it is a layer of torch's class and reads as one. It cannot hold a weight of
    any other form, so a write to `weight` (what merges an adapter does) turns it into the plain
    layer of what was written, with a warning. A `RoundedWeight` rounds what was written.
    """

    plain: ClassVar[Any]
    """The class of torch's that it stands for."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`: not a parameter, but no write is lost."""
        return computed(self.dense_weight(), self._written)

    @weight.setter
    def weight(self, value: Any) -> None:
        if isinstance(value, Tensor) and self._holds(value):
            return  # the last step of `layer.weight += d`
        raise TypeError(
            f"cannot assign a {type(value).__name__} as the weight of a {type(self).__name__}: an "
            f"nn.Parameter makes it an nn.{self.plain.__name__}"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any layer; the parameter "weight" makes this the plain layer."""
        if name == "weight" and param is not None:
            self._become_dense(param)
        else:
            super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Draws all parameters anew.

        Raises:
            OptionError: the layer does not say how.
        """
        raise OptionError(f"{type(self).__name__} does not say how it is drawn anew")

    def dense_shape(self) -> tuple[int, ...]:
        """Of `dense_weight()`."""
        raise NotImplementedError

    def _holds(self, weight: Tensor) -> bool:
        own = self.dense_weight()
        return weight.dtype == own.dtype and torch.equal(weight, own)

    def _written(self, weight: Tensor) -> Tensor:
        """Takes a weight that was written; gives the tensor that holds it from then on."""
        return ComputedWeight._become_dense(self, weight)  # of a plain layer, since the first step

    def _become_dense(self, weight: Tensor) -> Tensor:
        if not isinstance(self, Layer):  # a write may come in two steps
            with torch.no_grad():
                return self.weight.copy_(weight)
        shape, plain = self.dense_shape(), self.plain
        if weight.shape != shape:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} was written to a {type(self).__name__}, "
                f"whose weight has the shape {shape}"
            )
        own = [p for n, p in self.named_parameters(recurse=False) if n != "bias"]
        held = sum(t.numel() for t in (*own, *self.buffers(recurse=False)))
        sizes = "×".join(map(str, shape))
        warn(
            f"the weight of a {type(self).__name__}, {sizes}, was written to: it is an "
            f"nn.{plain.__name__} now, with {weight.numel()} numbers in place of {held}"
        )
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight.clone(), any(p.requires_grad for p in own))
        for name in set(self.config()) - {*plain.__constants__, "bias"}:
            vars(self).pop(name, None)
        bias = self._parameters.get("bias")
        self._buffers.clear()
        self._parameters.clear()
        bare = self.stands_for_transposed is not None
        self.__class__ = DenseWeight if bare else plain  # type: ignore[assignment]
        self._parameters["weight"] = weight
        if "bias" in inspect.signature(plain).parameters:
            self._parameters["bias"] = bias
        return weight


class RoundedWeight(ComputedWeight):
    """A layer whose buffers are a weight, rounded: `rounded` makes them, of any weight.

    So a write to `weight` is rounded anew, with a warning that says what that loses: adapters are
    merged into layers that stay in their few bits. Rows that were not written to keep their levels,
    and when all that was added is taken away again (what `unmerge` does), those of before come
    back; for that the layer holds them as long as something is added. An `nn.Parameter` that is
    assigned makes it the plain layer.
    """

    levels: ClassVar[tuple[str, ...]] = ("qweight", "scale")
    """The buffers that `rounded` makes: each has a row for a row of the weight."""

    fits: ClassVar[bool] = False
    """Whether `rounded` takes the moments of inputs, to choose levels by."""

    remark: ClassVar[str] = ""
    """What there is to say of a weight that was rounded anew."""

    _before: _Before | None = None

    def rounded(self, weight: Tensor) -> Mapping[str, Tensor | None]:
        """The buffers with which `dense_weight()` is closest to a weight of its shape."""
        raise NotImplementedError

    def hold(self, weight: Tensor) -> None:
        """Registers the buffers closest to a weight."""
        self._keep(self.rounded(weight))

    def _keep(self, levels: Mapping[str, Tensor | None]) -> None:
        for name, tensor in levels.items():
            self.register_buffer(name, tensor)

    def requantize(self, weight: Tensor, **how: Any) -> float:
        """Takes another weight, rounded; see the class.

        Args:
            weight: of the shape of `dense_weight()`, finite.
            how: what `rounded` of this layer takes besides.

        Returns:
            ‖W − Ŵ‖/‖W‖ of what was written.

        Raises:
            OptionError: the weight holds NaN or inf.
        """
        with torch.inference_mode(False), torch.no_grad():
            old = self.dense_weight()
            weight = weight.detach().to(old, copy=True)
            changed = (weight != old).flatten(1).any(1)
            if not changed.any():
                return 0.0
            if not weight.isfinite().all():
                raise OptionError(
                    f"a weight with NaN or inf was written to a {type(self).__name__}, which keeps "
                    "its own: look at the adapters that are merged"
                )
            before = self._before or _Before(self._levels(), old.flatten(1))
            if before.returns(weight.flatten(1) - old.flatten(1)):
                self._before = None
                self._put(before.levels, torch.ones_like(changed))
                return 0.0
            self._before = before
            self._put(self.rounded(weight, **how), changed)
            lost = torch.linalg.vector_norm(self.dense_weight() - weight)
            return float(lost / torch.linalg.vector_norm(weight).clamp_min(_TINY))

    def settle(self) -> None:
        """What was added stays: the levels of before are let go."""
        self._before = None

    def _put(self, made: Mapping[str, Tensor | None], rows: Tensor) -> None:
        for name, held in self._levels().items():
            new = made[name]
            assert new is not None
            with torch.inference_mode(held.is_inference()):
                held[rows] = new[rows].to(held)

    def _levels(self) -> dict[str, Tensor]:
        return {n: b for n, b in self._buffers.items() if n in self.levels and b is not None}

    def _written(self, weight: Tensor) -> Tensor:
        if not isinstance(self, RoundedWeight) or weight.shape != self.dense_shape():
            return ComputedWeight._become_dense(self, weight)
        if (error := self.requantize(weight)) > _UNSEEN:
            cls, sizes = type(self).__name__, "×".join(map(str, weight.shape))
            warn(
                f"the weight of a {cls}, {sizes}, was written to, and rounded to its form: an "
                f"error of {error:.3g} of its norm{self.remark}"
            )
        return self.weight


class _Before:
    """Levels of a layer before something was added to its weight, and what has been, in brief.

    Args:
        levels: its buffers, which are copied.
        weight: [rows, *] of then.
    """

    def __init__(self, levels: Mapping[str, Tensor], weight: Tensor) -> None:
        self.levels: Mapping[str, Tensor | None] = {n: t.clone() for n, t in levels.items()}
        # a few random sums over each row in the place of all that was added
        draw = torch.Generator().manual_seed(0)
        probe = torch.randn(weight.shape[1], _PROBES, generator=draw, dtype=torch.float64)
        self.probe = probe.to(weight.device)
        self.added = weight.new_zeros(len(weight), _PROBES, dtype=torch.float64)
        self.most = 0.0
        self.noise = 4 * torch.finfo(weight.dtype).eps * float(weight.double().norm())

    def returns(self, more: Tensor) -> bool:
        """Whether nothing is left of all that was added, this included, but for rounding."""
        self.added = self.added + more.double() @ self.probe
        size = float(self.added.norm()) / math.sqrt(_PROBES)
        self.most = max(self.most, size)
        return size <= 1e-3 * self.most + self.noise


_PROBES = 4
_UNSEEN = 1e-6
"""Errors up to here are those of float32, as of rows that were multiplied by a number each."""
_TINY = 1e-38


class LinearLayer(ComputedWeight, nn.Linear):
    """y = x Wᵀ + bias with a W that is held in another form: `dense_weight()` computes it.

    It is an `nn.Linear` for code that asks (adapters of PEFT, `resize_token_embeddings`).
    """

    plain = nn.Linear
    bias: nn.Parameter | None  # type: ignore[assignment]

    def dense_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def drawn_weight(self, device: Any = None, dtype: Any = None) -> Tensor:
        """A weight [out_features, in_features] as `nn.Linear` draws it; the layer's bias is drawn,
        too, and first."""
        bound = 1 / math.sqrt(max(self.in_features, 1))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        weight = torch.empty(self.dense_shape(), device=device, dtype=dtype)
        return weight.uniform_(-bound, bound)


class StoredLinear(Layer):
    """A layer around the weight [out_features, in_features] and bias of a linear one, which selects
    what it computes of them.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: whether there is an additive bias.
        device, dtype: of the parameters.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(
            torch.empty((out_features, in_features), device=device, dtype=dtype)
        )
        self.register_bias(out_features if bias else None, device, dtype)

    def around(self: S, weight: Tensor, bias: Tensor | None) -> S:
        """This layer with these tensors; those that are Parameters stay the same."""
        self.weight = as_parameter(weight)
        self.bias = None if bias is None else as_parameter(bias)
        return self

    @property
    def summed(self) -> int:
        """How many inputs of a row are summed."""
        return self.in_features

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, uniform within ±1/√summed, as `nn.Linear` does it."""
        bound = 1 / math.sqrt(max(self.summed, 1))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def stored_weight(self) -> Tensor:
        return self.weight


class RoundedLinear(RoundedWeight, LinearLayer):
    """A linear layer whose buffers are a weight, rounded."""

    @classmethod
    def closest(cls, weight: Tensor, bias: Tensor | None, **options: Any) -> Any:
        """The layer closest to weight [out, in]; a bias that is a Parameter is kept, not copied."""
        layer = cls._empty(weight.shape, bias, **options)
        layer.hold(weight.detach())
        return layer

    @classmethod
    def of_levels(
        cls,
        levels: Mapping[str, Tensor | None],
        sizes: Sequence[int],
        bias: Tensor | None,
        **options: Any,
    ) -> Any:
        """The layer [out, in] of buffers that are made already; of the bias as `closest`."""
        layer = cls._empty(sizes, bias, **options)
        layer._keep(levels)
        return layer

    @classmethod
    def _empty(cls, sizes: Sequence[int], bias: Tensor | None, **options: Any) -> Any:
        made: Any = cls
        out_features, in_features = sizes
        layer = made(in_features, out_features, bias=bias is not None, **options, device="meta")
        layer.bias = None if bias is None else as_parameter(bias)
        return layer


class DenseWeight(StandsForWeight, nn.Linear):
    """The `nn.Linear` in the place of a bare weight; saved as an `nn.Linear`."""


def as_parameter(tensor: Tensor, like: Tensor | None = None) -> nn.Parameter:
    """`tensor` itself where it is a Parameter already, so identity (and the optimizer) is kept;
    else a new Parameter whose `requires_grad` is that of `like` (default: of the tensor)."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    grad = (tensor if like is None else like).requires_grad
    return nn.Parameter(tensor.detach(), requires_grad=grad and tensor.is_floating_point())


def unscriptable(module: nn.Module) -> OptionError:
    """What `torch.jit.script` is told of a layer of ours, or a model with a generated forward."""
    return OptionError(
        f"{type(module).__name__} cannot be scripted, and torch.jit.script is deprecated: use "
        "torch.export.export, torch.compile or torch.jit.trace, or script the model before it is "
        "rewritten"
    )


_LINEAR = ("input", "weight", "bias")
_OF_TENSORS = ("device", "dtype")


class _Transposed:
    """`layer.T` in code that knew a weight: the right-hand side of `x @ weight.T`."""

    def __init__(self, layer: StandsForWeight) -> None:
        self.layer = layer

    __torch_function__ = StandsForWeight.__torch_function__


class _InOnePiece:
    """Stands for "was it cut into parts already?", which only tensor parallel tests: that raises.
    Merely to read it, as `torch.jit.trace` reads all that a module has, is fine."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __bool__(self) -> bool:
        raise _in_one_piece(self.layer)


def _in_one_piece(layer: Layer) -> OptionError:
    return OptionError(
        f"{own_class(layer).__name__} cannot be split as a dense layer is (tensor parallel cuts "
        "the rows or columns of one weight): shard it with fully_shard, or make it dense before, "
        "e.g. by the pass Densify"
    )


def _as_called(layer: StandsForWeight, x: Tensor, bias: Tensor | None) -> Tensor:
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
