"""How plans are found: minimum cuts against all there are, greedy against integer programmes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from rewriter.planner.joint.joint import Joint, Route, Step, Value
from rewriter.planner.joint.pricing import Pricing
from rewriter.planner.search import chain, solve
from rewriter.planner.search.chain import choose
from rewriter.planner.search.choices import Packing
from rewriter.planner.search.frontier import Frontier
from rewriter.planner.search.greedy import greedy_plans
from rewriter.planner.search.mincut import cheap, cut
from rewriter.planner.search.neighbours import legal, neighbours
from rewriter.planner.search.segments import Segments
from rewriter.planner.search.simulate import Decisions, schedule, simulate, trimmed
from rewriter.planner.search.solve import Choice


class Made:
    """A joint graph of numbers alone."""

    def __init__(self) -> None:
        self.joint, self.graph = Joint(), fx.Graph()

    def value(self, nbytes: int, maker: int | None = None, given: str = "") -> int:
        number = len(self.joint.values)
        node = self.graph.placeholder(f"v{number}")
        self.joint.values.append(Value(node.name, nbytes, maker, given, node=node))
        return number

    def step(
        self, op: str, inputs: tuple[int, ...], sizes: tuple[int, ...], seconds: float,
        backward: bool = False, fixed: str = "",
    ) -> tuple[int, ...]:  # fmt: skip
        number = len(self.joint.steps)
        outputs = tuple(self.value(size, number) for size in sizes)
        node = self.joint.values[outputs[0]].node
        self.joint.steps.append(
            Step(f"{op}{number}", op, inputs, outputs, seconds, 0, backward, fixed, node=node)
        )
        return outputs


def small_graph(seed: int) -> tuple[Joint, frozenset[int]]:
    """Up to eight values of the forward, some of them needed; and which steps are cheap."""
    chance, made = random.Random(seed), Made()
    made.value(chance.randrange(1, 9), None, "input")
    for _ in range(chance.randrange(1, 7)):
        known = range(len(made.joint.values))
        inputs = tuple(sorted(chance.sample(known, min(len(known), chance.randrange(1, 4)))))
        sizes = tuple(chance.randrange(1, 9) for _ in range(1 + (chance.random() < 0.2)))
        made.step("op", inputs, sizes, 1.0, fixed="random" * (chance.random() < 0.15))
    joint = made.joint
    forward = range(1, len(joint.values))
    steps = frozenset(i for i in range(len(joint.steps)) if chance.random() < 0.7)
    needed = tuple(v for v in forward if chance.random() < 0.5)
    joint.results = frozenset(v for v in forward if chance.random() < 0.1)
    tangent = made.value(1, None, "tangent")
    made.step("back", (*needed, tangent), (1,), 1.0, backward=True)
    return joint, steps


def derivable(joint: Joint, kept: set[int], steps: frozenset[int]) -> set[int]:
    there = kept | {i for i, v in enumerate(joint.values) if v.given}
    for number in joint.forward:  # in order
        step = joint.steps[number]
        if number in steps and not step.fixed and set(step.inputs) <= there:
            there |= set(step.outputs)
    return there


@settings(max_examples=200)
@given(st.integers(0, 10**6))
def test_a_cut_keeps_the_least_there_is(seed: int) -> None:
    joint, steps = small_graph(seed)
    kept = cut(joint, steps)
    assert kept is not None
    assert kept == cut(joint, steps)

    def price(values: tuple[int, ...] | frozenset[int]) -> int:
        return sum(joint.values[v].nbytes for v in values if v not in joint.results)

    assert joint.needed <= derivable(joint, set(kept), steps)
    made = [i for i, v in enumerate(joint.values) if v.maker in joint.forward]
    best = min(
        price(some)
        for size in range(len(made) + 1)
        for some in itertools.combinations(made, size)
        if joint.needed <= derivable(joint, set(some), steps)
    )
    assert price(kept) == best


def test_what_the_user_drops_is_made_again_at_any_price() -> None:
    made = Made()
    x = made.value(8, None, "input")
    (a,) = made.step("dear", (x,), (8,), 100.0)
    (b,) = made.step("op", (a,), (8,), 1.0)
    tangent = made.value(1, None, "tangent")
    made.step("back", (a, b, tangent), (1,), 1.0, backward=True)
    assert cut(made.joint, frozenset()) == {a, b}
    made.joint.dropped = frozenset({a})
    assert cut(made.joint, frozenset()) == {b}
    made.joint.steps[0] = Step("r", "r", (x,), (a,), 1.0, 0, False, "it is random")
    assert cut(made.joint, frozenset()) is None


def test_what_is_cheap() -> None:
    made = Made()
    x = made.value(8, None, "input")
    made.step("dear", (x,), (8,), 1.0)
    made.step("cheap", (x,), (8,), 1e-4)
    made.step("cheap", (x,), (8,), 1e-4, fixed="random")
    joint = made.joint
    assert cheap(joint, 1e-3) == {1}
    joint.steps[0].node.op = "call_function"  # type: ignore[union-attr]
    joint.steps[0].node.target = torch.ops.aten.relu.default  # type: ignore[union-attr]
    joint.pricing = Pricing.of(torch.device("cpu"), fused=True)
    assert cheap(joint, 1e-3) == {0, 1}


def tangled(layers: int, seed: int = 0) -> Joint:
    """An MLP in which every layer also reads some earlier one's output."""
    chance, made, size = random.Random(seed), Made(), 1 << 16
    hidden, rows = [made.value(size, None, "input")], []
    for _ in range(layers):
        inputs = tuple(sorted({hidden[-1], chance.choice(hidden)}))
        wide, time = size * chance.randrange(1, 4), 1e-4 * chance.randrange(1, 4)
        (a,) = made.step("mm", inputs, (wide,), time)
        if chance.random() < 0.1:
            made.step("bernoulli", (a,), (wide,), 1e-5, fixed="it is random")
        (h,) = made.step("act", (a,), (wide,), 1e-5)
        rows.append((inputs, a))
        hidden.append(h)
    joint = made.joint
    joint.results = frozenset({hidden[-1]})
    gradient, gradients = made.value(size, None, "tangent"), []
    for inputs, a in reversed(rows):
        (g,) = made.step("actb", (gradient, a), (size,), 1e-5, backward=True)
        gradients += made.step("mmb", (g, *inputs), (1024,), 1e-4, backward=True)
        (gradient,) = made.step("mmx", (g,), (size,), 1e-4, backward=True)
    joint.gradients = frozenset(gradients)
    return joint


def test_greedy_plans_are_plans() -> None:
    joint = tangled(60)
    (part,) = Segments(joint, [], [], []).segments
    plans = greedy_plans(joint, part)
    assert plans == greedy_plans(joint, part)
    assert len(plans) > 10
    for plan in plans:
        kept = {part.values[i] for i in plan.kept}
        run = simulate(joint, Decisions(frozenset(kept)))  # fails where something is missing
        assert run.seconds <= plan.seconds * (1 + 1e-9)
        assert run.saved == sum(joint.values[v].nbytes for v in kept)
        assert plan.nbytes == sum(
            joint.values[v].nbytes for v in kept if v not in joint.results
        )  # fmt: skip
    assert min(p.nbytes for p in plans) < 0.5 * max(p.nbytes for p in plans)


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_is_near_what_integer_programmes_find(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = tangled(40, seed)
    exact = Frontier(joint)
    monkeypatch.setattr(solve, "BINARIES", 0)
    greedy = Frontier(joint)
    for share in (0.9, 0.7, 0.5, 0.4):
        budget = share * exact.default.peak
        one, other = exact.choose(budget), greedy.choose(budget)
        assert one is not None
        assert other is not None
        step = sum(s.seconds for s in joint.steps)
        assert other.seconds <= 1.35 * one.seconds + 0.02 * step
    for frontier in (exact, greedy):
        peaks = [p.peak for p in frontier.points]
        assert peaks == sorted(peaks, reverse=True)


def test_a_part_of_thousands_of_values_is_planned_greedily() -> None:
    joint = tangled(700)
    segments = Segments(joint, [], [], [])
    (whole,) = segments.segments
    assert len(whole.values) + len(whole.steps) > solve.BINARIES
    choices, _ = solve.segment_plans(joint, segments, whole)
    peaks = []
    for choice in choices:
        kept, packed, ways = choice.decisions(whole)
        assert not packed
        assert not ways
        peaks.append(simulate(joint, Decisions(frozenset(kept))).peak)
    assert min(peaks) < 0.5 * simulate(joint, Decisions.everything(joint)).peak


def some_choices(chance: random.Random, parts: int, plans: int) -> list[list[Choice]]:
    return [
        [
            Choice(
                (), (), (), chance.randrange(5) / 4, chance.randrange(6) << 20,
                {j: chance.randrange(9) << 20}, {j: chance.randrange(9) << 20},
            )
            for _ in range(plans)
        ]
        for j in range(parts)
    ]  # fmt: skip


def cost(choices: list[list[Choice]], picks: Sequence[int]) -> tuple[int, float]:
    """(peak, seconds) of one plan for each part."""
    kept = peak = 0
    for j, pick in enumerate(picks):
        own = choices[j][pick]
        peak = max(peak, kept + own.forward[j])
        kept += own.nbytes
        peak = max(peak, kept + own.backward[j])
    return peak, sum(choices[j][pick].seconds for j, pick in enumerate(picks))


@pytest.mark.parametrize("seed", range(6))
def test_the_best_plan_for_every_part(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all ways to take one for each."""
    choices = some_choices(random.Random(seed), 5, 4)
    every = [cost(choices, picks) for picks in itertools.product(range(4), repeat=5)]
    least = choose(choices, None)
    assert least is not None
    smallest = min(peak for peak, _ in every)
    assert cost(choices, least[0])[0] == smallest
    assert choose(choices, smallest - 1) is None
    for budget in range(smallest, max(peak for peak, _ in every) + 1, 1 << 20):
        found = choose(choices, budget)
        assert found is not None
        peak, seconds = cost(choices, found[0])
        assert peak <= budget
        assert seconds == min(s for p, s in every if p <= budget)
        assert found[1] == 0
    monkeypatch.setattr(chain, "_LABELS", 3)
    rough = choose(choices, smallest + (8 << 20))
    exact = min(s for p, s in every if p <= smallest + (8 << 20))
    assert rough is not None  # the way that keeps least is always carried on
    peak, seconds = cost(choices, rough[0])
    assert peak <= smallest + (8 << 20)
    assert seconds * (1 - rough[1]) <= exact + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_small_graphs_are_planned_as_well_as_can_be(seed: int) -> None:
    """Against every plan there is."""
    joint = tangled(5, seed)
    made = [v for i in joint.forward for v in joint.steps[i].outputs]
    fixed = {v for i in joint.forward if joint.steps[i].fixed for v in joint.steps[i].outputs}
    free = [v for v in made if v not in fixed]
    best: list[tuple[float, int]] = []
    plans = [
        trimmed(joint, Decisions(frozenset(some) | fixed))
        for size in range(len(free) + 1)
        for some in itertools.combinations(free, size)
    ]
    runs = sorted((r.seconds, r.peak) for r in (simulate(joint, p) for p in set_of(plans)))
    for seconds, peak in runs:
        if not best or peak < best[-1][1]:
            best.append((seconds, peak))
    frontier = Frontier(joint)
    assert frontier.points[-1].peak == best[-1][1]
    for seconds, peak in best:
        found = frontier.choose(peak)
        assert found is not None
        assert found.seconds <= 1.05 * seconds + 1e-9


def set_of(plans: list[Decisions]) -> list[Decisions]:
    return list({p.kept: p for p in plans}.values())


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_are_legal(seed: int) -> None:
    joint = tangled(8, seed)
    plan = Decisions.everything(joint)
    for _ in range(3):
        around = [found for found in neighbours(joint, plan, [], []) if found is not None]
        assert around
        for other, order in around:
            assert order == schedule(joint, other) == schedule(joint, trimmed(joint, other))
            again = [n for what, n, _ in order if what == "again"]
            assert not any(joint.steps[n].fixed for n in again)
            assert other != plan
        plan = around[len(around) // 2][0]


def test_what_is_not_legal() -> None:
    made = Made()
    x = made.value(8, None, "input")
    (a,) = made.step("bernoulli", (x,), (8,), 1.0, fixed="it is random")
    (b,) = made.step("op", (a,), (8,), 1.0)
    tangent = made.value(1, None, "tangent")
    made.step("back", (b, tangent), (1,), 1.0, backward=True)
    joint = made.joint
    assert legal(joint, Decisions(frozenset({a})))
    assert not legal(joint, Decisions(frozenset()))
    sign = Packing(a, "sign", 1, 0.0, True, True)
    assert not legal(joint, Decisions(frozenset(), {a: sign}))
    assert legal(joint, Decisions(frozenset({b}), {a: sign}))
    inverse = Route(a, (b,), 0.0, 0, "back from b", True, print)
    assert legal(joint, Decisions(frozenset({b}), {}, {a: inverse}))
    assert not legal(joint, Decisions(frozenset(), {}, {a: inverse}))
    joint.dropped = frozenset({b})
    assert not legal(joint, Decisions(frozenset({b})))
