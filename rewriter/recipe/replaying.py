"""The passes of a recipe over other weights: one layer at a time, away from any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rewriter.base import Pass, Replacement
from rewriter.errors import RewriteError, StoreError
from rewriter.layer import Layer
from rewriter.recipe.recipe import Recipe
from rewriter.sites import CONV, EMBEDDING, LINEAR, MLP, Site

__all__ = ["layer_before", "original_layer", "replay", "site_around"]


def replay(
    fqn: str,
    recipe: Recipe,
    given: Mapping[str, Tensor],
    refusal: type[RewriteError],
    max_error: float | None = None,
) -> nn.Module:
    """The layer that the passes of a recipe make of these original tensors.

    Args:
        fqn: a rewritten place.
        recipe: what was installed where.
        given: the original tensors of the place by role ("weight", "bias"), or of the `Layer`
            that stood there by name.
        refusal: the error to raise.
        max_error: declines a layer beyond it, as `rewrite` did.

    Raises:
        RewriteError: of the type `refusal`: a pass is not known here, fails on the tensors, or
            declines them.
    """
    installed = recipe.installed[fqn]
    layer, transposed = layer_before(fqn, recipe, dict(given)), installed.transposed
    for kind, rewrite in installed.chain:
        if not isinstance(rewrite, Pass) or (isinstance(kind, str) and "." in kind):
            unknown = rewrite["class"] if isinstance(rewrite, dict) else kind
            raise refusal(
                f"{fqn}: its recipe needs {unknown}, which is not known here: name that class in "
                "rewriter.load(..., layers=[...]), or rewrite again"
            )
        if rewrite.plans:
            raise refusal(
                f"{fqn}: {rewrite} made its layer from a look at the whole model and at its "
                "calibration batches, which other weights lack: rewrite the other model instead"
            )
        try:
            answer = rewrite.propose(site_around(layer, fqn, kind, transposed))
        except Exception as error:
            raise refusal(
                f"{fqn}: {rewrite} fails on the new weights: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(answer, Replacement):
            raise refusal(f"{fqn}: {rewrite} refuses the new weights: {answer.reason}")
        off = answer.error
        if max_error is not None and (off is None or not off <= max_error):
            raise refusal(f"{fqn}: error {off} of the new weights is above {max_error:.3g}")
        layer, transposed = answer.layer, False
    return installed.fitted(layer)


def original_layer(fqn: str, recipe: Recipe) -> nn.Module:
    cls, config = recipe.origins[fqn]
    if isinstance(cls, str):
        raise StoreError(f"{fqn} was a {cls}: name that class in rewriter.load(..., layers=[...])")
    layer: nn.Module = cls(**config, device="meta")
    return layer


def layer_before(fqn: str, recipe: Recipe, given: dict[str, Tensor]) -> nn.Module:
    """The original layer at a rewritten place, around these tensors."""
    shapes = {k: list(t.shape) for k, t in given.items()}
    if fqn in recipe.origins:
        layer = original_layer(fqn, recipe)
        expected = {k: list(t.shape) for k, t in layer.state_dict().items()}
        if shapes != expected:
            raise StoreError(f"{fqn}: the state_dict has {shapes}, the layer had {expected}")
        layer.load_state_dict(given, assign=True)
        return layer
    installed = recipe.installed[fqn]
    kind = installed.chain[0][0]
    weight, bias = given["weight"], given.get("bias")
    if installed.channels is not None and all(n == 1 for n in weight.shape[2:]):
        weight = weight.flatten(1)
        shapes["weight"] = list(weight.shape)
    if kind in _TENSORS_ALONE:
        return _of_tensors(fqn, kind, weight, bias)
    if kind not in (LINEAR, MLP):
        raise StoreError(f"{fqn} was of kind {kind}, which load_original cannot rebuild")
    features = shapes["weight"][:: -1 if installed.transposed else 1]
    if len(features) != 2 or (bias is not None and shapes["bias"] != features[:1]):
        raise StoreError(f"{fqn}: {shapes} are not the shapes of a linear layer")
    layer = nn.Module() if installed.transposed else nn.Linear(1, 1, device="meta")
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = features
    for name, tensor in (("weight", weight), ("bias", bias)):
        floating = tensor is not None and tensor.is_floating_point()
        layer._parameters[name] = None if tensor is None else nn.Parameter(tensor, floating)
    return layer


_TENSORS_ALONE = (EMBEDDING, CONV)
"""Kinds of sites whose new tensors follow from the old ones, whatever other options they have."""
_CONVS: Mapping[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def _of_tensors(fqn: str, kind: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer: nn.Module
    if kind == EMBEDDING and weight.dim() == 2:
        layer = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    elif kind == CONV and weight.dim() in _CONVS:
        out, inside, *size = weight.shape
        layer = _CONVS[weight.dim()](inside, out, size, bias=bias is not None, device="meta")
        if bias is not None and bias.shape != (out,):
            raise StoreError(f"{fqn}: {list(bias.shape)} is not the shape of its bias")
    else:
        raise StoreError(f"{fqn}: {list(weight.shape)} is not the shape of its {kind}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            setattr(layer, name, nn.Parameter(tensor, tensor.is_floating_point()))
    return layer


def site_around(layer: nn.Module, fqn: str, kind: Any, transposed: bool) -> Site:
    """A site as the engine shows it to a pass: under its full name, which a pass may use."""
    holder = root = nn.Module()
    *owners, last = fqn.split(".")
    for owner in owners:
        child = nn.Module()
        holder.add_module(owner, child)
        holder = child
    holder.add_module(last, layer)
    own = type(layer) if isinstance(layer, Layer) else kind if kind in _TENSORS_ALONE else LINEAR
    named = {} if isinstance(layer, Layer) else dict(layer.named_parameters(recurse=False))
    refs = [f"{fqn}.{n}" if n in named else None for n in ("weight", "bias")]
    site = Site(own, fqn, root, weight_ref=refs[0], bias_ref=refs[1], transposed=transposed)
    return replace(site, kind=MLP, parts={"down": site}) if kind == MLP else site
