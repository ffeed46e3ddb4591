"""The ledger that every rewrite returns."""

from rewriter.report.ledger import CaptureInfo, Decision, Island, Report, Step

__all__ = ["CaptureInfo", "Decision", "Island", "Report", "Step"]
