"""Names in a recipe: classes by an allow-list, passes by their options, dtypes, checksums."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from typing import IO, Any

import torch
from torch import nn

from rewriter.base import Layer, Pass
from rewriter.errors import OptionError, StoreError
from rewriter.modules.typed import fits
from rewriter.recipe import plugins

__all__ = [
    "FORMAT",
    "RECIPE",
    "allowed_class",
    "check_extra",
    "class_name",
    "digest_of",
    "dtype_name",
    "dtype_of",
    "kind_path",
    "known_class",
    "pass_of",
    "pass_spec",
]

FORMAT = 1
RECIPE = "recipe.json"


def class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def kind_path(kind: Any) -> str:
    return kind if isinstance(kind, str) else class_name(kind)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pass_spec(rewrite: Any) -> Any:
    """The pass as JSON; without options (which only `load_original` needs) where they are none."""
    if not isinstance(rewrite, Pass):
        return rewrite  # as it was read from a recipe
    return {"class": class_name(type(rewrite)), "options": rewrite.spec()}


def digest_of(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def dtype_of(name: str) -> torch.dtype:
    """The dtype of this name.

    Raises:
        AttributeError, TypeError: there is none.
    """
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is not a dtype")
    return dtype


def allowed_class(name: str, extra: Sequence[type], bases: tuple[type, ...]) -> Any:
    """The class of this name, if it may be built; nothing else is ever imported.

    Raises:
        StoreError: it may not, or the package that lists it is broken.
    """
    found = _found(name, extra, bases)
    if found is None:
        raise StoreError(
            f"the recipe names {name}, which is not on the allow-list: pass "
            f"layers=[{name.rpartition('.')[2]}] to load it if you trust where the file comes from"
        )
    return found


def known_class(name: str, extra: Sequence[type], bases: tuple[type, ...]) -> Any:
    """A class where it may be used; else its name, which only `load_original` stumbles on.

    Raises:
        TypeError: `name` is no text.
        StoreError: the package that lists it is broken.
    """
    if not isinstance(name, str):
        raise TypeError(f"{str(name)[:80]} is not a name")
    return (_found(name, extra, bases) if "." in name else None) or name


def _found(name: str, extra: Sequence[type], bases: tuple[type, ...]) -> Any:
    for cls in extra:
        if class_name(cls) == name and issubclass(cls, bases):
            return cls
    if name == class_name(nn.Linear):
        return nn.Linear
    if name.startswith("rewriter.passes."):
        ours = importlib.import_module("rewriter.passes")
        exported = [getattr(ours, n) for n in ours.__all__]
        own = name.rpartition(".")[2]  # whichever file it stood in when the recipe was written
        return next((c for c in exported if c.__name__ == own and issubclass(c, bases)), None)
    try:
        return plugins.of_class(name, Pass if Pass in bases else Layer)
    except OptionError as error:
        raise StoreError(f"the recipe names {name}, and {error}") from error


def check_extra(extra: Sequence[type]) -> None:
    """What the caller lets a recipe name.

    Raises:
        OptionError: one is neither a layer nor a pass, or two have one name.
    """
    if isinstance(extra, type) or not isinstance(extra, Sequence):
        raise OptionError(f"layers must be a list of classes, not {extra!r}")
    known: dict[str, type] = {}
    for cls in extra:
        if not (isinstance(cls, type) and issubclass(cls, (Layer, Pass, nn.Linear))):
            raise OptionError(f"layers: {cls!r} is no class derived from rewriter.Layer or Pass")
        if known.setdefault(class_name(cls), cls) is not cls:
            raise OptionError(f"layers: two classes are called {class_name(cls)}: hand in one")


def pass_of(spec: Any, extra: Sequence[type]) -> Any:
    """The pass again; its JSON where it cannot be had, which only `load_original` stumbles on.

    Raises:
        KeyError, TypeError: it is damaged.
        StoreError: the package that lists it is broken.
    """
    cls: Any = known_class(spec["class"], extra, (Pass,))
    options = spec["options"]
    if isinstance(cls, str) or options is None:
        return spec
    if not fits(options, dict[str, Any]):
        raise TypeError(f"options of a pass are {str(options)[:80]}")
    try:
        return cls(**options)
    except (ValueError, TypeError, ArithmeticError):  # options of another version
        return spec
