"""The memory planner: what a backward keeps, makes again, derives in closed form or compresses.

Nothing is imported before it is used: SciPy and PyTorch's compiler are heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewriter.planner.budget import MemoryBudget, parse_budget

if TYPE_CHECKING:
    from rewriter.planner.apply.partition import inductor_partitioner, partitioner
    from rewriter.planner.search.plan import MemoryPlan

__all__ = ["MemoryBudget", "MemoryPlan", "inductor_partitioner", "parse_budget", "partitioner"]


def __getattr__(name: str) -> Any:
    if name == "MemoryPlan":
        from rewriter.planner.search.plan import MemoryPlan

        return MemoryPlan
    if name in ("inductor_partitioner", "partitioner"):
        from rewriter.planner.apply import partition

        return getattr(partition, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
