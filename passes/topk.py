"""`TopK`: per token, only the k largest activations reach the linear layer behind them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.base import Layer, Pass, Phase, Replacement, Skip, StoredLinear, unusable
from rewriter.errors import OptionError, of_type, one_of, whole_number
from rewriter.kernels.sparse import (
    Select,
    active_reference,
    held_bytes,
    importance_of,
    kernel_name,
    straight_through,
)
from rewriter.kernels.sparse_entries import THEN, kept_entries
from rewriter.kernels.topk import topk_linear
from rewriter.sites import ACTIVATION, LINEAR, MLP, Kind, Site

__all__ = ["BLOCKS", "SCORES", "Score", "TopK", "TopKActivation", "TopKLinear"]


class TopKLinear(StoredLinear):
    """y = topk_k(h) Wᵀ + bias, where topk_k keeps the k entries of largest score in each row.

    The score is |h|, times an importance where the layer has one. Exactly k entries are kept (ties
    go to the lower index), and the gradient is that of this function: zero for the entries that
    were dropped. With few rows only the weights of kept entries are read.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        k: kept entries a row.
        bias: whether there is an additive bias.
        weighted: whether there is an importance.
        block: as many neighbours are kept together, by the largest score among them.
        straight_through: in training dropped entries have the gradient of a dense layer too.
        device, dtype: of the parameters.

    Shapes:
        input [*, in_features], output [*, out_features]; weight [out_features, in_features];
        bias [out_features]; importance, a buffer, [in_features] float32.

    Raises:
        OptionError: k is not an int from 1 to in_features, or block divides not both.
    """

    op: ClassVar[str] = "topk_linear"
    keeps_dtype: ClassVar[tuple[str, ...]] = ("importance",)
    importance: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        k: int,
        *,
        bias: bool = True,
        weighted: bool = False,
        block: int = 1,
        straight_through: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        _check("TopKLinear", in_features, k, block)
        self.k = k
        self.weighted, self.block, self.straight_through = weighted, block, straight_through
        self.register_buffer(
            "importance",
            torch.empty(in_features, device=device, dtype=torch.float32) if weighted else None,
        )
        self.reset_parameters()

    @classmethod
    def from_weights(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        k: int,
        *,
        importance: Tensor | None = None,
        block: int = 1,
        straight_through: bool = False,
    ) -> TopKLinear:
        """The layer around a [out, in] weight; tensors that are Parameters stay the same."""
        out_features, in_features = weight.shape
        layer = cls(
            in_features,
            out_features,
            k,
            bias=bias is not None,
            weighted=importance is not None,
            block=block,
            straight_through=straight_through,
            device="meta",
        )
        layer.importance = importance
        return layer.around(weight, bias)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As pickle calls it; layers up to version 0.5.0 have magnitudes and no blocks."""
        super().__setstate__(state)
        for name, value in {"weighted": False, "block": 1, "straight_through": False}.items():
            vars(self).setdefault(name, value)
        self._buffers.setdefault("importance", None)

    @property
    def summed(self) -> int:
        return self.k

    def reset_parameters(self) -> None:
        """Draws all parameters anew: uniform within ±1/√k; the importance follows the weight."""
        super().reset_parameters()
        if self.importance is not None:
            self.importance = importance_of(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        if self.straight_through and self.training:
            return F.linear(straight_through(input, self.kept(input)), self.weight, self.bias)
        return topk_linear(input, self.weight, self.bias, self.k, self.importance, self.block)

    def kept(self, input: Tensor) -> Tensor:
        """Which entries of an input [*, in_features] are kept, bool."""
        return active_reference(input, Select(self.k, 0.0, self.importance, self.block))

    def kernel(self, tokens: int) -> str:
        return kernel_name(self.weight, tokens, self.k / self.in_features)

    def held_bytes(self, tokens: int) -> int:
        return held_bytes(self.weight, tokens)


class TopKActivation(Layer):
    """y = topk_k(act(x)): of each row of an activation the k entries of largest score, else zero.

    The score is |act(x)|·importance. Exactly k entries are kept
    (ties go to the lower index), and the gradient is that of this function.

    Args:
        activation: "relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish", "tanh", "sigmoid".
        width: size of the last dimension of input and output.
        k: kept entries a row.
        block: as many neighbours are kept together, by the largest score among them.
        straight_through: in training dropped entries have the gradient of the activation too.
        device: of the importance.
        dtype: of no meaning, as there are no parameters.

    Shapes:
        input and output [*, width]; importance, a buffer, [width] float32.

    Raises:
        OptionError: a row has another size; there is no such activation, k is not an int from 1 to
            width, or block divides not both.
    """

    op: ClassVar[str] = "topk_activation"
    acts: ClassVar[bool] = True
    keeps_dtype: ClassVar[tuple[str, ...]] = ("importance",)
    importance: Tensor

    def __init__(
        self,
        activation: str,
        width: int,
        k: int,
        *,
        block: int = 1,
        straight_through: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("TopKActivation: activation", activation, ACTIVATIONS)
        _check("TopKActivation", width, k, block)
        self.activation, self.width, self.k = activation, width, k
        self.block, self.straight_through = block, straight_through
        # of ones for magnitudes: the store builds no layer wider than what is saved of it
        self.register_buffer("importance", torch.ones(width, device=device))

    @property
    def in_features(self) -> int:
        return self.width

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1] != self.width:
            raise OptionError(
                f"TopKActivation: a row of {input.shape[-1]} entries, where k={self.k} of "
                f"{self.width} are kept: it needs whole rows (tensor parallel cuts them)"
            )
        entries = ACTIVATIONS[self.activation](input)
        if self.straight_through and self.training:
            return straight_through(entries, self.kept(entries))
        return kept_entries(entries, importance=self.importance, k=self.k, block=self.block)

    def kept(self, entries: Tensor) -> Tensor:
        """Which entries of what the activation gives, [*, width], are kept, bool."""
        return active_reference(entries, Select(self.k, 0.0, self.importance, self.block))


def _check(who: str, width: int, k: int, block: int) -> None:
    whole_number(f"{who}: k", k, most=width)
    whole_number(f"{who}: block", block)
    if k % block or width % block:
        raise OptionError(f"{who}: block={block} must divide k={k} and {width}")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **THEN,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
Score = Literal["magnitude", "wina"]
SCORES = ("magnitude", "wina")
BLOCKS = (1, 8, 16, 32)
_NAMED = ", ".join(ACTIVATIONS)


@dataclass(frozen=True)
class TopK(Pass):
    """down(h) becomes down(topk_k(h)): per token the k entries of largest score, the rest zero.

    h is what enters an MLP's down projection: act(up(x)), or act(gate(x)) ∘ up(x) in a gated MLP.
    Weight and bias stay the very Parameters they were. The error depends on the activations, so
    the replacement states none. With up to 16 tokens only the weights of kept entries
    are read, of a copy of the weight by columns that is kept beside it.

    At activations, act(x) becomes topk_k(act(x)), wherever linear layers alone read it, multiplied
    by other values at most: behind a norm, in front of several layers, or in a gated MLP (by
    act(gate(x)) alone). The products behind it stay as they are; a `Threshold` that follows reads
    no weights of the zeros.

    Args:
        k: an int ≥ 1 is a count; a float in (0, 1] is a fraction of the hidden width. Both are
            rounded up to whole blocks.
        score: "magnitude": |h|; "wina": |h[i]|·‖W[:, i]‖, what the entry adds to the output at
            most. The norms are those of the weight when it was rewritten.
        block: as many neighbours are kept or dropped together, by the largest score among them: 1,
            8, 16 or 32.
        straight_through: in training dropped entries have the gradient of a dense layer, too.
        at: "mlp": the down projections of MLPs; "activations".
        where: which sites; a name pattern, a predicate, or None for all.

    Skips an MLP whose down projection an earlier pass rewrote, whose hidden width is no larger
    than k or not divided by the block, or whose weights hold NaN or inf or are not real floating
    point numbers of 16 bits or more. Skips an activation that is none of ReLU, ReLU6, GELU, SiLU,
    Hardswish, tanh and sigmoid; whose output anything else reads than linear layers of its width;
    and with "wina" one before a layer that was rewritten.

    Raises:
        OptionError: k is neither, or another option is impossible.

    Source: magnitude sparsity per token, as in CATS (Lee et al. 2024) and TEAL (Liu et al. 2024),
    with a count in place of their thresholds; "wina": Chen et al. 2025, "WINA: Weight Informed
    Neuron Activation for Accelerating Large Language Model Inference".
    """

    matches: ClassVar[tuple[Kind, ...]] = (MLP, ACTIVATION)
    phase: ClassVar[Phase] = Phase.SPARSITY

    k: int | float
    score: Score = "magnitude"
    block: int = 1
    straight_through: bool = False
    at: Literal["mlp", "activations"] = "mlp"

    def __post_init__(self) -> None:
        k: object = self.k
        count = isinstance(k, int) and not isinstance(k, bool) and k >= 1
        fraction = isinstance(k, float) and 0 < k <= 1
        if not count and not fraction:
            raise OptionError(
                f"TopK: k={k!r} must be an int >= 1 (how many) or a float in (0, 1] (a fraction)"
            )
        one_of("TopK: score", self.score, SCORES)
        one_of("TopK: block", self.block, BLOCKS)
        of_type("TopK", "straight_through", self.straight_through, bool, "True or False")
        one_of("TopK: at", self.at, ("mlp", "activations"))

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return (MLP,) if self.at == "mlp" else (ACTIVATION,)

    def count(self, width: int) -> int:
        """How many of `width` activations are kept."""
        if isinstance(self.k, int):
            k = self.k
        else:
            # By the decimal that the user wrote: in binary, 0.07 of 100 would round up to 8.
            k = math.ceil(Fraction(repr(float(self.k))) * width)
        return -(-k // self.block) * self.block

    def propose(self, site: Site) -> Replacement | Skip:
        return self._down(site) if site.kind == MLP else self._activation(site)

    def _activation(self, site: Site) -> Replacement | Skip:
        activation = site.activation
        if activation not in ACTIVATIONS:
            return Skip("a {} with its options is none of {}", site.operation, _NAMED)
        if not site.readers:
            return Skip("what it gives is not read by linear layers alone")
        width = site.readers[0].in_features
        values = [n.meta["val"] for n in site.nodes if "val" in n.meta]
        sizes = {value.shape[-1:] for value in values}
        if not sizes:
            return Skip("the width of what it gives is not known: pass example_inputs")
        if other := next((s for s in site.readers if s.in_features != width), None):
            return Skip(
                "{} reads {} entries, another layer {}", other.fqn, other.in_features, width
            )
        if sizes != {(width,)}:
            return Skip(
                "its rows have {} entries, and {} reads {}",
                next(s[0] if s else 0 for s in sizes if s != (width,)),
                site.readers[0].fqn,
                width,
            )
        if skip := self._impossible(width):
            return skip
        importance = None
        if self.score == "wina":
            if rewritten := next((s.fqn for s in site.readers if s.kind != LINEAR), None):
                return Skip('{} was rewritten before: score="magnitude" asks no weight', rewritten)
            # ‖W[:, i]‖ of all its readers, one below the other
            norms = torch.stack([importance_of(s.weight) for s in site.readers])
            importance = torch.linalg.vector_norm(norms, dim=0)
        layer = TopKActivation(
            activation,
            width,
            self.count(width),
            block=self.block,
            straight_through=self.straight_through,
            device=values[0].device,
        )
        if importance is not None:
            layer.importance = importance
        return Replacement(layer, error=None, note=f"keeps {layer.k} of {width} entries a token")

    def _impossible(self, width: int) -> Skip | None:
        """Why nothing can be chosen among so many entries; None where it can."""
        k = self.count(width)
        if k >= width:
            return Skip("k={} keeps all {} activations", k, width)
        if width % self.block:
            return Skip("block={} does not divide its {} activations", self.block, width)
        return None

    def _down(self, site: Site) -> Replacement | Skip:
        down = site.parts["down"]
        if down.kind != LINEAR:
            kind = down.kind if isinstance(down.kind, str) else down.kind.__name__
            return Skip(
                "the down projection {} is a {}, and TopK wraps a plain linear: leave it out of "
                "the earlier pass with where=",
                down.fqn,
                kind,
            )
        weight, bias = site.weight, site.bias
        if refused := unusable(weight, bias):
            return refused
        if skip := self._impossible(site.in_features):
            return skip
        k = self.count(site.in_features)
        if not isinstance(weight, nn.Parameter):  # a view: it gets storage of its own
            weight = weight.clone(memory_format=torch.contiguous_format)
        layer = TopKLinear.from_weights(
            weight,
            bias,
            k,
            importance=importance_of(weight) if self.score == "wina" else None,
            block=self.block,
            straight_through=self.straight_through,
        )
        return Replacement(
            layer,
            error=None,
            note=f"keeps {k} of {site.in_features} activations a token; the weight is unchanged",
        )
