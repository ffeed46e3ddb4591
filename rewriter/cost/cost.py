"""`Cost`: what one op, one layer, one graph or one model costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rewriter.base import Layer
from rewriter.errors import StoreError

__all__ = ["Cost", "storage_cost"]


@dataclass(frozen=True)
class Cost:
    """What a piece of a model costs; every figure is a plain number in the unit stated here.

    Args:
        params: number of weights: elements of all parameters, and of the buffers that our own
            layers save (a quantized weight is a buffer); a tied weight counts once.
        param_bytes: bytes of all parameters and buffers, in the dtype they are stored in; a tied
            weight counts once.
        macs: multiply-accumulates of matrix products, convolutions, attention, recurrent layers
            and our own ops.
        flops: 2 × macs, plus transforms (FFT). Pointwise ops, reductions, norms, softmax and data
            movement count 0, which is the convention of `torch.utils.flop_counter`.
        bytes_moved: bytes read and written by the ops that run (views run nothing).
        activation_bytes: peak of the activations (inputs included) that are alive together.
        peak_bytes: parameters + buffers + `activation_bytes`: the peak of an inference.
        launches: ops that run (a view runs nothing).
        train_peak_bytes, saved_bytes: peak and saved activations of a training step; None where
            not computed.
        latency_s, measured_s: predicted and measured seconds; None where not known.
        energy_j: joules; None where not known.

    `a + b` is the cost of a and b run one after the other: sums, except that of the peaks
    (`activation_bytes`, `peak_bytes`, `train_peak_bytes`) the larger stays. A None on one side
    leaves the other side's figure.
    """

    params: int = 0
    param_bytes: int = 0
    macs: int = 0
    flops: int = 0
    bytes_moved: int = 0
    activation_bytes: int = 0
    peak_bytes: int = 0
    launches: int = 0
    train_peak_bytes: int | None = None
    saved_bytes: int | None = None
    latency_s: float | None = None
    measured_s: float | None = None
    energy_j: float | None = None

    def __add__(self, other: Cost) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        merged: dict[str, Any] = {}
        for f in fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if a is None or b is None:
                merged[f.name] = b if a is None else a
            else:
                merged[f.name] = max(a, b) if f.name in _PEAKS else a + b
        return Cost(**merged)

    def to_dict(self) -> dict[str, int | float | None]:
        """Field name → figure, JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cost:
        """The inverse of `to_dict`.

        Raises:
            StoreError: `data` has a field that a Cost has not.
        """
        if unknown := set(data) - {f.name for f in fields(cls)}:
            raise StoreError(f"not a Cost: unknown fields {sorted(unknown)}")
        return cls(**data)


_PEAKS = frozenset({"activation_bytes", "peak_bytes", "train_peak_bytes"})


def storage_cost(*owners: nn.Module | Tensor) -> Cost:
    """`params` and `param_bytes` of some modules and parameters together, unique by storage.

    A tensor under two names, a view of another, or a module in two of the trees counts once.
    Works on any device, `meta` included; nothing is read but metadata.
    """
    weights: dict[tuple[object, ...], int] = {}
    storages: dict[object, int] = {}
    for tensor, is_weight in _tensors(owners):
        if is_weight:
            weights[_identity(tensor)] = tensor.numel()
        for key, nbytes in _storages(tensor):
            storages[key] = nbytes
    return Cost(params=sum(weights.values()), param_bytes=sum(storages.values()))


def _tensors(owners: Iterable[nn.Module | Tensor]) -> Iterable[tuple[Tensor, bool]]:
    """(tensor, whether it is a weight) of everything in and below `owners`, each module once."""
    seen: set[nn.Module] = set()
    for top in owners:
        if isinstance(top, Tensor):
            yield top, True
            continue
        for module in top.modules():
            if module in seen:
                continue
            seen.add(module)
            for param in module.parameters(recurse=False):
                yield param, True
            derived = module._non_persistent_buffers_set
            for name, buffer in module.named_buffers(recurse=False):
                yield buffer, isinstance(module, Layer) and name not in derived


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
