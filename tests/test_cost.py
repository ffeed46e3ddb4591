"""Cost against what PyTorch itself does: FlopCounterMode, and real allocations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _tracker import Tracker
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils.flop_counter import FlopCounterMode

from rewriter.base import Layer
from rewriter.cost import Cost, Fakes, model_cost, propagate, storage_cost
from rewriter.errors import RewriteError, StoreError, VerifyError


class Attention(nn.Module):
    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, 4, 16).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT * 0.25).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(b, t, d))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, groups=4),
        nn.Dropout(0.1),
        nn.ConvTranspose2d(32, 8, 3, stride=2),
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


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(100, 32), nn.Linear(32, 100, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)),
        (32, 64),
    ),
    "attention": (Attention, (2, 33, 64)),
    "attention by hand": (lambda: Attention(fused=False), (2, 33, 64)),
    "conv": (conv_net, (2, 3, 32, 32)),
    "lstm": (lambda: Recurrent(nn.LSTM), (2, 7, 16)),
    "gru": (lambda: Recurrent(nn.GRU), (2, 7, 16)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (2, 5, 32)),
}


def exported(model: nn.Module, *inputs: Tensor) -> tuple[nn.Module, fx.Graph]:
    """The exported graph of a model with its lifted parameters back as `get_attr`."""
    program = torch.export.export(model, inputs, strict=False)
    signature, graph = program.graph_signature, program.graph_module.graph
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    root = nn.Module()
    root.add_module("model", model)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in names:
            with graph.inserting_before(node):
                name = f"model.{names[node.name]}"
                node.replace_all_uses_with(graph.create_node("get_attr", name))
            graph.erase_node(node)
        elif node.op == "get_attr":  # the body of a higher-order operator
            root.add_module(str(node.target), getattr(program.graph_module, str(node.target)))
    return root, graph


def stored(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def traced(model: nn.Module) -> fx.Graph:
    return fx.symbolic_trace(model).graph


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_flops_equal_flop_counter_and_peak_equals_real_allocations(
    name: str, training: bool
) -> None:
    make, shape = MODELS[name]
    model, x = make().train(training), torch.randn(shape)
    if name in ("lstm", "gru"):  # exporting these warns
        root, graph = model, traced(model)
    else:
        root, graph = exported(model, x)
    root.train(training)
    cost = propagate(root, graph, [x])
    runnable = fx.GraphModule(root, graph)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        runnable(x)
    with torch.no_grad(), Tracker([x], given=stored(runnable)) as real:
        runnable(x)
    assert cost.counted_by_torch == counter.get_total_flops()
    assert cost.total.activation_bytes == real.peak
    assert cost.errors == []
    assert cost.total.flops == 2 * cost.total.macs >= cost.counted_by_torch


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_modules_of_a_symbolic_graph(training: bool) -> None:
    model, x = conv_net().train(training), torch.randn(2, 3, 32, 32)
    gm = fx.symbolic_trace(model)
    cost = propagate(gm, gm.graph, [x])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gm(x)
    with torch.no_grad(), Tracker([x], given=stored(gm)) as real:
        gm(x)
    assert cost.counted_by_torch == cost.total.flops == counter.get_total_flops()
    assert cost.total.activation_bytes == real.peak


def test_cpu_attention_costs_what_the_matmuls_would() -> None:
    x = torch.randn(2, 33, 64)
    fused = propagate(*exported(Attention().eval(), x), [x])
    by_hand = propagate(*exported(Attention(fused=False).eval(), x), [x])
    assert fused.total.flops == by_hand.total.flops == by_hand.counted_by_torch
    assert fused.counted_by_torch == fused.total.flops - 2 * 2 * 4 * 33 * 33 * (16 + 16)


def test_lstm_costs_its_matrices_per_step() -> None:
    model, x = Recurrent(nn.LSTM).eval(), torch.randn(2, 7, 16)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert propagate(model, traced(model), [x]).total.macs == 2 * 7 * matrices


class Fft(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(x)).real


class MatrixVector(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mv(x, x[0]) + torch.dot(x[0], x[1])


class IntMatmul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch._int_mm(x, x)


@pytest.mark.parametrize(
    ("model", "x", "flops", "macs"),
    [
        (Fft(), torch.randn(4, 64, dtype=torch.complex64), 2 * 5 * 4 * 64 * 6, 0),
        (MatrixVector(), torch.randn(8, 8), 2 * 64 + 2 * 8, 64 + 8),
        (IntMatmul(), torch.ones(32, 32, dtype=torch.int8), 2 * 32**3, 32**3),
        (nn.Bilinear(4, 5, 6), torch.randn(3, 4), None, 3 * 4 * 5 * 6),
    ],
    ids=["fft", "mv and dot", "int8", "bilinear"],
)
def test_formulas_beyond_torch(model: nn.Module, x: Tensor, flops: int | None, macs: int) -> None:
    inputs = [x, torch.randn(3, 5)] if isinstance(model, nn.Bilinear) else [x]
    cost = propagate(*exported(model, *inputs), inputs)
    assert cost.errors == []
    assert (cost.total.flops, cost.total.macs) == (2 * macs if flops is None else flops, macs)


def test_dearer_branch_of_cond_and_wrapped_regions() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = x @ x
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y @ y, (x,))

    x = torch.randn(8, 8)
    root, graph = exported(Branches(), x)
    cost = propagate(root, graph, [x])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fx.GraphModule(root, graph)(x)
    assert cost.counted_by_torch == cost.total.flops == counter.get_total_flops() == 4 * 8**3


@torch.library.custom_op("rewriter_test::foreign", mutates_args=())
def foreign(x: Tensor) -> Tensor:
    return x.clone()


@foreign.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Unpriced(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rewriter_test.foreign(x) + torch.linalg.svdvals(x)


def test_an_op_without_a_formula_is_an_error_line() -> None:
    x = torch.randn(5, 5)
    cost = propagate(*exported(Unpriced(), x), [x])
    assert len(cost.errors) == 2
    for line, op in zip(cost.errors, ("rewriter_test::foreign", "_linalg_svd"), strict=True):
        assert line.startswith(f"no cost formula for {op} (")
        assert "test_cost.py:" in line
        assert line.endswith("totals are lower bounds")
    assert cost.total.bytes_moved > 0


def test_data_dependent_sizes_are_priced_at_their_largest() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Any:
            mask = x > 0
            return x[mask], mask.nonzero(), x.masked_select(mask), x * x.sum().item()

    x = torch.randn(3, 4)
    graph = traced(Masked())
    cost = propagate(nn.Module(), graph, [x])
    shapes = [tuple(v.shape) for v in next(iter(reversed(graph.nodes))).meta["val"]]
    assert shapes == [(12,), (12, 2), (12,), (3, 4)]
    assert len(cost.errors) == 4
    assert all("depends on the data" in line for line in cost.errors)


def test_bytes_and_launches() -> None:
    def cost(function: Any, *inputs: Tensor) -> Cost:
        class Call(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return function(x, *inputs[1:])

        gm = fx.symbolic_trace(Call())
        return propagate(gm, gm.graph, [inputs[0]]).total

    x = torch.randn(10, 6)  # 240 bytes
    total = cost(lambda x: x.t().unflatten(1, (2, 5)).unbind(0), x)
    assert (total.launches, total.bytes_moved) == (0, 0)
    total = cost(lambda x: x + 1, x)
    assert (total.launches, total.bytes_moved) == (1, 480)
    total = cost(lambda x: x.contiguous().to(torch.float32) * x, x)  # one tensor, read once
    assert (total.launches, total.bytes_moved) == (1, 480)
    total = cost(lambda x: x[:1].expand(10, 6) + 1, x)  # a broadcast row is read once
    assert total.bytes_moved == 24 + 240
    total = cost(lambda x: x.relu_(), x)
    assert (total.bytes_moved, total.activation_bytes) == (480, 240)
    total = cost(lambda x: x.fill_(1.0), x)
    assert total.bytes_moved == 240
    total = cost(lambda x: x.new_empty(3), x)
    assert (total.launches, total.activation_bytes) == (0, 240 + 12)
    rows = torch.tensor([1, 2])
    total = cost(lambda x, rows: x.index_select(0, rows), x, rows)
    assert total.bytes_moved == 16 + 2 * 48


def test_what_only_gives_its_size_is_not_read() -> None:
    class Fresh(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.zeros_like(x), x.new_zeros(5), torch.rand_like(x)

    x = torch.randn(10, 6)
    cost = propagate(nn.Module(), traced(Fresh()), [x]).total
    assert (cost.bytes_moved, cost.bytes_written) == (500, 500)


def test_batch_norm_of_a_transposed_input_is_copied_for_what_comes_after() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(x.transpose(1, 2)).transpose(1, 2))

    x = torch.randn(3, 5, 8)
    gm = fx.symbolic_trace(Net().eval())
    with torch.no_grad(), Tracker([x], given=stored(gm)) as real:
        gm(x)
    assert propagate(gm, gm.graph, [x]).total.activation_bytes == real.peak


def test_values_are_freed_after_their_last_use() -> None:
    chain = nn.Sequential(*[nn.Tanh() for _ in range(5)])
    x = torch.randn(10, 6)
    graph = traced(chain)
    cost = propagate(chain, graph, [x])
    assert cost.total.activation_bytes == 3 * 240  # the input, one value and the next
    peaks = [c.activation_bytes for c in cost.nodes.values()]
    assert peaks == [240, 480, 720, 720, 720, 720, 480]


def test_every_node_gets_a_value_and_a_cost() -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 64)
    root, graph = exported(model, x)
    cost = propagate(root, graph, [x])
    assert list(cost.nodes) == list(graph.nodes)
    for node in graph.nodes:
        assert "val" in node.meta
    out = next(iter(reversed(graph.nodes))).meta["val"]
    assert isinstance(out[0], FakeTensor)
    assert (out[0].shape, out[0].dtype, out[0].device) == (x.shape, x.dtype, x.device)
    assert sum(c.flops for c in cost.nodes.values()) == cost.total.flops
    assert max(c.peak_bytes for c in cost.nodes.values()) == cost.total.peak_bytes


def test_nothing_real_is_computed_or_changed() -> None:
    class Caching(nn.Linear):
        cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.cache = self.weight.t().contiguous()
            return x @ self.cache

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop, self.caching = nn.BatchNorm1d(8), nn.Dropout(), Caching(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.caching(self.norm(x)))

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return not isinstance(m, Net)

    net, x = Net().train(), torch.randn(4, 8)
    calls: list[object] = []
    net.caching.register_forward_hook(lambda *args: calls.append(args))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    versions = {k: v._version for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    graph = Tracer().trace(net)
    propagate(net, graph, [x])
    assert torch.equal(torch.get_rng_state(), random)
    assert {k: v._version for k, v in net.state_dict().items()} == versions
    torch.testing.assert_close(net.state_dict(), before)
    assert net.caching.cache is None
    assert calls == []
    with torch.inference_mode():
        propagate(net, graph, [x])


def test_training_flag_overrides_the_modules() -> None:
    net, x = nn.Sequential(nn.Dropout()).eval(), torch.randn(4, 8)
    launches = [propagate(net, traced(net), [x], training=t).total.launches for t in (None, True)]
    assert launches == [0, 3]  # bernoulli_, div_, mul
    assert not net[0].training


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_inputs_and_models_without_data(device: str) -> None:
    with torch.device(device):
        model, x = Attention().eval(), torch.randn(2, 5, 64)
    real = propagate(*exported(Attention().eval(), torch.randn(2, 5, 64)), [torch.randn(2, 5, 64)])
    symbolic = FakeTensorMode(shape_env=ShapeEnv())
    fake = symbolic.from_tensor(x)
    root, graph = exported(model, x)
    for given_ in (x, fake):
        cost = propagate(root, graph, [given_]).total
        assert (cost.flops, cost.params) == (real.total.flops, real.total.params)


def test_lifted_parameters_are_parameters() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    graph.output((graph.call_function(torch.ops.aten.linear.default, (x, w)),))
    weight = nn.Parameter(torch.randn(6, 4))
    cost = propagate(nn.Module(), graph, [torch.randn(3, 4), weight]).total
    assert (cost.params, cost.param_bytes, cost.activation_bytes) == (24, 96, 48 + 72)


def test_parameters_count_once_in_real_bytes() -> None:
    class Packed(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.zeros(8, 4, dtype=torch.int8))
            self.register_buffer("scale", torch.zeros(8, dtype=torch.bfloat16))
            self.register_buffer("cache", torch.zeros(8, 4), persistent=False)

    assert storage_cost(Packed()) == Cost(params=32 + 8, param_bytes=32 + 16 + 128)
    assert storage_cost(TiedHead()) == Cost(params=3200, param_bytes=12800)
    norm = nn.BatchNorm1d(8)  # running statistics are bytes, not parameters
    assert storage_cost(norm) == Cost(params=16, param_bytes=(16 + 16) * 4 + 8)
    assert storage_cost(norm, nn.Sequential(norm, norm)) == storage_cost(norm)
    flat = torch.randn(10)
    halves = nn.ParameterList([flat[:5], flat[5:]])
    assert storage_cost(halves) == Cost(params=10, param_bytes=40)
    transposed = nn.ParameterList([a := torch.randn(3, 4), a.t()])
    assert storage_cost(transposed) == Cost(params=12, param_bytes=48)
    assert storage_cost(nn.Linear(4, 3, device="meta")) == Cost(params=15, param_bytes=60)


def test_regions_add_up_and_share_parameters() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)), "b": TiedHead()})
    ids, x = torch.tensor([[1, 2]]), torch.randn(3, 8)
    first, second = traced(model["a"]), traced(model["b"])
    a, b = propagate(model["a"], first, [x]).total, propagate(model["b"], second, [ids]).total
    both = model_cost(model, [("a", first, [x]), ("b", second, [ids]), (model["b"], second, [ids])])
    stored = storage_cost(model)
    assert both.total.flops == a.flops + 2 * b.flops == both.counted_by_torch
    assert both.total.launches == a.launches + 2 * b.launches
    assert both.total.bytes_moved == a.bytes_moved + 2 * b.bytes_moved
    assert both.total.activation_bytes == max(a.activation_bytes, b.activation_bytes)
    assert both.total.params == stored.params
    assert both.total.peak_bytes == stored.param_bytes + both.total.activation_bytes


def test_a_failing_node_names_itself_and_the_users_line() -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 64)
    root, graph = exported(model, x)
    with pytest.raises(VerifyError, match=r"%layer_norm .*float32\[2,5,63\].*(\n.*)*test_cost.py"):
        propagate(root, graph, [torch.randn(2, 5, 63)])
    model.qkv = nn.Linear(64, 191)
    with pytest.raises(VerifyError, match=r"%view_2 .*\n  at .*test_cost.py"):
        propagate(root, graph, [x])
    with pytest.raises(RewriteError, match="input 'x' got no value"):
        propagate(root, graph, [])


NUMBERS = st.integers(0, 10**15)
COSTS = st.builds(
    Cost,
    params=NUMBERS,
    flops=NUMBERS,
    peak_bytes=NUMBERS,
    energy_j=st.none() | NUMBERS,
    latency_s=st.none() | st.floats(0, 1e3),
)


@settings(max_examples=50)
@given(a=COSTS, b=COSTS)
def test_sum_of_costs(a: Cost, b: Cost) -> None:
    total = a + b
    assert total.flops == a.flops + b.flops
    assert total.peak_bytes == max(a.peak_bytes, b.peak_bytes)
    assert total == b + a
    assert a + Cost() == a
    assert Cost.from_dict(a.to_dict()) == a


def test_from_dict_refuses_foreign_fields() -> None:
    with pytest.raises(StoreError, match="colour"):
        Cost.from_dict({"params": 1, "colour": 2})


ATEN = torch.ops.aten
OPS = [
    (ATEN.add.Tensor, lambda x: (x, 1)),
    (ATEN.add.Tensor, lambda x: (x, 1.0)),
    (ATEN.add.Tensor, lambda x: (x, True)),
    (ATEN.add.Tensor, lambda x: (x, x.mT)),
    (ATEN.transpose.int, lambda x: (x, 0, 1)),
    (ATEN.slice.Tensor, lambda x: (x, 0, 1, 3)),
    (ATEN.split.Tensor, lambda x: (x, 2)),
    (ATEN.cat.default, lambda x: ([x, x],)),
    (ATEN.max.dim, lambda x: (x, 0)),
    (ATEN._to_copy.default, lambda x: (x,)),
    (ATEN._unsafe_view.default, lambda x: (x.contiguous(), [16])),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_remembered_result_is_of_the_type_that_pytorch_derives(
    dtype: torch.dtype, transposed: bool
) -> None:
    fakes = Fakes()
    for _ in range(2):  # the second time from memory
        x = fakes.of(torch.ones(4, 4, dtype=dtype))
        with fakes.mode:
            x = x.mT if transposed else x
            for op, arguments in OPS:
                given = arguments(x)
                found, expected = fakes.results.of(op, given, {}), op(*given)
                assert typed(found, given[0]) == typed(expected, given[0]), op


def typed(value: Any, source: Any) -> Any:
    """Of each tensor its type, and whether it shares the memory of an argument."""
    if not isinstance(value, Tensor):
        return [typed(v, source) for v in value]
    key = value.untyped_storage()._cdata
    shares = isinstance(source, Tensor) and key == source.untyped_storage()._cdata
    offset, size = value.storage_offset(), value.untyped_storage().nbytes()
    return value.shape, value.stride(), offset, size, value.dtype, value.device, shares


def test_what_writes_or_depends_on_data_or_on_open_sizes_is_not_remembered() -> None:
    fakes = Fakes()
    x = fakes.of(torch.ones(4, 4))
    with fakes.mode:
        assert fakes.results.of(ATEN.add_.Tensor, (x, 1), {}) is x
        with pytest.raises(DynamicOutputShapeException):
            fakes.results.of(ATEN.nonzero.default, (x,), {})
    environment = Fakes(ShapeEnv())
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    y = environment.mode.from_tensor(torch.ones(4, 4), symbolic_context=context)
    with environment.mode:
        environment.results.of(ATEN.add.Tensor, (y, 1), {})
    assert not fakes.results.known
    assert not environment.results.known
