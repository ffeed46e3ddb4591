"""`save_pretrained` of transformers, diffusers and sentence-transformers on rewritten models."""

from __future__ import annotations

import copy
import functools
import pathlib
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from marks import slow_but
from torch import Tensor, nn

from rewriter import OptionError, Pass, StoreError, from_pretrained, load, rewrite
from rewriter.passes import Monarch, Quadratic, Quantize, TopK

transformers = pytest.importorskip("transformers")

RECIPES: dict[str, list[Pass]] = {
    "monarch": [Monarch(nblocks=2)],
    "int8": [Quantize("int8-dynamic")],
    "int8 monarch": [Monarch(nblocks=2), Quantize("int8-dynamic")],
    "topk": [TopK(4)],
    "quadratic": [Quadratic()],
}
IDS = torch.arange(16).view(2, 8)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Their progress bars and logs are not ours to test."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    transformers.logging.set_verbosity(level)
    transformers.logging.enable_progress_bar()


def bert(cls: Any = None) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=40, max_position_embeddings=16,
    )  # fmt: skip
    return (cls or transformers.BertForSequenceClassification)(config).eval()


def logits(model: nn.Module) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of calls that run the Python forward
        return model(input_ids=IDS).logits.detach()


@functools.cache
def _rewritten(recipe: str) -> nn.Module:
    return rewrite(bert(), RECIPES[recipe], {"input_ids": IDS})


def rewritten(recipe: str) -> nn.Module:
    return copy.deepcopy(_rewritten(recipe))


@pytest.mark.parametrize("recipe", slow_but(RECIPES, list(RECIPES).index("int8")))
def test_what_save_pretrained_writes_loads_again(recipe: str, tmp_path: pathlib.Path) -> None:
    model = rewritten(recipe)
    model.save_pretrained(tmp_path)
    cls = transformers.BertForSequenceClassification
    for again in (
        from_pretrained(cls, tmp_path),
        from_pretrained(type(model), tmp_path),
        from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path),
        load(tmp_path, bert()),
    ):
        assert isinstance(again, cls)
        assert not again.training
        assert torch.equal(logits(again), logits(model))
        assert not hasattr(again.config, "transformers_weights")


@pytest.mark.parametrize("recipe", ["monarch", "topk"])
def test_the_plain_loader_says_what_to_call(recipe: str, tmp_path: pathlib.Path) -> None:
    """It would fill in random layers, or (TopK, whose keys are the original's) leave them out."""
    rewritten(recipe).save_pretrained(tmp_path)
    for cls in (transformers.BertForSequenceClassification, transformers.AutoModel):
        with pytest.raises(ValueError, match=r"was rewritten: load it with rewriter\.from"):
            cls.from_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "bert"


def test_saving_again_replaces_the_save(tmp_path: pathlib.Path) -> None:
    model = rewritten("monarch")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.save_pretrained(tmp_path)
    again = from_pretrained(type(model), tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "other")
    assert torch.equal(logits(load(tmp_path / "other", bert())), logits(model))


def test_a_given_state_dict_is_what_is_saved(tmp_path: pathlib.Path) -> None:
    model = rewritten("int8")
    other = {k: v + 1 if k == "classifier.bias" else v for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=other)
    again = load(tmp_path, bert())
    assert torch.equal(again.classifier.bias, model.classifier.bias + 1)


def test_another_process_writes_nothing(tmp_path: pathlib.Path) -> None:
    rewritten("monarch").save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("recipe.json"))


def test_an_upload_would_lack_the_recipe(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StoreError, match="huggingface_hub.upload_folder"):
        rewritten("monarch").save_pretrained(tmp_path, push_to_hub=True)
    assert not list(tmp_path.iterdir())


def test_a_class_without_a_config_needs_the_original(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OptionError, match=r"rewriter.load\(directory, model\)"):
        from_pretrained(nn.Linear, tmp_path)
    with pytest.raises(StoreError, match="no config.json"):
        from_pretrained(transformers.BertModel, tmp_path / "none")


def test_a_rewritten_model_that_was_pickled_saves_too(tmp_path: pathlib.Path) -> None:
    model = pickle.loads(pickle.dumps(rewritten("topk")))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, bert())), logits(model))


def test_a_class_with_a_save_of_its_own_and_no_save_pretrained_keeps_it() -> None:
    model = rewrite(_Saves(4, 4), [], torch.randn(2, 4))
    assert model.save(3) == 4


class _Saves(nn.Linear):
    def save(self, x: int) -> int:
        return x + 1


@pytest.mark.slow
@pytest.mark.clients
@pytest.mark.parametrize("recipe", ["monarch", "int8"])
def test_trainer_resumes_from_its_checkpoints(recipe: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("accelerate")
    data = [{"input_ids": IDS[i % 2], "labels": torch.tensor(i % 2)} for i in range(8)]

    def trainer(model: nn.Module, steps: int) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2,
            report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
            dataloader_pin_memory=False, logging_strategy="no",
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=data)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        straight = rewritten(recipe)
        trainer(straight, 4).train()
        resumed = rewritten(recipe)
        trainer(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.eval()), logits(straight.eval()))
    assert not torch.equal(logits(rewritten(recipe)), logits(straight))
    again = from_pretrained(type(straight), tmp_path / "checkpoint-4")
    assert torch.equal(logits(again), logits(straight))


@pytest.mark.slow
@pytest.mark.clients
def test_diffusers_models_load_again(tmp_path: pathlib.Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    call = {"sample": torch.randn(1, 3, 8, 8), "timestep": torch.tensor([3])}
    model = rewrite(unet, [Monarch(nblocks=2)], call)
    model.save_pretrained(tmp_path)
    again = from_pretrained(diffusers.UNet2DModel, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(again(**call).sample, model(**call).sample)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        diffusers.UNet2DModel.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.clients
@pytest.mark.parametrize("method", ["save", "save_pretrained"])
@pytest.mark.parametrize("inner", [False, True], ids=["whole", "inner"])
def test_sentence_transformers_load_again(method: str, inner: bool, tmp_path: pathlib.Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its newer name is not in the oldest version we run with
        modules = pytest.importorskip("sentence_transformers.models")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    plain = tmp_path / "plain"
    bert(transformers.BertModel).save_pretrained(plain)
    (plain / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(plain / "vocab.txt")).save_pretrained(plain)

    def encoder() -> Any:
        first = modules.Transformer(str(plain), max_seq_length=8)
        return st.SentenceTransformer(modules=[first, modules.Pooling(16)], device="cpu").eval()

    def encode(model: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.encode(["a b c", "d e"], convert_to_tensor=True)

    model, saved = encoder(), tmp_path / "saved"
    if inner:
        model[0].model = rewrite(model[0].model, [TopK(4)], {"input_ids": IDS % 13})
    else:
        call = {"input_ids": IDS % 13, "attention_mask": torch.ones_like(IDS)}
        model = rewrite(model, [TopK(4)], (call,))
    assert not torch.equal(encode(model), encode(encoder()))
    getattr(model, method)(str(saved))
    with pytest.raises(ValueError, match="was rewritten"):
        st.SentenceTransformer(str(saved), device="cpu")
    again = encoder()
    if inner:
        again[0].model = from_pretrained(transformers.BertModel, saved)
    else:
        again = load(saved, again)
    assert torch.equal(encode(again), encode(model))
