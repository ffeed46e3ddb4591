"""int8 linear in a fixed range: the op, its kernels and gradients, and the layer around it."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from rewriter.kernels import int8_choice as choice
from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_static as static
from rewriter.kernels.int8_static import int8_static_linear, int8_static_linear_reference
from rewriter.passes import StaticOutlierLinear, StaticQuantizedLinear

KERNELS = int8.available_kernels()
WIDE = 3.0
"""Of inputs that a range of −2 … 2 clips about every twentieth of."""


def problem(
    rows: int = 5, k: int = 24, n: int = 12, seed: int = 0, smooth: bool = False
) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    qweight, scale = int8.quantize_weight(torch.randn(n, k, generator=g))
    x, bias = torch.randn(rows, k, generator=g), torch.randn(n, generator=g)
    multiplier = torch.rand(k, generator=g) + 0.5 if smooth else None
    step, zero = torch.tensor([4 / 255]), torch.tensor([120], dtype=torch.uint8)
    return x, qweight, scale, bias, step, zero, multiplier


def run(kernel: str, args: tuple[Any, ...], then: str = "") -> Tensor:
    *own, step, zero, multiplier = args
    return static._run(kernel, *own, float(step), int(zero), multiplier, int8.After(then))


def dense(args: tuple[Any, ...]) -> Tensor:
    weight = int8.dequantize_weight(args[1], args[2])
    return weight if args[-1] is None else weight * args[-1]


# the kernels


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("then", ["", "relu", "gelu"])
def test_every_kernel_gives_the_same_bits_on_any_number_of_threads(smooth: bool, then: str) -> None:
    for rows, k, n in ((1, 1, 1), (2, 3, 33), (5, 66, 31), (29, 130, 47), (60, 1500, 9)):
        args = problem(rows, k, n, smooth=smooth)
        args[0][0, 0] = 1e6
        found, threads = [], torch.get_num_threads()
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                found += [run(kernel, args, then) for kernel in KERNELS]
        finally:
            torch.set_num_threads(threads)
        check = assert_reordered if then == "gelu" else assert_equal
        for other in found[1:]:
            check(other, found[0])


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree_with_the_formula(kernel: str, smooth: bool) -> None:
    for rows, k, n in ((1, 384, 7), (3, 17, 5), (33, 131, 64)):
        args = problem(rows, k, n, smooth=smooth)
        assert sqnr(run(kernel, args), int8_static_linear_reference(*args)) > 80
        args = (*args[:3], None, *args[4:])
        assert sqnr(run(kernel, args), int8_static_linear_reference(*args)) > 80


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_lies_outside_is_clipped(kernel: str) -> None:
    x, qweight, scale, bias, step, zero, _ = problem()
    low, high = -120 * step, 135 * step
    args = (100 * x, qweight, scale, bias, step, zero, None)
    ends = torch.where(x > 0, high, low)
    inside = (100 * x).clamp(low, high)
    assert sqnr(run(kernel, args), inside @ dense(args).t() + bias) > 30
    args = (1e9 * x, *args[1:])
    assert_reordered(run(kernel, args), ends @ dense(args).t() + bias)


@pytest.mark.parametrize("kernel", KERNELS)
def test_zero_is_exact(kernel: str) -> None:
    args = problem()
    args[0].zero_()
    assert_equal(run(kernel, args), args[3].expand(5, 12))


@pytest.mark.parametrize("then", ["", "relu", "gelu", "silu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kernel", [*KERNELS, "plain"])
def test_a_row_that_is_not_finite_is_nan_and_no_other(kernel: str, bad: float, then: str) -> None:
    for smooth, at in ((False, 0), (True, 23)):
        args = problem(smooth=smooth)
        if kernel == "plain":
            args = (args[0].double(), *args[1:])
        args[0][2, at] = bad
        if kernel == "plain":
            own = static.int8_static_linear(*args)
            got = int8.After(then)(own)
        else:
            got = run(kernel, args, then)
        assert got[2].isnan().all()
        assert got[[0, 1, 3, 4]].isfinite().all()


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 70), st.integers(-6, 6))
def test_the_error_of_any_problem_is_within_half_a_step(
    seed: int, rows: int, k: int, power: int
) -> None:
    x, qweight, scale, _, _, _, _ = problem(rows, k, 4, seed)
    x = x * 10.0**power
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 254
    zero = torch.tensor([round(-low / step)], dtype=torch.uint8)
    got = int8_static_linear(x, qweight, scale, None, torch.tensor([step]), zero)
    w = int8.dequantize_weight(qweight, scale)
    noise = 1e-5 * (x.abs() @ w.abs().t())
    assert ((got - x @ w.t()).abs() <= 0.51 * step * w.abs().sum(-1) + noise).all()


# the op


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("smooth", [False, True])
def test_dtypes(dtype: torch.dtype, smooth: bool) -> None:
    x, *rest = problem(smooth=smooth)
    got = int8_static_linear(x.to(dtype), *rest)
    assert got.dtype == dtype
    want = int8_static_linear_reference(x.to(dtype), *rest)
    computed = torch.float32 if dtype == torch.float64 else dtype
    assert_close(got.to(computed), want.to(computed))


def test_shapes_strides_and_empties() -> None:
    x, *rest = problem(12)
    want = int8_static_linear(x, *rest)
    assert_equal(int8_static_linear(x.view(3, 4, 24), *rest), want.view(3, 4, 12))
    assert_equal(int8_static_linear(x[0], *rest), want[0])
    assert_equal(int8_static_linear(x.t().contiguous().t(), *rest), want)
    assert_equal(int8_static_linear(x[::2], *rest), want[::2])
    qweight, scale, bias, step, zero, _ = rest
    strided = torch.stack([qweight, qweight], -1)[..., 0]
    assert_equal(int8_static_linear(x, strided, *rest[1:]), want)
    assert int8_static_linear(x[:0], *rest).shape == (0, 12)
    empty = int8_static_linear(x[:, :0], qweight[:, :0], scale, bias, step, zero)
    assert_equal(empty, bias.expand(12, 12))
    none = int8_static_linear(x, qweight[:0], scale[:0], None, step, zero)
    assert none.shape == (12, 0)
    meta = [None if t is None else t.to("meta") for t in (x, *rest)]
    assert int8_static_linear(*meta).shape == (12, 12)


@pytest.mark.parametrize("smooth", [False, True])
def test_the_gradient_is_straight_through_and_zero_where_x_is_clipped(smooth: bool) -> None:
    x, qweight, scale, bias, step, zero, times = args = problem(6, smooth=smooth)
    x = (WIDE * x).requires_grad_()
    bias.requires_grad_()
    g = torch.randn(6, 12)
    y = int8_static_linear(x, qweight, scale, bias, step, zero, times)
    dx, db = torch.autograd.grad(y, (x, bias), g)
    assert_close(db, g.sum(0))
    moved = x.detach() if times is None else x.detach() * times
    leaf = moved.clone().requires_grad_()
    torch.fake_quantize_per_tensor_affine(leaf, float(step), int(zero), 0, 255).sum().backward()
    assert 0 < float(leaf.grad.mean()) < 1  # some are clipped, and not all
    assert_close(dx, (g @ dense(args)) * leaf.grad)
    again = torch.func.vjp(lambda t: int8_static_linear(t, *args[1:]), x.detach())[1](g)[0]
    assert_close(again, dx)


def test_vmap_and_opcheck() -> None:
    x, *rest = problem(smooth=True)
    each = torch.func.vmap(lambda row: int8_static_linear(row, *rest))(x)
    assert_reordered(each, int8_static_linear(x, *rest))
    args = (x.clone().requires_grad_(), *rest)
    torch.library.opcheck(torch.ops.rewriter.int8_static_linear.default, args)


def test_flops_autocast_and_compile() -> None:
    args = problem()
    with FlopCounterMode(display=False) as counter:
        int8_static_linear(*args)
    assert counter.get_total_flops() == 2 * 5 * 24 * 12
    with torch.autocast("cpu", torch.bfloat16):
        assert int8_static_linear(*args).dtype == torch.bfloat16
    compiled = torch.compile(int8_static_linear, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(*args), int8_static_linear(*args))


def test_a_changed_range_or_weight_is_noticed() -> None:
    args = problem(smooth=True)
    for change in (
        lambda: args[1].neg_(),
        lambda: args[4].mul_(2),
        lambda: args[5].zero_(),
        lambda: args[6].mul_(0.5),
    ):
        before = int8_static_linear(*args)
        change()
        after = int8_static_linear(*args)
        assert not torch.equal(after, before)
        assert sqnr(after, int8_static_linear_reference(*args)) > 80


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, torch.zeros(2, 23), "must be 24"),
        (0, torch.zeros(2, 24, dtype=torch.int32), "int8_static_linear: x must be real floating"),
        (1, torch.zeros(12, 24), "int8_static_linear: qweight must be a 2-D int8"),
        (2, torch.ones(11), r"scale must be \[12\]"),
        (4, torch.ones(()), r"step must be \[1\]"),
        (4, torch.zeros(1), "step must be above 0, got 0"),
        (4, torch.full((1,), math.nan), "step must be above 0, got nan"),
        (5, torch.zeros(1, dtype=torch.int32), "zero must be uint8"),
        (6, torch.ones(23), r"multiplier must be \[24\]"),
    ],
)
def test_refuses(at: int, value: Tensor, words: str) -> None:
    args = list(problem())
    args[at] = value
    with pytest.raises(ValueError, match=words):
        int8_static_linear(*args)


def test_the_choice_is_measured_on_the_kernels_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def fastest(key: str, version: str, candidates: Any) -> str:
        made = {name: call() for name, call in candidates().items()}
        assert made.keys() == set(KERNELS)
        for y in made.values():
            assert_equal(y, made["torch"])
        return "torch"

    monkeypatch.setattr(choice, "fastest", fastest)
    assert static.pick_kernel(7, 24, 12) == "torch"
    assert static.kernel_name(7, 24, 12, device="meta") == "torch"
    assert static.kernel_name(0, 24, 12) == "torch"


# the layer


LAYERS = {
    "plain": lambda **kw: StaticQuantizedLinear(24, 10, **kw),
    "smooth": lambda **kw: StaticQuantizedLinear(23, 9, bias=False, smooth=True, **kw),
    "outliers": lambda **kw: StaticOutlierLinear(24, 10, 3, **kw),
}


@pytest.mark.parametrize("name", LAYERS)
def test_round_trips(name: str) -> None:
    make = LAYERS[name]
    layer: Any = make()
    with torch.no_grad():
        layer.step.mul_(0.5)
        layer.zero.sub_(5)
        if layer.multiplier is not None:
            layer.multiplier.uniform_(0.5, 2)
    x = torch.randn(3, 2, layer.in_features)
    want = layer(x)
    assert_equal(copy.deepcopy(layer)(x), want)
    assert_equal(pickle.loads(pickle.dumps(layer))(x), want)
    rebuilt = type(layer)(**layer.config())
    other = rebuilt(x)  # packs weights that the next line overwrites in place
    rebuilt.load_state_dict(layer.state_dict())
    assert_equal(rebuilt(x), want)
    assert not torch.equal(other, want)
    built = type(layer)(**layer.config(), device="meta", dtype=torch.float64)
    assert built.state_dict().keys() == layer.state_dict().keys()
    built.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert sqnr(built(x), want) > 80
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert sqnr(half(x.bfloat16()), want) > 30


@pytest.mark.parametrize("name", LAYERS)
def test_compile_export_and_gradient(name: str) -> None:
    layer: Any = LAYERS[name]().eval()
    x = torch.rand(3, layer.in_features, requires_grad=True)
    want = layer(x)
    assert_equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), want)
    exported = torch.export.export(layer, (x.detach(),))
    assert_equal(exported.module()(x.detach()), want.detach())
    assert "int8_static_linear" in str(exported.graph)
    (dx,) = torch.autograd.grad(want.sum(), x)
    assert_close(dx, layer.dense_weight().sum(0).expand_as(x))


@pytest.mark.parametrize("low", [-3.0, 0.0, 0.5, -1e-3])
def test_from_weight_takes_a_range_with_zero_in_it(low: float) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(7, 16), torch.rand(9, 16) * (3 - low) + low
    multiplier = torch.rand(16) + 0.5
    for times in (None, multiplier):
        ends = (low, 3.0) if times is None else (min(1.5 * low, low), 4.5)
        layer = StaticQuantizedLinear.from_weight(weight, None, *ends, times)
        assert sqnr(layer.dense_weight(), weight) > 38
        assert sqnr(layer(x), x @ weight.t()) > 35
        assert_equal(layer(torch.zeros(2, 16)), torch.zeros(2, 7))
