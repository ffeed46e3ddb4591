"""A convolution that the user's code calls as a function, shown as the layer that it amounts to.

EfficientNet pads by hand and then calls `F.conv2d(x, self.weight, …)` in a forward of its own: no
`call_module` stands in the graph, but the weight is a layer's, and the rest is literal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.modules.tree import attribute

__all__ = ["CalledConv"]

_CONVS = {
    torch.ops.aten.conv1d.default: 1,
    torch.ops.aten.conv2d.default: 2,
    torch.ops.aten.conv3d.default: 3,
}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class CalledConv:
    """The arguments of one call under the names that `nn.Conv2d` gives them; tensors are read when
    they are asked for.

    Args:
        root: the module tree that the graph lives on.
        weight, bias: dotted names of the tensors; None without a bias.
        options: stride, padding, dilation, groups.
    """

    transposed = False
    padding_mode = "zeros"

    def __init__(self, root: nn.Module, weight: str, bias: str | None, options: list[Any]) -> None:
        self.root, self.names = root, (weight, bias)
        self.stride, self.padding, self.dilation, self.groups = options

    @classmethod
    def of(cls, node: fx.Node, root: nn.Module) -> CalledConv | None:
        """The call of a node; None where it is none, or its weight is not a layer's own."""
        dims = _CONVS.get(node.target)  # type: ignore[call-overload]
        if dims is None:
            return None
        given: dict[str, Any] = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        tensors = [given.get("weight"), given.get("bias")]
        names = [
            str(t.target) if isinstance(t, fx.Node) and t.op == "get_attr" else None
            for t in tensors
        ]
        own = [n for n in names if n is not None]
        if names[0] is None or (tensors[1] is not None and names[1] is None):
            return None
        if len({n.rpartition(".")[0] for n in own} - {""}) != 1:
            return None  # tensors of two modules, or of the root itself
        options = [given.get(n, d) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1))]
        sizes = [[v] * dims if isinstance(v, int) else [*v] * (dims // len(v)) for v in options]
        return cls(root, names[0], names[1], [*sizes, given.get("groups", 1)])

    @property
    def owner(self) -> str:
        """The name of the module whose weight it is."""
        return str(self.names[0]).rpartition(".")[0]

    @property
    def weight(self) -> Tensor:
        found: Tensor = attribute(self.root, str(self.names[0]))
        return found

    @property
    def bias(self) -> Tensor | None:
        return None if self.names[1] is None else attribute(self.root, self.names[1])

    def parameters(self) -> Iterator[Tensor]:
        yield from (t for t in (self.weight, self.bias) if t is not None)

    def buffers(self) -> Iterator[Tensor]:
        yield from ()

    def modules(self) -> Iterator[nn.Module]:
        """None: what is around the call, hooks too, is in the graph already."""
        yield from ()
