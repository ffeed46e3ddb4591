"""A GPU's products that read the weights of active inputs alone, without a GPU: interpreted against
the formula, and compiled ahead of time for real targets; and what decides that they run."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ahead import POINTERS, TARGETS, assembly, compiled, spills
from closeness import assert_equal
from marks import slow_but
from torch import Tensor

from rewriter.kernels import choice, sparse, sparse_gpu
from rewriter.kernels.int8_linear import quantize_weight
from rewriter.kernels.sparse import Select
from rewriter.lowering import sparse_gated as lowering

pytest.importorskip("triton", reason="triton exists on Linux only")

HELPERS = pathlib.Path(__file__).parent / "helpers"
_F32, _BF16, _F16, _I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8

# Interpreted -------------------------------------------------------------------------------------

_COMMON = """
import torch
from closeness import assert_equal, assert_reordered
from rewriter.kernels import sparse, sparse_bound, sparse_gpu
from rewriter.kernels import sparse_triton as kernels
from rewriter.kernels.int8_linear import quantize_weight
from rewriter.kernels.sparse import Select, active_reference
from rewriter.kernels.sparse_gated import GatedMlp, _gated_reference, sparse_gated
from rewriter.kernels.sparse_linear import sparse_linear
from rewriter.kernels.topk import topk_linear

CPU, NAN, INF = torch.device("cpu"), float("nan"), float("inf")
torch.manual_seed(0)
"""

_KERNELS = """
def selects(x, select):
    mask = active_reference(x, select)
    want, union = x.where(mask, 0.0), mask.any(0).nonzero()[:, 0]
    inputs, values, length = kernels.compacted(x, select)
    assert inputs[: int(length)].tolist() == union.tolist(), select
    assert_equal(values[:, : int(length)], want[:, union], equal_nan=True)
    assert_equal(kernels.masked(x, select), want, equal_nan=True)
    return want

def over(share):
    return Select(threshold=torch.tensor([share]))

for rows, width, dtype in SELECTIONS:
    x = torch.randint(-3, 4, (rows, width + 5)).to(dtype)[:, 2:-3]  # ties, and rows apart
    times = torch.rand(width).round(decimals=1)
    for select in (Select(1), Select(width // 2), Select(width), Select(7, importance=times)):
        selects(x, select)
    x = x.contiguous()
    x[0, 5], x[0, 9], x[-1, 7], x[0, 3] = NAN, -NAN, INF, -INF
    for select in (Select(2), Select(3), over(2.0), over(INF), over(NAN), over(-1.0), over(0.0)):
        selects(x, select)
    assert kernels.compacted(x.nan_to_num(0.0, 0.0, 0.0), over(9.0)).length.item() == 0

for block in (3, 8):
    x = torch.randn(2, 5 * 24)
    for select in (Select(24), over(1.6)):
        selects(x, select._replace(block=block))

kernels._ROW = kernels._ENTRIES = 64  # rows, and lists, of several tiles
for rows in ROWS:
    x = torch.randint(-3, 4, (rows, 198)).float()
    for select in (Select(3), Select(99, block=3), over(2.0), over(2.5)._replace(block=2)):
        selects(x, select)
kernels._ROW, kernels._ENTRIES = 16384, 4096

for rows, width, out, dtype in PRODUCTS:
    x, bias = torch.randn(rows, width).to(dtype), torch.randn(out).to(dtype)
    levels, scale = quantize_weight(torch.randn(out, width))
    floats = torch.randn(width, out).to(dtype)
    for select in (Select(width // 4), over(99.0), over(0.5)):
        want = x.where(active_reference(x, select), 0.0).double()
        for split in (1, 3):
            tile = kernels.Tile(32, 16, 4, split)
            y = kernels.product(x, floats, None, None, select, tile)
            assert y.dtype == dtype
            assert_reordered(y.double(), want @ floats.double(), dtype)
        y = kernels.product(x, levels.t().contiguous(), scale, bias, select, tile)
        right = want @ (levels.double() * scale.double()[:, None]).t() + bias.double()
        assert_reordered(y.double(), right, dtype)
    x[0, 1] = NAN
    y = kernels.product(x, floats, None, None, over(1.5), tile)
    assert y[0].isnan().all() and not y[1:].isnan().any()

for rows, width, hidden, dtype in GATED:
    x, up = torch.randn(rows, width).to(dtype), torch.randn(hidden, width).to(dtype)
    a, down = torch.randn(rows, hidden).to(dtype), torch.randn(hidden, 33).to(dtype)
    before, behind = torch.randn(hidden).to(dtype), torch.randn(33).to(dtype)
    tile = kernels.Tile(32, 16, 4, 2)
    for select, own in ((Select(8), (None, None)), (over(1.0), (before, behind))):
        kept = a.where(active_reference(a, select), 0.0).double()
        first, last = (0.0 if t is None else t.double() for t in own)
        want = (kept * (x.double() @ up.double().t() + first)) @ down.double() + last
        y = kernels.gated(x, a, up, own[0], down, own[1], select, tile)
        assert_reordered(y.double(), want, dtype)
print("agreed")
"""

_OPS = """
for dtype in DTYPES:
    assert sparse_gpu.refusal(CPU, dtype) is None, sparse_gpu.refusal(CPU, dtype)
assert "no kernel takes float64" in sparse_gpu.refusal(CPU, torch.float64)

sparse_gpu.takes = lambda x: x.dtype in sparse_gpu._FLOATS
sparse_bound.ready = lambda *_: None  # which is for a CPU
ran, product = [], sparse_gpu.product
sparse_gpu.product = lambda *given: ran.append(given[-1]) or product(*given)

def close(got, want):
    assert got.shape == want.shape
    assert_reordered(got, want)

x, weight, bias = torch.randn(2, 1, 64), torch.randn(40, 64), torch.randn(40)
q, scale = quantize_weight(weight)
t, times = torch.tensor([1.0]), torch.rand(64)
mask = active_reference(x, Select(16))
close(topk_linear(x, weight, bias, 16), x.where(mask, 0.0) @ weight.t() + bias)
close(topk_linear(x[0, 0], weight, None, 16), x[0, 0].where(mask[0, 0], 0.0) @ weight.t())
kept = x.where(active_reference(x, Select(threshold=t, importance=times)), 0.0)
close(
    sparse_linear(x, q, scale, bias, threshold=t, importance=times, share=0.5),
    kept @ (q * scale[:, None]).t() + bias,
)
assert len(ran) == 3

# more active than pays, more rows, and blocks that no program holds: dense
real = sparse_gpu.choice
sparse_gpu.choice = lambda size: real(size)._replace(most=min(0.5, real(size).most))
close(topk_linear(x, weight, None, 24), x.where(active_reference(x, Select(24)), 0.0) @ weight.t())
sparse_linear(x, weight, threshold=t)
sparse_linear(x, weight, threshold=t, share=0.4)
sparse_linear(x.expand(2, 9, 64), weight, k=8)
wide = torch.randn(1, 512)
want = wide.where(active_reference(wide, Select(256, block=256)), 0.0) @ torch.ones(512, 8)
close(sparse_linear(wide, torch.ones(8, 512), k=256, block=256), want)
assert len(ran) == 3
sparse_linear(x[:1], weight, threshold=t, share=0.4)
assert len(ran) == 4

# of a gated MLP
sparse_gpu.choice, gated = real, sparse_gpu.gated
sparse_gpu.gated = lambda *given: ran.append(given[-1]) or gated(*given)
gate, up, down = torch.randn(48, 64), torch.randn(48, 64), torch.randn(24, 48)
for k, share in ((12, 1.0), (0, 0.4)):
    mlp = GatedMlp(gate, None, bias[:1].expand(48), None if k else t, up, None, None, down, None,
                   down.t().contiguous(), bias[:24], "silu", k, share)
    close(sparse_gated(x, mlp), _gated_reference(x, *mlp))
assert len(ran) == 6
sparse_gpu.choice = lambda size: sparse_gpu.Choice(0.5)
close(sparse_gated(x, mlp), _gated_reference(x, *mlp))  # 64 % of two rows
close(sparse_gated(x, mlp._replace(columns=None)), _gated_reference(x, *mlp))
assert len(ran) == 6

# a kernel that computes something else is refused
sparse_gpu._probed.clear()
sparse_gpu.active_reference = lambda x, select: active_reference(x, select).roll(1, -1)
assert sparse_gpu.refusal(CPU, torch.float32) == "a kernel selects something else on this device"
right = kernels.product
kernels.product = lambda *given: 1.1 * right(*given)
sparse_gpu._probed.clear()
sparse_gpu.active_reference = active_reference
assert "a product is wrong by 0.1 of" in sparse_gpu.refusal(CPU, torch.float32)
sparse_gpu._probed.clear()
kernels.product = None
assert "not available: TypeError" in sparse_gpu.refusal(CPU, torch.float32)
print("agreed")
"""


def interpreted(script: str, **names: Any) -> str:
    """In a process of its own: Triton decides at import whether it interprets."""
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _COMMON + given + script],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HELPERS)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "given",
    slow_but(
        [
            {
                "SELECTIONS": [(2, 40, _BF16)],
                "ROWS": [],
                "PRODUCTS": [(2, 40, 33, _BF16)],
                "GATED": [(1, 40, 48, _F32)],
            },
            {
                "SELECTIONS": [(1, 300, _F32), (3, 70, _F16), (16, 50, _BF16)],
                "ROWS": [1, 5],
                "PRODUCTS": [
                    (rows, width, out, dtype)
                    for rows, width, out in ((1, 100, 65), (2, 40, 33), (16, 130, 40))
                    for dtype in (_F32, _F16, _BF16)
                ],
                "GATED": [(3, 70, 50, _F32), (1, 130, 90, _BF16), (16, 300, 33, _F16)],
            },
        ],
        0,
    ),
    ids=["small", "all"],
)
def test_lists_and_products_are_those_of_the_formula(given: Any) -> None:
    assert interpreted(_KERNELS, **given) == "agreed"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtypes", slow_but([[_F32], [_F32, _F16, _BF16]], 0), ids=str)
def test_ops_run_them_where_they_pay_and_pass_the_probe(dtypes: Any) -> None:
    assert interpreted(_OPS, DTYPES=dtypes) == "agreed"


# Ahead of time -----------------------------------------------------------------------------------


def built(
    kernel: str, target: str, rows: int, dtype: torch.dtype, weight: torch.dtype = _I8,
    place: int = 0, block: int = 1, by_rank: bool = True, once: bool = True,
) -> Any:  # fmt: skip
    """A kernel as it is launched for rows × 11008 → 4096."""
    from rewriter.kernels import sparse_triton as kernels

    tile = kernels.tiles(rows, 4096, weight.itemsize)[place]
    side = 1 if rows == 1 else 16
    entries = {"kth": kernels._ROW, "masked": 2048}.get(kernel, kernels._ENTRIES // side)
    types = {n: "*i32" for n in ("cuts", "counts", "inputs", "length")}
    types |= {n: "*fp32" for n in ("importance", "threshold", "pieces")}
    types |= {n: POINTERS[dtype] for n in ("x", "y", "values", "bias")}
    types["weight"] = POINTERS[weight]
    constants = {
        "PRECISION": "tf32x3" if dtype == _F32 and TARGETS[target].backend == "cuda" else "ieee",
        "BM": side, "BN": tile.columns, "BK": tile.depth, "M": side, "SIZE": block, "B": block,
        "G": max(entries // block, 1), "ONCE": once, "LOW": 0, "TILES": 64, "BY_RANK": by_rank,
        "ALONE": False, "WEIGHTED": by_rank,
    }  # fmt: skip
    own = entries if kernel in ("kth", "masked") else entries * side
    warps = kernels._warps(own)
    if kernel in ("product", "neurons"):
        warps = tile.warps
    if kernel == "neurons":
        constants |= {"BIAS": True} | kernels.neuron_tile(rows, 4096, weight.itemsize)
    return compiled(kernels.KERNELS[kernel], target, constants, types, {"num_warps": warps})


PRODUCTS = [
    # target, rows, dtype of x, of the weight, place of the tile
    ("sm_90", 1, _BF16, _BF16, 0),
    ("gfx942", 16, _BF16, _I8, 0),
    *(
        (target, rows, dtype, weight, place)
        for target in TARGETS
        for rows in (1, 16)
        for dtype, weight in ((_F32, _F32), (_F16, _F16), (_BF16, _BF16), (_BF16, _I8), (_F32, _I8))
        for place in (0, 1)
    ),
]


@pytest.mark.parametrize("given", slow_but(PRODUCTS, 0, 1), ids=str)
def test_products_compile_for_real_targets(given: tuple[Any, ...]) -> None:
    """Matrix units multiply by several rows. A thread reads 16 bytes of the weight, or of one of
    8 bits that goes to a matrix unit 8."""
    target, rows, dtype, weight, place = given
    made = built("product", target, rows, dtype, weight, place)
    own, text = TARGETS[target], assembly(made, target)
    assert not spills(made, target)
    assert 0 < made.metadata.shared <= own.shared
    bytes_ = "0x8," if weight == _I8 and rows > 1 else "0x10,"
    wide = {
        "cuda": rf"ld\.global\S*\.v4\.b32|cp\.async\.\S*shared\.global.*{bytes_}",
        "hip": r"(global|buffer)_load_(b128|dwordx4)",
    }
    assert re.search(wide[own.backend], text)
    assert bool(re.search(own.instructions, text)) == (rows > 1)


NEURONS = [
    (target, rows, dtype) for target in TARGETS for rows in (1, 16) for dtype in (_BF16, _F32)
]


@pytest.mark.parametrize("given", slow_but(NEURONS, 1), ids=str)
def test_neurons_compile_for_real_targets(given: tuple[Any, ...]) -> None:
    target, rows, dtype = given
    made = built("neurons", target, rows, dtype, dtype)
    own, text = TARGETS[target], assembly(made, target)
    assert not spills(made, target)
    assert made.metadata.shared <= own.shared
    assert bool(re.search(own.instructions, text)) == (rows > 1)


SELECTIONS = [
    # kernel, target, rows, dtype, block, by rank
    ("kth", "sm_80", 1, _F32, 1, True),
    ("compact", "sm_90", 16, _BF16, 1, False),
    *(
        (kernel, target, rows, dtype, block, by_rank)
        for target in TARGETS
        for kernel, rows in (
            ("kth", 1), ("count", 1), ("count", 16), ("compact", 1), ("compact", 16), ("masked", 1)
        )
        for dtype, block, by_rank in ((_F32, 1, True), (_BF16, 1, False), (_BF16, 32, True))
    ),
]  # fmt: skip


@pytest.mark.parametrize("given", slow_but(SELECTIONS, 0, 1), ids=str)
def test_selection_compiles_for_real_targets(given: tuple[Any, ...]) -> None:
    kernel, target, rows, dtype, block, by_rank = given
    made = built(kernel, target, rows, dtype, block=block, by_rank=by_rank)
    assert not spills(made, target)
    assert made.metadata.shared <= TARGETS[target].shared


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_search_in_rows_of_several_tiles_compiles_for_real_targets(target: str) -> None:
    made = built("kth", target, 1, _F32, once=False)
    assert not spills(made, target)
    assert made.metadata.shared <= TARGETS[target].shared


def test_tiles_leave_no_multiprocessor_idle() -> None:
    from rewriter.kernels.sparse_triton import tiles

    for columns in (1, 100, 4096, 11008, 128256):
        for item in (1, 2, 4):
            found = tiles(1, columns, item, units=132)
            assert len(set(map(str, found))) == len(found) >= 2
            for tile in found:
                assert tile.columns * item <= 512
                programs = -(-columns // tile.columns) * tile.split
                assert programs >= 132 or tile.split == 16


# What decides ------------------------------------------------------------------------------------


class Runs:
    """Data of which every product runs."""

    def sparse(self, share: float, tile: Any) -> Any:
        return tile


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A card that there is not: what is asked of it, and which share pays on it."""
    told: dict[str, Any] = {"pays": 0.4, "asked": [], "captures": False}

    def fastest(key: str, version: str, made: Any, lead: float, device: Any, *_: Any) -> str:
        told["asked"].append(key)
        if " tile " in key:
            return list(made())[-1]
        return "sparse" if float(key.split()[-2]) <= told["pays"] else "dense"

    class Card:
        multi_processor_count = 132

    monkeypatch.setattr(sparse_gpu, "_chosen", {})
    monkeypatch.setattr(sparse_gpu, "refusal", lambda *_: None)
    monkeypatch.setattr(sparse_gpu, "_captures", lambda _: told["captures"])
    monkeypatch.setattr(sparse_gpu, "device_name", lambda _: "card")
    for kind in (sparse_gpu.Size, sparse_gpu.GatedSize):
        monkeypatch.setattr(kind, "operands", lambda _: Runs())
    monkeypatch.setattr(sparse_gpu, "fastest", fastest)
    monkeypatch.setattr(choice, "fastest", fastest)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return told


def size(rows: int = 1, **change: Any) -> sparse_gpu.Size:
    made = sparse_gpu.Size(rows, 4096, 11008, _BF16, _BF16, torch.device("cuda", 0))
    return made._replace(**change)


@pytest.mark.parametrize("pays", [0.0, 0.12, 0.4, 1.0])
def test_the_largest_share_that_pays_is_measured_once_per_size(
    card: dict[str, Any], pays: float
) -> None:
    from rewriter.kernels.sparse_triton import tiles

    card["pays"] = pays
    found = sparse_gpu.choice(size(3))
    assert found == (pays, tiles(3, 4096, 2)[-1])
    assert 2 <= len(card["asked"]) <= 4
    card["asked"].clear()
    assert sparse_gpu.choice(size(4)) == found
    assert not card["asked"]  # counts as the next power of two
    assert sparse_gpu.choice(size(5)) == found
    assert card["asked"][0].endswith("8 4096 11008 torch.bfloat16 torch.bfloat16 tile card")
    gated = sparse_gpu.GatedSize(1, 4096, 11008, 4096, _BF16, torch.device("cuda", 0))
    assert sparse_gpu.choice(gated).most == pays


def test_nothing_is_measured_where_no_kernel_runs(card: dict[str, Any]) -> None:
    dense = sparse_gpu.Choice(0.0)
    assert sparse_gpu.choice(size(17)) == sparse_gpu.choice(size(0)) == dense
    assert sparse_gpu.choice(size(weight=_F16)) == sparse_gpu.choice(size(out=0)) == dense
    card["captures"] = True
    assert sparse_gpu.choice(size()) == dense
    assert not card["asked"]
    card["captures"] = False
    assert sparse_gpu.choice(size()).most == 0.4
    card["captures"] = True  # what is known counts
    assert sparse_gpu.choice(size()).most == 0.4


def test_tiles_that_do_not_run_are_left_out(
    card: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rewriter.kernels.sparse_triton import tiles

    first, *_ = tiles(1, 4096, 2)

    def narrow(of: Any, share: float, tile: Any) -> Any:
        if tile != first:
            raise RuntimeError("out of resource: shared memory")
        return tile

    monkeypatch.setattr(Runs, "sparse", narrow)
    assert sparse_gpu.choice(size()).tile == first
    monkeypatch.setattr(sparse_gpu, "_chosen", {})
    first = None
    assert sparse_gpu.choice(size()) == sparse_gpu.Choice(0.0)


class OnCard(Tensor):
    """A tensor that says that it is on a card."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def test_the_report_names_the_kernel_of_a_card(
    card: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.zeros(48, 64).as_subclass(OnCard)

    def name(rows: int, share: float | None) -> str:
        return sparse.kernel_name(weight, rows, share)

    # of the union of all rows, which a card takes at once: 34 % of two that take 19 % each
    assert name(1, 0.1) == (
        "sparse (Triton), 10% of the weight's rows; dense above 4 rows of input"
    )
    assert name(2, 0.19).startswith("sparse (Triton), 34% of the weight's rows")
    assert name(4, 0.19) == "dense: 57% of the weight's rows are active at 4 rows of input"
    assert name(17, 0.1) == "dense at 17 rows; sparse kernels take up to 16"
    assert "which share is active is not known" in name(1, None)
    assert sparse.held_bytes(weight, 1) == 4 * 48 * 64
    assert sparse.held_bytes(weight, 17) == 0
    monkeypatch.setattr(sparse_gpu, "_chosen", {})
    card["pays"] = 0.0
    assert name(1, 0.1) == "dense at 1 rows, where it is faster"
    assert sparse.held_bytes(weight, 1) == 0
    monkeypatch.setattr(sparse_gpu, "refusal", lambda *_: "Triton is not installed")
    assert name(1, 0.1) == "torch, dense: Triton is not installed"


def test_gated_mlps_on_a_card_are_one_call_where_that_pays(
    card: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def layer(width: int, out: int, **more: Any) -> SimpleNamespace:
        weight = torch.zeros(out, width).as_subclass(OnCard)
        return SimpleNamespace(in_features=width, out_features=out, weight=weight, **more)

    gate = layer(64, 48, op="gate_linear", share=0.3)
    place: Any = SimpleNamespace(modules=[gate, layer(64, 48), layer(48, 64)])
    assert lowering._unlike(place) is None
    x = torch.zeros(1, 64).as_subclass(OnCard)
    assert lowering._slow(place, x) is None
    gate.share = 0.6
    assert "faster here where 60% of the neurons" in str(lowering._slow(place, x))
    monkeypatch.setattr(sparse_gpu, "refusal", lambda *_: "Triton is not installed")
    assert lowering._unlike(place) == "Triton is not installed"


def test_while_a_graph_is_captured_no_copy_is_made_to_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(48, 64)
    assert sparse._may_keep(weight)
    monkeypatch.setattr(sparse, "capturing", lambda _: True)
    assert not sparse._may_keep(weight)
    assert_equal(sparse.by_columns(weight), weight.t())
    assert sparse.by_columns(weight) is not sparse.by_columns(weight)
    monkeypatch.setattr(sparse, "capturing", lambda _: False)
    kept = sparse.by_columns(weight)
    monkeypatch.setattr(sparse, "capturing", lambda _: True)
    assert sparse._may_keep(weight)
    assert sparse.by_columns(weight) is kept
    levels = quantize_weight(weight)[0].t().contiguous().t()
    assert sparse._may_keep(levels)
    with torch.inference_mode():
        assert not sparse._may_keep(torch.randn(48, 64))


def test_without_a_card_nothing_is_asked_of_it() -> None:
    x = torch.randn(1, 64)
    assert not sparse_gpu.takes(x)
    assert sparse.multiplied(x, torch.randn(48, 64).double(), None, None, Select(16)) is None
    if not torch.cuda.is_available():
        why = "there is no GPU here"
        assert sparse_gpu.refusal(torch.device("cuda", 0), _BF16) == why
        assert sparse_gpu.choice(size()) == sparse_gpu.Choice(0.0)
        weight = torch.zeros(48, 64).as_subclass(OnCard)
        assert sparse.kernel_name(weight, 1, 0.1) == f"torch, dense: {why}"
