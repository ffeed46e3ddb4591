"""The engine: the only code that mutates graphs and module trees."""

from rewriter.engine.decide import check_calibrated
from rewriter.engine.engine import Engine, Options, check_passes

__all__ = ["Engine", "Options", "check_calibrated", "check_passes"]
