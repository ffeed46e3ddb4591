"""The compiled kernels as ops of compiled programs, and the packages that hold them."""

from __future__ import annotations

import copy
import math
import operator
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_equal, assert_reordered, sqnr
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion

import rewriter
from rewriter import RewriteError, rewrite
from rewriter.kernels import attention, int8_choice, int8_cpu, native, native_ops, ops, weight_only
from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_static as static
from rewriter.kernels.int8_product import quantize_weight
from rewriter.lowering import integers
from rewriter.lowering.single_rows import attend_single_rows
from rewriter.lowering.traces import lowered_in_traces
from rewriter.passes import Quantize

pytestmark = pytest.mark.skipif(
    native_ops.refusal() is not None, reason=f"no compiled kernel: {native_ops.refusal()}"
)
LENGTH, WIDTH, HEADS = 6, 64, 2
X = torch.linspace(-2, 2, 2 * LENGTH * WIDTH).view(2, LENGTH, WIDTH).sin()


@pytest.fixture(autouse=True)
def _always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test goes by a time: the fused op counts as the faster one."""
    monkeypatch.setattr(int8_choice, "pick_kernel", lambda *_: "native")
    monkeypatch.setattr(static, "pick_kernel", lambda *_: "native")
    monkeypatch.setattr(attention, "pick", lambda *_: "native")
    monkeypatch.setattr(integers, "fastest", lambda key, version, make, *_: list(make())[-1])
    monkeypatch.setattr("rewriter.engine.engine.Engine._lowering_pays", lambda _: True)


class Block(nn.Module):
    """Attention, MLP and a head: every int8 op that a package can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, -1)
        x = self.norm(self.out(mixed) + x)
        x = self.last(self.down(F.gelu(self.up(x))) + x)
        return self.head(x[:, 0])


def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


NATIVE = {
    "rewriter::native_int8_attention": 1,
    "rewriter::native_int8": 2,  # the output; the head
    "rewriter::native_int8_two": 1,
}
APART = {
    "rewriter::native_int8": 3,
    "rewriter::native_attention": 1,
    "rewriter::native_int8_two": 1,
}
"""With one range for all of x, which an element of the batch alone does not know."""
SCHEMES: dict[str, dict[str, Any]] = {
    "per token": {},
    "per tensor": {"activation": "per_tensor"},
    "static": {"scheme": "int8-static"},
}


def rewritten(options: dict[str, Any]) -> Any:
    given = {"calibration": [X]} if options.get("scheme") == "int8-static" else {}
    return rewrite(block(), [Quantize(**options)], X, **given)


def called(graph: torch.fx.Graph) -> dict[str, int]:
    names = [ops.name_of(n.target) for n in graph.nodes]
    return {n: names.count(n) for n in dict.fromkeys(names) if n.startswith("rewriter::")}


# what a compiler traces


@pytest.mark.parametrize("options", SCHEMES.values(), ids=SCHEMES)
def test_a_trace_of_the_lowered_model_calls_its_kernels(options: dict[str, Any]) -> None:
    model = rewritten(options)
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    with torch.no_grad(), lowered_in_traces(model) as any_:
        assert any_
        program = torch.export.export(model, (X,), dynamic_shapes=sizes)
    assert called(program.graph) == (APART if options.get("activation") else NATIVE)
    with torch.no_grad():
        for x in (X, X[:, :2] * 3, X.repeat(4, 2, 1)):
            assert_equal(program.module()(x), model(x))
    with torch.no_grad():  # behind it, the layers again
        plain = torch.export.export(model, (X,))
    assert set(called(plain.graph)).isdisjoint(NATIVE)


def test_what_wants_gradients_is_traced_as_layers() -> None:
    model = rewritten({})
    with lowered_in_traces(model):
        program = torch.export.export(model, (X.clone().requires_grad_(),))
    assert set(called(program.graph)).isdisjoint(NATIVE)


# the ops


def layer(gain: float = 1.0, width: int = 24, **after: Any) -> tuple[Any, native_ops.InGraph]:
    torch.manual_seed(0)
    qweight, scale = quantize_weight(torch.randn(40, width) * gain)
    bound = int8.bound(qweight, scale, torch.randn(40), "per_token", **after)
    form = bound.in_graph()
    assert form is not None
    return bound, form


@pytest.mark.parametrize("then", int8_cpu.THEN)
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 5, 24), (2, 0, 24), (300, 24)])
def test_an_op_computes_what_the_model_runs(then: str, shape: tuple[int, ...]) -> None:
    bound, form = layer(then=then)
    x = torch.linspace(-3, 3, max(torch.Size(shape).numel(), 1))[: torch.Size(shape).numel()]
    assert_equal(form.call(form.tensors, x.view(shape)), bound(x.view(shape)))


@pytest.mark.parametrize("rows", [1, 4, 33, 130])
def test_an_op_as_wide_as_the_tiles_of_amx(rows: int) -> None:
    bound, form = layer(width=96, then="gelu")
    x = torch.randn(rows, 96)
    assert_equal(form.call(form.tensors, x), bound(x))


def test_what_is_added_and_normed() -> None:
    bound, form = layer(norm_weight=torch.randn(40), norm_bias=torch.randn(40), eps=1e-5)
    x, add = torch.randn(4, 24), torch.randn(4, 40)
    assert_equal(form.call(form.tensors, x, add), bound(x, add))
    with pytest.raises(RuntimeError, match="what is added does not fit"):
        form.call(form.tensors, x, add[:, :3])


def test_rows_without_a_range_of_their_own() -> None:
    """A range beyond float32 is met by a quarter of the row; what is not finite makes its row NaN
    alone."""
    _, form = layer(gain=1e-3)  # of small results
    x = torch.randn(5, 24)
    x[1, :2] = torch.tensor([3e38, -3e38])
    x[2, 3], x[3, 4] = torch.nan, torch.inf
    y = form.call((form.tensors[0],), x)
    assert y[2:4].isnan().all()
    assert_equal(y[[0, 4]], form.call(form.tensors, x[[0, 4]].contiguous()))
    quarter = form.call(form.tensors, x[1:2] / 4)
    assert sqnr(y[1:2] / 4, quarter) > 50


def test_a_layer_of_another_machine_is_refused() -> None:
    bound, form = layer()
    x, (packed,) = torch.randn(3, 24), form.tensors
    other = packed.clone()
    other[0] += 1
    with pytest.raises(RuntimeError, match="packed for another CPU or by another version: export"):
        form.call((other,), x)
    with pytest.raises(RuntimeError, match="no packed layer"):
        form.call((packed[:8],), x)
    with pytest.raises(RuntimeError, match="x does not fit the layer"):
        form.call(form.tensors, x[:, :20])
    with pytest.raises(RuntimeError, match="x must be float32"):
        form.call(form.tensors, x.double())
    shifted = torch.zeros(len(packed) + 8, dtype=torch.uint8)[8:]  # as in a file that is mapped
    shifted.copy_(packed)
    assert_equal(form.call((shifted,), x), bound(x))


MASKS = {
    "none": None,
    "truths": torch.arange(7 * 9).view(7, 9) % 3 > 0,
    "of a batch": torch.arange(2 * 9).view(2, 1, 1, 9) % 4 > 0,
    "numbers": torch.linspace(-2, 2, 9).view(1, 9),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_computes_what_the_model_runs(mask: Tensor | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 32).transpose(1, 2) for n, h in ((7, 4), (9, 2), (9, 2)))
    run = torch.ops.rewriter.native_attention.default
    found, want = run(q, k, v, mask, 0, 0.2, 0), attention.native(q, k, v, mask, False, 0.2)
    assert_equal(found, want)
    assert found.stride() == want.stride()
    assert_equal(run(q, k, v.mT.contiguous().mT, mask, 0, 0.2, 0), want)
    with pytest.raises(RuntimeError, match="differ in batch, heads or rows"):
        run(q[:1], k, v, mask, 0, 0.2, 0)
    with pytest.raises(RuntimeError, match="mask does not fit"):
        run(q, k, v, torch.ones(3, 9, dtype=torch.bool), 0, 0.2, 0)


def test_without_a_compiler_the_op_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise native.Unavailable("no C++ compiler: neither of c++")

    monkeypatch.setattr(native_ops, "load", none)
    with pytest.raises(RuntimeError, match="cannot be had here: no C.. compiler.*standalone=True"):
        native_ops._late("native_int8")(X, X, None, 3)
    with pytest.raises(RuntimeError, match="runs on a CPU alone, not on meta"):
        native_ops._late("native_int8")(X.to("meta"), X, None, 3)


# weights of few bits


def levels(op: str, width: int, size: int, zeros: bool) -> list[Tensor | None]:
    """weight, scale, zero and bias of 9 outputs, with every level."""
    _, weight, scale, zero, bias = weight_only._made(op, 1, 9, width, size)
    return [weight, scale, zero if zeros else None, bias]


WEIGHT_ONLY = [
    (op, size, zeros)
    for op in native_ops.WEIGHT_ONLY
    for size in ((32, 64, 128) if "int4" in op else (32,))
    for zeros in ((False, True) if "int4" in op else (False,))
]


@pytest.mark.parametrize(("op", "size", "zeros"), WEIGHT_ONLY)
def test_ops_of_few_bits_compute_the_formula(op: str, size: int, zeros: bool) -> None:
    for width in (1, 31, 96, 200):
        weight, scale, zero, bias = levels(op, width, size, zeros)
        for rows in ((), (1,), (2,), (2, 3), (0, 4), (40,)):
            x = torch.linspace(-3, 3, math.prod(rows) * width).view(*rows, width).sin()
            for added in (None, bias):
                found = native_ops.weight_only(op, x, weight, scale, zero, added)
                want = weight_only._REFERENCES[op](x.double(), weight, scale, zero, added)
                assert found.dtype == torch.float32
                assert_reordered(found.double(), want, x.dtype)
    x = torch.randn(200, 3).t()  # not contiguous
    given = weight, scale, zero, bias
    assert_equal(native_ops.weight_only(op, x, *given), native_ops.weight_only(op, 1 * x, *given))
    none = [None if t is None or t.ndim == 1 else t[:, :0] for t in (weight, zero)]
    if "int4" in op:
        found = native_ops.weight_only(op, x[:, :0], none[0], scale[:, :0], none[1], bias)
        assert_equal(found, bias.expand(3, 9))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.ones(2, 64)}, "x does not fit the weight"),
        ({"x": torch.ones(2, 72).double()}, "x must be float32"),
        ({"weight": torch.ones(9, 48)}, "of 8-bit numbers"),
        ({"scale": torch.ones(9)}, "in another form"),
        ({"scale": torch.ones(9, 3).double()}, "scales do not fit"),
        ({"scale": torch.ones(8, 3)}, "scales do not fit"),
        ({"scale": torch.ones(9, 5)}, "x does not fit"),
        ({"zero": torch.ones(9, 3)}, "zeros do not fit"),
        ({"bias": torch.ones(3)}, "bias does not fit"),
        ({"bias": torch.ones(9).double()}, "or is not float32"),
    ],
)
def test_ops_of_few_bits_refuse_what_does_not_fit(change: dict[str, Tensor], said: str) -> None:
    names = "weight", "scale", "zero", "bias"
    given: Any = dict(zip(names, levels("int4_linear", 72, 32, True), strict=True))
    with pytest.raises(RuntimeError, match=said):
        native_ops.weight_only("int4_linear", **{"x": torch.ones(2, 72), **given, **change})


@pytest.mark.parametrize(("op", "size", "zeros"), WEIGHT_ONLY)
@pytest.mark.parametrize("count", [2, 3])
def test_products_of_one_input_are_made_together(
    op: str, size: int, zeros: bool, count: int
) -> None:
    kind = list(native_ops.WEIGHT_ONLY).index(op)
    for width in (31, 96):
        each = [levels(op, width, size, zeros) for _ in range(count)]
        each[1] = [None if t is None else t[:5].contiguous() for t in each[1]]
        each[0][3] = None
        given = [t for own in each for t in own] + [None] * 4 * (3 - count)
        for rows in ((), (1,), (2, 3), (0, 4), (19,)):
            x = torch.linspace(-3, 3, math.prod(rows) * width).view(*rows, width).sin()
            found = torch.ops.rewriter.native_weight_linears.default(x, *given, kind)
            pieces = found.split([len(own[0]) for own in each], -1)
            for piece, own in zip(pieces, each, strict=True):
                assert_equal(piece, native_ops.weight_only(op, x, *own))


def test_weights_whose_groups_differ_are_not_multiplied_together() -> None:
    one, other = (levels("int4_linear", 128, size, False) for size in (32, 64))
    op = torch.ops.rewriter.native_weight_linears.default
    with pytest.raises(RuntimeError, match="groups of one size"):
        op(torch.ones(128), *one, *other, None, None, None, None, 1)
    with pytest.raises(RuntimeError, match="another kind"):
        op(torch.ones(128), *one, *one, None, None, None, None, 3)


OF_FEW_BITS = {
    "int8-weight": Quantize("int8-weight"),
    "int4-weight": Quantize("int4-weight", group_size=32, symmetric=False),
    "int4-dynamic": Quantize("int4-dynamic", group_size=32),
}
THEIR_OPS = dict(zip(OF_FEW_BITS, native_ops.WEIGHT_ONLY, strict=True))


@pytest.mark.parametrize("scheme", OF_FEW_BITS)
def test_a_trace_calls_the_ops_of_few_bits(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only, "_pick", lambda *_: "native")
    model, op = rewrite(block(), [OF_FEW_BITS[scheme]], X), THEIR_OPS[scheme]
    with torch.no_grad():
        with lowered_in_traces(model):
            program = torch.export.export(model, (X,))
        plain = torch.export.export(model, (X,))
        assert called(program.graph)[f"rewriter::native_{op}"] == 7
        assert called(plain.graph)[f"rewriter::{op}"] == 7
        assert_reordered(program.module()(X), model(X))


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("scheme", OF_FEW_BITS)
def test_python_that_is_compiled_calls_the_ops_of_few_bits(scheme: str) -> None:
    """As a language model that decodes is compiled: Dynamo sees the layers, not a graph."""
    model, op = rewrite(block(), [OF_FEW_BITS[scheme]], X), THEIR_OPS[scheme]
    layer, seen = model.down, Seen()
    compiled: Any = torch.compile(layer, backend=seen, dynamic=False, fullgraph=True)
    few, many = torch.randn(1, 2, 96), torch.randn(3, 9, 96)
    with torch.no_grad():
        for x in (few, few.mT.contiguous().mT, many):
            assert_reordered(compiled(x), layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(few).dtype == torch.bfloat16
    compiled(few.requires_grad_()).sum().backward()
    assert few.grad is not None
    short, whole = {f"rewriter::native_{op}": 1}, {f"rewriter::{op}": 1}
    assert seen.graphs == [short, short, whole, whole, whole]


# torch.compile


class Seen:
    """A backend that runs graphs as they are, and keeps what they call."""

    def __init__(self) -> None:
        self.graphs: list[dict[str, int]] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(called(module.graph))
        return module.forward


@pytest.fixture
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


asks_dynamo = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="Dynamo hands on no objects"
)


@asks_dynamo
@pytest.mark.usefixtures("_fresh")
def test_compiled_code_runs_the_kernels_and_follows_the_weights() -> None:
    model, seen = rewritten({}), Seen()
    compiled: Any = torch.compile(model, backend=seen, fullgraph=True)
    with torch.no_grad():
        before = compiled(X)
        assert seen.graphs == [{"rewriter::following": 1, **NATIVE}]
        assert_equal(before, model(X))
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model.up.scale.mul_(1.5)
        model.norm.weight.add_(0.1)
        changed = compiled(X)
        assert_equal(changed, model(X))
        assert not torch.equal(changed, before)
        model.load_state_dict(state)
        assert_equal(compiled(X), before)
    assert len(seen.graphs) == 1
    compiled(X)  # with gradients: the layers
    assert set(seen.graphs[1]) == {"rewriter::int8_linear"}


class Decoding(nn.Module):
    """The layers of a block called by Python, as where a language model decodes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.of = model

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in (self.of.q, self.of.k, self.of.v))
        y: Tensor = self.of.down(F.gelu(self.of.up(q * k + v)))
        return y


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.usefixtures("_fresh")
def test_the_backend_makes_products_of_one_input_together() -> None:
    seen: list[dict[str, int]] = []
    model = Decoding(rewrite(block(), [OF_FEW_BITS["int4-weight"]], X))
    backend = rewriter.backend(
        inductor={"post_grad_custom_pre_pass": lambda graph: seen.append(called(graph))}
    )
    compiled: Any = torch.compile(model, backend=backend, dynamic=False)
    x = X[:1, :2]
    with torch.no_grad():
        assert_reordered(compiled(x), model(x))
    assert seen == [{"rewriter::native_weight_linears": 1, "rewriter::native_int4_linear": 2}]


class Attending(nn.Module):
    """One query of each head asks keys and values of a static cache, two heads the same ones."""

    def __init__(self, project: nn.Module) -> None:
        super().__init__()
        self.project = project
        self.register_buffer("keys", torch.zeros(1, 3, 8, 32))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q = self.project(x).view(1, 6, 1, 32)
        self.keys.index_copy_(2, at, q[:, ::2] * 2)
        k = self.keys[:, :, None].expand(1, 3, 2, 8, 32).reshape(1, 6, 8, 32)
        y: Tensor = F.scaled_dot_product_attention(q, k, k)
        return y


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.usefixtures("_fresh")
def test_the_backend_copies_no_keys_of_a_static_cache() -> None:
    torch.manual_seed(0)
    x, seen = torch.randn(1, 1, 48), list[list[str]]()

    def look(graph: fx.Graph) -> None:
        graph.eliminate_dead_code()
        seen.append([str(n.target) for n in graph.nodes])

    model = Attending(rewrite(nn.Linear(48, 192), [OF_FEW_BITS["int4-weight"]], x))
    plain = copy.deepcopy(model)
    backend = rewriter.backend(inductor={"post_grad_custom_pre_pass": look})
    compiled: Any = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad():
        for i in range(3):
            at = torch.tensor([i])
            assert_reordered(compiled(x + i, at), plain(x + i, at))
    (names,) = seen
    assert "rewriter.native_attention.default" in names
    assert not any("expand" in n or "clone" in n for n in names)


SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def graph_of_attention(rows: int = 1, times: int = 3, causal: bool = False) -> fx.GraphModule:
    """Queries of six heads, keys and values of fewer, copied as transformers copies them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        def spread(t: Tensor) -> Tensor:
            b, h, n, d = t.shape
            return t[:, :, None].expand(b, h, times, n, d).clone().view(b, h * times, n, d)

        more = {} if causal else {"attn_mask": mask}
        return SDPA(q, spread(k), spread(v), 0.0, causal, **more, scale=0.3)[0] * 2

    module = make_fx(attend, tracing_mode="fake")(*attended(rows, times))
    module.graph.eliminate_dead_code()
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # as Inductor has it when its passes run
    return module


def attended(rows: int, times: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    k, v = (torch.randn(2, 6 // times, 19, 32) for _ in range(2))
    mask = torch.zeros(2, 1, rows, 19).masked_fill(torch.rand(2, 1, rows, 19) > 0.7, -torch.inf)
    return torch.randn(2, 6, rows, 32), k, v, mask


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_one_query_reads_keys_where_they_lie(times: int, causal: bool) -> None:
    module, given = graph_of_attention(1, times, causal), attended(1, times)
    want = module(*given)
    attend_single_rows(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    assert called(module.graph) == {"rewriter::native_attention": 1}
    names = [str(n.target) for n in module.graph.nodes]
    assert not any("flash" in n or "expand" in n or "clone" in n for n in names)
    assert_reordered(module(*given), want)


def test_more_queries_and_what_a_backward_reads_are_left_to_torch() -> None:
    several, wanted = graph_of_attention(rows=2), graph_of_attention()
    (call,) = wanted.graph.find_nodes(op="call_function", target=SDPA)
    with wanted.graph.inserting_after(call):
        wanted.graph.call_function(operator.getitem, (call, 1))
    for module in (several, wanted):
        before = str(module.graph)
        attend_single_rows(module.graph)
        assert str(module.graph) == before


@pytest.mark.usefixtures("_fresh")
def test_the_backend_ends_in_the_kernels_and_follows_the_weights() -> None:
    model = block()
    compiled: Any = torch.compile(model, backend=rewriter.backend([Quantize()], inner="eager"))
    with torch.no_grad():
        assert_equal(compiled(X), rewrite(model, [Quantize()], X)(X))
        (report,) = rewriter.last_reports()
        assert "5 calls of" in report.steps[-1].notes[0]
        assert "native_int8_two" in report.steps[-1].notes[0]
        for tensor in (
            model.up.weight,
            model.norm.weight,
        ):  # of a layer that is new, and of another
            tensor.mul_(1.5)
            assert_equal(compiled(X), rewrite(model, [Quantize()], X)(X))
    assert len(rewriter.last_reports()) == 1


@asks_dynamo
@pytest.mark.usefixtures("_fresh")
def test_compiled_code_never_writes_to_the_layers_own_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight_only, "_pick", lambda *_: "native")
    model = rewrite(block(), [OF_FEW_BITS["int8-weight"]], X)
    compiled: Any = torch.compile(model, backend=Seen(), fullgraph=True)
    with torch.no_grad():
        assert_reordered(compiled(X), model(X))
        kept = model.up.qweight
        before = kept.clone()
        kept.copy_(kept.flip(0))  # in place: it is what the code reads
        assert_reordered(compiled(X), model(X))
        kept.copy_(before)
        model.load_state_dict({k: v.flip(0) for k, v in model.state_dict().items()}, assign=True)
        for _ in range(2):  # the second call is as stale as the first
            with pytest.raises(RewriteError, match="call torch.compiler.reset"):
                compiled(X)
        assert torch.equal(kept, before)
        torch.compiler.reset()
        assert_reordered(compiled(X), model(X))


# packages

LOAD = """
import sys, torch
given, wrong = torch.load(sys.argv[2])
package = torch._inductor.aoti_load_package(sys.argv[1])
assert not any(m.split('.')[0] == 'rewriter' for m in sys.modules)
refused = []
for x in wrong:
    try:
        package(x)
    except RuntimeError as error:
        refused.append(str(error))
torch.save(([package(x) for x in given], refused), sys.argv[3])
"""


def run_alone(
    made: rewriter.Exported, given: list[Tensor], wrong: list[Tensor], folder: pathlib.Path
) -> tuple[list[Tensor], list[str]]:
    """What a package gives, and its errors about wrong inputs, in a process without rewriter."""
    torch.save((given, wrong), folder / "given.pt")
    paths = [made.package, folder / "given.pt", folder / "found.pt"]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), *map(str, paths)],
        capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: tuple[list[Tensor], list[str]] = torch.load(folder / "found.pt")
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_package_holds_the_kernels_and_runs_with_torch_alone(tmp_path: pathlib.Path) -> None:
    strided = X[:, :3], X.mT.contiguous().mT, X[:1].expand(5, -1, -1), X[::2, 1::2]
    given = [X, X.repeat(3, 2, 1), *strided]
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    made = rewriter.export(
        block(), [Quantize()], X, package=tmp_path / "m.pt2", dynamic_shapes=sizes
    )
    assert set(made.own_ops) == {"rewriter::int8_linear"}
    assert made.package_ops == {}
    assert made.needs.startswith("the package loads and runs with torch alone; the program calls")
    wrong = [X.double(), X[..., 1:], X[:, :0]]
    found, (dtype, size, empty) = run_alone(made, given, wrong, tmp_path)
    assert "rewriter: x is float64, and the package was exported for float32" in dtype
    assert (
        "has the sizes [2, 6, 63], and the package was exported for [1 or more, 1 or more, 64]"
        in size
    )
    assert "has the sizes [2, 0, 64]" in empty
    model = rewritten({})
    with torch.no_grad():
        for x, y in zip(given, found, strict=True):
            assert_equal(y, model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["int8-weight", "int4-weight"])
def test_a_package_holds_weights_of_few_bits(
    scheme: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_only, "_pick", lambda *_: "native")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(72, 64), nn.ReLU(), nn.Linear(64, 40, bias=False)).eval()
    given = [torch.randn(3, 72), torch.randn(1, 72), torch.randn(40, 72)]
    sizes, how = ({0: torch.export.Dim.AUTO},), [OF_FEW_BITS[scheme]]
    made = rewriter.export(model, how, given[0], package=tmp_path / "m.pt2", dynamic_shapes=sizes)
    assert made.package_ops == {}
    found, _ = run_alone(made, given, [], tmp_path)
    own = rewrite(model, how, given[0])
    with torch.no_grad():
        for x, y in zip(given, found, strict=True):
            assert_reordered(y, own(x))
