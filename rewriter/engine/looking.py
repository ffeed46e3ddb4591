"""What is there to rewrite: the sites of a captured model, and layers that a pass passes over."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from rewriter.base import Pass
from rewriter.capture import Capture
from rewriter.sites import Site, find_sites, is_leaf, kind_of

__all__ = ["sites_of", "unmatched"]


def sites_of(capture: Capture) -> list[Site]:
    """All sites of a captured model: called ones, then layers that its forward never calls."""
    root = capture.root
    graphs: dict[bool, list[tuple[str, fx.Graph]]] = {False: [], True: []}
    for region, mode, graph in capture.graphs():
        first = not any(region is other for other in capture.others)
        graphs[mode or not first].append((region.prefix, graph))
    sites = find_sites(root, graphs[False], graphs[True])
    seen = {id(s.module) for s in sites if s.module is not None}
    for fqn, module in root.named_modules():
        kind = kind_of(module) if is_leaf(module) else None
        if kind is not None and id(module) not in seen:
            own = {} if isinstance(kind, type) else dict(module.named_parameters(recurse=False))
            weight, bias = (f"{fqn}.{n}" if n in own else None for n in ("weight", "bias"))
            sites.append(Site(kind, fqn, root, (), weight, bias))
    return sites


def unmatched(rewrite: Pass, sites: Sequence[Site]) -> list[tuple[Site, str]]:
    """Layers of ours that a pass for linear layers does not take, each with why."""
    taken = {s.fqn for s in sites if s.kind in rewrite.matches}
    return [
        (s, f"is a {type(s.module).__name__}, which {type(rewrite).__name__} does not take")
        for s in sites
        if isinstance(s.kind, type) and s.fqn not in taken
    ]
