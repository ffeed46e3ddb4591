"""The schemes whose weights are packed: int8-weight, int4-weight, int4-dynamic."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from torch import Tensor, nn
from torch.testing import assert_close

from rewriter import load, rewrite
from rewriter.base import Replacement
from rewriter.errors import OptionError, RewriteWarning
from rewriter.kernels.weight_only import quantize_groups
from rewriter.passes import QAT, Int4Linear, Int8WeightLinear, Quantize
from rewriter.passes.quantize import SCHEMES
from rewriter.sites import Site

OPTIONS: dict[str, dict[str, Any]] = {
    "int8-weight": {"scheme": "int8-weight"},
    "int4-weight": {"scheme": "int4-weight"},
    "int4-weight with zeros": {"scheme": "int4-weight", "group_size": 32, "symmetric": False},
    "int4-dynamic": {"scheme": "int4-dynamic", "group_size": 128},
}
EVERY = pytest.mark.parametrize("name", OPTIONS)
FLOOR = {8: 40, 4: 18}
"""Decibels of outputs over their error, by bits of a weight."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(72, 40), nn.GELU(), nn.Linear(40, 24, bias=False)).eval()


X = torch.randn(6, 72, generator=torch.Generator().manual_seed(1))


def proposed(module: nn.Module, name: str) -> Replacement:
    found = Quantize(**OPTIONS[name]).propose(Site.of(module))
    assert isinstance(found, Replacement)
    return found


def rewritten(name: str) -> nn.Module:
    return rewrite(model(), [Quantize(**OPTIONS[name])], X)


@EVERY
def test_outputs_are_as_close_as_the_bits_allow(name: str) -> None:
    dense = nn.Linear(384, 96).eval()
    found = proposed(dense, name)
    assert found.layer.bias is dense.bias
    assert not found.layer.training
    assert "frozen" in found.note
    weight = dense.weight.detach()
    made = found.layer.dense_weight()
    assert found.error == pytest.approx(float((made - weight).norm() / weight.norm()))
    x = torch.randn(4, 32, 384)
    with torch.no_grad():
        bits = SCHEMES[OPTIONS[name]["scheme"]].bits
        assert sqnr(found.layer(x), dense(x)) > FLOOR[bits]
        own = nn.functional.linear(x, made, dense.bias)
        assert sqnr(found.layer(x), own) > (35 if name == "int4-dynamic" else 90)


@EVERY
def test_a_weight_on_the_grid_is_met_exactly(name: str) -> None:
    once = proposed(nn.Linear(70, 9), name).layer
    dense = nn.Linear(70, 9)
    dense.weight.data = once.dense_weight().clone()
    again = proposed(dense, name).layer
    assert_equal(again.qweight, once.qweight)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_weights(name: str, dtype: torch.dtype) -> None:
    dense = nn.Linear(64, 8, dtype=dtype)
    layer = proposed(dense, name).layer
    x = torch.randn(5, 64, dtype=dtype)
    bits = SCHEMES[OPTIONS[name]["scheme"]].bits
    with torch.no_grad():
        assert layer(x).dtype == dtype
        assert sqnr(layer(x), dense(x)) > FLOOR[bits]
    if bits == 4:
        kept = torch.float64 if dtype == torch.float64 else torch.bfloat16
        assert layer.scale.dtype == kept


@EVERY
@pytest.mark.parametrize("value", [0.0, 1e-45, 0.3, 3e38])
def test_channels_of_one_value(name: str, value: float) -> None:
    dense = nn.Linear(64, 3, bias=False)
    with torch.no_grad():
        dense.weight[1] = value
    layer = proposed(dense, name).layer
    made = layer.dense_weight()
    assert made.isfinite().all()
    far = 0.5 if value == 3e38 and layer.state_dict().get("zero") is not None else 2**-6
    assert (made[1] - value).abs().max() <= far * value + 1e-44
    assert_reordered(layer(1e-3 * torch.eye(64)[:5]), 1e-3 * made.t()[:5], torch.bfloat16)


def test_float64_weights_beyond_the_range_of_float32() -> None:
    dense = nn.Linear(64, 3, bias=False, dtype=torch.float64)
    dense.weight.data *= 1e200
    for name in OPTIONS:
        made = proposed(dense, name).layer.dense_weight()
        assert sqnr(made / 1e200, dense.weight / 1e200) > 18


@EVERY
@pytest.mark.parametrize("width", [70, 71, 73, 96, 128])
def test_inputs_of_another_width_are_refused(name: str, width: int) -> None:
    made = rewritten(name)
    x = torch.ones(3, width)
    for call in (made, made[0], torch.compile(made[0], backend="eager")):
        with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match="does not fit"):
            call(x)


def test_the_tied_head_and_the_trained_layer_refuse_them_too() -> None:
    table = Quantize("int4-weight", embeddings=True).propose(Site.of(nn.Embedding(9, 72)))
    trained = QAT("int4-weight").propose(Site.of(nn.Linear(72, 9)))
    for found in (table, trained):
        with pytest.raises(ValueError, match="last dimension must be 72"):
            found.layer(torch.ones(3, 80))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_methods_fit_to_inputs_whose_squares_are_beyond_float32(method: Any) -> None:
    batches = [torch.randn(64, 72, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    quantize = Quantize("int4-weight", method=method, where="0")
    usual, large = (
        rewrite(model(), [quantize], X, calibration=[x * by for x in batches])
        for by in (1, 2.0**90)
    )
    assert_equal(large[0].qweight, usual[0].qweight)


@EVERY
def test_storage_is_what_the_ledger_counts(name: str) -> None:
    made = rewritten(name)
    held = sum(t.numel() * t.element_size() for t in made.state_dict().values())
    assert made.report.after.param_bytes == held
    if name.startswith("int4"):
        layer = made[0]
        size = OPTIONS[name].get("group_size", 64)
        groups = -(-72 // size)
        assert layer.qweight.shape == (40, groups * size // 2)
        zeros = 0 if layer.zero is None else layer.zero.numel()
        # two to a byte, fillers of the last group among them
        weights = 40 * groups * (size + 1) + zeros + 40
        rest = sum(made[2].state_dict()[n].numel() * f for n, f in (("qweight", 2), ("scale", 1)))
        rest += 0 if layer.zero is None else made[2].zero.numel()
        assert made.report.after.params == weights + rest


@EVERY
def test_saved_copied_and_pickled(name: str, tmp_path: Path) -> None:
    made = rewritten(name)
    want = made(X)
    made.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", model())
    assert_equal(loaded(X), want)
    for key, value in made.state_dict().items():
        assert loaded.state_dict()[key].dtype == value.dtype
    assert_equal(copy.deepcopy(made)(X), want)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert_equal(torch.load(file, weights_only=False)(X), want)
    layer = pickle.loads(pickle.dumps(made[0]))
    assert layer.config() == made[0].config()
    fresh = type(layer)(**layer.config())
    fresh.load_state_dict(layer.state_dict())
    assert_equal(fresh(X), layer(X))


@EVERY
def test_original_weights_go_through_the_same_rounding(name: str) -> None:
    made = rewritten(name)
    torch.manual_seed(5)
    other = nn.Sequential(nn.Linear(72, 40), nn.GELU(), nn.Linear(40, 24, bias=False)).eval()
    made.load_original(other.state_dict())
    assert_equal(made(X), rewrite(other, [Quantize(**OPTIONS[name])], X)(X))


@EVERY
def test_compiled_and_exported(name: str) -> None:
    made = rewritten(name)
    with torch.no_grad():
        want = made(X)
        torch._dynamo.reset()
        assert_close(torch.compile(made, backend="aot_eager", fullgraph=True)(X), want)
        assert_close(torch.export.export(made, (X,)).module()(X), want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@EVERY
def test_compiled_by_inductor(name: str) -> None:
    made = rewritten(name)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_reordered(torch.compile(made, fullgraph=True)(X), made(X))


@EVERY
def test_gradients_reach_what_trains(name: str) -> None:
    made = rewritten(name).train()
    x = X.clone().requires_grad_()
    made(x).square().sum().backward()
    assert made[0].bias.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0
    assert {n for n, _ in made.named_parameters()} == {"0.bias"}


@EVERY
def test_quantized_layers_are_left_with_a_reason(name: str) -> None:
    made = rewritten(name)
    with pytest.warns(RewriteWarning, match="nothing to do"):
        again = rewrite(made, [Quantize(**OPTIONS[name])], X)
    decisions = again.report.steps[-1].decisions
    assert [d.action for d in decisions] == ["skipped", "skipped"]
    assert "Linear, which Quantize does not take" in decisions[0].reason
    assert_equal(again(X), made(X))


@EVERY
def test_a_layer_without_data(name: str) -> None:
    layer = proposed(nn.Linear(70, 8, device="meta"), name).layer
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer(torch.empty(3, 70, device="meta")).shape == (3, 8)
    assert layer.kernel(3) == "torch"


@pytest.mark.parametrize("cls", [Int8WeightLinear, Int4Linear])
def test_a_drawn_layer_is_like_a_dense_one(cls: type[Any]) -> None:
    layer = cls(70, 30, dtype=torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert 0.9 < float(layer.dense_weight().std()) * (3 * 70) ** 0.5 < 1.1
    assert layer(torch.randn(2, 70)).shape == (2, 30)


def test_levels_chosen_elsewhere() -> None:
    weight, bias = torch.randn(5, 100), nn.Parameter(torch.randn(5))
    q, scale, zero = quantize_groups(weight, 4, 32, False)
    q[0] += (q[0] < 7).to(torch.int8)
    layer = Int4Linear.from_quantized(q, scale, zero, bias, 100)
    assert (layer.group_size, layer.symmetric, layer.in_features) == (32, False, 100)
    assert layer.bias is bias
    plain = Int4Linear.from_weight(weight, bias, 32, False)
    moved = layer.dense_weight() - plain.dense_weight()
    assert (moved[0] > 0).any()
    assert_equal(moved[1:], torch.zeros(4, 100))
    for wrong in (
        (q[:, :64], scale, zero, bias, 100),
        (q, scale[:4], zero, bias, 100),
        (q, scale, scale[:, :2], bias, 100),
        (q, scale, zero, bias, 96),
    ):
        with pytest.raises(OptionError, match="do not fit"):
            Int4Linear.from_quantized(*wrong)
    with pytest.raises(OptionError, match="group_size"):
        Int4Linear.from_quantized(q[:, :96], scale[:, :1], None, bias, 96)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "int4-weight", "group_size": 48}, "group_size"),
        ({"scheme": "int8-weight", "group_size": 32}, "does not read group_size"),
        ({"scheme": "int8-weight", "symmetric": False}, "does not read symmetric"),
        ({"scheme": "int8-dynamic", "group_size": 32}, "does not read group_size"),
        ({"scheme": "int4-weight", "activation": "per_tensor"}, "does not read activation"),
    ],
)
def test_options_that_a_scheme_does_not_read_are_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        Quantize(**options)
    with pytest.raises(OptionError, match="group_size"):
        Int4Linear(8, 8, group_size=7)


class Tied(nn.Module):
    """A head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


@EVERY
def test_the_embedding_of_a_tied_head_stays_as_it_is(name: str, tmp_path: Path) -> None:
    dense, tokens = Tied().eval(), torch.arange(12).view(2, 6)
    made = rewrite(dense, [Quantize(**OPTIONS[name], untie=True)], tokens)
    assert_equal(made.embedding.weight, dense.embedding.weight)
    own = made.head.dense_weight()
    assert_reordered(made(tokens), dense.embedding(tokens) @ own.t(), torch.bfloat16)
    (decision,) = made.report.steps[-1].decisions
    assert "embedding.weight keeps the weight that it was tied to" in decision.reason
    made.save(tmp_path / "saved")
    assert_equal(load(tmp_path / "saved", Tied())(tokens), made(tokens))


def test_weights_that_other_layers_multiply_by_are_rewritten_together_or_not_at_all() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
    model["b"].weight = model["a"].weight

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            return self.layers["b"](self.layers["a"](x))

    x = torch.randn(2, 64)
    made = rewrite(Both(), [Quantize("int4-weight", where="*.a")], x)
    (decision, _) = made.report.steps[-1].decisions
    assert "tied to layers.b.weight: rewritten together or not at all" in decision.reason
    made = rewrite(Both(), [Quantize("int4-weight")], x)
    assert made.layers["a"] is made.layers["b"]
