"""The engine: asks a pass about every site, decides, and is the only code that mutates.

Per pass: find sites → propose → decline (ties, `max_error`, `objective`) → install → propagate →
verify → record.
"""

from __future__ import annotations

import copy
import fnmatch
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from rewriter.base import Layer, Pass, Phase, Replacement, Skip, Where
from rewriter.capture import Capture, run_flat
from rewriter.cost import Cost, GraphCost, model_cost, storage_cost
from rewriter.errors import (
    OptionError,
    PassError,
    RewriteError,
    RewriteWarning,
    StoreError,
    VerifyError,
)
from rewriter.hosted import original_class
from rewriter.report import CaptureInfo, Decision, Report, Step
from rewriter.sites import LINEAR, Site, find_sites, is_leaf, kind_of, op_name
from rewriter.store import Installed, Recipe, example_to_json
from rewriter.verify import boundary, check, relative_error, tolerance

__all__ = ["Engine", "Options", "check_passes"]

OBJECTIVES = ("latency", "memory", "params")


@dataclass(frozen=True)
class Options:
    """How the engine decides; see `rewriter.rewrite`."""

    objective: str | None = None
    max_error: float | None = None
    where: Where = None

    def __post_init__(self) -> None:
        if self.objective not in (None, *OBJECTIVES):
            raise OptionError(f"objective={self.objective!r}: use None or one of {OBJECTIVES}")
        if self.max_error is not None and not self.max_error >= 0:
            raise OptionError(f"max_error={self.max_error!r}: use a number of at least 0, or None")


def check_passes(passes: Sequence[Pass]) -> None:
    """Raises one error that lists everything wrong with a recipe.

    Raises:
        OptionError: something is not a pass, or a pass comes before one of an earlier phase.
    """
    if isinstance(passes, Pass):
        raise OptionError(f"passes must be a list: write [{passes}]")
    problems = []
    for i, p in enumerate(passes):
        if isinstance(p, type) and issubclass(p, Pass):
            problems.append(f"passes[{i}] is the class {p.__name__}: write {p.__name__}()")
        elif not isinstance(p, Pass):
            problems.append(f"passes[{i}] is a {type(p).__name__}, not a pass")
    valid = [p for p in passes if isinstance(p, Pass)]
    for i, later in enumerate(valid):
        for earlier in valid[:i]:
            if earlier.phase > later.phase:
                problems.append(
                    f"{later} ({later.phase.name}) comes after {earlier} ({earlier.phase.name})"
                )
                break
    if problems:
        order = " < ".join(p.name for p in Phase)
        raise OptionError(f"impossible passes: {'; '.join(problems)}. Phases run {order}")


@dataclass
class _Proposal:
    site: Site
    replacement: Replacement


@dataclass
class Engine:
    """One rewrite in progress.

    Args:
        capture: the model; mutated by `run`.
        options: how to decide.
        errors: what could not be priced, for the report.
        recipe: what was installed, for the store.
        cost: of the model as it is now.
        outputs: of the model as it is now, on the example inputs.
    """

    capture: Capture
    options: Options
    errors: list[str] = field(default_factory=list)
    recipe: Recipe = field(default_factory=Recipe)
    cost: GraphCost = field(default_factory=GraphCost)
    outputs: list[Any] | None = None

    def original(self) -> Step:
        """Prices the model as it came; the first step of the report."""
        start = time.perf_counter()
        self.cost = self._price()
        self.outputs = self._outputs()
        seconds = time.perf_counter() - start
        return Step("original", self.cost.total, self.cost.total, [], None, True, seconds, [])

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
        decisions: list[Decision] = []
        proposals: list[_Proposal] = []
        notes: list[str] = []
        matching = [s for s in sites if s.kind in rewrite.matches]
        self._check_patterns(rewrite, matching)
        if not matching:
            kinds = ", ".join(_kind_name(k) for k in rewrite.matches)
            notes.append(f"nothing to do: the model has no site of kind {kinds}")
            warnings.warn(f"{rewrite}: {notes[-1]}", RewriteWarning, stacklevel=4)
        for site in matching:
            answer = self._propose(rewrite, site)
            if isinstance(answer, Skip):
                decisions.append(_decision(site, "skipped", answer.reason))
            else:
                proposals.append(_Proposal(site, answer))
        proposals = self._untie(rewrite, proposals, matching, decisions)
        proposals = [p for p in proposals if not self._declined(p, decisions)]
        looks = [_decision(p.site, "replaced", p.replacement.note) for p in proposals]
        for proposal in proposals:
            self._install(rewrite, proposal)
        self.cost = self._price()
        check(self.capture, bound, [p.site.fqn for p in proposals], str(rewrite))
        self.capture.host()
        error = self._compare(rewrite, bool(proposals), notes)
        after_nodes = self._site_costs()
        for p, look in zip(proposals, looks, strict=True):
            layer, kernel = p.replacement.layer, "torch"
            if isinstance(layer, Layer) and look.tokens is not None:
                kernel = layer.kernel(look.tokens)
            decisions.append(
                replace(
                    look,
                    error=p.replacement.error,
                    kernel=kernel,
                    before=before_nodes.get(look.site),
                    after=after_nodes.get(look.site),
                )
            )
        order = {site.fqn: i for i, site in enumerate(matching)}
        decisions.sort(key=lambda d: order[d.site])
        seconds = time.perf_counter() - start
        return Step(
            str(rewrite), before, self.cost.total, decisions, error, rewrite.exact, seconds, notes
        )

    def report(self, steps: list[Step]) -> Report:
        """The ledger of these steps."""
        capture = self.capture
        signature = next((str(r.signature) for r in capture.regions if not r.prefix), "")
        info = CaptureInfo(capture.rung, capture.seconds, capture.islands, capture.notes, signature)
        return Report(original_class(capture.root).__name__, info, steps, self.errors)

    def finish(self, report: Report, recipe: Recipe | None = None) -> None:
        """Hosts the final graphs; the root carries the report and the recipe."""
        recipe = self.recipe if recipe is None else recipe
        call = self.capture.call
        if call is not None:
            recipe.example = example_to_json(call.arguments)
        graph_only = tuple(n for n, i in recipe.installed.items() if i.graph_only)
        self.capture.host(graph_only if self._python_differs(graph_only) else ())
        state = self.capture.root.__dict__["_rewriter"]
        state.report, state.recipe = report, recipe

    def _python_differs(self, graph_only: tuple[str, ...]) -> bool:
        """Whether the Python forward, which other calls than the captured one run, goes past the
        places that were rewritten where the user's code calls a function."""
        if not graph_only or self.outputs is None:
            return bool(graph_only)
        root = self.capture.root
        graphs = [(r, r.graphs) for r in self.capture.regions]
        try:
            for region, _ in graphs:
                region.graphs = {}
            self.capture.host()
            error = relative_error(self._outputs() or [], self.outputs)
            return error is not None and error > tolerance(self.outputs)
        except Exception as error:  # the forward cannot use the new layers: it must not run
            self.capture.notes.append(
                f"calls unlike the captured one are refused: the Python forward of "
                f"{type(root).__name__} cannot use {', '.join(graph_only)} "
                f"({type(error).__name__}: {error})"
            )
            return True
        finally:
            for region, own in graphs:
                region.graphs = own

    def _outputs(self) -> list[Any] | None:
        call = self.capture.example
        return None if call is None else run_flat(self.capture.root, *call)

    # looking

    def _sites(self) -> list[Site]:
        """Called sites first; then layers that the captured forward never calls."""
        root = self.capture.root
        sites = find_sites(root, [(r.prefix, g) for r, _, g in self.capture.graphs()])
        seen = {id(s.module) for s in sites if s.module is not None}
        for fqn, module in root.named_modules():
            kind = kind_of(module) if is_leaf(module) else None
            if kind is not None and id(module) not in seen:
                sites.append(Site(kind, fqn, root))
        return sites

    def _site_costs(self) -> dict[str, Cost]:
        """Cost of each named layer over its calls in the graphs that were priced (eval)."""
        costs: dict[str, Cost] = {}
        for site in find_sites(
            self.capture.root, [(r.prefix, g) for r, m, g in self.capture.graphs() if not m]
        ):
            own = [self.cost.nodes[n] for n in site.nodes if n in self.cost.nodes]
            if own:
                total = sum(own[1:], own[0])  # a layer called twice is stored once
                costs[site.fqn] = replace(
                    total, params=own[0].params, param_bytes=own[0].param_bytes
                )
        return costs

    def _check_patterns(self, rewrite: Pass, matching: list[Site]) -> None:
        for where in (self.options.where, rewrite.where):
            if isinstance(where, str) and matching:
                names = [s.fqn for s in matching]
                if not fnmatch.filter(names, where):
                    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
                    raise OptionError(
                        f"{rewrite}: where={where!r} matches none of its {len(names)} sites: "
                        f"{shown}"
                    )

    def _propose(self, rewrite: Pass, site: Site) -> Replacement | Skip:
        for where in (self.options.where, rewrite.where):
            if isinstance(where, str) and not fnmatch.fnmatch(site.fqn, where):
                return Skip("not selected by where={!r}", where)
            if callable(where) and not where(site):
                return Skip("not selected by where")
        if not site.nodes:
            for island in self.capture.islands:
                if site.fqn in island.layers and self.capture.rung == "symbolic":
                    return Skip("inside {}: {}", island.fqn, island.reason)
            return Skip("not called with these example_inputs")
        refusal = self._unsafe(site)
        if refusal is not None:
            return refusal
        try:
            with torch.enable_grad():  # views of parameters must keep their requires_grad
                answer = rewrite.propose(site)
        except RewriteError:
            raise
        except Exception as error:
            raise PassError(
                f"{rewrite} failed on {site.fqn} ({_kind_name(site.kind)}, "
                f"{site.where or 'unknown line'}): {type(error).__name__}: {error}"
            ) from error
        if not isinstance(answer, Replacement | Skip):
            raise PassError(
                f"{rewrite}.propose returned a {type(answer).__name__} for {site.fqn}: return "
                "Replacement(layer) or Skip(reason)"
            )
        return answer

    def _unsafe(self, site: Site) -> Skip | None:
        """What keeps the engine itself from replacing a site, whatever the pass."""
        module = site.module
        if module is not None and parametrize.is_parametrized(module):
            return Skip("its parameters are parametrized; remove_parametrizations first")
        if site.weight_ref is None and site.kind == LINEAR:
            return Skip("its weight is computed in a hook (torch.nn.utils); remove it first")
        if any(n.op != "call_module" for n in site.nodes):
            by_graph = {id(g): r for r, _, g in self.capture.graphs()}
            regions = {by_graph[id(n.graph)].prefix: by_graph[id(n.graph)] for n in site.nodes}
            for region in regions.values():
                if region.signature is not None and True not in region.graphs:
                    return Skip("called as a function, and train mode is not captured")
        return None

    # deciding

    def _untie(
        self,
        rewrite: Pass,
        proposals: list[_Proposal],
        matching: list[Site],
        decisions: list[Decision],
    ) -> list[_Proposal]:
        """One weight under several names: all of its users are rewritten, or none."""
        root = self.capture.root
        users: dict[int, set[str]] = {}
        for name, parameter in root.named_parameters(remove_duplicate=False):
            users.setdefault(id(parameter), set()).add(name)
        readers: dict[int, set[str]] = {}
        for region, _, graph in self.capture.graphs():
            owner = root.get_submodule(region.prefix)
            for node in graph.nodes:
                if node.op == "get_attr":
                    tensor = _attribute(owner, str(node.target))
                    readers.setdefault(id(tensor), set()).add(_end_use(node))
        kept: list[_Proposal] = []
        shared: dict[tuple[int, int], list[_Proposal]] = {}
        for p in proposals:
            if p.site.weight_ref is None:
                kept.append(p)
                continue
            bias = p.site.bias
            stored = _attribute(root, p.site.weight_ref)
            shared.setdefault((id(stored), id(bias) if bias is not None else 0), []).append(p)
        for (weight, _), group in shared.items():
            own = {_tensor_names(p.site)[0] for p in group}
            own |= {a for p in group for a in self._aliases(p.site)}
            others = users.get(weight, set()) - own | {
                o for p in group for o in self._owner(p.site)
            }
            nodes = {n.name for p in group for n in p.site.nodes}
            reading = readers.get(weight, set()) - nodes
            if others or reading or len({p.site.transposed for p in group}) > 1:
                tied = ", ".join(sorted(others)) or "code that reads it"
                reason = f"its weight is tied to {tied}: rewritten together or not at all"
                for p in group:
                    decisions.append(_decision(p.site, "skipped", reason))
                continue
            for p in group[1:]:  # one layer for all, so that the tie survives
                p.replacement = Replacement(
                    group[0].replacement.layer, p.replacement.error, "tied to " + group[0].site.fqn
                )
            kept += group
        order = {id(p): i for i, p in enumerate(proposals)}
        return sorted(kept, key=lambda p: order[id(p)])

    def _owner(self, site: Site) -> list[str]:
        """The layer that owns the weight of a functional call, where that is another layer (an
        embedding's weight, used as the head)."""
        holder, _, _ = (site.weight_ref or "").rpartition(".")
        module = self.capture.root.get_submodule(holder)
        return [holder] if site.fqn == site.weight_ref and is_leaf(module) else []

    def _aliases(self, site: Site) -> list[str]:
        """Every name of the site's weight that comes from the module itself having many names."""
        module = site.module
        if module is None or site.weight_ref is None:
            return []
        last = site.weight_ref.rpartition(".")[2]
        root = self.capture.root
        return [f"{n}.{last}" for n, m in root.named_modules(remove_duplicate=False) if m is module]

    def _declined(self, p: _Proposal, decisions: list[Decision]) -> bool:
        error, limit = p.replacement.error, self.options.max_error
        reason = ""
        if limit is not None and error is not None and not error <= limit:
            reason = f"error {error:.3g} is above max_error {limit:.3g}"
        elif self.options.objective is not None:
            reason = self._no_better(p)
        if reason:
            decisions.append(_decision(p.site, "declined", reason, error=error))
        return bool(reason)

    def _no_better(self, p: _Proposal) -> str:
        """Why the objective speaks against a replacement, with figures; "" where it does not."""
        old: list[Any] = [p.site.module] if p.site.module is not None else []
        if not old and p.site.weight_ref is not None:
            old = [t for t in (p.site.weight, p.site.bias) if t is not None]
        before, after = storage_cost(*old), storage_cost(p.replacement.layer)
        if self.options.objective == "params" and after.params >= before.params:
            return f"{after.params} parameters are no fewer than {before.params}"
        if self.options.objective == "memory" and after.param_bytes >= before.param_bytes:
            return f"{after.param_bytes} bytes are no fewer than {before.param_bytes}"
        if self.options.objective == "latency":
            times = self._timed(p)
            if times is None:
                return "its latency cannot be measured here: no data, or no shapes"
            if times[1] >= times[0]:
                old_us, new_us = times[0] * 1e6, times[1] * 1e6
                return f"measured {new_us:.0f} µs, the layer it replaces {old_us:.0f} µs"
        return ""

    def _timed(self, p: _Proposal) -> tuple[float, float] | None:
        """Median seconds of one call of (the old layer, the new one), interleaved."""
        site, layer = p.site, p.replacement.layer
        tokens = site.tokens
        if tokens is None or site.weight_ref is None or site.weight.is_meta:
            return None
        weight, bias = site.weight, site.bias
        x = torch.randn(tokens, site.in_features, device=weight.device).to(weight.dtype)
        calls: tuple[Callable[[], Tensor], ...] = (
            lambda: torch.nn.functional.linear(x, weight, bias),
            lambda: layer(x),
        )
        times: tuple[list[float], list[float]] = ([], [])
        with torch.no_grad():
            for i in range(13):
                for call, own in zip(calls, times, strict=True):
                    start = time.perf_counter()
                    call()
                    if x.is_cuda:
                        torch.cuda.synchronize()
                    if i >= 3:
                        own.append(time.perf_counter() - start)
        return statistics.median(times[0]), statistics.median(times[1])

    # mutating

    def _install(self, rewrite: Pass, p: _Proposal) -> None:
        site = p.site
        own = self.recipe.installed.setdefault(
            site.fqn, Installed(site.weight_ref, site.bias_ref, site.transposed)
        )
        own.chain.append((site.kind, rewrite))
        own.graph_only |= any(n.op != "call_module" for n in site.nodes)
        self._put(site, p.replacement.layer)

    def place(self, layers: Mapping[str, nn.Module]) -> None:
        """Installs given layers at their names: a saved rewrite comes back.

        Raises:
            StoreError: the model has no site of such a name.
        """
        sites = {s.fqn: s for s in self._sites()}
        for name, layer in layers.items():
            if name not in sites:
                raise StoreError(
                    f"the recipe rewrites {name}, which {type(self.capture.root).__name__} does "
                    "not have: pass the model that was rewritten, and inputs that reach it"
                )
            self._put(sites[name], layer)
        self._price()

    def _put(self, site: Site, layer: nn.Module) -> None:
        root = self.capture.root
        prefixes = {id(g): r.prefix for r, _, g in self.capture.graphs()}
        layer.train(root.training if site.module is None else site.module.training)
        old = site.module
        for node in site.nodes:
            if node.op != "call_module":
                prefix = prefixes[id(node.graph)]
                _call_instead(node, site.fqn.removeprefix(f"{prefix}.") if prefix else site.fqn)
        if old is not None:
            _take_hooks(old, layer)
            for name, module in list(root.named_modules(remove_duplicate=False)):
                if module is old:
                    root.set_submodule(name, layer)
        else:
            owner, _, name = site.fqn.rpartition(".")
            holder = root.get_submodule(owner)
            if site.weight_ref == site.fqn:
                # The layer takes the weight's place, also for the Python code that reads it; a
                # bias stays where that code finds it, tied to the layer's.
                holder._parameters.pop(name)
                if isinstance(layer, Layer):
                    layer.stands_for_transposed = site.transposed
            if hasattr(holder, name):
                raise PassError(f"{site.fqn} exists already: cannot install a layer there")
            holder.add_module(name, layer)

    # checking

    def _price(self) -> GraphCost:
        root = self.capture.root
        regions = [r for r in self.capture.regions if r.leaves is not None]
        if len(regions) < len(self.capture.regions):
            return GraphCost(total=storage_cost(root))
        for region in regions:
            if True in region.graphs:
                trained = model_cost(
                    root, [(region.prefix, region.graphs[True], region.leaves or [])], training=True
                )
                self.errors += [e for e in trained.errors if e not in self.errors]
        result = model_cost(
            root, [(r.prefix, r.graphs[False], r.leaves or []) for r in regions], training=False
        )
        self.errors += [e for e in result.errors if e not in self.errors]
        return result

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
        kind=_kind_name(site.kind),
        action=action,
        reason=reason,
        where=site.where,
        tokens=site.tokens,
        shape=_shape(site),
        **more,
    )


def _shape(site: Site) -> str:
    try:
        return f"{site.in_features}→{site.out_features}"
    except AttributeError:  # no linear map: an activation, a convolution
        return ""


def _kind_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else kind.op or kind.__name__


def _tensor_names(site: Site) -> list[str]:
    return [r for r in (site.weight_ref, site.bias_ref) if r is not None]


def _attribute(root: nn.Module, fqn: str) -> Any:
    owner, _, name = fqn.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _end_use(node: fx.Node) -> str:
    """The node that uses a parameter, past the transposes in between."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if op_name(user) not in ("t", "permute", "transpose", "numpy_T"):
            return user.name
        node = user
    return node.name


def _take_hooks(old: nn.Module, new: nn.Module) -> None:
    for name, hooks in vars(old).items():
        if name.endswith("_hooks") or name.endswith(("_hooks_with_kwargs", "_hooks_always_called")):
            if hooks and isinstance(getattr(new, name, None), dict) and "state_dict" not in name:
                getattr(new, name).update(hooks)


def _call_instead(node: fx.Node, target: str) -> None:
    """Calls the module at `target` where `node` called a function; drops what fed its weight."""
    graph = node.graph
    index = 1 if op_name(node) == "addmm" else 0
    source = node.args[index] if len(node.args) > index else node.kwargs["input"]
    feeding = [a for a in node.all_input_nodes if a is not source]
    with graph.inserting_before(node):
        new = graph.create_node("call_module", target, (source,))
    new.meta = copy.copy(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    while feeding:
        dead = feeding.pop()
        if not dead.users:
            feeding += dead.all_input_nodes
            graph.erase_node(dead)
