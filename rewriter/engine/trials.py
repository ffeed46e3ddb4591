"""Trying things out before they count: a layer at its site, the Python forward over new layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from rewriter.base import Layer, Pass
from rewriter.capture import Capture
from rewriter.capture.hosted import original_class
from rewriter.cost import propagate
from rewriter.engine.decide import Proposal
from rewriter.engine.verify import relative_error, tolerance, type_of
from rewriter.errors import VerifyError
from rewriter.modules.pointwise import inner
from rewriter.modules.running import run_flat
from rewriter.sites import Site
from rewriter.spellings import autocast_at, kind_name, source_of

__all__ = ["at", "goes_past", "try_layer"]


def try_layer(capture: Capture, rewrite: Pass, p: Proposal, seen: set[object]) -> None:
    """Raises VerifyError where a layer does not give the type of result that its site has.

    Args:
        capture: the model.
        rewrite: the pass, for the message.
        p: the layer and its site.
        seen: what was tried before: a layer like another one at a site like that one's need not be.
    """
    if any(r.leaves is None for r in capture.regions):
        return  # no shapes
    layer = inner(p.replacement.layer)
    like: object = id(layer)
    if isinstance(layer, Layer):
        tensors = (*layer.named_parameters(), *layer.named_buffers())
        own = tuple((n, type_of(t)) for n, t in tensors)
        like = type(layer), str(layer.config()), own, p.site.channels
    for node in p.site.nodes:
        source, expected = source_of(node).meta.get("val"), node.meta.get("val")
        if not isinstance(source, Tensor) or not isinstance(expected, Tensor):
            continue
        autocast = autocast_at(node)
        place = like, type_of(source), type_of(expected), str(vars(autocast)), layer.training
        if place in seen:
            continue
        seen.add(place)
        graph, holder = fx.Graph(), nn.Module()
        holder.add_module("layer", p.replacement.layer)
        call = graph.call_module("layer", (graph.placeholder("x"),))
        graph.output(call)
        try:
            with autocast:
                propagate(holder, graph, [source])
        except VerifyError as error:
            raise VerifyError(
                f"{at(rewrite, p.site)}: its layer fails on {type_of(source)}: {error}"
            ) from error
        got, wanted = type_of(call.meta["val"]), type_of(expected)
        if got != wanted:
            raise VerifyError(
                f"{at(rewrite, p.site)}: its layer changed the type of the result: it "
                f"makes {got} of {type_of(source)}, where the site makes {wanted}"
            )


def goes_past(capture: Capture, graph_only: Sequence[str], outputs: Sequence[Any] | None) -> str:
    """How the Python forward, which other calls than the captured one run, differs from the
    graphs at places that were rewritten where the user's code calls a function; "" where it does
    not.

    Equal outputs prove nothing, since an exact pass keeps them: the layers must be called.

    Args:
        capture: the rewritten model.
        graph_only: names of those places.
        outputs: of the graphs on the example inputs; None without.
    """
    if not graph_only:
        return ""
    root = capture.root
    name = original_class(root).__name__
    start = f"calls that no graph serves are refused: the Python forward of {name} "
    if outputs is None or capture.example is None:
        return start + "was not run"
    layers = {name: root.get_submodule(name) for name in graph_only}
    called: set[nn.Module] = set()
    saved = [(r, r.graphs) for r in (*capture.regions, *capture.others)]
    forwards = [(layer, vars(layer).get("forward")) for layer in layers.values()]
    why = ""
    try:
        for region, _ in saved:
            region.graphs = {}
        capture.host()
        for layer in layers.values():
            vars(layer)["forward"] = _noting(called, layer, layer.forward)
        error = relative_error(
            run_flat(root, *capture.example, grad=capture.asks_for_grad), outputs
        )
        if error is not None and error > tolerance(outputs):
            why = f"computes something else with {', '.join(graph_only)}"
    except Exception as error:  # the forward cannot use the new layers: it must not run
        why = f"cannot use {', '.join(graph_only)} ({type(error).__name__}: {error})"
    finally:
        for layer, forward in forwards:
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward
        for region, graphs in saved:
            region.graphs = graphs
    past = [name for name, layer in layers.items() if layer not in called]
    if past and not why:
        why = f"does not go through {', '.join(past)}"
    return start + why if why else ""


def _noting(called: set[nn.Module], layer: nn.Module, forward: Any) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        called.add(layer)
        return forward(*args, **kwargs)

    return noted


def at(rewrite: Pass, site: Site) -> str:
    """How a message about a failing pass begins."""
    return (
        f"{rewrite} failed on {site.fqn} ({kind_name(site.kind)}, {site.where or 'line unknown'})"
    )
