"""`Formula`: a figure as a polynomial in the sizes that a model leaves open, e.g. its batch."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from rewriter.errors import OptionError, StoreError

__all__ = [
    "Formula",
    "Size",
    "at_largest",
    "condition",
    "covers",
    "evaluate",
    "frontier",
    "holds",
    "largest",
    "least",
    "number",
]


class Formula:
    """Σ coefficient · Π size: whole numbers over named sizes, e.g. `1536*batch*sequence + 64`.

    Sizes are whole numbers of at least 0, and so is every other factor. What is no polynomial (a
    rounded division, a maximum) is kept as one factor, written in Python's syntax. Immutable; sums,
    differences and products with numbers and formulas.
    """

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: Mapping[tuple[str, ...], int]) -> None:
        self.terms = {k: v for k, v in terms.items() if v}
        self._hash: int | None = None

    @classmethod
    def of(cls, factor: str) -> Formula:
        """The formula that is one size, or any other expression as one factor."""
        return cls({(factor,): 1})

    @classmethod
    def parse(cls, text: str) -> Formula:
        """The inverse of `str`.

        Raises:
            StoreError: the text is no formula.
        """
        _compiled(text)
        return cls.of(text)

    def __add__(self, other: Size) -> Formula:
        terms = dict(self.terms)
        for key, value in _terms(other).items():
            terms[key] = terms.get(key, 0) + value
        return Formula(terms)

    __radd__ = __add__

    def __mul__(self, other: Size) -> Formula:
        terms: dict[tuple[str, ...], int] = {}
        for a, x in self.terms.items():
            for b, y in _terms(other).items():
                key = tuple(sorted((*a, *b)))
                terms[key] = terms.get(key, 0) + x * y
        return Formula(terms)

    __rmul__ = __mul__

    def __neg__(self) -> Formula:
        return self * -1

    def __sub__(self, other: Size) -> Formula:
        return self + other * -1

    def __rsub__(self, other: Size) -> Formula:
        return -self + other

    def __floordiv__(self, divisor: int) -> Formula:
        if all(v % divisor == 0 for v in self.terms.values()):
            return Formula({k: v // divisor for k, v in self.terms.items()})
        return Formula.of(f"(({self}) // {divisor})")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Formula, int)) and self.terms == _terms(other)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self.terms.items()))
        return self._hash

    def covers(self, other: Size) -> bool:
        """Whether it is at least `other` at all sizes, as far as its coefficients tell."""
        difference = (self - other).terms
        return all(v > 0 for v in difference.values())

    def at(self, sizes: Mapping[str, int]) -> int:
        """The figure at these sizes.

        Raises:
            OptionError: a size is missing.
        """
        return sum(
            v * math.prod(_factor(f, sizes) for f in factors) for factors, v in self.terms.items()
        )

    def __str__(self) -> str:
        if list(self.terms.values()) == [1] and len(next(iter(self.terms))) == 1:
            return next(iter(self.terms))[0]
        parts = []
        for factors, value in sorted(self.terms.items(), key=lambda t: (-len(t[0]), t[0])):
            shown = [f if f.isidentifier() or f.endswith(")") else f"({f})" for f in factors]
            if value != 1 or not shown:
                shown.insert(0, str(value))
            parts.append("*".join(shown))
        return " + ".join(parts).replace("+ -", "- ") or "0"

    def __repr__(self) -> str:
        return f"Formula({self})"


Size = int | Formula
"""A number, or a formula for it."""


def _terms(value: Size) -> Mapping[tuple[str, ...], int]:
    return value.terms if isinstance(value, Formula) else {(): value} if value else {}


def evaluate(value: Any, sizes: Mapping[str, int]) -> Any:
    """A number as it is, a formula at these sizes."""
    return value.at(sizes) if isinstance(value, Formula) else value


_FEW = 24  # alternatives of a maximum that people may still read


def largest(values: Iterable[Size], around: Mapping[str, int] | None = None) -> Size:
    """The maximum; values that others cover at all sizes fall away.

    Args:
        values: the alternatives.
        around: sizes at which the result must be right to the last digit; see `frontier`.
    """
    given = list(dict.fromkeys(values))
    if all(isinstance(v, int) for v in given):
        return max(given, default=0)  # type: ignore[type-var]
    kept: list[Size] = []
    for value in (given[i] for i in frontier(given, around or {})):
        if any(covers(k, value) for k in kept):
            continue
        kept = [k for k in kept if not covers(value, k)] + [value]
    return kept[0] if len(kept) == 1 else Formula.of(f"max({', '.join(map(str, kept))})")


def frontier(values: Sequence[Size], around: Mapping[str, int]) -> list[int]:
    """Indices of the values that can be the largest.

    Of up to 24 all are returned. Of more, as a deep model's backward has, those that are the
    largest at `around` or at one of a few thousand other sizes, from 1 to a million: what lies
    between two of these may be missed by less than the step between them.
    """
    if len(values) <= _FEW:
        return list(range(len(values)))
    factors = dict.fromkeys(
        f for v in values if isinstance(v, Formula) for term in v.terms for f in term
    )
    names = sorted({name for factor in factors for name in _sizes(_compiled(factor))})
    grid = np.unique(np.round(np.logspace(0, 6, 97)))
    if len(names) <= 2:
        points = np.stack([g.ravel() for g in np.meshgrid(*[grid] * len(names))], 1)
    else:
        points = np.random.default_rng(0).choice(grid, (8192, len(names)))
    here = [around.get(n, 1) for n in names]
    points = np.concatenate([np.array([here]), points]) if names else np.ones((1, 0))
    rows = [dict(zip(names, map(int, p), strict=True)) for p in points]
    known = {
        f: points[:, names.index(f)] if f in names
        else np.array([_factor(f, r) for r in rows], float) for f in factors
    }  # fmt: skip
    monomials = {t: i for i, t in enumerate(dict.fromkeys(t for v in values for t in _terms(v)))}
    table = np.stack(
        [math.prod((known[f] for f in t), start=np.ones(len(points))) for t in monomials]
    )
    best, winner = np.full(len(points), -np.inf), np.zeros(len(points), int)
    for i, value in enumerate(values):
        terms = _terms(value)
        own = np.array(list(terms.values()), float) @ table[[monomials[t] for t in terms]]
        better = own > best
        best[better], winner[better] = np.broadcast_to(own, best.shape)[better], i
    return sorted({int(i) for i in winner})


def _sizes(tree: ast.expr) -> set[str]:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names - {call.partition(".")[0] for call in _CALLS}


def at_largest(cases: Sequence[tuple[Size, Size]]) -> Size:
    """Of pairs (key, value) the value at the largest key, the first of equal ones."""
    if len(cases) == 1:
        return cases[0][1]
    return Formula.of(f"at_largest({', '.join(str(n) for case in cases for n in case)})")


def least(a: Size, b: Size) -> Size:
    """The minimum of two."""
    if covers(a, b):
        return b
    return a if covers(b, a) else Formula.of(f"min({a}, {b})")


def covers(a: Size, b: Size) -> bool:
    """Whether a is at least b at all sizes, as far as coefficients tell."""
    if isinstance(a, int) and isinstance(b, int):
        return a >= b
    return (a if isinstance(a, Formula) else Formula({(): a})).covers(b)


# symbolic sizes of torch


def number(value: Any, names: Mapping[str, str] | None = None) -> Size:
    """An int or a SymInt of torch as a number or a formula; `names` renames torch's symbols."""
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return round(value)
    if not isinstance(value, torch.SymInt):
        return round(float(value)) if not isinstance(value, torch.SymFloat) else number(int(value))
    return _converted(value.node.expr, tuple(sorted((names or {}).items())))


@cache
def _converted(expression: Any, names: tuple[tuple[str, str], ...]) -> Size:
    own = dict(names)
    total: Size = 0
    for term, coefficient in expression.expand().as_coefficients_dict().items():
        if not coefficient.is_Integer:
            return Formula.of(f"({_python(expression, own)})")
        product: Size = int(coefficient)
        for factor, power in term.as_powers_dict().items():
            if factor.is_Integer:
                product *= int(factor**power)
            elif factor.is_Symbol and power.is_Integer and power > 0:
                name = own.get(str(factor), str(factor))
                for _ in range(int(power)):
                    product = Formula.of(name) * product
            else:
                product = Formula.of(f"({_python(factor**power, own)})") * product
        total = total + product
    return total


def condition(expression: Any, names: Mapping[str, str]) -> str:
    """A condition of torch's on symbolic sizes, in Python's syntax; "" where it always holds."""
    if not expression.free_symbols or not {str(s) for s in expression.free_symbols} <= set(names):
        return ""
    return _python(expression, names)


def holds(text: str, sizes: Mapping[str, int]) -> bool:
    """Whether a condition is true. What holds from 2 on is said of a size of 1 as well: only
    whether a copy is one depends on that."""
    return bool(_evaluated(text, {k: max(v, 2) for k, v in sizes.items()}))


def _python(expression: Any, names: Mapping[str, str]) -> str:
    from torch.utils._sympy.printers import PythonPrinter

    symbols = {s: type(s)(names[str(s)]) for s in expression.free_symbols if str(s) in names}
    return str(PythonPrinter().doprint(expression.xreplace(symbols)))


# evaluation, of text that a file may hold: nothing but arithmetic is let through

_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def _combined(op: ast.operator, left: Any, right: Any) -> Any:
    """The operation on two numbers.

    Raises:
        OverflowError: the result is longer than any figure; a power is not even computed then.
    """
    if isinstance(op, ast.Pow) and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > _LONGEST:
            raise OverflowError(f"a power of more than {_LONGEST} bits")
    value = _BINARY[type(op)](left, right)
    if isinstance(value, int) and value.bit_length() > _LONGEST:
        raise OverflowError(f"a number of more than {_LONGEST} bits")
    return value


def _at_largest(*flat: Any) -> Any:
    return max(zip(flat[::2], flat[1::2], strict=True), key=lambda case: case[0])[1]


_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_CALLS: Mapping[str, Callable[..., Any]] = {
    "at_largest": _at_largest,
    "max": max,
    "min": min,
    "abs": abs,
    "int": int,
    "round": round,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
    "math.sqrt": math.sqrt,
    "math.log2": math.log2,
}


def _factor(text: str, sizes: Mapping[str, int]) -> int:
    if text in sizes:
        return sizes[text]
    value = _evaluated(text, sizes)
    return value if isinstance(value, int) else int(value)


def _evaluated(text: str, sizes: Mapping[str, int]) -> int | float:
    """The value of an expression.

    Raises:
        StoreError: the text is none, or has no finite value of a size that anything is counted in.
        OptionError: a size is missing.
    """
    try:
        value = _value(_compiled(text), sizes)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"it gives {value}")
    except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, OptionError):
            raise
        raise StoreError(
            f"{text[:80]!r} cannot be evaluated at {dict(sizes)}: {type(error).__name__}: {error}"
        ) from error
    return value


_LONGEST = 256  # bits of a number on the way to a figure: its products are still floats


_TEXT = 100_000  # characters of a formula


@lru_cache(1 << 14)
def _compiled(text: str) -> ast.expr:
    try:
        if len(text) > _TEXT:
            raise ValueError("it is too long")
        tree = ast.parse(text, mode="eval").body
        _check(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # of a deep nest
        raise StoreError(f"{text[:80]!r} is no formula: {error}") from None
    return tree


def _check(tree: ast.expr) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) not in _CALLS or node.keywords:
                raise ValueError(f"unknown function {ast.unparse(node.func)}")
        elif isinstance(node, ast.Constant):
            if type(node.value) not in (int, float):
                raise ValueError(f"unknown value {node.value!r}")
        elif isinstance(node, ast.BinOp):
            if type(node.op) not in _BINARY:
                raise ValueError("unknown operation")
            if isinstance(node.op, ast.Pow) and not isinstance(node.right, ast.Constant):
                raise ValueError("powers must be constant")
        elif isinstance(node, ast.UnaryOp):
            if not isinstance(node.op, (ast.USub, ast.Not)):
                raise ValueError("unknown operation")
        elif isinstance(node, ast.Compare):
            if any(type(op) not in _COMPARE for op in node.ops):
                raise ValueError("unknown comparison")
        elif not isinstance(node, _LEAVES):
            raise ValueError(f"unexpected {type(node).__name__}")


_LEAVES = (
    ast.Name, ast.Attribute, ast.operator, ast.unaryop, ast.cmpop, ast.BoolOp, ast.boolop,
    ast.expr_context,
)  # fmt: skip


def _value(node: ast.expr, sizes: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in sizes:
            raise OptionError(f"the size {node.id!r} is not given: give {node.id}=…")
        return sizes[node.id]
    if isinstance(node, ast.UnaryOp):
        operand = _value(node.operand, sizes)
        return -operand if isinstance(node.op, ast.USub) else not operand
    if isinstance(node, ast.BoolOp):
        combine = all if isinstance(node.op, ast.And) else any
        return combine(_value(v, sizes) for v in node.values)
    if isinstance(node, ast.Compare):
        sides = [_value(v, sizes) for v in (node.left, *node.comparators)]
        return all(
            _COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False)
        )
    if isinstance(node, ast.BinOp):
        return _combined(node.op, _value(node.left, sizes), _value(node.right, sizes))
    if isinstance(node, ast.Call):
        return _CALLS[ast.unparse(node.func)](*(_value(a, sizes) for a in node.args))
    raise StoreError(f"{ast.unparse(node)!r} is no formula")
