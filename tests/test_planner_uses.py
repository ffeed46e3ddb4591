"""Memory plans where others meet them: several processes, Inductor, checkpoint policies, lossy
forms, models of transformers, and calls that are unlike the example."""

from __future__ import annotations

import copy
import functools
import os
import pathlib
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_reordered
from saving import saved_bytes
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.testing import assert_close
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from rewriter import MemoryBudget, OptionError, plan_memory, rewrite
from rewriter.errors import RewriteWarning, SignatureError
from rewriter.planner import MemoryPlan, inductor_partitioner, partitioner
from rewriter.planner.search.plan import ValueDecision

WORKER = """
import sys, torch, torch.distributed as dist
from torch import nn
import rewriter

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
x = torch.randn(128, 16, generator=torch.Generator().manual_seed(rank))

def trained(how, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(),
                        nn.Linear(64, 8))
    model = rewriter.rewrite(net, [], x, **options).train()
    if how == "ddp":
        whole = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        whole = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        whole(x).square().mean().backward()
        optimizer.step()
    full = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
    memory = vars(model)["_rewriter"].memory
    tensors = [t for p in model.parameters() for t in (p.grad, p)]
    return [full(t) for t in tensors], memory

for how in ("ddp", "fsdp2"):
    plain, _ = trained(how)
    planned, memory = trained(how, memory_budget=0.85)
    for a, b in zip(planned, plain, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text: f"{how}: {text}")
    assert memory.plan.peak < memory.plan.default_peak, how
    assert memory.traces >= 1, how
dist.destroy_process_group()
print("same gradients")
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_processes(tmp_path: pathlib.Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd="/",
        )
        for rank in range(2)
    ]  # fmt: skip
    for run in runs:
        out, errors = run.communicate(timeout=150)
        assert run.returncode == 0, errors[-3000:]
        assert out.strip() == "same gradients"


# ---- compilers ---------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x)), approximate="tanh")).square().mean()


@pytest.fixture(scope="module")
def inductor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The step under Inductor, compiled at its own partition and at a plan of ours."""
    torch.manual_seed(0)
    model, x, plans = Wide(), torch.randn(256, 32), []
    held = [*model.parameters(), x]
    model(x).backward()
    found: dict[str, Any] = {"wanted": [p.grad for p in model.parameters()], "plans": plans}
    own = inductor_partitioner(0.7, on_plan=plans.append)
    cache = str(tmp_path_factory.mktemp("inductor"))  # empty: nothing of an earlier run is in it
    for name, options in (("default", {}), ("planned", {"custom_partitioner_fn": own})):
        torch._dynamo.reset()
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
            for turn in range(2 if options else 1):  # once more from the caches
                torch._dynamo.reset()
                model.zero_grad()
                compiled = torch.compile(model, backend="inductor", options=options)
                saved, loss = saved_bytes(lambda step=compiled: step(x), held)
                loss.backward()
                found[name, turn] = saved, [p.grad for p in model.parameters()]
    torch._dynamo.reset()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("turn", [0, 1])
def test_inductor_takes_the_plan(inductor: dict[str, Any], turn: int) -> None:
    assert inductor["plans"]
    plan = inductor["plans"][0]
    assert plan.peak < plan.default_peak
    saved, gradients = inductor["planned", turn]
    assert saved < inductor["default", 0][0]
    for a, b in zip(gradients, inductor["wanted"], strict=True):
        assert_reordered(a, b)


def test_inductors_cache_tells_budgets_apart() -> None:
    one, same, other = (inductor_partitioner(b) for b in (0.6, 0.6, 0.5))
    assert one.uuid() == same.uuid() != other.uuid()
    assert inductor_partitioner(0.6, lossy=True).uuid() != one.uuid()
    by_wish = (inductor_partitioner(MemoryBudget(step_time=t)).uuid() for t in (1.1, 1.2))
    assert len({one.uuid(), *by_wish}) == 3
    assert pickle.loads(pickle.dumps(one)).uuid() == one.uuid()
    assert copy.deepcopy(one).uuid() == one.uuid()


def test_a_policy_that_saves_is_obeyed() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(16, 64), nn.Linear(64, 16)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op is torch.ops.aten.gelu.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def inner(x: Tensor) -> Tensor:
        return second(torch.tanh(F.gelu(first(x))))

    def model(x: Tensor) -> Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(inner, x, use_reentrant=False, context_fn=contexts).sin().sum()

    plans: list[MemoryPlan] = []
    part = partitioner(1.0, on_plan=plans.append)
    nop = aot_autograd(fw_compiler=lambda m, _: make_boxed_func(m.forward), partition_fn=part)
    x = torch.randn(64, 16, requires_grad=True)
    model(x).backward()
    wanted, x.grad = x.grad, None
    torch.compile(model, backend=nop)(x).backward()
    torch._dynamo.reset()
    assert_close(x.grad, wanted)
    (plan,) = plans
    actions = {v.op: v.action for v in plan.values}
    assert actions["aten.gelu"] == "kept"
    assert actions["aten.tanh"] == "recomputed"


# ---- lossy -------------------------------------------------------------------------------------


def mlp(depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Linear(64, 64), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(64, 8))


@pytest.mark.slow
def test_lossy_plans_within_a_bound() -> None:
    x = torch.randn(512, 64)
    least = plan_memory(mlp(), x).curve[-1].peak
    peak = int(0.95 * least)
    with pytest.raises(OptionError, match=f"smallest peak found is {least:,} bytes"):
        rewrite(mlp(), [], x, memory_budget=peak)

    def plan(bound: float, **options: Any) -> MemoryPlan:
        wish = MemoryBudget(peak=peak, lossy=True, gradient_error=bound, **options)
        model = rewrite(mlp(), [], x, memory_budget=wish)
        found = vars(model)["_rewriter"].memory.plan
        (step,) = (s for s in model.report.steps if s.name == "memory plan")
        notes = " ".join(step.notes)
        assert "relative error of the gradients on the example" in notes
        assert found.peak <= peak
        assert 0 < found.gradient_error <= bound
        return found

    rough = plan(0.5, forms=("int8",))
    assert any(v.reason == "as int8" for v in rough.values)
    both = plan(0.5 * rough.gradient_error, forms=("bf16", "int8"))
    assert not any(v.reason == "as int8" for v in both.values)
    assert any(v.reason == "as bf16" for v in both.values)
    with pytest.raises(OptionError, match=r"more than gradient_error=1e-09: allow more"):
        plan(1e-9)


def test_a_lossy_model_trains() -> None:
    x = torch.randn(512, 64)
    wish = MemoryBudget(peak=0.55, lossy=True)
    rough, exact = rewrite(mlp(), [], x, memory_budget=wish).train(), mlp()
    for model in (rough, exact):
        model(x).square().sum().backward()
    mine = torch.cat([p.grad.flatten() for p in rough.parameters()])
    theirs = torch.cat([p.grad.flatten() for p in exact.parameters()])
    assert F.cosine_similarity(mine, theirs, dim=0) > 0.999
    assert not torch.equal(mine, theirs)


# ---- calls -------------------------------------------------------------------------------------


def twins(
    make: Callable[[], nn.Module], inputs: Any, budget: Any = 0.8
) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = rewrite(make(), [], inputs, memory_budget=budget).train()
    plain = copy.deepcopy(model)
    vars(plain)["_rewriter"].memory = None
    return model, plain


def test_inputs_that_require_gradients() -> None:
    x = torch.randn(256, 64)
    model, plain = twins(mlp, x.requires_grad_())
    found = []
    for twin in (model, plain):
        own = x.detach().clone().requires_grad_()
        twin(own * 2).square().sum().backward()  # no leaf of the graph
        found.append([own.grad, *(p.grad for p in twin.parameters())])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)
    assert vars(model)["_rewriter"].memory.traces == 1
    model(x.detach()).sum().backward()  # no gradient wanted: another trace
    assert vars(model)["_rewriter"].memory.traces == 2


class Reshaping(nn.Module):
    """Holds for rows in pairs only; other numbers take another trace or Python."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)).view(2, -1, 32).transpose(0, 1))


def test_other_sizes() -> None:
    model, plain = twins(Reshaping, torch.randn(128, 16), 1.0)
    memory = vars(model)["_rewriter"].memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewriteWarning)
        for rows in (128, 64, 30, 2):
            x = torch.randn(rows, 16)
            for twin in (model, plain):
                twin.zero_grad()
                twin(x).square().sum().backward()
            for a, b in zip(model.parameters(), plain.parameters(), strict=True):
                assert_close(a.grad, b.grad)
    assert 1 <= memory.traces <= 2


def test_a_trace_says_which_sizes_it_holds_for() -> None:
    model, plain = twins(mlp, torch.randn(128, 64))
    memory = vars(model)["_rewriter"].memory
    state = vars(model)["_rewriter"]
    x, rows = torch.randn(128, 64), state.signature.dims[True].shapes
    first = memory.traced(model, state.programs[True], [x], rows)
    assert memory.traces == 1
    assert first.serves([torch.randn(77, 64)])
    assert not first.serves([torch.randn(77, 63)])
    for rows in (77, 1):
        x = torch.randn(rows, 64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RewriteWarning)
            assert_close(model(x), plain(x))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.body(x)
        return y if scale is None else y * scale


def test_calls_of_another_signature() -> None:
    x = torch.randn(256, 64)
    model, plain = twins(Optional, x)
    found = model(x, scale=torch.tensor(2.0))  # a form of its own, planned too
    assert_close(found, 2 * plain(x))
    assert [form.planned for form in model.report.forms][-1] == 1
    strict = rewrite(Optional(), [], x, memory_budget=0.8, strict_signature=True).train()
    strict(x).sum().backward()
    with pytest.raises(SignatureError):
        strict(x, scale=torch.tensor(2.0))


class Selecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return h[h.sum(1) > 0].sum()


def test_sizes_that_depend_on_data_are_refused() -> None:
    with pytest.raises(OptionError, match="depends on the data|whole model as one train graph"):
        rewrite(Selecting(), [], torch.randn(32, 16), memory_budget=0.9)


@pytest.mark.slow
def test_a_model_of_transformers_keeps_its_output_class() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=100, max_position_embeddings=64,
    )  # fmt: skip
    ids = torch.randint(3, 100, (4, 24))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model, plain = twins(lambda: BertModel(config), inputs, 0.7)
    results = []
    for twin in (model, plain):
        torch.manual_seed(5)
        result = twin(**inputs)
        assert type(result).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
        (result.last_hidden_state.square().sum() + result.pooler_output.sum()).backward()
        results.append(result)
    assert_close(results[0].last_hidden_state, results[1].last_hidden_state)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def test_a_plan_is_told_by_layer_and_line() -> None:
    model = nn.Sequential(Residual(), Residual())
    x = torch.randn(500, 16)
    plan = plan_memory(model, x)
    assert {v.layer for v in plan.values} == {f"{i}{n}" for i in "01" for n in ("", ".up")}
    assert all(v.line.startswith("test_planner_uses.py:") for v in plan.values)
    lines = str(plan).splitlines()
    table = {line.split()[0]: line.split() for line in lines[3 : lines.index("", 3)]}
    assert table["0.up"][1:-1] == ["0.064", "MB"] * 2  # kept, and saved
    assert MemoryPlan.from_dict(plan.to_dict()) == plan


def test_a_long_plan_is_printed_short_and_saved_whole(tmp_path: pathlib.Path) -> None:
    values = [ValueDecision(f"v{i}", "mm", "kept", "", 10**6 + i, i, "m.py:1", f"l.{i}") for i in
              range(50)]  # fmt: skip
    values[3] = replace(values[3], action="recomputed", saved=0)
    plan = MemoryPlan("all", 1, 1, "mm", 1, 1, 0.0, 0, 0.0, 0.0, values)
    text = str(plan)
    assert len(text.splitlines()) == 2 + (1 + 20 + 2) + 1 + (1 + 20 + 1)
    assert "l.49                1 MB            –   4.9e-05 MB  m.py:1" in text
    assert "… 30 more          29 MB         1 MB  0.000432 MB  m.py:1" in text
    assert "all                49 MB         1 MB   0.00122 MB\n" in text
    assert "… 30 more, together 30 MB: plan.values has all" in text
    plan.save(tmp_path / "plan.txt")
    whole = (tmp_path / "plan.txt").read_text()
    assert "more" not in whole.replace("more time", "")
    assert all(f"\n{v.layer} " in whole and f"\n{v.value} " in whole for v in values)
