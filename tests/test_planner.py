"""Plans of one joint graph: gradients stay bit for bit, and peaks are as predicted, to the byte.

Each model is traced once and its plans run directly; tests/test_memory_budget.py goes the user's
way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _tracker import Tracker
from closeness import assert_equal
from hypothesis import given
from hypothesis import strategies as st
from marks import slow_but
from torch import Tensor, nn
from torch.fx.graph import _BoxedCodeGen

from rewriter import MemoryBudget, OptionError, rewrite
from rewriter.modules.running import modes
from rewriter.passes import Monarch, Quadratic
from rewriter.planner.apply.trace import trace
from rewriter.planner.apply.transform import split
from rewriter.planner.joint.joint import Joint
from rewriter.planner.joint.reading import read_joint
from rewriter.planner.search.choices import packings, routes
from rewriter.planner.search.frontier import Frontier
from rewriter.planner.search.plan import decide
from rewriter.planner.search.simulate import Decisions, simulate, trimmed


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small operations wait for a second thread longer than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_budget_in_words() -> None:
    assert str(MemoryBudget(peak=0.5)) == "50% of the default"
    assert str(MemoryBudget(peak=2000, lossy=True)) == "2,000 bytes, lossy"
    assert str(MemoryBudget(peak="1GB")) == "1GB"
    assert str(MemoryBudget(step_time=1.1)) == "the least at 1.1× the time"


# ---- models ------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm, with dropout."""

    def __init__(self, d: int, causal: bool) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.drop, self.causal = nn.Dropout(0.1), causal

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.drop(self.o(a.transpose(1, 2).reshape(b, t, d)))
        return x + self.drop(self.down(F.gelu(self.up(self.n2(x)))))


class Gpt(nn.Module):
    """Two blocks; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.blocks = nn.Sequential(Block(32, True), Block(32, True))
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids)))


class PostNorm(nn.Module):
    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, 2, d // 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        p = F.dropout((q @ k.transpose(-1, -2) / 4).softmax(-1), 0.1, self.training)
        x = self.n1(x + self.o((p @ v).transpose(1, 2).flatten(2)))
        return self.n2(x + F.dropout(self.down(F.gelu(self.up(x))), 0.1, self.training))


class Bert(nn.Module):
    """Two results, of which one is a view of what the other is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(64, 32), nn.Sequential(PostNorm(), PostNorm())
        self.pool = nn.Linear(32, 8)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        h = self.blocks(self.embed(ids))
        return {"hidden": h, "pooled": self.pool(h[:, 0]).tanh()}


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.cls, self.place = (
            nn.Parameter(torch.randn(1, 1, 32)),
            nn.Parameter(torch.randn(17, 32)),
        )
        self.blocks, self.head = nn.Sequential(Block(32, False), Block(32, False)), nn.Linear(32, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.c2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.b1, self.b2 = nn.BatchNorm2d(o), nn.BatchNorm2d(o)
        self.short = nn.Conv2d(i, o, 1, stride) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.short(x))


class Res(nn.Module):
    """Convolutions, BatchNorm with its running statistics, an operation in place, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.pool(self.relu(self.norm(self.stem(x)))))
        return self.head(h.mean((2, 3)))


class Gated(nn.Module):
    """Activations that only their signs are read of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(48, 96), nn.Linear(96, 96), nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x)) * 2 + 1
        h = h + F.leaky_relu(self.b(h), 0.1).abs().sqrt()
        return self.c(F.dropout(F.relu(h - 1), 0.2, self.training))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def generated(*shape: int, ids: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if ids:
        return torch.randint(64, shape, generator=generator)
    return torch.randn(*shape, generator=generator)


CASES: dict[str, tuple[Callable[[], nn.Module], list[Any], Tensor]] = {
    "gpt": (Gpt, [], generated(4, 32, ids=True)),
    "bert": (Bert, [], generated(4, 32, ids=True)),
    "vit": (Vit, [], generated(4, 3, 16, 16)),
    "resnet": (Res, [], generated(4, 3, 16, 16)),
    "gated": (Gated, [], generated(256, 48)),
    "monarch": (lambda: mlp(64, 128, 128, 128, 8), [Monarch(nblocks=4)], generated(128, 64)),
    "quadratic": (lambda: mlp(64, 64, 64, 64, 64, 8), [Quadratic()], generated(512, 64)),
}


class Planned:
    """A model's joint graph, traced once; any plan of it can be run.

    `run` gives results, gradients of all that is trained, new buffers; and notes peak and bytes
    saved as they really were.
    """

    def __init__(self, model: nn.Module, passes: list[Any], *leaves: Tensor) -> None:
        self.model, self.leaves = rewrite(model, passes, leaves), leaves
        state = vars(self.model)["_rewriter"]

        def partition(gm: Any, _: Any, *, num_fwd_outputs: int, **__: Any) -> Any:
            self.module, self.results = gm, num_fwd_outputs
            self.joint = read_joint(gm, num_fwd_outputs)
            return split(gm, self.joint, Decisions.everything(self.joint), num_fwd_outputs)

        with modes(self.model, training=True):
            rows = state.signature.dims[True].shapes
            names = trace(self.model, state.programs[True], leaves, rows, partition).names
        tensors = dict(self.model.named_parameters(remove_duplicate=False))
        tensors |= dict(self.model.named_buffers(remove_duplicate=False))
        self.held = [tensors[n.removeprefix("root.")].detach() for n in names]
        self.frontier = Frontier(self.joint)
        self.peak = self.saved = 0
        self.exact = self.run(Decisions.everything(self.joint))

    def run(self, decisions: Decisions) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        forward, backward = split(self.module, self.joint, decisions, self.results)
        for part in (forward, backward):
            part.graph.set_codegen(_BoxedCodeGen())
            part.recompile()
        held = [*self.held, *self.leaves]
        output = next(iter(reversed(self.module.graph.nodes)))
        fresh = [hasattr(d, "mutated_input") for d in output.meta["desc"][: self.results]]
        number = sum("tangents" in n.name for n in backward.graph.nodes if n.op == "placeholder")
        torch.manual_seed(0)
        with Tracker(given=held) as tracker:
            made = forward.forward(list(held))
            buffers = [t.clone() for t, new in zip(made, fresh, strict=False) if new]
            tracker.ignore(buffers)  # of the test, not of the step
            kept = [t for t, new in zip(made, fresh, strict=False) if not new]
            saved = made[self.results :]
            tensors = [t for t in saved if isinstance(t, Tensor)]
            stores = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
            self.saved = sum(n for k, n in stores.items() if k not in tracker.given)
            tangents = [torch.full_like(t, 0.5) for t in kept[:number]]
            arguments = [*(s for s in saved if not isinstance(s, Tensor)), *tensors, *tangents]
            del made, saved, tensors
            gradients = backward.forward(arguments)
        self.peak = tracker.peak
        return kept, list(gradients), buffers

    def assert_same(self, decisions: Decisions) -> None:
        for found, wanted in zip(self.run(decisions), self.exact, strict=True):
            for a, b in zip(found, wanted, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert_equal(a, b)


@cache
def planned(name: str) -> Planned:
    make, passes, x = CASES[name]
    torch.manual_seed(0)
    return Planned(make(), passes, x)


# ---- every budget ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(CASES, 4, 5, 6))
def test_gradients_and_peaks_at_every_tenth(name: str) -> None:
    case = planned(name)
    default = case.frontier.default.peak
    tried: set[int] = set()
    for tenth in range(10, 0, -1):
        point = case.frontier.choose(tenth / 10 * default)
        if point is None:
            wanted = MemoryBudget(peak=tenth / 10)
            with pytest.raises(OptionError, match="smallest peak found is") as caught:
                decide(case.joint, case.frontier, wanted, 0.0)
            least = int(str(caught.value).split("found is ")[1].split(" bytes")[0].replace(",", ""))
            point = case.frontier.choose(least)
            assert point is not None
            assert point.peak == least
        if point.peak in tried:
            continue
        tried.add(point.peak)
        case.assert_same(point.decisions)
        assert case.peak == point.peak
        assert case.saved == point.simulation.saved


@pytest.mark.parametrize("name", slow_but(CASES, 4, 5, 6))
def test_the_model_itself_trains_within_half(name: str) -> None:
    """As a user does: the whole way through autograd, against the model's own Python."""
    make, passes, x = CASES[name]
    torch.manual_seed(0)
    model = rewrite(make(), passes, x)
    frontier = planned(name).frontier
    amount = max(0.5 * frontier.default.peak, frontier.points[-1].peak)
    optimized = rewrite(make(), passes, x, memory_budget=int(amount))
    optimized.load_state_dict(model.state_dict())
    plan = vars(optimized)["_rewriter"].memory.plan
    assert plan.peak <= amount
    own = rewrite(make(), passes, x)
    own.load_state_dict(model.state_dict())
    peaks, states = [], []
    for net in (own, optimized):
        net.train()
        torch.manual_seed(1)
        with Tracker(given=[*net.parameters(), *net.buffers(), x]) as tracker:
            loss(net(x)).backward()
        peaks.append(tracker.peak)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)  # nothing random ran twice
    same_gradients(optimized, own)
    for a, b in zip(optimized.buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert peaks[1] <= amount * 1.01
    assert peaks[1] <= peaks[0]


def loss(output: Any) -> Tensor:
    results = list(output.values()) if isinstance(output, dict) else [output]
    return torch.stack([r.square().mean() for r in results]).sum()


def same_gradients(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.slow
def test_budgets_save_where_there_is_something_to_save() -> None:
    for name, share in (("gpt", 0.6), ("bert", 0.5), ("vit", 0.7), ("resnet", 0.8)):
        points = planned(name).frontier.points
        assert points[-1].peak <= share * planned(name).frontier.default.peak, name
        seconds = [p.seconds for p in points]
        peaks = [p.peak for p in points]
        assert seconds == sorted(seconds)
        assert peaks == sorted(peaks, reverse=True)


@given(st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_a_smaller_budget_never_has_a_higher_peak(one: float, other: float) -> None:
    frontier = planned("gpt").frontier
    small, large = sorted((one, other))
    less = frontier.choose(small * frontier.default.peak)
    more = frontier.choose(large * frontier.default.peak)
    if less is not None:
        assert more is not None
        assert less.peak <= more.peak <= large * frontier.default.peak
        assert less.seconds >= more.seconds


@pytest.mark.slow
@given(st.floats(1.0, 2.0), st.floats(1.0, 2.0))
def test_more_time_never_takes_more_memory(one: float, other: float) -> None:
    frontier = planned("bert").frontier
    step = sum(s.seconds for s in planned("bert").joint.steps)
    short, long = (frontier.within((t - 1) * step) for t in sorted((one, other)))
    assert long.peak <= short.peak
    assert long.seconds <= max((max(one, other) - 1) * step, frontier.points[0].seconds)


# ---- any plan at all ---------------------------------------------------------------------------


def any_plan(joint: Joint, seed: int) -> Decisions:
    """Keep, drop, pack or derive, by chance, wherever it is allowed."""
    chance = random.Random(seed)
    forms, ways = list(packings(joint)), list(routes(joint))
    kept: set[int] = set()
    packed: dict[int, Any] = {}
    routed: dict[int, Any] = {}
    for value in sorted(joint.needed):
        maker = joint.steps[joint.values[value].maker]  # type: ignore[index]
        own = [p for p in forms if p.value == value and not p.direct]
        derived = [r for r in ways if r.value == value and not r.inverse]
        choices = ["keep", *(["drop"] * 2 if not maker.fixed else [])]
        choices += ["pack"] * bool(own) + ["derive"] * bool(derived)
        picked = chance.choice(choices)
        if picked == "keep":
            kept.add(value)
        elif picked == "pack":
            packed[value] = chance.choice(own)
        elif picked == "derive":
            routed[value] = chance.choice(derived)
    for number in joint.forward:
        if joint.steps[number].fixed:
            kept |= set(joint.steps[number].outputs) - set(packed) - set(routed)
    return Decisions(frozenset(kept), packed, routed)


@pytest.mark.parametrize("name", ["gpt", "bert", "resnet", "gated", "monarch"])
def test_any_plan_gives_the_same_gradients(name: str) -> None:
    case = planned(name)
    for seed in range(5):
        decisions = trimmed(case.joint, any_plan(case.joint, seed))
        case.assert_same(decisions)
        assert case.peak == simulate(case.joint, decisions).peak, seed


def test_everything_dropped_but_what_is_random() -> None:
    for name in ("gpt", "quadratic"):
        case = planned(name)
        fixed = {
            v for i in case.joint.forward if case.joint.steps[i].fixed
            for v in case.joint.steps[i].outputs
        }  # fmt: skip
        case.assert_same(Decisions(frozenset(fixed)))
        assert case.saved <= sum(case.joint.values[v].nbytes for v in fixed)


def test_signs_and_masks_wait_as_bits() -> None:
    case = planned("gated")
    kinds = {p.kind for p in packings(case.joint)}
    assert {"bits", "sign"} <= kinds
    signs = {p.value: p for p in packings(case.joint) if p.kind == "sign"}
    case.assert_same(Decisions(case.joint.needed - set(signs), signs))


def test_pooling_indices_wait_as_32_bits() -> None:
    case = planned("resnet")
    found = {p.value: p for p in packings(case.joint) if p.kind == "int32"}
    assert len(found) == 1
    case.assert_same(Decisions(case.joint.needed - set(found), found))


def test_dropout_from_its_mask() -> None:
    case = planned("gpt")
    ways = {r.value: r for r in routes(case.joint) if r.name == "dropout by its mask"}
    assert len(ways) == 4
    read = {u for r in ways.values() for u in r.inputs}
    case.assert_same(
        trimmed(case.joint, Decisions((case.joint.needed | read) - set(ways), {}, ways))
    )


def test_monarchs_intermediate_is_laid_out_as_the_kernel_has_it() -> None:
    """Fails where the closed form and kernels/monarch.py come apart."""
    case = planned("monarch")
    ways = {r.value: r for r in routes(case.joint) if r.name == "mid"}
    assert len(ways) >= 3
    assert set(ways) <= case.joint.needed
    case.assert_same(Decisions(case.joint.needed - set(ways), {}, ways))
    assert case.saved < case.frontier.default.simulation.saved


@pytest.mark.parametrize(("rows", "features"), [((7,), 30), ((2, 3), 32)])
def test_monarchs_intermediate_of_odd_sizes(rows: tuple[int, ...], features: int) -> None:
    case = Planned(nn.Sequential(nn.Linear(features, 26), nn.ReLU(), nn.Linear(26, 12)),
                   [Monarch(nblocks=4)], torch.randn(*rows, features))  # fmt: skip
    ways = {r.value: r for r in routes(case.joint) if r.name == "mid"}
    assert ways
    case.assert_same(Decisions(case.joint.needed - set(ways), {}, ways))
