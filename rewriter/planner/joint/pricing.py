"""What a plan's operations take: seconds of a `Device`, and what a fusing compiler takes off."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rewriter.cost import Device
from rewriter.cost.work import Work

__all__ = ["Pricing"]

FUSED = 0.02
"""What a repeated elementwise operation costs where it is fused into its reader, of its own."""


@dataclass(frozen=True)
class Pricing:
    """Seconds of an operation that a plan runs, or runs again.

    Args:
        device: on which the training step runs.
        fused: whether a compiler fuses elementwise operations into their readers, which makes
            repeating them nearly free.
    """

    device: Device
    fused: bool = False

    @classmethod
    def of(
        cls, runs_on: torch.device, device: Device | None = None, fused: bool = False
    ) -> Pricing:
        """Args: device: the one to price for; by default the datasheet of a typical one."""
        typical = "laptop-CPU" if runs_on.type == "cpu" else "A100-80GB"
        found = device or Device.get(typical)
        if found.measured is None:
            # what the backward makes again, it makes from what left the caches long ago
            found = replace(found, levels=found.levels[-1:])
        return cls(found, fused)

    def seconds(self, work: Work, weights: int = 0) -> float:
        """Of one run.

        Args:
            work: the operation.
            weights: bytes of all weights of the model, which come from the memory that holds them.
        """
        seconds = self.device.time(work, resident=weights)
        fused = self.fused and work.kind in ("pointwise", "copy", "fill")
        return seconds * FUSED if fused else seconds

    def moving(self, nbytes: int) -> float:
        """Of a pass that reads and writes so many bytes together."""
        read = nbytes // 2
        shape = (max(nbytes // 8, 1),)
        return self.device.time(
            Work("aten::clone", "copy", "float32", 0, read, nbytes - read, shape=shape)
        )
