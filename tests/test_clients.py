"""transformers, accelerate and Lightning with rewritten models: what they do to a model holds."""

from __future__ import annotations

import copy
import functools
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import assert_reordered
from torch import Tensor, nn

from rewriter import CaptureError, Pass, rewrite
from rewriter.passes import Monarch, Quantize

pytestmark = [pytest.mark.clients, pytest.mark.slow]
RECIPES: dict[str, list[Pass]] = {
    "monarch": [Monarch(nblocks=2)],
    "int8": [Quantize("int8-dynamic")],
}
IDS = torch.arange(16).view(2, 8)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Calls of another form run Python, with a warning: not what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def _llama(recipe: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=40, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return rewrite(model, RECIPES[recipe], {"input_ids": IDS, "labels": IDS})


def llama(recipe: str) -> Any:
    return copy.deepcopy(_llama(recipe))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradient_checkpointing_gives_the_same_gradients(recipe: str) -> None:
    plain, checkpointed = llama(recipe), llama(recipe)
    checkpointed.gradient_checkpointing_enable()
    want, got = gradients(plain), gradients(checkpointed)
    assert got.keys() == want.keys()
    assert len(want) > 2
    for name, gradient in want.items():
        assert_reordered(got[name], gradient)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_rewritten_head_grows_with_the_vocabulary(recipe: str) -> None:
    """The new head is a dense `nn.Linear`, whose old rows are those of the rewritten one."""
    model = llama(recipe)
    assert type(model.lm_head) is not nn.Linear
    before, rows = model(input_ids=IDS).logits, model.lm_head.dense_weight()
    model.resize_token_embeddings(44)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.lm_head.weight[:40], rows)
    after = model(input_ids=IDS).logits
    assert after.shape == (2, 8, 44)
    if recipe == "int8":  # the head's inputs are no longer rounded
        assert (after[..., :40] - before).norm() < 0.02 * before.norm()
    else:
        assert_reordered(after[..., :40], before)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_accelerate_trains_and_hands_back_the_model(recipe: str, precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = llama(recipe).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    first = prepared(input_ids=IDS, labels=IDS).loss
    accelerator.backward(first)
    optimizer.step()
    own = accelerator.unwrap_model(prepared)
    assert type(own) is type(model)
    assert own(input_ids=IDS, labels=IDS).loss < first
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("whole", [False, True], ids=["inner", "whole"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_lightning_trains_and_resumes(recipe: str, whole: bool, tmp_path: pathlib.Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))

    def module() -> Any:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        if whole:
            return rewrite(Module(inner), RECIPES[recipe], rows)
        return Module(rewrite(inner, RECIPES[recipe], rows))

    def fitted(steps: int, model: Any, resumed: str | None = None) -> Any:
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(rows, batch_size=4), ckpt_path=resumed)
        return trainer

    file, model = str(tmp_path / "half.ckpt"), module()
    start = copy.deepcopy(model.state_dict())
    fitted(2, model).save_checkpoint(file)
    assert any(not torch.equal(start[n], t) for n, t in model.state_dict().items())
    resumed = module()
    fitted(2, resumed, file)  # nothing left to do
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


def test_a_model_whose_weights_are_on_disk_is_refused_for_what_it_is(
    tmp_path: pathlib.Path,
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    x = torch.randn(6, 8)
    places = {"0": "disk", "1": "cpu", "2": "cpu"}
    spread = accelerate.dispatch_model(
        copy.deepcopy(model), places, "cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert torch.equal(spread(x), model(x))
    with pytest.raises(CaptureError, match="the weights of 0 are on meta.*before dispatch_model"):
        rewrite(spread, RECIPES["int8"], x)
    first: Any = rewrite(model, RECIPES["int8"], x)
    expected = first(x)
    spread = accelerate.dispatch_model(
        first, places, "cpu", offload_dir=str(tmp_path / "more"), force_hooks=True
    )
    assert torch.equal(spread(x), expected)
