"""Wall times that can be compared: warmed up, interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["longer", "medians", "samples"]

_SAMPLE = 200e-6  # seconds of one sample, at least: a clock ticks, a call has overhead


def medians(calls: Sequence[Callable[[], Any]], device: torch.device, **how: Any) -> list[float]:
    """Median seconds of each call; arguments as of `samples`."""
    return [statistics.median(own) for own in samples(calls, device, **how)]


def samples(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int = 15,
    warm: int = 3,
    limit: float = 10.0,
) -> list[list[float]]:
    """Seconds of each call, once per round. The calls take turns, so a machine that is busy for a
    while slows them all.

    Args:
        calls: what to time; runs several times.
        device: that the work runs on.
        rounds: samples of each call.
        warm: runs of each call before the first sample.
        limit: seconds after which no further round begins; three are always run.
    """
    once = min(_seconds(call, 1, device) for call in calls for _ in range(warm))
    repeats = max(1, round(_SAMPLE / max(once, 1e-7)))
    found: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > limit:
            break
        for call, own in zip(calls, found, strict=True):
            own.append(_seconds(call, repeats, device))
    return found


def longer(old: Sequence[float], new: Sequence[float]) -> float:
    """Seconds that the new call takes longer, below 0 where the old one does; 0 where that is
    within the spread of the samples.

    What else the machine does only ever adds, so the least of few samples counts, and differences
    count where the least of the one is above the median of the other.
    """
    slow, fast = (old, new) if min(old) > min(new) else (new, old)
    return min(new) - min(old) if min(slow) > statistics.median(fast) else 0.0


def _seconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
