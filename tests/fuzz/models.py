"""Random small models, as the source of a class: what a user might write, and odder.

`drawn(seed)` writes `class Model(nn.Module)`: layers with their names, a forward of some ten
lines, and the arguments of a call. Inputs are tokens, vectors with and without a batch, sequences
and images, one by one, as rest, keywords or a mapping. Layers are shared, tied, frozen, hooked and
parametrized; weights are used by functions; sizes and values are branched on; operations write in
place; names are such as no identifier is. The same seed gives the same text.
"""

from __future__ import annotations

import itertools
import linecache
import random
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FORMS", "Call", "Source", "drawn"]

FORMS = ("example", "defaults", "others", "swapped")
"""How a call may give its arguments: as the example does; with the others at their defaults; the
others alone; by position what went by keyword, and the other way round."""

NAMES = ("in", "class", "0", "a b", "x-y", "é", "self", "forward_", "weight_", "quote'", '"', "\n")
"""Keys of a ModuleDict that are no identifiers, or that a generated function could take for its
own."""

ATTRIBUTES = ("report", "graph", "save", "output", "torch", "F", "args", "memory", "_x", "model")
"""Names of layers that a rewritten model or a generated function could use itself."""

MODULES = ("nn.ReLU()", "nn.GELU()", "nn.SiLU()", "nn.Hardswish()", "nn.ReLU(inplace=True)",
           "nn.ELU()", "nn.PReLU()", "nn.LeakyReLU(0.2)", "nn.Softmax(-1)")  # fmt: skip

WRITERS = ("nn.ReLU(inplace=True)", "nn.Dropout(0.2, inplace=True)", "nn.SiLU(inplace=True)",
           "nn.LeakyReLU(0.1, inplace=True)")  # fmt: skip
"""Modules that write into what they are given."""

HOOKS = (
    "{}.register_forward_hook(double)",
    "{}.register_forward_hook(seen)",
    "{}.register_forward_pre_hook(halve)",
    "{}.register_forward_hook(named, with_kwargs=True)",
    "{}.register_full_backward_hook(back)",
)

RESULTS = (
    "x", "x", "x", "x", "(x, x.sum())", "{'y': x, 'none': None}", "[x]", "(x, x)",
    "Result(x, x.mean())", "Result(x)", "Pair(x, x.amax())", "(x, x.shape[0])",
    "{'y': x, 'parts': [x.mean(-1), (x.sum(), 3)]}", "OrderedDict(y=x, z=2 * x)",
)  # fmt: skip

PREAMBLE = """\
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Pair = namedtuple("Pair", "first second")


@dataclass
class Result:
    y: object
    extra: object = None


class Scaled(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Own(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i) * i**-0.5)

    def forward(self, x):
        return F.linear(x, self.weight)


class Gated(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, h), nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x, *, scale=1.0):
        return x + scale * self.down(F.relu(self.up(self.norm(x))))


class Adapted(nn.Module):
    def __init__(self, i, o, r=2):
        super().__init__()
        self.base = nn.Linear(i, o)
        self.down, self.up = nn.Linear(i, r, bias=False), nn.Linear(r, o, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def double(module, args, output):
    return 2 * output


def seen(module, args, output):
    module.seen = tuple(output.shape)


def halve(module, args):
    return (0.5 * args[0], *args[1:])


def named(module, args, kwargs, output):
    return output + 1


def back(module, grads, outputs):
    return None


def called(module, args):
    module.calls = getattr(module, "calls", 0) + 1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict()
"""

HELPER = """
    def helper(self, x):
        \"\"\"A method that forward calls.\"\"\"
        return {} + 1
"""


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def example(self) -> Any:
        """As `rewrite` takes it: a mapping of keywords, one tensor, or a tuple."""
        if not self.args:
            return self.kwargs
        assert not self.kwargs
        one = len(self.args) == 1 and isinstance(self.args[0], Tensor)
        return self.args[0] if one else self.args


@dataclass
class Source:
    """A small model as Python source, and how it is called.

    Args:
        init, body, result: lines of `__init__` and of `forward`, and what forward returns.
        methods: further methods, as they stand in a class.
        kind: what x is: "tokens" or "long" [B, time(, width)], "wide" [B, width], "vector" [width],
            "image" [B, width, 4, 4].
        form: how forward takes its arguments: "plain", "keyword" only, `*rest`, `*args`,
            `**kwargs`, or as one "batch", a mapping.
        masked, option: there is a `mask`, a `scale`; `given` names those that the example gives.
        extra: so many tensors beside x in the example, of `*rest` and `*args`.
        keywords: the example gives x by its name.
        trains: the model is in training mode when it is rewritten.
    """

    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    result: str = "x"
    methods: str = ""
    kind: str = "long"
    time: int = 4
    rows: int = 2
    width: int = 8
    dtype: torch.dtype = torch.float32
    form: str = "plain"
    masked: bool = False
    option: bool = False
    given: frozenset[str] = frozenset()
    extra: int = 0
    keywords: bool = False
    trains: bool = False
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x, without the batch."""
        shapes = {"tokens": (self.time,), "long": (self.time, self.width)}
        return {"image": (self.width, 4, 4), **shapes}.get(self.kind, (self.width,))

    @property
    def text(self) -> str:
        """The Python source of `Model`."""
        arguments, opening = self._arguments()
        text = PREAMBLE + "".join(f"        {line}\n" for line in self.init)
        text += f"{self.methods}\n    def forward({arguments}):\n"
        text += "".join(f"        {line}\n" for line in [*opening, *self.body])
        return text + f"        return {self.result}\n"

    def _arguments(self) -> tuple[str, list[str]]:
        """The signature of forward, and the lines that read its arguments."""
        defaults = [f"{n}={d}" for n, d, there in (("mask", None, self.masked),
                    ("scale", 1.0, self.option)) if there]  # fmt: skip
        added = "x = (x + other) % 20" if self.kind == "tokens" else "x = x + 0.5 * other"
        opening: list[str] = []
        if self.form in ("rest", "args"):
            opening += ["x, rest = args[0], args[1:]"] if self.form == "args" else []
            opening += ["for other in rest:", f"    {added}"]
        elif self.form == "kwargs":
            opening += [f"{d.partition('=')[0]} = kwargs.get({d.partition('=')[0]!r}, "
                          f"{d.partition('=')[2]})" for d in defaults]  # fmt: skip
        elif self.form == "batch":
            opening += ["x = batch['x']"] + (["mask = batch.get('mask')"] if self.masked else [])
        signature = {
            "plain": ", ".join(["self", "x", *defaults]),
            "keyword": ", ".join(["self", "x", *(["*"] if defaults else []), *defaults]),
            "rest": "self, x, *rest", "args": "self, *args", "kwargs": "self, x, **kwargs",
            "batch": "self, batch",
        }[self.form]  # fmt: skip
        return signature, opening

    def model(self) -> nn.Module:
        """The model, with the weights of this seed."""
        name = "fuzzed"
        module = types.ModuleType(name)
        file, text = f"<fuzzed {self.seed}>", self.text
        linecache.cache[file] = len(text), None, text.splitlines(True), file
        sys.modules[name] = module  # pickle looks the classes up there
        exec(compile(text, file, "exec", dont_inherit=True), vars(module))
        torch.manual_seed(self.seed)
        made: nn.Module = module.Model()
        return made.to(self.dtype).train(self.trains)

    def call(self, rows: int, seed: int = 0, form: str = "example", time: int = 0) -> Call:
        """A call with a batch of `rows` and sequences of `time` (0: the example's)."""
        generator = torch.Generator().manual_seed(seed + 1000 * rows)
        shape = self.shape if self.kind not in ("tokens", "long") or not time else (
            time, *self.shape[1:])  # fmt: skip
        batch = () if self.kind == "vector" else (rows,)
        count = self.extra if form == "example" else (self.extra + 1) % 3
        inputs = [self._input((*batch, *shape), generator) for _ in range(1 + count)]
        if self.form in ("rest", "args"):
            return Call(tuple(inputs))
        values: dict[str, Any] = {"scale": 0.5}
        values["mask"] = torch.rand((rows, *shape[:1]), generator=generator) < 0.3
        if self.form == "batch":
            given = self.masked and ("mask" in self.given) == (form == "example")
            batched = {"x": inputs[0]} | ({"mask": values["mask"]} if given else {})
            return Call((), {"batch": batched}) if self.keywords else Call((batched,))
        return self._bound(inputs[0], values, form)

    def _input(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.kind == "tokens":
            return torch.randint(20, shape, generator=generator)
        return torch.randn(shape, generator=generator).to(self.dtype)

    def _bound(self, x: Tensor, values: dict[str, Any], form: str) -> Call:
        """x and the optional arguments, by position or keyword as the form has it."""
        names = {"mask": self.masked, "scale": self.option}
        optional = [n for n, there in names.items() if there]
        defaults = {"mask": None, "scale": 1.0}
        given = {}
        for name in optional:
            if (name in self.given) != (form == "others"):
                given[name] = values[name]
            elif form == "defaults":
                given[name] = defaults[name]
        first = self.form == "plain" and [*given] == optional[: len(given)]
        keywords = self.keywords or (bool(given) and not first)
        if keywords != (form == "swapped"):
            return Call((), {"x": x, **given})
        return Call((x, *given.values())) if first else Call((x,), given)


def drawn(seed: int) -> Source:
    """A random model; the same seed gives the same."""
    return _Writer(seed).source()


class _Writer:
    def __init__(self, seed: int) -> None:
        self.random = pick = random.Random(seed)
        self._count = itertools.count()
        self._linears: list[tuple[str, int, int]] = []  # (expression, in, out), plain nn.Linear
        self._earlier: list[tuple[str, int, bool]] = []  # (variable, width, of [B, T, width])
        self._methods = ""
        self.init: list[str] = []
        self.body: list[str] = []
        self.kind = pick.choices(("tokens", "long", "wide", "image", "vector"), (5, 7, 6, 3, 1))[0]
        self.time = pick.choice((3, 4, 5, 8))
        self.rows = pick.choice((2, 2, 3, 4, 5, 8, 1))
        self.width = pick.choice((4, 8, 12, 16))
        self.long = self.kind in ("tokens", "long")  # x is [B, T, width], else [B, width]
        self.made = Source(kind=self.kind, time=self.time, rows=self.rows, width=self.width,
                           seed=seed, **self._form())  # fmt: skip
        self.masked = self.made.masked

    def _form(self) -> dict[str, Any]:
        """How the model is called."""
        pick = self.random
        dtype = pick.choices((torch.float32, torch.float64, torch.bfloat16), (10, 1.5, 1))[0]
        form = pick.choices(
            ("plain", "keyword", "rest", "args", "kwargs", "batch"), (6, 1.5, 1, 1, 1, 1)
        )[0]
        there = {"mask": self.long and form not in ("rest", "args") and pick.random() < 0.4}
        there["scale"] = form not in ("rest", "args", "batch") and pick.random() < 0.4
        given = frozenset(n for n, is_there in there.items() if is_there and pick.random() < 0.5)
        extra = pick.choice((0, 1, 2)) if form in ("rest", "args") else 0
        keywords = form in ("keyword", "kwargs") or pick.random() < 0.4
        return {"dtype": dtype, "form": form, "masked": there["mask"], "option": there["scale"],
                "given": given, "extra": extra, "keywords": keywords,
                "trains": pick.random() < 0.15}  # fmt: skip

    def source(self) -> Source:
        """The model, written."""
        if self.kind == "tokens":
            self.init.append(f"self.embed = nn.Embedding(20, {self.width})")
            self.body.append("x = self.embed(x)")
        if self.kind == "image":
            self._image()
        for _ in range(self.random.randint(1, 4)):
            self._step()
        if self.random.random() < 0.7:
            self._linear()
        if self.made.option:
            self.body.append("x = x * scale")
        result = self.random.choice(RESULTS)
        if self.random.random() < 0.1 and self._earlier:
            result = f"(x, {self.random.choice(self._earlier)[0]})"
        init = [*self.init, *self._marks()]
        return replace(self.made, init=init, body=self.body, result=result, methods=self._methods)

    def _marks(self) -> list[str]:
        """Lines of __init__ that come last: what is frozen, hooked, or in bfloat16 alone."""
        lines = []
        for expression, _, _ in self._linears:
            if self.random.random() < 0.08:
                lines.append(f"for p in {expression}.parameters(): p.requires_grad_(False)")
            if self.random.random() < 0.08:
                lines.append(self.random.choice(HOOKS).format(expression))
        if self.random.random() < 0.03 and self.made.form == "plain":
            lines.append("self.register_forward_pre_hook(called)")
        return lines

    def _step(self) -> None:
        steps: list[tuple[Callable[[], None], float]] = [
            (self._linear, 6), (self._functional, 2), (self._activation, 3), (self._norm, 1.5),
            (self._residual, 2), (self._gate, 1), (self._inplace, 2.5), (self._branch, 1),
            (self._cast, 0.5), (self._dropout, 0.7), (self._mlp, 1.5), (self._checkpoint, 0.3),
            (self._cat, 0.7), (self._state, 0.5), (self._loop, 0.5), (self._several, 0.7),
            (self._python, 0.7), (self._context, 0.4), (self._lookup, 0.3),
        ]  # fmt: skip
        if self.kind != "vector":
            steps += [(self._views, 1.5)]
        if self.long:
            steps += [(self._attention, 1), (self._recurrent, 0.2), (self._conv, 1),
                      (self._conv2d, 0.7), (self._pool, 0.4),
                      (self._mask, 1 if self.masked else 0)]  # fmt: skip
        step = self.random.choices([s for s, _ in steps], [w for _, w in steps])[0]
        if self.random.random() < 0.5:
            self._keep()
        step()

    def _keep(self) -> None:
        name = f"v{next(self._count)}"
        self.body.append(f"{name} = x")
        self._earlier.append((name, self.width, self.long))

    def _place(self, made: str, name: str = "") -> str:
        """Writes a layer under a name of one kind or another: the expression that reads it."""
        name = name or f"l{next(self._count)}"
        kind = self.random.random()
        if kind < 0.75:
            odd = self.random.choice(ATTRIBUTES)
            if self.random.random() < 0.04 and not any(f"self.{odd} " in i for i in self.init):
                name = odd
            self.init.append(f"self.{name} = {made}")
            return f"self.{name}"
        if kind < 0.9:
            key = self.random.choice(NAMES) + self.random.choice(("", name))
            if any(repr(key) in line for line in self.init):
                key += name
            self.init.append(f"self.parts[{key!r}] = {made}")
            return f"self.parts[{key!r}]"
        if kind < 0.95:
            self.init.append(f"self.{name} = nn.Sequential({made}, nn.Identity())")
            return f"self.{name}[0]"
        self.init.append(f"self.{name} = nn.ModuleList([{made}])")
        return f"self.{name}[-1]"

    def _out(self) -> int:
        return self.random.choice((self.width, self.width, 4, 6, 8, 16, 24))

    def _linear(self) -> None:
        old = [e for e, i, o in self._linears if i == self.width == o]
        if old and self.random.random() < 0.25:  # shared
            self.body.append(f"x = {self.random.choice(old)}(x)")
            return
        out = self._out()
        kind = self.random.random()
        bias = self.random.choice(("", ", bias=False"))
        if kind < 0.06:
            name = self._place(f"Scaled({self.width}, {out}{bias})")
        elif kind < 0.12:
            name = self._place(f"Own({self.width}, {out})")
        elif kind < 0.16:
            name = self._place(
                f"nn.utils.parametrizations.weight_norm(nn.Linear({self.width}, {out}{bias}))"
            )
        elif kind < 0.2:
            name = self._place(f"Adapted({self.width}, {out})")
        else:
            name = self._place(f"nn.Linear({self.width}, {out}{bias})")
            tied = [e for e, i, o in self._linears if (i, o) == (self.width, out)]
            if tied and self.random.random() < 0.3:
                self.init.append(f"{name}.weight = {self.random.choice(tied)}.weight")
            if self.random.random() < 0.04:
                self.init.append(f"self.again{next(self._count)} = {name}")
            self._linears.append((name, self.width, out))
        self.body.append(f"x = {name}(x)")
        self.width = out

    def _functional(self) -> None:
        out, name = self._out(), f"w{next(self._count)}"
        transposed = [(e, i) for e, i, o in self._linears if o == self.width]
        if transposed and self.random.random() < 0.3:  # a tied decoder: x W of an earlier layer
            expression, out = self.random.choice(transposed)
            self.body.append(f"x = x @ {expression}.weight")
        elif self.random.random() < 0.25 and self._linears:
            self._borrowed()
            return
        else:
            extra = self.random.choice((0, 0, 2))
            self.init.append(
                f"self.{name} = nn.Parameter(torch.randn({out + extra}, {self.width}) * 0.3)"
            )
            weight = f"self.{name}[:{out}]" if extra else f"self.{name}"
            self.body.append(self.random.choice((
                f"x = F.linear(x, {weight})",
                f"x = F.linear(x, {weight}, torch.zeros({out}, dtype=x.dtype))",
                f"x = x @ {weight}.t()",
                f"x = torch.matmul(x, {weight}.transpose(0, 1))",
                f"x = torch.einsum('...i,oi->...o', x, {weight})",
                f"x = F.linear(x, 0.5 * {weight})",
                f"x = F.linear(x, {weight}.contiguous())",
            )))  # fmt: skip
        self.width = out

    def _borrowed(self) -> None:
        """Weights of a layer, or of the embedding, used by a function."""
        fitting = [(e, o) for e, i, o in self._linears if i == self.width]
        if self.kind == "tokens" and f"nn.Embedding(20, {self.width})" in self.init[0]:
            self.body.append("x = F.linear(x, self.embed.weight)")
            self.width = 20
        elif fitting:
            name, self.width = self.random.choice(fitting)
            self.body.append(self.random.choice((
                f"x = F.linear(x, {name}.weight)",
                f"x = F.linear(x, {name}.weight, {name}.bias)",
                f"x = F.linear(x, {name}.weight, torch.cat([torch.ones(1, dtype=x.dtype), "
                f"torch.zeros({self.width - 1}, dtype=x.dtype)]))",
                f"x = x @ {name}.weight.T",
                f"x = F.linear(x, {name}.weight.detach())",
            )))  # fmt: skip

    def _activation(self) -> None:
        function = self.random.choice((
            "torch.relu(x)", "F.gelu(x)", "F.silu(x)", "torch.tanh(x)", "F.leaky_relu(x, 0.1)",
            "F.softmax(x, -1)", "x.abs()", "torch.where(x > 0, x, 0.1 * x)", "x.clamp(-2, 2)",
            "x * torch.sigmoid(x)", "F.gelu(x, approximate='tanh')", "x / (1 + x.abs())",
        ))  # fmt: skip
        if self.random.random() < 0.4:
            made = self.random.choice(MODULES)
            if "inplace" in made and not self._fresh():
                made = "nn.ReLU()"
            function = f"{self._place(made)}(x)"
        self.body.append(f"x = {function}")

    def _fresh(self) -> bool:
        """Whether x may be written to: it is neither the argument nor kept under another name."""
        if not self.body or not self.body[-1].startswith("x = "):
            return False
        return "(" in self.body[-1]

    def _norm(self) -> None:
        if not self.long and self.kind != "vector" and self.rows > 1 and self.random.random() < 0.3:
            name = self._place(f"nn.BatchNorm1d({self.width})")
        elif self.random.random() < 0.2:
            name = self._place(f"nn.RMSNorm({self.width})")
        else:
            name = self._place(f"nn.LayerNorm({self.width})")
        self.body.append(f"x = {name}(x)")

    def _residual(self) -> None:
        same = [v for v, w, long in self._earlier if w == self.width and long == self.long]
        if same:
            self.body.append(f"x = x + {self.random.choice(same)}")
        else:
            self._linear()

    def _gate(self) -> None:
        if self.width % 2:
            return
        self.body += self.random.choice((
            ["a, b = x.chunk(2, -1)", "x = a * torch.sigmoid(b)"],
            [f"a, b = x.split({self.width // 2}, -1)", "x = F.silu(a) * b"],
            [f"x = x[..., :{self.width // 2}] - x[..., {self.width // 2}:]"],
        ))  # fmt: skip
        self.width //= 2

    def _inplace(self) -> None:
        bias = self.random.choice(("", ", bias=False"))
        name = self._place(f"nn.Linear({self.width}, {self.width}{bias})")
        self._linears.append((name, self.width, self.width))
        writer = self.random.choice((
            "x += 1", "x.mul_(2)", "x = F.relu_(x)", "x[..., 0] = 0", "x.add_(x.detach())",
            "x = F.dropout(x, 0.1, self.training, inplace=True)", "x.clamp_(-1, 1)",
            "x.unsqueeze_(0).squeeze_(0)", "x[..., 1:].mul_(0.5)", "x.copy_(x.tanh())",
            "module", "module", "module",
        ))  # fmt: skip
        if writer == "module":
            writer = f"x = {self._place(self.random.choice(WRITERS))}(x)"
        self.body += [f"x = {name}(x)", writer]

    def _branch(self) -> None:
        k = self.random.choice((1, 2, 3, 4, 6))
        condition = self.random.choice((
            f"x.shape[0] > {k}", f"x.shape[0] == {k}", f"x.shape[0] % {k + 1} == 0",
            "self.training", f"x.numel() > {20 * k}", "x.dim() == 3", f"len(x) < {k}",
            "x.requires_grad", "torch.is_grad_enabled()", "x.sum() > 0",
        ))  # fmt: skip
        name = self._place(f"nn.Linear({self.width}, {self.width})")
        other = self.random.choice((f"{name}(x)", "x * 2", "x - 1"))
        self.body += [f"if {condition}:", f"    x = {name}(x)", "else:", f"    x = {other}"]

    def _views(self) -> None:
        if self.long:
            self.body.append(self.random.choice((
                f"x = x.reshape(-1, {self.width}).reshape(x.shape)",
                "x = x.transpose(0, 1).contiguous().transpose(0, 1)",
                "x = x.flip(1)", "x = x.permute(1, 0, 2).permute(1, 0, 2)",
                f"x = x.view(x.size(0), x.size(1), {self.width}, 1).squeeze(-1)",
                "x = x.expand(x.shape)", "x = torch.stack(x.unbind(1), 1)",
                "x = x.roll(1, 1)", "x = x.unsqueeze(1).expand(-1, 2, -1, -1).mean(1)",
            )))  # fmt: skip
        else:
            self.body.append(self.random.choice((
                "x = x.t().t()", "x = x[:, None, :].squeeze(1)", "x = x.contiguous()",
                "x = x.reshape(x.shape[0], -1)", "x = x.flip(-1)",
            )))  # fmt: skip

    def _cast(self) -> None:
        self.body.append(self.random.choice((
            "x = x.double().to(x.dtype)", "x = x.to(torch.bfloat16).to(x.dtype)",
            "x = x.float().exp().clamp(max=10).to(x.dtype)",
        )))  # fmt: skip

    def _dropout(self) -> None:
        name = self._place(f"nn.Dropout({self.random.choice((0.0, 0.1, 0.5))})")
        self.body.append(f"x = {name}(x)")

    def _mlp(self) -> None:
        width, hidden = self.width, self.random.choice((8, 16, 20))
        made = self.random.choice((
            f"nn.Sequential(nn.Linear({width}, {hidden}), nn.GELU(), nn.Linear({hidden}, {width}))",
            f"nn.Sequential(nn.Linear({width}, {hidden}), nn.ReLU(inplace=True), "
            f"nn.Linear({hidden}, {width}, bias=False))",
            f"Gated({width}, {hidden})",
        ))  # fmt: skip
        name = self._place(made)
        residual = self.random.random() < 0.5
        self.body.append(f"x = x + {name}(x)" if residual else f"x = {name}(x)")

    def _several(self) -> None:
        """Blocks in a list, one after the other."""
        name, count = f"l{next(self._count)}", self.random.choice((2, 3))
        made = self.random.choice((f"Block({self.width}, {2 * self.width})",
                                   f"nn.Linear({self.width}, {self.width})"))  # fmt: skip
        self.init.append(f"self.{name} = nn.ModuleList([{made} for _ in range({count})])")
        scaled = ", scale=0.5" if made.startswith("Block") and self.random.random() < 0.5 else ""
        self.body += [f"for layer in self.{name}:", f"    x = layer(x{scaled})"]

    def _python(self) -> None:
        """A layer that Python reaches in a way of its own."""
        name = self._place(f"nn.Linear({self.width}, {self.width})")
        self._linears.append((name, self.width, self.width))
        ways = ["x = [{0}(x), x][0]", "run = {0}", "x = {0}.forward(x)", "x = {0}(input=x)",
                "x = torch.stack([{0}(r) for r in x])", "method"]  # fmt: skip
        way = self.random.choice(ways)
        if way == "method" and not self._methods:
            self._methods = HELPER.format(f"{name}(x)")
            self.body.append("x = self.helper(x)")
        elif way in ("method", "run = {0}"):
            self.body += [f"run = {name}", "x = (lambda y: run(y))(x)"]
        else:
            self.body.append(way.format(name))

    def _context(self) -> None:
        name = self._place(f"nn.Linear({self.width}, {self.width})")
        self._linears.append((name, self.width, self.width))
        self.body += self.random.choice((
            ["with torch.no_grad():", f"    y = {name}(x)", "x = x + y"],
            ["with torch.autocast('cpu', torch.bfloat16):", f"    y = {name}(x)",
             "x = y.to(x.dtype)"],
            [f"x = x + {name}(x.detach())"],
        ))  # fmt: skip

    def _lookup(self) -> None:
        """x chooses rows of a table, or is scaled by a plain tensor."""
        name = f"t{next(self._count)}"
        if self.random.random() < 0.5:
            self.init.append(f"self.{name} = nn.Embedding(5, {self.width})")
            self.body.append(f"x = x + self.{name}((x[..., 0] > 0).long())")
        else:
            self.init.append(f"self.{name} = torch.ones({self.width}) * 0.5")
            self.body.append(f"x = x * self.{name}.to(x.dtype)")

    def _image(self) -> None:
        """Convolutions over [B, C, H, W], then a sequence of places or a mean over them."""
        for _ in range(self.random.randint(1, 3)):
            self.body.append(f"x = {self._convolution()}(x)")
            if self.random.random() < 0.4:
                self.body.append(f"x = {self._place(f'nn.BatchNorm2d({self.width})')}(x)")
            if self.random.random() < 0.5:
                self.body.append(f"x = {self._place(self.random.choice(WRITERS))}(x)")
        self.long = self.random.random() < 0.5
        self.body.append("x = x.flatten(2).transpose(1, 2)" if self.long else "x = x.mean((2, 3))")

    def _convolution(self) -> str:
        """An nn.Conv2d from `width` channels, 1×1 for the most part; `width` is then its own."""
        pick, channels = self.random, self.width
        out, size = self._out(), pick.choice((1, 1, 1, 3))
        groups = pick.choice((1, 1, 1, 2)) if out % 2 == channels % 2 == 0 else 1
        bias = pick.choice(("", ", bias=False"))
        padding = f", padding={size // 2}" if size > 1 else ""
        self.width = out
        return self._place(f"nn.Conv2d({channels}, {out}, {size}{padding}, groups={groups}{bias})")

    def _conv2d(self) -> None:
        """A convolution over a sequence as an image of one column, and what follows it."""
        lines = [f"x = {self._convolution()}(x.transpose(1, 2).unsqueeze(-1))"]
        if self.random.random() < 0.5:
            lines.append(f"x = {self._place(f'nn.BatchNorm2d({self.width})')}(x)")
        self.body += [*lines, "x = x.squeeze(-1).transpose(1, 2)"]

    def _checkpoint(self) -> None:
        name = self._place(f"nn.Linear({self.width}, {self.width})")
        self.body.append(f"x = checkpoint({name}, x, use_reentrant=False)")

    def _cat(self) -> None:
        other = [(v, w) for v, w, long in self._earlier if long == self.long]
        if other:
            name, width = self.random.choice(other)
            self.body.append(f"x = torch.cat([x, {name}], -1)")
            self.width += width

    def _state(self) -> None:
        name, kept = f"b{next(self._count)}", self.random.choice(("", ", persistent=False"))
        self.init.append(f"self.register_buffer('{name}', torch.zeros({self.width}){kept})")
        if self.random.random() < 0.5:
            self.body.append(f"x = x + self.{name}")
        else:
            self.body += ["if self.training:", f"    self.{name} += 1", f"x = x + self.{name}"]

    def _loop(self) -> None:
        name = self._place(f"nn.Linear({self.width}, {self.width})")
        self.body += [f"for _ in range({self.random.choice((2, 3))}):", f"    x = {name}(x)"]

    def _attention(self) -> None:
        width = self.width
        if width % 4:
            return
        kind = self.random.random()
        if kind < 0.4:
            name = self._place(f"nn.MultiheadAttention({width}, 2, batch_first=True)")
            self.body.append(f"x = {name}(x, x, x, need_weights=False)[0]")
        elif kind < 0.45:
            name = self._place(
                f"nn.TransformerEncoderLayer({width}, 2, {2 * width}, 0.0, batch_first=True)"
            )
            self.body.append(f"x = {name}(x)")
        else:
            name = self._place(f"nn.Linear({width}, {3 * width})")
            self._linears.append((name, width, 3 * width))
            self.body += [
                f"q, k, v = {name}(x).view(x.shape[0], -1, 3, 2, {width // 2})"
                ".permute(2, 0, 3, 1, 4).unbind(0)",
                "x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)",
            ]

    def _recurrent(self) -> None:
        out = self._out()
        kind = self.random.choice(("GRU", "LSTM", "RNN"))
        name = self._place(f"nn.{kind}({self.width}, {out}, batch_first=True)")
        self.body.append(f"x = {name}(x)[0]")
        self.width = out

    def _conv(self) -> None:
        out, size = self._out(), self.random.choice((1, 1, 3))
        name = self._place(f"nn.Conv1d({self.width}, {out}, {size}, padding={size // 2})")
        self.body.append(f"x = {name}(x.transpose(1, 2)).transpose(1, 2)")
        self.width = out

    def _pool(self) -> None:
        self.body.append(self.random.choice(("x = x.mean(1)", "x = x[:, -1]", "x = x.amax(1)")))
        self.long = False

    def _mask(self) -> None:
        self.body += ["if mask is not None:", "    x = x.masked_fill(mask[..., None], 0.0)"]
