"""What `rewrite` and `explain` refuse, and that a refusal leaves everything as it was."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rewriter import (
    ACTIVATION,
    LINEAR,
    Layer,
    OptionError,
    Pass,
    PassError,
    Phase,
    Replacement,
    RewriteError,
    RewriteWarning,
    RewrittenModule,
    SignatureError,
    Site,
    Skip,
    VerifyError,
    explain,
    export,
    from_pretrained,
    load,
    load_original,
    param_groups,
    plan_memory,
    remap_optimizer,
    rewrite,
    save,
)
from rewriter.base import as_parameter
from rewriter.passes import Densify, Monarch, MonarchLinear, Quadratic, TopK

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 64)
        self.act = nn.GELU()
        self.out = nn.Linear(64, 32)
        self.head = nn.Linear(32, 32)
        self.register_buffer("scale", torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(self.act(self.fc(x * self.scale))))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a rewrite must not touch."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = dict(vars(module))
        state[name] = (id(module), type(module), module.training, sorted(own))
        for key, value in own.items():
            if isinstance(value, dict | set):
                items = value.items() if isinstance(value, dict) else value
                state[f"{name}:{key}"] = (id(value), [str(i) for i in items])
    for name, tensor in model.state_dict(keep_vars=True).items():
        state[f"{name}="] = (id(tensor), tensor.requires_grad, tensor.tolist(), tensor._version)
    return state


def random_states() -> tuple[Any, ...]:
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]


# torch's own, at the import of what torch.compile needs
imports_dynamo = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


# the model


@imports_dynamo
@pytest.mark.parametrize("call", [rewrite, explain])
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP, "not the class MLP: build it first"),
        (lambda: None, "not a NoneType"),
        (lambda: torch.sin, "needs an nn.Module, not a builtin"),
        (lambda: torch.compile(MLP()), "compiled already.*_orig_mod"),
        (
            lambda: nn.DataParallel(MLP()),
            r"before wrapping for data parallelism \(pass model.module",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "0.weight has no shape yet"),
    ],
)
def test_models_that_are_refused(
    call: Callable[..., Any], build: Callable[[], Any], message: str
) -> None:
    with pytest.raises(RewriteError, match=message):
        call(build(), [Monarch()], X)


@imports_dynamo
def test_script_modules_are_refused() -> None:
    with pytest.raises(RewriteError, match="TorchScript"):
        rewrite(torch.jit.trace(MLP().eval(), X), [Monarch()], X)


@imports_dynamo
def test_a_model_compiled_in_place_is_refused() -> None:
    model = MLP()
    model.compile()
    with pytest.raises(RewriteError, match=r"model.compile\(\)"):
        rewrite(model, [Monarch()], X)


def test_wrappers_of_torch_distributed_are_told_by_name() -> None:
    for name, message in (
        ("DistributedDataParallel", "data parallelism"),
        ("FullyShardedDataParallel", "data parallelism"),
        ("FSDPModule", "before fully_shard"),
    ):
        wrapper = type(name, (MLP,), {"__module__": "torch.distributed.fsdp"})
        with pytest.raises(RewriteError, match=message):
            rewrite(wrapper(), [Monarch()], X)


def test_a_model_that_cannot_be_copied() -> None:
    model = MLP()
    model.__dict__["lock"] = torch.zeros(1, requires_grad=True) * 2  # not a leaf
    with pytest.raises(RewriteError, match="MLP cannot be copied .*inplace=True"):
        rewrite(model, [Monarch()], X)
    assert rewrite(model, [Monarch()], X, inplace=True) is model


# the options


@pytest.mark.parametrize("call", [rewrite, explain])
@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (Monarch(), r"must be a list: write \[Monarch\(nblocks=4\)\]"),
        (Monarch, "must be a list of passes"),
        ("monarch", "must be a list of passes, not 'monarch'"),
        (None, "must be a list of passes"),
        (7, "must be a list of passes"),
        ([Monarch], r"passes\[0\] is the class Monarch: write Monarch\(\)"),
        ([Monarch(), "x"], r"passes\[1\] is a str, not a pass"),
    ],
)
def test_passes_that_are_none(call: Callable[..., Any], passes: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call(MLP(), passes, X)


def test_all_problems_of_a_recipe_in_one_error() -> None:
    with pytest.raises(OptionError) as caught:
        rewrite(MLP(), [TopK(4), Monarch(), Quadratic, Quadratic()], X)
    text = str(caught.value)
    assert "Monarch(nblocks=4) (STRUCTURE) comes after TopK(k=4) (SPARSITY)" in text
    assert "Quadratic(neuron='new') (STRUCTURE) comes after TopK" in text
    assert "passes[2] is the class Quadratic" in text
    assert text.endswith("Phases run STRUCTURE < SPARSITY < PRECISION")


@pytest.mark.parametrize("call", [rewrite, explain])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "speed"}, "objective='speed': use None or one of .*'latency'"),
        ({"max_error": -0.1}, "max_error=-0.1"),
        ({"max_error": float("nan")}, "max_error=nan"),
        ({"max_error": "small"}, "max_error='small'"),
        ({"where": ["fc"]}, r"where=\['fc'\]: use a name pattern"),
        ({"where": "nothing.*"}, r"where='nothing.\*' matches none of its 3 sites: fc, out, head"),
        ({"memory_budget": "1 furlong"}, r"memory_budget=.1 furlong.: use bytes"),
        ({"device": "abacus"}, "unknown device"),
        ({"kernels": "triton"}, "kernels='triton'"),
    ],
)
def test_options_that_are_impossible(
    call: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    model = MLP()
    before = snapshot(model)
    with pytest.raises(OptionError, match=message):
        call(model, [Monarch()], X, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Monarch(nblocks=0), "nblocks"),
        (lambda: Monarch(nblocks=2.5), "nblocks"),
        (lambda: TopK(0), "k=0"),
        (lambda: TopK(1.5), "k=1.5"),
        (lambda: Quadratic(neuron="x"), "neuron='x'"),
    ],
)
def test_options_of_passes_are_checked_when_they_are_made(
    build: Callable[[], Pass], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        build()


def test_where() -> None:
    for passes, where in (
        ([Monarch(where="ou*")], None),
        ([Monarch()], "ou*"),
        ([Monarch(where=lambda s: s.in_features == 64)], None),
        ([Monarch()], lambda s: s.in_features == 64),
        ([Monarch(where="o*")], lambda s: s.fqn != "fc"),
    ):
        report = explain(MLP(), passes, X, where=where)
        assert [d.site for d in report.replaced] == ["out"]
        assert all(d.reason.startswith("not selected by where") for d in report.skipped)
    with pytest.raises(OptionError, match="where='x' matches none of its 3 sites"):
        rewrite(MLP(), [Monarch(where="x")], X)


def test_a_signature_is_enforced_where_asked() -> None:
    strict = rewrite(MLP(), [Monarch()], X, strict_signature=True)
    with pytest.raises(SignatureError, match="strict_signature"):
        strict(X.double())


# declining


def test_objectives_decline_with_figures() -> None:
    growing = explain(MLP(), [Quadratic()], X, objective="params")
    assert not growing.replaced
    assert {d.action for d in growing.decisions} == {"declined"}
    assert growing.decisions[0].reason == "6208 parameters are no fewer than 2112"
    memory = explain(MLP(), [Quadratic()], X, objective="memory")
    assert memory.decisions[0].reason == "24832 bytes are no fewer than 8448"
    for objective in ("params", "memory"):
        assert len(explain(MLP(), [Monarch()], X, objective=objective).replaced) == 3


def test_latency_is_measured_and_its_figures_are_the_reason() -> None:
    slow = explain(MLP(), [Stub(Slow)], X, objective="latency")
    assert not slow.replaced
    assert "measured" in slow.decisions[0].reason
    assert "µs" in slow.decisions[0].reason
    blind = explain(MLP(), [Monarch()], objective="latency")
    assert blind.decisions[0].reason == "its latency cannot be measured here: no data, or no shapes"


def test_max_error_declines_with_figures() -> None:
    report = explain(MLP(), [Monarch()], X, max_error=0.01)
    assert not report.replaced
    for decision in report.decisions:
        assert decision.action == "declined"
        assert decision.reason == f"error {decision.error:.3g} is above max_error 0.01"
    assert len(explain(MLP(), [Monarch()], X, max_error=1).replaced) == 3


def test_weights_that_are_not_finite_are_skipped() -> None:
    for value in (torch.nan, torch.inf):
        model = MLP()
        model.fc.weight.data[0, 0] = value
        for rewriting in (Monarch(), Quadratic()):
            report = explain(model, [rewriting], X)
            (skipped,) = report.skipped
            assert skipped.site == "fc"
            assert "hold NaN or inf" in skipped.reason


# what is left alone


def test_the_callers_model_and_the_random_state_are_untouched() -> None:
    model = MLP()
    model.out.eval()
    model.fc.weight.requires_grad_(False)
    handle = model.act.register_forward_hook(lambda *_: None)
    before, state = snapshot(model), random_states()
    for call in (rewrite, explain):
        call(model, [Monarch(), Densify()], X)
        assert snapshot(model) == before
        assert random_states() == state
    handle.remove()


def test_frozen_weights_stay_frozen_and_modes_stay() -> None:
    model = MLP()
    model.fc.requires_grad_(False)
    model.head.eval()
    for recipe in ([Monarch()], [Quadratic()], [TopK(8)], [Monarch(), Densify()]):
        optimized = rewrite(model, recipe, X)
        assert not any(p.requires_grad for p in optimized.fc.parameters())
        assert all(p.requires_grad for p in optimized.out.parameters())
        assert optimized.out.training
        assert not optimized.head.training


def test_explain_decides_as_rewrite_does() -> None:
    model = MLP()
    recipe = [Monarch(where="o*"), TopK(4)]
    dry = explain(model, recipe, X).to_dict()
    real = rewrite(model, recipe, X).report.to_dict()
    for a, b in zip(dry["steps"], real["steps"], strict=True):
        for key in ("name", "before", "after", "decisions", "output_error", "exact", "notes"):
            assert a[key] == b[key], key
    assert type(model) is MLP


def test_explain_takes_what_rewrite_takes() -> None:
    ours, theirs = (inspect.signature(f).parameters for f in (explain, rewrite))
    assert [n for n in theirs if n in ours] == list(ours)
    assert theirs.keys() - ours.keys() == {"inplace", "strict_signature"}
    assert all(ours[n].default == theirs[n].default for n in ours)


def test_a_model_on_meta() -> None:
    model = MLP().to("meta")
    optimized = rewrite(model, [Monarch()], X)
    assert all(p.is_meta for p in optimized.parameters())
    assert [d.error for d in optimized.report.replaced] == [None] * 3
    assert optimized.report.after.params < optimized.report.before.params
    assert any("on meta" in note for note in optimized.report.capture.notes)


# in place


def test_in_place_gives_the_same_object_back() -> None:
    model = MLP().eval()
    twin = copy.deepcopy(model)
    assert rewrite(model, [Monarch()], X, inplace=True) is model
    assert isinstance(model, RewrittenModule)
    assert isinstance(model.fc, MonarchLinear)
    assert torch.equal(model(X), rewrite(twin, [Monarch()], X)(X))


@dataclasses.dataclass(frozen=True)
class Stub(Pass):
    """Answers with `cls` around the weights; on the third site, does `third`."""

    matches = (LINEAR,)
    cls: Any = None
    third: Any = None
    claims: bool = False

    @property
    def exact(self) -> bool:
        return self.claims

    def propose(self, site: Site) -> Any:
        if self.third is not None and site.fqn == "head":
            return self.third(site)
        answer = self.cls(site) if self.cls is not None else Skip("no")
        return Replacement(answer, error=None) if isinstance(answer, nn.Module) else answer


class Own(Layer):
    """A linear layer, until a subclass spoils it."""

    op = "own"

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.weight = as_parameter(site.weight)
        self.bias = None if site.bias is None else as_parameter(site.bias)

    def config(self) -> dict[str, Any]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Slow(Own):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(200):
            x = x + 1e-9
        return super().forward(x)


class Wrong(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.01


class Wide(Own):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y, y], -1)


class Half(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


class Narrow(Own):
    """Its shape fits nobody: the model's next layer cannot take it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :3]


def stumble(site: Site) -> Any:
    site.weight.requires_grad_(False)
    raise ZeroDivisionError("third site")


def interrupt(site: Site) -> Any:
    raise KeyboardInterrupt


BROKEN: list[tuple[Pass, type[BaseException], str]] = [
    (
        Stub(Own, stumble),
        PassError,
        r"Stub\(.*failed on head \(linear, test_api.py:\d+\): ZeroDivisionError: third site",
    ),
    (Stub(Own, interrupt), KeyboardInterrupt, "^$"),
    (Stub(Own, lambda site: site.module), PassError, r"returned a Linear for head: return Repl"),
    (Stub(Own, lambda site: None), PassError, "returned a NoneType for head"),
    (Stub(Wrong, claims=True), VerifyError, "says it is exact, but"),
    (Stub(Wide, where="head"), VerifyError, "changed the type of"),
    (Stub(Half, where="head"), VerifyError, "changed the type of"),
    (Stub(Narrow, where="fc"), VerifyError, "changed the type of the result"),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("broken", "error", "message"), BROKEN)
def test_broken_passes_leave_the_model_as_it_was(
    broken: Stub, error: type[BaseException], message: str, inplace: bool
) -> None:
    model = MLP()
    model.out.eval()
    model.fc.bias.requires_grad_(False)
    model.act.register_forward_hook(lambda *_: None)
    model.fc.register_forward_pre_hook(lambda *_: None)
    before, state = snapshot(model), random_states()
    expected = model(X)
    with pytest.raises(error, match=message):
        rewrite(model, [Monarch(where="out"), broken], X, inplace=inplace)
    assert snapshot(model) == before
    assert random_states() == state
    assert torch.equal(model(X), expected)
    assert rewrite(model, [Monarch()], X, inplace=inplace).report.replaced


def test_a_pass_that_matches_nothing_warns_at_the_users_line() -> None:
    for call in (rewrite, explain):
        with pytest.warns(RewriteWarning, match="has no site of kind monarch_linear") as caught:
            call(MLP(), [Densify()], X)
        assert [w.filename for w in caught] == [__file__]


def test_an_activation_pass_of_the_users_own() -> None:
    class Gentle(Layer):
        op = "gentle"

        def config(self) -> dict[str, Any]:
            return {}

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.hardswish(x)

    @dataclasses.dataclass(frozen=True)
    class Soften(Pass):
        matches = (ACTIVATION,)
        phase = Phase.STRUCTURE

        def propose(self, site: Site) -> Replacement:
            return Replacement(Gentle(), error=None)

    optimized = rewrite(MLP(), [Soften()], X)
    assert isinstance(optimized.act, Gentle)
    assert optimized.report.steps[-1].output_error


def test_arguments_in_the_wrong_place_are_told(tmp_path: Path) -> None:
    model = MLP()
    optimized = rewrite(model, [Monarch()], X)
    adam = torch.optim.Adam(model.parameters())
    for call, message in (
        (
            lambda: load(model, tmp_path),
            "directory must be the path of a saved rewrite, not a MLP",
        ),
        (
            lambda: load(tmp_path, tmp_path),
            "model must be the original model, an nn.Module, not a ",
        ),
        (lambda: load(tmp_path, MLP), "model must be .* an nn.Module, not the class MLP"),
        (lambda: load(tmp_path, None), "not None"),
        (lambda: save(tmp_path, optimized), r"model must be a rewritten model, not a \w*Path"),
        (lambda: optimized.save(None), "directory must be a path, not None"),
        (
            lambda: save(optimized, tmp_path, 3),
            "state_dict must be tensors by name, or None, not 3",
        ),
        (
            lambda: optimized.load_original(model),
            "state_dict must be tensors by name .* not a MLP",
        ),
        (lambda: load_original({}, optimized), "model must be a rewritten model, not a dict"),
        (lambda: from_pretrained("there", MLP), "cls must be the model's class, not 'there'"),
        (lambda: from_pretrained(MLP, MLP), "directory must be .* a path, not the class MLP"),
        (lambda: plan_memory(X, model), "plan_memory needs an nn.Module, not a Tensor"),
        (lambda: plan_memory(model, [Monarch()], X), "memory_budget=a Tensor: use bytes as an int"),
        (lambda: explain([Monarch()], model, X), "explain needs an nn.Module, not a list"),
        (lambda: rewrite(model, X, [Monarch()]), "passes must be a list of passes, not a Tensor$"),
        (lambda: rewrite(model, [Monarch()], model), "example_inputs is a MLP; pass a tensor"),
        (lambda: export(X, [], model), "export needs an nn.Module, not a Tensor"),
        (lambda: export(model, X, []), "passes must be a list of .* texts, not a Tensor$"),
        (lambda: export(model, [], X, package=3), "package must be where to write, a path"),
        (lambda: param_groups(1e-3, optimized), "optimized must be a model, not 0.001"),
        (lambda: param_groups(optimized, "fast"), "lr='fast': use a number"),
        (lambda: remap_optimizer(model, optimized, adam), "optimizer must be a torch.optim.Opti"),
        (lambda: remap_optimizer(adam, None, optimized), "model must be the model before the rew"),
        (lambda: remap_optimizer(adam, model, 1), "optimized must be the model after the rewrite"),
    ):
        with pytest.raises(RewriteError, match=message):
            call()
    assert not list(tmp_path.iterdir())
