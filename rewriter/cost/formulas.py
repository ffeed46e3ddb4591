"""Which aten ops cost what: FLOP formulas beyond torch's, and the ops that cost only bytes.

`torch.utils.flop_counter` is asked first, so our FLOPs equal `FlopCounterMode` wherever that
counts. This file adds what it leaves at 0 (attention on the CPU, matrix-vector products, int8 and
recurrent kernels, FFT), and lists the ops that have no FLOPs by its convention. An op that is in
neither has no known cost, which is an error line in the ledger.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

__all__ = ["Traffic", "flop_formula", "is_free", "placed", "traffic", "unread"]

Formula = Callable[..., int]
"""(*args, **kwargs, out_val=out) of the op → FLOPs."""


class Traffic(enum.Enum):
    """Which bytes of its tensors an op touches."""

    ALL = "all"  # every input is read, every output written
    WRITE = "write"  # the mutated input is overwritten unread: copy_, fill_
    GATHER = "gather"  # of the first input only as many bytes as come out
    SCATTER = "scatter"  # of the mutated input only as many bytes as go in
    PLACE = "place"  # the result is written whole, then again where the values go
    NONE = "none"  # allocation only


def _matmul(a: Tensor, b: Tensor) -> int:
    """2·(batch·M)·K·N for a [..., M, K] and b [..., K, N] (b may be a vector [K])."""
    return 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


def _mm(a: Tensor, b: Tensor, *_: object, out_val: object, **__: object) -> int:
    return _matmul(a, b)


def _add_mm(_bias: Tensor, a: Tensor, b: Tensor, *_: object, out_val: object, **__: object) -> int:
    return _matmul(a, b)


def _linear(x: Tensor, *_: object, out_val: Tensor, **__: object) -> int:
    """2·rows·in·out for x [..., in] → [..., out], however the weight is packed."""
    return 2 * out_val.numel() * x.shape[-1]


def _grouped_mm(a: Tensor, b: Tensor, *_: object, out_val: Tensor, **__: object) -> int:
    """2·S·K·N, S the rows of all groups: each row meets the matrix of its group alone.

    The groups cut the rows of a [S, K] (b [G, K, N]), the columns of b [K, S] (a [G, N, K]), or
    what is summed over (a [K, S], b [S, N]); a and b of three dimensions are a batch.
    """
    if a.dim() == 3 and b.dim() == 2:
        return 2 * b.numel() * a.shape[-2]
    return 2 * a.numel() * b.shape[-1]


def _conv(x: Tensor, weight: Tensor, *_: object, out_val: Tensor, **__: object) -> int:
    """2·|out|·(in/groups)·Πkernel; weight [out, in/groups, *kernel]."""
    return 2 * out_val.numel() * weight[0].numel()


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: object, out_val: object, **__: object) -> int:
    """2·B·H·S·T·(D + Dᵥ): QKᵀ and PV, for q [B, H, S, D], k [B, Hₖ, T, D], v [B, Hₖ, T, Dᵥ].
    A causal mask saves nothing, as in `FlopCounterMode`."""
    rows = q.numel() // q.shape[-1] if q.shape[-1] else 0
    return 2 * rows * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object, out_val: object, **__: object
) -> int:
    """2·B·H·S·T·(3·D + 2·Dᵥ): five products, as `FlopCounterMode` counts it for the kernels of
    GPUs. The probabilities P are not saved, so QKᵀ runs again (D); then dP = dO·Vᵀ (Dᵥ),
    dV = Pᵀ·dO (Dᵥ), and of dS = P∘(dP - Σ dP∘P): dQ = dS·K (D), dK = dSᵀ·Q (D)."""
    rows = q.numel() // q.shape[-1] if q.shape[-1] else 0
    return 2 * rows * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


def _mha(
    q: Tensor, k: Tensor, v: Tensor, embed: int, heads: int, *_: object, out_val: object, **__: Any
) -> int:
    """Projections 2·(S·E·E + 2·T·E·E + S·E·E)·B and attention 4·B·S·T·E."""
    batch, target, source = q.shape[0], q.shape[1], k.shape[1]
    return 2 * batch * embed * (2 * (target + source) * embed + 2 * target * source)


def _encoder_layer(
    src: Tensor,
    embed: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    *_: object,
    out_val: object,
    **__: object,
) -> int:
    rows = src.shape[0] * src.shape[1]
    feed_forward = 4 * rows * embed * ffn_weight_1.shape[0]
    return _mha(src, src, src, embed, heads, out_val=out_val) + feed_forward


def _conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Any,
    *_: object,
    out_val: object,
    **__: object,
) -> int:
    """2·|dY|·(in/groups)·Πkernel for each of dX and dW that is asked for (transposed: 2·|X|·…).
    `FlopCounterMode` leaves `groups` out of dW: of a depthwise one it counts 65 times the forward
    where there are 64 channels."""
    side = x if transposed else grad
    return 2 * side.numel() * weight[0].numel() * (bool(mask[0]) + bool(mask[1]))


def _outer_conv_transpose(
    x: Tensor, weight: Tensor, *_: object, out_val: Tensor, **__: object
) -> int:
    """2·|in|·(out/groups)·Πkernel; weight [in, out/groups, *kernel]."""
    return 2 * x.numel() * weight[0].numel()


def _rnn_layer(x: Tensor, w_in: Tensor, w_hidden: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    """2·T·B·(|W_in| + |W_hidden|), one direction of one layer; x [T, B, in]."""
    return 2 * x.shape[0] * x.shape[1] * (w_in.numel() + w_hidden.numel())


def _rnn_weights(x: Tensor, weights: list[Tensor], *_: Any, out_val: Any, **__: Any) -> int:
    """2·T·B·Σ|W| over the weight matrices of all layers; x [T, B, in]."""
    return 2 * x.shape[0] * x.shape[1] * sum(w.numel() for w in weights if w.dim() == 2)


def _rnn_layer_backward(
    x: Tensor, w_in: Tensor, w_hidden: Tensor, *_: Any, out_val: Any, **__: Any
) -> int:
    """4·T·B·(|W_in| + |W_hidden|), twice the forward: from the gradient dG of the gates
    [T, B, gates], dX = dG·W_in and dH = dG·W_hidden, and dW_in = dGᵀ·X, dW_hidden = dGᵀ·H."""
    return 2 * _rnn_layer(x, w_in, w_hidden, out_val=out_val)


def _rnn_weights_backward(
    x: Tensor, weights: list[Tensor], *_: Any, out_val: Any, **__: Any
) -> int:
    """4·T·B·Σ|W|, twice the forward, as in `_rnn_layer_backward`."""
    return 2 * _rnn_weights(x, weights, out_val=out_val)


def _linear_backward(
    x: Tensor, grad: Tensor, weight: Tensor, mask: Any, *_: object, out_val: object, **__: object
) -> int:
    """2·rows·in·out for each of dX = dY·W and dW = dYᵀ·X that is asked for."""
    return 2 * grad.numel() * weight.shape[1] * (bool(mask[0]) + bool(mask[1]))


def _linear_backward_input(
    _size: Any, grad: Tensor, weight: Tensor, *_: object, out_val: object, **__: object
) -> int:
    return 2 * grad.numel() * weight.shape[1]


def _linear_backward_weight(
    grad: Tensor, x: Tensor, weight: Tensor, *_: object, out_val: object, **__: object
) -> int:
    return 2 * grad.numel() * weight.shape[1]


def _grouped_mm_backward(
    x: Tensor, weight: Tensor, offs: Tensor, grad: Tensor, *_: object, out_val: object, **__: object
) -> int:
    """4·S·in·out: dX = dY·Wᵀ and dW = Xᵀ·dY, each row with the matrix of its group;
    x [S, in], dY [S, out]."""
    return 4 * x.numel() * grad.shape[-1]


def _conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: object, **given: Any
) -> int:
    """2·|dY|·in·Πkernel for each of dX and dW; weight [out, in, *kernel]."""
    mask = given.get("output_mask", rest[3] if len(rest) > 3 else (True, True))
    return 2 * grad.numel() * weight[0].numel() * (bool(mask[0]) + bool(mask[1]))


def _trilinear(
    a: Tensor, b: Tensor, c: Tensor, e1: Any, e2: Any, e3: Any, s: Any, *_: Any, out_val: Any
) -> int:
    """2 multiplications per term of the broadcast product (nn.Bilinear)."""
    sizes: dict[int, int] = {}
    for tensor, expand in ((a, e1), (b, e2), (c, e3)):
        shape = list(tensor.shape)
        for dim in sorted(expand):
            shape.insert(dim, 1)
        for i, size in enumerate(shape):
            sizes[i] = max(sizes.get(i, 1), size)
    return 2 * math.prod(sizes.values())


def _cdist(a: Tensor, b: Tensor, *_: object, out_val: object, **__: object) -> int:
    return 2 * a.numel() * b.shape[-2]


def _cdist_backward(
    grad: Tensor, a: Tensor, b: Tensor, *_: object, out_val: object, **__: object
) -> int:
    """2·B·P·R·D: da = Σ over R of (a - b)·coefficient, a [B, P, D], b [B, R, D]."""
    return 2 * a.numel() * b.shape[-2]


def _fft(factor: float) -> Formula:
    """factor·N·log₂n, N elements of the larger side, n the transformed length (5 complex,
    2.5 with a real side): the customary count of a split-radix-free FFT."""

    def formula(x: Tensor, dim: Any, *_: object, out_val: Tensor, **__: object) -> int:
        big = x if x.numel() >= out_val.numel() else out_val
        n = math.prod(big.shape[d] for d in ([dim] if isinstance(dim, int) else dim))
        return round(factor * big.numel() * math.log2(n)) if n > 1 else 0

    return formula


_RIGHT: Mapping[str, Formula] = {"aten::convolution_backward": _conv_backward}
"""Where `FlopCounterMode` counts wrong."""

_NO_MACS = frozenset({"aten::_fft_c2c", "aten::_fft_r2c", "aten::_fft_c2r"})

_EXTRA: Mapping[str, Formula] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::_scaled_dot_product_attention_math_for_mps": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "aten::_native_multi_head_attention": _mha,
    "aten::_transformer_encoder_layer_fwd": _encoder_layer,
    "aten::mv": _mm,
    "aten::dot": _mm,
    "aten::vdot": _mm,
    "aten::_int_mm": _mm,
    "aten::addmv": _add_mm,
    "aten::addmv_": _add_mm,
    "aten::addmm_": _add_mm,
    "aten::baddbmm_": _add_mm,
    "aten::addbmm": _add_mm,
    "aten::addbmm_": _add_mm,
    "aten::_addmm_activation": _add_mm,
    "aten::_weight_int8pack_mm": _linear,
    "aten::_weight_int4pack_mm": _linear,
    "aten::_weight_int4pack_mm_for_cpu": _linear,
    "aten::_dyn_quant_matmul_4bit": _linear,
    "aten::_mixed_dtypes_linear": _linear,
    "aten::mkldnn_linear": _linear,
    "aten::_grouped_mm": _grouped_mm,
    "aten::_scaled_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
    "transformers::grouped_mm_fallback_backward": _grouped_mm_backward,
    "aten::linear_backward": _linear_backward,
    "aten::mkldnn_linear_backward": _linear_backward,
    "aten::mkldnn_linear_backward_input": _linear_backward_input,
    "aten::mkldnn_linear_backward_weights": _linear_backward_weight,
    "aten::_trilinear": _trilinear,
    "aten::_cdist_forward": _cdist,
    "aten::_cdist_backward": _cdist_backward,
    "aten::_euclidean_dist": _cdist,
    "aten::mkldnn_convolution": _conv,
    "aten::cudnn_convolution_relu": _conv,
    "aten::cudnn_convolution_add_relu": _conv,
    "aten::_conv_depthwise2d": _conv,
    "aten::conv_depthwise3d": _conv,
    "aten::slow_conv3d_forward": _conv,
    "aten::slow_conv_dilated2d": _conv,
    "aten::slow_conv_dilated3d": _conv,
    "aten::slow_conv_transpose2d": _outer_conv_transpose,
    "aten::slow_conv_transpose3d": _outer_conv_transpose,
    "aten::cudnn_convolution_transpose": _outer_conv_transpose,
    "aten::_slow_conv2d_backward": _conv2d_backward,
    "aten::mkldnn_rnn_layer": _rnn_layer,
    "aten::mkldnn_rnn_layer_backward": _rnn_layer_backward,
    "aten::_cudnn_rnn": _rnn_weights,
    "aten::_cudnn_rnn_backward": _rnn_weights_backward,
    "aten::miopen_rnn": _rnn_weights,
    "aten::miopen_rnn_backward": _rnn_weights_backward,
    "aten::_lstm_mps": _rnn_weights,
    "mkldnn::_linear_pointwise": _linear,
    "mkldnn::_convolution_pointwise": _conv,
    "onednn::qlinear_pointwise": _linear,
    "onednn::qlinear_dynamic": _linear,
    "quantized::linear": _linear,
    "quantized::linear_dynamic": _linear,
    "quantized::linear_relu_dynamic": _linear,
    "fbgemm::linear_dynamic": _linear,
    "aten::_fft_c2c": _fft(5.0),
    "aten::_fft_r2c": _fft(2.5),
    "aten::_fft_c2r": _fft(2.5),
}

# Ops without FLOPs that carry no tag (`pointwise`, `reduction`, `view_copy`) saying so, by name;
# a trailing underscore (the in-place form) is stripped before the look-up.
_FORWARD_BYTES_ONLY = frozenset(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d _add_relu
    addr affine_grid_generator allclose _aminmax arange as_strided_scatter _assert_async
    avg_pool2d avg_pool3d bartlett_window batch_norm_elemt batch_norm_gather_stats
    _batch_norm_no_update batch_norm_stats batch_norm_update_stats _batch_norm_with_update
    _batch_norm_with_update_functional bernoulli binary_cross_entropy
    binary_cross_entropy_with_logits bincount binomial blackman_window block_diag bucketize cat
    cauchy channel_shuffle _chunk_cat clone col2im complex constant_pad_nd
    _convert_indices_from_coo_to_csr _convert_indices_from_csr_to_coo copy _copy_from
    _copy_from_and_resize _ctc_loss cudnn_affine_grid_generator cudnn_batch_norm _cudnn_ctc_loss
    cudnn_grid_sampler cummax _cummax_helper cummin _cummin_helper cumprod cumsum dequantize
    diag_embed diagonal_scatter dist embedding _embedding_bag _embedding_bag_forward_only
    embedding_renorm equal exponential eye _fake_quantize_learnable_per_channel_affine
    _fake_quantize_learnable_per_tensor_affine fake_quantize_per_channel_affine_cachemask
    fake_quantize_per_tensor_affine_cachemask
    _fake_quantize_per_tensor_affine_cachemask_tensor_qparams fft_fftfreq fft_rfftfreq fill flip
    floor_divide fractional_max_pool2d fractional_max_pool3d full full_like
    _functional_assert_async _functional_assert_scalar _fused_dropout
    _fused_moving_avg_obs_fq_helper _fused_rms_norm _fused_sdp_choice gather geometric glu
    grid_sampler_2d grid_sampler_3d hamming_window hann_window hardswish histc histogram
    huber_loss im2col index index_add index_copy index_fill index_put _index_put_impl
    index_reduce index_select int_repr _is_all_true _is_any_true isin
    _jagged_to_padded_dense_forward kaiser_window kthvalue _lazy_clone lift lift_fresh
    lift_fresh_copy linalg_cross linspace _local_scalar_dense log_normal log_sigmoid_forward
    _log_softmax _logcumsumexp logcumsumexp logspace _make_dep_token masked_fill _masked_scale
    masked_scatter masked_select _masked_softmax max_pool2d_with_indices max_pool3d_with_indices
    max_unpool2d max_unpool3d median miopen_batch_norm mkldnn_adaptive_avg_pool2d
    mkldnn_max_pool2d mkldnn_max_pool3d mkldnn_reorder_conv2d_weight
    mkldnn_reorder_conv3d_weight _mkldnn_reshape _mkldnn_transpose mode mse_loss
    multi_margin_loss multilabel_margin_loss_forward multinomial nanmedian native_batch_norm
    _native_batch_norm_legit _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training native_channel_shuffle native_dropout native_group_norm
    native_layer_norm native_norm _nested_tensor_softmax_with_shape new_full new_ones new_zeros
    _new_zeros_with_same_feature_meta nll_loss2d_forward nll_loss_forward nonzero nonzero_static
    normal normal_functional ones ones_like _pack_padded_sequence
    _padded_dense_to_jagged_forward _pdist_forward _pin_memory pixel_shuffle pixel_unshuffle
    poisson polar _prelu_kernel _print put quantize_per_channel quantize_per_tensor
    quantize_per_tensor_dynamic quantized_batch_norm quantized_max_pool1d quantized_max_pool2d
    rand rand_like randint randint_like randn randn_like random randperm range reflection_pad1d
    reflection_pad2d reflection_pad3d renorm repeat repeat_interleave replication_pad1d
    replication_pad2d replication_pad3d _reshape_copy _resize_output roll rot90 rrelu_with_noise
    rrelu_with_noise_functional rsub _safe_softmax scalar_tensor scatter scatter_add
    scatter_reduce searchsorted segment_reduce select_scatter slice_scatter smooth_l1_loss
    soft_margin_loss _softmax sort split_with_sizes_copy _stack stack _standard_gamma take
    _thnn_fused_gru_cell _thnn_fused_lstm_cell _to_copy _to_dense to_mkldnn to_padded_tensor
    _to_sparse topk trace _transform_bias_rescale_qkv tril tril_indices triu triu_indices
    uniform _unique _unique2 unique_consecutive unique_dim unique_dim_consecutive _unsafe_index
    _unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate unsafe_split
    unsafe_split_with_sizes _unsafe_view upsample_bicubic2d _upsample_bicubic2d_aa
    upsample_bilinear2d _upsample_bilinear2d_aa _upsample_lanczos2d_aa upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_trilinear3d
    _weight_norm_interface zero zeros zeros_like
    """.split()
)

# The same of backwards: what of these is no reduction or movement is arithmetic per element.
_BYTES_ONLY = _FORWARD_BYTES_ONLY | frozenset(
    """
    _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward adaptive_avg_pool3d_backward
    adaptive_max_pool2d_backward adaptive_max_pool3d_backward avg_pool2d_backward
    avg_pool3d_backward batch_norm_backward batch_norm_backward_elemt batch_norm_backward_reduce
    binary_cross_entropy_backward _ctc_loss_backward cudnn_affine_grid_generator_backward
    cudnn_batch_norm_backward cudnn_grid_sampler_backward diagonal_backward elu_backward
    _embedding_bag_backward _embedding_bag_dense_backward
    _embedding_bag_per_sample_weights_backward embedding_dense_backward
    _fake_quantize_learnable_per_channel_affine_backward
    _fake_quantize_learnable_per_tensor_affine_backward fractional_max_pool2d_backward
    fractional_max_pool3d_backward _fused_rms_norm_backward gelu_backward glu_backward
    grid_sampler_2d_backward _grid_sampler_2d_cpu_fallback_backward grid_sampler_3d_backward
    hardshrink_backward hardsigmoid_backward hardswish_backward hardtanh_backward
    huber_loss_backward leaky_relu_backward _log_softmax_backward_data log_sigmoid_backward
    masked_scatter_backward _masked_softmax_backward max_pool2d_with_indices_backward
    max_pool3d_with_indices_backward miopen_batch_norm_backward
    mkldnn_adaptive_avg_pool2d_backward mkldnn_max_pool2d_backward mkldnn_max_pool3d_backward
    mse_loss_backward multi_margin_loss_backward multilabel_margin_loss_backward
    native_batch_norm_backward native_dropout_backward native_group_norm_backward
    native_layer_norm_backward nll_loss2d_backward nll_loss_backward _pdist_backward
    _prelu_kernel_backward reflection_pad1d_backward reflection_pad2d_backward
    reflection_pad3d_backward replication_pad1d_backward replication_pad2d_backward
    replication_pad3d_backward rrelu_with_noise_backward _segment_reduce_backward
    select_backward slice_backward smooth_l1_loss_backward soft_margin_loss_backward
    _softmax_backward_data softplus_backward softshrink_backward _thnn_fused_gru_cell_backward
    _thnn_fused_lstm_cell_backward_impl threshold_backward unfold_backward
    _upsample_bicubic2d_aa_backward upsample_bicubic2d_backward _upsample_bilinear2d_aa_backward
    upsample_bilinear2d_backward _upsample_lanczos2d_aa_backward upsample_linear1d_backward
    upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward
    _upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward
    _upsample_nearest_exact3d_backward upsample_trilinear3d_backward
    _weight_norm_interface_backward
    """.split()
)

_ALLOCATE = frozenset(
    """
    empty empty_like empty_strided empty_permuted empty_quantized new_empty new_empty_strided
    _efficientzerotensor record_stream
    """.split()
)
_OVERWRITE = frozenset(
    """
    copy_ fill_ zero_ normal_ uniform_ bernoulli_ exponential_ random_ geometric_ cauchy_
    log_normal_ _philox_normal_ _philox_uniform_
    """.split()
)
_GATHER = frozenset(
    """
    embedding index index_select gather take _unsafe_index _embedding_bag
    _embedding_bag_forward_only
    """.split()
)
_SCATTER = frozenset(
    """
    index_put_ _index_put_impl_ scatter_ scatter_add_ scatter_reduce_ index_add_ index_copy_
    index_fill_ index_reduce_ put_ masked_scatter_
    """.split()
)
_PLACE = frozenset(
    """
    index_put _unsafe_index_put scatter scatter_add scatter_reduce index_add index_copy index_fill
    index_reduce put masked_scatter select_scatter slice_scatter diagonal_scatter
    as_strided_scatter select_backward slice_backward diagonal_backward unfold_backward
    embedding_dense_backward max_pool2d_with_indices_backward max_pool3d_with_indices_backward
    adaptive_max_pool2d_backward adaptive_max_pool3d_backward
    _unsafe_masked_index_put_accumulate
    """.split()
)
# Which argument holds the values that are placed; the first where it is not named here.
_VALUES: Mapping[str, int] = {
    "index_put": 2, "_index_put_impl": 2, "_unsafe_index_put": 2, "put": 2, "masked_scatter": 2,
    "scatter": 3, "scatter_add": 3, "scatter_reduce": 3, "index_add": 3, "index_copy": 3,
    "index_reduce": 3, "index_fill": 3, "select_scatter": 1, "slice_scatter": 1,
    "diagonal_scatter": 1, "as_strided_scatter": 1, "_unsafe_masked_index_put_accumulate": 3,
}  # fmt: skip
# Adds the values to what is there, which is read for it.
_ADDS = frozenset(
    """
    scatter_add scatter_reduce index_add index_reduce embedding_dense_backward unfold_backward
    max_pool2d_with_indices_backward max_pool3d_with_indices_backward
    adaptive_max_pool2d_backward adaptive_max_pool3d_backward _unsafe_masked_index_put_accumulate
    """.split()
)
# Arguments that only their sizes are asked of.
_UNREAD: Mapping[str, int] = dict.fromkeys(
    """
    zeros_like ones_like full_like rand_like randn_like randint_like new_zeros new_ones new_full
    _new_zeros_with_same_feature_meta fill
    """.split(),
    0,
) | dict.fromkeys(
    """
    max_pool2d_with_indices_backward max_pool3d_with_indices_backward adaptive_max_pool2d_backward
    adaptive_max_pool3d_backward avg_pool2d_backward avg_pool3d_backward
    _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward reflection_pad1d_backward
    reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward
    replication_pad2d_backward replication_pad3d_backward nll_loss_backward nll_loss2d_backward
    multi_margin_loss_backward
    """.split(),
    1,
)


def _name(func: torch._ops.OpOverload) -> str:
    """`namespace::op`, without the overload."""
    return func._schema.name


@cache
def _base_name(func: torch._ops.OpOverload) -> tuple[str, str]:
    namespace, _, name = _name(func).partition("::")
    return namespace, name


def flop_formula(func: torch._ops.OpOverload) -> tuple[Formula | None, bool, bool]:
    """(formula or None, whether `FlopCounterMode` counts it, whether FLOPs are 2 × MACs).

    Not cached: our kernels may register their formula after the first look-up.
    """
    packet, name = func._overloadpacket, _name(func)
    if packet in flop_registry:
        return _RIGHT.get(name, flop_registry[packet]), True, True
    return _EXTRA.get(name), False, name not in _NO_MACS


_FREE_TAGS = frozenset(
    {torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.view_copy, torch.Tag.inplace_view}
)


@cache
def is_free(func: torch._ops.OpOverload) -> bool:
    """Whether the op does no matrix product or the like: it costs bytes, not FLOPs."""
    if _FREE_TAGS & set(func.tags):
        return True
    namespace, name = _base_name(func)
    if namespace == "prims":
        return name not in {"fft_r2c", "fft_c2c", "fft_c2r", "svd"}
    if namespace not in {"aten", "prim"}:
        return False
    if func.is_view or name in _ALLOCATE or not func._schema.returns:
        return True
    plain = name.removesuffix("_")
    if plain.startswith("_foreach_"):
        return plain != "_foreach_mm"
    return plain in _BYTES_ONLY


@cache
def traffic(func: torch._ops.OpOverload) -> Traffic:
    """Which bytes of its tensors the op touches."""
    if torch.Tag.inplace_view in func.tags:
        return Traffic.NONE
    namespace, name = _base_name(func)
    if namespace == "aten":
        for names, kind in (
            (_ALLOCATE, Traffic.NONE),
            (_OVERWRITE, Traffic.WRITE),
            (_GATHER, Traffic.GATHER),
            (_SCATTER, Traffic.SCATTER),
            (_PLACE, Traffic.PLACE),
        ):
            if name in names:
                return kind
    return Traffic.ALL


def unread(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that give an op their sizes alone."""
    namespace, name = _base_name(func)
    at = _UNREAD.get(name) if namespace == "aten" else None
    if at is None or at >= len(args) or not isinstance(args[at], Tensor):
        return []
    return [args[at]]


def placed(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, bool]:
    """What a scattering op places: (number of elements, whether it adds them to what is there).

    A value that stands for many elements counts as often as it is placed; a mask as if all of it
    were true.
    """
    name = _base_name(func)[1].removesuffix("_")
    names = [a.name for a in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    values, target = given.get(names[_VALUES.get(name, 0)]), args[0]
    adds = name in _ADDS or bool(given.get("accumulate", False))
    if "indices" in given and name.endswith("index_put"):
        return _indexed(target, given["indices"]), adds
    if isinstance(values, Tensor) and values.dim():
        return values.numel(), adds
    rows = given["index"].numel() if "index" in given else 1
    if name == "index_fill":
        rows = rows * (target.numel() // max(target.shape[given["dim"]], 1))
    return rows, adds


def _indexed(target: Tensor, indices: list[Tensor | None]) -> Any:
    """Elements of `target[indices]`; of a mask, as if all of it were true."""
    picked: Any = 1
    dim = 0
    numbers = [i for i in indices if i is not None and i.dtype not in (torch.bool, torch.uint8)]
    for index in indices:
        if index is None:
            picked = picked * target.shape[dim]
        elif index.dtype in (torch.bool, torch.uint8):
            picked = picked * index.numel()
            dim += index.dim() - 1
        dim += 1
    if numbers:
        picked = picked * math.prod(torch.broadcast_shapes(*(i.shape for i in numbers)))
    return picked * math.prod(target.shape[dim:])
