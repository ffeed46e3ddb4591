"""One record per op: all that cost model, calibration, planner and packaging know of it.

The file that defines an op fills in one `Record` and hands it to `register`, last. Ours are found
in `rewriter.kernels`; another package registers its own the same way, in its own namespace.

Nothing here computes: records hold functions, which are called when somebody asks.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._decomp
import torch._meta_registrations  # enters what stands in torch's table of meta functions by then
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, register_flop_formula, shape_wrapper

__all__ = [
    "PLAIN",
    "Companion",
    "Derived",
    "Form",
    "Part",
    "Record",
    "RecordError",
    "Run",
    "Samples",
    "Shim",
    "element_size",
    "find",
    "forget",
    "forms",
    "load",
    "moved",
    "name_of",
    "of_kind",
    "overload",
    "product",
    "records",
    "register",
]

PLAIN = tuple(
    "matmul conv attention rnn fft norm softmax pointwise reduce copy gather pool sort fill "
    "view other".split()
)
"""Kinds of PyTorch's own operations: families of kernels of one behaviour."""

UNITS = ("matrix", "vector")

# The ONNX exporter reads decompositions from this attribute of torch's. Inductor reads the table
# behind it, and where the environment says CI it fails on an op that has an entry there. So ours
# lie behind torch's own, seen through the attribute alone.
_in_onnx: dict[Any, Callable[..., Any]] = {}
torch._decomp.decomposition_table = ChainMap(torch._decomp.decomposition_table, _in_onnx)  # type: ignore[assignment]


class RecordError(ValueError):
    """A record that contradicts its op, itself or another record."""


@dataclass(frozen=True)
class Run:
    """One run of an op, as `Record.parts` is given it.

    Args:
        sizes: what `Record.sizes` gave.
        dtype: of the numbers that are multiplied or moved, e.g. "float32".
        weight_bytes: bytes of the parameters and buffers that the op reads.
    """

    sizes: tuple[int, ...]
    dtype: str = "float32"
    weight_bytes: int = 0


@dataclass(frozen=True)
class Part:
    """`count` runs of a plain operation, or of another op with a record; see `product`, `moved`.

    Args:
        op: qualified name, e.g. "aten::bmm".
        kind: one of `PLAIN`, or the kind of another record.
        dtype: of its numbers.
        flops, bytes_read, bytes_written, weight_bytes: of one run.
        shape: the sizes that its speed depends on, as of `rewriter.cost.Work`.
        count: how often it runs.
    """

    op: str
    kind: str
    dtype: str
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    weight_bytes: int = 0
    shape: tuple[int, ...] = ()
    count: int = 1


def element_size(dtype: str) -> int:
    """Bytes of one operand's number in a product of this dtype; for int8, of float32 around it."""
    return 2 if dtype in ("bfloat16", "float16") else 8 if dtype == "float64" else 4


def product(run: Run, batch: int, m: int, n: int, k: int, weight_bytes: int = 0) -> Part:
    """`batch` products [m, k] @ [k, n] in one call, 2·batch·m·n·k FLOPs.

    Args:
        run: the op's run, whose dtype the product has.
        batch, m, n, k: sizes.
        weight_bytes: what it reads of the op's weights.
    """
    element = element_size(run.dtype)
    return Part(
        "aten::bmm" if batch > 1 else "aten::addmm",
        "matmul",
        run.dtype,
        2 * batch * m * n * k,
        batch * (m + n) * k * element,
        batch * m * n * element,
        weight_bytes,
        (batch, m, n, k),
    )


def moved(run: Run, kind: str, op: str, elements: int, each: int) -> Part:
    """One run over `elements` elements; `each`: bytes read and written per element, together."""
    half = elements * each // 2
    return Part(op, kind, run.dtype, 0, half, half, 0, (elements,))


@dataclass(frozen=True)
class Samples:
    """What a calibration runs of an op.

    Args:
        axes: grid of sizes; increasing.
        arguments: a point of the grid → arguments of the op, on the current default device. The
            first is a tensor that its caller has just written.
        place: the op's `sizes` → where it lies on the axes.
    """

    axes: tuple[tuple[int, ...], ...]
    arguments: Callable[..., tuple[Any, ...]]
    place: Callable[..., tuple[float, ...]]


@dataclass(frozen=True)
class Derived:
    """A result of an op that a backward can make again from the op's arguments, by a closed form.

    Args:
        name: of the closed form, as plans print it.
        output: which of the op's results.
        reads: names of the arguments that the closed form reads.
        parts: what it costs: the op's arguments by name, as (fake) tensors and numbers → parts.
        emit: makes the nodes: given `build(op, *args)`, which adds a call of a plain op to the
            graph and returns its node (`node.meta["val"]` is what it looks like), the nodes of
            `reads` and the op's plain arguments, by name. Returns the last node.
    """

    name: str
    output: int
    reads: tuple[str, ...]
    parts: Callable[..., Sequence[Part]]
    emit: Callable[..., Any]


@dataclass(frozen=True)
class Form:
    """A smaller form in which a tensor waits for its backward.

    Args:
        name: "bits" (above zero or not), "int8" or "int4".
        nbytes: number of elements → bytes.
        pack: given `build` (see `Derived`) and a node → the node of the smaller form.
        unpack: given `build`, that node, size and dtype → the node of the tensor.
        at_once: device type and dtype → whether one kernel packs in a single pass there.
    """

    name: str
    nbytes: Callable[[int], int]
    pack: Callable[[Any, Any], Any]
    unpack: Callable[[Any, Any, Any, torch.dtype], Any]
    at_once: Callable[[str, torch.dtype], bool] = lambda device, dtype: False


@dataclass(frozen=True)
class Shim:
    """How compiled code calls an op by its C function, in place of the dispatcher.

    Args:
        declaration: of `aoti_torch_cpu_NAME` in C, as Inductor calls it: the op's arguments, then
            where to put the result.
        archive: makes the archive of objects that holds it; raises with the reason where it cannot.
    """

    declaration: str
    archive: Callable[[], Path]


@dataclass(frozen=True)
class Companion:
    """Another op of the same family: the one that training calls, or the backward.

    Args:
        name: qualified.
        sizes: its arguments → the sizes of the family; None where it takes the op's arguments.
        flops: as of `Record`; None where it is that of the op.
        derives, shim: as of `Record`.
    """

    name: str
    sizes: Callable[..., tuple[Any, ...]] | None = None
    flops: Callable[..., Any] | None = None
    derives: tuple[Derived, ...] = ()
    shim: Shim | None = None


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0


def _torch_only() -> dict[str, str | None]:
    return {"torch": None}


@dataclass(frozen=True)
class Record:
    """What there is to know of one op.

    Args:
        name: qualified, e.g. "mine::gated_linear".
        kind: which family of kernels runs it, one of `PLAIN`; or a kind of its own, by which it is
            measured, priced and reported.
        reference: the same function in plain torch ops, of the same arguments; what an export
            without the op runs.
        size_names: what `sizes` gives, e.g. ("rows", "out", "in").
        sizes: the op's arguments → the sizes that its speed depends on.
        flops: as `torch.utils.flop_counter.register_flop_formula` takes it: the arguments, shapes
            in the place of tensors → FLOPs. None where one is registered already, and for what
            multiplies nothing.
        unit: "matrix" or "vector": which unit of a device runs its arithmetic.
        dtype: of the numbers that it multiplies; "" where it is that of the tensors.
        parts: the plain operations that it amounts to; their FLOPs add up to those of the op. A
            device that nobody measured prices these; a measured one scales their times by what
            whole calls took.
        gemm: in place of `parts`, where it is one product at any size: sizes → (batch, m, n, k).
        samples: what a calibration runs.
        kernels: the implementations → why one is refused on this machine; None where it runs.
        derives: what the backward can make again.
        forms: smaller forms that it makes of tensors, of which a memory plan may choose.
        companions: the other ops that belong to it, its backward most of all.
        onnx: the same function as `torch.onnx.export` is to write it, where that is not as the
            reference; may call `torch.onnx.ops.symbolic`.
        module: the module to import before a program that calls the op is loaded; "" where that
            is the one that defines the reference.
        shim: how compiled code calls it on a CPU without the dispatcher; None where it cannot.
    """

    name: str
    kind: str
    reference: Callable[..., Any]
    size_names: tuple[str, ...] = ()
    sizes: Callable[..., tuple[Any, ...]] | None = None
    flops: Callable[..., Any] | None = None
    unit: str = "matrix"
    dtype: str = ""
    parts: Callable[[Run], Sequence[Part]] | None = None
    gemm: Callable[..., tuple[int, int, int, int]] | None = None
    samples: Samples | None = None
    kernels: Callable[[], Mapping[str, str | None]] = _torch_only
    derives: tuple[Derived, ...] = ()
    forms: tuple[Form, ...] = ()
    companions: tuple[Companion, ...] = ()
    onnx: Callable[..., Any] | None = None
    module: str = ""
    shim: Shim | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The op's and its companions'."""
        return (self.name, *(c.name for c in self.companions))

    @property
    def own_kind(self) -> bool:
        """Whether it is priced by what this record says, and not as a plain operation."""
        return self.kind not in PLAIN

    @property
    def op(self) -> Any:
        """The op itself, as `torch.ops` has it."""
        return _packet(self.name)

    @property
    def needs(self) -> str:
        """The module to import, so that the op is defined."""
        return self.module or self.reference.__module__

    def sizes_of(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The sizes of a call of the op or of a companion; None where the record has none."""
        own = {c.name: c.sizes for c in self.companions}.get(name) or self.sizes
        return None if own is None else own(*args, **kwargs)

    def derived(self, name: str) -> tuple[Derived, ...]:
        """What the backward can make again of the results of the op or of a companion."""
        return {c.name: c.derives for c in self.companions}.get(name, self.derives)

    def shim_of(self, name: str) -> Shim | None:
        """How compiled code calls the op or a companion without the dispatcher."""
        return {c.name: c.shim for c in self.companions}.get(name, self.shim)


# the registry


_by_name: dict[str, Record] = {}
_by_kind: dict[str, Record] = {}
_KIND = re.compile(r"[a-z][a-z0-9_]*")
_NAME = re.compile(r"\w+::\w+")


def register(record: Record) -> Record:
    """Enters a record, and its FLOP formulas with `torch.utils.flop_counter`.

    Args:
        record: of an op that is defined, with its fake kernel.

    Returns:
        The record.

    Raises:
        RecordError: the record contradicts its op, itself or another record. Nothing is entered.
    """
    _check_types(record)
    for name in record.names:
        _check_name(record, name)
    _check_kind(record)
    _check_derived(record)
    _check_signatures(record)
    formulas = {name: f for name in record.names if (f := _formula(record, name)) is not None}
    _check_samples(record, formulas.get(record.name))
    for name, formula in formulas.items():
        register_flop_formula(_packet(name))(formula)
    _by_name.update(dict.fromkeys(record.names, record))
    if record.own_kind:
        _by_kind[record.kind] = record
    _write_out_for_onnx(record)
    return record


def _write_out_for_onnx(record: Record) -> None:
    """Enters what `torch.onnx.export` writes in the op's place.

    FakeTensorMode reads the same table, of ops that have no meta function, and would then run what
    stands there in the place of the fake kernel. So the op gets one, which nothing runs.
    """
    written = record.onnx or record.reference
    _in_onnx[record.op.default] = written
    torch._decomp.meta_table.setdefault(record.op.default, written)


def forget(name: str) -> None:
    """Takes out the record of an op with its FLOP formulas: for a module that is loaded again."""
    record = _by_name[name]
    for own in record.names:
        del _by_name[own]
        flop_registry.pop(_packet(own), None)
    for table in (_in_onnx, torch._decomp.meta_table):
        table.pop(record.op.default, None)
    if record.own_kind:
        del _by_kind[record.kind]


def find(name: str) -> Record | None:
    """The record of `namespace::name`, or of the op that this is a companion of."""
    return _by_name.get(name)


def overload(name: str) -> Any:
    """The op `namespace::name`, as a node of a graph calls it."""
    return _packet(name).default


def name_of(target: object) -> str:
    """`namespace::name` of what a node of a graph calls; "" where that is no op."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    return target._qualified_op_name if isinstance(target, torch._ops.OpOverloadPacket) else ""


def of_kind(name: str) -> Record | None:
    """The record whose own kind this is; None for a plain kind, and for one that nobody knows."""
    if name in PLAIN:
        return None
    if name not in _by_kind:
        load()  # of a report that another process has written
    return _by_kind.get(name)


def records() -> Iterator[Record]:
    """All records, each once, in the order of their names."""
    unique = {id(r): r for r in _by_name.values()}
    return iter(sorted(unique.values(), key=lambda r: r.name))


def forms() -> dict[str, Form]:
    """All smaller forms of tensors, by name."""
    load()
    return {form.name: form for record in records() for form in record.forms}


@functools.cache
def load() -> None:
    """Imports the ops of this package; Triton's kernels are imported by the ops that run them."""
    package = importlib.import_module("rewriter.kernels")
    for found in pkgutil.iter_modules(package.__path__):
        if not found.name.endswith("_triton"):
            importlib.import_module(f"{package.__name__}.{found.name}")


# checks


def _packet(name: str) -> Any:
    namespace, _, op = name.partition("::")
    return getattr(getattr(torch.ops, namespace), op)


_TUPLES: Mapping[str, type] = {
    "size_names": str,
    "derives": Derived,
    "forms": Form,
    "companions": Companion,
}
_FUNCTIONS = ("sizes", "flops", "parts", "gemm", "onnx")


def _check_types(record: Record) -> None:
    """What the fields of a record, and of its companions, must be by themselves."""
    said = f"the record of {record.name}"
    for key in ("name", "kind", "unit", "dtype", "module"):
        _is_a(said, key, getattr(record, key), str)
    for key, entry in _TUPLES.items():
        _is_tuple(said, key, getattr(record, key), entry)
    if not callable(record.reference):
        raise RecordError(
            f"{said} has no reference: give the same function in plain torch ops, not "
            f"{record.reference!r}"
        )
    for key in _FUNCTIONS:
        _is_function(said, key, getattr(record, key))
    for companion in record.companions:
        theirs = f"{said}, companion {companion.name}"
        _is_a(theirs, "name", companion.name, str)
        _is_tuple(theirs, "derives", companion.derives, Derived)
        _is_function(theirs, "sizes", companion.sizes)
        _is_function(theirs, "flops", companion.flops)
        _is_shim(theirs, companion.shim)
    _is_shim(said, record.shim)
    if not callable(record.kernels):
        raise RecordError(f"{said}: kernels={record.kernels!r} is no function")
    if record.samples is not None:
        _is_a(said, "samples", record.samples, Samples)
    if len(set(record.size_names)) < len(record.size_names):
        raise RecordError(f"{said}: size_names={record.size_names} has a name twice")
    if record.dtype and not isinstance(getattr(torch, record.dtype, None), torch.dtype):
        raise RecordError(f"{said}: dtype={record.dtype!r} is no name of a torch.dtype")


def _is_a(said: str, key: str, value: object, wanted: type) -> None:
    if not isinstance(value, wanted):
        raise RecordError(f"{said}: {key}={value!r} is no {wanted.__name__}")


def _is_shim(said: str, value: object) -> None:
    if value is not None:
        _is_a(said, "shim", value, Shim)


def _is_function(said: str, key: str, value: object) -> None:
    if value is not None and not callable(value):
        raise RecordError(f"{said}: {key}={value!r} is no function")


def _is_tuple(said: str, key: str, value: object, entry: type) -> None:
    if not isinstance(value, tuple) or not all(isinstance(v, entry) for v in value):
        raise RecordError(f"{said}: {key}={value!r} is no tuple of {entry.__name__}")


def _check_signatures(record: Record) -> None:
    """Reference, sizes and FLOP formulas take the arguments of the ops that they are of."""
    _takes(record, record.name, "reference", record.reference)
    _takes(record, record.name, "onnx", record.onnx)
    _takes(record, record.name, "sizes", record.sizes)
    _takes(record, record.name, "flops", record.flops, out_shape=None)
    for c in record.companions:
        _takes(record, c.name, "sizes", c.sizes or record.sizes)
        _takes(record, c.name, "flops", c.flops or record.flops, out_shape=None)


def _takes(record: Record, name: str, what: str, given: Any, **more: object) -> None:
    schema = _packet(name).default._schema
    try:
        signature = inspect.signature(given)
    except (TypeError, ValueError):  # None, or a builtin, which does not tell its parameters
        return
    by_place = [a.name for a in schema.arguments if not a.kwarg_only]
    by_name = {a.name: None for a in schema.arguments if a.kwarg_only}
    try:
        signature.bind(*by_place, **by_name, **more)
    except TypeError as error:
        extra = "".join(f", and {key}" for key in more)
        raise RecordError(
            f"the record of {record.name}: its {what}{signature} does not take the arguments of "
            f"{schema}{extra}: {error}"
        ) from None


def _check_name(record: Record, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise RecordError(f"{name!r} names no op: write 'namespace::name'")
    other = _by_name.get(name)
    if other is not None:
        raise RecordError(
            f"two records of {name}: one of {record.name} in {record.needs} (kind "
            f"{record.kind!r}), and one of {other.name} in {other.needs} (kind {other.kind!r})"
        )
    if record.names.count(name) > 1:
        raise RecordError(f"the record of {record.name} names {name} twice")
    try:
        _packet(name).default  # noqa: B018
    except AttributeError:
        raise RecordError(
            f"the record of {record.name}: there is no op {name}: define it with torch.library "
            "before its record"
        ) from None


def _check_kind(record: Record) -> None:
    said = f"the record of {record.name}"
    if record.unit not in UNITS:
        raise RecordError(f"{said}: unit={record.unit!r} is none of {', '.join(UNITS)}")
    if not record.own_kind:
        if record.parts is not None or record.gemm is not None or record.samples is not None:
            raise RecordError(
                f"{said}: what is priced as {record.kind!r} has no parts, gemm or samples of its "
                "own: leave them out, or give it a kind of its own"
            )
        return
    if not _KIND.fullmatch(record.kind):
        raise RecordError(f"{said}: kind={record.kind!r} is no lower-case name")
    if record.kind in _by_kind:
        other = _by_kind[record.kind]
        raise RecordError(
            f"two records of kind {record.kind!r}: {record.name} in {record.needs}, and "
            f"{other.name} in {other.needs}"
        )
    if record.sizes is None or record.samples is None:
        lost = "sizes" if record.sizes is None else "samples"
        raise RecordError(f"{said}: a kind of its own needs {lost}")
    if (record.parts is None) == (record.gemm is None):
        raise RecordError(f"{said}: it needs either parts or gemm: what it amounts to")


def _check_derived(record: Record) -> None:
    for name in record.names:
        schema = _packet(name).default._schema
        arguments = {a.name for a in schema.arguments}
        for derived in record.derived(name):
            lost = [r for r in derived.reads if r not in arguments]
            if lost or not 0 <= derived.output < len(schema.returns):
                wrong = f"{lost[0]!r}" if lost else f"result {derived.output}"
                raise RecordError(
                    f"the record of {record.name}: the closed form {derived.name!r} is of {wrong}, "
                    f"which {schema} has not"
                )


def _formula(record: Record, name: str) -> Callable[..., Any] | None:
    """The FLOP formula to register; None where one is registered already."""
    companion = next((c for c in record.companions if c.name == name), None)
    given = record.flops if companion is None else companion.flops or record.flops
    known = _packet(name) in flop_registry
    if known and given is not None:
        raise RecordError(
            f"two FLOP formulas for {name}: the record's, and one registered with "
            "torch.utils.flop_counter before: leave one out"
        )
    if given is None and not known:
        if record.unit == "matrix":
            raise RecordError(f"the record of {record.name} has no FLOP formula for {name}")
        return _no_flops
    return given


def _check_samples(record: Record, formula: Callable[..., Any] | None) -> None:
    """Runs the op's fake kernel at the smallest point of the grid, and holds all that the record
    says of it against each other."""
    samples, said = record.samples, f"the record of {record.name}"
    if samples is None:
        return
    assert record.sizes is not None
    # whoever imports the op's file may be in the middle of a trace
    with _disable_current_modes(), torch.device("meta"), torch.no_grad():
        # a device as a context misses the functions that some other library had replaced when torch
        # first listed them, as transformers does with linspace while it loads a model
        args = tree_map_only(
            Tensor, lambda t: t.to("meta"), samples.arguments(*(axis[0] for axis in samples.axes))
        )
        if not args or not isinstance(args[0], Tensor):
            raise RecordError(f"{said}: its samples must be a tuple that begins with a tensor")
        try:
            out = record.op(*args)
        except (RuntimeError, TypeError, ValueError) as error:
            text = str(error).strip().splitlines()[0]
            schema = record.op.default._schema
            raise RecordError(f"{said}: its samples do not fit {schema}: {text}") from error
    sizes = tuple(record.sizes(*args))
    if len(sizes) != len(record.size_names):
        raise RecordError(f"{said}: {len(sizes)} sizes, and size_names={record.size_names}")
    if len(samples.place(*sizes)) != len(samples.axes):
        raise RecordError(f"{said}: place gives no point on {len(samples.axes)} axes")
    raw = flop_registry[record.op] if formula is None else shape_wrapper(formula)
    _check_flops(record, sizes, raw(*args, out_val=out))


def _check_flops(record: Record, sizes: tuple[int, ...], flops: int) -> None:
    if record.gemm is not None:
        b, m, n, k = record.gemm(*sizes)
        total = 2 * b * m * n * k
    else:
        assert record.parts is not None
        total = sum(p.count * p.flops for p in record.parts(Run(sizes)))
    if total != flops:
        given = ", ".join(f"{n}={s}" for n, s in zip(record.size_names, sizes, strict=True))
        raise RecordError(
            f"the record of {record.name}: its parts have {total} FLOPs at {given}, its formula "
            f"says {flops}"
        )
