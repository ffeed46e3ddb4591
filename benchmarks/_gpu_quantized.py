"""Quantized layers on a card: every candidate right, and how fast beside cuBLAS and torch's own.

A candidate that fails is a row that says so, and the others are still checked and timed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import _checkout  # noqa: F401 (our packages, from this checkout)
import torch
from _gpu_checks import HEADING, LIMITS, device, error, short, verdict
from _gpu_clock import bandwidth, peak, synchronize, times
from _gpu_crew import Case, Found, Row
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter import rewrite
from rewriter.kernels import float8_linear as f8
from rewriter.kernels import int8_linear as i8
from rewriter.kernels import quantized_gpu as gpu
from rewriter.kernels import weight_only as wo
from rewriter.passes import Quantize

KERNELS = "Kernels of quantized layers, by dtype"
LAYERS = "Quantized layers beside cuBLAS, forward"
MODELS = "MiniLM, quantized"
Call = Callable[[], Tensor]


def operands(
    kind: str, rows: int, out: int, width: int, dtype: torch.dtype, activation: str = "",
    group: int = 64, symmetric: bool = True,
) -> gpu.Call:  # fmt: skip
    """A call of random numbers, with a bias."""
    on = device()
    x = torch.randn(rows, width, device=on).to(dtype)
    weight, bias = torch.randn(out, width, device=on), torch.randn(out, device=on).to(dtype)
    call = gpu.Call(kind, x, weight, weight, bias=bias, activation=activation)
    if kind in ("int8", "int8 weight"):
        q, scale = i8.quantize_weight(weight)
        return replace(call, weight=q, scale=scale, sums=q.sum(1, dtype=torch.int32))
    if kind in ("float8", "float8 weight"):
        q, scale = f8.quantize_float8(weight)
        return replace(call, weight=q, scale=scale)
    levels, scale, zero = wo.quantize_groups(weight, 4, group, symmetric)
    return replace(call, weight=wo.pack(levels), scale=scale, zero=zero)


def activations(kind: str) -> Sequence[str]:
    return i8.ACTIVATIONS if kind in ("int8", "float8") else ("",)


# Right? ------------------------------------------------------------------------------------------


def kernels_case(kind: str, dtype: torch.dtype) -> Found:
    """Which kernels there are on this card, and why not the others."""
    for name in gpu.KERNELS[kind]:
        try:
            why = gpu.refused_by(kind, name, dtype, device()) if torch.cuda.is_available() else ""
        except Exception as failure:  # reported in the row
            why = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
        yield KERNELS, {"kind": kind, "kernel": name, "dtype": short(dtype), "refused": why or ""}


def candidates_case(
    kind: str, sizes: tuple[int, int, int], dtype: torch.dtype, group: int, symmetric: bool
) -> Found:
    """Every candidate of a size against the formula in float64, with what may follow."""
    torch.manual_seed(0)
    rows, out, width = sizes
    text = f"{width} → {out}, {rows} rows"
    text += (
        f", groups of {group}{'' if symmetric else ', zeros'}" if kind.startswith("int4") else ""
    )
    for activation in activations(kind):
        call = operands(kind, rows, out, width, dtype, activation, group, symmetric)
        want = gpu.formulas[kind](call)
        if kind == "float8" and torch.cuda.is_available() and gpu.float8_refusal(device()):
            return
        behind = replace(call, then="gelu", add=torch.randn_like(want).to(dtype))
        assert behind.add is not None
        after = F.gelu(want) + behind.add.double()
        errors: dict[str, float] = {}
        for given, wanted, said in ((call, want, ""), (behind, after, ", gelu, sum")):
            for name, compute in gpu.candidates(gpu.Size.of(given)).items():
                try:
                    errors[f"{name}{said}"] = error(compute(given), wanted)
                    synchronize()
                except Exception as failure:  # the row says it
                    if "CUDA error" in str(failure):
                        raise
                    words = " ".join(str(failure).split())[:80]
                    errors[f"{name}{said}: {type(failure).__name__} {words}"] = math.inf
        # an activation on the edge between two levels may fall to either
        limit = 2e-3 if call.activation or kind == "int4 dynamic" else LIMITS[dtype]
        limit = max(limit, 2 * LIMITS[dtype])
        what = f"{kind}{f', {activation}' if activation else ''}, candidates"
        yield HEADING, verdict(what, text, dtype, errors, limit)


def graph_case() -> Found:
    """Layers of all kinds in a CUDA graph: what it replays is what they compute, of other inputs
    too, and nothing waits for the device."""
    torch.manual_seed(0)
    for kind in gpu.KERNELS:
        if kind == "float8" and gpu.float8_refusal(device()):
            continue
        for rows in (1, 40):
            call = operands(kind, rows, 96, 160, torch.bfloat16, activations(kind)[0])
            compute = functools.partial(gpu.run, call)
            want = compute()  # chooses, and compiles
            assert want is not None
            other = torch.randn_like(call.x)
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            with torch.cuda.stream(stream):
                compute()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                held = compute()
            assert held is not None
            graph.replay()
            errors = {"replayed": error(held, want)}
            call.x.copy_(other)
            graph.replay()
            got = held.clone()
            again = compute()
            assert again is not None
            errors["other input"] = error(got, again)
            yield HEADING, verdict(f"{kind} in a CUDA graph", f"{rows} rows", torch.bfloat16,
                                   errors, 0.0)  # fmt: skip


# Fast? -------------------------------------------------------------------------------------------

SHAPES = ((4096, 4096), (4096, 11008))


def torchs(call: gpu.Call) -> dict[str, Call]:
    """Torch's own products that our kernels do not call, for weights of this kind."""
    x, weight, scale, bias = call.x, call.weight, call.scale, call.bias
    assert bias is not None
    if call.kind == "int8 weight":
        own = scale.to(x.dtype)
        return {
            "torch._weight_int8pack_mm": lambda: torch._weight_int8pack_mm(x, weight, own) + bias
        }
    if call.kind == "int4":
        made: list[Any] = []

        def int4() -> Tensor:
            if not made:
                levels = (wo.unpack(weight).to(torch.int32) + 8).to(torch.uint8)
                pairs = (levels[:, ::2] << 4 | levels[:, 1::2]).contiguous()
                zero = torch.zeros_like(scale) if call.zero is None else call.zero
                both = torch.stack([scale, zero], -1).to(x.dtype).transpose(0, 1).contiguous()
                made.extend((torch._convert_weight_to_int4pack(pairs, 8), both))
            return torch._weight_int4pack_mm(x, made[0], call.group, made[1]) + bias

        return {"torch._weight_int4pack_mm": int4}
    return {}


def layer_case(kind: str, rows: int, width: int, out: int, group: int = 64) -> Found:
    torch.manual_seed(0)
    dtype = torch.bfloat16
    call = operands(kind, rows, out, width, dtype, activations(kind)[0], group)
    assert call.bias is not None
    dense, bias = torch.randn(out, width, device=device()).to(dtype), call.bias
    every: dict[str, Call] = {
        n: functools.partial(c, call) for n, c in gpu.candidates(gpu.Size.of(call)).items()
    }
    every |= torchs(call)
    if torch.cuda.is_available():
        every["the operation"] = lambda: _some(gpu.run(call))
    runs: dict[str, Call] = {"bf16": lambda: F.linear(call.x, dense, bias)}
    failed: dict[str, str] = {}
    for name, one in every.items():
        try:
            one()
            synchronize()
        except Exception as failure:  # reported in its row, and the others still timed
            if "CUDA error" in str(failure):
                raise
            failed[name] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:120]}"
        else:
            runs[name] = one
    with torch.no_grad():
        found = times(runs)
    chosen = _chosen(call)
    for name in every:
        row: Row = {"kind": kind, "rows": rows, "in": width, "out": out}
        row["group"] = group if call.group else "–"
        row |= {"candidate": name, "chosen": "yes" if name == chosen else ""}
        seconds = found.device.get(name)
        if seconds is None:
            row |= dict.fromkeys(("ms", "× over bf16", "% of peak", "% of bandwidth"), "–")
        else:
            row |= {"ms": seconds * 1e3, "× over bf16": found.ratio(name, "bf16")}
            row["% of peak"] = 100 * 2 * rows * out * width / seconds / peak(_multiplied(kind))
            row["% of bandwidth"] = 100 * _bytes(call) / seconds / bandwidth()
        row["call µs"] = found.call[name] * 1e6 if name in found.call else "–"
        yield LAYERS, row | {"failed": failed.get(name, "")}


def _some(y: Tensor | None) -> Tensor:
    if y is None:
        raise RuntimeError("no kernel computes it: the formula would")
    return y


def _chosen(call: gpu.Call) -> str:
    if not torch.cuda.is_available():
        return ""
    compute = gpu.pick(call)
    size = gpu.Size.of(call)
    return next((n for n, c in gpu.candidates(size).items() if c is compute), "")


def _multiplied(kind: str) -> torch.dtype:
    named = {"int8": torch.int8, "int4 dynamic": torch.int8, "float8": torch.float8_e4m3fn}
    return named.get(kind, torch.bfloat16)


def _bytes(call: gpu.Call) -> int:
    """The weight and its scales, x and y once each."""
    own = (call.weight, call.scale, call.zero, call.x)
    out = call.x.shape[0] * len(call.weight) * call.x.itemsize
    return sum(t.nbytes for t in own if t is not None) + out


# MiniLM ------------------------------------------------------------------------------------------

SCHEMES: Mapping[str, dict[str, Any]] = {
    "int8-dynamic": {}, "int8-weight": {}, "int4-weight": {"group_size": 64}, "int4-dynamic": {},
    "fp8-weight": {}, "fp8-dynamic": {}, "bf16": {},
}  # fmt: skip


def minilm_case(scheme: str, rows: int, length: int) -> Found:
    row: Row = {"scheme": scheme, "batch": f"{rows} × {length}"}
    nothing = dict.fromkeys(
        ("ms", "× over fp32", "× over bf16", "call ms", "cosine", "kernel"), "–"
    )
    try:
        row |= nothing | _minilm(scheme, rows, length) | {"failed": ""}
    except Exception as failure:  # without transformers, or without the weights: the row says so
        if "CUDA error" in str(failure):
            raise
        row |= nothing
        row["failed"] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"
    yield MODELS, row


def _minilm(scheme: str, rows: int, length: int) -> Row:
    import _models
    from _gpu_models import _no_warnings

    on = device()
    model = _models.minilm().to(on).eval()
    batch = {n: t.to(on) for n, t in _models.tokens(rows, length).items()}
    with _no_warnings(), torch.no_grad():
        made = rewrite(model, [Quantize(scheme, **SCHEMES[scheme])], batch).eval()
        half = _models.minilm().to(on, torch.bfloat16).eval()
        calls = {"fp32": model, "bf16": half, "own": made}
        found = times({n: functools.partial(_hidden, m, batch) for n, m in calls.items()})
        want, got = _hidden(model, batch), _hidden(made, batch)
    replaced = made.report.replaced
    return {
        "ms": found.device["own"] * 1e3,
        "× over fp32": found.ratio("own", "fp32"),
        "× over bf16": found.ratio("own", "bf16"),
        "call ms": found.call["own"] * 1e3,
        "cosine": float(F.cosine_similarity(got.double(), want.double(), -1).mean()),
        "kernel": replaced[0].kernel if replaced else "–",
    }


def _hidden(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).last_hidden_state
    return found


# All of them -------------------------------------------------------------------------------------


def checks(quick: bool) -> list[Case]:
    """The correctness of every candidate."""
    dtypes = (torch.float32, torch.bfloat16) if quick else (*LIMITS,)
    few = [(1, 48, 160), (33, 96, 64)]
    many = [(1, 1000, 777), (16, 4096, 1024), (40, 777, 1000), (300, 1031, 520), (2, 64, 20000)]
    found = []
    for kind in gpu.KERNELS:
        groups = [(64, True)]
        if kind.startswith("int4"):
            groups = [(64, False)] if quick else [(32, True), (64, False), (128, True)]
        for dtype in dtypes:
            name = f"kernels of {kind}, {short(dtype)}"
            found.append(Case(name, functools.partial(kernels_case, kind, dtype), 200))
            for size in few if quick or dtype == torch.float16 else many:
                for group, symmetric in groups:
                    run = functools.partial(candidates_case, kind, size, dtype, group, symmetric)
                    name = f"{kind} {size} {short(dtype)}, group {group}"
                    found.append(Case(name, run, 120))
    return found if quick else [*found, Case("quantized, CUDA graphs", graph_case, 120)]


def timings(quick: bool) -> list[Case]:
    def timed(kind: str, rows: int, width: int, out: int) -> Case:
        name = f"{kind}, {width} → {out}, {rows} rows"
        return Case(name, functools.partial(layer_case, kind, rows, width, out), 60)

    def model(scheme: str, rows: int, length: int) -> Case:
        name = f"MiniLM {scheme}, {rows} × {length}"
        return Case(name, functools.partial(minilm_case, scheme, rows, length), 60)

    if quick:
        return [timed(kind, 2, 64, 64) for kind in gpu.KERNELS]
    layers = [
        timed(kind, rows, *shape) for rows in (1, 1024, 16) for shape in SHAPES
        for kind in gpu.KERNELS
    ]  # fmt: skip
    models = [model(s, *size) for size in ((8, 128), (1, 16)) for s in SCHEMES]
    return [*layers, *models]


def targets(tables: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    """The best candidate of each kind beside cuBLAS in bfloat16, at one row and at many."""
    for kind in gpu.KERNELS:
        for rows in (1, 1024):
            own = [
                r for r in tables.get(LAYERS, ())
                if r["kind"] == kind and r["rows"] == rows and r["in"] == 4096
                and r["candidate"] == "the operation" and isinstance(r["× over bf16"], float)
            ]  # fmt: skip
            if own:
                yield {
                    "figure": f"{kind}, 4096 wide, {rows} rows: × over bf16 linear, least of "
                    f"{len(own)}",
                    "found": min(r["× over bf16"] for r in own),
                    "wanted": "≥ 1",
                }
