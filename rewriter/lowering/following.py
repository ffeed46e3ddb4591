"""What `torch.compile` traces of a lowered model: fused ops whose tensors follow the weights.

What was packed is an input of the compiled code. The first thing that the code does is to call
`rewriter::following`, the one Python function in it, which compares the weights with those that
were packed and packs them anew, in place, where they differ: compiled code is never stale.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from rewriter.capture.hosted import Program
from rewriter.errors import RewriteError
from rewriter.modules.versions import Stamp

__all__ = ["Following", "Lowered", "follow"]


class Lowered(Protocol):
    """What is followed (`rewriter.lowering.lowered`)."""

    following: Any

    def bound_in_graphs(self, root: nn.Module, program: Program) -> Any:
        """The places as a compiler is to trace them, with the layers that they read."""


_LIB = torch.library.Library("rewriter", "FRAGMENT")
_LIB.define("following(Tensor[] inputs, str key) -> Tensor[]")
_ASKED = TorchVersion(torch.__version__) >= "2.13"
"""Whether Dynamo hands objects to a function whose result it takes for a constant."""


class Following:
    """A lowered program as Dynamo traces it.

    Args:
        lowered: whose fused ops run.
        root: the module that the program runs on.
        program: the plain one.
    """

    def __init__(self, lowered: Lowered, root: nn.Module, program: Program) -> None:
        self.key = f"{type(root).__name__} {next(_keys)}"
        self.lowered, self.root, self.program = lowered, root, program
        self._lock = threading.Lock()
        self.bound = self.lowered.bound_in_graphs(root, program)
        self.stamp = Stamp(self.bound.layers.tensors(), keep=True)
        self.traced = self.bound.in_graph()

    def __call__(self, root: nn.Module, leaves: Sequence[Any], device: str) -> Any:
        """The model's output, as Dynamo traces it."""
        assert self.traced is not None
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        fresh = iter(torch.ops.rewriter.following.default(tensors, self.key))
        given = [next(fresh) if isinstance(t, Tensor) else t for t in leaves]
        return self.traced(root, given, device)

    def follow(self) -> None:
        """Packs the weights anew where they have changed.

        Raises:
            RewriteError: layers were changed since the code was compiled.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            layers = self.bound.layers
            if layers.same() and self.stamp.holds(layers.tensors()):
                return
            bound = self.lowered.bound_in_graphs(self.root, self.program)
            stamp = Stamp(bound.layers.tensors(), keep=True)
            for packed, tensor in self._renewed(bound.in_graph()):
                packed.copy_(tensor)
            self.bound, self.stamp = bound, stamp

    def _renewed(self, after: Any) -> list[tuple[Tensor, Tensor]]:
        """The tensors that compiled code reads and is to write to, with what they are to hold."""
        assert self.traced is not None
        pairs: list[tuple[Tensor, Tensor]] = []
        forms = () if after is None else after.ready
        same = len(forms) == len(self.traced.ready)
        for old, new in zip(self.traced.ready, forms, strict=False):
            same &= [t.shape for t in old.tensors] == [t.shape for t in new.tensors]
            if old.borrowed:  # they are the layers' own, and have their numbers already
                same &= [t.data_ptr() for t in old.tensors] == [t.data_ptr() for t in new.tensors]
            else:
                pairs += zip(old.tensors, new.tensors, strict=False)
        if not same:
            raise RewriteError(
                f"{self.key}: its layers, or the tensors in them, are others than those that were "
                "compiled: call torch.compiler.reset() and compile it again"
            )
        return pairs


_keys = itertools.count()
_known: weakref.WeakValueDictionary[str, Following] = weakref.WeakValueDictionary()


def follow(lowered: Lowered, root: nn.Module, program: Program) -> Any:
    """What Dynamo traces in place of a program; None where it is to trace the program itself."""
    return lowered.following if _ASKED and _prepared(lowered, root, program) else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepared(lowered: Lowered, root: nn.Module, program: Program) -> bool:
    """Runs while Dynamo traces, on the objects themselves: it could not trace how weights are
    packed."""
    found = Following(lowered, root, program)
    if found.traced is None:
        return False
    found.traced.program.ready()
    _known[found.key] = lowered.following = found
    return True


def _following(inputs: Sequence[Tensor], key: str) -> list[Tensor]:
    """The inputs, behind which the compiled code runs: when what was packed is as the weights."""
    found = _known.get(key)
    if found is None:
        raise RewriteError(f"{key} is gone: compiled code was kept for longer than its model")
    found.follow()
    return [t.clone() for t in inputs]


_LIB.impl("following", _following, "CompositeExplicitAutograd")
torch.library.register_fake(
    "rewriter::following", lambda inputs, key: [torch.empty_like(t) for t in inputs], lib=_LIB
)
