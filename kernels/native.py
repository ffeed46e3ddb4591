"""C++ kernels: compiled once on the machine that runs them, kept on disk, loaded with ctypes.

The kernels use what this CPU has (`-march=native`), which no wheel could. Without a compiler, or
where one fails, nothing breaks: `library` raises `Unavailable` with the reason, and the caller's
plain-torch path runs. `REWRITER_NATIVE=0` asks for that.

A library's name holds a hash of its source and of the headers beside it, the compiler's version,
the flags and the CPU, so that a cache shared by machines or versions never serves the wrong one;
and a hash of its own bytes, so that what a crash or a full disk left of one is not loaded. It
appears by a rename: processes that compile at the same time replace each other's equal results.
What is loaded runs in this process: the folder and the file must be this user's (or root's), and
writable by nobody else.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
import torch

__all__ = [
    "Unavailable",
    "archive",
    "cache_folder",
    "fields",
    "fingerprint",
    "library",
    "parallel",
    "shared",
    "threads_for",
    "why_not",
]

_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 300  # seconds; it takes about 7
_USERS = Path(platformdirs.user_cache_dir("rewriter"))


class Unavailable(Exception):
    """A compiled kernel cannot be had on this machine; the message says why."""


def fields(pointers: str, sizes: str) -> list[tuple[str, Any]]:
    """Of a `ctypes.Structure`: addresses, then whole numbers of 64 bits, by their names."""
    own: list[tuple[str, Any]] = [(name, ctypes.c_void_p) for name in pointers.split()]
    return own + [(name, ctypes.c_int64) for name in sizes.split()]


def why_not(load: Callable[[], object]) -> str | None:
    """Why what loads a compiled kernel cannot; None where it can."""
    try:
        load()
    except Unavailable as error:
        return str(error)
    return None


def cache_folder() -> Path:
    """Of kernels: under `$REWRITER_CACHE`, else under "rewriter" in the user's cache folder."""
    given = os.environ.get("REWRITER_CACHE")
    return Path(given or _USERS) / "kernels"


def library(source: Path) -> ctypes.CDLL:
    """The library compiled from one C++ file.

    Raises:
        Unavailable: no compiler, it failed, or the result does not load.
    """

    def make(compiler: str, to: Path) -> None:
        _compile([compiler, *_flags(), "-shared", str(source), "-o", str(to)])

    return _loaded(f"{source.stem}-{_key(source)}", make)


def archive(name: str, sources: Sequence[Path], *flags: str) -> Path:
    """The objects compiled from C++ files, for compiled code to be linked with.

    Args:
        name: of the file.
        sources: beside each other.
        flags: further ones of the compiler.

    Raises:
        Unavailable: no compiler, it failed, or there is nowhere to keep the file.
    """

    def make(compiler: str, to: Path) -> None:
        objects = [to.with_name(f"{source.stem}.o") for source in sources]
        hidden = [*_flags(), "-fvisibility=hidden", *flags, "-c"]
        for source, made in zip(sources, objects, strict=True):
            _compile([compiler, *hidden, str(source), "-o", str(made)])
        _compile(["ar", "rcs", str(to), *map(str, objects)])

    if (folder := _own_folder()) is None:
        raise Unavailable(f"{cache_folder()} cannot be written to, and nothing else keeps it")
    return _made(folder, f"lib{name}-{_key(*sources, flags=flags)}", ".a", make, Path)


def shared(objects: Path, *flags: str) -> ctypes.CDLL:
    """The library of all that is in an `archive`, loaded.

    Args:
        objects: the archive.
        flags: of the linker, behind it.

    Raises:
        Unavailable: no compiler, it failed, or the result does not load.
    """

    def make(compiler: str, to: Path) -> None:
        whole = ["-Wl,--whole-archive", str(objects), "-Wl,--no-whole-archive"]
        _compile([compiler, "-shared", *whole, *flags, "-o", str(to)])

    return _loaded(f"{objects.stem}-{_hash(*flags)}", make)


_Make = Callable[[str, Path], None]
"""(compiler, to): makes a file."""
_T = TypeVar("_T")


def _loaded(name: str, make: _Make) -> ctypes.CDLL:
    """The library of this name, from the cache or made."""
    return _made(_own_folder(), name, ".so", make, lambda kept: ctypes.CDLL(str(kept)))


def _made(
    folder: Path | None, name: str, suffix: str, make: _Make, opened: Callable[[Path], _T]
) -> _T:
    """The file of this name as it is opened: kept in a folder, or made there. Where nothing keeps
    it, it is deleted when it is opened: a library is mapped still."""
    for kept in [] if folder is None else folder.glob(f"{name}-*{suffix}"):
        if (found := _kept(kept, name, opened)) is not None:
            return found
    try:
        with tempfile.TemporaryDirectory(dir=folder) as made_in:
            made = Path(made_in) / f"{name}{suffix}"
            make(_compiler(), made)
            made.chmod(0o700)
            kept = (folder or Path(made_in)) / f"{name}-{_digest(made)}{suffix}"
            _on_disk(made)
            os.replace(made, kept)
            return opened(kept)
    except OSError as error:
        raise Unavailable(f"the compiled kernel does not load: {error}") from error


def _key(*sources: Path, flags: Sequence[str] = ()) -> str:
    """Of all that decides what comes of sources.

    Raises:
        Unavailable: kernels are switched off, or there is no compiler.
    """
    if os.environ.get("REWRITER_NATIVE") == "0":
        raise Unavailable("switched off by REWRITER_NATIVE=0")
    headers = sorted(sources[0].parent.glob("*.h"))
    texts = [f.read_bytes().decode() for f in (*sources, *headers)]
    return _hash(*texts, _version(_compiler()), *_flags(), *flags, _cpu())


def _flags() -> list[str]:
    return ["-std=c++17", "-O3", _native(), "-fPIC"]


def _kept(path: Path, name: str, opened: Callable[[Path], _T]) -> _T | None:
    """A file as it is opened, where it is whole and nobody else's; else it is deleted."""
    try:
        if _is_safe(path) and path.stem == f"{name}-{_digest(path)}":
            return opened(path)
        path.unlink(missing_ok=True)
    except OSError:  # of another system, or another process was faster: made anew
        return None
    return None


def _own_folder() -> Path | None:
    """The cache folder, made where it is not there; in place of one that is another user's, that of
    this user; None where neither can be had."""
    for folder in (cache_folder(), _USERS / "kernels"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_safe(folder) and folder.stat().st_uid == os.getuid():
                folder.chmod(0o700)
            if _is_safe(folder) and os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    return None


def _is_safe(path: Path) -> bool:
    """Whether nobody but this user and root can have written it."""
    found = path.lstat()
    if not hasattr(os, "getuid"):  # Windows: folders of a user are that user's
        return True
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid in (0, os.getuid()) and not others and not stat.S_ISLNK(found.st_mode)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


def _on_disk(path: Path) -> None:
    """Before its name appears, its bytes are where a crash leaves them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def parallel() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded.

    A runtime of our own would keep a second set of threads, which fight with torch's for the cores.

    Raises:
        Unavailable: torch runs on another one.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError) as error:  # TypeError: Windows has no CDLL(None)
        raise Unavailable("torch's threads are not those of GNU OpenMP") from error


def threads_for(products: int, alone: int = 1 << 22) -> int:
    """Of a call that multiplies so many pairs of numbers: below `alone` of them one thread is done
    before a second one has woken up."""
    return 1 if products < alone else torch.get_num_threads()


@functools.cache
def fingerprint() -> str:
    """Of this CPU, for what is measured on it."""
    return _hash(_cpu())


def _compile(command: list[str]) -> None:
    # Not linked to any OpenMP, and kernels not to torch: symbols of neither are used.
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise Unavailable(f"{command[0]} failed ({done.returncode}): {lines[0]}")


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else _COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise Unavailable(f"no C++ compiler: neither of {', '.join([asked] if asked else _COMPILERS)}")


def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{compiler} did not run: {error}") from error
    return f"{compiler} {done.stdout}"


def _native() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _cpu() -> str:
    """Model and instruction sets, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    first = text.split("\n\n")[0].splitlines()
    wanted = ("vendor", "cpu family", "model", "stepping", "flags", "Features", "CPU ")
    return "\n".join([platform.machine(), *(line for line in first if line.startswith(wanted))])


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
