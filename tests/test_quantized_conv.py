"""Convolutions of 8 and of 4 bits: the formula, every option of one, what is refused, how they
lower."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from rewriter import OptionError, RewriteWarning, load, rewrite
from rewriter.kernels import conv_cpu
from rewriter.kernels import int8_conv as kernel
from rewriter.kernels.int8_conv import (
    RANGES,
    available_kernels,
    int8_conv,
    int8_conv_reference,
    refused_kernels,
)
from rewriter.kernels.nibbles import pack_rows, row_bytes, unpack_rows
from rewriter.lowering import conv_chains
from rewriter.passes import (
    Int4Conv1d,
    Int4Conv2d,
    Int4Linear,
    Quantize,
    QuantizedConv1d,
    QuantizedConv2d,
)
from rewriter.sites import CONV, Site

CONVS = Quantize("int8-dynamic", convolutions=True)
FOUR = Quantize("int4-dynamic", convolutions=True)
BITS = pytest.mark.parametrize("rewriting", [CONVS, FOUR], ids=["8 bits", "4 bits"])

GEOMETRIES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(6, 8, 3),
    "strided": lambda: nn.Conv2d(6, 8, 3, 2, 1, bias=False),
    "uneven": lambda: nn.Conv2d(6, 8, (3, 5), (2, 1), (0, 2)),
    "dilated": lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2),
    "groups": lambda: nn.Conv2d(6, 9, 3, groups=3),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "depthwise, wider": lambda: nn.Conv2d(6, 12, 5, 2, 2, groups=6),
    "1×1 that pads": lambda: nn.Conv2d(6, 8, 1, padding=1),
    "1×1 in groups": lambda: nn.Conv2d(6, 8, 1, groups=2),
    "same": lambda: nn.Conv2d(6, 8, 4, padding="same"),
    "valid": lambda: nn.Conv2d(6, 8, 3, padding="valid"),
    "line": lambda: nn.Conv1d(6, 8, 3, 2, 1),
    "line, same": lambda: nn.Conv1d(6, 8, 4, padding="same", bias=False),
    "line, depthwise": lambda: nn.Conv1d(6, 6, 3, dilation=2, groups=6),
}


def propose(module: nn.Module, rewriting: Quantize = CONVS) -> Any:
    return rewriting.propose(Site.of(module))


def example(conv: Any, batch: int = 2) -> Tensor:
    """Of another range and another zero in each sample."""
    torch.manual_seed(1)
    x = torch.randn(batch, conv.in_channels, *[11, 9][: len(conv.kernel_size)])
    return x * torch.arange(1, batch + 1).view(-1, *[1] * (x.dim() - 1)) + 0.5


def by_formula(layer: Any, x: Tensor) -> Tensor:
    """As the module's head has it, with torch's own convolution by whole numbers."""
    dims = tuple(range(1, x.dim())) if layer.activation == "per_sample" else tuple(range(x.dim()))
    wide = x.double()
    lo, hi = wide.amin(dims, True).clamp(max=0), wide.amax(dims, True).clamp(min=0)
    s = (hi - lo + 1e-8) / 255
    z = (-lo / s).round()
    q = ((wide / s).round() + z).clamp(0, 255) - z
    step = layer.scale.double().view(-1, *[1] * (x.dim() - 2))
    plain = layer.plain(**{k: v for k, v in layer.config().items() if k in _OF_TORCH}, bias=False)
    exact = layer.integers().double() * layer.scale.double().view(-1, 1, 1, 1)
    plain.weight = nn.Parameter(exact.reshape(layer.dense_shape()))
    y = plain(q * s).detach()
    return y if layer.bias is None else y + layer.bias.double().view_as(step)


_OF_TORCH = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
)  # fmt: skip


# the layer


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("activation", RANGES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_the_formula_and_close_to_dense(geometry: str, activation: str) -> None:
    torch.manual_seed(0)
    dense = GEOMETRIES[geometry]().eval()
    tokens = "per_token" if activation == "per_sample" else activation
    out = propose(dense, Quantize(activation=tokens, convolutions=True))
    layer, x = out.layer, example(dense)
    assert layer.activation == activation
    assert layer.bias is dense.bias
    want = dense(x).detach()
    for given in (x, x[:1], x.double(), x[0]):
        got = layer(given).detach()
        if given.dim() == x.dim():
            assert_reordered(got, by_formula(layer, given).to(given.dtype))
    assert_equal(layer(x[0]), layer(x[:1])[0])
    assert sqnr(layer(x), want) > 30
    assert 0 < out.error < 0.01
    assert "frozen" in out.note


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_weights_of_4_bits_are_multiplied_as_those_of_8(geometry: str) -> None:
    torch.manual_seed(0)
    dense: Any = GEOMETRIES[geometry]().eval()
    out = propose(dense, FOUR)
    layer, x = out.layer, example(dense)
    assert type(layer) is (Int4Conv2d if dense.weight.dim() == 4 else Int4Conv1d)
    assert (layer.activation, layer.bias) == ("per_sample", dense.bias)
    for given in (x, x[:1], x.double()):
        got = layer(given).detach()
        assert_reordered(got, by_formula(layer, given).to(given.dtype))
    assert_equal(layer(x[0]), layer(x[:1])[0])
    # the same integers and scales in the layer of 8 bits
    eight = layer.plain(**{k: v for k, v in layer.config().items() if k in _OF_TORCH})
    eight.weight, eight.bias = dense.weight, dense.bias
    cls: Any = QuantizedConv2d if layer.spatial == 2 else QuantizedConv1d
    assert_equal(layer(x), cls.of_levels(eight, layer.integers(), layer.scale)(x))
    # the largest weight of a channel has the lowest level, no other is a step away
    rows, w = layer.integers().flatten(1), dense.weight.detach().flatten(1)
    assert (rows.amin(1) == -8).all()
    assert rows.max() <= 7
    assert ((w - layer.dense_weight().flatten(1)).abs() <= layer.scale.abs()[:, None]).all()
    assert layer.qweight.shape == (len(w), row_bytes(w.shape[1]))
    assert layer.qweight.dtype == torch.uint8
    assert sqnr(layer(x), dense(x).detach()) > 13
    assert 0 < out.error < 0.15


@drawn(st.integers(0, 5), st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(0, 99))
def test_rows_of_4_bits_come_back_from_their_bytes(rows: int, size: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (rows, *size), generator=draw).to(torch.int8)
    packed = pack_rows(q)
    assert packed.shape == (rows, row_bytes(q[0].numel() if rows else packed.shape[1] * 2))
    assert_equal(unpack_rows(packed, size), q)


def test_a_sample_does_not_depend_on_those_beside_it() -> None:
    layer = propose(GEOMETRIES["strided"]()).layer
    x = example(layer, 3)
    assert_equal(layer(x)[1:2], layer(x[1:2]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_sample_that_is_not_finite_gives_nan_and_no_other(value: float) -> None:
    layer = propose(GEOMETRIES["plain"]()).layer
    x = example(layer)
    want = layer(x)
    x[0, 2, 3, 4] = value
    got = layer(x)
    assert bool(got[0].isnan().all())
    assert_equal(got[1], want[1])


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-30, 3e38])
def test_constant_inputs(value: float) -> None:
    dense = nn.Conv2d(2, 3, 1, padding=1, bias=False)
    with torch.no_grad():
        dense.weight.fill_(0.25)
    got = propose(dense).layer(torch.full((1, 2, 3, 3), value))
    assert_close(got, dense(torch.full((1, 2, 3, 3), value)).detach())


def test_a_range_beyond_the_largest_number() -> None:
    dense = nn.Conv2d(1, 1, 1, padding=1, bias=False)
    with torch.no_grad():
        dense.weight.fill_(0.5)
    x = torch.tensor([[[[-3e38, 3e38]]]])
    assert sqnr(propose(dense).layer(x) / 1e38, dense(x) / 1e38) > 40


@BITS
def test_channels_of_zeros_and_of_one_number(rewriting: Quantize) -> None:
    dense = nn.Conv2d(3, 3, 3)
    with torch.no_grad():
        dense.weight[0], dense.weight[1], dense.weight[2] = 0.0, -0.75, 1e-42
    layer, x = propose(dense, rewriting).layer, example(dense)
    assert (layer.scale != 0).all()
    assert sqnr(layer(x), dense(x).detach()) > 40


@BITS
@pytest.mark.parametrize("shape", [(0, 6, 5, 5), (2, 6, 5, 5)])
def test_nothing_goes_in(shape: tuple[int, ...], rewriting: Quantize) -> None:
    layer = propose(nn.Conv2d(6, 4, 3), rewriting).layer
    assert layer(torch.zeros(shape)).shape == (shape[0], 4, 3, 3)
    with pytest.raises(ValueError, match="the kernel .* is larger than the padded"):
        layer(torch.zeros(1, 6, 2, 2))
    with pytest.raises(RuntimeError, match="takes 3 or 4 dimensions, not 2"):
        layer(torch.zeros(6, 2))
    with pytest.raises(ValueError, match=r"x of shape \[1, 5, 5, 5\] does not fit"):
        layer(torch.zeros(1, 5, 5, 5))


@BITS
@pytest.mark.parametrize("of_weight", [False, True])
@pytest.mark.parametrize("of_input", [False, True])
def test_the_result_lies_in_memory_as_that_of_the_dense_one(
    of_input: bool, of_weight: bool, rewriting: Quantize
) -> None:
    last, plain = torch.channels_last, torch.contiguous_format
    dense = nn.Conv2d(6, 8, 3).to(memory_format=last if of_weight else plain)
    layer = propose(dense, rewriting).layer
    x = example(dense).contiguous(memory_format=last if of_input else plain)
    for given in (x, x[0]):
        assert layer(given).stride() == dense(given).stride()
        assert copy.deepcopy(layer).to("meta")(given.to("meta")).stride() == dense(given).stride()


@BITS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, rewriting: Quantize) -> None:
    dense = nn.Conv2d(6, 8, 3, dtype=dtype)
    layer, x = propose(dense, rewriting).layer, example(dense).to(dtype)
    assert layer.scale.dtype == torch.promote_types(dtype, torch.float32)
    assert layer(x).dtype == dtype
    assert sqnr(layer(x), dense(x)) > (30 if rewriting is CONVS else 13)


def test_autocast() -> None:
    layer = propose(nn.Conv2d(6, 8, 3)).layer
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(example(layer)).dtype == torch.bfloat16


@BITS
@pytest.mark.parametrize("geometry", ["uneven", "depthwise, wider", "line"])
def test_gradients_are_those_of_the_dequantized_convolution(
    geometry: str, rewriting: Quantize
) -> None:
    layer = propose(GEOMETRIES[geometry](), rewriting).layer
    x = example(layer).requires_grad_()
    y = layer(x)
    weighing = torch.linspace(-1, 1, y.numel()).view_as(y)
    dx, db = torch.autograd.grad((y * weighing).sum(), (x, layer.bias))
    plain = layer.plain(**{k: v for k, v in layer.config().items() if k in _OF_TORCH})
    plain.weight = nn.Parameter(layer.dense_weight())
    want = torch.autograd.grad((plain(x) * weighing).sum(), (x, plain.bias))
    assert_close((dx, db), want)


@BITS
@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
def test_forward_mode_and_vmap_follow_the_formula(rewriting: Quantize) -> None:
    layer = propose(nn.Conv2d(6, 8, 3), rewriting).layer
    x, along = example(layer), torch.randn(2, 6, 11, 9)
    got, moved = torch.func.jvp(layer, (x,), (along,))
    assert_reordered(got, layer(x))
    assert_close(moved, F.conv2d(along, layer.dense_weight()))
    assert_reordered(torch.vmap(layer)(x), layer(x))


def plain_of(weight: Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(6, 8, 3, 2, 1)
    conv.weight = nn.Parameter(weight)
    return conv


@BITS
def test_it_is_a_convolution_to_who_asks_and_loses_no_write(rewriting: Quantize) -> None:
    layer = propose(nn.Conv2d(6, 8, 3, 2, 1), rewriting).layer
    assert isinstance(layer, nn.Conv2d)
    x, want = example(layer), layer.dense_weight() + 1
    with pytest.warns(RewriteWarning, match="8×6×3×3, was written to, and rounded to its form"):
        layer.weight.data += 1
    assert_equal(layer.qweight, propose(plain_of(want), rewriting).layer.qweight)
    with pytest.warns(RewriteWarning, match="8×6×3×3, was written to: it is an nn.Conv2d now"):
        layer.weight = nn.Parameter(want)
    assert type(layer) is nn.Conv2d
    assert_close(layer(x), F.conv2d(x, want, layer.bias, 2, 1))
    assert sorted(dict(layer.named_parameters())) == ["bias", "weight"]
    repr(layer)


@BITS
@pytest.mark.parametrize("geometry", ["strided", "line"])
def test_round_trips(geometry: str, rewriting: Quantize) -> None:
    layer = propose(GEOMETRIES[geometry](), rewriting).layer
    x = example(layer)
    want = layer(x)
    assert_equal(copy.deepcopy(layer)(x), want)
    assert_equal(pickle.loads(pickle.dumps(layer))(x), want)
    again = type(layer)(**layer.config())
    again(x)  # packs weights that the next line overwrites in place
    again.load_state_dict(layer.state_dict())
    assert_equal(again(x), want)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


@BITS
@pytest.mark.parametrize("geometry", ["strided", "line, same"])
def test_compile_and_export(geometry: str, rewriting: Quantize) -> None:
    layer = propose(GEOMETRIES[geometry](), rewriting).layer.eval()
    x = example(layer)
    want = layer(x).detach()
    assert_equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x).detach(), want)
    sizes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=sizes)
    assert_equal(exported.module()(x).detach(), want)
    assert "int8_conv" in str(exported.graph)


@BITS
def test_meta(rewriting: Quantize) -> None:
    out = propose(nn.Conv2d(6, 8, 3, device="meta"), rewriting)
    assert out.error is None
    assert out.layer(torch.empty(2, 6, 5, 5, device="meta")).shape == (2, 8, 3, 3)


def test_option_errors() -> None:
    with pytest.raises(OptionError, match="convolutions must be True or False, not 'yes'"):
        Quantize(convolutions="yes")
    with pytest.raises(OptionError, match="'int4-weight' does not read convolutions; it reads gro"):
        Quantize("int4-weight", convolutions=True)
    with pytest.raises(OptionError, match="Int4Conv2d: activation"):
        Int4Conv2d(4, 4, 3, activation="per_token")
    with pytest.raises(OptionError, match="QuantizedConv2d: activation"):
        QuantizedConv2d(4, 4, 3, activation="per_token")
    with pytest.raises(OptionError, match="QuantizedConv1d: .*padding"):
        QuantizedConv1d(4, 4, 3, padding="full")
    with pytest.raises(OptionError, match="QuantizedConv2d: .*divisible by groups"):
        QuantizedConv2d(4, 6, 3, groups=3)


# the kernels


@BITS
def test_a_kernel_that_saturates_is_refused(
    monkeypatch: pytest.MonkeyPatch, rewriting: Quantize
) -> None:
    real = kernel._onednn

    def saturating(*args: Any) -> Tensor:
        return real(*args).clamp(max=32767.0)

    kernel._refusal.cache_clear()
    try:
        monkeypatch.setattr(kernel, "_onednn", saturating)
        if "not available" in refused_kernels().get("onednn", ""):
            pytest.skip("no int8 convolution of oneDNN's here")
        assert refused_kernels()["onednn"].startswith("wrong by")
        assert available_kernels() == ("torch",)
        layer = propose(nn.Conv2d(6, 8, 3), rewriting).layer
        x = example(layer)
        assert_reordered(layer(x).detach(), by_formula(layer, x).float())
        assert (layer.kernel(9), layer.held_bytes(9)) == ("torch", 0)
    finally:
        kernel._refusal.cache_clear()


@pytest.mark.filterwarnings("ignore:int8_conv is simulated")
@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (lambda: nn.Conv2d(6, 99, 3, padding=1, groups=3), (5, 5)),
        (lambda: nn.Conv2d(3, 141, (1, 7), padding=(2, 3), groups=3), (7, 5)),
        (lambda: nn.Conv2d(3, 47, (7, 5), 3, 1, (1, 2)), (29, 7)),  # narrow
        (lambda: nn.Conv2d(1, 1, (2, 1), (1, 2), 3), (16, 29)),  # windows in the padding alone
        (lambda: nn.Conv2d(3, 48, (2, 1), padding=(4, 1), dilation=(3, 1)), (1, 1)),
    ],
    ids=["groups of 33", "groups of 47", "narrow", "padding", "padding, dilated"],
)
@BITS
def test_sizes_that_onednn_computes_wrongly_are_left_to_the_formula(
    conv: Callable[[], nn.Module], size: tuple[int, int], rewriting: Quantize
) -> None:
    layer = propose(conv(), rewriting).layer
    x = torch.randn(2, layer.in_channels, *size, generator=torch.Generator().manual_seed(0))
    assert_reordered(layer(x).detach(), by_formula(layer, x).float())


def test_a_size_that_is_simulated_is_warned_of_once() -> None:
    if kernel.refused_kernels():
        pytest.skip("no int8 convolution of oneDNN's here")
    kernel._right.cache_clear(), kernel._say.cache_clear()
    layer = propose(nn.Conv2d(1, 1, 2, padding=3)).layer
    with pytest.warns(RewriteWarning, match="simulated, slower, where oneDNN is wrong") as caught:
        layer(torch.ones(2, 1, 5, 5)), layer(torch.ones(2, 1, 5, 5))
    assert len(caught) == 1


def test_many_taps_are_summed_exactly_without_the_kernel() -> None:
    x = torch.full((1, 700, 3, 3), 255.0)
    x[:, ::7] = 0
    qweight = torch.full((2, 700, 3, 3), 127, dtype=torch.int8)
    qweight[1, ::2] = -128
    options = [1, 1], [1, 1], [1, 1], 1, "per_sample"
    got = kernel._plain(x, qweight, torch.ones(2), None, *options, "")
    assert_close(got, int8_conv_reference(x, qweight, torch.ones(2), None, *options))


@BITS
def test_weights_that_are_written_are_packed_anew(rewriting: Quantize) -> None:
    layer = propose(nn.Conv2d(6, 8, 3), rewriting).layer
    x = example(layer)
    before = layer(x)
    layer.qweight.bitwise_xor_(0x33)
    assert sqnr(layer(x), before) < 20
    assert_reordered(layer(x).detach(), by_formula(layer, x).float())


def test_arguments_that_do_not_fit() -> None:
    x, q, one = torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3, dtype=torch.int8), torch.ones(2)
    usual: Any = ([1, 1], [0, 0], [1, 1], 1)
    for match, args in {
        "activation must be one of": (x, q, one, None, *usual, "per_token"),
        "must be a 4-D int8 tensor": (x, q.float(), one, None, *usual),
        "real floating point": (x.int(), q, one, None, *usual),
        r"scale must be \[2\], got \[1\]": (x, q, one[:1], None, *usual),
        r"bias must be \[2\], got \[1\]": (x, q, one, one[:1], *usual),
        "two numbers each": (x, q, one, None, [1], *usual[1:]),
        "must be 2-D uint8, of 4 bits": (x, q, one, None, *usual, "per_sample", [3, 3]),
        r"does not fit qweight \[2, 17\] of a \[3, 3\] kernel": (
            x,
            q.new_ones(2, 17, dtype=torch.uint8),
            one,
            None,
            *usual,
            "per_sample",
            [3, 3],
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            int8_conv(*args)


# the pass


def test_convolutions_stay_unless_asked() -> None:
    assert CONV in CONVS.kinds
    assert CONV not in Quantize().kinds
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)).eval()
    made = rewrite(model, [Quantize()], torch.randn(1, 3, 6, 6))
    assert type(made[0]) is nn.Conv2d
    assert [d.site for d in made.report.replaced] == ["1"]
    reasons = [d.reason for d in made.report.skipped]
    assert reasons == [
        "a Conv2d that mixes positions: no pass here takes one; "
        'Quantize("int8-dynamic", convolutions=True) does'
    ]
    made = rewrite(model, [Quantize("int4-dynamic")], torch.randn(1, 3, 6, 6))
    assert [d.site for d in made.report.replaced] == ["1"]


def test_methods_for_linear_layers_leave_convolutions_rounded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    x = torch.randn(9, 3, 6, 6)
    fitted = Quantize("int4-dynamic", method="gptq", convolutions=True)
    with pytest.warns(RewriteWarning, match="those of convolutions are rounded to the nearest"):
        made = rewrite(model, [fitted], x, calibration=[x] * 2)
    assert [type(m) for m in (made[0], made[2])] == [Int4Conv2d, Int4Linear]
    assert_equal(made[0].qweight, propose(model[0], FOUR).layer.qweight)
    assert made.report.replaced[1].output_error > 0


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.ConvTranspose2d(2, 2, 3), "it is transposed"),
        (nn.Conv3d(2, 2, 3), "it has 3 dimensions"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    ],
)
@BITS
def test_what_no_integer_convolution_computes_is_left(
    conv: nn.Module, reason: str, rewriting: Quantize
) -> None:
    assert reason in propose(conv, rewriting).reason


class Net(nn.Module):
    """A stem, a depthwise block and a head, as small networks for images have them."""

    def __init__(self, act: Callable[[], nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, 2, 1, bias=False), norm(8), act()
        self.wise, self.norm2, self.act2 = nn.Conv2d(8, 8, 3, 1, 1, groups=8), norm(8), act()
        self.point, self.norm3 = nn.Conv2d(8, 16, 1), norm(16)
        self.last = nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.act2(self.norm2(self.wise(x)))
        return torch.relu(self.last(self.norm3(self.point(x)))).mean((2, 3))


def norm(channels: int) -> nn.Module:
    layer = nn.BatchNorm2d(channels)
    nn.init.uniform_(layer.weight, -1.5, 1.5)  # also of negative sign
    for tensor in (layer.bias, layer.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(**options).eval()


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test goes by a time: one call for several operations counts as the faster one."""
    monkeypatch.setattr(conv_chains, "fastest", lambda key, version, make, *_: list(make())[-1])


ACTS = [nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU]


@pytest.mark.parametrize("act", ACTS)
def test_norm_and_activation_go_into_the_int8_convolution(act: Callable[[], nn.Module]) -> None:
    model = net(act=act)
    made = rewrite(model, [CONVS], IMAGES)
    plain = rewrite(model, [CONVS], IMAGES, lower=False)
    (step,) = [s for s in made.report.steps if s.name == "lowering"]
    kernels = [d.kernel for d in step.decisions if d.action == "lowered"]
    if conv_cpu.refusal() is not None or act is nn.GELU:  # which the kernel of chains does not have
        assert kernels == ["int8_conv_norm"] * 2 + ["int8_pointwise_norm", "int8_conv_act"]
    else:
        assert kernels == ["int8_conv_norm", "int8_conv_chain", "int8_conv_act"]
    assert list(made.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert_reordered(made(IMAGES), plain(IMAGES))
        assert sqnr(made(IMAGES), model(IMAGES)) > 25
        made.norm.running_mean.add_(1), plain.norm.running_mean.add_(1)  # derived anew
        assert_reordered(made(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("act", [nn.ReLU6, nn.GELU])
def test_convolutions_of_4_bits_lower_as_those_of_8(act: Callable[[], nn.Module]) -> None:
    model = net(act=act)
    made = rewrite(model, [FOUR], IMAGES)
    plain = rewrite(model, [FOUR], IMAGES, lower=False)
    (step,) = [s for s in made.report.steps if s.name == "lowering"]
    kernels = [d.kernel for d in step.decisions if d.action == "lowered"]
    first = "int8_depthwise" if conv_cpu.refusal() is None and act is nn.ReLU6 else "int8_conv_norm"
    assert kernels == ["int8_conv_norm", first, "int8_conv_act"]
    assert list(made.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert_reordered(made(IMAGES), plain(IMAGES))
        for each in (made, plain):  # what was derived of weights follows them
            each.stem.qweight.bitwise_xor_(0x11)
            each.last.qweight.bitwise_xor_(0x70)
        assert_reordered(made(IMAGES), plain(IMAGES))


def test_one_sample_without_a_batch_is_left_to_the_norm() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)).eval()
    x = torch.randn(2, 2, 9)
    made = rewrite(model, [CONVS], x)
    assert sqnr(made(x), model(x)) > 30


@BITS
def test_a_rewritten_model_is_saved_loaded_and_given_other_weights(
    tmp_path: Any, rewriting: Quantize
) -> None:
    model = net()
    made = rewrite(model, [rewriting], IMAGES)
    made.save(tmp_path)
    assert_equal(load(tmp_path, net())(IMAGES), made(IMAGES))
    other = net()
    with torch.no_grad():
        other.wise.weight.mul_(3), other.stem.weight.neg_()
    made.load_original(other.state_dict())
    assert_equal(made(IMAGES), rewrite(other, [rewriting], IMAGES)(IMAGES))
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert_equal(twin(IMAGES), made(IMAGES))


@BITS
def test_its_cost_is_counted(rewriting: Quantize) -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3, bias=False), nn.ReLU(), nn.Conv2d(32, 32, 5)).eval()
    report = rewrite(model, [rewriting], torch.randn(2, 8, 12, 12), lower=False).report
    weights = 32 * 8 * 9 + 32 * 32 * 25
    bits = 8 if rewriting is CONVS else 4
    assert report.after.macs == report.before.macs
    assert not report.errors
    assert report.after.param_bytes == weights * bits // 8 + 4 * (32 + 32 + 32)
    assert report.after.params == weights + 3 * 32
    assert [d.kernel for d in report.replaced] == [available_kernels()[0]] * 2
    (before, after) = (step.after.bytes_moved for step in report.steps[:2])
    assert before - after > 0.9 * (4 - bits / 8) * weights


def test_levels_lie_as_the_layer_is_laid_out() -> None:
    layer = QuantizedConv2d(8, 8, 3, channels_last=True)
    assert layer.qweight.is_contiguous(memory_format=torch.channels_last)
