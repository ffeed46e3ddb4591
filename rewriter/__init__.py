"""A compiler-style rewriter of PyTorch models over torch.fx.

`optimized = rewrite(model, passes=[...], example_inputs=batch)`; `optimized.report` is the ledger.
"""

from rewriter.api import explain, export, plan_memory, rewrite
from rewriter.base import Layer, LinearLayer, Pass, Phase, Replacement, Skip
from rewriter.compiler import backend
from rewriter.compiler.ledgers import last_reports, report_of
from rewriter.compiler.packaging import Exported
from rewriter.cost import Cost, Device
from rewriter.edits import Edit, Keep, Remove, Replace, Resize, View
from rewriter.errors import (
    CalibrationError,
    CaptureError,
    OptionError,
    PassError,
    PlanError,
    RewriteError,
    RewriteWarning,
    SignatureError,
    StoreError,
    VerifyError,
)
from rewriter.planner import MemoryBudget
from rewriter.report import Report
from rewriter.sites import ACTIVATION, CONV, EMBEDDING, LINEAR, MLP, Site
from rewriter.store import RewrittenModule, from_pretrained, load, load_original, save
from rewriter.store.old_names import find_moved
from rewriter.training.optimizers import param_groups, remap_optimizer
from rewriter.training.recovery import Recovery, recover
from rewriter.training.sparsity import SparsityPenalty, TopKSchedule

__version__ = "0.5.0"

__all__ = [
    "ACTIVATION",
    "CONV",
    "EMBEDDING",
    "LINEAR",
    "MLP",
    "CalibrationError",
    "CaptureError",
    "Cost",
    "Device",
    "Edit",
    "Exported",
    "Keep",
    "Layer",
    "LinearLayer",
    "MemoryBudget",
    "OptionError",
    "Pass",
    "PassError",
    "Phase",
    "PlanError",
    "Remove",
    "Replace",
    "Replacement",
    "Report",
    "Recovery",
    "Resize",
    "RewriteError",
    "RewriteWarning",
    "RewrittenModule",
    "SignatureError",
    "Site",
    "Skip",
    "SparsityPenalty",
    "StoreError",
    "TopKSchedule",
    "VerifyError",
    "View",
    "backend",
    "explain",
    "export",
    "from_pretrained",
    "last_reports",
    "load",
    "load_original",
    "param_groups",
    "plan_memory",
    "recover",
    "remap_optimizer",
    "report_of",
    "rewrite",
    "save",
]

find_moved()
