"""What the example's forward writes into its model is undone, and transformers' recording hooks
neither stop a capture nor get lost."""

from __future__ import annotations

import collections
import copy
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_equal
from torch import Tensor, nn

from rewriter import RewriteWarning, rewrite
from rewriter.capture import capture
from rewriter.passes import Monarch

X = torch.arange(32.0).view(4, 8) / 16 - 1


class Writer(nn.Module):
    """Has state of every kind; `act` is what its forward does with it."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("count", torch.zeros(8))
        self.plain = torch.zeros(8)
        self.half = torch.zeros(2, 8)[0]
        self.listed = [torch.zeros(8)]
        self.nested: dict[str, Any] = {"a": {"b": torch.zeros(8)}, "log": []}
        self.queue = collections.deque([1], maxlen=2)
        self.array = np.zeros(3)
        self.box = types.SimpleNamespace(seen=0, cache=torch.zeros(8))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        with torch.no_grad():
            self.act(self)
        return y * self.scale

    def state(self) -> list[Any]:
        return [
            *self.state_dict().values(), self.plain, self.half, self.listed[0],
            self.nested["a"]["b"], self.box.cache, len(self.listed), len(self.nested["log"]),
            list(self.queue), self.box.seen, self.array.tolist(),
        ]  # fmt: skip


WRITES: dict[str, Any] = {
    "a parameter": lambda m: m.scale.add_(1),
    "a parameter, past autograd": lambda m: m.fc.weight.data.mul_(0.5),
    "a view of a parameter": lambda m: m.fc.weight[0].zero_(),
    "a buffer": lambda m: m.count.add_(1),
    "a tensor": lambda m: m.plain.add_(1),
    "a view": lambda m: m.half.add_(1),
    "a tensor in a list": lambda m: m.listed[0].add_(1),
    "a tensor in dicts": lambda m: m.nested["a"]["b"].add_(1),
    "a tensor in an object": lambda m: m.box.cache.add_(1),
    "an entry of a list": lambda m: m.listed.append(m.plain),
    "an entry of a list in a dict": lambda m: m.nested["log"].append(1),
    "an entry of a deque": lambda m: m.queue.append(2),
    "an array": lambda m: m.array.__iadd__(1),
    "an attribute of an object": lambda m: setattr(m.box, "seen", m.box.seen + 1),
    "out=": lambda m: torch.add(m.plain, 1, out=m.plain),
    "several at once": lambda m: torch._foreach_add_([m.plain, m.scale], 1.0),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("what", WRITES)
def test_writes_of_the_example_are_undone(what: str, inplace: bool) -> None:
    model = Writer(WRITES[what])
    original = copy.deepcopy(model)
    rewritten: Any = rewrite(model, [], X, inplace=inplace)
    assert_equal(model.state(), original.state())
    assert_equal(rewritten.state(), original.state())
    for training in (False, True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RewriteWarning)
            assert_equal(rewritten.train(training)(X), original.train(training)(X))
        assert_equal(rewritten.state(), original.state())


def test_an_embedding_with_a_largest_norm() -> None:
    model = nn.Sequential(nn.Embedding(40, 10, max_norm=1.0), nn.Linear(10, 8))
    model[0].weight.data.mul_(5)
    before, ids = copy.deepcopy(model), torch.arange(8).view(2, 4)
    rewritten = rewrite(model, [], ids, inplace=True)
    assert_equal(model.state_dict(), before.state_dict())
    assert_equal(rewritten(ids), before(ids))
    assert_equal(model.state_dict(), before.state_dict())


# recording hooks

IDS = torch.ones(2, 8, dtype=torch.long)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SMALL, intermediate_size=64, vocab_size=99)
    return transformers.BertModel(config).eval(), {"input_ids": IDS}


def segformer() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 32, 32, generator=generator)
    return transformers.SegformerForSemanticSegmentation(config).eval(), {"pixel_values": pixels}


@pytest.mark.slow
@pytest.mark.parametrize("recorded_before", [False, True])
@pytest.mark.parametrize("make", [bert, segformer])
def test_recording_hooks_are_not_the_users(make: Any, recorded_before: bool) -> None:
    model, call = make()
    if recorded_before:
        model(**call, output_hidden_states=True)
    original = copy.deepcopy(model)
    rewritten: Any = rewrite(model, [Monarch(nblocks=1)], call)
    assert rewritten.report.capture.rung == "export"
    hooks = [len(m._forward_hooks) for m in original.modules()]
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    expected = original(**call, output_hidden_states=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewriteWarning)
        found = rewritten(**call, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states)
    assert_equal(found.hidden_states[-1], expected.hidden_states[-1])
    assert_equal(rewritten(**call)[0], original(**call)[0])  # no warning: the graph serves it still


@pytest.mark.slow
def test_parts_let_outputs_inside_be_recorded() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = bert()

        def forward(self, ids: Tensor, **more: Any) -> Any:
            return self.inner(ids, **more) if ids.sum().item() else ids

    model = Outer().eval()
    expected = model(IDS, output_hidden_states=True).hidden_states
    found = capture(copy.deepcopy(model), IDS)
    assert found.rung == "parts"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewriteWarning)
        recorded = found.root(IDS, output_hidden_states=True).hidden_states
    assert len(recorded) == len(expected)
    assert_equal(recorded[1], expected[1])
