"""An op of your own, in your own namespace and package: defined with PyTorch, known by one record.

Run it: `python examples/write_an_op.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rewriter.kernels import ops


@torch.library.custom_op("mine::low_rank", mutates_args=())
def low_rank(x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """y = mid upᵀ with mid = x downᵀ; x [rows, in], down [rank, in], up [out, rank]."""
    mid = x @ down.t()
    return mid @ up.t(), mid


@low_rank.register_fake
def _(x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], up.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@torch.library.custom_op("mine::low_rank_backward", mutates_args=())
def low_rank_backward(
    grad: Tensor, x: Tensor, mid: Tensor, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dmid = grad @ up
    return dmid @ down, dmid.t() @ x, grad.t() @ mid


@low_rank_backward.register_fake
def _(
    grad: Tensor, x: Tensor, mid: Tensor, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(down), torch.empty_like(up)


def _save(ctx, inputs, output):
    x, down, up = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], down, up)


low_rank.register_autograd(
    lambda ctx, grad, _: low_rank_backward(grad, *ctx.saved_tensors), setup_context=_save
)


def reference(x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    mid = x @ down.t()
    return mid @ up.t(), mid


# [record]
def parts(run: ops.Run) -> list[ops.Part]:
    rows, out, width, rank = run.sizes
    down = run.weight_bytes * width // (out + width)
    return [
        ops.product(run, 1, rows, rank, width, down),
        ops.product(run, 1, rows, out, rank, run.weight_bytes - down),
    ]


def mid_parts(x: Tensor, down: Tensor, **rest: Tensor) -> list[ops.Part]:
    return [ops.product(ops.Run(()), 1, x.shape[0], down.shape[0], x.shape[1])]


def emit_mid(build, x, down, **rest):
    return build(torch.ops.aten.mm.default, x, build(torch.ops.aten.t.default, down))


RECORD = ops.register(
    ops.Record(
        "mine::low_rank",
        kind="low_rank",
        reference=reference,
        size_names=("rows", "out", "in", "rank"),
        sizes=lambda x, down, up: (x.shape[0], up.shape[0], x.shape[1], down.shape[0]),
        flops=lambda x, down, up, **_: 2 * x[0] * down[0] * (x[1] + up[0]),
        parts=parts,
        samples=ops.Samples(
            axes=((16, 250), (256, 1024), (8, 64)),
            arguments=lambda rows, width, rank: (
                torch.rand(rows, width), torch.rand(rank, width), torch.rand(width, rank)
            ),
            place=lambda rows, out, width, rank: (rows, math.sqrt(out * width), rank),
        ),
        derives=(ops.Derived("mid", 1, ("x", "down"), mid_parts, emit_mid),),
        companions=(
            ops.Companion(
                "mine::low_rank_backward",
                sizes=lambda grad, x, mid, down, up: (*grad.shape, x.shape[1], down.shape[0]),
                flops=lambda grad, x, mid, down, up, **_: 4 * x[0] * down[0] * (x[1] + up[0]),
            ),
        ),
    )
)  # fmt: skip
# [/record]


class LowRank(nn.Module):
    """Calls the op, as a layer that a pass installs would."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.up = nn.Parameter(torch.randn(out_features, rank) / rank**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mine.low_rank(x, self.down, self.up)[0]
        return y


def main() -> None:
    import rewriter

    torch.manual_seed(0)
    model = nn.Sequential(LowRank(256, 512, 32), nn.GELU(), LowRank(512, 64, 32)).eval()
    x = torch.randn(128, 256)
    print(rewriter.explain(model, [], x, device="a100"))
    print(rewriter.export(model, [], x).needs)
    print(rewriter.export(model, [], x, standalone=True).needs)


if __name__ == "__main__":
    main()
