"""ONNX: every op of ours is written in its own ones, int8 as integer products, and runs there.

That every pass exports is a row of the interop table.
"""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from closeness import assert_reordered, sqnr
from torch import Tensor, nn

import rewriter
from rewriter import OptionError, RewriteError, rewrite
from rewriter.kernels import ops
from rewriter.passes import Monarch, Quadratic, Quantize

ROWS = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
MORE = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1))


def model(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias), nn.GELU(), nn.Linear(40, 18, bias)).eval()


def in_runtime(path: pathlib.Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def products_and_weights(path: pathlib.Path) -> tuple[int, set[int]]:
    """How many integer products a file has, and the types of its matrices."""
    import onnx

    graph = onnx.load(path).graph
    kinds = {t.data_type for t in graph.initializer if len(t.dims) > 1 and min(t.dims) > 1}
    return [node.op_type for node in graph.node].count("MatMulInteger"), kinds


@pytest.mark.clients
@pytest.mark.parametrize("activation", ["per_token", "per_tensor"])
@pytest.mark.parametrize(
    ("passes", "products"), [([], 2), ([Monarch(nblocks=3, rank=2, interleaved=True)], 4)]
)
def test_int8_is_integer_products_at_all_sizes(
    activation: Any, passes: Any, products: int, tmp_path: pathlib.Path
) -> None:
    import onnx

    passes = [*passes, Quantize("int8-dynamic", activation=activation)]
    made = rewriter.export(model(), passes, ROWS, format="onnx", package=tmp_path / "m.onnx")
    assert made.package is not None
    found, kinds = products_and_weights(made.package)
    assert found == products
    assert kinds == {onnx.TensorProto.INT8}
    want = rewrite(model(), passes, ROWS)
    for x in (ROWS, MORE, MORE[:1, :1]):
        assert sqnr(in_runtime(made.package, x), want(x)) > 60


@pytest.mark.clients
@pytest.mark.parametrize("smooth", [None, 0.5])
def test_static_int8_is_integer_products_too(smooth: Any, tmp_path: pathlib.Path) -> None:
    import onnx

    path, passes = tmp_path / "m.onnx", [Quantize("int8-static", smooth=smooth)]
    rewriter.export(model(), passes, ROWS, format="onnx", package=path, calibration=[ROWS])
    assert products_and_weights(path) == (2, {onnx.TensorProto.INT8})
    want = rewrite(model(), passes, ROWS, calibration=[ROWS])
    for x in (ROWS, MORE, MORE[:1, :1]):
        assert sqnr(in_runtime(path, x), want(x)) > 50


@pytest.mark.clients
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_monarch_is_products_that_take_any_dtype(
    dtype: torch.dtype, interleaved: bool, tmp_path: pathlib.Path
) -> None:
    import onnx

    passes = [Monarch(nblocks=(3, 5), rank=2, interleaved=interleaved)]
    plain = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 18, bias=False)).eval()
    path, x = tmp_path / "m.onnx", ROWS.to(dtype)
    rewriter.export(plain.to(dtype), passes, x, format="onnx", package=path)
    assert "Einsum" not in {node.op_type for node in onnx.load(path).graph.node}  # no bfloat16
    onnx.checker.check_model(path, full_check=True)
    if dtype == torch.float32:
        want = rewrite(plain, passes, ROWS)
        for more in (ROWS, MORE, MORE[:1, :1]):
            assert_reordered(in_runtime(path, more), want(more).detach())


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch's exporter itself
def test_a_rewritten_model_goes_through_torchs_own_exporter(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.onnx"
    made = rewrite(model(bias=False), [Monarch(nblocks=4, where="0"), Quadratic(where="2")], ROWS)
    sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(made, (ROWS,), dynamic_shapes=sizes)
    torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    assert_reordered(in_runtime(path, MORE), made(MORE).detach())


@pytest.mark.clients
@pytest.mark.parametrize(
    "rewriting",
    [
        Quantize("int8-dynamic", convolutions=True),
        Quantize("int8-dynamic", activation="per_tensor", convolutions=True),
        Quantize("int4-dynamic", convolutions=True),
    ],
    ids=str,
)
def test_integer_convolutions_run_at_all_sizes(rewriting: Quantize, tmp_path: pathlib.Path) -> None:
    """ONNX Runtime has no convolution in float64, as the reference is."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False)
    ).eval()
    passes = [rewriting]
    path, x = tmp_path / "m.onnx", torch.randn(3, 4, 12, 12)
    made = rewriter.export(plain, passes, x, format="onnx", package=path)
    assert len(made.report.replaced) == 2
    rewritten = rewrite(plain, passes, x)
    for images in (x, torch.randn(2, 4, 12, 12)):
        with torch.no_grad():
            assert sqnr(in_runtime(path, images), rewritten(images)) > 60


@pytest.mark.clients
@pytest.mark.parametrize("scheme", ["int8-weight", "int4-weight"])
def test_embeddings_of_few_bits_are_unpacked_there(scheme: str, tmp_path: pathlib.Path) -> None:
    """Also where what is unpacked depends on the call, and is no constant."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(50, 40), nn.Linear(40, 12)).eval()
    passes, ids = [Quantize(scheme, embeddings=True)], torch.randint(0, 50, (3, 5))
    path = tmp_path / "m.onnx"
    rewriter.export(plain, passes, ids, format="onnx", package=path)
    rewritten = rewrite(plain, passes, ids)
    for rows in (ids, torch.randint(0, 50, (2, 9))):
        with torch.no_grad():
            assert sqnr(in_runtime(path, rows), rewritten(rows)) > 60


@pytest.mark.clients
def test_what_onnx_cannot_express_is_named(tmp_path: pathlib.Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.airy_ai(x)

    with pytest.raises(RewriteError, match=r"ONNX cannot express m\.onnx: .*airy_ai"):
        rewriter.export(Odd(), [], ROWS, format="onnx", package=tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_impossible_onnx_options_are_refused() -> None:
    with pytest.raises(OptionError, match="format='onxx' is unknown; did you mean 'onnx'"):
        rewriter.export(model(), [], ROWS, format="onxx")
    with pytest.raises(OptionError, match=r"the suffix must be \.onnx"):
        rewriter.export(model(), [], ROWS, format="onnx", package="m.pt2")
    with pytest.raises(OptionError, match=r"needs package='model\.onnx'"):
        rewriter.export(model(), [], ROWS, format="onnx")


def test_what_onnx_is_given_takes_no_part_in_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With open sizes torch would run a decomposition in the place of the fake kernel."""

    def never(*args: Any) -> Any:
        raise AssertionError("the decomposition ran")

    made = rewrite(model(), [Monarch(nblocks=4)], ROWS)
    op = ops.find("rewriter::monarch_linear").op.default
    assert op in torch._decomp.decomposition_table
    table: Any = torch._decomp.decomposition_table
    monkeypatch.setitem(table.maps[-1], op, never)
    program = torch.export.export(made, (ROWS,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert op in [node.target for node in program.graph.nodes]


def test_what_onnx_is_given_is_no_decomposition_of_torchs() -> None:
    """Inductor refuses an op that has one, wherever the environment holds CI."""
    ours = [record.op.default for record in ops.records()]
    assert all(op in torch._decomp.decomposition_table for op in ours)
    assert torch._decomp.get_decompositions(ours) == {}
