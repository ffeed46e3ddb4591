"""Which places are sites, under which name, with which tensors; and what a rewrite does there."""

from __future__ import annotations

import copy
import operator
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow_but
from torch import Tensor, nn
from torch.testing import assert_close

from rewriter import (
    ACTIVATION,
    CONV,
    LINEAR,
    MLP,
    Pass,
    Replacement,
    Site,
    Skip,
    backend,
    load,
    param_groups,
    remap_optimizer,
    rewrite,
)
from rewriter.capture import capture
from rewriter.errors import RewriteWarning, SignatureError
from rewriter.passes import (
    Densify,
    Monarch,
    MonarchChain,
    MonarchResidual,
    Quadratic,
    Quantize,
    ResizeMLP,
    TopK,
)
from rewriter.passes.monarch import MonarchLinear
from rewriter.passes.quadratic import QuadraticLinear
from rewriter.sites import find_sites


class Fn(nn.Module):
    """A model around one function of (self, x), with named parameters or modules."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            if isinstance(member, nn.Module | nn.Parameter):
                setattr(self, name, member)
            else:
                self.register_buffer(name, member)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 4)


def sites(model: nn.Module, x: Any, kind: Any = LINEAR) -> list[Site]:
    captured = capture(copy.deepcopy(model).eval(), x)
    graphs: dict[bool, list[Any]] = {False: [], True: []}
    for region, mode, graph in captured.graphs():
        graphs[mode].append((region.prefix, graph))
    found = find_sites(captured.root, graphs[False], graphs[True])
    return [s for s in found if s.kind == kind]


def exact(model: nn.Module, x: Tensor, *passes: Pass, symbolic: bool = False) -> Any:
    """The rewritten model, found to compute what the model computes in both modes."""
    args = (x,)
    result = rewrite(model, list(passes) or [Quadratic()], None if symbolic else x)
    for training in (False, True):
        model.train(training), result.train(training)
        with torch.no_grad():
            torch.manual_seed(1)
            expected = model(*args)
            torch.manual_seed(1)
            assert_close(result(*args), expected)
    model.eval()
    return result.eval()


# spellings

SPELLINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    # how the weight is used → is it stored [in, out]
    "linear": (lambda m, x: F.linear(x, m.w), False),
    "linear by keyword": (lambda m, x: F.linear(bias=None, weight=m.w, input=x), False),
    "linear of t": (lambda m, x: F.linear(x, m.w.t()), True),
    "@": (lambda m, x: x @ m.w, True),
    "@ T": (lambda m, x: x @ m.w.T, False),
    "@ mT": (lambda m, x: x @ m.w.mT, False),
    "matmul": (lambda m, x: torch.matmul(x, other=m.w), True),
    "method matmul": (lambda m, x: x.matmul(m.w), True),
    "mm": (lambda m, x: x.mm(m.w), True),
    "transpose": (lambda m, x: x @ m.w.transpose(0, 1), False),
    "transpose of -1, -2": (lambda m, x: x @ m.w.transpose(-1, -2), False),
    "swapaxes": (lambda m, x: x @ m.w.swapaxes(0, 1), False),
    "permute": (lambda m, x: x @ m.w.permute(1, 0), False),
    "permute that keeps": (lambda m, x: x @ m.w.permute(0, 1), True),
    "transposed twice": (lambda m, x: x @ m.w.t().t(), True),
    "between views": (lambda m, x: (x.view(2, 2, 6).reshape(-1, 6) @ m.w).view(4, 8), True),
}


@pytest.mark.parametrize("front_end", ["export", "symbolic"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_a_linear_map(name: str, front_end: str) -> None:
    forward, transposed = SPELLINGS[name]
    model, x = Fn(forward, w=param(*((6, 8) if transposed else (8, 6)))), torch.randn(4, 6)
    (site,) = sites(model, x if front_end == "export" else None)
    assert (site.fqn, site.in_features, site.out_features) == ("w", 6, 8)
    assert site.transposed == transposed
    assert site.tokens == (4 if front_end == "export" else None)
    assert site.where.startswith("test_sites.py:")
    assert site.bias is None
    assert site.module is None
    result = exact(model, x)
    assert type(result.w) is QuadraticLinear


BIASED: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "linear": (lambda m, x: F.linear(x, m.w, m.b), False),
    "linear by keyword": (lambda m, x: F.linear(x, bias=m.b, weight=m.w), False),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), True),
    "addmm of t": (lambda m, x: torch.addmm(m.b, x, m.w.t()), False),
    "method addmm": (lambda m, x: m.b.addmm(x, m.w), True),
    "addmm with factors of 1": (lambda m, x: torch.addmm(m.b, x, m.w, beta=1, alpha=1), True),
}


@pytest.mark.parametrize("front_end", ["export", "symbolic"])
@pytest.mark.parametrize("name", BIASED)
def test_spellings_with_a_bias(name: str, front_end: str) -> None:
    forward, transposed = BIASED[name]
    shape = (6, 8) if transposed else (8, 6)
    model, x = Fn(forward, w=param(*shape), b=param(8)), torch.randn(4, 6)
    (site,) = sites(model, x if front_end == "export" else None)
    assert (site.weight_ref, site.bias_ref, site.transposed) == ("w", "b", transposed)
    result = exact(model, x)
    assert result.w.bias is result.b


NOT_LINEAR: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scaled sum": lambda m, x: torch.addmm(m.b, x, m.w, alpha=2),
    "sum with beta": lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5),
    "matrix as bias": lambda m, x: torch.addmm(m.rows, x, m.w),
    "expression": lambda m, x: x @ (m.w * 2),
    "buffer": lambda m, x: x @ m.fixed,
    "einsum of three": lambda m, x: torch.einsum("bi,io,bo->bo", x, m.w, x @ m.fixed),
    "weight on the left": lambda m, x: (m.w.t() @ x.t()).t(),
    "activations of both": lambda m, t: t @ (t.t() @ t),
    "part of a weight": lambda m, x: x[:, :3] @ m.w[:3],
    "vector": lambda m, x: x @ m.column,
}


@pytest.mark.parametrize("front_end", ["export", "symbolic"])
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_no_linear_layer_stays(name: str, front_end: str) -> None:
    model = Fn(
        NOT_LINEAR[name], w=param(6, 8), b=param(8), rows=param(4, 8), column=param(6),
        fixed=torch.randn(6, 8),
    )  # fmt: skip
    x = torch.randn(4, 6)
    assert sites(model, x if front_end == "export" else None) == []
    with pytest.warns(RewriteWarning, match="no site of kind linear"):
        result = rewrite(model, [Quadratic()], x)
    assert_close(result(x), model(x))


@pytest.mark.parametrize("shape", [(1, 6), (8, 1), (1, 1)])
def test_weights_of_one_row_or_column(shape: tuple[int, int]) -> None:
    exact(Fn(lambda m, x: F.linear(x, m.w), w=param(*shape)), torch.randn(4, shape[1]))


@pytest.mark.parametrize("function", [lambda m, x: m.fc(x), lambda m, x: x @ m.w])
def test_an_input_of_one_dimension(function: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = Fn(function, fc=nn.Linear(6, 8), w=param(6, 8)), torch.randn(6)
    assert [s.tokens for s in sites(model, x)] == [1]
    exact(model, x)


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs() + 1, self.bias)


class ByHand(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Inherited(nn.Linear):
    def more(self) -> None: ...


def test_subclasses_are_judged_by_their_forward() -> None:
    x = torch.randn(3, 6)
    assert sites(nn.Sequential(OwnForward(6, 8)), x) == []
    assert [s.fqn for s in sites(nn.Sequential(Inherited(6, 8)), x)] == ["0"]
    model = nn.Sequential(ByHand(6, 8))
    (site,) = sites(model, x)
    assert (site.fqn, site.weight_ref, site.bias_ref) == ("0.weight", "0.weight", "0.bias")
    result = exact(model, x)
    assert type(result[0].weight) is QuadraticLinear
    assert_close(result[0](x[None]), model[0](x[None]))  # Python goes through the layer too


def test_a_forward_of_an_instance_is_no_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].forward = lambda x: x * 2  # type: ignore[method-assign]
    assert sites(model, torch.randn(3, 6)) == []


# one layer or weight, many calls or names


def test_a_layer_called_many_times_is_one_site_and_its_tokens_add_up() -> None:
    model = Fn(lambda m, x: m.fc(torch.relu(m.fc(x)) + m.fc(x[:2]).sum()), fc=nn.Linear(6, 6))
    (site,) = sites(model, torch.randn(4, 6))
    assert (site.tokens, site.calls, len(site.nodes)) == (4 + 2 + 4, 3, 6)
    exact(model, torch.randn(4, 6))


def test_a_function_called_many_times_is_one_site() -> None:
    model = Fn(lambda m, x: F.linear(F.linear(x, m.w), m.w), w=param(6, 6))
    (site,) = sites(model, torch.randn(4, 6))
    assert site.tokens == 8
    exact(model, torch.randn(4, 6))


def test_a_module_under_two_names_is_one_site() -> None:
    layer = nn.Linear(6, 6)
    model = Fn(lambda m, x: m.second(torch.relu(m.first(x))), first=layer, second=layer)
    (site,) = sites(model, None)
    assert (site.fqn, site.calls) == ("first", 2)
    result = exact(model, torch.randn(4, 6), symbolic=True)
    assert result.first is result.second
    assert [(s.fqn, s.tokens) for s in sites(model, torch.randn(4, 6))] == [("first", 8)]


def test_weight_tied_to_an_embedding_stays_and_says_so() -> None:
    model = Fn(lambda m, x: m.head(m.emb(x)), emb=nn.Embedding(9, 6), head=nn.Linear(6, 9))
    model.head.weight = model.emb.weight
    result = exact(model, torch.tensor([[1, 2]]))
    (decision,) = result.report.decisions
    assert decision.reason == "its weight is tied to emb.weight: rewritten together or not at all"
    by_hand = Fn(lambda m, x: F.linear(m.emb(x), m.emb.weight), emb=nn.Embedding(9, 6))
    result = exact(by_hand, torch.tensor([[1, 2]]))
    (decision,) = result.report.decisions
    assert decision.reason == "its weight is tied to emb: rewritten together or not at all"


def tied(bias: str) -> nn.Module:
    model = Fn(
        lambda m, x: m.b(torch.relu(m.a(x))),
        a=nn.Linear(6, 6, bias=bias != "none"),
        b=nn.Linear(6, 6, bias=bias != "none"),
    )
    model.b.weight = model.a.weight
    if bias == "same":
        model.b.bias = model.a.bias
    return model


@pytest.mark.parametrize("bias", ["same", "none"])
def test_two_linears_of_one_weight_become_one_layer(bias: str) -> None:
    result = exact(tied(bias), torch.randn(4, 6), symbolic=True)
    assert result.a is result.b
    assert [d.reason for d in result.report.decisions][1] == "tied to a"


def test_two_linears_of_one_weight_and_two_biases_stay() -> None:
    result = exact(tied("different"), torch.randn(4, 6), symbolic=True)
    assert [d.action for d in result.report.decisions] == ["skipped", "skipped"]
    assert "tied to b.weight" in result.report.decisions[0].reason


def test_tied_layers_are_selected_together_or_not_at_all() -> None:
    result = exact(tied("same"), torch.randn(4, 6), Quadratic(where="a"), symbolic=True)
    assert [d.action for d in result.report.decisions] == ["skipped", "skipped"]


def test_tied_layers_with_hooks_stay() -> None:
    model = tied("same")
    model.a.register_forward_hook(lambda *_: None)
    assert "hooks" in exact(model, torch.randn(4, 6), symbolic=True).report.decisions[0].reason


def test_a_bias_shared_between_sites_stays_shared() -> None:
    model = Fn(lambda m, x: m.b(m.a(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    model.b.bias = model.a.bias
    result = exact(model, torch.randn(4, 6))
    assert type(result.a) is type(result.b) is QuadraticLinear
    assert result.a.bias is result.b.bias


# functional sites in Python


def test_other_calls_go_through_the_layer_where_python_can() -> None:
    model = Fn(lambda m, x: F.linear(x @ m.v, m.w, m.b), v=param(6, 6), w=param(8, 6), b=param(8))
    result = exact(model, torch.randn(4, 6))
    with torch.no_grad():
        result.w.weight_b.fill_(0.1)
    result.train()
    other = result(torch.randn(2, 3, 4, 6))
    assert other.shape == (2, 3, 4, 8)
    x = torch.randn(4, 6)
    wide = x.expand(1, 1, 4, 6)
    assert_close(result(wide)[0, 0], result(x))  # not the weight alone: the whole layer


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


def test_multihead_attention_reads_its_projection_by_hand() -> None:
    model, x = Attention(), torch.randn(2, 5, 8)
    names = {s.fqn: s.bias_ref for s in sites(model, x)}
    assert names["mha.out_proj"] == "mha.out_proj.bias"
    model.train()
    result = exact(model, x)
    assert type(result.mha.out_proj) is QuadraticLinear
    # QuadraticLinear has a `weight`, so Python would run without an error, past the layer
    with pytest.raises(SignatureError, match="does not go through the rewritten .*mha.out_proj"):
        result(torch.randn(5, 8))


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 1


class Shifted(Pass):
    matches = (ACTIVATION,)

    def propose(self, site: Site) -> Replacement | Skip:
        return Replacement(Shift())


def test_an_activation_function_replaced_is_refused_for_other_calls() -> None:
    model = Fn(lambda m, x: m.fc(torch.relu(m.fc(x))), fc=nn.Linear(6, 6))
    x = torch.randn(4, 6)
    result = rewrite(model, [Shifted()], x)
    assert_close(result(x), model.fc(torch.relu(model.fc(x)) + 1))
    with pytest.raises(SignatureError, match="relu_0"):
        result(torch.randn(2, 4, 6))


def test_activations_get_free_names() -> None:
    model = Fn(lambda m, x: torch.relu(torch.relu(x) - 1), fc=nn.Linear(6, 6))
    names = [s.fqn for s in sites(model, torch.randn(4, 6), ACTIVATION)]
    assert names == ["relu_0", "relu_1"]
    x = torch.randn(4, 6)
    once = rewrite(model, [Shifted(where="relu_0")], x)
    twice = rewrite(model, [Shifted(where="relu_0"), Shifted()], x)
    assert_close(once(x), torch.relu(torch.relu(x)))
    assert_close(twice(x), torch.relu(torch.relu(x)) + 1)


def test_a_leftover_bias_declines() -> None:
    model = Fn(lambda m, x: F.linear(x, m.w, m.b), w=param(8, 6), b=param(8))
    result = rewrite(model, [Quadratic(init="random")], torch.randn(4, 6))
    assert "another bias than b" in result.report.decisions[0].reason


# convolutions and activations


@pytest.mark.parametrize(
    ("layer", "shape", "tokens"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 9), 2 * 7),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2), (2, 4, 5, 5), 2 * 25),
        (nn.Conv3d(4, 6, 1), (2, 4, 3, 3, 3), 2 * 27),
        (nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), 2 * 7),
        (nn.ConvTranspose2d(4, 6, 2), (2, 4, 3, 3), 2 * 16),
        (nn.ConvTranspose3d(4, 6, 1), (2, 4, 2, 2, 2), 2 * 8),
    ],
)
def test_convolutions(layer: nn.Module, shape: tuple[int, ...], tokens: int) -> None:
    (site,) = sites(nn.Sequential(layer), torch.randn(shape), CONV)
    assert (site.in_features, site.out_features, site.tokens) == (4, 6, tokens)
    assert site.weight is site.module.weight
    assert site.bias is site.module.bias


ACTIVATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "module": lambda m, x: m.act(x),
    "function": lambda m, x: F.silu(x),
    "method": lambda m, x: x.tanh(),
    "in place function": lambda m, x: F.relu(m.fc(x), inplace=True),
    "in place method": lambda m, x: m.fc(x).relu_(),
    "in place module": lambda m, x: m.inplace(m.fc(x)),
    "with options": lambda m, x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    model = Fn(ACTIVATIONS[name], act=nn.GELU(), fc=nn.Linear(6, 6), inplace=nn.ReLU(inplace=True))
    x = torch.randn(4, 6)
    (site,) = sites(model, x, ACTIVATION)
    assert site.tokens == 4
    with pytest.raises(AttributeError, match="activation.* has no in_features"):
        _ = site.in_features
    with pytest.raises(AttributeError, match="has no weight"):
        _ = site.weight
    (decision,) = rewrite(model, [Shifted()], x).report.replaced
    assert decision.site == site.fqn


SEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the caller's": lambda m, x: m.inplace(x),
    "read again": lambda m, x: (lambda y: m.inplace(y) + y)(m.fc(x)),
    "result unused": lambda m, x: (lambda y: (y.relu_(), y)[1])(m.fc(x)),
    "through a view": lambda m, x: (lambda y: (y.view(-1).relu_(), y)[1])(m.fc(x)),
    "through another": lambda m, x: (lambda y: m.inplace(y.add_(1)) + y)(m.fc(x)),
}


@pytest.mark.parametrize("name", SEEN)
def test_in_place_on_what_other_code_reads_stays(name: str) -> None:
    model = Fn(SEEN[name], fc=nn.Linear(6, 6), inplace=nn.ReLU(inplace=True))
    x = torch.randn(4, 6)
    result = rewrite(model, [Shifted()])  # export writes such code without the aliases
    assert "in place" in result.report.decisions[0].reason
    assert_close(result(x.clone()), model(x.clone()))


# MLPs


class Block(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 12), nn.Linear(6, 12)
        self.fused = nn.Linear(6, 24)
        self.act, self.drop, self.down = nn.SiLU(), nn.Dropout(0.5), nn.Linear(12, 6)
        for name, module in more.items():
            setattr(self, name, module)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def phi3(m: Any, x: Tensor) -> Tensor:
    gate, up = m.fused(x).chunk(2, dim=-1)
    return m.down(up * m.act(gate))


MLPS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, str]]] = {
    "plain": (lambda m, x: m.down(m.act(m.up(x))), {"up": "up", "activation": "act"}),
    "function": (lambda m, x: m.down(F.gelu(m.up(x))), {"up": "up", "activation": "gelu_0"}),
    "in place": (lambda m, x: m.down(m.up(x).relu_()), {"up": "up", "activation": "relu_0"}),
    "second function": (
        lambda m, x: m.down(F.relu(m.up(F.relu(x)))),
        {"up": "up", "activation": "relu_1"},
    ),
    "dropout, casts, views": (
        lambda m, x: m.down(m.drop(m.act(m.up(x).double())).float().view(-1, 12)),
        {"up": "up", "activation": "act"},
    ),
    "gated": (
        lambda m, x: m.down(m.act(m.gate(x)) * m.up(x)),
        {"gate": "gate", "up": "up", "activation": "act"},
    ),
    "gated, other order": (
        lambda m, x: m.down(m.up(x) * m.act(m.gate(x))),
        {"gate": "gate", "up": "up", "activation": "act"},
    ),
    "gated, dropout": (
        lambda m, x: m.down(m.drop(m.act(m.gate(x)) * m.up(x)).to(torch.float32)),
        {"gate": "gate", "up": "up", "activation": "act"},
    ),
    "fused gate": (phi3, {"gate": "fused", "up": "fused", "activation": "act"}),
}


@pytest.mark.parametrize("name", MLPS)
def test_mlps(name: str) -> None:
    forward, parts = MLPS[name]
    (site,) = sites(Block(forward), torch.randn(4, 6), MLP)
    assert {k: p.fqn for k, p in site.parts.items()} == {**parts, "down": "down"}
    assert (site.fqn, site.in_features, site.out_features, site.tokens) == ("down", 12, 6, 4)


NO_MLPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no activation": lambda m, x: m.down(m.up(x)),
    "two activations of one": lambda m, x: m.down(torch.cat([x, x], -1) * m.act(m.up(x))),
    "sum": lambda m, x: m.down(m.act(m.gate(x)) + m.up(x)),
    "scaled": lambda m, x: m.down(m.act(m.up(x)) * 2),
}


@pytest.mark.parametrize("name", NO_MLPS)
def test_no_mlps(name: str) -> None:
    assert sites(Block(NO_MLPS[name]), torch.randn(4, 6), MLP) == []


def test_a_down_projection_called_elsewhere_too_stays() -> None:
    model = Block(lambda m, x: m.down(m.act(m.up(x))) + m.down(m.gate(x)))
    x = torch.randn(4, 6)
    result = rewrite(model, [TopK(k=3)], x)
    assert "outside of an MLP" in result.report.decisions[0].reason
    assert_close(result.eval()(x), model.eval()(x))


def test_structured_layers_are_parts_of_an_mlp_too() -> None:
    model = Block(lambda m, x: m.down(m.act(m.up(x))))
    result = rewrite(model, [Monarch(nblocks=2, rank=1, where="up"), TopK(k=3)], torch.randn(4, 6))
    assert [d.site for d in result.report.steps[-1].decisions if d.changed] == ["down"]
    assert type(result.up) is MonarchLinear


# where they are


def test_sites_under_no_grad_and_in_islands() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = m.a(x)
        return m.b(x)

    model = Fn(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    assert [s.fqn for s in sites(model, torch.randn(4, 6))] == ["a", "b"]
    exact(model, torch.randn(4, 6))

    def branches(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x)) if x.sum() > 0 else m.b(x)

    block = Block(lambda m, x: m.down(F.relu(m.up(x))))
    model = Fn(branches, a=nn.Linear(6, 6), b=nn.Sequential(block, nn.Linear(6, 6)))
    x = torch.rand(4, 6)
    result = exact(model, x)
    assert result.report.capture.rung == "parts"
    assert {d.site: d.tokens for d in result.report.replaced} == {
        "a": 4, "b.0.up": 4, "b.0.down": 4, "b.1": 4,
    }  # fmt: skip
    assert_close(result(-x), model(-x))
    topk = rewrite(model, [TopK(k=2)], x)
    assert [d.site for d in topk.report.replaced] == ["b.0.down"]


def test_layers_that_are_not_called_say_so() -> None:
    model = Fn(lambda m, x: m.a(x), a=nn.Linear(6, 6), b=nn.Linear(6, 7))
    decisions = {d.site: d for d in exact(model, torch.randn(4, 6)).report.decisions}
    assert decisions["b"].reason == "not called with these example_inputs"
    assert decisions["b"].shape == "6→7"


def test_a_model_that_is_one_layer() -> None:
    result = exact(nn.Linear(6, 6), torch.randn(4, 6))
    assert [d.site for d in result.report.replaced] == ["weight"]
    assert type(result) is not nn.Linear
    assert isinstance(result, nn.Linear)


# 1×1 convolutions


class Bottleneck(nn.Module):
    """A 3×3 convolution between 1×1 ones, the second with a stride; then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.wide, self.act = nn.Conv2d(16, 32, 1, bias=False), nn.ReLU(inplace=True)
        self.narrow, self.fc = nn.Conv2d(32, 16, 1, stride=2), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        return self.fc(self.narrow(self.act(self.wide(x))).mean((2, 3)))


POINTWISE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 1), (2, 4, 5)),
    "2d": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 5)),
    "2d, no bias": (lambda: nn.Conv2d(4, 6, (1, 1), bias=False), (2, 4, 3, 5)),
    "3d": (lambda: nn.Conv3d(4, 6, 1), (2, 4, 2, 3, 5)),
    "stride": (lambda: nn.Conv2d(4, 6, 1, stride=(2, 1)), (2, 4, 3, 5)),
    "dilation": (lambda: nn.Conv2d(4, 6, 1, dilation=3), (2, 4, 3, 5)),
    "padding by name": (lambda: nn.Conv2d(4, 6, 1, padding="same"), (2, 4, 3, 5)),
    "one channel in": (lambda: nn.Conv2d(1, 6, 1), (2, 1, 3, 5)),
    "one channel out": (lambda: nn.Conv2d(4, 1, 1), (2, 4, 3, 5)),
    "one position": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 1, 1)),
    "no rows": (lambda: nn.Conv2d(4, 6, 1), (0, 4, 3, 5)),
    "weight channels last": (
        lambda: nn.Conv2d(4, 6, 1).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        (2, 4, 3, 5),
    ),
}


def layouts(shape: tuple[int, ...]) -> list[Tensor]:
    """One input in all the ways that it may lie in memory, and without a batch."""
    x = torch.randn(shape)
    found = [x, *([x[0]] if len(x) else []), x.transpose(-1, -2).contiguous().transpose(-1, -2)]
    if x.dim() == 4:  # in three dimensions it depends on the machine what the convolution does
        last = torch.channels_last
        found += [x.to(memory_format=last), x.to(memory_format=last)[..., ::2, :]]
    return found


@pytest.mark.parametrize("name", POINTWISE)
def test_a_pointwise_layer_lies_in_memory_as_its_convolution_does(name: str) -> None:
    make, shape = POINTWISE[name]
    conv = make()
    site = Site.of(conv)
    assert site.channels is not None
    dense = nn.Linear(site.in_features, site.out_features, bias=site.bias is not None)
    dense.load_state_dict(
        {k: t.flatten(1) if t.dim() > 1 else t for k, t in conv.state_dict().items()}
    )
    layer = site.fitted(dense)
    for x in layouts(shape):
        expected = conv(x)
        assert_close(layer(x), expected)
        assert layer(x).stride() == expected.stride()
    with pytest.raises(RuntimeError, match="dimensions"):
        layer(torch.randn(1, 1, 1, 1, 1, 1, 1))


@pytest.mark.parametrize("name", [n for n in POINTWISE if n != "no rows"])
def test_a_pointwise_convolution_is_a_linear_site(name: str) -> None:
    make, shape = POINTWISE[name]
    model, x = nn.Sequential(make()), torch.randn(shape)
    (site,) = sites(model, x)
    conv = model[0]
    assert (site.in_features, site.out_features) == (conv.in_channels, conv.out_channels)
    assert site.weight.shape == (conv.out_channels, conv.in_channels)
    assert site.tokens == model(x).numel() // conv.out_channels
    result = exact(model, x)
    assert type(result[0].linear) is QuadraticLinear
    assert result.report.coverage() == (1, 1)


MORE: dict[str, tuple[nn.Module, str]] = {
    "mixes positions": (nn.Conv2d(4, 6, 3, padding=1), "a Conv2d that mixes positions"),
    "groups": (nn.Conv2d(4, 6, 1, groups=2), "works on groups of channels"),
    "pads": (nn.Conv2d(4, 6, 1, padding=1), "pads its input"),
    "transposed": (nn.ConvTranspose2d(4, 6, 1), "is transposed"),
}


@pytest.mark.parametrize("name", MORE)
def test_other_convolutions_are_listed_with_the_reason(name: str) -> None:
    layer, reason = MORE[name]
    model = nn.Sequential(layer, nn.Flatten(1), nn.Linear(6, 2))
    x = torch.randn(2, 4, 1, 1)
    if name == "pads":
        model[2] = nn.Linear(54, 2)
    report = rewrite(model, [Quadratic()], x).report
    (conv,) = report.untaken
    assert (conv.site, conv.kind, conv.action) == ("0", type(layer).__name__, "skipped")
    assert reason in conv.reason
    assert conv in report.skipped
    assert conv.before is not None
    assert conv.before.macs > 0


RECIPES: list[list[Pass]] = [
    [Monarch(nblocks=2)],
    [MonarchChain()],
    [MonarchResidual()],
    [Quadratic()],
    [Quantize()],
    [Monarch(nblocks=2), Quantize()],
    [Monarch(nblocks=2), Densify()],
    [TopK(k=8)],
]


@pytest.mark.parametrize(
    "passes", slow_but(RECIPES, 0, 4, 5), ids=lambda p: " ".join(x.name for x in p)
)
def test_every_pass_takes_pointwise_convolutions(passes: list[Pass], tmp_path: Path) -> None:
    model, x = Bottleneck().eval(), torch.randn(2, 3, 8, 8)
    result = rewrite(model, passes, x)
    done = {d.site for d in result.report.replaced}
    assert done == ({"narrow"} if isinstance(passes[0], TopK) else {"wide", "narrow", "fc"})
    expected = result(x)
    result.save(tmp_path / "saved")
    others = [load(tmp_path / "saved", model, example_inputs=i) for i in (None, x)]
    others += [copy.deepcopy(result), pickle.loads(pickle.dumps(result))]
    for other in others:
        assert torch.equal(other(x), expected)
    with torch.no_grad():
        for parameter in others[0].parameters():
            parameter.zero_()
    others[0].load_original(model.state_dict())
    assert_close(others[0](x), expected)
    assert_close(torch.export.export(result, (x,)).module()(x), expected)
    result.train()(x).sum().backward()
    assert result.stem.weight.grad is not None


def test_a_pointwise_layer_computes_what_it_does_on_rows() -> None:
    conv, x = nn.Conv2d(16, 32, 1), torch.randn(2, 16, 4, 4)
    rows = nn.Linear(16, 32)
    rows.load_state_dict(
        {k: t.flatten(1) if t.dim() > 1 else t for k, t in conv.state_dict().items()}
    )
    for rewrite_ in (Monarch(nblocks=2), Quantize()):
        own = rewrite(nn.Sequential(conv), [rewrite_], x)
        dense = rewrite(nn.Sequential(rows), [rewrite_], x.movedim(1, -1))
        assert_close(own(x), dense(x.movedim(1, -1)).movedim(-1, 1))
        assert own.report.after.macs == dense.report.after.macs


def test_calibration_sees_the_rows_of_a_pointwise_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 1, stride=2))
    mix = torch.randn(16, 4)
    batches = [torch.einsum("ci,nihw->nchw", mix, torch.randn(8, 4, 8, 8)) for _ in range(4)]
    plain = rewrite(model, [Monarch()], batches[0])
    fitted = rewrite(model, [Monarch()], batches[0], calibration=batches)
    (decision,) = fitted.report.replaced
    assert decision.output_error is not None
    expected = model(batches[3])

    def off(rewritten: nn.Module) -> float:
        return (rewritten(batches[3]) - expected).norm().item()

    assert off(fitted) < off(plain) / 2


def test_a_pointwise_convolution_called_as_a_function() -> None:
    model = Fn(lambda m, x: F.conv2d(x, m.w, m.b, stride=2), w=param(6, 4, 1, 1), b=param(6))
    x = torch.randn(2, 4, 5, 5)
    (site,) = sites(model, x)
    assert (site.fqn, site.module, site.tokens) == ("w", None, 2 * 9)
    result = exact(model, x)
    assert result.w.linear.bias is result.b
    assert_close(result(x[0]), model(x[0]))
    other = Fn(lambda m, x: F.conv2d(x, m.w, padding=1), w=param(6, 4, 1, 1))
    with pytest.warns(RewriteWarning, match="no site of kind linear"):
        report = rewrite(other, [Quadratic()], x).report
    (decision,) = report.untaken
    assert (decision.site, decision.kind) == ("w", "Conv2d")
    assert "more than a linear layer over channels" in decision.reason


def test_hooks_and_ties_of_pointwise_convolutions_survive() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    result = exact(model, torch.randn(2, 4, 3, 3), symbolic=True)
    assert result[0] is result[2]
    seen: list[torch.Size] = []
    model = nn.Sequential(nn.Conv2d(4, 6, 1))
    model[0].register_forward_hook(lambda m, args, y: seen.append(y.shape))
    result = rewrite(model, [Monarch(nblocks=2), Quantize()], torch.randn(2, 4, 3, 3))
    result(torch.randn(2, 4, 3, 3))
    assert seen == [(2, 6, 3, 3)]


def test_compiled_code_takes_pointwise_convolutions() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 1)), torch.randn(2, 4, 3, 3)
    expected = model(x).detach()
    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend([Quadratic()], inner="eager"))
    with torch.no_grad():
        assert_close(fast(x), expected)
        model[0].weight.mul_(2), model[0].bias.mul_(2)
        assert_close(fast(x), 2 * expected)  # what was derived is derived again
    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend([Quadratic()], inner="eager", install=True))
    with pytest.warns(RewriteWarning, match="1 layers with new parameters"):
        fast(x).sum().backward()
    assert type(model[0].linear) is QuadraticLinear
    assert model[0].linear.weight_b.grad is not None


class Doubled(Pass):
    matches = (CONV, LINEAR)

    def propose(self, site: Site) -> Replacement | Skip:
        assert site.kind == CONV
        assert site.weight.dim() == 4
        return Replacement(nn.Sequential(copy.deepcopy(site.module), nn.Identity()))


def test_a_pass_for_convolutions_sees_pointwise_ones_as_such() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3)), torch.randn(2, 4, 5, 5)
    result = rewrite(model, [Doubled()], x)
    assert [d.site for d in result.report.replaced] == ["0", "1"]
    assert result.report.untaken == []
    assert_close(result(x), model(x))


def test_channels_are_not_resized() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    (decision,) = rewrite(model, [ResizeMLP()], torch.randn(2, 4, 3, 3)).report.decisions
    assert decision.reason == "0 is a 1×1 convolution, whose channels other layers read"
    mixed = Fn(
        lambda m, x: m.down(torch.relu(m.up(x))), up=nn.Linear(6, 4), down=nn.Conv1d(4, 5, 1)
    )
    assert sites(mixed, torch.randn(2, 4, 6), MLP) == []  # neurons and channels are two dimensions


def test_an_optimizer_goes_along_with_a_pointwise_convolution() -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 16, 1)), torch.randn(2, 16, 3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    result = rewrite(model, [Monarch()], x)
    remapped = remap_optimizer(optimizer, model, result)
    assert remapped.remapped.converted == ["0.linear.right", "0.linear.left"]
    assert remapped.remapped.reset == []
    assert {g["lr_scale"] for g in param_groups(result, 1e-3)} > {1.0}


# weights that no pass takes


class Strays(nn.Module):
    """One of every kind of weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm_cell, self.gru_cell, self.rnn_cell = (
            cell(8, 8) for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
        )
        self.lstm, self.gru, self.rnn = (layer(8, 8) for layer in (nn.LSTM, nn.GRU, nn.RNN))
        self.pair, self.attention = nn.Bilinear(8, 8, 8), nn.MultiheadAttention(8, 2)
        self.words, self.bag = nn.Embedding(4, 8), nn.EmbeddingBag(4, 8)
        self.norm, self.conv = nn.LayerNorm((1, 8)), nn.Conv1d(1, 1, 3, padding=1)
        self.fc, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.by_einsum, self.place, self.spare = param(8, 8), param(1, 8), param(2, 3)
        self.by_chain = param(8, 8)
        self.experts = param(2, 8, 8)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h, _ = self.lstm_cell(x + self.place)
        h = self.rnn_cell(self.gru_cell(h))[:, None]
        h = self.rnn(self.gru(self.lstm(h)[0])[0])[0]
        h = torch.einsum("bi,io->bo", self.pair(h, h)[:, 0], self.by_einsum)
        h = torch.linalg.multi_dot([h, self.by_chain, self.by_chain])
        h = self.attention(h, h, h)[0] + self.words(i) + self.bag(i[:, None])
        h = torch.bmm(h.expand(2, -1, -1), self.experts).sum(0)
        return self.fc(self.conv(self.norm(h[:, None]))[:, 0])


WHY = {
    "lstm_cell.weight_ih": "goes into LSTMCell, where each step needs the one before",
    "gru_cell.weight_hh": "goes into GRUCell, where each step needs the one before",
    "rnn_cell.weight_ih": "goes into RNNCell, where each step needs the one before",
    "lstm.weight_ih_l0": "goes into LSTM, where each step needs the one before",
    "gru.weight_hh_l0": "goes into GRU, where each step needs the one before",
    "rnn.weight_hh_l0": "goes into RNN, where each step needs the one before",
    "pair.weight": "goes into bilinear, a product of two inputs",
    "attention.in_proj_weight": "goes into linear, part by part",
    "by_einsum": "goes into einsum in a form that is no linear layer",
    "by_chain": "goes into linalg_multi_dot in a form that is no linear layer",
    "experts": "goes into bmm in a form that is no linear layer",
    "words": "an Embedding looks rows up",
    "bag.weight": "an EmbeddingBag looks rows up",
    "norm": "a LayerNorm multiplies no rows",
    "conv": "a Conv1d that mixes positions",
    "place": "its values go into add, which is no product",
    "spare": "no call with these example_inputs reads it",
    "unused": "not called with these example_inputs",
}


@pytest.mark.parametrize(
    "passes", slow_but([RECIPES[0], RECIPES[5]], 0), ids=["monarch", "int8 after it"]
)
def test_every_weight_is_accounted_for(passes: list[Pass]) -> None:
    model, inputs = Strays().eval(), (torch.randn(3, 8), torch.tensor([0, 1, 2]))
    report = rewrite(model, passes, inputs).report
    reasons = {d.site: d.reason for d in report.skipped}
    for site, why in WHY.items():
        assert why in reasons[site]
    listed = tuple(f"{d.site}." for d in report.decisions)
    for name, parameter in model.named_parameters():
        assert parameter.dim() < 2 or f"{name}.".startswith(listed), name


def test_the_share_of_what_no_pass_takes_leads_the_report() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 36, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(36, 4),
    )  # fmt: skip
    report = rewrite(model, [Quantize()], torch.randn(1, 4, 8, 8)).report
    convs, all_ = 64 * 9 * (4 * 8 + 8 * 8), report.before.macs
    assert all_ == convs + 64 * 8 * 36 + 36 * 4
    line = f"{convs / all_:.0%}".replace("%", " %")
    said = f"{line} of the multiply-adds are in layers that no pass here takes: 2 Conv2d"
    assert said in " ".join(str(report).split())
    assert "2 of 2 linear layers rewritten" in str(report)
    assert report.at(batch=4).untaken[0].before.macs == 4 * 64 * 9 * 32
    assert "no pass here takes: 2 Conv2d" in str(rewrite(model, [Quantize()]).report)
    nothing = rewrite(nn.Sequential(nn.Linear(4, 4)), [Quantize()], torch.randn(1, 4)).report
    assert "no pass here takes" not in str(nothing)


# transformers


def test_gpt2_stores_its_weights_the_other_way_round() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model, ids = GPT2LMHeadModel(config).eval(), torch.randint(0, 50, (2, 5))
    inputs = {"input_ids": ids}
    found = {s.fqn: s for s in sites(model, inputs)}
    site = found["transformer.h.0.attn.c_attn"]
    assert (site.in_features, site.out_features, site.transposed, site.tokens) == (16, 48, True, 10)
    assert "modeling_gpt2.py:" in site.where
    mlps = sites(model, inputs, MLP)
    assert [m.parts["activation"].fqn for m in mlps] == ["transformer.h.0.mlp.act"]
    expected = model(**inputs).logits
    words = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    result = rewrite(model, [Quadratic()], inputs)
    assert len(result.report.replaced) == 4
    assert_close(result(**inputs).logits, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewriteWarning)
        again = result.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(again, words)


def test_albert_calls_one_layer_many_times() -> None:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(0, 50, (2, 5))}
    tokens = {s.fqn: s.tokens for s in sites(AlbertModel(config), inputs)}
    inside = {v for k, v in tokens.items() if "albert_layers" in k}
    assert inside == {3 * 10}
    assert tokens["encoder.embedding_hidden_mapping_in"] == 10


@pytest.mark.parametrize("name", slow_but(["Llama", "T5", "Phi3"], 0))
def test_gated_mlps_of_transformers(name: str) -> None:
    import transformers

    sizes = {"vocab_size": 50, "pad_token_id": 0}
    if name == "T5":
        config = transformers.T5Config(
            d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu", **sizes,
        )  # fmt: skip
        model: nn.Module = transformers.T5EncoderModel(config)
        down, up = "wo", "wi_1"
    else:
        config = getattr(transformers, f"{name}Config")(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, **sizes,
        )  # fmt: skip
        model = getattr(transformers, f"{name}Model")(config)
        down, up = "down_proj", "gate_up_proj" if name == "Phi3" else "up_proj"
    (site,) = sites(model, {"input_ids": torch.randint(0, 50, (2, 5))}, MLP)
    assert site.fqn.endswith(down)
    assert site.parts["up"].fqn.endswith(up)
    assert set(site.parts) == {"gate", "up", "activation", "down"}


# properties

STEPS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "module": lambda m, x, i: m.layers[i](x),
    "linear": lambda m, x, i: F.linear(x, m.layers[i].weight, m.layers[i].bias),
    "no bias": lambda m, x, i: F.linear(x, m.layers[i].weight),
    "@ T": lambda m, x, i: x @ m.layers[i].weight.T,
    "addmm": lambda m, x, i: torch.addmm(m.layers[i].bias, x, m.layers[i].weight.t()),
    "operator": lambda m, x, i: operator.matmul(x, m.layers[i].weight.t()) + m.layers[i].bias,
    "scaled": lambda m, x, i: torch.addmm(m.layers[i].bias, x, m.layers[i].weight.t(), beta=2),
}


class Chain(nn.Module):
    def __init__(self, widths: list[int], steps: list[str]) -> None:
        super().__init__()
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        for i, step in enumerate(self.steps):
            x = torch.tanh(STEPS[step](self, x, i))
        return x


@settings(max_examples=12)
@given(st.data())
def test_an_exact_pass_keeps_any_chain_of_spellings(data: st.DataObject) -> None:
    steps = data.draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=3))
    widths = data.draw(
        st.lists(st.integers(1, 9), min_size=len(steps) + 1, max_size=len(steps) + 1)
    )
    model = Chain(widths, steps)
    result = exact(model, torch.randn(3, widths[0]))
    for decision in result.report.decisions:
        assert decision.changed or decision.reason
    done = {d.site for d in result.report.replaced}
    expected = {f"layers.{i}" for i, s in enumerate(steps) if s in ("module", "linear", "addmm")}
    assert expected <= done


def test_densify_finds_nothing_the_second_time() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    with pytest.warns(RewriteWarning, match="no site of kind monarch_linear"):
        result = rewrite(model, [Monarch(nblocks=2), Densify(), Densify()], x)
    assert [type(m) for m in result] == [nn.Linear, nn.ReLU, nn.Linear]
