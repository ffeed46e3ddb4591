"""Patterns of several operations: where a graph has them, and where it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter.capture import capture
from rewriter.errors import OptionError
from rewriter.modules.patterns import (
    Pattern,
    attend,
    batch_norm,
    conv,
    fan,
    gelu,
    linear,
    maybe,
    op,
    relu,
)
from rewriter.sites import find_matches


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.again = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.up, self.act = nn.Linear(4, 8), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        kept = self.again(x)
        x = F.relu(kept) + kept  # read twice: no chain
        x = x.mean((2, 3))
        x = self.q(x) * self.k(x) + self.v(x)
        return self.act(self.up(x))


def found(pattern: Pattern, front_end: str = "export") -> list[list[str]]:
    """The names of what was found, the same for every front end."""
    model = Net().eval()
    if front_end == "export":
        graph = capture(model, torch.rand(2, 3, 8, 8)).regions[0].graphs[False]
    else:
        graph = fx.symbolic_trace(model).graph
    matches = find_matches(model, graph, pattern)
    return [[n.target if n.op == "call_module" else "-" for n in m.nodes] for m in matches]


@pytest.mark.parametrize("front_end", ["export", "symbolic"])
def test_a_chain_is_found_whichever_front_end_spelled_it(front_end: str) -> None:
    assert found(conv >> batch_norm >> relu, front_end) == [["conv", "norm", "-"]]
    assert found(conv >> batch_norm, front_end) == [["conv", "norm"]]
    assert found(linear >> (relu | gelu), front_end) == [["up", "act"]]


def test_a_value_that_others_read_ends_a_chain() -> None:
    assert found(conv) == [["conv"], ["again"]]
    assert found(conv >> relu) == []


def test_what_may_be_there_is_part_of_a_chain_where_it_is() -> None:
    assert found(conv >> maybe(batch_norm) >> maybe(relu)) == [["conv", "norm", "-"], ["again"]]
    assert found(conv >> maybe(gelu) >> batch_norm) == [["conv", "norm"]]
    assert str(conv >> maybe(relu | gelu)) == "conv >> [gelu | relu]"


@pytest.mark.parametrize(
    "make",
    [lambda: maybe(conv) >> relu, lambda: maybe(conv >> relu), lambda: fan(maybe(linear))],
    ids=["first", "a chain", "a fan"],
)
def test_what_may_be_there_stands_behind_something(make: Callable[[], object]) -> None:
    with pytest.raises(OptionError):
        make()


def test_siblings_read_one_value() -> None:
    assert found(fan(linear)) == [["q", "k", "v"]]
    assert found(fan(linear, 4)) == []
    assert found(fan(conv)) == []


def test_a_chain_follows_the_activations_not_the_weight() -> None:
    """In `addmm(bias, x, weight)` the first argument is not what the call works on."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4, 4))

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return torch.addmm(F.relu(bias), x, self.weight)

    root = Sum()
    graph = fx.symbolic_trace(root).graph
    assert find_matches(root, graph, relu >> op("addmm")) == []
    assert [m.source.name for m in find_matches(root, graph, op("addmm"))] == ["x"]


def test_results_are_what_the_rest_of_the_graph_reads() -> None:
    model = Net().eval()
    graph = fx.symbolic_trace(model).graph
    (chain,) = find_matches(model, graph, conv >> batch_norm)
    (siblings,) = find_matches(model, graph, fan(linear))
    assert [n.target for n in chain.results] == ["norm"]
    assert siblings.results == siblings.nodes
    assert all(n.args[0] is siblings.source for n in siblings.nodes)


def test_a_pattern_prints_as_it_is_written() -> None:
    assert str(conv >> batch_norm >> (relu | gelu)) == "conv >> batch_norm >> (gelu | relu)"
    assert str(fan(linear)) == "fan(linear)"
    assert str(attend(linear)) == "attend(linear)"
    assert str((conv >> batch_norm) >> (relu >> gelu)) == "conv >> batch_norm >> relu >> gelu"


def test_a_pattern_of_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="give the names"):
        op()
    with pytest.raises(OptionError, match="two calls at least"):
        fan(linear, 1)
    with pytest.raises(OptionError, match="one operation"):
        fan(conv >> relu)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="one operation"):
        attend(conv >> relu)  # type: ignore[arg-type]
