"""Saving under stress: writers that are killed, and writers and a reader at once."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import time
import warnings
from typing import Any

import torch
from torch import nn

from rewriter import load, rewrite
from rewriter.passes import Monarch

WIDTH = 64


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).eval()


def _models(count: int) -> list[Any]:
    """Rewritten models whose first bias says which one it is."""
    made = []
    for number in range(count):
        torch.manual_seed(number)
        model: Any = rewrite(_net(), [Monarch()])
        _mark(model, float(number))
        made.append(model)
    return made


def _mark(model: Any, number: float) -> None:
    """Makes a model another one: all of its tensors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)


def _whole(folder: pathlib.Path) -> float:
    """The number of the save that is there.

    Raises:
        AssertionError: it is of two saves.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load(folder, _net())
    numbers = {float(v) for p in loaded.parameters() for v in p.detach().unique()}
    assert len(numbers) == 1, f"parts of several saves: {sorted(numbers)}"
    return numbers.pop()


def _forked(work: Any) -> int:
    """A child of this process that does some work; its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child has not
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def kills(count: int, seed: int, folder: pathlib.Path) -> int:
    """Kills a writer at a random moment, many times; loads after each. How many went wrong."""
    rng, wrong, seen, mid = random.Random(seed), 0, 0.0, 0
    path = folder / "save"
    (model,) = _models(1)
    model.save(path)
    start = time.monotonic()
    for _ in range(10):
        model.save(path)
    usual = (time.monotonic() - start) / 10

    for number in range(1, count + 1):

        def work(number: int = number) -> None:
            _mark(model, float(number))
            model.save(path)
            while True:
                time.sleep(1)

        child = _forked(work)
        time.sleep(rng.uniform(0, 2 * usual))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            found = _whole(path)
            assert found in (seen, number), f"save {found} after {seen} and {number}"
            mid += found == seen
            seen = found
        except Exception as error:
            wrong += 1
            print(f"kills {seed}, round {number}: {type(error).__name__}: {error}", flush=True)
    left = len(list(path.iterdir()))
    _mark(model, -1.0)
    model.save(path)
    print(
        f"{count:,} kills during save: {mid:,} left the old save, {count - mid - wrong:,} the new, "
        f"{wrong} loads failed; {left - 2} files left over before one more save, "
        f"{len(list(path.iterdir())) - 2} after"
    )
    return wrong


def turns(count: int, seed: int, folder: pathlib.Path) -> int:
    """Two writers and a reader at once, each so many rounds; how many loads failed."""
    path = folder / "save"
    models = _models(2)
    models[0].save(path)

    def write(which: int) -> None:
        for number in range(count):
            _mark(models[which], float(2 * number + which))
            models[which].save(path)

    children = [_forked(lambda which=which: write(which)) for which in range(2)]
    wrong, done, different = 0, 0, set()
    for _ in range(count):
        try:
            different.add(_whole(path))
            done += 1
        except Exception as error:
            wrong += 1
            print(f"turns {seed}: {type(error).__name__}: {error}", flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    last = _whole(path)
    print(
        f"{count:,} rounds of two writers and a reader: {done:,} loads of {len(different):,} "
        f"different saves, {wrong} failed; the writers ended with {codes}; the last save is "
        f"{last:.0f}, beside {len(list(path.iterdir())) - 2} files left over"
    )
    return wrong + sum(code != 0 for code in codes)
