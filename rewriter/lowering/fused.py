"""The fused ops of the first rules, and what their weights are made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from rewriter.kernels import attention
from rewriter.kernels import linear_act as kernel
from rewriter.kernels.choice import fastest, rows_bucket
from rewriter.lowering.rules import Fused, Place
from rewriter.spellings import (
    activation_name,
    is_transparent,
    is_view,
    spelled,
    works_in_place,
)

__all__ = [
    "ATTENTION",
    "CONV",
    "CONV_TRANSPOSE",
    "FLOAT32_ATTENTION",
    "JOINED",
    "LINEAR_ACT",
    "joined_bias",
    "norm_of",
    "not_joined",
]

_CONVS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
)  # fmt: skip


# convolution and batch norm ----------------------------------------------------------------------


def conv_act(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any, dilation: Any, groups: int,
    around: Sequence[int] | None, how: str, activation: str | None,
) -> Tensor:  # fmt: skip
    """act(conv(x, W) + b); the activation overwrites what the convolution made."""
    if around is not None:
        x, padding = F.pad(x, around, mode=how), 0
    y = _CONVS[weight.dim() - 3](x, weight, bias, stride, padding, dilation, groups)
    return y if activation is None else kernel.act_(y, activation)


def conv_transpose_act(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any, dilation: Any, groups: int,
    output_padding: Any, activation: str | None,
) -> Tensor:  # fmt: skip
    """As `conv_act`, of a transposed convolution."""
    run = _TRANSPOSED[weight.dim() - 3]
    y = run(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return y if activation is None else kernel.act_(y, activation)


def folded(place: Place) -> tuple[Tensor, Tensor]:
    """W' = W·γ/√(σ²+ε), b' = (b − μ)·γ/√(σ²+ε) + β, per output channel.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", eq. 14.
    """
    conv, norm = place.modules[:2]
    weight = conv.weight
    scale, bias = norm_of(norm, conv.bias)
    shape = [-1] + [1] * (weight.dim() - 1)
    if conv.transposed:  # [in, out/groups, …]
        groups, rows = conv.groups, weight.shape[0] // conv.groups
        scale = scale.view(groups, 1, -1).expand(groups, rows, -1).reshape(weight.shape[0], -1)
        shape = [*scale.shape] + [1] * (weight.dim() - 2)
    factor = scale.to(weight.dtype).view(shape)
    return weight * factor, bias.to(weight.dtype)


def norm_of(norm: Any, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """γ/√(σ²+ε) and (b − μ)·γ/√(σ²+ε) + β of a batch norm behind a layer, in float64.

    Args:
        norm: the batch norm.
        bias: b.
    """
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = (0 if bias is None else bias.double()) - norm.running_mean.double()
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    return scale, shift


def _activation(place: Place) -> str | None:
    """The activation at the end of a chain of three."""
    nodes = place.match.nodes
    return activation_name(nodes[2], place.root) if len(nodes) > 2 else None


def _conv_constants(place: Place) -> tuple[Any, ...]:
    conv = place.modules[0]
    around = None
    if conv.padding_mode != "zeros":
        around = tuple(conv._reversed_padding_repeated_twice)
    given = conv.stride, conv.padding, conv.dilation, conv.groups
    return (*given, around, conv.padding_mode, _activation(place))


def _transpose_constants(place: Place) -> tuple[Any, ...]:
    conv = place.modules[0]
    given = conv.stride, conv.padding, conv.dilation, conv.groups
    return (*given, conv.output_padding, _activation(place))


def _no_conv(place: Place) -> str | None:
    conv = place.modules[0]
    x = place.input
    if isinstance(x, Tensor) and x.dim() != conv.weight.dim():
        return "the input is one sample without a batch, which batch norm reads otherwise"
    return _no_activation(place, 2)


def _no_activation(place: Place, at: int) -> str | None:
    nodes = place.match.nodes
    if len(nodes) > at and activation_name(nodes[at], place.root) is None:
        return f"the options of the activation {nodes[at].name} are none that a fused op has"
    return None


CONV = Fused("conv_act", conv_act, folded, _conv_constants, _no_conv)
CONV_TRANSPOSE = Fused(
    "conv_transpose_act", conv_transpose_act, folded, _transpose_constants, _no_conv
)


# linear and activation ---------------------------------------------------------------------------


def _weight(layer: Any) -> Tensor:
    """[out, in]; transformers' Conv1D has it the other way round."""
    weight: Tensor = layer.weight
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _packed(place: Place) -> tuple[Tensor | None, ...]:
    layer = place.modules[0]
    weight = _weight(layer)
    bias = None if layer.bias is None else layer.bias.detach()
    return weight.detach(), kernel.pack(weight), bias


def _act_constants(place: Place) -> tuple[str | None]:
    return (activation_name(place.match.nodes[1], place.root),)


def _no_epilogue(place: Place) -> str | None:
    if (reason := _no_activation(place, 1)) is not None:
        return reason
    name = activation_name(place.match.nodes[1], place.root)
    assert name is not None
    return kernel.refusal(place.modules[0].weight, name)


def _slow_epilogue(place: Place, x: Tensor) -> str | None:
    weight = _weight(place.modules[0])
    rows, name = (
        x.numel() // max(weight.shape[1], 1),
        activation_name(place.match.nodes[1], place.root),
    )
    assert name is not None
    if not rows or kernel.pick(rows, weight.shape[1], weight.shape[0], name) != "onednn":
        return f"torch's own product is the fastest here on {rows} rows"
    return None


LINEAR_ACT = Fused(
    "linear_act", kernel.linear_act, _packed, _act_constants, _no_epilogue, _slow_epilogue
)


# linears that read one input ---------------------------------------------------------------------

_LEAD = 0.1
"""By which share one product must beat the single ones: its copy of the weights costs memory."""


def joined_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    """x·[W₁ W₂ …]ᵀ + [b₁ b₂ …], cut into the single results."""
    # no views to autograd: what follows may write them in place, with gradients too
    pieces = torch.unsafe_split_with_sizes(F.linear(x, weight, bias), list(sizes), -1)
    return tuple(pieces)


def _joined(place: Place) -> tuple[Tensor, Tensor | None]:
    weights = [_weight(m) for m in place.modules]
    return torch.cat(weights), joined_bias(place, weights)


def joined_bias(place: Place, tensors: Sequence[Tensor]) -> Tensor | None:
    """[b₁ b₂ …], zeros for a layer without; None where none has one.

    Args:
        place: the layers.
        tensors: one of each layer, [out, …], of its bias's dtype and device.
    """
    if all(m.bias is None for m in place.modules):
        return None
    given = zip(place.modules, tensors, strict=True)
    return torch.cat([t.new_zeros(len(t)) if m.bias is None else m.bias for m, t in given])


def _sizes(place: Place) -> tuple[tuple[int, ...]]:
    return (tuple(len(_weight(m)) for m in place.modules),)


def _not_joined(place: Place) -> str | None:
    weights = [_weight(m) for m in place.modules]
    if len({(w.dtype, w.device) for w in weights}) > 1:
        return "the weights differ in dtype or device"
    return not_joined(place)


def not_joined(place: Place) -> str | None:
    """Why calls that read one value cannot become one: what happens between them and to their
    results; None where they can."""
    nodes = place.match.nodes
    order = list(nodes[0].graph.nodes)
    between = order[order.index(nodes[0]) : order.index(nodes[-1])]
    writing = next((n for n in between if works_in_place(n, place.root)), None)
    if writing is not None:
        return f"{writing.name} writes in place between the products"
    given = next((n for n in nodes if _is_given_out(n, place.root)), None)
    if given is not None:
        return f"the model returns {given.name}, which would be a piece of all of them in memory"
    return None


def _is_given_out(node: Node, root: nn.Module) -> bool:
    """Whether a node's result, or a view of it, is what the graph returns."""
    return any(
        user.op == "output" or (is_view(user, root) and _is_given_out(user, root))
        for user in node.users
    )


def _slow_joined(place: Place, x: Tensor) -> str | None:
    weights, device = [_weight(m) for m in place.modules], x.device
    width, (sizes,) = weights[0].shape[1], _sizes(place)
    rows = rows_bucket(x.numel() // max(width, 1))
    bias = any(m.bias is not None for m in place.modules)
    key = f"{x.dtype} {device.type} {rows}x{width}x{sizes} {bias} {torch.get_num_threads()}"

    def candidates() -> dict[str, Callable[[], object]]:
        given = torch.ones(rows, width, dtype=x.dtype, device=device)
        parts = [torch.ones(n, width, dtype=x.dtype, device=device) for n in sizes]
        biases = [given.new_ones(n) if bias else None for n in sizes]
        one, added = torch.cat(parts), given.new_ones(sum(sizes)) if bias else None
        single = list(zip(parts, biases, strict=True))
        return {
            "single": lambda: _done([F.linear(given, w, b) for w, b in single]),
            "joined": lambda: _done(joined_linear(given, one, added, sizes)),
        }

    if fastest(key, "joined_linear 1", candidates, _LEAD) == "joined":
        return None
    return f"one product for {len(sizes)} is no faster here on {rows} rows"


def _done(results: Sequence[Tensor]) -> None:
    """Waits for the device, or a time would be that of the launches."""
    if results[0].device.type == "cuda":
        torch.cuda.synchronize(results[0].device)


JOINED = Fused("joined_linear", joined_linear, _joined, _sizes, _not_joined, _slow_joined)


# attention ---------------------------------------------------------------------------------------


_ATTENTION = tuple(inspect.signature(attention.attention).parameters)


def _unknown_options(place: Place) -> str | None:
    call = place.match.nodes[0]
    given = dict(zip(_ATTENTION, call.args, strict=False)) | call.kwargs
    strange = set(given) - set(_ATTENTION)
    return f"it is called with {', '.join(sorted(strange))}" if strange else None


def _slow_attention(
    place: Place,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    bf16: bool | None = None,
    **options: Any,
) -> str | None:
    why = attention.refusal(query, key, value, attn_mask, is_causal, dropout_p)
    bf16 = _runs_bf16(place) if bf16 is None else bf16
    if why is None and attention.pick(query, key, attn_mask, is_causal, bf16) != "native":
        why = f"torch's own is no slower here on {query.shape[2]} queries and {key.shape[2]} keys"
    return why


def _no_tensors(place: Place) -> tuple[()]:
    return ()


_IN_EIGHT_BITS = {
    "int4_dynamic_linear",
    "int8_linear",
    "int8_monarch_linear",
    "int8_static_linear",
}
_BF16_ERROR = 0.02
"""Of a mean of values whose weights, and which themselves, are rounded to 8 significant bits."""


def _allows_bf16(place: Place) -> bool:
    """Whether queries, keys and values are results of products of 8-bit numbers: bfloat16 rounds
    them by less than those were rounded by."""
    call = place.match.nodes[0]
    given = dict(zip(_ATTENTION, call.args, strict=False)) | call.kwargs
    return all(_is_quantized(given.get(n), place.root) for n in ("query", "key", "value"))


def _is_quantized(value: Any, root: nn.Module) -> bool:
    """Whether a value is, seen another way or moved, the result of such a product."""
    while isinstance(value, Node) and is_transparent(value, root) and value.args:
        value = value.args[0]
    return isinstance(value, Node) and spelled(value, root) in _IN_EIGHT_BITS


def _runs_bf16(place: Place) -> bool:
    return _allows_bf16(place) and attention.bf16_unavailable() is None


def _attention_options(place: Place) -> dict[str, bool]:
    return {"bf16": True} if _allows_bf16(place) else {}


def _attention_error(place: Place) -> float:
    return _BF16_ERROR if _runs_bf16(place) else 0.0


def _slow_in_float32(place: Place, *operands: Any, **options: Any) -> str | None:
    return _slow_attention(place, *operands, **options, bf16=False)


ATTENTION = Fused(
    "attention",
    attention.attention,
    _no_tensors,
    unless=_unknown_options,
    slower=_slow_attention,
    bind=attention.bound,
    options=_attention_options,
    error=_attention_error,
)
FLOAT32_ATTENTION = Fused(
    "attention",
    attention.attention,
    _no_tensors,
    unless=_unknown_options,
    slower=_slow_in_float32,
    bind=attention.bound,
)
