"""Which kernels run quantized linear layers on a GPU: Triton's of `product_triton.py`, by tile, or
torch's own products, whichever is the fastest there, measured once per size (`choice.py`).

    int8            triton, int_mm       `torch._int_mm` between our kernels that round and scale
    float8          triton, scaled_mm    `torch._scaled_mm`, scaled by ours; or by rows, in one
    int8 weight     triton, dense        the weight made floats by one kernel, and torch's product
    float8 weight   triton, dense
    int4            triton, dense
    int4 dynamic    triton

A kernel that fails or computes something else on the device is refused with the reason. Where none
is left, `simulated` says why, the op runs its formula in floats, and the user is warned. Nothing
here waits for the device but the first call of a size, which measures; it must have run before a
CUDA graph is captured.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.errors import warn
from rewriter.kernels.choice import device_name, fastest, known, rows_bucket, triton_version
from rewriter.kernels.settings import own_settings

__all__ = [
    "KERNELS",
    "Call",
    "capturing",
    "float8_refusal",
    "formulas",
    "kernel_name",
    "on_device",
    "refused_kernels",
    "run",
    "run_blocks",
    "simulated",
    "takes",
]

KERNELS: Mapping[str, tuple[str, ...]] = {
    "int8": ("triton", "int_mm"),
    "float8": ("triton", "scaled_mm", "scaled_mm by rows"),
    "int8 weight": ("triton", "dense"),
    "float8 weight": ("triton", "dense"),
    "int4": ("triton", "dense"),
    "int4 dynamic": ("triton",),
}
"""By kind of product; a choice is one of them, "triton" with its tile."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_MOST_ROWS = 8192
_MOST_WIDTH = 1 << 16
"""Above it a sum of products of bytes may leave int32."""
_VERSION = "quantized-1"
_LEAD = 0.03
"""By which share of the first candidate's time another must be faster; less may be noise."""


@dataclass(frozen=True)
class Call:
    """One product.

    Args:
        kind: one of `KERNELS`.
        x: [rows, k] floats; nothing of it is empty.
        weight, scale, zero, bias: as of the op, [n, …].
        activation: "per_token" or "per_tensor"; "" where x stays, or has a range that is fixed.
        sums: [n] int32 of the rows of an int8 weight, for kind "int8".
        step, point, multiplier: the fixed range, as of `int8_static_linear`; "per_tensor", step may
            be what `rows_triton.range_of` found of more than x.
        then: an activation that follows, or "".
        add: [rows, n] that is added, or None.
    """

    kind: str
    x: Tensor
    weight: Tensor
    scale: Tensor
    zero: Tensor | None = None
    bias: Tensor | None = None
    activation: str = ""
    sums: Tensor | None = None
    step: Tensor | None = None
    point: Tensor | None = None
    multiplier: Tensor | None = None
    then: str = ""
    add: Tensor | None = None

    @property
    def group(self) -> int:
        """Of 4-bit weights, how many share a scale; 0 of others."""
        if not self.kind.startswith("int4"):
            return 0
        return 2 * self.weight.shape[1] // self.scale.shape[1]


formulas: dict[str, Callable[[Call], Tensor]] = {}
"""What each kind computes, in float64, of a call without `then` and `add`: its op's file enters it.
Probes compare with it."""


def takes(x: Tensor) -> bool:
    """Whether there are kernels for such activations: floats on a GPU."""
    return x.is_cuda and x.dtype in _FLOATS


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured: what is computed now has no values yet."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def run(call: Call) -> Tensor | None:
    """The product and what follows it, [rows, n] in x's dtype; None where no kernel computes it,
    after a warning."""
    call = _ready(call)
    with on_device(call.x.device):
        compute = pick(call)
        if compute is not None:
            return compute(call)
    _say(f"a product of kind {call.kind!r} is computed in floats, {_why(call)}")
    return None


def _why(call: Call) -> str:
    if capturing(call.x):
        return "a CUDA graph is captured before the layer ran at this size: run it once before"
    found = simulated(call.kind, call.x.device, call.x.dtype, call.x.shape[1])
    sizes = f"{call.x.shape[1]} → {call.weight.shape[0]} at {call.x.shape[0]} rows"
    return found or f"simulated, slower: no kernel ran {sizes} (`refused_kernels` says why)"


def run_blocks(
    x: Tensor, weight: Tensor, scale: Tensor, sums: Tensor, activation: str
) -> list[Tensor] | None:
    """x [N, rows, k] × int8 weight [N, n, k] block by block → N × [rows, n]; None as of `run`. With
    one range "per_tensor" it is that of all blocks."""
    step = None
    if activation == "per_tensor" and importlib.util.find_spec("triton") is not None:
        from rewriter.kernels.rows_triton import range_of

        with on_device(x.device):
            step = range_of(x.flatten(0, 1))
    found: list[Tensor] = []
    for a, w, s, total in zip(x, weight, scale, sums, strict=True):
        y = run(Call("int8", a, w, s, activation=activation, sums=total, step=step))
        if y is None:
            return None
        found.append(y)
    return found


@functools.cache
def _say(text: str) -> None:
    """Once per process."""
    warn(text)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _ready(call: Call) -> Call:
    """The same with neighbouring columns in all that the kernels read."""
    changed: dict[str, Any] = {}
    for name in ("weight", "scale", "zero", "bias", "multiplier"):
        tensor = getattr(call, name)
        if tensor is not None and not tensor.is_contiguous():
            changed[name] = tensor.contiguous()
    for name in ("x", "add"):
        tensor = getattr(call, name)
        if tensor is not None and tensor.stride(1) != 1:
            changed[name] = tensor.contiguous()
    return replace(call, **changed) if changed else call


# Candidates --------------------------------------------------------------------------------------


class Size(NamedTuple):
    """What a choice depends on."""

    kind: str
    rows: int
    out: int
    width: int
    group: int
    dtype: torch.dtype
    activation: str
    has_zero: bool
    ends: bool
    device: torch.device

    @classmethod
    def of(cls, call: Call) -> Size:
        x, (out, _) = call.x, call.weight.shape
        ends = not call.then and call.add is None
        own = call.group, x.dtype, call.activation, call.zero is not None, ends, x.device
        return cls(call.kind, x.shape[0], out, x.shape[1], *own)

    @property
    def key(self) -> str:
        tf32 = torch.backends.cuda.matmul.allow_tf32 and self.dtype == torch.float32
        text = " ".join(map(str, self[:-1]))
        return f"{text}{' tf32' if tf32 else ''} {device_name(self.device.index or 0)}"


Compute = Callable[[Call], Tensor]


@functools.lru_cache(4096)
def candidates(size: Size) -> Mapping[str, Compute]:
    """All that may compute such a call, by name, the likeliest first; whether it runs on the device
    is not said."""
    found: dict[str, Compute] = {}
    if size.rows == 1 and "dense" in KERNELS[size.kind]:
        found["triton vector"] = _vector
    for tile in _tiles(size):
        found[f"triton {tile}"] = functools.partial(_product, tile=tile)
    eighths = size.out % 8 == size.width % 8 == 0
    if size.kind == "int8" and size.rows > 16 and eighths:
        found["int_mm"] = _int_mm
    if size.kind == "float8" and size.out % 16 == size.width % 16 == 0:
        found["scaled_mm"] = _scaled_mm
        if size.dtype == torch.bfloat16 and size.ends:
            found["scaled_mm by rows"] = _scaled_mm_by_rows
    if "dense" in KERNELS[size.kind]:
        found["dense"] = _dense
    return found


def _tiles(size: Size) -> Iterable[Any]:
    from rewriter.kernels.product_triton import tiles

    whole = size.kind in ("int8", "float8", "int4 dynamic")
    item = 1 if whole else size.dtype.itemsize
    own = size.rows, size.out, size.width, item, size.group
    return tiles(size.kind, *own, *_room(size.device))


@functools.cache
def _room(device: torch.device) -> tuple[int, int, bool, bool]:
    """What `tiles` is to know of a device: units, shared, wide and apart."""
    from rewriter.kernels.product_triton import SHARED

    if device.type != "cuda":  # Triton's interpreter
        return 1, SHARED, False, False
    own = torch.cuda.get_device_properties(device)
    major = own.major if torch.version.hip is None else 0
    shared = getattr(own, "shared_memory_per_block_optin", SHARED)
    return own.multi_processor_count, shared, major in (9, 10), major == 10


def _levels(call: Call) -> tuple[Tensor, Tensor]:
    from rewriter.kernels import rows_triton

    own = call.step, call.point, call.multiplier
    return rows_triton.levels_of_rows(call.x, call.activation, *own)


def _float8(call: Call) -> tuple[Tensor, Tensor]:
    from rewriter.kernels import rows_triton

    q, steps = rows_triton.float8_of_rows(call.x, call.activation)
    return q.view(torch.float8_e4m3fn), steps


def _behind(call: Call, steps: Tensor | None, grouped: bool = False) -> Any:
    from rewriter.kernels.product_triton import E4M3, Behind

    factor = E4M3 if call.kind == "float8 weight" else 1.0
    scale = None if grouped else call.scale
    sums = call.sums if call.kind == "int8" else None
    return Behind(scale, steps, sums, call.bias, call.then, call.add, factor)


def _product(call: Call, tile: Any) -> Tensor:
    from rewriter.kernels import product_triton as products
    from rewriter.kernels import rows_triton

    dtype, weight = call.x.dtype, call.weight
    if call.group:
        a, steps = call.x, None
        if call.kind == "int4 dynamic":
            a, steps = rows_triton.groups_of_rows(call.x, call.group)
        behind = _behind(call, None, grouped=True)
        return products.grouped(a, steps, weight, call.scale, call.zero, behind, dtype, tile)
    a, steps = call.x, None
    if call.kind == "int8":
        a, steps = _levels(call)
    elif call.kind == "float8":
        a, steps = _float8(call)
        weight = weight.view(torch.float8_e4m3fn)
    return products.product(call.kind, a, weight, _behind(call, steps), dtype, tile)


def _vector(call: Call) -> Tensor:
    from rewriter.kernels import product_triton as products

    behind = _behind(call, None)
    own = call.weight, call.scale, call.zero
    return products.vector(call.kind, call.x, *own, behind, call.x.dtype)


def _finished(call: Call, sums: Tensor, steps: Tensor) -> Tensor:
    from rewriter.kernels import product_triton as products

    return products.finish(sums, _behind(call, steps), call.x.new_empty(sums.shape))


def _int_mm(call: Call) -> Tensor:
    a, steps = _levels(call)
    return _finished(call, torch._int_mm(a, call.weight.t()), steps)


def _scaled_mm(call: Call) -> Tensor:
    a, steps = _float8(call)
    one = torch.ones((), device=a.device)
    weight = call.weight.view(torch.float8_e4m3fn).t()
    found = torch._scaled_mm(a, weight, one, one, out_dtype=torch.float32)
    return _finished(call, found, steps)


def _scaled_mm_by_rows(call: Call) -> Tensor:
    a, steps = _float8(call)
    bias = None if call.bias is None else call.bias.to(torch.bfloat16)
    weight, scale = call.weight.view(torch.float8_e4m3fn).t(), call.scale.to(torch.float32)
    found: Tensor = torch._scaled_mm(
        a, weight, steps.view(-1, 1), scale.view(1, -1), bias, out_dtype=torch.bfloat16
    )
    return found


def _dense(call: Call) -> Tensor:
    from rewriter.kernels import product_triton as products
    from rewriter.kernels.linear_act import act_

    x, width = call.x, call.x.shape[1]
    own = call.weight, call.scale, call.zero
    weight = products.dense(call.kind, *own, width, x.dtype)
    y = F.linear(x, weight, None if call.bias is None else call.bias.to(x.dtype))
    y = act_(y, call.then) if call.then else y
    return y if call.add is None else y.add_(call.add)


# Choice ------------------------------------------------------------------------------------------


def pick(call: Call) -> Compute | None:
    """The fastest candidate for such a call on its device; None where there is none.

    Measured the first time that a size is asked for, with rows rounded up to a power of two (at
    most 8192); remembered per name of device and for later processes. While a CUDA graph is
    captured only what is known counts.
    """
    size = Size.of(call)
    size = size._replace(rows=rows_bucket(size.rows, _MOST_ROWS))
    own = candidates(size)
    first = next(iter(own.values()))
    if not call.x.is_cuda:  # Triton's interpreter: nothing to measure
        return first
    name = known(size.key, _version())
    if name is None and not capturing(call.x):
        name = _measured(size, call)
    if name is None or name == _NONE:
        return None
    return own.get(name, first)  # of a file that others may write


def _measured(size: Size, call: Call) -> str | None:
    if simulated(size.kind, size.device, size.dtype, size.width) is not None:
        return None
    x = call.x.new_ones(size.rows, size.width)
    add = None if call.add is None else call.add.new_zeros(size.rows, size.out)
    given = replace(call, x=x, add=add)

    def timed() -> dict[str, Callable[[], object]]:
        found: dict[str, Callable[[], object]] = {
            name: functools.partial(compute, given)
            for name, compute in candidates(size).items()
            if _runs(name, compute, given)
        }
        return found or {_NONE: lambda: None}

    try:
        return fastest(size.key, _version(), timed, _LEAD, size.device)
    except torch.OutOfMemoryError:  # no room to measure: asked again at the next call
        return next(iter(candidates(size)))


_NONE = "none of them"
"""A choice of sizes at which no candidate runs."""
_failed: dict[tuple[str, str], str] = {}
"""Why a candidate is not used at some size: (kind and name, device) → reason."""


def _runs(name: str, compute: Compute, call: Call) -> bool:
    """Whether a candidate is to be measured: its kernel passed its probe, and runs at this size."""
    device = call.x.device
    if _refusal(call.kind, _base(name), call.x.dtype, device) is not None:
        return False
    try:
        compute(call)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _failed[f"{call.kind}, {name}", device_name(device.index or 0)] = _first_line(error)
        return False
    return True


@functools.cache
def _version() -> str:
    return f"{_VERSION} {triton_version()} {torch.__version__}"


# Probes ------------------------------------------------------------------------------------------


def refused_kernels(kind: str, device: torch.device | None = None) -> dict[str, str | None]:
    """Why kernels of a kind are not used on a device, this machine's first GPU by default; None
    where one is: {"cuda name": reason}. What failed at single sizes stands beside."""
    names = KERNELS[kind]
    if device is None and not torch.cuda.is_available():
        return {f"cuda {name}": "not available: there is no GPU here" for name in names}
    device = device or torch.device("cuda", 0)
    found = {f"cuda {n}": refused_by(kind, n, torch.bfloat16, device) for n in names}
    own = device_name(device.index or 0)
    single = {f"cuda {what}": why for (what, where), why in _failed.items() if where == own}
    return found | {n: why for n, why in single.items() if n.startswith(f"cuda {kind},")}


def refused_by(kind: str, name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why one kernel is not used on a GPU."""
    if kind == "float8" and (why := float8_refusal(device)) is not None:
        return why
    if importlib.util.find_spec("triton") is None:
        return "not available: Triton is not installed"
    return _refusal(kind, name, dtype, torch.device("cuda", device.index or 0))


def simulated(
    kind: str, device: torch.device, dtype: torch.dtype = torch.float32, width: int = 0
) -> str | None:
    """Why a product runs as a formula in floats on a device, for the report: "simulated, slower:
    …"; None where a kernel runs it."""
    if device.type in ("cpu", "meta"):
        return None
    why: str | None
    if device.type != "cuda":
        why = f"there is no kernel for {device.type}"
    elif not torch.cuda.is_available():
        why = "there is no GPU here"
    elif dtype not in _FLOATS:
        why = f"no kernel takes {str(dtype).removeprefix('torch.')}"
    elif width > _MOST_WIDTH and kind == "int8":
        why = f"sums over {width} features may leave int32"
    else:
        found = [refused_by(kind, n, dtype, device) for n in KERNELS[kind]]
        why = None if None in found else found[0]
    return None if why is None else f"simulated, slower: {why}"


def float8_refusal(device: torch.device) -> str | None:
    """Why a GPU multiplies no float8 by float8; names its architecture."""
    if torch.version.hip is not None:
        name = str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
        return no_float8("hip", name)
    major, minor = torch.cuda.get_device_capability(device)
    return no_float8("cuda", 10 * major + minor)


def no_float8(backend: str, arch: int | str) -> str | None:
    """Why an architecture multiplies no float8_e4m3fn, as Triton names it; None where it does."""
    if backend == "cuda":
        assert isinstance(arch, int)
        return None if arch >= 89 else f"sm_{arch} multiplies no float8, sm_89 and later do"
    if str(arch).startswith(("gfx950", "gfx12")):
        return None
    if str(arch).startswith("gfx94"):
        return f"{arch} multiplies float8 of another kind (e4m3fnuz), gfx950 does e4m3fn"
    return f"{arch} multiplies no float8"


@functools.cache
def _refusal(kind: str, name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Runs one kernel on widths that do not divide and on few rows, against the formula."""
    tested = False
    with own_settings(), on_device(device):
        for rows in (1, 33):
            for activation in ("per_token", "per_tensor") if kind in ("int8", "float8") else ("",):
                call = _sample(kind, rows, activation, dtype, device)
                own = [c for n, c in candidates(Size.of(call)).items() if _base(n) == name]
                try:
                    found = [compute(call) for compute in own[:2]]
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                except Exception as error:  # not built in, or not for this device: the reason says
                    return f"not available: {_first_line(error)}"
                want = formulas[kind](call)
                for got in found:
                    tested = True
                    worst = float((got.double() - want).abs().max() / want.abs().max())
                    if not worst <= _LIMITS[dtype]:
                        return f"wrong by {worst:.2g} of the largest value at {rows} rows"
    return None if tested else f"it takes no {str(dtype).removeprefix('torch.')}"


def _base(name: str) -> str:
    return "triton" if name.startswith("triton") else name


def _sample(
    kind: str, rows: int, activation: str, dtype: torch.dtype, device: torch.device
) -> Call:
    """Operands whose levels do not hang on how x/s is rounded, and whose sums need all of int32's
    bits that they can."""
    out, width, group = 48, 160, 64
    x = torch.full((rows, width), 255.0, dtype=dtype, device=device)
    x[:, ::7] = 0.0
    x[rows // 2, 1::2] = 100.0
    scale = torch.linspace(0.5, 2.0, out, device=device) / (127 * width)
    bias = torch.linspace(-1, 1, out, device=device).to(dtype)
    levels = torch.arange(out * width, device=device).view(out, width)
    call = Call(kind, x, levels, scale, bias=bias, activation=activation)
    if kind in ("int8", "int8 weight"):
        weight = (levels % 256 - 128).to(torch.int8)
        return replace(call, weight=weight, sums=weight.sum(1, dtype=torch.int32))
    if kind in ("float8", "float8 weight"):
        return replace(call, weight=(levels % 127 + levels % 2 * 128).to(torch.uint8))
    groups = -(-width // group)
    weight = (torch.arange(out * groups * group // 2, device=device) % 256).to(torch.uint8)
    scales = scale[:, None].expand(out, groups).to(torch.bfloat16).contiguous()
    return replace(call, weight=weight.view(out, -1), scale=scales, zero=scales.flip(0) * 3)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def kernel_name(kind: str, device: torch.device, dtype: torch.dtype, width: int = 0) -> str:
    """What runs such a product on a device that is no CPU, for the report; measured when it first
    runs at a size."""
    if why := simulated(kind, device, dtype, width):
        return f"torch, {why}"
    return " or ".join(n for n in KERNELS[kind] if refused_by(kind, n, dtype, device) is None)
