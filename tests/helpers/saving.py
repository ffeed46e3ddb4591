"""What a training step keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], Tensor], held: Iterable[Tensor]) -> tuple[int, Tensor]:
    """Bytes of the storages that autograd saves, but for those of `held`; and what `run` gave."""
    own = {t.untyped_storage()._cdata for t in held}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    return sum(found.values()), result
