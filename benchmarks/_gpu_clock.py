"""Times on a card, and what the card could reach at best."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping

import _checkout  # noqa: F401 (our packages, from this checkout)
import torch
from _harness import quartiles
from torch import Tensor

from rewriter import Device

__all__ = ["Times", "bandwidth", "card", "datasheet", "peak", "synchronize", "times"]

_FLUSH = 256 * 2**20
"""Bytes written before every call: several times the L2 of any card here."""
_CYCLES = 1.8e9  # a second of spinning, about

Call = Callable[[], object]


@functools.cache
def card() -> str:
    """The name of the device that runs."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"


@functools.cache
def datasheet() -> Device:
    """Of this card; the H100's, as a stand-in, where we have none of it."""
    name = card()
    for known in ("H200", "H100", "A100", "B200", "L4", "4090", "MI300X"):
        if re.search(rf"\b{known}\b", name):
            return Device.get("A100-40" if known == "A100" and "40GB" in name else known)
    return Device.get("h100")


def peak(dtype: torch.dtype) -> float:
    """FLOP/s by the datasheet."""
    return datasheet().peak(str(dtype).removeprefix("torch."))


def bandwidth() -> float:
    """Bytes per second of main memory, by the datasheet."""
    return datasheet().levels[-1].bandwidth


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Times:
    """Median seconds by name.

    Attributes:
        device: of the card alone, from a cold L2, without gaps between launches.
        call: of calls that follow each other, launches and Python included.
    """

    def __init__(self, device: dict[str, list[float]], call: dict[str, float]) -> None:
        self.rounds = device
        self.device = {name: quartiles(values)[1] for name, values in device.items()}
        self.call = call

    def ratio(self, name: str, over: str) -> float:
        """Times that `name` is faster, round by round, median."""
        pairs = zip(self.rounds[over], self.rounds[name], strict=True)
        return quartiles([a / b for a, b in pairs])[1]


def times(calls: Mapping[str, Call], seconds: float = 0.5, least: int = 5, most: int = 25) -> Times:
    """Times calls in turn: every round each of them once, in an order that rotates.

    Before each one the L2 is overwritten, and the card is kept spinning while the call is queued,
    so that CUDA events around it see the card's work and not the wait for Python.

    Args:
        calls: what to time; each is called three times before.
        seconds: about how long all rounds take together.
        least, most: rounds.
    """
    alone = {name: _call_seconds(call) for name, call in calls.items()}
    round_seconds = sum(2 * t + 4e-4 for t in alone.values())
    rounds = min(max(int(seconds / round_seconds), least), most)
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(_device_seconds(calls[name], alone[name]))
    return Times(found, alone)


def _call_seconds(call: Call) -> float:
    """Of one call among several that follow each other, launches included; warms up as well."""
    for _ in range(3):
        call()
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    count = min(max(int(0.02 / (time.perf_counter() - start)), 1), 20)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count


@functools.cache
def _flush() -> Tensor:
    return torch.empty(_FLUSH, dtype=torch.uint8, device="cuda")


def _device_seconds(call: Call, expected: float) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush().zero_()
    torch.cuda._sleep(int(_CYCLES * min(1.5 * expected + 5e-5, 5e-3)))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
