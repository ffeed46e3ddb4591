"""What Dynamo knows about the code that it is compiling: the one place that asks its internals.

A backend is handed a graph and its inputs. Whose `torch.compile` asked, which module owns a
parameter, and in which mode that module is, Dynamo keeps to itself; outside of Dynamo (a backend
called by hand) all of it is unknown, and nothing here fails.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from rewriter.hosted import original_class

__all__ = ["Frame", "backend_of", "source_name"]

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
    """

    asked: Any = None
    code: str = ""
    scope: Mapping[str, Any] = field(default_factory=dict)
    compilation: int = 0
    broke: str = ""

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
        return cls(
            innermost(output.compiler_fn),
            f"{name} ({code.co_filename}:{code.co_firstlineno})",
            {"L": output.local_scope, "G": output.global_scope},
            0 if compile_id is None else int(compile_id.frame_compile_id or 0),
            _break_reason(getattr(module, "compile_subgraph_reason", None)),
        )

    @property
    def name(self) -> str:
        """The class of the module whose forward it is, else the function's own name."""
        for name in ("self", "fn"):
            own = self.scope.get("L", {}).get(name)
            if isinstance(own, nn.Module):
                return original_class(own).__name__
        return self.code.partition(" ")[0]

    def module(self, source: str) -> nn.Module | None:
        """The module that owns the tensor of a source, e.g. `L['self']._modules['fc']` of
        `L['self']._modules['fc']._parameters['weight']`; None where that is not known."""
        owner = re.sub(r"\._(parameters|buffers)\['[^']+'\]$", "", source)
        if owner == source or not self.scope:
            return None
        # a source is an expression that Dynamo's own guards evaluate the same way
        with contextlib.suppress(KeyError, AttributeError, NameError):
            found = eval(owner, {"__builtins__": {}}, dict(self.scope))  # noqa: S307
            if isinstance(found, nn.Module):
                return found
        return None


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


def _break_reason(reason: Any) -> str:
    if reason is None or not reason.graph_break:
        return ""
    said = str(reason.reason).strip().splitlines()[0]
    stack = list(reason.user_stack)
    return said + (f" ({stack[-1].filename}:{stack[-1].lineno})" if stack else "")
