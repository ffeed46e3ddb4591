"""Wall times that can be compared: warmed up, interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["medians"]

_SAMPLE = 200e-6  # seconds of one sample, at least: a clock ticks, a call has overhead


def medians(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int = 15,
    warm: int = 3,
    limit: float = 10.0,
    pick: Callable[[list[float]], float] = statistics.median,
) -> list[float]:
    """Median seconds of each call. The calls take turns, so a machine that is busy for a while
    slows them all.

    Args:
        calls: what to time; runs several times.
        device: that the work runs on.
        rounds: samples of each call.
        warm: runs of each call before the first sample.
        limit: seconds after which no further round begins; three are always run.
        pick: what of the samples counts; `min` where there are few, on a machine that is busy.
    """
    once = min(_seconds(call, 1, device) for call in calls for _ in range(warm))
    repeats = max(1, round(_SAMPLE / max(once, 1e-7)))
    samples: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > limit:
            break
        for call, own in zip(calls, samples, strict=True):
            own.append(_seconds(call, repeats, device))
    return [pick(s) for s in samples]


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
