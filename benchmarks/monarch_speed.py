"""Monarch layers against dense ones: forward, forward and backward, and whole training steps.

Both sides run interleaved in one process; a figure is the median over rounds of the ratio of
their times. The arithmetic's gain, the ratio of multiply-adds, is what a Monarch layer could reach
if it ran at the dense layer's FLOP/s.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from _harness import arguments, command, interleaved, parse, quartiles, speedup, write_results
from _models import DRY, gpt2
from torch import Tensor, nn

from rewriter import rewrite
from rewriter.kernels import monarch_cpu
from rewriter.passes import Monarch, MonarchLinear

SIZES = ((768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 4096))
ROWS = (128, 512, 2048)
Timed = dict[str, Callable[[], object]]


def gain(layer: MonarchLinear) -> float:
    """Multiply-adds of the dense layer over those of this one."""
    dense = layer.in_features * layer.out_features
    return dense / (layer.right.numel() + layer.left.numel())


def forward(layer: MonarchLinear, dense: nn.Linear, x: Tensor) -> Timed:
    return {
        "dense": lambda: F.linear(x, dense.weight, dense.bias),
        "monarch": lambda: layer(x),
    }


def backward(layer: MonarchLinear, dense: nn.Linear, x: Tensor) -> Timed:
    x = x.requires_grad_()
    grad = torch.rand(len(x), layer.out_features)

    def step(module: nn.Module) -> Callable[[], object]:
        inputs = [x, *module.parameters()]
        return lambda: torch.autograd.grad(module(x), inputs, grad)

    return {"dense": step(dense), "monarch": step(layer)}


def layers(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per size, number of blocks, rows and direction."""
    cases = [(size, n, rows) for size in SIZES for n in (4, 8) for rows in ROWS]
    cases += [((4096, 4096), 32, rows) for rows in ROWS]
    for (width, out), n, rows in cases[:1] if quick else cases:
        torch.manual_seed(0)
        layer, dense = MonarchLinear(width, out, n), nn.Linear(width, out)
        x = torch.rand(rows, width)
        with torch.inference_mode():
            times = interleaved(forward(layer, dense, x), _rounds(dense, rows, 1))
        both = interleaved(backward(layer, dense, x), _rounds(dense, rows, 3))
        row: dict[str, Any] = {"layer": f"{width} → {out}", "N": n, "rows": rows}
        row["arithmetic ×"] = gain(layer)
        for name, found in (("forward", times), ("forward + backward", both)):
            ratio = speedup(found, "monarch", "dense")[1]
            row[f"{name} ×"], row[f"{name}, share"] = ratio, ratio / gain(layer)
        yield row


def _rounds(dense: nn.Linear, rows: int, passes: int) -> int:
    """So many that a case takes about a second."""
    each = passes * 2 * rows * dense.weight.numel() / 200e9
    return max(7, min(40, round(0.7 / each)))


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means, and the single layer with many blocks."""
    found = []
    small = [r for r in rows if r["N"] < 32]
    for name, wanted in (("forward", 0.85), ("forward + backward", 0.8)):
        for n in (4, 8):
            shares = [r[f"{name}, share"] for r in small if r["N"] == n]
            if shares:
                found.append(
                    {
                        "figure": f"{name}, N = {n}: share of the arithmetic's gain, geometric "
                        f"mean of {len(shares)}",
                        "found": math.exp(sum(map(math.log, shares)) / len(shares)),
                        "wanted": f"≥ {wanted}",
                    }
                )
        shares = [r[f"{name}, share"] for r in small]
        found.append(
            {
                "figure": f"{name}: share of the arithmetic's gain, geometric mean of "
                f"{len(shares)}",
                "found": math.exp(sum(map(math.log, shares)) / len(shares)),
                "wanted": f"≥ {wanted}",
            }
        )
    many = [r["forward ×"] for r in rows if r["N"] == 32]
    if many:
        found.append(
            {
                "figure": f"forward, 4096 → 4096, N = 32: times faster, geometric mean of "
                f"{len(many)}",
                "found": math.exp(sum(map(math.log, many)) / len(many)),
                "wanted": "≥ 10",
            }
        )
    return found


def gpt(quick: bool) -> nn.Module:
    depth, width, vocabulary = (1, 64, 512) if quick else (4, 768, 8192)
    return gpt2(width, depth, vocabulary, head=True, n_positions=256, **DRY)


def step_of(model: nn.Module, tokens: Tensor, bf16: bool = False) -> Callable[[], object]:
    """One training step: forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def has_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU; without it torch does, 50 times slower than
    float32, and a step takes minutes."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def training(quick: bool) -> list[dict[str, Any]]:
    """Whole steps: dense eager, dense compiled, Monarch, and under bf16 autocast where the CPU has
    the instructions."""
    low = has_bf16() or quick
    torch.manual_seed(0)
    model = gpt(quick)
    tokens = torch.randint(0, model.config.vocab_size, (4, 64 if quick else 256))
    steps: Timed = {"dense eager": step_of(copy.deepcopy(model).train(), tokens)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not quick:
            compiled = torch.compile(copy.deepcopy(model).train())
            steps["dense compiled"] = step_of(compiled, tokens)
            if low:
                steps["dense bf16"] = step_of(copy.deepcopy(model).train(), tokens, bf16=True)
        for n in (4,) if quick else (4, 8):
            made = rewrite(
                model,
                [Monarch(nblocks=n, where=lambda s: "lm_head" not in s.fqn)],
                {"input_ids": tokens},
            )
            steps[f"Monarch N = {n}"] = step_of(copy.deepcopy(made).train(), tokens)
            if low:
                steps[f"Monarch N = {n}, bf16"] = step_of(copy.deepcopy(made).train(), tokens, True)
            if not quick:
                both = torch.compile(copy.deepcopy(made).train())
                steps[f"Monarch N = {n}, compiled"] = step_of(both, tokens)
            if not quick and low:
                both = torch.compile(copy.deepcopy(made).train())
                steps[f"Monarch N = {n}, bf16, compiled"] = step_of(both, tokens, True)
    times = interleaved(steps, 2 if quick else 12, 1 if quick else 3)
    return [
        {
            "step": name,
            "median ms": quartiles(values)[1] * 1e3,
            **{
                f"× over {over}": speedup(times, name, over)[1]
                for over in ("dense eager", "dense compiled")
                if over in times
            },
        }
        for name, values in times.items()
    ]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", choices=("layers", "training"), help="one of the two parts")
    args = parse(parser)
    kernels = monarch_cpu.refusal() or "used where they measured faster"
    if args.only != "training":
        rows = list(layers(args.quick))
        write_results(
            "monarch_speed",
            "Monarch layers against dense layers",
            {"Figures": summary(rows), "Layers": rows},
            command=command(),
            notes="float32, both sides in eager; the share is the measured gain over the "
            f"arithmetic's. Compiled kernels: {kernels}.",
            out=args.out,
        )
    if args.only != "layers":
        bf16 = "is autocast" if has_bf16() else "is left out: this CPU has no instructions for it"
        write_results(
            "monarch_speed_training",
            "Training steps with Monarch layers",
            {"Training steps": training(args.quick)},
            command=command(),
            notes="A GPT-2-like model (4 layers of 768, 4 × 256 tokens, all linear layers but the "
            f"head), forward, loss, backward and AdamW. bf16 {bf16}. Compiled kernels: {kernels}.",
            out=args.out,
            by_isa=True,
        )


if __name__ == "__main__":
    main()
