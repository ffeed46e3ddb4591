"""Monarch: the op, its projection, the layer and the pass, against the theory."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_reordered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rewriter
from rewriter.base import Phase, Replacement, Skip
from rewriter.errors import OptionError
from rewriter.kernels import monarch
from rewriter.kernels.monarch import (
    monarch_dense,
    monarch_linear,
    monarch_linear_reference,
)
from rewriter.kernels.monarch_project import monarch_project
from rewriter.passes import Densify, Quantize
from rewriter.passes.monarch import Monarch, MonarchLinear
from rewriter.sites import LINEAR, Site

# in, out, nblocks: dividing and not, expanding and contracting, ragged on one side or on both
SIZES = [(16, 16, 4), (12, 20, 2), (20, 12, 4), (10, 7, 3), (9, 9, 4), (5, 8, 5), (6, 6, 1)]
UNEVEN = [(16, 16, (4, 2)), (10, 7, (2, 5))]  # more blocks of one side than of the other


def layer64(in_features: int, out_features: int, nblocks: int, **kw: object) -> MonarchLinear:
    return MonarchLinear(in_features, out_features, nblocks, dtype=torch.float64, **kw)  # type: ignore[arg-type]


def rel(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# The op ------------------------------------------------------------------------------------------


class _Products(TorchDispatchMode):
    """Which aten ops ran, and whether all that batch products read and write lies as BLAS takes it
    in place: one of the last two strides 1, the other at least that dimension's size."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func._overloadpacket.__name__)
        if self.names[-1] in ("bmm", "baddbmm"):
            for t in (*args[-2:], *(kwargs or {}).values()):
                (rows, columns), (down, across) = t.shape[-2:], t.stride()[-2:]
                assert (across == 1 and down >= columns) or (down == 1 and across >= rows), (
                    t.stride()
                )
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("bias", [True, False])
def test_torchs_products_read_and_write_in_place(bias):
    layer = layer64(16, 24, 4, bias=bias)
    x, grad = torch.randn(6, 16, dtype=torch.float64), torch.randn(6, 24, dtype=torch.float64)
    operands = monarch.Operands(x, layer.right.detach(), layer.left.detach(), layer.bias, 24)
    with torch.no_grad(), _Products() as ran:
        y, mid = monarch._forward_train(operands)
    assert_close(y, layer(x).detach())
    assert [n for n in ran.names if "bmm" in n] == ["bmm", "baddbmm" if bias else "bmm"]
    assert not {"copy_", "clone", "contiguous", "_to_copy"} & set(ran.names)
    with torch.no_grad(), _Products() as ran:
        monarch._backward(
            monarch.BackwardOperands(grad, x, mid, *operands[1:3], False, True, True, True)
        )
    assert sum(n == "bmm" for n in ran.names) == 4
    assert not {"copy_", "clone", "contiguous", "_to_copy"} & set(ran.names)


@pytest.mark.parametrize("sizes", SIZES + UNEVEN)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (3,), (2, 5), (64,), (2, 0, 3)])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_forward_is_the_formula_and_the_dense_product(sizes, lead, grad, interleaved):
    layer = layer64(*sizes, interleaved=interleaved)
    x = torch.randn(*lead, sizes[0], dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        y = layer(x)
    args = (layer.right, layer.left, layer.bias, layer.out_features, interleaved)
    assert y.is_contiguous()
    assert y.shape == (*lead, sizes[1])
    assert_close(y, monarch_linear_reference(x, *args))
    assert_close(y, F.linear(x, layer.dense_weight(), layer.bias))


@pytest.mark.parametrize("interleaved", [True, False])
def test_layout_of_factors_is_as_documented(interleaved):
    layer = layer64(12, 20, (3, 4), rank=2, interleaved=interleaved)
    ib, ob, rank, blocks, outputs = 4, 5, 2, 3, 4
    assert layer.right.shape == (blocks, rank * outputs, ib)
    assert layer.left.shape == (outputs, ob, blocks * rank)
    dense = layer.dense_weight()
    for s, j, k, i in [(0, 0, 0, 0), (4, 3, 2, 1), (1, 2, 1, 3)]:
        want = sum(
            layer.left[j, s, k * rank + r] * layer.right[k, r * outputs + j, i] for r in range(rank)
        )
        row = s * outputs + j if interleaved else j * ob + s
        assert_close(dense[row, k * ib + i], want)


@settings(max_examples=30)
@given(
    st.integers(1, 17),
    st.integers(1, 17),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 3),
    st.integers(0, 9),
    st.booleans(),
)
def test_any_size_forward_and_gradients(
    in_features, out_features, nblocks, rank, rows, interleaved
):
    nblocks = min(nblocks[0], in_features), min(nblocks[1], out_features)
    layer = layer64(in_features, out_features, nblocks, rank=rank)
    x = torch.randn(rows, in_features, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.right, layer.left, layer.bias)
    y, want = (
        f(*inputs, out_features, interleaved) for f in (monarch_linear, monarch_linear_reference)
    )
    assert_close(y, want)
    g = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, inputs, g), torch.autograd.grad(want, inputs, g))


@pytest.mark.parametrize("sizes", [(6, 8, 2), (7, 5, (3, 2))])
@pytest.mark.parametrize("lead", [(3,), ()])
@pytest.mark.parametrize("interleaved", [True, False])
def test_gradcheck_and_gradgradcheck(sizes, lead, interleaved):
    layer = layer64(*sizes)
    x = torch.randn(*lead, sizes[0], dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.right, layer.left, layer.bias)

    def call(*a: Tensor) -> Tensor:
        return monarch_linear(*a, sizes[1], interleaved)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("frozen", ["x", "right", "left", "bias"])
def test_frozen_inputs_get_no_gradient_and_the_others_theirs(frozen):
    layer = layer64(10, 7, 3)
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    named = {"x": x, "right": layer.right, "left": layer.left, "bias": layer.bias}
    named[frozen].requires_grad_(False)
    live = [t for name, t in named.items() if name != frozen]
    y = layer(x)
    want = monarch_linear_reference(x, layer.right, layer.left, layer.bias, 7)
    g = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, live, g), torch.autograd.grad(want, live, g))


def test_non_contiguous_inputs_factors_and_gradients():
    layer = layer64(16, 12, 4)
    x = torch.randn(16, 5, 3, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    right = layer.right.detach().mT.contiguous().mT.requires_grad_()
    left = layer.left.detach().mT.contiguous().mT.requires_grad_()
    inputs = (x, right, left)
    y = monarch_linear(*inputs, None, 12)
    want = monarch_linear_reference(*inputs, None, 12)
    assert_close(y, want)
    g = torch.randn(12, 5, 3, dtype=torch.float64).permute(2, 1, 0)
    assert_close(torch.autograd.grad(y, inputs, g), torch.autograd.grad(want, inputs, g))


@pytest.mark.parametrize("sizes", [(16, 16, 4), (10, 7, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(sizes, bias):
    layer = layer64(*sizes, bias=bias)
    x = torch.randn(3, sizes[0], dtype=torch.float64, requires_grad=True)
    args = (x, layer.right, layer.left, layer.bias, sizes[1], bias)
    torch.library.opcheck(torch.ops.rewriter.monarch_linear.default, args)
    torch.library.opcheck(torch.ops.rewriter.monarch_linear_train.default, args)
    with torch.no_grad():
        y, mid = torch.ops.rewriter.monarch_linear_train(*args)
        for need in [(True, True, True), (False, True, False), (True, False, True)]:
            torch.library.opcheck(
                torch.ops.rewriter.monarch_linear_backward.default,
                (y, x.detach(), mid, layer.right.detach(), layer.left.detach(), bias, *need),
                test_utils=("test_schema", "test_faketensor"),
            )


def test_flops_are_two_per_multiply_add():
    layer, x = MonarchLinear(64, 96, 4), torch.randn(5, 3, 64, requires_grad=True)
    n, rank, ib, ob = 4, 4, 16, 24
    forward = 2 * 15 * n * n * rank * (ib + ob)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * forward
    bmm_flops = FlopCounterMode(display=False)
    with bmm_flops:
        monarch_linear_reference(x.detach(), layer.right, layer.left, layer.bias, 96)
    assert bmm_flops.get_total_flops() == forward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, r, f, b: (x[:, :-4], r, f, b), "does not fit right"),
        (lambda x, r, f, b: (x[0, 0], r, f, b), "does not fit right"),
        (lambda x, r, f, b: (x, r[0], f, b), "must be 3-D"),
        (lambda x, r, f, b: (x, r, f[:, :, 1:], b), r"must be \[K, rank\*L, ib\]"),
        (lambda x, r, f, b: (x, r, f[:, 1:], b), "out_features 12 does not fit left"),
        (lambda x, r, f, b: (x, r, f, b[1:]), r"bias must be \[12\]"),
    ],
)
def test_shapes_that_do_not_fit_raise(change, message):
    layer = MonarchLinear(16, 12, 4)
    args = change(torch.randn(2, 16), layer.right, layer.left, layer.bias)
    with pytest.raises(ValueError, match=message):
        monarch_linear(*args, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 64])
def test_low_precision_is_within_its_rounding(dtype, rows):
    layer = MonarchLinear(32, 48, 4, dtype=dtype)
    x = torch.randn(rows, 32, dtype=dtype, requires_grad=True)
    y = layer(x)
    exact = copy.deepcopy(layer).double()
    want = F.linear(x.double(), exact.dense_weight(), exact.bias)
    assert y.dtype == dtype
    assert rel(y.double(), want) < 2 * torch.finfo(dtype).eps
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs(dtype):
    layer, x = MonarchLinear(32, 48, 4), torch.randn(8, 32)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert rel(y.float(), layer(x)) < 4 * torch.finfo(dtype).eps
    y.float().sum().backward()
    assert layer.right.grad is not None
    assert layer.right.grad.dtype == torch.float32


# Projection --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e-12])
@pytest.mark.parametrize("interleaved", [True, False])
def test_projection_error_is_the_discarded_singular_values(sizes, scale, interleaved):
    in_features, out_features, n = sizes
    w = scale * torch.randn(out_features, in_features, dtype=torch.float64)
    right, left, error = monarch_project(w, n, 1, interleaved)
    ib, ob = math.ceil(in_features / n), math.ceil(out_features / n)
    padded = F.pad(w, (0, n * ib - in_features, 0, n * ob - out_features))
    slices = padded.view(ob, n, n, ib).permute(1, 2, 0, 3)
    if not interleaved:
        slices = padded.view(n, ob, n, ib).transpose(1, 2)
    sigma = torch.linalg.svdvals(slices)
    optimum = (sigma[..., 1:].square().sum().sqrt() / w.norm()).item()
    assert error == pytest.approx(optimum, rel=1e-3)
    dense = monarch_dense(right, left, out_features, in_features, interleaved)
    assert rel(dense, w) == pytest.approx(error)
    # balanced: left and right of every rank-one term have the same norm
    assert_close(left.view(n, ob, n).norm(dim=1), right.view(n, n, ib).norm(dim=2).t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES + UNEVEN)
def test_projection_is_idempotent_and_exact_in_class(sizes, dtype):
    layer = layer64(*sizes).to(dtype)
    w = layer.dense_weight().detach()
    right, left, error = monarch_project(w, sizes[2], layer.rank)
    assert right.dtype == left.dtype == dtype
    again = monarch_dense(right, left, sizes[1], sizes[0])
    assert_close(again, w)
    assert error < 10 * torch.finfo(dtype).eps
    assert_close(monarch_dense(*monarch_project(again, sizes[2], layer.rank)[:2], *sizes[1::-1]), w)


def test_projection_of_ill_conditioned_slices_stays_optimal():
    """Singular values 1 … 1e-12: the Gram matrix cannot see the small ones."""
    u, v = (torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0] for _ in range(2))
    sigma = torch.logspace(0, -12, 16, dtype=torch.float64)
    _, _, error = monarch_project(u @ torch.diag(sigma) @ v, 1, 12)
    assert error == pytest.approx((sigma[12:].norm() / sigma.norm()).item(), rel=2e-3)


def test_projection_of_iid_weights_has_the_known_error():
    assert monarch_project(torch.randn(768, 768), 4, 48)[2] == pytest.approx(0.613, abs=0.003)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projection_of_low_precision(dtype):
    w = torch.randn(32, 32)
    right, left, error = monarch_project(w.to(dtype), 4, 2)
    assert right.dtype == left.dtype == dtype
    assert error == pytest.approx(monarch_project(w, 4, 2)[2], rel=1e-2)


def test_projection_of_zero_and_of_meta():
    right, left, error = monarch_project(torch.zeros(8, 8), 2, 2)
    assert error == 0.0
    assert not right.any()
    assert not left.any()
    right, left, error = monarch_project(torch.empty(9, 8, device="meta"), 2, 2)
    assert right.is_meta
    assert left.shape == (2, 5, 4)
    assert error is None


@pytest.mark.parametrize(("nblocks", "rank"), [(0, 1), (9, 1), (2, 0), (2, 5)])
def test_projection_refuses_impossible_sizes(nblocks, rank):
    with pytest.raises(ValueError, match="must be in"):
        monarch_project(torch.randn(8, 8), nblocks, rank)


def test_projection_restores_the_thread_count():
    threads = torch.get_num_threads()
    monarch_project(torch.randn(32, 32), 4, 2)
    assert torch.get_num_threads() == threads


def test_kronecker_products_and_hadamard_are_in_the_class():
    m = 4
    a, b = torch.randn(m, m, dtype=torch.float64), torch.randn(m, m, dtype=torch.float64)
    h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    hadamard = torch.kron(h2, h2)
    for w in (torch.kron(a, b), torch.kron(hadamard, hadamard)):
        # W[(o1,o2),(i1,i2)] = A[o1,i1] B[o2,i2]; a slice fixes o2 = l and i1 = k: rank 1
        right, left, error = monarch_project(w, m, 1, interleaved=True)
        assert error < 1e-12
        assert_close(monarch_dense(right, left, m * m, m * m, interleaved=True), w)


@pytest.mark.parametrize("part", ["real", "imag"])
def test_the_fourier_matrix_has_slices_of_rank_one_or_two(part):
    """F[s·m+l, k·m+i] = ω^{…}: with columns permuted (F·P) a slice is an outer product, whose real
    and imaginary parts have rank 2."""
    m = 4
    n = m * m
    f = torch.fft.fft(torch.eye(n, dtype=torch.float64))
    p = torch.arange(n).view(m, m).t().reshape(-1)
    assert monarch_project(getattr(f[:, p], part).contiguous(), m, 2, interleaved=True)[2] < 1e-12
    assert monarch_project(torch.randn(n, n), m, 2)[2] > 0.1


# The layer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_features", "out_features", "share"),
    [(768, 768, 0.5), (768, 3072, 0.3125), (3072, 768, 0.3125)],
)
def test_default_rank_gives_the_papers_parameter_counts(in_features, out_features, share):
    layer = MonarchLinear(in_features, out_features, 4, bias=False, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == share * in_features * out_features
    assert layer.rank == 48


@pytest.mark.parametrize(
    ("sizes", "blocks", "rank"),
    [
        ((1024, 1024), 32, 1),
        ((768, 3072), (24, 48), 1),
        ((1009, 64), (32, 8), 1),
        ((7, 1), (3, 1), 1),
    ],
)
def test_sqrt_blocks_are_the_classic_monarch(sizes, blocks, rank):
    """2 n^1.5 weights of n = m²; a prime is padded, not one dense block."""
    layer = MonarchLinear(*sizes, nblocks="sqrt", bias=False, device="meta")
    assert (layer.nblocks, layer.rank) == (blocks, rank)
    if sizes == (1024, 1024):
        assert sum(p.numel() for p in layer.parameters()) == 2 * 1024**1.5
    btt = MonarchLinear(*sizes, nblocks="sqrt", rank=3, bias=False, device="meta")
    assert btt.right.numel() == 3 * layer.right.numel()
    assert MonarchLinear(**btt.config()).left.shape == btt.left.shape


@pytest.mark.parametrize("sizes", [(768, 768, 4), (256, 1024, 4), (1024, 256, 8), (250, 130, 4)])
def test_random_init_matches_the_scale_of_nn_linear(sizes):
    layer, linear = MonarchLinear(*sizes), nn.Linear(sizes[0], sizes[1])
    x = torch.randn(2000, sizes[0])
    with torch.no_grad():
        std = (layer(x) - layer.bias).std().item()
        like = (linear(x) - linear.bias).std().item()
    assert std == pytest.approx(like, rel=0.05)
    assert std == pytest.approx(1 / math.sqrt(3), rel=0.05)
    bound = 1 / math.sqrt(sizes[0])
    assert 0.9 * bound < layer.bias.abs().max().item() <= bound


@settings(max_examples=25)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(2, 6))
def test_no_pair_of_blocks_is_disconnected(in_features, out_features, n):
    n = min(n, in_features, out_features)
    w = layer64(in_features, out_features, n).dense_weight()
    assert (w != 0).all()


def test_config_state_dict_pickle_and_deepcopy_round_trip():
    layer = MonarchLinear(10, 7, 3, bias=False)
    x = torch.randn(4, 10)
    fresh = MonarchLinear(**layer.config(), device="cpu", dtype=torch.float32)
    fresh.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    others = [
        fresh,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for other in others:
        assert_close(other(x), layer(x))
        assert other.config() == layer.config()
    assert set(MonarchLinear(8, 8).state_dict()) == {"right", "left", "bias"}
    assert "nblocks=3" in repr(layer)


def test_meta_and_dtype():
    layer = MonarchLinear(10, 7, 3, device="meta", dtype=torch.bfloat16)
    assert layer(torch.empty(2, 10, device="meta", dtype=torch.bfloat16)).shape == (2, 7)
    assert layer.dense_weight().shape == (7, 10)
    assert MonarchLinear(10, 7, 3).to(torch.float64).dense_weight().dtype == torch.float64


@pytest.mark.parametrize(
    "kwargs",
    [
        {"in_features": 0},
        {"nblocks": 0},
        {"nblocks": 9},
        {"nblocks": True},
        {"rank": 0},
        {"rank": 1.5},
    ],
)
def test_layer_refuses_impossible_arguments(kwargs):
    with pytest.raises(OptionError):
        MonarchLinear(**({"in_features": 8, "out_features": 8} | kwargs))


@pytest.mark.parametrize("sizes", [(16, 24, 4), (10, 7, 3)])
def test_compile_forward_and_backward(sizes):
    model = nn.Sequential(MonarchLinear(*sizes), nn.GELU())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 40):
        x = torch.randn(rows, sizes[0], requires_grad=True)
        inputs = [x, *model.parameters()]
        y, want = compiled(x), model(x)
        assert_close(y, want)
        g = torch.randn_like(y)
        assert_close(torch.autograd.grad(y, inputs, g), torch.autograd.grad(want, inputs, g))
        with torch.no_grad():
            assert_close(compiled(x), want)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export_keeps_the_op(dynamic):
    layer, x = MonarchLinear(10, 7, 3), torch.randn(4, 10)
    shapes = {"input": {0: torch.export.Dim.AUTO}} if dynamic else None
    program = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.rewriter.monarch_linear.default]
    x = torch.randn(9, 10) if dynamic else x
    assert_close(program.module()(x), layer(x))


def test_training_reduces_the_loss():
    layer, target = MonarchLinear(16, 16, 4), torch.randn(16, 16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(64, 16)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# The pass ----------------------------------------------------------------------------------------


def propose(linear: nn.Module, **options: object) -> Replacement | Skip:
    return Monarch(**options).propose(Site.of(linear))  # type: ignore[arg-type]


def accepted(linear: nn.Module, **options: object) -> tuple[MonarchLinear, Replacement]:
    answer = propose(linear, **options)
    assert isinstance(answer, Replacement)
    assert isinstance(answer.layer, MonarchLinear)
    return answer.layer, answer


def test_pass_declares_what_it_matches():
    assert Monarch.matches == (LINEAR,)
    assert Monarch.phase is Phase.STRUCTURE
    assert not Monarch().exact
    assert str(Monarch(nblocks=8)) == "Monarch(nblocks=8)"


@pytest.mark.parametrize("sizes", [(64, 64), (64, 96), (50, 70)])
def test_pass_projects_and_reports_the_error(sizes):
    linear = nn.Linear(*sizes).eval()
    before = copy.deepcopy(linear)
    layer, answer = accepted(linear)
    assert answer.error == pytest.approx(rel(layer.dense_weight(), linear.weight), rel=1e-3)
    assert layer.bias is linear.bias
    assert not layer.training
    x = torch.randn(200, sizes[0])
    assert rel(layer(x) - linear.bias, linear(x) - linear.bias) < 1.25 * answer.error
    assert_close(linear.weight, before.weight)
    assert sum(p.numel() for p in layer.parameters()) < sum(p.numel() for p in linear.parameters())


def test_pass_is_exact_on_weights_that_have_the_structure():
    linear = nn.Linear(48, 80)
    linear.weight.data = MonarchLinear(48, 80, 4).dense_weight().detach()
    layer, answer = accepted(linear)
    assert answer.error < 1e-6
    x = torch.randn(5, 48)
    assert_close(layer(x), linear(x))


def test_a_higher_rank_loses_less():
    linear = nn.Linear(64, 64)
    errors = [accepted(linear, rank=rank)[1].error for rank in (1, 2, 4, 7)]
    assert errors == sorted(errors, reverse=True)
    assert accepted(linear, rank=7)[0].rank == 7
    assert accepted(linear, nblocks=1, rank=8)[0].nblocks == 1  # plain low rank


@pytest.mark.parametrize("init", ["project", "random"])
def test_dtype_device_and_requires_grad_are_kept(init):
    linear = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer, _ = accepted(linear, init=init)
    assert layer.bias is None
    assert layer.right.dtype == layer.left.dtype == torch.bfloat16
    assert not layer.right.requires_grad
    assert not layer.left.requires_grad
    layer, answer = accepted(nn.Linear(16, 16, device="meta"), init=init)
    assert layer.right.is_meta
    assert layer.right.requires_grad
    assert answer.error is None


def test_random_init_keeps_the_bias_and_says_what_it_lost():
    linear = nn.Linear(64, 64)
    layer, answer = accepted(linear, init="random")
    assert layer.bias is linear.bias
    assert "forgotten" in answer.note
    assert answer.error == pytest.approx(rel(layer.dense_weight(), linear.weight), rel=1e-5)
    assert 1.2 < answer.error < 1.6  # two independent matrices of equal norm: √2


@pytest.mark.parametrize(
    "options",
    [
        {"nblocks": 0},
        {"nblocks": -4},
        {"nblocks": 2.0},
        {"nblocks": True},
        {"rank": 0},
        {"rank": False},
        {"init": "svd"},
    ],
)
def test_impossible_options(options):
    with pytest.raises(
        OptionError, match=f"Monarch: {next(iter(options))}( must be|='svd' is unkn)"
    ):
        Monarch(**options)


def reason(linear: nn.Module, **options: object) -> str:
    answer = propose(linear, **options)
    assert isinstance(answer, Skip)
    return answer.reason


def test_skip_more_blocks_than_features():
    assert reason(nn.Linear(64, 3)) == "nblocks 4 is more than the 64 -> 3 features"


def test_skip_no_fewer_parameters():
    assert reason(nn.Linear(8, 8), rank=2) == (
        "monarch would hold 128 parameters, the dense weight holds 64"
    )
    assert "monarch would hold" in reason(nn.Linear(16, 16), nblocks=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_skip_non_finite_weights(bad, name):
    linear = nn.Linear(16, 16)
    getattr(linear, name).data.view(-1)[3] = bad
    assert reason(linear) == "the weights hold NaN or inf"


def test_skip_weights_that_are_not_floating_point():
    linear = nn.Linear(16, 16)
    linear.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    assert reason(linear) == "the weights are torch.int8, not real floats of 16 bits or more"


# The cap -----------------------------------------------------------------------------------------


def test_cap_holds_the_root_mean_square_and_leaves_small_factors_alone():
    """gain·F / max(1, RMS(F)/σ), σ = √min(d_in, d_out)/d_in (Qiu et al. 2024)."""
    layer = MonarchLinear(24, 16, 4, cap=True, dtype=torch.float64)
    plain = MonarchLinear(24, 16, 4, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(7, 24).double()
    sigmas = [(min(f.shape[1:]) ** 0.5) / f.shape[2] for f in (layer.right, layer.left)]
    assert_close(layer(x), plain(x))
    with torch.no_grad():
        layer.right_gain.fill_(1)
        layer.left_gain.fill_(1)
        layer.right.mul_(100)
        layer.left.mul_(100)
    for factor, sigma in zip(layer.factors(), sigmas, strict=True):
        assert float(factor.detach().square().mean().sqrt()) == pytest.approx(sigma)
    layer(x).square().sum().backward()
    assert float(layer.right_gain.grad) != 0
    # a capped factor does not grow with its scale: the gradient is orthogonal to it
    assert float((layer.right.grad * layer.right.detach()).sum()) == pytest.approx(0, abs=1e-6)
    groups = rewriter.param_groups(nn.Sequential(layer), 1e-3, 0.1)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert id(layer.right_gain) not in decayed
    zero = MonarchLinear(8, 8, 2, cap=True)
    nn.init.zeros_(zero.right)
    zero(torch.randn(2, 8)).sum().backward()
    assert bool(torch.isfinite(zero.right.grad).all())


@pytest.mark.parametrize("cap", [False, True])
def test_capped_layers_start_where_the_others_do(cap, tmp_path):
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    with torch.no_grad():
        model[0].weight.mul_(30)  # far over the cap
    x = torch.randn(5, 32)
    plain = rewriter.rewrite(model, [Monarch()], x)
    made = rewriter.rewrite(model, [Monarch(cap=cap)], x)
    assert_close(made(x), plain(x))
    rewriter.save(made, tmp_path / "saved")
    again = rewriter.load(tmp_path / "saved", model)
    assert torch.equal(again(x), made(x))
    assert_reordered(rewriter.rewrite(made, [Densify()], x)(x), made(x))
    int8 = rewriter.rewrite(made, [Quantize("int8-dynamic")], x)
    assert rel(int8(x), made(x)) < 0.05


# the gate


def test_latency_keeps_dense_the_layers_that_monarch_slows() -> None:
    """Layer by layer, at the example's batch, with both times as the reason."""
    sizes = ((64, 64), (64, 4096), (4096, 4096))
    model = nn.Sequential(*(nn.Linear(*size) for size in sizes)).to("meta")
    kept = {}
    for rows in (1, 4096):
        x = torch.zeros(rows, 64, device="meta")
        passes = [Monarch(nblocks=4, init="random")]
        report = rewriter.explain(model, passes, x, objective="latency", device="h100")
        for d in report.replaced:
            assert d.before is not None
            assert d.after is not None
            assert d.before.latency_s is not None
            assert d.after.latency_s is not None
            assert d.after.latency_s < d.before.latency_s
        for d in report.decisions:
            if not d.changed:
                found = re.fullmatch(
                    r"predicted (\S+) µs on H100-SXM, the layer it replaces (\S+) µs", d.reason
                )
                assert found, d.reason
                assert float(found[1]) >= float(found[2])
        kept[rows] = [d.site for d in report.decisions if not d.changed]
    assert kept == {1: ["0", "1"], 4096: ["0"]}  # two launches cost more than what they save


@pytest.mark.parametrize(("dense", "monarch"), [(20e-6, 30e-6), (20e-6, 20e-6), (20e-6, 10e-6)])
def test_latency_goes_by_what_is_measured(
    dense: float, monarch: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewriter.engine.decide.timed", lambda *_: (dense, monarch))
    made = rewriter.rewrite(
        nn.Sequential(nn.Linear(64, 64)), [Monarch(nblocks=4)], torch.randn(4, 64),
        objective="latency",
    )  # fmt: skip
    (decision,) = made.report.decisions
    if monarch < dense:
        assert isinstance(made[0], MonarchLinear)
    else:
        assert type(made[0]) is nn.Linear
        assert decision.action == "declined"
        assert decision.reason == (
            f"measured {monarch * 1e6:.0f} µs, the layer it replaces {dense * 1e6:.0f} µs"
        )
