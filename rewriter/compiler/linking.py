"""Kernels linked into the C++ that Inductor generates, which calls them without the dispatcher."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from rewriter.kernels import ops

__all__ = ["linked_in"]


def linked_in(names: Iterable[str]) -> tuple[set[str], dict[str, Any]]:
    """Which of these ops generated C++ may call by a function of its own, and the options by which
    Inductor does so.

    Args:
        names: qualified, of ops that a graph calls.
    """
    shims = {n: s for n in names if (r := ops.find(n)) is not None and (s := r.shim_of(n))}
    if not shims:
        return set(), {}
    declared = {ops.overload(name): [shim.declaration] for name, shim in shims.items()}
    archives = {shim.archive() for shim in shims.values()}
    # Inductor writes "-l" before each, and splits its command as a shell does
    libraries = [f":{a.name} -L{shlex.quote(str(a.parent))}" for a in sorted(archives)]
    return set(shims), {
        "aot_inductor.custom_ops_to_c_shims": declared,
        "aot_inductor.custom_op_libs": libraries,
    }
