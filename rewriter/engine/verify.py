"""Checks of what must hold after every pass; no option turns them off."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rewriter.capture import Capture
from rewriter.errors import VerifyError
from rewriter.modules.comparing import relative_error, tolerance, type_of

__all__ = ["Boundary", "boundary", "check", "relative_error", "tolerance", "type_of"]


@dataclass(frozen=True)
class Boundary:
    """What a pass may not change: types of inputs and results, and who owns which parameter."""

    types: tuple[tuple[str, ...], ...]
    parameters: Mapping[str, nn.Parameter]


def boundary(capture: Capture) -> Boundary:
    """The boundary of the model as it is now."""
    types = []
    for _, _, graph in capture.graphs():
        ends = [n for n in graph.nodes if n.op == "placeholder"]
        ends += list(next(n for n in reversed(graph.nodes) if n.op == "output").all_input_nodes)
        types.append(tuple(type_of(n.meta.get("val")) for n in ends))
    return Boundary(tuple(types), dict(capture.root.named_parameters(remove_duplicate=False)))


def ties(parameters: Mapping[str, nn.Parameter]) -> list[frozenset[str]]:
    """Groups of names that share one parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), set()).add(name)
    return [frozenset(group) for group in names.values() if len(group) > 1]


def check(
    capture: Capture,
    before: Boundary,
    installed: Sequence[nn.Module],
    name: str,
    cut: Collection[int] = (),
) -> None:
    """Checks the rewritten model against the boundary it had before the pass.

    Args:
        capture: after the pass, propagated.
        before: `boundary` before the pass.
        installed: the layers that the pass put into the model.
        name: of the pass, for the message.
        cut: parameters by identity, which their new layers need not share with what was tied.

    Raises:
        VerifyError: a graph is malformed, a value lost its type, a result changed its type, a
            tie was broken, or a parameter outside the new layers appeared, went or changed.
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
    for was, now in zip(before.types, after.types, strict=True):
        if was != now:
            raise VerifyError(
                f"{name} changed the type of an input or a result: {', '.join(was)} became "
                f"{', '.join(now)}"
            )
    layers = {id(layer) for layer in installed}
    places = [n for n, m in capture.root.named_modules(remove_duplicate=False) if id(m) in layers]

    def touched(parameter: str) -> bool:
        return any(parameter == p or parameter.startswith(f"{p}.") for p in places)

    for group in ties(before.parameters):
        if any(id(before.parameters[n]) in cut for n in group):
            group = frozenset(n for n in group if not touched(n))
        ids = {id(after.parameters[n]) for n in group if n in after.parameters}
        gone = [n for n in group if touched(n)]
        shared = {id(p) for n, p in after.parameters.items() if touched(n)}
        if len(ids) > 1 or (0 < len(gone) < len(group) and not ids <= shared):
            raise VerifyError(f"{name} broke the tie between {', '.join(sorted(group))}")
    outside = {n: p for n, p in after.parameters.items() if not touched(n)}
    expected = {n: p for n, p in before.parameters.items() if not touched(n)}
    new, lost = sorted(set(outside) - set(expected)), sorted(set(expected) - set(outside))
    changed = [n for n in outside if n in expected and outside[n] is not expected[n]]
    if new or lost or changed:
        raise VerifyError(
            f"{name}: parameters outside the replaced layers are not as they were: new {new}, "
            f"lost {lost}, changed {changed}"
        )
