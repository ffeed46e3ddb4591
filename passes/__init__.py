"""The passes: one file each."""

from rewriter.passes.densify import Densify
from rewriter.passes.experts import Experts, RoutedLinear
from rewriter.passes.floats import BFloat16Linear, Float8Linear
from rewriter.passes.monarch import Monarch, MonarchLinear
from rewriter.passes.monarchchain import MonarchChain, MonarchChainLinear
from rewriter.passes.monarchresidual import MonarchResidual, MonarchResidualLinear
from rewriter.passes.qat import QAT
from rewriter.passes.quadratic import Quadratic, QuadraticLinear
from rewriter.passes.quantize import Quantize
from rewriter.passes.quantized_conv import Int4Conv1d, Int4Conv2d, QuantizedConv1d, QuantizedConv2d
from rewriter.passes.quantized_embedding import Int4Embedding, QuantizedEmbedding
from rewriter.passes.quantized_linear import QuantizedLinear
from rewriter.passes.quantized_monarch import QuantizedMonarch
from rewriter.passes.reluify import Reluify, SparseReLU
from rewriter.passes.removeblocks import RemoveBlocks
from rewriter.passes.resizemlp import ResizeMLP
from rewriter.passes.sparse_weight_only import Int8GateLinear, SparseInt4Linear, SparseInt8Linear
from rewriter.passes.sparsegate import GateLinear, SparseGate
from rewriter.passes.static_int8 import StaticOutlierLinear, StaticQuantizedLinear
from rewriter.passes.threshold import Threshold
from rewriter.passes.threshold_linear import ThresholdLinear
from rewriter.passes.topk import TopK, TopKActivation, TopKLinear
from rewriter.passes.trained import TrainedLinear
from rewriter.passes.trained_conv import TrainedConv1d, TrainedConv2d
from rewriter.passes.weight_only import Int4Linear, Int8WeightLinear

__all__ = [
    "QAT",
    "BFloat16Linear",
    "Densify",
    "Experts",
    "Float8Linear",
    "GateLinear",
    "Int4Conv1d",
    "Int4Conv2d",
    "Int4Embedding",
    "Int4Linear",
    "Int8GateLinear",
    "Int8WeightLinear",
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
    "Reluify",
    "RemoveBlocks",
    "ResizeMLP",
    "RoutedLinear",
    "SparseGate",
    "SparseInt4Linear",
    "SparseInt8Linear",
    "SparseReLU",
    "StaticOutlierLinear",
    "StaticQuantizedLinear",
    "Threshold",
    "ThresholdLinear",
    "TopK",
    "TopKActivation",
    "TopKLinear",
    "TrainedConv1d",
    "TrainedConv2d",
    "TrainedLinear",
]
