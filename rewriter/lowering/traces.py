"""What compilers trace of a model whose eval graphs were lowered: the fused ops, or the layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from rewriter.capture.forms import Form, State, Traced
from rewriter.lowering.lowered import Lowered

__all__ = ["lowered_in_traces"]


@contextlib.contextmanager
def lowered_in_traces(model: nn.Module) -> Iterator[bool]:
    """Compilers trace the eval graphs of a model as they were lowered, where a fused op has a form
    for graphs, with weights that are constants: those of now. Says whether any has.

    Args:
        model: as `rewrite` returned it, or what holds such models.
    """
    before: list[tuple[Form, Traced | None]] = []
    try:
        for form, module in _eval_forms(model):
            before.append((form, form.traced))
            lowered = form.lowered or Lowered((), ())
            form.traced = lowered.in_graph(module, form.programs[False])
        yield any(form.traced is not None for form, _ in before)
    finally:
        for form, traced in before:
            form.traced = traced


def _eval_forms(model: nn.Module) -> Iterator[tuple[Form, nn.Module]]:
    for module in model.modules():
        state = vars(module).get("_rewriter")
        if isinstance(state, State):
            yield from ((f, module) for f in state.forms if False in f.programs)
