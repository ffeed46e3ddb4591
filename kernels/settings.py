"""The settings under which kernels are probed and timed, whatever those of the caller are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["own_settings"]


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """No inference mode, no gradients, float32 as the dtype of new tensors; and no mode of torch's
    functions, which would send plain calls the long way."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(kept)
