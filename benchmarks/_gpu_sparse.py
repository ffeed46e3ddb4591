"""A card's products that read the weights of active inputs alone: right, how fast beside cuBLAS?"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import _checkout  # noqa: F401 (our packages, from this checkout)
import torch
from _gpu_checks import HEADING, LIMITS, device, error, short, verdict
from _gpu_clock import bandwidth, synchronize, times
from _gpu_crew import Case, Found, Row
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels import sparse, sparse_gpu
from rewriter.kernels.int8_linear import quantize_weight
from rewriter.kernels.sparse import Select, active_reference
from rewriter.kernels.sparse_linear import sparse_linear
from rewriter.kernels.topk import topk_linear
from rewriter.kernels.weight_only import int8_weight_linear

LAYERS = "Sparse layers beside cuBLAS, forward"
MLPS = "Sparse gated MLPs behind their gate, beside cuBLAS"
Call = Callable[[], Tensor]


class Operands(NamedTuple):
    """x [rows, in], weight [out, in] with a scale where it is int8, and a bias."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    bias: Tensor

    @property
    def columns(self) -> Tensor:
        return self.weight.t().contiguous()

    def right(self, select: Select) -> Tensor:
        """The product in float64."""
        kept = self.x.where(active_reference(self.x, select), 0.0).double()
        steps = 1.0 if self.scale is None else self.scale.double()
        return kept @ self.weight.double().t() * steps + self.bias.double()


def operands(rows: int, out: int, width: int, dtype: torch.dtype, levels: bool) -> Operands:
    on = device()
    x = torch.randn(rows, width, device=on).to(dtype)
    weight = torch.randn(out, width, device=on)
    bias = torch.randn(out, device=on).to(dtype)
    if not levels:
        return Operands(x, weight.to(dtype), None, bias)
    q, scale = quantize_weight(weight)
    return Operands(x, q.t().contiguous().t(), scale, bias)


def over(share: float) -> Select:
    """A threshold that a share of normal numbers is above."""
    t = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - share / 2))
    return Select(threshold=t.float().view(1).to(device()))


def tiles(of: Operands) -> list[Any]:
    """All that may be chosen on this card; one without a card, where numpy computes it."""
    from rewriter.kernels import sparse_triton

    sizes = len(of.x), len(of.weight), of.weight.itemsize
    if not torch.cuda.is_available():
        return sparse_triton.tiles(*sizes, units=1)[:1]
    return sparse_triton.tiles(
        *sizes, torch.cuda.get_device_properties(device()).multi_processor_count
    )


class Mlp(NamedTuple):
    """A gated MLP behind its gate: x [rows, in], a [rows, hidden] the gate's activations, `up`
    [hidden, in] and `down` [in, hidden], whose columns are `columns`."""

    x: Tensor
    a: Tensor
    up: Tensor
    down: Tensor
    columns: Tensor

    @classmethod
    def of(cls, rows: int, width: int, hidden: int, dtype: torch.dtype) -> Mlp:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device()).to(dtype)

        down = random(width, hidden)
        own = random(rows, width), random(rows, hidden), random(hidden, width)
        return cls(*own, down, down.t().contiguous())

    def dense(self) -> Tensor:
        return F.linear(self.a * F.linear(self.x, self.up), self.down)

    def sparse(self, select: Select, tile: Any) -> Tensor:
        own = self.x, self.a, self.up, None, self.columns, None
        return sparse_gpu.gated(*own, select, tile)

    def tiles(self) -> list[Any]:
        return tiles(Operands(self.x, self.down, None, self.x))


# Right? ------------------------------------------------------------------------------------------


def products_case(sizes: tuple[int, int, int], dtype: torch.dtype, levels: bool) -> Found:
    """Every tile, and every way to select, against the formula in float64."""
    from rewriter.kernels import sparse_triton

    torch.manual_seed(0)
    rows, out, width = sizes
    of = operands(rows, out, width, dtype, levels)
    importance = torch.rand(width, device=device())
    of.x[0, : width // 3] = 0.25  # ties
    k = width // 8 // 4 * 4 or 1
    for what, select in {
        "k": Select(k),
        "k by importance": Select(k, importance=importance),
        "k, blocks": Select(k, block=math.gcd(4, k, width)),
        "threshold": over(0.3),
        "nothing": Select(threshold=torch.full((1,), 1e9, device=device())),
        "all": Select(threshold=torch.zeros(1, device=device())),
    }.items():
        want, mask = of.right(select), active_reference(of.x, select)
        inputs, values, length = sparse_triton.compacted(of.x, select)
        union = mask.any(0).nonzero()[:, 0]
        same = int(length) == len(union) and torch.equal(inputs[: len(union)].long(), union)
        kept = of.x.where(mask, 0.0)
        errors = {"list": 0.0 if same else math.inf}
        errors["values"] = error(values[:, : len(union)], kept[:, union])
        errors["masked"] = error(sparse_triton.masked(of.x, select), kept)
        for tile in tiles(of):
            try:
                y = sparse_gpu.product(of.x, of.columns, of.scale, of.bias, select, tile)
                errors[str(tile)] = error(y, want)
                synchronize()
            except Exception as failure:  # the row says it
                if "CUDA error" in str(failure):
                    raise
                words = " ".join(str(failure).split())[:80]
                errors[f"{tile}: {type(failure).__name__} {words}"] = math.inf
        text = f"{width} → {out}, {rows} rows{', int8' if levels else ''}"
        yield HEADING, verdict(f"sparse product, {what}", text, dtype, errors, LIMITS[dtype])


def gated_case(sizes: tuple[int, int, int], dtype: torch.dtype) -> Found:
    """A gated MLP of which the neurons with a large gate are computed, every tile."""
    torch.manual_seed(0)
    rows, width, hidden = sizes
    of = Mlp.of(rows, width, hidden, dtype)
    for what, select in {"k": Select(hidden // 10 or 1), "threshold": over(0.2)}.items():
        kept = of.a.where(active_reference(of.a, select), 0.0).double()
        want = kept * (of.x.double() @ of.up.double().t()) @ of.down.double().t()
        errors = {str(t): error(of.sparse(select, t), want) for t in of.tiles()}
        text = f"{width} → {hidden} → {width}, {rows} rows"
        limit = 2 * LIMITS[dtype]  # two products
        yield HEADING, verdict(f"sparse gated MLP, {what}", text, dtype, errors, limit)


def refusals_case() -> Found:
    """Whether the probe lets the kernels run on this card."""
    for dtype in LIMITS:
        why = sparse_gpu.refusal(device(), dtype)
        row = verdict("sparse kernels' probe", why or "", dtype, {"": math.inf if why else 0.0}, 0)
        yield HEADING, row


def graph_case() -> Found:
    """In a CUDA graph, and compiled: what is replayed is what is computed, of other inputs with
    more and fewer active entries too; nothing waits for the device."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    for rows in (1, 5):
        of = operands(rows, 1536, 4096, dtype, False)
        t = torch.full((1,), 2.0, device=device())

        def ops(of: Operands = of, t: Tensor = t) -> Tensor:
            y = sparse_linear(of.x, of.weight, None, of.bias, threshold=t, share=0.02)
            return y + topk_linear(of.x, of.weight, of.bias, 80)

        compiled = torch.compile(ops)
        ops(), compiled()  # chooses, compiles, and keeps the weight by columns
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        ops()
        torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = ops()
        errors = {}
        for factor in (1.0, 0.1, 3.0):
            of.x.copy_(factor * torch.randn_like(of.x))
            graph.replay()
            got = held.clone()
            errors[f"x{factor}, replayed"] = error(got, ops())
            errors[f"x{factor}, compiled"] = max(error(compiled(), got) - 1e-2, 0.0)
            want = of.right(Select(threshold=t)) + of.right(Select(80))
            errors[f"x{factor}, formula"] = max(error(got, want) - LIMITS[dtype], 0.0)
        text = f"{rows} rows, {'sparse' if _runs(of, 0.02) else 'dense'}"
        yield HEADING, verdict("sparse products in a CUDA graph", text, dtype, errors, 0.0)


def _runs(of: Operands, share: float) -> bool:
    """Whether the sparse product is what the operation chooses."""
    name = sparse.kernel_name(of.weight, len(of.x), share)
    return name.startswith("sparse")


# Fast? -------------------------------------------------------------------------------------------


def layer_case(
    rows: int, width: int, out: int, dtype: torch.dtype, levels: bool, shares: Sequence[float]
) -> Found:
    """All tiles and what the operation chooses, beside the dense product of x as it is. Each row
    of x selects by itself, as in a batch of decoding: the union of several is larger."""
    torch.manual_seed(0)
    of = operands(rows, out, width, dtype, levels)
    columns, by_rows = of.columns, of.weight.contiguous()
    for share in shares:
        ranked, select = Select(max(int(share * width), 1)), over(share)
        runs: dict[str, Call] = {"dense": functools.partial(_dense, of, by_rows)}
        own = of.x, columns, of.scale, of.bias
        first, *_ = every = tiles(of)
        for tile in every:
            runs[f"tile {tile}"] = functools.partial(sparse_gpu.product, *own, select, tile)
        runs["first tile, top k"] = functools.partial(sparse_gpu.product, *own, ranked, first)
        runs["list alone"] = functools.partial(_list, of.x, select)
        runs["list alone, top k"] = functools.partial(_list, of.x, ranked)
        op = functools.partial(sparse_linear, *of)
        runs["the operation"] = functools.partial(op, threshold=select.threshold, share=share)
        runs["the operation, top k"] = functools.partial(op, k=ranked.k)
        with torch.no_grad():
            found = times(runs)
        union = float(active_reference(of.x, select).any(0).double().mean())
        chosen = _chosen(of, share)
        for name in runs:
            seconds = found.device[name]
            read = of.weight.nbytes * (1.0 if name == "dense" else union)
            yield LAYERS, {
                "rows": rows, "in": width, "out": out, "x": short(dtype),
                "weight": short(of.weight.dtype), "active %": 100 * share,
                "union %": 100 * union, "candidate": name,
                "chosen": "yes" if name == chosen else "", "ms": seconds * 1e3,
                "× over dense": found.ratio(name, "dense"),
                "× predicted by bytes": 1 / union if name.startswith("tile") else "–",
                "% of bandwidth": "–" if "list" in name else 100 * read / seconds / bandwidth(),
                "call µs": found.call[name] * 1e6,
            }  # fmt: skip


def mlp_case(rows: int, width: int, hidden: int, dtype: torch.dtype) -> Found:
    """A gated MLP behind its gate, which is read whole either way, beside its dense products."""
    torch.manual_seed(0)
    of = Mlp.of(rows, width, hidden, dtype)
    for share in (0.1, 0.25, 0.5):
        select = over(share)
        runs: dict[str, Call] = {"dense": of.dense}
        runs |= {f"tile {t}": functools.partial(of.sparse, select, t) for t in of.tiles()}
        with torch.no_grad():
            found = times(runs)
        union = float(active_reference(of.a, select).any(0).double().mean())
        for name in runs:
            read = 2 * of.up.nbytes * (1.0 if name == "dense" else union)
            seconds = found.device[name]
            yield MLPS, {
                "rows": rows, "in": width, "hidden": hidden, "dtype": short(dtype),
                "active %": 100 * share, "union %": 100 * union, "candidate": name,
                "ms": seconds * 1e3, "× over dense": found.ratio(name, "dense"),
                "× predicted by bytes": "–" if name == "dense" else 1 / union,
                "% of bandwidth": 100 * read / seconds / bandwidth(),
                "call µs": found.call[name] * 1e6,
            }  # fmt: skip


def _list(x: Tensor, select: Select) -> Tensor:
    from rewriter.kernels import sparse_triton

    return sparse_triton.compacted(x, select).values


def _dense(of: Operands, by_rows: Tensor) -> Tensor:
    if of.scale is None:
        return F.linear(of.x, by_rows, of.bias)
    return int8_weight_linear(of.x, by_rows, of.scale, of.bias)


def _chosen(of: Operands, share: float) -> str:
    if not torch.cuda.is_available():
        return ""
    size = sparse_gpu.Size(len(of.x), *of.weight.shape, of.weight.dtype, of.x.dtype, device())
    found = sparse_gpu.choice(size._replace(device=of.x.device))
    union = 1 - (1 - share) ** len(of.x)
    return f"tile {found.tile}" if union <= found.most else "dense"


# All of them -------------------------------------------------------------------------------------


def checks(quick: bool) -> list[Case]:
    few = [(2, 48, 160)]
    many = [(1, 1000, 776), (1, 11008, 4096), (2, 640, 40000), (7, 4096, 11008), (16, 777, 1000)]
    found = []
    for dtype in (torch.float32, torch.bfloat16) if quick else (*LIMITS,):
        for size in few if quick or dtype == torch.float16 else many:
            for levels in (False, True):
                run = functools.partial(products_case, size, dtype, levels)
                name = f"sparse product {size} {short(dtype)}{', int8' if levels else ''}"
                found.append(Case(name, run, 90))
        mlps = ((1, 4096, 11008), (3, 1000, 777), (16, 576, 1536))
        for size in few if quick or dtype == torch.float16 else mlps:
            run = functools.partial(gated_case, size, dtype)
            found.append(Case(f"sparse gated MLP {size} {short(dtype)}", run, 90))
    if quick:
        return found
    found.append(Case("sparse kernels' probe", refusals_case, 90))
    return [*found, Case("sparse, CUDA graphs", graph_case, 120)]


def timings(quick: bool) -> list[Case]:
    def timed(
        rows: int, width: int, out: int, dtype: torch.dtype, levels: bool, shares: Sequence[float]
    ) -> Case:
        name = f"sparse {width} → {out}, {rows} rows, {short(dtype)}{', int8' if levels else ''}"
        run = functools.partial(layer_case, rows, width, out, dtype, levels, shares)
        return Case(name, run, 60)

    if quick:
        return [timed(2, 64, 64, torch.float32, False, (0.25,))]
    mlps = [
        Case(
            f"sparse gated MLP, {rows} rows, {short(dtype)}",
            functools.partial(mlp_case, rows, 4096, 11008, dtype),
            60,
        )
        for dtype in (torch.bfloat16, torch.float32)
        for rows in (1, 8)
    ]
    kinds = ((torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True))
    return [
        timed(rows, *shape, *kind, (0.1, 0.25, 0.5))
        for shape in ((4096, 11008), (11008, 4096))
        for rows in (1, 8)
        for kind in kinds
    ] + mlps


def targets(tables: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    """The operation beside the dense product of all weights."""
    wants = ((1, 10, "≥ 4"), (1, 25, "≥ 2.2"), (1, 50, "≥ 1.3"), (8, 10, "≥ 1.5"))
    for rows, share, wanted in wants:
        own = [
            r for r in tables.get(LAYERS, ())
            if r["rows"] == rows and r["active %"] == share and r["candidate"] == "the operation"
            and r["weight"] == "bfloat16" and isinstance(r["× over dense"], float)
        ]  # fmt: skip
        if own:
            yield {
                "figure": f"sparse, bfloat16, {rows} rows, {share} % active: × over dense linear, "
                f"least of {len(own)}",
                "found": min(r["× over dense"] for r in own),
                "wanted": wanted,
            }
