"""A pass that sees the whole: what it is shown, and its plan checked before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from rewriter.base import Pass, Replacement, Skip
from rewriter.capture import Capture, Region
from rewriter.cost.open_shapes import Shape, open_shapes
from rewriter.edits import BLOCK, Edit, Keep, Remove, Replace, Resize, Subgraph, View, Width
from rewriter.edits.blocks import left_over
from rewriter.edits.values import named, places, site_of
from rewriter.engine.decide import Proposal, unsafe
from rewriter.engine.looking import sites_of
from rewriter.errors import PassError, VerifyError
from rewriter.recipe.edits import Removed, Resized
from rewriter.sites import HostedGraph, Site
from rewriter.spellings import kind_name

__all__ = ["Plan", "blocks_of", "checked", "view_of"]


@dataclass
class Plan:
    """A plan that was checked: nothing of it can be refused any more but by verification.

    Args:
        proposals: its layers for sites.
        removed: the subgraphs that go.
        resized: what is cut, and to which neurons.
        edits: all edits, in the pass's order.
    """

    proposals: list[Proposal] = field(default_factory=list)
    removed: list[Subgraph] = field(default_factory=list)
    resized: list[Resized] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)

    @property
    def changes(self) -> bool:
        return bool(self.proposals or self.removed or self.resized)

    def leaves(self, site: Site) -> bool:
        """Whether no edit is on a site, on a part of it, or on a block around it."""
        gone = [name for s in self.removed for name in s.names]
        names = {site_of(e).fqn for e in self.edits}.union(
            gone, *(r.rows + r.columns for r in self.resized)
        )
        own = {site.fqn, *(part.fqn for part in site.parts.values())}
        return not own & names and not any(site.fqn.startswith(f"{name}.") for name in gone)

    def records(self) -> list[Removed | Resized]:
        """What the recipe keeps."""
        reasons = {e.subgraph: e.reason for e in self.edits if isinstance(e, Remove)}
        return [Removed(s.names, reasons[s]) for s in self.removed] + list(self.resized)


def blocks_of(root: nn.Module) -> list[Site]:
    """A site of kind BLOCK for every module that has modules inside."""
    return [
        Site(BLOCK, name, root)
        for name, module in root.named_modules()
        if name and any(True for _ in module.children())
    ]


def view_of(
    capture: Capture, sites: Sequence[Site] | None = None, chosen: Sequence[Site] = ()
) -> View:
    """The model as a plan sees it.

    Args:
        capture: priced, so that values have their types.
        sites: all sites of the model; None finds them.
        chosen: the sites that the pass may edit.
    """
    known = tuple(sites_of(capture) if sites is None else sites)
    regions = {id(g): (r, mode) for r, mode, g in capture.graphs()}
    found: dict[int, Mapping[fx.Node, Shape] | None] = {}

    def shapes(graph: fx.Graph) -> Mapping[fx.Node, Shape] | None:
        if id(graph) not in found:
            found[id(graph)] = _shapes(capture.root, *regions[id(graph)])
        return found[id(graph)]

    def refused(site: Site) -> Skip | None:
        return unsafe(capture, site, known)

    graphs = tuple(HostedGraph(r.prefix, mode, g) for r, mode, g in capture.graphs())
    typed = all(r.leaves is not None for r in capture.regions)
    return View(capture.root, graphs, known, tuple(chosen), shapes, refused, typed)


def _shapes(root: nn.Module, region: Region, mode: bool) -> Mapping[fx.Node, Shape] | None:
    """Shapes of all values of a graph at all open sizes; None where they are not known."""
    if region.signature is None or region.leaves is None or mode not in region.signature.dims:
        return None
    sizes = region.signature.open_sizes(mode, region.leaves)
    owner, graph = root.get_submodule(region.prefix), region.graphs[mode]
    try:
        return open_shapes(owner, graph, region.leaves, sizes.rows, sizes.values, mode)
    except VerifyError:  # an op that cannot run with open sizes: nothing can be proven
        return None


def checked(rewrite: Pass, view: View, edits: object) -> Plan:
    """The plan, ready to be installed.

    Raises:
        PassError: an edit is none, is not of this model, leaves a shape open, removes an output,
            or overlaps with another. Nothing was changed.
    """
    if not isinstance(edits, list | tuple):
        raise PassError(f"{rewrite}.plan returned a {type(edits).__name__}: return a list of edits")
    plan, widths = Plan(edits=list(edits)), {}
    for edit in edits:
        if not isinstance(edit, Replace | Remove | Resize | Keep):
            raise PassError(
                f"{rewrite}.plan returned a {type(edit).__name__} among its edits: return Replace, "
                "Remove, Resize or Keep"
            )
        _own(rewrite, view, edit)
        if isinstance(edit, Resize):
            widths[id(edit)] = found = _width(rewrite, view, edit)
            plan.resized.append(_resized(edit, found))
        elif isinstance(edit, Remove):
            _removable(rewrite, view, edit)
            plan.removed.append(edit.subgraph)
        elif isinstance(edit, Replace):
            plan.proposals.append(_proposal(rewrite, view, edit))
    _apart(rewrite, edits, widths)
    reason = left_over(view, plan.removed)
    if reason is not None:
        together = ", ".join(s.site.fqn for s in plan.removed)
        raise PassError(f"{rewrite}: {together} cannot be removed together: {reason.reason}")
    return plan


def _own(rewrite: Pass, view: View, edit: Edit) -> None:
    """Raises PassError where an edit's site is of another model, or of this one before a change."""
    site = site_of(edit)
    graphs = {g.graph for g in view.graphs}
    nodes = list(site.nodes)
    if isinstance(edit, Remove):
        nodes += [n for c in edit.subgraph.cuts for n in (c.source, c.result)]
    if site.root is not view.root or any(n.graph not in graphs for n in nodes):
        raise PassError(
            f"{rewrite}: {named(edit)} is on a site that is not the model's: edit only sites of "
            "the view that plan is given"
        )


def _width(rewrite: Pass, view: View, edit: Resize) -> Width:
    found = view.width(edit.site)
    if isinstance(found, Skip):
        raise PassError(f"{rewrite}: {named(edit)} is impossible: {found.reason}")
    if edit.kept[-1] >= found.size:
        raise PassError(
            f"{rewrite}: {named(edit)} keeps neuron {edit.kept[-1]}, and there are {found.size}"
        )
    return found


def _resized(edit: Resize, found: Width) -> Resized:
    every = (*found.rows, *found.columns)
    transposed = tuple(s.fqn for s in every if s.transposed)
    rows, columns = (tuple(s.fqn for s in some) for some in (found.rows, found.columns))
    return Resized(
        rows, columns, transposed, found.norms, found.size, tuple(edit.kept), edit.reason
    )


def _removable(rewrite: Pass, view: View, edit: Remove) -> None:
    """Raises PassError where a subgraph, perhaps made by hand, is not the view's of its module."""
    found = view.block(edit.subgraph.site.fqn)
    if isinstance(found, Skip):
        raise PassError(f"{rewrite}: {named(edit)} is impossible: {found.reason}")
    if {(c.source, c.result) for c in found.cuts} == {
        (c.source, c.result) for c in edit.subgraph.cuts
    } and found.names == edit.subgraph.names:
        return
    for cut in edit.subgraph.cuts:
        was, now = view.shape(cut.result), view.shape(cut.source)
        if was is None or was != now:
            raise PassError(
                f"{rewrite}: {named(edit)} leaves a shape open: {cut.result.name} is {was}, "
                f"{cut.source.name}, which its readers would read, is {now}"
            )
    raise PassError(
        f"{rewrite}: {named(edit)} has other cuts than the block {edit.subgraph.site.fqn} has: "
        "take view.block(name)"
    )


def _proposal(rewrite: Pass, view: View, edit: Replace) -> Proposal:
    own = (edit.site.fqn, edit.site.kind, edit.site.nodes)
    if all((s.fqn, s.kind, s.nodes) != own for s in view.sites):
        raise PassError(
            f"{rewrite}: {named(edit)} is on {kind_name(edit.site.kind)}, which is several "
            "operations: Replace takes a site of one"
        )
    reason = view.unsafe(edit.site)
    if reason is not None:
        raise PassError(f"{rewrite}: {named(edit)} is impossible: {reason.reason}")
    if not isinstance(edit.layer, nn.Module):
        raise PassError(f"{rewrite}: {named(edit)} has a {type(edit.layer).__name__}, no nn.Module")
    layer = edit.site.fitted(edit.layer)
    return Proposal(edit.site, Replacement(layer, edit.error, edit.reason, edit.output_error))


def _apart(rewrite: Pass, edits: Iterable[Edit], widths: Mapping[int, Width]) -> None:
    """Raises PassError where two edits change one place."""
    taken: list[tuple[Edit, set[tuple[str, str]]]] = []
    for edit in edits:
        own = places(edit, widths.get(id(edit)))
        for other, theirs in taken:
            shared = {n for n, _ in own & theirs} | _within(edit, theirs) | _within(other, own)
            if shared:
                raise PassError(
                    f"{rewrite}: {named(other)} and {named(edit)} both change {min(shared)}: a "
                    "plan's edits must not overlap"
                )
        taken.append((edit, own))


def _within(edit: Edit, others: set[tuple[str, str]]) -> set[str]:
    """What of another edit lies inside of what this one removes."""
    names = edit.subgraph.names if isinstance(edit, Remove) else ()
    return {other for name in names for other, _ in others if other.startswith(f"{name}.")}
