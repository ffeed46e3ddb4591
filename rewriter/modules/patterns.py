"""Patterns of several operations, written as one line, and where a graph has them.

    conv >> batch_norm >> relu      a chain: each value is read by the next operation alone
    linear >> (relu | gelu)         either of two operations at one place
    linear >> add >> layer_norm     a sum goes on with either of its two values
    conv >> maybe(batch_norm)       an operation that may be there or not
    fan(linear)                     siblings: two or more calls that read one value
    attend(linear)                  attention of a value to itself: three siblings, cut into heads
    gated(gate, linear)             an MLP of three layers: linear(act(gate(x)) · linear(x))

An operation is told by one name whichever front end spelled it (`rewriter.spellings.spelled`), so
a pattern holds no spelling; `rewriter.sites.find_matches` looks for one in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from rewriter.errors import OptionError

__all__ = [
    "Added",
    "Attend",
    "Chain",
    "Fan",
    "Gated",
    "Match",
    "Op",
    "Pattern",
    "activation",
    "add",
    "attend",
    "attended",
    "batch_norm",
    "conv",
    "conv_transpose",
    "dropout",
    "fan",
    "find",
    "gated",
    "gelu",
    "layer_norm",
    "linear",
    "maybe",
    "op",
    "relu",
    "silu",
    "view_shape",
]

Spell = Callable[[Node], str]
"""The one name of a node's operation."""
Source = Callable[[Node], "Node | None"]
"""The node whose value a node works on: its activations, not its weight."""
Added = Callable[[Node, Node], "Node | None"]
"""(sum, one of its two values) → the other; None where the first is no such sum."""


@dataclass(frozen=True)
class Op:
    """One call of an operation that has one of these names.

    Args:
        names: of the operation.
        optional: whether a chain goes on without it as well.

    Raises:
        OptionError: a chain begins with an optional operation.
    """

    names: frozenset[str]
    optional: bool = False

    def __or__(self, other: Op) -> Op:
        return Op(self.names | other.names, self.optional or other.optional)

    def __rshift__(self, other: Op | Chain) -> Chain:
        if self.optional:
            raise OptionError(f"{self} >> …: a chain cannot begin with what may not be there")
        return Chain((self,)) >> other

    def __str__(self) -> str:
        names = " | ".join(sorted(self.names))
        return f"[{names}]" if self.optional else names


@dataclass(frozen=True)
class Chain:
    """Operations one after the other; nothing else reads a value between two of them."""

    steps: tuple[Op, ...]

    def __rshift__(self, other: Op | Chain) -> Chain:
        return Chain(self.steps + (other.steps if isinstance(other, Chain) else (other,)))

    def __str__(self) -> str:
        return " >> ".join(
            f"({s})" if len(s.names) > 1 and not s.optional else str(s) for s in self.steps
        )


@dataclass(frozen=True)
class Fan:
    """At least `least` calls of one operation that read the same value."""

    op: Op
    least: int = 2

    def __str__(self) -> str:
        return f"fan({self.op})"


@dataclass(frozen=True)
class Attend:
    """Attention whose queries, keys and values three calls of one operation make of one value, each
    cut into heads, up to where the heads lie beside each other again."""

    op: Op

    def __str__(self) -> str:
        return f"attend({self.op})"


@dataclass(frozen=True)
class Gated:
    """An MLP that multiplies an activation of its gate with a second layer of the same input, and
    goes on to a third; nothing else reads a value in between.

    Args:
        gate: the layer in front of the activation.
        op: the two others.
    """

    gate: Op
    op: Op

    def __str__(self) -> str:
        return f"gated({self.gate}, {self.op})"


Pattern = Op | Chain | Fan | Attend | Gated


def op(*names: str) -> Op:
    """An operation that has one of these names.

    Raises:
        OptionError: no name is given.
    """
    if not names or not all(isinstance(n, str) and n for n in names):
        raise OptionError(f"op{names!r}: give the names of one or more operations")
    return Op(frozenset(names))


def maybe(step: Op) -> Op:
    """An operation that may be there or not, behind another one.

    Raises:
        OptionError: `step` is not one operation.
    """
    if not isinstance(step, Op):
        raise OptionError(f"maybe({step}): give one operation")
    return Op(step.names, optional=True)


def fan(step: Op, least: int = 2) -> Fan:
    """Siblings that read one value.

    Raises:
        OptionError: `step` is not one operation, or one call would do.
    """
    if not isinstance(step, Op) or step.optional or least < 2:
        raise OptionError(f"fan({step}, {least}): give one operation, and two calls at least")
    return Fan(step, least)


def attend(step: Op) -> Attend:
    """Attention of a value to itself.

    Raises:
        OptionError: `step` is not one operation.
    """
    if not isinstance(step, Op):
        raise OptionError(f"attend({step}): give one operation")
    return Attend(step)


def gated(gate: Op, step: Op) -> Gated:
    """An MLP of three layers.

    Raises:
        OptionError: `gate` or `step` is not one operation.
    """
    if not isinstance(gate, Op) or not isinstance(step, Op):
        raise OptionError(f"gated({gate}, {step}): give two operations")
    return Gated(gate, step)


conv, conv_transpose, batch_norm = op("conv"), op("conv_transpose"), op("batch_norm")
linear, relu, gelu, silu = op("linear"), op("relu"), op("gelu"), op("silu")
add, dropout, layer_norm = op("add"), op("dropout"), op("layer_norm")
activation = op(
    "relu", "relu6", "gelu", "silu", "mish", "elu", "celu", "selu", "leaky_relu", "hardswish",
    "hardsigmoid", "hardtanh", "softplus", "tanh", "sigmoid",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Match:
    """One place where a graph has a pattern.

    Args:
        pattern: that was found.
        nodes: the calls: of a chain in its order, of a fan in the graph's.
        source: the value that goes into the first of them (of a fan: into each).
        added: what the sums of a chain add to its value, in its order; of attention the two sizes
            of the batch and of the sequence, and a mask where there is one.
    """

    pattern: Pattern
    nodes: tuple[Node, ...]
    source: Node
    added: tuple[Node, ...] = ()

    @property
    def results(self) -> tuple[Node, ...]:
        """The calls whose values the rest of the graph reads."""
        return self.nodes if isinstance(self.pattern, Fan) else self.nodes[-1:]


def find(
    pattern: Pattern, graph: Graph, spell: Spell, source: Source, added: Added
) -> Iterator[Match]:
    """Every place of `pattern`, in the graph's order. Places of a chain may overlap, those of one
    fan do not: all calls that read one value are one place.

    Args:
        pattern: what to look for.
        graph: where.
        spell: the one name of a node's operation.
        source: the node whose value another works on.
        added: what a sum adds to one of its values.
    """
    if isinstance(pattern, Fan):
        yield from _fans(pattern, graph, spell, source)
        return
    if isinstance(pattern, Attend):
        for node in graph.nodes:
            if spell(node) == _ATTENTION and (made := _attends(pattern, node, spell, source)):
                yield made
        return
    if isinstance(pattern, Gated):
        for node in graph.nodes:
            if spell(node) in pattern.gate.names and (made := _gated(pattern, node, spell, source)):
                yield made
        return
    steps = pattern.steps if isinstance(pattern, Chain) else (pattern,)
    for node in graph.nodes:
        start = source(node) if spell(node) in steps[0].names else None
        if start is not None and (found := _along(steps, node, spell, source, added)) is not None:
            yield Match(pattern, found[0], start, found[1])


def _fans(pattern: Fan, graph: Graph, spell: Spell, source: Source) -> Iterator[Match]:
    readers: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        start = source(node) if spell(node) in pattern.op.names else None
        if start is not None:
            readers.setdefault(start, []).append(node)
    for start, nodes in readers.items():
        if len(nodes) >= pattern.least:
            yield Match(pattern, tuple(nodes), start)


def _along(
    steps: tuple[Op, ...], first: Node, spell: Spell, source: Source, added: Added
) -> tuple[tuple[Node, ...], tuple[Node, ...]] | None:
    """The nodes of a chain that begins at `first`, and what its sums add; None where it does not go
    on as it should."""
    nodes, others = [first], []
    for step in steps[1:]:
        following = next(iter(nodes[-1].users), None)
        if following is None or len(nodes[-1].users) != 1 or spell(following) not in step.names:
            if step.optional:
                continue
            return None
        if (other := added(following, nodes[-1])) is not None:
            others.append(other)
        elif spell(following) in add.names or source(following) is not nodes[-1]:
            return None
        nodes.append(following)
    return tuple(nodes), tuple(others)


def _gated(pattern: Gated, gate: Node, spell: Spell, source: Source) -> Match | None:
    """The place around one call of a gate."""
    start = source(gate)
    act = _only_reader(gate)
    product = None if act is None or spell(act) not in activation.names else _only_reader(act)
    if start is None or act is None or product is None or spell(product) != "mul":
        return None
    sides, down = product.args[:2], _only_reader(product)
    up = next((n for n in sides if n is not act), None)
    if len(sides) != 2 or not isinstance(up, Node) or down is None or source(down) is not product:
        return None
    layers = spell(up) in pattern.op.names and spell(down) in pattern.op.names
    if not layers or source(up) is not start or _only_reader(up) is not product:
        return None
    order = {n: i for i, n in enumerate(gate.graph.nodes)}
    return Match(
        pattern, tuple(sorted((gate, act, up, product, down), key=order.__getitem__)), start
    )


def _only_reader(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


_ATTENTION = "scaled_dot_product_attention"
_OPERANDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_VIEW, _EXCHANGE, _SAME = {"view", "reshape", "_unsafe_view"}, {"transpose"}, {"contiguous"}


def attended(node: Node) -> dict[str, Any]:
    """The operands of a call of attention by name, as far as they are given."""
    return {**dict(zip(_OPERANDS, node.args, strict=False)), **node.kwargs}


def _attends(pattern: Attend, node: Node, spell: Spell, source: Source) -> Match | None:
    """The place around one call of attention."""
    given = attended(node)
    found: list[Node] = [node]
    sizes: list[Size] = []
    calls = [_cut(given.get(n), pattern.op, spell, found, sizes) for n in _OPERANDS[:3]]
    starts = {None if call is None else source(call) for call in calls}
    start = starts.pop()
    if start is None or starts or len(set(calls)) < 3 or not _uncut(node, spell, found, sizes):
        return None
    size = _one_size(sizes)
    if size is None:
        return None
    mask = given.get("attn_mask")
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    nodes = tuple(sorted(found, key=order.__getitem__))
    return Match(pattern, nodes, start, (*size, mask) if isinstance(mask, Node) else size)


Size = tuple[Any, Any]
"""Of batch and sequence in one view: values of the graph, or numbers."""


def _cut(heads: Any, op: Op, spell: Spell, found: list[Node], sizes: list[Size]) -> Node | None:
    """The call whose result becomes [B, S, H·D] → [B, S, H, D] → [B, H, S, D] = heads, which
    nothing else reads."""
    if not isinstance(heads, Node) or not _exchanges(heads, spell) or len(heads.users) != 1:
        return None
    view = heads.args[0]
    if not isinstance(view, Node) or spell(view) not in _VIEW or len(view.users) != 1:
        return None
    call, shape = view.args[0], view_shape(view)
    if not isinstance(call, Node) or spell(call) not in op.names or len(call.users) != 1:
        return None
    if len(shape) != 4:
        return None
    found += call, view, heads
    sizes.append((shape[0], shape[1]))
    return call


def _uncut(node: Node, spell: Spell, found: list[Node], sizes: list[Size]) -> bool:
    """Whether what attention gives becomes [B, H, S, D] → [B, S, H, D] → [B, S, H·D]."""
    exchanged = False
    while len(node.users) == 1:
        (node,) = node.users
        found.append(node)
        shape, is_view = view_shape(node), spell(node) in _VIEW
        if not exchanged and is_view and len(shape) == 4:
            sizes.append((shape[0], shape[2]))  # as it was
        elif not exchanged and _exchanges(node, spell):
            exchanged = True
        elif exchanged and is_view and len(shape) == 3:
            sizes.append((shape[0], shape[1]))
            return True
        elif not exchanged or spell(node) not in _SAME:
            return False
    return False


def _one_size(sizes: list[Size]) -> tuple[Node, Node] | None:
    """The values that all views have for the two sizes. A number beside such a value is equal to
    what it stands for, or the view would fail; two numbers could be another cut of as many."""
    if any(isinstance(b, int) and isinstance(s, int) for b, s in sizes):
        return None
    batch, rows = ({v for v in of if isinstance(v, Node)} for of in zip(*sizes, strict=True))
    return (batch.pop(), rows.pop()) if len(batch) == len(rows) == 1 else None


def _exchanges(node: Node, spell: Spell) -> bool:
    return spell(node) in _EXCHANGE and tuple(node.args[1:]) in ((1, 2), (2, 1))


def view_shape(view: Node) -> tuple[Any, ...]:
    """The sizes that a call of a view names."""
    given = view.args[1:]
    return tuple(given[0]) if given and isinstance(given[0], list | tuple) else tuple(given)
