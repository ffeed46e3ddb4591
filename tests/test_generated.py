"""Names of modules, tensors and arguments are never code."""

from __future__ import annotations

import copy
import pathlib
from collections import OrderedDict
from typing import Any

import pytest
import torch
from closeness import assert_equal
from marks import slow_but
from torch import Tensor, fx, nn

import rewriter
from rewriter import CaptureError, rewrite
from rewriter.modules.generated import function_of
from rewriter.passes import Monarch

ODD = [
    "in", "None", "a b", 'q"uote', "new\nline", "nul\0", "back\\", "\ufb01", "{}",
]  # fmt: skip


def attacks(trace: pathlib.Path) -> list[str]:
    """Names that would leave `trace` behind if they were run, for each way of quoting."""
    act = f"open({trace.name!r}, 'w').close()"
    double = act.replace("'", '\\"')
    return [
        f'"), {act}, getattr(self, "x', f"'), {double}, ('", f"\n    {act}\n#", f'""")\n{act}\n"""',
        f"x = {act}", f"in\n{act}", f"}}{{{act}}}",
    ]  # fmt: skip


class Named(nn.Module):
    """Reaches everything it has by names that it is given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name = name.replace(".", "\u2024")
        self.layers = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 8), nn.ReLU())})
        self.layers.add_module(f"{name}2", nn.Linear(8, 8))
        self.register_parameter(f"{name}w", nn.Parameter(torch.randn(8, 8)))
        self.register_buffer(f"{name}b", torch.randn(8))

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        x = self.layers[f"{self.name}2"](self.layers[self.name](x))
        x = x @ getattr(self, f"{self.name}w") + getattr(self, f"{self.name}b")
        return x + sum(more.values(), torch.zeros(1))


class Plain(Named):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


X = torch.arange(32.0).view(4, 8) / 16 - 1


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_names_that_are_no_words(name: str) -> None:
    model = Named(name)
    call = {"x": X, name: X[:, :1]}
    rewritten = rewrite(model, [Monarch(nblocks=1)], call)
    assert rewritten.report.capture.rung == "export"
    assert_equal(rewritten(**call), model(**call))


@pytest.mark.parametrize("which", slow_but(range(7), 0, 3, 5))
def test_a_name_is_never_run(which: int, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    name = attacks(tmp_path / "trace")[which]
    model = Named(name)
    call = {"x": X, name: X[:, :1]}
    rewritten = rewrite(model, [Monarch(nblocks=2)], call)
    assert rewritten.report.capture.rung == "export"
    rewritten.train()(**call).sum().backward()
    copy.deepcopy(rewritten).eval()(**call)
    symbolic = rewrite(Plain(name), [Monarch(nblocks=1)])
    assert_equal(symbolic(X), Plain(name)(X))
    assert rewritten.report.to_markdown()
    rewriter.save(rewritten, tmp_path / "saved")
    loaded = rewriter.load(tmp_path / "saved", Named(name), example_inputs=call)
    assert_equal(loaded.eval()(**call), rewritten.eval()(**call))
    with pytest.raises(CaptureError, match="rename"):
        rewriter.export(Named(name), [], X)
    assert {p.name for p in tmp_path.iterdir()} == {"saved"}


def test_a_name_is_never_run_in_a_memory_plan(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in attacks(tmp_path / "trace")[:2]:
        rewritten = rewrite(Named(name), [], X, memory_budget=1.0)
        rewritten.train()(X).sum().backward()
    assert list(tmp_path.iterdir()) == []


def test_names_inside_torch_compile(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in", attacks(tmp_path / "trace")[0]):
        torch._dynamo.reset()
        model: nn.Module = nn.Sequential(Named(name).layers[name.replace(".", "\u2024")])
        model = nn.Sequential(OrderedDict({name.replace(".", "\u2024"): model}))
        options: dict[str, Any] = {"passes": [Monarch(nblocks=1)], "inner": "aot_eager"}
        compiled: Any = torch.compile(model, backend="rewriter", options=options)
        assert_equal(compiled(X), model(X))
        assert_equal(torch.compile(rewrite(model, [], X), backend="eager")(X), model(X))
        assert list(tmp_path.iterdir()) == []


def test_a_graph_with_odd_names_in_every_place() -> None:
    graph = fx.Graph()
    first, second = graph.placeholder("self"), graph.placeholder("class")
    method = graph.call_method("in", (first,), {"a b": second})
    function = graph.call_function(dict, (), {"1": method})
    graph.output((function, graph.call_function(getattr, (first, "is"))))

    class Odd:
        def __getattr__(self, name: str) -> Any:
            return lambda **given: (name, given)

    found, attribute = function_of(graph)(nn.Module(), Odd(), 3)
    assert found == {"1": ("in", {"a b": 3})}
    assert attribute() == ("is", {})


def test_an_argument_called_self() -> None:
    class Other(nn.Module):
        def __init__(this) -> None:  # noqa: N805
            super().__init__()
            this.fc = nn.Linear(8, 8)

        def forward(this, self: Tensor, x: Tensor) -> Tensor:  # noqa: N805
            return this.fc(self) - x

    model = Other()
    assert_equal(rewrite(model, [], (X, X + 1))(X, X), model(X, X))
