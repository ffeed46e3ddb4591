"""This machine, measured: runs the probes, keeps what they found on disk, makes it a `Device`."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rewriter.cost.machine.datasheets import DDR, SRAM
from rewriter.cost.machine.device import Device, Level, measure_with
from rewriter.cost.machine.measured import DISTURBED, Measured
from rewriter.cost.machine.probes import (
    Axes,
    Call,
    Probe,
    composites,
    grid,
    more_probes,
    probes,
    sample_sizes,
)
from rewriter.cost.machine.roofline import Table
from rewriter.cost.machine.waiting import Waiting
from rewriter.cost.work import Work
from rewriter.errors import warn
from rewriter.kernels import ops
from rewriter.kernels.ops import Record
from rewriter.modules.isolation import own_numbers

__all__ = ["FORMAT", "cache_folder", "calibrate", "this_machine"]

FORMAT = 6
"""Version of the procedure and of the file: another one is measured anew."""

_SECONDS = 18.5  # after this long, tables that are still missing are left out
_SAMPLES = 11
_PER_POINT = 6e-3
_SMALL = 2**20  # elements of a result that is still in the cache when it is read
_CHAIN = 10
_NEEDED = frozenset({"addmm/float32", "add"})


_known: dict[tuple[Path, frozenset[str]], Device] = {}


def this_machine(refresh: bool = False) -> Device:
    """See `Device.this_machine`."""
    ops.load()
    key, measured = _key(), _measured_ops()
    name = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(map(str, key.values())))
    path = cache_folder() / f"{name}.json"
    known = path, measured
    if refresh or known not in _known:
        found, whole = (None, frozenset()) if refresh else _read(path, key)
        if found is None or not measured <= whole:
            found = _measure(path, key, found, whole | measured)
        _known[known] = _device(found, key)
    return _known[known]


def _measured_ops() -> frozenset[str]:
    """The ops of which a calibration takes samples."""
    return frozenset(r.name for r in ops.records() if r.samples is not None)


def _measure(
    path: Path, key: Mapping[str, Any], known: Measured | None, names: frozenset[str]
) -> Measured:
    """What is not known yet; what there was no time for, the next process measures."""
    found, whole = calibrate(known)
    kept = sorted(names) if whole else None
    _write(path, {"key": key, "whole": kept, **found.to_dict()})
    if not whole:
        warn(
            f"this machine is too busy to be measured in {_SECONDS:.0f} s: some predicted times "
            "are rough. The next process measures the rest"
        )
    return found


def cache_folder() -> Path:
    """`$REWRITER_CACHE`, else "rewriter" in the user's cache folder of this system."""
    given = os.environ.get("REWRITER_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("rewriter"))


def _key() -> dict[str, Any]:
    return {
        "format": FORMAT,
        "cpu": _cpu()[0],
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu() -> tuple[str, dict[str, float]]:
    """(model name, bytes of each cache level), as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    plain = {k.strip(): v.strip() for k, v in lines.items()}
    name = " ".join(
        plain[k] for k in ("model name", "cpu family", "model", "stepping") if plain.get(k)
    )
    caches: dict[str, float] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size, shared = (
                (folder / n).read_text(encoding="utf-8").strip()
                for n in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        if kind != "Instruction":
            alone = shared.isdigit()
            caches[f"L{level}"] = float(size.rstrip("K")) * 1024 * (_cores() if alone else 1)
    return name or platform.processor() or platform.machine(), caches


# the file


def _read(path: Path, key: Mapping[str, Any]) -> tuple[Measured | None, frozenset[str]]:
    """(what is kept, the ops with which it is all there is to measure)."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = Measured.from_dict(data)
        good = data["key"] == key and set(found.tables) >= _NEEDED
        return (found, frozenset(data["whole"] or ())) if good else (None, frozenset())
    except (FileNotFoundError, NotADirectoryError):
        return None, frozenset()
    except (KeyError, TypeError, AttributeError, IndexError):
        return None, frozenset()  # of another version: measured and written over
    except (OSError, ValueError, RecursionError) as error:
        warn(f"{path} cannot be read ({error}): this machine is measured anew")
        return None, frozenset()


def _write(path: Path, data: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=".part-", delete=False, encoding="utf-8"
        ) as file:
            json.dump(data, file)
        os.replace(file.name, path)
    except OSError as error:
        warn(
            f"the calibration of this machine is not kept ({error}): set REWRITER_CACHE to a "
            "folder that can be written, or it is measured again in every process"
        )


# measuring


class Clock:
    """Times calls as they run in the middle of a model: see `rewriter.cost.machine.probes`."""

    def __init__(self) -> None:
        with own_numbers():
            self.x, between = torch.rand(4, 1024), torch.rand(8, DISTURBED // 4096, 1024)
        self.turn = itertools.cycle(between.unbind())
        self.disturb()  # starts the threads
        self.waiting = Waiting()

    def disturb(self, written: Tensor | None = None) -> None:
        """Other weights go through the cache; then `written` is written."""
        F.linear(self.x, next(self.turn))
        if written is not None and written.numel() <= _SMALL:
            written.add_(0)

    def seconds(
        self, call: Callable[[], object], written: Tensor | None = None, samples: int = _SAMPLES
    ) -> float:
        """The lower quartile of a few timings in which no thread waited for a core.

        Where one always did, the timing with the least waiting.
        """
        call()
        call()
        clean: list[float] = []
        waited: list[tuple[float, float]] = []
        begin = time.perf_counter()
        while len(clean) < samples:
            self.disturb(written)
            before = self.waiting.seconds()
            start = time.perf_counter()
            call()
            stop = time.perf_counter()
            lost = self.waiting.seconds() - before
            if lost < 0.01 * (stop - start) + 1e-6:
                clean.append(stop - start)
            waited.append((lost, stop - start))
            enough = len(clean) >= 3
            if stop - begin > _PER_POINT * (1 if enough else 5) and len(waited) >= 3:
                break
        return sorted(clean)[len(clean) // 4] if clean else min(waited)[1]


def calibrate(known: Measured | None = None) -> tuple[Measured, bool]:
    """Runs all probes with torch's present threads.

    Args:
        known: of an earlier process, which had no time for all of them: these are not run again.

    Returns:
        What was found, and whether there was time for all of it.
    """
    start = time.perf_counter()
    with torch.inference_mode():
        clock = Clock()
        with own_numbers():
            x, y = torch.rand(512, 1024), torch.rand(1024, 1024)
        speed = 2.0 * 512 * 1024 * 1024 / clock.seconds(lambda: x @ y)
        host, miss = (known.host, known.miss) if known else (_host(clock), _miss(clock))
        tables = dict(known.tables) if known else {}
        new, whole = _sweep(clock, speed, start + _SECONDS, tables)
        taken = time.perf_counter() - start
        if whole and 2.2 * taken < _SECONDS:
            # A machine that others share is slow or fast for seconds on end, and a process's heap
            # settles: neither the first sweep nor the second is what a model will see.
            again, _ = _sweep(clock, speed, math.inf, tables)
            new = {name: _middle(table, again[name]) for name, table in new.items()}
    tables |= new
    found = Measured(tables, miss, host)
    for record, axes, _ in composites():
        name = f"ratio/{record.kind}"
        if name in new:
            tables[name] = _over_parts(found, record, axes, tables[name].values)
    return found, whole


def _sweep(
    clock: Clock, speed: float, deadline: float, known: Mapping[str, Table]
) -> tuple[dict[str, Table], bool]:
    """All probes once that are not known: seconds by table, and whether there was time for all."""
    tables: dict[str, Table] = {}
    fills: list[tuple[str, Callable[[], Table]]] = []
    fills += [(probe.name, partial(_fill, clock, probe)) for probe in probes(speed)]
    fills += [
        (f"ratio/{record.kind}", partial(_layers, clock, axes, make))
        for record, axes, make in composites()
    ]
    fills += [(probe.name, partial(_fill, clock, probe)) for probe in more_probes(speed)]
    fills = [(name, fill) for name, fill in fills if name not in known]
    for name, fill in fills:
        if name in _NEEDED or time.perf_counter() < deadline:
            tables[name] = fill()
    return tables, len(tables) == len(fills)


def _middle(table: Table, other: Table) -> Table:
    """Geometric means."""
    pairs = zip(table.values, other.values, strict=True)
    return Table(table.axes, tuple(math.sqrt(a * b) for a, b in pairs))


def _fill(clock: Clock, probe: Probe) -> Table:
    """Every point within `probe.most`; the others in proportion to the largest one below."""
    times: dict[tuple[int, ...], float] = {}
    for point in grid(probe):
        work = probe.flops(*point)
        if work <= probe.most:
            times[point] = clock.seconds(*_made(probe.make, *point))
    values = []
    for point in grid(probe):
        if point not in times:
            below = [p for p in times if all(a <= b for a, b in zip(p, point, strict=True))]
            near = max(below, key=lambda p: probe.flops(*p))
            values.append(times[near] * probe.flops(*point) / probe.flops(*near))
        else:
            values.append(times[point])
    return Table(probe.axes, tuple(values))


def _made(make: Callable[..., Call], *sizes: int) -> Call:
    """The call on tensors that are no inference tensors: of those, packed weights are not kept."""
    with torch.inference_mode(False), torch.no_grad(), own_numbers():
        return make(*sizes)


def _layers(clock: Clock, axes: Axes, make: Callable[..., Call]) -> Table:
    """Seconds of an op that is made of several parts."""
    return Table(
        axes, tuple(clock.seconds(*_made(make, *point)) for point in itertools.product(*axes))
    )


def _over_parts(found: Measured, record: Record, axes: Axes, values: Sequence[float]) -> Table:
    """Measured over composed time of an op: what its parts do not show alone."""
    ratios = []
    for point, own in zip(itertools.product(*axes), values, strict=True):
        shape = sample_sizes(record, *point)
        total = found.composite(Work(record.name, record.kind, "float32", shape=shape))
        ratios.append(1.0 if total is None else own / total)
    return Table(axes, tuple(ratios))


def _host(clock: Clock) -> dict[str, float]:
    """Seconds that Python and the dispatcher take for what runs no kernel to speak of."""
    view, add = torch.ops.aten.view.default, torch.ops.aten.add.Tensor
    with own_numbers():
        x = torch.rand(2, 2)
        inside: nn.Module = nn.Linear(2, 2)
    for name in ("dense", "attention", "0"):
        outer = nn.Module()
        outer.add_module(name, inside)
        inside = outer
    called, direct = fx.Graph(), fx.Graph()
    value, plain = called.placeholder("x"), direct.placeholder("x")
    weight, bias = direct.placeholder("weight"), direct.placeholder("bias")
    for _ in range(_CHAIN):
        value = called.call_module("0.attention.dense", (value,))
        plain = direct.call_function(F.linear, (plain, weight, bias))
    called.output(value)
    direct.output(plain)
    nested = fx.GraphModule(inside, called)
    flat = fx.GraphModule(nn.Module(), direct)
    own = inside.get_submodule("0.attention.dense")
    given = (x, own.weight, own.bias)
    longer = clock.seconds(lambda: nested.forward(x), samples=40)
    longer -= clock.seconds(lambda: flat.forward(*given), samples=40)
    return {
        "module": max(longer / _CHAIN, 1e-7),
        "view": clock.seconds(lambda: [view(x, [4]) for _ in range(_CHAIN)]) / _CHAIN,
        "op": clock.seconds(lambda: [add(x, x) for _ in range(_CHAIN)]) / _CHAIN,
    }


def _miss(clock: Clock) -> Table:
    """(time with weights out of a pool − time with one weight) / its bytes, over the bytes that
    pass between two uses of one: the pool, and what the clock itself lets pass."""
    side = 512
    nbytes, pools = 4.0 * side * side, tuple(i * 2**20 for i in (4, 8, 16, 64, 256))
    with own_numbers():
        x, alone = torch.rand(4, side), torch.rand(side, side)
        pool = torch.rand(pools[-1] // int(nbytes), side, side)
    warm = clock.seconds(lambda: F.linear(x, alone), x, 40)
    sizes, values = [nbytes + DISTURBED], [1e-15]
    for size in pools:
        count = size // int(nbytes)
        turn = itertools.cycle(pool[:count].unbind())
        for _ in range(count):
            F.linear(x, next(turn))
        cold = clock.seconds(lambda turn=turn: F.linear(x, next(turn)), x, 60)  # type: ignore[misc]
        sizes.append(float(size + min(count, 8) * DISTURBED))
        values.append(max((cold - warm) / nbytes, values[-1]))
    return Table((tuple(sizes),), tuple(values))


# the device


def _gemm_at(record: Record, *point: float) -> tuple[int, ...]:
    """(batch, m, n, k) of an op that is one product, at a point of its samples."""
    assert record.gemm is not None
    return record.gemm(*sample_sizes(record, *map(int, point)))


def _device(found: Measured, key: Mapping[str, Any]) -> Device:
    def best(name: str, gemm: Callable[..., Sequence[int]] = lambda *point: point) -> float:
        table = found.tables[name]
        points = itertools.product(*table.axes)
        timed = zip(points, table.values, strict=True)
        return max(2 * math.prod(gemm(*p)) / t for p, t in timed)

    matrix = {"float32": best("addmm/float32")}
    matrix["float64"] = matrix["float32"] / 2
    if "addmm/bfloat16" in found.tables:
        matrix["bfloat16"] = best("addmm/bfloat16")
    for record in ops.records():
        if record.gemm is not None and record.dtype and record.kind in found.tables:
            own = best(record.kind, partial(_gemm_at, record))
            matrix[record.dtype] = max(matrix.get(record.dtype, 0.0), own)
    add = found.tables["add"]
    vector = max(size / 12 / t for size, t in zip(add.axes[0], add.values, strict=True))
    levels = [
        Level(name, size, size / add.seconds(size), SRAM)
        for name, size in sorted(_cpu()[1].items())
        if name != "L1"
    ]
    largest = add.axes[0][-1]
    levels.append(Level("DRAM", math.inf, largest / add.values[-1], DDR))
    threads = key["threads"]
    return Device(
        "this machine",
        "cpu",
        matrix,
        {"float32": vector},
        tuple(levels),
        found.host["op"],
        threads,
        0.0,
        f"measured here: {key['cpu']}, {threads} threads, torch {key['torch']}",
        found,
    )


measure_with(this_machine)
