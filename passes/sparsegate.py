"""`SparseGate`: of a gated MLP only the neurons with a large gate are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.base import Pass, Phase, StoredLinear, unusable
from rewriter.edits import Edit, Keep, Replace, View
from rewriter.errors import OptionError, given, whole_number
from rewriter.kernels.sparse_entries import THEN, kept_entries
from rewriter.modules.budgets import FEWEST, doubt, quantile
from rewriter.passes.threshold import tied
from rewriter.passes.topk import TopK
from rewriter.sites import LINEAR, MLP, Kind, Site

__all__ = ["NO_MLP", "GateLinear", "SparseGate", "choosing"]


class GateLinear(StoredLinear):
    """y = W x + b with zeros where act(y) is small: the gate of an MLP, in front of its activation.

    The gradient is that of this function. As act(0) = 0, the neurons of a zero add nothing to the
    MLP, and its lowered form reads none of their weights in the other two matrices.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        then: the activation that follows: "relu", "gelu", "gelu_tanh" or "silu".
        bias: whether there is an additive bias.
        k: how many neurons a row are kept, those of largest |act(y)|, ties by the lower index; 0:
            those with |act(y)| ≥ the threshold.
        share: of the neurons that are kept, where it is known.
        device, dtype: of the parameters.

    Shapes:
        input [*, in_features], output [*, out_features]; weight [out_features, in_features];
        bias [out_features]; threshold, a buffer, [1] float32.

    Raises:
        OptionError: the activation is another, or k is negative or above out_features.
    """

    op: ClassVar[str] = "gate_linear"
    keeps_dtype: ClassVar[tuple[str, ...]] = ("threshold",)
    threshold: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        then: str,
        *,
        bias: bool = True,
        k: int = 0,
        share: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if then not in THEN:
            raise OptionError(f"GateLinear: then must be one of {', '.join(THEN)}, not {then!r}")
        whole_number("GateLinear: k", k, least=0, most=out_features)
        self.then, self.k, self.share = then, k, share
        self.register_buffer("threshold", None if k else torch.zeros(1, device=device))
        self.reset_parameters()

    @classmethod
    def from_weights(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        then: str,
        *,
        threshold: float = 0.0,
        k: int = 0,
        share: float | None = None,
    ) -> GateLinear:
        """The layer around a [out, in] weight; tensors that are Parameters stay the same."""
        out_features, in_features = weight.shape
        more = {"bias": bias is not None, "k": k, "share": share}
        layer = cls(in_features, out_features, then, **more, device="meta")  # type: ignore[arg-type]
        layer.threshold = None if k else torch.full((1,), threshold, device=weight.device)
        return layer.around(weight, bias)

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, uniform within ±1/√in_features; nothing is below 0."""
        super().reset_parameters()
        if self.threshold is not None:
            nn.init.zeros_(self.threshold)

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)
        return kept_entries(y, threshold=self.threshold, then=self.then, k=self.k)

    def kernel(self, tokens: int) -> str:
        return "torch" if self.share is None else f"torch, keeps {self.share:.0%} of its neurons"


NO_MLP = "no MLP with an activation begins with it"


def choosing(view: View) -> tuple[dict[str, Site], dict[str, str]]:
    """The MLPs of a model by the names of the layers that choose their neurons, the gate or the
    first one; and why their other layers stay as they are, by name."""
    mlps = {
        s.parts.get("gate", s.parts["up"]).fqn: s
        for s in view.sites
        if s.kind == MLP and "activation" in s.parts
    }
    others = {
        part.fqn: f"it computes what {first} chooses"
        for first, mlp in mlps.items()
        for part in mlp.parts.values()
        if part.fqn != first
    }
    return mlps, others


@dataclass(frozen=True)
class SparseGate(Pass):
    """down(act(gate(x)) ∘ up(x)) becomes down(a_S ∘ up(x)): S are the neurons of large |a|, a =
    act(gate(x)).

    Which neurons count is known before `up` is computed: with few tokens on a CPU neither their
    rows of `up` nor their columns of `down` are read, where a graph of the rewritten model runs.
    The gate itself is read whole: at a share s of active neurons a third and 2s/3 of the MLP's
    weights, 2.5 times less at 10 %. Where inputs may be dropped as well, `Threshold(inputs="all")`
    reads less. In a plain MLP, down(act(up(x))), `up` is the gate, and no form reads less.

    Args:
        sparsity: which share of the neurons is to be zero, between 0 and 1: by a threshold, a
            quantile of |a| over `rewrite(…, calibration=batches)`, so each token keeps as many as
            it needs. None: by k.
        k: an int ≥ 1: how many neurons each token keeps; a float in (0, 1]: which fraction. It
            needs no calibration. None: by sparsity.
        where: which gates; a name pattern, a predicate, or None for all.

    Leaves a gate whose activation is not ReLU, GELU or SiLU, that an earlier pass rewrote, whose
    weights are tied, hold NaN or inf or are not real floating point numbers, and with `sparsity`
    one that the calibration does not reach with 64 rows.

    Raises:
        OptionError: an option is impossible, or not exactly one of the two is given.

    Source: Lee et al. 2024, "CATS: Contextually-Aware Thresholding for Sparsity in Large Language
    Models".
    """

    matches: ClassVar[tuple[Kind, ...]] = (LINEAR,)
    phase: ClassVar[Phase] = Phase.SPARSITY

    sparsity: float | None = None
    k: int | float | None = None

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.k is None):
            raise OptionError("SparseGate: give either sparsity= or k=")
        share: object = self.sparsity
        if share is not None and not (isinstance(share, float) and 0 < share < 1):
            raise OptionError(
                f"SparseGate: sparsity must be a fraction between 0 and 1, not {given(share)}"
            )
        if self.k is not None:
            TopK(self.k)  # which says what is wrong with it

    @property
    def needs_calibration(self) -> bool:
        return self.sparsity is not None

    def plan(self, view: View) -> list[Edit]:
        mlps, others = choosing(view)
        edits: list[Edit] = []
        shared = tied(view)
        for site in view.chosen:
            if site.fqn in mlps:
                refused = unusable(site.weight, site.bias) or view.unsafe(site)
                reason = refused.reason if refused else shared.get(site.fqn)
                edits.append(Keep(site, reason) if reason else self._edit(site, mlps[site.fqn]))
            else:
                edits.append(Keep(site, others.get(site.fqn, NO_MLP)))
        return edits

    def _edit(self, site: Site, mlp: Site) -> Edit:
        then = mlp.parts["activation"].activation or ""
        if then not in THEN:
            return Keep(site, f"its activation is none of {', '.join(THEN)}")
        weight = site.weight
        if not isinstance(weight, nn.Parameter):  # a view: it gets storage of its own
            weight = weight.clone(memory_format=torch.contiguous_format)
        if self.k is None:
            return self._calibrated(site, weight, then)
        k = TopK(self.k).count(site.out_features)
        if k >= site.out_features:
            return Keep(site, f"k={k} keeps all {site.out_features} neurons")
        layer = GateLinear.from_weights(weight, site.bias, then, k=k, share=k / site.out_features)
        return Replace(site, layer, f"keeps {k} of {site.out_features} neurons a token", error=None)

    def _calibrated(self, site: Site, weight: Tensor, then: str) -> Edit:
        sample, share = site.sample, self.sparsity
        assert share is not None
        if sample is None or len(sample.rows) < FEWEST:
            rows = 0 if sample is None else len(sample.rows)
            return Keep(site, f"the calibration batches give it {rows} rows, and a quantile takes "
                        f"{FEWEST}: pass more text")  # fmt: skip
        with torch.no_grad():
            scores, held = (
                THEN[then](F.linear(x.to(weight.dtype), weight, site.bias)).abs().float()
                for x in (sample.rows, sample.held)
            )
        # above 0: neurons that are 0 already (of a ReLU) count among those that are not read
        threshold = max(quantile(scores.flatten(), share), torch.finfo(torch.float32).tiny)
        reached = float((held < threshold).float().mean())
        kept = round(1 - reached, 3)
        layer = GateLinear.from_weights(weight, site.bias, then, threshold=threshold, share=kept)
        reason = (
            f"{reached:.1%} of its neurons are below {threshold:.3g} on {len(held)} rows held out "
            f"(asked: {share:.0%}, known within {doubt(scores < threshold):.1%})"
        )
        return Replace(site, layer, reason, error=None)
