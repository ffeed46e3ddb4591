"""Passes and layers of other packages, as these list them among their entry points.

    [project.entry-points."rewriter.passes"]     # names for the command line and for `options`
    lowrank = "theirs.lowrank:LowRank"

    [project.entry-points."rewriter.layers"]     # what a saved model may name, as may the above
    LowRankLinear = "theirs.lowrank:LowRankLinear"

What is imported is what an installed package lists, never what a recipe or a command line names.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rewriter.base import Layer, Pass
from rewriter.errors import OptionError

__all__ = ["listed", "loaded", "of_class", "said"]

GROUPS: dict[type, str] = {Pass: "rewriter.passes", Layer: "rewriter.layers"}


def listed(base: type) -> list[EntryPoint]:
    """What installed packages list of `Pass` or of `Layer`; of one that lists it twice, once."""
    found = {(e.name, e.value): e for e in entry_points(group=GROUPS[base])}
    return [found[key] for key in sorted(found)]


def of_class(name: str, base: type) -> Any:
    """The class of this dotted name, if an entry point lists exactly it; else None.

    Raises:
        OptionError: it is listed, and cannot be had.
    """
    entry = next((e for e in listed(base) if f"{e.module}.{e.attr}" == name), None)
    return None if entry is None else loaded(entry, base)


def loaded(entry: EntryPoint, base: type) -> Any:
    """The class that an entry point names.

    Raises:
        OptionError: it cannot be imported, or does not derive from `base`.
    """
    try:
        found = entry.load()
    except Exception as error:
        raise OptionError(
            f"{said(entry)} cannot be imported ({type(error).__name__}: {error}): mend that "
            "package or uninstall it"
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        what = base.__name__
        raise OptionError(
            f"{said(entry)} is no {what.lower()}: it must derive from rewriter.{what}"
        )
    return found


def said(entry: EntryPoint) -> str:
    """The entry point as an error names it: with the package that lists it."""
    package = "" if entry.dist is None else f" of {entry.dist.name}"
    return f"the entry point {entry.name} = {entry.value!r}{package}"
