"""`Skip`: why something stays as it is, as a value."""

from __future__ import annotations

__all__ = ["Skip"]


class Skip:
    """Why a site stays as it is; the text is formatted only when it is read."""

    def __init__(self, reason: str, *values: object) -> None:
        self._reason, self._values = reason, values

    @property
    def reason(self) -> str:
        return self._reason.format(*self._values)

    def __repr__(self) -> str:
        return f"Skip({self.reason!r})"
