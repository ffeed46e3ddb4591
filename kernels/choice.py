"""Which of several implementations runs: measured once per size, kept for this and later processes.

A choice is asked for with a key of everything that it depends on but the machine (operation, sizes,
dtype, threads). The first to ask measures; what it found is written to a JSON file that names this
CPU and this version of torch, so that the next process chooses alike without measuring. Where
processes measure at the same time, the first to write decides for all: which kernel runs decides
how results are rounded. A choice that a busy machine disturbed holds in its process alone: the next
one measures again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from rewriter.errors import warn
from rewriter.kernels.native import cache_folder, fingerprint
from rewriter.kernels.settings import own_settings

__all__ = [
    "device_name",
    "fastest",
    "forget",
    "known",
    "paying_share",
    "rows_bucket",
    "triton_version",
]

Candidates = Mapping[str, Callable[[], object]]
_MOST_ROWS = 2048
_MOST_BYTES = 1 << 24
_ROUNDS, _SECONDS, _HOPELESS = 6, 0.15, 10
_PATIENCE = 4
"""How much longer a measurement may take on a machine that is busy with other things."""
_SPREAD = 0.1
"""By which share the two least times of a candidate may differ."""
_known: dict[str, str] = {}
_read: set[Path] = set()
_lock = threading.RLock()  # a candidate may make a choice itself


def rows_bucket(rows: int, most: int = _MOST_ROWS) -> int:
    """Rows up to the next power of two, at most `most`, count as equal: measured at that many."""
    return min(1 << max(rows - 1, 0).bit_length(), most)


@functools.cache
def device_name(index: int) -> str:
    """Of a GPU: choices hold for all of its kind."""
    return torch.cuda.get_device_name(index)


@functools.cache
def triton_version() -> str:
    """Its compiler decides how fast the kernels of Triton are."""
    import triton

    return f"triton-{triton.__version__}"


def known(key: str, version: str) -> str | None:
    """What `fastest` would answer without measuring; None where it would measure."""
    if not _read:
        with _lock:
            _load()
    return _known.get(f"{version} {key}")


def fastest(
    key: str,
    version: str,
    candidates: Callable[[], Candidates],
    lead: float = 0.0,
    device: torch.device | None = None,
    before: Callable[[], object] | None = None,
) -> str:
    """The name of the candidate with the least time.

    Args:
        key: what the choice depends on, but for the machine.
        version: of the implementations: choices among others do not count.
        candidates: makes the calls to time, by name, on data of their own; called when nothing is
            known of this key yet.
        lead: by which share of its time the first one must be beaten, or it stays the choice: what
            is less may be noise.
        device: a GPU on which the candidates run, whose own time then counts; None on a CPU.
        before: what comes before each timed call, and is not timed.
    """
    full = f"{version} {key}"
    if full in _known:
        return _known[full]
    with _lock:  # one measurement at a time: two would disturb each other
        _load()
        if full not in _known:
            with own_settings():
                found, steady = _measure(candidates(), lead, device, before)
            _known[full] = _agreed(full, found) if steady else found
    return _known[full]


_SHARES = (1.0, 0.85, 0.7, 0.6, 0.4, 0.2, 0.12)
"""None that is often asked for: of tokens with a half, more or less, all are to take one way."""
_DENSE_LEAD = 0.02
"""By which share of its time a dense product must be beaten."""


def paying_share(
    key: str,
    version: str,
    pair: Callable[[float], dict[str, Callable[[], object]]],
    place: object,
    device: torch.device | None = None,
    before: Callable[[], object] | None = None,
) -> float:
    """The largest share up to which "sparse" is faster than "dense"; 0 where it never is.

    Args:
        key, version, device, before: as of `fastest`.
        pair: the two, where this share is active.
        place: what else times hang on: torch's number of threads, or the name of a GPU.
    """
    low, high = 0, len(_SHARES)  # those from the high-th on pay
    while low < high:
        middle = (low + high) // 2
        share = _SHARES[middle]
        own = functools.partial(pair, share)
        asked = f"{key} {share} {place}", version, own, _DENSE_LEAD, device, before
        if fastest(*asked) == "sparse":
            high = middle
        else:
            low = middle + 1
    return _SHARES[high] if high < len(_SHARES) else 0.0


def forget() -> None:
    """Measures anew, in this process and later ones."""
    with _lock:
        _known.clear()
        _path().unlink(missing_ok=True)
        _read.add(_path())


def _measure(
    candidates: Candidates,
    lead: float = 0.0,
    device: torch.device | None = None,
    before: Callable[[], object] | None = None,
) -> tuple[str, bool]:
    """The fastest candidate, and whether its times were steady enough to say so."""
    if len(candidates) == 1:
        return next(iter(candidates)), True
    own_seconds = _seconds if device is None else functools.partial(_device_seconds, device=device)

    def timed(call: Callable[[], object]) -> float:
        if before is not None:
            before()
        return own_seconds(call)

    if device is not None:  # compiling and the first use of a library are no part of a call
        for call in candidates.values():
            call()
    # The first call of each warms up; what is hopeless then (bfloat16 without instructions for it,
    # seconds a call) is not called again.
    first = {name: timed(call) for name, call in candidates.items()}
    limit = max(_HOPELESS * min(first.values()), 0.5)
    times: dict[str, list[float]] = {name: [] for name, taken in first.items() if taken <= limit}
    start = time.perf_counter()
    for turn in itertools.count(1):  # interleaved against drift
        for name, own in times.items():
            own.append(timed(candidates[name]))
        spent, clear = time.perf_counter() - start, _is_clear(times)
        enough = turn >= _ROUNDS or (turn >= 2 and spent > _SECONDS)
        if (enough and clear) or (turn >= 2 and spent > _PATIENCE * _SECONDS):
            break
    best = {name: min(own) for name, own in times.items()}
    found, first_name = min(best, key=best.__getitem__), next(iter(candidates))
    ahead = first_name not in best or best[found] < (1 - lead) * best[first_name]
    return found if ahead else first_name, clear


def _is_clear(times: Mapping[str, Sequence[float]]) -> bool:
    """Whether the least times of the two fastest were met twice each, or lie further apart than
    they scatter."""
    ranked = sorted(sorted(own)[:2] for own in times.values() if len(own) > 1)
    if len(ranked) < 2:
        return True
    (a, again), (b, once_more) = ranked[:2]
    return max(again / a, once_more / b) < 1 + _SPREAD or b > again * (1 + _SPREAD)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


_AHEAD = 2_000_000
"""Cycles for which a GPU waits, about a millisecond, until the call behind them is queued."""


def _device_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of the GPU alone: a call that is queued before the GPU gets to it."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(_AHEAD)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end) / 1000)


def _path() -> Path:
    return cache_folder() / f"choices-{fingerprint()}-torch-{torch.__version__}.json"


def _load() -> None:
    path = _path()
    if path in _read:
        return
    _read.add(path)
    try:
        found = _stored(path)
    except _UNREADABLE as error:
        warn(f"{path} cannot be read ({error}): kernels are measured anew, and it is written over")
        return
    for key, name in found.items():
        _known.setdefault(key, name)


_UNREADABLE = OSError, ValueError, RecursionError  # half a file, none of ours, or nested too deeply


def _stored(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("it holds something else")
    return found


def _agreed(key: str, name: str) -> str:
    """What stands for a key in the file, which is `name` where nobody has been faster; what others
    have written meanwhile stays. Where nothing can be kept, the next process measures again."""
    path = _path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(path.parent):
            try:
                kept = _stored(path)
            except _UNREADABLE:
                kept = {}
            if key not in kept:
                _write(path, {**kept, key: name})
    except OSError:
        return name
    return kept.get(key, name)


def _write(path: Path, found: dict[str, str]) -> None:
    handle, made = tempfile.mkstemp(dir=path.parent, suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=0, sort_keys=True)
        os.replace(made, path)
    except BaseException:
        Path(made).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, for as long as it takes to write a small file; file systems that know
    no locks are written to without."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
