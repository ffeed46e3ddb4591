"""`Device`: seconds and joules of a cost, by a roofline; from a datasheet or measured here."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rewriter.cost.cost import Cost, Training
from rewriter.cost.machine.measured import Measured
from rewriter.cost.machine.roofline import gemm_efficiency, gemms, plain_works, vector_operations
from rewriter.cost.work import Work, on_matrix_unit
from rewriter.errors import OptionError

__all__ = ["Device", "Level", "add_datasheets", "measure_with"]

_WIDER = {
    "int8": "float16",
    "uint8": "float16",
    "float8_e4m3fn": "float16",
    "float8_e5m2": "float16",
    "bfloat16": "float32",
    "float16": "float32",
    "tf32": "float32",
    "float64": "float32",
}
"""What a device computes in where it has no units for a type (a conversion is not priced)."""

_PJ_PER_FLOP = {
    "int8": 0.04,
    "uint8": 0.04,
    "float8_e4m3fn": 0.08,
    "float8_e5m2": 0.08,
    "bfloat16": 0.16,
    "float16": 0.25,
    "tf32": 0.4,
    "float32": 0.85,
    "float64": 3.4,
}
_SUSTAINED = {"gpu": 0.8, "cpu": 0.85}  # of the peak, by the best large product
_STREAMED = {"gpu": 0.9, "cpu": 0.75}  # of a level's bandwidth, by the best long stream
_FUSED = {"attention": 0.6, "conv": 0.85}  # of what a product of the same size sustains


@dataclass(frozen=True)
class Level:
    """One level of memory.

    Args:
        name: "L2", "HBM3", ...
        capacity: bytes; of all cores together.
        bandwidth: bytes per second, read and write together, all cores.
        pj_per_byte: energy of moving one byte from or to it.
    """

    name: str
    capacity: float
    bandwidth: float
    pj_per_byte: float


@dataclass(frozen=True)
class Device:
    """time = launch + max(FLOPs / (peak · efficiency), bytes / bandwidth), summed over the ops.

    Weights come from the nearest level that holds all weights of the model, because between two
    reads of one every other is read; activations from the nearest that holds what the op touches,
    because they were just written. Times of a datasheet device are predictions of this model and
    nothing else: nobody measured them here. `this_machine()` measures its own.

    Args:
        name: as `get` knows it.
        kind: "gpu" or "cpu".
        matrix: dense peak FLOP/s (int8: OP/s) of the matrix units, by dtype.
        vector: the same of the vector units.
        levels: of memory, nearest first; the last one holds everything.
        launch_s: seconds from one op to the next that no size makes shorter.
        units: multiprocessors or cores that share one product.
        power_w: rated power of the whole device, W; 0 where it is not known.
        source: where the figures come from.
        measured: tables of a calibrated machine, which then replace the formula.
    """

    name: str
    kind: str
    matrix: Mapping[str, float]
    vector: Mapping[str, float]
    levels: tuple[Level, ...]
    launch_s: float
    units: int
    power_w: float
    source: str = ""
    measured: Measured | None = field(default=None, repr=False)

    # time

    def time(
        self, cost: Cost | Work, *, training: bool = False, resident: int | None = None
    ) -> float:
        """Seconds of one inference, or with `training` of one step with Adam's update.

        A `Cost` without `work` is priced as one op from its totals; a `Work` as all its runs.

        Args:
            cost: of a model, a layer or an op.
            training: price the training step.
            resident: bytes of all weights that are read between two uses of one, where `cost` is
                of a part of a model; by default its own.

        Raises:
            OptionError: `training`, and the cost has no figures of a training step.
        """
        works, own = _stream(cost, training)
        held = own if resident is None else resident
        return math.fsum(w.count * self._seconds(w, held) for w in works)

    def priced(self, cost: Cost, resident: int | None = None) -> Cost:
        """The cost with this device's seconds and joules, of the training step too if it has one.

        Args:
            cost: of a model or a part of one.
            resident: as in `time`.
        """
        step = cost.training
        if step is not None:
            latency = self.time(cost, training=True, resident=resident)
            step = replace(step, latency_s=latency)
        return replace(
            cost,
            latency_s=self.time(cost, resident=resident),
            energy_j=self.energy(cost, resident=resident),
            training=step,
        )

    def bound(self, work: Work) -> str:
        """The largest of the op's parts: "compute", "memory" or "launch"."""
        compute, memory = self._roofs(work, work.weight_bytes)
        launch = self.launch_s
        if self.measured is not None:
            launch = self.measured.launch(work)
        if launch >= max(compute, memory):
            return "launch"
        return "compute" if compute >= memory else "memory"

    def _seconds(self, work: Work, resident: int) -> float:
        if self.measured is not None:
            found = self.measured.seconds(work, resident)
            if found is not None:
                return found
        if work.kind == "view":
            return 0.0  # the queue of a GPU hides it
        return self.launch_s + max(self._roofs(work, resident))

    def _roofs(self, work: Work, resident: int) -> tuple[float, float]:
        """(seconds of the arithmetic, seconds of the memory traffic) of one run."""
        pieces = plain_works(work)
        compute = math.fsum(p.count * self._compute(p) for p in pieces)
        touched = work.bytes_read + work.bytes_written
        weights = min(work.weight_bytes, work.bytes_read)
        memory = weights / self.holding(max(resident, weights)).bandwidth
        memory += (touched - weights) / self.holding(touched - weights).bandwidth
        extra = sum(p.count * p.bytes_moved for p in pieces if not on_matrix_unit(p.kind))
        if len(pieces) > 1:
            memory += extra / self.holding(extra).bandwidth
        return compute, memory / _STREAMED[self.kind]

    def _compute(self, work: Work) -> float:
        if not on_matrix_unit(work.kind):
            operations = work.flops or vector_operations(work)
            return operations / self.peak(work.dtype, matrix=False)
        peak = self.peak(work.dtype) * _SUSTAINED[self.kind] * _FUSED.get(work.kind, 1.0)
        product = gemms(work)
        if product is not None:
            peak *= gemm_efficiency(*product, self.units)
        return work.flops / peak

    # what the device has

    def peak(self, dtype: str, *, matrix: bool = True) -> float:
        """Dense FLOP/s in `dtype`; where the device has no units for it, of the next wider type."""
        table = self.matrix if matrix else self.vector
        while dtype not in table and dtype in _WIDER:
            dtype = _WIDER[dtype]
        return table.get(dtype, table["float32"])

    def holding(self, nbytes: float) -> Level:
        """The nearest level of memory that holds `nbytes`."""
        return next((v for v in self.levels if nbytes <= v.capacity), self.levels[-1])

    def bandwidth(self, level: str) -> float:
        """Bytes per second of a level, by its name.

        Raises:
            OptionError: the device has no such level.
        """
        for one in self.levels:
            if one.name.lower() == level.lower():
                return one.bandwidth
        names = ", ".join(one.name for one in self.levels)
        raise OptionError(f"device {self.name} has no memory level {level!r}: it has {names}")

    def ridge(self, dtype: str) -> float:
        """FLOP per byte of main memory above which arithmetic binds: peak / bandwidth."""
        return self.peak(dtype) / self.levels[-1].bandwidth

    # energy

    def energy(
        self, cost: Cost | Work, *, training: bool = False, resident: int | None = None
    ) -> float:
        """Σ FLOPs · pJ per FLOP + Σ bytes · pJ per byte of the level that they come from, joules.

        The dynamic energy of arithmetic and memory alone: leakage, control and the rest of the
        computer come on top, so a socket draws several times as much. For comparisons.

        Args and Raises: as `time`.

        Source: per operation Horowitz, "Computing's Energy Problem", ISSCC 2014 (45 nm), as
        updated to 7 nm in Table 2 of Jouppi et al., "Ten Lessons From Three Generations Shaped
        Google's TPUv4i", ISCA 2021: half of a multiply and an add per FLOP (float64 by the square
        of its width, tf32 and 8-bit floats between their neighbours); SRAM and DRAM per 64 bits.
        """
        works, own = _stream(cost, training)
        held = own if resident is None else resident
        return math.fsum(w.count * self._joules(w, held) for w in works)

    def _joules(self, work: Work, resident: int) -> float:
        weights = min(work.weight_bytes, work.bytes_read)
        rest = work.bytes_read + work.bytes_written - weights
        operations = work.flops
        if not operations and not on_matrix_unit(work.kind):
            operations = vector_operations(work)
        picojoules = operations * _PJ_PER_FLOP.get(work.dtype, _PJ_PER_FLOP["float32"])
        picojoules += weights * self.holding(max(resident, weights)).pj_per_byte
        picojoules += rest * self.holding(rest).pj_per_byte
        return picojoules * 1e-12

    # by name

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """What `get` knows."""
        return (*_DATASHEETS, "this")

    @classmethod
    def get(cls, name: str | Device) -> Device:
        """A device by name, whatever its case, spaces, hyphens; "this" is `this_machine()`.

        Raises:
            OptionError: there is none of that name; the message has the nearest.
        """
        if isinstance(name, Device):
            return name
        if not isinstance(name, str):
            raise OptionError(f"a device is named by text, not by {name!r}: see Device.names()")
        known = {_plain(n): n for n in _DATASHEETS} | {_plain(a): n for a, n in _ALIASES.items()}
        plain = _plain(name)
        if plain in ("this", "thismachine", "here"):
            return cls.this_machine()
        if plain in known:
            return _DATASHEETS[known[plain]]
        near = difflib.get_close_matches(plain, [*known, "this"], n=3, cutoff=0.4)
        hint = " or ".join(dict.fromkeys(repr(known.get(n, n)) for n in near))
        raise OptionError(
            f"unknown device {name!r}: "
            + (f"did you mean {hint}? " if hint else "")
            + f"There are {', '.join(cls.names())}"
        )

    @classmethod
    def this_machine(cls, refresh: bool = False) -> Device:
        """This machine with torch's present number of threads, measured in at most 20 seconds.

        The measurement is kept on disk (`$REWRITER_CACHE`, else the user's cache folder), for
        this CPU model, number of cores and threads, version of torch, and version of the
        procedure; `refresh` measures anew.
        """
        return _MEASURE[0](refresh)


_DATASHEETS: dict[str, Device] = {}
_ALIASES: dict[str, str] = {}
_MEASURE: list[Callable[[bool], Device]] = []


def add_datasheets(devices: Mapping[str, Device], aliases: Mapping[str, str]) -> None:
    """Lets `Device.get` find these devices, and their further names."""
    _DATASHEETS.update(devices)
    _ALIASES.update(aliases)


def measure_with(this_machine: Callable[[bool], Device]) -> None:
    """Says who makes `Device.this_machine(refresh)`."""
    _MEASURE[:] = [this_machine]


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _stream(cost: Cost | Work, training: bool) -> tuple[Sequence[Work], int]:
    """What runs, and the bytes of the weights that it reads over and over."""
    if isinstance(cost, Work):
        return [cost], cost.weight_bytes
    if training:
        step = _step(cost)
        return [*step.work, _update(step)], step.weight_bytes + step.gradient_bytes
    works = cost.work if cost.work or not cost.bytes_moved else (_whole(cost),)
    read = sum(w.count * min(w.weight_bytes, w.bytes_read) for w in works)
    return works, min(read, cost.param_bytes)  # of an embedding only some rows are read


def _step(cost: Cost) -> Training:
    if cost.training is None:
        raise OptionError(
            "this cost has no training step: rewrite a model in train mode with example inputs"
        )
    return cost.training


def _whole(cost: Cost) -> Work:
    read = cost.bytes_moved - cost.bytes_written
    kind = "other" if not cost.flops else "attention"  # no sizes: a product of unknown shape
    weights = min(cost.param_bytes, read)
    return Work("total", kind, "float32", cost.flops, read, cost.bytes_written, weights)


def _update(step: Training) -> Work:
    """Adam's update: weights, gradients and both moments are read, all but gradients written."""
    state = step.optimizers.get("adam", 2 * step.gradient_bytes)
    written = step.gradient_bytes + state  # as many weights as gradients
    read = written + step.gradient_bytes
    elements = step.gradient_bytes // 4
    return Work("optimizer::adam", "pointwise", "float32", 0, read, written, shape=(elements,))
