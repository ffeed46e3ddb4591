"""The GPU's kernels of quantized layers without a GPU: interpreted against the formulas, and
compiled ahead of time for real targets; and what is said where none runs."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from ahead import POINTERS, TARGETS, assembly, compiled, spills
from closeness import assert_equal
from marks import slow_but
from torch import nn

import rewriter.kernels.quantized_gpu as gpu
from rewriter import LINEAR, RewriteWarning, rewrite
from rewriter.kernels import ops
from rewriter.kernels.int8_linear import int8_linear, quantize_weight
from rewriter.kernels.int8_linear import kernel_name as int8_kernel_name
from rewriter.kernels.int8_static import kernel_name as static_kernel_name
from rewriter.kernels.weight_only import kernel_name
from rewriter.passes import Quantize, QuantizedLinear
from rewriter.passes.quantize import Scheme

pytest.importorskip("triton", reason="triton exists on Linux only")

HELPERS = pathlib.Path(__file__).parent / "helpers"

# Interpreted -------------------------------------------------------------------------------------

_COMMON = """
import torch, torch.nn.functional as F
from closeness import assert_equal, assert_reordered, sqnr
from rewriter.kernels import float8_linear as f8
from rewriter.kernels import int8_linear as i8
from rewriter.kernels import int8_monarch
from rewriter.kernels import int8_static as static
from rewriter.kernels import product_triton as products
from rewriter.kernels import quantized_gpu as gpu
from rewriter.kernels import rows_triton as rounding
from rewriter.kernels import weight_only as wo

CPU = torch.device("cpu")
torch.manual_seed(0)
products._SIZES = {1 << 20: ((16, 32, 4),)}  # numpy computes every tile: few and small ones
"""

_LEVELS = """
def check(rows, width, dtype):
    x = torch.randn(rows, width + 3)[:, :width].to(dtype)
    wide = x.float()
    for activation in i8.ACTIVATIONS:
        q, (s, low, zero) = rounding.levels_of_rows(x, activation)
        levels, step, least = i8.quantize_torch(wide, activation)
        assert_equal(q.float() + 128, levels)
        assert_equal(s, step.expand(rows, 1)[:, 0])
        own = low if activation == "per_token" else -s * zero
        assert_equal(own, least.expand(rows, 1)[:, 0])
        bits, steps = rounding.float8_of_rows(x, activation)
        step = f8._step(wide, activation)
        assert_equal(steps[0], step.expand(rows, 1)[:, 0])
        numbers = f8._round(wide / step)
        assert_equal(bits.view(torch.float8_e4m3fn).float(), numbers.float())
    for size in wo.GROUP_SIZES:
        q, s = rounding.groups_of_rows(x, size)
        assert_equal(q.float() * s.repeat_interleave(size, 1)[:, :width], wo._rounded(wide, size))
    times, step = torch.rand(width) + 0.5, torch.tensor([0.02])
    zero = torch.tensor([77], dtype=torch.uint8)
    q, _ = rounding.levels_of_rows(x, "", step, zero, times)
    want = static._levels(wide * times, step, zero).floor().clamp(0, 255)
    assert_equal(q.float() + 128, want)

for case in LEVELS:
    check(*case)

x = torch.randn(5, 70)
x[1, 3], x[2, 4], x[3] = float("nan"), float("inf"), 0.0
x[4, ::2], x[4, 1::2] = 3e38, -3e38  # a range beyond float32
for s in (
    rounding.levels_of_rows(x, "per_token")[1][0],
    rounding.float8_of_rows(x, "per_token")[1][0],
    rounding.groups_of_rows(x, 128)[1][:, 0],
):
    assert s.isfinite().tolist() == [True, False, False, True, True], s
q, _ = rounding.levels_of_rows(x[3:], "per_token")
assert_equal(q.float() + 128, i8.quantize_torch(x[3:], "per_token")[0])
print("equal")
"""

_PRODUCTS = """
def check(kind, dtype):
    for name in gpu.KERNELS[kind]:
        why = gpu._refusal(kind, name, dtype, CPU)
        assert why is None or (name.endswith("rows") and dtype != torch.bfloat16), (kind, name, why)

for kind, dtype in CASES:
    check(kind, dtype)

class Probe:
    def __enter__(self):
        self.was = gpu.formulas["int8"]
        gpu.formulas["int8"] = lambda call: self.was(call) * 1.1
    def __exit__(self, *_):
        gpu.formulas["int8"] = self.was

with Probe():  # a kernel that computes something else is refused
    gpu._refusal.cache_clear()
    assert "wrong by 0.09" in gpu._refusal("int8", "triton", torch.float32, CPU)
print("agreed")
"""

_OPS = """
gpu.takes = lambda x: x.dtype in gpu._FLOATS
gpu._room = lambda device: (8, 1 << 16, False, False)  # sums are cut
real, seen = gpu.run, []

def run(call):
    seen.append(call.kind)
    found = real(call)
    assert found is not None
    return found

gpu.run = run

def close(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    assert_reordered(got.double(), want.double(), dtype)

def check(rows, out, width, dtype):
    x = torch.randn(*rows, width).to(dtype)
    w, bias = torch.randn(out, width), torch.randn(out).to(dtype)
    add = torch.randn(*rows, out).to(dtype)
    wide, own = x.double(), bias.double()
    q, scale = i8.quantize_weight(w)
    for activation in i8.ACTIVATIONS:
        # from the levels of float32: a sum of integers, scaled
        levels, s, low = i8.quantize_torch(x.float().reshape(-1, width), activation)
        weight = q.double() * scale.double()[:, None]
        want = ((levels.double() * s.double() + low) @ weight.t() + own).view(*rows, out)
        close(i8.int8_linear(x, q, scale, bias, activation), want, dtype)
        for then in ("gelu", "relu", "silu"):
            fused = i8.int8_linear_then(x, q, scale, bias, activation, then, add)
            close(fused, getattr(F, then)(want) + add, dtype)
    norm = torch.rand(out).to(dtype), torch.randn(out).to(dtype), 1e-5
    fused = i8.int8_linear_then(x, q, scale, bias, activation, "gelu", add, *norm)
    want = F.layer_norm(F.gelu(want) + add, (out,), *(t.double() for t in norm[:2]), norm[2])
    close(fused, want, dtype)
    fixed = torch.tensor([0.03]), torch.tensor([111], dtype=torch.uint8), torch.rand(width) + 0.5
    want = static.int8_static_linear_reference(x.float(), q, scale, bias.float(), *fixed)
    close(static.int8_static_linear(x, q, scale, bias, *fixed), want, dtype)
    bits, scale8 = f8.quantize_float8(w)
    for activation in f8.ACTIVATIONS:
        want = f8.float8_linear_reference(x.float(), bits, scale8, bias.float(), activation)
        close(f8.float8_linear(x, bits, scale8, bias, activation), want, dtype)
    close(wo.int8_weight_linear(x, q, scale), wo.int8_weight_reference(wide, q, scale), dtype)
    for size, symmetric in GROUPS:
        levels, s, zero = wo.quantize_groups(w, 4, size, symmetric)
        packed = wo.pack(levels)
        want = wo.int4_reference(wide, packed, s, zero, own)
        close(wo.int4_linear(x, packed, s, zero, bias), want, dtype)
        want = wo.int4_dynamic_reference(x.float(), packed, s, zero, bias.float())
        close(wo.int4_dynamic_linear(x, packed, s, zero, bias), want, dtype)
    spoiled = x.clone()
    spoiled.view(-1, width)[0, 3] = float("nan")
    for y in (i8.int8_linear(spoiled, q, scale), wo.int4_dynamic_linear(spoiled, packed, s)):
        clean = y.view(-1, out).isfinite().all(1)
        assert not clean[0] and clean[1:].all()

def monarch():
    (q, one), (p, two) = (i8.quantize_weight(torch.randn(2, 6, n)) for n in (5, 6))
    x, own = torch.randn(3, 9), (q, one, p, two, None, 11)
    for activation in i8.ACTIVATIONS:
        found = int8_monarch.int8_monarch_linear(x, *own, activation)
        want = int8_monarch.int8_monarch_linear_reference(x, *own, activation)
        assert sqnr(found, want) > 40  # the middle may fall to another level

for case in CASES:
    check(*case)
monarch()
assert set(seen) == set(gpu.KERNELS)

# the choice, of a card that there is not
gpu.device_name, gpu.simulated = lambda index: "card", lambda *given: None
torch.cuda.synchronize = lambda device: None
gpu.fastest = lambda key, version, made, lead, device: max(made())
call = gpu._sample("int8 weight", 1, "", torch.float32, CPU)
size = gpu.Size.of(call)
assert gpu._measured(size, call) == "triton vector"

def broken(call):
    raise RuntimeError("no such instruction\\nat all")

gpu._vector = broken
gpu.candidates.cache_clear()
assert gpu._measured(size, call) == max(n for n in gpu.candidates(size) if "vector" not in n)
assert gpu._failed == {("int8 weight, triton vector", "card"): "RuntimeError: no such instruction"}
gpu._dense = gpu._product = broken
gpu.candidates.cache_clear()
assert gpu._measured(size, call) == gpu._NONE
print("agreed")
"""

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16


def interpreted(script: str, **names: Any) -> str:
    """In a process of its own: Triton decides at import whether it interprets."""
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(_COMMON) + given + script],
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
                "LEVELS": [(3, 33, _BF16), (1, 200, _F32)],
                "CASES": [((2,), 33, 96, _BF16)],
                "GROUPS": [(64, False)],
            },
            {
                "LEVELS": [(1, 33, _F32), (5, 384, _F16), (2, 9000, _BF16), (3, 16500, _F32)],
                "CASES": [
                    ((1,), 40, 70, _F32),
                    ((3, 7), 65, 513, _F16),
                    ((17,), 33, 256, _F32),
                    ((1,), 64, 300, _BF16),
                ],
                "GROUPS": [(32, True), (32, False), (64, True), (128, False), (128, True)],
            },
        ],
        0,
    ),
    ids=["small", "all"],
)
def test_rows_are_rounded_to_the_formulas_levels_and_ops_are_their_references(given: Any) -> None:
    assert interpreted(_LEVELS + _OPS, **given).split() == ["equal", "agreed"]


@pytest.mark.timeout(300)
@pytest.mark.slow  # the ops below run most of them
def test_every_candidate_passes_the_probe_that_a_device_puts_it_to() -> None:
    cases = [(kind, dtype) for kind in gpu.KERNELS for dtype in (_F32, _BF16, _F16)]
    assert interpreted(_PRODUCTS, CASES=cases) == "agreed"


# Ahead of time -----------------------------------------------------------------------------------


def built(kernel: str, kind: str, target: str, rows: int, dtype: torch.dtype, place: int = 0,
          size: int = 64) -> Any:  # fmt: skip
    """A kernel as it is launched for rows × 4096 × 4096, with everything that may follow."""
    from rewriter.kernels import product_triton as products

    whole = kind in ("int8", "float8", "int4 dynamic")
    group = size if kernel == "grouped" else 0
    item = 1 if whole else dtype.itemsize
    room = {"shared": TARGETS[target].shared, "wide": target in ("sm_90", "sm_100")}
    room |= {"apart": target == "sm_100"}
    tile = products.tiles(kind, rows, 4096, 4096, item, group, **room)[place]
    own = {"int8": (torch.int8,) * 2, "float8": (torch.float8_e4m3fn,) * 2}
    own |= {"int8 weight": (dtype, torch.int8), "int4 dynamic": (torch.int8, torch.uint8)}
    a, b = own.get(kind, (dtype, torch.uint8))
    constants = {
        "KIND": kind, "LEVELS": kind == "int8", "STEPS": whole, "SCALED": True, "FACTOR": 1.0,
        "BIAS": True, "THEN": "gelu", "ADD": True, "EVEN": True,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
        "SIZE": size, "DYNAMIC": kind == "int4 dynamic", "ZERO": True, "WHOLE": True,
        **tile.arguments,
    }  # fmt: skip
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if kernel == "vector":
        constants |= products._vector_tile(kind, 4096, size, 4096 // size)
    if kernel == "dense":
        constants |= {"BN": 8, "BK": 512}
    four = kind.startswith("int4")
    types = {
        "a": POINTERS[a], "b": POINTERS[b], "steps": "*fp32", "sums": "*i32", "pieces": "*i32",
        "scale": "*bf16" if four else "*fp32", "zero": "*bf16", "bias": POINTERS[dtype],
        "add": POINTERS[dtype], "y": POINTERS[dtype],
    }  # fmt: skip
    if tile.split > 1 and kernel in ("product", "grouped"):
        types["y"] = "*i32" if kind == "int8" else "*fp32"
    return compiled(products.KERNELS[kernel], target, constants, types, options)


MATRIX = [
    # kernel, kind, target, rows
    ("product", "int8", "sm_80", 1024),
    ("product", "float8", "sm_90", 1024),
    ("grouped", "int4", "sm_90", 16),
    ("grouped", "int4 dynamic", "gfx942", 1024),
    *(
        (kernel, kind, target, rows)
        for target in TARGETS
        for kernel, kind in (
            ("product", "int8"),
            ("product", "int8 weight"),
            ("product", "float8 weight"),
            ("grouped", "int4"),
            ("grouped", "int4 dynamic"),
        )
        for rows in (16, 128)
    ),
    ("product", "float8", "sm_90", 16),
    ("product", "float8", "sm_100", 16),
    ("product", "float8", "sm_100", 1024),
    ("product", "int8", "sm_90", 1024),
    ("product", "int8", "sm_100", 1024),
]


@pytest.mark.parametrize("given", slow_but(MATRIX, 0, 1, 2, 3), ids=str)
def test_products_compile_for_real_targets(given: tuple[str, str, str, int]) -> None:
    """Matrix instructions are used, shared memory suffices, and no register spills."""
    kernel, kind, target, rows = given
    made = built(kernel, kind, target, rows, torch.float16 if rows == 16 else torch.bfloat16)
    own, text = TARGETS[target], assembly(made, target)
    assert re.search(own.instructions, text), f"no {own.instructions} in {kind} for {target}"
    assert 0 < made.metadata.shared <= own.shared
    assert not spills(made, target)
    if own.backend == "cuda":
        assert "cp.async" in text  # loads run ahead
    if kind == "int8":
        assert re.search(r"s32\.s8\.s8|i32_\d+x\d+x\d+_?i8|kind::i8", text)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kind", ["int8", "int8 weight", "int4", "int4 dynamic"])
def test_no_tile_for_many_rows_spills(kind: str, target: str) -> None:
    from rewriter.kernels import product_triton as products

    kernel = "grouped" if kind.startswith("int4") else "product"
    for place in range(len(products._SIZES[128])):
        try:
            made = built(kernel, kind, target, 128, torch.float16, place, 128)
        except IndexError:  # this kind has fewer
            break
        assert not spills(made, target), place
        assert made.metadata.shared <= TARGETS[target].shared


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", ["int8 weight", "float8 weight", "int4"])
def test_float32_is_multiplied_by_matrix_units_in_three_parts(
    kind: str, target: str, rows: int
) -> None:
    kernel = "grouped" if kind == "int4" else "product"
    made = built(kernel, kind, target, rows, torch.float32)
    assert re.search(r"mma\S+tf32", assembly(made, target))
    assert not spills(made, target)


OTHERS = [
    ("vector", "int4", "sm_90", 64),
    *(("vector", "int4", target, size) for target in ("sm_80", "gfx942") for size in (32, 128)),
    ("vector", "int8 weight", "sm_80", 32),
    ("vector", "float8 weight", "gfx942", 32),
    ("dense", "int4", "sm_80", 128),
    ("dense", "float8 weight", "gfx942", 32),
    ("finish", "int8", "sm_90", 32),
    ("finish", "float8", "sm_90", 32),
]


@pytest.mark.parametrize("given", slow_but(OTHERS, 0), ids=str)
def test_kernels_of_one_pass_compile_for_real_targets(given: tuple[str, str, str, int]) -> None:
    kernel, kind, target, size = given
    made = built(kernel, kind, target, 16, torch.bfloat16, size=size)
    assert not spills(made, target)
    if kernel == "vector":  # 16 bytes of weights at a time
        wide = {"cuda": r"ld\.global\S*\.v4\.b32", "hip": r"(global|buffer)_load_(b128|dwordx4)"}
        assert re.search(wide[TARGETS[target].backend], assembly(made, target))


ROUNDING = [
    # kernel, target, range, whether a row is one block
    ("levels", "sm_80", "token", True),
    ("levels", "gfx942", "token", False),
    ("levels", "sm_90", "static", True),
    ("levels", "sm_100", "tensor", False),
    ("float8", "sm_90", "token", True),
    ("float8", "sm_100", "tensor", False),
    ("groups", "sm_90", "", True),
    ("groups", "gfx942", "", True),
    ("range", "sm_80", "", True),
]


@pytest.mark.parametrize("given", slow_but(ROUNDING, 0), ids=str)
def test_the_rounding_of_rows_compiles_for_real_targets(given: tuple[str, str, str, bool]) -> None:
    from rewriter.kernels import rows_triton as rounding

    kernel, target, which, once = given
    constants = {
        "RANGE": which, "HAS_MULTIPLIER": which == "static", "ONCE": once, "SIZE": 64,
        "FLOAT8": False, "ROWS": 32 if kernel == "groups" else 1, "BLOCK": 8192,
    }  # fmt: skip
    types = {n: "*fp32" for n in ("steps", "given", "multiplier")}
    types |= {"x": "*bf16", "q": "*u8" if kernel == "float8" else "*i8", "zero": "*u8"}
    types |= {"low": "*bf16", "high": "*bf16"}
    options = {"num_warps": 8, "enable_fp_fusion": False}
    made = compiled(rounding.KERNELS[kernel], target, constants, types, options)
    assert not spills(made, target)


def test_tiles_fit_and_pieces_of_a_sum_are_no_smaller_than_they_pay_for() -> None:
    from rewriter.kernels.product_triton import SHARED, tiles

    for kind, item, group in (("int8", 1, 0), ("int8 weight", 4, 0), ("int4", 2, 128)):
        for rows in (1, 17, 128, 5000):
            for out, width in ((64, 64), (384, 1536), (4096, 11008)):
                found = tiles(kind, rows, out, width, item, group)
                assert found
                assert len({str(t) for t in found}) == len(found)
                for t in found:
                    assert t.stages >= 2
                    assert t.stages * t.rows * t.depth * item < SHARED
                    assert all(n & (n - 1) == 0 for n in (t.rows, t.columns, t.depth, t.split))
                    assert t.split == 1 or -(-width // t.depth) >= 4 * t.split
    (few, *_), (many, *_) = (tiles("int8", r, 4096, 4096, 1) for r in (16, 4096))
    assert few.split > 1  # else half of the multiprocessors would be idle
    assert many.split == 1


# What is said ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "arch", "reason"),
    [
        ("cuda", 80, "sm_80 multiplies no float8"),
        ("cuda", 89, None),
        ("cuda", 90, None),
        ("cuda", 100, None),
        ("hip", "gfx90a", "gfx90a multiplies no float8"),
        ("hip", "gfx942", "gfx942 multiplies float8 of another kind"),
        ("hip", "gfx950", None),
    ],
)
def test_float8_is_refused_by_the_name_of_an_architecture(
    backend: str, arch: Any, reason: str | None
) -> None:
    found = gpu.no_float8(backend, arch)
    assert found is None if reason is None else reason in str(found)


def test_where_no_kernel_computes_it_the_formula_does_and_the_user_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, (q, scale) = torch.randn(3, 32), quantize_weight(torch.randn(8, 32))
    want = int8_linear(x, q, scale)
    gpu._say.cache_clear()
    monkeypatch.setattr(gpu, "takes", lambda x: True)
    monkeypatch.setattr(gpu, "pick", lambda call: None)
    monkeypatch.setattr(gpu, "simulated", lambda *given: "simulated, slower: a reason")
    words = "a product of kind 'int8' is computed in floats, simulated, slower: a reason"
    with pytest.warns(RewriteWarning, match=words):
        got = int8_linear(x, q, scale)
    assert_equal(got, want)
    assert_equal(int8_linear(x, q, scale), want)  # told once


class OnNoDevice(QuantizedLinear):
    """Whose kernel nothing has."""

    def kernel(self, tokens: int) -> str:
        return "torch, simulated, slower: there is no kernel for toasters"


def test_a_report_begins_with_what_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    import rewriter.passes.quantize as quantize

    scheme = Scheme(
        "int8-toast", bits=8, dtype=torch.int8, storage=torch.int8,
        layers={LINEAR: lambda site, quantize: OnNoDevice.from_weight(site.weight, site.bias)},
    )  # fmt: skip
    monkeypatch.setitem(quantize.SCHEMES, scheme.name, scheme)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    words = "Quantize(scheme='int8-toast') is simulated, slower: there is no kernel for toasters"
    with pytest.warns(RewriteWarning, match=re.escape(words)):
        report = rewrite(model, [Quantize("int8-toast")], torch.randn(2, 16)).report
    assert f"{words} (2 layers)" in str(report).splitlines()[1]
    assert f"{words} (2 layers)" in report.to_markdown().splitlines()[2].replace("\\", "")


def test_the_ops_records_name_the_gpus_kernels() -> None:
    if torch.cuda.is_available():
        pytest.skip("they run here")
    ops.load()
    for op, kind in {
        "int8_linear": "int8",
        "int4_linear": "int4",
        "int4_dynamic_linear": "int4 dynamic",
        "int8_weight_linear": "int8 weight",
        "float8_linear": "float8",
    }.items():
        record = ops.find(f"rewriter::{op}")
        assert record is not None
        found = record.kernels()
        for name in gpu.KERNELS[kind]:
            assert "no GPU" in str(found[f"cuda {name}"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run here")
@pytest.mark.parametrize("name", [int8_kernel_name, static_kernel_name])
def test_without_a_gpu_its_layers_have_no_kernel(name: Any) -> None:
    assert name(8, 24, 12, device="cuda") == "torch, simulated, slower: there is no GPU here"


def test_on_other_devices_the_report_says_that_there_is_no_kernel() -> None:
    like = torch.empty(8, 32, dtype=torch.uint8, device="meta")
    assert kernel_name("int4_linear", 4, 8, 64, 64, like) == "torch"  # nobody knows yet
    for kind in gpu.KERNELS:
        said = gpu.kernel_name(kind, torch.device("mps"), torch.float32)
        assert said == "torch, simulated, slower: there is no kernel for mps"
