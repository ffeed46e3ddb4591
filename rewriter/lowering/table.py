"""The table of rules: one line each, the algebra as its comment. A longer chain comes first."""

from __future__ import annotations

from dataclasses import replace

from rewriter.lowering.conv_chains import (
    CONVS,
    DEPTHWISE,
    INT8_CHAIN,
    INT8_CHAIN_ADD,
    INT8_DEPTHWISE,
    INTEGER_CONVS,
    POINTWISE,
    is_depthwise,
)
from rewriter.lowering.fused import (
    ATTENTION,
    CONV,
    CONV_TRANSPOSE,
    FLOAT32_ATTENTION,
    JOINED,
    LINEAR_ACT,
)
from rewriter.lowering.int8_attention import FLOAT32_INT8_ATTENTION, INT8_ATTENTION
from rewriter.lowering.int8_convs import INT8_CONV, INT8_CONV_ACT, INT8_POINTWISE
from rewriter.lowering.int8_monarchs import INT8_MONARCH_JOINED
from rewriter.lowering.integers import (
    INT8_ACT,
    INT8_ADD,
    INT8_ALONE,
    INT8_JOINED,
    INT8_MLP,
    INT8_MLP_ADD,
    INT8_MLP_NORM,
    INT8_MONARCH,
    INT8_NORM,
)
from rewriter.lowering.rules import Rule
from rewriter.lowering.sparse_experts import SPARSE_EXPERTS
from rewriter.lowering.sparse_gated import SPARSE_GATED
from rewriter.lowering.weights import WEIGHT_ALONE
from rewriter.modules.patterns import (
    activation,
    add,
    attend,
    batch_norm,
    conv,
    conv_transpose,
    dropout,
    fan,
    gated,
    layer_norm,
    linear,
    maybe,
    op,
)

__all__ = ["DEFAULT_RULES", "FLOAT32_RULES", "IN_GRAPHS"]

int8_linear, int8_static_linear = op("int8_linear"), op("int8_static_linear")
int8_monarch = op("int8_monarch_linear")
int8 = int8_linear | int8_static_linear | int8_monarch
int8_conv, pointwise_int8 = op(*INTEGER_CONVS), op("pointwise_int8_linear")
pad, any_conv, any_pointwise = op("pad"), op(*CONVS), op(*POINTWISE)
wide = any_pointwise >> maybe(batch_norm) >> maybe(activation)
deep = any_conv >> maybe(batch_norm) >> maybe(activation)

DEFAULT_RULES = (
    # W₂·act(depthwise(act(W₁·x))) + r over channels, a few rows of an image at a time; norms in the
    # scales and weights, zeros around what is convolved not written
    Rule(wide >> maybe(pad) >> deep >> wide >> add, INT8_CHAIN_ADD, is_depthwise),
    Rule(wide >> maybe(pad) >> deep >> wide, INT8_CHAIN, is_depthwise),
    # the same without the first product
    Rule(pad >> deep >> wide >> add, INT8_CHAIN_ADD, is_depthwise),
    Rule(deep >> wide >> add, INT8_CHAIN_ADD, is_depthwise),
    Rule(pad >> deep >> wide, INT8_CHAIN, is_depthwise),
    Rule(deep >> wide, INT8_CHAIN, is_depthwise),
    # without the second one
    Rule(wide >> maybe(pad) >> deep, INT8_CHAIN, is_depthwise),
    # act(γ·(depthwise(x) + b − μ)/√(σ²+ε) + β) by itself
    Rule(pad >> conv >> maybe(batch_norm) >> maybe(activation), DEPTHWISE, is_depthwise),
    Rule(conv >> maybe(batch_norm) >> maybe(activation), DEPTHWISE, is_depthwise),
    Rule(pad >> int8_conv >> maybe(batch_norm) >> maybe(activation), INT8_DEPTHWISE, is_depthwise),
    Rule(int8_conv >> maybe(batch_norm) >> maybe(activation), INT8_DEPTHWISE, is_depthwise),
    # act(γ·(x·W + b − μ)/√(σ²+ε) + β) = act(x·W' + b'), W' = W·γ/√(σ²+ε), b' = (b−μ)·γ/√(σ²+ε) + β
    Rule(conv >> batch_norm >> activation, CONV),
    # the same without an activation
    Rule(conv >> batch_norm, CONV),
    # the same of a transposed convolution, whose output channels are the second dimension of W
    Rule(conv_transpose >> batch_norm >> activation, CONV_TRANSPOSE),
    Rule(conv_transpose >> batch_norm, CONV_TRANSPOSE),
    # W₃·(act(W₁·x)_S ∘ (W₂·x)): of W₂ and W₃ what belongs to S
    Rule(gated(op("gate_linear"), linear), SPARSE_GATED),
    # the same of int8 weights
    Rule(gated(op("int8_gate_linear"), op("int8_weight_linear")), SPARSE_GATED),
    # the same of experts that a router picks, of all three; and W₂·act(W₁·x)_S
    Rule(gated(op("routed_linear"), linear), SPARSE_EXPERTS),
    Rule(op("routed_linear") >> activation >> maybe(dropout) >> linear, SPARSE_EXPERTS),
    # act(x·Wᵀ + b), the activation on each tile of the product while that is in the cache
    Rule(linear >> activation, LINEAR_ACT),
    # softmax(q·kᵀ·scale + mask)·v with [q k v] = s·(q(x)·Qᵀ)·scale + … of one input, one element of
    # the batch at a time
    Rule(attend(int8_linear), INT8_ATTENTION),
    Rule(attend(int8_static_linear), INT8_ATTENTION),
    # softmax(q·kᵀ·scale + mask)·v, the scores of a few queries at a time in the cache; q, k and v
    # in bfloat16 where they are results of products of 8-bit numbers
    Rule(op("scaled_dot_product_attention"), ATTENTION),
    # [y₁ y₂ …] = x·[W₁ W₂ …]ᵀ + [b₁ b₂ …]
    Rule(fan(linear), JOINED),
    # γ·(s·scale·(conv(q(x), Q)) + b − μ)/√(σ²+ε) + β: a scale for each output channel takes it in
    Rule(int8_conv >> batch_norm >> activation, INT8_CONV),
    Rule(int8_conv >> batch_norm, INT8_CONV),
    Rule(int8_conv >> activation, INT8_CONV_ACT),
    # the same of a 1×1 convolution, which is a linear layer over channels
    Rule(pointwise_int8 >> batch_norm >> activation, INT8_POINTWISE),
    Rule(pointwise_int8 >> batch_norm, INT8_POINTWISE),
    # LayerNorm(W₂·act(W₁·x) + r) of two int8 layers, rows at a time while they are in the cache
    Rule(int8 >> activation >> int8 >> dropout >> add >> layer_norm, INT8_MLP_NORM),
    Rule(int8 >> activation >> int8 >> add >> layer_norm, INT8_MLP_NORM),
    # the same without the norm, and without the sum
    Rule(int8 >> activation >> int8 >> dropout >> add, INT8_MLP_ADD),
    Rule(int8 >> activation >> int8 >> add, INT8_MLP_ADD),
    Rule(int8 >> activation >> int8, INT8_MLP),
    # LayerNorm(s·(q(x)·Qᵀ)·scale + … + r) of one
    Rule(int8 >> dropout >> add >> layer_norm, INT8_NORM),
    Rule(int8 >> add >> layer_norm, INT8_NORM),
    # the same without the norm: s·(q(x)·Qᵀ)·scale + … + r
    Rule(int8 >> dropout >> add, INT8_ADD),
    Rule(int8 >> add, INT8_ADD),
    # act(s·(q(x)·Qᵀ)·scale + …), and one q(x) for all its readers
    Rule(int8 >> activation, INT8_ACT),
    Rule(fan(int8_linear), INT8_JOINED),
    Rule(fan(int8_static_linear), INT8_JOINED),
    # [L₁; L₂ …]·q([R₁ R₂ …]·q(x)): Monarch layers of one input are one of all their output blocks
    Rule(fan(int8_monarch), INT8_MONARCH_JOINED),
    # both products of one in a single call
    Rule(int8_monarch, INT8_MONARCH),
    # a product behind which nothing stands that it could take in, past the dispatcher
    Rule(int8_linear, INT8_ALONE),
    Rule(int8_static_linear, INT8_ALONE),
)
"""The rules that `rewrite` applies, in this order; an operation is part of one place at most."""

_FLOAT32 = {ATTENTION.name: FLOAT32_ATTENTION, INT8_ATTENTION.name: FLOAT32_INT8_ATTENTION}
FLOAT32_RULES = tuple(
    replace(rule, fused=_FLOAT32.get(rule.fused.name, rule.fused)) for rule in DEFAULT_RULES
)
"""The same, with all of attention in float32, also between layers of 8 bits."""

IN_GRAPHS = (
    # the same, where a layer's own way of calling it is as fast
    Rule(int8, INT8_ALONE),
    # x·wᵀ + b with w of 8 or 4 bits, the same
    Rule(op("int8_weight_linear") | op("int4_linear"), WEIGHT_ALONE),
)
"""Further rules where a compiler traces the lowered graph: it calls no Python then."""
