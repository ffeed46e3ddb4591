"""The attention kernel gives what torch gives, and the rule puts it where it can stand."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_equal, assert_reordered, sqnr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter import rewrite
from rewriter.kernels import attention, native
from rewriter.lowering import FLOAT32_RULES
from rewriter.passes import Quantize

needs_kernel = pytest.mark.skipif(
    attention.unavailable() is not None, reason=f"no compiled kernel: {attention.unavailable()}"
)


@pytest.fixture(params=["this CPU", "8 lanes"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[str]:
    """The kernel as it is compiled here, and as it is for AVX2 alone."""
    if attention.unavailable() is not None:
        pytest.skip("no compiled kernel")
    if request.param == "this CPU":
        yield request.param
        return
    made = tmp_path_factory.mktemp("kernel") / "attention.so"
    command = [native._compiler(), "-std=c++17", "-O1", "-mavx2", "-mfma", "-fPIC", "-shared", "-w"]
    subprocess.run([*command, str(attention._SOURCE), "-o", str(made)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "library", lambda _: native.ctypes.CDLL(str(made)))
        attention._library.cache_clear()
        yield request.param
    attention._library.cache_clear()


def operands(
    batch: int, heads: int, rows: int, keys: int, depth: int, shared: int | None = None
) -> list[Tensor]:
    """Queries, keys and values as a joined product leaves them: rows apart, heads beside."""
    sizes = ((rows, heads), (keys, shared or heads), (keys, shared or heads))
    g = torch.Generator().manual_seed(rows)
    made = [torch.randn(batch, n, 2 * h * depth, generator=g) for n, h in sizes]
    return [
        t[..., : h * depth].view(batch, n, h, depth).transpose(1, 2)
        for t, (n, h) in zip(made, sizes, strict=True)
    ]


SIZES = [(1, 1, 1, 1, 16), (2, 3, 7, 19, 32), (1, 2, 37, 70, 80), (2, 4, 64, 64, 64)]


@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_what_torch_computes(compiled: str, sizes: tuple[int, ...]) -> None:
    q, k, v = operands(*sizes)
    b, h, rows, keys, _ = sizes
    g = torch.Generator().manual_seed(0)
    added = torch.randn(h, rows, keys, generator=g)
    for mask in (
        None,
        torch.rand(b, 1, rows, keys, generator=g) > 0.3,
        torch.rand(b, 1, 1, keys, generator=g) > 0.3,
        added,
        added[..., :1],
        torch.ones(rows, keys, dtype=torch.bool).tril(),
    ):
        want = F.scaled_dot_product_attention(q, k, v, mask)
        found = attention.native(q, k, v, mask)
        assert_reordered(found, want)
        assert found.transpose(1, 2).is_contiguous()
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    assert_reordered(attention.native(q, k, v, causal=True, scale=0.3), want)


def test_heads_that_share_their_keys(compiled: str) -> None:
    q, k, v = operands(2, 6, 9, 9, 32, shared=2)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_reordered(attention.native(q, k, v, causal=True), want)


@pytest.mark.parametrize(("heads", "shared"), [(3, 3), (6, 2), (14, 2), (9, 1)])
@pytest.mark.parametrize("keys", [1, 19, 70])
def test_one_query_of_heads_that_share_their_keys(
    compiled: str, heads: int, shared: int, keys: int
) -> None:
    q, k, v = operands(2, heads, 1, keys, 80, shared=shared)
    g = torch.Generator().manual_seed(0)
    hidden = torch.rand(2, 1, 1, keys, generator=g) > 0.7
    added = torch.zeros(2, heads, 1, keys).masked_fill(hidden, -torch.inf)
    for mask in (None, ~hidden, added, torch.randn(1, keys, generator=g)):
        want = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
        assert_reordered(attention.native(q, k, v, mask, scale=0.3), want)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_reordered(attention.native(q, k, v, causal=True), want)
    q[1, heads - 1, 0, 3] = torch.nan
    found = attention.native(q, k, v)
    assert found[1, heads - 1].isnan().all()
    assert found[0].isfinite().all()
    assert found[1, : heads - 1].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_own_row_alone(compiled: str, bad: float) -> None:
    q, k, v = operands(1, 2, 20, 20, 32)
    clean = attention.native(q, k, v)
    q[0, 1, 3, 5] = bad
    found = attention.native(q, k, v)
    assert found[0, 1, 3].isnan().all()
    found[0, 1, 3] = clean[0, 1, 3]
    assert_equal(found, clean)


def test_a_query_that_may_look_at_nothing_is_zero(compiled: str) -> None:
    q, k, v = operands(2, 3, 7, 7, 16)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[0, :, 3] = False
    for own in (mask, torch.zeros(2, 1, 7, 7).masked_fill(~mask, -torch.inf)):
        found = attention.native(q, k, v, own)
        assert_reordered(found, F.scaled_dot_product_attention(q, k, v, own))
        assert not found[0, :, 3].any()


@needs_kernel
@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 60), st.booleans())
def test_any_size_on_any_number_of_threads(b: int, h: int, s: int, t: int, causal: bool) -> None:
    q, k, v = operands(b, h, s, t, 32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(attention.native(q, k, v, causal=causal))
    finally:
        torch.set_num_threads(threads)
    assert_reordered(found[0], F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


needs_bf16 = pytest.mark.skipif(
    attention.bf16_unavailable() is not None, reason=f"{attention.bf16_unavailable()}"
)


@pytest.fixture(params=["AMX-BF16", "AVX512-BF16"])
def multiplied(request: pytest.FixtureRequest) -> Iterator[str]:
    """By which instructions bfloat16 numbers are multiplied."""
    tiles = request.param == "AMX-BF16"
    if attention.use_amx(tiles) is not tiles:
        pytest.skip("no AMX here")
    yield request.param
    attention.use_amx(True)


@needs_bf16
@pytest.mark.parametrize(
    "sizes",
    [*SIZES, (1, 2, 13, 130, 48), (1, 1, 12, 64, 128), (1, 1, 33, 512, 32), (2, 1, 4, 3, 64)],
)
def test_products_of_bfloat16_numbers_are_near(multiplied: str, sizes: tuple[int, ...]) -> None:
    q, k, v = operands(*sizes)
    b, h, rows, keys, _ = sizes
    g = torch.Generator().manual_seed(0)
    added, truths = (
        torch.randn(h, rows, keys, generator=g),
        torch.rand(b, 1, rows, keys, generator=g) > 0.3,
    )
    truths[..., 0] = True
    for mask in (
        None,
        truths,
        torch.arange(keys).expand(b, 1, 1, keys) < keys - keys // 3,
        added,
        added[..., :1],
    ):
        want = attention.attention_reference(q, k, v, mask)
        found = attention.native(q, k, v, mask, bf16=True)
        assert found.dtype == torch.float32
        assert_reordered(found, want, torch.bfloat16)
        assert sqnr(found, want) > 40
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    found = attention.native(q, k, v, causal=True, scale=0.3, bf16=True)
    assert_reordered(found, want, torch.bfloat16)


@needs_bf16
def test_products_of_bfloat16_numbers_mask_spoil_and_share_as_the_others_do(
    multiplied: str,
) -> None:
    q, k, v = operands(2, 6, 20, 20, 32, shared=2)
    clean = attention.native(q, k, v, causal=True, bf16=True)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_reordered(clean, want, torch.bfloat16)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = q.clone()
        spoiled[0, 1, 3, 5] = bad
        found = attention.native(spoiled, k, v, causal=True, bf16=True)
        assert found[0, 1, 3].isnan().all()
        found[0, 1, 3] = clean[0, 1, 3]
        assert_equal(found, clean)
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[3] = False
    assert not attention.native(q, k, v, mask, bf16=True)[:, :, 3].any()


@needs_bf16
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 100), st.booleans())
def test_bfloat16_on_any_number_of_threads(
    multiplied: str, b: int, h: int, s: int, t: int, causal: bool
) -> None:
    q, k, v = operands(b, h, s, t, 32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(attention.native(q, k, v, causal=causal, bf16=True))
    finally:
        torch.set_num_threads(threads)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert_reordered(found[0], want, torch.bfloat16)
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


def test_what_the_kernel_does_not_take_is_torchs() -> None:
    q, k, v = operands(2, 3, 5, 5, 32)
    cases: list[tuple[list[Tensor], dict[str, Any]]] = [
        ([t.double() for t in (q, k, v)], {}),
        ([t.bfloat16() for t in (q, k, v)], {"is_causal": True}),
        ([t[..., :20] for t in (q, k, v)], {}),
        ([q[0], k[0], v[0]], {}),
        ([q[:, :, :0], k, v], {}),
        ([q, k[:1].expand(2, 3, 5, 32), v], {"scale": 2.0}),
        ([q, k, v[..., :16]], {}),
    ]
    for tensors, options in cases:
        want = F.scaled_dot_product_attention(*tensors, **options)
        assert_reordered(attention.attention(*tensors, **options), want)


class Attends(nn.Module):
    def __init__(self, depth: int = 16, **options: Any) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 6 * depth), nn.Linear(2 * depth, 32)
        self.depth, self.options = depth, options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (
            t.view(b, s, 2, self.depth).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


def fused(model: Any) -> dict[str, str]:
    steps = [s for s in model.report.steps if s.name == "lowering"]
    return {d.kind: d.kernel or d.reason for s in steps for d in s.decisions}


@needs_kernel
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.5}])
def test_the_rule_stands_at_every_size(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(attention, "pick", lambda *_: "native")
    torch.manual_seed(0)
    model = Attends(**options).eval()
    given_ = (torch.randn(2, 6, 32),)
    if "is_causal" not in options:
        given_ += (torch.rand(2, 1, 6, 6) > 0.2,)  # type: ignore[assignment]
    lowered = rewrite(model, [], given_)
    assert fused(lowered) == {"scaled_dot_product_attention": "attention"}
    with torch.no_grad():
        assert_reordered(lowered(*given_), model(*given_))
        longer = torch.randn(3, 11, 32)
        more = (torch.rand(3, 1, 11, 11) > 0.2,) if len(given_) > 1 else ()
        assert_reordered(lowered(longer, *more), model(longer, *more))
    x = torch.randn(2, 6, 32, requires_grad=True)  # with gradients the plain graph runs
    lowered(x, *given_[1:]).sum().backward()
    assert x.grad is not None


@needs_kernel
def test_why_the_kernel_does_not_take_an_operand() -> None:
    q, k, v = operands(1, 3, 5, 5, 32)

    def why(
        *tensors: Tensor, mask: Tensor | None = None, causal: bool = False, p: float = 0
    ) -> str:
        return attention.refusal(*tensors, mask, causal, p) or ""

    assert not why(q, k, v)
    assert why(q.double(), k, v) == "no kernel takes torch.float64 on cpu"
    assert why(q, k.double(), v) == "its operands differ in dtype"
    assert "there are two" in why(q, k, v, mask=torch.ones(5, 5, dtype=torch.bool), causal=True)
    assert "neither of truths nor of float32" in why(q, k, v, mask=torch.ones(5, 5).double())
    assert why(q, k, v, p=0.1) == "it drops values"
    assert why(q[0], k[0], v[0]) == "its operands are not [batch, heads, rows, depth]"
    assert why(q, k[:, :2], v) == "its operands differ in batch, or heads"
    assert "no multiple of" in why(q[..., :20], k[..., :20], v[..., :20])
    assert why(q[:, :, :0], k, v) == "it is empty"


def test_a_query_whose_every_key_is_masked_by_the_lowest_number(compiled: str) -> None:
    """As transformers mask in numbers: all keys count as much as each other then, as in torch."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 32) for _ in range(3))
    mask = torch.zeros(2, 1, 9, 9)
    mask[0, :, :3] = mask[:, :, :, 7:] = torch.finfo(torch.float32).min
    want = F.scaled_dot_product_attention(q, k, v, mask)
    for bf16 in (False, True):
        if not bf16 or attention.bf16_unavailable() is None:
            found = attention.native(q, k, v, mask, bf16=bf16)
            assert sqnr(found, want) > (40 if bf16 else 100)


def test_what_is_masked_and_no_number_spoils_its_query_as_in_torch(compiled: str) -> None:
    q, k, v = operands(1, 2, 6, 9, 32)
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[:, 5] = False
    for bad in (torch.nan, torch.inf):
        spoiled = k.clone()
        spoiled[0, 1, 5, 3] = bad
        want = F.scaled_dot_product_attention(q, spoiled, v, mask)
        found = attention.native(q, spoiled, v, mask)
        assert_equal(found.isnan(), want.isnan())


@needs_bf16
def test_only_between_layers_of_eight_bits_the_rule_takes_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "pick", lambda *_: "native")
    taken: list[bool] = []
    real = attention.native

    def seen(*args: Any) -> Tensor:
        taken.append(args[-1])
        return real(*args)

    monkeypatch.setattr(attention, "native", seen)
    torch.manual_seed(0)
    model, x = Attends().eval(), torch.randn(2, 6, 32)
    cases: list[tuple[list[Any], Any, bool]] = [
        ([], True, False),
        ([Quantize("int8-weight")], True, False),
        ([Quantize("int8-dynamic", where="out")], True, False),
        ([Quantize("int8-dynamic", where="qkv")], True, True),
        ([Quantize("int8-dynamic")], FLOAT32_RULES, False),
    ]
    for passes, lower, bf16 in cases:
        lowered = rewrite(model, passes, x, lower=lower)
        assert fused(lowered)["scaled_dot_product_attention"] == "attention"
        taken.clear()
        with torch.no_grad():
            found, want = lowered(x), rewrite(model, passes, x, lower=False)(x)
        assert taken == [bf16]
        assert_reordered(found, want, torch.bfloat16 if bf16 else None)
