"""Healing: a rewritten model learns from the original what the rewrite has cost it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import numbers
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewriter.base import Layer
from rewriter.capture import arguments
from rewriter.engine.batches import Calibration
from rewriter.errors import PATH, OptionError, RewriteError, given, of_type
from rewriter.modules.paths import path_of
from rewriter.modules.running import modes
from rewriter.modules.structure import flatten
from rewriter.training.optimizers import param_groups

__all__ = ["Recovery", "recover"]

_HELD_OUT = 10
Loss = Callable[[Any, Any, Any], Tensor]
_log = logging.getLogger("rewriter")


@dataclass
class Recovery:
    """What happened: one line per evaluation; `print` shows it in short.

    Args:
        curve: phase, step, seconds of training so far, loss on the batches held out, and the
            user's own score where `evaluate` is given.
        best: the step of the distillation whose weights the model has now.
        stopped: why it ended.
        notes: what was left out, and why; and whether the distillation was of no use.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    best: int = 0
    stopped: str = ""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        judged = [row for row in self.curve if row["phase"] == "distillation"]
        key = "held-out loss" if not judged or judged[0]["score"] is None else "score"
        told = [row for row in judged if row["step"] in (0, self.best)]
        figures = " → ".join(f"{row[key]:.4g} at step {row['step']}" for row in told)
        return "\n".join([f"{self.stopped}; {key} {figures}", *self.notes])


@dataclass(frozen=True)
class _Plan:
    steps: int
    layer_steps: int
    lr: float
    hidden: float
    temperature: float
    amp: torch.dtype | None
    every: int
    patience: int
    seconds: float | None
    seed: int


def recover(
    optimized: nn.Module,
    teacher: nn.Module,
    batches: Any,
    *,
    steps: int = 1000,
    layer_steps: int = 100,
    lr: float = 5e-4,
    hidden: float = 1.0,
    temperature: float = 2.0,
    loss: Loss | None = None,
    train: str = "all",
    amp: torch.dtype | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    every: int = 50,
    patience: int = 5,
    seconds: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Recovery:
    """min over weights of  hidden · Σ_m ‖h_m − h′_m‖²/‖h_m‖² / M + d(outputs, outputs′).

    First every rewritten layer by itself learns to give the teacher's outputs on the teacher's
    inputs; then the model as a whole the teacher's hidden states (outputs of its norms; of the
    rewritten layers where it has none) and outputs. d is the Kullback-Leibler divergence of
    softened logits, T² KL(softmax(z/T) ‖ softmax(z′/T)), for an output named `logits`, and the
    relative squared error of other floating outputs. Padding, by a 2-D `attention_mask` of the
    batch, does not count. AdamW with `param_groups`, warm-up, cosine, gradients clipped at 1.

    Args:
        optimized: what `rewrite` gave; trained in place. Ends with the best weights found.
        teacher: the original, untouched.
        batches: like `example_inputs`: a list, or a DataLoader that is read once. Every tenth (if
            there are ten) is held out: it decides on the best weights and on the end.
        steps, layer_steps: of the distillation, and of each layer by itself (0 leaves that out).
        lr: of dense layers at the peak.
        hidden: weight of hidden states; 0 for outputs alone.
        temperature: T.
        loss: (outputs of optimized, outputs of the teacher, batch) → scalar, in place of d.
        train: "all" parameters that require gradients, or those of the "replaced" layers.
        amp: dtype of autocast, e.g. torch.bfloat16; None for none.
        evaluate: model → score, larger is better; decides in place of the held-out loss.
        every: steps between evaluations.
        patience: evaluations without improvement before it stops.
        seconds: of training at most, which the learning rate's schedule then fits into; None for no
            limit.
        checkpoint: a folder; written at every evaluation, and where it has one of the same call,
            training goes on from there, without `seconds` to the same end.
        progress: shows a bar.
        seed: of the order of the batches.

    Returns:
        The curve, and why it stopped.

    Raises:
        OptionError: an option is impossible, or nothing is there to train.
        RewriteError: the loss is not finite; the model has its best weights so far.

    Source: Hinton et al. 2015 (soft targets); Jiao et al. 2020, "TinyBERT" (hidden states).
    """
    _check_models(optimized, teacher)
    every_one = Calibration.of(batches, "batches").batches
    plan = _Plan(steps, layer_steps, lr, hidden, temperature, amp, every, patience, seconds, seed)
    _check(plan, train, loss, evaluate, checkpoint)
    enough = len(every_one) >= _HELD_OUT
    held = [b for i, b in enumerate(every_one) if enough and i % _HELD_OUT == 9]
    fitted = [b for i, b in enumerate(every_one) if not enough or i % _HELD_OUT != 9]
    run = _Run(optimized, teacher, fitted, held or fitted, plan, loss, evaluate)
    run.folder = None if checkpoint is None else path_of(checkpoint, "checkpoint")
    flags = [(p, p.requires_grad) for p in optimized.parameters()]
    layers = {n: m for n, m in optimized.named_modules() if isinstance(m, Layer)}
    if train == "replaced":
        own = {id(p) for m in layers.values() for p in m.parameters()}
        for p, _ in flags:
            p.requires_grad_(p.requires_grad and id(p) in own)
    try:
        if not any(p.requires_grad for p in optimized.parameters()):
            raise OptionError("no parameter of the model requires gradients: nothing to recover")
        with modes(optimized, True), modes(teacher, False), _bar(progress) as bar:
            run.bar = bar
            if layer_steps and layers:
                run.layers(layers)
            run.distil(layers)
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return run.result


_NO_USE = (
    "the distillation did not help: no evaluation was better than the one before its first step, "
    "whose weights the model has now"
)


def _check_models(optimized: Any, teacher: Any) -> None:
    call = "recover(optimized, teacher, batches)"
    of_type(call, "optimized", optimized, nn.Module, "the rewritten model")
    of_type(call, "teacher", teacher, nn.Module, "the original model")
    rewritten = [any(isinstance(m, Layer) for m in x.modules()) for x in (optimized, teacher)]
    if rewritten == [False, True]:
        raise OptionError(f"{call}: teacher is rewritten and optimized is not: exchange them")
    if optimized is teacher:
        raise OptionError(
            f"{call}: both are the same model, which has nothing to learn from itself"
        )


def _check(plan: _Plan, train: Any, loss: Any, evaluate: Any, checkpoint: Any) -> None:
    def number(value: Any, least: float, whole: bool = False) -> bool:
        kind: type = numbers.Integral if whole else numbers.Real
        known = isinstance(value, kind) and not isinstance(value, bool)
        return known and least <= value < math.inf

    above = sys.float_info.min
    least = "a number of at least 0"
    count, positive, function = "a whole number of at least {}", "a number above 0", "a function"
    wrong = [
        f"{name}={given(value)} ({wanted})"
        for name, value, good, wanted in (
            ("steps", plan.steps, number(plan.steps, 0, True), count.format(0)),
            ("layer_steps", plan.layer_steps, number(plan.layer_steps, 0, True), count.format(0)),
            ("lr", plan.lr, number(plan.lr, above), positive),
            ("hidden", plan.hidden, number(plan.hidden, 0), least),
            ("temperature", plan.temperature, number(plan.temperature, above), positive),
            ("amp", plan.amp, isinstance(plan.amp, torch.dtype | None), "a torch.dtype"),
            ("every", plan.every, number(plan.every, 1, True), count.format(1)),
            ("patience", plan.patience, number(plan.patience, 1, True), count.format(1)),
            ("seconds", plan.seconds, plan.seconds is None or number(plan.seconds, 0), least),
            ("seed", plan.seed, number(plan.seed, -math.inf, True), "a whole number"),
            ("train", train, train in ("all", "replaced"), "'all' or 'replaced'"),
            ("loss", loss, loss is None or callable(loss), function),
            ("evaluate", evaluate, evaluate is None or callable(evaluate), function),
            ("checkpoint", checkpoint, isinstance(checkpoint, (*PATH, type(None))), "a path"),
        )
        if not good
    ]
    if wrong:
        raise OptionError(f"recover: impossible {', '.join(wrong)}")


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Progress]:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[says]}")
    with Progress(*columns, TimeRemainingColumn(), disable=not shown) as bar:
        yield bar


class _Run:
    """One recovery in progress."""

    folder: Path | None = None
    bar: Progress

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        fitted: Sequence[Any],
        held: Sequence[Any],
        plan: _Plan,
        loss: Loss | None,
        evaluate: Callable[[nn.Module], float] | None,
    ) -> None:
        self.student, self.teacher, self.plan = student, teacher, plan
        self.fitted, self.held = fitted, held
        self.loss, self.evaluate = loss, evaluate
        self.result = Recovery()
        self.seconds = 0.0
        self.begun = 0.0  # seconds before the distillation
        self.best: dict[str, Tensor] = {}
        self.top = -math.inf
        self.waited = 0

    # phases

    def layers(self, layers: Mapping[str, nn.Module]) -> None:
        """Each rewritten layer on its own."""
        known = dict(self.teacher.named_modules())
        pairs = {n: (m, known[n]) for n, m in layers.items() if n in known and m is not known[n]}
        for name in layers.keys() - pairs.keys():
            self.result.notes.append(f"{name} stands for a bare parameter: not trained by itself")
        parameters = [p for m, _ in pairs.values() for p in m.parameters() if p.requires_grad]
        if not parameters:
            return
        holder = nn.ModuleList(m for m, _ in pairs.values())
        optimizer = torch.optim.AdamW(param_groups(holder, self.plan.lr))
        state = self._resume("layers", optimizer)
        begin = self.plan.layer_steps if state is None and self._has("distil") else (state or 0)
        task = self.bar.add_task("layers", total=self.plan.layer_steps, says="", completed=begin)
        for step in range(begin, self.plan.layer_steps):
            start = time.perf_counter()
            batch = self._batch(step, 1)
            self._rate(optimizer, step, self.plan.layer_steps)
            total = 0.0
            with _Outputs({n: t for n, (_, t) in pairs.items()}) as seen:
                self._teach(batch)
            for name, (layer, _) in pairs.items():
                for x, want in seen.calls.get(name, []):
                    with self._autocast(x):
                        got = layer(x)
                    error = _relative(got, want, _mask(batch))
                    error.backward()
                    total += float(error.detach())
            self._step(optimizer, parameters, total)
            self.seconds += time.perf_counter() - start
            self.bar.update(task, advance=1, says=f"error {total / max(len(pairs), 1):.4f}")
            if (step + 1) % self.plan.every == 0 or step + 1 == self.plan.layer_steps:
                self._note("layers", step + 1, total / max(len(pairs), 1), None)
                self._save("layers", step + 1, optimizer)

    def distil(self, layers: Mapping[str, nn.Module]) -> None:
        """The whole model: hidden states and outputs."""
        plan, names = self.plan, self._hidden(layers) if self.plan.hidden else []
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(param_groups(self.student, plan.lr, 0.01))
        begin = self._resume("distil", optimizer) or 0
        task = self.bar.add_task("distillation", total=1.0, says="")
        if not begin:
            self.begun = self.seconds
            self._judge(0, names)
        for step in range(begin, plan.steps):
            start = time.perf_counter()
            batch = self._batch(step, 2)
            self._rate(optimizer, step, plan.steps)
            value = self._distance(batch, names)
            value.backward()
            self._step(optimizer, parameters, float(value.detach()))
            self.seconds += time.perf_counter() - start
            done = self._done(step + 1, plan.steps)
            self.bar.update(task, completed=done, says=f"loss {float(value.detach()):.4f}")
            over = plan.seconds is not None and self.seconds > plan.seconds
            if (step + 1) % plan.every == 0 or step + 1 == plan.steps or over:
                self._judge(step + 1, names)
                self._save("distil", step + 1, optimizer)
                if self.waited >= plan.patience:
                    self.result.stopped = f"no better for {self.waited} evaluations"
                    break
                if over:
                    self.result.stopped = f"the time of {plan.seconds:.0f} s is over"
                    break
        self.result.stopped = self.result.stopped or f"all {plan.steps} steps done"
        if plan.steps and not self.result.best:
            self.result.notes.append(_NO_USE)
            _log.warning("recover: %s", _NO_USE)
        self._restore()

    # their parts

    def _hidden(self, layers: Mapping[str, nn.Module]) -> list[str]:
        """Modules of both models whose outputs are compared."""
        theirs = dict(self.teacher.named_modules())
        norms = [
            n
            for n, m in self.student.named_modules()
            if "norm" in type(m).__name__.lower() and n in theirs and not list(m.children())
        ]
        return norms or [n for n in layers if n in theirs]

    def _distance(self, batch: Any, names: Sequence[str]) -> Tensor:
        args, kwargs = arguments(batch)
        mask = _mask(batch)
        with _Outputs({n: self.teacher.get_submodule(n) for n in names}) as theirs:
            wanted = self._teach(batch)
        first = next(t for t in self.student.parameters())
        with (
            _Outputs({n: self.student.get_submodule(n) for n in names}) as ours,
            self._autocast(first),
        ):
            found = self.student(*args, **kwargs)
        if self.loss is not None:
            total = self.loss(found, wanted, batch)
        else:
            total = _outputs_distance(found, wanted, mask, self.plan.temperature)
        pairs = [
            (got, want)
            for n in names
            for (_, got), (_, want) in zip(
                ours.calls.get(n, []), theirs.calls.get(n, []), strict=False
            )
        ]
        if pairs:
            errors = [_relative(got, want, mask) for got, want in pairs]
            total = total + self.plan.hidden * torch.stack(errors).mean()
        return total

    def _teach(self, batch: Any) -> Any:
        args, kwargs = arguments(batch)
        with torch.no_grad():
            return self.teacher(*args, **kwargs)

    def _autocast(self, like: Tensor) -> Any:
        amp = self.plan.amp
        return torch.autocast(like.device.type, amp or torch.bfloat16, enabled=amp is not None)

    def _batch(self, step: int, phase: int) -> Any:
        """The batch of a step, by the step alone: a run that resumes goes on as it would have."""
        epoch, place = divmod(step, len(self.fitted))
        generator = torch.Generator().manual_seed(1_000_003 * self.plan.seed + 7 * epoch + phase)
        order = torch.randperm(len(self.fitted), generator=generator)
        torch.manual_seed(self.plan.seed + step)  # dropout
        return self.fitted[int(order[place])]

    def _done(self, step: int, steps: int) -> float:
        """The share of the steps that is done, or of the time where that is more."""
        done = step / max(steps, 1)
        if self.plan.seconds is not None:
            left = max(self.plan.seconds - self.begun, 1e-9)
            done = min(max(done, (self.seconds - self.begun) / left), 1.0)
        return done

    def _rate(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
        """Warm-up over a twentieth, and cosine to the end of the steps, or of the time where that
        comes sooner."""
        done = self._done(step, steps)
        share = min(1.0, 20 * (done + 1 / max(steps, 20))) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = self.plan.lr * group["lr_scale"] * max(share, 0.01)

    def _step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], loss: float
    ) -> None:
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
            optimizer.zero_grad(set_to_none=True)
            self._restore()
            raise RewriteError(
                f"recover: the loss is {loss} and its gradient's norm {float(norm)}: the model has "
                "its best weights so far; lower lr, or leave amp out"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _judge(self, step: int, names: Sequence[str]) -> None:
        """Evaluates, and keeps the weights where they are the best so far."""
        score = None
        with modes(self.student, False), torch.no_grad():
            losses = [float(self._distance(batch, names)) for batch in self.held]
            if self.evaluate is not None:
                score = float(self.evaluate(self.student))
        held = sum(losses) / len(losses)
        self._note("distillation", step, held, score)
        value = -held if score is None else score
        if value > self.top:
            self.top, self.waited, self.result.best = value, 0, step
            self.best = {k: v.detach().clone() for k, v in self.student.state_dict().items()}
        else:
            self.waited += 1

    def _note(self, phase: str, step: int, loss: float, score: float | None) -> None:
        self.result.curve.append(
            {
                "phase": phase,
                "step": step,
                "seconds": self.seconds,
                "held-out loss": loss,
                "score": score,
            }
        )

    def _restore(self) -> None:
        if self.best:
            self.student.load_state_dict(self.best)

    # the checkpoint

    def _key(self) -> dict[str, Any]:
        plan = {**asdict(self.plan), "amp": str(self.plan.amp)}
        plan.pop("seconds")
        return {**plan, "batches": len(self.fitted)}

    def _has(self, phase: str) -> bool:
        return self.folder is not None and (self.folder / f"{phase}.json").is_file()

    def _save(self, phase: str, step: int, optimizer: torch.optim.Optimizer) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"now.{k}": v for k, v in self.student.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"state.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        record = {
            "key": self._key(),
            "step": step,
            "seconds": self.seconds,
            "begun": self.begun,
            "top": self.top,
            "waited": self.waited,
            "result": asdict(self.result),
        }
        name = f"{phase}-{step}.safetensors"
        part = self.folder / f".{name}.part"
        save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, part)
        os.replace(part, self.folder / name)
        part = self.folder / f".{phase}.part"
        part.write_text(json.dumps({**record, "tensors": name}), encoding="utf-8")
        os.replace(part, self.folder / f"{phase}.json")  # from here on it counts
        for old in self.folder.glob(f"{phase}-*.safetensors"):
            if old.name != name:
                old.unlink()

    def _resume(self, phase: str, optimizer: torch.optim.Optimizer) -> int | None:
        """The step to go on from; None to begin."""
        if self.folder is None or not self._has(phase):
            return None
        record = json.loads((self.folder / f"{phase}.json").read_text(encoding="utf-8"))
        if record["key"] != self._key():
            raise OptionError(
                f"recover: {self.folder} holds a run with other options or batches: give another "
                "folder, or delete it"
            )
        tensors = load_file(self.folder / record["tensors"])

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.student.load_state_dict(part("now."))
        self.best = part("best.")
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in part("state.").items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.seconds, self.begun = record["seconds"], record["begun"]
        self.top, self.waited = record["top"], record["waited"]
        self.result = Recovery(**record["result"])
        self.result.stopped = ""
        return int(record["step"])


class _Outputs:
    """(input, output) of every call of some modules while it is entered."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __enter__(self) -> _Outputs:
        self.hooks = [
            m.register_forward_hook(self._noting(name)) for name, m in self.modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _noting(self, name: str) -> Callable[..., None]:
        def noted(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self.calls.setdefault(name, []).append((args[0], output))

        return noted


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _rows(value: Tensor, mask: Tensor | None) -> Tensor:
    fits = mask is not None and value.dim() > 2 and value.shape[:2] == mask.shape
    return value[mask].float() if fits else value.float()


def _relative(got: Tensor, want: Tensor, mask: Tensor | None) -> Tensor:
    got, want = _rows(got, mask), _rows(want.detach(), mask)
    return (got - want).square().sum() / want.square().sum().clamp(min=1e-12)


def _outputs_distance(found: Any, wanted: Any, mask: Tensor | None, temperature: float) -> Tensor:
    """d of `recover`, over all floating outputs."""
    if isinstance(wanted, Mapping) and isinstance(wanted.get("logits"), Tensor):
        got = F.log_softmax(_rows(found["logits"], mask) / temperature, -1)
        want = F.log_softmax(_rows(wanted["logits"], mask) / temperature, -1)
        rows = max(got.numel() // got.shape[-1], 1)
        return temperature**2 * F.kl_div(got, want, reduction="sum", log_target=True) / rows
    ours: list[Any] = []
    theirs: list[Any] = []
    flatten(found, ours, objects=True, opaque=True)
    flatten(wanted, theirs, objects=True, opaque=True)
    errors = [
        _relative(a, b, mask)
        for a, b in zip(ours, theirs, strict=False)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and b.is_floating_point()
    ]
    if not errors:
        raise OptionError("recover: the model has no floating output to learn from: give loss=")
    return torch.stack(errors).mean()
