"""Every kernel and every path that runs on the card, against its reference in float64.

The error is ‖out − ref‖/‖ref‖, and NaN never passes. Inputs are fresh random numbers, memory that
outputs may get is filled with NaN first, so that an element that nothing writes is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import _checkout  # noqa: F401 (our packages, from this checkout)
import torch
from _gpu_crew import Case, Found, Row
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter import rewrite
from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_monarch, monarch, pack, quadratic, residual, topk
from rewriter.kernels import monarch_chain as chain
from rewriter.kernels.monarch_project import monarch_project
from rewriter.passes import Monarch, MonarchChain, Quadratic, Quantize, TopK

HEADING = "Correctness"
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""float32 products are exact here (no tf32); half types round what lies between two products."""

Named = dict[str, Tensor]

# in, out, (K, L), rank, rows: tails of every tile, ranks over one tile, one block, one row
MONARCH = [
    (64, 64, (4, 4), 4, 17),
    (40, 28, (3, 5), 3, 1),
    (33, 70, (2, 4), 20, 3),
    (48, 300, (4, 1), 5, 130),
    (768, 768, (4, 4), 48, 200),
    (1024, 512, (8, 8), 8, 257),
    (1000, 1030, (32, 32), 1, 129),
    (2048, 2048, (4, 4), 128, 300),
    (4096, 4096, (4, 4), 256, 96),
    (8192, 8192, (4, 4), 512, 64),
    (300, 200, (1, 1), 70, 100),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Comparing ---------------------------------------------------------------------------------------


def error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖/‖wanted‖ in float64; inf for NaN or another shape."""
    if found.shape != wanted.shape:
        return math.inf
    found, wanted = found.detach().double(), wanted.detach().double()
    norm = float(wanted.norm())
    lost = float((found - wanted).norm()) / (norm or 1.0)
    return lost if math.isfinite(lost) else math.inf


def verdict(what: str, case: str, dtype: torch.dtype, worst: Mapping[str, float], limit: float,
            ) -> Row:  # fmt: skip
    """One row: the worst of several errors, by name, against a limit."""
    name, most = max(worst.items(), key=lambda item: math.inf if item[1] != item[1] else item[1])
    return {
        "what": what,
        "case": case,
        "dtype": short(dtype),
        "compared": len(worst),
        "worst": name,
        "error": f"{most:.1e}",  # text: an error may be infinite
        "limit": f"{limit:.0e}",
        "verdict": "ok" if most <= limit else "FAILED",
    }


def poison(like: Sequence[Tensor]) -> None:
    """Memory of these sizes is full of NaN when it is next given out."""
    held = [torch.full_like(t, math.nan) for t in like if t.is_floating_point() for _ in range(2)]
    del held


def gradients(call: Callable[..., Tensor], given: Named, grad: Tensor) -> Named:
    """The result and the gradients of all that is given, by name."""
    leaves = {n: t.detach().requires_grad_() for n, t in given.items()}
    y = call(**leaves)
    found = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, found, strict=True)}}


def compared(call: Callable[..., Tensor], reference: Callable[..., Tensor], given: Named,
             ) -> dict[str, float]:  # fmt: skip
    """Errors of the result and of all gradients, against the reference in float64."""
    wide = {n: t.double() for n, t in given.items()}
    shape = reference(**wide).shape
    grad = torch.randn(shape, device=next(iter(given.values())).device)
    grad = grad.to(next(iter(given.values())).dtype)
    wanted = gradients(reference, wide, grad.double())
    poison([t.to(grad.dtype) for t in wanted.values()])
    found = gradients(call, given, grad)
    with torch.no_grad():
        found["y without gradients"] = call(**given)
        wanted["y without gradients"] = wanted["y"]
    return {name: error(found[name], wanted[name]) for name in wanted}


# Monarch -----------------------------------------------------------------------------------------


def factors(case: Any, dtype: torch.dtype) -> Named:
    """x with rows that are no neighbours, and the factors."""
    inputs, outputs, (k, l), rank, rows = case
    ib, ob, on = -(-inputs // k), -(-outputs // l), device()
    given = {
        "x": torch.randn(rows, inputs + 3, device=on)[:, :inputs],
        "right": torch.randn(k, rank * l, ib, device=on) / ib**0.5,
        "left": torch.randn(l, ob, k * rank, device=on) / (k * rank) ** 0.5,
        "bias": torch.randn(outputs, device=on),
    }
    return {n: t.to(dtype) for n, t in given.items()}


def fused(given: Named, outputs: int, interleaved: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """The Triton kernels by themselves, with and without what is optional."""
    from rewriter.kernels.monarch_triton import monarch_backward, monarch_forward

    x, right, left, bias = given.values()
    wide = [t.double() for t in (x, right, left)]
    for own in (bias, None):
        own_wide = None if own is None else own.double()
        y, mid = monarch._forward_train(monarch.Operands(*wide, own_wide, outputs, interleaved))
        poison([y.to(x.dtype), mid.to(x.dtype)])
        found, kept = monarch_forward(x, right, left, own, outputs, interleaved, True)
        bare, _ = monarch_forward(x, right, left, own, outputs, interleaved, False)
        errors = {"y": error(found, y), "mid": error(kept, mid), "y, no mid": error(bare, y)}
        yield f"forward, {'no bias' if own is None else 'bias'}", errors
    grad = torch.randn_like(found)
    for need in ((True, True, True), (True, False, False), (False, True, False)):
        asked = grad.double(), wide[0], mid, *wide[1:], interleaved, *need
        wanted = monarch._backward(monarch.BackwardOperands(*asked))[:3]
        poison([t.to(x.dtype) for t in wanted])
        got = monarch_backward(grad, x, kept, right, left, interleaved, *need)
        pairs = zip(("dx", "dright", "dleft"), got, wanted, strict=True)
        yield f"backward {need.count(True)} of 3", {n: error(a, b) for n, a, b in pairs}


def monarch_case(case: Any, dtype: torch.dtype, interleaved: bool) -> Found:
    torch.manual_seed(0)
    inputs, outputs, blocks, rank, rows = case
    text = f"{inputs} → {outputs}, {blocks}, rank {rank}, {rows} rows"
    text += ", interleaved" if interleaved else ""
    given = factors(case, dtype)

    def run(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda **t: function(**t, out_features=outputs, interleaved=interleaved)

    worst = compared(run(monarch.monarch_linear), run(monarch.monarch_linear_reference), given)
    yield HEADING, verdict("Monarch, the operation", text, dtype, worst, LIMITS[dtype])
    if max(inputs, outputs) > 2000:  # minutes of compiling; the operation itself is checked
        return
    for name, errors in fused(given, outputs, interleaved):
        yield HEADING, verdict(f"Monarch in Triton, {name}", text, dtype, errors, LIMITS[dtype])


def monarch_forms(dtype: torch.dtype) -> Found:
    """Shapes and strides that the operation is given by models; empty batches; autocast."""
    torch.manual_seed(0)
    given = factors((96, 80, (4, 4), 8, 60), dtype)
    y = monarch.monarch_linear_reference(**{n: t.double() for n, t in given.items()},
                                         out_features=80)  # fmt: skip
    x = given.pop("x")

    def on(x: Tensor) -> Tensor:
        return monarch.monarch_linear(x, **given, out_features=80)

    errors = {
        "3-D": error(on(x.reshape(4, 15, 96)), y.view(4, 15, 80)),
        "transposed": error(on(x.t().contiguous().t()), y),
        "one row, 1-D": error(on(x[0]), y[0]),
        "every second row": error(on(x[::2]), y[::2]),
        "empty": float(on(x[:0]).shape != (0, 80)),
    }
    if x.is_cuda and dtype != torch.float32:
        wide = {n: t.float() for n, t in given.items()}
        with torch.autocast("cuda", dtype):
            cast = monarch.monarch_linear(x.float(), **wide, out_features=80)
        errors["autocast"] = error(cast, y) if cast.dtype == dtype else math.inf
    yield HEADING, verdict("Monarch, forms", "96 → 80", dtype, errors, LIMITS[dtype])


# The other operations ----------------------------------------------------------------------------


def chain_case(order: int, stars: int, dtype: torch.dtype) -> Found:
    torch.manual_seed(0)
    rows, size = 37, 120 if stars == 0 else 144
    outputs = 90 if stars == 0 else size
    count = order if not stars else 2
    before = chain.chain_grid(size, count)
    after = before if stars else chain.chain_grid(outputs, count)
    axes = chain.star_axes(stars) if stars else range(count - 1, -1, -1)
    given = {"x": torch.randn(rows, size, device=device()).to(dtype)}
    for number, shape in enumerate(chain.chain_shapes(list(axes), before, after)):
        factor = torch.randn(shape, device=device()) / shape[-1] ** 0.5
        given[f"factor{number}"] = factor.to(dtype)

    def run(x: Tensor, **factors: Tensor) -> Tensor:
        return chain.chain_linear(x, list(factors.values()), list(axes), before, None, outputs)

    text = f"{size} → {outputs}, order {order}" if not stars else f"{size}, (MM*)^{stars}"
    limit = LIMITS[dtype] * (2 if stars else 1)  # five products in a row
    yield HEADING, verdict("MonarchChain", text, dtype, compared(run, run, given), limit)


def quadratic_case(inputs: int, outputs: int, rows: int, dtype: torch.dtype) -> Found:
    torch.manual_seed(0)
    scale, on = inputs**-0.5, device()
    given = {"x": torch.randn(rows, inputs, device=on)}
    given |= {n: torch.randn(outputs, inputs, device=on) * scale for n in ("w_a", "w_b", "w_c")}
    given["bias"] = torch.randn(outputs, device=on)
    given = {n: t.to(dtype) for n, t in given.items()}
    worst = compared(quadratic.quadratic_linear, quadratic.quadratic_linear_reference, given)
    text = f"{inputs} → {outputs}, {rows} rows"
    yield HEADING, verdict("Quadratic", text, dtype, worst, LIMITS[dtype])


def topk_case(inputs: int, outputs: int, k: int, rows: int, dtype: torch.dtype) -> Found:
    """Magnitudes are all different and exact in every dtype: a tie would leave the choice open."""
    torch.manual_seed(0)
    on = device()
    order = torch.rand(rows, inputs, device=on).argsort(-1).float() + 1
    signs = torch.randint(0, 2, (rows, inputs), device=on) * 2 - 1
    given = {
        "h": (order * signs / 256).to(dtype),
        "weight": (torch.randn(outputs, inputs, device=on) * inputs**-0.5).to(dtype),
        "bias": torch.randn(outputs, device=on).to(dtype),
    }

    def run(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda **t: function(**t, k=k)

    worst = compared(run(topk.topk_linear), run(topk.topk_linear_reference), given)
    text = f"{inputs} → {outputs}, k {k}, {rows} rows"
    yield HEADING, verdict("TopK", text, dtype, worst, LIMITS[dtype])


def int8_case(inputs: int, outputs: int, rows: int, dtype: torch.dtype, bias: bool) -> Found:
    """The gradient counts rounding as the identity: its reference is the product alone."""
    torch.manual_seed(0)
    on = device()
    x = torch.randn(rows, inputs, device=on).to(dtype)
    q, scale = int8.quantize_weight(torch.randn(outputs, inputs, device=on))
    own = torch.randn(outputs, device=on).to(dtype) if bias else None
    grad = torch.randn(rows, outputs, device=on).to(dtype)
    wanted = (grad.double() * scale) @ q.double()
    # an activation on the edge between two of 256 levels may fall to either
    limit = 2 * LIMITS[dtype] if dtype != torch.float32 else 2e-3
    text = f"{inputs} → {outputs}, {rows} rows{', bias' if bias else ''}"
    for activation in int8.ACTIVATIONS:
        leaf = x.clone().requires_grad_()
        found = int8.int8_linear(leaf, q, scale, own, activation)
        want = int8.int8_linear_reference(x.double(), q, scale.double(), own, activation)
        errors = {"y": error(found, want)}
        errors["dx"] = error(torch.autograd.grad(found, leaf, grad)[0], wanted)
        yield HEADING, verdict(f"int8 linear, {activation}", text, dtype, errors, limit)


def int8_monarch_case(case: Any, dtype: torch.dtype, interleaved: bool) -> Found:
    torch.manual_seed(0)
    inputs, outputs, blocks, rank, rows = case
    given = factors(case, torch.float32)
    x = given["x"].to(dtype)
    (qright, right), (qleft, left) = (int8.quantize_weight(given[n]) for n in ("right", "left"))
    args = qright, right, qleft, left, given["bias"].to(dtype), outputs
    limit = 2 * LIMITS[dtype] if dtype != torch.float32 else 5e-3
    text = f"{inputs} → {outputs}, {blocks}, rank {rank}, {rows} rows"
    dense = monarch.monarch_dense(
        int8.dequantize_weight(qright, right.double()),
        int8.dequantize_weight(qleft, left.double()), outputs, inputs, interleaved,
    )  # fmt: skip
    for activation in int8.ACTIVATIONS:
        leaf = x.clone().requires_grad_()
        found = int8_monarch.int8_monarch_linear(leaf, *args, activation, interleaved)
        want = int8_monarch.int8_monarch_linear_reference(
            x.double(), *args, activation, interleaved
        )
        grad = torch.randn_like(found)
        errors = {"y": error(found, want)}
        dx = torch.autograd.grad(found, leaf, grad)[0]
        errors["dx"] = error(dx, grad.double() @ dense)
        yield HEADING, verdict(f"int8 Monarch, {activation}", text, dtype, errors, limit)


def pack_case(size: tuple[int, ...], dtype: torch.dtype) -> Found:
    """Masks come back exactly; groups within a level, and right on average."""
    torch.manual_seed(0)
    x = torch.randn(size, device=device()).to(dtype)
    text = "×".join(map(str, size))
    mask = x > 0
    again = pack.unpack_bits(pack.pack_bits(x), size)
    errors = {"bits": float((again != mask).sum()), "shape": float(again.shape != x.shape)}
    own = pack.unpack_bits(pack.pack_bits(mask), size, dtype)
    errors["bits as numbers"] = float((own != mask.to(dtype)).sum())
    yield HEADING, verdict("pack bits", text, dtype, errors, 0.0)
    flat = x.reshape(-1).double()
    groups = F.pad(flat, (0, -len(flat) % pack.GROUP), value=float(flat[-1])).view(-1, pack.GROUP)
    span = (groups.amax(1) - groups.amin(1)).repeat_interleave(pack.GROUP)[: len(flat)]
    for bits in (8, 4):
        level = torch.where(span > 0, span, 1.0) / (2**bits - 1)
        packed = [pack.pack_groups(x, bits) for _ in range(8)]
        back = [pack.unpack_groups(q, size, torch.float32, bits).reshape(-1) for q in packed]
        off = torch.stack([(b.double() - flat) / level for b in back])
        # in levels: a value is rounded up or down; the mean of eight roundings comes near it
        errors = {"levels off": float(off.abs().max()) - 1, "bias": float(off.mean().abs())}
        errors["bytes"] = float(packed[0].numel() != pack.packed_bytes(x.numel(), bits))
        limit = 0.1 if bits == 8 else 0.2  # float16 scales
        yield HEADING, verdict(f"pack groups, {bits} bits", text, dtype, errors, limit)


def residual_case(inputs: int, outputs: int, rows: int, dtype: torch.dtype) -> Found:
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs, device=device(), dtype=torch.float64)
    blocks, index = residual.block_sparse_fit(weight, 2)
    given = {
        "x": torch.randn(rows, inputs, device=device()).to(dtype),
        "blocks": (blocks / 8).to(dtype),
    }

    def run(x: Tensor, blocks: Tensor) -> Tensor:
        return residual.block_sparse_linear(x, blocks, index, outputs)

    def dense(x: Tensor, blocks: Tensor) -> Tensor:
        return x @ residual.block_sparse_dense(blocks, index, outputs, inputs).t()

    text = f"{inputs} → {outputs}, {rows} rows"
    worst = compared(run, dense, given)
    yield HEADING, verdict("block-sparse residual", text, dtype, worst, LIMITS[dtype])


def project_case(inputs: int, outputs: int, nblocks: int, rank: int) -> Found:
    """The projection on this device against the CPU's; the quantized weight bit for bit."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs)
    text = f"{inputs} → {outputs}, N {nblocks}, rank {rank}"
    made = []
    for on in ("cpu", device()):
        right, left, lost = monarch_project(weight.to(on), nblocks, rank)
        assert lost is not None
        dense = monarch.monarch_dense(right, left, outputs, inputs)
        made.append((dense.cpu(), lost))
    halves = [int8.quantize_weight(weight.to(on)) for on in (device(), "cpu")]
    errors = {
        "product": error(made[1][0], made[0][0]),
        "its error": abs(made[1][1] / made[0][1] - 1),
        "int8 weight": error(*(int8.dequantize_weight(q, s).cpu() for q, s in halves)),
    }
    yield HEADING, verdict("Monarch projection, int8 weight", text, torch.float32, errors, 1e-3)


# Rewritten models --------------------------------------------------------------------------------

PASSES: Mapping[str, list[Any]] = {
    "none": [],
    "Monarch": [Monarch(nblocks=4)],
    "MonarchChain": [MonarchChain()],
    "int8": [Quantize("int8-dynamic")],
    "Monarch, int8": [Monarch(nblocks=4), Quantize("int8-dynamic")],
    "Quadratic": [Quadratic()],
    "TopK": [TopK(k=0.25)],
}


class Model(nn.Module):
    """Norm, MLP, residual, head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        y: Tensor = self.head(x)
        return y


def rewritten_case(name: str, compile_too: bool) -> Found:
    """The same rewrite on the card and on the CPU gives the same outputs and gradients."""
    made = []
    for on in ("cpu", device()):
        torch.manual_seed(0)
        model, x = Model(), torch.randn(6, 10, 64)
        done = rewrite(model.to(on), PASSES[name], x.to(on)).eval()
        leaf = x.to(on).requires_grad_()
        y = done(leaf)
        made.append({"y": y.detach().cpu()})
        made[-1]["dx"] = torch.autograd.grad(y.square().sum(), leaf)[0].cpu()
        if made[1:] and compile_too:
            with torch.no_grad():
                made[1]["compiled"] = torch.compile(done)(leaf.detach()).cpu()
            made[0]["compiled"] = made[0]["y"]
    errors = {n: error(found, made[0][n]) for n, found in made[1].items()}
    # of int8, see int8_case
    limit = 1e-2 if "int8" in name else 1e-4
    yield HEADING, verdict("rewrite", name, torch.float32, errors, limit)


# All of them -------------------------------------------------------------------------------------


def cases(quick: bool) -> list[Case]:
    """In an order that puts the kernels first."""
    found: list[tuple[str, Callable[[], Found]]] = []

    def add(name: str, function: Callable[..., Found], *args: Any) -> None:
        label = ", ".join(short(a) if isinstance(a, torch.dtype) else str(a) for a in args)
        found.append((f"{name} {label}", lambda: function(*args)))

    shapes, dtypes = (MONARCH[:4:3], DTYPES[:2]) if quick else (MONARCH, DTYPES)
    for case in reversed(shapes):  # the widest take longest to compile
        for dtype in dtypes:
            for interleaved in (False,) if quick or case[0] > 2000 else (False, True):
                add("Monarch", monarch_case, case, dtype, interleaved)
    for dtype in dtypes:
        add("Monarch, forms", monarch_forms, dtype)
        for order, stars in ((2, 0), (3, 0), (2, 1), (2, 2)):
            add("MonarchChain", chain_case, order, stars, dtype)
        for sizes in ((40, 24, 1), (513, 300, 65), (1024, 4096, 129)[: 0 if quick else 3]):
            if sizes:
                add("Quadratic", quadratic_case, *sizes, dtype)
        for k in (1, 50, 200):
            add("TopK", topk_case, 200, 96, k, 33, dtype)
        for sizes in ((64, 48, 1), (1000, 777, 65)):
            for bias in (True,) if quick else (True, False):
                add("int8 linear", int8_case, *sizes, dtype, bias)
        for case in shapes[:1] if quick else MONARCH[:7]:
            add("int8 Monarch", int8_monarch_case, case, dtype, False)
            add("int8 Monarch", int8_monarch_case, case, dtype, True)
        for size in ((1,), (129,), (3, 5, 77), (512, 1031)[: 1 if quick else 2]):
            add("pack", pack_case, size, dtype)
        add("residual", residual_case, 200, 150, 33, dtype)
    add("projection", project_case, 100, 70, 4, 3)
    if not quick:
        add("projection", project_case, 1024, 1024, 4, 64)
    for name in ("Monarch", "int8") if quick else PASSES:
        add("rewrite", rewritten_case, name, not quick)
    return [Case(name, run, 120) for name, run in found]
