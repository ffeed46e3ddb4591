"""Edits as values: what a view shows, which plans are errors, and that nothing is half-applied."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import rewriter.engine.pass_run
from rewriter import (
    LINEAR,
    Keep,
    OptionError,
    Pass,
    PassError,
    Remove,
    Replace,
    Resize,
    Skip,
    VerifyError,
    View,
    rewrite,
)
from rewriter.capture import capture
from rewriter.edits import BLOCK, Cut, Subgraph
from rewriter.engine import Engine, Options
from rewriter.engine.plans import view_of
from rewriter.modules.bypass import Bypass
from rewriter.modules.patterns import activation, fan, linear
from rewriter.passes import RemoveBlocks, ResizeMLP
from rewriter.report.graph_text import graph_text

ROOT = pathlib.Path(__file__).parents[1]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(6, 6), nn.Sequential(Block(), Block())
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.first(x))
        return self.q(x) * self.k(x)


def engine_of(model: nn.Module, x: Any) -> Engine:
    engine = Engine(capture(model, x), Options())
    engine.original()
    return engine


@dataclass(frozen=True)
class Planned(Pass):
    """Does what it is given."""

    matches: ClassVar[tuple[Any, ...]] = (LINEAR, BLOCK)
    make: Callable[[View], Any] = lambda view: []

    def plan(self, view: View) -> Any:
        return self.make(view)


def site(view: View, name: str) -> Any:
    return next(s for s in view.sites if s.fqn == name and s.kind == LINEAR)


def test_a_view_shows_sites_patterns_and_open_sizes() -> None:
    engine = engine_of(Net().eval(), torch.randn(3, 6))
    view = view_of(engine.capture)
    (one, two) = view.places(linear >> activation >> linear)
    assert [s.fqn for s in one.parts.values()] == ["blocks.0.up", "blocks.0.act", "blocks.0.down"]
    assert (one.fqn, one.in_features, one.calls, len(one.nodes)) == ("blocks.0.down", 12, 1, 2)
    assert two.fqn == "blocks.1.down"
    (siblings,) = view.places(fan(linear))
    assert [s.fqn for s in siblings.parts.values()] == ["q", "k"]
    (node, _) = site(view, "q").nodes
    dtype, device, sizes = view.shape(node) or ("", "", ())
    assert (dtype, device) == ("float32", "cpu")
    assert isinstance(sizes[0], str)
    assert sizes[1] == 4
    assert [n.op for n in view.consumers(node)] == ["call_function"]
    (source,) = view.producers(node)
    assert set(view.consumers(source)) >= {node}
    assert "first.weight" in view.parameters
    block = view.block("blocks.0")
    assert isinstance(block, Subgraph)
    assert len(block.cuts) == 2  # eval and train
    width = view.width(site(view, "blocks.0.up"))
    assert not isinstance(width, Skip)
    assert ([s.fqn for s in width.rows], [s.fqn for s in width.columns]) == (
        ["blocks.0.up"],
        ["blocks.0.down"],
    )


def test_all_kinds_of_edits_in_one_plan() -> None:
    def make(view: View) -> list[Any]:
        block = view.block("blocks.1")
        assert isinstance(block, Subgraph)
        new = nn.Linear(6, 6)
        return [
            Replace(site(view, "first"), new, "a new one"),
            Remove(block, "enough"),
            Resize(site(view, "blocks.0.up"), range(5), "narrower"),
            Keep(site(view, "q"), "as it should be"),
        ]

    model, x = Net().eval(), torch.randn(3, 6)
    out: Any = rewrite(model, [Planned(make)], x)
    found = {d.site: (d.action, d.reason) for d in out.report.steps[1].decisions}
    assert found["first"] == ("replaced", "a new one")
    assert found["blocks.1"] == ("removed", "enough")
    assert found["blocks.0.up"] == ("resized", "narrower")
    assert found["q"] == ("skipped", "as it should be")
    assert found["k"] == ("skipped", "the plan leaves it")
    assert "blocks.0.down" not in found, "it is cut along"
    assert not [name for name in found if name.startswith("blocks.1.")], "they go with it"
    hidden = out.first(x)
    hidden = hidden + (hidden @ model.blocks[0].up.weight[:5].T + model.blocks[0].up.bias[:5]).relu(
    ) @ model.blocks[0].down.weight[:, :5].T + model.blocks[0].down.bias  # fmt: skip
    torch.testing.assert_close(out(x), model.q(hidden) * model.k(hidden))


def removed(view: View, name: str) -> Remove:
    block = view.block(name)
    assert isinstance(block, Subgraph), block
    return Remove(block, "why")


def by_hand(view: View) -> list[Any]:
    """q, which makes 4 values of 6."""
    (node, other) = site(view, "q").nodes
    block = removed(view, "blocks.1").subgraph
    cuts = tuple(Cut(n.args[0], n) for n in (node, other))
    return [Remove(Subgraph(block.site, block.names, cuts), "why")]


def foreign(view: View) -> list[Any]:
    other = view_of(engine_of(Net().eval(), torch.randn(3, 6)).capture)
    return [Resize(site(other, "blocks.0.up"), [0], "why")]


BAD: list[tuple[Callable[[View], Any], str]] = [
    (by_hand, r"Remove\(blocks.1\) leaves a shape open: q\w* is .*4\)\), blocks\w* is .*6\)\)|"
              r"Remove\(blocks.1\) leaves a shape open: q is .*4.*, .* is .*6"),
    (lambda v: [removed(v, "blocks.0"), Resize(site(v, "blocks.0.up"), [0], "why")],
     r"Remove\(blocks.0\) and Resize\(blocks.0.up\) both change blocks.0.\w+"),
    (lambda v: [removed(v, "blocks.0"), removed(v, "blocks")],
     r"Remove\(blocks.0\) and Remove\(blocks\) both change blocks.0"),
    (lambda v: [Resize(site(v, "blocks.0.up"), [0], "why")] * 2,
     r"Resize\(blocks.0.up\) and Resize\(blocks.0.up\) both change blocks.0.\w+"),
    (foreign, r"Resize\(blocks.0.up\) is on a site that is not the model's"),
    (lambda v: [Resize(site(v, "blocks.0.up"), [3, 12], "why")], "keeps neuron 12, and there are"),
    (lambda v: [Resize(site(v, "blocks.0.down"), [3], "why")], r"Resize\(blocks.0.down\) is impos"),
    (lambda v: [Resize(site(v, "blocks.0.up"), [3, 1], "why")], "ascending whole numbers"),
    (lambda v: [Replace(v.places(linear >> activation)[0], nn.Linear(6, 12), "why")],
     "linear >> .*, which is several operations"),
    (lambda v: [Replace(site(v, "q"), "a layer", "why")], "has a str, no nn.Module"),  # type: ignore[arg-type]
    (lambda v: ["edit"], "returned a str among its edits"),
    (lambda v: None, "returned a NoneType: return a list"),
    (lambda v: [Remove(v.block("first"), "why")],  # type: ignore[arg-type]
     r"Remove of no block: it is no .*hand its reason on with Keep\(site, skip.reason"),
    (lambda v: [Remove("first", "why")], "Remove of a str: take view.block"),  # type: ignore[arg-type]
    (lambda v: [Keep(site(v, "q"), " ")], r"Keep\(q\): reason=' ': say in words why"),
    (lambda v: [Remove(removed(v, "blocks.0").subgraph, "")], r"Remove\(blocks.0\): reason=''"),
    (lambda v: [Resize(site(v, "blocks.0.up"), [0], "")], r"Resize\(blocks.0.up\): reason=''"),
    (lambda v: [Replace(site(v, "q"), nn.Linear(6, 4), "")], r"Replace\(q\): reason=''"),
    (lambda v: [Keep(site(v, "q"), Skip("no"))],  # type: ignore[arg-type]
     r"Keep\(q\): reason=Skip\('no'\): say in words"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), BAD)
def test_a_plan_that_contradicts_itself_is_an_error(make: Any, words: str) -> None:
    engine = engine_of(Net().eval(), torch.randn(3, 6))
    before = state(engine)
    with pytest.raises(PassError, match=words):
        engine.run(Planned(make))
    assert state(engine) == before


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(6, 6), Two()

    def forward(self, x: Tensor) -> Any:
        return self.block(self.first(x))


class Two(Block):
    def forward(self, x: Tensor) -> Any:
        hidden = self.up(x)
        return x + self.down(hidden), hidden


def test_a_plan_that_removes_an_output_is_an_error() -> None:
    engine = engine_of(Output().eval(), torch.randn(3, 6))

    def make(view: View) -> list[Any]:
        graphs = [g.graph for g in view.graphs]
        cuts = []
        for graph in graphs:
            results: Any = next(iter(reversed(graph.nodes))).args[0]
            first = next(n for n in graph.nodes if n.target == "first")
            cuts.append(Cut(first, results[0]))
        where = next(s for s in view.chosen if s.fqn == "block")
        return [Remove(Subgraph(where, ("block",), tuple(cuts)), "why")]

    before = state(engine)
    with pytest.raises(PassError, match=r"Remove\(block\) is impossible: .*is an output of"):
        engine.run(Planned(make))
    assert state(engine) == before


def state(engine: Engine) -> Any:
    """Graphs, tensors, module tree, plain attributes and the recipe."""
    root = engine.capture.root
    graphs = [graph_text(root, g) for _, _, g in engine.capture.graphs()]
    tensors = {k: (id(v), v.tolist()) for k, v in root.state_dict(keep_vars=True).items()}
    modules = [(n, id(m), type(m), m.extra_repr()) for n, m in root.named_modules()]
    return graphs, tensors, modules, dict(engine.recipe.installed), list(engine.recipe.edits)


@pytest.mark.parametrize("stage", ["check", "cut_graphs", "remove"])
def test_a_failure_after_the_first_change_puts_everything_back(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Net().eval(), torch.randn(3, 6)
    engine = engine_of(model, x)
    before, result = state(engine), model(x)
    real, calls = getattr(rewriter.engine.pass_run, stage), []

    def fails(*arguments: Any) -> Any:
        calls.append(state(engine) != before)
        real(*arguments)
        calls.append(state(engine) != before)
        raise VerifyError("something does not hold")

    def make(view: View) -> list[Any]:
        narrow = Resize(site(view, "blocks.0.up"), [1, 2], "why")
        return [
            narrow,
            removed(view, "blocks.1"),
            Replace(site(view, "first"), nn.Linear(6, 6), "why"),
        ]

    monkeypatch.setattr(rewriter.engine.pass_run, stage, fails)
    with pytest.raises(VerifyError, match="something does not hold"):
        engine.run(Planned(make))
    assert calls[-1], "it failed before anything was changed"
    assert state(engine) == before
    assert torch.equal(model(x), result)
    monkeypatch.undo()  # and the same engine goes on
    step = engine.run(RemoveBlocks(where="blocks.1"))
    assert [d.action for d in step.decisions] == ["removed"]
    assert isinstance(model.blocks[1], Bypass)


def test_a_layer_that_is_declined_takes_the_plan_along() -> None:
    def make(view: View) -> list[Any]:
        return [
            Replace(site(view, "first"), nn.Linear(6, 6), "why", error=0.5),
            Resize(site(view, "blocks.0.up"), [1], "why"),
        ]

    out: Any = rewrite(Net().eval(), [Planned(make)], torch.randn(3, 6), max_error=0.1)
    found = {d.site: (d.action, d.reason) for d in out.report.steps[1].decisions}
    assert found["blocks.0.up"][0] == found["first"][0] == "declined"
    assert "all of a plan is done or nothing, and at first: error 0.5" in found["first"][1]
    assert out.blocks[0].up.out_features == 12


@dataclass(frozen=True)
class Neither(Pass):
    matches = (LINEAR,)


@dataclass(frozen=True)
class Both(Planned):
    def propose(self, site: Any) -> Skip:
        return Skip("no")


@dataclass(frozen=True)
class Proposes(Pass):
    matches = (linear >> activation,)

    def propose(self, site: Any) -> Skip:
        return Skip("no")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Neither(), r"Neither has neither propose\(site\) nor plan\(view\)"),
        (Both(), r"Both has both propose\(site\), of Both, and plan\(view\), of Planned"),
        (Proposes(), r"Proposes matches linear >> .*, which only a pass with plan\(view\) may"),
    ],
)
def test_a_pass_has_one_method(given: Pass, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        rewrite(Net(), [given], torch.randn(3, 6))


def test_an_error_inside_of_a_plan_names_the_pass() -> None:
    with pytest.raises(PassError, match=r"Planned\(.*\).plan failed: ZeroDivisionError"):
        rewrite(Net(), [Planned(lambda view: [1 // 0])], torch.randn(3, 6))


def test_the_plan_in_contributing_runs() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def plan(" in b]
    (shown,) = found
    namespace: dict[str, Any] = {"__name__": "contributing"}
    exec(compile(shown, "CONTRIBUTING.md", "exec"), namespace)
    model, x = nn.Sequential(nn.Linear(6, 6), *(Block() for _ in range(4))).eval(), torch.rand(2, 6)
    out: Any = rewrite(model, [namespace["EveryOther"](where="[1-4]")], x)
    assert [type(m) for m in out] == [nn.Linear, Block, Bypass, Block, Bypass]
    torch.testing.assert_close(out(x), model[3](model[1](model[0](x))))
    found = {d.site: (d.action, d.reason) for d in out.report.steps[1].decisions}
    assert found["1"] == found["3"] == ("skipped", "the plan leaves it")
    assert found["2"] == found["4"] == ("removed", "every second block")
    assert len(found) == 4


def test_both_passes_and_in_place() -> None:
    model, x = Net().eval(), torch.randn(3, 6)
    passes = [RemoveBlocks(where="blocks.0"), ResizeMLP(keep=6)]
    expected = rewrite(model, passes, x)(x)
    out = rewrite(model, passes, x, inplace=True)
    assert out is model
    torch.testing.assert_close(out(x), expected)
