"""int8 products by AMX: the integers of AVX-512-VNNI, wherever the process is let use it."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.kernels import int8_cpu
from rewriter.kernels import int8_linear as int8
from rewriter.kernels import int8_product as product


def can() -> bool:
    return int8_cpu.refusal() is None and int8_cpu.use_amx(True)


pytestmark = pytest.mark.skipif(not can(), reason="no AMX here")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    int8_cpu.use_amx(True)
    torch.set_num_threads(threads)


def layer(k: int, n: int, seed: int = 0, **options: Any) -> tuple[int8_cpu.Linear, Any]:
    """A product, and (x) → the same by the torch formula."""
    g = torch.Generator().manual_seed(seed)
    qweight, scale = int8.quantize_weight(torch.randn(n, k, generator=g))
    bias = torch.randn(n, generator=g)
    sums = qweight.sum(-1, dtype=torch.int32)
    made = int8_cpu.Linear(int8_cpu.pack(qweight), k, scale, sums, bias, **options)
    activation = "per_tensor" if options.get("one_range") else "per_token"

    def formula(x: Tensor) -> Tensor:
        return product.run("torch", x, qweight, scale, bias, activation)

    return made, formula


def numbers(rows: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed + 1))


def by(amx: bool, made: Any, x: Tensor, add: Tensor | None = None) -> Tensor:
    assert int8_cpu.use_amx(amx) is amx
    assert int8_cpu.isa() == ("AMX-int8" if amx else "AVX-512-VNNI")
    y: Tensor = made(x, add)[0]
    return y


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 65),
    st.integers(1, 200),
    st.integers(1, 130),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_amx_vnni_and_the_formula_agree(
    seed: int, rows: int, k: int, n: int, threads: int, one_range: bool
) -> None:
    torch.set_num_threads(threads)
    made, formula = layer(k, n, seed, one_range=one_range)
    x = numbers(rows, k, seed)
    found = by(True, made, x)
    assert_equal(found, by(False, made, x))
    assert_equal(found, formula(x))


@pytest.mark.parametrize("k", [47, 48, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("rows", [3, 4, 15, 16, 17, 31, 32, 33, 65, 130, 300])
def test_tails_of_tiles(rows: int, k: int) -> None:
    for threads, n in ((1, 31), (2, 33), (2, 257)):
        torch.set_num_threads(threads)
        made, formula = layer(k, n)
        x = numbers(rows, k)
        found = by(True, made, x)
        assert_equal(found, by(False, made, x))
        assert_equal(found, formula(x))


def test_the_largest_sums() -> None:
    """255·127·k, where pairs of bytes saturate 16 bits."""
    k, n, rows = 3072, 40, 33
    x = torch.full((rows, k), 255.0)
    x[:, 0] = 0
    for value in (127, -128):
        qweight = torch.full((n, k), value, dtype=torch.int8)
        sums = qweight.sum(-1, dtype=torch.int32)
        made = int8_cpu.Linear(int8_cpu.pack(qweight), k, torch.ones(n), sums, None)
        want = torch.full((rows, n), 255.0 * value * (k - 1))
        assert_equal(by(True, made, x), by(False, made, x))
        torch.testing.assert_close(by(True, made, x), want)


@pytest.mark.parametrize("then", int8_cpu.THEN)
def test_what_follows_a_product_has_the_same_bits(then: str) -> None:
    norm = int8_cpu.Norm(torch.rand(100), torch.randn(100), 1e-5)
    for last in (None, norm):
        made, _ = layer(96, 100, then=then, norm=last)
        x, add = numbers(70, 96), torch.randn(70, 100)
        for more in (None, add):
            assert_equal(by(True, made, x, more), by(False, made, x, more))


@pytest.mark.parametrize("rows", [5, 64, 201])
@pytest.mark.parametrize("options", [{}, {"one_range": True}, {"given": (0.03, 120)}], ids=str)
def test_two_products_in_a_row(rows: int, options: Any) -> None:
    (one, _), (two, _) = layer(70, 130, then="gelu", **options), layer(130, 37, **options)
    both, x = int8_cpu.Two(one, two), numbers(rows, 70)
    found = by(True, both, x)
    assert_equal(found, by(False, both, x))
    assert_equal(found, two(one(x)[0])[0])


def test_a_row_that_is_not_finite_leaves_its_neighbours() -> None:
    made, formula = layer(64, 48)
    x = numbers(40, 64)
    want = formula(x)
    x[17, 3] = torch.nan
    y, spoiled = made(x)
    assert spoiled
    assert y[17].isnan().all()
    rest = torch.arange(40) != 17
    assert_equal(y[rest], want[rest])


def test_two_threads_of_python_at_once() -> None:
    made, formula = layer(128, 96)
    xs = [numbers(48, 128, seed) for seed in range(2)]
    wants, wrong = [formula(x) for x in xs], []

    def work(x: Tensor, want: Tensor) -> None:
        for _ in range(200):
            if not torch.equal(made(x)[0], want):
                wrong.append(x)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(xs, wants, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def _child(x: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    queue.put((int8_cpu.isa(), layer(128, 96)[0](x)[0].tolist()))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_is_forked_after_use() -> None:
    torch.set_num_threads(1)
    made, _ = layer(128, 96)
    x = numbers(48, 128)
    want = by(True, made, x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(x, queue))
    child.start()
    name, found = queue.get(timeout=60)
    child.join()
    assert name == "AMX-int8"
    assert_equal(torch.tensor(found), want)


_REFUSED = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

# room for a signal without tiles: the system refuses them to a process that has no more
held = ctypes.create_string_buffer(4096)
libc = ctypes.CDLL(None, use_errno=True)
done = libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(held), 0, 4096)), None)
assert done == 0, ctypes.get_errno()

import torch
from rewriter.kernels import int8_cpu
from rewriter.kernels import int8_product

x, qweight = torch.randn(40, 96), torch.randint(-127, 127, (50, 96), dtype=torch.int8)
scale = torch.ones(50)
print(int8_cpu.isa(), int8_cpu.use_amx(True))
own = int8_cpu.Linear(int8_cpu.pack(qweight), 96, scale, qweight.sum(-1, dtype=torch.int32), None)
want = int8_product.run("torch", x, qweight, scale, None, "per_token")
assert torch.equal(own(x)[0], want)
print("done")
"""


def test_a_process_that_is_refused_tiles_multiplies_without() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _REFUSED], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["AVX-512-VNNI False", "done"]
