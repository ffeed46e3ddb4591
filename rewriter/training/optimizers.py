"""Optimizers of rewritten models: learning rates per factor, and state carried over a rewrite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rewriter.base import Layer
from rewriter.errors import OptionError, of_type, warn
from rewriter.modules.tree import join, submodule
from rewriter.spellings import channels_of

__all__ = ["Remapped", "param_groups", "remap_optimizer"]

_FIRST = frozenset({"exp_avg", "momentum_buffer"})
_SECOND = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""Names under which torch's optimizers keep averages of gradients and of their squares."""


def param_groups(
    optimized: nn.Module, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """lr_i = lr · (d_in / d_i) / cores for the i-th factor of a structured layer, for Adam.

    Adam's steps have one size whatever the gradient: the change of a layer's output grows with the
    number of inputs d_i that are summed. A factor with fewer of them than the dense layer has
    (d_in) can take so much larger steps, shared out among the factors. All else trains at `lr`,
    the rate that suits the dense model; what has one dimension (biases, norms) does not decay.

    Args:
        optimized: a model, rewritten or not.
        lr: learning rate of dense layers.
        weight_decay: of all parameters with two dimensions or more.

    Returns:
        Groups for `torch.optim.AdamW(param_groups(optimized, 3e-4, 0.1))`: each trainable
        parameter once, one group per pair of rate and decay; `lr_scale` is the factor over `lr`.

    Raises:
        OptionError: lr or weight_decay is negative or not finite, or nothing is trainable.

    Source: Qiu et al. 2024, "Compute Better Spent: Replacing Dense Layers with Structured
    Matrices", section 4 (μP for each core).
    """
    of_type("param_groups(optimized, lr)", "optimized", optimized, nn.Module, "a model")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise OptionError(f"{name}={value!r}: use a number of at least 0")
    scales = _scales(optimized)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in optimized.parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((scales.get(id(parameter), 1.0), decay), []).append(parameter)
    if not groups:
        raise OptionError("no parameter requires gradients: nothing to optimize")
    return [
        {"params": params, "lr": lr * scale, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), params in groups.items()
    ]


def _scales(model: nn.Module) -> dict[int, float]:
    """Of the parameters of structured layers, by identity."""
    return {
        id(getattr(module, name)): scale
        for module in model.modules()
        if isinstance(module, Layer)
        for name, scale in module.lr_scales().items()
    }


@dataclass
class Remapped:
    """What became of each parameter's state: dotted names.

    Args:
        carried: state as it was.
        converted: averages of gradients taken from the old parameters to the new ones.
        reset: no state: the optimizer begins anew.
    """

    carried: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)


def remap_optimizer(optimizer: Optimizer, model: nn.Module, optimized: nn.Module) -> Optimizer:
    """The same optimizer over the parameters of a rewritten model, in the middle of training.

    A parameter that was there before (by identity, or by name and shape) keeps its state. Where a
    layer was exchanged, averages of gradients go through the chain rule: from a dense W to factors
    L, R as m_R = Lᵀ m_W and m_L = m_W Rᵀ (squares with squared factors); from factors to W (after
    `Densify`) as the smallest m_W that agrees with both, and second moments as the outer product of
    what the factors say of rows and columns. Step counts stay.

    Args:
        optimizer: over the parameters of `model`; not changed.
        model: before the rewrite.
        optimized: after it. Every trainable parameter gets the group of what it stands for.

    Returns:
        An optimizer of the same class; its attribute `remapped` is a `Remapped`. A learning rate
        scheduler must be told: `scheduler.optimizer = …`.

    Raises:
        OptionError: the optimizer holds no parameter of `model`.
    """
    call = "remap_optimizer(optimizer, model, optimized)"
    of_type(call, "optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
    of_type(call, "model", model, nn.Module, "the model before the rewrite")
    of_type(call, "optimized", optimized, nn.Module, "the model after the rewrite")
    old_names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    new_names = {n: p for n, p in optimized.named_parameters()}
    owner = {
        old_names[id(p)]: (i, p)
        for i, group in enumerate(optimizer.param_groups)
        for p in group["params"]
        if id(p) in old_names
    }
    if not owner:
        raise OptionError(
            "the optimizer holds no parameter of the model: pass the model that it "
            "was built for, as it was before the rewrite"
        )
    by_id = {id(p): (n, i) for n, (i, p) in owner.items()}
    result = object.__new__(type(optimizer))
    # an instance's own `step` is a scheduler's wrapper around the old optimizer
    vars(result).update({k: v for k, v in vars(optimizer).items() if k != "step"})
    result.state = defaultdict(dict)
    members: dict[tuple[int, float], list[nn.Parameter]] = {}
    scales, done = _scales(optimized), Remapped()
    for name, parameter in new_names.items():
        if not parameter.requires_grad:
            continue
        place, _, last = name.rpartition(".")
        inside = _convolution(model, place) is not None
        outer = place.rpartition(".")[0] if inside else place  # what was there before
        old, same = join(outer, last), by_id.get(id(parameter))
        converted = {} if same else _converted(model, optimized, name, optimizer.state)
        named = old in owner and owner[old][1].shape == parameter.shape
        if same is None and named and not converted:  # in another basis it is not what it was
            same = old, owner[old][0]
        if same is not None:
            own_scale = optimizer.param_groups[same[1]].get("lr_scale", 1.0)
            members.setdefault((same[1], own_scale), []).append(parameter)
            state = optimizer.state.get(owner[same[0]][1], {})
            result.state[parameter] = {k: _copied(v) for k, v in state.items()}
            done.carried.append(name)
            continue
        before = {n: v for n, v in owner.items() if n.rpartition(".")[0] in (outer, name)}
        before = before or {n: v for n, v in owner.items() if n == outer}
        group = next((i for i, p in before.values() if p.dim() == parameter.dim()), None)
        group = next((i for i, _ in before.values()), 0) if group is None else group
        members.setdefault((group, scales.get(id(parameter), 1.0)), []).append(parameter)
        if converted:
            result.state[parameter] = converted
            done.converted.append(name)
        else:
            done.reset.append(name)
    result.param_groups = [
        _rescaled(optimizer.param_groups[i], scale, own)
        for (i, scale), own in sorted(members.items(), key=lambda m: m[0])
    ]
    if done.reset and optimizer.state:  # nothing is lost before the first step
        shown = ", ".join(done.reset[:5]) + (", …" if len(done.reset) > 5 else "")
        warn(f"the optimizer begins anew for {len(done.reset)} parameters: {shown}")
    vars(result)["remapped"] = done
    return result


def _rescaled(
    group: Mapping[str, Any], scale: float, parameters: list[nn.Parameter]
) -> dict[str, Any]:
    """The group's options for these parameters. Rates follow the layers where `param_groups` made
    them do so; a rate that the user set for all stays."""
    own = {**group, "params": parameters}
    if "lr_scale" in group:
        for key in ("lr", "initial_lr"):
            if key in group:
                own[key] = group[key] / group["lr_scale"] * scale
        own["lr_scale"] = scale
    return own


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _converted(
    model: nn.Module, optimized: nn.Module, name: str, states: Mapping[Any, dict[str, Any]]
) -> dict[str, Any]:
    """State of a parameter of an exchanged layer; empty where there is no way."""
    place, _, own = name.rpartition(".")
    old, new = submodule(model, place), submodule(optimized, place)
    conv = _convolution(model, place)
    if isinstance(new, Layer) and conv is not None:
        source = {
            k: v.flatten(1) if isinstance(v, Tensor) and v.dim() > 2 else v
            for k, v in states.get(conv.weight, {}).items()
        }
        return _mapped(source, lambda v, square: new.from_dense_gradient(v, square).get(own))
    if isinstance(new, Layer) and type(old) is nn.Linear:
        source = states.get(old.weight, {})
        return _mapped(source, lambda v, square: new.from_dense_gradient(v, square).get(own))
    if isinstance(old, Layer) and isinstance(new, nn.Linear) and own == "weight":
        held = {n: states.get(p, {}) for n, p in old.named_parameters(recurse=False)}
        first = next((s for n, s in held.items() if n != "bias" and s), {})

        def dense(key: str, square: bool) -> Tensor | None:
            values = {n: s[key] for n, s in held.items() if isinstance(s.get(key), Tensor)}
            return old.to_dense_gradient(values, square)

        found = {}
        for key, value in first.items():
            if key in _FIRST | _SECOND and isinstance(value, Tensor):
                made = dense(key, key in _SECOND)
                if made is None:
                    return {}
                found[key] = made
            elif key == "step":
                found[key] = _copied(value)
        return found
    return {}


def _convolution(model: nn.Module, place: str) -> Any:
    """The 1×1 convolution in whose place a `Pointwise` now holds the layer of this name."""
    outer = submodule(model, place.rpartition(".")[0])
    linear = outer is None or submodule(model, place) is not None
    return None if linear or outer is None or channels_of(outer) is None else outer


def _mapped(
    source: Mapping[str, Any], through: Callable[[Tensor, bool], Tensor | None]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in source.items():
        if key in _FIRST | _SECOND and isinstance(value, Tensor):
            made = through(value, key in _SECOND)
            if made is None:
                return {}
            found[key] = made
        elif key == "step":
            found[key] = _copied(value)
    return found
