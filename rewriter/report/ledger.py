"""`Report`: the ledger of a rewrite, printed as text, Markdown or one HTML page.

What it cost before and after each step, and why each site is as it is. The figures are in
`rewriter.report.data`; `rewriter.report.render` and `rewriter.report.html` write them out.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rewriter.errors import OptionError, StoreError
from rewriter.modules.paths import path_of
from rewriter.report import render
from rewriter.report.data import Ledger
from rewriter.report.entries import CaptureInfo, Decision, Island, Step, Timeline

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["CaptureInfo", "Decision", "Island", "Report", "Step", "Timeline"]


@dataclass
class Report(Ledger):
    """The whole ledger. `print(report)` is readable at 100 columns; `rich.print` adds colour."""

    def to_markdown(self) -> str:
        return render.markdown(self)

    def to_html(self) -> str:
        """One page that needs nothing else: tables, plots, no network."""
        from rewriter.report.html import page  # matplotlib takes a second to import

        return page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as its suffix says: .html, .json, .md or .txt. The file is there whole
        or not at all.

        Raises:
            OptionError: another suffix.
            StoreError: the file cannot be written.
        """
        path = path_of(path, "path")
        writers = {
            ".html": self.to_html,
            ".json": self.to_json,
            ".md": self.to_markdown,
            ".txt": self.__str__,
        }
        write = writers.get(path.suffix.lower())
        if write is None:
            raise OptionError(
                f"cannot save a report as {path.name!r}: the suffix must be one of "
                f"{', '.join(writers)}"
            )
        self.write(path, write())

    @staticmethod
    def write(path: Path, text: str) -> None:
        """Writes one text: the file is there whole or not at all.

        Raises:
            StoreError: the file cannot be written.
        """
        text = text.rstrip("\n") + "\n"
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            try:
                draft.write_text(text, encoding="utf-8", errors="backslashreplace")
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot write the report to {path}: {error.strerror or error}. Give a file in a "
                f"directory that exists and that you may write to"
            ) from error

    def __str__(self) -> str:
        return render.text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from render.blocks(self)

    def _repr_html_(self) -> str:
        return render.html(self)
