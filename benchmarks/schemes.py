"""MiniLM in every scheme of `Quantize`: bytes on disk, seconds of the rewrite, speed and quality.

    python benchmarks/schemes.py             # what this CPU has
    python benchmarks/schemes.py --isa avx2  # as on a CPU without AVX-512: schemes_avx2.md

With `--isa avx2` this package's kernels are compiled for x86-64-v3, and PyTorch, oneDNN and MKL are
told to use no more, on both sides of every ratio.
"""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NARROW = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""What the libraries under torch read as they are loaded."""
if "avx2" in sys.argv[1:] and os.environ.get("ATEN_CPU_CAPABILITY") != "avx2":
    with tempfile.TemporaryDirectory(prefix="rewriter-avx2-") as cache:
        environment = {**os.environ, **NARROW, "REWRITER_CACHE": cache}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)

import torch  # noqa: E402 (after the environment)
from _harness import arguments, command, load_script, parse, write_results  # noqa: E402
from _models import minilm  # noqa: E402
from torch import nn  # noqa: E402

from rewriter import rewrite  # noqa: E402
from rewriter.kernels import int8_cpu, native  # noqa: E402
from rewriter.passes import Quantize  # noqa: E402

rivals = load_script("benchmarks/rivals.py")
data = rivals.data
_GPTQ = {"group_size": 32, "method": "gptq"}
SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "int8-dynamic": {"scheme": "int8-dynamic"},
    "int8-dynamic, embeddings too": {"scheme": "int8-dynamic", "embeddings": True},
    "int8-static": {"scheme": "int8-static"},
    "int8-weight": {"scheme": "int8-weight"},
    "int4-weight, GPTQ, groups of 32": {"scheme": "int4-weight", **_GPTQ},
    "the same, embeddings too": {"scheme": "int4-weight", "embeddings": True, **_GPTQ},
    "int4-dynamic, GPTQ, groups of 32": {"scheme": "int4-dynamic", **_GPTQ},
    "bf16": {"scheme": "bf16"},
    "fp8-weight": {"scheme": "fp8-weight"},
}
PLAIN = "fp32"


def on_disk(model: Any) -> int:
    """Bytes of all files that `save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "saved")
        return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())


def timed_rewrite(
    model: nn.Module, batch: Any, recipe: Mapping[str, Any], calibration: list[Any]
) -> tuple[Any, float]:
    """The rewritten model, and the seconds that it took."""
    seen: dict[str, Any] = {}
    if recipe and (recipe["scheme"] == "int8-static" or "method" in recipe):
        seen["calibration"] = calibration
    start = time.perf_counter()
    found = rewrite(model, [Quantize(**recipe)] if recipe else [], batch, **seen)
    return found, time.perf_counter() - start


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--isa", choices=["avx2"], help="no wider instructions than these")
    parser.add_argument("--rounds", type=int, default=30)
    args = parse(parser)
    if args.isa:
        native._native = lambda: "-march=x86-64-v3"
    warnings.simplefilter("ignore")
    model, tokenizer = minilm(1 if args.quick else None).eval(), data.load_minilm()[1]
    texts = functools.partial(rivals.texts, tokenizer)
    calibration = rivals.calibration_batches(tokenizer)[: 2 if args.quick else None]
    held = [texts(8, 128, first) for first in range(80, 88 if args.quick else 112, 8)]
    names = list(SCHEMES)[: 2 if args.quick else None]
    sizes, rounds = (((2, 16),), 3) if args.quick else (rivals.SIZES, args.rounds)
    batch = texts(*sizes[0], 0)
    made: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        timed_rewrite(model, batch, SCHEMES["int8-dynamic"], calibration)  # measures the machine
        tries: dict[str, list[float]] = {name: [] for name in (PLAIN, *names)}
        for _ in range(3):  # in turns, as one slow minute of the machine is not one scheme's
            for name, own in tries.items():
                recipe = SCHEMES.get(name, {})
                made[name], taken = timed_rewrite(model, batch, recipe, calibration)
                own.append(taken)
                print(f"{name}: {taken:.1f} s", flush=True)
        seconds = {name: statistics.median(own) for name, own in tries.items()}
        calls = {rivals.EAGER: rivals.hidden(model)}
        calls.update((name, rivals.hidden(made[name])) for name in names)
        speeds = {size: rivals.turns(calls, texts(*size, 0), rounds) for size in sizes}
        whole = on_disk(made[PLAIN])
        for name in calls:
            kept = whole if name == rivals.EAGER else on_disk(made[name])
            row: dict[str, Any] = {"scheme": name, "MB on disk": round(kept / 1e6, 1)}
            row["% of fp32"] = round(100 * kept / whole, 1)
            row["s beyond capture"] = round(seconds.get(name, seconds[PLAIN]) - seconds[PLAIN], 1)
            for (count, length), times in speeds.items():
                row[f"× at {count} × {length}"] = rivals.speed(times, name)["speed"]
            row["cosine"] = round(rivals.cosine(calls[name], calls[rivals.EAGER], held), 4)
            if not args.quick:
                own = rivals._Embeds(calls[name])
                row["WordSim-353"] = round(data.wordsim(own, tokenizer), 4)
                row["SimLex-999"] = round(data.simlex(own, tokenizer), 4)
                row["Lee"] = round(data.lee(own, tokenizer), 4)
            rows.append(row)
    write_results(
        "schemes_avx2" if args.isa else "schemes",
        "MiniLM in every scheme of Quantize" + (", on a CPU held to AVX2" if args.isa else ""),
        {"Schemes": rows},
        command=command(),
        notes="all-MiniLM-L6-v2 with its real weights on news; this package's products by "
        f"{int8_cpu.isa() if int8_cpu.refusal() is None else 'torch'}. On disk: all that `save` "
        "writes. Seconds beyond capture: the median of three rewrites less that of rewrites "
        "without passes, calibration on 64 documents and 512 words included where the scheme "
        "has any. Speed: median over rounds of eager fp32's time by the scheme's in the same "
        "round. Cosine: the least over 32 held-out texts of mean embeddings with those of fp32.",
        out=args.out,
        by_isa=True,
    )


if __name__ == "__main__":
    main()
