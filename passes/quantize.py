"""Quantize: weights in few bits by a named scheme; what a scheme is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rewriter.base import Layer, Pass, Phase, Replacement, Skip, relative_error, unusable
from rewriter.errors import OptionError, PassError, given, of_type, one_of, whole_number
from rewriter.kernels.compensation import METHODS
from rewriter.kernels.int8_linear import ACTIVATIONS
from rewriter.kernels.weight_only import GROUP_SIZES
from rewriter.modules.observers import OBSERVERS, Observer
from rewriter.passes.monarch import MonarchLinear
from rewriter.passes.sparsegate import GateLinear
from rewriter.passes.threshold_linear import ThresholdLinear
from rewriter.passes.topk import TopKLinear
from rewriter.passes.trained import TrainedLinear
from rewriter.passes.trained_conv import TrainedConv1d, TrainedConv2d
from rewriter.sites import CONV, EMBEDDING, LINEAR, Kind, Site, kind_name

__all__ = ["SCHEMES", "Maker", "Quantize", "Scheme", "register"]

Activation = Literal["per_token", "per_tensor"]
Smooth = float | Literal["auto"] | None
Method = Literal["round", "awq", "gptq"]
_FROZEN = "weights are frozen by quantization; gradients still reach the input"


def _never(quantize: Quantize) -> bool:
    return False


@dataclass(frozen=True)
class Scheme:
    """How weights are stored in fewer bits, and which layers multiply by them.

    Args:
        name: what `Quantize(scheme=…)` calls it.
        bits: of one weight.
        dtype: of the weights as they are multiplied; for those who read the scheme, as `bits` is.
        storage: of the buffers that hold them; a layer without such a buffer is an error.
        layers: by kind of site, what makes the layer closest to the one there: (site, quantize) →
            a `Layer` with a `stored_weight`, or a `Skip`. `quantize` is the pass, with its options.
            The layer keeps a bias that is a Parameter.
        per_element: weights in one element of the buffer, as `Layer.packed` of its layers says.
        options: those of `Quantize` that the makers read; any other is an error beside this scheme.
        calibrates: whether the makers of `quantize` read `site.moments`.
        needs_calibration: whether they cannot do without `site.sample`.

    Raises:
        OptionError: the bits of a weight do not fit its storage, or `Quantize` visits no sites of
            such a kind, or has no such option.
    """

    name: str
    bits: int
    dtype: torch.dtype
    storage: torch.dtype
    layers: Mapping[Kind, Maker]
    per_element: int = 1
    options: tuple[str, ...] = ()
    calibrates: Callable[[Quantize], bool] = _never
    needs_calibration: bool = False

    def __post_init__(self) -> None:
        whole_number(f"scheme {self.name!r}: bits", self.bits)
        whole_number(f"scheme {self.name!r}: per_element", self.per_element)
        room, wanted = 8 * self.storage.itemsize, self.bits * self.per_element
        if wanted > room:
            raise OptionError(
                f"scheme {self.name!r}: {self.per_element} weights of {self.bits} bits do not fit "
                f"one {self.storage} of {room} bits"
            )
        strange = [kind_name(k) for k in self.layers if k not in Quantize.matches]
        if strange or not self.layers:
            served = ", ".join(strange) or "no kind of site"
            visited = ", ".join(map(kind_name, Quantize.matches))
            raise OptionError(
                f"scheme {self.name!r} has layers for {served}, and Quantize visits {visited}"
            )
        for option in self.options:
            one_of(f"scheme {self.name!r}: option", option, OPTIONS)


Maker = Callable[[Site, "Quantize"], Layer | Skip]
"""What a scheme makes of a site."""

SCHEMES: dict[str, Scheme] = {}
"""What `Quantize(scheme=…)` knows, by name; `register` adds to it."""


def register(scheme: Scheme) -> Scheme:
    """Makes a scheme known to `Quantize`; again is nothing new.

    Raises:
        OptionError: another one has its name.
    """
    known = SCHEMES.setdefault(scheme.name, scheme)
    if known != scheme:
        raise OptionError(f"two schemes are called {scheme.name!r}: {known} and {scheme}")
    return scheme


@dataclass(frozen=True)
class Quantize(Pass):
    """W ≈ q·scale with q in few bits and one scale per output channel; see `QuantizedLinear`.

    "int8-static" needs `rewrite(…, calibration=batches)`; see `StaticQuantizedLinear`.
    After `Monarch`, both factors of a `MonarchLinear` are quantized; see `QuantizedMonarch`. After
    `TopK` and `Threshold`, "int8-weight" and "int4-weight" quantize the weight and keep the
    selection; after `SparseGate`, "int8-weight" does. After `QAT` of the same options, the layers
    of equal outputs; see `TrainedLinear`.

    Args:
        scheme: "int8-dynamic": int8 weights, activations quantized to 8 bits at run time;
            "int8-static": the same in a range that calibration has fixed; "int8-weight",
            "int4-weight": such weights, activations as they are; "int4-dynamic": 4-bit weights,
            activations in 8 bits; "bf16", "fp8-weight", "fp8-dynamic": shorter floats; or another
            of `SCHEMES`.
        activation: "per_token" (closer) or "per_tensor".
        observer: of "int8-static", how the range of its activations is found: "minmax",
            "percentile", "mse" or "entropy"; see `rewriter.modules.observers`.
        smooth: SmoothQuant's α, with which what is difficult goes from the activations to the
            weights, channel by channel: 0 … 1; None leaves both as they are; "auto" takes for each
            layer what serves its outputs on the calibration batches best.
        bias_correction: takes the mean error of the outputs into the bias, of layers that have one
            of their own.
        outliers: channels of the inputs, those of the widest range, that stay in float: how many,
            or below 1 their share.
        group_size: weights of a row that share a scale, of 4 bits: 32 (closer), 64 or 128. Those of
            a convolution's output channel share one, whatever this is.
        symmetric: whether groups of weights have a scale alone, and no zero (closer);
            convolutions have none.
        method: how levels of 4 bits are chosen: "round" takes the nearest; "awq" searches for the
            range of each group, and "gptq" lets each column make good what those before it lost,
            for the inputs of `rewrite(…, calibration=batches)`. A site whose inputs are not known
            is rounded, with a warning; so are convolutions.
        convolutions: whether convolutions that mix positions, or work on groups of channels, are
            quantized, too (1×1 ones are linear layers, and always are); "per_token" is then a range
            for each sample. Of 4 bits "int4-dynamic" alone takes them: no kernel multiplies floats
            by 4-bit weights there.
        embeddings: whether embeddings are stored in fewer bits, too: most of a small model's bytes,
            but no time, and their rows do not train any more. A head that is tied to one is
            quantized with it, both by one tensor, or both stay.
        untie: whether the head of a language model that shares the weight of an embedding gets
            integers of its own, while the embedding keeps the weight; else it stays as it is, with
            the reason in the report. Checkpoints of the original for `load_original` must then hold
            the head's weight, too.
        where: which sites; a name pattern, a predicate, or None for all.

    Skips a site whose weights are not floating point numbers of 16 bits or more, or hold NaN or
    inf, or of a kind that the scheme has no layer for.

    Raises:
        OptionError: an option is impossible, or one that the scheme does not read.
    """

    matches: ClassVar[tuple[Kind, ...]] = (
        LINEAR,
        MonarchLinear,
        TopKLinear,
        ThresholdLinear,
        GateLinear,
        TrainedLinear,
        TrainedConv1d,
        TrainedConv2d,
        EMBEDDING,
        CONV,
    )
    phase: ClassVar[Phase] = Phase.PRECISION

    scheme: str = "int8-dynamic"
    activation: Activation = "per_token"
    observer: Observer = "minmax"
    smooth: Smooth = "auto"
    bias_correction: bool = False
    outliers: int | float = 0
    group_size: int = 64
    symmetric: bool = True
    method: Method = "round"
    embeddings: bool = False
    convolutions: bool = False
    untie: bool = False

    def __post_init__(self) -> None:
        one_of("Quantize: scheme", self.scheme, SCHEMES)
        one_of("Quantize: activation", self.activation, ACTIVATIONS)
        one_of("Quantize: observer", self.observer, OBSERVERS)
        _check_smooth(self.smooth)
        of_type("Quantize", "bias_correction", self.bias_correction, bool, "True or False")
        _check_outliers(self.outliers)
        one_of("Quantize: group_size", self.group_size, GROUP_SIZES)
        one_of("Quantize: method", self.method, METHODS)
        for option in _OF_KINDS.values():
            of_type("Quantize", option, getattr(self, option), bool, "True or False")
        of_type("Quantize", "untie", self.untie, bool, "True or False")
        scheme = SCHEMES[self.scheme]
        for option, default in OPTIONS.items():
            if option not in scheme.options and getattr(self, option) != default:
                read = ", ".join(scheme.options) or "none"
                raise OptionError(
                    f"Quantize: scheme {self.scheme!r} does not read {option}; it reads {read}"
                )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(k for k in self.matches if k not in _OF_KINDS or getattr(self, _OF_KINDS[k]))

    @property
    def calibrates(self) -> bool:
        return SCHEMES[self.scheme].calibrates(self)

    @property
    def needs_calibration(self) -> bool:
        return SCHEMES[self.scheme].needs_calibration

    def propose(self, site: Site) -> Replacement | Skip:
        make = SCHEMES[self.scheme].layers.get(site.kind)
        if make is None:
            kind = kind_name(site.kind)
            takes = ", ".join(sorted(n for n, s in SCHEMES.items() if site.kind in s.layers))
            if not takes:
                return Skip("scheme {} has no layer for a {}", self.scheme, kind)
            return Skip("scheme {} has no layer for a {}; taken by {}", self.scheme, kind, takes)
        old = site.module
        if isinstance(old, Layer):
            weights: list[Tensor] = [p for n, p in old.named_parameters() if n != "bias"]
            bias, before = getattr(old, "bias", None), old.stored_weight
        else:
            weights, bias, before = [site.weight], site.bias, lambda: site.weight
        if refused := unusable(*weights, bias):
            return refused
        layer = make(site, self)
        if isinstance(layer, Skip):
            return layer
        _check_storage(SCHEMES[self.scheme], site, layer)
        layer.train(old is None or old.training)
        note = _FROZEN if any(w.requires_grad for w in weights) else ""
        weight, made = before(), layer.stored_weight()
        output_error = None
        if site.sample is not None:  # what becomes of the inputs is part of it
            output_error = site.sample.output_error(weight, bias, layer)
        elif site.moments is not None:
            output_error = site.moments.output_error(weight, made)
        error = relative_error(weight, made)
        return Replacement(layer, error, note, output_error, cuts_ties=self.untie, tie_remedy=_TIED)


def _check_outliers(outliers: object) -> None:
    if isinstance(outliers, float) and 0 < outliers < 1:
        return
    if isinstance(outliers, bool) or not isinstance(outliers, int) or outliers < 0:
        raise OptionError(
            "Quantize: outliers must be a number of channels, or a share of them between 0 and 1, "
            f"not {given(outliers)}"
        )


def _check_smooth(smooth: object) -> None:
    number = isinstance(smooth, int | float) and not isinstance(smooth, bool)
    if not (smooth is None or smooth == "auto" or (number and 0 <= smooth <= 1)):  # type: ignore[operator]
        raise OptionError(
            f"Quantize: smooth must be None, 'auto' or from 0 to 1, not {given(smooth)}"
        )


_TIED = "untie=True gives it weights of its own, embeddings=True rounds both where that is possible"
_OF_KINDS: Mapping[Kind, str] = {EMBEDDING: "embeddings", CONV: "convolutions"}
"""Kinds of sites that are taken where an option says so."""

_OF_ALL = ("scheme", "where", "untie")
OPTIONS = {f.name: f.default for f in fields(Quantize) if f.name not in _OF_ALL}
"""What a scheme may read, with the value that it has where the user gives none."""


def _check_storage(scheme: Scheme, site: Site, layer: object) -> None:
    """Raises PassError where a layer's weights are not stored as its scheme states."""
    if not isinstance(layer, Layer):
        raise PassError(f"scheme {scheme.name!r} made a {type(layer).__name__}, which is no Layer")
    buffers = {n: (b.dtype, layer.packed.get(n, 1)) for n, b in layer.named_buffers()}
    if (scheme.storage, scheme.per_element) not in buffers.values():
        got = ", ".join(f"{n} ({dtype}, {count})" for n, (dtype, count) in buffers.items())
        raise PassError(
            f"scheme {scheme.name!r} at {site.fqn!r}: its weights are stored in {scheme.storage}, "
            f"{scheme.per_element} in each element; its {type(layer).__name__} has no such buffer, "
            f"but {got or 'none at all'}: mend the scheme, the buffer's dtype, or `Layer.packed`"
        )


_MOVED = "QuantizedLinear", "QuantizedMonarch"


def __getattr__(name: str) -> Any:
    """Layers that were here up to version 0.4.0, as pickles of it say."""
    if name in _MOVED:
        return getattr(importlib.import_module("rewriter.passes"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
