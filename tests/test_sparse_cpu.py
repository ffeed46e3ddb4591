"""Products that read the weights of active inputs alone: selection, kernels, the regime."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.kernels import choice, native, sparse, sparse_cpu
from rewriter.kernels.int8_linear import quantize_weight
from rewriter.kernels.sparse import Select, active, active_reference
from rewriter.kernels.sparse_int4 import pack_inputs
from rewriter.kernels.sparse_linear import sparse_linear, sparse_linear_reference
from rewriter.kernels.topk import topk_linear
from rewriter.kernels.weight_only import dequantize_groups, quantize_groups

SETS = {"AVX-512": ([], "avx512f"), "AVX2": (["-mavx2", "-mfma", "-mno-avx512f"], "avx2")}
"""Instruction set → what compiles the kernels for it, and what the CPU calls it."""


@pytest.fixture(scope="module", params=SETS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[str]:
    if sparse_cpu.refusal() is not None:
        pytest.skip(f"no compiled kernel: {sparse_cpu.refusal()}")
    flags, name = SETS[request.param]
    if name not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this CPU has no {request.param}")
    made = tmp_path_factory.mktemp("kernel") / "sparse.so"
    given = flags or [native._native()]
    command = [native._compiler(), "-std=c++17", "-O1", *given, "-fPIC", "-shared", "-w"]
    subprocess.run([*command, str(sparse_cpu._SOURCE), "-o", str(made)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_cpu, "library", lambda _: native.ctypes.CDLL(str(made)))
        sparse_cpu._library.cache_clear()
        yield request.param
    sparse_cpu._library.cache_clear()


SIZES = [(1, 5, 7), (2, 40, 64), (5, 33, 100), (8, 256, 96), (11, 300, 130), (16, 64, 576)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("rows", "out", "width"), SIZES)
def test_every_instruction_set_computes_the_formula(
    compiled: str, rows: int, out: int, width: int, dtype: torch.dtype
) -> None:
    assert sparse_cpu.isa() == compiled
    g = torch.Generator().manual_seed(0)
    x, bias = torch.randn(rows, width, generator=g), torch.randn(out, generator=g)
    dense = torch.randn(out, width, generator=g)
    weight, scale = quantize_weight(dense) if dtype == torch.int8 else (dense.to(dtype), None)
    floats = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    for select in (
        Select(max(width // 4, 1)),
        Select(0, 0.5),
        Select(width, importance=x[0].abs()),
    ):
        y, read = sparse_cpu.linear(x, weight.t().contiguous(), scale, bias, select, width)
        mask = active_reference(x, select)
        assert y is not None
        want = (x * mask).double() @ floats.t() + bias.double()
        assert_reordered(y, want.float())
        assert read == sum(int(mask[i : i + 8].any(0).sum()) for i in range(0, rows, 8))


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize(("symmetric", "group"), [(True, 32), (False, 64), (True, 128)])
@pytest.mark.parametrize("rows", range(1, 10))
def test_every_instruction_set_multiplies_by_4_bits(
    compiled: str, rows: int, symmetric: bool, group: int, floats: bool
) -> None:
    g = torch.Generator().manual_seed(rows)
    for out, width in ((1, 7), (131, 70), (320, 200), (64, 256)):
        x, bias = torch.randn(rows, width, generator=g), torch.randn(out, generator=g)
        dense = torch.randn(out, width, generator=g)
        q, *own = quantize_groups(dense, 4, group, symmetric)
        weight = dequantize_groups(q, own[0], own[1])[:, :width].double()
        scale, zero = (None if t is None else t.t().contiguous() for t in own)
        if floats:
            scale, zero = scale.float(), None if zero is None else zero.float()
        for select in (Select(max(width // 4, 1)), Select(0, 0.5), Select(width)):
            y, read = sparse_cpu.linear(
                x, pack_inputs(q, width), scale, bias, select, width, zero=zero, group=group
            )
            mask = active_reference(x, select)
            assert y is not None
            assert_reordered(y, ((x * mask).double() @ weight.t() + bias.double()).float())
            assert read == sum(int(mask[i : i + 8].any(0).sum()) for i in range(0, rows, 8))


def test_more_active_rows_than_the_limit_are_not_multiplied() -> None:
    x, weight = torch.ones(3, 40), torch.ones(40, 16)
    assert sparse_cpu.linear(x, weight, None, None, Select(11), 11)[0] is not None
    assert sparse_cpu.linear(x, weight, None, None, Select(11), 10) == (None, 11)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, weight = torch.randn(4, 700), torch.randn(700, 900)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(sparse_cpu.linear(x, weight, None, None, Select(200), 700)[0])
    finally:
        torch.set_num_threads(before)
    assert_equal(*found)


# Selection ---------------------------------------------------------------------------------------

VALUES = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-30, 1e30, float("inf")])


@settings(max_examples=60)
@given(st.data(), st.integers(1, 40), st.sampled_from([1, 8, 16, 32]), st.booleans())
def test_selection_is_that_of_the_formula(
    data: st.DataObject, width: int, block: int, weighted: bool
) -> None:
    row = data.draw(st.lists(VALUES, min_size=width, max_size=width))
    x = torch.tensor([row, row[::-1]])
    importance = torch.arange(width).remainder(3).float() + 1 if weighted else None
    k = data.draw(st.integers(0, width))
    threshold = data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    select = Select(k, threshold, importance, block)
    assert_equal(active(x, select), active_reference(x, select))
    assert_equal(sparse.masked(x, select), x.where(active_reference(x, select), 0.0))


def test_ties_go_to_the_lower_index() -> None:
    x = torch.tensor([[1.0, -2.0, 2.0, -1.0, 1.0]])
    for choose in (active, active_reference):
        assert choose(x, Select(3)).tolist() == [[True, True, True, False, False]]
        assert choose(torch.zeros(1, 5), Select(2)).tolist() == [[True, True, False, False, False]]


def test_nan_is_active_and_reaches_the_outputs() -> None:
    x = torch.full((1, 40), 5.0)
    x[0, 33] = float("nan")
    for select in (Select(1), Select(0, 1e30), Select(8, block=8)):
        for choose in (active, active_reference):
            assert choose(x, select)[0, 33]
        assert sparse.masked(x, select)[0, 33].isnan()
    weight = torch.randn(6, 40)
    assert topk_linear(x, weight, None, 1).isnan().all()
    assert sparse_linear(x, weight, threshold=torch.tensor([9.0])).isnan().all()


# The op ------------------------------------------------------------------------------------------


def operands(*lead: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (*lead, 8), (5, 8), (5,)
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


OPTIONS: list[dict[str, Any]] = [
    {"threshold": torch.tensor([0.6])},
    {"k": 3},
    {"k": 4, "block": 4, "importance": torch.linspace(0.5, 2, 8)},
    {"threshold": torch.tensor([0.9]), "block": 2, "importance": torch.linspace(0.5, 2, 8)},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_the_op_is_its_formula_and_its_gradient_that_of_active_entries(
    options: dict[str, Any], lead: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x, weight, bias = operands(*lead)

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return sparse_linear(x, weight, None, bias, **options)

    want = sparse_linear_reference(x, weight, None, bias, **options)
    torch.testing.assert_close(op(x, weight, bias), want)
    assert torch.autograd.gradcheck(op, (x, weight, bias), eps=1e-7)
    narrow = [t.detach().float() for t in (x, weight, bias)]
    assert_reordered(op(*narrow), want.float())


def test_opcheck() -> None:
    for dtype in (torch.float64, torch.float32):
        x, weight, bias = operands(3, dtype=dtype)
        given = (x, weight, None, bias, torch.tensor([0.5]), torch.ones(8), 0, 1, 0.5)
        torch.library.opcheck(torch.ops.rewriter.sparse_linear, given)
    q, scale = quantize_weight(weight.detach())
    given = (x.detach(), q, scale, None, None, None, 3, 1)
    torch.library.opcheck(torch.ops.rewriter.sparse_linear, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5, 7)}, r"weight \[out, in\], not \(3, 8\) and \(5, 7\)"),
        ({"k": 0}, "from 1 to the 8 entries"),
        ({"k": 9}, "from 1 to the 8 entries"),
        ({"k": 3, "block": 2}, "multiple of block=2, not 3"),
        ({"block": 3}, "block=3 does not divide the 8"),
        ({"scale": torch.ones(5)}, "a scale belongs to an int8 weight"),
        ({"bias": torch.ones(4)}, r"bias must have shape \[5\]"),
        ({"importance": torch.ones(4)}, r"importance must have shape \[8\]"),
        ({"threshold": torch.ones(2)}, r"threshold must be \[1\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    fitting = {"x": torch.ones(3, 8), "weight": torch.ones(5, 8), "k": 3}
    with pytest.raises(RuntimeError, match=message):
        sparse_linear(**{**fitting, **change})


# The regime --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, sparse.MOST_ROWS, sparse.MOST_ROWS + 1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows_gives_the_same(rows: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, 64).to(dtype), torch.randn(48, 64).to(dtype)
    mask = active_reference(x, Select(16))
    y = topk_linear(x, weight, None, 16)
    assert y.dtype == dtype
    assert_reordered(y, F.linear(x * mask, weight))


def test_dense_runs_where_more_is_active_than_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_measured", lambda *_: 0.25)
    x, weight = torch.randn(1, 64), torch.randn(48, 64)
    own: Any = x, weight, None, None
    assert sparse.multiplied(*own, Select(16)) is not None
    assert sparse.multiplied(*own, Select(17)) is None
    assert_reordered(topk_linear(x, weight, None, 17), F.linear(x * active(x, Select(17)), weight))
    name = sparse.kernel_name(weight, 1, 0.25)
    assert name.endswith("25% of the weight's rows; dense above 1 rows of input")
    assert sparse.kernel_name(weight, 1, 0.5).startswith("dense: 50% of the weight's rows")
    assert sparse.kernel_name(weight, 100, 0.5) == "dense at 100 rows; sparse kernels take up to 16"


def test_without_a_compiled_kernel_all_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "refusal", lambda: "no compiler")
    x, weight = torch.randn(2, 64), torch.randn(48, 64)
    assert_reordered(topk_linear(x, weight, None, 9), F.linear(x * active(x, Select(9)), weight))
    assert sparse.kernel_name(weight, 1, 0.5) == "torch, dense: no compiler"


def test_the_copy_by_columns_follows_the_weight() -> None:
    layer, x = nn.Linear(64, 48, bias=False).requires_grad_(False), torch.randn(1, 64)

    def same() -> None:
        want = F.linear(x * active(x, Select(16)), layer.weight)
        assert_reordered(topk_linear(x, layer.weight, None, 16), want)

    same()
    layer.weight.mul_(2)
    same()
    layer.weight.data = torch.randn(48, 64)
    same()
    kept = sparse.by_columns(layer.weight)
    assert sparse.by_columns(layer.weight) is kept
    assert sparse.held_bytes(layer.weight, 1) == 4 * 48 * 64
    assert sparse.held_bytes(layer.weight, 100) == 0
    columns = layer.weight.t().contiguous().t()
    assert sparse.by_columns(columns).data_ptr() == columns.data_ptr()
    assert sparse.held_bytes(columns, 1) == 0
    levels = quantize_weight(layer.weight)[0].t().contiguous().t()
    assert sparse.held_bytes(levels, 1) == 0
    assert sparse.held_bytes(levels, 100) == 48 * 64
    assert sparse.by_rows(levels) is sparse.by_rows(levels)
    assert_equal(sparse.by_rows(levels), levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("pays", [0.0, 0.12, 0.6, 0.7, 1.0])
def test_the_largest_share_that_pays_is_measured(
    monkeypatch: pytest.MonkeyPatch, pays: float, dtype: torch.dtype
) -> None:
    """Against the dense product of the same weights, in three measurements at most."""
    monkeypatch.undo()
    asked: list[float] = []

    def fastest(key: str, version: str, candidates: Any, *_: Any) -> str:
        asked.append(float(key.split()[5]))
        pair = candidates()
        full = asked[-1] == 1.0
        got, want = pair["sparse"]()[0], pair["dense"]()
        assert got.shape == want.shape
        if full and dtype != torch.int8:  # whose result is a float's
            assert_reordered(got.to(dtype), want)
        elif full:
            assert_reordered(got, want)
        return "sparse" if asked[-1] <= pays else "dense"

    monkeypatch.setattr(choice, "fastest", fastest)
    assert MEASURED.__wrapped__(dtype, 2, 8, 64, 1) == pays
    assert 1 <= len(asked) <= 3


def test_the_report_says_up_to_how_many_rows_it_is_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sparse, "_measured", lambda dtype, rows, *_: {1: 1.0, 2: 0.7}.get(rows, 0.5)
    )
    weight = torch.randn(48, 64)
    assert sparse.kernel_name(weight, 1, 0.1).endswith(
        "10% of the weight's rows; dense above 4 rows of input"
    )
    assert sparse.kernel_name(weight, 1, 0.4).endswith("dense above 2 rows of input")
    assert sparse.kernel_name(weight, 3, 0.1).endswith(
        "27% of the weight's rows; dense above 4 rows of input"
    )


MEASURED = sparse._measured


# Gated MLPs --------------------------------------------------------------------------------------

ACTS: dict[str, Any] = {
    "": lambda a: a,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
}


@pytest.mark.parametrize("then", sparse_cpu.THEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("rows", "out", "width", "hidden"), [(1, 33, 70, 100), (11, 64, 32, 300)])
@pytest.mark.parametrize("screened", [False, True])
def test_a_gated_mlp_computes_its_formula(
    compiled: str,
    rows: int,
    out: int,
    width: int,
    hidden: int,
    dtype: Any,
    then: str,
    screened: bool,
) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=g)
    gates, floats, biases = [], [], []
    for shape in ((hidden, width), (hidden, width), (out, hidden)):
        weight, bias = torch.randn(shape, generator=g) / 8, torch.randn(shape[0], generator=g)
        own, scale = quantize_weight(weight) if dtype == torch.int8 else (weight.to(dtype), None)
        floats.append(own.double() if scale is None else own.double() * scale.double()[:, None])
        own = own if len(gates) < 2 else own.t()
        gates.append(sparse_cpu.Gate(own.contiguous(), scale, bias))
        biases.append(bias.double())
    levels, scale = quantize_weight(floats[0].float())
    screen = sparse_cpu.Gate(levels, scale, gates[0].bias) if screened else None
    select = Select(hidden // 4)
    y, read = sparse_cpu.gated(x, *gates, then, select, hidden, screen)
    assert y is not None
    seen = levels.double() * scale.double()[:, None] if screened else floats[0]
    chosen = active_reference(ACTS[then](x.double() @ seen.t() + biases[0]), select)
    a = ACTS[then](x.double() @ floats[0].t() + biases[0]) * chosen
    h = a * (x.double() @ floats[1].t() + biases[1])
    assert_reordered(y, (h @ floats[2].t() + biases[2]).float())
    assert read == sum(int(chosen[i : i + 8].any(0).sum()) for i in range(0, rows, 8))
    assert sparse_cpu.gated(x, *gates, then, select, hidden // 5, screen)[0] is None


def test_what_comes_before_a_timed_call_comes_before_each() -> None:
    calls: list[str] = []
    made = {name: functools.partial(calls.append, name) for name in ("dense", "sparse")}
    choice._measure(made, before=functools.partial(calls.append, "before"))
    assert calls[::2] == ["before"] * (len(calls) // 2)
    assert set(calls[1::2]) == {"dense", "sparse"}


@pytest.mark.skipif(sparse_cpu.refusal() is not None, reason="no compiled kernels here")
def test_evicted_tensors_are_what_they_were() -> None:
    some = torch.arange(1000.0), torch.arange(7, dtype=torch.int8), torch.empty(0)
    want = [t.clone() for t in some]
    sparse_cpu.evict(*some)
    for t, u in zip(some, want, strict=True):
        assert_equal(t, u)
