"""Sparse products as ops of compiled programs: their numbers, and which graphs call them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from closeness import assert_reordered
from torch import Tensor, nn

import rewriter
from rewriter.kernels import native_ops, ops, rotation, sparse, sparse_int4
from rewriter.kernels.int8_linear import quantize_weight
from rewriter.kernels.sparse_int4 import pack_inputs, sparse_int4_reference
from rewriter.kernels.sparse_linear import sparse_linear_reference
from rewriter.kernels.weight_only import quantize_groups
from rewriter.passes import SparseInt4Linear, SparseInt8Linear, ThresholdLinear, TopKLinear

pytestmark = pytest.mark.skipif(
    native_ops.refusal() is not None, reason=f"no compiled kernel: {native_ops.refusal()}"
)
OUT, WIDTH = 37, 72
ROWS = ((), (1,), (2,), (0, 3), (16,), (17,))
SELECTIONS: dict[str, dict[str, Any]] = {
    "k": {"k": 20},
    "threshold": {"threshold": torch.tensor([0.5])},
    "all": {"threshold": torch.zeros(1)},
    "blocks": {"k": 24, "block": 8, "importance": torch.linspace(0.1, 3, WIDTH)},
}


@pytest.fixture(autouse=True)
def _sparse_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for kernel in (sparse, sparse_int4):
        monkeypatch.setattr(kernel, "_measured", lambda *_: 0.9)  # whatever pays on this machine


def selection(own: dict[str, Any]) -> tuple[Any, ...]:
    return own.get("threshold"), own.get("importance"), own.get("k", 0), own.get("block", 1)


@pytest.mark.parametrize("own", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("bits", [32, 8])
def test_the_op_is_its_formula(bits: int, own: dict[str, Any]) -> None:
    weight = torch.randn(OUT, WIDTH)
    weight, scale = quantize_weight(weight) if bits == 8 else (weight, None)
    columns = weight.t().contiguous()
    for rows, bias in itertools.product(ROWS, (None, torch.randn(OUT))):
        x = torch.randn(*rows, WIDTH)
        y = torch.ops.rewriter.native_sparse_linear(x, columns, scale, bias, *selection(own))
        assert_reordered(y, sparse_linear_reference(x, weight, scale, bias, *selection(own)))


@pytest.mark.parametrize("own", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_op_of_four_bits_is_its_formula(symmetric: bool, own: dict[str, Any]) -> None:
    q, scale, zero = quantize_groups(torch.randn(OUT, WIDTH), 4, 32, symmetric)
    levels = [pack_inputs(q, WIDTH), scale.t().contiguous()]
    zeros = None if zero is None else zero.t().contiguous()
    for rows, wide in itertools.product(ROWS, (False, True)):
        x, bias = torch.randn(*rows, WIDTH), torch.randn(OUT)
        if wide and x.numel():
            x.view(-1)[0] = 1e32  # too large for sums of levels
        given = [*levels, zeros, bias, *selection(own), 32]
        y = torch.ops.rewriter.native_sparse_int4_linear(x, *given)
        assert_reordered(y, sparse_int4_reference(x, *given))


def test_the_ops_refuse_what_does_not_fit() -> None:
    x, columns = torch.randn(2, WIDTH), torch.randn(WIDTH, OUT)
    op = torch.ops.rewriter.native_sparse_linear
    for message, call in {
        "neither a threshold": lambda: op(x, columns, None, None, None, None, 0, 1),
        "blocks that do not divide": lambda: op(x, columns, None, None, None, None, 10, 5),
        "x must be float32": lambda: op(x.double(), columns, None, None, None, None, 8, 1),
        "the weight must be": lambda: op(x, columns.t(), None, None, None, None, 8, 1),
        "the bias must be": lambda: op(x, columns, None, x[0], None, None, 8, 1),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


# torch.compile


def thresholded(out: int = OUT, share: float | None = 0.3, **options: Any) -> ThresholdLinear:
    weight = nn.Parameter(torch.randn(out, WIDTH))
    return ThresholdLinear.from_weights(weight, None, 1.0, share=share, **options)


def four_bits() -> SparseInt4Linear:
    q, scale, zero = quantize_groups(torch.randn(OUT, WIDTH), 4, 32, True)
    return SparseInt4Linear.of(thresholded(), q, scale, zero, 32)


LAYERS = {
    "threshold": thresholded,
    "topk": lambda: TopKLinear(WIDTH, OUT, 20),
    "int8": lambda: SparseInt8Linear.of(thresholded()),
    "int4": four_bits,
}


@pytest.fixture
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def notes() -> list[str]:
    """What the last report says of products with active inputs."""
    found = rewriter.last_reports()[-1].capture.notes
    return [n for n in found if "products with active inputs" in n]


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_compiled_code_calls_the_op_and_follows_the_weights(make: Any) -> None:
    layer = make().eval()
    compiled: Any = torch.compile(layer, backend=rewriter.backend(inner="aot_eager"), dynamic=False)
    with torch.no_grad():
        for x in (torch.randn(WIDTH), torch.randn(WIDTH, 1).t()):
            assert_reordered(compiled(x), layer(x))
            assert notes() == ["1 products with active inputs are called in C++"]
        compilations = len(rewriter.last_reports())
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.25)
                assert_reordered(compiled(x), layer(x))
        for tensor in layer.parameters():
            tensor.data = 2 * tensor.data  # other memory
            assert_reordered(compiled(x), layer(x))
        assert len(rewriter.last_reports()) == compilations


@pytest.mark.usefixtures("_fresh")
def test_the_report_says_why_the_op_is_not_called() -> None:
    layer, unknown = thresholded(), thresholded(share=None)
    backend = rewriter.backend(inner="eager")
    one, other = (torch.compile(m, backend=backend, dynamic=False) for m in (layer, unknown))
    x = torch.randn(1, WIDTH)
    with torch.no_grad():
        for rows, reason in {
            17: "dense at 17 rows; sparse kernels take up to 16",
            8: "dense: 94% of the weight's rows are active at 8 rows of input",
        }.items():
            one(x.expand(rows, WIDTH))
            (note,) = notes()
            assert note == f"1 products with active inputs are called by Python: {reason}"
        other(x)
        assert notes()[0].endswith("which share is active is not known")
        with torch.autocast("cpu", torch.bfloat16):
            assert one(x).dtype == torch.bfloat16
    before = rewriter.last_reports()[-1]
    one(x).sum().backward()  # a gradient is wanted
    assert rewriter.last_reports()[-1] is not before
    assert notes() == []
    assert layer.weight.grad is not None


class Gated(nn.Module):
    """Two layers that read one value by the same axes."""

    def __init__(self) -> None:
        super().__init__()
        axes = rotation.basis(torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q)
        self.gate, self.up = (thresholded(rotation=axes) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.gate(x)) * self.up(x)
        return y


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.usefixtures("_fresh")
def test_generated_code_calls_the_op_behind_one_product_with_the_axes() -> None:
    seen: list[dict[str, int]] = []

    def look(graph: torch.fx.Graph) -> None:
        names = [ops.name_of(n.target) for n in graph.nodes]
        seen.append({n: names.count(n) for n in names if n.startswith("rewriter::")})

    model = Gated().eval()
    backend = rewriter.backend(inductor={"post_grad_custom_pre_pass": look})
    compiled: Any = torch.compile(model, backend=backend, dynamic=False)
    x = torch.randn(1, 2, WIDTH)
    with torch.no_grad():
        assert_reordered(compiled(x), model(x))
        model.up.weight.mul_(-2)
        assert_reordered(compiled(x), model(x))
    once = {"rewriter::native_int8_weight_linear": 1, "rewriter::native_sparse_linear": 2}
    assert seen == [once]
