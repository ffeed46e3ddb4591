"""Saving and loading: one safetensors file and one JSON recipe, no pickle.

The recipe names the layers a rewrite installed, by class and constructor arguments; only classes
on the allow-list (`rewriter.passes`, `nn.Linear`, what the caller hands in, and what installed
packages list as entry points) are built, from figures that the weights file bears out. The recipe
is replaced last and names its weights file by content, so a crash leaves the old save whole
(`rewriter.store.files`).
"""

from rewriter.store.original import load_original
from rewriter.store.pretrained import from_pretrained
from rewriter.store.reading import load
from rewriter.store.rewritten import RewrittenModule
from rewriter.store.writing import save

__all__ = ["RewrittenModule", "from_pretrained", "load", "load_original", "save"]
