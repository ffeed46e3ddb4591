"""`torch.compile(model, backend="rewriter")`: in every mode what rewriting and eager give."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_reordered, sqnr
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.testing import assert_close

import rewriter
from rewriter import (
    LINEAR,
    MemoryBudget,
    OptionError,
    Pass,
    Replacement,
    RewriteError,
    RewriteWarning,
    Skip,
    rewrite,
)
from rewriter.passes import Monarch, Quadratic, Quantize, TopK

# torch's own imports warn
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

SLOW = pytest.mark.slow
INNER = ("eager", "aot_eager", pytest.param("inductor", marks=SLOW))


def modes(*fast: bool) -> list[Any]:
    """(inner compiler, symbolic sizes): Inductor is slow but with the sizes that are `fast`."""
    both = (False, True)
    plain = [(inner, dynamic) for inner in ("eager", "aot_eager") for dynamic in both]
    marks = {dynamic: [] if dynamic in fast else [SLOW] for dynamic in both}
    return [*plain, *(pytest.param("inductor", d, marks=marks[d]) for d in both)]


INT8 = [Quantize("int8-dynamic")]
TOPK = [TopK(k=8)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 12)
        self.norm, self.drop = nn.LayerNorm(12), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.drop(torch.relu(self.up(x)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(rows: int = 4, length: int = 3) -> Tensor:
    return torch.randn(rows, length, 12, generator=torch.Generator().manual_seed(rows))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, passes: Sequence[Any] = (), dynamic: Any = None, **options: Any) -> Any:
    own = {"passes": list(passes), **options}
    return torch.compile(model, backend="rewriter", dynamic=dynamic, options=own)


def gradients(model: Any, x: Tensor, over: nn.Module) -> dict[str, Tensor]:
    over.zero_grad()
    model(x).sin().sum().backward()  # the squares of what a LayerNorm gives have a constant mean
    return {n: p.grad.clone() for n, p in over.named_parameters() if p.grad is not None}


# every mode


@pytest.mark.parametrize(("inner", "dynamic"), modes(False))
def test_inference_is_rewrite_then_compile(inner: str, dynamic: bool) -> None:
    model = net().eval()
    fast = compiled(model, INT8, dynamic, inner=inner)
    with torch.no_grad():
        for x in (batch(), batch(6, 5)) if dynamic else (batch(),):
            want = rewrite(model, INT8)(x)
            assert_reordered(fast(x), want)
            assert (want - model(x)).abs().max() > 1e-4  # int8 it is
    assert len(rewriter.report_of(fast)) == 1
    assert len(rewriter.report_of(fast)[0].replaced) == 2


@pytest.mark.parametrize(("inner", "dynamic"), modes())
def test_training_is_rewrite_then_backward(inner: str, dynamic: bool) -> None:
    model = net().train()
    fast = compiled(model, TOPK, dynamic, inner=inner)
    for x in (batch(), batch(6, 5)) if dynamic else (batch(),):
        same = rewrite(model, TOPK).train()
        found = gradients(fast, x, model)
        want = gradients(same, x, same)
        assert len(found) == 6
        for name, grad in found.items():
            assert_reordered(grad, want[name])
    assert len(rewriter.report_of(fast)) == 1
    assert [d.site for d in rewriter.report_of(fast)[0].replaced] == ["down"]


@pytest.mark.parametrize("inner", INNER)
def test_without_passes_it_is_the_model(inner: str) -> None:
    model = net()
    found = gradients(compiled(model, inner=inner), batch(), model)
    for name, grad in gradients(model, batch(), model).items():
        assert_close(found[name], grad)
    (report,) = rewriter.last_reports()
    assert report.model == "Net"
    assert [s.name for s in report.steps] == ["original", f"compiled by {inner}"]
    assert report.before.params == sum(p.numel() for p in model.parameters())
    assert report.before.training is not None
    assert not report.errors


def test_eval_and_train_of_one_compiled_model() -> None:
    model = net()
    model.drop.p = 0.5
    fast, x = compiled(model, inner="aot_eager"), batch()
    model.eval()
    assert_close(fast(x), model(x))
    model.train()
    torch.manual_seed(3)
    found = fast(x)
    torch.manual_seed(3)
    assert_close(found, model(x))
    model.eval()
    assert_close(fast(x), model(x))


class Moded(nn.Module):
    """Says by its output which mode it is in."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + (100 if self.training else 0)


@dataclass(frozen=True)
class Marked(Pass):
    """Keeps the parameters; the layer behaves by its mode."""

    matches: ClassVar[tuple[str, ...]] = (LINEAR,)

    def propose(self, site: Any) -> Replacement | Skip:
        return Replacement(Moded(site.module), error=None)


def test_layers_are_in_the_mode_of_the_module_not_of_the_graph() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)).train()
    model[1].eval()
    x = torch.zeros(1, 12)
    fast = compiled(model, [Marked(where="*")], inner="aot_eager")
    with torch.no_grad():
        found = fast(x)
        assert_close(found, model[1](model[0](x) + 100))
    assert [d.site for d in rewriter.report_of(fast)[0].replaced] == ["0", "1"]
    model.eval()
    with torch.no_grad():
        assert_close(fast(x), model(x))


# weights that change


@pytest.mark.parametrize("inner", INNER)
def test_changed_weights_are_never_stale(inner: str) -> None:
    model, x = net().eval(), batch()
    fast = compiled(model, INT8, inner=inner)

    def agrees() -> None:
        assert_reordered(fast(x), rewrite(model, INT8)(x))

    with torch.no_grad():
        agrees()
        model.up.weight.mul_(2)  # as an optimizer does
        agrees()
        model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
        agrees()
        model.down.weight.data = torch.randn(12, 32)
        agrees()
        model.up.bias.add_(1)  # a parameter that was kept
        agrees()
        model.up.weight = nn.Parameter(torch.randn(32, 12))
        agrees()
    assert len(rewriter.report_of(fast)) <= 2  # code is compiled again at most for the new object


def test_weights_that_a_pass_takes_in_another_way() -> None:
    model, x = net().eval(), batch()
    fast = compiled(model, INT8, inner="aot_eager")
    with torch.no_grad():
        fast(x)
        model.up.weight.fill_(float("inf"))
        want = rewrite(model, INT8)
        assert_reordered(fast(x), want(x), equal_nan=True)
        torch.manual_seed(1)
        model.up.weight.normal_()
        assert_reordered(fast(x), rewrite(model, INT8)(x))
    notes = [n for r in rewriter.report_of(fast) for n in r.capture.notes]
    assert any("rewritten anew for other weights" in n and "NaN or inf" in n for n in notes)


def test_max_error_holds_for_new_weights_too() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).eval()
    x = torch.randn(4, 16)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16))  # exact in int8
        fast = compiled(model, INT8, inner="eager", max_error=1e-4)
        assert_close(fast(x), rewrite(model, INT8)(x))
        model[0].weight.normal_()
        assert torch.equal(fast(x), model(x))


def test_blocks_of_one_shape_share_their_code() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Net() for _ in range(4)).eval()
    x, backend = batch(), rewriter.backend(INT8, inner="aot_eager")
    same = [rewrite(block, INT8) for block in blocks]
    for block in blocks:
        block.compile(backend=backend)
    with torch.no_grad():
        for _ in range(2):
            for i, block in enumerate(blocks):
                want = same[i](x)
                assert_reordered(block(x), want)
    reports = [report for block in blocks for report in rewriter.report_of(block)]
    assert len(set(map(id, reports))) == 1


def test_weights_made_under_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = net().eval()
        with pytest.raises(BackendCompilerFailed, match="was made under torch.inference_mode"):
            compiled(model, INT8, inner="eager")(batch())


# training that would change parameters


@pytest.mark.parametrize("rewrite_pass", [Monarch(nblocks=2), Quantize(), Quadratic()], ids=str)
def test_trainable_parameters_are_not_replaced_behind_the_optimizer(rewrite_pass: Pass) -> None:
    fast = compiled(net(), [rewrite_pass], inner="eager")
    with pytest.raises(BackendCompilerFailed, match=r"would replace trainable .*rewriter.rewrite"):
        fast(batch())


def test_frozen_parameters_may_be_replaced_in_training() -> None:
    model, x = net(), batch()
    model.up.requires_grad_(False)
    fast = compiled(model, [Quantize(where="up")], inner="aot_eager")
    same = rewrite(model, [Quantize(where="up")])
    found, want = gradients(fast, x, model), gradients(same, x, same)
    assert set(found) == {"down.weight", "down.bias", "norm.weight", "norm.bias"} == set(want)
    for name, grad in found.items():
        assert_close(grad, want[name])
    with torch.no_grad():
        model.up.weight.mul_(2)
    assert_close(fast(x), rewrite(model, [Quantize(where="up")])(x))


def test_install_puts_new_parameters_on_the_model() -> None:
    model, x = net(), batch()
    fast = compiled(model, [Monarch(nblocks=2)], inner="aot_eager", install=True)
    want = rewrite(model, [Monarch(nblocks=2)])
    with pytest.warns(rewriter.RewriteWarning, match="2 layers with new parameters.*optimizer"):
        first = fast(x)
    assert_close(first, want(x))
    assert type(model.up).__name__ == "MonarchLinear"
    found, expected = gradients(fast, x, model), gradients(want, x, want)
    assert "up.right" in found
    for name, grad in found.items():
        assert_close(grad, expected[name])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    assert_close(fast(x), model(x))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_install_refuses_what_is_no_module() -> None:
    fast = compiled(Functional(), [Monarch(nblocks=4)], inner="eager", install=True)
    with pytest.raises(BackendCompilerFailed, match="install=True replaces nn.Linear modules"):
        fast(batch())


def test_install_refuses_hooks() -> None:
    model = net()
    model.up.register_forward_hook(lambda m, i, o: o * 2)
    fast = compiled(model, [Monarch(nblocks=2, where="up")], inner="eager", install=True)
    with pytest.raises(BackendCompilerFailed, match="up has hooks"):
        fast(batch())


# shapes, breaks, modes of torch


@pytest.mark.parametrize("passes", [[], INT8], ids=["none", "int8"])
def test_twenty_shapes_are_two_compilations(passes: list[Pass]) -> None:
    model = net().eval()
    fast = compiled(model, passes, inner="aot_eager")
    with torch.no_grad():
        for i in range(20):
            x = batch(2 + i, 3 + (i * 7) % 11)
            want = rewrite(model, passes)(x) if passes else model(x)
            assert_reordered(fast(x), want)
    reports = rewriter.report_of(fast)
    assert len(reports) == 2
    assert any("compilation 2 of this code" in n for n in reports[1].capture.notes)


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        torch._dynamo.graph_break()
        return self.norm(x + self.down(h))


def test_parts_between_breaks_are_rewritten_and_reported() -> None:
    torch.manual_seed(0)
    model, x = Broken().eval(), batch()
    passes = [Quantize(where="up"), Quantize(activation="per_tensor", where="down")]
    fast = compiled(model, passes, inner="eager")
    with torch.no_grad():
        assert_reordered(fast(x), rewrite(model, passes, x)(x))
    first, second = rewriter.report_of(fast)
    assert [d.site for d in first.replaced] == ["up"]
    assert [d.site for d in second.replaced] == ["down"]
    assert any("Python goes on" in n for n in first.capture.notes)


def test_fullgraph_reports_the_break() -> None:
    fast = torch.compile(Broken(), backend="rewriter", fullgraph=True, options={"inner": "eager"})
    with pytest.raises(torch._dynamo.exc.Unsupported):
        fast(batch())


class Aside(Net):
    @torch.compiler.disable
    def aside(self, x: Tensor) -> Tensor:
        return x.sin()

    def forward(self, x: Tensor) -> Tensor:
        return self.aside(super().forward(x)) * 2


def test_disabled_code_runs_as_it_is() -> None:
    model, x = Aside().eval(), batch()
    fast = compiled(model, INT8, inner="aot_eager")
    with torch.no_grad():
        assert_reordered(fast(x), rewrite(model, INT8, x)(x))


def test_inference_mode_and_autocast() -> None:
    model, x = net().eval(), batch()
    fast = compiled(model, INT8, inner="aot_eager")
    same = rewrite(model, INT8)
    with torch.inference_mode():
        assert_reordered(fast(x), same(x))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, want = fast(x), same(x)
        assert found.dtype == want.dtype
        assert_reordered(found, want)
    with torch.no_grad():
        assert_reordered(fast(x), same(x))


def test_torch_compiles_mode_reaches_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as inductor

    seen: list[Any] = []

    def spy(module: Any, inputs: Any, config_patches: Any = None) -> Any:
        seen.append(config_patches)
        return module.forward

    monkeypatch.setattr(inductor, "compile_fx", spy)
    model, x = net(), batch()
    torch.compile(model, backend=rewriter.backend(), mode="max-autotune-no-cudagraphs")(x)
    torch.compile(model, backend=rewriter.backend(inductor={"max-autotune": True}))(x)
    torch.compile(model, backend="rewriter")(x)
    assert seen[0]["max_autotune"] is True
    assert seen[1] == {"max_autotune": True}
    assert seen[2] == {}


def test_several_models_and_threads() -> None:
    x = batch()
    models = [net().eval() for _ in range(3)]
    fast = [
        compiled(m, p, inner="aot_eager") for m, p in zip(models, ([], INT8, TOPK), strict=True)
    ]
    want = [rewrite(m, p) for m, p in zip(models, ([], INT8, TOPK), strict=True)]
    wrong: list[Any] = []

    def work(start: int) -> None:
        with torch.no_grad():
            for i in range(12):
                which = (start + i) % 3
                off = (fast[which](x) - want[which](x)).abs().max()
                if off > 1e-4:
                    wrong.append((which, off))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(rewriter.report_of(f) for f in fast)


# the memory planner


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*[
            nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(3)
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@pytest.mark.parametrize(
    ("inner", "passes"),
    [
        ("aot_eager", []),
        ("aot_eager", TOPK),
        pytest.param("inductor", [], marks=SLOW),
        ("inductor", TOPK),
    ],
    ids=["aot_eager-none", "aot_eager-topk", "inductor-none", "inductor-topk"],
)
def test_a_memory_budget_plans_the_training_step(inner: str, passes: list[Pass]) -> None:
    model, x = Deep(), torch.randn(256, 32)
    fast = compiled(model, passes, inner=inner, memory_budget=0.9)
    same = rewrite(model, passes) if passes else model
    found, want = gradients(fast, x, model), gradients(same, x, same)
    for name, grad in found.items():
        assert_reordered(grad, want[name])
    (report,) = rewriter.report_of(fast)
    # code out of Inductor's cache was planned when it was made
    cached = any("from Inductor's cache" in n for s in report.steps for n in s.notes)
    assert any(s.name.startswith("memory plan") for s in report.steps) or cached
    assert not (cached and inner == "aot_eager")
    assert rewriter.report_of(fast)[0] is report
    assert all(s.after.params == report.before.params for s in report.steps)


def test_a_budget_without_a_backward_is_said_to_plan_nothing() -> None:
    fast = compiled(net().eval(), inner="aot_eager", memory_budget=0.5)
    with torch.no_grad():
        fast(batch())
    (report,) = rewriter.report_of(fast)
    assert "no memory plan: there is no backward" in report.steps[-1].notes


# inputs of all kinds


class Odd(Net):
    def forward(self, x: Tensor, scale: float, flags: dict[str, Any], items: list[Tensor]) -> Any:
        y = super().forward(x) * scale + items[0]
        return {"y": y, "n": flags["n"] + 1} if flags["as_dict"] else y


def test_inputs_that_are_no_tensors() -> None:
    model, x = Odd().eval(), batch()
    fast = compiled(model, INT8, inner="aot_eager")
    same = rewrite(model, INT8, (x, 2.0, {"n": 3, "as_dict": True}, [x]))
    with torch.no_grad():
        for scale in (2.0, 3.0):
            args = (x, scale, {"n": 3, "as_dict": True}, [x])
            found = fast(*args)
            want = rewrite(model, INT8, args)(*args)
            assert_reordered(found["y"], want["y"])
            assert found["n"] == 4
    assert same is not None


class Writes(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return super().forward(x)


@pytest.mark.parametrize("inner", INNER)
def test_inputs_written_in_place(inner: str) -> None:
    model, x, y = Writes().eval(), batch(), batch()
    fast = compiled(model, INT8, inner=inner)
    with torch.no_grad():
        found, want = fast(x), model(y)
    assert torch.equal(x, y)
    assert sqnr(found, want) > 30


def test_inputs_that_require_gradients() -> None:
    model = net().requires_grad_(False)
    x = batch().requires_grad_()
    fast = compiled(model, INT8, inner="aot_eager")
    fast(x).square().sum().backward()
    found, x.grad = x.grad, None
    rewrite(model, INT8)(x).square().sum().backward()
    assert found is not None
    assert_close(found, x.grad)


def test_a_function_around_a_model() -> None:
    model, x = net().eval(), batch()

    def call(x: Tensor) -> Tensor:
        return model(x) * 2

    fast = torch.compile(call, backend="rewriter", options={"passes": INT8, "inner": "eager"})
    with torch.no_grad():
        assert_reordered(fast(x), rewrite(model, INT8)(x) * 2)
    (report,) = rewriter.report_of(fast)
    assert len(report.replaced) == 2
    assert report.model.endswith("call")


def test_reports_without_a_call_or_of_something_else() -> None:
    assert rewriter.report_of(compiled(net())) == []
    with pytest.raises(RewriteError, match="needs what torch.compile"):
        rewriter.report_of(net())
    with pytest.raises(RewriteError, match="compiled by 'inductor', not by"):
        rewriter.report_of(torch.compile(net()))


# options


def failing(match: str, **options: Any) -> None:
    fast = torch.compile(net(), backend="rewriter", options=options)
    with pytest.raises(BackendCompilerFailed, match=match), torch.no_grad():
        fast(batch())


def test_an_unknown_option_names_the_nearest() -> None:
    failing("no option 'memory_budge'; did you mean 'memory_budget'", memory_budge=1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pass type": ({"passes": [3]}, r"passes\[0\] is a int"),
    "pass class": ({"passes": [Quantize]}, r"write Quantize\(\)"),
    "one pass": ({"passes": Quantize()}, "passes must be a list"),
    "one text": ({"passes": "quantize"}, "passes must be a list"),
    "pass name": ({"passes": ["quantise"]}, "did you mean 'quantize'"),
    "pass order": ({"passes": [Quantize(), Monarch()]}, "Phases run"),
    "inner": ({"inner": "inducter"}, "did you mean 'inductor'"),
    "objective": ({"objective": "speed"}, "objective='speed'"),
    "max_error": ({"max_error": -1}, "max_error=-1"),
    "max_error type": ({"max_error": "x"}, "max_error='x'"),
    "max_error alone": ({"max_error": 0.1}, "conflicting.*there are none"),
    "where alone": ({"where": "up"}, "conflicting.*there are none"),
    "where": ({"where": 3}, "where=3"),
    "device": ({"device": 3}, "device=3"),
    "install": ({"install": "yes", "passes": [Monarch()]}, "install='yes'"),
    "budget type": ({"memory_budget": [1]}, "memory_budget"),
    "budget": ({"memory_budget": "many"}, "memory_budget='many'"),
    "inductor type": ({"inductor": 3}, "inductor=3"),
    "inductor option": ({"inductor": {"max_autotun": True}}, "did you mean 'max_autotune'"),
    "mode": ({"mode": "max-autotun"}, "did you mean 'max-autotune"),
    "mode, inner": ({"mode": "max-autotune", "inner": "eager"}, "conflicting.*Inductor's"),
    "inductor, inner": ({"inductor": {"x": 1}, "inner": "eager"}, "conflicting.*inner is 'eager'"),
    "budget, inner": ({"memory_budget": 0.5, "inner": "eager"}, "conflicting.*splits nothing"),
    "lossy": ({"lossy": True}, "conflicting.*no memory_budget"),
    "lossy twice": (
        {"lossy": True, "memory_budget": MemoryBudget(0.5)}, "conflicting.*says lossy itself"
    ),
    "gradient error": (
        {"memory_budget": MemoryBudget(0.5, lossy=True, gradient_error=1e-3)}, "cannot be checked"
    ),
    "two partitioners": (
        {"memory_budget": 0.5, "inductor": {"custom_partitioner_fn": min}}, "both split the graph"
    ),
    "mode type": ({"mode": 3}, "mode=3"),
    "inductor names": ({"inductor": {1: 2}}, r"not \[1\]"),
    "inductor value": ({"inductor": {"max_autotune": "yes"}}, "use True or False"),
    "inductor twice": (
        {"inductor": {"max-autotune": True, "max_autotune": False}}, "max_autotune twice"
    ),
    "mode, inductor": (
        {"mode": "max-autotune", "inductor": {"max_autotune": False}}, "sets max_autotune to True"
    ),
    "install alone": ({"install": True}, "conflicting.*there are none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_options(case: str) -> None:
    options, match = REFUSED[case]
    with pytest.raises(OptionError, match=match):
        rewriter.backend(**options)


def test_options_beside_a_backend_that_has_its_own() -> None:
    fast = torch.compile(net(), backend=rewriter.backend(), options={"inner": "eager"})
    with pytest.raises(BackendCompilerFailed, match="options of torch.compile belong into"):
        fast(batch())
    fast = torch.compile(net(), backend=rewriter.backend(inner="eager"), mode="max-autotune")
    with pytest.raises(BackendCompilerFailed, match=r"conflicting options: torch.compile\(mode"):
        fast(batch())


def test_where_and_objective_decide_as_in_rewrite() -> None:
    model, x = net().eval(), batch()
    fast = compiled(model, INT8, inner="eager", where="up", objective="params")
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    (report,) = rewriter.report_of(fast)
    assert {d.site: d.action for d in report.decisions} == {"up": "declined", "down": "skipped"}
    with pytest.raises(BackendCompilerFailed, match="where='upp' matches no"), torch.no_grad():
        compiled(net(), INT8, inner="eager", where="upp")(x)


def test_unsupported_devices() -> None:
    model, x = net().to("meta").eval(), batch().to("meta")
    with pytest.raises(BackendCompilerFailed, match="an input is on meta"), torch.no_grad():
        compiled(model, INT8)(x)


def test_a_device_that_inductor_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.codegen.common as common

    monkeypatch.setattr(common, "get_scheduling_for_device", lambda device: None)
    with pytest.raises(BackendCompilerFailed, match="no code generator for cpu.*aot_eager"):
        compiled(net())(batch())


def test_a_pass_that_matches_nothing_warns() -> None:
    fast = compiled(nn.Sequential(nn.LayerNorm(12)), INT8, inner="eager")
    with pytest.warns(rewriter.RewriteWarning, match="nothing to do"), torch.no_grad():
        fast(batch())


# torch's own machinery


def test_found_by_name_without_an_import() -> None:
    code = (
        "import sys, torch; from torch import nn; from torch._dynamo import list_backends; "
        "assert 'rewriter' in list_backends(); m = nn.Linear(3, 3); x = torch.ones(2, 3); "
        "assert 'rewriter' not in sys.modules; f = torch.compile(m, backend='rewriter', "
        "options={'inner': 'eager'}); assert torch.equal(f(x), m(x)); "
        "print('rewriter' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert run.stdout.strip() == "True", run.stderr


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(super().forward, x, use_reentrant=False)


def test_checkpointed_code_is_kept_as_it_is() -> None:
    model, x = Checkpointed(), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing for a pass inside
        fast = compiled(model, TOPK, inner="aot_eager")
        found = gradients(fast, x, model)
    for name, grad in gradients(model, x, model).items():
        assert_close(found[name], grad)
    fast = compiled(model.requires_grad_(False), INT8, inner="aot_eager")
    with pytest.warns(RewriteWarning, match="nothing to do"):
        assert_close(fast(x), model(x))
    (report,) = rewriter.report_of(fast)
    skipped = {d.site: d.reason for d in report.decisions}
    assert set(skipped) == {"up.weight", "down.weight"}
    assert "goes into tag_activation_checkpoint" in skipped["up.weight"]


class Counted(Net):
    """A buffer that every forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_buffers_are_written() -> None:
    torch.manual_seed(0)
    model, x = Counted().eval(), batch()
    fast = compiled(model, INT8, inner="aot_eager")
    with torch.no_grad():
        first, second = fast(x), fast(x)
    assert_close(second, first * 2)
    assert model.calls == 2


def test_compiled_code_does_not_keep_the_model_alive() -> None:
    import gc
    import weakref

    model = net().eval()
    fast = compiled(model, INT8, inner="eager")
    with torch.no_grad():
        fast(batch())
    weight = weakref.ref(model.up.weight)
    del fast, model
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None


def test_a_step_of_training_costs_what_the_ledger_says() -> None:
    model = net()
    fast = compiled(model, TOPK, inner="aot_eager")
    fast(batch()).sum().backward()
    (report,) = rewriter.report_of(fast)
    assert report.after.training is not None
    assert not report.errors
    assert "TopK(k=8)" in str(report)
