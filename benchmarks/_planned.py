"""What `planner.py` runs: the models, and a rig that trains one step of a model by any partition of
its joint graph and watches what that takes.

All partitions, the planner's and PyTorch's, go through the same tracing and the same runtime
(`rewriter.planner.apply.trace`), so that they differ in nothing but what they keep.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import _models
import torch
import torch.nn.functional as F
from _models import data
from _tracker import Tracker
from torch import Tensor, fx, nn
from torch._functorch import config as functorch
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._ops import OpOverload
from torch.utils.checkpoint import checkpoint

from rewriter import rewrite
from rewriter.base import Pass
from rewriter.capture.hosted import unhost
from rewriter.cost.formulas import flop_formula
from rewriter.passes import Monarch, Quadratic
from rewriter.planner.apply import trace as planner_trace
from rewriter.planner.apply.trace import Traced
from rewriter.planner.apply.transform import split
from rewriter.planner.joint.reading import read_joint
from rewriter.planner.search.choices import routes
from rewriter.planner.search.frontier import Frontier, Point
from rewriter.planner.search.simulate import Decisions, simulate

Inputs = tuple[Tensor, ...]
Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]
LOSSY = ("bf16", "int8")

# ---- models ----------------------------------------------------------------------------------


class Head(nn.Module):
    """A model that returns its loss and nothing else: what it returned besides would be alive to
    the end of the step."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body


class NextToken(Head):
    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.body(input_ids=tokens).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Pairs(Head):
    """Sentence vectors of neighbours in the batch are to be closer than all others."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.body(input_ids=tokens, attention_mask=mask)[0]
        weight = mask.unsqueeze(-1)
        vectors = F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)
        scores = 20 * vectors[::2] @ vectors[1::2].T
        return F.cross_entropy(scores, torch.arange(len(scores)))


class Classes(Head):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        out = self.body(x)
        return F.cross_entropy(out if isinstance(out, Tensor) else out.logits, labels)


def gpt(quick: bool) -> tuple[nn.Module, Inputs]:
    depth, width, vocabulary = (2, 64, 256) if quick else (12, 768, 8192)
    model = _models.gpt2(width, depth, vocabulary, head=True, n_positions=256, attn_pdrop=0.0)
    shape = (2, 64) if quick else (4, 256)
    return NextToken(model), (torch.randint(0, vocabulary, shape),)


def minilm(quick: bool) -> tuple[nn.Module, Inputs]:
    model, tokenizer = data.load_minilm()
    rows, length = (4, 32) if quick else (16, 128)
    batch = tokenizer(
        data.news()[:rows],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    return Pairs(model), (batch["input_ids"], batch["attention_mask"])


def vit(quick: bool) -> tuple[nn.Module, Inputs]:
    width, depth, size = (64, 2, 32) if quick else (384, 12, 224)
    model = _models.vit(width, depth, head=True, image_size=size, num_labels=100)
    return Classes(model), images(4 if quick else 8, size)


def resnet(quick: bool) -> tuple[nn.Module, Inputs]:
    small = {"depths": [1, 1], "hidden_sizes": [32, 64], "embedding_size": 16}
    inputs = images(4, 32 if quick else 224)
    return Classes(_models.resnet(num_labels=100, **(small if quick else {}))), inputs


def images(rows: int, size: int) -> Inputs:
    return torch.randn(rows, 3, size, size), torch.randint(0, 100, (rows,))


def mlp(quick: bool) -> tuple[nn.Module, Inputs]:
    """Blocks of a linear layer, a norm and a ReLU; the pass makes the linear layers quadratic."""
    given, width, rows, depth = (32, 32, 2048, 4) if quick else (784, 512, 4096, 16)

    def block(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU())

    blocks = nn.Sequential(*[block(width if i else given) for i in range(depth)])
    body = nn.Sequential(blocks, nn.Linear(width, 100))
    return Classes(body), (torch.randn(rows, given), torch.randint(0, 100, (rows,)))


@dataclass(frozen=True)
class Case:
    """A model with its loss, its inputs, and the blocks that a user would checkpoint."""

    name: str
    make: Callable[[bool], tuple[nn.Module, Inputs]]
    blocks: Callable[[Any], Sequence[nn.Module]]
    passes: tuple[Pass, ...] = ()


def stages(model: Any) -> list[nn.Module]:
    return [block for stage in model.body.resnet.encoder.stages for block in stage.layers]


CASES = {
    "gpt": Case("GPT-2-like, 12 × 768, 4 × 256 tokens", gpt, lambda m: m.body.transformer.h),
    "minilm": Case(
        "MiniLM (real weights), 16 × 128 tokens", minilm, lambda m: m.body.encoder.layer
    ),
    "vit": Case("ViT-S/16, 8 × 224²", vit, lambda m: m.body.vit.layers),
    "monarch": Case(
        "GPT-2-like, Monarch(nblocks=4), 4 × 256 tokens",
        gpt,
        lambda m: m.body.transformer.h,
        (Monarch(nblocks=4, where=lambda site: "lm_head" not in site.fqn),),
    ),
    "resnet": Case("ResNet-50 with BatchNorm, 4 × 224²", resnet, stages),
    "quadratic": Case(
        "MLP of 16 quadratic blocks, 4096 rows of 512", mlp, lambda m: m.body[0], (Quadratic(),)
    ),
}

# ---- the rig ---------------------------------------------------------------------------------


class Watch(Tracker):
    """Bytes alive on top of what is given, and FLOPs, attention on the CPU included."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__(given=held)
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(func, OpOverload):
            formula = flop_formula(func)[0]
            if formula is not None:
                self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


@dataclass
class Measured:
    """One step of one variant.

    Args:
        peak: bytes that the step had alive at its worst moment, on top of weights and inputs.
        saved: of these, between forward and backward, the loss left out.
        flops: of forward and backward.
        loss: its value.
        grads: of the parameters, by name.
    """

    peak: int
    saved: int
    flops: int
    loss: float
    grads: dict[str, Tensor] = field(repr=False)


class _Fixed:
    """Stands where `rewrite(memory_budget=…)` puts its planner, and runs one partition."""

    peak = 0

    def __init__(self, traced: Traced) -> None:
        self.traced = traced

    def __call__(self, root: nn.Module, program: Any, leaves: Any, rows: Any) -> Any:
        return self.traced(root, leaves)


class Rig:
    """A model, as its user wrote it and as captured.

    Args:
        case: which.
        quick: small sizes.
    """

    def __init__(self, case: Case, quick: bool) -> None:
        torch.manual_seed(0)
        model, self.inputs = case.make(quick)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.hosted: Any = rewrite(model, list(case.passes), self.inputs).train()
        self.state = vars(self.hosted)["_rewriter"]
        self.plain = copy.deepcopy(self.hosted)
        for module in self.plain.modules():
            unhost(module)
        self.case = case
        if True not in self.state.programs:
            raise SystemExit(f"{case.name} was not captured for training:\n{self.hosted.report}")
        self.program = self.state.programs[True]
        self.leaves = self.state.signature.bind(self.inputs, {}, True)
        self._frontiers: dict[tuple[str, ...], Frontier] = {}
        self.code = ""
        self._export()

    def gradients(self) -> int:
        """Bytes of all gradients: no plan has a lower peak."""
        return sum(p.nbytes for p in self.hosted.parameters() if p.requires_grad)

    # partitions

    def trace(self, partition: Partition) -> Traced:
        """As `rewriter.planner.apply.trace.trace`; the joint graph is traced only once."""
        copied = copy.copy(self.joint)
        state, captured = copy.copy(copied._aot_state), copy.copy(copied._aot_graph_capture)
        state.fw_metadata = copy.copy(self.metadata)  # a compilation writes into it
        captured.graph_module = copy.deepcopy(captured.graph_module)
        copied._aot_state, copied._aot_graph_capture = state, captured

        def noted(*args: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
            parts = partition(*args, **kwargs)
            text = "".join(p.code for p in parts)
            self.code = hashlib.sha256(text.encode()).hexdigest()
            return parts

        with self.mode, torch.enable_grad():
            run = planner_trace.aot_compile_joint_with_descriptors(
                copied,
                partition_fn=noted,
                fw_compiler=planner_trace._plain,
                bw_compiler=planner_trace._plain,
            )
        first = self.first
        return Traced(run, first.names, first.env, first.symbols, first.unused)

    def _export(self) -> None:
        """Traces the joint graph as `rewrite(memory_budget=…)` does, and keeps it."""
        pristine: list[fx.GraphModule] = []
        export = planner_trace.aot_export_joint_with_descriptors

        def kept(stack: Any, module: Any, args: Any) -> Any:
            self.joint = export(stack, module, args)
            self.mode = args[0].fake_mode
            self.metadata = copy.copy(self.joint._aot_state.fw_metadata)
            pristine.append(copy.deepcopy(self.joint._aot_graph_capture.graph_module))
            return self.joint

        rows = [list(leaf.shape) for leaf in self.leaves]
        with mock.patch.object(planner_trace, "aot_export_joint_with_descriptors", kept):
            self.first = planner_trace.trace(
                self.hosted, self.program, self.leaves, rows, default_partition
            )
        self.joint._aot_graph_capture.graph_module = pristine[0]

    def frontier(self, lossy: tuple[str, ...] = ()) -> Frontier:
        """All plans; made once."""
        if lossy not in self._frontiers:

            def partition(
                module: fx.GraphModule, inputs: object, *, num_fwd_outputs: int, **_: Any
            ) -> tuple[fx.GraphModule, fx.GraphModule]:
                joint = read_joint(module, num_fwd_outputs)
                found = self._frontiers[lossy] = Frontier(joint, lossy)
                return split(module, joint, found.default.decisions, num_fwd_outputs)

            self.trace(partition)
        return self._frontiers[lossy]

    def planned(self, point: Point, lossy: tuple[str, ...] = ()) -> Partition:
        """A partition by a plan of the frontier, which another trace of the same graph made."""
        ways = {id(route): i for i, route in enumerate(self.frontier(lossy).routes)}

        def partition(
            module: fx.GraphModule, inputs: object, *, num_fwd_outputs: int, **_: Any
        ) -> tuple[fx.GraphModule, fx.GraphModule]:
            joint = read_joint(module, num_fwd_outputs)
            own, made = list(routes(joint, bool(lossy))), point.decisions
            closed = {v: own[ways[id(route)]] for v, route in made.routes.items()}
            decisions = Decisions(made.kept, made.packed, closed)
            return split(module, joint, decisions, num_fwd_outputs)

        return partition

    def added(self, partition: Partition) -> float:
        """Seconds that another partition adds, predicted as those of a plan are: from what it
        saves."""
        found: list[float] = []

        def watched(
            module: fx.GraphModule, inputs: object, *, num_fwd_outputs: int, **_: Any
        ) -> tuple[fx.GraphModule, fx.GraphModule]:
            joint = read_joint(module, num_fwd_outputs)
            parts = partition(module, inputs, num_fwd_outputs=num_fwd_outputs)
            (output,) = (n for n in parts[0].graph.nodes if n.op == "output")
            saved = [n for n in output.args[0][num_fwd_outputs:] if isinstance(n, fx.Node)]
            kept = {v for n in saved for v in joint.node_values.get(n.name, ())}
            found.append(simulate(joint, Decisions(frozenset(kept))).seconds)
            return parts

        self.trace(watched)
        return found[0]

    # steps

    def step(self, model: nn.Module, between: Callable[[], object] = lambda: None) -> Tensor:
        """Forward, loss and backward; gradients are left on the parameters."""
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        loss: Tensor = model(*self.inputs)
        between()
        loss.backward()
        return loss.detach()

    def run(self, traced: Traced) -> Tensor:
        """One step by a partition."""
        self.state.memory = _Fixed(traced)
        try:
            return self.step(self.hosted)
        finally:
            self.state.memory = None

    def measure(self, traced: Traced | None = None) -> Measured:
        """One step watched: by a partition, or (None) of the model as its user wrote it."""
        model = self.plain if traced is None else self.hosted
        self.state.memory = None if traced is None else _Fixed(traced)
        model.zero_grad(set_to_none=True)
        held = [*model.parameters(), *model.buffers(), *self.inputs]
        saved = 0

        def note() -> None:
            nonlocal saved
            saved = watch.live - 4

        try:
            with Watch(held) as watch:
                loss = self.step(model, note)
        finally:
            self.state.memory = None
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return Measured(watch.peak, saved, watch.flops, float(loss), grads)

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Every block of the user's model under `torch.utils.checkpoint`."""
        blocks = list(self.case.blocks(self.plain))
        for block in blocks:
            block.forward = _wrapped(block)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def _wrapped(block: nn.Module) -> Callable[..., Any]:
    forward = type(block).forward

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, block, *args, use_reentrant=False, **kwargs)

    return run


def min_cut(budget: float | None) -> Partition:
    """PyTorch's own partitioner: its default, or with an `activation_memory_budget`."""

    def partition(
        module: fx.GraphModule, inputs: object, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        with functorch.patch(activation_memory_budget=1.0 if budget is None else budget):
            return min_cut_rematerialization_partition(
                module, inputs, num_fwd_outputs=num_fwd_outputs
            )

    return partition


def quickest(frontier: Frontier, saved: float) -> Point | None:
    """The plan that adds least time among those that save no more than so many bytes."""
    found = [p for p in frontier.found.values() if p.simulation.saved <= saved]
    return min(found, key=lambda p: (p.seconds, p.peak), default=None)


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, float, float]:
    """(largest absolute difference, ‖a − b‖/‖a‖, cosine) of two sets of gradients."""
    assert a.keys() == b.keys()
    largest = max(float((a[n] - b[n]).abs().max()) for n in a)
    dot, one, two = (
        sum(float((x[n].double() * y[n].double()).sum()) for n in a)
        for x, y in ((a, b), (a, a), (b, b))
    )
    apart = sum(float((a[n] - b[n]).double().square().sum()) for n in a)
    return largest, (apart / one) ** 0.5, dot / (one * two) ** 0.5
