"""What the engine decides, installs, checks and reports, whatever the pass."""

from __future__ import annotations

import copy
import pathlib
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_equal
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from rewriter import (
    ACTIVATION,
    CONV,
    LINEAR,
    MLP,
    Pass,
    Phase,
    Replacement,
    Site,
    Skip,
    load,
    rewrite,
)
from rewriter.capture import Capture, capture
from rewriter.engine.decide import timed
from rewriter.engine.looking import sites_of
from rewriter.engine.pipeline import prepare
from rewriter.engine.verify import Boundary, boundary, check
from rewriter.errors import OptionError, PassError, RewriteWarning, VerifyError
from rewriter.lowering import Fused, Rule
from rewriter.modules.patterns import fan, op
from rewriter.passes import Densify, Monarch, Quadratic, Quantize, QuantizedLinear, TopK
from rewriter.passes.monarch import MonarchLinear
from rewriter.passes.quadratic import QuadraticLinear
from rewriter.report.graph_text import graph_text

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


class Net(nn.Module):
    def __init__(self, **kind: Any) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32, **kind)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(32, 16, **kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.up(x))))


@dataclass(frozen=True)
class By(Pass):
    """A pass around one function."""

    propose_: Callable[[Site], Any] = lambda site: Skip("no")
    kinds: tuple[Any, ...] = (LINEAR,)
    sure: bool = False

    @property
    def matches(self) -> tuple[Any, ...]:  # type: ignore[override]
        return self.kinds

    @property
    def exact(self) -> bool:
        return self.sure

    def __str__(self) -> str:
        return "By()"

    def propose(self, site: Site) -> Any:
        return self.propose_(site)


X = torch.randn(4, 16)


# visiting


def test_each_site_is_asked_once_in_the_order_of_calls() -> None:
    asked: list[str] = []

    def propose(site: Site) -> Skip:
        asked.append(site.fqn)
        return Skip("seen {}", site.fqn)

    result = rewrite(Net(), [By(propose)], X)
    assert asked == ["up", "down"]
    assert [(d.site, d.action, d.reason) for d in result.report.decisions] == [
        ("up", "skipped", "seen up"),
        ("down", "skipped", "seen down"),
    ]


def test_steps_say_what_happened() -> None:
    report = rewrite(Net(), [Monarch(nblocks=4), Quantize()], X).report
    original, monarch, quantize = report.steps[:3]  # and lowering, where there are kernels
    assert (original.name, monarch.name) == ("original", "Monarch(nblocks=4)")
    assert quantize.name == "Quantize(scheme='int8-dynamic')"
    assert original.after == monarch.before
    assert monarch.after == quantize.before
    assert monarch.after.params < original.after.params
    assert quantize.after.param_bytes < monarch.after.param_bytes
    assert monarch.output_error > 0
    up = monarch.decisions[0]
    assert (up.action, up.kind, up.tokens, up.shape) == ("replaced", "linear", 4, "16→32")
    assert up.where.startswith("test_engine.py:")
    assert up.before.macs == 4 * 16 * 32
    assert 0 < up.after.macs < up.before.macs
    assert quantize.decisions[0].kind == "monarch_linear"


def test_an_operation_that_cannot_be_priced_is_an_error_line() -> None:
    @torch.library.custom_op("rewriter_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return twice(self.fc(x))

    report = rewrite(Odd(), [Quadratic()], X).report
    assert any("rewriter_test" in e and "twice" in e for e in report.errors)


@pytest.mark.parametrize(
    ("where", "also", "expected"),
    [
        ("u*", None, ["up"]),
        (lambda s: s.out_features == 16, None, ["down"]),
        ("*", "down", ["down"]),
        ("up", lambda s: s.fqn != "up", []),
    ],
)
def test_where(where: Any, also: Any, expected: list[str]) -> None:
    report = rewrite(Net(), [Quadratic(where=also)], X, where=where).report
    assert [d.site for d in report.replaced] == expected
    assert all(d.reason.startswith("not selected by where") for d in report.skipped)


def test_where_that_fits_nothing_or_fails() -> None:
    with pytest.raises(OptionError, match="where='UP' matches none of its 2 sites: up, down"):
        rewrite(Net(), [Quadratic(where="UP")], X)
    with pytest.raises(PassError, match=r"failed on up \(linear, test_engine.py:\d+\): .*boom"):
        rewrite(Net(), [Quadratic(where=lambda s: {}["boom"])], X)


# passes that misbehave


def raising(site: Site) -> Any:
    raise OptionError("impossible here")


@pytest.mark.parametrize(
    ("propose", "message"),
    [
        (lambda s: 1 / 0, r"By\(\) failed on up \(linear, test_engine.py:\d+\): ZeroDivisionError"),
        (raising, "failed on up .*OptionError: impossible here"),
        (lambda s: None, "propose returned a NoneType for up: return Replacement"),
        (lambda s: s.module, "propose returned a Linear"),
        (lambda s: Replacement("layer"), "propose returned a Replacement of a str"),
    ],
)
def test_a_pass_that_fails_is_named_with_its_site(propose: Any, message: str) -> None:
    with pytest.raises(PassError, match=message):
        rewrite(Net(), [By(propose)], X)


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Wide(), r"it makes float32\[4, 16\] on cpu of .* the site makes float32\[4, 32\]"),
        (nn.Linear(16, 32).double(), r"it makes float64\[4, 32\] on cpu of float32"),
        (nn.Linear(15, 32), "its layer fails on"),
        (nn.Sequential(nn.Linear(16, 32), nn.Flatten(0)), r"makes float32\[128\]"),
    ],
)
def test_a_layer_that_does_not_fit_is_named_with_its_site(layer: nn.Module, message: str) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(VerifyError, match=r"By\(\) failed on up \(linear, test_engine.*" + message):
        rewrite(model, [By(lambda s: Replacement(layer))], X)
    assert_close(model.state_dict(), before)


def test_a_pass_out_of_order_or_no_pass_at_all() -> None:
    with pytest.raises(OptionError, match=r"is the class TopK: .*Monarch.*comes after Quantize"):
        rewrite(Net(), [Quantize(), Monarch(nblocks=2), TopK], X)  # type: ignore[list-item]
    assert Phase.STRUCTURE < Phase.SPARSITY < Phase.PRECISION


def test_a_pass_that_finds_nothing_warns_at_the_users_line() -> None:
    with pytest.warns(RewriteWarning, match="no site of kind monarch_linear") as caught:
        rewrite(Net(), [Densify()], X)
    assert caught[0].filename == __file__


def test_an_exact_pass_that_is_not_exact() -> None:
    def other(site: Site) -> Replacement:
        return Replacement(nn.Linear(site.in_features, site.out_features))

    with pytest.raises(VerifyError, match="says it is exact, but changes the outputs"):
        rewrite(Net().eval(), [By(other, sure=True)], X)
    assert rewrite(Net(), [By(other)], X).report.steps[1].output_error > 0


# what a layer keeps


def test_hooks_move_and_their_handles_still_remove_them() -> None:
    model, seen = Net(), []
    handle = model.up.register_forward_hook(lambda m, a, r: seen.append(type(m)))
    model.up.register_forward_pre_hook(lambda m, a, k: seen.append("pre"), with_kwargs=True)
    model.up.register_full_backward_hook(lambda m, gi, go: seen.append("grad"))
    rewrite(model, [Quadratic()], X, inplace=True)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert seen == ["pre", QuadraticLinear, "grad"]
    handle.remove()
    seen.clear()
    model(X)
    assert QuadraticLinear not in seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rewrite_", [Quadratic(), Monarch(nblocks=2, rank=1)], ids=str)
def test_dtype_requires_grad_and_mode_are_kept(rewrite_: Pass, dtype: torch.dtype) -> None:
    model = Net(dtype=dtype)
    model.up.requires_grad_(False)
    model.down.eval()
    result = rewrite(model, [rewrite_], X.to(dtype))
    assert len(result.report.replaced) == 2
    assert {p.dtype for p in result.parameters()} == {dtype}
    assert not any(p.requires_grad for p in result.up.parameters())
    assert all(p.requires_grad for p in result.down.parameters())
    assert (result.training, result.up.training, result.down.training) == (True, True, False)


def test_weights_that_are_computed_stay() -> None:
    model = Net()
    parametrizations.weight_norm(model.up)
    with pytest.warns(FutureWarning), torch.no_grad():
        torch.nn.utils.weight_norm(model.down)
    report = rewrite(model, [Quadratic()], X).report
    assert {d.site: d.reason.split(";")[0] for d in report.skipped} == {
        "up": "its parameters are parametrized",
        "down": "its weight is computed in a hook (torch.nn.utils)",
    }


def test_the_train_graph_is_rewritten_too() -> None:
    model = Net().train()
    result = rewrite(model, [Quadratic()], X)
    for m in (model, result):
        torch.manual_seed(3)
        m.result = m(X)
    assert_close(result.result, model.result)
    result.result.sum().backward()
    assert result.up.weight_b.grad.abs().sum() > 0


# deciding


def test_max_error() -> None:
    report = rewrite(Net(), [Monarch(nblocks=4)], X, max_error=1e-3).report
    assert [d.action for d in report.decisions] == ["declined", "declined"]
    assert all("is above max_error 0.001" in d.reason and d.error > 1e-3 for d in report.decisions)
    assert rewrite(Net(), [Monarch(nblocks=4)], X, max_error=1.0).report.replaced
    nan = By(lambda s: Replacement(s.module, error=float("nan")))
    assert not rewrite(Net(), [nan], X, max_error=1.0).report.replaced


def test_objectives_by_count_and_bytes() -> None:
    more = rewrite(Net(), [Quadratic()], X, objective="params").report
    assert more.decisions[0].reason == "1568 parameters are no fewer than 544"
    more = rewrite(Net(), [Quadratic()], X, objective="memory").report
    assert "bytes are no fewer than 2176" in more.decisions[0].reason
    assert len(rewrite(Net(), [Quantize()], X, objective="memory").report.replaced) == 2


class Slow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(300):
            x = x + 0
        return super().forward(x)


def test_latency_is_measured_and_stated() -> None:
    slow = By(lambda s: Replacement(Slow(s.in_features, s.out_features)))
    report = rewrite(Net(), [slow], X, objective="latency").report
    for decision in report.decisions:
        assert decision.action == "declined"
        assert decision.reason.startswith("measured ")
        assert "the layer it replaces" in decision.reason
    fast = By(lambda s: Replacement(nn.Linear(16, 32)), kinds=(Slow,))
    assert fast.kinds == (Slow,)
    assert (
        "cannot be measured"
        in rewrite(Net(), [slow], None, objective="latency").report.decisions[0].reason
    )


def test_latency_of_our_own_layer_is_that_layers() -> None:
    """Not of a dense layer: the site's module is what runs now."""
    engine = prepare(Net(), X)
    engine.original()
    engine.run(Monarch(nblocks=2, rank=1))
    (site,) = [s for s in sites_of(engine.capture) if s.fqn == "up"]
    assert site.kind is MonarchLinear
    ran: list[str] = []
    old, new = site.module, nn.Linear(16, 32)
    for name, layer in (("old", old), ("new", new)):
        forward = layer.forward
        vars(layer)["forward"] = lambda x, n=name, f=forward: (ran.append(n), f(x))[1]
    state = torch.random.get_rng_state()
    times = timed(site, new)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert times is not None
    assert min(times) > 0
    assert {"old", "new"} == set(ran)
    changes = sum(a != b for a, b in zip(ran, ran[1:], strict=False))
    assert changes > 20  # turn by turn


@pytest.mark.parametrize("kind", [MLP, ACTIVATION, CONV])
def test_latency_of_other_sites(kind: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up, self.down = nn.Conv1d(2, 2, 1), nn.Linear(16, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(self.conv(x)), approximate="tanh"))

    engine = prepare(Mixed(), torch.randn(3, 2, 16))
    engine.original()
    (site,) = [s for s in sites_of(engine.capture) if s.kind == kind]
    layer = {MLP: nn.Linear(8, 4), ACTIVATION: nn.GELU(), CONV: nn.Conv1d(2, 2, 1)}[kind]
    assert timed(site, layer) is not None


@pytest.mark.parametrize("readers", [1, 3])
def test_latency_is_that_of_the_fused_op(readers: int) -> None:
    """Of layers that read one value the share of one: a single op may run for them all."""

    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 8) for _ in range(readers))
            self.down = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(sum(layer(x) for layer in self.layers))

    ran: list[str] = []

    def noted(name: str, result: Any) -> Any:
        def run(x: Tensor, *_: Any) -> Any:
            ran.append(name)
            return result(x)

        return run

    one = Fused("one", noted("one", Tensor.neg), lambda place: [])
    all_ = Fused("all", noted("all", lambda x: (x,) * readers), lambda place: [])
    rules = (Rule(fan(op("int8_linear")), all_), Rule(op("int8_linear"), one))
    engine = prepare(Readers(), torch.randn(3, 16))
    engine.original()
    site = next(s for s in sites_of(engine.capture) if s.fqn == "layers.0")
    assert site.module is not None
    layer = QuantizedLinear.from_weight(site.module.weight, None)
    times = timed(site, layer, None, rules)
    assert times is not None
    assert set(ran) == {"one" if readers == 1 else "all"}
    ran.clear()
    assert timed(site, layer) is not None
    assert not ran


def test_tied_sites_are_declined_together() -> None:
    model = Net()
    model.down = nn.Linear(16, 32)
    model.down.weight, model.down.bias = model.up.weight, model.up.bias

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + self.down(x)

    model.__class__ = Twice
    errors = iter([0.1, 0.9])
    by = By(lambda s: Replacement(nn.Linear(16, 32), error=next(errors)))
    report = rewrite(model, [by], None, max_error=0.5).report
    assert [d.action for d in report.decisions] == ["declined", "declined"]
    assert "tied to down, which is declined: error 0.9" in report.decisions[0].reason


# verify


def verified(spoil: Callable[[Capture], None], layers: list[nn.Module] | None = None) -> None:
    model = Net()
    model.tied = model.down
    captured = capture(model, X)
    before = boundary(captured)
    check(captured, before, [], "P")
    spoil(captured)
    check(captured, before, layers or [], "P")


def malformed(c: Capture) -> None:
    graph = c.regions[0].graphs[False]
    call = next(n for n in graph.nodes if n.op == "call_module")
    call.target = "nowhere"
    graph.owning_module = c.root


def bare(c: Capture) -> None:
    node = next(n for n in c.regions[0].graphs[True].nodes if n.op == "call_module")
    del node.meta["val"]


def other_type(c: Capture) -> None:
    output = next(n for n in c.regions[0].graphs[False].nodes if n.op == "output")
    node = output.all_input_nodes[0]
    node.meta["val"] = node.meta["val"].double()


def untie(c: Capture) -> None:
    c.root.tied = copy.deepcopy(c.root.down)


def orphan(c: Capture) -> None:
    c.root.extra = nn.Parameter(torch.zeros(1))


def lose(c: Capture) -> None:
    del c.root.up.bias


def change(c: Capture) -> None:
    c.root.up.bias = nn.Parameter(torch.zeros(32))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (malformed, "the eval graph of the model is malformed"),
        (bare, "the train graph of the model has nodes without metadata"),
        (other_type, r"changed the type .* float32\[4, 16\] on cpu became .*float64\[4, 16\]"),
        (untie, "broke the tie between down.bias, tied.bias|down.weight, tied.weight"),
        (orphan, r"new \['extra'\]"),
        (lose, r"lost \['up.bias'\]"),
        (change, r"changed \['up.bias'\]"),
    ],
)
def test_verify(spoil: Callable[[Capture], None], message: str) -> None:
    with pytest.raises(VerifyError, match=f"^P.*({message})"):
        verified(spoil)


def test_verify_a_tie_that_is_half_replaced() -> None:
    layer = nn.Linear(32, 16)

    def replace_one(c: Capture) -> None:
        c.root.tied = layer

    with pytest.raises(VerifyError, match="broke the tie"):
        verified(replace_one, [layer])

    def keep_parameters(c: Capture) -> None:
        layer.weight, layer.bias = c.root.down.weight, c.root.down.bias
        c.root.tied = layer

    verified(keep_parameters, [layer])
    assert isinstance(boundary(capture(Net(), X)), Boundary)


# again and again


def test_a_rewritten_model_is_rewritten_again(tmp_path: pathlib.Path) -> None:

    original = Net().eval()
    first = rewrite(original, [Monarch(nblocks=4)], X)
    second = rewrite(first, [Densify()], X)
    assert type(first.up) is MonarchLinear
    assert type(second.up) is nn.Linear
    assert_close(second(X), first(X))
    second.save(tmp_path / "saved")
    assert_close(load(tmp_path / "saved", Net().eval())(X), second(X))
    other = Net().eval()
    second.load_original(other.state_dict())
    both = [Monarch(nblocks=4), Densify()]
    assert_close(second(X), rewrite(other, both, X)(X))


def test_functional_places_are_rewritten_again() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    model = Functional().eval()
    result = rewrite(model, [Monarch(nblocks=4), Quantize()], X)
    assert result.w.stands_for_transposed
    assert_close(result(X[None])[0], result(X))  # a new form: Python goes through the layer
    assert [f.python for f in result.report.forms] == [0, 0]
    again = rewrite(rewrite(model, [Monarch(nblocks=4)], X), [Quantize()], X)
    assert again.w.stands_for_transposed
    assert_close(again(X), result(X))


@pytest.mark.parametrize("transposed", [True, False])
def test_a_dense_layer_in_the_place_of_a_weight_is_called_by_python(
    transposed: bool, tmp_path: pathlib.Path
) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w if transposed else F.linear(x, self.w)

    model = Functional().eval()
    result = rewrite(model, [Monarch(nblocks=4), Densify()], X)
    assert isinstance(result.w, nn.Linear)
    assert_close(type(model).forward(result, X), result(X))
    result.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", model)
    assert_equal(loaded(X), result(X))
    assert_close(type(model).forward(loaded, X), result(X))
    assert isinstance(rewrite(result, [Quantize()], X).w, QuantizedLinear)


def test_what_python_cannot_call_in_the_place_of_a_weight_is_refused() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w)

    own = By(lambda s: Replacement(nn.Sequential(nn.Linear(16, 16, bias=False))))
    with pytest.raises(PassError, match=r"w is a weight that Python .* not a Sequential"):
        rewrite(Functional(), [own], X)


# text and example


def test_text_of_every_layer_class() -> None:
    recipes: dict[str, list[Pass]] = {
        "linear": [Monarch(nblocks=4), Densify()],
        "monarch_linear": [Monarch(nblocks=4)],
        "quadratic_linear": [Quadratic()],
        "topk_linear": [TopK(k=2)],
        "int8_linear": [Quantize()],
        "int8_monarch_linear": [Monarch(nblocks=4), Quantize()],
    }
    for name, passes in recipes.items():
        engine = prepare(Net().eval(), X)
        engine.original()
        decisions = [d for p in passes for d in engine.run(p).decisions]
        text = graph_text(engine.capture.root, engine.capture.regions[0].graphs[False], decisions)
        last = text.splitlines()[-1]
        assert f" {name}(%" in last, text
        assert "down) : f32[4,16]" in last
        assert "# was" in last


def test_the_example_of_a_pass_runs_and_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / "write_a_pass.py"
    lines = path.read_text().splitlines()
    body = lines[lines.index("# [pass]") + 1 : lines.index("# [/pass]")]
    code = [s for s in (line.strip() for line in body) if s]
    code = [s for s in code if not s.startswith(("import ", "from ", "#"))]
    assert len(code) < 20
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert "LowRank(rank=8)" in out
    assert "Sequential" in out
