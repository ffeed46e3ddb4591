"""z = R x, the entries of x by other axes, and W R⁻¹, which undoes it: (W R⁻¹)(R x) = W x.

R is a basis of 8-bit numbers, levels[i, j]·scale[i], near an orthogonal one, so that z has the size
of x. Reading it takes an eighth to a quarter of the bytes of floats, and nothing is rounded that
W R⁻¹ does not make up for.

Layers that read one value (gate and up of an MLP; q, k and v) have one basis, and each is called by
itself. So on a CPU, where no gradient is wanted, z stays as long as x does, and the next of them
takes it. Compilers see the product in each layer, of the same tensors;
`rewriter.lowering.joining` has it made once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from rewriter.kernels.int8_linear import dequantize_weight, quantize_weight
from rewriter.kernels.weight_only import int8_weight_linear

__all__ = ["basis", "fold", "matrix", "rotated", "unrotated"]

_MADE = WeakTensorKeyDictionary()


def basis(axes: Tensor) -> tuple[Tensor, Tensor]:
    """(levels [n, n] int8, scale [n] float32) of the R nearest to axes.

    Args:
        axes: [n, n], orthogonal, an axis a row.
    """
    return quantize_weight(axes.float())


def unrotated(width: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """The basis of the entries themselves."""
    levels = torch.eye(width, dtype=torch.int8, device=device)
    return levels, torch.ones(width, device=device)


def matrix(levels: Tensor, scale: Tensor) -> Tensor:
    """R [n, n] float64."""
    return dequantize_weight(levels, scale.double())


def rotated(
    x: Tensor, levels: Tensor | None, scale: Tensor | None, reader: object = None
) -> Tensor:
    """z = R x of each row; x itself without a basis.

    Args:
        x: [*, n].
        levels, scale: of `basis`, or None.
        reader: who asks; z may be what another one who asked had made. None: it is made.

    Returns:
        [*, n] in x's dtype; the product is made in float32 or wider.
    """
    if levels is None or scale is None:
        return x
    if reader is None or not _stays(x, levels, scale):
        return int8_weight_linear(x, levels, scale)
    axes = (levels.data_ptr(), levels._version, scale.data_ptr(), scale._version)
    made: _Made | None = _MADE.get(x)  # type: ignore[no-untyped-call,unused-ignore]
    if made is None or not made.serves(x, axes, reader):
        z = int8_weight_linear(x, levels, scale)
        made = _MADE[x] = _Made(x.clone(), axes, (levels, scale), z, set())
    made.readers.add(id(reader))
    return made.z


class _Made(NamedTuple):
    """z of an x, as that was then: not every write counts as another version of a tensor.

    Args:
        x: a copy.
        axes: where the basis lies in memory, and its versions.
        basis: itself: nothing else will lie there.
        z: R x.
        readers: who had z. Who asks again is in another call of the model.
    """

    x: Tensor
    axes: tuple[int, ...]
    basis: tuple[Tensor, Tensor]
    z: Tensor
    readers: set[int]

    def serves(self, x: Tensor, axes: tuple[int, ...], reader: object) -> bool:
        return axes == self.axes and id(reader) not in self.readers and torch.equal(x, self.x)


def fold(weight: Tensor, levels: Tensor, scale: Tensor) -> nn.Parameter:
    """W R⁻¹: a new Parameter, as frozen as the weight.

    Args:
        weight: W [out, n].
        levels, scale: of `basis`.
    """
    own = weight.detach()
    made = torch.linalg.solve(matrix(levels, scale), own.double(), left=False)
    return nn.Parameter(made.to(own.dtype), requires_grad=weight.requires_grad)


def _stays(*tensors: Tensor) -> bool:
    """Whether z may be kept: nothing but the arithmetic happens to what it is made of."""
    return (
        not torch.compiler.is_compiling()
        and all(type(t) in (Tensor, nn.Parameter) and t.is_cpu for t in tensors)
        and not any(t.is_inference() for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )
