"""What is done to the graphs that Inductor generates code for, before it fuses them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from rewriter.lowering.joining import join_products
from rewriter.lowering.single_rows import attend_single_rows

__all__ = ["InductorPasses"]

_OURS = (join_products, attend_single_rows)


class InductorPasses(CustomGraphPass):
    """Our passes on Inductor's functional graphs: each changes how something is computed.

    Args:
        then: the user's own pass or passes in this place, which run behind ours; or None.
    """

    def __init__(self, then: Any = None) -> None:
        several = isinstance(then, Sequence)
        self.then: tuple[Any, ...] = tuple(then) if several else () if then is None else (then,)

    def __call__(self, graph: fx.Graph) -> None:
        """Changes it in place."""
        for each in (*_OURS, *self.then):
            each(graph)

    def uuid(self) -> Any:
        """By which Inductor's cache knows this pass; None where it must not keep the code."""
        files = [Path(inspect.getfile(each)) for each in _OURS]
        own = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
        theirs = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.then]
        return None if None in theirs else (own, *theirs)
