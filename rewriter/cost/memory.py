"""Memory and traffic: which storages are alive, and which bytes an op reads and writes."""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from rewriter.cost.formulas import Traffic

__all__ = ["Memory", "storage_key", "tensors_in", "touched", "traffic_bytes"]


class Memory:
    """Which storages are alive: a value of the graph until its last user, a temporary inside a
    node as long as anything holds it."""

    def __init__(self, weights: set[int]) -> None:
        self.weights = weights
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.refs: dict[int, ReferenceType[torch.UntypedStorage]] = {}
        self.holders: Counter[int] = Counter()
        self.held: dict[Node, set[int]] = {}

    def allocate(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key is None or key in self.sizes or key in self.weights:
            return
        storage = tensor.untyped_storage()
        self.sizes[key] = storage.nbytes()
        self.live += self.sizes[key]
        self.peak = max(self.peak, self.live)
        self.refs[key] = ref(storage, lambda _: self.release(key))

    def release(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)
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
) -> int:
    """Bytes read plus bytes written by one op; a tensor that appears twice moves once."""
    sources = {id(t): t for t in read}
    targets = {id(t): t for t in written}
    for i, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            targets |= {id(t): t for t in tensors_in(value)}
            if kind is Traffic.WRITE or kind is Traffic.SCATTER or argument.is_out:
                for t in tensors_in(value):
                    sources.pop(id(t), None)
    bytes_out = sum(map(touched, targets.values()))
    if kind is Traffic.GATHER and read:
        table = sources.pop(id(read[0]))
        return sum(map(touched, sources.values())) + min(touched(table), bytes_out) + bytes_out
    bytes_in = sum(map(touched, sources.values()))
    return bytes_in + (min(bytes_in, bytes_out) if kind is Traffic.SCATTER else bytes_out)


def touched(tensor: Tensor) -> int:
    """Bytes behind a tensor: a broadcast dimension (stride 0) holds one element."""
    if tensor.layout is not torch.strided:
        return tensor.numel() * tensor.element_size()
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or not size:
            count *= size
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
