"""Call forms that come after the rewrite: captured over the rewritten layers, on the fly."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rewriter.capture import Arguments, Capture, Region, capture
from rewriter.capture.guards import Watch
from rewriter.capture.hosted import Form, State, original_class
from rewriter.capture.ladder import form_of
from rewriter.engine.install import names_of, put
from rewriter.engine.looking import sites_of
from rewriter.errors import CallError, CaptureError, OptionError, RewriteError
from rewriter.layer import Layer
from rewriter.lowering import lowered_again
from rewriter.modules.garbage import rare_collections
from rewriter.modules.running import first_line
from rewriter.modules.tensors import CONSTANT
from rewriter.modules.tree import hooked, is_hook_dict, own_class
from rewriter.recipe.recipe import Recipe
from rewriter.recipe.replaying import layer_before
from rewriter.sites import ACTIVATION, MLP

__all__ = ["capture_form", "finished"]


def capture_form(module: nn.Module, state: State, args: Any, kwargs: Any) -> Form | str:
    """Captures a call of a rewritten module, as it is now, as a new form; or why it cannot be, ""
    where the call itself fails.

    The call is traced on a twin of the module tree, so that other threads may run the module
    meanwhile, and nothing of it changes.
    """
    inner = hooked(module)
    if inner is not None and own_class(module.get_submodule(inner)) is not type(
        module.get_submodule(inner)
    ):
        return f"{inner} is sharded by itself, and its hooks gather it where a graph would not"
    call = Arguments(args, kwargs, torch.is_grad_enabled())
    try:
        with torch.inference_mode(False), rare_collections():
            twin, originals = _twin(module)
            layers = _originals_back(twin, state)
            captured = capture(twin, call, whole=True)
            _place(captured, layers)
            form = finished(captured, captured.regions[0], state)
    except CallError:
        return ""
    except RewriteError as error:
        return first_line(error)
    for setting in captured.settings:
        setting.apply(originals.get(id(setting.owner)))
    region = captured.regions[0]
    if len(form.programs) < 2:  # one mode has no graph, and the notes say why
        form.entry.reason = "; ".join(captured.notes)
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
    if first.verdicts is not None:
        alone = Capture(captured.root, captured.rung, [region])
        form.lowered = lowered_again(alone, region, first.verdicts)
    return form


# what only the graphs carry


def _originals_back(twin: nn.Module, state: State) -> dict[str, nn.Module]:
    """Puts linear layers where the Python forward reads a weight and would go past the new layer,
    so that it runs as it did before the rewrite; the layers that stood there, by name.

    Raises:
        CaptureError: blocks were removed or widths cut there, which Python cannot run any more.
    """
    recipe: Recipe | None = state.whole or state.recipe  # pickles of before have the latter
    layers: dict[str, nn.Module] = {}
    for name in state.graph_only:
        own = None if recipe is None else recipe.installed.get(name)
        inside = name.removeprefix(f"{state.fqn}.") if state.fqn else name
        layer = twin.get_submodule(inside)
        if recipe is None or own is None or name in recipe.origins or not isinstance(layer, Layer):
            raise CaptureError(f"what it was before {name} was rewritten is not kept")
        layers[inside] = layer
        if own.chain[0][0] == ACTIVATION:  # a function again
            owner, _, last = inside.rpartition(".")
            del twin.get_submodule(owner)._modules[last]
            continue
        given = _dense(layer, own.transposed, recipe.dtypes.get(own.weight_ref or ""))
        if own.bias_ref != f"{name}.bias":
            given.pop("bias", None)
        if own.weight_ref == name:
            owner, _, last = inside.rpartition(".")
            holder = twin.get_submodule(owner)
            del holder._modules[last]
            holder.register_parameter(last, nn.Parameter(given["weight"]))
        else:
            twin.set_submodule(inside, layer_before(name, recipe, given).train(layer.training))
    return layers


def _dense(layer: Layer, transposed: bool, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """A weight and a bias of the sizes of the original ones, and near them where the layer is a
    linear map: what the graph computes with them is compared with Python, and then replaced."""
    tensor = next(t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point())
    like: Any = {"device": tensor.device, "dtype": dtype or tensor.dtype}
    out, into = (int(getattr(layer, n)) for n in ("out_features", "in_features"))
    try:
        weight = layer.dense_weight().detach().to(**like)
    except OptionError:
        weight = torch.linspace(-1, 1, out * into, **like).view(out, into)
    given = {"weight": weight.t().contiguous() if transposed else weight.clone()}
    bias = getattr(layer, "bias", None)
    if isinstance(bias, torch.Tensor):
        given["bias"] = bias.detach().to(**like).clone()
    return given


def _place(captured: Capture, layers: Mapping[str, nn.Module]) -> None:
    """Puts the new layers back, in the graphs."""
    if not layers:
        return
    sites = {s.fqn: s for s in sites_of(captured) if s.kind != MLP}
    names = names_of(captured.root)
    for name, layer in layers.items():
        if name not in sites:
            raise CaptureError(f"its graph has no {name} to rewrite")
        training = layer.training
        put(captured, sites[name], layer, names)
        layer.train(training)


# the twin


def _twin(root: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """A module tree over the same parameters, each module of its original class, and the module of
    the tree by the id of its twin. Statistics are copies, as a forward may write them."""
    twins: dict[int, nn.Module] = {}
    buffers: dict[int, Any] = {}
    for module in root.modules():
        twins[id(module)] = object.__new__(original_class(own_class(module)))
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
