"""Damaged saves: `load` gives the model that the files hold, or an error of the package, in seconds
and within bounds of memory.

A case is a number: it picks a save, one to three changes to its recipe, its weights or its files,
and whether the checksum is made to fit again. The same number makes the same case.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import pathlib
import random
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from rewriter import RewriteError, load, rewrite
from rewriter.passes import (
    Monarch,
    MonarchChain,
    MonarchLinear,
    MonarchResidual,
    Quadratic,
    Quantize,
    RemoveBlocks,
    ResizeMLP,
    TopK,
)

SECONDS, BYTES = 5.0, 2 << 30
"""What a load may take: seconds of the processor, and memory beyond what was taken before."""

X = torch.linspace(-1, 1, 64).reshape(4, 16)


class Functional(nn.Module):
    """Its layer exists in the graph only."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(nn.functional.linear(x, self.w))


class Odd(nn.Module):
    """Ties, buffers of all sorts, extra state, and a layer of the package in the original."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(16)
        self.own = MonarchLinear(16, 16)
        self.register_buffer("angle", torch.randn(3, dtype=torch.complex128))
        self.register_buffer("loose", torch.randn(16), persistent=False)
        self.seen = torch.zeros(2)

    def get_extra_state(self) -> Tensor:
        return self.seen

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = state.reshape(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.norm(self.b(torch.relu(self.a(x))))) + self.loose


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


BASES: dict[str, tuple[Callable[[], nn.Module], list[Any], dict[str, Any]]] = {
    "monarch": (mlp, [Monarch()], {}),
    "int8": (mlp, [Monarch(), Quantize()], {}),
    "odd": (Odd, [Quantize()], {}),
    "quadratic": (mlp, [Quadratic()], {}),
    "topk": (mlp, [TopK(8)], {}),
    "chain": (mlp, [MonarchChain(order=3)], {}),
    "stars": (mlp, [MonarchChain(stars=1)], {}),
    "residual": (mlp, [MonarchResidual()], {}),
    "budget": (mlp, [Monarch()], {"memory_budget": 0.9}),
    "resized": (Blocks, [ResizeMLP(0.5)], {}),
    "removed": (Blocks, [RemoveBlocks(where="blocks.1")], {}),
    "functional": (Functional, [Monarch()], {}),
}
FEW = ("monarch", "int8", "odd", "chain")
"""Bases that are quickly made and loaded."""


@dataclass
class Save:
    """A whole save, and the model that it belongs to."""

    name: str
    model: nn.Module
    recipe: dict[str, Any]
    weights: bytes


def saves(folder: pathlib.Path, names: tuple[str, ...] = tuple(BASES)) -> list[Save]:
    """One save of each base."""
    found = []
    for name in names:
        build, passes, options = BASES[name]
        torch.manual_seed(0)
        model = build()
        model.train(bool(options)).eval()
        path = folder / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rewrite(model.train(bool(options)), passes, X, **options).eval().save(path)
        recipe = json.loads((path / "recipe.json").read_text())
        found.append(Save(name, model, recipe, (path / recipe["weights"]).read_bytes()))
    return found


# changes


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3.5, 10**8, 10**18 + 9, 2**63, 10**400, -(10**18), 1e308,
    float("nan"), float("inf"), "", "x", "0", "0.weight", "weight", "a.b", "../../up", "a\0b",
    "\x1b[31mred", "9**999999999", "1/0", "os.system", "torch.nn.modules.linear.Linear",
    "rewriter.passes.monarch.MonarchLinear", "float32", "int8", "linear", "sqrt", "y" * 9999,
    [], {}, [[]], [0], [1, 2], [None], {"a": 1}, {"": None}, _deep(50), _deep(400),
    {"tensor": [10**6, 10**6], "dtype": "float32", "fill": 0}, {"peak": 10**400},
)  # fmt: skip


def _junk(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(JUNK))  # the next change may be one of it


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in tables and lists."""
    inner: Any = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, item in inner:
        yield (*at, key)
        yield from _places(item, (*at, key))


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def change_recipe(recipe: dict[str, Any], rng: random.Random) -> None:
    """One change of what a recipe says."""
    places = list(_places(recipe))
    if rng.random() < 0.7:  # the report is most of it, and the least dangerous
        places = [p for p in places if p[0] != "report"]
    place = rng.choice(places)
    holder, key, old = _at(recipe, place[:-1]), place[-1], _at(recipe, place)
    kind = rng.choice(("junk", "junk", "drop", "twice", "swap", "number", "nest", "more"))
    if kind == "drop":
        del holder[key]
    elif kind == "twice" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(old))
    elif kind == "swap":
        holder[key] = copy.deepcopy(_at(recipe, rng.choice(places)))
    elif kind == "number" and type(old) in (int, float):
        holder[key] = rng.choice((old + 1, -old, old * 2, old * 10**9, old - 1, float(old)))
    elif kind == "nest":
        holder[key] = rng.choice(([old], {"value": old}))
    elif kind == "more":
        table = old if isinstance(old, dict) else recipe
        table[rng.choice(("more", "bias", "nblocks", "0.bias", "a\0b"))] = _junk(rng)
    else:
        holder[key] = _junk(rng)


def change_text(text: str, rng: random.Random) -> str:
    """One change of the recipe's text."""
    at = rng.randrange(len(text))
    kind = rng.choice(("cut", "letter", "again", "deep", "empty", "zero"))
    if kind == "cut":
        return text[:at]
    if kind == "letter":
        return text[:at] + rng.choice('{}[]",:0x\0\u2028') + text[at + 1 :]
    if kind == "again":  # a key twice
        key = rng.choice(("format", "layers", "weights", "sha256", "ties"))
        return text.rstrip()[:-1] + f', "{key}": {json.dumps(rng.choice(JUNK))}}}'
    if kind == "deep":
        return text.replace('"layers": [', '"layers": [' + "[" * 50_000, 1)
    return "" if kind == "empty" else "\0" * 100


def change_weights(data: bytes, rng: random.Random) -> bytes:
    """One change of a weights file: of its header, of its length, of its bytes."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = rng.choice(("flip", "head", "cut", "grow", "length", "dtype", "dtype", "shape", "shape",
                       "offset", "drop", "name", "empty", "junk"))  # fmt: skip
    if kind == "flip":
        at = rng.randrange(8 + size, len(data))
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == "head":
        at = rng.randrange(8 + size)
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == "cut":
        return data[: rng.randrange(len(data))]
    if kind == "grow":
        return data + bytes(rng.randrange(1, 100))
    if kind == "length":
        wrong = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63 - 1, 2**64 - 1))
        return wrong.to_bytes(8, "little") + data[8:]
    if kind == "empty":
        return b""
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    if kind == "dtype":
        entry["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I8", "U8", "I32", "I64", "BOOL",
                                     "C64", "F8_E4M3", "F4", "", 7))  # fmt: skip
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice((shape[::-1], [*shape, 1], shape[1:], [2**40], [-1], "x", [0]))
    elif kind == "offset":
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(([start, 2**60], [end, start], [0, 0], [-4, end], []))
    elif kind == "drop":
        del header[name]
    elif kind == "name":
        header[rng.choice(("x", "0.weight", "0.bias", "a\0b", ""))] = header.pop(name)
    else:
        header[name] = _junk(rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def change_files(folder: pathlib.Path, weights: str, rng: random.Random) -> None:
    """Another kind of file in a file's place."""
    path = folder / rng.choice(("recipe.json", weights))
    kind = rng.choice(("missing", "folder", "pipe", "zero", "loop", "link", "sparse"))
    target = path.with_name("elsewhere")
    if kind == "link":  # harmless: what it leads to is read
        os.replace(path, target)
    else:
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    elif kind != "missing":
        path.symlink_to({"zero": "/dev/zero", "loop": path.name, "link": "elsewhere"}[kind])


# cases


@dataclass
class Outcome:
    """What became of a case: "loaded", "refused", or what is wrong with it."""

    seed: int
    base: str
    changes: list[str] = field(default_factory=list)
    said: str = ""
    wrong: str = ""
    seconds: float = 0.0
    grown: int = 0


def make(seed: int, known: list[Save], folder: pathlib.Path) -> tuple[Save, list[str]]:
    """Writes the damaged save of this number; the save that it was, and what was changed."""
    rng = random.Random(seed)
    save = rng.choice(known)
    recipe, weights = copy.deepcopy(save.recipe), save.weights
    kinds = rng.choices(
        ("recipe", "weights", "text", "files"), (60, 25, 8, 7), k=rng.choice((1, 1, 2, 3))
    )
    for kind in kinds:
        if kind == "recipe":
            change_recipe(recipe, rng)
        elif kind == "weights" and weights == save.weights:
            weights = change_weights(weights, rng)
    if rng.random() < 0.8 and "sha256" in recipe:
        recipe["sha256"] = hashlib.sha256(weights).hexdigest()
    text = json.dumps(recipe)
    text = change_text(text, rng) if "text" in kinds else text
    folder.mkdir()
    (folder / "recipe.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    (folder / save.recipe["weights"]).write_bytes(weights)
    if "files" in kinds:
        change_files(folder, save.recipe["weights"], rng)
    return save, kinds


def run(seed: int, known: list[Save], folder: pathlib.Path) -> Outcome:
    """One case: what `load` did with it."""
    where = folder / str(seed)
    save, changes = make(seed, known, where)
    outcome = Outcome(seed, save.name, changes)
    before, start = _peak(), time.process_time()
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load(where, save.model)
            outcome.said = "loaded"
            _use(model, where, folder / f"{seed} again")
    except RewriteError as error:
        outcome.said = outcome.said or f"refused: {type(error).__name__}: {error}"[:300]
    except BaseException as error:  # whatever else it is, that is the finding
        outcome.wrong = f"{type(error).__name__}: {error}"[:300]
    outcome.seconds, outcome.grown = time.process_time() - start, _peak() - before
    if not outcome.wrong and (outcome.seconds > SECONDS or outcome.grown > BYTES):
        outcome.wrong = f"took {outcome.seconds:.1f} s and {outcome.grown >> 20} MiB"
    return outcome


def _use(model: Any, where: pathlib.Path, again: pathlib.Path) -> None:
    """A loaded model has the tensors that the file holds, says so, and can be saved."""
    recipe = json.loads((where / "recipe.json").read_text(encoding="utf-8"))
    held = safetensors.torch.load((where / recipe["weights"]).read_bytes())
    own = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    for name, value in held.items():
        if name in recipe.get("complex", {}):
            value = torch.view_as_complex(value)
        if name in recipe.get("extra_state", ()):
            continue
        assert own[name].dtype == value.dtype, f"{name} has another dtype than the file"
        same = (t.detach().reshape(-1).view(torch.uint8) for t in (own[name], value))
        assert torch.equal(*same), f"{name} has another value than the file"
    with torch.no_grad(), contextlib.suppress(RewriteError):
        model(X)
    with contextlib.suppress(RewriteError):
        str(model.report)
        model.report.to_markdown()
        model.report.to_json()
    for size in model.report.sizes:
        with contextlib.suppress(RewriteError):
            model.report.at(**{size: 3})
    with contextlib.suppress(RewriteError):
        model.save(again)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A case that does not end, or that eats memory, raises."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    # mapped is not taken: a weights file of the largest size is mapped twice
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * BYTES, hard))
    old = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, 4 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {4 * SECONDS:.0f} s")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
