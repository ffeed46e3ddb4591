"""The engine: runs passes over a captured model; `rewriter.engine.install` changes it for them.

`Engine.run` is the list of a pass's stages (`rewriter.engine.pass_run`); what the model costs in
between is in `rewriter.engine.prices`.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rewriter import lowering as rules
from rewriter.base import Pass, Skip
from rewriter.capture import Capture
from rewriter.capture.hosted import State, original_class
from rewriter.cost import Cost
from rewriter.edits import Subgraph
from rewriter.engine.decide import Declined, Options, check_passes
from rewriter.engine.forms import capture_form, finished
from rewriter.engine.install import cut_graphs, names_of, put, remove, resize
from rewriter.engine.looking import sites_of
from rewriter.engine.other_weights import other_weights
from rewriter.engine.pass_run import PassRun
from rewriter.engine.plans import view_of
from rewriter.engine.prices import Prices
from rewriter.engine.slower import Lost
from rewriter.engine.trials import goes_past
from rewriter.engine.undo import undone_on_error
from rewriter.engine.verify import relative_error, tolerance
from rewriter.errors import StoreError, VerifyError, warn
from rewriter.lowering import Lowering, Verdicts, lower, lowered_again
from rewriter.modules.isolation import is_plain
from rewriter.modules.running import own_copy, quiet_run
from rewriter.modules.timing import medians
from rewriter.recipe.edits import Record, Removed
from rewriter.recipe.recipe import Recipe, example_to_json
from rewriter.report import CallForm, CaptureInfo, Decision, Report, Step, content
from rewriter.sites import LINEAR, MLP

if TYPE_CHECKING:
    from rewriter.planner import MemoryBudget
    from rewriter.planner.apply.training import PlannedTraining

__all__ = ["Engine", "Options", "check_passes"]


@dataclass
class Engine:
    """One rewrite in progress.

    Args:
        capture: the model; mutated by `run`.
        options: how to decide.
        recipe: what was installed, for the store.
        prices: what the model costs; made from `capture` and `options.device`.
        outputs: the flat outputs of the model as it is now, on the example inputs.
        model: the user's model, unchanged, to measure against; None where it is rewritten in place.
        first_s: measured seconds of a forward of the original model.
        memory: what trains the model by a memory plan; None without a budget.
        lowering: the fused ops that run in eval mode.
        untaken: the weights of the model as it came that are no site's, each with the reason.
        lost: what new layers lose in time; None where nobody asked.
        weighed: whether a pass for linear layers has run, so that those are worth a mention.
    """

    capture: Capture
    options: Options
    recipe: Recipe = field(default_factory=Recipe)
    prices: Prices = field(init=False)
    outputs: list[Any] | None = None
    model: nn.Module | None = None
    first_s: float | None = None
    memory: PlannedTraining | None = None
    lowering: Lowering = field(default_factory=Lowering)
    untaken: list[Decision] = field(default_factory=list)
    lost: Lost | None = None
    weighed: bool = False

    def __post_init__(self) -> None:
        self.prices = Prices(self.capture, self.options.device)

    def original(self) -> Step:
        """Prices the model as it came; the first step of the report."""
        start = time.perf_counter()
        self.prices.price()
        sites = sites_of(self.capture)
        for decision, calls in (others := other_weights(self.capture, sites)):
            self.untaken.append(replace(decision, before=self.prices.of_calls(calls)))
        self.prices.remember(sites, others={d.site: calls for d, calls in others})
        self.outputs, self.capture.found = self.capture.found, None
        if self.outputs is None:
            self.outputs = self.capture.outputs()
        seconds = time.perf_counter() - start
        total = self.prices.cost.total = self._measured(self.prices.cost.total)
        notes = [_CAPTURED] if total.launches else []
        return Step(
            "original", total, total, [], None, True, seconds, notes, self.prices.timeline()
        )

    def run_all(self, passes: Sequence[Pass]) -> list[Step]:
        """`run` of each, in order."""
        return [self.run(p, passes[i + 1 :]) for i, p in enumerate(passes)]

    def run(self, rewrite: Pass, later: Sequence[Pass] = ()) -> Step:
        """Runs one pass over the whole model.

        Args:
            rewrite: the pass.
            later: those that follow: they may decide which layer is the faster one.

        Raises:
            PassError: the pass failed on a site; names both.
            OptionError: a `where` pattern matches nothing.
            VerifyError: what must hold after a pass does not.
        """
        start, before = time.perf_counter(), self.prices.cost.total
        costs = self.prices.of_sites(sites_of(self.capture))
        run = PassRun(rewrite, self.capture, self.options, costs, before.param_bytes, later)
        run.look()
        self.weighed |= LINEAR in rewrite.kinds
        run.calibrate()
        run.ask()
        run.decide()
        run.try_layers()
        if self.lost is not None and not rewrite.simulates:
            self.lost.add(run.proposals, later, self.options.where)
        with self._all_or_nothing(run):
            run.install(self.recipe)
            self.prices.price()
            run.verify()
            self.capture.host()
            run.error = self._compare(rewrite, run.changes, run.notes)
            self.prices.cost.total = self._measured(self.prices.cost.total)
            run.weigh(before, self.prices.cost.total)
        sites = sites_of(self.capture)
        self.prices.remember(sites)
        run.record(self.prices.of_sites(sites))
        seconds, timeline = time.perf_counter() - start, self.prices.timeline()
        step = Step(
            str(rewrite), before, self.prices.cost.total, run.decisions, run.error, rewrite.exact,
            seconds, run.notes, timeline,
        )  # fmt: skip
        for line in content.simulated(step):
            warn(line)
        return step

    @contextlib.contextmanager
    def _all_or_nothing(self, run: PassRun) -> Iterator[None]:
        """Graphs, module tree, recipe and prices are as they were where a plan fails, or where
        what it did is not what the user asked for."""
        if not run.rewrite.plans:
            yield
            return
        outputs, cost, step = self.outputs, self.prices.cost, self.prices.step
        try:
            with undone_on_error(self.capture, self.recipe):
                yield
        except BaseException as failure:
            self.outputs, self.prices.cost, self.prices.step = outputs, cost, step
            if not isinstance(failure, Declined):
                raise
            run.drop(str(failure))

    def time_losses(self) -> None:
        """From here on, new layers are timed beside those that they replace, where this machine is
        the one that is asked for, and nothing else times the model."""
        options = self.options
        here = options.device is None or options.device.name == "this machine"
        if here and not options.measure and options.objective != "latency":
            self.lost = Lost(time.perf_counter() - self.capture.seconds, self.options.lower)

    def speed(self) -> tuple[float | None, int]:
        """How fast the model is beside the original, by the layers that were timed; None where
        those are no slower, or nothing is known; and how many layers were not timed, which count
        as no slower. It runs the model."""
        if self.lost is None or self.lost.seconds < content.LEAST_LOST:
            return None, 0
        fused = bool(self.lowering.lowered)
        if fused and not is_plain(self.capture.root, training=False):
            return None, 0  # what is looked at op by op runs unfused
        if fused:
            self._attach_lowering(on=False)
        plain = now = self._seconds()
        if fused:
            self._attach_lowering()
            now = self._seconds()
        before, after = min(plain) - self.lost.seconds, min(now)
        known = before >= max(content.SHORTEST, _BELIEVED * min(plain))
        clear = after - before > max(statistics.median(t) - min(t) for t in (plain, now))
        return (before / after, self.lost.untimed) if known and clear else (None, 0)

    def _seconds(self) -> list[float]:
        """Seconds of forwards on the example inputs, which what else the machine does only adds
        to; the first one, which makes things ready, does not count."""
        example, root = self.capture.example, self.capture.root
        assert example is not None
        with quiet_run(root, training=False, grad=self.capture.asks_for_grad):
            args, kwargs = own_copy(*example)
            times: list[float] = []
            while len(times) < 3 or (len(times) < 10 and sum(times[1:]) < _SHORT_CALL):
                start = time.perf_counter()
                root(*args, **kwargs)
                times.append(time.perf_counter() - start)
        return times[1:]

    def plan_memory(self, budget: MemoryBudget) -> Step:
        """Plans what a training step keeps; the model then trains by that plan.

        Raises:
            OptionError: the budget cannot be met, or the model is not one train graph.
        """
        from rewriter.planner.apply.install import plan_of  # SciPy: only where it plans

        start = time.perf_counter()
        self.capture.host()
        self.memory = plan_of(self.capture, budget, self.options.device)
        assert self.memory.plan is not None
        self.memory.plan.seconds = time.perf_counter() - start
        leaves = self.capture.regions[0].leaves or []
        inputs = sum(t.untyped_storage().nbytes() for t in leaves)
        step = self.memory.plan.to_step(self.prices.cost.total, inputs)
        self.prices.cost.total = step.after
        return step

    def lower(self) -> list[Step]:
        """Applies the lowering rules to the eval graphs; their step of the report, [] without one.

        Raises:
            VerifyError: a rule changes a type, or fails itself.
        """
        self.lowering = lower(
            self.capture, self.options.lower, self.prices.cost, self.capture.fakes
        )
        step, graph = self.lowering.step, self.lowering.graph
        idle = step is None or all(d.action == "declined" for d in step.decisions)
        if step is None or (idle and self.options.lower is rules.DEFAULT_RULES):
            return []  # that our own ops are no faster here is no news; that the user's are not is
        self._attach_lowering()
        if self.options.lower is rules.DEFAULT_RULES and not self._lowering_pays():
            self._attach_lowering(on=False)
            self.lowering = Lowering()
            return []
        if self.lowering.cost is not None:
            self.prices.cost = self.lowering.cost
        step.output_error = self._lowered_error()
        total = self._measured(self.prices.predicted(self.prices.cost.total))
        step.after = self.prices.cost.total = total
        step.timeline = self.prices.timeline()
        self.prices.remember(sites_of(self.capture), graph)
        return [step]

    def lower_again(self, verdicts: Mapping[str, Verdicts]) -> None:
        """Lets a model that is loaded run the fused ops that it ran where it was saved, at its
        first call where it is not captured.

        Args:
            verdicts: per module that has graphs.
        """
        self.lowering = Lowering(verdicts=dict(verdicts))
        for region in self.capture.regions:
            if (known := verdicts.get(region.prefix)) is not None and region.hosted:
                lowered = lowered_again(self.capture, region, known)
                if lowered is not None:
                    self.lowering.lowered[region.prefix] = lowered

    def _lowered_error(self) -> float | None:
        """How far the fused ops move the outputs on the example inputs: rounding, together. None
        where that is not known, as of a model that draws random numbers: its runs for comparison
        are looked at op by op, and unfused."""
        if self.outputs is None:
            return None
        if not self.lowering.lowered:
            return 0.0
        if not is_plain(self.capture.root, training=False):
            return None
        previous, self.outputs = self.outputs, self.capture.outputs()
        assert self.outputs is not None
        return relative_error(self.outputs, previous)

    def _lowering_pays(self) -> bool:
        """Whether the lowered model is the faster one on the example inputs.

        Every call checks whether weights have changed, which a short call may not be worth. A long
        one is not timed: there the check is a small part.
        """
        example, root = self.capture.example, self.capture.root
        tensors = [t for t in self.outputs or () if isinstance(t, torch.Tensor) and not t.is_meta]
        if example is None or not tensors or not self.lowering.lowered:
            return True
        args, kwargs = own_copy(*example)

        def run(on: bool) -> None:
            self._attach_lowering(on)
            root(*args, **kwargs)

        lowered, plain = functools.partial(run, True), functools.partial(run, False)
        with quiet_run(root, training=False, timed=True, grad=self.capture.asks_for_grad):
            lowered()  # derives the weights
            start = time.perf_counter()
            lowered()
            if time.perf_counter() - start > _SHORT_CALL:
                return True
            with_rules, without = medians((lowered, plain), tensors[0].device)
        self._attach_lowering()
        return with_rules < _LEAD * without

    def _attach_lowering(self, on: bool = True) -> None:
        """Lets the modules run their fused ops, or with `on` False their graphs as they are."""
        for prefix, verdicts in self.lowering.verdicts.items():
            state = vars(self.capture.root.get_submodule(prefix))["_rewriter"]
            state.lowered = self.lowering.lowered.get(prefix) if on else None
            state.verdicts = verdicts if on else None

    def report(self, steps: list[Step]) -> Report:
        """The ledger of these steps."""
        capture = self.capture
        if self.weighed:
            steps[0].decisions += _left(self.untaken, steps)
        own = ((r.signature, r.leaves) for r in capture.regions if not r.prefix)
        signature = next((s.named(leaves) for s, leaves in own if s is not None), "")
        info = CaptureInfo(capture.rung, capture.seconds, capture.islands, capture.notes, signature)
        device, model = self.options.device, original_class(capture.root).__name__
        on = "" if device is None else device.name
        report = Report(model, info, steps, self.prices.errors, on)
        if (open_ := self.prices.open_sizes()) is not None:
            report.sizes, report.ranges = open_.values, open_.ranges
        report.snapshots, report.predictor = self.prices.snapshots, device
        return report

    def finish(self, report: Report, recipe: Recipe | None = None) -> None:
        """Hosts the final graphs; the root carries the report and the recipe."""
        recipe = self.recipe if recipe is None else recipe
        call = self.capture.call
        if call is not None:
            recipe.example = example_to_json(call.arguments)
        graph_only = tuple(n for n, i in recipe.installed.items() if i.graph_only)
        edited = tuple(n for n in recipe.edited_places() if n not in graph_only)
        if edited and recipe is self.recipe:  # a model that is loaded brings the answer along
            recipe.edits_in_graph = bool(goes_past(self.capture, edited, self.outputs))
        graph_only += edited if recipe.edits_in_graph else ()
        if recipe is self.recipe or recipe.refuses is None:
            recipe.refuses = goes_past(self.capture, graph_only, self.outputs)
        why = recipe.refuses if graph_only else ""
        if why:
            self.capture.notes.append(why)
        self.capture.host(graph_only if why else ())
        self._attach_lowering()
        state = self.capture.root.__dict__["_rewriter"]
        state.report, state.recipe, state.memory = report, recipe, self.memory
        self._list_forms(report)
        recipe.memory = None if self.memory is None else self.memory.budget

    def _list_forms(self, report: Report) -> None:
        """The report has the forms of all hosted modules; new ones are captured from here on."""
        report.forms = []
        capture = self.capture
        for name, module in capture.root.named_modules():
            state = vars(module).get("_rewriter")
            if not isinstance(state, State):
                continue
            state.ledger, state.whole = report.forms, self.capture.root.__dict__["_rewriter"].recipe
            others = capture.others if not name else []
            for region, form in zip(others, state.forms[1:], strict=True):
                like = finished(capture, region, state)
                form.memory, form.lowered = like.memory, like.lowered
            for form in state.forms:
                call = "" if form.signature is None else form.signature.described()
                form.entry.call, form.entry.module = call, name
                report.forms.append(form.entry)
            if state.forms or name in capture.pending:
                state.capturer = capture_form
            else:
                reason = next((i.reason for i in capture.islands if i.fqn == name), "")
                state.island = CallForm("", name, reason)
                report.forms.append(state.island)

    def replay(self, edits: Sequence[Record]) -> None:
        """Carries out the edits of a saved rewrite, on the module tree and on captured graphs.

        Raises:
            StoreError: the model has no such places.
        """
        root = self.capture.root
        removed = [e for e in edits if isinstance(e, Removed)]
        known = dict(root.named_modules(remove_duplicate=False))
        names = [
            n
            for e in edits
            for n in (e.names if isinstance(e, Removed) else (*e.rows, *e.columns, *e.norms))
        ]
        missing = [n for n in names if n not in known]
        if missing:
            raise StoreError(
                f"the recipe edits {missing[0]}, which {type(root).__name__} does not have: pass "
                "the model that was rewritten"
            )
        if self.capture.regions and removed:
            view = view_of(self.capture)
            blocks = [view.block(e.names[0]) for e in removed]
            for gone, found in zip(removed, blocks, strict=True):
                if isinstance(found, Skip):
                    raise StoreError(f"{gone.names[0]} cannot be removed again: {found.reason}")
            cuts = [c for b in blocks if isinstance(b, Subgraph) for c in b.cuts]
            cut_graphs(self.capture, cuts, [n for e in removed for n in e.names])
        for record in edits:
            if isinstance(record, Removed):
                remove(root, record)
            else:
                resize(root, record)

    def place(self, layers: Mapping[str, nn.Module]) -> None:
        """Installs the layers of a saved rewrite, each at the site of its dotted name.

        Raises:
            StoreError: the model has no site of such a name.
        """
        # an MLP is only some of the calls of its down projection
        sites = {s.fqn: s for s in sites_of(self.capture) if s.kind != MLP}
        names = names_of(self.capture.root)
        for name, layer in layers.items():
            if name not in sites:
                raise StoreError(
                    f"the recipe rewrites {name}, which {type(self.capture.root).__name__} does "
                    "not have: pass the model that was rewritten, and inputs that reach it"
                )
            put(self.capture, sites[name], layer, names)
        self.prices.price()

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
                stack.enter_context(
                    quiet_run(model, training=False, timed=True, grad=self.capture.asks_for_grad)
                )
            args, kwargs = own_copy(*example)
            calls = [functools.partial(model, *args, **kwargs) for model in models]
            times = medians(calls, tensors[0].device)
        if self.first_s is None:
            self.first_s = times[0]
        scale = self.first_s / times[0] if self.model is not None else 1.0
        return replace(cost, measured_s=times[-1] * scale)

    def _compare(self, rewrite: Pass, changed: bool, notes: list[str]) -> float | None:
        """How far the pass moved the outputs on the example inputs, relative to their size.

        Raises:
            VerifyError: the pass says that it is exact, and moved them by more than rounding.
        """
        if self.outputs is None or not changed:
            return None if self.outputs is None else 0.0
        previous, self.outputs = self.outputs, self.capture.outputs()
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


def _left(untaken: list[Decision], steps: list[Step]) -> list[Decision]:
    """The weights that no pass has taken after all, and that are still there."""
    decided = {d.site for step in steps if step.name != "lowering" for d in step.decisions}
    gone = tuple(f"{d.site}." for step in steps for d in step.decisions if d.action == "removed")
    return [
        d for d in untaken if d.site not in decided and not (gone and f"{d.site}.".startswith(gone))
    ]


_BELIEVED = (
    0.1  # of a forward that is left without what new layers lose; less is an error of timing
)
_SHORT_CALL = 5e-3  # seconds
_LEAD = 0.97  # of the plain call, at most: what is less may be noise

_CAPTURED = (
    "costs are those of the captured graph: the model's own Python may hold values for longer, or "
    "take a fused path of PyTorch's"
)
