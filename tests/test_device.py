"""Devices: rooflines from datasheets, measured tables, the calibration's cache. No timing here."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import rewriter.passes  # noqa: F401  registers the ops that the probes call
from rewriter.cost import Cost, Training
from rewriter.cost.machine import calibrate, probes
from rewriter.cost.machine.datasheets import ALIASES, DATASHEETS
from rewriter.cost.machine.device import Device, Level
from rewriter.cost.machine.measured import Measured
from rewriter.cost.machine.roofline import Table, gemm_efficiency, gemms, plain_works
from rewriter.cost.work import Work
from rewriter.errors import OptionError, RewriteWarning

TOY = Device(
    "toy",
    "cpu",
    {"float32": 1e12, "int8": 4e12},
    {"float32": 1e11},
    (Level("L2", 1e6, 1e12, 1.0), Level("DRAM", math.inf, 1e11, 100.0)),
    1e-6,
    1,
    10.0,
)


def product(m: int, n: int, k: int, dtype: str = "float32", size: int = 4) -> Work:
    weights = n * k * size
    read = m * k * size + weights
    flops = 2 * m * n * k
    return Work("aten::addmm", "matmul", dtype, flops, read, m * n * size, weights, (1, m, n, k))


def moved(nbytes: int) -> Work:
    shape = (nbytes // 8,)
    return Work("aten::relu", "pointwise", "float32", 0, nbytes // 2, nbytes // 2, shape=shape)


# roofline


def test_time_is_launch_plus_the_higher_roof() -> None:
    work = moved(80_000)  # fits L2
    assert TOY.time(work) == pytest.approx(1e-6 + 80_000 / (1e12 * 0.75))
    assert TOY.bound(work) == "launch"
    work = moved(80_000_000)
    assert TOY.time(work) == pytest.approx(1e-6 + 8e7 / (1e11 * 0.75))
    assert TOY.bound(work) == "memory"
    work = product(2048, 2048, 2048)
    efficiency = gemm_efficiency(1, 2048, 2048, 2048, 1)
    assert 0.9 < efficiency <= 1
    assert TOY.time(work) == pytest.approx(1e-6 + work.flops / (1e12 * 0.85 * efficiency))
    assert TOY.bound(work) == "compute"
    assert TOY.bound(replace(work, shape=(1, 1, 1, 1), flops=2, bytes_read=8)) != "compute"


def test_a_sum_over_the_ops_and_their_counts() -> None:
    a, b = product(64, 512, 512), replace(moved(4096), count=3)
    cost = Cost(work=(a, b), param_bytes=a.weight_bytes, bytes_moved=1)
    assert TOY.time(cost) == pytest.approx(TOY.time(a) + TOY.time(b))
    assert TOY.time(b) == pytest.approx(3 * TOY.time(moved(4096)))
    assert TOY.time(Cost()) == 0.0


def test_weights_come_from_the_level_that_holds_all_of_them() -> None:
    work = product(1, 256, 256)  # 262 kB
    alone = TOY.time(Cost(work=(work,), param_bytes=work.weight_bytes, bytes_moved=1))
    many = TOY.time(Cost(work=(replace(work, count=100),), param_bytes=10**9, bytes_moved=1))
    assert many / 100 > 1.5 * alone  # 26 MB in all: out of the toy's L2
    assert TOY.time(work, resident=10**8) == pytest.approx(many / 100)
    # of a table of embeddings only the rows that are read count
    rows = Work("aten::embedding", "gather", "float32", 0, 4096, 4096, 10**9, (8, 128))
    both = Cost(work=(work, rows), param_bytes=2 * 10**9, bytes_moved=1)
    assert TOY.time(both) == pytest.approx(alone + TOY.time(rows), rel=0.2)


def test_int8_is_faster_where_the_device_has_units_for_it() -> None:
    big = product(2048, 4096, 4096), product(2048, 4096, 4096, "int8", 1)
    h100, laptop = Device.get("h100"), Device.get("laptop")
    assert 10 < h100.time(big[0]) / h100.time(big[1]) < 40  # float32 runs outside tensor cores
    assert 2 < laptop.time(big[0]) / laptop.time(big[1]) < 5
    assert TOY.peak("bfloat16") == TOY.peak("float32") == 1e12
    assert TOY.peak("int8") == 4e12
    assert TOY.peak("complex64") == 1e12


def test_a_view_takes_no_time_of_a_datasheet_device() -> None:
    assert Device.get("a100").time(Work("call_function", "view", "")) == 0.0


def test_a_cost_without_work_is_one_op() -> None:
    cost = Cost(flops=10**12, bytes_moved=10**9, bytes_written=10**8, param_bytes=10**8, launches=9)
    assert TOY.time(cost) == pytest.approx(1e-6 + 1 / (0.85 * 0.6), rel=1e-6)
    only_bytes = Cost(bytes_moved=10**9, bytes_written=10**8, launches=1)
    assert TOY.time(only_bytes) == pytest.approx(1e-6 + 1e9 / (1e11 * 0.75), rel=1e-3)


def test_training_adds_the_update() -> None:
    work = product(64, 512, 512)
    step = Training(
        weight_bytes=2**20, gradient_bytes=2**20, optimizers={"adam": 2**21}, work=(work,)
    )
    cost = Cost(work=(work,), param_bytes=2**20, bytes_moved=1, training=step)
    assert TOY.time(cost, training=True) > TOY.time(work, resident=2**21) + 1e-6
    assert TOY.energy(cost, training=True) > TOY.energy(cost)
    with pytest.raises(OptionError, match="no training step"):
        TOY.time(replace(cost, training=None), training=True)


def test_priced_fills_in_seconds_and_joules() -> None:
    work = product(64, 256, 256)
    cost = Cost(work=(work,), param_bytes=work.weight_bytes, bytes_moved=1)
    priced = TOY.priced(cost)
    assert priced.latency_s == TOY.time(cost)
    assert priced.energy_j == TOY.energy(cost)
    far = TOY.priced(cost, resident=10**9)
    assert far.energy_j is not None
    assert far.energy_j > TOY.energy(cost)


def test_energy_counts_arithmetic_and_bytes_by_level() -> None:
    near, far = moved(8_000), moved(8_000_000)
    assert TOY.energy(near) == pytest.approx((1000 * 0.85 + 8_000 * 1.0) * 1e-12)
    assert TOY.energy(far) == pytest.approx((1_000_000 * 0.85 + 8_000_000 * 100.0) * 1e-12)
    int8, wide = product(512, 512, 512, "int8", 1), product(512, 512, 512)
    assert TOY.energy(wide) > 4 * TOY.energy(int8)


@pytest.mark.parametrize("units", [1, 108])
def test_gemm_efficiency_is_a_share(units: int) -> None:
    for m in (1, 7, 128, 129, 4096):
        for n in (1, 100, 4096):
            assert 0 < gemm_efficiency(1, m, n, 512, units) <= 1
    assert gemm_efficiency(1, 4096, 4096, 4096, units) > 0.85
    assert gemm_efficiency(1, 1, 4096, 4096, units) < 0.15
    # wave quantization: one tile more than fills the device takes a second wave
    full = gemm_efficiency(1, 256 * 108, 128, 128, 108)
    assert gemm_efficiency(1, 256 * 109, 128, 128, 108) < full


# composite layers


def test_parts_keep_the_flops() -> None:
    rows, out, width, n = 96, 512, 256, 4
    rank = 16
    flops = 2 * rows * n * n * rank * (width // n + out // n)
    for kind in ("monarch", "int8_monarch"):
        work = Work(
            f"rewriter::{kind}", kind, "float32", flops, shape=(rows, out, width, n, n, rank, 1)
        )
        pieces = plain_works(work)
        assert sum(p.count * p.flops for p in pieces) == flops
        assert {p.kind for p in pieces} >= {"copy"}
    dense = 2 * rows * out * width
    quadratic = Work("rewriter::quadratic_linear", "quadratic", "float32", 3 * dense)
    quadratic = replace(quadratic, shape=(rows, out, width))
    assert sum(p.count * p.flops for p in plain_works(quadratic)) == 3 * dense
    topk = Work("rewriter::topk_linear", "topk", "float32", dense, shape=(rows, out, width, 64))
    assert sum(p.count * p.flops for p in plain_works(topk)) == dense
    assert plain_works(product(1, 2, 3)) == [product(1, 2, 3)]


def test_gemms_of_convolutions_and_experts() -> None:
    conv = Work("aten::convolution", "conv", "float32", shape=(2, 64, 16, 100, 9, 4))
    assert gemms(conv) == (4, 200, 16, 144)
    experts = product(80, 32, 16)
    experts = replace(experts, op="aten::_grouped_mm", weight_bytes=8 * 32 * 16 * 4)
    assert gemms(experts) == (8, 10, 32, 16)
    assert gemms(moved(8)) is None


# datasheets


def test_every_datasheet_device_prices_a_model() -> None:
    wanted = "A100-40GB A100-80GB H100-SXM H200 B200 L4 RTX-4090 MI300X laptop-CPU phone-CPU"
    assert set(wanted.split()) == set(DATASHEETS)
    work = product(512, 4096, 4096, "bfloat16", 2)
    for device in DATASHEETS.values():
        assert device.source
        assert device.power_w > 0
        capacities = [level.capacity for level in device.levels]
        speeds = [level.bandwidth for level in device.levels]
        assert capacities == sorted(capacities)
        assert speeds == sorted(speeds, reverse=True)
        assert math.isinf(capacities[-1])
        assert device.time(work) > work.flops / device.peak("bfloat16")
        assert device.energy(work) < device.power_w * device.time(work)
    speed = {name: device.time(work) for name, device in DATASHEETS.items()}
    assert speed["B200"] < speed["H100-SXM"] < speed["A100-80GB"] < speed["L4"]
    assert speed["L4"] < speed["laptop-CPU"] < speed["phone-CPU"]


def test_decoding_goes_by_bandwidth() -> None:
    work = product(1, 8192, 8192, "bfloat16", 2)
    times = [Device.get(n).time(work, resident=10**11) for n in ("h100", "h200")]
    assert times[0] / times[1] == pytest.approx(4.8 / 3.35, rel=0.05)
    assert Device.get("h200").bound(replace(work, weight_bytes=10**9, bytes_read=10**9)) == "memory"


def test_names() -> None:
    for name in ("H100", "h-100", "H100 SXM", "h100sxm"):
        assert Device.get(name) is DATASHEETS["H100-SXM"]
    assert Device.get(DATASHEETS["L4"]) is DATASHEETS["L4"]
    assert set(ALIASES.values()) <= set(DATASHEETS)
    assert Device.names()[-1] == "this"
    with pytest.raises(OptionError, match=r"unknown device 'H-1000'.*'H100-SXM'.*There are A100"):
        Device.get("H-1000")
    with pytest.raises(OptionError, match="no memory level 'L9'"):
        Device.get("a100").bandwidth("L9")
    assert Device.get("a100").bandwidth("hbm2e") == pytest.approx(2.039e12)
    assert Device.get("a100").ridge("bfloat16") == pytest.approx(312 / 2.039)


# measured tables


def test_a_table_is_exact_on_its_grid_and_for_power_laws_between() -> None:
    axes = ((1.0, 8.0), (1.0, 16.0, 64.0))
    table = Table(axes, tuple(a**0.5 * b for a in axes[0] for b in axes[1]))
    assert table.at(8, 16) == pytest.approx(8**0.5 * 16)
    assert table.at(2, 32) == pytest.approx(2**0.5 * 32)
    assert table.at(0.1, 1000) == pytest.approx(64)  # the edge's value
    assert table.seconds(4, 640) == pytest.approx(2 * 640)  # grows on
    assert Table.from_dict(json.loads(json.dumps({"axes": axes, "values": table.values}))) == table
    with pytest.raises(ValueError, match="bad one"):
        Table(((1.0,),), (math.nan,))
    with pytest.raises(ValueError, match="2 values"):
        Table(((1.0,),), (1.0, 2.0))


def found() -> Measured:
    flat = Table(((1.0, 1e9),), (1e-6, 1.0))
    square = Table(((1.0, 1024.0),) * 3, tuple(1e-6 * 8.0**i for i in (0, 1, 1, 2, 1, 2, 2, 3)))
    ratio = Table(((1.0,), (1.0,), (1.0,)), (2.0,))
    tables = {"addmm/float32": square, "add": flat, "clone": flat, "ratio/quadratic": ratio}
    miss = Table(((1e6, 1e8),), (1e-15, 1e-10))
    return Measured(tables, miss, {"module": 5e-6, "view": 1e-6, "op": 2e-6})


def test_measured_times() -> None:
    own = found()
    small = product(1, 1, 1)
    assert own.seconds(small, 4) == pytest.approx(6e-6)  # the table, and calling the module
    assert own.seconds(Work("call_function", "view", ""), 0) == 1e-6
    assert own.seconds(Work("call_module", "view", ""), 0) == 5e-6
    assert own.seconds(Work("aten::strange", "other", ""), 0) is None
    assert own.table_of(Work("aten::mul_", "pointwise", "float32")) == "add"
    near, far = own.seconds(product(1, 512, 512), 10**6), own.seconds(product(1, 512, 512), 10**8)
    assert near is not None
    assert far is not None
    assert far - near == pytest.approx(512 * 512 * 4 * 1e-10, rel=0.05)
    three = replace(small, kind="quadratic", op="rewriter::quadratic_linear", shape=(1, 1, 1))
    alone = own.composite(three)
    assert alone is not None
    assert own.seconds(three, 4) == pytest.approx(2 * alone + 5e-6)
    assert own.launch(small) == pytest.approx(6e-6)


def test_a_backward_op_costs_by_its_share_of_arithmetic() -> None:
    own = found()
    forward = Work("rewriter::quadratic_linear", "quadratic", "float32", 6, shape=(1, 1, 1))
    once = own.seconds(forward, 1)
    back = replace(forward, flops=12, backward=True, op="rewriter::quadratic_linear_backward")
    assert once is not None
    assert own.seconds(back, 1) == pytest.approx(2 * (once - own.host["module"]))
    # a matrix product of the backward is one like any other, and no module calls it
    plain = replace(product(1, 1, 1), backward=True)
    assert own.seconds(plain, 1) == pytest.approx(1e-6)


def test_measured_survives_json() -> None:
    own = found()
    assert Measured.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    for damage in ({}, {"tables": {}, "miss": {"axes": [[1]], "values": [1]}, "host": {}}):
        with pytest.raises((KeyError, ValueError)):
            Measured.from_dict(damage)


# calibration


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[list[int]]:
    """The cache in a folder of its own, and a calibration that measures nothing; its calls."""
    calls = [0]
    full = found()
    full = replace(full, tables={**full.tables, "int8_linear": full.tables["addmm/float32"]})

    def instead(known: Measured | None) -> tuple[Measured, bool]:
        calls[0] += 1
        return full, True

    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "calibrate", instead)
    calibrate._known.clear()
    yield calls
    calibrate._known.clear()


def again() -> Device:
    calibrate._known.clear()
    return Device.get("this")


def test_the_calibration_is_kept(tiny: list[int]) -> None:
    device = Device.this_machine()
    assert device.kind == "cpu"
    assert device.measured is not None
    assert Device.this_machine() is device
    assert again() == device
    assert tiny == [1]
    Device.this_machine(refresh=True)
    assert tiny == [2]
    (file,) = calibrate.cache_folder().iterdir()  # and nothing half written beside it
    assert json.loads(file.read_text())["key"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "[]", '{"key": 1}', '{"tables": 3}'], ids=str.__len__
)
@pytest.mark.filterwarnings("ignore:.*cannot be read.*measured anew")
def test_a_damaged_cache_is_measured_anew(tiny: list[int], text: str) -> None:
    Device.this_machine()
    (file,) = calibrate.cache_folder().iterdir()
    file.write_text(text)
    again()
    again()
    assert tiny == [2]


def test_another_version_or_number_of_threads_is_measured_anew(
    tiny: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    Device.this_machine()
    monkeypatch.setattr(calibrate, "FORMAT", calibrate.FORMAT + 1)
    again()
    assert tiny == [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    again()
    assert tiny == [3]


def test_a_cache_that_cannot_be_written_warns(
    tiny: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "file"))
    with pytest.warns(RewriteWarning, match="is not kept .* set REWRITER_CACHE"):
        Device.this_machine()


def test_a_calibration_with_gaps_is_completed_by_the_next_process(
    tiny: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Measured | None] = []

    def gaps(known: Measured | None) -> tuple[Measured, bool]:
        given.append(known)
        return found(), len(given) == 2

    monkeypatch.setattr(calibrate, "calibrate", gaps)
    with pytest.warns(RewriteWarning, match="too busy .* next process measures the rest"):
        device = Device.this_machine()
    assert again() == again() == device
    assert given == [None, found()]
    # what has no table is priced by the formula
    odd = Work("aten::strange", "other", "float32", 0, 4096, 4096, shape=(1024,))
    assert device.time(odd) > 0


def test_every_probe_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = calibrate.Clock()
    monkeypatch.setattr(calibrate, "_SAMPLES", 1)
    names = set()
    for probe in (*probes.probes(1e9), *probes.more_probes(1e9)):
        smallest = tuple((axis[0],) for axis in probe.axes)
        table = calibrate._fill(clock, replace(probe, axes=smallest, most=math.inf))
        assert len(table.values) == 1
        assert probe.name not in names
        names.add(probe.name)
    assert {"addmm/float32", "int8_linear", "conv/3", "gelu", "attention"} <= names
    made_of_parts = {record.name for record, *_ in probes.composites()}
    products = {"int8_linear", "int8_weight_linear", "int4_linear", "int4_dynamic_linear"}
    assert products <= names
    assert made_of_parts | {f"rewriter::{n}" for n in products} == calibrate._measured_ops()
    for _, axes, make in probes.composites():
        call, written = calibrate._made(make, *(axis[0] for axis in axes))
        call()
        assert written.is_floating_point()


def test_what_is_known_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def probe(name: str) -> probes.Probe:
        def make(size: int) -> probes.Call:
            made.append(name)
            return (lambda: None), torch.zeros(1)

        return probes.Probe(name, ((1, 2),), make, float, 10.0)

    first, second = probe("add"), probe("other")
    monkeypatch.setattr(calibrate, "probes", lambda speed: [first])
    monkeypatch.setattr(calibrate, "more_probes", lambda speed: [second])
    monkeypatch.setattr(calibrate, "composites", lambda: [])
    monkeypatch.setattr(calibrate, "_SECONDS", 0.0)
    start, whole = calibrate.calibrate()
    assert (set(start.tables), whole) == ({"add"}, False)
    made.clear()
    monkeypatch.setattr(calibrate, "_SECONDS", 60.0)
    full, whole = calibrate.calibrate(start)
    assert (list(full.tables), whole) == (["add", "other"], True)
    assert full.tables["add"] == start.tables["add"]
    assert set(made) == {"other"}


def test_points_that_are_too_large_are_extrapolated() -> None:
    sizes: list[int] = []

    def make(size: int) -> probes.Call:
        sizes.append(size)
        return (lambda: None), torch.zeros(1)

    probe = probes.Probe("p", ((1, 10, 100),), make, float, 10.0)
    table = calibrate._fill(calibrate.Clock(), probe)
    assert sizes == [1, 10]
    assert table.values[2] == pytest.approx(10 * table.values[1])


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    assert calibrate.cache_folder() == tmp_path
    monkeypatch.delenv("REWRITER_CACHE")
    assert calibrate.cache_folder().name == "rewriter"
