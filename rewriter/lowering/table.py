"""The table of rules: one line each, the algebra as its comment. A longer chain comes first."""

from __future__ import annotations

from rewriter.lowering.fused import CONV, CONV_TRANSPOSE, JOINED, LINEAR_ACT
from rewriter.lowering.integers import (
    INT8_ACT,
    INT8_JOINED,
    INT8_STATIC_ACT,
    INT8_STATIC_JOINED,
)
from rewriter.lowering.rules import Rule
from rewriter.modules.patterns import (
    activation,
    batch_norm,
    conv,
    conv_transpose,
    fan,
    linear,
    op,
)

__all__ = ["DEFAULT_RULES"]

int8_linear, int8_static_linear = op("int8_linear"), op("int8_static_linear")

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
    # [y₁ y₂ …] = x·[W₁ W₂ …]ᵀ + [b₁ b₂ …]
    Rule(fan(linear), JOINED),
    # the same two of an int8 layer: act(s·(q(x)·Qᵀ)·scale + …), and one q(x) for all its readers
    Rule(int8_linear >> activation, INT8_ACT),
    Rule(fan(int8_linear), INT8_JOINED),
    # the same two with one range that is fixed, and the same one for all readers
    Rule(int8_static_linear >> activation, INT8_STATIC_ACT),
    Rule(fan(int8_static_linear), INT8_STATIC_JOINED),
)
"""The rules that `rewrite` applies, in this order; an operation is part of one place at most."""
