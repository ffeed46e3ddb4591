"""What a model is beside its tensors: a save tells by it whether it is loaded into another model.

The names and shapes of parameters do not say what is computed with them: activations have none, and
a `forward` may use the same layers in another order.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import pathlib
import sys
import textwrap
from collections.abc import Mapping

from torch import nn

from rewriter.capture.hosted import original_class
from rewriter.layer import Layer
from rewriter.modules.tree import own_class

__all__ = ["differences", "likeness"]

_INSTALLED = {"site-packages", "dist-packages"}


def likeness(root: nn.Module) -> dict[str, str]:
    """Name of each module → the name of its class, and a checksum of its `forward` where that is
    the user's own code: that of installed packages changes from version to version."""
    known: dict[type, str] = {}
    found = {}
    for name, module in root.named_modules(remove_duplicate=False):
        cls = original_class(own_class(module))
        if cls not in known:
            known[cls] = f"{cls.__name__} {_forward(cls)}".strip()
        found[name] = known[cls]
    return found


def _forward(cls: type[nn.Module]) -> str:
    """Equal of forwards that differ in comments, docstring, types and layout alone, read by one
    version of Python, each of which writes code its own way; "" of foreign code, and where there is
    no source."""
    try:
        file = inspect.getsourcefile(cls.forward)
        if issubclass(cls, Layer) or file is None or _INSTALLED & set(pathlib.Path(file).parts):
            return ""
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls.forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    if not isinstance(node, ast.FunctionDef):
        return ""
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    code = node.body if ast.get_docstring(node) is None else node.body[1:]
    text = "\n".join([*names, *map(ast.unparse, code)])
    python = ".".join(map(str, sys.version_info[:2]))
    return f"{python} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """In what a model differs from one of before, in words; what one of them does not know does
    not count."""
    if then.keys() == {""} or not then:  # a save of a version that wrote the class alone
        now = {name: now[name] for name in then}
    found = []
    for name in sorted(then.keys() | now.keys()):
        old, new = (known.get(name, "").split() or [""] for known in (then, now))
        what = repr(name) if name else "the model"
        if old[0] != new[0]:
            found.append(f"{what} is {_a(new[0])}, and was {_a(old[0])}")
        elif len(old) == len(new) == 3 and old[1] == new[1] and old[2] != new[2]:
            found.append(f"the forward of {what}, a {new[0]}, reads otherwise")
    return found


def _a(cls: str) -> str:
    return f"a {cls}" if cls else "nothing"
