"""Layers of ours beside cuBLAS: times, and which share of the card's best they reach."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import _checkout  # noqa: F401 (our packages, from this checkout)
import torch
from _gpu_checks import device, short
from _gpu_clock import Times, bandwidth, peak, synchronize, times
from _gpu_crew import Case, Found, Row
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.kernels import int8_linear as int8
from rewriter.kernels import monarch
from rewriter.passes import MonarchLinear, QuantizedMonarch

FORWARD, TRAINING = "Monarch beside cuBLAS, forward", "Monarch beside cuBLAS, forward and backward"
BLOCKS = (4, 8, 32)
Call = Callable[[], object]


def sizes(quick: bool) -> list[tuple[int, int, torch.dtype]]:
    """(width, rows, dtype), the ones with a target first."""
    if quick:
        return [(128, 16, torch.float32)]
    widths, rows = (4096, 2048, 8192, 1024), (2048, 16384, 1, 128, 16)
    return [(w, r, d) for d in (torch.bfloat16, torch.float32) for r in rows for w in widths]


# Monarch -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _products() -> Iterator[None]:
    """Monarch by torch's batched products, whatever the operation would choose."""
    with mock.patch.object(monarch, "_fused", return_value=None):
        yield


def _by_products(call: Call) -> Call:
    def run() -> object:
        with _products():
            return call()

    return run


def _forward(layer: nn.Module, x: Tensor) -> Call:
    def run() -> object:
        with torch.no_grad():
            return layer(x)

    return run


def _step(layer: nn.Module, x: Tensor, grad: Tensor) -> Call:
    inputs = [x.requires_grad_(), *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, grad)


def layers(width: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    own: dict[str, Any] = {"device": device(), "dtype": dtype}
    found: dict[str, nn.Module] = {"dense": nn.Linear(width, width, **own)}
    return found | {f"N = {n}": MonarchLinear(width, width, n, **own) for n in BLOCKS}


def multiplied(layer: nn.Module) -> int:
    """Weights that multiply: FLOPs are twice as many per row."""
    return sum(p.numel() for p in layer.parameters() if p.ndim > 1)


def monarch_case(width: int, rows: int, dtype: torch.dtype) -> Found:
    torch.manual_seed(0)
    made = layers(width, dtype)
    x, grad = (torch.randn(rows, width, device=device(), dtype=dtype) for _ in range(2))
    for heading, passes in ((FORWARD, 1), (TRAINING, 3)):
        calls: dict[str, Call] = {}
        failed: dict[str, str] = {}
        for name, layer in made.items():
            call = _forward(layer, x) if passes == 1 else _step(layer, x, grad)
            candidates = {name: call}
            if name != "dense":
                candidates[f"{name}, bmm"] = _by_products(call)
            for own, one in candidates.items():
                try:
                    one()
                    synchronize()
                except Exception as error:  # reported in the row, and the others still timed
                    if "CUDA error" in str(error):
                        raise
                    failed[own] = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
                else:
                    calls[own] = one
        found = times(calls)
        for n in BLOCKS:
            layer = made[f"N = {n}"]
            yield heading, _row(width, rows, dtype, n, layer, made["dense"], found, failed, passes)


def _row(
    width: int,
    rows: int,
    dtype: torch.dtype,
    n: int,
    layer: nn.Module,
    dense: nn.Module,
    found: Times,
    failed: Mapping[str, str],
    passes: int,
) -> Row:
    gain, name = multiplied(dense) / multiplied(layer), f"N = {n}"
    row: Row = {"width": width, "rows": rows, "dtype": short(dtype), "N": n, "arithmetic ×": gain}
    row["dense ms"] = found.device["dense"] * 1e3
    row["dense, % of peak"] = 100 * rate(dense, rows, passes, found.device["dense"]) / peak(dtype)
    for own, heading in ((name, "monarch"), (f"{name}, bmm", "bmm")):
        seconds = found.device.get(own)
        if seconds is None:
            row |= dict.fromkeys(
                (f"{heading} ms", f"{heading} ×", f"{heading}, share of gain"), "–"
            )
            continue
        row[f"{heading} ms"] = seconds * 1e3
        row[f"{heading} ×"] = ratio = found.ratio(own, "dense")
        row[f"{heading}, share of gain"] = ratio / gain
    seconds = found.device.get(name, math.inf)
    row["% of peak"] = 100 * rate(layer, rows, passes, seconds) / peak(dtype)
    row["% of bandwidth"] = 100 * least_bytes(layer, width, rows, passes) / seconds / bandwidth()
    row["dense call µs"] = found.call["dense"] * 1e6
    row["monarch call µs"] = found.call[name] * 1e6 if name in found.call else "–"
    row["failed"] = "; ".join(f"{k}: {v}" for k, v in failed.items() if k.startswith(name))
    return row


def rate(layer: nn.Module, rows: int, passes: int, seconds: float) -> float:
    """FLOP/s of a forward (1 pass), or of a forward and backward (3)."""
    return 2 * passes * rows * multiplied(layer) / seconds


def least_bytes(layer: nn.Module, width: int, rows: int, passes: int) -> int:
    """Each input read and each output written once: x, weights, y; in the backward g, x, weights
    and the gradients of x and of the weights."""
    parameters = list(layer.parameters())
    weights = sum(p.numel() for p in parameters)
    values = rows * 2 * width + weights
    if passes == 3:
        values += rows * 3 * width + 2 * weights
    return values * parameters[0].itemsize


# int8 --------------------------------------------------------------------------------------------


def int8_case(width: int, rows: int) -> Found:
    torch.manual_seed(0)
    on = device()
    weight, bias = torch.randn(width, width, device=on), torch.randn(width, device=on)
    q, scale = int8.quantize_weight(weight)
    x = torch.randn(rows, width, device=on)
    half, half_weight, half_bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    factors = QuantizedMonarch(width, width, 4, device=on)
    with torch.no_grad():
        found = times({
            "bf16": lambda: F.linear(half, half_weight, half_bias),
            "fp32": lambda: F.linear(x, weight, bias),
            "int8": lambda: int8.int8_linear(x, q, scale, bias),
            "int8 on bf16": lambda: int8.int8_linear(half, q, scale, half_bias),
            "Monarch": lambda: factors(half),
        })  # fmt: skip
    seconds = found.device["int8 on bf16"]
    yield (
        "int8 beside cuBLAS, forward",
        {
            "width": width,
            "rows": rows,
            "bf16 linear ms": found.device["bf16"] * 1e3,
            "fp32 linear ms": found.device["fp32"] * 1e3,
            "int8 on fp32 ms": found.device["int8"] * 1e3,
            "× over fp32": found.ratio("int8", "fp32"),
            "int8 on bf16 ms": seconds * 1e3,
            "× over bf16": found.ratio("int8 on bf16", "bf16"),
            "% of int8 peak": 100 * 2 * rows * width * width / seconds / peak(torch.int8),
            "int8 Monarch N = 4, bf16, ms": found.device["Monarch"] * 1e3,
            "Monarch × over bf16": found.ratio("Monarch", "bf16"),
        },
    )


# What the card reaches at best -------------------------------------------------------------------


def ceilings(quick: bool) -> Found:
    side, size = (256, 2**20) if quick else (8192, 2**30)
    on = device()
    source = torch.empty(size, dtype=torch.uint8, device=on).random_()
    target = torch.empty_like(source)
    seconds = times({"copy": lambda: target.copy_(source)}).device["copy"]
    yield _ceiling("copy, read and written", 2 * size / seconds / 1e12, "TB/s", bandwidth() / 1e12)
    for dtype in (torch.bfloat16, torch.float32) if quick else (
        torch.bfloat16, torch.float16, torch.float32, torch.int8
    ):  # fmt: skip
        if dtype == torch.int8:
            a, b = (torch.randint(-9, 9, (side, side), device=on).to(dtype) for _ in range(2))
            calls: dict[str, Call] = {"product": lambda a=a, b=b: torch._int_mm(a, b.t())}
        else:
            a, b = (torch.randn(side, side, device=on).to(dtype) for _ in range(2))
            calls = {"product": lambda a=a, b=b: a @ b.t()}
        seconds = times(calls).device["product"]
        what = f"product of {side}, {short(dtype)}"
        yield _ceiling(what, 2 * side**3 / seconds / 1e12, "TFLOP/s", peak(dtype) / 1e12)


def _ceiling(what: str, found: float, unit: str, known: float) -> tuple[str, Row]:
    return "What the card reaches", {
        "what": what, "measured": found, "datasheet": known, "unit": unit,
        "%": 100 * found / known,
    }  # fmt: skip


# All of them -------------------------------------------------------------------------------------


def cases(quick: bool) -> list[Case]:
    def timed(width: int, rows: int, dtype: torch.dtype) -> Case:
        name = f"Monarch {width} wide, {rows} rows, {short(dtype)}"
        return Case(name, lambda: monarch_case(width, rows, dtype), 60)

    def quantized(width: int, rows: int) -> Case:
        return Case(f"int8 {width} wide, {rows} rows", lambda: int8_case(width, rows), 40)

    first = [timed(*size) for size in sizes(quick) if size[2] == torch.bfloat16]
    last = [timed(*size) for size in sizes(quick) if size[2] != torch.bfloat16]
    wide, rows = ((128,), (16,)) if quick else ((4096, 1024), (2048, 1, 16384))
    middle = [quantized(w, r) for w in wide for r in rows]
    return [Case("ceilings", lambda: ceilings(quick), 60), *first, *middle, *last]


def compile_cases(quick: bool) -> list[Case]:
    """Runs every layer once, so that its kernels are compiled when they are timed."""

    def compiled(width: int, n: int, dtype: torch.dtype) -> Found:
        layer = MonarchLinear(width, width, n, device=device(), dtype=dtype)
        for rows in (2048, 1, 16):
            x = torch.randn(rows, width, device=device(), dtype=dtype)
            _forward(layer, x)()
            _step(layer, x, torch.ones_like(x))()
        synchronize()
        yield from ()

    made: Sequence[tuple[int, int, torch.dtype]] = [
        (w, n, d) for d in (torch.bfloat16, torch.float32) for w in (4096, 2048, 8192, 1024)
        for n in BLOCKS
    ]  # fmt: skip
    return [] if quick else [
        Case(f"Monarch {w} wide, N {n}, {short(d)}", lambda w=w, n=n, d=d: compiled(w, n, d), 60)
        for w, n, d in made
    ]  # fmt: skip


def targets(tables: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    """Monarch N = 4 in bfloat16, at ≥ 2048 rows and ≥ 2048 wide."""
    for heading in (FORWARD, TRAINING):
        rows = [
            r for r in tables.get(heading, ())
            if r["N"] == 4 and r["dtype"] == "bfloat16" and min(r["rows"], r["width"]) >= 2048
        ]  # fmt: skip
        shares = [r["monarch, share of gain"] for r in rows]
        numbers = [s for s in shares if isinstance(s, float)]
        yield {
            "figure": f"{heading}: share of the arithmetic's gain, N = 4, bf16, ≥ 2048 rows and "
            f"wide, least of {len(rows)}",
            "found": min(numbers) if numbers and len(numbers) == len(rows) else "not all timed",
            "wanted": "≥ 0.7",
        }
