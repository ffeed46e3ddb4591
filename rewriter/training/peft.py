"""LoRA on layers that are not linear (TopK, Quadratic): `config = register(LoraConfig(…))`.

Layers with a matrix (Monarch, int8 and the like) are `nn.Linear` and need none of this: every
method of PEFT takes them as they are. `merge_and_unload()` makes those that were adapted dense; the
same passes on what it returns put them into their form again, and report what that costs.
"""

from __future__ import annotations

from typing import Any, TypeVar

from peft.tuners.lora import Linear
from torch import nn

from rewriter.errors import OptionError
from rewriter.layer import Layer

__all__ = ["register"]

C = TypeVar("C")


def register(config: C) -> C:
    """Lets a `peft.LoraConfig` adapt rewritten layers that are not linear: y = layer(x) + B A x.

    Such an adapter trains, saves and loads (register the config that `PeftModel.from_pretrained`
    is given, too), and cannot be merged, as the layer has no weight that stands for all of it.

    Returns:
        The same config.

    Raises:
        OptionError: it is of another method, or asks for a weight (DoRA).
    """
    mapping = getattr(config, "_register_custom_module", None)
    if mapping is None:
        raise OptionError(
            f"{type(config).__name__} takes linear layers only: a rewritten layer that is not "
            "linear (TopK, Quadratic) takes a LoraConfig"
        )
    mapping({Layer: _layer})
    return config


def _layer(target: Any, adapter_name: str, config: Any, **options: Any) -> nn.Module:
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if isinstance(base, nn.Linear):
        usual: nn.Module = Linear(target, adapter_name, config=config, **options)
        return usual
    if config.use_dora:
        raise OptionError(
            f"DoRA scales the rows of a weight, and a {type(base).__name__} is not linear: use LoRA"
        )
    return _Added(target, adapter_name, config=config, **options)


class _Added(Linear):
    """y = layer(x) + scaling · B A x."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses: see `register`.

        Raises:
            OptionError: always.
        """
        cls = type(self.get_base_layer()).__name__
        raise OptionError(
            f"an adapter cannot be merged into a {cls}, which is not linear: keep the adapter, or "
            "adapt and merge before the rewrite"
        )
