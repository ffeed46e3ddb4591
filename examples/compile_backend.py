"""`torch.compile(model, backend="rewriter")`: int8 inference, weights that change, training.

    python examples/compile_backend.py

The real MiniLM, compiled by name. `inner="aot_eager"` keeps this short; leave it out for Inductor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _data import load_minilm

import rewriter
from rewriter.passes import TopK


def main() -> None:
    torch.manual_seed(0)
    model, tokenizer = load_minilm()
    texts = ["a graph is rewritten", "the weights are eight bits wide", "the loss goes down"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")

    # inference: any pass; the backend is found by its name
    fast = torch.compile(
        model,
        backend="rewriter",
        options={"passes": ["quantize:int8-dynamic"], "inner": "aot_eager"},
    )
    with torch.no_grad():
        exact, quantized = model(**batch)[0], fast(**batch)[0]
    (report,) = rewriter.report_of(fast)
    print(f"{len(report.replaced)} layers in int8, {report.after.param_bytes / 1e6:.1f} MB of "
          f"{report.before.param_bytes / 1e6:.1f} MB")  # fmt: skip
    print(f"cosine to fp32: {F.cosine_similarity(exact, quantized, dim=-1).mean():.4f}")

    # a weight changes: what was derived from it is derived again, the code stays
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(0.5)
        close = F.cosine_similarity(model(**batch)[0], fast(**batch)[0], dim=-1).mean()
    print(f"after a weight changed: {close:.4f}, {len(rewriter.report_of(fast))} compilation")

    # training: forward and backward go through the backend; the parameters stay the user's
    model.train()
    step = torch.compile(model, backend=rewriter.backend([TopK(k=0.25)], inner="aot_eager"))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    for i in range(3):
        loss = step(**batch)[0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {i}: loss {loss.item():.4f}")
    (report,) = rewriter.report_of(step)
    print(f"{len(report.replaced)} MLPs keep a quarter of their activations")


if __name__ == "__main__":
    main()
