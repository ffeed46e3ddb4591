"""Fixtures shared by all tests: goldens that update themselves with `pytest --accept`."""

from __future__ import annotations

import gc
import inspect
import pathlib
import textwrap
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from rewriter.engine.engine import Engine
from rewriter.engine.slower import Lost
from rewriter.kernels import attention, sparse

# an example may be the first to need what all of a file share, on a machine that is busy
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


@pytest.fixture(autouse=True, scope="session")
def no_timing() -> Iterator[None]:
    """That a rewrite made a small model slower, on a machine that runs tests, is no news; and no
    result goes by a time: what is lowered stays so, as its bits are other ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lost, "add", lambda *_: None)
        patch.setattr(Engine, "_lowering_pays", lambda _: True)
        patch.setattr(attention, "pick", lambda *_: "native")
        patch.setattr(sparse, "_measured", lambda *_: 1.0)
        yield


@pytest.fixture(autouse=True, scope="session")
def rare_collections() -> None:
    """The garbage collector went over all of torch and of the tests again and again, a tenth of the
    time: what is there by now stays, and the rest is looked at less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


FIRST = ["test_fuzz.py", "test_interop.py", "test_benchmarks.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest a test first, so that workers that share out what is left end together."""
    items.sort(key=lambda i: FIRST.index(i.path.name) if i.path.name in FIRST else len(FIRST))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite goldens that differ")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(actual, expected)`: equal up to indentation, or accepted into the test's source."""

    def check(actual: str, expected: str) -> None:
        wanted = textwrap.dedent(expected).strip("\n").rstrip()
        if actual == wanted:
            return
        if not request.config.getoption("--accept"):
            assert actual == wanted
        frame = inspect.stack()[1]
        path = pathlib.Path(frame.filename)
        source = path.read_text()
        assert source.count(expected) == 1, "the golden is not a unique literal of its test"
        indent = " " * 8
        path.write_text(source.replace(expected, f"\n{textwrap.indent(actual, indent)}\n{indent}"))

    return check
