"""`Cost`: what one op, one layer, one graph or one model costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rewriter.base import Layer
from rewriter.cost.symbolic import Formula, evaluate, largest
from rewriter.cost.work import Work, grouped
from rewriter.errors import OptionError, StoreError
from rewriter.modules.typed import fits

__all__ = ["Cost", "Training", "storage_cost"]


@dataclass(frozen=True)
class Training:
    """What one training step costs: forward, backward, and the optimizer's update.

    Args:
        flops, macs, bytes_moved, launches: of forward and backward together.
        weight_bytes: parameters and buffers.
        gradient_bytes: of all parameters that get a gradient.
        trained: elements of these parameters (0 beside bytes: not known, of 0.2.0).
        saved_bytes: activations that the forward leaves to the backward.
        worst: what is alive, beside weights and optimizer state, at the worst moment of forward and
            backward: bytes of "saved" activations, "gradients" and "workspace" (inputs, results
            and temporaries).
        optimizers: bytes of state per optimizer ("sgd", "sgd-momentum", "adam", "adam-8bit").
        peaks: peak bytes of the whole step with each of them.
        work: the operations of forward and backward, equal ones together.
        latency_s: predicted seconds of a step with Adam; None where not known.
    """

    flops: int = 0
    macs: int = 0
    bytes_moved: int = 0
    launches: int = 0
    weight_bytes: int = 0
    gradient_bytes: int = 0
    saved_bytes: int = 0
    worst: Mapping[str, int] = field(default_factory=dict)
    optimizers: Mapping[str, int] = field(default_factory=dict)
    peaks: Mapping[str, int] = field(default_factory=dict)
    work: tuple[Work, ...] = field(default=(), repr=False)
    latency_s: float | None = None
    trained: int = 0

    def __add__(self, other: Training) -> Training:
        if not isinstance(other, Training):
            return NotImplemented
        return Training(
            **{
                n: getattr(self, n) + getattr(other, n)
                for n in ("flops", "macs", "bytes_moved", "launches", "weight_bytes")
                + ("gradient_bytes", "saved_bytes", "trained")
            },
            work=grouped(self.work + other.work),
            latency_s=_added(self.latency_s, other.latency_s),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], number: Callable[[Any], Any]) -> Training:
        _check_fields(cls, data)
        values = {k: v if k in _PLAIN else number(v) for k, v in data.items()}
        for name in ("worst", "optimizers", "peaks"):
            values[name] = {k: number(v) for k, v in data.get(name, {}).items()}
        values["work"] = tuple(Work.from_dict(w, number) for w in data.get("work", ()))
        return cls(**values)


@dataclass(frozen=True)
class Cost:
    """What a piece of a model costs; every figure is a plain number in the unit stated here.

    Args:
        params: number of weights: elements of all parameters, and of the buffers that a `Layer`
            saves (a quantized weight is a buffer, and may hold several an element: see
            `Layer.packed`); a tied weight counts once.
        param_bytes: bytes of all parameters and buffers, in the dtype they are stored in; a tied
            weight counts once.
        macs: multiply-accumulates of matrix products, convolutions, attention, recurrent layers
            and our own ops.
        flops: 2 × macs, plus transforms (FFT). Pointwise ops, reductions, norms, softmax and data
            movement count 0, which is the convention of `torch.utils.flop_counter`.
        bytes_moved: bytes read and written by the ops that run (views run nothing).
        bytes_written: the written part of them.
        activation_bytes: peak of the activations (inputs included) that are alive together.
        peak_bytes: parameters + buffers + `activation_bytes`: the peak of an inference.
        launches: ops that run (a view runs nothing).
        latency_s, measured_s: predicted and measured seconds; None where not known.
        energy_j: joules; None where not known.
        work: the operations that run, equal ones together; what a `Device` prices.
        training: the cost of a training step; None where it is not known.
        formulas: the same figures as formulas over the open sizes of the inputs; None without.

    All but the last four stand for one inference. `a + b` is the cost of a and b run one after the
    other: sums, except that of the peaks (`activation_bytes`, `peak_bytes`) the larger stays. A
    None on one side leaves the other side's figure.
    """

    params: int = 0
    param_bytes: int = 0
    macs: int = 0
    flops: int = 0
    bytes_moved: int = 0
    bytes_written: int = 0
    activation_bytes: int = 0
    peak_bytes: int = 0
    launches: int = 0
    latency_s: float | None = None
    measured_s: float | None = None
    energy_j: float | None = None
    work: tuple[Work, ...] = field(default=(), repr=False)
    training: Training | None = field(default=None, repr=False)
    formulas: Cost | None = field(default=None, repr=False, compare=False)

    @property
    def train_peak_bytes(self) -> int | None:
        """Peak of a training step with Adam; `training.peaks` has the other optimizers."""
        return None if self.training is None else self.training.peaks.get("adam")

    @property
    def saved_bytes(self) -> int | None:
        """Activations that the forward of a training step leaves to its backward."""
        return None if self.training is None else self.training.saved_bytes

    @property
    def intensity(self) -> float:
        """Arithmetic intensity flops / bytes_moved, in FLOP per byte; 0 where nothing moves."""
        return self.flops / self.bytes_moved if self.bytes_moved else 0.0

    def __add__(self, other: Cost) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        merged: dict[str, Any] = {}
        for f in fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if f.name == "work":
                merged[f.name] = grouped(a + b) if a and b else a or b
            elif a is None or b is None:
                merged[f.name] = b if a is None else a
            else:
                merged[f.name] = largest((a, b)) if f.name in _PEAKS else a + b
        return Cost(**merged)

    def at(self, sizes: Mapping[str, int]) -> Cost:
        """The cost at other sizes of the inputs; times and energy become None.

        Raises:
            OptionError: the cost has no formulas, or needs a size that is not given.
        """
        if self.formulas is None:
            raise OptionError("this cost has no formulas: it is known at the example's sizes only")
        found: Cost = _evaluated(self.formulas, sizes)
        return replace(found, formulas=self.formulas)

    def to_dict(self) -> dict[str, Any]:
        """Field name → figure, JSON-able; formulas as text."""
        plain: dict[str, Any] = _plain(self)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cost:
        """The inverse of `to_dict`.

        Raises:
            StoreError: `data` has a field that a Cost has not, text that is no formula, or else
                something that is no number.
        """
        try:
            return cls._read(data, _given)
        except (TypeError, AttributeError, ValueError) as error:
            raise StoreError(f"not a Cost: {error}") from error

    @classmethod
    def _read(cls, data: Mapping[str, Any], number: Callable[[Any], Any]) -> Cost:
        _check_fields(cls, data)
        values = {k: v if k in _PLAIN else number(v) for k, v in data.items()}
        values["work"] = tuple(Work.from_dict(w, number) for w in data.get("work", ()))
        if (own := data.get("training")) is not None:
            values["training"] = Training.from_dict(own, number)
        if (own := data.get("formulas")) is not None:
            values["formulas"] = cls._read(own, _parsed)
        return cls(**values)


_PEAKS = frozenset({"activation_bytes", "peak_bytes"})
_PLAIN = frozenset(
    {"work", "training", "formulas", "worst", "optimizers", "peaks"}
    | {"latency_s", "measured_s", "energy_j"}
)


def _added(a: float | None, b: float | None) -> float | None:
    return (b if a is None else a) if a is None or b is None else a + b


def _evaluated(value: Any, sizes: Mapping[str, int]) -> Any:
    """The dataclass with every formula in it at these sizes."""
    if isinstance(value, tuple):
        return tuple(_evaluated(v, sizes) for v in value)
    if isinstance(value, Mapping):
        return {k: _evaluated(v, sizes) for k, v in value.items()}
    if isinstance(value, (Cost, Training, Work)):
        own = {f.name: _evaluated(getattr(value, f.name), sizes) for f in fields(value)}
        return type(value)(**own)
    return evaluate(value, sizes)


def _plain(value: Any) -> Any:
    if isinstance(value, Work):  # there are many: what is at its default is left out
        own = {f.name: getattr(value, f.name) for f in fields(value)}
        return {f.name: _plain(own[f.name]) for f in fields(value) if own[f.name] != f.default}
    if isinstance(value, (Cost, Training)):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Formula) else value


def _given(value: Any) -> Any:
    if type(value) is not int:
        raise StoreError(f"not a Cost: a figure is {str(value)[:80]!r}")
    return value


def _parsed(value: Any) -> Any:
    return Formula.parse(value) if isinstance(value, str) else _given(value)


def _check_fields(cls: type, data: Any) -> None:
    if not isinstance(data, Mapping):
        raise StoreError(f"not a {cls.__name__}: {type(data).__name__}, not a table")
    if unknown := set(data) - {f.name for f in fields(cls)}:
        raise StoreError(f"not a {cls.__name__}: unknown fields {sorted(unknown)}")
    for name in ("latency_s", "measured_s", "energy_j"):
        if not fits(data.get(name), float | None):
            raise StoreError(f"not a {cls.__name__}: {name} is {str(data[name])[:80]!r}")


def storage_cost(*owners: nn.Module | Tensor) -> Cost:
    """`params` and `param_bytes` of some modules and parameters together, unique by storage.

    A tensor under two names, a view of another, or a module in two of the trees counts once.
    Works on any device, `meta` included; nothing is read but metadata.
    """
    weights: dict[tuple[object, ...], int] = {}
    storages: dict[object, int] = {}
    for tensor, each in _tensors(owners):
        if each:
            weights[_identity(tensor)] = each * tensor.numel()
        for key, nbytes in _storages(tensor):
            storages[key] = nbytes
    return Cost(params=sum(weights.values()), param_bytes=sum(storages.values()))


def _tensors(owners: Iterable[nn.Module | Tensor]) -> Iterable[tuple[Tensor, int]]:
    """(tensor, weights an element) of everything in and below `owners`, each module once."""
    seen: set[nn.Module] = set()
    for top in owners:
        if isinstance(top, Tensor):
            yield top, 1
            continue
        for module in top.modules():
            if module in seen:
                continue
            seen.add(module)
            for param in module.parameters(recurse=False):
                yield param, 1
            derived = module._non_persistent_buffers_set
            packed = module.packed if isinstance(module, Layer) else {}
            for name, buffer in module.named_buffers(recurse=False):
                saved = isinstance(module, Layer) and name not in derived
                yield buffer, packed.get(name, 1) if saved else 0


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that hold the same elements: same storage, same place, same size."""
    ((key, _), *rest) = _storages(tensor)
    if rest or tensor.layout is not torch.strided:
        return (key,)
    return (key, tensor.storage_offset(), tensor.numel())


def _storages(tensor: Tensor) -> list[tuple[object, int]]:
    """(identity, bytes) of each storage behind a tensor; several for subclasses and sparse."""
    if is_traceable_wrapper_subclass(tensor):
        inner: list[str] = tensor.__tensor_flatten__()[0]
        return [s for name in inner for s in _storages(getattr(tensor, name))]
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        return [(storage._cdata, storage.nbytes())]
    if tensor.layout is torch.sparse_coo:
        coo = tensor.detach()
        return [*_storages(coo._indices()), *_storages(coo._values())]
    return [(id(tensor), tensor.numel() * tensor.element_size())]
