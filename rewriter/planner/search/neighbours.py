"""Plans that differ from a given one in what becomes of one value.

Pareto local search: the neighbours of every plan worth having are tried, until none of them is
worth having too. The programmes of `solve.py` bound sums of bytes; this sees the peak itself.

Source: Paquete, Chiarandini and Stützle 2004, "Pareto local optimum sets".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rewriter.planner.joint.joint import Joint, Route
from rewriter.planner.search.choices import Packing, by_value
from rewriter.planner.search.simulate import Decisions, Event, schedule

__all__ = ["legal", "neighbours"]


def neighbours(
    joint: Joint, plan: Decisions, packings: Sequence[Packing], routes: Sequence[Route]
) -> Iterator[tuple[Decisions, list[Event]] | None]:
    """Legal plans in which one value is kept, packed, derived or made again instead, alone or along
    with what it is made from, each with its schedule; None for one that is not legal after all."""
    again = {
        v
        for what, number, _ in schedule(joint, plan)
        if what == "again"
        for v in joint.steps[number].outputs
    }
    touched = sorted(plan.kept | set(plan.packed) | set(plan.routes) | again)
    forms, ways = by_value(packings), by_value(routes)
    for value in touched:
        if joint.values[value].maker is None or value in joint.results:
            continue
        for wanted in _others(joint, plan, value, forms.get(value, []), ways.get(value, [])):
            if not _holds(joint, wanted):
                continue
            order = schedule(joint, wanted)
            yield (wanted, order) if _runs(joint, wanted, order) else None


def _others(
    joint: Joint, plan: Decisions, value: int, forms: list[Packing], ways: list[Route]
) -> Iterator[Decisions]:
    without = _without(plan, value)
    held = value in plan.kept or value in plan.packed
    if value not in plan.kept:
        yield Decisions(without.kept | {value}, without.packed, without.routes)
    for form in forms:
        if plan.packed.get(value) != form:
            yield Decisions(without.kept, {**without.packed, value: form}, without.routes)
    for way in ways:
        if value not in plan.routes:
            yield Decisions(without.kept, without.packed, {**without.routes, value: way})
    if held or value in plan.routes:
        yield without
        maker = joint.values[value].maker
        assert maker is not None
        sources = [u for u in joint.steps[maker].inputs if joint.values[u].maker is not None]
        missing = frozenset(u for u in sources if u not in plan.kept)
        if missing:
            yield Decisions(without.kept | missing, without.packed, without.routes)
        for u in sources:
            if u in plan.kept and u not in joint.results:
                yield _without(without, u)


def _without(plan: Decisions, value: int) -> Decisions:
    return Decisions(
        plan.kept - {value},
        {v: p for v, p in plan.packed.items() if v != value},
        {v: r for v, r in plan.routes.items() if v != value},
    )


def legal(joint: Joint, plan: Decisions) -> bool:
    """Nothing runs twice that must not, nothing is made from what cannot serve for it, nothing is
    kept that the user's checkpoint regions drop or that no node returns."""
    return _holds(joint, plan) and _runs(joint, plan, schedule(joint, plan))


def _holds(joint: Joint, plan: Decisions) -> bool:
    """What is kept may be, and serves what is derived from it."""
    held = plan.kept | set(plan.packed)
    if any(v in joint.dropped or joint.values[v].node is None for v in held):
        return False
    inverses = [r for r in plan.routes.values() if r.inverse]
    return all(_serves(joint, plan, u) for r in inverses for u in r.inputs)


def _runs(joint: Joint, plan: Decisions, order: Sequence[Event]) -> bool:
    """What runs again may, and reads nothing of which only the sign is left."""
    direct = {v for v, p in plan.packed.items() if p.direct}
    for what, number, _ in order:
        if what == "again":
            if joint.steps[number].fixed:
                return False
            inputs = joint.steps[number].inputs
        elif what == "route":
            inputs = plan.routes[number].inputs
        else:
            continue
        if direct and not direct.isdisjoint(inputs):
            return False
    return True


def _serves(joint: Joint, plan: Decisions, value: int) -> bool:
    return value in plan.kept or bool(joint.values[value].given) or (
        value in plan.packed and not plan.packed[value].direct
    )  # fmt: skip
