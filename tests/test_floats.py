"""Weights in bfloat16 and float8: their numbers, their products, and that no cast unpacks them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from rewriter import OptionError, RewriteWarning, load, rewrite
from rewriter.kernels import float8_linear as kernel
from rewriter.kernels.float8_linear import (
    ACTIVATIONS,
    dequantize_float8,
    float8_linear,
    float8_linear_reference,
    quantize_float8,
)
from rewriter.passes import BFloat16Linear, Float8Linear, Quantize, floats
from rewriter.passes.quantize import SCHEMES
from rewriter.sites import Site

pytestmark = pytest.mark.filterwarnings("ignore:Quantize.scheme='fp8-dynamic'. is simulated")

LAYERS = {
    "bf16": lambda: BFloat16Linear(24, 10),
    "bf16, no bias": lambda: BFloat16Linear(24, 10, bias=False),
    "fp8": lambda: Float8Linear(24, 10),
    "fp8, no bias": lambda: Float8Linear(23, 9, bias=False),
    "fp8 dynamic": lambda: Float8Linear(24, 10, activation="per_token"),
    "fp8 dynamic, one step": lambda: Float8Linear(24, 10, activation="per_tensor"),
}
SCHEMES_HERE = ("bf16", "fp8-weight", "fp8-dynamic")


def layer_of(name: str) -> Any:
    torch.manual_seed(0)
    return LAYERS[name]().eval()


def propose(module: nn.Module, scheme: str, **options: Any) -> Any:
    return Quantize(scheme, **options).propose(Site.of(module))


def rows(layer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 2, layer.in_features).to(dtype)


# numbers


def test_the_numbers_of_every_float8() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    want = bits.view(torch.float8_e4m3fn).float()
    finite = ~want.isnan()
    assert int(finite.sum()) == 254
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert_equal(kernel._numbers(bits, dtype)[finite], want[finite].to(dtype))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1.0, -3e38])
def test_constant_rows_are_kept(value: float) -> None:
    weight = torch.full((2, 8), value)
    q, scale = quantize_float8(weight)
    got = dequantize_float8(q, scale)
    assert_close(got, weight if abs(value) > 1e-40 else torch.zeros_like(weight))


def test_weights_that_are_float8_are_kept_exactly() -> None:
    weight = torch.randint(0, 126, (5, 7), dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    weight[:, 0] = -448.0
    out = propose(_linear(weight), "fp8-weight")
    assert out.error == 0.0
    assert_equal(out.layer.dense_weight(), weight)


def _linear(weight: Tensor) -> nn.Linear:
    dense = nn.Linear(weight.shape[1], weight.shape[0])
    dense.weight = nn.Parameter(weight)
    return dense


@pytest.mark.parametrize(
    ("scheme", "floor"), [("bf16", 45), ("fp8-weight", 28), ("fp8-dynamic", 25)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_close_to_dense(scheme: str, floor: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(384, 96, dtype=dtype).eval()
    out = propose(dense, scheme)
    x = torch.randn(4, 32, 384, dtype=dtype)
    assert out.layer.bias is dense.bias
    assert out.layer(x).dtype == dtype
    assert sqnr(out.layer(x), dense(x)) > floor
    assert 0 < out.error < 0.04
    assert "frozen" in out.note
    assert SCHEMES[scheme].storage in {b.dtype for b in out.layer.buffers()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_16_bits(dtype: torch.dtype) -> None:
    dense = nn.Linear(32, 8, dtype=dtype)
    assert propose(dense, "bf16").reason == f"its weight is {dtype} already"
    x = torch.randn(5, 32).to(dtype)
    layer = propose(dense, "fp8-weight").layer
    assert layer(x).dtype == dtype
    assert sqnr(layer(x), dense(x)) > 25


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernel_is_the_formula(activation: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 33) * torch.logspace(-3, 3, 7)[:, None]
    q, scale = quantize_float8(torch.randn(5, 33))
    given = q, scale, torch.randn(5), activation
    want = float8_linear_reference(x, *given)
    assert_reordered(float8_linear(x, *given), want)
    assert_reordered(kernel._table(x, *given), want)  # what ONNX is given


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_nan_and_no_other(value: float) -> None:
    layer = layer_of("fp8 dynamic")
    x = rows(layer)
    want = layer(x).detach()
    x[1, 1, 3] = value
    got = layer(x).detach()
    assert bool(got[1, 1].isnan().all())
    assert_equal(got[0], want[0])


def test_rows_of_zeros() -> None:
    layer = layer_of("fp8 dynamic")
    assert_equal(layer(torch.zeros(2, 24)).detach(), layer.bias.detach().expand(2, 10))
    assert layer(torch.zeros(0, 24)).shape == (0, 10)


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_is_multiplied_as_the_device_can(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floats, "_multiplies_bfloat16", lambda device: native)
    layer = layer_of("bf16")
    x = rows(layer)
    given = x.bfloat16().float() if native else x
    want = F.linear(given, layer.dense_weight(), layer.bias)
    assert_reordered(layer(x), want, torch.bfloat16 if native else torch.float32)
    assert ("bfloat16" if native else "float32") in layer.kernel(6)


# modules


@pytest.mark.parametrize("name", LAYERS)
def test_round_trips(name: str) -> None:
    layer = layer_of(name)
    x = rows(layer)
    want = layer(x)
    assert_equal(copy.deepcopy(layer)(x), want)
    assert_equal(pickle.loads(pickle.dumps(layer))(x), want)
    again = type(layer)(**layer.config())
    assert not torch.equal(again(x), want)
    again.load_state_dict(layer.state_dict())
    assert_equal(again(x), want)
    built = type(layer)(**layer.config(), device="meta").to_empty(device="cpu")
    built.load_state_dict(layer.state_dict())
    assert_equal(built(x), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_no_cast_unpacks_the_weight(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(name)
    before = layer.qweight.clone()
    layer.to(dtype)
    assert layer.qweight.dtype == before.dtype
    assert torch.equal(layer.qweight, before)
    assert layer(rows(layer, dtype)).dtype == dtype
    layer.float()
    assert sqnr(layer(rows(layer)), layer_of(name)(rows(layer))) > 35


@pytest.mark.parametrize("name", LAYERS)
def test_compile_export_and_gradient(name: str) -> None:
    layer = layer_of(name)
    x = rows(layer).requires_grad_()
    want = layer(x)
    assert_equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), want)
    exported = torch.export.export(layer, (x.detach(),))
    assert_equal(exported.module()(x.detach()), want.detach())
    (dx,) = torch.autograd.grad(want.sum(), x)
    grade = torch.bfloat16 if "bf16" in name else torch.float32
    assert_reordered(dx, layer.dense_weight().sum(0).expand_as(x), grade)
    if "one step" not in name:  # which under vmap is one for each
        assert_reordered(torch.vmap(layer)(x), want, grade)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name: str) -> None:
    layer = layer_of(name)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(rows(layer))
    assert got.dtype in (torch.bfloat16, torch.float32)
    assert sqnr(got.float(), layer(rows(layer))) > 25


@pytest.mark.parametrize("scheme", SCHEMES_HERE)
def test_meta(scheme: str) -> None:
    out = propose(nn.Linear(16, 8, device="meta"), scheme)
    assert out.error is None
    assert out.layer(torch.empty(3, 16, device="meta")).shape == (3, 8)


@pytest.mark.parametrize("name", LAYERS)
def test_a_write_is_rounded(name: str) -> None:
    layer = layer_of(name)
    cls, want = type(layer), layer.dense_weight() + 1
    with pytest.warns(RewriteWarning, match="was written to, and rounded to its form"):
        layer.weight.data += 1
    assert type(layer) is cls
    assert_equal(layer.weight.detach(), cls.from_weight(want, None).dense_weight())
    with pytest.warns(RewriteWarning, match="it is an nn.Linear now"):
        layer.weight = nn.Parameter(want)
    assert type(layer) is nn.Linear


# the schemes


@pytest.mark.parametrize("scheme", SCHEMES_HERE)
def test_a_rewritten_model_is_saved_loaded_and_given_other_weights(
    scheme: str, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    x = torch.randn(4, 16)
    made = rewrite(model, [Quantize(scheme)], x)
    assert len(made.report.replaced) == 2
    assert not made.report.errors
    assert made.report.after.macs == made.report.before.macs
    made.save(tmp_path)
    assert_equal(load(tmp_path, model)(x), made(x))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(3)
    made.load_original(other.state_dict())
    assert_equal(made(x), rewrite(other, [Quantize(scheme)], x)(x))


@pytest.mark.filterwarnings("default:Quantize.scheme='fp8-dynamic'. is simulated")
def test_where_no_device_multiplies_float8_the_user_is_told() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(2, 16)
    said = "simulated, slower: torch multiplies no float8 on cpu"
    words = rf"Quantize\(scheme='fp8-dynamic'\) is {said}"
    with pytest.warns(RewriteWarning, match=words):
        report = rewrite(model, [Quantize("fp8-dynamic")], x).report
    assert report.replaced[0].kernel == f"torch, {said}"
    assert f"{said} (1 layer)" in str(report).splitlines()[1]


def test_option_errors() -> None:
    with pytest.raises(OptionError, match="Float8Linear: activation"):
        Float8Linear(4, 4, activation="per_channel")
    with pytest.raises(OptionError, match="'bf16' does not read activation"):
        Quantize("bf16", activation="per_tensor")
    assert propose(nn.Linear(4, 4), "fp8-dynamic", activation="per_tensor").layer.activation == (
        "per_tensor"
    )


def test_arguments_that_do_not_fit() -> None:
    x, q, one = torch.ones(1, 4), torch.ones(2, 4, dtype=torch.uint8), torch.ones(2)
    for match, args in {
        "activation must be one of": (x, q, one, None, "rows"),
        "must be a 2-D uint8 tensor": (x, q.float(), one),
        "real floating point": (x.int(), q, one),
        "its last dimension must be 4": (x[:, :3], q, one),
        r"scale must be \[2\], got \[1\]": (x, q, one[:1]),
        r"bias must be \[2\], got \[1\]": (x, q, one, one[:1]),
    }.items():
        with pytest.raises(ValueError, match=match):
            float8_linear(*args)
