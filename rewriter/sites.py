"""Sites: the places in a graph that a pass may look at, and the one table of their spellings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.fx import Node

from rewriter.base import Layer

__all__ = ["ACTIVATION", "CONV", "LINEAR", "MLP", "Kind", "Site"]

LINEAR = "linear"
CONV = "conv"
ACTIVATION = "activation"
MLP = "mlp"

Kind = str | type[Layer]
"""One of the four names above, or the class of a layer of ours."""


@dataclass(frozen=True, eq=False)
class Site:
    """One place in the model that computes `kind`, however many graphs or calls share it.

    Nothing is cached: every property is read from the module tree when it is asked for.

    Args:
        kind: LINEAR, CONV, ACTIVATION, MLP, or the class of one of our layers.
        fqn: the module's dotted name; for a functional call, the name of its weight.
        root: the module tree.
        nodes: the calls, over all graphs.
        weight_ref, bias_ref: dotted names of the tensors (LINEAR).
        transposed: the weight is stored [in, out] (transformers' Conv1D, `x @ W`).
        parts: the sites an MLP is made of: `up`, `down`, and where they exist `gate` and
            `activation`. The MLP's own tensors are those of `down`.
    """

    kind: Kind
    fqn: str
    root: nn.Module
    nodes: tuple[Node, ...] = ()
    weight_ref: str | None = None
    bias_ref: str | None = None
    transposed: bool = False
    parts: Mapping[str, Site] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, fqn: str = "layer", kind: Kind | None = None) -> Site:
        """A site around one free-standing module; for tests and for trying a pass by hand."""
        root = nn.Module()
        root.add_module(fqn, module)
        if kind is None:
            kind = type(module) if isinstance(module, Layer) else LINEAR
        named = dict(module.named_parameters(recurse=False))
        return cls(
            kind,
            fqn,
            root,
            weight_ref=f"{fqn}.weight" if "weight" in named else None,
            bias_ref=f"{fqn}.bias" if "bias" in named else None,
        )

    @property
    def module(self) -> nn.Module | None:
        """The module at the site; None where the user's code calls a function."""
        try:
            return self.root.get_submodule(self.fqn)
        except AttributeError:
            return None

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], a view of the stored weight (the Parameter itself where
        it is stored that way round)."""
        if self.weight_ref is None:
            raise AttributeError(f"site {self.fqn!r} ({self.kind}) has no weight")
        weight = _tensor(self.root, self.weight_ref)
        return weight.t() if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """[out_features] or None."""
        return None if self.bias_ref is None else _tensor(self.root, self.bias_ref)

    @property
    def in_features(self) -> int:
        return self._features("in_features", 1)

    @property
    def out_features(self) -> int:
        return self._features("out_features", 0)

    @property
    def tokens(self) -> int | None:
        """Rows the example inputs put through all calls of the site; None without shapes."""
        raise NotImplementedError

    @property
    def where(self) -> str:
        """`file:line` of the user's code that calls the site; "" where unknown."""
        raise NotImplementedError

    def _features(self, name: str, dim: int) -> int:
        if self.weight_ref is not None:
            return self.weight.shape[dim]
        return int(getattr(self.module, name))


def _tensor(root: nn.Module, fqn: str) -> Tensor:
    owner, _, name = fqn.rpartition(".")
    tensor = getattr(root.get_submodule(owner), name)
    assert isinstance(tensor, Tensor), fqn
    return tensor
