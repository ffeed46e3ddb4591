"""A 1×1 convolution as what it is: a linear layer over channels, at every position.

`Channels` says where the channels lie, `Pointwise` is the convolution around any such layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from rewriter.modules.computed import computed

__all__ = ["Channels", "Pointwise", "inner"]

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Channels:
    """How a 1×1 convolution reads its input [*, channels, d₁ … dₙ].

    Args:
        spatial: n, the number of dimensions behind the channels.
        stride: of each of them: every so many-th position is read.
        last: the weight's memory is channels last, and so is then the result's.
    """

    spatial: int
    stride: tuple[int, ...]
    last: bool = False

    @classmethod
    def of(
        cls, weight: Tensor, stride: Any, padding: Any, groups: Any, transposed: bool = False
    ) -> Channels | None:
        """How a convolution with these options reads its input; None where it is more than a
        linear layer over channels: positions are mixed, added or left between, channels grouped."""
        spatial = weight.dim() - 2
        if spatial not in _CONVS or any(n != 1 for n in weight.shape[2:]):
            return None
        stride, padding = _each(stride, spatial), _each(padding, spatial)
        if transposed or groups != 1 or any(p not in (0, "same", "valid") for p in padding):
            return None
        if not all(isinstance(s, int) for s in stride):
            return None
        return cls(spatial, stride, _layout(weight) is not torch.contiguous_format)

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Channels | None:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        if data is None:
            return None
        spatial, stride = data["spatial"], tuple(data["stride"])
        if spatial not in _CONVS or len(stride) != spatial:
            raise ValueError(f"no 1×1 convolution has {spatial} dimensions and stride {stride}")
        if not all(type(s) is int and s > 0 for s in stride):
            raise TypeError(f"the stride of a 1×1 convolution is {stride}")
        return cls(spatial, stride, bool(data["last"]))

    def to_json(self) -> dict[str, Any]:
        return {"spatial": self.spatial, "stride": list(self.stride), "last": self.last}

    def rows(self, x: Tensor) -> Tensor:
        """[*, channels, d₁ … dₙ] → [*, d₁ … dₙ, channels], a view."""
        for dim, step in enumerate(self.stride, -self.spatial):
            if step != 1:
                x = _every(x, dim, step)
        return x.movedim(-1 - self.spatial, -1)

    def back(self, y: Tensor, like: Tensor) -> Tensor:
        """[*, d₁ … dₙ, channels] → [*, channels, d₁ … dₙ], in memory as the convolution of `like`
        would have left it."""
        y, layout = y.movedim(-1, -1 - self.spatial), torch.contiguous_format
        batched = like.dim() == self.spatial + 2
        if self.spatial > 1:
            layout = _layout(like) if batched else layout
            if self.last and layout is torch.contiguous_format:
                layout = torch.channels_last if self.spatial == 2 else torch.channels_last_3d
        if layout is torch.contiguous_format:  # a copy, since strides of sizes of 1 say layouts too
            return y.clone(memory_format=layout)
        if not batched:
            return y[None].contiguous(memory_format=layout)[0]
        return y.contiguous(memory_format=layout)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution itself, with a weight [out, in]."""
        weight = weight.reshape(*weight.shape[:2], *[1] * self.spatial)
        return _CONVS[self.spatial](x, weight, bias, self.stride)

    def __str__(self) -> str:
        """`1×1`, with a stride `1×1 / 2`."""
        size = "×".join("1" * self.spatial) if self.spatial > 1 else "kernel 1"
        strides = set(self.stride)
        step = "×".join(map(str, self.stride if len(strides) > 1 else sorted(strides)))
        return size if strides == {1} else f"{size} / {step}"


class Pointwise(nn.Module):
    """y[n, :, p] = linear(x[n, :, stride·p]): a layer over rows in the place of a 1×1 convolution.

    Args:
        linear: from [*, in_features] to [*, out_features].
        channels: how the convolution reads its input.

    Shapes:
        input [N, in_features, d₁ … dₙ] or without N; output likewise, in the memory format that
        the convolution would have chosen.
    """

    def __init__(self, linear: nn.Module, channels: Channels) -> None:
        super().__init__()
        self.linear, self.channels = linear, channels

    # What Python code asks a convolution for, to pad its input by hand, say

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return (1,) * self.channels.spatial

    @property
    def stride(self) -> tuple[int, ...]:
        return self.channels.stride

    @property
    def dilation(self) -> tuple[int, ...]:
        return (1,) * self.channels.spatial

    @property
    def padding(self) -> tuple[int, ...]:
        return (0,) * self.channels.spatial

    @property
    def in_channels(self) -> int:
        return int(self._linear.in_features)

    @property
    def out_channels(self) -> int:
        return int(self._linear.out_features)

    @property
    def weight(self) -> Tensor:
        """[out, in, 1, …] of the layer's own weight; a write to it is one to that."""
        weight: Tensor = self._linear.weight
        shaped = weight.reshape(*weight.shape, *self.kernel_size)
        return computed(shaped, self._write) if isinstance(weight, nn.Parameter) else shaped

    def _write(self, weight: Tensor) -> Tensor:
        self._linear.weight.data = weight.flatten(1)
        return weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module; "weight" and "bias" are those of the layer."""
        if name == "weight" and param is not None:
            self._linear.weight = nn.Parameter(param.detach().flatten(1), param.requires_grad)
        elif name == "bias":
            self._linear.bias = param
        else:
            super().register_parameter(name, param)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self._linear.bias
        return bias

    @property
    def _linear(self) -> Any:
        return self.linear

    groups, padding_mode, transposed = 1, "zeros", False

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution by another weight: what adapters call, as of torch's convolutions."""
        return self.channels.convolve(input, weight, bias)

    def forward(self, input: Tensor) -> Tensor:
        if not 0 <= input.dim() - self.channels.spatial - 1 <= 1:
            dims = self.channels.spatial + 1
            raise RuntimeError(
                f"a 1×1 convolution takes {dims} or {dims + 1} dimensions, not {input.dim()}"
            )
        return self.channels.back(self.linear(self.channels.rows(input)), input)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Python code that hands the layer to `F.conv2d`, as the weight that it was, calls it.

        Raises:
            TypeError: the code asks for anything but this layer's own convolution.
        """
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        layer, name = given.get("weight"), getattr(func, "__name__", str(func))
        if not isinstance(layer, Pointwise) or name != f"conv{layer.channels.spatial}d":
            raise TypeError(f"{name} cannot take a {cls.__name__} in the place of a weight")
        own, spatial = layer.channels, layer.channels.spatial
        like = torch.empty([1, 1, *[1] * spatial], device="meta")
        options = given.get("stride", 1), given.get("padding", 0), given.get("groups", 1)
        asked = Channels.of(like, *options)
        if asked is None or asked.stride != own.stride:
            raise TypeError(f"{name} reads its input in another way than the layer in its place")
        if given.get("bias") is not getattr(layer.linear, "bias", None):
            raise TypeError(f"{name} is called with another bias than the layer in its place has")
        result = layer(given["input"])
        assert isinstance(result, Tensor)
        return result

    def extra_repr(self) -> str:
        return str(self.channels)


def inner(module: nn.Module) -> nn.Module:
    """The layer that computes the linear map at a place: that inside of a `Pointwise`."""
    return module.linear if isinstance(module, Pointwise) else module


def _every(x: Tensor, dim: int, step: int) -> Tensor:
    """Every `step`-th position along a dimension, a view."""
    where: list[slice] = [slice(None)] * x.dim()
    where[dim] = slice(None, None, step)
    return x[tuple(where)]


def _each(option: Any, spatial: int) -> tuple[Any, ...]:
    """One value for each dimension, as convolutions take a number for all."""
    given: tuple[Any, ...] = (option,) if isinstance(option, str | int) else tuple(option)
    return given * spatial if len(given) == 1 else given


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format that a convolution sees in a tensor; contiguous where it knows no other."""
    found: torch.memory_format = suggest_memory_format(x)
    return found
