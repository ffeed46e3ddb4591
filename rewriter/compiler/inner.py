"""From a rewritten graph to code that runs: layers become torch ops, and a compiler gets the rest.

A rewritten Dynamo graph calls layers of ours. `flattened` writes them out as torch ops whose
tensors are inputs of the graph, as the user's own parameters are: so one compiled code serves
every block of the same shape and every version of the weights, and a compiler's cache on disk
sees nothing but ops and shapes. `Inner` hands the graph to the inner compiler. Our ops stay
ops: Inductor calls their kernels and fuses what lies between them.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from rewriter.base import Layer
from rewriter.compiler.dynamo import Lifted
from rewriter.cost import Device
from rewriter.errors import OptionError, RewriteError
from rewriter.kernels import ops
from rewriter.lowering.lowered import Traced
from rewriter.modules.tree import attribute, find, has_hooks

__all__ = ["INNER", "Flat", "Inner", "flattened", "own_ops", "place_tensors"]

INNER = ("inductor", "aot_eager", "eager")

_ALONE = 4096
"""Numbers that a thread must have to compute between our ops: Inductor's 512 are done before a
second thread has begun."""


@dataclass
class Flat:
    """A graph without modules.

    Args:
        module: takes the kept inputs, then the derived tensors.
        kept: positions of the kept inputs among all that Dynamo passes.
        derived: tensors that the rewrite made, by name in the rewritten tree.
        fakes: of the derived tensors, in the fake mode of the compilation.
    """

    module: fx.GraphModule
    kept: list[int]
    derived: dict[str, Tensor]
    fakes: list[Tensor] = field(default_factory=list)

    def arguments(self, inputs: Sequence[Any]) -> list[Any]:
        """The example inputs of `module`."""
        return [*(inputs[i] for i in self.kept), *self.fakes]


def flattened(
    module: fx.GraphModule, lifted: Lifted, inputs: Sequence[Any], fused: Traced | None = None
) -> Flat:
    """The rewritten graph of `lifted` as ops over tensors.

    Args:
        module: the graph that Dynamo handed over.
        lifted: its normal form, rewritten.
        inputs: as Dynamo passes them.
        fused: that graph with fused ops, where there are any.
    """
    return _Flattening(module, lifted, inputs, fused).run()


def place_tensors(fused: Traced) -> dict[str, Tensor]:
    """What fused ops were packed of, by names of the places."""
    names = (n.name for n in fused.places)
    return {
        f"{name}.{i}": tensor
        for name, form in zip(names, fused.ready, strict=True)
        for i, tensor in enumerate(form.tensors)
    }


class _Flattening:
    def __init__(
        self,
        module: fx.GraphModule,
        lifted: Lifted,
        inputs: Sequence[Any],
        fused: Traced | None,
    ) -> None:
        self.module, self.lifted, self.inputs, self.fused = module, lifted, inputs, fused
        self.own = lifted.graph if fused is None else fused.program.graph
        self.forms: dict[Any, Any] = (
            {} if fused is None else dict(zip(fused.places, fused.ready, strict=True))
        )
        self.graph, self.holder = fx.Graph(), nn.Module()
        self.live = {id(inputs[i]): i for i in lifted.paths.values()}
        self.placed: dict[int, fx.Node] = {}
        self.fresh: dict[str, Tensor] = {}
        self.traced: dict[str, fx.GraphModule] = {}
        values = [n.meta.get("example_value") for n in lifted.placeholders]
        modes = [v.fake_mode for v in values if isinstance(v, FakeTensor)]
        if not modes:
            raise RewriteError("this graph carries no shapes: compile the model with torch.compile")
        # Dynamo's own fake tensors are on the nodes; what it hands to a compiler is of a new mode
        self.fake_mode = modes[0]
        context = torch._guards.TracingContext.try_get()
        self.compiler_mode = None if context is None else context.fake_mode

    def run(self) -> Flat:
        lifted, own = self.lifted, self.own
        user = [n for n in own.nodes if n.op == "placeholder" and n not in self.forms]
        tensors = {id(t): (name, t) for name, t in self._needed()}
        kept = sorted([*lifted.positions, *(self.live[i] for i in tensors if i in self.live)])
        environment: dict[Any, Any] = {}
        by_position = dict(zip(lifted.positions, user, strict=True))
        for i in kept:
            old = lifted.placeholders[i]
            new = self.graph.node_copy(old)
            _keep_source(new, getattr(old, "_dynamo_source", None))
            if i in by_position:
                environment[by_position[i]] = new
            else:
                self.placed[id(self.inputs[i])] = new
        static = [n.meta.get("tensor_dict") for n in lifted.placeholders]
        kind: Any = next((d for d in static if d and "_dynamo_static_input_type" in d), {})
        fakes = []
        for identity, (name, tensor) in tensors.items():
            if identity in self.live:
                continue
            plain = re.sub(r"\W", "_", name)  # the name of an argument in generated code
            new = self.graph.placeholder(f"derived_{len(self.fresh)}_{plain}")
            _keep_source(new, None)
            new.meta["example_value"] = _fake(self.fake_mode, tensor)
            new.meta["tensor_dict"] = dict(kind)
            self.placed[identity], self.fresh[name] = new, tensor
            fakes.append(_fake(self.compiler_mode or self.fake_mode, tensor))
        for node in own.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "get_attr" and isinstance(attribute(lifted.root, node.target), Tensor):
                found = self.placed.get(id(attribute(lifted.root, node.target)))
                if found is not None:
                    environment[node] = found
                    continue
            if node.op == "call_module" and not self._is_own(node):
                environment[node] = self._written_out(node, environment)
                continue
            if node.args and node.args[0] in self.forms:
                environment[node] = self._fused(node, environment)
                continue
            given = environment.get(node.args[0]) if node.target is operator.getitem else None
            if isinstance(given, tuple):  # the results of a fused op
                environment[node] = given[node.args[1]]
                continue
            if node.op == "get_attr" or node.op == "call_module":
                setattr(self.holder, node.target, attribute(lifted.root, node.target))
            environment[node] = self.graph.node_copy(node, lambda n: environment[n])
        result = fx.GraphModule(self.holder, self.graph)
        result.meta = dict(self.module.meta)
        for name in ("_param_name_to_source", "compile_subgraph_reason"):
            if hasattr(self.module, name):
                setattr(result, name, getattr(self.module, name))
        return Flat(result, kept, self.fresh, fakes)

    def _is_own(self, node: fx.Node) -> bool:
        """Whether a called module is a subgraph of Dynamo's."""
        return isinstance(find(self.module, str(node.target)), nn.Module)

    def _needed(self) -> list[tuple[str, Tensor]]:
        """The tensors that the rewritten graph reads, by name."""
        found: dict[str, Tensor] = {} if self.fused is None else place_tensors(self.fused)
        for node in self.own.nodes:
            if node.op == "get_attr":
                value = attribute(self.lifted.root, node.target)
                if isinstance(value, Tensor) and node.target in self.lifted.paths:
                    found[node.target] = value
            elif node.op == "call_module" and not self._is_own(node):
                layer = self.lifted.root.get_submodule(str(node.target))
                for name, tensor in _tensors(layer).items():
                    found[f"{node.target}.{name}"] = tensor
        return list(found.items())

    def _written_out(self, node: fx.Node, environment: Mapping[fx.Node, Any]) -> Any:
        layer = self.lifted.root.get_submodule(str(node.target))
        tensors = _tensors(layer)
        own = [self.placed[id(t)] for t in tensors.values()]
        given = [environment[a] for a in node.args if isinstance(a, fx.Node)]
        if len(given) != len(node.args) or node.kwargs:
            raise RewriteError(f"{node.target} is called with something that is no tensor")
        if _is_plain_linear(layer):
            bias = own[1] if len(own) > 1 else None
            new = self.graph.call_function(torch._C._nn.linear, (given[0], own[0], bias))
            new.meta = dict(node.meta)
            return new
        values = [n.meta["example_value"] for n in (*given, *own)]
        body = self._trace(layer, list(tensors), values, len(given))
        return self._inlined(body, node, [*given, *own])

    def _fused(self, node: fx.Node, environment: Mapping[fx.Node, Any]) -> Any:
        """A fused op as torch ops, with what it was packed of as inputs of the graph."""
        from torch.fx.experimental.proxy_tensor import make_fx

        form = self.forms[node.args[0]]
        own = [self.placed[id(t)] for t in form.tensors]
        args, kwargs = fx.map_arg((node.args[1:], node.kwargs), environment.__getitem__)
        flat, structure = pytree.tree_flatten((args, kwargs))
        nodes = [v for v in flat if isinstance(v, fx.Node)]

        def forward(*values: Any) -> Any:
            held, given = values[: len(own)], iter(values[len(own) :])
            all_of = [next(given) if isinstance(v, fx.Node) else v for v in flat]
            inputs, named = pytree.tree_unflatten(all_of, structure)
            return form.call(held, *inputs, **named)

        with self.fake_mode:
            body = make_fx(forward, pre_dispatch=True)(
                *(n.meta["example_value"] for n in (*own, *nodes))
            )
        return self._inlined(body, node, [*own, *nodes])

    def _inlined(self, body: fx.GraphModule, node: fx.Node, given: Sequence[fx.Node]) -> Any:
        """The nodes of a traced body in the place of a node."""
        inner: dict[fx.Node, Any] = {}
        inputs = iter(given)
        for step in body.graph.nodes:
            if step.op == "placeholder":
                inner[step] = next(inputs)
            elif step.op == "output":
                return fx.node.map_arg(step.args[0], lambda n: inner[n])
            else:
                if step.op == "get_attr":  # a constant of the layer's code
                    name = re.sub(r"\W", "_", f"{node.target}_{step.target}")
                    setattr(self.holder, name, attribute(body, step.target))
                    inner[step] = new = self.graph.get_attr(name)
                else:
                    inner[step] = new = self.graph.node_copy(step, lambda n: inner[n])
                new.meta = {k: v for k, v in node.meta.items() if k in _ORIGIN}
                new.meta["example_value"] = step.meta.get("val")
        raise AssertionError(f"the trace of {node.name} has no output")

    def _trace(
        self, layer: nn.Module, names: list[str], values: list[Any], count: int
    ) -> fx.GraphModule:
        """The layer's forward as torch ops, before autograd: its backward is traced later, with
        the rest."""
        from torch.fx.experimental.proxy_tensor import make_fx

        same = f"{type(layer)}({layer.config()})" if isinstance(layer, Layer) else id(layer)
        shapes = [(v.shape, v.stride(), v.dtype) for v in values]
        key = str((same, layer.training, names, shapes))
        if key not in self.traced:

            def forward(*arguments: Any) -> Any:
                tensors = dict(zip(names, arguments[count:], strict=True))
                return torch.func.functional_call(layer, tensors, arguments[:count])

            with self.fake_mode:
                body = make_fx(forward, pre_dispatch=True)(*values)
            body.graph.eliminate_dead_code()
            self.traced[key] = body
        return self.traced[key]


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    with mode:
        return mode.from_tensor(tensor, static_shapes=True)


_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


def _keep_source(node: fx.Node, source: Any) -> None:
    """AOTAutograd asks every input of a Dynamo graph where it comes from."""
    node._dynamo_source = source


def _is_plain_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not has_hooks(layer)


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


# inner compilers


@dataclass(frozen=True)
class Inner:
    """Who compiles the graph, and how.

    Args:
        name: one of `INNER`.
        mode: of torch.compile ("reduce-overhead", "max-autotune"); Inductor only.
        config: Inductor's own options.
        memory_budget: for the memory planner; None leaves the partition to the compiler.
        lossy: whether the planner may compress.
        device: whose times the planner goes by.
    """

    name: str = "inductor"
    mode: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    memory_budget: Any = None
    lossy: bool = False
    device: Device | None = None

    def __call__(
        self, module: fx.GraphModule, inputs: Sequence[Any], on_plan: Callable[[Any], None]
    ) -> Callable[..., Any]:
        """Code that takes the inputs of `module`, and whose backward is compiled alike.

        Args:
            module: a graph; it may be changed.
            inputs: examples of its inputs, fake or real.
            on_plan: is given the plan of every graph that the memory planner split.
        """
        if self.name == "eager":
            return module.forward
        if self.name == "aot_eager":
            return self._aot(module, inputs, on_plan)
        return self._inductor(module, inputs, on_plan)

    def _aot(
        self, module: fx.GraphModule, inputs: Sequence[Any], on_plan: Callable[[Any], None]
    ) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd
        from torch._dynamo.backends.debugging import boxed_nop
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        partition: Any = min_cut_rematerialization_partition
        if self.memory_budget is not None:
            from rewriter.planner import partitioner

            partition = partitioner(
                self.memory_budget, on_plan=on_plan, lossy=self.lossy, device=self.device
            )
        compiler = aot_autograd(
            fw_compiler=boxed_nop, partition_fn=partition, keep_inference_input_mutations=True
        )
        compiled: Callable[..., Any] = compiler(module, inputs)
        return compiled

    def _inductor(
        self, module: fx.GraphModule, inputs: Sequence[Any], on_plan: Callable[[Any], None]
    ) -> Callable[..., Any]:
        from torch._inductor import config as inductor
        from torch._inductor.compile_fx import compile_fx

        from rewriter.lowering.inductor_passes import InductorPasses

        _check_devices(inputs)
        patches = {**self._mode(), **self.config}
        if own := own_ops(module):
            place = "post_grad_custom_pre_pass"
            patches[place] = InductorPasses(patches.get(place, getattr(inductor, place)))
            patches.setdefault("cpp.min_chunk_size", max(_ALONE, inductor.cpp.min_chunk_size))
            # of each tensor of each layer at each call: Dynamo's guards have looked at them
            patches.setdefault("size_asserts", False)
        if self.memory_budget is not None:
            from rewriter.planner import inductor_partitioner

            patches["custom_partitioner_fn"] = inductor_partitioner(
                self.memory_budget, on_plan=on_plan, lossy=self.lossy, device=self.device
            )
        compile_it: Any = functools.partial(compile_fx, config_patches=patches)
        compiler_config: Any = torch.compiler.config
        if not own:
            return cast("Callable[..., Any]", compile_it(module, inputs))
        # a cached forward holds what our ops' backward formulas said when it was traced
        tag = f"{compiler_config.cache_key_tag}:rewriter:{_sources(_modules(module))}"
        with compiler_config.patch(cache_key_tag=tag):
            return cast("Callable[..., Any]", compile_it(module, inputs))

    def _mode(self) -> dict[str, Any]:
        if self.mode in (None, "default"):
            return {}
        from torch._inductor import list_mode_options

        found: dict[str, Any] = list_mode_options(self.mode)
        return found


def own_ops(module: fx.GraphModule) -> list[str]:
    """Names of the calls of ops with a record in a graph and in the graphs that it calls."""
    graphs = [m.graph for m in module.modules() if isinstance(m, fx.GraphModule)]
    return [
        str(node.target)
        for graph in graphs
        for node in graph.nodes
        if ops.find(ops.name_of(node.target)) is not None
    ]


@functools.cache
def _sources(modules: tuple[str, ...]) -> str:
    """A hash of what these modules, and all beside ours, hold."""
    paths = {p for m in modules if (p := getattr(sys.modules.get(m), "__file__", None)) is not None}
    found = hashlib.sha256()
    for path in sorted({*map(Path, paths), *Path(ops.__file__).parent.glob("*.py")}):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _modules(module: fx.GraphModule) -> tuple[str, ...]:
    """Those that define the ops with a record that a graph calls."""
    nodes = [n for m in module.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]
    records = [ops.find(ops.name_of(n.target)) for n in nodes]
    return tuple(sorted({r.needs for r in records if r is not None}))


def _check_devices(inputs: Sequence[Any]) -> None:
    from torch._inductor.codegen.common import (
        get_scheduling_for_device,
        init_backend_registration,
    )

    init_backend_registration()
    for value in inputs:
        if isinstance(value, Tensor) and get_scheduling_for_device(value.device.type) is None:
            raise OptionError(
                f"Inductor has no code generator for {value.device}: move model and inputs to a "
                "device that it knows, or compile with inner='aot_eager'"
            )
