"""Healing MiniLM after every linear layer of its encoder has become Monarch: quality over blocks
and time. The recipe is that of `examples/heal_minilm.py`; no score of a test set decides anything.
"""

from __future__ import annotations

import time
from typing import Any

from _harness import arguments, command, load_script, parse, write_results
from _models import data

example = load_script("examples/heal_minilm.py")
RUNS = ((4, 2.0), (4, 5.0), (4, 12.0), (2, 5.0), (8, 5.0), (8, 12.0))
"""(blocks, minutes of training)."""


def main() -> None:
    parser = arguments(__doc__ or "")
    args = parse(parser)
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for nblocks, minutes in ((4, 0.01),) if args.quick else RUNS:
        model, tokenizer = data.load_minilm()
        small = example.QUICK if args.quick else {}
        start = time.process_time()
        made, scores, run = example.heal(
            model.eval(), tokenizer, nblocks, 60 * minutes, progress=False, **small
        )
        dense = sum(p.numel() for p in model.encoder.parameters())
        rows.append(
            {
                "N": nblocks,
                "weights of the encoder": sum(p.numel() for p in made.encoder.parameters()) / dense,
                "steps": run.curve[-1]["step"],
                "CPU minutes in all": (time.process_time() - start) / 60,
                "WordSim-353 projected": scores["projected"],
                "fitted to activations": scores["fitted"],
                "healed": scores["healed"],
                "SimLex-999 healed": scores["healed, SimLex-999"],
            }
        )
        curves += [
            {
                "N": nblocks,
                "minutes": minutes,
                "step": r["step"],
                "seconds": r["seconds"],
                "held-out loss": r["held-out loss"],
            }
            for r in run.curve
        ]
        print(rows[-1], flush=True)
    write_results(
        "monarch_heal",
        "Healing MiniLM with Monarch layers",
        {"By blocks and time": rows, "Curves": curves},
        command=command(),
        notes="All 36 linear layers of the encoder; dense MiniLM: WordSim-353 "
        f"{data.WORDSIM_DENSE}, SimLex-999 {data.SIMLEX_DENSE}. Text: sentences and single words "
        "of the Lee background corpus and of a novel, none of the test sets; a tenth is held out "
        "for the loss. CPU minutes hold the rewrites, the fit to activations, the training and "
        "the evaluations, on all cores together.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
