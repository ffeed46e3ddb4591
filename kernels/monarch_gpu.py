"""Which kernels run a Monarch layer on a GPU: Triton's of `monarch_triton.py`, or two of torch's
batched products, whichever is the faster there, measured once (`choice.py`).

On an H100 the fused kernels win at few sizes only, which no arithmetic foretells.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.choice import device_name, fastest, known, rows_bucket, triton_version

__all__ = ["pick_kernel"]

_MOST_ROWS = 8192
_LEAD = 0.03
"""Of torch's time that Triton must save; what is less may be noise."""

Paths = Mapping[str, Callable[..., object]]
"""Torch's own "forward" and "backward"; `monarch.py` has them."""


def pick_kernel(
    which: str,
    rows: int,
    in_features: int,
    out_features: int,
    right: Tensor,
    left: Tensor,
    kernels: Any,
    torch_paths: Paths,
) -> str:
    """ "triton" or "torch", whichever is the faster at this size on the factors' device.

    Measured the first time that a size is asked for, on made-up data, with `rows` rounded up to a
    power of two (at most 8192), never while a CUDA graph is captured: "torch" then, unless it is
    known. Remembered per name of device and for later processes.

    Args:
        which: "forward" or "backward".
        rows: of x, all leading dimensions together.
        in_features, out_features: of the layer.
        right, left: its factors.
        kernels: the module of Triton's.
        torch_paths: what else could run.
    """
    if not right.is_cuda or not rows:  # Triton's interpreter: nothing to measure
        return "triton" if rows else "torch"
    rows = rows_bucket(rows, _MOST_ROWS)
    tf32 = torch.backends.cuda.matmul.allow_tf32 and right.dtype == torch.float32
    sizes = which, rows, in_features, out_features, right.shape, left.shape, right.dtype, tf32
    key = _key(*sizes, right.device.index)
    if found := known(key, triton_version()):
        return found
    if torch.cuda.is_current_stream_capturing():
        return "torch"
    made = functools.partial(
        _candidates, which, rows, in_features, out_features, right, left, kernels, torch_paths
    )
    try:
        return fastest(key, triton_version(), made, _LEAD, right.device)
    except torch.OutOfMemoryError:  # no room to measure: asked again at the next call
        return "torch"


@functools.cache
def _key(
    which: str,
    rows: int,
    in_features: int,
    out_features: int,
    right: torch.Size,
    left: torch.Size,
    dtype: torch.dtype,
    tf32: bool,
    device: int,
) -> str:
    shapes = f"{tuple(right)} {tuple(left)} {dtype}{' tf32' if tf32 else ''}"
    return f"monarch {which} {rows} {in_features} {out_features} {shapes} {device_name(device)}"


def _candidates(
    which: str,
    rows: int,
    in_features: int,
    out_features: int,
    right: Tensor,
    left: Tensor,
    kernels: Any,
    torch_paths: Paths,
) -> dict[str, Callable[[], object]]:
    def values(*shape: int) -> Tensor:
        size = math.prod(shape)
        return torch.linspace(-1, 1, size, device=right.device).view(shape).to(right.dtype)

    x, r, f = values(rows, in_features), values(*right.shape), values(*left.shape)
    plain = torch_paths[which]
    if which == "forward":
        bias = values(out_features)
        return {
            "torch": lambda: plain(x, r, f, bias, out_features, False),
            "triton": lambda: kernels.monarch_forward(x, r, f, bias, out_features, False, False),
        }
    grad, mid = values(rows, out_features), values(right.shape[0], right.shape[1], rows)
    own = grad, x, mid, r, f, False, True, True, True
    return {
        "torch": lambda: plain(*own, False),
        "triton": lambda: kernels.monarch_backward(*own),
    }
