"""Rewriting in one thread leaves the others alone, and several threads may rewrite at once."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_equal
from fuzz.threads import Bystander, model, rewritten
from torch import Tensor, nn

from rewriter import RewriteWarning, rewrite
from rewriter.modules import isolation
from rewriter.modules.garbage import rare_collections
from rewriter.modules.running import quiet_run


@pytest.fixture
def quiet_forward() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the forward warns")
        yield


@pytest.mark.usefixtures("quiet_forward")
def test_threads_rewrite_as_one_does() -> None:
    streams = sys.stdout, sys.stderr
    call = vars(nn.Module)["__call__"], vars(torch.autograd.Function)["apply"]
    models = [model(i) for i in range(4)]
    expected = [rewritten(m) for m in models]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(rewritten, models))
    for (rung, y, decisions), (other, z, others) in zip(expected, found, strict=True):
        assert (rung, decisions) == (other, others)
        assert_equal(y, z)
    assert (sys.stdout, sys.stderr) == streams
    assert (vars(nn.Module)["__call__"], vars(torch.autograd.Function)["apply"]) == call
    assert logging.root.manager.disable == 0


@pytest.mark.usefixtures("quiet_forward")
def test_a_bystander_notices_nothing(capsys: Any) -> None:
    models, thread = [model(0), model(1)], Bystander()
    thread.seed(3)
    thread.start()
    assert [rewritten(m)[0] for m in models] == ["export", "parts"]
    thread.stop.set()
    thread.join()
    assert thread.rounds > 20
    assert thread.disturbed(capsys.readouterr().out, 3) == []


def test_warnings_of_other_threads_are_heard() -> None:
    heard: list[str] = []
    inside, said = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait()
        warnings.warn("from elsewhere", RewriteWarning, stacklevel=1)
        said.set()

    thread = threading.Thread(target=other)
    thread.start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_run(nn.Linear(2, 2), training=False):
            warnings.warn("from here", stacklevel=1)
            inside.set()
            said.wait()
        heard = [str(w.message) for w in caught]
    thread.join()
    assert heard == ["from elsewhere"]


DRAWS: list[Callable[[], Any]] = [
    lambda: torch.rand(3), lambda: torch.randint(0, 9, (3,)), lambda: torch.randperm(5),
    lambda: torch.rand_like(torch.ones(3)), lambda: torch.empty(3).normal_(),
    lambda: torch.bernoulli(torch.full((9,), 0.5)), lambda: torch.ones(6).multinomial(4),
    lambda: nn.functional.dropout(torch.ones(9)),
    lambda: torch.native_dropout(torch.ones(9), 0.5, True)[0],
    lambda: nn.functional.rrelu(-torch.ones(9), training=True),
    lambda: torch.tensor([random.random(), random.gauss(0, 1)]),
    lambda: torch.tensor([np.random.rand(), np.random.normal()]),
]  # fmt: skip


@pytest.mark.parametrize("draw", range(len(DRAWS)))
@pytest.mark.parametrize("threads", [1, 2])
def test_a_quiet_run_has_random_numbers_of_its_own(draw: int, threads: int) -> None:
    class Draws(nn.Module):
        def forward(self) -> Any:
            return DRAWS[draw]()

    done = threading.Event()
    if threads == 2:
        threading.Thread(target=done.wait, daemon=True).start()
    module = Draws()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), isolation.random_state()
    results = []
    for _ in range(3):
        with quiet_run(module, training=True):
            results.append(module())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert isolation.random_state() == before[1]
    done.set()
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return 2 * y if random.random() < 0.5 else y


@pytest.mark.parametrize("busy", [False, True])
def test_a_model_that_draws_is_named_so_beside_other_threads(busy: bool) -> None:
    ended = threading.Event()

    def wait() -> None:
        while not ended.wait(1e-4 if busy else None):
            pass

    other = threading.Thread(target=wait)
    other.start()
    try:
        isolation._noted.calm = isolation._CALM
        (island,) = rewrite(Draws(), [], torch.randn(4, 8)).report.capture.islands
    finally:
        ended.set()
        other.join()
    assert "draws from Python's or NumPy's random numbers" in island.reason


def test_a_thread_that_sleeps_draws_nothing() -> None:
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    try:
        before, found = isolation.random_state(), []
        for _ in range(9):  # threads of a test runner may run in one of them
            isolation._noted.calm = isolation._CALM
            with isolation.kept_numbers() as drew:
                random.random()
                assert sys.getprofile() is None
                found.append(drew())
            if found[-1]:
                break
            isolation.set_random_state(before)
        assert found[-1]
        assert isolation.random_state() == before
    finally:
        ended.set()
        other.join()


def test_a_thread_that_runs_may_have_drawn() -> None:
    ended = threading.Event()
    other = threading.Thread(target=lambda: [random.random() for _ in iter(ended.is_set, True)])
    other.start()
    try:
        isolation._noted.calm = isolation._CALM
        with isolation.kept_numbers() as drew:
            time.sleep(0.05)
            assert not drew()
    finally:
        ended.set()
        other.join()


def test_calls_are_looked_at_until_numbers_have_been_still_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(isolation, "_cpu_time", lambda _: None)  # no thread is known to sleep

    def looked_at(draw: bool = False) -> bool:
        with isolation.kept_numbers() as drew:
            if draw:
                random.random()
            drew()
            return sys.getprofile() is not None

    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    try:
        isolation._noted.calm = isolation._CALM
        assert not looked_at(draw=True)
        assert [looked_at() for _ in range(isolation._CALM - 1)] == [True] * (isolation._CALM - 1)
        assert looked_at(draw=True)
        assert [looked_at() for _ in range(isolation._CALM)] == [True] * isolation._CALM
        assert not looked_at()
        with isolation.kept_numbers() as drew:  # a draw that nobody looked at is doubted, and once
            random.random()
            assert not drew()
        before = isolation.random_state()
        with isolation.kept_numbers() as drew:
            random.random()
            assert drew()
        assert isolation.random_state() == before
    finally:
        ended.set()
        other.join()


@pytest.mark.parametrize("given", [(700, 10, 10), (0, 10, 10), (90_000, 90, 900)])
def test_the_garbage_collector_works_rarely_until_the_last_asks_no_more(
    given: tuple[int, int, int],
) -> None:
    before = gc.get_threshold()
    gc.set_threshold(*given)
    try:
        with contextlib.suppress(KeyError), rare_collections():
            with rare_collections():
                inside = gc.get_threshold()
            assert gc.get_threshold() == inside  # as another thread's rewrite may go on
            raise KeyError
        assert gc.get_threshold() == given
    finally:
        gc.set_threshold(*before)
    assert inside[0] == (0 if not given[0] else max(given[0], 50_000))
