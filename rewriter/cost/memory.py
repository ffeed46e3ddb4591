"""Memory and traffic: which storages are alive, and which bytes an op reads and writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from rewriter.cost.formulas import Traffic, placed, unread
from rewriter.cost.symbolic import Size, largest, least

__all__ = ["Memory", "storage_key", "tensors_in", "touched", "traffic_bytes"]


class Memory:
    """Which storages are alive: a value of the graph until its last user, a temporary inside a
    node as long as anything holds it.

    Args:
        weights: storages that do not count.
        number: turns a size as torch gives it into a number or a formula.
    """

    def __init__(self, weights: set[int], number: Callable[[Any], Size]) -> None:
        self.weights, self.number = weights, number
        self.live: Size = 0
        self.peaks: list[Size] = [0]  # candidates since the last `start`
        self.sizes: dict[int, Size] = {}
        self.serials: dict[int, int] = {}  # of live storages, in the order they came
        self.events: list[tuple[int, Size]] = []  # (serial, bytes that came or, negative, went)
        self.refs: dict[int, ReferenceType[torch.UntypedStorage]] = {}
        self.holders: Counter[int] = Counter()
        self.held: dict[Node, set[int]] = {}

    def allocate(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key is None or key in self.sizes or key in self.weights:
            return
        storage = tensor.untyped_storage()
        self.sizes[key] = self.number(storage.nbytes())
        self.serials[key] = len(self.events)
        self.events.append((self.serials[key], self.sizes[key]))
        self.live = self.live + self.sizes[key]
        if isinstance(self.live, int) and isinstance(self.peaks[0], int):
            self.peaks[0] = max(self.peaks[0], self.live)
        else:
            self.peaks.append(self.live)
        self.refs[key] = ref(storage, lambda _: self.release(key))

    @property
    def peak(self) -> Size:
        """The most that was alive since `start`."""
        return largest(self.peaks)

    def start(self) -> None:
        self.peaks = [self.live]

    def release(self, key: int) -> None:
        size = self.sizes.pop(key, 0)
        self.live = self.live - size
        if key in self.serials:
            self.events.append((self.serials.pop(key), -size))
        self.refs.pop(key, None)

    def pin(self, tensor: Tensor) -> None:
        """Counts an input: its caller holds it to the end."""
        self.allocate(tensor)
        if (key := storage_key(tensor)) is not None:
            self.holders[key] += 1

    def hold(self, node: Node, value: object) -> None:
        keys = {storage_key(t) for t in tensors_in(value)}
        self.held[node] = {k for k in keys if k is not None and k in self.sizes}
        self.holders.update(self.held[node])

    def let_go(self, node: Node) -> None:
        for key in self.held.pop(node):
            self.holders[key] -= 1
            if not self.holders[key]:
                self.release(key)


def traffic_bytes(
    func: OpOverload,
    kind: Traffic,
    read: list[Tensor],
    written: list[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    number: Callable[[Any], Size],
) -> tuple[Size, Size]:
    """(bytes read, bytes written) by one op; a tensor that appears twice moves once."""

    def total(tensors: Iterable[Tensor]) -> Size:
        return sum((touched(t, number) for t in tensors), 0)

    sources = {id(t): t for t in read}
    targets = {id(t): t for t in written}
    for tensor in unread(func, args):
        sources.pop(id(tensor), None)
    for i, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            targets |= {id(t): t for t in tensors_in(value)}
            if kind is Traffic.WRITE or kind is Traffic.SCATTER or argument.is_out:
                for t in tensors_in(value):
                    sources.pop(id(t), None)
    bytes_out = total(targets.values())
    if kind is Traffic.GATHER and read:
        table = sources.pop(id(read[0]))
        return total(sources.values()) + least(touched(table, number), bytes_out), bytes_out
    bytes_in = total(sources.values())
    if kind in (Traffic.SCATTER, Traffic.PLACE):
        elements, adds = placed(func, args, kwargs)
        size = next(iter(targets.values())).element_size() if targets else 0
        into: Size = number(elements) * size
        bytes_in = bytes_in + into if adds else bytes_in
        return bytes_in, into if kind is Traffic.SCATTER else bytes_out + into
    return bytes_in, bytes_out


def touched(tensor: Tensor, number: Callable[[Any], Size]) -> Size:
    """Bytes behind a tensor: a broadcast dimension (stride 0) holds one element."""
    if tensor.layout is not torch.strided:
        return number(tensor.numel()) * tensor.element_size()
    count: Size = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if not isinstance(stride, int) or stride or (isinstance(size, int) and not size):
            count = count * number(size)
    return count


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in a nest of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [t for item in value for t in tensors_in(item)]


def storage_key(tensor: Tensor) -> int | None:
    """The identity of a tensor's storage while that is alive; None where it has no single one."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
