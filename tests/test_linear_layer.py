"""Layers that compute their weight: they are linear layers to those who ask, and lose no write."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from closeness import assert_equal, assert_reordered
from torch import nn

from rewriter import OptionError, Pass, RewriteWarning, load, passes, rewrite
from rewriter.modules.pointwise import Pointwise
from rewriter.passes import Int4Linear, Monarch, MonarchChain, MonarchResidual, Quantize

RECIPES: dict[str, list[Pass]] = {
    "monarch": [Monarch(nblocks=2)],
    "chain": [MonarchChain()],
    "residual": [MonarchResidual(nblocks=2)],
    "int8": [Quantize("int8-dynamic")],
    "int8 weights": [Quantize("int8-weight")],
    "int4 weights": [Quantize("int4-weight", group_size=32, symmetric=False)],
    "int8 monarch": [Monarch(nblocks=2), Quantize("int8-dynamic")],
}


ROUNDED = ("int8", "int8 weights", "int4 weights")


def rewritten(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval()
    return rewrite(model, RECIPES[recipe], torch.randn(4, 16))


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_reads_as_a_linear_layer(recipe: str) -> None:
    layer = rewritten(recipe)[2]
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (16, 32)
    assert torch.equal(layer.weight, layer.dense_weight())
    assert type(layer.weight + 1) is torch.Tensor
    assert type(copy.deepcopy(layer.weight.detach())) is torch.Tensor
    assert torch.equal(pickle.loads(pickle.dumps(layer.weight.detach())), layer.dense_weight())


def test_gradients_go_through_a_weight_that_is_read() -> None:
    layer = rewritten("monarch")[2]
    layer.weight.square().sum().backward()
    through, layer.right.grad = layer.right.grad, None
    layer.dense_weight().square().sum().backward()
    assert torch.equal(through, layer.right.grad)


def add_to_data(layer: Any) -> None:
    layer.weight.data += 1


def set_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data + 1


def copy_into(layer: Any) -> None:
    layer.weight.data.copy_(layer.dense_weight() + 1)


def rows_of_data(layer: Any) -> None:
    layer.weight.data[:5] += 1
    layer.weight.data[5:].add_(1)


def in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.add_(1)


def a_parameter(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.dense_weight().detach() + 1)


def inference(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight.data += 1


WRITES = [add_to_data, set_data, copy_into, rows_of_data, in_place, a_parameter, inference]


@pytest.mark.parametrize(
    ("recipe", "write"),
    [(r, w) for r in RECIPES for w in WRITES if r not in ROUNDED or w is a_parameter],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_no_write_to_a_computed_weight_is_lost(recipe: str, write: Callable[[Any], None]) -> None:
    layer, x = rewritten(recipe)[2], torch.randn(4, 32)
    wanted = layer.dense_weight().detach() + 1
    with pytest.warns(RewriteWarning, match="16×32, was written to: it is an nn.Linear now"):
        write(layer)
    assert type(layer) is nn.Linear
    assert_reordered(layer(x), nn.functional.linear(x, wanted, layer.bias))
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    assert not dict(layer.named_buffers())


@pytest.mark.parametrize("write", [w for w in WRITES if w is not a_parameter])
@pytest.mark.parametrize("recipe", ROUNDED)
def test_a_write_to_a_layer_of_few_bits_is_rounded(
    recipe: str, write: Callable[[Any], None]
) -> None:
    layer: Any = rewritten(recipe)[2]
    cls, options = type(layer), dict(layer.config())
    wanted = layer.dense_weight() + 1
    with pytest.warns(RewriteWarning, match="16×32, was written to, and rounded to .* of 0.0"):
        write(layer)
    assert type(layer) is cls
    own = {n: options[n] for n in ("activation", "group_size", "symmetric") if n in options}
    again = cls.from_weight(wanted, layer.bias, **own)
    assert_equal(dict(layer.named_buffers()), dict(again.named_buffers()))


def of_levels() -> Int4Linear:
    """None at the end of its range, as GPTQ may choose them: rounding anew gives other ones."""
    torch.manual_seed(0)
    q = torch.randint(-5, 5, (6, 64), dtype=torch.int8)
    return Int4Linear.from_quantized(q, torch.rand(6, 2).bfloat16() + 1, None, None, 64)


def test_rows_that_are_not_written_to_keep_their_levels() -> None:
    layer, before = of_levels(), of_levels()
    with pytest.warns(RewriteWarning, match="rounded to its form"):
        layer.weight.data[2] += 1
    same = torch.arange(6) != 2
    assert_equal(layer.qweight[same], before.qweight[same])
    assert_equal(layer.scale[same], before.scale[same])
    assert not torch.equal(layer.qweight[2], before.qweight[2])


def test_what_is_taken_away_again_gives_the_levels_of_before() -> None:
    layer, before = of_levels(), of_levels()
    one, two = torch.randn(6, 64), torch.randn(6, 64)
    for delta in (one, two, -one):  # not in the order of a stack
        with pytest.warns(RewriteWarning, match="rounded to its form"):
            layer.weight.data += delta
    assert not torch.equal(layer.qweight, before.qweight)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    for each in (layer, copied):
        each.weight.data -= two  # without a warning: nothing is lost
        assert_equal(dict(each.named_buffers()), dict(before.named_buffers()))


def test_half_of_it_taken_away_is_no_way_back() -> None:
    layer, one = of_levels(), torch.randn(6, 64)
    with pytest.warns(RewriteWarning, match="rounded to its form"):
        layer.weight.data += one
    target = layer.dense_weight() - one / 2
    with pytest.warns(RewriteWarning, match="rounded to its form"):
        layer.weight.data -= one / 2
    assert_equal(layer.qweight, Int4Linear.from_weight(target, None, 32).qweight)


def test_no_number_is_no_weight_of_few_bits() -> None:
    layer, before = of_levels(), of_levels()
    with pytest.raises(
        OptionError, match="with NaN or inf was written to a Int4Linear, which keep"
    ):
        layer.weight.data[2, 3] = float("nan")
    assert_equal(dict(layer.named_buffers()), dict(before.named_buffers()))


def test_a_weight_of_another_shape_is_refused() -> None:
    layer = rewritten("monarch")[2]
    with pytest.raises(
        ValueError,
        match=r"\(3, 3\) was written to a MonarchLinear, whose weight has the shape \(16, 32\)",
    ):
        layer.weight.data = torch.zeros(3, 3)
    with pytest.raises(TypeError, match="an nn.Parameter makes it an nn.Linear"):
        layer.weight = torch.zeros(16, 32)
    assert type(layer).__name__ == "MonarchLinear"


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("style", ["ColwiseParallel", "RowwiseParallel"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_tensor_parallel_styles_are_refused(recipe: str, bias: bool, style: str) -> None:
    """They cut a weight in two, which these layers do not hold as such."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = nn.Sequential(nn.Linear(16, 8, bias=bias))
    optimized = rewrite(model, RECIPES[recipe], torch.randn(4, 16))
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        with pytest.raises(OptionError, match="cannot be split as a dense layer is .*Densify"):
            parallel.parallelize_module(optimized, mesh, {"0": getattr(parallel, style)()})
    finally:
        dist.destroy_process_group()


def test_a_layer_that_was_written_to_saves_and_loads(tmp_path: Any) -> None:
    model = rewritten("monarch")
    with pytest.warns(RewriteWarning, match="was written to"):
        model[2].weight.data += 1
    model.save(tmp_path)
    again = load(tmp_path, nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval())
    assert type(again[2]) is nn.Linear
    x = torch.randn(4, 16)
    assert_reordered(again(x), model(x))


def test_every_layer_takes_its_input_by_the_name_that_torch_gives_it() -> None:
    layers = [getattr(passes, name) for name in passes.__all__]
    own = [c for c in (*layers, Pointwise) if issubclass(c, nn.Module)]
    assert len(own) > 6
    for layer in own:
        assert list(inspect.signature(layer.forward).parameters) == ["self", "input"], layer
