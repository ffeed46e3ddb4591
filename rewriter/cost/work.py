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

__all__ = ["KINDS", "Work", "dtype_of", "grouped", "work_of"]

KINDS = (
    "matmul conv attention rnn fft norm softmax pointwise reduce copy gather pool sort fill "
    "int8_linear int8_monarch monarch quadratic topk view other"
).split()


@dataclass(frozen=True)
class Work:
    """`count` runs of one operation on one set of sizes.

    Args:
        op: qualified name without overload, e.g. "aten::addmm".
        kind: which family of kernels runs it; one of `KINDS`. "view": a node of the graph that runs
            none, and takes the host's time; its `op` is the node's ("call_module", ...).
        dtype: of the numbers that are multiplied or moved, e.g. "float32".
        flops: of one run.
        bytes_read, bytes_written: of one run.
        weight_bytes: the part of `bytes_read` that is parameters and buffers.
        shape: the sizes that its speed depends on. matmul: (batch, m, n, k) for batch products
            [m, k] @ [k, n]; conv: (batch, out channels, in channels per group, output pixels,
            kernel elements, groups); attention: (batch, heads, queries, keys, head size);
            int8_linear and quadratic: (rows, out, in); monarch and int8_monarch: (rows, out, in,
            input blocks, output blocks, rank, interleaved); topk: (rows, out, in, k); else the
            shape of the first output.
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
        plain = {"op", "kind", "dtype", "shape"}
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
_OURS = {
    "int8_linear": "int8_linear",
    "int8_monarch_linear": "int8_monarch",
    "monarch_linear": "monarch",
    "monarch_linear_train": "monarch",
    "monarch_linear_backward": "monarch",
    "quadratic_linear": "quadratic",
    "quadratic_linear_backward": "quadratic",
    "topk_linear": "topk",
    "topk_linear_train": "topk",
    "topk_linear_backward": "topk",
}


def work_of(
    func: OpOverload,
    args: Any,
    read: list[Tensor],
    written: list[Tensor],
    figures: tuple[Any, Any, Any],
    weights: Any,
    number: Callable[[Any], Any],
    backward: bool,
) -> Work:
    """One run of an operation of the dispatcher.

    Args:
        func, args: what runs, on what.
        read, written: its tensors.
        figures: FLOPs, bytes read, bytes written.
        weights: the part of the bytes read that is parameters and buffers.
        number: reads a size.
        backward: whether it belongs to a backward pass.
    """
    name = func._schema.name
    kind = kind_of(name, torch.Tag.pointwise in func.tags, torch.Tag.reduction in func.tags)
    first = written[0] if written else read[0] if read else None
    shape = tuple(number(s) for s in shape_of(kind, name, args, first, figures[0]))
    dtype = dtype_of(kind, read, written)
    return Work(name, kind, dtype, *figures, weights, shape, backward=backward)


@cache
def kind_of(name: str, pointwise: bool, reduces: bool) -> str:
    """The kind of the operation `namespace::op`; the flags are PyTorch's tags of it."""
    namespace, _, op = name.partition("::")
    if namespace == "rewriter":
        return _OURS.get(op, "other")
    if op in _NAMED or op.removesuffix("_") in _NAMED:
        return _NAMED.get(op) or _NAMED[op.removesuffix("_")]
    if "scaled_dot_product" in op and not op.startswith("_fused_sdp"):
        return "attention"
    if "linear" in op and namespace in {"mkldnn", "onednn", "quantized", "fbgemm"}:
        return "matmul"
    if pointwise or op.endswith("_backward") or op.endswith("_backward_data"):
        return "pointwise"
    return "reduce" if reduces else "other"


def shape_of(
    kind: str, name: str, args: tuple[Any, ...], out: Tensor | None, flops: Any
) -> tuple[Any, ...]:
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


def _plain_linear(op: str, args: Any, tensors: list[Tensor], out: Tensor | None) -> tuple[Any, ...]:
    x, weight = tensors[1:3] if "backward" in op else tensors[:2]
    return (_rows(x), weight.shape[0], x.shape[-1])


def _monarch(op: str, args: Any, tensors: list[Tensor], out: Tensor | None) -> tuple[Any, ...]:
    if "backward" in op:  # grad, x, mid, right, left
        grad, x, right, left = tensors[0], tensors[1], tensors[3], tensors[4]
        width = grad.shape[-1]
    else:
        x, right, left = tensors[0], tensors[1], tensors[3 if "int8" in op else 2]
        assert out is not None
        width = out.shape[-1]
    k, l = right.shape[0], left.shape[0]
    at = 8 if "int8" in op else 5
    interleaved = len(args) > at and args[at] is True
    return (_rows(x), width, x.shape[-1], k, l, right.shape[1] // l, int(interleaved))


def _topk(op: str, args: Any, tensors: list[Tensor], out: Tensor | None) -> tuple[Any, ...]:
    if "backward" in op:  # grad, values, indices, weight
        grad, indices, weight = tensors[0], tensors[-2], tensors[-1]
        return (_rows(grad), *weight.shape, indices.shape[-1])
    x, weight = tensors[:2]
    return (_rows(x), *weight.shape, next(a for a in args if isinstance(a, int)))


_SHAPES: Mapping[str, Callable[[str, Any, list[Tensor], Tensor | None], tuple[Any, ...]]] = {
    "matmul": _matmul,
    "conv": _conv,
    "attention": _attention,
    "int8_linear": _plain_linear,
    "quadratic": _plain_linear,
    "monarch": _monarch,
    "int8_monarch": _monarch,
    "topk": _topk,
}


def dtype_of(kind: str, read: Iterable[Tensor], written: Iterable[Tensor]) -> str:
    """Of the numbers multiplied: "int8" for our int8 layers; else of the first float it reads."""
    if kind.startswith("int8"):
        return "int8"
    tensors = [*read, *written]
    first = next((t for t in tensors if t.is_floating_point()), next(iter(tensors), None))
    return "" if first is None else str(first.dtype).removeprefix("torch.")
