"""Products of a selection of inputs with weights of 4 bits: the op, the layer, the regime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.errors import OptionError
from rewriter.kernels import choice, sparse_cpu, sparse_int4
from rewriter.kernels.sparse import Select, active_reference
from rewriter.kernels.sparse_int4 import (
    dequantize_inputs,
    pack_inputs,
    sparse_int4_linear,
    sparse_int4_reference,
)
from rewriter.kernels.weight_only import dequantize_groups, quantize_groups
from rewriter.passes import SparseInt4Linear, TopKLinear

MEASURED = sparse_int4._measured


@pytest.fixture(autouse=True)
def _sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_int4, "_measured", lambda *_: 0.5)  # whatever pays on this machine


def operands(
    out: int, width: int, group: int = 32, symmetric: bool = True, dtype: torch.dtype = torch.float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """packed, scale and zero of a random weight."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(out, width, generator=g, dtype=dtype)
    q, scale, zero = quantize_groups(weight, 4, group, symmetric)
    own = pack_inputs(q, width), scale.t().contiguous()
    return (*own, None if zero is None else zero.t().contiguous())


@given(st.integers(1, 70), st.integers(1, 140), st.sampled_from([32, 64, 128]), st.booleans())
@settings(max_examples=30)
def test_levels_by_inputs_are_those_by_outputs(
    out: int, width: int, group: int, symmetric: bool
) -> None:
    q, scale, zero = quantize_groups(torch.randn(out, width), 4, group, symmetric)
    packed = pack_inputs(q, width)
    assert packed.is_contiguous()
    assert packed.shape == (width, (out + 1) // 2)
    zeros = None if zero is None else zero.t()
    found = dequantize_inputs(packed, scale.t(), zeros, group)
    assert_equal(found, dequantize_groups(q, scale, zero)[:, :width])


OPTIONS: list[dict[str, Any]] = [
    {"threshold": torch.tensor([0.8])},
    {"k": 12},
    {"k": 12, "block": 4, "importance": torch.linspace(0.5, 2, 40)},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (20,)])
def test_the_op_is_its_formula_and_its_gradient_that_of_active_entries(
    options: dict[str, Any], symmetric: bool, lead: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(*lead, 40), torch.randn(13)
    own = operands(13, 40, symmetric=symmetric)
    weight = dequantize_inputs(*own, 32)
    mask = active_reference(x, Select.of(**{"threshold": None, **options}))
    want = x.where(mask, 0.0) @ weight.t() + bias
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = x.to(dtype)
        y = sparse_int4_linear(given, *own, bias.to(dtype), **options, group_size=32)
        assert y.dtype == dtype
        if dtype == torch.float32:
            assert_reordered(y, want)
        else:
            rest = [options.get(n, v) for n, v in DEFAULTS.items()]
            formula = sparse_int4_reference(given, *own, bias.to(dtype), *rest, 32)
            assert_reordered(y, formula)
    x.requires_grad_()
    bias.requires_grad_()
    y = sparse_int4_linear(x, *own, bias, **options, group_size=32)
    g = torch.randn_like(y)
    dx, db = torch.autograd.grad(y, (x, bias), g)
    assert_reordered(dx, (g @ weight).where(mask, 0.0))
    assert_reordered(db, g.reshape(-1, 13).sum(0))


DEFAULTS = {"threshold": None, "importance": None, "k": 0, "block": 1}


def test_gradients_are_those_of_differences() -> None:
    packed, scale, zero = operands(5, 8, symmetric=False, dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def op(x: Tensor, bias: Tensor) -> Tensor:
        return sparse_int4_linear(x, packed, scale, zero, bias, k=3, group_size=32)

    assert torch.autograd.gradcheck(op, (x, bias), eps=1e-7)


def test_opcheck() -> None:
    for dtype in (torch.float64, torch.float32):
        own = operands(5, 8, symmetric=False, dtype=dtype)
        x, bias = (torch.randn(s, dtype=dtype).requires_grad_() for s in ((3, 8), (5,)))
        given = (x, *own, bias, torch.tensor([0.5]), torch.ones(8), 0, 1, 32)
        torch.library.opcheck(torch.ops.rewriter.sparse_int4_linear, given)


def test_vmap_and_autocast() -> None:
    packed, scale, zero = operands(13, 40)
    x = torch.randn(4, 3, 40)

    def op(x: Tensor) -> Tensor:
        return sparse_int4_linear(x, packed, scale, zero, k=9, group_size=32)

    assert_reordered(torch.vmap(op)(x), op(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert_reordered(op(x), op(x.bfloat16()))
        assert op(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 7)}, r"not \(3, 7\) and \(8, 3\) torch.uint8"),
        ({"packed": torch.ones(8, 3)}, r"not \(3, 8\) and \(8, 3\) torch.float32"),
        ({"k": 9}, "sparse_int4_linear: without a threshold k must be from 1 to the 8 entries"),
        ({"block": 3}, "block=3 does not divide the 8"),
        ({"group_size": 256}, "group_size must be from 1 to 128, not 256"),
        ({"group_size": 4}, r"scale must be \[2, out\] with ⌈out/2⌉ = 3, not \(1, 5\)"),
        ({"scale": torch.ones(1, 7)}, r"scale must be \[1, out\] with ⌈out/2⌉ = 3, not \(1, 7\)"),
        ({"zero": torch.ones(1, 6)}, r"zero must have shape \[1, 5\]"),
        ({"bias": torch.ones(4)}, r"bias must have shape \[5\]"),
        ({"threshold": torch.ones(2)}, r"threshold must be \[1\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    packed, scale, _ = operands(5, 8)
    fitting = {"x": torch.ones(3, 8), "packed": packed, "scale": scale, "k": 3, "group_size": 32}
    with pytest.raises(RuntimeError, match=message):
        sparse_int4_linear(**{**fitting, **change})


def test_the_layer_refuses_what_it_cannot_be() -> None:
    with pytest.raises(OptionError, match="SparseInt4Linear: group_size"):
        SparseInt4Linear(64, 8, group_size=48)
    with pytest.raises(OptionError, match="SparseInt4Linear: block=8 must divide k=4 and 64"):
        SparseInt4Linear(64, 8, k=4, block=8)


# The regime --------------------------------------------------------------------------------------


def test_what_is_not_finite_or_too_large_for_sums_of_levels() -> None:
    """Levels times 2¹²⁵ are no float32: such rows are multiplied by the weight as it is."""
    packed, scale, _ = operands(6, 40)
    tiny = (scale.float() * 1e-3).bfloat16()
    x = torch.zeros(1, 40)
    x[0, :8] = 3e38
    want = (x.double() @ dequantize_inputs(packed, tiny, None, 32).t().double()).float()
    assert want.isfinite().all()
    assert_reordered(sparse_int4_linear(x, packed, tiny, k=8, group_size=32), want)
    x[0, 33] = float("nan")
    assert sparse_int4_linear(x, packed, scale, k=1, group_size=32).isnan().all()


def test_dense_runs_where_more_is_active_than_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, scale, _ = operands(48, 64)
    x, called = torch.randn(1, 64), []
    run = sparse_cpu.Linear.__call__

    def counted(*args: Any) -> Any:
        called.append(run(*args))
        return called[-1]

    monkeypatch.setattr(sparse_cpu.Linear, "__call__", counted)
    weight = dequantize_inputs(packed, scale, None, 32)
    for k in (32, 33, 64):
        y = sparse_int4_linear(x, packed, scale, k=k, group_size=32)
        assert_reordered(y, x.where(active_reference(x, Select(k)), 0.0) @ weight.t())
    assert [y is not None for y in called] == [True, False, False]
    own = packed, scale, 32
    name = sparse_int4.kernel_name(*own, 1, 0.25)
    assert "25% of the weight's rows; dense above 2 rows" in name
    assert sparse_int4.kernel_name(*own, 17, 0.25).startswith("dense at 17 rows")
    assert sparse_int4.held_bytes(*own, 1) == 0
    assert sparse_int4.held_bytes(*own, 17) == 48 * 32 + 2 * 2 * 48  # levels and scales


def test_the_copy_by_outputs_follows_the_levels() -> None:
    layer = SparseInt4Linear.of(
        TopKLinear(64, 48, 16), *quantize_groups(torch.randn(48, 64), 4, 32, True), 32
    )
    x = torch.randn(40, 64)

    def same() -> None:
        own = layer.stored_weight(), layer.bias
        want = torch.nn.functional.linear(x.where(layer.kept(x), 0.0), *own)
        assert_reordered(layer(x), want)

    with torch.no_grad():
        same()
        layer.qweight.bitwise_xor_(0x11)
        same()
        layer.scale.mul_(2)
        same()


def test_without_a_compiled_kernel_all_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_int4, "refusal", lambda: "no compiler")
    packed, scale, _ = operands(48, 64)
    x = torch.randn(2, 64)
    want = x.where(active_reference(x, Select(9)), 0.0)
    want = want @ dequantize_inputs(packed, scale, None, 32).t()
    assert_reordered(sparse_int4_linear(x, packed, scale, k=9, group_size=32), want)
    assert sparse_int4.kernel_name(packed, scale, 32, 1, 0.5) == "torch, dense: no compiler"


@pytest.mark.parametrize("pays", [0.0, 0.12, 0.6, 1.0])
def test_the_largest_share_that_pays_is_measured(
    monkeypatch: pytest.MonkeyPatch, pays: float
) -> None:
    asked: list[float] = []

    def fastest(key: str, version: str, candidates: Any, *_: Any) -> str:
        *name, share, threads = key.split()
        assert name == ["sparse_int4_linear", "2", "64", "8", "32"]
        asked.append(float(share))
        pair = candidates()
        got, want = pair["sparse"]()[0], pair["dense"]()
        assert got.shape == want.shape
        if asked[-1] == 1.0:
            assert_reordered(got, want)
        return "sparse" if asked[-1] <= pays else "dense"

    monkeypatch.setattr(choice, "fastest", fastest)
    assert MEASURED.__wrapped__(2, 8, 64, 32, 1) == pays
    assert 1 <= len(asked) <= 3
