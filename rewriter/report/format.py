"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

import math

__all__ = ["count", "error", "flops", "macs", "ratio", "seconds", "size"]

_SI = ("", "k", "M", "G", "T", "P", "E")


def _scaled(value: float, unit: str) -> str:
    """Three significant digits with an SI prefix (powers of 1000); whole numbers below 1000."""
    power = 0
    while power < len(_SI) - 1 and abs(value) >= (999.5 if power else 1000):
        value /= 1000
        power += 1
    whole = power == 0 and value == int(value)
    digits = 0 if whole or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {_SI[power]}{unit}".rstrip()


def count(n: float) -> str:
    """1234567 → "1.23 M"."""
    return _scaled(n, "")


def size(nbytes: float) -> str:
    """45_100_000 → "45.1 MB" (decimal, as disks and `nvidia-smi --query` count)."""
    return _scaled(nbytes, "B")


def flops(n: float) -> str:
    """1.2e9 → "1.20 GFLOP"."""
    return _scaled(n, "FLOP")


def macs(n: float) -> str:
    """1.2e9 → "1.20 GMAC"."""
    return _scaled(n, "MAC")


def seconds(s: float) -> str:
    """0.00123 → "1.23 ms"; 75.0 → "75.0 s"."""
    factor, unit = next(
        ((f, u) for f, u in ((1.0, "s"), (1e3, "ms")) if abs(s) * f >= 0.9995), (1e6, "µs")
    )
    value = s * factor
    digits = 0 if abs(value) >= 99.95 or value == 0 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def error(value: float | None) -> str:
    """A relative error: "0" where exact, "–" where not known, else two digits."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return "0" if value == 0 else f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.4f}"


def ratio(before: float, after: float) -> str:
    """How a figure that should be small changed: "3.98× less", "1.20× more", "same"."""
    if before == after:
        return "same"
    if not before or not after:
        return "all new" if after else "all gone"
    factor = before / after if before > after else after / before
    if factor < 1.005:
        return f"{abs(after / before - 1):.2%} {'less' if before > after else 'more'}"
    return f"{factor:.2f}× {'less' if before > after else 'more'}"
