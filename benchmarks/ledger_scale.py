"""The ledger of models that fit nowhere: from a transformers config, on `meta`, without weights.

Each model is built from its config at full size and explained with
`[Monarch(nblocks=4), Quantize("int8-dynamic")]`, in a process of its own: seconds and memory are
those of the whole process, from the import of torch to the finished report.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, command, parse, write_results
from torch import nn

TOKENS = 2048


def llama_70b(layers: int) -> nn.Module:
    """Llama 3 70B: grouped-query attention, gated MLP; 80 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=layers, hidden_size=8192, intermediate_size=28672,
            num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
            max_position_embeddings=8192, rope_theta=500000.0,
        )
    )  # fmt: skip


def deepseek_v2_236b(layers: int) -> nn.Module:
    """DeepSeek-V2: latent attention, 160 routed experts of which a token takes 6; 60 layers."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            num_hidden_layers=layers, hidden_size=5120, intermediate_size=12288,
            moe_intermediate_size=1536, n_routed_experts=160, n_shared_experts=2,
            num_experts_per_tok=6, first_k_dense_replace=1, topk_method="group_limited_greedy",
            n_group=8, topk_group=3, routed_scaling_factor=16.0, num_attention_heads=128,
            num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
            qk_rope_head_dim=64, v_head_dim=128, vocab_size=102400,
        )
    )  # fmt: skip


MODELS = {
    "Llama 70B": (llama_70b, 80),
    "DeepSeek-V2 236B (MoE)": (deepseek_v2_236b, 60),
}
"""Name → (builder, number of layers)."""
QUICK_LAYERS = 3


def macs_by_hand(model: nn.Module) -> int:
    """Σ tokens·in·out over the linear layers, routers and the experts that a token takes, plus
    heads·tokens²·(query width + value width) for the attention of each layer: from the modules and
    the config, without any tracing."""
    config: Any = model.config
    linear = [m for m in model.modules() if type(m) is nn.Linear]
    per_token = sum(m.in_features * m.out_features for m in linear)
    for module in model.modules():
        if type(module).__name__ == "DeepseekV2TopkRouter":
            per_token += module.weight.numel()
        elif type(module).__name__ == "DeepseekV2Experts":
            experts = sum(p[0].numel() for p in module.parameters(recurse=False))
            per_token += config.num_experts_per_tok * experts
    if config.model_type == "llama":
        widths = 2 * config.head_dim
    else:
        widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * TOKENS**2 * widths
    return int(TOKENS * per_token + attention)


def explained(name: str, layers: int) -> dict[str, Any]:
    """One row; to be run in a process of its own."""
    from rewriter import explain
    from rewriter.passes import Monarch, Quantize

    build, _ = MODELS[name]
    with torch.device("meta"):
        model = build(layers).to(torch.bfloat16).eval()
    by_hand = macs_by_hand(model)
    tokens = torch.zeros((1, TOKENS), dtype=torch.long, device="meta")
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = explain(
            model,
            [Monarch(nblocks=4), Quantize("int8-dynamic")],
            {"input_ids": tokens, "use_cache": False},
        )
    seconds = time.perf_counter() - start
    first, monarch, last = (step.after for step in report.steps[:3])
    reasons: dict[str, int] = {}
    skipped = [d for d in report.steps[2].decisions if not d.changed]
    for d in [*skipped, *report.untaken]:
        reasons[d.reason] = reasons.get(d.reason, 0) + 1
    return {
        "sizes": {
            "model": name,
            "layers": layers,
            "params": first.params,
            "captured": "whole" if report.capture.rung == "export" else "by parts",
            "rewritten": sum(d.changed for d in report.steps[2].decisions),
            "skipped": len(skipped),
            "taken by no pass": len(report.untaken),
            "errors": len(report.errors),
            "MACs": first.macs,
            "MACs by hand": by_hand,
        },
        "steps": [
            {
                "model": name,
                "step": step.name,
                "params": cost.params,
                "parameter GB": round(cost.param_bytes / 1e9, 3),
                "MACs": cost.macs,
                "inference peak GB": round(cost.peak_bytes / 1e9, 3),
            }
            for step, cost in zip(report.steps, (first, monarch, last), strict=True)
        ],
        "reasons": [
            {"model": name, "left as they are": n, "reason": r} for r, n in reasons.items()
        ],
        "time": {
            "model": name,
            "layers": layers,
            "ledger seconds": round(seconds, 1),
            "of that, capture": round(report.capture.seconds, 1),
        },
    }


def run(name: str, layers: int) -> dict[str, Any]:
    """One row, with the time and the memory of its process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--child", name, str(layers)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row["time"] |= {
        "process seconds": round(seconds, 1),
        "CPU seconds": round(cpu, 1),
        "peak RSS GB": round(row.pop("rss") / 1e9, 2),
    }
    return row


def child(name: str, layers: int) -> None:
    row = explained(name, layers)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    row["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps(row))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]))
        return
    args = parse(arguments(__doc__ or ""))
    rows = [run(name, QUICK_LAYERS if args.quick else n) for name, (_, n) in MODELS.items()]
    write_results(
        "ledger_scale",
        "The ledger of models that fit nowhere",
        {
            "Time and memory": [row["time"] for row in rows],
            "Models": [row["sizes"] for row in rows],
            "Ledger": [step for row in rows for step in row["steps"]],
            "Left as they are": [reason for row in rows for reason in row["reasons"]],
        },
        command=command(),
        notes=f"bfloat16 on `meta`, {TOKENS} tokens, no cache. Nothing has values: errors of the "
        "passes are unknown, and no output is compared. Process seconds include the imports and "
        "the model's construction. Stacked expert weights are priced (a token pays for the experts "
        "it takes) and not rewritten.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
