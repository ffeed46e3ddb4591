"""Call forms: in what ways a module was called, and what runs each of them.

A client calls a model in several ways: with labels and without, with a mask or a cache, one row or
many, under autocast. Each way that was captured is a `Form` with graphs of its own; `State` finds
the one that serves a call. Where none does, a new one is captured over the layers as they are now
(`Capturer`, which the engine gives), up to `MAX_FORMS`; what cannot be captured runs the original
Python `forward`, which is said once and counted in the report.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from rewriter.capture.guards import Watch
from rewriter.capture.program import Program
from rewriter.capture.signature import Signature
from rewriter.errors import SignatureError, warn
from rewriter.modules.structure import is_constant
from rewriter.report import CallForm, Report

__all__ = ["MAX_FORMS", "Capturer", "Form", "Lowered", "PlannedSteps", "State", "Traced"]

MAX_FORMS = 8
"""So many forms of one module are captured, and so many further ones tried in vain."""

_FULL = "full"
"""Of all calls that come when the bound is reached."""

_FAILS = ""
"""No reason for want of a form: the call fails without any graph, and its own error says why."""

_ALL_MODULES = (
    "hooks on all modules of the process are set (register_module_forward_hook and the like), of "
    "which a graph calls only those of its layers"
)

_log = logging.getLogger("rewriter")


class PlannedSteps(Protocol):
    """Runs training steps by a memory plan; `rewriter.planner.apply.training` has it. A deep copy
    keeps the budget and has no plan of a graph yet: each form gets one."""

    @property
    def plan(self) -> Any:
        """The memory plan; None before the first step."""

    @property
    def peak(self) -> int:
        """Bytes that the plan of the last planned step comes to."""

    @property
    def without(self) -> str:
        """Why the last step that ran without the plan did; "" where none did."""

    def __call__(
        self, root: nn.Module, program: Program, leaves: list[Any], rows: Any
    ) -> Any | None:
        """The flat results of one step; None where the step runs without the plan."""


class Lowered(Protocol):
    """What runs an eval graph with fused ops (`rewriter.lowering`)."""

    def results(self, root: nn.Module, program: Program, leaves: Any, device: str) -> Any:
        """The flat results; None where the plain program must run."""

    def in_graph(self, root: nn.Module, program: Program) -> Traced | None:
        """What a compiler traces; None where that is the plain program."""

    def follow(self, root: nn.Module, program: Program, leaves: Sequence[Any]) -> Traced | None:
        """What Dynamo traces, which follows the weights; None where that is the plain program."""

    def drop(self) -> None:
        """Lets go of what was derived."""


class Traced(Protocol):
    """An eval graph with fused ops as a compiler traces it, with the weights as they were."""

    def __call__(self, root: nn.Module, leaves: Sequence[Any], device: str) -> Any:
        """The model's output."""


class Capturer(Protocol):
    """Captures a call of a hosted module as a new form; a function of a module, so that it is
    copied and pickled by name."""

    def __call__(self, module: nn.Module, state: State, args: Any, kwargs: Any) -> Form | str:
        """The form, or why there is none; "" where the call itself fails."""


@dataclass
class Form:
    """One way to call a module, with the graphs that serve it.

    Args:
        signature: of the captured call; None accepts every call (symbolic tracing).
        programs: the graph per mode (False: eval, True: train); a missing mode runs Python.
        watch: what the graphs take for granted about the module tree.
        entry: the form in the report, which counts its calls.
        memory: runs training steps by a memory plan; None without a budget.
        lowered: the fused form of the eval graph, for calls that want no gradient.
        traced: what compilers trace in place of the eval graph; None where they trace that.
    """

    signature: Signature | None
    programs: dict[bool, Program]
    watch: Watch | None = None
    entry: CallForm = field(default_factory=CallForm)
    memory: PlannedSteps | None = None
    lowered: Lowered | None = None
    traced: Traced | None = None
    _bound: dict[bool, tuple[int, tuple[nn.Module, ...]]] = field(default_factory=dict, repr=False)

    def run(self, module: nn.Module, leaves: list[Any], training: bool, tracing: bool) -> Any:
        """The model's output, by the graph of the mode."""
        program, entry, signature = self.programs[training], self.entry, self.signature
        if tracing or signature is None:
            if not tracing:
                entry.graph += 1
            return self._traced(module, leaves, training)(module, leaves, self._place(leaves))
        if self.memory is not None and training and torch.is_grad_enabled():
            results = self.memory(module, program, leaves, signature.dims[True].shapes)
            if results is not None:
                entry.planned += 1
                entry.planned_peak = max(entry.planned_peak, self.memory.peak)
                return program.built(results)
            entry.reason = entry.reason or self.memory.without
        place = self._place(leaves)
        if self.lowered is not None and not training:
            results = self.lowered.results(module, program, leaves, place)
            if results is not None:
                entry.lowered += 1
                return program.built(results)
        entry.graph += 1
        bound = None if self.watch is None else self._modules(module, training, self.watch.version)
        return program.built(program.results(module, leaves, place, bound))

    def _traced(self, module: nn.Module, leaves: list[Any], training: bool) -> Traced:
        """What a compiler traces, or who looks on: the graph with fused ops where a call wants no
        gradient, else the plain one."""
        program = self.programs[training]
        if training or torch.is_grad_enabled() or not torch.compiler.is_compiling():
            return program
        if self.traced is not None:
            return self.traced
        if self.lowered is None or torch.compiler.is_exporting():
            return program
        return self.lowered.follow(module, program, leaves) or program

    def leaves(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> list[Any] | str:
        """The flat inputs that the graphs take, or how the call differs from the captured one."""
        if self.signature is not None:
            return self.signature.bind(args, kwargs, module.training)
        bound = _parameters(forward).bind(module, *args, **kwargs)
        bound.apply_defaults()
        return list(bound.arguments.values())[1:]

    def fits(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> str | None:
        """Why the form does not serve a call, or None."""
        leaves = self.leaves(module, forward, args, kwargs)
        return leaves if isinstance(leaves, str) else self.changed(module.training)

    def changed(self, training: bool) -> str | None:
        """What of the module has changed since the capture, or None."""
        if self.watch is None or training not in self.programs:
            return None
        return self.watch.recast() or self.watch.difference(training)

    def _place(self, leaves: Sequence[Any]) -> str:
        if self.signature is None:
            return ""
        device = leaves[0].device if leaves else None
        return "" if device is None or device.type == self.signature.device else str(device)

    def _modules(self, module: nn.Module, training: bool, version: int) -> tuple[nn.Module, ...]:
        """The modules that the program calls, which hold as long as the watch has not moved on."""
        found = self._bound.get(training)
        if found is None or found[0] != version:
            found = self._bound[training] = version, self.programs[training].bind(module)
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": {}, "traced": None}


class _Capturing:
    """One capture at a time in this process; what the capture itself calls is not captured."""

    lock = threading.Lock()
    thread: int | None = None


@dataclass
class State:
    """What a hosted module carries beside its own attributes.

    Args:
        forms: the ways of calling it that were captured; the first is the one of the report.
        strict: raise on a call in another form.
        graph_only: rewritten places that the Python `forward` does not go through.
        report: the ledger (root only).
        recipe: what `save` writes (root only).
        whole: the recipe of the root, in every part of it that runs graphs.
        warned: which differences of calls were warned of.
        capturer: captures new forms; None where there shall be none.
        ledger: the forms in the report of the root, of all hosted modules.
        fqn: dotted name of the module in the root.
        island: counts the calls of a module that runs Python, whatever the call.
        others: counts the training steps without a plan that nobody tried to capture.
        refused: calls that could not be captured (`_kind_of_call`), with the form that counts them.
        planned: what plans training steps; every form has a copy of its own.
        saving: a method of the library that the model comes from is writing it.
        verdicts: where fused ops run in eval mode (`rewriter.lowering.Verdicts`); None where no
            form shall have any.
    """

    forms: list[Form] = field(default_factory=list)
    strict: bool = False
    graph_only: tuple[str, ...] = ()
    report: Report | None = None
    recipe: Any = None
    whole: Any = None
    warned: set[str] = field(default_factory=set)
    capturer: Capturer | None = None
    ledger: list[CallForm] = field(default_factory=list)
    fqn: str = ""
    island: CallForm | None = None
    others: CallForm | None = None
    refused: dict[Any, tuple[str, CallForm]] = field(default_factory=dict)
    planned: PlannedSteps | None = None
    saving: bool = False
    verdicts: Any = None

    @property
    def programs(self) -> dict[bool, Program]:
        """The graphs of the first form."""
        return self.forms[0].programs if self.forms else {}

    @property
    def signature(self) -> Signature | None:
        """Of the first form."""
        return self.forms[0].signature if self.forms else None

    @property
    def memory(self) -> PlannedSteps | None:
        """What plans the steps of the first form, captured or not yet."""
        return self.forms[0].memory if self.forms else self.planned

    @memory.setter
    def memory(self, memory: PlannedSteps | None) -> None:
        if self.forms:
            self.forms[0].memory = memory
        self.planned = memory

    @property
    def lowered(self) -> Lowered | None:
        """The fused ops of the first form."""
        return self.forms[0].lowered if self.forms else None

    @lowered.setter
    def lowered(self, lowered: Lowered | None) -> None:
        if self.forms:
            self.forms[0].lowered = lowered

    def run(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Serves one call: by the graph of its form, or by the original Python."""
        tracing = torch.compiler.is_compiling()
        differs, changed = "", None
        if not tracing and not self.graph_only and _all_hooked():
            return self._differs(module, forward, args, kwargs, _ALL_MODULES, None, tracing)
        for form in self.forms:
            leaves = form.leaves(module, forward, args, kwargs)
            if isinstance(leaves, str):
                differs = differs or leaves
                continue
            changed = None if tracing else form.changed(module.training)
            if changed is None:
                return self._served(form, module, forward, args, kwargs, leaves, tracing)
        return self._new(module, forward, args, kwargs, changed or differs, changed, tracing)

    def _served(
        self, form: Form, module: nn.Module, forward: Any, args: Any, kwargs: Any,
        leaves: list[Any], tracing: bool,
    ) -> Any:  # fmt: skip
        """A call in this form."""
        training = module.training
        if training in form.programs:
            lost = self._unplanned(module) if tracing else ""
            if lost and not torch.compiler.is_exporting():
                name = type(module).__name__
                _say_once_compiled(
                    f"{name} is traced by torch.compile; its training steps run{lost}"
                )
            return form.run(module, leaves, training, tracing)
        if self.graph_only:
            mode = "train" if training else "eval"
            raise SignatureError(
                f"{type(module).__name__} was not captured in {mode} mode, and its Python "
                f"forward does not go through the rewritten {', '.join(self.graph_only)}: "
                "see report.capture for why"
            )
        if not tracing:
            form.entry.python += 1
            if lost := self._unplanned(module):
                name, reason = type(module).__name__, form.entry.reason
                why = f" ({reason})" if reason else ""
                self._warn(f"{name} has no graph for training steps{why}; they run{lost}")
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
        if text not in self.warned:
            self.warned.add(text)
            warn(text)

    # calls in no known form

    def _new(
        self,
        module: nn.Module,
        forward: Any,
        args: Any,
        kwargs: Any,
        differs: str,
        changed: str | None,
        tracing: bool,
    ) -> Any:
        """A call that no form serves: captured if it may be, else by Python."""
        if not self.forms and (tracing or self.capturer is None):
            if not tracing and self.island is not None:
                self.island.python += 1
            return forward(module, *args, **kwargs)
        if tracing or self.strict and self.forms:
            return self._differs(module, forward, args, kwargs, differs, None, tracing)
        asks = any(f.signature is not None and f.signature.grad is not None for f in self.forms)
        grad = torch.is_grad_enabled() if asks else None
        kind: Any = changed, grad, _kind_of_call(args, kwargs, module.training)
        if len(self.forms) >= MAX_FORMS or len(self.refused) >= MAX_FORMS:
            kind = kind if kind in self.refused else _FULL
        if kind not in self.refused:
            form = self._captured(module, forward, args, kwargs, kind)
            if form == _FAILS and not self.graph_only:
                return forward(module, *args, **kwargs)
            if isinstance(form, Form):
                leaves = form.leaves(module, forward, args, kwargs)
                assert isinstance(leaves, list)
                return self._served(form, module, forward, args, kwargs, leaves, tracing)
        why, entry = self.refused.get(kind, ("", None))
        words = "; ".join(dict.fromkeys(w for w in (differs, why) if w))
        return self._differs(module, forward, args, kwargs, words, entry, tracing)

    def _captured(
        self, module: nn.Module, forward: Any, args: Any, kwargs: Any, kind: Any
    ) -> Form | str | None:
        """A new form for this call; None where there can be none, or not now; or `_FAILS`."""
        if self.capturer is None or _Capturing.thread == threading.get_ident():
            return None
        if not _may_capture(module, args, kwargs):
            return None
        # others run Python meanwhile, but where that cannot serve
        if not _Capturing.lock.acquire(blocking=bool(self.graph_only)):
            return None
        _Capturing.thread = threading.get_ident()
        try:
            for form in self.forms:  # another thread may have been here
                if form.fits(module, forward, args, kwargs) is None:
                    return form
            return self._attempt(module, forward, args, kwargs, kind)
        finally:
            _Capturing.thread = None
            _Capturing.lock.release()

    def _attempt(
        self, module: nn.Module, forward: Any, args: Any, kwargs: Any, kind: Any
    ) -> Form | str | None:
        start = time.perf_counter()
        name = f"{type(module).__name__} {self.fqn}".strip()
        made: Form | str
        if kind is _FULL:
            made = f"{MAX_FORMS} forms of calls were captured or tried already"
        else:
            assert self.capturer is not None
            _log.info("%s: capturing a new form (%s)", name, _described(args, kwargs))
            made = self.capturer(module, self, args, kwargs)
            if made == _FAILS:
                return _FAILS
        if isinstance(made, Form):
            made = made.fits(module, forward, args, kwargs) or made
        seconds = time.perf_counter() - start
        if isinstance(made, str):
            call = "any further call" if kind is _FULL else _described(args, kwargs)
            entry = CallForm(call, self.fqn, reason=made, seconds=seconds)
            self.refused[kind] = made, entry
            _log.info("%s: a call (%s) runs Python: %s", name, entry.call, made)
        else:
            entry = made.entry
            entry.call = "" if made.signature is None else made.signature.described()
            entry.module, entry.seconds = self.fqn, seconds
            self.forms = [*self.forms, made]
            _log.info("%s: captured a new form (%s) in %.1f s", name, entry.call, seconds)
        if len(self.ledger) < 8 * MAX_FORMS:
            self.ledger.append(entry)
        return None if isinstance(made, str) else made

    def _differs(
        self, module: nn.Module, forward: Any, args: Any, kwargs: Any, why: str,
        entry: CallForm | None, tracing: bool,
    ) -> Any:  # fmt: skip
        """A call that no graph serves, as things are."""
        name = type(module).__name__
        captured = "; or ".join(str(f.signature) for f in self.forms)
        if self.graph_only:
            raise SignatureError(
                f"{name}: {why}. The original Python forward cannot serve this call, as it does "
                f"not go through the rewritten {', '.join(self.graph_only)}. Call it as captured "
                f"({captured}), or rewrite it with example_inputs=[call, call], a call of each kind"
            )
        if self.strict:
            raise SignatureError(
                f"{name}: {why}. Captured: {captured}. Undo the change, rewrite with a list of "
                "calls as example_inputs, or without strict_signature=True"
            )
        lost = self._unplanned(module)
        if tracing and lost and not torch.compiler.is_exporting():
            _say_once_compiled(f"{name}: {why}; torch.compile traces such training steps{lost}")
        if not tracing:
            if entry is None and lost:
                entry = self._others()
            if entry is not None:
                entry.python += 1
                entry.reason = entry.reason or why
            said = why if entry is None or entry is self.others else entry.reason
            if (self.forms or lost) and said not in self.warned:
                self.warned.add(said)
                warn(
                    f"{name}: {why}; such calls run the original Python forward over the rewritten "
                    f"layers{lost and f',{lost}'}"
                )
        return forward(module, *args, **kwargs)

    def _others(self) -> CallForm:
        """Counts the training steps without their memory plan that nobody tried to capture: under
        a tracer's eyes, or on tensors of another kind."""
        if self.others is None:
            self.others = CallForm("calls that cannot be captured", self.fqn)
            self.ledger.append(self.others)
        return self.others

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "forms" not in state:  # one of 0.1.0 or 0.2.0, which have one form
            names = ("signature", "programs", "watch", "memory", "lowered")
            own = {name: state[name] for name in names if name in state}
            state = {k: v for k, v in state.items() if k not in names}
            programs = own.pop("programs", {})
            state["forms"] = [Form(programs=programs, **own)] if programs else []
        self.__dict__.update(vars(State()))
        self.__dict__.update(state)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _say_once_compiled(text: str) -> None:
    """A warning while torch.compile traces, which runs this once and leaves nothing of it."""
    warn(text)


def _all_hooked() -> bool:
    """Whether hooks on all modules are not only torch's own, which look on (FLOP counters)."""
    if not torch_module._has_any_global_hook():
        return False
    hooks = (
        hook
        for name, own in vars(torch_module).items()
        if name.startswith("_global_") and isinstance(own, dict)
        for hook in own.values()
    )
    return any(not str(getattr(h, "__module__", "")).startswith("torch.") for h in hooks)


_signatures: dict[Any, inspect.Signature] = {}


def _parameters(forward: Callable[..., Any]) -> inspect.Signature:
    if forward not in _signatures:
        _signatures[forward] = inspect.signature(forward)
    return _signatures[forward]


def _may_capture(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a call is an ordinary one: on ordinary tensors, and nothing looks on."""
    tensors = [t for t in [*args, *kwargs.values()] if isinstance(t, Tensor)]
    return (
        not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        and all(type(t) in (Tensor, nn.Parameter) for t in [*tensors, *module.parameters()])
        and all(t.layout is torch.strided and not t.is_nested for t in tensors)
        and all(type(b) is Tensor for b in module.buffers())
    )


def _kind_of_call(args: Any, kwargs: Any, training: bool) -> Any:
    """What two calls have in common that are captured, or not, for the same reason: names, types,
    numbers of dimensions, options; hashable, and without addresses."""
    device = next((t.device.type for t in [*args, *kwargs.values()] if isinstance(t, Tensor)), "")
    cast = bool(device) and device != "meta" and torch.is_autocast_enabled(device)
    return (
        training,
        torch.get_autocast_dtype(device) if cast else None,
        tuple(map(_kind_of, args)),
        tuple((k, _kind_of(v)) for k, v in sorted(kwargs.items())),
    )


def _kind_of(value: Any, depth: int = 0) -> Any:
    if isinstance(value, Tensor):
        empty = not value.is_nested and value.numel() == 0
        return value.dtype, value.dim(), empty, value.device.type, value.layout, value.is_nested
    if depth < 4:
        if isinstance(value, list | tuple):
            return type(value).__name__, tuple(_kind_of(v, depth + 1) for v in value)
        if isinstance(value, dict):
            return "dict", tuple((str(k), _kind_of(v, depth + 1)) for k, v in value.items())
    return repr(value) if is_constant(value) and not callable(value) else type(value).__qualname__


def _described(args: Any, kwargs: Any) -> str:
    """A call in a few words, for the report."""
    given = [(str(i), v) for i, v in enumerate(args)] + list(kwargs.items())
    return ", ".join(f"{name}: {_type(value)}" for name, value in given)


def _type(value: Any) -> str:
    if isinstance(value, Tensor) and value.is_nested:  # has no sizes
        return f"a nested tensor of {value.dtype}"
    if isinstance(value, Tensor):
        sizes = ", ".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    return type(value).__name__ if value is not None else "None"
