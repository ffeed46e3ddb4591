"""The engine: asks a pass about every site, and is the only code that mutates.

Per pass: find sites → propose → decide (`rewriter.decide`) → try the layers → install → propagate →
verify → record.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from rewriter.base import Layer, Pass, Replacement, Skip
from rewriter.calibration import gather
from rewriter.capture import Capture, Region
from rewriter.cost import (
    Cost,
    GraphCost,
    Snapshot,
    StepCost,
    model_cost,
    step_cost,
    storage_cost,
)
from rewriter.decide import (
    Options,
    Proposal,
    check_passes,
    check_patterns,
    objections,
    ties,
    unsafe,
    unselected,
)
from rewriter.errors import CalibrationError, PassError, RewriteWarning, StoreError, VerifyError
from rewriter.hosted import original_class
from rewriter.report import CaptureInfo, Decision, Report, Step, Timeline
from rewriter.running import first_line, own_copy, quiet_run
from rewriter.signature import OpenSizes
from rewriter.sites import LINEAR, MLP, Site, find_sites, is_leaf, kind_of
from rewriter.spellings import kind_name
from rewriter.store import Installed, Recipe, example_to_json
from rewriter.strays import strays
from rewriter.timing import medians
from rewriter.tree import is_hook_dict
from rewriter.trial import at, goes_past, source_of, try_layer
from rewriter.verify import boundary, check, relative_error, tolerance

if TYPE_CHECKING:
    from rewriter.planner import MemoryBudget
    from rewriter.planner.training import PlannedTraining

__all__ = ["Engine", "Options", "check_passes"]


@dataclass
class Engine:
    """One rewrite in progress.

    Args:
        capture: the model; mutated by `run`.
        options: how to decide.
        errors: what could not be priced, for the report.
        recipe: what was installed, for the store.
        cost: of the model as it is now.
        step: the same for a training step.
        outputs: of the model as it is now, on the example inputs.
        snapshots: the model at each step, for prices at other sizes.
        model: the user's own, unchanged, to measure against; None where it is rewritten in place.
        first_s: measured seconds of the original.
        memory: what trains the model by a memory plan; None without a budget.
    """

    capture: Capture
    options: Options
    errors: list[str] = field(default_factory=list)
    recipe: Recipe = field(default_factory=Recipe)
    cost: GraphCost = field(default_factory=GraphCost)
    step: StepCost = field(default_factory=StepCost)
    outputs: list[Any] | None = None
    snapshots: list[Snapshot | None] = field(default_factory=list)
    model: nn.Module | None = None
    first_s: float | None = None
    memory: PlannedTraining | None = None

    def original(self) -> Step:
        """Prices the model as it came; the first step of the report."""
        start = time.perf_counter()
        self._price()
        self._remember()
        self.outputs, self.capture.found = self.capture.found, None
        if self.outputs is None:
            self.outputs = self._outputs()
        seconds = time.perf_counter() - start
        total = self.cost.total
        total = self._measured(total)
        self.cost.total = total
        return Step(
            "original", total, total, [], None, True, seconds, [_CAPTURED], self._timeline()
        )

    def run(self, rewrite: Pass) -> Step:
        """Runs one pass over the whole model.

        Raises:
            PassError: the pass failed on a site; names both.
            OptionError: a `where` pattern matches nothing.
            VerifyError: what must hold after a pass does not.
        """
        start = time.perf_counter()
        before, before_nodes = self.cost.total, self._site_costs()
        bound = boundary(self.capture)
        sites = self._sites()
        matching = [s for s in sites if s.kind in rewrite.matches]
        check_patterns(rewrite, matching, self.options.where, rewrite.where)
        notes: list[str] = []
        if not matching:
            kinds = ", ".join(kind_name(k) for k in rewrite.matches)
            notes.append(f"nothing to do: the model has no site of kind {kinds}")
            warnings.warn(f"{rewrite}: {notes[-1]}", RewriteWarning, stacklevel=4)
        decisions: list[Decision] = []
        proposals: list[Proposal] = []
        matching = self._calibrated(rewrite, matching, sites, notes)
        for site in matching:
            answer = self._ask(rewrite, site, sites)
            if isinstance(answer, Skip):
                decisions.append(_decision(site, "skipped", answer.reason))
            else:
                proposals.append(Proposal(site, answer))
        proposals = self._standing(proposals, decisions, before_nodes)
        seen: set[object] = set()
        for p in proposals:
            try_layer(self.capture, rewrite, p, seen)
        looks = [_decision(p.site, "replaced", p.replacement.note) for p in proposals]
        names = _names(self.capture.root)
        for p in proposals:
            self._install(rewrite, p, names)
        self._price()
        check(self.capture, bound, [p.replacement.layer for p in proposals], str(rewrite))
        self.capture.host()
        self._remember()
        error = self._compare(rewrite, bool(proposals), notes)
        self.cost.total = self._measured(self.cost.total)
        after_nodes = self._site_costs()
        for p, look in zip(proposals, looks, strict=True):
            layer, kernel = p.replacement.layer, "torch"
            if isinstance(layer, Layer) and look.tokens is not None:
                kernel = layer.kernel(look.tokens)
            costs = before_nodes.get(look.site), after_nodes.get(look.site)
            decisions.append(
                replace(
                    look,
                    error=p.replacement.error,
                    output_error=p.replacement.output_error,
                    kernel=kernel,
                    before=costs[0],
                    after=costs[1],
                )
            )
        if LINEAR in rewrite.matches:
            decisions += [_decision(s, "skipped", r) for s, r in self._unmatched(rewrite, sites)]
            decisions += strays(self.capture, sites, [d.site for d in decisions])
        held = sum(
            layer.held_bytes(look.tokens or 1)
            for layer, look in zip((p.replacement.layer for p in proposals), looks, strict=True)
            if isinstance(layer, Layer)
        )
        if held:
            notes.append(
                f"kernels keep {held / 1e6:.3g} MB of packed weights on top of the ledger's memory"
            )
        order = {site.fqn: i for i, site in enumerate(sites)}
        decisions.sort(key=lambda d: order.get(d.site, len(order)))
        seconds = time.perf_counter() - start
        return Step(
            str(rewrite),
            before,
            self.cost.total,
            decisions,
            error,
            rewrite.exact,
            seconds,
            notes,
            self._timeline(),
        )

    def plan_memory(self, budget: MemoryBudget) -> Step:
        """Plans what a training step keeps; the model then trains by that plan.

        Raises:
            OptionError: the budget cannot be met, or the model is not one train graph.
        """
        from rewriter.planner.install import plan_of

        start = time.perf_counter()
        self.capture.host()
        self.memory = plan_of(self.capture, budget, self.options.device)
        assert self.memory.plan is not None
        self.memory.plan.seconds = time.perf_counter() - start
        leaves = self.capture.regions[0].leaves or []
        inputs = sum(t.untyped_storage().nbytes() for t in leaves)
        step = self.memory.plan.to_step(self.cost.total, inputs)
        self.cost.total = step.after
        return step

    def report(self, steps: list[Step]) -> Report:
        """The ledger of these steps."""
        capture = self.capture
        own = (r.signature for r in capture.regions if not r.prefix)
        signature = next((str(s) for s in own if s is not None), "")
        info = CaptureInfo(capture.rung, capture.seconds, capture.islands, capture.notes, signature)
        device, name = self.options.device, original_class(capture.root).__name__
        report = Report(name, info, steps, self.errors, "" if device is None else device.name)
        if (open_ := self._open_sizes()) is not None:
            report.sizes, report.ranges = open_.values, open_.ranges
        report.snapshots, report.predictor = self.snapshots, device
        return report

    def finish(self, report: Report, recipe: Recipe | None = None) -> None:
        """Hosts the final graphs; the root carries the report and the recipe."""
        recipe = self.recipe if recipe is None else recipe
        call = self.capture.call
        if call is not None:
            recipe.example = example_to_json(call.arguments)
        graph_only = tuple(n for n, i in recipe.installed.items() if i.graph_only)
        why = goes_past(self.capture, graph_only, self.outputs)
        if why:
            self.capture.notes.append(why)
        self.capture.host(graph_only if why else ())
        state = self.capture.root.__dict__["_rewriter"]
        state.report, state.recipe, state.memory = report, recipe, self.memory
        recipe.memory = None if self.memory is None else self.memory.budget

    def _outputs(self) -> list[Any] | None:
        return self.capture.outputs()

    # looking

    def _sites(self) -> list[Site]:
        """Called sites first; then layers that the captured forward never calls."""
        root = self.capture.root
        graphs: dict[bool, list[tuple[str, fx.Graph]]] = {False: [], True: []}
        for region, mode, graph in self.capture.graphs():
            graphs[mode].append((region.prefix, graph))
        sites = find_sites(root, graphs[False], graphs[True])
        seen = {id(s.module) for s in sites if s.module is not None}
        for fqn, module in root.named_modules():
            kind = kind_of(module) if is_leaf(module) else None
            if kind is not None and id(module) not in seen:
                own = {} if isinstance(kind, type) else dict(module.named_parameters(recurse=False))
                weight, bias = (f"{fqn}.{n}" if n in own else None for n in ("weight", "bias"))
                sites.append(Site(kind, fqn, root, (), weight, bias))
        return sites

    def _unmatched(self, rewrite: Pass, sites: list[Site]) -> list[tuple[Site, str]]:
        """Layers of ours that a pass for linear layers does not take, each with why."""
        taken = {s.fqn for s in sites if s.kind in rewrite.matches}
        return [
            (s, f"is a {type(s.module).__name__}, which {type(rewrite).__name__} does not take")
            for s in sites
            if isinstance(s.kind, type) and s.fqn not in taken
        ]

    def _site_costs(self) -> dict[str, Cost]:
        """Cost of each named layer over its calls in the graphs that were priced (eval)."""
        costs: dict[str, Cost] = {}
        for site in self._sites():
            own = [self.cost.nodes[n] for n in site.nodes if n in self.cost.nodes]
            steps = [self.step.nodes[n] for n in site.nodes if n in self.step.nodes]
            if own:
                total = sum(own[1:], own[0])  # a layer called twice is stored once
                costs[site.fqn] = self._predicted(
                    replace(
                        total,
                        params=own[0].params,
                        param_bytes=own[0].param_bytes,
                        training=sum(steps[1:], steps[0]) if steps else None,
                    )
                )
        return costs

    def _calibrated(
        self, rewrite: Pass, matching: list[Site], sites: Sequence[Site], notes: list[str]
    ) -> list[Site]:
        """The sites with the moments of their inputs, where the pass and the user want them."""
        calibration = self.options.calibration
        if calibration is None or not rewrite.calibrates:
            return matching
        if self.capture.on_meta:
            raise CalibrationError(
                "the model is on meta, where nothing can be calibrated: leave "
                "calibration out, or load the weights"
            )
        wanted = [
            s
            for s in matching
            if unselected(s, self.options.where, rewrite.where) is None
            and unsafe(self.capture, s, sites) is None
        ]
        found, missing = gather(self.capture, wanted, calibration)
        reasons: dict[str, list[str]] = {}
        for name, why in missing.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            notes.append(f"fitted to weights alone, not calibrated: {', '.join(names)} ({why})")
            warnings.warn(f"{rewrite}: {notes[-1]}", RewriteWarning, stacklevel=5)
        return [replace(s, moments=found.get(s.fqn)) for s in matching]

    def _ask(self, rewrite: Pass, site: Site, sites: Sequence[Site]) -> Replacement | Skip:
        """The pass's answer, or why it is not asked."""
        try:
            reason = unselected(site, self.options.where, rewrite.where)
            reason = reason or unsafe(self.capture, site, sites)
            if reason is not None:
                return reason
            with torch.enable_grad():  # views of parameters must keep their requires_grad
                answer = rewrite.propose(site)
        except Exception as error:
            raise PassError(f"{at(rewrite, site)}: {type(error).__name__}: {error}") from error
        if isinstance(answer, Skip):
            return answer
        if not isinstance(answer, Replacement) or not isinstance(answer.layer, nn.Module):
            inner = (
                f" of a {type(answer.layer).__name__}" if isinstance(answer, Replacement) else ""
            )
            raise PassError(
                f"{rewrite}.propose returned a {type(answer).__name__}{inner} for {site.fqn}: "
                "return Replacement(layer) or Skip(reason)"
            )
        return answer

    def _standing(
        self, proposals: list[Proposal], decisions: list[Decision], costs: Mapping[str, Cost]
    ) -> list[Proposal]:
        """The proposals that nothing speaks against; why the others fall goes to `decisions`."""
        proposals, refused = ties(self.capture, proposals)
        decisions += [_decision(p.site, "skipped", reason) for p, reason in refused]
        resident = self.cost.total.param_bytes
        against = {
            id(p): objections(p, self.options, costs.get(p.site.fqn), resident) for p in proposals
        }
        groups = {p.group: (p, against[id(p)]) for p in proposals if against[id(p)]}
        kept = []
        for p in proposals:
            reason = against[id(p)]
            if not reason and p.group >= 0 and p.group in groups:
                other, why = groups[p.group]
                reason = f"its weight is tied to {other.site.fqn}, which is declined: {why}"
            if reason:
                error = p.replacement.error
                decisions.append(_decision(p.site, "declined", reason, error=error))
            else:
                kept.append(p)
        return kept

    # mutating

    def _install(self, rewrite: Pass, p: Proposal, names: Mapping[int, list[str]]) -> None:
        site = p.site
        own = self.recipe.installed.setdefault(
            site.fqn, Installed(site.weight_ref, site.bias_ref, site.transposed)
        )
        own.chain.append((site.kind, rewrite))
        own.graph_only |= any(n.op != "call_module" for n in site.nodes)
        self._put(site, p.replacement.layer, names)

    def place(self, layers: Mapping[str, nn.Module]) -> None:
        """Installs given layers at their names: a saved rewrite comes back.

        Raises:
            StoreError: the model has no site of such a name.
        """
        # an MLP is only some of the calls of its down projection
        sites = {s.fqn: s for s in self._sites() if s.kind != MLP}
        names = _names(self.capture.root)
        for name, layer in layers.items():
            if name not in sites:
                raise StoreError(
                    f"the recipe rewrites {name}, which {type(self.capture.root).__name__} does "
                    "not have: pass the model that was rewritten, and inputs that reach it"
                )
            self._put(sites[name], layer, names)
        self._price()

    def _put(self, site: Site, layer: nn.Module, names: Mapping[int, list[str]]) -> None:
        """Puts a layer at a site; `names` are those that each module had before the pass."""
        root = self.capture.root
        prefixes = {id(g): r.prefix for r, _, g in self.capture.graphs()}
        layer.train(root.training if site.module is None else site.module.training)
        old = site.module
        for node in site.nodes:
            if node.op != "call_module":
                prefix = prefixes[id(node.graph)]
                _call_instead(node, site.fqn.removeprefix(f"{prefix}.") if prefix else site.fqn)
        if isinstance(layer, Layer):
            # what Python code that reads the weight by hand sees in its place
            stood = getattr(old, "stands_for_transposed", False)
            layer.stands_for_transposed = stood if old is not None else site.transposed
        if old is not None:
            _take_hooks(old, layer)
            for name in names[id(old)]:
                root.set_submodule(name, layer)
            return
        owner, _, name = site.fqn.rpartition(".")
        holder = root.get_submodule(owner)
        if site.weight_ref == site.fqn:
            # The layer takes the weight's place, also for the Python code that reads it; a bias
            # stays where that code finds it, tied to the layer's.
            del holder._parameters[name]
        if hasattr(holder, name):
            raise PassError(f"{site.fqn} exists already: cannot install a layer there")
        holder.add_module(name, layer)

    # checking

    def _price(self) -> None:
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
        self.cost.total = self._predicted(replace(self.cost.total, training=self.step.training))
        self.errors += [
            e for e in dict.fromkeys(self.cost.errors + self.step.errors) if e not in self.errors
        ]

    def _predicted(self, cost: Cost) -> Cost:
        """The cost with the device's times."""
        device = self.options.device
        return cost if device is None else device.priced(cost, self.cost.total.param_bytes)

    def _measured(self, cost: Cost) -> Cost:
        """The cost with the wall time of the model as it is now.

        Each step is timed in turns with the user's model, and its time is that of the original
        times their ratio: so the steps compare, though minutes lie between them.
        """
        example = self.capture.example
        if not self.options.measure or example is None or not self.outputs:
            return cost
        tensors = [t for t in self.outputs if isinstance(t, torch.Tensor)]
        if not tensors or any(t.is_meta for t in tensors):
            return cost
        models = [self.capture.root] if self.model is None else [self.model, self.capture.root]
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(quiet_run(model, training=False))
            args, kwargs = own_copy(*example)
            calls = [functools.partial(model, *args, **kwargs) for model in models]
            times = medians(calls, tensors[0].device)
        if self.first_s is None:
            self.first_s = times[0]
        scale = self.first_s / times[0] if self.model is not None else 1.0
        return replace(cost, measured_s=times[-1] * scale)

    def _timeline(self) -> Timeline | None:
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

    def _open_sizes(self) -> OpenSizes | None:
        """The sizes that vary; None where the model is not one graph."""
        regions = self.capture.regions
        if len(regions) != 1 or regions[0].prefix or self.capture.islands:
            return None
        signature, leaves = regions[0].signature, regions[0].leaves
        if signature is None or leaves is None:
            return None
        return signature.open_sizes(False, leaves)

    def _remember(self) -> None:
        """Keeps the model as it is now, for prices at other sizes."""
        open_, region = self._open_sizes(), next(iter(self.capture.regions), None)
        if open_ is None or not open_.values or region is None:
            self.snapshots.append(None)
            return
        assert region.signature is not None
        assert region.leaves is not None
        sizes = {
            mode: region.signature.open_sizes(mode, region.leaves).rows for mode in region.graphs
        }
        sites = {s.fqn: s.nodes for s in self._sites() if s.nodes}
        self.snapshots.append(
            Snapshot(
                self.capture.root, region.graphs, region.leaves, sizes, sites, self.capture.fakes
            )
        )

    def _compare(self, rewrite: Pass, changed: bool, notes: list[str]) -> float | None:
        if self.outputs is None or not changed:
            return None if self.outputs is None else 0.0
        previous, self.outputs = self.outputs, self._outputs()
        assert self.outputs is not None
        error = relative_error(self.outputs, previous)
        if error is None:
            return None
        if error == float("inf"):
            notes.append("outputs on the example inputs are no longer finite")
        if rewrite.exact and error > tolerance(previous):
            raise VerifyError(
                f"{rewrite} says it is exact, but changes the outputs on the example inputs by "
                f"{error:.2e} (relative), more than rounding explains"
            )
        return error


def _decision(site: Site, action: str, reason: str, **more: Any) -> Decision:
    return Decision(
        site=site.fqn,
        kind=kind_name(site.kind),
        action=action,
        reason=reason,
        where=site.where,
        tokens=site.tokens,
        shape=_shape(site),
        **more,
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


def _names(root: nn.Module) -> dict[int, list[str]]:
    """id of a module → all the names it has."""
    names: dict[int, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _shape(site: Site) -> str:
    try:
        return f"{site.in_features}→{site.out_features}"
    except AttributeError:  # no linear map: an activation, a convolution
        return ""


def _take_hooks(old: nn.Module, new: nn.Module) -> None:
    """The hooks of a layer go to the one in its place, in the dicts that their handles know."""
    if old is new:
        return
    for name, hooks in vars(old).items():
        if not is_hook_dict(name) or not hooks:
            continue
        own = getattr(new, name, None)
        if own:
            own.update(hooks)
        else:
            setattr(new, name, hooks)
    if old._backward_hooks:
        new._is_full_backward_hook = old._is_full_backward_hook


def _call_instead(node: fx.Node, target: str) -> None:
    """Calls the module at `target` where `node` called a function; drops what fed its weight."""
    graph, source = node.graph, source_of(node)
    feeding = [a for a in node.all_input_nodes if a is not source]
    with graph.inserting_before(node):
        new = graph.create_node("call_module", target, (source,))
    new.meta = copy.copy(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    while feeding:
        dead = feeding.pop()
        if not dead.users:
            feeding += [a for a in dead.all_input_nodes if a not in feeding]
            graph.erase_node(dead)


_CAPTURED = (
    "costs are those of the captured graph: the model's own Python may hold values for longer, or "
    "take a fused path of PyTorch's"
)
_POINTS = 600  # of a timeline: what a plot can show


def thinned(timeline: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """At most `_POINTS` points, the highest of each stretch."""
    step = -(-len(timeline) // _POINTS)
    return [max(timeline[i : i + step], key=lambda p: p[1]) for i in range(0, len(timeline), step)]
