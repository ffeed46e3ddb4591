"""TopK: the op against its formula, the layer as a citizen of PyTorch, the pass."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from rewriter.base import Layer, Phase, Replacement, Skip
from rewriter.errors import OptionError
from rewriter.kernels.sparse_linear import sparse_linear
from rewriter.kernels.topk import topk_linear, topk_linear_reference
from rewriter.passes.topk import TopK, TopKLinear
from rewriter.sites import ACTIVATION, LINEAR, MLP, Site

OPS = torch.ops.rewriter


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tensors(
    *lead: int, n: int = 6, out: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(*lead, n), (out, n), (out,)]
    h, weight, bias = (torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)
    return h, weight, bias


def check_against_reference(h: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> None:
    args = [t for t in (h, weight, bias) if t is not None]
    y = topk_linear(h, weight, bias, k)
    expected = topk_linear_reference(h, weight, bias, k)
    assert_close(y, expected)
    with torch.no_grad():
        assert_close(topk_linear(h, weight, bias, k), expected)
    g = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, args, g), torch.autograd.grad(expected, args, g))


class Mlp(nn.Module):
    def __init__(self, gated: bool, down: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.activation = nn.Linear(5, 16), nn.SiLU()
        self.gate = nn.Linear(5, 16) if gated else None
        self.down = nn.Linear(16, 5) if down is None else down

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))

    def site(self) -> Site:
        def linear(name: str) -> Site:
            layer = self.get_submodule(name)
            kind = type(layer) if isinstance(layer, Layer) else LINEAR
            bias = None if layer.bias is None else f"{name}.bias"
            return Site(kind, name, self, weight_ref=f"{name}.weight", bias_ref=bias)

        parts = {"up": linear("up"), "down": linear("down")}
        parts["activation"] = Site(ACTIVATION, "activation", self)
        if self.gate is not None:
            parts["gate"] = linear("gate")
        down = parts["down"]
        return Site(
            MLP, "down", self, weight_ref=down.weight_ref, bias_ref=down.bias_ref, parts=parts
        )


def propose(mlp: Mlp, k: float) -> TopKLinear:
    found = TopK(k).propose(mlp.site())
    assert isinstance(found, Replacement), found
    assert isinstance(found.layer, TopKLinear)
    return found.layer


# --- the op


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0), (2, 1, 3)])
def test_any_leading_shape(lead):
    check_against_reference(*tensors(*lead), 2)


@settings(max_examples=15)
@given(st.integers(0, 6), st.integers(1, 9), st.integers(1, 9), st.data())
def test_equals_reference_of_any_size(rows, n, out, data):
    k = data.draw(st.integers(1, n))
    h, weight, bias = tensors(rows, n=n, out=out)
    check_against_reference(h, weight, bias if data.draw(st.booleans()) else None, k)


def test_non_contiguous():
    h, weight, bias = tensors(6, 3)
    check_against_reference(h.detach().transpose(0, 1).requires_grad_(), weight, bias, 2)
    check_against_reference(h.detach()[:, :1].expand(6, 3, 6).requires_grad_(), weight, bias, 2)


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(1, 12), st.data())
def test_keeps_exactly_the_k_largest_even_when_tied(rows, n, data):
    k = data.draw(st.integers(1, n))
    values = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), min_size=n, max_size=n)
    h = torch.tensor([data.draw(values) for _ in range(rows)], requires_grad=True)
    kept = topk_linear(h, torch.eye(n), None, k)
    assert_close(kept.abs().sum(-1), h.abs().topk(k, -1).values.sum(-1))
    (mask,) = torch.autograd.grad(kept.sum(), h)
    assert_close(mask.sum(-1), torch.full((rows,), float(k)))
    assert_close(kept, h * mask)


def test_all_kept_is_the_dense_layer():
    h, weight, bias = tensors(2, 3, dtype=torch.float32)
    assert torch.equal(topk_linear(h, weight, bias, 6), F.linear(h, weight, bias))


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_gradients(lead):
    def op(*args: Tensor) -> Tensor:
        return topk_linear(*args, 2)

    assert torch.autograd.gradcheck(op, tensors(*lead))
    assert torch.autograd.gradgradcheck(op, tensors(*lead))


@pytest.mark.parametrize("wanted", range(3))
def test_gradient_of_one_input_alone(wanted):
    args = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors(3))]
    (expected,) = torch.autograd.grad(topk_linear_reference(*args, 2).sum(), args[wanted])
    (found,) = torch.autograd.grad(topk_linear(*args, 2).sum(), args[wanted])
    assert_close(found, expected)


def test_opcheck():
    h, weight, bias = tensors(2, 3)
    torch.library.opcheck(OPS.topk_linear, (h, weight, bias, 2))
    torch.library.opcheck(OPS.topk_linear, (h.detach(), weight.detach(), None, 2))
    torch.library.opcheck(OPS.topk_linear_train, (h, weight, bias, 2))
    with torch.no_grad():
        _, values, indices = OPS.topk_linear_train(h, weight, bias, 2)
    values.requires_grad_()
    g = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(OPS.topk_linear_backward, (g, values, indices, weight, needs))


def test_bad_shapes_are_named():
    h, weight, bias = tensors(3)
    with pytest.raises(RuntimeError, match=r"not \(3, 5\) and \(4, 6\)"):
        topk_linear(h[:, :5], weight, bias, 2)
    for k in (0, 7):
        with pytest.raises(RuntimeError, match=f"k must be from 1 to the 6 entries.* not {k}"):
            topk_linear(h, weight, bias, k)
    with pytest.raises(RuntimeError, match=r"bias must have shape \[4\], not \(1,\)"):
        topk_linear(h, weight, bias[:1], 2)


def test_flops_count_what_is_kept_where_few_rows_come_in_and_a_dense_gemm_else():
    h, weight, bias = tensors(2, 3)
    gemm = 2 * 6 * 6 * 4
    for rows, want in ((6, gemm // 3), (60, 10 * gemm)):
        for own in (
            lambda h: topk_linear(h, weight, bias, 2),
            lambda h: sparse_linear(h, weight, None, bias, k=2),
        ):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                own(h.detach().view(6, 6).repeat(rows // 6, 1))
            assert counter.get_total_flops() == want
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sparse_linear(h, weight, None, bias, threshold=torch.ones(1))
    assert counter.get_total_flops() == gemm  # an upper bound
    with FlopCounterMode(display=False) as counter:
        topk_linear(h, weight, bias, 2).sum().backward()
    assert counter.get_total_flops() == 3 * gemm
    with FlopCounterMode(display=False) as counter:
        topk_linear(h, weight.detach(), bias, 2).sum().backward()
    assert counter.get_total_flops() == 2 * gemm


def test_saves_kept_values_and_narrow_indices_only():
    def saved(*args: Any) -> set[tuple[tuple[int, ...], torch.dtype]]:
        found: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            topk_linear(*args)
        return {(tuple(t.shape), t.dtype) for t in found}

    h, weight, bias = tensors(7, dtype=torch.float32)
    of_weight = ((4, 6), torch.float32)
    indices, values = ((7, 2), torch.int16), ((7, 2), torch.float32)
    assert saved(h, weight, bias, 2) == {values, indices, of_weight}
    assert saved(h, weight.detach(), bias, 2) == {indices, of_weight}
    wide, weight, _ = tensors(1, n=2**15 + 1, out=1, dtype=torch.float32)
    assert ((1, 2), torch.int32) in saved(wide, weight, None, 2)


def test_partitioner_saves_no_dense_activation():
    """Under AOTAutograd with the min-cut partitioner the saved tensors are the same few."""
    from functorch.compile import aot_function, min_cut_rematerialization_partition, nop

    forwards = []

    def keep(graph, inputs):
        forwards.append(graph)
        return nop(graph, inputs)

    compiled = aot_function(
        lambda h, weight, bias: topk_linear(h + 1, weight, bias, 2),
        fw_compiler=keep,
        bw_compiler=nop,
        partition_fn=min_cut_rematerialization_partition,
    )
    compiled(*tensors(7)).sum().backward()
    out, *saved = forwards[0].graph.find_nodes(op="output")[0].args[0]
    shapes = [tuple(node.meta["val"].shape) for node in saved if node.op != "placeholder"]
    assert shapes == [(7, 2), (7, 2)]


def test_indices_reach_the_end_of_the_narrow_type():
    h, weight, _ = tensors(2, n=2**15, out=1)
    with torch.no_grad():
        h[:, -1] = 100.0
    (dh,) = torch.autograd.grad(topk_linear(h, weight, None, 1).sum(), h)
    assert_close(dh[:, -1], weight[:, -1].detach().expand(2))


def test_bfloat16():
    h, weight, bias = (t.detach().bfloat16() for t in tensors(64, n=32, out=16))
    y = topk_linear(h, weight, bias, 8)
    assert y.dtype == torch.bfloat16
    sparse = torch.zeros_like(h)
    kept = h.abs().topk(8, sorted=False).indices
    sparse.scatter_(-1, kept, h.gather(-1, kept))
    assert_close(y, F.linear(sparse, weight, bias))


# --- the layer


def test_layer_is_a_module_like_any_other():
    layer, h = TopKLinear(6, 4, 2), torch.randn(2, 3, 6)
    y = layer(h)
    assert_close(copy.deepcopy(layer)(h), y)
    assert_close(pickle.loads(pickle.dumps(layer))(h), y)
    again = TopKLinear(**layer.config())
    again.load_state_dict(layer.state_dict())
    assert_close(again(h), y)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert layer.to(torch.float64)(h.double()).dtype == torch.float64
    assert TopKLinear(6, 4, 2, bias=False).config()["bias"] is False
    with pytest.raises(OptionError, match="not linear"):
        layer.dense_weight()


@pytest.mark.parametrize("k", [0, 7, True, 2.0])
def test_layer_refuses_an_impossible_k(k):
    with pytest.raises(OptionError, match="k must be an integer from 1 to 6, got"):
        TopKLinear(6, 4, k)


def test_layer_on_meta():
    layer = TopKLinear(6, 4, 2, device="meta", dtype=torch.bfloat16)
    y = layer(torch.empty(2, 6, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 4), torch.bfloat16, "meta")


def test_compile():
    layer, h = TopKLinear(6, 4, 2), torch.randn(5, 6)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    layer(h).square().sum().backward()
    compiled(h).square().sum().backward()
    for p, q in zip(layer.parameters(), compiled.parameters(), strict=True):
        assert_close(q.grad, p.grad)


def test_export_keeps_one_op():
    layer, h = TopKLinear(6, 4, 2), torch.randn(5, 6)
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (h,), dynamic_shapes={"input": {0: batch}})
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert called == [OPS.topk_linear.default]
    h = torch.randn(9, 6, requires_grad=True)
    assert_close(program.module()(h), layer(h))
    expected = torch.autograd.grad(layer(h).sum(), h)
    assert_close(torch.autograd.grad(program.module()(h).sum(), h), expected)


def test_autocast():
    layer, h = TopKLinear(6, 4, 2), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(h)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_random_init_has_the_scale_of_its_kept_inputs():
    h = torch.randn(64, 256).relu()
    y = TopKLinear(256, 512, 16, bias=False)(h)
    kept = h.topk(16).values.square().mean()
    assert y.std().item() == pytest.approx((kept / 3).sqrt().item(), rel=0.1)


# --- the pass


@pytest.mark.parametrize("gated", [False, True])
def test_masks_what_enters_the_down_projection(gated):
    mlp, x = Mlp(gated), torch.randn(2, 3, 5)
    seen: list[Tensor] = []
    mlp.down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mlp(x)
    layer = propose(mlp, 4)
    assert layer.weight is mlp.down.weight
    assert layer.bias is mlp.down.bias
    expected = topk_linear_reference(seen[0], layer.weight, layer.bias, 4)
    mlp.down = layer
    assert_close(mlp(x), expected)
    mlp(x).sum().backward()
    assert all(p.grad is not None for p in mlp.parameters())


def test_without_bias():
    assert propose(Mlp(False, nn.Linear(16, 5, bias=False)), 4).bias is None


@pytest.mark.parametrize(
    ("k", "width", "kept"),
    [(3, 16, 3), (0.25, 16, 4), (0.26, 16, 5), (1e-9, 16, 1), (0.07, 100, 7), (1.0, 16, 16)],
)
def test_count_of_a_fraction_rounds_up(k, width, kept):
    assert TopK(k).count(width) == kept


def test_what_the_replacement_says():
    assert TopK.matches == (MLP, ACTIVATION)
    assert TopK(2).kinds == (MLP,)
    assert TopK.phase is Phase.SPARSITY
    assert not TopK(4).exact
    assert str(TopK(k=4)) == "TopK(k=4)"
    found = TopK(0.25).propose(Mlp(True).site())
    assert found.error is None
    assert found.note == "keeps 4 of 16 activations a token; the weight is unchanged"


def test_keeps_dtype_frozen_weights_and_meta():
    mlp = Mlp(False).to(torch.bfloat16)
    mlp.down.weight.requires_grad_(False)
    layer = propose(mlp, 4)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert propose(Mlp(True).to("meta"), 4).weight.is_meta


def test_a_transposed_weight_gets_its_own_storage():
    mlp = Mlp(False)
    mlp.down.weight = nn.Parameter(mlp.down.weight.detach().t().contiguous())  # [in, out]
    down = Site(LINEAR, "down", mlp, weight_ref="down.weight", transposed=True)
    site = Site(MLP, "down", mlp, weight_ref="down.weight", transposed=True, parts={"down": down})
    layer = TopK(4).propose(site).layer
    assert_close(layer.weight, mlp.down.weight.t(), check_stride=False)
    assert layer.weight.is_contiguous()
    assert layer.weight.requires_grad
    assert layer.weight.data_ptr() != mlp.down.weight.data_ptr()


def refusal(mlp: Mlp, k: float = 4) -> str:
    found = TopK(k).propose(mlp.site())
    assert isinstance(found, Skip)
    return found.reason


@pytest.mark.parametrize("k", [16, 20, 1.0, 0.99])
def test_skip_when_all_are_kept(k):
    assert refusal(Mlp(False), k) == f"k={max(16, int(k))} keeps all 16 activations"


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skip_non_finite(name, value):
    mlp = Mlp(True)
    with torch.no_grad():
        getattr(mlp.down, name)[0] = value
    assert refusal(mlp) == "the weights hold NaN or inf"


def test_skip_not_floating_point():
    mlp = Mlp(False)
    mlp.down.weight = nn.Parameter(mlp.down.weight.detach().to(torch.int8), requires_grad=False)
    assert refusal(mlp) == "the weights are torch.int8, not real floats of 16 bits or more"


def test_skip_a_down_projection_of_another_kind():
    reason = refusal(Mlp(False, TopKLinear(16, 5, 4)))
    assert reason.startswith("the down projection down is a TopKLinear, and TopK wraps a plain")


@pytest.mark.parametrize(
    "k", [0, -1, True, False, 1.5, 0.0, -0.5, float("nan"), float("inf"), "4", None]
)
def test_impossible_options(k):
    with pytest.raises(OptionError, match=r"k=.* must be an int >= 1"):
        TopK(k)


# --- scores and blocks


@settings(max_examples=20)
@given(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.booleans(), st.data())
def test_blocks_and_importance_equal_the_reference(rows, block, weighted, data):
    k = block * data.draw(st.integers(1, 8 // block))
    h, weight, bias = tensors(rows, n=8)
    importance = torch.rand(8) if weighted else None
    own = k, importance, block
    y, expected = topk_linear(h, weight, bias, *own), topk_linear_reference(h, weight, bias, *own)
    assert_close(y, expected)
    g, args = torch.randn_like(y), (h, weight, bias)
    assert_close(torch.autograd.grad(y, args, g), torch.autograd.grad(expected, args, g))


def test_a_block_stands_or_falls_as_one():
    h = torch.tensor([[0.5, 9.0, 5.0, 5.0, 0.0, 0.0]])
    assert topk_linear(h, torch.eye(6), None, 2, None, 2).tolist() == [[0.5, 9.0, 0, 0, 0, 0]]
    with pytest.raises(RuntimeError, match="block must divide k=3 and the 6 entries"):
        topk_linear(h, torch.eye(6), None, 3, None, 2)
    with pytest.raises(RuntimeError, match=r"importance must have shape \[6\], not \(5,\)"):
        topk_linear(h, torch.eye(6), None, 2, torch.ones(5))


def test_wina_ranks_by_what_an_entry_adds_to_the_output():
    mlp = Mlp(False)
    found = TopK(4, score="wina").propose(mlp.site()).layer
    assert_close(found.importance, mlp.down.weight.norm(dim=0))
    h = torch.randn(3, 16)
    expected = topk_linear_reference(h, found.weight, found.bias, 4, found.importance)
    assert_close(found(h), expected)
    assert set(found.state_dict()) == {"weight", "bias", "importance"}
    again = TopKLinear(**found.config())
    again.load_state_dict(found.state_dict())
    assert_close(again(h), found(h))


def test_counts_are_whole_blocks():
    assert TopK(0.25, block=8).count(100) == 32
    assert TopK(9, block=8).propose(Mlp(False).site()).reason == "k=16 keeps all 16 activations"
    assert TopK(5, block=8).propose(Mlp(False).site()).layer.k == 8
    mlp = Mlp(False, nn.Linear(20, 5))
    mlp.up = nn.Linear(5, 20)
    found = TopK(5, block=8).propose(mlp.site())
    assert found.reason == "block=8 does not divide its 20 activations"
    with pytest.raises(OptionError, match="block=8 must divide k=4 and 16"):
        TopKLinear(16, 5, 4, block=8)


@pytest.mark.parametrize("option", [{"score": "sum"}, {"block": 4}, {"straight_through": 1}])
def test_impossible_further_options(option):
    with pytest.raises(OptionError, match=next(iter(option))):
        TopK(4, **option)
