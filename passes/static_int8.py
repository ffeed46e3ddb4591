"""int8-static: int8 weights, and activations in one range of 8 bits that calibration has fixed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.base import LinearLayer, Skip, as_parameter
from rewriter.errors import whole_number
from rewriter.kernels.int8_linear import PACKED, dequantize_weight, quantize_weight
from rewriter.kernels.int8_static import int8_static_linear, kernel_name
from rewriter.modules.moments import Sample
from rewriter.modules.observers import Observer, observed_range
from rewriter.passes.quantize import Quantize, Scheme, Smooth, register
from rewriter.passes.quantized_embedding import int8_embedding
from rewriter.sites import EMBEDDING, LINEAR, Site

__all__ = ["StaticOutlierLinear", "StaticQuantizedLinear"]

_EPS = 1e-8
_WIDEST = 1e5
"""A channel's multiplier lies between this and its inverse."""
_ALPHAS = (None, 0.5, 0.65, 0.8, 0.9)
_COMPARED = 256
"""So many rows tell which α is the best."""


class StaticQuantizedLinear(LinearLayer):
    """y = (q(x) − zero)·step @ (qweight·scale[:, None])ᵀ + bias, q rounding x·multiplier to 256
    levels of a range that is fixed: what lies outside is clipped.

    The weights and the range are buffers: they do not train. Gradients reach bias, and x where it
    is not clipped (straight-through).

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether there is a bias.
        smooth: whether each channel of x is multiplied by a number of its own before.
        device: of all tensors.
        dtype: of bias, and of the weights before quantization; scale, step and multiplier are
            float32 or wider.

    Attributes:
        qweight: [out_features, in_features] int8.
        scale: [out_features].
        step: [1], the distance of two levels.
        zero: [1] uint8, the level of 0.
        multiplier: [in_features] or None.
        bias: [out_features] or None.
    """

    op = "int8_static_linear"
    qweight: Tensor
    scale: Tensor
    step: Tensor
    zero: Tensor
    multiplier: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        smooth: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.smooth = smooth
        bound = 1 / math.sqrt(max(in_features, 1))
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        qweight, scale = quantize_weight(weight.uniform_(-bound, bound))
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale", scale)
        self.register_buffer("step", scale.new_full((1,), 1 / 32))  # −4 … 4
        self.register_buffer("zero", torch.full((1,), 128, dtype=torch.uint8, device=device))
        self.register_buffer("multiplier", scale.new_ones(in_features) if smooth else None)
        self.register_bias(out_features if bias else None, device, dtype)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        low: float,
        high: float,
        multiplier: Tensor | None = None,
    ) -> StaticQuantizedLinear:
        """The layer closest to weight [out, in]; a bias that is a Parameter is kept, not copied.

        Args:
            low, high: what x·multiplier is clipped to; 0 comes into it.
            multiplier: [in], above 0.
        """
        out_features, in_features = weight.shape
        smooth = multiplier is not None
        layer = cls(in_features, out_features, bias is not None, smooth, device="meta")
        layer._hold(weight, bias, low, high, multiplier)
        return layer

    def _hold(
        self,
        weight: Tensor,
        bias: Tensor | None,
        low: float,
        high: float,
        multiplier: Tensor | None,
    ) -> None:
        moved = weight if multiplier is None else weight / multiplier
        self.qweight, self.scale = quantize_weight(moved)
        low, high = min(low, 0.0), max(high, 0.0)
        step = _few_bits((high - low + _EPS) / 255) if low < high else 1.0
        self.step = self.scale.new_full((1,), step)
        zero = min(round(-low / step), 255)
        self.zero = torch.full((1,), zero, dtype=torch.uint8, device=weight.device)
        self.multiplier = None if multiplier is None else multiplier.to(self.scale)
        self.bias = None if bias is None else as_parameter(bias)

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, own: Range) -> StaticQuantizedLinear:
        """The layer closest to weight [out, in] for inputs of a range."""
        if own.kept is not None:
            return StaticOutlierLinear.keeping(weight, bias, own)
        return StaticQuantizedLinear.from_weight(weight, bias, own.low, own.high, own.multiplier)

    def forward(self, input: Tensor) -> Tensor:
        return int8_static_linear(
            input, self.qweight, self.scale, self.bias, self.step, self.zero, self.multiplier
        )

    def dense_weight(self) -> Tensor:
        """W = qweight·scale[:, None]·multiplier, [out_features, in_features]."""
        weight = dequantize_weight(self.qweight, self.scale)
        return weight if self.multiplier is None else weight * self.multiplier

    def kernel(self, tokens: int) -> str:
        device, dtype = self.qweight.device, self.scale.dtype
        return kernel_name(tokens, self.in_features, self.out_features, device, dtype)

    def held_bytes(self, tokens: int) -> int:
        return self.qweight.numel() if self.kernel(tokens) in PACKED else 0


class StaticOutlierLinear(StaticQuantizedLinear):
    """`StaticQuantizedLinear` but for some channels of x, which are multiplied in float:
    y = (…)(x) + x[…, kept] @ kept_weightᵀ. The range need not hold these channels.

    Args:
        outliers: how many channels.
        in_features, out_features, bias, smooth, device, dtype: as of `StaticQuantizedLinear`.

    Attributes:
        kept: [outliers] int64, the channels; the columns of qweight are zeros there.
        kept_weight: [out_features, outliers].

    Source: Dettmers et al. 2022, "LLM.int8()", with channels that calibration has fixed.
    """

    op = "int8_static_outlier_linear"
    kept: Tensor
    kept_weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        outliers: int,
        bias: bool = True,
        smooth: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, smooth, device, dtype)
        whole_number("StaticOutlierLinear: outliers", outliers, 1, in_features)
        self.outliers = outliers
        self.register_buffer("kept", torch.arange(outliers, device=device))
        weight = dequantize_weight(self.qweight[:, :outliers], self.scale)
        self.register_buffer("kept_weight", weight.to(dtype or torch.get_default_dtype()))
        self.qweight[:, :outliers] = 0

    @classmethod
    def keeping(cls, weight: Tensor, bias: Tensor | None, own: Range) -> StaticOutlierLinear:
        """The layer closest to weight [out, in] that keeps the outliers of a range."""
        assert own.kept is not None
        (out, width), (count,) = weight.shape, own.kept.shape
        smooth = own.multiplier is not None
        layer = cls(width, out, count, bias is not None, smooth, device="meta")
        rest = weight.detach().index_fill(1, own.kept, 0)
        layer._hold(rest, bias, own.low, own.high, own.multiplier)
        layer.kept, layer.kept_weight = own.kept, weight.detach()[:, own.kept]
        return layer

    def forward(self, input: Tensor) -> Tensor:
        kept = input.index_select(-1, self.kept)
        return super().forward(input) + F.linear(kept, self.kept_weight.to(kept.dtype))

    def dense_weight(self) -> Tensor:
        """W, [out_features, in_features]: integers times their scales, and the columns kept."""
        weight = super().dense_weight()
        return weight.index_copy(1, self.kept, self.kept_weight.to(weight.dtype))


def _few_bits(step: float) -> float:
    """The next number of 8 binary digits: the same in float32, bfloat16 and float16, so that no
    cast of the layer moves the range."""
    mantissa, exponent = math.frexp(step)
    return math.ldexp(math.ceil(mantissa * 256) / 256, exponent)


def smoothing(sample: Sample, alpha: float) -> Tensor:
    """1/s with s_k = max|x_k|^α / max|W_k|^(1−α), [in] float32 of 8 binary digits; 1 where
    either is zero; W of all layers that read these inputs.

    Source: Xiao et al. 2023, "SmoothQuant", eq. 4.
    """
    inputs = torch.maximum(sample.low.abs(), sample.high.abs()).double()
    weights = torch.stack([w.detach().double().abs().amax(0) for w in sample.readers]).amax(0)
    inverse = weights ** (1 - alpha) / inputs**alpha
    inverse = torch.where((inputs > 0) & (weights > 0), inverse, 1.0)
    return inverse.clamp(1 / _WIDEST, _WIDEST).bfloat16().float()


@dataclass(frozen=True)
class Range:
    """By what inputs are multiplied, between what that is clipped, and which channels are not."""

    low: float
    high: float
    multiplier: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def of(
        cls, sample: Sample, observer: Observer, alpha: float | None, kept: Tensor | None = None
    ) -> Range:
        """
        Args:
            sample: of inputs without the channels that are kept.
        """
        low, high, rows, times = sample.low, sample.high, sample.rows, None
        if alpha is not None:
            times = smoothing(sample, alpha)
            low, high, rows = low * times, high * times, rows * times
        ends = observed_range(observer, rows.flatten(), float(low.min()), float(high.max()))
        return cls(*ends, times, kept)

    def lost(self, rows: Tensor, weight: Tensor) -> float:
        """‖W x − Ŵ x̂‖² over some rows, in float32."""
        layer = StaticQuantizedLinear.from_weight(
            weight.float(), None, self.low, self.high, self.multiplier
        )
        given = rows if self.multiplier is None else rows * self.multiplier
        step, zero = float(layer.step), int(layer.zero)
        held = torch.fake_quantize_per_tensor_affine(given, step, zero, 0, 255)
        made = held @ dequantize_weight(layer.qweight, layer.scale).t()
        return float((rows @ weight.float().t() - made).square().sum())


_ranges: WeakKeyDictionary[Sample, dict[tuple[object, ...], Range]] = WeakKeyDictionary()


def range_of(sample: Sample, observer: Observer, smooth: Smooth, outliers: int = 0) -> Range:
    """One range for all layers that read these inputs, so that one quantization serves them.

    With "auto", of several α the one with which their outputs are closest on rows that no range was
    fitted to: smoothing lets every channel reach the ends of the range, beyond which new rows are
    clipped.
    """
    known = _ranges.setdefault(sample, {})
    key = observer, smooth, outliers
    if key not in known:
        known[key] = _searched(sample, observer, smooth, outliers)
    return known[key]


def _searched(sample: Sample, observer: Observer, smooth: Smooth, outliers: int) -> Range:
    trial, kept = _tried(sample), None
    if outliers:
        kept = torch.maximum(sample.low.abs(), sample.high.abs()).topk(outliers).indices.sort()[0]
        sample, trial = _without(sample, kept), _without(trial, kept)

    def lost(alpha: float | None) -> float:
        found, rows = Range.of(trial, observer, alpha, kept), trial.held[:_COMPARED]
        return sum(found.lost(rows, weight) for weight in trial.readers)

    return Range.of(sample, observer, min(_ALPHAS, key=lost) if smooth == "auto" else smooth, kept)


def _tried(sample: Sample) -> Sample:
    """The sample as it tells α apart: of one batch, which has nothing held out, a quarter of the
    rows are."""
    rows = sample.rows
    if sample.held is not rows or len(rows) < 4:
        return sample
    fitted, held = rows.tensor_split([len(rows) * 3 // 4])
    return Sample(fitted.amin(0), fitted.amax(0), fitted, held, sample.readers)


def _without(sample: Sample, kept: Tensor) -> Sample:
    """The same inputs and weights with zeros in some channels."""
    return Sample(
        sample.low.index_fill(0, kept, 0),
        sample.high.index_fill(0, kept, 0),
        sample.rows.index_fill(1, kept, 0),
        sample.held.index_fill(1, kept, 0),
        tuple(w.index_fill(1, kept, 0) for w in sample.readers),
    )


def _corrected(
    layer: StaticQuantizedLinear, weight: Tensor, bias: Tensor, rows: Tensor
) -> nn.Parameter:
    """The bias with which the mean error of the outputs is zero over the rows.

    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", sec. 4.2, with data.
    """
    with torch.no_grad():
        want = F.linear(rows, weight.to(rows.dtype), bias.to(rows.dtype))
        off = (want - layer(rows).to(rows.dtype)).mean(0)
    return nn.Parameter((bias.detach().float() + off).to(bias.dtype), bias.requires_grad)


def _linear(site: Site, quantize: Quantize) -> StaticQuantizedLinear | Skip:
    sample = site.sample
    if sample is None:
        return Skip("scheme {} needs calibration batches that reach it", quantize.scheme)
    weight, bias = site.weight, site.bias
    count = quantize.outliers
    if not isinstance(count, int):
        count = math.ceil(count * site.in_features)
    if count >= site.in_features:
        return Skip("outliers={} are all of its {} channels", count, site.in_features)
    own = range_of(sample, quantize.observer, quantize.smooth, count)
    layer = StaticQuantizedLinear.of(weight, bias, own)
    # where the user's code calls a function, the bias is that code's own and stays
    if quantize.bias_correction and bias is not None and site.module is not None:
        layer.bias = _corrected(layer, weight, bias, sample.rows)
    return layer


register(
    Scheme(
        "int8-static",
        bits=8,
        dtype=torch.int8,
        storage=torch.int8,
        layers={LINEAR: _linear, EMBEDDING: int8_embedding},
        options=("observer", "smooth", "bias_correction", "outliers", "embeddings"),
        needs_calibration=True,
    )
)
