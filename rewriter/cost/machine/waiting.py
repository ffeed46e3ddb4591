"""How long threads of this process stood ready without a core: what other processes took."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["Waiting"]


class Waiting:
    """Σ over the threads that live now of the time they waited for a core.

    With several threads a core that is taken from one stops them all at the next barrier, often for
    milliseconds: a timing in which that happened says nothing about the call. Linux only; elsewhere
    it is always 0.
    """

    def __init__(self) -> None:
        self.files: list[int] = []
        for path in Path("/proc/self/task").glob("*/schedstat"):
            try:
                self.files.append(os.open(path, os.O_RDONLY))
            except OSError:  # the thread has ended, or the kernel keeps no such statistics
                continue

    def seconds(self) -> float:
        """Since the threads began."""
        total = 0
        for file in self.files:
            try:
                total += int(os.pread(file, 64, 0).split()[1])
            except (OSError, IndexError):  # the thread has ended
                continue
        return total * 1e-9

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files.clear()
