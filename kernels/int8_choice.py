"""Which kernel runs an int8 product on the CPU: those that gave the right answers on this machine,
and the fastest of them for a shape, measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rewriter.kernels import int8_cpu, quantized_gpu
from rewriter.kernels import int8_product as product
from rewriter.kernels.choice import fastest, rows_bucket
from rewriter.kernels.settings import own_settings

__all__ = [
    "FAST",
    "PACKED",
    "available_kernels",
    "fastest_of",
    "has_kernels",
    "kernel_name",
    "pick_kernel",
    "refusal",
    "refused_kernels",
    "runs_kernels",
]

FAST = ("native", "onednn", "int_mm")
PACKED = ("native", "onednn")
"""Kernels that hold a copy of the weight in a layout of their own."""

_VERSION = "int8-4"
"""Of the kernels: choices that another version of them measured do not count."""


def available_kernels() -> tuple[str, ...]:
    """The CPU kernels that gave the right answers on this machine; "torch" is always one."""
    return (*(k for k in FAST if refusal(k) is None), "torch")


def refused_kernels() -> dict[str, str]:
    """Why the other kernels are not used on this machine: {name: reason}."""
    return {k: reason for k in FAST if (reason := refusal(k)) is not None}


def pick_kernel(
    tokens: int, in_features: int, out_features: int, activation: str = "per_token"
) -> str:
    """The fastest available CPU kernel for a shape.

    Measured the first time a shape is asked for, on made-up data of that shape, with `tokens`
    rounded up to a power of two (at most 2048); remembered per number of threads, for later
    processes too.
    """
    return fastest_of(
        "int8_linear", _VERSION, product.run, tokens, in_features, out_features, activation
    )


def fastest_of(
    op: str,
    version: str,
    run: Callable[..., object],
    tokens: int,
    in_features: int,
    out_features: int,
    *options: object,
) -> str:
    """The kernel by which `run` is the fastest, as `pick_kernel` says it.

    Args:
        op, version: of what is measured; choices of another version do not count.
        run: (kernel, x, qweight, scale, bias, *options).
    """
    kernels = available_kernels()  # "torch" too: without int8 instructions it is the fastest
    if len(kernels) < 2:
        return kernels[0]
    rows, threads = rows_bucket(tokens), torch.get_num_threads()
    sizes = f"{rows} {in_features} {out_features}"
    key = f"{op} {sizes} {' '.join(map(str, options))} {kernels} {threads}"

    def candidates() -> dict[str, Callable[[], object]]:
        x = torch.linspace(-1, 1, rows * in_features).view(rows, in_features)
        qweight = torch.ones(out_features, in_features, dtype=torch.int8)
        operands = x, qweight, torch.ones(out_features), None, *options
        return {name: functools.partial(run, name, *operands) for name in kernels}

    found = fastest(key, version, candidates)
    return found if found in kernels else "torch"  # of a file that others may write


def kernel_name(
    tokens: int,
    in_features: int,
    out_features: int,
    activation: str = "per_token",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> str:
    """The kernel that `int8_linear` runs for such a call, for the report."""
    sizes, on = (tokens, in_features, out_features), torch.device(device)
    if on.type not in ("cpu", "meta"):
        return quantized_gpu.kernel_name("int8", on, dtype, in_features)
    return pick_kernel(*sizes, activation) if runs_kernels(*sizes, device, dtype) else "torch"


def runs_kernels(
    tokens: int,
    in_features: int,
    out_features: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Whether a call of such sizes is one of the CPU's kernels, and not the plain formula."""
    plain = torch.device(device).type != "cpu" or dtype == torch.float64
    return not plain and bool(tokens and in_features and out_features)


@functools.cache
def refusal(kernel: str) -> str | None:
    """Runs the kernel on sums that saturate int16 arithmetic, against exact results."""
    if kernel == "native" and (reason := int8_cpu.refusal()) is not None:
        return f"not available: {reason}"
    with own_settings():
        for rows, k, n in ((1, 64, 16), (3, 67, 5), (9, 256, 33)):
            x = torch.full((rows, k), 255.0)
            x[:, ::7] = 0.0
            x[rows // 2, 1::2] = 100.0  # q = x, as the range is 255
            qweight = torch.full((n, k), 127, dtype=torch.int8)
            qweight[1::3], qweight[2::3, ::2] = -128, -1
            scale, bias = torch.linspace(0.5, 2.0, n), torch.linspace(-1.0, 1.0, n)
            for activation in product.ACTIVATIONS:
                want = product.int8_linear_reference(x, qweight, scale, bias, activation)
                try:
                    got = product.run(kernel, x, qweight, scale, bias, activation)
                except (RuntimeError, AttributeError) as error:  # not built in, or not this CPU
                    return f"not available: {str(error).splitlines()[0]}"
                # float32 rounding alone: half an integer step would already be 50 times more
                if not torch.allclose(got, want, rtol=1e-5, atol=0.5):
                    worst = (got - want).abs().max().item()
                    return f"wrong by {worst:.3g} at {rows}x{k}x{n} {activation}"
    return None


def has_kernels(x: Tensor) -> bool:
    """Whether the CPU's kernels take such activations."""
    return x.device.type == "cpu" and x.dtype == torch.float32
