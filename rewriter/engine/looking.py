"""What is there to rewrite: the sites of a captured model, and layers that a pass passes over."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from rewriter.base import Pass
from rewriter.capture import Capture
from rewriter.modules.pointwise import inner
from rewriter.sites import CONV, LINEAR, Site, find_sites, is_leaf, kind_of, tensor_refs
from rewriter.spellings import channels_of

__all__ = ["sites_of", "unmatched"]


def sites_of(capture: Capture) -> list[Site]:
    """All sites of a captured model: called ones, then layers that its forward never calls."""
    root = capture.root
    graphs: dict[bool, list[tuple[str, fx.Graph]]] = {False: [], True: []}
    for region, mode, graph in capture.graphs():
        first = not any(region is other for other in capture.others)
        graphs[mode or not first].append((region.prefix, graph))
    sites = find_sites(root, graphs[False], graphs[True])
    seen = {id(m) for s in sites for m in (s.module, s.place) if m is not None}
    for fqn, module in root.named_modules():
        kind = kind_of(module) if is_leaf(module) else None
        if kind is not None and id(module) not in seen:
            seen.add(id(inner(module)))
            channels = channels_of(module)
            refs = (None, None) if isinstance(kind, type) else tensor_refs(module, fqn)
            if kind == CONV and channels is not None:
                kind = LINEAR
                sites.append(Site(CONV, fqn, root, (), *refs))
            sites.append(Site(kind, fqn, root, (), *refs, channels=channels))
    return sites


def unmatched(rewrite: Pass, sites: Sequence[Site]) -> list[tuple[Site, str]]:
    """Layers of ours that a pass for linear layers does not take, each with why."""
    taken = {s.fqn for s in sites if s.kind in rewrite.kinds}
    return [
        (s, f"is a {type(s.module).__name__}, which {type(rewrite).__name__} does not take")
        for s in sites
        if isinstance(s.kind, type) and s.fqn not in taken
    ]
