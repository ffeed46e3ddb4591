"""The ledger that every rewrite returns."""

from rewriter.report.entries import CallForm
from rewriter.report.ledger import CaptureInfo, Decision, Island, Report, Step, Timeline
from rewriter.report.schemas import schema

__all__ = ["CallForm", "CaptureInfo", "Decision", "Island", "Report", "Step", "Timeline", "schema"]
