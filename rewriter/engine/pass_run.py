"""One pass over the whole model, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from rewriter.base import Pass, Replacement, Skip
from rewriter.capture import Capture
from rewriter.cost import Cost
from rewriter.engine.calibration import gather
from rewriter.engine.decide import (
    Options,
    Proposal,
    check_patterns,
    objections,
    ties,
    unsafe,
    unselected,
)
from rewriter.engine.install import names_of, put
from rewriter.engine.looking import sites_of, unmatched
from rewriter.engine.other_weights import other_weights
from rewriter.engine.trials import at, try_layer
from rewriter.engine.verify import Boundary, boundary, check
from rewriter.errors import CalibrationError, PassError, warn
from rewriter.layer import Layer
from rewriter.recipe.recipe import Installed, Recipe
from rewriter.report import Decision
from rewriter.sites import LINEAR, Site
from rewriter.spellings import kind_name

__all__ = ["PassRun"]


@dataclass
class PassRun:
    """A pass on its way over the model: each method is one stage, called in this order.

    Args:
        rewrite: the pass.
        capture: the model; `install` changes it.
        options: how to decide.
        costs: of the sites, before the pass, by name.
        resident: bytes of all weights of the model.
        sites: all of the model's, before the pass.
        matching: those of the kinds that the pass takes.
        proposals: the replacements that still stand.
        decisions: what became of every site, with the reason.
        notes: what else the report says of the pass.
        before: what the pass may not change.
        looks: the decisions on what is installed, which read the sites as they were.
    """

    rewrite: Pass
    capture: Capture
    options: Options
    costs: dict[str, Cost]
    resident: int
    sites: list[Site] = field(init=False)
    matching: list[Site] = field(init=False)
    proposals: list[Proposal] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    before: Boundary = field(init=False)
    looks: list[Decision] = field(default_factory=list)

    def look(self) -> None:
        """Finds the sites of the kinds that the pass takes.

        Raises:
            OptionError: a `where` pattern matches none of them.
        """
        self.before = boundary(self.capture)
        self.sites = sites_of(self.capture)
        self.matching = [s for s in self.sites if s.kind in self.rewrite.matches]
        check_patterns(self.rewrite, self.matching, self.options.where, self.rewrite.where)
        if not self.matching:
            kinds = ", ".join(kind_name(k) for k in self.rewrite.matches)
            self.notes.append(f"nothing to do: the model has no site of kind {kinds}")
            warn(f"{self.rewrite}: {self.notes[-1]}")

    def calibrate(self) -> None:
        """Gives the sites the moments of their inputs, where the pass and the user want them.

        Raises:
            CalibrationError: the model is on meta, or fails on the batches.
        """
        calibration = self.options.calibration
        if calibration is None or not self.rewrite.calibrates:
            return
        if self.capture.on_meta:
            raise CalibrationError(
                "the model is on meta, where nothing can be calibrated: leave "
                "calibration out, or load the weights"
            )
        wanted = [s for s in self.matching if self._unasked(s) is None]
        found, missing = gather(self.capture, wanted, calibration)
        reasons: dict[str, list[str]] = {}
        for name, why in missing.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            named = ", ".join(names)
            self.notes.append(f"fitted to weights alone, not calibrated: {named} ({why})")
            warn(f"{self.rewrite}: {self.notes[-1]}")
        self.matching = [replace(s, moments=found.get(s.fqn)) for s in self.matching]

    def ask(self) -> None:
        """Asks the pass about every site.

        Raises:
            PassError: the pass failed on a site, or its answer is none.
        """
        for site in self.matching:
            answer = self._answer(site)
            if isinstance(answer, Skip):
                self.decisions.append(_decision(site, "skipped", answer.reason))
            else:
                self.proposals.append(Proposal(site, answer))

    def decide(self) -> None:
        """Leaves the proposals that nothing speaks against; why the others fall is a decision."""
        proposals, refused = ties(self.capture, self.proposals)
        self.decisions += [_decision(p.site, "skipped", reason) for p, reason in refused]
        against = {
            id(p): objections(p, self.options, self.costs.get(p.site.fqn), self.resident)
            for p in proposals
        }
        groups = {p.group: (p, against[id(p)]) for p in proposals if against[id(p)]}
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
        for p in self.proposals:
            site = p.site
            own = recipe.installed.setdefault(
                site.fqn, Installed(site.weight_ref, site.bias_ref, site.transposed)
            )
            own.chain.append((site.kind, self.rewrite))
            own.graph_only |= any(n.op != "call_module" for n in site.nodes)
            put(self.capture, site, p.replacement.layer, names)

    def verify(self) -> None:
        """Checks what must hold after every pass.

        Raises:
            VerifyError: something does not hold.
        """
        check(self.capture, self.before, self.layers, str(self.rewrite))

    def record(self, costs: dict[str, Cost]) -> None:
        """Completes the decisions with kernels and costs, and lists what no pass looked at.

        Args:
            costs: of the sites, after the pass, by name.
        """
        for p, look in zip(self.proposals, self.looks, strict=True):
            layer, kernel = p.replacement.layer, "torch"
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
        if LINEAR in self.rewrite.matches:
            left = unmatched(self.rewrite, self.sites)
            self.decisions += [_decision(s, "skipped", reason) for s, reason in left]
            listed = [d.site for d in self.decisions]
            self.decisions += other_weights(self.capture, self.sites, listed)
        self._note_packed()
        order = {site.fqn: i for i, site in enumerate(self.sites)}
        self.decisions.sort(key=lambda d: order.get(d.site, len(order)))

    @property
    def layers(self) -> list[nn.Module]:
        """The layers that the pass installs."""
        return [p.replacement.layer for p in self.proposals]

    def _note_packed(self) -> None:
        held = sum(
            layer.held_bytes(look.tokens or 1)
            for layer, look in zip(self.layers, self.looks, strict=True)
            if isinstance(layer, Layer)
        )
        if held:
            self.notes.append(
                f"kernels keep {held / 1e6:.3g} MB of packed weights on top of the ledger's memory"
            )

    def _unasked(self, site: Site) -> Skip | None:
        """Why the pass is not asked about a site; None where it is."""
        skip = unselected(site, self.options.where, self.rewrite.where)
        return skip or unsafe(self.capture, site, self.sites)

    def _answer(self, site: Site) -> Replacement | Skip:
        """The pass's answer, or why it is not asked."""
        try:
            skip = self._unasked(site)
            if skip is not None:
                return skip
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


def _shape(site: Site) -> str:
    try:
        return f"{site.in_features}→{site.out_features}"
    except AttributeError:  # no linear map: an activation, a convolution
        return ""
