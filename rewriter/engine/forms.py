"""Call forms that come after the rewrite: captured over the rewritten layers, on the fly."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rewriter.base import Layer
from rewriter.capture import Arguments, Capture, Region, capture
from rewriter.capture.guards import Watch
from rewriter.capture.hosted import Form, State, original_class
from rewriter.capture.ladder import form_of
from rewriter.cost import model_cost
from rewriter.errors import RewriteError
from rewriter.lowering import Lowered, lower
from rewriter.modules.running import first_line
from rewriter.modules.tensors import CONSTANT
from rewriter.modules.tree import is_hook_dict

__all__ = ["capture_form", "finished"]


def capture_form(module: nn.Module, state: State, args: Any, kwargs: Any) -> Form | str:
    """Captures a call of a rewritten module, as it is now, as a new form; or why it cannot be.

    The call is traced on a twin of the module tree, so that other threads may run the module
    meanwhile, and nothing of it changes.
    """
    if state.graph_only:
        return "its graphs carry what its Python forward does not go through"
    twin, originals = _twin(module)
    try:
        with torch.inference_mode(False):
            captured = capture(twin, Arguments(args, kwargs), whole=True)
            form = finished(captured, captured.regions[0], state)
    except RewriteError as error:
        return first_line(error)
    region = captured.regions[0]
    for name, buffer in twin._buffers.items():
        if name.startswith(CONSTANT) and name not in module._buffers:
            module.register_buffer(name, buffer, persistent=False)
    reads = None if region.reads is None else region.reads.moved(originals)
    form.watch = Watch(module, region.graphs.values(), reads)
    return form


def finished(captured: Capture, region: Region, first: State) -> Form:
    """A form beside the first one of a model: planned and lowered as that one is."""
    form = form_of(captured.root.get_submodule(region.prefix), region)
    if first.memory is not None and True in form.programs:
        form.memory = copy.deepcopy(first.memory)  # the budget, and no plan yet
    if first.lowered is not None and False in form.programs:
        form.lowered = _lowered(captured, region, first.lowered)
    return form


def _lowered(captured: Capture, region: Region, like: Any) -> Lowered | None:
    """What runs in the place of a further eval graph, by the rules of the first one."""
    alone = Capture(captured.root, captured.rung, [region], fakes=captured.fakes)
    run = region.prefix, region.graphs[False], region.leaves or []
    cost = model_cost(captured.root, [run], training=False, fakes=captured.fakes)
    return lower(alone, like.rules, cost, captured.fakes).lowered.get(region.prefix)


# the twin


def _twin(root: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """A module tree over the same parameters, each module of its original class, and the module of
    the tree by the id of its twin. Statistics are copies, as a forward may write them."""
    twins: dict[int, nn.Module] = {}
    buffers: dict[int, Any] = {}
    for module in root.modules():
        twins[id(module)] = object.__new__(original_class(module))
    for module in root.modules():
        own = dict(vars(module))
        own.pop("_rewriter", None)
        if module is root:  # what is captured is the class's forward, which it has called
            own.pop("forward", None)
        for name, value in own.items():
            own[name] = _for_twin(name, value, twins)
        if not isinstance(module, Layer):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    buffers.setdefault(id(buffer), buffer.detach().clone())
                    own["_buffers"][name] = buffers[id(buffer)]
        vars(twins[id(module)]).update(own)
    originals = {id(twins[id(m)]): m for m in root.modules()}
    return twins[id(root)], originals


def _for_twin(name: str, value: Any, twins: Mapping[int, nn.Module]) -> Any:
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if type(value) in (list, tuple):
        return type(value)(_for_twin("", v, twins) for v in value)
    if type(value) is dict or name in _TABLES or is_hook_dict(name):
        return type(value)((k, _for_twin("", v, twins)) for k, v in value.items())
    return copy.copy(value) if type(value) is set else value


_TABLES = ("_modules", "_parameters", "_buffers")
