"""Weights of 8 and 4 bits: rounding in groups, and the products with them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from rewriter.kernels import native, weight_bound, weight_only, weight_only_cpu
from rewriter.kernels.int8_linear import quantize_weight
from rewriter.kernels.weight_only import GROUP_SIZES, dequantize_groups, pack, quantize_groups

BOTH = pytest.mark.parametrize("symmetric", [True, False])


@BOTH
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_levels_are_as_near_as_half_a_step(group_size: int, bits: int, symmetric: bool) -> None:
    weight = torch.randn(20, 200, generator=torch.Generator().manual_seed(0))
    q, scale, zero = quantize_groups(weight, bits, group_size, symmetric)
    assert q.shape == (20, -(-200 // group_size) * group_size)
    assert q.dtype == torch.int8
    assert -(2 ** (bits - 1)) <= q.min() < q.max() <= 2 ** (bits - 1) - 1
    assert (zero is None) == symmetric
    error = (dequantize_groups(q, scale, zero)[:, :200] - weight).abs()
    step = scale.float().abs().repeat_interleave(group_size, 1)[:, :200]
    inside = q[:, :200] < 2 ** (bits - 1) - 1  # symmetric levels end one step early on one side
    assert (error / step)[inside].max() <= 0.51 + 2**-9 * 2**bits
    assert (error / step).max() <= 1.01 + 2**-9 * 2**bits


@BOTH
@pytest.mark.parametrize("value", [0.0, 0.3, -7.7, 1e-30, 1e-45, 1e30])
def test_a_constant_group_is_met(value: float, symmetric: bool) -> None:
    weight = torch.full((2, 40), value)
    made = dequantize_groups(*quantize_groups(weight, 4, 32, symmetric))
    assert (made[:, :40] - weight).abs().max() <= 2**-8 * abs(value) + 1e-44


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_largest_weights_stay_finite(dtype: torch.dtype, symmetric: bool) -> None:
    weight = torch.full((2, 64), torch.finfo(dtype).max, dtype=dtype)
    weight[:, ::3] *= -1
    for bits in (2, 4, 8):
        q, scale, zero = quantize_groups(weight, bits, 32, symmetric)
        assert scale.isfinite().all()
        assert dequantize_groups(q, scale, zero).isfinite().all()


@BOTH
def test_a_group_has_a_scale_of_its_own(symmetric: bool) -> None:
    weight = torch.cat([torch.rand(4, 32), 1000 * torch.rand(4, 32), torch.zeros(4, 32)], 1)
    q, scale, zero = quantize_groups(weight, 4, 32, symmetric)
    error = (dequantize_groups(q, scale, zero) - weight).abs()
    assert error[:, :32].max() < 0.13
    assert error[:, 64:].max() == 0
    again = quantize_groups(dequantize_groups(q, scale, zero), 4, 32, symmetric)
    assert torch.equal(again[0], q)


@BOTH
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
def test_there_may_be_no_weights(shape: tuple[int, int], symmetric: bool) -> None:
    made = dequantize_groups(*quantize_groups(torch.empty(shape), 4, 32, symmetric))
    assert made.shape == shape


# Products ----------------------------------------------------------------------------------------

OPS = list(weight_only._KERNELS)
KINDS = [(op, s) for op in OPS for s in ([True] if op == "int8_weight_linear" else [True, False])]
EVERY = pytest.mark.parametrize(("op", "symmetric"), KINDS)


def problem(
    op: str, rows: int = 5, k: int = 72, n: int = 12, size: int = 32, symmetric: bool = True
) -> list[Any]:
    """x, weight, scale, zero, bias as kernels take them."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, k, generator=g), torch.randn(n, k, generator=g)
    bias = torch.randn(n, generator=g)
    if op == "int8_weight_linear":
        return [x, *quantize_weight(weight), None, bias]
    q, scale, zero = quantize_groups(weight, 4, size, symmetric)
    return [x, pack(q), scale, zero, bias]


def run(op: str, x: Tensor, weight: Tensor, scale: Tensor, zero: Any, bias: Any) -> Tensor:
    function = getattr(weight_only, op)
    return function(x, weight, scale, *([] if op == "int8_weight_linear" else [zero]), bias)


def formula(op: str, x: Tensor, *operands: Any) -> Tensor:
    return weight_only._REFERENCES[op](x.double(), *operands)


def plain(op: str) -> str:
    """The op of the same weights, with activations as they are."""
    return op.replace("_dynamic", "")


def test_packing_loses_nothing() -> None:
    q = (torch.arange(3 * 64) % 16 - 8).to(torch.int8).view(3, 64)
    assert pack(q).shape == (3, 32)
    assert_equal(weight_only.unpack(pack(q)), q)


SETS = {
    "AVX-512 and AVX-512-VNNI": ([], "avx512_vnni"),
    "AVX2 and AVX-VNNI": (["-DWEIGHT_NARROW"], "avx_vnni"),
    "AVX2": (["-mavx2", "-mfma"], "avx2"),
}
"""Instruction set → what compiles the kernels for it, and what the CPU calls it."""


@pytest.fixture(scope="module", params=SETS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[str]:
    if weight_only_cpu.refusal() is not None:
        pytest.skip(f"no compiled kernel: {weight_only_cpu.refusal()}")
    flags, name = SETS[request.param]
    if name not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this CPU has no {request.param}")
    made = tmp_path_factory.mktemp("kernel") / "weights.so"
    given = flags if "-mavx2" in flags else [*flags, native._native()]
    given = ["-std=c++17", "-O1", *given, "-fPIC", "-shared", "-w"]
    command = [native._compiler(), *given, str(weight_only_cpu._SOURCE), "-o", str(made)]
    subprocess.run(command, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_only_cpu, "library", lambda _: native.ctypes.CDLL(str(made)))
        weight_only_cpu._library.cache_clear()
        yield request.param
    weight_only_cpu._library.cache_clear()


@EVERY
def test_every_instruction_set_computes_the_formula(
    compiled: str, op: str, symmetric: bool
) -> None:
    assert weight_only_cpu.isa() == compiled
    kernel = weight_only._KERNELS[op]["native"]
    for rows in (1, 2, 3, 4, 5, 7, 12, 13, 29):  # all numbers of rows in a tile, and rests
        for k, n in ((1, 1), (31, 3), (64, 6), (200, 33)):
            for size in GROUP_SIZES:
                x, *operands = problem(op, rows, k, n, size, symmetric)
                assert_reordered(kernel(x, *operands).double(), formula(op, x, *operands), x.dtype)
    x, weight, scale, zero, _ = problem(op, 3, 40, 9, 32, symmetric)
    if op != "int8_weight_linear":  # scales may have been turned into float32
        wide = kernel(x, weight, scale.float(), None if zero is None else zero.float(), None)
        assert_equal(wide, kernel(x, weight, scale, zero, None))


@EVERY
def test_weights_as_floats_are_those_of_the_formula(
    compiled: str, op: str, symmetric: bool
) -> None:
    for k in (1, 40, 96):
        _, *operands, _ = problem(op, 1, k, 9, 32, symmetric)
        made = weight_only_cpu.dense(*operands, k)
        assert_reordered(made, formula(plain(op), torch.eye(k), *operands, None).t().float())


@EVERY
@pytest.mark.parametrize("kernel", ["native", "dense"])
def test_kernels_agree_with_the_formula(op: str, symmetric: bool, kernel: str) -> None:
    if (reason := weight_only.refused_kernels(op)[kernel]) is not None:
        pytest.skip(reason)
    for rows, k, n, size in ((1, 1, 1, 32), (3, 100, 70, 64), (40, 128, 33, 128)):
        x, *operands = problem(op, rows, k, n, size, symmetric)
        got = weight_only._KERNELS[op][kernel](x, *operands)
        assert_reordered(got.double(), formula(op, x, *operands), x.dtype)


@pytest.mark.parametrize("symmetric", [True, False])
def test_few_rows_of_the_largest_numbers(compiled: str, symmetric: bool) -> None:
    """Sums of groups stand before their scales are applied: they must not overflow where the
    result does not, nor make NaN of inf."""
    kernel = weight_only._KERNELS["int4_linear"]["native"]
    for rows in (1, 2, 3):
        x, weight, scale, zero, _ = problem("int4_linear", rows, 96, 9, 32, symmetric)
        scale = scale * 2**-10
        zero = None if zero is None else zero * 2**-10
        x[-1, 40] = 3e38
        want = formula("int4_linear", x, weight, scale, zero, None)
        assert_reordered(kernel(x, weight, scale, zero, None).double(), want, x.dtype)
        x[-1, 40] = torch.inf
        want = formula("int4_linear", x, weight, scale, zero, None)
        found = kernel(x, weight, scale, zero, None).double()
        assert_close(found[-1], want[-1], equal_nan=True)  # NaN where a weight is 0
        x[-1, 41] = torch.nan
        assert kernel(x, weight, scale, zero, None)[-1].isnan().all()


def test_weights_that_fill_many_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only, "_PANEL", 1)
    for op in OPS:
        x, *operands = problem(op, 4, 40, 200)
        got = weight_only._KERNELS[op]["dense"](x, *operands)
        assert_reordered(got.double(), formula(op, x, *operands), x.dtype)


@settings(max_examples=30)
@given(st.sampled_from(OPS), st.integers(1, 30), st.integers(1, 90), st.integers(1, 400))
def test_any_size_on_any_number_of_threads(op: str, rows: int, k: int, n: int) -> None:
    x, *operands = problem(op, rows, k, n)
    want, threads = formula(op, x, *operands), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(weight_only._KERNELS[op]["native"](x, *operands))
    finally:
        torch.set_num_threads(threads)
    assert_reordered(found[0].double(), want, x.dtype)
    assert_equal(found[1:], found[:1] * 2)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(op: str, symmetric: bool, dtype: torch.dtype) -> None:
    x, weight, scale, zero, bias = problem(op, symmetric=symmetric)
    got = run(op, x.to(dtype), weight, scale, zero, bias.to(dtype))
    assert got.dtype == dtype
    want = formula(op, x.to(dtype), weight, scale, zero, bias.to(dtype))
    assert_reordered(got.double(), want, torch.float32 if dtype == torch.float64 else dtype)


@EVERY
def test_shapes_strides_and_empties(op: str, symmetric: bool) -> None:
    x, weight, scale, zero, bias = problem(op, 12, symmetric=symmetric)
    want = run(op, x, weight, scale, zero, bias)
    assert_close(run(op, x.view(3, 4, 72), weight, scale, zero, bias), want.view(3, 4, 12))
    assert_close(run(op, x[0], weight, scale, zero, bias), want[0])
    assert_close(run(op, x.t().contiguous().t(), weight, scale, zero, bias), want)
    assert_close(run(op, x[::2], weight, scale, zero, bias), want[::2])
    strided = torch.stack([weight, weight], -1)[..., 0]
    assert_close(run(op, x, strided, scale, zero, bias), want)
    assert run(op, x[:0], weight, scale, zero, bias).shape == (0, 12)
    none = None if zero is None else zero[:0]
    assert run(op, x, weight[:0], scale[:0], none, None).shape == (12, 0)
    empty = [t if t is None or t.ndim == 1 else t[:, :0] for t in (weight, scale, zero)]
    assert_close(run(op, x[:, :0], *empty, bias), bias.expand(12, 12))
    on_meta = [None if t is None else t.to("meta") for t in (x, weight, scale, zero, bias)]
    assert run(op, *on_meta).shape == (12, 12)


@EVERY
def test_gradients_are_those_of_the_dense_layer(op: str, symmetric: bool) -> None:
    x, weight, scale, zero, bias = problem(op, 6, symmetric=symmetric)
    x.requires_grad_(), bias.requires_grad_()
    g = torch.randn(2, 3, 12)
    found = torch.autograd.grad(run(op, x.view(2, 3, 72), weight, scale, zero, bias), (x, bias), g)
    dense = formula(plain(op), torch.eye(72), weight, scale, zero, None).t().float()
    want = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias), (x, bias), g.view(6, 12))
    assert_close(found, want)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    x, weight, scale, zero, bias = problem(op, symmetric=False)
    zeros = [] if op == "int8_weight_linear" else [zero]
    x.requires_grad_(), bias.requires_grad_()
    packet = getattr(torch.ops.rewriter, op).default
    torch.library.opcheck(packet, (x, weight, scale, *zeros, bias))


@EVERY
def test_transforms_and_autocast(op: str, symmetric: bool) -> None:
    x, weight, scale, zero, bias = problem(op, 6, symmetric=symmetric)
    want = run(op, x, weight, scale, zero, bias)
    mapped = torch.vmap(lambda x: run(op, x, weight, scale, zero, bias))(x.view(2, 3, 72))
    assert_reordered(mapped, want.view(2, 3, 12))
    with torch.autocast("cpu", torch.bfloat16):
        assert run(op, x, weight, scale, zero, bias).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        run(op, x, weight, scale, zero, bias)
    assert counter.get_total_flops() == 2 * 6 * 72 * 12


@pytest.mark.parametrize("kernel", ["native", "dense"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_have_no_range(kernel: str, bad: float) -> None:
    op = "int4_dynamic_linear"
    if (reason := weight_only.refused_kernels(op)[kernel]) is not None:
        pytest.skip(reason)
    x, *operands, bias = problem(op, 6, symmetric=False)
    x[0], x[1], x[3] = 0.0, 1e-38, 3e38
    x[2, 70] = bad
    got = weight_only._KERNELS[op][kernel](x, *operands, bias)
    assert got[2].isnan().all()
    assert_equal(got[:2], bias.expand(2, 12))
    assert_reordered(got[4:].double(), formula(op, x[4:], *operands, bias), x.dtype)


def test_activations_of_eight_bits_are_close() -> None:
    x, *operands = problem("int4_linear", 50, 300, 40)
    x[:, 7] *= 100  # an outlier costs its own group alone
    got = weight_only.int4_dynamic_linear(x, *operands)
    assert sqnr(got, weight_only.int4_linear(x, *operands)) > 36


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.ones(2, 72, dtype=torch.int64)}, "must be real floating point"),
        ({"x": torch.ones(2, 64)}, "does not fit"),
        ({"x": torch.ones(())}, "does not fit"),
        ({"packed": torch.ones(12, 48)}, "must be a 2-D torch.uint8"),
        ({"scale": torch.ones(12)}, "does not fit"),
        ({"scale": torch.ones(11, 3)}, r"scale must be \[12, 3\]"),
        ({"scale": torch.ones(12, 5)}, "does not fit"),
        ({"zero": torch.ones(12, 1)}, r"zero must be \[12, 3\]"),
        ({"bias": torch.ones(3)}, r"bias must be \[12\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], said: str) -> None:
    names = "x", "packed", "scale", "zero", "bias"
    given = dict(zip(names, problem("int4_linear", symmetric=False), strict=True))
    with pytest.raises(ValueError, match=said):
        weight_only.int4_linear(**{**given, **change})


# Calls that skip the dispatcher ------------------------------------------------------------------


def direct(op: str, *given: Any) -> Tensor | None:
    return weight_bound.direct(op, weight_only._check, lambda *_: "native", *given)


with_kernel = pytest.mark.skipif(
    weight_only_cpu.refusal() is not None, reason=f"no kernel: {weight_only_cpu.refusal()}"
)


@with_kernel
@EVERY
def test_a_plain_call_skips_the_dispatcher(op: str, symmetric: bool) -> None:
    x, *operands = problem(op, 3, symmetric=symmetric)
    want = weight_only._KERNELS[op]["native"](x, *operands)
    for own in (x, x.view(3, 1, 72), x[0]):
        found = direct(op, own, *operands)
        assert found is not None
        assert found.shape == (*own.shape[:-1], 12)
        assert_reordered(found.view(-1, 12), want[: len(own.view(-1, 72))])
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert_equal(direct(op, x, *operands), want)
    finally:
        torch.set_default_dtype(default)


@with_kernel
def test_calls_that_others_have_a_say_in_go_through_the_op() -> None:
    op = "int4_linear"
    x, *operands = problem(op, symmetric=False)
    assert direct(op, x, *operands) is not None
    for own in (x.double(), x.bfloat16(), x[:0], x.t().contiguous().t(), x.to("meta")):
        assert direct(op, own, *operands) is None
    wanting = x.clone().requires_grad_()
    assert direct(op, wanting, *operands) is None
    assert direct(op, x, *operands[:3], operands[3].clone().requires_grad_()) is None
    with torch.no_grad():
        assert direct(op, wanting, *operands) is not None
    for mode in (
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        FlopCounterMode(display=False),
        torch.autograd.forward_ad.dual_level(),
    ):
        with mode:
            assert direct(op, x, *operands) is None
    seen = []
    torch.vmap(lambda x: seen.append(direct(op, x, *operands)) or x)(x)
    assert seen == [None]
    assert direct(op, x, operands[0], *[t.double() for t in operands[1:3]], None) is None


@with_kernel
def test_a_plain_call_reads_the_tensors_of_now() -> None:
    op = "int8_weight_linear"
    x, weight, scale, zero, bias = problem(op)
    bias = torch.nn.Parameter(bias, requires_grad=False)
    before = direct(op, x, weight, scale, zero, bias)
    weight.neg_(), scale.mul_(2)
    bias.data = -2 * bias.data  # other memory
    assert_close(direct(op, x, weight, scale, zero, bias), -2 * before)
    assert_close(direct(op, x, weight, scale / 2, zero, bias * 0.5), -before)
    key = id(weight)
    assert key in weight_bound._bound
    del weight
    assert key not in weight_bound._bound
    x, *operands = problem(op)
    with pytest.raises(ValueError, match="does not fit"):
        direct(op, x[:, :64].contiguous(), *operands)


def test_the_kernel_of_a_call_is_told() -> None:
    assert weight_only.kernel_name("int4_linear", 3, 12, 72, 32, torch.empty(0)) in (
        "native",
        "dense",
    )
    on_meta = torch.empty(0, device="meta")
    assert weight_only.kernel_name("int4_linear", 3, 12, 72, 32, on_meta) == "torch"
    assert weight_only.kernel_name("int4_linear", 0, 12, 72, 32, torch.empty(0)) == "torch"


def test_without_a_compiler_the_weights_are_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only_cpu, "refusal", lambda: "no C++ compiler")
    weight_only._refusal.cache_clear(), weight_only._picked.cache_clear()
    try:
        for op, symmetric in KINDS:
            assert "no C++ compiler" in str(weight_only.refused_kernels(op)["native"])
            x, *operands = problem(op, symmetric=symmetric)
            got = run(op, x, *operands)
            assert_reordered(got.double(), formula(op, x, *operands), x.dtype)
    finally:
        weight_only._refusal.cache_clear(), weight_only._picked.cache_clear()
