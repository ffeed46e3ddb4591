"""The object a rewrite returns: the original class, with a forward generated from the graphs.

`host(module, state)` gives a module a dynamic subclass of its own class. Its `forward` runs the
generated code of the graph for the current mode over the module tree; a call that the graph cannot
serve runs the original Python `forward` over the same, rewritten, layers.

What a graph takes for granted. Checked at every call, which otherwise runs Python: names, types,
dtypes and sizes of the arguments, and values of those that are no tensors (`Signature`); autocast;
dtypes of parameters; and, of every module that was opened up, its training flag, hooks, submodules
and plain attributes, and those of objects in its attributes such as a `config` (`Watch`). Refused
at capture: branches on data, attributes that the forward writes, draws from Python's or NumPy's
global random numbers, reads of the values of tensors that are neither parameter nor buffer. Fixed
at capture, and not noticed when it changes: module-level globals and closures that the forward
reads, contents of NumPy arrays and of objects without `__dict__` in attributes, random number
generators of the model's own, the default dtype, environment variables and clocks, whether two
arguments are one object, and whether gradients are on where Python asks. Under `torch.compile` and
`torch.export` the checks of `Watch` run once, when the call is traced, or not at all.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import fx, nn

from rewriter.capture.guards import Watch
from rewriter.capture.signature import Signature
from rewriter.errors import SignatureError, warn
from rewriter.modules.structure import Structure
from rewriter.report import Report

__all__ = [
    "Hosted",
    "PlannedSteps",
    "Program",
    "State",
    "host",
    "offer_on_root",
    "original_class",
    "unhost",
]

_counter = itertools.count()
_MODE_TARGETS = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")
_DEVICES = ("cpu", "cuda")


class Program:
    """One graph and the Python function generated from it.

    Args:
        graph: placeholders are the flat inputs; the output is a tuple of flat results.
        output: puts the flat results together; None where the graph returns the original
            structure itself (symbolic tracing).
    """

    def __init__(self, graph: fx.Graph, output: Structure | None) -> None:
        self.graph = graph
        self.output = output
        self.changes_modes = any(
            n.op == "call_function" and getattr(n.target, "__name__", "") in _MODE_TARGETS
            for n in graph.nodes
        )
        self._functions: dict[str, Callable[..., Any]] = {}

    def __call__(self, root: nn.Module, leaves: Sequence[Any], device: str) -> Any:
        return self.built(self.results(root, leaves, device))

    def built(self, results: Any) -> Any:
        """The model's own output, of the flat results."""
        return results if self.output is None else self.output.build(results)

    def results(self, root: nn.Module, leaves: Sequence[Any], device: str) -> Any:
        """Runs the graph: its flat results."""
        function = self.ready(device)._functions[device]
        if self.changes_modes:
            return _restoring_modes(function, root, leaves)
        return function(root, *leaves)

    def ready(self, device: str = "") -> Program:
        """With the function of this device, which torch.compile could not trace the making of."""
        if device not in self._functions:
            self._functions[device] = self._compile(device)
        return self

    def _compile(self, device: str) -> Callable[..., Any]:
        graph = self.graph
        if device:
            graph = copy.deepcopy(graph)
            for node in graph.nodes:
                node.args = fx.node.map_aggregate(node.args, lambda a: _moved(a, device))
                node.kwargs = fx.node.map_aggregate(node.kwargs, lambda a: _moved(a, device))
        code = graph.python_code("self")
        filename = f"<rewriter graph {next(_counter)}>"
        linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
        namespace = dict(code.globals)
        exec(compile(code.src, filename, "exec"), namespace)  # noqa: S102 (fx's own codegen)
        return cast(Callable[..., Any], namespace["forward"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # a finished graph never changes again

    def __getstate__(self) -> dict[str, Any]:
        return {"nodes": _dump(self.graph), "output": self.output}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(_restore(state["nodes"]), state["output"])  # type: ignore[misc]
        self.ready()


def _moved(argument: Any, device: str) -> Any:
    """Device literals follow the module: a graph captured on the CPU runs where its inputs are."""
    return torch.device(device) if isinstance(argument, torch.device) else argument


def _restoring_modes(function: Callable[..., Any], root: nn.Module, leaves: Sequence[Any]) -> Any:
    """Runs code that switches grad or autocast mode by calls, not by `with`: restores both when
    an exception leaves it half way. All of these modes belong to the calling thread."""
    if torch.compiler.is_compiling():
        return function(root, *leaves)
    grad = torch.is_grad_enabled()
    cache = torch.is_autocast_cache_enabled()
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    try:
        return function(root, *leaves)
    except BaseException:
        torch._C._set_grad_enabled(grad)
        torch.set_autocast_cache_enabled(cache)
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        while torch.autocast_increment_nesting() > depth:
            torch.autocast_decrement_nesting()
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        torch.autocast_decrement_nesting()
        raise


class PlannedSteps(Protocol):
    """Runs training steps by a memory plan; `rewriter.planner.apply.training` has it."""

    @property
    def plan(self) -> Any:
        """The memory plan; None before the first step."""

    def __call__(
        self, root: nn.Module, program: Program, leaves: list[Any], rows: Any
    ) -> Any | None:
        """The flat results of one step; None where the step runs without the plan."""


@dataclass
class State:
    """What a hosted module carries beside its own attributes.

    Args:
        signature: of the captured call; None accepts every call (symbolic tracing).
        programs: the graph per mode (False: eval, True: train); a missing mode runs Python.
        strict: raise on a call with another signature.
        graph_only: rewritten places that the Python `forward` does not go through.
        watch: what the graphs take for granted about the module tree.
        report: the ledger (root only).
        recipe: what `save` writes (root only).
        warned: which differences of calls were warned of.
        memory: runs training steps by a memory plan; None without a budget.
        lowered: the fused form of the eval graph, for calls that want no gradient.
    """

    signature: Signature | None = None
    programs: dict[bool, Program] = field(default_factory=dict)
    strict: bool = False
    graph_only: tuple[str, ...] = ()
    watch: Watch | None = None
    report: Report | None = None
    recipe: Any = None
    warned: set[str] = field(default_factory=set)
    memory: PlannedSteps | None = None
    lowered: Lowered | None = None

    def run(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        program = self.programs.get(module.training)
        if program is None:
            if self.graph_only:
                mode = "train" if module.training else "eval"
                raise SignatureError(
                    f"{type(module).__name__} was not captured in {mode} mode, and its Python "
                    f"forward does not go through the rewritten {', '.join(self.graph_only)}: "
                    "see report.capture for why"
                )
            lost = self._unplanned(module)
            if lost:
                self._warn(
                    f"{type(module).__name__} has no graph for training steps; they run{lost}"
                )
            return forward(module, *args, **kwargs)
        if self.watch is not None and not torch.compiler.is_compiling():
            changed = self.watch.difference(module.training)
            if changed:
                return self._differs(module, forward, args, kwargs, changed)
        if self.signature is None:
            bound = _parameters(type(module)).bind(module, *args, **kwargs)
            bound.apply_defaults()
            return program(module, list(bound.arguments.values())[1:], "")
        leaves = self.signature.bind(args, kwargs, module.training)
        if isinstance(leaves, str):
            return self._differs(module, forward, args, kwargs, leaves)
        lost = self._unplanned(module)
        if lost and torch.compiler.is_compiling():
            if not torch.compiler.is_exporting():
                _say_once_compiled(
                    f"{type(module).__name__} is traced by torch.compile; its training steps "
                    f"run{lost}"
                )
        elif self.memory is not None and lost:
            results = self.memory(module, program, leaves, self.signature.dims[True].shapes)
            if results is not None:
                return program.built(results)
        device = leaves[0].device if leaves else None
        moved = device is not None and device.type != self.signature.device
        place = str(device) if moved else ""
        if self.lowered is not None and not module.training:
            results = self.lowered.results(module, program, leaves, place)
            if results is not None:
                return program.built(results)
        return program(module, leaves, place)

    def _differs(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, why: str
    ) -> Any:
        name = type(module).__name__
        if self.graph_only:
            raise SignatureError(
                f"{name}: {why}. The original Python forward cannot serve this call, as it does "
                f"not go through the rewritten {', '.join(self.graph_only)}. Call it as captured "
                f"({self.signature}), or rewrite it with example_inputs like this call"
            )
        if self.strict:
            raise SignatureError(
                f"{name}: {why}. Captured: {self.signature}. Rewrite with example_inputs like "
                "this call, or without strict_signature=True"
            )
        lost = self._unplanned(module)
        self._warn(
            f"{name}: {why}; such calls run the original Python forward over the rewritten "
            f"layers{lost and f',{lost}'}"
        )
        return forward(module, *args, **kwargs)

    def _unplanned(self, module: nn.Module) -> str:
        """What a training step loses that runs without the memory plan; "" for any other call."""
        if self.memory is None or not module.training or not torch.is_grad_enabled():
            return ""
        return (
            " without the memory plan, and may take more than memory_budget allows. Call it as "
            "captured, uncompiled (torch.compile has a memory_budget of its own: backend="
            "'rewriter'), or rewrite it with example_inputs like this call"
        )

    def _warn(self, text: str) -> None:
        if not torch.compiler.is_compiling() and text not in self.warned:
            self.warned.add(text)
            warn(text)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _say_once_compiled(text: str) -> None:
    """A warning while torch.compile traces, which runs this once and leaves nothing of it."""
    warn(text)


class Hosted(nn.Module):
    """Mixin of the dynamic subclasses: how they are pickled, and moved between devices."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        root = isinstance(self, _mixin(root=True))
        return (_rebuild, (original_class(self), root, _own_names(self)), *reduced[2:])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        state: State = self.__dict__["_rewriter"]
        if state.lowered is not None:
            state.lowered.drop()
        tensor = next(self.parameters(), None)
        if state.signature is not None and tensor is not None:
            if tensor.device.type != state.signature.device:
                for program in state.programs.values():
                    program.ready(str(tensor.device))
        return moved


class Lowered(Protocol):
    """What runs an eval graph with fused ops (`rewriter.lowering`)."""

    def results(self, root: nn.Module, program: Program, leaves: Any, device: str) -> Any:
        """The flat results; None where the plain program must run."""

    def drop(self) -> None:
        """Lets go of what was derived."""


_root_mixins: list[type[nn.Module]] = []
"""What the root has besides: `rewriter.store`, a room above, puts its `RewrittenModule` here."""


def offer_on_root(mixin: type[nn.Module]) -> type[nn.Module]:
    """A class decorator: the root of every rewritten model has the attributes of `mixin` too."""
    _root_mixins[:] = [mixin]
    return mixin


def _mixin(root: bool) -> type[nn.Module]:
    return _root_mixins[0] if root and _root_mixins else Hosted


def host(module: nn.Module, state: State, *, root: bool) -> None:
    """Gives `module` the generated forward, in place."""
    module.__class__ = _hosted_class(original_class(module), root, _own_names(module))
    module.__dict__["_rewriter"] = state


def unhost(module: nn.Module) -> None:
    """Takes the generated forward away again, in place."""
    if "_original_class" in vars(type(module)):
        module.__class__ = original_class(module)
        del module.__dict__["_rewriter"]


def original_class(module: nn.Module | type[nn.Module]) -> type[nn.Module]:
    """The class the module had before it was hosted."""
    cls = module if isinstance(module, type) else type(module)
    return cast("type[nn.Module]", cls.__dict__.get("_original_class", cls))


_classes: dict[Any, type[nn.Module]] = {}
_signatures: dict[Any, inspect.Signature] = {}


def _own_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the mixin that the model uses itself, for a submodule, a buffer or an attribute."""
    own = {*vars(module), *module._modules, *module._parameters, *module._buffers}
    return tuple(sorted(own & set(vars(_mixin(root=True))) - {"__module__", "__doc__"}))


class _OwnAttribute:
    """Leaves a name to the instance: its `__dict__` comes first, then its modules and tensors."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self if instance is None else nn.Module.__getattr__(instance, self.name)


def _hosted_class(cls: type[nn.Module], root: bool, own: tuple[str, ...] = ()) -> type[nn.Module]:
    key = cls, cls.forward, root, own
    if key not in _classes:
        _classes[key] = _new_class(cls, root, own)
    return _classes[key]


def _new_class(cls: type[nn.Module], root: bool, own: tuple[str, ...]) -> type[nn.Module]:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # the class's forward as it is now: it may have been patched since
        return self.__dict__["_rewriter"].run(self, cls.forward, args, kwargs)

    namespace: dict[str, Any] = {
        **{name: _OwnAttribute(name) for name in own},
        "forward": forward,
        "_original_class": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    # The user's own attributes win over the mixin's: a model may well have a `report` of its own.
    return type(cls.__name__, (cls, _mixin(root)), namespace)


def _parameters(cls: type[nn.Module]) -> inspect.Signature:
    forward = original_class(cls).forward
    if forward not in _signatures:
        _signatures[forward] = inspect.signature(forward)
    return _signatures[forward]


def _rebuild(cls: type[nn.Module], root: bool, own: tuple[str, ...]) -> nn.Module:
    hosted = _hosted_class(cls, root, own)
    return hosted.__new__(hosted)


# Graphs are pickled as plain lists: OpOverloads and fx nodes do not pickle themselves.


@dataclass(frozen=True)
class _Ref:
    name: str


@dataclass(frozen=True)
class _Op:
    path: tuple[str, ...]


def _dump(graph: fx.Graph) -> list[tuple[Any, ...]]:
    def plain(argument: Any) -> Any:
        return _Ref(argument.name) if isinstance(argument, fx.Node) else argument

    rows = []
    for node in graph.nodes:
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload):
            target = _Op((target.namespace, target._opname, target._overloadname))
        elif isinstance(target, torch._ops.OpOverloadPacket):
            target = _Op(tuple(target._qualified_op_name.split("::")))
        args = tuple(_convert(a, plain) for a in node.args)
        kwargs = {k: _convert(a, plain) for k, a in node.kwargs.items()}
        rows.append((node.op, node.name, target, args, kwargs))
    return rows


def _restore(rows: list[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def node_of(argument: Any) -> Any:
        return nodes[argument.name] if isinstance(argument, _Ref) else argument

    for op, name, target, args, kwargs in rows:
        if isinstance(target, _Op):
            target = functools.reduce(getattr, target.path, torch.ops)
        args = tuple(_convert(a, node_of) for a in args)
        kwargs = {k: _convert(a, node_of) for k, a in kwargs.items()}
        nodes[name] = graph.create_node(op, target, args, kwargs, name=name)
    return graph


def _convert(argument: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(_convert(a, leaf) for a in argument)
    if isinstance(argument, dict):
        return {k: _convert(a, leaf) for k, a in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_convert(a, leaf) for a in (argument.start, argument.stop, argument.step)))
    return leaf(argument)
