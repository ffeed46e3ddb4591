"""Ways of calling a rewritten model: each is captured when it first comes, and counted."""

from __future__ import annotations

import copy
import json
import logging
import pathlib
import pickle
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from torch import Tensor, nn
from torch import is_grad_enabled as grads_are_on

from rewriter import MemoryBudget, RewriteWarning, SignatureError, load, rewrite
from rewriter.capture.forms import MAX_FORMS
from rewriter.capture.reads import recording
from rewriter.errors import CaptureError
from rewriter.passes import Monarch, Quantize, Threshold, TopK

X = torch.arange(128.0).view(8, 16) / 64 - 1


class Net(nn.Module):
    """Options, an optional tensor, keywords, and a config of which it reads one field."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 16)
        self.config = Config()

    def forward(
        self, x: Tensor, mask: Tensor | None = None, twice: bool = False, **more: Any
    ) -> Any:
        x = self.fc(x) * self.config.scale
        x = x if mask is None else self.head(x * mask)
        return {"out": x * 2 if twice else x, **more}


class Config:
    def __init__(self) -> None:
        self.scale, self.architectures, self.use_cache = 2.0, None, True


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def runs(model: Any) -> list[tuple[int, int]]:
    """Per form (calls by a graph, calls in Python)."""
    return [(f.graph + f.lowered + f.planned, f.python) for f in model.report.forms]


@pytest.fixture(scope="module")
def captured() -> nn.Module:
    return rewrite(net(), [], X)


@pytest.fixture
def model(captured: nn.Module) -> nn.Module:
    return copy.deepcopy(captured)


def test_arguments_at_their_default_are_not_given(model: nn.Module) -> None:
    for call in ((X, None), (X, None, False)):
        assert_equal(model(*call), net()(*call))
    assert_equal(model(x=X, twice=False, mask=None), net()(X))
    assert runs(model) == [(3, 0)]


def test_a_new_form_is_captured_when_it_first_comes(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, lines = torch.ones(8, 1) / 2, []
    logger = logging.getLogger("rewriter")
    monkeypatch.setattr(logger, "handle", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(logger, "isEnabledFor", lambda level: True)
    for _ in range(3):
        assert_equal(model(X, twice=True), net()(X, twice=True))
        assert_equal(model(X, mask=mask), net()(X, mask))
    assert runs(model) == [(0, 0), (3, 0), (3, 0)]
    said = [line.partition(": ")[2].partition(" new form")[0] for line in lines]
    assert said == ["capturing a", "captured a"] * 2  # the first before a wait of seconds
    assert lines[2] == "Net: capturing a new form (0: float32[8, 16], mask: float32[8, 1])"
    assert "(x: float32[batch, 16], mask: float32[batch, 1]) in " in lines[3]
    assert "twice=True" in model.report.forms[1].call
    assert "mask" in model.report.forms[2].call


def test_new_forms_train_and_survive_copies(model: nn.Module) -> None:
    mask = torch.ones(8, 1) / 2
    model(X, mask)
    original = net().train()
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for m in (again.train(), original):
            m.zero_grad()
            m(X, mask)["out"].sum().backward()
            m(X, mask, twice=True)["out"].sum().backward()
        for p, q in zip(again.parameters(), original.parameters(), strict=True):
            assert_equal(p.grad, q.grad)
        assert [graph > 0 and not python for graph, python in runs(again)[1:]] == [True, True]


def test_a_form_that_first_comes_in_inference_mode_trains() -> None:
    original = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).eval()
    model = rewrite(original, [], X[:, None].expand(8, 16, 16).contiguous())
    with torch.inference_mode():
        assert_equal(model(X.clone()), original(X))
    model.train()(X).sum().backward()
    assert runs(model) == [(0, 0), (2, 0)]


def test_layers_of_new_forms_are_the_rewritten_ones() -> None:
    model = rewrite(net(), [Monarch(nblocks=4)], X)
    mask = torch.ones(8, 1)
    expected = model.head(model.fc(X) * 2)
    assert_equal(model(X, mask)["out"], expected)
    model.head = nn.Linear(16, 16)  # and what is put there later
    assert_equal(model(X, mask)["out"], model.head(model.fc(X) * 2))
    assert runs(model)[1] == (2, 0)


def test_a_list_of_calls_is_captured_at_once() -> None:
    mask = torch.ones(8, 1) / 2
    model = rewrite(net(), [Monarch(nblocks=4)], [X, (X, mask), {"x": X, "twice": True}])
    assert {d.site for d in model.report.replaced} == {"fc", "head"}  # only the second calls head
    model(X), model(X, mask), model(X, twice=True)
    assert runs(model) == [(1, 0)] * 3
    assert not any(f.seconds for f in model.report.forms)
    with pytest.raises(CaptureError, match="empty list"):
        rewrite(net(), [], [])


def test_two_tensors_in_a_list_are_two_calls() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    with pytest.raises(CaptureError, match="a list holds several calls"):
        rewrite(Two(), [], [X, X])
    assert_equal(rewrite(Two(), [], (X, X))(X, X), X + X)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_graph_serves_every_batch(rows: int) -> None:
    model = rewrite(net(), [], X[:rows].clone())
    for n in (1, 2, 3, 64):
        assert_equal(model(torch.ones(n, 16)), net()(torch.ones(n, 16)))
    assert runs(model) == [(4, 0)]


def test_the_other_branch_on_a_size_is_another_form() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * 2 if x.shape[0] > 4 else self.fc(x)

    original = Branch()
    model = rewrite(original, [], X)
    for n in (1, 2, 4, 5, 9):
        assert_equal(model(torch.ones(n, 16)), original(torch.ones(n, 16)))
    assert sorted(runs(model)) == [(2, 0), (3, 0)]


class _Attention(nn.Module):
    """Whose layers a graph alone reaches: its Python hands the weights to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    "passes",
    [
        *([Quantize(scheme)] for scheme in (
            "int8-dynamic", "int8-static", "int8-weight", "int4-weight", "int4-dynamic",
            "fp8-weight", "bf16",
        )),
        [Monarch(nblocks=4)],
        [TopK(0.25)],
        [Threshold(0.5, inputs="all")],
    ],
    ids=str,
)  # fmt: skip
def test_no_rows_give_no_rows(passes: Any) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    x = torch.randn(128, 64)
    some = passes[0]
    needs = isinstance(some, Threshold) or getattr(some, "scheme", "") == "int8-static"
    model = rewrite(original, passes, x, calibration=[x] * 2 if needs else None)
    for grad, empty in ((False, x[:0]), (True, x[:0]), (False, x.new_empty(2, 0, 64))):
        with torch.set_grad_enabled(grad):
            assert_equal(model(empty), original(empty))
            assert model(x).shape == x.shape  # as before


def test_no_rows_are_served_where_only_a_graph_reaches_the_layers() -> None:
    torch.manual_seed(0)
    original, x = _Attention().eval(), torch.randn(4, 8, 16)
    model = rewrite(original, [Quantize("int8-weight")], x)
    for _ in range(2):
        assert_equal(model(x[:0]), original(x[:0]))
    assert runs(model) == [(0, 0), (2, 0)]


def test_a_call_on_another_device_is_not_told_of_example_inputs() -> None:
    model = rewrite(_Attention().eval(), [Quantize("int8-weight")], torch.randn(4, 8, 16))
    with pytest.raises(SignatureError, match="inputs are on meta, the model is on cpu") as error:
        model(torch.empty(4, 8, 16, device="meta").double())
    assert "example_inputs are" not in str(error.value)


def test_the_number_of_forms_is_bounded(model: nn.Module) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(MAX_FORMS + 3):
            assert_equal(model(X, note=i), net()(X, note=i))
    assert len(model.report.forms) == MAX_FORMS + 1
    assert runs(model)[-1] == (0, 4)
    assert len(caught) == 1
    assert f"{MAX_FORMS} forms" in str(caught[0].message)


class Fails(nn.Module):
    """Branches on data with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.tries = nn.Linear(16, 16), []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and mask.sum() > 0:
            return self.fc(x) * 2
        return self.fc(x)


def test_what_cannot_be_captured_runs_python_and_is_not_tried_again() -> None:
    original = Fails()
    model = rewrite(original, [], X)
    state = vars(model)["_rewriter"]
    tried = []
    state.capturer = lambda *call, real=state.capturer: tried.append(call) or real(*call)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (8, 8, 4):
            assert_equal(model(X[:n], torch.ones(n)), original(X[:n], torch.ones(n)))
    assert "'mask' was not in the captured call" in str(caught[0].message)
    assert len(tried) == len(caught) == 1
    assert runs(model) == [(0, 0), (0, 3)]
    assert model.report.forms[1].reason
    assert "3× in Python (GuardOnDataDependentSymNode" in str(model.report)


def test_a_strict_signature_captures_nothing() -> None:
    model = rewrite(net(), [], X, strict_signature=True)
    with pytest.raises(SignatureError, match="'twice' was not in the captured call"):
        model(X, twice=True)
    model.config.architectures = ["Net"]
    model(X)


def test_what_the_forward_never_read_does_not_count(model: nn.Module) -> None:
    model.config.architectures, model.config.use_cache = ["Net"], False
    model.config.new, model._trainer = {"a": 1}, object()
    assert_equal(model(X), net()(X))
    assert runs(model) == [(1, 0)]
    model.config.scale = 5.0
    assert_equal(model(X)["out"], net().fc(X) * 5)
    assert runs(model) == [(1, 0), (1, 0)]


class Mapped(Config):
    """Another name for a field, a property, a dict of its own, as configs of libraries have."""

    names = {"size": "scale"}

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(Mapped.names.get(name, name))

    @property
    def double(self) -> float:
        return 2 * self.scale


class Held:
    def __init__(self) -> None:
        self._values = {"scale": 1}

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["_values"][name]


def test_reads_are_noted_under_the_name_that_is_stored() -> None:
    holder = nn.Module()
    holder.a, holder.b, holder.c, holder.d = Mapped(), Held(), types.SimpleNamespace(x=1), Config()
    with recording(holder) as reads:
        assert holder.a.size == 2
        assert holder.b.scale == 1
        assert holder.c.x == 1
        assert type(copy.copy(holder.d)) is Config
    assert "scale" in (reads.of(holder.a) or ())
    assert "architectures" not in (reads.of(holder.a) or ())
    assert "_values" in (reads.of(holder.b) or ())
    assert reads.of(holder.c) is None  # of a built-in type: nobody can look on
    assert reads.of(holder.d) is None  # handed out whole
    assert type(holder.a) is Mapped
    assert type(holder) is nn.Module


@pytest.mark.slow
def test_attention_without_the_mask_it_was_captured_with() -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 6, 16)
    call = {"query": x, "key": x, "value": x}
    mask = torch.arange(6).repeat(2, 1) > 3
    for passes in ([Monarch(nblocks=4)], [Quantize("int8-dynamic")]):
        model = rewrite(original, passes, {**call, "key_padding_mask": mask})
        assert model.report.replaced
        assert_reordered(model(**call)[0], rewrite(original, passes, call)(**call)[0])
        assert model(**call, need_weights=False)[1] is None
        assert runs(model) == [(0, 0), (1, 0), (1, 0)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*original Python forward:rewriter.errors.RewriteWarning")
def test_parts_capture_calls_of_layers_that_only_their_graphs_reach() -> None:
    """A decoder's mask makes it ask for values, so that its layers are captured by themselves."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    original = nn.TransformerDecoder(layer, 1).eval()
    call = {"tgt": torch.randn(2, 4, 16), "memory": torch.randn(2, 5, 16)}
    masked = {**call, "tgt_mask": nn.Transformer.generate_square_subsequent_mask(4)}
    model = rewrite(original, [Quantize("int8-dynamic")], masked)
    assert model.report.capture.rung == "parts"
    for given in (masked, call, masked, {**call, "memory_mask": torch.zeros(4, 5)}):
        for own in (model, copy.deepcopy(model)):
            assert (own(**given) - original(**given)).abs().max() < 0.05


@pytest.mark.parametrize("rest", [(), (X,), (X, X)])
def test_positional_arguments_of_any_number(rest: tuple[Tensor, ...]) -> None:
    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.fc(args[0]) + sum(args[1:]) + kwargs.get("in", 0)

    class Rest(All):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            return self.fc(x) + sum(rest)

    for original in (All(), Rest()):
        model = rewrite(original, [], (X, *rest))
        assert_equal(model(X, *rest), original(X, *rest))
        assert_equal(model(X, X, X, X), original(X, X, X, X))
        assert runs(model) == [(1, 0), (1, 0)]
    odd = {"in": X, "a b": 1, "x'": X}
    original = All()
    assert_equal(rewrite(original, [], (X,))(X, **odd), original(X, **odd))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        names = ("in", "class", "it's", 'say "hi"', "a\nb", "x); raise SystemExit(0")
        self.layers = nn.ModuleDict({n: nn.Linear(16, 16) for n in names})
        for name in names:
            self.layers.register_parameter(f"p {name}", nn.Parameter(torch.ones(16)))

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.layers.items():
            x = layer(x) * getattr(self.layers, f"p {name}")
        return x


def test_names_of_modules_are_never_code() -> None:
    original = Named()
    model = rewrite(original, [], X)
    assert_equal(model(X), original(X))
    assert_equal(pickle.loads(pickle.dumps(model))(X), original(X))
    assert model.report.capture.rung == "export"


class Bag:
    """A foreign object with tensors in attributes; some such can be called."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __call__(self) -> None: ...


def test_an_object_with_tensors_is_an_argument() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

        def forward(self, bag: Any) -> Tensor:
            return self.net(bag.x)

    original = Takes()
    for bag in (Bag(X), types.SimpleNamespace(x=X)):
        model = rewrite(original, [Monarch(nblocks=4)], (bag,))
        assert len(model.report.replaced) == 2
        model(bag)
        forms = {f.module: f for f in model.report.forms}
        assert forms["net"].graph + forms["net"].lowered == 1
        assert "which the call may change in place" in forms[""].reason


def test_warnings_are_short_and_hold_no_address() -> None:
    class Cache:
        pass

    model = rewrite(net(), [], X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(X, cache=Cache())
    assert len(caught) == 1
    assert "0x" not in str(caught[0].message)
    assert "argument 'cache' holds a Cache" in str(caught[0].message)
    assert len(model.report.forms) == 2


def test_a_loaded_model_captures_its_calls(tmp_path: pathlib.Path) -> None:
    model = rewrite(net(), [Monarch(nblocks=4)], X)
    model.save(tmp_path)
    loaded = load(tmp_path, net())
    assert loaded.report.forms == []
    for _ in range(2):
        assert_reordered(loaded(X)["out"], model(X)["out"])
        loaded(X, twice=True)
    assert runs(loaded) == [(2, 0), (2, 0)]


def test_a_new_form_trains_by_the_memory_budget() -> None:
    original = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(original)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            out = self.net(x)
            return out if labels is None else (out, (out - labels).square().mean())

    model = rewrite(Loss(), [], X, memory_budget=MemoryBudget(1.0))
    plain = rewrite(Loss(), [], X)
    for m in (model.train(), plain.train()):
        for _ in range(2):
            m(X, labels=X)[1].backward()
    assert model.report.forms[1].planned == 2
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_reordered(p.grad, q.grad)


def test_other_threads_run_python_while_one_captures(model: nn.Module) -> None:
    state = vars(model)["_rewriter"]
    inside, release = threading.Event(), threading.Event()

    def slow(*call: Any, real: Any = state.capturer) -> Any:
        inside.set()
        assert release.wait(60)
        return real(*call)

    state.capturer = slow
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(model(X, twice=True)))
    thread.start()
    assert inside.wait(60)
    with pytest.warns(RewriteWarning, match="'twice' was not in the captured call"):
        results.append(model(X, twice=True))
    release.set()
    thread.join()
    for result in results:
        assert_equal(result, net()(X, twice=True))
    assert runs(model)[1] == (1, 0)


def test_nothing_is_captured_under_a_tracer(model: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert_equal(compiled(X, twice=True), net()(X, twice=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewriteWarning)
        batched = torch.func.vmap(lambda x: model(x, twice=True)["out"])(X[None])
    assert_equal(batched[0], net()(X, twice=True)["out"])
    assert len(model.report.forms) == 1


def test_a_forward_patched_on_the_model_is_around_its_graph(model: nn.Module) -> None:
    """As accelerate does it, for mixed precision."""
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert_equal(model(X), net()(X))
    assert runs(model) == [(0, 0), (2, 0)]


def test_the_report_lists_the_forms(model: nn.Module) -> None:
    assert "Calls so far" not in str(model.report)
    model(X), model(X, twice=True)
    text = str(model.report)
    assert "Calls so far" in text
    assert "twice=True: 1× as graph" in text
    assert "twice=True" in model.report.to_markdown()
    stored = json.loads(model.report.to_json())["forms"]
    assert [f["graph"] for f in stored] == [1, 1]
    again = type(model.report).from_json(model.report.to_json())
    assert again.forms == model.report.forms
    older = {k: v for k, v in model.report.to_dict().items() if k != "forms"}
    assert type(model.report).from_dict(older).forms == []


class Once(Net):
    """Sets a field of its config where it finds none, and says how often in another."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.always, self.config.kind = always, None  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        config: Any = self.config
        if self.always or config.kind is None:
            config.kind = "rows"
        return self.fc(x) * (2 if config.kind == "rows" else 3)


def test_a_constant_that_the_first_call_sets_does_not_stop_a_capture() -> None:
    original = Once().eval()
    model = rewrite(original, [], X)
    assert original.config.kind is None
    assert model.report.capture.rung == "export"
    assert_equal(model(X), original(X))
    assert runs(model) == [(1, 0)]
    assert rewrite(Once(always=True).eval(), [], X).report.capture.rung == "export"


def narrowed(self: Any, x: Tensor) -> Any:  # as Swin's window
    if x.shape[2] <= self.seen:
        self.seen = x.shape[2]
    return self.fc(x.mean(2)) * self.seen


def counted(self: Any, x: Tensor) -> Any:  # of an open size
    self.seen = x.shape[0]
    return self.fc(x.mean(2)) * self.seen


def noted(self: Any, x: Tensor) -> Any:  # for others to read
    self.seen = x.shape[2]
    return self.fc(x.mean(2))


def hidden(self: Any, x: Tensor) -> Any:  # from a trace
    if not torch.compiler.is_compiling():
        self.seen = x.shape[0]
    return self.fc(x.mean(2)) * self.seen


@pytest.mark.parametrize(
    ("forward", "rung"),
    [(narrowed, "export"), (counted, "parts"), (noted, "parts"), (hidden, "parts")],
)
@pytest.mark.filterwarnings("ignore::rewriter.errors.RewriteWarning")
def test_what_every_call_sets_is_a_constant_where_it_hangs_on_no_open_size(
    forward: Any, rung: str
) -> None:
    original = type("Sets", (Net,), {"forward": forward})().eval()
    original.seen = 7
    model = rewrite(original, [], torch.ones(3, 16, 6))
    assert model.report.capture.rung == rung
    for rows, width in ((3, 6), (2, 6), (3, 5), (2, 6), (4, 9), (3, 5)):
        x = torch.randn(rows, 16, width)
        assert_equal(model(x), original(x))
        assert model.seen == original.seen


class LastWidth(Net):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = self.fc(x) * getattr(self, "width", 1)
        self.width = x.shape[1]
        return y


@pytest.mark.parametrize("calls_before", [0, 1, 2])
def test_what_a_call_leaves_for_the_next_is_never_fixed(calls_before: int) -> None:
    original = LastWidth().eval()
    for _ in range(calls_before):
        original(torch.randn(3, 6, 16))
    model = rewrite(original, [], torch.randn(3, 6, 16))
    assert model.report.capture.rung == "parts"
    for rows in (6, 2, 6, 9, 1):
        x = torch.randn(3, rows, 16)
        assert_equal(model(x), original(x))


class Asks(Net):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.fc(x) * (2 if torch.is_grad_enabled() else 3)


class AsksByName(Net):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.fc(x) * (2 if grads_are_on() else 3)


@pytest.mark.parametrize("kind", [Asks, AsksByName])
@pytest.mark.parametrize("training", [False, True])
def test_a_forward_that_asks_for_gradients_has_a_form_for_each(kind: Any, training: bool) -> None:
    original = kind().train(training)
    model = rewrite(original, [], X)
    for _ in range(2):
        assert_equal(model(X), original(X))
        for without in (torch.no_grad(), torch.inference_mode()):
            with without:
                assert_equal(model(X), original(X))
    assert runs(model) == [(2, 0), (4, 0)]


class AsksBeforeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.fc(x) * (2 if torch.is_grad_enabled() else 3))


@pytest.mark.slow
def test_one_row_shows_how_a_forward_that_asks_for_gradients_is_with_them() -> None:
    x = torch.randn(1, 4, 16)
    original = AsksBeforeAttention().eval()
    model = rewrite(original, [Quantize("int8-dynamic")], x)
    assert "layer.self_attn.in_proj_weight" in [d.site for d in model.report.replaced]
    same: Any = rewrite(original, [], x)
    for rows in (1, 3):
        batch = torch.randn(rows, 4, 16)
        model(batch)
        assert_reordered(same(batch), original(batch))


ASKED: dict[str, Callable[[Net, Tensor], bool]] = {
    "inference mode": lambda m, x: torch.is_inference_mode_enabled(),
    "the input": lambda m, x: x.requires_grad,
    "a weight": lambda m, x: m.fc.weight.requires_grad,
    "a leaf": lambda m, x: (x * m.fc.bias).is_leaf,
    "a history": lambda m, x: m.fc(x).grad_fn is None,
    "a tensor's mode": lambda m, x: x.is_inference(),
}


class AsksOtherwise(Net):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.fc(x) * (2 if ASKED[self.what](self, x) else 3)


@pytest.mark.parametrize("what", ASKED)
def test_a_forward_that_asks_what_has_gradients_is_right(what: str) -> None:
    original = AsksOtherwise(what).eval()
    model = rewrite(original, [Monarch(where="head")], X, inplace=False)
    with torch.inference_mode():
        own = X.clone()
    for frozen in (False, True):
        for module in (original, model):
            module.requires_grad_(not frozen)
        assert_equal(model(X), original(X))
        assert_equal(model(X.clone().requires_grad_()), original(X.clone().requires_grad_()))
        for without, x in ((torch.no_grad(), X), (torch.inference_mode(), X),
                           (torch.inference_mode(), own)):  # fmt: skip
            with without:
                assert_equal(model(x), original(x))


class Makes(Net):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + torch.ones(16)


def test_another_default_dtype_is_another_form() -> None:
    original = Makes().eval()
    model = rewrite(original, [], X)
    torch.set_default_dtype(torch.float64)
    try:
        assert_equal(model(X), original(X))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(model(X), original(X))
    assert runs(model) == [(1, 0), (1, 0)]


def test_a_call_that_fails_by_itself_fails_as_the_original_does() -> None:
    original = net()
    model = rewrite(original, [], X)
    for wrong in ((torch.randn(4, 15),), (X, "mask")):
        with pytest.raises(Exception) as plain:  # noqa: PT011
            original(*wrong)
        with pytest.raises(type(plain.value)):  # and no warning, and no form of it in the report
            model(*wrong)
    assert runs(model) == [(0, 0)]
    model(X)
    assert runs(model) == [(1, 0)]


def test_open_sizes_are_named_by_their_role_or_argument() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return self.fc(x).sum() + (0 if other is None else other.sum())

    model = rewrite(Two(), [], (X, torch.ones(5, 3)))
    call = "x: float32[batch, 16], other: float32[other_0, other_1]"
    assert model.report.capture.signature == model.report.forms[0].call == call
    assert model.report.sizes == {"batch": 8, "other_0": 5, "other_1": 3}
    assert model.report.at(other_1=300).sizes["other_1"] == 300
    model(X)
    assert model.report.forms[1].call == "x: float32[batch, 16]"
