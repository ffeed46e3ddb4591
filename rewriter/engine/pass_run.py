"""One pass over the whole model, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from rewriter.base import Pass, Replacement, Skip
from rewriter.capture import Capture
from rewriter.cost import Cost
from rewriter.edits import BLOCK, Cut, Keep, Remove, Resize
from rewriter.edits.values import site_of
from rewriter.engine.calibration import Gathered, gather
from rewriter.engine.decide import (
    Declined,
    Options,
    Proposal,
    check_patterns,
    objections,
    ties,
    unsafe,
    unselected,
    worth,
)
from rewriter.engine.gradients import differentiate
from rewriter.engine.install import cut_graphs, names_of, put, remove, resize
from rewriter.engine.looking import sites_of, unmatched
from rewriter.engine.plans import Plan, blocks_of, checked, view_of
from rewriter.engine.trials import at, try_layer
from rewriter.engine.undo import fresh_graphs
from rewriter.engine.verify import Boundary, boundary, check
from rewriter.errors import CalibrationError, PassError, warn
from rewriter.layer import Layer
from rewriter.modules.moments import Sensitivity
from rewriter.modules.patterns import Pattern
from rewriter.modules.pointwise import inner
from rewriter.recipe.edits import Resized
from rewriter.recipe.recipe import Installed, Recipe
from rewriter.report import Decision
from rewriter.sites import CONV, EMBEDDING, LINEAR, Site, find_places
from rewriter.spellings import kind_name

__all__ = ["PassRun"]


@dataclass
class PassRun:
    """A pass on its way over the model: each method is one stage, called in this order.

    Args:
        rewrite: the pass.
        capture: the model; `install` changes it.
        options: how to decide.
        costs: what each site cost before the pass, by name.
        resident: bytes of all weights of the model.
        later: the passes that follow.
        sites: all sites of the model, before the pass.
        matching: the sites of the kinds that the pass takes.
        proposals: the replacements that still stand.
        decisions: what became of every site, with the reason.
        notes: what else the report says of the pass.
        plan: the checked plan of a pass that plans; empty for others.
        before: types and parameters of the model before the pass, which may not change.
        looks: decisions on the layers that are installed, made while their sites stood.
        edited: decisions on the removed blocks and resized layers, made while those stood.
        error: by which the outputs on the example inputs moved; None where that is not known.
        changed: the modules at the places of removed blocks, and the layers that were cut.
        uncalibrated: why a site that cannot do without calibration has none, by name.
    """

    rewrite: Pass
    capture: Capture
    options: Options
    costs: dict[str, Cost]
    resident: int
    later: Sequence[Pass] = ()
    sites: list[Site] = field(init=False)
    matching: list[Site] = field(init=False)
    proposals: list[Proposal] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)
    changed: list[nn.Module] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    before: Boundary = field(init=False)
    looks: list[Decision] = field(default_factory=list)
    edited: list[Decision] = field(default_factory=list)
    error: float | None = None
    uncalibrated: dict[str, str] = field(default_factory=dict)

    def look(self) -> None:
        """Finds the sites of the kinds that the pass takes.

        Raises:
            OptionError: a `where` pattern matches none of them.
        """
        self.before = boundary(self.capture)
        self.sites = sites_of(self.capture)
        self.matching = [s for s in self.sites if s.kind in self.rewrite.kinds]
        pair = [k for k in self.rewrite.kinds if k in (CONV, LINEAR)]
        if len(pair) == 2:  # a 1×1 convolution is both, and then of the kind that is named first
            own = {s.fqn for s in self.matching if s.kind == pair[0]}
            self.matching = [s for s in self.matching if s.kind != pair[1] or s.fqn not in own]
        if self.rewrite.plans:
            self.matching += self._wide_sites()
        check_patterns(self.rewrite, self.matching, self.options.where, self.rewrite.where)
        if not self.matching:
            kinds = ", ".join(dict.fromkeys(map(_kind, self.rewrite.kinds)))
            self.notes.append(f"nothing to do: the model has no site of kind {kinds}")
            warn(f"{self.rewrite}: {self.notes[-1]}")

    def calibrate(self) -> None:
        """Gives the sites what their inputs are like, where the pass and the user want it.

        Raises:
            CalibrationError: the model is on meta, or fails on the batches.
        """
        calibration, needs = self.options.calibration, self.rewrite.needs_calibration
        if calibration is None or not (self.rewrite.calibrates or self.rewrite.samples):
            return
        if self.capture.on_meta:
            raise CalibrationError(
                "the model is on meta, where nothing can be calibrated: leave "
                "calibration out, or load the weights"
            )
        rows = [s for s in self.matching if _reads_rows(s)]
        wanted = [s for s in rows if self._unasked(s) is None]
        moments = self.rewrite.sums_up
        sample = self.rewrite.samples
        found, missing = gather(self.capture, wanted, calibration, moments, sample)
        slopes: dict[str, Sensitivity] = {}
        if self.rewrite.needs_loss:
            reached = [s for s in wanted if s.fqn in found]
            slopes, flat = differentiate(self.capture, reached, calibration, self.rewrite.losses)
            missing |= flat
        self.uncalibrated = missing if needs else {}
        reasons: dict[str, list[str]] = {}
        for name, why in missing.items():
            reasons.setdefault(why, []).append(name)
        become = "left as is" if needs else "fitted to weights alone"
        for why, names in reasons.items():
            named = ", ".join(names)
            self.notes.append(f"{become}, not calibrated: {named} ({why})")
            warn(f"{self.rewrite}: {self.notes[-1]}")
        for i, site in enumerate(self.matching):
            own = found.get(site.fqn, Gathered())
            self.matching[i] = replace(
                site,
                moments=own.moments,
                sample=own.sample,
                sensitivity=slopes.get(site.fqn),
            )

    def ask(self) -> None:
        """Asks the pass about every site, or for its plan of the whole.

        Raises:
            PassError: the pass failed on a site, or its answer is none; a plan is impossible.
        """
        if self.rewrite.plans:
            self._ask_for_plan()
            return
        for site in self.matching:
            answer = self._answer(site)
            if isinstance(answer, Skip):
                self.decisions.append(_decision(site, "skipped", answer.reason))
            else:
                fitted = replace(answer, layer=site.fitted(answer.layer))
                self.proposals.append(Proposal(site, fitted))

    def _ask_for_plan(self) -> None:
        chosen = []
        for site in self.matching:
            skip = self._unasked(site)
            if skip is None:
                chosen.append(site)
            elif site.kind != BLOCK:  # of those there are too many to list
                self.decisions.append(_decision(site, "skipped", skip.reason))
        view = view_of(self.capture, self.sites, chosen)
        try:
            with torch.enable_grad():
                edits = self.rewrite.plan(view)
        except Exception as error:
            raise PassError(
                f"{self.rewrite}.plan failed: {type(error).__name__}: {error}"
            ) from error
        self.plan = checked(self.rewrite, view, edits)
        self.proposals = self.plan.proposals
        for edit in self.plan.edits:
            if isinstance(edit, Keep):
                self.decisions.append(_decision(edit.site, "skipped", edit.reason))
        for site in filter(self.plan.leaves, chosen):
            self.decisions.append(_decision(site, "skipped", "the plan leaves it"))

    def _wide_sites(self) -> list[Site]:
        """Places of the patterns, and the blocks, that a pass with a plan takes."""
        root, found = self.capture.root, []
        for kind in self.rewrite.kinds:
            if isinstance(kind, Pattern):
                found += find_places(root, view_of(self.capture, self.sites).graphs, kind)
        return found + (blocks_of(root) if BLOCK in self.rewrite.kinds else [])

    def decide(self) -> None:
        """Keeps the proposals that nothing speaks against; the others become declined decisions."""
        proposals, refused = ties(self.capture, self.proposals)
        if not self.rewrite.plans:
            self.decisions += [_decision(p.site, "skipped", reason) for p, reason in refused]
        against = {
            id(p): objections(
                p, self.options, self.costs.get(p.site.fqn), self.resident, self.later
            )
            for p in proposals
        }
        groups = {p.group: (p, against[id(p)]) for p in proposals if against[id(p)]}
        if self.rewrite.plans and (refused or groups):
            p, reason = refused[0] if refused else next(iter(groups.values()))
            self.drop(f"all of a plan is done or nothing, and at {p.site.fqn}: {reason}")
            return
        self.proposals = []
        for p in proposals:
            reason = against[id(p)]
            if not reason and p.group >= 0 and p.group in groups:
                other, why = groups[p.group]
                reason = f"its weight is tied to {other.site.fqn}, which is declined: {why}"
            if reason:
                error = p.replacement.error
                self.decisions.append(_decision(p.site, "declined", reason, error=error))
            else:
                self.proposals.append(p)

    def try_layers(self) -> None:
        """Runs every layer on fake inputs of its site.

        Raises:
            VerifyError: a layer gives another type of result than its site.
        """
        seen: set[object] = set()
        for p in self.proposals:
            try_layer(self.capture, self.rewrite, p, seen)

    def install(self, recipe: Recipe) -> None:
        """Puts the layers into graphs and module tree, and notes it in the recipe."""
        self.looks = [_decision(p.site, "replaced", p.replacement.note) for p in self.proposals]
        names = names_of(self.capture.root)
        twins = fresh_graphs(self.capture) if self.plan.changes else {}
        for p in self.proposals:
            site = replace(p.site, nodes=tuple(twins.get(n, n) for n in p.site.nodes))
            own = recipe.installed.setdefault(
                site.fqn,
                Installed(site.weight_ref, site.bias_ref, site.transposed, channels=site.channels),
            )
            own.chain.append((p.kind, self.rewrite))
            own.graph_only |= any(n.op != "call_module" for n in site.nodes)
            put(self.capture, site, p.replacement.layer, names)
        self._install_edits(recipe, twins)

    def _install_edits(self, recipe: Recipe, twins: dict[fx.Node, fx.Node]) -> None:
        """Blocks go and widths are cut, in graphs and module tree."""
        self._look_at_edits()
        root, removed = self.capture.root, self.plan.removed
        cuts = [Cut(twins[c.source], twins[c.result]) for s in removed for c in s.cuts]
        if cuts:
            cut_graphs(self.capture, cuts, [n for s in removed for n in s.names])
        for record in self.plan.records():
            recipe.note(record)
            if isinstance(record, Resized):
                self.changed += resize(root, record)
            else:
                self.changed.append(remove(root, record))

    def _look_at_edits(self) -> None:
        for edit in self.plan.edits:
            if isinstance(edit, Remove):
                site = edit.subgraph.site
                inside = [c for n, c in self.costs.items() if f"{n}.".startswith(f"{site.fqn}.")]
                before = sum(inside[1:], inside[0]) if inside else None
                self.edited.append(_decision(site, "removed", edit.reason, before=before))
            elif isinstance(edit, Resize):
                look = _decision(edit.site, "resized", edit.reason)
                self.edited.append(replace(look, before=self.costs.get(edit.site.fqn)))

    def verify(self) -> None:
        """Checks what must hold after every pass.

        Raises:
            VerifyError: something does not hold.
        """
        cut = {p.cut for p in self.proposals if p.cut is not None}
        check(self.capture, self.before, [*self.layers, *self.changed], str(self.rewrite), cut)

    def record(self, costs: dict[str, Cost]) -> None:
        """Completes the decisions with kernels and costs, and lists what no pass looked at.

        Args:
            costs: what each site costs after the pass, by name.
        """
        for p, look in zip(self.proposals, self.looks, strict=True):
            layer, kernel = inner(p.replacement.layer), "torch"
            if isinstance(layer, Layer) and look.tokens is not None:
                kernel = layer.kernel(look.tokens)
            self.decisions.append(
                replace(
                    look,
                    error=p.replacement.error,
                    output_error=p.replacement.output_error,
                    kernel=kernel,
                    before=self.costs.get(look.site),
                    after=costs.get(look.site),
                )
            )
        for look in self.edited:
            after = costs.get(look.site) if look.action == "resized" else None
            self.decisions.append(replace(look, after=after))
        if LINEAR in self.rewrite.kinds:
            left = unmatched(self.rewrite, self.sites)
            self.decisions += [_decision(s, "skipped", reason) for s, reason in left]
        self._note_packed()
        order = {site.fqn: i for i, site in enumerate(self.sites)}
        self.decisions.sort(key=lambda d: order.get(d.site, len(order)))

    def weigh(self, before: Cost, after: Cost) -> None:
        """Compares a plan that was carried out, as a whole, with what the user asked for.

        Raises:
            Declined: `max_error` or the objective speaks against it.
        """
        if self.plan.removed or self.plan.resized:
            reason = worth(self.options, before, after, self.error)
            if reason:
                raise Declined(reason)

    def drop(self, reason: str) -> None:
        """Nothing of the plan is done: why, at each of its places."""
        for edit in self.plan.edits:
            if not isinstance(edit, Keep):
                self.decisions.append(_decision(site_of(edit), "declined", reason))
        self.plan, self.proposals, self.looks, self.edited, self.changed = Plan(), [], [], [], []
        self.error = 0.0

    @property
    def changes(self) -> bool:
        """Whether the model is not as it was."""
        return bool(self.proposals) or self.plan.changes

    @property
    def layers(self) -> list[nn.Module]:
        """The layers that the pass installs."""
        return [p.replacement.layer for p in self.proposals]

    def _note_packed(self) -> None:
        held = sum(
            layer.held_bytes(look.tokens or 1)
            for layer, look in zip(map(inner, self.layers), self.looks, strict=True)
            if isinstance(layer, Layer)
        )
        if held:
            self.notes.append(
                f"kernels keep {held / 1e6:.3g} MB of packed weights on top of the ledger's memory"
            )

    def _unasked(self, site: Site) -> Skip | None:
        """Why the pass is not asked about a site; None where it is."""
        skip = unselected(site, self.options.where, self.rewrite.where)
        if site.kind == BLOCK:
            return skip
        return skip or unsafe(self.capture, site, self.sites)

    def _answer(self, site: Site) -> Replacement | Skip:
        """The pass's answer, or why it is not asked."""
        try:
            skip = self._unasked(site)
            if skip is not None:
                return skip
            if site.fqn in self.uncalibrated:
                return Skip("it is not calibrated: {}", self.uncalibrated[site.fqn])
            with torch.enable_grad():  # views of parameters must keep their requires_grad
                answer = self.rewrite.propose(site)
        except Exception as error:
            where = at(self.rewrite, site)
            raise PassError(f"{where}: {type(error).__name__}: {error}") from error
        if isinstance(answer, Skip):
            return answer
        if not isinstance(answer, Replacement) or not isinstance(answer.layer, nn.Module):
            inner = (
                f" of a {type(answer.layer).__name__}" if isinstance(answer, Replacement) else ""
            )
            raise PassError(
                f"{self.rewrite}.propose returned a {type(answer).__name__}{inner} for "
                f"{site.fqn}: return Replacement(layer) or Skip(reason)"
            )
        return answer


def _decision(site: Site, action: str, reason: str, **more: Any) -> Decision:
    return Decision(
        site=site.fqn,
        kind=kind_name(site.kind),
        action=action,
        reason=reason,
        where=site.where,
        tokens=site.tokens,
        shape=_shape(site),
        **more,
    )


def _kind(kind: Any) -> str:
    return str(kind) if isinstance(kind, Pattern) else kind_name(kind)


def _shape(site: Site) -> str:
    try:
        sizes = f"{site.in_features}→{site.out_features}"
        return sizes if site.channels is None else f"{sizes}, {site.channels}"
    except AttributeError:  # no linear map: an activation, a convolution
        return ""


def _reads_rows(site: Site) -> bool:
    """Whether the last dimension of a site's input is what its weight sums over."""
    convolves = isinstance(site.module, nn.Conv1d | nn.Conv2d) and site.channels is None
    return not convolves and site.kind not in (CONV, EMBEDDING)
