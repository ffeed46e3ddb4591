"""The rows of the table: passes, and the small models that they rewrite."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter import Pass, rewrite
from rewriter.passes import (
    QAT,
    Densify,
    Experts,
    Monarch,
    MonarchChain,
    MonarchResidual,
    Quadratic,
    Quantize,
    Reluify,
    RemoveBlocks,
    ResizeMLP,
    SparseGate,
    Threshold,
    TopK,
)


class Refused(Exception):
    """What the table calls refused, by a reason that the library states elsewhere than in an
    error of its own: in its report, or in an error of the client's that the README explains."""


@dataclass(frozen=True)
class Recipe:
    """One column of the table.

    Args:
        name: as the table shows it.
        passes: what `rewrite` is given.
    """

    name: str
    passes: tuple[Pass, ...]

    @property
    def part(self) -> str:
        """The table of the page that it is a column of."""
        last = self.passes[-1]
        if not isinstance(last, Quantize | QAT):
            return "Structure and sparsity"
        return "Eight bits" if last.scheme.startswith("int8") else "Four bits and floats"

    @property
    def dtype(self) -> torch.dtype:
        """In which products are computed, or from which they are rounded once."""
        shorter = any(isinstance(p, Quantize) and p.scheme == "bf16" for p in self.passes)
        return torch.bfloat16 if shorter else torch.float32


RECIPES = (
    Recipe("Monarch", (Monarch(nblocks=4),)),
    Recipe("MonarchChain", (MonarchChain(order=2),)),
    Recipe("MonarchResidual", (MonarchResidual(nblocks=4),)),
    Recipe("Quadratic", (Quadratic(),)),
    Recipe("TopK", (TopK(k=12),)),
    Recipe("TopK, activations", (TopK(k=12, at="activations"),)),
    Recipe("Threshold", (Threshold(0.5, inputs="all"),)),
    Recipe("Threshold, rotated", (Threshold(0.5, inputs="all", rotate=True),)),
    Recipe("Reluify", (Reluify("fatrelu", 0.1),)),
    Recipe("SparseGate", (SparseGate(k=12),)),
    Recipe("Experts", (Experts(count=4, active=2),)),
    Recipe("RemoveBlocks", (RemoveBlocks(where="*layer*.1"),)),
    Recipe("ResizeMLP", (ResizeMLP(keep=0.5),)),
    Recipe("Monarch, Densify", (Monarch(nblocks=4), Densify())),
    Recipe("int8-dynamic", (Quantize("int8-dynamic"),)),
    Recipe("int8-dynamic, embeddings", (Quantize("int8-dynamic", embeddings=True),)),
    Recipe("int8-dynamic, convolutions", (Quantize("int8-dynamic", convolutions=True),)),
    Recipe("Monarch, int8-dynamic", (Monarch(nblocks=4), Quantize("int8-dynamic"))),
    Recipe("int8-static", (Quantize("int8-static"),)),
    Recipe("int8-weight", (Quantize("int8-weight"),)),
    Recipe("QAT, int8-dynamic", (QAT("int8-dynamic"),)),
    Recipe("QAT, convolutions", (QAT("int8-dynamic", convolutions=True),)),
    Recipe("int4-weight", (Quantize("int4-weight", group_size=32),)),
    Recipe("int4-weight, embeddings", (Quantize("int4-weight", group_size=32, embeddings=True),)),
    Recipe("int4-dynamic", (Quantize("int4-dynamic", group_size=32),)),
    Recipe("int4-dynamic, convolutions", (Quantize("int4-dynamic", convolutions=True),)),
    Recipe("QAT, int4-weight", (QAT("int4-weight", group_size=32),)),
    Recipe("bf16", (Quantize("bf16"),)),
    Recipe("fp8-weight", (Quantize("fp8-weight"),)),
    Recipe("fp8-dynamic", (Quantize("fp8-dynamic"),)),
)


class Block(nn.Module):
    """x + down(gelu(up(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Mixing(nn.Module):
    """x + conv(x), with x [batch, positions, channels] mixed along its positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class Net(nn.Module):
    """A convolution, two residual blocks and a head: the least model that every pass rewrites."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.mixing = Mixing(width // 2)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixing(x.unflatten(-1, (2, -1))).flatten(-2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


_SIZES: Mapping[str, Any] = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def bert() -> nn.Module:
    """An encoder with a classifier, and a convolution in the place of a dropout; no dropout, so
    that two runs of a training step are alike."""
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**_SIZES, **still, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    model.bert.embeddings.dropout = Mixing(config.hidden_size)
    return model.eval()


def llama(tied: bool = False) -> nn.Module:
    """A decoder with a gated MLP and no biases.

    Without a cache in what it returns, as no block can go whose keys are part of the result.
    """
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "use_cache": False}
    config = transformers.LlamaConfig(**_SIZES, **tokens, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(rows: int = 4, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(2, 48, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """What `bert` and `llama` are called with."""
    tokens = ids(rows, seed=seed)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


INPUTS: Mapping[Callable[[], nn.Module], Callable[[], Any]] = {
    net: lambda: random(4, 16),
    bert: batch,
    llama: batch,
}


def calibrated(recipe: Recipe, example: Any) -> dict[str, Any]:
    """The option of `rewrite` for passes that cannot do without."""
    needed = any(p.needs_calibration for p in recipe.passes)
    return {"calibration": [example] * 32} if needed else {}


def rewritten(recipe: Recipe, model: nn.Module, example: Any, **options: Any) -> nn.Module:
    """The rewritten model, in eval mode.

    Raises:
        Refused: nothing was rewritten; the reason is the report's.
    """
    made = rewrite(model, list(recipe.passes), example, **calibrated(recipe, example), **options)
    if not made.report.replaced:
        raise Refused(made.report.skipped[0].reason if made.report.skipped else "no site matches")
    return made.eval()


@functools.cache
def _made(recipe: Recipe, kind: Callable[[], nn.Module]) -> nn.Module:
    return rewritten(recipe, kind(), INPUTS[kind]())


def ready(recipe: Recipe, kind: Callable[[], nn.Module]) -> nn.Module:
    """A rewritten model that nobody has called yet."""
    return copy.deepcopy(_made(recipe, kind))
