"""C++ kernels: compiled once on the machine that runs them, kept on disk, loaded with ctypes.

The kernels use what this CPU has (`-march=native`), which no wheel could. Without a compiler, or
where one fails, nothing breaks: `library` raises `Unavailable` with the reason, and the caller's
plain-torch path runs. `REWRITER_NATIVE=0` asks for that.

A library's name holds a hash of its source, the compiler's version, the flags and the CPU, so that
a cache shared by machines or versions never serves the wrong one. It appears by a rename:
processes that compile at the same time replace each other's equal results.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import platformdirs

__all__ = ["Unavailable", "cache_folder", "fingerprint", "library", "parallel"]

_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 300  # seconds; it takes about 7


class Unavailable(Exception):
    """A compiled kernel cannot be had on this machine; the message says why."""


def cache_folder() -> Path:
    """Of kernels: under `$REWRITER_CACHE`, else under "rewriter" in the user's cache folder."""
    given = os.environ.get("REWRITER_CACHE")
    return Path(given or platformdirs.user_cache_dir("rewriter")) / "kernels"


def library(source: Path) -> ctypes.CDLL:
    """The library compiled from one C++ file.

    Raises:
        Unavailable: no compiler, it failed, or the result does not load.
    """
    if os.environ.get("REWRITER_NATIVE") == "0":
        raise Unavailable("switched off by REWRITER_NATIVE=0")
    compiler = _compiler()
    flags = ["-std=c++17", "-O3", _native(), "-fPIC", "-shared"]
    key = _hash(source.read_bytes().decode(), _version(compiler), *flags, _cpu())
    name = f"{source.stem}-{key}.so"
    kept = cache_folder() / name
    if kept.exists():
        try:
            return ctypes.CDLL(str(kept))
        except OSError:  # half a file, or of another system: made anew
            kept.unlink(missing_ok=True)
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            made = _compile(compiler, flags, source, Path(folder) / name)
            os.replace(made, kept)
            return ctypes.CDLL(str(kept))
    except OSError:  # nowhere to keep it: loaded from where it is deleted again
        with tempfile.TemporaryDirectory() as folder:
            try:
                return ctypes.CDLL(str(_compile(compiler, flags, source, Path(folder) / name)))
            except OSError as error:
                raise Unavailable(f"the compiled kernel does not load: {error}") from error


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


@functools.cache
def fingerprint() -> str:
    """Of this CPU, for what is measured on it."""
    return _hash(_cpu())


def _compile(compiler: str, flags: list[str], source: Path, to: Path) -> Path:
    # Not linked to any OpenMP, nor to torch: symbols of neither are used.
    command = [compiler, *flags, str(source), "-o", str(to)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{compiler} did not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise Unavailable(f"{compiler} failed ({done.returncode}): {lines[0]}")
    return to


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
