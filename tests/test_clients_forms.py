"""Real clients run the captured graph in every call after the first of their form."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from closeness import assert_close, assert_equal, assert_reordered

from rewriter import Layer, RewriteWarning, rewrite
from rewriter.passes import Quantize

transformers: Any = pytest.importorskip("transformers")

IDS = torch.arange(2, 34).view(4, 8)


def config(**more: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, **more,
    )  # fmt: skip


def runs(model: Any) -> list[tuple[int, int]]:
    return [(f.graph + f.lowered + f.planned, f.python) for f in model.report.forms]


@pytest.fixture(scope="module")
def bert() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = transformers.BertModel(config()).eval()
    return model, rewrite(model, [], {"input_ids": IDS})


def test_after_save_pretrained_the_graph_runs(bert: tuple[Any, Any], tmp_path: Any) -> None:
    model, rewritten = bert
    model.save_pretrained(tmp_path / "original")
    rewritten.config.architectures = ["BertModel"]
    rewritten.config.id2label, rewritten.config.problem_type = {0: "a"}, "regression"
    before = runs(rewritten)[0][0]
    assert_equal(rewritten(input_ids=IDS)[0], model(input_ids=IDS)[0])
    assert runs(rewritten) == [(before + 1, 0)]


@pytest.mark.slow
def test_generate_with_a_cache_is_right() -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=64,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )  # fmt: skip
    ).eval()
    rewritten = rewrite(model, [], {"input_ids": IDS, "use_cache": False})
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = rewritten.generate(input_ids=IDS, **options)
    assert_equal(got, model.generate(input_ids=IDS, **options))
    texts = [str(w.message) for w in caught if w.category is RewriteWarning]
    assert len(texts) == len(set(texts)) <= 2
    reasons = [f.reason for f in rewritten.report.forms if f.python]
    assert reasons
    assert all("DynamicCache" in reason for reason in reasons)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::rewriter.RewriteWarning")  # that a cache runs Python
@pytest.mark.parametrize("scheme", ["int8-weight", "int4-weight"])
def test_generate_in_few_bits_is_that_of_the_same_weights(scheme: str) -> None:
    """Beams, samples, and prompts of different lengths, padded on the left."""
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
            bos_token_id=1, eos_token_id=95, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    ids, mask = torch.randint(3, 90, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    for row, padded in enumerate((0, 3, 6)):
        ids[row, :padded] = mask[row, :padded] = 0
    call = {"input_ids": ids, "attention_mask": mask}
    rewritten = rewrite(llama, [Quantize(scheme)], call)
    with torch.no_grad():  # the same weights, dense
        layers = {n: m for n, m in rewritten.named_modules() if isinstance(m, Layer)}
        for name, layer in layers.items():
            llama.get_submodule(name).weight.copy_(layer.dense_weight())
    assert len(layers) == 15
    few = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    for how in ({"num_beams": 2}, {"do_sample": True, "top_k": 20}, {"do_sample": False}):
        outputs = []
        for model in (rewritten, llama):
            torch.manual_seed(1)
            outputs.append(model.generate(**call, **few, **{"do_sample": False, **how}))
        got, want = outputs
        assert_equal(got.sequences, want.sequences)
        for a, b in zip(got.logits, want.logits, strict=True):
            assert_reordered(a, b)


@pytest.mark.clients
@pytest.mark.slow
def test_sentence_transformers_encode(bert: tuple[Any, Any], tmp_path: Any) -> None:
    sentence_transformers: Any = pytest.importorskip("sentence_transformers")
    model = bert[0]
    words = [f"w{i}" for i in range(59)]
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    client = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    word = client[0]
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]
    expected = client.encode(texts)
    example = {k: torch.ones(2, 5, dtype=torch.long) for k in ("input_ids", "attention_mask")}
    name, own = next((n, m) for n, m in word.named_children() if hasattr(m, "config"))
    rewritten = rewrite(own, [], example)
    setattr(word, name, rewritten)
    for _ in range(3):
        assert_close(torch.tensor(client.encode(texts)), torch.tensor(expected))
    assert sum(python for _, python in runs(rewritten)) == 0
    assert sum(graph for graph, _ in runs(rewritten)) == 3


@pytest.mark.clients
@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, 0.9])
def test_trainer_steps_run_the_graph(budget: float | None, tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config(num_labels=2))
    rewritten = rewrite(model, [], {"input_ids": IDS}, memory_budget=budget)
    data = [{"input_ids": IDS[i % 4], "labels": i % 2} for i in range(12)]
    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_steps=3, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    transformers.Trainer(rewritten, options, train_dataset=data).train()
    forms = rewritten.report.forms
    assert sum(f.python for f in forms) == 0
    assert sum(f.planned if budget else f.graph for f in forms) == 6
    assert len(forms) == 2
