"""Which product runs over rows of a GPU with few active entries: Triton's of `sparse_triton.py`, by
tile, or a dense one over x with zeros in it, whichever is the faster there (`choice.py`).

The host does not know how much is active, and does not wait to learn it. It decides by the share
that is expected, of `TopK` k/width and of `Threshold` what its calibration found; where more is
active the sparse product is as right, and slower. The largest share that pays is measured the first
time that a size is asked for, and kept; while a CUDA graph is captured what was measured before in
this process counts, and else the dense product runs.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels.choice import (
    device_name,
    fastest,
    paying_share,
    rows_bucket,
    triton_version,
)
from rewriter.kernels.quantized_gpu import on_device
from rewriter.kernels.settings import own_settings
from rewriter.kernels.sparse_active import MOST_ROWS, active_reference
from rewriter.kernels.sparse_cpu import Select
from rewriter.kernels.weight_only import int8_weight_linear

__all__ = [
    "Choice",
    "GatedSize",
    "Size",
    "choice",
    "fits",
    "gated",
    "masked",
    "product",
    "refusal",
    "takes",
    "union",
]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_VERSION = "sparse gpu 1"
_LEAD = 0.03
"""By which share of the first tile's time another must be faster; less may be noise."""
_TUNED = 0.25
"""The active share at which tiles are compared."""


class Choice(NamedTuple):
    """The largest share of the weight's rows, of 1, up to which the sparse product is the faster,
    and its tile; 0 where it never is."""

    most: float
    tile: Any = None


def takes(x: Tensor) -> bool:
    """Whether there are kernels for such an x: floats on a GPU."""
    return x.is_cuda and x.dtype in _FLOATS


def fits(x: Tensor, select: Select) -> bool:
    """Whether they select so: by blocks that a program holds and that divide a row."""
    from rewriter.kernels.sparse_triton import MOST_BLOCK

    return bool(x.numel()) and select.block <= MOST_BLOCK and x.shape[-1] % select.block == 0


def product(
    x: Tensor,
    columns: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    select: Select,
    tile: Any,
) -> Tensor:
    """x_S @ columns (·scale) + bias, [*, out] in x's dtype; arguments as of `sparse.multiplied`,
    columns [in, out] contiguous."""
    from rewriter.kernels import sparse_triton

    steps, behind = (None if t is None else t.detach().contiguous() for t in (scale, bias))
    with on_device(x.device):
        y = sparse_triton.product(_rows(x), columns, steps, behind, _ready(select), tile)
    return y.view(*x.shape[:-1], columns.shape[1])


def gated(
    x: Tensor,
    a: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    bias: Tensor | None,
    select: Select,
    tile: Any,
) -> Tensor:
    """(a_S ∘ (x upᵀ + up_bias)) down + bias, [*, out] in x's dtype, down [hidden, out] contiguous;
    arguments as of `sparse_gated`."""
    from rewriter.kernels import sparse_triton

    before, behind = (None if t is None else t.detach().contiguous() for t in (up_bias, bias))
    own = _rows(x), _rows(a), up.detach().contiguous(), before, down, behind
    with on_device(x.device):
        y = sparse_triton.gated(*own, _ready(select), tile)
    return y.view(*x.shape[:-1], down.shape[1])


def union(share: float, rows: int) -> float:
    """What is active in at least one of several rows, where each chooses by itself: rows that
    choose alike have less."""
    return 1 - (1 - share) ** rows


def masked(x: Tensor, select: Select) -> Tensor | None:
    """x [*, width] with zeros where it is not active; None where no kernel does it."""
    if refusal(x.device, x.dtype) is not None or not fits(x, select):
        return None
    from rewriter.kernels import sparse_triton

    with on_device(x.device):
        return sparse_triton.masked(_rows(x), _ready(select)).view(x.shape)


def _rows(x: Tensor) -> Tensor:
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _ready(select: Select) -> Select:
    if select.importance is None:
        return select
    return select._replace(importance=select.importance.detach().float().contiguous())


# Sizes -------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """What a choice of `product` depends on: rows and dtype of x, sizes and dtype of the weight."""

    rows: int
    out: int
    width: int
    weight: torch.dtype
    dtype: torch.dtype
    device: torch.device

    def fits(self) -> bool:
        return self.out * self.width > 0 and self.weight in (self.dtype, torch.int8)

    def tiles(self, units: int) -> list[Any]:
        from rewriter.kernels.sparse_triton import tiles

        return tiles(self.rows, self.out, self.weight.itemsize, units)

    def operands(self) -> Operands:
        weight = torch.ones(self.out, self.width, dtype=self.weight, device=self.device)
        of_levels = self.weight == torch.int8
        scale = torch.ones(self.out, device=self.device) if of_levels else None
        x = _spread(self.rows, self.width, self.dtype, self.device)
        return _Linear(x, weight, weight.t().contiguous(), scale)


class GatedSize(NamedTuple):
    """What a choice of `gated` depends on."""

    rows: int
    out: int
    hidden: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def fits(self) -> bool:
        return self.out * self.hidden * self.width > 0

    def tiles(self, units: int) -> list[Any]:
        from rewriter.kernels.sparse_triton import tiles

        return tiles(self.rows, self.out, self.dtype.itemsize, units)

    def operands(self) -> Operands:
        own: Any = {"dtype": self.dtype, "device": self.device}
        down = torch.ones(self.out, self.hidden, **own)
        a = _spread(self.rows, self.hidden, self.dtype, self.device)
        x, up = torch.ones(self.rows, self.width, **own), torch.ones(self.hidden, self.width, **own)
        return _Gated(x, a, up, down, down.t().contiguous())


class Operands(Protocol):
    """Data to time both products on."""

    def dense(self, share: float) -> Tensor: ...

    def sparse(self, share: float, tile: Any) -> Tensor: ...


class _Linear(NamedTuple):
    x: Tensor
    weight: Tensor
    columns: Tensor
    scale: Tensor | None

    def sparse(self, share: float, tile: Any) -> Tensor:
        return product(self.x, self.columns, self.scale, None, _upper(self.x, share), tile)

    def dense(self, share: float) -> Tensor:
        x = _masked(self.x, share)
        if self.scale is None:
            return F.linear(x, self.weight)
        return int8_weight_linear(x, self.weight, self.scale)


class _Gated(NamedTuple):
    x: Tensor
    a: Tensor
    up: Tensor
    down: Tensor
    columns: Tensor

    def sparse(self, share: float, tile: Any) -> Tensor:
        own = self.x, self.a, self.up, None, self.columns, None
        return gated(*own, _upper(self.a, share), tile)

    def dense(self, share: float) -> Tensor:
        return F.linear(_masked(self.a, share) * F.linear(self.x, self.up), self.down)


def _spread(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers between 0 and 1, those above any threshold scattered over the row. All rows are
    alike, so that their union is what one of them has."""
    x = (torch.arange(width, device=device, dtype=torch.float64) * 0.6180339887498949) % 1.0
    return x.expand(rows, width).to(dtype).contiguous()


def _upper(x: Tensor, share: float) -> Select:
    """By threshold: what finds the k-th entry is a kernel that the dense product needs as well."""
    return Select(threshold=torch.full((1,), 1.0 - share, device=x.device))


def _masked(x: Tensor, share: float) -> Tensor:
    found = masked(x, _upper(x, share))
    assert found is not None
    return found


# Choice ------------------------------------------------------------------------------------------


_chosen: dict[str, Choice] = {}


def choice(size: Size | GatedSize) -> Choice:
    """What is chosen at a size, with rows rounded up to a power of two; measured where it is not
    known yet."""
    if not 0 < size.rows <= MOST_ROWS or not size.fits():
        return Choice(0.0)
    size = size._replace(rows=rows_bucket(size.rows))
    tf32 = torch.backends.cuda.matmul.allow_tf32 and size.dtype == torch.float32
    key = f"{type(size).__name__} {' '.join(map(str, size[:-1]))}{' tf32' if tf32 else ''}"
    found = _chosen.get(f"{key} {size.device}")
    if found is None:
        if refusal(size.device, size.dtype) is not None or _captures(size.device):
            return Choice(0.0)
        try:
            found = _chosen[f"{key} {size.device}"] = _measured(size, f"sparse {key}")
        except torch.OutOfMemoryError:  # no room to measure: asked again at the next call
            return Choice(0.0)
    return found


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _measured(size: Size | GatedSize, key: str) -> Choice:
    device, cuda = size.device, size.device.type == "cuda"
    units = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
    own = size.tiles(units)
    if not cuda:  # Triton's interpreter: nothing to measure
        return Choice(1.0, own[0])
    made = functools.cache(size.operands)

    def timed() -> dict[str, Callable[[], object]]:
        calls = {str(t): functools.partial(made().sparse, _TUNED, t) for t in own}
        return {n: call for n, call in calls.items() if _runs(call)} or {"": lambda: None}

    name = device_name(device.index or 0)
    best = fastest(f"{key} tile {name}", _version(), timed, _LEAD, device)
    tile = next((t for t in own if str(t) == best), None)
    if tile is None:
        return Choice(0.0)

    def pair(share: float) -> dict[str, Callable[[], object]]:
        return {
            "dense": lambda: made().dense(share),
            "sparse": lambda: made().sparse(share, tile),
        }

    return Choice(paying_share(key, _version(), pair, name, device), tile)


@functools.cache
def _version() -> str:
    return f"{_VERSION} {triton_version()} {torch.__version__}"


def _runs(call: Callable[[], object]) -> bool:
    """Whether a tile fits into the device's registers and shared memory."""
    try:
        call()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # what a compiler refuses: others are left, or the dense product
        return False
    return True


# Probe -------------------------------------------------------------------------------------------


_probed: dict[tuple[torch.device, torch.dtype], str | None] = {}


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels are not used for an x of such a dtype on a GPU; runs them against the formula
    the first time, and never while a CUDA graph is captured."""
    if dtype not in _FLOATS:
        return f"no kernel takes {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no GPU here"
    if (device, dtype) not in _probed:
        if _captures(device):
            return "a CUDA graph is captured before the layer ran"
        with own_settings(), on_device(device):
            _probed[device, dtype] = _probe(device, dtype)
    return _probed[device, dtype]


def _probe(device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        for rows, out, width, block in ((1, 40, 70, 1), (3, 33, 96, 8)):
            x = torch.linspace(-3, 5, rows * width, device=device).cos_().to(dtype)
            x = x.view(rows, width)
            x[:, ::9] = 0.5  # ties
            weights = torch.linspace(0, 2, width, device=device)
            half = torch.full((1,), 0.5, device=device)
            for select in (
                Select(width // 16 * 8, block=block),
                Select(16, importance=weights, block=block),
                Select(threshold=half, block=block),
            ):
                if (reason := _unlike(x, out, select)) is not None:
                    return reason
    except Exception as error:  # not built in, or not for this device: the reason says
        lines = str(error).strip().splitlines() or [""]
        return f"not available: {type(error).__name__}: {lines[0][:200]}"
    return None


def _unlike(x: Tensor, out: int, select: Select) -> str | None:
    """What is wrong with selection and products of a sample."""
    from rewriter.kernels import sparse_triton

    width = x.shape[1]
    want = x.where(active_reference(x, select), 0.0)
    if not torch.equal(sparse_triton.masked(x, select), want):
        return "a kernel selects something else on this device"
    levels = torch.arange(width * out, device=x.device).view(width, out) % 255 - 127
    scale = torch.linspace(0.5, 2, out, device=x.device) / 127
    for columns, steps in ((levels.to(x.dtype), None), (levels.to(torch.int8), scale)):
        y = sparse_triton.product(x, columns, steps, None, select, sparse_triton.Tile(32, 16, 4, 2))
        right = want.double() @ levels.double() * (1.0 if steps is None else steps.double())
        worst = float((y.double() - right).abs().max() / right.abs().max())
        if not worst <= _LIMITS[x.dtype]:
            return f"a product is wrong by {worst:.2g} of the largest value on this device"
    return None
