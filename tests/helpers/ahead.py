"""Triton kernels compiled ahead of time for real targets, which needs no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["POINTERS", "TARGETS", "Target", "assembly", "compiled", "spills"]

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}


@dataclass(frozen=True)
class Target:
    """An architecture.

    Args:
        backend, arch, lanes: as of Triton's `GPUTarget`.
        instructions: what its assembler has of matrix instructions, as a regular expression.
        shared: bytes of shared memory that a program may take.
    """

    backend: str
    arch: Any
    lanes: int
    instructions: str
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, r"\bmma\.sync", 163 * 1024),
    "sm_90": Target("cuda", 90, 32, r"wgmma\.mma_async|\bmma\.sync", 227 * 1024),
    "sm_100": Target("cuda", 100, 32, r"tcgen05\.mma|\bmma\.sync", 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, r"v_mfma_", 64 * 1024),
}


def compiled(
    fn: Any,
    target: str,
    constants: Mapping[str, Any],
    types: Mapping[str, str],
    options: Mapping[str, Any],
) -> Any:
    """A kernel for a target; what is no constant and has no type is an int32 number. All arguments
    are multiples of 16.

    Args:
        constants: may hold more than the kernel has.
        types: Triton's names, by argument; may hold more.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = fn.arg_names
    constants = {n: v for n, v in constants.items() if n in names}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    even = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=even)
    own = TARGETS[target]
    made = GPUTarget(own.backend, own.arch, own.lanes)
    return triton.compile(source, target=made, options=dict(options))


def assembly(made: Any, target: str) -> str:
    """What the compiler wrote: PTX, or AMD's."""
    text: str = made.asm["amdgcn" if TARGETS[target].backend == "hip" else "ptx"]
    return text


def spills(made: Any, target: str) -> int:
    """Spilled registers (or bytes of stack), as the compiler's own tools report them."""
    if TARGETS[target].backend == "hip":
        found = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", made.asm["amdgcn"])
        assert found
        return sum(map(int, found))
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = re.findall(r"(?:STACK|LOCAL):(\d+)", told)
    assert found, told
    return sum(map(int, found))
