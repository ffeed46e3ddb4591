"""Capture: a model becomes graphs on its own module tree."""

from rewriter.capture.ladder import Arguments, Capture, Region, arguments, capture

__all__ = ["Arguments", "Capture", "Region", "arguments", "capture"]
