"""Lowering of int8 layers: one product for those that read one input, and activations behind it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from marks import slow_but, slow_but_named
from torch import Tensor, nn
from unlowered import unlowered

from rewriter import load, rewrite
from rewriter.kernels import attention, int8_cpu
from rewriter.kernels import int8_choice as choice
from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_static as static
from rewriter.kernels.int8_attention import Attend
from rewriter.lowering import FLOAT32_RULES, integers
from rewriter.passes import Quantize

X = torch.linspace(-2, 2, 2 * 5 * 16).view(2, 5, 16).sin()


@pytest.fixture(autouse=True)
def _always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test goes by a time: the fused op counts as the faster one."""
    kernel = "torch" if int8_cpu.refusal() else "native"
    monkeypatch.setattr(choice, "pick_kernel", lambda *_: kernel)
    monkeypatch.setattr(static, "pick_kernel", lambda *_: kernel)
    monkeypatch.setattr(integers, "fastest", lambda key, version, make, *_: list(make())[-1])
    monkeypatch.setattr("rewriter.engine.engine.Engine._lowering_pays", lambda _: True)


class Attends(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 24)
        self.up, self.act, self.down = nn.Linear(24, 40), act or nn.GELU(), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        return x + self.down(self.act(self.up(mixed)))


def both(act: nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, pass_ = Attends(act).eval(), Quantize(**options)
    given = {"calibration": [X]} if pass_.needs_calibration else {}
    lowered = rewrite(model, [pass_], X, **given)
    return lowered, unlowered(lowered)


def reasons(model: Any) -> dict[str, str]:
    (step,) = [s for s in model.report.steps if s.name == "lowering"]
    return {d.site: d.reason for d in step.decisions}


def fused(model: Any) -> dict[str, str]:
    (step,) = [s for s in model.report.steps if s.name == "lowering"]
    return {d.site: d.kernel or d.reason for d in step.decisions}


class Block(nn.Module):
    """As in BERT: product, dropout, sum, LayerNorm; and sums of other kinds."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.position = form, nn.Parameter(torch.randn(1, 5, 16))
        self.a, self.b, self.drop = nn.Linear(16, 16), nn.Linear(16, 16), nn.Dropout(0.5)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "norm":
            return self.norm(self.drop(self.a(x)) + x)
        if self.form == "either side":
            return self.norm(x + self.a(x))
        if self.form == "spreads":  # equal to the example's batch of one, and to no other
            return self.a(x) + self.position
        if self.form == "later":
            return self.a(x) + self.b(x)
        if self.form == "scaled":
            return torch.add(self.a(x), x, alpha=2)
        if self.form == "itself":
            y = self.a(x)
            return y + y
        if self.form == "number":
            return self.a(x) + 1
        if self.form == "in place":
            y = self.a(x)
            x = x.clone()
            return x.add_(y) * x
        y, kept = self.a(x), x.clone()
        kept = kept.mul(2)
        z = kept + 0
        kept.mul_(3)  # before the sum, behind the product
        return y + z * 0 + kept


needs_kernel = pytest.mark.skipif(int8_cpu.refusal() is not None, reason="no compiled kernel")


STATIC = {"scheme": "int8-static"}
OPTIONS = {
    "per token": {},
    "per tensor": {"activation": "per_tensor"},
    "static": {**STATIC, "smooth": None},
    "static, smooth": {**STATIC, "smooth": 0.5},
}


@needs_kernel
@pytest.mark.parametrize(
    "options", slow_but_named([OPTIONS], [("per token",), ("static, smooth",)])
)
def test_the_lowered_model_computes_the_same(options: Any, tmp_path: Any) -> None:
    lowered, plain = both(**options)
    assert fused(lowered) == {"q": "joined_int8_linear", "up": "int8_mlp_add"}
    for x in (X, X[:1], torch.randn(3, 7, 16)):
        with torch.no_grad():
            assert_reordered(lowered(x), plain(x))
    lowered.save(tmp_path)
    with torch.no_grad():
        assert_equal(load(tmp_path, Attends().eval())(X), lowered(X))


def test_products_of_one_input_are_the_same_bits() -> None:
    x = torch.randn(6, 16)
    layers = [int8.quantize_weight(torch.randn(n, 16)) for n in (16, 5, 24)]
    single = [int8.int8_linear(x, q, s) for q, s in layers]
    one, scale = (torch.cat(t) for t in zip(*layers, strict=True))
    joined = integers.joined_int8_linear(
        x, one, scale, None, None, None, None, "per_token", (16, 5, 24)
    )
    for a, b in zip(joined, single, strict=True):
        assert_equal(a.contiguous(), b)


SUMS: dict[str, dict[str, str]] = {
    "norm": {"a": "int8_linear_norm"},
    "either side": {"a": "int8_linear_norm"},
    "spreads": {"a": "int8_linear_add"},
    "later": {"b": "int8_linear_add"},
    "scaled": {},
    "itself": {},
    "number": {},
    "in place": {},
    "overwritten": {},
}


@needs_kernel
@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
@pytest.mark.parametrize("form", SUMS)
def test_a_sum_behind_a_product_is_part_of_it_where_it_can_be(form: str, scheme: str) -> None:
    torch.manual_seed(0)
    model, example = Block(form).eval(), X[:1]
    given: dict[str, Any] = {"calibration": [X]} if scheme == "int8-static" else {}
    lowered = rewrite(model, [Quantize(scheme)], example, **given)
    plain = unlowered(lowered)
    steps = [s for s in lowered.report.steps if s.name == "lowering"]
    done = {d.site: d.kernel for s in steps for d in s.decisions if d.action == "lowered"}
    assert {s: k for s, k in done.items() if k.endswith(("_add", "_norm"))} == SUMS[form]
    for x in (X, X[:1], X[:, :1] if form != "spreads" else X):
        with torch.no_grad():
            assert_reordered(lowered(x.clone()), plain(x.clone()))


@needs_kernel
def test_a_pickled_model_computes_the_same_bits() -> None:
    torch.manual_seed(0)
    lowered = rewrite(Block("norm").eval(), [Quantize()], X)
    again = pickle.loads(pickle.dumps(lowered))
    with torch.no_grad():
        assert_equal(again(X), lowered(X))
    bound = vars(again)["_rewriter"].lowered._bound
    assert [a.rule.fused.name for a in bound.applications] == ["int8_linear_norm"]


@needs_kernel
def test_a_dropout_that_drops_stays() -> None:
    torch.manual_seed(0)
    lowered = rewrite(Block("norm").eval(), [Quantize()], X)
    lowered.drop.train()
    lowered.drop.p = 1.0
    with torch.no_grad():
        assert_reordered(lowered(X), lowered.norm(X))


@needs_kernel
@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_a_changed_weight_is_noticed(options: Any) -> None:
    lowered, plain = both(**options)
    with torch.no_grad():
        before = lowered(X)
        for model in (lowered, plain):
            model.q.qweight.neg_()
            model.up.scale.mul_(2)
        assert_reordered(lowered(X), plain(X))
        assert not torch.equal(lowered(X), before)


@needs_kernel
@pytest.mark.parametrize("smooth", [None, 0.5])
def test_ranges_that_are_written_apart_are_each_ones_own(smooth: float | None) -> None:
    lowered, plain = both(scheme="int8-static", smooth=smooth)
    assert fused(lowered)["q"] == "joined_int8_linear"
    with torch.no_grad():
        for model in (lowered, plain):
            model.k.step.mul_(0.25)
            model.v.zero.sub_(40)
            if smooth is not None:
                model.q.multiplier.mul_(2)
        assert_reordered(lowered(X), plain(X))
        for model in (lowered, plain):  # and one again
            for layer in (model.k, model.v):
                layer.step.copy_(model.q.step)
                layer.zero.copy_(model.q.zero)
        assert_reordered(lowered(X), plain(X))


def test_layers_of_other_ranges_are_not_joined() -> None:
    class Apart(Attends):
        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x)

    torch.manual_seed(0)
    made = rewrite(Apart().eval(), [Quantize(**STATIC)], X, calibration=[X], lower=False)
    with torch.no_grad():
        made.k.step.mul_(2)
    assert "differ in how they quantize" in reasons(rewrite(made, [], X))["q"]


@needs_kernel
@pytest.mark.parametrize("act", [nn.GELU(approximate="tanh"), nn.Mish()], ids=["tanh", "mish"])
def test_what_no_kernel_has_is_a_reason(act: nn.Module) -> None:
    lowered, plain = both(act)
    assert fused(lowered)["up"] == "int8_linear_alone"
    assert "as its epilogue" in reasons(lowered)["up"]
    with torch.no_grad():
        assert_reordered(lowered(X), plain(X))


def test_without_the_compiled_kernel_the_activation_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "pick_kernel", lambda *_: "torch")
    lowered, _ = both()
    assert "has no epilogue" in fused(lowered)["up"]
    with torch.no_grad():
        found = int8.int8_linear_then(
            X, lowered.q.qweight, lowered.q.scale, lowered.q.bias, "per_token", "gelu", X, eps=1e-5
        )
        assert_reordered(
            found, nn.functional.layer_norm(nn.functional.gelu(lowered.q(X)) + X, (16,))
        )


def test_where_gradients_are_wanted_the_layers_run() -> None:
    lowered, plain = both()
    x = [X.clone().requires_grad_() for _ in range(2)]
    for model, own in zip((lowered, plain), x, strict=True):
        model(own).sum().backward()
    assert_equal(x[0].grad, x[1].grad)


INPUTS = {
    "as measured": lambda: torch.randn(2, 5, 24),
    "one row": lambda: torch.randn(24),
    "no rows": lambda: torch.randn(0, 24),
    "rows apart": lambda: torch.randn(2, 5, 48)[..., ::2],
    "bfloat16": lambda: torch.randn(5, 24, dtype=torch.bfloat16),
    "a row without a range": lambda: torch.randn(5, 24).index_fill(0, torch.tensor([3]), torch.inf),
}


@pytest.mark.parametrize("make", list(INPUTS.values()), ids=list(INPUTS))
@pytest.mark.parametrize("scheme", ["per_token", "per_tensor", "static"])
def test_what_a_model_runs_gives_the_bits_of_the_op(
    scheme: str, make: Callable[[], Tensor]
) -> None:
    torch.manual_seed(0)
    qweight, scale = int8.quantize_weight(torch.randn(16, 24))
    norm = torch.randn(16), torch.randn(16)
    ranges: tuple[Any, ...] = (None, None, None)
    if scheme == "static":
        ranges = torch.tensor([0.03]), torch.tensor([120], dtype=torch.uint8), torch.rand(24)
    own, activation = (qweight, scale, torch.randn(16), *ranges), scheme.replace("static", "")
    second = *int8.quantize_weight(torch.randn(8, 16)), None, None, None, None
    square = *int8.quantize_weight(torch.randn(16, 16)), torch.randn(16), *ranges[:2], None
    x = make()
    for fused, width, rest in (
        (integers.INT8_ACT, 0, (*own, None, None, activation, "gelu", None)),
        (integers.INT8_ADD, 16, (*own, None, None, activation, "", None)),
        (integers.INT8_NORM, 16, (*own, *norm, activation, "", 1e-5)),
        (integers.INT8_MLP, 0, (*own, *second, None, None, activation, "per_token", "gelu", None)),
        (
            integers.INT8_MLP_ADD,
            8,
            (*own, *second, None, None, activation, "per_token", "silu", None),
        ),
        (integers.INT8_MLP_NORM, 16, (*own, *square, *norm, activation, activation, "relu", 1e-5)),
        (integers.INT8_JOINED, 0, (*own, activation, (7, 9))),
    ):
        assert fused.bind is not None
        ready = fused.bind(*rest)
        added = torch.randn(*x.shape[:-1], width, dtype=x.dtype)
        for others in [(added,), (torch.randn(width),)] if width else [()]:
            want = fused.run(x, *others, *rest)
            assert_equal(ready(x, *others), want, equal_nan=True)


WRITES: dict[str, Callable[[Any], None]] = {
    "levels": lambda layer: layer.qweight.data.neg_(),
    "levels that lie otherwise": lambda layer: setattr(layer, "qweight", layer.qweight.mT),
    "the same by .data": lambda layer: setattr(layer.qweight, "data", layer.qweight.data.mT),
    "step": lambda layer: layer.step.data.mul_(4),
    "zero": lambda layer: layer.zero.data.add_(20),
}


@needs_kernel
@pytest.mark.parametrize("write", list(WRITES.values()), ids=list(WRITES))
def test_writes_that_torch_does_not_count_are_seen(write: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).eval()
    lowered = rewrite(model, [Quantize("int8-static")], X, calibration=[X])
    assert fused(lowered) == {"0": "int8_mlp"}
    with torch.no_grad():
        before = lowered(X)
        write(lowered[0])
        assert not torch.equal(lowered(X), before)
        assert_equal(lowered(X), copy.deepcopy(lowered)(X))


@needs_kernel
def test_a_step_that_is_none_is_an_error_of_the_lowered_model_too() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    lowered = rewrite(model, [Quantize("int8-static")], X, calibration=[X])
    for step in (0.0, -1.0, float("nan")):
        lowered[0].step.fill_(step)
        with torch.no_grad(), pytest.raises(ValueError, match="step must be above 0"):
            lowered(X)


@needs_kernel
def test_a_variance_beyond_float32_is_nan() -> None:
    lowered = rewrite(Block("norm").eval(), [Quantize()], X)
    assert fused(lowered) == {"a": "int8_linear_norm"}
    with torch.no_grad():
        assert lowered(X * 1e20).isnan().all()


# attention behind the products that make queries, keys and values


class SelfAttends(nn.Module):
    """Two heads of queries, `shared` of keys and values."""

    def __init__(self, form: str = "", shared: int = 2, **options: Any) -> None:
        super().__init__()
        self.form, self.shared, self.options = form, shared, options
        self.q, self.out = nn.Linear(24, 32), nn.Linear(32, 24)
        self.k, self.v = (nn.Linear(24, 16 * shared, bias=False) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, s, _ = x.shape
        v = self.v(x).view(b, s, self.shared, 16).transpose(1, 2)  # the first in the graph
        q = self.q(x).view(b, s, -1, 16).transpose(1, 2)
        other = x * 2 if self.form == "of another value" else x
        if self.form == "in windows":
            k = self.k(other).view(-1, 6, self.shared, 16).transpose(1, 2)
            q, v = (t.transpose(1, 2).reshape(-1, 6, 2, 16).transpose(1, 2) for t in (q, v))
        else:
            k = self.k(other).view(b, s, self.shared, 16).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, **self.options)
        if self.form == "heads first":
            return self.out(y.reshape(b, s, 32))
        y = self.out(y.transpose(1, 2).contiguous().view(b, s, 32))
        return y + k.sum() if self.form == "read again" else y


EXAMPLE = torch.linspace(-3, 3, 2 * 6 * 24).view(2, 6, 24).sin()


def attends(model: nn.Module, *more: Any, rules: Any = True, **options: Any) -> tuple[Any, Any]:
    """Lowered and plain."""
    pass_ = Quantize(**options)
    given: dict[str, Any] = {"calibration": [EXAMPLE]} if pass_.needs_calibration else {}
    example = (EXAMPLE, *more)
    model = model.eval()
    lowered = rewrite(model, [pass_], example, lower=rules, **given)
    return lowered, unlowered(lowered)


HOW = {"plain": {}, "causal": {"is_causal": True, "scale": 0.3}, "shared": {"shared": 1}}
needs_attention = pytest.mark.skipif(
    int8_cpu.refusal() is not None or attention.unavailable() is not None,
    reason="no compiled kernel",
)


@needs_attention
@pytest.mark.parametrize(
    ("how", "options"),
    slow_but_named(
        [HOW, OPTIONS],
        [("plain", "static, smooth"), ("causal", "per token"), ("shared", "static"),
         ("plain", "per tensor")],
    ),
)  # fmt: skip
def test_attention_is_one_op_with_the_products_before_it(
    how: dict[str, Any], options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "pick", lambda *_: "native")
    torch.manual_seed(0)
    how = {"enable_gqa": True, **how} if "shared" in how else how
    model = SelfAttends(**how)
    for rules, dtype in ((FLOAT32_RULES, None), (True, torch.bfloat16)):
        lowered, plain = attends(model, rules=rules, **options)
        assert fused(lowered) == {"v": "int8_attention", "out": "int8_linear_alone"}
        for x in (EXAMPLE, EXAMPLE[:1], torch.randn(3, 11, 24), torch.randn(8, 4, 24)):
            with torch.no_grad():
                assert_reordered(lowered(x), plain(x), dtype)


@needs_attention
def test_attention_with_a_mask_and_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "pick", lambda *_: "native")
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 1, 6) > 0.3
    lowered, plain = attends(SelfAttends(), mask, rules=FLOAT32_RULES)
    assert fused(lowered) == {"v": "int8_attention", "out": "int8_linear_alone"}
    more = torch.randn(4, 9, 24), torch.rand(4, 1, 1, 9) > 0.3
    spoiled, wide = EXAMPLE.clone(), EXAMPLE.clone()
    spoiled[1, 2, 3], wide[0, 1, :2] = torch.nan, torch.tensor([3e38, -3e38])
    with torch.no_grad():
        for given in ((EXAMPLE, mask), more):
            assert_reordered(lowered(*given), plain(*given))
        for x, clean in ((spoiled, 0), (wide, 1)):
            found, want = lowered(x, mask), plain(x, mask)
            assert_equal(found.isnan(), want.isnan())
            assert_reordered(found[clean], want[clean])


@needs_attention
@pytest.mark.parametrize("form", ["of another value", "in windows", "heads first", "read again"])
def test_attention_of_another_shape_is_not_that_op(form: str) -> None:
    torch.manual_seed(0)
    lowered, plain = attends(SelfAttends(form), rules=FLOAT32_RULES)
    assert "int8_attention" not in fused(lowered).values()
    with torch.no_grad():
        assert_reordered(lowered(EXAMPLE), plain(EXAMPLE))


@needs_attention
@pytest.mark.parametrize("bf16", [False, True])
def test_attention_behind_a_product_is_the_same_on_any_number_of_threads(bf16: bool) -> None:
    if bf16 and attention.bf16_unavailable() is not None:
        pytest.skip(str(attention.bf16_unavailable()))
    qweight, scale = int8.quantize_weight(torch.randn(4 * 16, 20))
    sums = qweight.sum(-1, dtype=torch.int32)
    product = int8_cpu.Linear(int8_cpu.pack(qweight), 20, scale, sums, None)
    attend = Attend(product, 2, 1, 16, None, False, bf16)
    threads = torch.get_num_threads()
    try:
        for batch, rows in ((1, 3), (2, 70), (3, 40), (16, 5)):
            x = torch.randn(batch, rows, 20)
            y = product(x)[0].view(batch, rows, 4, 16).transpose(1, 2)
            operands = y[:, :2], y[:, 2:3], y[:, 3:]
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found, wide = attend(x)
                want = attention.native(*operands, bf16=bf16).transpose(1, 2).flatten(2)
                assert not wide
                assert_equal(found, want)
    finally:
        torch.set_num_threads(threads)


@needs_attention
@pytest.mark.parametrize("scheme", slow_but(["int8-dynamic", "int8-static"], 1))
def test_attention_as_one_op_is_copied_saved_and_follows_its_weights(
    scheme: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(attention, "pick", lambda *_: "native")
    torch.manual_seed(0)
    lowered, plain = attends(SelfAttends(), rules=True, scheme=scheme)
    assert fused(lowered) == {"v": "int8_attention", "out": "int8_linear_alone"}
    lowered.save(tmp_path)
    with torch.no_grad():
        want = lowered(EXAMPLE)
        loaded = load(tmp_path, SelfAttends().eval())
        for again in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered)), loaded):
            assert_equal(again(EXAMPLE), want)
        for model in (lowered, plain):
            model.q.scale.mul_(2)
            if scheme == "int8-static":  # no one range for all three any more
                model.k.step.mul_(1.5)
        assert_reordered(lowered(EXAMPLE), plain(EXAMPLE), torch.bfloat16)
        assert_reordered(
            lowered.double()(EXAMPLE.double()), plain.double()(EXAMPLE.double()), torch.float32
        )
