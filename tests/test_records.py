"""One record per op: what cost model, calibration, planner and packaging know of it.

The op of another package is that of `examples/write_an_op.py`, which CONTRIBUTING.md shows.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_module, make_boxed_func
from torch._functorch.partitioners import default_partition
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

import rewriter
from rewriter import Device, explain
from rewriter.base import Layer
from rewriter.compiler.inner import own_ops
from rewriter.cost import storage_cost
from rewriter.cost.machine import calibrate, probes
from rewriter.cost.machine.measured import Measured
from rewriter.cost.machine.roofline import Table, gemms, plain_works
from rewriter.cost.work import Work, on_matrix_unit
from rewriter.kernels import ops
from rewriter.planner.joint.reading import read_joint
from rewriter.planner.search.choices import packings, routes
from rewriter.planner.search.simulate import Decisions

ROOT = pathlib.Path(__file__).parents[1]
NAME = "mine::low_rank"


@pytest.fixture(scope="module")
def mine() -> Iterator[Any]:
    """The example as a module of another package; its record goes when the tests are done."""
    spec = importlib.util.spec_from_file_location("mine", ROOT / "examples/write_an_op.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["mine"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    ops.forget(NAME)
    del sys.modules["mine"]


def model(mine: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(mine.LowRank(64, 128, 16), nn.GELU(), mine.LowRank(128, 32, 16))


X = torch.randn(200, 64)
FLOPS = 2 * 200 * 16 * (64 + 128) + 2 * 200 * 16 * (128 + 32)


# an op of another package


def test_a_foreign_op_costs_what_its_formula_says(mine: Any) -> None:
    report = explain(model(mine), [], X)
    assert report.errors == []
    assert report.after.flops == FLOPS
    with FlopCounterMode(display=False) as counter:
        model(mine)(X)
    assert counter.get_total_flops() == FLOPS
    own = [w for w in report.after.work if w.op == NAME]
    assert {w.kind for w in own} == {"low_rank"}
    assert {w.shape for w in own} == {(200, 128, 64, 16), (200, 32, 128, 16)}
    training = report.after.training
    assert training is not None
    backward = [w for w in training.work if w.op == "mine::low_rank_backward"]
    assert sum(w.count * w.flops for w in backward) == 2 * FLOPS
    assert {w.kind for w in backward} == {"low_rank"}


def test_a_foreign_op_is_priced_as_its_products(mine: Any) -> None:
    device = Device.get("h100")
    work = Work(NAME, "low_rank", "bfloat16", 2 * 4096 * 256 * 2048, shape=(4096, 1024, 1024, 256))
    assert on_matrix_unit("low_rank")
    assert [p.shape for p in plain_works(work)] == [(1, 4096, 256, 1024), (1, 4096, 1024, 256)]
    assert device.bound(work) == "compute"
    lost = dataclasses.replace(work, kind="other")
    assert device.time(work) < device.time(lost) / 2  # the vector units


def test_a_foreign_op_is_calibrated(mine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_SAMPLES", 1)
    (found,) = [c for c in probes.composites() if c[0].name == NAME]
    record, axes, make = found
    smallest = tuple(axis[:1] for axis in axes)
    measured = calibrate._layers(calibrate.Clock(), smallest, make)
    assert measured.values[0] > 0
    flat = Table(((1, 2), (1, 2), (1, 2)), (1e-6,) * 8)
    host = dict.fromkeys(("module", "view", "op"), 1e-9)
    tables = {"addmm/float32": flat}
    alone = Measured(tables, Table(((1.0,),), (1e-15,)), host)
    ratios = calibrate._over_parts(alone, record, axes, [3 * 2e-6] * 8)
    assert len(ratios.values) == 8
    known = dataclasses.replace(alone, tables={**tables, "ratio/low_rank": ratios})
    shape = (16, 256, 256, 8)
    work = Work(NAME, "low_rank", "float32", shape=shape)
    composed = alone.composite(work)
    assert composed is not None
    want = composed * ratios.at(16, 256, 8) + host["module"]
    assert known.seconds(work, 0) == pytest.approx(want)
    assert want == pytest.approx(6e-6, rel=0.01)


def test_a_new_op_completes_a_calibration_that_is_kept(
    mine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    given: list[Measured | None] = []
    tables = {n: Table(((1, 2), (1, 2), (1, 2)), (1e-6,) * 8) for n in ("addmm/float32", "other")}
    tables["add"] = Table(((1, 2),), (1e-6,) * 2)
    host = dict.fromkeys(("module", "view", "op"), 1e-9)
    full = Measured(tables, Table(((1.0,),), (1e-15,)), host)

    def instead(known: Measured | None) -> tuple[Measured, bool]:
        given.append(known)
        return full, True

    names = calibrate._measured_ops()
    assert NAME in names
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "calibrate", instead)
    monkeypatch.setattr(calibrate, "_known", {})
    for now in (names - {NAME}, names, names - {NAME}, names):
        calibrate._known.clear()
        monkeypatch.setattr(calibrate, "_measured_ops", lambda now=now: now)
        Device.this_machine()
    assert given == [None, full]


def joint_of(made: nn.Module, x: Tensor) -> Any:
    found: list[Any] = []

    def partition(module: fx.GraphModule, inputs: object, **given: Any) -> Any:
        found.append(read_joint(module, given["num_fwd_outputs"]))
        return default_partition(module, inputs, **given)

    def boxed(graph: fx.GraphModule, _: object) -> Any:
        return make_boxed_func(graph.forward)

    aot_module(made, boxed, partition_fn=partition)(x).sum().backward()
    return found[0]


def test_the_planner_offers_a_foreign_closed_form(mine: Any) -> None:
    joint = joint_of(model(mine).train(), X)
    found = [r for r in routes(joint) if r.name == "mid"]
    assert len(found) == 2
    assert sorted(r.flops for r in found) == [2 * 200 * 16 * 64, 2 * 200 * 16 * 128]
    for route in found:
        assert joint.values[route.value].shape == (200, 16)
        assert joint.steps[joint.values[route.value].maker].op == "mine.low_rank"
        assert route.seconds > 0


def test_a_plan_with_a_foreign_closed_form_has_the_same_gradients(mine: Any) -> None:
    from rewriter.planner.apply.transform import split

    forms: list[str] = []

    def partition(module: fx.GraphModule, inputs: object, **given: Any) -> Any:
        joint = read_joint(module, given["num_fwd_outputs"])
        chosen = {r.value: r for r in routes(joint) if r.name == "mid"}
        every = Decisions.everything(joint)
        kept = frozenset(every.kept) - set(chosen)
        decisions = dataclasses.replace(every, kept=kept, routes=chosen)
        forward, backward = split(module, joint, decisions, given["num_fwd_outputs"])
        forms.extend(str(n.target) for n in backward.graph.nodes if n.op == "call_function")
        return forward, backward

    def boxed(graph: fx.GraphModule, _: object) -> Any:
        return make_boxed_func(graph.forward)

    plain, planned = model(mine).train(), model(mine).train()
    plain(X).square().mean().backward()
    aot_module(planned, boxed, partition_fn=partition)(X).square().mean().backward()
    assert forms.count("aten.mm.default") == 2
    for a, b in zip(plain.parameters(), planned.parameters(), strict=True):
        assert_close(a.grad, b.grad)


def test_a_foreign_op_is_packaged(mine: Any) -> None:
    made = model(mine).eval()
    bound = rewriter.export(made, [], X)
    assert bound.own_ops == {NAME: 2}
    assert bound.needs == f"it calls {NAME} (2 calls): install mine and import mine before loading"
    alone = rewriter.export(made, [], X, standalone=True)
    assert alone.stands_alone
    assert_close(alone.program.module()(X), made(X))
    assert own_ops(bound.program.graph_module) == ["mine.low_rank.default"] * 2


# ours


def ours() -> list[ops.Record]:
    ops.load()
    return [r for r in ops.records() if r.needs.startswith("rewriter.kernels.")]


def test_every_record_of_ours_holds_together() -> None:
    for record in ours():
        assert any(reason is None for reason in record.kernels().values()), record.name
        samples = record.samples
        if samples is None:
            assert not record.own_kind
            continue
        point = [axis[0] for axis in samples.axes]
        args = samples.arguments(*point)
        with torch.no_grad():
            y = record.op(*args)
            want = record.reference(*args)
        assert float((y - want).norm()) <= 0.02 * float(want.norm()), record.name
        assert samples.place(*probes.sample_sizes(record, *point)) == tuple(point)


def test_the_parts_have_the_flops_of_the_op_at_every_sample() -> None:
    for record in ours():
        if record.samples is None:
            continue
        for point in zip(*(axis[:2] for axis in record.samples.axes), strict=False):
            sizes = probes.sample_sizes(record, *point)
            with torch.device("meta"):
                args = record.samples.arguments(*point)
                flops = flop_registry[record.op](*args, out_val=record.op(*args))
            work = Work(record.name, record.kind, record.dtype or "float32", flops, shape=sizes)
            product = gemms(work)
            pieces = sum(p.count * p.flops for p in plain_works(work))
            assert flops == (2 * math.prod(product) if product else pieces), record.name


def test_a_report_of_another_process_finds_the_record_of_its_kind() -> None:
    work = Work("rewriter::quadratic_linear", "quadratic", "float32", 6, shape=(1, 1, 1))
    assert len(plain_works(work)) == 2
    unknown = Work("far::away", "far_away", "float32", 10**12, shape=(3,))
    assert on_matrix_unit("far_away")
    assert plain_works(unknown) == [unknown]
    assert not on_matrix_unit("other")


def test_the_planner_packs_with_the_forms_of_records() -> None:
    forms = ops.forms()
    assert {"bits", "int8", "int4"} <= set(forms)
    assert forms["bits"].nbytes(17) == 3
    made = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.GELU())
    joint = joint_of(made, torch.randn(256, 64))
    kinds = {p.kind for p in packings(joint, ("int8", "int4"))}
    assert {"int8", "int4"} <= kinds
    eight = [p for p in packings(joint, ("int8",)) if p.kind == "int8"]
    assert {p.nbytes for p in eight} == {forms["int8"].nbytes(256 * 128)}


# ops without a record


@torch.library.custom_op("rewriter_test::scaled", mutates_args=())
def twice(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight @ weight


@twice.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture
def formula() -> Iterator[None]:
    """A FLOP formula of torch's, and no record."""
    op = torch.ops.rewriter_test.scaled
    register_flop_formula(op)(lambda x, w, **_: 4 * x[0] * w[0] * w[1])
    yield
    flop_registry.pop(op, None)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rewriter_test.scaled(x, self.weight)


def test_an_op_without_formula_and_record_is_an_error_line() -> None:
    (line,) = explain(Twice().eval(), [], torch.randn(4, 8)).errors
    assert line.startswith("no cost formula for rewriter_test::scaled (")
    assert "register its record with rewriter.kernels.ops.register; totals are lower" in line


def test_an_op_that_multiplies_without_a_record_is_an_error_line(formula: None) -> None:
    report = explain(Twice().eval(), [], torch.randn(4, 8))
    (line,) = report.errors
    assert line.startswith("rewriter_test::scaled multiplies and has no record (")
    assert line.endswith("register its record with rewriter.kernels.ops.register")
    assert report.after.flops == 4 * 4 * 8 * 8
    assert not report.lower_bounds


def test_a_record_may_take_the_formula_that_is_there(formula: None) -> None:
    ops.register(ops.Record("rewriter_test::scaled", "matmul", lambda x, w: x @ w @ w))
    try:
        report = explain(Twice().eval(), [], torch.randn(4, 8))
        assert report.errors == []
        assert [w.kind for w in report.after.work if w.flops] == ["matmul"]
    finally:
        ops.forget("rewriter_test::scaled")


# records that contradict something


def record(**changes: Any) -> ops.Record:
    """A right one of `twice`, with changes."""
    right = ops.Record(
        "rewriter_test::scaled",
        kind="scaled",
        reference=lambda x, w: x @ w @ w,
        size_names=("rows", "width"),
        sizes=lambda x, w: tuple(x.shape),
        flops=lambda x, w, **_: 4 * x[0] * w[0] * w[1],
        parts=lambda run: [ops.product(run, 1, run.sizes[0], run.sizes[1], run.sizes[1])] * 2,
        samples=ops.Samples(
            axes=((1, 8), (4, 16)),
            arguments=lambda rows, width: (torch.rand(rows, width), torch.rand(width, width)),
            place=lambda rows, width: (rows, width),
        ),
    )
    return dataclasses.replace(right, **changes)


def samples(**changes: Any) -> ops.Samples:
    right = record().samples
    assert right is not None
    return dataclasses.replace(right, **changes)


def one_sample(*args: Any) -> ops.Samples:
    return samples(arguments=lambda rows, width: args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "twice"}, "'twice' names no op: write 'namespace::name'"),
        ({"name": "rewriter_test::absent"}, "there is no op rewriter_test::absent: define it"),
        ({"kind": "Twice!"}, "kind='Twice!' is no lower-case name"),
        ({"kind": "matmul"}, "what is priced as 'matmul' has no parts, gemm or samples"),
        ({"unit": "tensor"}, "unit='tensor' is none of matrix, vector"),
        ({"reference": None}, "scaled has no reference: give the same function in plain torch"),
        ({"reference": lambda x: x}, r"its reference\(x\) does not take .*weight\) .*: too many"),
        (
            {"sizes": lambda q: (1, 2)},
            r"its sizes\(q\) does not take .*Tensor weight\) .*: too many",
        ),
        ({"flops": lambda q: 3}, r"its flops\(q\) does not take .*and out_shape: too many"),
        (
            {"flops": lambda x, w: 3},
            "and out_shape: got an unexpected keyword argument 'out_shape'",
        ),
        ({"flops": 3}, "scaled: flops=3 is no function"),
        ({"sizes": 3}, "scaled: sizes=3 is no function"),
        ({"kernels": {"torch": None}}, "scaled: kernels={'torch': None} is no function"),
        ({"kind": None}, "scaled: kind=None is no str"),
        ({"size_names": "ab"}, "scaled: size_names='ab' is no tuple of str"),
        ({"size_names": ("a", "a")}, r"scaled: size_names=\('a', 'a'\) has a name twice"),
        ({"dtype": "floot"}, "scaled: dtype='floot' is no name of a torch.dtype"),
        ({"derives": 3}, "scaled: derives=3 is no tuple of Derived"),
        ({"companions": ("x",)}, r"scaled: companions=\('x',\) is no tuple of Companion"),
        (
            {"companions": (ops.Companion("rewriter_test::scaled", derives=3),)},  # type: ignore[arg-type]
            "companion rewriter_test::scaled: derives=3 is no tuple of Derived",
        ),
        ({"samples": 3}, "scaled: samples=3 is no Samples"),
        ({"sizes": None}, "a kind of its own needs sizes"),
        ({"samples": None}, "a kind of its own needs samples"),
        ({"parts": None}, "it needs either parts or gemm"),
        ({"gemm": lambda *s: s}, "it needs either parts or gemm"),
        ({"flops": None}, "has no FLOP formula for rewriter_test::scaled"),
        ({"flops": lambda *a, **_: 7}, "its parts have 64 FLOPs at rows=1, width=4, its formula"),
        ({"size_names": ("rows",)}, r"2 sizes, and size_names=\('rows',\)"),
        ({"samples": one_sample(3)}, "its samples must be a tuple that begins with a tensor"),
        ({"samples": one_sample(torch.rand(2, 2))}, "its samples do not fit rewriter_test::scaled"),
        ({"samples": one_sample(torch.rand(2, 2), "w")}, "its samples do not fit .*Tensor weight"),
        ({"samples": samples(place=lambda *s: (1,))}, "place gives no point on 2 axes"),
        (
            {"derives": (ops.Derived("mid", 1, ("x",), list, list),)},
            "the closed form 'mid' is of result 1, which rewriter_test::scaled",
        ),
        (
            {"derives": (ops.Derived("mid", 0, ("z",), list, list),)},
            "the closed form 'mid' is of 'z', which rewriter_test::scaled",
        ),
        (
            {"companions": (ops.Companion("rewriter_test::scaled"),)},
            "the record of rewriter_test::scaled names rewriter_test::scaled twice",
        ),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(changes: Any, message: str) -> None:
    before = dict(ops._by_name), dict(ops._by_kind), set(flop_registry)
    with pytest.raises(ops.RecordError, match=message):
        ops.register(record(**changes))
    assert (ops._by_name, ops._by_kind, set(flop_registry)) == before


def test_two_records_of_one_op_are_refused_by_both_names(mine: Any) -> None:
    mine_again = dataclasses.replace(mine.RECORD, kind="other_kind")
    with pytest.raises(ops.RecordError) as caught:
        ops.register(mine_again)
    said = str(caught.value)
    assert "two records of mine::low_rank" in said
    assert "(kind 'low_rank')" in said
    assert "(kind 'other_kind')" in said


def test_two_records_of_one_kind_are_refused_by_both_names(mine: Any) -> None:
    with pytest.raises(ops.RecordError) as caught:
        ops.register(record(kind="low_rank"))
    assert "rewriter_test::scaled in " in str(caught.value)
    assert "mine::low_rank in mine" in str(caught.value)


def test_two_formulas_of_one_op_are_refused(formula: None) -> None:
    with pytest.raises(ops.RecordError, match="two FLOP formulas for rewriter_test::scaled"):
        ops.register(record())


# packed weights


class FourBit(Layer):
    packed = {"weight": 2}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(8, 4, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(8))
        self.register_buffer("derived", torch.ones(5), persistent=False)


def test_a_packed_buffer_counts_the_weights_in_it() -> None:
    cost = storage_cost(FourBit())
    assert cost.params == 8 * 4 * 2 + 8
    assert cost.param_bytes == 8 * 4 + 8 * 4 + 5 * 4


def test_records_hold_where_a_library_took_a_function_out_of_the_reach_of_device_contexts() -> None:
    """transformers replaces `torch.linspace` while it loads a model; where torch lists what makes
    tensors in the meantime, a device as a context misses `linspace` from then on."""
    script = """
import torch
from torch.utils import _device
own = torch.linspace
torch.linspace = lambda *args, **more: own(*args, **more)
_device._device_constructors.cache_clear()
_device._device_constructors()
torch.linspace = own
with torch.device("meta"):
    assert torch.linspace(0, 1, 3).device.type == "cpu"
import rewriter.passes
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
