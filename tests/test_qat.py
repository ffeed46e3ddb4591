"""QAT: what trains with the rounding of a scheme, and becomes that scheme's layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from marks import slow_but, slow_but_named
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter import load, rewrite, save
from rewriter.base import Layer, Phase, Skip
from rewriter.errors import OptionError
from rewriter.kernels.straight_through import (
    CONV_RECORD,
    RECORD,
    straight_through,
    straight_through_conv,
)
from rewriter.passes import (
    QAT,
    Int4Conv1d,
    Int4Conv2d,
    Quantize,
    TrainedConv1d,
    TrainedConv2d,
    TrainedLinear,
)
from rewriter.passes.trained import TRAINED
from rewriter.sites import CONV, LINEAR, Site

OPTIONS: list[dict[str, Any]] = [
    {"scheme": "int8-dynamic"},
    {"scheme": "int8-dynamic", "activation": "per_tensor"},
    {"scheme": "int8-weight"},
    {"scheme": "int4-weight", "group_size": 32},
    {"scheme": "int4-weight", "symmetric": False},
    {"scheme": "int4-dynamic"},
]
LEARNED = [{"learned_step": True, **o} for o in OPTIONS if o.get("symmetric", True)]


def named(options: dict[str, Any]) -> str:
    return " ".join(str(v) for v in options.values())


EVERY = pytest.mark.parametrize("options", OPTIONS + LEARNED, ids=named)


class Net(nn.Module):
    """Literals of every sort that depend on the mode, or do not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(40, 48), nn.BatchNorm1d(48, eps=1e-3, momentum=0.3)
        self.drop, self.two = nn.Dropout(0.4), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.gelu(self.norm(self.one(0.7 * x)), approximate="tanh"))
        return self.two(F.dropout(x, 0.2, self.training)).clamp(-3, 1e4)


X = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = F.cross_entropy(model(X), torch.arange(16) % 10)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def without(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "learned_step"}


@pytest.mark.parametrize("options", slow_but(OPTIONS + LEARNED, 0, 4, 7, 9), ids=named)
def test_what_was_trained_becomes_integers_of_equal_outputs(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = rewrite(Net(), [QAT(**options)], X).train()
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    losses = [step(made, optimizer) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in made.named_parameters())
    made.eval()
    integers = rewrite(made, [Quantize(**without(options))], X)
    assert [d.error for d in integers.report.steps[1].decisions] == [0.0, 0.0]
    assert not any(isinstance(m, TrainedLinear) for m in integers.modules())
    for mode in (True, False):
        both = []
        for model in (integers, made):
            torch.manual_seed(1)
            both.append(copy.deepcopy(model).train(mode)(X))
        assert_equal(*both)


def by_hand(model: nn.Module, **options: Any) -> nn.Module:
    """What the pass does, on the original code."""
    model = copy.deepcopy(model)
    for name in ("one", "two"):
        old = getattr(model, name)
        setattr(model, name, TrainedLinear.from_weight(old.weight, old.bias, **options))
    return model


def test_train_and_eval_change_what_they_changed_before() -> None:
    torch.manual_seed(0)
    model = Net().train()
    want, made = by_hand(model, scheme="int4-weight"), rewrite(model, [QAT("int4-weight")], X)
    integers = rewrite(made, [Quantize("int4-weight")], X)
    for mode in (False, True, True, False):
        results = []
        for each in (want, made, integers):
            torch.manual_seed(2)
            results.append(each.train(mode)(X))
        assert_equal(results[1], results[0])
        assert_equal(results[2], results[0])
    assert_equal(dict(made.norm.state_dict()), dict(want.norm.state_dict()))
    assert_equal(dict(integers.norm.state_dict()), dict(want.norm.state_dict()))
    assert made.drop.p == integers.drop.p == 0.4


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_gradients_pass_rounding_as_if_it_were_none(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = TrainedLinear(40, 8, **options)
    x, g = X.clone().requires_grad_(), torch.randn(16, 8)
    layer(x).backward(g)
    assert_reordered(x.grad, g @ layer.dense_weight())
    assert_reordered(layer.weight.grad, g.t() @ X)
    assert_reordered(layer.bias.grad, g.sum(0))


@pytest.mark.parametrize("options", LEARNED, ids=named)
def test_a_learned_step_gets_the_gradient_of_the_paper(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = TrainedLinear(72, 8, bias=False, **options)  # 64 + 8: the last group is filled up
    low, high = TRAINED[layer.scheme].range
    with torch.no_grad():
        layer.step *= 0.6  # some weights lie beyond the levels
        layer.step[2] *= -1  # a scale is above zero, whatever an optimizer does
    x, g = torch.randn(16, 72), torch.randn(16, 8)
    layer(x).backward(g)
    slope, (q, scale, _) = g.t() @ x, layer.levels()
    assert scale.min() > 0
    assert q.min() == low
    size = 72 if scale.dim() == 1 else layer.group_size
    wide = scale.float().view(8, -1).repeat_interleave(size, 1)[:, :72]
    ratio, q = layer.weight.detach() / wide, q[:, :72].float()
    inside = (ratio >= low) & (ratio <= high)
    assert 0.5 < inside.float().mean() < 1
    assert_reordered(layer.weight.grad, slope * inside)
    each = slope * torch.where(inside, q - ratio, q)
    each = F.pad(each, (0, -72 % size)).unflatten(1, (-1, size)).sum(-1) / (size * high) ** 0.5
    want = each.view_as(layer.step) * layer.step.detach().sign()
    assert_reordered(layer.step.grad, want)


def test_options() -> None:
    assert QAT.matches == (LINEAR, CONV)
    assert QAT().kinds == (LINEAR,)
    assert QAT.phase is Phase.PRECISION
    assert QAT.parse("int4-weight, group_size=32, learned_step=true") == QAT(
        "int4-weight", group_size=32, learned_step=True
    )
    with pytest.raises(
        OptionError, match="QAT: scheme='int4weight' is unknown; did you mean 'int4"
    ):
        QAT("int4weight")
    with pytest.raises(OptionError, match="'int8-weight' does not read group_size"):
        QAT("int8-weight", group_size=32)
    with pytest.raises(OptionError, match="learned_step=True trains steps, and no zeros"):
        QAT("int4-weight", symmetric=False, learned_step=True)
    both = "train for 'int8-dynamic' and 'int4-dynamic' alone, not for 'int4-weight'"
    with pytest.raises(OptionError, match=both):
        QAT("int4-weight", convolutions=True)
    with pytest.raises(OptionError, match="TrainedConv2d: scheme='int4-weight'"):
        TrainedConv2d(4, 4, 3, scheme="int4-weight")
    with pytest.raises(OptionError, match="TrainedLinear: group_size"):
        TrainedLinear(4, 4, group_size=3)
    with pytest.raises(OptionError, match="TrainedConv2d: activation='per_token'"):
        TrainedConv2d(4, 4, 3, activation="per_token")
    with pytest.raises(OptionError, match="TrainedConv2d: .*divisible by groups"):
        TrainedConv2d(4, 4, 3, groups=3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_skips_weights_that_are_no_finite_floats(bad: float) -> None:
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[3, 3] = bad
    answer = QAT().propose(Site.of(layer))
    assert isinstance(answer, Skip)
    assert "NaN or inf" in answer.reason
    layer = nn.Linear(8, 8, dtype=torch.complex64)
    assert "torch.complex64" in QAT().propose(Site.of(layer)).reason


@pytest.mark.parametrize(
    ("options", "quantize"),
    [
        ({}, Quantize("int8-weight")),
        ({}, Quantize("int8-dynamic", "per_tensor")),
        ({"scheme": "int4-weight"}, Quantize("int4-dynamic")),
        ({"scheme": "int4-weight"}, Quantize("int4-weight", group_size=128)),
    ],
    ids=str,
)
def test_other_options_than_those_trained_for_are_skipped(
    options: dict[str, Any], quantize: Quantize
) -> None:
    answer = quantize.propose(Site.of(TrainedLinear(64, 8, **options)))
    assert isinstance(answer, Skip)
    assert f"trained for Quantize(scheme={options.get('scheme', 'int8-dynamic')!r}" in answer.reason


@EVERY
def test_it_is_an_nn_linear_that_copies_and_loads(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(40, 12)
    layer = TrainedLinear.from_weight(dense.weight, dense.bias, **options)
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert set(layer.state_dict()) - set(dense.state_dict()) == (
        {"step"} if layer.learned_step else set()
    )
    want = layer(X)
    assert sqnr(want, dense(X)) > (15 if "4" in layer.scheme else 35)
    assert_equal(copy.deepcopy(layer)(X), want)
    assert_equal(pickle.loads(pickle.dumps(layer))(X), want)
    built = TrainedLinear(**layer.config(), device="meta").to_empty(device="cpu")
    built.load_state_dict(layer.state_dict())
    assert_equal(built(X), want)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(X.bfloat16()).dtype == torch.bfloat16
    assert layer(X[:0]).shape == (0, 12)
    assert TrainedLinear(40, 12, **options, device="meta")(X.to("meta")).shape == (16, 12)


@pytest.mark.parametrize("options", [OPTIONS[0], LEARNED[-1]], ids=named)
def test_compile_and_export(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = TrainedLinear(40, 12, **options)
    want = layer(X)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = compiled(X)
    assert_equal(found, want)
    for each in (found, want):
        each.square().sum().backward()
    assert_equal(torch.export.export(layer, (X,)).module()(X), want)


def test_zero_and_constant_rows_train() -> None:
    for options in OPTIONS + LEARNED:
        layer = TrainedLinear(40, 3, **options)
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.weight[1:2], 0.5)
        layer(X).sum().backward()
        assert layer(X)[:, 0].sub(layer.bias[0]).abs().max() < 1e-4
        assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_layers_narrower_than_a_group_are_saved(tmp_path: Any) -> None:
    model, x = nn.Sequential(nn.Linear(16, 3)), torch.randn(2, 16)
    made = rewrite(model, [QAT("int4-weight")], x)
    save(made, tmp_path / "made")
    assert_equal(load(tmp_path / "made", model)(x), made(x))


def test_tensor_parallel_is_refused() -> None:
    with pytest.raises(OptionError, match="TrainedLinear cannot be split as a dense layer is"):
        bool(TrainedLinear(4, 4)._distribute_module_applied)


# convolutions


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, (3, 2), padding="same", groups=4), nn.Hardswish(), nn.Conv2d(8, 12, 1),
        )  # fmt: skip
        self.line, self.head = nn.Conv1d(12, 6, 3, dilation=2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.line(self.body(x).flatten(2)).amax(2))


CONVS: list[dict[str, Any]] = [
    {"scheme": "int8-dynamic"},
    {"scheme": "int8-dynamic", "activation": "per_tensor"},
    {"scheme": "int4-dynamic"},
]


@pytest.mark.parametrize(
    ("options", "learned"),
    slow_but_named(
        [{named(o): o for o in CONVS}, {"fixed": False, "learned": True}],
        [("int8-dynamic", "learned"), ("int4-dynamic", "fixed")],
    ),
)
def test_convolutions_train_and_become_integers(options: dict[str, Any], learned: bool) -> None:
    torch.manual_seed(0)
    model, x = Images(), torch.randn(6, 3, 12, 10)
    trains = QAT(**options, convolutions=True, learned_step=learned)
    made = rewrite(model, [trains], x).train()
    assert sum(n.endswith("step") for n, _ in made.named_parameters()) == 5 * learned
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    kinds = [type(m) for m in made.modules() if isinstance(m, Layer)]
    assert kinds == [TrainedConv2d, TrainedConv2d, TrainedLinear, TrainedConv1d, TrainedLinear]
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(made(x), torch.arange(6) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in made.named_parameters())
    made.eval()
    integers = rewrite(made, [Quantize(**options)], x, lower=False)
    fours = [type(m) for m in integers.modules() if type(m) in (Int4Conv1d, Int4Conv2d)]
    four = options["scheme"] == "int4-dynamic"
    assert fours == ([Int4Conv2d, Int4Conv2d, Int4Conv1d] if four else [])
    assert [d.error for d in integers.report.steps[1].decisions] == [0.0] * 5
    assert not any("trained" in m.op for m in integers.modules() if isinstance(m, Layer))
    for mode in (True, False):
        both = [copy.deepcopy(m).train(mode)(x) for m in (integers, made)]
        assert_equal(*both)


def test_calibration_of_what_trained_is_of_linear_layers_alone() -> None:
    model, x = Images().eval(), torch.randn(6, 3, 12, 3)  # as wide as it has channels
    made = rewrite(model, [QAT("int4-dynamic", convolutions=True)], x)
    integers = rewrite(made, [Quantize("int4-dynamic")], x, calibration=[x], lower=False)
    errors = [d.output_error for d in integers.report.replaced]
    assert [e is None for e in errors] == [True, True, False, True, False]
    assert_equal(integers(x), made(x))


def test_a_learned_step_of_a_convolution_gets_the_gradient_of_the_paper() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False)
    layer = TrainedConv2d.from_conv(conv, scheme="int4-dynamic", learned_step=True)
    with torch.no_grad():
        layer.step *= 0.6  # some weights lie beyond the levels
    x = torch.randn(3, 4, 9, 8)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    q, scale = layer.levels()
    assert (int(q.min()), int(q.max())) == (-8, 7)
    ratio = conv.weight.detach() / scale.view(-1, 1, 1, 1)
    inside = (ratio >= -8) & (ratio <= 7)
    slope = torch.nn.grad.conv2d_weight(x, conv.weight.shape, g, 2, 1, groups=2)
    assert_reordered(layer.weight.grad, slope * inside)
    each = slope * torch.where(inside, q - ratio, q.float())
    assert_reordered(layer.step.grad, each.sum((1, 2, 3)) / (2 * 9 * 7) ** 0.5)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int4-dynamic"])
@pytest.mark.parametrize(
    ("conv", "x"),
    [
        (nn.Conv2d(4, 6, (2, 3), (2, 1), padding="valid", groups=2), torch.randn(3, 4, 8, 9)),
        (nn.Conv1d(4, 6, 4, padding="same", dilation=2, bias=False), torch.randn(4, 20)),
    ],
    ids=["2d", "1d"],
)
def test_a_trained_convolution_is_one_of_torchs(conv: Any, x: Tensor, scheme: str) -> None:
    cls = TrainedConv2d if isinstance(conv, nn.Conv2d) else TrainedConv1d
    layer = cls.from_conv(conv, scheme=scheme)
    assert layer.weight is conv.weight
    assert layer.state_dict().keys() == conv.state_dict().keys()
    y, want = layer(x), conv(x)
    assert sqnr(y, want) > (35 if scheme == "int8-dynamic" else 13)
    g = torch.randn_like(y)
    (got,), (plain,) = (torch.autograd.grad(v, conv.weight, g) for v in (y, want))
    assert_reordered(got, plain)
    built = cls(**layer.config(), device="meta").to_empty(device="cpu")
    built.load_state_dict(layer.state_dict())
    assert_equal(built(x), y)
    assert_equal(pickle.loads(pickle.dumps(layer))(x), y)
    assert_equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), y)
    answer = Quantize(activation="per_tensor").propose(Site.of(layer))
    own = ", activation='per_token'" if scheme == "int8-dynamic" else ""
    assert f"trained for Quantize(scheme={scheme!r}{own})" in answer.reason
    answer = Quantize("int4-weight").propose(Site.of(layer))
    assert "no layer for a trained_conv" in answer.reason
    assert "taken by int4-dynamic, int8-dynamic" in answer.reason


def test_convolutions_that_int8_has_no_kernel_for_are_skipped() -> None:
    for conv, reason in (
        (nn.ConvTranspose2d(4, 4, 3), "transposed"),
        (nn.Conv3d(4, 4, 3), "3 dimensions"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    ):
        assert reason in QAT(convolutions=True).propose(Site.of(conv)).reason


# the op


def test_the_op_hands_the_gradient_on() -> None:
    torch.manual_seed(0)
    y, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    x, g = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    found = straight_through(y, x, weight)
    assert_equal(found, y)
    found.backward(g)
    assert_equal(y.grad, g)
    assert_reordered(weight.grad, torch.einsum("abo,abi->oi", g, x))
    torch.library.opcheck(RECORD.op.default, (y, x, weight))

    def loss(weight: Tensor) -> Tensor:
        return (straight_through(y, x, weight) * g).sum()

    assert_reordered(torch.func.grad(loss)(weight), weight.grad)
    batched = torch.vmap(straight_through, in_dims=(0, 0, None))(y, x, weight)
    assert_equal(batched, y)
    with pytest.raises(ValueError, match=r"x \[2, 3, 4\] and weight \[4, 5\] are not of one"):
        straight_through(y, x[..., :4], weight)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_op_hands_on_the_gradient_of_a_convolution(groups: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4 // groups, 3, 2, requires_grad=True)
    x, geometry = torch.randn(2, 4, 7, 8), ([2, 1], [1, 0], [1, 2], groups)
    want = F.conv2d(x, weight, None, *geometry)
    y, g = want.detach().clone().requires_grad_(), torch.randn_like(want)
    found = straight_through_conv(y, x, weight, *geometry)
    assert_equal(found, y)
    found.backward(g)
    assert_equal(y.grad, g)
    assert_reordered(weight.grad, torch.autograd.grad(want, weight, g)[0])
    torch.library.opcheck(CONV_RECORD.op.default, (y, x, weight, *geometry))

    def loss(weight: Tensor) -> Tensor:
        return (straight_through_conv(y, x, weight, *geometry) * g).sum()

    assert_reordered(torch.func.grad(loss)(weight), weight.grad)
