"""What a user asks of the memory planner."""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass

from rewriter.errors import OptionError, given

__all__ = ["MemoryBudget", "parse_budget"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1 << (10 * (i + 1)) for i, unit in enumerate("kmgt")}
_FORMS = "bytes as an int, a text such as '512MB' or '1.5GiB', or a fraction in (0, 1]"


@dataclass(frozen=True)
class MemoryBudget:
    """How much memory a training step may take, or how much time it may give for less.

    The peak is the most that is alive at one time of what a forward and backward allocate:
    activations, gradients and temporaries. Weights, optimizer state and inputs are not in it.

    Args:
        peak: bytes (an int, or a text such as "512MB" or "1.5GiB"), or a fraction in (0, 1] of the
            peak that keeping everything has; None for no bound.
        step_time: the least peak at no more than so many times the step's predicted time, ≥ 1.
        lossy: values may lose digits while they wait for the backward (8-bit integers per group of
            128, bfloat16); a gradient's error is measured on the example inputs.
        gradient_error: with `lossy`, the largest ‖g − g′‖/‖g‖ over all gradients. At the default
            of 0.04 their cosine is above 0.999.
        forms: with `lossy`, which of "bf16", "int8" and "int4".

    Raises:
        OptionError: an impossible value, or neither or both of `peak` and `step_time`.
    """

    peak: int | float | str | None = None
    step_time: float | None = None
    lossy: bool = False
    gradient_error: float = 0.04
    forms: tuple[str, ...] = ("bf16", "int8")

    def __post_init__(self) -> None:
        if (self.peak is None) == (self.step_time is None):
            raise OptionError("MemoryBudget: give either peak or step_time")
        parse_budget(self.peak)
        time = self.step_time
        if time is not None and not (_number(time) and math.isfinite(time) and time >= 1):
            raise OptionError(f"MemoryBudget: step_time={time!r}: use a number of at least 1")
        bound = self.gradient_error
        if not (_number(bound) and 0 < bound < math.inf):
            raise OptionError(f"MemoryBudget: gradient_error={bound!r}: use a number above 0")
        object.__setattr__(self, "forms", tuple(self.forms))
        unknown = [f for f in self.forms if f not in ("bf16", "int8", "int4")]
        if unknown or not self.forms:
            raise OptionError(f"MemoryBudget: forms={self.forms!r}: of 'bf16', 'int8', 'int4'")

    @classmethod
    def of(cls, amount: object) -> MemoryBudget:
        """A budget as `rewrite` takes it."""
        if isinstance(amount, cls):
            return amount
        if amount is None or not isinstance(amount, int | float | str):
            raise OptionError(f"memory_budget={given(amount)}: use {_FORMS}, or a MemoryBudget")
        return cls(peak=amount)

    @property
    def lossy_forms(self) -> tuple[str, ...]:
        return self.forms if self.lossy else ()

    def __str__(self) -> str:
        if self.step_time is not None:
            text = f"the least at {self.step_time:g}× the time"
        elif isinstance(self.peak, str):
            text = self.peak
        else:
            amount = parse_budget(self.peak)
            share = isinstance(amount, float)
            text = f"{amount:.0%} of the default" if share else f"{amount:,} bytes"
        return f"{text}, lossy" if self.lossy else text


def parse_budget(budget: int | float | str | None) -> int | float | None:
    """Bytes as an int, a fraction of the default as a float.

    Raises:
        OptionError: it is none of these, or not above 0.
    """
    if budget is None:
        return None
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*([\d_.]+(?:e\d+)?)\s*([kmgt]?i?)b?\s*", budget.lower())
        unit = _UNITS.get(found[2]) if found else None
        try:
            number = float(found[1].replace("_", "")) if found else math.nan
        except ValueError:
            number = math.nan
        if unit is None or not 0 < number * unit < math.inf:
            raise OptionError(f"memory_budget={budget!r}: use {_FORMS}")
        return int(number * unit)
    if not _number(budget) or not math.isfinite(budget) or budget <= 0:
        raise OptionError(f"memory_budget={budget!r}: use {_FORMS}")
    if isinstance(budget, numbers.Integral):
        if budget == 1:
            raise OptionError("memory_budget=1 is one byte: use 1.0 for all of the default")
        return int(budget)
    if budget > 1:
        raise OptionError(
            f"memory_budget={budget!r}: a fraction is at most 1; use an int for bytes"
        )
    return float(budget)


def _number(value: object) -> bool:
    """Whether it is a number that a float can hold."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True
