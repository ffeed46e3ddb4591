"""The passes: one file each."""

from rewriter.passes.densify import Densify
from rewriter.passes.floats import BFloat16Linear, Float8Linear
from rewriter.passes.monarch import Monarch, MonarchLinear
from rewriter.passes.monarchchain import MonarchChain, MonarchChainLinear
from rewriter.passes.monarchresidual import MonarchResidual, MonarchResidualLinear
from rewriter.passes.quadratic import Quadratic, QuadraticLinear
from rewriter.passes.quantize import Quantize, QuantizedLinear, QuantizedMonarch
from rewriter.passes.quantized_conv import QuantizedConv1d, QuantizedConv2d
from rewriter.passes.quantized_embedding import QuantizedEmbedding
from rewriter.passes.removeblocks import RemoveBlocks
from rewriter.passes.resizemlp import ResizeMLP
from rewriter.passes.topk import TopK, TopKLinear

__all__ = [
    "BFloat16Linear",
    "Densify",
    "Float8Linear",
    "Monarch",
    "MonarchChain",
    "MonarchChainLinear",
    "MonarchLinear",
    "MonarchResidual",
    "MonarchResidualLinear",
    "Quadratic",
    "QuadraticLinear",
    "Quantize",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedMonarch",
    "RemoveBlocks",
    "ResizeMLP",
    "TopK",
    "TopKLinear",
]
