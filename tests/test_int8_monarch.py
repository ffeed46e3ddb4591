"""The op `int8_monarch_linear`: its kernels, what is kept of a layer, and what follows it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from torch import Tensor

from rewriter.kernels import int8_cpu, ops
from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_monarch as monarch
from rewriter.kernels.int8_monarch import Operands, int8_monarch_linear, int8_monarch_linear_then

NATIVE = pytest.mark.skipif(int8_cpu.refusal() is not None, reason="no compiled kernel")
KERNELS = monarch.available_kernels()


def problem(rows: int = 5, width: int = 67, out: int = 45, seed: int = 0) -> Operands:
    g = torch.Generator().manual_seed(seed)
    right = int8.quantize_weight(torch.randn(4, 12, -(-width // 4), generator=g))
    left = int8.quantize_weight(torch.randn(4, -(-out // 4), 12, generator=g))
    x, bias = torch.randn(rows, width, generator=g), torch.randn(out, generator=g)
    return Operands(x, *right, *left, bias, out)


def norm(out: int) -> tuple[Tensor, Tensor, float]:
    return torch.linspace(0.5, 2, out), torch.linspace(-1, 1, out), 1e-5


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", int8.ACTIVATIONS)
def test_the_bits_depend_neither_on_the_kernel_nor_on_the_threads(
    activation: str, interleaved: bool
) -> None:
    threads = torch.get_num_threads()
    for rows in (1, 7, 120):
        own = problem(rows)._replace(activation=activation, interleaved=interleaved)
        found = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                found += [monarch._run(kernel, own) for kernel in KERNELS]
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert_equal(other, found[0])
        want = monarch.int8_monarch_linear_reference(*own)
        assert sqnr(found[0], want) > 40  # the second rounding sees the noise of the first


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_write_into_any_operand_is_noticed(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monarch, "pick_kernel", lambda *_: kernel)
    own = problem()
    for written in own[1:6]:
        assert isinstance(written, Tensor)
        before = int8_monarch_linear(*own)
        written.add_(1)
        after = int8_monarch_linear(*own)
        assert (after != before).any()
        assert_equal(after, monarch._run("torch", own))
    own.qleft.data = problem(seed=1).qleft
    assert_equal(int8_monarch_linear(*own), monarch._run("torch", own))


@NATIVE
def test_what_is_kept_of_a_layer_goes_with_it() -> None:
    gc.collect()
    kept = len(monarch._CACHE)
    own = problem()
    monarch._run("native", own)
    assert len(monarch._CACHE) == kept + 1
    del own
    gc.collect()
    assert len(monarch._CACHE) == kept


def test_weights_made_under_inference_mode() -> None:
    with torch.inference_mode():
        own = problem()
        for _ in range(2):
            assert_equal(int8_monarch_linear(*own), monarch._run("torch", own))
            own.qright.neg_()


def test_the_choice_is_measured_on_the_kernels_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def fastest(key: str, version: str, candidates: Any) -> str:
        made = {name: call() for name, call in candidates().items()}
        assert made.keys() == set(KERNELS)
        for y in made.values():
            assert_equal(y, made["torch"])
        return KERNELS[0]

    monkeypatch.setattr(monarch, "fastest", fastest)
    assert monarch.pick_kernel(7, 67, 45, (4, 4), 3) == KERNELS[0]
    assert monarch.kernel_name(7, 67, 45, (4, 4), 3) == KERNELS[0]
    if not torch.cuda.is_available():
        on = monarch.kernel_name(7, 67, 45, (4, 4), 3, device="cuda")
        assert on == "torch, simulated, slower: there is no GPU here"


@NATIVE
def test_a_kernel_with_wrong_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = monarch._run

    def wrong(kernel: str, *given: Any) -> Tensor:
        return real(kernel, *given) + (kernel == "native")

    monkeypatch.setattr(monarch, "_run", wrong)
    assert "wrong by 1 at 1x64x128" in str(monarch._refusal.__wrapped__())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_follows_is_the_same_in_one_op(dtype: torch.dtype) -> None:
    own = problem(6)
    own = own._replace(
        x=own.x.to(dtype).view(2, 3, 67), bias=own.bias.to(dtype) if own.bias is not None else None
    )
    weight, bias, eps = norm(45)
    add = torch.randn(2, 3, 45).to(dtype)
    given = *own[:9], "relu", add, weight.to(dtype), bias.to(dtype), eps
    want = int8.After.of(*given[9:])(int8_monarch_linear(*own))
    assert_reordered(int8_monarch_linear_then(*given), want)
    spread = *given[:10], add[0, 0], *given[11:]  # one row for all
    want = int8.After.of(*spread[9:])(int8_monarch_linear(*own))
    assert_reordered(int8_monarch_linear_then(*spread), want)
    none = own._replace(x=own.x[:0])
    assert int8_monarch_linear_then(*none, "relu", add[:0], None, None, None).shape == (0, 3, 45)


def test_opcheck_of_the_op_with_what_follows() -> None:
    own = problem()
    weight, bias, eps = norm(45)
    given = *own, "gelu", torch.randn(5, 45), weight, bias, eps
    tests = "test_schema", "test_faketensor"
    operator = torch.ops.rewriter.int8_monarch_linear_then.default
    torch.library.opcheck(operator, given, test_utils=tests)


@NATIVE
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_bound_layer_gives_the_bits_of_the_op(
    interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monarch, "pick_kernel", lambda *_: "native")
    own = problem()._replace(interleaved=interleaved)
    x, *factors, out, activation, _ = own
    weight, bias, eps = norm(45)
    add = torch.randn(5, 45)
    behind = "gelu", weight, bias, eps
    ready = monarch.bound(*factors, 67, out, activation, interleaved, *behind)
    want = int8_monarch_linear_then(*own, "gelu", add, weight, bias, eps)
    assert_equal(ready(x, add), want)
    assert_equal(ready(x.t().contiguous().t(), add), want)  # goes to the op
    assert ready(x[:0], add[:0]).shape == (0, 45)
    factors[0].numpy()[:, 0] = 3  # torch does not count it
    again = monarch.bound(*factors, 67, out, activation, interleaved, *behind)
    after = int8.After("gelu", add, int8_cpu.Norm(weight, bias, eps))
    assert_reordered(again(x, add), after(monarch._run("torch", own)))


def test_the_record_prices_both_products_and_nothing_between() -> None:
    record = ops.find("rewriter::int8_monarch_linear")
    assert record is not None
    assert record.parts is not None
    assert record.sizes is not None
    own = problem()
    sizes = record.sizes(*own)
    parts = record.parts(ops.Run(sizes, "int8", own.qright.numel() + own.qleft.numel()))
    assert [p.kind for p in parts] == ["int8_linear", "int8_linear"]
    assert sum(p.flops for p in parts) == 2 * 5 * (own.qright.numel() + own.qleft.numel())
    assert sum(p.weight_bytes for p in parts) == own.qright.numel() + own.qleft.numel()
