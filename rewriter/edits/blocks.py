"""Residual blocks: where a module computes x + f(x), and what of a graph dies without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.fx import Node

from rewriter.edits.values import BLOCK, Cut, Subgraph
from rewriter.modules.refusal import Skip
from rewriter.modules.tree import attribute, has_hooks, join, submodule
from rewriter.sites import HostedGraph, Site
from rewriter.spellings import (
    ADDITIONS,
    AFTER_SUM,
    called_activation,
    is_view,
    spelled,
    works_in_place,
)

__all__ = ["block", "dead_nodes", "left_over", "names_of_module"]


class _Whole(Protocol):
    """The attributes of a `View` that this file reads."""

    @property
    def root(self) -> nn.Module: ...
    @property
    def graphs(self) -> tuple[HostedGraph, ...]: ...
    @property
    def typed(self) -> bool: ...
    def shape(self, node: Node) -> Any: ...


def names_of_module(root: nn.Module, module: nn.Module) -> tuple[str, ...]:
    """All names of a module."""
    return tuple(n for n, m in root.named_modules(remove_duplicate=False) if m is module)


def block(view: _Whole, name: str) -> Subgraph | Skip:
    """The subgraph of a module that computes x + f(x), or why it cannot be removed.

    Holds for all sizes that the graphs serve: type and symbolic shape of x and of the result are
    the same. f may begin with a norm (pre-norm); a norm or an activation after the sum (post-norm)
    goes with the block.
    """
    module = submodule(view.root, name)
    if module is None or not name:
        return Skip("the model has no module {!r}", name)
    names = names_of_module(view.root, module)
    reason = _bound_outside(view.root, module, names)
    if reason is not None:
        return reason
    cuts: list[Cut] = []
    through: dict[str, None] = {}
    for hosted in view.graphs:
        for nodes in _calls(hosted, names):
            found = _cut(view, hosted, nodes, through)
            if isinstance(found, Skip):
                return found
            cuts.append(found)
    if not cuts:
        return Skip("no graph calls it: it runs in Python, or not with these example_inputs")
    site = Site(BLOCK, name, view.root, tuple(c.result for c in cuts), calls=1)
    made = Subgraph(site, names, tuple(cuts), tuple(through))
    return left_over(view, [made]) or made


def _bound_outside(root: nn.Module, module: nn.Module, names: tuple[str, ...]) -> Skip | None:
    """Why a module cannot go, whatever it computes: hooks, and ties to what stays."""
    found = next((n for n, m in module.named_modules() if has_hooks(m)), None)
    if found is not None:
        return Skip("{} has hooks, which would never run again", join(names[0], found))
    own = {id(p): n for n, p in module.named_parameters()}
    for other, parameter in root.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not _inside(other, names):
            return Skip("its {} is tied to {}, which stays", own[id(parameter)], other)
    return None


def _inside(name: str, names: Iterable[str]) -> bool:
    return any(name == n or name.startswith(f"{n}.") for n in names)


def _calls(hosted: HostedGraph, names: Sequence[str]) -> list[list[Node]]:
    """The nodes of each call of the module in a graph."""
    calls: dict[str, list[Node]] = {}
    for node in hosted.graph.nodes:
        for key, (fqn, _) in (node.meta.get("nn_module_stack") or {}).items():
            if join(hosted.prefix, str(fqn)) in names and node.op.startswith("call_"):
                calls.setdefault(str(key), []).append(node)
                break
    return list(calls.values())


def _cut(
    view: _Whole, hosted: HostedGraph, nodes: list[Node], through: dict[str, None]
) -> Cut | Skip:
    inside = set(nodes)
    ends = [n for n in nodes if any(u not in inside for u in n.users)]
    tensors = [n for n in ends if isinstance(n.meta.get("val"), Tensor | type(None))]
    if len(ends) != 1 or not tensors:
        for node in ends[:-1]:
            if any(u.op == "output" for u in node.users):
                return Skip("{}, which it makes, is an output of the model as well", node.name)
        return Skip("it gives {} values, where a residual block gives one", len(ends))
    result = ends[0]
    source, sums = _skip_path(result, inside, view.root.get_submodule(hosted.prefix), through)
    if source is None or not sums:
        return Skip("it is no residual block: no sum leads past its layers from input to result")
    was, now = view.shape(result), view.shape(source)
    if was is None or now is None:
        why = "pass example_inputs" if not view.typed else "an operation cannot run with open sizes"
        return Skip("its shapes are not known at all sizes: {}", why)
    if was != now:
        return Skip("its input is {}, its result {}", _shown(now), _shown(was))
    if source.op == "placeholder" and any(u.op == "output" for u in result.users):
        if hosted.prefix:
            return Skip("it is called from Python: {} is a graph of its own", hosted.prefix)
        return Skip("the model's output would be its input")
    return Cut(source, result)


def _shown(shape: tuple[str, str, tuple[int | str, ...]]) -> str:
    dtype, device, sizes = shape
    return f"{dtype}[{', '.join(map(str, sizes))}] on {device}"


def _skip_path(
    node: Node, inside: set[Node], owner: nn.Module, through: dict[str, None]
) -> tuple[Node | None, int]:
    """The value outside of the block that additions carry to `node`, and how many do."""
    if node not in inside:
        return (None, 0) if node.op == "get_attr" else (node, 0)
    name = spelled(node, owner)
    if name in ADDITIONS and not node.kwargs:
        for operand in node.args[:2]:
            if isinstance(operand, Node):
                source, sums = _skip_path(operand, inside, owner, through)
                if source is not None:
                    return source, sums + 1
    elif name == "to" and _same_type(node):  # of a norm in float32 that returns what it was given
        return _skip_path(node.all_input_nodes[0], inside, owner, through)
    elif (name in AFTER_SUM or called_activation(node, owner)) and node.args:
        if isinstance(node.args[0], Node):
            found = _skip_path(node.args[0], inside, owner, through)
            if found[0] is not None:
                through[name] = None
            return found
    return None, 0


def _same_type(cast: Node) -> bool:
    """Whether a cast leaves its tensor as it is."""
    source, result = cast.all_input_nodes[0].meta.get("val"), cast.meta.get("val")
    if not isinstance(source, Tensor) or not isinstance(result, Tensor):
        return False
    return (source.dtype, source.device) == (result.dtype, result.device)


def dead_nodes(hosted: HostedGraph, cuts: Iterable[Cut], names: Sequence[str]) -> list[Node]:
    """The nodes that nothing needs any more once the readers of results read the sources.

    Args:
        hosted: a graph.
        cuts: of any graph; those of others are left out.
        names: of the modules that go: calls inside that nothing reads (they switch a mode, or
            write in place) go too.
    """
    instead: Mapping[Node, Node] = {c.result: c.source for c in cuts}
    inside = {n for name in names for call in _calls(hosted, [name]) for n in call}
    alive = [n for n in hosted.graph.nodes if n.op in ("output", "placeholder")]
    alive += [n for n in hosted.graph.nodes if not n.users and n not in inside]
    seen: set[Node] = set()
    while alive:
        node = alive.pop()
        if node not in seen:
            seen.add(node)
            for source in node.all_input_nodes:
                while source in instead:
                    source = instead[source]
                alive.append(source)
    return [n for n in hosted.graph.nodes if n not in seen]


def left_over(view: _Whole, blocks: Sequence[Subgraph]) -> Skip | None:
    """Why blocks cannot go: something inside stays in use, or something outside would no longer
    be in use."""
    cuts = [c for b in blocks for c in b.cuts]
    names = [n for b in blocks for n in b.names]
    for hosted in view.graphs:
        owner = view.root.get_submodule(hosted.prefix)
        dead = set(dead_nodes(hosted, cuts, names))
        for node in hosted.graph.nodes:
            target = join(hosted.prefix, str(node.target))
            reads = node.op in ("call_module", "get_attr")
            if node not in dead and reads and _inside(target, names):
                return Skip("{} is still read past its result", target)
            if node in dead and reads and not _inside(target, names) and _holds(owner, node):
                if all(n in dead or n.target != node.target for n in hosted.graph.nodes):
                    return Skip("{}, which is outside of it, would be left over", target)
            writes = node in dead and works_in_place(node, owner)
            if writes and _base(node, dead, owner) not in dead:
                return Skip("{} inside it changes its input in place", spelled(node, owner))
        reason = _same_output(hosted, cuts) or _changed_in_place(hosted, cuts, dead, owner)
        if reason is not None:
            return reason
    return None


def _holds(owner: nn.Module, node: Node) -> bool:
    """Whether a dead node reads parameters."""
    held = attribute(owner, str(node.target))
    if isinstance(held, nn.Module):
        return any(True for _ in held.parameters())
    return isinstance(held, nn.Parameter)


def _base(node: Node, dead: set[Node], owner: nn.Module) -> Any:
    """The value whose memory a call in place writes into."""
    source: Any = node.args[0] if node.args else None
    while isinstance(source, Node) and source in dead:
        if not works_in_place(source, owner) and not is_view(source, owner):
            break
        source = source.args[0] if source.args else None
    return source


def _same_output(hosted: HostedGraph, cuts: Iterable[Cut]) -> Skip | None:
    """Two outputs of the model would become one tensor, or an output its input."""
    instead: Mapping[Node, Node] = {c.result: c.source for c in cuts}
    (output,) = (n for n in hosted.graph.nodes if n.op == "output")
    outputs = output.all_input_nodes
    kept = {n: n.name for n in outputs if n not in instead}
    for result in (n for n in outputs if n in instead):
        source = instead[result]
        while source in instead:
            source = instead[source]
        if source in kept:
            return Skip(
                "its result, {}, is an output of the model that would become the same tensor as "
                "another output, {}",
                result.name,
                kept[source],
            )
        if source.op == "placeholder":
            return Skip("the model's output would be its input")
        kept[source] = result.name
    return None


def _changed_in_place(
    hosted: HostedGraph, cuts: Iterable[Cut], dead: set[Node], owner: nn.Module
) -> Skip | None:
    """A reader of the result works in place: it would now change what others read."""
    for cut in (c for c in cuts if c.result.graph is hosted.graph):
        for user in cut.result.users:
            writes = user not in dead and user.op != "output" and works_in_place(user, owner)
            others = [u for u in cut.source.users if u not in dead]
            if writes and (others or cut.source.op == "placeholder"):
                return Skip("{} changes its result in place, which others read then", user.name)
    return None
