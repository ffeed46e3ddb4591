import copy
import pickle

import pytest
import torch
from closeness import sqnr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from rewriter.base import Phase, Replacement, Skip
from rewriter.errors import OptionError, PassError
from rewriter.passes import quantize
from rewriter.passes.monarch import MonarchLinear
from rewriter.passes.quantize import (
    Quantize,
    QuantizedLinear,
    QuantizedMonarch,
    Scheme,
    register,
)
from rewriter.passes.sparsegate import GateLinear
from rewriter.passes.threshold_linear import ThresholdLinear
from rewriter.passes.topk import TopKLinear
from rewriter.passes.trained import TrainedLinear
from rewriter.passes.trained_conv import TrainedConv1d, TrainedConv2d
from rewriter.sites import CONV, EMBEDDING, LINEAR, Site

LAYERS = [
    (lambda **kw: QuantizedLinear(24, 10, **kw)),
    (lambda **kw: QuantizedLinear(23, 9, bias=False, activation="per_tensor", **kw)),
    (lambda **kw: QuantizedMonarch(24, 16, nblocks=4, **kw)),
    (lambda **kw: QuantizedMonarch(23, 9, nblocks=2, rank=3, bias=False, **kw)),
]


def propose(module, *args, **kwargs):
    return Quantize(*args, **kwargs).propose(Site.of(module))


@pytest.mark.parametrize("activation", ["per_token", "per_tensor"])
def test_linear_close_to_dense(activation):
    torch.manual_seed(0)
    dense = nn.Linear(384, 96).eval()
    out = propose(dense, activation=activation)
    assert isinstance(out, Replacement)
    assert isinstance(out.layer, QuantizedLinear)
    assert out.layer.bias is dense.bias
    assert not out.layer.training
    assert "frozen" in out.note
    assert 0 < out.error < 0.005
    w = dense.weight.detach()
    assert out.error == pytest.approx(((out.layer.dense_weight() - w).norm() / w.norm()).item())
    x = torch.randn(4, 32, 384)
    with torch.no_grad():
        assert sqnr(out.layer(x), dense(x)) > 36
    assert_close(out.layer.scale, w.abs().amax(1) / 127)


@pytest.mark.parametrize("activation", ["per_token", "per_tensor"])
def test_monarch_close_to_float(activation):
    torch.manual_seed(0)
    monarch = MonarchLinear(100, 90, nblocks=4)
    out = propose(monarch, activation=activation)
    assert isinstance(out.layer, QuantizedMonarch)
    assert out.layer.bias is monarch.bias
    assert 0 < out.error < 0.01
    assert "frozen" in out.note
    x = torch.randn(64, 100)
    with torch.no_grad():
        assert sqnr(out.layer(x), monarch(x)) > 34
        dense = torch.nn.functional.linear(x, out.layer.dense_weight(), out.layer.bias)
        assert sqnr(out.layer(x), dense) > 36


def test_site_kinds_and_phase():
    trained = TrainedLinear, TrainedConv1d, TrainedConv2d
    layers = MonarchLinear, TopKLinear, ThresholdLinear, GateLinear, *trained
    assert Quantize.matches == (LINEAR, *layers, EMBEDDING, CONV)
    assert Quantize().kinds == (LINEAR, *layers)
    assert Quantize.phase is Phase.PRECISION
    assert Quantize("int8-dynamic", "per_tensor").activation == "per_tensor"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_weights(dtype):
    dense = nn.Linear(32, 8, dtype=dtype)
    out = propose(dense)
    assert out.layer.scale.dtype == torch.promote_types(dtype, torch.float32)
    x = torch.randn(5, 32, dtype=dtype)
    with torch.no_grad():
        assert out.layer(x).dtype == dtype
        assert sqnr(out.layer(x).double(), dense(x).double()) > 33


def test_transposed_weight():
    dense = nn.Linear(12, 8)
    conv1d = nn.Module()
    conv1d.weight = nn.Parameter(dense.weight.detach().t().contiguous())
    conv1d.bias = dense.bias
    site = Site(LINEAR, "c", nn.ModuleDict({"c": conv1d}), (), "c.weight", "c.bias", True)
    layer = Quantize().propose(site).layer
    assert layer.qweight.is_contiguous()
    assert_close(layer.qweight, propose(dense).layer.qweight)


def test_frozen_weights_need_no_note():
    assert propose(nn.Linear(8, 8).requires_grad_(False)).note == ""


def test_meta():
    for module in (nn.Linear(16, 8, device="meta"), MonarchLinear(16, 8, 2, device="meta")):
        out = propose(module)
        assert out.error is None
        assert all(t.is_meta for t in out.layer.state_dict().values())
        assert out.layer(torch.empty(3, 16, device="meta")).shape == (3, 8)


def test_zero_weight():
    dense = nn.Linear(8, 4)
    nn.init.zeros_(dense.weight)
    out = propose(dense)
    assert out.error == 0.0
    assert_close(out.layer(torch.randn(3, 8)), dense.bias.expand(3, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_skips_non_finite(bad):
    for module in (nn.Linear(8, 8), MonarchLinear(8, 8, 2)):
        with torch.no_grad():
            next(module.parameters()).view(-1)[3] = bad
        out = propose(module)
        assert isinstance(out, Skip)
        assert "NaN or inf" in out.reason


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int8])
def test_skips_other_dtypes(dtype):
    module = nn.Module()
    module.register_parameter(
        "weight", nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    )
    out = propose(module)
    assert isinstance(out, Skip)
    assert str(dtype) in out.reason


def test_option_errors():
    with pytest.raises(OptionError, match="did you mean 'int8-dynamic'"):
        Quantize("int8dynamic")
    with pytest.raises(OptionError, match="did you mean 'per_token'"):
        Quantize(activation="per-token")
    with pytest.raises(OptionError, match="QuantizedLinear: activation"):
        QuantizedLinear(4, 4, activation="x")
    with pytest.raises(OptionError, match="QuantizedMonarch: activation"):
        QuantizedMonarch(4, 4, 2, activation="x")


@pytest.fixture
def schemes(monkeypatch):
    monkeypatch.setattr(quantize, "SCHEMES", dict(quantize.SCHEMES))


def toy(name="toy", **changes):
    def layer(site, quantize):
        return QuantizedLinear.from_weight(site.weight.sign(), site.bias)

    own = {"bits": 1, "dtype": torch.int8, "storage": torch.int8, "layers": {LINEAR: layer}}
    return Scheme(name, **own | changes)


def test_a_scheme_of_ones_own(schemes):
    scheme = register(toy())
    assert register(scheme) is scheme
    dense = nn.Linear(6, 4)
    got = propose(dense, "toy").layer.dense_weight()
    assert_close(got, dense.weight.detach().sign())
    assert propose(MonarchLinear(8, 8, 2), "toy").reason == (
        "scheme toy has no layer for a monarch_linear; taken by int8-dynamic"
    )
    with pytest.raises(OptionError, match="did you mean 'toy'"):
        Quantize("toys")
    with pytest.raises(OptionError, match="'toy' does not read activation; it reads none"):
        Quantize("toy", activation="per_tensor")


def test_a_scheme_may_skip_a_site(schemes):
    register(toy(layers={LINEAR: lambda site, quantize: Skip("too {}", "small")}))
    assert propose(nn.Linear(6, 4), "toy").reason == "too small"


def test_schemes_that_contradict_themselves_or_each_other(schemes):
    register(toy())
    with pytest.raises(OptionError, match=r"two schemes are called 'toy': .*bits=1.*bits=2"):
        register(toy(bits=2))
    with pytest.raises(OptionError, match=r"3 weights of 4 bits do not fit one torch.int8 of 8"):
        toy(bits=4, per_element=3)
    with pytest.raises(OptionError, match="layers for mlp, and Quantize visits linear, monarch"):
        toy(layers={"mlp": None})
    with pytest.raises(OptionError, match="layers for no kind of site"):
        toy(layers={})
    with pytest.raises(OptionError, match="'toy': bits must be an integer of at least 1"):
        toy(bits=0)
    with pytest.raises(
        OptionError, match="option='activations' is unknown; did you mean 'activation'"
    ):
        toy(options=("activations",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"storage": torch.uint8}, r"in torch.uint8, 1 in each .* qweight \(torch.int8, 1\)"),
        ({"per_element": 8}, r"torch.int8, 8 in each element; .* qweight \(torch.int8, 1\)"),
        (
            {"layers": {LINEAR: lambda site, quantize: MonarchLinear(6, 4, 2)}},
            "its MonarchLinear has no such buffer, but none at all",
        ),
        ({"layers": {LINEAR: lambda site, quantize: None}}, "made a NoneType, which is no Layer"),
    ],
)
def test_a_layer_that_stores_otherwise_than_its_scheme_says(schemes, changes, words):
    register(toy(**changes))
    with pytest.raises(PassError, match=words):
        propose(nn.Linear(6, 4), "toy")


@pytest.mark.parametrize("make", LAYERS)
def test_round_trips(make):
    layer, x = make(), torch.randn(3, 2, make().in_features)
    want = layer(x)
    assert_close(copy.deepcopy(layer)(x), want)
    assert_close(pickle.loads(pickle.dumps(layer))(x), want)
    rebuilt = type(layer)(**layer.config())
    other = rebuilt(x)  # packs weights that the next line overwrites in place
    rebuilt.load_state_dict(layer.state_dict())
    assert_close(rebuilt(x), want)
    assert not torch.equal(other, want)
    built = type(layer)(**layer.config(), device="meta", dtype=torch.float64)
    assert built.state_dict().keys() == layer.state_dict().keys()
    built.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert_close(built(x), want)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert all(t.dtype in (torch.int8, torch.bfloat16) for t in half.state_dict().values())
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", LAYERS)
def test_compile_export_and_gradient(make):
    layer = make().eval()
    x = torch.randn(3, layer.in_features, requires_grad=True)
    want = layer(x)
    assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), want)
    exported = torch.export.export(layer, (x.detach(),))
    assert_close(exported.module()(x.detach()), want.detach())
    assert layer.op in str(exported.graph)
    (dx,) = torch.autograd.grad(want.sum(), x)
    assert_close(dx, layer.dense_weight().sum(0).expand_as(x))


def test_random_init_is_right_in_scale():
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    for layer in (QuantizedLinear(256, 256), QuantizedMonarch(256, 256)):
        assert 0.45 < layer(x).std() < 0.7


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 20), st.integers(-8, 3))
def test_weights_on_the_grid_are_kept_exactly(seed, n, k, power):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (n, k), generator=g)
    q[:, 0] = 127
    dense = nn.Linear(k, n)
    dense.weight = nn.Parameter(q * 2.0**power)
    out = propose(dense)
    assert out.error == 0.0
    assert torch.equal(out.layer.qweight, q.to(torch.int8))
    again = propose(_dense(out.layer)).layer
    assert torch.equal(again.qweight, out.layer.qweight)
    assert torch.equal(again.scale, out.layer.scale)


def _dense(layer):
    dense = nn.Linear(layer.in_features, layer.out_features)
    dense.weight = nn.Parameter(layer.dense_weight())
    return dense
