"""Random small models, as the source of a class: what a user might write, and odder.

`Source(seed)` writes `class Model(nn.Module)`: layers with their names, a forward of some ten
lines, and the arguments of a call. Layers are shared, tied, frozen, hooked and parametrized;
weights are used by functions; sizes are branched on; operations write in place; names are such as
no identifier is. The same seed gives the same text.
"""

from __future__ import annotations

import itertools
import linecache
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Source"]

NAMES = ("in", "class", "0", "a b", "x-y", "é", "self", "forward_", "weight_", "quote'", '"', "\n")
"""Keys of a ModuleDict that are no identifiers, or that a generated function could take for its
own."""

MODULES = ("nn.ReLU()", "nn.GELU()", "nn.SiLU()", "nn.Hardswish()", "nn.ReLU(inplace=True)",
           "nn.ELU()", "nn.PReLU()")  # fmt: skip

PREAMBLE = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


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


def double(module, args, output):
    return 2 * output


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict()
"""


class Source:
    """One random model.

    Args:
        seed: chooses everything.

    Attributes:
        text: Python source of `Model`.
        rows: the batch of the example.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self._count = itertools.count()
        self._linears: list[tuple[str, int, int]] = []  # (expression, in, out), plain nn.Linear
        self._earlier: list[tuple[str, int, bool]] = []  # (variable, width, of [B, T, width])
        self.init: list[str] = []
        self.body: list[str] = []
        self.tokens = self.random.random() < 0.25
        self.time = self.random.choice((3, 4, 5, 8))
        self.rows = self.random.choice((2, 2, 3, 4, 5, 8, 1))
        self.width = self.random.choice((4, 8, 12, 16))
        self.long = self.tokens or self.random.random() < 0.6  # [B, T, width], else [B, width]
        self.dtype = self.random.choices(
            (torch.float32, torch.float64, torch.bfloat16), (10, 1.5, 1)
        )[0]
        self.masked = self.long and self.random.random() < 0.3
        self.option = self.random.random() < 0.3
        self.shape = (self.time, self.width) if self.long else (self.width,)
        self._write()

    # the text

    def _write(self) -> None:
        if self.tokens:
            self.init.append(f"self.embed = nn.Embedding(20, {self.width})")
            self.body.append("x = self.embed(x)")
        for _ in range(self.random.randint(2, 9)):
            self._step()
        if self.random.random() < 0.7:
            self._linear()
        freeze = [f"for p in {e}.parameters(): p.requires_grad_(False)"
                  for e, _, _ in self._linears if self.random.random() < 0.08]  # fmt: skip
        hooks = [f"{e}.register_forward_hook(double)"
                 for e, _, _ in self._linears if self.random.random() < 0.06]  # fmt: skip
        arguments = ["self", "x"]
        if self.masked:
            arguments.append("mask=None")
        if self.option:
            arguments.append("scale=1.0")
            self.body.append("x = x * scale")
        result = self.random.choice(
            ("x", "x", "x", "(x, x.sum())", "{'y': x, 'none': None}", "[x]")
        )
        lines = [*self.init, *freeze, *hooks]
        self.text = PREAMBLE + "".join(f"        {line}\n" for line in lines)
        self.text += f"\n    def forward({', '.join(arguments)}):\n"
        self.text += "".join(f"        {line}\n" for line in self.body)
        self.text += f"        return {result}\n"

    def _step(self) -> None:
        steps: list[tuple[Callable[[], None], float]] = [
            (self._linear, 6), (self._functional, 2), (self._activation, 3), (self._norm, 1.5),
            (self._residual, 2), (self._gate, 1), (self._inplace, 2), (self._branch, 1),
            (self._views, 1.5), (self._cast, 0.5), (self._dropout, 0.7), (self._mlp, 1.5),
            (self._checkpoint, 0.3), (self._cat, 0.7), (self._state, 0.3), (self._loop, 0.5),
        ]  # fmt: skip
        if self.long:
            steps += [(self._attention, 1), (self._recurrent, 0.4), (self._conv, 1),
                      (self._pool, 0.4), (self._mask, 1 if self.masked else 0)]  # fmt: skip
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
            self.init.append(f"self.{name} = {made}")
            return f"self.{name}"
        if kind < 0.9:
            key = self.random.choice(NAMES) + self.random.choice(("", name))
            if any(repr(key) in line for line in self.init):
                key += name
            self.init.append(f"self.parts[{key!r}] = {made}")
            return f"self.parts[{key!r}]"
        self.init.append(f"self.{name} = nn.Sequential({made}, nn.Identity())")
        return f"self.{name}[0]"

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
        else:
            name = self._place(f"nn.Linear({self.width}, {out}{bias})")
            tied = [e for e, i, o in self._linears if (i, o) == (self.width, out)]
            if tied and self.random.random() < 0.3:
                self.init.append(f"{name}.weight = {self.random.choice(tied)}.weight")
            self._linears.append((name, self.width, out))
        self.body.append(f"x = {name}(x)")
        self.width = out

    def _functional(self) -> None:
        out, name = self._out(), f"w{next(self._count)}"
        transposed = [(e, i) for e, i, o in self._linears if o == self.width]
        if transposed and self.random.random() < 0.3:  # a tied decoder: x W of an earlier layer
            expression, out = self.random.choice(transposed)
            self.body.append(f"x = x @ {expression}.weight")
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
        if not self.long and self.rows > 1 and self.random.random() < 0.3:
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
        name = self._place(f"nn.Linear({self.width}, {self.width})")
        self._linears.append((name, self.width, self.width))
        self.body += [f"x = {name}(x)", self.random.choice((
            "x += 1", "x.mul_(2)", "x = F.relu_(x)", "x[..., 0] = 0", "x.add_(x.detach())",
            "x = F.dropout(x, 0.1, self.training, inplace=True)", "x.clamp_(-1, 1)",
            "x.unsqueeze_(0).squeeze_(0)",
        ))]  # fmt: skip

    def _branch(self) -> None:
        k = self.random.choice((1, 2, 3, 4, 6))
        condition = self.random.choice((
            f"x.shape[0] > {k}", f"x.shape[0] == {k}", f"x.shape[0] % {k + 1} == 0",
            "self.training", f"x.numel() > {20 * k}", "x.dim() == 3",
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
        name = f"b{next(self._count)}"
        self.init.append(f"self.register_buffer('{name}', torch.zeros({self.width}))")
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
        elif kind < 0.5:
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

    # what it makes

    def model(self) -> nn.Module:
        """The model, with the weights of this seed."""
        name = "fuzzed"
        module = types.ModuleType(name)
        file = f"<fuzzed {self.seed}>"
        linecache.cache[file] = len(self.text), None, self.text.splitlines(True), file
        exec(compile(self.text, file, "exec"), vars(module))
        sys.modules[name] = module  # pickle looks the class up there
        torch.manual_seed(self.seed)
        made: nn.Module = module.Model()
        return made.to(self.dtype).eval()

    def call(self, rows: int, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of a call with a batch of `rows`."""
        generator = torch.Generator().manual_seed(seed + 1000 * rows)
        found: dict[str, Tensor] = {}
        if self.tokens:
            found["x"] = torch.randint(20, (rows, self.time), generator=generator)
        else:
            found["x"] = torch.randn((rows, *self.shape), generator=generator).to(self.dtype)
        if self.masked:
            found["mask"] = torch.rand((rows, self.time), generator=generator) < 0.3
        return found
