"""A rewritten model's twin that runs its graphs as they are, without rewriting once more."""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["unlowered"]


def unlowered(model: Any) -> Any:
    """A copy of a rewritten model that runs no lowering rule, as `rewrite(..., lower=False)`'s."""
    plain = copy.deepcopy(model)
    vars(plain)["_rewriter"].lowered = None
    return plain
