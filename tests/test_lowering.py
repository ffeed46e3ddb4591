"""Lowering: fused ops on the eval graph that compute the same, and never get stale."""

from __future__ import annotations

import copy
import inspect
import json
import pathlib
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_reordered
from torch import Tensor, nn

import rewriter
from rewriter import explain, load, rewrite
from rewriter.engine.engine import Engine
from rewriter.errors import OptionError, RewriteWarning, VerifyError
from rewriter.kernels import linear_act as kernel
from rewriter.lowering import DEFAULT_RULES, Fused, Place, Rule, conv_chains, fused
from rewriter.modules.patterns import batch_norm, conv, linear, op, relu
from rewriter.passes import Monarch


@pytest.fixture(autouse=True, scope="module")
def _always_faster() -> Iterator[None]:
    """No test goes by a time: the fused op counts as the faster one."""

    def last(key: str, version: str, candidates: Any, lead: float = 0.0) -> str:
        return list(candidates())[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "fastest", last)
        patch.setattr(fused, "fastest", last)
        patch.setattr(conv_chains, "fastest", last)
        yield


class Net(nn.Module):
    """Every default rule has a place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.wide, self.norm3 = nn.ConvTranspose2d(8, 6, 3, groups=2), nn.BatchNorm2d(6)
        self.q, self.k, self.v = (nn.Linear(6, n, bias=n > 5) for n in (6, 6, 6))
        self.up, self.act, self.down = nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = self.norm2(self.depthwise(x))
        x = self.norm3(self.wide(x)).mean((2, 3))
        x = self.q(x) * self.k(x) + self.v(x)
        return self.down(self.act(self.up(x)))


def trained(model: nn.Module, *shape: int) -> nn.Module:
    """With statistics and scales that are not those of a new batch norm."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    model.train()
    with torch.no_grad():
        model(torch.randn(*shape))
    return model.eval()


def plain(model: nn.Module) -> dict[str, Any]:
    form: Any = vars(model)["_rewriter"].forms[0]
    return vars(form)


def fused_calls(model: nn.Module) -> int:
    """How many fused ops the last call ran."""
    bound = plain(model)["lowered"]._bound
    return 0 if bound is None or bound.made is None else len(bound.applications)


def derived_tensors(model: nn.Module) -> list[Tensor]:
    """What the functions in the places of the last call hold."""
    held = [inspect.getclosurevars(f).nonlocals for f in plain(model)["lowered"]._bound.made.ready]
    found = [t for own in held for t in own.get("rest", ()) if isinstance(t, Tensor)]
    assert found
    return found


def assert_as_unlowered(model: nn.Module, x: Tensor, calls: int) -> None:
    """The lowered program runs, with so many fused ops, and computes what the plain one does."""
    state = vars(model)["_rewriter"]
    lowered = state.lowered
    with torch.no_grad():
        actual = model(x)
        state.lowered = None
        expected = model(x)
        state.lowered = lowered
    assert fused_calls(model) == calls
    assert_reordered(actual, expected)


@pytest.fixture(autouse=True, scope="module")
def _calls_are_not_timed() -> Iterator[None]:
    """These models are so small that the check for changed weights is what a call takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewriter.engine.engine._SHORT_CALL", 0.0)
        yield


@pytest.fixture(scope="module")
def _rewritten() -> nn.Module:
    return rewrite(trained(Net(), 8, 3, 12, 12), [], torch.randn(4, 3, 12, 12))


@pytest.fixture
def model(_rewritten: nn.Module) -> nn.Module:
    return copy.deepcopy(_rewritten)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_every_default_rule_has_its_place(model: Any, x: Tensor) -> None:
    step = model.report.steps[-1]
    assert step.name == "lowering"
    assert {(d.site, d.kind) for d in step.decisions if d.action == "lowered"} == {
        ("conv", "conv >> batch_norm >> relu"),
        ("depthwise", "conv >> batch_norm"),
        ("wide", "conv_transpose >> batch_norm"),
        ("q", "fan(linear)"),
        ("up", "linear >> gelu"),
    }
    assert_as_unlowered(model, x, 5)


def test_launches_and_traffic_are_listed_before_and_after(model: Any) -> None:
    step = model.report.steps[-1]
    assert step.before.launches - step.after.launches == 1 + 1 + 1 + 2 + 1
    assert step.after.bytes_moved < step.before.bytes_moved
    assert (step.after.flops, step.after.params) == (step.before.flops, step.before.params)
    assert step.after.train_peak_bytes == step.before.train_peak_bytes
    for decision in step.decisions:
        figures = re.search(r"launches (\d+) → (\d+), traffic (\S+) k?B → \S+ k?B", decision.reason)
        assert figures is not None
        launches, fewer = map(int, figures.groups()[:2])
        assert fewer < launches
    assert "launches" in str(step.notes)
    assert "lowered" in model.report.to_markdown()
    assert rewriter.Report.from_dict(model.report.to_dict()).steps[-1].decisions == step.decisions


def test_the_outputs_are_as_before_up_to_rounding(model: Any) -> None:
    step = model.report.steps[-1]
    assert step.exact
    assert 0 < step.output_error < 1e-5
    assert "as before up to rounding" in str(model.report)


class Mixes(nn.Module):
    """A place for a fused op, then attention with dropout, off or on."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.conv, self.norm, self.dropout = nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), dropout

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).unsqueeze(1)  # one head, as a fused kernel of torch's wants it
        return nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=self.dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_outputs_error_is_that_of_runs_with_fused_ops(dropout: float) -> None:
    made: Any = rewrite(trained(Mixes(dropout), 8, 4, 12), [], torch.randn(4, 4, 12))
    step = made.report.steps[-1]
    assert step.name == "lowering"
    if dropout:  # its runs for comparison are looked at op by op, which keeps them unfused
        assert step.output_error is None
        assert "lowering" in str(made.report)
    else:  # attention without dropout draws nothing, whatever torch's tag of it says
        assert 0 < step.output_error < 1e-5


def test_the_peak_counts_the_derived_weights(model: Any) -> None:
    cost = model.report.steps[-1].after
    (said,) = re.findall(
        r"([\d.]+) kB of derived weights are kept", str(model.report.steps[-1].notes)
    )
    held = cost.peak_bytes - cost.param_bytes - cost.activation_bytes
    assert held == pytest.approx(float(said) * 1e3, rel=0.01)


def test_the_report_names_rule_layers_and_fused_op(model: Any) -> None:
    shown = " ".join(str(model.report).split())
    assert "conv >> batch_norm >> relu of conv, norm, relu → conv_act, differs by" in shown
    assert "fan(linear) of q, k, v → joined_linear, " in shown
    assert re.search(r"keeps [\d.]+ k?B of derived weights; launches", shown)


def test_the_costs_at_other_sizes_are_those_of_the_lowered_graph(model: Any) -> None:
    report = explain(trained(Net(), 8, 3, 12, 12), [], torch.randn(4, 3, 12, 12))
    other = report.at(batch=9)
    first, last = other.steps[0].after, other.steps[-1].after
    assert first.launches - last.launches == 6
    assert last.bytes_moved < first.bytes_moved


def test_module_tree_and_state_dict_know_nothing_of_it(model: Any, x: Tensor) -> None:
    before = list(model.state_dict()), [n for n, _ in model.named_modules()]
    assert_as_unlowered(model, x, 5)
    assert (list(model.state_dict()), [n for n, _ in model.named_modules()]) == before


CHANGES: dict[str, Callable[[Any], object]] = {
    "a checkpoint": lambda m: m.load_state_dict({
        k: v * 1.5 if v.is_floating_point() else v for k, v in m.state_dict().items()
    }),
    "a checkpoint, assigned": lambda m: m.load_state_dict(
        {k: v + 1 for k, v in m.state_dict().items()}, assign=True
    ),
    "a write in place": lambda m: m.up.weight.requires_grad_(False).mul_(2),
    "a write through data": lambda m: m.conv.weight.data.mul_(2),
    "other data": lambda m: setattr(m.conv.weight, "data", torch.randn(8, 3, 3, 3)),
    "a bias through data": lambda m: m.q.bias.data.add_(1),
    "another Parameter": lambda m: setattr(m.k, "weight", nn.Parameter(torch.randn(6, 6))),
    "running statistics": lambda m: m.norm.running_mean.add_(1),
    "running statistics through data": lambda m: m.norm3.running_var.data.mul_(2),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    "another layer": lambda m: m.set_submodule("norm2", trained(nn.BatchNorm2d(8), 4, 8, 5, 5)),
    "another layer below the root": lambda m: m._modules.update(down=nn.Linear(32, 4)),
    "one bias less": lambda m: setattr(m.up, "bias", None),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_noticed_at_the_next_call(change: str, model: Any, x: Tensor) -> None:
    assert_as_unlowered(model, x, 5)
    with torch.no_grad():
        before = model(x)
        CHANGES[change](model)
    assert_as_unlowered(model, x, 5)
    with torch.no_grad():
        assert not torch.allclose(model(x), before)


class Adapted(nn.Module):
    """As an adapter stands around a layer, whose weight it shows."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 2 * self.base_layer(x) + x
        return y


Adapted.__name__ = "Linear"  # as PEFT's class is called


def test_a_layer_that_computes_more_is_not_taken_for_what_its_class_is_called(
    model: Any, x: Tensor
) -> None:
    assert_as_unlowered(model, x, 5)
    with torch.no_grad():
        before = model(x)
        model.q = Adapted(model.q)
    assert_as_unlowered(model, x, 4)
    with torch.no_grad():
        assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("fused_step", [False, True])
def test_a_step_of_an_optimizer_is_noticed(fused_step: bool, model: Any, x: Tensor) -> None:
    assert_as_unlowered(model, x, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused_step)
    model.train()
    model(x).square().sum().backward()
    optimizer.step()
    model.eval()
    assert_as_unlowered(model, x, 5)


def test_train_mode_runs_the_layers_and_what_it_changes_is_noticed(model: Any, x: Tensor) -> None:
    assert_as_unlowered(model, x, 5)
    model.train()
    before = model.norm.running_mean.clone()
    with torch.no_grad():
        model(x)
    assert not torch.equal(model.norm.running_mean, before)
    model.eval()
    assert_as_unlowered(model, x, 5)


def test_where_gradients_are_wanted_the_layers_run(model: Any, x: Tensor) -> None:
    model(x).sum().backward()
    assert fused_calls(model) == 0
    assert model.conv.weight.grad is not None
    model.requires_grad_(False)
    assert model(x.requires_grad_()).requires_grad
    assert fused_calls(model) == 0
    model(x.detach())
    assert fused_calls(model) == 5


def test_inference_mode_makes_no_inference_tensors(model: Any, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)
    assert_as_unlowered(model, x, 5)
    assert not any(t.is_inference() for t in derived_tensors(model))


def test_another_dtype_runs_as_without_lowering(model: Any, x: Tensor) -> None:
    assert_as_unlowered(model, x, 5)
    with torch.no_grad():
        wide = model.double()(x.double())
    assert wide.dtype == torch.float64
    assert_as_unlowered(model.float(), x, 5)


def test_a_hook_takes_its_layer_out_and_back_in(model: Any, x: Tensor) -> None:
    seen: list[Any] = []
    assert_as_unlowered(model, x, 5)
    handle = model.norm.register_forward_hook(lambda *a: seen.append(1))
    assert_as_unlowered(model, x, 4)
    assert len(seen) == 2
    handle.remove()
    assert_as_unlowered(model, x, 5)


def doubled(layer: nn.Module) -> None:
    plain_forward = layer.forward
    layer.forward = lambda x: plain_forward(x) * 2  # type: ignore[method-assign]


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "change",
    [doubled, lambda layer: setattr(layer, "__class__", Doubled)],
    ids=["forward", "class"],
)
def test_another_forward_takes_its_layer_out(
    change: Callable[[Any], object], model: Any, x: Tensor
) -> None:
    assert_as_unlowered(model, x, 5)
    change(model.conv)
    assert_as_unlowered(model, x, 4)


@pytest.mark.parametrize("name", ["conv", "up"])
def test_a_parametrization_takes_its_layer_out(name: str, model: Any, x: Tensor) -> None:
    assert_as_unlowered(model, x, 5)
    layer = nn.utils.parametrizations.weight_norm(model.get_submodule(name))
    assert_as_unlowered(model, x, 4)
    layer.parametrizations.weight.original0.data.mul_(2)
    assert_as_unlowered(model, x, 4)


def test_batch_norm_in_train_mode_inside_an_eval_model_takes_itself_out(
    model: Any, x: Tensor
) -> None:
    model.norm2.train()
    assert_as_unlowered(model, x, 4)
    model.norm2.eval()
    assert_as_unlowered(model, x, 5)


def test_copies_and_pickles_derive_for_themselves(model: Any, x: Tensor) -> None:
    assert_as_unlowered(model, x, 5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.conv.weight.data.mul_(-1)
        assert_as_unlowered(other, x, 5)
    assert_as_unlowered(model, x, 5)


@pytest.mark.slow
def test_a_loaded_model_is_lowered_again(model: Any, x: Tensor, tmp_path: pathlib.Path) -> None:
    optimized: Any = rewrite(trained(Net(), 8, 3, 12, 12), [Monarch(2, where="down")], x)
    optimized.save(tmp_path / "on")
    loaded = rewriter.load(tmp_path / "on", Net().eval(), example_inputs=x)
    assert_as_unlowered(loaded, x, 5)
    with torch.no_grad():
        assert_reordered(loaded(x), optimized(x))
    rewrite(trained(Net(), 8, 3, 12, 12), [], x, lower=False).save(tmp_path / "off")
    assert plain(rewriter.load(tmp_path / "off", Net(), example_inputs=x))["lowered"] is None


def test_export_and_compile_see_the_layers(model: Any, x: Tensor) -> None:
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        assert_reordered(exported.module()(x), model(x))
        compiled = torch.compile(model, backend="eager")(x)
    names = {n.target for n in exported.graph.nodes if n.op == "call_function"}
    assert torch.ops.aten.batch_norm.default in names
    assert_reordered(compiled, model(x))


def test_off_by_option(x: Tensor) -> None:
    optimized: Any = rewrite(trained(Net(), 8, 3, 12, 12), [], x, lower=False)
    assert [s.name for s in optimized.report.steps] == ["original"]
    assert plain(optimized)["lowered"] is None


def test_without_example_inputs_nothing_is_lowered() -> None:
    optimized: Any = rewrite(trained(Net(), 8, 3, 12, 12))
    assert plain(optimized)["lowered"] is None


def refusals(model: nn.Module, x: Tensor, **options: Any) -> list[tuple[str, str, str]]:
    report = explain(model, [], x, **options)
    return [(d.site, d.action, d.reason) for s in report.steps for d in s.decisions]


def test_a_hook_before_the_rewrite_is_a_reason(x: Tensor) -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 4, 3, 12, 12)
    net[0].register_forward_hook(lambda *a: None)  # type: ignore[operator,index]
    assert refusals(net, x) == [("0", "skipped", "0 has hooks, which would not run")]


def test_batch_norm_without_statistics_is_a_reason(x: Tensor) -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval()
    reason = "1 keeps no running statistics: it norms by the batch"
    assert refusals(net, x) == [("0", "skipped", reason)]


def test_what_no_kernel_has_is_a_reason() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ELU(0.5)).eval()
    ((site, action, reason),) = refusals(net, torch.randn(2, 3))
    assert (site, action) == ("0", "skipped")
    assert "options of the activation" in reason
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU()).eval().to(torch.bfloat16)
    ((_, action, reason),) = refusals(net, torch.randn(2, 3, dtype=torch.bfloat16))
    assert (action, reason) == (
        "skipped", "no kernel with an epilogue takes torch.bfloat16 on cpu",
    )  # fmt: skip


def test_an_op_that_is_no_faster_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "fastest", lambda *_: "torch")
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU()).eval()
    reason = "torch's own product is the fastest here on 2 rows"
    x = torch.randn(2, 3)
    assert refusals(net, x, lower=[*DEFAULT_RULES]) == [("0", "declined", reason)]
    assert refusals(net, x) == []  # of our own rules that is no news


def test_a_write_in_place_between_siblings_is_a_reason() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            first = self.a(x)
            x.mul_(3)
            return first + self.b(x)

    found = refusals(Between().eval(), torch.randn(2, 3))
    assert all("in place" in reason and "(a, b)" in reason for _, _, reason in found)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_fold_in_every_number_of_dimensions(
    dims: int, transposed: bool, groups: int
) -> None:
    make: Any = getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")
    norm: Any = getattr(nn, f"BatchNorm{dims}d")
    net = nn.Sequential(make(4, 6, 3, stride=2, groups=groups, dilation=2), norm(6), nn.SiLU())
    x = torch.randn(3, 4, *[9] * dims)
    optimized = rewrite(trained(net, *x.shape), [], x)
    assert_as_unlowered(optimized, x, 1)


@pytest.mark.parametrize("how", ["zeros", "reflect", "circular"])
def test_padding_is_kept(how: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 3, (3, 5), padding="same", padding_mode=how), nn.BatchNorm2d(3, affine=False)
    )
    x = torch.randn(2, 2, 8, 8)
    assert_as_unlowered(rewrite(trained(net, *x.shape), [], x), x, 1)


@pytest.mark.parametrize("name", kernel.EPILOGUES)
@pytest.mark.parametrize("rows", [(), (1,), (2, 7)])
def test_the_kernel_computes_its_formula(name: str, rows: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(*rows, 24), torch.randn(10, 24), torch.randn(10)
    for b in (bias, None):
        y = kernel.linear_act(x, weight, kernel.pack(weight), b, name)
        assert_reordered(y, kernel.linear_act_reference(x, weight, b, name))


def test_no_rows_at_all_run_too() -> None:
    weight = torch.randn(10, 24)
    y = kernel.linear_act(torch.empty(0, 24), weight, kernel.pack(weight), None, "relu")
    assert y.shape == (0, 10)


# a rule of the user's


def norm_into_linear(place: Place) -> tuple[Tensor, Tensor]:
    norm, layer = place.modules
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return layer.weight * scale, layer.bias + layer.weight @ shift


NORM_LINEAR = Rule(batch_norm >> linear, Fused("norm_linear", F.linear, norm_into_linear))


def test_a_rule_of_ones_own() -> None:
    net, x = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.randn(16, 8)
    optimized: Any = rewrite(trained(net, *x.shape), [], x, lower=[*DEFAULT_RULES, NORM_LINEAR])
    (decision,) = optimized.report.steps[-1].decisions
    assert (decision.kind, decision.kernel) == ("batch_norm >> linear", "norm_linear")
    assert_as_unlowered(optimized, x, 1)
    assert_as_unlowered(pickle.loads(pickle.dumps(optimized)), x, 1)


def wrong_values(place: Place) -> tuple[Tensor, Tensor]:
    weight, bias = norm_into_linear(place)
    return weight * 1.01, bias


def wrong_type(x: Tensor, *_: Tensor) -> Tensor:
    return x.double()


def test_an_op_that_computes_something_else_is_declined() -> None:
    net, x = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.randn(16, 8)
    rule = Rule(batch_norm >> linear, Fused("wrong", F.linear, wrong_values))
    ((site, action, reason),) = refusals(trained(net, *x.shape), x, lower=[rule])
    assert (site, action) == ("0", "declined")
    assert "more than rounding explains" in reason


def test_an_op_of_another_type_is_an_error_that_names_both() -> None:
    net, x = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.randn(16, 8)
    rule = replace(NORM_LINEAR, fused=Fused("wrong", wrong_type, norm_into_linear))
    before = copy.deepcopy(net.eval())
    with pytest.raises(VerifyError, match=r"float64\[16, 8\].*float32\[16, 3\]"):
        rewrite(net, [], x, lower=[rule], inplace=True)
    assert type(net) is type(before)


def test_a_rule_that_fails_says_which_and_where() -> None:
    net, x = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)).eval(), torch.randn(16, 8)
    rule = Rule(batch_norm >> linear, Fused("broken", F.linear, lambda place: place.missing))
    with pytest.raises(
        VerifyError, match=r"^rule batch_norm >> linear → broken fails at 0, 1"
    ) as e:
        rewrite(net, [], x, lower=[rule])
    assert len(str(e.value).splitlines()) == 1


def nothing(x: Tensor, *_: Tensor) -> None:
    return None


def growing(place: Place) -> tuple[Tensor, Tensor]:
    place.modules[1].weight.data.mul_(1.5)
    return norm_into_linear(place)


def doubling(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x.mul_(2), weight, bias)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Fused("f", nothing, norm_into_linear), "run gave a NoneType, not a tensor"),
        (Fused("f", F.linear, norm_into_linear, slower=lambda *_: 3), "slower gave 3"),  # type: ignore[arg-type, return-value]
        (Fused("f", F.linear, norm_into_linear, unless=lambda _: True), "unless gave True"),  # type: ignore[arg-type, return-value]
        (Fused("f", F.linear, growing), "writes into the model's weights"),
        (Fused("f", doubling, norm_into_linear), "writes into the model's weights or the input"),
    ],
)  # fmt: skip
def test_a_rule_that_breaks_its_contract_says_which_and_where(wrong: Fused, message: str) -> None:
    net, x = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)).eval(), torch.randn(16, 8)
    with pytest.raises(VerifyError, match=rf"^rule .* → f fails at 0, 1: .*{message}.*Correct"):
        rewrite(net, [], x, lower=[Rule(batch_norm >> linear, wrong)])


def contradictions() -> Iterator[tuple[Callable[[], Any], str]]:
    relu_conv = Rule(conv >> relu, Fused("conv_act", F.relu, norm_into_linear))
    again = Rule(op("conv") >> batch_norm, NORM_LINEAR.fused)
    yield lambda: [*DEFAULT_RULES, relu_conv], "two fused ops have the name 'conv_act'"
    yield lambda: [*DEFAULT_RULES, again], "two rules have the pattern conv >> batch_norm: .* and "
    yield lambda: [Rule(conv, None)], "the pattern has no fused op"  # type: ignore[arg-type]
    yield lambda: [Rule("conv", NORM_LINEAR.fused)], "the pattern must be"  # type: ignore[arg-type]
    yield lambda: [Fused("x", lambda x: x, norm_into_linear)], "a function with a name"
    yield lambda: ["conv"], "is no Rule"
    yield lambda: 3, "use True, False, or a list"


@pytest.mark.parametrize(("rules", "message"), list(contradictions()))
def test_a_rule_that_contradicts_itself_is_refused(rules: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rewrite(nn.Linear(2, 2), [], torch.randn(1, 2), lower=rules())


def test_the_rule_of_contributing_runs() -> None:
    text = (pathlib.Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    _, _, section = text.partition("## Add a rule")
    space: dict[str, Any] = {}
    exec(section.split("```python")[1].split("```")[0], space)  # noqa: S102 (our own example)
    (decision,) = space["optimized"].report.steps[-1].decisions
    assert (decision.action, decision.kernel) == ("lowered", "norm_linear")


class PadsByHand(nn.Conv2d):
    """Of EfficientNet's kind: a forward of its own, which calls the function."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (1, False), (4, True)])
def test_a_convolution_that_is_called_as_a_function_is_folded(groups: int, bias: bool) -> None:
    conv = PadsByHand(4, 8, 3, stride=2, groups=groups, bias=bias)
    x = torch.randn(2, 4, 9, 9)
    net = trained(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU6()), *x.shape)
    model: Any = rewrite(net, [], x)
    assert_as_unlowered(model, x, 1)
    (step,) = (s for s in model.report.steps if s.name == "lowering")
    assert step.before.launches - step.after.launches == 1  # norm; the activation is in place
    with torch.no_grad():
        model[0].weight.mul_(2)
        net[0].weight.mul_(2)  # type: ignore[operator, index, union-attr]
        assert_reordered(model(x), net(x))
        model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))
        net[0].weight = model[0].weight  # type: ignore[operator, index]
        assert_reordered(model(x), net(x))


def test_a_convolution_with_a_weight_of_no_layer_is_left_alone() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.norm = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.conv2d(x, self.kernel))

    found = refusals(trained(Bare(), 2, 3, 6, 6), torch.randn(2, 3, 6, 6))
    assert found == [
        ("conv2d", "skipped", "conv2d calls a function: its weights are not a layer's")
    ]


class Projections(nn.Module):
    """Siblings whose results it returns: as they are, as a view, and only inside."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.q, self.k, self.kind = nn.Linear(6, 6), nn.Linear(6, 4), kind

    def forward(self, x: Tensor) -> Any:
        q, k = self.q(x), self.k(x)
        if self.kind == "inside":
            q.mul_(2)
            return q.sum(-1) + k.sum(-1)
        return (
            (q, k) if self.kind == "as they are" else (q.sum(-1), k.view(-1, 2, 2).transpose(0, 1))
        )


@pytest.mark.parametrize(("kind", "calls"), [("as they are", 0), ("a view", 0), ("inside", 1)])
def test_what_a_joined_product_gives_out_is_no_piece_of_it(kind: str, calls: int) -> None:
    model = Projections(kind).eval().requires_grad_(False)
    optimized: Any = rewrite(model, [], torch.randn(5, 6))
    x, scale = torch.randn(3, 6), torch.ones(()).requires_grad_()
    assert (vars(optimized)["_rewriter"].lowered is not None) is bool(calls)
    for ours, theirs in zip(
        *(torch.utils._pytree.tree_leaves(m(x)) for m in (optimized, model)), strict=True
    ):
        assert_reordered(ours, theirs)
        assert ours.stride() == theirs.stride()
        ours *= scale  # with gradients on, what was computed without
        ours.sum().backward()
    assert not calls or fused_calls(optimized) == calls


def test_a_piece_of_a_joined_product_may_be_written_with_gradients() -> None:
    pieces = fused.joined_linear(torch.randn(2, 6), torch.randn(10, 6), None, (6, 4))
    scale = torch.ones(()).requires_grad_()
    for piece in pieces:
        piece *= scale
        piece.sum().backward()


def test_rules_of_ones_own_are_not_saved_which_load_says(tmp_path: pathlib.Path) -> None:
    own = Rule(relu >> linear, Fused("relu_linear", relu_linear, weights_of))
    net = nn.Sequential(nn.ReLU(), nn.Linear(6, 4)).eval()
    x = torch.randn(5, 6)
    optimized: Any = rewrite(net, [], x, lower=[own])
    with torch.no_grad():
        expected = optimized(x)
    assert fused_calls(optimized) == 1
    optimized.save(tmp_path)
    with pytest.warns(RewriteWarning, match=r"rules of its own \(relu >> linear\), which a save"):
        loaded = load(tmp_path, net)
    with torch.no_grad():
        assert_reordered(loaded(x), expected)


def relu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x.relu(), weight, bias)


def weights_of(place: Place) -> tuple[Tensor, Tensor]:
    return place.modules[1].weight, place.modules[1].bias


@pytest.mark.slow
@pytest.mark.parametrize("runs", [True, False])
def test_a_loaded_model_runs_the_fused_ops_of_the_saved_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    monkeypatch.setattr(Engine, "_lowering_pays", lambda self: True)
    x = torch.randn(2, 3, 12, 12)
    optimized: Any = rewrite(trained(Net(), 8, 3, 12, 12), [], x)
    verdicts = vars(optimized)["_rewriter"].verdicts
    assert verdicts is not None
    label = next(p for p, on in verdicts.places.items() if on)
    optimized.save(tmp_path)
    recipe = tmp_path / "recipe.json"
    document = json.loads(recipe.read_text())
    document["lowering"][""][label] = runs
    recipe.write_text(json.dumps(document))
    monkeypatch.setattr(Engine, "_lowering_pays", lambda self: pytest.fail("measured again"))
    for given in ({}, {"example_inputs": x}):
        again = load(tmp_path, Net(), **given).eval()
        with torch.no_grad():
            again(x)
            assert vars(again)["_rewriter"].verdicts.places[label] is runs
            if runs:
                assert torch.equal(again(x), optimized(x))
