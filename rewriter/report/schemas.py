"""The JSON Schema of a stored report."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

__all__ = ["schema"]


def schema() -> dict[str, Any]:
    """What `Report.to_json` writes, as a JSON Schema (draft 2020-12) that leaves no field open."""
    text = files("rewriter.report").joinpath("schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
