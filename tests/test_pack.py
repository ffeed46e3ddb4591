"""Masks as bits and values as small integers: exact where promised, unbiased where not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rewriter.kernels import pack, pack_cpu
from rewriter.kernels.pack import GROUP, pack_bits, pack_groups, packed_bytes, unpack_bits
from rewriter.kernels.pack import unpack_groups as unpack

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(dtype)


@settings(max_examples=50)
@given(SHAPES, st.sampled_from(FLOATS), st.integers(0, 99))
def test_signs_come_back(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    x = values(shape, dtype, seed)
    bits = pack_bits(x)
    assert bits.nbytes == packed_bytes(x.numel(), 1)
    assert torch.equal(unpack_bits(bits, shape), x > 0)
    assert torch.equal(unpack_bits(bits, shape, dtype), (x > 0).to(dtype))
    assert torch.equal(pack_bits(x > 0), bits)


@settings(max_examples=50)
@given(SHAPES, st.sampled_from(FLOATS), st.sampled_from([8, 4]), st.integers(0, 99))
def test_groups_come_back_within_a_level(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int, seed: int
) -> None:
    x = values(shape, dtype, seed, 10.0 ** (seed % 5 - 2))
    q = pack_groups(x, bits)
    assert q.nbytes == packed_bytes(x.numel(), bits)
    y = unpack(q, shape, dtype, bits)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    if not x.numel():
        return
    wide, level = x.double().flatten(), []
    for group in wide.split(GROUP):
        level.append((group.max() - group.min()).expand(len(group)) / (2**bits - 1))
    # float16 scales of 4 bits and the result's own dtype lose some more
    more = 2.0**-10 * wide.abs().max() * (2**bits if bits == 4 else 1)
    bound = 1.01 * torch.cat(level) + more + torch.finfo(dtype).eps * wide.abs()
    assert ((y.double().flatten() - wide).abs() <= bound).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_unbiased(bits: int) -> None:
    x = values((4, GROUP), torch.float32, 0)
    copies = x.expand(100, 4, GROUP).contiguous()  # each with noise of its own

    def errors() -> Tensor:
        return unpack(pack_groups(copies, bits), copies.shape, x.dtype, bits) - x

    once = errors()
    many = torch.cat([once, *(errors() for _ in range(5))]).mean(0)
    # the ends of a range are rounded to themselves; 600 rounds give 1/√600 of the error
    assert many.std() < 0.08 * once[0].std()
    assert many.mean().abs() < 0.2 * many.std()


def test_constant_groups_and_the_last_short_one_are_exact() -> None:
    x = torch.cat([torch.full((GROUP,), 3.5), torch.zeros(GROUP), torch.full((5,), -2.0)])
    for bits in (8, 4):
        assert torch.equal(unpack(pack_groups(x, bits), x.shape, x.dtype, bits), x)


needs_kernel = pytest.mark.skipif(
    pack_cpu.refusal() is not None, reason=f"no compiled kernel: {pack_cpu.refusal()}"
)


@pytest.fixture(params=[pytest.param("compiled", marks=needs_kernel), "FBGEMM"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to 8 bits that a CPU has."""
    if request.param == "FBGEMM":
        monkeypatch.setattr(pack_cpu, "refusal", lambda: "not here")
    return str(request.param)


def test_both_ways_write_one_format(way: str) -> None:
    x = values((37, 91), torch.float32, 3)
    q = pack_groups(x)
    groups = pack._padded(x, GROUP).view(-1, GROUP)
    lo, hi = torch.aminmax(groups, dim=1)
    scale = pack._scales(q, 8)
    level = (hi - lo) / 255
    assert ((scale[:, 0] / level - 1).abs() < 0.01).all()  # noise widens FBGEMM's
    assert ((scale[:, 1] - lo).abs() <= level).all()
    torch.testing.assert_close(pack._dequantize(q, 8).flatten()[: x.numel()].view(x.shape),
                               unpack(q, x.shape, x.dtype, 8))  # fmt: skip


def test_what_is_not_finite_spoils_its_own_group_alone(way: str) -> None:
    x = values((5 * GROUP,), torch.float32, 4)
    x[GROUP], x[3 * GROUP + 7] = float("nan"), float("inf")
    good = unpack(pack_groups(x), x.shape, x.dtype, 8).view(5, GROUP).isfinite().all(1)
    assert good.tolist() == [True, False, True, False, True]


@needs_kernel
def test_threads_change_nothing() -> None:
    x, found, before = values((600, GROUP), torch.float32, 5), [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            q = torch.empty(600, GROUP + 8, dtype=torch.uint8)
            pack_cpu.pack(x, q, 11)
            found.append(q)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    other = torch.empty_like(q)
    pack_cpu.pack(x, other, 12)
    assert not torch.equal(other, q)


@needs_kernel
def test_the_check_makes_no_tensors() -> None:
    pack_cpu.refusal.cache_clear()
    with FakeTensorMode():  # as where a plan is made
        assert pack_cpu.refusal() is None


def test_sizes_that_do_not_fit_are_refused() -> None:
    q = pack_groups(torch.rand(300))
    for size, bits in (([600], 8), ([300], 4), ([128], 8)):
        with pytest.raises(ValueError, match="unpack_groups: "):
            unpack(q, size, torch.float32, bits)


@needs_kernel
def test_noise_is_uniform() -> None:
    x = torch.full((4000, GROUP), 100.25)
    x[:, 0], x[:, 1] = 0.0, 255.0  # levels are whole numbers: a quarter goes up
    up = unpack(pack_groups(x), x.shape, x.dtype, 8)[:, 2:] > 100.5
    share = up.float().mean()
    assert abs(float(share) - 0.25) < 4 * (0.25 * 0.75 / up.numel()) ** 0.5
    by_place = up.float().mean(0)
    assert float((by_place - 0.25).abs().max()) < 5 * (0.25 * 0.75 / len(x)) ** 0.5


@pytest.mark.parametrize("bits", [8, 4])
def test_plain_operations_give_what_the_fast_ones_give(bits: int) -> None:
    groups = values((300, GROUP), torch.float32, 1)
    fast, plain = pack._quantize_cpu(groups, bits), pack._quantize(groups, bits)
    assert fast.shape == plain.shape
    near = pack._dequantize(plain, bits), pack._dequantize(fast, bits)
    level = pack._scales(plain, bits)[:, :1]
    assert ((near[0] - near[1]).abs() <= level * 1.01).all()  # ties may go either way
    assert (near[0] != near[1]).float().mean() < 0.01
    fast_back = unpack(fast, groups.shape, groups.dtype, bits)
    torch.testing.assert_close(fast_back, pack._dequantize(fast, bits))


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    pack_groups(torch.randn(1000, generator=torch.Generator()), 8)
    assert torch.equal(state, torch.get_rng_state())


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="4 or 8, not 3"):
        pack_groups(torch.zeros(4), 3)


@settings(max_examples=20)
@given(SHAPES, st.booleans())
def test_fakes_match_what_runs(shape: tuple[int, ...], flipped: bool) -> None:
    assume(shape.count(0) < 2)  # which torch's own opcheck cannot copy
    x = values(shape, torch.float32, 0)
    x = x.permute(*reversed(range(x.ndim))) if flipped and x.ndim else x
    ops = torch.ops.rewriter
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(ops.pack_bits.default, (x,), test_utils=checks)
    args = pack_bits(x), list(x.shape), torch.float32
    torch.library.opcheck(ops.unpack_bits.default, args, test_utils=checks)
    for bits in (8, 4):
        back = pack_groups(x, bits), list(x.shape), torch.float32, bits
        torch.library.opcheck(ops.unpack_groups.default, back, test_utils=checks)
        made = ops.pack_groups.default(x.to("meta"), bits)
        assert made.shape == back[0].shape


def test_inside_a_compiled_function() -> None:
    def through(x: Tensor) -> tuple[Tensor, Tensor]:
        signs = unpack_bits(pack_bits(x), x.shape, x.dtype)
        return signs, unpack(pack_groups(x, 8), x.shape, x.dtype, 8)

    compiled = torch.compile(through, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x = values((rows, 70), torch.float32, rows)
        signs, rounded = compiled(x)
        assert torch.equal(signs, (x > 0).float())
        assert (rounded - x).abs().max() <= 1.01 * (x.max() - x.min()) / 255
