"""The compiled int8 kernels: every instruction set gives the bits of the torch formula."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.kernels import int8_cpu, native
from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_monarch as monarch
from rewriter.kernels import int8_product as product
from rewriter.kernels import int8_static as static
from rewriter.kernels.linear_act import act_

pytestmark = pytest.mark.skipif(
    int8_cpu.refusal() is not None, reason=f"no compiled kernel: {int8_cpu.refusal()}"
)

SETS = {
    "AMX-int8": ([], "amx_int8"),
    "AVX-512-VNNI": (["-DINT8_NO_AMX"], "avx512_vnni"),
    "AVX-VNNI": (["-DINT8_NARROW"], "avx_vnni"),
    "AVX2": (["-DINT8_NARROW", "-DINT8_PLAIN"], "avx2"),
}
"""Instruction set → what compiles the kernels for it, and what the CPU calls it."""


def has(flag: str) -> bool:
    found = Path("/proc/cpuinfo")
    return found.exists() and flag in found.read_text().split()


@pytest.fixture(scope="module", params=SETS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[str]:
    flags, name = SETS[request.param]
    if not has(name):
        pytest.skip(f"this CPU has no {request.param}")
    made = tmp_path_factory.mktemp("kernel") / "int8.so"
    given = ["-std=c++17", "-O1", *flags, native._native(), "-fPIC", "-shared", "-w"]
    command = [native._compiler(), *given, str(int8_cpu._SOURCE), "-o", str(made)]
    subprocess.run(command, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_cpu, "library", lambda _: native.ctypes.CDLL(str(made)))
        int8_cpu._library.cache_clear()
        yield request.param
    int8_cpu._library.cache_clear()


def problem(rows: int, k: int, n: int, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    qweight, scale = int8.quantize_weight(torch.randn(n, k, generator=g))
    return torch.randn(rows, k, generator=g), qweight, scale, torch.randn(n, generator=g)


def ran(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, **more: Any) -> Tensor:
    sums = qweight.sum(-1, dtype=torch.int32)
    add = more.pop("add", None)
    run = int8_cpu.Linear(int8_cpu.pack(qweight), x.shape[1], scale, sums, bias, **more)
    y, spoiled = run(x, add)
    assert not spoiled
    return y


@pytest.mark.parametrize("activation", int8.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_bits_are_those_of_torch(compiled: str, activation: str, bias: bool) -> None:
    assert int8_cpu.isa() == compiled
    # tails of rows, of columns and of k; all numbers of rows in a tile; panels in threes and pairs
    sizes = [(1, 1, 1), (2, 3, 33), (5, 66, 31), (7, 17, 100), (3, 130, 200), (29, 65, 47)]
    for rows, k, n in [*sizes, (12, 384, 96), (130, 40, 65)]:
        x, qweight, scale, b = problem(rows, k, n)
        own = b if bias else None
        want = product.run("torch", x, qweight, scale, own, activation)
        one = activation == "per_tensor"
        assert_equal(ran(x, qweight, scale, own, one_range=one), want)


@pytest.mark.parametrize("bias", [True, False])
def test_the_bits_with_a_range_that_is_given(compiled: str, bias: bool) -> None:
    for rows, k, n in [(1, 1, 1), (2, 3, 33), (7, 17, 100), (29, 65, 47), (12, 384, 96)]:
        x, qweight, scale, b = problem(rows, k, n)
        own, x[0, 0] = b if bias else None, 1e6
        for times in (None, torch.rand(k) + 0.5):
            want = static._run("torch", x, qweight, scale, own, 4 / 255, 100, times)
            found = ran(x, qweight, scale, own, given=(4 / 255, 100), multiplier=times)
            assert_equal(found, want)


@pytest.mark.parametrize("then", ["", *int8_cpu.THEN[1:]])
@pytest.mark.parametrize("given", [None, (4 / 255, 100)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_range_and_a_row_that_is_not_finite(
    compiled: str, bad: float, given: Any, then: str
) -> None:
    for k, at in ((40, 0), (40, 39), (7, 6)):
        x, qweight, scale, bias = problem(5, k, 24)
        x[3, at] = bad
        y = ran(x, qweight, scale, bias, then=then, one_range=True, given=given)
        assert y[3].isnan().all()
        assert y[:3].isfinite().all() if given else y.isnan().all()


@pytest.mark.parametrize("then", int8_cpu.THEN[1:])
def test_what_follows_the_product(compiled: str, then: str) -> None:
    x, qweight, scale, bias = problem(13, 50, 70)
    y = ran(x, qweight, scale, bias)
    wide = torch.cat([torch.linspace(-30, 30, 69), torch.tensor([-1e30])]).expand(13, 70)
    for add in (None, torch.randn(13, 70)):
        found = ran(x, qweight, scale, bias, then=then, add=add)
        want = act_(y.clone(), then)
        assert_reordered(found, want if add is None else want + add)
    # all of the activation's range, by a bias alone: a constant row of x has no product
    found = ran(torch.zeros(13, 50), qweight, scale, wide[0].clone(), then=then)
    assert_reordered(found, act_(wide.clone(), then))


@pytest.mark.parametrize("rows", [1, 7, 130])
@pytest.mark.parametrize("n", [3, 16, 41, 100])
def test_a_sum_and_a_norm_of_each_row(compiled: str, rows: int, n: int) -> None:
    x, qweight, scale, bias = problem(rows, 24, n)
    torch.manual_seed(0)
    add, weight, shift = torch.randn(rows, n), torch.randn(n), torch.randn(n)
    plain = ran(x, qweight, scale, bias) + add
    for norm in (int8_cpu.Norm(weight, shift, 1e-5), int8_cpu.Norm(None, None, 0.5)):
        want = torch.nn.functional.layer_norm(plain, (n,), norm.weight, norm.bias, norm.eps)
        assert_reordered(ran(x, qweight, scale, bias, add=add, norm=norm), want)


def test_rows_that_lie_apart(compiled: str) -> None:
    x, qweight, scale, bias = problem(9, 40, 24)
    apart = torch.randn(9, 3, 40)
    apart[:, 1] = x
    assert_equal(ran(apart[:, 1], qweight, scale, bias), ran(x, qweight, scale, bias))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_a_range_is_told_and_leaves_the_others(compiled: str, bad: float) -> None:
    for k, at in ((40, 0), (40, 39), (7, 6)):
        x, qweight, scale, bias = problem(5, k, 24)
        want = ran(x, qweight, scale, bias)
        x[3, at] = bad
        sums = qweight.sum(-1, dtype=torch.int32)
        y, spoiled = int8_cpu.Linear(int8_cpu.pack(qweight), k, scale, sums, bias)(x)
        assert spoiled
        assert y[3].isnan().all()
        assert_equal(y[[0, 1, 2, 4]], want[[0, 1, 2, 4]])


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 90), st.integers(1, 150))
def test_any_size_on_any_number_of_threads(seed: int, rows: int, k: int, n: int) -> None:
    x, qweight, scale, bias = problem(rows, k, n, seed)
    want = product.run("torch", x, qweight, scale, bias, "per_token")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_equal(ran(x, qweight, scale, bias), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("options", [{}, {"one_range": True}, {"given": (0.03, 120)}], ids=str)
@pytest.mark.parametrize("rows", [1, 30, 201])
def test_two_products_in_a_row_are_one_after_the_other(
    compiled: str, rows: int, options: Any
) -> None:
    x, qweight, scale, bias = problem(rows, 70, 130)
    _, other, times, _ = problem(1, 130, 37)
    norm = int8_cpu.Norm(torch.rand(37), None, 1e-5)
    first, second = (
        int8_cpu.Linear(
            int8_cpu.pack(q), q.shape[1], s, q.sum(-1, dtype=torch.int32), *behind, **options
        )
        for q, s, behind in ((qweight, scale, (bias, "gelu")), (other, times, (None, "", norm)))
    )
    add = torch.randn(rows, 37)
    want = second(first(x)[0], add)
    assert want[1] is False
    found = int8_cpu.Two(first, second)(x, add)
    assert_equal(found[0], want[0])
    x[rows // 2, 3] = torch.nan
    y, spoiled = int8_cpu.Two(first, second)(x, add)
    assert spoiled is (not options)
    assert y[rows // 2].isnan().all()


# Monarch layers: (rows, in, out, K, L, rank); panels that fill blocks and such that do not, inputs
# that do not fill theirs, outputs that are cropped
LAYERS = [
    (1, 64, 64, 4, 4, 4),
    (5, 23, 17, 3, 2, 2),
    (130, 67, 45, 4, 4, 3),
    (29, 96, 128, 2, 4, 5),
    (30, 5, 7, 4, 3, 2),
    (7, 64, 100, 1, 1, 5),
    (50, 96, 40, 2, 1, 33),
]


def layer(
    rows: int, width: int, out: int, k: int, l: int, rank: int, *options: Any
) -> monarch.Operands:
    g = torch.Generator().manual_seed(0)
    ib, ob = -(-width // k), -(-out // l)
    right = int8.quantize_weight(torch.randn(k, rank * l, ib, generator=g))
    left = int8.quantize_weight(torch.randn(l, ob, k * rank, generator=g))
    x, bias = torch.randn(rows, width, generator=g), torch.randn(out, generator=g)
    return monarch.Operands(x, *right, *left, bias, out, *options)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", int8.ACTIVATIONS)
def test_the_bits_of_a_monarch_layer_are_those_of_its_blocks(
    compiled: str, activation: str, interleaved: bool
) -> None:
    assert int8_cpu.isa() == compiled
    threads = torch.get_num_threads()
    try:
        for sizes in LAYERS:
            own = layer(*sizes, activation, interleaved)
            want = monarch._run("torch", own)
            for count in (1, 2):
                torch.set_num_threads(count)
                assert_equal(monarch._run("native", own), want)
                nothing = own._replace(bias=None)
                assert_equal(monarch._run("native", nothing), monarch._run("torch", nothing))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("sizes", LAYERS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_what_follows_a_monarch_layer(
    compiled: str, sizes: tuple[int, ...], interleaved: bool
) -> None:
    own, (rows, _, out, *_) = layer(*sizes, "per_token", interleaved), sizes
    norm = int8_cpu.Norm(torch.randn(out), torch.randn(out), 1e-5)
    for then in ("", "gelu"):
        for add in (None, torch.randn(rows, out)):
            for last in (None, norm):
                after = int8.After(then, add, last)
                want = after(monarch._run("torch", own))
                assert_reordered(monarch._run("native", own, after), want)


def test_two_monarch_layers_in_a_row(compiled: str) -> None:
    for rows in (1, 30, 130):
        one, two = layer(rows, 40, 96, 4, 4, 3), layer(rows, 96, 31, 2, 3, 4)
        add = torch.randn(rows, 31)
        first = monarch._made(one, int8.After("gelu"))
        both = first.before(monarch._made(two, int8.After()))
        assert both is not None
        want = first(one.x)[0]
        want = monarch._run("native", two._replace(x=want)) + add
        y, spoiled = both(one.x, add)
        assert not spoiled
        assert_reordered(y, want)
    assert both.before(first) is None


@pytest.mark.parametrize("activation", int8.ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_monarch_layer_tells_of_a_row_without_a_range(
    compiled: str, bad: float, activation: str
) -> None:
    for rows in (3, 70):
        own = layer(rows, 64, 64, 4, 4, 4, activation)
        own.x[2, 17] = bad
        assert monarch._made(own, int8.NOTHING)(own.x)[1]
        found, want = monarch._run("native", own), monarch._run("torch", own)
        assert_equal(found.isnan(), want.isnan())
        assert found[2].isnan().all()
