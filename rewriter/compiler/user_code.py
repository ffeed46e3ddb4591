"""What Dynamo knows about the code that it is compiling: the one place that asks its internals.

A backend is handed a graph and its inputs. Whose `torch.compile` asked, which module owns a
parameter, and in which mode that module is, Dynamo keeps to itself; outside of Dynamo (a backend
called by hand) all of it is unknown, and nothing here fails.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource
from torch._guards import TracingContext

from rewriter.capture.hosted import original_class

__all__ = ["Frame", "backend_of", "guard_mode", "owner_of", "source_name", "source_steps", "whose"]

_ORIGINAL = "_torchdynamo_orig_backend"


@dataclass(frozen=True)
class Frame:
    """The frame under compilation.

    Args:
        asked: the backend object of the `torch.compile` call that asked; None outside of Dynamo.
        code: qualified name of the function, `file:line` after it.
        scope: local (`L`) and global (`G`) variables by the names that sources use.
        compilation: how often the function was compiled before.
        broke: why the graph ends before the function does; "" where it does not.
        root: the module that torch.compile was called with; None where it was a function.
        of: the class of that module, or the code.
    """

    asked: Any = None
    code: str = ""
    scope: Mapping[str, Any] = field(default_factory=dict)
    compilation: int = 0
    broke: str = ""
    root: nn.Module | None = None
    of: str = ""

    @classmethod
    def current(cls, module: fx.GraphModule) -> Frame:
        """The frame whose graph this is."""
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._guards import CompileContext

        context = CompileContext.try_get()
        try:
            translator = InstructionTranslator.current_tx()
        except AttributeError:  # this thread translates nothing
            return cls()
        if translator is None or context is None:
            return cls()
        output, code = translator.output, translator.f_code
        compile_id = context.compile_id
        name = getattr(code, "co_qualname", code.co_name)  # co_qualname: Python 3.11
        asked = innermost(output.compiler_fn)
        root, where = _root(asked), f"{name} ({code.co_filename}:{code.co_firstlineno})"
        return cls(
            asked,
            where,
            {"L": output.local_scope, "G": output.global_scope},
            0 if compile_id is None else int(compile_id.frame_compile_id or 0),
            _break_reason(getattr(module, "compile_subgraph_reason", None)),
            root,
            where if root is None else whose(root),
        )

    @property
    def name(self) -> str:
        """The class of the module whose forward it is, else the function's own name."""
        for name in ("self", "fn"):
            own = self.scope.get("L", {}).get(name)
            if isinstance(own, nn.Module):
                return original_class(own).__name__
        return self.code.partition(" ")[0]

    @property
    def partial(self) -> bool:
        """It is a part of what was compiled: the names of a pattern may be in another one."""
        own = next((m for m in map(self.scope.get("L", {}).get, ("self", "fn")) if m), None)
        inside = isinstance(own, nn.Module) and self.root is not None and own is not self.root
        return bool(self.broke) or "resume_in" in self.code or inside

    def running(self) -> Frame:
        """The same code as it runs now, further up this thread's stack, for whatever model: with
        that call's variables. Itself where it is not there."""
        for frame in _stack():
            code = frame.f_code
            if self.code.endswith(f"({code.co_filename}:{code.co_firstlineno})"):
                return replace(self, scope={"L": frame.f_locals, "G": frame.f_globals})
        return self

    def module(self, source: str) -> nn.Module | None:
        """The module that owns the tensor of a source, e.g. `L['self']._modules['fc']` of
        `L['self']._modules['fc']._parameters['weight']`; None where that is not known."""
        owner = owner_of(source)
        if not owner or not self.scope:
            return None
        # a source is an expression that Dynamo's own guards evaluate the same way
        with contextlib.suppress(KeyError, AttributeError, NameError, IndexError, TypeError):
            found = eval(owner, {"__builtins__": {}}, dict(self.scope))  # noqa: S307
            if isinstance(found, nn.Module):
                return found
        return None

    def base(self, source: str) -> nn.Module | None:
        """The outermost module on the way to the owner of a source's tensor."""
        steps = source_steps(source)
        for end in range(2, len(steps) - 1):
            expression = steps[0][1] + "".join(
                f".{name}" if kind == "attr" else f"[{name!r}]" for kind, name in steps[1:end]
            )
            found = self.module(f"{expression}._parameters['x']")
            if found is not None:
                return found
        return None

    def names(self, sources: Iterable[str]) -> dict[str, str]:
        """By source, the name that the compiled module has for the module that owns the tensor."""
        if self.root is None:
            return {}
        known = {id(module): name for name, module in self.root.named_modules()}
        owners = {source: self.module(source) for source in sources}
        return {s: known[id(m)] for s, m in owners.items() if m is not None and id(m) in known}


def _stack() -> Iterator[types.FrameType]:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _root(asked: Any) -> nn.Module | None:
    """The module whose call is being compiled, found on the stack of that call."""
    for frame in _stack():
        own = frame.f_locals.get("self")
        if isinstance(own, OptimizedModule) or getattr(own, "_compiled_call_impl", None):
            if backend_of(own) is asked:  # type: ignore[arg-type]
                inside = getattr(own, "_orig_mod", own)
                return inside if isinstance(inside, nn.Module) else None
    return None


def source_steps(source: str) -> list[tuple[str, Any]]:
    """How a source reaches its value: ("name", "L"), ("item", "self"), ("attr", "_modules"), …;
    nothing where it is no chain of attributes and items."""
    try:
        node: ast.expr = ast.parse(source, mode="eval").body
    except SyntaxError:
        return []
    steps: list[tuple[str, Any]] = []
    while True:
        if isinstance(node, ast.Attribute):
            steps.append(("attr", node.attr))
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            steps.append(("item", node.slice.value))
        elif isinstance(node, ast.Name):
            return [("name", node.id), *reversed(steps)]
        else:
            return []
        node = node.value


def guard_mode(node: fx.Node) -> None:
    """What is being compiled holds for the mode (train or eval) that the module of this lifted
    parameter is in: Dynamo guards that only where the user's own code asks for it."""
    context = TracingContext.try_get()
    source = getattr(node.meta.get("grapharg"), "source", None)
    owner = getattr(getattr(source, "base", None), "base", None)
    if context is not None and owner is not None:
        guard = AttrSource(owner, "training").make_guard(GuardBuilder.CONSTANT_MATCH)
        context.guards_context.dynamo_guards.add(guard)


def owner_of(source: str) -> str:
    """The expression of the module that a parameter or buffer is of; "" of other sources."""
    steps = source_steps(source)
    if len(steps) < 3 or steps[-2] not in (("attr", "_parameters"), ("attr", "_buffers")):
        return ""
    outer = ast.parse(source, mode="eval").body
    assert isinstance(outer, ast.Subscript)
    assert isinstance(outer.value, ast.Attribute)
    return ast.unparse(outer.value.value)


def source_name(node: fx.Node) -> str:
    """`L['self']._modules['fc']._parameters['weight']` of a placeholder; "" where unknown."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return ""
    name = source.name
    return name if isinstance(name, str) else str(name())


def innermost(backend: Any) -> Any:
    """The backend inside of Dynamo's wrappers, and of the optimizer of data parallelism."""
    while True:
        inside = getattr(backend, _ORIGINAL, None)
        if inside is None:
            inside = getattr(getattr(backend, "__self__", None), "backend_compile_fn", None)
        if inside is None:
            return backend
        backend = inside


def backend_of(compiled: Callable[..., Any]) -> Any:
    """The backend object of what `torch.compile` returned; None for anything else.

    A module carries its context; a function has it in its closure.
    """
    context = getattr(compiled, "dynamo_ctx", None)
    if context is None:
        call = getattr(compiled, "_compiled_call_impl", None)  # of model.compile()
        code = getattr(call or compiled, "__code__", None)
        cells = getattr(call or compiled, "__closure__", None) or ()
        for name, cell in zip(getattr(code, "co_freevars", ()), cells, strict=False):
            if name == "self" and hasattr(cell.cell_contents, "callback"):
                context = cell.cell_contents
    return None if context is None else innermost(context.callback)


def whose(compiled: Any) -> str:
    """As `Frame.of`, of what torch.compile returned or was given."""
    inside = getattr(compiled, "_orig_mod", compiled)
    if isinstance(inside, nn.Module):
        return f"{type(inside).__module__}.{type(inside).__qualname__}"
    code = getattr(inspect.unwrap(inside), "__code__", None)
    if code is None:
        return ""
    name = getattr(code, "co_qualname", code.co_name)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})"


def _break_reason(reason: Any) -> str:
    if reason is None or not reason.graph_break:
        return ""
    said = str(reason.reason).strip().splitlines()[0]
    stack = list(reason.user_stack)
    return said + (f" ({stack[-1].filename}:{stack[-1].lineno})" if stack else "")
