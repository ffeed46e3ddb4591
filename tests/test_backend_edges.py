"""`backend="rewriter"` where Dynamo's code is shared, cut in parts, or given names and writes that
nobody expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from closeness import sqnr
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close

import rewriter
from rewriter import MemoryBudget, RewriteWarning, rewrite
from rewriter.compiler.inner import own_ops
from rewriter.passes import Monarch, Quadratic, Quantize, TopK

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

INT8 = [Quantize("int8-dynamic")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(rows: int = 4) -> Tensor:
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(rows))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, passes: Sequence[Any], inner: str = "eager", **options: Any) -> Any:
    own = {"passes": list(passes), "inner": inner, **options}
    return torch.compile(model, backend="rewriter", options=own)


# code that several models run


@pytest.mark.filterwarnings("ignore:.*were installed on")
def test_every_model_gets_new_layers_of_its_own() -> None:
    first, second, x = net(0), net(5), batch()
    wanted = rewrite(net(5), [Monarch(nblocks=2)])
    for model in (first, second):  # equal options: the code of the first serves the second
        compiled(model, [Monarch(nblocks=2)], install=True)(x)
    fast = compiled(second, [Monarch(nblocks=2)], install=True)
    assert_close(fast(x), wanted(x))
    first.zero_grad(), second.zero_grad()
    fast(x).square().sum().backward()
    assert all(p.grad is not None for p in second.parameters())
    assert all(p.grad is None for p in first.parameters())


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(net(seed) for seed in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


@pytest.mark.filterwarnings("ignore:.*were installed on", "ignore:The .grad attribute")
def test_every_block_gets_new_layers_of_its_own() -> None:
    model, x = Blocks(), batch()
    fast = compiled(model, [Quadratic()], install=True)
    for _ in range(2):
        found = fast(x)
    assert [type(b.up).__name__ for b in model.blocks] == 3 * ["QuadraticLinear"]
    assert_close(found, model(x))


def test_equal_options_share_reports() -> None:
    first, second, x = net(0).eval(), net(5).eval(), batch()
    with torch.no_grad():
        one, two = compiled(first, INT8), compiled(second, INT8)
        one(x)
        assert_close(two(x), rewrite(second, INT8)(x))
    assert len(rewriter.report_of(one)) == len(rewriter.report_of(two)) == 1


# names


class Private(nn.Module):
    """Modules that it does not register, of equal names inside."""

    def __init__(self) -> None:
        super().__init__()
        self._held = [net(1), net(2)]
        self._step = (net(3),)

    def forward(self, x: Tensor) -> Tensor:
        for model in (*self._held, *self._step):
            x = model(x)
        return x


def test_unregistered_modules_keep_apart() -> None:
    model, x = Private().eval(), batch()
    fast = compiled(model, INT8)
    wanted = x
    for part in (*model._held, *model._step):
        wanted = rewrite(part.eval(), INT8)(wanted)
    with torch.no_grad():
        assert_close(fast(x), wanted)
    (report,) = rewriter.report_of(fast)
    names = {d.site for d in report.replaced}
    assert names == {f"{p}.{n}" for p in ("_held.0", "_held.1", "_step.0") for n in ("up", "down")}


class Keys(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(12, 12) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = part(x)
        return x


def test_keys_that_are_no_names() -> None:
    torch.manual_seed(0)
    model, x = Keys("it's", "that's", "a b").eval(), batch()
    fast, wanted = compiled(model, INT8, inner="aot_eager"), rewrite(model, INT8)
    with torch.no_grad():
        assert_close(fast(x), wanted(x))
        strange = Keys('b"', "b_").eval()
        assert sqnr(compiled(strange, INT8)(x), strange(x)) > 30
    found = [d.site for d in rewriter.report_of(fast)[0].replaced]
    assert found == [d.site for d in wanted.report.replaced]
    assert len(found) == 3


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        torch._dynamo.graph_break()
        return self.down(torch.relu(x))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Broken(), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


@pytest.mark.parametrize("where", ["block.up", "head", "block.*", "*.down"])
def test_parts_of_the_code_know_the_models_names(where: str) -> None:
    torch.manual_seed(0)
    model, x = Outer().eval(), batch()
    fast, wanted = compiled(model, INT8, where=where), rewrite(model, INT8, where=where)
    with torch.no_grad():
        assert_close(fast(x), wanted(x))
    found = [d.site for report in rewriter.report_of(fast) for d in report.replaced]
    assert found == [d.site for d in wanted.report.replaced]


def test_a_name_that_no_part_has() -> None:
    fast = compiled(Outer().eval(), INT8, where="block.upp")
    with pytest.raises(BackendCompilerFailed, match="did you mean 'block.up'"), torch.no_grad():
        fast(batch())


# weights


def fused(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    version = model.get_parameter("up.weight")._version
    model(x).square().sum().backward()
    optimizer.step()
    assert model.get_parameter("up.weight")._version == version  # torch does not count it


def through_data(model: nn.Module, x: Tensor) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)


def moved_twice(model: nn.Module, x: Tensor) -> None:
    for _ in range(2):
        for p in model.parameters():
            p.data = p.data * 1.5


def as_a_vector(model: nn.Module, x: Tensor) -> None:
    vector = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(vector, model.parameters())
    vector.mul_(1.5)


def one_value_and_a_step(model: nn.Module, x: Tensor) -> None:
    other = nn.Parameter(torch.ones(1))
    model.get_parameter("up.weight").data.view(-1)[5] += 3.0
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=0.1).step()


@pytest.mark.parametrize(
    "change", [fused, through_data, moved_twice, as_a_vector, one_value_and_a_step]
)
def test_writes_that_torch_does_not_count(change: Callable[[nn.Module, Tensor], None]) -> None:
    model, x = net().eval(), batch()
    fast = compiled(model, INT8)
    for _ in range(3):
        with torch.no_grad():
            assert_close(fast(x), rewrite(model, INT8)(x))
        change(model, x)
    with torch.no_grad():
        assert_close(fast(x), rewrite(model, INT8)(x))


def test_weights_that_are_no_numbers_are_derived_once() -> None:
    from rewriter.compiler.derived import Derived, Weights

    weight = nn.Parameter(torch.full((4, 4), float("nan")))
    weights = Weights([0], lambda inputs: Derived(lambda: None, []))
    for _ in range(3):
        weights.of([weight])
    assert weights.times == 1


# what a compiler's cache has to know


@pytest.mark.parametrize("rewrite_pass", [Monarch(nblocks=2), Quadratic(), TopK(k=8), INT8[0]])
def test_our_ops_are_seen_in_a_rewritten_model(rewrite_pass: Any) -> None:
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(own_ops(module))
        return module.forward

    torch.compile(rewrite(net(), [rewrite_pass]).eval(), backend=backend)(batch())
    assert seen
    assert all(name.startswith("rewriter.") for name in seen)


# gradients


def test_gradients_switched_on_inside() -> None:
    class Inside(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return super().forward(x)

    fast = compiled(Inside(), INT8)
    with pytest.raises(BackendCompilerFailed, match="would replace trainable"), torch.no_grad():
        fast(batch())


def test_lossy_plans_say_that_nobody_measured_the_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(64, 64), nn.GELU())])
    x = torch.randn(512, 64)
    budget = MemoryBudget(0.66, lossy=True, forms=("int8",))
    fast = compiled(model, [], inner="aot_eager", memory_budget=budget)
    fast(x).square().sum().backward()
    (step,) = [s for s in rewriter.report_of(fast)[0].steps if s.name == "memory plan"]
    assert not step.exact
    assert any("error of the gradients is not known" in note for note in step.notes)


def test_derivatives_by_torch_func_are_refused() -> None:
    model = net().eval().requires_grad_(False)
    fast = compiled(torch.func.grad(lambda x: model(x).square().sum()), INT8)
    with pytest.raises(BackendCompilerFailed, match=r"torch\.func\.grad"):
        fast(batch())


# limits


def test_dynamos_limit_is_said() -> None:
    own = {"passes": INT8, "inner": "eager"}
    fast = torch.compile(net().eval(), backend="rewriter", options=own, dynamic=False)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        fast(batch(3))
        with pytest.warns(RewriteWarning, match="compiled 2 times, which is Dynamo's limit"):
            fast(batch(4))
    notes = rewriter.report_of(fast)[1].capture.notes
    assert any("runs as it was written, without passes" in note for note in notes)
