"""What a graph takes for granted: a call, a state or a setting that breaks it runs Python."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_equal, assert_reordered
from torch import Tensor, nn

from rewriter import RewriteError, RewriteWarning, SignatureError, rewrite
from rewriter.passes import Monarch, MonarchLinear

X = torch.arange(32.0).view(4, 8) / 16 - 1


class Inner(nn.Module):
    """Functional dropout, a literal, a config, two containers deep."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.act = nn.ReLU()
        self.scale = 1.0
        self.layers = [1, 2]
        self.config = types.SimpleNamespace(double=False, nested=types.SimpleNamespace(shift=0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc(self.fc(x))) * self.scale + len(self.layers)
        x = x * 2 if self.config.double else x
        return F.dropout(x, 0.5, self.training) + self.config.nested.shift


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.norm = nn.BatchNorm1d(8, eps=1e-3, momentum=0.3)
        self.drop = nn.Dropout(0.25)
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.inner(x) + self.shift))


@pytest.fixture(scope="module")
def captured() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Model().eval()
    rewritten = rewrite(model, [], X)
    assert rewritten.report.capture.rung == "export"
    assert rewritten.report.capture.notes == []
    return model, rewritten


@pytest.fixture
def pair(captured: tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
    """(original, rewritten), to change at will."""
    return copy.deepcopy(captured[0]), copy.deepcopy(captured[1])


def seeded(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    return model(*args, **kwargs)


def test_the_module_is_still_what_it_was(pair: tuple[nn.Module, nn.Module]) -> None:
    model, rewritten = pair
    assert isinstance(rewritten, Model)
    assert type(rewritten).__name__ == "Model"
    assert list(rewritten.state_dict()) == list(model.state_dict())
    assert [n for n, _ in rewritten.named_modules()] == [n for n, _ in model.named_modules()]
    names = [n for n, b in rewritten.named_buffers() if not n.startswith("_rewriter")]
    assert names == [n for n, _ in model.named_buffers()]


def test_one_layer_called_twice_is_two_calls(captured: tuple[nn.Module, nn.Module]) -> None:
    graph = captured[1].__dict__["_rewriter"].programs[False].graph
    assert [n.target for n in graph.nodes if n.op == "call_module"].count("inner.fc") == 2


def test_train_mode_is_the_originals(pair: tuple[nn.Module, nn.Module]) -> None:
    model, rewritten = pair
    for m in pair:
        m.train()
    for _ in range(3):
        assert_equal(seeded(rewritten, X), seeded(model, X))
    assert_equal(rewritten.state_dict(), model.state_dict())  # running statistics and their count
    for m in pair:
        assert not torch.equal(seeded(m, X), m(X))  # dropout is live
    for m in pair:
        m.zero_grad()
        seeded(m, X).sum().backward()
    for a, b in zip(rewritten.parameters(), model.parameters(), strict=True):
        assert_equal(a.grad, b.grad)
    for m in pair:
        m.eval()
    assert_equal(rewritten(X), model(X))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "'scale' of inner is 3.0, captured as 1.0": lambda m: setattr(m.inner, "scale", 3.0),
    "'scale' of inner is a tensor": lambda m: setattr(m.inner, "scale", torch.ones(8) * 3),
    "'layers' of inner": lambda m: m.inner.layers.append(3),
    "'double' of inner.config": lambda m: setattr(m.inner.config, "double", True),
    "'shift' of inner.config.nested": lambda m: setattr(m.inner.config.nested, "shift", 1),
    "'config' of inner is another one": lambda m: setattr(m.inner, "config", Doubled()),
    "inner was replaced": lambda m: setattr(m, "inner", nn.Linear(8, 8).requires_grad_(False)),
    "parameters are torch.float64 now": lambda m: m.double(),
}
REFUSED: dict[str, Callable[[Any], Any]] = {
    "inner is in train mode inside": lambda m: m.inner.train(),
    "hooks of inner were changed": lambda m: m.inner.register_forward_hook(lambda *a: a[2] * 2),
    "inner has got a forward of its own": lambda m: setattr(m.inner, "forward", lambda x: x * 5),
}


class Doubled:
    def __init__(self) -> None:
        self.double, self.nested = True, types.SimpleNamespace(shift=0)


@pytest.mark.parametrize("words", CHANGES)
def test_a_change_after_capture_is_captured(words: str, pair: tuple[nn.Module, nn.Module]) -> None:
    x = X.double() if "float64" in words else X
    outputs = []
    for m in pair:
        torch.manual_seed(1)
        CHANGES[words](m)
        outputs.append([seeded(m, x), seeded(m, x)])
    assert_equal(outputs[1], outputs[0])
    assert [(f.graph, f.python) for f in pair[1].report.forms] == [(0, 0), (2, 0)]


@pytest.mark.parametrize("words", CHANGES)
def test_a_strict_signature_names_the_change(words: str, pair: tuple[nn.Module, nn.Module]) -> None:
    pair[1].__dict__["_rewriter"].strict = True
    CHANGES[words](pair[1])
    with pytest.raises(SignatureError, match=words):
        pair[1](X)


@pytest.mark.parametrize("words", REFUSED)
def test_a_change_that_no_graph_can_hold_runs_python(
    words: str, pair: tuple[nn.Module, nn.Module]
) -> None:
    outputs = []
    for m in pair:
        torch.manual_seed(1)
        REFUSED[words](m)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outputs.append([seeded(m, X), seeded(m, X)])
    assert_equal(outputs[1], outputs[0])
    assert [w.category for w in caught] == [RewriteWarning]  # once, by the rewritten model
    assert words in str(caught[0].message)
    assert caught[0].filename == __file__
    assert [(f.graph, f.python) for f in pair[1].report.forms] == [(0, 0), (0, 2)]


def test_changes_that_the_graph_follows(pair: tuple[nn.Module, nn.Module]) -> None:
    for m in pair:
        m.note = "harmless"
        m.inner.act = nn.Tanh()
        m.drop.p = 0.9
        m.inner.fc.register_forward_hook(lambda *a: a[2] * 2)
        m.register_forward_hook(lambda *a: a[2] + 1)
        with torch.no_grad():
            m.shift += 3
            m.inner.fc.weight.mul_(2)
    assert_equal(pair[1](X), pair[0](X))
    assert_equal(pair[1](X), pair[0](X))


def test_other_dtypes_and_devices(pair: tuple[nn.Module, nn.Module]) -> None:
    model, rewritten = pair
    assert_equal(rewritten.double()(X.double()), model.double()(X.double()))
    assert [f.graph for f in rewritten.report.forms] == [0, 1]
    rewritten.float().to("meta")
    assert rewritten(X.to("meta")).is_meta


def test_autocast_of_the_caller(pair: tuple[nn.Module, nn.Module]) -> None:
    model, rewritten = pair
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(rewritten(X), model(X))
        assert [f.graph for f in rewritten.report.forms] == [0, 1]
        assert_equal(rewrite(model, [], X)(X), model(X))


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + torch.ones(8, dtype=self.embed.weight.dtype) / 3


def test_integer_inputs_do_not_hide_another_parameter_dtype() -> None:
    ids = torch.tensor([[1, 2], [3, 0]])
    model = Casts()
    rewritten = rewrite(model, [], ids).double()
    assert_equal(rewritten(ids), model.double()(ids))
    assert [f.graph for f in rewritten.report.forms] == [0, 1]


def test_strict_signature_raises(captured: tuple[nn.Module, nn.Module]) -> None:
    rewritten = rewrite(captured[0], [], X, strict_signature=True)
    with pytest.raises(SignatureError, match="torch.float64"):
        rewritten(X.double())
    rewritten.inner.scale = 2.0
    with pytest.raises(SignatureError, match="'scale' of inner"):
        rewritten(X)


class Asking(nn.Module):
    """Code that asks whether a tensor, or a layer, is there."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        if kind == "parameter":
            self.register_parameter("extra", None)
        elif kind == "buffer":
            self.register_buffer("extra", None)
        elif kind != "nowhere":
            self.extra = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        extra = getattr(self, "extra", None)
        if extra is None:
            return y
        return extra(y) if isinstance(extra, nn.Module) else y * extra


EXTRAS: dict[str, Callable[[], Any]] = {
    "parameter": lambda: nn.Parameter(torch.full((8,), 3.0)),
    "nowhere": lambda: nn.Parameter(torch.full((8,), 3.0)),
    "buffer": lambda: torch.full((8,), 3.0),
    "attribute": lambda: torch.full((8,), 3.0),
    "module": nn.Tanh,
}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("kind", EXTRAS)
@pytest.mark.filterwarnings("ignore::rewriter.RewriteWarning")
def test_what_was_none_and_is_there_now_is_not_passed_over(kind: str, there: bool) -> None:
    model: Any = Asking(kind)
    if there:
        model.extra = EXTRAS[kind]()
    rewritten: Any = rewrite(model, [], X)
    for _ in range(3):
        there = not there
        for one in (model, rewritten):
            one.extra = EXTRAS[kind]() if there else None
        assert_equal(rewritten(X), model(X))


class Reparametrized(nn.Module):
    """RepVGG's: eval mode makes one layer of two, train mode drops it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.fused: nn.Linear | None = None

    def train(self, mode: bool = True) -> Reparametrized:
        super().train(mode)
        if mode:
            self.fused = None
        elif self.fused is None:
            self.fused = nn.Linear(8, 8)
            self.fused.weight.data = self.a.weight.data + self.b.weight.data
            self.fused.bias.data = self.a.bias.data + self.b.bias.data
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) if self.fused is None else self.fused(x)


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.filterwarnings("ignore::rewriter.RewriteWarning")
def test_a_layer_that_only_one_mode_has(mode: bool) -> None:
    model = Reparametrized().train(mode)
    rewritten = rewrite(model, [], X)
    for now in (mode, not mode, mode):
        assert_equal(rewritten.train(now)(X), model.train(now)(X))


class Sized(nn.Module):
    def __init__(self, width: int, *, deep: bool = False) -> None:
        super().__init__()
        self.width = width
        self.a = nn.Linear(16, width)
        self.b = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu())
        return out


def test_the_class_of_a_rewritten_model_builds_the_original_anew() -> None:
    """What Lightning's `load_from_checkpoint` does, and `type(self)(self.config)` in libraries."""
    x = torch.randn(3, 16)
    rewritten: Any = rewrite(Sized(32), [Monarch(nblocks=4)], x)
    assert inspect.signature(type(rewritten)) == inspect.signature(Sized)
    fresh = type(rewritten)(24, deep=True)
    assert type(fresh) is Sized
    assert fresh.double()(x.double()).shape == (3, 4)
    assert isinstance(rewrite(fresh.float(), [Monarch(nblocks=4)], x).a, MonarchLinear)
    rewritten.__init__(32)
    assert type(rewritten) is Sized
    assert type(rewritten.a) is nn.Linear


def test_a_class_derived_from_that_of_a_rewritten_model_is_refused() -> None:
    rewritten = rewrite(Sized(32), [], torch.randn(3, 16))
    derived = type("Derived", (type(rewritten),), {})
    with pytest.raises(RewriteError, match="derive it from the original class"):
        derived(32)


def test_copies_keep_what_was_taken_for_granted(captured: tuple[nn.Module, nn.Module]) -> None:
    model, rewritten = captured
    buffer = io.BytesIO()
    torch.save(rewritten, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(rewritten),
        pickle.loads(pickle.dumps(rewritten)),
        torch.load(buffer, weights_only=False),
    ):
        assert_equal(again(X), model(X))
        again.inner.config.double = True
        assert not torch.equal(again(X), model(X))
        assert [f.graph for f in again.report.forms] == [1, 1]
    assert_equal(rewritten(X), model(X))


def test_compile_and_export_of_the_result(captured: tuple[nn.Module, nn.Module]) -> None:
    model, rewritten = captured
    assert_equal(torch.compile(copy.deepcopy(rewritten), backend="aot_eager")(X), model(X))
    assert_equal(torch.export.export(copy.deepcopy(rewritten), (X,)).module()(X), model(X))
    again = rewrite(rewritten, [], X)
    assert again.report.capture.rung == "export"
    assert_equal(again(X), model(X))


# modes


class Modes(nn.Module):
    """Regions under no_grad and autocast, and a failure inside them on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fail = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = self.fail(self.a(x))
        with torch.autocast("cpu", torch.bfloat16):
            low = self.fail(self.b(x))
        return self.b(frozen) + low.float()


@pytest.fixture(scope="module")
def switching() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Modes()
    rewritten = rewrite(model, [], X)
    assert rewritten.report.capture.rung == "export"
    assert rewritten.__dict__["_rewriter"].programs[True].changes_modes
    return model, rewritten


def state() -> tuple[Any, ...]:
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return (
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(), depth,
    )  # fmt: skip


def test_regions_under_no_grad_and_autocast(switching: tuple[nn.Module, nn.Module]) -> None:
    model, rewritten = switching
    before = state()
    for m in switching:
        m.zero_grad()
        m(X).sum().backward()
    assert rewritten.a.weight.grad is None
    assert_equal(rewritten.b.weight.grad, model.b.weight.grad)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not rewritten(X).requires_grad
            assert_equal(rewritten(X), model(X))
        assert state() == before


class Fail(nn.ReLU):
    """A layer that the graph calls, and that fails when told to."""

    def __call__(self, *args: Any) -> Any:
        calls.append(state())
        if len(calls) == failing[0]:
            raise KeyError("inside")
        return super().__call__(*args)


calls: list[tuple[Any, ...]] = []
failing = [0]


@pytest.mark.parametrize(("stop", "inside"), [(1, (False, False)), (2, (True, True))])
def test_modes_are_restored_after_an_exception(
    stop: int, inside: tuple[bool, bool], switching: tuple[nn.Module, nn.Module]
) -> None:
    """In the region under no_grad, then in the one under autocast."""
    rewritten = copy.deepcopy(switching[1])
    rewritten.fail = Fail()
    calls.clear()
    failing[0] = stop
    before = state()
    with pytest.raises(KeyError):
        rewritten(X)
    assert calls[-1][:2] == inside
    assert state() == before


def test_two_threads(switching: tuple[nn.Module, nn.Module]) -> None:
    model, rewritten = switching
    expected, wrong = model(X).detach(), []

    def work() -> None:
        for _ in range(30):
            result = rewritten(X)
            if not torch.equal(result, expected) or not result.requires_grad:
                wrong.append(result)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_attributes_named_like_hooks_are_the_models_own() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.inner = Inner()
            self.attention_hooks = ["fc"]
            self.inner.score_hooks = {"scale": 2}

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.fc(x)) * len(self.attention_hooks)

    model = Named().eval()
    optimized = rewrite(model, [], X)
    assert optimized.report.capture.rung == "export"
    torch.testing.assert_close(optimized(X), model(X))
    assert optimized.attention_hooks == ["fc"]
    assert optimized.inner.score_hooks == {"scale": 2}
    model.attention_hooks.append("more")
    optimized.attention_hooks.append("more")
    torch.testing.assert_close(optimized(X), model(X))


def test_state_dict_hooks_change_no_call() -> None:
    optimized = rewrite(Model().eval(), [], X)
    optimized.register_state_dict_post_hook(lambda *_: None)
    optimized.inner.register_state_dict_pre_hook(lambda *_: None)
    optimized(X)  # a warning would be an error


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(x)))


@pytest.mark.parametrize("how", ["new", "copied", "pickled", "moved"])
@pytest.mark.parametrize("training", [False, True])
def test_torch_compile_takes_a_model_that_never_ran_as_one_graph(how: str, training: bool) -> None:
    """The functions of its graphs are there from the start: Dynamo cannot trace how they are
    generated."""
    model = rewrite(Plain(), [], X)
    if how == "copied":
        model = copy.deepcopy(model)
    elif how == "pickled":
        model = pickle.loads(pickle.dumps(model))
    elif how == "moved":
        model = model.to("meta")
    model.train(training)
    torch._dynamo.reset()
    x = X.to("meta") if how == "moved" else X
    found = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert found.shape == (4, 2)
    assert found.device == x.device


def test_hooks_on_all_modules_of_the_process_meet_all_of_them() -> None:
    original = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Identity(), nn.Sequential(nn.ReLU()), nn.Flatten(), nn.Linear(288, 5)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    model: Any = rewrite(original, [], x)
    seen: list[str] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(type(module).__name__)
        return output + 1

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        with pytest.warns(RewriteWarning, match="all modules of the process"):
            found = model(x)
        ours, seen = seen, []
        expected = original(x)
    finally:
        handle.remove()
    assert_equal(found, expected)
    assert ours == seen
    assert_reordered(model(x), original(x))
