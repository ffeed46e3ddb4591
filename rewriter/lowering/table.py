"""The table of rules: one line each, the algebra as its comment. A longer chain comes first."""

from __future__ import annotations

from rewriter.lowering.fused import ATTENTION, CONV, CONV_TRANSPOSE, JOINED, LINEAR_ACT
from rewriter.lowering.int8_convs import INT8_CONV, INT8_CONV_ACT, INT8_POINTWISE
from rewriter.lowering.integers import (
    INT8_ACT,
    INT8_ADD,
    INT8_JOINED,
    INT8_NORM,
    INT8_STATIC_ACT,
    INT8_STATIC_ADD,
    INT8_STATIC_JOINED,
    INT8_STATIC_NORM,
)
from rewriter.lowering.rules import Rule
from rewriter.modules.patterns import (
    activation,
    add,
    batch_norm,
    conv,
    conv_transpose,
    dropout,
    fan,
    layer_norm,
    linear,
    op,
)

__all__ = ["DEFAULT_RULES"]

int8_linear, int8_static_linear = op("int8_linear"), op("int8_static_linear")
int8_conv, pointwise_int8 = op("int8_conv"), op("pointwise_int8_linear")

DEFAULT_RULES = (
    # act(γ·(x·W + b − μ)/√(σ²+ε) + β) = act(x·W' + b'), W' = W·γ/√(σ²+ε), b' = (b−μ)·γ/√(σ²+ε) + β
    Rule(conv >> batch_norm >> activation, CONV),
    # the same without an activation
    Rule(conv >> batch_norm, CONV),
    # the same of a transposed convolution, whose output channels are the second dimension of W
    Rule(conv_transpose >> batch_norm >> activation, CONV_TRANSPOSE),
    Rule(conv_transpose >> batch_norm, CONV_TRANSPOSE),
    # act(x·Wᵀ + b), the activation on each tile of the product while that is in the cache
    Rule(linear >> activation, LINEAR_ACT),
    # softmax(q·kᵀ·scale + mask)·v, the scores of a few queries at a time in the cache
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
    # LayerNorm(s·(q(x)·Qᵀ)·scale + … + r) of an int8 layer, row by row while that is in the cache
    Rule(int8_linear >> dropout >> add >> layer_norm, INT8_NORM),
    Rule(int8_linear >> add >> layer_norm, INT8_NORM),
    # the same without the norm: s·(q(x)·Qᵀ)·scale + … + r
    Rule(int8_linear >> dropout >> add, INT8_ADD),
    Rule(int8_linear >> add, INT8_ADD),
    # act(s·(q(x)·Qᵀ)·scale + …), and one q(x) for all its readers
    Rule(int8_linear >> activation, INT8_ACT),
    Rule(fan(int8_linear), INT8_JOINED),
    # all of these with one range that is fixed, and the same one for all readers
    Rule(int8_static_linear >> dropout >> add >> layer_norm, INT8_STATIC_NORM),
    Rule(int8_static_linear >> add >> layer_norm, INT8_STATIC_NORM),
    Rule(int8_static_linear >> dropout >> add, INT8_STATIC_ADD),
    Rule(int8_static_linear >> add, INT8_STATIC_ADD),
    Rule(int8_static_linear >> activation, INT8_STATIC_ACT),
    Rule(fan(int8_static_linear), INT8_STATIC_JOINED),
)
"""The rules that `rewrite` applies, in this order; an operation is part of one place at most."""
