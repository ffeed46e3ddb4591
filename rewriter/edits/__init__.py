"""What a pass that sees the whole reads (`View`) and answers (`Replace`, `Remove`, `Resize`)."""

from rewriter.edits.values import BLOCK, Cut, Edit, Keep, Remove, Replace, Resize, Subgraph, Width
from rewriter.edits.view import View

__all__ = [
    "BLOCK",
    "Cut",
    "Edit",
    "Keep",
    "Remove",
    "Replace",
    "Resize",
    "Subgraph",
    "View",
    "Width",
]
