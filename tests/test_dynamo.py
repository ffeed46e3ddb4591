"""What Dynamo hands over becomes the normal form: a tree of modules with the live parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rewriter.capture.hosted import Program
from rewriter.compiler.dynamo import capture_dynamo
from rewriter.engine import Engine, Options
from rewriter.passes import Quadratic
from rewriter.passes.quadratic import QuadraticLinear


class Backend:
    """Rewrites every graph with `Quadratic()` and runs it."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        lifted = capture_dynamo(module, inputs)
        engine = Engine(lifted.capture, Options())
        engine.original()
        engine.prices.step = engine.run(Quadratic())  # type: ignore[attr-defined]
        self.engines.append(engine)
        program = Program(lifted.graph, None)

        def run(*arguments: Any) -> Any:
            return program(lifted.root, lifted.user_inputs(arguments), "")

        return run


def compiled(model: nn.Module, *inputs: Any, **options: Any) -> list[Engine]:
    torch._dynamo.reset()
    backend = Backend()
    result = torch.compile(model, backend=backend, **options)
    with torch.no_grad():
        for x in inputs:
            assert_close(result(x), model(x))
    return backend.engines


def replaced(engine: Engine) -> list[str]:
    return [d.site for d in engine.prices.step.decisions if d.changed]  # type: ignore[attr-defined]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=i > 0) for i in range(2))
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale
        for block in self.blocks:
            x = block(x) + self.shift
        return x


def test_nested_modules_keep_their_names_and_live_parameters() -> None:
    model = Outer()
    weight = model.first[0].weight
    (engine,) = compiled(model, torch.randn(4, 6))
    root = engine.capture.root
    assert replaced(engine) == ["first.0", "blocks.0", "blocks.1"]
    assert type(root.get_submodule("first.0")) is QuadraticLinear
    assert root.get_submodule("first.0").weight_c is weight
    assert root.get_parameter("scale") is model.scale
    assert root.get_buffer("shift") is model.shift
    assert type(model.first[0]) is nn.Linear  # the user's model is not touched


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        x = self.b(x)
        torch._dynamo.graph_break()
        return self.c(x)


def test_every_graph_between_breaks_is_rewritten() -> None:
    engines = compiled(Broken(), torch.randn(4, 6))
    assert [replaced(e) for e in engines] == [["a"], ["b"], ["c"]]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6)
        self.mid, self.head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.emb(x)))


def test_tied_parameters_stay_tied() -> None:
    (engine,) = compiled(Tied(), torch.tensor([[1, 2], [3, 4]]))
    assert replaced(engine) == ["mid"]
    (kept,) = [d for d in engine.prices.step.decisions if not d.changed]  # type: ignore[attr-defined]
    assert "tied" in kept.reason


def test_sizes_that_are_symbols() -> None:
    engines = compiled(Outer(), torch.randn(4, 6), torch.randn(7, 6), dynamic=True)
    assert replaced(engines[0]) == ["first.0", "blocks.0", "blocks.1"]
    assert len(engines) == 1
    tokens = {d.tokens for d in engines[0].step.decisions}  # type: ignore[attr-defined]
    assert tokens == {4}


def test_a_function_around_a_model() -> None:
    model, x = Outer(), torch.randn(4, 6)
    torch._dynamo.reset()
    backend = Backend()

    def call(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) * 2

    assert_close(torch.compile(call, backend=backend)(model, x), model(x) * 2)
    (engine,) = backend.engines
    assert [n.removeprefix("model.") for n in replaced(engine)] == [
        "first.0",
        "blocks.0",
        "blocks.1",
    ]


def test_gradients_reach_the_live_parameters() -> None:
    model, x = Outer(), torch.randn(4, 6)
    torch._dynamo.reset()
    torch.compile(model, backend=Backend())(x).sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).sum().backward()
    assert got
    for name, grad in got.items():
        assert_close(grad, model.get_parameter(name).grad)
