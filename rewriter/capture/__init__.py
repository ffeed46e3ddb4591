"""Capture: a model becomes graphs on its own module tree."""

from rewriter.capture.ladder import Capture, Region, arguments, capture

__all__ = ["Capture", "Region", "arguments", "capture"]
