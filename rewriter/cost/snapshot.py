"""`Snapshot`: a model as it was when it was priced, to be priced at other sizes later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from rewriter.cost.cost import Cost
from rewriter.cost.interpret import Fakes, Run, run_graphs
from rewriter.cost.symbolic import holds
from rewriter.cost.training import StepCost, step_cost
from rewriter.errors import OptionError, RewriteError

__all__ = ["Formulas", "Snapshot"]

Rows = Sequence[Sequence[int | str]]


@dataclass(frozen=True)
class Formulas:
    """Costs whose figures are formulas; what does not depend on sizes (parameters) is left at 0.

    Args:
        total: of the model.
        sites: of each site.
        conditions: of the sizes, under which the formulas hold.
    """

    total: Cost
    sites: Mapping[str, Cost]
    conditions: tuple[str, ...]

    def hold(self, sizes: Mapping[str, int]) -> bool:
        return all(holds(c, sizes) for c in self.conditions)


class _Shadows(Run):
    """Shadows whose parameters are parameters, so that they can be shadowed again."""

    def __init__(self, training: bool | None, *, fakes: Fakes) -> None:
        super().__init__(training, fakes=fakes)
        self.twins: dict[int, Tensor] = {}

    def weight(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.twins:
            fake = super().weight(tensor)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            self.twins[id(tensor)] = fake
            self.kept.append(tensor)
        return self.twins[id(tensor)]


class Snapshot:
    """The graphs of a model over modules without data, whatever later passes do to the model.

    Args:
        root: the model.
        graphs: per mode (False: eval, True: train).
        inputs: the flat example inputs.
        sizes: per mode and input its sizes; a name where the size is open.
        sites: per site the nodes that call it, of both graphs.
        fakes: of the model's weights.
        eval_root: what the eval graph lives on, where that is not the model itself: a lowered one
            with the tensors that it derived.
    """

    def __init__(
        self,
        root: nn.Module,
        graphs: Mapping[bool, Graph],
        inputs: Sequence[Tensor],
        sizes: Mapping[bool, Rows],
        sites: Mapping[str, Sequence[Node]],
        fakes: Fakes,
        eval_root: nn.Module | None = None,
    ) -> None:
        run = _Shadows(None, fakes=fakes)
        self.root = run.shadow(root)
        self.eval_root = self.root if eval_root is None else run.shadow(eval_root)
        for shadow in (self.root, self.eval_root):
            vars(shadow).pop("_rewriter", None)  # which knows the model's weights
        with run.mode:
            self.inputs = [run.copy(t) for t in inputs]
        self.sizes = sizes
        self.graphs: dict[bool, Graph] = {}
        self.sites: dict[str, list[Node]] = {name: [] for name in sites}
        for mode, graph in graphs.items():
            copied = self.graphs[mode] = Graph()
            twins: dict[Node, Node] = {}
            copied.output(copied.graph_copy(graph, twins))
            for name, nodes in sites.items():
                self.sites[name] += [twins[n] for n in nodes if n in twins]
        self.found: list[Formulas] = []

    def formulas(self, around: Mapping[str, int]) -> Formulas:
        """The formulas that hold at these sizes.

        Raises:
            OptionError: the cost depends on the data, or cannot be written as formulas.
        """
        for known in self.found:
            if known.hold(around):
                return known
        try:
            found = self._priced(around)
        except (RewriteError, RuntimeError, ValueError, TypeError) as error:
            raise OptionError(
                f"this model's cost at other sizes is not known: {type(error).__name__}: "
                f"{str(error).strip().partition(chr(10))[0][:200]}"
            ) from error
        self.found.append(found)
        return found

    def _priced(self, around: Mapping[str, int]) -> Formulas:
        rows = self.sizes[False]
        run = Run(False, rows, around)
        whole = run_graphs(run, self.eval_root, [(self.eval_root, self.graphs[False], self.inputs)])
        step = StepCost()
        if True in self.graphs and self.sizes.get(True) == rows:
            regions = [(self.root, self.graphs[True], self.inputs)]
            step = step_cost(self.root, regions, rows, around)
        sites = {}
        for name, nodes in self.sites.items():
            own = [whole.nodes[n] for n in nodes if n in whole.nodes]
            steps = [step.nodes[n] for n in nodes if n in step.nodes]
            if own:
                sites[name] = replace(
                    sum(own[1:], own[0]), training=sum(steps[1:], steps[0]) if steps else None
                )
        conditions = dict.fromkeys((*run.conditions(), *step.conditions))
        return Formulas(replace(whole.total, training=step.training), sites, tuple(conditions))

    def __deepcopy__(self, memo: Any) -> Snapshot:
        return self  # nothing ever changes it

    def __reduce__(self) -> Any:
        return _lost, ()


def _lost() -> None:
    """What a pickled snapshot becomes: graphs over fake modules are not worth a file."""
