"""Layers in Python code that no graph holds: rewritten where the code only calls a linear function,
left with a reason everywhere else."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_equal
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter import RewriteWarning, rewrite
from rewriter.passes import Monarch, Quantize

X = torch.arange(32.0).view(4, 8) / 16 - 1


class Plain(nn.Module):
    """A linear layer of a library's own."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.bias = nn.Parameter(torch.randn(8)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Reads(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Scales(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


class Nested(Plain):
    def forward(self, x: Tensor) -> Tensor:
        rows = torch.nested.nested_tensor([x[:1], x[1:]])
        return torch.cat(F.linear(rows, self.weight, self.bias).unbind())


class Sparse(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(torch.eye(len(x)).to_sparse(), F.linear(x, self.weight, self.bias))


class Island(nn.Module):
    """Python, since it branches on data."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.other = layer, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layer(x)) if x.sum().item() < 1e9 else x


def decisions(model: nn.Module) -> dict[str, tuple[str, str]]:
    report: Any = model.report
    steps = report.steps[:2]  # what no pass takes, and what the pass did
    return {d.site: (d.action, d.reason) for step in steps for d in step.decisions}


@pytest.mark.parametrize("make", [Plain, lambda: Plain(bias=False), Sparse])
def test_a_linear_class_of_somebodys_own_is_rewritten(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Island(make()).eval()
    rewritten = rewrite(model, [Quantize("int8-dynamic")], X)
    assert rewritten.report.capture.rung == "parts"
    assert {k: a for k, (a, _) in decisions(rewritten).items()} == {
        "layer.weight": "replaced", "other": "replaced"
    }  # fmt: skip
    assert rewritten.report.steps[0].before.macs == 2 * 4 * 8 * 8
    assert (rewritten(X[:2]) - model(X[:2])).abs().max() < 0.3
    rewritten.train()(X).sum().backward()


@pytest.mark.parametrize("cls", [Reads, Scales, Nested])
def test_one_that_does_more_with_its_weight_stays(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Island(cls()).eval()
    rewritten = rewrite(model, [Quantize("int8-dynamic", where="other")], X)
    everywhere = rewrite(model, [Quantize("int8-dynamic")], X)
    assert decisions(everywhere)["layer.weight"][0] == "skipped"
    assert_equal(everywhere(X), rewritten(X))


def wrapped(layer: nn.Module, around: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    old = layer.forward
    layer.forward = functools.wraps(old)(lambda x: around(old, x))  # type: ignore[method-assign]
    return layer


def test_a_forward_set_on_a_layer_that_only_wraps() -> None:
    model = Island(wrapped(nn.Linear(8, 8), lambda old, x: old(x) * 2)).eval()
    expected = model(X)
    rewritten = rewrite(model, [Quantize("int8-dynamic")], X, inplace=True)
    assert decisions(rewritten)["layer.weight"][0] == "replaced"
    assert (rewritten(X) - expected).abs().max() < 0.3


def test_a_forward_set_on_a_layer_that_leaves_it_out_says_so() -> None:
    model = Island(wrapped(nn.Linear(8, 8), lambda old, x: x)).eval()
    rewritten = rewrite(model, [Quantize("int8-dynamic")], X, inplace=True)
    action, reason = decisions(rewritten)["layer.weight"]
    assert (action, "forward of its own, set on the object" in reason) == ("skipped", True)


@pytest.mark.clients
def test_accelerates_hooks_stay_around_a_rewritten_layer() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubles(hooks.ModelHook):  # type: ignore[misc]
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    hooks.add_hook_to_module(model[0], Doubles())
    expected = model(X)
    rewritten = rewrite(model, [Quantize("int8-dynamic")], X, inplace=True)
    assert decisions(rewritten)["0.weight"][0] == "replaced"
    assert (rewritten(X) - expected).abs().max() < 0.3


# other kinds of tensors


@pytest.mark.slow
@pytest.mark.parametrize("passes", [[], [Monarch(nblocks=2)]], ids=str)
def test_the_nested_path_of_an_encoder_stays(passes: list[Any]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(layer, 2).eval()
    generator = torch.Generator().manual_seed(0)
    src = torch.rand(3, 5, 16, generator=generator)
    call = {"src": src, "src_key_padding_mask": torch.arange(5) >= torch.tensor([[3], [4], [5]])}
    with torch.no_grad():
        rewritten = rewrite(encoder, passes, call)
        assert_equal(rewritten(**call), encoder(**call))
    reasons = [i.reason for i in rewritten.report.capture.islands]
    assert any("nested tensor" in reason for reason in reasons)
    rewritten.train()(**call).sum().backward()


@pytest.mark.parametrize("kind", ["nested", "sparse_coo"])
def test_a_model_called_with_such_a_tensor_says_so(kind: str) -> None:
    given = {
        "nested": lambda: torch.nested.nested_tensor([X[:1], X[1:]]),
        "sparse_coo": X.to_sparse,
    }[kind]()

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            dense = torch.cat(x.unbind()) if x.is_nested else x.to_dense()
            return self.fc(dense)

    model = Takes().eval()
    rewritten = rewrite(model, [Quantize("int8-dynamic")], given)
    assert kind in rewritten.report.capture.islands[0].reason
    assert decisions(rewritten)["fc"][0] == "replaced"
    assert (rewritten(given) - model(given)).abs().max() < 0.3


# weights that the class handles itself


class Merges(nn.Linear):
    """As loralib's: the adapter is merged into the weight for eval mode."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.merged is mode:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.t() @ self.b.t()


class Fuses(nn.Linear):
    """Does so by a method of its own."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def fuse(self) -> None:
        self.weight.data *= 1

    def train(self, mode: bool = True) -> Any:
        self.fuse()
        return super().train(mode)


class Freezes(nn.Module):
    """A model whose `train` is its own, but leaves weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


@pytest.mark.parametrize("pass_", [Quantize("int8-dynamic"), Monarch(nblocks=2)], ids=str)
@pytest.mark.parametrize("cls", [Merges, Fuses])
def test_a_class_that_handles_its_weight_in_train_stays(cls: Any, pass_: Any) -> None:
    model = nn.Sequential(cls(), nn.Linear(8, 8)).eval()
    rewritten = rewrite(model, [pass_], X)
    found = {k.removesuffix(".weight"): v for k, v in decisions(rewritten).items()}
    assert found["0"] == (
        "skipped", f"{cls.__name__}.train handles its weight, which the new layer does not have"
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewriteWarning)
        rewritten.train()(X).sum().backward()
        rewritten.eval()(X)


def test_a_train_method_that_leaves_weights_alone_is_no_obstacle() -> None:
    rewritten = rewrite(Freezes().eval(), [Quantize("int8-dynamic")], X)
    assert decisions(rewritten)["fc"][0] == "replaced"


# a bias that is made on the fly


class Packed(nn.Module):
    """As EVA02's and BEiT's attention: no bias for the keys."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(8, 24, bias=False)
        self.w = nn.Parameter(torch.randn(24, 8))
        self.q, self.v = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.register_buffer("k", torch.zeros(8))

    def bias(self) -> Tensor:
        return torch.cat((self.q, self.k, self.v))


class OfLayer(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.bias())


class OfParameter(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, bias=self.bias())


class Added(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias(), x, self.w.t())


class AddedMatrix(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x.repeat(1, 3), x, self.w.t())


@pytest.mark.parametrize(("cls", "site"), [(OfLayer, "qkv"), (OfParameter, "w"), (Added, "w")])
def test_a_bias_made_on_the_fly_stays_an_addition(cls: Any, site: str) -> None:
    model = cls().eval()
    rewritten = rewrite(model, [Quantize("int8-dynamic")], X)
    assert decisions(rewritten)[site][0] == "replaced"
    for training in (False, True):
        assert (rewritten.train(training)(X) - model(X)).abs().max() < 0.3
    rewritten(X).sum().backward()
    assert model.q.grad is None
    gradient: Any = rewritten.q.grad
    assert_equal(gradient, torch.full((8,), 4.0))


def test_a_matrix_is_no_bias() -> None:
    rewritten = rewrite(AddedMatrix().eval(), [Quantize("int8-dynamic")], X)
    assert decisions(rewritten)["w"][0] == "skipped"
