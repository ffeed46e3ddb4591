"""Saving, loading and original checkpoints: everything comes back bit for bit, or an error says
what is wrong and nothing has changed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import GPT2Config, GPT2LMHeadModel

import rewriter
from rewriter import (
    LINEAR,
    Layer,
    OptionError,
    Pass,
    Replacement,
    RewriteWarning,
    Site,
    StoreError,
    export,
    from_pretrained,
    load,
    plan_memory,
    rewrite,
)
from rewriter.base import as_parameter
from rewriter.engine import Engine
from rewriter.passes import Densify, Monarch, MonarchChain, MonarchLinear, Quadratic, TopK
from rewriter.passes.quantize import Quantize
from rewriter.recipe.likeness import likeness
from rewriter.store import reading, writing

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


class Functional(nn.Module):
    """Its layers exist in the graph only: as stored, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 32) / 6)
        self.b = nn.Parameter(torch.randn(64))
        self.v = nn.Parameter(torch.randn(64, 32) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(nn.functional.linear(x, self.w, self.b)) @ self.v


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 32)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class TiedLinears(nn.Module):
    """One weight in two modules, and an embedding tied to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.b.weight = self.a.weight
        self.embed, self.head = nn.Embedding(48, 32), nn.Linear(32, 48, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs().sum(-1) * 10).long() % 48
        return self.head(self.b(torch.relu(self.a(x))) + self.embed(ids))


class Buffers(nn.Module):
    """Buffers in and out of the state_dict, and a tensor that the forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.register_buffer("kept", torch.randn(32))
        self.register_buffer("loose", torch.randn(32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.kept + self.loose + torch.tensor(0.5)


RECIPES: dict[str, list[Pass]] = {
    "monarch": [Monarch()],
    "densify": [Monarch(), Densify()],
    "quadratic": [Quadratic()],
    "topk": [TopK(8)],
    "quantize": [Quantize()],
    "monarch-quantize": [Monarch(), Quantize()],
    "none": [],
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": MLP,
    "functional": Functional,
    "shared": Shared,
    "tied": TiedLinears,
    "buffers": Buffers,
}
CASES = [
    *(("mlp", recipe) for recipe in RECIPES),
    ("functional", "monarch"),
    ("functional", "quadratic"),
    ("shared", "monarch-quantize"),
    ("tied", "quadratic"),
    ("buffers", "quantize"),
]
quiet = pytest.mark.filterwarnings("ignore::rewriter.RewriteWarning")


def rewritten(model: nn.Module, passes: list[Pass], inputs: Any = X) -> Any:
    return rewrite(model.eval(), passes, inputs)


def output(model: nn.Module, x: Any = X) -> Tensor:
    with torch.no_grad():
        result = model.eval()(**x) if isinstance(x, dict) else model.eval()(x)
    return result if isinstance(result, Tensor) else result.logits


def assert_same(actual: nn.Module, expected: nn.Module, x: Any = X) -> None:
    """Names, values, dtypes, ties and flags, and what they compute."""
    for read in (
        lambda m: dict(m.named_parameters(remove_duplicate=False)),
        lambda m: dict(m.named_buffers(remove_duplicate=False)),
    ):
        a, e = (
            {k: t for k, t in read(m).items() if "_rewriter" not in k} for m in (actual, expected)
        )
        assert a.keys() == e.keys()
        for k in e:
            assert a[k].dtype == e[k].dtype, k
            assert a[k].requires_grad == e[k].requires_grad, k
            assert torch.equal(a[k], e[k]), k
            assert [n for n in a if a[n] is a[k]] == [n for n in e if e[n] is e[k]]
    assert list(actual.state_dict()) == list(expected.state_dict())
    assert torch.equal(output(actual, x), output(expected, x))


# round trips


def ledger(model: Any) -> dict[str, Any]:
    """The report without the calls so far."""
    return {k: v for k, v in model.report.to_dict().items() if k != "forms"}


@quiet
@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_round_trip_and_original_checkpoint(
    model: str, recipe: str, tmp_path: pathlib.Path
) -> None:
    passes = RECIPES[recipe]
    optimized = rewritten(MODELS[model](), passes)
    optimized.save(tmp_path)
    target = MODELS[model]().eval()
    before = {k: (id(t), t.clone()) for k, t in target.state_dict(keep_vars=True).items()}
    classes = [type(m) for m in target.modules()]
    loaded = load(tmp_path, target)
    assert_same(loaded, optimized)
    assert isinstance(loaded, MODELS[model])
    assert ledger(loaded) == ledger(optimized)
    # the caller's model is as it was
    assert [type(m) for m in target.modules()] == classes
    for key, tensor in target.state_dict(keep_vars=True).items():
        assert (id(tensor), True) == (before[key][0], torch.equal(tensor, before[key][1]))
    # another checkpoint, through both
    if isinstance(target, Buffers):
        target.loose.copy_(optimized.loose)
    want = rewritten(target, passes)
    checkpoint = target.state_dict()
    for again in (optimized, loaded):
        again.load_original(checkpoint)
        assert_same(again, want)


@quiet
@pytest.mark.parametrize("model", ["mlp", "functional"])
@pytest.mark.parametrize("recipe", ["monarch", "monarch-quantize", "quadratic"])
def test_loading_onto_another_dtype_and_meta(
    model: str, recipe: str, tmp_path: pathlib.Path
) -> None:
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x = X.to(dtype)
        optimized = rewritten(MODELS[model]().to(dtype), RECIPES[recipe], x)
        optimized.save(tmp_path)
        for target in (MODELS[model]().to(other), MODELS[model]().to("meta")):
            assert_same(load(tmp_path, target), optimized, x)


@quiet
def test_original_checkpoint_of_another_dtype() -> None:
    wide = MLP().double()
    optimized = rewritten(MLP().bfloat16(), [Monarch()], X.bfloat16())
    optimized.load_original(wide.state_dict())
    assert_same(optimized, rewritten(wide.bfloat16(), [Monarch()], X.bfloat16()), X.bfloat16())


def test_a_model_rewritten_on_meta_gets_its_data_from_a_checkpoint() -> None:
    original = MLP().eval()
    optimized = rewritten(copy.deepcopy(original).to("meta"), [Monarch()])
    with pytest.raises(StoreError, match="on meta"):
        optimized.save("unused")
    optimized.load_original(original.state_dict())
    assert_same(optimized, rewritten(original, [Monarch()]))


def test_buffers_that_no_checkpoint_holds_are_refused_on_meta() -> None:
    optimized = rewritten(Buffers().to("meta"), [Monarch()])
    with pytest.raises(StoreError, match="loose"):
        optimized.load_original(Buffers().state_dict())


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("recipe", ["monarch-quantize", "quadratic"])
def test_gpt2(recipe: str, tmp_path: pathlib.Path) -> None:
    config = GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    batch = {"input_ids": torch.randint(0, 60, (2, 8)), "use_cache": False}
    optimized = rewritten(GPT2LMHeadModel(config), RECIPES[recipe], batch)
    assert optimized.report.replaced
    optimized.save(tmp_path)
    target = GPT2LMHeadModel(config).eval()
    loaded = load(tmp_path, target)
    assert_same(loaded, optimized, batch)
    want = rewritten(target, RECIPES[recipe], batch)
    checkpoint = target.state_dict()
    del checkpoint["lm_head.weight"]  # tied: checkpoints hold it once
    loaded.load_original(checkpoint)
    assert_same(loaded, want, batch)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_captured_load_runs_graphs(tmp_path: pathlib.Path) -> None:
    optimized = rewritten(Buffers(), [Monarch()])
    optimized.save(tmp_path)
    for target in (Buffers(), Buffers().bfloat16(), Buffers().to("meta")):
        loaded = load(tmp_path, target.eval(), example_inputs=X)
        assert loaded.__dict__["_rewriter"].programs
        assert_same(loaded, optimized)


def test_frozen_parameters_stay_frozen(tmp_path: pathlib.Path) -> None:
    model = MLP()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    optimized = rewritten(model, [Monarch()])
    optimized.save(tmp_path)
    loaded = load(tmp_path, MLP().eval())
    assert_same(loaded, optimized)
    loaded.load_original(MLP().state_dict())
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in optimized.parameters()
    ]


def test_what_the_target_brings_is_kept(tmp_path: pathlib.Path) -> None:
    rewritten(MLP(), [Monarch()]).save(tmp_path)
    calls = []
    target = MLP().train()
    target[0].register_forward_hook(lambda *_: calls.append(1))
    loaded = load(tmp_path, target)
    assert loaded.training
    assert loaded[0].training
    loaded(X)
    assert calls == [1]


def test_the_second_of_two_rewrites_stores_both(tmp_path: pathlib.Path) -> None:
    for model in (MLP(), Functional()):
        first = rewritten(model, [Monarch()])
        second = rewritten(first, [Quantize()])
        second.save(tmp_path)
        assert_same(load(tmp_path, type(model)().eval()), second)
        assert_same(second, rewritten(model, [Monarch(), Quantize()]))
        second.load_original(type(model)().state_dict())


def test_a_model_that_had_our_layers_before(tmp_path: pathlib.Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(MonarchLinear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()

    optimized = rewritten(build(), [Quantize()])
    optimized.save(tmp_path)
    target = build()
    loaded = load(tmp_path, target)
    assert_same(loaded, optimized)
    want = rewritten(target, [Quantize()])
    for again in (optimized, loaded):
        again.load_original(target.state_dict())
        assert_same(again, want)


def test_saving_again_replaces(tmp_path: pathlib.Path) -> None:
    keep = tmp_path / "weights-mine.safetensors"
    keep.write_text("the user's")
    for directory in (tmp_path, str(tmp_path)):
        optimized = rewritten(MLP(), [Monarch()])
        rewriter.save(optimized, directory)
        assert len(list(tmp_path.iterdir())) == 3
        assert_same(load(directory, MLP().eval()), optimized)
    assert keep.read_text() == "the user's"


def test_a_loaded_model_saves_the_same_files(tmp_path: pathlib.Path) -> None:
    rewritten(MLP(), [Monarch(where="0")]).save(tmp_path / "a")
    load(tmp_path / "a", MLP().eval()).save(tmp_path / "b")
    a, b = ({f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in "ab")
    assert a == b


def test_views_and_strides_are_written_out(tmp_path: pathlib.Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.fc.weight = nn.Parameter(torch.randn(32, 32).t())
            base = torch.randn(2, 32)
            self.register_buffer("one", base[0])
            self.register_buffer("two", base[1])

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.one + self.two

    optimized = rewritten(Views(), [])
    optimized.save(tmp_path)
    assert_same(load(tmp_path, Views().eval()), optimized)


def test_tensors_on_the_cpu_are_not_copied(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimized = rewritten(MLP(), [Monarch()])
    seen: dict[str, Tensor] = {}
    real = writing.save_file

    def spy(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        seen.update(tensors)
        real(tensors, *args, **kwargs)

    monkeypatch.setattr(writing, "save_file", spy)
    optimized.save(tmp_path)
    own = optimized.state_dict()
    assert {k: t.data_ptr() for k, t in seen.items()} == {k: t.data_ptr() for k, t in own.items()}


def test_no_pickle(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimized = rewritten(MLP(), [Monarch(), Quantize()])

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickle was used")

    for module in (pickle, torch):
        for name in ("load", "loads", "dump", "dumps", "save", "Pickler", "Unpickler"):
            monkeypatch.setattr(module, name, refuse, raising=False)
    optimized.save(tmp_path)
    assert torch.equal(load(tmp_path, MLP().eval())(X), optimized(X))


@quiet
@pytest.mark.parametrize("model", ["mlp", "functional"])
def test_deepcopy_pickle_and_state_dict(model: str, tmp_path: pathlib.Path) -> None:
    passes: list[Pass] = [Monarch(where=lambda site: True), Quantize()]  # lambdas do not pickle
    optimized = rewritten(MODELS[model](), passes)
    pickled = pickle.loads(pickle.dumps(optimized))
    for twin in (copy.deepcopy(optimized), pickled):
        assert_same(twin, optimized)
        twin.save(tmp_path)
        assert_same(load(tmp_path, MODELS[model]().eval()), optimized)
        twin.load_original(MODELS[model]().state_dict())
    other = rewritten(MODELS[model](), passes)
    other.load_state_dict(optimized.state_dict())
    assert_same(other, optimized)


@settings(max_examples=8)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    nblocks=st.integers(1, 5),
    bias=st.booleans(),
)
def test_any_sizes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], nblocks: int, bias: bool
) -> None:
    def build() -> nn.Module:
        pairs = zip(sizes, sizes[1:], strict=False)
        return nn.Sequential(*[nn.Linear(i, o, bias) for i, o in pairs]).eval()

    path, x = tmp_path_factory.mktemp("save"), torch.randn(3, sizes[0])
    optimized = rewrite(build(), [Monarch(nblocks)])
    optimized.save(path)
    target = build()
    loaded = load(path, target)
    assert_same(loaded, optimized, x)
    loaded.load_original(target.state_dict())
    assert_same(loaded, rewrite(target, [Monarch(nblocks)]), x)


# layers and passes of the user's own


class Scaled(Layer):
    op = "scaled"

    def __init__(
        self, in_features: int, out_features: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(
            torch.zeros(out_features, in_features, device=device, dtype=dtype)
        )
        table = torch.arange(float(out_features), device=device)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) * self.table


@dataclasses.dataclass(frozen=True)
class Scale(Pass):
    matches = (LINEAR,)
    refuse_above: float = 1e9

    def propose(self, site: Site) -> Replacement | rewriter.Skip:
        if float(site.weight.detach().abs().max()) > self.refuse_above:
            return rewriter.Skip("too large")
        layer = Scaled(site.in_features, site.out_features)
        layer.weight = as_parameter(site.weight)
        return Replacement(layer, error=None)


class Forgetful(Layer):
    def __init__(self, in_features: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()


def test_a_layer_that_does_not_say_what_it_was_built_with() -> None:
    assert Scaled(3, 2).config() == {"in_features": 3, "out_features": 2}
    with pytest.raises(
        rewriter.OptionError, match=r"keep in_features .* or write Forgetful.config\(\)"
    ):
        Forgetful(3).config()


def test_the_users_own_layer(tmp_path: pathlib.Path) -> None:
    optimized = rewritten(MLP(), [Scale()])
    optimized.save(tmp_path)
    with pytest.raises(StoreError, match=r"Scaled.*allow-list.*layers=\[Scaled\]"):
        load(tmp_path, MLP().eval())
    half = load(tmp_path, MLP().eval(), layers=[Scaled])
    assert_same(half, optimized)
    with pytest.raises(StoreError, match="needs .*Scale, which is not known here"):
        half.load_original(MLP().state_dict())
    half.save(tmp_path)  # and what was not known is still written
    full = load(tmp_path, MLP().eval(), layers=[Scaled, Scale])
    target = MLP()
    full.load_original(target.state_dict())
    assert_same(full, rewritten(target, [Scale()]))


def test_a_layer_that_json_cannot_hold(tmp_path: pathlib.Path) -> None:
    optimized = rewritten(MLP(), [Scale()])
    optimized[0].config = lambda: {"in_features": object()}
    with pytest.raises(StoreError, match=r"^0: Scaled.config\(\) is not JSON"):
        optimized.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_cannot_be_rebuilt(tmp_path: pathlib.Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Wrap(Pass):
        matches = (LINEAR,)

        def propose(self, site: Site) -> Replacement:
            return Replacement(nn.Sequential(copy.deepcopy(site.module)))

    with pytest.raises(StoreError, match=r"0 is a Sequential: only"):
        rewritten(MLP(), [Wrap()]).save(tmp_path)


class Counting(MLP):
    """Its extra state is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(2)

    def get_extra_state(self) -> Tensor:
        return self.seen

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = state.reshape(2)


def test_extra_state_that_is_a_tensor_is_kept(tmp_path: pathlib.Path) -> None:
    model = Counting()
    model.seen = torch.tensor([3.0, 4.0])
    optimized = rewritten(model, [Monarch()])
    optimized.save(tmp_path)
    loaded: Any = load(tmp_path, Counting())
    assert torch.equal(loaded.seen, model.seen)
    other = Counting()
    other.seen = torch.tensor([5.0, 6.0])
    for again in (optimized, loaded):
        again.load_original(other.state_dict())
        assert torch.equal(again.seen, other.seen)
        with pytest.raises(StoreError, match=r"missing \['_extra_state'\]"):
            again.load_original(MLP().state_dict())
        with pytest.raises(StoreError, match="does not take its extra state"):
            again.load_original({**other.state_dict(), "_extra_state": torch.zeros(3)})
        assert torch.equal(again.seen, other.seen)
    with pytest.raises(StoreError, match="has extra state"):
        load(tmp_path, MLP())


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.register_buffer("wide", torch.randn(3, dtype=torch.complex128))
        self.register_buffer("narrow", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("turned", torch.randn(3, dtype=torch.complex128).conj())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.wide.abs().sum().float()


def test_complex_buffers_come_back(tmp_path: pathlib.Path) -> None:
    optimized = rewritten(Complex(), [Monarch()])
    optimized.save(tmp_path)
    for target in (Complex(), Complex().to("meta")):
        assert_same(load(tmp_path, target.eval()), optimized)


class Branching(nn.Module):
    """A call of a function with a parameter, and a branch on the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(64, 32)), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.w)
        return self.out(torch.relu(hidden) if x.shape[0] > 8 else hidden)


@quiet
def test_a_loaded_model_serves_the_calls_that_the_saved_one_serves(tmp_path: pathlib.Path) -> None:
    optimized = rewritten(Branching(), [Monarch()])
    optimized.save(tmp_path / "once")
    loaded: Any = load(tmp_path / "once", Branching().eval())
    loaded.save(tmp_path / "twice")
    again = load(tmp_path / "twice", Branching().eval())
    for x in (X, torch.randn(12, 32)):
        for model in (loaded, again):
            assert torch.equal(output(model, x), output(optimized, x))
    # saves of before say nothing of it: then it is found out
    edit(tmp_path / "once", lambda d: d.pop("refuses"))
    before = load(tmp_path / "once", Branching().eval())
    assert torch.equal(output(before, x), output(optimized, x))


def test_whether_the_lowered_graph_runs_is_kept(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)).eval()
    for pays in (True, False):
        monkeypatch.setattr(Engine, "_lowering_pays", lambda self, pays=pays: pays)
        rewritten(model, [Monarch()]).save(tmp_path)
        document = json.loads((tmp_path / "recipe.json").read_text())
        loaded = load(tmp_path, copy.deepcopy(model), example_inputs=X)
        lowered = loaded.__dict__["_rewriter"].lowered is not None
        assert document["lower"] == lowered
        assert lowered <= pays


def test_extra_state_is_refused(tmp_path: pathlib.Path) -> None:
    class Extra(MLP):
        def get_extra_state(self) -> Any:
            return object()

    with pytest.raises(StoreError, match="extra state"):
        rewritten(Extra(), [Monarch()]).save(tmp_path)


def test_only_rewritten_models(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StoreError, match="MLP was not made by"):
        rewriter.save(MLP(), tmp_path)
    with pytest.raises(StoreError, match="MLP was not made by"):
        rewriter.load_original(MLP(), {})


# directories that are not a whole save


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    rewritten(MLP(), [Monarch()]).save(tmp_path)
    return tmp_path


def edit(path: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((path / "recipe.json").read_text())
    change(document)
    (path / "recipe.json").write_text(json.dumps(document))


def test_absent_and_foreign_directories(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StoreError, match="has no recipe.json"):
        load(tmp_path / "nowhere", MLP())
    for text, message in (
        ("{", "not readable"),
        ("[]", "not a recipe"),
        ('{"a": 1}', "not a recipe"),
        ("[" * 100_000, "not readable"),
    ):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(StoreError, match=message):
            load(tmp_path, MLP())
        with pytest.raises(StoreError, match="not a save of this package"):
            rewritten(MLP(), [Monarch()]).save(tmp_path)
        assert (tmp_path / "recipe.json").read_text() == text


def test_a_newer_format(saved: pathlib.Path) -> None:
    (saved / "recipe.json").write_text('{"format": 2, "other": "keys"}')
    with pytest.raises(StoreError, match="format 2, this version reads 1"):
        load(saved, MLP())


def test_truncated_and_corrupted_weights(saved: pathlib.Path) -> None:
    (weights,) = saved.glob("*.safetensors")
    data = weights.read_bytes()
    for damaged in (data[:-1], data[:4], b"", data[:-1] + bytes([data[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(StoreError, match="truncated or changed"):
            load(saved, MLP())
    weights.unlink()
    with pytest.raises(StoreError, match="not readable"):
        load(saved, MLP())


@pytest.mark.parametrize(
    "key",
    ["model", "layers", "ties", "frozen", "non_persistent", "example", "report", "weights"],
)
def test_missing_parts_of_a_recipe(saved: pathlib.Path, key: str) -> None:
    edit(saved, lambda d: d.pop(key))
    with pytest.raises(StoreError, match="damaged"):
        load(saved, MLP())


def test_every_damage_to_a_recipe_is_a_store_error(saved: pathlib.Path) -> None:
    text = (saved / "recipe.json").read_text()
    entry = json.loads(text)["layers"][0]
    for key in entry:
        for junk in (None, 7, "x.y", [], {}, [[]], {"a": 1}):
            (saved / "recipe.json").write_text(text)
            edit(saved, lambda d, k=key, j=junk: d["layers"][0].__setitem__(k, j))
            try:
                load(saved, MLP())
            except StoreError:
                continue
            assert key in (
                "weight", "bias", "transposed", "graph_only", "chain", "dtype", "origin",
                "channels",
            )  # fmt: skip


def test_channels_are_those_of_a_convolution(saved: pathlib.Path) -> None:
    for channels in ({"spatial": 2, "stride": [1, 1], "last": False}, {"spatial": 9}, {}, "x"):
        edit(saved, lambda d, c=channels: d["layers"][0].update(channels=c))
        with pytest.raises(StoreError, match="damaged|no 1×1 convolution|cannot build"):
            load(saved, MLP())


@pytest.mark.parametrize(
    "name",
    ["os.system", "rewriter.store.save", "rewriter.passes.monarch.math", "rewriter.passes..x"],
)
def test_nothing_off_the_allow_list_is_built(saved: pathlib.Path, name: str) -> None:
    edit(saved, lambda d: d["layers"][0].update({"class": name}))
    with pytest.raises(StoreError, match="allow-list"):
        load(saved, MLP())


def test_impossible_constructor_arguments(saved: pathlib.Path) -> None:
    edit(saved, lambda d: d["layers"][0]["config"].update(nblocks=0))
    with pytest.raises(StoreError, match="0: cannot build .*MonarchLinear: nblocks"):
        load(saved, MLP())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(32, 64)), r"rewrites 2, which Sequential does not have"),
        (lambda: Shared(), "rewrites 0, which Shared does not have"),
        (
            lambda: nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)),
            "rewrites 0 of 32 -> 64 features, and Sequential has 32 -> 48",
        ),
        (lambda: nn.Sequential(*MLP(), nn.LayerNorm(32)), r"the file lacks \['3.bias', '3.weight"),
        (lambda: rewritten(MLP(), [Monarch()]), "rewritten already"),
    ],
)
def test_another_architecture(
    saved: pathlib.Path, build: Callable[[], nn.Module], message: str
) -> None:
    model = build()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(StoreError, match=message):
        load(saved, model)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_ties_follow_the_save(tmp_path: pathlib.Path) -> None:
    class Pair(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            if tied:
                self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    for tied in (True, False):
        optimized = rewritten(Pair(tied), [])
        optimized.save(tmp_path)
        assert_same(load(tmp_path, Pair(not tied).eval()), optimized)


# writing


def files(path: pathlib.Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir()}


@pytest.mark.parametrize("failing", [1, 2])
def test_an_interrupted_write_leaves_the_old_save(
    saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before = files(saved)
    replace, calls = os.replace, iter(range(1, 9))

    def fail(*args: Any) -> None:
        if next(calls) == failing:
            raise OSError("disk full")
        replace(*args)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StoreError, match="cannot write .*disk full"):
        rewritten(MLP(), [Monarch()]).save(saved)
    assert files(saved) == before
    load(saved, MLP())


def test_an_interrupt_leaves_the_old_save(
    saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(saved)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "digest_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        rewritten(MLP(), [Monarch()]).save(saved)
    assert files(saved) == before


UNUSABLE = {"zero byte": "a\0b", "half a character": "\ud800", "too long": "x" * 300}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_name_that_no_file_can_have_is_refused_wherever_a_path_is_given(
    kind: str, tmp_path: pathlib.Path
) -> None:
    """Some of torch's writers end the process for half a character, or cut the name at the zero."""
    name = str(tmp_path / UNUSABLE[kind])
    model, x = MLP(), torch.randn(4, 32)
    rewritten = rewrite(model, [Monarch(nblocks=4)], x)
    for opened in (
        lambda: rewritten.save(name),
        lambda: load(name, model),
        lambda: from_pretrained(MLP, name),
        lambda: rewritten.report.save(f"{name}.json"),
        lambda: plan_memory(model, x).save(f"{name}.json"),
        lambda: export(model, [], x, package=f"{name}.pt2"),
        lambda: export(model, [], x, package=f"{name}.onnx", format="onnx"),
    ):
        with pytest.raises(StoreError, match=r"no file can be called so|name too long"):
            opened()
    assert not list(tmp_path.iterdir())


def test_a_wrapper_is_told_which_model_inside_can_be_saved(tmp_path: pathlib.Path) -> None:
    inner = rewrite(MLP(), [Monarch(nblocks=4)], torch.randn(4, 32))
    compiled = torch.compile(inner, backend="eager")
    for wrapper, name in ((compiled, "_orig_mod"), (AveragedModel(inner), "module"),
                          (nn.Sequential(nn.ReLU(), inner), "1")):  # fmt: skip
        with pytest.raises(StoreError, match=f"inside it that was, is its '{name}': give that one"):
            rewriter.save(wrapper, tmp_path)


def test_what_is_no_path_is_refused() -> None:
    for path in (3, None, b"bytes", ["a"]):
        with pytest.raises(OptionError, match="directory must be the path of a saved rewrite"):
            load(path, MLP())  # type: ignore[arg-type]


def test_a_directory_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for directory in (file, file / "below", "/proc/none"):
        with pytest.raises(StoreError, match="cannot write"):
            rewritten(MLP(), [Monarch()]).save(directory)


def test_a_file_that_a_found_recipe_names_is_not_ours_to_delete(tmp_path: pathlib.Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    for name in ("precious.txt", "../precious.txt", "weights-mine.safetensors", 7, None):
        (tmp_path / "recipe.json").write_text(json.dumps({"format": 1, "weights": name}))
        with pytest.raises(StoreError, match="not a save of this package"):
            rewritten(MLP(), [Monarch()]).save(tmp_path)
        assert precious.read_text() == "mine"


def test_what_a_link_of_our_name_leads_to_stays(saved: pathlib.Path) -> None:
    mine = saved / "mine"
    mine.write_text("mine")
    (weights,) = saved.glob("*.safetensors")
    weights.unlink()
    weights.symlink_to("mine")
    (saved / "weights-0123456789abcdef.safetensors").symlink_to("mine")
    optimized = rewritten(MLP(), [Monarch()])
    optimized.save(saved)
    assert mine.read_text() == "mine"
    assert_same(load(saved, MLP().eval()), optimized)


def test_what_killed_writers_left_goes_with_the_next_save(saved: pathlib.Path) -> None:
    draft = saved / f".rewriter-{'0' * 32}.tmp"
    draft.mkdir()
    (draft / "draft").write_text("half a file")
    (draft / ".tmpX").symlink_to(saved / "recipe.json")
    (saved / "weights-0123456789abcdef.safetensors").write_text("named by no recipe")
    (saved / ".rewriter-notes.tmp").write_text("the user's")
    rewritten(MLP(), [Monarch()]).save(saved)
    left = {f.name for f in saved.iterdir()}
    assert len(left) == 3
    assert {".rewriter-notes.tmp", "recipe.json"} < left
    assert len({f.stat().st_mode for f in saved.iterdir()}) == 1


def test_an_interrupt_after_all_is_done_leaves_the_new_save(
    saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, iter(range(1, 9))

    def interrupted(*args: Any) -> None:
        replace(*args)
        if next(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    optimized = rewritten(MLP(), [Monarch()])
    with pytest.raises(KeyboardInterrupt):
        optimized.save(saved)
    assert_same(load(saved, MLP().eval()), optimized)


def test_a_save_that_comes_while_another_is_read_is_loaded_in_its_place(
    saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = rewritten(MLP(), [Monarch()])
    read, calls = reading.read, []

    def overtaken(*args: Any) -> Any:
        found = read(*args)
        if not calls:
            newer.save(saved)  # takes the weights away that were just named
        calls.append(1)
        return found

    monkeypatch.setattr(reading, "read", overtaken)
    assert_same(load(saved, MLP().eval()), newer)
    assert len(calls) == 2


class Buffered(nn.Module):
    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.register_buffer("own", buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


BUFFERS: dict[str, Callable[[], Tensor]] = {
    "one row for all": lambda: torch.arange(3.0).expand(4, 3),
    "half a complex number": lambda: torch.ones(3, dtype=torch.complex64).to(torch.complex32),
    "eight bits": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "none": lambda: torch.empty(0, 3),
    "conjugated": lambda: torch.full((3,), 1 + 2j).conj(),
    "unsigned": lambda: torch.full((3,), 60000).to(torch.uint16),
}


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_of_all_kinds_come_back(tmp_path: pathlib.Path, kind: str) -> None:
    x, make = torch.randn(2, 16), BUFFERS[kind]
    model = Buffered(make()).eval()
    optimized: Any = rewrite(model, [Quantize()], x)
    optimized.save(tmp_path)
    loaded: Any = load(tmp_path, Buffered(make().clone().zero_()).eval())
    plain: Any = load(tmp_path, Buffered(make()).eval())
    optimized.load_original(model.state_dict())
    for found in (loaded, plain, optimized):
        assert found.own.dtype == model.own.dtype
        assert found.own.resolve_conj().tolist() == model.own.resolve_conj().tolist()
        with torch.no_grad():
            assert torch.equal(found(x), optimized(x))


def test_a_sparse_buffer_is_kept_and_cannot_be_saved(tmp_path: pathlib.Path) -> None:
    model = Buffered(torch.eye(3).to_sparse()).eval()
    optimized: Any = rewrite(model, [Quantize()], torch.randn(2, 16))
    assert torch.equal(optimized.own.to_dense(), torch.eye(3))
    with pytest.raises(StoreError, match="own is a torch.sparse_coo tensor: only dense ones"):
        optimized.save(tmp_path)


def test_a_load_takes_no_longer_to_capture_than_it_may(saved: pathlib.Path) -> None:
    with pytest.warns(RewriteWarning, match="limit of 1e-09 s of CPU time .* capture_seconds"):
        loaded: Any = load(saved, MLP(), example_inputs=torch.randn(4, 32), capture_seconds=1e-9)
    assert loaded(torch.randn(4, 32)).shape[0] == 4
    with pytest.raises(OptionError, match="capture_seconds=0: use a number"):
        load(saved, MLP(), capture_seconds=0)


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("later", [False, True])
def test_loaded_results_are_the_same_bits(
    tmp_path: pathlib.Path, example: bool, later: bool
) -> None:
    """Rewritten and loaded with example inputs or without."""
    model, x = MLP().eval(), torch.randn(4, 32)
    optimized: Any = rewrite(model, [Monarch()], x if example else None)
    optimized.save(tmp_path)
    loaded = load(tmp_path, MLP().eval(), example_inputs=x if later else None)
    with torch.no_grad():
        for given in (x, x[:1], torch.randn(3, 2, 32)):
            assert torch.equal(loaded(given), optimized(given))


class Branches(nn.Module):
    """Captured by parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = MLP(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(-x if x.sum() > 0 else x)


def test_a_model_by_parts_is_captured_when_its_parts_are_called(tmp_path: pathlib.Path) -> None:
    x = torch.randn(4, 32)
    optimized: Any = rewrite(Branches().eval(), [Monarch()], x)
    assert optimized.report.capture.rung == "parts"
    optimized.save(tmp_path)
    loaded: Any = load(tmp_path, Branches().eval())
    with torch.no_grad():
        for given in (x, -x, x[:1]):
            assert torch.equal(loaded(given), optimized(given))
    graphs = {f.module: (f.graph + f.lowered, f.python) for f in loaded.report.forms if f.module}
    assert graphs["first"] == (3, 0)


# saves that mean harm


@functools.cache
def save_after(passes: tuple[Pass, ...]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        rewritten(MLP(), list(passes)).save(folder)
        return files(pathlib.Path(folder))


def spoiled(path: pathlib.Path, passes: list[Pass], change: Callable[[dict[str, Any]], Any]) -> Any:
    for name, data in save_after(tuple(passes)).items():
        (path / name).write_bytes(data)
    edit(path, change)
    return path


def option(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: document["layers"][0]["config"].update(values)


@pytest.mark.parametrize(
    ("passes", "change"),
    [
        ([Monarch()], option(nblocks="sqrt", in_features=10**18 + 9)),
        ([Monarch()], option(rank=10**15)),
        ([Monarch()], option(in_features=32.0)),
        ([Monarch()], option(interleaved="no")),
        ([Monarch()], option(bias=1)),
        ([Monarch()], option(cap=None)),
        ([MonarchChain(stars=1)], option(stars=10**8)),
        ([MonarchChain(stars=1)], option(expansion=10**12)),
        ([MonarchChain(order=3)], option(order=10**8)),
        ([Quadratic()], option(out_features=2**62)),
        ([Monarch()], lambda d: d.update(memory={"peak": 10**400})),
        ([Monarch()], lambda d: d.update(memory={"peak": "1e999GB"})),
        ([Monarch()], lambda d: d.update(memory={"step_time": 10**400})),
        ([Monarch()], lambda d: d.update(memory={"peak": 0.5, "lossy": "x"})),
        ([Monarch()], lambda d: d.update(weights="weights-\0")),
        ([Monarch()], lambda d: d.update(weights="../weights-0123456789abcdef.safetensors")),
        ([Monarch()], lambda d: d["layers"][0]["chain"][0].__setitem__(0, {"a": 1})),
        ([Monarch()], lambda d: d["layers"][0].update(weight="2.bias")),
        ([Monarch()], lambda d: d["layers"][0]["chain"].extend(d["layers"][0]["chain"] * 10**5)),
        ([Monarch()], lambda d: d["ties"].update({"2.bias": "0.bias"})),
        ([Monarch()], lambda d: d["report"]["steps"][0].update(seconds="soon")),
        ([Monarch()], lambda d: d["report"]["steps"][0]["before"].update(params="many")),
        ([Monarch()], lambda d: d["report"]["steps"][0]["after"].update(flops=10**400)),
        ([Monarch()], lambda d: d["report"]["steps"][0].update(notes=[7])),
        ([Monarch()], lambda d: d["report"]["steps"][1]["decisions"][0].update(error="large")),
        ([Monarch()], lambda d: d["report"].update(snapshots=[1])),
        ([Monarch()], lambda d: d["report"].update(model=[[[]]])),
        ([Monarch()], lambda d: d.update(example=json.loads("[" * 500 + "]" * 500))),
        ([Monarch()], lambda d: d.update(edits=[{
            "edit": "resize", "rows": ["0"], "columns": ["2"], "transposed": [], "norms": [],
            "size": 64, "kept": [0] * 10**6, "reason": "",
        }])),
        ([Monarch()], lambda d: d.update(edits=[{
            "edit": "resize", "rows": ["0"], "columns": ["nowhere"], "transposed": [], "norms": [],
            "size": 64, "kept": [0, 1], "reason": "",
        }])),
    ],
)  # fmt: skip
def test_hostile_recipes_are_refused_at_once(
    tmp_path: pathlib.Path, passes: list[Pass], change: Callable[[dict[str, Any]], Any]
) -> None:
    with pytest.raises(StoreError):
        load(spoiled(tmp_path, passes, change), MLP())


@pytest.mark.parametrize("name", ["recipe.json", "weights"])
@pytest.mark.parametrize("kind", ["zero", "pipe", "folder", "sparse"])
def test_only_regular_files_of_a_sensible_size_are_read(
    saved: pathlib.Path, name: str, kind: str
) -> None:
    path = saved / name if name == "recipe.json" else next(saved.glob("weights-*"))
    path.unlink()
    if kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(StoreError):
        load(saved, MLP())
    if name == "recipe.json":
        with pytest.raises(StoreError):
            rewritten(MLP(), [Monarch()]).save(saved)


def test_a_link_to_a_whole_save_is_followed(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    blobs = tmp_path / "blobs"  # as caches of downloads keep files
    blobs.mkdir()
    for number, file in enumerate([f for f in saved.iterdir() if f.is_file()]):
        os.replace(file, blobs / str(number))
        file.symlink_to(f"blobs/{number}")
    load(saved, MLP())


def restored(path: pathlib.Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the weights of a save, and makes the checksum fit."""
    (weights,) = path.glob("*.safetensors")
    tensors = safetensors.torch.load(weights.read_bytes())
    change(tensors)
    weights.write_bytes(safetensors.torch.save(tensors))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    edit(path, lambda d: d.update(sha256=digest))


def test_a_parameter_stored_as_whole_numbers_is_refused(saved: pathlib.Path) -> None:
    restored(saved, lambda t: t.update({"0.bias": t["0.bias"].int()}))
    with pytest.raises(StoreError, match=r"0.bias is torch.int32 where it was saved"):
        load(saved, MLP())


def test_a_huge_example_is_not_made(tmp_path: pathlib.Path) -> None:
    rewritten(Functional(), [Monarch()]).save(tmp_path)
    huge = {"tensor": [10**6, 10**6], "dtype": "float32", "fill": 0}
    edit(tmp_path, lambda d: d.update(example={"x": huge}))
    with pytest.raises(StoreError, match="more than 64 MiB: pass example_inputs"):
        load(tmp_path, Functional())


def test_a_condition_of_a_stored_report_is_arithmetic_that_ends(saved: pathlib.Path) -> None:
    edit(saved, lambda d: d["report"].update(conditions=["9**999999999 < batch"]))
    loaded: Any = load(saved, MLP())
    with pytest.raises(StoreError, match="a power of more than"):
        loaded.report.at(batch=3)


# original checkpoints that do not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight"), r"missing \['0.weight'\]"),
        (lambda s: s.pop("3.bias"), r"missing \['3.bias'\]"),
        (lambda s: s.update(more=torch.ones(1)), r"unexpected \['more'\]"),
        (lambda s: s.update({"3.bias": torch.ones(3)}), r"other shapes: \['3.bias'\]"),
        (lambda s: s.update({"0.bias": torch.ones(3)}), "not the shapes of a linear layer"),
        (lambda s: s.update({"2.weight": torch.ones(32)}), "not the shapes of a linear layer"),
        (
            lambda s: s.update({"2.weight": torch.ones(24, 64), "2.bias": torch.ones(24)}),
            "do not give the layer that is there",
        ),
        (
            lambda s: s.update({"2.weight": torch.full((32, 64), torch.nan)}),
            "2: Monarch.* refuses the new weights: the weights hold NaN",
        ),
        (lambda s: s.update({"2.weight": "text"}), r"not tensors: \['2.weight'\]"),
    ],
)
def test_checkpoints_that_do_not_fit_change_nothing(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(*MLP(), nn.LayerNorm(32))

    optimized = rewritten(build(), [Monarch()])
    before = {k: t.clone() for k, t in optimized.state_dict().items()}
    checkpoint = build().state_dict()
    change(checkpoint)
    with pytest.raises(StoreError, match=message):
        optimized.load_original(checkpoint)
    assert all(torch.equal(t, before[k]) for k, t in optimized.state_dict().items())


def test_a_state_dict_of_the_original_is_pointed_to_load_original() -> None:
    model = rewritten(MLP(), [Monarch()])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for whole in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"(?s)Missing key.*by load_original\(state_dict\)$"):
            whole.load_state_dict(MLP().state_dict())
    found = model.load_state_dict(before, strict=True, assign=True)
    assert not found.missing_keys
    found = model.load_state_dict({k: v for k, v in before.items() if "left" not in k}, False)
    assert found.missing_keys
    with pytest.raises(RuntimeError, match="Error") as caught:  # theirs, not of a rewritten model
        MLP().load_state_dict({})
    assert "load_original" not in str(caught.value)


def test_a_shared_module_may_be_given_under_either_name() -> None:
    original = Shared().eval()
    want = rewritten(original, [Monarch()])
    for name in ("a", "b"):
        optimized = rewritten(Shared(), [Monarch()])
        optimized.load_original(
            {k: t for k, t in original.state_dict().items() if k.startswith(name)}
        )
        assert_same(optimized, want)


def test_the_file_holds_a_tie_once(tmp_path: pathlib.Path) -> None:
    optimized = rewritten(TiedLinears(), [])
    optimized.save(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    buffer = io.BytesIO(weights.read_bytes())
    assert buffer.getbuffer().nbytes < 4 * (32 * 32 + 48 * 32) + 2000


def _halved(module: nn.Module, args: Any) -> Any:
    return (0.5 * args[0], *args[1:])


@pytest.mark.parametrize("recipe", [MonarchChain(order=2), MonarchChain(stars=1)], ids=str)
def test_hooks_of_a_layer_of_several_operations_run_after_load(recipe: Any, tmp_path: Any) -> None:
    def original() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)).eval()
        model[0].register_forward_pre_hook(_halved)
        return model

    x = torch.randn(2, 5, 4)
    model = rewrite(original(), [recipe], x)
    model.save(tmp_path / "save")
    loaded = load(tmp_path / "save", original())
    assert torch.equal(loaded(x), model(x))
    nodes = vars(loaded)["_rewriter"].forms[0].programs[False].graph.nodes
    assert [n.target for n in nodes if n.op == "call_module"] == ["0", "1"]


# another model of the same tensors


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Of then."""
        return self.b(self.a(x).relu())  # in this order


class _Other(_Own):
    pass


def _redone(forward: Callable[..., Any]) -> type[nn.Module]:
    """A class of the same name, whose forward is another."""
    return type("_Own", (_Own,), {"forward": forward})


def _as_then(self: Any, x: Any) -> Any:
    # as ever
    return self.b(self.a(x).relu())


def _turned(self: Any, x: Tensor) -> Tensor:
    return self.a(self.b(x).relu())


@pytest.mark.parametrize(
    ("then", "now", "says"),
    [
        (_Own, _Other, "the model is a _Other, and was a _Own"),
        (_Own, lambda: _redone(_turned)(), "the forward of the model, a _Own, reads otherwise"),
        (
            lambda: nn.Sequential(nn.Linear(32, 32), nn.GELU()),
            lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU()),
            "'1' is a ReLU, and was a GELU",
        ),
        (
            lambda: nn.Sequential(nn.Linear(32, 32)),
            lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU()),
            "'1' is a ReLU, and was nothing",
        ),
    ],
)
def test_another_model_that_fits_is_named(
    then: Callable[[], nn.Module], now: Callable[[], nn.Module], says: str, tmp_path: pathlib.Path
) -> None:
    rewritten(then().eval(), [Quantize()]).save(tmp_path)
    load(tmp_path, then())
    with pytest.warns(RewriteWarning, match=f"was saved of another model .*{re.escape(says)}"):
        load(tmp_path, now())


def test_a_forward_in_another_layout_is_the_same(tmp_path: pathlib.Path) -> None:
    rewritten(_Own().eval(), [Quantize()]).save(tmp_path)
    again = _redone(_as_then)()
    assert likeness(again) == likeness(_Own())
    assert likeness(again)["a"] == "Linear"  # of an installed package
    load(tmp_path, again)


def test_a_save_that_says_the_class_alone(tmp_path: pathlib.Path) -> None:
    rewritten(_Own().eval(), [Quantize()]).save(tmp_path)
    recipe = tmp_path / "recipe.json"
    document = json.loads(recipe.read_text())
    del document["likeness"]  # as versions up to 0.5.0 write it
    recipe.write_text(json.dumps(document))
    load(tmp_path, _redone(_turned)())
    with pytest.warns(RewriteWarning, match="the model is a _Other, and was a _Own"):
        load(tmp_path, _Other())
