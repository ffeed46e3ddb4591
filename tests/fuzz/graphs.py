"""Random models × random recipes: what a rewrite promises, checked on each.

`check(seed)` makes a model (`models.Source`) and a recipe, rewrites, and compares with what the
model's own Python gives: outputs at the example, at other sizes and called in other ways, gradients
of weights and inputs, after save and load, pickle and deepcopy, after an attribute of a layer was
set, within a memory budget; the user's model must be as it was. A layer that was replaced is put
into a copy of the model at its place, whose Python forward then says what is right, lossy passes
included.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
import random
import re
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from closeness import ROUNDING
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fuzz.models import FORMS, Call, Source, drawn
from rewriter import RewrittenModule, load, rewrite, save
from rewriter.errors import RewriteError, RewriteWarning
from rewriter.passes import (
    Densify,
    Monarch,
    MonarchChain,
    MonarchResidual,
    Quadratic,
    Quantize,
    RemoveBlocks,
    ResizeMLP,
    TopK,
)

__all__ = ["Outcome", "check", "check_written", "describe", "kind"]


@dataclass
class Outcome:
    """What a case came to.

    Args:
        wrong: what did not hold, one line each; empty where all did.
        refused: refusals, by errors of this package.
        checks: how many comparisons were made.
        runs: the model runs by itself, so that there is something to compare with.
    """

    seed: int
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    checks: int = 0
    runs: bool = False


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""What passes replace one by one."""

SETTINGS = {"p": 0.3, "eps": 0.1, "momentum": 0.5, "negative_slope": 0.4, "alpha": 0.7}
"""Attributes of layers that a user sets between two steps, with other values than the example had.
"""


class _Case:
    def __init__(
        self,
        source: Source,
        recipe: tuple[list[Any], dict[str, Any]] | None = None,
        quick: bool = False,
    ) -> None:
        self.quick = quick
        self.outcome = Outcome(source.seed)
        self.source = source
        self.random = random.Random(source.seed + 10**6)
        self.model = self.source.model()
        self.call = self.source.call(self.source.rows)
        self.buffers = dict(self.model.named_buffers())
        self.passes, self.options = recipe or (self._passes(), self._options())
        self.changed = self.random.random() < 0.25
        if quick:
            self.options.pop("memory_budget", None)

    def _passes(self) -> list[Any]:
        pick = self.random
        if pick.random() < 0.25:
            return []
        structure: list[Any] = pick.choices(
            (
                [],
                [Monarch(nblocks=pick.choice((1, 2, 3, 4, "sqrt")))],
                [MonarchChain(order=pick.choice((2, 3)))],
                [MonarchResidual(nblocks=2, share=0.3)],
                [Quadratic()],
                [Monarch(nblocks=2), Densify()],
                [ResizeMLP(keep=pick.choice((0.25, 0.5)))],
                [RemoveBlocks(where=pick.choice(("*1*", "*")))],
            ),
            (3, 4, 1, 1, 1, 1, 1, 0.5),
        )[0]
        sparsity = [TopK(k=pick.choice((2, 0.5)))] if pick.random() < 0.15 else []
        precision = [Quantize("int8-dynamic")] if pick.random() < 0.5 else []
        return [*structure, *sparsity, *precision]

    def _options(self) -> dict[str, Any]:
        pick = self.random
        options: dict[str, Any] = {"lower": pick.random() < 0.7}
        if pick.random() < 0.15:
            options["max_error"] = 0.5
        if pick.random() < 0.1:
            options["objective"] = pick.choice(("params", "memory"))
        if pick.random() < 0.1:
            options["where"] = pick.choice(("*l*", lambda site: len(site.fqn) % 2 == 0))
        if pick.random() < 0.06:  # the dearest to make
            options["memory_budget"] = pick.choice((0.5, 0.8, 1.0))
        if pick.random() < 0.1:
            options["calibration"] = [self.source.call(self.source.rows, i).example for i in (1, 2)]
        return options

    # running

    def run(self) -> Outcome:
        try:
            self._alone(self.model, self.call)
        except Exception:  # noqa: BLE001 (the model does not run by itself: no case)
            return self.outcome
        self.outcome.runs = True
        before = _state(self.model)
        optimized = self._refusable("rewrite", self._rewrite)
        self._same("the user's model was changed", _state(self.model), before, exact=True)
        if optimized is None:
            return self.outcome
        reference = self._reference(optimized)
        if reference is not None:
            self._same("as the user's model", *map(_kept, (optimized, reference)), exact=True)
            reference.eval()
        self._calls(optimized.eval(), reference)
        self._training(optimized, reference)
        if not self.quick or self.outcome.seed % 2:
            self._stored(optimized)
        return self.outcome

    def _rewrite(self) -> nn.Module:
        return rewrite(self.model, self.passes, self.call.example, **self.options)

    def _reference(self, optimized: nn.Module) -> nn.Module | None:
        """The original with the replaced layers in place, where they say all of it."""
        reference = copy.deepcopy(self.model)
        names = dict(reference.named_modules(remove_duplicate=False))
        report = RewrittenModule.report.__get__(optimized)  # the model may have its own `report`
        replaced = {d.site for step in report.steps for d in step.decisions
                    if d.action == "replaced"}  # fmt: skip
        if not all(isinstance(names.get(site), LAYERS) for site in replaced):
            return None
        if any(isinstance(p, ResizeMLP | RemoveBlocks) for p in self.passes):
            return None
        if any(isinstance(p, Quantize) for p in self.passes):
            # a graph quantizes the input of such a product, Python does not
            if re.search(r"self\.l\d[^ ]*\.weight", "\n".join(self.source.body)):
                return None
        shared = {names[site] for site in replaced}
        memo: dict[int, Any] = {}
        for name, module in names.items():
            if module in shared:
                new = copy.deepcopy(optimized.get_submodule(name), memo)
                reference.set_submodule(name, new)
        return reference

    def _alone(self, model: nn.Module, call: Call) -> Any:
        """What a call gives, and its arguments as it leaves them."""
        torch.manual_seed(1)
        call = copy.deepcopy(call)
        return _plain(model(*call.args, **call.kwargs)), [*call.args, call.kwargs]

    def _calls(self, optimized: nn.Module, reference: nn.Module | None) -> None:
        """Outputs at other sizes, and at the arguments of another call form."""
        make, rows, time = self.source.call, self.source.rows, self.source.time
        for other in (rows + 3, 1) if self.quick else (rows, rows + 3, 1, 2):
            self._eval(optimized, reference, f"with {other} rows", make(other, seed=5))
        if self.random.random() < 0.3:
            self._eval(optimized, reference, "of a longer time", make(rows, seed=6, time=time + 2))
        if self.random.random() < 0.1:
            self._eval(optimized, reference, "with no rows", make(0, seed=6))
        if self.quick and self.outcome.seed % 2:
            return
        form = self.random.choice(FORMS)
        call = make(rows, seed=5, form=form)
        if (len(call.args), [*call.kwargs]) != (len(self.call.args), [*self.call.kwargs]):
            self._eval(optimized, reference, f"of form {form!r}", call)

    def _eval(
        self, optimized: nn.Module, reference: nn.Module | None, what: str, call: Call
    ) -> None:
        with torch.no_grad():
            try:
                want = self._alone(self.model if reference is None else reference, call)
            except Exception:  # noqa: BLE001 (no call that the model takes)
                return
            found = self._refusable(f"call {what}", self._alone, optimized, call)
        if found is not None and reference is not None:
            self._same(f"output {what}", found, want)

    def _training(self, optimized: nn.Module, reference: nn.Module | None) -> None:
        if reference is None:
            self.changed = False
            return
        reference.train(), optimized.train()  # noqa: B018
        self._step("training step", optimized, reference)
        if self.changed:
            for model in (optimized, reference):
                _set(model)
            self._step("training step after settings", optimized, reference)
        reference.eval(), optimized.eval()  # noqa: B018
        if self.random.random() < 0.2:
            self._step("step in eval mode", optimized, reference)

    def _step(self, what: str, optimized: nn.Module, reference: nn.Module) -> None:
        want = self._gradients(reference)
        if want is None:
            return
        found = self._refusable(what, self._gradients, optimized, raising=True)
        if found is not None:
            self._same(what, found, want)

    def _gradients(self, model: nn.Module, *, raising: bool = False) -> Any:
        """(outputs, loss, gradients by name and of the inputs, buffers) of a step; None where it
        fails."""
        model, call = copy.deepcopy(model), copy.deepcopy(self.call)
        inputs = [t for t in pytree.tree_leaves((call.args, call.kwargs))
                  if isinstance(t, Tensor) and t.is_floating_point()]  # fmt: skip
        try:
            torch.manual_seed(1)
            for tensor in inputs:
                tensor.requires_grad_()
            output = _plain(model(*call.args, **call.kwargs))
            leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
            loss = sum(t.float().square().mean() for t in leaves)
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                return None
            loss.backward()
        except Exception:  # noqa: BLE001
            if raising:
                raise
            return None
        grads = {n: p.grad for n, p in model.named_parameters()}
        buffers = {n: b for n, b in model.named_buffers() if n in self.buffers}
        return leaves, loss, grads, [t.grad for t in inputs], buffers

    def _stored(self, optimized: nn.Module) -> None:
        call = self.source.call(self.source.rows, seed=9)
        with torch.no_grad():
            want = self._refusable("call", self._alone, optimized, call)
            if want is None:
                return
            copied = copy.deepcopy(optimized)
            self._same("deepcopy", self._alone(copied, call), want, exact=True)
            thawed = None
            if "weight_norm" not in self.source.text:  # torch refuses to pickle those
                thawed = self._refusable("pickle", lambda: pickle.loads(pickle.dumps(optimized)))
            if thawed is not None:
                self._same("pickle", self._alone(thawed, call), want, exact=True)
            with tempfile.TemporaryDirectory() as directory:
                kind = self.random.random() < 0.2
                again = self._refusable("save and load", self._reload, optimized, directory, kind)
            if again is not None:
                found = self._refusable("call after load", self._alone, again.eval(), call)
                if found is not None:
                    self._same("after load", found, want, exact=True)
                self._same("state after load", again.state_dict(), optimized.state_dict(), True)

    def _reload(self, optimized: nn.Module, directory: str, with_inputs: bool) -> nn.Module:
        save(optimized, directory)  # the model may have a `save` of its own
        fresh = self.source.model()
        for model in (fresh,) if self.changed else ():
            _set(model)
        inputs = {"example_inputs": self.call.example} if with_inputs else {}
        return load(directory, fresh, **inputs)

    # judging

    def _refusable(self, what: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        """The result; None where this package refuses, which is counted, or fails, which is
        wrong."""
        try:
            return call(*args, **kwargs)
        except RewriteError as error:
            self.outcome.refused.append(f"{what}: {type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001 (whatever it is, it is a finding)
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{last.filename.rsplit('/', 1)[-1]}:{last.name}"
            text = " ".join(str(error).split())[:160]
            self.outcome.wrong.append(f"{what}: {type(error).__name__}: {text} ({place})")
        return None

    def _same(self, what: str, found: Any, want: Any, exact: bool = False) -> None:
        self.outcome.checks += 1
        a, left = pytree.tree_flatten(found)
        b, right = pytree.tree_flatten(want)
        if left != right:
            self.outcome.wrong.append(f"{what}: another structure")
            return
        for x, y in zip(a, b, strict=True):
            if isinstance(x, Tensor) and isinstance(y, Tensor):
                problem = _differs(x, y, 0.0 if exact else ROUNDING[self.source.dtype])
                if problem:
                    self.outcome.wrong.append(f"{what}: {problem}")
                    return
            elif type(x) is not type(y) or (not isinstance(x, Tensor) and x != y):
                self.outcome.wrong.append(f"{what}: {type(x).__name__} for {type(y).__name__}")
                return


def _plain(output: Any) -> Any:
    """An output as containers that pytree looks into, with the names of its classes."""
    if dataclasses.is_dataclass(output):
        fields = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
        return type(output).__name__, _plain(fields)
    if isinstance(output, dict):
        return type(output).__name__, [(key, _plain(value)) for key, value in output.items()]
    if isinstance(output, tuple | list):
        return type(output).__name__, [_plain(value) for value in output]
    return output


def _set(model: nn.Module) -> None:
    """Sets what layers read at each call, as a user does between two epochs."""
    for module in model.modules():
        for name, value in SETTINGS.items():
            if isinstance(vars(module).get(name), float):
                setattr(module, name, value)


def _kept(model: nn.Module) -> Any:
    """What a rewritten model has as the original with the new layers in its place has it."""
    return {
        "keys": sorted(model.state_dict()),
        "training": {n: m.training for n, m in model.named_modules()},
        "trained": {n: p.requires_grad for n, p in model.named_parameters()},
        "hooks": {n: len(m._forward_hooks) for n, m in model.named_modules()},
    }


def _differs(found: Tensor, want: Tensor, tolerance: float) -> str:
    if found.dtype != want.dtype or found.shape != want.shape:
        return f"{found.dtype}{list(found.shape)} in place of {want.dtype}{list(want.shape)}"
    if not want.numel():
        return ""
    a, b = found.detach().double(), want.detach().double()
    if not torch.equal(a.isnan(), b.isnan()):
        return "NaN in other places"
    a, b = a.nan_to_num(), b.nan_to_num()
    off, scale = (a - b).abs().max().item(), max(b.abs().max().item(), 1e-30)
    return f"off by {off / scale:.3g} of the largest value" if off > tolerance * scale else ""


def _state(model: nn.Module) -> Any:
    """What a rewrite must leave as it is."""
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "modules": {n: str(type(m)) for n, m in model.named_modules(remove_duplicate=False)},
        "training": [m.training for m in model.modules()],
        "trained": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad is None for p in model.parameters()],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewriteWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def check(seed: int, quick: bool = False) -> Outcome:
    """One case, of this seed; quick ones have no memory budget, fewer sizes, and are called in
    another form or stored, by turns."""
    with _quiet():
        return _Case(drawn(seed), quick=quick).run()


def check_written(source: Source, passes: list[Any], **options: Any) -> Outcome:
    """The same of a model that is given, with this recipe."""
    with _quiet():
        return _Case(source, (passes, options)).run()


def kind(refusal: str) -> str:
    """A refusal without names and figures, to count its like."""
    text = re.sub(r"[\w.]*\d[\w.%,]*", "…", refusal.partition(": ")[2])
    return re.sub(r"'[^']*'", "'…'", text)[:160]


def describe(seed: int) -> str:
    """The case in words: the recipe and the model's source."""
    case = _Case(drawn(seed))
    call = pytree.tree_map_only(
        Tensor, lambda t: (t.dtype, tuple(t.shape)), [*case.call.args, case.call.kwargs]
    )
    return f"passes {case.passes}, options {case.options}, called with {call}\n{case.source.text}"
