"""What must hold after every pass; always on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.capture import Capture
from rewriter.errors import VerifyError

__all__ = ["Boundary", "boundary", "check", "relative_error", "tolerance"]


@dataclass(frozen=True)
class Boundary:
    """What a pass may not change: types of inputs and results, ties, and who owns parameters."""

    types: tuple[tuple[Any, ...], ...]
    ties: frozenset[frozenset[str]]
    parameters: frozenset[str]


def boundary(capture: Capture) -> Boundary:
    """The boundary of the model as it is now."""
    types = []
    for _, _, graph in capture.graphs():
        ends = [n for n in graph.nodes if n.op == "placeholder"]
        ends += list(next(n for n in reversed(graph.nodes) if n.op == "output").all_input_nodes)
        types.append(tuple(_type(n.meta.get("val")) for n in ends))
    return Boundary(tuple(types), ties(capture.root), _names(capture.root))


def ties(root: nn.Module) -> frozenset[frozenset[str]]:
    """Groups of names that share one parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return frozenset(frozenset(group) for group in names.values() if len(group) > 1)


def check(capture: Capture, before: Boundary, replaced: Sequence[str], name: str) -> None:
    """Checks the rewritten model against the boundary it had before the pass.

    Args:
        capture: after the pass, propagated.
        before: `boundary` before the pass.
        replaced: dotted names that the pass gave a new layer.
        name: of the pass, for the message.

    Raises:
        VerifyError: a graph is malformed, a value lost its type, a result changed its type, a
            tie was broken, or a parameter was left that nothing uses.
    """
    for region, mode, graph in capture.graphs():
        where = f"{name}: the {'train' if mode else 'eval'} graph of {region.prefix or 'the model'}"
        try:
            graph.lint()
        except RuntimeError as error:
            raise VerifyError(f"{where} is malformed: {error}") from error
        bare = [n.name for n in graph.nodes if n.op != "output" and "val" not in n.meta]
        if region.leaves is not None and bare:
            raise VerifyError(f"{where} has nodes without metadata: {bare}")
    after = boundary(capture)
    if after.types != before.types:
        raise VerifyError(
            f"{name} changed the type of an input or a result: {before.types} → {after.types}"
        )

    def touched(n: str) -> bool:
        return any(n == r or n.startswith(f"{r}.") for r in replaced)

    for group in before.ties:
        kept = frozenset(n for n in group if not touched(n))
        if len(kept) > 1 and not any(kept <= g for g in after.ties):
            raise VerifyError(f"{name} broke the tie between {sorted(kept)}")
    new = {n for n in after.parameters - before.parameters if not touched(n)}
    lost = {n for n in before.parameters - after.parameters if not touched(n)}
    if new or lost:
        raise VerifyError(
            f"{name}: parameters outside the replaced layers changed: new {sorted(new)}, lost "
            f"{sorted(lost)}"
        )


def _names(root: nn.Module) -> frozenset[str]:
    return frozenset(n for n, _ in root.named_parameters(remove_duplicate=False))


def _type(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    return (type(value).__name__,)


def relative_error(actual: Sequence[Any], expected: Sequence[Any]) -> float | None:
    """‖actual − expected‖ / ‖expected‖ over all floating-point results together; None without
    any that hold data."""
    difference = norm = 0.0
    seen = False
    for a, e in zip(actual, expected, strict=True):
        if isinstance(e, Tensor) and e.is_floating_point() and not e.is_meta:
            seen = True
            a, e = a.double(), e.double()
            # masks hold −inf and caches may hold NaN: only where both are finite can they differ
            finite = torch.isfinite(e)
            if not bool(torch.isfinite(a[finite]).all()):
                return float("inf")
            difference += float((a[finite] - e[finite]).square().sum())
            norm += float(e[finite].square().sum())
    if not seen:
        return None
    return float((difference / norm) ** 0.5) if norm else float(difference > 0)


def tolerance(results: Sequence[Any]) -> float:
    """The relative error that rounding alone may cause in an exact rewrite of a deep model: a
    thousand units in the last place of the coarsest result."""
    floats = [t for t in results if isinstance(t, Tensor) and t.is_floating_point()]
    eps = [torch.finfo(t.dtype).eps for t in floats]
    return 1000 * max(eps, default=torch.finfo(torch.float32).eps)
