"""The backend where people use it: generation, training loops, data parallelism; and `export`."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import assert_reordered
from torch import Tensor, nn
from torch.testing import assert_close

import rewriter
from rewriter import CaptureError, OptionError, rewrite
from rewriter.passes import Monarch, Quantize, TopK

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
INT8 = [Quantize("int8-dynamic")]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_generation_with_a_static_cache() -> None:
    """Prefill and decoding are compiled, and give the tokens of the rewritten model."""
    model, ids = llama(), torch.tensor([[1, 5, 9, 3]])
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "cache_implementation": "static",
        "disable_compile": True,
    }  # fmt: skip
    want = rewrite(model, INT8, {"input_ids": ids}).generate(ids, **options)
    plain = model.generate(ids, **options)
    backend = rewriter.backend(INT8, inner="aot_eager")
    model.forward = torch.compile(model.forward, backend=backend)
    with torch.no_grad():
        found = model.generate(ids, **options)
    assert torch.equal(found, want)
    reports = rewriter.last_reports()
    assert 1 <= len(reports) <= 3
    assert all(len(r.replaced) == 2 * 7 + 1 for r in reports)
    assert plain.shape == found.shape


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        x = x + self.down(torch.relu(self.up(x)))
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def trained(model: nn.Module, run: Any, steps: int = 6) -> list[float]:
    """A loop as trainers write it: accumulation, clipping, a schedule, evaluation in between."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    rng, losses = torch.Generator().manual_seed(0), []
    for step in range(steps):
        model.train()
        for _ in range(2):
            ids = torch.randint(0, 32, (4, 6), generator=rng)
            (run(ids, ids)["loss"] / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 3 == 2:
            model.eval()
            with torch.no_grad():
                losses.append(float(run(ids, ids)["loss"]))
    return losses


def test_a_training_loop_like_a_trainers() -> None:
    passes = [TopK(k=16)]
    first, second = Text(), rewrite(Text(), passes)
    fast = torch.compile(
        first, backend="rewriter", options={"passes": passes, "inner": "aot_eager"}
    )
    assert trained(first, fast) == pytest.approx(trained(second, second), rel=1e-4)
    notes = [n for r in rewriter.report_of(fast) for n in r.capture.notes]
    assert any("compilation 2 of this code" in n for n in notes)  # training, then evaluation


def test_a_rewritten_model_trains_under_the_backend() -> None:
    passes = [Monarch(nblocks=2)]
    first, second = rewrite(Text(), passes), rewrite(Text(), passes)
    fast = torch.compile(first, backend="rewriter", options={"inner": "aot_eager"})
    assert trained(first, fast) == pytest.approx(trained(second, second), rel=1e-4)


WORKER = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import rewriter
from rewriter.passes import TopK, Quantize

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
torch.manual_seed(0)
class Net(nn.Module):  # Dynamo skips a Sequential that DDP calls: it is torch's own code
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
        self.out = nn.Linear(8, 8)
    def forward(self, x):
        return self.out(self.down(torch.relu(self.up(x))))
def net(width=16):
    torch.manual_seed(0)
    return Net(width)
x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
model = rewriter.rewrite(net(), [TopK(k=4)])
fast = torch.compile(DistributedDataParallel(model), backend="rewriter",
                     options={"inner": "aot_eager"})
fast(x).square().sum().backward()
alone = rewriter.rewrite(net(), [TopK(k=4)])
sum(alone(torch.randn(4, 8, generator=torch.Generator().manual_seed(r))).square().sum()
    for r in range(2)).backward()
for a, b in zip(model.parameters(), alone.parameters()):
    torch.testing.assert_close(a.grad, b.grad / 2)
wide = DistributedDataParallel(net(40_000))  # more than the first bucket's 1 MB
fast = torch.compile(wide, backend="rewriter",
                     options={"inner": "aot_eager", "passes": [TopK(k=4)]})
try:
    fast(x)
except torch._dynamo.exc.BackendCompilerFailed as error:
    assert "before wrapping" in str(error), error
else:
    raise AssertionError("passes ran over buckets")
for buckets in (True, False):  # one bucket is the whole graph
    torch._dynamo.config.optimize_ddp = buckets
    torch._dynamo.reset()
    own = net()
    fast = torch.compile(DistributedDataParallel(own), backend="rewriter",
                         options={"inner": "aot_eager", "passes": [TopK(k=4)]})
    fast(x).square().sum().backward()
    made = [len(r.replaced) for r in rewriter.report_of(fast)]
    assert set(made) == {1}, made  # torch 2.14 compiles the graph twice where it makes no buckets
    for a, b in zip(own.parameters(), alone.parameters()):
        torch.testing.assert_close(a.grad, b.grad / 2)
dist.destroy_process_group()
print("same gradients")
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_data_parallel_in_two_processes(tmp_path: pathlib.Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")],
            env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for run in runs:
        out, error = run.communicate(timeout=170)
        assert out.strip() == "same gradients", error[-3000:]


# export


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
LOAD = """
import sys, torch
program = torch.export.load(sys.argv[1])
x, want = torch.load(sys.argv[2])
assert not any(m.split('.')[0] == 'rewriter' for m in sys.modules)
torch.testing.assert_close(program.module()(x), want)
if len(sys.argv) > 3:
    torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[3])(x), want)
print("same")
"""


def loaded_elsewhere(program: Any, package: Any, want: Tensor, folder: pathlib.Path) -> str:
    torch.export.save(program, folder / "program.pt2")
    torch.save((X, want), folder / "want.pt")
    paths = [folder / "program.pt2", folder / "want.pt", *([package] if package else [])]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), *map(str, paths)],
        capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    return run.stdout.strip() or run.stderr


@pytest.mark.slow
def test_a_standalone_package_runs_without_this_one(tmp_path: pathlib.Path) -> None:
    made = rewriter.export(
        net(), ["monarch:nblocks=2"], X, package=tmp_path / "m.pt2", standalone=True
    )
    want = rewrite(net(), [Monarch(nblocks=2)])(X).detach()
    assert made.stands_alone
    assert made.package is not None
    assert loaded_elsewhere(made.program, made.package, want, tmp_path) == "same"
    assert "exported: it loads and runs with torch alone" in made.report.capture.notes


@pytest.mark.parametrize("text", ["quantize", "topk:k=8", "quadratic"])
def test_every_op_can_be_written_out(text: str, tmp_path: pathlib.Path) -> None:
    made = rewriter.export(net(), [text], X, standalone=True)
    want = rewrite(net(), [rewriter.recipe.parse.parse_pass(text)])(X).detach()
    assert made.stands_alone
    assert_reordered(made.program.module()(X), want)


def test_an_export_says_which_ops_it_needs() -> None:
    made = rewriter.export(net(), INT8, X)
    assert made.own_ops == {"rewriter::int8_linear": 2}
    assert not made.stands_alone
    assert repr(made) == "<Exported Sequential: a program, calls 2 own ops, see needs>"
    assert "rewriter::int8_linear (2 calls)" in made.needs
    assert "import rewriter.kernels.int8_linear before" in made.needs
    assert torch.equal(made.program.module()(X), rewrite(net(), INT8)(X))


def test_export_with_open_sizes() -> None:
    made = rewriter.export(net(), INT8, X, dynamic_shapes=({0: torch.export.Dim.AUTO},))
    x = torch.randn(9, 16)
    assert_close(made.program.module()(x), rewrite(net(), INT8)(x))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_export_refuses() -> None:
    with pytest.raises(CaptureError, match="needs example_inputs"):
        rewriter.export(net())
    with pytest.raises(OptionError, match="suffix must be .pt2"):
        rewriter.export(net(), [], X, package="m.so")
    with pytest.raises(OptionError, match="there is no directory"):
        rewriter.export(net(), [], X, package="/nowhere/m.pt2")
    with pytest.raises(OptionError, match="inductor= is for the package"):
        rewriter.export(net(), [], X, inductor={"max_autotune": True})
    with pytest.raises(OptionError, match="passes must be a list"):
        rewriter.export(net(), "quantize", X)
    with pytest.raises(CaptureError, match="Sequential cannot be exported whole"):
        rewriter.export(nn.Sequential(nn.Linear(16, 16), Branch()), [], X)
