"""Capture never fails whole, leaves the caller's model alone, and never serves a wrong result."""

from __future__ import annotations

import copy
import random
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from closeness import assert_equal
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from rewriter import CaptureError, RewriteWarning, SignatureError, explain, rewrite
from rewriter.capture import capture, exporting
from rewriter.capture.program import Program
from rewriter.passes import Monarch

X = torch.arange(32.0).view(4, 8) / 16 - 1


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
        self.t = torch.tensor(2.0)
        self.calls = 0
        self.register_buffer("count", torch.zeros(()), persistent=False)


def build(forward: Callable[..., Any], **children: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = type("Model", (Base,), {"forward": forward})().eval()
    for name, child in children.items():
        model.add_module(name, child.eval())
    return model


def equal(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    assert_equal(a, b)


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    return model(*args, **kwargs)


# sizes


def odd(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * 2 if x.shape[0] % 2 else self.fc(x)


def single(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * 2 if x.shape[0] == 1 else self.fc(x)


def single_in_train(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * 2 if x.shape[0] == 1 and self.training else self.fc(x)


def many(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * 2 if x.shape[0] > 4 else self.fc(x)


def halves(self: Any, x: Tensor) -> Tensor:
    return self.fc(x.view(2, x.shape[0] // 2, 8)) if x.shape[0] % 2 == 0 else self.out(x)


@pytest.mark.parametrize("example", [1, 2, 4])
@pytest.mark.parametrize("forward", [odd, single, single_in_train, many, halves])
def test_branches_on_sizes(forward: Any, example: int) -> None:
    model = build(forward)
    rewritten = rewrite(model, [], X[:example].clone())
    assert rewritten.report.capture.rung == "export"
    for mode in (False, True):
        for rows in (1, 2, 3, 4, 5, 6, 0):
            x = torch.ones(rows, 8)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RewriteWarning)
                equal(rewritten.train(mode)(x), model.train(mode)(x))


def test_sizes_that_the_graph_serves_itself() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.place = nn.Embedding(9, 8), nn.Embedding(6, 8)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
            return x * mask[..., None]

    model = Sequence()
    for rows in (1, 3):
        ids = torch.ones(rows, 4, dtype=torch.long)
        rewritten = rewrite(model, [], (ids, ids), strict_signature=True)
        for shape in ((1, 1), (1, 5), (2, 1), (7, 6)):
            ids = torch.ones(shape, dtype=torch.long)
            equal(rewritten(ids, ids), model(ids, ids))
    with pytest.raises(Exception, match=r"dimension 0, not 2") as caught:
        rewritten(torch.ones(2, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))
    assert type(caught.value).__name__ == "SignatureError"
    with pytest.raises(IndexError):
        rewritten(torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long))


# what a forward may do


class Pair(NamedTuple):
    left: Any
    right: Any


class Items(dict):  # type: ignore[type-arg]
    pass


def no_item(self: Any, x: Tensor) -> Any:
    return self.fc(x) if x.sum().item() > 0 else self.out(x)


def writes(self: Any, x: Tensor) -> Any:
    self.calls += 1
    return self.fc(x) * self.calls


def writes_in_train(self: Any, x: Tensor) -> Any:
    self.calls += int(self.training)
    return self.fc(x) * (self.calls + 1)


def assigns_buffer(self: Any, x: Tensor) -> Any:
    self.count = self.count + 1
    return self.fc(x) * self.count


def updates_buffer(self: Any, x: Tensor) -> Any:
    self.count += 1
    return self.fc(x) * self.count


def reads_attribute(self: Any, x: Tensor) -> Any:
    return self.fc(x) * self.t.item()


def layout(self: Any, x: Tensor) -> Any:
    return self.fc(x) * (2 if x.is_contiguous() else 3)


def numpy_random(self: Any, x: Tensor) -> Any:
    return self.fc(x) * (np.random.rand() if self.training else 1.0)


def python_random(self: Any, x: Tensor) -> Any:
    return self.fc(x) * random.random()


def torch_random(self: Any, x: Tensor) -> Any:
    return self.fc(x) + torch.rand(8)


def in_place(self: Any, x: Tensor) -> Any:
    return self.fc(x.add_(1))


def mixed(self: Any, x: Tensor) -> Any:
    y = self.fc(x)
    return [y, y, x, self.fc.weight, None, 3, x.shape[0], {"n": Pair(y, Items(z=y))}]


def constants(self: Any, x: Tensor) -> Any:
    return self.fc(x) * torch.tensor(2.0 if self.training else 3.0) + torch.arange(8)


FORWARDS: dict[Any, tuple[str, str]] = {
    no_item: ("parts", "data-dependent"),
    writes: ("parts", "writes its attribute 'calls'"),
    writes_in_train: ("export", "writes its attribute 'calls'"),
    assigns_buffer: ("parts", "writes its attribute 'count'"),
    updates_buffer: ("export", ""),
    reads_attribute: ("parts", "reads the value of t"),
    layout: ("export", ""),
    numpy_random: ("export", "NumPy's random numbers"),
    python_random: ("parts", "random numbers"),
    torch_random: ("export", ""),
    in_place: ("export", ""),
    mixed: ("export", ""),
    constants: ("export", ""),
}


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_forwards(forward: Any) -> None:
    rung, reason = FORWARDS[forward]
    model = build(forward)
    example = X.clone()
    rewritten = rewrite(model, [], example)
    info = rewritten.report.capture
    assert info.rung == rung
    assert reason in "; ".join([*(i.reason for i in info.islands), *info.notes])
    equal(example, X)
    for x in (X + 1, X[:2] - 3, torch.arange(64.0).view(8, 8).t()):
        for mode in (False, True, True):
            results = []
            for m in (model, rewritten):
                own = x.clone()
                random.seed(5)
                np.random.seed(5)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RewriteWarning)
                    results.append((run(m.train(mode), own), own))
            equal(results[1], results[0])


def flagged(self: Any, x: Tensor) -> Any:
    x = self.fc(x)[:, : x.shape[1] // 2]
    with torch.no_grad():
        scale = x.abs().amax() if torch.is_grad_enabled() else x.abs().mean()
    return {"a": nn.functional.dropout(x, 0.0 if self.training else 0.0, True), "b": (scale, 1)}


def constant_in_train(self: Any, x: Tensor) -> Any:
    return {"a": self.fc(x), "mode": int(self.training)}


def order_in_train(self: Any, x: Tensor) -> Any:
    first, second = (self.out, self.fc) if self.training else (self.fc, self.out)
    return second(first(x))


def slice_in_train(self: Any, x: Tensor) -> Any:
    y = self.fc(x)
    return y[:4] if self.training else y[: x.shape[0]]


def grad_in_train(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        return self.fc(x) if torch.is_grad_enabled() or not self.training else self.out(x)


def fails_in_train(self: Any, x: Tensor) -> Any:
    y = self.fc(x)
    if self.training:
        raise ValueError("no training")
    return y


def draws_in_train(self: Any, x: Tensor) -> Any:
    if self.training:
        random.random()
    return self.fc(x)


ALIKE: dict[Any, bool] = {
    flagged: True, mixed: True, layout: True, in_place: True,
    constant_in_train: False, order_in_train: False, slice_in_train: False, grad_in_train: False,
    fails_in_train: False, draws_in_train: False, writes_in_train: False, constants: False,
}  # fmt: skip


@pytest.mark.parametrize("forward", ALIKE, ids=lambda f: f.__name__)
def test_one_trace_serves_both_modes_where_they_make_the_same_calls(forward: Any) -> None:
    model = build(forward)
    found = capture(copy.deepcopy(model), X.clone())
    (region,) = found.regions
    assert (found.rung, region.alike) == ("export", ALIKE[forward])
    for mode in (False, True):
        model.train(mode)
        found.root.train(mode)
        if mode and forward is fails_in_train:
            with pytest.raises(ValueError, match="no training"):
                found.root(X.clone())
            continue
        for rows in (4, 3, 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RewriteWarning)
                equal(run(found.root, X[:rows].clone()), run(model, X[:rows].clone()))


def test_dropout_and_batch_norm_have_a_graph_for_each_mode() -> None:
    for layer in (nn.Dropout(0.5), nn.BatchNorm1d(8)):
        (region,) = capture(nn.Sequential(nn.Linear(8, 8), layer), X.clone()).regions
        assert not region.alike
        assert region.graphs.keys() == {False, True}


def drops(self: Any, x: Tensor) -> Any:
    y = nn.functional.dropout(self.fc(x), 0.5, self.training)
    return y + nn.functional.dropout(x, 0.5) - nn.functional.dropout(y, 0.9, False)


def attends(self: Any, x: Tensor) -> Any:
    q = self.fc(x).view(-1, 2, 2, 2).transpose(1, 2)
    dropped = 0.5 if self.training else 0.0
    y = nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=dropped)
    return y.transpose(1, 2).contiguous().view(x.shape[0], 8)


def drops_expanded(self: Any, x: Tensor) -> Any:
    y = nn.functional.dropout(self.fc(x)[:, None].expand(-1, 2, 8), 0.5, self.training)
    return y.transpose(1, 2).contiguous().view(-1, 16)


def drops_more_in_train(self: Any, x: Tensor) -> Any:
    return nn.functional.dropout(self.fc(x), 0.9 if self.training else 0.5, self.training)


def drops_in_place(self: Any, x: Tensor) -> Any:
    return nn.functional.dropout(self.fc(x), 0.5, self.training, True)


def drops_and_asks(self: Any, x: Tensor) -> Any:
    y = nn.functional.dropout(self.fc(x).t(), 0.5, self.training)
    return y if y.is_contiguous() else -y


# from torch 2.14 on dropout in eval mode gives its input itself, and a write to it is one to both
APART = torch.__version__ < "2.14"
DERIVED = {
    drops: APART, attends: True, drops_expanded: APART, drops_more_in_train: False,
    drops_in_place: False, drops_and_asks: False,
}  # fmt: skip


@pytest.mark.parametrize("forward", DERIVED, ids=lambda f: f.__name__)
def test_the_graph_of_train_mode_is_derived_where_only_dropout_differs(
    forward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(forward)
    traced: list[bool] = []
    export = exporting._export
    monkeypatch.setattr(exporting, "_export", lambda *a: traced.append(a[2]) or export(*a))
    found = capture(copy.deepcopy(model), X.clone())
    assert found.rung == "export"
    assert not found.notes
    assert traced == ([False] if DERIVED[forward] else [False, True])
    for mode in (False, True):
        model.train(mode)
        found.root.train(mode)
        for rows in (4, 3):
            equal(run(found.root, X[:rows].clone()), run(model, X[:rows].clone()))


def test_one_tensor_given_twice() -> None:
    model = build(lambda self, a, b: self.fc(a) - 2 * self.fc(b))
    rewritten = rewrite(model, [], (X, X), strict_signature=True)
    equal(rewritten(X, X + 1), model(X, X + 1))
    equal(rewritten(X, X), model(X, X))
    rewritten = rewrite(model, [], (X, X + 1), strict_signature=True)
    with pytest.raises(SignatureError, match="arguments are one tensor, captured as several"):
        rewritten(X, X)


def test_one_tensor_for_two_arguments_is_another_form() -> None:
    """A forward may ask, or write the one and read the other."""

    def forward(self: Any, a: Tensor, b: Tensor) -> Tensor:
        a.add_(1)
        return (self.fc(a) - 2 * self.fc(b)) * (2 if a is b else 3)

    model = build(forward)
    for example in ((X.clone(), X.clone()), (X, X)):
        rewritten = rewrite(model, [], example)
        for rows in (4, 3, 4):
            ours, theirs = ([X[:rows].clone() for _ in range(2)] for _ in range(2))
            equal(rewritten(*ours), model(*theirs))
            equal(ours, theirs)
            one, other = X[:rows].clone(), X[:rows].clone()
            equal(rewritten(one, one), model(other, other))
            equal(one, other)
        assert [(f.graph, f.python) for f in rewritten.report.forms] == [(3, 0), (3, 0)]


@pytest.mark.parametrize("argument", [types.SimpleNamespace(k=2.0), np.ones(1), nn.Identity()])
def test_foreign_arguments_leave_the_root_to_python(argument: Any) -> None:
    def forward(self: Any, x: Tensor, other: Any) -> Tensor:
        return self.fc(x) * float(getattr(other, "k", 3.0))

    rewritten = rewrite(build(forward), [], (X, argument))
    assert "'other' holds" in rewritten.report.capture.islands[0].reason
    equal(rewritten(X, argument), build(forward)(X, argument))


# the rung of parts


def block(self: Any, x: Tensor) -> Tensor:
    return self.out(self.fc(x).relu())


def test_islands_are_listed_with_their_layers_and_parts_are_captured() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.block(self.fc(x))
        x = self.block(x) if bool(x.sum() > 1e9) else x
        return self.twice(x[0]) + self.twice(x)

    model = build(forward, block=build(block), twice=build(block), never=build(block))
    rewritten = rewrite(model, [], X)
    info = rewritten.report.capture
    assert [i.fqn for i in info.islands] == ["", "twice"]
    assert info.islands[0].layers == ["fc", "out"]
    assert info.islands[1].reason == "it is called in 2 different ways"
    assert "_rewriter" in vars(rewritten.block)
    assert "_rewriter" not in vars(rewritten.twice)
    equal(rewritten(X), model(X))


def test_a_time_limit_falls_to_the_next_rung() -> None:
    with pytest.warns(RewriteWarning, match="limit of 0 s of CPU time .* capture_seconds"):
        result = capture(build(block), X, seconds=0.0)
    assert result.rung == "parts"
    assert "time limit" in result.islands[0].reason


def test_hooks_run_as_often_as_before() -> None:
    counts: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda *a, **k: counts.append(name)

    model = build(lambda self, x: self.block(self.fc(x)), block=build(block))
    model.register_forward_hook(hook("root"))
    model.fc.register_forward_pre_hook(hook("pre"), with_kwargs=True)
    model.fc.register_full_backward_hook(hook("backward"))
    whole = rewrite(model, [], X)
    assert whole.report.capture.rung == "export"
    model.block.register_forward_hook(hook("block"))
    parts = rewrite(model, [], X)
    assert "block has hooks" in parts.report.capture.islands[0].reason
    assert counts == []
    x = X.clone().requires_grad_()
    whole(x).sum().backward()
    assert counts == ["pre", "root", "backward"]
    counts.clear()
    parts(x).sum().backward()
    assert counts == ["pre", "block", "root", "backward"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor.*:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.weight_norm(nn.Linear(8, 8)),
        lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: nn.LSTM(8, 8),
        lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.ModuleList([nn.Linear(8, 8)])[0]),
    ],
)
def test_layers_of_torch(make: Callable[[], nn.Module]) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return self.inner(self.fc(x))

    torch.manual_seed(0)
    model = build(forward, inner=make())
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        model(x)  # or the old weight_norm holds a weight that cannot be copied
    rewritten = rewrite(model, [], x)
    equal(run(rewritten, x), run(model, x))
    equal(run(rewritten.train(), x), run(model.train(), x))


def test_ties_dtype_and_requires_grad_survive() -> None:
    model = build(lambda self, x: self.tied(self.fc(x)), tied=nn.Linear(8, 8, bias=False))
    model.tied.weight = model.fc.weight
    model.fc.bias.requires_grad_(False)
    model.to(torch.bfloat16)
    rewritten = rewrite(model, [], X.bfloat16())
    assert rewritten.tied.weight is rewritten.fc.weight
    assert not rewritten.fc.bias.requires_grad
    equal(rewritten(X.bfloat16()), model(X.bfloat16()))


# bad input


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (None, "pass example_inputs"),
        ((), "holds no tensor"),
        ({}, "holds no tensor"),
        ("text", "is a str"),
        ({"x": 3}, "holds no tensor"),
        (torch.ones(0, 8), "empty tensor"),
        (torch.ones(4, 8, device="meta"), "are on meta, the model is on cpu"),
        (X.double(), "itself fails on example_inputs"),
        ({"y": X}, "do not fit Model.forward"),
        ((X, X), "do not fit Model.forward"),
    ],
)
def test_bad_inputs_leave_the_model_untouched(inputs: Any, words: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count += 1
        return self.norm(self.fc(x)) if x.sum() > -1e9 else x

    model = build(forward, norm=nn.BatchNorm1d(8)).train()
    model.fc.eval().register_forward_hook(lambda *a: None)
    before = copy.deepcopy(model)
    rng = torch.get_rng_state()
    for inplace in (False, True):
        with pytest.raises(CaptureError, match=words):
            rewrite(model, [], inputs, inplace=inplace)
    equal(torch.get_rng_state(), rng)
    equal(model.state_dict(), before.state_dict())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert len(model.fc._forward_hooks) == 1
    assert type(model) is type(before)


def value_unless_traced(self: Any, x: Tensor) -> Any:
    traced = isinstance(x, torch._subclasses.FakeTensor)
    return self.out(x) if not traced and x.sum() > 0 else self.fc(x)


def test_a_model_on_meta_runs_as_it_is_traced() -> None:
    """Code that asks for values where it is not traced, as masks in transformers do."""
    for rows in (1, 3):
        model = build(value_unless_traced).to("meta")
        report = explain(model, [Monarch(nblocks=4)], X[:rows])
        assert report.capture.rung == "export"
        assert [(d.site, d.tokens) for d in report.decisions] == [("fc", rows), ("out", None)]
    with pytest.raises(CaptureError, match="On meta tensors have no values"):
        explain(build(no_item).to("meta"), [], X)


def test_a_model_on_meta_moves_its_inputs() -> None:
    model = build(block).to("meta")
    rewritten = rewrite(model, [], X)
    assert "on meta" in rewritten.report.capture.notes[0]
    assert rewritten(X.to("meta")).shape == (4, 8)


# transformers


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(24).view(2, 12) + 3
    return model, rewrite(model, [], {"input_ids": ids}), ids


def test_llama_generates_the_same_tokens(llama: Any) -> None:
    model, rewritten, ids = llama
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = rewritten.generate(input_ids=ids, do_sample=False, max_new_tokens=6)
    equal(got, model.generate(input_ids=ids, do_sample=False, max_new_tokens=6))
    texts = [str(w.message) for w in caught if w.category is RewriteWarning]
    assert len(texts) == len(set(texts)) == 1


@pytest.mark.slow
def test_llama_outputs_and_config(llama: Any) -> None:
    model, rewritten, ids = llama
    ours, theirs = rewritten(input_ids=ids), model(input_ids=ids)
    assert type(ours) is type(theirs)
    equal(ours.logits, theirs.logits)
    cache = ours.past_key_values
    assert type(cache) is type(theirs.past_key_values)
    equal(cache.layers[1].keys, theirs.past_key_values.layers[1].keys)
    assert rewritten.lm_head.weight is rewritten.model.embed_tokens.weight
    changed = copy.deepcopy(rewritten)
    changed.config.output_hidden_states = True
    with warnings.catch_warnings():  # a form of its own, or Python
        warnings.simplefilter("ignore", RewriteWarning)
        assert len(changed(input_ids=ids).hidden_states) == 3


@pytest.mark.slow
def test_minilm_is_bit_equal_and_trains_alike() -> None:
    import importlib.util
    import pathlib

    path = pathlib.Path(__file__).parents[1] / "examples" / "_data.py"
    spec = importlib.util.spec_from_file_location("_minilm_data", path)
    assert spec is not None
    data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data)  # type: ignore[union-attr]
    model, tokenizer = data.load_minilm()
    for module in model.modules():  # also read by attention: SDPA is given its `p`
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = dict(tokenizer(["a cat", "two dogs ran"], padding=True, return_tensors="pt"))
    rewritten = rewrite(model, [], batch)
    assert rewritten.report.capture.rung == "export"
    assert list(rewritten.state_dict()) == list(model.state_dict())
    one = {k: v[:1, :3] for k, v in batch.items()}
    for inputs in (batch, one):
        ours, theirs = rewritten(**inputs), model(**inputs)
        assert type(ours) is type(theirs)
        if inputs is batch:
            equal(dict(ours), dict(theirs))
        else:  # a row of one has other strides, and another matrix kernel
            torch.testing.assert_close(dict(ours), dict(theirs))
    for m in (model, rewritten):
        m.train()
        run(m, **batch).last_hidden_state.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), rewritten.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            equal(a.grad, b.grad)


def asks_the_tensor(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.b(y) if y.requires_grad else y - 1


def asks_the_input(self: Any, x: Tensor) -> Tensor:
    return self.a(x) if x.is_leaf and not x.requires_grad else self.b(x)


def asks_the_history(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    return y if y.grad_fn is None else self.b(y)


def asks_the_tracer(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    return 2 * y if torch.compiler.is_exporting() else self.b(y)


def asks_the_tracer_in_train(self: Any, x: Tensor) -> Tensor:
    return asks_the_tracer(self, x) if self.training else self.a(x)


@pytest.mark.filterwarnings("ignore::rewriter.RewriteWarning")  # that one row runs Python
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "forward",
    [asks_the_tensor, asks_the_input, asks_the_history, asks_the_tracer, asks_the_tracer_in_train],
)
def test_what_a_forward_asks_of_gradients_and_tracers_is_fixed_by_no_graph(
    forward: Callable[..., Any], rows: int
) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    Asks.forward = forward  # type: ignore[method-assign]
    model = Asks()
    optimized = rewrite(model, [], torch.randn(rows, 4))
    for training in (False, True):
        for count, grad, own in ((1, False, False), (2, False, False), (4, True, False),
                                 (3, True, True)):  # fmt: skip
            x = torch.randn(count, 4, requires_grad=own)
            with torch.set_grad_enabled(grad):
                wanted, found = model.train(training)(x), optimized.train(training)(x)
            assert_equal(found.detach(), wanted.detach())


def test_a_graph_is_made_code_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    plain = Program._compile

    def counted(self: Program, device: str) -> Any:
        made.append(self.graph)
        return plain(self, device)

    monkeypatch.setattr(Program, "_compile", counted)
    captured = capture(build(lambda self, x: self.out(self.fc(x))), X)
    (region,) = captured.regions
    assert sorted(map(id, made)) == sorted(map(id, region.graphs.values()))
    first = region.program(False)
    assert region.program(False) is first
    call = next(n for n in region.graphs[False].nodes if n.target == "out")
    call.target = "fc"
    changed = region.program(False)
    assert changed is not first
    assert_equal(changed(captured.root, [X], ""), captured.root.fc(captured.root.fc(X)))
