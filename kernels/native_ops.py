"""The compiled kernels as ops of compiled programs, which call them without Python.

    native_int8(x, layer, add, out)                   one product and what follows it
    native_int8_two(x, first, second, add, mid, out)  two products in a row
    native_int8_attention(x, layer, mask, …)          attention behind one product for q, k and v
    native_attention(q, k, v, mask, causal, scale, bf16)    softmax(q kᵀ·scale + mask) v
    native_int8_weight_linear(x, qweight, scale, bias)      of `weight_only`, as all with weights of
    native_int4_linear(x, packed, scale, zero, bias)        few bits: a layer's own tensors, as they
    native_int4_dynamic_linear(x, packed, scale, zero, bias)    are stored
    native_weight_linears(x, four operands of each of two weights or three, kind)    their products
                                                      with one x, side by side
    native_sparse_linear(x, columns, …)               of `sparse_linear` and `sparse_int4`, of any
    native_sparse_int4_linear(x, packed, …)           share of active inputs

A layer of the int8 ops is one tensor of bytes: `rewriter.kernels.int8_cpu.Linear.layer` makes it of
packed weights and all that goes with them. It holds on the CPU that it was made on, and says so
elsewhere.

C++ is found in two ways, and made when either is first asked for. torch's dispatcher finds what
`load` registers; code that Inductor generates in C++ calls the functions that `SHIMS` declares,
which are linked into it from `archive`: it needs nothing of this package when it runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewriter.kernels import native, ops

__all__ = [
    "INT8",
    "KINDS",
    "SPARSE",
    "SPARSE_INT4",
    "TOGETHER",
    "WEIGHT_ONLY",
    "InGraph",
    "archive",
    "int8",
    "int8_two",
    "load",
    "refusal",
    "weight_only",
]

_SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp")
    for name in ("int8_cpu", "attention_cpu", "weight_only_cpu", "sparse_cpu", "shims")
)

_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define("native_int8(Tensor x, Tensor layer, Tensor? add, int out) -> Tensor")
_LIB.define(
    "native_int8_two(Tensor x, Tensor first, Tensor second, Tensor? add, int mid, int out) "
    "-> Tensor"
)
_LIB.define(
    "native_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, int causal, float scale, "
    "int bf16) -> Tensor"
)
_LIB.define(
    "native_int8_attention(Tensor x, Tensor layer, Tensor? mask, int heads, int shared, int depth, "
    "int causal, float scale, int bf16) -> Tensor"
)
_LIB.define(
    "native_int4_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias) "
    "-> Tensor"
)
_LIB.define(
    "native_int4_dynamic_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias) "
    "-> Tensor"
)
_LIB.define(
    "native_int8_weight_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? bias) -> Tensor"
)
_LIB.define(
    "native_weight_linears(Tensor x, Tensor w1, Tensor s1, Tensor? z1, Tensor? b1, "
    "Tensor w2, Tensor s2, Tensor? z2, Tensor? b2, "
    "Tensor? w3, Tensor? s3, Tensor? z3, Tensor? b3, int kind) -> Tensor"
)
_LIB.define(
    "native_sparse_linear(Tensor x, Tensor columns, Tensor? scale, Tensor? bias, "
    "Tensor? threshold, Tensor? importance, int k, int block) -> Tensor"
)
_LIB.define(
    "native_sparse_int4_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, "
    "Tensor? threshold, Tensor? importance, int k, int block, int group_size) -> Tensor"
)
KINDS = ("native_int8_weight_linear", "native_int4_linear", "native_int4_dynamic_linear")
"""Ops of which `native_weight_linears` makes products with one x, in the order of its kinds."""


class InGraph(NamedTuple):
    """What a compiler traces at a place, in place of what runs there.

    Args:
        tensors: that it reads beside its inputs, made of weights.
        call: (tensors, *inputs) → the result, in torch's operations alone.
        borrowed: whether the tensors are a layer's own, not made of them: nobody writes to them.
    """

    tensors: tuple[Tensor, ...]
    call: Callable[..., Any]
    borrowed: bool = False


@functools.cache
def archive() -> Path:
    """The kernels' objects, for compiled code to be linked with.

    Raises:
        Unavailable: they cannot be compiled here.
    """
    include = Path(torch.__file__).parent / "include"
    flags = "-DSHIM", f"-DTORCH_{torch.__version__}".replace("+", "_").replace(".", "_")
    return native.archive("rewriter_ops", _SOURCES, *flags, f"-I{include}")


@functools.cache
def load() -> None:
    """Registers the kernels with torch's dispatcher.

    Raises:
        Unavailable: they cannot be compiled here.
    """
    folder = Path(torch.__file__).parent / "lib"
    _loaded.append(native.shared(archive(), f"-L{folder}", "-ltorch_cpu"))


_loaded: list[Any] = []


@functools.cache
def refusal() -> str | None:
    """Why compiled programs cannot call the kernels on this machine; None where they can."""
    return native.why_not(load)


# Calls -------------------------------------------------------------------------------------------


def int8(layer: Sequence[Tensor], x: Tensor, add: Tensor | None, out: int) -> Tensor:
    """norm(then(product of x and the layer) + add), as it stands in a graph.

    Args:
        layer: the one tensor that `Linear.layer` gives.
        x: [*, in] float32.
        add: [*, out] float32, or None.
    """
    y: Tensor = torch.ops.rewriter.native_int8.default(
        x.contiguous(), layer[0], None if add is None else add.contiguous(), out
    )
    return y


def int8_two(layers: Sequence[Tensor], x: Tensor, add: Tensor | None, mid: int, out: int) -> Tensor:
    """`int8` of two layers in a row; `mid` values of a row lie between them."""
    y: Tensor = torch.ops.rewriter.native_int8_two.default(
        x.contiguous(), *layers, None if add is None else add.contiguous(), mid, out
    )
    return y


def weight_only(
    op: str, x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None
) -> Tensor:
    """An op of `rewriter.kernels.weight_only`, as it stands in a graph.

    Args:
        op: its name.
        x: [*, in] float32.
        weight, scale, zero, bias: as of that op, contiguous; scale and zero float32, of 4 bits also
            bfloat16, bias float32.
    """
    x = x.contiguous()
    if op == "int8_weight_linear":
        y: Tensor = torch.ops.rewriter.native_int8_weight_linear.default(x, weight, scale, bias)
    elif op == "int4_linear":
        y = torch.ops.rewriter.native_int4_linear.default(x, weight, scale, zero, bias)
    else:
        y = torch.ops.rewriter.native_int4_dynamic_linear.default(x, weight, scale, zero, bias)
    return y


# Registration ------------------------------------------------------------------------------------


def _late(name: str) -> Callable[..., Tensor]:
    """Runs an op whose kernel is not registered yet."""

    def run(*args: Any) -> Tensor:
        if not args[0].is_cpu:
            raise RuntimeError(f"rewriter::{name} runs on a CPU alone, not on {args[0].device}")
        try:
            load()
        except native.Unavailable as error:
            raise RuntimeError(
                f"rewriter::{name} runs in a compiled kernel alone, which cannot be had here: "
                f"{error}. Export the model with standalone=True"
            ) from error
        y: Tensor = getattr(torch.ops.rewriter, name).default(*args)
        return y

    return run


def _fake_int8(x: Tensor, layer: Tensor, add: Tensor | None, out: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


def _fake_two(
    x: Tensor, first: Tensor, second: Tensor, add: Tensor | None, mid: int, out: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: int, scale: float, bf16: int
) -> Tensor:
    b, h, rows, depth = q.shape
    return q.new_empty_strided((b, h, rows, depth), (rows * h * depth, depth, h * depth, 1))


def _fake_int8_attention(
    x: Tensor, layer: Tensor, mask: Tensor | None, heads: int, shared: int, depth: int, *_: Any
) -> Tensor:
    return x.new_empty(*x.shape[:-1], heads * depth)


def _fake_weight_only(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_weights(x: Tensor, w1: Tensor, *more: Any) -> Tensor:
    there = [w for w in (w1, more[3], more[7]) if w is not None]
    return x.new_empty(*x.shape[:-1], sum(w.shape[0] for w in there))


def _fake_sparse(x: Tensor, columns: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns.shape[1])


def _fake_sparse4(x: Tensor, packed: Tensor, scale: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[1])


_FAKES: dict[str, Callable[..., Tensor]] = {
    "native_int8": _fake_int8,
    "native_int8_two": _fake_two,
    "native_attention": _fake_attention,
    "native_int8_attention": _fake_int8_attention,
    "native_int8_weight_linear": _fake_weight_only,
    "native_int4_linear": _fake_weight_only,
    "native_int4_dynamic_linear": _fake_weight_only,
    "native_weight_linears": _fake_weights,
    "native_sparse_linear": _fake_sparse,
    "native_sparse_int4_linear": _fake_sparse4,
}
for _name, _fake in _FAKES.items():
    _LIB.impl(_name, _late(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"rewriter::{_name}", _fake, lib=_LIB)

# Records -----------------------------------------------------------------------------------------

_ARGUMENTS = {
    "native_int8": "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, int64_t",
    "native_int8_two": "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, "
    "int64_t, int64_t",
    "native_int8_attention": "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, int64_t, "
    "int64_t, int64_t, int64_t, double, int64_t",
    "native_attention": "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, "
    "int64_t, double, int64_t",
    "native_int8_weight_linear": "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, "
    "AtenTensorHandle*",
    **dict.fromkeys(
        ("native_int4_linear", "native_int4_dynamic_linear"),
        "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, "
        "AtenTensorHandle*",
    ),
    "native_weight_linears": ", ".join(
        [
            "AtenTensorHandle",
            *2 * ("AtenTensorHandle, AtenTensorHandle", "AtenTensorHandle*, AtenTensorHandle*"),
        ]
        + ["AtenTensorHandle*"] * 4
        + ["int64_t"]
    ),
    "native_sparse_linear": ", ".join(
        ["AtenTensorHandle"] * 2 + ["AtenTensorHandle*"] * 4 + ["int64_t"] * 2
    ),
    "native_sparse_int4_linear": ", ".join(
        ["AtenTensorHandle"] * 3 + ["AtenTensorHandle*"] * 4 + ["int64_t"] * 3
    ),
}


def _shim(name: str) -> ops.Shim:
    function = f"aoti_torch_cpu_{name}"
    return ops.Shim(f"AOTITorchError {function}({_ARGUMENTS[name]}, AtenTensorHandle*)", archive)


def _sizes(x: Tensor, layer: Tensor, add: Any, out: int) -> tuple[Any, ...]:
    return math.prod(x.shape[:-1]), out, x.shape[-1]


def _flops(x: torch.Size, layer: Any, add: Any, out: int, **_: Any) -> int:
    return 2 * math.prod(x) * out


def _two_sizes(
    x: Tensor, first: Tensor, second: Tensor, add: Any, mid: int, out: int
) -> tuple[Any, ...]:
    """As one product of the same weights."""
    return math.prod(x.shape[:-1]), mid, x.shape[-1] + out


def _two_flops(
    x: torch.Size, first: Any, second: Any, add: Any, mid: int, out: int, **_: Any
) -> int:
    return 2 * math.prod(x[:-1]) * mid * (x[-1] + out)


def _attended_sizes(
    x: Tensor, layer: Tensor, mask: Any, heads: int, shared: int, depth: int, *_: Any
) -> tuple[Any, ...]:
    return math.prod(x.shape[:-1]), (heads + 2 * shared) * depth, x.shape[-1]


def _attended_flops(
    x: torch.Size, layer: Any, mask: Any, heads: int, shared: int, depth: int, *_: Any, **__: Any
) -> int:
    scores = 4 * x[0] * heads * x[1] * x[1] * depth
    return 2 * math.prod(x) * (heads + 2 * shared) * depth + scores


INT8 = (
    ops.Companion("rewriter::native_int8", _sizes, _flops, shim=_shim("native_int8")),
    ops.Companion(
        "rewriter::native_int8_two", _two_sizes, _two_flops, shim=_shim("native_int8_two")
    ),
    ops.Companion(
        "rewriter::native_int8_attention",
        _attended_sizes,
        _attended_flops,
        shim=_shim("native_int8_attention"),
    ),
)
"""Companions of `rewriter::int8_linear`."""

WEIGHT_ONLY = {
    name.removeprefix("native_"): ops.Companion(f"rewriter::{name}", shim=_shim(name))
    for name in KINDS
}
"""Of each op of `rewriter.kernels.weight_only` its companion, which takes the same arguments."""


def _together_sizes(x: Tensor, *given: Any) -> tuple[Any, ...]:
    out = sum(w.shape[0] for w in given[:-1:4] if w is not None)
    return math.prod(x.shape[:-1]), out, x.shape[-1]


def _together_flops(x: torch.Size, *given: Any, **_: Any) -> int:
    outs: list[int] = [w[0] for w in given[:-1:4] if w is not None]
    return 2 * math.prod(x) * sum(outs)


TOGETHER = ops.Companion(
    "rewriter::native_weight_linears",
    _together_sizes,
    _together_flops,
    shim=_shim("native_weight_linears"),
)
"""The companion of them all, priced as the first: so many products of one x in one call."""


def _sparse_flops(x: torch.Size, columns: torch.Size, *_: Any, **__: Any) -> int:
    """An upper bound: of what is active nobody knows before."""
    return 2 * math.prod(x) * columns[1]


SPARSE = ops.Companion(
    "rewriter::native_sparse_linear", flops=_sparse_flops, shim=_shim("native_sparse_linear")
)
"""The companion of `rewriter::sparse_linear`, of a weight by columns."""

SPARSE_INT4 = ops.Companion(
    "rewriter::native_sparse_int4_linear", shim=_shim("native_sparse_int4_linear")
)
"""That of `rewriter::sparse_int4_linear`, which takes the same arguments, without a share."""


def _attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: int, scale: float, bf16: int
) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=bool(causal), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _attention_flops(
    q: torch.Size, k: torch.Size, v: torch.Size, mask: Any, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(q) * k[2] * 2


ops.register(
    ops.Record(
        "rewriter::native_attention",
        kind="attention",
        reference=_attention_reference,
        flops=_attention_flops,
        shim=_shim("native_attention"),
    )
)
