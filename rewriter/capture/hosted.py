"""The object a rewrite returns: the original class, with a forward generated from the graphs.

`host(module, state)` gives a module a dynamic subclass of its own class. Its `forward` runs the
generated code of the graph for the current mode over the module tree; a call that the graph cannot
serve runs the original Python `forward` over the same, rewritten, layers.

What a graph takes for granted. Checked at every call, which otherwise runs Python: names, types,
dtypes and sizes of the arguments, which of them are one object, and values of those that are no
tensors (`Signature`); autocast; torch's default dtype; whether gradients are on, where the model's
own code asks; dtypes of parameters; and, of every module that was opened up, its training flag,
hooks, submodules and plain attributes, and those of objects in its attributes such as a `config`
(`Watch`). Refused at capture: branches on data, attributes that the forward writes, draws from
Python's or NumPy's global random numbers, reads of the values of tensors that are neither parameter
nor buffer, questions which tensors require gradients or whether inference mode is on. Fixed at
capture, and not noticed when it changes: module-level globals and closures that the forward reads,
contents of NumPy arrays and of objects without `__dict__` in attributes, random number generators
of the model's own, environment variables and clocks. Under `torch.compile` and `torch.export` the
checks of `Watch` run once, when the call is traced, or not at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from rewriter.capture.forms import Form, Lowered, PlannedSteps, State
from rewriter.capture.program import Program, _Op, _Ref  # noqa: F401 (0.1.0 pickled them as of here)
from rewriter.errors import RewriteError
from rewriter.layer import unscriptable

__all__ = [
    "Form",
    "Hosted",
    "Lowered",
    "PlannedSteps",
    "Program",
    "State",
    "host",
    "offer_on_root",
    "original_class",
    "unhost",
]


class Hosted(nn.Module):
    """Mixin of the dynamic subclasses: how they are pickled, and moved between devices."""

    around: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {}
    """What wraps a method of the model's own class that has `save_pretrained`, by its name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        root = isinstance(self, _mixin(root=True))
        return (_rebuild, (original_class(self), root, _own_names(self)), *reduced[2:])

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` asks first.

        Raises:
            OptionError: always.
        """
        raise unscriptable(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        state: State = self.__dict__["_rewriter"]
        tensor = next(self.parameters(), None)
        for form in state.forms:
            if form.lowered is not None:
                form.lowered.drop()
            if form.signature is not None and tensor is not None:
                if tensor.device.type != form.signature.device:
                    for program in form.programs.values():
                        program.ready(str(tensor.device))
        return moved


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
        module.__dict__.pop("_rewriter", None)


def original_class(module: nn.Module | type[nn.Module]) -> type[nn.Module]:
    """The class the module had before it was hosted."""
    cls = module if isinstance(module, type) else type(module)
    return cast("type[nn.Module]", cls.__dict__.get("_original_class", cls))


_classes: dict[Any, type[nn.Module]] = {}


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

    @functools.wraps(cls.__init__)
    def built_anew(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if "_original_class" not in vars(type(self)):
            raise RewriteError(
                f"{type(self).__name__} derives from the class of a rewritten {cls.__name__}: "
                "derive it from the original class"
            )
        unhost(self)  # as `type(model)(…)`, what Lightning's load_from_checkpoint says, means it
        cls.__init__(self, *args, **kwargs)

    mixin: Any = _mixin(root)
    around = mixin.around if hasattr(cls, "save_pretrained") else {}
    namespace: dict[str, Any] = {
        **{name: wrap(getattr(cls, name)) for name, wrap in around.items() if hasattr(cls, name)},
        **{name: _OwnAttribute(name) for name in own},
        "__init__": built_anew,
        "forward": forward,
        "_original_class": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    # The user's own attributes win over the mixin's: a model may well have a `report` of its own.
    return type(cls.__name__, (cls, _mixin(root)), namespace)


def _rebuild(cls: type[nn.Module], root: bool, own: tuple[str, ...]) -> nn.Module:
    hosted = _hosted_class(cls, root, own)
    return hosted.__new__(hosted)
