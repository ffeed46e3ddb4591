"""RemoveBlocks: residual blocks go where shapes are proven to fit, and stay with a reason else."""

from __future__ import annotations

import copy
import pathlib
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import OptionError, PassError, explain, rewrite
from rewriter.base import Pass
from rewriter.modules.bypass import Bypass
from rewriter.passes import Monarch, Quantize, RemoveBlocks, ResizeMLP


class PreNorm(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class PostNorm(PreNorm):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.norm(x + self.down(self.act(self.up(x))))


class CastNorm(PreNorm):
    """As a Llama's: a cast to float32, which leaves x as it is, lies on the way past the layers."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x.to(torch.float32), scale)


class Stack(nn.Module):
    """Blocks in turn, called with an argument that only they read."""

    def __init__(self, kind: type[PreNorm] = PreNorm, count: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(count))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=2.0)
        return self.head(x)


class Residual(nn.Module):
    """A block of ResNet; with a stride, its shortcut has weights."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, stride, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(4, 4, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer = nn.Sequential(Residual(), Residual(2), Residual())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.relu(self.stem(x))).mean((2, 3)))


def without(model: nn.Module, *names: str) -> nn.Module:
    """The same model written without some blocks."""
    found = copy.deepcopy(model)
    for name in names:
        found.set_submodule(name, Bypass())
    return found


def reasons(model: nn.Module, x: Any, where: str, *passes: Pass) -> dict[str, str]:
    report = explain(model, [*passes, RemoveBlocks(where=where)], x)
    return {d.site: d.reason for d in report.steps[1 + len(passes)].decisions}


@pytest.mark.parametrize(
    ("kind", "said"), [(PreNorm, ""), (CastNorm, ""), (PostNorm, "layer_norm went with it")]
)
def test_a_block_goes_from_both_modes_and_from_the_tree(kind: type[PreNorm], said: str) -> None:
    model, x = Stack(kind).eval(), torch.randn(3, 8)
    out = rewrite(model, [RemoveBlocks(where="blocks.1*")], x)
    expected = without(model, "blocks.1")
    assert set(out.state_dict()) == set(expected.state_dict())
    (decision,) = out.report.steps[1].decisions
    assert (decision.site, decision.action) == ("blocks.1", "removed")
    assert decision.reason.endswith(said)
    assert decision.before is not None
    assert out.report.steps[1].after.params < out.report.steps[1].before.params
    for size in (3, 1, 7):  # the graph serves them all, without a warning that Python runs
        x = torch.randn(size, 8)
        torch.testing.assert_close(out(x), expected(x))
    torch.testing.assert_close(out.train()(x), expected.train()(x))
    assert not list(out.blocks[1].parameters())
    out(x).sum().backward()
    assert out.blocks[0].up.weight.grad is not None


def test_the_python_forward_still_runs_where_it_can() -> None:
    model, x = Stack().eval(), torch.randn(3, 8)
    out = rewrite(model, [RemoveBlocks(where="blocks.[01]")], x)
    found = out(x.double().float()[None])
    torch.testing.assert_close(found, without(model, "blocks.0", "blocks.1")(x)[None])


def test_a_resnet_block_goes_and_one_with_a_stride_stays() -> None:
    model, x = ResNet().eval(), torch.randn(2, 3, 8, 8)
    out = rewrite(model, [RemoveBlocks(where="layer.*")], x)
    torch.testing.assert_close(out(x), without(model, "layer.0", "layer.2")(x))
    found = {d.site: (d.action, d.reason) for d in out.report.steps[1].decisions}
    assert found["layer.0"] == ("removed", "x + f(x) → x; its relu went with it")
    assert found["layer.1"][0] == "skipped"
    assert "no sum leads past its layers" in found["layer.1"][1]


@pytest.mark.slow
def test_a_layer_of_bert_goes_as_by_hand() -> None:
    """Two post-norm blocks in one module, with a mask that all layers read."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    batch = {"input_ids": torch.randint(0, 20, (2, 5)), "attention_mask": torch.ones(2, 5).long()}
    out = rewrite(model, [RemoveBlocks(where="encoder.layer.1"), ResizeMLP(keep=6)], batch)
    assert out.encoder.layer[0].intermediate.dense.out_features == 6
    hand: Any = without(model, "encoder.layer.1")
    mine = out.encoder.layer[0]
    hand.encoder.layer[0].intermediate.dense = mine.intermediate.dense
    hand.encoder.layer[0].output.dense = mine.output.dense
    batch["attention_mask"][0, 3:] = 0
    torch.testing.assert_close(out(**batch).last_hidden_state, hand(**batch).last_hidden_state)
    assert not out.report.capture.notes


def test_of_nested_blocks_the_outer_one_goes() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Sequential(PreNorm(), PreNorm())), torch.rand(2, 8)
    out = rewrite(model, [RemoveBlocks(where="1*")], x)
    assert [d.site for d in out.report.steps[1].decisions] == ["1"]
    assert isinstance(out[1], Bypass)


class Inner(PreNorm):
    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        hidden = self.up(self.norm(x))
        return x + self.down(hidden), hidden


class Caches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(8, 8), Inner()

    def forward(self, x: Tensor) -> Any:
        return self.block(self.first(x))


class Feeds(nn.Module):
    """The sum is in the block, f is outside of it: post-norm layers of BERT are written so."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.block = nn.Linear(8, 16), FeedsOut()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return self.block(self.up(x), x) * 2


class FeedsOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(16, 8)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.down(hidden) + x


class Wide(nn.Module):
    """x + f(x) that broadcasts: the result is larger than x."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(8, 1), WideSum()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x)) * 2


class WideSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


class InPlace(PreNorm):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x.add_(self.down(self.act(self.up(self.norm(x)))))


class Hidden(Stack):
    """Hidden states among the outputs: those of `shown` blocks, and the last."""

    def __init__(self, shown: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.shown = nn.Linear(8, 8), shown

    def forward(self, x: Tensor) -> Any:
        x, hidden = self.first(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            hidden += [x] if i in self.shown else []
        return x, hidden


@pytest.mark.parametrize(
    ("model", "where", "words"),
    [
        (Hidden((0, 1, 2)), "blocks.1", "result, .*, is an output of the model that would become"
         " the same tensor as another output, "),
        (Caches(), "block", "an output of the model as well"),
        (Feeds(), "block", "up, which is outside of it, would be left over"),
        (Wide(), "block", r"input is float32\[batch, 1\] on cpu, its result float32\[batch, 8\]"),
        (nn.Sequential(nn.Linear(8, 8), InPlace()), "1", "changes its input in place"),
        (nn.Sequential(PreNorm(), nn.Identity()), "0", "output would be its input"),
        (nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))), "1", "no residual block"),
    ],
)  # fmt: skip
def test_what_cannot_go_stays_with_the_reason(model: nn.Module, where: str, words: str) -> None:
    (reason,) = reasons(model.eval(), torch.randn(3, 8), where).values()
    assert re.search(words, reason), reason


def test_a_block_whose_result_no_other_output_is_goes() -> None:
    model, x = Hidden((0, 1, 2)).eval(), torch.randn(3, 8)
    out: Any = rewrite(model, [RemoveBlocks(where="blocks.*")], x)
    found = {d.site: d.action for d in out.report.steps[1].decisions}
    assert found == {"blocks.0": "removed", "blocks.1": "skipped", "blocks.2": "skipped"}
    with torch.no_grad():
        torch.testing.assert_close(out(x), without(model, "blocks.0")(x))


def test_blocks_that_only_together_make_two_outputs_one_are_an_error() -> None:
    passes = [RemoveBlocks(where="blocks.[12]")]
    with pytest.raises(PassError, match=r"blocks.1, blocks.2 cannot be removed together: .* same"):
        rewrite(Hidden((0,)).eval(), passes, torch.randn(3, 8))
    model = nn.Sequential(PreNorm(), PreNorm()).eval()
    with pytest.raises(PassError, match="removed together: the model's output would be its input"):
        rewrite(model, [RemoveBlocks(where="[01]")], torch.randn(3, 8))


def test_hooks_and_ties_keep_a_block() -> None:
    model, x = Stack().eval(), torch.randn(3, 8)
    model.blocks[0].up.register_forward_hook(lambda *a: None)
    model.blocks[1].down.weight = model.blocks[2].down.weight
    found = reasons(model, x, "blocks.[012]")
    assert found["blocks.0"] == "blocks.0.up has hooks, which would never run again"
    assert found["blocks.1"] == "its down.weight is tied to blocks.2.down.weight, which stays"


def test_without_shapes_nothing_is_proven() -> None:
    model = nn.Sequential(nn.Linear(8, 8), PreNorm()).eval()
    assert "pass example_inputs" in reasons(model, None, "1")["1"]


def test_where_must_be_given_and_must_match() -> None:
    with pytest.raises(OptionError, match="say which blocks go"):
        RemoveBlocks()
    with pytest.raises(OptionError, match="matches none of its"):
        rewrite(Stack(), [RemoveBlocks(where="layer.7")], torch.randn(3, 8))


def test_max_error_and_the_objective_decide_on_the_plan_as_a_whole() -> None:
    model, x = Stack().eval(), torch.randn(3, 8)
    tight = rewrite(model, [RemoveBlocks(where="blocks.1")], x, max_error=1e-6)
    (decision,) = tight.report.steps[1].decisions
    assert decision.action == "declined"
    assert "of the outputs is above max_error 1e-06" in decision.reason
    assert set(tight.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(tight(x), model(x))
    fewer = rewrite(model, [RemoveBlocks(where="blocks.1")], x, objective="params")
    assert isinstance(fewer.blocks[1], Bypass)


def test_a_removal_survives_files_pickles_copies_and_original_checkpoints(
    tmp_path: pathlib.Path,
) -> None:
    model, x = Stack().eval(), torch.randn(3, 8)
    passes = [Monarch(nblocks=2, where="blocks.1.*"), RemoveBlocks(where="blocks.1")]
    out = rewrite(model, [*passes, Quantize("int8-dynamic", where="blocks.0.*")], x)
    expected = out(x)
    out.save(tmp_path)
    loaded = [
        rewriter.load(tmp_path, Stack().eval()),
        rewriter.load(tmp_path, Stack().eval(), example_inputs=x),
        pickle.loads(pickle.dumps(out)),
        copy.deepcopy(out),
    ]
    for again in loaded:
        torch.testing.assert_close(again(x), expected)
        assert isinstance(again.blocks[1], Bypass)
    other = Stack().eval()
    loaded[1].load_original(other.state_dict())
    wanted = rewrite(other, [*passes, Quantize("int8-dynamic", where="blocks.0.*")], x)
    torch.testing.assert_close(loaded[1](x), wanted(x))


def test_explain_changes_nothing() -> None:
    model = Stack().eval()
    before = {k: id(v) for k, v in model.named_modules()}
    assert reasons(model, torch.randn(3, 8), "blocks.1") == {"blocks.1": "x + f(x) → x"}
    assert {k: id(v) for k, v in model.named_modules()} == before


def test_inside_torch_compile_it_is_refused() -> None:
    with pytest.raises(OptionError, match="give the model to rewriter.rewrite"):
        rewriter.backend([RemoveBlocks(where="blocks.1")])
