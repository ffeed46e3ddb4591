"""What the model under rewrite costs as it is now, and what it cost at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from rewriter.capture import Capture, Region
from rewriter.capture.signature import OpenSizes
from rewriter.cost import (
    Cost,
    Device,
    GraphCost,
    Snapshot,
    StepCost,
    model_cost,
    step_cost,
    storage_cost,
)
from rewriter.errors import VerifyError
from rewriter.lowering.lowering import PricedGraph
from rewriter.modules.running import first_line
from rewriter.report.entries import Timeline, thinned
from rewriter.sites import Site

__all__ = ["Prices"]


@dataclass
class Prices:
    """The cost of the captured model, read again off its graphs whenever it has changed.

    Args:
        capture: the model.
        device: whose predicted times the costs carry; None predicts nothing.
        cost: of an inference.
        step: of a training step.
        errors: what could not be priced, for the report.
        snapshots: the model at each step of the rewrite, for prices at other sizes.
    """

    capture: Capture
    device: Device | None = None
    cost: GraphCost = field(default_factory=GraphCost)
    step: StepCost = field(default_factory=StepCost)
    errors: list[str] = field(default_factory=list)
    snapshots: list[Snapshot | None] = field(default_factory=list)

    def price(self) -> None:
        """The cost of the model as it is now: of an inference, and of a training step."""
        root = self.capture.root
        regions = [r for r in self.capture.regions if r.leaves is not None]
        self.step = StepCost()
        if len(regions) < len(self.capture.regions):
            self.cost = GraphCost(total=storage_cost(root))
            return
        runs: list[Any] = [
            r.priced or (r.prefix, r.graphs[False], r.leaves or [])
            for r in regions
            for _ in range(r.calls)
        ]
        self.cost = model_cost(root, runs, training=False, fakes=self.capture.fakes)
        for region in regions:
            region.priced = None  # from here on its graph may change
        trained = [
            (r.prefix, r.graphs[True], _wanted(r))
            for r in regions
            if True in r.graphs
            for _ in range(r.calls)
        ]
        try:
            step = step_cost(root, trained, fakes=self.capture.fakes)
            if all(True in r.graphs for r in regions):
                self.step = step
            else:
                why = "some of the model runs in Python in train mode"
                self.step.errors.append(f"training cost not known: {why} (see the capture notes)")
        except VerifyError as error:
            model_cost(root, trained, training=True, fakes=self.capture.fakes)
            self.step.errors.append(f"training cost not known: {first_line(error)}")
        self.cost.total = self.predicted(replace(self.cost.total, training=self.step.training))
        self.errors += [
            e for e in dict.fromkeys(self.cost.errors + self.step.errors) if e not in self.errors
        ]

    def of_sites(self, sites: Sequence[Site]) -> dict[str, Cost]:
        """Cost of each named layer over its calls in the graphs that were priced (eval)."""
        costs: dict[str, Cost] = {}
        for site in sites:
            if (cost := self.of_calls(site.nodes)) is not None:
                costs[site.fqn] = cost
        return costs

    def of_calls(self, nodes: Sequence[Node]) -> Cost | None:
        """Cost of one layer over its calls; None where none of them was priced."""
        own = [self.cost.nodes[n] for n in nodes if n in self.cost.nodes]
        steps = [self.step.nodes[n] for n in nodes if n in self.step.nodes]
        if not own:
            return None
        total = sum(own[1:], own[0])  # a layer called twice is stored once
        return self.predicted(
            replace(
                total,
                params=own[0].params,
                param_bytes=own[0].param_bytes,
                training=sum(steps[1:], steps[0]) if steps else None,
            )
        )

    def predicted(self, cost: Cost) -> Cost:
        """The cost with the device's times."""
        device = self.device
        return cost if device is None else device.priced(cost, self.cost.total.param_bytes)

    def timeline(self) -> Timeline | None:
        """Memory over time after a step, weights and (in training) Adam's state included."""
        total, training = self.cost.total, self.step.training
        if not self.cost.timeline:
            return None
        held = total.param_bytes
        result = Timeline([(name, held + size) for name, size in thinned(self.cost.timeline)])
        if training is not None:
            held += training.optimizers["adam"]
            result.training = [(name, held + size) for name, size in thinned(self.step.timeline)]
        return result

    def open_sizes(self) -> OpenSizes | None:
        """The sizes that vary; None where the model is not one graph."""
        regions = self.capture.regions
        if len(regions) != 1 or regions[0].prefix or self.capture.islands:
            return None
        signature, leaves = regions[0].signature, regions[0].leaves
        if signature is None or leaves is None:
            return None
        return signature.open_sizes(False, leaves)

    def remember(
        self,
        sites: Sequence[Site],
        lowered: PricedGraph | None = None,
        others: Mapping[str, Sequence[Node]] | None = None,
    ) -> None:
        """Keeps the model as it is now, for prices at other sizes.

        Args:
            sites: of the model.
            lowered: what runs in place of the eval graph; None where that itself runs.
            others: further calls to be priced, by name.
        """
        open_, region = self.open_sizes(), next(iter(self.capture.regions), None)
        if open_ is None or not open_.values or region is None:
            self.snapshots.append(None)
            return
        assert region.signature is not None
        assert region.leaves is not None
        sizes = {
            mode: region.signature.open_sizes(mode, region.leaves).rows for mode in region.graphs
        }
        nodes: dict[str, Sequence[Node]] = {s.fqn: s.nodes for s in sites if s.nodes}
        nodes.update({name: calls for name, calls in (others or {}).items() if calls})
        root, graphs = self.capture.root, region.graphs
        if lowered is not None:
            graphs = {**graphs, False: lowered.graph}
        eval_root = None if lowered is None else lowered.root
        self.snapshots.append(
            Snapshot(root, graphs, region.leaves, sizes, nodes, self.capture.fakes, eval_root)
        )


def _wanted(region: Region) -> list[Any]:
    """The inputs of a region, those of a part with the gradients that what is before it wants."""
    leaves = region.leaves or []
    if not region.prefix:
        return leaves
    return [
        t.detach().requires_grad_() if t.is_floating_point() and not t.is_inference() else t
        for t in leaves
    ]
