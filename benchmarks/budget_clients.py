"""Training within a memory budget under real clients: Trainer, Lightning and accelerate.

A BERT with dropout trains a few steps, by eager PyTorch and within the budget, from the same
weights and seed. A witness (`_tracker.Tracker`) is on from one update of the optimizer to the next,
once the first step has been planned, and sees all that is alive between: batches, activations,
gradients, temporaries, what clipping and evaluation make. Needs the extra `clients`.
"""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from _harness import arguments, command, parse, write_results
from _models import Batch, transformer
from _tracker import Tracker
from torch import Tensor, nn

from rewriter import rewrite

TARGET = 2.0
"""Percent that a plan's peak may be off the tracker."""
BUDGET = 0.6
VOCABULARY = 500


@dataclass(frozen=True)
class Size:
    """Of a BERT, and of its batches."""

    layers: int
    width: int
    rows: int
    length: int


REAL, QUICK = Size(4, 256, 8, 128), Size(2, 64, 4, 32)


@dataclass
class Job:
    """What a client trains on, and where it leaves its files."""

    size: Size
    steps: int
    folder: str

    def samples(self, count: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(1)
        length = self.size.length
        return [
            {
                "input_ids": torch.randint(5, VOCABULARY, (length,), generator=generator),
                "attention_mask": torch.ones(length, dtype=torch.int64),
                "labels": torch.tensor(i % 3),
            }
            for i in range(count)
        ]

    def batch(self) -> Batch:
        rows = self.samples(self.size.rows)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@dataclass
class Witness:
    """The peak between two updates of an optimizer; of the first one nothing, as it plans.

    Args:
        model: whose weights are not counted.
        peaks: of every step that was watched.
    """

    model: nn.Module
    peaks: list[int] = field(default_factory=list)
    tracker: Tracker | None = None

    def watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """After each step; up to the next one, which `stop` is to be called right before."""
        optimizer.register_step_post_hook(lambda own, *_: self.start(own))
        return optimizer

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        states = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        given = [*self.model.parameters(), *self.model.buffers(), *states]
        self.tracker = Tracker(given=given)
        self.tracker.__enter__()

    def stop(self) -> None:
        """Ends a step's watch; without one, after the last step, nothing."""
        if self.tracker is not None:
            self.tracker.__exit__(None, None, None)
            self.peaks.append(self.tracker.peak)
            self.tracker = None

    def end(self) -> None:
        """After the last update no step comes that could end the watch."""
        if self.tracker is not None:
            self.tracker.__exit__(None, None, None)
            self.tracker = None


def sgd(model: nn.Module, witness: Witness) -> torch.optim.Optimizer:
    """An optimizer with the witness on from one step to the next."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.register_step_pre_hook(lambda *_: witness.stop())
    return witness.watch(optimizer)


# ---- clients -----------------------------------------------------------------------------------

Client = Callable[[nn.Module, Job, Witness], int]
"""Trains a model; returns how many forwards with gradients that took."""


def trainer(*, rows: int = 0, forwards: int = 1, **options: Any) -> Client:
    """transformers' Trainer with these arguments.

    Args:
        rows: of the data that are missing in the last batch.
        forwards: per update.
    """

    def train(model: nn.Module, job: Job, witness: Witness) -> int:
        import transformers

        size, steps = job.size, job.steps
        data = job.samples(size.rows * steps * forwards - rows)
        given: dict[str, Any] = {
            "max_steps": steps, "per_device_train_batch_size": size.rows, "report_to": [],
            "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0,
            "logging_strategy": "no", "dataloader_pin_memory": False,
        }  # fmt: skip
        client = transformers.Trainer(
            model,
            transformers.TrainingArguments(job.folder, **(given | options)),
            train_dataset=data,
            eval_dataset=data[: size.rows],
            optimizers=(sgd(model, witness), None),
        )
        client.train()
        return steps * forwards

    return train


def lightning(**options: Any) -> Client:
    """Lightning's Trainer on the model, which is a whole LightningModule."""

    def train(model: Any, job: Job, witness: Witness) -> int:
        from lightning import Trainer, seed_everything

        seed_everything(0, verbose=False)
        model.witness = witness
        given: dict[str, Any] = {
            "max_steps": job.steps, "accelerator": "cpu", "logger": False,
            "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False, "default_root_dir": job.folder,
        }  # fmt: skip
        data = job.samples(job.size.rows * job.steps)
        Trainer(**(given | options)).fit(
            model, torch.utils.data.DataLoader(data, batch_size=job.size.rows)
        )
        return job.steps

    return train


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def whole(model: nn.Module) -> nn.Module:
    """The model as a LightningModule."""
    from lightning import LightningModule

    class Whole(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
            loss: Tensor = self.inner(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels
            ).loss
            return loss

        def training_step(self, batch: Batch, index: int) -> Tensor:
            loss: Tensor = self(**batch)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            sgd = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            return self.witness.watch(sgd)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.witness.stop()  # its step begins with forward and backward

    return Whole()


def accelerate(precision: str, forwards: int = 1) -> Client:
    """A loop of one's own with accelerate."""

    def train(model: nn.Module, job: Job, witness: Witness) -> int:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        client = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=forwards
        )
        data = job.samples(job.size.rows * job.steps * forwards)
        loader = torch.utils.data.DataLoader(data, batch_size=job.size.rows)
        prepared, optimizer, loader = client.prepare(model.train(), sgd(model, witness), loader)
        for batch in loader:
            with client.accumulate(prepared):
                client.backward(prepared(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
        AcceleratorState._reset_state(True)
        return job.steps * forwards

    return train


@dataclass(frozen=True)
class Case:
    """A client, and how it takes a model.

    Args:
        wrap: makes of a BERT what is rewritten and trained.
        accumulated: an update takes several batches.
    """

    name: str
    client: Client
    wrap: Callable[[nn.Module], nn.Module] = as_it_is
    accumulated: bool = False


CASES = (
    Case("Trainer", trainer()),
    Case("Trainer, clipping gradients", trainer(max_grad_norm=0.1)),
    Case("Trainer, label smoothing", trainer(label_smoothing_factor=0.1)),
    Case(
        "Trainer, 2 batches an update",
        trainer(gradient_accumulation_steps=2, forwards=2),
        accumulated=True,
    ),
    Case("Trainer, evaluating every step", trainer(eval_strategy="steps", eval_steps=1)),
    Case("Trainer, saving every step", trainer(save_strategy="steps", save_steps=1)),
    Case("Trainer, a short last batch", trainer(rows=3)),
    Case("Trainer, bf16", trainer(bf16=True)),
    Case("Trainer, gradient checkpointing", trainer(gradient_checkpointing=True)),
    Case("Lightning, whole module", lightning(), whole),
    Case("Lightning, whole module, bf16", lightning(precision="bf16-mixed"), whole),
    Case("accelerate", accelerate("no")),
    Case("accelerate, bf16", accelerate("bf16")),
    Case("accelerate, bf16, 2 batches an update", accelerate("bf16", 2), accumulated=True),
)


# ---- tables ------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """The clients' own talk is not shown; the warnings are handed back."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield said
    finally:
        logging.disable(before)


def trained(case: Case, model: nn.Module, size: Size, steps: int) -> tuple[Witness, int]:
    """A model after its steps, in the witness, and how many forwards they took."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        witness = Witness(model)
        try:
            forwards = case.client(model, Job(size, steps, folder), witness)
        finally:
            witness.end()
    return witness, forwards


@functools.cache
def made(wrap: Callable[[nn.Module], nn.Module], size: Size) -> tuple[nn.Module, nn.Module]:
    """(eager, planned): a model of this size, as its client takes it."""
    torch.manual_seed(0)
    model = transformer(
        "BertForSequenceClassification", vocab_size=VOCABULARY, hidden_size=size.width,
        num_hidden_layers=size.layers, num_attention_heads=4, num_labels=3,
        intermediate_size=4 * size.width, max_position_embeddings=size.length,
    )  # fmt: skip
    eager = wrap(model).train()
    with quiet():
        planned = rewrite(eager, [], Job(size, 1, "").batch(), memory_budget=BUDGET)
    return eager, planned.train()


def row(case: Case, size: Size, steps: int) -> dict[str, Any]:
    """One client: peaks of both models, how the steps ran, and whether they are the same."""
    eager, planned = map(copy.deepcopy, made(case.wrap, size))
    with quiet():
        plain, _ = trained(case, eager, size, steps)
    with quiet() as said:
        own, forwards = trained(case, planned, size, steps)
    forms = planned.report.forms
    by_plan, measured = sum(form.planned for form in forms), max(own.peaks)
    gradients = sum(p.nbytes for p in planned.parameters()) if case.accumulated else 0
    predicted = gradients + max(form.planned_peak for form in forms)
    lost = [str(w.message) for w in said if "without the memory plan" in str(w.message)]
    differs = max(
        float((a - b).detach().abs().max())
        for a, b in zip(eager.parameters(), planned.parameters(), strict=True)
    )
    return {
        "client": case.name,
        "steps by plan": f"{by_plan} of {forwards}",
        "eager MB": round(max(plain.peaks) / 1e6, 3),
        "plan MB": round(predicted / 1e6, 3) if by_plan else "–",
        "measured MB": round(measured / 1e6, 3),
        "off %": round(100 * (predicted - measured) / measured, 3) if by_plan else "–",
        "parameters": "equal" if differs == 0 else f"off by {differs:.1e}",
        "said": lost[0] if lost else "",
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="*", help="words of the clients' names")
    parser.add_argument("--steps", type=int, default=3)
    args = parse(parser)
    size = QUICK if args.quick else REAL
    cases = [c for c in CASES if not args.only or any(w in c.name for w in args.only)]
    table = []
    for case in cases:
        table.append(row(case, size, args.steps))
        print(table[-1], flush=True)
    write_results(
        "budget_clients",
        "Training within a memory budget under Trainer, Lightning and accelerate",
        {"Clients": table},
        command=command(),
        notes=f"A BERT of {size.layers} layers, {size.width} wide, with {size.rows} × "
        f"{size.length} tokens, dropout 0.1, SGD with momentum; memory_budget={BUDGET}. 'plan' is "
        "the peak that `report.forms` names, of activations, gradients and temporaries, with the "
        "gradients of the batches before where an update takes several. 'measured' is the most "
        "that was alive from one update to the next, without weights, the optimizer's state and "
        "the gradients of the update before (Lightning frees those between forward and backward); "
        "'eager' the same of the model that was not rewritten. 'parameters' compares both after "
        "the last step.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
