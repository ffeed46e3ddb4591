"""Which attributes a forward reads, of its modules and of the objects that they hold.

A trace fixes what it read, and nothing else: a `config` may get a new field, a trainer may set an
attribute of its own on the model, and the graph still holds. While `recording` is on, the objects
have a subclass of their class that notes every name that is looked up.
"""

from __future__ import annotations

import abc
import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.modules.structure import SYMBOLS, is_constant
from rewriter.sites import is_leaf

__all__ = ["Reads", "in_torch", "objects_in", "owners", "recording"]

_set_class: Any = vars(object)["__class__"]
_NO_CONSTANT: Any = object()


class Reads:
    """The names that were looked up, per object.

    What cannot be observed (an object of a built-in type, one that hands out its `__dict__`, a
    layer, which is one node of a graph) counts as read whole.

    Attributes:
        carried: an attribute that was read and then set to a size of the inputs, so that the next
            call reads what this one left there; "" where there is none.
    """

    def __init__(self) -> None:
        self._names: dict[int, set[str]] = {}
        self._whole: set[int] = set()
        self._set: dict[tuple[int, str], list[Any]] = {}
        self.carried = ""
        self._held: list[Any] = []  # no id is given anew

    def of(self, owner: Any) -> set[str] | None:
        """The names that were read of an object; None for all."""
        return None if id(owner) in self._whole else self._names.get(id(owner))

    def watch(self, owner: Any) -> None:
        """Starts to note what is read of an object."""
        self._held.append(owner)
        self._names[id(owner)] = set()

    def read(self, owner: Any, name: str) -> Any:
        """A look-up: the value; also one of what is not there is noted."""
        names = self._names.get(id(owner))
        if names is not None and name != "__dict__":
            names.add(name)
        value = object.__getattribute__(owner, name)
        if names is None or name != "__dict__":
            return value
        asking = sys._getframe(2)  # whoever looks up
        if _asker(asking).f_globals.get("__name__", "").partition(".")[0] == "rewriter":
            return value
        if asking.f_code.co_name in ("__getattribute__", "__getattr__"):
            return value if in_torch(asking) else _Noted(self, owner, value)
        while asking.f_back is not None and asking.f_code.co_name == "__getattribute__":
            asking = asking.f_back
        if not in_torch(asking):
            self.all_of(owner)
        return value

    def set(self, owner: Any, name: str, value: Any) -> None:
        """An attribute is set."""
        kept = value if is_constant(value) else _NO_CONSTANT
        place = (id(owner), name)
        if isinstance(value, SYMBOLS) and place not in self._set and name in (self.of(owner) or ()):
            self.carried = name
        self._set.setdefault(place, []).append(kept)

    def given(self, owner: Any, name: str) -> list[Any] | None:
        """What an attribute was set to, one by one; None where that could not be observed."""
        return None if id(owner) in self._whole else self._set.get((id(owner), name), [])

    def all_of(self, owner: Any) -> None:
        """The whole object was read, or cannot be observed."""
        self._held.append(owner)
        self._whole.add(id(owner))

    def moved(self, twins: dict[int, Any]) -> Reads:
        """The same of other objects: `twins` has the new one for the id of an old one."""
        found = Reads()
        for owner in self._held:
            new = twins.get(id(owner), owner)
            if id(owner) in self._names:
                found._names[id(new)] = self._names[id(owner)]
            if id(owner) in self._whole:
                found._whole.add(id(new))
            found._held.append(new)
        return found


def _asker(frame: FrameType) -> FrameType:
    """Who called the look-up methods of a class."""
    while frame.f_back is not None and frame.f_code.co_name in ("__getattribute__", "__getattr__"):
        frame = frame.f_back
    return frame


def in_torch(frame: FrameType) -> bool:
    """Whether code is torch's, which finds submodules and tensors in a `__dict__`, or ours."""
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "rewriter")


class _Noted(dict[str, Any]):
    """The `__dict__` of an object for its own look-up method: the names that it takes are read."""

    def __init__(self, reads: Reads, owner: Any, real: dict[str, Any]) -> None:
        super().__init__(real)
        self._reads, self._owner, self._real = reads, owner, real

    def _note(self, name: str) -> None:
        names = self._reads.of(self._owner)
        if names is not None:
            names.add(name)

    def __getitem__(self, name: str) -> Any:
        self._note(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self._note(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._note(name)
        return super().get(name, default)

    def __setitem__(self, name: str, value: Any) -> None:
        self._real[name] = value
        super().__setitem__(name, value)

    def __iter__(self) -> Iterator[str]:
        self._reads.all_of(self._owner)
        return super().__iter__()

    def keys(self) -> Any:
        self._reads.all_of(self._owner)
        return super().keys()

    def items(self) -> Any:
        self._reads.all_of(self._owner)
        return super().items()

    def values(self) -> Any:
        self._reads.all_of(self._owner)
        return super().values()


@contextlib.contextmanager
def recording(root: nn.Module) -> Iterator[Reads]:
    """Notes what is read of the modules of a tree, and of what they hold, while it is open."""
    reads = Reads()
    changed: list[tuple[Any, type]] = []
    try:
        for owner in owners(root):
            cls = type(owner)
            reads.watch(owner)
            if isinstance(owner, nn.Module) and is_leaf(owner):
                reads.all_of(owner)
                continue
            try:
                _set_class.__set__(owner, _recorder(cls, reads))
                changed.append((owner, cls))
                _ = owner.__class__
            except TypeError:  # of a built-in type, or of one that takes no subclass
                reads.all_of(owner)
                continue
            if "__class__" not in (reads.of(owner) or ()):  # its own look-up goes another way
                reads.all_of(owner)
        yield reads
    finally:
        for owner, cls in changed:
            _set_class.__set__(owner, cls)


def _recorder(cls: type, reads: Reads) -> type:
    """A subclass of `cls` that notes look-ups where `object` is about to answer them, so after a
    class's own `__getattribute__` has put one name in another's place."""
    if type(cls) not in (type, abc.ABCMeta):
        raise TypeError(f"{cls.__name__} has a metaclass of its own")

    class Bottom:
        __slots__ = ()

        def __getattribute__(self, name: str) -> Any:
            return reads.read(self, name)

    class Top:  # with a `__dict__` as `cls` has one: its instances then fit
        def __init_subclass__(cls) -> None:
            """Nothing of what the class does where it is really derived from."""

        def __setattr__(self, name: str, value: Any) -> None:
            reads.set(self, name, value)
            super().__setattr__(name, value)

        def __reduce_ex__(self, protocol: Any) -> Any:  # a copy is one of the class itself
            reads.all_of(self)
            reduced = super().__reduce_ex__(protocol)
            if not isinstance(reduced, tuple):
                return reduced
            args = tuple(cls if a is made else a for a in reduced[1])
            return (cls if reduced[0] is made else reduced[0], args, *reduced[2:])

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__slots__": ()}
    made: type = type(cls)(cls.__name__, (Top, cls, Bottom), names)
    return made


def owners(root: nn.Module) -> list[Any]:
    """The modules of a tree and the objects with attributes that they hold, each once."""
    found: dict[int, Any] = {}

    def visit(owner: Any) -> None:
        if id(owner) in found:
            return
        found[id(owner)] = owner
        for value in vars(owner).values():
            for inner in objects_in(value):
                visit(inner)

    for module in root.modules():
        visit(module)
    return list(found.values())


def objects_in(value: Any) -> list[Any]:
    """Objects with attributes, in a value or in the containers that it is."""
    if isinstance(value, list | tuple):
        return [inner for v in value for inner in objects_in(v)]
    if isinstance(value, dict):
        return [inner for v in value.values() for inner in objects_in(v)]
    foreign = isinstance(value, nn.Module | Tensor | torch.Generator | type(sys))
    if foreign or callable(value) or not hasattr(value, "__dict__"):
        return []
    return [value]
