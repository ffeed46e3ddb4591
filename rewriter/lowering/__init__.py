"""Lowering: rules pattern → fused op on the eval graph, after all passes."""

from rewriter.lowering.lowered import Lowered
from rewriter.lowering.lowering import Lowering, lower
from rewriter.lowering.rules import Fused, Place, Rule, checked
from rewriter.lowering.table import DEFAULT_RULES

__all__ = ["DEFAULT_RULES", "Fused", "Lowered", "Lowering", "Place", "Rule", "checked", "lower"]
