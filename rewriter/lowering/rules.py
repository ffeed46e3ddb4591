"""`Rule`: a pattern of the eval graph, and the fused op that computes the same there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rewriter.errors import OptionError
from rewriter.lowering.called import CalledConv
from rewriter.modules.patterns import Match, Pattern

__all__ = ["Fused", "Place", "Rule", "checked"]


@dataclass(frozen=True, eq=False)
class Place:
    """One place of a rule's pattern in an eval graph.

    Args:
        match: the nodes.
        modules: the layer that each node calls, or the `CalledConv` that it amounts to; None for
            any other function.
        root: the module tree that the graph lives on.
    """

    match: Match
    modules: tuple[Any, ...]
    root: nn.Module

    @classmethod
    def of(cls, match: Match, root: nn.Module) -> Place:
        found = (
            root.get_submodule(str(n.target)) if n.op == "call_module" else CalledConv.of(n, root)
            for n in match.nodes
        )
        return cls(match, tuple(found), root)

    @property
    def names(self) -> list[str]:
        """The dotted name of each layer; of a function the node's."""
        return [str(n.target) if n.op == "call_module" else n.name for n in self.match.nodes]

    @property
    def owners(self) -> list[str]:
        """The dotted name of each module whose tensors the place reads."""
        called = [m.owner for m in self.modules if isinstance(m, CalledConv)]
        return [str(n.target) for n in self.match.nodes if n.op == "call_module"] + called

    @property
    def name(self) -> str:
        return ", ".join(self.names)

    @property
    def input(self) -> Any:
        """The value that goes in, as it was on the example inputs: sizes, dtype, device."""
        return self.match.source.meta.get("val")


def _none(place: Place) -> tuple[Any, ...]:
    return ()


def _no_options(place: Place) -> dict[str, Any]:
    return {}


def _nothing(place: Place, *_: Any, **__: Any) -> None:
    return None


def _rounding_alone(place: Place) -> float:
    return 0.0


@dataclass(frozen=True)
class Fused:
    """What runs in a pattern's place: `run(x, *added, *derive(place), *constants(place))`, where
    `added` is what the sums of the pattern add, in its order. Where the pattern is one operation,
    and a function, the arguments of its call stand in the place of x.

    Args:
        name: of the op, as the report has it.
        run: gives one value for a chain; a tuple for a fan, in the order of its calls.
        derive: tensors made of the layers' weights: once, and again whenever those change.
        constants: further arguments, JSON-like.
        unless: why the op cannot stand at a place; None where it can.
        slower: why it would not be faster there, on such inputs; None where it is. They are what
            `run` is given first.
        bind: what a model runs in place of `run`, where there is more to make ready than tensors:
            `bind(*derive(place), *constants(place), **options(place))` gives a function of
            (x, *added).
        options: arguments of `run` by name, JSON-like.
        error: the share by which results may differ from the pattern's beyond rounding: where it
            quantizes a value in between, what rounds up to one level or down to the next may
            depend on the last bit.

    Raises:
        OptionError: `run` has no name of its own, by which generated code could call it.
    """

    name: str
    run: Callable[..., Any]
    derive: Callable[[Place], Sequence[Tensor | None]]
    constants: Callable[[Place], Sequence[Any]] = _none
    unless: Callable[[Place], str | None] = _nothing
    slower: Callable[..., str | None] = _nothing
    bind: Callable[..., Callable[..., Any]] | None = None
    options: Callable[[Place], Mapping[str, Any]] = _no_options
    error: Callable[[Place], float] = _rounding_alone

    def __post_init__(self) -> None:
        if not str(getattr(self.run, "__name__", "")).isidentifier():
            raise OptionError(
                f"Fused({self.name!r}): run must be a function with a name of its own"
            )


@dataclass(frozen=True)
class Rule:
    """A pattern of operations, and the fused op that runs in its place.

    Args:
        pattern: of `rewriter.modules.patterns`, e.g. `conv >> batch_norm`.
        fused: what runs there instead.

    Raises:
        OptionError: `pattern` is no pattern, or `fused` no `Fused`.
    """

    pattern: Pattern
    fused: Fused

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise OptionError(f"Rule({self.pattern!r}, …): the pattern must be one of operations")
        if not isinstance(self.fused, Fused):
            raise OptionError(
                f"Rule({self.pattern}, {self.fused!r}): the pattern has no fused op; give a Fused"
            )

    def __str__(self) -> str:
        return f"{self.pattern} → {self.fused.name}"


def checked(rules: Any) -> tuple[Rule, ...]:
    """The rules, none of which contradicts another.

    Raises:
        OptionError: something is no rule, or two rules have one pattern or one fused op's name
            stands for two ops; names both.
    """
    if not isinstance(rules, Iterable):
        raise OptionError(f"lower={rules!r}: use True, False, or a list of rules")
    found = tuple(rules)
    patterns: dict[str, Rule] = {}
    names: dict[str, Rule] = {}
    for rule in found:
        if not isinstance(rule, Rule):
            raise OptionError(f"lower: {rule!r} is no Rule(pattern, fused op)")
        pattern, name = str(rule.pattern), rule.fused.name
        if (other := patterns.setdefault(pattern, rule)) is not rule:
            raise OptionError(f"two rules have the pattern {pattern}: {other} and {rule}")
        other = names.setdefault(name, rule)
        if other.fused != rule.fused:
            raise OptionError(f"two fused ops have the name {name!r}: of {other} and of {rule}")
    return found
