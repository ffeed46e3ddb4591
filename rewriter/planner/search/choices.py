"""What may become of a value besides being kept, or made again by its maker.

- `routes`: closed forms. Dropout's output from its mask, a norm's input from its output, an
  activation's sign from its output, batch norm's output without its running statistics; and what
  the records of ops say.
- `packings`: smaller forms. Masks and values of which only the sign is read as bits, indices of a
  pooling as 32-bit integers: exact. With `lossy`, bfloat16, and 8 or 4 bits per group.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from rewriter.cost.work import Work
from rewriter.kernels import ops
from rewriter.kernels.ops import Derived, Part
from rewriter.planner.joint.builder import Builder
from rewriter.planner.joint.dropout import rounded
from rewriter.planner.joint.joint import Joint, Route, Step, Value
from rewriter.planner.joint.reading import hint

__all__ = ["LOSSY", "Packing", "by_value", "packings", "routes"]

aten = torch.ops.aten
LOSSY = ("bf16", "int8", "int4")
_SMALL = 1 << 14
"""Values below so many bytes are not worth an operation."""


@dataclass(frozen=True)
class Packing:
    """A smaller form in which a value waits for the backward.

    Args:
        value: which.
        kind: "bits", "sign", "int32", "bf16", "int8" or "int4".
        nbytes: of the smaller form.
        seconds: to pack and to unpack.
        exact: nothing is lost.
        direct: it serves those that read the value in the backward, and no recomputation.
    """

    value: int
    kind: str
    nbytes: int
    seconds: float
    exact: bool = True
    direct: bool = False


Choice = TypeVar("Choice", Packing, Route)


def by_value(choices: Iterable[Choice]) -> dict[int, list[Choice]]:
    """The choices there are for each value."""
    found: dict[int, list[Choice]] = {}
    for choice in choices:
        found.setdefault(choice.value, []).append(choice)
    return found


def packings(joint: Joint, lossy: tuple[str, ...] = ()) -> Iterator[Packing]:
    """All that make a value smaller."""
    signs, numbers, forms = _signs_only(joint), _from_numbers(joint), ops.forms()
    for i, value in enumerate(joint.values):
        maker = value.maker
        if maker is None or joint.steps[maker].backward or value.node is None:
            continue
        if not value.order or value.nbytes < _SMALL:
            continue
        moving = joint.pricing.moving
        numel = math.prod(value.shape)
        bits, slow = forms["bits"].nbytes(numel), moving(2 * value.nbytes + numel)
        if value.dtype == torch.bool:
            yield Packing(i, "bits", bits, slow)
        elif value.dtype == torch.int64 and _pooled(joint.steps[maker]):
            yield Packing(i, "int32", numel * 4, moving(3 * value.nbytes))
        elif value.dtype.is_floating_point:
            if i in signs:
                yield Packing(i, "sign", bits, slow, direct=True)
            if i not in numbers:
                continue
            # plain operations find ranges, add noise, round; a kernel may do all at once
            passes = moving(value.nbytes) + moving(2 * value.nbytes) + moving(2 * value.nbytes)
            if "bf16" in lossy and value.dtype == torch.float32:
                yield Packing(i, "bf16", numel * 2, moving(3 * value.nbytes), False)
            for name in [n for n in ("int8", "int4") if n in lossy]:
                form, device = forms[name], value.node.meta["val"].device.type
                packed = form.nbytes(numel)
                once = form.at_once(device, value.dtype)
                seconds = 2 * moving(value.nbytes + packed) if once else passes
                yield Packing(i, name, packed, seconds, False)


_SIGN_READERS = {aten.threshold_backward.default: 1, aten.leaky_relu_backward.default: 1}
"""Operations that read only the sign of one argument, and which."""


def _signs_only(joint: Joint) -> set[int]:
    """Values of which the backward reads nothing but where they are above zero."""
    good: set[int] = set()
    bad: set[int] = set()
    for number in joint.backward:
        step = joint.steps[number]
        assert step.node is not None
        place = _SIGN_READERS.get(step.node.target)  # type: ignore[call-overload]
        threshold = step.node.args[2] if len(step.node.args) > 2 else 0
        for j, argument in enumerate(step.node.args):
            if isinstance(argument, fx.Node):
                values = joint.node_values.get(argument.name, ())
                plain = step.node.target is aten.leaky_relu_backward.default or threshold == 0
                (good if j == place and plain else bad).update(values)
        bad.update(v for v in step.inputs if v not in good)
    return good - bad


def _from_numbers(joint: Joint) -> set[int]:
    """Values computed from parameters or from inputs that are floats. Others are masks: additive
    ones hold -inf, or numbers as large, beside which a group's other values are lost."""
    found = {
        i for i, v in enumerate(joint.values) if v.given == "input" and v.dtype.is_floating_point
    }
    for number in joint.forward:
        step = joint.steps[number]
        if found.intersection(step.inputs):
            found.update(v for v in step.outputs if joint.values[v].dtype.is_floating_point)
    return found


def _pooled(step: Step) -> bool:
    return step.op.startswith("aten.max_pool")


def routes(joint: Joint, lossy: bool = False) -> Iterator[Route]:
    """All closed forms of this graph.

    Args:
        joint: the graph.
        lossy: also those that lose digits: a norm's input from its output divides by the norm's
            weight, which may be near zero.
    """
    for number in joint.forward:
        step = joint.steps[number]
        assert step.node is not None
        find = _ROUTES.get(step.op)
        if find is not None:
            yield from find(joint, step, step.node, lossy)
        name = ops.name_of(step.node.target)
        record = ops.find(name)
        for derived in record.derived(name) if record is not None else ():
            yield from _recorded(joint, step, step.node, derived)


def _value(joint: Joint, argument: object) -> int | None:
    """The one value behind a node."""
    found = joint.node_values.get(argument.name, ()) if isinstance(argument, fx.Node) else ()
    return found[0] if len(found) == 1 else None


def _made(joint: Joint, step: Step, place: int) -> tuple[int, Value] | None:
    """The value that `step` returns at this place of a tuple, with its node."""
    assert step.node is not None
    for user in step.node.users:
        if user.target is operator.getitem and user.args[1] == place:
            value = _value(joint, user)
            if value is not None and joint.values[value].node is user:
                return value, joint.values[value]
    return None


def _result(joint: Joint, step: Step, place: int) -> int | None:
    """The value that `step` returns at this place, alone or in a tuple."""
    assert step.node is not None
    if isinstance(step.node.meta.get("val"), Tensor):
        value = _value(joint, step.node)
        return value if value is not None and value in step.outputs else None
    made = _made(joint, step, place)
    return None if made is None else made[0]


Get = Callable[[fx.Node], fx.Node]


def _dropout(joint: Joint, step: Step, node: fx.Node, lossy: bool) -> Iterator[Route]:
    """out = x · mask / (1 − p), from the mask."""
    x, out, mask = _value(joint, node.args[0]), _made(joint, step, 0), _made(joint, step, 1)
    p = node.args[1]
    if x is None or out is None or mask is None or not isinstance(p, float) or p >= 1:
        return
    source, masked = node.args[0], mask[1].node
    assert isinstance(source, fx.Node)
    assert masked is not None
    target: fx.Node = masked

    def emit(build: Builder, get: Get) -> fx.Node:
        scale = rounded(1.0 / (1.0 - p), source.meta["val"])
        return build(aten.native_dropout_backward.default, get(source), get(target), scale)

    yield Route(out[0], (x, mask[0]), step.seconds, 0, "dropout by its mask", False, emit)


def _recorded(joint: Joint, step: Step, node: fx.Node, derived: Derived) -> Iterator[Route]:
    """A closed form that the record of an op gives."""
    made = _result(joint, step, derived.output)
    given = _arguments(node)
    sources = [given.get(name) for name in derived.reads]
    values = [_value(joint, source) for source in sources]
    if made is None or any(v is None for v in values):
        return
    inputs = tuple(dict.fromkeys(v for v in values if v is not None))

    def emit(build: Builder, get: Get) -> fx.Node:
        plain = {n: a for n, a in given.items() if not isinstance(a, fx.Node)}
        read = {n: get(given[n]) for n in derived.reads}
        last: fx.Node = derived.emit(build, **plain, **read)
        return last

    parts = derived.parts(**fx.node.map_arg(given, lambda n: n.meta.get("val")))
    work = [_as_work(part) for part in parts]
    seconds = sum(joint.pricing.seconds(w) for w in work)
    flops = sum(w.count * w.flops for w in work)
    yield Route(made, inputs, seconds, flops, derived.name, False, emit)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an op, by name; those at their default too."""
    assert isinstance(node.target, OpOverload)
    declared = node.target._schema.arguments
    given = {a.name: a.default_value for a in declared if a.has_default_value()}
    return given | {a.name: v for a, v in zip(declared, node.args, strict=False)} | node.kwargs


def _as_work(part: Part) -> Work:
    """Of sizes that are symbols, what they were at capture."""
    figures: dict[str, Any] = vars(part) | {"shape": tuple(map(hint, part.shape))}
    numbers = {k: hint(v) for k, v in figures.items() if isinstance(v, int | torch.SymInt)}
    return Work(**figures | numbers)


def _layer_norm(joint: Joint, step: Step, node: fx.Node, lossy: bool) -> Iterator[Route]:
    """x = (y − β) / γ / rstd + mean."""
    source, _, weight, bias = node.args[:4]
    x = _value(joint, source)
    made = [_made(joint, step, i) for i in range(3)]
    if x is None or any(m is None for m in made) or (weight is not None and not lossy):
        return
    y, mean, rstd = (m[1].node for m in made if m is not None)
    numbers = tuple(m[0] for m in made if m is not None)

    def emit(build: Builder, get: Get) -> fx.Node:
        assert y is not None
        assert mean is not None
        assert rstd is not None
        z = get(y)
        if isinstance(bias, fx.Node):
            z = build(aten.sub.Tensor, z, get(bias))
        scale = get(rstd)
        if isinstance(weight, fx.Node):
            scale = build(aten.mul.Tensor, scale, get(weight))
        z = build(aten.div.Tensor, z, scale)
        return build(aten.add.Tensor, z, get(mean))

    seconds = joint.pricing.moving(6 * joint.values[x].nbytes)
    yield Route(x, numbers, seconds, 0, "a norm's input from its output", True, emit)


def _batch_norm(joint: Joint, step: Step, node: fx.Node, lossy: bool) -> Iterator[Route]:
    """out = (x − mean) · rstd · γ + β with the batch's own statistics, made again from x; the
    running ones, which may be updated only once, are left alone."""
    source, weight, bias, _, _, training, momentum, eps = node.args
    x, made = _value(joint, source), [_made(joint, step, i) for i in range(3)]
    if x is None or not training or any(m is None for m in made):
        return
    out, *statistics = (m for m in made if m is not None)

    def emit(build: Builder, get: Get) -> fx.Node:
        given = [get(a) if isinstance(a, fx.Node) else a for a in (source, weight, bias)]
        norm = aten._native_batch_norm_legit.no_stats
        return build(operator.getitem, build(norm, *given, True, momentum, eps), 0)

    read = [v for a in (weight, bias) if isinstance(a, fx.Node) for v in joint.node_values[a.name]]
    yield Route(
        out[0], (x, *read), step.seconds, 0, "batch norm without its running statistics", False,
        emit, sum(value.nbytes for _, value in statistics),
    )  # fmt: skip


_ROUTES: dict[str, Callable[[Joint, Step, fx.Node, bool], Iterator[Route]]] = {
    "aten.native_dropout": _dropout,
    "aten.native_layer_norm": _layer_norm,
    "aten._native_batch_norm_legit_functional": _batch_norm,
}
