"""Training within a budget: gradients are the model's own, and the peak is as planned."""

from __future__ import annotations

import copy
import json
import pathlib
import pickle
import random
import re
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _tracker import Tracker
from marks import slow_but
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from rewriter import MemoryBudget, explain, load, plan_memory, rewrite
from rewriter.errors import OptionError, RewriteWarning
from rewriter.passes import Monarch, Quadratic
from rewriter.planner import MemoryPlan, parse_budget, partitioner
from rewriter.planner.apply.trace import trace
from rewriter.planner.apply.training import PlannedTraining
from rewriter.planner.apply.transform import split
from rewriter.planner.joint.joint import Joint
from rewriter.planner.joint.reading import read_joint
from rewriter.planner.search.choices import LOSSY, packings, routes
from rewriter.planner.search.simulate import Decisions, simulate

TENTHS = [n / 10 for n in range(10, 0, -1)]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, 2, width // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(rows, length, width)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Pre-norm blocks with dropout; the head is tied to the embedding."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.blocks(self.embed(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class Convolutions(nn.Module):
    """Residual, BatchNorm, max-pooling, leaky and plain ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.norm_a = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool, self.drop, self.head = nn.MaxPool2d(2), nn.Dropout(0.2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.stem(x))))
        y = self.norm_b(self.b(F.leaky_relu(self.norm_a(self.a(x)))))
        return self.head(self.drop(F.relu(x + y).mean((2, 3))))


class PostNorm(nn.Module):
    """x ← LN(x + MLP(x)), as BERT has it, with norms that have no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.norm = nn.LayerNorm(24, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.norm(x + torch.tanh(layer(x)))
        return x


def mlp() -> nn.Module:
    hidden = [m for _ in range(4) for m in (nn.Linear(48, 48), nn.GELU())]
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), *hidden, nn.Linear(48, 8))


def tokens(rows: int = 16, length: int = 32) -> Tensor:
    return torch.randint(0, 50, (rows, length))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], list[Any]]] = {
    "gpt": (GPT, tokens, []),
    "convolutions": (Convolutions, lambda: torch.randn(16, 3, 12, 12), []),
    "post-norm": (PostNorm, lambda: torch.randn(512, 24), []),
    "monarch": (mlp, lambda: torch.randn(512, 24), [Monarch(nblocks=4)]),
    "monarch, padded": (mlp, lambda: torch.randn(512, 24), [Monarch(nblocks=5)]),
    "quadratic": (mlp, lambda: torch.randn(512, 24), [Quadratic()]),
}


Result = tuple[Tensor, dict[str, Tensor], dict[str, Tensor], int]


def step(model: nn.Module, x: Tensor, grad: Tensor | None = None) -> Result:
    """(result, gradients, buffers, measured peak) of one training step from a fixed seed."""
    model.train()
    state = {n: b.clone() for n, b in model.named_buffers()}
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(1)
    with Tracker(given=[*model.parameters(), *model.buffers(), x]) as tracker:
        result = model(x)
        if grad is None and result.dim():
            grad = torch.linspace(-1, 1, result.numel()).view(result.shape)
        result.backward(grad)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        for n, b in model.named_buffers():
            b.copy_(state[n])
    return result.detach(), found, buffers, tracker.peak


def same(found: Result, wanted: Result) -> None:
    assert_close(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert_close(found[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")
    for name, buffer in wanted[2].items():
        assert_close(found[2][name], buffer)


def budgeted(model: nn.Module, budget: Any) -> MemoryPlan:
    """Gives a hosted model another budget; the plan of its first step comes with that."""
    state = vars(model)["_rewriter"]
    state.memory = PlannedTraining(MemoryBudget.of(budget))
    return state.memory


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_equal_and_the_peak_is_as_planned_at_every_budget(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, passes = MODELS[name]
    x = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewriteWarning)
        model = rewrite(make(), passes, x)
    wanted = step(model, x)
    peaks, actions, feasible = [], set(), 0
    for budget in TENTHS:
        planned = budgeted(model, budget)
        try:
            found = step(model, x)
        except OptionError as error:
            least = int(re.search(r"smallest peak found is ([\d,]+) bytes", str(error))[1]
                        .replace(",", ""))  # fmt: skip
            planned = budgeted(model, least)
            found = step(model, x)
        else:
            feasible += 1
            assert planned.plan.peak <= budget * planned.plan.default_peak
        plan = planned.plan
        same(found, wanted)
        assert plan.peak == pytest.approx(found[3], rel=0.01)
        peaks.append(plan.peak)
        actions |= {v.action for v in plan.values}
    assert peaks == sorted(peaks, reverse=True)
    assert feasible >= 2
    assert "recomputed" in actions


def test_a_smaller_budget_never_raises_the_peak() -> None:
    x = tokens()
    plan = plan_memory(GPT(depth=1), x)
    curve = [(c.peak, c.added) for c in plan.curve]
    assert [p for p, _ in curve] == sorted({p for p, _ in curve}, reverse=True)
    assert [a for _, a in curve] == sorted(a for _, a in curve)
    assert curve[0] == (plan.default_peak, 0.0)


def traced(model: nn.Module, x: Tensor, choose: Callable[[Joint], Decisions]) -> Callable[..., Any]:
    """The flat function of a hosted model's training step, by these decisions."""
    state = vars(model)["_rewriter"]

    def part(module: Any, _: Any, *, num_fwd_outputs: int, **rest: Any) -> Any:
        joint = read_joint(module, num_fwd_outputs)
        return split(module, joint, choose(joint), num_fwd_outputs)

    rows = state.signature.dims[True].shapes
    return trace(model, state.programs[True], [x], rows, part)


@dataclass
class Chosen:
    """A plan of no budget."""

    run: Callable[..., Any]
    plan: MemoryPlan | None = None
    peak: int = 0
    without: str = ""

    def __call__(self, root: nn.Module, _: Any, leaves: Any, __: Any) -> Any:
        return self.run(root, leaves)


@pytest.mark.parametrize("name", slow_but(["gpt", "convolutions", "post-norm", "monarch"], 1, 2, 3))
def test_any_plan_gives_the_same_gradients(name: str) -> None:
    """Random ways for every value; sums and signs cannot hide what a wrong one would do."""
    torch.manual_seed(0)
    make, inputs, passes = MODELS[name]
    x = inputs()
    model = rewrite(make(), passes, x).train()
    wanted = step(model, x)
    for seed in range(3):
        generator = random.Random(seed)

        def choose(joint: Joint, generator: random.Random = generator) -> Decisions:
            smaller, ways = list(packings(joint)), list(routes(joint))
            kept, packed, closed = set(), {}, {}
            for v in sorted(joint.needed):
                maker = joint.steps[joint.values[v].maker]
                options = ["keep"] if maker.fixed else ["keep", "drop", "drop"]
                options += ["pack"] * any(p.value == v and not p.direct for p in smaller)
                options += ["route"] * 3 * any(r.value == v and not r.inverse for r in ways)
                what = generator.choice(options)
                if what == "pack":
                    packed[v] = next(p for p in smaller if p.value == v and not p.direct)
                elif what == "route":
                    closed[v] = next(r for r in ways if r.value == v)
                elif what == "keep":
                    kept.add(v)
            for made in joint.steps:
                if made.fixed and not made.backward:
                    kept |= {v for v in made.outputs if v not in packed and v not in closed}
            return Decisions(frozenset(kept), packed, closed)

        run, state = traced(model, x, choose), vars(model)["_rewriter"]
        state.memory = Chosen(run)
        same(step(model, x), wanted)


@pytest.mark.slow
def test_one_plan_serves_other_sizes_and_freezing_gets_its_own() -> None:
    torch.manual_seed(0)
    model = rewrite(GPT(), [], tokens(), memory_budget=0.8).train()
    plain = copy.deepcopy(model)
    vars(plain)["_rewriter"].memory = None
    memory = vars(model)["_rewriter"].memory
    for x in (tokens(), tokens(7, 32), tokens(20, 31)):
        same(step(model, x), step(plain, x))
    assert memory.traces == 1
    for twin in (model, plain):
        twin.blocks[0].requires_grad_(False)
        twin.blocks[1].drop.eval()
    x = tokens()
    same(step(model, x), step(plain, x))
    assert memory.traces == 2
    with torch.no_grad():
        assert model(tokens()).grad_fn is None
    model.eval(), plain.eval()
    assert_close(model(x := tokens()), plain(x))


def test_frozen_batch_norm_accumulation_and_optimizer_steps() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 12, 12)
    model = rewrite(Convolutions(), [], x, memory_budget=0.9)
    plain = copy.deepcopy(model)
    vars(plain)["_rewriter"].memory = None
    ends = []
    for twin in (model, plain):
        twin.train()
        twin.norm_a.eval()
        optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
        torch.manual_seed(3)
        for _ in range(2):
            for part in x.chunk(2):
                twin(part).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(twin.state_dict())
    for name, value in ends[1].items():
        assert_close(ends[0][name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_autocast() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 24)
    with torch.autocast("cpu", torch.bfloat16):
        model = rewrite(mlp(), [], x, memory_budget=0.8).train()
        plain = copy.deepcopy(model)
        vars(plain)["_rewriter"].memory = None
        same(step(model, x), step(plain, x))


@pytest.mark.slow
def test_copies_and_saves_train_by_a_plan_of_the_same_budget(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    x, original = torch.randn(512, 24), mlp()
    model = rewrite(original, [Monarch(nblocks=4)], x, memory_budget=0.8)
    wanted = step(model, x)
    model.save(tmp_path / "saved")
    with pytest.warns(RewriteWarning, match="pass example_inputs to load"):
        load(tmp_path / "saved", original)
    again = load(tmp_path / "saved", original, example_inputs=x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        assert vars(twin)["_rewriter"].memory.budget == MemoryBudget(0.8)
        same(step(twin, x), wanted)


def test_hooks_are_run_without_the_plan() -> None:
    x, seen = torch.randn(512, 24), []
    model = rewrite(mlp(), [], x, memory_budget=0.9).train()
    model[1].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(RewriteWarning, match="has hooks|hook"):
        model(x).sum().backward()
    assert seen


def test_the_plan_as_report_and_files(tmp_path: pathlib.Path) -> None:
    x = torch.randn(512, 24)
    report = explain(mlp(), [], x, memory_budget=0.8)
    (last,) = (s for s in report.steps if s.name == "memory plan")
    assert last.after.training.saved_bytes < last.before.training.saved_bytes
    assert {d.action for d in last.decisions} >= {"kept", "recomputed"}
    assert "memory plan" in str(report)
    report.save(tmp_path / "report.html")
    report.save(tmp_path / "report.json")
    with torch.device("meta"):
        plan = plan_memory(mlp(), torch.randn(512, 24), MemoryBudget(step_time=1.5))
    assert plan.peak < plan.default_peak
    assert plan.added <= 0.5
    for name in ("plan.json", "plan.txt", "plan.png"):
        plan.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size
    data = json.loads((tmp_path / "plan.json").read_text())
    assert MemoryPlan.from_dict(data) == plan
    with pytest.raises(OptionError, match="use .json"):
        plan.save(tmp_path / "plan.xls")


def test_checkpoint_regions_are_respected_under_torch_compile() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(16, 64), nn.Linear(64, 16)

    def inner(x: Tensor) -> Tensor:
        return second(torch.tanh(F.gelu(first(x))))

    def model(x: Tensor) -> Tensor:
        return checkpoint(inner, x, use_reentrant=False).sin().sum()

    plans: list[MemoryPlan] = []
    part = partitioner(1.0, on_plan=plans.append)
    nop = aot_autograd(fw_compiler=lambda m, _: make_boxed_func(m.forward), partition_fn=part)
    compiled = torch.compile(model, backend=nop)
    x = torch.randn(8, 16, requires_grad=True)
    model(x).backward()
    wanted, x.grad = x.grad, None
    compiled(x).backward()
    assert_close(x.grad, wanted)
    (plan,) = plans
    inside = [v for v in plan.values if "gelu" in v.op or "tanh" in v.op]
    assert inside
    assert all(v.action == "recomputed" for v in inside)


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Opaque.apply(self.fc(x))


def test_models_that_cannot_be_planned() -> None:
    x = torch.randn(4, 24)
    with pytest.raises(OptionError, match="no parameter requires a gradient"):
        rewrite(mlp().requires_grad_(False), [], x, memory_budget=0.5)
    with pytest.raises(OptionError, match="needs example_inputs"):
        rewrite(mlp(), [], memory_budget=0.5)
    with pytest.raises(OptionError, match="whole model as one train graph"):
        rewrite(Custom(), [], torch.randn(2, 4), memory_budget=0.5)
    with pytest.raises(OptionError, match=r"smallest peak found is [\d,]+ bytes"):
        rewrite(mlp(), [], x, memory_budget="1KB")
    with pytest.raises(OptionError, match="cannot check a lossy plan"):
        plan_memory(mlp(), x, MemoryBudget(0.5, lossy=True))
    with pytest.raises(OptionError, match="capture_seconds=0: use a number"):
        plan_memory(mlp(), x, capture_seconds=0)
    with pytest.raises(OptionError, match="capture_seconds=1000+: use a number"):
        plan_memory(mlp(), x, capture_seconds=10**400)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(123, 123), ("512MB", 512 * 10**6), ("1.5 GiB", 3 << 29), ("64k", 64000), (0.5, 0.5),
     (1.0, 1.0), (None, None)],
)  # fmt: skip
def test_budgets_in_every_form(given: Any, wanted: Any) -> None:
    assert parse_budget(given) == wanted


@pytest.mark.parametrize(
    "given",
    [-1, 0, 0.0, -0.5, float("nan"), float("inf"), True, 1, 1.5, "", "MB", "-5MB", "1 furlong"],
)
def test_impossible_budgets(given: Any) -> None:
    with pytest.raises(OptionError, match="memory_budget="):
        parse_budget(given)


@pytest.mark.parametrize(
    "options",
    [{}, {"peak": 0.5, "step_time": 1.1}, {"step_time": 0.9}, {"step_time": float("nan")},
     {"peak": 0.5, "gradient_error": 0}, {"peak": 0.5, "forms": ("int3",)},
     {"peak": 0.5, "forms": ()}],
)  # fmt: skip
def test_impossible_options_of_a_budget(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="MemoryBudget"):
        MemoryBudget(**options)


class Causal(nn.Module):
    """Attention with a mask of 0 and -inf, which its backward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mixed = F.scaled_dot_product_attention(*heads.unbind(0), attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_masks_lose_nothing() -> None:
    """Among numbers as large as those of an additive mask a group's others would be lost."""
    made: dict[str, set[bool]] = {}

    def choose(joint: Joint) -> Decisions:
        for packing in packings(joint, LOSSY):
            maker = joint.values[packing.value].maker
            assert maker is not None
            made.setdefault(joint.steps[maker].op, set()).add(packing.exact)
        assert any(s.op == "aten.where.self" for s in joint.steps)
        return Decisions.everything(joint)

    x = torch.randn(4, 128, 64)
    traced(rewrite(Causal(), [], x).train(), x, choose)
    assert False in made["aten.addmm"]
    assert False not in made.get("aten.where.self", set())


def test_the_simulation_knows_the_default() -> None:
    """What autograd keeps, and nothing on top."""
    found = {}

    def choose(joint: Joint) -> Decisions:
        found["run"] = simulate(joint, Decisions.everything(joint))
        return Decisions.everything(joint)

    x = torch.randn(512, 24)
    model = rewrite(mlp(), [], x).train()
    traced(model, x, choose)
    run = found["run"]
    assert (run.seconds, run.flops, run.recomputed) == (0, 0, [])
    assert run.saved == 512 * 4 * 48 * 9  # what ReLU returns, what GELU reads and returns


# ---- what a step may change after it was planned -----------------------------------------------


class Layers(nn.Module):
    """One of each kind of layer with options that a trace makes constants of."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.act = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.LeakyReLU()
        self.drop, self.ln, self.head = nn.Dropout(0.1), nn.LayerNorm(16), nn.Linear(16, 4)
        self.scale = torch.ones(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.ln(self.drop(self.act(self.bn(self.fc(x))))) * self.scale)


def head(model: nn.Module) -> None:
    torch.manual_seed(7)
    model.head = nn.Linear(16, 6)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "dropout's p": lambda m: setattr(m.drop, "p", 0.5),
    "batch norm's momentum": lambda m: setattr(m.bn, "momentum", 0.9),
    "batch norm's eps": lambda m: setattr(m.bn, "eps", 0.5),
    "layer norm's eps": lambda m: setattr(m.ln, "eps", 0.5),
    "a slope": lambda m: setattr(m.act, "negative_slope", 0.7),
    "another activation": lambda m: setattr(m, "act", nn.Tanh()),
    "another head": head,
    "a layer in eval mode": lambda m: m.bn.eval(),
    "a frozen layer": lambda m: m.fc.requires_grad_(False),
    "a tensor written in place": lambda m: m.scale[:3].zero_(),
    "another tensor": lambda m: setattr(m, "scale", torch.linspace(0, 1, 16)),
    "a weight of its own": lambda m: setattr(m.fc, "weight", nn.Parameter(torch.ones(16, 8))),
    "a forward of its own": lambda m: setattr(m.act, "forward", lambda x: x.square()),
}


def exact_step(model: nn.Module, x: Tensor) -> list[Any]:
    """Result, gradients and buffers of a step from a fixed seed."""
    torch.manual_seed(1)
    result = model(x)
    result.square().mean().backward()
    found = [result.detach(), *(p.grad for p in model.parameters())]
    model.zero_grad()
    return [*found, *(b.clone() for b in model.buffers())]


def equal(found: list[Any], wanted: list[Any]) -> None:
    """Bit for bit, and None where the other is."""
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.fixture(scope="module")
def planned_layers() -> nn.Module:
    torch.manual_seed(0)
    return rewrite(Layers(), [], torch.randn(64, 8), memory_budget=1.0).train()


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:.*without the memory plan:rewriter.errors.RewriteWarning")
def test_a_planned_step_follows_what_changes_after_it(name: str, planned_layers: nn.Module) -> None:
    x = torch.randn(64, 8)
    model = copy.deepcopy(planned_layers)
    eager = Layers().train()
    eager.load_state_dict(model.state_dict())
    equal(exact_step(model, x), exact_step(eager, x))
    for twin in (model, eager):
        CHANGES[name](twin)
    equal(exact_step(model, x), exact_step(eager, x))


def test_a_step_that_changes_over_and_over_is_said_and_stays_planned(
    planned_layers: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewriter.planner.apply.training.MOST", 2)
    model, x = copy.deepcopy(planned_layers), torch.randn(64, 8)
    exact_step(model, x)
    for p, warns in ((0.2, False), (0.3, True), (0.4, False)):
        model.drop.p = p
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            exact_step(model, x)
        assert [str(w.message) for w in said if "planned 2 times" in str(w.message)] == [
            w for w in [str(w.message) for w in said] if warns
        ]
    assert vars(model)["_rewriter"].memory.traces == 2


class Heads(nn.Module):
    """Two heads, one of which is a view, and a parameter that no result needs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.a(h), self.b(h).view(-1, 2, 3)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_heads_that_the_loss_does_not_use_get_no_gradient(used: tuple[int, ...]) -> None:
    original, x = Heads(), torch.randn(32, 8)
    model = rewrite(original, [], x, memory_budget=1.0)
    grads = []
    for twin in (model.train(), original.train()):
        results = twin(x)
        sum(results[i].square().sum() for i in used).backward()
        grads.append([p.grad for p in twin.parameters()])
    equal(*grads)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], dropout: float) -> None:
        super().__init__()
        self.rnn = kind(6, 8, num_layers=2, dropout=dropout, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


@pytest.mark.parametrize("kind", [pytest.param(nn.GRU, marks=pytest.mark.slow), nn.RNN])
def test_recurrent_layers_train_by_a_plan(kind: type[nn.RNNBase]) -> None:
    original, x = Recurrent(kind, 0.0), torch.randn(8, 2, 6)
    model = rewrite(original, [], x, memory_budget=1.0).train()
    for a, b in zip(exact_step(model, x), exact_step(original, x), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    ("kind", "dropout", "why"),
    [(nn.LSTM, 0.0, "no backward"), (nn.LSTM, 0.3, "no backward"),
     (nn.GRU, 0.3, "without the dropout"), (nn.RNN, 0.3, "without the dropout")],
)  # fmt: skip
def test_recurrent_layers_that_pytorch_traces_wrongly_are_refused(
    kind: type[nn.RNNBase], dropout: float, why: str
) -> None:
    with pytest.raises(OptionError, match=why):
        rewrite(Recurrent(kind, dropout), [], torch.randn(8, 2, 6), memory_budget=1.0)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).detach()


def test_a_model_without_a_backward_is_refused() -> None:
    for plan in (plan_memory, lambda m, x: rewrite(m, [], x, memory_budget=1.0)):
        with pytest.raises(OptionError, match="no result of the model depends on a parameter"):
            plan(Detached(), torch.randn(3, 4))


def test_strided_and_double_inputs_are_planned(planned_layers: nn.Module) -> None:
    wide = torch.randn(8, 64).t()
    for model in (planned_layers, rewrite(Layers(), [], wide, memory_budget=1.0).train()):
        eager = Layers().train()
        eager.load_state_dict(model.state_dict())
        for x in (wide, wide.contiguous(), torch.randn(64, 16)[:, ::2]):
            equal(exact_step(model, x), exact_step(eager, x))
    double = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double()
    x = torch.randn(4, 8).double()
    model = rewrite(double, [], x, memory_budget=1.0).train()
    equal(exact_step(model, x), exact_step(double, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_refusal_is_the_last_and_only_thing_that_a_user_sees() -> None:
    x = torch.randn(64, 24)
    compiled = torch.compile(
        mlp(), backend="rewriter", options={"memory_budget": 10, "inner": "aot_eager"}
    )
    for call in (lambda: rewrite(mlp(), [], x, memory_budget=10), lambda: compiled(x)):
        with pytest.raises(OptionError) as refused:
            call()
        text = "".join(traceback.format_exception(refused.value))
        last = text.strip().splitlines()[-1]
        assert last.startswith("rewriter.errors.OptionError: memory_budget: 10 bytes is not enough")
        assert "During handling" not in text
        assert "_functorch" not in text


def test_a_step_without_its_plan_says_so(planned_layers: nn.Module) -> None:
    x = torch.randn(64, 8)

    def compiled(model: nn.Module) -> Tensor:
        return torch.compile(model, backend="aot_eager", fullgraph=True)(x)

    def autocast(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    def hooked(model: nn.Module) -> Tensor:
        model.fc.register_forward_hook(lambda *_: None)
        return model(x)

    def ungraphed(model: nn.Module) -> Tensor:
        vars(model)["_rewriter"].programs.pop(True, None)
        return model(x)

    for call in (compiled, hooked, ungraphed, autocast):
        model = copy.deepcopy(planned_layers)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with torch.no_grad():
                model(x)
            assert not said
            for _ in range(2):
                call(model).sum().backward()
        about = [w for w in said if "without the memory plan" in str(w.message)]
        assert len(about) == (0 if call is autocast else 1)
    assert model.report.forms[-1].planned == 2  # autocast: a form with a plan of its own


def test_threads_may_train_at_the_same_time(planned_layers: nn.Module) -> None:
    model, errors = copy.deepcopy(planned_layers), []

    def work(rows: int) -> None:
        try:
            for _ in range(10):
                torch.autograd.grad(model(torch.randn(rows, 8)).sum(), list(model.parameters()))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (64, 64, 32, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("budget", [1.0, 0.8])
def test_half_precision_dropout_rounds_as_eager_mode(budget: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8).bfloat16()
    original = Layers().bfloat16().train()
    original.scale = original.scale.bfloat16()
    model = rewrite(original, [], x, memory_budget=budget).train()
    equal(exact_step(model, x), exact_step(original, x))
