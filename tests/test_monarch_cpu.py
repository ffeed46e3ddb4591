"""The compiled Monarch kernels: against the formula, and where no compiler can be had."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_reordered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rewriter.errors import RewriteWarning
from rewriter.kernels import choice, monarch, monarch_cpu, native
from rewriter.kernels.monarch import monarch_linear, monarch_linear_reference
from rewriter.passes.monarch import MonarchLinear

compiled = pytest.mark.skipif(monarch_cpu.refusal() is not None, reason=str(monarch_cpu.refusal()))
NEEDS = (True, True, True, True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every layer runs compiled, however small; gives the calls made."""
    calls: list[str] = []

    def pick(which: str, *args: object) -> str:
        calls.append(which)
        return "fused"

    monkeypatch.setattr(monarch_cpu, "pick_kernel", pick)
    return calls


def operands(
    in_features: int, out_features: int, blocks: tuple[int, int], rank: int, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, right, left, bias and a gradient, in float32, of about unit size throughout."""
    (k, l), ib, ob = blocks, -(-in_features // blocks[0]), -(-out_features // blocks[1])
    right = torch.randn(k, rank * l, ib) / ib**0.5
    left = torch.randn(l, ob, k * rank) / (k * rank) ** 0.5
    grad = torch.randn(rows, out_features) / max(rows, 1) ** 0.5
    return torch.randn(rows, in_features), right, left, torch.randn(out_features), grad


def check(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, grad: Tensor) -> None:
    """y, mid and every gradient against the formula in float64."""
    y, mid = monarch_cpu.forward(x, right, left, bias, grad.shape[-1], True)
    wide = [t if t is None else t.double().requires_grad_() for t in (x, right, left, bias)]
    want = monarch_linear_reference(*wide, grad.shape[-1])  # type: ignore[arg-type]
    assert y.is_contiguous()
    assert_close(y, want.to(y.dtype))
    bare, none = monarch_cpu.forward(x, right, left, bias, grad.shape[-1], False)
    assert none is None
    assert torch.equal(bare, y)
    assert mid is not None
    plain = monarch._mid(monarch._rows(x, right.shape[0] * right.shape[2]).double(), right.double())
    assert_close(mid, plain.to(mid.dtype))
    found = monarch_cpu.backward(grad, x, mid, right, left, True, True, True, bias is not None)
    inputs = [t for t in wide if t is not None]
    for a, b in zip(found, torch.autograd.grad(want, inputs, grad.double()), strict=False):
        assert_close(a, b.to(a.dtype))


# Against the formula -----------------------------------------------------------------------------


@compiled
@settings(max_examples=60)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 9),
    st.integers(1, 150),
    st.booleans(),
)
def test_any_size_forward_and_gradients(in_features, out_features, blocks, rank, rows, with_bias):
    blocks = min(blocks[0], in_features), min(blocks[1], out_features)
    x, right, left, bias, grad = operands(in_features, out_features, blocks, rank, rows)
    check(x, right, left, bias if with_bias else None, grad)


@compiled
@pytest.mark.parametrize(
    ("sizes", "blocks", "rank", "rows"),
    [((768, 768), (8, 8), 12, 130), ((200, 420), (2, 3), 33, 65), ((33, 9), (32, 8), 1, 300)],
)
def test_many_tiles_panels_and_chunks(sizes, blocks, rank, rows):
    check(*operands(*sizes, blocks, rank, rows))


@compiled
def test_rows_that_are_not_neighbours_and_other_strides():
    x, right, left, bias, grad = operands(40, 24, (4, 2), 3, 21)
    wide = torch.randn(21, 99)
    check(wide[:, 5:45], right, left, bias, torch.randn(21, 99)[:, 3:27])
    check(x.t().contiguous().t(), right.mT.contiguous().mT, left, bias, grad.t().contiguous().t())
    check(x, right, left.mT.contiguous().mT, bias.expand(2, -1).t()[:, 0], grad[:1].expand(21, -1))
    check(x[:1].expand(21, -1), right, left, bias, grad)


@compiled
def test_leading_dimensions_are_rows():
    x, right, left, bias, grad = operands(40, 24, (4, 2), 3, 21)
    flat, mid = monarch_cpu.forward(x, right, left, bias, 24, True)
    y, same = monarch_cpu.forward(x.view(7, 3, 40), right, left, bias, 24, True)
    assert torch.equal(y, flat.view(7, 3, 24))
    assert torch.equal(mid, same)
    a = monarch_cpu.backward(grad.view(7, 3, 24), x.view(7, 3, 40), mid, right, left, *NEEDS)
    b = monarch_cpu.backward(grad, x, mid, right, left, *NEEDS)
    assert torch.equal(a[0].view(21, 40), b[0])
    assert all(torch.equal(p, q) for p, q in zip(a[1:], b[1:], strict=True))


@compiled
@pytest.mark.parametrize("rows", [1, 37, 200])
def test_bfloat16_rounds_once(rows):
    """Sums and what is between the products stay float32: only x, factors and results round."""
    x, right, left, bias, grad = (t.bfloat16() for t in operands(50, 33, (2, 5), 3, rows))
    y, mid = monarch_cpu.forward(x, right, left, bias, 33, True)
    wide = [t.double().requires_grad_() for t in (x, right, left, bias)]
    want = monarch_linear_reference(*wide, 33)
    assert_close(y, want.bfloat16())
    assert mid is not None
    found = monarch_cpu.backward(grad, x, mid, right, left, *NEEDS)
    wanted = torch.autograd.grad(want, wide, grad.double())
    for a, b in zip(found, wanted, strict=True):  # mid was rounded for the gradient of left
        assert float((a.double() - b).norm() / b.norm()) < torch.finfo(torch.bfloat16).eps


@compiled
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_reach_their_row_and_no_other(bad, dtype):
    x, right, left, bias, _ = (t.to(dtype) for t in operands(50, 33, (2, 5), 3, 40))
    clean = monarch_cpu.forward(x, right, left, bias, 33, False)[0]
    x[7, 11] = bad
    y = monarch_cpu.forward(x, right, left, bias, 33, False)[0]
    assert not y[7].isfinite().any()
    assert torch.equal(y[:7], clean[:7])
    assert torch.equal(y[8:], clean[8:])


@compiled
@pytest.mark.parametrize("needs", [(i & 1 > 0, i & 2 > 0, i & 4 > 0, i & 8 > 0) for i in range(16)])
def test_gradients_that_are_not_needed_are_empty_and_the_others_unchanged(needs):
    x, right, left, bias, grad = operands(50, 33, (2, 5), 3, 40)
    mid = monarch_cpu.forward(x, right, left, bias, 33, True)[1]
    whole = monarch_cpu.backward(grad, x, mid, right, left, *NEEDS)
    found = monarch_cpu.backward(grad, x, mid, right, left, *needs)
    for need, a, b in zip(needs, found, whole, strict=True):
        assert_close(a, b if need else b.new_empty(0))


@compiled
def test_results_do_not_depend_on_threads_or_callers():
    args = operands(96, 64, (4, 4), 6, 333)
    x, right, left, bias, grad = args

    def run(_: int = 0) -> list[Tensor]:
        y, mid = monarch_cpu.forward(x, right, left, bias, 64, True)
        assert mid is not None
        return [y, mid, *monarch_cpu.backward(grad, x, mid, right, left, *NEEDS)]

    threads, want = torch.get_num_threads(), run()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))
    finally:
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, range(12)):
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


# Under torch -------------------------------------------------------------------------------------


@compiled
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_layers_train_under_autograd_autocast_compile_export_and_deepcopy(fused):
    layer, x = MonarchLinear(40, 24, 4), torch.randn(2, 9, 40)

    def grads(module: torch.nn.Module) -> list[Tensor]:
        module.zero_grad()
        module(x).square().mean().backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    want = grads(copy.deepcopy(layer).double().float())
    reference = copy.deepcopy(layer)
    args = (reference.right, reference.left, reference.bias, 24)
    monarch_linear_reference(x, *args).square().mean().backward()
    for a, p in zip(want, reference.parameters(), strict=True):
        assert_close(a, p.grad)
    assert fused.count("backward") == 1
    assert_close(grads(torch.compile(layer, fullgraph=True)), want)
    assert fused.count("backward") == 2
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert_close(program.module()(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert_reordered(low, layer(x).bfloat16())
    low.float().sum().backward()


@compiled
def test_gradients_of_gradients(fused):
    layer, x = MonarchLinear(40, 24, 4), torch.randn(9, 40, requires_grad=True)
    args = (layer.right, layer.left, layer.bias, 24)

    def second(function: Callable[..., Tensor]) -> Tensor:
        (dx,) = torch.autograd.grad(function(x, *args).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), layer.right)[0]

    assert_close(second(monarch_linear), second(monarch_linear_reference))


@compiled
def test_opcheck(fused):
    layer, x = MonarchLinear(40, 24, (4, 2)), torch.randn(9, 40, requires_grad=True)
    args = (x, layer.right, layer.left, layer.bias, 24)
    torch.library.opcheck(torch.ops.rewriter.monarch_linear.default, args)
    torch.library.opcheck(torch.ops.rewriter.monarch_linear_train.default, args)
    y, mid, *rest = (t.detach() for t in (*torch.ops.rewriter.monarch_linear_train(*args), x))
    torch.library.opcheck(
        torch.ops.rewriter.monarch_linear_backward.default,
        (y, *rest, mid, layer.right.detach(), layer.left.detach(), False, *NEEDS),
        test_utils=("test_schema", "test_faketensor"),
    )


class Answers(torch.utils.data.Dataset[Tensor]):
    def __init__(self, layer: MonarchLinear, x: Tensor) -> None:
        self.layer, self.x = layer, x

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.layer(self.x)


@compiled
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_worker_processes_of_a_loader(fused):
    layer, x = MonarchLinear(40, 24, 4), torch.randn(65, 40)
    want = layer(x).detach()  # the threads exist before the fork
    for found in torch.utils.data.DataLoader(Answers(layer, x), num_workers=1, batch_size=None):
        assert torch.equal(found, want)


# The choice --------------------------------------------------------------------------------------


@compiled
def test_a_layer_names_the_kernel_that_runs(monkeypatch):
    layer = MonarchLinear(96, 96, 4)
    assert layer.kernel(4) == "torch.bmm"  # nothing to gain
    assert layer.kernel(1024) in ("fused C++", "torch.bmm")
    for name, shown in (("fused", "fused C++"), ("torch", "torch.bmm")):
        monkeypatch.setattr(monarch_cpu, "fastest", lambda *_, name=name: name)
        assert layer.kernel(1024) == shown
        assert layer.double().kernel(1024) == "torch.bmm"
        layer.float()
    assert MonarchLinear(96, 96, 4, interleaved=True).kernel(1024) == "torch.bmm"


@compiled
def test_the_choice_is_measured_on_the_operations_themselves(monkeypatch):
    made: dict[str, Any] = {}

    def fastest(key: str, version: str, candidates: Callable[[], dict[str, Any]]) -> str:
        made.update({key.split()[1]: {name: call() for name, call in candidates().items()}})
        return "torch"

    monkeypatch.setattr(monarch_cpu, "fastest", fastest)
    layer, x = MonarchLinear(96, 64, 4), torch.randn(500, 96)
    layer(x).sum().backward()
    assert made.keys() == {"forward", "backward"}
    fused, plain = made["forward"]["fused"][0], made["forward"]["torch"]
    assert fused.shape == (512, 64)
    assert float((fused - plain).norm() / plain.norm()) < 1e-5
    for a, b in zip(made["backward"]["fused"], made["backward"]["torch"], strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_where_nothing_is_compiled_the_layer_works_and_says_why(monkeypatch):
    layer, x = MonarchLinear(96, 96, 4), torch.randn(1024, 96)
    monkeypatch.setattr(monarch_cpu, "refusal", lambda: "no C++ compiler: neither of c++")
    assert layer.kernel(1024) == "torch.bmm (no C++ compiler: neither of c++)"
    layer(x).sum().backward()
    args = (layer.right, layer.left, layer.bias, 96)
    assert_close(layer(x), monarch_linear_reference(x, *args))


def test_the_fastest_is_kept_for_later_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "_known", {})
    asked = []

    def candidates() -> dict[str, Callable[[], object]]:
        asked.append(1)
        return {"slow": lambda: time.sleep(0.01), "fast": lambda: None}

    for _ in range(2):
        assert choice.fastest("sizes", "v1", candidates) == "fast"
    assert len(asked) == 1
    choice._known.clear()  # as a new process
    choice._read.clear()
    assert choice.fastest("sizes", "v1", candidates) == "fast"
    assert len(asked) == 1
    assert choice.fastest("sizes", "v2", candidates) == "fast"
    assert len(asked) == 2
    (path,) = (tmp_path / "kernels").glob("choices-*.json")
    assert json.loads(path.read_text()) == {"v1 sizes": "fast", "v2 sizes": "fast"}
    for damaged in ("{", "[" * 100_000, "[]", '{"v1 sizes": {}}', "\0" * 64):
        path.write_text(damaged)
        choice._known.clear()
        choice._read.clear()
        with pytest.warns(RewriteWarning, match="cannot be read .*measured anew") as told:
            assert choice.fastest("sizes", "v1", candidates) == "fast"
        assert len(told) == 1
        assert json.loads(path.read_text()) == {"v1 sizes": "fast"}
    choice.forget()
    assert not path.exists()
    assert choice.fastest("sizes", "v1", lambda: {"only": lambda: None}) == "only"


BUSY = {"a": 0.02, "b": 0.0205}


def test_what_a_busy_machine_disturbed_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "_read", set())
    now = [0.0]
    monkeypatch.setattr(choice.time, "perf_counter", lambda: now[0])

    def taking(*seconds: float) -> Callable[[], None]:
        turns = iter(seconds)

        def run() -> None:
            now[0] += next(turns)

        return run

    calm = {"a": taking(*[0.02] * 99), "b": taking(*[0.021] * 99)}
    busy = {name: taking(*(start * 1.2**i for i in range(99))) for name, start in BUSY.items()}
    late = {"a": taking(0.02, 0.02, 0.05, *[0.02] * 97), "b": taking(*[0.021] * 99)}
    for name, candidates in {"calm": calm, "busy": busy, "late": late}.items():
        assert choice.fastest(name, "v1", lambda given=candidates: given) in ("a", "b")
    (path,) = (tmp_path / "kernels").glob("choices-*.json")
    assert set(json.loads(path.read_text())) == {"v1 calm", "v1 late"}
    assert set(choice._known) >= {"v1 calm", "v1 busy", "v1 late"}


def test_of_processes_that_measure_at_once_the_first_to_write_decides(monkeypatch, tmp_path):
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "_read", set())

    def candidates() -> dict[str, Callable[[], object]]:
        path = choice._path()  # another process, which was faster
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"v1 sizes": "slow", "v1 others": "slow"}))
        return {"slow": lambda: time.sleep(0.01), "fast": lambda: None}

    for _ in range(2):
        assert choice.fastest("sizes", "v1", candidates) == "slow"
    assert choice.fastest("more", "v1", lambda: {"only": lambda: None}) == "only"
    (path,) = (tmp_path / "kernels").glob("choices-*.json")
    found = json.loads(path.read_text())
    assert found == {"v1 more": "only", "v1 others": "slow", "v1 sizes": "slow"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_choice_is_lost_where_many_write(monkeypatch, tmp_path):
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    names = [str(n) for n in range(24)]
    with ThreadPoolExecutor(8) as pool:  # a lock of a folder holds between threads too
        own = list(pool.map(lambda n: choice._agreed(f"v1 {n}", n), names))
        shared = set(pool.map(lambda n: choice._agreed("v1 shared", n), names))
    assert own == names
    assert len(shared) == 1
    (path,) = (tmp_path / "kernels").glob("choices-*.json")
    assert json.loads(path.read_text()) == {
        **{f"v1 {n}": n for n in names}, "v1 shared": shared.pop()
    }  # fmt: skip


def test_rows_up_to_a_power_of_two_count_as_equal():
    assert [choice.rows_bucket(n) for n in (0, 1, 2, 3, 512, 513, 99999)] == [
        *(1, 1, 2, 4, 512, 1024, 2048)
    ]


# Compiling ---------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here"
)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("REWRITER_NATIVE", raising=False)
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }')
    return path


@needs_compiler
def test_a_library_is_compiled_once_and_anew_when_its_source_changes(source, monkeypatch):
    assert native.library(source).answer() == 42
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert native.library(source).answer() == 42
    monkeypatch.undo()
    monkeypatch.setenv("REWRITER_CACHE", str(source.parent / "cache"))
    source.write_text('extern "C" int answer() { return 43; }')
    assert native.library(source).answer() == 43
    assert len(list(native.cache_folder().glob("*"))) == 2


@needs_compiler
def test_half_a_library_in_the_cache_is_made_anew(source):
    native.library(source)
    (kept,) = native.cache_folder().iterdir()
    whole = kept.read_bytes()
    for damaged in (b"\x7fELF", b"", whole[: len(whole) // 2], bytes(len(whole)), whole + b"x"):
        kept.unlink()  # not written over: this process has it mapped
        kept.write_bytes(damaged)
        assert native.library(source).answer() == 42
        assert kept.read_bytes() == whole


@needs_compiler
def test_a_library_that_others_can_write_is_not_loaded(source, monkeypatch):
    native.library(source)
    (kept,) = native.cache_folder().iterdir()
    compiled_again = []
    compile_ = native._compile
    monkeypatch.setattr(
        native, "_compile", lambda *args: compiled_again.append(1) or compile_(*args)
    )
    kept.chmod(0o777)
    assert native.library(source).answer() == 42
    assert len(compiled_again) == 1
    assert kept.stat().st_mode & 0o777 == 0o700
    native.cache_folder().chmod(0o777)  # this user's own: taken back
    assert native.library(source).answer() == 42
    assert native.cache_folder().stat().st_mode & 0o777 == 0o700
    assert len(compiled_again) == 1


@needs_compiler
def test_a_cache_folder_of_another_user_is_not_used(source, monkeypatch, tmp_path):
    native.library(source)
    monkeypatch.setattr(native, "_USERS", tmp_path / "own")
    if os.getuid() == 0:
        os.chown(native.cache_folder(), 4242, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 4242)
    compiled_again = []
    compile_ = native._compile
    monkeypatch.setattr(
        native, "_compile", lambda *args: compiled_again.append(1) or compile_(*args)
    )
    assert native.library(source).answer() == 42
    assert len(compiled_again) == 1


@needs_compiler
def test_compilers_at_work_at_the_same_time(source):
    with ThreadPoolExecutor(4) as pool:
        assert [lib.answer() for lib in pool.map(native.library, [source] * 4)] == [42] * 4
    assert len(list(native.cache_folder().iterdir())) == 1


@needs_compiler
def test_without_a_cache_folder_it_is_compiled_for_this_process(source, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(native, "_USERS", tmp_path / "file")
    assert native.library(source).answer() == 42


@needs_compiler
def test_a_compiler_that_fails_is_quoted(source):
    source.write_text("int answer( {")
    with pytest.raises(native.Unavailable, match=r"failed \(1\): .*answer.cpp:1:\d+: error"):
        native.library(source)
    assert list(native.cache_folder().iterdir()) == []


def test_no_compiler_or_none_wanted(source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.Unavailable, match="no C.. compiler: neither of no-such-compiler"):
        native.library(source)
    monkeypatch.setenv("REWRITER_NATIVE", "0")
    with pytest.raises(native.Unavailable, match="REWRITER_NATIVE=0"):
        native.library(source)


@needs_compiler
def test_the_geometry_of_wider_registers(monkeypatch, tmp_path):
    """16 lanes and tiles of 12 × 32 and 8 × 48, as with AVX-512, on whatever this CPU has."""
    made = tmp_path / "wide.so"
    compiler = native._compiler()
    flags = ["-std=c++17", "-O1", "-DMONARCH_LANES=16", native._native(), "-fPIC", "-shared", "-w"]
    subprocess.run([compiler, *flags, str(monarch_cpu._SOURCE), "-o", str(made)], check=True)
    monkeypatch.setattr(monarch_cpu, "library", lambda _: native.ctypes.CDLL(str(made)))
    monarch_cpu._library.cache_clear()
    try:
        assert monarch_cpu._library().monarch_rows() == 32
        assert monarch_cpu._wrong() is None
        for case in [
            (10, 7, (3, 2), 2, 37),
            (97, 131, (3, 4), 7, 70),
            (200, 420, (2, 3), 33, 65),
            (5, 5, (4, 4), 2, 1),
        ]:
            check(*operands(*case))
    finally:
        monarch_cpu._library.cache_clear()
