"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

import math

__all__ = [
    "count",
    "error",
    "flops",
    "joules",
    "macs",
    "off",
    "percent",
    "rate",
    "ratio",
    "seconds",
    "size",
    "speed",
]

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


def rate(n: float, unit: str = "FLOP/s") -> str:
    """9.89e14 → "989 TFLOP/s"."""
    return _scaled(n, unit)


def _small(value: float, unit: str) -> str:
    """Three significant digits in the unit, its thousandth, millionth or billionth."""
    scales = (1.0, ""), (1e3, "m"), (1e6, "µ")
    tiny = (1e6, "µ") if not value else (1e9, "n")
    factor, prefix = next(((f, p) for f, p in scales if abs(value) * f >= 0.9995), tiny)
    value *= factor
    digits = 0 if abs(value) >= 99.95 or value == 0 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {prefix}{unit}"


def seconds(s: float) -> str:
    """0.00123 → "1.23 ms"; 75.0 → "75.0 s"."""
    return _small(s, "s")


def joules(j: float) -> str:
    """0.00256 → "2.56 mJ"."""
    return _small(j, "J")


def percent(share: float) -> str:
    """0.314 → "31 %"; a share below half a percent is "< 1 %", unless it is 0."""
    return "< 1 %" if 0 < share < 0.005 else f"{share * 100:.0f} %"


def speed(before: float, after: float) -> str:
    """How a time changed: "2.74× as fast"; "same" within half a percent."""
    if not before or not after:
        return "same" if before == after else "–"
    return "same" if 0.995 < before / after < 1.005 else f"{before / after:.2f}× as fast"


def off(predicted: float, measured: float) -> str:
    """How far a prediction is from the measurement: "+12 %" where it is too long."""
    return f"{(predicted / measured - 1) * 100:+.0f} %" if measured else "–"


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
