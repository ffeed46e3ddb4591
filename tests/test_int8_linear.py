import copy
import math

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from rewriter.kernels import int8_choice as choice
from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_product as product
from rewriter.kernels.int8_linear import (
    ACTIVATIONS,
    available_kernels,
    dequantize_weight,
    int8_linear,
    int8_linear_reference,
    kernel_name,
    pick_kernel,
    quantize_weight,
)
from rewriter.kernels.int8_monarch import int8_monarch_linear, int8_monarch_linear_reference
from rewriter.kernels.monarch import monarch_dense, monarch_linear

KERNELS = available_kernels()


def problem(rows=5, k=24, n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, scale = quantize_weight(torch.randn(n, k, generator=g))
    return torch.randn(rows, k, generator=g), q, scale, torch.randn(n, generator=g)


def monarch_problem(rows=5, n=3, rank=2, i=14, o=10):
    g = torch.Generator().manual_seed(0)
    right = quantize_weight(torch.randn(n, n * rank, -(-i // n), generator=g))
    left = quantize_weight(torch.randn(n, -(-o // n), n * rank, generator=g))
    return torch.randn(rows, i, generator=g), *right, *left, torch.randn(o, generator=g), o


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "k", "n"),
    [(1, 1, 1), (1, 384, 7), (2, 1, 4), (3, 17, 1), (3, 17, 5), (2, 66, 33), (33, 131, 64)],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree_with_the_formula(kernel, rows, k, n, activation):
    x, q, scale, bias = problem(rows, k, n)
    want = int8_linear_reference(x, q, scale, bias, activation)
    assert sqnr(product.run(kernel, x, q, scale, bias, activation), want) > 80
    want = int8_linear_reference(x, q, scale, None, activation)
    assert sqnr(product.run(kernel, x, q, scale, None, activation), want) > 80


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", [127, -128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_extreme_sums_do_not_saturate(kernel, weight, activation):
    x = torch.full((4, 2048), 255.0)
    x[:, 0] = 0
    q, scale = torch.full((6, 2048), weight, dtype=torch.int8), torch.ones(6)
    got = product.run(kernel, x, q, scale, None, activation)
    assert_close(got, torch.full((4, 6), 255.0 * 2047 * weight))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_outliers_and_constant_rows_stay_finite(kernel, activation):
    x, q, scale, bias = problem(6, 24, 12)
    x[0], x[1], x[2, 3], x[3] = 0.0, 7.0, 1e6, 1e-9
    got = product.run(kernel, x, q, scale, bias, activation)
    assert got.isfinite().all()
    assert_close(got[0], bias)
    if activation == "per_token":  # one row's outlier is no other row's problem
        assert_close(got[1], x[1] @ dequantize_weight(q, scale).t() + bias)
        assert sqnr(got[4:], x[4:] @ dequantize_weight(q, scale).t() + bias) > 35


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_non_finite_input_is_not_hidden(kernel, bad):
    x, q, scale, bias = problem(6, 24, 12)
    x[2, 5] = bad
    got = product.run(kernel, x, q, scale, bias, "per_token")
    assert got[2].isnan().all()
    assert got[[0, 1, 3, 4, 5]].isfinite().all()
    assert product.run(kernel, x, q, scale, bias, "per_tensor").isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    x, q, scale, bias = problem()
    got = int8_linear(x.to(dtype), q, scale, bias.to(dtype))
    assert got.dtype == dtype
    want = int8_linear_reference(x.to(dtype), q, scale, bias.to(dtype))
    computed = torch.float32 if dtype == torch.float64 else dtype
    assert_close(got.to(computed), want.to(computed))


def test_shapes_strides_and_empties():
    x, q, scale, bias = problem(12)
    want = int8_linear(x, q, scale, bias)
    assert_close(int8_linear(x.view(3, 4, 24), q, scale, bias), want.view(3, 4, 12))
    assert_close(int8_linear(x[0], q, scale, bias), want[0])
    assert_close(int8_linear(x.t().contiguous().t(), q, scale, bias), want)
    assert_close(int8_linear(x[::2], q, scale, bias), want[::2])
    strided = torch.stack([q, q], -1)[..., 0]
    assert_close(int8_linear(x, strided, scale, bias), want)
    assert int8_linear(x[:0], q, scale, bias).shape == (0, 12)
    assert_close(int8_linear(x[:, :0], q[:, :0], scale, bias), bias.expand(12, 12))
    assert int8_linear(x, q[:0], scale[:0]).shape == (12, 0)
    x[:, 1] = 3
    assert int8_linear(x.to("meta"), q.to("meta"), scale.to("meta")).shape == (12, 12)


def test_gradients_are_straight_through():
    x, q, scale, bias = problem(6)
    x.requires_grad_(), bias.requires_grad_()
    g = torch.randn(2, 3, 12)
    dx, db = torch.autograd.grad(int8_linear(x.view(2, 3, 24), q, scale, bias), (x, bias), g)
    assert_close(dx, g.view(6, 12) @ dequantize_weight(q, scale))
    assert_close(db, g.sum((0, 1)))
    xm, *rest, bm, o = monarch_problem()
    xm.requires_grad_(), bm.requires_grad_()
    dx, db = torch.autograd.grad(int8_monarch_linear(xm, *rest, bm, o).sum(), (xm, bm))
    right, left = dequantize_weight(*rest[:2]), dequantize_weight(*rest[2:])
    want = monarch_linear(xm, right, left, bm, o).sum()
    assert_close((dx, db), torch.autograd.grad(want, (xm, bm)))


@pytest.mark.parametrize("shape", [(24,), (6, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_are_those_of_the_dense_layer(shape, with_bias):
    _, q, scale, bias = problem()
    leaves = [torch.randn(shape).requires_grad_()] + [bias.requires_grad_()] * with_bias
    g = torch.randn(*shape[:-1], 12)
    own = bias if with_bias else None
    dense = torch.nn.functional.linear(leaves[0], dequantize_weight(q, scale), own)
    want = torch.autograd.grad(dense, leaves, g)
    found = torch.autograd.grad(int8_linear(leaves[0], q, scale, own), leaves, g)
    assert_close(found, want)


@pytest.mark.parametrize("shape", [(14,), (5, 14), (2, 3, 14)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_monarch_are_those_of_its_dense_layer(shape, with_bias):
    _, *factors, bias, o = monarch_problem()
    leaves = [torch.randn(shape).requires_grad_()] + [bias.requires_grad_()] * with_bias
    own, g = bias if with_bias else None, torch.randn(*shape[:-1], o)
    right, left = dequantize_weight(*factors[:2]), dequantize_weight(*factors[2:])
    dense = torch.nn.functional.linear(leaves[0], monarch_dense(right, left, o, 14), own)
    found = torch.autograd.grad(int8_monarch_linear(leaves[0], *factors, own, o), leaves, g)
    assert_close(found, torch.autograd.grad(dense, leaves, g))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_monarch_agrees_with_the_formula(activation):
    for shape in ({}, {"n": 4, "rank": 3, "i": 67, "o": 45}, {"n": 1, "rows": 1}):
        args = monarch_problem(**shape)
        want = int8_monarch_linear_reference(*args, activation)
        # the second rounding sees float32 noise of the first, and may fall the other way
        assert sqnr(int8_monarch_linear(*args, activation), want) > 40
    x, *rest = monarch_problem()
    assert int8_monarch_linear(x[:0], *rest).shape == (0, 10)
    assert int8_monarch_linear(x.view(5, 1, 14).bfloat16(), *rest).dtype == torch.bfloat16


def test_opcheck():
    x, q, scale, bias = problem()
    for args in (
        (x, q, scale, bias),
        (x.clone().requires_grad_(), q, scale, None, "per_tensor"),
    ):
        torch.library.opcheck(torch.ops.rewriter.int8_linear.default, args)
    x, *rest = monarch_problem()
    for args in ((x, *rest), (x.clone().requires_grad_(), *rest)):
        torch.library.opcheck(torch.ops.rewriter.int8_monarch_linear.default, args)


def test_flops():
    x, q, scale, bias = problem()
    with FlopCounterMode(display=False) as counter:
        int8_linear(x, q, scale, bias)
    assert counter.get_total_flops() == 2 * 5 * 24 * 12
    args = monarch_problem()
    with FlopCounterMode(display=False) as counter:
        int8_monarch_linear(*args)
    assert counter.get_total_flops() == 2 * 5 * 9 * 2 * (5 + 4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_changed_weight_is_noticed_and_nothing_leaks(kernel):
    x, q, scale, bias = problem()
    before = len(product._CACHE)
    for change in (
        lambda q: q.neg_(),
        lambda q: q.copy_(problem(seed=1)[1]),
        lambda q: scale.mul_(2),
    ):
        product.run(kernel, x, q, scale, bias, "per_token")
        change(q)
        got = product.run(kernel, x, q, scale, bias, "per_token")
        assert sqnr(got, int8_linear_reference(x, q, scale, bias)) > 80
    q.data = problem(seed=2)[1]
    got = product.run(kernel, x, q, scale, bias, "per_token")
    assert sqnr(got, int8_linear_reference(x, q, scale, bias)) > 80
    del q
    assert len(product._CACHE) <= before


def test_weight_made_under_inference_mode():
    with torch.inference_mode():
        x, q, scale, bias = problem()
        for _ in range(2):
            assert_close(int8_linear(x, q, scale), int8_linear_reference(x, q, scale))
            q.neg_()


def test_autocast_and_compile():
    x, q, scale, bias = problem()
    with torch.autocast("cpu", torch.bfloat16):
        assert int8_linear(x, q, scale, bias).dtype == torch.bfloat16
    compiled = torch.compile(int8_linear, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, q, scale, bias), int8_linear(x, q, scale, bias))


def test_threads_agree():
    x, q, scale, bias = problem(64)
    want = int8_linear(x, q, scale, bias)
    from concurrent.futures import ThreadPoolExecutor

    fresh = copy.deepcopy(q)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: int8_linear(x, fresh, scale, bias), range(16)):
            assert_close(got, want)


def test_kernel_choice():
    assert pick_kernel(7, 24, 12) in KERNELS
    assert pick_kernel(7, 24, 12) == pick_kernel(8, 24, 12) == kernel_name(5, 24, 12)
    assert kernel_name(8, 24, 12, device="meta") == "torch"
    assert KERNELS[-1] == "torch"
    assert set(int8.refused_kernels()).isdisjoint(KERNELS)


@pytest.mark.skipif(len(int8.available_kernels()) < 2, reason="there is nothing to choose from")
def test_the_choice_is_measured_on_the_kernels_themselves(monkeypatch):
    def fastest(key, version, candidates):
        made = {name: call() for name, call in candidates().items()}
        assert made.keys() == set(int8.available_kernels())
        for y in made.values():
            assert_reordered(y, made["torch"])
        return "torch"

    monkeypatch.setattr(choice, "fastest", fastest)
    assert pick_kernel(7, 24, 12) == "torch"


def test_a_kernel_that_saturates_is_refused(monkeypatch):
    real = product.run
    monkeypatch.setattr(product, "run", lambda *a: real(*a).clamp_(max=1e5))
    assert "wrong by" in choice.refusal.__wrapped__("onednn")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "per_row"}, "per_token"),
        ({"qweight": torch.zeros(12, 24)}, "int8"),
        ({"x": torch.zeros(2, 24, dtype=torch.int32)}, "floating"),
        ({"x": torch.zeros(2, 23)}, "must be 24"),
        ({"scale": torch.ones(11)}, r"scale must be \[12\]"),
        ({"bias": torch.ones(11)}, r"bias must be \[12\]"),
    ],
)
def test_refuses(change, words):
    x, q, scale, bias = problem()
    with pytest.raises(ValueError, match=words):
        int8_linear(**{"x": x, "qweight": q, "scale": scale, "bias": bias} | change)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, torch.zeros(2, 9), "does not fit qright"),
        (1, torch.zeros(3, 6, 5), "must be int8"),
        (2, torch.ones(3, 5), "scales must be"),
        (3, torch.zeros(2, 4, 6, dtype=torch.int8), r"must be \[K, rank\*L, ib\]"),
        (5, torch.ones(9), r"bias must be \[10\]"),
    ],
)
def test_monarch_refuses(at, value, words):
    args = list(monarch_problem())
    args[at] = value
    with pytest.raises(ValueError, match=words):
        int8_monarch_linear(*args)
    with pytest.raises(ValueError, match="activation must be"):
        int8_monarch_linear(*monarch_problem(), "per_row")


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 70), st.integers(-3, 3))
def test_error_of_any_problem_is_within_half_a_step(seed, rows, k, power):
    x, q, scale, _ = problem(rows, k, 4, seed)
    x = x * 10.0**power
    got, w = int8_linear(x, q, scale), dequantize_weight(q, scale)
    step = (x.amax(-1) - x.amin(-1) + 1e-8) / 255
    bound = 0.5 * step[:, None] * w.abs().sum(-1)
    noise = 1e-5 * (x.abs() @ w.abs().t())
    assert ((got - x @ w.t()).abs() <= bound + noise).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_bits_depend_neither_on_the_kernel_nor_on_the_threads(activation):
    for rows, k, n in ((1, 5, 7), (3, 64, 33), (17, 768, 20), (5, 1500, 9)):
        x, bias = torch.randn(rows, k), torch.randn(n)
        qweight, scale = quantize_weight(torch.randn(n, k))
        found, threads = [], torch.get_num_threads()
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                for kernel in int8.available_kernels():
                    operands = x, qweight, scale, bias, activation
                    found.append(product.run(kernel, *operands))
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert_equal(other, found[0])


@pytest.mark.parametrize(
    ("dtype", "huge"), [(torch.float64, 1e300), (torch.float32, 3e38), (torch.bfloat16, 3e38)]
)
def test_numbers_at_the_end_of_a_range_stay_finite_and_in_their_row(dtype, huge):
    x = torch.randn(3, 16).to(dtype)
    qweight, scale = quantize_weight(torch.eye(16) / 16)
    alone = int8_linear(x, qweight, scale)
    x[1] = torch.linspace(-1, 1, 16, dtype=torch.float64).mul(huge).to(dtype)
    y = int8_linear(x, qweight, scale)
    assert bool(y.isfinite().all())
    assert_equal(y[::2], alone[::2])
    assert sqnr(y[1].double() / huge, x[1].double() / huge / 16) > 35
    x[1, 0] = math.inf
    y = int8_linear(x, qweight, scale)
    assert bool(y[1].isnan().all())
    assert_equal(y[::2], alone[::2])
