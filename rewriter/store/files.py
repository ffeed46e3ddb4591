"""The files of a save: what they are called, who may touch them when, and how they are opened.

A save is `recipe.json` and the weights file that it names. Weights files are called by their
content and never change; the recipe takes the place of the one before as a whole, last of all. So a
reader who has opened the weights that a recipe names has an old or a new save, whoever writes.
Writers take turns by a lock on the directory, and the one who holds it takes away what no recipe
names: files of our own names, in this directory, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

from rewriter.errors import StoreError
from rewriter.recipe.names import RECIPE

__all__ = [
    "LARGEST_RECIPE",
    "collect",
    "drafted",
    "is_weights",
    "locked",
    "named_weights",
    "opened",
    "put_file",
    "recipe_text",
    "version_of",
]

LARGEST_RECIPE = 32 << 20
"""Bytes of a recipe; read into Python objects it takes some thirty times that."""

_WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
_DRAFT = re.compile(r"\.rewriter-[0-9a-f]{32}\.tmp")
_PATIENCE = 600.0  # seconds that a writer waits for another
_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


# reading


def is_weights(name: object) -> bool:
    """Whether `save` calls a weights file so: anything else that a recipe names is not touched."""
    return isinstance(name, str) and _WEIGHTS.fullmatch(name) is not None


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A regular file (links are followed), to read; a pipe or a device is neither waited for nor
    read.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    # a pipe without a writer would wait for one in `open`
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _CLOSED_ON_EXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield file


_CLOSED_ON_EXEC: int = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def recipe_text(directory: pathlib.Path) -> str:
    """The recipe of a save.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or not UTF-8.
    """
    with opened(directory / RECIPE) as file:
        data = file.read(LARGEST_RECIPE + 1)
    if len(data) > LARGEST_RECIPE:
        raise ValueError(f"it is larger than {LARGEST_RECIPE >> 20} MiB")
    return data.decode("utf-8")


def version_of(directory: pathlib.Path) -> object:
    """Differs once another save has taken the place of the one here; None where there is none."""
    try:
        now = os.stat(directory / RECIPE)
    except OSError:
        return None
    return now.st_ino, now.st_mtime_ns, now.st_size


def named_weights(directory: pathlib.Path) -> str | None:
    """Name of the weights file of the save that is here; None where there is no save.

    Raises:
        OSError: the recipe cannot be read.
        StoreError: what is here is no save of this package.
    """
    try:
        document: Any = json.loads(recipe_text(directory))
        named = document["weights"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        named = None
    if not is_weights(named):
        raise StoreError(
            f"{directory / RECIPE} is not a save of this package: choose another directory or "
            "remove it"
        )
    return str(named)


# writing


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[bool]:
    """The right to write a save, which one writer has at a time; it ends with the process.

    Yields:
        Whether it is held: some file systems know no locks, and there two writers must not meet.

    Raises:
        StoreError: another writer holds it for ten minutes.
    """
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline, held = time.monotonic() + _PATIENCE, False
        while not held:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    break
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
                    raise
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"cannot write {directory}: another process has been saving there for "
                        f"{_PATIENCE / 60:.0f} minutes; end it, or choose another directory"
                    ) from None
                time.sleep(0.01)
        yield held
    finally:
        with contextlib.suppress(OSError):  # where there are no locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile has it too
        os.close(descriptor)


@contextlib.contextmanager
def drafted(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name to write under before the file takes its place, in a folder of its own: those who
    write it may have drafts too. Nothing is left of it."""
    folder = directory / f".rewriter-{uuid.uuid4().hex}.tmp"
    folder.mkdir()
    try:
        yield folder / "draft"
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what stays, the next save takes away


def put_file(draft: pathlib.Path, path: pathlib.Path) -> None:
    """The draft takes its place, once and for all: it is on the disk before, and so is the name
    before anything that comes after.

    Raises:
        OSError: it cannot.
    """
    # safetensors writes for the owner's eyes alone; the folder has the rights that he gives
    os.chmod(draft, draft.parent.stat().st_mode & 0o666)
    with open(draft, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)
    if sys.platform != "win32":  # which cannot open directories
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def collect(directory: pathlib.Path, named: str) -> None:
    """Takes away drafts that killed writers left, and weights that no recipe names any more; for
    the writer that holds the lock."""
    with os.scandir(directory) as found:
        stale = [
            entry.path
            for entry in found
            if _DRAFT.fullmatch(entry.name)
            or (_WEIGHTS.fullmatch(entry.name) and entry.name != named)
        ]
    for path in stale:
        with contextlib.suppress(OSError):  # left over, and harmless
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode):
                shutil.rmtree(path)
            elif stat.S_ISREG(mode):
                os.unlink(path)
