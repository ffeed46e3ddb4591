"""Whether one trace serves both modes: does train mode make the torch calls that eval mode makes?

The trace of eval mode keeps a record of the model's torch calls. The forward then runs once more,
in train mode, and no call is executed: each must be the next one of the record, on the very same
tensors and equal other arguments, and is answered with the recorded result. A forward that comes to
the same results this way computes the same, whatever the sizes and values.

Dropout is the one call that may differ: it is told the mode by an argument, and in both modes it
gives a new tensor of the same type. Where only that argument differs, the node is marked with what
train mode gives, and `in_train_mode` makes the graph of train mode from that of eval mode. What
drops may lie in memory in another way, so a `contiguous` that had nothing to do in eval mode is a
call there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode

from rewriter.modules.isolation import kept_numbers
from rewriter.modules.keeping import kept, written
from rewriter.modules.running import modes
from rewriter.modules.structure import SYMBOLS, Structure, flatten, is_constant, same
from rewriter.spellings import mutates

__all__ = ["Record", "Replayed", "in_train_mode", "replayed"]

_DROPOUT: Any = torch.nn.functional.dropout
_ATTENTION: Any = torch.nn.functional.scaled_dot_product_attention
_CONTIGUOUS: Any = torch.Tensor.contiguous
_TRAIN = "rewriter_train"
"""Key in a node's meta: (name of an argument, its value in train mode)."""
_LAID_OUT = "rewriter_contiguous"
"""Key in a node's meta: the model asks for the value to be contiguous, as it was in eval mode."""


@dataclass
class _Made:
    """One torch call: what it was given and gave, and the nodes it was traced as."""

    func: Any
    args: Any
    kwargs: Any
    result: Any
    nodes: list[fx.Node]


class Record:
    """The torch calls of a forward that is traced, in order."""

    def __init__(self) -> None:
        self.calls: list[_Made] = []

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Makes one call and keeps it."""
        args_given, kwargs_given = _copied((args, kwargs))  # that the model may change afterwards
        proxy = get_proxy_mode() if func in (_DROPOUT, _ATTENTION, _CONTIGUOUS) else None
        last = None if proxy is None else next(iter(reversed(proxy.tracer.graph.nodes)))
        result = func(*args, **kwargs)
        nodes: list[fx.Node] = []
        if proxy is not None:
            traced = reversed(proxy.tracer.graph.nodes)
            nodes = list(itertools.takewhile(lambda n: n is not last, traced))
            if func is _CONTIGUOUS and result is args[0]:
                slot: Any = get_proxy_slot(result, proxy.tracer, None)
                nodes = [] if slot is None else [slot.proxy.node]
        self.calls.append(_Made(func, args_given, kwargs_given, _copied(result), nodes))
        return result


@dataclass
class Replayed:
    """What a replay found.

    Args:
        alike: train mode makes the same calls and gives the same results, but for dropout.
        clean: the replay left no trace in the graph that is being traced; else that is useless.
        dropout: whether train mode drops where eval mode does not.
    """

    alike: bool
    clean: bool
    dropout: bool = False


class _Differs(Exception):
    """The replayed forward leaves the record."""


class _Replay(TorchFunctionMode):
    """Answers every torch call from a record."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.left = iter(record.calls)
        self.marks: list[tuple[fx.Node, tuple[str, Any]]] = []
        self.laid_out: list[fx.Node] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        then = next(self.left, None)
        if then is None or func != then.func:
            raise _Differs
        if not (_alike(args, then.args) and _alike(kwargs or {}, then.kwargs)):
            self.marks.append(_dropped(then, args, kwargs or {}))
        if func is torch._C._set_grad_enabled:  # Python code may ask for the mode
            _set_grad(*args)
        if func is _CONTIGUOUS and then.result is then.args[0]:
            self.laid_out += then.nodes
        return _copied(then.result)


def _dropped(then: _Made, args: Any, kwargs: Any) -> tuple[fx.Node, tuple[str, Any]]:
    """The node of a call that drops in train mode but not in eval mode, and its mark.

    Raises:
        _Differs: the call differs in something else.
    """
    if then.func is _DROPOUT:
        before, now = _as_dropout(*then.args, **then.kwargs), _as_dropout(*args, **kwargs)
        off: float = False
        mark: tuple[str, Any] = "train", True
        target: Any = torch.ops.aten.dropout.default
    elif then.func is _ATTENTION:
        before, now = _as_attention(*then.args, **then.kwargs), _as_attention(*args, **kwargs)
        off, mark = 0.0, ("dropout_p", now[-1])
        target = torch.ops.aten.scaled_dot_product_attention.default
    else:
        raise _Differs
    nodes = [n for n in then.nodes if not isinstance(n.meta.get("val"), SYMBOLS)]
    one = len(nodes) == 1 and nodes[0].target is target
    new = isinstance(then.result, Tensor) and not any(then.result is a for a in before)
    known = type(now[-1]) is type(off) and now[-1] == mark[1]
    if not (one and new and known and before[-1] == off and _alike(before[:-1], now[:-1])):
        raise _Differs
    return nodes[0], mark


def _as_dropout(
    input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False
) -> tuple[Any, ...]:
    return input, p, inplace, training


def _as_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0, *rest: Any,
    **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    return query, key, value, attn_mask, rest, options, dropout_p


def in_train_mode(graph: fx.Graph) -> fx.Graph | None:
    """The graph of train mode: a copy of that of eval mode, with what a replay marked there; None
    where a copy made earlier or later could hold another value.

    Args:
        graph: of eval mode, each node with its value at the example's sizes.
    """
    copied = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(graph, twins))
    moved: dict[fx.Node, None] = {}  # whose layout may be another than in eval mode
    asked: dict[fx.Node, None] = {}
    after: dict[fx.Node, None] = {}  # what may share memory with those, among others
    for node, twin in twins.items():
        mark = node.meta.pop(_TRAIN, None)
        laid_out = node.meta.pop(_LAID_OUT, False)
        twin.meta = dict(node.meta)
        if mark is not None and isinstance(node.target, OpOverload):  # a layer knows its own mode
            _set_argument(twin, node.target, *mark)
        lands = mark is not None and not _keeps_layout(node, mark[0])
        if lands or any(n in moved for n in twin.all_input_nodes):
            (asked if laid_out else moved)[twin] = None
        if lands or any(n in after for n in twin.all_input_nodes):
            after[twin] = None
    if asked and any(map(mutates, after)):
        return None
    for node in asked:
        with copied.inserting_after(node):
            new = copied.call_function(torch.ops.aten.contiguous.default)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        new.args = (node,)
    return copied


def _set_argument(node: fx.Node, target: OpOverload, name: str, value: Any) -> None:
    at = [a.name for a in target._schema.arguments].index(name)
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)


def _keeps_layout(node: fx.Node, argument: str) -> bool:
    """Whether what drops lies in memory as what it is given, which is what eval mode returns."""
    if argument == "dropout_p":  # another kernel of attention
        return False
    value = node.all_input_nodes[0].meta["val"]
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(value))


def replayed(
    module: nn.Module,
    call: Callable[[], Any],
    record: Record,
    results: list[Any],
    structure: Structure,
) -> Replayed:
    """Runs a forward in train mode against the record of its eval mode; to be called while that
    is traced.

    Args:
        module: whose mode is switched.
        call: runs it.
        record: of the same call in eval mode.
        results, structure: the flat results of that call and what they were taken from.
    """
    proxy = get_proxy_mode()
    if proxy is None:
        return Replayed(alike=False, clean=True)
    nodes = proxy.tracer.graph.nodes
    before, grad = len(nodes), torch.is_grad_enabled()
    changes = written(module)
    replay = _Replay(record)
    again: list[Any] = []
    try:
        with kept_numbers() as drew, kept(module, data=False), modes(module, True):
            with _unseen_modules(), replay:
                own = flatten(call(), again, objects=True)
                alike = not changes() and not drew()
        alike = (
            alike
            and next(replay.left, None) is None
            and _alike(again, results)
            and _same_structure(own, structure)
        )
    except Exception:  # whatever it is, a trace of train mode itself meets it again
        alike = False
    finally:
        _set_grad(grad)
    # comparisons of sizes are traced too: nothing uses them, so that they fall away
    new = itertools.islice(nodes, before, None)
    clean = all(isinstance(n.meta.get("val"), SYMBOLS) for n in new)
    if alike:
        for node, mark in replay.marks:
            node.meta[_TRAIN] = mark
        for node in replay.laid_out if replay.marks else ():
            node.meta[_LAID_OUT] = True
    return Replayed(alike, clean, bool(replay.marks))


@contextlib.contextmanager
def _unseen_modules() -> Iterator[None]:
    """The tracer counts calls of modules, and keeps a stack of them that an exception would leave
    as it is: inside, modules are called past it."""
    call: Any = vars(nn.Module)["__call__"]
    nn.Module.__call__ = nn.Module._wrapped_call_impl  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]


def _set_grad(enabled: bool) -> None:
    with torch._C.DisableTorchFunction():  # or it would be traced
        torch._C._set_grad_enabled(enabled)


def _copied(value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {k: _copied(v) for k, v in value.items()}
    return value


def _alike(a: Any, b: Any) -> bool:
    """The same tensors, equal constants, symbolic numbers of equal expressions."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(v, b[k]) for k, v in a.items())
    if isinstance(a, slice):
        return _alike((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if isinstance(a, SYMBOLS):
        return bool(a.node.expr == b.node.expr)
    return is_constant(a) and bool(a == b)


def _same_structure(a: Structure, b: Structure) -> bool:
    if a.kind == "copy":  # an object without tensors
        equal = b.kind == "copy" and type(a.value) is type(b.value)
        return equal and (a.value is b.value or _same_state(a.value, b.value))
    return (
        a.kind == b.kind
        and a.type is b.type
        and a.items == b.items
        and same(a.value, b.value)
        and len(a.children) == len(b.children)
        and all(map(_same_structure, a.children, b.children))
    )


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, dict | list | set | frozenset) or not hasattr(a, "__dict__"):
        return type(a) in (dict, list) and same(a, b)
    return not hasattr(type(a), "__slots__") and same(vars(a), vars(b))
