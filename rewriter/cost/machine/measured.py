"""`Measured`: tables of times taken on this machine, and how an op finds its own in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rewriter.cost.machine.roofline import Table, gemms, plain_works, sized
from rewriter.cost.work import Work
from rewriter.kernels import ops

__all__ = ["DISTURBED", "Measured"]

_MODULES = frozenset("matmul conv norm".split())
"""Plain kinds that a rewritten model calls as modules of its tree."""

_SAME_SPEED = {
    **dict.fromkeys(("mm", "mv", "addmv", "linear", "baddbmm", "_addmm_activation"), "addmm"),
    **dict.fromkeys(("sub", "mul", "rsub", "neg", "abs", "maximum", "minimum", "relu"), "add"),
    **dict.fromkeys(("addcmul", "addcdiv", "clamp", "clamp_min", "lerp", "threshold"), "add"),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "logical_and"), "add"),
    **dict.fromkeys(("rsqrt", "sqrt", "reciprocal", "hardswish", "hardsigmoid"), "div"),
    **dict.fromkeys(("softplus", "log", "log1p", "mish", "elu", "expm1"), "silu"),
    **dict.fromkeys(("sin", "cos"), "cos"),
    **dict.fromkeys(("sigmoid",), "silu"),
    **dict.fromkeys(("masked_fill",), "where"),
    **dict.fromkeys(("stack", "copy", "_to_copy", "constant_pad_nd", "slice_scatter"), "cat"),
    **dict.fromkeys(("repeat", "contiguous", "_reshape_copy", "roll", "permute_copy"), "clone"),
    **dict.fromkeys(("_log_softmax", "_safe_softmax"), "_softmax"),
    **dict.fromkeys(("_fused_rms_norm", "native_group_norm"), "native_layer_norm"),
    **dict.fromkeys(
        ("_native_batch_norm_legit_no_training", "_batch_norm_no_update"), "native_batch_norm"
    ),
    **dict.fromkeys(("amax", "amin", "sum", "max", "min", "any", "all", "var", "norm"), "mean"),
    **dict.fromkeys(("avg_pool2d", "_adaptive_avg_pool2d"), "avg_pool2d"),
    **dict.fromkeys(("sort", "kthvalue", "argsort"), "topk"),
    **dict.fromkeys(("index", "index_select", "gather", "take"), "embedding"),
}
_TYPICAL = {
    "matmul": "addmm",
    "pointwise": "add",
    "softmax": "_softmax",
    "norm": "native_layer_norm",
    "reduce": "mean",
    "copy": "cat",
    "gather": "embedding",
    "pool": "max_pool2d_with_indices",
    "sort": "topk",
    "fill": "fill",
}


DISTURBED = 2 * 2**20
"""Bytes of other weights that pass between two uses of one where a table is measured."""


@dataclass(frozen=True)
class Measured:
    """Seconds of whole calls by size, dispatch included.

    Args:
        tables: name → seconds over sizes: "addmm/float32" over (m, n, k), "bmm/float32" over
            (m, n, k) at `batch` products, "attention" over (queries, head size), "conv/3" over (m,
            n, k) of the product it amounts to, "gelu" and the like over bytes moved; "ratio/…" of
            composite layers to the sum of their parts.
        miss: seconds that a byte of weights takes longer than where it lies in the nearest cache,
            over the bytes that pass between two uses of it.
        host: seconds of things that run no kernel: "module" (finding and calling a submodule),
            "view", "op" (the least of an op).
    """

    tables: Mapping[str, Table]
    miss: Table
    host: Mapping[str, float] = field(default_factory=dict)

    def launch(self, work: Work) -> float:
        """The part of an op's time that is there at any size."""
        name = self.table_of(work)
        least = self.host["op"]
        if name is not None:
            table = self.tables[name]
            least = table.at(*(axis[0] for axis in table.axes))
        return least + (self.host["module"] if _is_module(work) else 0.0)

    def seconds(self, work: Work, resident: int) -> float | None:
        """Of one run in a model with `resident` bytes of weights; None where nothing fits it."""
        if work.kind == "view":
            return self.host["module" if work.op == "call_module" else "view"]
        forward = replace(work, backward=False)
        ratio = self.tables.get(f"ratio/{work.kind}")
        found: float | None
        if ratio is not None and len(plain_works(forward)) > 1:
            total = self.composite(forward)
            found = total and total * ratio.at(*_place(work))
        else:
            found = self.warm(work)
        if found is None:
            return None
        if work.backward:
            found *= _times_forward(forward)
        elif _is_module(work):
            found += self.host["module"]
        weights = min(work.weight_bytes, work.bytes_read)
        near = weights + DISTURBED
        further = self.miss.at(max(resident, near)) - self.miss.at(near)
        return found + weights * further  # the table has what a weight of its own size misses

    def composite(self, work: Work) -> float | None:
        """The parts of an op that is made of several, each as fast as it is alone."""
        times = [(piece.count, self.warm(piece)) for piece in plain_works(work)]
        known = [count * time for count, time in times if time is not None]
        return math.fsum(known) if len(known) == len(times) > 1 else None

    def table_of(self, work: Work) -> str | None:
        """The name of the table that times an op like this."""
        op = work.op.rpartition("::")[2].removesuffix("_data").removesuffix("_backward")
        op = op.removesuffix("_")
        if work.kind == "conv":
            name = _conv_family(work.shape) if len(work.shape) == 6 else "conv/other"
        elif work.kind == "attention" or sized(work) is not None:
            name = work.kind
        elif work.kind == "matmul":
            product = gemms(work)
            one = product is None or product[0] == 1 or "grouped_mm" in op
            name = "addmm" if one else "bmm"
            name = f"{name}/{work.dtype}"
            if name not in self.tables:
                name = name.partition("/")[0] + "/float32"
        else:
            name = op if op in self.tables else _SAME_SPEED.get(op, "")
            if name not in self.tables:
                name = _TYPICAL.get(work.kind, "")
        return name if name in self.tables else None

    def warm(self, work: Work) -> float | None:
        """Seconds of one run whose weights lie in the nearest cache."""
        name = self.table_of(work)
        if name is None:
            return None
        table = self.tables[name]
        if sized(work) is not None:
            return table.seconds(*_place(work))
        product = gemms(work)
        if len(table.axes) == 1:
            return table.seconds(max(work.bytes_moved, 1))
        if work.kind == "attention" and len(work.shape) == 5:
            batch, heads, queries, keys, size = work.shape
            return table.seconds(batch * heads, math.sqrt(queries * keys), size)
        if product is None:
            return None
        batch, *sizes = product
        if len(table.axes) == 4:
            return table.seconds(batch, *sizes)
        return table.seconds(*sizes) * batch

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""

        def plain(table: Table) -> dict[str, Any]:
            return {"axes": table.axes, "values": table.values}

        tables = {name: plain(table) for name, table in self.tables.items()}
        return {
            "tables": tables,
            "miss": plain(self.miss),
            "host": dict(self.host),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measured:
        """The inverse of `to_dict`; any of KeyError, TypeError, ValueError where it is not one."""
        tables = {str(name): Table.from_dict(t) for name, t in data["tables"].items()}
        host = {str(name): float(value) for name, value in data["host"].items()}
        if not {"module", "view", "op"} <= set(host) or not all(v > 0 for v in host.values()):
            raise ValueError("host times are missing")
        return cls(tables, Table.from_dict(data["miss"]), host)


def _is_module(work: Work) -> bool:
    """Whether a rewritten model calls it as a module of its tree."""
    return work.kind in _MODULES or ops.of_kind(work.kind) is not None


def _place(work: Work) -> tuple[float, ...]:
    """Where an op with a record lies on the axes of its samples."""
    record = sized(work)
    assert record is not None
    assert record.samples is not None
    return record.samples.place(*work.shape)


def _times_forward(work: Work) -> float:
    """How many times the arithmetic of its forward a backward op has: 2 of a convolution."""
    if work.kind == "attention" and len(work.shape) == 5:
        batch, heads, queries, keys, size = work.shape
        once = 4 * batch * heads * queries * keys * size
    elif work.kind == "conv" and (product := gemms(work)) is not None:
        once = 2 * math.prod(product)
    else:
        pieces = plain_works(work)
        once = sum(p.count * p.flops for p in pieces) if len(pieces) > 1 else 0
    return max(work.flops / once, 1.0) if once and work.flops else 1.0


def _conv_family(shape: tuple[int, ...]) -> str:
    """By what the library tells apart: depthwise, pointwise, 3x3 and others."""
    _, out, channels, _, kernel, groups = shape
    if groups > 1 and channels == 1:
        return "conv/depthwise"
    if kernel >= 64:
        return "conv/patch"
    return "conv/1" if kernel == 1 else "conv/3" if kernel <= 9 else "conv/other"
