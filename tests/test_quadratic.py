"""Quadratic: the op against its formula, the layer as a citizen of PyTorch, the pass."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from closeness import sqnr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from rewriter.base import Phase, Replacement, Skip
from rewriter.errors import OptionError
from rewriter.kernels.quadratic import quadratic_linear, quadratic_linear_reference
from rewriter.passes.quadratic import Quadratic, QuadraticLinear
from rewriter.sites import LINEAR, Site

OPS = torch.ops.rewriter


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tensors(
    *lead: int, n: int = 5, out: int = 4, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    shapes = [(*lead, n), (out, n), (out, n), (out, n), (out,)]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def propose(layer: nn.Module, **options: object) -> QuadraticLinear:
    found = Quadratic(**options).propose(Site.of(layer))
    assert isinstance(found, Replacement), found
    assert isinstance(found.layer, QuadraticLinear)
    return found.layer


def check_against_reference(args: list[Tensor]) -> None:
    y, expected = quadratic_linear(*args), quadratic_linear_reference(*args)
    assert_close(y, expected)
    assert y.is_contiguous()
    g = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, args, g), torch.autograd.grad(expected, args, g))


# --- the op


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0), (2, 1, 3)])
def test_any_leading_shape(lead):
    check_against_reference(tensors(*lead))


@settings(max_examples=15)
@given(st.integers(0, 6), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_equals_reference_of_any_size(rows, n, out, has_bias):
    check_against_reference(tensors(rows, n=n, out=out)[: 5 if has_bias else 4])


def test_non_contiguous():
    x, *rest = tensors(6, 3, n=5)
    check_against_reference([x.detach().transpose(0, 1).requires_grad_(), *rest])
    check_against_reference([x.detach()[:, :1].expand(6, 3, 5).requires_grad_(), *rest])


def test_gradients():
    args = tensors(2, 3)
    assert torch.autograd.gradcheck(quadratic_linear, args)
    assert torch.autograd.gradgradcheck(quadratic_linear, args)
    args = tensors()
    assert torch.autograd.gradcheck(quadratic_linear, args)
    assert torch.autograd.gradgradcheck(quadratic_linear, args)


@pytest.mark.parametrize("wanted", range(5))
def test_gradient_of_one_input_alone(wanted):
    args = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors(3))]
    (expected,) = torch.autograd.grad(quadratic_linear_reference(*args).sum(), args[wanted])
    (found,) = torch.autograd.grad(quadratic_linear(*args).sum(), args[wanted])
    assert_close(found, expected)


def test_opcheck():
    args = tensors(2, 3)
    torch.library.opcheck(OPS.quadratic_linear, args)
    torch.library.opcheck(OPS.quadratic_linear, [*(t.detach() for t in args[:4]), None])
    g = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    for needs in ([True] * 4, [True, False, False, False], [False, True, False, True]):
        torch.library.opcheck(OPS.quadratic_linear_backward, (g, *args[:4], needs))


def test_bad_shapes_are_named():
    x, a, b, c, bias = tensors(3)
    with pytest.raises(RuntimeError, match=r"take x of shape \[\*, 5\], not \(3, 4\)"):
        quadratic_linear(x[:, :4], a, b, c, bias)
    with pytest.raises(RuntimeError, match="three weights must have one shape"):
        quadratic_linear(x, a, b[:2], c, bias)
    with pytest.raises(RuntimeError, match=r"bias must have shape \[4\]"):
        quadratic_linear(x, a, b, c, bias[:1])


def test_flops():
    x, *weights = tensors(2, 3)
    gemm = 2 * 6 * 5 * 4
    with FlopCounterMode(display=False) as forward:
        y = quadratic_linear(x, *weights)
    assert forward.get_total_flops() == 3 * gemm
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 8 * gemm  # six of the closed form, A and B again
    y = quadratic_linear(x.detach(), *weights)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 5 * gemm


def test_saves_the_input_and_the_weights_only():
    args = tensors(7)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quadratic_linear(*args)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in args[:4]}


def test_partitioner_cannot_save_the_products():
    """Under AOTAutograd with the min-cut partitioner nothing of the output's size is saved."""
    from functorch.compile import aot_function, min_cut_rematerialization_partition, nop

    forwards = []

    def keep(graph, inputs):
        forwards.append(graph)
        return nop(graph, inputs)

    args = tensors(7)
    compiled = aot_function(
        quadratic_linear,
        fw_compiler=keep,
        bw_compiler=nop,
        partition_fn=min_cut_rematerialization_partition,
    )
    y = compiled(*args)
    y.sum().backward()
    assert_close(y, quadratic_linear_reference(*args))
    out, *saved = forwards[0].graph.find_nodes(op="output")[0].args[0]
    assert out.op == "call_function"
    assert [node.op for node in saved] == ["placeholder"] * 4


def test_bfloat16():
    exact = tensors(64, n=32, out=16)
    half = [t.detach().bfloat16() for t in exact]
    y = quadratic_linear(*half)
    assert y.dtype == torch.bfloat16
    expected = quadratic_linear_reference(*(t.double() for t in half))
    assert sqnr(y, expected) > 40  # 8 bits of mantissa: about 48 dB for one rounding


# --- the layer


def test_layer_is_a_module_like_any_other():
    layer, x = QuadraticLinear(6, 4), torch.randn(2, 3, 6)
    y = layer(x)
    assert_close(copy.deepcopy(layer)(x), y)
    assert_close(pickle.loads(pickle.dumps(layer))(x), y)
    again = QuadraticLinear(**layer.config())
    again.load_state_dict(layer.state_dict())
    assert_close(again(x), y)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert set(layer.state_dict()) == {"weight_a", "weight_b", "weight_c", "bias"}
    assert layer.to(torch.float64)(x.double()).dtype == torch.float64
    assert QuadraticLinear(6, 4, bias=False).config()["bias"] is False


def test_layer_on_meta():
    layer = QuadraticLinear(6, 4, device="meta", dtype=torch.bfloat16)
    y = layer(torch.empty(2, 6, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 4), torch.bfloat16, "meta")


def test_compile():
    layer, x = QuadraticLinear(6, 4), torch.randn(5, 6)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    layer(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for p, q in zip(layer.parameters(), compiled.parameters(), strict=True):
        assert_close(q.grad, p.grad)


def test_export_keeps_one_op():
    layer, x = QuadraticLinear(6, 4), torch.randn(5, 6)
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: batch}})
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert called == [OPS.quadratic_linear.default]
    x = torch.randn(9, 6)
    assert_close(program.module()(x), layer(x))


def test_autocast():
    layer, x = QuadraticLinear(6, 4), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight_a.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64


def test_random_init_has_the_scale_of_a_linear_layer():
    y = QuadraticLinear(128, 512, bias=False)(torch.randn(256, 128))
    assert y.std().item() == pytest.approx(3**-0.5, rel=0.1)


# --- the pass


def test_preserve_is_bit_equal_and_keeps_the_parameters():
    for dtype in (torch.float32, torch.bfloat16):
        linear, x = nn.Linear(6, 4, dtype=dtype), torch.randn(2, 3, 6, dtype=dtype)
        layer = propose(linear)
        assert layer.weight_c is linear.weight
        assert layer.bias is linear.bias
        assert all(p.dtype == dtype for p in layer.parameters())
        assert torch.equal(layer(x), linear(x))
    linear = nn.Linear(6, 4, bias=False)
    assert torch.equal(propose(linear)(x.float()), linear(x.float()))


def test_preserve_of_a_transposed_weight_gets_its_own_storage():
    root = nn.Module()
    root.weight = nn.Parameter(torch.randn(6, 4))  # [in, out]
    site = Site(LINEAR, "weight", root, weight_ref="weight", transposed=True)
    layer = Quadratic().propose(site).layer
    x = torch.randn(3, 6)
    assert_close(layer(x), x @ root.weight)
    assert layer.weight_c.is_contiguous()
    assert layer.weight_c.data_ptr() != root.weight.data_ptr()
    assert layer.weight_c.requires_grad


def test_what_the_replacement_says():
    assert Quadratic.matches == (LINEAR,)
    assert Quadratic.phase is Phase.STRUCTURE
    site = Site.of(nn.Linear(6, 4))
    assert Quadratic().exact
    assert Quadratic().propose(site).error == 0.0
    assert not Quadratic(init="random").exact
    assert Quadratic(init="random").propose(site).error is None
    assert str(Quadratic(init="random")) == "Quadratic(neuron='new', init='random')"


def test_gradients_at_the_start():
    layer = propose(nn.Linear(6, 4))
    layer(torch.randn(5, 6)).square().sum().backward()
    assert layer.weight_b.grad.abs().max() > 0
    assert layer.weight_c.grad.abs().max() > 0
    assert layer.weight_a.grad.abs().max() == 0


def test_training_fits_a_product_that_no_linear_layer_can():
    x = torch.randn(256, 2)
    target = (x[:, :1] * x[:, 1:]).detach()

    def fit(layer: nn.Module) -> float:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(layer(x), target)
            loss.backward()
            optimizer.step()
        return loss.item()

    linear = nn.Linear(2, 1)
    layer = propose(copy.deepcopy(linear))
    assert fit(layer) < 0.05 * fit(linear)


@pytest.mark.parametrize("init", ["preserve", "random"])
def test_frozen_weights_stay_frozen(init):
    linear = nn.Linear(6, 4)
    linear.weight.requires_grad_(False)
    layer = propose(linear, init=init)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]


@pytest.mark.parametrize("init", ["preserve", "random"])
def test_new_weights_repeat_and_leave_the_random_state_alone(init):
    linear, state = nn.Linear(6, 4), torch.get_rng_state()
    first, second = propose(linear, init=init), propose(linear, init=init)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight_a, second.weight_a)
    other = Quadratic(init=init).propose(Site.of(linear, "other")).layer
    assert not torch.equal(first.weight_a, other.weight_a)
    torch.manual_seed(1)
    assert not torch.equal(first.weight_a, propose(linear, init=init).weight_a)


@pytest.mark.parametrize("init", ["preserve", "random"])
def test_weights_on_meta(init):
    layer = propose(nn.Linear(6, 4, device="meta", dtype=torch.float16), init=init)
    assert all(p.is_meta and p.dtype == torch.float16 for p in layer.parameters())


def test_the_site_is_left_alone():
    linear = nn.Linear(6, 4)
    before = {k: v.clone() for k, v in linear.state_dict().items()}
    propose(linear)
    propose(linear, init="random")
    assert_close(dict(linear.state_dict()), before)


def refusal(linear: nn.Module) -> str:
    found = Quadratic().propose(Site.of(linear))
    assert isinstance(found, Skip)
    return found.reason


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skip_non_finite(name, value):
    linear = nn.Linear(6, 4)
    with torch.no_grad():
        getattr(linear, name)[0] = value
    assert refusal(linear) == "the weights hold NaN or inf"


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_skip_not_floating_point(dtype):
    linear = nn.Linear(6, 4)
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    assert refusal(linear) == f"the weights are {dtype}, not real floats of 16 bits or more"


def test_skip_empty():
    linear = nn.Linear(6, 4)
    linear.weight = nn.Parameter(torch.empty(0, 6))
    assert refusal(linear) == "the weight is empty: (0, 6)"


def test_impossible_options():
    with pytest.raises(OptionError, match="neuron='t2' is unknown; there are new"):
        Quadratic(neuron="t2")
    with pytest.raises(OptionError, match="init='zeros' is unknown; there are preserve, ran"):
        Quadratic(init="zeros")
