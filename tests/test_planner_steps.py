"""A training step of a model with a memory budget runs by its plan, or says why not; and its
gradients are those of eager mode either way."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _tracker import Tracker
from closeness import assert_close
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad

from rewriter import MemoryBudget, PlanError, plan_memory, rewrite
from rewriter.errors import OptionError, RewriteWarning
from rewriter.passes import Quadratic

X = torch.linspace(-1, 1, 128).view(16, 8)


class Model(nn.Module):
    """Dropout, running statistics, and an argument that is rarely given."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(8, 32), nn.Dropout(0.2), nn.Linear(32, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.norm(self.down(self.drop(torch.tanh(self.up(x)))))
        return h if scale is None else h * scale


@pytest.fixture(scope="module")
def twins() -> tuple[nn.Module, nn.Module]:
    """(eager, planned), the latter after a first planned step."""
    torch.manual_seed(0)
    eager = Model().train()
    planned = rewrite(eager, [], X, memory_budget=1.0).train()
    return eager, planned


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def loss(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return model(*args, **kwargs).square().mean()


def both(
    twins: tuple[nn.Module, nn.Module], work: Callable[[nn.Module], Any]
) -> tuple[Any, list[str]]:
    """The planned twin after `work`, which gave what it gives in eager mode; the warnings."""
    found, said = [], []
    for twin in map(copy.deepcopy, twins):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(5)
            found.append((*work(twin), *(b.clone() for b in twin.buffers())))
        said = [str(w.message) for w in caught if w.category is RewriteWarning]
    wanted, got = found
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    return twin, said


# ---- by the plan -------------------------------------------------------------------------------


def step(*args: Any, **kwargs: Any) -> Callable[[nn.Module], list[Any]]:
    def work(model: nn.Module) -> list[Any]:
        loss(model, *args, **kwargs).backward()
        return gradients(model)

    return work


def of_inputs(model: nn.Module) -> list[Any]:
    leaf = X.clone().requires_grad_()
    loss(model, leaf * 2).backward()
    return [*gradients(model), leaf.grad]


def accumulated(model: nn.Module) -> list[Any]:
    for part in X.chunk(4):
        loss(model, part).backward()
    return gradients(model)


def entwined(model: nn.Module) -> list[Any]:
    (model(X) * model(2 * X)).mean().backward()
    return gradients(model)


def of_others(model: nn.Module) -> list[Any]:
    given = {n: p.detach().mul(2).requires_grad_() for n, p in model.named_parameters()}
    result = functional_call(model, given, (X,)).square().mean()
    return list(torch.autograd.grad(result, list(given.values())))


def in_a_thread(model: nn.Module) -> list[Any]:
    result = loss(model, X)
    worker = threading.Thread(target=result.backward)
    worker.start()
    worker.join()
    return gradients(model)


def loaded(model: nn.Module) -> list[Any]:
    model.load_state_dict({n: t * 2 for n, t in model.state_dict().items()}, assign=True)
    return step(X)(model)


def in_bfloat16(model: nn.Module) -> list[Any]:
    return step(X.bfloat16())(model.bfloat16())


def deterministic(model: nn.Module) -> list[Any]:
    torch.use_deterministic_algorithms(True)
    try:
        return step(X)(model)
    finally:
        torch.use_deterministic_algorithms(False)


def weight_hook(model: Any) -> list[Any]:
    model.up.weight.register_hook(lambda g: 2 * g)
    return step(X)(model)


def hook_of_the_whole(model: nn.Module) -> list[Any]:
    model.register_forward_hook(lambda *given: given[-1] * 3)
    return step(X)(model)


def written_over(model: nn.Module) -> list[Any]:
    model(X).add_(1).square().mean().backward()
    return gradients(model)


BY_PLAN: dict[str, tuple[Callable[[nn.Module], list[Any]], int]] = {
    "another size": (step(X[:5]), 1),
    "strided inputs": (step(torch.cat([X, X], 1)[:, ::2]), 1),
    "a new keyword": (step(X, scale=torch.full((8,), 2.0)), 1),
    "gradients of inputs": (of_inputs, 1),
    "accumulation": (accumulated, 4),
    "two calls in one loss": (entwined, 2),
    "other weights": (of_others, 1),
    "a backward in another thread": (in_a_thread, 1),
    "after load_state_dict": (loaded, 1),
    "after .to(dtype)": (in_bfloat16, 1),
    "deterministic algorithms": (deterministic, 1),
    "a hook on a weight": (weight_hook, 1),
    "a hook on the whole": (hook_of_the_whole, 1),
    "a result written over": (written_over, 1),
}


@pytest.mark.parametrize("name", BY_PLAN)
def test_a_step_runs_by_its_plan(name: str, twins: tuple[nn.Module, nn.Module]) -> None:
    work, steps = BY_PLAN[name]
    model, said = both(twins, work)
    assert not said
    assert [(f.graph, f.python) for f in model.report.forms if f.calls] == [(0, 0)]
    assert sum(f.planned for f in model.report.forms) == steps


# ---- without it --------------------------------------------------------------------------------


def transformed(model: Any) -> list[Any]:
    names = dict(model.named_parameters())
    model.norm.eval()
    return list(grad(lambda own: loss(lambda x: functional_call(model, own, (x,)), X))(names)
                .values())  # fmt: skip


def forward_mode(model: Any) -> list[Any]:
    model.norm.eval()
    with forward_ad.dual_level():
        return list(forward_ad.unpack_dual(model(forward_ad.make_dual(X, torch.ones_like(X)))))


def traced(model: Any) -> list[Any]:
    model.norm.eval(), model.drop.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return [torch.jit.trace(model, X, check_trace=False)(2 * X).detach()]


class Marked(Tensor):
    """A subclass that computes as Tensor does."""


def of_a_subclass(model: nn.Module) -> list[Any]:
    for _ in range(2):
        loss(model, X.as_subclass(Marked)).backward()
    return [None if g is None else g.as_subclass(Tensor) for g in gradients(model)]


def inner_hook(model: Any) -> list[Any]:
    model.up.register_forward_hook(lambda *given: given[-1] * 3)
    return step(X)(model)


WITHOUT: dict[str, tuple[Callable[[nn.Module], list[Any]], str]] = {
    "torch.func": (transformed, "inside a transform of torch.func"),
    "forward mode": (forward_mode, "inside torch.autograd.forward_ad"),
    "a subclass of Tensor": (of_a_subclass, "is a Marked"),
    "a hook inside": (inner_hook, "up has hooks"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_step_without_its_plan_says_so_and_is_right(
    name: str, twins: tuple[nn.Module, nn.Module]
) -> None:
    work, why = WITHOUT[name]
    model, said = both(twins, work)
    assert len(said) == 1
    assert why in said[0]
    assert "without the memory plan" in said[0]
    assert sum(f.planned for f in model.report.forms) == 0


def test_a_step_that_cannot_be_planned_is_tried_once(
    twins: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tries = copy.deepcopy(twins[1]), []
    loss(model, X).backward()

    def fails(*_: Any) -> Any:
        tries.append(1)
        raise OptionError("no trace")

    monkeypatch.setattr("rewriter.planner.apply.training.trace", fails)
    model.norm.eps = 0.5
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            loss(model, X).backward()
    (warning,) = said
    assert "no trace: the training step runs without the memory plan" in str(warning.message)
    assert len(tries) == 1


# ---- a backward that comes again ---------------------------------------------------------------


def two_losses(model: nn.Module) -> list[Any]:
    result = model(X)
    result[:, :4].square().mean().backward(retain_graph=True)
    result[:, 4:].sin().mean().backward()
    return gradients(model)


def test_a_retained_graph_gives_the_same_gradients_and_says_what_it_costs(
    twins: tuple[nn.Module, nn.Module],
) -> None:
    model, said = both(twins, two_losses)
    assert len(said) == 1
    assert "retain_graph=True" in said[0]
    assert sum(f.planned for f in model.report.forms) == 1


def test_a_second_derivative_is_refused(twins: tuple[nn.Module, nn.Module]) -> None:
    model = copy.deepcopy(twins[1])
    for twin in (model, torch.nn.Sequential(model)):
        with pytest.raises(PlanError, match=r"create_graph=True.*rewrite without memory_budget"):
            torch.autograd.grad(loss(twin, X), list(model.parameters()), create_graph=True)


def test_two_backwards_of_one_graph_fail_as_in_eager_mode(
    twins: tuple[nn.Module, nn.Module],
) -> None:
    for twin in map(copy.deepcopy, twins):
        result = loss(twin, X)
        result.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            result.backward()


# ---- the peak ----------------------------------------------------------------------------------


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(16, 16), nn.GELU()))).train()


def peak(model: nn.Module, x: Tensor) -> int:
    """Measured, of a step."""
    model.zero_grad()
    with Tracker(given=[*model.parameters(), x]) as tracker:
        model(x).backward(torch.ones_like(x))
    return tracker.peak


def test_a_budget_in_bytes_holds_for_larger_batches_too() -> None:
    small, large = torch.randn(8, 16), torch.randn(256, 16)
    budget = plan_memory(deep(), large).curve[-1].peak
    model = rewrite(deep(), [], small, memory_budget=budget).train()
    assert peak(model, small) < budget
    model(large)
    assert peak(model, large) <= budget
    assert peak(model, large[:100]) <= budget
    assert vars(model)["_rewriter"].memory.traces == 2


def test_a_batch_that_no_plan_brings_within_the_budget_runs_with_a_warning() -> None:
    small, large = torch.randn(8, 16), torch.randn(256, 16)
    budget = plan_memory(deep(), small).default_peak
    model = rewrite(deep(), [], small, memory_budget=budget).train()
    with pytest.warns(RewriteWarning, match=rf"takes [\d,]+ bytes at the least \({budget:,}"):
        model(large).sum().backward()
    assert model.report.forms[0].planned == 1


def test_the_report_names_the_largest_planned_peak() -> None:
    x = torch.randn(256, 16)
    budget = plan_memory(deep(), x).curve[-1].peak
    model = rewrite(deep(), [], x, memory_budget=budget).train()
    measured = peak(model, x)
    peak(model, x[:1])
    found = model.report.forms
    assert max(f.planned_peak for f in found) == pytest.approx(measured, rel=0.01)
    assert "planned step with a peak of" in str(model.report)
    assert type(model.report).from_dict(model.report.to_dict()).forms == found


# ---- what has no plan, and what has ------------------------------------------------------------


class Maps(nn.Module):
    """What a function makes of a linear layer and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function, self.fc = function, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.fc, x)


REFUSED: dict[str, tuple[nn.Module, Tensor, str]] = {
    "only integers": (Maps(lambda fc, x: fc(x).argmax(-1)), X, "no result of the model depends"),
    "only None": (Maps(lambda fc, x: (fc(x), None)[1]), X, "no result of the model depends"),
    "no use of the parameters": (Maps(lambda _, x: x * 2), X, "no result of the model depends"),
    "no parameters": (nn.Tanh(), X, "no parameter requires a gradient"),
    "frozen": (
        Maps(lambda fc, x: fc(x)).requires_grad_(False),
        X.clone().requires_grad_(),
        "no parameter requires a gradient",
    ),
    "sizes that depend on data": (
        Maps(lambda fc, x: fc(x)[x[:, 0] > 0].sin()), X, "whole model as one train graph",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_training_step_to_plan_is_refused(name: str, lossy: bool) -> None:
    model, x, why = REFUSED[name]
    with pytest.raises(OptionError, match=why):
        rewrite(model, [], x, memory_budget=MemoryBudget(1.0, lossy=lossy))


PLANNED: dict[str, tuple[nn.Module, Tensor]] = {
    "float16": (Maps(lambda fc, x: fc(x).tanh()).half(), X.half()),
    "float64": (Maps(lambda fc, x: fc(x).tanh()).double(), X.double()),
    "complex": (Maps(lambda fc, x: torch.view_as_complex(fc(x).view(-1, 4, 2)).tanh()), X),
    "strided": (Maps(lambda fc, x: fc(x).tanh()), X.view(8, 16).t()),
    "expanded": (Maps(lambda fc, x: fc(x).tanh()), X[:1].expand(16, 8)),
    "nothing inside": (Maps(lambda fc, x: (fc(x)[:, :0] @ x[:, :0].t(), fc(x).tanh())), X),
    "integers beside": (Maps(lambda fc, x: (fc(x).tanh(), fc(x).argmax(-1))), X),
    "None beside": (Maps(lambda fc, x: {"loss": None, "a": fc(x).tanh(), "n": 3}), X),
    "a weight as result": (Maps(lambda fc, x: (fc(x).tanh(), fc.weight)), X),
}


@pytest.mark.parametrize("name", PLANNED)
def test_what_can_be_planned_is(name: str) -> None:
    original, x = PLANNED[name]
    model = rewrite(original, [], x, memory_budget=1.0).train()
    grads = []
    for twin in (model, copy.deepcopy(original).train()):
        result = twin(x)
        results = [result] if isinstance(result, Tensor) else list(
            result.values() if isinstance(result, dict) else result)  # fmt: skip
        sum(
            t.abs().square().sum() for t in results if isinstance(t, Tensor) and t.grad_fn
        ).backward()
        grads.append(gradients(twin))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert model.report.forms[0].planned == 1


# ---- recurrent layers --------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent layer over 4 steps, and a linear one."""

    def __init__(self, kind: Any, packed: bool = False, **options: Any) -> None:
        super().__init__()
        self.rnn, self.packed = kind(8, 8, batch_first=True, **options), packed
        width = (options.get("proj_size") or 8) * (2 if options.get("bidirectional") else 1)
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 4, 8)
        if not self.packed:
            return self.out(self.rnn(x)[0])
        rows = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3, 2, 1]), batch_first=True)
        padded = nn.utils.rnn.pad_packed_sequence(self.rnn(rows)[0], batch_first=True)
        return self.out(padded[0])


LSTM = "an LSTM as the kernel for inference"
UNPLANNED: dict[str, tuple[Recurrent, str]] = {
    "LSTM": (Recurrent(nn.LSTM), LSTM),
    "LSTM, two directions": (Recurrent(nn.LSTM, bidirectional=True), LSTM),
    "LSTM, projected": (Recurrent(nn.LSTM, proj_size=5), LSTM),
    "RNN with dropout": (
        Recurrent(nn.RNN, num_layers=2, dropout=0.3), "2 layers without the dropout",
    ),
    "GRU, packed": (Recurrent(nn.GRU, packed=True), "whole model as one train graph"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", UNPLANNED)
def test_recurrent_layers_without_a_plan_are_refused_at_the_rewrite(name: str) -> None:
    model, why = UNPLANNED[name]
    with pytest.raises(OptionError, match=why):
        rewrite(model, [], X, memory_budget=MemoryBudget(1.0, lossy=True))


RECURRENT: dict[str, Recurrent] = {
    "GRU": Recurrent(nn.GRU),
    "RNN, two layers": Recurrent(nn.RNN, num_layers=2, nonlinearity="relu"),
    "RNN, two directions": Recurrent(nn.RNN, bidirectional=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_train_within_their_smallest_budget(name: str) -> None:
    original, x = RECURRENT[name].train(), X.repeat(16, 1)
    least = plan_memory(original, x).curve[-1].peak
    model = rewrite(original, [], x, memory_budget=least).train()
    grads = []
    for twin in (model, copy.deepcopy(original)):
        loss(twin, x).backward()
        grads.append(gradients(twin))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)
    assert model.report.forms[0].planned == 1


@pytest.mark.slow
def test_a_recurrent_layer_within_a_lossy_budget_keeps_its_bound() -> None:
    original, x = Recurrent(nn.GRU, bidirectional=True).train(), X.repeat(16, 1)
    least = plan_memory(original, x).curve[-1].peak
    budget = MemoryBudget(int(0.9 * least), lossy=True, gradient_error=0.04)
    model = rewrite(original, [], x, memory_budget=budget).train()
    plan = vars(model)["_rewriter"].memory.plan
    assert plan.peak <= 0.9 * least
    assert 0 < plan.gradient_error <= 0.04


def test_a_result_that_is_laid_out_otherwise_than_its_fake_is_copied() -> None:
    original = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(2), nn.Linear(16, 8))
    x = torch.randn(5, 4, 4, 4)
    plain = rewrite(original, [Quadratic()], x).train()
    model = rewrite(original, [Quadratic()], x, memory_budget=1.0).train()
    for twin in (plain, model):
        twin(x).square().mean().backward()
    assert model.report.forms[0].planned == 1
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}")
