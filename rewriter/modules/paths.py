"""`path_of`: a file or directory that the user names."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from rewriter.errors import OptionError, StoreError

__all__ = ["path_of"]


def path_of(given: Any, what: str) -> Path:
    """`given` as a path; whether anything is there, and whether it may be read or written, its
    user finds out.

    Args:
        given: a text or an `os.PathLike` of one.
        what: it is of, for messages: "directory".

    Raises:
        OptionError: it is something else.
        StoreError: no file can be called so: the name is too long, or holds a zero byte or half a
            character.
    """
    try:
        path = Path(given)
    except TypeError as error:
        raise OptionError(f"{what}={given!r}: give a path, as a text or a Path") from error
    try:
        os.stat(path)
    except ValueError as error:
        raise StoreError(f"{what}={str(path)!r}: no file can be called so: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}…"
            raise StoreError(f"{what}={shown!r}: {error.strerror}") from error
    return path
