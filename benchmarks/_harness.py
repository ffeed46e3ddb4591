"""What every benchmark here shares: interleaved timing, and results with their circumstances.

A speed is a ratio of two things timed in turn within one process: a machine that is busy for a
while slows both. A figure without its command, machine and versions cannot be repeated, so
`write_results` adds them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ISA = (
    "avx2 fma avx512f avx512_vnni avx_vnni avx_vnni_int8 avx512_bf16 avx512_fp16 amx_tile amx_int8 "
    "amx_bf16 asimddp i8mm bf16 sve sve2"
).split()

SETS = {
    "AMX-int8": "amx_int8",
    "AVX-512-VNNI": "avx512_vnni",
    "AVX-VNNI": "avx_vnni",
    "AVX-512": "avx512f",
    "AVX2": "avx2",
}
"""What decides how fast integers are multiplied, best first, and the flag that tells of each."""

KEPT_HEAP = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}

Rows = Sequence[Mapping[str, Any]]


def load_script(path: str) -> ModuleType:
    """A file of this repository as a module, e.g. `load_script("examples/_data.py")`.

    By its path, because the repository's root must stay off `sys.path`: its folder `kernels` would
    shadow the distribution of that name which transformers imports.
    """
    name = "_script_" + re.sub(r"\W", "_", path)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        assert spec is not None, path
        assert spec.loader is not None, path
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
        folder = str((ROOT / path).parent)  # where it finds its neighbours, as when it is run
        sys.path.insert(0, folder)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.path.remove(folder)
    return sys.modules[name]


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; it may add its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a short look; writes no results")
    # as many as OMP_NUM_THREADS says, where several benchmarks share the cores
    threads = int(os.environ.get("OMP_NUM_THREADS", cores()))
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument(
        "--out", type=Path, help="folder for the results (default: benchmarks/results)"
    )
    return parser


def keep_the_heap() -> None:
    """Begins this script anew with a C heap that keeps what is freed, as jemalloc and tcmalloc do.

    glibc gives memory back when the top of its heap is free, and gets it again page by page: up to
    a third of a forward, at moments that depend on all that the process did before.
    """
    if any(os.environ.get(name) != value for name, value in KEPT_HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT_HEAP})


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses, sets torch's threads, and settles `out`: None where nothing is to be written."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.out is None and not args.quick:
        args.out = RESULTS
    return args


def interleaved(
    fns: Mapping[str, Callable[[], object]], rounds: int = 30, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of every call: each round calls every function once, in an order that rotates.

    Args:
        fns: what to time, by name; each must end only when its work is done (on CUDA: synchronize).
        rounds: timed calls per function.
        warmup: untimed rounds before.
    """
    if rounds < 1 or not fns:
        raise ValueError(f"nothing to time: {rounds} rounds of {len(fns)} functions")
    for _ in range(warmup):
        for fn in fns.values():
            fn()
    times: dict[str, list[float]] = {name: [] for name in fns}
    names = list(fns)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            fns[name]()
            times[name].append(time.perf_counter() - start)
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def speedup(times: Mapping[str, list[float]], name: str, over: str) -> tuple[float, float, float]:
    """Quartiles of t(over)/t(name), round by round: above 1 where `name` is the faster."""
    return quartiles([a / b for a, b in zip(times[over], times[name], strict=True)])


def timing_rows(times: Mapping[str, list[float]], over: str) -> list[dict[str, Any]]:
    """One table row per function: milliseconds and speed relative to `over`, with quartiles."""
    rows = []
    for name, values in times.items():
        low, median, high = quartiles(values)
        slow, ratio, fast = speedup(times, name, over)
        rows.append(
            {
                "what": name,
                "median ms": round(median * 1e3, 3),
                "quartiles ms": f"{low * 1e3:.3f} – {high * 1e3:.3f}",
                f"× over {over}": round(ratio, 3),
                "quartiles ×": f"{slow:.2f} – {fast:.2f}",
            }
        )
    return rows


def cores() -> int:
    """Cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What of this machine a figure depends on: CPU, cores, threads, instruction sets, OS."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except FileNotFoundError:
        text = ""
    info = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": [flag for flag in ISA if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages or ("rewriter", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def command() -> str:
    """This run, as typed from the repository's root."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def markdown_table(rows: Rows) -> str:
    """Rows of equal keys as a Markdown table; floats with four significant digits."""
    if not rows:
        return "(no rows)"
    keys = list(rows[0])
    if any(list(row) != keys for row in rows):
        raise ValueError(f"rows of one table differ in their columns; the first has {keys}")
    lines = [keys, ["---"] * len(keys)] + [[_cell(row[key]) for key in keys] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def instruction_set(isa: Sequence[str]) -> str:
    """The best of SETS that these flags have, "other" where they have none."""
    return next((name for name, flag in SETS.items() if flag in isa), "other")


def write_results(
    name: str,
    title: str,
    tables: Mapping[str, Rows],
    *,
    command: str,
    notes: str = "",
    out: Path | None = RESULTS,
    by_isa: bool = False,
) -> str:
    """Prints the results and writes `<out>/<name>.md` and `<out>/<name>.json`, each atomically.

    Args:
        tables: rows (mappings with equal keys) by heading.
        command: what repeats the run, typed from the repository's root.
        notes: a paragraph on what was measured and what the figures do not say.
        out: the folder; None to print only.
        by_isa: whether the figures depend on the instruction set so much that those of CPUs with
            another one are kept: a section each, and under "others" in the JSON file.

    Returns:
        The Markdown of this run.

    Raises:
        ValueError: the name is not a plain file name, the rows of a table differ in their columns,
            or a figure is NaN or infinite. Nothing is written then.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise ValueError(f"result name {name!r}: use letters, digits, '-' and '_'")
    record = {
        "name": name,
        "title": title,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "notes": notes,
        "tables": {heading: [dict(row) for row in rows] for heading, rows in tables.items()},
    }
    text = f"# {title}\n\n" + _section(record)
    json.dumps(record, allow_nan=False)
    print(text)
    if out is not None:
        path = out / f"{name}.json"
        if others := _of_others(path, record) if by_isa else []:
            record = {**record, "others": others}
        out.mkdir(parents=True, exist_ok=True)
        _write(out / f"{name}.md", rendered(record))
        _write(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return text


def rendered(record: Mapping[str, Any]) -> str:
    """The Markdown of a file of results, which has a part for each set of instructions."""
    own = {k: v for k, v in record.items() if k != "others"}
    runs = sorted([own, *record.get("others", [])], key=_rank)
    parts = [_section(run) for run in runs]
    if len(runs) > 1:
        parts = [f"# On a CPU with {_set_of(run)}\n\n{_section(run)}" for run in runs]
    return f"# {record['title']}\n\n" + "\n".join(parts)


def _section(record: Mapping[str, Any]) -> str:
    """Tables, notes and circumstances of one run, in Markdown."""
    here = record["machine"]
    parts = [f"## {key}\n\n{markdown_table(rows)}" for key, rows in record["tables"].items()]
    parts += [record["notes"]] if record["notes"] else []
    parts.append(
        f"`{record['command']}`, {record['date']}, {here['cpu']}, {here['cores']} cores, "
        f"{here['threads']} threads ({', '.join(here['isa']) or 'no listed instruction sets'}), "
        + ", ".join(f"{package} {number}" for package, number in record["versions"].items())
        + "."
    )
    return "\n\n".join(parts) + "\n"


def _set_of(record: Mapping[str, Any]) -> str:
    return instruction_set(record["machine"]["isa"])


def _rank(record: Mapping[str, Any]) -> int:
    names = [*SETS, "other"]
    return names.index(_set_of(record))


def _of_others(path: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs kept in a file of results that CPUs with other instruction sets made."""
    if not path.exists():
        return []
    kept = json.loads(path.read_text(encoding="utf-8"))
    runs = [{k: v for k, v in kept.items() if k != "others"}, *kept.get("others", [])]
    return sorted((run for run in runs if _set_of(run) != _set_of(record)), key=_rank)


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
