"""Lowering: rules pattern → fused op on the eval graph, after all passes."""

from typing import TYPE_CHECKING, Any

from rewriter.lowering.alone import alone
from rewriter.lowering.lowered import Lowered, Verdicts
from rewriter.lowering.lowering import Lowering, lower, lowered_again
from rewriter.lowering.rules import Fused, Place, Rule, checked

if TYPE_CHECKING:
    from rewriter.lowering.table import DEFAULT_RULES, FLOAT32_RULES

__all__ = [
    "DEFAULT_RULES",
    "FLOAT32_RULES",
    "Fused",
    "Lowered",
    "Lowering",
    "Place",
    "Rule",
    "Verdicts",
    "alone",
    "checked",
    "lower",
    "lowered_again",
]


def __getattr__(name: str) -> Any:
    """The table, which needs kernels, is made when it is first asked for."""
    if name not in ("DEFAULT_RULES", "FLOAT32_RULES"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rewriter.lowering import table

    return getattr(table, name)
