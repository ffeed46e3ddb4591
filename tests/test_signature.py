"""A call taken apart into tensors, and the words for a call that is not the captured one."""

from __future__ import annotations

import collections
import dataclasses
import enum
import pickle
import types
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.capture.signature import Call, Dims, Signature
from rewriter.modules.structure import Unflattenable, flatten, same


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Any
    name: str = "n"


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Named(dict):  # type: ignore[type-arg]
    """A dict with an attribute beside its items."""


class Ordered(collections.OrderedDict):  # type: ignore[type-arg]
    pass


class Items(list):  # type: ignore[type-arg]
    pass


class Mode(enum.Enum):
    A = 1


def rebuilt(value: Any, tensors: Any = None) -> Any:
    leaves: list[Any] = []
    structure = flatten(value, leaves, objects=True)
    structure = pickle.loads(pickle.dumps(structure)) if tensors is None else structure
    return structure.build(leaves if tensors is None else tensors)


T = torch.arange(3.0)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=2) | st.just(T),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)


@settings(max_examples=40)
@given(values)
def test_flatten_then_build_is_the_identity(value: Any) -> None:
    leaves: list[Any] = []
    built = flatten(value, leaves, objects=False).build(leaves)
    assert repr(built) == repr(value)
    assert type(built) is type(value)


def test_objects_are_rebuilt_around_other_tensors() -> None:
    other = T + 1
    assert rebuilt(Pair(T, 2), [other]) == Pair(other, 2)
    assert rebuilt(Frozen(T), [other]).value is other
    assert rebuilt(Slotted(T), [other]).value is other
    assert rebuilt(types.SimpleNamespace(a=[T], b=1), [other]).a[0] is other
    named = Named(x=T)
    named.note = "kept"  # type: ignore[attr-defined]
    again = rebuilt(named, [other])
    assert (type(again), again["x"] is other, again.note) == (Named, True, "kept")
    assert list(rebuilt(Ordered(x=T), [other]).items())[0][1] is other
    assert rebuilt(Items([T, 1]), [other])[0] is other
    assert rebuilt(torch.Size([2, 3])) == torch.Size([2, 3])


def test_an_object_without_tensors_is_new_in_every_result() -> None:
    value = types.SimpleNamespace(count=[1])
    leaves: list[Any] = []
    structure = flatten(value, leaves, objects=True)
    first = structure.build([])
    first.count.append(2)
    assert structure.build([]).count == [1]


@pytest.mark.parametrize(
    ("value", "reason"),
    [(types.SimpleNamespace(a=1), "change in place"), (Named(a=T), "change in place"),
     (torch.nn.ReLU(), "change in place")],
)  # fmt: skip
def test_objects_among_inputs_are_refused(value: Any, reason: str) -> None:
    with pytest.raises(Unflattenable, match=reason):
        flatten([value], [], objects=False)


@pytest.mark.parametrize("value", [T.numpy(), {T}, (i for i in range(2))])
def test_what_cannot_be_taken_apart(value: Any) -> None:
    with pytest.raises(Unflattenable):
        flatten([value], [], objects=True)
    assert flatten([value], [], objects=True, opaque=True).build([])[0] is value


def test_a_container_in_itself() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(Unflattenable, match="contains itself"):
        flatten(value, [], objects=True)


def test_same_tells_types_apart_and_never_compares_tensors() -> None:
    assert same([1, {"a": (2.0, None)}], [1, {"a": (2.0, None)}])
    assert not same(1, 1.0)
    assert not same(1, True)
    assert not same(T, T.clone())
    assert not same(object(), object())


# signatures


def signature(forward: Any, *args: Any, **kwargs: Any) -> Signature:
    result, leaves = Signature.of(forward, Call.of(forward, args, kwargs))
    result.dims[False] = Dims([list(t.shape) for t in leaves])
    return result


def test_arguments_come_back_as_the_function_takes_them() -> None:
    def f(a: Any, b: Any = 1, /, c: Any = 2, *rest: Any, d: Any = 3, **more: Any) -> Any:
        return a, b, c, rest, d, more

    x, y = torch.ones(2), torch.zeros(2)
    for args, kwargs in [
        ((x,), {}), ((x, y), {"d": 4}), ((x, 1, 2, y), {}), ((x, 1), {"c": y}), ((x,), {"e": y}),
        ((x, 5, [y, {"k": x}]), {}), ((x, None, 2, y, x), {"d": y, "z": None}),
    ]:  # fmt: skip
        s = signature(f, *args, **kwargs)
        leaves = s.bind(args, kwargs, False)
        assert not isinstance(leaves, str), leaves
        got_args, got_kwargs = s.arguments(leaves)
        assert repr(f(*got_args, **got_kwargs)) == repr(f(*args, **kwargs))


def test_every_difference_is_named() -> None:
    def f(x: Any, mask: Any = None, scale: float = 1.0, extra: Any = None) -> Any: ...

    x = torch.ones(2, 3)
    s = signature(f, x, scale=2.0, extra={"a": [x], "b": "on"})
    extra = {"b": "on", "a": [x]}  # the order of keys does not matter
    assert isinstance(s.bind((x,), {"scale": 2.0, "extra": extra, "mask": None}, False), list)
    for args, kwargs, words in [
        ((x,), {"extra": extra}, "'scale' of the captured call is missing"),
        ((x, x), {"scale": 2.0, "extra": extra}, "'mask' was not in the captured call"),
        ((x, None, 3.0, extra), {}, "'scale' is 3.0, captured as 2.0"),
        ((x, None, 2, extra), {}, "'scale' is 2, captured as 2.0"),
        ((x, None, x, extra), {}, "'scale' is a tensor, captured as 2.0"),
        ((1, None, 2.0, extra), {}, "'x' is a int, captured as a tensor"),
        ((x.double(), None, 2.0, extra), {}, "'x' is torch.float64, captured as torch.float32"),
        ((x[0], None, 2.0, extra), {}, "'x' has 1 dimensions, captured with 2"),
        ((x[:1], None, 2.0, extra), {}, "'x' has size 1 in dimension 0, captured as 2"),
        ((x, None, 2.0, {"a": [x]}), {}, "'extra' has another structure"),
        ((x, None, 2.0, {"a": [x, x], "b": "on"}), {}, "'extra' has another structure"),
        ((x, None, 2.0, {"a": (x,), "b": "on"}), {}, "'extra' is a tuple, captured as a list"),
        ((x, None, 2.0, {"a": [x], "b": "off"}), {}, "'extra' is 'off', captured as 'on'"),
        ((x,), {"x": x, "scale": 2.0, "extra": extra}, "'x' is given twice"),
    ]:  # fmt: skip
        assert words in str(s.bind(args, kwargs, False))


def test_none_is_a_value_where_it_is_not_the_default() -> None:
    def f(x: Any, scale: Any = 2.0) -> Any: ...

    x = torch.ones(2)
    assert "'scale' was not in the captured call" in str(signature(f, x).bind((x, None), {}, False))


def test_autocast_is_part_of_the_call() -> None:
    def f(x: Any) -> Any: ...

    s = signature(f, torch.ones(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is torch.bfloat16" in str(s.bind((torch.ones(2),), {}, False))


def test_sizes() -> None:
    dims = Dims([["s0", "s1"], ["s0"]], {"s0": (1, 8), "s1": (2, None)}, ["s1 % 2 == 0"])
    dims = pickle.loads(pickle.dumps(dims))

    def sizes(a: tuple[int, int], b: int) -> str | None:
        return dims.difference([torch.ones(a), torch.ones(b)], ["a", "b"])

    assert sizes((3, 4), 3) is None
    assert "'b' has size 2 in dimension 0, not 3" in str(sizes((3, 4), 2))
    assert "serves 1 to 8" in str(sizes((9, 4), 9))
    assert "serves 2 to any" in str(sizes((3, 1), 3))
    assert "serves 1 to 8" in str(sizes((0, 4), 0))
    assert "break a condition" in str(sizes((3, 5), 3))
