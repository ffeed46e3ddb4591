"""The command line: `python -m rewriter report module:factory --pass monarch:nblocks=4`.

What goes wrong is one line on stderr (after the usage, for arguments), and the exit code is 2.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rewriter.errors import OptionError, RewriteError, StoreError, printable
from rewriter.modules.paths import path_of

__all__ = ["main"]

_SUFFIX = {"html": ".html", "json": ".json", "markdown": ".md"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code (0, or 2 after an error)."""
    args = _parser().parse_args(argv)
    try:
        with _plain_warnings():
            args.run(args)
    except RewriteError as error:
        print(f"rewriter: error: {_shortened(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `rewriter devices | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("rewriter: stopped", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    """Argparse's, whose errors quote what was given: at any length, with all that it holds."""

    def error(self, message: str) -> NoReturn:
        super().error(_shortened(printable(message)))


def _shortened(text: str, most: int = 1000) -> str:
    """The text, or where it is longer its beginning and its end, which says what to do."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rewriter", description="Rewrites PyTorch models and says what each rewrite costs."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_report(commands)
    devices = commands.add_parser(
        "devices", help="list the devices that times can be predicted for",
        description="Lists the devices whose times can be predicted.",
    )  # fmt: skip
    devices.add_argument(
        "--calibrate", action="store_true", help="measure this machine anew (up to 20 s)"
    )
    devices.set_defaults(run=_devices)
    return parser


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report", help="what passes would do to a model",
        description="Prints what passes would do to a model: cost before and after each, and "
        "every decision. The model itself is not changed.",
    )  # fmt: skip
    report.add_argument(
        "model", metavar="module:factory",
        help="a callable that returns a model, or (model, example inputs); file.py:factory too",
    )  # fmt: skip
    report.add_argument(
        "--pass", dest="passes", action="append", default=[], metavar="NAME:OPTIONS",
        help="e.g. monarch:nblocks=4, quantize:int8-dynamic; may be given several times, in order",
    )  # fmt: skip
    report.add_argument("--device", help="predict times and energy, e.g. h100, or this")
    report.add_argument("--measure", action="store_true", help="measure times on this machine too")
    report.add_argument("--objective", choices=("params", "memory", "latency"))
    report.add_argument("--max-error", type=float, metavar="E", help="decline layers beyond it")
    report.add_argument("--where", metavar="PATTERN", help="only these layers, e.g. 'encoder.*'")
    report.add_argument("--batch", type=int, metavar="N", help="price at this batch size")
    report.add_argument("--sequence", type=int, metavar="N", help="price at this sequence length")
    report.add_argument(
        "--at", action="append", default=[], metavar="NAME=SIZE", help="price at another open size"
    )
    report.add_argument("--quiet", action="store_true", help="print nothing but errors")
    report.add_argument("--html", type=Path, metavar="FILE", help="write one page with plots")
    for name in ("json", "markdown"):
        report.add_argument(
            f"--{name}", nargs="?", type=Path, const=Path("-"), metavar="FILE",
            help=f"write {name.upper() if name == 'json' else 'Markdown'}; without FILE, print it",
        )  # fmt: skip
    report.set_defaults(run=_report)


# report


def _report(args: argparse.Namespace) -> None:
    from rewriter.api import explain
    from rewriter.cost import Device
    from rewriter.recipe.parse import built, here, parse_pass, parse_sizes

    # all that can be wrong is looked at before the long work
    files = {n: p for n in _SUFFIX if (p := getattr(args, n)) is not None}
    printed = [n for n, path in files.items() if n != "html" and str(path) == "-"]
    if len(printed) > 1:
        raise OptionError("--json and --markdown cannot both be printed: give one a file")
    for name, path in files.items():
        if name not in printed:
            _check_file(name, path)
    passes = [parse_pass(text) for text in args.passes]
    sizes: dict[str, Any] = {**parse_sizes(args.at)}
    sizes |= {n: v for n in ("batch", "sequence") if (v := getattr(args, n)) is not None}
    if args.max_error is not None and not args.max_error >= 0:
        raise OptionError(f"--max-error {args.max_error}: use a number of at least 0")
    if args.device is not None and args.device.lower() != "this":  # that one is measured
        Device.get(args.device)
    with here():
        model, inputs = built(args.model)
        if args.measure and inputs is None:
            raise OptionError(
                f"--measure needs example inputs: let {args.model} return (model, example inputs)"
            )
        report = explain(
            model,
            passes,
            inputs,
            objective=args.objective,
            max_error=args.max_error,
            where=args.where,
            device=args.device,
            measure=args.measure,
        )
    if sizes:
        report = report.at(**sizes)
    for name, path in files.items():
        if name not in printed:
            report.save(path)
    if printed:
        text = report.to_json() if printed == ["json"] else report.to_markdown()
        print(_for_a_terminal(text.rstrip("\n")))
    elif args.quiet:
        return
    elif sys.stdout.isatty():
        _print(report)
    else:
        print(report)
    for name, path in files.items():
        if name not in printed:
            print(f"wrote {path}", file=sys.stderr if printed else sys.stdout)


def _for_a_terminal(text: str) -> str:
    """JSON or Markdown without what a terminal obeys; JSON says the same after."""
    found = {c for c in text if printable(c) != c}
    return text.translate({ord(c): f"\\u{ord(c):04x}" for c in found})


def _check_file(name: str, path: Path) -> None:
    """That a report can be written there.

    Raises:
        OptionError: the suffix is another format's.
        StoreError: the folder is missing or may not be written to, or the path is a folder, or none
            that a file can have.
    """
    if path_of(path, f"--{name}").is_dir():
        raise StoreError(f"cannot write {path}: it is a directory")
    if path.suffix.lower() != _SUFFIX[name]:
        raise OptionError(f"--{name} {path}: the suffix must be {_SUFFIX[name]}")
    folder = path.parent
    if not folder.is_dir():
        raise StoreError(f"cannot write {path}: there is no directory {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(f"cannot write {path}: the directory {folder} may not be written to")


def _print(what: Any) -> None:
    """To the terminal in colour, to a pipe at 100 columns."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    Console(width=None if terminal else 100, highlight=False, markup=False).print(what)


# devices


def _devices(args: argparse.Namespace) -> None:
    from rich import box
    from rich.table import Table

    from rewriter.cost import Device
    from rewriter.report import format as fmt

    found = [Device.get(name) for name in Device.names() if name != "this"]
    if args.calibrate:
        found.insert(0, Device.this_machine(refresh=True))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    header = "device", "fp32", "bf16", "int8", "memory", "on chip", "source"
    for i, name in enumerate(header):
        words = i in (0, 6)
        table.add_column(
            name, justify="left" if words else "right", no_wrap=i < 4,
            style="cyan" if i == 0 else None, overflow="fold",
        )  # fmt: skip
    for device in found:
        far, near = device.levels[-1], device.levels[-2] if len(device.levels) > 1 else None
        cache = "" if near is None or math.isinf(near.capacity) else fmt.size(near.capacity)
        table.add_row(
            device.name,
            *(fmt.rate(device.peak(d), "") for d in ("float32", "bfloat16", "int8")),
            f"{far.name} {fmt.rate(far.bandwidth, 'B/s')}",
            f"{near.name} {cache}" if near is not None and cache else "",
            device.source,
        )
    _print(table)
    _print("Peaks are dense FLOP/s (int8: OP/s) of the matrix units.")
    if not args.calibrate:
        _print("`this` is the machine you are on: --calibrate measures it, up to 20 s.")


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings of ours as one line on stderr, without the place in this file they pass through;
    for the whole process, which is the command line's own."""
    from rewriter.errors import RewriteWarning

    usual = warnings.showwarning

    def show(message: Any, category: Any, *rest: Any, **named: Any) -> None:
        if issubclass(category, RewriteWarning):
            print(f"rewriter: warning: {message}", file=sys.stderr)
        else:
            usual(message, category, *rest, **named)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
