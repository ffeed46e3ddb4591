"""What the command line names: passes, and the callables that make models.

`monarch:nblocks=4`, `quantize:int8-dynamic`, `topk:k=64,where=encoder.*` and `mine.MyPass:3` are
passes; `package.module:factory` and `folder/file.py:factory` are factories.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import re
import sys
import traceback
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rewriter.base import Pass, read_number
from rewriter.errors import OptionError, RewriteError, nearest
from rewriter.recipe import plugins

__all__ = ["built", "here", "parse_pass", "parse_sizes"]


def _passes() -> Mapping[str, type[Pass]]:
    """Every pass that ships, by its lower-case name."""
    package = importlib.import_module("rewriter.passes")
    found = (getattr(package, name) for name in package.__all__)
    return {c.__name__.lower(): c for c in found if issubclass(c, Pass)}


def parse_pass(text: str) -> Pass:
    """`name`, `name:options` or `name(options)` as a pass; `Pass.parse` says how options are read.

    A name without dots is a pass that ships, or one that another package lists (`plugins`); one
    with dots is a pass of one's own, `module.Class`.

    Raises:
        OptionError: no such pass or option (the nearest is named), two passes of one name, or an
            impossible value.
    """
    called = re.fullmatch(r"\s*([\w.-]+)\s*\((.*)\)\s*", text, re.DOTALL)
    name, options = called.groups() if called else text.partition(":")[::2]
    return _pass(name.strip()).parse(options)


def _pass(name: str) -> type[Pass]:
    if not name:
        raise OptionError("'' is no pass: a pass as text is name:option=value,…")
    module, dot, own = name.rpartition(".")
    if not dot:
        return _named(name.lower())
    if not all(part.isidentifier() for part in name.split(".")):
        raise OptionError(f"there is no pass {name!r}: write module.Class")
    try:
        found = getattr(importlib.import_module(module), own)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"there is no pass {name!r}: {_said(error)}") from error
    except (Exception, SystemExit) as error:  # the user's own module
        raise OptionError(f"{module} cannot be imported: {_said(error)}") from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise OptionError(f"{name} is no pass: it must be a class derived from rewriter.Pass")
    return found


def _named(name: str) -> type[Pass]:
    """The pass of this name: ours, or of another package."""
    ours, theirs = _passes(), plugins.listed(Pass)
    known = {*ours, *(e.name.lower() for e in theirs)}
    if name not in known:
        raise OptionError(f"no pass is called {name!r}{nearest(name, sorted(known))}")
    found = [e for e in theirs if e.name.lower() == name]
    both = [f"{ours[name].__module__}.{ours[name].__name__}"] if name in ours else []
    both += map(plugins.said, found)
    if len(both) > 1:
        raise OptionError(
            f"two passes are called {name!r}: {' and '.join(both)}; name the one you want by its "
            "class, module.Class"
        )
    cls: type[Pass] = ours[name] if name in ours else plugins.loaded(found[0], Pass)
    return cls


def parse_sizes(texts: list[str]) -> dict[str, int]:
    """`batch=32` → {"batch": 32}.

    Raises:
        OptionError: a text is not name=whole number.
    """
    found: dict[str, int] = {}
    for text in texts:
        name, _, value = text.partition("=")
        number = read_number(value.strip(), int)
        if not name.strip() or number is None:
            raise OptionError(f"{text!r}: write size=number, e.g. batch=32")
        found[name.strip()] = number
    return found


def built(spec: str) -> tuple[nn.Module, Any]:
    """(model, example inputs or None) of `module:factory` or `file.py:factory`.

    The factory is called without arguments and returns a model, or (model, example inputs). A
    name with dots is an attribute of an attribute. `here` finds modules of the current directory.

    Raises:
        OptionError: there is no such module or factory, it fails, or returns something else.
    """
    module, _, name = spec.rpartition(":")
    if not module or not name:
        raise OptionError(f"{spec!r}: write module:factory, e.g. mymodels:resnet or path.py:resnet")
    made = _call(_attribute(_module(module), module, name), spec)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"{spec} returned an object of type {type(model).__name__}: it must return an "
            "nn.Module, or a tuple (nn.Module, example inputs)"
        )
    return model, inputs


@contextlib.contextmanager
def here() -> Iterator[None]:
    """The current directory last on the path, wherever `python -m` has put it.

    Last, so that no folder of it hides an installed module: `kernels` would (transformers).
    """
    before = list(sys.path)
    own = str(Path.cwd())
    sys.path[:] = [p for p in before if p not in ("", own)] + [own]
    try:
        yield
    finally:
        sys.path[:] = before


def _module(name: str) -> types.ModuleType:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name)
        if not path.is_file():
            raise OptionError(f"there is no file {name}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        before = sys.modules.get(path.stem)
        sys.modules[path.stem] = module  # dataclasses and pickle look there
        sys.path.insert(0, str(path.resolve().parent))  # its neighbours, as `python file.py` does
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem]
            if before is not None:
                sys.modules[path.stem] = before
            raise
        finally:
            sys.path.remove(str(path.resolve().parent))
        return module
    except RewriteError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise OptionError(
                f"cannot import {name}: there is no module {error.name!r} here; run from its "
                f"folder, or name its file ({name.replace('.', '/')}.py:factory)"
            ) from error
        raise OptionError(f"cannot import {name}: {error}") from error
    except (Exception, SystemExit) as error:
        raise OptionError(f"cannot import {name}: {_said(error)}") from error


def _attribute(module: types.ModuleType, where: str, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        try:
            there = hasattr(found, part)
            inner = getattr(found, part) if there else None
        except (Exception, SystemExit) as error:  # a property, a module's __getattr__
            raise OptionError(f"{where}:{name} cannot be read: {_said(error)}") from error
        if not there:
            public = [n for n in vars(found) if not n.startswith("_")] if part == name else []
            near = difflib.get_close_matches(part, public, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"{where} has no {name}{hint}")
        found = inner
    return found


def _call(factory: Any, spec: str) -> Any:
    if isinstance(factory, nn.Module):  # a model itself
        return factory
    if not callable(factory):
        raise OptionError(f"{spec} cannot be called: it is of type {type(factory).__name__}")
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise OptionError(f"{spec}() failed: {_said(error)}") from error


def _said(error: BaseException) -> str:
    """The error in one line, with the place in the user's file that raised it."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # the user's class of errors fails itself
        lines = []
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<frozen")]
    return f"{said} ({own[-1].filename}:{own[-1].lineno})" if own else said
