"""Towards few active entries in training: a schedule of k, and penalties on activations."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewriter.errors import OptionError, given, of_type, one_of, whole_number
from rewriter.layer import Layer

__all__ = ["SparsityPenalty", "TopKSchedule"]

_POWERS = {"linear": 1, "cubic": 3}
_TINY = 1e-12


class TopKSchedule:
    """k(s) = K + (n − K)·(1 − s/steps)^p: from all n entries to the K that each layer was made for.

    Call `step` once after every step of the optimizer. k changes only `changes` times, in even
    intervals, as code that `torch.compile` makes is of one k. It is the layers' own `k`: a model
    that is saved on the way has the k of that moment, and goes on with the schedule's
    `state_dict`.

    Args:
        model: with layers of `TopK`; they become dense here.
        steps: after which k is K.
        form: "linear": p = 1. "cubic": p = 3, most of it early.
        changes: in how many changes k gets there.

    Raises:
        OptionError: an option is impossible, or the model has no such layer.

    Source: Zhu & Gupta 2017, "To prune, or not to prune" (cubic; of weights).
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        form: Literal["linear", "cubic"] = "cubic",
        changes: int = 6,
    ) -> None:
        of_type("TopKSchedule", "model", model, nn.Module, "a rewritten model")
        whole_number("TopKSchedule: steps", steps)
        whole_number("TopKSchedule: changes", changes)
        one_of("TopKSchedule: form", form, _POWERS)
        self.steps, self.form, self.changes, self.done = steps, form, changes, 0
        self._layers: dict[str, Any] = {n: m for n, m in model.named_modules() if _ranks(m)}
        if not self._layers:
            raise OptionError(
                "TopKSchedule: the model has no layer that keeps k entries: rewrite it with TopK"
            )
        self.targets = {n: int(m.k) for n, m in self._layers.items()}
        self._put()

    def step(self) -> None:
        """One step of training is done."""
        self.done += 1
        self._put()

    @property
    def share(self) -> float:
        """Of the way from n to K that is left, 0 to 1."""
        interval = min(self.done * self.changes // self.steps, self.changes)
        return float((1 - interval / self.changes) ** _POWERS[self.form])

    def k(self, name: str) -> int:
        """What a layer keeps now."""
        layer, target = self._layers[name], self.targets[name]
        width, block = int(layer.in_features), int(layer.block)
        return target + round((width - target) * self.share / block) * block

    def state_dict(self) -> dict[str, Any]:
        """What goes on from here takes: steps done, and each layer's K."""
        return {"done": self.done, "steps": self.steps, "targets": dict(self.targets)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; the layers' k follow.

        Raises:
            OptionError: it is of another model.
        """
        targets = dict(state.get("targets", {}))
        if targets.keys() != self.targets.keys():
            raise OptionError(
                f"TopKSchedule: the state is of layers {', '.join(targets) or 'none'}, the model "
                f"has {', '.join(self.targets)}"
            )
        self.targets, self.done, self.steps = targets, int(state["done"]), int(state["steps"])
        self._put()

    def __str__(self) -> str:
        kept = [self.k(n) / int(m.in_features) for n, m in self._layers.items()]
        return (
            f"step {self.done} of {self.steps}: {len(kept)} layers keep "
            f"{sum(kept) / len(kept):.1%} of their inputs"
        )

    def _put(self) -> None:
        for name, layer in self._layers.items():
            if layer.k != self.k(name):
                layer.k = self.k(name)


class SparsityPenalty:
    """weight · mean over layers and tokens of  ‖x‖₁/(√n ‖x‖₂)  ("hoyer") or  ‖x‖₁/n  ("l1").

    x is what enters each layer that selects entries, and what leaves each ReLU of `Reluify`. Hoyer
    does not change with the scale of x: it is 1 where all entries are alike and 1/√n for one.

        with SparsityPenalty(optimized, "hoyer", weight=0.1) as penalty:
            for batch in batches:
                loss = task(optimized(batch)) + penalty.value()
                loss.backward()
        print(penalty)  # the sparsity reached in the last forward

    Args:
        model: rewritten; watched from `with` to its end, in train mode and in eval mode.
        form: "hoyer" or "l1".
        weight: of the penalty.
        where: a pattern of layers' names, which may be any (then what enters them counts); None:
            those that select, and ReLUs of `Reluify`.

    Raises:
        OptionError: an option is impossible, or there is no such layer.

    Source: Hoyer 2004, "Non-negative Matrix Factorization with Sparseness Constraints"; Kurtz et
    al. 2020 (on activations).
    """

    def __init__(
        self,
        model: nn.Module,
        form: Literal["hoyer", "l1"] = "hoyer",
        weight: float = 1.0,
        where: str | None = None,
    ) -> None:
        of_type("SparsityPenalty", "model", model, nn.Module, "a model")
        one_of("SparsityPenalty: form", form, ("hoyer", "l1"))
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
            raise OptionError(
                f"SparsityPenalty: weight must be a number of at least 0, not {given(weight)}"
            )
        self.form, self.weight = form, float(weight)
        named = dict(model.named_modules())
        self._layers = {
            n: m
            for n, m in named.items()
            if (_watched(m) if where is None else n and fnmatch.fnmatchcase(n, where))
        }
        if not self._layers:
            what = "selects entries" if where is None else f"is called {where!r}"
            raise OptionError(f"SparsityPenalty: the model has no layer that {what}")
        self._terms: list[Tensor] = []
        self._zeros: dict[str, float] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> SparsityPenalty:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._seeing(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._terms.clear()

    def value(self) -> Tensor:
        """The penalty of all forwards since it was last asked for, with its gradient.

        Raises:
            OptionError: the model has not run since.
        """
        if not self._terms:
            raise OptionError("SparsityPenalty.value: run the model first, inside of `with`")
        total = self.weight * torch.stack(self._terms).mean()
        self._terms.clear()
        return total

    @property
    def sparsity(self) -> dict[str, float]:
        """Of each layer that ran: the share of entries that counted as zeros in its last call."""
        return dict(self._zeros)

    def __str__(self) -> str:
        if not self._zeros:
            return "nothing ran"
        shares = self._zeros.values()
        return (
            f"{sum(shares) / len(shares):.1%} of entries are zeros over {len(shares)} layers, from "
            f"{min(shares):.1%} to {max(shares):.1%}"
        )

    def _seeing(self, name: str) -> Any:
        def seen(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x = output if getattr(layer, "acts", False) else inputs[0]
            wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            one = wide.abs().mean(-1)
            if self.form == "hoyer":
                one = one / wide.square().mean(-1).add(_TINY).sqrt()
            if x.numel():
                self._terms.append(one.mean())
            with torch.no_grad():
                kept = layer.kept(x) if hasattr(layer, "kept") else x != 0
                self._zeros[name] = 1 - float(kept.float().mean())

        return seen


def _ranks(module: nn.Module) -> bool:
    """Whether a layer keeps k entries of its input."""
    own = isinstance(module, Layer) and hasattr(module, "kept")
    return own and isinstance(getattr(module, "k", None), int) and bool(module.k)


def _watched(module: nn.Module) -> bool:
    return isinstance(module, Layer) and (module.acts or hasattr(module, "kept"))
