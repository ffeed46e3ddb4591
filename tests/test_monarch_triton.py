"""The Triton kernels of Monarch without a GPU: interpreted against the reference, and compiled
ahead of time for real targets."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from ahead import POINTERS, TARGETS, assembly, compiled, spills
from marks import slow_but

pytest.importorskip("triton", reason="triton exists on Linux only")

HELPERS = pathlib.Path(__file__).parent / "helpers"
CASES = [
    # in, out, blocks, rank, rows
    (64, 64, (4, 4), 4, 17),
    (40, 28, (3, 5), 3, 1),
    (33, 70, (2, 4), 20, 3),
    (48, 300, (4, 1), 5, 130),
]

_SCRIPT = """
import torch
from closeness import ROUNDING, assert_reordered
import rewriter.kernels.monarch as plain
from rewriter.kernels.monarch_triton import monarch_backward, monarch_forward

torch.manual_seed(0)
done = 0
for inputs, outputs, (k, l), rank, rows in CASES:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for interleaved in (False, True):
            ib, ob = -(-inputs // k), -(-outputs // l)
            right = (torch.randn(k, rank * l, ib) / ib**0.5).to(dtype)
            left = (torch.randn(l, ob, k * rank) / (k * rank) ** 0.5).to(dtype)
            bias = torch.randn(outputs).to(dtype) if rank != 5 else None
            wide = torch.randn(rows, inputs + 3).to(dtype)
            x = wide[:, :inputs]  # rows that are not neighbours
            args = [t.float() for t in (x, right, left)]
            own = None if bias is None else bias.float()
            want, mid = plain._forward_train(plain.Operands(*args, own, outputs, interleaved))
            got, kept = monarch_forward(x, right, left, bias, outputs, interleaved, True)
            assert got.dtype == dtype and got.shape == (rows, outputs)
            assert_reordered(got.float(), want, dtype)
            assert_reordered(kept.float(), mid, dtype)
            bare = monarch_forward(x, right, left, bias, outputs, interleaved, False)[0]
            assert torch.equal(bare, got)
            grad = torch.randn(rows, outputs).to(dtype)
            needs = ((True, True, True), (False, True, False), (True, False, True))
            for need in needs if dtype == torch.float32 else needs[:1]:
                given = grad.float(), args[0], mid, *args[1:], interleaved, *need
                wanted = plain._backward(plain.BackwardOperands(*given))
                found = monarch_backward(grad, x, kept, right, left, interleaved, *need)
                for a, b in zip(found, wanted, strict=True):
                    assert a.shape == b.shape
                    if a.numel():
                        assert float((a.float() - b).norm() / b.norm()) < ROUNDING[dtype]
            done += 1
empty = monarch_forward(x[:0], right, left, bias, outputs, False, True)
assert empty[0].shape == (0, outputs)
print("agreed", done)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cases", slow_but([CASES[:1], CASES[1:]], 0), ids=str)
def test_interpreted_kernels_agree_with_the_formula(cases: list[Any]) -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    script = f"CASES = {cases!r}\n" + textwrap.dedent(_SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HELPERS)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"agreed {len(cases) * 6}"


SIZES = {"K": 4, "L": 4, "R": 48, "IB": 192, "OB": 768}  # 768 → 3072, N = 4


def built(kernel: str, target: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    from rewriter.kernels.monarch_triton import KERNELS, tiles

    fn = KERNELS[kernel]
    inner = ("ib", "ob") if kernel == "forward" else ("ob", "ib")
    size = tiles(dtype, *(SIZES[n.upper()] for n in inner), SIZES["R"])
    options = {"num_warps": size.pop("num_warps"), "num_stages": size.pop("num_stages")}
    constants: dict[str, Any] = {**SIZES, **size, "PRECISION": "ieee", "INTERLEAVED": False}
    constants |= {"HAS_BIAS": True, "STORE_MID": True, "NEED_X": True}
    if kernel == "backward_weight":
        constants |= {"BM": 64, "BN": 64, "A_BLOCK": 192, "A_ROW": 1, "J": 192, "W": 192}
        constants |= {"B_BLOCK": 192, "B_COLUMN": 1, "OUT_BLOCK": 192 * 192, "OUT_A": 192}
        constants |= {"OUT_B": 1}
    numbers = {"rows", "in_features", "out_features", "features", "stride_x", "stride_g"}
    numbers |= {"stride_b"}
    types = {n: POINTERS[dtype] for n in fn.arg_names if n not in numbers}
    return compiled(fn, target, constants, types, options)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [("forward", n) for n in TARGETS]
    + [("backward_x", "sm_90"), ("backward_x", "gfx942"), ("backward_weight", "sm_80")],
)
def test_kernels_compile_for_real_targets(kernel: str, name: str) -> None:
    """Matrix instructions are used, shared memory suffices, and no register spills."""
    made, target = built(kernel, name), TARGETS[name]
    found = re.search(target.instructions, assembly(made, name))
    assert found, f"no {target.instructions} in {kernel} for {name}"
    assert 0 < made.metadata.shared <= target.shared
    assert not spills(made, name), f"{kernel} spills on {name}"


USED = [
    (torch.bfloat16, 256, 64),  # 1024 wide, N = 4
    (torch.bfloat16, 256, 32),  # 2048 wide, N = 8: the most shared memory
    (torch.float32, 128, 16),  # 1024 wide, N = 8
    (torch.float32, 128, 32),
]


@pytest.mark.parametrize("kernel", ["forward", "backward_x"])
@pytest.mark.parametrize(
    ("dtype", "block", "rank"),
    [USED[0], *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in USED[1:])],
)
def test_kernels_that_are_used_spill_nothing_and_take_the_memory_foretold(
    kernel: str, dtype: torch.dtype, block: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rewriter.kernels.monarch_triton import SHARED, refusal, shared_bytes, tiles

    assert refusal(dtype, block, block, rank) is None
    monkeypatch.setitem(SIZES, "R", rank)
    monkeypatch.setitem(SIZES, "IB", block)
    monkeypatch.setitem(SIZES, "OB", block)
    made = built(kernel, "sm_90", dtype)
    assert not spills(made, "sm_90")
    foretold = shared_bytes(dtype, tiles(dtype, block, block, rank))
    assert made.metadata.shared <= foretold <= SHARED


@pytest.mark.parametrize(
    ("dtype", "block", "rank", "reason"),
    [
        (torch.bfloat16, 2048, 512, "rank 512 spills"),  # 8192 wide, N = 4
        (torch.bfloat16, 512, 128, "shared memory"),  # 2048 wide, N = 4
        (torch.bfloat16, 512, 64, "1.5 times"),  # 4096 wide, N = 8
        (torch.bfloat16, 32, 1, "16 times"),  # 1024 wide, N = 32: a rank padded to 16
        (torch.float32, 256, 64, "rank 64 spills"),  # 1024 wide, N = 4
    ],
)
def test_torchs_products_take_what_would_not_fit_or_repeat_itself(
    dtype: torch.dtype, block: int, rank: int, reason: str
) -> None:
    from rewriter.kernels import monarch
    from rewriter.kernels.monarch_triton import refusal

    assert reason in str(refusal(dtype, block, block, rank))
    assert monarch._fused(dtype, block, block, rank) is None
    assert monarch._fused(torch.bfloat16, 256, 256, 64) is not None
    assert monarch._fused(torch.float64, 256, 256, 64) is None


def test_tiles_fit_any_layer() -> None:
    from rewriter.kernels.monarch_triton import tiles

    for dtype in (torch.float16, torch.float32):
        for rank in (1, 48, 256):
            size = tiles(dtype, 192, 768, rank)
            assert size["RP"] >= max(rank, 16)
            assert all(v & (v - 1) == 0 for n, v in size.items() if n.startswith(("B", "RP")))
