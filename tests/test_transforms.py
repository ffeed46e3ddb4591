"""Every layer of ours under autograd: any shape, in-place operations behind it, second derivatives,
forward mode and the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_equal, assert_reordered
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from rewriter import rewrite
from rewriter.layer import Layer
from rewriter.passes import (
    Int4Linear,
    Int8WeightLinear,
    Monarch,
    MonarchChainLinear,
    MonarchLinear,
    MonarchResidualLinear,
    QuadraticLinear,
    Quantize,
    QuantizedLinear,
    QuantizedMonarch,
    RoutedLinear,
    StaticOutlierLinear,
    StaticQuantizedLinear,
    TopKLinear,
)

# torch's own forward mode scripts some of its formulas
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")

Make = Callable[[bool], Layer]
SMOOTH: dict[str, Make] = {
    "monarch": lambda bias: MonarchLinear(12, 10, bias=bias),
    "monarch interleaved": lambda bias: MonarchLinear(12, 12, bias=bias, interleaved=True),
    "monarch capped": lambda bias: MonarchLinear(12, 10, bias=bias, cap=True),
    "chain": lambda bias: MonarchChainLinear(12, 10, bias=bias),
    "chain of stars": lambda bias: MonarchChainLinear(12, 10, stars=1, bias=bias),
    "low-rank residual": lambda bias: MonarchResidualLinear(12, 10, bias=bias),
    "sparse residual": lambda bias: MonarchResidualLinear(
        40, 36, residual="block-sparse", bias=bias
    ),
    "quadratic": lambda bias: QuadraticLinear(12, 10, bias=bias),
    "topk": lambda bias: TopKLinear(12, 10, 4, bias=bias),
    "routed": lambda bias: RoutedLinear(12, 10, "silu", 5, 2, bias=bias),
}
ROUNDED: dict[str, Make] = {
    "int8": lambda bias: QuantizedLinear(12, 10, bias=bias),
    "int8 static, outliers": lambda bias: StaticOutlierLinear(12, 10, 2, bias=bias),
    "int8 static": lambda bias: StaticQuantizedLinear(12, 10, bias=bias),
    "int8 static, smooth": lambda bias: StaticQuantizedLinear(12, 10, bias=bias, smooth=True),
    "int8 weights": lambda bias: Int8WeightLinear(12, 10, bias=bias),
    "int4 weights": lambda bias: Int4Linear(12, 10, bias=bias, group_size=32, symmetric=False),
    "int4 on int8": lambda bias: Int4Linear(12, 10, bias=bias, dynamic=True),
    "int8 per tensor": lambda bias: QuantizedLinear(12, 10, bias, "per_tensor"),
    "int8 monarch": lambda bias: QuantizedMonarch(12, 10, bias=bias),
    "int8 monarch interleaved": lambda bias: QuantizedMonarch(12, 12, bias=bias, interleaved=True),
}
LAYERS = SMOOTH | ROUNDED
SHAPES = [(), (1,), (3,), (2, 3), (0,), (2, 0, 3)]


def made(name: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> Layer:
    torch.manual_seed(0)
    layer = LAYERS[name](bias)
    return layer.to(dtype)


def given(layer: Layer, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, layer.in_features, generator=generator, dtype=dtype)


def dense(layer: Layer) -> Tensor:
    return layer.dense_weight().detach()


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_come_in_the_shapes_of_what_they_are_of(
    name: str, bias: bool, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWRITER_NATIVE", native)
    layer = made(name, bias)
    for shape in SHAPES:
        for wanted in (True, False):  # of the input too, or of the parameters alone
            x = given(layer, *shape).requires_grad_(wanted)
            leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
            if not leaves:
                continue
            y = layer(x)
            assert y.shape == (*shape, layer.out_features)
            found = torch.autograd.grad(y.sum(), leaves)
            assert [g.shape for g in found] == [t.shape for t in leaves]
            if shape == (1,):
                alone = torch.autograd.grad(layer(x[0]).sum(), leaves)
                for one, many in zip(alone, found, strict=True):
                    assert_reordered(one, many)


FOLLOWERS: dict[str, Callable[[Tensor], object]] = {
    "+=": lambda h: h.__iadd__(1),
    "relu": lambda h: F.relu(h, inplace=True),
    "dropout": lambda h: F.dropout(h, 0.5, inplace=True),
    "set": lambda h: h.__setitem__(..., 0.0),
    "out": lambda h: h.mul_(2).clamp_(-1, 1),
}


@pytest.mark.parametrize("follower", FOLLOWERS)
@pytest.mark.parametrize("name", LAYERS)
def test_what_a_layer_gives_can_be_written_in_place(name: str, follower: str) -> None:
    layer, follow = made(name), FOLLOWERS[follower]
    for shape in SHAPES:
        x, other = (given(layer, *shape).requires_grad_() for _ in range(2))
        torch.manual_seed(0)
        h = layer(x)
        assert not h._is_view()
        assert h.is_contiguous()
        follow(h)
        h.sum().backward()
        torch.manual_seed(0)
        h = layer(other).clone()
        follow(h)
        h.sum().backward()
        assert_equal(x.grad, other.grad)


@pytest.mark.parametrize("name", LAYERS)
def test_what_was_computed_without_gradients_can_be_written_with_them(name: str) -> None:
    layer = made(name)
    with torch.no_grad():
        h = layer(given(layer, 2, 3))
    scale = torch.ones(()).requires_grad_()
    h *= scale  # of a view that was made under no_grad, torch refuses it
    h.sum().backward()
    assert scale.grad is not None


def test_a_small_last_batch_of_a_wide_layer_can_be_written_in_place() -> None:
    layer = MonarchLinear(768, 768)
    for rows in (128, 4):
        h = layer(torch.randn(rows, 768))
        h += 1
        h.sum().backward()


@pytest.mark.parametrize("name", SMOOTH)
def test_forward_mode_is_the_derivative(name: str) -> None:
    layer = made(name, dtype=torch.float64)
    x, t = (given(layer, 3, dtype=torch.float64) * k for k in (1, 0.5))
    want = torch.autograd.functional.jvp(layer, x, t)[1]  # by two backwards
    y, tangent = jvp(layer, (x,), (t,))
    assert_reordered(y, layer(x))
    assert_reordered(tangent, want)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t)))
    assert got.tangent is not None
    assert_reordered(got.tangent, want)


@pytest.mark.parametrize("name", ROUNDED)
def test_forward_mode_of_int8_takes_rounding_for_the_identity(name: str) -> None:
    layer = made(name)
    x, t = given(layer, 3), 0.5 * given(layer, 3)
    y, tangent = jvp(layer, (x,), (t,))
    assert_reordered(y, layer(x))
    assert_reordered(tangent, t @ dense(layer).t())
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t)))
    assert got.tangent is not None
    assert_reordered(got.tangent, t @ dense(layer).t())


@pytest.mark.parametrize("name", LAYERS)
def test_all_ways_to_a_jacobian_agree(name: str) -> None:
    layer = made(name)
    x = given(layer, 1)
    want = torch.autograd.functional.jacobian(layer, x)
    for got in (
        jacrev(layer)(x),
        jacfwd(layer)(x),
        torch.autograd.functional.jacobian(layer, x, vectorize=True),
    ):
        assert_reordered(got, want)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_per_sample_are_those_of_each_sample_alone(name: str) -> None:
    layer, x = made(name), given(made(name), 3)
    own = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(layer, parameters, (row,)).square().sum()

    found = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(own, x)
    for i, row in enumerate(x):
        row = row.clone().requires_grad_()
        leaves = [*layer.parameters(), row]
        want = torch.autograd.grad(layer(row).square().sum(), leaves)
        for got, wanted in zip([*found[0].values(), found[1]], want, strict=True):
            assert_reordered(got[i], wanted)


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivatives_are_right(name: str) -> None:
    layer = made(name, dtype=torch.float64)
    x = given(layer, 2, dtype=torch.float64).requires_grad_()
    own = [p.requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradgradcheck(
        lambda v, *_: layer(v).square(), (x[:1, :].detach().requires_grad_(), *own),
        fast_mode=True,
    )  # fmt: skip
    row = x[0].detach()
    want = torch.autograd.functional.hessian(lambda v: layer(v).square().sum(), row)
    assert_reordered(hessian(lambda v: layer(v).square().sum())(row), want)


@pytest.mark.parametrize("name", ROUNDED)
def test_the_second_derivative_of_int8_is_that_of_a_linear_layer(name: str) -> None:
    layer = made(name)
    x = given(layer)
    weight = dense(layer)
    got = torch.autograd.functional.hessian(lambda v: layer(v).square().sum(), x)
    assert_reordered(got, 2 * weight.t() @ weight)
    assert_reordered(hessian(lambda v: layer(v).square().sum())(x), 2 * weight.t() @ weight)


# one that calls torch's own linear is as that is: with a bias it gives float32 under vmap
@pytest.mark.parametrize("name", [n for n in LAYERS if n != "routed"])
def test_vmap_under_autocast_gives_what_autocast_gives(name: str) -> None:
    layer, x = made(name), given(made(name), 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = layer(x), vmap(layer)(x)
    assert got.dtype == want.dtype
    if "tensor" not in name:  # vmap's range is that of each element
        assert_reordered(got, want)


@pytest.mark.parametrize("passes", [[Monarch()], [Quantize()], [Monarch(), Quantize()]], ids=str)
def test_a_rewritten_model_has_tangents(passes: list[Monarch | Quantize]) -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 16))
    x = torch.randn(4, 16)
    optimized = rewrite(model, passes, x)
    assert "cannot be priced" not in str(optimized.report)
    for parameter in optimized.parameters():
        parameter.requires_grad_(False)  # else no call is lowered
    _, tangent = jvp(optimized, (x,), (x,))
    y = optimized(x.clone().requires_grad_())
    jacobian = torch.autograd.functional.jacobian(lambda v: optimized(v)[0], x)[:, 0]
    assert_reordered(tangent[0], jacobian @ x[0])
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(optimized(forward_ad.make_dual(x, x))).tangent
    assert got is not None
    assert_reordered(got[0], jacobian @ x[0])
    assert y.requires_grad
