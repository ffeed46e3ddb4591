"""What a training step costs, read off one forward and backward with FakeTensors.

The train graphs run under autograd, on fake parameters that require gradients: the backward that
PyTorch records is the one that runs, saved tensors live as long as autograd keeps them, and every
operation is priced by the same meter as an inference. Nothing is computed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from rewriter.cost.cost import Training, storage_cost
from rewriter.cost.interpret import Fakes, Region, Run, label, last_uses
from rewriter.cost.memory import storage_key, tensors_in
from rewriter.cost.meter import GraphCost, Meter, Tally
from rewriter.cost.symbolic import Formula, Size, at_largest, covers, frontier, largest
from rewriter.cost.work import grouped
from rewriter.errors import VerifyError

__all__ = ["OPTIMIZERS", "StepCost", "step_cost"]

OPTIMIZERS = ("sgd", "sgd-momentum", "adam", "adam-8bit")
_BLOCK, _SMALL = 256, 4096  # of bitsandbytes' 8-bit optimizers: block size, and what stays 32-bit


@dataclass
class StepCost:
    """What a training step costs.

    Args:
        training: the whole; None where nothing can be trained.
        nodes: what each node of the train graphs costs, forward and backward.
        errors: one line for each thing that has no known cost.
        timeline: (what runs, bytes of activations and gradients alive), in order.
        conditions: of the open sizes, under which formulas hold.
        counted_by_torch: as in `GraphCost`.
    """

    training: Training | None = None
    nodes: dict[Node, Training] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    timeline: list[tuple[str, int]] = field(default_factory=list)
    conditions: tuple[str, ...] = ()
    counted_by_torch: int = 0


def step_cost(
    root: nn.Module,
    regions: Iterable[Region],
    sizes: Sequence[Sequence[int | str]] | None = None,
    around: Mapping[str, int] | None = None,
    fakes: Fakes | None = None,
) -> StepCost:
    """Peak of a step = weights + optimizer state + max over time of (activations + gradients).

    The gradient starts at the model's loss where it returns one (a result without dimensions), else
    at all of its differentiable results; the results stay alive, as the caller holds them.
    Gradients start at None, as `zero_grad` leaves them. States of optimizers are those of
    `torch.optim` with default options in the parameters' dtype; "adam-8bit" is bitsandbytes' (one
    byte a moment and a float32 per block of 256; parameters below 4096 elements stay in 32 bits).

    Args:
        root: the model.
        regions: (module or its dotted name, train graph, inputs), in the order they run; the
            backward runs them in reverse.
        sizes, around, fakes: as in `rewriter.cost.interpret.Run`.

    Raises:
        VerifyError: a node cannot run on these shapes, or its backward cannot.

    Sets `node.meta["val"]` on every node, a stand-in of the value's type.
    """
    run = _Run(sizes, around, fakes)
    meter = _Meter(run, GraphCost())
    with torch.inference_mode(False), torch.enable_grad(), run.mode, meter, _no_gradients(root):
        for owner, graph, inputs in regions:
            module = root.get_submodule(owner) if isinstance(owner, str) else owner
            run.forward(module, graph, inputs, meter)
        if not run.results:
            return StepCost(errors=list(dict.fromkeys(meter.result.errors)))
        losses = [t for t in run.results if not t.dim()]
        ends = losses[:1] or list({id(t): t for t in run.results}.values())
        seeds = [torch.ones_like(t) for t in ends]
        try:
            meter.backward = True
            torch.autograd.backward(ends, seeds)
        except Exception as error:
            raise VerifyError(
                f"the backward of {type(root).__name__} cannot be priced: "
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            ) from error
        meter.close()
    return run.summary(root, meter)


@contextmanager
def _no_gradients(root: nn.Module) -> Iterator[None]:
    """A parameter that a module hides from the shadows must not get a fake gradient."""
    before = [(p, p.grad) for p in root.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in before:
            if parameter.grad is not gradient:
                parameter.grad = gradient


class _Meter(Meter):
    """Prices the backward on the node of the forward that it belongs to."""

    def __init__(self, run: _Run, result: GraphCost) -> None:
        super().__init__(run, result)
        self.starts: list[int] = []
        self.order: list[Node] = []
        self.tallies: dict[Node, Tally] = {}
        self.peaks: dict[Size, None] = {}
        self.saved: dict[int, Size] = {}  # by serial: storages that autograd keeps

    def pack(self, tensor: Tensor) -> Tensor:
        """Notes what autograd saves for the backward; the caller's inputs are no part of it."""
        key = storage_key(tensor)
        if key in self.memory.serials and not self.memory.holders[key]:
            self.saved[self.memory.serials[key]] = self.memory.sizes[key]
        return tensor.detach()

    def begin(self, node: Node) -> None:
        self.close()
        self.start(node)
        self.starts.append(torch._C._autograd._get_sequence_nr())
        self.order.append(node)
        self.now = self.tallies.setdefault(node, Tally())

    def close(self) -> None:
        """Notes the memory since the last change of node."""
        if self.node is not None:
            name = f"backward {label(self.node)}" if self.backward else label(self.node)
            peak: Any = self.memory.peak
            self.result.timeline.append((name, peak))
        self.peaks.update(dict.fromkeys(self.memory.peaks))

    def count(self, func: Any, args: Any, kwargs: Any, out: object) -> None:
        if self.backward:
            self.switch()
        super().count(func, args, kwargs, out)

    def switch(self) -> None:
        """To the node whose backward runs now."""
        current = torch._C._current_autograd_node()
        if current is None:
            return
        number = current._sequence_nr()
        if number >= 2**63:  # a gradient arrives at its parameter: part of what ran before
            return
        at = bisect_right(self.starts, number) - 1
        node = self.order[max(at, 0)]
        if node is not self.node:
            self.close()
            self.memory.start()
            self.node = node
            self.now = self.tallies[node]


class _Run(Run):
    """Like `Run`, with gradients: parameters are leaves, and values live as long as in reality."""

    def __init__(
        self,
        sizes: Sequence[Sequence[int | str]] | None,
        around: Mapping[str, int] | None,
        fakes: Fakes | None,
    ) -> None:
        super().__init__(True, sizes, around, fakes)
        self.leaves: dict[int, tuple[Tensor, Tensor]] = {}
        self.results: list[Tensor] = []  # that gradients start from
        self.returned: list[Tensor] = []
        self.saved: dict[Node, Size] = {}

    def weight(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self.leaves:
            return self.leaves[id(tensor)][1]
        fake = super().weight(tensor)
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad and fake is not tensor:
            with self.unmetered():
                fake = fake.detach().requires_grad_()
            self.leaves[id(tensor)] = tensor, fake
        return fake

    def copy(self, tensor: Tensor) -> Tensor:
        """An input that requires a gradient gets one, as a part of a model's activations do."""
        fake = super().copy(tensor)
        if tensor.requires_grad and not fake.requires_grad:
            fake.requires_grad_()
        return fake

    def forward(self, root: nn.Module, graph: Graph, inputs: Sequence[Any], meter: _Meter) -> None:
        feed = iter(inputs if self.open is None else self.opened(inputs))
        env: dict[Node, Any] = {}
        dying = last_uses(graph)
        hooks = torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda t: t)
        for node in graph.nodes:
            meter.begin(node)
            before = len(meter.saved)
            with hooks:
                env[node] = self.evaluated(root, node, feed, env, meter)
            if self.open is None:
                with self.unmetered(), torch.no_grad():
                    node.meta["val"] = map_aggregate(env[node], _outline)
            self.saved[node] = sum(list(meter.saved.values())[before:], 0)
            if node.op == "output":
                self.returned += tensors_in(env[node])
                self.results += [t for t in tensors_in(env[node]) if t.grad_fn is not None]
            for dead in dying.get(node, ()):
                del env[dead]

    def summary(self, root: nn.Module, meter: _Meter) -> StepCost:
        order = {id(p): i for i, p in enumerate(root.parameters())}
        trained = [p for p, fake in self.leaves.values() if fake.grad is not None]
        trained.sort(key=lambda p: order.get(id(p), len(order)))
        gradients = sum(map(_nbytes, trained))
        total, nodes = Tally(), {}
        for node, tally in meter.tallies.items():
            total.add(tally)
            nodes[node] = _training(tally, self.saved.get(node, 0))
        memory, stored, saved = (
            meter.memory,
            storage_cost(root).param_bytes,
            sum(meter.saved.values(), 0),
        )
        peak, by_torch = largest(meter.peaks, self.example), cast("int", total.by_torch)
        keys = {storage_key(fake.grad) for _, fake in self.leaves.values() if fake.grad is not None}
        own = {memory.serials[k] for k in keys if k in memory.serials}
        worst = self.worst(memory.events, set(meter.saved), own)
        # at the update the caller still holds the inputs and the results
        held = {k for t in self.returned if (k := storage_key(t)) in memory.sizes}
        held |= {k for k, n in memory.holders.items() if n and k in memory.sizes}
        outside = sum((memory.sizes[k] for k in held if k is not None), 0) + gradients
        states = {name: optimizer_bytes(name, trained) for name in OPTIMIZERS}
        whole: dict[str, Any] = {
            "weight_bytes": stored,
            "gradient_bytes": gradients,
            "trained": sum(p.numel() for p in trained),
            "worst": worst,
            "optimizers": states,
            "peaks": {
                name: stored + state + largest((peak, outside + _update(name, trained)))
                for name, state in states.items()
            },
        }
        return StepCost(
            replace(_training(total, saved), **whole),
            nodes,
            list(dict.fromkeys(meter.result.errors)),
            meter.result.timeline,
            self.conditions(),
            by_torch,
        )

    def worst(
        self, events: Sequence[tuple[int, Size]], saved: set[int], gradients: set[int]
    ) -> dict[str, Size]:
        """What is alive when most is: saved activations, gradients, and the rest."""
        live: dict[str, Size] = {"saved": 0, "gradients": 0, "workspace": 0}
        most, highest = dict(live), 0
        moments: dict[Size, dict[str, Size]] = {}  # where sizes are open
        total: Size = 0
        for serial, size in events:
            kind = "saved" if serial in saved else "workspace"
            kind = "gradients" if serial in gradients else kind
            live[kind] = live[kind] + size
            total = total + size
            if isinstance(total, Formula):
                moments.setdefault(total, dict(live))
            elif total > highest:
                most, highest = dict(live), total
        if not moments:
            return most
        moments.setdefault(highest, most)
        totals = list(moments)
        kept = [totals[i] for i in frontier(totals, self.example)]
        kept = [t for t in kept if not any(t is not o and covers(o, t) for o in kept)]
        return {kind: at_largest([(t, moments[t][kind]) for t in kept]) for kind in live}


def _training(tally: Tally, saved: Size) -> Training:
    numbers: dict[str, Any] = {
        "flops": tally.flops,
        "macs": tally.macs,
        "bytes_moved": tally.bytes_moved,
        "saved_bytes": saved,
    }
    return Training(launches=tally.launches, work=grouped(tally.work), **numbers)


def _outline(leaf: Any) -> Any:
    """A tensor of the same type in a storage of its own, so that the value itself can die."""
    if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def optimizer_bytes(name: str, parameters: Sequence[Tensor]) -> int:
    """Bytes of state per optimizer, over the parameters that are trained: sgd 0, sgd-momentum one
    buffer, adam two and a float32 count of steps each, adam-8bit two of one byte an element and
    their scales."""
    if name == "sgd":
        return 0
    if name == "adam-8bit":
        return sum(
            8 * p.numel() if p.numel() < _SMALL else 2 * (p.numel() + 4 * -(-p.numel() // _BLOCK))
            for p in parameters
        )
    if name == "sgd-momentum":
        return sum(map(_nbytes, parameters))
    return sum(2 * _nbytes(p) + 4 for p in parameters)


def _update(name: str, parameters: Sequence[Tensor]) -> int:
    """Temporaries of the update as `torch.optim` runs it. On a CPU one parameter after another:
    Adam takes √v and its quotient, while the quotient of the one before is still held. On other
    devices all parameters at once ("foreach"): Adam takes √v of them all."""
    if name != "adam":
        return 0
    if parameters and parameters[0].device.type not in ("cpu", "meta"):
        return sum(map(_nbytes, parameters))
    sizes = [0, *map(_nbytes, parameters)]
    return max((a + 2 * b for a, b in zip(sizes, sizes[1:], strict=False)), default=0)
