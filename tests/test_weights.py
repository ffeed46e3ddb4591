"""The weight of a layer of ours, to those who know linear layers: read by all, never lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from torch import Tensor, fx, nn

from rewriter import Pass, rewrite
from rewriter.errors import OptionError, RewriteWarning
from rewriter.layer import Layer, RoundedWeight
from rewriter.passes import (
    Densify,
    Int4Linear,
    Int8WeightLinear,
    Monarch,
    MonarchChainLinear,
    MonarchLinear,
    MonarchResidualLinear,
    QuadraticLinear,
    Quantize,
    QuantizedLinear,
    QuantizedMonarch,
    StaticOutlierLinear,
    StaticQuantizedLinear,
    TopKLinear,
)

COMPUTED: dict[str, Callable[[], Layer]] = {
    "monarch": lambda: MonarchLinear(8, 8),
    "chain": lambda: MonarchChainLinear(8, 8),
    "residual": lambda: MonarchResidualLinear(8, 8),
    "int8": lambda: QuantizedLinear(8, 8),
    "int8 static": lambda: StaticQuantizedLinear(8, 8, smooth=True),
    "int8 static, outliers": lambda: StaticOutlierLinear(8, 8, 2),
    "int8 weights": lambda: Int8WeightLinear(8, 8),
    "int4 weights": lambda: Int4Linear(8, 8, symmetric=False),
    "int8 monarch": lambda: QuantizedMonarch(8, 8),
}


def data_plus(layer: Layer) -> None:
    layer.weight.data += 1


def item(layer: Layer) -> None:
    layer.weight[0] = 1


def plus(layer: Layer) -> None:
    layer.weight += 1


def assigned_data(layer: Layer) -> None:
    layer.weight.data = torch.ones(8, 8)


def frozen(layer: Layer) -> None:
    layer.weight.requires_grad = False


def parameter(layer: Layer) -> None:
    layer.weight = nn.Parameter(torch.ones(8, 8))


def tensor(layer: Layer) -> None:
    layer.weight = torch.ones(8, 8)


def registered(layer: Layer) -> None:
    layer.register_parameter("weight", nn.Parameter(torch.ones(8, 8)))


WRITES: list[Callable[[Layer], object]] = [
    data_plus, item, plus, assigned_data, parameter, tensor, registered,
    lambda layer: layer.weight.add_(1),
    lambda layer: layer.weight.data.copy_(torch.ones(8, 8)),
    lambda layer: layer.weight.t().zero_(),
    lambda layer: layer.weight[:3].fill_(0),
    lambda layer: layer.weight.detach().mul_(2),
    lambda layer: layer.weight.chunk(2)[0].zero_(),
    lambda layer: nn.init.xavier_uniform_(layer.weight),
    lambda layer: torch.add(layer.weight, 1, out=layer.weight),
]  # fmt: skip
FREEZES: list[Callable[[Layer], object]] = [
    frozen, lambda layer: layer.weight.requires_grad_(False),
]  # fmt: skip
"""Of no effect on a layer that does not train."""


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("write", [*WRITES, *FREEZES])
def test_no_write_to_a_computed_weight_is_lost(name: str, write: Callable[[Layer], object]) -> None:
    layer = COMPUTED[name]()
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    plain: Any = nn.Linear(8, 8)
    plain.weight = nn.Parameter(layer.dense_weight().detach().clone())
    plain.bias = layer.bias
    with torch.set_grad_enabled(write in FREEZES), warnings.catch_warnings():
        warnings.simplefilter("ignore", RewriteWarning)
        try:
            torch.manual_seed(0)
            write(layer)
        except (OptionError, TypeError, ValueError):
            for n, t in layer.state_dict().items():
                assert_equal(t, before[n])
            return
        torch.manual_seed(0)
        write(plain)
    if write in FREEZES:
        assert_equal(layer.dense_weight(), plain.weight)
    elif isinstance(layer, RoundedWeight):  # within a step of what was written
        levels = 2**4 if name.startswith("int4") else 2**8
        step = 2 * plain.weight.abs().amax(1, keepdim=True) / (levels - 2)
        assert ((layer.dense_weight() - plain.weight).abs() <= step).all()
    else:
        assert type(layer) is nn.Linear
        assert_equal(layer.weight, plain.weight)


@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_can_be_read_like_any_other(name: str) -> None:
    layer, x = COMPUTED[name](), torch.randn(3, 8)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert (weight.dtype, weight.device, weight.shape) == (torch.float32, x.device, (8, 8))
    assert_equal(weight.clone().add_(1), layer.dense_weight() + 1)
    y = nn.functional.linear(x, weight, layer.bias)
    assert type(y) is Tensor
    assert_equal(y, nn.functional.linear(x, layer.dense_weight(), layer.bias))
    held = list(layer.parameters())
    if len(held) > 1:  # trains by it
        assert torch.autograd.grad(weight.square().sum(), held[0])[0].any()


@pytest.mark.parametrize("name", COMPUTED)
def test_a_compiled_model_reads_it_too(name: str) -> None:
    layer, x = COMPUTED[name](), torch.randn(3, 8)

    def forward(x: Tensor) -> Tensor:
        return layer(x.to(layer.weight.dtype)) + layer.weight.sum()

    torch.compiler.reset()  # all layers of this test count as one function that is compiled again
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    assert_reordered(compiled(x), forward(x))


def test_the_first_order_weight_of_a_quadratic_layer_is_its_own() -> None:
    layer, x = QuadraticLinear(8, 8), torch.randn(3, 8)
    before = layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    assert_reordered(layer(x), before + x.sum(1, keepdim=True))
    layer.weight = nn.Parameter(layer.weight.detach() - 1)
    assert_reordered(layer(x), before)
    assert "weight" not in dict(layer.named_parameters())
    dense = TopKLinear(8, 8, 8)
    dense.weight = nn.Parameter(torch.eye(8))
    assert_reordered(dense(x), x + dense.bias)


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning",
    "ignore:.torch.jit:FutureWarning",  # from torch 2.14 on
    "ignore::torch.jit.TracerWarning",
)
def test_a_layer_is_traced_and_says_why_it_is_not_scripted(name: str) -> None:
    layer, x = COMPUTED[name](), torch.randn(3, 8)
    with pytest.raises(OptionError, match=r"deprecated: use torch.export.export.*jit.trace"):
        torch.jit.script(nn.Sequential(layer))
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        assert_equal(traced(2 * x), layer(2 * x))


@pytest.mark.parametrize("name", COMPUTED)
def test_torch_fx_traces_through_a_layer(name: str) -> None:
    layer, x = COMPUTED[name](), torch.randn(3, 8)
    traced = fx.symbolic_trace(nn.Sequential(layer))
    assert_equal(traced(x), layer(x))
    assert_equal(fx.symbolic_trace(traced)(x), layer(x))


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning"
)
def test_a_rewritten_model_without_a_layer_of_ours_says_why_it_is_not_scripted() -> None:
    found = rewrite(nn.Sequential(nn.Linear(8, 8)), [], torch.randn(3, 8))
    with pytest.raises(OptionError, match=r"deprecated: use torch.export.export"):
        torch.jit.script(nn.Sequential(found))


CONVOLUTIONS: dict[str, Callable[[Any, Tensor], object]] = {
    "data +=": lambda c, w: c.weight.data.add_(w),
    "data =": lambda c, w: setattr(c.weight, "data", w),
    "parameter": lambda c, w: setattr(c, "weight", nn.Parameter(w)),
    "init": lambda c, w: nn.init.ones_(c.weight),
    "slice": lambda c, w: c.weight.data[:2].copy_(w[:2]),
    "twice": lambda c, w: (c.weight.data.add_(w), setattr(c.weight, "data", c.weight.data * 2)),
    "bias": lambda c, w: setattr(c, "bias", nn.Parameter(torch.ones(16))),
}


@pytest.mark.parametrize("passes", [[], [Monarch(nblocks=4)], [Monarch(nblocks=4), Densify()]])
@pytest.mark.parametrize("write", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:the weight of a MonarchLinear")
def test_no_write_to_a_rewritten_convolution_is_lost(passes: list[Pass], write: str) -> None:
    x, w = torch.randn(2, 16, 5), torch.randn(16, 16, 1)
    rewritten: Any = rewrite(nn.Sequential(nn.Conv1d(16, 16, 1)), passes, x)
    want = nn.Conv1d(16, 16, 1)
    want.weight.data, want.bias = rewritten[0].weight.detach().clone(), rewritten[0].bias
    for conv in (rewritten[0], want):
        CONVOLUTIONS[write](conv, w)
    assert_reordered(rewritten(x), want(x))


class MergingConvolution(nn.Module):
    """loralib's `ConvLoRA`: the weight of the layer inside holds the adapter in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
        self.merged = False

    def delta(self) -> Tensor:
        return (self.up @ self.down).view(self.conv.weight.shape)

    def train(self, mode: bool = True) -> MergingConvolution:
        super().train(mode)
        if mode is self.merged:
            self.conv.weight.data += (-1 if mode else 1) * self.delta()
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            out: Tensor = self.conv(x)
            return out
        return self.conv._conv_forward(x, self.conv.weight + self.delta(), self.conv.bias)


@pytest.mark.filterwarnings("ignore:the weight of a QuantizedLinear")
def test_an_adapter_of_a_convolution_is_taken_out_and_merged_again() -> None:
    x = torch.randn(2, 8, 3, 3)
    model = MergingConvolution().eval()
    rewritten = rewrite(model, [Quantize("int8-dynamic")], x)
    for mode in (True, False, True):
        assert sqnr(rewritten.train(mode)(x), model.train(mode)(x)) > 30
