"""Cases in processes of their own, several at a time, so that none can take the others with it.

A kernel that reads past its memory leaves its process without a usable card, one that never ends
leaves it waiting, and an assertion in a library ends it: the case is then a failure with its
reason, and a fresh process goes on with the next. Rows arrive as they are found, so that what a
case had found before it failed stays.

A worker reads numbers of cases from its input, one a line, and answers with lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Case", "Outcome", "Row", "run_cases", "serve"]

Row = dict[str, Any]
Found = Iterator[tuple[str, Row]]
_LOST = ("CUDA error", "illegal memory access", "launch failure", "device-side assert")


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Args:
        name: for the tables of failures.
        run: yields (heading of a table, row) pairs.
        seconds: after which its process is ended.
    """

    name: str
    run: Callable[[], Found]
    seconds: float = 100.0


@dataclass
class Outcome:
    """What became of the cases of one part; rows in the order of the cases."""

    rows: dict[int, list[tuple[str, Row]]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)

    def tables(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for number in sorted(self.rows):
            for heading, row in self.rows[number]:
                found.setdefault(heading, []).append(row)
        return found


# The worker's side


def serve(cases: Sequence[Case], after: Callable[[], object] = lambda: None) -> None:
    """Runs the cases whose numbers come in, until the input ends or the card is lost.

    Args:
        cases: all of them.
        after: called behind each case, to give back what it took.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints must not disturb the answers

    def say(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    say(ready=True)
    for line in sys.stdin:
        try:
            for heading, row in cases[int(line)].run():
                say(heading=heading, row=row)
        except Exception as error:
            text = _reason(error)
            traceback.print_exc()
            say(failed=text)
            if any(sign in text for sign in _LOST):
                return
        else:
            after()
            say(done=True)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{' …' if len(text) > 300 else ''}"


# The parent's side


def run_cases(
    command: Sequence[str],
    cases: Sequence[Case],
    workers: int,
    until: float,
    environment: Mapping[str, str],
) -> Outcome:
    """Hands the cases out, in order, until `time.monotonic()` is `until`.

    Args:
        command: starts a worker that serves these same cases.
        workers: at most so many at a time.
        environment: variables of the workers, beside this process's.
    """
    waiting: queue.Queue[int] = queue.Queue()
    for number in range(len(cases)):
        waiting.put(number)
    outcome = Outcome()
    crew = [
        threading.Thread(
            target=_keep_working, args=(command, cases, waiting, until, environment, outcome)
        )
        for _ in range(min(workers, len(cases)))
    ]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return outcome


def _keep_working(
    command: Sequence[str],
    cases: Sequence[Case],
    waiting: queue.Queue[int],
    until: float,
    environment: Mapping[str, str],
    outcome: Outcome,
) -> None:
    while not waiting.empty() and time.monotonic() < until:
        with _Worker(command, environment) as worker:
            if not worker.ready(until):
                return
            for number in _next(waiting, until):
                if not worker.work(number, cases[number].seconds, until, outcome):
                    break


def _next(waiting: queue.Queue[int], until: float) -> Iterator[int]:
    while time.monotonic() < until:
        try:
            yield waiting.get_nowait()
        except queue.Empty:
            return


class _Worker:
    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.told = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.told, text=True,
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self._end()
        self.told.close()

    def ready(self, until: float) -> bool:
        """Whether the process came up; says on the standard error why not."""
        if any("ready" in answer for answer in self._answers(until - time.monotonic(), 1)):
            return True
        print(f"a worker did not start: {self._last_words()}", file=sys.stderr)
        return False

    def work(self, number: int, seconds: float, until: float, outcome: Outcome) -> bool:
        """One case; whether the process can take another."""
        assert self.process.stdin is not None
        outcome.reached.add(number)
        try:
            self.process.stdin.write(f"{number}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            outcome.failed[number] = f"process died before: {self._last_words()}"
            return False
        rows = outcome.rows.setdefault(number, [])
        limit = min(seconds, max(until - time.monotonic(), 0) + 30)
        start = time.monotonic()
        for answer in self._answers(limit):
            if "row" in answer:
                rows.append((answer["heading"], answer["row"]))
            elif "failed" in answer:
                outcome.failed[number] = answer["failed"]
                return not any(sign in answer["failed"] for sign in _LOST)
            else:
                return True
        took = time.monotonic() - start
        reason = f"ended after {limit:.0f} s without a result" if took > limit else "process died"
        outcome.failed[number] = f"{reason}: {self._last_words()}"
        return False

    def _answers(self, seconds: float, most: int = 1 << 30) -> Iterable[Mapping[str, Any]]:
        """Lines until the process ends, or is ended after so many seconds."""
        timer = threading.Timer(max(seconds, 0.1), self._end)
        timer.start()
        try:
            assert self.process.stdout is not None
            for _, line in zip(range(most), self.process.stdout, strict=False):
                yield json.loads(line)
        finally:
            timer.cancel()

    def _end(self) -> None:
        """The process and those that it started (a compiler's workers)."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _last_words(self) -> str:
        self.process.wait()
        self.told.seek(0)
        lines = [line.strip() for line in self.told.read().splitlines() if line.strip()]
        return f"exit status {self.process.returncode}; {' / '.join(lines[-3:])[-400:]}"
