"""MiniLM in int8 by `rewriter.export(format="onnx")`, beside fp32 and ONNX Runtime's own int8.

Needs the extra `clients`. All files run in one process, in turns.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, command, interleaved, machine, parse, timing_rows, write_results
from _models import Batch, minilm, tokens
from torch import Tensor

import rewriter
from rewriter.passes import Monarch, Quantize

SIZES = ((1, 16), (8, 128))
RECIPES: dict[str, Sequence[Any]] = {
    "fp32": (),
    "int8 per token": (Quantize("int8-dynamic"),),
    "int8 per tensor": (Quantize("int8-dynamic", activation="per_tensor"),),
    "Monarch and int8": (Monarch(nblocks=4), Quantize("int8-dynamic")),
}
OWN = "ONNX Runtime's own int8"


def files(folder: Path, layers: int | None) -> dict[str, Path]:
    """Name → ONNX file: the model by each recipe, and what ONNX Runtime makes of fp32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    found = {}
    for name, passes in RECIPES.items():
        path = folder / f"{name.replace(' ', '_')}.onnx"
        example = tokens(8, 128)
        rewriter.export(minilm(layers), passes, example, format="onnx", package=path)
        found[name] = path
    found[OWN] = folder / "own.onnx"
    quantize_dynamic(found["fp32"], found[OWN], weight_type=QuantType.QInt8)
    return found


def session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(ready: Any, batch: Batch) -> Tensor:
    names = {given.name for given in ready.get_inputs()}
    return torch.from_numpy(
        ready.run(None, {n: t.numpy() for n, t in batch.items() if n in names})[0]
    )


def sqnr(got: Tensor, want: Tensor) -> float:
    """dB of fp32 over what quantization adds."""
    return float(10 * torch.log10(want.square().sum() / (got - want).square().sum()))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=60)
    args = parse(parser)
    warnings.simplefilter("ignore")
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = files(Path(folder), 1 if args.quick else None)
        ready = {name: session(path, args.threads) for name, path in made.items()}
        for rows, length in SIZES:
            batch = tokens(rows, length, seed=1)
            calls = {n: functools.partial(run, s, batch) for n, s in ready.items()}
            times = interleaved(calls, 3 if args.quick else args.rounds)
            tables[f"{rows} × {length} tokens"] = timing_rows(times, "fp32")
        want = run(ready["fp32"], batch)
        tables["Files"] = [
            {
                "what": name,
                "MB": round(made[name].stat().st_size / 1e6, 1),
                "SQNR dB": "–" if name == "fp32" else round(sqnr(run(s, batch), want), 1),
            }
            for name, s in ready.items()
        ]
    write_results(
        "onnx_export",
        "MiniLM under ONNX Runtime",
        tables,
        command=command(),
        notes="all-MiniLM-L6-v2 with its real weights, each file made once and run at both sizes, "
        f"on a CPU with {', '.join(machine()['isa'])}. SQNR: of the last hidden states over what "
        "differs from fp32, on the larger batch. ONNX Runtime's own int8 is `quantize_dynamic` of "
        "the fp32 file with its defaults: ranges per tensor, weights per tensor.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
