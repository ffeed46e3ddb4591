"""`Work`: what one operation asks of a machine, which is what a `Device` prices.

`work_of` reads it off an operation of PyTorch's dispatcher: its kind (which kernel family runs it)
and the sizes that its speed depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rewriter.errors import StoreError
from rewriter.kernels import ops
from rewriter.modules.typed import fits

__all__ = ["MATRIX", "Work", "dtype_of", "grouped", "kind_of", "on_matrix_unit", "work_of"]

MATRIX = frozenset("matmul conv attention rnn".split())
"""Plain kinds whose arithmetic runs on matrix units where a device has them."""


@dataclass(frozen=True)
class Work:
    """`count` runs of one operation on one set of sizes.

    Args:
        op: qualified name without overload, e.g. "aten::addmm".
        kind: which family of kernels runs it: one of `rewriter.kernels.ops.PLAIN`, or the kind
            of an op's record. "view": a node of the graph that runs none, and takes the host's
            time; its `op` is the node's ("call_module", ...).
        dtype: of the numbers that are multiplied or moved, e.g. "float32".
        flops: of one run.
        bytes_read, bytes_written: of one run.
        weight_bytes: the part of `bytes_read` that is parameters and buffers.
        shape: the sizes that its speed depends on. matmul: (batch, m, n, k) for batch products
            [m, k] @ [k, n]; conv: (batch, out channels, in channels per group, output pixels,
            kernel elements, groups); attention: (batch, heads, queries, keys, head size); of an op
            with a record, its `size_names`; else the shape of the first output.
        count: how often it runs.
        backward: whether it belongs to a backward pass.
    """

    op: str
    kind: str
    dtype: str
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    weight_bytes: int = 0
    shape: tuple[int, ...] = ()
    count: int = 1
    backward: bool = False

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written by one run."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOP per byte."""
        return self.flops / self.bytes_moved if self.bytes_moved else 0.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], number: Callable[[Any], Any]) -> Work:
        """From a table; `number` reads a figure."""
        if not isinstance(data, Mapping) or set(data) - {f.name for f in fields(cls)}:
            raise StoreError("not a Work: unknown fields")
        plain = {"op": str, "kind": str, "dtype": str, "shape": list[Any], "backward": bool}
        if wrong := [k for k, hint in plain.items() if k in data and not fits(data[k], hint)]:
            raise StoreError(f"not a Work: its {wrong[0]} is {str(data[wrong[0]])[:80]!r}")
        values = {k: v if k in plain else number(v) for k, v in data.items()}
        values["shape"] = tuple(number(s) for s in data.get("shape", ()))
        return cls(**values)


def grouped(work: Iterable[Work]) -> tuple[Work, ...]:
    """The same work with equal entries together, in the order of their first run."""
    counts: dict[Work, int] = {}
    for one in work:
        key = replace(one, count=1) if one.count != 1 else one
        counts[key] = counts.get(key, 0) + one.count
    return tuple(replace(w, count=n) if n != 1 else w for w, n in counts.items())


# reading an operation

_NAMED: Mapping[str, str] = {
    name: kind
    for kind, names in {
        "matmul": "mm addmm bmm baddbmm mv dot vdot addmv addbmm _int_mm linear matmul _grouped_mm "
        "_scaled_mm _scaled_grouped_mm _addmm_activation mkldnn_linear _linear_pointwise "
        "_cdist_forward _euclidean_dist _weight_int8pack_mm _weight_int4pack_mm "
        "_weight_int4pack_mm_for_cpu grouped_mm_fallback grouped_mm_fallback_backward "
        "linear_backward mkldnn_linear_backward mkldnn_linear_backward_input "
        "mkldnn_linear_backward_weights _dyn_quant_matmul_4bit _mixed_dtypes_linear",
        "conv": "convolution _convolution mkldnn_convolution convolution_backward "
        "_convolution_pointwise _conv_depthwise2d conv_depthwise3d slow_conv3d_forward "
        "slow_conv_dilated2d slow_conv_dilated3d slow_conv_transpose2d slow_conv_transpose3d "
        "cudnn_convolution miopen_convolution convolution_overrideable _slow_conv2d_backward "
        "cudnn_convolution_relu cudnn_convolution_add_relu cudnn_convolution_transpose",
        "rnn": "mkldnn_rnn_layer mkldnn_rnn_layer_backward _cudnn_rnn _cudnn_rnn_backward "
        "miopen_rnn miopen_rnn_backward _lstm_mps "
        "_thnn_fused_lstm_cell _thnn_fused_gru_cell",
        "fft": "_fft_c2c _fft_r2c _fft_c2r",
        "norm": "native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit "
        "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training "
        "_batch_norm_no_update _batch_norm_with_update _batch_norm_with_update_functional "
        "cudnn_batch_norm _fused_rms_norm native_layer_norm_backward native_group_norm_backward "
        "native_batch_norm_backward _fused_rms_norm_backward batch_norm_backward",
        "softmax": "_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data "
        "_safe_softmax _masked_softmax _masked_softmax_backward",
        "copy": "clone copy copy_ _to_copy cat constant_pad_nd repeat stack roll flip "
        "_reshape_copy _unsafe_view contiguous select_scatter slice_scatter as_strided_scatter "
        "diagonal_scatter select_backward slice_backward repeat_interleave tril triu "
        "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d pixel_shuffle "
        "pixel_unshuffle im2col col2im _foreach_copy_ unfold_backward",
        "gather": "embedding index index_select gather take _unsafe_index _embedding_bag "
        "_embedding_bag_forward_only index_put index_put_ _index_put_impl_ scatter scatter_ "
        "scatter_add scatter_add_ scatter_reduce index_add index_add_ embedding_dense_backward "
        "_unsafe_index_put index_copy index_copy_ _unsafe_masked_index "
        "_unsafe_masked_index_put_accumulate masked_select nonzero",
        "pool": "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d mkldnn_max_pool2d "
        "max_pool2d_with_indices_backward avg_pool2d_backward _adaptive_avg_pool2d_backward "
        "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d grid_sampler_2d "
        "upsample_nearest2d_backward upsample_bilinear2d_backward",
        "sort": "sort topk kthvalue median mode argsort _unique2 unique_dim searchsorted bucketize "
        "multinomial",
        "fill": "full full_like zeros zeros_like ones ones_like new_zeros new_ones new_full arange "
        "fill_ zero_ eye scalar_tensor linspace rand randn rand_like randn_like randint bernoulli_ "
        "uniform_ normal_ fill zero",
        "reduce": "sum mean amax amin max min var var_mean std argmax argmin any all prod norm "
        "linalg_vector_norm cumsum cumprod logsumexp nll_loss_forward nll_loss_backward "
        "nll_loss2d_forward mse_loss native_norm aminmax logcumsumexp",
    }.items()
    for name in names.split()
}


def work_of(
    func: OpOverload,
    args: Any,
    kwargs: Mapping[str, Any],
    read: list[Tensor],
    written: list[Tensor],
    figures: tuple[Any, Any, Any],
    weights: Any,
    number: Callable[[Any], Any],
    backward: bool,
) -> Work:
    """One run of an operation of the dispatcher.

    Args:
        func, args, kwargs: what runs, on what.
        read, written: its tensors.
        figures: FLOPs, bytes read, bytes written.
        weights: the part of the bytes read that is parameters and buffers.
        number: reads a size.
        backward: whether it belongs to a backward pass.
    """
    name, kind, record = func._schema.name, kind_of(func), ops.find(func._schema.name)
    sizes = None if record is None else record.sizes_of(name, args, kwargs)
    if sizes is None:
        sizes = shape_of(kind, name, args, written[0] if written else read[0] if read else None)
    dtype = (record and record.dtype) or dtype_of(read, written)
    shape = tuple(number(s) for s in sizes)
    return Work(name, kind, dtype, *figures, weights, shape, backward=backward)


def kind_of(func: OpOverload) -> str:
    """Of an op with a record, the record's; else by PyTorch's name and tags."""
    record = ops.find(func._schema.name)
    if record is not None:
        return record.kind
    tags = func.tags
    name = func._schema.name
    return plain_kind(name, torch.Tag.pointwise in tags, torch.Tag.reduction in tags)


def on_matrix_unit(kind: str) -> bool:
    """Whether a device runs the arithmetic of this kind on its matrix units, where it has them.

    A kind that nobody knows is of a package that is not imported: it had a record, and multiplies.
    """
    record = ops.of_kind(kind)
    return (
        record.unit == "matrix" if record is not None else kind in MATRIX or kind not in ops.PLAIN
    )


@cache
def plain_kind(name: str, pointwise: bool, reduces: bool) -> str:
    """The kind of the operation `namespace::op`; the flags are PyTorch's tags of it."""
    namespace, _, op = name.partition("::")
    if op in _NAMED or op.removesuffix("_") in _NAMED:
        return _NAMED.get(op) or _NAMED[op.removesuffix("_")]
    if "scaled_dot_product" in op and not op.startswith("_fused_sdp"):
        return "attention"
    if "linear" in op and namespace in {"mkldnn", "onednn", "quantized", "fbgemm"}:
        return "matmul"
    if pointwise or op.endswith("_backward") or op.endswith("_backward_data"):
        return "pointwise"
    return "reduce" if reduces else "other"


def shape_of(kind: str, name: str, args: tuple[Any, ...], out: Tensor | None) -> tuple[Any, ...]:
    """The sizes of `Work.shape`, as torch gives them (ints or SymInts)."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    try:
        if kind in _SHAPES and tensors:
            found = _SHAPES[kind](name.rpartition("::")[2], args, tensors, out)
            if found:
                return found
    except (IndexError, TypeError):  # an unusual overload: its speed goes by flops and bytes alone
        pass
    return () if out is None else tuple(out.shape)


def _rows(x: Tensor) -> Any:
    return math.prod(x.shape[:-1])


def _matmul(op: str, args: Any, tensors: list[Tensor], out: Tensor | None) -> tuple[Any, ...]:
    if op in {"addmm", "baddbmm", "addmv", "addbmm", "_addmm_activation", "addmm_", "baddbmm_"}:
        tensors = tensors[1:]
    a, b = tensors[0], tensors[1]
    if op in {"bmm", "baddbmm", "baddbmm_"}:
        return (a.shape[0], a.shape[1], b.shape[2], a.shape[2])
    if op in {"mm", "addmm", "_int_mm", "_scaled_mm", "addmm_", "_addmm_activation"}:
        return (1, a.shape[0], b.shape[1], a.shape[1])
    if op in {"mv", "addmv"}:
        return (1, a.shape[0], 1, a.shape[1])
    if op in {"dot", "vdot"}:
        return (1, 1, 1, a.shape[0])
    if "grouped_mm" in op and b.dim() == 3:
        return (1, _rows(a), b.shape[-1], a.shape[-1])
    if out is not None and a.dim() and out.dim():
        return (1, _rows(out), out.shape[-1], a.shape[-1])
    return ()


def _conv(op: str, args: Any, tensors: list[Tensor], out: Tensor | None) -> tuple[Any, ...]:
    if "backward" in op:  # grad_output, input, weight
        out, weight = tensors[0], tensors[2]
        groups = args[9] if len(args) > 9 else 1
    else:
        weight = tensors[1]
        groups = next((a for a in reversed(args) if type(a) is int), 1)
    assert out is not None
    transposed = op != "convolution_backward" and len(args) > 6 and args[6] is True
    channels = weight.shape[0] if transposed else weight.shape[1]
    return (
        out.shape[0],
        out.shape[1],
        channels,
        math.prod(out.shape[2:]),
        math.prod(weight.shape[2:]),
        groups,
    )


def _attention(op: str, args: Any, tensors: list[Tensor], out: Tensor | None) -> tuple[Any, ...]:
    q, k = tensors[1:3] if "backward" in op else tensors[:2]
    return (q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])


_SHAPES: Mapping[str, Callable[[str, Any, list[Tensor], Tensor | None], tuple[Any, ...]]] = {
    "matmul": _matmul,
    "conv": _conv,
    "attention": _attention,
}


def dtype_of(read: Iterable[Tensor], written: Iterable[Tensor]) -> str:
    """Of the first float that an operation reads, or writes."""
    tensors = [*read, *written]
    first = next((t for t in tensors if t.is_floating_point()), next(iter(tensors), None))
    return "" if first is None else str(first.dtype).removeprefix("torch.")
