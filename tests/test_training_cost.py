"""The cost of a training step against a real one: FlopCounterMode, and real allocations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _tracker import Tracker
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rewriter import explain, rewrite
from rewriter.cost import StepCost, Training, Work, propagate, step_cost
from rewriter.errors import VerifyError
from rewriter.passes import Monarch, Quadratic, Quantize, TopK

aten = torch.ops.aten


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-6),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-6, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-6),
}


def train(
    model: nn.Module, inputs: Sequence[Tensor], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """One step on the loss, or on all results where there is none."""
    out = model(*inputs)
    results = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.grad_fn is not None]
    ends = [t for t in results if not t.dim()][:1] or results
    torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
    if optimizer is not None:
        optimizer.step()
    model.zero_grad()


def real_peak(model: nn.Module, inputs: Sequence[Tensor], name: str) -> int:
    """Of the second step, when the optimizer's state exists."""
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    train(model, inputs, optimizer)
    states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    with Tracker([*model.parameters(), *model.buffers(), *inputs, *states]) as real:
        train(model, inputs, optimizer)
    return real.peak


def real_flops(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        train(model, inputs)
    return counter.get_total_flops()


def priced(model: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, StepCost, Training]:
    """The traced model and the cost of a step of it."""
    gm = fx.symbolic_trace(model.train())
    step = step_cost(gm, [(gm, gm.graph, inputs)])
    assert step.training is not None
    return gm, step, step.training


def flops_of(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """FLOPs by op of a step."""
    _, step, training = priced(model, *inputs)
    assert step.errors == []
    found: dict[str, int] = {}
    for work in training.work:
        if work.flops:
            found[work.op] = found.get(work.op, 0) + work.flops * work.count
    return found


class Call(nn.Module):
    """A function of the input and of a trained parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape) * 0.1)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


# random networks


class Block(nn.Module):
    """One step of a random network over [batch, tokens, 8]; `earlier` are its predecessors."""

    def __init__(self, kind: str, tied: nn.Linear) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("linear", "residual", "gated", "in place"):
            self.layer: nn.Module = nn.Linear(8, 16 if kind == "gated" else 8, bias=kind != "gated")
        elif kind == "tied":
            self.layer = tied
        elif kind == "norm":
            self.layer = nn.LayerNorm(8)
        elif kind == "batch norm":
            self.layer = nn.BatchNorm1d(8)
        elif kind == "conv":
            self.layer = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        elif kind in ("attention", "attention by hand"):
            self.layer = nn.Linear(8, 24)
        elif kind == "frozen":
            self.layer = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        if kind in ("linear", "tied", "norm", "frozen"):
            return self.layer(x)
        if kind == "residual":
            return x + F.gelu(self.layer(x))
        if kind == "gated":
            parts = self.layer(x).chunk(2, -1)
            return F.silu(parts[0]) * parts[1]
        if kind == "in place":
            return self.layer(x).add_(x).relu_()
        if kind in ("conv", "batch norm"):
            return self.layer(x.transpose(1, 2)).transpose(1, 2)
        if kind == "attention":
            parts = self.layer(x).split(8, -1)
            q, k, v = (parts[i].unflatten(-1, (2, 4)).transpose(1, 2) for i in range(3))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if kind == "attention by hand":
            parts = self.layer(x).split(8, -1)
            q, k, v = (parts[i] for i in range(3))
            return (q @ k.transpose(1, 2)).softmax(-1) @ v
        if kind == "views":
            return torch.cat([x[..., 4:], x[..., :4] * 2], -1)
        if kind == "dropout":
            return F.dropout(x, 0.5, self.training)
        assert kind == "detour"
        return x * x.detach().mean(-1, keepdim=True).sigmoid()


KINDS = (
    "linear", "tied", "norm", "frozen", "residual", "gated", "in place", "conv", "batch norm",
    "attention", "attention by hand", "views", "dropout", "detour",
)  # fmt: skip


class Net(nn.Module):
    def __init__(self, kinds: Sequence[str], loss: bool) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(kind, self.head) for kind in kinds)
        self.loss = loss

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        x = self.head(x)
        return (x.square().mean(), x) if self.loss else x


@settings(max_examples=25)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    batch=st.integers(1, 5),
    tokens=st.integers(2, 9),
    loss=st.booleans(),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
)
def test_random_networks_cost_what_they_cost(
    kinds: list[str], batch: int, tokens: int, loss: bool, optimizer: str
) -> None:
    x = torch.randn(batch, tokens, 8)
    gm, step, training = priced(Net(kinds, loss), x)
    assert step.errors == []
    assert step.counted_by_torch == real_flops(gm, [x])
    assert training.flops == 2 * training.macs
    if "conv" not in kinds:  # which torch counts too high where it is grouped
        assert training.flops >= step.counted_by_torch
    assert training.peaks[optimizer] == real_peak(gm, [x], optimizer)
    gm.eval()
    inference = propagate(gm, gm.graph, [x])
    with Tracker([*gm.parameters(), *gm.buffers(), x]) as real, torch.no_grad():
        gm(x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gm(x)
    assert inference.total.peak_bytes == real.peak
    assert inference.counted_by_torch == counter.get_total_flops()


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_a_grouped_convolution_trains_at_three_times_its_forward(groups: int) -> None:
    """`FlopCounterMode` leaves the groups out of the weight's gradient; we do not."""
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    gm, step, training = priced(nn.Sequential(nn.Conv2d(16, 16, 3, groups=groups)), x)
    forward = 2 * 2 * 16 * 36 * (16 // groups) * 9
    assert training.flops == 3 * forward
    assert step.counted_by_torch == (2 + groups) * forward == real_flops(gm, [x])


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, groups=4, stride=2),
        nn.Hardswish(),
        nn.ConvTranspose2d(32, 8, 3, stride=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(16, 32, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bag = nn.Embedding(50, 16), nn.EmbeddingBag(50, 16, mode="sum")
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.head(self.embed(ids) + self.bag(ids)[:, None])
        return F.cross_entropy(x.flatten(0, 1), ids.flatten())


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv": (conv_net, torch.randn(2, 3, 32, 32)),
    "gru": (lambda: Recurrent(nn.GRU), torch.randn(2, 7, 16)),
    "words": (Words, torch.randint(0, 50, (3, 7))),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_models_cost_what_they_cost(name: str, optimizer: str) -> None:
    make, x = MODELS[name]
    gm, step, training = priced(make(), x)
    assert step.errors == []
    assert step.counted_by_torch == real_flops(gm, [x])
    assert training.peaks[optimizer] == real_peak(gm, [x], optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_onednn_keeps_for_the_backward_of_an_lstm(optimizer: str) -> None:
    """The size of its workspace is its own affair; it is known to 1 %."""
    model, x = nn.Sequential(nn.LSTM(128, 256, batch_first=True)), torch.randn(8, 32, 128)
    gm, step, training = priced(model, x)
    assert step.errors == []
    assert training.peaks[optimizer] == pytest.approx(real_peak(gm, [x], optimizer), rel=0.01)


@pytest.mark.parametrize(
    "change",
    [Monarch(nblocks=2), Quadratic(), TopK(k=0.5), Quantize("int8-dynamic")],
    ids=["monarch", "quadratic", "topk", "int8"],
)
def test_rewritten_models_cost_what_they_cost(change: Any) -> None:
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
    x = torch.randn(48, 32)
    optimized = rewrite(model, [change], x)
    report = optimized.report
    assert report.errors == []
    training = report.after.training
    assert training is not None
    assert report.after.train_peak_bytes == training.peaks["adam"]
    optimized.train()
    for name in OPTIMIZERS:
        assert training.peaks[name] == real_peak(optimized, [x], name)
    assert training.flops == real_flops(optimized, [x])


# formulas


def test_attention_backward_on_a_cpu_recomputes_the_scores() -> None:
    def attention(x: Tensor, w: Tensor) -> Tensor:
        q, k = x * w[0], x[:, :, :5] * w[1]
        return F.scaled_dot_product_attention(q, k, k[..., :8])

    found = flops_of(Call(attention, 2, 1, 1, 1, 8), torch.randn(2, 3, 11, 8))
    pair = 2 * 2 * 3 * 11 * 5 * 8  # one product over batch, heads, queries, keys, width
    assert found == {
        "aten::_scaled_dot_product_flash_attention_for_cpu": 2 * pair,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": 5 * pair,
    }


def test_recurrent_backward_is_twice_the_forward() -> None:
    model = Recurrent(nn.LSTM)
    found = flops_of(model, torch.randn(2, 7, 16))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert found["aten::mkldnn_rnn_layer"] == 2 * 2 * 7 * matrices
    assert found["aten::mkldnn_rnn_layer_backward"] == 2 * found["aten::mkldnn_rnn_layer"]


def test_products_that_torch_leaves_at_zero() -> None:
    x = torch.randn(6, 5)
    vector = flops_of(Call(lambda x, w: torch.mv(x, w).sum(), 5), x)
    assert vector == {"aten::mv": 2 * 2 * 30}  # y = Xw, and dw = Xᵀdy
    distance = flops_of(Call(lambda x, w: torch.cdist(x, w, p=1.0).sum(), 4, 5), x)
    assert distance == {
        "aten::_cdist_forward": 2 * 6 * 4 * 5,
        "aten::_cdist_backward": 2 * 6 * 4 * 5,
    }


def test_grouped_products_meet_their_own_group_alone() -> None:
    ends = torch.tensor([3, 8], dtype=torch.int32)

    def experts(x: Tensor, w: Tensor) -> Tensor:
        return torch._grouped_mm(x, w, offs=ends)

    x, weight = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(2, 16, 24)
    model = Call(experts, 1)
    model.weight = nn.Parameter(weight.bfloat16())
    found = flops_of(model, x.requires_grad_())
    assert found == {"aten::_grouped_mm": 3 * 2 * 8 * 16 * 24}  # Y = XW, dX = dYWᵀ, dW = XᵀdY


@pytest.mark.parametrize("mask", [(True, True, True), (False, True, True), (True, False, False)])
def test_linear_backward_counts_what_is_asked_for(mask: tuple[bool, bool, bool]) -> None:
    from rewriter.cost.formulas import flop_formula

    x, grad, weight = torch.randn(7, 5), torch.randn(7, 3), torch.randn(3, 5)
    formula = flop_formula(aten.linear_backward.default)[0]
    assert formula is not None
    out = (None, None, None)
    assert formula(x, grad, weight, mask, out_val=out) == 2 * 7 * 5 * 3 * sum(mask[:2])


def test_every_op_with_flops_is_of_a_kind_that_multiplies() -> None:
    from rewriter.cost.formulas import _EXTRA
    from rewriter.cost.work import MATRIX, plain_kind

    plain = {"aten::_cdist_backward", "aten::_trilinear"}  # sums of products element by element
    plain |= {"aten::_native_multi_head_attention", "aten::_transformer_encoder_layer_fwd"}  # mixed
    kinds = {name: plain_kind(name, False, False) for name in _EXTRA if name not in plain}
    assert {n: k for n, k in kinds.items() if k not in {*MATRIX, "fft"}} == {}


# traffic


def moved(model: nn.Module, x: Tensor, op: str) -> tuple[int, int]:
    """(bytes read, bytes written) by one op of a step."""
    _, _, training = priced(model, x)
    (found,) = {(w.bytes_read, w.bytes_written) for w in training.work if w.op == f"aten::{op}"}
    return found


def test_traffic_of_backward_ops() -> None:
    x = torch.randn(10, 6)  # 240 bytes
    rows = torch.tensor([1, 2, 1])  # 24 bytes
    picked = 3 * 24
    words = nn.Embedding(100, 6)
    # zeros, then each row is read, added to and written
    assert moved(words, rows, "embedding_dense_backward") == (24 + 2 * picked, 2400 + picked)
    slices = Call(lambda x, w: w[:, 1:3], 10, 6)
    assert moved(slices, x, "slice_backward") == (80, 240 + 80)
    selected = Call(lambda x, w: w.select(0, 1), 10, 6)
    assert moved(selected, x, "select_backward") == (24, 240 + 24)
    indexed = Call(lambda x, w: w[rows], 10, 6)
    # the zeros are copied, then each row is read, added to and written
    placed = (240 + 24 + 2 * picked, 240 + picked)
    assert moved(indexed, x, "index_put") == placed
    gathered = Call(lambda x, w: w.gather(0, rows[:, None].expand(3, 6)), 10, 6)
    assert moved(gathered, x, "scatter_add") == placed  # an expanded index holds three numbers
    pooled = Call(lambda x, w: F.max_pool2d(w, 2), 1, 1, 4, 4)
    assert moved(pooled, x, "max_pool2d_with_indices_backward") == (16 + 32 + 16, 64 + 16)
    assert moved(Call(lambda x, w: (w * x).sum(), 10, 6), x, "ones_like") == (0, 4)


def test_traffic_of_scattering_ops() -> None:
    def cost(function: Callable[[Tensor], Any]) -> tuple[int, int]:
        class Once(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return function(x)

        gm = fx.symbolic_trace(Once())
        work = propagate(gm, gm.graph, [torch.randn(10, 6)]).total.work
        (one,) = (w for w in work if w.kind == "gather")
        return one.bytes_read, one.bytes_written

    rows, values = torch.tensor([1, 2]), torch.randn(2, 6)  # 16 and 48 bytes
    scalar = torch.tensor(0.0)
    mask = torch.ones(10, dtype=torch.bool)
    assert cost(lambda x: x.index_put_((rows,), values)) == (16 + 48, 48)
    assert cost(lambda x: x.index_put((rows,), values)) == (240 + 16 + 48, 240 + 48)
    assert cost(lambda x: x.index_put_((rows,), values, accumulate=True)) == (16 + 48 + 48, 48)
    assert cost(lambda x: x.index_put_((rows,), scalar)) == (16 + 4, 48)
    assert cost(lambda x: x.index_put_((mask,), scalar)) == (10 + 4, 240)
    assert cost(lambda x: x.index_add(0, rows, values)) == (240 + 16 + 48 + 48, 240 + 48)
    assert cost(lambda x: x.index_copy_(0, rows, values)) == (16 + 48, 48)
    assert cost(lambda x: x.scatter_(0, rows[:, None], 1.0)) == (16, 8)


# what is in a step


def test_the_parts_of_a_step() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    model[0].bias.requires_grad_(False)
    _, step, training = priced(model, torch.randn(16, 8))
    weights = sum(p.numel() for p in model.parameters())
    trained = weights - 32
    assert training.weight_bytes == 4 * weights
    assert training.gradient_bytes == 4 * trained
    assert training.trained == trained
    assert training.saved_bytes == 16 * 32 * 4  # ReLU's result; the input is the caller's
    assert training.optimizers == {
        "sgd": 0,
        "sgd-momentum": 4 * trained,
        "adam": 8 * trained + 3 * 4,
        "adam-8bit": 8 * trained,  # small parameters stay in 32 bits
    }
    assert set(training.worst) == {"saved", "gradients", "workspace"}
    products = [16 * 8 * 32, 16 * 32 * 4]
    assert training.macs == sum(products) + sum(products) + products[1]  # no gradient of the input
    assert sum(t.flops for t in step.nodes.values()) == training.flops


def test_eight_bit_adam_has_a_byte_an_element_and_a_scale_a_block() -> None:
    _, _, training = priced(nn.Linear(100, 50), torch.randn(2, 100))
    assert training.optimizers["adam-8bit"] == 2 * (5000 + 4 * 20) + 8 * 50


def test_an_input_that_requires_a_gradient_gets_one() -> None:
    x = torch.randn(16, 8)
    plain = priced(nn.Sequential(nn.Linear(8, 4)), x)[2]
    gradient = priced(nn.Sequential(nn.Linear(8, 4)), x.clone().requires_grad_())[2]
    assert gradient.macs - plain.macs == 16 * 8 * 4


def test_only_the_loss_is_trained() -> None:
    """A model that returns its loss and its results is trained on the loss."""

    def both(x: Tensor, w: Tensor) -> Any:
        y = x @ w
        return y, y.square().mean(), (y @ y.T).sum()

    gm, step, _ = priced(Call(both, 8, 8), torch.randn(8, 8))
    assert step.counted_by_torch == real_flops(gm, [torch.randn(8, 8)]) == 3 * 2 * 8**3


def test_nothing_to_train() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)).requires_grad_(False))
    assert step_cost(model, [(model, model.graph, [torch.randn(2, 4)])]).training is None


def test_real_gradients_stay_as_they_are() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(2, 4)
    model(x).sum().backward()
    before = [p.grad for p in model.parameters()]
    values = [g.clone() for g in before if g is not None]
    running = model[1].running_mean.clone()
    priced(model, x)
    for parameter, grad, value in zip(model.parameters(), before, values, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, value)
    assert torch.equal(model[1].running_mean, running)


def test_the_timeline_runs_forward_and_back() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    _, step, training = priced(model, torch.randn(16, 8))
    names = [name for name, _ in step.timeline]
    assert names.index("0") < names.index("2") < names.index("backward 2")
    assert names.index("backward 2") < names.index("backward 0")
    top = max(size for _, size in step.timeline)
    assert training.peaks["sgd"] == training.weight_bytes + top


# bad input


@torch.library.custom_op("rewriter_test::trained", mutates_args=())
def trained(x: Tensor) -> Tensor:
    return x.clone()


@trained.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("rewriter_test::trained_backward", mutates_args=())
def trained_backward(grad: Tensor) -> Tensor:
    return grad.clone()


@trained_backward.register_fake
def _(grad: Tensor) -> Tensor:
    return torch.empty_like(grad)


trained.register_autograd(lambda context, grad: torch.ops.rewriter_test.trained_backward(grad))


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rewriter_test.trained(self.layer(x))


def test_ops_without_a_formula_are_error_lines_forward_and_backward() -> None:
    report = explain(Foreign(), [], torch.randn(3, 4))
    for op in ("trained", "trained_backward"):
        (line,) = [e for e in report.errors if f"rewriter_test::{op} " in e]
        assert line.startswith(f"no cost formula for rewriter_test::{op} (")
        assert "test_training_cost.py:" in line
        assert line.endswith("totals are lower bounds")
    assert report.lower_bounds
    training = report.after.training
    assert training is not None
    assert training.macs == 2 * 3 * 4 * 4  # what is known is counted: y = Wx and dW


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[y > 0].sum()


def test_data_dependent_shapes_are_priced_at_their_largest() -> None:
    gm, step, training = priced(Masked(), torch.randn(3, 4))
    assert training.macs == 2 * 3 * 4 * 4
    assert step.errors
    assert all("depends on the data (" in line and "largest" in line for line in step.errors)


def test_unbacked_sizes_are_an_error_that_says_what_to_give() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment):
        size = environment.create_unbacked_symint()
        torch._check(size >= 2)
        x = torch.empty(size, 4)
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    for price in (
        lambda: propagate(gm, gm.graph, [x]),
        lambda: step_cost(gm, [(gm, gm.graph, [x])]),
    ):
        with pytest.raises(VerifyError, match="is not known: give inputs whose sizes are numbers"):
            price()


@torch.library.custom_op("rewriter_test::one_way", mutates_args=())
def one_way(x: Tensor) -> Tensor:
    return x.clone()


@one_way.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_backward_that_fails_says_so() -> None:
    gm = fx.symbolic_trace(Call(lambda x, w: torch.ops.rewriter_test.one_way(x @ w), 4, 4))
    with pytest.raises(VerifyError, match="the backward of .* cannot be priced: .*one_way"):
        step_cost(gm, [(gm, gm.graph, [torch.randn(3, 4)])])


def test_ops_with_a_kernel_of_their_own_are_not_taken_apart() -> None:
    _, _, training = priced(nn.Sequential(nn.Linear(4, 4), nn.SiLU()), torch.randn(3, 4))
    assert [w.op for w in training.work if w.backward and "silu" in w.op] == ["aten::silu_backward"]


def test_work_of_a_step_says_what_is_backward() -> None:
    _, _, training = priced(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(3, 4))
    assert sum(w.flops * w.count for w in training.work) == training.flops
    forward = [w for w in training.work if not w.backward and w.flops]
    backward = [w for w in training.work if w.backward and w.flops]
    assert sum(w.flops * w.count for w in forward) == 2 * 3 * (4 * 6 + 6 * 2)
    assert all(isinstance(w, Work) and w.kind == "matmul" for w in backward)
