"""Whether a rewrite makes the model slower, found out at small cost: old layers beside new ones.

Each kind of replacement (layer, sizes, rows of the example) is timed once, before it is installed;
the model as a whole is timed only where the layers together have become slower.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rewriter.base import Pass, Where
from rewriter.engine.decide import Proposal, ahead, sampled
from rewriter.layer import Layer
from rewriter.lowering import Rule
from rewriter.modules.comparing import type_of
from rewriter.modules.pointwise import inner
from rewriter.modules.timing import longer
from rewriter.report.content import CLEARLY, LEAST_LOST
from rewriter.spellings import source_of

__all__ = ["Lost"]

_SHARE, _LEAST = 0.03, 0.03
"""Of the rewrite's time that timing may take, and seconds that it may always take."""
_ROUNDS = 4


@dataclass
class Lost:
    """Seconds that a forward takes longer in new layers than in those that they replace.

    Args:
        began: when the rewrite did, by `time.perf_counter`.
        rules: by which the model will be lowered.
        seconds: lost so far; below zero where the new layers are the faster ones.
        spent: seconds of timing.
        untimed: layers that there was no time to time.
        known: seconds lost per call of each kind of replacement.
    """

    began: float
    rules: Sequence[Rule] = ()
    seconds: float = 0.0
    spent: float = 0.0
    untimed: int = 0
    known: dict[object, float] = field(default_factory=dict)

    def add(
        self, proposals: Sequence[Proposal], later: Sequence[Pass] = (), where: Where = None
    ) -> None:
        """Times the kinds of replacement that are new, those of the most arithmetic first, until
        the time for it is used up; what was not timed counts as equally fast.

        Replacements that are the slower layers in the end, as later passes will make both, get a
        note, if they are by what anybody minds.

        Args:
            proposals: of one pass.
            later: the passes that follow.
            where: which sites all passes take.
        """
        kinds: dict[object, list[Proposal]] = {}
        for p in proposals:
            if p.site.calls and all(n.meta.get("val") is not None for n in p.site.nodes[:1]):
                kinds.setdefault(_kind(p), []).append(p)
        ordered = sorted(kinds.items(), key=lambda k: -_work(k[1]))
        for kind, members in ordered:
            if kind not in self.known and not self._used_up():
                self._time(kind, members[0])
            self.untimed += 0 if kind in self.known else len(members)
            self.seconds += self.known.get(kind, 0.0) * len(members)
        for _, members in ordered:
            said = self._slower_after(members, later, where)
            for p in members if said else ():
                note = "; ".join(filter(None, (p.replacement.note, said)))
                p.replacement = replace(p.replacement, note=note)

    def _slower_after(
        self, members: Sequence[Proposal], later: Sequence[Pass], where: Where
    ) -> str:
        if self._used_up():
            return ""
        start, p = time.perf_counter(), members[0]
        if (both := ahead(p, later, where)) is None:
            return ""
        times = sampled(p.site, both.new, both.old, self.rules, only="cpu", rounds=_ROUNDS, warm=2)
        self.spent += time.perf_counter() - start
        if times is None:
            return ""
        old, new = min(times[0]), min(times[1])
        if new <= old / CLEARLY or longer(*times) * len(members) < LEAST_LOST:
            return ""
        new_us, old_us = new * 1e6, old * 1e6
        times_said = f"{new_us:.0f} µs, {old_us:.0f} µs"
        return f"slower by itself than the layer it replaces{both.said}: {times_said}"

    def _used_up(self) -> bool:
        return self.spent > max(_LEAST, _SHARE * (time.perf_counter() - self.began))

    def _time(self, kind: object, p: Proposal) -> None:
        start = time.perf_counter()
        new = p.replacement.layer
        times = sampled(p.site, new, None, self.rules, only="cpu", rounds=_ROUNDS, warm=2)
        self.spent += time.perf_counter() - start
        self.known[kind] = 0.0 if times is None else longer(*times)


def _kind(p: Proposal) -> object:
    """Equal of replacements that take equally long: the same layers on the same sizes."""
    layer, place = inner(p.replacement.layer), p.site.place
    config = str(layer.config()) if isinstance(layer, Layer) else str(id(layer))
    types = tuple(type_of(source_of(n).meta.get("val")) for n in p.site.nodes[: p.site.calls])
    old = place if isinstance(place, Layer) else type(place).__name__
    return type(layer), config, types, type(old), str(old), p.site.transposed, p.site.channels


def _work(members: Sequence[Proposal]) -> int:
    sizes = sum(t.numel() for t in members[0].replacement.layer.parameters())
    sizes += sum(t.numel() for t in members[0].replacement.layer.buffers())
    return len(members) * (members[0].site.tokens or 0) * sizes
