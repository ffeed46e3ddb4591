"""Weights of 4 bits: what is lost of each layer's outputs, on sentences that nothing was fitted to,
by rounding, by searched ranges and by compensation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from _harness import arguments, command, parse, write_results
from _models import data
from monarch_project import batches, texts

from rewriter import rewrite
from rewriter.passes import Quantize

METHODS = ("round", "awq", "gptq")


def main() -> None:
    args = parse(arguments(__doc__ or ""))
    torch.manual_seed(0)
    model, tokenizer = data.load_minilm()
    model = model.eval()
    example = dict(tokenizer(["A short text.", "Another one."], return_tensors="pt", padding=True))
    sentences = texts(300 if not args.quick else 60, 0)
    calibration = batches(tokenizer, sentences, 25)
    where = "encoder.layer.0.*" if args.quick else None
    rows: list[dict[str, Any]] = []
    for group, symmetric in ((128, True),) if args.quick else combinations():
        rounded: list[float] = []
        for method in METHODS:
            quantize = Quantize(
                "int4-weight", group_size=group, symmetric=symmetric, method=method, where=where
            )
            made = rewrite(model, [quantize], example, calibration=calibration)
            found = [d for d in made.report.steps[1].decisions if d.action == "replaced"]
            errors = [d.output_error for d in found]
            rounded = rounded or errors
            lower = [1 - e / r for e, r in zip(errors, rounded, strict=True)]
            mean = sum(errors) / len(errors)
            less = 1 - sum(errors) / sum(rounded)
            rows.append(
                {
                    "group": group,
                    "zeros": "no" if symmetric else "yes",
                    "method": method,
                    "error of weights": sum(d.error for d in found) / len(found),
                    "error of outputs, held out": mean,
                    "lower than rounded by": f"{less:.1%}",
                    "least and most of a layer": f"{min(lower):.0%} … {max(lower):.0%}",
                    "WordSim-353": data.wordsim(made, tokenizer),
                    "SimLex-999": data.simlex(made, tokenizer),
                }
            )
            print(rows[-1], flush=True)
    write_results(
        "int4_error",
        "Weights of 4 bits",
        {f"MiniLM, {len(found)} linear layers": rows},
        command=command(),
        notes=f"Means over the layers of ‖W − W′‖/‖W‖ and of ‖y − y′‖/‖y‖ (bias left out of y). "
        f"Calibrated on {len(sentences)} sentences of the Lee background corpus, three of four "
        "batches to fit and the fourth, held out, to measure. "
        f"Dense MiniLM: WordSim-353 {data.WORDSIM_DENSE}, SimLex-999 {data.SIMLEX_DENSE}.",
        out=args.out,
    )


def combinations() -> Iterator[tuple[int, bool]]:
    for group in (64, 128):
        yield from ((group, symmetric) for symmetric in (True, False))


if __name__ == "__main__":
    main()
