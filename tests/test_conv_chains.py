"""Depthwise convolutions by the compiled kernel, by themselves and between int8 products."""

from __future__ import annotations

import copy
import pickle
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from marks import slow_but
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter import load, rewrite
from rewriter.kernels import conv_cpu, native
from rewriter.kernels import int8_linear as int8
from rewriter.kernels.int8_conv import int8_conv_reference
from rewriter.kernels.linear_act import act_
from rewriter.lowering import conv_chains
from rewriter.passes import Quantize

pytestmark = pytest.mark.skipif(
    conv_cpu.refusal() is not None, reason=f"no compiled kernel: {conv_cpu.refusal()}"
)
LAST = torch.channels_last
SAME_LEVELS = 60
"""Decibels: of the levels of a value that rounds otherwise a few are the next ones."""


# the kernel


@pytest.fixture(scope="module", params=["as it is", "narrow"])
def _compiled(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[None]:
    if request.param == "as it is":
        yield
        return
    made = tmp_path_factory.mktemp("kernel") / "conv.so"
    given = ["-std=c++17", "-O1", "-DVECTORS_NARROW", native._native(), "-fPIC", "-shared", "-w"]
    command = [native._compiler(), *given, str(conv_cpu._SOURCE), "-o", str(made)]
    subprocess.run(command, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_cpu, "library", lambda _: native.ctypes.CDLL(str(made)))
        conv_cpu._library.cache_clear()
        yield
    conv_cpu._library.cache_clear()


WINDOWS: dict[str, tuple[Any, ...]] = {
    # channels, height and width, kernel, stride, zeros around, dilation
    "plain": (32, (9, 8), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "around": (48, (9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "one side": (96, (8, 9), (3, 3), (2, 2), ((0, 1), (1, 0)), (1, 1)),
    "five": (64, (14, 14), (5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1)),
    "channels that fill no vector": (7, (6, 7), (5, 3), (2, 1), ((2, 1), (1, 1)), (1, 1)),
    "and more": (41, (5, 5), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "dilated": (24, (9, 9), (3, 3), (1, 2), ((2, 2), (3, 3)), (2, 3)),
    "window larger than the image": (16, (2, 2), (5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1)),
    "strides that skip": (16, (11, 12), (2, 2), (3, 4), ((0, 0), (1, 1)), (1, 1)),
    "far outside": (16, (3, 3), (1, 1), (1, 1), ((2, 3), (2, 3)), (1, 1)),
}


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, window: Any, then: str) -> Tensor:
    stride, around, dilation = window
    x = F.pad(x, [n for pair in reversed(around) for n in pair])
    y = F.conv2d(x, weight, bias, stride, 0, dilation, len(weight))
    return act_(y, then) if then else y


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("name", WINDOWS)
def test_every_window(name: str) -> None:
    channels, size, kernel, stride, around, dilation = WINDOWS[name]
    torch.manual_seed(0)
    weight, bias = torch.randn(channels, 1, *kernel), torch.randn(channels)
    x = torch.randn(3, channels, *size)
    window = stride, around, dilation
    for given in (x, x.contiguous(memory_format=LAST)):
        run = conv_cpu.Chain(weight, bias, *window)
        y, spoiled = run(given)
        assert not spoiled
        assert y.is_contiguous(memory_format=LAST)
        assert_reordered(y, by_torch(x, weight, bias, window, ""))


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("then", conv_cpu.THEN)
def test_what_follows_it(then: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(20, 1, 3, 3), torch.randn(1, 20, 6, 6)
    x[0, 3, 2, 2] = float("nan")
    window = (1, 1), ((1, 1), (1, 1)), (1, 1)
    y, _ = conv_cpu.Chain(3 * weight, None, *window, then)(x)
    assert_reordered(y, by_torch(x, 3 * weight, None, window, then), equal_nan=True)


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("name", WINDOWS)
def test_levels_are_those_of_the_formula(name: str) -> None:
    channels, size, kernel, stride, around, dilation = WINDOWS[name]
    torch.manual_seed(0)
    qweight = torch.randint(-127, 128, (channels, 1, *kernel), dtype=torch.int8)
    scale, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    x = torch.randn(2, channels, *size) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1) + 0.25
    run = conv_cpu.Chain(qweight.float(), bias, stride, around, dilation, scale=scale)
    wide = F.pad(x, [n for pair in reversed(around) for n in pair])
    want = int8_conv_reference(wide, qweight, scale, bias, stride, (0, 0), dilation, channels)
    y, spoiled = run(x)
    assert not spoiled
    assert_reordered(y, want)
    for bad in (float("inf"), float("nan"), 3e38):
        x[1, 0, 0, 0] = bad
        assert run(x)[1]


def product(width: int, out: int, then: str) -> Any:
    qweight, scale = int8.quantize_weight(torch.randn(out, width))
    return int8.native_linear(qweight, scale, torch.randn(out), int8.After(then))


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_chain_is_one_step_after_the_other_on_any_number_of_threads(
    images: int, levels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(conv_cpu, "_ALONE", 0)
    first, last = product(16, 80, "relu6"), product(80, 24, "")
    weight, scale = torch.randint(-9, 10, (80, 1, 5, 5)).float(), torch.rand(80)
    own = weight, torch.randn(80), (2, 1), ((1, 2), (2, 2)), (1, 1), "relu6"
    given = {"scale": scale} if levels else {}
    x = torch.randn(images, 16, 40, 37).contiguous(memory_format=LAST)
    middle, _ = conv_cpu.Chain(*own, **given)(by_rows(first, x))
    add = torch.randn_like(want := by_rows(last, middle))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_equal(conv_cpu.Chain(*own, first, last, **given)(x)[0], want)
            assert_equal(conv_cpu.Chain(*own, first, last, **given)(x, add)[0], want + add)
            assert_equal(conv_cpu.Chain(*own, first, **given)(x)[0], middle)
    finally:
        torch.set_num_threads(threads)


def by_rows(linear: Any, x: Tensor) -> Tensor:
    y, spoiled = linear(x.permute(0, 2, 3, 1).contiguous())
    assert not spoiled
    return y.permute(0, 3, 1, 2)


def test_levels_of_a_tensor() -> None:
    x = torch.linspace(-1, 3, 35).view(1, 5, 7)
    q, s, zero = conv_cpu.levels(x)
    assert zero == round(1 / s)
    assert_equal(q, ((x / s + zero + 0.5).floor()).to(torch.uint8))
    assert conv_cpu.levels(x.log())[1] != conv_cpu.levels(x.log())[1]  # NaN


# the rules


class Block(nn.Module):
    """As MobileNets have them."""

    def __init__(
        self, act: Callable[[], nn.Module] = nn.ReLU6, stride: int = 1, levels: bool = False,
        functional: bool = False, wide: bool = True, narrow: bool = True, norms: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        inside = 32 if wide else 8
        self.wide = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), norm(32, norms), act())
        self.wide = self.wide if wide else nn.Identity()
        self.deep = nn.Conv2d(inside, inside, 3, stride, groups=inside, padding=int(not functional))
        self.norm, self.act = norm(inside, norms), act()
        self.narrow = nn.Sequential(nn.Conv2d(inside, 8, 1), norm(8, norms))
        self.narrow = self.narrow if narrow else nn.Identity()
        self.functional, self.adds = functional, stride == 1 and wide == narrow
        self.head = nn.Conv2d(8 if narrow else inside, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x)
        if self.functional:
            y = F.pad(y, [0, 2, 1, 1])
            y = F.conv2d(y, self.deep.weight, self.deep.bias, self.deep.stride, groups=y.shape[1])
        else:
            y = self.deep(y)
        y = self.narrow(self.act(self.norm(y)))
        return self.head(x + y if self.adds else y)


def norm(channels: int, there: bool) -> nn.Module:
    if not there:
        return nn.Identity()
    layer = nn.BatchNorm2d(channels)
    nn.init.uniform_(layer.weight, -1.5, 1.5)
    for tensor in (layer.bias, layer.running_mean):
        nn.init.normal_(tensor)
    return layer


@pytest.fixture(autouse=True)
def _always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test goes by a time: one call for several operations counts as the faster one."""
    monkeypatch.setattr(conv_chains, "fastest", lambda key, version, make, *_: list(make())[-1])
    monkeypatch.setattr(int8, "pick_kernel", lambda *_: "native")
    monkeypatch.setattr("rewriter.engine.engine.Engine._lowering_pays", lambda _: True)


X = torch.randn(2, 8, 9, 10, generator=torch.Generator().manual_seed(3))
BLOCKS: dict[str, tuple[dict[str, Any], str]] = {
    "all of it": ({}, "int8_conv_chain_add"),
    "stride, called as a function": ({"stride": 2, "functional": True}, "int8_conv_chain"),
    "hardtanh": ({"act": lambda: nn.Hardtanh(0.0, 6.0)}, "int8_conv_chain_add"),
    "silu, no norms": ({"act": nn.SiLU, "norms": False}, "int8_conv_chain_add"),
    "not wider, a function": ({"wide": False, "functional": True}, "int8_conv_chain"),
    "not narrower": ({"narrow": False, "act": nn.Hardswish}, "int8_conv_chain"),
    "by itself": ({"wide": False, "narrow": False, "functional": True}, "depthwise_conv"),
    "by itself, with levels": ({"wide": False, "narrow": False}, "int8_depthwise"),
}
DYNAMIC = Quantize("int8-dynamic", convolutions=True)


def block(**options: Any) -> Any:
    torch.manual_seed(0)
    return Block(**options).eval()


def fused(model: Any) -> list[str]:
    (step,) = [s for s in model.report.steps if s.name == "lowering"]
    return [d.kernel for d in step.decisions if d.kernel]


def assert_as_unlowered(model: Any, x: Tensor) -> None:
    state = vars(model)["_rewriter"]
    lowered = state.lowered
    with torch.no_grad():
        got = model(x)
        state.lowered = None
        want = model(x)
        state.lowered = lowered
    assert_equal(got.isnan(), want.isnan())
    assert sqnr(got.nan_to_num(), want.nan_to_num()) > SAME_LEVELS
    assert got.stride() == want.stride()


@pytest.mark.parametrize("name", slow_but(BLOCKS, 0, 4, 7))
def test_a_block_is_one_call(name: str) -> None:
    options, kernel = BLOCKS[name]
    made = rewrite(block(**options), [DYNAMIC], X)
    assert kernel in fused(made)
    spoiled = X.clone()
    spoiled[0, 1, 2, 3] = float("nan")
    for x in (X, X[:1], X.contiguous(memory_format=LAST), torch.randn(1, 8, 17, 4), spoiled):
        assert_as_unlowered(made, x)


def test_a_block_with_ranges_that_are_fixed() -> None:
    made = rewrite(block(), [Quantize("int8-static", smooth=0.5)], X, calibration=[X])
    assert fused(made) == ["int8_conv_chain_add"]
    assert_as_unlowered(made, X)


def test_a_model_that_is_saved_and_changed_computes_the_same(tmp_path: Any) -> None:
    made = rewrite(block(), [DYNAMIC], X)
    made.save(tmp_path)
    with torch.no_grad():
        before = made(X)
        for twin in (
            load(tmp_path, block()),
            copy.deepcopy(made),
            pickle.loads(pickle.dumps(made)),
        ):
            assert_equal(twin(X), before)
        for tensor in (made.norm.running_mean, made.wide[1].bias, made.deep.scale):
            tensor.add_(0.5)
            assert sqnr(made(X), before) < SAME_LEVELS
            assert_as_unlowered(made, X)
            before = made(X)


@pytest.mark.parametrize("name", ["range", "activation"])
def test_what_the_kernel_does_not_have_runs_by_other_rules(name: str) -> None:
    activation, act = ("per_tensor", nn.ReLU) if name == "range" else ("per_token", nn.ELU)
    made = rewrite(block(act=act), [Quantize(activation=activation)], X)
    assert not [kernel for kernel in fused(made) if "chain" in kernel]
    assert_as_unlowered(made, X)


REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "padding": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=8), nn.ReLU()
        ).eval(),
        "does not pad with zeros",
    ),
    "tall": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, (33, 1), padding=(16, 0), groups=8)).eval(),
        "more rows of taps",
    ),
    "float64": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()).double().eval(),
        "in float32",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_the_kernel_does_not_have_is_a_reason(name: str) -> None:
    make, reason = REASONS[name]
    x = X.double() if name == "float64" else X
    made = rewrite(make(), [], x)
    (step,) = [s for s in made.report.steps if s.name == "lowering"]
    assert any(reason in d.reason for d in step.decisions), step.decisions
    assert_as_unlowered(made, x)


@pytest.mark.parametrize("pads", ["reflect", "value", "negative"])
def test_what_is_padded_otherwise_stays(pads: str) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep, self.relu = nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            if pads == "reflect":
                x = F.pad(x, [1, 1, 1, 1], mode="reflect")
            else:
                x = F.pad(x, [1, -1, 0, 1]) if pads == "negative" else F.pad(x, [1, 1], value=2.0)
            return self.relu(self.deep(x))

    torch.manual_seed(0)
    model = Padded().eval()
    made = rewrite(model, [], X)
    assert fused(made) == ["depthwise_conv"]  # without what pads
    assert_as_unlowered(made, X)
