"""Every scheme of `Quantize` and `QAT` in the hands of Inductor and of ONNX Runtime, each with all
of its options that change what is computed, side by side in one model: compiled, exported once."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import assert_reordered, sqnr
from torch import Tensor, nn

from rewriter import Pass, rewrite
from rewriter.passes import QAT, Quantize
from rewriter.passes.quantize import SCHEMES
from rewriter.passes.trained import TRAINED

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("int8-dynamic", {}),
    ("int8-dynamic", {"activation": "per_tensor"}),
    ("int8-static", {}),
    ("int8-weight", {}),
    ("int4-weight", {"group_size": 32}),
    ("int4-weight", {"symmetric": False}),
    ("int4-dynamic", {}),
    ("bf16", {}),
    ("fp8-weight", {}),
    ("fp8-dynamic", {}),
]
TRAINS = [(name, o) for name, o in OPTIONS if name in TRAINED]
LEARNED = [(n, {"learned_step": True, **o}) for n, o in TRAINS if o.get("symmetric", True)]
ROWS = torch.randn(5, 80, generator=torch.Generator().manual_seed(0))
MORE = torch.randn(9, 80, generator=torch.Generator().manual_seed(1))


class Branches(nn.Module):
    """One linear layer for each scheme; all of one size, so that compilers use memory twice."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(80, 24) for _ in range(count))
        self.conv = nn.ModuleList([nn.Conv1d(4, 6, 3), nn.Conv1d(4, 6, 3, groups=2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [*(layer(x) for layer in self.linear), *(c(x.view(-1, 4, 20)) for c in self.conv)]


def side_by_side(cls: Any, each: list[tuple[str, dict[str, Any]]]) -> nn.Module:
    torch.manual_seed(0)
    passes: list[Pass] = [
        cls(name, where=f"linear.{i}", **options) for i, (name, options) in enumerate(each)
    ]
    passes.append(cls("int8-dynamic", convolutions=True, where="conv.*"))
    static = {"calibration": [ROWS]} if any(p.needs_calibration for p in passes) else {}
    made = rewrite(Branches(len(each)).eval(), passes, ROWS, **static)
    assert len(made.report.replaced) == len(each) + 2
    return made


MODELS = {"Quantize": (Quantize, OPTIONS), "QAT": (QAT, TRAINS + LEARNED)}
EVERY = pytest.mark.parametrize("which", MODELS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Quantize.*'fp8-dynamic'.* is simulated"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_no_scheme_is_forgotten() -> None:
    assert {name for name, _ in OPTIONS} >= {n for n in SCHEMES if "-grid" not in n}


@pytest.mark.slow
@EVERY
def test_inductor_gives_the_outputs_of_eager(which: str) -> None:
    """It must round scales to bfloat16 as eager does, and use no weight packed of other values."""
    model = side_by_side(*MODELS[which])
    compiled = torch.compile(model)
    with torch.no_grad():
        for got, want in zip(compiled(ROWS), model(ROWS), strict=True):
            assert_reordered(got, want)


@pytest.mark.slow
def test_inductor_gives_the_gradients_of_eager() -> None:
    model = side_by_side(QAT, LEARNED).train()
    found = []
    for run in (torch.compile(model), model):
        model.zero_grad()
        outputs = run(ROWS)
        sum(y.square().sum() for y in outputs).backward()
        found.append([*outputs, *(p.grad.clone() for p in model.parameters())])
    for got, want in zip(*found, strict=True):
        assert sqnr(got, want) > 60  # q − w/step of 8 bits is a small difference of large numbers


@pytest.mark.clients
@EVERY
def test_onnx_runtime_gives_the_outputs_of_eager(which: str, tmp_path: pathlib.Path) -> None:
    import onnxruntime

    cls, each = MODELS[which]
    # ONNX Runtime multiplies no bfloat16 on a CPU
    model = side_by_side(cls, [one for one in each if one[0] != "bf16"])
    path, sizes = tmp_path / "m.onnx", ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(model, (ROWS,), path, dynamic_shapes=sizes, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in (ROWS, MORE):
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for y, want in zip(got, model(x), strict=True):
            assert sqnr(torch.from_numpy(y), want) > 50  # a level of int8-static may round apart
