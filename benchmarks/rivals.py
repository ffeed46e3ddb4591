"""MiniLM in few bits by this package and by what a user would take instead: one process, in turns.

Rivals that are not installed are left out, and named: `pip install openvino nncf torchao` beside
the extra `clients` brings them all. Thread pools that spin while they wait would disturb the next
one's turn: ONNX Runtime's is told not to, and every turn begins after a pause.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _harness import (
    arguments,
    command,
    load_script,
    machine,
    parse,
    quartiles,
    versions,
    write_results,
)
from _models import Batch, minilm
from torch import Tensor, nn

from rewriter import export, rewrite
from rewriter.kernels import int8_cpu
from rewriter.passes import Quantize

data = load_script("examples/_data.py")
SIZES = ((8, 128), (1, 16))
POINTS = tuple((rows, length) for rows in (1, 4, 8, 32) for length in (16, 64, 128))
"""Batches and lengths at which int8 is to be faster than fp32."""
OURS = ("this package, int8-dynamic", "this package, int8-static")
PAUSE = 0.004  # seconds; longer than any pool here spins
EAGER = "eager fp32"
Call = Callable[[Batch], Tensor]
Build = Callable[[nn.Module, Batch, list[Batch]], Call]


def hidden(model: Any) -> Call:
    return lambda batch: model(**batch).last_hidden_state


# this package ------------------------------------------------------------------------------------


def ours(model: nn.Module, batch: Batch, calibration: list[Batch], **recipe: Any) -> Call:
    given = {"calibration": calibration} if recipe["scheme"] == "int8-static" else {}
    return hidden(rewrite(model, [Quantize(**recipe)], batch, **given))


def ours_compiled(model: nn.Module, batch: Batch, calibration: list[Batch]) -> Call:
    passes = [Quantize("int8-dynamic")]
    return hidden(torch.compile(model, backend="rewriter", options={"passes": passes}))


def ours_exported(model: nn.Module, batch: Batch, calibration: list[Batch]) -> Call:
    """The package of `rewriter.export`: compiled for any batch and length, and loaded again."""
    sizes = {n: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for n in batch}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.pt2"
        export(model, [Quantize("int8-dynamic")], batch, package=path, dynamic_shapes=sizes)
        return hidden(torch._inductor.aoti_load_package(path))


# torch -------------------------------------------------------------------------------------------


def torch_ao(model: nn.Module, batch: Batch, calibration: list[Batch]) -> Call:
    quantize = torch.ao.quantization.quantize_dynamic
    return hidden(quantize(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8))


def torchao(model: nn.Module, batch: Batch, calibration: list[Batch]) -> Call:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    own = copy.deepcopy(model)
    quantize_(own, Int8DynamicActivationInt8WeightConfig())
    return hidden(torch.compile(own))


def pt2e(model: nn.Module, batch: Batch, calibration: list[Batch]) -> Call:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    dynamic = {n: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for n in batch}
    exported = torch.export.export(model, (), batch, dynamic_shapes=dynamic).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=True))
    prepared = prepare_pt2e(exported, quantizer)
    prepared(**batch)
    return hidden(torch.compile(convert_pt2e(prepared)))


def inductor(model: nn.Module, batch: Batch, calibration: list[Batch]) -> Call:
    return hidden(torch.compile(copy.deepcopy(model)))


# ONNX Runtime ------------------------------------------------------------------------------------


def onnx_runtime(model: nn.Module, batch: Batch, calibration: list[Batch]) -> Call:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    dynamic = {n: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for n in batch}
    with tempfile.TemporaryDirectory() as folder:
        plain, made = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(model, (), plain, kwargs=batch, dynamic_shapes=dynamic, dynamo=True)
        quantize_dynamic(plain, made, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(made, options, ["CPUExecutionProvider"])

    def call(given: Batch) -> Tensor:
        return torch.from_numpy(session.run(None, {n: t.numpy() for n, t in given.items()})[0])

    return call


# OpenVINO ----------------------------------------------------------------------------------------


def openvino(
    model: nn.Module, batch: Batch, calibration: list[Batch], how: str, precision: str = "f32"
) -> Call:
    import openvino as ov

    converted = ov.convert_model(model, example_input=batch)
    if how == "static":
        import nncf

        plain = [{n: t.numpy() for n, t in b.items()} for b in calibration]
        kind = nncf.ModelType.TRANSFORMER
        converted = nncf.quantize(converted, nncf.Dataset(plain), model_type=kind)
    elif how == "weights":
        import nncf

        converted = nncf.compress_weights(converted)
    config = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.compile_model(converted, "CPU", config)

    def call(given: Batch) -> Tensor:
        return torch.from_numpy(compiled({n: t.numpy() for n, t in given.items()})[0])

    return call


OPENVINO = ("openvino", "nncf")
RIVALS: Mapping[str, tuple[Build, tuple[str, ...]]] = {
    EAGER: (lambda model, *_: hidden(model), ()),
    "this package, int8-dynamic": (functools.partial(ours, scheme="int8-dynamic"), ()),
    "this package, int8-static": (functools.partial(ours, scheme="int8-static"), ()),
    "this package, int8-dynamic, compiled": (ours_compiled, ()),
    "this package, int8-dynamic, exported": (ours_exported, ()),
    "OpenVINO, static int8 (NNCF)": (
        functools.partial(openvino, how="static"),
        ("openvino", "nncf"),
    ),
    "OpenVINO, 8-bit weights": (functools.partial(openvino, how="weights"), ("openvino", "nncf")),
    "OpenVINO, bf16": (functools.partial(openvino, how="", precision="bf16"), ("openvino",)),
    "torch.ao, dynamic int8 (fbgemm)": (torch_ao, ()),
    "ONNX Runtime, dynamic int8": (onnx_runtime, ("onnxruntime", "onnxscript")),
    "PT2E, x86 Inductor quantizer, dynamic": (pt2e, ("torchao",)),
    "torchao int8 dynamic, compiled": (torchao, ("torchao",)),
    "torch.compile, fp32": (inductor, ()),
}
"""Name → what builds it, and the packages that it needs."""
QUICK = (EAGER, "this package, int8-dynamic", "torch.ao, dynamic int8 (fbgemm)")


# measuring ---------------------------------------------------------------------------------------


def texts(tokenizer: Any, rows: int, length: int, first: int) -> Batch:
    """Real news, cut to so many tokens."""
    found = data.news()[first : first + rows]
    return tokenized(tokenizer, found, max_length=length, truncation=True, padding="max_length")


def tokenized(tokenizer: Any, found: list[str], **more: Any) -> Batch:
    """Texts as the model takes them, by default padded to the longest."""
    given = tokenizer(found, **{"padding": True, **more}, return_tensors="pt")
    return {n: given[n] for n in ("input_ids", "attention_mask")}


def calibration_batches(tokenizer: Any) -> list[Batch]:
    """What static ranges are found on, by all who find some: 64 news documents cut to 128 tokens,
    and 512 words of other news by themselves, as short as the texts of word similarity."""
    documents = [texts(tokenizer, 8, 128, first) for first in range(8, 72, 8)]
    words = sorted({w for text in data.news()[112:] for w in re.findall("[a-z]+", text)})
    random.Random(0).shuffle(words)
    return documents + [tokenized(tokenizer, words[i : i + 64]) for i in range(0, 512, 64)]


def turns(calls: Mapping[str, Call], batch: Batch, rounds: int) -> dict[str, list[float]]:
    """Seconds of every call: each round calls everyone once, in an order that rotates."""
    names, times = list(calls), {name: [] for name in calls}  # type: dict[str, list[float]]
    for turn in range(-3, rounds):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            time.sleep(PAUSE)
            start = time.perf_counter()
            calls[name](batch)
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        yield
        logging.disable(before)


def built(model: nn.Module, batch: Batch, calibration: list[Batch], names: list[str]) -> Any:
    """The calls by name, and why others are missing."""
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name in names:
        build, needs = RIVALS[name]
        if absent := [n for n in needs if importlib.util.find_spec(n) is None]:
            missing[name] = f"{', '.join(absent)} not installed"
            continue
        start = time.perf_counter()
        try:
            calls[name] = build(model, batch, calibration)
            calls[name](batch)
        except Exception as error:  # a rival that fails is a row that says so
            calls.pop(name, None)
            said = str(error).strip().splitlines() or [""]
            missing[name] = f"{type(error).__name__}: {said[0][:120]}"
        print(f"{name}: {missing.get(name) or f'{time.perf_counter() - start:.1f} s'}", flush=True)
    return calls, missing


class _Embeds(nn.Module):
    """A call as the model that the quality measures embed with."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Any) -> Any:
        found = self.call({"input_ids": input_ids, "attention_mask": attention_mask})
        return (found,)


def cosine(call: Call, plain: Call, batches: list[Batch]) -> float:
    """The least cosine of mean embeddings with those of fp32."""
    least = 1.0
    for batch in batches:
        mask = batch["attention_mask"][..., None]
        a, b = ((f(batch) * mask).sum(1) / mask.sum(1) for f in (call, plain))
        least = min(least, float(torch.cosine_similarity(a, b).min()))
    return least


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", nargs="*", help="names that hold one of these, beside fp32")
    parser.add_argument("--no-quality", action="store_true", help="speeds alone")
    args = parse(parser)
    names = list(QUICK) if args.quick else list(RIVALS)
    if args.only:
        names = [n for n in names if n == EAGER or any(o in n for o in args.only)]
    model, tokenizer = minilm(1 if args.quick else None).eval(), data.load_minilm()[1]
    calibration = calibration_batches(tokenizer)
    held = [texts(tokenizer, 8, 128, first) for first in range(80, 112, 8)]
    tables: dict[str, Any] = {}
    with torch.inference_mode(False), torch.no_grad(), quietly():
        calls, missing = built(model, texts(tokenizer, 8, 128, 0), calibration, names)
        for rows, length in SIZES:
            batch = texts(tokenizer, rows, length, 0)
            times = turns(calls, batch, 3 if args.quick else args.rounds)
            tables[f"{rows} × {length} tokens"] = [
                {"what": name, "ms": round(1e3 * quartiles(own)[1], 2), **speed(times, name)}
                for name, own in times.items()
            ]
        tables["This package, over eager fp32"] = points(calls, tokenizer, args.quick)
        if not args.quick and not args.no_quality:
            tables["Quality"] = [
                quality(n, c, calls[EAGER], held, tokenizer) for n, c in calls.items()
            ]
    if missing:
        tables["Not run"] = [{"what": n, "why": why} for n, why in missing.items()]
    write_results(
        "rivals",
        "MiniLM in few bits, beside what one would take instead",
        tables,
        command=command(),
        notes="all-MiniLM-L6-v2 with its real weights on news, on a CPU with "
        f"{', '.join(machine()['isa'])}; this package's products by "
        f"{int8_cpu.isa() if int8_cpu.refusal() is None else 'torch'}. Speed: median over rounds "
        "of fp32's time by the other's in the same round, with quartiles. Cosine: the least over "
        "32 texts of mean embeddings with those of fp32. Each is built once, at the larger size, "
        "and run at both; static ranges are of news documents and of words by themselves, for all. "
        "OpenVINO is told to keep fp32 outside of what is quantized. "
        + ", ".join(f"{n} {v}" for n, v in versions(*VERSIONS).items())
        + ".",
        out=args.out,
        by_isa=True,
    )


def points(calls: Mapping[str, Call], tokenizer: Any, quick: bool) -> list[dict[str, Any]]:
    """Speeds of this package over fp32 by batch and length."""
    own = {name: calls[name] for name in (EAGER, *OURS) if name in calls}
    rows = []
    for batch, length in POINTS[:1] if quick else POINTS:
        times = turns(own, texts(tokenizer, batch, length, 0), 3 if quick else 30)
        row: dict[str, Any] = {"batch × tokens": f"{batch} × {length}"}
        row["fp32, ms"] = round(1e3 * quartiles(times[EAGER])[1], 2)
        row.update((name, speed(times, name)["speed"]) for name in own if name != EAGER)
        rows.append(row)
    return rows


VERSIONS = ("openvino", "nncf", "onnxruntime", "torchao")


def speed(times: Mapping[str, list[float]], name: str) -> dict[str, Any]:
    low, median, high = quartiles([a / b for a, b in zip(times[EAGER], times[name], strict=True)])
    return {"speed": round(median, 2), "quartiles": f"{low:.2f}–{high:.2f}"}


def quality(
    name: str, call: Call, plain: Call, held: list[Batch], tokenizer: Any
) -> dict[str, Any]:
    own = _Embeds(call)
    return {
        "what": name,
        "cosine": round(cosine(call, plain, held), 4),
        "WordSim-353": round(data.wordsim(own, tokenizer), 4),
        "SimLex-999": round(data.simlex(own, tokenizer), 4),
        "Lee": round(data.lee(own, tokenizer), 4),
    }


if __name__ == "__main__":
    main()
